"""Prompts with control images or boxes: ControlNet, T2I-Adapter and GLIGEN."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from batchgen.families import stable_diffusion, stable_diffusion_xl
from batchgen.families.adapter import Adapter, Given, ImageInputs
from batchgen.families.calls import call_pipeline, decode_by, decode_scaled, require_steps, size_of
from batchgen.families.family import Family
from batchgen.records import Call

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]


def encode_controls(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return ``control``, ``control_1``, ...: (n, H, W, 3) uint8, the unchanged control images."""
    import numpy as np
    import torch

    return {
        part: torch.from_numpy(np.stack(images))
        for part, images in inputs.images.items()
        if part.startswith("control")
    }


def without_source(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """Return the control images, for a pipeline that starts from noise only."""
    if "image" in inputs.images:
        raise ValueError(f"{type(pipeline).__name__} takes no source image, only control images")
    return encode_controls(pipeline, inputs)


def with_source(
    encode_source: Callable[[Any, ImageInputs], dict[str, torch.Tensor]],
) -> Callable[[Any, ImageInputs], dict[str, torch.Tensor]]:
    """Make an encoder of the control images and, if rows have a source, of its latents."""

    def encode(pipeline: Any, inputs: ImageInputs) -> dict[str, torch.Tensor]:
        controls = encode_controls(pipeline, inputs)
        if "image" not in inputs.images:
            return controls
        channels = pipeline.vae.config.latent_channels
        if channels != 4:  # the pipeline takes images of 4 channels as latents, others as pixels
            raise ValueError(
                f"the VAE has {channels} latent channels; allowed with a source image: 4"
            )
        return {**controls, **encode_source(pipeline, inputs)}

    return encode


def controls_of(given: Given, wanted: int, what: str) -> list[Array]:
    """Return the control images, (B, H, W, 3) uint8, of each of the ``wanted`` models.

    Raises:
        ValueError: more or fewer control images than models.
    """
    names = ["control", *(f"control_{number}" for number in range(1, wanted))]
    present = sorted(name for name in given.conditions if name.startswith("control"))
    if present != sorted(names):
        raise ValueError(
            f"the model has {wanted} {what}{'s' if wanted > 1 else ''}, and each needs one control"
            f" image; got {len(present)} ({', '.join(present) or 'none'})"
        )
    return [given.conditions[name].cpu().numpy() for name in names]


def scales_of(given: Given, wanted: int) -> list[float]:
    """Return the weight of each control image; 1 if the call sets none."""
    scales = given.call.control_scale
    if scales is None:
        return [1.0] * wanted
    if len(scales) != wanted:
        raise ValueError(f"control_scale has {len(scales)} weights for {wanted} control image(s)")
    return [float(scale) for scale in scales]


def by_controlnet(pipeline: Any, given: Given) -> torch.Tensor:
    """Denoise from noise or, if rows have a source image, from that."""
    if "image" in given.conditions:
        return _from_source(pipeline, given)
    controls, scale = _controlnet_inputs(pipeline, given)
    return call_pipeline(
        pipeline,
        given,
        image=controls,
        controlnet_conditioning_scale=scale,
        eta=given.call.eta,
        **size_of(given.call),
    )


def _from_source(pipeline: Any, given: Given) -> torch.Tensor:
    """Denoise from the source, with the image-to-image pipeline of the same components."""
    import diffusers

    require_steps(given.call)
    controls, scale = _controlnet_inputs(pipeline, given)
    name = type(pipeline).__name__.replace("ControlNetPipeline", "ControlNetImg2ImgPipeline")
    options = {"requires_safety_checker": False} if "safety_checker" in pipeline.components else {}
    other = getattr(diffusers, name)(**pipeline.components, **options)
    other.set_progress_bar_config(disable=True)
    return call_pipeline(
        other,
        given,
        image=given.conditions["image"],
        control_image=controls,
        strength=given.call.strength,
        controlnet_conditioning_scale=scale,
        eta=given.call.eta,
    )


def _controlnet_inputs(pipeline: Any, given: Given) -> tuple[Any, Any]:
    """Return images and weight for one ControlNet, or a list of each for several.

    Images are (B, H, W, 3) float32 in [0, 1], to which the pipelines convert PIL images. With
    several ControlNets not all pipelines accept lists of PIL images.
    """
    nets = getattr(pipeline.controlnet, "nets", None)
    count = 1 if nets is None else len(nets)
    controls = [
        array.astype("float32") / 255.0 for array in controls_of(given, count, "ControlNet")
    ]
    scales = scales_of(given, count)
    return (controls[0], scales[0]) if nets is None else (controls, scales)


def by_adapter(pipeline: Any, given: Given) -> torch.Tensor:
    """Denoise from noise; an adapter with one channel (sketches, edges) gets grey images."""
    from PIL import Image

    several = getattr(pipeline.adapter, "adapters", None)
    adapters = [pipeline.adapter] if several is None else list(several)
    modes = ["L" if adapter.config.in_channels == 1 else "RGB" for adapter in adapters]
    controls = [
        [Image.fromarray(image).convert(mode) for image in array]
        for mode, array in zip(modes, controls_of(given, len(adapters), "T2I-Adapter"), strict=True)
    ]
    scales = scales_of(given, len(adapters))
    return call_pipeline(
        pipeline,
        given,
        image=controls[0] if several is None else controls,
        adapter_conditioning_scale=scales[0] if several is None else scales,
        eta=given.call.eta,
        **size_of(given.call),
    )


def decode_multiplied(pipeline: Any, latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Decode as this pipeline does: it multiplies by the inverse, which rounds differently."""
    vae = pipeline.vae
    return decode_by(vae, 1 / vae.config.scaling_factor * latents)


def by_regions(pipeline: Any, given: Given) -> torch.Tensor:
    """Denoise from noise, with a phrase in each box; the pipeline encodes the phrases itself.

    Raises:
        ValueError: no region or too many, a phrase too long, or too few steps for the boxes to have
            an effect. (The pipeline would fail unclearly, cut them off or ignore them.)
    """
    regions = given.call.regions or ()
    if not 1 <= len(regions) <= MOST_REGIONS:
        raise ValueError(f"{len(regions)} regions; allowed: 1 to {MOST_REGIONS}")
    phrases = [phrase for phrase, _ in regions]
    longest = pipeline.tokenizer.model_max_length
    for phrase in phrases:
        length = len(pipeline.tokenizer(phrase).input_ids)
        if length > longest:
            raise ValueError(f"the region {phrase!r} has {length} tokens; allowed: up to {longest}")
    pipeline.scheduler.set_timesteps(given.call.num_inference_steps)
    if int(GROUNDED_SHARE * len(pipeline.scheduler.timesteps)) < 1:
        raise ValueError(
            f"{given.call.num_inference_steps} steps are too few: regions act in the first"
            f" {GROUNDED_SHARE:.0%} of the steps, which must be at least one"
        )
    return call_pipeline(
        pipeline,
        given,
        gligen_phrases=phrases,
        gligen_boxes=[list(box) for _, box in regions],
        gligen_scheduled_sampling_beta=GROUNDED_SHARE,
        eta=given.call.eta,
        **size_of(given.call),
    )


MOST_REGIONS = 30  # the pipeline reads no more
GROUNDED_SHARE = 0.3  # fraction of the steps with boxes; the pipeline's default

TEXT = ("tokenizer", "text_encoder")
BY_CONTROLNET = (
    "by public arguments: prompts' embeddings and control images in, latents out; a source image"
    " goes in as latents, into the image-to-image pipeline with the same components"
)
BY_ADAPTER = "by public arguments: prompts' embeddings and control images in, latents out"

FAMILIES = (
    Family(
        name="controlnet",
        task="control",
        pipeline="StableDiffusionControlNetPipeline",
        saved_as=(
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            *stable_diffusion.SAVED_AS,
        ),
        encoder=(*TEXT, "vae"),
        denoiser=("unet", "controlnet", "scheduler"),
        decoder=("vae",),
        approximations=("deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=stable_diffusion.encode_prompt,
            encode_images=with_source(stable_diffusion.encode_source),
            denoise=by_controlnet,
            decode=decode_scaled,
            tokenizers=(("tokenizer", 0),),
        ),
        split=BY_CONTROLNET,
        null=stable_diffusion.NULL,
        settings=("control_scale", "strength", "eta"),
        external=("vae", "controlnet"),
    ),
    Family(
        name="controlnet-xl",
        task="control",
        pipeline="StableDiffusionXLControlNetPipeline",
        saved_as=(
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            *stable_diffusion_xl.SAVED_AS,
        ),
        encoder=(*stable_diffusion_xl.TEXT, "vae"),
        denoiser=("unet", "controlnet", "scheduler"),
        decoder=("vae",),
        approximations=("deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=stable_diffusion_xl.encode_prompt,
            encode_images=with_source(stable_diffusion_xl.encode_source),
            denoise=by_controlnet,
            decode=stable_diffusion_xl.decode,
            tokenizers=stable_diffusion_xl.TOKENIZERS,
        ),
        split=BY_CONTROLNET,
        null=stable_diffusion_xl.NULL,
        settings=("control_scale", "strength", "eta"),
        external=("vae", "controlnet"),
        recommended=stable_diffusion_xl.RECOMMENDED,
    ),
    Family(
        name="t2i-adapter",
        task="control",
        pipeline="StableDiffusionAdapterPipeline",
        saved_as=("StableDiffusionAdapterPipeline", *stable_diffusion.SAVED_AS),
        encoder=TEXT,
        denoiser=("unet", "adapter", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=stable_diffusion.encode_prompt,
            encode_images=without_source,
            denoise=by_adapter,
            decode=decode_multiplied,
            tokenizers=(("tokenizer", 0),),
        ),
        split=BY_ADAPTER,
        null=("safety_checker", "feature_extractor"),
        settings=("control_scale", "eta"),
        external=("vae", "adapter"),
    ),
    Family(
        name="t2i-adapter-xl",
        task="control",
        pipeline="StableDiffusionXLAdapterPipeline",
        saved_as=("StableDiffusionXLAdapterPipeline", *stable_diffusion_xl.SAVED_AS),
        encoder=stable_diffusion_xl.TEXT,
        denoiser=("unet", "adapter", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=stable_diffusion_xl.encode_prompt,
            encode_images=without_source,
            denoise=by_adapter,
            decode=stable_diffusion_xl.decode,
            tokenizers=stable_diffusion_xl.TOKENIZERS,
        ),
        split=BY_ADAPTER,
        null=stable_diffusion_xl.NULL,
        settings=("control_scale", "eta"),
        multiple_of=2,  # these adapters read blocks of 2 x 2 latents
        external=("vae", "adapter"),
        recommended=stable_diffusion_xl.RECOMMENDED,
    ),
    Family(
        name="gligen",
        task="control",
        pipeline="StableDiffusionGLIGENPipeline",
        saved_as=("StableDiffusionGLIGENPipeline",),
        encoder=TEXT,
        denoiser=(*TEXT, "unet", "scheduler"),
        decoder=("vae",),
        approximations=("guidance_interval", "deep_cache", "tiny_vae"),
        adapter=Adapter(
            encode_prompt=stable_diffusion.encode_prompt,
            encode_images=without_source,
            denoise=by_regions,
            decode=decode_scaled,
            tokenizers=(("tokenizer", 0),),
        ),
        split="by public arguments: prompt_embeds in, latents out; the denoise stage also holds the"
        " text encoder, since the pipeline encodes the regions' phrases itself",
        null=("safety_checker", "feature_extractor"),
        needs=("regions",),
        min_steps=4,  # boxes act in the first 30% of the steps
        settings=("regions", "eta"),
    ),
)
