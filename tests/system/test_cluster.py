"""A cluster of three nodes and a real S3 server: a complete job, and the cost of lost parts."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cluster import job, losses, nodes
from tests.cluster.nodes import Nodes
from tests.object_store.server import PROGRAMS
from tests.object_store.server import missing as no_store

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    words = nodes.missing()
    if no_store():
        words = f"no S3 server here; `apt-get install {' '.join(PROGRAMS)}` brings one"
    if words and os.environ.get("CI"):
        pytest.fail(words)
    if words:
        pytest.skip(words)
    with job.store() as server, nodes.cluster(**server.exports) as three:
        yield three


@pytest.fixture(scope="module")
def quiet(cluster: Nodes) -> tuple[str, Counter[tuple[str, str]]]:
    return losses.quiet_run()


def test_a_whole_job(cluster: Nodes, quiet: tuple[str, Counter[tuple[str, str]]]) -> None:
    result = job.whole_job(cluster, *quiet, images=losses.IMAGES, steps=losses.STEPS)
    assert result.clean, result


@pytest.mark.parametrize("name", losses.SHORT)
def test_a_loss_costs_no_image(
    cluster: Nodes, quiet: tuple[str, Counter[tuple[str, str]]], name: str
) -> None:
    loss = losses.job_with(cluster, name, quiet[1], quiet[0])
    assert loss.clean, loss


def test_a_demand_that_is_never_met_ends_the_job_within_a_minute(
    cluster: Nodes, quiet: tuple[str, Counter[tuple[str, str]]]
) -> None:
    output = f"s3://{job.BUCKET}/never"
    asked = ("--set", "resources.generate.accelerator_type=H100", "--no-requirements")
    began = time.monotonic()
    done = cluster.batchgen("submit", *job.flags(quiet[0], output, 2), *asked)
    assert done.returncode == 1, done.stdout
    assert time.monotonic() - began < 240  # with the time to start a driver on a busy machine
    assert "a replica of the generate pool needs a node with 0.9 CPU, 0 GPU, H100" in done.stdout
    assert "2 CPU, 0 GPU" in done.stdout and "add such nodes" in done.stdout
