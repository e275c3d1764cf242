"""WebDataset shards as a source of samples: any image of any tar by one read.

`curate` writes NNNNNN.tar, NNNNNN.index.parquet and manifest.json; the manifest is enough to open
120,000 of them, an index is read when one of its images is. Tars of other makers are scanned once.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pretrain.errors import UserError
from pretrain.folder import ImageFolder
from pretrain.samples import Ints, Sample, Source
from pretrain.storage import Storage, open_storage
from pretrain.tar import BLOCK, IMAGE_EXTENSIONS, TarFault, image_members, parse_header

MANIFEST = "manifest.json"
CACHED_ROWS = 1 << 20  # of indexes, about 90 bytes each
SCANNERS = 8  # threads
_IMAGE = rf"(?i)^[^.]+\.({'|'.join(sorted(IMAGE_EXTENSIONS))})$"


def open_source(uri: str, say: Callable[[str], object] | None = None, check: bool = True) -> Source:
    """Shards of `curate`, plain WebDataset tars, or images at any depth, whichever `uri` holds.

    `uri` is a folder or s3://bucket/prefix; `say` is told what takes long (default: stderr).
    `check=False` is for all ranks but the first: they needn't all list 240,000 files to find that
    the shards in the manifest are there. Errors: UserError when there is nothing to read, or a
    shard is missing, empty or damaged.
    """
    storage = open_storage(uri)
    if not check:
        with contextlib.suppress(UserError):  # no manifest, or it will be told below
            return _curated(storage, None)
    sizes = dict(storage.files())
    if MANIFEST in sizes:
        return _curated(storage, sizes)
    if f"shards/{MANIFEST}" in sizes:
        raise UserError(f"{uri}: a whole run; name its shards: {uri.rstrip('/')}/shards")
    tars = sorted(name for name in sizes if name.endswith(".tar"))
    if any(f"{name[:-4]}.index.parquet" in sizes for name in tars):
        raise UserError(
            f"{uri}: shards without {MANIFEST}, which `curate` writes last; let `curate run` "
            "finish, or copy that file too"
        )
    if tars:
        return _scanned(storage, tars, sizes, say or _stderr)
    images = [name for name in sizes if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    if not images:
        packed = [name for name in sizes if name.endswith((".tgz", ".tar.gz", ".tar.zst"))]
        found = f"only packed tars ({packed[0]}); unpack them" if packed else "nothing to read"
        raise UserError(f"{uri}: {found}; wanted shards (*.tar) or images (*.jpg, *.png, …)")
    return ImageFolder(storage, images)


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Index:
    """Where the images of one shard lie. `names` is None where nothing but the tar names them."""

    offsets: Ints  # (images,) bytes from the beginning of the tar
    sizes: Ints  # (images,) bytes
    names: NDArray[np.bytes_] | None = None  # (images,) the first 100 bytes, as in a header


class Shards:
    """Images of tars, in the order of the tars' names and of the members in each."""

    def __init__(
        self,
        storage: Storage,
        names: Sequence[str],
        counts: Ints,
        index: Callable[[int], Index],
        fingerprint: str,
    ) -> None:
        self.uri, self.remote = storage.uri, storage.remote
        self.counts, self.fingerprint = counts, fingerprint
        self._storage, self._names, self._load = storage, names, index
        self._starts: list[int] = (np.cumsum(counts) - counts).tolist()
        self._cached: OrderedDict[int, Index | Future[Index]] = OrderedDict()
        self._cached_rows = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self._storage, self._names, self.counts, self._load, self.fingerprint)
        return Shards, parts

    def read(self, sample: int) -> Sample:
        """The original bytes of an image, checked against its tar header. Errors: UserError."""
        shard = bisect_right(self._starts, sample) - 1
        row = sample - self._starts[shard]
        index, name = self._index(shard), self._names[shard]
        offset, size = index.offsets.item(row), index.sizes.item(row)
        block = self._storage.read(name, offset - BLOCK, BLOCK + size)
        if len(block) < BLOCK + size:
            raise UserError(f"{self.uri}/{name}: truncated since it was opened; copy it again")
        found = _name_in(block, size, None if index.names is None else index.names.item(row))
        if found is None:
            raise UserError(
                f"{self.uri}/{name}: its index doesn't match it at byte {offset}; "
                "copy both again from where they were made"
            )
        member = found.decode("utf-8", "backslashreplace")
        folder, slash, base = member.rpartition("/")
        return Sample(name, folder + slash + base.partition(".")[0], block[BLOCK:])

    def _index(self, shard: int) -> Index:
        """The index of a shard, read once however many threads ask for it."""
        found = self._cached.get(shard)
        if isinstance(found, Index):  # nearly always, so without the lock
            return found
        with self._lock:
            found = self._cached.get(shard)
            mine = found is None
            if found is None:
                found = self._cached[shard] = Future()
                self._cached_rows += int(self.counts[shard])
                while self._cached_rows > CACHED_ROWS and len(self._cached) > 1:
                    dropped, _ = self._cached.popitem(last=False)
                    self._cached_rows -= int(self.counts[dropped])
        if isinstance(found, Index):
            return found
        if mine:
            self._fill(shard, found)
        return found.result()

    def _fill(self, shard: int, future: Future[Index]) -> None:
        try:
            index = self._load(shard)
        except BaseException as error:
            future.set_exception(error)
            return
        future.set_result(index)
        with self._lock:
            if self._cached.get(shard) is future:  # others may have put it out meanwhile
                self._cached[shard] = index


def _name_in(block: bytes, size: int, wanted: bytes | None) -> bytes | None:
    """The name in the header before `size` bytes; None if it is none, or isn't `wanted`."""
    if wanted and block.startswith(wanted + b"\0") and block[124:136] == b"%011o\0" % size:
        return wanted  # as a header of `curate`'s nearly always is
    try:
        header = parse_header(block)
    except (ValueError, IndexError):
        return None
    return header.name if header.size == size and header.name == (wanted or header.name) else None


def _curated(storage: Storage, sizes: dict[str, int] | None) -> Shards:
    """Checks the manifest against itself and, if given, the bytes of each file that is there."""
    where = f"{storage.uri}/{MANIFEST}"
    try:
        manifest = json.loads(storage.read(MANIFEST))
        rows = manifest["shards"]
        names = [str(row["name"]) for row in rows]
        counts = np.array([row["images"] for row in rows], np.int64)
        tar_bytes = np.array([row["bytes"] for row in rows], np.int64)
        digests = [str(row["sha256"]) for row in rows]
        whole = str(manifest["hash"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{where}: not a manifest as `curate` writes it; copy it again") from None
    if hashlib.sha256("\n".join(digests).encode()).hexdigest() != whole:
        raise UserError(f"{where}: its `hash` is not that of its shards; copy it again")
    if not names:
        raise UserError(f"{where}: lists no shards; there is nothing to train on")
    if counts.min() < 1:
        name = names[int(counts.argmin())]
        raise UserError(f"{storage.uri}/{name}: an empty shard; make the shards again")
    if sizes is not None:
        _check_files(storage, sizes, names, tar_bytes.tolist())
    index = CuratedIndex(storage, names, counts, tar_bytes, np.array(digests, "S64"))
    return Shards(storage, names, counts, index, whole[:16])


def _check_files(
    storage: Storage, sizes: dict[str, int], names: list[str], tar_bytes: list[int]
) -> None:
    for name, expected in zip(names, tar_bytes, strict=True):
        for file in (name, _index_name(name)):
            if file not in sizes:
                raise UserError(f"{storage.uri}/{file}: missing, though {MANIFEST} lists it")
        if sizes[name] != expected:
            kind = "truncated" if sizes[name] < expected else "not the file that was listed"
            raise UserError(
                f"{storage.uri}/{name}: {kind}: {sizes[name]} bytes, {MANIFEST} says {expected}; "
                "copy it again"
            )
    strangers = sorted({n for n in sizes if n.endswith(".tar")} - set(names))
    if strangers:
        raise UserError(
            f"{storage.uri}/{strangers[0]}: not in {MANIFEST}; keep shards of other runs apart"
        )


def _index_name(tar: str) -> str:
    return f"{tar.removesuffix('.tar')}.index.parquet"


@dataclass(frozen=True)
class CuratedIndex:
    """Reads NNNNNN.index.parquet, one row a member file, and keeps the rows of images."""

    storage: Storage
    names: Sequence[str]
    counts: Ints
    tar_bytes: Ints
    digests: Any  # (shards,) sha256 of each tar, in hex

    def __call__(self, shard: int) -> Index:
        name = _index_name(self.names[shard])
        where = f"{self.storage.uri}/{name}"
        try:
            data = io.BytesIO(self.storage.read(name))
            table = pq.read_table(data, columns=["member", "offset", "size"])
            facts = {k: v.decode() for k, v in (table.schema.metadata or {}).items()}
            table = table.filter(pc.match_substring_regex(table["member"], _IMAGE))
            offsets = table["offset"].to_numpy().astype(np.int64)
            sizes = table["size"].to_numpy().astype(np.int64)
            names = pc.binary_slice(table["member"].cast(pa.binary()), 0, 100)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{where}: can't be read ({reason}); copy it again") from None
        listed = (self.counts[shard], self.tar_bytes[shard], self.digests[shard].decode())
        found = tuple(facts.get(name) for name in (b"images", b"bytes", b"sha256"))
        inside = (offsets >= BLOCK).all() and (offsets + sizes <= self.tar_bytes[shard]).all()
        if found != tuple(map(str, listed)) or len(table) != self.counts[shard] or not inside:
            raise UserError(
                f"{where}: not the index of this {self.names[shard]} ({MANIFEST} says "
                f"{listed[0]} images, {listed[1]} bytes, sha256 {listed[2][:12]}…); copy it again"
            )
        return Index(offsets, sizes, names.to_numpy().astype("S"))


def _scanned(
    storage: Storage, names: list[str], sizes: dict[str, int], say: Callable[[str], object]
) -> Shards:
    """Reads the headers of all tars. On S3 that is nearly all of their bytes."""
    say(
        f"{storage.uri}: no index; reading the headers of {len(names)} tars "
        "(shards that `curate` writes open at once)"
    )

    def scan(name: str) -> tuple[Ints, Ints]:
        try:
            with storage.open(name) as file:
                places = [(m.offset, m.size) for m in image_members(file, sizes[name])]
        except TarFault as fault:
            raise UserError(f"{storage.uri}/{name}: {fault}") from None
        if not places:
            raise UserError(f"{storage.uri}/{name}: an empty shard: it holds no image; remove it")
        found = np.array(places, np.int64)
        return found[:, 0].copy(), found[:, 1].copy()

    with ThreadPoolExecutor(SCANNERS) as pool:
        found = list(pool.map(scan, names))
    counts = np.array([len(offsets) for offsets, _ in found], np.int64)
    index = ScannedIndex([Index(offsets, size) for offsets, size in found])
    digest = hashlib.sha256()
    for name, (offsets, lengths) in zip(names, found, strict=True):
        for part in (os.fsencode(name), offsets.tobytes(), lengths.tobytes()):
            digest.update(part)
    return Shards(storage, names, counts, index, digest.hexdigest()[:16])


@dataclass(frozen=True)
class ScannedIndex:
    """Offsets found by scanning, held in memory: 16 bytes an image."""

    indexes: list[Index]

    def __call__(self, shard: int) -> Index:
        return self.indexes[shard]
