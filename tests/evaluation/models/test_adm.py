from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from load_source import load_source
from safetensors.torch import save_file
from tiny_adm import CLASSIFIER_FIELDS, golden, state, write_adm
from tiny_models import kinds_of
from torch import Tensor, nn

from autodiffusion_optuna.candidate import packed
from autodiffusion_optuna.errors import AdoptError, ConfigError, ModelError
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.models.adm import (
    ATTENTION,
    RESIDUAL,
    adm_blocks,
    build_unet,
    convert,
    convert_classifier,
)
from autodiffusion_optuna.evaluation.models.adm_classifier import EncoderUNetModel, label_gradient
from autodiffusion_optuna.evaluation.models.adm_fields import (
    PRESETS,
    AdmFields,
    check_fields,
    noise_schedule,
    resolve_fields,
)
from autodiffusion_optuna.evaluation.solvers import ddim, times
from autodiffusion_optuna.evaluation.units import Units, find_units

Tiny = tuple[Path, Path, dict[str, Any]]
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_adm(tmp_path_factory.mktemp("adm"))


def load(tiny: Tiny, guided: bool = False, precision: str = "float32", clip: bool = False, **changes: Any) -> Model:
    """The tiny ADM; ``changes`` are of its fields, or ``labels``."""
    path, classifier, fields = tiny
    settings = {"labels": changes.pop("labels")} if "labels" in changes else {}
    settings |= {"classifier": classifier} if guided else {}
    return load_source(f"adm:{path}", precision=precision, clip=clip, fields={**fields, **changes}, **settings)


def unit_names(adm: AdmFields) -> dict[str, str]:
    """ADM's path of each unit -> the UNet2DModel's; the position is AutoDiffusion's layer id (``dynamic_unet.py``)."""
    return {source: target for source, target, layers in adm_blocks(adm) if layers in (RESIDUAL, ATTENTION)}


def relative(given: Tensor, expected: Tensor) -> float:
    assert given.shape == expected.shape
    return float((given - expected).norm() / expected.norm())


def fields_of(name: str) -> AdmFields:
    described = golden(name)[0]
    return resolve_fields(None, {**described["create_model"], "num_classes": described["num_classes"] or 0})


def units_of(network: nn.Module, adm: AdmFields) -> Units:
    device = next(network.parameters()).device
    x, t = torch.zeros(1, 3, adm.image_size, adm.image_size, device=device), torch.zeros(1, device=device)
    label = torch.zeros(1, dtype=torch.int64, device=device) if adm.class_cond else None
    return find_units(network, lambda: network(x, t, class_labels=label))


@pytest.mark.parametrize("name", ["adm_unet_a", "adm_unet_b"])
def test_converted_networks_compute_what_the_official_ones_do(name: str) -> None:
    described, tensors = golden(name)
    adm = fields_of(name)
    network = convert(state(tensors), adm)
    units = units_of(network, adm)
    assert list(unit_names(adm)) == [layer["path"] for layer in described["layers"]]
    assert tuple(unit_names(adm).values()) == units.names
    assert [kind == "Attention" for kind in kinds_of(network, units)] == [
        layer["kind"] == "attention" for layer in described["layers"]
    ]

    @torch.inference_mode()
    def output(time: str = "in.t", modes: int = 0) -> Tensor:
        with units.in_modes(modes):
            out: Tensor = network(tensors["in.x"], tensors[time], class_labels=tensors.get("in.y"))[0]
            return out

    errors = {
        "out.full": relative(output(), tensors["out.full"]),
        "out.full_t_float": relative(output("in.t_float"), tensors["out.full_t_float"]),
    }
    for mask in described["masks"]:
        key = f"out.{mask['name']}"
        errors[key] = relative(output(modes=packed(mask["skip"])), tensors[key])
    print(name, errors)
    assert len(errors) == 8
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", ["adm_unet_a", "adm_unet_b"])
def test_the_other_attention_order_is_wrong_by_what_the_golden_data_says(name: str) -> None:
    described, tensors = golden(name)
    adm = fields_of(name)
    swapped = convert(state(tensors), replace(adm, use_new_attention_order=not adm.use_new_attention_order))
    with torch.inference_mode():
        out = swapped(tensors["in.x"], tensors["in.t"], class_labels=tensors.get("in.y"))[0]
    expected = described["wrong_attention_order_relative_error"]
    assert relative(out, tensors["out.full"]) == pytest.approx(expected, rel=1e-3)


def test_a_decoder_may_have_other_heads_than_the_encoder() -> None:
    adm = replace(fields_of("adm_unet_b"), num_heads=4, num_heads_upsample=2)
    with torch.device("meta"):
        network = build_unet(adm)
    heads = {name: module.heads for name, module in network.named_modules() if hasattr(module, "heads")}
    assert {count for name, count in heads.items() if name.startswith("up_blocks")} == {2}
    assert {count for name, count in heads.items() if not name.startswith("up_blocks")} == {4}
    weights = state(golden("adm_unet_b")[1])
    plain, other = convert(weights, fields_of("adm_unet_b")), convert(weights, adm)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert relative(other(x, 5)[0], plain(x, 5)[0]) > 1e-3


SIZES = {
    "imagenet64": (295_904_454, 36, 22),
    "imagenet128": (421_529_606, 35, 16),
    "imagenet256": (553_838_086, 42, 16),
    "imagenet256_uncond": (552_814_086, 42, 16),
    "lsun256": (552_814_086, 42, 16),
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_the_published_architectures(name: str) -> None:
    adm = PRESETS[name]
    check_fields(adm)
    with torch.device("meta"):
        network = build_unet(adm)
    units = units_of(network, adm)
    parameters, residual, attention = SIZES[name]
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    kinds = kinds_of(network, units)
    assert (kinds.count("ResnetBlock2D"), kinds.count("Attention")) == (residual, attention)
    assert tuple(unit_names(adm).values()) == units.names


def adm_keys(adm: AdmFields) -> set[str]:
    """Keys of a released checkpoint, from what its official constructor makes; written without ``adm_blocks``."""
    residual = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    attention = ["norm", "qkv", "proj_out"]
    modules = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    width, ds, skips, block = 1, 1, [1], 0
    side = {adm.image_size // int(part) for part in adm.attention_resolutions.split(",")}
    multipliers = [int(part) for part in (adm.channel_mult or "1,2,3,4").split(",")]
    for level, multiplier in enumerate(multipliers):
        for _ in range(adm.num_res_blocks):
            block += 1
            path = f"input_blocks.{block}"
            modules += [f"{path}.0.{part}" for part in residual]
            modules += [f"{path}.0.skip_connection"] if width != multiplier else []
            modules += [f"{path}.1.{part}" for part in attention] if ds in side else []
            width = multiplier
            skips.append(width)
        if level < len(multipliers) - 1:
            block += 1
            modules += [f"input_blocks.{block}.0.{part}" for part in (residual if adm.resblock_updown else ["op"])]
            skips.append(width)
            ds *= 2
    modules += [f"middle_block.{i}.{part}" for i in (0, 2) for part in residual]
    modules += [f"middle_block.1.{part}" for part in attention]
    block = -1
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for i in range(adm.num_res_blocks + 1):
            block += 1
            path = f"output_blocks.{block}"
            modules += [f"{path}.0.{part}" for part in residual]
            modules += [f"{path}.0.skip_connection"] if width + skips.pop() != multiplier else []
            modules += [f"{path}.1.{part}" for part in attention] if ds in side else []
            width = multiplier
            if level and i == adm.num_res_blocks:
                place = 2 if ds in side else 1
                modules += [f"{path}.{place}.{part}" for part in (residual if adm.resblock_updown else ["conv"])]
                ds //= 2
    keys = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    return keys | ({"label_emb.weight"} if adm.class_cond else set())


def test_the_keys_are_those_of_released_checkpoints() -> None:
    """The golden key sets are; the same rule then gives those of ImageNet 64, which the converter must all want."""
    for name in ("adm_unet_a", "adm_unet_b"):
        assert adm_keys(fields_of(name)) == state(golden(name)[1]).keys()
    with pytest.raises(ModelError, match=r"(\d+) missing, first 'time_embed.0.weight'") as caught:
        convert({"input_blocks.0.0.weight": torch.zeros(192, 3, 3, 3)}, PRESETS["imagenet64"])
    assert f" {len(adm_keys(PRESETS['imagenet64'])) - 1} missing" in str(caught.value)
    with torch.device("meta"):
        empty = {key: torch.zeros(1) for key in adm_keys(PRESETS["imagenet64"])}
    with pytest.raises(ModelError, match="has shape"):  # every key is known, so a shape is the first complaint
        convert(empty, PRESETS["imagenet64"])


@pytest.mark.parametrize(("name", "parameters"), [("imagenet64", 65_438_568), ("imagenet256", 54_096_360)])
def test_presets_have_the_published_classifiers(name: str, parameters: int) -> None:
    with torch.device("meta"):
        classifier = EncoderUNetModel(PRESETS[name])
    assert sum(weight.numel() for weight in classifier.parameters()) == parameters
    logits = classifier(
        torch.zeros(2, 3, *[PRESETS[name].image_size] * 2, device="meta"), torch.zeros(2, device="meta")
    )
    assert logits.shape == (2, 1000)


def test_the_classifier_is_the_official_one() -> None:
    tensors = golden("adm_classifier")[1]
    classifier = EncoderUNetModel(replace(fields_of("adm_unet_a"), **CLASSIFIER_FIELDS))
    classifier.load_state_dict(state(tensors), strict=True)
    classifier.eval().requires_grad_(False)
    model_times = tensors["in.t"].float()
    with torch.inference_mode():  # as a denoiser calls it
        logits = classifier(tensors["in.x"], model_times)
        gradient = label_gradient(classifier)
        slope = gradient(tensors["in.x"] + 0, model_times + 0, {"label": tensors["in.y"] + 0})
        again = gradient(tensors["in.x"] + 0, model_times + 0, {"label": tensors["in.y"] + 0})
        with torch.autocast("cpu", torch.bfloat16):
            reduced = gradient(tensors["in.x"] + 0, model_times + 0, {"label": tensors["in.y"] + 0})
    errors = relative(logits, tensors["out.logits"]), relative(slope, tensors["out.grad_log_p_y"])
    print("classifier", errors)
    assert max(errors) < 1e-5
    assert slope.dtype == torch.float32
    assert not slope.requires_grad
    assert torch.equal(slope, again)
    assert torch.equal(slope, reduced)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_classifier_without_residual_resampling_has_convolutions() -> None:
    adm = replace(fields_of("adm_unet_a"), **CLASSIFIER_FIELDS, classifier_resblock_updown=False)
    classifier = EncoderUNetModel(replace(adm, classifier_use_scale_shift_norm=False))
    shapes = {key: tuple(value.shape) for key, value in classifier.state_dict().items()}
    assert shapes["input_blocks.2.0.op.weight"] == (32, 32, 3, 3)
    assert shapes["input_blocks.1.0.emb_layers.1.weight"] == (32, 128)
    assert classifier(X, torch.tensor([3.0, 900.0])).shape == (2, 10)


@pytest.mark.parametrize("case", golden("adm_chain")[0]["cases"], ids=lambda case: case["name"])
def test_chains_are_the_official_ones(tiny: Tiny, case: dict[str, Any]) -> None:
    tensors, name = golden("adm_chain")[1], case["name"]
    guided = case["classifier_scale"] is not None
    model = load(tiny, guided, clip=case["clip_denoised"], noise_schedule=case["betas"])
    np.testing.assert_allclose(
        model.schedule.alphas[case["timesteps"]] ** 2, tensors[f"{case['betas']}.alphas_cumprod"], rtol=1e-12
    )
    denoise = model.bind(tensors["in.y"].tolist(), case["classifier_scale"])
    states, cleans = [], []

    def record(x: Tensor, t: float) -> Tensor:
        states.append(x)
        cleans.append(denoise(x, t, 0))
        return cleans[-1]

    final = ddim(record, tensors["in.x_T"], times(model.schedule, case["timesteps"], "zero"))
    samples = torch.stack([*states[1:], final])
    errors = [relative(*pair) for pair in zip(samples, tensors[f"{name}.samples"], strict=True)]
    if case["clip_denoised"]:
        errors += [relative(*pair) for pair in zip(cleans, tensors[f"{name}.pred_xstart"], strict=True)]
    print(name, max(errors))
    assert max(errors) < 2e-5


def test_guidance_has_a_scale_and_zero_turns_it_off(tiny: Tiny) -> None:
    plain, guided = load(tiny), load(tiny, guided=True)
    assert (plain.guidance, guided.guidance, guided.scale) == ("none", "classifier", 1.0)
    alone = plain.bind([3, 7])(X, 500, 0)
    assert torch.equal(guided.bind([3, 7], 0.0)(X, 500, 0), alone)
    once, twice = (guided.bind([3, 7], scale)(X, 500, 0) - alone for scale in (1.0, 2.0))
    assert relative(twice, 2 * once) < 1e-4
    assert once.norm() > 0
    assert torch.equal(guided.bind([3, 7])(X, 500, 0), alone + once)


def test_models_are_conditioned_on_labels_by_image(tiny: Tiny) -> None:
    model = load(tiny, labels="random")
    assert model.conditions is not None
    assert (model.conditions.kind, model.conditions.count, model.conditions.draw) == ("labels", 10, "random")
    label = model.conditions.rows([4, 0])["label"]
    assert (label.dtype, label.tolist()) == (torch.int64, [4, 0])
    both = model.bind([4, 0])(X, 300, 0)
    torch.testing.assert_close(both[1:], model.bind([0])(X[1:], 300, 0))
    assert not torch.allclose(both[:1], model.bind([0])(X[:1], 300, 0))
    balanced = load(tiny).conditions
    assert balanced is not None
    assert balanced.fingerprint != model.conditions.fingerprint
    assert (model.name, model.shape, len(model.units), model.kind) == ("adm", (3, 16, 16), 14, "adm")
    assert model.costs("macs").full > 0


def unconditional(tiny: Tiny, folder: Path) -> Tiny:
    path, classifier, fields = tiny
    weights = {key: value for key, value in torch.load(path).items() if key != "label_emb.weight"}
    torch.save(weights, folder / "uncond.pt")
    return folder / "uncond.pt", classifier, {**fields, "class_cond": False}


def test_a_classifier_may_guide_a_model_without_class_conditioning(tiny: Tiny, tmp_path: Path) -> None:
    free = unconditional(tiny, tmp_path)
    assert load(free).conditions is None
    guided = load(free, guided=True)
    assert guided.conditions is not None
    assert not torch.allclose(guided.bind([1, 1])(X, 500, 0), guided.bind([2, 2])(X, 500, 0))
    assert torch.equal(guided.bind([1, 1], 0.0)(X, 500, 0), load(free).denoiser(X, 500, 0))
    with pytest.raises(ConfigError, match=r"data without classes \(num_classes 0\)"):
        load(free, guided=True, num_classes=0)


def test_schedules_are_scaled_with_their_length() -> None:
    adm = AdmFields(diffusion_steps=4000, rescale_timesteps=True)
    schedule = noise_schedule(adm)
    assert schedule.T == 4000
    assert schedule.model_times[3999] == 999.75
    betas = 1 - schedule.alphas[1:] ** 2 / schedule.alphas[:-1] ** 2
    np.testing.assert_allclose(betas, np.linspace(0.25e-4, 0.005, 4000)[1:], rtol=1e-9)
    plain = noise_schedule(replace(adm, rescale_timesteps=False, diffusion_steps=100))
    assert plain.model_times[99] == 99
    with pytest.raises(ConfigError, match="diffusion_steps 20"):
        noise_schedule(replace(adm, diffusion_steps=20))


def test_networks_that_predict_the_clean_image(tiny: Tiny) -> None:
    model, clean = load(tiny), load(tiny, predict_xstart=True)
    alpha, sigma = model.schedule.alpha(400), model.schedule.sigma(400)
    prediction = clean.bind([1, 2])(X, 400, 0)
    torch.testing.assert_close(model.bind([1, 2])(X, 400, 0), (X - sigma * prediction) / alpha, rtol=1e-4, atol=1e-4)


class Dtypes:
    """Output dtypes of modules, by name, of the last pass."""

    def __init__(self, network: nn.Module) -> None:
        self.seen: dict[str, torch.dtype] = {}
        for name, module in network.named_modules():
            module.register_forward_hook(lambda module, inputs, out, name=name: self.note(name, out))

    def note(self, name: str, out: object) -> None:
        if isinstance(out, Tensor):
            self.seen[name] = out.dtype


def test_reduced_precision_keeps_norms_and_time_embedding(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[nn.Module] = []

    def keep(weights: Mapping[str, Tensor], fields: AdmFields) -> nn.Module:
        networks.append(convert(weights, fields))
        return networks[-1]

    exact = load(tiny).bind([1, 2])(X, 100, 0)
    monkeypatch.setattr("autodiffusion_optuna.evaluation.models.adm.convert", keep)
    model = load(tiny, precision="bfloat16")
    dtypes = Dtypes(networks[0])
    x0 = model.bind([1, 2])(X, 100, 0)
    assert x0.dtype == torch.float32
    print("bfloat16", relative(x0, exact))
    assert 1e-6 < relative(x0, exact) < 2e-2
    norms = [name for name, module in networks[0].named_modules() if isinstance(module, nn.GroupNorm)]
    embedding = ["time_proj", "time_embedding", "time_embedding.linear_1", "class_embedding", "conv_out"]
    embedding += [name for name in dtypes.seen if name.endswith("time_emb_proj")]
    assert len(norms) > 20
    assert {dtypes.seen[name] for name in (*norms, *embedding)} == {torch.float32}
    assert dtypes.seen["mid_block.resnets.0.conv1"] == dtypes.seen["mid_block.attentions.0.to_q"] == torch.bfloat16
    stored = networks[0].get_parameter("mid_block.resnets.0.conv1.weight").dtype
    assert stored == torch.bfloat16
    # Rounded at every evaluation instead, they give the same bits.
    for module in networks[0].modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data = module.weight.data.float()
    original = convert(state(golden("adm_unet_a")[1]), fields_of("adm_unet_a"))
    networks[0].load_state_dict(original.state_dict())
    assert torch.equal(model.bind([1, 2])(X, 100, 0), x0)


def test_the_fingerprint_is_of_files_and_of_fields_that_matter(tiny: Tiny, tmp_path: Path) -> None:
    path, classifier, fields = tiny
    first = load(tiny).fingerprint
    same = [
        load(tiny, precision="bfloat16", clip=True).fingerprint,
        load(tiny, own_weights=True, dropout=0.1, classifier_depth=2).fingerprint,
        load((Path(path).rename(tmp_path / "other.pt"), classifier, fields)).fingerprint,
    ]
    (tmp_path / "other.pt").rename(path)
    assert set(same) == {first}
    changed = state(golden("adm_unet_a")[1])
    changed["out.2.bias"] += 1
    torch.save(changed, tmp_path / "changed.pt")
    others = [
        load(tiny, noise_schedule="cosine").fingerprint,
        load(tiny, guided=True).fingerprint,
        load((tmp_path / "changed.pt", classifier, fields)).fingerprint,
    ]
    assert len({first, *others}) == 4


def test_safetensors_and_old_checkpoints_are_read_too(tiny: Tiny, tmp_path: Path) -> None:
    path, classifier, fields = tiny
    weights = torch.load(path)
    save_file(weights, tmp_path / "adm.safetensors")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({key: value.half() for key, value in weights.items()}, tmp_path / "half.pt")
    expected = load(tiny).bind([1, 2])(X, 600, 0)
    for name in ("adm.safetensors", "old.pt"):
        assert torch.equal(load((tmp_path / name, classifier, fields)).bind([1, 2])(X, 600, 0), expected)
    assert relative(load((tmp_path / "half.pt", classifier, fields)).bind([1, 2])(X, 600, 0), expected) < 1e-2


def test_a_model_does_not_change_with_its_file(tiny: Tiny, tmp_path: Path) -> None:
    path, classifier, fields = tiny
    for suffix in ("pt", "safetensors"):
        copy = tmp_path / f"adm.{suffix}"
        if suffix == "pt":
            copy.write_bytes(path.read_bytes())
        else:
            save_file(torch.load(path), copy)
        model = load((copy, classifier, fields))
        before = model.bind([1, 2])(X, 600, 0)
        with copy.open("r+b") as file:
            file.write(bytes(copy.stat().st_size))
        assert torch.equal(model.bind([1, 2])(X, 600, 0), before)


def refused(run: Callable[[], object], error: type[AdoptError]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(error) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 700
    return message


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was run",)


def test_files_that_cannot_be_used_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    path, classifier, fields = tiny
    raw, bad = path.read_bytes(), tmp_path / "bad.pt"

    def message() -> str:
        return refused(lambda: load((bad, classifier, fields)), ModelError)

    assert "no such file" in message()
    assert "no such file" in refused(lambda: load((path, bad, fields), guided=True), ModelError)
    for length in (0, 1, 3, 10, 1000, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:length])
        assert "damaged or cut short" in message()
    for junk in (b"hello, this is text", pickle.dumps({"a": 1}), pickle.dumps(Code())):
        bad.write_bytes(junk)
        assert "no PyTorch checkpoint" in message()
    torch.save({"weight": Code()}, bad)
    assert "which is code and not run" in message()
    torch.save({"epoch": 2, "step": 3}, bad)
    assert "holds entries epoch, step, not tensors by name" in message()
    torch.save([torch.zeros(1)], bad)
    assert "holds a list" in message()
    torch.save({"conv_in.weight": torch.zeros(1)}, bad)
    assert "no ADM checkpoint: it has no input_blocks.0.0.weight (first key 'conv_in.weight')" in message()
    save_file(torch.load(path), tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:5000])
    assert "damaged" in refused(lambda: load((tmp_path / "cut.safetensors", classifier, fields)), ModelError)


def test_weights_of_another_architecture_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    path, classifier, fields = tiny
    assert "input_blocks.3.0.in_layers.2.weight has shape [32, 32, 3, 3] instead of [64, 32, 3, 3]" in refused(
        lambda: load((classifier, classifier, fields)), ModelError
    )
    assert "has shape" in refused(lambda: load((path, path, fields), guided=True), ModelError)
    assert "has shape" in refused(lambda: load_source(f"adm:{path}", preset="imagenet64"), ModelError)
    assert "1 unexpected, first 'label_emb.weight'" in refused(lambda: load(tiny, class_cond=False), ModelError)
    weights = torch.load(path)
    del weights["middle_block.1.norm.bias"]
    torch.save(weights, tmp_path / "less.pt")
    assert "1 missing, first 'middle_block.1.norm.bias'" in refused(
        lambda: load((tmp_path / "less.pt", classifier, fields)), ModelError
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_new_attention_order": False}, "use_new_attention_order False, but preset 'imagenet64'"),
        ({"noise_schedule": "linear"}, "noise_schedule linear, but preset 'imagenet64'"),
        ({"num_head_channels": 32}, "attention heads"),
        ({"num_head_channels": -1, "num_heads": 4}, "attention heads"),
    ],
)
def test_what_weights_do_not_show_must_not_contradict_a_published_model(changes: dict[str, Any], reason: str) -> None:
    adm = replace(PRESETS["imagenet64"], **changes)
    said = {name: getattr(adm, name) for name in AdmFields.__dataclass_fields__}
    for preset, given in (("imagenet64", changes), ("imagenet256", said), (None, said)):
        message = refused(partial(resolve_fields, preset, given), ConfigError)
        assert reason in message
        assert resolve_fields(preset, {**given, "own_weights": True}) == replace(adm, own_weights=True)
    with pytest.raises(ConfigError, match="would load unnoticed"):
        convert({}, adm)
    resolve_fields(None, {**said, "num_res_blocks": 2})  # no published model, so nothing is known


@pytest.mark.parametrize(
    ("preset", "given", "reason"),
    [
        (None, {}, "set model.preset (imagenet64, imagenet128"),
        ("imagnet64", {}, "unknown ADM preset 'imagnet64'; did you mean 'imagenet64'"),
        ("imagenet512", {}, "cannot be held by UNet2DModel"),
        (None, {"image_size": 512}, "cannot be held by UNet2DModel"),
        (None, {"image_size": 32}, "channel_mult is empty"),
        (None, {"channel_mult": "2,4"}, "cannot be held by UNet2DModel"),
        (None, {"channel_mult": "1,inf"}, "integers with commas"),
        (None, {"channel_mult": "1,two"}, "integers with commas"),
        (None, {"channel_mult": "1,2.5"}, "integers with commas"),
        (None, {"attention_resolutions": "16;8"}, "sides in pixels"),
        (None, {"attention_resolutions": "0"}, "sides in pixels"),
        (None, {"num_chanels": 64}, "unknown ADM field 'num_chanels'; did you mean 'num_channels'"),
        (None, {"class_cond": 1}, "class_cond is 1, but must be of type bool"),
        (None, {"num_heads": True}, "num_heads is True, but must be of type int"),
        (None, {"num_channels": 48}, "multiple of 32"),
        (None, {"num_res_blocks": 0}, "at least 1"),
        (None, {"num_heads": 3}, "cannot be split among attention heads"),
        (None, {"num_head_channels": 48}, "cannot be split among attention heads"),
        (None, {"num_heads": 0}, "cannot be split among attention heads"),
        (None, {"image_size": 36, "channel_mult": "1,1,1,1"}, "cannot be halved 3 times"),
        (None, {"noise_schedule": "cosin"}, "did you mean 'cosine'"),
        ("lsun256", {"class_cond": True}, "num_classes is 0"),
    ],
)
def test_fields_that_cannot_be_are_refused(preset: str | None, given: Mapping[str, Any], reason: str) -> None:
    assert reason in refused(lambda: resolve_fields(preset, given), ConfigError)


def test_settings_that_contradict_each_other_are_refused(tiny: Tiny) -> None:
    path, classifier, fields = tiny

    def message(**settings: Any) -> str:
        return refused(lambda: load_source(f"adm:{path}", **{"fields": fields, **settings}), ConfigError)

    assert "guidance 1.5 was given" in refused(lambda: load(tiny).check_scale(1.5), ConfigError)
    assert "data without classes" in message(preset="lsun256", fields={}, classifier=classifier)
    assert "makes 16 pixels a side" in message(size=[32, 32])
    assert "leave model.prompts out" in message(prompts="prompts.txt")
    assert "unknown ADM field classifier_pool 'adaptive'" in message(
        fields={**fields, "classifier_pool": "adaptive"}, classifier=classifier
    )
    assert "multiple of 32" in message(fields={**fields, "classifier_width": 40}, classifier=classifier)
    assert "cannot be halved 5 times" in message(
        fields={**fields, "classifier_channel_mult": "1,1,1,1,1,1"}, classifier=classifier
    )


def test_flags_of_a_readme_can_be_pasted() -> None:
    flags = {"attention_resolutions": "32,16,8", "class_cond": True, "diffusion_steps": 1000, "dropout": 0.1}
    flags |= {"image_size": 64, "learn_sigma": True, "noise_schedule": "cosine", "num_channels": 192}
    flags |= {"num_head_channels": 64, "num_res_blocks": 3, "resblock_updown": True, "use_new_attention_order": True}
    flags |= {"use_fp16": True, "use_scale_shift_norm": True, "classifier_depth": 4}
    assert resolve_fields(None, flags) == PRESETS["imagenet64"]
    assert resolve_fields("imagenet256", {"attention_resolutions": 16}).attention_resolutions == "16"


def test_the_classifier_refuses_weights_of_others() -> None:
    weights = state(golden("adm_classifier")[1])
    adm = replace(fields_of("adm_unet_a"), **CLASSIFIER_FIELDS)
    stored = convert_classifier(weights, adm).state_dict()
    assert all(torch.equal(stored[key], value) for key, value in weights.items())
    assert stored.keys() == weights.keys()
    with pytest.raises(ModelError, match="missing"):
        convert_classifier(weights, replace(adm, classifier_depth=2))
