"""The memory that is computed without weights, against what torch allocates with them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from batchgen import models
from batchgen.families import family_named
from batchgen.models import memory_measure
from batchgen.models.memory import FUSED, STAGES
from batchgen.models.memory_trace import Unread, counting
from batchgen.models.tiny import BUILDERS
from batchgen.plan.call_settings import usual_call
from batchgen.plan.checks import settle
from batchgen.records import GENERATOR_STATE_BYTES
from batchgen.spec.build import build
from tests.family_specs import family_spec
from tests.model_configs import write_configs
from tests.tiny_models import build_model

GIB = 1 << 30
# A U-Net and a transformer; tests/system compares five more and measures all others.
FEW = (("text-to-image", "stable-diffusion"), ("text-to-image", "flux"))
# Pixels. The CPU's convolutions unfold smaller images (im2col), and its attention has a buffer of
# 0.7 MB from 768 tokens on, which Flux has with 128 pixels.
SIDES = {"flux": 64}
SIDE = 128
HOST_BYTES = 40_000  # what else encoding allocates on a CPU: masks and tokens of two encoders
FURTHEST = 0.15


def allocated(run: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and the peak of the bytes that torch's CPU allocator says it gave out in it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        made = run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    assert events
    living = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        living += event.nbytes()
        peak = max(peak, living)
    return made, peak


class Measured:
    """A tiny model of a family at 128 pixels: its spec, what was computed, and its real stages."""

    def __init__(self, task: str, name: str, folder: Path, **model: Any) -> None:
        family = family_named(task, name)
        path = BUILDERS[task, name](folder / "model")
        spec = family_spec(family, path, folder / "rows.parquet", folder / "out", torch_threads=2)
        section = spec.model.model_copy(update=model)
        self.info = models.inspect(section, task)
        free = not self.info.fixed_size
        side = SIDES.get(name, SIDE)
        size = {"width": side, "height": side} if free else {}
        sampling = spec.sampling.model_copy(update=size)
        self.spec = settle(
            spec.model_copy(update={"model": section, "sampling": sampling}), self.info
        )
        self.call = usual_call(self.spec, self.info)
        self.need = memory_measure.measure(self.info, self.spec, self.call)

    def real(self, batch_sizes: Sequence[int]) -> Iterator[tuple[str, int, int, int]]:
        """Stage, batch size, bytes of the weights, and peak of what a call allocates."""
        given = (self.info, self.spec)
        loaders = (models.load_encoder, models.load_denoiser, models.load_decoder)
        stages = dict(zip(STAGES, (load(*given) for load in loaders), strict=True))
        call = memory_measure.shortened(self.info, self.call)
        for size in (3, *batch_sizes):  # the first warms up
            batch: Any = memory_measure.batch_of(*given, call, size)
            held = 0
            for name, stage in stages.items():
                stage.batch_size = size
                batch, peak = allocated(lambda stage=stage, batch=batch: stage(batch))
                if size != 3:
                    yield name, size, bytes_of(memory_measure.weights_of(stage)), peak + held
                held += bytes_of(memory_measure.results_of(batch))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(("task", "name"), FEW, ids=[f"{task}-{name}" for task, name in FEW])
def test_the_need_is_what_torch_allocates(task: str, name: str, tmp_path: Path) -> None:
    near_to_what_torch_allocates(task, name, tmp_path)


def near_to_what_torch_allocates(task: str, name: str, folder: Path) -> None:
    """Compare the need of a tiny model with what its stages allocate.

    torch's profiler records every block that its CPU allocator gives out.

    On the CPU, encoding also allocates masks, tokens and the states of the generators, 10 kB an
    image: as much as a tiny CLIP.
    """
    measured = Measured(task, name, folder)
    for stage, size, weights, call in measured.real((1, 2, 4)):
        need = measured.need.stages[stage]
        host = HOST_BYTES + 2 * GENERATOR_STATE_BYTES * size if stage == "encode" else 0
        assert need.weight_bytes == weights, stage
        near = pytest.approx(call, rel=FURTHEST, abs=host)
        assert need.call_bytes(size) == near, (stage, size)


@pytest.mark.parametrize(
    ("dtype", "family", "grows"),
    [("float16", "stable-diffusion-xl", True), ("bfloat16", "stable-diffusion-xl", False)],
)
def test_half_precision_halves_all_but_a_vae_that_overflows(
    dtype: str, family: str, grows: bool, tmp_path: Path
) -> None:
    whole = Measured("text-to-image", family, tmp_path).need
    half = Measured("text-to-image", family, tmp_path, dtype=dtype).need
    for stage in STAGES:
        ratio = half.stages[stage].weight_bytes / whole.stages[stage].weight_bytes
        assert ratio == pytest.approx(0.5, abs=0.01)
    assert half.stages["denoise"].call_bytes(4) < 0.6 * whole.stages["denoise"].call_bytes(4)
    decoding = half.stages["decode"].call_bytes(4) / whole.stages["decode"].call_bytes(4)
    assert (decoding > 0.95) == grows  # ``force_upcast``: it runs in float32


@pytest.mark.parametrize(("name", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_true_models(name: str, parameters: int, tmp_path: Path) -> None:
    """Sizes as published; SDXL's VAE decodes an image in float32 through 256 channels at 1024 px.

    A copy of these channels is 1 GiB; three of them are alive at a time.
    """
    path = write_configs(name, tmp_path / name)
    spec = build(
        {
            "input": {"path": "x"},
            "output": {"url": "y"},
            "model": {"path": str(path), "dtype": "float16"},
        }
    )
    info = models.inspect(spec.model, spec.task)
    spec = settle(spec, info)
    need = memory_measure.measure(info, spec, usual_call(spec, info))
    assert need.stages["denoise"].weight_bytes == pytest.approx(2 * parameters, rel=1e-6)
    decode = need.stages["decode"].image_bytes / GIB
    assert decode == pytest.approx({"sd15": 0.375, "sdxl": 3.0}[name], rel=0.01)
    per_image = need.stages["denoise"].image_bytes / GIB
    assert {"sd15": 0.1, "sdxl": 0.25}[name] < per_image < {"sd15": 0.2, "sdxl": 0.5}[name]
    fused = need.peak(FUSED, 8) / GIB
    assert fused == pytest.approx({"sd15": 5.2, "sdxl": 30.8}[name], abs=0.1)


def test_a_trace_counts_living_tensors_once() -> None:
    first = torch.empty(1000, 2, device="meta")
    with counting([first]) as trace:
        assert trace.live == 8000
        second = first.new_empty(500, 2)
        assert trace.live == 12_000
        view = second[:100].t()
        assert trace.live == 12_000
        sums = view + 1
        assert trace.live == 12_800
        del second, view
        assert trace.live == 8800
        sums.mul_(2)
        del sums
    assert (trace.live, trace.peak) == (8000, 12_800)


def test_a_trace_knows_the_values_that_are_read() -> None:
    weight = torch.empty(8, 8, device="meta")
    with counting([weight]) as trace:
        steps = torch.linspace(999, 0, 5).to("meta")
        assert [float(step) for step in steps][-1] == 0.0
        assert torch.tensor([3, 4], device="meta").tolist() == [3, 4]
        mask = torch.tensor([[True, False, True]]).to("meta")
        assert (weight[:3] @ weight)[mask[0]].shape == (2, 8)
        assert torch.arange(4, device="meta").sum() == 6
        assert (weight.sum(dim=0) + 1).cpu().tolist() == [0.0] * 8  # unknown, but not refused
        with pytest.raises(Unread):
            bool(weight.sum() > 0)
    assert trace.peak > 256


def test_attention_keeps_no_scores() -> None:
    query = torch.empty(1, 2, 4096, 64, device="meta")
    with counting([query]) as trace:
        made = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert made.shape == query.shape
    assert trace.peak == 2 * query.nbytes
