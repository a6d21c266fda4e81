"""Models of objects in memory: the same bits as from their folders, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_unet, write_class_conditional, write_ddpm, write_dit
from tiny_pipelines import PROMPTS, noise, write_flux, write_prompts, write_sd, write_sd3, write_sdxl

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import AdoptError, ConfigError, ModelError
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.evaluation.models.in_memory import check_its_own, model_in_memory, parts_of

KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ddpm": (write_ddpm, "DDPMPipeline"),
    "dit": (lambda folder: write_dit(folder, num_embeds_ada_norm=1000), "DiTPipeline"),
    "sd": (write_sd, "StableDiffusionPipeline"),
    "sdxl": (write_sdxl, "StableDiffusionXLPipeline"),
    "sd3": (lambda folder: write_sd3(folder, t5=True), "StableDiffusion3Pipeline"),
    "flux": (write_flux, "FluxPipeline"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_of_its_folder(tmp_path: Path, kind: str) -> None:
    import diffusers

    write, name = KINDS[kind]
    write(tmp_path / "net")
    text = {"size": [16, 24]} if name.startswith(("Stable", "Flux")) else {}
    prompts = {"prompts": str(write_prompts(tmp_path))} if text else {}
    loaded = load_model(ModelConfig(source=str(tmp_path / "net"), device="cpu", **prompts, **text))
    pipe = getattr(diffusers, name).from_pretrained(tmp_path / "net")
    parts = parts_of(pipe)
    parts.network.train()
    config = ModelConfig(**parts.settings, **text)
    with model_in_memory(parts, config, PROMPTS if text else None) as model:
        for field in ("shape", "image_shape", "units", "guidance", "scale", "kind", "weights"):
            assert getattr(model, field) == getattr(loaded, field), field
        assert (model.schedule.alphas == loaded.schedule.alphas).all()
        x, chosen = noise(model, 2), [0, 3]
        for skip in (0, 5):
            found, wanted = (m.bind(chosen, None)(x, 400, skip) for m in (model, loaded))
            assert torch.equal(found, wanted)
        assert torch.equal(model.to_images(found), loaded.to_images(found))
        if model.encode is not None and loaded.encode is not None:
            pictures = torch.rand(2, *model.picture_shape) * 2 - 1
            assert torch.equal(model.encode(pictures), loaded.encode(pictures))
    assert parts.network.training
    assert not [module for module in parts.network.modules() if "forward" in vars(module)]


def test_its_fingerprint_tells_other_weights(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    def fingerprint(network: Any, **scheduler: Any) -> str:
        parts = parts_of(network, DDPMScheduler(**scheduler))
        with model_in_memory(parts, ModelConfig(**parts.settings)) as model:
            return model.fingerprint

    network = make_unet()
    first = fingerprint(network)
    assert fingerprint(make_unet()) == first
    assert fingerprint(network, beta_end=0.01) != first
    with torch.no_grad():
        network.conv_out.bias[0] += 1e-6
    assert fingerprint(network) != first


def test_a_reduced_model_runs_in_its_own_precision() -> None:
    from diffusers import DDPMScheduler

    parts = parts_of(make_unet().to(torch.bfloat16), DDPMScheduler())
    assert parts.settings["precision"] == "bfloat16"
    with model_in_memory(parts, ModelConfig(**parts.settings)) as model:
        x0 = model.denoiser(noise(model, 1), 500, 0)
    assert x0.dtype == torch.float32
    assert x0.isfinite().all()


def test_classes_and_the_class_of_none(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    write_class_conditional(tmp_path / "net")
    folder = tmp_path / "net"
    network = UNet2DModel.from_pretrained(folder if (folder / "config.json").exists() else folder / "unet")
    from diffusers import DDPMScheduler

    parts = parts_of(network, DDPMScheduler())
    classes = network.config.num_class_embeds
    with model_in_memory(parts, ModelConfig(**parts.settings, fields={"null_class": classes - 1})) as model:
        assert model.guidance == "free"
        assert model.conditions is not None
        assert model.conditions.count == classes - 1


def _offloaded() -> Any:
    network = make_unet()
    network._hf_hook = object()
    return network


@contextmanager
def opened(network: Any, scheduler: Any) -> Iterator[Model]:
    parts = parts_of(network, scheduler)
    with model_in_memory(parts, ModelConfig(**parts.settings)) as model:
        yield model


WRONG: dict[str, tuple[Callable[[], Any], Any, type[AdoptError], str]] = {
    "a number": (lambda: 3, None, ConfigError, "the model is a int; give a diffusers pipeline"),
    "no scheduler": (make_unet, None, ConfigError, "says nothing of the noise.*give scheduler="),
    "float64": (lambda: make_unet().double(), "DDPMScheduler", ModelError, "float64; convert it to one of float32"),
    "on meta": (lambda: make_unet().to("meta"), "DDPMScheduler", ModelError, "weights are offloaded"),
    "offloaded": (_offloaded, "DDPMScheduler", ModelError, "weights are offloaded"),
    "no betas": (make_unet, "EDMEulerScheduler", ModelError, "EDMEulerScheduler has no betas"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_searched_is_one_line(name: str) -> None:
    import diffusers

    make, scheduler, error, message = WRONG[name]
    with pytest.raises(error, match=message), opened(make(), scheduler and getattr(diffusers, scheduler)()):
        pass


def test_its_source_cannot_be_loaded_from_a_file() -> None:
    with pytest.raises(ModelError, match="begun in Python with a model in memory; go on there"):
        load_model(ModelConfig(source="memory:DDPMPipeline"))


def test_other_networks_prompts_and_settings_are_refused() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet1DModel

    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    with pytest.raises(ConfigError, match="beside a DDPMPipeline, which has its own"):
        parts_of(pipe, DDPMScheduler())
    parts = parts_of(pipe)
    with (
        pytest.raises(ConfigError, match="a DDPMPipeline takes none"),
        model_in_memory(parts, ModelConfig(**parts.settings), ["a cat"]),
    ):
        pass
    one = parts_of(UNet1DModel(sample_size=16), DDPMScheduler())
    with (
        pytest.raises(ModelError, match="has a UNet1DModel; supported are"),
        model_in_memory(one, ModelConfig(**one.settings)),
    ):
        pass
    with pytest.raises(ConfigError, match="compile = True was given for a model in memory"):
        check_its_own({"compile": True, "batch": 4})
