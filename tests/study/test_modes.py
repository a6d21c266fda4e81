"""Searches of a small real model whose layers are skipped and reused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from tiny_models import write_ddpm

from autodiffusion_optuna.candidate import REUSE, SKIP, Candidate
from autodiffusion_optuna.storage.attrs import CANDIDATE, COST
from autodiffusion_optuna.storage.trials import values_by_key
from autodiffusion_optuna.study import components
from studies import config_with, run

TRIALS = 30


@pytest.fixture
def settings(folder: Path) -> list[str]:
    write_ddpm(folder / "net", sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4)
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    given = ["name=mine", "model.source=net", "score.reference=images.npz", "score.images=16", "sampling.steps=5"]
    return [*given, "search.max_skip=0.6", "search.max_cost=0.8", "search.population=6", "search.parents=3"]


@pytest.mark.parametrize("modes", [["reuse"], ["skip", "reuse"]])
def test_a_search_of_modes_repeats_and_resumes_and_scores_as_without_the_cache(
    folder: Path, settings: list[str], modes: list[str]
) -> None:
    settings = [*settings, f"search.modes={modes}"]
    whole = run(folder / "quick.toml", "sqlite:///whole.db", *settings, f"search.trials={TRIALS}")
    for trials in (11, 15, TRIALS):
        parts = run(folder / "quick.toml", "sqlite:///parts.db", *settings, f"search.trials={trials}")
    assert values_by_key(whole) == values_by_key(parts)
    found = [Candidate.from_key(trial.user_attrs[CANDIDATE]) for trial in whole.trials]
    assert any(any(candidate.units_in(REUSE)) for candidate in found)
    assert any(any(units) for candidate in found for units in candidate.units_in(SKIP)) == ("skip" in modes)
    assert max(trial.user_attrs[COST] for trial in whole.trials) <= 0.8 + 1e-9
    built = components.build(config_with(folder / "quick.toml", *settings, f"search.trials={TRIALS}"))
    plain = replace(built.evaluator, prefix_cache=None)
    complete = whole.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    for trial in complete[::4]:
        assert plain.score(Candidate.from_key(trial.user_attrs[CANDIDATE]), [16]).value == trial.value
