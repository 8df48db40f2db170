"""Settles what a spec leaves open: as in the output's plan, or so that it fits the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.errors import SpecError
from batchgen.records import DeviceInfo
from batchgen.spec.model import AUTO, FLOAT8_MATMUL, INT8_MATMUL, Model
from batchgen.spec.spec import Spec

if TYPE_CHECKING:
    from batchgen.plan.plan import Plan

BFLOAT16_SINCE = (8, 0)  # compute capability of Ampere (A100), the first with bfloat16 units
FLOAT8_SINCE = (8, 9)  # of Ada (L4, L40S), the first that multiplies float8
SLOW_ON_GPU = (
    "model.dtype is float32: on a GPU this takes several times as long as 16 bits, and twice the "
    "memory; auto chooses 16 bits there"
)


def chosen(spec: Spec, device: DeviceInfo) -> Spec:
    """The spec with a value that fits the device wherever it says ``auto``.

    The batch size is the usual one; ``engine.batch_size`` computes another one for a GPU before.

    Raises:
        SpecError: the device cannot do what the spec asks for.
    """
    dtype = spec.model.dtype if spec.model.dtype != AUTO else dtype_on(device)
    quantization = spec.model.quantization
    if quantization is not None and quantization.multiplies_float8:
        _check_float8(device, dtype)
    resources = spec.resources
    spec = with_choices(spec, dtype, resources.micro_batch, resources.decode_batch_size)
    return spec if spec.output.provenance else with_provenance(spec, "xmp")


def _check_float8(device: DeviceInfo, dtype: str) -> None:
    """Refuse to multiply in float8 on a device, or from a dtype, for which torch has no kernels.

    Of GPUs whose capability is not known, such as those of AMD, torchao decides while loading.
    """
    if not device.is_gpu or (device.capability is not None and device.capability < FLOAT8_SINCE):
        major, minor = device.capability or (0, 0)
        own = f", whose compute capability is {major}.{minor}" if device.is_gpu else ""
        raise SpecError(
            "model.quantization.options.quant_type",
            FLOAT8_MATMUL,
            "on GPUs of compute capability 8.9 or newer (L4, L40S, H100)",
            because=f"the job would run on {device.name}{own}, and torch multiplies float8 only on "
            f"GPUs of 8.9 or newer (L4, L40S, H100); use {INT8_MATMUL}, or such a GPU",
        )
    if dtype != "bfloat16":
        raise SpecError("model.dtype", dtype, f"bfloat16, with {FLOAT8_MATMUL}")


def keep_choices(spec: Spec, saved: Plan | None) -> Spec:
    """The spec with the value of the output's plan wherever it says ``auto``.

    So an output keeps its values, whatever machine continues it.
    """
    if saved is None:
        return spec
    if spec.output.provenance is None:  # plans of earlier versions, without the field, mark none
        spec = with_provenance(spec, saved.spec.output.provenance or "none")
    if not spec.open_fields:
        return spec
    dtype = saved.spec.model.dtype if spec.model.dtype == AUTO else spec.model.dtype
    resources, kept = spec.resources, saved.spec.resources
    if resources.batch_size != AUTO:
        return with_choices(spec, dtype, resources.micro_batch, resources.decode_batch_size)
    decode = resources.decode_batch_size or kept.decode_batch_size
    return with_choices(spec, dtype, kept.micro_batch, decode)


def with_provenance(spec: Spec, provenance: str) -> Spec:
    """The spec with this mark of its image files."""
    output = spec.output.model_copy(update={"provenance": provenance})
    return spec.model_copy(update={"output": output})


def with_choices(spec: Spec, dtype: str, batch_size: int, decode_batch_size: int | None) -> Spec:
    """The spec with this dtype and these sizes of calls."""
    calls = {"batch_size": batch_size, "decode_batch_size": decode_batch_size}
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"dtype": dtype}),
            "resources": spec.resources.model_copy(update=calls),
        }
    )


def pinned(model: Model, saved: Plan | None) -> Model:
    """Pin the model to the hub commit of the saved plan, so that a resume ignores newer commits."""
    if saved is None or model.revision is not None or saved.spec.model != model:
        return model
    revision = saved.model.revision
    return (
        model if revision.startswith("sha256:") else model.model_copy(update={"revision": revision})
    )


def dtype_on(device: DeviceInfo) -> str:
    """The dtype that ``auto`` means on a device.

    GPUs without a known capability are those of AMD, or newer than the list of names; both have
    bfloat16. Older GPUs compute it without hardware of their own, slower than float16.
    """
    if not device.is_gpu:
        return "float32"
    is_older = device.capability is not None and device.capability < BFLOAT16_SINCE
    return "float16" if is_older else "bfloat16"
