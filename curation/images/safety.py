"""How unsafe an image is: a classifier by timm's name, as TorchScript or as ONNX, over the whole
image squashed to a square, so that nothing is cropped away."""

import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from curation.images.encoders import InputFormat, Pixels, load_exactly, state_dict
from curation.images.errors import EncoderError

Scores = npt.NDArray[np.float32]
NUDENET = "nudenet"  # AGPL-3.0: comes with the extra `nsfw`
NUDENET_UNSAFE = (2, 3, 4, 6, 14)  # exposed buttocks, breasts, genitalia (f, m), anus
Net = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class FilterConfig:
    """A classifier, which of its classes are unsafe, and from which score on an image is.

    `model` names a timm architecture for `weights`; without it they are TorchScript or ONNX.
    """

    weights: str
    model: str | None
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    activation: str
    unsafe: tuple[int, ...]
    threshold: float
    mode: str
    version: str


def packaged(cfg: FilterConfig) -> FilterConfig:
    """The config with `nudenet` replaced by the file and input of that package."""
    if cfg.weights != NUDENET:
        return cfg
    spec = importlib.util.find_spec("nudenet")  # its code is not run, only its model is read
    if spec is None or spec.origin is None:
        raise EncoderError(
            "safety.filter.weights: nudenet is not installed: pip install -e '.[nsfw]'"
        )
    file = str(Path(spec.origin).with_name("320n.onnx"))
    scale: dict[str, Any] = {"size": 320, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return replace(cfg, weights=file, activation="none", unsafe=NUDENET_UNSAFE, **scale)


class SafetyFilter:
    """`prepare` makes the uint8 input of an image; a batch of those gets a score each, NaN if the
    model gave no finite number."""

    def __init__(self, cfg: FilterConfig, weights: bytes) -> None:
        self.cfg = cfg
        self._form = InputFormat(cfg.size, None, cfg.mean, cfg.std)
        self._mean = np.array(cfg.mean, np.float32).reshape(1, 3, 1, 1) * 255
        self._std = np.array(cfg.std, np.float32).reshape(1, 3, 1, 1) * 255
        self._net = _load(cfg, weights)
        classes = self._outputs(np.zeros((1, 3, cfg.size, cfg.size), np.uint8)).shape[1]
        if max(cfg.unsafe) >= classes:
            raise EncoderError(
                f"safety.filter.unsafe: the model has classes 0 to {classes - 1}, not"
                f" {max(cfg.unsafe)}"
            )

    def prepare(self, image: Image.Image) -> Pixels:
        return self._form.prepare(image)

    def __call__(self, batch: Pixels) -> Scores:
        """(B, 3, S, S) uint8 -> (B,): of softmax the sum over the unsafe classes, else the most."""
        outputs = torch.from_numpy(self._outputs(batch))
        unsafe = list(self.cfg.unsafe)
        if self.cfg.activation == "softmax":
            scores = outputs.softmax(dim=1)[:, unsafe].sum(dim=1)
        elif self.cfg.activation == "sigmoid":
            scores = outputs.sigmoid()[:, unsafe].amax(dim=1)
        else:
            scores = outputs[:, unsafe].amax(dim=1)
        found: Scores = scores.numpy()
        return found

    def _outputs(self, batch: Pixels) -> npt.NDArray[np.float32]:
        """(B, classes). Of a detector's (B, 4 + classes, boxes) the surest box of each class."""
        outputs = self._net((batch - self._mean) / self._std)
        if outputs.ndim == 3:
            outputs = outputs[:, 4:].max(axis=2)
        if outputs.ndim != 2 or len(outputs) != len(batch):
            raise EncoderError(
                f"safety.filter: the model gives {outputs.shape} for {len(batch)} images; it must"
                " be (images, classes), or (images, 4 + classes, boxes) of a detector"
            )
        return outputs.astype(np.float32)


def _load(cfg: FilterConfig, weights: bytes) -> Net:
    if cfg.model is not None:
        return _torch(_timm(cfg.model, weights))
    if cfg.weights.endswith(".onnx"):
        return onnx(weights, "safety.filter.weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net = torch.jit.load(io.BytesIO(weights), "cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise EncoderError(
            "safety.filter.weights: not a TorchScript file; name ONNX files *.onnx, and give"
            f" `model` for timm weights ({str(error).splitlines()[0][:100]})"
        ) from None
    return _torch(net)


def _timm(model: str, weights: bytes) -> torch.nn.Module:
    import timm

    state = state_dict(weights, "safety.filter.weights")
    if not timm.is_model(model):
        raise EncoderError(f"safety.filter.model: timm has no model '{model}'")
    classifier = timm.get_pretrained_cfg_value(model, "classifier") or "head"
    bias = state.get(f"{classifier}.bias")
    if bias is None:
        raise EncoderError(
            f"safety.filter.weights: they have no {classifier}.bias: not a classifier's weights"
        )
    net: torch.nn.Module = timm.create_model(model, num_classes=len(bias))
    load_exactly(net, state, model, "safety.filter.weights")
    return net


def _torch(net: torch.nn.Module) -> Net:
    net = net.float().eval()

    def run(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            outputs: npt.NDArray[np.float32] = net(torch.from_numpy(batch)).numpy()
        return outputs

    return run


def onnx(weights: bytes, field: str) -> Net:
    """The first output of an ONNX model, image by image where its batch is fixed."""
    session = onnx_session(weights, field)
    given = session.get_inputs()[0]
    one_by_one = given.shape[0] == 1

    def run(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        blocks = np.split(batch, len(batch)) if one_by_one else [batch]
        return np.concatenate([session.run(None, {given.name: block})[0] for block in blocks])

    return run


def onnx_session(weights: bytes, field: str) -> Any:
    """An ONNX model on one CPU thread. Raises EncoderError."""
    try:
        import onnxruntime
    except ImportError:
        raise EncoderError(f"{field}: ONNX needs onnxruntime: pip install -e '.[safety]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as all maths of a worker
    try:
        return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a type for each kind of damage
        text = " ".join(str(error).split())[:100]
        raise EncoderError(f"{field}: not an ONNX model that can be loaded ({text})") from None
