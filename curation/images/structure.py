"""Files of more pieces than any image needs, told before a decoder walks them one by one.

A decoder's time and memory grow with the pixels, which are limited, but also with segments, scans,
chunks, blocks and strips, of which a small file can hold millions. Photographs have a few dozen.
"""

import re
import struct

MAX_SCANS = 64  # each goes over all pixels again; progressive encoders write about ten
MAX_EXIF_SEGMENTS = 200  # joined one by one: time grows with their square
MAX_SEGMENTS = 10_000
MAX_CHUNKS = 100_000
MAX_BLOCKS = 100_000
MAX_STRIPS = 100_000
STRIP_TAGS = (273, 324)  # StripOffsets, TileOffsets
# JPEG markers: without a length; frames of which each component is coded once; any with a length
# or an end, which entropy-coded data never holds.
LENGTHLESS = frozenset((*range(1, 0xC0), *range(0xD0, 0xDA)))
SEQUENTIAL = (0xC0, 0xC1, 0xC9)
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")


def excess(data: bytes) -> str | None:
    """What a file has too many of, or None."""
    if data.startswith(b"\xff\xd8"):
        return _of_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "chunks" if _png_chunks(data) > MAX_CHUNKS else None
    if data.startswith(b"GIF8"):
        return "blocks" if _gif_blocks(data) > MAX_BLOCKS else None
    if data.startswith((b"II", b"MM")):
        return "strips" if _tiff_strips(data) > MAX_STRIPS else None
    return None


def _of_jpeg(data: bytes) -> str | None:
    """Walks the header as Pillow does; further scans are only looked for where there may be any."""
    segments = exif = components = at = 0
    while at := data.find(b"\xff", at) + 1:
        code = data[at] if at < len(data) else 0xD9
        segments += 1
        if segments > MAX_SEGMENTS:
            return "segments"
        if code in (0, 0xFF):
            continue  # junk, or fill before a marker
        at += 1
        if code in LENGTHLESS:
            continue
        exif += code == 0xE1 and data.startswith(b"Exif\0\0", at + 2)
        if exif > MAX_EXIF_SEGMENTS:
            return "EXIF segments"
        if code in SEQUENTIAL:
            components = int.from_bytes(data[at + 7 : at + 8], "big")
        if code == 0xDA:
            one_is_all = components == int.from_bytes(data[at + 2 : at + 3], "big")
            return None if one_is_all or _scans(data, at) <= MAX_SCANS else "scans"
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return None


def _scans(data: bytes, at: int) -> int:
    """Scans from the first on, up to the image's end, found as libjpeg finds them."""
    scans = 1
    while (found := MARKER.search(data, at)) and scans <= MAX_SCANS:
        code, at = data[found.end() - 1], found.end()
        if code == 0xD9:
            break
        scans += code == 0xDA
        at += int.from_bytes(data[at : at + 2], "big")
    return scans


def _png_chunks(data: bytes) -> int:
    chunks, at = 0, 8
    while at < len(data) and chunks <= MAX_CHUNKS:
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        chunks += 1
    return chunks


def _gif_blocks(data: bytes) -> int:
    """Blocks of extensions, and bytes that are none, before the first frame."""
    blocks, at = 0, 13
    if len(data) > at and data[10] & 0x80:
        at += 3 * (2 << (data[10] & 7))
    while at < len(data) and data[at] not in b",;" and blocks <= MAX_BLOCKS:
        blocks += 1
        if data[at] != 0x21:
            at += 1
            continue
        at += 2
        while at < len(data) and data[at] and blocks <= MAX_BLOCKS:
            at += 1 + data[at]
            blocks += 1
        at += 1
    return blocks


def _tiff_strips(data: bytes) -> int:
    """The strips or tiles that the first directory names; 0 where it can't be read."""
    order = "<" if data.startswith(b"II") else ">"
    big = 43 in data[2:4]
    head, entries, entry = ("8xQ", "Q", "HHQ8x") if big else ("4xI", "H", "HHI4x")
    try:
        (at,) = struct.unpack_from(order + head, data)
        (count,) = struct.unpack_from(order + entries, data, at)
        at += struct.calcsize(order + entries)
        room = (len(data) - at) // struct.calcsize(order + entry)
        size = min(count, room) * struct.calcsize(order + entry)
        found = struct.iter_unpack(order + entry, data[at : at + size])
        return max((number for tag, _, number in found if tag in STRIP_TAGS), default=0)
    except struct.error:
        return 0
