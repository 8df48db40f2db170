"""Commands for jobs on a Ray cluster: submit, logs, cancel."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
        help="URL of the cluster's dashboard, which is also its job server. [default: "
        "RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265]",
    )(command)


def requirements_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--no-requirements",
        is_flag=True,
        help="Do not install batchgen's requirements: the cluster's machines have them.",
    )(command)


@main.command()
@partial(spec_options, reads="submit")
@address_option
@click.option(
    "--submission-id", help="Name of the job on the cluster; default: a name with the time in it."
)
@shards_option
@click.option("--no-wait", is_flag=True, help="Submit the job and return at once.")
@requirements_option
def submit(
    spec: Spec,
    address: str | None,
    submission_id: str | None,
    shards: str | None,
    no_wait: bool,
    no_requirements: bool,
) -> int:
    """Run a job on a Ray cluster, print its log, and exit with its exit code.

    The job continues if this command is stopped or loses its connection. The package and its pinned
    requirements are sent to the cluster; secrets are not. The spec names environment variables that
    the cluster's machines have, or the machines' instance roles give access to the stores.

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
@click.option(
    "--follow", is_flag=True, help="Continue until the job has ended; exit with its exit code."
)
def logs(job: str, address: str | None, storage_options: tuple[str, ...], follow: bool) -> int:
    """Print the log of JOB (submission id or output), from its cluster or else from its output."""
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
    """Stop JOB (submission id or output). Committed shards stay, and `resume` continues."""
    found = ask(job, address)
    if found.cluster is None:
        state = last_run(_ledger(job, storage_options, found))
        said = f"{found.status}\n{state}" if address else f"not a job on a cluster; {state}"
        echo(said, err=True)
        return 1
    if found.cluster.stop(found.name):
        echo(f"stopping {found.name}; `batchgen resume` continues with the missing shards")
    else:
        echo(f"{found.name} has ended already: {found.status}")
    return 0


def resume_on(
    address: str,
    output: str,
    storage_options: tuple[str, ...],
    shards: str | None,
    sizes: Mapping[str, int | None],
    packages: bool,
) -> int:
    """Submit the resume of an output's job, and print its log.

    ``sizes``: options of ``resume`` with the sizes of calls; None for one that is not given.
    """
    from batchgen.cluster.submit import Cluster
    from batchgen.storage import absolute

    cluster = Cluster(address)
    options = [word for one in storage_options for word in ("--storage-option", one)]
    options += ["--shards", shards] if shards else []
    options += [f"{flag}={size}" for flag, size in sizes.items() if size is not None]
    name = cluster.resume(absolute(output), options, packages)
    echo(f"submitted {name} to {cluster.address}, output {output}", err=True)
    return _watch(cluster, name)


@dataclass(frozen=True)
class FoundJob:
    """A job on a cluster. If ``cluster`` is None, ``status`` says why there is none."""

    cluster: Cluster | None
    name: str
    output: str
    status: str


def ask(job: str, address: str | None) -> FoundJob:
    """Look for a job on a cluster, by submission id or by output."""
    from batchgen.cluster.submit import OUTPUT, Cluster
    from batchgen.errors import UsageError

    try:
        cluster = Cluster(address)
        found = cluster.find(job)
    except UsageError as error:
        return FoundJob(None, "", "", str(error))
    if found is None or found.submission_id is None:
        return FoundJob(None, "", "", f"the cluster at {cluster.address} has no job {job}")
    output = (found.metadata or {}).get(OUTPUT, "")
    return FoundJob(cluster, found.submission_id, output, found.status.value.lower())


def last_run(ledger: Ledger) -> str:
    """Describe the runs that are working on an output, or the last one that did."""
    from batchgen.output.lease import holders_of

    holders = holders_of(ledger.store)
    if not holders:
        return f"no run has ever written to {ledger.store.url}"
    ago = {holder: duration(time.time() - holder.renewed_at) for holder in holders}
    working = [f"{one}, last heartbeat {ago[one]} ago" for one in holders if one.at_work]
    if working:
        return f"running: {'; '.join(working)}"
    last = holders[-1]
    if not last.released:
        how = f"had its last heartbeat {ago[last]} ago: it was killed, or its machine is gone"
    else:
        how = f"ended {ago[last]} ago" + (f": {last.ending}" if last.ending else "")
    return f"not running; the last run ({last}) {how}"


def at_work(ledger: Ledger) -> list[str]:
    """Describe the runs that are working on an output."""
    from batchgen.output.lease import holders_of

    return [str(one) for one in holders_of(ledger.store) if one.at_work]


def _ledger(job: str, storage_options: tuple[str, ...], found: FoundJob) -> Ledger:
    """Return the ledger of a job that no cluster knows: it may have run on this machine.

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
        raise UsageError(
            f"{job} is not an output of batchgen: no run has written to it; {found.status}"
        )
    return ledger


def _watch(cluster: Cluster, name: str) -> int:
    from batchgen.cluster.submit import exit_code

    for text in cluster.follow(name):
        echo(text, nl=False)
    found = cluster.find(name)
    return exit_code(found) if found else 3
