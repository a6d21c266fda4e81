"""Figures of a study: what the search found, and how. Plotly, never torch."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.report.comparison import ablation, values
from autodiffusion_optuna.report.style import (
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    log_axis,
    short,
    style,
)
from autodiffusion_optuna.results.summary import StudySummary
from autodiffusion_optuna.storage.attrs import CANDIDATE, OPERATOR, STAGE
from autodiffusion_optuna.storage.trials import generation_of, scored_trials, stored_score

OPERATORS = {
    "baseline": (INK, "diamond"),
    "uniform": (FAINT, "square"),
    "random": (ORANGE, "triangle-up"),
    "mutation": (SKY, "circle"),
    "crossover": (PINK, "cross"),
}
"""Operator -> its colour and symbol."""
AGES = ["#c9dcee", "#8fbbe0", "#4c93c9", "#1b6ca8", "#0a3f6b"]
"""Colours of generations from first to last: lightness alone, so that they also survive a printer."""
KEPT, SKIPPED, REUSED = "#e3e8ef", RED, SKY
ROWS, POINTS, MEDIANS, BARS, TICKS = 24, 900, 120, 40, 10
"""Most generations, trials, medians, bars and labels drawn: a figure stays below 60 kB, whatever the study's length."""
WRITTEN = 8
"""Most timesteps of a row that are written out: more would run into each other on a phone."""
STRIP = 0.7
"""Width of a generation's trials, on an axis of generations."""

Item = TypeVar("Item")


def timesteps(summary: StudySummary) -> go.Figure | None:
    """Timesteps of the best candidate so far, a row per generation that changed it, below uniform's.

    The last row is the result, where that is another one.

    The horizontal axis is the timestep, from noise on the left to the image on the right. Uniform's timesteps and the
    last row's are written out where there is room. None where no candidate is finished.
    """
    bests = _new_bests(scored_trials(summary.finished))
    by_generation = {generation_of(t): Candidate.from_key(t.user_attrs[CANDIDATE]) for t in bests}
    found = [(str(g), candidate) for g, candidate in _thin(sorted(by_generation.items()), ROWS)]
    if not found:
        return None
    if summary.finalists.complete and summary.best and summary.best.candidate.key != found[-1][1].key:
        found.append(("result", summary.best.candidate))
    headline = summary.headline
    uniform = headline.baseline.candidate if headline else None
    first = 1.6  # rows of generations begin below uniform's, with air between
    figure = go.Figure()
    if uniform is not None:
        for t in uniform.timesteps:
            figure.add_shape(
                type="line", x0=t, x1=t, y0=0, y1=first + len(found) - 0.6, layer="below",
                line={"color": "#98a2b3", "width": 1, "dash": "dot"},
            )  # fmt: skip
    for row, (generation, candidate) in enumerate(found):
        last = row == len(found) - 1
        marker = {"color": _age(row, len(found)), "size": 13 if last else 9, "line": {"color": "white", "width": 1}}
        _places(figure, summary.noise, candidate, first + row, _generation(generation), marker, written=last)
    if uniform is not None:
        marker = {"color": INK, "size": 12, "symbol": "diamond"}
        _places(figure, summary.noise, uniform, 0, "uniform", marker, written=True)
    ticks = _thin(list(enumerate(generation for generation, _ in found)), TICKS)
    style(figure, "Timesteps of the best candidate, by generation", height=158 + 24 * max(len(found), 4))
    figure.update_layout(showlegend=False, margin_t=52)
    T = summary.noise.T
    figure.update_xaxes(
        title_text="← noise      timestep      image →", showgrid=False, zeroline=False, range=[1.03 * T, -0.03 * T]
    )
    figure.update_yaxes(
        tickvals=[0, *(first + row for row, _ in ticks)],
        ticktext=["<b>uniform</b>", *(_generation(g) if row == 0 else g for row, g in ticks)],
        range=[first + len(found) - 0.2, -0.9],
        showgrid=False,
        zeroline=False,
    )
    return figure


def _generation(label: str) -> str:
    """A row's label in full."""
    return f"generation {label}" if label.isdigit() else label


def _places(
    figure: go.Figure,
    noise: NoiseSchedule,
    candidate: Candidate,
    y: float,
    name: str,
    marker: dict[str, Any],
    *,
    written: bool,
) -> None:
    """A row of timesteps as points on a line, with their numbers below where they are ``written`` and few."""
    written = written and candidate.steps <= WRITTEN
    figure.add_scatter(
        x=candidate.timesteps,
        y=[y] * candidate.steps,
        customdata=[round(2 * noise.lambda_(t), 3) for t in candidate.timesteps],
        mode="lines+markers+text" if written else "lines+markers",
        text=candidate.timesteps if written else None,
        textposition="bottom center",
        textfont={"size": 11, "color": FAINT},
        cliponaxis=False,
        line={"color": GRID, "width": 1},
        marker=marker,
        name=name,
        hovertemplate=f"{name}<br>timestep %{{x}}<br>log-SNR %{{customdata}}<extra></extra>",
    )


def _new_bests(complete: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Trials below all trials before them."""
    found: list[FrozenTrial] = []
    for trial in complete:
        if not found or trial.values[0] < found[-1].values[0]:
            found.append(trial)
    return found


def _age(row: int, rows: int) -> str:
    """Colour of a row: the last one is the darkest."""
    return AGES[round((len(AGES) - 1) * (row / (rows - 1) if rows > 1 else 1))]


def masks(summary: StudySummary) -> go.Figure | None:
    """Which layers the best candidate skips or reuses: a line per step, a column per layer in execution order.

    None where all layers run.
    """
    if summary.best is None or not any(summary.best.candidate.modes):
        return None
    candidate, units = summary.best.candidate, list(summary.units)
    cells = [[modes >> 2 * unit & 3 for unit in range(len(units))] for modes in candidate.modes]
    shown = [("run", KEPT), ("skipped", SKIPPED), ("reused", REUSED)]
    figure = go.Figure()
    figure.add_heatmap(
        z=cells, x=units, y=[f"t = {t}" for t in candidate.timesteps], zmin=-0.5, zmax=2.5, showscale=False,
        colorscale=[[end / 3, colour] for mode, (_, colour) in enumerate(shown) for end in (mode, mode + 1)],
        xgap=1, ygap=2,
        hovertemplate="%{y}<br>%{x}<extra></extra>",
    )  # fmt: skip
    for mode, (name, colour) in enumerate(shown):
        if not any(mode in row for row in cells):
            continue
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=name, marker={"color": colour, "size": 12, "symbol": "square"}
        )
    groups = _groups(units)
    for start, _ in groups[1:]:
        figure.add_vline(start - 0.5, line={"color": INK, "width": 1.5})
    style(figure, "Layers that the best candidate skips or reuses", height=170 + min(26 * candidate.steps, 700))
    figure.update_xaxes(
        title_text="layers in execution order", tickvals=[start for start, _ in groups],
        tickangle=0, ticklabelposition="outside right", showgrid=False,
        ticktext=[name for _, name in groups], range=[-0.5, len(units) - 0.5],
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return figure


def _groups(units: Sequence[str]) -> list[tuple[int, str]]:
    """(first unit, name) of each run of units in one part of the model, such as ``down``, ``mid`` and ``up``."""
    found: list[tuple[int, str]] = []
    for index, unit in enumerate(units):
        name = unit.partition(".")[0].removesuffix("_blocks").removesuffix("_block")
        if not found or found[-1][1] != name:
            found.append((index, name))
    return found if len(found) <= TICKS else found[:1]


def history(summary: StudySummary) -> go.Figure | None:
    """Values by generation: its trials side by side, its median, the best so far, and the baselines as lines.

    A long study's trials are thinned out evenly; those that set a new best stay. None where no trial is complete.
    """
    complete = [t for t in summary.finished if t.state == TrialState.COMPLETE and t.values]
    if not complete:
        return None
    generations: dict[int, list[FrozenTrial]] = defaultdict(list)
    for trial in complete:
        generations[generation_of(trial)].append(trial)
    span = (min(generations) - 0.5, max(generations) + 0.5)
    figure = go.Figure()
    _baseline_lines(figure, summary, span)
    _trial_points(figure, complete, generations)
    _medians(figure, generations)
    _best_so_far(figure, generations, span)
    _mark_stage_two(figure, generations, span)
    style(figure, f"{summary.value_name}, by generation", height=430)
    figure.update_xaxes(
        title_text="generation", zeroline=False, showgrid=False, range=list(span), tick0=0, dtick=_tick_step(span)
    )
    figure.update_yaxes(title_text=f"{summary.metric}, lower is better", zeroline=False)
    _frame(figure, summary, complete)
    return figure


def _trial_points(
    figure: go.Figure, complete: Sequence[FrozenTrial], generations: Mapping[int, Sequence[FrozenTrial]]
) -> None:
    """A point for each trial, side by side in their generation, coloured by what proposed them."""
    kept = {t.number for t in _new_bests(complete)} | {t.number for t in _thin(complete, POINTS)}
    by_operator: dict[str, list[tuple[float, FrozenTrial]]] = defaultdict(list)
    for generation, trials in generations.items():
        for place, trial in enumerate(trials):
            if trial.number in kept:
                across = STRIP * (place / (len(trials) - 1) - 0.5) if len(trials) > 1 else 0.0
                operator = trial.user_attrs.get(OPERATOR, "baseline")
                by_operator[operator].append((round(generation + across, 3), trial))
    for name, (colour, symbol) in OPERATORS.items():
        points = by_operator.get(name, [])
        if points:
            figure.add_scatter(
                x=[x for x, _ in points], y=[short(t.values[0]) for _, t in points], mode="markers", name=name,
                customdata=[[t.number, generation_of(t)] for _, t in points],
                marker={"color": colour, "symbol": symbol, "size": 6, "opacity": 0.7},
                hovertemplate=f"trial %{{customdata[0]}}, {name}<br>generation %{{customdata[1]}}"
                "<br>%{y}<extra></extra>",
            )  # fmt: skip


def _medians(figure: go.Figure, generations: Mapping[int, Sequence[FrozenTrial]]) -> None:
    """A bar across each generation at the median of its values."""
    x: list[float | None] = []
    y: list[float | None] = []
    for generation, trials in _thin(sorted(generations.items()), MEDIANS):
        median = short(statistics.median(t.values[0] for t in trials))
        x += [round(generation - STRIP / 2, 3), round(generation + STRIP / 2, 3), None]
        y += [median, median, None]
    figure.add_scatter(
        x=x, y=y, mode="lines", name="median", legendrank=2, line={"color": FAINT, "width": 2},
        hovertemplate="median of its generation<br>%{y}<extra></extra>",
    )  # fmt: skip


def _best_so_far(
    figure: go.Figure, generations: Mapping[int, Sequence[FrozenTrial]], span: tuple[float, float]
) -> None:
    """A stepped line through the best value at the end of each generation."""
    by_generation = (min(trials, key=lambda t: (t.values[0], t.number)) for _, trials in sorted(generations.items()))
    steps = _thin(_new_bests(by_generation), POINTS // 3)
    # Each step is drawn at the left edge of its generation.
    figure.add_scatter(
        x=[*(generation_of(t) - 0.5 for t in steps), span[1]],
        y=[short(t.values[0]) for t in [*steps, steps[-1]]],
        customdata=[[t.number, generation_of(t)] for t in [*steps, steps[-1]]],
        mode="lines", name="best so far", legendrank=1, line={"color": BLUE, "width": 2.5, "shape": "hv"},
        hovertemplate="best since generation %{customdata[1]}<br>trial %{customdata[0]}<br>%{y}<extra></extra>",
    )  # fmt: skip


def _tick_step(span: tuple[float, float]) -> int:
    """Generations between two labels."""
    steps = (int(digit * 10.0**exponent) for exponent in range(7) for digit in (1, 2, 5))
    return next(step for step in steps if (span[1] - span[0]) / step <= TICKS)


def _frame(figure: go.Figure, summary: StudySummary, complete: Sequence[FrozenTrial]) -> None:
    """Show the values that matter, on a log axis: those up to uniform's and half as much again.

    How many lie above is said in the corner.
    """
    values = [t.values[0] for t in complete if math.isfinite(t.values[0])]
    uniform = summary.headline.baseline.value if summary.headline else None
    if not values or min(values) <= 0:  # kid may be negative
        return
    low = min(values)
    high = min(max(values), max(1.5 * (max(values) if uniform is None else uniform), 1.5 * low))
    above = len(complete) - sum(value <= high for value in values)
    figure.update_yaxes(**log_axis(0.97 * low, 1.04 * high))
    figure.update_yaxes(title_text=f"{summary.metric}, log scale, lower is better")
    if above:
        figure.add_annotation(
            text=f"↑ {above} worse {'trial' if above == 1 else 'trials'} above", xref="paper", yref="paper", x=1, y=1,
            yshift=-2, xanchor="right", yanchor="top", showarrow=False, bgcolor="white",
            font={"size": 11, "color": FAINT},
        )  # fmt: skip


def _baseline_lines(figure: go.Figure, summary: StudySummary, span: tuple[float, float]) -> None:
    """A line for each baseline; named are the headline's and the best of the others, the rest on hovering."""
    scored = sorted((row.value, row.name) for row in summary.baselines if row.value is not None)
    own = summary.headline.baseline.name if summary.headline else "uniform"
    named = {own, *[name for _, name in scored if name != own][:1]}
    for value, name in scored:
        uniform = name == own
        figure.add_scatter(
            x=list(span), y=[short(value)] * 2, mode="lines", showlegend=name in named,
            legendrank=3 if uniform else 4, name=name, hovertemplate=f"{name}<br>%{{y}}<extra></extra>",
            line={
                "color": INK if uniform else GREEN if name in named else "#d0d5dd",
                "width": 1.8 if name in named else 1,
                "dash": "dash" if uniform else "dot" if name in named else "solid",
            },
        )  # fmt: skip


def _mark_stage_two(
    figure: go.Figure, generations: Mapping[int, Sequence[FrozenTrial]], span: tuple[float, float]
) -> None:
    """A band over the generations of stage two, where there are any."""
    second = [g for g, trials in generations.items() if any(t.user_attrs.get(STAGE) == 2 for t in trials)]
    if second:
        figure.add_vrect(
            x0=min(second) - 0.5, x1=span[1], fillcolor="#f2f4f7", line_width=0, layer="below",
            annotation={"text": "layers may be skipped", "font": {"size": 11, "color": FAINT}},
            annotation_position="top left",
        )  # fmt: skip


def evaluations(summary: StudySummary) -> go.Figure | None:
    """Network calls run, and reused from earlier candidates, by generation. None where no trial is finished."""
    if not summary.finished:
        return None
    width = -(-(max(map(generation_of, summary.finished)) + 1) // BARS)  # generations in a bar
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for trial in summary.finished:
        score, bar = stored_score(trial), sums[generation_of(trial) // width]
        bar[0] += int(score.get("run", 0))
        bar[1] += int(score.get("saved", 0))
    bars = dict(sorted(sums.items()))
    labels = [str(b * width) if width == 1 else f"{b * width}-{b * width + width - 1}" for b in bars]
    shares = [f"{saved / max(run + saved, 1):.0%}" for run, saved in bars.values()]
    figure = go.Figure()
    for part, (name, colour) in enumerate((("run", BLUE), ("reused", "#a9d3ee"))):
        figure.add_bar(
            x=labels, y=[bar[part] for bar in bars.values()], name=name, marker={"color": colour}, customdata=shares,
            hovertemplate=f"generation %{{x}}<br>%{{y:,}} {name}<br>%{{customdata}} reused<extra></extra>",
        )  # fmt: skip
    style(figure, "Network calls, one image each", height=360)
    figure.update_layout(barmode="stack", bargap=0.25, legend_traceorder="normal")
    figure.update_xaxes(title_text="generation", type="category", nticks=TICKS, tickangle=0)
    figure.update_yaxes(tickformat="~s")
    return figure


FIGURES: dict[str, tuple[str, Callable[[StudySummary], go.Figure | None]]] = {
    "values": ("Values on held-out noise", values),
    "ablation": ("What each change earned", ablation),
    "timesteps": ("Timesteps of the best candidate", timesteps),
    "masks": ("Layers that the best candidate skips or reuses", masks),
    "history": ("The search", history),
    "evaluations": ("Network calls run and reused", evaluations),
}
"""Id of a figure -> its title, and the function that draws it; None where there is nothing to draw."""


def nothing(title: str) -> go.Figure:
    """What stands where there was a figure once and is nothing to draw any more."""
    figure = go.Figure()
    style(figure, title, height=200)
    figure.add_annotation(text="nothing to show now", showarrow=False, font={"color": FAINT})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _thin(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
