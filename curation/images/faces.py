"""Faces found and made unrecognisable, on request: the only change that LVD makes to an image."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from curation.images.decode import Limits, decode
from curation.images.errors import EncoderError
from curation.images.safety import onnx_session

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
HAAR = "haar"
HAAR_SIDE = 800  # pixels: larger images are searched at this longer side
LEAST_FACE = 24  # pixels of that, a side
NEIGHBOURS = 6  # overlapping finds that make a face: 3 is OpenCV's default, and finds many others
GRID = 6  # a face keeps this many colours a side
MARGIN = 0.15  # of its size, around a face
MEAN, STD = 127.0, 128.0  # what detectors of UltraFace's kind are given
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}


@dataclass(frozen=True)
class FacesConfig:
    """`detector`: haar (OpenCV's), or an ONNX file of UltraFace's form with its score."""

    detector: str
    min_score: float
    limits: Limits
    version: str


class FaceBlur:
    """Finds faces and blurs them. `weights`: the bytes of an ONNX detector, None for haar."""

    def __init__(self, cfg: FacesConfig, weights: bytes | None) -> None:
        self._cfg = cfg
        self._find = _haar() if weights is None else _ultraface(weights, cfg.min_score)

    def file(self, data: bytes) -> tuple[bytes, int]:
        """A file's bytes and how many faces were blurred; without any, the same bytes.

        A changed file has its old format, upright, and none of its metadata. Raises BadImage.
        """
        decoded = decode(data, self._cfg.limits)
        image, faces = self.image(decoded.pixels)
        if not faces:
            return data, 0
        out = io.BytesIO()
        image.info.clear()
        image.save(out, FORMATS[decoded.ext], **({"quality": 95} if decoded.ext == "jpg" else {}))
        return out.getvalue(), faces

    def image(self, image: Image.Image) -> tuple[Image.Image, int]:
        """An RGB image with its faces blurred, and how many there were."""
        boxes = [_widened(box, image.size) for box in self._find(image)]
        changed = image.copy() if boxes else image
        for box in boxes:
            _blur(changed, box)
        return changed, len(boxes)


def _haar() -> Callable[[Image.Image], list[Box]]:
    try:
        import cv2

        path = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"  # type: ignore[attr-defined]
        cascade = cv2.CascadeClassifier(path)
    except (ImportError, AttributeError):
        raise EncoderError(
            "safety.faces.detector: haar needs OpenCV 4: pip install -e '.[safety]'"
        ) from None
    cv2.setNumThreads(1)

    def find(image: Image.Image) -> list[Box]:
        grey = image.convert("L")
        scale = max(1.0, max(grey.size) / HAAR_SIDE)
        small = grey.resize((round(grey.width / scale), round(grey.height / scale)))
        found = cascade.detectMultiScale(
            np.asarray(small), 1.1, NEIGHBOURS, minSize=(LEAST_FACE, LEAST_FACE)
        )
        return sorted(
            (x * scale, y * scale, (x + w) * scale, (y + h) * scale) for x, y, w, h in found
        )

    return find


def _ultraface(weights: bytes, min_score: float) -> Callable[[Image.Image], list[Box]]:
    """Outputs `scores` (1, N, 2) and `boxes` (1, N, 4), corners as shares of width and height."""
    field = "safety.faces.detector"
    session = onnx_session(weights, field)
    given, names = session.get_inputs()[0], {output.name for output in session.get_outputs()}
    if not {"scores", "boxes"} <= names or any(not isinstance(n, int) for n in given.shape[2:]):
        raise EncoderError(
            f"{field}: an ONNX detector needs an input of fixed size and outputs named scores and"
            f" boxes, as UltraFace has; this one gives {', '.join(sorted(names))}"
        )
    height, width = given.shape[2:]

    def find(image: Image.Image) -> list[Box]:
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        batch = ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]
        scores, boxes = session.run(["scores", "boxes"], {given.name: batch})
        sure: Any = boxes[0][scores[0][:, 1] >= min_score]
        return sorted(map(tuple, (sure * np.array([*image.size, *image.size])).tolist()))

    return find


def _widened(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    x, y = MARGIN * (right - left), MARGIN * (bottom - top)
    return (
        max(0, int(left - x)),
        max(0, int(top - y)),
        min(size[0], int(right + x) + 1),
        min(size[1], int(bottom + y) + 1),
    )


def _blur(image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """An ellipse of few colours: no filter can bring back what was never kept."""
    face = image.crop(box)
    if min(face.size) < 1:
        return
    coarse = face.resize((GRID, GRID), Image.Resampling.BOX)
    mask = Image.new("L", face.size)
    ImageDraw.Draw(mask).ellipse((0, 0, face.width - 1, face.height - 1), fill=255)
    image.paste(coarse.resize(face.size, Image.Resampling.BICUBIC), box, mask)
