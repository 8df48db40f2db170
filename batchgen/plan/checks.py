"""Checks that spec, dataset and model fit each other, while planning, before any work."""

from __future__ import annotations

import pyarrow as pa

from batchgen.errors import InputError, SpecError, nearest
from batchgen.families import family_named
from batchgen.images.conditions import settings_of
from batchgen.labels.makers import EVERY_MAKER
from batchgen.plan.call_settings import ALWAYS, Settings, read_setting
from batchgen.plan.columns import field_twice
from batchgen.records import ModelInfo
from batchgen.spec.approximate import FIELD
from batchgen.spec.call_settings import CALL_SETTINGS, OWN_RULES, CallSetting
from batchgen.spec.checks import is_set
from batchgen.spec.sections import Sampling
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import is_image

_TEXTS = ("prompt", "negative_prompt", "scheduler", "lora")  # columns; settings are more
_WORDS = {int: "integers", float: "numbers", str: "text", bool: "true or false"}


def settle(spec: Spec, model: ModelInfo) -> Spec:
    """Fill in the sampling settings that the model recommends.

    Raises:
        SpecError: a setting that the model does not support.
    """
    given = {name: value for name, value in spec.sampling.model_dump().items() if value is not None}
    filled = {
        "num_inference_steps": model.num_inference_steps,
        "guidance_scale": model.guidance_scale,
        "width": model.width,
        "height": model.height,
        **({"strength": model.strength} if "strength" in model.settings else {}),
        **given,
    }
    sampling = Sampling(**filled)
    settings = Settings(sampling, model, spec.model)
    for name in CALL_SETTINGS:
        try:
            read_setting(settings, name, None)
        except ValueError as error:
            raise SpecError(f"sampling.{name}", getattr(sampling, name), str(error)) from error
    return spec.model_copy(update={"sampling": sampling})


def check_fit(spec: Spec, model: ModelInfo) -> None:
    """Refuse columns and conditions that the task allows but this model does not support.

    Raises:
        SpecError: the field, what was given, what is allowed.
    """
    mapped = spec.input.columns.mapped()
    for part, column in mapped.items():
        is_setting = part in Sampling.model_fields and part not in (*ALWAYS, *OWN_RULES)
        if (is_setting or part == "regions") and part not in model.settings:
            because = _unsupported(spec, model, part)
            raise SpecError(f"input.columns.{part}", column, "null", because=because)
    if spec.task == "control" and "image" in mapped and "strength" not in model.settings:
        because = f"a {model.family} model reads no source image, only control images; remove it"
        raise SpecError("input.columns.image", mapped["image"], "null", because=because)
    if "lora" in mapped and not spec.model.loras:
        because = "model.loras is empty; list the LoRAs there, or remove the column"
        raise SpecError("input.columns.lora", mapped["lora"], "null", because=because)
    for part in model.needs:
        if part not in mapped and part not in spec.drawn:
            raise SpecError(
                f"input.columns.{part}",
                None,
                f"a column: a {model.family} model for {spec.task} needs it",
            )
    controls = sum(part.startswith("control") for part in spec.image_parts)
    if controls != model.controls and not (model.optional_control and controls == 1):
        raise SpecError(
            "input.columns.control",
            spec.input.columns.control,
            f"{model.controls} column{'' if model.controls == 1 else 's'}, one for each control "
            f"image of this {model.family} model",
        )
    _check_offload(spec, model)
    for part, made in spec.conditioning.make.items():
        try:
            settings_of(made.name, made.options, EVERY_MAKER)
        except ValueError as error:
            raise SpecError(f"conditioning.make.{part}", made.name, str(error)) from error


def _check_offload(spec: Spec, model: ModelInfo) -> None:
    """Refuse to offload a stage with components that are quantized."""
    asked = spec.model.quantization
    if asked is None or not spec.resources.offload:
        return
    family = family_named(spec.task, model.family)
    held = {"encode": family.encoder, "denoise": family.denoiser, "decode": family.decoder}
    for stage in spec.resources.offload:
        for name in asked.components:
            if name in held[stage]:
                because = (
                    f"model.quantization quantizes {name}, and quantized weights cannot be "
                    f"offloaded; leave {stage} out of the list, or {name} out of model.quantization"
                )
                given = list(spec.resources.offload)
                raise SpecError("resources.offload", given, f"no {stage}", because=because)


def check_approximations(spec: Spec, model: ModelInfo) -> None:
    """Refuse approximate modes that the model does not support, or that would have no effect.

    Raises:
        SpecError: the mode, and what is supported.
    """
    asked = spec.sampling.approximate
    supported = family_named(spec.task, model.family).approximations if asked.names else ()
    for name in asked.names:
        if name not in supported:
            because = (
                f"a {model.family} model for {spec.task} does not support it (supported: "
                f"{', '.join(supported) or 'none'}); remove it"
            )
            raise SpecError(f"{FIELD}.{name}", "on", "null", because=because)
    if asked.mag_cache and asked.mag_cache.mag_ratios is None and model.family != "flux":
        raise SpecError(
            f"{FIELD}.mag_cache.mag_ratios",
            None,
            f"the ratios of this {model.family} model, one for each step: diffusers has them only "
            "for Flux, and prints them with MagCacheConfig(calibrate=True)",
        )
    scale = spec.sampling.guidance_scale
    scale = model.guidance_scale if scale is None else scale
    if asked.guidance_interval and scale <= 1 and spec.input.columns.guidance_scale is None:
        because = f"there is no guidance, since guidance_scale is {scale:g}; remove it"
        raise SpecError(f"{FIELD}.guidance_interval", asked.guidance_interval, "", because=because)


def refuse_idle_settings(spec: Spec, model: ModelInfo) -> None:
    """Refuse settings that the task allows but this model does not support.

    Raises:
        SpecError: the field, what was given, what is allowed.
    """
    for name in Sampling.model_fields:
        if name in (*ALWAYS, *OWN_RULES) or name in model.settings or not is_set(spec, name):
            continue
        given, because = getattr(spec.sampling, name), _unsupported(spec, model, name)
        raise SpecError(f"sampling.{name}", given, "nothing", because=because)


def _unsupported(spec: Spec, model: ModelInfo, name: str) -> str:
    supported = ", ".join(model.settings) or "none"
    return (
        f"a {model.family} model for {spec.task} does not support {name} (supported: {supported}); "
        "remove it"
    )


def check_columns(spec: Spec, schema: pa.Schema, path: str) -> None:
    """Check that every mapped or kept column exists and has a type that fits its part."""
    wanted = {f"input.columns.{part}": name for part, name in spec.input.columns.mapped().items()}
    keep = spec.input.keep_columns
    for name in schema.names if keep is None else keep:
        wanted[f"input.keep_columns {name}"] = name
    for field, name in wanted.items():
        if name not in schema.names:
            raise InputError(
                f"{field}: no column {name!r} in {path}; it has {', '.join(schema.names)}"
                f"{nearest(name, schema.names)}"
            )
        if schema.names.count(name) > 1:
            raise InputError(f"{field}: {path} has two columns named {name!r}; rename one")
        twice = field_twice(schema.field(name).type)
        if twice is not None:
            raise InputError(
                f"{field}: column {name!r} in {path} is a struct with two fields named {twice!r}, "
                "which rows cannot tell apart; rename one, or leave the column out with "
                "input.keep_columns"
            )
        part = field.removeprefix("input.columns.")
        _check_type(part, name, schema.field(name).type, path)


def _check_type(part: str, name: str, kind: pa.DataType, path: str) -> None:
    types = pa.types
    value = kind.value_type if types.is_dictionary(kind) else kind
    text, whole = _is_text(value), types.is_integer(value)
    allowed = {
        **dict.fromkeys(_TEXTS, (_holds(str, value), _WORDS[str])),
        "key": (text or whole, "text or integers"),
        "seed": (_holds(int, value), _WORDS[int]),
        "split": (text, _WORDS[str]),
        "class_label": (text or whole, "class numbers or names"),
        "new_category": (text or whole, "category numbers or names"),
        **dict.fromkeys(("image_width", "image_height"), (_holds(int, value), _WORDS[int])),
        **{name: _fits(one, value) for name, one in CALL_SETTINGS.items()},
        "regions": (
            types.is_list(value) and types.is_struct(value.value_type),
            "lists of {phrase, box}",
        ),
    }.get(part)
    if is_image(part) or part == "label_mask":
        allowed = _holds_image(value), "image bytes, URIs, or an image struct with bytes or path"
    if allowed is not None and not allowed[0]:
        raise InputError(
            f"input.columns.{part}: column {name!r} in {path} has type {kind}; needed: {allowed[1]}"
        )


def _fits(setting: CallSetting, kind: pa.DataType) -> tuple[bool, str]:
    """Whether a column of this type can hold the setting, and what can."""
    fits, words = _holds(setting.kind, kind), _WORDS[setting.kind]
    if setting.several:
        return fits or pa.types.is_list(kind), f"{words}, or lists of them"
    return fits, words


def _holds(wanted: type, kind: pa.DataType) -> bool:
    """Whether a column of this type holds values of one of ``KINDS``."""
    types = pa.types
    if wanted is str:
        return _is_text(kind) or bool(types.is_null(kind))
    if wanted is bool:
        return bool(types.is_boolean(kind))
    return bool(types.is_integer(kind) or (wanted is float and types.is_floating(kind)))


def _holds_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        inline, named = kinds.get("bytes", pa.null()), kinds.get("path", pa.null())
        return _is_binary(inline) or _is_text(named)
    return _is_binary(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))
