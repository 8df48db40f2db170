"""Commands about samples of an output: replay one."""

from __future__ import annotations

import os
from pathlib import Path

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import (
    main,
    parse_settings,
    parse_storage_options,
    storage_option,
)


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
