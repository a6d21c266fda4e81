"""Lists that users have, on the command line: scored, drawn, exported, and as starts of a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import optuna
import pytest
from command import Adopt, check_refused, listing
from PIL import Image

from autodiffusion_optuna import Result
from autodiffusion_optuna.cli.main import Format
from autodiffusion_optuna.config import load_config
from autodiffusion_optuna.export.formats import FORMATS
from autodiffusion_optuna.search.timesteps import BASELINES
from autodiffusion_optuna.storage.attrs import BASELINE_KEYS
from autodiffusion_optuna.study import components
from studies import counted, run

URL = "sqlite:///adopt.db"


def lines_of(out: str) -> dict[str, str]:
    """Lines of a printed table by how they begin."""
    return {line.split("  ")[0]: line for line in out.splitlines() if line.strip()}


def test_lists_are_scored_beside_the_winner_under_their_labels(folder: Path, adopt: Adopt, quick: optuna.Study) -> None:
    (folder / "forum.txt").write_text("829, 649, 424")
    given = ["--timesteps", "@forum.txt", "--timesteps", "ays:sd15", "--timesteps", "my own=sigmas: 50 5 1"]
    scored = adopt("score", "--study", "quick", *given)
    assert scored.code == 0, scored
    lines = lines_of(scored.out)
    assert {"best found", "uniform", "forum", "ays:sd15", "my own"} <= set(lines)
    assert lines["forum"].rstrip().endswith("829 649 424")
    assert "3.33" in lines["ays:sd15"]  # its own ten steps, at their cost
    for name in ("forum", "ays:sd15", "my own"):
        assert "±" in lines[name]
    again = adopt("score", "--study", "quick", *given)
    assert lines_of(again.out) == lines
    assert "forum" not in adopt("show", "--study", "quick").out


def test_a_list_has_a_row_in_the_picture(folder: Path, adopt: Adopt, quick: optuna.Study) -> None:
    drawn = adopt("sample", "--study", "quick", "--out", "grid.png", "--images", "3", "--timesteps", "829 649 424")
    assert drawn.code == 0, drawn
    assert adopt("sample", "--study", "quick", "--out", "without.png", "--images", "3").code == 0
    with Image.open(folder / "grid.png") as picture, Image.open(folder / "without.png") as without:
        assert picture.height >= without.height * 4 / 3 - 16


@pytest.mark.parametrize("command", ["score", "sample"])
def test_what_is_no_list_is_refused_before_anything_is_done(
    folder: Path, adopt: Adopt, quick: optuna.Study, command: str
) -> None:
    out = ["--out", "grid.png"] if command == "sample" else []
    refused = adopt(command, "--study", "quick", *out, "--timesteps", "829 x")
    check_refused(refused, "list '829 x' holds 'x', which is no number; write, for example")
    taken = adopt(command, "--study", "quick", *out, "--timesteps", "uniform=829")
    check_refused(taken, "already the name of another list; name this one: NAME=829")
    assert adopt("export", "--study", "quick", "--format", "json", "--out", ".").code == 0
    check_refused(adopt(command, "--result", "quick.json", *out, "--timesteps", "829"), "--timesteps goes with --study")
    if command == "sample":
        refused = adopt(command, "--result", "quick.json", *out, "--many-steps", "9")
        check_refused(refused, "--many-steps goes with --study")
    assert "grid.png" not in listing(folder)


def test_another_number_of_steps_is_exported_as_such(folder: Path, adopt: Adopt, quick: optuna.Study) -> None:
    printed = adopt("export", "--study", "quick", "--format", "json", "--steps", "8")
    assert printed.code == 0, printed
    assert "timesteps, interpolated from 3 found steps, not searched: they have no score of their own" in printed.err
    data = json.loads(printed.out)
    assert data["origin"] == {"list": None, "interpolated_from": 3}
    assert (data["score"], len(data["timesteps"]), data["study"]) == (None, 8, "quick-8-steps")
    assert data["cost"] == pytest.approx(8 / 3)
    own = Result.parse(adopt("export", "--study", "quick", "--format", "json").out)
    assert data["timesteps"][0] == own.timesteps[0]
    assert (own.origin, own.score is None) == (None, False)
    assert Result.parse(adopt("export", "--study", "quick", "--format", "json", "--steps", "3").out) == own
    Result.parse(printed.out).write("eight.json")
    assert adopt("score", "--result", "eight.json").code == 0
    check_refused(adopt("export", "--study", "quick", "--steps", "1001"), "--steps 1001 is more than fit", "1000")
    assert adopt("export", "--study", "quick", "--format", "json", "--steps", "8", "--out", ".").code == 0
    assert "quick-8-steps.json" in listing(folder)
    named = adopt("export", "--study", "quick", "--format", "json", "--out", "best.json")
    check_refused(named, "--out 'best.json': give the folder, such as --out .")


def test_a_list_is_exported_with_the_winners_settings(folder: Path, adopt: Adopt, quick: optuna.Study) -> None:
    printed = adopt("export", "--study", "quick", "--format", "json", "--timesteps", "my own=829 649 424 156")
    result = Result.parse(printed.out)
    assert (result.timesteps, result.solver, result.final) == ((829, 649, 424, 156), "ddim", "zero")
    assert (result.study, str(result.origin)) == ("quick-my-own-4-steps", "timesteps of my own, not searched")
    both = Result.parse(
        adopt("export", "--study", "quick", "--format", "json", "--timesteps", "ays:sd15", "--steps", "4").out
    )
    assert str(both.origin) == "timesteps of ays:sd15, interpolated from 10 steps, not searched"
    assert len(both.timesteps) == 4
    check_refused(adopt("export", "--study", "quick", "--format", "json", "--timesteps", "[]"), "is an empty list")


def test_formats_are_offered_in_the_help(folder: Path, adopt: Adopt, quick: optuna.Study) -> None:
    assert set(get_args(Format)) == set(FORMATS)
    shown = " ".join(adopt("export", "--help").out.split())
    assert all(form in shown for form in FORMATS)
    check_refused(adopt("export", "--study", "quick", "--format", "comfy"), "comfy", "diffusers", "comfyui-workflow")


def test_lists_start_a_search_and_are_its_baselines(folder: Path, adopt: Adopt) -> None:
    (folder / "forum.txt").write_text("829, 649, 424\n")
    starts = 'search.warm_starts=["uniform", "@forum.txt", [800, 400, 20], "ays:sd15", "mine=sigmas: 50 5 1", "karras"]'
    first = adopt("run", "--study", "quick.toml", "--set", "search.trials=6", "--set", starts)
    assert first.code == 0, first
    assert "warning: ays:sd15 has 10 steps: interpolated in log-SNR to 3" in first.err
    tried = [candidate for candidate, _ in counted(URL, "quick")]
    assert tried[:3] == ["666,333,0", "829,649,424", "800,400,20"]
    shown = lines_of(adopt("show", "--study", "quick").out)
    assert {"uniform", "forum", "list 2", "ays:sd15", "mine", "karras"} <= set(shown)
    # The list and not where it was: the study goes on without the file, and refuses other lists.
    (folder / "forum.txt").unlink()
    assert adopt("run", "--study", "quick", "--set", "search.trials=8").code == 0
    check_refused(
        adopt("run", "--study", "quick.toml", "--set", 'search.warm_starts=["829 649 423"]'), "search.warm_starts", "->"
    )


IN_ORDER = ["oss", "uniform", "gits", *(name for name in BASELINES if name != "uniform")]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("true", IN_ORDER),
        ("false", []),
        ('["mine=829 649 424", "all"]', ["mine", *IN_ORDER]),
        ("[[829, 649, 424.0]]", ["list 1"]),
    ],
)
def test_what_is_evaluated_first(folder: Path, value: str, names: list[str]) -> None:
    config = load_config(folder / "quick.toml", [f"search.warm_starts={value}"])
    built = components.build(config)
    assert list(built.warm_starts) == names
    assert set(built.baselines) == {*BASELINES, *names} - {"oss", "gits"}  # which are computed once it is begun


def test_lists_keep_the_gap_and_the_range_of_steps(folder: Path) -> None:
    settings = [
        "sampling.steps={min=2, max=4}",
        "sampling.min_gap=50",
        'search.warm_starts=["a=500 490", "b=ays:sd15"]',
    ]
    built = components.build(load_config(folder / "quick.toml", settings))
    assert built.baselines["a"].timesteps == (520, 470)
    assert built.baselines["b"].steps == 4
    assert "a: timesteps moved to lie at least sampling.min_gap = 50 apart" in built.list_notes
    assert all(built.space.is_canonical(candidate) for candidate in built.baselines.values())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('["@nowhere.txt"]', ["search.warm_starts: cannot read", "nowhere.txt", "give a file of a list"]),
        ('["829 x"]', ["search.warm_starts: list '829 x' holds 'x'"]),
        ("[[424, 829]]", ["search.warm_starts: list '[424, 829]': timesteps must descend"]),
        ("[[]]", ["'search.warm_starts': give true, false, or a list of names", "(given: [[]])"]),
        ('[["829"]]', ["'search.warm_starts': give true, false, or a list of names"]),
        ("[[829, true]]", ["'search.warm_starts"]),
        ('["uniform=829 424 1"]', ["already the name of another list"]),
        ('["karas"]', ["unknown baseline 'karas'", "did you mean 'karras'"]),
        ("[3]", ["'search.warm_starts': give true, false, or a list of names"]),
        ("ays:sd15", ["'search.warm_starts': give true, false, or a list of names", "(given: 'ays:sd15')"]),
    ],
)
def test_wrong_starts_are_refused_before_anything_is_written(
    folder: Path, adopt: Adopt, value: str, expected: list[str]
) -> None:
    check_refused(adopt("run", "--study", "quick.toml", "--set", f"search.warm_starts={value}"), *expected)
    assert listing(folder) == ["quick.toml"]


def test_a_search_with_lists_repeats_itself(folder: Path) -> None:
    settings = ("search.trials=9", 'search.warm_starts=["uniform", "mine=829 649 424"]')
    whole = run(folder / "quick.toml", "sqlite:///whole.db", *settings)
    run(folder / "quick.toml", "sqlite:///parts.db", *settings, "search.trials=4")
    run(folder / "quick.toml", "sqlite:///parts.db", *settings)
    assert counted("sqlite:///parts.db", "quick") == counted("sqlite:///whole.db", "quick")
    assert whole.user_attrs[BASELINE_KEYS]["mine"] == "829,649,424"
