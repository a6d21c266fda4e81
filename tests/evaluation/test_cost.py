from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from skip_masks import skips
from torch import nn

from autodiffusion_optuna.evaluation import cost
from autodiffusion_optuna.evaluation.cost import UnitCosts, macs, unit_latency, unit_macs
from autodiffusion_optuna.evaluation.units import find_units

CPU = torch.device("cpu")


def test_convolutions_and_products_are_counted_exactly() -> None:
    convolution, product = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(10, 7)
    assert macs(lambda: convolution(torch.zeros(2, 3, 8, 8))) == 2 * 8 * 8 * 4 * 3 * 9
    assert macs(lambda: product(torch.zeros(5, 10))) == 5 * 10 * 7


@pytest.mark.parametrize("grad", [False, True])
def test_attention_is_counted(grad: bool) -> None:
    """Queries times keys, and shares times values: two products of [10, 16] and [16, 10] a head."""
    q = torch.zeros(2, 3, 10, 16)
    with torch.inference_mode(not grad):
        assert macs(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 3 * 2 * 10 * 10 * 16


def test_macs_of_units_add_up_exactly(unet: nn.Module) -> None:
    x = torch.zeros(1, 1, 8, 8)
    units = find_units(unet, lambda: unet(x, torch.tensor(1.0)))

    def evaluate(modes: int) -> None:
        with units.in_modes(modes), torch.inference_mode():
            unet(x, torch.tensor(1.0))

    costs = unit_macs(evaluate, len(units))
    assert costs.full == macs(lambda: evaluate(0)) > 0
    assert all(0 < share < 1 for share in costs.shares)
    rng = random.Random(0)
    for mask in [(1 << len(units)) - 1, *(rng.getrandbits(len(units)) for _ in range(12))]:
        counted = macs(lambda mask=mask: evaluate(skips(mask)))  # type: ignore[misc]
        assert round(costs.of(skips(mask))) == counted
        assert costs.of(skips(mask)) == costs.of(skips(mask) << 1) == pytest.approx(counted, rel=1e-12)


def test_latency_takes_medians_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0

    def seconds(evaluate: object, modes: int, device: torch.device) -> float:
        nonlocal rounds
        rounds += modes == 0
        slow = 10.0 if rounds == 3 else 1.0  # one round on a busy machine
        skip, reuse = {1: 3.0, 4: 2.0, 16: 4.5}, {2: 3.5, 8: 1.6, 32: 4.5}
        return slow * {0: 4.0, **skip, **reuse}[modes]

    monkeypatch.setattr(cost, "seconds", seconds)
    warmed: list[int] = []
    costs = unit_latency(warmed.append, 3, CPU, repeats=5)
    assert warmed == [0, 1, 4, 16, 2, 8, 32]
    assert costs == UnitCosts(4.0, (0.25, 0.55, 0.0), (0.125, 0.55, 0.0))  # reuse cannot save more than skipping
    assert costs.of(0b0101) == pytest.approx(4 * (1 - 0.25 - 0.55))
    assert costs.of(0b0110) == pytest.approx(4 * (1 - 0.125 - 0.55))
