"""pydantic's errors in the words of a YAML file: place, value, what is allowed, nearest key."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

PLAINLY = {  # pydantic's words are Python's, the user's are YAML's
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "string_type": "must be text",
    "too_short": "must not be empty",
}


def faults(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line a fault: dotted path, value, what is allowed, the nearest key."""
    found = error.errors()
    places = [fault["loc"] for fault in found]
    lines = []
    for fault in found:
        place, kind = fault["loc"], fault["type"]
        if kind == "too_short" and any(
            len(p) > len(place) and p[: len(place)] == place for p in places
        ):
            continue  # its items are at fault, and listed
        path = ".".join(str(x) for x in place if x != "[key]") or "recipe"
        message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if kind == "extra_forbidden":
            allowed = _keys_at(root, place[:-1])
            hint = near(str(place[-1]), allowed)
            message = f"no such key{hint} (allowed: {', '.join(allowed)})"
        elif kind == "missing":
            message = "is missing"
        elif kind != "conflict":
            if kind == "model_type":
                message = f"must be a mapping of {', '.join(_keys_at(root, place))}"
            message = f"{PLAINLY.get(kind, message)}, got {short(fault['input'])}"
        lines.append(f"{path}: {message}")
    return lines


def _keys_at(root: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a path of the recipe."""
    model = root
    inside_container = False
    for step in path:
        if inside_container:  # the step is a list index or a set's name
            inside_container = False
            continue
        annotation = model.model_fields[str(step)].annotation
        options = [annotation, *get_args(annotation)]
        model = next(x for x in options if isinstance(x, type) and issubclass(x, BaseModel))
        inside_container = get_origin(annotation) in (dict, tuple)
    return list(model.model_fields)


def short(value: Any) -> str:
    """A value for a message, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def near(word: str, words: Iterable[str]) -> str:
    """A hint at the word that was meant, or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean '{found[0]}'?" if found else ""
