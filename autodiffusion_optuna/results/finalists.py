"""Who wins: the best few of the search, scored again on noise that the search never saw. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import VALIDATION_BANK, StudyConfig
from autodiffusion_optuna.errors import StudyError, program
from autodiffusion_optuna.results.held_out import significant
from autodiffusion_optuna.storage.attrs import CANDIDATE, validation_key
from autodiffusion_optuna.storage.studies import stored_config
from autodiffusion_optuna.storage.trials import scored_trials


@dataclass(frozen=True, eq=False)
class Finalist:
    """A candidate that may win. ``stored``: its score on the validation bank, empty before it has one."""

    trial: FrozenTrial
    stored: Mapping[str, Any]

    @property
    def candidate(self) -> Candidate:
        """The candidate itself."""
        return Candidate.from_key(self.trial.user_attrs[CANDIDATE])

    @property
    def searched(self) -> float:
        """Its value in the search."""
        return float(self.trial.values[0])

    @property
    def validated(self) -> float | None:
        """Its value on all validation images; None where it has none."""
        return float(self.stored["rungs"][-1][1]) if "rungs" in self.stored else None

    @property
    def optimism(self) -> float | None:
        """Its value on as many validation images as a candidate of the search has, minus its value in the search.

        Above 0 the search's own images made it look better than it is. None before it has a validation value.
        """
        return float(self.stored["rungs"][0][1]) - self.searched if "rungs" in self.stored else None

    @property
    def failure(self) -> str | None:
        """Why it has no validation value though it was tried."""
        return self.stored.get("failure")

    def to_json(self) -> dict[str, Any]:
        """As printed by ``adopt show --json``."""
        return {
            "trial": self.trial.number,
            "timesteps": list(self.candidate.timesteps),
            "settings": self.candidate.settings_dict,
            "search": self.searched,
            "validation": self.validated,
            "optimism": self.optimism,
            "failure": self.failure,
        }


@dataclass(frozen=True, eq=False)
class Finalists:
    """The finalists of a study, from best to worst, and which trial is its result.

    ``all``: those that are the best few by the search's values now, and earlier ones that have a validation value.
    ``due``: of the best few now, those without a validation value. ``winner``: the best by validation value where
    the choice is ``complete``, else the best by the search's values; None where no candidate is finished.
    """

    all: tuple[Finalist, ...] = ()
    due: tuple[Finalist, ...] = ()
    complete: bool = False
    winner: FrozenTrial | None = None

    @property
    def won(self) -> Finalist | None:
        """The winner as a finalist; None where the search's values alone chose it."""
        return self.all[0] if self.complete else None

    @property
    def validated(self) -> int:
        """Finalists that have a validation value."""
        return sum(finalist.validated is not None for finalist in self.all)

    @property
    def mean_optimism(self) -> float | None:
        """Mean of ``Finalist.optimism`` over those that have one."""
        known = [finalist.optimism for finalist in self.all if finalist.optimism is not None]
        return statistics.fmean(known) if known else None

    def text(self, metric: str, images: int) -> str | None:
        """One sentence: how the winner was chosen, and by how much the search's ``images`` flattered the finalists.

        Not the winner alone: what is lucky on the validation images is chosen by them. None where there are no
        finalists.
        """
        count, mean = len(self.all), self.mean_optimism
        if not self.all:
            return None
        if self.won is None or mean is None:
            return (
                f"best by the search's own values: {self.validated} of {count} finalists are scored on validation noise"
            )
        look = "better" if mean >= 0 else "worse"
        chosen, them = (f"best of {count} finalists", "them look") if count > 1 else ("the only finalist", "it look")
        average = ", on average," if count > 1 else ""
        return (
            f"{chosen} on validation noise; the search's own {images:,} images made {them} "
            f"{significant(abs(mean), 2)} {look}{average} in {metric} than as many others do"
        )

    def doubts(self) -> list[str]:
        """A line for each finalist that could not be scored."""
        return [
            f"trial {finalist.trial.number} is a finalist without a validation score: {finalist.failure}"
            for finalist in self.all
            if finalist.failure is not None
        ]

    def to_json(self, images: int) -> dict[str, Any] | None:
        """As printed by ``adopt show --json``; ``images``: of a validation value. None where there are no finalists."""
        if not self.all:
            return None
        return {
            "images": images,
            "bank": VALIDATION_BANK,
            "complete": self.complete,
            "optimism": self.mean_optimism,
            "finalists": [finalist.to_json() for finalist in self.all],
        }


def choose(trials: Iterable[FrozenTrial], attrs: Mapping[str, Any], config: StudyConfig) -> Finalists:
    """The finalists and the winner among ``trials``; ``attrs``: the study's, where validation values are stored.

    This alone decides which candidate is a study's result. Values on another number of images count for nothing.
    """
    ranked = _distinct(trials)
    if not ranked:
        return Finalists()
    known = [
        Finalist(t, attrs.get(validation_key(t.user_attrs[CANDIDATE], config.validation_images), {})) for t in ranked
    ]
    now = known[: config.finalists]
    earlier = [f for f in known[config.finalists :] if f.validated is not None] if now else []
    best_first = sorted(
        (*now, *earlier), key=lambda f: (f.validated is None, f.validated or 0.0)
    )  # stable: then search
    complete = all(f.stored for f in now) and any(f.validated is not None for f in best_first)
    return Finalists(
        tuple(best_first),
        tuple(f for f in now if f.validated is None),
        complete,
        best_first[0].trial if complete else ranked[0],
    )


def read_finalists(study: optuna.Study, config: StudyConfig | None = None) -> Finalists:
    """``choose`` for a study, with the config that it was last run with, or another one."""
    return choose(study.get_trials(deepcopy=False), study.user_attrs, config or stored_config(study))


def best_candidate(study: optuna.Study) -> Candidate:
    """The study's result (StudyError where no trial is complete)."""
    winner = read_finalists(study).winner
    if winner is None:
        raise StudyError(
            f"study {study.study_name!r} has no finished trial yet; run it first: "
            f"{program()} run --study {study.study_name}"
        )
    return Candidate.from_key(winner.user_attrs[CANDIDATE])


def _distinct(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Complete trials from best to worst, the earlier one of equals, each candidate once."""
    found: dict[str, FrozenTrial] = {}
    for trial in sorted(scored_trials(trials), key=lambda t: (t.values[0], t.number)):
        found.setdefault(trial.user_attrs[CANDIDATE], trial)
    return list(found.values())
