"""How workers are started, restarted and stopped, without an engine's cluster."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from command import Adopt

from autodiffusion_optuna.errors import ConfigError, ModelError, StudyError
from autodiffusion_optuna.storage.attrs import BASELINE, CONFIG
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.url import is_of_this_host
from autodiffusion_optuna.study import components, lifecycle
from autodiffusion_optuna.workers import launch, worker
from autodiffusion_optuna.workers.worker import Job
from studies import begin, config_with

URL = "sqlite:///adopt.db"


def job(folder: Path, **changes: Any) -> Job:
    given: dict[str, Any] = {"config": config_with(folder / "quick.toml"), "url": URL, "workers": 2}
    return Job(**{**given, **changes})


def test_a_worker_that_dies_is_given_up_only_where_the_study_stands_still() -> None:
    finished = [0]
    restarts = launch.Restarts(lambda: finished[0])
    assert [restarts.died() for _ in range(4)] == [0.0, 2.0, 4.0, 8.0]
    finished[0] = 1
    assert restarts.died() == 0.0
    assert [restarts.died() for _ in range(launch.MAX_RESTARTS)] == [2.0, 4.0, 8.0, 16.0, None]


def test_the_first_worker_begins_the_study_and_those_that_die_are_started_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under any engine; the second of three workers dies once."""
    started: list[tuple[int, bool]] = []
    looks: list[list[int]] = []

    def start(job: Job) -> launch.Look:
        started.append((job.index, job.known))
        ends_at, dies = len(looks) + 4, started == [(0, False), (1, True)]

        def is_done() -> bool:
            if dies:
                raise launch.Died("was unplugged", "")
            return len(looks) >= ends_at

        return is_done

    monkeypatch.setattr(launch, "has_begun", lambda job: len(looks) >= 2)
    monkeypatch.setattr(launch, "finished_trials", lambda job: 0)
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.0)
    launch.supervise(start, job(folder), 3, lambda: looks.append([index for index, _ in started]))
    assert looks[:4] == [[0], [0], [0], [0, 1, 2]]
    assert started == [(0, False), (1, True), (2, True), (1, True)]


def test_an_error_of_ours_is_another_exit_code_than_the_users(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only what the user must fix ends the launch at once; a device's hiccup is worth another start."""

    def fails_with(error: Exception) -> int:
        def run(job: Job) -> None:
            raise error

        monkeypatch.setattr(worker, "run_job", run)
        with pytest.raises(SystemExit) as stopped:
            worker.main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code

    with (folder / "job").open("w+") as given:
        monkeypatch.setattr(sys, "stdin", given)
        for error, code, said in (
            (RuntimeError("CUDA error"), worker.CRASHED, "Traceback"),
            (StudyError("fix this"), worker.USER_ERROR, "error: fix this\n"),
        ):
            given.write(job(folder).model_dump_json() + "\n")
            given.seek(0)
            monkeypatch.setattr(worker, "stop_with_input", lambda: None)
            assert fails_with(error) == code
            assert said in capfd.readouterr().err
            given.seek(0)
            given.truncate()


def test_a_worker_stops_with_its_launcher_though_ctrl_c_is_ignored(folder: Path) -> None:
    """As in a script that puts the launcher in the background."""
    begin(folder, URL, "search.trials=5000")
    config = config_with(folder / "quick.toml", "search.trials=5000")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        started = subprocess.Popen(
            [sys.executable, "-m", "autodiffusion_optuna.workers.worker"],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert started.stdin is not None
    started.stdin.write(Job(config=config, url=URL).model_dump_json().encode() + b"\n")
    started.stdin.close()
    assert started.wait(120) == worker.INTERRUPTED


def test_one_of_many_begins_the_study(folder: Path) -> None:
    config = config_with(folder / "quick.toml")
    together = Barrier(4)

    def open_one(place: int) -> int:
        parts = components.build(config)
        storage = open_storage(URL)
        together.wait()
        return len(lifecycle.open_study(parts, storage).get_trials(deepcopy=False))

    with ThreadPoolExecutor(4) as threads:
        counts = list(threads.map(open_one, range(4)))
    found = begin(folder, URL)
    names = [t.user_attrs[BASELINE] for t in found.trials]
    assert len(set(names)) == len(names) == max(counts)


def test_a_workers_own_device_is_not_the_studys(folder: Path) -> None:
    config = config_with(folder / "quick.toml", "model.device=auto")
    opened = lifecycle.open_run(config, URL, device="cpu")
    assert opened.components.model.device.type == "cpu"
    assert opened.study.user_attrs[CONFIG]["model"]["device"] == "auto"
    several = job(folder, config=config)
    devices = [worker.own_device(several.model_copy(update={"index": index}), 2) for index in range(3)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    assert worker.own_device(several, 1) is None
    assert worker.own_device(job(folder, config=config_with(folder / "quick.toml", "model.device=cpu")), 2) is None


def test_with_an_engine_the_first_worker_scores_the_winner(folder: Path) -> None:
    """The host that launched it may have no GPU."""
    settings = ["search.trials=4", "score.held_out_banks=2"]
    config = config_with(folder / "quick.toml", *settings)
    for index, scored in ((1, False), (0, True)):
        given = job(folder, config=config, index=index, workers=1, scores=True)
        assert worker.run_for_engine(given.model_dump_json()) is None
        attrs = begin(folder, URL, *settings).user_attrs
        assert any(key.startswith("held_out:") for key in attrs) == scored


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"partition": "gpu"}, {"timeout_min": launch.SLURM_MINUTES, "slurm_partition": "gpu"}),
        ({"time": "60"}, {"slurm_time": 60}),
        ({"timeout_min": "5", "mem_gb": "8"}, {"timeout_min": 5, "mem_gb": 8}),
    ],
    ids=str,
)
def test_what_slurm_is_asked_for(given: dict[str, str], expected: dict[str, object]) -> None:
    assert launch.slurm_parameters(given, local=False) == expected


@pytest.mark.parametrize(
    ("engine", "option", "expected"),
    [
        ("ray", "gpus=x", ["gpus=x", "0 or more"]),
        ("ray", "cpus=-1", ["cpus=-1", "0 or more"]),
        ("ray", "address=127.0.0.1:1", ["no Ray cluster at '127.0.0.1:1'", "address", "postgresql://USER@HOST/DB"]),
        ("slurm", "cluster=foo", ["cluster=foo", "local"]),
    ],
)
def test_wrong_options_of_an_engine(folder: Path, adopt: Adopt, engine: str, option: str, expected: list[str]) -> None:
    result = adopt("run", "--study", "quick.toml", "--engine", engine, "--engine-option", option)
    assert result.code == 1, result
    assert result.err.count("\n") == 1, result.err
    for text in expected:
        assert text in result.err


def test_an_unwritable_folder_of_slurm(folder: Path, adopt: Adopt) -> None:
    given = ["--engine-option", "cluster=local", "--engine-option", "folder=/proc/logs"]
    result = adopt("run", "--study", "quick.toml", "--engine", "slurm", *given)
    assert result.code == 1, result
    assert "/proc/logs" in result.err
    assert result.err.count("\n") == 1, result.err


def test_an_unknown_engine_of_the_library(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine"):
        launch.launch("cloud", job(folder), 1, {}, lambda: None)


def test_a_process_that_crashes_is_started_again_and_its_last_words_are_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose module cannot be imported crashes with a traceback, every time."""
    crashing = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit('no such device')"]
    popen = subprocess.Popen
    starts = []

    def crash(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        starts.append(command)
        return popen(["sh", "-c", '"$@"; exit 70', "sh", *crashing], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", crash)
    monkeypatch.setattr(launch, "PAUSE", 0.01)
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.02)
    with pytest.raises(StudyError, match=r"worker 0 ended with code 70 6 times: no such device"):
        launch.launch("local", job(folder), 1, {}, lambda: None)
    assert len(starts) == launch.MAX_RESTARTS + 1


def test_workers_share_the_cores_of_their_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert set(launch.thread_limits(4).values()) == {"4"}
    assert set(launch.thread_limits(64).values()) == {"1"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # as the launcher's environment makes it
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    with pytest.raises(ModelError, match="unknown model"):
        worker.run_job(job(folder, config=config_with(folder / "quick.toml", "model.source=none"), workers=4))
    assert given == [4]


def test_what_workers_warn_of_is_reported_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        "for line in 'noise of a library' 'warning: no pictures' 'note: computing'; do echo $line >&2; done; sleep 0.3"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(["sh", "-c", script], **options))
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(launch, "has_begun", lambda job: True)
    with caplog.at_level(logging.INFO, "autodiffusion_optuna"):
        launch.launch("local", job(folder), 3, {}, lambda: None)
    said = [(record.levelname, record.message) for record in caplog.records]
    assert said == [("WARNING", "no pictures"), ("INFO", "computing")]


def test_a_progress_bar_does_not_hide_what_follows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = "head -c 200000 /dev/zero | tr '\\0' '#' >&2; echo >&2; echo 'warning: at last' >&2"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(["sh", "-c", script], **options))
    launch.launch("local", job(folder), 1, {}, lambda: None)
    assert [record.message for record in caplog.records] == ["at last"]


def test_a_worker_marks_its_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import logging\nfrom autodiffusion_optuna.workers import worker\nworker.mark_warnings()\n"
    code += "log = logging.getLogger('autodiffusion_optuna')\nlog.warning('away')\nlog.info('computing')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert capfd.readouterr().err == "warning: away\nnote: computing\n"


@pytest.fixture
def sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands as they look from a login node; what they were asked for is kept in a file, if they were."""
    bin, asked = folder.parent / f"{folder.name}-bin", folder.parent / f"{folder.name}-asked"
    bin.mkdir()
    for name in ("sbatch", "srun"):
        (bin / name).write_text(f"#!/bin/sh\necho {name} >> {asked}\nexit 1\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return asked


@pytest.mark.parametrize("engine", [("slurm",), ("ray", "--engine-option", "address=auto"), ("ray", "RAY_ADDRESS")])
@pytest.mark.parametrize("url", [None, "sqlite:///mine.db", "mine.db", "sqlite://"])
def test_workers_on_other_hosts_get_no_file_of_this_one(
    folder: Path, adopt: Adopt, sbatch: Path, monkeypatch: pytest.MonkeyPatch, engine: tuple[str, ...], url: str | None
) -> None:
    if "RAY_ADDRESS" in engine:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        engine = ("ray",)
    given = [] if url is None else ["--storage", url]
    result = adopt("run", "--study", "quick.toml", "--workers", "2", "--engine", *engine, *given)
    assert result.code == 1, result
    assert result.err.count("\n") == 1, result.err
    assert "postgresql://USER@HOST/DB" in result.err
    assert "other hosts" in result.err
    assert "adopt run --study quick.toml --workers 2 --engine" in result.err  # what was typed, with another database
    assert sorted(path.name for path in folder.iterdir()) == ["quick.toml"]
    assert not sbatch.exists()


@pytest.mark.parametrize(
    ("place", "here"),
    [
        ("localhost", True),
        ("127.0.0.1:5433", True),
        ("", True),
        ("[::1]", True),
        ("db.lab", False),
        ("10.0.0.7", False),
    ],
)
def test_which_servers_other_hosts_do_not_reach(place: str, here: bool) -> None:
    assert is_of_this_host(f"postgresql+psycopg://me@{place}/x") is here


def test_a_socket_is_of_this_host() -> None:
    assert is_of_this_host("postgresql+psycopg:///x?host=/var/run/postgresql")
    assert not is_of_this_host("postgresql+psycopg:///x?host=db.lab")


def test_without_sbatch_both_ways_out_are_named(folder: Path, adopt: Adopt) -> None:
    result = adopt("run", "--study", "quick.toml", "--engine", "slurm")
    assert result.code == 1
    for text in ("sbatch", "cluster=local", "postgresql://USER@HOST/DB"):
        assert text in result.err


def test_a_folder_for_pictures_of_other_hosts_is_whole_and_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "find_study", lambda *given, **options: None)
    assert launch.full_artifacts(job(folder)) == {}
    assert launch.full_artifacts(job(folder, artifacts="s3://bucket/a")) == {}
    assert caplog.records == []
    assert launch.full_artifacts(job(folder, artifacts="pictures")) == {"artifacts": str(folder / "pictures")}
    assert "unless all share it" in caplog.text
