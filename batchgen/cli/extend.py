"""The command that adds samples to an output: extend."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.make import check_address, finish
from batchgen.cli.options import main, open_ledger, parse_storage_options, storage_option

if TYPE_CHECKING:
    from batchgen.plan.plan import Plan


@main.command()
@click.argument("output")
@click.option("--variants", type=int, metavar="N", help="N further images of every row.")
@click.option("--limit", type=int, metavar="N", help="At most N further rows of the input.")
@click.option("--input", "source", metavar="PATH", help="The rows of another Parquet input.")
@click.option(
    "--again",
    metavar="OUTCOME",
    help="The samples that were rejected, or failed, with other seeds.",
)
@click.option("--reason", help="With --again: only samples with this reason.")
@click.option("--plan-only", is_flag=True, help="Show the part; write and generate nothing.")
@click.option("--address", help="Ray cluster to join; default: start Ray on this machine.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON on stdout.")
def extend(
    output: str,
    variants: int | None,
    limit: int | None,
    source: str | None,
    again: str | None,
    reason: str | None,
    plan_only: bool,
    address: str | None,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Add samples to OUTPUT as a new part of its plan, and generate them.

    What OUTPUT has stays as it is, to the byte. Each part is frozen like the first plan;
    `batchgen resume` continues all of them.

    \b
    batchgen extend out/images --variants 3
    batchgen extend out/images --input more.parquet
    batchgen extend out/images --again rejected --reason flat-image
    """
    given = [one for one in (variants, limit, source, again) if one is not None]
    if len(given) != 1:
        raise click.UsageError("one of --variants, --limit, --input and --again is needed")
    if reason is not None and again is None:
        raise click.UsageError("--reason needs --again")
    from batchgen.engine.planning import extend_output, planned_parts
    from batchgen.errors import StopJob
    from batchgen.output.extension import Extension
    from batchgen.storage import absolute, configure

    check_address(address)
    ledger = open_ledger(output, storage_options)
    ledger.require_plan()
    job, options = ledger.job(), parse_storage_options(storage_options)
    configure({**job.storage_options, **options}, job.storage.limits())
    place = None if source is None else absolute(source)
    wanted = Extension(variants, limit, place, again, reason)
    if plan_only:
        plans = planned_parts(ledger, wanted, address)
        if as_json:
            echo_json([json.loads(plan.to_json()) for plan in plans], indent=1)
        for plan in plans if not as_json else ():
            echo(described(plan))
        return 0
    from batchgen import runner

    plans = extend_output(ledger, wanted, address)
    for plan in plans:
        echo(f"added {described(plan)}", err=True)
    try:
        return finish(runner.resume(output, address, as_json, options), as_json)
    except StopJob as error:
        added = f"the output has the new part; continue with `batchgen resume {output}`"
        raise type(error)(f"{error} ({added})") from error


def described(plan: Plan) -> str:
    """A part in one line."""
    numbers = plan.numbers
    shards = (
        f"shard {numbers.start}" if len(numbers) == 1 else f"shards {numbers.start}:{numbers.stop}"
    )
    many = f"{plan.spec.variants:,} variants of {plan.rows:,} rows"
    what = f"{plan.samples:,} listed samples" if plan.place.listed else many
    return (
        f"part {plan.place.part} ({plan.place.why}): {plan.samples:,} samples in {shards}: {what}"
    )
