import numpy as np
import pytest
import torch

from autodiffusion_optuna.config import SEARCH_BANK
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.seeds import Bank, Draw

SHAPE = (1, 4, 4)


def test_noise_is_float32_of_the_asked_images() -> None:
    noise = Bank(0, SEARCH_BANK, SHAPE).noise(3, 8)
    assert noise.shape == (5, *SHAPE)
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"


def test_noise_does_not_depend_on_batches_or_order() -> None:
    bank = Bank(7, 0, SHAPE)
    whole = bank.noise(0, 10)
    parts = {start: bank.noise(start, start + size) for start, size in ((6, 4), (2, 4), (0, 2))}
    assert torch.equal(whole, torch.cat([parts[start] for start in sorted(parts)]))
    assert bank.noise(4, 4).shape == (0, *SHAPE)


def test_noise_of_an_image_is_pinned() -> None:
    expected = np.random.default_rng([7, 1, 42]).standard_normal(SHAPE, dtype=np.float32)
    np.testing.assert_array_equal(Bank(7, 1, SHAPE).noise(42, 43)[0].numpy(), expected)


def test_seeds_banks_and_images_share_no_noise() -> None:
    rows = torch.cat([Bank(seed, bank, SHAPE).noise(0, 50) for seed in (0, 1) for bank in (0, 1, 2)])
    assert len({row.numpy().tobytes() for row in rows}) == 300


def test_noise_is_standard_normal() -> None:
    noise = Bank(0, 0, SHAPE).noise(0, 2000)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


@pytest.mark.parametrize(("seed", "bank"), [(-1, 0), (2**32, 0), (0, -1), (0, 2**32)])
def test_values_out_of_range_are_refused(seed: int, bank: int) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        Bank(seed, bank, SHAPE)


@pytest.mark.parametrize("draw", ["balanced", "random"])
def test_conditions_do_not_depend_on_batches_and_are_in_range(draw: Draw) -> None:
    bank = Bank(3, 1, SHAPE)
    whole = bank.conditions(0, 50, 7, draw)
    assert [c for start in range(0, 50, 9) for c in bank.conditions(start, min(start + 9, 50), 7, draw)] == whole
    assert set(whole) == set(range(7))
    assert whole != Bank(3, 2, SHAPE).conditions(0, 50, 7, draw)
    assert whole != Bank(4, 1, SHAPE).conditions(0, 50, 7, draw)


def test_balanced_conditions_have_each_once_a_row_in_new_orders() -> None:
    drawn = Bank(0, 0, SHAPE).conditions(0, 40, 10)
    rows = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(row) == list(range(10)) for row in rows)
    assert len({tuple(row) for row in rows}) == 4


def test_step_noise_is_its_own_and_does_not_depend_on_batches() -> None:
    bank = Bank(7, 0, SHAPE)
    steps = [bank.step_noise(0, 4, step) for step in range(3)]
    assert torch.equal(bank.step_noise(2, 4, 1), steps[1][2:])
    rows = torch.cat([bank.noise(0, 4), *steps])
    assert len({row.numpy().tobytes() for row in rows}) == 16
