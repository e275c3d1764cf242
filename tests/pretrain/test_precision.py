"""Which arithmetic is chosen, GPUs that this torch has no kernels for, and memory that is kept."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from pretrain import precision
from pretrain.errors import UserError

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [
        ((7, 0), CUDA_126),  # V100
        ((8, 9), CUDA_126),  # binaries of sm_86 run on later GPUs of the same generation
        ((9, 0), ["sm_90a"]),
        ((12, 1), CUDA_13),  # as do those of sm_120
        ((13, 0), CUDA_13),  # PTX is compiled for what comes later
    ],
)
def test_gpus_with_kernels(capability: tuple[int, int], architectures: list[str]) -> None:
    precision.check_kernels(capability, architectures)


@pytest.mark.parametrize(
    ("capability", "architectures", "hint"),
    [
        ((7, 0), CUDA_13, "torch 2.10 or older from PyPI, or a cu126 build up to 2.14"),
        ((6, 1), CUDA_13, "install a newer torch"),
        ((8, 0), ["sm_86"], "install a newer torch"),  # not on earlier ones of the generation
        ((10, 0), CUDA_126, "install a newer torch"),  # nor, without PTX, on the next generation
    ],
)
def test_gpus_without_kernels_are_named_with_the_torch_to_install(
    capability: tuple[int, int], architectures: list[str], hint: str
) -> None:
    with pytest.raises(UserError) as raised:
        precision.check_kernels(capability, architectures)
    told = str(raised.value)
    assert f"has no kernels for the GPU here (sm_{capability[0]}{capability[1]})" in told
    assert hint in told


def test_what_a_user_asks_for_is_used() -> None:
    cpu = torch.device("cpu")
    assert precision.choose("bf16", cpu).dtype == torch.bfloat16
    assert precision.choose("fp32", cpu).dtype is None
    assert not precision.choose("fp32", cpu).scaler().is_enabled()
    assert precision.choose("fp16", cpu).scaler().is_enabled()


@pytest.mark.parametrize(("most", "kept"), [(1 << 40, 1 << 30), (32 << 20, 32 << 20)])
def test_freed_memory_is_kept_also_by_an_older_glibc(
    monkeypatch: pytest.MonkeyPatch, most: int, kept: int
) -> None:
    """It refuses a threshold of more than 32 MiB, and then keeps the one it has."""
    found: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        if name == precision.M_MMAP_THRESHOLD and value > most:
            return 0
        found[name] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    precision.keep_freed_memory()
    assert found == {precision.M_MMAP_THRESHOLD: kept, precision.M_TRIM_THRESHOLD: 2**31 - 1}
