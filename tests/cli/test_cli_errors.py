"""Bad input: one clear line on stderr, exit code 1, nothing written."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from command import Adopt, check_refused, listing
from diffusers import DDIMScheduler, UNet2DModel

from autodiffusion_optuna import __version__
from autodiffusion_optuna.evaluation.models import DIGITS
from autodiffusion_optuna.report import dashboard
from autodiffusion_optuna.storage.attrs import CONFIG, VERSION


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real model as diffusers saves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tiny_unet(8).save_pretrained(folder)
    DDIMScheduler(num_train_timesteps=50).save_pretrained(folder)
    return folder


SOME = ("--set", "score.reference=quick.toml")
"""A reference that is there, and looked into after the model."""


def tiny_unet(width: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(width, width),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["sampling.steps=1001"], ["1001", "1000"]),
        (["sampling.steps=0"], ["'sampling.steps'", "given: 0"]),
        (["sampling.steps=several"], ["'sampling.steps'", "integer", "'several'"]),
        (["sampling.solver=dim"], ["unknown solver 'dim'", "did you mean 'ddim'", "heun", "plms"]),
        (["score.extractor=pixel"], ["unknown extractor 'pixel'", "did you mean 'pixels'", "digits"]),
        (["search.preset=papr"], ["unknown preset 'papr'", "did you mean 'paper'", "adopt"]),
        (["search.warm_starts=['karas']"], ["unknown baseline 'karas'", "did you mean 'karras'"]),
        (["score.images=0"], ["'score.images'", "given: 0"]),
        (["score.images=100001"], ["'score.images'", "100000"]),
        (["score.pruner=percentile", "score.rungs=[32, 16]"], ["rungs [32, 16] must increase"]),
        (["search.max_cost=0.2"], ["max_cost", "cheapest candidate costs"]),
        (["search.max_skip=0.5"], ["no layers that can be skipped"]),
        (["model.device=cuda:99"], ["device 'cuda:99' does not exist", "cpu"]),
        (["model.source=nowhere"], ["unknown model 'nowhere'", "digits", "diffusers folder"]),
        (["score.reference=nowhere.npz"], ["nowhere.npz' does not exist"]),
        (["score.extractor=digits", "score.reference=nowhere.npz"], ["does not exist"]),
        (["search.trails=5"], ["unknown setting 'search.trails'", "did you mean 'search.trials'"]),
        (["search.grace=0"], ["'search.grace'", "given: 0"]),
        (["search.grace=2592001"], ["'search.grace'", "2592000"]),
        (["search.grace=inf"], ["'search.grace'", "2592000", "given: inf"]),
        (["search.grace=nan"], ["'search.grace'", "2592000", "given: nan"]),
        (["trials"], ["has no '='"]),
        (["score.extractor=inception"], ["inception", "weights"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_setting(folder: Path, adopt: Adopt, settings: list[str], expected: list[str]) -> None:
    before = listing(folder)
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    check_refused(adopt("run", "--study", "quick.toml", *arguments), *expected)
    assert listing(folder) == before


def test_a_missing_study_file(folder: Path, adopt: Adopt) -> None:
    check_refused(adopt("run", "--study", "none.toml"), "cannot read study file 'none.toml'", "No such file")


def test_a_file_that_is_not_toml(folder: Path, adopt: Adopt) -> None:
    (folder / "broken.toml").write_text("[model\nsource = 1\n")
    check_refused(adopt("run", "--study", "broken.toml"), "broken.toml is not valid TOML", "line 1")


def test_an_unknown_key_in_a_file(folder: Path, adopt: Adopt) -> None:
    text = (folder / "quick.toml").read_text().replace("population", "populaton")
    (folder / "typo.toml").write_text(text)
    check_refused(adopt("run", "--study", "typo.toml"), "'search.populaton'", "'search.population'")


def test_an_unknown_study(folder: Path, adopt: Adopt) -> None:
    check_refused(adopt("run", "--study", "digits-5"), "unknown study 'digits-5'", "digits-4-paper", "mixture-4")
    check_refused(adopt("show", "--study", "digits-4"), "no database at 'adopt.db'", "adopt run")
    assert listing(folder) == ["quick.toml"]


def test_a_missing_option_is_one_line_too(folder: Path, adopt: Adopt) -> None:
    check_refused(adopt("run"), "--study")
    check_refused(adopt("walk"), "walk")


def test_no_arguments_show_the_help_as_it_is_laid_out(folder: Path, adopt: Adopt) -> None:
    for arguments, word in (([], "adopt run --study digits-4"), (["reference"], "build")):
        result = adopt(*arguments)
        assert result.code == 1
        assert result.err.startswith("Usage: ")
        assert any(line.strip().startswith(word) for line in result.err.splitlines())


def test_a_model_folder_without_weights(folder: Path, adopt: Adopt, model_folder: Path) -> None:
    shutil.copytree(model_folder, folder / "bare")
    (folder / "bare" / "diffusion_pytorch_model.safetensors").unlink()
    result = adopt("run", "--study", "quick.toml", "--set", "model.source=bare", *SOME)
    check_refused(result, "bare", "no diffusion_pytorch_model.safetensors")


def test_weights_of_another_shape(folder: Path, adopt: Adopt, model_folder: Path) -> None:
    shutil.copytree(model_folder, folder / "mixed")
    tiny_unet(16).save_pretrained(folder / "wide")
    (folder / "mixed" / "config.json").write_text((folder / "wide" / "config.json").read_text())
    result = adopt("run", "--study", "quick.toml", "--set", "model.source=mixed", *SOME)
    check_refused(result, "has shape", "[8", "[16")


def test_more_steps_than_the_models_times(folder: Path, adopt: Adopt, model_folder: Path) -> None:
    source = ["--set", f"model.source={model_folder}", "--set", f"score.reference={DIGITS / 'reference.npz'}"]
    result = adopt("run", "--study", "quick.toml", *source, "--set", "sampling.steps=51")
    check_refused(result, "51", "50")


def test_a_reference_of_another_extractor(folder: Path, adopt: Adopt) -> None:
    result = adopt("run", "--study", "quick.toml", "--set", f"score.reference={DIGITS / 'reference.npz'}")
    check_refused(result, "extractor 'digits'", "'pixels'")


def test_a_model_without_a_reference(folder: Path, adopt: Adopt, model_folder: Path) -> None:
    result = adopt("run", "--study", "quick.toml", "--set", f"model.source={model_folder}")
    check_refused(result, "ships with no reference", "score.reference")


def test_parts_that_do_not_fit_are_refused_before_the_study_is_written(folder: Path, adopt: Adopt) -> None:
    digits = str(DIGITS / "reference.npz")
    wrong = ["--set", "score.extractor=digits", "--set", f"score.reference={digits}"]
    check_refused(adopt("run", "--study", "quick.toml", *wrong), "it takes uint8 [B, 1, 28, 28]")
    np.savez(folder / "large.npz", arr_0=np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1))
    result = adopt("run", "--study", "quick.toml", "--set", "score.reference=large.npz")
    check_refused(result, "gives 16 features", "the reference has 64")
    assert listing(folder) == ["large.npz", "quick.toml"]


def test_a_database_of_another_program_is_left_alone(folder: Path, adopt: Adopt) -> None:
    with sqlite3.connect("theirs.db") as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    before = (folder / "theirs.db").read_bytes()
    for arguments in (["run", "--study", "quick.toml"], ["show", "--study", "quick"]):
        check_refused(adopt(*arguments, "--storage", "theirs.db"), "another program (songs")
    assert (folder / "theirs.db").read_bytes() == before


def test_a_database_of_another_optuna_is_refused(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=1").code == 0
    with sqlite3.connect("adopt.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
        connection.execute("UPDATE version_info SET schema_version = 1")
    check_refused(adopt("show", "--study", "quick"), "another version of Optuna", "adopt storage upgrade --storage")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nonsense://x/y", "no database URL"),
        ("sqlite:///missing/folder/a.db", "does not exist"),
        ("sqlite:///quick.toml", "is not a SQLite database"),
        ("sqlite://", "in memory"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/none", "cannot open storage"),
        ("sqlite:////proc/adopt.db", "read-only"),
    ],
)
def test_a_storage_that_does_not_parse_or_open(folder: Path, adopt: Adopt, url: str, expected: str) -> None:
    before = listing(folder)
    result = adopt("run", "--study", "quick.toml", "--storage", url)
    check_refused(result, expected)
    assert "secret" not in result.err
    assert listing(folder) == before


def test_resuming_with_another_measure_shows_the_difference(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=2").code == 0
    before = json.loads(adopt("show", "--study", "quick", "--json").out)
    result = adopt("run", "--study", "quick.toml", "--set", "score.images=65", "--set", "sampling.steps=4")
    check_refused(result, "score.images: 64 -> 65", "sampling.steps: 3 -> 4", "--set name=NEW")
    assert json.loads(adopt("show", "--study", "quick", "--json").out) == before


def test_resuming_with_other_weights_is_refused(folder: Path, adopt: Adopt, model_folder: Path) -> None:
    images = folder / "images.npz"
    np.savez(images, arr_0=np.random.default_rng(0).integers(0, 255, (80, 8, 8, 1), dtype=np.uint8))
    shutil.copytree(model_folder, folder / "mine")
    arguments = [
        "--set",
        "model.source=mine",
        "--set",
        f"score.reference={images}",
        "--set",
        "search.trials=2",
    ]
    assert adopt("run", "--study", "quick.toml", *arguments).code == 0
    torch.manual_seed(1)
    tiny_unet(8).save_pretrained(folder / "mine")
    more = ["--set", "search.trials=3"]
    check_refused(adopt("run", "--study", "quick.toml", *arguments, *more), "begun with another model")


def test_pictures_and_exports_need_a_folder(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=2").code == 0
    check_refused(adopt("sample", "--study", "quick", "--out", "no/grid.png"), "folder 'no'")
    check_refused(adopt("sample", "--study", "quick", "--out", "grid.xyz"), "grid.xyz")
    check_refused(adopt("export", "--study", "quick", "--out", "no/deeper"), "folder 'no'")
    check_refused(adopt("export", "--study", "quick", "--format", "yaml"), "'yaml' is not one of 'diffusers', 'json'")
    check_refused(adopt("export", "--study", "quick", "--format", "diffusers"), "not a model of diffusers")
    check_refused(adopt("show", "--study", "quik"), "did you mean 'quick'")
    check_refused(adopt("score", "--study", "quick", "--banks", "1"), "held_out_banks")


@pytest.fixture
def newer(quick: optuna.Study) -> optuna.Study:
    """A study whose config another version of adopt wrote."""
    config = quick.user_attrs[CONFIG]
    config["search"]["cleverness"] = 11
    quick.set_user_attr(CONFIG, config)
    quick.set_user_attr(VERSION, "9.9.0")
    return quick


def test_a_study_of_another_version_is_refused(newer: optuna.Study, folder: Path, adopt: Adopt) -> None:
    for command in (
        ("run", "--study", "quick"), ("run", "--study", "quick.toml"), ("show", "--study", "quick"),
        ("status", "--study", "quick"), ("report", "--study", "quick", "--out", "a.html"),
        ("export", "--study", "quick"),
    ):  # fmt: skip
        check_refused(adopt(*command), "'quick' was written by adopt 9.9.0", "install that version", "cleverness")
    assert not (folder / "a.html").exists()


def test_beside_a_study_of_another_version_all_others_are_listed(newer: optuna.Study, adopt: Adopt) -> None:
    optuna.copy_study(
        from_study_name="quick", from_storage="sqlite:///adopt.db", to_storage="sqlite:///adopt.db", to_study_name="b"
    )
    study = optuna.load_study(study_name="b", storage="sqlite:///adopt.db")
    config = study.user_attrs[CONFIG]
    del config["search"]["cleverness"]
    study.set_user_attr(CONFIG, config)
    listed = adopt("studies", "list")
    assert listed.code == 0, listed
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in listed.out.splitlines() if line}
    assert lines["quick"] == f"not readable none yet written by adopt 9.9.0, this is {__version__}"
    assert lines["b"].startswith("finished, 24 ")


def test_the_dashboard_of_a_study_of_another_version_is_served_without_its_note(newer: optuna.Study) -> None:
    troubles: list[str] = []
    with dashboard.published(newer, "sqlite:///adopt.db", troubles.append):
        pass
    (trouble,) = troubles
    assert "note and figures were not written: study 'quick' was written by adopt 9.9.0" in trouble
