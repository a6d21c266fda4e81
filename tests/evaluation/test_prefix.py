from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.evaluation.denoiser import UNCONDITIONAL, Condition, Denoiser
from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, PrefixCache, cached_denoise
from autodiffusion_optuna.evaluation.skip import find_units
from autodiffusion_optuna.evaluation.solvers import CAPPED, SOLVERS, Solver, find_solver, query_steps, times
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
    memory: PrefixCache | None,
    tally: NfeCounter,
) -> Tensor:
    root = (solver, final, candidate.steps)
    denoise = cached_denoise(denoiser, candidate, memory, root, tally)
    return SOLVERS[solver](denoise, X, times(SCHEDULE, candidate.timesteps, final))


def mutated(candidate: Candidate, rng: random.Random, units: int) -> Candidate:
    """One timestep or one skip set changed."""
    pairs = list(candidate.pairs)
    i = rng.randrange(len(pairs))
    t, skip = pairs[i]
    if rng.random() < 0.5:
        pairs[i] = (t, skip ^ 1 << rng.randrange(units))
    else:
        pairs[i] = (rng.choice(sorted(set(range(1000)) - set(candidate.timesteps))), skip)
    return Candidate.from_pairs(pairs)


def queries(candidate: Candidate, solver: str, final: Final) -> list[tuple[float, int]]:
    """(time, skip set) of every query of a run."""
    asked: list[float] = []

    def record(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    SOLVERS[solver](record, X, times(SCHEDULE, candidate.timesteps, final))
    steps = query_steps(solver, candidate.steps, final)
    return [(t, candidate.skips[step]) for t, step in zip(asked, steps, strict=True)]


def shared_queries(a: Candidate, b: Candidate, solver: str, final: Final) -> int:
    """Queries of ``a`` and ``b`` before their first difference."""
    both = zip(queries(a, solver, final), queries(b, solver, final), strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_remembering_changes_no_bit_and_counts_right(denoiser: Denoiser, solver: str, final: Final) -> None:
    assert denoiser.units
    rng = random.Random(solver + final)
    parent = Candidate((940, 720, 430, 211, 30), tuple(rng.getrandbits(12) for _ in range(5)))
    asked = len(query_steps(solver, parent.steps, final))
    children = [mutated(parent, rng, len(denoiser.units)) for _ in range(5)]
    for child in children:
        memory, tally = PrefixCache(1 << 20), NfeCounter()
        run(denoiser, solver, final, parent, memory, tally)
        assert tally == NfeCounter(run=asked * BATCH, saved=0)
        remembered = run(denoiser, solver, final, child, memory, tally)
        shared = shared_queries(parent, child, solver, final)
        assert tally == NfeCounter(run=(2 * asked - shared) * BATCH, saved=shared * BATCH)
        assert memory.hits == shared
        assert torch.equal(remembered, run(denoiser, solver, final, child, None, NfeCounter()))


def noise(step: int) -> Tensor:
    return torch.randn(X.shape, generator=torch.Generator().manual_seed(step))


SET: dict[str, Solver] = {
    "eta": find_solver("ddim", eta=0.7, noise=noise),
    **{f"{name}, capped": find_solver(name, cap=2.0) for name in CAPPED},
}


@pytest.mark.parametrize("name", SET)
def test_remembering_changes_no_bit_of_solvers_with_settings(denoiser: Denoiser, name: str) -> None:
    rng = random.Random(name)
    memory, tally = PrefixCache(1 << 22), NfeCounter()
    candidate = Candidate((940, 720, 430, 211, 30))
    for _ in range(10):
        candidate = mutated(candidate, rng, 12)
        nodes = times(SCHEDULE, candidate.timesteps, "sigma_min")
        remembered, plain = (
            SET[name](cached_denoise(denoiser, candidate, kept, name, tally), X, nodes) for kept in (memory, None)
        )
        assert torch.equal(remembered, plain)
    assert tally.saved > 0


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_one_memory_under_pressure_serves_all(denoiser: Denoiser, solver: str) -> None:
    rng = random.Random(1)
    memory, tally = PrefixCache(9 * X.nbytes + 5), NfeCounter()
    candidate = Candidate((940, 720, 430, 211))
    for _ in range(8):
        candidate = mutated(candidate, rng, 12)
        expected = run(denoiser, solver, "zero", candidate, None, NfeCounter())
        assert torch.equal(run(denoiser, solver, "zero", candidate, memory, tally), expected)
        assert memory.nbytes <= memory.budget_bytes
    assert tally.saved == memory.hits * BATCH > 0
    assert tally.run + tally.saved == 8 * len(query_steps(solver, 4, "zero")) * BATCH


def test_the_same_run_again_asks_nothing_of_the_network(denoiser: Denoiser) -> None:
    memory, tally = PrefixCache(1 << 20), NfeCounter()
    candidate = Candidate((900, 500, 100), (0, 3, 5))
    first = run(denoiser, "heun", "sigma_min", candidate, memory, tally)
    again = run(denoiser, "heun", "sigma_min", candidate, memory, tally)
    assert torch.equal(first, again)
    assert tally == NfeCounter(run=6 * BATCH, saved=6 * BATCH)


def test_other_skip_sets_and_other_roots_do_not_hit() -> None:
    calls: list[tuple[float, int]] = []

    def denoise(x: Tensor, t: float, skip: int) -> Tensor:
        calls.append((t, skip))
        return x + skip

    memory = PrefixCache(1 << 20)
    for root, skips in (("a", (0, 0)), ("a", (1, 0)), ("a", (1, 2)), ("b", (0, 0))):
        SOLVERS["ddim"](
            cached_denoise(denoise, Candidate((50, 20), skips), memory, root, NfeCounter()),
            X,
            times(SCHEDULE, (50, 20), "zero"),
        )
    # The second skip set alone differs in the third run, so its first query is remembered.
    assert calls == [(50, 0), (20, 0), (50, 1), (20, 0), (20, 2), (50, 0), (20, 0)]


def test_a_query_off_the_list_takes_the_last_skip_set() -> None:
    asked: list[tuple[float, int]] = []

    def denoise(x: Tensor, t: float, skip: int) -> Tensor:
        asked.append((t, skip))
        return x

    nodes = times(SCHEDULE, (50, 20), "sigma_min")
    SOLVERS["heun"](cached_denoise(denoise, Candidate((50, 20), (1, 2)), None, (), NfeCounter()), X, nodes)
    assert asked == [(50, 1), (20, 2), (20, 2), (0, 2)]


@settings(deadline=None)
@given(
    budget=st.integers(0, 200),
    puts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=40),
)
def test_the_budget_is_never_exceeded(budget: int, puts: list[tuple[int, int]]) -> None:
    memory = PrefixCache(budget)
    for key, size in puts:
        memory.put((key,), torch.zeros(size))
        assert memory.nbytes <= budget
        found = [memory.get((k,)) for k in range(6)]
        assert sum(tensor.nbytes for tensor in found if tensor is not None) == memory.nbytes


def test_the_least_recently_used_goes_first() -> None:
    memory = PrefixCache(3 * 4)
    for key in "abc":
        memory.put((key,), torch.zeros(1))
    memory.get(("a",))
    memory.put(("d",), torch.zeros(1))
    assert memory.get(("b",)) is None
    assert all(memory.get((key,)) is not None for key in "acd")
    memory.put(("whole",), torch.zeros(4))
    assert len(memory) == 3
    memory.clear()
    assert (len(memory), memory.nbytes) == (0, 0)


def test_a_view_does_not_keep_its_base_alive() -> None:
    memory = PrefixCache(1000)
    view = torch.arange(100.0)[:10]
    memory.put((), view)
    kept = memory.get(())
    assert kept is not None
    assert torch.equal(kept, view)
    assert kept.untyped_storage().nbytes() == 40
