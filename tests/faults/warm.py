"""Imported by the server that children are forked from: it has run `curate` once, so that they find
done what a process does once, as imports and loading what numba compiled."""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm
from workbench import make_models, make_project

torch.set_num_threads(1)  # a fork must find no threads of OpenMP: it would wait for them
tqdm.monitor_interval = 0

with (
    tempfile.TemporaryDirectory() as name,
    contextlib.redirect_stderr(io.StringIO()) as said,
    contextlib.redirect_stdout(said),
    mock.patch.object(os, "cpu_count", return_value=1),
):
    folder = Path(name)
    work = make_project(folder, make_models(folder), range(12), search={"exact_below": 0})
    assert work.run() == 0, said.getvalue()
