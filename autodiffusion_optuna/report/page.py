"""The report of a study as one HTML page that needs no network: ``assets/report/page.html.j2`` with its values."""

from __future__ import annotations

import base64
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.config import SEARCH_BANK, flatten
from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.export.formats import FORMATS, file_name, result_of, result_text
from autodiffusion_optuna.images import picture
from autodiffusion_optuna.report.figures import FIGURES
from autodiffusion_optuna.results.summary import Row, StudySummary, banks_of
from autodiffusion_optuna.storage import attrs

ASSETS = Path(__file__).parent.parent / "assets" / "report"
LEGEND = 30
"""Height left for a figure's legend, in pixels."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
Pictures = Sequence[tuple[str, NDArray[np.uint8]]]


def page(
    summary: StudySummary, *, pictures: Pictures = (), notes: Sequence[str] = (), tail: str = "", written: str = ""
) -> str:
    """One HTML page about a study as it was read, with all it needs inside it.

    ``pictures``: rows as (label, uint8 [N, C, H, W]), uniform's first and the best's last, the n-th images of all from
    one noise; empty for a page without. ``notes``: warnings to show below the result. ``tail``: what the page's
    commands end with, such as `` --storage URL``. ``written``: when, as text.
    """
    config, (best, uniform) = summary.config, summary.compared() or (summary.best, None)
    run, saved = summary.total("run"), summary.total("saved")
    exports, refused = _exports(summary) if best else ({}, "")
    figures = {key: figure for key in FIGURES if (figure := _figure(summary, key))}
    return _template().render(
        summary=summary,
        config=config,
        best=best,
        uniform=uniform,
        held_out=uniform is not None and uniform.held_out is not None,
        change=best and uniform and _change(best, uniform),
        size=summary.held_out_size,
        run=run,
        saved=saved,
        notes=[*notes, *_doubts(best, uniform, f"adopt score --study {config.name}{tail}")],
        pictures=pictures,
        figures=figures,
        plotly=get_plotlyjs() if figures else "",
        exports=exports,
        refused=refused,
        bank=SEARCH_BANK,
        names=attrs,
        time=_time(summary),
        settings=flatten(config.model_dump(mode="json", exclude_defaults=True)),
        tail=tail,
        written=written,
        versions=f"adopt {__version__} with Optuna {optuna.__version__} and Python {platform.python_version()}",
    )


def _template() -> Template:
    """The page's template, which escapes all that is not ``Markup``, with the filters it uses."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        banks=lambda size: Markup(banks_of(size).replace(" x ", "&nbsp;&times;&nbsp;")),
        banks_of=banks_of,
        base64=lambda text: base64.b64encode(text.encode()).decode("ascii"),
        code=_code,
        count="{:,}".format,
        file_name=file_name,
        in_script=lambda text: Markup(text.replace("<", "\\u003c")),  # JSON cannot end the element it is in
        in_words=lambda steps: NUMBERS[steps] if steps < len(NUMBERS) else str(steps),
        json=lambda value: json.dumps(value, ensure_ascii=False),
        percent=_percent,
        png=lambda image: "data:image/png;base64," + base64.b64encode(picture(image)).decode("ascii"),
    )
    return environment.get_template("page.html.j2")


def _code(text: str) -> Markup:
    """Escaped, with options that are never broken after their dashes."""
    return Markup(re.sub(r"(--[a-z-]+)", r'<span class="whole">\1</span>', str(escape(text))))


def _percent(share: float) -> Markup:
    return Markup(f"{100 * share:.0f}&nbsp;%")


def _change(best: Row, uniform: Row) -> str | None:
    """How far the best is below uniform, as a share, both on the same noise; None where there is no such share."""
    found, given = (row.held_out.mean if row.held_out else row.value for row in (best, uniform))
    if found is None or given is None or found < 0 or given <= 0:  # kid may be negative
        return None
    share = 1 - found / given
    return _percent(abs(share)) + (" lower" if share >= 0 else " higher")


def _doubts(best: Row | None, uniform: Row | None, command: str) -> list[str]:
    """What a careful reader should know before quoting the result; ``command`` scores it on held-out noise."""
    if best is None or uniform is None:
        return []
    if best.held_out is None or uniform.held_out is None:
        return [f"The winner was chosen on these images, which flatters it; held-out noise gives intervals: {command}"]
    if best.held_out.high >= uniform.held_out.low:
        return [f"The two 95 % intervals overlap; score on more images or banks: {command} --images N --banks N"]
    return []


def _figure(summary: StudySummary, key: str) -> dict[str, str] | None:
    """A figure and its title, which the page writes itself; None where there is nothing to draw."""
    title, draw = FIGURES[key]
    figure = draw(summary)
    if figure is None:
        return None
    spared = figure.layout.margin.t - 8  # a legend makes room for itself
    figure.update_layout(title_text=None, margin_t=8, height=figure.layout.height - spared + LEGEND)
    return {"title": title, "data": figure.to_json()}


def _exports(summary: StudySummary) -> tuple[dict[str, str], str]:
    """Text of every export that this model allows, and why another is not among them."""
    result, texts, refused = result_of(summary), {}, ""
    for form in FORMATS:
        try:
            texts[form] = result_text(result, form)
        except AdoptError as error:
            refused = str(error).partition(";")[0]
    return texts, refused


def _time(summary: StudySummary) -> str | None:
    """When the study ran, and the seconds its trials took."""
    begun = min((t.datetime_start for t in summary.finished if t.datetime_start), default=None)
    ended = max((t.datetime_complete for t in summary.finished if t.datetime_complete), default=None)
    if begun is None or ended is None:
        return None
    return f"{begun:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M}, {summary.wall_seconds:,.0f} s in trials"
