"""Commands about the scores of an output: compute them, select by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import main, open_ledger, parse_storage_options, storage_option
from batchgen.errors import SpecError

if TYPE_CHECKING:
    from batchgen.curate.selection import Query, Selection, Stored

SHOWN_GROUPS = 20


@main.command()
@click.argument("output")
@click.option(
    "--scorer",
    "scorers",
    multiple=True,
    metavar="NAME[=MODEL]",
    help="What computes scores: phash, classifier=FOLDER, module:function, or a mapping in YAML. "
    "[default: those of the set]",
)
@click.option("--name", help="Name of the score set. [default: made of the scorers' names]")
@click.option("--address", help="Ray cluster to join; default: start Ray on this machine.")
@click.option(
    "--shards",
    metavar="A:B",
    help="Score only the shards from A to B - 1; other runs may score others at the same time.",
)
@click.option("--num-gpus", type=float, help="GPUs of each replica. [default: 1 for a model]")
@click.option("--num-cpus", type=float, help="CPUs of each replica.")
@click.option("--max-replicas", type=int, help="At most so many replicas.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON on stdout.")
def score(
    output: str,
    scorers: tuple[str, ...],
    name: str | None,
    address: str | None,
    shards: str | None,
    num_gpus: float | None,
    num_cpus: float | None,
    max_replicas: int | None,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Score the images of OUTPUT after they were made; its own files stay as they are.

    If you repeat the command, it continues where it stopped. Exits 0 only when nothing is pending
    or failed.

    \b
    batchgen score out/images --scorer phash --scorer quality
    batchgen score out/images --scorer classifier=models/probe --name probe
    """
    from dataclasses import asdict

    from batchgen import scoring
    from batchgen.curate.score_request import Request, pool_of
    from batchgen.output.outcome import reason_lines
    from batchgen.spec.score_section import read_scorer

    pool = pool_of(num_gpus, num_cpus, max_replicas)
    specs = tuple(read_scorer(one) for one in scorers)
    asked = Request(specs, name, shards, pool)
    options = parse_storage_options(storage_options)
    outcome = scoring.score(output, asked, address, as_json, options)
    if as_json:
        echo_json(asdict(outcome))
    else:
        echo("\n".join([outcome.message, *reason_lines(outcome.reasons, outcome.output)[:-1]]))
    return outcome.exit_code


@main.command()
@click.argument("output")
@click.option("--name", help="Name of the selection; an older one is replaced. [default: list all]")
@click.option("--where", default="", help="Condition over the columns, in DuckDB's SQL.")
@click.option("--top", type=int, help="Select at most so many samples, or so many of each group.")
@click.option("--by", default="", help="With --top: the column that ranks; the highest first.")
@click.option("--lowest", is_flag=True, help="With --top: the lowest first.")
@click.option("--per", multiple=True, help="With --top: a column that makes groups, such as label.")
@click.option("--again", is_flag=True, help="Select again with the stored query of --name.")
@click.option("--remove", is_flag=True, help="Remove the selection --name; images stay.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def select(
    output: str,
    name: str | None,
    where: str,
    top: int | None,
    by: str,
    lowest: bool,
    per: tuple[str, ...],
    again: bool,
    remove: bool,
    storage_options: tuple[str, ...],
    as_json: bool,
) -> int:
    """Select samples of OUTPUT by their columns and scores; images are neither read nor changed.

    Without --name it lists the selections.

    \b
    batchgen select out/images --name bright --where "pixel_mean > 60"
    batchgen select out/images --name best --top 500 --by pixel_std --per label
    """
    from dataclasses import asdict

    from batchgen.curate import selection
    from batchgen.curate.summary import show_selections
    from batchgen.report import refresh_card

    ledger = open_ledger(output, storage_options)
    query, parts = selection.Query(where, top, by, per, lowest), ledger.parts()
    if name is None:
        _refuse_nameless(query, again, remove)
        return _list(selection.stored_selections(ledger), as_json)
    if (again or remove) and query != selection.Query():
        raise SpecError("--again" if again else "--remove", True, "", because=_ALONE)
    if remove:
        made = selection.remove_selection(ledger, name)
        show_selections(ledger)
        refresh_card(ledger)
        echo_json(asdict(made)) if as_json else echo(f"removed: selection {name}")
        return 0
    if again:
        query = selection.read_selection(ledger, name).query
        if name == selection.QUOTA and ledger.job().quota is not None:
            told = f"a quota made this selection; `batchgen resume {output}` makes it again"
            raise SpecError("--again", name, "", because=told)
    made = selection.select(ledger, parts, name, query)
    show_selections(ledger)
    refresh_card(ledger)
    if as_json:
        echo_json(asdict(made))
    else:
        _show(made)
    return 0


_ALONE = "the stored query counts; give it without --where, --top, --by, --per and --lowest"


def _refuse_nameless(query: Query, again: bool, remove: bool) -> None:
    from batchgen.curate.selection import Query as Asked

    if query != Asked() or again or remove:
        raise SpecError("--name", None, "a name for the selection: letters, digits, _ and -")


def _list(found: list[Stored], as_json: bool) -> int:
    from dataclasses import asdict

    if as_json:
        echo_json([{**asdict(one.selection), "stale": one.stale} for one in found])
    for one in () if as_json else found:
        made = one.selection
        stale = f" (stale: {one.stale})" if one.stale else ""
        echo(f"{made.name}: {made.selected:,} of {made.samples:,} samples, {made.query}{stale}")
    if not found and not as_json:
        echo("no selection yet; `batchgen select OUTPUT --name NAME --where CONDITION` makes one")
    return 0


def _show(made: Selection) -> None:
    echo(f"{made.name}: {made.selected:,} of {made.samples:,} samples selected")
    for reason, count in made.reasons.items():
        told = {"where": "do not meet the condition", "rank": "rank too low"}[reason]
        echo(f"  {count:,} {told}")
    for group, (samples, selected) in list(made.groups.items())[:SHOWN_GROUPS]:
        echo(f"  {group}: {selected:,} of {samples:,}")
    if len(made.groups) > SHOWN_GROUPS:
        echo(f"  and {len(made.groups) - SHOWN_GROUPS} more groups")
