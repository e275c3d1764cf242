"""Scores of prototypes, (tokens, K), which are held whole only where they are few.

With 131,072 prototypes they would be the largest tensor of a step, of a distillation that compares
all patches many times over. Features and prototypes are kept in their place, and whoever wants
scores makes those of some rows: more products, and memory that no batch makes larger.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pretrain.products import product

BLOCK = 4096  # prototypes that are worked on at a time
CHUNK_BYTES = 24 << 20  # of fp32 scores: small beside a step's activations, large beside a cache
KEPT_BYTES = 256 << 20  # of fp32 scores that are few: to make them again would take longer
GPU_CHUNK_BYTES = 1 << 30  # each chunk costs a GPU a pass over the prototypes' gradient
GPU_KEPT_SHARE = 0.1  # of a GPU's memory, for few scores

# Prototypes as (K, d) in the dtype of the products, and a factor (K, 1) of them if they lack it.
Factored = tuple[torch.Tensor, torch.Tensor | None]


def chunks(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of as few parts as have at most so many rows; all of like sizes."""
    count = -(-rows // most)
    for part in range(count):
        yield rows * part // count, rows * (part + 1) // count


def on_cpu(tensor: torch.Tensor) -> bool:
    """Else its device likes few long operations."""
    return tensor.device.type == "cpu"


def chunk_rows(prototypes: torch.Tensor, chunk_bytes: int | None = None) -> int:
    """How many rows of fp32 scores of prototypes (K, d) are a chunk; None: as the device likes."""
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES if on_cpu(prototypes) else GPU_CHUNK_BYTES
    return max(1, chunk_bytes // (4 * len(prototypes)))


def kept_bytes(device: torch.device) -> int:
    """How many bytes of scores are few."""
    if device.type != "cuda":
        return KEPT_BYTES
    return int(GPU_KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory)


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The autocast dtype where there is one, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def blocks(prototypes: torch.Tensor) -> Iterator[slice]:
    """Of prototypes (K, d): on a processor so few that products of them need no new memory."""
    most = BLOCK if on_cpu(prototypes) else len(prototypes)
    for start in range(0, len(prototypes), most):
        yield slice(start, start + most)


def logits_into(out: torch.Tensor, features: torch.Tensor, prototypes: Factored) -> None:
    """out (n, K) fp32 = features (n, d) @ prototypes.T."""
    weight, factor = prototypes
    for block in blocks(weight):
        out[:, block] = product(features, weight[block].T)
        if factor is not None:
            out[:, block] *= factor[block].T


def logits_of(features: torch.Tensor, prototypes: Factored) -> torch.Tensor:
    """(n, K) features (n, d) @ prototypes.T, in the dtype of the products."""
    weight, factor = prototypes
    logits = product(features, weight.T)
    return logits if factor is None else logits * factor.T


def softmax_(logits: torch.Tensor) -> torch.Tensor:
    """Makes the softmax of each row of logits (M, K) in their place; returns log sum exp (M,)."""
    top = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
    logits.div_(total)
    return (top + total.log()).squeeze(1)


def softmax_into(out: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """out (M, K) fp32 = softmax of each row of logits; returns log sum exp (M,) in fp32.

    A GPU reads and writes a third of what it does for `softmax_`, logits in 16 bits as they are.
    """
    torch.softmax(logits, dim=1, dtype=torch.float32, out=out)
    top, where = logits.max(dim=1, keepdim=True)
    return (top - out.gather(1, where).log()).squeeze(1)


@dataclass(frozen=True)
class Scores:
    """What M tokens have in common with K prototypes: features @ prototypes.T, row by row."""

    features: torch.Tensor  # (M, d) fp32
    prototypes: torch.Tensor  # (K, d), in the dtype of the products
    factor: torch.Tensor | None = None  # (K, 1) of the prototypes; None: they have it

    def __len__(self) -> int:
        return len(self.features)

    @property
    def few(self) -> bool:
        """Whether all may be held at once."""
        most = kept_bytes(self.features.device)
        return 4 * len(self.features) * len(self.prototypes) <= most

    def size_only(self) -> "Scores":
        """Without what they are made of."""
        count, prototypes = len(self.features), len(self.prototypes)
        return Scores(self.features.new_empty(count, 0), self.prototypes.new_empty(prototypes, 0))

    def split(self, sizes: list[int]) -> list["Scores"]:
        parts: tuple[torch.Tensor, ...] = torch.split(self.features, sizes)
        return [Scores(part, self.prototypes, self.factor) for part in parts]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of all rows."""
        return chunks(len(self), chunk_rows(self.prototypes))

    def rows(
        self, start: int, stop: int, temperature: float = 1.0, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(stop - start, K) fp32 scores / temperature; in the first rows of `out`, if given."""
        if out is None:
            out = self.features.new_empty(stop - start, len(self.prototypes), dtype=torch.float32)
        place = out[: stop - start]
        scaled = (self.features[start:stop] / temperature).to(self.prototypes.dtype)
        with torch.autocast(scaled.device.type, enabled=False):
            logits_into(place, scaled, (self.prototypes, self.factor))
        return place

    def softmax(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, K) fp32 softmax of each row of scores / temperature, and log sum exp (M,)."""
        if on_cpu(self.features):
            scores = self.rows(0, len(self), temperature)
            return scores, softmax_(scores)
        scaled = (self.features / temperature).to(self.prototypes.dtype)
        out = self.features.new_empty(len(self), len(self.prototypes), dtype=torch.float32)
        lse = self.features.new_empty(len(self), dtype=torch.float32)
        for start, stop in self.chunks():
            logits = logits_of(scaled[start:stop], (self.prototypes, self.factor))
            lse[start:stop] = softmax_into(out[start:stop], logits)
        return out, lse

    def parts(self, temperature: float) -> Iterator[torch.Tensor]:
        """(n, K) fp32 of all rows in turn; each lies where the one before it lay.

        A chunk is so large that the system would clear new memory for each.
        """
        places = list(self.chunks())
        most = max((stop - start for start, stop in places), default=0)
        buffer = self.features.new_empty(most, len(self.prototypes), dtype=torch.float32)
        for start, stop in places:
            yield self.rows(start, stop, temperature, buffer)

    def sum(self) -> torch.Tensor:
        """(K,) fp32: of each prototype over all rows."""
        with torch.autocast(self.features.device.type, enabled=False):
            total = self.prototypes.float() @ self.features.sum(dim=0)
            return total if self.factor is None else total * self.factor[:, 0]
