"""The units of a network that can be skipped, and the switch that skips them.

A unit is a residual block or an attention block. A skipped unit returns what its residual branch would be
added to, so skipping equals zeroing that branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ModelError

Forward = Callable[..., Any]


def _resnet(block: Any) -> Forward:
    """ResnetBlock2D: resampled if the block resamples, then its 1x1 shortcut if it has one."""

    def shortcut(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        resample = block.upsample or block.downsample
        if resample is not None:
            x = resample(x)
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(x)
        out: Tensor = x / block.output_scale_factor
        return out

    return shortcut


def _attention(block: Any) -> Forward | None:
    """Attention that adds its own input; without that connection the sum lies outside, and it is no unit."""
    if not block.residual_connection:
        return None

    def shortcut(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        out: Tensor = hidden_states / block.rescale_output_factor
        return out

    return shortcut


RULES: dict[str, Callable[[Any], Forward | None]] = {
    "ResnetBlock2D": _resnet,
    "Attention": _attention,
}
"""Class name of a module -> rule giving what the module returns when skipped, or None if it is no unit."""


class _Switch:
    """Stands in for a module's ``forward`` and bypasses it while ``skip`` is true."""

    def __init__(self, forward: Forward, shortcut: Forward) -> None:
        self.forward = forward
        self.shortcut = shortcut
        self.skip = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.shortcut(*args, **kwargs) if self.skip else self.forward(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Units:
    """The skippable units of one network in execution order.

    ``names``: module paths. ``kinds``: class names, keys of ``RULES``. Bit u of a skip set is unit u.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    _switches: tuple[_Switch, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def mask(self) -> int:
        """The skip set now in force."""
        return sum(1 << u for u, switch in enumerate(self._switches) if switch.skip)

    def apply(self, mask: int) -> None:
        """Skip exactly the units in ``mask`` from now on. ``ModelError`` where it names none of them."""
        if mask < 0 or mask >> len(self):
            raise ModelError(
                f"skip set {mask:#x} names a unit that does not exist; this model has {len(self)} units, "
                f"so sets lie in [0, {(1 << len(self)) - 1:#x}]"
            )
        for u, switch in enumerate(self._switches):
            switch.skip = bool(mask >> u & 1)


@contextlib.contextmanager
def skipping(units: Units, mask: int) -> Iterator[None]:
    """Skip the units in ``mask`` inside the block; afterwards what was skipped before is skipped again."""
    before = units.mask
    units.apply(mask)
    try:
        yield
    finally:
        units.apply(before)


def find_units(network: nn.Module, run: Callable[[], object]) -> Units:
    """Units of ``network`` in the order in which ``run()``, one forward pass of it, reaches them.

    Each unit's ``forward`` is replaced on the instance by a switch, once however often this is called.
    """
    shortcuts = {name: shortcut for name, module in network.named_modules() if (shortcut := _shortcut(module))}
    order = _execution_order(network, shortcuts, run)
    modules = {name: network.get_submodule(name) for name in order}
    switches = tuple(_switch(modules[name], shortcuts[name]) for name in order)
    return Units(tuple(order), tuple(type(modules[name]).__name__ for name in order), switches)


def _shortcut(module: nn.Module) -> Forward | None:
    rule = RULES.get(type(module).__name__)
    return rule(module) if rule else None


def _execution_order(network: nn.Module, names: dict[str, Forward], run: Callable[[], object]) -> list[str]:
    """``names`` in the order of their first call; those never called are left out."""
    order: dict[str, None] = {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name in names
    ]
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def _switch(module: nn.Module, shortcut: Forward) -> _Switch:
    current = module.forward
    if isinstance(current, _Switch):
        return current
    switch = _Switch(current, shortcut)
    module.forward = switch
    return switch
