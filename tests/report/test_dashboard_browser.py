"""The dashboard in a headless Chromium: columns, pictures, figures and the note are shown."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from dashboard_server import serving
from optuna.artifacts import upload_artifact
from optuna_dashboard import wsgi
from PIL import Image

from autodiffusion_optuna.images import grid_png
from autodiffusion_optuna.report import dashboard
from autodiffusion_optuna.report.shown import PICTURE, SOURCE, TIMESTEPS, in_words
from autodiffusion_optuna.storage.artifacts import COMPARISON, keep_comparison, open_store
from autodiffusion_optuna.storage.attrs import ARTIFACTS, COST, GENERATION, NOTABLE
from autodiffusion_optuna.storage.database import open_storage
from studies import run

webdriver = pytest.importorskip("selenium.webdriver")

URL = "sqlite:///adopt.db"
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver; apt-get install chromium-driver"
    ),
    # The dashboard computes importances, which warn of parameters that few trials vary.
    pytest.mark.filterwarnings("ignore::UserWarning:optuna"),
    pytest.mark.filterwarnings("ignore:Some regimes"),
]
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--window-size=1280,1000",
)  # fmt: skip
PATIENCE = 60
"""Seconds to wait for a page on a busy machine."""


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def shoot(browser: Any, tmp_path: Path) -> Callable[[str], None]:
    """Save a screenshot under a name, in ``ADOPT_SCREENSHOTS`` or the test's folder."""
    folder = Path(os.environ.get("ADOPT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: browser.save_screenshot(str(folder / f"dashboard-{name}.png"))


def study_with_a_picture(folder: Path) -> tuple[optuna.Study, int]:
    """A finished quick study, one of whose trials has a picture; the number of that trial."""
    study = run(folder / "quick.toml", URL, "search.trials=24")
    location = str(folder / "pictures")
    study.set_user_attr(ARTIFACTS, location)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(folder / "grid.png")
    trial = study.ask()
    upload_artifact(artifact_store=open_store(location), file_path=str(folder / "grid.png"), study_or_trial=trial)
    trial.set_user_attr(NOTABLE, "new best")
    study.tell(trial, 20_000.0)
    rows = [(name, rng.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)) for name in ("uniform", "best found")]
    keep_comparison(study, open_storage(URL), open_store(location), grid_png(rows), "rows")
    return study, trial.number


def test_the_pages_show_what_we_wrote(folder: Path, browser: Any, shoot: Callable[[str], None]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def script(text: str) -> Any:
        return browser.execute_script(f"return {text}")

    def wait(text: str) -> Any:
        return WebDriverWait(browser, PATIENCE).until(lambda _: script(text), text)

    def text() -> str:
        return str(browser.find_element(By.TAG_NAME, "body").text)

    study, pictured = study_with_a_picture(folder)
    dashboard.publish(study, URL)
    store = open_store(str(folder / "pictures"))
    storage = open_storage(URL)
    with serving(in_words(wsgi(storage, artifact_store=store), storage)) as address:
        page = f"{address}/dashboard/studies/{storage.get_study_id_from_name('quick')}"

        browser.get(page)
        wait("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 2")
        wait("document.body.innerText.includes('Best Trial')")
        assert "Failed" not in text()
        wait("Array.from(document.images).some(image => image.src.includes('/artifacts/') && image.naturalWidth > 800)")
        assert COMPARISON in text()
        assert "FD(pixels) of 64 images, lower is better" in text()
        for key in ("unit_costs", "model_facts", "baseline_costs"):
            assert key not in text()
        assert script("document.scrollingElement.scrollWidth") <= 1280
        outside = "e.getBoundingClientRect().right > innerWidth + 1 && e.children.length === 0 && e.innerText"
        assert (
            script(f"[...document.querySelectorAll('td, p, h1, h2')].filter(e => {outside}).map(e => e.innerText)")
            == []
        )
        shoot("study")
        script("[...document.images].find(e => e.src.includes('/artifacts/')).scrollIntoView({block: 'center'})")
        time.sleep(0.5)
        shoot("comparison")
        # Our figures lie below the dashboard's own.
        for title in (
            "Timesteps of the best candidate, by generation",
            "FD(pixels), 64 images, by generation",
            "Network calls",
        ):
            figure = f"[...document.querySelectorAll('.gtitle')].find(e => e.textContent.includes('{title}'))"
            wait(f"{figure} !== undefined")
            script(f"{figure}.closest('.js-plotly-plot').scrollIntoView({{block: 'center'}})")
            time.sleep(0.5)  # what scrolled into view is painted
            shoot(title.partition(" ")[0].partition("(")[0].lower())
        assert "Timesteps of the best candidate" in text()

        browser.get(f"{page}/smartSelection")  # where this dashboard has its table of trials
        wait("document.querySelectorAll('tbody tr').length > 5")
        header = script("Array.from(document.querySelectorAll('th')).map(cell => cell.innerText).join('|')")
        for column in (TIMESTEPS, SOURCE, GENERATION, COST, PICTURE):
            assert f"UserAttribute {column}" in header
        script("document.querySelector('table').scrollIntoView()")
        time.sleep(0.5)
        shoot("table")

        browser.get(f"{page}/trials?numbers={pictured}")
        wait(
            "Array.from(document.images).some(image => image.src.includes('/artifacts/') && image.naturalWidth === 128)"
        )
        assert "picture new best" in text()
        assert script("document.scrollingElement.scrollWidth") <= 1280
        shoot("trial")

        browser.get(f"{page}/note")
        wait("document.querySelector('table') !== null && document.querySelector('pre') !== null")
        assert "best found" in text()
        assert "adopt export --study quick" in text()
        assert 'source = "mixture"' in text()
        shoot("note")
