"""Live replicas: a stage's parts read from a checked model folder onto a device."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.errors import ModelError
from batchgen.replicas.families import check_scheduler, family_of
from batchgen.replicas.inspection import ModelInfo, inspect, pipeline_index
from batchgen.spec import Model, Spec

if TYPE_CHECKING:
    from batchgen.decode import Decoder
    from batchgen.denoise import Denoiser
    from batchgen.encode import Encoder


def load_encoder(info: ModelInfo, spec: Spec, device: str = "cpu") -> Encoder:
    """Tokenizer, text encoder and, for image tasks, the encoding half of the VAE.

    Args:
        info: the model as planned.
        spec: gives task, dtype, variant and thread count.
        device: a torch device, such as ``cpu`` or ``cuda``.

    Raises:
        ModelError: the folder cannot be reached from this machine, or holds another model.
    """
    from batchgen.encode import Encoder

    takes_images = spec.task == "image-to-image"
    parts = ("tokenizer", "text_encoder", "vae") if takes_images else ("tokenizer", "text_encoder")
    pipeline = _load(info, spec, parts)
    if takes_images:
        pipeline.vae.decoder = pipeline.vae.post_quant_conv = None
    return Encoder(pipeline.to(device))


def load_denoiser(info: ModelInfo, spec: Spec, device: str = "cpu") -> Denoiser:
    """U-Net and scheduler, for calls of ``resources.batch_size`` samples; see ``load_encoder``."""
    from batchgen.denoise import Denoiser

    pipeline = _load(info, spec, ("unet", "scheduler"))
    if spec.model.scheduler is not None:
        import diffusers

        scheduler_class = getattr(diffusers, check_scheduler(spec.model.scheduler))
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    return Denoiser(pipeline.to(device), spec.resources.batch_size)


def load_decoder(info: ModelInfo, spec: Spec, device: str = "cpu") -> Decoder:
    """The decoding half of the VAE, for calls of ``resources.batch_size``; see ``load_encoder``."""
    from batchgen.decode import Decoder

    pipeline = _load(info, spec, ("vae",))
    pipeline.vae.encoder = pipeline.vae.quant_conv = None
    return Decoder(pipeline.to(device), spec.resources.batch_size)


def parameter_counts(stage: Encoder | Denoiser | Decoder) -> dict[str, int]:
    """Component -> number of parameters held, for the components of a stage that have any."""
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in stage.pipeline.components.items()
        if hasattr(part, "parameters")
    }


def _load(info: ModelInfo, spec: Spec, parts: tuple[str, ...]) -> Any:
    """A diffusers pipeline of the task's class that holds ``parts``, and None for the others."""
    _prepare_libraries(spec.resources.torch_threads)
    import diffusers
    import torch
    from diffusers.image_processor import VaeImageProcessor

    folder = _planned_folder(info, spec.model, spec.task)
    family = family_of(pipeline_index(folder).get("_class_name"), spec.task, str(folder))
    pipeline_class = getattr(diffusers, family.pipelines[spec.task])
    with warnings.catch_warnings():
        # of outdated scheduler files, which diffusers mends by itself
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = pipeline_class.from_pretrained(
            folder,
            dtype=getattr(torch, spec.model.dtype),
            variant=spec.model.variant,
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            **{name: None for name in family.components if name not in parts},
        )
    pipeline.vae_scale_factor = info.vae_scale_factor  # a pipeline without a VAE assumes 8
    pipeline.image_processor = VaeImageProcessor(vae_scale_factor=info.vae_scale_factor)
    pipeline.set_progress_bar_config(disable=True)
    for name in set(parts) & set(family.weighted):
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline


def _prepare_libraries(threads: int) -> None:
    """Settings of the whole process that a sample's bytes depend on; and the libraries be quiet."""
    import torch
    import transformers

    speaking: Any = transformers.utils.logging
    speaking.set_verbosity_error()  # before diffusers' import, which makes transformers speak
    speaking.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@cache
def _planned_folder(info: ModelInfo, model: Model, task: str) -> Path:
    """The planned model's folder on this machine, which need not be the one that planned.

    Its files are hashed again, once a process; those of a hub's commit cannot change.
    """
    here = Path(info.path).is_dir()
    if not info.revision.startswith("sha256:"):
        if here:
            return Path(info.path)
        model = model.model_copy(update={"revision": info.revision})
    elif here:
        model = model.model_copy(update={"path": info.path})
    found = inspect(model, task)
    if found.manifest_sha256 != info.manifest_sha256:
        raise ModelError(
            f"model {info.model_id} in {found.path} is not the planned one: its files hash to"
            f" {found.manifest_sha256[:12]}, those planned to {info.manifest_sha256[:12]}"
        )
    return Path(found.path)
