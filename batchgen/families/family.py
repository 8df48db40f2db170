"""One row of the catalogue: a pipeline class in one task, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from batchgen.families.adapter import Adapter


@dataclass(frozen=True)
class Family:
    """Models of one kind in one task. Importing this loads no model library.

    Attributes:
        name: the family's usual name; unique within a task.
        task: a task of ``batchgen.spec.tasks``.
        pipeline: the diffusers class whose call is the denoise stage.
        saved_as: the classes (in ``model_index.json``) whose folders this family can load.
        encoder: components that the encode stage holds. ``vae`` here means its encoding half.
        denoiser: components that the denoise stage holds.
        decoder: components that the decode stage holds. ``vae`` here means its decoding half.
        adapter: the functions that call the pipeline, stage by stage.
        split: one sentence: where the call is split, and how if not by public arguments.
        stubs: components whose configuration every stage gets, since the pipeline reads it
            (``config``, ``dtype``).
        optional: components that a folder of the family may lack.
        null: components that are never loaded (safety checkers and the like).
        size: (component, key) of the configuration value with the native size in latents, or the
            size itself if no configuration has it.
        vae: name of the autoencoder component, ``vae`` or ``vqvae``.
        channels: allowed ``in_channels`` of the denoiser, as (times the latent channels, plus).
        image_latent_channels: latent channels that the VAE must have, since the pipeline tells
            image latents from pixels by their number; None if it does not matter.
        upscale: size of the output divided by that of the conditioning image; 0: the VAE's scale
            factor.
        guidance: ``negative`` (classifier-free, against a negative prompt), ``null`` (classifier-
            free, against no condition), ``embedded`` (a number the model reads) or ``none``.
        settings: settings of a call that the pipeline takes, in addition to steps, guidance, size.
        strength: used if neither the spec nor the row sets one.
        multiple_of: width and height must be multiples of this many latents; 0: of as many as the
            VAE's scale factor.
        fixed_size: the model only makes images of its native size.
        schedulers: the schedulers that the pipeline's loop supports; empty: all.
        min_steps: with fewer steps the pipeline ignores a condition or fails.
        guided_classes: only models with this number of classes support guidance; 0: all do.
        needs: parts of ``input.columns`` that must have a column, in addition to the task's.
        optional_control: rows may have a control image; the model can do without it.
        needs_ip_adapter: the model needs an IP-Adapter (``model.ip_adapter``) to take images.
        external: components that may come from elsewhere (``model.components``).
        pipelines: (name, class) of second pipelines. Each is in a folder of its own, which the spec
            names as the component ``name``; a stage holds their components as ``name.component``.
        approximations: the approximate modes (``spec.approximate.METHODS``) that it supports.
            ``guidance_interval`` needs a pipeline that passes both halves of a guided batch in one
            call, the unconditional one first, and starts from all of its scheduler's timesteps or
            says how many it takes (``num_timesteps``).
        uncompiled: why torch.compile cannot compile it; empty: it can.
        recommended: num_inference_steps and guidance_scale, if the model recommends none.
    """

    name: str
    task: str
    pipeline: str
    saved_as: tuple[str, ...]
    encoder: tuple[str, ...]
    denoiser: tuple[str, ...]
    decoder: tuple[str, ...]
    adapter: Adapter
    split: str
    stubs: tuple[str, ...] = ("vae",)
    optional: tuple[str, ...] = ()
    null: tuple[str, ...] = ()
    size: tuple[str, str] | int = ("unet", "sample_size")
    vae: str = "vae"
    channels: tuple[tuple[int, int], ...] = ((1, 0),)
    image_latent_channels: int | None = None
    upscale: int = 1
    guidance: str = "negative"
    settings: tuple[str, ...] = ()
    strength: float = 0.6
    multiple_of: int = 1
    fixed_size: bool = False
    schedulers: tuple[str, ...] = ()
    min_steps: int = 1
    guided_classes: int = 0
    needs: tuple[str, ...] = ()
    optional_control: bool = False
    needs_ip_adapter: bool = False
    external: tuple[str, ...] = ("vae",)
    pipelines: tuple[tuple[str, str], ...] = ()
    approximations: tuple[str, ...] = ()
    uncompiled: str = ""
    recommended: tuple[int, float] = (25, 7.5)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all components that some stage holds."""
        return tuple(dict.fromkeys((*self.encoder, *self.denoiser, *self.decoder)))
