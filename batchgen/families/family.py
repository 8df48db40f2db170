"""One row of the catalogue: a pipeline class in one task, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from batchgen.families.adapter import Adapter


@dataclass(frozen=True)
class Family:
    """Models of one kind in one task. Importing this loads no model library.

    Attributes:
        name: as people call the family; unique within a task.
        task: a task of ``batchgen.spec.tasks``.
        pipeline: the diffusers class whose call is the denoise stage.
        saved_as: the classes (of ``model_index.json``) whose folders serve this family.
        encoder: components that the encode stage holds. ``vae`` here means its encoding half.
        denoiser: components that the denoise stage holds.
        decoder: components that the decode stage holds. ``vae`` here means its decoding half.
        adapter: how the call is made, a stage at a time.
        split: one sentence: where the call is cut, and if not by public arguments, how.
        stubs: components of which a stage that does not hold them gets the configuration alone,
            since the pipeline asks for it (``config``, ``dtype``).
        optional: components that a folder of the family may lack.
        null: components that are never loaded (safety checkers and the like).
        size: (component, key) of the configuration that tells the native size in latents, or that
            size itself where no configuration does.
        vae: name of the autoencoder component, ``vae`` or ``vqvae``.
        channels: what ``in_channels`` of the denoiser may be, as (times the latent channels, plus).
        image_latent_channels: by this count the pipeline tells image latents from pixels, so the
            VAE must have it; None where it does not matter.
        upscale: pixels of the output a pixel of the conditioning image, each way; 0: as many as a
            latent has.
        guidance: ``negative`` (classifier-free, against a negative prompt), ``null`` (classifier-
            free, against no condition), ``embedded`` (a number the model reads) or ``none``.
        settings: settings of a call, beside steps, guidance and size, that the pipeline takes.
        strength: used where the spec and the row name none.
        multiple_of: width and height must be multiples of this many latents; 0: as many as a latent
            has pixels.
        fixed_size: the model makes images of its native size alone.
        schedulers: those that the pipeline's loop is written for; empty: all.
        min_steps: with fewer the pipeline ignores a condition or fails.
        guided_classes: guidance is for models of exactly so many classes; 0: of any.
        needs: parts of ``input.columns`` that must be mapped, beside those that the task needs.
        optional_control: rows may bring a control image, for which the model has a substitute.
        needs_ip_adapter: an IP-Adapter (``model.ip_adapter``) lets the model take images.
        external: components that may come from elsewhere (``model.components``).
        pipelines: (name, class) of second pipelines, each in a folder of its own which the spec
            names as the component ``name``; a stage holds their components as ``name.component``.
        recommended: num_inference_steps and guidance_scale where the model names none.
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
    recommended: tuple[int, float] = (25, 7.5)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all components that some stage holds."""
        return tuple(dict.fromkeys((*self.encoder, *self.denoiser, *self.decoder)))
