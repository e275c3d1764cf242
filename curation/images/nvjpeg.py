"""JPEGs decoded on a GPU by nvJPEG, and made the models' inputs there.

Pixels differ a little from Pillow's, in how colours are brought to full size and in rounding. What
nvJPEG may not read, or not as libjpeg does, is left to Pillow, which also names the faults.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from curation.images.decode import turn
from curation.images.encoders import InputFormat
from curation.images.errors import EncoderError

DECODES_ON = ("cuda",)
MOST_PIXELS = 32_000_000  # of one image: Pillow decodes larger ones
TOGETHER_PIXELS = 64_000_000  # decoded at a time: 192 MB
FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # JPEG markers: any kind of coding
BASELINE, PROGRESSIVE = 0xC0, 0xC2
RGB_IDS = [*b"RGB"]  # of components that are no YCbCr
PADDING = b"\0\r\n\t "  # after the end; of a file that was cut, zeros may be all that is there
TAIL = 64


@dataclass(frozen=True)
class Jpeg:
    """A file that has still to be decoded, and its pixels."""

    data: bytes
    pixels: int


def require(device: torch.device) -> None:
    """Raises EncoderError where there is no nvJPEG."""
    if device.type not in DECODES_ON:
        raise EncoderError(
            "encoder.decoder: nvjpeg needs an NVIDIA GPU, and none can be used here; write `pillow`"
            " or leave it out"
        )


def eligible(image: Image.Image, data: bytes) -> bool:
    """Whether an opened file is an upright, whole, baseline or progressive JPEG, grey or YCbCr."""
    return (
        image.format == "JPEG"
        and image.width * image.height <= MOST_PIXELS
        and image.mode in ("L", "RGB")
        and image.info.get("adobe_transform", 1) == 1
        and [layer[0] for layer in image.layer] != RGB_IDS  # type: ignore[attr-defined]
        and _frame(data) in [(kind, *image.size) for kind in (BASELINE, PROGRESSIVE)]
        and data[-TAIL:].rstrip(PADDING).endswith(b"\xff\xd9")
        and turn(image) is None
    )


def _frame(data: bytes) -> tuple[int, int, int] | None:
    """Marker, width and height of the first frame, whose size is Pillow's unless a second one
    hides it from the limits. None where anything but segments comes before."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        if data[at + 1] in FRAMES:
            height, width = (int.from_bytes(data[at + n : at + n + 2], "big") for n in (5, 7))
            return data[at + 1], width, height
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def inputs(
    jpegs: Mapping[int, Jpeg], forms: Sequence[InputFormat], device: torch.device
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Keys of those that can be decoded, with each form's (n, 3, S, S) uint8, some at a time."""
    for keys in _bounded(jpegs):
        yield from _decoded(jpegs, keys, forms, device)


def _bounded(jpegs: Mapping[int, Jpeg]) -> Iterator[list[int]]:
    """Keys in order, of few enough pixels to be decoded together."""
    keys: list[int] = []
    pixels = 0
    for key, jpeg in jpegs.items():
        if keys and pixels + jpeg.pixels > TOGETHER_PIXELS:
            yield keys
            keys, pixels = [], 0
        keys.append(key)
        pixels += jpeg.pixels
    if keys:
        yield keys


def _decoded(
    jpegs: Mapping[int, Jpeg], keys: list[int], forms: Sequence[InputFormat], device: torch.device
) -> Iterator[tuple[list[int], list[Tensor]]]:
    try:
        made = _made([jpegs[key].data for key in keys], forms, device)
    except RuntimeError:  # one is enough for torchvision to give none: it is looked for by halves
        half = len(keys) // 2
        for some in (keys[:half], keys[half:]) if half else ():
            yield from _decoded(jpegs, some, forms, device)
    else:
        yield keys, made


def _made(files: list[bytes], forms: Sequence[InputFormat], device: torch.device) -> list[Tensor]:
    """Each form's (n, 3, S, S) uint8. Raises RuntimeError if one file can't be decoded."""
    from torchvision.io import ImageReadMode, decode_jpeg  # as timm: only this stage needs it

    fitted: list[list[Tensor]] = [[] for _ in forms]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bytes as tensors; of decoders that are to move
        raw = [torch.frombuffer(data, dtype=torch.uint8) for data in files]
        images = decode_jpeg(raw, mode=ImageReadMode.RGB, device=device)
    for pixels in images:
        exact = pixels[None].float()
        for form, of_form in zip(forms, fitted, strict=True):
            of_form.append(_fit(exact, form))
    return [torch.cat(of_form).round_().clamp_(0, 255).to(torch.uint8) for of_form in fitted]


def _fit(image: Tensor, form: InputFormat) -> Tensor:
    """(1, 3, H, W) -> (1, 3, S, S), as `form.prepare` makes it but for rounding."""
    (width, height), (left, top) = form.place((image.shape[3], image.shape[2]))
    resized = interpolate(image, (height, width), mode="bicubic", antialias=True)
    return resized[:, :, top : top + form.size, left : left + form.size]
