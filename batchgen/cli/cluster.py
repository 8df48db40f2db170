"""Commands about jobs on a Ray cluster: hand over, watch, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.echo import echo
from batchgen.cli.options import (
    main,
    open_ledger,
    shards_option,
    spec_options,
    storage_option,
)
from batchgen.progress.display import duration

if TYPE_CHECKING:
    from batchgen.cluster.submit import Cluster
    from batchgen.output.ledger import Ledger
    from batchgen.spec.spec import Spec


def address_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The head's dashboard. [default: RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265]",
    )(command)


def requirements_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--no-requirements",
        is_flag=True,
        help="The cluster's machines have batchgen's requirements already: submit without them.",
    )(command)


@main.command()
@spec_options
@address_option
@click.option("--submission-id", help="Its name on the cluster; default: one with the time in it.")
@shards_option
@click.option("--no-wait", is_flag=True, help="Hand it over and return.")
@requirements_option
def submit(
    spec: Spec,
    address: str | None,
    submission_id: str | None,
    shards: str | None,
    no_wait: bool,
    no_requirements: bool,
) -> int:
    """Run a job on a Ray cluster; show what it prints, and exit as it exits.

    The job goes on if this command is ended or loses its connection. The package and its pinned
    requirements travel along; secrets do not: the spec names environment variables, which the
    cluster's machines have, or their instance roles open the stores.

    \b
    batchgen submit job.yaml --address http://head:8265
    """
    from batchgen.cluster.submit import Cluster
    from batchgen.spec.places import anywhere

    cluster = Cluster(address)
    options = ["--shards", shards] if shards else []
    name = cluster.submit(anywhere(spec), options, submission_id, packages=not no_requirements)
    echo(f"submitted {name} to {cluster.address}, output {spec.output.url}", err=True)
    if no_wait:
        echo(name)
        return 0
    return _watch(cluster, name)


@main.command()
@click.argument("job")
@address_option
@storage_option
@click.option("--follow", is_flag=True, help="Go on until the job has ended; exit as it exits.")
def logs(job: str, address: str | None, storage_options: tuple[str, ...], follow: bool) -> int:
    """Print what JOB (submission id or output) has said, from its cluster or else its output."""
    found = ask(job, address)
    if found.cluster is None:
        ledger = _ledger(job, storage_options, found)
        if address:
            echo(f"{found.status}; from its output:", err=True)
        echo(ledger.logs(), nl=False)
        return 0
    if follow:
        return _watch(found.cluster, found.name)
    echo(found.cluster.logs(found.name), nl=False)
    return 0


@main.command()
@click.argument("job")
@address_option
@storage_option
def cancel(job: str, address: str | None, storage_options: tuple[str, ...]) -> int:
    """Stop JOB (submission id or output); what is committed stays, `resume` goes on."""
    found = ask(job, address)
    if found.cluster is None:
        state = last_run(_ledger(job, storage_options, found))
        echo(f"{found.status}\n{state}" if address else f"no job of a cluster; {state}", err=True)
        return 1
    if found.cluster.stop(found.name):
        echo(f"stopping {found.name}; `batchgen resume` goes on with what is missing")
    else:
        echo(f"{found.name} has ended already: {found.status}")
    return 0


def resume_on(
    address: str,
    output: str,
    storage_options: tuple[str, ...],
    shards: str | None,
    packages: bool,
) -> int:
    """Submit that an output's job is gone on with, and watch it."""
    from batchgen.cluster.submit import Cluster
    from batchgen.storage import absolute

    cluster = Cluster(address)
    options = [word for one in storage_options for word in ("--storage-option", one)]
    options += ["--shards", shards] if shards else []
    name = cluster.resume(absolute(output), options, packages)
    echo(f"submitted {name} to {cluster.address}, output {output}", err=True)
    return _watch(cluster, name)


@dataclass(frozen=True)
class Found:
    """A job on a cluster; without one, ``status`` says why."""

    cluster: Cluster | None
    name: str
    output: str
    status: str


def ask(job: str, address: str | None) -> Found:
    """Look for a job, by submission id or by output, where a cluster should be."""
    from batchgen.cluster.submit import OUTPUT, Cluster
    from batchgen.errors import UsageError

    try:
        cluster = Cluster(address)
        found = cluster.find(job)
    except UsageError as error:
        return Found(None, "", "", str(error))
    if found is None or found.submission_id is None:
        return Found(None, "", "", f"the cluster at {cluster.address} knows no job {job}")
    output = (found.metadata or {}).get(OUTPUT, "")
    return Found(cluster, found.submission_id, output, found.status.value.lower())


def last_run(ledger: Ledger) -> str:
    """Who works on an output, or when somebody did last."""
    from batchgen.output.lease import holders_of

    holders = holders_of(ledger.store)
    if not holders:
        return f"nothing was ever run into {ledger.store.url}"
    ago = {holder: duration(time.time() - holder.renewed_at) for holder in holders}
    working = [f"{one}, last heard of {ago[one]} ago" for one in holders if one.at_work]
    if working:
        return f"at work: {'; '.join(working)}"
    last = holders[-1]
    if not last.released:
        how = f"was last heard of {ago[last]} ago: it was killed, or its machine is gone"
    else:
        how = f"ended {ago[last]} ago" + (f": {last.ending}" if last.ending else "")
    return f"none at work; the last one ({last}) {how}"


def at_work(ledger: Ledger) -> list[str]:
    """The runs that are at work on an output, in words."""
    from batchgen.output.lease import holders_of

    return [str(one) for one in holders_of(ledger.store) if one.at_work]


def _ledger(job: str, storage_options: tuple[str, ...], found: Found) -> Ledger:
    """Of a job that no cluster knows; that may be one which ran on this machine.

    Raises:
        UsageError: there is no such output either.
    """
    from batchgen.cluster.submit import output_of
    from batchgen.errors import UsageError

    try:
        output = output_of(job)
    except UsageError as error:
        raise UsageError(f"{found.status}; {error}") from None
    ledger = open_ledger(output, storage_options)
    if not ledger.store.list("_batchgen"):
        raise UsageError(f"{job} is no output of batchgen: nothing was run into it; {found.status}")
    return ledger


def _watch(cluster: Cluster, name: str) -> int:
    from batchgen.cluster.submit import exit_code

    for text in cluster.follow(name):
        echo(text, nl=False)
    found = cluster.find(name)
    return exit_code(found) if found else 3
