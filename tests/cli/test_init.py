"""``adopt init`` looks at a model of each kind and writes a study file that runs as written, or says what it lacks."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_adm
import tiny_models
import tiny_pipelines
from command import Adopt, check_refused, listing
from PIL import Image

from autodiffusion_optuna.config import FILL_IN, load_config
from autodiffusion_optuna.evaluation.features.weights import PUBLISHED, Published, sha256_of
from autodiffusion_optuna.study import suggest

IMAGES = ("--images", "photos")
QUICK = (
    "search.trials=2", "search.warm_starts=['uniform']", "score.images=8", "score.held_out_images=8",
    "score.held_out_banks=2", "score.finalists=0", "score.floor_steps=0", "model.batch=8", "sampling.steps=2",
)  # fmt: skip
"""Settings that make any study a matter of seconds."""


def photos(folder: Path, count: int = 20, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> None:
    (folder / "photos").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (*size, 3) if mode == "RGB" else size
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / "photos" / f"{i}.png")


def sd(folder: Path) -> object:
    tiny_pipelines.write_prompts(folder.parent)
    return tiny_pipelines.write_sd(folder)


KINDS: dict[str, tuple[Callable[[Path], object] | None, tuple[str, ...], str]] = {
    "digits": (None, ("digits",), "980,161 parameters"),
    "unet": (tiny_models.write_ddpm, ("model", *IMAGES), "takes no prompts, no labels and no guidance"),
    "class-conditional": (tiny_models.write_class_conditional, ("model", *IMAGES), "5 classes"),
    "dit": (tiny_models.write_dit, ("model", *IMAGES), "10 classes"),
    "sd": (sd, ("model", *IMAGES, "--prompts", "prompts.txt"), "5 prompts"),
    "adm": (lambda folder: tiny_adm.write_adm(folder.parent), ("adm.pt", *IMAGES), "linear betas"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_runs_as_written(folder: Path, adopt: Adopt, kind: str) -> None:
    write, arguments, fact = KINDS[kind]
    photos(folder)
    if write is not None:
        write(folder / "model")
    made = adopt("init", *arguments, "--name", "mine")
    assert made.code == 0, made.err
    assert fact in made.out
    assert "adopt run --study mine.toml --dry-run" in made.out
    text = (folder / "mine.toml").read_text()
    assert fact in " ".join(line.lstrip("# ") for line in text.splitlines())
    assert FILL_IN not in text
    before = listing(folder)
    dry = adopt("run", "--study", "mine.toml", "--dry-run")
    assert dry.code == 0, dry.err
    assert "x 200 candidates + " in dry.out
    assert listing(folder) == before
    settings = [argument for setting in QUICK for argument in ("--set", setting)]
    run = adopt("run", "--study", "mine.toml", *settings)
    assert run.code == 0, run.err
    assert "best found" in run.out


def test_what_only_the_user_knows_is_a_marked_line_and_run_names_it(folder: Path, adopt: Adopt) -> None:
    tiny_pipelines.write_sd(folder / "model")
    made = adopt("init", "model")
    assert made.code == 0, made.err
    assert "fill in there: model.prompts, score.reference" in made.out
    lines = (folder / "model.toml").read_text().splitlines()
    for setting in ("prompts", "reference"):
        place = lines.index(f'{setting} = "{FILL_IN}"')
        assert lines[place - 1].startswith("# >>> FILL IN: ")
    refused = adopt("run", "--study", "model.toml")
    check_refused(refused, "model.prompts: a file of prompts", "score.reference: images like those")
    photos(folder)
    prompts = tiny_pipelines.write_prompts(folder)
    given = ["--set", f"model.prompts={prompts}", "--set", "score.reference=photos"]
    filled = adopt("run", "--study", "model.toml", "--dry-run", *given)
    assert filled.code == 0, filled.err


def test_paths_start_from_where_the_file_lies(folder: Path, adopt: Adopt) -> None:
    tiny_models.write_ddpm(folder / "model")
    photos(folder)
    (folder / "studies").mkdir()
    made = adopt("init", "model", *IMAGES, "--out", "studies/mine.toml")
    assert made.code == 0, made.err
    config = load_config(folder / "studies" / "mine.toml")
    assert config.name == "mine"
    assert config.model.source == str(folder / "model")
    assert config.score.reference == str(folder / "photos")


def test_nothing_is_overwritten_and_the_model_is_not_looked_at_before_that_is_known(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine.toml").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr("autodiffusion_optuna.study.suggest.load_model", never)
        check_refused(adopt("init", "mixture", "--out", "mine.toml"), "'mine.toml' exists", "--force")
        check_refused(
            adopt("init", "mixture", "--out", "no/mine.toml"), "folder 'no' for the study file does not exist"
        )
        check_refused(adopt("init", "mixture", "--out", "mine.txt"), "ends in .toml")
        check_refused(adopt("init", "mixture", "--name", "a b"), "--name 'a b'")
        check_refused(adopt("init", "mixture", "--images", "nowhere"), "--images 'nowhere' does not exist")
        check_refused(adopt("init", "mixture", "--prompts", "nowhere"), "--prompts 'nowhere' does not exist")
        check_refused(adopt("init", "mixture", "--weights", "mine.toml"), "none of the published files")
        check_refused(adopt("init", "mixture", "--set", "search.trials=3"), "settings of the model")
    assert (folder / "mine.toml").read_text() == "mine"
    assert adopt("init", "mixture", "--out", "mine.toml", "--force").code == 0
    assert tomllib.loads((folder / "mine.toml").read_text())["model"]["source"] == "mixture"


def never(*arguments: object, **options: object) -> None:
    raise AssertionError("the model was loaded")


def test_images_unlike_the_models_are_refused(folder: Path, adopt: Adopt) -> None:
    tiny_models.write_ddpm(folder / "model")
    photos(folder, mode="L")
    check_refused(adopt("init", "model", *IMAGES), "1 channel(s)", "the model's have 3")
    assert not (folder / "model.toml").exists()


def test_images_of_another_size_need_an_extractor_that_resizes(folder: Path, adopt: Adopt) -> None:
    tiny_models.write_ddpm(folder / "model")
    photos(folder, size=(20, 24))
    assert adopt("init", "model", *IMAGES).code == 0
    assert 'extractor = "pixels"' not in (folder / "model.toml").read_text()
    photos(folder, size=(20, 24), mode="L")  # a bundled model's own network takes one size
    check_refused(adopt("init", "digits", *IMAGES), "images of 20x24, those of model 'digits' are 28x28")
    assert not (folder / "digits.toml").exists()


def test_a_checkpoint_whose_images_are_of_unknown_size(folder: Path, adopt: Adopt) -> None:
    tiny_adm.write_adm(folder)
    check_refused(adopt("init", "adm.pt"), "do not tell the side of its images", "model.fields.image_size=PIXELS")
    made = adopt("init", "adm.pt", "--set", "model.fields.image_size=16")
    assert made.code == 0, made.err
    assert "assumed is guided-diffusion's default" in made.err
    fields = tomllib.loads((folder / "adm.toml").read_text())["model"]["fields"]
    wanted = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "num_classes": 10, "resblock_updown": True}
    assert fields | wanted == fields
    assert "num_heads" not in fields


def test_a_denoiser_alone_needs_the_folder_of_a_pipeline(folder: Path, adopt: Adopt) -> None:
    tiny_pipelines.write_sd(folder / "sd")
    tiny_pipelines.original_layout(folder / "sd", folder / "unet.safetensors")
    check_refused(adopt("init", "unet.safetensors"), "--set model.config=FOLDER")
    made = adopt("init", "unet.safetensors", "--set", "model.config=sd")
    assert made.code == 0, made.err
    assert tomllib.loads((folder / "unet.toml").read_text())["model"]["config"] == str(folder / "sd")


def test_a_model_that_is_not_there(folder: Path, adopt: Adopt) -> None:
    check_refused(adopt("init", "nowhere"), "unknown model 'nowhere'")
    assert listing(folder) == ["quick.toml"]


def test_settings_that_an_unconditional_model_does_not_take_are_named_together(folder: Path, adopt: Adopt) -> None:
    tiny_models.write_ddpm(folder / "model")
    photos(folder)
    tiny_pipelines.write_prompts(folder)
    assert adopt("init", "model", *IMAGES).code == 0
    prompted = ["--set", "model.prompts=prompts.txt", "--set", "model.negative_prompt=blurry"]
    check_refused(
        adopt("run", "--study", "model.toml", *prompted),
        "leave model.prompts and model.negative_prompt out (delete the line)",
    )
    guided = adopt("run", "--study", "model.toml", "--set", "sampling.guidance=3.0")
    check_refused(guided, "leave sampling.guidance out (delete the line)")
    weighted = adopt("run", "--study", "model.toml", "--set", "score.weights=photos/0.png")
    check_refused(weighted, "leave score.weights out (delete the line)")


def test_inceptions_weights_are_found_beside_the_model_or_given(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write_ddpm(folder / "model")
    photos(folder)
    (folder / suggest.INCEPTION).write_bytes(b"some network")
    assert adopt("init", "model", *IMAGES).code == 0
    assert tomllib.loads((folder / "model.toml").read_text())["score"]["extractor"] == "pixels"  # it is another file
    known = Published("https://example.org", sha256_of(folder / suggest.INCEPTION), "a test")
    monkeypatch.setitem(PUBLISHED, "inception", known)
    (folder / "studies").mkdir()
    assert adopt("init", "model", *IMAGES, "--out", "studies/found.toml").code == 0
    text = (folder / "studies" / "found.toml").read_text()
    assert "its figure is FID" in text
    score = tomllib.loads(text)["score"]
    assert (score["extractor"], score["weights"]) == ("inception", f"../{suggest.INCEPTION}")
    (folder / suggest.INCEPTION).rename(folder / "elsewhere.pt")
    assert adopt("init", "model", *IMAGES, "--weights", "elsewhere.pt", "--out", "given.toml").code == 0
    assert tomllib.loads((folder / "given.toml").read_text())["score"]["weights"] == "elsewhere.pt"


def test_a_folder_called_like_a_bundled_model_stays_a_folder(folder: Path, adopt: Adopt) -> None:
    tiny_models.write_ddpm(folder / "digits")
    photos(folder)
    assert adopt("init", "./digits", *IMAGES, "--name", "mine").code == 0
    assert load_config(folder / "mine.toml").model.source == str(folder / "digits")
