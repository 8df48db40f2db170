"""Quantization of model components: checks what is allowed, and configures the libraries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from batchgen.errors import ModelError, nearest
from batchgen.families import Family
from batchgen.models.files import Component
from batchgen.spec.model import FLOAT8_MATMUL, INT8_MATMUL, Model, Quantization

FIELD = "model.quantization"
# The types of torchao that also quantize activations, here with a scale for each token (PerRow),
# so that a sample's pixels do not depend on its neighbours.
PER_TOKEN_TYPES = (INT8_MATMUL, FLOAT8_MATMUL)
# All types that are allowed, with their options. The others quantize weights only.
TORCHAO_TYPES: Mapping[str, tuple[str, ...]] = {
    "Int8WeightOnlyConfig": (),
    "Int4WeightOnlyConfig": ("group_size",),
    "Float8WeightOnlyConfig": ("weight_dtype",),
    "IntxWeightOnlyConfig": ("weight_dtype",),
    **dict.fromkeys(PER_TOKEN_TYPES, ("granularity",)),
}
GRANULARITIES = ("PerRow",)
ONE_SCALE = (
    "any other scale of activations is computed from the complete micro-batch, so that a sample's "
    "pixels depend on its neighbours"
)
_FEW_BITS = {"int2": 2.5, "int4": 4.5, "4bit": 4.5}  # others have 8
_LEFT_OUT = ("llm_int8_skip_modules", "modules_to_not_convert")
OUTLIERS = (
    "bitsandbytes_8bit looks for outliers in the complete micro-batch, so that a sample's pixels"
    " depend on its neighbours"
)


@dataclass(frozen=True)
class Backend:
    """One library that quantizes.

    Attributes:
        package: its name for pip.
        module: its name for Python's import.
        options: the supported options of its configuration, with the allowed values if they are
            limited.
    """

    package: str
    module: str
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)


BACKENDS: Mapping[str, Backend] = {
    "bitsandbytes_4bit": Backend(
        "bitsandbytes",
        "bitsandbytes",
        {
            "bnb_4bit_quant_type": ("fp4", "nf4"),
            "bnb_4bit_compute_dtype": ("float32", "float16", "bfloat16"),
            "bnb_4bit_use_double_quant": (True, False),
            "bnb_4bit_quant_storage": (),
            "llm_int8_skip_modules": (),
        },
    ),
    "bitsandbytes_8bit": Backend(
        "bitsandbytes", "bitsandbytes", {"llm_int8_threshold": (), "llm_int8_skip_modules": ()}
    ),
    "quanto": Backend(
        "optimum-quanto",
        "optimum.quanto",
        {"weights_dtype": ("float8", "int8", "int4", "int2"), "modules_to_not_convert": ()},
    ),
    "torchao": Backend(
        "torchao",
        "torchao",
        {
            "quant_type": tuple(TORCHAO_TYPES),
            "group_size": (),
            "weight_dtype": (
                *(f"int{bits}" for bits in range(1, 9)),
                "float8_e4m3fn",
                "float8_e5m2",
            ),
            "granularity": GRANULARITIES,
            "modules_to_not_convert": (),
        },
    ),
}
SAVED_AS = ("bitsandbytes", "quanto", "torchao")  # ``quant_method`` of a saved configuration


def check_quantization(model: Model, family: Family, components: Sequence[Component]) -> None:
    """Check that components can be quantized, and saved quantized ones be read. Imports nothing.

    Raises:
        ModelError: a component or option that is not allowed, or a package that is missing.
    """
    for component in components:
        saved = component.config.get("quantization_config")
        if component.weighted and saved:
            _check_saved(component, saved)
    asked = model.quantization
    if asked is None:
        return
    vaes = (family.vae, f".{family.vae}")
    able = {
        component.name: component
        for component in components
        if _is_able(component) and not component.name.endswith(vaes)
    }
    for name in asked.components:
        if name not in able:
            raise ModelError(
                f"{FIELD}.components: got {name!r}; allowed for a {family.name} model (components "
                f"with weights in a folder): {', '.join(able) or 'none'}{nearest(name, able)}"
            )
        if able[name].config.get("quantization_config"):
            raise ModelError(
                f"{FIELD}.components: {name} in {able[name].folder} is quantized already; remove "
                "it from the list"
            )
    _check_options(asked.backend, asked.options)
    if asked.backend == "bitsandbytes_8bit" and any(map(_in_batches, asked.components)):
        _check_threshold(f"{FIELD}.options", asked.options)
    _require(asked.backend, FIELD)


def is_quantized(component: Component, model: Model) -> bool:
    """Whether the part's weights are quantized, while loading or as saved."""
    saved = component.weighted and component.config.get("quantization_config")
    return _is_asked(component, model) or bool(saved)


@contextmanager
def loading(component: Component, model: Model) -> Iterator[dict[str, Any]]:
    """Yield the arguments of ``from_pretrained`` that quantize; errors inside name the field.

    Raises:
        ModelError: the backend cannot quantize on this machine, or cannot read the saved weights.
    """
    if not is_quantized(component, model):
        yield {}
        return
    what = (
        f"{FIELD}: {component.name}"
        if _is_asked(component, model)
        else f"{component.name}: {component.folder}"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers deprecates some backends
            yield (
                {"quantization_config": _config(component, model)}
                if _is_asked(component, model)
                else {}
            )
    except (
        *(ImportError, AttributeError, AssertionError, KeyError),
        *(TypeError, ValueError, RuntimeError),  # RuntimeError: for example, no GPU
    ) as error:
        told = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ModelError(f"{what} cannot be quantized on this machine: {told}") from error


def bits_of(asked: Quantization) -> float:
    """Estimate the bits of one quantized weight, with its part of the scales of its group."""
    options = asked.options
    kind = f"{options.get('quant_type', '')}{options.get('weights_dtype', '')}{asked.backend}"
    few = next((bits for word, bits in _FEW_BITS.items() if word in kind.lower()), None)
    return 8.0 if few is None else few


def is_left_out(asked: Quantization, layer: str) -> bool:
    """Whether the options exclude a layer from quantization."""
    given = (asked.options.get(name) or () for name in _LEFT_OUT)
    names = {name for one in given for name in (one if isinstance(one, tuple) else (one,))}
    return any(f".{name}." in f".{layer}." for name in names)


def elements_of(parameter: Any) -> int:
    """Count the numbers of a parameter. 4-bit parameters of bitsandbytes pack two in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if packed is None else packed.shape.numel())


def _is_able(component: Component) -> bool:
    return component.weighted and component.library in ("diffusers", "transformers")


def _is_asked(component: Component, model: Model) -> bool:
    return model.quantization is not None and component.name in model.quantization.components


def _in_batches(component: str) -> bool:
    """Whether a component processes several samples at a time. Prompts are encoded one by one."""
    return "text_encoder" not in component


def _config(component: Component, model: Model) -> Any:
    """Make the quantization configuration of one component, with the class of its library."""
    import diffusers
    import transformers

    asked = model.quantization
    assert asked is not None
    options: dict[str, Any] = {
        name: list(one) if isinstance(one, tuple) else one for name, one in asked.options.items()
    }
    library: Any = transformers if component.library == "transformers" else diffusers
    if asked.backend == "torchao":
        skipped = options.pop("modules_to_not_convert", None)
        return library.TorchAoConfig(_torchao_type(options), modules_to_not_convert=skipped)
    if asked.backend == "quanto":
        if library is transformers and "weights_dtype" in options:
            options["weights"] = options.pop("weights_dtype")
        return library.QuantoConfig(**options)
    bits = asked.backend.removeprefix("bitsandbytes_")
    return library.BitsAndBytesConfig(**{f"load_in_{bits}": True}, **options)


def _torchao_type(options: dict[str, Any]) -> Any:
    import torch
    import torchao.quantization
    from torchao.quantization.quantize_.common import KernelPreference

    kind = options.pop("quant_type", next(iter(TORCHAO_TYPES)))
    if "weight_dtype" in options:
        options["weight_dtype"] = getattr(torch, str(options["weight_dtype"]))
    if kind in PER_TOKEN_TYPES:
        options["granularity"] = torchao.quantization.PerRow()
    if kind == FLOAT8_MATMUL:  # else a node that has the package mslk would compute other bytes
        options["kernel_preference"] = KernelPreference.TORCH
    made = getattr(torchao.quantization, kind)
    if "set_inductor_config" in made.__dataclass_fields__:
        # It would let torch.compile choose kernels by their timing, in the entire process.
        options["set_inductor_config"] = False
    return made(**options)


def _check_options(backend: str, options: Mapping[str, Any]) -> None:
    known = BACKENDS[backend].options
    kind = options.get("quant_type", next(iter(TORCHAO_TYPES)))
    for name, value in options.items():
        if name not in known:
            raise ModelError(
                f"{FIELD}.options.{name}: not an option of {backend}; allowed: {', '.join(known)}"
                f"{nearest(name, known)}"
            )
        if known[name] and value not in known[name]:
            allowed = ", ".join(str(one) for one in known[name])
            why = f" ({ONE_SCALE})" if name == "granularity" else ""
            raise ModelError(f"{FIELD}.options.{name}: got {value!r}; allowed: {allowed}{why}")
        own = {option for each in TORCHAO_TYPES.values() for option in each}
        if backend == "torchao" and name in own and name not in TORCHAO_TYPES[kind]:
            raise ModelError(f"{FIELD}.options.{name}: {kind} has no such option; remove it")


def _check_threshold(what: str, options: Mapping[str, Any]) -> None:
    if options.get("llm_int8_threshold", 6.0) != 0:
        raise ModelError(
            f"{what}: {OUTLIERS}; allowed: llm_int8_threshold: 0, which turns this off"
        )


def _check_saved(component: Component, saved: Mapping[str, Any]) -> None:
    what = f"{component.name}: {component.folder} was saved quantized"
    method = saved.get("quant_method")
    if method is None and (saved.get("load_in_4bit") or saved.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in SAVED_AS:
        raise ModelError(f"{what} by {method}; allowed: {', '.join(SAVED_AS)}")
    if method == "bitsandbytes":
        method = "bitsandbytes_4bit" if saved.get("load_in_4bit") else "bitsandbytes_8bit"
    if method == "bitsandbytes_8bit" and _in_batches(component.name):
        _check_threshold(what, saved)
    if method == "quanto" and saved.get("activations"):
        raise ModelError(
            f"{what} with quantized activations ({saved['activations']}); allowed: quantized "
            "weights only"
        )
    if method == "torchao":
        config = (saved.get("quant_type") or {}).get("default", {})
        kind = config.get("_type")
        if kind not in TORCHAO_TYPES:
            raise ModelError(f"{what} as {kind}; allowed: {', '.join(TORCHAO_TYPES)}")
        if kind in PER_TOKEN_TYPES and not _is_per_token(config):
            raise ModelError(f"{what} as {kind}; allowed: with granularity PerRow ({ONE_SCALE})")
    _require(method, what)


def _is_per_token(config: Mapping[str, Any]) -> bool:
    """Whether a configuration that torchao saved scales the activations of each token."""
    given = (config.get("_data") or {}).get("granularity")
    each = given if isinstance(given, list) else [given]
    return all(
        isinstance(one, Mapping)
        and one.get("_type") == "PerRow"
        and (one.get("_data") or {}).get("dim", -1) == -1
        for one in each
    )


def _require(name: str, what: str) -> None:
    backend = BACKENDS[name]
    root = backend.module.partition(".")[0]
    if find_spec(root) is None or find_spec(backend.module) is None:
        raise ModelError(
            f"{what}: the package {backend.package} is not installed; run `pip install "
            f"{backend.package}`"
        )
