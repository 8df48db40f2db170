"""Commands about jobs on a Ray cluster: hand over, watch, stop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from batchgen.cli.options import main, open_ledger, spec_options, storage_option

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from batchgen.ledger import Ledger
    from batchgen.spec import Spec
    from batchgen.submit import Cluster


def address_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The head's dashboard. [default: RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265]",
    )(command)


@main.command()
@spec_options
@address_option
@click.option("--submission-id", help="Its name on the cluster; default: one with the time in it.")
@click.option("--no-wait", is_flag=True, help="Hand it over and return.")
@click.option(
    "--no-requirements",
    is_flag=True,
    help="The cluster's machines have batchgen's requirements already.",
)
def submit(
    spec: Spec,
    address: str | None,
    submission_id: str | None,
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
    from batchgen.runner import anywhere
    from batchgen.submit import Cluster

    cluster = Cluster(address)
    name = cluster.submit(anywhere(spec), submission_id, packages=not no_requirements)
    click.echo(f"submitted {name} to {cluster.address}, output {spec.output.url}", err=True)
    if no_wait:
        click.echo(name)
        return 0
    return _watch(cluster, name)


@main.command()
@click.argument("job")
@address_option
@storage_option
@click.option("--follow", is_flag=True, help="Go on until the job has ended; exit as it exits.")
def logs(job: str, address: str | None, storage_options: tuple[str, ...], follow: bool) -> int:
    """Print what JOB (submission id or output) has said, from its cluster or else its output."""
    cluster, found, why = _ask(job, address)
    if cluster is None or found is None:
        click.echo(f"{why}; from its output:", err=True)
        click.echo(_ledger(job, storage_options).logs(), nl=False)
        return 0
    name = str(found.submission_id)
    if follow:
        return _watch(cluster, name)
    click.echo(cluster.logs(name), nl=False)
    return 0


@main.command()
@click.argument("job")
@address_option
@storage_option
def cancel(job: str, address: str | None, storage_options: tuple[str, ...]) -> int:
    """Stop JOB (submission id or output); what is committed stays, `resume` goes on."""
    cluster, found, why = _ask(job, address)
    if cluster is None or found is None:
        click.echo(f"{why}; {_last_run(_ledger(job, storage_options))}", err=True)
        return 1
    name = str(found.submission_id)
    if cluster.stop(name):
        click.echo(f"stopping {name}; `batchgen resume` or `submit` goes on with what is missing")
    else:
        click.echo(f"{name} has ended already: {found.status.value.lower()}")
    return 0


def _ask(job: str, address: str | None) -> tuple[Cluster | None, JobDetails | None, str]:
    """The cluster and the job on it, or None and why."""
    from batchgen.errors import UsageError
    from batchgen.submit import Cluster

    try:
        cluster = Cluster(address)
        found = cluster.find(job)
    except UsageError as error:
        return None, None, str(error)
    return cluster, found, "" if found else f"the cluster at {cluster.address} knows no job {job}"


def _ledger(job: str, storage_options: tuple[str, ...]) -> Ledger:
    from batchgen.submit import output_of

    return open_ledger(output_of(job), storage_options)


def _last_run(ledger: Ledger) -> str:
    from batchgen.lease import holder_of

    holder = holder_of(ledger.store)
    if holder is None:
        return f"nothing was ever run into {ledger.store.url}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.renewed_at))
    if holder.at_work:
        return f"but a run is at work ({holder.owner}, last heard of at {since}): end it there"
    return f"no run is at work on {ledger.store.url}, the last one was heard of at {since}"


def _watch(cluster: Cluster, name: str) -> int:
    from batchgen.submit import exit_code

    for text in cluster.follow(name):
        sys.stdout.write(text)
        sys.stdout.flush()
    found = cluster.find(name)
    return exit_code(found) if found else 3
