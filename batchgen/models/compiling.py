"""Compiles denoisers and decoders with torch.compile (``resources.compile``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from batchgen.errors import ModelError
from batchgen.families import Family, family_named
from batchgen.models.artifacts import choose_folder
from batchgen.models.attach import Switch
from batchgen.records import ModelInfo
from batchgen.spec.spec import Spec

FIELD = "resources.compile"
LOOPED = ("unet", "transformer", "controlnet")  # components that a sampling loop calls in each step
MOST_VERSIONS = 64  # of one function: for blocks of other shapes, with guidance and without
BY_TORCHAO = "torchao"  # the only backend of model.quantization whose layers can be compiled


def check_compile(spec: Spec, info: ModelInfo) -> None:
    """Refuse, while planning, to compile a model that cannot be compiled.

    Raises:
        ModelError: the reason.
    """
    if spec.resources.compile is None:
        return
    asked = spec.model.quantization
    looped = any(name.rpartition(".")[2] in LOOPED for name in asked.components) if asked else False
    if asked is not None and looped and asked.backend != BY_TORCHAO:
        raise ModelError(_not_with(asked.backend))
    why = family_named(spec.task, info.family).uncompiled
    if why:
        raise ModelError(f"{FIELD}: a {info.family} model cannot be compiled, since {why}")


def compile_denoiser(pipeline: Any, family: Family, switch: Switch, how: str | None) -> bool:
    """Let torch compile what the sampling loop calls, when it is called first; or return False.

    With ``regional`` only the blocks that the class of the model names as repeated: those of one
    shape share a compiled function. A model without such blocks is compiled as a whole.

    Args:
        pipeline: a pipeline with the denoiser, on its device.
        family: names the components.
        switch: of the same pipeline; it must no longer change the model's code.
        how: ``resources.compile``; None: the model is not compiled.

    Raises:
        ModelError: the model has weights or LoRAs that compiled code cannot use.
    """
    if how is None or pipeline.device.type == "meta":
        return False
    settings = _settings()
    switch.hold(pipeline)
    for module in _looped(pipeline, family):
        _refuse_quantized(module)
        if how == "regional" and _has_repeated_blocks(module):
            module.compile_repeated_blocks(**settings)
        else:
            module.compile(**settings)
    return True


def compile_decoder(pipeline: Any, family: Family, how: str | None) -> bool:
    """Let torch compile the decoder of the VAE, or return False.

    With tiling the decoder is called for each tile.
    """
    if how is None or pipeline.device.type == "meta":
        return False
    getattr(pipeline, family.vae).decoder.compile(**_settings())
    return True


def _settings() -> dict[str, Any]:
    """Arguments of torch.compile. They hold in every thread; torch's configuration holds in one.

    Raises:
        ModelError: this torch is too old, or others can write to the folder of compiled code.
    """
    choose_folder()
    import torch
    import torch._dynamo
    import torch._inductor.config

    if not hasattr(torch._inductor.config, "deterministic"):
        raise ModelError(
            f"{FIELD}: torch {torch.__version__} chooses kernels by measuring, so replicas would "
            "generate different bytes; install a newer one (tested: 2.13), or remove the field"
        )
    limit = {"recompile_limit": MOST_VERSIONS}
    if "recompile_limit" not in signature(torch.compile).parameters:  # before torch 2.13
        torch._dynamo.config.recompile_limit = limit.pop("recompile_limit")
    # fullgraph: what cannot be compiled is an error, and does not run slowly without a message.
    # dynamic: all calls have the same sizes; code for any size is slower.
    # deterministic: otherwise torch measures which of several kernels is faster, whose results
    # differ in rounding, so two replicas could choose differently.
    return {"fullgraph": True, "dynamic": False, "options": {"deterministic": True}, **limit}


def _has_repeated_blocks(module: Any) -> bool:
    """Whether the model has blocks of the classes that its own class names as repeated."""
    named = getattr(module, "_repeated_blocks", None) or ()
    return any(type(one).__name__ in named for one in module.modules())


def _refuse_quantized(module: Any) -> None:
    """Refuse weights that were saved quantized by another backend than that of ``check_compile``.

    Raises:
        ModelError: names the backend.
    """
    method = getattr(module, "quantization_method", None)
    if method is not None and str(getattr(method, "value", method)) != BY_TORCHAO:
        raise ModelError(_not_with(str(getattr(method, "value", method))))


def _not_with(backend: str) -> str:
    return (
        f"{FIELD}: weights that {backend} quantized cannot be compiled; use the backend "
        f"{BY_TORCHAO}, or remove {FIELD}"
    )


def _looped(pipeline: Any, family: Family) -> Iterator[Any]:
    """Yield the models that the sampling loop calls, also those of a second pipeline (refiner)."""
    for path in family.denoiser:
        owner, _, name = path.rpartition(".")
        if name in LOOPED:
            found = getattr(getattr(pipeline, owner) if owner else pipeline, name)
            yield from getattr(found, "nets", [found])  # several ControlNets


@contextmanager
def compile_errors(what: str) -> Iterator[None]:
    """Turn errors of torch.compile into a ModelError.

    Raises:
        ModelError: torch cannot compile the model, or finds no C++ compiler.
    """
    import torch

    dynamo: Any = torch._dynamo
    try:
        yield
    except dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " ".join(lines[:2])
        raise ModelError(f"{FIELD}: {what} cannot be compiled on this machine: {told}") from error
