"""Pixels to unit-norm vectors: the semantic encoder (a timm ViT) and the copy descriptor (SSCD).

Both are `VectorModel`s: `prepare` makes the uint8 input of one image, calling it turns a batch of
those into unit-norm fp32 rows. Weights come as bytes: fetching them is the caller's work.
"""

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn.functional import normalize

from curation.images.brightness import BrightnessPattern
from curation.images.errors import EncoderError
from curation.images.gpu_blocks import multiply_patches, recorded, suit_gpu

DEMO_MODEL = "lvd_demo"
BUILTIN_FILES = {"semantic": "demo_encoder.safetensors", "copy": "copy_descriptor.safetensors"}
# Thresholds of SSCD's TorchScript models: DINOv2, app. A.3.
SSCD_THRESHOLDS = {"min_cosine": 0.6, "holdout_min_cosine": 0.45}
SSCD_SIDE = 320  # SSCD's own choice for batches: the image squashed to 320 x 320
SHORT_SIDE_RATIO = 256 / 224  # resize to 256, centre crop of 224: DINOv2's evaluation transform
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

COMPILED_ON = ("cuda",)  # processors gain 3 % at most, and what suits them can't be compiled

# x (…, I), weight (O, I), bias (O,), "none", [], "" -> (…, O); None where torch has no oneDNN.
ONEDNN_LINEAR: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

Pixels = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class InputFormat:
    """How an image becomes the (3, size, size) input. `short_side` None squashes it to a square."""

    size: int
    short_side: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def prepare(self, image: Image.Image) -> Pixels:
        """An RGB image as (3, size, size) uint8: bicubic, then a centre crop."""
        size, (left, top) = self.place(image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        if size != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def place(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height that an image is resized to, and the crop's left and top in that.

        Rounds as torchvision's Resize and CenterCrop do: one pixel changes which images are near.
        """
        if self.short_side is None:
            return (self.size, self.size), (0, 0)
        short = min(size)
        width, height = (self.short_side * side // short for side in size)
        return (width, height), (round((width - self.size) / 2), round((height - self.size) / 2))


class VectorModel:
    """A network with its input format. `dim` is the length of its vectors.

    `full`: on a GPU the network is compiled, for batches of so many images at most.
    """

    def __init__(
        self, name: str, net: nn.Module, form: InputFormat, precision: str, full: int | None = None
    ) -> None:
        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = DTYPES[precision]
        self.net = net.to(self.device, self.dtype).eval()
        if self.device.type == "cpu":
            suit_cpu(self.net, self.dtype)
        self.form, self._layout = form, torch.contiguous_format
        if self.device.type == "cuda" and precision != "fp32":
            self._layout = multiply_patches(self.net)
        self._mean = torch.tensor(form.mean, device=self.device).mul(255).view(1, 3, 1, 1)
        self._std = torch.tensor(form.std, device=self.device).mul(255).view(1, 3, 1, 1)
        self._full, self._arriving = 0, None
        if self.device.type == "cuda":  # copies run beside what the GPU still computes
            self._arriving = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.dim = self(np.zeros((1, 3, form.size, form.size), np.uint8)).shape[1]
        if full and self.device.type in COMPILED_ON:
            self._full = full
            if precision != "fp32":
                suit_gpu(self.net)
            rows = torch.compile(self.rows, dynamic=False)
            given = torch.zeros((full, 3, form.size, form.size), dtype=torch.uint8)
            self.rows = recorded(rows, given.to(self.device))  # type: ignore[assignment, method-assign]

    def prepare(self, image: Image.Image) -> Pixels:
        return self.form.prepare(image)

    def __call__(self, batch: Pixels | Tensor) -> Vectors:
        """(B, 3, S, S) uint8 -> (B, D) fp32 unit rows; a row that isn't finite comes as NaN."""
        return self.start(batch)()

    @torch.inference_mode()
    def start(self, batch: Pixels | Tensor) -> Callable[[], Vectors]:
        """Begins what a call does; what is returned waits for the rows. A GPU goes on meanwhile.

        A tensor is on the model's device already.
        """
        pixels, count = torch.as_tensor(batch), len(batch)
        if count < self._full:  # else the network would be compiled for this number as well
            pixels = torch.cat([pixels, pixels.new_zeros(self._full - count, *pixels.shape[1:])])
        rows = self.rows(self._arrived(pixels))[:count]
        if self._arriving is None:
            return rows.numpy
        here = torch.empty(rows.shape, pin_memory=True).copy_(rows, non_blocking=True)
        copied = torch.cuda.current_stream().record_event()

        def wait() -> Vectors:
            copied.synchronize()
            found: Vectors = here.numpy()
            return found

        return wait

    def rows(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 on the device -> (B, D) fp32 unit rows there."""
        scaled = (pixels - self._mean) / self._std
        features: Tensor = self.net(scaled.to(self.dtype, memory_format=self._layout))
        return normalize(features.float(), dim=1, eps=1e-12)

    def _arrived(self, pixels: Tensor) -> Tensor:
        """On the device, when what is computed next begins."""
        if self._arriving is None or pixels.is_cuda:
            return pixels
        computing = torch.cuda.current_stream()
        with torch.cuda.stream(self._arriving):
            there = pixels.pin_memory().to(self.device, non_blocking=True)
        computing.wait_stream(self._arriving)
        there.record_stream(computing)
        return there


class OneDnnLinear(nn.Linear):
    """Products by oneDNN: torch itself gives those in fp32 to MKL, which leaves AVX-512 unused on
    other makers' processors, and those of large batches in bf16 to slower ones of oneDNN.

    Weights stay as they are, since some of timm's models use them without calling the layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert ONEDNN_LINEAR is not None
        return ONEDNN_LINEAR(x, self.weight, self.bias, "none", [], "")


def suit_cpu(net: nn.Module, dtype: torch.dtype) -> None:
    """Chooses, in place, what computes the same faster on a processor."""
    can = dtype == torch.float32 or (dtype == torch.bfloat16 and _bf16_by_onednn())
    for module in net.modules():
        if type(module) is nn.Linear and can and ONEDNN_LINEAR:
            module.__class__ = OneDnnLinear
        if dtype == torch.bfloat16 and hasattr(module, "fused_attn"):
            # timm's: torch's own kernel takes twice as long in bf16
            module.fused_attn = False  # type: ignore[assignment]


def _bf16_by_onednn() -> bool:
    return ONEDNN_LINEAR is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def load_semantic(
    model: str, weights: bytes | None, precision: str, full: int | None = None
) -> VectorModel:
    """A timm model by name; `weights` None means the hub's. `full`: see `VectorModel`.

    Raises EncoderError.
    """
    if model == DEMO_MODEL:
        return _builtin("semantic", precision, full)
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(model):
        near = ", ".join(timm.list_models(f"*{model.split('.')[0][:12]}*")[:5])
        raise EncoderError(
            f"encoder.model: timm has no model '{model}'" + (f"; similar: {near}" if near else "")
        )
    try:
        net = timm.create_model(model, pretrained=weights is None, num_classes=0)
    except Exception as error:  # the hub client raises many types when it can't reach the hub
        raise EncoderError(
            f"encoder.weights: hub: '{model}' can't be downloaded ({type(error).__name__}); give a"
            f" local file or s3:// uri of its weights, or use model: {DEMO_MODEL} to try things out"
        ) from None
    if weights is not None:
        load_exactly(net, state_dict(weights, "encoder.weights"), model, "encoder.weights")
    config: dict[str, Any] = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    size = int(config["input_size"][1])
    short_side = round(size * SHORT_SIDE_RATIO)
    form = InputFormat(size, short_side, tuple(config["mean"]), tuple(config["std"]))
    return VectorModel(model, net, form, precision, full)


def load_copy_descriptor(weights: bytes | None) -> VectorModel:
    """From an SSCD TorchScript file's bytes, or None: the built-in one. Raises EncoderError."""
    if weights is None:
        return _builtin("copy", "fp32")
    try:
        with warnings.catch_warnings():  # SSCD's files are TorchScript, which torch now discourages
            warnings.simplefilter("ignore", FutureWarning)
            net = torch.jit.load(io.BytesIO(weights), "cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise EncoderError(
            "copy_descriptor.weights: not a TorchScript file; SSCD's are named *.torchscript.pt"
            f" ({str(error).splitlines()[0][:100]})"
        ) from None
    form = InputFormat(SSCD_SIDE, None, IMAGENET_MEAN, IMAGENET_STD)
    return VectorModel("torchscript", net, form, "fp32")


class CopyHead(nn.Module):
    """The built-in copy descriptor: a learned part and the brightness pattern.

    The learned one is a linear layer over the CLS token and GeM-pooled patches. A cosine is
    1 - `share` times that of the learned parts, and `share` times that of the patterns. A constant
    component may follow, which maps a cosine c to (c + a) / (1 + a), so that thresholds lie on
    SSCD's scale.
    """

    def __init__(
        self, backbone: nn.Module, width: int, dim: int, pattern: BrightnessPattern, card: Any
    ) -> None:
        super().__init__()
        self.backbone, self.brightness = backbone, pattern
        self.gem_p, self.share, self.a = card["gem_p"], card["brightness"], card["constant"]
        self.head = nn.Linear(2 * width, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, dim + patterns) unit rows, and one more with the constant."""
        tokens: Tensor = self.backbone.forward_features(pixels)  # type: ignore[operator]
        patches = tokens[:, 1:].clamp(min=1e-6).pow(self.gem_p).mean(dim=1).pow(1 / self.gem_p)
        learned = normalize(self.head(torch.cat([tokens[:, 0], patches], dim=1)), dim=1)
        pattern = self.brightness(pixels, learned)
        rows = torch.cat([learned * (1 - self.share) ** 0.5, pattern * self.share**0.5], dim=1)
        if not self.a:
            return rows
        constant = rows.new_full((len(rows), 1), (self.a / (1 + self.a)) ** 0.5)
        return torch.cat([rows * (1 / (1 + self.a)) ** 0.5, constant], dim=1)


def copy_thresholds(builtin: bool) -> dict[str, float]:
    """`min_cosine` and `holdout_min_cosine` that belong to the copy descriptor."""
    if not builtin:
        return SSCD_THRESHOLDS
    thresholds: dict[str, float] = describe_builtin("copy")["thresholds"]
    return thresholds


def describe_builtin(kind: str) -> dict[str, Any]:
    """The card of a built-in model (`semantic` or `copy`): architecture, input, figures."""
    data = _builtin_bytes(kind)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    card: dict[str, Any] = json.loads(header["__metadata__"]["lvd"])
    return card


def builtin_digest(kind: str) -> str:
    """Identity of a built-in model's weights: sha256 of its file."""
    return hashlib.sha256(_builtin_bytes(kind)).hexdigest()


def _builtin_bytes(kind: str) -> bytes:
    return (resources.files("curation.images") / "weights" / BUILTIN_FILES[kind]).read_bytes()


def _builtin(kind: str, precision: str, full: int | None = None) -> VectorModel:
    from timm.models.vision_transformer import VisionTransformer

    card, state = describe_builtin(kind), load_safetensors(_builtin_bytes(kind))
    net: nn.Module = VisionTransformer(**card["arch"])
    given = card["input"]
    if kind == "copy":
        patterns = len(state["brightness.phases"])
        pattern = BrightnessPattern(given["size"], patterns, tuple(given["std"]))
        width, dim = card["arch"]["embed_dim"], len(state["head.weight"])
        net = CopyHead(net, width, dim, pattern, card["head"])
    net.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    short = None if given["resize"] == "squash" else int(given["resize"].split("_")[2])
    form = InputFormat(given["size"], short, tuple(given["mean"]), tuple(given["std"]))
    return VectorModel(card["name"], net, form, precision, full)


def state_dict(data: bytes, field: str) -> dict[str, Tensor]:
    """The weights in a safetensors file or a torch state dict. Raises EncoderError for `field`."""
    try:
        state: Any = load_safetensors(data)
    except Exception:  # safetensors has its own error type for anything it can't parse
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:
            raise EncoderError(
                f"{field}: neither a safetensors file nor a torch state dict"
            ) from None
    for key in ("model", "state_dict", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return {name: value.float() for name, value in state.items()}


def load_exactly(net: nn.Module, state: dict[str, Tensor], model: str, field: str) -> None:
    """The file must hold every weight in its shape; a classifier that it also holds is ignored."""
    wanted = net.state_dict()
    missing = [name for name in wanted if name not in state]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    extra = [n for n in state if n not in wanted and not n.startswith(("head.", "head_dist."))]
    if missing or wrong or extra:
        first = [f"missing {n}" for n in missing] + wrong + [f"unknown {n}" for n in extra]
        raise EncoderError(
            f"{field}: not the weights of timm's {model} ({len(first)} differences:"
            f" {'; '.join(first[:3])})"
        )
    net.load_state_dict({name: state[name] for name in wanted})
