"""optuna-dashboard as it comes, with a study's pictures, a note that says what it is, and figures. Torch-free."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from optuna.exceptions import ExperimentalWarning, OptunaError
from sqlalchemy.exc import SQLAlchemyError

from autodiffusion_optuna.candidate import resting
from autodiffusion_optuna.config import StudyConfig, flatten
from autodiffusion_optuna.errors import AdoptError, ConfigError
from autodiffusion_optuna.report.figures import FIGURES, nothing
from autodiffusion_optuna.report.shown import WSGIApp
from autodiffusion_optuna.results.held_out import significant
from autodiffusion_optuna.results.summary import StudySummary, banks_of, read_summary
from autodiffusion_optuna.storage import attrs
from autodiffusion_optuna.storage.studies import is_deleted, stored_config
from autodiffusion_optuna.storage.trials import FINISHED, generation_of
from autodiffusion_optuna.storage.url import storage_option

ASSETS = Path(__file__).parent.parent / "assets" / "report"
LOOK_SECONDS = 5.0
"""Time between two looks at whether a generation has finished."""
PLOT_HEIGHT = 450
"""Pixels that the dashboard gives a figure; what is higher would lie over its neighbours."""
SIGNATURE = "*Written by adopt after each generation: write your own notes below this line.*"
"""Last line of the note's part that is rewritten; what stands below it is the user's."""


def require_installed() -> None:
    """ConfigError where optuna-dashboard is missing."""
    try:
        import optuna_dashboard  # noqa: F401
    except ImportError:
        raise ConfigError(
            'the dashboard needs a package that is not installed: pip install "autodiffusion-optuna[dashboard]"'
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread of its own; a picture that loads slowly holds up nothing."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        # Before the socket is made, which the constructor does.
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _QuietHandler)

    def server_bind(self) -> None:
        """Bind without looking the host's name up, which may take seconds where there is no name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of pages that were closed while they loaded."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: a page that is open makes one every few seconds."""


def make_server(app: WSGIApp, host: str, port: int) -> WSGIServer:
    """A threading HTTP server that is bound and not yet serving; port 0 takes a free one.

    Raises ConfigError where the address cannot be bound.
    """
    try:
        server = _Server(host, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot serve on {host} port {port}: {reason}; give another --port or --host") from None
    server.set_app(app)
    return server


def address(server: WSGIServer) -> str:
    """URL of a server."""
    host = str(server.server_address[0])
    return f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}"


@contextmanager
def published(study: optuna.Study, url: str, on_trouble: Callable[[str], None]) -> Iterator[None]:
    """Write note and figures now, and, in a thread, again after each generation.

    ``url``: of the database, for the note. ``on_trouble`` is given one line where that fails, as in a read-only
    database; the dashboard itself goes on.
    """
    stop, looks = threading.Event(), _publish_steadily(study, url, on_trouble)

    def go_on() -> None:
        while not stop.wait(LOOK_SECONDS):
            next(looks)

    next(looks)
    thread = threading.Thread(target=go_on, daemon=True, name="adopt-publisher")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _publish_steadily(study: optuna.Study, url: str, on_trouble: Callable[[str], None]) -> Iterator[None]:
    """At each step, publish where the study has come further since the last one; trouble is reported once."""
    published, reported = None, None
    while True:
        trouble = None
        try:
            progress = _progress(study)
            if progress != published:
                publish(study, url)
                published = progress
        except (AdoptError, OptunaError, SQLAlchemyError, KeyError) as error:
            trouble = str(getattr(error.__cause__, "orig", None) or error).splitlines()[0]
            if isinstance(error, KeyError) and is_deleted(study):
                trouble = f"study {study.study_name!r} was deleted"
            if trouble != reported:
                on_trouble(f"note and figures were not written: {trouble}")
        reported = trouble
        yield


def _progress(study: optuna.Study) -> tuple[int, ...]:
    """What changes when a generation has finished, the budget is met or a candidate got a score on other noise."""
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    generation = max(map(generation_of, finished), default=-1)
    done = len(finished) >= stored_config(study).search.trials
    scores = (f"{attrs.HELD_OUT}:", f"{attrs.VALIDATION}:")
    return generation, int(done), sum(key.startswith(scores) for key in study.user_attrs)


def publish(study: optuna.Study, url: str) -> None:
    """Write the study's note, figures and, where it has none, the name of its value; what did not change is left alone.

    Raises Optuna's StorageInternalError where the database cannot be written.
    """
    from optuna_dashboard import get_note, save_note, save_plotly_graph_object

    summary = read_summary(study)
    if study.metric_names is None:
        with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
            study.set_metric_names([summary.trial_value_name])
    old = get_note(study)
    new = note_text(summary, url) + _users_part(old)
    if new != old:
        save_note(study, new)
    # A figure is kept in rows of 2 kB, written one at a time: slow enough to be left out where it is there already.
    shown: dict[str, str] = study.user_attrs.get(attrs.FIGURE_DIGESTS) or {}
    for name, (title, draw) in FIGURES.items():
        figure = draw(summary)
        if figure is None and name in shown:
            figure = nothing(title)  # the dashboard has no way to take one away
        if figure is None:
            continue
        # The dashboard's buttons stand beside the plot: in a row they would lie over the title.
        figure.update_layout(height=PLOT_HEIGHT, modebar_orientation="v", margin_r=48)
        digest = hashlib.sha256(figure.to_json().encode()).hexdigest()[:12]
        if shown.get(name) != digest:
            save_plotly_graph_object(study, figure, graph_object_id=name)
            shown = {**shown, name: digest}
            study.set_user_attr(attrs.FIGURE_DIGESTS, shown)


def _users_part(note: str) -> str:
    """What the user wrote: all below the signature, or the whole note where it bears none."""
    _, signature, below = note.partition(SIGNATURE)
    return below if signature else f"\n\n{note}" if note else ""


def note_text(summary: StudySummary, url: str) -> str:
    """The study's note in Markdown: best candidate, commands and config. ``url``: of the database."""
    environment = Environment(loader=FileSystemLoader(ASSETS), undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(banks=banks_of, number=significant)
    tail, best = storage_option(url), summary.best
    at_steps = best.candidate.pairs if best else ()
    text = environment.get_template("note.md.j2").render(
        summary=summary,
        config=summary.config,
        best=best,
        rows=[*summary.rows(), *([summary.many_steps] if summary.many_steps else [])],
        headline=summary.headline and summary.headline.text(),
        against=summary.headline.baseline.name if summary.headline else "uniform",
        real=summary.real_floor,
        resting=[f"{t} ({resting(modes).bit_count()})" for t, modes in at_steps if modes],
        size=summary.held_out_size,
        doubts=summary.warnings(tail),
        tail=tail,
        settings=toml(summary.config),
    )
    return f"{text}\n\n{SIGNATURE}"


def toml(config: StudyConfig) -> str:
    """The settings of a study that differ from the defaults, as a study file."""
    table = config.model_dump(mode="json", exclude_defaults=True, exclude={"name", "description", "folder"})
    return "\n\n".join(
        "\n".join(
            [f"[{section}]"]
            + [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in flatten(settings).items()]
        )
        for section, settings in table.items()
    )
