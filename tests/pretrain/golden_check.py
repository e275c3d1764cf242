"""Compares pretrain/ with recorded steps of another implementation.

    python tests/pretrain/golden_check.py FILE.npz ...

Prints the largest relative error of each kind of quantity of each file, and exits 1 if one exceeds
1e-4. Of a tensor: |ours - theirs| / |theirs| in the Euclidean norm, which is judged, and
max |ours - theirs| / max |theirs| beside it; of a scalar both are the same.

Not judged: key biases after the steps. They shift all scores of a query alike, so their gradient is
0 but for rounding, and Adam makes a step of up to the learning rate of any gradient. Single entries
of other weights with a gradient near 0 do the same, which is why the maximum is not judged.

Files named *_rankIofN.npz belong together: N gloo processes run them, and only losses and teacher
targets of step 0 are compared (their gradients were not averaged over ranks). Where a file with
registers doesn't say how positions were interpolated, both of DINOv2's ways are tried.
"""

import json
import math
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch import distributed

from pretrain.distributed import ALL_RANKS
from pretrain.heads import HeadConfig
from pretrain.masking import Masks
from pretrain.param_groups import adamw, param_groups, set_rates
from pretrain.student_teacher import Batch, ObjectiveConfig, StudentTeacher, clip_gradients
from pretrain.vit import ViTConfig

LARGEST_ERROR = 1e-4
CENTERING = {"sinkhorn_knopp": "sinkhorn_knopp", "centering": "softmax"}
INTERPOLATIONS = ((0.1, False), (0.0, True))  # (offset, antialias): training's; register models'
NOT_JUDGED = "key biases"
Errors = dict[str, tuple[float, float]]  # kind -> by norm, by maximum
Interpolation = tuple[float, bool]


class Golden:
    """One recorded file."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path))
        self.meta = json.loads(bytes(self.arrays.pop("meta_json")))

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        names = [name for name in self.arrays if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}

    def batch(self, step: int) -> Batch:
        at = f"step{step}/"
        crops = [self.tensor(f"{at}{kind}_crops_int8") / 16 for kind in ("global", "local")]
        indices, weights = self.tensor(f"{at}mask_indices"), self.tensor(f"{at}masks_weight")
        return Batch(*crops, Masks(self.tensor(f"{at}masks"), indices, weights, len(indices)))

    def interpolations(self) -> tuple[Interpolation, ...]:
        """How positions may have been interpolated."""
        if "interpolate_offset" in self.meta:
            offset, antialias = self.meta["interpolate_offset"], self.meta["interpolate_antialias"]
            return ((offset, antialias),)
        return INTERPOLATIONS if self.meta["num_register_tokens"] else INTERPOLATIONS[:1]

    def model(self, interpolation: Interpolation) -> StudentTeacher:
        """The model of the meta data, with the recorded initial weights."""
        meta = self.meta
        head = HeadConfig(
            meta["n_prototypes"],
            meta["head_hidden_dim"],
            meta["head_bottleneck_dim"],
            meta["head_nlayers"],
        )
        vit = ViTConfig(
            patch_size=meta["patch_size"],
            width=meta["embed_dim"],
            depth=meta["depth"],
            heads=meta["num_heads"],
            ffn="mlp" if meta["ffn_layer"] == "mlp" else "swiglu",
            ffn_ratio=meta["mlp_ratio"],
            layerscale=meta["layerscale"],
            registers=meta["num_register_tokens"],
            drop_path=meta["drop_path"],
            image_size=meta["global_size"],
            interpolate_offset=interpolation[0],
            interpolate_antialias=interpolation[1],
        )
        objective = ObjectiveConfig(
            dino_head=head,
            ibot_head=head if meta["separate_head"] else None,
            centering=CENTERING[meta["centering"]],
            sinkhorn_iterations=meta["sinkhorn_iterations"],
            center_momentum=meta["center_momentum"],
            student_temperature=meta["student_temp"],
            dino_weight=meta["dino_weight"],
            ibot_weight=meta["ibot_weight"],
            koleo_weight=meta["koleo_weight"],
        )
        model = StudentTeacher(vit, objective, ALL_RANKS).train()
        model.student.load_state_dict(self.under("init/"))
        model.teacher.load_state_dict(self.under("init/"))
        return model

    def logged(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our losses as the official code logs them: iBOT and KoLeo halved, KoLeo weighted."""
        return {
            "dino_local_crops_loss": values["dino_local"],
            "dino_global_crops_loss": values["dino_global"],
            "koleo_loss": values["koleo"] * self.meta["koleo_weight"] / 2,
            "ibot_loss": values["ibot"] / 2,
        }


class Comparison:
    """The largest error of each kind."""

    def __init__(self) -> None:
        self.errors: Errors = {}

    def add(self, kind: str, ours: torch.Tensor, theirs: Any) -> None:
        expected = torch.as_tensor(theirs, dtype=torch.float64)
        difference = ours.detach().double() - expected
        by_norm = float(difference.norm() / expected.norm().clamp(min=1e-30))
        by_maximum = float(difference.abs().max() / expected.abs().max().clamp(min=1e-30))
        before = self.errors.get(kind, (0.0, 0.0))
        pairs = zip(before, (by_norm, by_maximum), strict=True)
        # max() would drop a nan
        self.errors[kind] = tuple(math.inf if math.isnan(b) else max(a, b) for a, b in pairs)

    def add_all(
        self, kind: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
    ) -> None:
        if ours.keys() != theirs.keys():
            raise ValueError(f"{kind}: other names: {sorted(ours.keys() ^ theirs.keys())}")
        for name, value in ours.items():
            if name.endswith("attn.qkv.bias") and kind.startswith("final"):
                pairs = zip(value.chunk(3), theirs[name].chunk(3), strict=True)
                for part, (mine, expected) in zip("qkv", pairs, strict=True):
                    self.add(f"{kind}, {NOT_JUDGED}" if part == "k" else kind, mine, expected)
            else:
                self.add(kind, value, theirs[name])


def compare_targets(golden: Golden, model: StudentTeacher, comparison: Comparison) -> None:
    """Of step 0; recorded as NAME.FUNCTION with NAME dino or ibot."""
    ours = model.targets(golden.batch(0), golden.meta["teacher_temp"])
    for name, theirs in golden.under("step0/teacher_targets/").items():
        targets = ours[name.partition(".")[0]]
        mine = targets.rows(0, len(targets))
        comparison.add("teacher targets, step 0", mine, theirs.reshape(mine.shape))


def compare_losses(golden: Golden, step: int, values: Any, comparison: Comparison) -> None:
    for name, value in golden.logged(values).items():
        comparison.add(f"{name}", value, golden.meta["expected"][step]["loss"][name])


def check(golden: Golden, interpolation: Interpolation) -> Errors:
    """All steps of a file of one rank."""
    comparison, meta = Comparison(), golden.meta
    compare_targets(golden, golden.model(interpolation), comparison)
    model = golden.model(interpolation)  # again: targets with a centre have moved it
    optimizer = adamw(
        param_groups(model.student, meta["layerwise_decay"], meta["patch_embed_lr_mult"]),
        tuple(meta["betas"]),
    )
    for step in range(meta["steps"]):
        set_rates(optimizer.param_groups, meta["lr"], meta["lr"], meta["weight_decay"])
        losses = model(golden.batch(step), meta["teacher_temp"])
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norms = clip_gradients(model.student, meta["clip_grad"])
        compare_losses(golden, step, losses.values, comparison)
        for name, norm in norms.items():
            comparison.add("gradient norms", norm, meta["expected"][step]["grad_norms"][name])
        if step == 0:
            gradients = {n: p.grad for n, p in model.student.named_parameters()}
            comparison.add_all("clipped gradients", gradients, golden.under("step0/grad_clipped/"))
        optimizer.step()
        model.update_teacher(meta["ema_momentum"])
    for name, network in (("student", model.student), ("teacher", model.teacher)):
        comparison.add_all(f"final {name}", network.state_dict(), golden.under(f"final_{name}/"))
    return comparison.errors


def worst(errors: Errors) -> float:
    """The largest error that is judged."""
    return max(error for kind, (error, _) in errors.items() if NOT_JUDGED not in kind)


def check_ranks(paths: list[Path]) -> list[Errors]:
    """Losses and targets of step 0 of files that one process each recorded together."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (paths, folder), nprocs=len(paths), start_method="spawn"
        )
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(len(paths))]


def _rank(rank: int, paths: list[Path], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=len(paths))
    golden, tried = Golden(paths[rank]), []
    for interpolation in golden.interpolations():
        comparison = Comparison()
        compare_targets(golden, golden.model(interpolation), comparison)
        losses = golden.model(interpolation)(golden.batch(0), golden.meta["teacher_temp"])
        compare_losses(golden, 0, losses.values, comparison)
        tried.append(comparison.errors)
    Path(folder, str(rank)).write_text(json.dumps(min(tried, key=worst)))
    distributed.destroy_process_group()


def check_files(paths: list[Path]) -> dict[str, Errors]:
    """The errors of each file; those of several ranks are run together."""
    found, together = {}, defaultdict(list)
    for path in paths:
        if match := re.fullmatch(r"(.*)_rank\d+of\d+\.npz", path.name):
            together[path.with_name(match[1])].append(path)
        else:
            golden = Golden(path)
            found[path.name] = min(
                (check(golden, way) for way in golden.interpolations()), key=worst
            )
    for group in together.values():
        ranks = sorted(group, key=lambda path: int(re.findall(r"_rank(\d+)of", path.name)[0]))
        found |= {p.name: errors for p, errors in zip(ranks, check_ranks(ranks), strict=True)}
    return found


def main(arguments: list[str]) -> int:
    """The number of files in which something is past the largest error."""
    missed = 0
    for name, errors in check_files([Path(argument) for argument in arguments]).items():
        met = worst(errors) <= LARGEST_ERROR
        missed += not met
        print(f"{name}: {'equal' if met else 'NOT EQUAL'} to {LARGEST_ERROR:.0e}")
        print(f"  {'largest relative error of':<36}by norm  by maximum")
        for kind, (by_norm, by_maximum) in errors.items():
            remark = "  (not judged)" if NOT_JUDGED in kind else ""
            print(f"  {kind:<36}{by_norm:.1e}  {by_maximum:.1e}{remark}")
    return missed


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(min(1, main(sys.argv[1:])))
