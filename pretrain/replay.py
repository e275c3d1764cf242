"""`pretrain replay`: a step that was left out, once more, to see where it stops being finite."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain import checkpoint, config, export, precision, skipped
from pretrain.schedules import schedules
from pretrain.scores import Scores
from pretrain.student_teacher import StudentTeacher, clip_gradients
from pretrain.train import drawn_batch, model_of


def replay(path: Path, settings: Sequence[str] = ()) -> Iterator[str]:
    """Repeats the step of a file that `skipped.keep` wrote, on this device alone, line by line.

    The weights are the last that were saved before it. Errors: UserError.
    """
    step, run = skipped.read(path), path.absolute().parent.parent
    chosen = config.with_settings(
        export.read_config(run).model_dump(mode="json"), settings, str(run)
    )
    weights = skipped.weights_before(run, step.iteration)
    device = precision.this_device(0)
    arithmetic = precision.choose(chosen.parallel.precision, device)
    model = model_of(chosen, device)
    older = step.iteration - checkpoint.read(weights, model).iteration
    yield (
        f"iteration {step.iteration + 1}, left out since its {step.what} was not finite; "
        f"batch {step.number} of the step: {len(step.crops.keys)} images"
    )
    yield f"weights: {weights}, {f'{older} iterations before' if older else 'as they were then'}"
    yield f"precision: {arithmetic.name} on {device}"
    bad = [n for n, tensor in model.state_dict().items() if not _finite(tensor)]
    if bad:
        yield f"weights that are not finite: {len(bad)}, the first is {bad[0]}"
    forward = _first_outputs(model)
    batch = drawn_batch(chosen, step.crops, (step.iteration, step.number), device)
    temperature = float(schedules(chosen.schedule).teacher_temperature[step.iteration])
    with arithmetic.autocast():
        losses = model(batch, temperature)
    for name, value in {"loss": losses.total.detach(), **losses.values}.items():
        yield f"  {name:<28}{float(value):.6g}"
    if forward:
        yield f"first module whose output is not finite: {forward[0]}"
    if not _finite(losses.total):
        return
    backward = _first_gradients(model.student)
    (losses.total * step.loss_scale).backward()
    norms = clip_gradients(model.student, torch.inf)
    for name, norm in norms.items():
        yield f"  gradient_norm/{name:<14}{float(norm) / step.loss_scale:.6g}"
    if backward:
        yield f"first parameter whose gradient is not finite: {backward[0]}"
    elif not forward and all(map(_finite, norms.values())):
        yield "all is finite here: the cause lies in other weights, or in another rank's batch"


def _first_outputs(model: StudentTeacher) -> list[str]:
    """Filled, as the model is called, with names of modules: inner ones come before outer ones."""
    found: list[str] = []
    for name, module in model.named_modules():

        def look(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            if not all(map(_finite, _tensors(output))):
                found.append(name or "the losses")

        module.register_forward_hook(look)
    return found


def _first_gradients(student: nn.ModuleDict) -> list[str]:
    """Filled, as gradients arrive from the last layer to the first, with names of parameters."""
    found: list[str] = []
    for name, parameter in student.named_parameters():

        def look(parameter: torch.Tensor, name: str = name) -> None:
            if parameter.grad is not None and not _finite(parameter.grad):
                found.append(f"student.{name}")

        parameter.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    return found


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Scores):
        yield from (output.features, output.prototypes)
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
