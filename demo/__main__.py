"""`make demo`: the whole pipeline on real photographs, or on your own folders.

python -m demo [IMAGES LIKE]
"""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import webdataset
import yaml

from curation import starter
from curation.cli import main as curate
from demo import images
from pretrain.cli import main as pretrain

FOLDER = Path("runs/demo")


def main(arguments: list[str]) -> int:
    """Runs the demo; returns the exit status."""
    own = [argument for argument in arguments if argument]
    if len(own) == 1:
        print("demo: IMAGES and LIKE go together: make demo IMAGES=~/Pictures LIKE=~/seeds")
        return 2
    run = Path("runs/mine") if own else FOLDER / "run"
    recipe = run.parent / f"{run.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.unlink(missing_ok=True)
    if own:
        starter.write(str(recipe), own[0], own[1], str(run))
    else:
        shutil.rmtree(FOLDER / "images", ignore_errors=True)
        images.make(FOLDER / "images")
        recipe.write_text(yaml.safe_dump(_recipe(run), sort_keys=False))
    status = curate(["run", str(recipe), "--ray", "local"])
    if status:
        return status
    _read_back(run)
    if not own:
        _check_copies(run)
        if status := _train(run):
            return status
    print(f"\nlook at it:        {run / 'report' / 'report.html'}")
    print(f"why is it there:   .venv/bin/curate why {run} KEY-OR-ID")
    print("your own images:   make demo IMAGES=~/Pictures LIKE=~/seeds")
    return 0


def _train(run: Path) -> int:
    """A few steps of DINOv2 on the shards, as they are; a real run takes far more of both."""
    out = FOLDER / "train"
    shutil.rmtree(out, ignore_errors=True)
    print("\npretrain: a few steps of DINOv2 on these shards", flush=True)
    given = ["train", "--config", "demo", "--shards", str(run / "shards"), "--out", str(out)]
    few = ("schedule.iterations=6", "schedule.batch=16", "schedule.warmup=2", "watch.log_every=1")
    status = pretrain([*given, *(f"--set={setting}" for setting in few)])
    for line in (out / "metrics.jsonl").read_text().splitlines() if not status else ():
        told = json.loads(line)
        speed = f"{told['images_per_s']:.1f} images/s"
        print(f"step {told['iteration']}: loss {told['loss']:.3f}, {speed}")
    return status


def _recipe(run: Path) -> dict[str, object]:
    folder = FOLDER / "images"
    retrieve = ["as_is", {"sample": {"k": 4}}, {"cluster": {"per_cluster": 5, "min_queries": 4}}]
    return {
        "name": "demo",
        "output": str(run),
        "sources": {
            "pool": [{"uri": str(folder / "pool")}],
            "curated": {"subjects": {"uri": str(folder / "curated"), "retrieve": retrieve}},
            "holdout": {"evaluation": {"uri": str(folder / "evaluation")}},
        },
        "encoder": {"model": "lvd_demo"},
        "cluster": {"k": 20},
        "shards": {"images_per_shard": 100},
        "resources": {"part_images": 64},
    }


def _read_back(run: Path) -> None:
    """Reads the shards as any training job would."""
    shards = sorted(str(path) for path in (run / "shards").glob("*.tar"))
    count = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pil"):
        assert json.dumps(sample["json"]["retrieved_by"])
        count += 1
    print(f"\nread back {count} images from {len(shards)} shards with the webdataset library")


def _check_copies(run: Path) -> None:
    """The names tell which pool images are copies: how many shared their original's group?"""
    tables = sorted((run / "lineage" / "parts").glob("*.parquet"))
    rows = [row for table in tables for row in pq.read_table(table).to_pylist()]
    pool = {row["key"]: row for row in rows if row["source"] == "pool"}
    copies = [key for key in pool if ".copy-" in key]
    leaks = [key for key in pool if ".leak-" in key]

    def grouped(key: str) -> bool:
        original = pool[key.split(".")[0] + ".jpg"]
        component = pool[key]["component"]
        return component is not None and component == original["component"]

    found = sum(grouped(key) for key in copies)
    stopped = sum(pool[key]["decision"] == "near_holdout" for key in leaks)
    print(f"known copies found: {found} of {len(copies)}")
    print(f"copies of evaluation images kept out: {stopped} of {len(leaks)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
