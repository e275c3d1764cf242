"""Unit vectors that look like features of photographs, for measuring searches and clusterings.

    python -m benchmarks.vectors [--rows 6400]

Uniform or Gaussian vectors are either too hard for an index (no neighbours) or too easy (separate
blobs). These have a common mean, concepts of uneven size under shared roots, rows between two
concepts, directions in which the concepts of one root vary, a full-rank remainder, and for the
copy look rows that are edits of others. The number of concepts grows with the root of n. The copy
look is that of a learned descriptor, as SSCD is: the built-in one without its brightness pattern.

The looks were set by hand after features of 6,400 real photographs; the command prints statistics
of both. They are not alike in all: at 6,400 rows an index finds the real copy descriptor's
neighbours harder than the generated ones', and the real semantic features' a little easier.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks.measuring import table

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BLOCK = 65_536  # rows drawn at a time, each block by its own generator
QUERIES = 1000  # rows whose neighbours are looked at
LISTS, PROBES = 80, (1, 4, 16)


@dataclass(frozen=True)
class Look:
    """Lengths of a row's parts, before it is scaled to norm 1."""

    mean: float  # common to all rows
    centre: float  # of the row's concept
    local: float  # in the directions of the concept's root
    noise: float  # in all directions
    directions: int  # of a root
    concepts: int  # by the square root of the rows
    mixed: float  # share of the rows that lie between two concepts
    spread: float  # deviation of the log of a row's distance from its concept
    copies: float = 0.0  # share of the rows that are edits of other rows


SEMANTIC = Look(
    mean=0.20,
    centre=0.66,
    local=0.40,
    noise=0.30,
    directions=16,
    concepts=5,
    mixed=0.9,
    spread=0.6,
)
COPIES = Look(
    mean=0.39,
    centre=0.42,
    local=0.62,
    noise=0.50,
    directions=48,
    concepts=8,
    mixed=0.5,
    spread=0.15,
    copies=0.15,
)

STATISTICS = (
    "energy of 8 directions",
    "of 32",
    "of 128",
    "cosine to the nearest, median",
    "local dimension",
    *(f"IVF{LISTS} recall@4, nprobe {probe}" for probe in PROBES),
)
# Of 6,400 photographs, by `statistics`, beside the look and the dimensions to generate.
REAL = {
    "deit_tiny features": (SEMANTIC, 192, (0.231, 0.467, 0.872, 0.724, 13.5, 0.768, 0.940, 0.982)),
    "copy descriptor": (COPIES, 256, (0.263, 0.478, 0.822, 0.536, 28.9, 0.511, 0.788, 0.952)),
}


def make(rows: int, look: Look, dim: int = 384, seed: int = 0) -> Floats:
    """Unit rows (rows, dim); the same for the same arguments."""
    world = _World.of(rows, look, dim, np.random.default_rng([seed, 0]))
    out = np.empty((rows, dim), np.float32)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        out[start : start + count] = world.draw(count, np.random.default_rng([seed, 1, start]))
    return out


@dataclass(frozen=True)
class _World:
    """The concepts (k, D) that rows are drawn around, the root of each (k,), how often each is
    drawn (k,), and the directions of each root (r, d, D) with the energy of each direction (d,)."""

    look: Look
    concepts: Floats
    root: Ints
    share: npt.NDArray[np.float64]
    directions: Floats
    energy: Floats

    @classmethod
    def of(cls, rows: int, look: Look, dim: int, rng: np.random.Generator) -> "_World":
        count = max(20, int(look.concepts * np.sqrt(rows)))
        roots = max(5, count // 25)
        # Energy falls slowly over the axes, as over the directions of real features.
        axes = _scaled((np.arange(dim) + 8.0) ** -0.35)
        root = rng.integers(0, roots, count)
        of_root = _unit(rng.standard_normal((roots, dim), np.float32) * axes)
        own = _unit(rng.standard_normal((count, dim), np.float32) * axes)
        directions = rng.standard_normal((roots, look.directions, dim), np.float32) * axes
        share = (np.arange(count) + 10.0) ** -0.7  # a few common concepts, a long tail
        return cls(
            look,
            _unit(of_root[root] + own),
            root,
            share / share.sum(),
            _unit(directions),
            _scaled((np.arange(look.directions) + 2.0) ** -0.5),
        )

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        """Rows (count, D)."""
        look, dim = self.look, self.concepts.shape[1]
        concept = rng.choice(len(self.root), count, p=self.share)
        other = rng.choice(len(self.root), count, p=self.share)
        leaning = rng.uniform(0, 1, (count, 1)) * (rng.uniform(0, 1, (count, 1)) < look.mixed)
        between = leaning.astype(np.float32)
        away = np.exp(look.spread * rng.standard_normal((count, 1), np.float32))
        along = self.energy * rng.standard_normal((count, look.directions), np.float32)
        own = (1 - np.float32(0.5) * between) * self.concepts[concept]
        rows: Floats = np.float32(look.centre) * (own + between * self.concepts[other])
        rows[:, 0] += look.mean
        root = self.root[concept]
        order = np.argsort(root, kind="stable")
        starts = np.searchsorted(root[order], np.arange(len(self.directions) + 1))
        for number, (start, stop) in enumerate(pairwise(starts)):
            mine = order[start:stop]
            rows[mine] += away[mine] * look.local * (along[mine] @ self.directions[number])
        noise = rng.standard_normal((count, dim), np.float32)
        rows = _unit(rows + away * np.float32(look.noise / np.sqrt(dim)) * noise)
        if look.copies:
            _edit(rows, int(count * look.copies), rng)
        return rows


def _edit(rows: Floats, count: int, rng: np.random.Generator) -> None:
    """Makes `count` of the rows copies of others, at cosines of .99 down to .64."""
    into = rng.choice(len(rows), count, replace=False)
    source = rng.integers(0, len(rows), count)
    strength = rng.uniform(0.15, 1.2, (count, 1)).astype(np.float32)
    change = _unit(rng.standard_normal((count, rows.shape[1]), np.float32))
    rows[into] = _unit(rows[source] + strength * change)


def _unit(rows: Floats) -> Floats:
    scaled: Floats = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled


def _scaled(values: npt.NDArray[np.floating[Any]]) -> Floats:
    return (values / np.linalg.norm(values)).astype(np.float32)


def statistics(rows: Floats) -> tuple[float, ...]:
    """`STATISTICS` of unit rows (n, D)."""
    asked = np.linspace(0, len(rows) - 1, min(QUERIES, len(rows))).astype(int)
    cosine = rows[asked] @ rows.T
    cosine[np.arange(len(asked)), asked] = -1
    nearest = np.argsort(-cosine, axis=1)[:, :20]
    near = np.take_along_axis(cosine, nearest, axis=1)
    found = _index_recall(rows, asked, nearest[:, :4])
    return (*_energies(rows), float(np.median(near[:, 0])), _local_dimension(near), *found)


def _energies(rows: Floats) -> list[float]:
    """The share of the energy in the leading 8, 32 and 128 directions, mean included."""
    energy = np.linalg.eigvalsh(rows.T.astype(np.float64) @ rows)[::-1]
    return [float(energy[:count].sum() / energy.sum()) for count in (8, 32, 128)]


def _local_dimension(cosine: Floats) -> float:
    """Median over rows of the maximum-likelihood dimension (Levina and Bickel, NIPS 2004)."""
    distance = np.sqrt(np.maximum(2 - 2 * cosine, 1e-12))
    return float(np.median(1 / np.log(distance[:, -1:] / distance[:, :-1]).mean(axis=1)))


def _index_recall(rows: Floats, asked: Ints, truth: Ints) -> list[float]:
    index: Any = faiss.index_factory(rows.shape[1], f"IVF{LISTS},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    found = []
    for probe in PROBES:
        index.nprobe = probe
        _, numbers = index.search(rows[asked], truth.shape[1] + 1)  # the row itself as well
        found.append(float((truth[:, :, None] == numbers[:, None, :]).any(axis=2).mean()))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints real and generated statistics; they have no target."""
    parser = argparse.ArgumentParser(description="Generated vectors beside real features.")
    parser.add_argument("--rows", type=int, default=6400)
    options = parser.parse_args(arguments)
    columns = []
    for look, dim, real in REAL.values():
        columns += [real, statistics(make(options.rows, look, dim))]
    print(f"generated vectors ({options.rows:,}) beside features of 6,400 photographs\n")
    head = [column for name in REAL for column in (name, "generated")]
    cells = [[f"{value:.4g}" for value in line] for line in zip(*columns, strict=True)]
    table(["", *head], [[n, *line] for n, line in zip(STATISTICS, cells, strict=True)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
