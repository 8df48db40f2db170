"""Sampling loops never wait for the device: families with every scheduler that they support.

There is no GPU here. The denoiser is on a fake device (``tests.fake_device``), which records each
wait and refuses arrays of the host, and whose latents must be those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from batchgen.families import FAMILIES, Family
from batchgen.families.diffusers_source import defaults_of
from batchgen.families.schedulers import FLOW_SCHEDULERS, SCHEDULERS
from batchgen.models import attach
from batchgen.models.tiny import BUILDERS
from batchgen.records import ConditionBatch, EncodedBatch
from tests.fake_device import DEVICE, FakeDevice, OnDevice
from tests.family_specs import model_fields
from tests.family_stages import FamilyStages, batch, call
from tests.model.test_family_control import BOXES
from tests.model.test_place import given_for

# This cannot be mended without a copy of the library's code.
REPAINTING = "inpainting with a model of 4 channels: each step makes a tensor of the next timestep"
FEW = (("text-to-image", "stable-diffusion"), ("text-to-image", "flux"))
PLAIN_WAITS = {  # a wait of each as the library has it
    "DDIMScheduler": "_local_scalar_dense.default",
    "DDPMScheduler": "_to_copy.default to the device",  # noise
    "LCMScheduler": "_to_copy.default to the device",
    "PNDMScheduler": "_local_scalar_dense.default",
    "UniPCMultistepScheduler": "_linalg_check_errors.default",
}


class Loop:
    """The denoiser of a tiny model, on the fake device, and its waits within the sampling loops.

    A loop lasts from the first to the last call of its model.
    """

    def __init__(self, folder: Path, task: str, family: Family) -> None:
        fields = model_fields(family, folder)
        self.stages = FamilyStages(Path(fields.pop("path")), task, batch_size=2, **fields)
        self.rows = rows_for(task, family.name)
        self.schedulers = schedulers_of(family, self.stages.denoise.pipeline.scheduler)
        self.device = FakeDevice()
        self._calls: dict[int, list[int]] = {}
        self._made: dict[int, Any] = {}
        self._moved: set[int] = set()

    def encoded(self, scheduler: str | None = None) -> EncodedBatch:
        steps = max(4, self.stages.info.min_steps)
        shared = replace(self.rows.samples[0].call, num_inference_steps=steps, scheduler=scheduler)
        samples = tuple(replace(one, call=shared) for one in self.rows.samples)
        return self.stages.encode(replace(self.rows, samples=samples))

    def models(self) -> Iterator[torch.nn.Module]:
        pipeline = self.stages.denoise.pipeline
        for one in filter(None, [pipeline, getattr(pipeline, "refiner", None)]):
            for name in ("unet", "transformer"):
                if isinstance(module := getattr(one, name, None), torch.nn.Module):
                    yield module

    def on_host(self, encoded: EncodedBatch) -> torch.Tensor:
        return self.stages.denoise(encoded).latents

    def on_device(self, encoded: EncodedBatch) -> torch.Tensor:
        """The same with the parts on the device; the latents are returned from there."""
        self.device.waits.clear()
        self._calls.clear()
        with self.device:
            self._move()
            latents: Any = self.stages.denoise(encoded).latents
        held: torch.Tensor = latents.held
        return held

    def _move(self) -> None:
        pipeline = self.stages.denoise.pipeline
        for one in filter(None, [getattr(pipeline, "refiner", None), pipeline]):
            for module in vars(one).values():
                if isinstance(module, torch.nn.Module) and id(module) not in self._moved:
                    self._moved.add(id(module))
                    module.to(DEVICE)

    def waits(self) -> list[str]:
        return [
            wait
            for places in self._calls.values()
            for wait in self.device.waits[places[0] : places[-1]]
        ]

    def count(self) -> None:
        """Note the waits before each call of a model, and what the last one returned."""
        for module in self.models():
            module.register_forward_pre_hook(self._called)
            module.register_forward_hook(self._returned)

    def stub(self) -> None:
        """Let models return what they returned last, so that only the loop takes time."""
        for module in self.models():
            module.forward = partial(self._again, id(module))  # type: ignore[method-assign]

    def _called(self, module: torch.nn.Module, args: Any) -> None:
        self._calls.setdefault(id(module), []).append(len(self.device.waits))

    def _returned(self, module: torch.nn.Module, args: Any, made: Any) -> None:
        if not any(isinstance(one, OnDevice) for one in tree_leaves(made)):
            self._made[id(module)] = made

    def _again(self, module: int, *args: Any, **kwargs: Any) -> Any:
        given = tree_leaves((args, kwargs))
        moves = any(isinstance(one, OnDevice) for one in given)
        return tree_map_only(
            torch.Tensor,
            lambda one: one.to(DEVICE if moves else "cpu", non_blocking=True),
            self._made[module],
        )


def rows_for(task: str, family: str) -> ConditionBatch:
    return batch([0, 1], call(regions=BOXES)) if family == "gligen" else given_for(task, family)


def schedulers_of(family: Family, saved: Any) -> tuple[str, ...]:
    if type(saved).__name__ in FLOW_SCHEDULERS:
        return FLOW_SCHEDULERS
    names = family.schedulers or SCHEDULERS
    if saved.config.prediction_type == "flow_prediction":  # only some know it
        return tuple(name for name in names if "use_flow_sigmas" in defaults_of(name))
    return names


def family_of(task: str, name: str) -> Family:
    return next(one for one in FAMILIES if (one.task, one.name) == (task, name))


@pytest.mark.parametrize(("task", "name"), FEW)
def test_no_step_waits(tmp_path: Path, task: str, name: str) -> None:
    """Of a few families; `tests/system/test_no_sync_of_families.py` has the others."""
    no_step_waits(tmp_path, task, name)


def no_step_waits(tmp_path: Path, task: str, name: str) -> None:
    family = family_of(task, name)
    loop = Loop(BUILDERS[task, name](tmp_path / "model"), task, family)
    loop.count()
    own = loop.encoded()
    expected = loop.on_host(own)
    cases = {scheduler: loop.encoded(scheduler) for scheduler in loop.schedulers}
    loop.on_device(own)  # the first call copies tables of positions, which the model keeps there
    made = loop.on_device(own)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
    assert loop.waits() == []
    loop.stub()
    for scheduler, case in cases.items():
        loop.on_device(case)
        assert loop.waits() == [], scheduler


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_on_the_device_computes_the_same(tmp_path: Path, scheduler: str) -> None:
    name = "text-to-image", "stable-diffusion"
    loop = Loop(BUILDERS[name](tmp_path / "model"), name[0], family_of(*name))
    loop.count()
    loop.on_host(loop.encoded())
    loop.stub()
    case = loop.encoded(scheduler)
    expected = loop.on_host(case)
    torch.testing.assert_close(loop.on_device(case), expected, rtol=1e-5, atol=1e-5)


def test_the_fake_device_sees_the_waits_of_plain_schedulers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "on_host", lambda scheduler: scheduler)
    name = "text-to-image", "stable-diffusion"
    loop = Loop(BUILDERS[name](tmp_path / "model"), name[0], family_of(*name))
    loop.count()
    loop.on_host(loop.encoded())
    loop.stub()
    found = {}
    for scheduler in PLAIN_WAITS:
        loop.on_device(loop.encoded(scheduler))
        found[scheduler] = set(loop.waits())
    assert not {one: found[one] for one, wait in PLAIN_WAITS.items() if wait not in found[one]}


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl"])
def test_repainting_with_a_plain_model_waits(tmp_path: Path, name: str) -> None:
    folder = BUILDERS["text-to-image", name](tmp_path / "model")
    loop = Loop(folder, "inpainting", family_of("inpainting", name))
    loop.count()
    loop.on_device(loop.encoded())
    copied = "_to_copy.default to the device"  # that timestep, and the table it is looked up in
    assert set(loop.waits()) == {"tensor", copied}, f"it no longer waits: {REPAINTING}"
