"""What the dashboard's pages show: few attributes in words, and all that others have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from dashboard_server import fetch, serving
from optuna_dashboard import wsgi

from autodiffusion_optuna.report.shown import in_words, study_attrs, trial_attrs
from autodiffusion_optuna.storage import attrs
from autodiffusion_optuna.storage.database import open_storage


def words(**stored: str) -> dict[str, str]:
    return {attr["key"]: attr["value"] for attr in trial_attrs([{"key": k, "value": v} for k, v in stored.items()])}


def pages(study_id: int = 1) -> tuple[Any, Any]:
    """What the dashboard's pages ask for: the list of studies, and one of them."""
    storage = open_storage("sqlite:///adopt.db")
    with serving(in_words(wsgi(storage), storage)) as address:
        return fetch(f"{address}/api/studies"), fetch(f"{address}/api/studies/{study_id}")


def test_a_trial_in_words() -> None:
    shown = words(
        candidate="guidance=4.5;solver=heun|940:5,613:9",
        cost="0.8125001", generation="2", stage="2", operator="crossover", parents="[3, 14]", skip_ratio="0.4",
        images="64", worker="box/12/34", retries="1", notable="new best", mine="kept",
    )  # fmt: skip
    assert shown == {
        "timesteps": "940 613",
        "settings": "guidance 4.5, solver heun",
        "layers skipped": "3",
        "layers reused": "1",
        "proposed by": "crossover of 3 and 14",
        "generation": "2",
        "cost": "0.8125",
        "picture": "new best",
        "mine": "kept",
    }


def test_a_baseline_and_what_is_no_candidate() -> None:
    assert words(baseline="karras", operator="baseline", parents="[]", candidate="9,5") == {
        "timesteps": "9 5", "proposed by": "baseline karras",
    }  # fmt: skip
    assert words(candidate="nonsense", failure="out of memory") == {"failure": "out of memory"}


def test_a_study_in_words(quick: optuna.Study) -> None:
    quick.set_user_attr(attrs.WARNINGS, ["few images"])
    shown = {attr["key"]: attr["value"] for attr in study_attrs(quick.user_attrs)}
    assert list(shown) == ["warnings", "model", "sampling", "value", "reference", "written by"]
    assert (shown["model"], shown["sampling"]) == ("mixture", "3 steps, ddim")
    assert shown["value"] == "FD(pixels) of 64 images, lower is better"
    assert shown["reference"] == "bundled with the model, 50,000 images"
    assert shown["warnings"] == "few images"


def test_the_pages_show_few_attributes_and_lose_nothing(quick: optuna.Study, folder: Path) -> None:
    other = optuna.create_study(study_name="other", storage=open_storage("sqlite:///adopt.db"))
    other.set_user_attr("mine", 7)
    other.add_trial(optuna.trial.create_trial(values=[1.0], user_attrs={"worker": "theirs"}))
    listed, page = pages()
    stored = {study.study_name: study.user_attrs for study in optuna.get_all_study_summaries(quick._storage)}
    assert len(page["user_attrs"]) <= 6
    assert len(stored["quick"]) > 20  # nothing is lost in the database
    assert len(page["trials"]) == len(quick.trials)
    assert all(len(trial["user_attrs"]) <= 6 for trial in page["trials"])
    columns = [column["key"] for column in page["union_user_attrs"]]
    assert columns[:2] == ["timesteps", "settings"]
    assert {key["key"] for trial in page["trials"] for key in trial["user_attrs"]} <= set(columns)
    assert {column["key"]: column["sortable"] for column in page["union_user_attrs"]}["generation"] is True
    best = page["best_trials"][0]
    assert best["user_attrs"][0] == {
        "key": "timesteps", "value": quick.best_trial.user_attrs[attrs.CANDIDATE].replace(",", " "),
    }  # fmt: skip
    assert [line["user_attrs"] for line in listed["study_summaries"] if line["study_name"] == "other"] == [
        [{"key": "mine", "value": "7"}]
    ]
    theirs = pages(2)[1]
    assert theirs["trials"][0]["user_attrs"] == [{"key": "worker", "value": "theirs"}]
