"""The tools that judge files; a test without its tool is skipped, and says which."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def judge(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool of the dev extra or of the machine in the project's root; it may fail."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run(
        [path, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
