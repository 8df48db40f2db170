"""The encode stage: prompts and source images become what the denoiser is conditioned on."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from batchgen.records import ConditionBatch, EncodedBatch, Sample

_LOW_BITS = 0xFFFFFFFF
_STATE_WORDS = 24  # where the words stand in the bytes of torch's generator state
PROMPTS_CACHED = 512  # 120 MB at the (77, 768) float32 of Stable Diffusion 1


class Encoder:
    """Text encoder, tokenizer and, for image tasks, the encoding half of the VAE.

    Every prompt and every source image is encoded alone, at one fixed shape, so that what comes out
    never depends on the rest of the batch. (The plain image-to-image pipeline, given a list of
    generators, encodes its images one by one too: the latents are equal to the byte.)

    Not safe for two threads at a time.

    Args:
        pipeline: a ``StableDiffusionPipeline`` or ``StableDiffusionImg2ImgPipeline`` that holds the
            encoding parts only, in ``eval()``.
        prompts_cached: how many encoded prompts are remembered; the least recently used go first.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts_cached: int = PROMPTS_CACHED,
    ) -> None:
        self.pipeline = pipeline
        self._prompts_cached = prompts_cached
        self._prompts: OrderedDict[str, tuple[torch.Tensor, bool]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, batch: ConditionBatch) -> EncodedBatch:
        """Encode one micro-batch.

        Tensors stay on the stage's device; the generator states are on the CPU.

        Raises:
            ValueError: images of another size than the call's, or too few of them.
        """
        prompts = [sample.prompt for sample in batch.samples]
        guided = batch.call.guidance_scale > 1  # as in diffusers: 1 is no guidance
        negatives = [sample.negative_prompt for sample in batch.samples] if guided else []
        unique = list(dict.fromkeys(prompts + negatives))
        place = {prompt: index for index, prompt in enumerate(unique)}
        encoded = [self._encode_prompt(prompt) for prompt in unique]
        generators = [sample_generator(sample) for sample in batch.samples]
        return EncodedBatch(
            call=batch.call,
            embeds=torch.cat([embeds for embeds, _ in encoded]),  # (U, T, D)
            prompt_index=tuple(place[prompt] for prompt in prompts),
            negative_index=tuple(place[prompt] for prompt in negatives) if guided else None,
            image_latents=self._encode_images(batch, generators),
            generator_states=torch.stack([g.get_state() for g in generators]),  # (n, 5056) uint8
            truncated=tuple(encoded[place[prompt]][1] for prompt in prompts),
        )

    def _encode_prompt(self, prompt: str) -> tuple[torch.Tensor, bool]:
        known = self._prompts.pop(prompt, None)
        if known is None:
            embeds, _ = self.pipeline.encode_prompt(
                prompt, self.pipeline.device, 1, do_classifier_free_guidance=False
            )  # (1, T, D)
            known = embeds, self._is_truncated(prompt)
        self._prompts[prompt] = known
        if len(self._prompts) > self._prompts_cached:
            self._prompts.popitem(last=False)
        return known

    def _is_truncated(self, prompt: str) -> bool:
        tokenizer = self.pipeline.tokenizer
        text = self.pipeline.maybe_convert_prompt(prompt, tokenizer)  # textual inversion tokens
        return len(tokenizer(text).input_ids) > int(tokenizer.model_max_length)

    def _encode_images(
        self, batch: ConditionBatch, generators: list[torch.Generator]
    ) -> torch.Tensor | None:
        if batch.images is None:
            return None
        expected = (batch.call.height, batch.call.width, 3)
        shapes = {image.shape for image in batch.images}
        if shapes != {expected} or len(batch.images) != len(batch.samples):
            raise ValueError(f"expected {len(batch.samples)} images {expected}, got {shapes}")
        distinct = {id(image): image for image in batch.images}  # variants share their row's array
        posteriors = {key: self._posterior(image) for key, image in distinct.items()}
        drawn = [
            posteriors[id(image)].sample(generator)  # (1, C, H/f, W/f)
            for image, generator in zip(batch.images, generators, strict=True)
        ]
        scaled: torch.Tensor = self.pipeline.vae.config.scaling_factor * torch.cat(drawn)
        return scaled  # (n, C, H/f, W/f)

    def _posterior(self, image: np.ndarray[Any, Any]) -> Any:
        vae = self.pipeline.vae
        pixels = self.pipeline.image_processor.preprocess(
            image[None].astype(np.float32) / 255.0
        )  # (1, 3, H, W) in [-1, 1]
        return vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist


def sample_generator(sample: Sample) -> torch.Generator:
    """The sample's own CPU generator, in its first state. It is the only source of its noise."""
    return seeded_generator(sample.seed)


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator for a seed of up to 63 bits.

    Below 2**32 it is ``torch.Generator().manual_seed(seed)``. torch keeps only the lowest 32 bits
    of a larger seed, so that many samples would share their noise; for those the Mersenne Twister
    is filled from all bits, by ``init_by_array`` of Matsumoto and Nishimura, as
    ``numpy.random.RandomState([low, high])`` does.
    """
    generator = torch.Generator("cpu").manual_seed(seed & _LOW_BITS)
    if seed <= _LOW_BITS:
        return generator
    words = np.random.RandomState([seed & _LOW_BITS, seed >> 32]).get_state(legacy=False)
    state = generator.get_state()  # (5056,) uint8: seed, position, then 624 words of 64 bits
    key = torch.from_numpy(words["state"]["key"].astype("<u8").view(np.uint8))  # (4992,)
    state[_STATE_WORDS : _STATE_WORDS + key.numel()] = key
    return generator.set_state(state)
