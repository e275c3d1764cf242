"""What is damaged, or another version's, is told by name, as a fault of the store's."""

import contextlib
from collections.abc import Iterator

import yaml

from curation.runtime.store import Store, StoreError

DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


@contextlib.contextmanager
def intact(store: Store, path: str = "") -> Iterator[None]:
    """Around what reads `path` (or all of a run). Raises StoreError when it isn't as LVD writes it.

    Arrow's, pydantic's and JSON's errors are all among DAMAGE.
    """
    try:
        yield
    except (*DAMAGE, yaml.YAMLError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise StoreError(
            f"{store.locate(path)}: damaged, or written by another version of LVD ({what})"
        ) from error
