"""Every name that is stored with a study or a trial. Imports nothing of the package: everybody may read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Study user attrs.
READY = "ready"
CONFIG = "config"
VERSION = "version"
METRIC = "metric"
CODEC = "codec"
"""{codec, T, units, …}: how candidates are written as parameters, ``SearchSpace.codec``."""
MODEL = "model"
"""SHA-256 of the model's weights."""
EXTRACTOR = "extractor"
"""Fingerprint of the feature extractor."""
REFERENCE = "reference"
"""Digest of the reference's statistics."""
CONDITIONS = "conditions"
"""Fingerprint of the labels or prompts; None without them."""
FIGURE_DIGESTS = "figures"
"""{name: digest} of the figures that optuna-dashboard shows of the study."""
BASELINE_KEYS = "baselines"
"""{name: candidate key} of the baselines."""
REFERENCE_IMAGES = "reference_images"
"""Images behind the reference's statistics; None where they do not say."""
UNIT_COSTS = "unit_costs"
"""{mode: [share of a network evaluation that each unit saves in it]}."""
NOISE = "noise"
"""The model's noise schedule, ``NoiseSchedule.pack``."""
MODEL_FACTS = "model_facts"
"""{kind, prediction, shape, image_shape, guidance, scale}: what an export says of the model; see ``Model``."""
BASELINE_COSTS = "baseline_costs"
"""{name: cost} of the baselines."""
START_COSTS = "start_costs"
"""{name: network evaluations x images} of the baselines that were computed, of the teacher that they share, and
of the one that the screen compares with, which is under ``SCREEN_TEACHER``."""
STARTS, SCREEN_TEACHER = "starts", "screen"
START_SECONDS = "start_seconds"
"""{``STARTS``: seconds of computing baselines, ``SCREEN_TEACHER``: of the screen's teacher, of all workers}."""
WARNINGS = "warnings"
"""[line]: what ``study.warnings`` said when the study was last run; every view shows them again."""
SANITY = "sanity"
"""[line]: what the last check of the model found doubtful, see ``evaluation.sanity``."""
RUNTIME = "runtime"
"""What computed the first values, ``evaluation.runtime.describe_runtime``; any other is kept under ``RUNTIME:…``."""
ARTIFACTS = "artifacts"
"""Where the pictures of this study's trials are kept, see ``artifacts.stored_location``; absent without pictures."""
COST_AHEAD = "cost_ahead"
"""{work, pace, parallel}: what was left when workers were last started, seconds of one batch, and the workers that
their first one's host runs side by side; see ``results.cost``."""
HELD_OUT = "held_out"
"""Begins the names of held-out values, see ``held_out_key``."""
VALIDATION = "validation"
"""Begins the names of validation values, see ``validation_key``."""
MANY_STEPS = "many_steps"
"""{candidate, cost} of the floor of many uniform steps that was scored last; its values are held-out values."""
REAL_FLOOR = "real_floor"
"""Distance of real images from the reference, ``results.floors.RealFloor``."""

# Trial user attrs; plain ones, so that optuna-dashboard shows a column of each.
BASELINE = "baseline"
OWNER = "worker"
"""Who runs the trial, as ``lease.owner`` writes it."""
RETRIES = "retries"
"""How often the trial was taken back from a worker that died or fell silent."""
FAILURE = "failure"
"""Why the trial failed, one line."""
GIVEN_UP = "given up at once"
"""How that line begins where the trial was begun by mistake: it says nothing of its candidate."""
CANDIDATE = "candidate"
"""Canonical key."""
GENERATION = "generation"
STAGE = "stage"
"""1: timesteps alone; 2: timesteps and skipped layers."""
OPERATOR = "operator"
"""What proposed it: uniform, random, mutation, crossover, baseline (enqueued or offered) or unknown."""
PARENTS = "parents"
"""Numbers of the trials it was made from."""
SKIP_RATIO = "skip_ratio"
"""Largest ratio of layers that a step could skip."""
COST = "cost"
IMAGES = "images"
"""Images that its value was measured on."""
NOTABLE = "notable"
"""Why the trial has a picture: baseline, new best, or best of its generation."""

# Trial system attr: the dashboard draws user attrs as columns, and this is a table.
SCORE = "adopt:score"
"""{rungs, run, saved, seconds_…}, see ``evaluation.evaluator.Score.to_json``."""

SCREEN = "adopt:screen"
"""[distance to the teacher] of each image of the screen, see ``evaluation.screen``; a table as well."""


def rung_key(images: int) -> str:
    """Trial user attr of the distance at one rung below the last: a column of its own in the dashboard."""
    return f"at {images} images"


def screen_key(images: int) -> str:
    """Trial user attr of the mean distance to the teacher over the screen's images."""
    return f"to the teacher, {images} images"


def held_out_key(candidate_key: str, images: int, banks: int) -> str:
    """Study user attr of a candidate's values on ``banks`` of ``images``; hashed, since attr names are bounded."""
    return f"{HELD_OUT}:{_hashed(candidate_key)}:{images}x{banks}"


def validation_key(candidate_key: str, images: int) -> str:
    """Study user attr of a finalist's score on ``images`` of the validation bank.

    ``evaluation.evaluator.Score.to_json``, or {"failure": one line} where it could not be scored.
    """
    return f"{VALIDATION}:{_hashed(candidate_key)}:{images}"


def _hashed(candidate_key: str) -> str:
    return hashlib.sha256(candidate_key.encode()).hexdigest()[:20]


def runtime_key(runtime: Mapping[str, Any]) -> str:
    """Study user attr of a runtime that is not the one the study was begun with."""
    return f"{RUNTIME}:{hashlib.sha256(json.dumps(runtime, sort_keys=True).encode()).hexdigest()[:12]}"
