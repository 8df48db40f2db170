"""The files that start clusters are valid by the schemas of Ray, AWS and KubeRay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.providers import _get_default_config, _get_node_provider_cls

from batchgen.cluster.spot import SpotFirst
from tests.cluster.files import LAUNCHER, check_launcher_file, check_rayjob

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launcher() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(LAUNCHER.read_text())
    return tree


@pytest.fixture
def rayjob() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / "kuberay.yaml").read_text())
    return tree


def test_the_launcher_file_is_valid(launcher: dict[str, Any]) -> None:
    prepared = check_launcher_file(copy.deepcopy(launcher))
    worker = prepared["available_node_types"]["worker"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_its_provider_is_there(launcher: dict[str, Any]) -> None:
    assert _get_node_provider_cls(launcher["provider"]) is SpotFirst


def test_it_says_what_ray_has_defaults_for_with_its_own_providers(
    launcher: dict[str, Any],
) -> None:
    defaults = _get_default_config({"type": "aws"})
    assert defaults.keys() <= launcher.keys()


def test_what_it_copies_is_there(launcher: dict[str, Any]) -> None:
    for local in launcher["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_worker",), 3),
        (("max_workers",), "many"),
        (("available_node_types", "worker", "instance_type"), "g6e.xlarge"),
        (("available_node_types", "worker", "node_config", "InstanceTyp"), "g6e.xlarge"),
        (("available_node_types", "worker", "node_config", "BlockDeviceMappings"), "200 GB"),
        (("head_node_type",), "chief"),
    ],
)
def test_a_wrong_launcher_file_is_refused(
    launcher: dict[str, Any], path: tuple[str, ...], value: object
) -> None:
    *folders, name = path
    tree = launcher
    for folder in folders:
        tree = tree[folder]
    tree[name] = value
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check_launcher_file(launcher)


def test_the_rayjob_is_valid(rayjob: dict[str, Any]) -> None:
    check_rayjob(rayjob)
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "python x.py"),
        (("spec", "backoffLimit"), "twice"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "container"), []),
    ],
)
def test_a_wrong_rayjob_is_refused(
    rayjob: dict[str, Any], path: tuple[str, ...], value: object
) -> None:
    *folders, name = path
    tree = rayjob
    for folder in folders:
        tree = tree[folder]
    tree[name] = value
    with pytest.raises(jsonschema.ValidationError):
        check_rayjob(rayjob)
