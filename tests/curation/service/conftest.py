"""A finished run with every kind of decision, and a service over it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import HOSTILE, Served, served, write_metrics
from workbench import Models, Project, picture, write_pictures

from curation.service.client import Client


@pytest.fixture(scope="session")
def project_root(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Path:
    """Holds `runs/birds` (finished), `runs/vit` (pretraining), and the sources beside them."""
    root = tmp_path_factory.mktemp("served")
    write_pictures(root / "pool", range(40))
    picture(3, 300, 300).save(root / "pool" / "larger-copy.jpg", quality=90)
    shutil.copy(root / "pool" / "00005.jpg", root / "pool" / "same-bytes.jpg")
    picture(70).save(root / "pool" / HOSTILE)
    picture(71, 8, 8).save(root / "pool" / "tiny.png")
    (root / "pool" / "empty.jpg").write_bytes(b"")
    write_pictures(root / "curated", range(100, 106))
    write_pictures(root / "holdout", range(7, 9))
    sample = {"uri": str(root / "curated"), "retrieve": ["as_is", {"sample": {"k": 4}}]}
    recipe = {
        "name": "birds",
        "output": str(root / "runs" / "birds"),
        "sources": {
            "pool": [{"uri": str(root / "pool")}],
            "curated": {"wanted": sample},
            "holdout": {"test": {"uri": str(root / "holdout")}},
        },
        "encoder": {"model": "test_vit", "weights": str(models.encoder)},
        "copy_descriptor": {"weights": str(models.descriptor)},
        "dedup": {"min_cosine": 0.95, "holdout_min_cosine": 0.9},
        "safety": {"phash": {"mode": "report"}},
        "cluster": {"k": 5},
        "shards": {"images_per_shard": 8},
        "resources": {"part_images": 16},
    }
    assert Project(root, recipe).run() == 0
    write_metrics(root / "runs" / "vit")
    return root


@pytest.fixture(scope="session")
def runs(project_root: Path) -> Path:
    return project_root / "runs"


@pytest.fixture(scope="session")
def service(runs: Path) -> Iterator[Served]:
    """Without tokens, on loopback."""
    with served(runs) as found:
        yield found


@pytest.fixture
def http(service: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=30) as client:
        yield client


@pytest.fixture
def client(service: Served) -> Iterator[Client]:
    with Client(service.url) as found:
        yield found
