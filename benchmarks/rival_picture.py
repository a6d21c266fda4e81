"""The picture of rivals.py, as SVG: held-out distance against evaluations spent, a panel a problem, a line a method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rival_curves import first_no_worse
from rival_samplers import ADOPT, EA, PAPER

from autodiffusion_optuna.report.style import BLUE, FAINT, FONT, GREEN, GRID, INK, ORANGE, PINK, RED, SKY

LINES = {
    "random": ("#98a2b3", 1.6), "NSGA-II": (PINK, 1.6), "CMA-ES": (SKY, 1.6), "GP": ("#8c6d31", 1.6),
    "TPE": (GREEN, 1.6), PAPER: (ORANGE, 1.6), EA: (RED, 2.4), ADOPT: (BLUE, 3.2),
}  # fmt: skip
"""Colour and width of each method's line, in the order of drawing."""
DOTS = {"uniform": "s", "oss": "o", "gits": "d"}
"""Lists that are shown as a mark, where they are in the result: square, circle, diamond."""
PANEL = (300, 226)
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 30, 40
COLUMNS = 3

Curves = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


@dataclass(frozen=True)
class Frame:
    """A panel's scales: logarithmic in evaluations, linear in distance."""

    x: float
    y: float
    low: float
    high: float
    bottom: float
    top: float

    def across(self, evaluations: float) -> float:
        """Pixels from the left of the picture."""
        share = math.log(max(evaluations, self.low) / self.low) / math.log(self.high / self.low)
        return self.x + LEFT + min(share, 1.0) * (PANEL[0] - LEFT - RIGHT)

    def down(self, value: float) -> float:
        """Pixels from the top of the picture."""
        share = (min(value, self.top) - self.bottom) / (self.top - self.bottom)
        return self.y + PANEL[1] - BOTTOM - share * (PANEL[1] - TOP - BOTTOM)


def draw(curves: Curves, live: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The whole picture; problems that compare ours with itself alone are left out."""
    shown = {name: lines for name, lines in curves.items() if lines and not any("adopt, " in line for line in lines)}
    cells = len(shown) + 1  # and the legend
    columns = min(COLUMNS, cells)
    width, height = columns * PANEL[0], math.ceil(cells / columns) * PANEL[1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{FONT}" font-size="11" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (name, lines) in enumerate(shown.items()):
        x, y = number % columns * PANEL[0], number // columns * PANEL[1]
        parts += panel(name, lines, live.get(name, {}), settings[name]["metric"], x, y)
    used = {method for lines in shown.values() for method in lines}
    marks = {name for name in DOTS if any(name in live.get(problem, {}) for problem in shown)}
    last = cells - 1
    parts += legend(used, marks, last % columns * PANEL[0], last // columns * PANEL[1])
    return "\n".join([*parts, "</svg>", ""])


def panel(
    name: str, lines: Mapping[str, Sequence[Sequence[float]]], live: Mapping[str, Any], metric: str, x: float, y: float
) -> Iterator[str]:
    """One problem."""
    lines = {method: line for method, line in lines.items() if line}
    marks = {dot: live[dot] for dot in DOTS if dot in live}
    frame = framed(lines, marks, x, y)
    yield from axes(frame, name, metric)
    for method, (colour, width) in LINES.items():
        if method in lines:
            yield path(frame, lines[method], colour, width)
    for dot, entry in marks.items():
        yield mark(DOTS[dot], frame.across(entry["evaluations"]), frame.down(entry["held-out median"]))
    yield from gain(frame, lines)


def framed(lines: Mapping[str, Sequence[Sequence[float]]], marks: Mapping[str, Any], x: float, y: float) -> Frame:
    """Scales that hold all lines; of distances beyond the uniform list's only so much as a margin."""
    spent = [moment for line in lines.values() for moment, _ in line]
    values = [value for line in lines.values() for _, value in line]
    values += [entry["held-out median"] for entry in marks.values()]
    top = marks["uniform"]["held-out median"] if "uniform" in marks else max(values)
    room = 0.06 * (top - min(values)) or 1.0
    return Frame(x, y, 0.8 * min(spent), 1.3 * max(spent), min(values) - room, top + room)


def axes(frame: Frame, name: str, metric: str) -> Iterator[str]:
    """Title, grid and ticks."""
    left, right = frame.across(frame.low), frame.across(frame.high)
    low, high = frame.down(frame.bottom), frame.down(frame.top)
    yield text(left, high - 12, f"{name} steps, {metric}".replace("-", ", ", 1), size=12, weight="600")
    for exponent in range(math.ceil(math.log10(frame.low)), math.floor(math.log10(frame.high)) + 1):
        at = frame.across(10**exponent)
        yield line(at, low, at, high, GRID)
        yield text(at, low + 14, said(10**exponent), FAINT, "middle")
    for value in ticks(frame.bottom, frame.top):
        yield line(left, frame.down(value), right, frame.down(value), GRID)
        yield text(left - 5, frame.down(value) + 4, f"{value:g}", FAINT, "end")
    yield line(left, low, right, low, "#98a2b3")
    yield text((left + right) / 2, low + 30, "network evaluations, times images", FAINT, "middle")


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between the two."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(digit for digit in (5, 2, 1) if (high - low) / (step * digit) >= 3)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def said(evaluations: float) -> str:
    """1k, 10k, 1M."""
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if evaluations >= size:
            return f"{evaluations / size:g}{letter}"
    return f"{evaluations:g}"


def path(frame: Frame, points: Sequence[Sequence[float]], colour: str, width: float) -> str:
    """A line in steps, with a dot where it ends."""
    first, *rest = [(frame.across(spent), frame.down(value)) for spent, value in points]
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)
    x, y = rest[-1] if rest else first
    drawn = f'<path d="M{first[0]:.1f} {first[1]:.1f}{steps}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
    return f'{drawn}<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 0.8:.1f}" fill="{colour}"/>'


def gain(frame: Frame, lines: Mapping[str, Sequence[Sequence[float]]]) -> Iterator[str]:
    """How much less ours takes to be where the published search ends."""
    if ADOPT not in lines or EA not in lines:
        return
    spent, target = lines[EA][-1]
    reach = first_no_worse([(moment, value) for moment, value in lines[ADOPT]], target)
    if reach is None:
        return
    y = frame.down(target)
    yield line(frame.across(reach), y, frame.across(spent), y, INK, "3 3")
    yield text(
        (frame.across(reach) + frame.across(spent)) / 2, y - 5, f"{spent / reach:,.0f} times less", INK, "middle", 11
    )


def mark(shape: str, x: float, y: float) -> str:
    """A list's mark."""
    if shape == "o":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="white" stroke="{INK}" stroke-width="1.6"/>'
    turned = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "d" else ""
    corner = f'x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"'
    return f'<rect {corner} fill="white" stroke="{INK}" stroke-width="1.6"{turned}/>'


def legend(methods: set[str], marks: set[str], x: float, y: float) -> Iterator[str]:
    """Ours first."""
    row = y + TOP
    for method in reversed(LINES):
        if method in methods:
            colour, width = LINES[method]
            yield line(x + LEFT, row, x + LEFT + 26, row, colour, width=width)
            yield text(x + LEFT + 34, row + 4, method, weight="600" if method == ADOPT else "400", size=12)
            row += 18
    for name in marks and [dot for dot in DOTS if dot in marks]:
        yield mark(DOTS[name], x + LEFT + 13, row)
        yield text(x + LEFT + 34, row + 4, f"{name}, no search", size=12)
        row += 18


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "", width: float = 1) -> str:
    """A straight line."""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashed}/>'


def text(
    x: float, y: float, words: str, colour: str = INK, anchor: str = "start", size: int = 11, weight: str = "400"
) -> str:
    """A line of letters."""
    style = f'fill="{colour}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
