"""Searches of tables: what is counted, and what is said of them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rival_picture
import rival_tables
import rival_text
from optuna.pruners import BasePruner
from rival_samplers import ADOPT, EA, SAMPLERS, missing
from rival_tables import Table, digits_table, search, summary

from autodiffusion_optuna import SearchSpace
from autodiffusion_optuna.noise import linear

GRID = 12


def table(screen: bool = False) -> Table:
    """Three steps of a grid of twelve; the farther from 9, 5, 2 the worse."""
    lists = [tuple(reversed(c)) for c in itertools.combinations(range(GRID), 3)]
    values = {ts: 1.0 + sum(abs(a - b) for a, b in zip(ts, (9, 5, 2), strict=True)) for ts in lists}
    space = SearchSpace(T=GRID, min_steps=3, max_steps=3)
    return Table("digits-4 table", space, linear(GRID), values, values if screen else None)


class StopAfterThree(BasePruner):
    """Ends every trial but the first three."""

    def prune(self, study: Any, trial: Any) -> bool:
        return bool(trial.number >= 3 and trial.intermediate_values)


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_sampler_searches_and_repeats_itself(method: str) -> None:
    if missing(method):
        pytest.skip(missing(method) or "")
    runs = [search(table(), method, 0, 12) for _ in range(2)]
    assert runs[0] == runs[1]
    ratios, spent = runs[0]["ratios"], runs[0]["evaluations"]
    assert len(ratios) == 12
    assert ratios == sorted(ratios, reverse=True)
    assert min(ratios) >= 1
    assert spent == [3 * 256 * n for n in range(1, 13)]


def test_a_candidate_that_is_repeated_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival_tables, "REPEATS", 3)
    small = table()
    lists = list(itertools.islice(small.values, 2))
    narrow = Table("t", SearchSpace(T=4, min_steps=3, max_steps=3), linear(4), dict.fromkeys(lists, 1.0) | {
        tuple(reversed(c)): 1.0 for c in itertools.combinations(range(4), 3)
    })  # fmt: skip
    assert len(search(narrow, "random", 0, 9)["ratios"]) == 4  # there are no more


def test_what_the_race_stops_costs_its_screen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival_tables, "pruner_of", lambda name: StopAfterThree())
    found = search(table(screen=True), ADOPT, 0, 5)
    full, stopped = 3 * 256, 3 * 32
    start = rival_tables.TEACHER
    assert found["evaluations"] == [start + n * full + m * stopped for n, m in ((1, 0), (2, 0), (3, 0), (3, 1), (3, 2))]
    assert found["ratios"][2] == found["ratios"][4]  # a stopped candidate is never the best


def test_ours_begins_with_what_it_computed_and_pays_for_it() -> None:
    plain = table()
    given = Table("t", plain.space, plain.schedule, plain.values, starts=((9, 5, 2),), start_evaluations=1000)
    found = search(given, ADOPT, 0, 3)
    assert found["ratios"] == [1, 1, 1]
    assert found["evaluations"] == [1000 + n * 3 * 256 for n in (1, 2, 3)]
    assert search(given, "random", 0, 3) == search(plain, "random", 0, 3)


def test_the_committed_table_is_that_of_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival_tables, "computed_starts", lambda points: ([(799, 549, 400, 250)], points))
    digits = digits_table(tmp_path)
    assert digits.values[digits.starts[0]] == digits.optimum
    assert digits.start_evaluations == 21
    assert len(digits.values) == 5985
    assert digits.optimum == pytest.approx(8.443, abs=1e-3)
    optimum = min(digits.values, key=digits.values.__getitem__)
    grid = np.unique(np.load(Path(rival_tables.__file__).parent / "data" / "digits4_table.npz")["timesteps"])
    assert [int(grid[i]) for i in optimum] == [799, 549, 400, 250]
    assert digits.screen is not None


def test_the_summary_counts_seeds_and_candidates() -> None:
    runs = {"random": {0: made([3.0, 1.01]), 1: made([1.5, 1.2]), 2: made([1.0, 1.0])}}
    found = summary(table(), runs)["random"]
    assert found["candidates to 2 %"] == 2
    assert found["seeds within 2 %"] == 2
    assert found["seeds"] == 3


def test_evaluations_of_ours_are_told_in_candidates() -> None:
    full = 256 * 3
    runs = {ADOPT: {0: made([3.0, 1.01], [full, 2 * full]), 1: made([1.0, 1.0], [full, 2 * full])}}
    found = summary(table(screen=True), runs)[ADOPT]
    assert found["candidates' worth of evaluations to 2 %"] == 1.5
    assert found["the same, worst seed"] == 2


def made(ratios: list[float], spent: list[int] | None = None) -> dict[str, Any]:
    return {"ratios": ratios, "evaluations": spent or [1, 2], "candidates": 15}


def finished() -> dict[str, Any]:
    """A result with all problems."""
    sampler = {"candidates to 2 %": 30.0, "curve": {"15": 1.2}, "seeds": 20, "seeds within 2 %": 20, "candidates": 120}
    entry = {"evaluations": 500.0, "held-out median": 7.0, "held-out interval": [6.0, 8.0], "seconds": 60.0, "seeds": 3}
    names = ("digits-4", "digits-6", "digits-10", "faces-4", "faces-6")
    live = {n: {ADOPT: {**entry, "evaluations to paper's final": 100.0}, EA: entry, "TPE": entry} for n in names}
    share = {"per cent of it": 1.234, "per cent of it at 5,000 images": 0.0567}
    said = {"metric": "FD(x)", "images": 256, "held-out banks": 5, "held-out images": 400, "precision": "bfloat16"}
    return {
        "tables": {"mixture": {ADOPT: sampler, EA: {**sampler, "candidates to 2 %": None}}},
        "live": {**live, "faces-6, solvers": {ADOPT: entry, "adopt, ddim": entry}},
        "ratios": dict.fromkeys(names, share),
        "curves": {n: {ADOPT: [[10, 9.0], [100, 6.5]], EA: [[10, 9.0], [5000, 7.0]]} for n in names},
        "settings": dict.fromkeys((*names, "faces-6, solvers"), said),
    }


def test_readme_has_room_for_all_problems() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    part = rival_text.short(finished())
    pattern = r"(<!-- from rivals -->\n).*?(<!-- end -->)"
    longest = re.sub(pattern, lambda found: f"{found[1]}{part}\n{found[2]}", readme, flags=re.DOTALL)
    assert part in longest
    limit = re.search(r"^LONGEST = (\d+)", (Path(__file__).parents[1] / "test_readme.py").read_text(), re.MULTILINE)
    assert limit is not None
    assert len(longest.splitlines()) <= int(limit[1])


def test_the_parts_of_the_pages_say_what_was_found() -> None:
    found = finished()
    row = next(line for line in rival_text.short(found).splitlines() if line.startswith("| `faces-6`"))
    three = "7 at 500 (3 seeds)"
    assert row == f"| `faces-6` | {three} | {three} | **100** | 1.2 % / 0.057 % | TPE {three} |"
    assert "FD(x) on 5 x 400 held-out images, medians over seeds" in rival_text.short(found)
    full = rival_text.full(found)
    assert "| mixture: best / optimum after | 15 | to 2 % | seeds that got there |" in full
    assert "more than 120" in full
    assert "faces-6, solvers" in full
    assert rival_text.short(None) == rival_text.full(None) == rival_text.UNKNOWN
    assert "adopt" in rival_text.short({**found, "live": {}})  # before anything live is finished


def test_of_equal_rivals_the_first_is_named_every_time() -> None:
    entry = {"held-out median": 7.0}
    for methods in ({"NSGA-II": entry, "random": entry}, {"random": entry, "NSGA-II": entry}):
        assert rival_text.row("digits-4", methods)[2] == "random"


def test_who_is_better_on_the_way_is_said() -> None:
    found = finished()
    curves = found["curves"]["digits-4"]
    curves["TPE"] = [[5, 20.0], [50, 8.0], [200, 7.5]]  # before ours has a winner; then better than 9, not than 6.5
    curves["GP"] = [[50, 9.5], [900, 6.0]]
    found["live"]["digits-4"]["dmn"] = {"evaluations": 0, "held-out median": 8.5}
    methods = {name: found["live"]["digits-4"].get(name, {}) for name in (ADOPT, "TPE", "GP", "dmn")}
    told = rival_text.ahead(found, "digits-4", methods)
    assert told == " Better than `adopt` on the way: `TPE` until 100, `GP` with 6 at 900, `dmn` until 100."
    assert rival_text.ahead(found, "digits-6", {ADOPT: {}, EA: {}}) == ""


def test_the_picture_has_a_panel_a_problem_and_a_line_a_method() -> None:
    found = finished()
    found["curves"]["faces-6, solvers"] = {"adopt, ddim": [[1, 2.0]]}
    picture = rival_picture.draw(found["curves"], json.loads(json.dumps(found["live"])), found["settings"])
    assert picture.count("<path") == 5 * 2
    assert picture.count("50 times less") == 5  # 5,000 against 100
    assert "solvers" not in picture
    assert not re.search("nan|inf", picture.replace("-inf", "inf"))
