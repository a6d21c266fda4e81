"""The report of a study as one HTML page that needs no network: ``assets/report/page.html.j2`` with its values."""

from __future__ import annotations

import base64
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import optuna
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.config import SEARCH_BANK, VALIDATION_BANK, flatten
from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.export.formats import FORMATS, file_name, result_of, result_text
from autodiffusion_optuna.images import Rows, picture
from autodiffusion_optuna.report.figures import FIGURES
from autodiffusion_optuna.results.captions import BEST
from autodiffusion_optuna.results.headline import Headline
from autodiffusion_optuna.results.held_out import significant
from autodiffusion_optuna.results.summary import StudySummary, banks_of
from autodiffusion_optuna.storage import attrs

ASSETS = Path(__file__).parent.parent / "assets" / "report"
LEGEND = 30
"""Height left for a figure's legend, in pixels."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
BLOCKS = {"desk": 8, "phone": 4}
"""Pictures side by side on a wide and on a narrow screen; more of them go on below."""


def page(
    summary: StudySummary, *, pictures: Rows = (), notes: Sequence[str] = (), tail: str = "", written: str = ""
) -> str:
    """One HTML page about a study as it was read, with all it needs inside it.

    ``pictures``: captioned rows, see ``images.Rows``; empty for a page without. ``notes``: warnings to show below the
    result. ``tail``: what the page's commands end with, such as `` --storage URL``. ``written``: when, as text.
    """
    config, headline = summary.config, summary.headline
    best, uniform = (headline.found, headline.baseline) if headline else (summary.best, None)
    run, saved = summary.evaluations["run"], summary.evaluations["saved"]
    exports, refused = _exports(summary) if best else ({}, "")
    figures = {key: figure for key in FIGURES if (figure := _figure(summary, key))}
    rows = summary.rows()
    return _template().render(
        summary=summary,
        config=config,
        best=best,
        uniform=uniform,
        headline=headline,
        size=summary.held_out_size,
        run=run,
        saved=saved,
        notes=[*notes, *_doubts(headline, f"adopt score --study {config.name}{tail}")],
        rows=rows,
        costly=any(abs(row.cost - 1) >= 0.005 for row in rows),
        best_by_setting=summary.best_by_setting(),
        pictures=pictures,
        blocks=BLOCKS,
        figures=figures,
        plotly=get_plotlyjs() if figures else "",
        exports=exports,
        refused=refused,
        bank=SEARCH_BANK,
        validation_bank=VALIDATION_BANK,
        names=attrs,
        time=_time(summary),
        found=BEST,
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
        duration=_duration,
        file_name=file_name,
        in_script=lambda text: Markup(text.replace("<", "\\u003c")),  # JSON cannot end the element it is in
        in_words=lambda steps: NUMBERS[steps] if steps < len(NUMBERS) else str(steps),
        json=lambda value: json.dumps(value, ensure_ascii=False),
        percent=_percent,
        plain=significant,
        png=lambda image: "data:image/png;base64," + base64.b64encode(picture(image)).decode("ascii"),
    )
    return environment.get_template("page.html.j2")


def _code(text: str) -> Markup:
    """Escaped, with options that are never broken after their dashes."""
    return Markup(re.sub(r"(--[a-z-]+)", r'<span class="whole">\1</span>', str(escape(text))))


def _percent(share: float) -> Markup:
    return Markup(f"{100 * share:.0f}&nbsp;%")


def _doubts(headline: Headline | None, command: str) -> list[str]:
    """What a careful reader should know before quoting the result; ``command`` scores it on held-out noise."""
    if headline is None:
        return []
    if headline.is_baseline:
        return ["The best found is the uniform list itself: nothing better was found"]
    if headline.difference is None:
        if headline.found.validated is not None:
            return [f"The finalists were chosen on these images, which flatters them; for intervals: {command}"]
        return [f"The winner was chosen on these images, which flatters it; held-out noise gives intervals: {command}"]
    if not headline.difference.clear:
        return [f"The difference may be chance; score on more images or banks: {command} --images N --banks N"]
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
    return f"{begun:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M}, {_duration(summary.wall_seconds)} in trials"


def _duration(seconds: float) -> str:
    """Seconds in the unit in which they are read."""
    unit, size = next(((u, s) for u, s in (("hours", 3600), ("minutes", 60)) if seconds >= 2 * s), ("seconds", 1))
    return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
