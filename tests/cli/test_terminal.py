"""What a terminal of 80 columns shows: nothing is cut off, own studies come first, and no packed data."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from command import Adopt
from rich.console import Console
from rich.table import Table

from autodiffusion_optuna.cli.fitted import print_fitted
from autodiffusion_optuna.config import presets
from autodiffusion_optuna.results.json_text import one_line_lists, shortened
from autodiffusion_optuna.results.status import list_presets, list_studies
from autodiffusion_optuna.storage.database import open_storage
from studies import begin

NAMES = ("best found", "uniform-trailing", "uniform-linspace")
ROWS = (
    ("best found", "6.687 ± 0.53 (3 x 1,000)", "unipc_2, final zero", "953 829 743 612 543 452 308 204 101 3"),
    ("uniform-trailing", "13.81 ± 2.2", "ddim, final sigma_min", "999 899 799 699 599 499 399 299 199 99"),
    ("real images", "-", "", ""),
)


def in_terminal(*arguments: str, columns: int = 80) -> str:
    """What ``adopt`` shows in a terminal, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "autodiffusion_optuna", *arguments]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm"}) as running:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # all has been read
                break
        assert running.wait() == 0, shown
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


def printed(width: int) -> list[str]:
    """The lines of a table of ``ROWS``."""
    table = Table(box=None, pad_edge=False)
    table.add_column("candidate", no_wrap=True)
    table.add_column("held-out noise, 95 %\n3 x 10,000 images", justify="right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    table.add_column("timesteps", overflow="fold")
    for row in ROWS:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width)
    print_fitted(console, table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 45, 60, 72, 73, 79, 80, 81, 100, 200])
def test_a_table_of_any_width_loses_nothing(width: int) -> None:
    lines = printed(width)
    assert max(map(len, lines)) <= width
    words = [word.rstrip(":") for word in " ".join(lines).split()]
    for row in ROWS:
        for cell in row:
            for word in ("" if cell == "-" else cell).split():
                assert word in words, (word, lines)
    assert all(any(line.startswith(row[0]) for line in lines) for row in ROWS)
    if width >= 80:
        assert any(row.startswith("best found") and "6.687 ± 0.53 (3 x 1,000)" in row for row in lines)


def test_what_does_not_fit_into_a_row_goes_below_it() -> None:
    row = "uniform-trailing               13.81 ± 2.2"
    assert f"{row}  ddim, final sigma_min  {ROWS[1][3]}" in printed(120)
    below = "  ddim, final sigma_min: 999 899 799 699 599 499 399 299 199"
    assert printed(60)[-4:-1] == [row, below, "    99"]
    assert printed(30)[-8:-6] == ["uniform-trailing", "  held-out noise, 95 % 3 x"]


def test_show_at_80_columns_cuts_nothing_off(folder: Path, adopt: Adopt) -> None:
    settings = (folder / "quick.toml").read_text()
    searched = settings.replace("steps = 3", 'steps = 10\nsolver = ["ddim", "dpmpp_2m", "unipc_2"]')
    (folder / "quick.toml").write_text(searched)
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=12").code == 0
    text = in_terminal("show", "--study", "quick")
    wide = adopt("show", "--study", "quick").out
    table, _, _ = wide.partition("\n\n")
    table = text.partition("\n\n12 of 12")[0].partition("\n\n")[2]  # below the headline, a sentence that terminals wrap
    assert max(map(len, table.splitlines())) <= 80
    words = [word.rstrip(":") for word in text.split()]
    assert all(word in words for word in table.partition("timesteps")[2].split())
    assert all(name in text for name in NAMES)
    assert "solver ddim, dpmpp_2m, unipc_2, " in text
    assert "…" not in text
    assert not re.search(r"\b(inf|None|nan)\b|\[['\"]", text)


@pytest.mark.usefixtures("quick")
def test_studies_shows_own_studies_first_and_presets_by_what_they_need() -> None:
    text = in_terminal("studies")
    own, ready, needing = text.split("\n\n")
    assert own.splitlines()[0].startswith("study")
    assert re.search(r"^quick\s+finished, 24\s", own, flags=re.MULTILINE)
    assert "run as they are, with " in ready
    assert "  digits-4 " in ready
    assert "  mixture-4 " in ready
    assert "need files or weights" in needing
    assert "  sdxl-coco-8 " in needing
    assert all(name in (needing if line.needs else ready) for line in list_presets() for name in [line.name])
    assert {line.name for line in list_presets()} == set(presets())
    assert max(len(line) for line in f"{own}\n{needing}".splitlines()) <= 80


def test_the_state_of_a_study_says_whether_anyone_works_on_it(folder: Path) -> None:
    study = begin(folder, "sqlite:///adopt.db")
    states = []
    for _ in range(3):
        (line,) = list_studies(open_storage("sqlite:///adopt.db"))
        states.append(line.state)
        study.ask()
    assert states == ["0 of 24, stopped", "0 of 24, 1 worker", "0 of 24, 2 workers"]


def test_an_empty_place_has_no_studies_and_says_where_it_looked(folder: Path, adopt: Adopt) -> None:
    listed = adopt("studies").out
    assert listed.startswith("no study in sqlite:///adopt.db yet\n\npresets that run as they are")
    assert not (folder / "adopt.db").exists()


@pytest.mark.usefixtures("quick")
def test_a_terminal_gets_no_packed_data_and_a_file_gets_all(adopt: Adopt) -> None:
    command = ("export", "--study", "quick", "--format", "json")
    text = in_terminal(*command)
    assert max(map(len, text.splitlines())) < 300
    assert re.search(r'"packed": "… \([\d,]+ characters\)"', text)
    assert "the whole file: " in text
    assert " export --study quick --format json --out ." in text
    whole = adopt(*command)
    assert len(json.loads(whole.out)["noise"]["packed"]) > 1000
    assert "whole file" not in whole.err


@pytest.mark.usefixtures("quick")
def test_lists_of_numbers_take_a_line(adopt: Adopt) -> None:
    for command in (("show", "--json"), ("export", "--format", "json")):
        text = adopt(*command, "--study", "quick").out
        assert re.search(r'"timesteps": \[\d+, \d+, \d+\]', text), command
        assert json.loads(text)


def test_lists_are_joined_only_where_they_are_lists_of_numbers() -> None:
    data = {"a": [1, 2.5, None, True], "b": ["x [1", "2] y", "[\n 1 ]"], "c": [[1, 2], [3]], "d": {"e": []}, "f": [{}]}
    text = json.dumps(data, indent=2)
    assert json.loads(one_line_lists(text)) == data
    assert '"a": [1, 2.5, null, true]' in one_line_lists(text)
    assert one_line_lists(text).count("[1, 2]") == 1
    long = json.dumps({"name": "short", "packed": 'ab\\"' * 500})
    assert json.loads(shortened(long)) == {"name": "short", "packed": "… (3,000 characters)"}


@pytest.mark.usefixtures("quick")
def test_calls_that_were_reused_and_stages_have_one_name_everywhere(adopt: Adopt) -> None:
    shown, state = adopt("show", "--study", "quick").out, adopt("status", "--study", "quick").out
    again = adopt("run", "--study", "quick", "--set", "search.trials=26").out
    for text in (shown, state, again):
        assert ", stage timesteps, " in text
        assert not re.search(r"stage \d|evaluations saved|\d saved", text)
    assert re.search(
        r"network calls \(an image each\): [\d,]+ run \([\d,]+ for the starts: [^)]+\), [\d,]+ reused \(\d+%\)", shown
    )
    assert re.search(r"^ +0  timesteps +\d", shown, flags=re.MULTILINE)
    assert re.search(r", network calls reused \d+%, ", again)
