"""The size of the decoder's calls: fixed, of little effect on the pixels, and tiles where asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchgen import models
from batchgen.errors import ModelError
from batchgen.models.tiny import BUILDERS
from batchgen.records import Call, LatentBatch
from batchgen.spec.sections import Resources
from batchgen.spec.spec import Spec
from batchgen.stages.decode import Decoder
from tests.family_stages import FamilyStages, batch, call

DECODERS = {  # a family for each class of VAE
    ("text-to-image", "stable-diffusion"): "AutoencoderKL",
    ("text-to-image", "stable-diffusion-xl"): "AutoencoderKL",
    ("text-to-image", "flux"): "AutoencoderKL",
    ("text-to-image", "sana"): "AutoencoderDC",
    ("text-to-image", "qwen-image"): "AutoencoderKLQwenImage",
    ("text-to-image", "ldm-bert"): "AutoencoderKL",
    ("unconditional", "ldm"): "VQModel",
}


def with_resources(spec: Spec, **fields: Any) -> Spec:
    resources = Resources.model_validate({"batch_size": 3, **fields})
    return spec.model_copy(update={"resources": resources})


def decoder_of(stages: FamilyStages, **fields: Any) -> Decoder:
    return models.load_decoder(stages.info, with_resources(stages.spec, **fields))


@pytest.mark.parametrize(("task", "family"), DECODERS)
def test_other_sizes_move_a_pixel_by_one_level_at_most(
    tmp_path: Path, task: str, family: str
) -> None:
    stages = FamilyStages(BUILDERS[task, family](tmp_path / "model"), task)
    latents = stages.denoise(stages.encode(batch([0, 1, 2], call())))
    whole = stages.decode(latents)
    for size in (1, 2):
        sliced = stages.decode.start(latents, size).result()
        moved = np.abs(sliced.pixels.astype(int) - whole.pixels.astype(int))
        assert sliced.pixels.shape == whole.pixels.shape and sliced.finite == whole.finite
        assert moved.max() <= 1
        asked = decoder_of(stages, decode_batch_size=size)
        np.testing.assert_array_equal(asked(latents).pixels, sliced.pixels)


def test_every_call_has_the_same_size(tmp_path: Path) -> None:
    task, family = "text-to-image", "stable-diffusion"
    stages = FamilyStages(BUILDERS[task, family](tmp_path / "model"), task)
    decoder = decoder_of(stages, decode_batch_size=2)
    seen: list[int] = []
    decoder.pipeline.vae.decoder.register_forward_pre_hook(
        lambda _module, args: seen.append(len(args[0]))
    )
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shared = Call(1, 1.0, None, 32, 32)
    whole = decoder(LatentBatch(shared, latents, (False,) * 3)).pixels
    assert seen == [2, 2]
    for row in range(3):
        alone = decoder(LatentBatch(shared, latents[row:][:1], (False,))).pixels
        np.testing.assert_array_equal(alone[0], whole[row])
    backwards = decoder(LatentBatch(shared, latents.flip(0), (False,) * 3)).pixels
    np.testing.assert_array_equal(backwards[::-1], whole)


def test_a_sample_with_nan_is_found_in_any_slice(tmp_path: Path) -> None:
    task, family = "text-to-image", "stable-diffusion"
    stages = FamilyStages(BUILDERS[task, family](tmp_path / "model"), task)
    latents = stages.denoise(stages.encode(batch([0, 1, 2], call())))
    broken = latents.latents.clone()
    broken[2, 0, 0, 0] = float("nan")
    found = stages.decode.start(replace(latents, latents=broken), 1).result()
    assert found.finite == (True, True, False)


@pytest.mark.parametrize(("task", "family"), [one for one in DECODERS if one[1] != "ldm"])
def test_tiles_only_where_asked(tmp_path: Path, task: str, family: str) -> None:
    stages = FamilyStages(BUILDERS[task, family](tmp_path / "model"), task)
    decoder = decoder_of(stages, vae_tiling=True)
    (vae,) = (one for one in vars(decoder.pipeline).values() if hasattr(one, "use_tiling"))
    assert type(vae).__name__ == DECODERS[task, family]
    assert vae.use_tiling
    (plain,) = (one for one in vars(stages.decode.pipeline).values() if hasattr(one, "use_tiling"))
    assert not plain.use_tiling


def test_a_large_image_is_decoded_in_tiles(tmp_path: Path) -> None:
    task, family = "text-to-image", "stable-diffusion"
    stages = FamilyStages(BUILDERS[task, family](tmp_path / "model"), task)
    tiled, plain = decoder_of(stages, vae_tiling=True), decoder_of(stages)
    seen: list[torch.Size] = []
    tiled.pipeline.vae.decoder.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].shape)
    )
    large = 2 * tiled.pipeline.vae.tile_latent_min_size
    latents = torch.randn(1, 4, large, large, generator=torch.Generator().manual_seed(0))
    given = LatentBatch(Call(1, 1.0, None, large, large), latents, (False,))
    pixels = tiled(given).pixels
    assert len(seen) > 1 and all(shape[2] < large for shape in seen)
    assert pixels.shape == plain(given).pixels.shape


def test_a_vae_without_tiling_is_refused(tmp_path: Path) -> None:
    stages = FamilyStages(BUILDERS["unconditional", "ldm"](tmp_path / "model"), "unconditional")
    with pytest.raises(ModelError, match=r"resources\.vae_tiling: VQModel cannot decode in tiles"):
        decoder_of(stages, vae_tiling=True)
