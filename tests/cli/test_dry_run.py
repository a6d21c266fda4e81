"""``adopt run`` says what a search costs before it starts; ``--dry-run`` stops there, with nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import Adopt, check_refused, listing

COST = re.compile(
    r"^cost: 3 evaluations x 64 images x (\d+) candidates?(?: \+ ([\d,]+) of the starts)? = ([\d,]+) network "
    "evaluations, at most ",
    re.M,
)


def candidates(text: str) -> int:
    """That are left, as the line of costs says."""
    found = COST.search(text)
    assert found is not None, text
    starts = int((found[2] or "0").replace(",", ""))
    assert int(found[3].replace(",", "")) == 3 * 64 * int(found[1]) + starts
    return int(found[1])


def test_a_dry_run_says_the_cost_and_writes_nothing(folder: Path, adopt: Adopt) -> None:
    before = listing(folder)
    dry = adopt("run", "--study", "quick.toml", "--dry-run")
    assert dry.code == 0, dry.err
    assert candidates(dry.out) == 24
    assert "held-out scores" in dry.out
    assert "nothing was written" in dry.out
    assert listing(folder) == before
    shared = adopt("run", "--study", "quick.toml", "--dry-run", "--workers", "4")
    assert "by 4 workers on the CPU" in shared.out
    assert listing(folder) == before


def test_a_run_says_it_too_and_a_resumed_one_what_is_left(folder: Path, adopt: Adopt) -> None:
    first = adopt("run", "--study", "quick.toml", "--set", "search.trials=4")
    assert first.code == 0, first.err
    assert candidates(first.out) == 4
    assert first.out.index("cost: ") < first.out.index("candidates 1 of 4")
    before = {name: (folder / name).read_bytes() for name in listing(folder) if (folder / name).is_file()}
    dry = adopt("run", "--study", "quick.toml", "--dry-run", "--set", "search.trials=9")
    assert candidates(dry.out) == 5
    assert "4 of 9 candidates finished" in dry.out
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert json.loads(adopt("show", "--study", "quick", "--json").out)["budget"] == 4
    finished = adopt("run", "--study", "quick.toml", "--dry-run", "--set", "search.trials=4")
    assert "is finished" in finished.out
    assert "cost: " not in finished.out


def test_values_are_those_of_a_run_that_timed_nothing(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--set", "search.trials=6"]
    assert adopt("run", "--study", "quick.toml", *settings, "--storage", "timed.db").code == 0
    monkeypatch.setattr("autodiffusion_optuna.cli.run.say_cost", lambda *arguments: None)
    assert adopt("run", "--study", "quick.toml", *settings, "--storage", "untimed.db").code == 0
    timed, untimed = (
        json.loads(adopt("show", "--study", "quick", "--json", "--storage", name).out)
        for name in ("timed.db", "untimed.db")
    )
    for key in ("best", "evaluations"):
        assert timed[key] == untimed[key]


def test_all_is_checked(folder: Path, adopt: Adopt) -> None:
    before = listing(folder)
    for arguments, expected in (
        (["--engine", "slrum"], "did you mean 'slurm'"),
        (["--set", "sampling.steps=1001"], "1001"),
        (["--set", "search.warm_starts=['karas']"], "did you mean 'karras'"),
        (["--storage", "no/adopt.db"], "storage folder 'no' does not exist"),
        (["--artifacts", "no/deeper/pictures"], "cannot write artifact folder"),
    ):
        check_refused(adopt("run", "--study", "quick.toml", "--dry-run", *arguments), expected)
    assert listing(folder) == before


def test_options_of_an_engine_that_takes_none_are_refused(folder: Path, adopt: Adopt) -> None:
    dry = adopt("run", "--study", "quick.toml", "--dry-run", "--engine-option", "gpus=1")
    check_refused(dry, "--engine-option 'gpus' needs --engine ray or --engine slurm")


def test_workers_say_it_once(folder: Path, adopt: Adopt) -> None:
    run = adopt("run", "--study", "quick.toml", "--workers", "2", "--set", "search.trials=12")
    assert run.code == 0, run.err
    assert candidates(run.out) == 12
    assert run.out.count("cost: ") == 1
    assert "by 2 workers on the CPU" in run.out
