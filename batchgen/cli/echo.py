"""Prints to the terminal, with control characters escaped: names may come from untrusted data."""

from __future__ import annotations

import json

import click

from batchgen.plain_text import plain


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print text on stdout, or on stderr; control characters are shown as escapes."""
    click.echo(plain(text), err=err, nl=nl)


def echo_json(tree: object, indent: int | None = None) -> None:
    """Print a value as JSON on stdout; JSON escapes control characters."""
    click.echo(json.dumps(tree, indent=indent).replace("\x7f", "\\u007f"))
