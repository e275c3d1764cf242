"""Mutated images and archives: no crash, bounded time and memory, every image with a reason."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
from workbench import Project

from curation.runtime.store import open_store, read_table
from curation.stages.tables import Embedded, read_parts

# Deeper: LVD_FUZZ=100 tries a hundred times as many.
DEPTH = int(os.environ.get("LVD_FUZZ", "1"))


@pytest.mark.parametrize(("what", "examples"), [("images", 1500), ("tars", 600)])
@pytest.mark.slow
def test_mutated_files_cost_little_and_get_a_reason(
    tmp_path: Path, what: str, examples: int
) -> None:
    current = tmp_path / "current"
    command = [sys.executable, hostile.__file__, what, str(examples * DEPTH), str(current)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert child.returncode == 0, (child.returncode, child.stderr[-3000:], current.read_bytes())


@pytest.mark.slow
def test_a_run_over_mutated_files_tells_of_each(project: Callable[..., Project]) -> None:
    draw = random.Random(0)

    def mutant(originals: list[bytes]) -> bytes:
        edits = [
            (draw.choice(["set", "insert", "delete", "repeat", "cut"]), draw.random(), value)
            for value in draw.sample(hostile.EXTREMES, draw.randint(1, 3))
        ]
        return hostile.edited(draw.choice(originals), edits)

    work = project(pool=range(4), failures={"max_share": 1.0}, images={"min_side": 16})
    pool, originals = work.folder / "pool", hostile.files()
    for number in range(250):
        (pool / f"mutant-{number}.jpg").write_bytes(mutant(originals))
    for number in range(40):
        (pool / f"mutant-{number}.tar").write_bytes(mutant([hostile.tar()]))
    command = [sys.executable, "-m", "curation", "run", str(work.path), "--ray", "off"]
    child = subprocess.run([*command, "--until", "embed"], capture_output=True, text=True)
    assert child.returncode == 0, (child.returncode, child.stderr[-3000:])
    store = open_store(str(work.run_folder))
    counts = json.loads(store.read("embed/done.json"))["counts"]
    embedded, reasons, images = Embedded(counts["embedding"]), Counter[str](), 0
    for part in read_parts(store, "pool"):
        rows = read_table(store, embedded.images_path(part)).to_pylist()
        assert len(rows) == part.rows
        images += len(rows)
        for row in rows:
            assert row["fault"] or (row["id"] and row["width"] and row["ext"])
            reasons[(row["fault"] or "usable").split()[0]] += 1
    assert images >= 254 + 40
    assert not counts["failed_parts"]
    assert {"usable", "corrupt", "truncated", "corrupt_archive"} <= set(reasons)
