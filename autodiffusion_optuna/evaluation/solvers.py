"""Samplers, each a function of (denoise, x, times).

A solver asks ``denoise`` for the clean image at its noisy states, in order, and combines states and answers
linearly. Everything else a run needs (which units are skipped, what is cached, what is counted) lives
inside ``denoise``. Coefficients are float64 on the host; the state keeps the dtype of ``x``. No solver writes
into a tensor it was given.

States are ``x = alpha x0 + sigma eps``. Between nodes s and t, with x0 or eps held constant,

    x_t = (sigma_t / sigma_s) x_s + (alpha_t - alpha_s sigma_t / sigma_s) x0
        = (alpha_t / alpha_s) x_s + (sigma_t - sigma_s alpha_t / alpha_s) eps.

Both are exact where x0 or eps stands for its mean over the step, in alpha / sigma or in sigma / alpha. A higher
order is a better mean: a row of weights with sum 1 over the answers at hand, most of them the means of Lagrange
polynomials (``solver_weights``). What sets solvers apart is the answer they weigh (x0 or eps), the coordinate of
the polynomials (lambda = log(alpha / sigma), rho = sigma / alpha, or t) and where they ask.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError, choose_from
from autodiffusion_optuna.evaluation.solver_weights import (
    LIMIT,
    Rule,
    StepWeights,
    exact_by_data,
    exact_by_noise,
    exact_or_mean,
    half,
    half_or_exact,
    highest,
    lagrange,
    published_by_data,
    published_by_noise,
    rows,
)
from autodiffusion_optuna.noise import Final, NoiseSchedule, linear

Denoise = Callable[[Tensor, float], Tensor]
"""(x float [B, ...], time index t) -> expected clean image, of x's shape and dtype."""


# Nodes


class Node(NamedTuple):
    """A point of a run: time index, signal level, noise level."""

    t: float
    alpha: float
    sigma: float


@dataclass(frozen=True)
class Times:
    """The nodes of one sampling run: K timesteps, then the final point.

    ``timesteps``: K time indices, strictly descending (a fraction lies between two indices).
    ``alpha``, ``sigma``, ``lam``: K + 1 floats, levels and log(alpha / sigma) at the timesteps and the final
    point; ``lam`` ends in infinity where sigma ends in 0.
    ``schedule``: what the levels were taken from.
    """

    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    lam: tuple[float, ...]
    schedule: NoiseSchedule

    @property
    def steps(self) -> int:
        """K, the number of timesteps."""
        return len(self.timesteps)

    @property
    def rho(self) -> tuple[float, ...]:
        """sigma / alpha at the K + 1 nodes."""
        return tuple(s / a for a, s in zip(self.alpha, self.sigma, strict=True))

    def time(self, node: int) -> float:
        """Time index of a node; the final point counts as index 0."""
        return self.timesteps[node] if node < self.steps else 0

    def node(self, node: int) -> Node:
        """Node 0 to K."""
        return Node(self.time(node), self.alpha[node], self.sigma[node])

    def middle(self, node: int) -> Node:
        """The point halfway in lambda from ``node`` to the next, whose sigma is not 0; its time is a fraction."""
        t = _time_between(self.schedule, self.time(node), self.time(node + 1))
        return Node(t, self.schedule.alpha(t), self.schedule.sigma(t))


def times(schedule: NoiseSchedule, timesteps: Sequence[float], final: Final) -> Times:
    """Nodes of ``timesteps`` (strictly descending, in [0, T - 1]) on ``schedule``.

    ``final``: ``"zero"`` ends at alpha = 1, sigma = 0; ``"sigma_min"`` ends at index 0 of the schedule.
    ``ConfigError`` where the list is empty, not descending or leaves the schedule, or ``final`` is unknown.
    """
    listed = tuple(timesteps)
    if not listed or any(s <= t for s, t in itertools.pairwise(listed)):
        raise ConfigError(f"timesteps must be strictly descending and not empty, got {list(listed)}")
    if listed[0] > schedule.T - 1 or listed[-1] < 0:
        raise ConfigError(f"timesteps must lie in [0, {schedule.T - 1}], got {listed[0]} to {listed[-1]}")
    if final not in ("zero", "sigma_min"):
        raise ConfigError(choose_from("final", final, ["zero", "sigma_min"]))
    end = (1.0, 0.0) if final == "zero" else (schedule.alpha(0), schedule.sigma(0))
    alpha = (*(schedule.alpha(t) for t in listed), end[0])
    sigma = (*(schedule.sigma(t) for t in listed), end[1])
    lam = tuple(math.log(a / s) if s > 0 else math.inf for a, s in zip(alpha, sigma, strict=True))
    return Times(listed, alpha, sigma, lam, schedule)


@lru_cache(maxsize=4096)
def _time_between(schedule: NoiseSchedule, high: float, low: float) -> float:
    """Time index halfway in lambda from index ``high`` to ``low``, by bisection to the last bit."""
    target = (schedule.lambda_(high) + schedule.lambda_(low)) / 2
    k = int(np.searchsorted(-schedule.lambdas, -target, side="right").clip(1, schedule.T - 1)) - 1
    pair = slice(k, k + 2)  # the two indices around it; a schedule of two is quick to read
    near = NoiseSchedule(schedule.alphas[pair], schedule.sigmas[pair], schedule.model_times[pair])
    low, high = max(low, k), min(high, k + 1)
    while low < (t := (low + high) / 2) < high:
        low, high = (t, high) if near.lambda_(t - k) > target else (low, t)
    return t


Solver = Callable[[Denoise, Tensor, Times], Tensor]


# Moves


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of coefficient * tensor, in a new tensor."""
    (coefficient, tensor), *rest = terms
    total = coefficient * tensor
    for coefficient, tensor in rest:
        total = total + coefficient * tensor
    return total


def _weighted(row: StepWeights, history: Sequence[Tensor]) -> Tensor:
    """The newest answers weighed by ``row``; older ones than it has weights for are left out."""
    return _combine(*zip(row, history, strict=False))


def _noise(x: Tensor, x0: Tensor, here: Node) -> Tensor:
    """eps of the state ``x`` whose clean image is ``x0``."""
    return _combine((1 / here.sigma, x), (-here.alpha / here.sigma, x0))


def _move_by_data(x: Tensor, x0: Tensor, here: Node, there: Node) -> Tensor:
    """State at ``there``, with the clean image constant in between."""
    ratio = there.sigma / here.sigma
    return _combine((ratio, x), (there.alpha - ratio * here.alpha, x0))


def _move_by_noise(x: Tensor, noise: Tensor, here: Node, there: Node) -> Tensor:
    """State at ``there``, with the noise constant in between."""
    ratio = there.alpha / here.alpha
    return _combine((ratio, x), (there.sigma - ratio * here.sigma, noise))


class Form(NamedTuple):
    """What a solver weighs: how it follows from (x, x0, node), and how it moves a state between two nodes."""

    answer: Callable[[Tensor, Tensor, Node], Tensor]
    move: Callable[[Tensor, Tensor, Node, Node], Tensor]


DATA = Form(lambda x, x0, here: x0, _move_by_data)
NOISE = Form(_noise, _move_by_noise)


# One step after the other


def ddim(
    denoise: Denoise, x: Tensor, times: Times, eta: float = 0.0, noise: Callable[[int], Tensor] | None = None
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 and 16). K evaluations, first order.

    ``eta`` in (0, 1] adds noise: step i adds ``noise(i)``, standard normal of x's shape and dtype, times
    ``eta sigma_t sqrt(1 - exp(-2 h))`` with h the step in lambda, eq. 16 for any schedule. 1 is DDPM's sampler.
    A step that ends at sigma = 0 adds none.
    """
    for i, t in enumerate(times.timesteps):
        here, there = times.node(i), times.node(i + 1)
        x0 = denoise(x, t)
        added = eta * there.sigma * math.sqrt(-math.expm1(-2 * (times.lam[i + 1] - times.lam[i])))
        if added == 0:
            x = _move_by_data(x, x0, here, there)
        else:
            assert noise is not None
            ratio = math.sqrt(there.sigma**2 - added**2) / here.sigma
            x = _combine((ratio, x), (there.alpha - ratio * here.alpha, x0), (added, noise(i)))
    return x


def heun(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
    """Heun's method in sigma / alpha (arXiv 2206.00364, algorithm 1). Second order.

    2K - 1 evaluations with ``final="zero"``, whose last step is Euler's; 2K with ``"sigma_min"``, the last at
    index 0.
    """
    for i, t in enumerate(times.timesteps):
        here, there = times.node(i), times.node(i + 1)
        x0 = denoise(x, t)
        guess = _move_by_data(x, x0, here, there)
        if there.sigma == 0:
            return guess
        before = _noise(x, x0, here)
        ahead = _noise(guess, denoise(guess, there.t), there)
        x = _move_by_noise(x, _combine((0.5, before), (0.5, ahead)), here, there)
    return x


def dpmpp_2s_mid(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
    """DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1), inner points halfway in lambda. Second order.

    2K - 1 evaluations with ``final="zero"``, whose last step is first order; 2K with ``"sigma_min"``. Every second one
    is at a time between two of the list.
    """
    for i, t in enumerate(times.timesteps):
        here, there = times.node(i), times.node(i + 1)
        x0 = denoise(x, t)
        if there.sigma > 0:
            inner = times.middle(i)
            x0 = denoise(_move_by_data(x, x0, here, inner), inner.t)
        x = _move_by_data(x, x0, here, there)
    return x


def _singlestep(denoise: Denoise, x: Tensor, times: Times, *, form: Form) -> Tensor:
    """Second order in K / 2 steps: from the first node of each pair of the list over the second to the third.

    First order where no pair is left, and over a pair that would end at sigma = 0.
    """
    nodes = iter(range(times.steps))
    for i in nodes:
        here, inner = times.node(i), times.node(i + 1)
        first = form.answer(x, denoise(x, here.t), here)
        guess = form.move(x, first, here, inner)
        if i + 1 == times.steps or times.sigma[i + 2] == 0:
            x = guess
            continue
        second = form.answer(guess, denoise(guess, inner.t), inner)
        row = highest(half, times.lam[i : i + 2], times.lam[i], times.lam[i + 2], LIMIT)
        x = form.move(x, _weighted(row, (first, second)), here, times.node(i + 2))
        next(nodes)
    return x


# Multistep


def _multistep(denoise: Denoise, x: Tensor, times: Times, rows: Sequence[StepWeights], form: Form) -> Tensor:
    """One evaluation a step; step i weighs the newest answers with ``rows[i]``."""
    history: list[Tensor] = []
    for i, (t, row) in enumerate(zip(times.timesteps, rows, strict=True)):
        here, there = times.node(i), times.node(i + 1)
        history = [form.answer(x, denoise(x, t), here), *history[:3]]
        x = form.move(x, _weighted(row, history), here, there)
    return x


def _in_lambda(order: int, rule: Rule, form: Form, cap: float = LIMIT) -> Solver:
    """Multistep in lambda, the order rising from 1 and falling again as the authors' code has it.

    To 1 for a last step to sigma = 0, where lambda is infinite and the last answer is the image; by one a step at the
    end of fewer than 10 steps that end above it. ``cap``: largest sum of the magnitudes of a step's weights.
    """

    def solve(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
        finite = times.steps - (times.sigma[-1] == 0)
        lower = times.sigma[-1] > 0 and times.steps < 10
        rising = (min(order, i + 1, finite - i if lower else order) for i in range(finite))
        orders = [*rising, *[1] * (times.steps - finite)]
        return _multistep(denoise, x, times, rows(times.lam, orders, rule, cap), form)

    return solve


def _adams_bashforth(coordinate: Callable[[Times], Sequence[float]], cap: float = LIMIT) -> Solver:
    """Multistep of order 4, rising from 1, over the noise in a coordinate of the K + 1 nodes."""

    def solve(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
        orders = [min(4, i + 1) for i in range(times.steps)]
        return _multistep(denoise, x, times, rows(coordinate(times), orders, lagrange, cap), NOISE)

    return solve


ADAMS_BASHFORTH: tuple[StepWeights, ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
    """Pseudo linear multistep as in latent diffusion (PNDM, arXiv 2202.09778). K + 1 evaluations.

    The weights are those of evenly spaced timesteps whatever the list, as in the published code. The first
    step averages the noise at both of its ends; a single step has no second end on the list and is DDIM's.
    """
    history: list[Tensor] = []
    for i, t in enumerate(times.timesteps):
        here, there = times.node(i), times.node(i + 1)
        x0 = denoise(x, t)
        history = [_noise(x, x0, here), *history[:3]]
        if i == 0 and times.steps > 1:
            guess = _move_by_data(x, x0, here, there)
            ahead = _noise(guess, denoise(guess, there.t), there)
            noise = _combine((0.5, history[0]), (0.5, ahead))
        else:
            noise = _combine(*zip(ADAMS_BASHFORTH[len(history) - 1], history, strict=True))
        x = _move_by_noise(x, noise, here, there)
    return x


def _unipc(denoise: Denoise, x: Tensor, times: Times, *, order: int) -> Tensor:
    """UniPC, variant B2, predicting clean images (arXiv 2302.04867, algorithm 1).

    At each node, the step that led there is taken again with the answer found there; nothing is asked twice.
    Orders rise from 1 and fall to 1 at the end whatever the number of steps, as in the authors' code.
    """
    history: list[Tensor] = []
    before = x
    for i, t in enumerate(times.timesteps):
        here, there = times.node(i), times.node(i + 1)
        history = [denoise(x, t), *history[:order]]
        if i > 0:
            known = min(order, i, times.steps - i + 1)  # the order with which the step was predicted
            points = times.lam[i - known : i + 1][::-1]
            row = highest(exact_or_mean, points, times.lam[i - 1], times.lam[i], LIMIT)
            x = _move_by_data(before, _weighted(row, history), times.node(i - 1), here)
        points = times.lam[max(0, i + 1 - min(order, times.steps - i)) : i + 1][::-1]
        row = highest(half_or_exact, points, times.lam[i], times.lam[i + 1], LIMIT)
        before = x
        x = _move_by_data(x, _weighted(row, history), here, there)
    return x


# By name

CAPPED: dict[str, Callable[..., Solver]] = {
    "lms": partial(_adams_bashforth, lambda times: times.rho),
    "plms_ab": partial(_adams_bashforth, lambda times: [*times.timesteps, 0.0]),
    "deis_2": partial(_in_lambda, 2, exact_by_noise, NOISE),
    "deis_3": partial(_in_lambda, 3, exact_by_noise, NOISE),
}
"""Solvers that take a cap on their amplification, by it."""

CAP = 8.0
"""Default cap of ``plms_ab``, a little above the 6.7 of evenly spaced steps; uneven ones come to hundreds."""

SOLVERS: dict[str, Solver] = {
    "ddim": ddim,
    "euler": _in_lambda(1, exact_by_noise, NOISE),  # DDIM but for rounding
    "heun": heun,
    "lms": CAPPED["lms"](),  # of k-diffusion, in rho
    "plms": plms,
    # plms with the true weights of the list, in t: second order, since they average over t what is integrated over rho
    "plms_ab": CAPPED["plms_ab"](cap=CAP),
    # DPM-Solver (arXiv 2206.00927): multistep as in the authors' code, singlestep as algorithm 4
    "dpm_solver_2": _in_lambda(2, published_by_noise, NOISE),
    "dpm_solver_3": _in_lambda(3, published_by_noise, NOISE),
    "dpm_solver_2s": partial(_singlestep, form=NOISE),
    # DPM-Solver++ (arXiv 2211.01095): algorithm 1 over the nodes of the list, and halfway in lambda; algorithm 2
    "dpmpp_2s": partial(_singlestep, form=DATA),
    "dpmpp_2s_mid": dpmpp_2s_mid,
    "dpmpp_2m": _in_lambda(2, published_by_data, DATA),
    # Its second difference has half the weight of the exact integral, which leaves it second order; at few steps
    # it often does better than the exact one all the same. dpm_solver_3 is the same in this.
    "dpmpp_3m": _in_lambda(3, published_by_data, DATA),
    "dpmpp_3m_exact": _in_lambda(3, exact_by_data, DATA),
    "unipc_2": partial(_unipc, order=2),
    "unipc_3": partial(_unipc, order=3),
    # DEIS, polynomials in log rho (arXiv 2204.13902, eq. 15)
    "deis_2": CAPPED["deis_2"](),
    "deis_3": CAPPED["deis_3"](),
}
"""Name -> solver. All take K evaluations but heun, plms and dpmpp_2s_mid."""

ORDERS: dict[str, dict[int, str]] = {
    "dpm_solver": {2: "dpm_solver_2", 3: "dpm_solver_3"},
    "dpmpp": {2: "dpmpp_2m", 3: "dpmpp_3m"},
    "unipc": {2: "unipc_2", 3: "unipc_3"},
    "deis": {2: "deis_2", 3: "deis_3"},
}
"""Family -> order -> registered solver."""


def solver_names(name: str, order: int | None) -> str:
    """The registered name of a solver, or of a family at one of its orders; None is its lowest.

    >>> solver_names("deis", 3)
    'deis_3'

    ``ConfigError`` for an unknown name, an order the family lacks, or an order given to a single solver.
    """
    if name in ORDERS:
        orders = ORDERS[name]
        if order is not None and order not in orders:
            raise ConfigError(f"solver {name!r} has no order {order}; choose from {', '.join(map(str, orders))}")
        return orders[order or min(orders)]
    if name not in SOLVERS:
        raise ConfigError(choose_from("solver", name, [*SOLVERS, *ORDERS]))
    if order is not None:
        raise ConfigError(
            f"solver {name!r} takes no order, got {order}; leave it out or name one of {', '.join(sorted(ORDERS))}"
        )
    return name


def find_solver(
    name: str, *, eta: float = 0.0, noise: Callable[[int], Tensor] | None = None, cap: float | None = None
) -> Solver:
    """The solver of that name, ``SOLVERS[name]`` itself where nothing else is given.

    ``eta`` in [0, 1]: share of added noise, ``ddim`` only; ``noise(i)``, as there, must depend on nothing that a cached
    run would not share. ``cap``, at least 1: largest sum of a step's weights' magnitudes, for those in ``CAPPED``.
    ``ConfigError`` for an unknown solver and for a setting it does not have.
    """
    if name not in SOLVERS:
        raise ConfigError(choose_from("solver", name, SOLVERS))
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta must lie in [0, 1], got {eta}")
    if eta > 0 and name != "ddim":
        raise ConfigError(f"solver {name!r} adds no noise, got eta = {eta}; leave it at 0 or use 'ddim'")
    if eta > 0 and noise is None:
        raise ConfigError(f"eta = {eta} needs noise for every step; give it, or leave eta at 0")
    if cap is not None and name not in CAPPED:
        raise ConfigError(
            f"solver {name!r} has no cap, got {cap}; leave it out or use one of {', '.join(sorted(CAPPED))}"
        )
    if cap is not None and not cap >= 1:
        raise ConfigError(f"cap must be at least 1, the amplification of a first-order step, got {cap}")
    if eta > 0:
        return partial(ddim, eta=eta, noise=noise)
    return SOLVERS[name] if cap is None else CAPPED[name](cap=cap)


@cache
def query_steps(solver: str, steps: int, final: Final) -> tuple[int, ...]:
    """The step, in [0, steps), to which each network evaluation of a run belongs, in order; see ``step_of``.

    Found by running the solver once on a single number, so it cannot disagree with the solver. ``ConfigError``
    for an unknown solver.
    """
    nodes = times(linear(steps + 1), range(steps, 0, -1), final)
    asked: list[float] = []

    def record(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    find_solver(solver)(record, torch.zeros(1, 1, 1, 1, dtype=torch.float64), nodes)
    return tuple(step_of(nodes.timesteps, t) for t in asked)


def evaluations(solver: str, steps: int, final: Final) -> int:
    """Network evaluations of a run of ``steps`` steps. ``ConfigError`` for an unknown solver."""
    return len(query_steps(solver, steps, final))


def step_of(timesteps: Sequence[float], t: float) -> int:
    """The step to which a query at time index ``t`` belongs.

    ``timesteps``: strictly descending. A time between two of the list belongs to the step that crosses it, a time
    below all, such as the final index 0, to the last step.

    >>> [step_of((50, 20), t) for t in (50, 33.3, 20, 0)]
    [0, 0, 1, 1]
    """
    return max(0, bisect.bisect_right(timesteps, -t, key=lambda s: -s) - 1)
