"""Lists of any form become timesteps of a model's grid, and what is none is refused with what to write."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules
from example_results import example

from autodiffusion_optuna import noise
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.export.formats import result_text
from autodiffusion_optuna.search.lists import looks_like_list, read_list, read_lists
from autodiffusion_optuna.search.timesteps import BASELINES, resample

GRIDS = {
    "linear": noise.linear(),
    "scaled linear": noise.scaled_linear(),
    "cosine": noise.cosine(),
    "flow": noise.flow(),
    "shifted flow": noise.flow(1000, 3.0),
    "edm": noise.edm(np.geomspace(0.002, 80, 64)),
}
SD = GRIDS["scaled linear"]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("baseline", ["uniform", "uniform-trailing", "karras", "log-snr"])
def test_sigmas_that_were_exported_come_back_as_the_same_timesteps(grid: str, baseline: str) -> None:
    schedule = GRIDS[grid]
    timesteps = BASELINES[baseline](schedule, 7)
    prediction = "flow_prediction" if "flow" in grid else "epsilon"
    result = example(schedule, timesteps=timesteps, model={"prediction": prediction})
    text = result_text(result, "comfyui")
    read = read_list(f"sigmas: {text}", schedule)
    assert (read.timesteps, read.notes) == (timesteps, ())
    if grid != "cosine":  # its first sigma of 20,291 and its timesteps are told apart by the word alone
        assert read_list(text, schedule).timesteps == timesteps
    assert read_list(str(list(timesteps)), schedule).timesteps == timesteps
    assert read_list(result_text(result, "json"), schedule).timesteps == timesteps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("829 649 424 156", (829, 649, 424, 156)),
        ("829, 649,\n424;156", (829, 649, 424, 156)),
        ("timesteps=[999, 850, 736, 0]", (999, 850, 736, 0)),
        ("(999, 850)", (999, 850)),
        ("[999.0, 850.0]", (999, 850)),
        ("500", (500,)),
        ("# of the forum\n829 # first\n649", (829, 649)),
        ('{"timesteps": [700, 300]}', (700, 300)),
        ('{"sigmas": [14.6146, 0.0]}', (999,)),
        ("14.615, 6.475, 0.399, 0.0", (999, 850, 125)),
        ("sigmas=[14, 1, 0]", (992, 354)),
    ],
)
def test_plain_lists(text: str, expected: tuple[int, ...]) -> None:
    assert read_list(text, SD).timesteps == expected


@pytest.mark.parametrize("name", ["StableDiffusionTimesteps", "StableDiffusionXLTimesteps"])
def test_tables_of_diffusers_are_its_own(name: str) -> None:
    assert read_list(name, SD).timesteps == tuple(AysSchedules[name])
    short = {"StableDiffusionTimesteps": "ays:sd15", "StableDiffusionXLTimesteps": "ays:sdxl"}[name]
    table = read_list(f"{short}-timesteps", SD)
    assert table.timesteps == tuple(AysSchedules[name])
    assert table.label == f"{short}-timesteps"
    # Their sigmas are those of the timesteps, to the digits that are printed.
    sigmas = read_list(short, SD)
    assert sigmas.timesteps == read_list(f"{short}-sigmas", SD).timesteps
    assert max(abs(a - b) for a, b in zip(sigmas.timesteps, table.timesteps, strict=True)) <= 1
    assert sigmas.notes == ()
    other = read_list(short, GRIDS["linear"]).timesteps
    levels = np.exp(-GRIDS["linear"].lambdas[list(other)])
    np.testing.assert_allclose(levels, AysSchedules[name.replace("Timesteps", "Sigmas")][:-1], rtol=0.02)


def test_the_table_for_video_needs_a_model_of_such_levels() -> None:
    wide = noise.edm(np.geomspace(0.002, 700, 1000))
    read = read_list("ays:svd", wide)
    levels = wide.sigmas[list(read.timesteps)]
    np.testing.assert_allclose(levels, AysSchedules["StableDiffusionVideoSigmas"][:-1], rtol=0.01)
    with pytest.raises(ConfigError, match=r"holds 700, above the model's highest sigma, 14\.6146"):
        read_list("ays:svd", SD)


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "forum.txt").write_text("829 649\n")
    assert read_list(f"@{tmp_path}/forum.txt", SD).label == "forum"
    assert read_list(f"mine = @{tmp_path}/forum.txt", SD).label == "mine"
    assert read_list("my list, =829 649".replace(",", ""), SD).label == "my list"
    assert read_list("mine=timesteps=[829, 649]", SD).label == "mine"
    assert read_list("mine=ays:sd15", SD).label == "mine"
    assert read_list(result_text(example(), "json"), SD).label == "mine"
    assert [read.label for read in read_lists(["829", "ays:sd15", "649"], SD)] == ["list 1", "ays:sd15", "list 3"]
    for texts, taken in ((["a=829", "a=649"], ()), (["uniform=829"], ("uniform",))):
        with pytest.raises(ConfigError, match="already the name of another list; name this one: NAME="):
            read_lists(texts, SD, taken)


def test_what_a_list_loses_on_a_grid_is_said() -> None:
    flow = read_list("1.0, 0.5, 0.0", GRIDS["flow"])
    assert flow.timesteps[0] == 999
    assert flow.notes == ("list: sigmas that the model's grid lacks were moved: 1 to 0.999 (timestep 999)",)
    low = read_list("10.0, 0.001", SD)
    assert low.timesteps[-1] == 0
    assert "0.001 to 0.02917 (timestep 0)" in low.notes[0]
    close = read_list("14.6, 0.0294, 0.0293, 0.0292", SD)
    assert close.timesteps == (999, 2, 1, 0)
    assert "0.0294 to" in close.notes[0]
    rounded = read_list("timesteps: 999, 749.25", SD)
    assert (rounded.timesteps, rounded.notes) == (
        (999, 749),
        ("list: timesteps rounded to the model's: 749.25 to 749",),
    )
    # Nothing is said where a sigma is within half a step of the grid.
    assert read_list("6.47, 1.0, 0.1", SD).notes == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is an empty list; write, for example, 829 649 424"),
        ("[]", "is an empty list"),
        ("0.0", "a sigma of 0 is where sampling ends"),
        ("829 649 abc", "holds 'abc', which is no number"),
        ("829, -3", "holds -3; timesteps and sigmas are finite and not negative"),
        ("829 nan", "holds nan"),
        ("424 649 829", "must descend, and 649 comes after 424; reverse it"),
        ("829 829 424", "must descend, and 829 comes after 829; leave out what is wrong"),
        ("1000 750 500 250", "holds timestep 1000; the model's are 0 to 999, or write sigmas:"),
        ("14 6 3 1 0", "could be timesteps or sigmas of this model; write timesteps: or sigmas: before"),
        ("999.0, 749.25, 499.5", "could be timesteps or sigmas"),
        ("sigmas: 80, 10", "holds 80, above the model's highest sigma, 14.6146"),
        ("5000 10", "holds 5000, above the model's highest sigma"),
        ("timesteps: 8.3, 8.1", "timesteps closer than 1"),
        ("ays:sd16", "unknown table 'ays:sd16'; did you mean 'ays:sd15'"),
        ("StableDiffusionTimestep", "unknown table 'StableDiffusionTimestep'; did you mean 'StableDiffusionTimesteps'"),
        ("@nowhere.txt", "cannot read the list in 'nowhere.txt': No such file"),
        ("{broken", "is not valid JSON; give a file of adopt export --format json"),
        ('{"steps": 4}', "has neither a list of timesteps nor one of sigmas"),
        ('{"timesteps": [3, true]}', "holds 'True', which is no number"),
        ('{"timesteps": [3], "train_timesteps": 50}', "indexes 50 timesteps and the model has 1000; give its sigmas"),
        ("karras", "holds 'karras', which is no number"),
    ],
)
def test_what_is_no_list_is_one_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_list(text, SD)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_lists_and_files_of_lists_that_are_too_long_are_named_by_their_beginning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^list '0 1 2 .{50,60}…'") as error:
        read_list(" ".join(map(str, range(400))), SD)
    assert len(str(error.value)) < 200
    (tmp_path / "many.txt").write_text(json.dumps({"timesteps": list(range(400))}))
    with pytest.raises(ConfigError, match=r"^the list in many\.txt: timesteps must descend"):
        read_list(f"@{tmp_path}/many.txt", SD)
    (tmp_path / "loop.txt").write_text("@loop.txt")
    with pytest.raises(ConfigError, match="names another file"):
        read_list(f"@{tmp_path}/loop.txt", SD)


def test_names_of_baselines_are_told_from_lists() -> None:
    assert not any(map(looks_like_list, ["karas", *BASELINES]))
    assert all(map(looks_like_list, ["829 649", "[1]", "mine=829", "@x", "ays:sd15", "StableDiffusionTimesteps"]))


@pytest.mark.parametrize("grid", GRIDS)
def test_another_number_of_steps_follows_the_same_curve(grid: str) -> None:
    schedule = GRIDS[grid]
    for name in ("uniform", "uniform-trailing", "karras"):
        found = BASELINES[name](schedule, 6)
        assert resample(schedule, found, 6) == found
        for steps in (1, 2, 4, 11, 40):
            other = resample(schedule, found, steps)
            assert len(other) == steps
            assert all(a > b for a, b in pairwise(other))
            assert other[0] <= found[0]
        assert resample(schedule, found, 12)[::2] == found or found[-1] == 0


def test_resampling_is_that_of_the_authors_of_ays() -> None:
    """Their log-linear interpolation over evenly spaced positions, the lowest level being the last of K + 1."""
    table = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
    levels = np.exp(-SD.lambdas)
    nodes = np.log([*levels[list(table)], levels[0]])
    wanted = np.exp(np.interp(np.linspace(0, 1, 7), np.linspace(0, 1, 11), nodes))[:-1]
    np.testing.assert_allclose(levels[list(resample(SD, table, 6))], wanted, rtol=0.01)
