"""The rate and the time left that ``adopt status`` shows."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from optuna.trial import create_trial

from autodiffusion_optuna.results.status import read_status
from autodiffusion_optuna.storage.database import open_storage
from studies import begin

URL = "sqlite:///adopt.db"


@pytest.mark.parametrize(
    ("seconds_ago", "rate"),
    [
        ([30, 20, 10, 0], 0.1),
        ([86430, 86420, 86410, 30, 20, 10, 0], 0.1),  # a day's pause
        ([60, 50, 40], 2 / 60),  # a wait that lasts
        ([5000, 4990, 4980], 0.1),  # nobody works any more
        ([10], None),
    ],
    ids=str,
)
def test_the_rate_is_that_of_work(folder: Path, seconds_ago: list[int], rate: float | None) -> None:
    study = begin(folder, URL, "search.warm_starts=[]")
    now = datetime.now()
    for ago in seconds_ago:
        trial = create_trial(value=0.0)
        trial.datetime_complete = now - timedelta(seconds=ago)
        study.add_trial(trial)
    status = read_status(open_storage(URL), study)
    assert status.rate == (rate if rate is None else pytest.approx(rate, rel=0.05))
    left = 24 - len(seconds_ago)
    assert status.seconds_left == (None if rate is None else pytest.approx(left / rate, rel=0.05))
