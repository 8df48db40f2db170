"""The encode stage: turns prompts and conditioning images into the denoiser's conditions."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from batchgen.families.adapter import Adapter, ImageInputs
from batchgen.records import Call, ConditionBatch, EncodedBatch, Sample

_LOW_BITS = 0xFFFFFFFF
_STATE_WORDS = 24  # offset of the 624 words in the bytes of torch's generator state

Tensors = Mapping[str, torch.Tensor]
# prompt (or class), whether a negative one, LoRA in effect, values of adapter.prompt_settings
_PromptKey = tuple[str | int | None, bool, object, tuple[object, ...]]
_TRIMS = 8  # calls of malloc_trim while one full cache is evicted
CACHE_BYTES = 256 << 20  # 1,100 prompts of Stable Diffusion 1 in float32; 64 of Flux in float16


class Encoder:
    """Text encoders and the encoding half of the VAE: turns a sample's conditions into tensors.

    Every prompt is encoded on its own, and every image on its own or in a full batch, at one fixed
    shape, so that the result never depends on the other samples of the batch.

    Not thread-safe.

    Args:
        pipeline: a diffusers pipeline that holds only the encoding parts, in ``eval()``.
        adapter: how such a pipeline is called.
        batch_size: B; a pipeline that encodes all images at once gets them padded to B.
        cache_bytes: size of the cache of encoded prompts; the least recently used are evicted.
        switch: called before each call, to activate its LoRAs in the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        adapter: Adapter,
        batch_size: int,
        cache_bytes: int = CACHE_BYTES,
        switch: Callable[[Any, Call], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.adapter = adapter
        self.batch_size = batch_size
        self._cache_bytes = cache_bytes
        self._cached = 0
        self._freed = 0  # since memory was given back
        self._switch = switch
        self._prompts: OrderedDict[_PromptKey, tuple[Tensors, bool]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, batch: ConditionBatch) -> EncodedBatch:
        """Encode one micro-batch.

        Tensors stay on the stage's device; the generator states are on the CPU.

        Raises:
            ValueError: images of different sizes, or too few of them.
        """
        if self._switch is not None:
            self._switch(self.pipeline, batch.call)
        by_class = self.adapter.encode_label is not None
        reads = by_class or self.adapter.encode_prompt is not None
        guided, lora = self.adapter.guided(batch.call), batch.call.lora
        given = tuple(getattr(batch.call, name) for name in self.adapter.prompt_settings)
        prompts: list[_PromptKey] = [
            (one.class_label if by_class else one.prompt, False, lora, given)
            for one in batch.samples
            if reads
        ]
        negatives: list[_PromptKey] = [
            (None if by_class else one.negative_prompt, True, lora, given)
            for one in batch.samples
            if reads and guided
        ]
        unique = list(dict.fromkeys(prompts + negatives))
        place = {prompt: index for index, prompt in enumerate(unique)}
        encoded = [self._encode_prompt(prompt) for prompt in unique]
        generators = [sample_generator(sample) for sample in batch.samples]
        labels = [sample.class_label for sample in batch.samples]
        return EncodedBatch(
            call=batch.call,
            prompts=_joined([tensors for tensors, _ in encoded]),  # (U, ...)
            prompt_index=tuple(place[prompt] for prompt in prompts),
            negative_index=tuple(place[one] for one in negatives) if negatives else None,
            conditions=self._encode_images(batch, generators),
            labels=tuple(label for label in labels if label is not None),
            generator_states=torch.stack([g.get_state() for g in generators]),  # (n, 5056) uint8
            truncated=tuple(encoded[place[prompt]][1] for prompt in prompts)
            or (False,) * len(batch.samples),
        )

    def _encode_prompt(self, key: _PromptKey) -> tuple[Tensors, bool]:
        known = self._prompts.pop(key, None)
        if known is None:
            prompt, negative, _, given = key
            settings = dict(zip(self.adapter.prompt_settings, given, strict=True))
            tensors: Tensors  # (1, ...) each
            if isinstance(prompt, str):
                assert self.adapter.encode_prompt is not None
                tensors = self.adapter.encode_prompt(self.pipeline, prompt, negative, **settings)
                known = tensors, self._is_truncated(prompt)
            else:
                assert self.adapter.encode_label is not None
                tensors = self.adapter.encode_label(self.pipeline, prompt, **settings)
                known = tensors, False
            self._cached += _bytes(known[0])
        self._prompts[key] = known
        while self._cached > self._cache_bytes and len(self._prompts) > 1:
            _, (forgotten, _) = self._prompts.popitem(last=False)
            self._cached -= _bytes(forgotten)
            self._freed += _bytes(forgotten)
        if self._freed > self._cache_bytes // _TRIMS:
            self._freed = 0
            _give_memory_back()
        return known

    def _is_truncated(self, prompt: str) -> bool:
        """Whether the prompt is too long for every tokenizer of the pipeline."""
        if self.adapter.words is not None:
            prompt = self.adapter.words(prompt)
        fits = []
        for name, limit in self.adapter.tokenizers:
            tokenizer = getattr(self.pipeline, name)
            if tokenizer is None:
                continue
            text = prompt
            if hasattr(self.pipeline, "maybe_convert_prompt"):  # textual inversion tokens
                text = self.pipeline.maybe_convert_prompt(prompt, tokenizer)
            length = len(tokenizer(text).input_ids)
            fits.append(length <= (limit or int(tokenizer.model_max_length)))
        return bool(fits) and not any(fits)

    def _encode_images(
        self, batch: ConditionBatch, generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        if self.adapter.encode_images is None or not batch.images:
            return {}
        for part, images in batch.images.items():
            shapes = {image.shape for image in images}
            if len(shapes) != 1 or len(images) != len(batch.samples):
                raise ValueError(
                    f"{part}: expected {len(batch.samples)} images of one size, got {len(images)}"
                    f" of {sorted(shapes)}"
                )
        inputs = ImageInputs(batch.call, batch.images, generators, self.batch_size)
        return dict(self.adapter.encode_images(self.pipeline, inputs))


def _give_memory_back() -> None:
    """Return to the system the memory of evicted prompts, which glibc would keep.

    It takes a few milliseconds. Without it the heap becomes fragmented: a cache of 256 MB used
    460 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # only glibc has it
        trim(0)


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _joined(encoded: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    if not encoded:
        return {}
    return {name: torch.cat([tensors[name] for tensors in encoded]) for name in encoded[0]}


def sample_generator(sample: Sample) -> torch.Generator:
    """The sample's CPU generator, freshly seeded. It is the only source of the sample's noise."""
    return seeded_generator(sample.seed)


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator for a seed of up to 63 bits.

    Below 2**32 it is ``torch.Generator().manual_seed(seed)``. Of a larger seed torch keeps only
    the lowest 32 bits, so that many samples would share their noise. For those, all bits
    initialize the Mersenne Twister, by ``init_by_array`` of Matsumoto and Nishimura, as in
    ``numpy.random.RandomState([low, high])``.
    """
    generator = torch.Generator("cpu").manual_seed(seed & _LOW_BITS)
    if seed <= _LOW_BITS:
        return generator
    words = np.random.RandomState([seed & _LOW_BITS, seed >> 32]).get_state(legacy=False)
    state = generator.get_state()  # (5056,) uint8: seed, position, then 624 words of 64 bits
    key = torch.from_numpy(words["state"]["key"].astype("<u8").view(np.uint8))  # (4992,)
    state[_STATE_WORDS : _STATE_WORDS + key.numel()] = key
    return generator.set_state(state)
