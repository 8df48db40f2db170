"""What is added to a model, put into a stage's pipeline; and what each call switches there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchgen.errors import ModelError
from batchgen.families.schedulers import check_scheduler, options_for
from batchgen.models.additions import (
    TWO_ENCODERS,
    added_file,
    ip_adapter_weights,
    reads_hidden_states,
    shapes_of,
)
from batchgen.records import Call
from batchgen.spec.model import Lora, Model, TextualInversion

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# How the keys of text encoders start, in the files of diffusers and in those of kohya's scripts.
TEXT_KEYS = (*(f"{name}." for name in TEXT_ENCODERS), "lora_te_", "lora_te1_", "lora_te2_")


class Switch:
    """Brings a pipeline to what a call asks for: its LoRAs and, in the denoiser, its scheduler.

    Args:
        model: names LoRAs, scheduler and options.
        saved: the model's own scheduler, from whose configuration every other is made; None where
            the stage has none.
    """

    def __init__(self, model: Model, saved: Any = None) -> None:
        self._model = model
        self._saved = saved
        self._schedulers: dict[str | None, Any] = {}
        self._lora: tuple[tuple[str, float], ...] | None = None  # in effect; None: not yet known

    def __call__(self, pipeline: Any, call: Call) -> None:
        """To be called at the head of every call of the stage."""
        if self._saved is not None:
            scheduler = self.scheduler(call.scheduler)
            if pipeline.scheduler is not scheduler:
                pipeline.scheduler = scheduler
        lora = call.lora or ()
        if self._model.loras and lora != self._lora:
            _set_loras(pipeline, lora)
            self._lora = lora

    def scheduler(self, name: str | None = None) -> Any:
        """The scheduler of that class, or the run's own."""
        if name not in self._schedulers:
            self._schedulers[name] = self._made(name or self._model.scheduler)
        return self._schedulers[name]

    def _made(self, name: str | None) -> Any:
        import diffusers

        options = self._model.scheduler_options
        if name is None and not options:
            return self._saved
        name = name or type(self._saved).__name__
        made = getattr(diffusers, check_scheduler(name))
        with _as_model_error("model.scheduler_options"):
            return made.from_config(self._saved.config, **options_for(name, options))


def add_to_encoder(pipeline: Any, model: Model) -> None:
    """Learned tokens, the text encoders' halves of LoRAs, what an IP-Adapter asks of its images."""
    for number, inversion in enumerate(model.textual_inversions):
        _load_inversion(pipeline, f"model.textual_inversions.{number}", inversion)
    for number, lora in enumerate(model.loras):
        _load_text_half(pipeline, f"model.loras.{number}", lora)
    if model.ip_adapter is not None:
        weights = ip_adapter_weights(model.ip_adapter)
        pipeline.reads_hidden_states = reads_hidden_states(weights)
        if pipeline.feature_extractor is None:
            _add_feature_extractor(pipeline)
    if list(model.added()):
        _at_rest(pipeline)


def add_to_denoiser(pipeline: Any, model: Model) -> None:
    """The IP-Adapter, and LoRAs without their text encoders' halves."""
    if model.ip_adapter is not None:
        weights = ip_adapter_weights(model.ip_adapter)
        with _as_model_error(f"model.ip_adapter: {weights}"):
            pipeline.load_ip_adapter(
                str(weights.parent),
                subfolder="",
                weight_name=weights.name,
                image_encoder_folder=None,
                local_files_only=True,
            )
        pipeline.feature_extractor = None  # which the line above makes for images
    if model.loras:
        pipeline.load_lora_into_text_encoder = _nothing
    for number, lora in enumerate(model.loras):
        _load_denoiser_half(pipeline, f"model.loras.{number}", lora)
    if list(model.added()):
        _at_rest(pipeline)


def _load_inversion(pipeline: Any, field: str, inversion: TextualInversion) -> None:
    file = added_file(field, inversion)
    with _as_model_error(f"{field}: {file}"):
        if shapes_of(field, file).keys() != TWO_ENCODERS.keys():
            pipeline.load_textual_inversion(
                str(file), token=inversion.token, use_safetensors=True, local_files_only=True
            )
            return
        from safetensors.torch import load_file

        for key, embedding in load_file(file).items():
            encoder = TWO_ENCODERS[key]
            pipeline.load_textual_inversion(
                embedding,
                token=inversion.token,
                text_encoder=getattr(pipeline, encoder),
                tokenizer=getattr(pipeline, encoder.replace("text_encoder", "tokenizer")),
            )


def _load_text_half(pipeline: Any, field: str, lora: Lora) -> None:
    """As ``load_lora_weights`` does, which would ask for the denoiser as well."""
    file = added_file(field, lora)
    keys = shapes_of(field, file)
    if not any(key.startswith(TEXT_KEYS) for key in keys):
        return
    from safetensors.torch import load_file

    source: Any = str(file)
    if all(key.startswith("lora_") for key in keys):  # whose other half the U-Net must translate
        source = {key: one for key, one in load_file(file).items() if key.startswith(TEXT_KEYS)}
    with _as_model_error(f"{field}: {file}"):
        found = pipeline.lora_state_dict(
            source,
            return_lora_metadata=True,
            return_alphas=True,
            use_safetensors=True,
            local_files_only=True,
        )
        for name in TEXT_ENCODERS:
            if any(key.startswith(f"{name}.") for key in found[0]):
                pipeline.load_lora_into_text_encoder(
                    found[0],
                    network_alphas=found[1] if len(found) == 3 else None,
                    text_encoder=getattr(pipeline, name),
                    prefix=name,
                    lora_scale=pipeline.lora_scale,
                    adapter_name=lora.name,
                    metadata=found[-1],
                    _pipeline=pipeline,
                    low_cpu_mem_usage=True,
                )
    _require_loaded(pipeline, field, lora)


def _load_denoiser_half(pipeline: Any, field: str, lora: Lora) -> None:
    file = added_file(field, lora)
    if all(key.startswith(TEXT_KEYS) for key in shapes_of(field, file)):
        return
    with _as_model_error(f"{field}: {file}"):
        pipeline.load_lora_weights(
            str(file), adapter_name=lora.name, use_safetensors=True, local_files_only=True
        )
    _require_loaded(pipeline, field, lora)


def _require_loaded(pipeline: Any, field: str, lora: Lora) -> None:
    if lora.name not in _held(pipeline):
        raise ModelError(
            f"{field}: {added_file(field, lora)} has no layer that {type(pipeline).__name__} knows:"
            " made for another model"
        )


def _held(pipeline: Any) -> set[str]:
    """Names of the LoRAs that some component of the stage has a half of."""
    return {name for names in pipeline.get_list_adapters().values() for name in names}


def _set_loras(pipeline: Any, lora: tuple[tuple[str, float], ...]) -> None:
    held = _held(pipeline)
    chosen = [(name, weight) for name, weight in lora if name in held]
    if chosen:
        pipeline.enable_lora()  # which ``set_adapters`` does not
        pipeline.set_adapters([name for name, _ in chosen], [weight for _, weight in chosen])
    elif held:
        pipeline.disable_lora()


def _add_feature_extractor(pipeline: Any) -> None:
    """As ``load_ip_adapter`` makes one where the model has none."""
    from transformers import CLIPImageProcessor

    size = pipeline.image_encoder.config.image_size
    pipeline.feature_extractor = CLIPImageProcessor(size=size, crop_size=size)


def _at_rest(pipeline: Any) -> None:
    """A LoRA's layers come in training mode, with their dropout."""
    import torch

    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of a method that would load what another stage holds."""


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """What the libraries find wrong with a file is said of the field that names it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs
            yield
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        told = " ".join(line.strip() for line in str(error).splitlines()[:2])  # of hundreds, often
        raise ModelError(f"{what} cannot be used: {told}") from error
