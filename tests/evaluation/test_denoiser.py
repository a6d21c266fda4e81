from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.denoiser import (
    PREDICTIONS,
    UNCONDITIONAL,
    Condition,
    Denoiser,
    Network,
    model_time,
    store_reduced,
)
from autodiffusion_optuna.evaluation.units import find_units
from autodiffusion_optuna.noise import NoiseSchedule, flow, linear

CPU = torch.device("cpu")
SCHEDULE = linear()
X0 = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
EPS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))
TRUTHS: dict[str, Callable[[float, float], Tensor]] = {
    "epsilon": lambda alpha, sigma: EPS,
    "sample": lambda alpha, sigma: X0,
    "v_prediction": lambda alpha, sigma: alpha * EPS - sigma * X0,
    "flow_prediction": lambda alpha, sigma: EPS - X0,
}


def constant(prediction: Tensor) -> Network:
    return lambda x, model_times, condition: prediction


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("schedule", [SCHEDULE, flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("t", [0, 41, 500.5, 900])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_every_prediction_becomes_the_clean_image(
    prediction: str, schedule: NoiseSchedule, t: float, learned_variance: bool
) -> None:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    answer = TRUTHS[prediction](alpha, sigma)
    if learned_variance:
        answer = torch.cat([answer, torch.full_like(answer, 7.0)], dim=1)
    x0 = Denoiser(constant(answer), schedule, prediction, CPU)(alpha * X0 + sigma * EPS, t)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, X0, rtol=0, atol=2e-5)


def test_clip_clamps_the_clean_image_and_eps_follows() -> None:
    alpha, sigma = SCHEDULE.alpha(300), SCHEDULE.sigma(300)
    x = alpha * 3 * X0 + sigma * EPS
    plain, clipped = (Denoiser(constant(EPS), SCHEDULE, "epsilon", CPU, clip=clip)(x, 300) for clip in (False, True))
    assert plain.abs().max() > 1.5
    assert torch.equal(clipped, plain.clamp(-1, 1))


def test_the_network_is_asked_in_model_times() -> None:
    asked: list[Tensor] = []

    def network(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        asked.append(model_times)
        return x

    for schedule, t in ((SCHEDULE, 41), (SCHEDULE, 40.25), (flow(), 10.5)):
        Denoiser(network, schedule, "sample", CPU)(X0, t)
        expected = model_time(schedule, t)
        torch.testing.assert_close(asked.pop(), torch.full((3,), expected, dtype=torch.float32))
    assert model_time(SCHEDULE, 40.25) == 40.25
    assert model_time(flow(), 10.5) == pytest.approx(1000 * 11.5 / 1001)


def test_a_float64_state_stays_float64_and_the_network_sees_float32() -> None:
    seen: list[torch.dtype] = []

    def network(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        seen.append(x.dtype)
        return x

    x0 = Denoiser(network, SCHEDULE, "epsilon", CPU)(X0.double(), 500)
    assert (x0.dtype, seen) == (torch.float64, [torch.float32])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_is_close_and_returns_float32(precision: str, make_unet: Callable[..., nn.Module]) -> None:
    network = make_unet()
    dtypes: list[torch.dtype] = []

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = network(x, model_times, return_dict=False)[0]
        dtypes.append(prediction.dtype)
        return prediction

    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    full, low = (Denoiser(predict, SCHEDULE, "epsilon", CPU, p)(x, 300) for p in ("float32", precision))
    assert dtypes == [torch.float32, getattr(torch, precision)]
    assert low.dtype == torch.float32
    assert not torch.equal(full, low)
    assert (full - low).norm() / full.norm() < 0.05


def test_global_state_is_left_alone() -> None:
    x0 = Denoiser(constant(EPS), SCHEDULE, "epsilon", CPU, "bfloat16")(X0, 300)
    assert x0.is_inference()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_modes_reach_the_network(make_unet: Callable[..., nn.Module]) -> None:
    network = make_unet()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = network(x, model_times, return_dict=False)[0]
        return prediction

    units = find_units(network, lambda: predict(x, torch.zeros(2), UNCONDITIONAL))
    denoiser = Denoiser(predict, SCHEDULE, "epsilon", CPU, units=units)
    full = denoiser(x, 300)
    assert not torch.equal(denoiser(x, 300, 0b10001), full)
    assert torch.equal(denoiser(x, 300), full)
    with pytest.raises(ModelError, match=f"this model has {len(units)} units"):
        denoiser(x, 300, 1 << 2 * len(units))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown prediction type 'eps'"):
        Denoiser(constant(EPS), SCHEDULE, "eps", CPU)
    with pytest.raises(ConfigError, match=r"unknown precision 'float8'.*bfloat16"):
        Denoiser(constant(EPS), SCHEDULE, "epsilon", CPU, "float8")
    with pytest.raises(ModelError, match="no units that can rest"):
        Denoiser(constant(EPS), SCHEDULE, "epsilon", CPU)(X0, 300, 1)
    with pytest.raises(ModelError, match=r"output has shape \[3, 3, 4, 4\], expected \[3, 2, 4, 4\]"):
        Denoiser(constant(torch.zeros(3, 3, 4, 4)), SCHEDULE, "epsilon", CPU)(X0, 300)


def shifted(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
    """A network whose eps is EPS plus its condition, an image's number."""
    return EPS.repeat(len(x) // len(EPS), 1, 1, 1) + condition["label"].view(-1, 1, 1, 1)


LABELS = {"label": torch.tensor([1.0, 2.0, 3.0])}
NOTHING = {"label": torch.zeros(3)}


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_free_guidance_leads_away_from_the_negative(scale: float) -> None:
    guided = Denoiser(shifted, SCHEDULE, "epsilon", CPU, guidance="free")
    plain = Denoiser(shifted, SCHEDULE, "epsilon", CPU)
    x0 = guided(X0, 300, condition=LABELS, negative=NOTHING, scale=scale)
    expected = plain(X0, 300, condition={"label": scale * LABELS["label"]})
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)


def test_free_guidance_evaluates_half_as_much_at_scale_one() -> None:
    batches: list[int] = []

    def counting(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        batches.append(len(x))
        return shifted(x, model_times, condition)

    denoiser = Denoiser(counting, SCHEDULE, "epsilon", CPU, guidance="free")
    for scale in (1.0, 3.0):
        denoiser(X0, 300, condition=LABELS, negative=NOTHING, scale=scale)
    assert batches == [3, 6]


def test_embedded_guidance_is_a_condition() -> None:
    seen: list[Condition] = []

    def network(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        seen.append(condition)
        return x

    Denoiser(network, SCHEDULE, "epsilon", CPU, guidance="embedded")(X0, 300, condition=LABELS, scale=3.5)
    assert seen[0]["guidance"].tolist() == [3.5] * 3
    assert torch.equal(seen[0]["label"], LABELS["label"])


def test_a_classifier_moves_eps_after_the_clip() -> None:
    gradient = torch.randn(X0.shape, generator=torch.Generator().manual_seed(5))
    x = 3 * X0
    guided = Denoiser(
        constant(EPS), SCHEDULE, "epsilon", CPU, clip=True, guidance="classifier", classifier=lambda *_: gradient
    )
    plain = Denoiser(constant(EPS), SCHEDULE, "epsilon", CPU, clip=True)
    alpha, sigma = SCHEDULE.alpha(300), SCHEDULE.sigma(300)
    eps = (x - alpha * plain(x, 300)) / sigma - 2.0 * sigma * gradient
    torch.testing.assert_close(guided(x, 300, scale=2.0), (x - sigma * eps) / alpha, rtol=1e-5, atol=1e-5)
    assert guided(x, 300, scale=2.0).abs().max() > 1


def test_reduced_weights_predict_the_same_under_autocast() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 1))

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        return network(x)

    denoiser = Denoiser(predict, SCHEDULE, "epsilon", CPU, "bfloat16")
    before = denoiser(X0, 300)
    store_reduced(network, "bfloat16")
    assert network[0].weight.dtype == torch.bfloat16
    assert network[1].weight.dtype == torch.float32
    assert torch.equal(denoiser(X0, 300), before)
