"""Commands that describe the tasks and make tiny models to try them with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from batchgen.cli.echo import echo
from batchgen.cli.options import main
from batchgen.errors import SpecError

if TYPE_CHECKING:
    from batchgen.spec.tasks import Task


@main.command()
@click.argument("name", required=False)
def tasks(name: str | None) -> None:
    """List the tasks and the columns of their rows, or explain the task NAME.

    \b
    batchgen tasks
    batchgen tasks inpainting
    """
    from batchgen.cli import task_pages

    echo(task_pages.task_page(_task(name)) if name else task_pages.tasks_table())


@main.group()
def models() -> None:
    """Make models for trials and tests."""


@models.command("make-tiny")
@click.argument("task")
@click.argument("folder")
@click.option("--family", help="Model family of the task; default: the first.")
def make_tiny(task: str, folder: str, family: str | None) -> None:
    """Write a tiny model with random weights for TASK to FOLDER.

    The model generates noise, in a second, with the same code as a real model of its family. Use it
    to try a spec or a cluster before you load gigabytes.

    \b
    batchgen models make-tiny super-resolution models/tiny-upscaler
    """
    from batchgen.cli import task_pages

    found = _task(task)
    known = [one.name for one in task_pages.families_of(found)]
    if family not in (None, *known):
        raise SpecError("--family", family, ", ".join(known))
    made = task_pages.make_tiny(found, family or known[0], folder)
    echo(f"a tiny {family or known[0]} model for {task}: {made}")


def _task(name: str) -> Task:
    from batchgen.errors import nearest
    from batchgen.spec.tasks import TASK_NAMES, task_named

    if name not in TASK_NAMES:
        raise SpecError("task", name, f"{', '.join(TASK_NAMES)}{nearest(name, TASK_NAMES)}")
    return task_named(name)
