"""Two gloo processes with `fully_shard` take the step that one process takes on both batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from test_student_teacher import SEPARATE, VIT, batch, model
from torch import distributed
from torch.distributed.fsdp import fully_shard

from pretrain.distributed import ALL_RANKS, rank, world_size
from pretrain.param_groups import adamw, param_groups, set_rates
from pretrain.student_teacher import StudentTeacher, clip_gradients

STEPS = 2


def shard(made: StudentTeacher) -> None:
    """Blocks are units, then each network.

    The teacher has no backward pass after which a network's own parameters would be sharded again.
    """
    for networks in (made.student, made.teacher):
        for block in networks["backbone"].blocks:
            fully_shard(block)
        for network in networks.values():
            fully_shard(network, reshard_after_forward=True)


def run(made: StudentTeacher, seed: int, average: bool) -> list[float]:
    """The losses of all steps. With `average`, gradients become the ranks' mean by hand."""
    optimizer = adamw(param_groups(made.student, 0.9, 0.2), (0.9, 0.999))
    totals = []
    for step in range(STEPS):
        set_rates(optimizer.param_groups, 1e-3, 1e-3, 0.04)
        losses = made(batch(seed + 10 * step), 0.04)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        for parameter in made.student.parameters() if average else ():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size()
        clip_gradients(made.student, 3.0)
        optimizer.step()
        made.update_teacher(0.9)
        totals.append(losses.total.item())
    return totals


def work(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=2)
    assert (rank(), world_size()) == (number, 2)
    whole, sharded = model(), model()
    whole.reduce = sharded.reduce = ALL_RANKS
    shard(sharded)
    expected = run(whole, number, average=True)
    assert run(sharded, number, average=False) == pytest.approx(expected, rel=1e-4)
    for networks, others in ((sharded.student, whole.student), (sharded.teacher, whole.teacher)):
        expected = dict(others.named_parameters())
        for name, parameter in networks.named_parameters():
            if not name.endswith("qkv.bias"):  # keys' have no gradient but rounding
                error = (parameter.full_tensor() - expected[name]).norm() / expected[name].norm()
                assert error < 1e-4, (name, float(error))
    np.save(f"{folder}/{number}.npy", 1)
    distributed.barrier()  # none goes while another still listens
    distributed.destroy_process_group()


def test_sharded_networks_take_the_same_steps(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_without_a_process_group_there_is_one_rank() -> None:
    value = torch.ones(3)
    assert (rank(), world_size()) == (0, 1)
    assert ALL_RANKS.sum(value) is value
    assert ALL_RANKS.max(value) is value
    assert StudentTeacher(VIT, SEPARATE, ALL_RANKS)(batch(), 0.04).total.isfinite()
