"""The dashboard's server: what it publishes, serves and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from command import Adopt
from long_study import long_report
from optuna.trial import TrialState, create_trial
from optuna_dashboard import get_note, save_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from optuna_dashboard._inmemory_cache import _CachedExtraStudyProperty

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import load_config, load_preset, parse_config, presets, tomllib
from autodiffusion_optuna.report import dashboard
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import (
    ARTIFACTS,
    COST,
    GENERATION,
    IMAGES,
    OPERATOR,
    PARENTS,
    SCORE,
    STAGE,
    rung_key,
)
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from studies import run

URL = "sqlite:///adopt.db"


@contextmanager
def serving(app: dashboard.WSGIApp) -> Iterator[str]:
    with dashboard.make_server(app, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.loads(answer.read())


def test_what_is_published_is_served(folder: Path) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=14", "score.pruner=percentile", "score.rungs=[32]")
    dashboard.publish(study, URL)
    with serving(dashboard.make_app(study._storage, None)) as address:
        detail = fetch(f"{address}/api/studies/{study._study_id}")
    assert detail["objective_names"] == ["FD(pixels), 64 images, fewer where pruned"]
    assert {plot["id"] for plot in detail["plotly_graph_objects"]} == {"timesteps", "history", "evaluations"}
    assert all(json.loads(plot["graph_object"])["data"] for plot in detail["plotly_graph_objects"])
    columns = {attr["key"] for attr in detail["union_user_attrs"]}
    assert {GENERATION, STAGE, OPERATOR, COST, IMAGES} <= columns
    assert {PARENTS, rung_key(32)} <= columns
    assert SCORE not in columns
    best = read_summary(study).best
    assert best is not None
    assert " ".join(map(str, best.candidate.timesteps)) in detail["note"]["body"]
    assert "adopt export --study quick\n" in detail["note"]["body"]


def test_the_note_keeps_what_the_user_wrote(folder: Path) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2")
    save_note(study, "mine already")
    dashboard.publish(study, URL)
    assert get_note(study).endswith(dashboard.SIGNATURE + "\n\nmine already")
    save_note(study, get_note(study) + "\nand more")
    version = study._storage.get_study_system_attrs(study._study_id)["dashboard:note_ver"]
    dashboard.publish(study, URL)
    assert study._storage.get_study_system_attrs(study._study_id)["dashboard:note_ver"] == version
    run(folder / "quick.toml", URL, "search.trials=4")
    dashboard.publish(study, URL)
    assert "4 of 4 candidates" in get_note(study)
    assert get_note(study).endswith("mine already\nand more")
    assert get_note(study).count("mine already") == 1


def test_a_figure_of_what_is_no_longer_so_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2")
    skipping = long_report(60)
    monkeypatch.setattr(dashboard, "read_summary", lambda _: skipping)
    dashboard.publish(study, URL)
    assert "heatmap" in plots(study)["masks"]
    assert skipping.best is not None
    plain = replace(skipping.best, candidate=Candidate(skipping.best.candidate.timesteps))
    monkeypatch.setattr(dashboard, "read_summary", lambda _: replace(skipping, best=plain))
    for _ in range(2):
        dashboard.publish(study, URL)
        assert "heatmap" not in plots(study)["masks"]
        assert "nothing to show now" in plots(study)["masks"]


def plots(study: optuna.Study) -> dict[str, str]:
    """Figures as they are stored, by id."""
    return get_plotly_graph_objects(study._storage.get_study_system_attrs(study._study_id))


@pytest.mark.parametrize("name", sorted(presets()))
def test_the_notes_settings_are_a_study_file(name: str) -> None:
    config = load_preset(name)
    text = dashboard.toml(config)
    assert parse_config({**tomllib.loads(text), "name": config.name, "description": config.description}) == config


def test_the_note_tells_searched_settings_and_skipped_layers() -> None:
    report = long_report(60, units=14)
    assert report.best is not None
    plain = dashboard.note_text(report, URL)
    assert "| schedule | FD(digits), 256 images | held-out noise | cost | timesteps |" in plain
    counts = [len(names) for names in report.best.candidate.skip_names(report.units)]
    shown = [f"{t} ({count})" for t, count in zip(report.best.candidate.timesteps, counts, strict=True) if count]
    assert f"skips layers at timesteps (layers of 14): {', '.join(shown)}." in plain

    chosen = Candidate(report.best.candidate.timesteps, settings=(("guidance", 1.5), ("solver", "heun")))
    note = dashboard.note_text(replace(report, best=replace(report.best, candidate=chosen)), URL)
    table = [line for line in note.splitlines() if line.startswith("|")]
    assert "| cost | settings | timesteps |" in table[0]
    assert "| guidance 1.5, solver heun |" in table[2]
    assert {line.count("|") for line in table} == {7}
    assert "skips layers" not in note


def test_no_password_gets_into_the_note(folder: Path) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=1")
    text = dashboard.note_text(read_summary(study), "postgresql+psycopg://me:secret@host/db")
    assert "secret" not in text
    assert "--storage 'postgresql+psycopg://me:***@host/db'" in text


def test_a_new_generation_is_published_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "LOOK_SECONDS", 0.05)
    study = run(folder / "quick.toml", URL, "search.trials=6")
    troubles: list[str] = []
    watched = load_study(open_storage(URL), "quick")
    with dashboard.published(watched, URL, troubles.append):
        assert "6 of 6 candidates" in get_note(study)
        run(folder / "quick.toml", URL, "search.trials=14")
        deadline = time.monotonic() + 30
        while "14 of 14 candidates" not in get_note(study) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "14 of 14 candidates" in get_note(study)
    assert troubles == []


def test_trouble_is_told_once_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "LOOK_SECONDS", 0.01)
    study = run(folder / "quick.toml", URL, "search.trials=2")
    troubles: list[str] = []

    def fail(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError("attempt to write a readonly database\nmore")

    monkeypatch.setattr(dashboard, "publish", fail)
    with dashboard.published(study, URL, troubles.append):
        time.sleep(0.3)
    assert troubles == ["note and figures were not written: attempt to write a readonly database"]


def test_of_a_deleted_study_it_is_said_that_it_was_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "LOOK_SECONDS", 0.01)
    study = run(folder / "quick.toml", URL, "search.trials=2")
    troubles: list[str] = []
    with dashboard.published(study, URL, troubles.append):
        open_storage(URL).delete_study(study._study_id)
        time.sleep(0.3)
    assert troubles == ["note and figures were not written: study 'quick' was deleted"]


def trials_of_all_kinds() -> list[optuna.trial.FrozenTrial]:
    """Numbered trials whose states, attributes and search spaces differ."""
    choice = optuna.distributions.CategoricalDistribution(["x", "y"])
    number, integer = optuna.distributions.FloatDistribution, optuna.distributions.IntDistribution
    kinds: list[tuple[TrialState, dict[str, Any], dict[str, Any]]] = [
        (TrialState.COMPLETE, {"a": (1.0, number(0, 2)), "b": (1, integer(0, 3))}, {"cost": 1.0}),
        (TrialState.COMPLETE, {"a": (5.0, number(1, 9)), "b": (1, integer(0, 3))}, {"cost": "dear"}),
        (TrialState.FAIL, {"z": (1, integer(0, 3))}, {"failure": "why"}),
        (TrialState.PRUNED, {"a": (1.0, number(0, 2))}, {"generation": 3}),
        (TrialState.COMPLETE, {"a": (1.0, number(0, 2)), "c": ("x", choice)}, {}),
        (TrialState.WAITING, {}, {"baseline": "uniform"}),
        (TrialState.COMPLETE, {"b": (1, integer(0, 3)), "a": (1.0, number(0, 2))}, {"cost": 2.0}),
    ]  # fmt: skip
    trials = []
    for position, (state, params, attrs) in enumerate(kinds * 3):
        trial = create_trial(
            state=state,
            params={name: value for name, (value, _) in params.items()},
            distributions={name: distribution for name, (_, distribution) in params.items()},
            user_attrs=attrs,
            values=[1.0] if state == TrialState.COMPLETE else None,
        )
        trial.number = position
        trials.append(trial)
    return trials


def test_columns_and_search_space_are_the_dashboards_own() -> None:
    trials = trials_of_all_kinds()
    ours = dashboard._columns_by_study().get(1)
    for count in (0, 1, 3, 3, 8, len(trials), len(trials)):
        theirs = _CachedExtraStudyProperty()
        theirs.update(trials[:count])
        ours.update(trials[:count])
        assert ours.union_search_space == theirs.union_search_space, count
        assert {name for name, _ in ours.intersection_search_space} == {
            name for name, _ in theirs.intersection_search_space
        }
        assert sorted(ours.union_user_attrs) == sorted(theirs.union_user_attrs)


def test_an_attribute_of_a_running_trial_appears_when_it_is_written() -> None:
    columns = dashboard._columns_by_study().get(1)
    trial = create_trial(state=TrialState.RUNNING)
    columns.update([trial])
    trial.user_attrs["cost"] = 1.0
    columns.update([trial])
    assert columns.union_user_attrs == [("cost", True)]


def test_finished_trials_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    columns = dashboard._columns_by_study().get(1)
    monkeypatch.setattr(type(columns), "_update_user_attrs", lambda self, trial: looked.append(trial.number))
    trials = [trial for trial in trials_of_all_kinds() if trial.state.is_finished()]
    columns.update(trials[:-1])
    columns.update(trials)
    assert looked == [trial.number for trial in trials]


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.5.5.5", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_loopback(host: str, alone: bool) -> None:
    assert dashboard.is_loopback(host) is alone


def start(*arguments: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
    """A dashboard in a process of its own, and the address it prints."""
    command = [sys.executable, "-m", "autodiffusion_optuna", "dashboard", "--study", "quick", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    if found is None:
        process.kill()
        raise AssertionError(line + process.communicate()[1])
    return process, found[0]


def test_the_command_serves_the_study_and_ends_with_ctrl_c(folder: Path) -> None:
    run(folder / "quick.toml", URL, "search.trials=3")
    process, address = start("--port", "0")
    page = urllib.request.urlopen(address)
    assert page.status == 200
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/dashboard/studies/(\d+)", address)
    assert found is not None
    detail = fetch(f"http://127.0.0.1:{found[1]}/api/studies/{found[2]}")
    assert detail["name"] == "quick"
    assert len(detail["trials"]) >= 3
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err in ("", "stopped\n")


@pytest.mark.parametrize(
    ("location", "reason"), [("pictures", "does not exist"), ("s3://bucket", 'pip install "autodiffusion-optuna[s3]"')]
)
def test_without_its_pictures_a_study_can_be_watched(folder: Path, location: str, reason: str) -> None:
    if location.startswith("s3"):
        (folder / "boto3.py").write_text("raise ImportError('none')")  # also where it is installed
    study = run(folder / "quick.toml", URL, "search.trials=1")
    study.set_user_attr(ARTIFACTS, location)
    process, address = start("--port", "0", PYTHONPATH=f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    assert urllib.request.urlopen(address).status == 200
    process.send_signal(signal.SIGINT)
    (warning,) = [line for line in process.communicate(timeout=30)[1].splitlines() if line.startswith("warning:")]
    assert "pictures are not shown" in warning
    assert reason in warning
    assert not (folder / "pictures").exists()


def test_another_host_than_loopback_is_warned_of(folder: Path) -> None:
    run(folder / "quick.toml", URL, "search.trials=1")
    process, _ = start("--port", "0", "--host", "0.0.0.0")
    process.send_signal(signal.SIGINT)
    assert "the dashboard has no password" in process.communicate(timeout=30)[1]


def one_line(result: Any, *words: str) -> None:
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


def test_a_port_in_use_is_one_line(folder: Path, adopt: Adopt) -> None:
    run(folder / "quick.toml", URL, "search.trials=1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        one_line(adopt("dashboard", "--study", "quick", "--port", port), f"port {port}", "in use", "--port")


def test_what_cannot_be_served_is_one_line(folder: Path, adopt: Adopt) -> None:
    one_line(adopt("dashboard", "--study", "quick"), "no database")
    run(folder / "quick.toml", URL, "search.trials=1")
    one_line(adopt("dashboard", "--study", "quik"), "did you mean 'quick'")
    one_line(adopt("dashboard", "--study", "quick", "--host", "no.such.host.invalid", "--port", "0"), "no.such.host")
    one_line(adopt("dashboard", "--study", "quick", "--artifacts", "no/such/folder"), "no/such/folder")


def test_a_missing_package_is_named(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    one_line(adopt("dashboard", "--study", "quick"), 'pip install "autodiffusion-optuna[dashboard]"')


def test_the_quick_study_is_what_the_note_says(folder: Path) -> None:
    config = load_config(folder / "quick.toml")
    assert '[model]\nsource = "mixture"\ndevice = "cpu"\nbatch = 32' in dashboard.toml(config)
