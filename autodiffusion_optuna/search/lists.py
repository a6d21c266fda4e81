"""Lists that people have, as timesteps of a model: numbers from anywhere, tables of diffusers, files, our own JSON.

What a list may look like is in ``FORMS`` and in ``docs/lists.md``. Torch-free, but for the names of diffusers' tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autodiffusion_optuna.errors import ConfigError, choose_from, program
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.search.repair import Timesteps
from autodiffusion_optuna.search.timesteps import nearest_timesteps, resample

Kind = Literal["timesteps", "sigmas"]

FORMS = '829 649 424, [999, 850, 736], "14.6, 2.9, 0.9, 0.0", @FILE, ays:sd15, each also as NAME=LIST'
"""Examples of what is read, for messages."""
AYS = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "svd": "StableDiffusionVideo"}
"""Short name of a model -> what the names of its tables in ``diffusers.schedulers.AysSchedules`` begin with."""
ROUNDED = 0.01
"""Share by which a first sigma may lie above the model's highest: lists are printed with few digits."""
BEYOND = 1.5
"""Times the last timestep up to which a first number is rather a mistaken timestep than a sigma."""
LABEL = re.compile(r"[^\s\[\]{}()@,;:=|][^\[\]{}()@,;=|\n]{0,59}")
"""What a list may be called: it stands in tables and pictures, and in the names of files."""


@dataclass(frozen=True)
class NamedList:
    """A list of timesteps under a label. ``notes``: what was changed to make it one, a line each."""

    label: str
    timesteps: Timesteps
    notes: tuple[str, ...] = ()

    def resampled(self, schedule: NoiseSchedule, steps: int, min_gap: int = 1) -> NamedList:
        """The list at another number of steps, with a note; itself where it has as many."""
        if len(self.timesteps) == steps:
            return self
        note = f"{self.label} has {len(self.timesteps)} steps: interpolated in log-SNR to {steps}"
        return NamedList(self.label, resample(schedule, self.timesteps, steps, min_gap), (*self.notes, note))


def read_lists(texts: Iterable[str], schedule: NoiseSchedule, taken: Collection[str] = ()) -> list[NamedList]:
    """Each of ``texts`` by ``read_list``; those without a name are called "list 1", "list 2" in their order.

    ``taken``: labels that stand beside them. ``ConfigError`` for a label that occurs twice.
    """
    found: list[NamedList] = []
    for number, text in enumerate(texts, 1):
        read = read_list(text, schedule, f"list {number}")
        if read.label in taken or any(read.label == other.label for other in found):
            unnamed = _split_label(text.strip())[1]
            raise ConfigError(f"{read.label!r} is already the name of another list; name this one: NAME={unnamed}")
        found.append(read)
    return found


def read_list(text: str, schedule: NoiseSchedule, label: str = "list", source: str | None = None) -> NamedList:
    """A list as timesteps of the grid of ``schedule``.

    ``label``: its name where the text gives none. ``source``: what messages call it, by default its beginning. Sigmas
    go to the index nearest in log-SNR; a last one of 0 is where sampling ends and no step. ``ConfigError`` for what is
    no list, does not fit the grid, or could be either.
    """
    shown = source or _short(text)
    name, body = _split_label(text.strip())
    label = name or label
    if body.startswith("@"):
        path = Path(body[1:].strip())
        read = read_list(_text_of(path), schedule, path.stem, f"the list in {path.name}")
        return replace(read, label=name) if name else read
    table = _table(body)
    if table is not None:
        kind, numbers = table
        label = name or body
    elif body.startswith("{"):
        kind, numbers, study = _from_json(body, schedule, shown)
        label = name or study or label
    else:
        kind, numbers = _numbers(body, schedule, shown)
    if kind == "timesteps":
        return _from_timesteps(numbers, schedule, label, shown)
    return _from_sigmas(numbers, schedule, label, shown)


def looks_like_list(text: str) -> bool:
    """Whether a word in a study file is meant as a list rather than as the name of a baseline."""
    return bool(re.search(r"[@=:\[{]|\d[\s,;]", text)) or _table(text) is not None


# What the text says


def _split_label(text: str) -> tuple[str | None, str]:
    """(label, rest) of ``NAME=LIST``; ``timesteps=`` and ``sigmas=`` are not names but say what the numbers are."""
    head, equals, rest = text.partition("=")
    head = head.strip()
    if not equals or head in ("timesteps", "sigmas") or not LABEL.fullmatch(head):
        return None, text
    return head, rest.strip()


def _text_of(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read the list in {str(path)!r}: {reason}; write @FILE with a file of one") from None
    if text.lstrip().startswith("@"):
        raise ConfigError(f"{str(path)!r} names another file; a file of a list holds its numbers")
    return text


def _table(text: str) -> tuple[Kind, list[float]] | None:
    """A table of diffusers by its name there, or as ``ays:sd15``, ``ays:sd15-timesteps``, ``ays:sd15-sigmas``.

    None where the text is no such name; ``ConfigError`` for an unknown one. Without a kind it is the sigmas: they mean
    the same noise to every model.
    """
    begun = text.startswith("ays:")
    if not begun and not re.fullmatch(r"StableDiffusion\w*", text):
        return None
    from diffusers.schedulers import AysSchedules

    given = text.removeprefix("ays:").strip()
    model, _, kind = given.partition("-")
    name = AYS[model] + (kind or "sigmas").capitalize() if model in AYS else given
    if name not in AysSchedules:
        short = [f"{model}{kind}" for model in AYS for kind in ("", "-timesteps", "-sigmas")]
        known = [form for form in short if _full_name(form) in AysSchedules]
        raise ConfigError(choose_from("table", text, [*(f"ays:{form}" for form in known), *AysSchedules]))
    return ("timesteps" if name.endswith("Timesteps") else "sigmas"), [float(number) for number in AysSchedules[name]]


def _full_name(form: str) -> str:
    model, _, kind = form.partition("-")
    return AYS[model] + (kind or "sigmas").capitalize()


def _from_json(text: str, schedule: NoiseSchedule, shown: str) -> tuple[Kind, list[float], str | None]:
    """(kind, numbers, study) of ``{"timesteps": […]}`` or ``{"sigmas": […]}``; our exported results are the first."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{shown} is not valid JSON; give a file of {program()} export --format json") from None
    kinds: list[Kind] = ["timesteps", "sigmas"]
    kind = next((kind for kind in kinds if isinstance(data.get(kind), list)), None)
    if kind is None:
        raise ConfigError(f"{shown} has neither a list of timesteps nor one of sigmas; {_write()}")
    T = data.get("train_timesteps", schedule.T)
    if T != schedule.T:
        raise ConfigError(f"{shown} indexes {T} timesteps and the model has {schedule.T}; give its sigmas instead")
    numbers = [_number(value, shown) for value in data[kind]]
    study = data.get("study")
    return kind, numbers, study if isinstance(study, str) and LABEL.fullmatch(study) else None


def _numbers(text: str, schedule: NoiseSchedule, shown: str) -> tuple[Kind, list[float]]:
    """(kind, numbers) of numbers in words, commas or lines, in brackets or not; what they are may be said before."""
    said = re.match(r"(timesteps|sigmas)\s*[:=]", text)
    body = text[said.end() :] if said else text
    body = "\n".join(line.partition("#")[0] for line in body.splitlines()).strip(" \t\r\n,;")
    if body[:1] + body[-1:] in ("[]", "()"):
        body = body[1:-1]
    words = [word for word in re.split(r"[\s,;]+", body) if word]
    if not words:
        raise ConfigError(f"{shown} is an empty list; {_write()}")
    numbers = [_number(word, shown) for word in words]
    if said:
        return ("timesteps" if said[1] == "timesteps" else "sigmas"), numbers
    return _kind(words, numbers, schedule, shown), numbers


def _number(word: Any, shown: str) -> float:
    try:
        if isinstance(word, bool):
            raise ValueError
        number = float(word)
    except (TypeError, ValueError):
        raise ConfigError(f"{shown} holds {str(word)[:30]!r}, which is no number; {_write()}") from None
    if not math.isfinite(number) or number < 0:
        raise ConfigError(f"{shown} holds {word}; timesteps and sigmas are finite and not negative")
    return number


def _kind(words: Sequence[str], numbers: Sequence[float], schedule: NoiseSchedule, shown: str) -> Kind:
    """What numbers that do not say it are; ``ConfigError`` where they could be either.

    Written with a point, ending at 0 or far beyond the grid they look like sigmas; beginning in the upper half of the
    grid, or a little beyond it, they look like timesteps.
    """
    last, first = schedule.T - 1, numbers[0]
    pointed = any(not word.isdigit() for word in words)
    high = 0.5 * last <= first <= BEYOND * last
    whole = all(number.is_integer() for number in numbers)
    could_be_sigmas = first <= _highest(schedule) * (1 + ROUNDED)
    if first > BEYOND * last or (pointed and not high):
        return "sigmas"
    if first > last and could_be_sigmas and not whole:
        return "sigmas"
    if not pointed and (high or not could_be_sigmas or numbers[-1] != 0):
        return "timesteps"
    if pointed and not could_be_sigmas and whole:
        return "timesteps"
    raise ConfigError(
        f"{shown} could be timesteps or sigmas of this model; write timesteps: or sigmas: before the first number"
    )


# What the numbers mean on a grid


def _from_timesteps(numbers: Sequence[float], schedule: NoiseSchedule, label: str, shown: str) -> NamedList:
    """Indices of the grid; diffusers' own lists may hold fractions, which are rounded."""
    _check_descending(numbers, "timesteps", shown)
    if numbers[0] > schedule.T - 1:
        raise ConfigError(
            f"{shown} holds timestep {numbers[0]:g}; the model's are 0 to {schedule.T - 1}, or write sigmas: before "
            "the first number"
        )
    rounded = [round(number) for number in numbers]
    if len(set(rounded)) < len(rounded):
        raise ConfigError(f"{shown} has timesteps closer than 1 to each other; the model has none between")
    changed = [f"{number:g} to {t}" for number, t in zip(numbers, rounded, strict=True) if number != t]
    notes = (f"{label}: timesteps rounded to the model's: {_some(changed)}",) if changed else ()
    return NamedList(label, tuple(rounded), notes)


def _from_sigmas(numbers: Sequence[float], schedule: NoiseSchedule, label: str, shown: str) -> NamedList:
    """Indices nearest in log-SNR: sigma / alpha of eps and v models, s in (0, 1] of flows."""
    sigmas = list(numbers[:-1]) if numbers[-1] == 0 else list(numbers)
    if not sigmas:
        raise ConfigError(f"{shown} is an empty list: a sigma of 0 is where sampling ends; {_write()}")
    _check_descending(sigmas, "sigmas", shown)
    flow, highest = _is_flow(schedule), _highest(schedule)
    allowed = 1.0 if flow else highest * (1 + ROUNDED)
    if sigmas[0] > allowed:
        raise ConfigError(
            f"{shown} holds {sigmas[0]:g}, above the model's highest sigma, {allowed if flow else highest:.6g}, and "
            f"its timesteps are 0 to {schedule.T - 1}; give a list for such a model"
        )
    if len(sigmas) > schedule.T:
        raise ConfigError(f"{shown} has {len(sigmas)} sigmas, more than the model has timesteps ({schedule.T})")
    wanted = np.array([_log_level(sigma, flow) for sigma in sigmas])
    # No signal at all is not on the grid; its nearest index is the last.
    reachable = np.minimum(wanted, -schedule.lambdas[-1])
    timesteps = nearest_timesteps(schedule, reachable)
    return NamedList(label, timesteps, _moved(sigmas, wanted, timesteps, schedule, label))


def _moved(
    sigmas: Sequence[float], wanted: Any, timesteps: Timesteps, schedule: NoiseSchedule, label: str
) -> tuple[str, ...]:
    """A note of the sigmas that are further than half a step of the grid from what they became."""
    levels, moved = -schedule.lambdas, []
    for sigma, level, t in zip(sigmas, wanted, timesteps, strict=True):
        toward = t + 1 if level > levels[t] else t - 1
        beside = min(max(toward, 0), schedule.T - 1)
        if beside == t:  # beyond an end: measured by the step that leads there
            beside = t - 1 if t else 1
        if abs(level - levels[t]) > abs(levels[beside] - levels[t]) / 2 * (1 + 1e-9):
            moved.append(f"{sigma:g} to {_level(schedule, t):.4g} (timestep {t})")
    return (f"{label}: sigmas that the model's grid lacks were moved: {_some(moved)}",) if moved else ()


def _check_descending(numbers: Sequence[float], kind: Kind, shown: str) -> None:
    for before, after in pairwise(numbers):
        if after >= before:
            how = "reverse it" if list(numbers) == sorted(set(numbers)) else "leave out what is wrong"
            raise ConfigError(f"{shown}: {kind} must descend, and {after:g} comes after {before:g}; {how}")


def _is_flow(schedule: NoiseSchedule) -> bool:
    """Whether other programs mean s = sigma by a sigma, and not sigma / alpha."""
    return bool(np.allclose(schedule.alphas + schedule.sigmas, 1.0, rtol=0, atol=1e-9))


def _log_level(sigma: float, flow: bool) -> float:
    """log(sigma / alpha); infinite without signal."""
    if not flow:
        return math.log(sigma)
    return math.inf if sigma == 1 else math.log(sigma / (1 - sigma))


def _level(schedule: NoiseSchedule, t: int) -> float:
    """The sigma at an index, as other programs mean it."""
    sigma = float(schedule.sigmas[t])
    return sigma if _is_flow(schedule) else sigma / float(schedule.alphas[t])


def _highest(schedule: NoiseSchedule) -> float:
    return _level(schedule, schedule.T - 1)


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more


def _short(text: str) -> str:
    """A list as messages show it: one line, not all of it."""
    line = " ".join(text.split())
    return f"list '{line[:60]}{'…' if len(line) > 60 else ''}'"


def _write() -> str:
    return f"write, for example, {FORMS}"
