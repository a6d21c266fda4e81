"""Figures of a study: what the search found, and how. Plotly, never torch."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate, unit_indices
from autodiffusion_optuna.results.summary import StudySummary
from autodiffusion_optuna.storage.attrs import CANDIDATE, OPERATOR, STAGE
from autodiffusion_optuna.storage.trials import generation_of, scored_trials, stored_score

FONT = "Inter, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, FAINT, GRID = "#1b2430", "#667085", "#e6e9ee"
BLUE, RED, GREEN, ORANGE, SKY, PINK = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7"
"""Okabe and Ito's colours, which colour-blind readers tell apart."""
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
KEPT, SKIPPED = "#e3e8ef", RED
ROWS, POINTS, MEDIANS, BARS, TICKS = 24, 900, 120, 40, 10
"""Most generations, trials, medians, bars and labels drawn: a figure stays below 60 kB, whatever the study's length."""
STRIP = 0.7
"""Width of a generation's trials, on an axis of generations."""

Item = TypeVar("Item")


def timesteps(summary: StudySummary) -> go.Figure | None:
    """Timesteps of the best candidate so far, a row per generation that changed it, below uniform's.

    The horizontal axis is the log-SNR, ln(alpha^2 / sigma^2), from noise on the left to the image on the right. None
    where no candidate is finished.
    """
    bests = _new_bests(scored_trials(summary.finished))
    by_generation = {generation_of(t): Candidate.from_key(t.user_attrs[CANDIDATE]) for t in bests}
    found = _thin(sorted(by_generation.items()), ROWS)
    if not found:
        return None
    noise, uniform = summary.noise, summary.uniform.candidate if summary.uniform else None

    def place(t: int) -> float:
        return round(2 * noise.lambda_(t), 3)

    first = 1.6  # rows of generations begin below uniform's, with air between
    figure = go.Figure()
    if uniform is not None:
        for t in uniform.timesteps:
            figure.add_shape(
                type="line", x0=place(t), x1=place(t), y0=0, y1=first + len(found) - 0.6, layer="below",
                line={"color": "#98a2b3", "width": 1, "dash": "dot"},
            )  # fmt: skip
    for row, (generation, candidate) in enumerate(found):
        last = row == len(found) - 1
        figure.add_scatter(
            x=[place(t) for t in candidate.timesteps],
            y=[first + row] * candidate.steps,
            customdata=candidate.timesteps,
            mode="lines+markers",
            line={"color": GRID, "width": 1},
            marker={
                "color": _age(row, len(found)), "size": 13 if last else 9, "line": {"color": "white", "width": 1}
            },
            name=f"generation {generation}",
            hovertemplate=f"generation {generation}<br>timestep %{{customdata}}<br>log-SNR %{{x}}<extra></extra>",
        )  # fmt: skip
    if uniform is not None:
        figure.add_scatter(
            x=[place(t) for t in uniform.timesteps], y=[0] * uniform.steps, customdata=uniform.timesteps,
            mode="markers", marker={"color": INK, "size": 12, "symbol": "diamond"}, name="uniform",
            hovertemplate="uniform<br>timestep %{customdata}<br>log-SNR %{x}<extra></extra>",
        )  # fmt: skip
    ticks = _thin(list(enumerate(generation for generation, _ in found)), TICKS)
    _style(figure, "Timesteps of the best candidate, by generation", height=150 + 24 * max(len(found), 4))
    figure.update_layout(showlegend=False, margin_t=52)
    figure.update_xaxes(title_text="← noise      log-SNR      image →", showgrid=False, zeroline=False)
    figure.update_yaxes(
        tickvals=[0, *(first + row for row, _ in ticks)],
        ticktext=["<b>uniform</b>", *(f"generation {g}" if row == 0 else str(g) for row, g in ticks)],
        range=[first + len(found) - 0.2, -0.8],
        showgrid=False,
        zeroline=False,
    )
    return figure


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
    """Which layers the best candidate skips at each step: a line per step, a column per layer in execution order.

    None where it skips nothing.
    """
    if summary.best is None or not any(summary.best.candidate.skips):
        return None
    candidate, units = summary.best.candidate, list(summary.units)
    skipped = [set(unit_indices(skip)) for skip in candidate.skips]
    cells = [[int(unit in step) for unit in range(len(units))] for step in skipped]
    figure = go.Figure()
    figure.add_heatmap(
        z=cells, x=units, y=[f"t = {t}" for t in candidate.timesteps], zmin=0, zmax=1, showscale=False,
        colorscale=[[0, KEPT], [0.5, KEPT], [0.5, SKIPPED], [1, SKIPPED]], xgap=1, ygap=2,
        hovertemplate="%{y}<br>%{x}<extra></extra>",
    )  # fmt: skip
    for name, colour in (("run", KEPT), ("skipped", SKIPPED)):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=name, marker={"color": colour, "size": 12, "symbol": "square"}
        )
    groups = _groups(units)
    for start, _ in groups[1:]:
        figure.add_vline(start - 0.5, line={"color": INK, "width": 1.5})
    _style(figure, "Layers skipped by the best candidate", height=170 + min(26 * candidate.steps, 700))
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
    _style(figure, f"{summary.value_name}, by generation", height=430)
    figure.update_xaxes(
        title_text="generation", zeroline=False, showgrid=False, range=list(span), tick0=0, dtick=_tick_step(span)
    )
    figure.update_yaxes(title_text=f"{summary.value_name}, lower is better", zeroline=False)
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
                x=[x for x, _ in points], y=[_short(t.values[0]) for _, t in points], mode="markers", name=name,
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
        median = _short(statistics.median(t.values[0] for t in trials))
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
        y=[_short(t.values[0]) for t in [*steps, steps[-1]]],
        customdata=[[t.number, generation_of(t)] for t in [*steps, steps[-1]]],
        mode="lines", name="best so far", legendrank=1, line={"color": BLUE, "width": 2.5, "shape": "hv"},
        hovertemplate="best since generation %{customdata[1]}<br>trial %{customdata[0]}<br>%{y}<extra></extra>",
    )  # fmt: skip


def _tick_step(span: tuple[float, float]) -> int:
    """Generations between two labels."""
    steps = (int(digit * 10.0**exponent) for exponent in range(7) for digit in (1, 2, 5))
    return next(step for step in steps if (span[1] - span[0]) / step <= TICKS)


def _frame(figure: go.Figure, summary: StudySummary, complete: Sequence[FrozenTrial]) -> None:
    """Show the values that matter: those up to twice uniform's; how many lie above is said in the corner."""
    values = [t.values[0] for t in complete if math.isfinite(t.values[0])]
    uniform = summary.uniform.value if summary.uniform else None
    if not values or min(values) <= 0:  # kid may be negative
        return
    low = min(values)
    high = min(max(values), max(2 * (max(values) if uniform is None else uniform), 1.5 * low))
    above = len(complete) - sum(value <= high for value in values)
    if high > 4 * low:
        figure.update_yaxes(type="log", range=[math.log10(0.9 * low), math.log10(1.1 * high)], **_log_ticks(low, high))
    else:
        figure.update_yaxes(range=[low - 0.06 * (high - low + 1e-9), high + 0.08 * (high - low + 1e-9)])
    if above:
        figure.add_annotation(
            text=f"↑ {above} worse {'trial' if above == 1 else 'trials'} above", xref="paper", yref="paper", x=1, y=1,
            yshift=-16, xanchor="right", yanchor="top", showarrow=False, bgcolor="white",
            font={"size": 11, "color": FAINT},
        )  # fmt: skip


def _log_ticks(low: float, high: float) -> dict[str, list[Any]]:
    """1, 2 and 5 of every decade, written out: Plotly's own leave out the zeros."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [_short(digit * 10.0**exponent) for exponent in exponents for digit in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [f"{tick:,.10g}" for tick in ticks]}


def _baseline_lines(figure: go.Figure, summary: StudySummary, span: tuple[float, float]) -> None:
    """A line for each baseline; named are uniform and the best of the others, the rest on hovering."""
    scored = sorted((row.value, row.name) for row in summary.baselines if row.value is not None)
    named = {"uniform", *[name for _, name in scored if name != "uniform"][:1]}
    for value, name in scored:
        uniform = name == "uniform"
        figure.add_scatter(
            x=list(span), y=[_short(value)] * 2, mode="lines", showlegend=name in named,
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
    """Network evaluations run, and saved by the prefix cache, by generation. None where no trial is finished."""
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
    for part, (name, colour) in enumerate((("run", BLUE), ("saved by the prefix cache", "#a9d3ee"))):
        figure.add_bar(
            x=labels, y=[bar[part] for bar in bars.values()], name=name, marker={"color": colour}, customdata=shares,
            hovertemplate=f"generation %{{x}}<br>%{{y:,}} {name}<br>%{{customdata}} saved<extra></extra>",
        )  # fmt: skip
    _style(figure, "Network evaluations, one image each", height=360)
    figure.update_layout(barmode="stack", bargap=0.25, legend_traceorder="normal")
    figure.update_xaxes(title_text="generation", type="category", nticks=TICKS, tickangle=0)
    figure.update_yaxes(tickformat="~s")
    return figure


FIGURES: dict[str, tuple[str, Callable[[StudySummary], go.Figure | None]]] = {
    "timesteps": ("Timesteps of the best candidate", timesteps),
    "masks": ("Layers that the best candidate skips", masks),
    "history": ("The search", history),
    "evaluations": ("Network evaluations run and saved", evaluations),
}
"""Id of a figure -> its title, and the function that draws it; None where there is nothing to draw."""


def nothing(title: str) -> go.Figure:
    """What stands where there was a figure once and is nothing to draw any more."""
    figure = go.Figure()
    _style(figure, title, height=200)
    figure.add_annotation(text="nothing to show now", showarrow=False, font={"color": FAINT})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _style(figure: go.Figure, title: str, height: int) -> None:
    """One look for all: white, large enough letters, the legend above the plot so that a phone has the whole width."""
    figure.update_layout(
        template="none",
        title={"text": title, "font": {"size": 16, "color": INK}, "x": 0, "y": 1, "xanchor": "left", "yanchor": "top",
               "pad": {"l": 8, "t": 10}},
        font={"family": FONT, "size": 13, "color": INK},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        margin={"l": 8, "r": 8, "t": 92, "b": 8},
        height=height,
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"font": {"family": FONT, "size": 13}},
    )  # fmt: skip
    axis: dict[str, Any] = {"automargin": True, "gridcolor": GRID, "linecolor": "#98a2b3", "tickfont": {"size": 12}}
    figure.update_xaxes(
        **axis,
        title={"font": {"size": 12, "color": FAINT}, "standoff": 8},
        ticks="outside",
        ticklen=4,
        tickcolor="#98a2b3",
    )
    figure.update_yaxes(**axis, title={"font": {"size": 12, "color": FAINT}, "standoff": 6})


def _short(value: float) -> float:
    """Five digits, which is more than a screen shows."""
    return float(f"{value:.5g}")


def _thin(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
