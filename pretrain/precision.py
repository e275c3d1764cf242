"""Which arithmetic a step uses, and whether this torch has kernels for the GPU at hand."""

import contextlib
import ctypes
from dataclasses import dataclass

import torch

from pretrain.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
BF16_SINCE = (8, 0)  # compute capability of Ampere
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """`dtype` of matrix products, None for fp32; `scaled`: fp16, whose gradients would vanish."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype | None:
        return DTYPES[self.name]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Does nothing unless the products are in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def choose(wanted: str, device: torch.device) -> Precision:
    """The precision of a run; `auto` takes what this device is fastest with."""
    if wanted != "auto":
        return Precision(wanted, device)
    if device.type == "cpu":
        faster = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return Precision("bf16" if faster else "fp32", device)
    new = torch.cuda.get_device_capability(device) >= BF16_SINCE
    return Precision("bf16" if new else "fp16", device)


def this_device(local_rank: int) -> torch.device:
    """The GPU of this rank of its node, or the CPU. Errors: UserError for a GPU without kernels."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; "
            "start fewer processes (torchrun --nproc-per-node)"
        )
    check_kernels(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
    torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: a step asks for the same memory again.

    What was given back to the system is cleared anew, page by page: a fifth of a step in bf16.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
            libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that an older glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def check_kernels(capability: tuple[int, int], architectures: list[str]) -> None:
    """Whether a torch built for `architectures` (sm_80, compute_90, …) runs on a GPU.

    Binaries run on later GPUs of the same generation; PTX (`compute_`) on all later ones. Errors:
    UserError that says which torch to install.
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return
        if kind == "compute" and built <= capability:
            return
    name = f"sm_{major}{minor}"
    hint = "a newer torch"
    if capability == (7, 0):
        hint = (
            "torch 2.10 or older from PyPI, or a cu126 build up to 2.14 from download.pytorch.org"
        )
    raise UserError(
        f"this torch {torch.__version__} has no kernels for the GPU here ({name}), only for "
        f"{', '.join(architectures)}; install {hint}"
    )
