"""The headline of a study: its best candidate against uniform timesteps with the same settings. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autodiffusion_optuna.results.held_out import (
    Difference,
    HeldOut,
    largest_held_out,
    paired,
    significant,
    stored_held_out,
)

if TYPE_CHECKING:
    from autodiffusion_optuna.results.summary import Best, Row, StudySummary

UNIFORM = "uniform"


@dataclass(frozen=True, eq=False)
class Headline:
    """The best found and the uniform baseline of the same solver and settings, measured on the same images.

    ``difference``: of their held-out values, paired by bank; None where one of them has none on the same images, and
    then both rows have none. ``images``: of the search's values. ``solver``: of both, "" where it is searched, for then
    it is one of their settings.
    """

    metric: str
    images: int
    solver: str
    found: Best
    baseline: Row
    difference: Difference | None

    @property
    def found_value(self) -> float:
        """Of the best found: the mean on held-out noise, else its value in the search."""
        return self.found.value if self.found.held_out is None else self.found.held_out.mean

    @property
    def baseline_value(self) -> float | None:
        """Of the baseline, measured as ``found_value``; None where it was not."""
        return self.baseline.value if self.baseline.held_out is None else self.baseline.held_out.mean

    @property
    def measured_on(self) -> str:
        """The images that both values are of, as text."""
        if self.difference is None:
            chosen = "best" if self.found.validated is None else "finalists"
            return f"the search's own {self.images:,} images, which chose the {chosen}"
        return f"{self.difference.banks} x {self.difference.images:,} held-out images"

    @property
    def baseline_name(self) -> str:
        """The baseline with all settings that were searched, as text."""
        return f"{UNIFORM}, {self.baseline.settings}" if self.baseline.settings else self.baseline.name

    @property
    def change(self) -> float | None:
        """How far the best found is from the baseline as a share of it, below 0 where it is lower.

        None where there is no such share: the values are not on the same images, or one is not above 0 (kid).
        """
        found, given = self.found_value, self.baseline_value
        if given is None or found < 0 or given <= 0:
            return None
        return found / given - 1

    @property
    def change_text(self) -> str | None:
        """``change`` as text: ``34 % lower``."""
        if self.change is None:
            return None
        share = abs(self.change)
        size = "less than 1 %" if 0 < share < 0.005 else f"{share:.0%}".replace("%", " %")
        return size + (" lower" if self.change <= 0 else " higher")

    @property
    def is_baseline(self) -> bool:
        """Whether the best found is the baseline itself."""
        return self.found.candidate.key == self.baseline.candidate.key

    def text(self) -> str:
        """One sentence with the metric, both values, the baseline's name, the images and the interval."""
        steps = self.found.candidate.steps
        baseline = ", ".join(text for text in (self.baseline_name, self.solver) if text)
        line = f"{self.metric} {significant(self.found_value)} ({steps} timesteps found)"
        if self.is_baseline:
            line = f"{self.metric} {significant(self.found_value)} ({steps} of {baseline})"
            return f"{line}, on {self.measured_on}: nothing better than these was found"
        if self.baseline_value is None:
            return f"{line}, on {self.measured_on}; {baseline} was not scored"
        line += f" against {significant(self.baseline_value)} ({self.baseline.candidate.steps} of {baseline})"
        line += f", on {self.measured_on}"
        said = [text for text in (self.change_text, self.interval_text) if text]
        return f"{line}: {', '.join(said)}" if said else line

    @property
    def interval_text(self) -> str | None:
        """The difference and its 95 % interval, and what it means where it holds 0."""
        if self.difference is None:
            return None
        found = f"difference {self.difference.text} (95 %)"
        return found if self.difference.clear else f"{found}, which may be chance"

    def to_json(self) -> dict[str, Any]:
        """As printed by ``adopt show --json``."""
        return {
            "baseline": self.baseline_name,
            "timesteps": list(self.baseline.candidate.timesteps),
            "found": self.found_value,
            "uniform": self.baseline_value,
            "change": self.change,
            "difference": difference_json(self.difference, self.baseline.name),
            "text": self.text(),
        }


def headline_of(summary: StudySummary) -> Headline | None:
    """The headline; None where no candidate is finished, or uniform with the best one's settings is not known yet."""
    best = summary.best
    baseline = None if best is None else own_uniform(best, summary.baselines)
    if best is None or baseline is None:
        return None
    found, uniform = _on_the_same(summary, best, baseline)
    difference = paired(found, uniform) if found and uniform else None
    return Headline(
        summary.metric,
        summary.config.score.images,
        "" if "solver" in best.candidate.settings_dict else summary.solver_names,
        replace(best, held_out=found),
        replace(baseline, held_out=uniform),
        difference,
    )


def _on_the_same(summary: StudySummary, *rows: Row) -> list[HeldOut | None]:
    """Held-out values of the rows: those that are shown where they are of the same banks, else the most in common."""
    shown = [row.held_out for row in rows]
    if len({held_out and held_out.size for held_out in shown}) == 1:
        return shown
    size = largest_held_out(summary.attrs, *(row.candidate.key for row in rows))
    return [size and stored_held_out(summary.attrs, row.candidate.key, *size) for row in rows]


def own_uniform(best: Row, baselines: Sequence[Row]) -> Row | None:
    """The uniform baseline that has the settings of ``best``, such as its solver."""
    same = (row for row in baselines if row.candidate.settings == best.candidate.settings)
    return next((row for row in same if is_uniform(row.name)), None)


def is_uniform(name: str) -> bool:
    """Whether a baseline of this name has DDIM's uniform timesteps, with whatever settings."""
    return name == UNIFORM or name.startswith(f"{UNIFORM}, ")


def difference_json(difference: Difference | None, baseline: str) -> dict[str, Any] | None:
    """A difference to a baseline, as printed by ``adopt show --json``."""
    return None if difference is None else {"baseline": baseline, **difference.summary()}
