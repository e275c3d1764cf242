"""The official implementation's recorded steps, where they are; and our own naive one's, always."""

from pathlib import Path

import pytest
from golden_check import LARGEST_ERROR, check_files, worst

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["*separate.npz", "*shared.npz", "two_ranks_*.npz"])
def test_the_official_steps_are_reproduced(name: str, shared: Path) -> None:
    errors = check_files(sorted((shared / "golden").glob(name)))
    assert errors
    assert {file: found for file, found in errors.items() if worst(found) > LARGEST_ERROR} == {}


def test_steps_written_down_naively_are_reproduced() -> None:
    (errors,) = check_files([HERE / "golden" / "tiny.npz"]).values()
    assert worst(errors) < LARGEST_ERROR
    assert {"gradient norms", "clipped gradients", "final student", "final teacher"} <= set(errors)
