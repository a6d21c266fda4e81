"""What training leaves beside a model: states of the run, several copies of the network, a scheduler one folder up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from load_source import load_source
from safetensors.torch import load_file, save_file
from tiny_adm import golden, state, write_adm
from tiny_models import make_unet, write_ddpm, write_dit
from tiny_pipelines import CHOSEN, SIZE, noise, write_prompts, write_sd
from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.models import Model

STEM = "diffusion_pytorch_model"
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def refused(load: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def optimizer() -> dict[str, Any]:
    """The state of one after a step."""
    network = torch.nn.Linear(2, 2)
    adam = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    adam.step()
    return adam.state_dict()


def states() -> dict[str, tuple[Mapping[str, Any], str]]:
    adam = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 10)
    return {
        "optimizer": (optimizer(), "is an optimizer's state; give model*.pt or ema*.pt"),
        "scheduler": (schedule.state_dict(), "is the state of a learning rate's schedule; give model*.pt"),
        "scaler": ({"scale": 1.0, "growth_factor": 2.0, "_growth_tracker": 0}, "is the state of a gradient scaler"),
        "average": ({"decay": 0.99, "shadow_params": [torch.ones(2)]}, "is a moving average of weights without their"),
    }


@pytest.mark.parametrize("kind", ["optimizer", "scheduler", "scaler", "average"])
def test_states_of_a_training_run_are_called_so(tmp_path: Path, kind: str) -> None:
    stored, words = states()[kind]
    path, _, fields = write_adm(tmp_path)
    torch.save(stored, tmp_path / "opt000000.pt")
    for source, guide in ((tmp_path / "opt000000.pt", None), (path, tmp_path / "opt000000.pt")):
        given = {"fields": fields, "classifier": guide}
        assert words in refused(lambda source=source, given=given: load_source(f"adm:{source}", **given))
    torch.save(stored, tmp_path / "optimizer.bin")
    assert words in refused(lambda: load_source(tmp_path / "optimizer.bin"))
    write_ddpm(tmp_path / "ddpm")
    (tmp_path / "ddpm" / "unet" / f"{STEM}.safetensors").unlink()
    torch.save(stored, tmp_path / "ddpm" / "unet" / f"{STEM}.bin")
    assert words in refused(lambda: load_source(tmp_path / "ddpm"))


def test_the_right_part_of_a_training_checkpoint_is_used(tmp_path: Path) -> None:
    path, _, fields = write_adm(tmp_path)
    weights = state(golden("adm_unet_a")[1])
    other = {key: value + 1 for key, value in weights.items()}

    def load(stored: Mapping[str, Any]) -> Model:
        torch.save(stored, path)
        return load_source(f"adm:{path}", fields=fields)

    plain = load(weights)
    expected = plain.bind([1, 2])(X, 300, 0)
    right = [
        {"model": weights, "optimizer": optimizer(), "epoch": 3},
        {"model": other, "ema": weights, "opt": optimizer()},
        {"state_dict": weights, "optimizer_states": [optimizer()], "callbacks": {}, "global_step": 7},
        {"model": weights, "ema": None, "step": 1},
        {"module." + key: value for key, value in weights.items()},
        {"state_dict": {"model._orig_mod." + key: value for key, value in weights.items()}},
    ]
    for stored in right:
        model = load(stored)
        assert torch.equal(model.bind([1, 2])(X, 300, 0), expected)
        said = [note for note in model.notes if "a checkpoint of training" in note]
        assert bool(said) == any(key in stored for key in ("epoch", "ema", "callbacks"))
    assert "the weights 'ema' are used, not model, opt" in load(right[1]).notes[-1]
    for stored, words in (
        ({"generator": weights, "critic": other}, "holds several sets of weights (generator, critic)"),
        ({"model": other, "ema": {"shadow": weights, "decay": 0.9}}, "holds entries model, ema, not tensors by name"),
        ({"epoch": 3}, "holds entries epoch"),
        ({0: torch.ones(2)}, "holds entries 0, not tensors by name"),
        ({**weights, "out.2.bias": torch.ones(3).to_sparse()}, "out.2.bias is sparse_coo; save it with to_dense()"),
        ({}, "it is empty"),
    ):
        assert words in refused(lambda stored=stored: load(stored))


def pickled(folder: Path, change: Callable[[Mapping[str, Tensor]], Mapping[str, Any]]) -> None:
    """Replace a network's weights by a ``.bin`` of what ``change`` makes of them."""
    file = folder / f"{STEM}.safetensors"
    torch.save(change(load_file(file)), folder / f"{STEM}.bin")
    file.unlink()


def test_weights_without_numbers_are_refused(tmp_path: Path) -> None:
    def emptied(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {key: value.to("meta") for key, value in weights.items()}

    path, _, fields = write_adm(tmp_path)
    torch.save(emptied(state(golden("adm_unet_a")[1])), path)
    write_ddpm(tmp_path / "ddpm")
    write_sd(tmp_path / "sd")
    for name in ("ddpm", "sd"):
        pickled(tmp_path / name / "unet", emptied)
    prompts = write_prompts(tmp_path)
    sources: list[tuple[str | Path, dict[str, Any]]] = [
        (f"adm:{path}", {"fields": fields}),
        (tmp_path / "ddpm", {}),
        (tmp_path / "sd", {"prompts": prompts, "size": SIZE}),
    ]
    for source, given in sources:
        message = refused(lambda source=source, given=given: load_source(source, **given))
        assert "and no numbers (a meta tensor); save the model again" in message


def test_every_loader_says_which_weights_of_a_training_run_it_used(tmp_path: Path) -> None:
    write_sd(tmp_path / "sd")
    given: dict[str, Any] = {"prompts": write_prompts(tmp_path), "size": SIZE}
    plain = load_source(tmp_path / "sd", **given)
    pickled(
        tmp_path / "sd" / "unet",
        lambda weights: {"ema": weights, "model": {key: value + 1 for key, value in weights.items()}},
    )
    model = load_source(tmp_path / "sd", **given)
    assert torch.equal(first(model), first(plain))
    (note,) = model.notes
    assert note.endswith("a checkpoint of training, the weights 'ema' are used, not model")


def copy_network(folder: Path, name: str, change: float) -> None:
    """A copy of ``unet`` or ``transformer`` in a pipeline's folder beside it, with other weights."""
    base = name.replace("ema_", "").replace("_ema", "")
    shutil.copytree(folder / base, folder / name)
    file = folder / name / f"{STEM}.safetensors"
    save_file({key: value + change for key, value in load_file(file).items()}, file)


def first(model: Model) -> Tensor:
    return model.bind([0, 0])(torch.ones(2, *model.shape), 300, 0)


@pytest.mark.parametrize("name", ["unet_ema", "ema_unet"])
def test_two_networks_of_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_ddpm(tmp_path)
    plain = load_source(tmp_path)
    assert plain.notes == ()
    copy_network(tmp_path, name, 0.01)
    both = load_source(tmp_path)
    assert torch.equal(first(both), first(plain))
    unet = tmp_path / "unet"
    assert both.notes == (f"{unet} is used, not {name} beside it; give {tmp_path / name} for that one",)
    average = load_source(tmp_path / name)
    assert not torch.equal(first(average), first(plain))
    assert (average.name, average.kind) == (name, "DDPMPipeline")
    assert average.notes == (f"{tmp_path / name} is used, not unet beside it; give {unet} for that one",)
    monkeypatch.chdir(tmp_path / name)
    assert load_source(".").fingerprint == average.fingerprint
    assert load_source("../unet").fingerprint == plain.fingerprint


def test_two_networks_of_other_pipelines(tmp_path: Path) -> None:
    write_dit(tmp_path / "dit")
    copy_network(tmp_path / "dit", "transformer_ema", 0.01)
    plain, average = (load_source(tmp_path / "dit" / part) for part in ("", "transformer_ema"))
    assert not torch.equal(first(plain), first(average))
    assert average.decode is not None
    assert "not transformer_ema beside it" in plain.notes[0]
    assert "not transformer beside it" in average.notes[0]
    write_sd(tmp_path / "sd")
    copy_network(tmp_path / "sd", "unet_ema", 0.01)
    given: dict[str, Any] = {"prompts": write_prompts(tmp_path), "size": SIZE}
    plain, average = (load_source(tmp_path / "sd" / part, **given) for part in ("", "unet_ema"))
    x = noise(plain)
    assert not torch.equal(plain.bind(CHOSEN)(x, 300, 0), average.bind(CHOSEN)(x, 300, 0))
    assert "not unet_ema beside it" in " ".join(plain.notes)
    assert "not unet beside it" in " ".join(average.notes)


def test_the_scheduler_of_a_part_is_the_one_beside_it(tmp_path: Path) -> None:
    """As training leaves it: no pipeline yet, or checkpoints in folders of their own beneath it."""
    from diffusers import DDPMScheduler

    DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path / "scheduler")
    sources = [tmp_path / "unet_ema", tmp_path / "checkpoint-500" / "unet_ema", tmp_path / "checkpoint-500" / "unet"]
    for source in sources:
        network: Any = make_unet()
        network.save_pretrained(source)
        model = load_source(source)
        path = tmp_path / "scheduler" / "scheduler_config.json"
        assert f"{source} has no noise schedule of its own; that of {path} is used" in model.notes
        assert model.schedule.alphas[-1] < 0.005
    assert f"{sources[2]} is used, not unet_ema beside it" in " ".join(load_source(sources[2]).notes)


def test_latents_of_a_part_are_decoded_by_its_pipeline(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, LDMPipeline
    from tiny_models import make_vae

    network = make_unet(sample_size=8, in_channels=4, out_channels=4)
    LDMPipeline(vqvae=make_vae(), unet=network, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    whole, part = load_source(tmp_path), load_source(tmp_path / "unet")
    assert part.fingerprint == whole.fingerprint
    assert part.picture_shape == (3, 16, 16)


@pytest.mark.parametrize("other", ["non_ema.safetensors", "ema.bin", "non_ema-00001-of-00002.bin"])
def test_variants_of_weights_side_by_side(tmp_path: Path, other: str) -> None:
    write_ddpm(tmp_path / "ddpm")
    write_sd(tmp_path / "sd")
    given: dict[str, Any] = {"prompts": write_prompts(tmp_path), "size": SIZE}
    for name in ("ddpm", "sd"):
        part = tmp_path / name / "unet"
        shutil.copy(part / f"{STEM}.safetensors", part / f"{STEM}.{other}")
        notes = load_source(tmp_path / name, **(given if name == "sd" else {})).notes
        assert f"{part}: {STEM}.safetensors is used, not {STEM}.{other} beside it" in notes


def test_other_formats_of_the_same_weights_are_no_variants(tmp_path: Path) -> None:
    write_ddpm(tmp_path)
    file = tmp_path / "unet" / f"{STEM}.safetensors"
    torch.save(load_file(file), tmp_path / "unet" / f"{STEM}.bin")
    save_file({key: value.half() for key, value in load_file(file).items()}, file.with_name(f"{STEM}.fp16.safetensors"))
    assert load_source(tmp_path).notes == ()


def test_a_gguf_file_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "flux-Q4.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file" in refused(lambda: load_source(tmp_path / "flux-Q4.gguf"))


def test_a_broken_index_is_reported(tmp_path: Path) -> None:
    write_ddpm(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    assert "model_index.json: cannot be read as JSON" in refused(lambda: load_source(tmp_path))
