"""Captions of pictures: which candidate it is, how it was sampled, and what it was worth. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.results.held_out import significant, stored_held_out
from autodiffusion_optuna.results.summary import StudySummary

BEST = "best found"
"""Name of the winner's row."""


def caption(name: str, candidate: Candidate, solver: str, value: str = "") -> str:
    """The row's name, and below it steps, solver, the other settings that were searched, and the value where known."""
    settings = {"solver": solver, **candidate.settings_dict}
    steps = "1 step" if candidate.steps == 1 else f"{candidate.steps} steps"
    others = ", ".join(f"{setting} {value}" for setting, value in settings.items() if setting != "solver")
    return "\n".join(line for line in (name, f"{steps}, {settings['solver']}", others, value) if line)


def captions(summary: StudySummary, named: Iterable[tuple[str, Candidate]]) -> list[tuple[str, Candidate]]:
    """Each candidate with its caption in place of its name; values are those on the headline's held-out images.

    Others are left out: distances of different numbers of images do not compare.
    """
    headline = summary.headline
    held_out = headline and headline.found.held_out
    size = held_out and held_out.size

    def value(candidate: Candidate) -> str:
        scored = size and stored_held_out(summary.attrs, candidate.key, *size)
        return f"{summary.metric} {significant(scored.mean)}, held-out" if scored else ""

    return [(caption(name, c, summary.solver_names, value(c)), c) for name, c in named]
