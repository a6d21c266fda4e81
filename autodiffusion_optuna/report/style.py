"""How figures look: colours, letters and axes. Plotly alone."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

FONT = "Inter, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, FAINT, GRID = "#1b2430", "#667085", "#e6e9ee"
BLUE, RED, GREEN, ORANGE, SKY, PINK = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7"
"""Okabe and Ito's colours, which colour-blind readers tell apart."""


def style(figure: go.Figure, title: str, height: int) -> None:
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


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A log axis from ``low`` to ``high``, both positive, with ticks written out: Plotly's own leave out the zeros."""
    if high <= 5 * low:  # even steps: there is less than one decade
        step = 10.0 ** math.floor(math.log10((high - low) / 2 or low))
        step *= next(digit for digit in (1, 2, 5, 10) if (high - low) / (step * digit) <= 7)
        ticks = [short(n * step) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    else:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 3, 5, 7) if high <= 20 * low else (1, 2, 5) if high <= 1000 * low else (1,)
        every = [short(digit * 10.0**exponent) for exponent in exponents for digit in digits]
        ticks = [tick for tick in every if low <= tick <= high]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [f"{tick:,.10g}" for tick in ticks],
    }


def short(value: float) -> float:
    """Five digits, which is more than a screen shows."""
    return float(f"{value:.5g}")
