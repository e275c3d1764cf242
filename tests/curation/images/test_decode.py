"""Decoding by a table of cases: what comes out is compared with known pixels."""

import contextlib
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.images.decode import BadImage, Decoded, Limits, decode

ANY = Limits(min_side=1, max_pixels=10_000_000, max_bytes=100_000_000, max_aspect=1e6)
USUAL = Limits(min_side=32, max_pixels=10_000_000, max_bytes=1_000_000, max_aspect=10)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)  # type: ignore[arg-type]
    return out.getvalue()


def noise(width: int = 80, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain(mode: str, colour: object, side: int = 40) -> Image.Image:
    return Image.new(mode, (side, side), colour)  # type: ignore[arg-type]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, rows: bytes, depth: int = 8, kind: int = 2, extra: bytes = b""
) -> bytes:
    """A PNG from its uncompressed rows, for what Pillow doesn't write."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        extra,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def mean(found: Decoded) -> list[int]:
    assert found.pixels.mode == "RGB"
    return [round(float(x)) for x in np.asarray(found.pixels).mean(axis=(0, 1))]


LOSSLESS = ("PNG", "BMP", "TIFF")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_every_format_opens_with_its_real_extension(form: str) -> None:
    image = noise()
    found = decode(encoded(image, form), USUAL)
    names = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
    assert (found.ext, found.width, found.height) == (names.get(form, form.lower()), 80, 64)
    if form in LOSSLESS:
        assert np.array_equal(np.asarray(found.pixels), np.asarray(image))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_tiff_keeps_its_pixels(compression: str) -> None:
    found = decode(encoded(noise(), "TIFF", compression=compression), USUAL)
    assert np.array_equal(np.asarray(found.pixels), np.asarray(noise()))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_cut_file_is_truncated(form: str, share: float) -> None:
    data = encoded(noise(), form)
    with pytest.raises(BadImage, match=r"^(truncated|corrupt) ."):
        decode(data[: int(len(data) * share)], USUAL)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"not a picture at all\n" * 20, "not_an_image"),
        (b"RIFF\x10\0\0\0WAVEfmt " + bytes(40), "not_an_image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "corrupt"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "corrupt"),
        (b"GIF89a", "corrupt"),
        (encoded(noise(), "PNG")[:60], "truncated"),
        (encoded(noise(), "WEBP")[:40], "truncated"),
        (encoded(noise(), "PNG").replace(b"IDAT", b"IDAX", 1), "corrupt"),
        (encoded(plain("RGB", "red", 1), "PNG"), "too_small"),
        (encoded(plain("RGB", "red", 31), "PNG"), "too_small"),
        (encoded(noise(5000, 20), "PNG"), "too_small"),
        (encoded(noise(500, 40), "PNG"), "extreme_aspect"),
        (encoded(noise(40, 500), "PNG"), "extreme_aspect"),
        (encoded(noise(800, 600), "BMP"), "too_large"),
    ],
)
def test_what_is_wrong_is_named_by_a_stable_first_word(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as error:
        decode(data, USUAL)
    assert str(error.value).split()[0] == reason


def test_the_smallest_and_the_longest_pass_when_the_limits_allow_them() -> None:
    assert mean(decode(encoded(plain("RGB", (1, 2, 3), 1), "PNG"), ANY)) == [1, 2, 3]
    found = decode(encoded(noise(5000, 20), "PNG"), ANY)
    assert (found.width, found.height) == (5000, 20)


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(noise(), "JPEG"))
    assert decode((tmp_path / "x.png").read_bytes(), USUAL).ext == "jpg"


def grey16(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((40, 40), value, np.uint16)), "PNG")


def rgb16(values: tuple[int, ...]) -> bytes:
    row = b"\0" + struct.pack(f">{len(values)}H", *values) * 40
    return png(40, 40, row * 40, depth=16, kind=2 if len(values) == 3 else 6)


def as_float(value: float) -> bytes:
    pixels = np.full((40, 40), value, np.float32)
    pixels[0, 0] = np.nan
    return encoded(Image.fromarray(pixels), "TIFF")


def palette(transparent: bool) -> bytes:
    image = plain("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encoded(image, "PNG", **({"transparency": 1} if transparent else {}))


CMYK = plain("CMYK", (0, 255, 255, 0))  # red: no cyan, all magenta and yellow


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        pytest.param(encoded(CMYK, "JPEG", quality=100), [254, 0, 0], id="adobe-inverted-cmyk"),
        pytest.param(encoded(CMYK, "TIFF"), [255, 0, 0], id="cmyk-tiff"),
        pytest.param(grey16(0), [0, 0, 0], id="grey16-black"),
        pytest.param(grey16(200), [1, 1, 1], id="grey16-dark-stays-dark"),
        pytest.param(grey16(32896), [128, 128, 128], id="grey16-half"),
        pytest.param(grey16(65535), [255, 255, 255], id="grey16-white"),
        pytest.param(rgb16((65535, 32896, 0)), [255, 128, 0], id="rgb16"),
        pytest.param(rgb16((65535, 32896, 0, 65535)), [255, 128, 0], id="rgba16"),
        pytest.param(rgb16((65535, 0, 0, 0)), [255, 255, 255], id="rgba16-transparent"),
        pytest.param(as_float(0.5), [127, 127, 127], id="float-of-1"),
        pytest.param(as_float(128), [128, 128, 128], id="float-of-255"),
        pytest.param(palette(False), [200, 100, 50], id="palette"),
        pytest.param(palette(True), [255, 255, 255], id="palette-transparent"),
        pytest.param(encoded(plain("LA", (0, 0)), "PNG"), [255, 255, 255], id="la-transparent"),
        pytest.param(encoded(plain("LA", (0, 255)), "PNG"), [0, 0, 0], id="la-opaque"),
        pytest.param(
            encoded(plain("RGBA", (255, 0, 0, 51)), "PNG"), [255, 204, 204], id="rgba-fifth"
        ),
        pytest.param(encoded(plain("1", 1), "PNG"), [255, 255, 255], id="one-bit"),
        pytest.param(encoded(plain("L", 77), "PNG"), [77, 77, 77], id="grey"),
        pytest.param(
            encoded(plain("L", 77), "PNG", transparency=77), [255, 255, 255], id="grey-key-colour"
        ),
        pytest.param(encoded(plain("YCbCr", (128, 128, 128)), "TIFF"), [128] * 3, id="ycbcr-tiff"),
    ],
)
def test_every_kind_of_pixel_becomes_the_right_rgb(data: bytes, colour: list[int]) -> None:
    found = mean(decode(data, USUAL))
    assert all(abs(a - b) <= 1 for a, b in zip(found, colour, strict=True)), found


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_counts(form: str) -> None:
    frames = [plain("RGB", "red"), plain("RGB", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    red, green, blue = mean(decode(data, USUAL))
    assert red > 250
    assert max(green, blue) < 5


def test_a_one_frame_gif_with_a_transparent_ground_lies_on_white() -> None:
    image = plain("P", 0)
    image.putpalette([9, 9, 9, 1, 2, 3])
    assert mean(decode(encoded(image, "GIF", transparency=0), USUAL)) == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_exif_turns_the_image_upright(orientation: int, form: str) -> None:
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:20, :32] = (250, 0, 0)  # red top left, green top right
    upright[:20, 32:] = (0, 250, 0)
    stored = {  # what a camera held in each position stores: EXIF 2.3, tag 0x0112
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif)
    found = decode(data, USUAL)
    assert (found.width, found.height) == (64, 40)
    assert np.abs(np.asarray(found.pixels).astype(int) - upright).mean() < 6


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"garbage",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",  # it is text
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # it is 99
    ],
)
def test_damaged_exif_costs_nothing_but_the_turn(form: str, exif: bytes) -> None:
    found = decode(encoded(noise(), form, exif=exif), USUAL)
    assert (found.width, found.height) == (80, 64)


def peak_bytes(data: bytes, limits: Limits, reason: str) -> int:
    """Peak of Python's allocations and of the process (which C decoders add to)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    before = _resident()
    tracemalloc.start()
    try:
        with pytest.raises(BadImage, match=f"^{reason}"):
            decode(data, limits)
        traced = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return max(traced, _resident() - before)


def _resident() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024


def tile_bomb(side: int) -> bytes:
    """A 64 x 64 TIFF whose single tile unpacks to side * side bytes."""
    packed = zlib.compress(bytes(side * side), 1)
    long, short = 4, 3
    tags = [(256, long, 64), (257, long, 64), (258, short, 8), (259, short, 8), (262, short, 1)]
    tags += [(277, short, 1), (322, long, side), (323, long, side)]
    tags += [(324, long, 8), (325, long, len(packed))]
    table = struct.pack("<H", len(tags))
    table += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + table + bytes(4)


def webp_bomb() -> bytes:
    """A lossless WebP that says it is 16383 x 16383."""
    data = bytearray(encoded(Image.new("RGB", (16383, 64)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little")
    data[at : at + 4] = (bits & ~(0x3FFF << 14) | 16382 << 14).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(png(50_000, 50_000, bytes(1000)), "too_many_pixels", id="png"),
        pytest.param(tile_bomb(10_000), "too_many_pixels", id="tiff-tile"),
        pytest.param(webp_bomb(), "too_many_pixels", id="webp"),
        pytest.param(
            png(64, 64, b"", extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))),
            "too_large",
            id="png-text",
        ),
        pytest.param(
            png(64, 64, b"", extra=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(80_000_000)))),
            "too_large",
            id="png-icc",
        ),
    ],
)
def test_a_bomb_is_refused_before_its_pixels_are_allocated(data: bytes, reason: str) -> None:
    assert peak_bytes(data, ANY, reason) < 40_000_000


def test_large_but_harmless_metadata_is_no_fault() -> None:
    rows = (b"\0" + b"\x80" * 120) * 40
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000)))
    assert mean(decode(png(40, 40, rows, extra=text), ANY)) == [128, 128, 128]
    assert decode(encoded(noise(), "JPEG", icc_profile=bytes(1_500_000)), ANY).width == 80


def test_random_damage_never_raises_anything_but_bad_image() -> None:
    random = np.random.default_rng(1)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = np.frombuffer(encoded(noise(), form), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            places = random.integers(0, len(data), 8)
            damaged[places] = random.integers(0, 256, 8)
            with contextlib.suppress(BadImage):
                assert decode(damaged.tobytes(), USUAL).pixels.mode == "RGB"
