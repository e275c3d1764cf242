"""The nearest in a run to an upload or to one of its images: every vector is read, by parts."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.runtime.manifest import embedded_name
from curation.runtime.store import read_table
from curation.schema import PARTS_TABLE
from curation.service import models
from curation.service.intact import intact
from curation.service.lineage import LineageReader
from curation.service.runs import NotThere, Run

SEARCH_S = 10.0
AT_ONCE = 2
COLUMNS = ["part", "base", "fingerprint"]

Vector = npt.NDArray[np.float32]
# (the run's recipe as YAML, the image's bytes) -> unit row (D,). Raises BadUpload.
Embed = Callable[[str, bytes], Vector]


class BadUpload(Exception):
    """An upload that is no image that can be searched for: says why."""


class Busy(Exception):
    """Too many searches at once."""


class Searcher:
    """Exact search within a budget of time; memory is one part's vectors."""

    def __init__(self, lineage: LineageReader, embed: Embed) -> None:
        self._lineage, self._embed = lineage, embed
        self._turns = threading.BoundedSemaphore(AT_ONCE)

    def nearest(self, run: Run, data: bytes, k: int) -> models.SearchAnswer:
        """The `k` nearest by the run's encoder. Raises BadUpload, Busy or NotThere."""
        run.report("lineage")
        with self._turn():
            return self._search(run, self._embed(run.recipe(), data), k)

    def neighbours(self, run: Run, image: models.Image, k: int) -> models.SearchAnswer:
        """The `k` nearest to an image of the run, without itself. Raises Busy or NotThere."""
        with self._turn():
            found = self._search(run, _vector(run, image.image), k + 1)
        others = [hit for hit in found.hits if hit.image.image != image.image]
        return found.model_copy(update={"hits": others[:k]})

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.acquire(timeout=SEARCH_S):
            raise Busy("other searches are running; try again in a moment")
        try:
            yield
        finally:
            self._turns.release()

    def _search(self, run: Run, query: Vector, k: int) -> models.SearchAnswer:
        counts = run.report("embed").counts
        embedding = counts["embedding"]
        images = int(counts["images"] - counts["rejected"])
        parts = read_table(run.store, PARTS_TABLE, COLUMNS)
        best_cosine, best_image = np.zeros(0, np.float32), np.zeros(0, np.int64)
        until, searched, complete = time.monotonic() + SEARCH_S, 0, True
        for base, fingerprint in zip(
            parts["base"].to_pylist(), parts["fingerprint"].to_pylist(), strict=True
        ):
            if time.monotonic() > until:
                complete = False
                break
            images_of_part, rows = _part(run, base, fingerprint, embedding)
            searched += len(rows)
            cosine = np.r_[best_cosine, rows @ query]
            image = np.r_[best_image, images_of_part]
            top = np.lexsort((image, -cosine))[:k]
            best_cosine, best_image = cosine[top], image[top]
        found = self._lineage.rows(run, best_image.tolist())
        hits = [
            models.Hit(cosine=round(float(c), 4), image=row)
            for c, row in zip(best_cosine, found, strict=True)
        ]
        return models.SearchAnswer(hits=hits, searched=searched, images=images, complete=complete)


def _vector(run: Run, image: int) -> Vector:
    """The unit row (D,) of an image of the run. Raises NotThere."""
    parts = read_table(run.store, PARTS_TABLE, COLUMNS)
    at = int(np.searchsorted(parts["base"].to_numpy(), image, "right")) - 1
    base, fingerprint = parts["base"][at].as_py(), parts["fingerprint"][at].as_py()
    images, rows = _part(run, base, fingerprint, run.report("embed").counts["embedding"])
    mine = np.flatnonzero(images == image)
    if not len(mine):
        raise NotThere("this image was rejected, so it has no vector and no neighbours")
    row: Vector = rows[mine[0]]
    return row


def _part(
    run: Run, base: int, fingerprint: str, embedding: str
) -> tuple[npt.NDArray[np.int64], Vector]:
    """The image numbers (n,) and unit rows (n, D) of a part."""
    path = f"embed/vectors/{embedded_name(fingerprint, embedding)}.parquet"
    with intact(run.store, path):
        table = read_table(run.store, path, ["row", "semantic"])
        return base + table["row"].to_numpy().astype(np.int64), _rows(table)


def _rows(table: pa.Table) -> Vector:
    """Unit rows (n, D) of a part's vectors."""
    dim = table.schema.field("semantic").type.byte_width // np.dtype(np.float16).itemsize
    blocks = [
        np.frombuffer(chunk.buffers()[1], np.float16)[
            chunk.offset * dim : (chunk.offset + len(chunk)) * dim
        ]
        for chunk in table["semantic"].chunks
        if len(chunk)
    ]
    if not blocks:
        return np.zeros((0, dim), np.float32)
    return np.concatenate(blocks).reshape(-1, dim).astype(np.float32)
