"""Tars are those of `tarfile`, byte by byte."""

import hashlib
import io
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.images import tar_writer
from curation.images.tar_writer import TarWriter, header

# Also bytes that are no UTF-8, as names of files travel.
names = st.text(st.sampled_from("abcé/. \udcff"), max_size=250)
SIZES = (0, 1, 511, 512, 513, 8**11 - 1, 8**11, 2**40)


def info(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


@settings(max_examples=200, deadline=None)
@given(names, st.sampled_from(SIZES))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    wanted = info(name, size).tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    assert header(name, size) == wanted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, st.binary(max_size=2000)), max_size=40))
def test_the_whole_is_that_of_tarfile(members: list[tuple[str, bytes]]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8"
    ) as expected:
        for name, data in members:
            expected.addfile(info(name, len(data)), io.BytesIO(data))
    wanted = buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_writer, "BLOCK_BYTES", 5000)
        patch.setattr(tar_writer, "LARGE", 700)
        with TarWriter(Path(folder) / "made.tar") as tar:
            places = [(tar.add(name, data), data) for name, data in members]
        assert (Path(folder) / "made.tar").read_bytes() == wanted
    assert (tar.size, tar.sha256) == (len(wanted), hashlib.sha256(wanted).hexdigest())
    assert all(wanted[at : at + len(data)] == data for at, data in places)


def write(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with TarWriter(path) as tar:
        for name, data in members:
            tar.add(name, data)


@pytest.mark.parametrize("written", [1, 10_000])
def test_a_full_disk_is_told(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    monkeypatch.setattr(tar_writer, "BLOCK_BYTES", 5000)
    with pytest.raises(OSError, match="No space left"):
        write(Path("/dev/full"), [("a.jpg", bytes(1000))] * written)
    assert threading.active_count() == threads


def test_what_stops_the_caller_stops_the_tar(tmp_path: Path) -> None:
    def members() -> Iterator[tuple[str, bytes]]:
        yield "a.jpg", b"data"
        raise KeyError("the next one")

    threads = threading.active_count()
    with pytest.raises(KeyError):
        write(tmp_path / "x.tar", members())
    assert (tmp_path / "x.tar").read_bytes() == b""
    assert threading.active_count() == threads
