"""Commands that generate images, or show the plan: run, resume, plan."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

from batchgen.cli.cluster import requirements_option, resume_on
from batchgen.cli.direct import given_input, given_recipe
from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import (
    main,
    open_ledger,
    parse_storage_options,
    shards_option,
    spec_options,
    storage_option,
)
from batchgen.plain_text import plain

if TYPE_CHECKING:
    from batchgen.cli.machine import Check
    from batchgen.output.outcome import Outcome
    from batchgen.plan.plan import Plan
    from batchgen.spec.spec import Spec


@main.command()
@spec_options
@click.option("--address", help="Ray cluster to join; default: start Ray on this machine.")
@shards_option
@click.option("--dry-run", is_flag=True, help="Show the plan; generate nothing.")
@click.option("--overwrite", is_flag=True, help="Delete the output of earlier runs; start again.")
@click.option("--yes", is_flag=True, help="With --overwrite: do not ask for confirmation.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON on stdout.")
def run(
    spec: Spec,
    address: str | None,
    shards: str | None,
    dry_run: bool,
    overwrite: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Plan a job and generate all images that are not committed yet.

    Settings come from SPEC.yaml, from flags, or from both (flags win). If you repeat the command
    with the same output, it continues where it stopped.

    \b
    batchgen run --input prompts.parquet --output out/images --variants 4
    """
    if dry_run:
        _show_plan(spec, as_json, address=address)
        return 0
    from batchgen import runner

    check_address(address)
    if overwrite and not yes:
        _ask_to_remove(spec)
    return finish(runner.run(spec, address, as_json, shards, overwrite), as_json)


def _ask_to_remove(spec: Spec) -> None:
    """Ask for confirmation, and say what would be deleted from the output.

    Raises:
        UsageError: the answer was no, or there is no terminal to ask.
    """
    from batchgen.errors import UsageError
    from batchgen.output.holdings import holdings_of
    from batchgen.output.ledger import Ledger
    from batchgen.spec.places import reach_stores
    from batchgen.storage import open_store

    reach_stores(spec)
    own = holdings_of(Ledger(open_store(spec.output.url)), spec.input.path).own
    if not own:
        return
    size = f"{len(own):,} files, {sum(own.values()):,} bytes"
    question = f"Delete everything that batchgen has written to {spec.output.url} ({size})?"
    try:
        agreed = click.confirm(plain(question), err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        raise UsageError(
            "nothing was deleted and nothing generated; use `--yes` to delete without confirmation"
        )


@main.command()
@click.argument("output")
@storage_option
@click.option("--address", help="Ray cluster to join; default: start Ray on this machine.")
@shards_option
@requirements_option
@click.option(
    "--verify",
    "verified",
    is_flag=True,
    help="First find damaged shards and withdraw them, as `verify --repair` does.",
)
@click.option(
    "--batch-size",
    type=int,
    help="A smaller resources.batch_size for the shards that are left, if memory is lacking.",
)
@click.option(
    "--decode-batch-size", type=int, help="The same for resources.decode_batch_size (the VAE)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON on stdout.")
def resume(
    output: str,
    storage_options: tuple[str, ...],
    address: str | None,
    shards: str | None,
    no_requirements: bool,
    batch_size: int | None,
    decode_batch_size: int | None,
    verified: bool,
    as_json: bool,
) -> int:
    """Continue the job of OUTPUT (folder or URL); failed shards are retried.

    If --address is that of a cluster's job server (http://HEAD:8265), the job is submitted there.
    """
    if verified:
        _withdraw(output, storage_options)
    if address and address.startswith(("http://", "https://")):
        sizes = {"--batch-size": batch_size, "--decode-batch-size": decode_batch_size}
        return resume_on(address, output, storage_options, shards, sizes, not no_requirements)
    from batchgen import runner

    check_address(address)
    options = parse_storage_options(storage_options)
    outcome = runner.resume(
        output, address, as_json, options, shards, batch_size, decode_batch_size
    )
    return finish(outcome, as_json)


@main.command()
@partial(spec_options, reads="look")
@click.option("--print-spec", is_flag=True, help="Print the spec with every default filled in.")
@click.option(
    "--memory", is_flag=True, help="Also compute the memory that the model needs; takes seconds."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(spec: Spec, print_spec: bool, memory: bool, as_json: bool) -> int:
    """Show the plan of a run, made from the input's footers; writes nothing.

    The printed spec keeps `auto`, so that it is the same on every machine.
    """
    if print_spec:
        import yaml

        from batchgen import runner

        made = runner.plan_job(spec).spec
        as_given = {"model": spec.model, "resources": spec.resources, **given_input(made)}
        recipe = given_recipe()
        text = made.model_copy(update=as_given).to_yaml()
        echo(text + (yaml.safe_dump(recipe, sort_keys=False) if recipe else ""), nl=False)
    else:
        _show_plan(spec, as_json, memory)
    return 0


def check_address(address: str | None) -> None:
    """Check the address of the cluster, before anything is planned."""
    from batchgen.cluster.addresses import check_head, joined

    if wanted := joined(address):
        check_head(wanted, "--address" if address else "RAY_ADDRESS")


def _withdraw(output: str, storage_options: tuple[str, ...]) -> None:
    """Report damaged shards and withdraw them; stop if regenerating would not repair the output."""
    from batchgen.errors import VerifyFailed
    from batchgen.output.repair import repair

    mended = repair(open_ledger(output, storage_options))
    for line in (*mended.found.problems, *mended.lines()):
        echo(line, err=True)
    if mended.exit_code == VerifyFailed.exit_code:
        raise VerifyFailed(mended.sentence(output))


def finish(outcome: Outcome, as_json: bool) -> int:
    from batchgen.output.outcome import reason_lines

    if as_json:
        echo_json(asdict(outcome))
    else:
        lines = reason_lines(outcome.reasons, outcome.output)
        report = f"report: {outcome.output}/_batchgen/report.html"
        echo("\n".join([outcome.message, *lines, report]))
    return outcome.exit_code


def _source(plan: Plan) -> str:
    given = given_input(plan.spec).get("input", plan.spec.input)
    return f"in {len(plan.files)} files of {given.path}" if given.path else "without an input"


def _memory(plan: Plan) -> list[Check]:
    from batchgen.cli.memory import needed, told
    from batchgen.cluster.driver import visible_gpus

    return list(told(plan, needed(plan), visible_gpus()))


def _show_plan(spec: Spec, as_json: bool, memory: bool = False, address: str | None = None) -> None:
    from batchgen import runner
    from batchgen.cli.machine import device
    from batchgen.report.settings import approximations

    made: Plan = runner.plan_job(spec, address)
    checks = _memory(made) if memory else []
    more = {"memory": [asdict(check) for check in checks]} if memory else {}
    if as_json:
        echo_json({**json.loads(made.to_json()), **more}, indent=1)
        return
    calls = -(-made.spec.output.samples_per_shard // made.spec.resources.micro_batch)
    echo(
        f"input    {made.rows} rows {_source(made)}\n"
        f"samples  {made.samples} ({spec.variants} a row) in {made.shards} shards of "
        f"{made.spec.output.samples_per_shard}, at least {calls} micro-batches of "
        f"{made.spec.resources.micro_batch} each\n"
        f"model    {made.model.model_id} {made.model.revision}, {made.model.scheduler}, "
        f"{made.spec.sampling.num_inference_steps} steps, "
        f"guidance {made.spec.sampling.guidance_scale}, "
        f"{made.spec.sampling.width}x{made.spec.sampling.height}, {made.spec.model.dtype}\n"
        f"device   {device(made, address).message}\n"
        f"output   {spec.output.url}\n"
        f"plan     spec {made.fingerprints.spec[:12]}, input {made.fingerprints.input[:12]}, "
        f"weights {made.model.manifest_sha256[:12]}"
    )
    for what, told in approximations(made.spec).items():
        echo(f"{what}: {told}")
    for note in made.notes:
        echo(f"note     {note}")
    for check in checks:
        echo(f"{check.name}: {check.message}")
