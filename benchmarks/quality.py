"""Retrieval quality on labelled images: precision and planted recall of each concept.

    python -m benchmarks.quality --bench FOLDER --weights FILE [--run FOLDER] [--set A.B=VALUE …]

FOLDER holds `curated/CONCEPT/`, `pool/` and `truth.csv` (path, concept, …). A pool image is right
for a concept when its label is CONCEPT or CONCEPT_other; CONCEPT alone marks the planted ones.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from curation.cli import main as curate

K = 4
# Exact search in fp32 with deit_tiny_patch16_224: precision of the union, recall of the planted.
REFERENCE = {
    "dogs": (0.934, 0.705),
    "birds": (0.995, 0.940),
    "grocery": (0.960, 0.921),
    "flowers": (0.726, 0.832),
}


def recipe(bench: Path, weights: Path, run: Path) -> dict[str, Any]:
    """The benchmark's recipe: 4 neighbours a curated image."""
    concepts = sorted(path.name for path in (bench / "curated").iterdir())
    retrieve = ["as_is", {"sample": {"k": K}}]
    return {
        "name": "quality",
        "output": str(run),
        "sources": {
            "pool": [{"uri": str(bench / "pool")}],
            "curated": {
                name: {"uri": str(bench / "curated" / name), "retrieve": retrieve}
                for name in concepts
            },
        },
        "encoder": {"model": "deit_tiny_patch16_224", "weights": str(weights)},
        "cluster": {"k": 100},
    }


def measure(bench: Path, lineage: Path) -> list[tuple[str, int, float, float]]:
    """(concept, images in the union, precision, planted recall) from a lineage file."""
    with open(bench / "truth.csv", newline="") as file:
        concept = {row["path"]: row["concept"] for row in csv.DictReader(file)}
    rows = pq.read_table(lineage, filters=[("source", "==", "pool")]).to_pylist()
    table = []
    for name in sorted({value for value in concept.values() if value in REFERENCE}):
        union = {
            "pool/" + row["key"]
            for row in rows
            if any(r["set"] == name and r["how"] == "sample" for r in row["retrieved_by"])
        }
        right = sum(concept[path] in (name, f"{name}_other") for path in union)
        planted = {p for p, c in concept.items() if c == name and p.startswith("pool/")}
        recall = len(planted & union) / len(planted)
        table.append((name, len(union), right / len(union), recall))
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Retrieval quality on labelled images.")
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/quality"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args(arguments)
    options.run.parent.mkdir(parents=True, exist_ok=True)
    path = options.run.parent / f"{options.run.name}.yaml"
    path.write_text(yaml.safe_dump(recipe(options.bench, options.weights, options.run)))
    overrides = [part for text in options.overrides for part in ("--set", text)]
    status = curate(["run", str(path), "--ray", "local", *overrides])
    if status:
        return status
    lineage = options.run.parent / f"{options.run.name}.parquet"
    curate(["lineage", str(options.run), "--out", str(lineage)])
    print(f"\n{'concept':<10}{'images':>8}{'precision':>12}{'reference':>12}", end="")
    print(f"{'recall':>9}{'reference':>12}")
    below = 0
    for name, images, precision, recall in measure(options.bench, lineage):
        wanted_precision, wanted_recall = REFERENCE[name]
        below += precision < wanted_precision - 0.01 or recall < wanted_recall - 0.01
        print(f"{name:<10}{images:>8}{precision:>12.3f}{wanted_precision:>12.3f}", end="")
        print(f"{recall:>9.3f}{wanted_recall:>12.3f}")
    print(f"{below} of the concepts below the reference less 0.01")
    return int(below > 0)


if __name__ == "__main__":
    sys.exit(main())
