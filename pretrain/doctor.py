"""`pretrain doctor`: what this machine and this torch can do, and how fast."""

import os
import platform
import time
from importlib.metadata import version

import torch

from pretrain import precision
from pretrain.errors import UserError
from pretrain.vit import ViT, ViTConfig

MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
IMAGES = {"cpu": 4, "cuda": 64}
REPEATS = 5


def doctor() -> None:
    """Prints what it finds. Errors: UserError where training can't work."""
    _say("python", platform.python_version())
    _say("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for package in ("timm", "safetensors", "pyarrow", "numpy"):
        _say(package, version(package))
    _say("processor", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    faults = [] if torch.cuda.is_available() else [_no_gpu()]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        faults.append(_gpu(number))
    if any(faults[:-1]) or (faults and faults[-1] and torch.cuda.is_available()):
        raise UserError("; ".join(fault for fault in faults if fault))
    device = precision.this_device(0)
    chosen = precision.choose("auto", device)
    _say("precision", f"{chosen.name} (parallel.precision: auto)")
    dtype = chosen.dtype or torch.float32
    _say("matmul", f"{_matmul(device, dtype) / 1e12:.2f} TFLOP/s in {chosen.name}")
    _say("ViT-S/14 at 224", f"{_forward(chosen):.0f} images/s forward in {chosen.name}")


def _say(what: str, found: str) -> None:
    print(f"{what:18}{found}", flush=True)


def _no_gpu() -> str:
    _say("GPU", "none that torch sees: training runs on the CPU")
    return ""


def _gpu(number: int) -> str:
    """Says what GPU `number` is; returns what is wrong with it."""
    properties = torch.cuda.get_device_properties(number)
    capability = torch.cuda.get_device_capability(number)
    memory = properties.total_memory / 2**30
    _say(f"GPU {number}", f"{properties.name}, sm_{capability[0]}{capability[1]}, {memory:.0f} GiB")
    try:
        precision.check_kernels(capability, torch.cuda.get_arch_list())
    except UserError as error:
        return str(error)
    flash = "flash" if capability >= precision.BF16_SINCE else "memory-efficient"
    _say("  attention", f"{flash} kernel of torch")
    if torch.distributed.is_nccl_available():
        found = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        _say("  NCCL", ".".join(map(str, found)))
    return ""


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square product."""
    side = MATMUL_SIDE[device.type]
    left = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _seconds(device, lambda: left @ left)


@torch.inference_mode()
def _forward(chosen: precision.Precision) -> float:
    """Images a second of a ViT-S/14."""
    model = ViT(ViTConfig()).to(chosen.device).eval()
    count = IMAGES[chosen.device.type]
    images = torch.randn(count, 3, 224, 224, device=chosen.device)
    with chosen.autocast():
        return count / _seconds(chosen.device, lambda: model([images]))


def _seconds(device: torch.device, work: object) -> float:
    """The best of some repetitions, after one to warm up."""
    assert callable(work)
    best = float("inf")
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began) if _ else best
    return best
