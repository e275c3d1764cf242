"""Pictures of what was not selected: hostile bytes are refused, and faces are no more shown here
than in shards."""

import io
import time
from collections.abc import Callable

import numpy as np
import pytest
import yaml
from PIL import Image
from workbench import Project

from curation.service.runs import NotThere
from curation.serving import show


def test_bytes_that_keep_a_decoder_busy_are_not_shown(project: Callable[..., Project]) -> None:
    out = io.BytesIO()
    Image.new("RGB", (4000, 4000), "red").save(out, "JPEG", progressive=True)
    data = out.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    recipe = yaml.safe_dump(project().recipe)
    began = time.monotonic()
    with pytest.raises(NotThere, match="too_many_pieces"):
        show(recipe, data[:-2] + scan * 20_000 + data[-2:])
    assert time.monotonic() - began < 5
    assert show(recipe, data).size == (4000, 4000)


def test_faces_are_blurred_where_the_recipe_asks_it(project: Callable[..., Project]) -> None:
    skimage = pytest.importorskip("skimage")
    astronaut = Image.fromarray(skimage.data.astronaut())
    out = io.BytesIO()
    astronaut.save(out, "PNG")
    plain = project().recipe
    blurring = plain | {"safety": {"faces": {"detector": "haar"}}}
    assert show(yaml.safe_dump(plain), out.getvalue()) == astronaut
    changed = np.asarray(show(yaml.safe_dump(blurring), out.getvalue())) != np.asarray(astronaut)
    rows, columns = np.nonzero(changed.any(axis=2))
    assert 40 < rows.min() < rows.max() < 240
    assert 150 < columns.min() < columns.max() < 320
