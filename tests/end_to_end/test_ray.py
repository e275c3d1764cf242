"""Real Ray: workers that die, a part that kills them, Ctrl-C, and a job on a cluster."""

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finished import counts, final_files
from ray.cloudpickle import register_pickle_by_value
from served import served
from workbench import Project

from curation.runtime.events import Events
from curation.runtime.executor import Item, Work, map_parts
from curation.runtime.ray_executor import RayExecutor
from curation.runtime.store import FileStore, StoreError
from curation.service.client import Client

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]  # one Ray at a time
ROOT = Path(__file__).resolve().parents[2]
register_pickle_by_value(sys.modules[__name__])  # workers can't import a test


def processes(*wanted: str) -> dict[int, str]:
    """Command lines, by pid, that hold all of the texts; what has ended has none."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended just now
        if all(text in line for text in wanted):
            found[int(folder.name)] = line
    return found


def children(parent: int) -> set[int]:
    """All processes below one."""
    above = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        above[int(folder.name)] = int(fields[1])
    found, added = set[int](), {parent}
    while added:
        added = {pid for pid, its in above.items() if its in added} - found
        found |= added
    return found


class Slow:
    """Writes its pid, works a moment; the item `poison` kills it, another one raises."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def __call__(self, item: str) -> dict[str, Any]:
        with open(self._folder / f"{item}.pids", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        if item == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "wrong":
            raise ValueError("no good")
        return {"images": 1}


@pytest.fixture
def ray_of_two() -> Iterator[RayExecutor]:
    executor = RayExecutor("local", 2)
    yield executor
    executor.close()


def items(*names: str) -> list[Item]:
    return [Item(name, 1, name) for name in names]


def pids(folder: Path, name: str) -> list[int]:
    return [int(line) for line in (folder / f"{name}.pids").read_text().split()]


def test_a_worker_that_is_killed_and_a_part_that_kills(
    tmp_path: Path, ray_of_two: RayExecutor
) -> None:
    names = [f"good-{n}" for n in range(6)]

    def kill_one() -> None:
        path = tmp_path / "good-1.pids"
        while not path.exists() or not path.read_text():
            time.sleep(0.05)
        os.kill(pids(tmp_path, "good-1")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    events = Events(FileStore(str(tmp_path / "run")))
    with events.stage("embed"):
        work = Work(
            "embed",
            items("poison", "wrong", *names),
            lambda item: item.name == "good-5",
            lambda: Slow(str(tmp_path)),
        )
        result = map_parts(work, ray_of_two, events)
    killer.join()
    assert (result.computed, result.reused) == (5, 1)
    assert result.failed["wrong"] == "ValueError: no good"
    assert result.failed["poison"].startswith("worker_died: 3 workers died on this part")
    assert len(set(pids(tmp_path, "poison"))) == 3
    assert len(pids(tmp_path, "good-1")) == 2
    # Beside it only what was under way when a worker was killed is done again.
    assert sum(len(pids(tmp_path, name)) for name in names[:5]) <= 7


def test_a_second_map_finds_the_workers_of_the_first(
    tmp_path: Path, ray_of_two: RayExecutor
) -> None:
    for name in ("a", "b"):
        worker = functools.partial(Slow, str(tmp_path / name))
        (tmp_path / name).mkdir()
        outcomes = list(ray_of_two.map(worker, ["1", "2", "3", "4"]))
        assert all(outcome.counts for outcome in outcomes)
    first, second = (
        {pid for number in "1234" for pid in pids(tmp_path / name, number)} for name in ("a", "b")
    )
    assert first & second


class _Missing:
    """Can't be unpickled by any worker, like a package that a node does not have."""

    def __reduce__(self) -> Any:
        return (__import__, ("no_such_package_here",))


def test_workers_that_can_not_start_are_one_clear_error(ray_of_two: RayExecutor) -> None:
    missing = _Missing()
    with pytest.raises(StoreError, match=r"could not start.*no_such_package_here"):
        list(ray_of_two.map(missing, ["a"]))  # type: ignore[arg-type]


def start(work: Project, *options: str) -> subprocess.Popen[str]:
    """`curate run` as the leader of its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "curation", "run", str(work.path), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(found: Callable[[], Any], timeout_s: float = 120) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


def test_a_worker_killed_while_it_embeds_changes_nothing(project: Callable[..., Project]) -> None:
    work = project(pool=range(120))
    assert work.run() == 0
    whole = final_files(work.run_folder)
    shutil.rmtree(work.run_folder)
    running = start(work, "--ray", "local")
    embedding = work.run_folder / "embed" / "vectors"
    wait_for(lambda: list(embedding.glob("*.parquet")))
    actors = [pid for pid in children(running.pid) if pid in processes("ray::_Actor")]
    assert actors
    os.kill(actors[0], signal.SIGKILL)
    assert running.wait(300) == 0, running.communicate()
    assert final_files(work.run_folder) == whole


def test_ctrl_c_says_one_line_and_leaves_no_ray_behind(project: Callable[..., Project]) -> None:
    work = project(pool=range(200))
    running = start(work, "--ray", "local")
    wait_for(lambda: list((work.run_folder / "embed" / "vectors").glob("*.parquet")))
    below = children(running.pid)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    said = [line for line in errors.splitlines() if " images" not in line and line.strip()]
    assert said == ["curate: stopped; finished parts are kept, run again to go on"]
    status = json.loads((work.run_folder / "status" / "embed.json").read_text())
    assert status["state"] == "stopped"
    wait_for(lambda: not below & set(processes("ray")), 30)
    assert work.run() == 0
    assert counts(work.run_folder, "embed")["reused"] > 0


def test_a_killed_run_leaves_no_worker_behind_and_goes_on(project: Callable[..., Project]) -> None:
    work = project(pool=range(200))
    assert work.run() == 0
    whole = final_files(work.run_folder)
    shutil.rmtree(work.run_folder)
    running = start(work, "--ray", "local")
    wait_for(lambda: list((work.run_folder / "embed" / "vectors").glob("*.parquet")))
    below = children(running.pid)
    running.kill()
    running.communicate()
    # Ray's own two agents notice a kill after a minute only; they write nothing.
    wait_for(lambda: not below & set(processes("ray::_Actor")), 60)
    had = len(list((work.run_folder / "embed" / "vectors").glob("*.parquet")))
    assert work.run() == 0
    assert counts(work.run_folder, "embed")["reused"] == had
    assert final_files(work.run_folder) == whole


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dashboard's address of a `ray start --head` of its own, ended by pid."""
    scratch = Path("/tmp") / f"lvd-{os.getpid()}"
    port, dashboard, client, agent = (free_port() for _ in range(4))
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    command += ["--include-dashboard=true", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={scratch}"]
    monkeypatch.setenv("PATH", f"{ray.parent}:{os.environ['PATH']}")  # jobs: the first python there
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    head = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers() -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", dashboard)) == 0

    try:
        wait_for(answers, 120)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        below = children(head.pid)
        head.terminate()
        head.wait(60)
        for pid in below & set(processes("ray")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_job_on_a_cluster(project: Callable[..., Project], cluster: str) -> None:
    """The command of the manual, with the project's root as working directory."""
    work = project(pool=range(40))
    assert work.run() == 0
    whole = final_files(work.run_folder)
    shutil.rmtree(work.run_folder)
    tools = Path(sys.executable).parent
    command = [str(tools / "ray"), "job", "submit", "--address", cluster, "--working-dir", "."]
    command += ["--", "python", "curate.py", "run", str(work.path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert final_files(work.run_folder) == whole
    status = json.loads((work.run_folder / "status" / "embed.json").read_text())
    assert status["workers"] == 2  # the cluster's, not this machine's own


def test_jobs_sent_through_the_service(project: Callable[..., Project], cluster: str) -> None:
    """Submitted with a recipe, followed by its logs, cancelled; the result is the local run's."""
    work = project(pool=range(100))
    assert work.run() == 0
    whole = final_files(work.run_folder)
    shutil.rmtree(work.run_folder)
    token = secrets.token_hex(16)
    options = ("--ray-dashboard", cluster)
    with (
        served(work.folder, *options, LVD_SUBMIT_TOKENS=token) as service,
        Client(service.url, token) as client,
    ):
        recipe = work.path.read_text()
        job = client.submit(recipe).job
        vectors = work.run_folder / "embed" / "vectors"
        wait_for(lambda: list(vectors.glob("*.parquet")), 120)
        assert client.job(job).state == "RUNNING"
        assert client.job(job).output == str(work.run_folder)
        assert client.cancel(job).job == job
        wait_for(lambda: client.job(job).state == "STOPPED", 60)
        assert not (work.run_folder / "lineage" / "done.json").exists()
        kept = {path: path.stat().st_mtime_ns for path in vectors.glob("*.parquet")}
        again = client.submit(recipe).job
        wait_for(lambda: client.job(again).ended, 300)
        logs = client.job_logs(again)
        assert client.job(again).state == "SUCCEEDED", logs
        assert "pool images" in logs
        assert client.run("run").state == "done"
    assert final_files(work.run_folder) == whole
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # nothing was done again
