"""The report page in a real browser: on a desk, on a phone, and on paper."""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from selenium import webdriver

from autodiffusion_optuna.report.page import page
from autodiffusion_optuna.results.summary import read_summary

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def written(quick: optuna.Study, folder: Path) -> Path:
    rng = np.random.default_rng(0)
    labels = (
        "uniform\n3 steps, ddim",
        "best found\n3 steps, ddim\nFD(pixels) 12.3, held-out",
        "many steps\n100 steps, ddim",
    )
    pictures = [(label, rng.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)) for label in labels]
    path = folder / "report.html"
    path.write_text(
        page(read_summary(quick), pictures=pictures, notes=["a warning"], written="2025-01-01"), encoding="utf-8"
    )
    return path


def resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    """Set the size of the viewport, which a window cannot have below 500 pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("ADOPT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def whole_page(browser: webdriver.Chrome, path: Path) -> None:
    """A screenshot of all of the page."""
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(browser: webdriver.Chrome, written: Path, tmp_path: Path, width: int) -> None:
    resize(browser, width, 900)
    browser.get_log("browser")
    browser.get(written.as_uri())

    def ask(script: str) -> Any:
        return browser.execute_script(f"return {script}")

    assert ask("innerWidth") == width
    assert ask("document.scrollingElement.scrollWidth") <= width
    plots = ask("[...document.querySelectorAll('.canvas')].map(e => e.querySelectorAll('.main-svg').length)")
    assert len(plots) == 4
    assert all(plots)
    drawn = ask("[...document.querySelectorAll('.canvas .main-svg')].map(e => e.getBoundingClientRect().width)")
    assert all(200 < one <= width for one in drawn)
    assert ask("document.querySelectorAll('.scatterlayer .trace').length") > 5
    assert ask("document.querySelectorAll('.barlayer .point').length") == 8  # run and saved of four generations
    assert ask("document.querySelectorAll('.plotlylogo, .modebar-btn--logo').length") == 0
    images = ask("[...document.images].map(e => [e.naturalWidth, e.getBoundingClientRect().width])")
    assert len(images) == 24
    assert all(natural == 32 and 50 < shown < 200 for natural, shown in images)
    boxes = "[...document.querySelectorAll('.pictures img')].map(e => { const b = e.getBoundingClientRect(); return "
    places = ask(f"{boxes}[e.alt, Math.round(b.x), Math.round(b.y)]; }})")
    columns = {n: [(x, y) for alt, x, y in places if alt.endswith(f"noise {n}")] for n in range(1, 9)}
    for column in columns.values():  # uniform, best found and many steps of one noise stand below each other
        assert len({x for x, _ in column}) == 1
        assert [y for _, y in column] == sorted({y for _, y in column})
    assert len({column[0] for column in columns.values()}) == 8
    shown = "[...document.querySelectorAll('.caption')].filter(e => e.offsetParent).map(e => e.innerText)"
    assert len(ask(shown)) == (3 if width > 640 else 6)
    # The table shows its last timestep and, second, the values on held-out noise.
    inside = "(b => b.width > 0 && b.left >= 0 && b.right <= innerWidth)(r.getBoundingClientRect())"
    last = f"(e => {{ const r = document.createRange(); r.selectNodeContents(e); return {inside}; }})"
    cells = ask(f"[...document.querySelectorAll('td.timesteps')].map({last})")
    assert len(cells) == 15
    assert all(cells)
    held_out = ask(f"[...document.querySelectorAll('td[data-label=held-out]:not(.none)')].map({last})")
    assert len(held_out) > 3
    assert all(held_out)
    second = ask("[...document.querySelectorAll('tbody tr')].map(e => e.children[1].dataset.label)")
    assert set(second) == {"held-out"}
    # Nothing that is read sticks out of the page, in figures neither.
    outside = "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && e.innerText !== '' && "
    assert ask(f"{outside}e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))") == []
    whole_page(browser, screenshots(tmp_path) / f"report-{width}.png")
    assert browser.get_log("browser") == []


def test_the_page_on_paper(browser: webdriver.Chrome, written: Path, tmp_path: Path) -> None:
    """A4 sheets; while they are printed the figures are as wide as the sheet, and afterwards as before."""
    resize(browser, 1280, 900)
    browser.get(written.as_uri())
    widths = "return [...document.querySelectorAll('.canvas')].map(e => e.querySelector('.main-svg').clientWidth)"
    before = browser.execute_script(widths)
    browser.execute_script(
        "addEventListener('beforeprint', () => { window.printed = [...document.querySelectorAll('.canvas')]"
        ".map(e => e.querySelector('.main-svg').clientWidth); })"
    )
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
    content = base64.b64decode(printed["data"])
    (screenshots(tmp_path) / "report.pdf").write_bytes(content)
    assert content.startswith(b"%PDF")
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert 2 <= len(boxes) <= 7
    assert all(abs(float(w) - 595) < 2 and abs(float(h) - 842) < 2 for w, h in boxes)
    assert browser.execute_script("return window.printed") == [680] * 4
    assert browser.execute_script(widths) == before
