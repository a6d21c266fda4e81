"""Timesteps computed from a teacher: OptimalSteps and GITS.

Both ask which points of the teacher's grid a run of few DDIM steps should visit, and answer by a dynamic programme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.drawing import ImageSampler
from autodiffusion_optuna.evaluation.solvers import DATA, Node, times
from autodiffusion_optuna.evaluation.teacher import Teacher

Timesteps = tuple[int, ...]


@dataclass(frozen=True)
class OptimalSteps:
    """Lists of timesteps, strictly descending, by their number of steps.

    ``errors``: of each, the mean squared distance of where its run ends to where the teacher's does, over all numbers
    of all images. ``evaluations``: of the network, counted by image, without the teacher's.
    """

    lists: dict[int, Timesteps]
    errors: dict[int, float]
    evaluations: int


def optimal_steps(sampler: ImageSampler, teacher: Teacher, fewest: int, most: int) -> OptimalSteps:
    """OptimalSteps (OSS, arXiv 2503.21774), one list for all images, of each number of steps ``fewest`` to ``most``.

    A student starts at any point of the grid, from the bare noise as candidates do. Its k-th step leads from the state
    that it has at each point to all points below, and each of those keeps the state that is nearest to the teacher's
    there, in the mean over the images. A list of k steps is the way to the point from which the k-th step ends nearest
    to the teacher. It is not proven to be the best, since a point keeps one state alone; its error is exact.

    ``sampler``: the one that ``teacher`` was made with. ``ConfigError`` where the grid has too few points.
    """
    points, nodes = len(teacher.timesteps), _nodes(sampler, teacher)
    _check_steps(points, fewest, most)
    states, denoised = teacher.states[:1].repeat(points, 1, 1, 1, 1), torch.zeros_like(teacher.states)
    lists, errors, ways = dict[int, Timesteps](), dict[int, float](), list[dict[int, int]]()
    for step in range(1, most + 1):
        begins = _begins(step, points, fewest)
        _denoise(sampler, teacher, states, denoised, begins)
        distances = _squared_distances(states, denoised, teacher, nodes, begins).sum(2)
        if step >= fewest:
            last = int(distances[:, -1].argmin())
            lists[step] = _timesteps(teacher, last, ways)
            errors[step] = float(distances[last, -1]) / teacher.end.numel()
        if step < most:
            ways.append({point: int(distances[:, point].argmin()) for point in _begins(step + 1, points, fewest)})
            for point, before in sorted(ways[-1].items(), reverse=True):  # what comes from above is still there
                states[point] = DATA.move(states[before], denoised[before], nodes[before], nodes[point])
    return OptimalSteps(lists, errors, teacher.count * count_evaluations(points, fewest, most))


def count_evaluations(points: int, fewest: int, most: int) -> int:
    """Network evaluations for an image that ``optimal_steps`` makes on a grid of so many points."""
    return sum(len(_begins(step, points, fewest)) for step in range(1, most + 1))


def gits(sampler: ImageSampler, teacher: Teacher, fewest: int, most: int) -> dict[int, Timesteps]:
    """GITS (arXiv 2405.11326): a list of each number of steps ``fewest`` to ``most``, at no further evaluation.

    A step costs the distance between where it leads from the teacher's state and the teacher's state there, by its
    L2 norm in the mean over the images; a list costs the sum of its steps, all of one weight (the authors' coefficient
    is 1.0 here, and the distance plain). It begins at the grid's first point. ``sampler``: as for ``optimal_steps``.
    """
    points, nodes = len(teacher.timesteps), _nodes(sampler, teacher)
    _check_steps(points, fewest, most)
    squared = _squared_distances(teacher.states, teacher.denoised, teacher, nodes, range(points))
    cost = squared.sqrt().mean(2)
    left, ways = cost[:, -1], list[list[int]]()  # by point, what is left to pay from there to the end, and the way
    lists = dict[int, Timesteps]()
    for step in range(1, most + 1):
        if step >= fewest:
            way = [0]
            for following in reversed(ways):
                way.append(following[way[-1]])
            lists[step] = tuple(teacher.timesteps[point] for point in way)
        left, chosen = (cost[:, :-1] + left).min(1)
        ways.append(chosen.tolist())
    return lists


def _check_steps(points: int, fewest: int, most: int) -> None:
    if not 1 <= fewest <= most <= points:
        raise ConfigError(f"{fewest} to {most} steps of a grid of {points} points; give 1 to {points}")


def _nodes(sampler: ImageSampler, teacher: Teacher) -> list[Node]:
    """Those of the grid's points, and where the run ends."""
    found = times(sampler.model.schedule, teacher.timesteps, sampler.sampling.final)
    return [found.node(point) for point in range(len(teacher.timesteps) + 1)]


def _begins(step: int, points: int, fewest: int) -> range:
    """Points where a student's k-th step may begin: k - 1 are above it, and enough below for the shortest list."""
    return range(step - 1, points - max(0, fewest - step))


def _denoise(sampler: ImageSampler, teacher: Teacher, states: Tensor, denoised: Tensor, begins: Iterable[int]) -> None:
    """Write into ``denoised`` the clean images that the model sees in the ``states`` at the points ``begins``."""

    def run(first: int, last: int) -> None:
        denoise = sampler.denoiser(sampler.sampling, first, last)
        for point in begins:
            x = states[point, first:last].to(sampler.model.device)
            denoised[point, first:last] = denoise(x, teacher.timesteps[point], 0).cpu()

    for _ in sampler.by_batch(run, 0, teacher.count):
        pass


def _squared_distances(
    states: Tensor, denoised: Tensor, teacher: Teacher, nodes: list[Node], begins: Iterable[int]
) -> Tensor:
    """From where a step leads to the teacher there, float64 [points, points + 1, n]: by where it begins and ends.

    The last end is that of the run. Infinite where there is no such step.
    """
    points = len(teacher.timesteps)
    found = torch.full((points, points + 1, teacher.count), math.inf, dtype=torch.float64)
    for i in begins:
        for j in range(i + 1, points + 1):
            there = teacher.states[j] if j < points else teacher.end
            away = DATA.move(states[i], denoised[i], nodes[i], nodes[j]) - there
            found[i, j] = away.flatten(1).square().sum(1, dtype=torch.float64).nan_to_num(math.inf)
    return found


def _timesteps(teacher: Teacher, last: int, ways: list[dict[int, int]]) -> Timesteps:
    """Timesteps of the way that ends at the point ``last``; ``ways``: by step and point, the point before it."""
    way = [last]
    for before in reversed(ways):
        way.append(before[way[-1]])
    return tuple(teacher.timesteps[point] for point in reversed(way))
