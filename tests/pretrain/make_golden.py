"""Writes golden/tiny.npz: two steps of DINOv2 written down naively, in fp64, without pretrain/.

    python tests/pretrain/make_golden.py

One image at a time through plain functions, whole matrices, every pair of crops in a loop, AdamW
and the average by their formulas: slow and obvious. Same format as the recorded official steps;
the model has registers, SwiGLU and layer decay, which those lack.
"""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import torch

META = {
    "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4,
    "num_register_tokens": 3, "ffn_layer": "swiglufused", "layerscale": 1e-5, "drop_path": 0.0,
    "global_size": 20, "local_size": 12, "n_global": 2, "n_local": 3, "batch": 3,
    "centering": "sinkhorn_knopp", "separate_head": True, "n_prototypes": 24,
    "head_hidden_dim": 20, "head_bottleneck_dim": 8, "head_nlayers": 3, "dino_weight": 1.0,
    "ibot_weight": 0.7, "koleo_weight": 0.1, "student_temp": 0.1, "teacher_temp": 0.04,
    "center_momentum": 0.9, "sinkhorn_iterations": 3, "lr": 1e-3, "weight_decay": 0.04,
    "betas": [0.9, 0.999], "clip_grad": 0.5, "ema_momentum": 0.9, "patch_embed_lr_mult": 0.2,
    "layerwise_decay": 0.8, "steps": 2, "interpolate_offset": 0.0, "interpolate_antialias": True,
    "source": "tests/pretrain/make_golden.py, fp64; images = int8 / 16",
}  # fmt: skip
GATED = 48  # hidden width: 4 * 16 * 2 / 3 = 42.7, up to a multiple of 8
Weights = dict[str, torch.Tensor]


def initial(generator: torch.Generator) -> Weights:
    """Random weights of the student, by official names."""
    d, patch, grid = (
        META["embed_dim"],
        META["patch_size"],
        META["global_size"] // META["patch_size"],
    )
    shapes = {
        "cls_token": (1, 1, d), "pos_embed": (1, 1 + grid * grid, d), "mask_token": (1, d),
        "register_tokens": (1, META["num_register_tokens"], d),
        "patch_embed.proj.weight": (d, 3, patch, patch), "patch_embed.proj.bias": (d,),
        "norm.weight": (d,), "norm.bias": (d,),
    }  # fmt: skip
    for block in range(META["depth"]):
        inside = {
            "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
            "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,), "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,), "ls1.gamma": (d,), "ls2.gamma": (d,),
            "mlp.w12.weight": (2 * GATED, d), "mlp.w12.bias": (2 * GATED,),
            "mlp.w3.weight": (d, GATED), "mlp.w3.bias": (d,),
        }  # fmt: skip
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in inside.items()}
    shapes = {f"backbone.{name}": shape for name, shape in shapes.items()}
    hidden, bottleneck = META["head_hidden_dim"], META["head_bottleneck_dim"]
    sizes = [d, hidden, hidden, bottleneck]
    for head in ("dino_head", "ibot_head"):
        for layer in range(3):
            shapes[f"{head}.mlp.{2 * layer}.weight"] = (sizes[layer + 1], sizes[layer])
            shapes[f"{head}.mlp.{2 * layer}.bias"] = (sizes[layer + 1],)
        shapes[f"{head}.last_layer.weight_g"] = (META["n_prototypes"], 1)
        shapes[f"{head}.last_layer.weight_v"] = (META["n_prototypes"], bottleneck)
    weights = {n: 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    for name in weights:
        if ("norm" in name and name.endswith("weight")) or name.endswith("weight_g"):
            weights[name] = 1 + 0.2 * weights[name]
    return {name: value.float().double() for name, value in weights.items()}


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def layer_norm(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def backbone(w: Weights, image: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(3, H, W), (N,) bool -> (1 + R + N, D), class token first, after the last norm."""
    w = {n.removeprefix("backbone."): v for n, v in w.items() if n.startswith("backbone.")}
    patch, heads = META["patch_size"], META["num_heads"]
    side = image.shape[1] // patch
    kernel = w["patch_embed.proj.weight"]
    tokens = []
    for row, column in product(range(side), range(side)):
        window = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        token = (kernel * window).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
        hidden = mask is not None and mask[row * side + column]
        tokens.append(w["mask_token"][0] if hidden else token)
    positions = w["pos_embed"][0, 1:]
    grid = math.isqrt(len(positions))
    if side != grid:
        square = positions.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        square = torch.nn.functional.interpolate(
            square, size=(side, side), mode="bicubic", antialias=True
        )
        positions = square[0].flatten(1).T
    first = w["cls_token"][0] + w["pos_embed"][0, :1]
    x = torch.cat([first, w["register_tokens"][0], torch.stack(tokens) + positions])
    for number in range(META["depth"]):
        block = f"blocks.{number}."
        q, k, v = linear(layer_norm(x, w, f"{block}norm1"), w, f"{block}attn.qkv").chunk(3, dim=1)
        out = []
        for head in zip(*(part.chunk(heads, dim=1) for part in (q, k, v)), strict=True):
            scores = head[0] @ head[1].T / math.sqrt(head[0].shape[1])
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            out.append(weights @ head[2])
        attended = linear(torch.cat(out, dim=1), w, f"{block}attn.proj")
        x = x + attended * w[f"{block}ls1.gamma"]
        gate, value = linear(layer_norm(x, w, f"{block}norm2"), w, f"{block}mlp.w12").chunk(2, 1)
        gated = gate / (1 + (-gate).exp()) * value
        x = x + linear(gated, w, f"{block}mlp.w3") * w[f"{block}ls2.gamma"]
    return layer_norm(x, w, "norm")


def head(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """(N, D) -> (N, K) logits."""
    x = gelu(linear(x, w, f"{name}.mlp.0"))
    x = linear(gelu(linear(x, w, f"{name}.mlp.2")), w, f"{name}.mlp.4")
    v = w[f"{name}.last_layer.weight_v"]
    prototypes = w[f"{name}.last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True) @ prototypes.T


def sinkhorn(logits: torch.Tensor) -> torch.Tensor:
    q = (logits / META["teacher_temp"]).exp().T
    q = q / q.sum()
    for _ in range(META["sinkhorn_iterations"]):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def cross_entropy(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    logits = logits / META["student_temp"]
    return -(target * (logits - logits.exp().sum().log())).sum()


def koleo(tokens: torch.Tensor) -> torch.Tensor:
    x = tokens / tokens.norm(dim=1, keepdim=True)
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        nearest = max(others, key=lambda j: float((x[i] @ x[j]).detach()))
        total = total - ((x[i] - x[nearest] + 1e-8).norm() + 1e-8).log()
    return total / len(x)


def teacher_targets(w: Weights, batch: dict[str, torch.Tensor]) -> Weights:
    """(2B, K) of class tokens, the other view's first; (M, K) of masked patches."""
    images, first = META["batch"], 1 + META["num_register_tokens"]
    seen = [backbone(w, crop, None) for crop in batch["global_crops"]]
    swapped = torch.stack([x[0] for x in seen[images:] + seen[:images]])
    patches = torch.stack([seen[i][first + p] for i, p in masked_patches(batch)])
    dino, ibot = head(w, "dino_head", swapped), head(w, "ibot_head", patches)
    return {"dino": sinkhorn(dino).detach(), "ibot": sinkhorn(ibot).detach()}


def masked_patches(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(crop, patch) of each."""
    return [(i, int(p)) for i, mask in enumerate(batch["masks"]) for p in mask.nonzero()]


def losses(w: Weights, targets: Weights, batch: dict[str, torch.Tensor]) -> Weights:
    """As the official code logs them, and the total that is propagated."""
    images, first = META["batch"], 1 + META["num_register_tokens"]
    pairs = zip(batch["global_crops"], batch["masks"], strict=True)
    whole = [backbone(w, crop, mask) for crop, mask in pairs]
    local = [backbone(w, crop, None) for crop in batch["local_crops"]]
    by_global, by_local, by_patch = torch.zeros(3, dtype=torch.float64)
    for i, x in enumerate(whole):
        by_global = by_global + cross_entropy(targets["dino"][i], head(w, "dino_head", x[:1])[0])
    for i, view in product(range(len(local)), range(2)):
        target = targets["dino"][view * images + i % images]
        by_local = by_local + cross_entropy(target, head(w, "dino_head", local[i][:1])[0])
    for target, (i, p) in zip(targets["ibot"], masked_patches(batch), strict=True):
        patch = cross_entropy(target, head(w, "ibot_head", whole[i][first + p][None])[0])
        by_patch = by_patch + patch / batch["masks"][i].sum() / len(whole)
    classes = torch.stack([x[0] for x in whole])
    spread = META["koleo_weight"] * (koleo(classes[:images]) + koleo(classes[images:]))
    terms = images * (2 + 2 * META["n_local"])
    dino = META["dino_weight"] * (by_local + by_global) / terms
    return {
        "dino_local_crops_loss": by_local / terms,
        "dino_global_crops_loss": by_global / terms,
        "koleo_loss": spread / 2,
        "ibot_loss": by_patch / 2,
        "total": dino + META["ibot_weight"] * by_patch + spread,
    }


def rates(name: str) -> tuple[float, float]:
    """Multipliers of learning rate and weight decay."""
    depth, decay = META["depth"], META["layerwise_decay"]
    layer = depth + 1
    if name.startswith("backbone.blocks."):
        layer = int(name.split(".")[2]) + 1
    elif name.startswith("backbone.") and not name.startswith("backbone.norm"):
        layer = 0
    lr = decay ** (depth + 1 - layer) * (
        META["patch_embed_lr_mult"] if "patch_embed" in name else 1
    )
    return lr, 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 1.0


def adamw(w: Weights, gradients: Weights, moments: dict[str, Weights], step: int) -> Weights:
    first, second = META["betas"]
    out = {}
    for name, value in w.items():
        lr, decay = rates(name)
        g, m, v = gradients[name], moments["m"], moments["v"]
        m[name] = first * m.get(name, 0) + (1 - first) * g
        v[name] = second * v.get(name, 0) + (1 - second) * g * g
        mean, square = m[name] / (1 - first**step), v[name] / (1 - second**step)
        value = value * (1 - META["lr"] * lr * META["weight_decay"] * decay)
        out[name] = value - META["lr"] * lr * mean / (square.sqrt() + 1e-8)
    return out


def draw_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Crops as int8 and masks, one image without any."""
    images, side = META["batch"], META["global_size"] // META["patch_size"]
    sizes = {"global": (2 * images, META["global_size"]), "local": (3 * images, META["local_size"])}
    out = {
        f"{kind}_crops_int8": rng.integers(-32, 33, (n, 3, size, size), dtype=np.int8)
        for kind, (n, size) in sizes.items()
    }
    masks = rng.random((2 * images, side * side)) < 0.3
    masks[1] = False
    weight = 1 / np.maximum(masks.sum(1, keepdims=True), 1)
    where = np.flatnonzero(masks.ravel())
    weights = np.broadcast_to(weight, masks.shape)[masks].astype(np.float32)
    return out | {"masks": masks, "mask_indices": where, "masks_weight": weights}


def clip(gradients: Weights) -> dict[str, float]:
    """Clips the gradients of each network in place; the norms before."""
    norms = {}
    for network in ("backbone", "dino_head", "ibot_head"):
        mine = [n for n in gradients if n.startswith(network)]
        norms[network] = math.sqrt(sum(float((gradients[n] ** 2).sum()) for n in mine))
        for name in mine:
            gradients[name] = gradients[name] * min(1, META["clip_grad"] / (norms[network] + 1e-6))
    return norms


def run() -> tuple[Weights, list[dict[str, dict[str, float]]]]:
    """All arrays of the file, and what is expected of each step."""
    student = initial(torch.Generator().manual_seed(0))
    teacher, moments, expected = dict(student), {"m": {}, "v": {}}, []
    arrays = {f"init/{name}": value for name, value in student.items()}
    for step in range(META["steps"]):
        drawn = draw_batch(np.random.default_rng(step))
        arrays |= {f"step{step}/{name}": torch.from_numpy(a) for name, a in drawn.items()}
        batch = {name: torch.from_numpy(value) for name, value in drawn.items()}
        for kind in ("global", "local"):
            batch[f"{kind}_crops"] = batch.pop(f"{kind}_crops_int8").double() / 16
        student = {name: value.clone().requires_grad_() for name, value in student.items()}
        targets = teacher_targets(teacher, batch)
        logged = losses(student, targets, batch)
        logged.pop("total").backward()
        gradients = {name: value.grad for name, value in student.items()}
        student = {name: value.detach() for name, value in student.items()}
        values = {name: float(value.detach()) for name, value in logged.items()}
        expected.append({"loss": values, "grad_norms": clip(gradients)})
        if step == 0:
            arrays |= {f"step0/grad_clipped/{n}": g for n, g in gradients.items()}
            arrays |= {f"step0/teacher_targets/{n}.naive": t for n, t in targets.items()}
        student = adamw(student, gradients, moments, step + 1)
        keep = META["ema_momentum"]
        teacher = {n: keep * teacher[n] + (1 - keep) * student[n] for n in teacher}
    arrays |= {f"final_student/{name}": value for name, value in student.items()}
    return arrays | {f"final_teacher/{name}": value for name, value in teacher.items()}, expected


def main() -> None:
    """Runs the steps and writes the file."""
    arrays, expected = run()
    plain = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in arrays.items()}
    meta = json.dumps(META | {"expected": expected}).encode()
    path = Path(__file__).parent / "golden" / "tiny.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, meta_json=np.frombuffer(meta, np.uint8), **plain)
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
