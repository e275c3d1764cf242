"""What `curate` writes is what `pretrain` trains on, as it is."""

import json
from collections.abc import Callable
from pathlib import Path

from training import TINY, lines
from workbench import Project

from pretrain.cli import main


def test_curated_shards_are_trained_on(project: Callable[..., Project], tmp_path: Path) -> None:
    made = project(pool=range(30), curated=range(100, 106))
    assert made.run() == 0
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    shards = made.run_folder / "shards"
    given = ["--config", str(config), "--shards", str(shards), "--out", str(tmp_path / "run")]
    assert main(["train", *given]) == 0
    told = lines(tmp_path / "run")
    assert len(told) == 8
    assert told[-1]["bad_images"] == 0
    selected = json.loads((shards / "manifest.json").read_text())["images"]
    assert told[-1]["epoch"] * selected == 8 * 8  # every image of the shards, and no other
