"""Tiers of the tests, by folder, and which files a worker runs together and first.

A file's tests run on one worker, since they share models and outputs. The files that share a Ray or
an S3 server are one group, so that it starts once. Long groups begin first: else one worker ends
idle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
TIERS = {
    "unit": "nothing is started; no torch, no Ray, no model",
    "model": "torch, diffusers and tiny models in this process",
    "ray": "Ray, processes of batchgen, an S3 server, a browser",
    "system": "clusters, chaos, the launcher, the wheel",
}
HEAVY = ("torch", "diffusers", "transformers", "ray")  # what no unit test loads
GROUPS = {  # fixture -> the files whose tests use it
    "ray_session": (
        *("test_addresses", "test_engine", "test_old_outputs", "test_poison", "test_pools"),
        *(
            "test_more_runs",
            "test_quota_runs",
            "test_ray_reads",
            "test_replica_faults",
            "test_run",
            "test_tail",
        ),
        "test_extend",
    ),
    "s3_server": (
        *("test_s3_faults", "test_s3_run", "test_s3_chaos", "test_s3_import", "test_s3_long"),
        "test_s3_scores",
    ),
}
GROUP = {file: fixture for fixture, files in GROUPS.items() for file in files}
LONG = (  # the longest first
    *("test_engine", "test_docs_commands", "test_s3_run", "test_crash"),
    *("test_memory_of_families", "test_no_sync_of_families", "test_families_in_16_bits"),
    *("test_offload_of_families", "test_compile", "test_gpu_benchmark", "test_gpu_runs"),
    *("test_family_stream", "test_additions"),
    *("test_cluster", "test_session", "test_submit", "test_launcher", "test_s3_long"),
)


def tier_of(path: Path) -> str | None:
    """The folder of ``tests/`` in which a test file lies."""
    return path.relative_to(TESTS).parts[0] if path.is_relative_to(TESTS) else None


def group_of(file: str) -> str:
    """Files with one group run on one worker, one after the other."""
    return GROUP.get(Path(file).stem, file)


def order(items: list[pytest.Item]) -> None:
    """Long groups first; a group's files together, in the order of their names."""
    first = {group_of(name): -place for place, name in enumerate(reversed(LONG))}
    items.sort(key=lambda item: (first.get(group_of(item.path.stem), 1), group_of(item.path.stem)))


def scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Hands out groups in the order of the items; ``--dist loadfile`` would know files alone."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return ByGroup(config, log)  # type: ignore[arg-type]
