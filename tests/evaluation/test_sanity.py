"""What the check of a model at load tells apart, on the bundled digits model and on tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from load_source import load_source
from tiny_models import make_vae, write_class_conditional, write_ddpm
from torch import Tensor, nn

from autodiffusion_optuna.config import load_preset, parse_config
from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.models.vae import load_vae
from autodiffusion_optuna.evaluation.sanity import LEVELS, check_model, doubt, measure, suspects
from autodiffusion_optuna.noise import NoiseSchedule, cosine, from_scheduler_config
from autodiffusion_optuna.study.components import build, warnings

DATA = Path(__file__).parent.parent / "data" / "digits_heldout.npz"
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def digits() -> Tensor:
    with np.load(DATA, allow_pickle=False) as data:
        return torch.from_numpy(data["x"][:16]).unsqueeze(1)


@pytest.fixture
def model() -> Model:
    """The right one, free to be changed."""
    return load_source("digits")


def rebuilt(model: Model, **changes: Any) -> Model:
    """The model with another prediction or schedule."""
    assert isinstance(model.denoiser, Denoiser)
    denoiser = replace(model.denoiser, **changes)
    return replace(model, denoiser=denoiser, schedule=denoiser.schedule)


def network_of(model: Model) -> nn.Module:
    assert isinstance(model.denoiser, Denoiser)
    cells: Any = model.denoiser.network.__closure__  # type: ignore[attr-defined]
    found = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, nn.Module)]
    return found[0]


def scaled(factor: float) -> Callable[[Model], Model]:
    """As fp8 weights load without the scales beside them."""

    def change(model: Model) -> Model:
        for parameter in network_of(model).parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
        return model

    return change


def drawn(model: Model) -> Model:
    """A network that was never trained."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network_of(model).parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())
    return model


def levelled(schedule: NoiseSchedule) -> Callable[[Model], Model]:
    return lambda model: rebuilt(model, schedule=schedule)


def timed(change: Callable[[Any], Any]) -> Callable[[Model], Model]:
    return lambda model: rebuilt(
        model, schedule=replace(model.schedule, model_times=change(model.schedule.model_times))
    )


WRONG: dict[str, Callable[[Model], Model]] = {
    "sample": lambda model: rebuilt(model, prediction="sample"),
    "v": lambda model: rebuilt(model, prediction="v_prediction"),
    "flow": lambda model: rebuilt(model, prediction="flow_prediction"),
    "cosine": levelled(cosine(1000)),
    "stable diffusion's betas": levelled(from_scheduler_config({**STABLE, "num_train_timesteps": 1000})),
    "times in [0, 1]": timed(lambda times: times / 1000),
    "times reversed": timed(lambda times: times[::-1].copy()),
    "half the weights": scaled(0.5),
    "twice the weights": scaled(2.0),
    "random": drawn,
}


def test_right_models_pass(model: Model, digits: Tensor) -> None:
    drawn_from = torch.get_rng_state()
    assert check_model(model, digits, 64) == []
    assert check_model(model, digits[:4], 64) == []
    assert check_model(model, None, 64) == []
    assert check_model(rebuilt(model, clip=False), None, 64) == []
    assert torch.equal(torch.get_rng_state(), drawn_from)
    levels = measure(model, digits.float() / 127.5 - 1, 5)
    assert [level.signal for level in levels] == list(LEVELS)
    assert max(level.ratio for level in levels) < 0.4
    assert min(level.kept for level in levels) > 0.97
    mixture = load_source("mixture")
    assert check_model(mixture, None, 64) == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_models_are_told_apart(name: str, model: Model, digits: Tensor) -> None:
    lines = check_model(WRONG[name](model), digits, 64)
    assert len(lines) == 1
    assert lines[0].startswith("model 'digits' ")
    assert "prediction_type and betas of the scheduler" in lines[0]
    assert "\n" not in lines[0]


def test_a_random_network_is_reported_without_images(model: Model) -> None:
    lines = check_model(drawn(model), None, 64)
    assert len(lines) == 1
    assert "on its own samples, as there are no images" in lines[0]


def test_images_of_another_size_are_shrunk_and_never_enlarged(model: Model, digits: Tensor) -> None:
    large = digits.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert check_model(drawn(model), large, 64)[0].count("on images of the reference") == 1
    assert "on its own samples" in check_model(drawn(model), digits[:, :, ::2, ::2], 64)[0]


def test_a_network_that_gives_no_numbers_is_reported(model: Model, digits: Tensor) -> None:
    next(network_of(model).parameters()).fill_(torch.nan)
    assert "denoises no better than a linear filter" in check_model(model, digits, 64)[0]


def test_too_little_memory_is_no_end(model: Model, digits: Tensor) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    assert "not checked at load" in check_model(replace(model, denoiser=full), digits, 64)[0]


def test_conditional_models_are_checked(tmp_path: Path) -> None:
    write_class_conditional(tmp_path / "model")
    conditional = load_source(tmp_path / "model")
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(check_model(conditional, images, 3)) == 1  # it was never trained


def test_suspects_are_those_of_the_kind(tmp_path: Path) -> None:
    write_ddpm(tmp_path / "model")
    plain = load_source(tmp_path / "model", clip=False)
    assert "scaling_factor" not in suspects(plain)
    assert "scaling_factor" in suspects(replace(plain, decode=lambda x: x))
    assert "use_new_attention_order" in suspects(replace(plain, kind="adm"))


def test_latents_are_those_of_the_encoder(tmp_path: Path) -> None:
    vae = make_vae(scaling_factor=0.5, shift_factor=0.1)
    vae.save_pretrained(tmp_path)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = (vae.encode(images).latent_dist.mode() - 0.1) * 0.5
    torch.testing.assert_close(load_vae(tmp_path, torch.device("cpu")).encode(images), expected)


def test_the_check_is_a_setting_that_measures_nothing() -> None:
    table = load_preset("digits-4").model_dump(mode="json")
    table["score"]["images"] = 64
    on = parse_config(table)
    off = parse_config(table, ["model.check=false"])
    assert on.model.check
    assert on.fingerprint() == off.fingerprint()
    parts = build(on)
    assert parts.sanity == build(off).sanity == ()
    doubtful = replace(parts, sanity=("model 'digits' denoises no better",))
    assert "model 'digits' denoises no better" in warnings(doubtful, 64)


def test_the_best_possible_model_of_what_a_filter_describes_passes() -> None:
    """Independent normal pixels: no model is better than the filter, which has seen the very images."""
    schedule = cosine(1000)

    def shrink(x: Tensor, t: float, skip: int) -> Tensor:
        alpha, sigma = schedule.alpha(int(t)), schedule.sigma(int(t))
        return alpha / (alpha**2 + sigma**2) * x

    best = replace(load_source("mixture", clip=False), denoiser=shrink, schedule=schedule)
    for count in (4, 16):
        states = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(count))
        levels = measure(best, states, 16)
        assert max(level.ratio for level in levels) > 1
        assert doubt(levels) is None


def test_images_that_do_not_vary_are_said_not_to_be_checked(model: Model) -> None:
    black = torch.zeros(16, 1, 32, 32, dtype=torch.uint8)
    (line,) = check_model(model, black, 16)
    assert line == "model 'digits': not checked at load, as images of the reference do not vary"


def test_a_model_with_an_empty_condition_is_evaluated_once_for_each_image(tmp_path: Path) -> None:
    write_class_conditional(tmp_path, classes=4)
    conditional = load_source(tmp_path, clip=False, fields={"null_class": 1})
    assert conditional.guidance == "free"
    assert isinstance(conditional.denoiser, Denoiser)
    seen = []
    network = conditional.denoiser.network

    def counted(x: Tensor, *given: Any) -> Tensor:
        seen.append(len(x))
        return network(x, *given)

    counting = replace(conditional, denoiser=replace(conditional.denoiser, network=counted))
    measure(counting, torch.rand(8, 3, 16, 16) * 2 - 1, 8)
    assert set(seen) == {8}
