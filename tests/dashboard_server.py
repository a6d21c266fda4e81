"""A dashboard served over HTTP while a test runs."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autodiffusion_optuna.report.dashboard import address, make_server
from autodiffusion_optuna.report.shown import WSGIApp


@contextmanager
def serving(app: WSGIApp) -> Iterator[str]:
    """Address of an application while it is served."""
    with make_server(app, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield address(server)
        finally:
            server.shutdown()
            thread.join()


def fetch(url: str) -> Any:
    """The JSON at an address."""
    with urllib.request.urlopen(url) as answer:
        return json.loads(answer.read())
