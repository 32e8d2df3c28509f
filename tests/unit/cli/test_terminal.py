"""What comes from Redis or a payload steers no terminal, forges no line, and breaks no JSON."""

from __future__ import annotations

import json

import pytest

from asyncq.cli.terminal import json_text, printable, printable_lines

HOSTILE = "é \x1b[2J \r \x85 \u2028 \u202e \x7f \ud800 \0 \U000e0001 \n"


def test_only_visible_characters_and_spaces_are_left() -> None:
    assert printable(HOSTILE).isprintable()
    assert printable("é a\nb\x1b[31m") == r"é a\nb\x1b[31m"


def test_lines_stay_lines_and_those_after_the_first_are_indented() -> None:
    assert printable_lines("a\n\tb\r", "  ") == "a\n          b\\r"


@pytest.mark.parametrize("value", [HOSTILE, {HOSTILE: [HOSTILE]}, ["\U0001f600"]])
def test_json_of_anything_is_one_printable_line_with_the_same_meaning(value: object) -> None:
    text = json_text(value)
    assert text.isprintable()
    assert json.loads(text) == value


def test_json_keeps_letters_readable() -> None:
    assert json_text({"name": "Zoë"}) == '{"name": "Zoë"}'
