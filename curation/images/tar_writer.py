"""Tars written as `tarfile` writes them in GNU format, with a tenth of its work for a member."""

import hashlib
import os
import tarfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

BLOCK_BYTES, BLOCKS = 1 << 20, 4  # hashed and written at a time, and how many are under way
LARGE = 1 << 16  # pieces that are not copied into one with their neighbours
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
        self._pieces: list[bytes] = []  # of the next block
        self._small: list[bytes] = []  # that will be one piece
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
        for chunk in chunks:
            if len(chunk) >= LARGE:
                self._join_small()
                self._pieces.append(chunk)
            else:
                self._small.append(chunk)
        added = sum(map(len, chunks))
        self.size += added
        self._held += added
        if self._held >= BLOCK_BYTES:
            self._hand_over()

    def _join_small(self) -> None:
        self._pieces.append(b"".join(self._small))  # in memory of an earlier one: malloc gives it
        self._small = []

    def _hand_over(self) -> None:
        if len(self._under_way) == BLOCKS:
            self._wait()
        self._join_small()
        block, self._pieces, self._held = self._pieces, [], 0
        hashing = self._hasher.submit(self._hash, block)
        self._under_way.append((hashing, self._writer.submit(self._write, block)))

    def _wait(self) -> None:
        """For the oldest block."""
        for task in self._under_way.popleft():
            task.result()

    def _hash(self, block: list[bytes]) -> None:
        for piece in block:
            self._digest.update(piece)

    def _write(self, block: list[bytes]) -> None:
        file, size = self._file.fileno(), sum(map(len, block))
        rest = [memoryview(piece) for piece in block]
        while rest:
            written = os.writev(file, rest)
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            rest[:1] = [piece[written:] for piece in rest[:1]]
        # Begins to write to the disk, without waiting, what is else left to the sync at the end.
        os.posix_fadvise(file, self._written, size, os.POSIX_FADV_DONTNEED)
        self._written += size
