"""Everything the small model's weights depend on, as values: one default recipe, one for tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

IMAGE_SIZE = 32  # pixels a side
LATENT_SIZE = 8  # latent cells a side: the VAE divides by four
LATENT_CHANNELS = 4
MAX_TOKENS = 48  # 77 would cost over 5% of a training step and no caption is near it


@dataclass(frozen=True)
class StageRecipe:
    """How one network is optimised; ``steps`` is a budget, so a run is the same on any machine."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    ema_decay: float
    checkpoint_every: int


@dataclass(frozen=True)
class Recipe:
    """The whole training run; equal recipes on one machine give equal weights."""

    vae: StageRecipe = field(
        default_factory=lambda: StageRecipe(
            steps=4_000,
            batch_size=16,
            learning_rate=1.5e-3,
            warmup_steps=100,
            ema_decay=0.998,
            checkpoint_every=500,
        )
    )
    denoiser: StageRecipe = field(
        default_factory=lambda: StageRecipe(
            steps=9_000,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=300,
            ema_decay=0.999,
            checkpoint_every=250,
        )
    )
    seed: int = 0
    shape_pool: int = 48_000  # drawn images, encoded once
    digit_copies: int = 8  # slightly shifted, turned and scaled copies of each training digit
    digit_share: float = 0.25  # of every batch; shapes need most of the steps
    caption_dropout: float = 0.1
    kl_weight: float = 2e-4
    edge_weight: float = 0.5
    vae_channels: tuple[int, ...] = (24, 48, 64)
    unet_channels: tuple[int, ...] = (64, 96)
    text_width: int = 96
    text_layers: int = 2

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready values, for the checkpoint and the model card."""
        values = asdict(self)
        values["vae_channels"] = list(self.vae_channels)
        values["unet_channels"] = list(self.unet_channels)
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Recipe:
        """The recipe that ``to_dict`` wrote."""
        return Recipe(
            **{
                **values,
                "vae": StageRecipe(**values["vae"]),
                "denoiser": StageRecipe(**values["denoiser"]),
                "vae_channels": tuple(values["vae_channels"]),
                "unet_channels": tuple(values["unet_channels"]),
            }
        )


@dataclass(frozen=True)
class AddedRecipe:
    """How a part is trained that is added to a finished model, whose own weights stay as they are.

    Attributes:
        digit_share: of every batch.
        dropout: share of captions or classes withheld.
    """

    stage: StageRecipe
    digit_share: float
    dropout: float
    seed: int = 0
    shape_pool: int = 8_000
    digit_pool: int = 1_297  # all of the training split
    digit_copies: int = 2

    def smoke(self) -> AddedRecipe:
        """The same in seconds; it learns nothing."""
        stage = replace(self.stage, steps=3, batch_size=8, warmup_steps=1, checkpoint_every=2)
        return replace(self, stage=stage, shape_pool=64, digit_pool=64, digit_copies=0)


def class_recipe() -> AddedRecipe:
    """The table of classes: 10 digits, 6 shapes, and no class."""
    stage = StageRecipe(
        steps=500,
        batch_size=48,
        learning_rate=2e-2,
        warmup_steps=20,
        ema_decay=0.98,
        checkpoint_every=100,
    )
    return AddedRecipe(stage, digit_share=0.5, dropout=0.12)


def control_recipe() -> AddedRecipe:
    """The ControlNet of Canny edges."""
    stage = StageRecipe(
        steps=1_200,
        batch_size=24,
        learning_rate=1e-3,
        warmup_steps=100,
        ema_decay=0.995,
        checkpoint_every=200,
    )
    return AddedRecipe(stage, digit_share=0.25, dropout=0.1)


def clip_recipe() -> AddedRecipe:
    """The small CLIP; it learns by itself, with no weight of the finished model."""
    stage = StageRecipe(
        steps=3_000,
        batch_size=96,
        learning_rate=1.5e-3,
        warmup_steps=150,
        ema_decay=0.995,
        checkpoint_every=200,
    )
    return AddedRecipe(stage, digit_share=0.5, dropout=0.0, shape_pool=24_000, digit_copies=6)


def smoke_recipe() -> Recipe:
    """A recipe that touches every line of the job within seconds; its images mean nothing."""
    stage = StageRecipe(
        steps=6,
        batch_size=8,
        learning_rate=1e-3,
        warmup_steps=2,
        ema_decay=0.9,
        checkpoint_every=2,
    )
    return Recipe(
        vae=stage,
        denoiser=replace(stage, batch_size=12),
        shape_pool=64,
        digit_copies=1,
        vae_channels=(8, 8, 16),
        unet_channels=(16, 32),
        text_width=32,
        text_layers=1,
    )
