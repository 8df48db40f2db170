"""``model.dtype: auto``: the device of the plan, the dtype that fits it, and who keeps a dtype."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from batchgen import runner
from batchgen.cluster.accelerators import named
from batchgen.cluster.driver import visible_gpus
from batchgen.cluster.gpus import device_for, weakest, weakest_of
from batchgen.engine import batch_size
from batchgen.errors import DamagedRecord, ModelError, SpecError, UsageError
from batchgen.models.memory import MemoryNeed, StageNeed
from batchgen.output.claim import choices_ahead
from batchgen.output.ledger import PLAN, Ledger
from batchgen.output.outcome import begin
from batchgen.plan.choices import chosen, dtype_on, keep_choices, with_provenance
from batchgen.plan.plan import make_plan
from batchgen.plan.saved import read_plan
from batchgen.progress.lines import opening
from batchgen.records import DeviceInfo
from batchgen.spec.spec import Spec
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import MODEL, plan_for, spec_for, write_prompts
from tests.fake_driver import (
    A100,
    DIVIDED,
    H100,
    L40S,
    MISMATCH,
    T4,
    V100,
    answers,
    fake_smi,
    without_ray,
)

CPU = DeviceInfo()
NEED = MemoryNeed(
    {one: StageNeed(1 << 30, 0, 1 << 28) for one in ("encode", "denoise", "decode")}, cache_bytes=0
)
KNOWN = {"model__dtype": "float32", "resources__batch_size": 8}
Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this a machine with these GPUs, as far as the driver says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    without_ray(monkeypatch)
    monkeypatch.setattr(batch_size, "need_of", lambda *asked: NEED)

    def has(*gpus: str, script: str | None = None) -> None:
        fake_smi(folder, script or answers(gpus), monkeypatch)

    return has


@pytest.mark.parametrize(
    ("gpu", "name", "mebibytes", "capability", "dtype"),
    [
        (L40S, "NVIDIA L40S", 46068, (8, 9), "bfloat16"),
        (A100, "NVIDIA A100-SXM4-80GB", 81920, (8, 0), "bfloat16"),
        (H100, "NVIDIA H100 80GB HBM3", 81559, (9, 0), "bfloat16"),
        (T4, "Tesla T4", 15360, (7, 5), "float16"),
        (V100, "Tesla V100-SXM2-16GB", 16384, (7, 0), "float16"),
        (DIVIDED, "NVIDIA H100 80GB HBM3", 0, (9, 0), "bfloat16"),
        ("12.1, [N/A], [N/A], NVIDIA GB10", "NVIDIA GB10", 0, (12, 1), "bfloat16"),
    ],
)
def test_the_driver_tells_the_device_and_so_the_dtype(
    machine: Machine, gpu: str, name: str, mebibytes: int, capability: Any, dtype: str
) -> None:
    machine(gpu)
    found = device_for(spec_for("in"), None)
    assert found == DeviceInfo(name, mebibytes << 20, capability)
    assert dtype_on(found) == dtype


def test_a_machine_without_a_gpu_is_a_cpu(machine: Machine) -> None:
    for script in (MISMATCH, 'echo "No devices were found"; exit 6', "echo; exit 0"):
        machine(script=script)
        assert device_for(spec_for("in"), None) == CPU
    assert dtype_on(CPU) == "float32"


def test_pools_that_use_no_gpu_ask_for_none(machine: Machine, tmp_path: Path) -> None:
    machine(script=f"touch {tmp_path}/asked; {answers([L40S])}")
    assert device_for(spec_for("in", resources__generate__num_gpus=0), None) == CPU
    staged = {f"resources__{name}__num_gpus": 0 for name in ("encode", "denoise", "decode")}
    assert device_for(spec_for("in", resources__layout="staged", **staged), None) == CPU
    assert not (tmp_path / "asked").exists()
    assert device_for(spec_for("in", resources__layout="staged"), None) != CPU
    assert (tmp_path / "asked").exists()


FLOAT8 = {
    "backend": "torchao",
    "components": ["unet"],
    "options": {"quant_type": "Float8DynamicActivationFloat8WeightConfig"},
}


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        ((), "the job would run on CPU, and torch multiplies float8 only on GPUs of 8.9"),
        ((A100,), "NVIDIA A100-SXM4-80GB, whose compute capability is 8.0, and torch"),
        ((H100, T4), "Tesla T4 (weakest of NVIDIA H100 80GB HBM3, Tesla T4), whose compute"),
        ((L40S,), None),
        ((H100,), None),
    ],
)
def test_float8_needs_a_gpu_that_multiplies_it(
    machine: Machine, tmp_path: Path, gpus: tuple[str, ...], told: str | None
) -> None:
    machine(*gpus, **({} if gpus else {"script": "exit 6"}))
    source = write_prompts(tmp_path / "in.parquet", 5)
    spec = spec_for(source, tmp_path / "out", model__quantization=FLOAT8)
    device = device_for(spec, None)
    if told is None:
        assert make_plan(spec, MODEL, device).spec.model.dtype == "bfloat16"
        half = spec_for(source, model__quantization=FLOAT8, model__dtype="float16")
        with pytest.raises(
            SpecError, match=r"model\.dtype: got 'float16'; allowed: bfloat16, with"
        ):
            make_plan(half, MODEL, device)
        return
    with pytest.raises(SpecError, match=re.escape(told)) as caught:
        make_plan(spec, MODEL, device)
    assert caught.value.field == "model.quantization.options.quant_type"
    assert "use Int8DynamicActivationInt8WeightConfig, or such a GPU" in str(caught.value)


def test_a_gpu_of_unknown_capability_may_multiply_float8(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 5)
    spec = spec_for(source, model__quantization=FLOAT8)
    assert make_plan(spec, MODEL, DeviceInfo("AMD-Instinct-MI300X-OAM")).device is not None


def test_a_cluster_is_asked_for_its_gpus_if_float8_needs_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = spec_for("in", model__quantization=FLOAT8, **KNOWN)
    nodes = [{"GPU": 1.0, "accelerator_type:A100": 1.0}]
    monkeypatch.setattr("batchgen.cluster.join.cluster", lambda address: nullcontext(False))
    monkeypatch.setattr("batchgen.cluster.join.nodes_that_stay", lambda: nodes)
    found = device_for(known, "head:6379")
    assert found is not None and found.capability == (8, 0)
    assert device_for(spec_for("in", **KNOWN), "head:6379") is None


@pytest.mark.parametrize(
    ("visible", "order", "seen"),
    [
        (None, None, [T4, L40S, A100]),
        ("", None, []),
        ("-1", None, []),
        ("1", "PCI_BUS_ID", [L40S]),
        ("2,1", "PCI_BUS_ID", [A100, L40S]),
        ("1,7,0", "PCI_BUS_ID", [L40S]),  # CUDA ignores what follows a number that it lacks
        ("GPU-2a", None, [A100]),
        ("GPU-0aa, GPU-1aa", None, [T4, L40S]),
        ("1", None, [T4, L40S, A100]),  # in CUDA's own order any of them may be the second
    ],
)
def test_gpus_that_the_environment_hides_do_not_count(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    order: str | None,
    seen: list[str],
) -> None:
    machine(T4, L40S, A100)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert [one.name for one in visible_gpus()] == [gpu.rpartition(", ")[2] for gpu in seen]


def test_equal_gpus_need_no_order_and_a_part_of_one_has_no_known_memory(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(A100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [one.memory_bytes for one in visible_gpus()] == [81920 << 20]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5a")
    assert {one.memory_bytes for one in visible_gpus()} == {0}


def test_of_different_gpus_the_weakest_counts() -> None:
    small, large = DeviceInfo("A10", 22 << 30, (8, 6)), DeviceInfo("T4", 30 << 30, (7, 5))
    assert weakest([small, large]) == DeviceInfo("T4 (weakest of A10, T4)", 22 << 30, (7, 5))
    assert weakest([small, small]) == small
    assert weakest([DeviceInfo("AMD-Instinct-MI300X-OAM"), small]).memory_bytes == 0
    assert weakest([]) == CPU


def node(*names: str, gpus: float = 8, **resources: float) -> dict[str, float]:
    return {"CPU": 64, "GPU": gpus, **resources, **{f"accelerator_type:{one}": 1 for one in names}}


HEAD = {"CPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "pool", "name", "dtype"),
    [
        ([HEAD], {}, "CPU", "float32"),
        ([HEAD, node("L40S")], {}, "L40S", "bfloat16"),
        ([HEAD, node("L40S")], {"num_gpus": 0}, "CPU", "float32"),
        ([node("A100"), node("H100")], {}, "A100 (weakest of A100, H100)", "bfloat16"),
        ([node("A100"), node("T4")], {}, "T4 (weakest of A100, T4)", "float16"),
        ([node("A100"), node("T4")], {"accelerator_type": "A100"}, "A100", "bfloat16"),
        ([node("A100", fast=1), node("T4")], {"resources": {"fast": 1}}, "A100", "bfloat16"),
        ([HEAD], {"num_gpus": 1, "accelerator_type": "V100"}, "V100", "float16"),
        ([HEAD], {"accelerator_type": "H100"}, "H100", "bfloat16"),
        ([node("GeForce-RTX-2080-Ti")], {}, "GeForce-RTX-2080-Ti", "float16"),
        ([node("GeForce-RTX-6090")], {}, "GeForce-RTX-6090", "bfloat16"),
        ([node("AMD-Instinct-MI300X-OAM")], {}, "AMD-Instinct-MI300X-OAM", "bfloat16"),
        ([node()], {}, "GPU without a name", "bfloat16"),
    ],
)
def test_a_clusters_nodes_tell_the_weakest_gpu_that_the_pools_may_use(
    nodes: list[dict[str, float]], pool: dict[str, Any], name: str, dtype: str
) -> None:
    found = weakest_of(nodes, spec_for("in", resources__generate=pool))
    assert (found.name, dtype_on(found)) == (name, dtype)


def test_every_pool_of_the_staged_layout_counts() -> None:
    nodes, staged = [HEAD, node("T4"), node("H100")], {"resources__layout": "staged"}
    kinds = {f"resources__{name}__accelerator_type": "H100" for name in ("denoise", "decode")}
    assert weakest_of(nodes, spec_for("in", **staged, **kinds)).name.startswith("T4 ")
    spec = spec_for("in", **staged, **kinds, resources__encode__num_gpus=0)
    assert weakest_of(nodes, spec).name == "H100"


def test_of_two_names_of_a_node_the_more_exact_one_counts() -> None:
    (found,) = {weakest_of([node("A100", "A100-80G")], spec_for("in"))}
    assert found == named("A100-80G") and found.memory_bytes == 79 << 30


def test_a_cluster_without_gpus_yet_is_not_guessed() -> None:
    spec = spec_for("in", resources__generate__num_gpus=1)
    with pytest.raises(UsageError, match=r"no GPU yet .* --set model\.dtype=bfloat16") as said:
        weakest_of([HEAD], spec)
    assert "resources.generate.num_gpus is 1" in str(said.value)
    assert "resources.generate.accelerator_type" in str(said.value)
    known = spec_for("in", model__dtype="float16")
    assert weakest_of([HEAD], known).memory_bytes == 0, "the batch size is the usual one"
    assert weakest_of([HEAD], spec, may_grow=False) == CPU  # the pool itself will be refused


def test_a_cluster_is_joined_only_if_a_field_depends_on_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(T4)
    spec = spec_for("in", model__dtype="float16", resources__batch_size=8)
    assert device_for(spec, "nowhere.invalid:6379") is None
    monkeypatch.setenv("RAY_ADDRESS", "nowhere.invalid:6379")
    assert device_for(spec, None) is None
    found = device_for(spec, "local")
    assert found is not None and found.name == "Tesla T4"


@pytest.mark.parametrize("device", [None, CPU])
def test_on_the_cpu_the_plan_is_that_of_float32(tmp_path: Path, device: Any) -> None:
    source = write_prompts(tmp_path / "in.parquet", 4)
    plan = make_plan(spec_for(source), MODEL, device)
    same = plan_for(source, model__dtype="float32", resources__batch_size=8)
    assert spec_for(source).open_fields == ("model.dtype", "resources.batch_size")
    assert plan.fingerprints == same.fingerprints
    assert plan.to_json() == same.to_json()


def test_on_a_gpu_the_plan_has_the_dtype_that_fits_it(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 4)
    plan = make_plan(spec_for(source), MODEL, named("L40S"))
    assert (plan.spec.model.dtype, plan.device) == ("bfloat16", named("L40S"))
    assert plan.fingerprint == plan_for(source, model__dtype="bfloat16").fingerprint
    asked = make_plan(spec_for(source, model__dtype="float32"), MODEL, named("L40S"))
    assert asked.spec.model.dtype == "float32"
    again = read_plan(plan.to_json())
    assert again == plan and again.device is None


def test_a_saved_plan_without_a_dtype_is_damaged(tmp_path: Path) -> None:
    plan = plan_for(write_prompts(tmp_path / "in.parquet", 4))
    tree = json.loads(plan.to_json())
    tree["spec"]["model"]["dtype"] = "auto"
    with pytest.raises(DamagedRecord, match=r"its model\.dtype is auto"):
        read_plan(json.dumps(tree))
    tree["spec"]["model"]["dtype"] = "float32"
    tree["spec"]["resources"]["batch_size"] = "auto"
    with pytest.raises(DamagedRecord, match=r"its resources\.batch_size is auto"):
        read_plan(json.dumps(tree))


def test_the_opening_line_names_the_dtype(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 4)
    plan = make_plan(spec_for(source, tmp_path / "out"), MODEL, named("T4"))
    ledger = Ledger(open_store(str(tmp_path / "out")))
    tally, states = begin(plan, ledger, None, print)
    assert opening(plan, states, tally.samples).endswith(", fused, float16")


def begun(machine: Machine, tmp_path: Path) -> tuple[Spec, Ledger]:
    """An output of two shards that was planned on an L40S; one shard is left."""
    source = write_prompts(tmp_path / "in.parquet", 4)
    spec = spec_for(source, tmp_path / "out", output__samples_per_shard=2)
    ledger = Ledger(open_store(spec.output.url))
    machine(L40S)
    plan = runner.plan_job(spec)
    ledger.freeze(plan, spec)
    make_output(plan, ledger)
    ledger.withdraw(1)
    return spec, ledger


def no_stream(plan: Any, *rest: object) -> str:
    return f"stopped with {plan.spec.model.dtype} in {plan.fingerprint}"


@pytest.mark.parametrize("gpus", [(), (T4,), (H100,)])
def test_an_output_keeps_its_dtype_on_every_machine(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...]
) -> None:
    spec, ledger = begun(machine, tmp_path)
    before = ledger.require_plan()
    machine(*gpus)
    assert runner.plan_job(spec).spec.model.dtype == "bfloat16"
    assert runner.plan_job(spec).spec.resources.batch_size == before.spec.resources.batch_size == 2
    monkeypatch.setattr(runner, "_stream", no_stream)
    expected = f"stopped with bfloat16 in {before.fingerprint}"
    assert runner.resume(spec.output.url, quiet=True).message == expected
    assert runner.run(spec, quiet=True).message == expected
    assert ledger.job().open_fields == ("model.dtype", "resources.batch_size")
    assert ledger.require_plan().spec.model.dtype == "bfloat16"
    again = runner.run(spec, quiet=True, overwrite=True).message
    assert again.startswith(f"stopped with {dtype_on(weakest(visible_gpus()))} in ")


def test_a_plan_that_was_not_used_is_made_for_the_new_machine(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is mended after the first try must not leave the job in float32."""
    source = write_prompts(tmp_path / "in.parquet", 4)
    spec = spec_for(source, tmp_path / "out", output__samples_per_shard=2)
    ledger = Ledger(open_store(spec.output.url))
    monkeypatch.setattr(runner, "_stream", no_stream)
    machine(script=MISMATCH)
    assert runner.run(spec, quiet=True, shards="0:1").message.find("float32") > 0
    machine(L40S)
    assert "with float32 in " in runner.run(spec, quiet=True, shards="1:2").message
    assert "with bfloat16 in " in runner.run(spec, quiet=True).message
    assert ledger.require_plan().spec.model.dtype == "bfloat16"


def test_the_batch_size_is_that_of_the_gpu_and_stays(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_prompts(tmp_path / "in.parquet", 128)
    spec = spec_for(source, tmp_path / "out")
    sizes: list[int] = []

    def no_stream(plan: Any, *rest: object) -> str:
        sizes.append(plan.spec.resources.batch_size)
        return "stopped"

    monkeypatch.setattr(runner, "_stream", no_stream)
    ledger = Ledger(open_store(spec.output.url))
    for gpus, size in (((L40S,), 64), ((T4,), 42), ((), 8), ((T4,), 42)):  # 64 are a shard
        machine(*gpus)
        runner.run(spec, quiet=True) if not sizes else runner.resume(spec.output.url, quiet=True)
        assert sizes.pop() == ledger.require_plan().spec.resources.batch_size == size
        sizes.append(0)
    make_output(ledger.require_plan(), ledger)
    ledger.withdraw(1)
    machine(L40S)
    runner.resume(spec.output.url, quiet=True)
    runner.resume(spec.output.url, quiet=True, batch_size=4)
    runner.resume(spec.output.url, quiet=True)
    assert sizes[-3:] == [42, 4, 4]
    assert ledger.require_plan().spec.resources.batch_size == 42


def test_a_need_that_cannot_be_computed_is_said(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*asked: object) -> NoReturn:
        raise ModelError("model tiny: its memory cannot be computed: exit code -9")

    source = write_prompts(tmp_path / "in.parquet", 64)
    machine(L40S)
    monkeypatch.setattr(batch_size, "need_of", killed)
    monkeypatch.setattr(runner, "_stream", no_stream)
    spec = spec_for(source, tmp_path / "out")
    plan = runner.plan_job(spec)
    assert plan.spec.resources.batch_size == 8
    (note,) = plan.notes
    assert note.startswith("resources.batch_size: auto is 8") and note.endswith("exit code -9")
    runner.run(spec, quiet=True)
    assert note in Ledger(open_store(spec.output.url)).logs()


@pytest.mark.parametrize(
    ("gpus", "fields", "idle"),
    [
        ((L40S,), {}, ""),
        ((), {}, "encode, denoise"),
        ((L40S,), {"generate": {"num_gpus": 0}}, "encode, denoise"),
        ((L40S,), {"layout": "staged", "encode": {"num_gpus": 0}}, "encode"),
    ],
)
def test_offload_without_effect_is_said(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[str, ...],
    fields: dict[str, Any],
    idle: str,
) -> None:
    source = write_prompts(tmp_path / "in.parquet", 8)
    machine(*gpus)
    monkeypatch.setattr(runner, "_stream", no_stream)
    resources = {"offload": ["encode", "denoise"], **fields}
    spec = spec_for(source, tmp_path / "out", **KNOWN | {"resources": resources})
    notes = runner.plan_job(spec).notes
    assert len(notes) == (1 if idle else 0)
    if idle:
        assert notes[0].startswith(f"resources.offload has no effect on {idle}: on a CPU")


def test_an_output_is_read_ahead_only_for_a_field_that_is_open(tmp_path: Path) -> None:
    (tmp_path / "out" / PLAN).parent.mkdir(parents=True)
    (tmp_path / "out" / PLAN).write_text("{}")
    (tmp_path / "out/data").mkdir()
    (tmp_path / "out/data/x.parquet").write_text("x")
    asked = spec_for("in", tmp_path / "out", output__provenance="xmp", **KNOWN)
    assert choices_ahead(asked) is asked
    with pytest.raises(DamagedRecord):
        choices_ahead(spec_for("in", tmp_path / "out"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "http://127.0.0.1:9/out"):
        unknown = spec_for("in", place)
        assert choices_ahead(unknown) is unknown


def test_a_dtype_that_was_asked_for_is_never_replaced(tmp_path: Path) -> None:
    saved = plan_for(write_prompts(tmp_path / "in.parquet", 4), model__dtype="bfloat16")
    asked = spec_for("in", **{**KNOWN, "model__dtype": "float16", "output__provenance": "none"})
    assert keep_choices(asked, saved) is asked
    assert keep_choices(spec_for("in"), None).model.dtype == "auto"
    assert keep_choices(spec_for("in"), saved).model.dtype == "bfloat16"


def test_new_outputs_are_marked_and_older_ones_stay_as_they_were(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 4)
    new = plan_for(source)
    assert new.spec.output.provenance == "xmp"
    assert keep_choices(spec_for(source), new).output.provenance == "xmp"
    older = replace(new, spec=with_provenance(new.spec, "none"))
    unsaid = new.spec.output.model_copy(update={"provenance": None})
    before = replace(new, spec=new.spec.model_copy(update={"output": unsaid}))
    assert before.spec.fingerprint == older.spec.fingerprint != new.spec.fingerprint
    again = keep_choices(spec_for(source), before)
    assert chosen(again, DeviceInfo()).output.provenance == "none"
    assert plan_for(source, output__provenance="none").spec.output.provenance == "none"
