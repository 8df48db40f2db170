"""What pools reserve, how many replicas fit on nodes, and the message if they never will."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchgen import runner
from batchgen.cluster.gpus import device_for
from batchgen.engine import demand, pools
from batchgen.engine.actors import Decode, Denoise, Encode, Generate
from batchgen.engine.pools import Reservation, lacking, pools_of
from batchgen.errors import UsageError
from batchgen.records import DeviceInfo
from tests.datasets_on_disk import plan_for
from tests.outputs import spec_for

CPU_NODE = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:L40S": 1.0}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that the cluster has these nodes."""

    def have(*some: dict[str, float]) -> None:
        total: dict[str, float] = {}
        for node in some:
            for name, amount in node.items():
                total[name] = total.get(name, 0.0) + amount
        monkeypatch.setattr(pools, "nodes_that_stay", lambda: [dict(node) for node in some])
        monkeypatch.setattr(pools.ray, "cluster_resources", lambda: total)

    return have


def shares(
    tmp_path: Path, count: int, nodes_may_join: bool = True, **resources: Any
) -> dict[type, Reservation]:
    plan = plan_for(prompts_at(tmp_path), tmp_path / "out", resources=resources)
    return dict(pools_of(plan, count, nodes_may_join))


def prompts_at(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a red star"]}), folder / "prompts.parquet")
    return folder / "prompts.parquet"


def test_without_a_gpu_the_device_of_a_run_in_this_process_is_the_cpu(ray_session: None) -> None:
    for pool in ({}, {"num_gpus": 2}):  # the second will be refused, since no node can join
        spec = spec_for("in", "out", resources__generate=pool)
        assert device_for(spec, None) == DeviceInfo()


def test_one_replica_a_gpu_and_never_more_than_shards(
    tmp_path: Path, nodes: Callable[..., None]
) -> None:
    nodes(CPU_NODE, GPU_NODE, GPU_NODE)
    (share,) = shares(tmp_path, 100).values()
    assert (share.num_gpus, share.num_cpus, share.start_replicas) == (1.0, 0.5, 8)
    assert share.max_replicas == 100  # as nodes join
    (share,) = shares(tmp_path, 3).values()
    assert (share.start_replicas, share.max_replicas) == (3, 3)


def test_replicas_may_have_every_cpu(tmp_path: Path, nodes: Callable[..., None]) -> None:
    """Readers reserve no CPU; test_run.py runs such a job."""
    nodes({"CPU": 2.0})
    (share,) = shares(tmp_path, 100, generate={"num_cpus": 1}).values()
    assert share.start_replicas == 2


def test_staged_pools_share_the_devices(tmp_path: Path, nodes: Callable[..., None]) -> None:
    """Denoisers take what the others leave; all grow while they are busy: benchmarks/scaling.py."""
    nodes(GPU_NODE)
    found = shares(tmp_path, 100, layout="staged")
    kinds = (Encode, Denoise, Decode)
    assert [found[kind].num_gpus for kind in kinds] == [0.1, 0.8, 0.1]
    assert [found[kind].start_replicas for kind in kinds] == [1, 4, 1]
    assert {found[kind].max_replicas for kind in kinds} == {100}
    nodes({"CPU": 2.0})
    found = shares(tmp_path, 100, layout="staged")
    assert [found[kind].start_replicas for kind in kinds] == [1, 2, 1]
    found = shares(tmp_path, 100, layout="staged", denoise={"max_replicas": 1})
    assert [found[kind].start_replicas for kind in kinds] == [1, 1, 1]


def test_without_new_nodes_encoders_and_decoders_are_half_as_many_as_denoisers(
    tmp_path: Path, nodes: Callable[..., None]
) -> None:
    """Each one more takes seconds to load, for a queue that is full only at the start."""
    kinds = (Encode, Denoise, Decode)
    nodes({"CPU": 2.0})
    found = shares(tmp_path, 100, nodes_may_join=False, layout="staged")
    assert [found[kind].max_replicas for kind in kinds] == [1, 100, 1]
    nodes(GPU_NODE, GPU_NODE)
    found = shares(tmp_path, 100, nodes_may_join=False, layout="staged", encode={"min_replicas": 5})
    assert [found[kind].max_replicas for kind in kinds] == [5, 100, 4]
    found = shares(tmp_path, 100, nodes_may_join=False, layout="staged", decode={"max_replicas": 9})
    assert [found[kind].max_replicas for kind in kinds] == [4, 100, 9]
    found = shares(tmp_path, 3, nodes_may_join=False, layout="staged")
    assert [found[kind].max_replicas for kind in kinds] == [2, 3, 2]


def test_a_fraction_of_a_gpu_must_fit_into_one_gpu(
    tmp_path: Path, nodes: Callable[..., None]
) -> None:
    nodes({"CPU": 64.0, "GPU": 8.0})
    found = shares(tmp_path, 100, layout="staged")
    assert found[Denoise].start_replicas == 8  # in all, room for 9.75 times 0.8 of a GPU
    (share,) = shares(tmp_path, 100, generate={"num_gpus": 0.4}).values()
    assert share.start_replicas == 16
    (share,) = shares(tmp_path, 100, generate={"num_gpus": 3}).values()
    assert share.start_replicas == 2
    nodes({"CPU": 64.0, "GPU": 2.0})
    found = shares(tmp_path, 100, layout="staged", denoise={"num_gpus": 1})
    assert found[Denoise].start_replicas == 1  # encoder and decoder share the other GPU


def test_a_cheap_node_encodes_and_a_big_one_denoises(
    tmp_path: Path, nodes: Callable[..., None]
) -> None:
    small, big = {"CPU": 4.0, "GPU": 1.0, "small": 1.0}, {**GPU_NODE, "accelerator_type:H100": 1.0}
    asked: dict[str, Any] = {
        "layout": "staged",
        "encode": {"resources": {"small": 0.5}, "num_gpus": 0.5},
        "denoise": {"accelerator_type": "H100", "num_gpus": 2},
        "decode": {"resources": {"small": 0.5}, "num_gpus": 0.5},
    }
    nodes(small, big)
    found = shares(tmp_path, 100, **asked)
    assert found[Denoise].demand == {"CPU": 0.5, "GPU": 2, "accelerator_type:H100": 0.001}
    assert lacking(list(found.items()), [small, big]) is None
    assert lacking(list(found.items()), [small, GPU_NODE]) == ("denoise", found[Denoise])
    assert lacking(list(found.items()), [big, big]) is not None


def test_gpus_of_two_nodes_are_not_one_replica_s(
    tmp_path: Path, nodes: Callable[..., None]
) -> None:
    one = {"CPU": 8.0, "GPU": 1.0}
    nodes(one, one)
    (share,) = shares(tmp_path, 9, generate={"num_gpus": 2}).values()
    assert lacking([(Generate, share)], [one, one]) == ("generate", share)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"accelerator_type": "H100"}, "with 0.9 CPU, 0 GPU, H100 free; the cluster has 1 node of"),
        ({"resources": {"denoiser": 1}}, "0.9 CPU, 0 GPU, 1 denoiser free"),
        ({"min_replicas": 3, "num_cpus": 2}, "each of 3 replicas of the generate pool"),
    ],
)
@pytest.mark.usefixtures("ray_session")
def test_what_can_never_be_is_said(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    spec = spec_for(prompts_at(tmp_path), tmp_path / "out", resources__generate=asked)
    with pytest.raises(UsageError, match=said) as caught:
        runner.run(spec, quiet=True)
    assert "in resources.generate, or add such nodes" in str(caught.value)


def test_nodes_that_are_lost_for_good_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent head is not a loss of nodes; nodes that it later reports as lost are."""
    answers: list[list[dict[str, float]] | None] = [None, [CPU_NODE], None, []]
    asked, said = threading.Event(), list[str]()

    def nodes_that_stay() -> list[dict[str, float]]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            assert not said
            raise RuntimeError("the GCS is being started again")
        return answer

    def interrupt(words: str) -> None:
        said.append(words)
        asked.set()

    monkeypatch.setattr(demand, "nodes_that_stay", nodes_that_stay)
    monkeypatch.setattr(demand, "_coming", lambda: False)
    monkeypatch.setattr(demand, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(demand, "GONE_FOR_S", 0.02)
    with demand.watched([(Generate, Reservation(1, 1, 0.9, 0.0))], interrupt):
        assert asked.wait(30)
    assert len(said) == 1 and not answers[0]
    assert "nodes were lost and not replaced" in said[0] and "0.9 CPU" in said[0]
