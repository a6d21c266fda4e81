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
    labels = ("uniform, 3 steps", "adopt, 3 steps")
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
    assert len(plots) == 3
    assert all(plots)
    drawn = ask("[...document.querySelectorAll('.canvas .main-svg')].map(e => e.getBoundingClientRect().width)")
    assert all(200 < one <= width for one in drawn)
    assert ask("document.querySelectorAll('.scatterlayer .trace').length") > 5
    assert ask("document.querySelectorAll('.barlayer .point').length") == 8  # run and saved of four generations
    assert ask("document.querySelectorAll('.plotlylogo, .modebar-btn--logo').length") == 0
    images = ask("[...document.images].map(e => [e.naturalWidth, e.getBoundingClientRect().width])")
    assert len(images) == 16
    assert all(natural == 32 and 50 < shown < 200 for natural, shown in images)
    tops = "[...f.children].map(e => e.getBoundingClientRect().y)"
    pairs = ask(f"[...document.querySelectorAll('.pairs figure')].map(f => {tops})")
    assert all(uniform < best for uniform, best in pairs)
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
    assert 2 <= len(boxes) <= 6
    assert all(abs(float(w) - 595) < 2 and abs(float(h) - 842) < 2 for w, h in boxes)
    assert browser.execute_script("return window.printed") == [680] * 3
    assert browser.execute_script(widths) == before
