"""Commands about samples of an output: replay one, select some."""

from __future__ import annotations

import os
from pathlib import Path

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import (
    main,
    open_ledger,
    parse_settings,
    parse_storage_options,
    storage_option,
)

SHOWN_GROUPS = 20


@main.command()
@click.argument("output")
@click.option("--key", required=True, help="Key of the sample, such as cats-00000007-v0.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="SETTING=VALUE",
    help="Another value for a setting, prompt or seed: what would the image be then?",
)
@click.option("--save", help="File for the new image. [with --set: KEY.EXTENSION here]")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def replay(
    output: str,
    key: str,
    settings: tuple[str, ...],
    save: str | None,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Generate one sample of OUTPUT again, without Ray, and compare it with the stored image.

    Exits 0 if both are equal to the byte, or if --set was given; 4 if they differ.
    """
    from batchgen.curate.replay import replay as replay_sample
    from batchgen.storage import configure

    configure(parse_storage_options(storage_options))
    made = replay_sample(output, key, parse_settings(settings))
    extension = made.extension
    place = save or (f"{key}.{extension}" if settings else None)
    if place is not None:
        Path(place).write_bytes(made.image)
    if as_json:
        echo_json({**made.facts(), "saved": place and os.path.abspath(place)})
        return made.exit_code
    for line in made.lines():
        echo(line)
    if place is not None:
        echo(f"saved: {place}")
    return made.exit_code


@main.command()
@click.argument("output")
@click.option("--name", required=True, help="Name of the selection; an older one is replaced.")
@click.option("--where", default="", help="Condition over the columns, in DuckDB's SQL.")
@click.option("--top", type=int, help="Select at most so many samples, or so many of each group.")
@click.option("--by", default="", help="With --top: the column that ranks; the highest first.")
@click.option("--lowest", is_flag=True, help="With --top: the lowest first.")
@click.option("--per", multiple=True, help="With --top: a column that makes groups, such as label.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def select(
    output: str,
    name: str,
    where: str,
    top: int | None,
    by: str,
    lowest: bool,
    per: tuple[str, ...],
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Select samples of OUTPUT by their columns; images are neither read nor changed.

    \b
    batchgen select out/images --name bright --where "pixel_mean > 60"
    batchgen select out/images --name best --top 500 --by pixel_std --per label
    """
    from dataclasses import asdict

    from batchgen.curate.selection import Query
    from batchgen.curate.selection import select as select_samples

    ledger = open_ledger(output, storage_options)
    made = select_samples(ledger, ledger.parts(), name, Query(where, top, by, per, lowest))
    if as_json:
        echo_json(asdict(made))
        return 0
    echo(f"{made.name}: {made.selected:,} of {made.samples:,} samples selected")
    for reason, count in made.reasons.items():
        told = {"where": "do not meet the condition", "rank": "rank too low"}[reason]
        echo(f"  {count:,} {told}")
    for group, (samples, selected) in list(made.groups.items())[:SHOWN_GROUPS]:
        echo(f"  {group}: {selected:,} of {samples:,}")
    if len(made.groups) > SHOWN_GROUPS:
        echo(f"  and {len(made.groups) - SHOWN_GROUPS} more groups")
    return 0
