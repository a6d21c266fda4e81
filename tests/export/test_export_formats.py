"""A study's best candidate is exported with everything that repeats it, in every format that its model allows."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Adopt
from example_results import example, ours, run_script
from tiny_models import write_ddpm

from autodiffusion_optuna import Result
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import ConfigError, StudyError
from autodiffusion_optuna.evaluation.models import load_model
from autodiffusion_optuna.export.formats import FORMATS, result_of, result_text
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.storage.url import storage_url
from autodiffusion_optuna.study import script_check
from autodiffusion_optuna.study.transfer import differences

pytestmark = pytest.mark.filterwarnings("ignore:algorithm_type dpmsolver is deprecated:FutureWarning")


def test_forms_that_do_not_exist_or_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown format 'comfy'; did you mean 'comfyui'"):
        result_text(example(), "comfy")
    for form in {*FORMATS} - {"json"}:
        with pytest.raises(ConfigError, match="mixture is not a model of diffusers or ComfyUI; export it with"):
            result_text(example(model={"kind": "mixture"}), form)
    assert result_text(example(), "json") == example().text()


def searched(adopt: Adopt, folder: Path, *settings: str) -> Any:
    """A finished study of nine trials on a small real model."""
    write_ddpm(folder / "net", sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4)
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    given = ["name=mine", "model.source=net", "score.reference=images.npz", "search.trials=9"]
    given += ["score.images=16", "score.held_out_images=16", *settings]
    arguments = [argument for setting in given for argument in ("--set", setting)]
    ran = adopt("run", "--study", "quick.toml", *arguments)
    assert ran.code == 0, ran
    return load_study(open_storage(storage_url(None)), "mine")


def test_a_study_is_exported_with_everything_that_repeats_it(folder: Path, adopt: Adopt) -> None:
    # A budget below three full steps, so that the best candidate must skip something.
    budget = ["search.max_skip=0.6", "search.max_cost=0.9", "search.trials=14"]
    study = searched(adopt, folder, *budget, "sampling.solver=['deis', 'heun']", "sampling.order=3")
    result = result_of(read_summary(study))
    (folder / "exported").mkdir()
    assert adopt("export", "--study", "mine", "--out", "exported").code == 0
    assert Result.read("exported/mine.json") == result
    assert Path("exported/mine.py").read_text() == result_text(result_of(read_summary(study)), "diffusers")

    model, best = load_model(ModelConfig(source="net")), study.best_trial
    candidate = Result.read("exported/mine.json").candidate(model.units)
    chosen = best.user_attrs["candidate"]
    assert chosen.endswith(candidate.key)
    assert f"solver={result.solver}" in chosen
    assert result.solver in ("deis_3", "heun")
    assert result.masked
    assert (result.cost, result.score.value) == (best.user_attrs["cost"], best.value)
    assert result.model.clip
    assert (result.model.sha256, result.model.kind) == (model.fingerprint, "DDPMPipeline")
    assert result.model.shape == result.model.image_shape == (3, 8, 8)
    assert result.model.units == model.units
    assert result.model.weights == model.weights
    assert differences(result, model) == []
    np.testing.assert_array_equal(result.noise_schedule().alphas, model.schedule.alphas)
    assert Path(result.config.model.source) == folder.resolve() / "net"
    assert result.guidance is None
    assert result.made_with.keys() >= {"autodiffusion_optuna", "optuna", "torch", "diffusers"}
    assert result.made_with["torch"].split("+")[0] == torch.__version__.split("+")[0]
    held_out = result.score.held_out
    assert held_out is not None
    assert HeldOut(held_out.images, (held_out.low, held_out.mean, held_out.high)).mean == pytest.approx(held_out.mean)

    names = runpy.run_path("exported/mine.py")  # run from another folder than its own
    assert int((names["images"].int() - ours(result, 16).int()).abs().max()) <= 2


def test_fixed_settings_are_named_as_solvers_are(folder: Path, adopt: Adopt) -> None:
    settings = ("sampling.solver='unipc'", "sampling.order=3", "sampling.final=['sigma_min']", "model.clip=false")
    result = result_of(read_summary(searched(adopt, folder, *settings)))
    assert (result.solver, result.final, result.eta, result.model.clip) == ("unipc_3", "sigma_min", 0.0, False)
    assert not result.masked


def test_numbers_that_were_searched_are_exported(folder: Path, adopt: Adopt) -> None:
    study = searched(adopt, folder, "sampling.eta={min=0.25, max=0.75}")
    result = result_of(read_summary(study))
    assert result.eta == study.best_trial.params["eta"]
    assert f"with eta = {result.eta:g}" in result_text(result, "diffusers")


def test_a_study_of_the_mixture_is_exported_as_json_alone(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=6").code == 0
    study = load_study(open_storage(storage_url(None)), "quick")
    exported = result_of(read_summary(study))
    result = Result.parse(result_text(exported, "json"))
    assert result.model.kind == "mixture"
    with pytest.raises(ConfigError, match="mixture"):
        result_text(exported, "comfyui")


def test_a_study_without_a_finished_trial_has_nothing_to_export(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=6").code == 0
    study = load_study(open_storage(storage_url(None)), "quick")
    empty = replace(read_summary(study), best=None)
    with pytest.raises(StudyError, match="no finished trial to export; run it first"):
        result_of(empty)


def test_the_command_prints_one_text_and_says_the_rest_elsewhere(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(adopt, folder)
    script = adopt("export", "--study", "mine")
    assert (script.code, script.out) == (0, result_text(result_of(read_summary(study)), "diffusers"))
    first, *others = script.err.splitlines()  # the others are of the study
    assert first == "comparing the script's images with those of the search's sampler (--no-check leaves it out) …"
    assert Result.parse(adopt("export", "--study", "mine", "--format", "json").out) == result_of(read_summary(study))
    numbers = adopt("export", "--study", "mine", "--format", "comfyui")
    assert len(re.findall(r"\d+", numbers.out.replace(".", ""))) == len(result_of(read_summary(study)).timesteps) + 1
    assert "paste the numbers into the node ManualSigmas" in numbers.err

    monkeypatch.setattr(script_check, "difference", lambda *_: 94.0)
    other = adopt("export", "--study", "mine", "--out", "there")
    assert (
        "warning: on this model diffusers' images differ from those of the search's sampler by 94 of 255" in other.err
    )
    assert (folder / "there" / "mine.json").is_file()
    assert "import load_model" in (folder / "there" / "mine.py").read_text()
    assert torch.equal(
        run_script(folder / "there", result_of(read_summary(study))), ours(result_of(read_summary(study)), 16).int()
    )
    unchecked = adopt("export", "--study", "mine", "--no-check")
    assert (unchecked.out, unchecked.err.splitlines()) == (script.out, others)

    write_ddpm(folder / "net", sample_size=8, block_out_channels=(8, 32), norm_num_groups=4, attention_head_dim=4)
    assert "warning: model net is not the one that the result of study 'mine' was found on: other weights" in (
        adopt("export", "--study", "mine").err
    )
    (folder / "net").rename(folder / "elsewhere")
    moved = adopt("export", "--study", "mine")
    assert moved.code == 0
    assert "from diffusers import" in moved.out
    assert "warning: the script was not checked against the search's sampler" in moved.err
