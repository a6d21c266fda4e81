from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skip_masks import skips
from torch import Tensor, nn

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.evaluation.denoiser import UNCONDITIONAL, Condition, Denoiser
from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, PrefixCache, cached_denoise
from autodiffusion_optuna.evaluation.solvers import (
    CAPPED,
    SOLVERS,
    Solver,
    evaluations,
    find_solver,
    query_steps,
    times,
)
from autodiffusion_optuna.evaluation.units import find_units
from autodiffusion_optuna.noise import Final, linear

SCHEDULE = linear()
BATCH = 2
X = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def denoiser(make_unet: Callable[..., nn.Module]) -> Denoiser:
    network = make_unet()

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = network(x, model_times, return_dict=False)[0]
        return prediction

    units = find_units(network, lambda: predict(X, torch.zeros(BATCH), UNCONDITIONAL))
    return Denoiser(predict, SCHEDULE, "epsilon", torch.device("cpu"), clip=True, units=units)


def run(
    denoiser: Denoiser,
    solver: str,
    final: Final,
    candidate: Candidate,
    cache: PrefixCache | None,
    counter: NfeCounter,
) -> Tensor:
    root, queries = (solver, final, candidate.steps), evaluations(solver, candidate.steps, final)
    denoise = cached_denoise(denoiser, candidate, cache, root, counter, queries)
    return SOLVERS[solver](denoise, X, times(SCHEDULE, candidate.timesteps, final))


def mutated(candidate: Candidate, rng: random.Random, units: int) -> Candidate:
    """One timestep or one skip set changed."""
    pairs = list(candidate.pairs)
    i = rng.randrange(len(pairs))
    t, skip = pairs[i]
    if rng.random() < 0.5:
        pairs[i] = (t, skip ^ 1 << 2 * rng.randrange(units))
    else:
        pairs[i] = (rng.choice(sorted(set(range(1000)) - set(candidate.timesteps))), skip)
    return Candidate.from_pairs(pairs)


def queries_of(candidate: Candidate, solver: str, final: Final) -> list[tuple[float, int]]:
    """(time, modes) of every query of a run."""
    asked: list[float] = []

    def record(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    SOLVERS[solver](record, X, times(SCHEDULE, candidate.timesteps, final))
    steps = query_steps(solver, candidate.steps, final)
    return [(t, candidate.modes[step]) for t, step in zip(asked, steps, strict=True)]


def shared_queries(a: Candidate, b: Candidate, solver: str, final: Final) -> int:
    """Queries of ``a`` and ``b`` before their first difference."""
    both = zip(queries_of(a, solver, final), queries_of(b, solver, final), strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_caching_changes_no_bit_and_counts_right(denoiser: Denoiser, solver: str, final: Final) -> None:
    assert denoiser.units
    rng = random.Random(solver + final)
    parent = Candidate((940, 720, 430, 211, 30), tuple(skips(rng.getrandbits(12)) for _ in range(5)))
    asked = len(query_steps(solver, parent.steps, final))
    children = [mutated(parent, rng, len(denoiser.units)) for _ in range(5)]
    for child in children:
        cache, counter = PrefixCache(1 << 20), NfeCounter()
        run(denoiser, solver, final, parent, cache, counter)
        assert counter == NfeCounter(run=asked * BATCH, saved=0)
        assert cache.nbytes == (asked - 1) * X.nbytes  # of all queries but the last
        cached = run(denoiser, solver, final, child, cache, counter)
        shared = shared_queries(parent, child, solver, final)
        assert counter == NfeCounter(run=(2 * asked - shared) * BATCH, saved=shared * BATCH)
        assert torch.equal(cached, run(denoiser, solver, final, child, None, NfeCounter()))


def noise(step: int) -> Tensor:
    return torch.randn(X.shape, generator=torch.Generator().manual_seed(step))


SET: dict[str, Solver] = {
    "eta": find_solver("ddim", eta=0.7, noise=noise),
    **{f"{name}, capped": find_solver(name, cap=2.0) for name in CAPPED},
}


@pytest.mark.parametrize("name", SET)
def test_caching_changes_no_bit_of_solvers_with_settings(denoiser: Denoiser, name: str) -> None:
    rng = random.Random(name)
    cache, counter = PrefixCache(1 << 22), NfeCounter()
    candidate = Candidate((940, 720, 430, 211, 30))
    for _ in range(10):
        candidate = mutated(candidate, rng, 12)
        nodes = times(SCHEDULE, candidate.timesteps, "sigma_min")
        cached, plain = (
            SET[name](cached_denoise(denoiser, candidate, kept, name, counter), X, nodes) for kept in (cache, None)
        )
        assert torch.equal(cached, plain)
    assert counter.saved > 0


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_one_small_cache_serves_all(denoiser: Denoiser, solver: str) -> None:
    rng = random.Random(1)
    cache, counter = PrefixCache(9 * X.nbytes + 5), NfeCounter()
    candidate = Candidate((940, 720, 430, 211))
    for _ in range(8):
        candidate = mutated(candidate, rng, 12)
        expected = run(denoiser, solver, "zero", candidate, None, NfeCounter())
        assert torch.equal(run(denoiser, solver, "zero", candidate, cache, counter), expected)
        assert cache.nbytes <= cache.budget_bytes
    assert counter.saved > 0
    assert counter.run + counter.saved == 8 * len(query_steps(solver, 4, "zero")) * BATCH


@pytest.mark.parametrize(("solver", "queries"), [("ddim", 3), ("heun", 6), ("plms", 4), ("dpmpp_2s_mid", 6)])
def test_the_same_run_again_asks_for_its_last_evaluation_alone(denoiser: Denoiser, solver: str, queries: int) -> None:
    cache, counter = PrefixCache(1 << 20), NfeCounter()
    candidate = Candidate((900, 500, 100), (0, 5, 17))
    first = run(denoiser, solver, "sigma_min", candidate, cache, counter)
    again = run(denoiser, solver, "sigma_min", candidate, cache, counter)
    assert torch.equal(first, again)
    assert counter == NfeCounter(run=(queries + 1) * BATCH, saved=(queries - 1) * BATCH)
    assert len(cache) == queries - 1


def test_the_last_query_of_one_run_is_cached_as_an_inner_one_of_another() -> None:
    asked: list[float] = []

    def denoise(x: Tensor, t: float, skip: int) -> Tensor:
        asked.append(t)
        return x

    cache = PrefixCache(1 << 20)
    for timesteps in ((50,), (50, 20), (50,), (50, 30)):
        queries, nodes = len(timesteps), times(SCHEDULE, timesteps, "zero")
        SOLVERS["ddim"](cached_denoise(denoise, Candidate(timesteps), cache, queries=queries), X, nodes)
    assert asked == [50, 50, 20, 30]
    assert len(cache) == 1


def test_other_modes_and_other_roots_do_not_hit() -> None:
    calls: list[tuple[float, int]] = []

    def denoise(x: Tensor, t: float, skip: int) -> Tensor:
        calls.append((t, skip))
        return x + skip

    cache = PrefixCache(1 << 20)
    for root, modes in (("a", (0, 0)), ("a", (1, 0)), ("a", (1, 4)), ("b", (0, 0))):
        SOLVERS["ddim"](
            cached_denoise(denoise, Candidate((50, 20), modes), cache, root, NfeCounter()),
            X,
            times(SCHEDULE, (50, 20), "zero"),
        )
    # The second skip set alone differs in the third run, so its first query is cached.
    assert calls == [(50, 0), (20, 0), (50, 1), (20, 0), (20, 4), (50, 0), (20, 0)]


def test_a_query_off_the_list_takes_the_last_modes() -> None:
    asked: list[tuple[float, int]] = []

    def denoise(x: Tensor, t: float, skip: int) -> Tensor:
        asked.append((t, skip))
        return x

    nodes = times(SCHEDULE, (50, 20), "sigma_min")
    SOLVERS["heun"](cached_denoise(denoise, Candidate((50, 20), (1, 4)), None, (), NfeCounter()), X, nodes)
    assert asked == [(50, 1), (20, 4), (20, 4), (0, 4)]


@settings(deadline=None)
@given(
    budget=st.integers(0, 200),
    puts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=40),
)
def test_the_budget_is_never_exceeded(budget: int, puts: list[tuple[int, int]]) -> None:
    cache = PrefixCache(budget)
    for key, size in puts:
        cache.put((key,), torch.zeros(size))
        assert cache.nbytes <= budget
        found = [cache.get((k,)) for k in range(6)]
        assert sum(tensor.nbytes for tensor in found if tensor is not None) == cache.nbytes


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(3 * 4)
    for key in "abc":
        cache.put((key,), torch.zeros(1))
    cache.get(("a",))
    cache.put(("d",), torch.zeros(1))
    assert cache.get(("b",)) is None
    assert all(cache.get((key,)) is not None for key in "acd")
    cache.put(("whole",), torch.zeros(4))
    assert len(cache) == 3
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_view_does_not_keep_its_base_alive() -> None:
    cache = PrefixCache(1000)
    view = torch.arange(100.0)[:10]
    cache.put((), view)
    kept = cache.get(())
    assert kept is not None
    assert torch.equal(kept, view)
    assert kept.untyped_storage().nbytes() == 40
