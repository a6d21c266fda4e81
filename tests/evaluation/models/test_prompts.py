from __future__ import annotations

import json
from pathlib import Path

import pytest

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.models.prompts import read_prompts

COCO = {
    "images": [{"id": 9}, {"id": 4}],
    "annotations": [
        {"id": 30, "image_id": 9, "caption": "a dog"},
        {"id": 12, "image_id": 4, "caption": "two cats, late"},
        {"id": 11, "image_id": 4, "caption": "a cat\n"},
    ],
}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "a cat\n\n  a dog \r\na cat", ("a cat", "a dog", "a cat")),
        ("p.txt", "line\u2028separator", ("line\u2028separator",)),
        ("p.TXT", "\ufeffein Kätzchen\n", ("ein Kätzchen",)),
        ("p.csv", 'id,prompt\n1,"a cat, black"\n2,a dog\n3,\n', ("a cat, black", "a dog")),
        ("p.csv", "text,Caption\nwrong,right\n", ("right",)),
        ("p.csv", 'words\na cat\n"two\nlines"\n', ("a cat", "two\nlines")),
        ("p.jsonl", '{"caption": "a cat"}\n\n{"text": "a dog", "prompt": "a duck"}\n', ("a cat", "a duck")),
        ("p.jsonl", '{"prompt": "line\u2028separator"}', ("line\u2028separator",)),
        ("p.json", json.dumps(COCO), ("a cat", "a dog")),
    ],
)
def test_every_kind_of_file_is_read_in_order(tmp_path: Path, name: str, text: str, expected: tuple[str, ...]) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_prompts(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.txt", b" \n\n", "holds no prompts"),
        ("p.csv", b"", "holds no prompts"),
        ("p.csv", b"prompt\n", "holds no prompts"),
        ("p.json", b'{"annotations": []}', "holds no prompts"),
        ("p.txt", "Kätzchen".encode("latin-1"), "is not UTF-8 text (byte 1)"),
        ("p.parquet", b"PAR1", "unknown kind of prompt file '.parquet'"),
        ("p.csv", b"id,title\n1,a cat\n", "none of its 2 columns (id, title) is named prompt or caption or text"),
        ("p.csv", b"prompt\na cat, black\n", "line 2 has more than 1 values; quote prompts with commas"),
        ("p.csv", b"prompt\n" + b"a" * 200_000, "cannot be read as csv after line 1"),
        ("p.jsonl", b'{"prompt": "a cat"}\n{"title": "a dog"}', "line 2 is no object with a text named prompt or"),
        ("p.jsonl", b'["a cat"]', "line 1 is no object"),
        ("p.jsonl", b'{"prompt": 3}', "line 1 is no object with a text"),
        ("p.jsonl", b'{"prompt": "a cat"', "line 1: cannot be read as JSON"),
        ("p.json", b"{", "cannot be read as JSON"),
        ("p.json", b'["a cat"]', "is no file of COCO captions"),
        ("p.json", b'{"annotations": [{"id": 1, "image_id": 1, "caption": 2}]}', "is no file of COCO captions"),
    ],
)
def test_files_without_prompts_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert reason in message
    assert "\n" not in message


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path / "folder.txt"):
        if path.stem == "folder":
            path.mkdir()
        with pytest.raises(ConfigError, match="cannot be read"):
            read_prompts(path)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_separators_of_a_table_are_refused(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt{mark}n\na cat{mark}1\n")
    with pytest.raises(ConfigError, match="columns are separated by"):
        read_prompts(path)
