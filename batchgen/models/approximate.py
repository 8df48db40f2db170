"""Approximate modes of the denoiser: fewer guided steps, and features reused between steps.

Each mode is a set of diffusers' hooks in the model. All of them decide by the number of the step,
never by values, so a sample does not depend on its neighbours, and nothing waits for the device.
What a mode keeps is forgotten at the beginning of every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from batchgen.errors import ModelError
from batchgen.families import Family
from batchgen.records import Call
from batchgen.spec.approximate import FIELD, Approximate, MagCache, TaylorSeer
from batchgen.spec.spec import Spec

Switch = Callable[[Any, Call], None]


class Mode(Protocol):
    """One mode, in the models of a denoise stage."""

    def begin(self, pipeline: Any, call: Call) -> None:
        """Prepare for a call of the pipeline, and forget the one before."""


class Approximated:
    """A stage's switch that also begins each call's approximate modes.

    Args:
        switch: the stage's own, for LoRAs and schedulers.
        modes: in the order in which they begin.
    """

    def __init__(self, switch: Switch, modes: list[Mode]) -> None:
        self._switch = switch
        self._modes = modes

    def __call__(self, pipeline: Any, call: Call) -> None:
        self._switch(pipeline, call)
        for mode in self._modes:
            mode.begin(pipeline, call)


def approximated(pipeline: Any, spec: Spec, family: Family, switch: Switch) -> Switch:
    """Put the modes that the spec asks for into the pipeline's models; returns the new switch.

    Raises:
        ModelError: the model has no parts that a mode could leave out.
    """
    modes = list(_modes(pipeline, spec, family))
    return Approximated(switch, modes) if modes else switch


def _modes(pipeline: Any, spec: Spec, family: Family) -> Iterator[Mode]:
    asked: Approximate = spec.sampling.approximate
    if asked.deep_cache is not None:
        unets = [one.unet for one in (pipeline, getattr(pipeline, "refiner", None)) if one]
        yield DeepCached(unets, asked.deep_cache.cache_interval)
    if asked.mag_cache is not None:
        yield MagCached(pipeline.transformer, asked.mag_cache)
    if asked.taylor_seer is not None:
        yield TaylorSeerCached(pipeline.transformer, asked.taylor_seer)
    if asked.guidance_interval is not None:  # the last one, so that its hook is the outermost
        model = pipeline.unet if "unet" in family.denoiser else pipeline.transformer
        yield GuidedPart(model, *asked.guidance_interval, family.adapter.guided)


class GuidedPart(ModelHook):  # type: ignore[misc]
    """Guidance in a part of the steps; in the others only the conditional half is computed.

    The pipeline passes the unconditional and the conditional half of a batch in one call, and adds
    their difference times a scale. Outside the part it gets the conditional half twice, so that the
    difference is zero. Which steps are inside is computed as diffusers' guiders do
    (Kynkäänniemi et al. 2024).
    """

    def __init__(
        self, model: Any, start: float, stop: float, guided: Callable[[Call], bool]
    ) -> None:
        super().__init__()
        self._part = start, stop
        self._is_guided = guided
        self._pipeline: Any = None
        self._steps: range | None = None  # those with guidance; None: not known before the first
        self._step = 0
        HookRegistry.check_if_exists_or_initialize(model).register_hook(self, "guided_part")

    def begin(self, pipeline: Any, call: Call) -> None:
        self._pipeline = pipeline if self._is_guided(call) else None
        self._steps, self._step = None, 0

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self._pipeline is None or self._is_inside():
            return self.fn_ref.original_forward(*args, **kwargs)
        both = _batch_size(args, kwargs)  # 2B

        def half(tensor: Tensor) -> Tensor:
            return tensor[both // 2 :] if tensor.dim() and tensor.shape[0] == both else tensor

        args, kwargs = tree_map_only(Tensor, half, (args, kwargs))
        made = self.fn_ref.original_forward(*args, **kwargs)  # (B, ...)
        return tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]), made)

    def _is_inside(self) -> bool:
        """Whether the next step has guidance. A step is one call of the model."""
        if self._steps is None:
            known = getattr(self._pipeline, "num_timesteps", None)
            steps = len(self._pipeline.scheduler.timesteps) if known is None else known
            start, stop = (int(part * steps) for part in self._part)
            self._steps = range(start, stop)
        self._step += 1
        return self._step - 1 in self._steps


class _Features(ModelHook):  # type: ignore[misc]
    """Counts the steps of one U-Net, and holds what its last deep block returned."""

    def __init__(self, unet: Any, interval: int) -> None:
        super().__init__()
        self._interval = interval
        self.forget()
        HookRegistry.check_if_exists_or_initialize(unet).register_hook(self, "deep_cache")

    def forget(self) -> None:
        self.kept: Any = None
        self.reuses = False
        self._age = self._batch = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        batch = _batch_size(args, kwargs)
        self._age += 1
        # With a guided part, steps have two sizes of batch.
        self.reuses = self.kept is not None and batch == self._batch and self._age < self._interval
        if not self.reuses:
            self._age, self._batch = 0, batch
        return args, kwargs


class _DeepBlock(ModelHook):  # type: ignore[misc]
    """Leaves out a deep block if features are reused; then only the last one's output is used."""

    def __init__(self, block: Any, features: _Features, last: bool) -> None:
        super().__init__()
        self._features = features
        self._last = last
        self._shapes: Any = None
        HookRegistry.check_if_exists_or_initialize(block).register_hook(self, "deep_cache")

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self._features.reuses and self._last:
            return self._features.kept
        if self._features.reuses:
            # The U-Net may add residuals (of a ControlNet) to the outputs, which are not used.
            return tree_map_only(_Shape, _Shape.zeros, self._shapes)
        made = self.fn_ref.original_forward(*args, **kwargs)
        self._shapes = tree_map_only(Tensor, _Shape, made)
        if self._last:
            self._features.kept = made
        return made


class _Shape:
    """Shape, dtype and device of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._facts = tensor.shape, tensor.dtype, tensor.device

    def zeros(self) -> Tensor:
        shape, dtype, device = self._facts
        return torch.zeros(shape, dtype=dtype, device=device)


class DeepCached:
    """DeepCache (Ma et al. 2023): one of ``interval`` steps computes the complete U-Net.

    The others compute its first and last block, which have the largest maps, with the features
    that the blocks between them gave last (branch 0 of the paper, at uniform steps).

    Raises:
        ModelError: a U-Net has only one block on each side.
    """

    def __init__(self, unets: list[Any], interval: int) -> None:
        self._features = [_Features(unet, interval) for unet in unets]
        for unet, features in zip(unets, self._features, strict=True):
            if len(unet.up_blocks) < 2:
                raise ModelError(
                    f"{FIELD}.deep_cache: the U-Net has one block on each side, so none of them is "
                    "deep; remove it"
                )
            last = unet.up_blocks[-2]
            for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
                if block is not None:
                    _DeepBlock(block, features, block is last)

    def begin(self, pipeline: Any, call: Call) -> None:
        for features in self._features:
            features.forget()


class MagCached:
    """MagCache of diffusers, whose configuration depends on the number of steps."""

    def __init__(self, model: Any, asked: MagCache) -> None:
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        self._model = model
        self._options = asked.model_dump(exclude={"mag_ratios"})
        self._ratios = list(asked.mag_ratios or FLUX_MAG_RATIOS.tolist())
        self._steps = 0

    def begin(self, pipeline: Any, call: Call) -> None:
        from diffusers import MagCacheConfig

        if self._steps == call.num_inference_steps:
            self._model._reset_stateful_cache()
            return
        if self._steps:
            self._model.disable_cache()
        self._steps = call.num_inference_steps
        self._model.enable_cache(
            MagCacheConfig(
                num_inference_steps=self._steps, mag_ratios=self._ratios, **self._options
            )
        )


class TaylorSeerCached:
    """TaylorSeer of diffusers; factors have the dtype of the model."""

    def __init__(self, model: Any, asked: TaylorSeer) -> None:
        from diffusers import TaylorSeerCacheConfig

        self._model = model
        model.enable_cache(
            TaylorSeerCacheConfig(taylor_factors_dtype=model.dtype, **asked.model_dump())
        )

    def begin(self, pipeline: Any, call: Call) -> None:
        self._model._reset_stateful_cache()


def _batch_size(args: Any, kwargs: Any) -> int:
    """The size of the batch that a model is called with: that of its first tensor, the latents."""
    first = next(
        one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.dim()
    )
    return int(first.shape[0])
