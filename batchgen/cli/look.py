"""Commands that inspect an output, from storage only: status, verify, rejects."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from batchgen.cli.cluster import address_option, ask, at_work, last_run
from batchgen.cli.echo import echo, echo_json
from batchgen.cli.options import main, open_ledger, storage_option
from batchgen.errors import Interrupted, VerifyFailed
from batchgen.plain_text import short

if TYPE_CHECKING:
    from batchgen.output.ledger import Ledger
    from batchgen.plan.parts import Parts


@main.command()
@click.argument("job")
@address_option
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(job: str, address: str | None, storage_options: tuple[str, ...], as_json: bool) -> int:
    """Show the progress of JOB (its output or submission id), read from storage.

    With a submission id or an address, the state on the cluster is shown as well, if it answers.

    Exits 0 when the job is complete, 2 when shards or samples failed, 3 while shards are pending,
    4 when a committed file is missing or has another size.
    """
    from batchgen.output.outcome import reason_lines, reasons_of, survey

    facts: dict[str, object] = {}
    output = job
    if address or ("/" not in job and not os.path.isdir(job)):
        from batchgen.cluster.submit import output_of

        found = ask(job, address)
        output = found.output or output_of(job)
        facts |= {"submission_id": found.name, "cluster": found.status}
        if not as_json:
            echo(f"cluster  {found.status}")
    ledger = open_ledger(output, storage_options)
    if facts.get("submission_id") and ledger.plan() is None:
        echo(f"{output} is still empty")
        return 3
    frozen = ledger.in_force(ledger.parts())
    working = at_work(ledger)
    states = ledger.states(frozen)
    tally, exit_code, message = survey(frozen, ledger, states)
    pending = frozen.shards - tally.committed - tally.failed_shards
    is_whole = not pending and not tally.failed_shards and exit_code != VerifyFailed.exit_code
    if is_whole and frozen.spec.quota is not None:
        exit_code, message = _quota(ledger, frozen, message, tally.failed)
    last = last_run(ledger)
    if working and exit_code == Interrupted.exit_code:
        message = f"{pending:,} of {frozen.shards:,} shards are pending; a run is working on them"
    facts |= {
        "output": output,
        "shards": frozen.shards,
        "committed": tally.committed,
        "failed_shards": tally.failed_shards,
        "pending": pending,
        "planned": frozen.samples,
        "parts": len(frozen),
        "accepted": tally.accepted,
        "rejected": tally.rejected,
        "failed": tally.failed,
        "at_work": working,
        "last_run": last,
        "exit_code": exit_code,
        "message": message,
        "truncated_prompts": tally.truncated,
        "reasons": [asdict(reason) for reason in reasons_of(tally)],
    }
    if as_json:
        echo_json(facts)
    else:
        echo(
            f"shards   {tally.committed:,} of {frozen.shards:,} committed, "
            f"{tally.failed_shards:,} failed, {pending:,} pending\n"
            f"samples  {frozen.samples:,} planned{_parts(frozen)}, {tally.accepted:,} accepted, "
            f"{tally.rejected:,} rejected, {tally.failed:,} failed\n"
            f"run      {last.removesuffix(f': {message}')}\n{message}"
        )
        for line in reason_lines(reasons_of(tally), output):
            echo(line)
    return exit_code


def _quota(ledger: Ledger, parts: Parts, message: str, failed: int) -> tuple[int, str]:
    """The exit code and message of an output whose shards are all committed, with its quota."""
    from batchgen.output.quota_record import quota_of

    record = quota_of(ledger)
    if record is None or not record.is_of(parts):
        command = f"`batchgen resume {ledger.store.url}`"
        return Interrupted.exit_code, f"{message}; the quota is not met yet: {command} continues"
    return record.ending(failed)


def _parts(parts: Parts) -> str:
    return f" in {len(parts):,} parts" if parts[1:] else ""


@main.command()
@click.argument("output")
@click.option("--quick", is_flag=True, help="Compare listings and markers only; read no images.")
@click.option(
    "--skip",
    multiple=True,
    type=click.Choice(["decode"]),
    help="Skip a slow check. decode: decoding every image.",
)
@click.option(
    "--repair",
    "mend",
    is_flag=True,
    help="Withdraw damaged shards, so that `resume` regenerates them; move unknown files aside.",
)
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def verify(
    output: str,
    storage_options: tuple[str, ...],
    quick: bool,
    skip: tuple[str, ...],
    mend: bool,
    as_json: bool,
) -> int:
    """Prove from storage that OUTPUT has every planned sample once, or the reason why not.

    Exits 0 when that is proven and 4 when not. With --repair it exits 3 when `resume` can
    regenerate the withdrawn shards.
    """
    from batchgen.output import repair
    from batchgen.output import verify as checks

    ledger = open_ledger(output, storage_options)
    mended = repair.repair(ledger, quick) if mend else None
    findings = mended.found if mended else checks.verify(ledger, quick, skip)
    if as_json:
        done = {"withdrawn": mended.withdrawn, "aside": mended.aside} if mended else {}
        echo_json({**asdict(findings), "ok": findings.ok, **done})
    else:
        for problem in findings.problems:
            echo(f"problem: {problem}", err=True)
        if findings.more_problems:
            echo(f"problem: and {findings.more_problems} more", err=True)
        for line in mended.lines() if mended else ():
            echo(line)
        echo((mended or findings).sentence(output))
    return mended.exit_code if mended else 0 if findings.ok else 4


@main.command()
@click.argument("output")
@click.option("--reason", help="Show only samples with this reason.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Number of samples to show for each reason; 0: all.",
)
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def rejects(
    output: str, reason: str | None, limit: int, storage_options: tuple[str, ...], as_json: bool
) -> int:
    """List the rejected and failed samples of OUTPUT by reason."""
    from batchgen.output.rejects import by_reason

    groups = by_reason(open_ledger(output, storage_options), reason, limit or None)
    if as_json:
        echo_json([asdict(group) for group in groups])
        return 0
    for group in groups:
        echo(f"{group.count:,} {group.reason}")
        for one in group.samples:
            source = f" ({one.source_id})" if one.source_id else ""
            echo(f"  {one.key}{source}: {short(one.message)}")
    if not groups:
        echo(f"no sample was rejected or failed{f' with the reason {reason}' if reason else ''}")
    return 0
