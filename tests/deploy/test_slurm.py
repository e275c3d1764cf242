"""The Slurm scripts, with a stand-in for Slurm that runs every task on this machine."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from judges import ROOT, judge
from training import TINY, lines
from workbench import Project

from curation.service.runs import STAGES

HERE = "127.0.0.1"
BIN = Path(sys.executable).parent
SRUN = """#!/bin/bash
echo "$*" >>"$SRUN_LOG"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job on two nodes, which are this one."""
    stand_in = tmp_path / "slurm"
    stand_in.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", f"#!/bin/bash\necho {HERE}\n")):
        (stand_in / name).write_text(text)
        (stand_in / name).chmod(0o755)
    job = str(os.getpid())
    yield {
        **os.environ,
        "PATH": f"{stand_in}:{BIN}:{os.environ['PATH']}",
        "SRUN_LOG": str(tmp_path / "srun.log"),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_GPUS_ON_NODE": "0",
    }
    for left in of_job(job):
        os.kill(left, signal.SIGKILL)
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def of_job(job: str) -> list[int]:
    """The processes that name the folder of the job's Ray, or have files of it open.

    Ray's workers write a title over their command line; their logs lie in the folder.
    """
    folder, found = re.compile(rf"ray-{job}\b"), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since, or is another user's
            command = (process / "cmdline").read_text(errors="replace")
            opened = [os.readlink(file) for file in (process / "fd").iterdir()]
            if any(folder.search(text) for text in (command, *opened)):
                found.append(int(process.name))
    return found


def sbatch(
    arguments: list[str], env: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Runs a script; all that it started ends with it when it hangs."""
    with subprocess.Popen(
        ["bash", *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as script:
        try:
            output, _ = script.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(script.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(arguments, script.returncode, output)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HERE, port)) == 0


@pytest.mark.parametrize("name", ["curate.sbatch", "pretrain.sbatch"])
def test_the_scripts_are_sound(name: str) -> None:
    done = judge("shellcheck", f"deploy/slurm/{name}")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_recipe_runs_on_ray_and_nothing_stays_behind(
    slurm: dict[str, str], project: Callable[..., Project], tmp_path: Path
) -> None:
    work = project(pool=range(24))
    script = [str(ROOT / "deploy/slurm/curate.sbatch"), str(work.path)]
    done = sbatch(script, slurm, 240)
    assert done.returncode == 0, done.stdout
    assert all((work.run_folder / stage / "done.json").exists() for stage in STAGES)
    started = (tmp_path / "srun.log").read_text().splitlines()
    assert len(started) == 3  # the head, the other node, the recipe
    job = slurm["SLURM_JOB_ID"]
    port = 20000 + int(job) % 12000
    end = time.monotonic() + 60
    while listening(port) or of_job(job):
        assert time.monotonic() < end, of_job(job)
        time.sleep(0.5)


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(
    slurm: dict[str, str], project: Callable[..., Project], tmp_path: Path
) -> None:
    work, out = project(pool=range(12)), tmp_path / "trained"
    (tmp_path / "tiny.yaml").write_text(TINY)
    script = [str(ROOT / "deploy/slurm/pretrain.sbatch"), str(tmp_path / "tiny.yaml")]
    given = [*script, str(work.folder / "pool"), str(out)]
    job = {**slurm, "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1"}
    for iterations in (4, 8):
        more = ["--set", f"schedule.iterations={iterations}"]
        done = sbatch([*given, *more], job, 240)
        assert done.returncode == 0, done.stdout
    assert [line["iteration"] for line in lines(out)] == list(range(1, 9))
