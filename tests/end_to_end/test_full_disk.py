"""A disk that fills up during a run: one clear line, no half file, and on from there afterwards."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from workbench import Project

DISK_BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={DISK_BYTES}"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("can't mount a small disk here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def results(run: Path) -> dict[str, str]:
    """Digests of every table and shard, by name."""
    paths = [p for p in run.rglob("*") if p.suffix in (".parquet", ".tar", ".npy")]
    digest = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    assert any(name.endswith(".tar") for name in digest)
    return digest


def assert_readable(run: Path) -> None:
    """Whatever has its final name is whole."""
    for path in run.rglob("*.parquet"):
        pq.read_table(path)
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_stops_the_run_and_more_space_lets_it_go_on(
    project: Callable[..., Project], disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = project(pool=range(40))
    work.recipe["output"] = str(disk / "run")
    assert work.run() == 0
    wanted = results(disk / "run")
    used = DISK_BYTES - shutil.disk_usage(disk).free
    stopped = set()
    for share in (0.04, 0.3, 0.5, 0.7, 0.9):
        shutil.rmtree(disk / "run")
        (disk / "ballast").write_bytes(bytes(DISK_BYTES - int(used * share)))
        capsys.readouterr()
        assert work.run() == 1, share
        error = capsys.readouterr().err
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("curate: ")]
        assert len(lines) == 1
        assert "the disk is full; free some space and run again" in lines[0]
        if (disk / "run").exists():
            assert_readable(disk / "run")
            stopped.add(len(list((disk / "run").glob("*/done.json"))))
        (disk / "ballast").unlink()
        assert work.run() == 0
        assert results(disk / "run") == wanted
    assert len(stopped) > 1  # in different stages
