"""``adopt run``: search, resume, or say that the study is finished."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from autodiffusion_optuna.cli.output import (
    EXIT_INTERRUPTED,
    Overrides,
    StorageUrl,
    StudyName,
    Trust,
    clock,
    err,
    existing,
    out,
    print_result,
    say,
    warn,
)
from autodiffusion_optuna.errors import ConfigError, StorageError, StudyError, choose_from

if TYPE_CHECKING:
    import optuna

    from autodiffusion_optuna.config import StudyConfig
    from autodiffusion_optuna.study.components import StudyComponents
    from autodiffusion_optuna.study.loop import Progress


SLOW_SECONDS = 10.0
"""Time left from which the held-out scores at the end say how long they take."""
Workers = Annotated[int, typer.Option("--workers", help="Workers to start; on GPUs, one for each GPU.")]
Engine = Annotated[str, typer.Option("--engine", help="What starts them: local, ray or slurm.")]
EngineOptions = Annotated[list[str] | None, typer.Option("--engine-option", help="name=value, as the engine takes it.")]
ArtifactLocation = Annotated[
    str | None,
    typer.Option(
        "--artifacts",
        envvar="ADOPT_ARTIFACTS",
        help="Where pictures go: a folder, s3://… or gs://…; default beside a SQLite file.",
    ),
]


def run(
    study: Annotated[str, typer.Option("--study", help="A study file, a preset's name, or a study in the database.")],
    overrides: Overrides = None,
    storage: StorageUrl = None,
    workers: Workers = 1,
    engine: Engine = "local",
    engine_options: EngineOptions = None,
    artifacts: ArtifactLocation = None,
    trust: Trust = False,
) -> None:
    """Search; the same command again goes on where it stood, or says that the study is finished.

    Run it on as many hosts as you like on one database: each is one more worker.
    """
    from autodiffusion_optuna.storage.studies import find_study, require_same, still_there
    from autodiffusion_optuna.storage.trials import count_finished
    from autodiffusion_optuna.storage.url import storage_url

    if workers < 1:
        raise ConfigError(f"--workers {workers}: give 1 or more")
    url = storage_url(storage)
    config = _resolve(study, overrides or [], url)
    options = _options(engine_options or [])
    begun = find_study(url, config.name)
    if begun is not None:
        require_same(begun, config)
        if _complete(begun, config):
            done = count_finished(begun)
            say(f"study {config.name} is finished: {done} candidates for a budget of {config.search.trials}.")
            print_result(begun, url, said_before=False)
            return
    done = 0 if begun is None else count_finished(begun)
    try:
        if workers > 1 or engine != "local":
            found = _launch(config, url, engine, workers, options, trust=trust, artifacts=artifacts)
            if engine == "local":  # this host may have no GPU where the workers are elsewhere: they have done it
                found = _score(_as_named_now(config, found), url, workers, trust, artifacts)
        else:
            _refuse_options(options)
            found = _search(config, url, trust, artifacts)
    except KeyboardInterrupt:
        err.print(f"stopped; {_kept(url, config.name, done)} candidates are kept. Go on with: {_resume_command()}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    with still_there(found):
        print_result(found, url)


def _kept(url: str, name: str, known: int) -> int:
    """Finished candidates of a study that was stopped; ``known`` of them where the database does not answer."""
    from autodiffusion_optuna.storage.studies import find_study
    from autodiffusion_optuna.storage.trials import count_finished

    try:
        begun = find_study(url, name)
    except StorageError:
        return known
    return known if begun is None else count_finished(begun)


def _options(given: list[str]) -> dict[str, str]:
    """``name=value`` of each ``--engine-option``."""
    options = {}
    for option in given:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ConfigError(f"--engine-option {option!r} has no '='; write --engine-option name=value")
        options[name] = value
    return options


def _refuse_options(options: dict[str, str]) -> None:
    if options:
        raise ConfigError(f"--engine-option {next(iter(options))!r} needs --engine ray or --engine slurm")


def _resolve(name: str, overrides: list[str], url: str) -> StudyConfig:
    """The config that ``--study`` means: a file, what a study in the database was last run with, or a preset."""
    from autodiffusion_optuna.config import load_config, load_preset, parse_config, presets
    from autodiffusion_optuna.storage.studies import existing_names, find_study, stored_config

    if name.endswith(".toml") or "/" in name or Path(name).is_file():
        return load_config(Path(name), overrides)
    begun = find_study(url, name, ready=False)
    if begun is not None:
        return parse_config(stored_config(begun).model_dump(mode="json"), overrides)
    if name in presets():
        return load_preset(name, overrides)
    raise ConfigError(choose_from("study", name, [*presets(), *existing_names(url)]) + "; or give a study file.toml")


def _complete(study: optuna.Study, config: StudyConfig) -> bool:
    """Whether the budget is met and the winner has its held-out score."""
    from autodiffusion_optuna.results.held_out import stored_held_out
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.storage.trials import count_finished

    best = read_summary(study).best
    if best is None or count_finished(study) < config.search.trials:
        return False
    size = config.score.held_out_images, config.score.held_out_banks
    return stored_held_out(study.user_attrs, best.candidate.key, *size) is not None


def _as_named_now(config: StudyConfig, study: optuna.Study) -> StudyConfig:
    """The config under the name that others may have given the study meanwhile."""
    from autodiffusion_optuna.storage.studies import current_name, still_there

    with still_there(study):
        return config.model_copy(update={"name": current_name(study)})


def _search(config: StudyConfig, url: str, trust: bool, artifacts: str | None) -> optuna.Study:
    """Work on the study in this process, and score its winner."""
    from autodiffusion_optuna.storage.studies import still_there
    from autodiffusion_optuna.study import lifecycle, loop

    opened = lifecycle.open_run(config, url, trust=trust, artifacts=artifacts)
    _say_begin(config, opened.study)
    warn(_known_doubts(opened.study))
    with still_there(opened.study):
        with _watched(_Board(config, opened.study)) as board:
            loop.work(opened.parts, opened.study, opened.storage, board.on_trial, opened.store)
        _validate(opened.parts, opened.study)
    return opened.study


def _launch(
    config: StudyConfig,
    url: str,
    engine: str,
    workers: int,
    options: dict[str, str],
    *,
    trust: bool,
    artifacts: str | None,
) -> optuna.Study:
    """Start workers and show what they do together, whoever else works on the study, which is returned."""
    from autodiffusion_optuna.storage.studies import find_study, still_there
    from autodiffusion_optuna.workers.launch import launch
    from autodiffusion_optuna.workers.worker import Job

    scores = engine != "local"
    command = _resume_command(storage=False)
    job = Job.of(config, url, workers=workers, trust=trust, artifacts=artifacts, scores=scores, command=command)
    started = "1 worker" if workers == 1 else f"{workers} workers"
    say(f"study {config.name}: {started} by engine {engine}, starting. Ctrl-C stops them safely.")
    boards: list[_Board] = []

    def look() -> None:
        if not boards and (begun := find_study(url, config.name, known=True)) is not None:
            warn(_known_doubts(begun))
            boards.append(watch.enter_context(_watched(_Board(config, begun, workers))))
        for board in boards:
            with still_there(board.study):
                board.on_look()

    with ExitStack() as watch:
        launch(engine, job, workers, options, look)
        look()
        for board in boards:
            with still_there(board.study):
                board.end()
    found = boards[0].study if boards else find_study(url, config.name, known=True)
    if found is None:
        raise StudyError(f"study {config.name!r} was deleted or renamed meanwhile; see adopt studies list")
    return found


def _score(config: StudyConfig, url: str, workers: int, trust: bool, artifacts: str | None) -> optuna.Study:
    """Score the winner of a study whose budget is met by other processes, on as many threads as each of them had."""
    from autodiffusion_optuna.storage.studies import still_there
    from autodiffusion_optuna.study import lifecycle
    from autodiffusion_optuna.workers.worker import limit_threads

    limit_threads(workers)
    opened = lifecycle.open_run(config, url, trust=trust, artifacts=artifacts, known=True)
    with still_there(opened.study):
        _validate(opened.parts, opened.study)
    return opened.study


def _known_doubts(study: optuna.Study) -> list[str]:
    """What is known to be doubtful as a run begins; what it finds itself is said at its end."""
    from autodiffusion_optuna.results.summary import read_summary

    report = read_summary(study)
    return [line for line in report.warnings() if line not in report.found_doubtful()]


def _say_begin(config: StudyConfig, study: optuna.Study) -> None:
    from autodiffusion_optuna.storage.trials import count_finished

    done = count_finished(study)
    verb = "going on" if done else "starting"
    say(f"study {config.name}: {done} of {config.search.trials} candidates finished, {verb}. Ctrl-C stops it safely.")


def _resume_command(*, storage: bool = True) -> str:
    """What the user typed, without a password: the same command resumes. ``storage``: whether with the database."""
    from autodiffusion_optuna.storage.url import hide_password

    def shown(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return option + equals + (hide_password(value) if "://" in value else value)

    words = sys.argv[1:]
    if not storage:
        place = [i for i, word in enumerate(words) if word == "--storage"]
        dropped = {*place, *(i + 1 for i in place)}
        words = [w for i, w in enumerate(words) if i not in dropped and not w.startswith("--storage=")]
    return shlex.join(["adopt", *map(shown, words)])


def _validate(parts: StudyComponents, study: optuna.Study) -> None:
    from autodiffusion_optuna.study import validation

    images, banks = parts.config.score.held_out_images, parts.config.score.held_out_banks
    say(f"scoring {', '.join(validation.to_validate(parts, study))} on {banks} held-out banks of {images} images …")
    started = time.monotonic()

    def scored(name: str, done: int, all_of_them: int) -> None:
        left = (time.monotonic() - started) / done * (all_of_them - done)
        if left >= SLOW_SECONDS:
            say(f"scored {name}, time left {clock(left)}; Ctrl-C keeps what is done")

    validation.validate(parts, study, scored)


@contextmanager
def _watched(board: _Board) -> Iterator[_Board]:
    """The board: a live table on a terminal, plain lines elsewhere."""
    if not out.is_terminal:
        yield board
        return
    with Live(board.table(), console=out, refresh_per_second=4, transient=True) as live:
        board.live = live
        yield board


class _Board:
    """What the progress view shows: of this process's trials, or of all workers' through the database."""

    EVERY = 20  # plain output: a line every so many trials, and for every new best
    LOOK_SECONDS = 1.0

    def __init__(self, config: StudyConfig, study: optuna.Study, workers: int = 1) -> None:
        self.config, self.study, self.workers = config, study, workers
        self.live: Live | None = None
        self.started = self.looked = time.monotonic()
        self.best, self.key, self.finished, self.lines = float("inf"), "", 0, 0
        self.read()
        self.first = self.said = self.finished

    def read(self) -> bool:
        """Take in the whole study; whether it has a new best."""
        from autodiffusion_optuna.results.summary import read_summary

        report = read_summary(self.study)
        self.metric, self.finished = report.metric, len(report.finished)
        self.run, self.saved = report.total("run"), report.total("saved")
        self.origin: dict[str, Any] = report.last_origin
        better = report.best is not None and report.best.value < self.best
        if report.best is not None:
            self.best, self.key = report.best.value, report.best.candidate.key
        return better

    def on_look(self) -> None:
        """Show where the study stands, about once a second."""
        if time.monotonic() - self.looked < self.LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        self.show(self.read())

    def end(self) -> None:
        """Show where the study stands at last: workers may have been faster than the last look, or than all of them."""
        better = self.read()
        if not self.lines:
            self.said = -1
        self.show(better)

    def on_trial(self, progress: Progress) -> None:
        """Take in and show one trial of this process."""
        attrs, values = progress.trial.user_attrs, progress.trial.values
        self.finished = progress.finished
        self.origin = {key: attrs.get(key, value) for key, value in self.origin.items()}
        self.run += attrs.get("score", {}).get("run", 0)
        self.saved += attrs.get("score", {}).get("saved", 0)
        better = progress.trial.state.name == "COMPLETE" and bool(values) and values[0] < self.best
        if better:
            self.best, self.key = values[0], str(attrs.get("candidate", ""))
        self.show(better)

    def show(self, better: bool) -> None:
        """Draw the table again, or print a line for a new best and one every so often."""
        if self.live is not None:
            self.live.update(self.table())
            return
        due = self.finished // self.EVERY > self.said // self.EVERY
        last = self.finished >= self.config.search.trials and self.finished > self.said
        if better or due or last:
            line = ", ".join(f"{name} {value}" for name, value in self.facts())
            print(line + (f"  <- {self.key}" if better else ""), flush=True)
            self.said, self.lines = self.finished, self.lines + 1

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of everything shown."""
        made = max(self.finished - self.first, 1)
        pace = (time.monotonic() - self.started) / made
        left = pace * max(self.config.search.trials - self.finished, 0)
        share = self.saved / max(self.run + self.saved, 1)
        facts = [
            ("candidates", f"{self.finished} of {self.config.search.trials}"),
            ("generation", str(self.origin["generation"])),
            ("stage", "layers and timesteps" if self.origin["stage"] == 2 else "timesteps"),
            (f"best {self.metric}", self.best_so_far()),
            ("seconds a trial", f"{pace:.2f}"),
            ("evaluations saved", f"{share:.0%}"),
            ("time left", clock(left)),
        ]
        return facts if self.workers == 1 else [*facts, ("workers", str(self.workers))]

    def best_so_far(self) -> str:
        """The best value with its number of images."""
        return (
            f"{self.best:.4g} of {self.config.score.images:,} images, search noise"
            if math.isfinite(self.best)
            else "none yet"
        )

    def table(self) -> Group:
        """The live view."""
        grid = Table.grid(padding=(0, 2))
        for name, value in self.facts():
            grid.add_row(name, value)
        return Group(grid, ProgressBar(total=self.config.search.trials, completed=self.finished, width=50))


def status(
    study: StudyName,
    storage: StorageUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Workers that are alive, trials by state, generation, stage, rate and time left."""
    from autodiffusion_optuna.results.status import read_status
    from autodiffusion_optuna.storage.url import storage_option, storage_url

    url = storage_url(storage)
    database, found = existing(study, url)
    state = read_status(database, found, storage_option(url))
    if as_json:
        print(json.dumps(state.to_json(), indent=2))
        return
    counts = ", ".join(f"{count} {name}" for name, count in state.states.items() if count)
    say(f"study {study}: {state.finished} of {state.budget} candidates finished ({counts or 'none begun'})")
    best = "none yet" if state.best is None else f"{state.best:.4g} of {state.images:,} images, search noise"
    say(f"generation {state.generation}, stage {state.stage}, best {state.metric} {best}")
    alive = [worker for worker in state.workers if worker.alive]
    for worker in state.workers:
        seen = "no heartbeat yet" if worker.silence is None else f"heartbeat {worker.silence:.0f} s ago"
        say(f"  {'alive' if worker.alive else 'dead '}  trial {worker.trial}  {seen}  {worker.name}")
    if alive:
        rate = "too early for a rate" if state.rate is None else f"{60 * state.rate:.3g} candidates a minute"
        left = "" if state.seconds_left is None else f", time left {clock(state.seconds_left)}"
        say(f"{len(alive)} {'worker' if len(alive) == 1 else 'workers'} alive, {rate}{left}")
    elif state.finished >= state.budget:
        say("finished; no worker is needed")
    else:
        say(f"no worker is alive; go on with: adopt run --study {shlex.quote(study)}{storage_option(url)}")
    warn(state.warnings)
