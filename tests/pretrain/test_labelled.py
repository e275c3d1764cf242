"""Class folders and CSV files -> torchvision's evaluation crops with the right labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from workbench import picture

from pretrain.decode import BadImage
from pretrain.errors import UserError
from pretrain.labelled import LabelledLoader, central_crop, open_labelled


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """7 cats, 4 dogs, and one that can't be decoded."""
    for number in range(11):
        place = tmp_path / "set" / ("cat" if number < 7 else "dog") / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 30 + number, 40).save(place)
    (tmp_path / "set" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    return tmp_path / "set"


@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_come_in_order_with_their_labels(folder: Path, workers: int) -> None:
    images = open_labelled(str(folder))
    assert images.classes == ["cat", "dog"]
    loader = LabelledLoader(images, batch=4, size=28, workers=workers)
    for _ in range(2):
        crops, labels = (torch.cat(list(x)) for x in zip(*loader, strict=True))
        assert labels.tolist() == [0] * 7 + [1] * 4
        bad = [(sample.key, sample.reason.split()[0]) for sample in loader.bad]
        assert bad == [("cat/broken.jpg", "not_an_image")]
        for number, crop in enumerate(crops):
            with Image.open(
                folder / ("cat" if number < 7 else "dog") / f"{number:02d}.png"
            ) as file:
                assert np.array_equal(crop, central_crop(np.array(file), 28))


@pytest.mark.parametrize("size", [(300, 400), (401, 257), (40, 33), (224, 224)])
@pytest.mark.parametrize("side", [224, 98])
def test_crops_are_torchvisions(size: tuple[int, int], side: int) -> None:
    image = picture(1, *size)
    steps = Compose([Resize(round(side * 8 / 7), InterpolationMode.BICUBIC), CenterCrop(side)])
    expected = np.array(steps(image), np.int64).transpose(2, 0, 1)
    difference = np.abs(central_crop(np.array(image), side) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_slivers_are_refused_before_they_are_resized() -> None:
    with pytest.raises(BadImage, match=r"^extreme_aspect 5000x3, at most 10 : 1"):
        central_crop(np.zeros((3, 5000, 3), np.uint8), 224)


def test_a_table_gives_labels_and_order(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("label,path\nb,dog/08.png\na,cat/01.png\nb,cat/02.png\n")
    images = open_labelled(str(folder), table)
    assert images.names == ["dog/08.png", "cat/01.png", "cat/02.png"]
    assert images.labels.tolist() == [1, 0, 1]
    assert open_labelled(str(folder), table, ["z", "b", "a"]).labels.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ("path,class\nx,y\n", r"labels.csv: no column 'label'; wanted path and label"),
        ("path,label\n", r"labels.csv: lists no images"),
        ("path,label\ncat/01.png,a\nno.png,b\n", r"labels.csv: row 2: no image 'no.png' in "),
        ("path,label\ncat/01.png,\n", r"labels.csv: row 1: an empty label"),
        ("path,label\ncat/01.png,a\n", r"one class only \('a'\); there is nothing to tell apart"),
        ("", r"labels.csv: no column 'label'"),
    ],
)
def test_a_wrong_table_is_told(folder: Path, tmp_path: Path, rows: str, text: str) -> None:
    (tmp_path / "labels.csv").write_text(rows)
    with pytest.raises(UserError, match=text):
        open_labelled(str(folder), tmp_path / "labels.csv")


def test_a_wrong_folder_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set/cat/\d+.png is of|: cat/00.png is of class 'cat', "):
        open_labelled(str(folder), classes=["dog", "bird"])
    with pytest.raises(UserError, match=r"no.csv: can't be read as CSV: No such file"):
        open_labelled(str(folder), tmp_path / "no.csv")
    picture(1).save(folder / "loose.png")
    with pytest.raises(UserError, match=r"loose.png lies in no class folder; wanted .*CLASS"):
        open_labelled(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no images; wanted .*/empty/CLASS/\*.jpg"):
        open_labelled(str(tmp_path / "empty"))


def test_a_file_that_vanishes_is_one_line(folder: Path) -> None:
    images = open_labelled(str(folder))
    (folder / "dog" / "09.png").unlink()
    with pytest.raises(UserError, match=r"dog/09.png: no such file$"):
        list(LabelledLoader(images, batch=4, size=28, workers=1))
