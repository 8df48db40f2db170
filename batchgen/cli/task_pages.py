"""Describes the tasks: the columns of each, the models that support it, and an example spec."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from batchgen.errors import UsageError
from batchgen.families import FAMILIES, Family
from batchgen.images.conditions import MAKERS, Maker, Optioned
from batchgen.labels.makers import LABEL_MAKERS
from batchgen.spec.approximate import METHODS
from batchgen.spec.sections import Columns, Sampling
from batchgen.spec.tasks import TASKS, Task, is_image

_WIDTH = 96
_GUIDANCE = {
    "negative": "classifier-free, against the negative prompt",
    "null": "classifier-free, against no condition",
    "embedded": "a number that the model reads",
    "none": "none",
}


def families_of(task: Task) -> list[Family]:
    """Return the families of a task, in the catalogue's order."""
    return [family for family in FAMILIES if family.task == task.name]


def tasks_table() -> str:
    """Describe each task in a paragraph: what it generates, its columns, its families."""
    blocks = []
    for task in TASKS:
        needs = ", ".join(task.needs) or "none"
        names = ", ".join(family.name for family in families_of(task))
        lines = [f"{task.name}: {task.about}"]
        lines += _hanging("  needs    ", needs)
        lines += _hanging("  takes    ", ", ".join(task.takes))
        lines += _hanging("  models   ", names)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def task_table() -> str:
    """Make the table of tasks for ``docs/tasks.md``, with a link to the page of each."""
    lines = [
        "| task | generates | needs | may have | families |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task in TASKS:
        needs, takes = (", ".join(parts) or "nothing" for parts in (task.needs, _own(task)))
        names = ", ".join(family.name for family in families_of(task))
        link = f"[{task.name}](tasks/{task.name}.md)"
        lines.append(f"| {link} | {task.about} | {needs} | {takes} | {names} |")
    return "\n".join(lines)


def family_table() -> str:
    """Make the table of families for ``docs/tasks.md``: components by stage, split of the call."""
    head = ("task", "family", "pipeline", "encoder", "denoiser", "decoder", "how the call is split")
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for task in TASKS:
        for number, family in enumerate(families_of(task)):
            held = (family.encoder, family.denoiser, family.decoder)
            cells = [
                "" if number else f"**{task.name}**",
                family.name,
                f"`{family.pipeline}`",
                *(", ".join(f"`{name}`" for name in names) or "nothing" for names in held),
                family.split,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def approximation_table() -> str:
    """Make the table of approximate modes and their families for ``docs/approximate.md``."""
    lines = ["| mode | what it does | from | families |", "| --- | --- | --- | --- |"]
    for name, method in METHODS.items():
        able = [one for one in FAMILIES if name in one.approximations]
        by_task = (
            f"{task.name}: {', '.join(one.name for one in able if one.task == task.name)}"
            for task in TASKS
            if any(one.task == task.name for one in able)
        )
        lines.append(f"| `{name}` | {method.about} | {method.paper} | {'; '.join(by_task)} |")
    return "\n".join(lines)


def maker_table() -> str:
    """Make the table of makers for ``docs/tasks/control.md``."""
    lines = ["| maker | makes | options |", "| --- | --- | --- |"]
    for maker in MAKERS.values():
        lines.append(f"| `{maker.name}` | {maker.about} | {_defaults(maker)} |")
    return "\n".join(lines)


def label_maker_table() -> str:
    """Make the table of conditions drawn from labels for ``docs/labels.md``."""
    lines = ["| maker | for the part | draws | options |", "| --- | --- | --- | --- |"]
    for one in LABEL_MAKERS.values():
        lines.append(f"| `{one.name}` | `{one.part}` | {one.about} | {_defaults(one)} |")
    return "\n".join(lines)


def _defaults(maker: Optioned) -> str:
    """Each option of a maker with its default."""
    return ", ".join(f"`{name}` ({one.default:g})" for name, one in maker.options.items())


def _own(task: Task) -> list[str]:
    """Return the optional parts of a task, without those of all tasks."""
    common = set.intersection(*(set(one.takes) for one in TASKS))
    return [part for part in task.takes if part not in common]


def task_page(task: Task) -> str:
    """Describe one task completely, with an example spec at the end."""
    lines = [f"{task.name}: {task.about}", "", "Columns (input.columns)"]
    for part in task.parts:
        note = Columns.model_fields[part].description
        note = f" ({note})" if note else ""
        needed = "needed" if part in task.needs else "optional"
        lines += _hanging(f"  {part:<21} ", f"{needed}{note}")
    if any(is_image(part) for part in task.parts):
        lines += ["", "Makers that convert an image into a condition (conditioning.make)"]
        lines += [line for one in MAKERS.values() for line in _maker(one)]
    for family in families_of(task):
        lines += ["", *_family(family)]
    lines += ["", "Example spec", "", textwrap.indent(example_spec(task), "  ")]
    return "\n".join(lines)


def make_tiny(task: Task, family: str, folder: str) -> Path:
    """Write a tiny model of a family; imports the model libraries.

    Raises:
        UsageError: the folder is not empty, or cannot be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"folder {folder} is not empty; use a new one")
    from batchgen.models.libraries import quiet_libraries
    from batchgen.models.tiny import BUILDERS

    quiet_libraries()
    try:
        return BUILDERS[task.name, family](target)
    except OSError as error:
        raise UsageError(f"folder {folder}: {error.strerror or error}") from error


def _maker(maker: Maker) -> list[str]:
    options = ", ".join(f"{name}={one.default:g}" for name, one in maker.options.items())
    return _hanging(f"  {maker.name:<21} ", f"{maker.about}{f' ({options})' if options else ''}")


def _family(family: Family) -> Iterator[str]:
    yield f"Models: {family.name} ({family.pipeline})"
    for name in ("encoder", "denoiser", "decoder"):
        yield f"  {name:<10} {', '.join(getattr(family, name)) or 'no components'}"
    yield from _hanging("  split      ", family.split)
    yield f"  guidance   {_GUIDANCE[family.guidance]}"
    yield f"  settings   {', '.join(family.settings) or 'only steps, guidance and size'}"
    yield from _hanging("  approximate ", ", ".join(family.approximations) or "none")
    if family.upscale > 1:
        yield f"  upscale    {family.upscale}, each way"
    if family.fixed_size:
        yield "  size       only the model's own"
    yield from _hanging("  saved as   ", ", ".join(family.saved_as))
    yield f"  from elsewhere (model.components): {', '.join(family.external) or 'none'}"


def _hanging(head: str, text: str) -> list[str]:
    """Wrap the text after a heading, with further lines indented."""
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [
        head.rstrip()
    ]


def example_spec(task: Task) -> str:
    """Make an example spec of the task as YAML; only its paths have to be changed."""
    columns = dict.fromkeys(task.needs, "") | ({"prompt": ""} if task.prompt_column else {})
    settings = {
        name: Sampling.model_fields[name].default
        for name in ("strength", "image_guidance_scale", "control_scale")
        if name in task.parts and name in {one for f in families_of(task) for one in f.settings}
    }
    if task.name == "control":
        columns["control"] = ""
    lines = ["task: " + task.name, "input:", "  path: data/rows.parquet"]
    if columns:
        lines += ["  columns:", *(f"    {part}: {part}" for part in columns)]
    lines += ["model:", f"  path: models/{task.name}"]
    chosen = {name: value for name, value in settings.items() if value is not None}
    if chosen:
        lines += ["sampling:", *(f"  {name}: {value}" for name, value in chosen.items())]
    lines += ["variants: 2", "output:", f"  url: out/{task.name}"]
    return "\n".join(lines) + "\n"
