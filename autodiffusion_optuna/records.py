"""What is stored with a study and its trials, under which name, and how it is read. Needs Optuna, never torch."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate

# Study user attrs.
READY = "ready"
CONFIG = "config"
VERSION = "version"
METRIC = "metric"
KNOWN = "known"
"""{name: candidate key} of the known schedules."""
REFERENCE_IMAGES = "reference_images"
"""Images behind the reference's statistics; None where they do not say."""
UNIT_COSTS = "unit_costs"
NOISE = "noise"
"""The model's noise schedule, ``NoiseSchedule.pack``."""
MODEL_FACTS = "model_facts"
"""{kind, prediction, shape, image_shape, guidance, scale}: what an export says of the model; see ``Model``."""
KNOWN_COSTS = "known_costs"
"""{name: cost} of the known schedules."""

WARNINGS = "warnings"
"""[line]: what ``study.warnings`` said when the study was last run; every view shows them again."""

SANITY = "sanity"
"""[line]: what the last check of the model found doubtful, see ``evaluation.sanity``."""

RUNTIME = "runtime"
"""What computed the first values, ``evaluation.runtime.describe_runtime``; any other is kept under ``RUNTIME:…``."""

ARTIFACTS = "artifacts"
"""Where the pictures of this study's trials are kept, see ``artifacts.stored_location``; absent without pictures."""

# Trial user attrs; plain ones, so that optuna-dashboard shows a column of each.
KNOWN_NAME = "known"
CANDIDATE = "candidate"
"""Canonical key."""
GENERATION = "generation"
STAGE = "stage"
"""1: timesteps alone; 2: timesteps and skipped layers."""
OPERATOR = "operator"
"""What proposed it: uniform, random, mutation, crossover or known."""
PARENTS = "parents"
"""Numbers of the trials it was made from."""
SHARE = "share"
"""Largest share of layers that a step could skip."""
COST = "cost"
IMAGES = "images"
"""Images that its value was measured on."""
NOTABLE = "notable"
"""Why the trial has a picture: known, new best, or best of its generation."""
SCORE = "score"
"""{rungs, run, saved, seconds_…}, see ``evaluation.evaluator.Score.to_json``."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def rung_key(images: int) -> str:
    """Trial user attr of the distance at one rung below the last: a column of its own in the dashboard."""
    return f"at {images} images"


# Two-sided 95 % points of Student's t by degrees of freedom; beyond 30 the normal point is close enough.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Fresh:
    """Values of one candidate on disjoint banks of noise, each of ``images`` images.

    ``warning``: what to know about distances of so many images, None where there is nothing.
    """

    images: int
    values: tuple[float, ...]
    warning: str | None = None

    @property
    def banks(self) -> int:
        """Number of banks."""
        return len(self.values)

    @property
    def size(self) -> tuple[int, int]:
        """(images, banks), in the order in which more is better."""
        return self.images, self.banks

    @property
    def mean(self) -> float:
        """Mean over the banks."""
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half the 95 % Student interval of the mean; needs two banks."""
        t = T_95[self.banks - 2] if self.banks - 2 < len(T_95) else 1.96
        return t * statistics.stdev(self.values) / math.sqrt(self.banks)

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {"images": self.images, "values": list(self.values), "warning": self.warning}

    def summary(self) -> dict[str, Any]:
        """As printed by ``adopt show --json``."""
        return {
            "mean": self.mean,
            "low": self.mean - self.half_width,
            "high": self.mean + self.half_width,
            "images": self.images,
            "banks": self.banks,
        }


def fresh_key(candidate_key: str, images: int, banks: int) -> str:
    """Study user attr of a candidate's values on ``banks`` of ``images``; hashed, since attr names are bounded."""
    return f"fresh:{hashlib.sha256(candidate_key.encode()).hexdigest()[:20]}:{images}x{banks}"


def fresh(attrs: Mapping[str, Any], candidate_key: str, images: int, banks: int) -> Fresh | None:
    """Stored fresh values of a candidate on so many images and banks, if any."""
    stored = attrs.get(fresh_key(candidate_key, images, banks))
    return None if stored is None else Fresh(stored["images"], tuple(stored["values"]), stored.get("warning"))


def fresh_sizes(attrs: Mapping[str, Any], candidate_key: str) -> set[tuple[int, int]]:
    """(images, banks) of all of a candidate's fresh values."""
    prefix = fresh_key(candidate_key, 0, 0).rpartition(":")[0] + ":"
    sizes = (key[len(prefix) :].split("x") for key in attrs if key.startswith(prefix))
    return {(int(images), int(banks)) for images, banks in sizes}


def largest_fresh(attrs: Mapping[str, Any], *candidate_keys: str) -> tuple[int, int] | None:
    """(images, banks) on which all of these candidates have fresh values, the most images first.

    Distances of different numbers of images do not compare.
    """
    return max(set.intersection(*(fresh_sizes(attrs, key) for key in candidate_keys)), default=None)


def runtime_key(runtime: Mapping[str, Any]) -> str:
    """Study user attr of a runtime that is not the one the study was begun with."""
    return f"{RUNTIME}:{hashlib.sha256(json.dumps(runtime, sort_keys=True).encode()).hexdigest()[:12]}"


def runtime_warnings(attrs: Mapping[str, Any]) -> list[str]:
    """A line for each other runtime that some of the study's values were computed with."""
    first = attrs.get(RUNTIME)
    others = [attrs[key] for key in sorted(attrs) if key.startswith(f"{RUNTIME}:") and attrs[key] != first]
    return [_runtime_warning(first, other) for other in others] if first else []


def _runtime_warning(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    changed = ", ".join(f"{key} {first.get(key, 'none')} -> {other.get(key, 'none')}" for key in keys)
    return f"some values were computed otherwise than the first ones ({changed}): they may differ in their last digits"


def finished(study: optuna.Study) -> int:
    """Trials that count towards the budget: complete or pruned."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def values_by_key(study: optuna.Study) -> dict[str, float]:
    """Values of complete trials by candidate key."""
    return {t.user_attrs[CANDIDATE]: t.values[0] for t in scored(study.get_trials(deepcopy=False))}


def scored(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Complete trials that say what they tried and at what cost; those of others may not.

    Older versions could be killed before they had written a known schedule's cost: its name tells it.
    """
    complete = (t for t in trials if t.state == TrialState.COMPLETE and t.values)
    return [t for t in complete if _says_candidate(t) and _has_cost(t)]


def _says_candidate(trial: FrozenTrial) -> bool:
    key = trial.user_attrs.get(CANDIDATE)
    return isinstance(key, str) and _is_candidate(key)


@functools.lru_cache(maxsize=2**16)
def _is_candidate(key: str) -> bool:
    try:
        Candidate.from_key(key)
    except ValueError:
        return False
    return True


def _has_cost(trial: FrozenTrial) -> bool:
    cost = trial.user_attrs.get(COST)
    return isinstance(cost, (int, float)) if COST in trial.user_attrs else KNOWN_NAME in trial.user_attrs


def generation(trial: FrozenTrial) -> int:
    """Generation of a trial; 0 for one that does not say."""
    said = trial.user_attrs.get(GENERATION)
    return said if isinstance(said, int) else 0


def score(trial: FrozenTrial) -> Mapping[str, Any]:
    """What the evaluator says of a trial's value; empty for one that was not scored here."""
    said = trial.user_attrs.get(SCORE)
    return said if isinstance(said, dict) else {}
