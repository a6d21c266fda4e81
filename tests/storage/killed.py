"""Kills ``adopt run`` at its n-th write and looks at what is left, in forks of one warm process.

``python killed.py FOLDER URL every`` tries all writes, ``… some`` the last one of each kind up to the end of the first
trial that is taken, and of each other kind the last one of all. Each has a database of its own, in FOLDER, which holds
``quick.toml``, or on the server of URL. Prints {writes, tried, failures} as JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import FrozenTrial
from sqlalchemy.engine import Engine, make_url

from autodiffusion_optuna.cli.main import main
from autodiffusion_optuna.storage.attrs import OWNER, RETRIES
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study

SETTINGS = (
    "search.trials=8",
    "search.population=4",
    "score.floor_steps=0",
    "search.warm_starts=['uniform', 'quadratic', 'cosine', 'log-snr']",
)
WRITE = re.compile(r"\s*(CREATE|ALTER|DROP|(?:INSERT INTO|UPDATE|DELETE FROM) \S+)", re.IGNORECASE)
CHANGING = {OWNER, RETRIES}
"""Trial user attrs that say who measured a value and when."""


def forked(folder: Path, call: Callable[[], int]) -> int:
    """How ``call`` ends in a fork; what it says is in ``folder/said``."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def adopt(*arguments: str) -> int:
    """``adopt ARGUMENTS`` in this process."""
    sys.argv = ["adopt", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run(url: str) -> int:
    """``adopt run`` of a study of four warm starts and four bred candidates."""
    given = [argument for setting in SETTINGS for argument in ("--set", setting)]
    return adopt("run", "--study", "quick.toml", "--artifacts", "pictures", *given, "--storage", url)


def watched(on_write: Callable[[str], None], url: str) -> int:
    """``run``, with every write told before it is made."""

    def on_statement(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if found := WRITE.match(statement):
            on_write(found[1])

    write = FileSystemArtifactStore.write

    def on_picture(store: FileSystemArtifactStore, *given: Any) -> None:
        on_write("a picture")
        write(store, *given)

    sqlalchemy.event.listen(Engine, "before_cursor_execute", on_statement)
    FileSystemArtifactStore.write = on_picture  # type: ignore[method-assign]
    return run(url)


def listed(folder: Path, url: str) -> list[str]:
    """Kinds of all writes of an undisturbed run, in their order."""

    def call() -> int:
        with (folder / "writes").open("w") as file:
            return watched(lambda kind: print(kind, file=file), url)

    assert forked(folder, call) == 0, (folder / "said").read_text()
    return (folder / "writes").read_text().splitlines()


def killed_at(folder: Path, url: str, number: int) -> int:
    """Exit code of a run that is killed just before its write ``number``."""
    count = iter(range(number + 1))

    def on_write(kind: str) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return forked(folder, lambda: watched(on_write, url))


def looked(folder: Path, url: str) -> str:
    """Whether ``show`` and ``status`` bear what they find: a study, or one line that says there is none yet."""
    for command in ("show", "status"):
        (folder / "said").unlink(missing_ok=True)
        code = forked(folder, lambda command=command: adopt(command, "--study", "quick", "--storage", url))  # type: ignore[misc]
        said = (folder / "said").read_text()
        none = "no study 'quick'" in said or "is empty" in said or "no database at" in said or "holds no" in said
        if code != 0 and not (code == 1 and none and said.count("\n") == 1):
            return f"{command}: {said}"
    return ""


def result(url: str) -> str:
    """All that a study found, but for who found it and when."""
    study = load_study(open_storage(url, create=False), "quick")
    return json.dumps([_trial(t) for t in study.get_trials(deepcopy=False)] + [study.user_attrs])


def _trial(trial: FrozenTrial) -> list[Any]:
    attrs = {name: value for name, value in sorted(trial.user_attrs.items()) if name not in CHANGING}
    pictures = sum(name.startswith("artifacts:") for name in trial.system_attrs)
    return [trial.number, trial.state.name, trial.values, trial.params, attrs, pictures]


def tried(folder: Path, make: Callable[[str], str], number: int, expected: str) -> str:
    """What is wrong after a run was killed before its write ``number``, looked at, and run again; '' for nothing."""
    url = make(f"k{number}")
    if killed_at(folder, url, number) != -signal.SIGKILL:
        return "was not killed: " + (folder / "said").read_text()
    if trouble := looked(folder, url):
        return trouble
    (folder / "said").unlink(missing_ok=True)
    if forked(folder, lambda: run(url)):
        return "run: " + (folder / "said").read_text()
    forked(folder, lambda: (folder / "found").write_text(result(url)) * 0)
    found = (folder / "found").read_text()
    return "" if found == expected else f"found {found}\nnot   {expected}"


def chosen(kinds: list[str], every: bool) -> list[int]:
    """Writes to try."""
    if every:
        return list(range(len(kinds)))
    first = kinds[: kinds.index("INSERT INTO trial_values") + 1]
    last = {kind: number for number, kind in enumerate(kinds)}
    return sorted((last | {kind: number for number, kind in enumerate(first)}).values())


def database(url: str, name: str) -> str:
    """URL of a new database."""
    if url.startswith("sqlite"):
        return f"sqlite:///{name}.db"
    server = make_url(url)
    with psycopg.connect(server.set(drivername="postgresql").render_as_string(False), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.set(database=name).render_as_string(hide_password=False)


if __name__ == "__main__":
    folder, server, how_many = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.chdir(folder)
    said = os.dup(1)
    os.dup2(2, 1)

    def make(name: str) -> str:
        return database(server, f"{how_many}_{name}")  # one server may see both

    # What is imported late is imported here, once.
    run("sqlite:///warm.db")
    for command in ("show", "status"):
        adopt(command, "--study", "quick", "--storage", "sqlite:///warm.db")
    whole = make("whole")
    kinds = listed(folder, whole)
    forked(folder, lambda: (folder / "found").write_text(result(whole)) * 0)
    expected = (folder / "found").read_text()
    numbers = chosen(kinds, how_many == "every")
    failures = {n: trouble for n in numbers if (trouble := tried(folder, make, n, expected))}
    os.write(said, json.dumps({"writes": len(kinds), "tried": len(numbers), "failures": failures}).encode())
