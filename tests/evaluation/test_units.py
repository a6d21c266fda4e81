from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from skip_masks import skips
from tiny_models import kinds_of
from tiny_pipelines import flux_transformer, sd3_transformer, sd_unet, sdxl_unet
from torch import Tensor, nn

from autodiffusion_optuna.candidate import REUSE, RUN, SKIP, packed
from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.units import (
    GRAPHS_A_UNIT,
    SHORTCUTS,
    Branches,
    Units,
    compile_units,
    find_shortcut,
    find_units,
    sources,
)

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def forward(network: nn.Module) -> Tensor:
    with torch.inference_mode():
        out: Tensor = network(X, torch.tensor(321.0), return_dict=False)[0]
    return out


def units_of(network: nn.Module) -> Units:
    return find_units(network, lambda: forward(network))


def without_residual_branch(network: nn.Module, name: str) -> nn.Module:
    """A copy whose block ``name`` adds zero."""
    zeroed = copy.deepcopy(network)
    block = zeroed.get_submodule(name)
    last = block.get_submodule("conv2" if hasattr(block, "conv2") else "to_out.0")
    for parameter in last.parameters():
        parameter.zero_()
    return zeroed


def test_nothing_skipped_is_bit_equal(unet: nn.Module) -> None:
    plain = forward(unet)
    units = units_of(unet)
    assert torch.equal(forward(unet), plain)
    with units.in_modes(skips((1 << len(units)) - 1)):
        assert not torch.equal(forward(unet), plain)
    assert torch.equal(forward(unet), plain)


def test_each_unit_alone_equals_zeroing_its_residual_branch(unet: nn.Module) -> None:
    untouched = copy.deepcopy(unet)
    units = units_of(unet)
    plain = forward(unet)
    for u, name in enumerate(units.names):
        expected = forward(without_residual_branch(untouched, name))
        with units.in_modes(skips(1 << u)):
            skipped = forward(unet)
        assert (skipped - expected).norm() / expected.norm() < 2e-6
        assert (skipped - plain).norm() / plain.norm() > 1e-4


def test_a_set_of_units_equals_zeroing_all_their_branches(unet: nn.Module) -> None:
    zeroed = copy.deepcopy(unet)
    units = units_of(unet)
    for name in units.names[::2]:
        zeroed = without_residual_branch(zeroed, name)
    with units.in_modes(packed(skips=range(0, len(units), 2))):
        skipped = forward(unet)
    assert (skipped - forward(zeroed)).norm() / skipped.norm() < 2e-6


def test_units_are_found_by_type_in_execution_order(make_unet: Callable[..., nn.Module]) -> None:
    network = make_unet()
    units = units_of(network)
    assert units.names == (
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.resnets.1",
        "up_blocks.0.attentions.1",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
    )
    kinds = kinds_of(network, units)
    assert set(kinds) == {"ResnetBlock2D", "Attention"}
    assert kinds[2] == "Attention"


def test_resampling_blocks_are_units_too(make_unet: Callable[..., nn.Module]) -> None:
    names = units_of(make_unet("resampling")).names
    assert "down_blocks.0.downsamplers.0" in names
    assert "up_blocks.0.upsamplers.0" in names


def test_attention_without_its_own_residual_connection_is_no_unit() -> None:
    from diffusers.models.attention_processor import Attention

    network = nn.Sequential(
        Attention(8, heads=2, dim_head=4), Attention(8, heads=2, dim_head=4, residual_connection=True)
    )
    assert find_units(network, lambda: network(torch.zeros(1, 3, 8))).names == ("1",)


def test_blocks_that_are_never_reached_are_no_units(make_unet: Callable[..., nn.Module]) -> None:
    network = make_unet()
    network.add_module("spare", copy.deepcopy(network.get_submodule("mid_block.resnets.0")))
    assert "spare" not in units_of(network).names


def test_wrapping_twice_does_not_stack(unet: nn.Module) -> None:
    first, second = units_of(unet), units_of(unet)
    assert first.names == second.names
    with first.in_modes(skips(0b11)):
        assert torch.equal(forward(unet), forward(unet))
        assert [switch.mode for switch in second.switches[:3]] == [SKIP, SKIP, RUN]
    switch = vars(unet.get_submodule(first.names[0]))["forward"]
    assert not isinstance(switch.forward, type(switch))


def test_skipping_restores_what_was_skipped_before(unet: nn.Module) -> None:
    units = units_of(unet)
    with units.in_modes(skips(0b100)):
        outer = forward(unet)
        with units.in_modes(skips(0b011)):
            assert not torch.equal(forward(unet), outer)
        with pytest.raises(KeyError), units.in_modes(0):
            raise KeyError
        assert torch.equal(forward(unet), outer)


@pytest.mark.parametrize("modes", [-1, 1 << 24])
def test_modes_beyond_the_units_are_refused(modes: int, make_unet: Callable[..., nn.Module]) -> None:
    units = units_of(make_unet())
    with (
        pytest.raises(ModelError, match=r"has 12 units, two bits each; give modes in \[0, 0xffffff\]"),
        units.in_modes(modes),
    ):
        pass


def test_modes_that_say_two_things_or_have_nothing_to_reuse_are_refused(unet: nn.Module) -> None:
    units = units_of(unet)
    with pytest.raises(ModelError, match=r"'down_blocks\.0\.resnets\.0' skipped and reused"), units.in_modes(0b11):
        pass
    with pytest.raises(ModelError, match=r"' is to reuse its branch, and no earlier"), units.in_modes(0b1000):
        pass


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8
    ).eval()


def pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    ).eval()


def tensor(*shape: int, device: str = "cpu") -> Tensor:
    """Seeded noise; nothing but a shape on the meta device."""
    if device == "meta":
        return torch.empty(*shape, device=device)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def arguments(network: Any, side: int = 8, tokens: int = 5, device: str = "cpu") -> dict[str, Any]:
    """What ``network`` is called with."""
    config, kind = network.config, type(network).__name__
    t = torch.full((1,), 321.0, device=device)
    x = tensor(1, config.in_channels, side, side, device=device)
    if kind == "UNet2DConditionModel":
        text = tensor(1, tokens, config.cross_attention_dim, device=device)
        added = None
        if config.addition_embed_type:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": tensor(1, pooled, device=device), "time_ids": torch.ones(1, 6, device=device)}
        return {"sample": x, "timestep": t, "encoder_hidden_states": text, "added_cond_kwargs": added}
    if kind == "DiTTransformer2DModel":
        return {"hidden_states": x, "timestep": t.long(), "class_labels": t.long()}
    if kind == "PixArtTransformer2DModel":
        added = {"resolution": None, "aspect_ratio": None}
        text = tensor(1, tokens, config.caption_channels)
        return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text, "added_cond_kwargs": added}
    text = {
        "encoder_hidden_states": tensor(1, tokens, config.joint_attention_dim, device=device),
        "pooled_projections": tensor(1, config.pooled_projection_dim, device=device),
    }
    if kind == "SD3Transformer2DModel":
        return {"hidden_states": x, "timestep": t, **text}
    places = {"txt_ids": torch.zeros(tokens, 3, device=device), "img_ids": torch.ones(side, 3, device=device)}
    packed = tensor(1, side, config.in_channels, device=device)
    return {"hidden_states": packed, "timestep": t / 1000, "guidance": t / 100, **text, **places}


NETWORKS: dict[str, Callable[[], Any]] = {
    "sd": sd_unet,
    "sdxl": sdxl_unet,
    "sd3": sd3_transformer,
    "flux": flux_transformer,
    "dit": dit,
    "pixart": pixart,
}
KINDS = {
    "sd": {"ResnetBlock2D": 8, "Transformer2DModel": 4},
    "sdxl": {"ResnetBlock2D": 8, "BasicTransformerBlock": 8},
    "sd3": {"JointTransformerBlock": 3},
    "flux": {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2},
    "dit": {"BasicTransformerBlock": 3},
    "pixart": {"BasicTransformerBlock": 3},
}
ENDS = {
    "ResnetBlock2D": ["conv2"],
    "Attention": ["to_out.0"],
    "Transformer2DModel": ["proj_out"],
    "BasicTransformerBlock": ["attn1.to_out.0", "attn2.to_out.0", "ff.net.2"],
    "JointTransformerBlock": ["attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2", "ff_context.net.2"],
    "FluxTransformerBlock": ["attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"],
    "FluxSingleTransformerBlock": ["proj_out"],
}
"""Class of a unit -> the layers whose outputs alone are added to its inputs; some blocks lack some."""


@torch.inference_mode()
def output(network: Any, **inputs: Any) -> Tensor:
    out: Tensor = network(**inputs, return_dict=False)[0]
    return out


def with_zeroed_ends(network: nn.Module, name: str, kind: str) -> nn.Module:
    zeroed = copy.deepcopy(network)
    block = zeroed.get_submodule(name)
    layers = dict(block.named_modules())
    ends = [layers[end] for end in ENDS[kind] if layers.get(end) is not None]
    assert ends
    for parameter in (parameter for end in ends for parameter in end.parameters()):
        parameter.data.zero_()
    return zeroed


def test_every_rule_is_tested() -> None:
    assert set(SHORTCUTS) == set(ENDS) == {"Attention", *(kind for kinds in KINDS.values() for kind in kinds)}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_each_unit_of_a_transformer_alone_equals_zeroing_its_branch(name: str) -> None:
    network = NETWORKS[name]()
    untouched, inputs = copy.deepcopy(network), arguments(network)
    plain = output(network, **inputs)
    units = find_units(network, lambda: output(network, **inputs))
    kinds = kinds_of(network, units)
    assert Counter(kinds) == KINDS[name]
    assert torch.equal(output(network, **inputs), plain)
    for u, (unit, kind) in enumerate(zip(units.names, kinds, strict=True)):
        with units.in_modes(skips(1 << u)):
            skipped = output(network, **inputs)
        expected = output(with_zeroed_ends(untouched, unit, kind), **inputs)
        assert (skipped - expected).norm() / expected.norm() < 2e-6, unit
        assert not torch.equal(skipped, plain), unit
    with units.in_modes(skips((1 << len(units)) - 1)):
        assert output(network, **inputs).isfinite().all()
    assert torch.equal(output(network, **inputs), plain)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_each_unit_of_a_transformer_reuses_the_branch_that_it_gave(name: str) -> None:
    network = NETWORKS[name]()
    inputs = arguments(network)
    units = find_units(network, lambda: output(network, **inputs))
    first = "sample" if "sample" in inputs else "hidden_states"
    others = {**inputs, first: 0.5 * inputs[first]}
    plain, everything = output(network, **others), Branches(keep=frozenset(range(len(units))))
    with units.in_modes(0, everything):
        assert torch.equal(output(network, **others), plain), "keeping branches changes what the network returns"
    with units.in_modes(0, earlier := Branches(keep=everything.keep)):
        output(network, **inputs)
    assert earlier.kept.keys() == everything.kept.keys() == set(range(len(units)))
    for u, unit in enumerate(units.names):
        with units.in_modes(REUSE << 2 * u, Branches(everything.kept)):
            torch.testing.assert_close(output(network, **others), plain, rtol=1e-4, atol=1e-5)  # its own branch
        with units.in_modes(REUSE << 2 * u, Branches(earlier.kept)):
            reused = output(network, **others)
        with units.in_modes(SKIP << 2 * u):
            skipped = output(network, **others)
        assert not torch.allclose(reused, plain, atol=1e-6), unit
        assert not torch.allclose(reused, skipped, atol=1e-6), unit


def test_a_resnet_that_reuses_adds_what_it_added_then(unet: nn.Module) -> None:
    units = units_of(unet)
    block: Any = unet.get_submodule("mid_block.resnets.0")
    u, channels = units.names.index("mid_block.resnets.0"), block.conv1.in_channels
    one, other = torch.randn(2, 1, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    time = torch.ones(1, block.time_emb_proj.in_features)
    shortcut = find_shortcut(block)
    assert shortcut is not None
    with units.in_modes(0, branches := Branches(keep=frozenset([u]))):
        gave = block(one, time)
    with units.in_modes(REUSE << 2 * u, Branches(branches.kept)):
        torch.testing.assert_close(block(other, time), shortcut(other) + (gave - shortcut(one)))


def test_a_unit_that_is_called_twice_keeps_a_branch_of_each_call(unet: nn.Module) -> None:
    units = units_of(unet)
    block: Any = unet.get_submodule("mid_block.resnets.0")
    u, channels = units.names.index("mid_block.resnets.0"), block.conv1.in_channels
    halves = torch.randn(2, 1, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    time = torch.ones(1, block.time_emb_proj.in_features)
    with units.in_modes(0, branches := Branches(keep=frozenset([u]))):
        gave = [block(half, time) for half in halves]
    with units.in_modes(REUSE << 2 * u, Branches(branches.kept)):
        for half, expected in zip(halves, gave, strict=True):
            torch.testing.assert_close(block(half, time), expected)


@pytest.mark.parametrize(
    ("modes", "visits", "found"),
    [
        ([RUN, REUSE, REUSE, RUN, REUSE], [0, 1, 2, 3, 4], {1: 0, 2: 0, 4: 3}),
        ([RUN, SKIP, REUSE], [0, 1, 2], {2: 0}),  # what is skipped gives nothing
        ([REUSE, REUSE, SKIP], [0, 1, 2], {1: 0}),  # at first there is nothing to reuse
        ([RUN, REUSE, RUN, REUSE], [0, 1, 1, 2, 2, 3, 3], {1: 0, 2: 0, 5: 3, 6: 4}),  # Heun: by place in the step
        ([RUN, REUSE], [0, 0, 1], {2: 0}),
    ],
)
def test_a_branch_comes_from_the_last_step_at_which_the_unit_ran(
    modes: list[int], visits: list[int], found: dict[int, int]
) -> None:
    assert sources(modes, visits) == found


def test_a_skipped_transformer_answers_as_it_is_asked() -> None:
    network = sd_unet()
    units = find_units(network, lambda: output(network, **arguments(network)))
    block = network.get_submodule("down_blocks.0.attentions.0")
    x, text = tensor(1, 16, 8, 8), tensor(1, 5, 32)
    with units.in_modes(skips((1 << len(units)) - 1)):
        assert block(x, encoder_hidden_states=text).sample is x
        assert block(x, encoder_hidden_states=text, return_dict=False) == (x,)


def test_blocks_over_two_sequences_return_them_in_the_order_of_the_network() -> None:
    network = sd3_transformer()
    inputs = arguments(network)
    units = find_units(network, lambda: output(network, **inputs))
    with units.in_modes(skips(0b010)):
        skipped = output(network, **inputs)
    assert torch.equal(skipped, output(network, **inputs, skip_layers=[1]))
    image, text = tensor(1, 16, 32), tensor(1, 5, 32)
    first, last = network.transformer_blocks[0], network.transformer_blocks[2]
    with units.in_modes(skips(0b111)):
        assert first(image, text, None) == (text, image)
        assert last(hidden_states=image, encoder_hidden_states=text, temb=None) == (None, image)


RELEASED: dict[str, tuple[str, dict[str, Any], int, dict[str, int]]] = {
    "SD 1.5": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 768, "sample_size": 64},
        64,
        {"ResnetBlock2D": 22, "Transformer2DModel": 16},
    ),
    "SDXL": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        128,
        {"ResnetBlock2D": 17, "BasicTransformerBlock": 70},
    ),
    "SD3": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        128,
        {"JointTransformerBlock": 24},
    ),
    "FLUX.1": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        4096,
        {"FluxTransformerBlock": 19, "FluxSingleTransformerBlock": 38},
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_the_units_that_are_published(name: str) -> None:
    import diffusers

    kind, config, side, counts = RELEASED[name]
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**config)
    inputs = arguments(network, side, 77, "meta")
    units = find_units(network, lambda: output(network, **inputs))
    assert Counter(kinds_of(network, units)) == counts
    assert len(units) == {"SD 1.5": 38, "SDXL": 87, "SD3": 24, "FLUX.1": 57}[name]


class CountingBackend:
    """Of torch.compile: keeps every graph it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        run: Callable[..., Any] = graph.forward
        return run


@pytest.fixture
def backend() -> Iterator[CountingBackend]:
    """A fresh compiler, with its limits as they were afterwards."""
    from torch._dynamo import config

    torch._dynamo.reset()
    limits = {name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with config.patch(limits):
        yield CountingBackend()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_masks_never_compile_anything_again(name: str, backend: CountingBackend) -> None:
    network = NETWORKS[name]()
    inputs = arguments(network)
    units = find_units(network, lambda: output(network, **inputs))
    chance = random.Random(0)
    masks = [0, (1 << len(units)) - 2, *(chance.getrandbits(len(units)) for _ in range(10))]
    plain = []
    for mask in masks:
        with units.in_modes(skips(mask)):
            plain.append(output(network, **inputs))
    compile_units(units, backend)
    compile_units(units, backend)
    compiled = []
    for i, mask in enumerate(masks):
        before = len(backend.graphs)
        with units.in_modes(skips(mask)):
            compiled.append(output(network, **inputs))
        assert i < 2 or len(backend.graphs) == before, f"mask {mask:#x} was compiled for"
    print(f"{name}: {len(units)} units, {len(backend.graphs)} graphs")
    assert 0 < len(backend.graphs) <= 2 * len(units)
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_compiling_allows_a_graph_for_every_shape(backend: CountingBackend) -> None:
    from diffusers.models.attention_processor import Attention
    from torch._dynamo import config

    network = nn.Sequential(Attention(8, heads=2, dim_head=4, residual_connection=True)).eval()
    units = find_units(network, lambda: network(torch.zeros(1, 3, 8)))
    compile_units(units, backend)
    assert config.recompile_limit >= GRAPHS_A_UNIT > 8
    for _ in range(2):
        for side in range(2, 12):
            with torch.inference_mode():
                network(torch.zeros(1, side, 8))
        assert len(backend.graphs) == 10
