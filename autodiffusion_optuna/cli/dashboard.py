"""``adopt dashboard``: a window to watch a study through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from autodiffusion_optuna.cli.output import StorageUrl, StudyName, existing, say, warn
from autodiffusion_optuna.errors import StorageError

if TYPE_CHECKING:
    import optuna


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
    """Show a study in optuna-dashboard until Ctrl-C. With its pictures, note and figures."""
    from autodiffusion_optuna.report.dashboard import address, is_loopback, make_server, published, require_installed
    from autodiffusion_optuna.report.shown import in_words
    from autodiffusion_optuna.storage.url import storage_url

    require_installed()
    from optuna_dashboard import wsgi

    url = storage_url(storage)
    database, found = existing(study, url)
    app = in_words(wsgi(database, artifact_store=pictures(found, url, artifacts)), database)
    page = f"/dashboard/studies/{database.get_study_id_from_name(study)}"
    with make_server(app, host, port) as server, published(found, url, lambda trouble: warn([trouble])):
        if not is_loopback(host):
            warn([f"anyone who reaches {host} can read and delete the studies: the dashboard has no password"])
        say(f"dashboard of {study}: {address(server)}{page}    (Ctrl-C ends it)")
        server.serve_forever()


def pictures(study: optuna.Study, url: str, given: str | None) -> Any:
    """The store to show pictures from; None, with a warning, where the study's own cannot be opened."""
    from autodiffusion_optuna.storage.artifacts import location_of, open_store
    from autodiffusion_optuna.storage.attrs import ARTIFACTS

    if given is not None:
        return open_store(given, write=False)
    stored = study.user_attrs.get(ARTIFACTS)
    try:
        return None if stored is None else open_store(location_of(stored, url), write=False)
    except StorageError as error:
        warn([f"pictures are not shown: {error}"])
        return None
