"""Figures of what was found against what it is compared with. Plotly, never torch."""

from __future__ import annotations

import plotly.graph_objects as go

from autodiffusion_optuna.report.style import BLUE, FAINT, GREEN, INK, log_axis, short, style
from autodiffusion_optuna.results.captions import BEST
from autodiffusion_optuna.results.headline import is_uniform
from autodiffusion_optuna.results.held_out import significant
from autodiffusion_optuna.results.summary import Row, StudySummary

MOST = 16
"""Most changes that are drawn, those that earned the most."""
NAME = 20
"""Letters of a name in a line."""


def values(summary: StudySummary) -> go.Figure | None:
    """Held-out values with their 95 % intervals and the floors, on a log axis where all are positive.

    The best found is above, then the baselines from the best, then many steps and real images. None where fewer than
    two candidates have values of the same images.
    """
    rows, real = compared_rows(summary), summary.real_floor
    if len(rows) < 2:
        return None
    drawn = [(row, row.held_out) for row in rows if row.held_out]
    size = drawn[0][1].size
    names = [f"<b>{row.name}</b>" if row.name == BEST else broken(row.name) for row, _ in drawn]
    figure = go.Figure()
    for place, (row, held_out) in enumerate(drawn):
        colour = BLUE if row.name == BEST else INK if is_uniform(row.name) else FAINT
        figure.add_scatter(
            x=[short(held_out.mean)], y=[place], mode="markers", name=row.name,
            marker={"color": colour, "size": 11, "symbol": "circle" if row is not summary.many_steps else "square"},
            error_x={"type": "data", "symmetric": False, "array": [short(held_out.high - held_out.mean)],
                     "arrayminus": [short(held_out.mean - held_out.low)], "color": colour, "thickness": 2, "width": 5},
            hovertemplate=f"{row.name}<br>{held_out.text}<extra></extra>",
        )  # fmt: skip
    means = [held_out.mean for _, held_out in drawn]
    low, high = min(h.low for _, h in drawn), max(h.high for _, h in drawn)
    if real is not None and real.value is not None and real.images == size[0]:
        figure.add_scatter(
            x=[short(real.value)], y=[len(names)], mode="markers", name="real images",
            marker={"color": GREEN, "size": 11, "symbol": "diamond"},
            hovertemplate=f"real images<br>{significant(real.value)}<extra></extra>",
        )  # fmt: skip
        means, low = [*means, real.value], min(low, real.value)
        names.append("real images")
    style(figure, f"{summary.metric} on held-out noise", height=130 + 30 * len(names))
    positive = min(means) > 0
    if positive:
        # An interval that reaches below 0 would need all of the axis.
        figure.update_xaxes(**log_axis(0.95 * max(low, 0.5 * min(means)), 1.05 * high))
    title = f"{summary.metric}, {'log scale, ' if positive else ''}lower is better"
    figure.update_xaxes(title_text=title, zeroline=False, tickangle=0)
    _name_rows(figure, names)
    return figure


def compared_rows(summary: StudySummary) -> list[Row]:
    """Rows whose held-out values are of the same images: the winner, the baselines from the best, many steps."""
    headline, many = summary.headline, summary.many_steps
    if headline is None or headline.found.held_out is None or headline.baseline.held_out is None:
        return []
    size = headline.found.held_out.size
    others = [row for row in summary.baselines if row.name != headline.baseline.name]
    known = [(row.held_out, row) for row in [headline.baseline, *others] if row.held_out]
    scored = [(held_out.mean, row) for held_out, row in known if held_out.size == size]
    floor = [many] if many and many.held_out and many.held_out.size == size else []
    return [headline.found, *(row for _, row in sorted(scored, key=lambda pair: pair[0])), *floor]


def ablation(summary: StudySummary) -> go.Figure | None:
    """How much each single change of the best found earned: what its value rises by when that one is undone.

    None where it was not scored.
    """
    changes = summary.ablation[:MOST]
    if not changes:
        return None
    figure = go.Figure()
    means = [short(change.difference.mean) for change in changes]
    widths = [short(change.difference.half_width) for change in changes]
    figure.add_bar(
        x=means, y=list(range(len(changes))), orientation="h", name="earned",
        marker={"color": [BLUE if change.difference.clear else "#a9d3ee" for change in changes]},
        error_x={"type": "data", "array": widths, "color": INK, "thickness": 1.5, "width": 4},
        customdata=[[change.name, change.difference.text] for change in changes],
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    )  # fmt: skip
    style(figure, f"{summary.metric} without one change", height=130 + 36 * len(changes))
    title = f"{summary.metric} above the best found, 95 %"
    figure.update_xaxes(title_text=title, zeroline=True, zerolinecolor=INK)
    figure.update_layout(bargap=0.45)
    # What a neighbour does not allow is said on hovering.
    shortened = [change.name.partition(", as near")[0].replace(": timestep ", ": ") for change in changes]
    _name_rows(figure, [broken(name) for name in shortened])
    return figure


def _name_rows(figure: go.Figure, names: list[str]) -> None:
    """Names at the rows of a figure, the first above."""
    figure.update_layout(showlegend=False, margin_t=52)
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
        ticks="",
    )


def broken(name: str) -> str:
    """A long name on several lines, so that it leaves a phone some width to draw on."""
    lines = [""]
    for word in name.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= NAME:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)
