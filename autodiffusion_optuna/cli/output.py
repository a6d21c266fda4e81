"""What every command shares: consoles, options, and the tables that several of them print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from autodiffusion_optuna.cli.completion import complete_begun, complete_setting
from autodiffusion_optuna.errors import ConfigError, program
from autodiffusion_optuna.storage.url import storage_option

if TYPE_CHECKING:
    import optuna

    from autodiffusion_optuna.config import StudyConfig
    from autodiffusion_optuna.results.summary import StudySummary
    from autodiffusion_optuna.storage.study_storage import StudyStorage
    from autodiffusion_optuna.study.components import ImageComponents, StudyComponents

PIPE_WIDTH = 160  # of tables that go to a file or another program
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

StudyName = Annotated[str, typer.Option("--study", help="A study in the database.", autocompletion=complete_begun)]
StudyOption = Annotated[
    str | None, typer.Option("--study", help="A study in the database.", autocompletion=complete_begun)
]
ResultOption = Annotated[Path | None, typer.Option("--result", help="A result that adopt export --format json wrote.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, as in the study file.", autocompletion=complete_setting)
]
StorageUrl = Annotated[
    str | None,
    typer.Option("--storage", help="Database URL or SQLite file; default $ADOPT_STORAGE, else sqlite:///adopt.db."),
]
Places = Annotated[
    list[str] | None, typer.Option("--set", help="Where a file of the study is now: model.source=PATH and the like.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Allow files that contain code (TorchScript weights).")]

Lists = Annotated[
    list[str] | None,
    typer.Option(
        "--timesteps",
        metavar="LIST",
        help="With --study: a list of timesteps or sigmas, @FILE, ays:sd15; or NAME=LIST.",
    ),
]

EXIT_INTERRUPTED = 130


def say(text: str) -> None:
    """Print a line that is never broken: commands must stay whole when copied."""
    out.print(text, soft_wrap=True)


def print_json(data: object) -> None:
    """Print one JSON object, a list of numbers on a line."""
    from autodiffusion_optuna.results.json_text import one_line_lists

    print(one_line_lists(json.dumps(data, indent=2)))


def warn(warnings: list[str]) -> None:
    """Print warnings on stderr, a line each."""
    for warning in warnings:
        err.print(f"warning: {warning}")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def existing(name: str, url: str) -> tuple[StudyStorage, optuna.Study]:
    """The database at ``url`` and a study in it that adopt made (StorageError, StudyError)."""
    from autodiffusion_optuna.storage.database import open_storage
    from autodiffusion_optuna.storage.studies import load_study

    database = open_storage(url, create=False)
    return database, load_study(database, name)


def load_components(
    name: str, url: str, trust: bool, places: list[str] | None = None, overrides: list[str] | None = None
) -> tuple[optuna.Study, StudyComponents]:
    """A study of the database with its components, built from the config it was run with (AdoptError children).

    ``places``: what the user set, ``OF_THIS_HOST`` alone. ``overrides``: of the command's own.
    """
    from autodiffusion_optuna.storage.attrs import BASELINE_KEYS
    from autodiffusion_optuna.storage.studies import require_files, stored_batch, stored_unit_costs
    from autodiffusion_optuna.study import components, lifecycle
    from autodiffusion_optuna.study.starts import with_baselines

    study, config = _placed(name, url, places or [], overrides or [])
    require_files(study, config)
    built = components.build(config, trust=trust, unit_costs=stored_unit_costs(study), batch=stored_batch(study))
    lifecycle.check_same(built, study)
    return study, with_baselines(built, study.user_attrs.get(BASELINE_KEYS, {}))


def load_image_components(
    name: str, url: str, trust: bool, places: list[str] | None = None
) -> tuple[optuna.Study, ImageComponents]:
    """As ``load_components``, to draw images alone: neither extractor nor reference is needed."""
    from autodiffusion_optuna.storage.attrs import BASELINE_KEYS
    from autodiffusion_optuna.storage.studies import require_files, stored_batch, stored_unit_costs
    from autodiffusion_optuna.study import components, lifecycle
    from autodiffusion_optuna.study.starts import with_baselines

    study, config = _placed(name, url, places or [], [])
    require_files(study, config, unneeded="score")
    built = components.build_images(config, trust=trust, unit_costs=stored_unit_costs(study), batch=stored_batch(study))
    lifecycle.check_same(built, study)
    return study, with_baselines(built, study.user_attrs.get(BASELINE_KEYS, {}))


def _placed(name: str, url: str, places: list[str], overrides: list[str]) -> tuple[optuna.Study, StudyConfig]:
    """A study and the config it was run with, its files where ``places`` say."""
    from autodiffusion_optuna.config import OF_THIS_HOST, parse_config
    from autodiffusion_optuna.storage.studies import stored_config

    for place in places:
        if place.partition("=")[0].strip() not in OF_THIS_HOST:
            raise ConfigError(
                f"--set {place!r}: a study keeps its own settings; here --set takes {', '.join(OF_THIS_HOST)}"
            )
    study = existing(name, url)[1]
    return study, parse_config(stored_config(study).model_dump(mode="json"), [*places, *overrides])


def print_result(study: optuna.Study, url: str, *, warned: bool = True) -> None:
    """What a finished run prints: the table, and the commands that come next.

    ``warned``: whether it printed the study's stored warnings when it began.
    """
    from autodiffusion_optuna.cli.tables import print_tables
    from autodiffusion_optuna.results.summary import read_summary

    summary = read_summary(study)
    print_tables(summary)
    tail = storage_option(url)
    warn(summary.found_doubtful(tail) if warned else summary.warnings(tail))
    name, more = summary.config.name, summary.config.search.trials * 2
    adopt = program()
    say("\nnext:")
    for command, why in (
        (f"{adopt} show --study {name}{tail}", "history, network calls reused, seconds by phase"),
        (f"{adopt} sample --study {name} --out {name}.png{tail}", "see the difference"),
        (f"{adopt} export --study {name}{tail}", "apply it to the model with diffusers"),
        (f"{adopt} run --study {name} --set search.trials={more}{tail}", "search on"),
    ):
        say(f"  {command}    # {why}")


def print_facts(summary: StudySummary) -> None:
    """Numbers of a study and its history, line by line."""
    from autodiffusion_optuna.results.held_out import significant
    from autodiffusion_optuna.results.summary import STAGES

    data = summary.to_json()
    calls, seconds = data["evaluations"], data["seconds"]
    run, saved = calls["run"], calls["saved"]
    say(
        f"\n{data['finished']} of {data['budget']} candidates finished, generation {data['generation']}, "
        f"stage {STAGES[data['stage']]}, solver {summary.solver_names}, {data['images']:,} images a candidate, "
        f"reference {summary.reference_name}",
    )
    extra = {"starts": "for the starts", "screen": "for the screen's teacher", "validation": "to validate finalists"}
    parts = [f"{calls[part]:,} {purpose}" for part, purpose in extra.items() if calls[part]]
    if data["start_evaluations"]:
        parts[0] += f": {', '.join(f'{name} {count:,}' for name, count in data['start_evaluations'].items())}"
    spent = f" ({'; '.join(parts)})" if parts else ""
    say(f"network calls (an image each): {run:,} run{spent}, {saved:,} reused ({saved / max(run + saved, 1):.0%})")
    if summary.race is not None:
        say(summary.race.text())
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "total")
    say(f"seconds: {phases}, total {seconds['total']:.1f}")
    ratio = data["best"] and data["best"]["variance_ratio"]
    if ratio is not None:
        say(f"the best candidate's features vary {ratio:.0%} as much as the reference's, on the search's images")
    say(f"\ngeneration  stage                 best so far, search noise ({summary.value_name})")
    for generation, stage, value in summary.best_by_generation():
        say(f"{generation:>10}  {STAGES[stage]:<20}  {'-' if value is None else significant(value)}")
