"""The process group, for the rest of the package: without one, every call is that of one rank."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pretrain.errors import UserError
from pretrain.losses.centering import AllReduce

# The backbone gives its tokens by kind, as views of one matrix, and nobody writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number among the ranks; 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place where there are several."""
    if world_size() > 1:
        distributed.all_reduce(value)
    return value


def all_reduce_max(value: torch.Tensor) -> torch.Tensor:
    """The largest over ranks, in place where there are several."""
    if world_size() > 1:
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return value


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(N, D) of each rank, equally many -> (ranks * N, D), rank by rank, on all of them."""
    if world_size() == 1:
        return rows
    everyone = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    distributed.all_gather_into_tensor(everyone, rows.contiguous())
    return everyone


ALL_RANKS = AllReduce(sum=all_reduce_sum, max=all_reduce_max)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The ranks that torchrun started, by its environment; without it one alone.

    Errors: UserError for tasks that Slurm started without it: each would be a run of its own.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks that know nothing of each "
            "other; start one torchrun a node, as deploy/slurm/pretrain.sbatch does"
        )
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        # gloo beside nccl: checkpoints are written from the processor, while training goes on.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend)
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        distributed.barrier()


def own_group() -> Any:
    """A group of all ranks for what runs beside training: calls of one group keep one order."""
    return distributed.new_group(backend="gloo") if world_size() > 1 else None


Unit = tuple[nn.Module, torch.dtype | None]  # what is sharded, and in what it computes


class Spread:
    """A model spread over the ranks: replicated (ddp) or sharded (fsdp); called as the model is."""

    def __init__(
        self,
        model: nn.Module,
        mode: Literal["ddp", "fsdp"],
        units: list[Unit],
    ) -> None:
        """`units` are sharded each by itself, inner ones first."""
        self.model, self._call = model, model
        self._units = [unit for unit, _ in units] if mode == "fsdp" else []
        if world_size() == 1:
            self._units = []
        elif mode == "fsdp":
            for unit, dtype in units:
                policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
                # Always: the teacher has no backward pass after which it would be sharded again.
                fully_shard(unit, mp_policy=policy, reshard_after_forward=True)
        else:
            self._call = DistributedDataParallel(model)

    def __call__(self, *inputs: Any) -> Any:
        return self._call(*inputs)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Gradients are summed over ranks in the `last` backward pass of a step only."""
        for unit in self._units:
            if isinstance(unit, FSDPModule):
                unit.set_requires_gradient_sync(last)
        if isinstance(self._call, DistributedDataParallel) and not last:
            with self._call.no_sync():
                yield
        else:
            yield


def is_sharded(module: nn.Module) -> bool:
    """Whether its parameters are whole only while its forward or backward runs."""
    return isinstance(module, FSDPModule)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A sharded value put together; any other as it is. All ranks call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shards_of(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's shards of values that are sharded alike."""
    return [value.to_local() if isinstance(value, DTensor) else value for value in values]
