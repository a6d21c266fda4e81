"""What rivals.py keeps on disk, so that nothing is sampled twice and a killed run goes on: scores and finished runs.

Scores stay on one machine; the finished live runs are a committed file too, from which another machine goes on.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

TABLES = """
CREATE TABLE IF NOT EXISTS scores (
    measured TEXT, schedule TEXT, bank INTEGER, images INTEGER, value REAL, evaluations INTEGER, seconds REAL,
    PRIMARY KEY (measured, schedule, bank, images));
CREATE TABLE IF NOT EXISTS runs (
    problem TEXT, method TEXT, seed INTEGER, data TEXT, PRIMARY KEY (problem, method, seed));
CREATE TABLE IF NOT EXISTS chosen (name TEXT PRIMARY KEY, value TEXT);
"""


class Key(NamedTuple):
    """What a score is of. ``measured``: model, solver, precision and what else decides a value besides the rest."""

    measured: str
    schedule: str
    bank: int
    images: int


class Scored(NamedTuple):
    """A distance, the network evaluations (times images) that it takes and took, and its seconds."""

    value: float
    evaluations: int
    seconds: float


class Run(NamedTuple):
    """A finished run."""

    problem: str
    method: str
    seed: int
    data: dict[str, Any]


class Store:
    """A file that several processes read and write; each entry is there as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(path, timeout=600, isolation_level=None)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.executescript(TABLES)

    def score(self, key: Key, make: Callable[[], Scored]) -> Scored:
        """The score under a key, made where there is none."""
        where = "measured = ? AND schedule = ? AND bank = ? AND images = ?"
        found = self.database.execute(f"SELECT value, evaluations, seconds FROM scores WHERE {where}", key).fetchone()
        if found is not None:
            return Scored(*found)
        made = make()
        self.database.execute("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?)", (*key, *made))
        return made

    def run(self, problem: str, method: str, seed: int) -> dict[str, Any] | None:
        """A finished run, None where there is none."""
        where = "problem = ? AND method = ? AND seed = ?"
        found = self.database.execute(f"SELECT data FROM runs WHERE {where}", (problem, method, seed)).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def keep(self, problem: str, method: str, seed: int, data: dict[str, Any]) -> None:
        """Write a finished run, in place of what was there."""
        row = (problem, method, seed, json.dumps(data))
        self.database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", row)

    def runs(self, problem: str) -> dict[str, dict[int, dict[str, Any]]]:
        """All finished runs of a problem: method -> seed -> run."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        rows = self.database.execute("SELECT method, seed, data FROM runs WHERE problem = ?", (problem,))
        for method, seed, data in rows:
            found.setdefault(method, {})[seed] = json.loads(data)
        return found

    def write(self, path: Path, problems: Collection[str]) -> None:
        """Write the finished runs of these problems to a file, a line each, in a fixed order."""
        rows = self.database.execute("SELECT problem, method, seed, data FROM runs ORDER BY problem, method, seed")
        runs = [Run(problem, method, seed, json.loads(data)) for problem, method, seed, data in rows]
        lines = [json.dumps(run._asdict()) for run in runs if run.problem in problems and "held_out" in run.data]
        path.write_text("".join(f"{line}\n" for line in lines))

    def read(self, path: Path, fits: Callable[[Run], bool]) -> int:
        """Take the runs of such a file that are not here yet and fit; how many do not fit."""
        runs = [Run(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
        fitting = [run for run in runs if fits(run)]
        for run in fitting:
            if self.run(run.problem, run.method, run.seed) is None:
                self.keep(*run)
        return len(runs) - len(fitting)

    def forget(self, problem: str, method: str, seed: int) -> None:
        """Remove a run; its scores stay."""
        where = "problem = ? AND method = ? AND seed = ?"
        self.database.execute(f"DELETE FROM runs WHERE {where}", (problem, method, seed))

    def chosen(self, name: str, choose: Callable[[], str]) -> str:
        """What was once chosen by that name, chosen now where nothing was; the first choice stays."""
        select = "SELECT value FROM chosen WHERE name = ?"
        if self.database.execute(select, (name,)).fetchone() is None:
            self.database.execute("INSERT OR IGNORE INTO chosen VALUES (?, ?)", (name, choose()))
        return str(self.database.execute(select, (name,)).fetchone()[0])
