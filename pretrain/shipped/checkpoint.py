"""Training state on disk: written whole or not at all, taken up by the same configuration only."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def fingerprint(config: Mapping[str, object]) -> str:
    """16 hex digits of a configuration: another value anywhere is another training."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checkpoint_path(out: Path) -> Path:
    """Where the training that writes `out` keeps its state."""
    return out.with_name(out.name + ".checkpoint")


def save_checkpoint(path: Path, key: str, step: int, state: Mapping[str, Any]) -> None:
    """Publish the state after `step` finished steps by a rename: a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    torch.save({"key": key, "step": step, "state": dict(state)}, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, key: str) -> tuple[int, dict[str, Any]] | None:
    """(finished steps, state), or None when there is none of this very configuration."""
    if not path.exists():
        return None
    saved = torch.load(path, weights_only=True)
    if saved["key"] != key:
        return None
    return int(saved["step"]), saved["state"]
