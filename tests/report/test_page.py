"""The report page: true numbers, everything inside it, nothing of the user's taken for HTML; and adopt report."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from command import Adopt, check_refused, listing
from numpy.typing import NDArray
from optuna.trial import create_trial
from PIL import Image

from autodiffusion_optuna.report.page import page
from autodiffusion_optuna.results.held_out import significant
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.search.timesteps import BASELINES
from autodiffusion_optuna.storage.attrs import (
    BASELINE_COSTS,
    BASELINE_KEYS,
    CANDIDATE,
    CONFIG,
    METRIC,
    MODEL_FACTS,
    held_out_key,
)
from autodiffusion_optuna.storage.database import open_storage

LABELS = ("uniform\n3 steps, ddim", "best found\n3 steps, ddim\nFD(pixels) 9.5, held-out")
DASH = "\u2013"
VOID = {"meta", "img", "br", "link", "input"}


class Tree(HTMLParser):
    """Tags of a page in order; fails where they are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for found, attrs in self.tags if found == tag]


def rows(count: int = 3, channels: int = 1, side: int = 8) -> list[tuple[str, NDArray[np.uint8]]]:
    rng = np.random.default_rng(0)
    shape = (count, channels, side, side)
    return [(label, rng.integers(0, 256, shape, dtype=np.uint8)) for label in LABELS]


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_page_says_what_adopt_show_says(quick: optuna.Study, adopt: Adopt) -> None:
    summary = read_summary(quick)
    text = text_of(page(summary))
    shown = json.loads(adopt("show", "--study", "quick", "--json").out)
    lines = {"best found": shown["best"], **{row["name"]: row for row in shown["baselines"]}}
    assert len(lines) == 3 + len(BASELINES)  # the best, and the two that are computed
    for row in summary.rows():
        line = lines[row.name]
        assert (row.value, list(row.candidate.timesteps)) == (line["value"], line["timesteps"])
        difference = summary.difference(row)
        cells = [
            row.name,
            DASH if row.held_out is None else row.held_out.text,
            DASH if difference is None else difference.text,
            DASH if row.value is None else significant(row.value),
            row.timesteps,
        ]
        assert " ".join(cells) in text
    many, real, headline = summary.many_steps, summary.real_floor, summary.headline
    assert many is not None
    assert many.held_out is not None
    assert f"{many.name} {many.held_out.text}" in text
    assert real is not None
    assert real.value is not None
    assert f"real images {significant(real.value)}" in text
    assert headline is not None
    assert headline.difference is not None
    assert f"Three searched steps give FD(pixels) {significant(headline.found_value)} , three uniform ones" in text
    assert f"{headline.change_text}. Difference {headline.difference.text} (95 % interval, paired over" in text
    assert f"FD(pixels) against uniform {headline.change_text} difference, 95 % {headline.difference.text}" in text
    assert "3 \u00d7 64 images from noise that the search never saw" in text
    assert quick.user_attrs["model"] in text
    assert summary.config.fingerprint() in text


def test_everything_is_inside_the_page(quick: optuna.Study) -> None:
    text = page(read_summary(quick), pictures=rows())
    tree = Tree(text)
    for tag, attrs in tree.tags:
        for name in ("src", "href"):
            assert (attrs.get(name) or "data:").startswith("data:"), tag
    assert not tree.having("link")
    assert "plotly.js v" in text
    assert text.count("plotly.js v") == 1
    assert len(text) < 6_000_000
    assert len(text) > 4_000_000
    figures = [attrs for attrs in tree.having("script") if attrs.get("type") == "application/json"]
    assert [attrs["id"] for attrs in figures] == [
        "figure-values",
        "figure-timesteps",
        "figure-history",
        "figure-evaluations",
    ]
    assert [attrs["data-figure"] for attrs in tree.having("div") if "data-figure" in attrs] == [
        attrs["id"] for attrs in figures
    ]


def test_pictures_of_one_noise_stand_below_each_other(quick: optuna.Study) -> None:
    given = rows(3, channels=3)
    images = Tree(page(read_summary(quick), pictures=given)).having("img")
    assert [image["alt"] for image in images] == [
        f"{label.replace(chr(10), ', ')}, noise {n}" for label in LABELS for n in (1, 2, 3)
    ]
    assert [image["class"] for image in images] == ["pixels"] * 3 + ["found pixels"] * 3
    places = [dict(re.findall(r"--(\S+): (\d+);", image["style"] or "")) for image in images]
    assert [place["desk-column"] for place in places] == ["1", "2", "3"] * 2
    assert [place["desk-row"] for place in places] == ["1"] * 3 + ["2"] * 3
    for index, image in enumerate(images):
        head, _, data = (image["src"] or "").partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as drawn:
            assert np.array_equal(np.moveaxis(np.asarray(drawn), -1, 0), given[index // 3][1][index % 3])


def test_large_pictures_are_reduced(quick: optuna.Study) -> None:
    for image in Tree(page(read_summary(quick), pictures=rows(1, 3, 512))).having("img"):
        with Image.open(io.BytesIO(base64.b64decode((image["src"] or "").partition(",")[2]))) as drawn:
            assert drawn.size == (192, 192)


def test_the_files_that_the_page_carries_are_the_exports(quick: optuna.Study, adopt: Adopt) -> None:
    links = {a["download"]: a["href"] or "" for a in Tree(page(read_summary(quick))).having("a") if a.get("download")}
    exported = adopt("export", "--study", "quick", "--format", "json").out
    assert list(links) == ["quick.json"]  # nothing that diffusers loads
    assert json.loads(base64.b64decode(links["quick.json"].partition(",")[2])) == json.loads(exported)


def test_a_model_of_diffusers_comes_with_its_script(quick: optuna.Study, adopt: Adopt) -> None:
    config = quick.user_attrs[CONFIG]
    config["model"]["source"] = "digits"
    quick.set_user_attr(CONFIG, config)
    facts = {"kind": "DDIMPipeline", "prediction": "epsilon", "shape": [1, 28, 28], "image_shape": [1, 28, 28]}
    quick.set_user_attr(MODEL_FACTS, {**quick.user_attrs[MODEL_FACTS], **facts, "guidance": "none", "scale": 1.0})
    text = page(read_summary(quick))
    links = {a["download"]: a["href"] or "" for a in Tree(text).having("a") if a.get("download")}
    assert list(links) == ["quick.json", "quick.py", "quick-sigmas.txt"]
    script = base64.b64decode(links["quick.py"].partition(",")[2]).decode()
    assert script == adopt("export", "--study", "quick", "--format", "diffusers").out
    assert "".join(script.split()) in "".join(text_of(text).split())
    assert 'apply(pipe, "quick.json")' in text_of(text)


def test_what_users_write_is_not_html(quick: optuna.Study) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    config = quick.user_attrs[CONFIG]
    config["description"] = evil
    config["model"]["source"] = evil
    config["score"]["reference"] = evil
    quick.set_user_attr(CONFIG, config)
    quick.set_user_attr(METRIC, evil)
    quick.set_user_attr("extractor", evil)
    baselines = {
        f"{name}{evil}" if name != "uniform" else name: key for name, key in quick.user_attrs["baselines"].items()
    }
    quick.set_user_attr(BASELINE_COSTS, dict.fromkeys(baselines, 1.0))
    quick.set_user_attr(BASELINE_KEYS, baselines)
    text = page(
        read_summary(quick), pictures=[(evil, images) for _, images in rows()], notes=[evil], tail=evil, written=evil
    )
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert len(Tree(text).having("img")) == 6
    assert not any("onerror" in attrs for _, attrs in Tree(text).tags)
    assert text_of(text).count("alert(1)") > 5  # shown as it was written


def test_a_difference_that_may_be_chance_is_pointed_out(quick: optuna.Study) -> None:
    summary = read_summary(quick)
    assert summary.best is not None
    key = held_out_key(summary.best.candidate.key, 64, 3)
    quick.set_user_attr(key, {"images": 64, "values": [1.0, 2.0, 30000.0]})
    assert "The difference may be chance; score on more" in text_of(page(read_summary(quick)))
    quick.set_user_attr(key, {"images": 64, "values": [1.0, 2.0, 3.0]})
    assert "may be chance" not in text_of(page(read_summary(quick)))


@pytest.mark.parametrize(("best", "uniform"), [(-0.01, 0.5), (0.01, -0.5), (0.01, 0.0)])
def test_where_there_is_no_share_of_uniforms_value_none_is_named(
    quick: optuna.Study, best: float, uniform: float
) -> None:
    summary = read_summary(quick)
    assert summary.best is not None
    assert summary.best.held_out is not None
    found = replace(summary.best, held_out=replace(summary.best.held_out, values=(best,) * 3))
    baselines = [
        replace(k, held_out=k.held_out and replace(k.held_out, values=(uniform,) * 3)) if k.name == "uniform" else k
        for k in summary.baselines
    ]
    text = text_of(page(replace(summary, baselines=baselines, best=found)))
    assert f"three uniform ones {significant(uniform)} . Difference" in text
    assert "FD(pixels) against uniform \u2013" in text
    assert " lower ." not in text


def test_without_held_out_scores_the_page_says_so(folder: Path) -> None:
    from autodiffusion_optuna.config import load_config
    from autodiffusion_optuna.study import components, lifecycle, loop

    parts = components.build(load_config(folder / "quick.toml", ["search.trials=9"]))
    database = open_storage("sqlite:///adopt.db")
    opened = lifecycle.open_study(parts, database)
    empty = text_of(page(read_summary(opened)))
    assert "No candidate is finished yet: adopt run --study quick" in empty
    assert "plotly" not in page(read_summary(opened))
    loop.work(parts, opened, database)
    text = text_of(page(read_summary(opened)))
    assert "Measured on the search\u2019s own 64 images" in text
    assert "held-out noise gives intervals: adopt score --study quick" in text


def test_the_command_writes_a_page_with_pictures(quick: optuna.Study, folder: Path, adopt: Adopt) -> None:
    result = adopt("report", "--study", "quick", "--out", "report.html", "--images", "5")
    assert (result.code, result.out) == (0, "wrote report.html\n"), result
    text = (folder / "report.html").read_text(encoding="utf-8")
    images = Tree(text).having("img")
    assert len(images) == 15
    names = [(image["alt"] or "").partition(",")[0] for image in images]
    assert names == ["uniform"] * 5 + ["best found"] * 5 + ["many steps"] * 5
    assert "many steps 100 steps, ddim" in text_of(text)
    sources = [image["src"] for image in images]
    assert sources[:5] != sources[5:10] != sources[10:]
    plain = adopt("report", "--study", "quick", "--out", "plain.html", "--no-pictures")
    assert plain.code == 0
    assert all(line.startswith("warning:") for line in plain.err.splitlines())  # those of the study
    assert not Tree((folder / "plain.html").read_text(encoding="utf-8")).having("img")


def test_a_winner_found_while_the_page_is_drawn_is_not_mixed_in(
    quick: optuna.Study, folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autodiffusion_optuna.cli import views

    drawn = []

    def load_and_find(*arguments: Any) -> Any:
        uniform = quick.trials[0]
        better = create_trial(values=[0.001], user_attrs={**uniform.user_attrs, CANDIDATE: "9,8,7"})
        quick.add_trial(better)
        study, parts = load_components(*arguments)
        sample = parts.images.sample
        monkeypatch.setattr(
            type(parts.images), "sample", lambda self, c, *rest, **more: drawn.append(c) or sample(c, *rest, **more)
        )
        return study, parts

    load_components = views.load_image_components
    monkeypatch.setattr(views, "load_image_components", load_and_find)
    best = read_summary(quick).best
    assert best is not None
    assert best.held_out is not None
    assert adopt("report", "--study", "quick", "--out", "report.html", "--images", "1").code == 0
    assert drawn[1] == best.candidate
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert f"FD(pixels) {significant(best.held_out.mean)} ," in text_of(text)
    (link,) = [a["href"] or "" for a in Tree(text).having("a") if a.get("download")]
    assert json.loads(base64.b64decode(link.partition(",")[2]))["timesteps"] == list(best.candidate.timesteps)


def test_without_the_model_the_page_has_no_pictures(
    quick: optuna.Study, folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick.user_attrs[CONFIG]
    config["model"]["source"] = "moved/away"
    quick.set_user_attr(CONFIG, config)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = adopt("report", "--study", "quick", "--out", "report.html")
    assert result.code == 0, result
    (warning,) = [line for line in result.err.splitlines() if "the page has no pictures" in line]
    assert warning.startswith("warning:")
    assert "moved/away" in warning
    assert not Tree((folder / "report.html").read_text(encoding="utf-8")).having("img")


def test_a_page_that_cannot_be_written_is_one_line(quick: optuna.Study, folder: Path, adopt: Adopt) -> None:
    before = listing(folder)
    check_refused(adopt("report", "--study", "quick", "--out", "no/where.html"), "folder 'no' for the page", "--out")
    check_refused(adopt("report", "--study", "quick", "--out", "."), "is a folder", "report.html")
    check_refused(adopt("report", "--study", "quik", "--out", "a.html"), "unknown study 'quik'", "'quick'")
    check_refused(adopt("report", "--study", "quick"), "--out")
    check_refused(adopt("report", "--study", "quick", "--out", "a.html", "--images", "0"), "--images")
    check_refused(adopt("report", "--study", "quick", "--out", "/proc/a.html", "--no-pictures"), "cannot write")
    assert listing(folder) == before


def test_commands_on_the_page_name_the_database_without_its_password(quick: optuna.Study) -> None:
    from autodiffusion_optuna.storage.url import storage_option

    tail = storage_option("postgresql+psycopg://me:secret@host/db")
    text = text_of(page(read_summary(quick), tail=tail))
    assert "adopt export --study quick --format json --out . --storage 'postgresql+psycopg://me:***@host/db'" in text
    assert "secret" not in text
    assert storage_option("sqlite:///adopt.db") == ""
