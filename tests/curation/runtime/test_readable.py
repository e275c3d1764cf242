"""Figures as people read them."""

import pytest

from curation.runtime.readable import readable_bytes, readable_seconds


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (41_123_840, "41.1 MB")]
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.03, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (560.45, "9 min 20 s"),
        (11_520, "3 h 12 min"),
    ],
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text
