"""The worker of `embed`: with a batch ahead, as on a GPU, and without."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image
from workbench import Models, picture, write_pictures

from curation import pipeline
from curation.images import nvjpeg
from curation.images.encoders import Pixels, Vectors
from curation.images.errors import EncoderError
from curation.recipe import Recipe
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor
from curation.runtime.store import Store, open_store, read_table
from curation.stages.embed_worker import EmbedWorker
from curation.stages.tables import Embedded, Part, read_parts


def recipe_of(folder: Path, models: Models, **encoder: object) -> Recipe:
    """Twelve images of the pool, of which three have a fault."""
    paths = write_pictures(folder / "pool", range(12))
    paths[0].write_bytes(b"no image")
    paths[5].write_bytes(paths[5].read_bytes()[:400])
    picture(6, 96, 8).save(paths[6])
    write_pictures(folder / "curated", [100])
    return Recipe.model_validate(
        {
            "name": "test",
            "output": str(folder / "run"),
            "sources": {
                "pool": [{"uri": str(folder / "pool")}],
                "curated": {"wanted": {"uri": str(folder / "curated")}},
            },
            "encoder": {"model": "test_vit", "weights": str(models.encoder), **encoder},
            "copy_descriptor": {"weights": str(models.descriptor)},
        }
    )


def ingested(recipe: Recipe) -> tuple[Store, Part]:
    """The run's store, and the one part of the pool."""
    store = open_store(recipe.output)
    pipeline.run(recipe, store, lambda _: InProcessExecutor(), Events(store), "ingest")
    (part,) = (part for part in read_parts(store) if part.role == "pool")
    return store, part


@pytest.mark.parametrize("batch", [1, 4, 9, 16])
def test_decoding_in_threads_and_a_batch_ahead_change_nothing(
    batch: int, tmp_path: Path, models: Models
) -> None:
    recipe = recipe_of(tmp_path, models, batch=batch)
    (store, part), cfg = ingested(recipe), pipeline.embed_config(recipe)
    embedded = Embedded(cfg.embedding)

    def done(worker: EmbedWorker) -> tuple[object, ...]:
        paths = embedded.images_path(part), embedded.vectors_path(part)
        return worker(part), *(read_table(store, path).to_pylist() for path in paths)

    plain = EmbedWorker(cfg, recipe.output)
    ahead = EmbedWorker(cfg, recipe.output)
    ahead._decode_threads, ahead._ahead = 3, 1
    wanted = done(plain)
    assert wanted[0] == {
        "images": 12,
        "faults": {"not_an_image": 1, "truncated": 1, "too_small": 1},
    }
    assert done(ahead) == wanted


def test_the_next_batch_has_begun_before_one_is_waited_for(tmp_path: Path, models: Models) -> None:
    recipe = recipe_of(tmp_path, models, batch=4)
    _, part = ingested(recipe)
    worker = EmbedWorker(pipeline.embed_config(recipe), recipe.output)
    worker._ahead = 1
    happened: list[str] = []
    start = worker._semantic.start

    def noted(batch: Pixels) -> Callable[[], Vectors]:
        number = sum(what.startswith("began") for what in happened)
        happened.append(f"began {number} of {len(batch)}")
        wait = start(batch)

        def waited() -> Vectors:
            happened.append(f"waited {number}")
            return wait()

        return waited

    worker._semantic.start = noted  # type: ignore[method-assign]
    worker(part)
    assert happened == [
        "began 0 of 4",
        "began 1 of 4",
        "waited 0",
        "began 2 of 1",
        "waited 1",
        "waited 2",
    ]


@pytest.mark.parametrize("choice", [{"compile": True}, {"decoder": "nvjpeg"}])
def test_what_changes_vectors_keeps_them_apart(
    choice: dict[str, object], tmp_path: Path, models: Models
) -> None:
    plain = pipeline.embed_config(recipe_of(tmp_path, models))
    other = pipeline.embed_config(recipe_of(tmp_path, models, **choice))
    assert other.embedding != plain.embedding
    assert replace(other, batch=3).embedding == other.embedding


REFUSED = 18  # by nvJPEG alone


def add_other_files(folder: Path) -> None:
    """Beside plain JPEGs, what nvJPEG isn't given, what it can't decode, and what nothing can."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(12, 96, 64).save(folder / "00012.jpg", exif=exif)
    picture(13).save(folder / "00013.jpg", "PNG")
    picture(14).save(folder / "00014.jpg")
    damaged = bytearray((folder / "00014.jpg").read_bytes())
    at = damaged.index(b"\xff\xc4") + 5
    damaged[at : at + 16] = b"\xff" * 16  # more codes than a Huffman table has
    (folder / "00014.jpg").write_bytes(damaged)
    picture(15).convert("CMYK").save(folder / "00015.jpg")
    picture(16).convert("L").save(folder / "00016.jpg")
    picture(17, 200, 150).save(folder / "00017.jpg", progressive=True)
    picture(REFUSED, 90, 70).save(folder / f"{REFUSED:05d}.jpg")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_nvjpeg_changes_vectors_a_little_and_nothing_else(
    batch: int, ahead: bool, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvjpeg, "DECODES_ON", ("cuda", "cpu"))
    recipe = recipe_of(tmp_path, models, batch=batch)
    add_other_files(tmp_path / "pool")
    store, part = ingested(recipe)
    refused = (tmp_path / "pool" / f"{REFUSED:05d}.jpg").read_bytes()
    decode_jpeg, decoded = torchvision.io.decode_jpeg, []

    def refusing(raw: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
        if any(one.numpy().tobytes() == refused for one in raw):
            raise RuntimeError("not supported")
        found: list[torch.Tensor] = decode_jpeg(raw, **options)
        decoded.extend(found)
        return found

    monkeypatch.setattr(torchvision.io, "decode_jpeg", refusing)
    plain = pipeline.embed_config(recipe)
    results = []
    for cfg in (plain, replace(plain, decoder="nvjpeg")):
        worker = EmbedWorker(cfg, recipe.output)
        if ahead:
            worker._decode_threads, worker._ahead = 3, 1
        counts, embedded = worker(part), Embedded(cfg.embedding)
        images = read_table(store, embedded.images_path(part))
        results.append((counts, images, read_table(store, embedded.vectors_path(part))))
    (counts, images, exact), (counts_found, images_found, found) = results
    assert counts["faults"] == {"not_an_image": 1, "truncated": 1, "too_small": 1, "corrupt": 1}
    assert counts_found == counts
    assert images_found.equals(images)
    assert found["row"].equals(exact["row"])
    assert len(found) == 15
    assert len(decoded) >= 11  # the plain ones, the grey and the progressive one
    for name in ("semantic", "copy"):
        one, other = (
            np.stack([np.frombuffer(row, np.float16) for row in table[name].to_pylist()])
            for table in (exact, found)
        )
        assert (one.astype(np.float32) * other).sum(axis=1).min() > 0.99


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_nvjpeg_without_a_gpu_is_one_clear_error(tmp_path: Path, models: Models) -> None:
    recipe = recipe_of(tmp_path, models, decoder="nvjpeg")
    with pytest.raises(EncoderError, match=r"^encoder.decoder: nvjpeg needs an NVIDIA GPU"):
        EmbedWorker(pipeline.embed_config(recipe), recipe.output)
