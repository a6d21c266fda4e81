from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from search_runs import SPACE, fresh, go, sampler_of, score
from search_spaces import SPACES, units

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search import history
from autodiffusion_optuna.search.evolution import operator_at
from autodiffusion_optuna.search.presets import PRESETS
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.space import SearchSpace


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SPACES)
def test_proposals_are_new_canonical_and_of_their_stage(preset: str, name: str) -> None:
    space = SPACES[name]
    study = fresh(space=space, preset=preset, stage_one_generations=2)
    assert len(set(go(study, 60, space))) == 60
    for trial in study.trials:
        proposal = sampler_of(study).proposal(study, trial.number)
        assert space.is_canonical(proposal.candidate)
        assert trial.params == space.encode(proposal.candidate)
        most = max(skip.bit_count() for skip in proposal.candidate.modes)
        assert most <= space.open_limit(proposal.skip_ratio)
        assert proposal.stage == (2 if proposal.skip_ratio else 1)
        assert all(parent < trial.number for parent in proposal.parents)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["range", "skips", "all open"])
def test_seeds_differ_and_repeat(preset: str, name: str) -> None:
    one, same, other = (go(fresh(seed, SPACES[name], preset=preset), 20, SPACES[name]) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("name", PRESETS)
def test_every_generation_has_exact_numbers_of_each_operator(name: str) -> None:
    preset = PRESETS[name]
    size, random = preset.population_size, preset.population_size - preset.mutation - preset.crossover
    first = Counter(operator_at(index, preset) for index in range(size))
    assert first == {"uniform": 1, "random": size // 2, "mutation": size - size // 2 - 1}
    for generation in range(1, 4):
        counts = Counter(operator_at(generation * size + place, preset) for place in range(size))
        assert counts == {"mutation": preset.mutation, "crossover": preset.crossover, "random": random}


def _strangers(preset: str, space: SearchSpace, **settings: int) -> list[int]:
    """Skip sets in all of the random candidates that took the place of a child, on values without any order."""
    study = fresh(space=space, preset=preset, population_size=20, **settings)
    sampler = sampler_of(study)
    for _ in range(80):
        trial = study.ask()
        study.tell(trial, zlib.crc32(space.suggest(trial).key.encode()) / 2**32)
    proposals = [sampler.proposal(study, number) for number in range(20, 80)]
    bred = [p for n, p in enumerate(proposals, 20) if operator_at(n, sampler.settings) in ("mutation", "crossover")]
    return [sum(skip.bit_count() for skip in p.candidate.modes) for p in bred if p.operator == "random"]


def test_the_surrogate_may_choose_a_stranger() -> None:
    assert _strangers("adopt", SPACES["fixed"])
    assert not any(_strangers("adopt", SPACES["skips"], stage_one_generations=2))  # none in stage two
    assert not _strangers("paper", SPACES["fixed"])


def test_seed_none_is_drawn_once() -> None:
    first, second = AutoDiffusionSampler(SPACE, seed=None), AutoDiffusionSampler(SPACE, seed=None)
    assert first.seed != second.seed
    copy = AutoDiffusionSampler(SPACE, seed=first.seed, population_size=8)
    assert copy.seed == first.seed


SCRIPT = """
import json, sys
import optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
sys.path.insert(0, sys.argv[1])
from search_runs import fresh, go
print(json.dumps(go(fresh(), 20)))
"""


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_another_process_proposes_the_same(hash_seed: str) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == go(fresh(), 20)


@pytest.mark.parametrize(
    "space", [SearchSpace(1000, 4, 4, units=units(20), max_skip=0.2), SPACES["all open"]], ids=["plain", "settings"]
)
def test_resumed_runs_equal_one_run(tmp_path: Path, space: SearchSpace) -> None:
    whole = go(fresh(space=space), 30, space)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    parts = []
    for trials in (11, 4, 15):
        study = optuna.create_study(
            study_name="resumed",
            storage=url,
            load_if_exists=True,
            sampler=AutoDiffusionSampler(space, population_size=8),
        )
        parts += go(study, trials, space)
    assert parts == whole


def test_pickled_sampler_goes_on_alike() -> None:
    study = fresh()
    go(study, 10)
    twin = optuna.create_study(sampler=pickle.loads(pickle.dumps(study.sampler)))
    twin.add_trials(study.trials)
    assert go(twin, 10) == go(study, 10)


def test_reseeding_changes_the_numbers() -> None:
    plain, reseeded = fresh(), fresh()
    reseeded.sampler.reseed_rng()
    assert go(plain, 20) != go(reseeded, 20)


def test_failed_trials_shift_nothing() -> None:
    study, keys = fresh(), []
    for step in range(40):
        trial = study.ask()
        candidate = SPACE.suggest(trial)
        if step % 4 == 2:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, score(candidate))
            keys.append(candidate.key)
    assert keys == go(fresh(), 30)


def test_a_candidate_that_always_fails_is_given_up() -> None:
    study = fresh()
    tried = []
    for _ in range(4):
        trial = study.ask()
        tried.append(SPACE.suggest(trial).key)
        study.tell(trial, state=TrialState.FAIL)
    assert tried[0] == tried[1] != tried[2] == tried[3]


def test_pruned_trials_count_but_are_no_parents() -> None:
    study = fresh(mutation=8, crossover=0)
    sampler = sampler_of(study)
    for number in range(24):
        trial = study.ask()
        candidate = SPACE.suggest(trial)
        if number % 2:
            trial.report(-1e9, 0)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, score(candidate))
    proposals = [sampler.proposal(study, n) for n in range(24)]
    assert [p.generation for p in proposals] == [n // 8 for n in range(24)]
    assert all(parent % 2 == 0 for p in proposals for parent in p.parents)
    assert len({p.candidate.key for p in proposals}) == 24


def test_waiting_and_running_trials_are_not_proposed_again() -> None:
    space = SearchSpace(8, 2, 2)  # 28 candidates
    study = fresh(space=space)
    for timesteps in [(7, 0), (6, 1), (5, 2)]:
        study.enqueue_trial(space.encode(Candidate(timesteps)))
    waiting = {"7,0", "6,1", "5,2"}
    running = [space.suggest(study.ask()).key for _ in range(28)]
    assert set(running[:3]) == waiting
    assert len(set(running)) == 28


def test_late_enqueued_trials_are_not_proposed_either() -> None:
    space = SearchSpace(5, 2, 2)  # 10 candidates
    study = fresh(space=space)
    trial = study.ask()  # asked before, samples after
    for timesteps in [(4, 3), (4, 2), (4, 1), (4, 0), (3, 2), (3, 1), (3, 0), (2, 1), (2, 0)]:
        study.enqueue_trial(space.encode(Candidate(timesteps)))
    assert space.suggest(trial).key == "1,0"


def test_an_exhausted_space_repeats_instead_of_hanging() -> None:
    space = SearchSpace(4, 2, 2)
    for preset in PRESETS:
        keys = go(fresh(space=space, preset=preset), 15, space)
        assert len(set(keys)) == 6


def test_enqueued_baselines_take_places_and_become_parents() -> None:
    study = fresh()
    baseline = Candidate((503, 501, 499, 497))
    study.enqueue_trial(SPACE.encode(baseline), user_attrs={"baseline": "best"})
    sampler = sampler_of(study)
    go(study, 16)
    origin = sampler.proposal(study, 0).origin
    assert origin == {"generation": 0, "stage": 1, "operator": "baseline", "skip_ratio": 0.0, "parents": []}
    assert sampler.proposal(study, 0).candidate == baseline
    assert sampler.proposal(study, 8).generation == 1
    assert 0 in {parent for n in range(8, 16) for parent in sampler.proposal(study, n).parents}


def test_another_sampler_describes_a_serial_run_alike() -> None:
    study = fresh()
    go(study, 30)
    other = AutoDiffusionSampler(SPACE, population_size=8)
    for number in range(30):
        assert other.proposal(study, number) == sampler_of(study).proposal(study, number)
        json.dumps(other.proposal(study, number).origin)


def test_directions_are_respected() -> None:
    space = SPACES["fixed"]
    study = optuna.create_study(direction="maximize", sampler=AutoDiffusionSampler(space, population_size=8))
    for _ in range(60):
        trial = study.ask()
        study.tell(trial, float(sum(space.suggest(trial).timesteps)))
    early = [t.value or 0 for t in study.trials[:8]]
    late = [t.value or 0 for t in study.trials[-8:]]
    assert sum(late) > 1.2 * sum(early)


def test_two_objectives_breed_from_the_front() -> None:
    sampler = AutoDiffusionSampler(SPACE, population_size=8, parents=4, stage_one_generations=1)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for _ in range(60):
        trial = study.ask()
        candidate = SPACE.suggest(trial)
        study.tell(trial, [score(candidate), SPACE.cost(candidate)])
    front = {t.number for t in study.best_trials}
    parents = {p for n in range(52, 60) for p in sampler.proposal(study, n).parents}
    assert parents & front


def test_infinite_values_rank_last() -> None:
    study = fresh(parents=2, mutation=8, crossover=0)
    for number in range(16):
        trial = study.ask()
        SPACE.suggest(trial)
        study.tell(trial, -float("inf") if number < 4 else float(number))
    parents = {p for n in range(8, 16) for p in sampler_of(study).proposal(study, n).parents}
    assert parents == {4, 5}


def test_hyperband_and_partly_fixed_and_foreign_parameters_work() -> None:
    study = optuna.create_study(
        sampler=AutoDiffusionSampler(SPACE, population_size=8), pruner=optuna.pruners.HyperbandPruner()
    )
    study.enqueue_trial({"t_00": 999})
    study.add_trial(
        optuna.create_trial(params={"x": 1}, distributions={"x": optuna.distributions.IntDistribution(0, 3)}, value=-5)
    )

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("other", 0.1, 1, log=True)
        candidate = SPACE.suggest(trial)
        trial.report(score(candidate), 1)
        return score(candidate)

    study.optimize(objective, n_trials=20)
    assert study.trials[0].params["t_00"] == 999
    keys = [SPACE.decode(t.params).key for t in study.trials if "t_00" in t.params]
    assert len(set(keys)) == len(keys) == 20


def test_pareto_front() -> None:
    points = [(1.0, 5.0), (2.0, 2.0), (2.0, 2.0), (3.0, 3.0), (5.0, 1.0), (1.0, 6.0), (6.0, 1.0)]
    assert history.pareto_front(points) == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "papre"}, "did you mean 'paper'"),
        ({"population_size": 0}, "population_size 0"),
        ({"parents": 0}, "parents 0"),
        ({"population_size": 10, "mutation": 8, "crossover": 3}, "together at most population_size 10"),
        ({"mutation": -1}, "must not be negative"),
        ({"mutation_probability": 0.0}, r"in \(0, 1\]"),
        ({"stage_one_generations": -1}, "stage_one_generations -1"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_contradicting_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoDiffusionSampler(SPACE, **arguments)


def test_sizes_scale_with_the_population() -> None:
    settings = AutoDiffusionSampler(preset="paper", population_size=10).settings
    assert (settings.parents, settings.mutation, settings.crossover) == (2, 5, 3)
    with pytest.raises(ConfigError, match="without a space"):
        AutoDiffusionSampler().proposal(optuna.create_study(), 0)


def test_finished_trials_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    space = SearchSpace(1000, 4, 4, units=units(20), max_skip=0.2)
    study = fresh(space=space)
    go(study, 40, space)
    decoded = 0
    original = SearchSpace.decode

    def counting(self: SearchSpace, params: Any) -> Candidate:
        nonlocal decoded
        decoded += 1
        return original(self, params)

    monkeypatch.setattr(SearchSpace, "decode", counting)
    go(study, 10, space)
    assert decoded <= 20  # the new trial and the one before it, not all that were ever finished
