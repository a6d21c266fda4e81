"""Optuna's own tests for samplers, with and without a space."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from search_spaces import SPACES

from autodiffusion_optuna.search.sampler import AutoDiffusionSampler


class TestWithoutSpace(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: AutoDiffusionSampler(population_size=4, seed=0)


class TestWithSpace(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: AutoDiffusionSampler(SPACES["budget"], population_size=4, seed=0)


class TestWithSettings(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: AutoDiffusionSampler(SPACES["all open"], population_size=4, seed=0)
