"""What tests work with: pictures, a copy descriptor, and a project to run the pipeline on."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from curation.cli import main


def picture(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """A smooth colour pattern that no other seed resembles."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, seeds: Iterable[int], suffix: str = ".jpg") -> list[Path]:
    """One picture file a seed, named by it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed:05d}{suffix}" for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        picture(seed).save(path)
    return paths


class GridDescriptor(torch.nn.Module):
    """A TorchScript copy descriptor of SSCD's form: colours on a grid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.nn.functional.adaptive_avg_pool2d(x, [6, 6]).flatten(1)
        return torch.nn.functional.normalize(grid - grid.mean(dim=1, keepdim=True), dim=1)


@dataclass(frozen=True)
class Models:
    """Files of a tiny timm ViT and of a TorchScript copy descriptor."""

    encoder: Path
    descriptor: Path


def make_models(folder: Path) -> Models:
    """The same ones every time."""
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=0)
    save_file(net.state_dict(), folder / "test_vit.safetensors")
    torch.jit.script(GridDescriptor()).save(str(folder / "grid.torchscript.pt"))
    return Models(folder / "test_vit.safetensors", folder / "grid.torchscript.pt")


@dataclass
class Project:
    """A folder with a recipe that tests change, run and look into."""

    folder: Path
    recipe: dict[str, Any]

    @property
    def run_folder(self) -> Path:
        return Path(self.recipe["output"])

    @property
    def path(self) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return path

    def run(self, *options: str) -> int:
        """`curate run` in this process."""
        return main(["run", str(self.path), *(options or ("--ray", "off"))])

    def lineage(self) -> list[dict[str, Any]]:
        """All rows of the lineage."""
        import pyarrow.parquet as pq

        out = self.folder / "lineage.parquet"
        assert main(["lineage", str(self.run_folder), "--out", str(out)]) == 0
        rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
        return rows


def make_project(
    folder: Path,
    models: Models,
    pool: Iterable[int] = range(40),
    curated: Iterable[int] = range(100, 106),
    holdout: Iterable[int] = (),
    **sections: Any,
) -> Project:
    """`pool` and `curated` pictures by seed, `holdout` if there are any, `sections` of a recipe."""
    write_pictures(folder / "pool", pool)
    write_pictures(folder / "curated", curated)
    sources: dict[str, Any] = {
        "pool": [{"uri": str(folder / "pool")}],
        "curated": {"wanted": {"uri": str(folder / "curated")}},
    }
    if holdout:
        write_pictures(folder / "holdout", holdout)
        sources["holdout"] = {"test": {"uri": str(folder / "holdout")}}
    recipe = {
        "name": "test",
        "output": str(folder / "run"),
        "sources": sources,
        "encoder": {"model": "test_vit", "weights": str(models.encoder)},
        "copy_descriptor": {"weights": str(models.descriptor)},
        "dedup": {"min_cosine": 0.95, "holdout_min_cosine": 0.9},
        "cluster": {"k": 5},
        "shards": {"images_per_shard": 8},
        "resources": {"part_images": 16},
    }
    recipe.update(sections)
    return Project(folder, recipe)
