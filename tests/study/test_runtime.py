"""What the bits of a value depend on belongs to its study: the batch, the device, the libraries."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from autodiffusion_optuna.config import StudyConfig, load_config
from autodiffusion_optuna.evaluation import drawing
from autodiffusion_optuna.results.summary import runtime_warnings
from autodiffusion_optuna.storage.attrs import RUNTIME
from autodiffusion_optuna.storage.studies import stored_batch
from autodiffusion_optuna.study import components, lifecycle, loop, validation

URL = "sqlite:///adopt.db"


def quick(trials: int) -> StudyConfig:
    return load_config(Path("quick.toml"), [f"search.trials={trials}", "model.batch=auto"])


def run(trials: int) -> lifecycle.Run:
    opened = lifecycle.open_run(quick(trials), URL)
    loop.work(opened.components, opened.study, opened.storage)
    return opened


def test_a_study_keeps_the_batch_that_its_first_worker_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "largest_batch", lambda model: 16)
    first = run(2)
    assert stored_batch(first.study) == 16
    monkeypatch.setattr(components, "largest_batch", lambda model: 64)  # a larger card
    second = run(4)
    assert second.components.evaluator.batch == 16
    assert runtime_warnings(second.study.user_attrs) == []


def test_a_batch_that_did_not_fit_at_the_first_trial_is_not_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(monkeypatch, 8)
    first = run(2)
    assert stored_batch(first.study) == 8
    assert runtime_warnings(first.study.user_attrs) == []


def test_a_worker_whose_memory_is_smaller_says_what_differs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(2)
    out_of_memory_above(monkeypatch, 8)
    with caplog.at_level(logging.WARNING, logger="autodiffusion_optuna"):
        second = run(5)
    (line,) = runtime_warnings(second.study.user_attrs)
    assert "batch 64 -> 8" in line
    assert [message for message in caplog.messages if message == line] == [line]  # once, not for each trial
    assert stored_batch(second.study) == 64


@pytest.mark.parametrize(("name", "other"), [("device", "NVIDIA H200"), ("torch", "9.9"), ("threads", 99)])
def test_another_device_or_library_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, other: Any
) -> None:
    run(2)
    describe = loop.describe_runtime
    monkeypatch.setattr(loop, "describe_runtime", lambda evaluator: {**describe(evaluator), name: other})
    second = run(3)
    (line,) = runtime_warnings(second.study.user_attrs)
    assert f"{name} " in line
    assert f"-> {other}" in line


def test_a_study_of_before_is_given_what_computes_it_now(folder: Path) -> None:
    first = run(2)
    first.study.set_user_attr(RUNTIME, {})
    assert stored_batch(first.study) is None
    again = run(3)
    assert again.components.evaluator.batch == stored_batch(again.study) == 64
    assert runtime_warnings(again.study.user_attrs) == []


def test_held_out_values_computed_otherwise_are_said_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = run(2)
    describe = loop.describe_runtime
    monkeypatch.setattr(loop, "describe_runtime", lambda evaluator: {**describe(evaluator), "torch": "9.9"})
    validation.score_held_out(opened.components, opened.study, opened.components.baselines["uniform"], 8, 2)
    (line,) = runtime_warnings(opened.study.user_attrs)
    assert "-> 9.9" in line


def test_workers_that_start_together_take_the_batch_of_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "largest_batch", lambda model: 16)
    build = components.build

    def second(*given: Any, **options: Any) -> components.StudyComponents:
        """Another worker begins the study while this one loads its model."""
        monkeypatch.setattr(components, "build", build)
        lifecycle.open_run(quick(2), URL)
        monkeypatch.setattr(components, "largest_batch", lambda model: 64)
        return build(*given, **options)

    monkeypatch.setattr(components, "build", second)
    assert lifecycle.open_run(quick(2), URL).components.evaluator.batch == 16


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    draw = drawing.ImageSampler._draw

    def limited(self: drawing.ImageSampler, candidate: Any, first: int, last: int, *rest: Any) -> torch.Tensor:
        if last - first > fits:
            raise torch.OutOfMemoryError
        return draw(self, candidate, first, last, *rest)

    monkeypatch.setattr(drawing.ImageSampler, "_draw", limited)
