"""Mutated files, and a child process that decodes them under limits of time and memory.

    python hostile.py images|tars EXAMPLES FILE

The file being read is kept in FILE: should the process die, that is what killed it.
"""

import io
import re
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from curation.images.decode import BadImage, Limits, decode
from curation.images.sources import scan_tar

LIMITS = Limits(min_side=8, max_pixels=4_000_000, max_bytes=10_000_000, max_aspect=20)
LONGEST_S, LARGEST_BYTES = 3.0, 200 << 20
Edit = tuple[str, float, bytes]


def _picture() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC)


def files() -> list[bytes]:
    """Small files of each format, in the variants whose readers differ."""
    image = _picture()
    grey, bits, indexed, clear = (image.convert(mode) for mode in ("L", "1", "P", "RGBA"))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    exif, text = Image.Exif(), PngInfo()
    exif[0x0112], exif[0x010E] = 6, "description " * 5
    text.add_text("a", "b" * 300, zip=True)
    text.add_itxt("c", "d" * 300, zip=True)
    frames: dict[str, Any] = {"save_all": True}
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "JPEG", {"exif": exif}),
        (image, "JPEG", {"progressive": True, "icc_profile": b"x" * 300}),
        (grey, "JPEG", {}),
        (image.convert("CMYK"), "JPEG", {}),
        (image, "MPO", frames),
        *((picture, "PNG", {}) for picture in (image, grey, bits, indexed, clear, deep)),
        (image, "PNG", {"pnginfo": text, "icc_profile": b"x" * 300, "exif": exif}),
        (image, "PNG", frames),
        (image, "GIF", frames),
        (indexed, "GIF", {"comment": b"x" * 300}),
        *((picture, "WEBP", {}) for picture in (image, clear)),
        (image, "WEBP", {"lossless": True, "exif": exif}),
        (image, "WEBP", frames),
        *((picture, "TIFF", {}) for picture in (deep, clear, image.convert("F"))),
        *((image, "TIFF", {"compression": name}) for name in ("tiff_lzw", "jpeg", "packbits")),
        (image, "TIFF", {"compression": "tiff_deflate", "exif": exif}),
        (bits, "TIFF", {"compression": "group4"}),
        (image, "TIFF", frames),
    ]
    found = []
    for picture, form, options in made:
        out = io.BytesIO()
        if "save_all" in options:
            options = {**options, "append_images": [image.rotate(30)] * 3}
        picture.copy().save(out, form, **options)  # savers leave their settings in an image
        found.append(out.getvalue())
    return found


def tar(kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of a few samples, with a long name, a link and a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for number, data in enumerate([*files()[:3], b"text"]):
            name = (
                f"{'long' * 40 if number == 1 else 'in'}/{number}.{'jpg' if number < 3 else 'txt'}"
            )
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("in/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        archive.addfile(link)
    return out.getvalue()


EXTREMES = [b"\0", b"\xff", b"\x80", b"\0\0", b"\xff\xff", b"\x7f\xff", b"\xff\x7f", b"\0\1"]
EXTREMES += [b"\0\0\0\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\x10\0\0"]
EXTREMES += [b"77777777777", b"\x80" + b"\0" * 7 + b"\xff" * 4, b"-1", b"\xff" * 8, b"\xff\xda"]


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """Each edit at a place between 0 and 1, of which the first half is the first 200 bytes."""
    for kind, place, value in edits:
        near = place < 0.5
        at = int(place * 2 * min(len(data), 200)) if near else int((place * 2 - 1) * len(data))
        if kind == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + 4 * len(value) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 16 * len(value)] * 40 + data[at:]
        elif kind == "cut" and not near:
            data = data[:at]
    return data


def mutated(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    """A file with a few edits."""
    value = st.one_of(st.sampled_from(EXTREMES), st.binary(min_size=1, max_size=4))
    kinds = st.sampled_from(["set", "set", "set", "insert", "delete", "repeat", "cut"])
    edits = st.lists(st.tuples(kinds, st.floats(0, 1), value), min_size=1, max_size=6)
    return st.builds(edited, st.sampled_from(originals), edits)


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def read_image(data: bytes) -> None:
    """Pixels within the limits, or a reason."""
    try:
        found = decode(data, LIMITS)
    except BadImage as bad:
        reason = str(bad).split()[0]
    else:
        reason = "usable"
        assert found.width * found.height <= LIMITS.max_pixels
        assert found.pixels.size == (found.width, found.height)
    assert re.fullmatch(r"[a-z_]+", reason), reason


def read_tar(data: bytes) -> None:
    """Members that lie within the file, or that say what is wrong."""
    members = list(scan_tar(io.BytesIO(data), len(data)))
    assert 0 < len(members) <= len(data) // 512 + 2
    for member in members:
        assert member.fault or 0 <= member.offset <= member.offset + member.size <= len(data)
        for extra in member.extras:
            assert int(extra["offset"]) + int(extra["size"]) <= len(data)


def main(what: str, examples: int, current: Path) -> None:
    """Raises AssertionError with the smallest file that breaks a limit."""
    read = read_image if what == "images" else read_tar
    originals = files() if what == "images" else [tar(), tar(tarfile.GNU_FORMAT)]
    for data in originals:
        read(data)  # nothing is measured on first use

    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(mutated(originals))
    def check(data: bytes) -> None:
        current.write_bytes(data)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        began, before = time.process_time(), _memory("VmRSS")
        read(data)
        assert time.process_time() - began < LONGEST_S
        assert _memory("VmHWM") - before < LARGEST_BYTES

    check()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
