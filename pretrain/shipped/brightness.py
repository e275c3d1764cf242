"""The second part of the copy descriptor: a smooth hash of an image's brightness.

The lowest frequencies of brightness hardly change in greyscale, blurred, resized or re-encoded
copies, where the learned part is weak. Cosines of frequencies themselves are high between many
photographs. Random cosines of them (Rahimi and Recht 2007) have the cosine of a Gaussian kernel
instead: near 1 for such copies and near 0 for everything else, crops among it.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize, pad

from pretrain.shipped.images import IMAGENET_STD

PATTERNS = 256
SHARE = 0.35  # of a cosine: enough to lift grey and blurred copies above unlike images
SHARPNESS = 12.0  # two patterns at a cosine c have the kernel exp(-SHARPNESS (1 - c))
LOW = 8  # frequencies a side
FLAT = 4.0  # levels of 256: where a pattern has this deviation, half of it may be noise
LUMA = (0.299, 0.587, 0.114)


class BrightnessPattern(nn.Module):
    """Normalised pixels -> unit rows that mirroring an image leaves as they are."""

    frequencies: torch.Tensor
    phases: torch.Tensor
    levels: torch.Tensor
    basis: torch.Tensor
    order: torch.Tensor
    odd: torch.Tensor

    def __init__(self, side: int, seed: int) -> None:
        """Frequencies and phases depend on the seed alone, and are what fp16 holds of them."""
        super().__init__()
        rng = np.random.default_rng([seed, 3])
        frequencies = rng.standard_normal((PATTERNS, LOW * LOW - 1)) * SHARPNESS**0.5
        phases = rng.uniform(0, 2 * np.pi, PATTERNS)
        number = torch.arange(LOW, dtype=torch.float64)
        waves = torch.cos(math.pi / side * number[:, None] * (torch.arange(side) + 0.5))
        waves *= torch.where(number == 0, 1.0, 2**0.5)[:, None] / side
        order = torch.hypot(number[:, None], number[None, :])
        levels = 255 * torch.tensor(LUMA) * torch.tensor(IMAGENET_STD)
        self.register_buffer("frequencies", torch.from_numpy(frequencies).half().float())
        self.register_buffer("phases", torch.from_numpy(phases).half().float())
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", waves.float(), persistent=False)  # (LOW, side)
        self.register_buffer("order", order.flatten()[1:].float(), persistent=False)
        self.register_buffer("odd", (number % 2).repeat(LOW)[1:].float(), persistent=False)

    def forward(self, pixels: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        """(B, 3, side, side) and the learned part's unit rows (B, D) -> (B, PATTERNS)."""
        brightness = torch.einsum("bchw,c->bhw", pixels, self.levels)
        low = (self.basis @ brightness @ self.basis.T).flatten(1)[:, 1:]
        low = low * self.order  # natural images have less of high frequencies: all count alike
        squares = low.square().sum(dim=1, keepdim=True)
        # Beyond a deviation or two one coefficient says no more: a caption is no other photo.
        form = torch.tanh(low * (low.shape[1] / squares.clamp(min=1e-12)).sqrt())
        # Images of one colour have no form: there the learned part stands in for it.
        trust = squares / (squares + FLAT**2)
        form = trust * normalize(form, dim=1)
        stand_in = pad(learned, (0, form.shape[1]))[:, : form.shape[1]]
        form = normalize(form + (1 - trust) * normalize(stand_in, dim=1), dim=1)
        # A mirror image has other signs in all odd terms, which their own cosine does not see.
        odd = form * self.odd
        even_waves = torch.cos((form - odd) @ self.frequencies.T + self.phases)
        return normalize(even_waves * torch.cos(odd @ self.frequencies.T), dim=1)
