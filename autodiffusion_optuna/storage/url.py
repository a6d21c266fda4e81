"""URLs of databases: what the user gives, what others may read of it, and how it is connected to."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from autodiffusion_optuna.errors import StorageError

SECRET = "pass|secret|token|key"
"""What the names of secrets in a URL's query hold."""
DEFAULT_URL = "sqlite:///adopt.db"
ENVIRONMENT = "ADOPT_STORAGE"
BUSY_TIMEOUT = 60
"""Seconds to wait for another process's SQLite lock."""
LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""A server that falls silent is known to be away within the minute; by default that takes many."""
PYTHON_ONLY = {"autocommit", "row_factory", "cursor_factory", "context"}
"""Options of psycopg that take objects: any text would count as true, and a study would not be written whole."""


def storage_url(given: str | None) -> str:
    """The database URL to use: the one given, else ``ADOPT_STORAGE``, else ``adopt.db`` in the current folder.

    A bare path is a SQLite file; ``postgresql://`` gets the psycopg 3 driver.
    """
    text = given or os.environ.get(ENVIRONMENT) or DEFAULT_URL
    if "://" not in text:
        # A drive letter or a word with a colon would be a broken URL rather than a file's name.
        if not text.strip() or ":" in text:
            raise StorageError(
                f"storage {text!r} is no database URL; "
                "use sqlite:///FILE.db, a path, or postgresql+psycopg://USER@HOST/DB"
            )
        return f"sqlite:///{text}"
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", text)


def sqlite_path(url: str) -> Path | None:
    """File of a SQLite URL; None for other databases."""
    parsed = parse_url(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def is_of_this_host(url: str) -> bool:
    """Whether other hosts cannot reach the database: a file, this process's memory, or a server at this host's own
    address."""
    parsed = parse_url(url)
    host = parsed.host or str(parsed.query.get("host", ""))  # of Postgres a folder, or none, is a socket
    server = parsed.get_backend_name() != "sqlite"
    return not server or host in ("", "localhost", "::1") or host.startswith(("/", "127."))


def hide_password(url: str) -> str:
    """The URL with its password starred, and whatever else may be a secret in its query, for messages."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or "@" in (parsed.host or ""):
        return re.sub(rf"(?i)([?&][^=&]*(?:{SECRET})[^=&]*=)[^&]*", r"\1***", re.sub(r"//.*@", "//***@", url))
    hidden = {name: "***" for name in parsed.query if re.search(SECRET, name, re.IGNORECASE)}
    shown = parsed.update_query_dict(hidden).render_as_string(hide_password=True)
    return shown.replace("%2A%2A%2A", "***")


def storage_option(url: str) -> str:
    """``" --storage URL"`` as a shown command needs it, its password starred; empty for the default database."""
    return "" if url == storage_url(None) else f" --storage {shlex.quote(hide_password(url))}"


def escaped(url: str) -> str:
    """The URL as Optuna takes it, which fills in what stands in braces."""
    return url.replace("{", "{{").replace("}", "}}")


def parse_url(url: str) -> URL:
    """SQLAlchemy's URL of a database (StorageError where it is none)."""
    try:
        parsed = make_url(url)
        parsed.get_dialect()().create_connect_args(parsed)  # reads the options of the query
    except (ArgumentError, SQLAlchemyError, ImportError, ValueError) as error:
        raise StorageError(
            f"storage {hide_password(url)!r} is no database URL ({str(error).splitlines()[0]}); "
            "use sqlite:///FILE.db or postgresql+psycopg://USER@HOST/DB"
        ) from None
    if "@" in (parsed.host or ""):
        raise StorageError("the user or the password of the storage URL holds an @; write it there as %40")
    engine_options(parsed)
    return parsed


def engine_options(url: URL) -> dict[str, Any]:
    """How the database at ``url`` is connected to (StorageError for options that cannot be meant)."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {} if "timeout" in url.query else {"timeout": BUSY_TIMEOUT}}
    for name in PYTHON_ONLY & url.query.keys():
        raise StorageError(f"{name}={url.query[name]} in the storage URL is not for text; leave it out")
    driver = url.get_driver_name()
    libpq = LIBPQ if driver in ("psycopg", "psycopg2") else {}
    given: dict[str, Any] = {name: value for name, value in libpq.items() if name not in url.query}
    if driver == "psycopg":
        # Statements are prepared in one of the server's sessions, but a pooler may give each transaction another one.
        # This option is Python's, and needs a number; all others are the C library's, which reads text.
        threshold = url.query.get("prepare_threshold", "none")
        if threshold != "none" and not str(threshold).isdecimal():
            raise StorageError(
                f"prepare_threshold={threshold} in the storage URL is no whole number; give one, or leave it out"
            )
        given["prepare_threshold"] = None if threshold == "none" else int(str(threshold))
    return {"pool_pre_ping": True, "connect_args": given}
