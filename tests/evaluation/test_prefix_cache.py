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

from autodiffusion_optuna.candidate import REUSE, RUN, SKIP, Candidate, packed
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
from autodiffusion_optuna.evaluation.units import Branches, find_units, sources
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


def drawn_modes(rng: random.Random, steps: int, units: int = 12) -> tuple[int, ...]:
    """Modes that reuse much; at the first step too, where there is nothing to reuse."""
    return tuple(sum(rng.choice([RUN, RUN, SKIP, REUSE, REUSE]) << 2 * u for u in range(units)) for _ in range(steps))


def by_hand(denoiser: Denoiser, solver: str, final: Final, candidate: Candidate) -> Tensor:
    """A run that keeps every branch, and takes each from the evaluation that ``sources`` says."""
    assert denoiser.units
    units, visits = range(len(denoiser.units)), query_steps(solver, candidate.steps, final)
    of_unit = {u: sources([modes >> 2 * u & 3 for modes in candidate.modes], visits) for u in units}
    kept: list[dict[int, list[Tensor]]] = []

    def denoise(x: Tensor, t: float) -> Tensor:
        now, modes = len(kept), candidate.modes[visits[len(kept)]]
        for u in units:
            if modes >> 2 * u & 3 == REUSE and now not in of_unit[u]:
                modes ^= REUSE << 2 * u
        given = {u: kept[of_unit[u][now]][u] for u in units if now in of_unit[u]}
        branches = Branches(given, frozenset(u for u in units if not modes >> 2 * u & 3))
        x0 = denoiser(x, t, modes, branches)
        kept.append(branches.kept)
        return x0

    return SOLVERS[solver](denoise, X, times(SCHEDULE, candidate.timesteps, final))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_reuse_is_the_same_to_the_bit_with_and_without_the_cache(denoiser: Denoiser, solver: str, final: Final) -> None:
    rng = random.Random(solver + final)
    cache, counter, asked = PrefixCache(1 << 20), NfeCounter(), len(query_steps(solver, 5, final))
    timesteps = [(940, 720, 430, 211, 30), (940, 720, 430, 190, 30), (940, 720, 400, 190, 30)]
    modes = drawn_modes(rng, 5)
    for n in range(9):
        modes = (*modes[: n % 5], *drawn_modes(rng, 5 - n % 5))  # a part of the path stays
        candidate = Candidate(timesteps[n % 3], modes)
        plain = run(denoiser, solver, final, candidate, None, alone := NfeCounter())
        assert alone == NfeCounter(run=asked * BATCH, saved=0)
        assert torch.equal(plain, by_hand(denoiser, solver, final, candidate))
        assert torch.equal(run(denoiser, solver, final, candidate, cache, counter), plain)
    assert counter.saved > 0
    assert counter.run + counter.saved >= 9 * asked * BATCH  # where a branch was missing, its query is run again


def test_what_a_remembered_prefix_lacks_is_run_again_and_nothing_else(denoiser: Denoiser) -> None:
    cache, counter = PrefixCache(1 << 20), NfeCounter()
    first = Candidate((900, 600, 300, 50), (0, packed(reuses=[3]), packed(reuses=[4]), 0))
    other = Candidate((900, 600, 300, 20), first.modes)
    run(denoiser, "ddim", "zero", first, cache, counter)
    assert counter == NfeCounter(run=4 * BATCH, saved=0)
    run(denoiser, "ddim", "zero", other, cache, counter)  # only the last query is asked: it reuses nothing
    assert counter == NfeCounter(run=5 * BATCH, saved=3 * BATCH)
    late = Candidate((900, 600, 300, 20), (*first.modes[:3], packed(reuses=[4])))
    run(denoiser, "ddim", "zero", late, cache, counter)  # unit 4 last ran at the second step, which reuses unit 3
    assert counter == NfeCounter(run=(5 + 3) * BATCH, saved=6 * BATCH)


def test_branches_are_let_go_once_no_later_step_reuses_them(denoiser: Denoiser) -> None:
    held: list[int] = []
    modes = (0, packed(reuses=[3]), 0, packed(reuses=[3, 4]), packed(reuses=[4]), 0)
    denoise = cached_denoise(denoiser, Candidate((900, 700, 500, 300, 100, 20), modes))

    def counted(x: Tensor, t: float) -> Tensor:
        x0 = denoise(x, t)
        asked = denoise.__self__.asked  # type: ignore[attr-defined]
        held.append(sum(len(query.kept) for query in asked))
        return x0

    SOLVERS["ddim"](counted, X, times(SCHEDULE, (900, 700, 500, 300, 100, 20), "zero"))
    assert held == [1, 1, 2, 2, 1, 0]


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
