"""The local store: whole files or none, every kind of thing in a folder, a full disk."""

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.runtime.store import DISK_FULL, FileStore, StoreError, open_store, split_uri


def listed(store: FileStore) -> dict[str, str]:
    return {entry.path: entry.fault for entry in store.list()}


def test_a_published_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    store.write("a/b.bin", b"old")

    def killed() -> None:
        with store.publish("a/b.bin") as scratch:
            scratch.write_bytes(b"half of the n")
            assert store.read("a/b.bin") == b"old"
            assert listed(store) == {"a/b.bin": ""}
            raise RuntimeError

    with pytest.raises(RuntimeError):
        killed()
    assert store.read("a/b.bin") == b"old"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_reading_by_range(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    store.write("x", b"0123456789")
    assert store.read("x", 3, 4) == b"3456"
    assert store.read("x", 8, 10) == b"89"
    assert store.read("x", 4) == b"456789"


def test_everything_in_a_folder_is_listed_and_nothing_special_is_opened(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    store.write("sub/x.jpg", b"x")
    (tmp_path / ".tmp-holiday.jpg").write_bytes(b"an image, whatever its name")
    (tmp_path / ".tmp-abcd1234").write_bytes(b"of a killed writer")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "again").symlink_to("sub")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    done = threading.Event()

    def work() -> None:
        faults.update(listed(store))
        done.set()

    faults: dict[str, str] = {}
    threading.Thread(target=work, daemon=True).start()
    assert done.wait(20), "listing hangs"
    assert faults == {
        ".tmp-holiday.jpg": "",
        "again/up": "unreadable a link back to a folder that holds it",
        "again/x.jpg": "",
        "dangling.jpg": "unreadable no such file",
        "itself.jpg": "unreadable a symbolic link that points to itself",
        "null.jpg": "not_a_file a pipe, a socket or a device",
        "pipe.jpg": "not_a_file a pipe, a socket or a device",
        "sub/up": "unreadable a link back to a folder that holds it",
        "sub/x.jpg": "",
    }


@pytest.mark.parametrize("name", [b"bad-\xff.jpg", b"new\nline", b"-x", "ü".encode() * 100])
def test_names_of_any_bytes_are_read_back(tmp_path: Path, name: bytes) -> None:
    text = os.fsdecode(name)
    store = FileStore(str(tmp_path))
    store.write(text, b"data")
    assert listed(store) == {text: ""}
    assert store.read(text) == b"data"


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda s: s.read("none"), "none: no such file"),
        (lambda s: s.open("folder"), "folder: a folder, not a file"),
        (lambda s: s.write("file/x", b""), "file/x: a file stands where a folder is needed"),
        (lambda s: s.append("file/x", b""), "file/x: a file stands where a folder is needed"),
        (lambda s: s.delete("folder"), "folder: "),
        (lambda s: s.write("x" * 300, b""), "name too long"),
    ],
)
def test_errors_are_one_line_for_people(tmp_path: Path, use: object, said: str) -> None:
    store = FileStore(str(tmp_path))
    store.write("folder/x", b"x")
    store.write("file", b"x")
    with pytest.raises(StoreError) as error:
        use(store)  # type: ignore[operator]
    assert said.lower() in str(error.value).lower()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "https://host/x", "hdfs://x"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(StoreError, match="use a local path or s3://bucket/prefix"):
        open_store(uri)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("/a/b.tar", ("/a", "b.tar")),
        ("b.tar", (".", "b.tar")),
        ("/b.tar", ("/", "b.tar")),
        ("s3://bucket/a/b.tar", ("s3://bucket/a", "b.tar")),
    ],
)
def test_a_file_s_uri_is_its_root_and_name(uri: str, parts: tuple[str, str]) -> None:
    assert split_uri(uri) == parts


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB; only root can make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("can't mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_and_leaves_no_half_file(small_disk: Path) -> None:
    store = FileStore(str(small_disk))
    store.append("log", b"line\n")
    with pytest.raises(StoreError, match=f"big: {DISK_FULL}"):
        store.write("big", bytes(2 << 20))
    (small_disk / "ballast").write_bytes(bytes((1 << 20) - (24 << 10)))
    with pytest.raises(StoreError, match=DISK_FULL):
        store.append("log", b"x" * (1 << 20))
    assert listed(store) == {"ballast": "", "log": ""}
    assert store.read("log") == b"line\n"
    (small_disk / "ballast").unlink()
    store.write("big", bytes(1 << 19))
    assert store.stat("big").size == 1 << 19


def test_a_quota_reads_as_a_full_disk(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    with pytest.raises(StoreError, match=DISK_FULL), store.publish("x"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
