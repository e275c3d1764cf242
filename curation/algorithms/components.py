"""Connected components of a graph that comes as blocks of edges, and what stays of each.

Union-find in one array: 4 bytes a node (4.8 GB for 1.2 billion), 8 from 2**32 - 1 nodes on,
whatever the number of edges. Cutting giants takes 8 bytes a node more while it runs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]
Edges = tuple[Ints, Ints, Floats]  # left, right, cosine: a block of edges

WIDE_NODES = 2**32 - 1  # from here on a node, or "no node", needs 8 bytes
AHEAD = 32  # edges whose first steps up are loaded together
TRUE_COPIES = 0.95  # a giant that hangs together at this cosine is a mass of copies


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, kept on disk, and without the interpreter's lock."""
    compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)(function)
    return compiled


@_kernel
def _join(parent: Ints, a: int, b: int) -> None:
    """Makes one tree of two. A parent is never larger than its child, so a root is the smallest.

    Climbs from the side with the larger parent and stops where both meet, halving the paths on its
    way: O(log n) an edge, amortized, in any order of nodes and edges.
    """
    above_a, above_b = parent[a], parent[b]
    while above_a != above_b:
        if above_a < above_b:
            a, b, above_a, above_b = b, a, above_b, above_a
        if above_a == a:
            parent[a] = above_b
            return
        parent[a] = parent[above_a]
        a = parent[a]
        above_a = parent[a]


@_kernel
def _union(parent: Ints, left: Ints, right: Ints) -> None:
    node = parent.dtype.type
    a, b = np.empty(AHEAD, parent.dtype), np.empty(AHEAD, parent.dtype)
    for start in range(0, left.size, AHEAD):
        edges = min(AHEAD, left.size - start)
        for i in range(edges):  # loads that don't wait for each other, as those of a climb do
            a[i] = parent[node(left[start + i])]
            b[i] = parent[node(right[start + i])]
        for i in range(edges):
            a[i], b[i] = parent[a[i]], parent[b[i]]
        for i in range(edges):
            _join(parent, a[i], b[i])


@_kernel
def _outside(nodes: int, left: Ints, right: Ints) -> bool:
    bad = False
    for i in range(left.size):
        bad |= left[i] < 0 or right[i] < 0 or left[i] >= nodes or right[i] >= nodes
    return bad


@_kernel
def _flatten(parent: Ints) -> None:
    for i in range(parent.size):  # a parent is never larger than its child
        parent[i] = parent[parent[i]]


class Components:
    """Nodes 0 .. n-1. The label of a component is its smallest node, however the edges come."""

    def __init__(self, nodes: int) -> None:
        wide = nodes >= WIDE_NODES
        self._parent: Ints = np.arange(nodes, dtype=np.int64 if wide else np.uint32)

    def add(self, left: Ints, right: Ints) -> None:
        """Joins left[i] and right[i] for every i; integers of any type, read where they lie.

        Raises ValueError, and joins nothing, when an edge leads to a node that is not there.
        """
        _check(len(self._parent), left, right)
        _union(self._parent, left, right)

    def labels(self) -> Ints:
        """The label of every node (n,): the union-find's own array, which `add` goes on with."""
        _flatten(self._parent)
        return self._parent


def nobody(nodes: Ints) -> int:
    """What stands for "no node" in an array of nodes."""
    return int(np.iinfo(nodes.dtype).max)


def _check(nodes: int, left: Ints, right: Ints) -> None:
    if left.shape != right.shape:
        raise ValueError(f"edges with {len(left)} left and {len(right)} right ends")
    if len(left) and _outside(nodes, left, right):  # compiled loops don't check their indices
        raise ValueError(f"edges must join nodes 0 to {nodes - 1}")


def component_sizes(labels: Ints) -> Ints:
    """By label, the nodes of its component; 0 where no component has the label (n,)."""
    sizes = np.zeros_like(labels)
    _count(labels, sizes)
    return sizes


@_kernel
def _count(labels: Ints, sizes: Ints) -> None:
    for label in labels:
        sizes[label] += 1


def split_giants(
    labels: Ints, edges: Callable[[], Iterable[Edges]], max_size: int, step: float = 0.02
) -> list[tuple[int, int]]:
    """Cuts components above `max_size` in place: weak links chain unlike images, copies don't.

    The threshold of a giant starts at its weakest edge and rises by `step` until its pieces fit, or
    until cosine 0.95, where what still hangs together is a mass of true copies. `edges` gives every
    edge, block by block, once a step. Returns (old size, largest piece) of each giant, by label.
    """
    sizes = component_sizes(labels)
    giants = np.flatnonzero(sizes > max_size)
    if not len(giants):
        return []
    old = sizes[giants]
    giant_of = _giants_of_nodes(labels, giants, spare=sizes)
    lowest = np.full(len(giants), np.inf, np.float32)
    for left, right, cosine in edges():
        _check(len(labels), left, right)
        _weakest(giant_of, lowest, left, cosine)
    threshold, largest = lowest.astype(np.float64), old.copy()
    while (rising := (largest > max_size) & (threshold < TRUE_COPIES)).any():
        threshold[rising] += step
        above = np.where(rising, threshold, np.inf).astype(np.float32)  # no edge of the others
        _dissolve(labels, giant_of, rising)
        for left, right, cosine in edges():
            _rejoin(labels, giant_of, above, left, right, cosine)
        _flatten(labels)
        sizes.fill(0)
        _count(labels, sizes)
        _largest_pieces(labels, sizes, giant_of, largest)
    return list(zip(old.tolist(), largest.tolist(), strict=True))


def _giants_of_nodes(labels: Ints, giants: Ints, spare: Ints) -> Ints:
    """By node, the place of its label among `giants`, else at least their number (n,)."""
    spare.fill(nobody(spare))
    spare[giants] = np.arange(len(giants))
    giant_of = labels.copy()
    _look_up(spare, giant_of)
    return giant_of


@_kernel
def _look_up(values: Ints, index: Ints) -> None:
    for i in range(index.size):  # NumPy would widen the whole index to 8 bytes
        index[i] = values[index[i]]


@_kernel
def _weakest(giant_of: Ints, lowest: Floats, left: Ints, cosine: Floats) -> None:
    for i in range(left.size):
        giant = giant_of[left[i]]
        if giant < lowest.size:
            lowest[giant] = min(lowest[giant], cosine[i])


@_kernel
def _dissolve(labels: Ints, giant_of: Ints, rising: npt.NDArray[np.bool_]) -> None:
    for node in range(labels.size):
        if giant_of[node] < rising.size and rising[giant_of[node]]:
            labels[node] = node


@_kernel
def _rejoin(
    labels: Ints, giant_of: Ints, above: Floats, left: Ints, right: Ints, cosine: Floats
) -> None:
    node = labels.dtype.type
    for i in range(left.size):
        giant = giant_of[left[i]]
        if giant < above.size and cosine[i] > above[giant]:
            _join(labels, node(left[i]), node(right[i]))


@_kernel
def _largest_pieces(labels: Ints, sizes: Ints, giant_of: Ints, largest: Ints) -> None:
    largest[:] = 0
    for node in range(labels.size):
        giant = giant_of[node]
        if giant < largest.size:
            largest[giant] = max(largest[giant], sizes[labels[node]])


class Representatives:
    """What stays of each component of two or more nodes.

    The offered node with the most pixels, then the smallest id, then the smallest number, whatever
    the order of the offers. Memory: `sizes`, which it takes over, and 44 bytes a component.
    """

    def __init__(self, sizes: Ints) -> None:
        self._nobody = nobody(sizes)
        components = _number_components(sizes, self._nobody)
        self._slot = sizes  # by label
        self._node = np.full(components, self._nobody, sizes.dtype)
        self._pixels = np.zeros(components, np.int64)
        self._ids = np.zeros((components, 4), ">u8")  # 32 bytes as words that sort as they do

    def grouped(self, label: Ints) -> npt.NDArray[np.bool_]:
        """Which labels (m,) are of components of two nodes or more (m,)."""
        grouped: npt.NDArray[np.bool_] = self._slot[label] != self._nobody
        return grouped

    def offer(self, node: Ints, label: Ints, pixels: Ints, ids: npt.NDArray[np.uint8]) -> None:
        """Nodes that may stay (m,), with grouped labels (m,), pixel counts (m,), ids (m, 32)."""
        if not len(node):
            return
        slot = self._slot[label]
        held = np.unique(slot)
        held = held[self._node[held] != self._nobody]
        slot, node = np.concatenate([held, slot]), np.concatenate([self._node[held], node])
        pixels = np.concatenate([self._pixels[held], pixels])
        words = np.concatenate([self._ids[held], ids.view(">u8")])
        order = np.lexsort((node, *words.T[::-1], -pixels, slot))
        best = order[np.r_[True, slot[order][1:] != slot[order][:-1]]]
        winner = slot[best]
        self._node[winner], self._pixels[winner] = node[best], pixels[best]
        self._ids[winner] = words[best]

    def of(self, label: Ints) -> tuple[Ints, npt.NDArray[np.uint8]]:
        """What stays (m,) of components with these labels (m,), grouped ones, and its id (m, 32).

        `nobody` where none of the component was offered.
        """
        slot = self._slot[label]
        return self._node[slot], self._ids[slot].view(np.uint8)


@_kernel
def _number_components(sizes: Ints, nobody: int) -> int:
    components = 0
    for label in range(sizes.size):
        if sizes[label] > 1:
            sizes[label] = components
            components += 1
        else:
            sizes[label] = nobody
    return components
