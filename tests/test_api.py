"""From Python: the search is that of the command line, on models by name and in memory."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from tiny_models import make_unet
from tiny_pipelines import write_sd

import autodiffusion_optuna as adopt
from autodiffusion_optuna import api
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.errors import AdoptError, ConfigError, StorageError, StudyError
from autodiffusion_optuna.storage.attrs import CANDIDATE
from autodiffusion_optuna.study import components

QUICK: dict[str, Any] = {
    "steps": 3, "population": 6, "parents": 3, "batch": 32, "score_images": 64, "held_out_images": 64, "finalists": 0,
    "quiet": True,
}  # fmt: skip
"""The study of ``conftest.QUICK`` as keywords."""
TINY: dict[str, Any] = {
    "steps": 3, "trials": 4, "population": 4, "batch": 4, "score_images": 8, "held_out_images": 8,
    "held_out_banks": 2, "finalists": 0, "extractor": "pixels", "quiet": True, "check": False,
}  # fmt: skip


def pictures(count: int = 24, channels: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, channels), dtype=np.uint8)


def found(study: adopt.StudyReport) -> list[tuple[str, float | None]]:
    return [(trial.user_attrs[CANDIDATE], trial.value) for trial in study.summary.finished]


def ddpm() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(make_unet(), DDPMScheduler())


def test_importing_it_loads_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, autodiffusion_optuna as adopt\n"
        "adopt.search, adopt.load_study, adopt.sample, adopt.StudyReport\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
        "from autodiffusion_optuna import search; import autodiffusion_optuna.search.presets as presets\n"
        "assert callable(search) and presets.__name__.endswith('search.presets') and adopt.search is search\n"
        "import inspect; assert {'images', 'steps', 'trials'} <= inspect.signature(search).parameters.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_of_its_docstring_runs() -> None:
    run = doctest.testmod(api)
    assert run.attempted >= 4
    assert not run.failed


def test_it_finds_what_the_command_line_finds(quick: optuna.Study) -> None:
    of_command = adopt.load_study("quick")
    of_python = adopt.search("mixture", trials=24, extractor="pixels", held_out_banks=3, pruner="none", **QUICK)
    assert found(of_python) == found(of_command)
    best, other = of_python.summary.best, of_command.summary.best
    assert best is not None
    assert other is not None
    assert best.held_out == other.held_out
    assert of_python.best_timesteps == of_command.best_timesteps == of_python.best_schedule.timesteps


def test_the_same_call_goes_on_with_a_study_that_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept: dict[str, Any] = {**QUICK, "name": "kept", "storage": folder / "mine.db"}
    seen: list[int] = []
    first = adopt.search("mixture", trials=5, **kept, on_trial=lambda study: seen.append(len(study.summary.finished)))
    assert seen == [1, 2, 3, 4, 5]
    more = adopt.search("mixture", trials=9, **{**kept, "quiet": False})
    assert found(more)[:5] == found(first)
    assert found(adopt.load_study("kept", folder / "mine.db")) == found(more)
    assert "5 finished before" in capsys.readouterr().out
    with pytest.raises(StudyError, match=r"begun with other settings \(sampling.solver: 'ddim' -> 'heun'\)"):
        adopt.search("mixture", trials=9, solver="heun", **kept)


def test_a_search_that_is_stopped_returns_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(study: adopt.StudyReport) -> None:
        if len(study.summary.finished) == 3:
            raise KeyboardInterrupt

    study = adopt.search("mixture", trials=9, on_trial=stop, **{**QUICK, "quiet": False})
    assert len(study.summary.finished) == 3
    assert study.summary.best is not None
    assert study.summary.best.held_out is None
    assert "stopped: StudyReport('search', 3 of 9 candidates, best FD(pixels), 64 images" in capsys.readouterr().out


def test_a_network_a_pipeline_and_its_folder_are_searched_alike(tmp_path: Path) -> None:
    pipe = ddpm()
    pipe.save_pretrained(tmp_path / "net")
    by_network = adopt.search(pipe.unet, scheduler=pipe.scheduler, images=pictures(), **TINY)
    by_pipeline = adopt.search(pipe, images=pictures().transpose(0, 3, 1, 2), **TINY)
    by_folder = adopt.search(tmp_path / "net", images=pictures(), **TINY)
    assert found(by_network) == found(by_pipeline) == found(by_folder)
    best = by_pipeline.best_schedule
    assert best.model.source == "memory:DDPMPipeline"
    with pytest.raises(ConfigError, match=r"no script can load; save it .*with_model\(source=FOLDER\)"):
        by_pipeline.export()
    assert str(tmp_path / "net") in by_pipeline.export(source=tmp_path / "net")
    drawn = adopt.sample(pipe, by_pipeline, images=3)
    assert drawn.shape == (3, 16, 16, 3)
    assert (drawn == adopt.sample(tmp_path / "net", best, images=3)).all()
    assert (drawn == adopt.sample(pipe, list(best.timesteps), images=3, batch=4)).all()
    assert (drawn != adopt.sample(pipe, list(best.timesteps), images=3, batch=4, seed=1)).any()
    adopt.apply(pipe, by_pipeline)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(batch_size=2, num_inference_steps=3).images) == 2
    with pytest.raises(ConfigError, match=r"take it back first with remove\(pipe\)"):
        adopt.search(pipe, images=pictures(), **TINY)


def test_layers_of_a_network_in_memory_are_searched_too() -> None:
    pipe = ddpm()
    layers: dict[str, Any] = {"trials": 12, "max_skip": 1.0, "stage_one_generations": 1, "warm_starts": ["uniform"]}
    study = adopt.search(pipe, images=pictures(), **{**TINY, **layers})
    assert any(":" in candidate for candidate, _ in found(study))
    assert not [module for module in pipe.unet.modules() if "forward" in vars(module)]


def test_a_text_to_image_pipeline_takes_its_prompts(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    write_sd(tmp_path / "sd")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    prompts = ["a cat", "two dogs, far away"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    study = adopt.search(pipe, images=pictures(), prompts=prompts, **{**TINY, "trials": 3})
    drawn = adopt.sample(pipe, study, prompts=prompts, images=2)
    by_file = adopt.sample(tmp_path / "sd", study, prompts=tmp_path / "prompts.txt", images=2)
    assert (drawn == by_file).all()
    assert (drawn != adopt.sample(pipe, study, prompts=prompts[::-1], images=2)).any()
    with pytest.raises(ConfigError, match="draws images of prompts; give prompts="):
        adopt.search(pipe, images=pictures(), **TINY)


@pytest.mark.parametrize("name", ["mixture-4", "digits-4"])
def test_samples_are_the_images_that_a_search_scores(name: str) -> None:
    built = components.build(load_preset(name, ["model.device=cpu", "model.batch=3"]))
    candidate = built.baselines["quadratic"]
    wanted = built.evaluator.sample(candidate, 0, 5).permute(0, 2, 3, 1).numpy()
    drawn = adopt.sample(built.config.model.source, candidate.timesteps, images=5, batch=3)
    assert drawn.dtype == np.uint8
    assert (drawn == wanted).all()


def test_texts_of_lists_are_read_as_on_the_command_line() -> None:
    listed = adopt.sample("mixture", [829, 649, 424], images=2)
    assert (adopt.sample("mixture", "829 649 424", images=2) == listed).all()
    with pytest.warns(UserWarning, match="timesteps rounded to the model's: 829.4 to 829"):
        assert (adopt.sample("mixture", "timesteps: 829.4 649 424", images=2) == listed).all()
    with pytest.raises(ConfigError, match="holds 'x', which is no number"):
        adopt.sample("mixture", "829 x", images=2)


def test_a_study_shows_itself(quick: optuna.Study) -> None:
    study = adopt.load_study("quick")
    assert repr(study).startswith(
        "StudyReport('quick', 24 of 24 candidates, best FD(pixels), 64 images, search noise: "
    )
    text, html = str(study), study._repr_html_()
    for shown in (text, html):
        assert "best found" in shown
        assert "held-out noise, 95 %, 3 x 64 images" in shown
        assert "difference to uniform, 95 %" in shown
        assert study.summary.headline is not None
        assert study.summary.headline.text() in shown
        assert " ".join(map(str, study.best_timesteps)) in shown
    floor = study.summary.many_steps
    assert html.count("<tr>") == 1 + len(study.summary.rows()) + (floor is not None)
    differences = [study.summary.difference(row) for row in study.summary.rows()]
    assert all(found.text in text for found in differences if found is not None)
    assert study.baselines["uniform"] == (666, 333, 0)
    assert study.summary.to_json()["finished"] == 24
    assert study.plot().data
    assert study.plot("evaluations").data
    assert '"timesteps"' in study.export("json")
    with pytest.raises(ConfigError, match="unknown figure 'histroy'; did you mean 'history'"):
        study.plot("histroy")
    with pytest.raises(StudyError, match="nothing to show in figure 'masks'"):
        study.plot("masks")


def test_studies_that_are_not_there(quick: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match="unknown study 'quik'; did you mean 'quick'"):
        adopt.load_study("quik")
    with pytest.raises(StorageError):
        adopt.load_study("quick", "gone.db")
    assert not Path("gone.db").exists()
    monkeypatch.setenv("ADOPT_STORAGE", "sqlite:///gone.db")
    with pytest.raises(StorageError):
        adopt.load_study("quick")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a setting that is none": ({"max_skp": 0.2}, "unknown setting 'max_skp'; did you mean 'max_skip'.*score_images"),
    "a name that is two settings": ({"preset": "paper"}, "unknown setting 'preset'"),
    "a value that is none": ({"score_images": 1}, "setting 'score.images'"),
    "storage without a name": ({"storage": "a.db"}, "give both"),
    "a device for an object": ({"device": "cpu:1"}, "device = 'cpu:1' was given for a model in memory"),
    "floats": ({"images": pictures() / 255}, "pixels must be uint8"),
    "a folder that is not there": ({"images": "gone"}, "gone"),
    "no images": ({"images": None}, "set score.reference"),
    "a solver that is none": ({"solver": "dim"}, "unknown solver 'dim'"),
    "guidance": ({"guidance": 3.0}, "guidance 3 was given, but model 'DDPMPipeline' has none"),
    "grey images": ({"images": pictures(channels=1)}, "model's images have 3 channel"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_searched_is_one_line_and_nothing_is_written(folder: Path, name: str) -> None:
    given, message = WRONG[name]
    with pytest.raises(AdoptError, match=message) as error:
        adopt.search(ddpm(), **{"images": pictures(), **TINY, **given})
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["quick.toml"]


def test_what_cannot_be_drawn_is_one_line(quick: optuna.Study) -> None:
    study = adopt.load_study("quick")
    for arguments, message in (
        ({"images": 0}, "images = 0; give how many"),
        ({"solver": "heun"}, "has solver ddim, solver='heun' was given"),
        ({"eta": 0.5}, "eta was given, and the result of study 'quick' has its own"),
        ({"scheduler": 3}, "scheduler goes with a model in memory"),
        ({"prompts": ["a cat"]}, "prompts as a list goes with a model in memory"),
        ({"seed": "one"}, "seed = 'one'; give an integer"),
        ({"solver": ["ddim", "heun"]}, "images are drawn by one, give its name"),
    ):
        with pytest.raises(ConfigError, match=message):
            adopt.sample("mixture", study, **arguments)
    with pytest.raises(ConfigError, match=r"\[1000, 3\] are not all in \[0, 999\]"):
        adopt.sample("mixture", [1000, 3])
