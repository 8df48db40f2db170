"""Checks a cluster-launcher file by Ray's own schema, and a RayJob by KubeRay's.

python -m tests.cluster.files ray-cluster.yaml
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import yaml
from botocore.validate import ParamValidator

LAUNCHER = Path(__file__).parents[2] / "ray-cluster.yaml"
SCHEMAS = Path(__file__).parents[1] / "schemas"
# spec.versions[v1].schema of ray-operator/config/crd/bases/ray.io_rayjobs.yaml of
# https://github.com/ray-project/kuberay (Apache-2.0), tag v1.7.0, without its descriptions.
RAYJOB = SCHEMAS / "kuberay-1.7.0-rayjob-v1.json.gz"


def check_launcher_file(tree: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it before it starts anything.

    Ray's schema knows nothing of machines: they are checked by AWS's own description of its API.

    Raises:
        jsonschema.ValidationError, ValueError: it is not valid.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(tree)
    validate_config(prepared)
    for name, node_type in prepared["available_node_types"].items():
        check_machine(name, node_type["node_config"])
    return prepared


def check_machine(name: str, node_config: dict[str, Any]) -> None:
    """As AWS does before it starts one (RunInstances, by the model that botocore ships)."""
    service = botocore.session.get_session().get_service_model("ec2")
    counts = {"MinCount": 1, "MaxCount": 1}  # Ray says them
    shape = service.operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**node_config, **counts}, shape)
    if report.has_errors():
        raise ValueError(f"available_node_types.{name}.node_config: {report.generate_report()}")


def check_rayjob(tree: dict[str, Any]) -> None:
    """As the API server does where validation is strict: unknown fields are refused too.

    Raises:
        jsonschema.ValidationError: it is not valid.
    """
    schema = _closed(json.loads(gzip.decompress(RAYJOB.read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(tree, schema)


def _closed(schema: Any) -> Any:
    """A structural schema as JSON Schema, closed to fields that it does not name."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if closed.get("x-kubernetes-int-or-string") is True:
        closed.pop("anyOf", None)
        closed["type"] = ["integer", "string"]
    named = isinstance(closed.get("properties"), dict) and closed.get("type") == "object"
    if named and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def main() -> int:
    for name in sys.argv[1:]:
        tree = yaml.safe_load(Path(name).read_text())
        check = check_rayjob if tree.get("kind") == "RayJob" else check_launcher_file
        check(tree)
        print(f"{name}: valid")
    return 0


if __name__ == "__main__":
    sys.exit(main())
