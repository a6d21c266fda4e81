"""What a run warns of is said again by each command that shows, scores, draws or exports what it found."""

from __future__ import annotations

import math
import re

import optuna
import pytest
from command import Adopt
from optuna.trial import create_trial

from autodiffusion_optuna.storage.attrs import SCORE, WARNINGS
from autodiffusion_optuna.storage.trials import stored_score

COMMANDS = (
    ("run",),
    ("show",),
    ("status",),
    ("score", "--images", "64", "--banks", "2"),
    ("sample", "--out", "grid.png", "--images", "2", "--many-steps", "5"),
    ("report", "--out", "page.html", "--no-pictures"),
    ("export", "--format", "json"),
)
STORED = "64 images are few for the features"
LOST = "the features of the best candidate's images have 50% of the reference's variance"


@pytest.fixture
def doubtful(quick: optuna.Study) -> optuna.Study:
    """A finished study that was warned of as it ran, and whose best candidate has lost variety."""
    quick.set_user_attr(WARNINGS, [STORED])
    best = quick.best_trial
    quick.add_trial(
        create_trial(
            value=best.value - 1,
            params=best.params,
            distributions=best.distributions,
            user_attrs=best.user_attrs,
            system_attrs={SCORE: {**stored_score(best), "trace_ratio": math.log(0.5)}},
        )
    )
    return quick


@pytest.mark.usefixtures("doubtful")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_each_command_says_what_is_doubtful(adopt: Adopt, command: tuple[str, ...]) -> None:
    name, *options = command
    done = adopt(name, "--study", "quick", *options)
    assert done.code == 0, done
    for warning in (STORED, LOST):
        assert len(re.findall(rf"^warning: {re.escape(warning)}", done.err, flags=re.MULTILINE)) == 1, done.err
