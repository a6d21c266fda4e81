from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.skip import Units, find_units, skipping

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
    with skipping(units, (1 << len(units)) - 1):
        assert not torch.equal(forward(unet), plain)
    assert torch.equal(forward(unet), plain)


def test_each_unit_alone_equals_zeroing_its_residual_branch(unet: nn.Module) -> None:
    untouched = copy.deepcopy(unet)
    units = units_of(unet)
    plain = forward(unet)
    for u, name in enumerate(units.names):
        expected = forward(without_residual_branch(untouched, name))
        with skipping(units, 1 << u):
            skipped = forward(unet)
        assert (skipped - expected).norm() / expected.norm() < 2e-6
        assert (skipped - plain).norm() / plain.norm() > 1e-4


def test_a_set_of_units_equals_zeroing_all_their_branches(unet: nn.Module) -> None:
    zeroed = copy.deepcopy(unet)
    units = units_of(unet)
    for name in units.names[::2]:
        zeroed = without_residual_branch(zeroed, name)
    with skipping(units, sum(1 << u for u in range(0, len(units), 2))):
        skipped = forward(unet)
    assert (skipped - forward(zeroed)).norm() / skipped.norm() < 2e-6


def test_units_are_found_by_type_in_execution_order(make_unet: Callable[..., nn.Module]) -> None:
    units = units_of(make_unet())
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
    assert set(units.kinds) == {"ResnetBlock2D", "Attention"}
    assert units.kinds[2] == "Attention"


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
    first.apply(0b11)
    assert second.mask == 0b11
    switch = vars(unet.get_submodule(first.names[0]))["forward"]
    assert not isinstance(switch.forward, type(switch))


def test_skipping_restores_what_was_skipped_before(unet: nn.Module) -> None:
    units = units_of(unet)
    units.apply(0b100)
    with skipping(units, 0b011):
        assert units.mask == 0b011
    with pytest.raises(KeyError), skipping(units, 0):
        raise KeyError
    assert units.mask == 0b100


@pytest.mark.parametrize("mask", [-1, 1 << 12])
def test_sets_beyond_the_units_are_refused(mask: int, make_unet: Callable[..., nn.Module]) -> None:
    units = units_of(make_unet())
    with pytest.raises(ModelError, match=r"has 12 units, so sets lie in \[0, 0xfff\]"):
        units.apply(mask)
