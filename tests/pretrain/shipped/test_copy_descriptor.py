from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain.shipped.copy_descriptor as module
from pretrain.shipped.augment import edited_copy, shrink
from pretrain.shipped.brightness import PATTERNS
from pretrain.shipped.calibrate import pair_cosines, threshold_at
from pretrain.shipped.copy_descriptor import (
    CopyConfig,
    CopyDescriptor,
    Memory,
    Views,
    copy_descriptor,
    name_hash,
    split_holdout,
    whitening,
)
from pretrain.shipped.export import read_weights
from pretrain.shipped.timm_models import build_vit

TEACHER = "deit_tiny_patch16_224"


class Killed(BaseException):
    pass


def config(pictures: Path, weights: Path, out: Path) -> CopyConfig:
    return CopyConfig(
        TEACHER,
        weights,
        (pictures,),
        out,
        depth=1,
        size=64,
        dim=16,
        steps=6,
        batch=4,
        memory=12,
        holdout=0.35,
        checkpoint_every=2,
    )


def test_a_killed_training_goes_on_to_the_same_bytes_and_the_file_describes_itself(
    pictures: Path, teacher_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "a" / "c.safetensors", tmp_path / "b" / "c.safetensors"
    copy_descriptor(config(pictures, teacher_weights, whole))

    with monkeypatch.context() as patch:
        steps = iter([None, None, None, Killed()])

        def info_nce(*arguments: torch.Tensor) -> torch.Tensor:
            if reached := next(steps):
                raise reached  # in the fourth step: the checkpoint is of the second
            return original(*arguments)

        original = module.info_nce
        patch.setattr(module, "info_nce", info_nce)
        with pytest.raises(Killed):
            copy_descriptor(config(pictures, teacher_weights, killed))
    assert not killed.exists()
    copy_descriptor(config(pictures, teacher_weights, killed))
    assert killed.read_bytes() == whole.read_bytes()

    tensors, description = read_weights(whole)
    model = CopyDescriptor(build_vit(description["arch"], seed=1), dim=16)
    model.load_state_dict(tensors)
    rows = model(torch.zeros(2, 3, 64, 64))
    assert torch.allclose(rows.norm(dim=1), torch.ones(2))
    head, thresholds = description["head"], description["thresholds"]
    assert description["dim"] == head["dim"] == 16 + PATTERNS + (head["constant"] > 0)
    assert thresholds["holdout_min_cosine"] <= thresholds["min_cosine"]


def test_held_out_images_depend_on_their_names_alone() -> None:
    images = [Path(f"/here/{number}.jpg") for number in range(500)]
    training, held_out = split_holdout(images, 0.11)
    assert sorted(training + held_out) == sorted(images)
    assert 30 <= len(held_out) <= 80
    elsewhere = [Path("/there") / path.name for path in images[:100]]
    assert [p.name for p in split_holdout(elsewhere, 0.11)[1]] == [
        path.name for path in images[:100] if path in held_out
    ]
    assert max(map(name_hash, held_out)) < 0.11 <= min(map(name_hash, training))


def test_a_step_shows_two_views_of_distinct_images_and_depends_on_its_number_alone(
    pictures: Path, teacher_weights: Path
) -> None:
    images = sorted(p for p in pictures.rglob("*.jpg") if p.name != "broken.jpg")
    views = Views(images, config(pictures, teacher_weights, Path("unused")))
    pixels, ids = views.batch(1)
    assert pixels.shape == (8, 3, 64, 64)
    assert len(set(ids[:4].tolist())) == 4
    assert torch.equal(ids[:4], ids[4:])
    assert torch.equal(views.batch(1)[0], pixels)
    one_pass = torch.cat([views.batch(step)[1][:4] for step in range(3)])
    assert sorted(one_pass.tolist()) == list(range(12))


def test_the_memory_keeps_the_newest_views() -> None:
    memory = Memory(3, 1)
    memory.add(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 2]))
    memory.add(torch.tensor([[3.0], [4.0]]), torch.tensor([3, 4]))
    assert memory.ids.tolist() == [3, 4, 1]
    assert memory.views.flatten().tolist() == [3.0, 4.0, 1.0]


def test_whitened_rows_have_mean_0_and_nearly_equal_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    rows = torch.randn(400, 5, generator=generator) * spread + 7.0
    matrix, offset = whitening(rows)
    white = rows @ matrix.T + offset
    assert white.mean(dim=0).abs().max() < 1e-4
    covariance = white.T @ white / 400
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-3
    assert ((covariance.diagonal() > 0.4) & (covariance.diagonal() < 1.0)).all()
    few = rows[:3] @ whitening(rows[:3])[0].T
    assert few.isfinite().all()


@pytest.mark.parametrize("size", [(8, 8), (300, 9), (2000, 1500)])
def test_every_edit_survives_small_narrow_and_large_images(size: tuple[int, int]) -> None:
    image, other = Image.new("RGB", size, (200, 30, 30)), Image.new("RGB", (50, 60))
    assert max(shrink(image).size) <= 256
    for seed in range(60):
        copy = edited_copy(image, other, np.random.default_rng(seed))
        assert copy.mode == "RGB"
        assert min(copy.size) >= 8


def test_a_threshold_is_the_lowest_that_is_precise_enough() -> None:
    right = np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32)
    wrong = np.array([0.65, 0.55, 0.3], np.float32)
    for precision in (1.0, 0.8, 0.7, 0.6, 0.1):
        fitting = [
            t
            for t in np.concatenate([right, wrong])
            if (right >= t).sum() / ((right >= t).sum() + (wrong >= t).sum()) >= precision
        ]
        assert threshold_at(right, wrong, precision) == min(fitting)
    assert threshold_at(right, np.full(1, 0.95, np.float32), 0.9) == 1.0


def test_a_photo_that_the_folder_holds_twice_counts_neither_way() -> None:
    natural = np.eye(4, dtype=np.float32)
    natural[3] = natural[0]  # image 3 is image 0 again
    natural[2] = [0.0, 0.6, 0.8, 0.0]  # image 2 looks a little like image 1
    right, wrong = pair_cosines(natural, np.array([0, 1]), natural[[0, 0, 1, 2]])
    assert right == pytest.approx([1.0, 1.0, 1.0, 0.6])
    # Image 2 with: the first copy of image 1; the last copy, which is image 2; image 1 itself.
    assert wrong == pytest.approx([0.6, 1.0, 0.6])
