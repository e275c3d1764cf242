"""Tars, Parquet files and names by a table of cases; every image is found or its fault recorded."""

import bz2
import gzip
import io
import lzma
import re
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.images.sources import (
    PARQUET_ERRORS,
    Member,
    expand_braces,
    kind_of,
    read_parquet_rows,
    readable,
    scan_parquet,
    scan_tar,
)

Named = list[tuple[str | bytes, bytes]]


def tar_of(members: Named, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            text = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
            info = tarfile.TarInfo(text)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def scan(data: bytes) -> list[Member]:
    return list(scan_tar(io.BytesIO(data), len(data)))


def names(members: list[Member]) -> list[str]:
    return [member.name for member in members]


def reasons(members: list[Member]) -> list[str | None]:
    return [member.fault.split()[0] if member.fault else None for member in members]


def test_a_sample_is_its_image_with_the_other_members_beside_it() -> None:
    data = tar_of(
        [
            ("a/001.jpg", b"JPEG"),
            ("a/001.json", b"{}"),
            ("a/001.txt", b"text"),
            ("a/001.seg.png", b"mask"),
            ("a/002.JPG", b"second"),
            ("b/001.webp", b"other folder"),
            ("b/notes", b"no extension"),
        ]
    )
    first, second, third = scan(data)
    assert data[first.offset : first.offset + first.size] == b"JPEG"
    assert [extra["ext"] for extra in first.extras] == ["json", "txt", "seg.png"]
    found = [data[int(e["offset"]) : int(e["offset"]) + int(e["size"])] for e in first.extras]
    assert found == [b"{}", b"text", b"mask"]
    assert (second.name, second.extras) == ("a/002.JPG", [])
    assert (third.name, third.fault) == ("b/001.webp", None)


def test_several_images_of_one_sample_are_all_found_and_share_its_extras() -> None:
    members = scan(tar_of([("1.jpg", b"a"), ("1.png", b"b"), ("1.txt", b"c"), ("1.jpg", b"d")]))
    assert names(members) == ["1.jpg", "1.png", "1.jpg"]
    assert len({m.offset for m in members}) == 3
    assert all([e["ext"] for e in m.extras] == ["txt"] for m in members)


def test_names_with_dots_that_are_not_webdataset_s_are_found_too() -> None:
    members = scan(tar_of([("x.v1.jpg", b"a"), ("x.v2.jpg", b"b"), ("x.txt", b"c")]))
    assert names(members) == ["x.v1.jpg", "x.v2.jpg"]
    assert names(scan(tar_of([(".hidden.jpg", b"a"), ("._b.png", b"b")]))) == [
        ".hidden.jpg",
        "._b.png",
    ]


LONG = "long-" + "x" * 250 + ".jpg"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (LONG, LONG),
        ("ünï/绘画.jpg", "ünï/绘画.jpg"),
        ("new\nline.jpg", "new\nline.jpg"),
        ("-dash.jpg", "-dash.jpg"),
        (b"bad-\xff\xfe.jpg", "bad-\\xff\\xfe.jpg"),
        ("BZh.jpg", "BZh.jpg"),  # looks like bzip2 at first sight
        ("./a/./b.jpg", "./a/./b.jpg"),
    ],
)
def test_odd_names_come_through(form: int, name: str | bytes, shown: str) -> None:
    members = scan(tar_of([(name, b"image"), ("z.jpg", b"next")], form))
    assert [readable(m.name) for m in members] == [shown, "z.jpg"]
    assert reasons(members) == [None, None]


def test_an_extra_s_name_that_is_not_utf8_is_escaped() -> None:
    (member,) = scan(tar_of([("a.jpg", b"x"), (b"a.\xff", b"y")]))
    assert [extra["ext"] for extra in member.extras] == ["\\xff"]


def test_members_that_are_no_plain_files_inside_are_refused_one_by_one() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("../up.jpg", "/abs.jpg", "a/../../b.jpg", "good.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("device.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert reasons(scan(out.getvalue())) == ["unsafe_name"] * 3 + [None] + ["not_a_file"] * 4


def whole() -> bytes:
    return tar_of([(f"{i}.jpg", bytes([i]) * 2000) for i in range(4)], tarfile.USTAR_FORMAT)


STEP = 512 + 2048  # of one member of `whole`


@pytest.mark.parametrize(
    ("data", "found", "last"),
    [
        (b"", 0, "empty_archive"),
        (bytes(10240), 0, "empty_archive"),
        (b"hello", 0, "truncated_archive"),
        (b"text that is longer than a block\n" * 40, 0, "corrupt_archive"),
        (whole()[:200], 0, "truncated_archive"),
        (whole()[: STEP * 2 + 100], 2, "corrupt_archive"),
        (whole()[: STEP * 3 + 512 + 10], 4, "truncated_archive"),
        (whole()[: STEP * 1 + 512 + 1000], 2, "truncated_archive"),
        (whole()[:STEP] + b"\xee" * 512 + whole()[STEP + 512 :], 1, "corrupt_archive"),
        (whole() + whole(), 4, "corrupt_archive"),
        (gzip.compress(whole()), 0, "compressed_archive"),
        (bz2.compress(whole()), 0, "compressed_archive"),
        (lzma.compress(whole()), 0, "compressed_archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), 0, "compressed_archive"),
        (tar_of([("a.txt", b"x"), ("b.json", b"y")]), 0, "no_images"),
    ],
)
def test_a_damaged_tar_gives_what_it_has_and_one_fault_of_its_own(
    data: bytes, found: int, last: str
) -> None:
    members = scan(data)
    assert names(members) == [f"{i}.jpg" for i in range(found)] + [""]
    assert reasons(members)[-1] == last
    cut = [m for m in members[:-1] if m.fault]
    assert all(m.fault == "truncated_archive the file ends inside this member" for m in cut)
    assert len(cut) == (1 if found and last == "truncated_archive" else 0)


def test_an_undamaged_end_without_padding_is_no_fault() -> None:
    assert reasons(scan(whole()[: STEP * 4])) == [None] * 4


def test_a_header_that_leads_backwards_ends_the_scan() -> None:
    """A negative size in base 256 would send tarfile round for ever."""
    data = bytearray(whole())
    header = data[STEP : STEP + 512]
    header[124:136] = b"\xff" * 8 + (-STEP & 0xFFFFFFFF).to_bytes(4, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[STEP : STEP + 512] = header
    assert reasons(scan(bytes(data))) == [None, "corrupt_archive"]


def test_a_damaged_archive_after_a_dotfile_is_still_told() -> None:
    data = tar_of([(".hidden.jpg", b"x")], tarfile.USTAR_FORMAT)[:1024] + b"\xee" * 512
    assert reasons(scan(data)) == [None, "corrupt_archive"]


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("x-{008..010}.tar", ["x-008.tar", "x-009.tar", "x-010.tar"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("{name}.tar", ["{name}.tar"]),
        ("{5..5}", ["5"]),
    ],
)
def test_braces_expand_as_in_a_shell(uri: str, found: list[str]) -> None:
    assert expand_braces(uri) == found


@pytest.mark.parametrize("uri", ["{3..1}", "{0..99999999}", "{0..99999}/{0..99999}"])
def test_braces_that_fall_or_explode_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=re.escape(uri.partition("}")[0])):
        expand_braces(uri)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.JPEG", "folder"),
        ("a.tiff", "folder"),
        ("a.tar.gz", "webdataset"),
        ("a.parquet", "parquet"),
        ("a.txt", None),
        ("a", None),
        ("a.jpg.bak", None),
    ],
)
def test_a_name_tells_what_a_file_is(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def rows_of(data: bytes, first: int = 0, count: int = 1000) -> list[bytes | None]:
    return [image for image, _ in read_parquet_rows(io.BytesIO(data), first, count)]


BYTES = [b"one", b"two", None, b"four"]
HF = pa.array(
    [None if b is None else {"bytes": b, "path": None} for b in BYTES],
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"image": pa.array(BYTES, pa.binary())}),
        pa.table({"jpg": pa.array(BYTES, pa.large_binary()), "sha": pa.array(BYTES, pa.binary())}),
        pa.table({"anything": pa.array(BYTES, pa.binary_view()), "n": [1, 2, 3, 4]}),
        pa.table({"image": pa.array(BYTES, pa.binary()).dictionary_encode()}),
        pa.table({"image": HF, "label": [0, 1, 2, 3]}),
    ],
    ids=["binary", "large", "view", "dictionary", "hugging-face"],
)
def test_image_bytes_are_found_in_any_binary_column(table: pa.Table) -> None:
    data = parquet_of(table, row_group_size=3)
    groups = list(scan_parquet(io.BytesIO(data)))
    assert [[m.name for m in g] for g in groups] == [
        ["row-000000000", "row-000000001", "row-000000002"],
        ["row-000000003"],
    ]
    assert [m.offset for g in groups for m in g] == [0, 1, 2, 3]
    assert rows_of(data) == BYTES
    assert rows_of(data, 1, 2) == [b"two", None]
    assert rows_of(data, 3, 1) == [b"four"]


@pytest.mark.parametrize(
    "keys",
    [
        pa.array(["a", "b", None, "d"]),
        pa.array(["a", "b", None, "d"], pa.large_string()),
        pa.array(["a", "b", None, "d"]).dictionary_encode(),
    ],
)
def test_keys_come_from_their_column_and_plain_columns_are_kept(keys: pa.Array) -> None:
    table = pa.table({"image": pa.array(BYTES, pa.binary()), "key": keys, "width": [1, 2, 3, 4]})
    data = parquet_of(table)
    (group,) = scan_parquet(io.BytesIO(data))
    assert [m.name for m in group] == ["a", "b", "row-000000002", "d"]
    found = [columns for _, columns in read_parquet_rows(io.BytesIO(data), 0, 4)]
    assert found[1] == {"key": "b", "width": 2}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt_archive"),
        (b"PAR1 but not really PAR1", "corrupt_archive"),
        (parquet_of(pa.table({"image": pa.array(BYTES, pa.binary())}))[:-20], "corrupt_archive"),
        (parquet_of(pa.table({"text": ["a"]})), "no_image_column"),
        (parquet_of(pa.table({"x": [b"a"], "y": [b"b"]})), "no_image_column"),
        (parquet_of(pa.table({"image": pa.array([], pa.binary())})), "empty_archive"),
        (
            parquet_of(pa.table([pa.array([b"a"]), pa.array([b"b"])], names=["image", "image"])),
            "corrupt_archive",
        ),
    ],
    ids=["empty", "text", "cut", "no-bytes", "two-unnamed", "no-rows", "named-twice"],
)
def test_a_parquet_file_without_images_is_one_fault(data: bytes, reason: str) -> None:
    (group,) = scan_parquet(io.BytesIO(data))
    assert [m.name for m in group] == [""]
    assert reasons(group) == [reason]


def test_damage_inside_a_row_group_is_an_error_a_reader_can_name() -> None:
    table = pa.table({"image": pa.array([bytes([i % 256]) * 3000 for i in range(200)])})
    data = bytearray(parquet_of(table, row_group_size=100, use_dictionary=False))
    half = len(data) // 2 + 2000
    data[half : half + 200] = b"\xaa" * 200
    with pytest.raises(PARQUET_ERRORS):
        rows_of(bytes(data))
