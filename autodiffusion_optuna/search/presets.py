"""Sizes of the search: the published ones and ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autodiffusion_optuna.errors import ConfigError, choose_from


@dataclass(frozen=True)
class Preset:
    """Sizes of a search, per generation. What mutation and crossover leave over is random."""

    population_size: int
    parents: int
    mutation: int
    crossover: int
    mutation_probability: float
    stage_one_generations: int
    local: bool
    """Our operators (local moves, shared prefixes) instead of the published ones."""
    tournament: int
    """Parents drawn for each one used; the best of them is."""
    children: int
    """Children made for each one evaluated; the surrogate chooses. 1: no surrogate."""
    strangers: int
    """Random candidates that it may choose instead while no layers are skipped: on a rugged landscape the best is not
    near the parents."""


PRESETS = {
    # AutoDiffusion's ImageNet-64 search (arXiv 2309.10438, as published in its code).
    "paper": Preset(50, 10, 25, 15, 0.25, 5, local=False, tournament=1, children=1, strangers=0),
    "adopt": Preset(20, 6, 12, 6, 0.25, 5, local=True, tournament=2, children=32, strangers=64),
}


def settings_of(preset: str, **given: float | None) -> Preset:
    """The preset with what was given in its place; counts left at None are scaled to the population."""
    if preset not in PRESETS:
        raise ConfigError(choose_from("preset", preset, PRESETS))
    base = PRESETS[preset]
    sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    size = sizes.get("population_size", base.population_size)
    if size < 1:
        raise ConfigError(f"population_size {size} must be at least 1")
    scaled = replace(
        base,
        population_size=size,
        parents=max(1, round(base.parents * size / base.population_size)),
        mutation=base.mutation * size // base.population_size,
        crossover=base.crossover * size // base.population_size,
    )
    settings = replace(scaled, **sizes)
    if settings.parents < 1:
        raise ConfigError(f"parents {settings.parents} must be at least 1")
    if min(settings.mutation, settings.crossover) < 0 or settings.mutation + settings.crossover > size:
        raise ConfigError(
            f"mutation {settings.mutation} and crossover {settings.crossover} must not be negative, "
            f"and together at most population_size {size}"
        )
    if not 0 < settings.mutation_probability <= 1:
        raise ConfigError(f"mutation_probability {settings.mutation_probability} must be in (0, 1]")
    if settings.stage_one_generations < 0:
        raise ConfigError(f"stage_one_generations {settings.stage_one_generations} must not be negative")
    return settings
