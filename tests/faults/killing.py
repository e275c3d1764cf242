"""Runs of `curate` in child processes that end themselves with SIGKILL at a chosen write.

Every publish has two points where a run can die, before and after the rename, every delete one, and
every block of edges that joins the union-find one. A run can also go on and copy its folder at many
points: such a copy is what SIGKILL there would have left.
The children are forked from a server that has run `curate` before: a run costs its work alone.
"""

import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from workbench import Project


@functools.cache
def warm_server() -> multiprocessing.context.ForkServerContext:
    """The server of these processes, which are forked when it has imported `warm`."""
    context = multiprocessing.get_context("forkserver")
    # Where this way is the default (Python 3.14) others may have started a server, without `warm`.
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    context.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 tells it no sys.path
        multiprocessing.forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Plan:
    """What a child does at which point.

    `rows`: of chunks, buckets and slices; `here_bytes`: up to which k-means runs in the driver.
    """

    rows: int
    here_bytes: int
    folder: Path
    kill_at: int = 0
    copy_at: Collection[int] = ()


class InTurn:
    """Stands where a ThreadPoolExecutor does, without threads: what is done has a fixed number."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, do: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(do(*arguments))
        return done

    def map(self, do: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(do, items)


def run_and_die(arguments: list[str], plan: Plan) -> None:
    """In the child: `curate` with small cells, dead at the `kill_at`-th point (never: 0)."""
    assert "warm" in sys.modules
    with open(plan.folder / "log.txt", "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from curation.algorithms import knn
    from curation.algorithms.components import Components
    from curation.cli import main
    from curation.runtime import store
    from curation.runtime.store import FileStore
    from curation.stages import centroids, cluster_sample, neighbour_index, neighbours, tables

    neighbours.CHUNK_ROWS = neighbour_index.BUCKET_ROWS = cluster_sample.SLICE_ROWS = plan.rows
    centroids.HERE_BYTES = plan.here_bytes
    knn.ROWS_PER_CELL, knn.FEW_CELLS = 3, 2
    store.ThreadPoolExecutor = tables.ThreadPoolExecutor = InTurn  # type: ignore[misc, assignment]
    os.fsync = lambda _: None  # a kill is no power cut: what was written stays
    gc.freeze()  # the imports are not garbage: without them a collection takes no time
    points: list[str] = []
    main_thread = threading.get_ident()

    def point(kind: str, path: str) -> None:
        if threading.get_ident() == main_thread:  # a heartbeat would make the numbers wander
            points.append(f"{kind} {path.rpartition('/')[0]}")
            if len(points) == plan.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if len(points) in plan.copy_at:
                copies = plan.folder / "copies"
                shutil.copytree(plan.folder / "run", copies / str(len(points)))

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
        point("joined", "components/")

    FileStore.publish, FileStore.delete = deadly_publish, deadly_delete  # type: ignore[method-assign]
    Components.add = deadly_add  # type: ignore[method-assign]
    code = main(arguments)
    (plan.folder / "points").write_text("\n".join(points))
    sys.stdout.flush()
    os._exit(code)


class Mortal:
    """A project whose runs can be killed."""

    def __init__(self, work: Project, rows: int = 24) -> None:
        self.work, self.rows = work, rows
        self.here_bytes = 1 << 30
        self.log = work.folder / "log.txt"

    def run(self, kill_at: int = 0, copy_at: Collection[int] = (), until: str = "report") -> int:
        """The exit status of `curate run`: -9 when it was killed."""
        arguments = ["run", str(self.work.path), "--ray", "off", "--until", until]
        plan = Plan(self.rows, self.here_bytes, self.work.folder, kill_at, copy_at)
        child = warm_server().Process(target=run_and_die, args=(arguments, plan))
        child.start()
        child.join(300)
        assert child.exitcode is not None
        return child.exitcode

    def points(self) -> list[str]:
        """Where the last whole run could have died: what was done, in which folder."""
        return (self.work.folder / "points").read_text().splitlines()

    def die_at(self, points: Collection[int]) -> Iterator[int]:
        """Makes the run folder what a fresh run leaves that dies at a point, for one by one."""
        run = self.work.run_folder
        shutil.rmtree(run)
        assert self.run(copy_at=points) == 0
        for point in sorted(points):
            shutil.rmtree(run)
            (self.work.folder / "copies" / str(point)).rename(run)
            yield point
