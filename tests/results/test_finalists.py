"""Who wins: the choice among finalists, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from autodiffusion_optuna.config import BANK_SIZE, SEARCH_BANK, VALIDATION_BANK, StudyConfig, parse_config
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.results.finalists import Finalists, choose
from autodiffusion_optuna.storage.attrs import CANDIDATE, COST, validation_key


def config(**score: Any) -> StudyConfig:
    return parse_config(
        {
            "name": "tested",
            "model": {"source": "mixture"},
            "sampling": {"steps": 1},
            "search": {"trials": 3},
            "score": {"extractor": "pixels", "images": 64, "finalists": 3, "validation_images": 200, **score},
        }
    )


def trials(*values: float | None, keys: tuple[str, ...] = ()) -> list[FrozenTrial]:
    """Trial i tried timestep i; None: it was pruned."""
    made = []
    for number, value in enumerate(values):
        attrs = {CANDIDATE: keys[number] if keys else str(number), COST: 1.0}
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        trial = create_trial(state=state, value=value, user_attrs=attrs)
        trial.number = number
        made.append(trial)
    return made


def validated(images: int = 200, **values: float) -> dict[str, Any]:
    """Stored validation scores by candidate: the key without its first letter; half as far on 64 images."""
    return {
        validation_key(name[1:], images): {"rungs": [[64, value + 0.5], [images, value]], "run": 1, "saved": 0}
        for name, value in values.items()
    }


def numbers(chosen: Finalists) -> list[int]:
    return [finalist.trial.number for finalist in chosen.all]


def winner(chosen: Finalists) -> int:
    assert chosen.winner is not None
    return chosen.winner.number


def test_finalists_are_the_best_few_distinct_complete_candidates() -> None:
    found = trials(4.0, None, 2.0, 2.0, 1.0, 3.0, 1.5, keys=("0", "1", "2", "2", "4", "5", "2"))
    chosen = choose(found, {}, config())
    assert numbers(chosen) == [4, 6, 5]
    assert [finalist.trial.number for finalist in chosen.due] == [4, 6, 5]
    assert not chosen.complete
    assert winner(chosen) == 4


def test_the_best_on_the_validation_bank_wins_once_all_are_scored() -> None:
    found = trials(1.0, 2.0, 3.0, 4.0)
    some = validated(_0=5.0, _1=4.0)
    assert winner(choose(found, some, config())) == 0
    assert [finalist.trial.number for finalist in choose(found, some, config()).due] == [2]
    chosen = choose(found, some | validated(_2=4.5), config())
    assert chosen.complete
    assert winner(chosen) == 1
    assert numbers(chosen) == [1, 2, 0]
    assert not chosen.due


def test_equals_on_the_validation_bank_are_told_apart_by_the_search() -> None:
    assert winner(choose(trials(2.0, 1.0, 3.0), validated(_0=5.0, _1=5.0, _2=5.0), config())) == 1


def test_fewer_candidates_than_finalists_are_enough() -> None:
    assert winner(choose(trials(1.0, 2.0), validated(_0=5.0, _1=4.0), config())) == 1
    nothing = choose(trials(None), {}, config())
    assert (nothing.winner, nothing.all, nothing.complete) == (None, (), False)


def test_earlier_finalists_stay_and_new_ones_are_due() -> None:
    """Three better ones were found after trial 0 had been validated."""
    found = trials(4.0, 1.0, 2.0, 3.0)
    stored = validated(_0=0.5, _1=1.0)
    chosen = choose(found, stored, config())
    assert winner(chosen) == 1
    assert [finalist.trial.number for finalist in chosen.due] == [2, 3]
    later = choose(found, stored | validated(_2=2.0, _3=3.0), config())
    assert winner(later) == 0
    assert numbers(later) == [0, 1, 2, 3]


def test_values_of_another_number_of_images_do_not_compare() -> None:
    stored = validated(_0=5.0, _1=4.0, _2=6.0)
    assert winner(choose(trials(1.0, 2.0, 3.0), stored, config(validation_images=300))) == 0


def test_one_that_could_not_be_scored_is_left_out() -> None:
    failed = {validation_key("1", 200): {"failure": "out of memory"}}
    chosen = choose(trials(1.0, 2.0, 3.0), validated(_0=5.0, _2=4.0) | failed, config())
    assert winner(chosen) == 2
    assert chosen.doubts() == ["trial 1 is a finalist without a validation score: out of memory"]
    assert [finalist.trial.number for finalist in chosen.due] == [1]  # a later run tries it again
    all_failed = {validation_key(key, 200): {"failure": "out of memory"} for key in "012"}
    assert winner(choose(trials(2.0, 1.0, 3.0), all_failed, config())) == 1
    assert not choose(trials(2.0, 1.0, 3.0), all_failed, config()).complete


def test_without_finalists_the_search_chooses() -> None:
    chosen = choose(trials(2.0, 1.0, 3.0), validated(_0=1.0, _1=4.0, _2=3.0), config(finalists=0))
    assert winner(chosen) == 1
    assert (chosen.all, chosen.text("FD", 64), chosen.to_json(200)) == ((), None, None)


def test_the_optimism_of_the_search_is_on_equal_images() -> None:
    chosen = choose(trials(1.0, 2.0, 3.0), validated(_0=5.0, _1=4.0, _2=4.5), config())
    assert chosen.won is not None
    assert chosen.won.optimism == pytest.approx(4.0 + 0.5 - 2.0)
    assert chosen.mean_optimism == pytest.approx((4.5 + 2.5 + 2.0) / 3)
    text = chosen.text("FD", 64)
    assert text is not None
    assert "best of 3 finalists" in text
    assert "the search's own 64 images made them look 3 better, on average, in FD than as many others do" in text
    lucky = choose(trials(9.0), validated(_0=5.0), config()).text("FD", 64)
    assert lucky is not None
    assert "the only finalist on validation noise" in lucky
    assert "made it look 3.5 worse in FD" in lucky


def test_before_all_are_scored_the_best_is_called_the_searchs() -> None:
    text = choose(trials(1.0, 2.0, 3.0), validated(_0=5.0), config()).text("FD", 64)
    assert text == "best by the search's own values: 1 of 3 finalists are scored on validation noise"


def test_sizes_are_the_presets_where_they_are_unset() -> None:
    unset = {"finalists": None, "validation_images": None}
    assert (config(**unset).finalists, config(**unset).validation_images) == (4, 128)
    assert config(**unset, images=BANK_SIZE // 2).validation_images == BANK_SIZE
    table = config(**unset).model_dump(mode="json")
    paper = parse_config(table, ["search.preset=paper"])
    assert paper.finalists == 0
    assert parse_config(table, ["search.preset=paper", "score.finalists=2"]).finalists == 2


def test_fewer_validation_images_than_a_candidates_are_refused() -> None:
    with pytest.raises(ConfigError, match="validation_images 63 must not be fewer than images = 64"):
        config(validation_images=63)


def test_the_validation_bank_is_no_other() -> None:
    assert VALIDATION_BANK not in (SEARCH_BANK, *range(1, 101))
