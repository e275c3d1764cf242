"""A real service in a process of its own, asked over real HTTP."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READY_S = 120
LINES = 30
HOSTILE = """"><img src=x onerror="document.title='owned'">'.jpg"""


@dataclass
class Served:
    """Where a service answers; its output so far is in `log`."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)


@contextlib.contextmanager
def served(root: Path | str, *options: str, **variables: str) -> Iterator[Served]:
    """`curate serve ROOT` on a free port, ended with the block."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "curation", "serve", str(root), "--port", "0", *options]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **variables}
            )
        try:
            yield Served(_url(process, log), log, process)
        finally:
            process.terminate()
            process.wait(20)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        found = re.search(r"on (http://\S+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def write_metrics(folder: Path, lines: int = LINES) -> None:
    """What `pretrain` leaves: metrics of some iterations of 40, kNN at every tenth."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("schedule: {iterations: 40, batch: 16}\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for n in range(1, lines + 1):
            told = {"time": 1000.0 + n, "iteration": n, "loss": 12 - n / 10, "koleo": 1 / n}
            told |= {"images_per_s": 100.0 + n, "data_wait": 0.02, "step_s": 0.1, "lr": 1e-4}
            file.write(json.dumps(told) + "\n")
            if n % 10 == 0:
                found = {"time": 1000.0 + n, "iteration": n, "knn_accuracy": n / 100}
                file.write(json.dumps(found) + "\n")
