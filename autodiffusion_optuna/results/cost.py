"""What a search will cost at most, said before it starts: the arithmetic alone, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autodiffusion_optuna.results.pace import FLOOR_SECONDS

BOOKKEEPING = 0.1
"""Seconds that a candidate takes in the database, which only a search that runs can measure."""


@dataclass(frozen=True)
class Pace:
    """Seconds that one batch took, once everything was warm.

    ``batch``: its images. ``evaluation``: of the network. ``rest``: to decode and embed the images.
    ``distance``: of the features of one candidate. ``device``: what it was measured on.
    """

    batch: int
    evaluation: float
    rest: float
    distance: float
    device: str

    def seconds(self, evaluations: float, images: int) -> float:
        """Of one candidate of so many network evaluations an image, with nothing reused."""
        batches = math.ceil(images / self.batch)
        return batches * (evaluations * self.evaluation + self.rest) + self.distance


@dataclass(frozen=True)
class Work:
    """What a search has left to do, at most.

    ``evaluations``: of the network for an image of a candidate. ``paid``: those worth of time that the cost budget
    allows, where skipped layers must save the others. ``images``: of a candidate. ``candidates``: that are left.
    ``held_out``: candidates scored on held-out noise, on ``held_out_banks`` banks of ``held_out_images`` images each.
    ``floor``: evaluations of the floor of many steps for an image; 0 where there is none. ``finished``: candidates
    that are there already. ``finalists``: candidates scored on ``validation_images`` of the validation bank.
    ``starts``: evaluations, counted by image, that starts still to be computed take. ``screen``: those of the screen's
    teacher, which each worker runs when it begins.
    """

    evaluations: int
    paid: float
    images: int
    candidates: int
    held_out: int
    held_out_images: int
    held_out_banks: int = 1
    floor: int = 0
    finished: int = 0
    finalists: int = 0
    validation_images: int = 0
    starts: int = 0
    screen: int = 0

    @property
    def network_evaluations(self) -> int:
        """Of the network in the whole search, counted by image."""
        return self.evaluations * self.images * self.candidates + self.starts + self.screen

    def search_seconds(self, pace: Pace, parallel: int = 1) -> float:
        """Seconds of the search by ``parallel`` workers at that pace."""
        before = (self.starts + self.screen) / pace.batch * pace.evaluation
        return before + math.ceil(self.candidates / parallel) * self.candidate_seconds(pace)

    def candidate_seconds(self, pace: Pace) -> float:
        """Seconds of one candidate of the search, with what the database takes."""
        return pace.seconds(self.paid, self.images) + BOOKKEEPING

    def validation_seconds(self, pace: Pace) -> float:
        """Seconds of the finalists' scores, which one worker makes."""
        return self.finalists * pace.seconds(self.paid, self.validation_images)

    def held_out_seconds(self, pace: Pace) -> float:
        """Seconds of the scores on held-out noise, which one worker makes; the floor's where a run scores it."""
        floor = self.held_out_banks * pace.seconds(self.floor, self.held_out_images) if self.floor else 0.0
        search = (self.finished + self.candidates) * self.candidate_seconds(pace)
        candidates = self.held_out * self.held_out_banks * pace.seconds(self.paid, self.held_out_images)
        return candidates + (floor if floor <= max(FLOOR_SECONDS, search) else 0.0)


def cost_line(work: Work, pace: Pace, parallel: int = 1) -> str:
    """One line of what a search costs at most; ``parallel``: workers that share it."""
    after = f"{duration(work.held_out_seconds(pace))} of held-out scores"
    if work.finalists:
        evaluations = work.evaluations * work.validation_images * work.finalists
        after = (
            f"{duration(work.validation_seconds(pace))} of validation ({work.finalists} finalist"
            f"{'s' * (work.finalists != 1)}, {evaluations:,} network evaluations) and {after}"
        )
    if not work.candidates:
        return f"cost: no candidate is left to search, at most {after} on {pace.device}"
    product = " x ".join(
        f"{count:,} {what}{'s' * (count != 1)}"
        for count, what in ((work.evaluations, "evaluation"), (work.images, "image"), (work.candidates, "candidate"))
    )
    product += f" + {work.starts:,} of the starts" if work.starts else ""
    product += f" + {work.screen:,} of the screen's teacher" if work.screen else ""
    each = duration(work.candidate_seconds(pace))
    by = f" by {parallel} workers" if parallel > 1 else ""
    return (
        f"cost: {product} = {work.network_evaluations:,} network evaluations, at most "
        f"{duration(work.search_seconds(pace, parallel))}{by} on {pace.device} "
        f"({each} a candidate, measured on one batch; what candidates share is saved), then {after}"
    )


def duration(seconds: float) -> str:
    """Seconds in words, to two digits: ``"2.4 seconds"``, ``"12 minutes"``, ``"3.5 hours"``.

    >>> duration(754)
    '13 minutes'
    """
    for unit, size, until in (("second", 1, 100), ("minute", 60, 6000), ("hour", 3600, 172800)):
        if seconds < until:
            return _rounded(seconds / size, unit)
    return _rounded(seconds / 86400, "day")


def _rounded(number: float, unit: str) -> str:
    shown = f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"
    return f"{shown} {unit}{'' if shown == '1' else 's'}"
