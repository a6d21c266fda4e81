"""Text-to-image models against diffusers' own pipelines, on tiny ones."""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from load_source import load_source
from safetensors.torch import save_file
from tiny_pipelines import (
    CHOSEN,
    PROMPTS,
    SIZE,
    WRITERS,
    noise,
    original_layout,
    weights_in,
    write_prompts,
    write_sd,
)
from torch import Tensor, nn

from autodiffusion_optuna.errors import AdoptError, ConfigError, ModelError
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.models.text import TextEncoder
from autodiffusion_optuna.evaluation.models.text_to_image import flow_shift, pack, unpack
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.evaluation.solvers import SOLVERS, times
from autodiffusion_optuna.evaluation.units import Units

STEPS = (900, 610, 95)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The pipeline of that name, written when it is first asked for; not to be changed."""
    root = tmp_path_factory.mktemp("pipelines")
    return lambda name: root / name if (root / name).is_dir() else WRITERS[name](root / name)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def load(folders: Callable[[str], Path], prompts: Path) -> Callable[..., Model]:
    """Load the pipeline of that name (once), or in that folder; keywords are settings beside prompts and size."""

    def run(source: str | Path, **settings: Any) -> Model:
        folder = source if isinstance(source, Path) else folders(source)
        return load_source(folder, **{"prompts": prompts, "size": SIZE, **settings})

    @functools.cache
    def once(source: str, settings: str) -> Model:
        return run(source, **json.loads(settings))

    def load(source: str | Path, **settings: Any) -> Model:
        return run(source, **settings) if isinstance(source, Path) else once(source, json.dumps(settings))

    return load


@pytest.fixture
def copied(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a pipeline's folder, free to be changed."""
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / name))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ours(model: Model, scale: float | None) -> Tensor:
    denoise = model.bind(CHOSEN, scale)
    return SOLVERS["ddim"](lambda x, t: denoise(x, t, 0), noise(model), times(model.schedule, STEPS, "zero"))


def theirs(model: Model, folder: Path, scale: float | None, images: bool = False, **call: Any) -> Tensor:
    """What diffusers' pipeline makes of the same noise, prompts and noise levels."""
    import diffusers

    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name in ("sd3", "sd3-dynamic") else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    x, flux = noise(model), model.kind == "FluxPipeline"
    if "Stable" in model.kind and "3" not in model.kind:
        config = {**pipeline.scheduler.config, "timestep_spacing": "linspace"}
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            config, solver_order=1, final_sigmas_type="zero"
        )
        call.setdefault("timesteps", list(STEPS))
    else:
        shift = model.schedule.sigma(499) / model.schedule.alpha(499) / (500 / 501)
        levels = [model.schedule.sigma(t) for t in STEPS]
        call["sigmas"] = [level / (shift - (shift - 1) * level) for level in levels]
        call |= {"max_sequence_length": 512} if flux else {}
    guided = {} if scale is None else {"guidance_scale": scale}
    result = pipeline(
        [PROMPTS[i] for i in CHOSEN],
        height=SIZE[0],
        width=SIZE[1],
        latents=pack(x) if flux else x.clone(),
        output_type="pt" if images else "latent",
        **guided,
        **call,
    )[0]
    return unpack(result, *(side // 2 for side in model.shape[1:])) if flux and not images else result


@pytest.mark.parametrize("name", WRITERS)
def test_samples_are_those_of_the_pipeline(
    name: str, load: Callable[..., Model], folders: Callable[[str], Path]
) -> None:
    """With guidance as the pipeline has it by default; the noise levels of a flow are undone before it shifts them."""
    model = load(name)
    latents, expected = ours(model, None), theirs(model, folders(name), None)
    error = (latents - expected).norm() / expected.norm()
    print(f"{name}: relative error {error:.1e}")
    assert error < 1e-4
    pictures = model.to_images(latents)
    assert (pictures.dtype, tuple(pictures.shape[1:])) == (torch.uint8, model.picture_shape)
    assert model.picture_shape == (3, *SIZE)
    published = (theirs(model, folders(name), None, images=True) * 255).round()
    print(f"{name}: images differ by at most {(pictures - published).abs().max():.0f} of 255")
    assert (pictures - published).abs().max() <= 2


@pytest.mark.parametrize(
    ("name", "scale", "negative"),
    [
        ("sd", 1.0, ""),
        ("sd", 3.0, "a dog"),
        ("sdxl", 1.0, ""),
        ("sdxl", 4.0, "a dog"),
        ("sd3", 1.0, ""),
        ("sd3-t5", 4.0, "a dog"),
        ("flux", 1.0, ""),
        ("flux", 9.0, ""),
    ],
)
def test_guidance_is_that_of_the_pipeline(
    name: str, scale: float, negative: str, load: Callable[..., Model], folders: Callable[[str], Path]
) -> None:
    model = load(name, negative_prompt=negative)
    call = {"negative_prompt": [negative] * len(CHOSEN)} if negative else {}
    latents, expected = ours(model, scale), theirs(model, folders(name), scale, **call)
    assert (latents - expected).norm() / expected.norm() < 1e-4
    assert (latents - ours(model, None)).norm() / latents.norm() > 1e-4


def test_sampling_may_start_without_signal(load: Callable[..., Model], folders: Callable[[str], Path]) -> None:
    model = load("sd2-zero")
    denoise = model.bind(CHOSEN)
    x = noise(model)
    steps = (999, 610, 95)
    latents = SOLVERS["ddim"](lambda x, t: denoise(x, t, 0), x, times(model.schedule, steps, "zero"))
    expected = theirs(model, folders("sd2-zero"), None, timesteps=list(steps))
    assert (latents - expected).norm() / expected.norm() < 1e-4


def test_guidance_at_scale_one_evaluates_the_prompt_alone(load: Callable[..., Model]) -> None:
    model = load("sd")
    assert model.costs("macs").full == 2 * replace(model, scale=1.0).costs("macs").full


@pytest.mark.parametrize(
    ("name", "kind", "guidance", "scale", "units"),
    [
        ("sd", "StableDiffusionPipeline", "free", 7.5, 12),
        ("sdxl", "StableDiffusionXLPipeline", "free", 5.0, 16),
        ("sd3", "StableDiffusion3Pipeline", "free", 7.0, 3),
        ("flux", "FluxPipeline", "embedded", 3.5, 4),
        ("schnell", "FluxPipeline", "none", 1.0, 4),
    ],
)
def test_the_model_says_what_it_is(
    name: str, kind: str, guidance: str, scale: float, units: int, load: Callable[..., Model]
) -> None:
    model = load(name)
    assert (model.name, model.kind, model.guidance, model.scale, len(model.units)) == (
        name, kind, guidance, scale, units,
    )  # fmt: skip
    assert (model.shape, model.schedule.T) == ((4, 8, 12), 1000)
    assert model.conditions is not None
    assert (model.conditions.kind, model.conditions.count, model.conditions.draw) == ("prompts", 5, "balanced")
    costs = model.costs("macs")
    assert all(0 < share < 1 for share in costs.shares)
    x = noise(model)
    denoise = model.bind(CHOSEN)
    assert not torch.equal(denoise(x, 500, 1), denoise(x, 500, 0))
    assert not torch.equal(denoise(x, 500, 0), model.bind([2, 2, 2])(x, 500, 0))


@pytest.mark.parametrize(("name", "size"), [("sd", (16, 16)), ("sd3", (16, 16)), ("flux", (256, 256))])
def test_images_have_the_size_of_the_model_unless_one_is_given(
    name: str, size: tuple[int, int], load: Callable[..., Model]
) -> None:
    assert load(name, size=None).image_shape == (3, *size)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_dynamic_shift_is_that_of_the_scheduler(tokens: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for kind in ("exponential", "linear"):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=calculate_shift(tokens))
        shift = flow_shift(scheduler.config, tokens, 1.15)
        expected = torch.tensor([shift * s / (1 + (shift - 1) * s) for s in (0.9, 0.5, 0.1)])
        torch.testing.assert_close(scheduler.sigmas[:3], expected, rtol=0, atol=1e-6)
    assert flow_shift({"shift": 3.0}, tokens, 1.15) == 3.0
    assert flow_shift({"use_dynamic_shifting": True}, 4096, 1.15) == pytest.approx(math.exp(1.15))


def test_unpacking_undoes_packing() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 10)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 10))
    assert torch.equal(unpack(pack(x), 3, 5), x)


def test_a_network_that_needs_no_guidance_is_given_none(load: Callable[..., Model]) -> None:
    with pytest.raises(ConfigError, match="was distilled to need none"):
        load("schnell").check_scale(3.0)


def test_any_text_encoder_of_sd3_may_be_absent(copied: Callable[[str], Path], load: Callable[..., Model]) -> None:
    folder = copied("sd3-t5")
    full = load(folder)
    assert full.conditions is not None
    whole = full.conditions.rows([0])
    clips = {name: ["transformers", "CLIPTextModelWithProjection"] for name in ("text_encoder", "text_encoder_2")}
    for absent, pooled in (("text_encoder", slice(24, 40)), ("text_encoder_2", slice(0, 24))):
        edit(folder / "model_index.json", **{**clips, absent: [None, None]})
        model = load(folder)
        assert model.conditions is not None
        rows = model.conditions.rows([0])
        assert rows["text"].shape == whole["text"].shape
        assert torch.equal(rows["pooled"][:, pooled], whole["pooled"][:, pooled])
        assert (rows["pooled"] == 0).sum() == 40 - (pooled.stop - pooled.start)
        assert torch.equal(rows["text"][:, 16:], whole["text"][:, 16:])
    edit(folder / "model_index.json", text_encoder=[None, None], text_encoder_2=[None, None])
    model = load(folder)
    assert model.conditions is not None
    rows = model.conditions.rows([0])
    assert rows["text"].shape == (1, 77 + 256, 64)
    assert not rows["pooled"].any()
    assert torch.equal(rows["text"][:, 77:], whole["text"][:, 16:])
    edit(folder / "model_index.json", text_encoder_3=[None, None])
    assert "none of its three text encoders" in refused(load, folder)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of Flux's RMSNorm, if not reduced
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_reduced_weights_predict_the_same(name: str, load: Callable[..., Model]) -> None:
    """The weights are rounded once instead of at every evaluation; text encoders run in that precision as well."""
    plain, reduced = load(name), load(name, precision="bfloat16")
    x = noise(plain)
    assert reduced.conditions is not None
    assert reduced.conditions.rows([0])["text"].dtype == torch.bfloat16
    low = reduced.bind(CHOSEN)
    rounding = replace(plain.denoiser, precision="bfloat16")  # type: ignore[type-var]
    full = rounding(x, 500, 0, **low.keywords)  # type: ignore[attr-defined]
    if name == "flux":
        assert (full - low(x, 500, 0)).norm() < 0.01 * full.norm()
    else:
        assert torch.equal(full, low(x, 500, 0))
    dtypes = {parameter.dtype for parameter in network_of(reduced).parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}
    assert {parameter.dtype for parameter in network_of(plain).parameters()} == {torch.float32}
    assert plain.fingerprint == reduced.fingerprint
    exact = plain.bind(CHOSEN)(x, 500, 0)
    assert (low(x, 500, 0) - exact).norm() / exact.norm() < 0.1


def network_of(model: Model) -> nn.Module:
    """The network that a model's denoiser runs."""
    predict: Any = model.denoiser.network  # type: ignore[attr-defined]
    network: nn.Module = predict.args[0]
    return network


def test_sharded_and_half_precision_files_are_read(
    load: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, shards, half = tmp_path / "whole", tmp_path / "shards", tmp_path / "half"
    write_sd(whole)
    write_sd(shards, max_shard_size="200KB")
    assert len(list((shards / "unet").glob("*.safetensors"))) > 1
    one, other = load(whole), load(shards)
    x = noise(one)
    assert torch.equal(one.bind(CHOSEN)(x, 500, 0), other.bind(CHOSEN)(x, 500, 0))
    write_sd(half, variant="fp16")
    assert (half / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert torch.equal(one.bind(CHOSEN)(x, 500, 0), load(half).bind(CHOSEN)(x, 500, 0))
    for file in half.rglob("*.safetensors"):
        save_file({key: value.half() for key, value in weights_in(file).items()}, file, {"format": "pt"})
    low = load(half)
    assert {parameter.dtype for parameter in network_of(low).parameters()} == {torch.float32}
    exact, rounded = one.bind(CHOSEN)(x, 500, 0), low.bind(CHOSEN)(x, 500, 0)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.02
    next((shards / "unet").glob("*-00001-*")).unlink()
    assert "which is not there" in refused(load, shards)


def test_pickled_text_encoders_are_read_and_run_nothing(
    copied: Callable[[str], Path], load: Callable[..., Model], tmp_path: Path
) -> None:
    """As older repositories have them, with the names that CLIP's weights had then."""
    expected, folder = load("sd"), copied("sd")
    part = folder / "text_encoder"
    weights = {f"text_model.{key}": value for key, value in weights_in(part / "model.safetensors").items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    (part / "model.safetensors").unlink()
    torch.save(weights, part / "pytorch_model.bin")
    model = load(folder)
    assert torch.equal(
        expected.bind(CHOSEN).keywords["condition"]["text"], model.bind(CHOSEN).keywords["condition"]["text"]
    )  # type: ignore[attr-defined]
    (part / "pytorch_model.bin").rename(part / "pytorch_model.fp16.bin")
    assert conditions_of(load(folder)) == conditions_of(model)
    torch.save({**weights, "evil": Evil(tmp_path / "ran")}, part / "pytorch_model.fp16.bin")
    assert "which is code and not run" in refused(load, folder)
    assert not (tmp_path / "ran").exists()


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_half_precision_is_taken_where_only_the_index_of_full_is_there(
    load: Callable[..., Model], tmp_path: Path
) -> None:
    """A download of one variant brings the small files of both."""
    half = tmp_path / "half"
    write_sd(half, variant="fp16", max_shard_size="200KB")
    index = half / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    full = half / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    full.write_text(index.read_text().replace("model.fp16-", "model-"))
    (half / "text_encoder" / "model.safetensors.index.json").write_text(full.read_text())
    x, expected = noise(load("sd")), load("sd")
    assert torch.equal(load(half).bind(CHOSEN)(x, 500, 0), expected.bind(CHOSEN)(x, 500, 0))


def test_fingerprints_tell_what_is_measured_apart(copied: Callable[[str], Path], load: Callable[..., Model]) -> None:
    folder = copied("sd")
    first = load(folder)
    assert load("sd").fingerprint == first.fingerprint == load(folder, labels="random").fingerprint
    models, conditions = {first.fingerprint}, {conditions_of(first)}
    for part in ("unet", "vae"):
        file = folder / part / "diffusion_pytorch_model.safetensors"
        weights = weights_in(file)
        key = min(key for key in weights if key.startswith(("conv_out", "decoder.conv_out")))
        save_file({**weights, key: weights[key] + 1}, file)
        models.add(load(folder).fingerprint)
    edit(folder / "scheduler" / "scheduler_config.json", beta_end=0.02)
    models.add(load(folder).fingerprint)
    assert len(models) == 4
    assert conditions_of(load(folder)) == conditions_of(first)
    conditions.add(conditions_of(load(folder, labels="random")))
    conditions.add(conditions_of(load(folder, negative_prompt="a dog")))
    other = folder.parent / "other.txt"
    other.write_text("a dog\n")
    conditions.add(conditions_of(load(folder, prompts=other)))
    file = folder / "text_encoder" / "model.safetensors"
    weights = weights_in(file)
    save_file({key: value + 1 for key, value in weights.items()}, file, {"format": "pt"})
    conditions.add(conditions_of(load(folder)))
    assert len(conditions) == 5


def conditions_of(model: Model) -> str:
    assert model.conditions is not None
    return model.conditions.fingerprint


def test_units_may_be_compiled(load: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Units] = []
    monkeypatch.setattr("autodiffusion_optuna.evaluation.models.base.compile_units", compiled.append)
    load("flux")
    model = load("flux", compile=True)
    assert compiled == [model.denoiser.units]  # type: ignore[attr-defined]


def test_a_single_file_in_its_authors_layout_is_the_same_model(
    folders: Callable[[str], Path], load: Callable[..., Model], prompts: Path, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    original_layout(folders("sd"), file)
    model, expected = load(file, config=folders("sd")), load("sd")
    x = noise(model)
    assert torch.equal(model.bind(CHOSEN)(x, 500, 0), expected.bind(CHOSEN)(x, 500, 0))
    assert model.units == expected.units
    with pytest.raises(ConfigError, match=r"set model\.config to the folder of a diffusers pipeline"):
        load(file)
    with pytest.raises(ModelError, match=r"no model_index\.json; give a folder to which diffusers saved"):
        load(file, config=tmp_path)

    weights = weights_in(file)
    for lost in ("model.diffusion_model.out.2.bias", "model.diffusion_model.output_blocks.3.0.in_layers.0.bias"):
        save_file({key: value for key, value in weights.items() if key != lost}, file)
        with pytest.raises(ModelError) as caught:
            load(file, config=folders("sd"))
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)
    save_file({"nothing": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"checkpoint\.safetensors"):
        load(file, config=folders("sd"))


def test_a_single_file_with_a_moving_average_gives_the_average(
    folders: Callable[[str], Path],
    load: Callable[..., Model],
    prompts: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its keys are those of the weights in training, run together."""
    file = tmp_path / "both.safetensors"
    original_layout(folders("sd"), file)
    prefix, average = "model.diffusion_model.", weights_in(file)
    ema = {"model_ema." + key.removeprefix("model.").replace(".", ""): value for key, value in average.items()}
    assert len(ema) > 100  # below, diffusers takes them for something else
    training = {key: value + 1 for key, value in average.items()}
    assert all(key.startswith(prefix) for key in training)
    save_file({**training, **ema, "model_ema.decay": torch.tensor(0.9999)}, file)
    capfd.readouterr()
    model, expected = load(file, config=folders("sd")), load("sd")
    x = noise(model)
    assert torch.equal(model.bind(CHOSEN)(x, 500, 0), expected.bind(CHOSEN)(x, 500, 0))
    assert capfd.readouterr() == ("", "")


def test_prompts_beyond_the_machines_memory_are_refused(
    load: Callable[..., Model], folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 16 * 32 * 4  # tokens, width, bytes
    monkeypatch.setattr("autodiffusion_optuna.evaluation.models.text.machine_memory", lambda: 2 * 3 * each)
    conditions = load(folders("sd")).conditions  # of the negative prompt and the first one
    assert conditions is not None
    conditions.rows([0, 1, 4])
    with pytest.raises(ConfigError, match=r"4 different prompts are drawn.* at most 3 fit") as caught:
        conditions.rows([2])
    assert "\n" not in str(caught.value)


class Counting:
    """Counts the prompts that text encoders are given, by encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        call = TextEncoder.__call__

        def counted(encoder: TextEncoder, prompts: Sequence[str], layer: int = -1) -> Any:
            self.seen += prompts
            return call(encoder, prompts, layer)

        monkeypatch.setattr(TextEncoder, "__call__", counted)


def test_a_file_as_large_as_cocos_costs_what_is_drawn_of_it(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, drawn = 200_000, 40
    (tmp_path / "captions.txt").write_text("\n".join(f"photo {i} of a cat" for i in range(total)))
    counting = Counting(monkeypatch)
    tracemalloc.start()
    started = time.monotonic()
    model = load_source(folders("sd"), prompts=tmp_path / "captions.txt", size=SIZE)
    conditions = model.conditions
    assert conditions is not None
    assert conditions.count == total
    assert conditions.prepare is not None
    assert counting.seen == ["", "photo 0 of a cat"]
    chosen = Bank(0, 0, model.shape).conditions(0, drawn, total)
    conditions.prepare(chosen)
    conditions.rows(chosen)
    conditions.prepare(chosen[:7])
    seconds, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counting.seen[2:] == [f"photo {i} of a cat" for i in chosen]
    assert seconds < 20  # encoding all of them takes minutes
    assert peak < 200 * 2**20


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3-t5", "flux"])
def test_a_prompt_is_the_same_bit_for_bit_whatever_else_is_drawn(
    name: str, copied: Callable[[str], Path], load: Callable[..., Model]
) -> None:
    folder = copied(name)
    one, other = load(folder).conditions, load(folder).conditions
    assert one is not None
    assert other is not None
    assert other.prepare is not None
    other.prepare([3, 2, 1, 0])
    others = other.rows([1, 3, 4])
    for key, tensor in one.rows([3]).items():
        assert torch.equal(tensor[0], others[key][1])
    assert torch.equal(one.rows([4])["text"], one.rows([0])["text"])  # the same prompt twice


def refused(
    load: Callable[..., Model], source: str | Path, kind: type[AdoptError] = ModelError, **settings: Any
) -> str:
    """The one line with which a pipeline is refused."""
    with pytest.raises(kind) as caught:
        load(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("sd", {"prompts": None}, "set model.prompts=FILE"),
        ("sd", {"prompts": "nowhere.txt"}, "nowhere.txt: cannot be read"),
        ("sd", {"size": [15, 16]}, "model.size is 15 x 16; use multiples of 2"),
        ("sd3", {"size": [18, 16]}, "use multiples of 4"),
        ("sd3", {"size": [16, 128]}, "sides go up to 64"),
        ("flux", {"size": [2, 16]}, "use multiples of 4"),
        ("flux", {"negative_prompt": "a dog"}, "leave model.negative_prompt out"),
        ("sd", {"classifier": "c.pt"}, "leave model.classifier out"),
        ("sd", {"config": "folder"}, "leave model.config out"),
    ],
)
def test_settings_that_do_not_suit_are_refused(
    name: str, settings: dict[str, Any], reason: str, load: Callable[..., Model]
) -> None:
    assert reason in refused(load, name, ConfigError, **settings)


def test_latents_are_never_clipped(folders: Callable[[str], Path], prompts: Path) -> None:
    with pytest.raises(ConfigError, match="latents"):
        load_source(folders("sd"), clip=True, prompts=prompts)
    load_source(folders("sd"), clip=False, prompts=prompts)


@pytest.mark.parametrize(
    ("name", "file", "changes", "reason"),
    [
        (
            "sd",
            "model_index.json",
            {"_class_name": "KandinskyPipeline"},
            "is a KandinskyPipeline with a UNet2DConditionModel",
        ),
        ("sd", "model_index.json", {"text_encoder": [None, None]}, "has no text_encoder"),
        ("sd", "model_index.json", {"text_encoder": ["evil", "Code"]}, "is a Code; only CLIPTextModel"),
        ("sd", "model_index.json", {"tokenizer": None}, "is a None; only CLIPTokenizer"),
        ("sd", "unet/config.json", {"_class_name": "UNet2DModel"}, "describes a UNet2DModel"),
        ("sd", "unet/config.json", {"time_cond_proj_dim": 8}, "latent consistency models"),
        ("sd", "unet/config.json", {"in_channels": 9}, "9 channels in and 4 out"),
        ("sd", "unet/config.json", {"sample_size": "large"}, "sample_size is 'large'"),
        ("sd", "unet/config.json", {"block_out_channels": [16]}, "diffusers cannot build this model"),
        ("sd", "unet/config.json", {"cross_attention_dim": 24}, "weights do not fit config.json"),
        ("sd", "scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "unknown beta_schedule"),
        ("sd3", "scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas True is not what"),
        ("sd3", "scheduler/scheduler_config.json", {"shift": 0}, "shifted by 0"),
        ("flux", "scheduler/scheduler_config.json", {"max_shift": "high"}, "copy its config again"),
        ("sd", "text_encoder/config.json", {"hidden_size": 24}, "transformers cannot load this CLIPTextModel"),
        ("sd", "vae/config.json", {"latent_channels": 8}, "vae"),
    ],
)
def test_pipelines_that_do_not_fit_are_refused(
    name: str,
    file: str,
    changes: dict[str, Any],
    reason: str,
    copied: Callable[[str], Path],
    load: Callable[..., Model],
) -> None:
    folder = copied(name)
    edit(folder / file, **changes)
    assert reason in refused(load, folder)


def test_text_encoders_of_another_pipeline_are_refused(
    copied: Callable[[str], Path], folders: Callable[[str], Path], load: Callable[..., Model]
) -> None:
    folder = copied("sd")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folders("flux") / "text_encoder", folder / "text_encoder")
    assert "take all parts from one pipeline" in refused(load, folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "unet/config.json"])
def test_parts_that_are_not_there_are_named(
    part: str, copied: Callable[[str], Path], load: Callable[..., Model]
) -> None:
    folder = copied("sd")
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert part.split("/")[0] in refused(load, folder)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_damaged_weights_are_refused(part: str, copied: Callable[[str], Path], load: Callable[..., Model]) -> None:
    folder = copied("sd")
    file = folder / f"{part}.safetensors"
    content, weights = file.read_bytes(), weights_in(file)
    file.write_bytes(content[: len(content) // 2])
    assert part.split("/")[0] in refused(load, folder)
    lost = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != lost}, file, {"format": "pt"})
    assert "1 missing" in refused(load, folder)


def test_transformers_is_named_where_it_is_missing(
    load: Callable[..., Model], folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders("sd")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'autodiffusion-optuna[text]'" in refused(load, folder)


def test_loading_is_quiet_and_leaves_the_settings_of_transformers(
    load: Callable[..., Model], folders: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    log, folder = transformers.utils.logging, folders("sdxl")
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    capfd.readouterr()
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
