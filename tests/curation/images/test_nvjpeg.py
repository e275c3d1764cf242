"""What is left to nvJPEG, and its inputs against Pillow's: without a GPU, by torchvision alone."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from workbench import picture

from curation.images import nvjpeg
from curation.images.decode import Limits, decode, examine
from curation.images.encoders import DEMO_MODEL, InputFormat, load_copy_descriptor, load_semantic
from curation.images.nvjpeg import Jpeg

LIMITS = Limits(min_side=1, max_pixels=10**8, max_bytes=10**8, max_aspect=100)
GREY = (0.5, 0.5, 0.5)
FORMS = (InputFormat(224, 256, GREY, GREY), InputFormat(160, None, GREY, GREY))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)  # type: ignore[arg-type]
    return out.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(picture(1), exif=exif)


def png() -> bytes:
    out = io.BytesIO()
    picture(1).save(out, "PNG")
    return out.getvalue()


PLAIN = jpeg(picture(1))
FRAME = PLAIN.index(b"\xff\xc0")
HUGE = PLAIN[FRAME : FRAME + 5] + b"\xff" * 4 + PLAIN[FRAME + 9 : FRAME + 19]


@pytest.mark.parametrize(
    ("data", "eligible"),
    [
        pytest.param(PLAIN, True, id="plain"),
        pytest.param(jpeg(picture(1), progressive=True), True, id="progressive"),
        pytest.param(jpeg(picture(1), subsampling="4:4:4"), True, id="444"),
        pytest.param(jpeg(picture(1).convert("L")), True, id="grey"),
        pytest.param(turned(1), True, id="upright"),
        pytest.param(jpeg(picture(1), exif=b"Exif\0\0garbage"), True, id="damaged-exif"),
        pytest.param(PLAIN + b"\0\0\r\n", True, id="padded"),
        pytest.param(turned(6), False, id="turned"),
        pytest.param(jpeg(picture(1).convert("CMYK")), False, id="cmyk"),
        pytest.param(jpeg(picture(1), keep_rgb=True), False, id="rgb"),
        pytest.param(PLAIN[:-200], False, id="cut"),
        pytest.param(PLAIN[:-200] + bytes(200), False, id="cut-and-filled"),
        pytest.param(PLAIN + bytes(1000), False, id="much-padded"),
        pytest.param(PLAIN[:2] + b"\xff" + PLAIN[2:], False, id="filled-header"),
        pytest.param(PLAIN.replace(b"\xff\xc0", b"\xff\xc9", 1), False, id="arithmetic"),
        pytest.param(PLAIN[:FRAME] + HUGE + PLAIN[FRAME:], False, id="two-frames"),
        pytest.param(png(), False, id="png"),
    ],
)
def test_only_whole_upright_plain_jpegs_are_eligible(data: bytes, eligible: bool) -> None:
    assert nvjpeg.eligible(examine(data, LIMITS), data) is eligible


def test_large_images_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "MOST_PIXELS", 96 * 96 - 1)
    assert not nvjpeg.eligible(examine(PLAIN, LIMITS), PLAIN)


def made(files: list[bytes]) -> tuple[list[int], list[np.ndarray]]:
    """All chunks together."""
    jpegs = {10 * number: Jpeg(data, 96 * 96) for number, data in enumerate(files)}
    chunks = list(nvjpeg.inputs(jpegs, FORMS, DEVICE))
    each = zip(*(inputs for _, inputs in chunks), strict=True)
    keys = [key for keys, _ in chunks for key in keys]
    return keys, [torch.cat(one).cpu().numpy() for one in each]


@pytest.mark.parametrize(
    "size", [(500, 375), (333, 500), (224, 299), (96, 97), (1000, 300), (256, 256)]
)
def test_inputs_are_pillows_but_for_rounding(size: tuple[int, int]) -> None:
    files = [
        jpeg(picture(2, *size), quality=95, subsampling="4:4:4"),
        jpeg(picture(3, *size), quality=95, progressive=True),
        jpeg(picture(4, *size).convert("L")),
    ]
    keys, found = made(files)
    assert keys == [0, 10, 20]
    for which, form in enumerate(FORMS):
        wanted = np.stack([form.prepare(decode(data, LIMITS).pixels) for data in files])
        assert found[which].dtype == np.uint8
        off = np.abs(found[which].astype(int) - wanted)  # of one pixel's shift: 0.7 to 2 on average
        assert off.mean() < (0.3 if DEVICE.type == "cpu" else 1)


def test_what_cannot_be_decoded_costs_no_other_and_pixels_at_a_time_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torchvision.io

    files = [jpeg(picture(seed)) for seed in range(11)]
    _, whole = made(files)
    files[3] = PLAIN[: FRAME + 30]
    files[7] = b"\xff\xd8\xff"
    asked: list[int] = []
    decode_jpeg = torchvision.io.decode_jpeg

    def noted(raw: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
        asked.append(len(raw))
        found: list[torch.Tensor] = decode_jpeg(raw, **options)
        return found

    monkeypatch.setattr(torchvision.io, "decode_jpeg", noted)
    monkeypatch.setattr(nvjpeg, "TOGETHER_PIXELS", 5 * 96 * 96)
    keys, found = made(files)
    good = [number for number in range(11) if number not in (3, 7)]
    assert keys == [10 * number for number in good]
    assert max(asked) == 5
    for which in (0, 1):
        np.testing.assert_array_equal(found[which], whole[which][good])


def test_features_of_photographs_stay(shared: Path) -> None:
    paths = sorted((shared / "bench" / "pool").glob("*.jpg"))[:48]
    files = [path.read_bytes() for path in paths]
    models = (load_semantic(DEMO_MODEL, None, "fp32"), load_copy_descriptor(None))
    forms = [model.form for model in models]
    jpegs = {n: Jpeg(data, 1) for n, data in enumerate(files)}
    assert all(nvjpeg.eligible(examine(data, LIMITS), data) for data in files)
    ((keys, found),) = nvjpeg.inputs(jpegs, forms, models[0].device)
    assert keys == list(range(48))
    for model, inputs in zip(models, found, strict=True):
        pixels = [decode(data, LIMITS).pixels for data in files]
        exact = model(np.stack([model.prepare(one) for one in pixels]))
        cosine = (exact * model(inputs)).sum(axis=1)
        assert cosine.mean() > 0.999
        assert cosine.min() > 0.98
