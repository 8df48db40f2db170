"""Commands about recipes: expand one to rows, and list the presets."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import main, parse_storage_options, storage_option
from batchgen.errors import LimitExceeded, SpecError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from batchgen.recipes.expand import Expanded
    from batchgen.recipes.recipe import Recipe

_WIDEST = 40  # characters of a value in the table; prompts are shown in full


@main.command()
@click.argument("recipe_file", required=False, metavar="[RECIPE.yaml]")
@click.option("--output", help="Parquet file or URL for the rows.")
@click.option("--preset", help="A recipe by name, see `batchgen presets`; the file changes it.")
@click.option("--input", "source", help="Parquet file, folder or URL; replaces `from`.")
@click.option("--seed", type=int, help="Replaces the seed of the recipe.")
@click.option("--variants", metavar="N|A:B", help="Samples of each row, or only A to B - 1.")
@click.option("--limit", type=click.IntRange(min=1), help="Make at most this number of samples.")
@click.option(
    "--preview",
    type=click.IntRange(1, 1000),
    is_flag=False,
    flag_value=8,
    help="Show this number of rows and write nothing. [8 without a number]",
)
@click.option("--images", is_flag=True, help="With --preview: also generate their images.")
@click.option("--task", help="With --images: the task; default: the preset's, or by the columns.")
@click.option("--model", help="With --images: the model; default: the shipped one.")
@click.option(
    "--rejected-limit",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Fraction of the samples that may be rejected; if more are, the exit code is 2.",
)
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print rows or the outcome as JSON.")
def expand(
    recipe_file: str | None,
    output: str | None,
    preset: str | None,
    source: str | None,
    seed: int | None,
    variants: str | None,
    limit: int | None,
    preview: int | None,
    images: bool,
    task: str | None,
    model: str | None,
    rejected_limit: float,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Write one Parquet row for each sample of RECIPE, to see and edit before images are made.

    \b
    batchgen expand recipe.yaml --preview 8
    batchgen expand recipe.yaml --output rows.parquet
    batchgen run --input rows.parquet --output out/images
    """
    from batchgen.storage import configure

    configure(parse_storage_options(storage_options))
    only, count = _variants(variants)
    changes = {"from": source, "seed": seed, "variants": count}
    recipe = _recipe(recipe_file, preset, {k: v for k, v in changes.items() if v is not None})
    job = _Job(preset, task, model, output)
    if preview is not None:
        return _preview(
            recipe, min(preview, limit or preview), only, job if images else None, as_json
        )
    for flag, given in (("--images", images), ("--task", task), ("--model", model)):
        if given:
            raise SpecError(flag, given, "together with --preview", said="is set without --preview")
    if output is None:
        raise SpecError("--output", None, "a Parquet file or URL, or --preview")
    made = write_rows(recipe, output, only, limit)
    _tell(made, as_json)
    return LimitExceeded.exit_code if made.rejected_fraction > rejected_limit else 0


@dataclass(frozen=True)
class _Job:
    """What to make of the rows of a preview."""

    preset: str | None
    task: str | None
    model: str | None
    output: str | None


def _variants(given: str | None) -> tuple[tuple[int, int] | None, int | None]:
    """Parse ``--variants``: the range A:B, or the number of variants.

    Raises:
        SpecError: it is neither.
    """
    from batchgen.recipes.recipe import variant_range

    if given is None or given.isdecimal():
        return None, None if given is None else int(given[:9])
    try:
        return variant_range(given), None
    except ValueError as error:
        raise SpecError("--variants", given, str(error)) from None


def _recipe(path: str | None, preset: str | None, changes: dict[str, Any]) -> Recipe:
    from batchgen.recipes.presets import with_recipe
    from batchgen.recipes.recipe import build_recipe
    from batchgen.spec.tree import read_yaml

    if path is None and preset is None:
        raise UsageError("a recipe is needed: a file, or --preset (see `batchgen presets`)")
    tree = read_yaml(path) if path else {}
    name = preset or tree.get("preset")
    tree = {key: value for key, value in tree.items() if key != "preset"} | changes
    return build_recipe(tree if name is None else with_recipe(str(name), tree))


def write_rows(
    recipe: Recipe, output: str, only: tuple[int, int] | None, limit: int | None
) -> Expanded:
    """Expand a recipe; answers of a language model are kept next to the rows."""
    from batchgen.recipes.expand import expand

    return expand(recipe, output, only, limit, answers_path(output))


def answers_path(output: str | None) -> str:
    """The local file with the answers of a language model; next to the rows, if they are local."""
    if output is None:
        return "recipe-answers.jsonl"
    place = output.rpartition("/")[2] if "://" in output else output
    return f"{place.removesuffix('.parquet')}-answers.jsonl"


def _tell(made: Expanded, as_json: bool) -> None:
    if as_json:
        echo_json(asdict(made))
        return
    echo(f"{made.samples:,} samples of {made.rows:,} rows: {made.output}")
    echo(f"columns: {', '.join(made.columns)}")
    if made.asked:
        echo(f"{made.asked:,} answers of the language model: {answers_path(made.output)}")
    for reason, count in sorted(made.rejected.items()):
        echo(f"rejected: {count:,} {reason}, see {made.rejects}")


def _preview(
    recipe: Recipe, count: int, only: tuple[int, int] | None, job: _Job | None, as_json: bool
) -> int:
    from batchgen.recipes.expand import preview

    table, carried = preview(recipe, count, only, answers_path(None))
    rows = table.drop_columns([name for name in table.column_names if _is_large(table, name)])
    if as_json:
        echo_json(json.loads(json.dumps(rows.to_pylist(), default=str)))
    else:
        echo(_shown(rows, carried))
    return 0 if job is None else _make_images(recipe, table, job, as_json)


def _is_large(table: pa.Table, name: str) -> bool:
    import pyarrow as pa

    kind = table.schema.field(name).type
    large = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)
    return any(is_kind(kind) for is_kind in large)


def _shown(rows: pa.Table, carried: list[str]) -> str:
    """Show rows as a table: what was made, then the prompt; carried columns are left out."""
    names = [name for name in rows.column_names if name not in (*carried, "prompt", "row_key")]
    names += ["prompt"] if "prompt" in rows.column_names else []
    lines = [names]
    for row in rows.select(names).to_pylist():
        lines.append([_cell(row[name], name) for name in names])
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any, name: str) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if name == "prompt" or len(text) <= _WIDEST else f"{text[:_WIDEST]}..."


def _make_images(recipe: Recipe, table: pa.Table, job: _Job, as_json: bool) -> int:
    """Run a job of these rows, and say where its images are."""
    import pyarrow.parquet as pq

    from batchgen import runner
    from batchgen.spec.build import build

    folder = tempfile.mkdtemp(prefix="batchgen-preview-")
    rows = f"{folder}/rows.parquet"
    pq.write_table(table, rows)
    outcome = runner.run(build(images_tree(recipe, table, job, rows)), None, as_json)
    echo(outcome.message, err=as_json)
    echo(f"images: {outcome.output}/_batchgen/contact-sheet.png", err=as_json)
    return outcome.exit_code


def images_tree(recipe: Recipe, table: pa.Table, job: _Job, rows: str) -> dict[str, Any]:
    """The spec of the job that makes the images of a preview, as nested dictionaries."""
    from batchgen.recipes.job import source_roots, task_columns
    from batchgen.recipes.presets import preset
    from batchgen.spec.tree import merge

    tree = merge(preset(job.preset).spec if job.preset else {}, {})
    tree["task"] = job.task or tree.get("task") or guessed_task(table.column_names)
    given = tree.get("input") or {}
    columns = {**task_columns(table.schema, tree["task"]), **given.get("columns", {})}
    tree["input"] = {
        **given,
        "path": rows,
        "columns": columns,
        "uri_roots": source_roots(recipe, rows),
    }
    output = job.output or rows.replace("rows.parquet", "images")
    tree["output"] = {**(tree.get("output") or {}), "url": output}
    if job.model is not None:
        tree["model"] = {**(tree.get("model") or {}), "path": job.model}
    return tree


def guessed_task(columns: list[str]) -> str:
    """Guess the task from the columns of the rows."""
    if "image" in columns:
        return "inpainting" if "mask" in columns else "image-to-image"
    return "control" if "control" in columns else "text-to-image"


@main.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the presets, or print the file of the preset NAME with its evidence.

    \b
    batchgen presets
    batchgen presets da-fusion
    """
    from batchgen.recipes import presets as known

    if name is not None:
        echo(known.text_of(name), nl=False)
        return
    width = max(map(len, known.names()))
    for one in known.names():
        found = known.preset(one)
        echo(f"{one:<{width}}  {found.about} ({found.paper})")
