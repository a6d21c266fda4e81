"""Tensors beside the weights: what changes their meaning is applied or refused by name, in every kind of file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from load_source import load_source
from safetensors.torch import save_file
from tiny_adm import golden, state, write_adm
from tiny_models import write_ddpm
from tiny_pipelines import CHOSEN, SIZE, noise, original_layout, weights_in, write_prompts, write_sd
from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.features import DIGITS_WEIGHTS, load_extractor
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.tensors import plain_weights

STEM = "diffusion_pytorch_model"
FILE = Path("file")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

BESIDE = [
    ("block.weight.absmax", "bitsandbytes"),
    ("block.weight.quant_map", "bitsandbytes"),
    ("block.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    ("block.SCB", "bitsandbytes"),
    ("block.qweight", "GPTQ, AWQ"),
    ("block.scales", "GPTQ, AWQ"),
    ("block.qzeros", "GPTQ, AWQ"),
    ("block.g_idx", "GPTQ, AWQ"),
    ("block.weight_packed", "GPTQ, AWQ"),
    ("block.weight_scale_inv", "GPTQ, AWQ"),
    ("block.weight._data", "GPTQ, AWQ"),
    ("block.lora_A.weight", "a LoRA or another adapter"),
    ("lora_unet_block.lora_down.weight", "a LoRA or another adapter"),
    ("block.alpha", "a LoRA or another adapter"),
    ("block.hada_w1_a", "a LoRA or another adapter"),
    ("block.lokr_w2", "a LoRA or another adapter"),
    ("block.weight_g", "weight norm"),
    ("block.weight_orig", "weight norm"),
    ("block.parametrizations.weight.original0", "weight norm"),
    ("scale_weight", "which is not there"),
    ("block.weight_scale", "block.weight, which is not there"),
    ("never.seen", ""),
]
"""Names of tensors beside the weights -> words with which a file that has one is refused."""


def refused(load: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddpm")
    write_ddpm(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def load_text(source: Path, prompts: Path, config: Path | None = None) -> Model:
    return load_source(source, prompts=prompts, size=SIZE, config=config)


def quantised(weights: dict[str, Tensor], name: str, rows: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(float8 weights with their scales called ``name`` and what ComfyUI writes besides, what they stand for)."""
    stored, meant = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, {}
    for key, value in weights.items():
        stored[key] = meant[key] = value
        if key.endswith(".weight") and value.ndim > 1:
            scale = torch.linspace(2, 3, len(value)).view(-1, *[1] * (value.ndim - 1)) if rows else torch.tensor(2.0)
            stored[key] = (value / scale).to(torch.float8_e4m3fn)
            stored[key.removesuffix("weight") + name] = scale
            stored[key.removesuffix("weight") + "scale_input"] = torch.tensor(7.0)
            meant[key] = stored[key].float() * scale
    return stored, meant


@pytest.mark.parametrize(("name", "rows"), [("scale_weight", False), ("weight_scale", True)])
def test_scales_of_float8_weights_are_applied_in_folders(ddpm: Path, tmp_path: Path, name: str, rows: bool) -> None:
    plain, scaled = (Path(shutil.copytree(ddpm, tmp_path / kind)) for kind in ("plain", "scaled"))
    stored, meant = quantised(weights_in(ddpm / "unet" / f"{STEM}.safetensors"), name, rows)
    save_file(meant, plain / "unet" / f"{STEM}.safetensors")
    expected = load_source(plain).denoiser(X, 300, 0)
    assert not torch.equal(expected, load_source(ddpm).denoiser(X, 300, 0))
    save_file(stored, scaled / "unet" / f"{STEM}.safetensors")
    assert torch.equal(load_source(scaled).denoiser(X, 300, 0), expected)
    (scaled / "unet" / f"{STEM}.safetensors").unlink()
    torch.save(stored, scaled / "unet" / f"{STEM}.bin")
    assert torch.equal(load_source(scaled).denoiser(X, 300, 0), expected)


def test_scales_are_applied_across_shards(sd: Path, prompts: Path, tmp_path: Path) -> None:
    plain, scaled = (Path(shutil.copytree(sd, tmp_path / kind)) for kind in ("plain", "scaled"))
    stored, meant = quantised(weights_in(sd / "unet" / f"{STEM}.safetensors"), "scale_weight")
    save_file(meant, plain / "unet" / f"{STEM}.safetensors")
    (scaled / "unet" / f"{STEM}.safetensors").unlink()
    names = {key: f"{STEM}-0000{1 + key.endswith('scale_weight')}-of-00002.safetensors" for key in stored}
    (scaled / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for name in set(names.values()):
        save_file({key: stored[key] for key in stored if names[key] == name}, scaled / "unet" / name)
    one, other = load_text(plain, prompts), load_text(scaled, prompts)
    assert torch.equal(one.bind(CHOSEN)(noise(one), 500, 0), other.bind(CHOSEN)(noise(one), 500, 0))


def test_scales_are_applied_in_single_files(sd: Path, prompts: Path, tmp_path: Path) -> None:
    """Before diffusers' converter, which would drop them."""
    file = tmp_path / "single.safetensors"
    original_layout(sd, file)
    stored, meant = quantised(weights_in(file), "scale_weight")
    save_file(meant, file)
    one = load_text(file, prompts, sd)
    save_file({f"model.diffusion_model.{key}" if key == "scaled_fp8" else key: stored[key] for key in stored}, file)
    other = load_text(file, prompts, sd)
    assert torch.equal(one.bind(CHOSEN)(noise(one), 500, 0), other.bind(CHOSEN)(noise(one), 500, 0))
    given: Any = {"precision": "bfloat16", "prompts": prompts, "size": SIZE, "config": sd}
    reduced = load_source(file, **given)
    save_file(meant, file)
    expected = load_source(file, **given)
    assert torch.equal(reduced.bind(CHOSEN)(noise(one), 500, 0), expected.bind(CHOSEN)(noise(one), 500, 0))


def test_scales_are_applied_in_checkpoints(tmp_path: Path) -> None:
    path, classifier, fields = write_adm(tmp_path)
    results = []
    for kind in (0, 1):
        for file, name in ((path, "adm_unet_a"), (classifier, "adm_classifier")):
            torch.save(quantised(state(golden(name)[1]), "scale_weight")[kind], file)
        results.append(
            load_source(f"adm:{path}", clip=False, fields=fields, classifier=classifier).bind([1, 2], 1.0)(X, 300, 0)
        )
    assert torch.equal(*results)


@pytest.mark.parametrize(("key", "words"), BESIDE)
def test_what_changes_weights_is_refused_by_name(
    ddpm: Path, sd: Path, prompts: Path, tmp_path: Path, key: str, words: str
) -> None:
    """In a folder's network of either kind, its decoder and text encoder, a single file and a checkpoint."""
    beside = {key: torch.ones(())}

    def check(load: Callable[[], object], file: Path) -> None:
        message = refused(load)
        assert key in message
        assert words in message
        assert str(file.parent) in message

    folder = Path(shutil.copytree(ddpm, tmp_path / "ddpm"))
    file = folder / "unet" / f"{STEM}.safetensors"
    save_file({**weights_in(file), **beside}, file)
    check(lambda: load_source(folder), file)
    for part, name in (("unet", STEM), ("vae", STEM), ("text_encoder", "model")):
        pipeline = Path(shutil.copytree(sd, tmp_path / part))
        file = pipeline / part / f"{name}.safetensors"
        save_file({**weights_in(file), **beside}, file, {"format": "pt"})
        check(lambda pipeline=pipeline: load_text(pipeline, prompts), file)
    single = tmp_path / "single.safetensors"
    original_layout(sd, single)
    for prefix in ("", "model.diffusion_model."):
        save_file({**weights_in(single), prefix + key: torch.ones(())}, single)
        check(lambda: load_text(single, prompts, sd), single)
        original_layout(sd, single)
    path, _, fields = write_adm(tmp_path)
    torch.save({**state(golden("adm_unet_a")[1]), **beside}, path)
    check(lambda: load_source(f"adm:{path}", fields=fields), path)
    path, classifier, fields = write_adm(tmp_path)
    torch.save({**state(golden("adm_classifier")[1]), **beside}, classifier)
    check(lambda: load_source(f"adm:{path}", fields=fields, classifier=classifier), classifier)


@pytest.mark.parametrize("key", ["logvar", "betas", "sqrt_one_minus_alphas_cumprod", "posterior_variance"])
def test_buffers_of_training_are_left_out(ddpm: Path, sd: Path, prompts: Path, tmp_path: Path, key: str) -> None:
    """``logvar`` has no dimension, which was a traceback."""
    for source in (ddpm, sd):
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        file = folder / "unet" / f"{STEM}.safetensors"
        save_file({**weights_in(file), key: torch.zeros(())}, file)
        load_text(folder, prompts) if source is sd else load_source(folder)
    single = tmp_path / "single.safetensors"
    original_layout(sd, single)
    save_file({**weights_in(single), key: torch.zeros(())}, single)
    assert not any(key in note for note in load_text(single, prompts, sd).notes)


DTYPES = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_no_floating_point_numbers_are_refused(
    ddpm: Path, sd: Path, prompts: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    told = f"holds {str(dtype).removeprefix('torch.')} ["
    folder, pipeline = (Path(shutil.copytree(source, tmp_path / source.name)) for source in (ddpm, sd))
    for root, load in ((folder, lambda: load_source(folder)), (pipeline, lambda: load_text(pipeline, prompts))):
        file = root / "unet" / f"{STEM}.safetensors"
        save_file({**weights_in(file), "conv_in.weight": weights_in(file)["conv_in.weight"].to(dtype)}, file)
        assert f"conv_in.weight {told}" in refused(load)
    path, classifier, fields = write_adm(tmp_path)
    for changed, name, key in (
        (classifier, "adm_classifier", "out.0.weight"),
        (path, "adm_unet_a", "out.2.bias"),
    ):
        weights = state(golden(name)[1])
        torch.save({**weights, key: weights[key].to(dtype)}, changed)
        assert f"{key} {told}" in refused(lambda: load_source(f"adm:{path}", fields=fields, classifier=classifier))
    digits = tmp_path / "digits.safetensors"
    weights = weights_in(DIGITS_WEIGHTS)
    save_file({**weights, "head.bias": weights["head.bias"].to(dtype)}, digits)
    assert f"head.bias {told}" in refused(lambda: load_extractor("digits", "cpu", digits))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 1, 1, 1)], ids=str)
def test_weights_of_any_shape_are_one_line(
    ddpm: Path, sd: Path, prompts: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    folder, pipeline = (Path(shutil.copytree(source, tmp_path / source.name)) for source in (ddpm, sd))
    for root, load in ((folder, lambda: load_source(folder)), (pipeline, lambda: load_text(pipeline, prompts))):
        file = root / "unet" / f"{STEM}.safetensors"
        save_file({**weights_in(file), "conv_in.weight": torch.ones(shape)}, file)
        assert f"conv_in.weight has shape {list(shape)} instead of" in refused(load)
    single = tmp_path / "single.safetensors"
    original_layout(sd, single)
    save_file({**weights_in(single), "model.diffusion_model.input_blocks.0.0.weight": torch.ones(shape)}, single)
    message = refused(lambda: load_text(single, prompts, sd))
    assert "conv_in.weight" in message or "'model.diffusion_model.input_blocks.0.0.weight'" in message


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.ones(4, 3), torch.tensor(2.0)),
        (torch.ones(4, 3, dtype=torch.int8), torch.tensor(2.0)),
        (torch.ones(4, 3).to(torch.float8_e4m3fn), torch.ones(3)),
        (torch.ones(4, 3).to(torch.float8_e4m3fn), torch.ones(2, 3)),
        (torch.ones(4, 3).to(torch.float8_e4m3fn), torch.tensor(2)),
        (torch.ones(4, 3).to(torch.float8_e5m2), torch.tensor(torch.nan)),
        (torch.ones(4, 3).to(torch.float8_e5m2), torch.empty(0)),
    ],
    ids=str,
)
def test_scales_that_are_not_known_are_refused(weight: Tensor, scale: Tensor) -> None:
    message = refused(lambda: plain_weights({"a.weight": weight, "a.scale_weight": scale}, FILE))
    assert message.startswith("file: a.scale_weight is ")
    assert "only finite scales of float8 weights are known" in message


def test_names_that_a_network_has_are_its_weights() -> None:
    own = {"act.alpha": torch.ones(2), "norm.scales": torch.ones(2), "weight_scale": torch.ones(2)}
    assert plain_weights(own, FILE, own) == own


def test_quantised_parts_are_refused_by_their_config(ddpm: Path, sd: Path, prompts: Path, tmp_path: Path) -> None:
    for root, part in ((ddpm, "unet"), (sd, "unet"), (sd, "vae"), (sd, "text_encoder")):
        folder = Path(shutil.copytree(root, tmp_path / f"{root.name}-{part}"))
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"load_in_4bit": True}}))
        loads: dict[Path, Callable[[], Any]] = {
            ddpm: lambda folder=folder: load_source(folder),
            sd: lambda folder=folder: load_text(folder, prompts),
        }
        assert f"{path}: has a quantization_config" in refused(loads[root])


def single_file(sd: Path, tmp_path: Path, metadata: dict[str, str] | None = None, **beside: Tensor) -> Path:
    file = tmp_path / "single.safetensors"
    original_layout(sd, file)
    save_file({**weights_in(file), **{key.replace("__", "."): value for key, value in beside.items()}}, file, metadata)
    return file


def test_markers_of_the_prediction_decide_or_contradict(sd: Path, prompts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd, tmp_path / "sd"))
    config = folder / "scheduler" / "scheduler_config.json"
    written = json.loads(config.read_text())
    marked = single_file(sd, tmp_path, v_pred=torch.empty(0), ztsnr=torch.empty(0))
    message = refused(lambda: load_text(marked, prompts, folder))
    assert f'{config}: prediction_type is "epsilon", but the checkpoint\'s own is "v_prediction"' in message
    config.write_text(json.dumps({key: value for key, value in written.items() if key != "prediction_type"}))
    model = load_text(marked, prompts, folder)
    assert model.denoiser.prediction == "v_prediction"  # type: ignore[attr-defined]
    assert model.schedule.alphas[-1] == 2.0**-12
    config.write_text(json.dumps({**written, "prediction_type": "v_prediction", "rescale_betas_zero_snr": False}))
    assert "rescale_betas_zero_snr is false, but the checkpoint's own is true" in refused(
        lambda: load_text(marked, prompts, folder)
    )
    prediction_types = ("epsilon", "v_prediction", "sample")
    for metadata, own in (
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"}, "epsilon"),
        ({"modelspec.prediction_type": "sample"}, "sample"),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
    ):
        told = single_file(sd, tmp_path, metadata)
        for kind in prediction_types:
            config.write_text(json.dumps({**written, "prediction_type": kind}))
            if kind == own:
                assert load_text(told, prompts, folder).notes == ()
            else:
                message = refused(lambda told=told: load_text(told, prompts, folder))
                assert f'prediction_type is "{kind}", but the checkpoint\'s own is "{own}"' in message
    both = single_file(sd, tmp_path, {"modelspec.prediction_type": "epsilon"}, v_pred=torch.empty(0))
    assert "contradicts itself: the tensor v_pred says v_prediction, modelspec.prediction_type says epsilon" in refused(
        lambda: load_text(both, prompts, folder)
    )
    edm = single_file(sd, tmp_path, edm_vpred__sigma_max=torch.tensor(120.0))
    assert "'edm_vpred.sigma_max', so it was trained on EDM's noise levels" in refused(
        lambda: load_text(edm, prompts, sd)
    )


def test_what_else_a_single_file_holds_is_said(sd: Path, prompts: Path, tmp_path: Path) -> None:
    file = single_file(
        sd,
        tmp_path,
        scale_factor=torch.tensor(0.5),
        alphas_cumprod=torch.linspace(0.99, 0.01, 1000),
        first_stage_model__x=torch.ones(1),
        text_encoders__t5xxl__scale_weight=torch.ones(()),
    )
    notes = " | ".join(load_text(file, prompts, sd).notes)
    assert "was trained on latents scaled by 0.5" in notes
    assert "other noise levels (alphas_cumprod)" in notes
    assert "not first_stage_model, text_encoders" in notes
    model = load_text(sd, prompts)
    fitting = torch.tensor(model.schedule.alphas**2, dtype=torch.float32)
    file = single_file(sd, tmp_path, scale_factor=torch.tensor(0.18215), alphas_cumprod=fitting)
    assert load_text(file, prompts, sd).notes == ()
