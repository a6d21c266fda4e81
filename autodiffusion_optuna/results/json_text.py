"""JSON as it is printed and written."""

from __future__ import annotations

import re

# No string of JSON text holds a line break: what begins behind one bracket and ends before another is a list of
# numbers, true, false or null.
LIST_OF_NUMBERS = re.compile(r'\[\n\s*([^\[\]{}"]+?)\n\s*\]')
LONG_STRING = re.compile(r'"((?:[^"\\]|\\.){1000,})"')


def one_line_lists(text: str) -> str:
    """Indented JSON with each list of numbers on a line of its own."""
    return LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def shortened(text: str) -> str:
    """JSON text for the eye: strings of a thousand characters and more, which are packed data, give their length."""
    return LONG_STRING.sub(lambda found: f'"… ({len(found[1]):,} characters)"', text)
