"""The headline's sentence: what it names, and what it says where there is little to say."""

from __future__ import annotations

import pytest

from autodiffusion_optuna.candidate import Candidate, Settings
from autodiffusion_optuna.results.headline import Headline
from autodiffusion_optuna.results.held_out import HeldOut, paired
from autodiffusion_optuna.results.summary import Best, Row

UNIFORM = (750, 500, 250, 0)


def headline(
    found: tuple[float, ...],
    uniform: tuple[float, ...],
    *,
    solver: str = "ddim",
    timesteps: tuple[int, ...] = (9, 5, 2, 0),
    settings: Settings = (),
) -> Headline:
    ours, theirs = HeldOut(100, found), HeldOut(100, uniform)
    best = Best("best found", Candidate(timesteps, settings=settings), 1.0, 5.0, ours, 0, None)
    row = Row("uniform", Candidate(UNIFORM, settings=settings), 1.0, 6.0, theirs)
    return Headline("FD", 64, solver, best, row, paired(ours, theirs))


def test_a_solver_that_is_not_searched_is_named() -> None:
    assert "against 4 (4 of uniform, ddim), on 3 x 100" in headline((2.0, 2.1, 1.9), (4.0, 4.1, 3.9)).text()
    searched = headline((2.0, 2.1, 1.9), (4.0, 4.1, 3.9), solver="", settings=(("solver", "heun"),))
    assert "(4 of uniform, solver heun), on" in searched.text()


def test_a_winner_that_is_uniform_itself_is_called_so() -> None:
    same = headline((4.0, 4.1, 3.9), (4.0, 4.1, 3.9), timesteps=UNIFORM)
    assert same.text() == "FD 4 (4 of uniform, ddim), on 3 x 100 held-out images: nothing better than these was found"


@pytest.mark.parametrize(
    ("found", "said"), [(3.999, "less than 1 % lower"), (4.001, "less than 1 % higher"), (3.0, "25 % lower")]
)
def test_a_small_change_is_not_called_none(found: float, said: str) -> None:
    assert headline((found,) * 3, (4.0,) * 3).change_text == said
