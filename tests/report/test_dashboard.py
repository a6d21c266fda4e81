"""The dashboard's server: what it publishes, serves and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from command import Adopt, check_refused
from dashboard_server import fetch, serving
from long_study import long_summary
from optuna_dashboard import get_note, save_note, wsgi

from autodiffusion_optuna.candidate import SKIP, Candidate
from autodiffusion_optuna.config import load_config, load_preset, parse_config, presets, tomllib
from autodiffusion_optuna.report import dashboard
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import ARTIFACTS, COST, GENERATION, IMAGES, OPERATOR, PARENTS, STAGE, rung_key
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.manage import delete_study
from autodiffusion_optuna.storage.studies import load_study
from studies import run

URL = "sqlite:///adopt.db"


def detail(name: str = "quick") -> Any:
    """What the dashboard's page of a study asks for."""
    storage = open_storage(URL)
    with serving(wsgi(storage)) as address:
        return fetch(f"{address}/api/studies/{storage.get_study_id_from_name(name)}")


def plots() -> dict[str, str]:
    """Figures that the dashboard shows, by id."""
    return {plot["id"]: plot["graph_object"] for plot in detail()["plotly_graph_objects"]}


def test_what_is_published_is_served(folder: Path) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=14", "score.pruner=percentile", "score.rungs=[32]")
    dashboard.publish(study, URL)
    shown = detail()
    assert shown["objective_names"] == ["FD(pixels), 64 images, fewer where pruned"]
    assert {plot["id"] for plot in shown["plotly_graph_objects"]} == {"timesteps", "history", "evaluations"}
    assert all(json.loads(plot["graph_object"])["data"] for plot in shown["plotly_graph_objects"])
    columns = {attr["key"] for attr in shown["union_user_attrs"]}
    assert {GENERATION, STAGE, OPERATOR, COST, IMAGES} <= columns
    assert {PARENTS, rung_key(32)} <= columns
    best = read_summary(study).best
    assert best is not None
    assert " ".join(map(str, best.candidate.timesteps)) in shown["note"]["body"]
    assert "adopt export --study quick\n" in shown["note"]["body"]


def test_the_note_keeps_what_the_user_wrote(folder: Path) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2")
    save_note(study, "mine already")
    dashboard.publish(study, URL)
    assert get_note(study).endswith(dashboard.SIGNATURE + "\n\nmine already")
    save_note(study, get_note(study) + "\nand more")
    version = detail()["note"]["version"]
    dashboard.publish(study, URL)
    assert detail()["note"]["version"] == version
    run(folder / "quick.toml", URL, "search.trials=4")
    dashboard.publish(study, URL)
    assert "4 of 4 candidates" in get_note(study)
    assert get_note(study).endswith("mine already\nand more")
    assert get_note(study).count("mine already") == 1


def test_a_figure_of_what_is_no_longer_so_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2")
    skipping = long_summary(60)
    monkeypatch.setattr(dashboard, "read_summary", lambda _: skipping)
    dashboard.publish(study, URL)
    assert "heatmap" in plots()["masks"]
    assert skipping.best is not None
    plain = replace(skipping.best, candidate=Candidate(skipping.best.candidate.timesteps))
    monkeypatch.setattr(dashboard, "read_summary", lambda _: replace(skipping, best=plain))
    for _ in range(2):
        dashboard.publish(study, URL)
        assert "heatmap" not in plots()["masks"]
        assert "nothing to show now" in plots()["masks"]


def test_a_figure_that_did_not_change_is_not_written_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2")
    saved: list[str] = []
    monkeypatch.setattr(
        "optuna_dashboard.save_plotly_graph_object", lambda *_, graph_object_id: saved.append(graph_object_id)
    )
    dashboard.publish(study, URL)
    dashboard.publish(study, URL)
    assert saved == ["timesteps", "history", "evaluations"]


@pytest.mark.parametrize("name", sorted(presets()))
def test_the_notes_settings_are_a_study_file(name: str) -> None:
    config = load_preset(name)
    text = dashboard.toml(config)
    assert parse_config({**tomllib.loads(text), "name": config.name, "description": config.description}) == config


def test_the_note_names_searched_settings_and_skipped_layers() -> None:
    summary = long_summary(60, units=14)
    assert summary.best is not None
    plain = dashboard.note_text(summary, URL)
    assert "| candidate | held-out noise | difference to uniform, 95 % | FD(digits), 256 images | timesteps |" in plain
    counts = [len(names) for names in summary.best.candidate.unit_names(summary.units, SKIP)]
    shown = [f"{t} ({count})" for t, count in zip(summary.best.candidate.timesteps, counts, strict=True) if count]
    assert f"skips or reuses layers at timesteps (layers of 14): {', '.join(shown)}." in plain

    chosen = Candidate(summary.best.candidate.timesteps, settings=(("guidance", 1.5), ("solver", "heun")))
    note = dashboard.note_text(replace(summary, best=replace(summary.best, candidate=chosen)), URL)
    table = [line for line in note.splitlines() if line.startswith("|")]
    assert "| settings | timesteps |" in table[0]
    assert "| guidance 1.5, solver heun |" in table[2]
    assert {line.count("|") for line in table} == {7}
    assert "skips or reuses layers" not in note


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


def test_trouble_is_reported_once_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        delete_study(open_storage(URL), "quick")
        time.sleep(0.3)
    assert troubles == ["note and figures were not written: study 'quick' was deleted"]


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
    served = fetch(f"http://127.0.0.1:{found[1]}/api/studies/{found[2]}")
    assert served["name"] == "quick"
    assert len(served["trials"]) >= 3
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


def test_a_port_in_use_is_refused(folder: Path, adopt: Adopt) -> None:
    run(folder / "quick.toml", URL, "search.trials=1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        check_refused(adopt("dashboard", "--study", "quick", "--port", port), f"port {port}", "in use", "--port")


def test_what_cannot_be_served_is_refused(folder: Path, adopt: Adopt) -> None:
    check_refused(adopt("dashboard", "--study", "quick"), "no database")
    run(folder / "quick.toml", URL, "search.trials=1")
    check_refused(adopt("dashboard", "--study", "quik"), "did you mean 'quick'")
    check_refused(
        adopt("dashboard", "--study", "quick", "--host", "no.such.host.invalid", "--port", "0"), "no.such.host"
    )
    check_refused(adopt("dashboard", "--study", "quick", "--artifacts", "no/such/folder"), "no/such/folder")


def test_a_missing_package_is_named(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    check_refused(adopt("dashboard", "--study", "quick"), 'pip install "autodiffusion-optuna[dashboard]"')


def test_the_quick_study_is_what_the_note_says(folder: Path) -> None:
    config = load_config(folder / "quick.toml")
    assert '[model]\nsource = "mixture"\ndevice = "cpu"\nbatch = 32' in dashboard.toml(config)
