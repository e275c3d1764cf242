"""The backbone against timm's, and packed passes against separate ones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch._dynamo.backends.common import aot_autograd

from pretrain.layers import draw_kept
from pretrain.vit import VIT_SIZES, ViT, ViTConfig, compile_blocks
from pretrain.weights import from_timm

SMALL = ViTConfig(width=32, depth=2, heads=2, image_size=84, registers=2)
TIMM = replace(ViTConfig(), interpolate_offset=0.0, interpolate_antialias=True)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Parameters moved away from their initial values, where much is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def images(batch: int, size: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def giant() -> VisionTransformer:
    """timm's ViT-g/14 cut to two blocks and 1/8 of the width."""
    return VisionTransformer(
        518, 14, num_classes=0, embed_dim=192, depth=2, num_heads=3, init_values=1e-5,
        mlp_ratio=2.66667 * 2, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU,
        dynamic_img_size=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "reg4", "giant"])
def test_tokens_are_those_of_timm(name: str) -> None:
    if name == "giant":
        theirs, config = giant(), replace(TIMM, width=192, depth=2, heads=3, ffn="swiglu")
    else:
        full = {"plain": "vit_small_patch14_dinov2", "reg4": "vit_small_patch14_reg4_dinov2"}[name]
        theirs = timm.create_model(full, pretrained=False, num_classes=0, dynamic_img_size=True)
        config = replace(TIMM, registers=4 if name == "reg4" else 0)
    randomised(theirs).eval()
    ours = ViT(config).eval()
    ours.load_state_dict(from_timm(theirs.state_dict()))
    crops = [images(1, 98), images(1, 224), images(1, 518)]
    with torch.inference_mode():
        for crop, tokens in zip(crops, ours(crops), strict=True):
            expected = theirs.forward_features(crop)
            found = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
            assert (found - expected).abs().max() < 1e-4
        before, last = ours.intermediate_layers(crops[0], 2)
        layers = theirs.get_intermediate_layers(crops[0], n=2, norm=True)
        assert (before.patches - layers[0]).abs().max() < 1e-4
        assert (last.patches - layers[1]).abs().max() < 1e-4


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_packed_crops_give_what_separate_ones_give(ffn: str, drop_path: float) -> None:
    model = randomised(ViT(replace(SMALL, ffn=ffn, drop_path=drop_path))).eval()
    crops, mask = [images(3, 84), images(2, 42)], torch.zeros(3, 36, dtype=torch.bool)
    mask[0, :7] = mask[2, 30:] = True
    packed = model(crops, [mask, None])
    for crop, a_mask, tokens in zip(crops, [mask, None], packed, strict=True):
        (alone,) = model([crop], [a_mask])
        for name in tokens._fields:
            assert torch.allclose(getattr(tokens, name), getattr(alone, name), atol=1e-5)
    assert [t.patches.shape for t in packed] == [(3, 36, 32), (2, 9, 32)]
    assert packed[0].registers.shape == (3, 2, 32)


def test_a_masked_patch_is_not_seen_but_its_place_is() -> None:
    model = randomised(ViT(SMALL)).eval()
    one, other = images(2, 84), images(2, 84)
    other[0, :, :14, :14] += 1.0  # the first patch
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[0, 0] = True
    with torch.inference_mode():
        assert torch.equal(model([one], [mask])[0].cls, model([other], [mask])[0].cls)
        moved = mask.roll(1, dims=1)
        assert not torch.allclose(model([one], [mask])[0].cls, model([one], [moved])[0].cls)


def test_drop_path_keeps_the_residual_in_expectation() -> None:
    model = randomised(ViT(replace(SMALL, depth=1, drop_path=0.4)))
    crop = images(5, 84)
    with torch.inference_mode():
        model.eval()
        groups = ((5, 39),)
        x, _ = model._embed([crop], [None])
        block = model.blocks[0]
        around = (block.norm1, block.ls1)
        whole = x + block.attn(x, around, groups)
        torch.manual_seed(0)
        mean = torch.zeros_like(x)
        for _ in range(400):
            kept = draw_kept(groups, 0.4, x.device)
            part = block.attn(x[kept.tokens], around, kept.groups)
            mean += x.index_add(0, kept.tokens, part * kept.scale) / 400
    assert (mean - whole).abs().mean() < 0.1 * (whole - x).abs().mean()


@pytest.mark.parametrize(("batch", "drop", "kept"), [(8, 0.4, 4), (3, 0.9, 1), (1, 0.3, 1)])
def test_the_kept_part_is_the_official_one(batch: int, drop: float, kept: int) -> None:
    groups = ((batch, 5), (2 * batch, 3))
    drawn = draw_kept(groups, drop, torch.device("cpu"))
    assert drawn.groups[0] == (kept, 5)
    first = drawn.tokens[: kept * 5].view(kept, 5)
    assert (first[:, 0] % 5 == 0).all()
    assert (first.diff(dim=1) == 1).all()  # whole sequences
    assert drawn.scale[0].item() == pytest.approx(batch / kept)
    assert drawn.tokens[kept * 5 :].min() >= batch * 5
    assert len(drawn.tokens.unique()) == len(drawn.tokens)


def test_attention_and_ffn_drop_different_sequences() -> None:
    model, drawn = ViT(replace(SMALL, depth=1, drop_path=0.5)), []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: drawn.append(arguments[2]))
    torch.manual_seed(0)
    model([images(8, 84)])
    attention, ffn = drawn[0]
    assert set(attention.tokens.tolist()) != set(ffn.tokens.tolist())


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("registers", [0, 2])
def test_asked_for_tokens_are_those_of_the_whole(registers: int, drop_path: float) -> None:
    model = randomised(ViT(replace(SMALL, registers=registers, drop_path=drop_path)))
    crops, asked = [images(3, 84), images(2, 42)], torch.tensor([0, 5, 40, 41, 107])
    torch.manual_seed(0)
    whole = model(crops)
    torch.manual_seed(0)
    part = model(crops, patches=asked)
    for found, expected in zip(part, whole, strict=True):
        assert torch.allclose(found.cls, expected.cls, atol=1e-5)
    assert torch.allclose(part[0].patches, whole[0].patches.flatten(0, 1)[asked], atol=1e-5)
    assert part[1].patches.numel() == part[0].registers.numel() == 0


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointed_and_compiled_blocks_give_the_same_gradients(drop_path: float) -> None:
    config = replace(SMALL, drop_path=drop_path)
    crops, gradients = [images(4, 84), images(4, 42)], []
    for way in ("plain", "checkpointed", "compiled"):
        model = randomised(ViT(config, activation_checkpointing=way == "checkpointed"))
        model.load_state_dict(randomised(ViT(config, False), 1).state_dict() | _parameters(config))
        if way == "compiled":
            compile_blocks(model, backend="aot_eager")
        torch.manual_seed(7)
        tokens = model(crops)
        (tokens[0].patches.square().sum() + tokens[1].cls.sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            if gradient is not None:
                assert torch.allclose(other[name], gradient, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_blocks_are_one_graph_and_do_no_product_again(dtype: torch.dtype) -> None:
    """Of the student; another one is the teacher's. A product has two gradients."""
    graphs: dict[str, list[int]] = {"forward": [], "backward": []}

    def counted(kind: str) -> Callable[[torch.fx.GraphModule, list[torch.Tensor]], object]:
        def compile_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
            called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            graphs[kind].append(sum("mm.default" in name for name in called))
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=counted("forward"),
        bw_compiler=counted("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    model = ViT(replace(SMALL, depth=3, drop_path=0.5))
    compile_blocks(model, backend=backend)
    for asked in (5, 7):
        with torch.autocast("cpu", dtype):
            tokens = model([images(4, 84), images(4, 42)], patches=torch.arange(asked))
        (tokens[0].patches.float().square().sum() + tokens[1].cls.float().sum()).backward()
    torch._dynamo.reset()
    assert graphs == {"forward": [4], "backward": [8]}


@pytest.mark.slow
def test_inductor_compiles_a_block() -> None:
    """What `parallel.compile` does; on a CPU it needs a C++ compiler."""
    config = replace(SMALL, depth=1, drop_path=0.5)
    crops, found = [images(4, 84), images(4, 42)], []
    for compiled in (False, True):
        model = ViT(config)
        model.load_state_dict(_parameters(config))
        if compiled:
            compile_blocks(model)
        torch.manual_seed(7)
        tokens = model(crops)
        (tokens[0].patches.square().sum() + tokens[1].cls.sum()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"cls": tokens[0].cls.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-4, msg=name)


def _parameters(config: ViTConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return randomised(ViT(config)).state_dict()


def test_initial_weights_are_the_official_ones() -> None:
    model = ViT(replace(SMALL, width=256, heads=4))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert 0 < model.register_tokens.abs().max() < 1e-5
    assert not model.mask_token.any()
    assert not model.blocks[1].mlp.fc1.bias.any()
    assert (model.blocks[0].ls1.gamma == 1e-5).all()


def test_the_gated_hidden_width_of_vit_g_is_4096() -> None:
    with torch.device("meta"):
        model = ViT(ViTConfig(**VIT_SIZES["giant"]))
    assert model.blocks[0].mlp.w12.weight.shape == (8192, 1536)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.136e9, rel=0.01)
