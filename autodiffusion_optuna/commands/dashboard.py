"""``adopt dashboard``: a window to watch a study through."""

from __future__ import annotations

from typing import Annotated

import typer

from autodiffusion_optuna.commands.output import StorageUrl, StudyName, existing, say, warn


def dashboard(
    study: StudyName,
    storage: StorageUrl = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8080,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; the default is this machine's own.")] = (
        "127.0.0.1"
    ),
    artifacts: Annotated[
        str | None, typer.Option("--artifacts", help="Where the pictures are, if not where the study says.")
    ] = None,
) -> None:
    """Serve optuna-dashboard with this study's pictures, note and figures until Ctrl-C."""
    from autodiffusion_optuna import dashboard as server
    from autodiffusion_optuna import records
    from autodiffusion_optuna.artifacts import open_store
    from autodiffusion_optuna.storage import storage_url

    server.require_installed()
    url = storage_url(storage)
    found = existing(study, url)[1]
    location = artifacts or found.user_attrs.get(records.ARTIFACTS)
    # The study's own storage keeps finished trials: pages and figures share them.
    app = server.make_app(found._storage, None if location is None else open_store(location))
    listening = server.make_server(app, host, port)
    with listening, server.published(found, url, lambda trouble: warn([trouble])):
        if not server.is_loopback(host):
            warn([f"anyone who reaches {host} can read and delete the studies: the dashboard has no password"])
        say(f"dashboard of {study}: {server.study_address(listening, found)}    (Ctrl-C ends it)")
        listening.serve_forever()
