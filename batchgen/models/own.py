"""Model components that neither diffusers nor transformers has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class ClassEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One learned vector for each class, as in CompVis' class-conditional models; one for no class.

    Args:
        num_classes: number of classes; "no class" has the number ``num_classes``.
        embed_dim: D, the width of the U-Net's cross-attention.
        id2label: class number, as a string -> name.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_classes: int, embed_dim: int, id2label: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(num_classes + 1, embed_dim)

    def forward(self, label: int | None) -> torch.Tensor:
        """Return (1, 1, D), a sequence of one vector. None means no class."""
        number = self.embedding.num_embeddings - 1 if label is None else label
        row = torch.tensor([[number]], device=self.embedding.weight.device)
        vector: torch.Tensor = self.embedding(row)
        return vector
