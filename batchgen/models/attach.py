"""Loads LoRAs, textual inversions and IP-Adapters into a stage's pipeline; switches them per call.

LoRAs have two parts: one for the text encoders, which the encoder stage loads, and one for the
denoiser. The scheduler is switched here as well, since rows may name one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from batchgen.errors import ModelError
from batchgen.families.calls import device_of
from batchgen.families.schedulers import check_scheduler, options_for
from batchgen.models.additions import (
    TWO_ENCODERS,
    added_file,
    ip_adapter_weights,
    reads_hidden_states,
    shapes_of,
)
from batchgen.models.host_steps import on_host
from batchgen.records import Call
from batchgen.spec.model import Lora, Model, TextualInversion

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# Prefixes of the text encoders' keys, in files of diffusers and of kohya's scripts.
TEXT_KEYS = (*(f"{name}." for name in TEXT_ENCODERS), "lora_te_", "lora_te1_", "lora_te2_")


@dataclass(frozen=True)
class Scale:
    """The weight of one LoRA in one layer: a tensor that the layer multiplies by.

    Attributes:
        lora: its name.
        tensor: () what the layer uses; compiled code reads it in every call.
        unit: its value for the weight 1: alpha divided by rank, or as the file says.
    """

    lora: str
    tensor: Any
    unit: float


class Switch:
    """Switches a pipeline to the LoRAs of a call and, in the denoiser, to its scheduler.

    Args:
        model: names LoRAs, scheduler and options.
        saved: the model's own scheduler; all others are made from its configuration. None if the
            stage has no scheduler.
    """

    def __init__(self, model: Model, saved: Any = None) -> None:
        self._model = model
        self._saved = saved
        self._schedulers: dict[str | None, Any] = {}
        self._lora: tuple[tuple[str, float], ...] | None = None  # those in effect; None: unknown
        self._steady: tuple[Scale, ...] | None = None

    def __call__(self, pipeline: Any, call: Call) -> None:
        """Switch the pipeline; the stage does so at the beginning of every call."""
        if self._saved is not None:
            scheduler = self.scheduler(call.scheduler)
            if pipeline.scheduler is not scheduler:
                pipeline.scheduler = scheduler
            scheduler.model_device = device_of(pipeline)
        lora = call.lora or ()
        if self._model.loras and lora != self._lora:
            if self._steady is None:
                _set_loras(pipeline, lora)
            else:
                _set_scales(self._steady, dict(lora))
            self._lora = lora

    def hold(self, pipeline: Any) -> None:
        """From now on switch LoRAs without changing the model's code, which will be compiled.

        All LoRAs are active in every call, those that the call does not name with weight zero.
        """
        self._steady = _active_scales(pipeline) if self._model.loras else ()

    def scheduler(self, name: str | None = None) -> Any:
        """Return the scheduler of that class, or the run's own."""
        if name not in self._schedulers:
            self._schedulers[name] = on_host(self._made(name or self._model.scheduler))
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
    """Load textual inversions, the text encoders' parts of LoRAs, and an image preprocessor."""
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
    """Load the IP-Adapter, and LoRAs without their text encoders' parts."""
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
        pipeline.feature_extractor = None  # load_ip_adapter adds one, which this stage never uses
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
    """Do what ``load_lora_weights`` does; that method needs the denoiser, which is elsewhere."""
    file = added_file(field, lora)
    keys = shapes_of(field, file)
    if not any(key.startswith(TEXT_KEYS) for key in keys):
        return
    from safetensors.torch import load_file

    source: Any = str(file)
    if all(key.startswith("lora_") for key in keys):  # kohya's: the U-Net's part is not for here
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
            f"{field}: {added_file(field, lora)} has no layer that {type(pipeline).__name__} knows;"
            " it was trained for another model"
        )


def _held(pipeline: Any) -> set[str]:
    """Return the names of the LoRAs that some component of the stage has a part of."""
    return {name for names in pipeline.get_list_adapters().values() for name in names}


def _set_loras(pipeline: Any, lora: tuple[tuple[str, float], ...]) -> None:
    held = _held(pipeline)
    chosen = [(name, weight) for name, weight in lora if name in held]
    if chosen:
        pipeline.enable_lora()  # ``set_adapters`` does not undo ``disable_lora``
        pipeline.set_adapters([name for name, _ in chosen], [weight for _, weight in chosen])
    elif held:
        pipeline.disable_lora()


def _active_scales(pipeline: Any) -> tuple[Scale, ...]:
    """Activate all LoRAs, and make their weights in each layer tensors; returns these.

    peft does so as well, for LoRAs that are exchanged in a compiled model.

    Raises:
        ModelError: a LoRA whose effect is not proportional to its weight (DoRA).
    """
    import torch
    from peft.tuners.lora import LoraLayer

    held = sorted(_held(pipeline))
    if held:
        pipeline.set_adapters(held, [1.0] * len(held))
    modules = [one for one in pipeline.components.values() if isinstance(one, torch.nn.Module)]
    layers = [one for each in modules for one in each.modules() if isinstance(one, LoraLayer)]
    scales = []
    for layer in layers:
        if layer.lora_variant:
            names = ", ".join(layer.lora_variant)
            raise ModelError(
                f"model.loras: {names} is a DoRA or another variant, which cannot be switched off "
                "in compiled code; remove it, or remove resources.compile"
            )
        for name, unit in layer.scaling.items():
            layer.scaling[name] = torch.tensor(unit, device=layer.weight.device)
            scales.append(Scale(name, layer.scaling[name], unit))
    return tuple(scales)


def _set_scales(scales: Iterable[Scale], weights: Mapping[str, float]) -> None:
    for scale in scales:
        scale.tensor.fill_(scale.unit * weights.get(scale.lora, 0.0))


def _add_feature_extractor(pipeline: Any) -> None:
    """Make the image preprocessor that ``load_ip_adapter`` makes if the model has none."""
    from transformers import CLIPImageProcessor

    size = pipeline.image_encoder.config.image_size
    pipeline.feature_extractor = CLIPImageProcessor(size=size, crop_size=size)


def _at_rest(pipeline: Any) -> None:
    """Switch to eval mode: layers of a LoRA are created in training mode, with dropout."""
    import torch

    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)


def _nothing(*_: Any, **__: Any) -> None:
    """Replaces a method that would load into components of another stage."""


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Turn errors of the libraries into a ModelError that names the field and file."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs
            yield
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        told = " ".join(line.strip() for line in str(error).splitlines()[:2])  # often hundreds
        raise ModelError(f"{what} cannot be used: {told}") from error
