"""Files of too many pieces: told at once, and what cameras and editors write is never meant."""

import io
import re
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from curation.images.decode import BadImage, Limits, decode
from curation.images.structure import excess

LIMITS = Limits(min_side=1, max_pixels=100_000_000, max_bytes=100_000_000, max_aspect=10)


def encoded(form: str, side: int = 64, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(out, form, **options)  # type: ignore[arg-type]
    return out.getvalue()


def scans() -> bytes:
    """A megabyte of further scans over 16 megapixels: minutes of libjpeg's time."""
    data = encoded("JPEG", 4000, progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 1500 + data[-2:]


def exif_segments() -> bytes:
    data, body = encoded("JPEG"), b"Exif\0\0ab"
    return data[:2] + (b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body) * 300_000 + data[2:]


def segments() -> bytes:
    data = encoded("JPEG")
    return data[:2] + b"\xff\xe5\0\2" * 1_000_000 + data[2:]


def fill() -> bytes:
    data = encoded("JPEG")
    return data[:2] + b"\xff" * 5_000_000 + data[2:]


def chunks() -> bytes:
    data = encoded("PNG")
    chunk = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    return data[:33] + chunk * 500_000 + data[33:]


def comments() -> bytes:
    data = encoded("GIF")
    at = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
    return data[:at] + b"\x21\xfe" + b"\x01a" * 3_000_000 + b"\0" + data[at:]


def strips(order: str = "<") -> bytes:
    count, mark = 1_000_000, b"II" if order == "<" else b"MM"
    tags = [(256, 64), (257, 64), (258, 8), (259, 1), (262, 1), (273, None), (277, 1), (278, 1)]
    tags.append((279, None))
    at = base = 10 + 12 * len(tags) + 4
    out = mark + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, value in tags:
        number, place = (count, at) if value is None else (1, value)
        at += 4 * count if value is None else 0
        out += struct.pack(order + "HHII", tag, 4, number, place)
    return out + bytes(4) + struct.pack(order + "I", base) * count + struct.pack("<I", 64) * count


BOMBS: list[Callable[[], bytes]] = [
    scans,
    exif_segments,
    segments,
    fill,
    chunks,
    comments,
    strips,
    lambda: strips(">"),
]


@pytest.mark.parametrize("make", BOMBS)
def test_a_file_of_too_many_pieces_is_told_at_once(make: Callable[[], bytes]) -> None:
    data, began = make(), time.process_time()
    with pytest.raises(BadImage, match=r"^too_many_pieces more "):
        decode(data, LIMITS)
    assert time.process_time() - began < 1


def test_what_encoders_write_is_taken() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8))
    found = []
    for form, options in (
        ("JPEG", {"quality": 100}),
        ("JPEG", {"progressive": True, "icc_profile": bytes(range(256)) * 4000}),
        ("JPEG", {"restart_marker_blocks": 1}),
        ("PNG", {"compress_level": 0}),
        ("GIF", {"comment": b"x" * 100_000}),
        ("TIFF", {"tiffinfo": {278: 1}}),
        ("WEBP", {}),
    ):
        out = io.BytesIO()
        noise.copy().save(out, form, **options)  # type: ignore[arg-type]
        found.append(excess(out.getvalue()))
    assert found == [None] * 7


def test_bytes_after_the_end_of_a_jpeg_are_no_scans() -> None:
    """A motion photograph has a film behind it."""
    data = encoded("JPEG", progressive=True) + b"\xff\xda\0\2" * 1000
    assert excess(data) is None
    assert decode(data, LIMITS).width == 64


def test_a_cut_file_is_no_reason_to_fail() -> None:
    for form in ("JPEG", "PNG", "GIF", "TIFF"):
        data = encoded(form)
        for size in range(min(len(data), 700)):
            assert excess(data[:size]) is None
    assert excess(re.sub(b"\xff\xda.*", b"", encoded("JPEG"), flags=re.DOTALL)) is None
