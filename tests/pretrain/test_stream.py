"""The same batches on any number of ranks and workers, resumed anywhere; bad images are named."""

import hashlib
import io
import os
import pickle
import signal
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from workbench import picture

from pretrain.collate import Batch
from pretrain.crops import CropConfig
from pretrain.errors import UserError
from pretrain.order import Order
from pretrain.samples import Sample
from pretrain.stream import Batches, Loader, StreamConfig

TINY = CropConfig(global_size=8, local_size=5, local_crops=2)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 24, 20).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURES = [jpeg(seed) for seed in range(23)]


class Pictures:
    """23 pictures in 4 shards; those in `bad` can't be decoded, reading those in `gone` fails."""

    uri, fingerprint = "pictures", "f"
    counts = np.array([5, 1, 9, 8], np.int64)

    def __init__(self, bad: tuple[int, ...] = (), gone: int = -1, remote: bool = False) -> None:
        self.bad, self.gone, self.remote = bad, gone, remote

    def read(self, sample: int) -> Sample:
        if sample == self.gone:
            raise UserError("pictures/3.tar: truncated")
        data = PICTURES[sample][: 300 if sample in self.bad else None]
        return Sample("3.tar", str(sample), data)


def loader(
    batch: int = 3,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
    source: Pictures | None = None,
    **more: Any,
) -> Loader:
    cfg = StreamConfig(batch=batch, workers=workers, window=10, **more)
    return Loader(source or Pictures(), TINY, cfg, rank, world_size, state)


def digests(batch: Batch) -> list[tuple[int, str, str]]:
    """(position, key, hash of all crops) of each image."""
    count = len(batch.keys)
    crops = [
        batch.global_crops.unflatten(0, (2, count)),
        batch.local_crops.unflatten(0, (2, count)),
    ]
    found = []
    for i, key in enumerate(batch.keys):
        whole = hashlib.sha256(b"".join(c[:, i].numpy().tobytes() for c in crops)).hexdigest()
        found.append((batch.position + i, key, whole))
    return found


def take(stream: Loader, steps: int) -> list[list[tuple[int, str, str]]]:
    return [digests(batch) for batch in islice(stream, steps)]


@pytest.fixture(scope="module")
def uninterrupted() -> list[tuple[int, str, str]]:
    """Three epochs, image by image."""
    return [image for step in take(loader(batch=1), 69) for image in step]


def test_the_shapes_and_the_order_of_a_batch() -> None:
    batch = next(loader(batch=4))
    assert batch.global_crops.shape == (8, 3, 8, 8)
    assert batch.local_crops.shape == (8, 3, 5, 5)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    expected = Order(Pictures.counts, 0, 10).samples(0, 4)
    assert batch.keys == [str(number) for number in expected]
    assert (batch.position, batch.bad) == (0, [])


def test_each_epoch_shows_each_image_once(uninterrupted: list[tuple[int, str, str]]) -> None:
    assert [position for position, _, _ in uninterrupted] == list(range(69))
    for epoch in range(3):
        keys = [key for _, key, _ in uninterrupted[epoch * 23 : (epoch + 1) * 23]]
        assert sorted(map(int, keys)) == list(range(23))
    assert len({whole for _, _, whole in uninterrupted}) == 69  # never the same crops again


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("batch", [1, 3])
def test_all_ranks_together_see_the_same(
    world_size: int, batch: int, uninterrupted: list[tuple[int, str, str]]
) -> None:
    steps = 48 // (world_size * batch)
    ranks = [take(loader(batch, 0, rank, world_size), steps) for rank in range(world_size)]
    for step in range(steps):
        union = sorted(image for rank in ranks for image in rank[step])
        start = step * world_size * batch
        assert union == uninterrupted[start : start + world_size * batch]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("remote", [False, True])
def test_workers_change_nothing(workers: int, remote: bool) -> None:
    source = Pictures(bad=(2, 7), remote=remote)
    more: dict[str, Any] = {"source": source, "rank": 1, "world_size": 2, "max_bad_share": 1.0}
    alone, helped = loader(**more), loader(workers=workers, **more)
    assert take(helped, 9) == take(alone, 9)
    assert helped.bad == alone.bad != {}
    assert helped.state() == alone.state()


@pytest.mark.parametrize(
    ("before", "after"), [((2, 3), (3, 2)), ((4, 1), (1, 5)), ((1, 7), (8, 2))]
)
def test_a_run_goes_on_at_the_exact_image_elsewhere(
    before: tuple[int, int], after: tuple[int, int], uninterrupted: list[tuple[int, str, str]]
) -> None:
    """(ranks, batch) may change: every position is seen once, with the same crops."""
    seen: list[tuple[int, str, str]] = []
    state = None
    for world_size, batch in (before, after):
        loaders = [loader(batch, 0, rank, world_size, state) for rank in range(world_size)]
        steps = 30 // (world_size * batch)
        seen += [image for one in loaders for step in take(one, steps) for image in step]
        assert len({one.position for one in loaders}) == 1
        state = loaders[0].state()
    assert sorted(seen) == uninterrupted[: len(seen)]


def test_the_data_set_travels_to_processes_that_are_not_forked() -> None:
    made = Batches(Pictures(), TINY, StreamConfig(batch=3, window=10), 0, 3)
    copy = pickle.loads(pickle.dumps(made))
    for expected, found in islice(zip(made, copy, strict=False), 4):
        assert isinstance(expected, Batch)
        assert digests(expected) == digests(found)


def test_a_state_of_another_order_is_refused() -> None:
    state = loader().state()
    with pytest.raises(UserError, match=r"^pictures: the checkpoint was made with other shards, "):
        loader(state=state, seed=1)
    loader(state=state, workers=1)


def test_bad_images_are_replaced_the_same_way_everywhere_and_named() -> None:
    source = Pictures(bad=(2, 7, 11))
    one = loader(1, source=source, max_bad_share=1.0)
    alone = list(islice(one, 23))
    named = {sample.key for batch in alone for sample in batch.bad}
    assert named == {"2", "7", "11"}
    assert {sample.shard for batch in alone for sample in batch.bad} == {"3.tar"}
    assert all(s.reason.startswith("truncated ") for batch in alone for s in batch.bad)
    assert one.bad == {"truncated": sum(len(batch.bad) for batch in alone)}
    keys = [key for batch in alone for key in batch.keys]
    assert not {"2", "7", "11"} & set(keys)
    rank = loader(5, 2, 1, 2, source=source, max_bad_share=1.0)
    assert [k for b in islice(rank, 2) for k in b.keys] == keys[5:10] + keys[15:20]


def test_too_many_bad_images_stop_the_run() -> None:
    stream = loader(10, source=Pictures(bad=(2, 7)), max_bad_share=0.005)
    text = r"^pictures: 6 of \d+ images can't be decoded, more than max_bad_share 0.005; the last"
    with pytest.raises(UserError, match=text):
        take(stream, 30)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_images(workers: int) -> None:
    stream = loader(workers=workers, source=Pictures(bad=tuple(range(23))), max_bad_share=1.0)
    with pytest.raises(
        UserError, match=r"^pictures: 20 images in a row can't be decoded"
    ) as raised:
        next(stream)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_can_not_read_is_one_line_here(workers: int) -> None:
    with pytest.raises(UserError) as raised:
        take(loader(workers=workers, source=Pictures(gone=4)), 30)
    assert str(raised.value) == "pictures/3.tar: truncated"


class Deadly(Pictures):
    def read(self, sample: int) -> Sample:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^a data worker died .*; give the machine more memory"):
        next(loader(workers=1, source=Deadly()))


def test_waiting_is_measured() -> None:
    stream = loader()
    take(stream, 5)
    assert stream.waited_s > 0
    assert 0 < stream.waiting_share <= 1
    assert stream.seen == 15


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"batch": 0}, "batch 0: must be at least 1"),
        ({"workers": -1}, "workers -1: must be at least 0"),
        ({"seed": -1}, "seed -1: must be at least 0"),
        ({"max_bad_share": 1.5}, "max_bad_share 1.5: must be from 0 to 1"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], text: str) -> None:
    make: Callable[..., Loader] = loader
    with pytest.raises(UserError, match=text):
        make(**fields)
