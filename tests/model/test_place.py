"""A model on several devices: in order, by free memory, in complete blocks, with the same bytes.

There is no GPU here. That all tensors of an operation are on one device is seen by labels: each
tensor has the number of the device that it would be on, and only accelerate's hooks change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from batchgen import models
from batchgen.errors import ModelError
from batchgen.models import place
from batchgen.models.tiny import BUILDERS
from batchgen.records import ConditionBatch
from batchgen.spec.tasks import task_named
from tests.family_stages import FamilyStages, batch, call, mask, picture
from tests.tiny_models import build_model
from tests.tiny_stages import stages

TASK = "image-to-image"
TWO = ("cpu", "cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("sizes", "free", "devices"),
    [
        ([1, 1, 1, 1], [10, 10], [0, 0, 1, 1]),
        ([1, 1, 1, 1], [10, 10, 10, 10], [0, 1, 2, 3]),
        ([4, 1, 1, 1, 1], [10, 10], [0, 1, 1, 1, 1]),
        ([1, 1, 1, 1], [30, 10], [0, 0, 0, 1]),
        ([1, 1, 1, 1], [0, 10], [1, 1, 1, 1]),
        ([0, 8, 0], [10, 10], [0, 0, 1]),
    ],
)
def test_blocks_are_shared_out_by_free_memory(
    sizes: list[int], free: list[int], devices: list[int]
) -> None:
    assert place.shares(sizes, free) == devices


def test_the_blocks_of_a_u_net(saved: Path) -> None:
    unet = stages(saved, TASK).denoise.pipeline.unet
    blocks = list(place.blocks_of(unet))
    assert sum(map(place.size_of, blocks)) == place.size_of(unet)
    assert {id(block) for block in (*unet.down_blocks, *unet.up_blocks)} <= set(map(id, blocks))


class Places(TorchDispatchMode):
    """The device that each tensor would be on; fails where one operation takes from two."""

    def __init__(self) -> None:
        super().__init__()
        self.of = WeakTensorKeyDictionary()
        self.moves = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        places = {self.of[one] for one in given if one in self.of and one.dim()}
        assert len(places) <= 1, f"{func} takes from devices {places}"
        made = func(*args, **(kwargs or {}))
        if places:
            self.put(made, places.pop())
        return made

    def put(self, tree: Any, place: int) -> None:
        for one in tree_leaves(tree):
            if isinstance(one, torch.Tensor):
                self.of[one] = place

    def send(self, tree: Any, device: Any, **_: Any) -> Any:
        """Of accelerate: a copy on another device."""
        self.moves += 1
        copied = tree_map_only(torch.Tensor, torch.clone, tree)
        self.put(copied, device)
        return copied

    def find(self, tree: Any) -> int:
        """Of accelerate: the device of the first tensor."""
        first = next(one for one in tree_leaves(tree) if isinstance(one, torch.Tensor))
        return int(self.of.get(first, 0))


ELSEWHERE = {"gligen", "ip-adapter", "ip-adapter-xl"}  # need more than pictures; U-Nets as others'
CASES = sorted((task, family) for task, family in BUILDERS if family not in ELSEWHERE)


def given_for(task: str, family: str) -> ConditionBatch:
    """Two samples with all that the task needs."""
    parts = [part for part in task_named(task).needs if part not in ("prompt", "class_label")]
    if task == "control":
        parts.append("image" if family == "depth-to-image" else "control")
    makers = {part: mask if part == "mask" else picture for part in parts}
    images = {part: [make(row) for row in range(2)] for part, make in makers.items()}
    return batch([0, 1], call(strength=0.8 if images else None), images, class_label=1)


@pytest.mark.parametrize(("task", "family"), CASES)
def test_work_over_two_devices_comes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, family: str
) -> None:
    stages = FamilyStages(BUILDERS[task, family](tmp_path / family), task)
    given = given_for(task, family)
    plain = stages.fused(given).pixels
    places = Places()
    monkeypatch.setattr(place, "_free", lambda device: 1 << 30)
    monkeypatch.setattr(hooks, "send_to_device", places.send)
    monkeypatch.setattr(hooks, "find_device", places.find)
    for stage in (stages.encode, stages.denoise, stages.decode):
        place.place([stage.pipeline], TWO)
        for part in vars(stage.pipeline).values():
            if isinstance(part, torch.nn.Module):
                places.put([*part.parameters(), *part.buffers()], 0)
                for block in place.blocks_of(part):
                    if hasattr(block, "_hf_hook"):
                        block._hf_hook.execution_device = 1
                        places.put([*block.parameters(), *block.buffers()], 1)
    with places:
        spread = stages.fused(given).pixels
    assert places.moves > 12
    np.testing.assert_array_equal(spread, plain)


def test_a_model_that_fits_nowhere_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_free", lambda device: 1000)
    known = stages(saved, TASK)
    with pytest.raises(ModelError, match=r"UNet2DConditionModel needs .* \(num_gpus\)"):
        models.load_denoiser(known.info, known.spec, TWO)
