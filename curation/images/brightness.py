"""The second part of the built-in copy descriptor: a smooth hash of an image's brightness.

The lowest frequencies of brightness hardly change in greyscale, blurred, resized or re-encoded
copies, where the learned part is weak. Cosines of frequencies themselves are high between many
photographs. Random cosines of them (Rahimi and Recht 2007) have the cosine of a Gaussian kernel
instead: near 1 for such copies and near 0 for everything else, crops among it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

LOW = 8  # frequencies a side
FLAT = 4.0  # levels of 256: where a pattern has this deviation, half of it may be noise
LUMA = (0.299, 0.587, 0.114)


class BrightnessPattern(nn.Module):
    """Pixels normalised by `std` -> unit rows that mirroring an image leaves as they are.

    `frequencies` (patterns, LOW * LOW - 1) and `phases` (patterns,) are random numbers, which the
    file of weights holds: pretrain/shipped/brightness.py drew them.
    """

    frequencies: Tensor
    phases: Tensor
    levels: Tensor
    basis: Tensor
    order: Tensor
    odd: Tensor

    def __init__(self, side: int, patterns: int, std: tuple[float, float, float]) -> None:
        super().__init__()
        number = torch.arange(LOW, dtype=torch.float64)
        waves = torch.cos(math.pi / side * number[:, None] * (torch.arange(side) + 0.5))
        waves *= torch.where(number == 0, 1.0, 2**0.5)[:, None] / side
        order = torch.hypot(number[:, None], number[None, :])
        levels = 255 * torch.tensor(LUMA) * torch.tensor(std)
        self.register_buffer("frequencies", torch.zeros(patterns, LOW * LOW - 1))
        self.register_buffer("phases", torch.zeros(patterns))
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", waves.float(), persistent=False)  # (LOW, side)
        self.register_buffer("order", order.flatten()[1:].float(), persistent=False)
        self.register_buffer("odd", (number % 2).repeat(LOW)[1:].float(), persistent=False)

    def forward(self, pixels: Tensor, learned: Tensor) -> Tensor:
        """(B, 3, side, side) and the learned part's unit rows (B, D) -> (B, patterns)."""
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
