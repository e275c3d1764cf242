"""The shards of a run: pages of the list, pages of one shard, bytes of one image, downloads."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.runtime.store import Store, read_table
from curation.schema import SHARD_INDEX, SHARDS_MANIFEST
from curation.service import models
from curation.service.cache import Cache, Fresh
from curation.service.intact import intact
from curation.service.runs import READERS, NotThere, Run

LIST_S = 5.0
MANIFESTS = 4  # runs whose list of shards is kept: 15 MB for 120,000 shards
FOOTERS = 20_000  # of shards that are being written
INDEX = ".index.parquet"
INDEX_BYTES = 128 << 20
LINK_S = 900
IMAGE_TYPES = {
    "jpg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "tif": "image/tiff",
}
KEY_DIGITS = 64


@dataclass(frozen=True)
class ShardList:
    """Names (n,) of shards; with a manifest also images (n,), bytes (n,) and sha256 (n,)."""

    names: npt.NDArray[np.bytes_]
    facts: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.void]] | None

    def __len__(self) -> int:
        return len(self.names)


class ShardReader:
    """Reads shards of all runs. The manifest is read once a run; an index once while it is used.

    While shards are written only their names are listed; what is in one stands in the footer of
    its index, which is read for the page that shows it.
    """

    def __init__(self) -> None:
        self._lists: Cache[ShardList] = Cache(MANIFESTS, lambda _: 1)
        self._growing: Cache[Fresh[ShardList]] = Cache(MANIFESTS, lambda _: 1)
        self._footers: Cache[models.Shard] = Cache(FOOTERS, lambda _: 1)
        self._indexes: Cache[pa.Table] = Cache(INDEX_BYTES, lambda table: int(table.nbytes))

    def shards(self, run: Run) -> ShardList:
        """All shards of a run, or those that are written so far."""
        report = run.reports().get("shards")
        if report is not None:
            key = (run.path, report.fingerprint)
            return self._lists.get(key, lambda: _of_manifest(run.store))
        return self._growing.get(run.path, lambda: Fresh(lambda: _so_far(run.store), LIST_S)).get()

    def page(self, run: Run, offset: int, limit: int) -> models.Shards:
        shards = self.shards(run)
        page = range(offset, min(offset + limit, len(shards)))
        began = run.started("shards")  # here: a reader that waits for readers may wait for ever
        return models.Shards(
            total=len(shards),
            offset=offset,
            complete=shards.facts is not None,
            shards=list(READERS.map(lambda at: self._one(run, shards, at, began), page)),
        )

    def _one(self, run: Run, shards: ShardList, at: int, began: float) -> models.Shard:
        name = shards.names[at].decode()
        if shards.facts is None:
            key = (run.path, began, name)
            return self._footers.get(key, lambda: _of_footer(run.store, name))
        images, sizes, digests = (column[at] for column in shards.facts)
        digest = bytes(digests).hex()
        return models.Shard(shard=name, images=int(images), bytes=int(sizes), sha256=digest)

    def find(self, run: Run, shard: str) -> models.Shard:
        """A shard by its name. Raises NotThere."""
        shards = self.shards(run)
        wanted = shard.encode("utf-8", "replace")
        at = int(np.searchsorted(shards.names, wanted)) if len(shards) else 0
        if at == len(shards) or shards.names[at] != wanted:
            raise NotThere(f"run '{run.name}' has no shard '{shard[:80]}'")
        return self._one(run, shards, at, run.started("shards"))

    def index(self, run: Run, shard: models.Shard) -> pa.Table:
        """The index of a shard: one row a member."""
        path = _index_path(shard.shard)
        key = (run.path, shard.shard, shard.sha256)

        def read() -> pa.Table:
            with intact(run.store, path):
                return read_table(run.store, path, SHARD_INDEX.names)

        return self._indexes.get(key, read)

    def samples(self, run: Run, shard: str, offset: int, limit: int) -> models.ShardSamples:
        """A page of a shard's images, in its order."""
        found = self.find(run, shard)
        index = self.index(run, found)
        first = _first_members(index)
        rows = index.take(pa.array(first[offset : offset + limit])).to_pylist()
        samples = [
            models.Sample(key=row["key"], member=row["member"], bytes=row["size"]) for row in rows
        ]
        return models.ShardSamples(shard=found, total=len(first), offset=offset, samples=samples)

    def image(self, run: Run, shard: str, key: str) -> tuple[bytes, str]:
        """The original bytes of an image and its media type. Raises NotThere."""
        found = self.find(run, shard)
        index = self.index(run, found)
        at = index["key"].combine_chunks().index(key).as_py()
        if at < 0:
            raise NotThere(f"shard '{shard[:80]}' has no image '{key[:KEY_DIGITS]}'")
        row = index.slice(at, 1).to_pylist()[0]
        data = run.store.read(f"shards/{found.shard}", row["offset"], row["size"])
        ext = row["member"].rpartition(".")[2]
        return data, IMAGE_TYPES.get(ext, "application/octet-stream")

    def link(self, run: Run, shard: str) -> str | None:
        """A URL of the store that reads the shard for a quarter of an hour; None in a folder."""
        return run.store.link(f"shards/{self.find(run, shard).shard}", LINK_S)

    def local_path(self, run: Run, shard: str) -> Path:
        """Where a shard lies, in a run that is a folder."""
        return Path(run.store.locate(f"shards/{self.find(run, shard).shard}"))


def _index_path(shard: str) -> str:
    return f"shards/{shard.removesuffix('.tar')}{INDEX}"


def _first_members(index: pa.Table) -> npt.NDArray[np.int64]:
    """The rows (n,) that begin a new key: the image comes first, its JSON and extras follow."""
    keys = index["key"].to_numpy(zero_copy_only=False)
    if not len(keys):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])


def _of_manifest(store: Store) -> ShardList:
    with intact(store, SHARDS_MANIFEST):
        rows = json.loads(store.read(SHARDS_MANIFEST))["shards"]
        digests = bytes.fromhex("".join(row["sha256"] for row in rows))
        facts = (
            np.array([row["images"] for row in rows], np.int64),
            np.array([row["bytes"] for row in rows], np.int64),
            np.frombuffer(digests, np.dtype("V32")),
        )
        return ShardList(np.array([row["name"].encode() for row in rows], np.bytes_), facts)


def _so_far(store: Store) -> ShardList:
    """The shards whose index is there; it comes after the tar."""
    found = [entry.path.removeprefix("shards/") for entry in store.list("shards")]
    names = [
        name.removesuffix(INDEX).encode() + b".tar"
        for name in found
        if name.endswith(INDEX) and "/" not in name
    ]
    return ShardList(np.array(names, np.bytes_), None)


def _of_footer(store: Store, shard: str) -> models.Shard:
    path = _index_path(shard)
    with intact(store, path), store.open(path) as file:
        facts = pq.read_schema(file).metadata
        size, digest = int(facts[b"bytes"]), facts[b"sha256"].decode()
        return models.Shard(shard=shard, images=int(facts[b"images"]), bytes=size, sha256=digest)
