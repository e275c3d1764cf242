"""A ViT-tiny from scratch on real photographs: kNN accuracy of the teacher, by iteration.

    python -m benchmarks.learning --bench ../shared/bench [--teacher WEIGHTS] [--iterations 300]

Trains on all images of `--bench` without their labels, and tests on those whose label has 20
images or more: a fifth of them, by the others. With --teacher also the same network taught by that
DeiT-tiny (`pretrain distill`). The crops are small, so that 300 iterations fit in 40 minutes of
two cores.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.measuring import machine, say, table, target

LEAST_IMAGES = 20  # of a label
NO_LABELS = ("background_google", "unlabelled")
LEAST_GAIN = 1.5  # times the accuracy of random weights
TEACHER = "deit_tiny_patch16_224"
CONFIG = """
model: {{patch_size: 16, width: 192, depth: 12, heads: 3, image_size: 64}}
objective:
  dino_head: {{prototypes: 2048, hidden: 1024, bottleneck: 128}}
crops: {{global_size: 64, local_size: 32, local_crops: 4}}
schedule:
  iterations: {iterations}
  batch: 64
  base_lr: 4.0e-3
  warmup: 30
  last_layer_freeze: 20
  momentum: 0.99
  temperature_warmup: 100
data: {{workers: 1}}
watch:
  log_every: 50
  checkpoint_every: 200
  keep: 1
  evaluate_every: 25
  evaluate_on: {labelled}
"""


def labelled_folder(bench: Path, out: Path) -> int:
    """Links to the images of common labels, a folder a label; returns how many labels."""
    by_label = defaultdict(list)
    with (bench / "truth.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            by_label[row["label"].lower()].append(row["path"])
    chosen = {
        label: paths
        for label, paths in by_label.items()
        if len(paths) >= LEAST_IMAGES and label not in NO_LABELS
    }
    for label, paths in chosen.items():
        (out / label).mkdir(parents=True)
        for path in paths:
            os.symlink((bench / path).resolve(), out / label / Path(path).name)
    return len(chosen)


def random_accuracy(config: Path) -> float:
    """Of the weights that training starts with."""
    from pretrain.config import load
    from pretrain.knn_eval import Probe
    from pretrain.precision import choose, this_device
    from pretrain.vit import ViT

    loaded, device = load(str(config)), this_device(0)
    backbone = ViT(loaded.model).to(device)
    return Probe.of(loaded).measure(backbone, choose("fp32", device))["knn_accuracy"]


def curve(run: Path) -> list[tuple[int, float, float]]:
    """(iteration, kNN accuracy, feature rank) as the run wrote them down."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["iteration"], line["knn_accuracy"], line["feature_rank"])
        for line in lines
        if "knn_accuracy" in line
    ]


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="Does it learn?")
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help=f"weights of {TEACHER}")
    parser.add_argument("--iterations", type=int, default=300)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return report(options, Path(folder))


def report(options: argparse.Namespace, folder: Path) -> int:
    """Trains, prints the table; returns the number of targets missed."""
    from pretrain.cli import main as pretrain

    labels = labelled_folder(options.bench, folder / "labelled")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(iterations=options.iterations, labelled=folder / "labelled"))
    start = random_accuracy(config)
    say(f"random weights: {start:.3f}")
    given = ["--shards", str(options.bench), "--out"]
    commands = {"DINOv2": ["train", "--config", str(config), *given]}
    if options.teacher:
        weights = ["--teacher", TEACHER, "--teacher-weights", str(options.teacher)]
        commands["taught by DeiT-tiny"] = ["distill", *weights, "--student", str(config), *given]
    print(f"{machine()}; {labels} labels; random weights: kNN accuracy {start:.3f}\n")
    missed = 0
    for name, command in commands.items():
        run, began = folder / name.replace(" ", "-"), time.monotonic()
        if pretrain([*command, str(run)]):
            raise SystemExit(f"{name}: training failed")
        minutes = (time.monotonic() - began) / 60
        found = curve(run)
        print(f"{name}, {minutes:.0f} minutes:\n")
        head = ["iteration", "kNN accuracy", "feature rank"]
        table(head, [[at, f"{accuracy:.3f}", f"{rank:.1f}"] for at, accuracy, rank in found])
        gain = found[-1][1] / start
        missed += target(
            f"{name}: {gain:.2f} times the accuracy of random weights", gain >= LEAST_GAIN
        )
    return missed


if __name__ == "__main__":
    sys.exit(main())
