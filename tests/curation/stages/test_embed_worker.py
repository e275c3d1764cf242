"""The worker of `embed`: with a batch ahead, as on a GPU, and without."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from workbench import Models, picture, write_pictures

from curation import pipeline
from curation.images.encoders import Pixels, Vectors
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


def test_vectors_of_a_compiled_model_are_kept_apart(tmp_path: Path, models: Models) -> None:
    plain = pipeline.embed_config(recipe_of(tmp_path, models))
    compiled = pipeline.embed_config(recipe_of(tmp_path, models, compile=True))
    assert compiled.embedding != plain.embedding
    assert replace(compiled, batch=3).embedding == compiled.embedding
