"""A study file as it is written for a user: settings with the reason for each, facts, and what is to be filled in."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autodiffusion_optuna.config import FILL_IN, TO_FILL_IN

WIDTH = 120


@dataclass(frozen=True)
class Line:
    """One setting of a section, and why it has this value. ``active`` False: shown, but commented out."""

    key: str
    value: Any
    why: str = ""
    active: bool = True


@dataclass(frozen=True)
class Draft:
    """A study file: facts and remarks as its first lines, then the settings by section (``""``: those above all).

    ``to_fill_in``: the settings, by dotted name, that the user must still give.
    """

    title: str
    facts: Mapping[str, str]
    remarks: tuple[str, ...] = ()
    sections: Mapping[str, list[Line]] = field(default_factory=dict)

    @property
    def to_fill_in(self) -> list[str]:
        """Dotted names of the settings that are left open."""
        lines = ((section, line) for section, lines in self.sections.items() for line in lines)
        return [f"{section}.{line.key}" for section, line in lines if line.active and line.value == FILL_IN]

    def text(self) -> str:
        """The file, in TOML."""
        return "\n".join([*self._head(), *self._body(), ""])

    def _head(self) -> Iterator[str]:
        yield from _comment(self.title)
        yield "#"
        width = max(map(len, self.facts))
        for name, value in self.facts.items():
            yield from _comment(value, f"#   {name:<{width}}  ")
        for remark in self.remarks:
            yield from _comment(f"note: {remark}")
        if self.to_fill_in:
            yield "#"
            yield from _comment(f"TO DO: fill in {' and '.join(self.to_fill_in)} below, where it says {FILL_IN!r}.")

    def _body(self) -> Iterator[str]:
        for section, lines in self.sections.items():
            if not lines:
                continue
            yield ""
            if section:
                yield f"[{section}]" if any(line.active for line in lines) else f"# [{section}]"
            for line in lines:
                yield from _setting(section, line)


def _setting(section: str, line: Line) -> Iterator[str]:
    setting = f"{'' if line.active else '# '}{line.key} = {toml_value(line.value)}"
    if line.active and line.value == FILL_IN:
        what = TO_FILL_IN[f"{section}.{line.key}"]
        yield from _comment(f">>> FILL IN: {what}{'; ' if line.why else ''}{line.why}")
        yield setting
    elif not line.why:
        yield setting
    elif len(short := f"{setting}  # {line.why}") <= WIDTH:
        yield short
    else:
        yield from _comment(line.why)
        yield setting


def _comment(text: str, start: str = "# ") -> list[str]:
    """``text`` as lines of a comment, which begins with ``start``."""
    indent = "#" + " " * (len(start) - 1)
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=indent, break_long_words=False)


def toml_value(value: Any) -> str:
    """A text, a number, a truth value, or a list or table of them, in TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
