"""A study works from any folder, and its files may have moved: relative paths are those of whoever wrote them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import Adopt

from autodiffusion_optuna import config as c
from autodiffusion_optuna.evaluation.models import DIGITS, MODELS

FILE = """
[model]
source = "my-model"
device = "cpu"

[sampling]
steps = 2

[search]
trials = 3
warm_starts = ["uniform"]

[score]
extractor = "digits"
reference = "data/reference.npz"
images = 8
finalists = 0
floor_steps = 0
held_out_images = 8
held_out_banks = 2
"""

DATABASE = "../mine.db"
PLUGIN = """
import torch
from autodiffusion_optuna.evaluation.models.plugin import PluginModel
from autodiffusion_optuna.noise import linear

def shrink(device):
    schedule = linear(1000)
    def network(x, t, condition):
        sigma = torch.as_tensor(schedule.sigmas, dtype=torch.float32, device=device)[t.long()]
        return sigma[:, None, None, None] * x
    return PluginModel(network, (3, 8, 8), schedule, "epsilon", fingerprint="standard normal, 1")

def means(images):
    return images.float().mean((2, 3))
"""

TABLE = {
    "name": "x",
    "model": {"source": "digits"},
    "sampling": {"steps": 4},
    "search": {"trials": 10},
    "score": {"extractor": "digits"},
}


def write_project(folder: Path) -> Path:
    """A folder with a study file, its model and its reference."""
    project = folder / "project"
    (project / "data").mkdir(parents=True)
    shutil.copytree(DIGITS, project / "my-model", ignore=shutil.ignore_patterns("extractor*", "reference*"))
    shutil.copy(DIGITS / "reference.npz", project / "data")
    (project / "mine.toml").write_text(FILE)
    return project


@pytest.fixture
def project(folder: Path) -> Path:
    """A project inside the current folder."""
    return write_project(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose study was run in its own folder, with its database beside it."""
    project = write_project(tmp_path_factory.mktemp("finished"))
    command = [sys.executable, "-m", "autodiffusion_optuna", "run", "--study", "mine.toml", "--storage", DATABASE]
    environment = {key: value for key, value in os.environ.items() if key != "ADOPT_STORAGE"}
    subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True)
    return project


@pytest.fixture
def elsewhere(finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder than that of the finished study."""
    place = finished.parent / folder.name
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def test_the_bundled_models_are_those_that_config_knows() -> None:
    assert set(c.BUNDLED) == set(MODELS)


@pytest.mark.parametrize("command", ["sample", "score", "run", "report"])
def test_a_study_works_from_another_folder(elsewhere: Path, adopt: Adopt, command: str) -> None:
    more = {"sample": ["--out", "x.png"], "report": ["--out", "x.html"], "run": ["--set", "search.trials=4"]}
    done = adopt(command, "--study", "mine", *more.get(command, []), "--storage", DATABASE)
    assert done.code == 0, done.err
    assert "no pictures" not in done.err


def test_a_study_file_is_run_from_another_folder(project: Path, folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "project/mine.toml").code == 0
    config = c.load_config(project / "mine.toml")
    assert config.model.source == str(project / "my-model")
    assert config.score.reference == str(project / "data" / "reference.npz")


def test_moved_files_are_named_and_their_new_places_are_taken(
    project: Path, folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert adopt("run", "--study", "mine.toml", "--storage", DATABASE).code == 0
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    moved = project.rename(project.with_name("moved"))
    lost = adopt("sample", "--study", "mine", "--out", "x.png", "--storage", DATABASE)
    assert lost.code == 1
    assert "model.source = " in lost.err
    assert "--set model.source=PATH" in lost.err
    assert len(lost.err.strip().splitlines()) == 1
    places = ["--set", "model.source=../moved/my-model", "--set", "score.reference=../moved/data/reference.npz"]
    assert adopt("sample", "--study", "mine", "--out", "x.png", "--storage", DATABASE, *places).code == 0
    assert adopt("score", "--study", "mine", "--storage", DATABASE, *places).code == 0
    longer = adopt("run", "--study", "mine", "--storage", DATABASE, "--set", "search.trials=4", *places)
    assert longer.code == 0, longer.err
    # That run has kept the new places.
    assert adopt("sample", "--study", "mine", "--out", "y.png", "--storage", DATABASE).code == 0
    assert moved.is_dir()


def test_other_files_in_their_place_are_refused(elsewhere: Path, finished: Path, adopt: Adopt) -> None:
    copy = shutil.copytree(finished / "my-model", elsewhere / "other")
    from safetensors.torch import load_file, save_file

    weights = next(copy.rglob("*.safetensors"))
    tensors = load_file(weights)
    first = next(iter(tensors))
    tensors[first] = tensors[first] + 1
    save_file(tensors, weights)
    refused = adopt("sample", "--study", "mine", "--out", "x.png", "--storage", DATABASE, "--set", "model.source=other")
    assert refused.code == 1
    assert "begun with another model" in refused.err
    assert not Path("x.png").exists()


def test_what_a_study_measures_cannot_be_set_where_it_is_used(elsewhere: Path, adopt: Adopt) -> None:
    refused = adopt("sample", "--study", "mine", "--out", "x.png", "--storage", DATABASE, "--set", "sampling.steps=3")
    assert refused.code == 1
    assert "a study keeps its own settings" in refused.err


def test_plug_ins_are_found_from_another_folder(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "plugins").mkdir()
    (folder / "plugins" / "shrinking.py").write_text(PLUGIN)
    text = FILE.replace('"my-model"', '"python:shrinking:shrink"').replace('"digits"', '"python:shrinking:means"')
    (folder / "plugins" / "mine.toml").write_text(
        text.replace('reference = "data/reference.npz"', 'reference = "r.npz"')
    )
    import numpy as np

    np.savez(folder / "plugins" / "r.npz", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    done = adopt("run", "--study", "plugins/mine.toml", "--trust")
    assert done.code == 0, done.err
    sampled = adopt("sample", "--study", "mine", "--out", "x.png", "--trust")
    assert sampled.code == 0, sampled.err
    (folder / "plugins").rename(folder / "moved")
    lost = adopt("score", "--study", "mine", "--trust")
    assert "--set score.reference=PATH --set folder=PATH" in lost.err
    drawn = adopt("sample", "--study", "mine", "--out", "x.png", "--trust")  # which needs no reference
    assert "score.reference" not in drawn.err
    assert "--set folder=PATH" in drawn.err


def test_a_home_that_is_not_here(folder: Path, adopt: Adopt) -> None:
    refused = adopt("run", "--study", "quick.toml", "--set", "score.reference=~nosuch/x")
    assert refused.code == 1
    assert "'~nosuch/x' names the folder of a user who is not here" in refused.err


@pytest.mark.parametrize("setting", c.FILES)
def test_every_setting_that_names_a_file_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thing").touch()
    section, name = setting.split(".")
    table = {**TABLE, section: {**TABLE[section], name: "thing"}}  # type: ignore[dict-item]
    c.locate_files(table, tmp_path / "there")
    assert table[section][name] == str(tmp_path / "there" / "thing")  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    config = c.parse_config(TABLE, [f"{setting}=there/thing"])
    assert c.flatten(config.model_dump())[setting] == str(tmp_path / "there" / "thing")
    assert c.missing_files(config) == []
    (tmp_path / "there" / "thing").unlink()
    assert c.missing_files(config) == [setting]
    assert c.parse_config(TABLE, [f"{setting}=~/thing"]).model_dump()[section][name] == str(Path.home() / "thing")


def test_what_is_no_path_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    for source in ("digits", "org/name", "org/name@main", "digitz", "python:mine:make"):
        table = {"model": {"source": source}}
        c.locate_files(table, tmp_path)
        assert table["model"]["source"] == source
    table = {"model": {"source": "adm:64x64.pt"}}
    c.locate_files(table, tmp_path)
    assert table["model"]["source"] == f"adm:{tmp_path}/64x64.pt"


def test_files_of_a_preset_start_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert c.load_preset("adm-imagenet64-4").model.classifier == str(tmp_path / "64x64_classifier.pt")
