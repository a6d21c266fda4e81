"""Every setting of the official code on every golden list."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from solver_runs import FACTS, LISTS, MIXTURE, SCHEDULE, TENSORS, difference, nodes_only, run

from autodiffusion_optuna.evaluation.solvers import times
from autodiffusion_optuna.noise import Final

# Golden setting -> solver.
SETTINGS: dict[str, str] = {
    "ddim_one": "ddim",
    "ddim_alpha0": "ddim",
    "plms_compvis_alpha0": "plms",
    "dpmpp_2m_alpha0": "dpmpp_2m",
    "dpmpp_3m_alpha0": "dpmpp_3m",
    "dpmpp_2m_one_lof0": "dpmpp_2m",
    "dpmpp_3m_one_lof0": "dpmpp_3m",
    "dpm_2m_alpha0": "dpm_solver_2",
    "dpmpp_2s_list_alpha0": "dpmpp_2s",
    "dpm_2s_list_alpha0": "dpm_solver_2s",
    "dpmpp_2s_mid_alpha0": "dpmpp_2s_mid",
    "unipc_bh2_2_alpha0": "unipc_2",
    "unipc_bh2_3_alpha0": "unipc_3",
    "heun_one": "heun",
    "heun_alpha0": "heun",
}
NOT_OURS = {"dpmpp_2m_one_lof1", "dpmpp_3m_one_lof1"}  # the order falls at sigma = 0 as well, which no solver here does
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in FACTS["cases"] if case["solver"] not in NOT_OURS}


def test_all_settings_and_lists_are_here() -> None:
    assert set(SETTINGS) | NOT_OURS == set(FACTS["solvers"])
    assert set(CASES) == {f"{name}.{setting}" for name in LISTS for setting in SETTINGS}


def test_the_mixture_is_the_golden_one() -> None:
    for t, expected in zip(TENSORS["probe.t"].tolist(), TENSORS["probe.eps"], strict=True):
        x, alpha, sigma = TENSORS["probe.x"], SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        assert difference((x - alpha * MIXTURE.x0(x, alpha, sigma)) / sigma, expected) < 1e-12


@pytest.mark.parametrize("name", sorted(LISTS))
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_nodes_equal_the_golden_ones(name: str, final: Final) -> None:
    nodes = times(SCHEDULE, LISTS[name], final)
    prefix = f"{name}.nodes_{'one' if final == 'zero' else 'alpha0'}"
    np.testing.assert_allclose(nodes.alpha, TENSORS[f"{prefix}.alpha"], rtol=1e-13)
    np.testing.assert_allclose(nodes.sigma, TENSORS[f"{prefix}.sigma"], rtol=1e-12)
    assert nodes.lam[0] == pytest.approx(SCHEDULE.lambda_(LISTS[name][0]), rel=1e-12)
    assert np.isinf(nodes.lam[-1]) == (final == "zero")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_state_equals_the_official_code(case: str, dtype: torch.dtype, tolerance: float) -> None:
    solver = SETTINGS[CASES[case]["solver"]]
    final: Final = "zero" if CASES[case]["final"] == "one" else "sigma_min"
    asked, states = run(solver, LISTS[CASES[case]["list"]], final, TENSORS["x_T"].to(dtype))
    np.testing.assert_allclose(asked, CASES[case]["evaluation_times"], rtol=1e-12)
    assert states[-1].dtype == dtype
    golden = TENSORS[f"{case}.states"]
    if dtype == torch.float32 and solver == "dpm_solver_2s":
        tolerance = 1e-4  # over few long steps, a state in noise and signal apart cancels all but its last digits
    assert difference(states[-1], golden[-1]) < tolerance
    if solver.startswith("unipc"):
        return  # golden states are the corrected ones, at which the network is never asked
    for state, expected in zip(nodes_only(solver, states), golden, strict=True):
        assert difference(state, expected) < tolerance
