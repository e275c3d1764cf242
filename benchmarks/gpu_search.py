"""k-means, the self-join and retrieval on a GPU: against faiss on it, the processor, a matmul.

    python -m benchmarks.gpu_search [--rows 1000000] [--only kmeans many join retrieval]

All calls are whole: vectors lie in the machine's memory before and results after, and cells, the
choice of how far to ask, training and adding are counted. faiss is the GPU build where that is
installed, else left out. On the processor the same calls run with all of its threads.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest import mock

import faiss
import numpy as np
import torch

from benchmarks import join as joins
from benchmarks import kmeans as fits
from benchmarks import retrieval, vectors
from benchmarks.measuring import digest, machine, say, table, target, timed
from curation.algorithms import gpu, kmeans, knn
from curation.algorithms.assign import assign, assigner
from curation.algorithms.lloyd import Metric
from curation.algorithms.products import Floats

SIDE = 8192  # of the plain matmul
REPEATS = 10
LISTS = 4096
PROBES = (2, 4, 6, 8, 16, 32, 64, 128, 256)
SAMPLE = 3000
Line = list[str]


def matmul(dtype: torch.dtype) -> float:
    """FLOP/s of a plain product on the GPU, the median of ten."""
    left, right = (torch.randn(SIDE, SIDE, device=gpu.device()).to(dtype) for _ in range(2))
    left @ right
    return 2 * SIDE**3 / median(device_seconds(lambda: left @ right) for _ in range(REPEATS))


def device_seconds(work: Callable[[], Any]) -> float:
    """Seconds until the GPU has done it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def on_processor() -> Any:
    """In its context there is no GPU."""
    return mock.patch.object(gpu, "device", return_value=None)


def share(flop: float, seconds: float, plain: float) -> Line:
    """TFLOP/s, and of a plain matmul."""
    return [f"{flop / seconds / 1e12:.1f}", f"{flop / seconds / plain:.1%}"]


def fit(rows: Floats, k: int, iterations: int) -> tuple[Floats, Any]:
    """Centroids, and the seconds of each iteration."""
    stamps, rng = [time.perf_counter()], np.random.default_rng(0)
    note = lambda _: stamps.append(time.perf_counter())  # noqa: E731
    centroids = kmeans.fit(rows, k, iterations, rng, note=note).centroids
    return centroids, np.diff(stamps)


def compare_kmeans(rows: Floats, k: int, plain: float) -> int:
    count, dim = rows.shape
    fit(rows[: 8 * k], k, 2)  # compiled, loaded
    seconds, (centroids, each) = timed(fit, rows, k, fits.ITERATIONS)
    say(f"GPU: {seconds:.2f} s")
    with on_processor():
        fit(rows[: 8 * k], k, 2)
        slow, (same, _) = timed(fit, rows, k, fits.ITERATIONS)
    say(f"processor: {slow:.1f} s")
    flop = 2.0 * count * dim * k
    lines = [
        ["GPU, all iterations", seconds, centroids],
        ["GPU, a late iteration", median(each[-10:]) * fits.ITERATIONS, centroids],
        ["processor", slow, same],
    ]
    if faiss.get_num_gpus():
        begin = (lambda: [rows]), count, k, np.random.default_rng(0), "random", Metric()
        start = kmeans.first_centroids(*begin)
        of_faiss = dict(niter=fits.ITERATIONS, spherical=True, gpu=True)
        limits = dict(max_points_per_centroid=count, min_points_per_centroid=1)
        theirs: Any = faiss.Kmeans(dim, k, **of_faiss, **limits)
        took, _ = timed(lambda: theirs.train(rows, init_centroids=start))
        lines.append(["faiss.Kmeans, GPU", took, theirs.centroids])
    print(f"k-means of {count:,} x {dim}, k = {k:,}, {fits.ITERATIONS} iterations\n")
    shown = []
    for name, took, found in lines:
        objective = float(assign(rows, found)[1].mean(dtype=np.float64))
        one = took / fits.ITERATIONS
        shown.append([name, f"{1e3 * one:.1f}", f"{objective:.7f}", *share(flop, one, plain)])
    table(["", "ms an iteration", "objective", "nominal TFLOP/s", "of a bf16 matmul"], shown)
    return target("GPU and processor: the same centroids", digest(centroids) == digest(same))


def many(rows: Floats, k: int, plain: float) -> None:
    """Prints seconds of an iteration with very many clusters, looked for in groups and exactly."""
    rng, flop = np.random.default_rng(0), 2.0 * len(rows) * rows.shape[1] * k
    start = rows[np.sort(rng.choice(len(rows), k, replace=False))]
    exactly = assigner()
    exactly(rows, start)
    exact = timed(exactly, rows, start)[0]
    _, each = fit(rows, k, 2)
    lines = [["all compared", f"{exact:.2f}", *share(flop, exact, plain)]]
    lines.append(["in groups", f"{each[-1]:.2f}", *share(flop, each[-1], plain)])
    print(f"an iteration on {len(rows):,} x {rows.shape[1]}, k = {k:,}\n")
    table(["", "s", "nominal TFLOP/s", "of a bf16 matmul"], lines)


class OnGpu:
    """faiss' inverted lists on a GPU, all vectors in fp32."""

    def __init__(self, base: Floats, lists: int) -> None:
        of_gpu: Any = faiss  # the build for processors has no such names
        self._resources = of_gpu.StandardGpuResources()  # kept alive
        of_lists = base.shape[1], lists, faiss.METRIC_INNER_PRODUCT
        self._index = of_gpu.GpuIndexIVFFlat(self._resources, *of_lists)
        self._index.cp.niter, self._index.cp.max_points_per_centroid = 8, 64
        self.building = timed(lambda: (self._index.train(base), self._index.add(base)))[0]

    def reach(
        self, queries: Floats, k: int, wanted: float, recall: Callable[[Any], float]
    ) -> list[tuple[str, float, float]]:
        """Name, seconds in all and recall for ever more lists, until the recall is reached."""
        found: list[tuple[str, float, float]] = []
        for probe in PROBES:
            self._index.nprobe = probe
            seconds, (_, numbers) = timed(self._index.search, queries, k)
            name = f"faiss IVF{self._index.nlist} Flat on the GPU, nprobe {probe}"
            found.append((name, self.building + seconds, recall(numbers)))
            say(f"{name}: {found[-1][1]:.2f} s, recall {found[-1][2]:.4f}")
            if found[-1][2] >= wanted:
                break
        return found[-2:]


def compare_join(rows: Floats, plain: float) -> int:
    shuffled = np.random.default_rng(1).permutation(len(rows))
    truth = joins.Truth.of(rows, np.sort(shuffled[:SAMPLE]))
    what = knn.Search(joins.K, joins.MIN_COSINE, itself=True, target_recall=0.993)
    knn.join(rows[:6000], rows[:6000], what)
    seconds, found = timed(knn.join, rows, rows, what)
    say(f"GPU: {seconds:.2f} s, {found.cells} cells, nprobe {found.nprobe:.1f}")
    with on_processor():
        knn.join(rows[:6000], rows[:6000], what)
        slow, same = timed(knn.join, rows, rows, what)
    say(f"processor: {slow:.1f} s")

    def recall(numbers: Any) -> float:
        return truth.recall(lambda at: numbers[at])[joins.MIN_COSINE]

    ours = recall(found.neighbours.number)
    lines = [("GPU", seconds, ours), ("processor", slow, ours)]
    if faiss.get_num_gpus():
        lines += OnGpu(rows, LISTS).reach(rows, joins.K + 1, ours, recall)
    print(f"self-join of {len(rows):,}, k = {joins.K}, cosine above {joins.MIN_COSINE}\n")
    met = found.cells + found.nprobe * len(rows) / found.cells
    rate = share(2.0 * len(rows) * rows.shape[1] * met, seconds, plain)
    show_searches(lines)
    print(f"Products of rows with cells and with rows: {rate[0]} TFLOP/s, {rate[1]} of a matmul.\n")
    return same_neighbours(found, same)


def compare_retrieval(queries: Floats, base: Floats) -> int:
    sampled = np.arange(min(SAMPLE, len(queries)))
    last = retrieval.brute_force(queries[sampled], base)
    what = knn.Search(retrieval.K, target_recall=retrieval.LEAST_RECALL)

    def recall(numbers: Any) -> float:
        return retrieval.recall(queries[sampled], base, numbers[sampled], last)

    knn.join(queries[:500], base[:6000], what)
    seconds, found = timed(knn.join, queries, base, what)
    say(f"GPU: {seconds:.2f} s, {found.cells} cells, nprobe {found.nprobe:.1f}")
    with on_processor():
        slow, same = timed(knn.join, queries, base, what)
    ours = recall(found.neighbours.number)
    lines = [("GPU", seconds, ours), ("processor", slow, ours)]
    if faiss.get_num_gpus():
        lines += OnGpu(base, LISTS).reach(queries, retrieval.K, ours, recall)
    print(f"{len(queries):,} queries against {len(base):,} x {base.shape[1]}, k = {retrieval.K}\n")
    show_searches(lines)
    return same_neighbours(found, same)


def show_searches(lines: list[tuple[str, float, float]]) -> None:
    shown = [[n, f"{s:.2f}", f"{r:.4f}", f"{s / lines[0][1]:.1f}"] for n, s, r in lines]
    table(["", "s", "recall", "times ours"], shown)


def same_neighbours(left: knn.Joined, right: knn.Joined) -> int:
    """Ties in fp32 may be in another order."""
    alike = (left.neighbours.number == right.neighbours.number).mean()
    filled = left.neighbours.score > -np.inf
    off = np.abs(left.neighbours.score[filled] - right.neighbours.score[filled]).max(initial=0.0)
    return target(
        f"GPU and processor: {alike:.6f} of the neighbours equal, scores within {off:.1e}",
        bool(off <= 1e-6) and alike > 0.999,
    )


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="Searches on a GPU.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--many", type=int, default=100_000)
    parts = ["kmeans", "many", "join", "retrieval"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    options = parser.parse_args(arguments)
    if gpu.device() is None:
        print("there is no GPU: nothing is measured")
        return 0
    print(f"{torch.cuda.get_device_name()}; {machine()}\n", flush=True)
    plain = matmul(torch.bfloat16)
    rates = f"bf16 {plain / 1e12:.0f}, fp16 {matmul(torch.float16) / 1e12:.0f} TFLOP/s"
    print(f"A plain matmul of {SIDE} x {SIDE}: {rates}.\n", flush=True)
    missed, count = 0, options.rows
    if {"kmeans", "many", "retrieval"} & set(options.only):
        rows = vectors.make(count + count // 10, vectors.SEMANTIC)
    if "kmeans" in options.only:
        missed += compare_kmeans(rows[:count], options.clusters, plain)
    if "retrieval" in options.only:
        missed += compare_retrieval(rows[count:], rows[:count])
    if "join" in options.only:
        missed += compare_join(vectors.make(count, vectors.COPIES), plain)
    if "many" in options.only:
        many(rows[:count], options.many, plain)
    return missed


if __name__ == "__main__":
    sys.exit(main())
