"""The command that turns sources of any kind into Parquet: import."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import main, parse_storage_options, storage_option

if TYPE_CHECKING:
    from batchgen.importing.summary import Summary, Tell

_MOST_CLASSES, _MOST_REASONS = 8, 20
_UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Size(click.ParamType[int]):
    """A number of bytes, such as 64M."""

    name = "size"

    def convert(self, value: object, param: object, ctx: object) -> int:
        text = str(value)
        unit = text[-1:] if text[-1:] in _UNITS else ""
        number = text.removesuffix(unit)
        if not number.isdecimal() or int(number) < 1:
            self.fail(f"{text!r}; allowed: a number of bytes, such as 64M or 1G")
        return int(number) * _UNITS[unit]


class Share(click.FloatRange):
    """A fraction from 0 to 1."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)


@main.command("import")
@click.argument("source")
@click.argument("out", metavar="OUT")
@click.option("--kind", metavar="KIND", help="What SOURCE is; default: guessed from its files.")
@click.option(
    "--images",
    type=click.Choice(("bytes", "reference")),
    help="Copy image files into the rows, or keep only their path or URL. [default: bytes for "
    "local files, reference for URLs]",
)
@click.option(
    "--image-root",
    metavar="FOLDER",
    help="Folder or URL that relative names of images start from; default: that of SOURCE.",
)
@click.option("--prompt", metavar="TEXT", help="Prompt of each row; {label} is its class.")
@click.option("--limit", type=click.IntRange(1), help="Import only the first rows.")
@click.option(
    "--file-bytes", type=Size(), default="256M", help="Most bytes of a file, if OUT is a folder."
)
@click.option(
    "--rejected-limit",
    type=Share(),
    default=0.1,
    show_default=True,
    help="Fraction of the rows that may be rejected; above it the exit code is 2.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier import at OUT.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def import_(
    source: str,
    out: str,
    kind: str | None,
    images: str | None,
    image_root: str | None,
    prompt: str | None,
    limit: int | None,
    file_bytes: int,
    rejected_limit: float,
    overwrite: bool,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Turn SOURCE into Parquet with the columns that `run` knows.

    SOURCE is a file, a folder, a glob or a URL: CSV, JSON Lines, text (one prompt a line), a folder
    of images, COCO, YOLO, Pascal VOC, WebDataset, a Hugging Face dataset folder, or a list of class
    names (--kind classes). OUT is a file, if it ends in .parquet, else a folder of files. Rows that
    cannot be imported are listed, with a reason, in a file next to OUT whose name ends in
    -rejects.parquet.

    \b
    batchgen import photos/ photos.parquet
    batchgen import coco/ coco.parquet
    batchgen import classes.txt classes.parquet --kind classes
    """
    from batchgen.importing.target import target_at
    from batchgen.importing.work import import_source, source_at
    from batchgen.storage import absolute, configure

    configure(parse_storage_options(storage_options))
    target = target_at(out if "://" in out else absolute(out), file_bytes)
    target.refuse_unless_free(overwrite)
    mode = {"bytes": "bytes", "reference": "reference"}.get(images or "")
    found = source_at(source, kind, mode, image_root, prompt)  # type: ignore[arg-type]
    summary = import_source(found, target, limit, _tell(as_json))
    if as_json:
        echo_json(asdict(summary))
    else:
        echo("\n".join(summary_lines(summary, out)))
    if summary.share_rejected > rejected_limit:
        _say_above(summary, rejected_limit)
        return 2
    return 0


def _tell(quiet: bool) -> Tell:
    from batchgen.cli.progress_lines import ImportLines

    return (lambda summary: None) if quiet else ImportLines()


def _say_above(summary: Summary, limit: float) -> None:
    echo(
        f"batchgen: {summary.share_rejected:.0%} of the rows were rejected, and --rejected-limit "
        f"allows {limit:.0%}; read {summary.rejects}, or allow more",
        err=True,
    )


def summary_lines(summary: Summary, out: str) -> list[str]:
    """What was imported, what was rejected, and the next command."""
    lines = [
        f"{summary.target}: {summary.rows:,} rows from {summary.source} ({summary.kind})",
        f"images    {summary.images:,}{' by reference' if summary.images_are != 'bytes' else ''}",
    ]
    if summary.objects:
        lines.append(f"objects   {summary.objects:,}")
    if summary.classes:
        lines.append(f"classes   {_counts(summary.classes, _MOST_CLASSES)}")
    if summary.splits:
        lines.append(f"splits    {_counts(summary.splits, _MOST_CLASSES)}")
    lines.append(f"rejected  {summary.rejected:,}")
    for reason, count in list(summary.reasons.items())[:_MOST_REASONS]:
        lines.append(f"  {count:,} {reason}, such as: {summary.examples[reason]}")
    if summary.rejects:
        lines.append(f"  all of them: {summary.rejects}")
    lines += [f"note      {note}" for note in summary.notes]
    return [*lines, f"next      {next_command(summary, out)}"]


def _counts(counts: dict[str, int], most: int) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:most]]
    more = [f"and {len(counts) - most:,} more"] if len(counts) > most else []
    return f"{len(counts):,}: {', '.join([*shown, *more])}"


def next_command(summary: Summary, out: str) -> str:
    """The command that generates images from the imported rows."""
    words = ["batchgen", "run"]
    if "prompt" not in summary.columns and "image" in summary.columns:
        words += ["--task", "image-to-image"]
    if {"objects", "label_mask"} & summary.columns.keys() and "--task" in words:
        words += ["--strength", "0.4"]  # labels.max_strength is 0.5
    words += ["--input", out, "--output", "out/images"]
    if summary.roots:
        words += ["--set", f"input.uri_roots=[{', '.join(summary.roots)}]"]
    return shlex.join(words)
