"""Two Ray nodes, of which one is lost while it works."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished import final_files
from test_ray import children, free_port, processes, start, wait_for
from workbench import Project

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]  # one Ray at a time
CPUS = 2  # logical ones of a node; with one Ray keeps work waiting for a node that is gone


class Nodes:
    """`ray start` processes of one cluster, ended by pid."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._scratch = Path("/tmp") / f"lvd-{os.getpid()}"
        self.address = f"127.0.0.1:{free_port()}"

    def add(self, *options: str) -> subprocess.Popen[bytes]:
        """The head, then workers."""
        port = self.address.rpartition(":")[2]
        where = [f"--address={self.address}"]
        if not self._started:
            where = ["--head", f"--port={port}", f"--temp-dir={self._scratch}"]
            where += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
        program = str(Path(sys.executable).parent / "ray")
        where += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}"]
        node = subprocess.Popen(
            [program, "start", "--block", *(options or (f"--num-cpus={CPUS}",)), *where],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._started.append(node)
        wait_for(lambda: self._answers() and set(processes("raylet")) & children(node.pid))
        return node

    def log(self, name: str) -> str:
        """What a process of the head wrote down."""
        path = self._scratch / "session_latest" / "logs" / name
        return path.read_text() if path.exists() else ""

    def _answers(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", int(self.address.rpartition(":")[2]))) == 0

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """All processes of a node at once, as when its power fails."""
        below = children(node.pid)
        for pid in {node.pid, *below}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait(60)

    def close(self) -> None:
        for node in reversed(self._started):
            self.lose(node)
        shutil.rmtree(self._scratch, ignore_errors=True)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = Nodes()
    yield cluster
    cluster.close()


def test_a_node_that_is_lost_in_mid_stage_changes_nothing(
    project: Callable[..., Project], nodes: Nodes
) -> None:
    work = project(pool=range(400), resources={"part_images": 8})
    assert work.run() == 0
    whole = final_files(work.run_folder)
    shutil.rmtree(work.run_folder)
    nodes.add()
    second = nodes.add()
    running = start(work, "--ray", nodes.address)
    embedding = work.run_folder / "embed" / "vectors"
    wait_for(lambda: len(list(embedding.glob("*.parquet"))) > 3)
    actors = children(second.pid) & set(processes("ray::_Actor"))
    assert actors, "the second node had no work"
    nodes.lose(second)
    assert not (work.run_folder / "embed" / "done.json").exists(), "it was lost too late"
    _, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    assert final_files(work.run_folder) == whole


def autoscaler_config() -> dict[str, Any]:
    """Two nodes at most, by the provider that Ray tests its autoscaler with."""
    lists = ("setup_commands", "head_setup_commands", "worker_setup_commands")
    lists += ("head_start_ray_commands", "worker_start_ray_commands")
    lists += ("initialization_commands", "cluster_synced_files")
    fake = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    kind = {"node_config": {}, "min_workers": 0}
    return {
        "cluster_name": "lvd",
        "max_workers": 2,
        "upscaling_speed": 10,
        "idle_timeout_minutes": 5,
        "provider": {"type": "external", "module": fake},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**kind, "resources": {"CPU": 0}, "max_workers": 0},
            "worker": {**kind, "resources": {"CPU": CPUS}, "max_workers": 2},
        },
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in lists},
    }


def test_work_asks_an_autoscaler_for_nodes_and_goes_on_when_they_come(
    project: Callable[..., Project], nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a head without CPUs. That provider can only start nodes of a head on Ray's usual port, so
    that what is asked for is read in the autoscaler's log, and the node is added by hand."""
    work = project(pool=range(40), resources={"part_images": 8})
    assert work.run() == 0
    whole = final_files(work.run_folder)
    shutil.rmtree(work.run_folder)
    (tmp_path / "autoscaler.yaml").write_text(yaml.safe_dump(autoscaler_config()))
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    nodes.add("--num-cpus=0", f"--autoscaling-config={tmp_path / 'autoscaler.yaml'}")
    running = start(work, "--ray", nodes.address)
    wait_for(lambda: "Queue 2 new nodes for launch" in nodes.log("monitor.log"))
    nodes.add()
    _, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    assert final_files(work.run_folder) == whole
