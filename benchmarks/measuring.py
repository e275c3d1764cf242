"""What the benchmarks share: the machine in a line, tables, clocks, memory, processes, hashes."""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

THREADS = (1, 2, 4)


def machine() -> str:
    """Processor, cores, what torch makes of them, threads, load and versions."""
    import torch  # not at the top: children whose memory is measured import this file

    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    parts = [
        name[1] if name else "unknown processor",
        f"{os.cpu_count()} cores",
        _instructions(),
        f"{torch.get_num_threads()} threads",
        f"load {os.getloadavg()[0]:.1f}",
        *filter(None, map(_package, ("torch", "faiss-cpu", "faiss-gpu", "numpy", "numba"))),
    ]
    return ", ".join(parts)


def _package(name: str) -> str:
    """With its version; empty where it isn't installed."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def _instructions() -> str:
    """What the processor multiplies matrices with."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX-512 BF16"
    return f"{torch.backends.cpu.get_cpu_capability()} (no bf16)"


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Prints a Markdown table and an empty line."""
    print(f"| {' | '.join(head)} |")
    print("|" + "---|" * len(head))
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")
    print(flush=True)


def target(what: str, met: bool) -> int:
    """Prints a target and whether it is met; returns 1 if it is missed."""
    print(f"{'met' if met else 'MISSED'}: {what}", flush=True)
    return int(not met)


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds, and what `work` returns."""
    began = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - began, result


def peak() -> int:
    """This process's peak resident bytes. Not ru_maxrss, which counts the parent up to the exec."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    if not found:
        raise OSError("/proc/self/status tells no VmHWM")
    return int(found[1]) * 1024


def forget_peak() -> None:
    """The peak starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def child(code: str, *arguments: object) -> list[float]:
    """The numbers on the last line that a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in finished.stdout.splitlines()[-1].split()]


def digest(*arrays: npt.NDArray[Any]) -> str:
    """The first digits of the hash of all bytes."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()[:12]


def same_on_threads(what: str, work: Callable[[], tuple[npt.NDArray[Any], ...]]) -> int:
    """Prints the hash of what `work` gives on 1, 2 and 4 threads; returns 1 if they differ."""
    import torch

    before, found = torch.get_num_threads(), []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            found.append(digest(*work()))
    finally:
        torch.set_num_threads(before)
    table([what, *(f"{threads} threads" for threads in THREADS)], [["sha256", *found]])
    return target(f"{what}: the same bytes on any number of threads", len(set(found)) == 1)
