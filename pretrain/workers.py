"""Mistakes of the user that a data worker meets, told in one line by the main process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from pretrain.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What a worker yields in place of a batch; DataLoader would add its traceback to an error."""

    text: str


def receive(batches: Iterator[T | Failure], workers: int) -> T:
    """The next batch of a DataLoader. Errors: UserError, also when a worker was killed."""
    try:
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        text = " ".join(str(error).split())
        raise UserError(
            f"a data worker died ({text}); give the machine more memory or /dev/shm "
            f"(docker: --shm-size), or use fewer workers than {workers}"
        ) from None
    if isinstance(batch, Failure):
        raise UserError(batch.text)
    return batch
