"""Trials that were enqueued, or begun before by a worker that died: what they try, and what is said of it."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from search_runs import SPACE, fresh, go, sampler_of, score
from search_spaces import SPACES

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.storage.attrs import CANDIDATE, FAILURE, GIVEN_UP

TINY = SearchSpace(5, 2, 2)  # 10 candidates
BEGUN = Candidate((900, 700, 500, 300))
ORIGIN = {"generation": 1, "stage": 1, "operator": "crossover", "skip_ratio": 0.0, "parents": [3, 4]}


def begun(study: optuna.Study, written: int = 0, **attrs: Any) -> optuna.Trial:
    """A trial that a dead worker left with so many of its parameters, taken by another."""
    params = dict(list(SPACE.encode(BEGUN).items())[:written])
    distributions = {name: SPACE.distributions()[name] for name in params}
    study.add_trial(
        optuna.create_trial(state=TrialState.WAITING, params=params, distributions=distributions, user_attrs=attrs)
    )
    return study.ask()


def test_a_published_candidate_is_taken_before_its_parameters_are_stored() -> None:
    study = fresh(space=TINY)
    study.ask().set_user_attr(CANDIDATE, "4,3")
    others = {TINY.suggest(study.ask()).key for _ in range(9)}
    assert len(others) == 9
    assert "4,3" not in others


@pytest.mark.parametrize("written", [0, 3])
def test_a_trial_goes_on_with_the_candidate_that_it_was_begun_with(written: int) -> None:
    study = fresh()
    go(study, 10)
    trial = begun(study, written, **{CANDIDATE: BEGUN.key})
    proposal = sampler_of(study).proposal(study, 10)
    assert (proposal.candidate, proposal.generation) == (BEGUN, 1)
    assert (proposal.operator, proposal.parents) == ("unknown", ())  # it is not what would be proposed now
    assert SPACE.suggest(trial) == BEGUN
    assert go(study, 5)  # and the search goes on


def test_what_is_stored_of_its_origin_stays() -> None:
    study = fresh()
    go(study, 10)
    begun(study, **{CANDIDATE: BEGUN.key, **ORIGIN})
    assert sampler_of(study).proposal(study, 10).origin == ORIGIN


@pytest.mark.parametrize("key", ["nonsense", "", 5, None, "5000,10", "9:ffffffffff,5,2,1", "900,700"])
def test_a_key_of_no_candidate_of_the_space_is_nobodys(key: Any) -> None:
    plain, other = fresh(), fresh()
    for study in (plain, other):
        go(study, 10)
    begun(other, **{CANDIDATE: key, "generation": None, "parents": 7})
    begun(plain)
    assert sampler_of(other).proposal(other, 10) == sampler_of(plain).proposal(plain, 10)
    assert SPACE.suggest(other.ask()) == SPACE.suggest(plain.ask())


ENQUEUED = {
    "all": SPACE.encode(BEGUN),
    "nothing": {},
    "a part": {"t_01": 500},
    "more steps": {"steps": 10},
    "fewer steps": {"steps": 4, "t_00": 3},
    "out of range": {"steps": 10**6, "t_00": 10**6, "t_01": -5},
    "foreign": {"learning_rate": 0.1},
}


@pytest.mark.filterwarnings("ignore:Fixed parameter")
@pytest.mark.parametrize("kind", ENQUEUED)
@pytest.mark.parametrize("key", [None, "910,700,510,300"])
def test_the_proposal_is_what_is_suggested(kind: str, key: str | None) -> None:
    study = fresh()
    go(study, 10)
    study.enqueue_trial(ENQUEUED[kind], user_attrs={} if key is None else {CANDIDATE: key})
    trial = study.ask()
    proposal = sampler_of(study).proposal(study, 10)
    assert proposal.operator == "baseline"
    assert SPACE.suggest(trial) == proposal.candidate
    assert sampler_of(study).proposal(study, 10) == proposal
    study.tell(trial, score(proposal.candidate))
    assert AutoDiffusionSampler(SPACE, population_size=8).proposal(study, 10).candidate == proposal.candidate


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"guidance": "strong"}, "no candidate: .*'strong'"),
        ({"t_00": "first"}, "no candidate: .*'first'"),
        ({"t_00": float("inf")}, "no candidate: .*infinity"),
        ({"solver": "unheard of"}, "'solver' is 'unheard of'; allowed here: ddim, heun, dpmpp"),
    ],
)
def test_enqueued_values_that_are_no_candidate_are_refused_in_one_line(params: dict[str, Any], message: str) -> None:
    study = fresh(space=SPACES["settings"])
    study.enqueue_trial(params)
    study.ask()
    with pytest.raises(ConfigError, match=message) as caught:
        sampler_of(study).proposal(study, 0)
    assert "\n" not in str(caught.value)


def test_the_trial_of_a_foreign_sampler_is_of_unknown_origin() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    keys = go(study, 10)
    proposals = [AutoDiffusionSampler(SPACE, population_size=8).proposal(study, number) for number in range(10)]
    assert [proposal.candidate.key for proposal in proposals] == keys
    assert {proposal.operator for proposal in proposals} == {"unknown"}


def test_starts_are_tried_at_every_second_place_until_none_is_left() -> None:
    starts = [Candidate((900, 700, 500, gap)) for gap in (300, 200, 100)]
    study = optuna.create_study(sampler=AutoDiffusionSampler(SPACE, starts=[starts[0], *starts]))
    study.enqueue_trial(SPACE.encode(starts[1]))
    go(study, 8)
    tried = [SPACE.decode(t.params) for t in study.trials]
    assert [tried[0], tried[2], tried[4]] == [starts[1], starts[0], starts[2]]
    assert len(set(tried)) == 8
    assert [sampler_of(study).proposal(study, n).operator for n in (0, 2, 4)] == ["baseline"] * 3
    assert all(sampler_of(study).proposal(study, n).operator == "mutation" for n in (1, 3, 5, 6, 7))


@pytest.mark.parametrize("timesteps", [(900, 700, 500), (2000, 700, 500, 300)], ids=["too few", "beyond the grid"])
def test_a_start_that_is_no_candidate_is_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="no candidate of the space; give what space"):
        AutoDiffusionSampler(SPACE, starts=[Candidate(timesteps)])
    with pytest.raises(ConfigError, match="there is none"):
        AutoDiffusionSampler(starts=[Candidate(timesteps)])


def test_with_starts_the_published_first_generation_is_as_published() -> None:
    study = optuna.create_study(sampler=AutoDiffusionSampler(SPACE, preset="paper", starts=[BEGUN]))
    go(study, 12)
    operators = [sampler_of(study).proposal(study, n).operator for n in range(12)]
    assert operators == ["baseline", *["random"] * 11]


def test_a_candidate_that_was_begun_by_mistake_is_not_held_against_it() -> None:
    study = optuna.create_study(sampler=AutoDiffusionSampler(SPACE, starts=[BEGUN]))
    study.add_trial(
        optuna.create_trial(
            state=TrialState.FAIL,
            params=(params := SPACE.encode(BEGUN)),
            distributions={name: SPACE.distributions()[name] for name in params},
            user_attrs={CANDIDATE: BEGUN.key, FAILURE: f"{GIVEN_UP}: trial 7 tries the same"},
        )
    )
    assert SPACE.suggest(study.ask()) == BEGUN


def test_parameters_without_a_space_are_random_and_repeatable() -> None:
    def values(seed: int) -> list[dict[str, Any]]:
        study = optuna.create_study(sampler=AutoDiffusionSampler(seed=seed))
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_int("n", 1, 9), n_trials=10)
        return [trial.params for trial in study.trials]

    assert values(1) == values(1) != values(2)
    assert len({params["x"] for params in values(1)}) == 10
