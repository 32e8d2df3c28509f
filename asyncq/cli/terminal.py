"""Text for terminals and logs, with what could forge lines or steer a terminal escaped."""

from __future__ import annotations

import json

import typer

__all__ = ["complain", "json_text", "printable", "printable_lines", "say"]


def printable(text: str) -> str:
    r"""Escape what is no visible character or space: a line break becomes `\n`, ESC `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str, indent: str = "") -> str:
    """Escape like `printable`, but keep line breaks; the lines after the first are indented."""
    return f"\n{indent}".join(printable(line.expandtabs()) for line in text.split("\n"))


def json_text(value: object) -> str:
    """Write JSON on one line: letters as they are, what is not printable as JSON's escapes."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Write text, made printable before, to stdout as lines of its own."""
    typer.echo(text)


def complain(text: str) -> None:
    """Write text to stderr, made printable, in the form of typer's own errors."""
    typer.echo(f"Error: {printable_lines(text)}", err=True)
