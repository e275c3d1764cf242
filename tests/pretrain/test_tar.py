"""Headers are read as `tarfile` reads them."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.tar import Member, TarFault, image_members

# No two dots in a row and none at the ends: the samples' rules are tested apart.
names = st.text("abcé/. ", min_size=1, max_size=180).filter(lambda n: not n.startswith("/"))


def scan(data: bytes) -> list[Member]:
    return list(image_members(io.BytesIO(data), len(data)))


def tar_of(members: dict[str, bytes], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(names, st.binary(max_size=1100), max_size=8),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_offsets_are_those_of_tarfile(members: dict[str, bytes], form: int) -> None:
    data = tar_of({f"{i}{name}.jpg": body for i, (name, body) in enumerate(members.items())}, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [Member(info.name, info.offset_data, info.size) for info in tar]
    assert scan(data) == expected


@pytest.mark.parametrize(
    ("members", "images"),
    [
        ("a.jpg a.json b.PNG b.cls", "a.jpg b.PNG"),
        ("a.jpg a.mask.png", "a.jpg"),
        ("a.v2.jpg a.json", "a.v2.jpg"),
        ("x.y/a.jpg x.y/b.jpg", "x.y/a.jpg x.y/b.jpg"),
        ("a.jpg a.png", "a.jpg a.png"),
        ("a.txt", ""),
        ("BZh.jpg", "BZh.jpg"),
        ("", ""),
    ],
)
def test_which_members_are_images(members: str, images: str) -> None:
    data = tar_of(dict.fromkeys(members.split(), b"data"), tarfile.USTAR_FORMAT)
    assert [member.name for member in scan(data)] == images.split()


def test_folders_and_links_are_no_images() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x"
            tar.addfile(info)
    assert scan(buffer.getvalue()) == []


def test_large_members_have_sizes_in_base_256() -> None:
    info = tarfile.TarInfo("x.jpg")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert list(image_members(io.BytesIO(header), 10 << 30)) == [Member("x.jpg", 512, 9 << 30)]


def test_a_damaged_header_is_told_with_its_place() -> None:
    data = bytearray(tar_of({"a.jpg": b"1", "b.jpg": b"2"}, tarfile.USTAR_FORMAT))
    data[1024 + 5] ^= 1
    with pytest.raises(TarFault, match="no tar header at byte 1024: its checksum is wrong"):
        scan(bytes(data))
    with pytest.raises(TarFault, match="no tar header at byte 0: a field is no octal"):
        scan(b"plainly no archive" * 100)
