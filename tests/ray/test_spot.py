"""The fall-back from spot to on-demand instances; every request is checked by AWS's API model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from botocore.stub import ANY, Stubber
from ray.autoscaler._private.constants import BOTO_CREATE_MAX_RETRIES
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_NODE_KIND

from batchgen.cluster.spot import MARKET, SpotFirst
from tests.cluster.files import LAUNCHER

SUBNET = "subnet-00000000"
TAGS = {TAG_RAY_NODE_KIND: "worker"}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> SpotFirst:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    settings = yaml.safe_load(LAUNCHER.read_text())["provider"]
    return SpotFirst(settings, "batchgen")


@pytest.fixture
def aws(provider: SpotFirst) -> Iterator[Stubber]:
    """What AWS answers, in turn; requests are checked against its API and what is expected."""
    with Stubber(provider.ec2_fail_fast.meta.client) as stub:
        yield stub


def worker() -> dict[str, Any]:
    """As the launcher has it when it has looked up the subnets of the zones."""
    types = yaml.safe_load(LAUNCHER.read_text())["available_node_types"]
    config: dict[str, Any] = {**types["worker"]["node_config"], "SubnetIds": [SUBNET]}
    return config


def request(count: int, spot: bool) -> dict[str, Any]:
    named = {name: value for name, value in worker().items() if name not in ("SubnetIds", MARKET)}
    market = {MARKET: {"MarketType": "spot"}} if spot else {}
    counts = {"MinCount": 1, "MaxCount": count}
    return {**named, **market, **counts, "SubnetId": SUBNET, "TagSpecifications": ANY}


def refuse(aws: Stubber, count: int, spot: bool, code: str) -> None:
    for _ in range(BOTO_CREATE_MAX_RETRIES):
        aws.add_client_error("run_instances", code, expected_params=request(count, spot))


def start(aws: Stubber, count: int, spot: bool, *ids: str) -> None:
    state = {"Name": "pending"}
    machines = [
        {"InstanceId": one, "State": state, "StateReason": {"Message": "pending"}} for one in ids
    ]
    aws.add_response("run_instances", {"Instances": machines}, request(count, spot))


def test_spot_is_taken_where_there_is_some(provider: SpotFirst, aws: Stubber) -> None:
    start(aws, 2, True, "i-1", "i-2")
    assert set(provider.create_node(worker(), TAGS, 2)) == {"i-1", "i-2"}
    aws.assert_no_pending_responses()


@pytest.mark.parametrize("code", ["InsufficientInstanceCapacity", "MaxSpotInstanceCountExceeded"])
def test_on_demand_where_there_is_none(provider: SpotFirst, aws: Stubber, code: str) -> None:
    refuse(aws, 2, True, code)
    start(aws, 2, False, "i-1", "i-2")
    assert set(provider.create_node(worker(), TAGS, 2)) == {"i-1", "i-2"}
    aws.assert_no_pending_responses()


def test_the_rest_on_demand_where_there_are_few(provider: SpotFirst, aws: Stubber) -> None:
    start(aws, 3, True, "i-1")
    start(aws, 2, False, "i-2", "i-3")
    assert set(provider.create_node(worker(), TAGS, 3)) == {"i-1", "i-2", "i-3"}
    aws.assert_no_pending_responses()


def test_another_fault_is_no_reason_to_pay_more(provider: SpotFirst, aws: Stubber) -> None:
    refuse(aws, 1, True, "UnauthorizedOperation")
    with pytest.raises(NodeLaunchException, match="UnauthorizedOperation"):
        provider.create_node(worker(), TAGS, 1)
    aws.assert_no_pending_responses()


def test_a_machine_without_spot_is_asked_for_once(provider: SpotFirst, aws: Stubber) -> None:
    refuse(aws, 1, False, "InsufficientInstanceCapacity")
    config = worker()
    del config[MARKET]
    with pytest.raises(NodeLaunchException, match="InsufficientInstanceCapacity"):
        provider.create_node(config, TAGS, 1)
    aws.assert_no_pending_responses()
