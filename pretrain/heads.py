"""Projection head: tokens -> scores of prototypes. Names are those of the official DINOHead."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from pretrain.distributed import is_sharded
from pretrain.products import Linear
from pretrain.ranges import Count
from pretrain.scores import Factored, Scores, blocks, product_dtype

# (features (N, d) unit norm fp32, (weight_v (K, d), weight_g (K, 1))) -> losses
Losses = tuple[torch.Tensor, torch.Tensor]
Criterion = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], Losses]


@dataclass(frozen=True)
class HeadConfig:
    """Size of one head. Defaults: DINOv2's long recipe; DINO's bottleneck there is 384."""

    prototypes: Count = 131_072
    hidden: Count = 2048
    bottleneck: Count = 256
    layers: Count = 3


class Prototypes(nn.Module):
    """Weight-normalised last layer: row k is g_k v_k / |v_k|. g starts at 1, and learns."""

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # as torch's Linear


class ProjectionHead(nn.Module):
    """MLP to a bottleneck, unit norm, then prototypes."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        sizes = [width, *[config.hidden] * (config.layers - 1), config.bottleneck]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(config.bottleneck, config.prototypes)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor, criterion: Criterion | None = None) -> Scores | Losses:
        """(N, D) -> (N, K) scores, or what `criterion` makes of the bottleneck and prototypes.

        The criterion runs in here because the prototypes are whole only inside this module's
        forward when it is sharded; scores then have a copy of them.
        """
        features = functional.normalize(self.mlp(tokens).float(), dim=-1)
        last = self.last_layer
        if criterion is not None:
            return criterion(features, (last.weight_v, last.weight_g))
        weight, factor = factored(last.weight_v, last.weight_g / lengths(last.weight_v))
        if factor is not None and is_sharded(self):
            weight = weight.clone()
        return Scores(features, weight, factor)


def lengths(weight_v: torch.Tensor) -> torch.Tensor:
    """|v| (K, 1) in fp32."""
    length: torch.Tensor
    length = torch.linalg.vector_norm(weight_v, dim=1, keepdim=True, dtype=torch.float32)
    return length


def factored(weight_v: torch.Tensor, factor: torch.Tensor) -> Factored:
    """Prototypes factor (K, 1) * v (K, d) for products: in fp32 apart, so that nothing is copied.

    Another matrix of their size would be a step's peak.
    """
    dtype = product_dtype(weight_v)
    if dtype == weight_v.dtype == torch.float32:
        return weight_v, factor
    weight = torch.empty_like(weight_v, dtype=dtype)
    for block in blocks(weight):
        weight[block] = weight_v[block] * factor[block]
    return weight, None
