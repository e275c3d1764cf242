"""Tars written as `tarfile` writes them in GNU format, with a tenth of its work for a member."""

import hashlib
import os
import tarfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

BLOCK_BYTES, BLOCKS = 1 << 20, 4  # hashed and written at a time, and how many are under way
_NAME_BYTES, _LARGEST = 100, 8**11  # of what fits in a plain header
_BLANK = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)
_MODE, _TIME, _REST = _BLANK[100:124], _BLANK[136:148], _BLANK[156:]
_SUM = sum(_MODE) + sum(_TIME) + 8 * 32 + sum(_REST)  # its own field counts as blanks


def header(name: str, size: int) -> bytes:
    """(512,) the header of a file that belongs to nobody; more blocks where one can't tell it."""
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > _NAME_BYTES or size >= _LARGEST:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    digits = b"%011o\0" % size
    total = b"%06o\0 " % (_SUM + sum(raw) + sum(digits))
    return b"".join((raw.ljust(_NAME_BYTES, b"\0"), _MODE, digits, _TIME, total, _REST))


class TarWriter:
    """Writes members in order. One thread hashes what was added and another writes it, and the disk
    begins with it, while the caller goes on; what fails there comes with a later call, as OSError.

    `size` and `sha256` are those of the whole tar once the block has ended well.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0  # bytes added so far
        self._path, self._digest = path, hashlib.sha256()
        self._added: list[bytes] = []
        self._held = self._written = 0  # bytes
        self._under_way: deque[tuple[Future[None], Future[None]]] = deque()

    def __enter__(self) -> "TarWriter":
        self._file = open(self._path, "wb", buffering=0)
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        return self

    def add(self, name: str, data: bytes) -> int:
        """Adds a file; returns where its bytes begin."""
        head = header(name, len(data))
        offset = self.size + len(head)
        self._append(head, data, bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file, self._hasher, self._writer:
            if kind is None:
                end = self.size + 2 * tarfile.BLOCKSIZE
                self._append(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self.size))
                self._hand_over()
                while self._under_way:
                    self._wait()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _append(self, *chunks: bytes) -> None:
        self._added += chunks
        added = sum(map(len, chunks))
        self.size += added
        self._held += added
        if self._held >= BLOCK_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        if len(self._under_way) == BLOCKS:
            self._wait()
        block = b"".join(self._added)  # in memory of an earlier one: malloc gives it again
        self._added, self._held = [], 0
        hashing = self._hasher.submit(self._digest.update, block)
        self._under_way.append((hashing, self._writer.submit(self._write, block)))

    def _wait(self) -> None:
        """For the oldest block."""
        for task in self._under_way.popleft():
            task.result()

    def _write(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            rest = rest[self._file.write(rest) :]
        # Begins to write to the disk, without waiting, what is else left to the sync at the end.
        os.posix_fadvise(self._file.fileno(), self._written, len(block), os.POSIX_FADV_DONTNEED)
        self._written += len(block)
