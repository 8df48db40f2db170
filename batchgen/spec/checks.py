"""Checks that the fields of a spec fit each other, and that it holds no secret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from batchgen.errors import SpecError
from batchgen.secrets import secret_in
from batchgen.spec.approximate import FIELD, TINY_VAE
from batchgen.spec.faults import NEEDED, missing
from batchgen.spec.labels_section import FROM_LABELS
from batchgen.spec.model import OnlyWith, Section
from batchgen.spec.sections import Columns, Conditioning, Sampling
from batchgen.spec.tasks import TASKS, Task, is_image, parse_lora, task_named

if TYPE_CHECKING:
    from batchgen.spec.spec import Spec

# Settings of rows whose values become constants of compiled code.
ONE_VALUE = ("width", "height", "control_scale", "image_prompt_scale")


def refusals(spec: Spec, stored: bool) -> Iterator[SpecError]:
    """Yield the faults between fields.

    ``stored``: the spec is read from an output. An earlier version with fewer checks may have
    written it, so only what the code relies on is checked.
    """
    yield from _columns(spec)
    yield from _loras(spec)
    yield from _tiny_vae(spec)
    if not stored:
        yield from _places(spec)
        yield from _unscored(spec)
        yield from _idle(spec)
        yield from _offloads(spec)
        yield from _compiled(spec)
        for section in (spec.input, spec.model, spec.output):
            name = type(section).__name__.lower()
            yield from _secrets(section.model_dump(), name)
        for number, scorer in enumerate(spec.score):
            yield from _secrets(scorer.model_dump(), f"score.{number}")


def is_set(spec: Spec, name: str) -> bool:
    """Whether a setting of ``sampling`` differs from its default."""
    return bool(getattr(spec.sampling, name) != Sampling.model_fields[name].default)


def _columns(spec: Spec) -> Iterator[SpecError]:
    task, columns = task_named(spec.task), spec.input.columns
    mapped = columns.mapped()
    for part, made in spec.conditioning.make.items():
        if made.name in FROM_LABELS:
            yield from _drawn(spec, task, part, made.name)
            continue
        allowed = [name for name in mapped if is_image(name) and name != "mask"]
        if part not in allowed:
            named = ", ".join(allowed) or "none"
            yield SpecError("conditioning.make", part, f"image parts that have a column: {named}")
    for part in Columns.model_fields:
        column = getattr(columns, part)
        if column is None and part in task.needs and part not in spec.drawn:
            yield missing(f"input.columns.{part}", f"a column, for {task.name}")
        if column is not None and part not in task.parts:
            yield _unused(spec, task, part, f"input.columns.{part}", column)


def _drawn(spec: Spec, task: Task, part: str, maker: str) -> Iterator[SpecError]:
    """Check a part that is drawn from labels: it is of the maker's kind, and has no column."""
    field, kind = f"conditioning.make.{part}", FROM_LABELS[maker]
    if part.partition("_")[0] != kind or not (is_image(part) or part == "regions"):
        yield SpecError(
            field, maker, f"{maker} for the part {kind}", said=f"{maker} cannot make it"
        )
    elif kind not in task.parts:
        yield _unused(spec, task, kind, field, maker)
    column = spec.input.columns.mapped().get(part)
    if column is not None:
        because = f"{field} draws the {part} from labels; remove one of the two"
        yield SpecError(f"input.columns.{part}", column, "null", because=because)
    needed = "objects" if maker.startswith("objects") else "label_mask"
    if getattr(spec.input.columns, needed) is None:
        yield missing(f"input.columns.{needed}", f"a column, for {field}: {maker}")


def _loras(spec: Spec) -> Iterator[SpecError]:
    try:
        parse_lora(spec.sampling.lora or "", spec.model.lora_weights)
    except ValueError as error:
        yield SpecError("sampling.lora", spec.sampling.lora, str(error))


def _tiny_vae(spec: Spec) -> Iterator[SpecError]:
    """The tiny autoencoder is a component of the model, and ``sampling`` switches it on."""
    on, given = spec.sampling.approximate.tiny_vae, spec.model.components.get(TINY_VAE)
    component, switch = f"model.components.{TINY_VAE}", f"{FIELD}.{TINY_VAE}"
    if on and given is None:
        yield missing(component, f"the folder, hub id or URL of an AutoencoderTiny, for {switch}")
    if not on and given is not None:
        because = f"{switch} is false; set it to true, or remove the component"
        yield SpecError(component, given, "null", because=because)


def _places(spec: Spec) -> Iterator[SpecError]:
    """Check the places of the input and the output."""
    for field, place in (("input.path", spec.input.path), ("output.url", spec.output.url)):
        if place is not None and "::" in place:
            yield SpecError(field, place, "a path or URL without '::' (no chains of filesystems)")
    if not spec.output.url.strip():
        yield SpecError("output.url", spec.output.url, NEEDED["output"], said="is empty")


# Field of the policy -> the scorer that it decides by.
BY_SCORER = {
    "reject_blank": "quality",
    "reject_dark": "quality",
    "reject_blurred": "quality",
    "nsfw": "nsfw",
}


def _unscored(spec: Spec) -> Iterator[SpecError]:
    """Refuse a policy that decides by a scorer which the spec does not name."""
    there = {one.scorer for one in spec.score}
    for name, scorer in BY_SCORER.items():
        value = getattr(spec.policy, name)
        if value not in (False, "off") and scorer not in there:
            because = f"score does not name the scorer {scorer}; add it there, or remove this field"
            yield SpecError(f"policy.{name}", value, "", because=because)


def _offloads(spec: Spec) -> Iterator[SpecError]:
    """Refuse to offload stages that something else places, or that read weights by themselves."""
    given = spec.resources.offload
    for stage in given:
        name, pool = spec.resources.pool_of(stage)
        if pool.num_gpus is not None and pool.num_gpus > 1:
            because = (
                f"resources.{name}.num_gpus is {pool.num_gpus:g}, which divides the largest model "
                f"of {stage} over several GPUs; set it to 1, or leave {stage} out of the list"
            )
            yield SpecError("resources.offload", list(given), "stages on one GPU", because=because)
    if "encode" in given and spec.model.prompt_weighting is not None:
        because = (
            f"model.prompt_weighting is {spec.model.prompt_weighting}, which would compute on the "
            "CPU then; remove it, or leave encode out of the list"
        )
        yield SpecError("resources.offload", list(given), "denoise, decode", because=because)
    for mode in spec.sampling.approximate.names:
        stage = "decode" if mode == TINY_VAE else "denoise"
        if stage in given and mode != "guidance_interval":
            because = f"{FIELD}.{mode} was not tested with it; remove one of the two"
            yield SpecError("resources.offload", list(given), f"no {stage}", because=because)


def _idle(spec: Spec) -> Iterator[SpecError]:
    """Refuse settings that have no effect on this task or with another field's value."""
    task = task_named(spec.task)
    for name in Sampling.model_fields:
        if name in Columns.model_fields and name not in task.parts and is_set(spec, name):
            given = getattr(spec.sampling, name)
            yield _unused(spec, task, name, f"sampling.{name}", given)
    resize = spec.conditioning.resize
    is_other = resize != Conditioning.model_fields["resize"].default
    if is_other and not any(is_image(part) for part in task.parts):
        yield _unused(spec, task, "image", "conditioning.resize", resize)
    for place in type(spec).model_fields:
        section = getattr(spec, place)
        if isinstance(section, Section):
            yield from _ineffective(section, place)


def _ineffective(section: Section, place: str) -> Iterator[SpecError]:
    """Refuse fields of a section that are set, but are marked as working with other values only."""
    for name, field in type(section).model_fields.items():
        given = getattr(section, name)
        for mark in field.metadata:
            if not isinstance(mark, OnlyWith) or given == field.default:
                continue
            value, fitting = getattr(section, mark.field), " or ".join(mark.values)
            if value not in mark.values:
                allowed = f"with {place}.{mark.field} {fitting}"
                because = (
                    f"{place}.{mark.field} is {value}; remove it, or set {mark.field} to {fitting}"
                )
                yield SpecError(f"{place}.{name}", given, allowed, because=because)


def _unused(spec: Spec, task: Task, part: str, field: str, given: object) -> SpecError:
    """The task does not use this part; suggests the task that the columns look like."""
    columns = spec.input.columns
    mapped = {name for name in Columns.model_fields if getattr(columns, name) is not None}
    fits = (
        one.name
        for one in TASKS
        if set(one.needs) <= mapped <= set(one.parts) and part in one.parts and one is not task
    )
    is_condition = is_image(part) or part in ("class_label", "regions")
    meant = next(fits, None) if is_condition and not mapped <= set(task.parts) else None
    others = ", ".join(one.name for one in TASKS if part in one.parts)
    hint = f"--task {meant}" if meant else f"a task that does ({others})"
    because = f"{task.name} uses no {part}; remove it, or use {hint}"
    return SpecError(field, given, f"nothing, with {task.name}", because=because)


def _compiled(spec: Spec) -> Iterator[SpecError]:
    """Refuse what would compile again and again, or cannot be compiled (``resources.compile``)."""
    if spec.resources.compile is None:
        return
    for mode in spec.sampling.approximate.names:
        because = "the mode changes code that resources.compile compiles; remove one of the two"
        yield SpecError(f"{FIELD}.{mode}", "on", "null or false", because=because)
    for stage in spec.resources.offload:
        if stage != "encode":
            because = f"resources.compile does not compile weights that move; remove {stage}"
            given = list(spec.resources.offload)
            yield SpecError("resources.offload", given, "encode", because=because)
    columns = spec.input.columns
    for name in ONE_VALUE:
        column = getattr(columns, name)
        if column is not None:
            because = f"resources.compile compiles for one {name}; remove one of the two"
            yield SpecError(f"input.columns.{name}", column, "null", because=because)
    if spec.conditioning.resize == "multiple-of":
        because = "resources.compile compiles for one size of images; change one of the two"
        yield SpecError("conditioning.resize", "multiple-of", "fill, fit, stretch", because=because)
    for name, pool in spec.resources.pools.items():
        if pool.num_gpus is not None and pool.num_gpus > 1 and name != "encode":
            because = (
                "a model that is divided over several GPUs cannot be compiled "
                "(resources.compile); change one of the two"
            )
            field = f"resources.{name}.num_gpus"
            yield SpecError(field, pool.num_gpus, "up to 1", because=because)


def _secrets(value: Any, path: str) -> Iterator[SpecError]:
    """Refuse URLs that hold a secret, since the plan would keep it."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _secrets(one, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _secrets(one, f"{path}.{number}" if isinstance(one, Mapping) else path)
    elif isinstance(value, str) and (found := secret_in(value)):
        yield SpecError(path, value, without_secret(), said=f"contains {found}")


def without_secret() -> str:
    return (
        "a URL without it, since the plan and job.yaml store the URL; put it into "
        "storage_options as ${VARIABLE}, or leave it to the environment"
    )
