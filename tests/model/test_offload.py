"""Offloaded stages: the same bytes, while their weights are in host memory between the calls.

On the CPU diffusers' hooks run with real tensors. There is no GPU here: on a fake device
(``tests.fake_offload``) weights are copied ahead on a stream, an operation that takes arrays from
both sides fails, and so does one that reads a copy too early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import group_offloading

from batchgen import models
from batchgen.errors import ModelError
from batchgen.families.calls import device_of
from batchgen.models import load, memory_measure
from batchgen.models.memory import STAGES
from batchgen.models.offload import Part, offload, parts_of
from batchgen.models.tiny import BUILDERS
from batchgen.plan.call_settings import usual_call
from batchgen.plan.checks import settle
from batchgen.records import ConditionBatch
from batchgen.spec.spec import Spec
from tests.added_files import build_lora, lora_call, named
from tests.fake_device import DEVICE, FakeDevice
from tests.fake_offload import WeightsDevice
from tests.family_specs import model_fields
from tests.family_stages import Array, FamilyStages, batch
from tests.model.test_no_sync import family_of, rows_for

TEXT = "text-to-image"
# A U-Net by layers; transformers by blocks, with two text encoders; the class in every block.
FEW = ((TEXT, "stable-diffusion"), (TEXT, "flux"), ("class-conditional", "dit"))
# A layer that runs twice, or not in every call, lets diffusers copy a layer too early. It then
# stays until it runs, so more is on the device than the present layer and the next one.
EARLY = {"dit": 1.25, "gligen": 1.05}


class Both:
    """The stages of a tiny model twice, and batches with different prompts."""

    def __init__(self, task: str, name: str, folder: Path, **more: Any) -> None:
        self.family = family_of(task, name)
        self.task = task
        self.fields = model_fields(self.family, BUILDERS[task, name](folder / "model")) | more
        self.plain, self.kept = self.stages(), self.stages()
        rows = rows_for(task, name)
        steps = max(3, self.plain.info.min_steps)
        shared = replace(rows.samples[0].call, num_inference_steps=steps)
        self.batches = [
            replace(
                rows,
                samples=tuple(
                    replace(one, call=shared, prompt=f"{one.prompt}{more}") for one in rows.samples
                ),
            )
            for more in ("", " star")
        ]

    def stages(self) -> FamilyStages:
        fields = dict(self.fields)
        return FamilyStages(Path(fields.pop("path")), self.task, batch_size=2, **fields)

    def pipelines(self, stage: Any) -> list[Any]:
        """Of one stage, the second ones first."""
        seconds = [getattr(stage.pipeline, name, None) for name, _ in self.family.pipelines]
        return [*filter(None, seconds), stage.pipeline]

    def parts(self, stage: Any) -> list[Part]:
        return list(parts_of(self.pipelines(stage), self.family.vae))

    def offload(self, device: str, streams: bool = True) -> None:
        for _, stage in named_stages(self.kept):
            offload(self.pipelines(stage), self.family.vae, device, streams)


def named_stages(stages: FamilyStages) -> Iterator[tuple[str, Any]]:
    yield from zip(STAGES, (stages.encode, stages.denoise, stages.decode), strict=True)


def pixels_on(device: FakeDevice, both: Both, batches: Sequence[ConditionBatch]) -> list[Array]:
    """The plain stages' pixels, with all models on the fake device."""
    with device:
        for _, stage in named_stages(both.plain):
            for pipeline in both.pipelines(stage):
                for module in vars(pipeline).values():
                    if isinstance(module, torch.nn.Module):
                        module.to(DEVICE)
        return [both.plain.fused(one).pixels for one in batches]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> WeightsDevice:
    made = WeightsDevice()
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda device: made)
    return made


@pytest.mark.parametrize(("task", "name"), FEW)
def test_weights_come_when_they_are_needed(
    tmp_path: Path, device: WeightsDevice, task: str, name: str
) -> None:
    """Of a few families; `tests/system/test_offload_of_families.py` has the others."""
    weights_come_when_needed(tmp_path, device, task, name, EARLY.get(name, 1.0))


def weights_come_when_needed(
    folder: Path, device: WeightsDevice, task: str, name: str, most: float = 1.0, **model: Any
) -> None:
    """``most``: of the device's weights at a time, the part of what was computed."""
    both = Both(task, name, folder, **model)
    expected = pixels_on(FakeDevice(), both, both.batches)
    weights = {stage: size_of(both.parts(one)) for stage, one in named_stages(both.kept)}
    arrived = dict.fromkeys(weights, 0)
    with device:
        both.offload(str(DEVICE))
        for given, pixels in zip(both.batches, expected, strict=True):  # the second copies ahead
            made: Any = given
            for stage, one in named_stages(both.kept):
                left = device.held_bytes()
                device.most = device.arrived = 0
                made = one(made)
                arrived[stage] += device.arrived
                window = max((part.window_bytes() for part in both.parts(one)), default=0)
                assert device.most - left <= window * most, stage
                assert device.held_bytes() - left <= weights[stage] / 50, stage
            np.testing.assert_array_equal(made.pixels, pixels)
    assert {stage: count > 0 for stage, count in arrived.items()} == {
        stage: size > 0 for stage, size in weights.items()
    }


def size_of(parts: Sequence[Part]) -> int:
    return sum(one.nbytes for part in parts for one in part.module.parameters())


@pytest.mark.parametrize(("task", "name"), FEW)
def test_hooks_change_no_byte(tmp_path: Path, task: str, name: str) -> None:
    hooks_change_no_byte(tmp_path, task, name)


def hooks_change_no_byte(folder: Path, task: str, name: str, **model: Any) -> None:
    both = Both(task, name, folder, **model)
    expected = [both.plain.fused(one).pixels for one in both.batches]
    both.offload("cpu", streams=False)
    for given, pixels in zip(both.batches, expected, strict=True):
        np.testing.assert_array_equal(both.kept.fused(given).pixels, pixels)


@pytest.mark.parametrize("task", ["image-to-image", TEXT])
def test_a_float16_vae_is_still_converted_for_a_call(
    tmp_path: Path, device: WeightsDevice, task: str
) -> None:
    """The host converts it, so its layers are copied in float32; a need counts all of them so."""
    weights_come_when_needed(tmp_path, device, task, "stable-diffusion-xl", 2.0, dtype="float16")


@pytest.mark.parametrize("task", ["image-to-image", TEXT])
def test_a_float16_vae_on_the_cpu(tmp_path: Path, task: str) -> None:
    hooks_change_no_byte(tmp_path, task, "stable-diffusion-xl", dtype="float16")


def test_the_device_is_that_of_the_hooks(tmp_path: Path, device: WeightsDevice) -> None:
    both = Both(TEXT, "flux", tmp_path)
    stages = [stage.pipeline for _, stage in named_stages(both.kept)]
    assert {str(device_of(one)) for one in stages} == {"cpu"}
    with device:
        both.offload(str(DEVICE))
    assert {device_of(one) for one in stages} == {DEVICE}
    assert stages[0].text_encoder.device.type == "cpu", "why device_of is needed"


def test_a_call_that_fails_half_way_leaves_the_stage_usable(
    tmp_path: Path, device: WeightsDevice
) -> None:
    """As after a lack of memory: the attempt is repeated."""
    both = Both(TEXT, "stable-diffusion", tmp_path)
    (expected,) = pixels_on(FakeDevice(), both, both.batches[:1])
    unet = both.kept.denoise.pipeline.unet
    with device:
        both.offload(str(DEVICE))
        encoded = both.kept.encode(both.batches[0])
        for calls in (1, 3):  # in the first call of the U-Net, and later
            failing = Failing(unet.mid_block, calls)
            with pytest.raises(torch.OutOfMemoryError):
                both.kept.denoise(encoded)
            failing.remove()
            made = both.kept.decode(both.kept.denoise(encoded))
            np.testing.assert_array_equal(made.pixels, expected)


class Failing:
    """Lets the n-th call of a module run out of memory."""

    def __init__(self, module: Any, calls: int) -> None:
        self._left = calls
        self.remove = module.register_forward_pre_hook(self._called).remove

    def _called(self, *_: Any) -> None:
        self._left -= 1
        if not self._left:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_rows_switch_loras(tmp_path: Path, device: WeightsDevice) -> None:
    model = BUILDERS[TEXT, "stable-diffusion"](tmp_path / "for-loras")
    targets = ("to_q", "to_v", "q_proj")
    files = {
        name: build_lora(model, tmp_path / name, seed, targets)
        for seed, name in enumerate(("ink", "oil"))
    }
    both = Both(TEXT, "stable-diffusion", tmp_path, **named(files))
    given = [
        batch([0, 1], lora_call(setting))
        for setting in ({"ink": 1.0}, {}, {"oil": 0.5, "ink": 1.0}, {"ink": 1.0})
    ]
    expected = pixels_on(FakeDevice(), both, given)
    assert (expected[0] != expected[1]).any() and (expected[0] != expected[2]).any()
    with device:
        both.offload(str(DEVICE))
        for one, pixels in zip(given, expected, strict=True):
            np.testing.assert_array_equal(both.kept.fused(one).pixels, pixels)


# --- what is loaded where ------------------------------------------------------------------------


def with_offload(spec: Spec, *stages: str) -> Spec:
    resources = spec.resources.model_copy(update={"offload": stages})
    return spec.model_copy(update={"resources": resources})


@pytest.mark.parametrize("offloaded", [(), ("encode",), ("denoise", "decode"), STAGES])
def test_only_the_stages_of_the_spec_are_offloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offloaded: tuple[str, ...]
) -> None:
    stages = FamilyStages(BUILDERS[TEXT, "stable-diffusion"](tmp_path / "model"), TEXT)
    given = stages.info, with_offload(stages.spec, *offloaded)
    kept: list[str] = []
    placed: list[str] = []
    monkeypatch.setattr(load, "offload", lambda pipelines, vae, device: kept.append(device))
    monkeypatch.setattr(load, "place", lambda pipelines, devices: placed.extend(devices))
    loaders = (models.load_encoder, models.load_denoiser, models.load_decoder)
    for loader in loaders:
        loader(*given, ("cuda:0",))
    assert (len(kept), len(placed)) == (len(offloaded), 3 - len(offloaded))
    assert {*kept, *placed} == {"cuda:0"}
    kept.clear()
    for loader in loaders:
        loader(*given)
    assert kept == [], "a CPU's weights are in host memory anyway"


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_quantized_weights_are_refused(tmp_path: Path, component: str) -> None:
    pytest.importorskip("torchao")
    quantization = {"backend": "torchao", "components": [component]}
    folder = BUILDERS[TEXT, "stable-diffusion"](tmp_path / "model")
    stages = FamilyStages(folder, TEXT, quantization=quantization)
    spec = with_offload(stages.spec, *STAGES)
    loader = models.load_denoiser if component == "unet" else models.load_encoder
    with pytest.raises(ModelError, match=f"offload: {component} is quantized.*leave its stage"):
        loader(stages.info, spec, ("cuda:0",))


def test_a_lora_that_reads_weights_by_itself_is_refused(tmp_path: Path) -> None:
    model = BUILDERS[TEXT, "stable-diffusion"](tmp_path / "model")
    file = build_lora(model, tmp_path / "ink", 0, config={"r": 2, "use_dora": True})
    stages = FamilyStages(model, TEXT, **named({"ink": file}))
    spec = with_offload(stages.spec, "denoise")
    with pytest.raises(ModelError, match=r"resources\.offload: a LoRA of unet is of the kind DoRA"):
        models.load_denoiser(stages.info, spec, ("cuda:0",))


def test_what_has_no_call_to_hook_stays_on_the_device(
    tmp_path: Path, device: WeightsDevice
) -> None:
    both = Both("variation", "unclip", tmp_path)
    assert [part.name for part in both.parts(both.kept.denoise)] == ["unet"]
    pipeline = both.kept.denoise.pipeline
    with device:
        offload([pipeline], "vae", str(DEVICE))
    assert {one.device for one in pipeline.image_normalizer.parameters()} == {DEVICE}
    both = Both(TEXT, "stable-diffusion", tmp_path / "other")
    vae = both.kept.decode.pipeline.vae
    with device:
        offload([both.kept.decode.pipeline], "vae", str(DEVICE))
    assert {one.device for one in vae.post_quant_conv.parameters()} == {DEVICE}
    assert {one.device.type for one in vae.decoder.parameters()} == {"cpu"}


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "name"), [*FEW, (TEXT, "stable-diffusion-xl-refiner")])
def test_the_need_knows_what_offloading_moves(tmp_path: Path, task: str, name: str) -> None:
    both = Both(task, name, tmp_path)
    info = both.plain.info
    spec = settle(both.plain.spec, info)
    need = memory_measure.measure(info, spec, usual_call(spec, info))
    for stage, one in named_stages(both.plain):
        found, parts = need.stages[stage], both.parts(one)
        assert found.movable_bytes == size_of(parts) + buffers_of(parts)
        assert found.window_bytes == max((part.window_bytes() for part in parts), default=0)
        assert found.movable_bytes <= found.weight_bytes
        moved = found.offloaded()
        assert moved.weight_bytes == found.weight_bytes - found.movable_bytes
        assert moved.call_bytes(2) == found.call_bytes(2) + found.window_bytes
        assert found.movable_bytes <= found.host_bytes < 2 * found.movable_bytes or not parts


def buffers_of(parts: Sequence[Part]) -> int:
    return sum(one.nbytes for part in parts for one in part.module.buffers())
