"""The process group, for the rest of the package: without one, every call is that of one rank."""

import torch
from torch import distributed

from pretrain.losses.centering import AllReduce


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


ALL_RANKS = AllReduce(sum=all_reduce_sum, max=all_reduce_max)
