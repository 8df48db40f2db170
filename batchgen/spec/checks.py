"""That the fields of a spec go together, and that it holds no secret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from batchgen.errors import SpecError
from batchgen.secrets import secret_in
from batchgen.spec.faults import NEEDED, missing
from batchgen.spec.sections import Columns, Conditioning, Output, Sampling
from batchgen.spec.tasks import TASKS, Task, is_image, parse_lora, task_named

if TYPE_CHECKING:
    from batchgen.spec.spec import Spec


def refusals(spec: Spec, stored: bool) -> Iterator[SpecError]:
    """What is wrong between fields. ``stored``: a spec of an output, which is taken as it is."""
    yield from _columns(spec)
    yield from _loras(spec)
    if not stored:
        yield from _places(spec)
        yield from _idle(spec)
        for section in (spec.input, spec.model, spec.output):
            name = type(section).__name__.lower()
            yield from _secrets(section.model_dump(), name)


def is_set(spec: Spec, name: str) -> bool:
    """The user has set a setting of ``sampling`` to something else than it is by itself."""
    return bool(getattr(spec.sampling, name) != Sampling.model_fields[name].default)


def _columns(spec: Spec) -> Iterator[SpecError]:
    task, columns = task_named(spec.task), spec.input.columns
    mapped = columns.mapped()
    for part in spec.conditioning.make:
        allowed = [name for name in mapped if is_image(name) and name != "mask"]
        if part not in allowed:
            named = ", ".join(allowed) or "none"
            yield SpecError("conditioning.make", part, f"mapped image parts: {named}")
    for part in Columns.model_fields:
        column = getattr(columns, part)
        if column is None and part in task.needs:
            yield missing(f"input.columns.{part}", f"a column, for {task.name}")
        if column is not None and part not in task.parts:
            yield SpecError(f"input.columns.{part}", column, _none_of(spec, task, part))


def _loras(spec: Spec) -> Iterator[SpecError]:
    try:
        parse_lora(spec.sampling.lora or "", spec.model.lora_weights)
    except ValueError as error:
        yield SpecError("sampling.lora", spec.sampling.lora, str(error))


def _places(spec: Spec) -> Iterator[SpecError]:
    """Where the input and the output lie."""
    for field, place in (("input.path", spec.input.path), ("output.url", spec.output.url)):
        if place is not None and "::" in place:
            yield SpecError(field, place, "a place of its own, without '::'")
    if not spec.output.url.strip():
        yield SpecError("output.url", spec.output.url, NEEDED["output"], said="is empty")


def _idle(spec: Spec) -> Iterator[SpecError]:
    """Settings that have no effect on this task or in this form."""
    task = task_named(spec.task)
    for name in Sampling.model_fields:
        if name in Columns.model_fields and name not in task.parts and is_set(spec, name):
            given = getattr(spec.sampling, name)
            yield SpecError(f"sampling.{name}", given, _none_of(spec, task, name))
    resize = spec.conditioning.resize
    is_other = resize != Conditioning.model_fields["resize"].default
    if is_other and not any(is_image(part) for part in task.parts):
        yield SpecError("conditioning.resize", resize, _none_of(spec, task, "image"))
    for name, forms in (("image_quality", ("jpeg", "webp")), ("jpeg_subsampling", ("jpeg",))):
        given = getattr(spec.output, name)
        if spec.output.image_format not in forms and given != Output.model_fields[name].default:
            allowed = f"with output.image_format {' or '.join(forms)}"
            yield SpecError(f"output.{name}", given, f"{allowed}; it is {spec.output.image_format}")


def _none_of(spec: Spec, task: Task, part: str) -> str:
    """That the task reads no such part, and which other one the columns are those of."""
    given = {name for name in Columns.model_fields if getattr(spec.input.columns, name) is not None}
    fits = (
        one.name
        for one in TASKS
        if set(one.needs) <= given <= set(one.parts) and part in one.parts and one is not task
    )
    is_condition = is_image(part) or part in ("class_label", "regions")
    meant = next(fits, None) if is_condition and not given <= set(task.parts) else None
    hint = f"; did you mean --task {meant}?" if meant else ""
    return f"nothing, since {task.name} reads no {part}{hint}"


def _secrets(value: Any, path: str) -> Iterator[SpecError]:
    """URLs that hold a secret, which would be kept in the plan."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _secrets(one, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _secrets(one, f"{path}.{number}" if isinstance(one, Mapping) else path)
    elif isinstance(value, str) and (found := secret_in(value)):
        yield SpecError(path, value, without_secret(), said=f"has {found}")


def without_secret() -> str:
    return (
        "a URL without one, since plan and job keep it: name it in storage_options as ${VARIABLE}, "
        "or leave it to the environment"
    )
