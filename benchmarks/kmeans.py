"""k-means against faiss.Kmeans: seconds an iteration, objective, and the share of a matmul's rate.

    python -m benchmarks.kmeans [--rows 1000000] [--clusters 1000] [--many 100000]

Both start from the same centroids and move them 20 times, faiss over all rows as well. Ours is the
whole call, looking at the rows and finding the start included. The objective (mean cosine of a row
to its nearest centroid) is computed by the same code for the centroids of both.
"""

import argparse
import sys
import time
from statistics import median
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks import vectors
from benchmarks.measuring import machine, same_on_threads, say, table, target, timed
from curation.algorithms import kmeans
from curation.algorithms.assign import assign
from curation.algorithms.lloyd import Metric
from curation.algorithms.products import Floats, fast_dtype

ITERATIONS = 20
MANY_ITERATIONS = 2
LEAST_RATIO = 3.0
LEAST_SHARE = 0.45
MOST_WORSE = 1e-4
MATMUL_ROWS = 16_384
PRECISION = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def matmul_rate(dim: int, columns: int, dtype: torch.dtype) -> float:
    """FLOP/s of one plain product of rows (n, D) by (D, m), the median of ten."""
    left = torch.randn(MATMUL_ROWS, dim).to(dtype)
    right = torch.randn(dim, columns).to(dtype)
    out = torch.empty(MATMUL_ROWS, columns, dtype=dtype)
    torch.mm(left, right, out=out)
    seconds = [timed(lambda: torch.mm(left, right, out=out))[0] for _ in range(10)]
    return 2 * MATMUL_ROWS * dim * columns / median(seconds)


def fit(rows: Floats, k: int, iterations: int) -> Floats:
    """As a user would."""
    return kmeans.fit(rows, k, iterations, np.random.default_rng(0)).centroids


def fit_faiss(rows: Floats, start: Floats, iterations: int) -> Floats:
    faiss.omp_set_num_threads(torch.get_num_threads())
    of_faiss: Any = faiss.Kmeans(
        rows.shape[1],
        len(start),
        niter=iterations,
        spherical=True,
        max_points_per_centroid=len(rows),  # all rows, as ours
        min_points_per_centroid=1,
    )
    of_faiss.train(rows, init_centroids=start)
    centroids: Floats = of_faiss.centroids
    return centroids


def compare(rows: Floats, k: int) -> int:
    """Prints ours beside faiss; returns the targets missed."""
    count, dim = rows.shape
    fit(rows[: 4 * k], k, 5)  # compiled
    start = kmeans.first_centroids(
        lambda: [rows], count, k, np.random.default_rng(0), "random", Metric()
    )
    ours, centroids = timed(fit, rows, k, ITERATIONS)
    say(f"ours: {ours / ITERATIONS:.2f} s an iteration")
    theirs, other = timed(fit_faiss, rows, start, ITERATIONS)
    mine, reference = (float(assign(rows, c)[1].mean(dtype=np.float64)) for c in (centroids, other))
    dtype = fast_dtype()
    plain = matmul_rate(dim, k, dtype)
    lines = []
    for name, seconds, objective in (("ours", ours, mine), ("faiss.Kmeans", theirs, reference)):
        each = seconds / ITERATIONS
        rate = 2 * count * k * dim / each
        share = f"{rate / plain:.0%}"
        lines.append([name, f"{each:.3f}", f"{objective:.6f}", f"{rate / 1e12:.4f}", share])
    precision = PRECISION[dtype]
    print(f"k-means of {count:,} x {dim}, k = {k:,}, {ITERATIONS} iterations\n")
    head = ["", "s an iteration", "objective", "nominal TFLOP/s", f"of a {precision} matmul"]
    table(head, lines)
    print(f"A plain {precision} matmul here: {plain / 1e12:.4f} TFLOP/s. Nominal: 2 n k D an")
    print("iteration, though bounds rule most products out.\n")
    ratio, share_of = theirs / ours, 2 * count * k * dim * ITERATIONS / ours / plain
    worse = max(0.0, reference - mine)
    return (
        target(f"{ratio:.1f} times as fast as faiss, of {LEAST_RATIO}", ratio >= LEAST_RATIO)
        + target(f"objective {worse:.1e} below, of {MOST_WORSE}", worse <= MOST_WORSE)
        + target(f"{share_of:.0%} of a matmul, of {LEAST_SHARE:.0%}", share_of >= LEAST_SHARE)
    )


def many(rows: Floats, k: int) -> None:
    """Prints seconds for very many clusters, iteration by iteration."""
    stamps = [time.perf_counter()]
    kmeans.fit(
        rows,
        k,
        MANY_ITERATIONS,
        np.random.default_rng(0),
        note=lambda _: stamps.append(time.perf_counter()),
    )
    print(f"k-means of {len(rows):,} x {rows.shape[1]}, k = {k:,}\n")
    head = ["iteration", *(str(n + 1) for n in range(len(stamps) - 1))]
    table(head, [["seconds", *(f"{seconds:.1f}" for seconds in np.diff(stamps))]])


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="k-means against faiss.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--many", type=int, default=100_000, help="clusters of the large fit")
    options = parser.parse_args(arguments)
    print(f"{machine()}\n", flush=True)
    rows = vectors.make(options.rows, vectors.SEMANTIC)
    missed = compare(rows, min(options.clusters, options.rows // 4))
    few = rows[: max(1, options.rows // 10)]
    missed += same_on_threads(
        f"centroids of {len(few):,} rows, k = 100", lambda: (fit(few, 100, ITERATIONS),)
    )
    many(rows, min(options.many, options.rows // 4))
    return missed


if __name__ == "__main__":
    sys.exit(main())
