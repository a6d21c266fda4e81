"""The report of a study as one HTML page that needs no network. Torch-free."""

from __future__ import annotations

import base64
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.config import SEARCH_BANK, flatten
from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.export.formats import result_of, result_text
from autodiffusion_optuna.images import picture
from autodiffusion_optuna.report.figures import FIGURES
from autodiffusion_optuna.results.summary import Row, StudySummary, banks_of
from autodiffusion_optuna.storage.attrs import MODEL_FACTS, VERSION

ASSETS = Path(__file__).parent.parent / "assets" / "report"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content security policy: the page may load nothing from anywhere."""
PIXELATED = 128
"""Side in pixels below which pictures are enlarged as squares rather than blurred."""
LEGEND = 30
"""Height left for a figure's legend, in pixels."""
CAPTIONS = {
    "timesteps": "Each row is the best schedule at the end of a generation that improved it. "
    "Diamonds and dotted lines: uniform steps.",
    "masks": "A line per step, a column per layer. A skipped layer passes its input on.",
    "history": "Every candidate in its generation, on the search\u2019s noise, by the operator that proposed it; a bar "
    "at each generation\u2019s median; the baselines as lines across.",
    "evaluations": "Candidates that share their first steps share the evaluations of these steps.",
}
FILES = {"json": "{}.json", "diffusers": "{}.py", "comfyui": "{}-sigmas.txt"}
"""Form of an export -> name of the file that the page carries."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
Pictures = Sequence[tuple[str, NDArray[np.uint8]]]


def page(
    report: StudySummary, *, pictures: Pictures = (), notes: Sequence[str] = (), tail: str = "", written: str = ""
) -> str:
    """One HTML page about a study as it was read, with all it needs inside it.

    ``pictures``: rows as (label, uint8 [N, C, H, W]), uniform's first and the best's last, the n-th images of all from
    one noise; empty for a page without. ``notes``: warnings to show below the result. ``tail``: what the page's
    commands end with, such as `` --storage URL``. ``written``: when, as text.
    """
    name = escape(report.config.name)
    drawn = [(key, title, _figure_json(report, key)) for key, (title, _) in FIGURES.items()]
    figures = [(key, title, data) for key, title, data in drawn if data is not None]
    parts = [
        _result(report, notes, tail),
        _table(report),
        _pictures(pictures),
        _figures(figures),
        _apply(report, tail),
        _provenance(report),
    ]
    about = f'<p class="about">{escape(report.config.description)}</p>' if report.config.description else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: a report of adopt</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f'<header>\n<p class="eyebrow">Diffusion schedule search</p>\n<h1>{name}</h1>\n{about}\n</header>\n'
        f"<main>\n{''.join(parts)}</main>\n<footer>{_footer(written)}</footer>\n{_scripts(figures)}</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _footer(written: str) -> str:
    when = f" on {escape(written)}" if written else ""
    return (
        f"Written{when} by adopt {__version__} with Optuna {optuna.__version__} and Python {platform.python_version()}."
    )


# The result


def _result(report: StudySummary, notes: Sequence[str], tail: str) -> str:
    rows = report.rows()
    if not rows:
        command = f"adopt run --study {report.config.name}{tail}"
        return f'<p class="result">No candidate is finished yet: <code>{_code(command)}</code>.</p>\n'
    best, uniform = report.compared() or (rows[0], None)
    shown = "".join(f'<p class="note">{_code(note)}</p>\n' for note in [*notes, *_doubts(best, uniform, report, tail)])
    return f'<p class="result">{_sentence(report, best, uniform)}</p>\n{shown}{_tiles(report, best, uniform)}'


def _sentence(report: StudySummary, best: Row, uniform: Row | None) -> str:
    """What was found against uniform: on held-out noise where both were scored on it, else on the search's."""
    held_out = best.held_out is not None and uniform is not None and uniform.held_out is not None
    found = f"<strong>{escape(report.metric)}&nbsp;{_value(best, held_out):.4g}</strong>{_range(best, held_out)}"
    text = f"{_steps(best).capitalize()} searched step{'' if best.candidate.steps == 1 else 's'} give {found}"
    on = f"measured on the search&rsquo;s own {report.config.score.images:,} images."
    if uniform is None or _value(uniform, held_out) is None:
        return f"{text}, {on}"
    given = f'<strong class="plain">{_value(uniform, held_out):.4g}</strong>{_range(uniform, held_out)}'
    change = _change(best, uniform)
    text += f"; {_steps(uniform)} uniform ones give {given}" + (f". That is {change}, " if change else ", ")
    if held_out:
        assert best.held_out is not None
        return text + f"measured on {_banks(best.held_out.size)} images from noise that the search never saw."
    return text + on


def _banks(size: tuple[int, int]) -> str:
    return banks_of(size).replace(" x ", "&nbsp;&times;&nbsp;")


def _steps(row: Row) -> str:
    count = row.candidate.steps
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _value(row: Row, held_out: bool) -> float | None:
    return row.held_out.mean if held_out and row.held_out is not None else row.value


def _range(row: Row, held_out: bool) -> str:
    if not held_out or row.held_out is None:
        return ""
    low, high = row.held_out.mean - row.held_out.half_width, row.held_out.mean + row.held_out.half_width
    return f' <span class="range">(95&nbsp;% interval {low:.4g} to {high:.4g})</span>'


def _change(best: Row, uniform: Row) -> str | None:
    """How far the best is below uniform, as a share, both on the same noise; None where there is no such share."""
    held_out = best.held_out is not None and uniform.held_out is not None
    found, given = _value(best, held_out), _value(uniform, held_out)
    if found is None or given is None or found < 0 or given <= 0:  # kid may be negative
        return None
    share = 1 - found / given
    return f"{_percent(abs(share))} {'lower' if share >= 0 else 'higher'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}&nbsp;%"


def _doubts(best: Row, uniform: Row | None, report: StudySummary, tail: str) -> list[str]:
    """What a careful reader should know before quoting the result."""
    command = f"adopt score --study {report.config.name}{tail}"
    if uniform is None:
        return []
    if best.held_out is None or uniform.held_out is None:
        return [f"The winner was chosen on these images, which flatters it; held-out noise gives intervals: {command}"]
    if best.held_out.mean + best.held_out.half_width >= uniform.held_out.mean - uniform.held_out.half_width:
        return [f"The two 95 % intervals overlap; score on more images or banks: {command} --images N --banks N"]
    return []


def _tiles(report: StudySummary, best: Row, uniform: Row | None) -> str:
    run, saved = report.total("run"), report.total("saved")
    images = banks_of(best.held_out.size) if best.held_out else f"{report.config.score.images:,}"
    facts = [
        (f"against uniform, {images} images", (uniform and _change(best, uniform)) or "&ndash;"),
        ("cost of the schedule", f"{best.cost:.2f}"),
        ("candidates finished", f"{len(report.finished):,} of {report.config.search.trials:,}"),
        ("evaluations saved", _percent(saved / max(run + saved, 1))),
    ]
    return f'<dl class="tiles">{"".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in facts)}</dl>\n'


# The table


def _table(report: StudySummary) -> str:
    rows = report.rows()
    if not rows:
        return ""
    size = report.held_out_size
    searched = bool(rows[0].candidate.settings)
    noise = f"held-out noise, {_banks(size)} images" if size else "held-out noise"
    heads = [
        ("", "schedule"),
        ("", f"{escape(report.metric)}<br>search, {report.config.score.images:,} images"),
        ("", f"{escape(report.metric)}<br>{noise}, 95&nbsp;%"),
        ("", "cost"),
        *([("left", "settings")] if searched else []),
        ("left", "timesteps"),
    ]
    head = "".join(f'<th scope="col" class="{kind}">{text}</th>' for kind, text in heads)
    body = "".join(_row(row, searched, size) for row in rows)
    return (
        '<section id="schedules">\n<h2>Schedules</h2>\n'
        "<p>Lower is better. Intervals are Student&rsquo;s, over disjoint banks of noise.</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of schedules"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n</section>\n"
    )


def _row(row: Row, searched: bool, size: tuple[int, int] | None) -> str:
    kind = {"best found": "best", "uniform": "uniform"}.get(row.name, "")
    value = "&ndash;" if row.value is None else f"{row.value:.4g}"
    interval = "&ndash;" if row.held_out is None else f"{row.held_out.mean:.4g} &plusmn; {row.held_out.half_width:.2g}"
    if row.held_out is not None and row.held_out.size != size:
        interval += f"<br>({_banks(row.held_out.size)})"
    chosen = escape(", ".join(f"{name} {value}" for name, value in row.candidate.settings))
    settings = f'<td class="left">{chosen}</td>' if searched else ""
    timesteps = " ".join(str(t) for t in row.candidate.timesteps)
    return (
        f'<tr class="{kind}"><th scope="row">{escape(row.name)}</th><td>{value}</td><td>{interval}</td>'
        f'<td>{row.cost:.2f}</td>{settings}<td class="left">{timesteps}</td></tr>\n'
    )


# Pictures and figures


def _pictures(rows: Pictures) -> str:
    """One figure per noise: uniform above, best below."""
    if not rows:
        return ""
    classes = ["", *[""] * (len(rows) - 2), "found"] if len(rows) > 1 else ["found"]
    key = "".join(f'<li class="{kind}">{escape(label)}</li>' for (label, _), kind in zip(rows, classes, strict=True))
    pairs = "".join(
        "<figure>"
        + "".join(
            _image(images[n], f"{label}, noise {n + 1}", kind)
            for (label, images), kind in zip(rows, classes, strict=True)
        )
        + "</figure>\n"
        for n in range(len(rows[0][1]))
    )
    return (
        '<section id="pictures">\n<h2>The same noise, two schedules</h2>\n'
        f'<p>Each column starts from one noise, which the search never saw.</p>\n<ul class="key">{key}</ul>\n'
        f'<div class="pairs">\n{pairs}</div>\n</section>\n'
    )


def _image(image: NDArray[np.uint8], label: str, kind: str) -> str:
    data = base64.b64encode(picture(image)).decode("ascii")
    classes = f"{kind} pixels" if max(image.shape[1:]) <= PIXELATED else kind
    return f'<img class="{classes}" alt="{escape(label)}" src="data:image/png;base64,{data}">'


def _figure_json(report: StudySummary, key: str) -> str | None:
    """A figure without its title, which the page writes itself; None where there is nothing to draw."""
    figure = FIGURES[key][1](report)
    if figure is None:
        return None
    spared = figure.layout.margin.t - 8  # a legend makes room for itself
    figure.update_layout(title_text=None, margin_t=8, height=figure.layout.height - spared + LEGEND)
    return str(figure.to_json())


def _figures(figures: Iterable[tuple[str, str, str]]) -> str:
    drawn = "".join(
        f'<figure class="plot"><h3>{escape(title)}</h3><p>{escape(CAPTIONS[key])}</p>'
        f'<div class="canvas" id="plot-{key}" data-figure="figure-{key}"></div></figure>\n'
        for key, title, _ in figures
    )
    if not drawn:
        return ""
    return (
        '<section id="figures">\n<h2>How it was found</h2>\n'
        f"<noscript><p>The figures are drawn by JavaScript, which is off.</p></noscript>\n{drawn}</section>\n"
    )


def _scripts(figures: Sequence[tuple[str, str, str]]) -> str:
    """Plotly once, the figures as data, and the few lines that draw them."""
    if not figures:
        return ""
    from plotly.offline import get_plotlyjs

    data = "".join(
        f'<script type="application/json" id="figure-{key}">{_inside_script(text)}</script>\n'
        for key, _, text in figures
    )
    return f"{data}<script>{get_plotlyjs()}</script>\n<script>\n{_asset('page.js')}</script>\n"


def _inside_script(text: str) -> str:
    """JSON that cannot end the element it is in."""
    return text.replace("<", "\\u003c")


# How to apply it


def _apply(report: StudySummary, tail: str) -> str:
    if report.best is None:
        return ""
    name = report.config.name
    texts, refused = _exports(report)
    commands = "".join(f"adopt export --study {name} --format {form} --out .{tail}\n" for form in texts)
    steps = [_step("Take the schedule", "These commands write its files:", commands)]
    if "diffusers" in texts:
        steps.append(_step("Draw images", f"The script, {name}.py:", texts["diffusers"]))
        more = "A pipeline that is already loaded takes the schedule, its solver and skipped layers in one line:"
        steps.append(_step("Or apply it to your own pipeline", more, _apply_lines(name)))
    else:
        command = f"adopt sample --study {name} --out {name}.png{tail}"
        steps.append(_step("Draw images", f"No script: {refused}.", command))
    surer = (
        f"adopt score --study {name} --images 10000 --banks 5{tail}\n"
        f"adopt run --study {name} --set search.trials={2 * report.config.search.trials}{tail}"
    )
    steps.append(_step("Be surer", "Score it on more images, or search on from where this study stands:", surer))
    files = "".join(_file(FILES[form].format(name), text) for form, text in texts.items())
    return (
        '<section id="apply">\n<h2>How to apply it</h2>\n<p>The model stays as it is: nothing was trained. '
        f"This page carries the schedule as files.</p>\n{files}\n"
        f'<ol class="steps">\n{"".join(steps)}</ol>\n</section>\n'
    )


def _exports(report: StudySummary) -> tuple[dict[str, str], str]:
    """Text of every export that this model allows, and why another is not among them."""
    result, texts, refused = result_of(report), {}, ""
    for form in FILES:
        try:
            texts[form] = result_text(result, form)
        except AdoptError as error:
            refused = str(error).partition(";")[0]
    return texts, refused


def _apply_lines(name: str) -> str:
    return (
        f'from autodiffusion_optuna import apply, remove\n\napply(pipe, "{name}.json")\n'
        "images = pipe(...).images\nremove(pipe)  # the pipeline is as it was"
    )


def _step(title: str, text: str, code: str) -> str:
    return f"<li><h3>{escape(title)}</h3><p>{escape(text)}</p><pre><code>{_code(code.strip())}</code></pre></li>\n"


def _code(text: str) -> str:
    """Escaped, with options that are never broken after their dashes."""
    return re.sub(r"(--[a-z-]+)", r'<span class="whole">\1</span>', escape(text))


def _file(name: str, content: str) -> str:
    """A link that saves a file which the page itself holds."""
    data = base64.b64encode(content.encode()).decode("ascii")
    source = f"data:application/octet-stream;base64,{data}"
    return f'<a class="file" download="{escape(name)}" href="{source}">{escape(name)}</a>'


# Settings and provenance


def _provenance(report: StudySummary) -> str:
    config, attrs = report.config, report.attrs
    facts = attrs.get(MODEL_FACTS, {})
    score, search, held_out = config.score, config.search, report.best.held_out if report.best else None
    rows = {
        "model": " · ".join(filter(None, (config.model.source, facts.get("kind")))),
        "model's SHA-256": attrs.get("model"),
        "labels or prompts": attrs.get("conditions"),
        "sampling": _sampling(report),
        "search": f"preset {search.preset}, {search.trials:,} candidates, seed {search.seed}",
        "value": f"{report.metric} of {score.images:,} images a candidate, noise seed {score.seed}, bank {SEARCH_BANK}",
        "held-out noise": f"{held_out.banks} banks (1 to {held_out.banks}) of {held_out.images:,} images"
        if held_out
        else None,
        "extractor": f"{score.extractor}, fingerprint {attrs.get('extractor')}",
        "reference": f"{report.reference_name}, digest {attrs.get('reference')}",
        "network evaluations": f"{report.total('run'):,.0f} run, {report.total('saved'):,.0f} saved",
        "time": _time(report),
        "begun with": f"adopt {attrs.get(VERSION, 'unknown')}",
        "settings' fingerprint": config.fingerprint(),
    }
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>\n" for key, value in rows.items() if value)
    settings = flatten(config.model_dump(mode="json", exclude_defaults=True))
    text = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items())
    return (
        f'<section id="provenance">\n<h2>Settings and provenance</h2>\n<dl class="facts">\n{listed}</dl>\n'
        f"<details><summary>The study&rsquo;s settings</summary><pre><code>{escape(text)}</code></pre></details>\n"
        "</section>\n"
    )


def _sampling(report: StudySummary) -> str:
    sampling, attrs = report.config.sampling, report.attrs
    low, high = sampling.step_bounds
    steps = f"{low}" if low == high else f"{low} to {high}"
    times = _mapping(attrs.get("codec")).get("T")
    solver = ", ".join(sampling.solver) if isinstance(sampling.solver, list) else sampling.solver
    return f"solver {solver}, {steps} steps" + (f" of {times:,} model times" if times else "")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _time(report: StudySummary) -> str | None:
    """When the study ran, and the seconds its trials took."""
    begun = min((t.datetime_start for t in report.finished if t.datetime_start), default=None)
    ended = max((t.datetime_complete for t in report.finished if t.datetime_complete), default=None)
    if begun is None or ended is None:
        return None
    return f"{begun:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M}, {report.wall_seconds:,.0f} s in trials"
