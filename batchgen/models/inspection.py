"""Inspects a model: reads what it is from its files, and checks that it fits the task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchgen.errors import ModelError, shown
from batchgen.families import FAMILIES, Family
from batchgen.families.schedulers import check_options, chosen_scheduler
from batchgen.models.additions import added_files, components_added
from batchgen.models.files import (
    MOST,
    Component,
    check_control_components,
    check_text_components,
    check_tiny_vae,
    files_of,
    latent_facts,
    need,
    pipeline_index,
    read_json,
    whole,
)
from batchgen.models.find import (
    RECOMMENDED_FILE,
    FoundModel,
    find_component,
    find_model,
    find_pipeline,
)
from batchgen.models.quantize import BACKENDS, check_quantization
from batchgen.models.single_file import NAME, from_single_file
from batchgen.models.weighting import check_weighting, settings_of
from batchgen.records import ModelInfo
from batchgen.secrets import without_secrets
from batchgen.spec.approximate import TINY_VAE
from batchgen.spec.model import Model
from batchgen.spec.sections import MAX_SIZE, MIN_SIZE
from batchgen.spec.spec import Spec


def inspect(model: Model, task: str) -> ModelInfo:
    """Find a model and check that it can serve the task, without importing torch.

    It looks for a name in ``batchgen/shipped``, then for a local folder, then on the Hugging Face
    hub (only in its cache if ``HF_HUB_OFFLINE`` is set); files at a URL are downloaded. Reads every
    file once, for its hash.

    Raises:
        ModelError: the model is not found or not cached, or its pipeline, a component, weights or
            the scheduler cannot be used. The message names the component and the file.
        StorageFailed: the store of a URL refuses or fails.
    """
    found = find_model(model, task)
    try:
        return _inspected(found, model, task)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            f"model {found.path}: one of its configuration files has an invalid value "
            f"({type(error).__name__}: {error}); replace it by an undamaged copy"
        ) from error


def _inspected(found: FoundModel, model: Model, task: str) -> ModelInfo:
    folder = found.folder
    index = pipeline_index(folder)
    family = family_for(folder, index, model, task)
    components = components_of(folder, index, model, family)
    if found.file is not None:
        components = from_single_file(found.file, folder, family, components)
    named = _files(found, components, model)
    check_text_components(components)
    check_quantization(model, family, components)
    check_weighting(model, family)
    named |= added_files(model, family, components)
    scheduler = chosen_scheduler(index["scheduler"][1], model.scheduler)
    check_options(scheduler, model.scheduler_options)
    if family.schedulers and scheduler not in family.schedulers:
        allowed = ", ".join(family.schedulers)
        raise ModelError(
            f"scheduler {scheduler}: a {family.name} model for {task} works only with {allowed}"
        )
    classes = _class_names(index, components) if task == "class-conditional" else ()
    guidable = family.guided_classes in (0, len(classes))
    latents = latent_facts(_component(components, family.vae))
    height, width = _native_size(components, family, latents.factor)
    steps, guidance = _recommended(folder, family)
    manifest = _manifest_sha256(named)
    return ModelInfo(
        model_id=without_secrets(model.path),
        path=str(found.path),
        revision=found.commit or f"sha256:{manifest[:12]}",
        manifest_sha256=manifest,
        pipeline_class=index["_class_name"],
        family=family.name,
        scheduler=scheduler,
        latent_channels=latents.channels,
        vae_scale_factor=latents.factor,
        width=width,
        height=height,
        multiple_of=latents.factor * (family.multiple_of or latents.factor),
        num_inference_steps=steps,
        guidance_scale=guidance if guidable else min(guidance, 1.0),
        class_names=classes,
        controls=sum(component.name in CONTROLS for component in components),
        upscale=family.upscale or latents.factor,
        fixed_size=family.fixed_size,
        settings=settings_of(family, model),
        strength=family.strength,
        optional_control=family.optional_control,
        needs=family.needs,
        schedulers=family.schedulers,
        min_steps=family.min_steps,
        guidable=guidable,
        max_noise_level=int(index.get("max_noise_level") or 999),
    )


def packages_used(spec: Spec) -> tuple[str, ...]:
    """List the packages, by their pip names, that images depend on because of this spec."""
    model = spec.model
    quantised = model.quantization
    return (
        *(("peft",) if model.loras else ()),
        *((BACKENDS[quantised.backend].package,) if quantised else ()),
        *((model.prompt_weighting,) if model.prompt_weighting else ()),
        *(("triton",) if spec.resources.compile else ()),
    )


CONTROLS = ("controlnet", "adapter")


def _files(found: FoundModel, components: list[Component], model: Model) -> dict[str, Path]:
    """Map names in the manifest to files, for everything to load of the model itself."""
    folder = found.folder
    files = [folder / "model_index.json", folder / RECOMMENDED_FILE]
    named = {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}
    if found.file is not None:
        named[NAME] = found.file
    for component in components:
        named |= {f"{component.label}/{path.name}": path for path in files_of(component, model)}
        if whole := component.name.rpartition(".")[0]:
            named[f"{whole}/model_index.json"] = component.folder.parent / "model_index.json"
    return named


def family_for(folder: Path, index: Mapping[str, Any], model: Model, task: str) -> Family:
    """Find the family of a saved model for a task.

    Raises:
        ModelError: there is none; the message says what is missing or does not fit, and which
            tasks the model fits.
    """
    saved_as = index.get("_class_name")
    reasons: list[tuple[bool, str]] = []
    for family in FAMILIES:
        if family.task == task and saved_as in family.saved_as:
            reason = _misfit(folder, index, model, family)
            if reason is None:
                return family
            reasons.append((not set(model.components) <= set(family.external), reason))
    others = [
        family.task
        for family in FAMILIES
        if saved_as in family.saved_as and _misfit(folder, index, model, family) is None
    ]
    fitting = f"; it fits {', '.join(dict.fromkeys(others))}" if others else ""
    if reasons:
        # Prefer the reason of a family that supports the components in model.components.
        _, nearest_reason = min(reasons, key=lambda one: one[0])
        raise ModelError(f"{nearest_reason}{fitting}")
    names = {name for one in FAMILIES if one.task == task for name in one.saved_as}
    known = sorted(names, key=lambda name: ("StableDiffusion" not in name, len(name), name))
    shortly = ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
    raise ModelError(
        f"model {folder} is a {saved_as if isinstance(saved_as, str) else shown(saved_as)}"
        + (fitting or f"; allowed for {task}: {shortly} (`batchgen tasks {task}` lists all)")
        + f", not {task}" * bool(fitting)
    )


def _misfit(folder: Path, index: Mapping[str, Any], model: Model, family: Family) -> str | None:
    """Return why the model's parts are not those of the family, by their configurations."""
    try:
        components = components_of(folder, index, model, family)
        _check_channels(components, family)
        check_control_components(components)
        check_tiny_vae(components, family.vae)
    except ModelError as error:
        return str(error)
    return None


def _check_channels(components: list[Component], family: Family) -> None:
    """Check that the denoiser has the task's number of input channels; loading would not fail."""
    channels = latent_facts(_component(components, family.vae)).channels
    first = _reads_latents(components, family)
    allowed = [times * channels + plus for times, plus in family.channels]
    for denoiser in (
        first,
        *(component for component in components if component.name.endswith(".unet")),
    ):
        taken = whole(denoiser, "in_channels")
        if taken not in allowed:
            wanted = " or ".join(str(one) for one in allowed)
            raise ModelError(
                f"{denoiser.name} takes {taken} channels, but a {family.name} model for "
                f"{family.task} takes {wanted} (the latents of its {family.vae} have {channels}); "
                "it is a model for another task, or parts of two models are mixed"
            )
    if family.image_latent_channels not in (None, channels):
        raise ModelError(
            f"{family.vae} has {channels} latent channels; allowed for {family.task}:"
            f" {family.image_latent_channels}"
        )


def _reads_latents(components: list[Component], family: Family) -> Component:
    """Return the first component of the denoiser whose configuration has its input channels."""
    main = [one for one in family.denoiser if one not in CONTROLS]
    held = [one for name in main for one in components if one.name == name]
    for component in held:
        if "in_channels" in component.config:
            return component
    folders = ", ".join(str(one.folder) for one in held)
    raise ModelError(
        f"{', '.join(main)}: no configuration in {folders} has 'in_channels', which the denoiser "
        f"of a {family.name} model needs"
    )


def components_of(
    folder: Path, index: Mapping[str, Any], model: Model, family: Family
) -> list[Component]:
    """List every component that some stage holds, with the folder that it is loaded from.

    Raises:
        ModelError: one is missing, or ``model.components`` names one that the family does not
            take from elsewhere.
    """
    if family.needs_ip_adapter and model.ip_adapter is None:
        raise ModelError(
            f"a {family.name} model for {family.task} needs an IP-Adapter; set model.ip_adapter"
        )
    if model.ip_adapter is not None and not family.needs_ip_adapter:
        raise ModelError(
            f"model.ip_adapter: a {family.name} model for {family.task} does not support an "
            "IP-Adapter; remove it"
        )
    external = (*family.external, *(name for name in family.approximations if name == TINY_VAE))
    for name in model.components:
        if name not in external:
            allowed = ", ".join(external) or "none"
            raise ModelError(
                f"model.components.{name}: a {family.name} model for {family.task} cannot load it"
                f" from elsewhere; allowed: {allowed}"
            )
    return [
        component
        for name in (*family.components, *(one for one in (TINY_VAE,) if one in model.components))
        for component in _components(folder, index, model, family, name)
    ]


def _components(
    folder: Path, index: Mapping[str, Any], model: Model, family: Family, name: str
) -> Iterator[Component]:
    if "." in name:
        yield _inner_component(model, family, *name.split("."))
        return
    given = model.components.get(name)
    if given is not None:
        paths = [given] if isinstance(given, str) else list(given)
        for number, path in enumerate(paths):
            found = find_component(path, name, model)
            label = name if len(paths) == 1 else f"{name}.{number}"
            yield Component.from_elsewhere(name, label, found)
        return
    entry = index.get(name)
    if entry in (None, [None, None]):
        added = components_added(model).get(name)
        if added is not None and added.is_dir():
            yield Component.from_elsewhere(name, name, added)
            return
        if name in family.optional:
            return
        raise ModelError(_missing(folder, family, name))
    yield Component.from_index(folder, name, entry)


def _inner_component(model: Model, family: Family, whole: str, name: str) -> Component:
    """Read a component of a second pipeline, which is in a folder of its own."""
    path = model.components.get(whole)
    if not isinstance(path, str):
        raise ModelError(
            f"{whole}: a {family.name} model needs one; set model.components.{whole} to its folder"
        )
    folder = find_pipeline(path, whole, model, family.task)
    index, wanted = pipeline_index(folder), dict(family.pipelines)[whole]
    if index.get("_class_name") != wanted:
        raise ModelError(f"{whole}: {folder} is a {index.get('_class_name')}; allowed: {wanted}")
    component = Component.from_index(folder, name, index.get(name))
    return replace(component, name=f"{whole}.{name}", label=f"{whole}.{name}")


def _missing(folder: Path, family: Family, name: str) -> str:
    elsewhere = f"; set model.components.{name}" if name in family.external else ""
    return f"{name}: {folder / 'model_index.json'} lists no such component{elsewhere}"


def _component(components: list[Component], name: str) -> Component:
    return next(component for component in components if component.name == name)


def _native_size(components: list[Component], family: Family, factor: int) -> tuple[int, int]:
    """Return the (height, width) in pixels that the denoiser was trained for."""
    size: Any
    if isinstance(family.size, int):
        size = family.size
    else:
        name, key = family.size
        component = _component(components, name)
        size = need(component, key)
        sizes = size if isinstance(size, list) else [size]
        sides = [one * factor for one in sizes if type(one) is int]
        fits = all(MIN_SIZE <= one <= MAX_SIZE and one % MIN_SIZE == 0 for one in sides)
        if not fits or len(sides) != len(sizes) or len(sizes) not in (1, 2):
            raise ModelError(
                f"{name}: {component.folder} has {key} {shown(size)}, which gives images of "
                f"{factor} times that many pixels; allowed: {MIN_SIZE} to {MAX_SIZE} pixels, a "
                f"multiple of {MIN_SIZE}"
            )
    height, width = (size, size) if isinstance(size, int) else (sizes[0], sizes[-1])
    return height * factor, width * factor


def _class_names(index: Mapping[str, Any], components: list[Component]) -> tuple[str, ...]:
    """Read the class names, from ``id2label`` in the model's index or in its class embedding."""
    labels: Any = index.get("id2label")
    for component in components:
        labels = labels or component.config.get("id2label")
    labels = labels or {}
    for component in components:
        count = component.config.get("num_embeds_ada_norm") or component.config.get("num_classes")
        if count:
            if type(count) is not int or not 0 < count <= MOST:
                raise ModelError(
                    f"{component.name}: {component.folder} has {shown(count)} classes; allowed: a "
                    f"whole number from 1 to {MOST:,}"
                )
            return tuple(str(labels.get(str(number), "")) for number in range(count))
    raise ModelError(
        "no configuration of the model has its number of classes (num_embeds_ada_norm or "
        "num_classes)"
    )


def _recommended(folder: Path, family: Family) -> tuple[int, float]:
    path = folder / RECOMMENDED_FILE
    given = read_json(path) if path.is_file() else {}
    steps = given.get("num_inference_steps", family.recommended[0])
    guidance = given.get("guidance_scale", family.recommended[1])
    if type(steps) is not int or not 1 <= steps <= 1000:
        raise ModelError(f"{path}: num_inference_steps is {steps!r}; allowed: 1 to 1000")
    if type(guidance) not in (int, float) or not 0 <= guidance <= 100:
        raise ModelError(f"{path}: guidance_scale is {guidance!r}; allowed: 0 to 100")
    return steps, float(guidance)


def _manifest_sha256(named: Mapping[str, Path]) -> str:
    manifest = hashlib.sha256()
    for name, path in sorted(named.items()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest.update(f"{name}\x1f{path.stat().st_size}\x1f{digest}\n".encode())
    return manifest.hexdigest()
