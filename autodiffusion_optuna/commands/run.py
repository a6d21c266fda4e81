"""``adopt run``: search, resume, or say that the study is finished."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from autodiffusion_optuna.commands.output import (
    EXIT_INTERRUPTED,
    Overrides,
    StorageUrl,
    Trust,
    clock,
    err,
    out,
    print_result,
    say,
    warn,
)
from autodiffusion_optuna.errors import ConfigError, choose_from

if TYPE_CHECKING:
    import optuna

    from autodiffusion_optuna.config import StudyConfig
    from autodiffusion_optuna.study import Parts, Progress


def run(
    study: Annotated[str, typer.Option("--study", help="A study file, a preset's name, or a study in the database.")],
    overrides: Overrides = None,
    storage: StorageUrl = None,
    trust: Trust = False,
) -> None:
    """Search; the same command again goes on where it stood, or says that the study is finished."""
    from autodiffusion_optuna import records
    from autodiffusion_optuna.report import peek, require_same
    from autodiffusion_optuna.storage import storage_url

    url = storage_url(storage)
    config = _resolve(study, overrides or [], url)
    begun = peek(url, config.name)
    if begun is not None:
        require_same(begun, config)
        if _complete(begun, config):
            done = records.finished(begun)
            say(f"study {config.name} is finished: {done} candidates for a budget of {config.search.trials}.")
            print_result(begun, url)
            return
    _search(config, url, begun, trust)


def _resolve(name: str, overrides: list[str], url: str) -> StudyConfig:
    """The config that ``--study`` means: a file, what a study in the database was last run with, or a preset."""
    from autodiffusion_optuna.config import load_config, load_preset, parse_config, presets
    from autodiffusion_optuna.report import existing_names, peek, stored_config

    if name.endswith(".toml") or "/" in name or Path(name).is_file():
        return load_config(Path(name), overrides)
    begun = peek(url, name)
    if begun is not None:
        return parse_config(stored_config(begun).model_dump(mode="json"), overrides)
    if name in presets():
        return load_preset(name, overrides)
    raise ConfigError(choose_from("study", name, [*presets(), *existing_names(url)]) + "; or give a study file.toml")


def _complete(study: optuna.Study, config: StudyConfig) -> bool:
    """Whether the budget is met and the winner has its fresh score."""
    from autodiffusion_optuna import records
    from autodiffusion_optuna.report import read_report

    best = read_report(study).best
    if best is None or records.finished(study) < config.search.trials:
        return False
    size = config.score.fresh_images, config.score.fresh_banks
    return records.fresh(study.user_attrs, best.candidate.key, *size) is not None


def _search(config: StudyConfig, url: str, begun: optuna.Study | None, trust: bool) -> None:
    from autodiffusion_optuna import records
    from autodiffusion_optuna import study as studies
    from autodiffusion_optuna.evaluation.allocator import keep_freed_memory
    from autodiffusion_optuna.report import stored_unit_costs
    from autodiffusion_optuna.storage import open_storage

    keep_freed_memory()
    parts = studies.build(config, trust=trust, unit_costs=stored_unit_costs(begun))
    database = open_storage(url)
    study = studies.open_study(parts, database)
    done = records.finished(study)
    verb = "going on" if done else "starting"
    say(f"study {config.name}: {done} of {config.search.trials} candidates finished, {verb}. Ctrl-C stops it safely.")
    warn(studies.warnings(parts, config.score.images))
    try:
        with _progress(config, study) as on_trial:
            studies.work(parts, study, database, on_trial)
        _score_finalists(parts, study)
    except KeyboardInterrupt:
        err.print(f"stopped; {records.finished(study)} candidates are kept. Go on with: {_resume_command()}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    print_result(study, url)


def _resume_command() -> str:
    """What the user typed: the same command resumes."""
    return shlex.join(["adopt", *sys.argv[1:]])


def _score_finalists(parts: Parts, study: optuna.Study) -> None:
    from autodiffusion_optuna import study as studies

    images, banks = parts.config.score.fresh_images, parts.config.score.fresh_banks
    candidates = studies.finalists(parts, study)
    say(f"scoring {', '.join(candidates)} on {banks} fresh banks of {images} images …")
    for candidate in candidates.values():
        studies.score_fresh(parts, study, candidate, images, banks)


@contextmanager
def _progress(config: StudyConfig, study: optuna.Study) -> Iterator[Any]:
    """A callback for every trial: a live table on a terminal, plain lines elsewhere."""
    board = _Board(config, study)
    if not out.is_terminal:
        yield board.plain
        return
    with Live(board.table(), console=out, refresh_per_second=4, transient=True) as live:

        def on_trial(progress: Progress) -> None:
            board.update(progress)
            live.update(board.table())

        yield on_trial


class _Board:
    """What the progress view shows."""

    EVERY = 20  # plain output: a line every so many trials, and for every new best

    def __init__(self, config: StudyConfig, study: optuna.Study) -> None:
        from autodiffusion_optuna.report import read_report

        report = read_report(study)
        self.config, self.metric = config, report.metric
        self.first = self.finished = len(report.finished)
        self.best = report.best.value if report.best else float("inf")
        self.run, self.saved = report.total("run"), report.total("saved")
        self.origin: dict[str, Any] = report.last_origin
        self.started = time.monotonic()

    def update(self, progress: Progress) -> bool:
        """Take in one trial; whether it is a new best."""
        attrs, values = progress.trial.user_attrs, progress.trial.values
        self.finished = progress.finished
        self.origin = {key: attrs.get(key, value) for key, value in self.origin.items()}
        self.run += attrs.get("score", {}).get("run", 0)
        self.saved += attrs.get("score", {}).get("saved", 0)
        better = progress.trial.state.name == "COMPLETE" and bool(values) and values[0] < self.best
        if better:
            self.best = values[0]
        return better

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of everything shown."""
        made = max(self.finished - self.first, 1)
        pace = (time.monotonic() - self.started) / made
        left = pace * max(self.config.search.trials - self.finished, 0)
        share = self.saved / max(self.run + self.saved, 1)
        return [
            ("candidates", f"{self.finished} of {self.config.search.trials}"),
            ("generation", str(self.origin["generation"])),
            ("stage", "layers and timesteps" if self.origin["stage"] == 2 else "timesteps"),
            (f"best {self.metric}", f"{self.best:.4g}"),
            ("seconds a trial", f"{pace:.2f}"),
            ("evaluations saved", f"{share:.0%}"),
            ("time left", clock(left)),
        ]

    def table(self) -> Group:
        """The live view."""
        grid = Table.grid(padding=(0, 2))
        for name, value in self.facts():
            grid.add_row(name, value)
        return Group(grid, ProgressBar(total=self.config.search.trials, completed=self.finished, width=50))

    def plain(self, progress: Progress) -> None:
        """One line for a new best, and one every so often."""
        better = self.update(progress)
        if better or self.finished % self.EVERY == 0 or self.finished == self.config.search.trials:
            line = ", ".join(f"{name} {value}" for name, value in self.facts())
            print(line + (f"  <- {attrs_key(progress)}" if better else ""), flush=True)


def attrs_key(progress: Progress) -> str:
    """Canonical key of a trial's candidate."""
    return str(progress.trial.user_attrs.get("candidate", ""))
