"""The units of a network, and the switch that lets each of them run, be skipped, or reuse what it gave before.

A unit is a residual block, an attention block or a transformer block. A skipped unit returns its shortcut, what its
residual branch would be added to: skipping equals zeroing that branch. One that reuses adds the branch of an earlier
evaluation to its shortcut of now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.candidate import REUSE, RUN, SKIP, unit_modes
from autodiffusion_optuna.errors import ModelError

Forward = Callable[..., Any]


def _resnet(block: Any, x: Tensor, *args: object, **kwargs: object) -> Any:
    """Resampled if the block resamples, then its 1x1 shortcut if it has one."""
    resample = block.upsample or block.downsample
    if resample is not None:
        x = resample(x)
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    return x / block.output_scale_factor


def _attention(block: Any, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
    return hidden_states / block.rescale_output_factor


def _transformer(model: Any, hidden_states: Tensor, *args: object, return_dict: bool = True, **kwargs: object) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


def _sequence(block: Any, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
    return hidden_states


def _joint_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: object, **kwargs: object
) -> Any:
    """Blocks over an image and a text sequence, which they return in the other order than they take them."""
    text_ends = getattr(block, "context_pre_only", False)  # in the last block of SD3
    return None if text_ends else encoder_hidden_states, hidden_states


SHORTCUTS: dict[str, Forward] = {
    "ResnetBlock2D": _resnet,
    "Attention": _attention,
    "Transformer2DModel": _transformer,
    "BasicTransformerBlock": _sequence,
    "JointTransformerBlock": _joint_block,
    "FluxTransformerBlock": _joint_block,
    "FluxSingleTransformerBlock": _joint_block,
}
"""Class name of a module -> what the module, its first argument, returns when skipped."""


def find_shortcut(module: Any) -> Forward | None:
    """What a module returns when skipped, as a function of its inputs; None where it is no unit."""
    kind = type(module).__name__
    if kind == "Attention" and not module.residual_connection:
        return None  # the sum lies outside
    # Where a transformer of a UNet has several blocks, they are the units, being the finer choice.
    if kind == "Transformer2DModel" and not (module.is_input_continuous and len(module.transformer_blocks) == 1):
        return None
    return partial(SHORTCUTS[kind], module) if kind in SHORTCUTS else None


@dataclass(eq=False)
class Branches:
    """Residual branches of the units, of one batch, that an evaluation of the network takes or leaves.

    ``given``: by index, of the units that reuse. ``keep``: of those whose branches are to be in ``kept`` afterwards;
    each is a list, for a network may call a unit several times in an evaluation. A guided batch holds both halves.
    """

    given: Mapping[int, list[Any]] = field(default_factory=dict)
    keep: frozenset[int] = frozenset()
    kept: dict[int, list[Any]] = field(default_factory=dict)


def _combined(operation: Callable[[Tensor, Tensor], Tensor], one: Any, other: Any) -> Any:
    """What a unit returns, with ``operation`` of each pair of tensors in two such; None, where a stream ends, stays."""
    if isinstance(one, Tensor):
        return operation(one, other)
    if one is None:
        return None
    if isinstance(one, Mapping):  # an output class of diffusers
        return type(one)(**{name: _combined(operation, part, other[name]) for name, part in one.items()})
    return tuple(_combined(operation, *parts) for parts in zip(one, other, strict=True))


def sources(modes: Sequence[int], visits: Sequence[int]) -> dict[int, int]:
    """Evaluations of a run in which a unit reuses its branch, and of each the evaluation that gave it.

    That is the last step at which the unit ran; where a step has several evaluations, the one in the same place, or the
    last. ``modes``: of the unit, at each step; ``visits``: the step of each evaluation, ascending. Where it has not run
    before, it runs instead.
    """
    found: dict[int, int] = {}
    ran: list[int] = []
    for evaluation, step in enumerate(visits):
        earlier = [other for other in ran if visits[other] < step]
        if modes[step] == REUSE and earlier:
            last = [other for other in earlier if visits[other] == visits[earlier[-1]]]
            found[evaluation] = last[min(evaluation - visits.index(step), len(last) - 1)]
        elif modes[step] != SKIP:
            ran.append(evaluation)
    return found


def branch_of(output: Any, shortcut: Any) -> Any:
    """What a unit's residual branch gave, from what it returned and would have returned without."""
    return _combined(torch.sub, output, shortcut)


def added_branch(shortcut: Any, branch: Any) -> Any:
    """What a unit returns with another evaluation's branch."""
    return _combined(torch.add, shortcut, branch)


class Switch:
    """Stands in for a module's ``forward``: runs it, or what its mode asks for instead."""

    def __init__(self, forward: Forward, shortcut: Forward) -> None:
        self.forward, self.shortcut = forward, shortcut
        self.mode, self.compiled = RUN, False
        self.given: Iterator[Any] = iter(())
        self.kept: list[Any] | None = None
        """Where branches go; None: they are not wanted."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns in its mode."""
        if self.mode == SKIP:
            return self.shortcut(*args, **kwargs)
        if self.mode == REUSE:
            return added_branch(self.shortcut(*args, **kwargs), next(self.given))
        output = self.forward(*args, **kwargs)
        if self.kept is not None:
            self.kept.append(branch_of(output, self.shortcut(*args, **kwargs)))
        return output


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one network in execution order. ``names``: module paths."""

    names: tuple[str, ...]
    switches: tuple[Switch, ...]

    def __len__(self) -> int:
        return len(self.names)

    @contextlib.contextmanager
    def in_modes(self, modes: int, branches: Branches | None = None) -> Iterator[None]:
        """Inside the block, one evaluation, units are in ``modes``, two bits each; afterwards as they were.

        ``branches``: what those in mode ``REUSE`` add to their shortcuts, and what those that run are to leave.
        ``ModelError`` where modes name a unit that does not exist or has nothing to reuse.
        """
        branches = branches or Branches()
        self._check(modes, branches)
        before = [(switch.mode, switch.given, switch.kept) for switch in self.switches]
        for u, switch in enumerate(self.switches):
            switch.mode = modes >> 2 * u & 3
            switch.given = iter(branches.given.get(u, ()))
            switch.kept = branches.kept.setdefault(u, []) if u in branches.keep else None
        try:
            yield
        finally:
            for switch, (mode, given, kept) in zip(self.switches, before, strict=True):
                switch.mode, switch.given, switch.kept = mode, given, kept

    def _check(self, modes: int, branches: Branches) -> None:
        if modes < 0 or modes >> 2 * len(self):
            raise ModelError(
                f"modes {modes:#x} name a unit that does not exist; this model has {len(self)} units, two bits each; "
                f"give modes in [0, {(1 << 2 * len(self)) - 1:#x}]"
            )
        for u, mode in unit_modes(modes).items():
            if mode not in (SKIP, REUSE):
                raise ModelError(f"modes {modes:#x} have unit {self.names[u]!r} skipped and reused; give one of them")
            if mode == REUSE and u not in branches.given:
                raise ModelError(f"unit {self.names[u]!r} is to reuse its branch, and no earlier evaluation kept one")


GRAPHS_A_UNIT = 16
"""How often the forward of one unit may be compiled: once for each shape, precision and memory layout it meets."""


def compile_units(units: Units, backend: str | Callable[..., Any] = "inductor") -> None:
    """Run every unit through ``torch.compile`` from now on; a second call changes nothing.

    A unit is compiled when it first runs, and once more for each new shape of its input. What it is to do is asked
    outside, so modes never compile anything. What is compiled rounds differently from what is not.
    ``backend``: of ``torch.compile``.
    """
    allow_graphs(len(units))
    for switch in units.switches:
        if not switch.compiled:
            switch.forward = torch.compile(switch.forward, backend=backend, dynamic=False)
            switch.compiled = True


def allow_graphs(units: int) -> None:
    """Let torch.compile make a graph for each of so many units, whose classes share code and hence a limit.

    Past it they would silently run as before.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, GRAPHS_A_UNIT * units)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)


def find_units(network: nn.Module, run: Callable[[], object]) -> Units:
    """Units of ``network`` in the order in which ``run()``, one forward pass of it, reaches them.

    A unit inside another unit is none. Each unit's ``forward`` is replaced on the instance by a switch, once however
    often this is called.
    """
    found: dict[nn.Module, tuple[str, Forward]] = {}
    for name, module in network.named_modules():  # a module comes before those inside it
        inside = any(name.startswith(f"{unit}.") for unit, _ in found.values())
        if not inside and (shortcut := find_shortcut(module)):
            found[module] = name, shortcut
    order = _execution_order(found, run)
    names, shortcuts = [found[module][0] for module in order], [found[module][1] for module in order]
    return Units(tuple(names), tuple(map(_switch, order, shortcuts)))


def _execution_order(modules: Iterable[nn.Module], run: Callable[[], object]) -> list[nn.Module]:
    """``modules`` in the order of their first call; those never called are left out."""
    order: dict[nn.Module, None] = {}
    hooks = [module.register_forward_pre_hook(lambda module, _: order.setdefault(module)) for module in modules]
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def release(network: nn.Module) -> None:
    """Undo ``find_units``: every module has the ``forward`` that it had."""
    for module in network.modules():
        switch = vars(module).get("forward")
        if not isinstance(switch, Switch):
            continue
        if getattr(switch.forward, "__func__", None) is type(module).forward:
            del module.forward  # the class has its own
        else:
            module.forward = switch.forward


def _switch(module: nn.Module, shortcut: Forward) -> Switch:
    if not isinstance(module.forward, Switch):
        module.forward = Switch(module.forward, shortcut)
    return module.forward
