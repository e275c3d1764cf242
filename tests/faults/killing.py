"""Runs of `curate` in child processes that end themselves with SIGKILL at a chosen write.

Every publish has two points where a run can die, before and after the rename, every delete one, and
every block of edges that joins the union-find one.
The children are forked from a server that has the imports done: a run costs its work alone.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench import Project

PRELOAD = ["curation.cli", "curation.images.encoders", "timm", "faiss", "numba", "torchvision"]


def run_and_die(
    arguments: list[str], kill_at: int, log: Path, limits: tuple[int, int], counted: Path
) -> None:
    """In the child: `curate` with small cells, dead at the `kill_at`-th point (never: 0).

    `limits`: the rows of chunks, buckets and slices, and the bytes up to which k-means runs in
    the driver.
    """
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from curation.algorithms import knn
    from curation.algorithms.components import Components
    from curation.cli import main
    from curation.runtime.store import FileStore
    from curation.stages import centroids, cluster_sample, neighbours

    neighbours.CHUNK_ROWS = neighbours.BUCKET_ROWS = cluster_sample.SLICE_ROWS = limits[0]
    centroids.HERE_BYTES = limits[1]
    knn.ROWS_PER_CELL, knn.FEW_CELLS = 3, 2
    os.fsync = lambda _: None  # a kill is no power cut: what was written stays
    gc.freeze()  # the imports are not garbage: without them a collection takes no time
    points: list[str] = []
    main_thread = threading.get_ident()

    def point(kind: str, path: str) -> None:
        if threading.get_ident() == main_thread:  # a heartbeat would make the numbers wander
            points.append(f"{kind} {path.rpartition('/')[0]}")
            if len(points) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    publish, delete, add = FileStore.publish, FileStore.delete, Components.add

    @contextlib.contextmanager
    def deadly_publish(self: FileStore, path: str) -> Iterator[Path]:
        with publish(self, path) as scratch:
            yield scratch
            point("written", path)
        point("published", path)

    def deadly_delete(self: FileStore, path: str) -> None:
        delete(self, path)
        point("deleted", path)

    def deadly_add(self: Components, left: Any, right: Any) -> None:
        add(self, left, right)
        point("joined", "dedup/")

    FileStore.publish, FileStore.delete = deadly_publish, deadly_delete  # type: ignore[method-assign]
    Components.add = deadly_add  # type: ignore[method-assign]
    code = main(arguments)
    counted.write_text("\n".join(points))
    sys.stdout.flush()
    os._exit(code)


class Mortal:
    """A project whose runs can be killed."""

    def __init__(self, work: Project, rows: int = 24) -> None:
        self.work, self.rows = work, rows
        self.here_bytes = 1 << 30
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self.log = work.folder / "log.txt"
        self._counted = work.folder / "points"

    def run(self, kill_at: int = 0, *options: str) -> int:
        """The exit status of `curate run`: -9 when it was killed."""
        arguments = ["run", str(self.work.path), "--ray", "off", *options]
        child = self._context.Process(
            target=run_and_die,
            args=(arguments, kill_at, self.log, (self.rows, self.here_bytes), self._counted),
        )
        child.start()
        child.join(300)
        assert child.exitcode is not None
        return child.exitcode

    def points(self) -> list[str]:
        """Where the last whole run could have died: what was done, in which folder."""
        return self._counted.read_text().splitlines()
