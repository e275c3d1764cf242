"""Everything that may go wrong with images, in one pool: the run succeeds and each has its row."""

import gzip
import hashlib
import io
import os
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from workbench import Project, picture

from curation.cli import main

TAKE_ALL = {"retrieve": ["as_is", {"sample": {"k": 100}}]}
LONG = "x" * 240 + ".jpg"
ODD_NAMES = [
    "ünï-绘画.jpg",
    "new\nline.jpg",
    "-dash.jpg",
    LONG,
    "%41 {a,b} 'q' \"d\".jpg",
    ".dot.jpg",
]


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


def bad_files(folder: Path) -> dict[str, str]:
    """Files that can't be images; returns the reason's first word by name."""
    whole = encoded(picture(900))
    files = {
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "truncated.png": (encoded(picture(901), "PNG")[:2000], "truncated"),
        "zero.jpg": (b"", "empty_file"),
        "zero-again.png": (b"", "empty_file"),
        "text.jpg": (b"hello, I am text\n" * 9, "not_an_image"),
        "1x1.png": (encoded(picture(902, 1, 1), "PNG"), "too_small"),
        "wide.png": (encoded(picture(903, 5000, 40), "PNG"), "extreme_aspect"),
        "bomb.png": (bomb(), "too_many_pixels"),
        "huge.bmp": (b"BM" + bytes(1_000_001), "too_large"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: reason for name, (_, reason) in files.items()}


def bad_places(folder: Path) -> dict[str, str]:
    """Links, loops and things that are no files."""
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "loop").symlink_to(".")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe.tar")
    os.mkfifo(folder / "pipe-without-meaning")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path may have 107 bytes
        listener.bind("socket.png")
        os.chdir(here)
    (folder / "zero.png").symlink_to("/dev/zero")
    reasons = dict.fromkeys(("dangling.jpg", "itself.jpg", "loop"), "unreadable")
    return reasons | dict.fromkeys(("pipe.jpg", "pipe.tar", "socket.png", "zero.png"), "not_a_file")


def good_files(folder: Path) -> dict[str, bytes]:
    """Images that are odd, but images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = picture(917).convert("L")
    files = {
        "jpeg-in-truth.png": encoded(picture(910)),
        "cmyk.jpg": encoded(picture(911).convert("CMYK")),
        "palette.gif": encoded(picture(912).convert("P"), "GIF"),
        "animated.gif": encoded(
            picture(913), "GIF", save_all=True, append_images=[picture(914), picture(915)]
        ),
        "rotated.jpg": encoded(picture(916, 160, 96), exif=exif),
        "16-bit.png": encoded(grey.convert("I").point(lambda x: x * 257).convert("I;16"), "PNG"),
        "alpha.png": encoded(picture(918).convert("RGBA"), "PNG"),
        "pages.tif": encoded(picture(919), "TIFF", save_all=True, append_images=[picture(920)]),
        "trailing.jpg": encoded(picture(921)) + b"something after its end",
        **{name: encoded(picture(930 + i)) for i, name in enumerate(ODD_NAMES)},
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    latin = os.fsencode(folder) + b"/latin-\xe9.jpg"
    Path(os.fsdecode(latin)).write_bytes(encoded(picture(940)))
    (folder / "nested").mkdir()
    picture(941).save(folder / "nested" / "deep.webp", lossless=True)
    (folder / "linked").symlink_to("nested")
    (folder / "linked.jpg").symlink_to("jpeg-in-truth.png")
    files["nested/deep.webp"] = (folder / "nested" / "deep.webp").read_bytes()
    files["latin-\\xe9.jpg"] = encoded(picture(940))
    return files


def archives(folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Tars and Parquet files, damaged and not: reasons of the bad keys, bytes of the good ones."""
    images = [encoded(picture(950 + i)) for i in range(8)]

    def tar_of(members: dict[str, bytes]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return out.getvalue()

    two = tar_of({"t0.jpg": images[0], "t1.jpg": images[1]})
    (folder / "cut.tar").write_bytes(two[: 512 + 512 * -(-len(images[0]) // 512) + 600])
    (folder / "packed.tar.gz").write_bytes(gzip.compress(two))
    (folder / "empty.tar").write_bytes(b"")
    (folder / "texts.tar").write_bytes(tar_of({"a.txt": b"a"}))
    (folder / "climbing.tar").write_bytes(
        tar_of({"../up.jpg": images[2], "/abs.jpg": images[2], "fine.jpg": images[2]})
    )
    (folder / "junk.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"image": [images[3], None, b"junk"]}), folder / "rows.parquet")
    (folder / "gone.tar").symlink_to("nowhere")
    bad = {
        "t1.jpg": "truncated_archive",
        "cut.tar": "truncated_archive",
        "packed.tar.gz": "compressed_archive",
        "empty.tar": "empty_archive",
        "texts.tar": "no_images",
        "../up.jpg": "unsafe_name",
        "/abs.jpg": "unsafe_name",
        "junk.parquet": "corrupt_archive",
        "row-000000001": "no_bytes",
        "row-000000002": "not_an_image",
        "gone.tar": "unreadable",
    }
    good = {"t0.jpg": images[0], "fine.jpg": images[2], "row-000000000": images[3]}
    return bad, good


def shard_images(run: Path) -> dict[str, bytes]:
    """Every image of the shards by its id."""
    found = {}
    for path in sorted((run / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ext = member.name.partition(".")
                if ext != "json":
                    file = tar.extractfile(member)
                    assert file is not None
                    found[key] = file.read()
    return found


def test_one_pool_with_everything_in_it(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    work = project(pool=range(20), images={"max_bytes": 1_000_000}, shards={"images_per_shard": 20})
    work.recipe["sources"]["curated"]["wanted"] |= TAKE_ALL
    pool = work.folder / "pool"
    bad = bad_files(pool) | bad_places(pool)
    good = good_files(pool)
    bad_members, good_members = archives(pool)
    bad, good = bad | bad_members, good | good_members

    assert work.run() == 0
    rows = [row for row in work.lineage() if row["source"] == "pool"]
    plain = {f"{seed:05d}.jpg" for seed in range(20)}
    again = {"linked.jpg": "jpeg-in-truth.png", "linked/deep.webp": "nested/deep.webp"}
    assert sorted(row["key"] for row in rows) == sorted({*plain, *again, *good, *bad})
    by_key = {row["key"]: row for row in rows}
    found = {key: (by_key[key]["decision"], by_key[key]["reason"].split()[0]) for key in bad}
    assert found == {key: ("rejected", reason) for key, reason in bad.items()}
    for pair in again.items():  # the same bytes by two names: one of them stays
        assert {by_key[key]["decision"] for key in pair} == {"selected", "duplicate"}
    assert by_key["zero.jpg"]["id"] == hashlib.sha256(b"").hexdigest()
    assert by_key["pipe.jpg"]["id"] is None

    in_shards = shard_images(work.run_folder)
    for key, data in good.items():
        assert by_key[key]["id"] == hashlib.sha256(data).hexdigest()
        assert by_key[key]["decision"] == "selected" or key in again.values()
        assert in_shards[by_key[key]["id"]] == data
    assert by_key["rotated.jpg"]["width"] == 96
    assert all((pool / key).read_bytes() == data for key, data in good.items() if key in ODD_NAMES)
    assert "Traceback" not in capsys.readouterr().err

    for key in [*ODD_NAMES, "latin-\\xe9.jpg", os.fsdecode(b"latin-\xe9.jpg"), "../up.jpg"]:
        assert main(["why", str(work.run_folder), "--", key]) == 0
        assert "decision" in capsys.readouterr().out


def test_a_second_run_over_the_same_bad_pool_computes_nothing(
    project: Callable[..., Project],
) -> None:
    work = project(pool=range(10))
    bad_files(work.folder / "pool")
    assert work.run() == 0
    before = {p: p.stat().st_mtime_ns for p in work.run_folder.rglob("*.parquet")}
    assert work.run() == 0
    assert {p: p.stat().st_mtime_ns for p in work.run_folder.rglob("*.parquet")} == before


def test_a_parquet_file_damaged_in_the_middle_keeps_the_rows_before(
    project: Callable[..., Project],
) -> None:
    work = project(pool=range(6))
    work.recipe["sources"]["curated"]["wanted"] |= TAKE_ALL
    images = [encoded(picture(700 + i, 128, 128), quality=95) for i in range(40)]
    path = work.folder / "pool" / "rows.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=20, use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 64] = b"\xaa" * 64
    path.write_bytes(data)
    assert work.run() == 0
    rows = [r for r in work.lineage() if r["key"].startswith("row-")]
    assert [r["decision"] for r in rows] == ["selected"] * 20 + ["rejected"] * 20
    assert all(r["reason"].startswith("corrupt_archive") for r in rows[20:])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_files_without_permission_are_recorded(project: Callable[..., Project]) -> None:
    work = project(pool=range(6))
    pool = work.folder / "pool"
    (pool / "closed").mkdir()
    for name in ("no.jpg", "no.tar"):
        (pool / name).write_bytes(encoded(picture(1)))
        (pool / name).chmod(0)
    (pool / "closed").chmod(0)
    models = Path(work.recipe["encoder"]["weights"]).parent
    opened = [*work.folder.parents[:3], work.folder, models, *models.iterdir()]
    modes = {path: path.stat().st_mode for path in opened}
    for path in opened:
        path.chmod(0o777)
    os.seteuid(65534)
    try:
        assert work.run() == 0
        rows = {row["key"]: row for row in work.lineage()}
    finally:
        os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)
    for name in ("no.jpg", "no.tar", "closed"):
        assert rows[name]["reason"] == "unreadable permission denied"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda pool: None, "sources.pool.0.uri: "),
        (lambda pool: pool.mkdir(), "nothing there"),
        (lambda pool: (pool.mkdir(), (pool / "a.txt").write_text("x")), "no images"),
        (lambda pool: pool.write_text("x"), "no such file or folder"),
        (lambda pool: os.mkfifo(pool), "no such file or folder"),
    ],
    ids=["missing", "empty", "no-images", "a-file", "a-pipe"],
)
def test_a_source_that_cannot_be_used_is_named(
    project: Callable[..., Project],
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], object],
    said: str,
) -> None:
    work = project(pool=range(1))
    work.recipe["sources"]["pool"][0]["uri"] = str(work.folder / "other")
    work.recipe["sources"]["curated"]["wanted"]["uri"] = str(work.folder / "gone")
    make(work.folder / "other")
    assert work.run() in (1, 2)
    error = capsys.readouterr().err
    assert "sources.pool.0.uri: " in error
    assert "sources.curated.wanted.uri: " in error  # both, not only the first
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("role", ["pool", "curated"])
def test_a_role_with_only_bad_images_is_one_clear_error(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str], role: str
) -> None:
    work = project(pool=range(4))
    for path in (work.folder / role).iterdir():
        path.write_bytes(b"no image")
    assert work.run() == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    name = {"pool": "sources.pool", "curated": "sources.curated.wanted"}[role]
    assert error.startswith(f"curate: {name}: not one image could be used ({{'not_an_image'")


def test_the_failure_budget_stops_a_run_that_loses_too_much(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    work = project(pool=range(4), failures={"max_share": 0.3, "min_images": 3})
    for i in range(8):
        (work.folder / "pool" / f"bad{i}.jpg").write_bytes(b"no image")
    assert work.run() == 1
    assert "failures.max_share = 0.3" in capsys.readouterr().err
    work.recipe["failures"]["max_share"] = 0.9
    assert work.run() == 0
