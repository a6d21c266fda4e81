"""Prompts of a text-to-image model, read from a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from autodiffusion_optuna.errors import ConfigError, choose_from
from autodiffusion_optuna.files import START, not_content

KEYS = ("prompt", "caption", "text")
"""Where a csv column or a jsonl field of prompts is looked for, in this order and in any case of letters."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a UTF-8 file, in its order; a prompt may occur more than once, and empty ones are left out.

    ``.txt``: one a line. ``.csv``: the column ``prompt``, ``caption`` or ``text`` of a table whose first row names its
    columns, or its only column. ``.jsonl``: one object a line with such a field. ``.json``: COCO captions
    (arXiv 1504.00325); of each image the caption with the lowest id, images by id.
    ``ConfigError`` where the file is missing, of another kind, damaged or without prompts.
    """
    check_prompt_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a file of prompts") from error
    if text and (reason := not_content(text[:START].encode())):
        raise ConfigError(f"{path}: {reason}")
    read = (prompt.strip() for prompt in READERS[path.suffix.lower()](text, path))
    prompts = tuple(prompt for prompt in read if prompt)
    if not prompts:
        raise ConfigError(f"{path}: holds no prompts; give at least one")
    return prompts


def check_prompt_file(path: Path) -> None:
    """``ConfigError`` where the file is missing or of another kind; it is not read."""
    if path.suffix.lower() not in READERS:
        raise ConfigError(f"{path}: {choose_from('kind of prompt file', path.suffix, READERS)}")
    if not path.exists():
        raise ConfigError(f"{path}: cannot be read (there is no such file); give a file of prompts")


def _read_csv(text: str, path: Path) -> Iterable[str]:
    table = csv.DictReader(io.StringIO(text, newline=""))
    prompts = []
    try:
        columns = table.fieldnames or []
        if len(columns) == 1 and (mark := next((mark for mark in ";\t|" if mark in columns[0]), None)):
            raise ConfigError(f"{path}: its columns are separated by {mark!r}; save it as csv with commas")
        column = _find_key(columns) or (columns[0] if len(columns) == 1 else None)
        if columns and column is None:
            raise ConfigError(
                f"{path}: none of its {len(columns)} columns ({', '.join(columns)[:200]}) is named "
                f"{' or '.join(KEYS)}; rename the one with the prompts"
            )
        for row in table:
            if None in row:
                raise ConfigError(
                    f"{path}: line {table.line_num} has more than {len(columns)} values; quote prompts with commas"
                )
            prompts.append(row[column] or "")
    except csv.Error as error:
        raise ConfigError(
            f"{path}: cannot be read as csv after line {table.line_num} ({error}); save it again"
        ) from error
    return prompts


def _read_jsonl(text: str, path: Path) -> Iterable[str]:
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = _parse(line, f"{path}: line {number}")
        key = _find_key(record) if isinstance(record, dict) else None
        if key is None or not isinstance(record[key], str):
            raise ConfigError(f"{path}: line {number} is no object with a text named {' or '.join(KEYS)}; add it")
        prompts.append(record[key])
    return prompts


def _read_coco(text: str, path: Path) -> Iterable[str]:
    captions: dict[int, tuple[int, str]] = {}
    data = _parse(text, str(path))
    try:
        for annotation in data["annotations"]:
            image, order, caption = int(annotation["image_id"]), int(annotation["id"]), annotation["caption"]
            if not isinstance(caption, str):
                raise TypeError
            captions[image] = min(captions.get(image, (order, caption)), (order, caption))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: is no file of COCO captions, which has annotations with id, image_id and caption; "
            "write other prompts as txt, csv or jsonl"
        ) from None
    return [captions[image][1] for image in sorted(captions)]


def _find_key(names: Iterable[str] | Mapping[str, Any]) -> str | None:
    """The first of ``KEYS`` among ``names``, as it is written there."""
    written = {name.strip().lower(): name for name in names}
    return next((written[key] for key in KEYS if key in written), None)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read as JSON ({error}); save it again") from error


READERS: dict[str, Callable[[str, Path], Iterable[str]]] = {
    ".csv": _read_csv,
    ".json": _read_coco,
    ".jsonl": _read_jsonl,
    ".txt": lambda text, path: text.split("\n"),  # and not at the rarer separators, which a prompt may hold
}
"""Suffix -> (text, path) -> prompts."""
