"""Loads the components of a stage from a checked model folder onto devices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.errors import ModelError
from batchgen.families import Family
from batchgen.models.attach import Switch, add_to_denoiser, add_to_encoder
from batchgen.models.compiling import compile_decoder, compile_denoiser
from batchgen.models.files import (
    DIFFUSERS_MODULES,
    Component,
    config_name,
    is_pickled,
    pipeline_index,
    with_tiny_vae,
)
from batchgen.models.find import FoundModel, find_model
from batchgen.models.inspection import components_of, family_for, inspect
from batchgen.models.libraries import prepare
from batchgen.models.offload import offload
from batchgen.models.place import place
from batchgen.models.quantize import elements_of, is_quantized, loading
from batchgen.models.single_file import from_single_file, load_single_file
from batchgen.models.vae_parts import drop, enable_tiling
from batchgen.models.weighting import weighted
from batchgen.records import ModelInfo
from batchgen.spec.model import Model
from batchgen.spec.spec import Spec

if TYPE_CHECKING:
    from batchgen.stages.decode import Decoder
    from batchgen.stages.denoise import Denoiser
    from batchgen.stages.encode import Encoder

CPU = ("cpu",)
COPYING = ("gligen", "latent-upscaler", "qwen-image")  # families that copy numbers in each step
META = ("meta",)  # the device of tensors without memory: stages are loaded without reading weights


class Stub:
    """Replaces a component that another stage holds: it has only a configuration and a dtype.

    It is not a torch module, so that the pipeline takes its device from the real components.
    """

    def __init__(self, config: Any, dtype: Any) -> None:
        self.config = config
        self.dtype = dtype

    def to(self, *_: Any, **__: Any) -> Stub:
        return self


def load_encoder(info: ModelInfo, spec: Spec, devices: Sequence[str] = CPU) -> Encoder:
    """Load tokenizers, text encoders and, for image tasks, the encoding half of the VAE.

    Args:
        info: the model as planned.
        spec: gives task, dtype, variant and thread count.
        devices: torch devices, such as ``cpu`` or ``cuda``; with several, the stage's largest
            model is divided over them. With ``meta`` no weights are read.

    Raises:
        ModelError: the folder cannot be reached from this machine or holds another model, or the
            devices do not have enough memory.
    """
    from batchgen.stages.encode import Encoder

    family, pipeline = _load(info, spec, "encoder", devices)
    if family.vae in family.encoder:
        drop(getattr(pipeline, family.vae), "decoder", "post_quant_conv", "quantize")
    add_to_encoder(pipeline, spec.model)
    return Encoder(
        _on(devices, pipeline, family, "encode" in spec.resources.offload),
        weighted(family.adapter, spec.model),
        spec.resources.micro_batch,
        switch=Switch(spec.model),
    )


def load_denoiser(info: ModelInfo, spec: Spec, devices: Sequence[str] = CPU) -> Denoiser:
    """Load U-Net or transformer, and scheduler, for calls of ``resources.batch_size`` samples."""
    from batchgen.stages.denoise import Denoiser

    family, pipeline = _load(info, spec, "denoiser", devices)
    add_to_denoiser(pipeline, spec.model)
    switch: Any = Switch(spec.model, pipeline.scheduler)
    pipeline.scheduler = switch.scheduler()
    pipeline = _on(devices, pipeline, family, "denoise" in spec.resources.offload)
    if spec.sampling.approximate.names:
        from batchgen.models.approximate import approximated

        switch = approximated(pipeline, spec, family, switch)
    if family.name in COPYING and spec.resources.compile is None:
        from batchgen.models.waits import models_without_waiting

        models_without_waiting(pipeline)
    compiled = compile_denoiser(pipeline, family, switch, spec.resources.compile)
    return Denoiser(pipeline, family.adapter, spec.resources.micro_batch, switch, compiled)


def load_decoder(info: ModelInfo, spec: Spec, devices: Sequence[str] = CPU) -> Decoder:
    """Load the decoding half of the VAE, for calls of ``resources.decode_size`` samples.

    Raises:
        ModelError: as ``load_encoder``, or the VAE has no tiling and the spec asks for it.
    """
    from batchgen.stages.decode import Decoder

    family, pipeline = _load(info, spec, "decoder", devices)
    vae = getattr(pipeline, family.vae)
    drop(vae, "encoder", "quant_conv")
    if spec.resources.vae_tiling:
        enable_tiling(vae)
    pipeline = _on(devices, pipeline, family, "decode" in spec.resources.offload)
    compiled = compile_decoder(pipeline, family, spec.resources.compile)
    return Decoder(pipeline, family.adapter, spec.resources.decode_size, compiled)


def parameter_counts(stage: Encoder | Denoiser | Decoder) -> dict[str, int]:
    """Count the parameters of each component of a stage that has any."""
    return _counts(vars(stage.pipeline))


def _counts(components: Mapping[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, component in components.items():
        if hasattr(component, "components"):  # a second pipeline
            inner = _counts(component.components)
            counts |= {f"{name}.{one}": count for one, count in inner.items()}
        elif hasattr(component, "parameters"):
            counts[name] = sum(elements_of(parameter) for parameter in component.parameters())
    return counts


def _on(devices: Sequence[str], pipeline: Any, family: Family, is_offloaded: bool) -> Any:
    """Move the pipeline, and any second pipelines in it, to the devices, or let it run there."""
    seconds = [getattr(pipeline, name) for name, _ in family.pipelines if hasattr(pipeline, name)]
    if is_offloaded and devices[0].startswith("cuda"):
        offload([*seconds, pipeline], family.vae, devices[0])
    else:
        place([*seconds, pipeline], devices)
    return pipeline


def _load(info: ModelInfo, spec: Spec, stage: str, devices: Sequence[str]) -> tuple[Family, Any]:
    """Load the family and a pipeline of its class with the components of one stage.

    Other components are None, or stubs if the pipeline reads their configuration. Components of
    batchgen's own classes are set as attributes, since the pipeline's class does not know them.
    """
    prepare(spec.resources.torch_threads)
    import torch

    bare = tuple(devices) == META
    found = _planned_model(info, spec.model.model_dump_json(), spec.task, bare)
    folder = found.folder
    index = pipeline_index(folder)
    family = family_for(folder, index, spec.model, spec.task)
    held: tuple[str, ...] = getattr(family, stage)
    dtype = getattr(torch, spec.model.dtype)
    own = [name for name in family.components if "." not in name]
    given: dict[str, Any] = dict.fromkeys((*own, *family.null))
    later: dict[str, Any] = {}
    components = components_of(folder, index, spec.model, family)
    if found.file is not None:
        components = from_single_file(found.file, folder, family, components)
    if stage == "decoder" and spec.sampling.approximate.tiny_vae:
        components = with_tiny_vae(components, family.vae)
    for component in components:
        if "." in component.name:
            continue  # see _second_pipelines
        if component.library == "batchgen":
            del given[component.name]
            if component.name in held:
                later[component.name] = _load_component(component, dtype, spec.model, bare)
        elif component.name in held and _comes_with(found, component, index, spec.model, bare):
            given.pop(component.name, None)  # the pipeline's class loads it
        elif component.name in held:
            _add(given, component, _load_component(component, dtype, spec.model, bare))
        elif component.name in family.stubs:
            empty = _without_weights(component, dtype)
            given[component.name] = empty
            later[component.name] = Stub(empty.config, dtype)
    given = {name: _together(one) if type(one) is list else one for name, one in given.items()}
    empty = {name: given[name] for name in later if given.get(name) is not None}
    if "safety_checker" in family.null:
        given["requires_safety_checker"] = False
    pipeline = _whole(family.pipeline, found, spec, given, later)
    for name, second in _second_pipelines(family, components, held, spec, empty, later, bare):
        setattr(pipeline, name, second)
    return family, pipeline


def _comes_with(
    found: FoundModel, component: Component, index: Mapping[str, Any], model: Model, bare: bool
) -> bool:
    """Whether the pipeline's class can load the part: it is in the usual folder and format."""
    in_place = component.folder == found.folder / component.label and index.get(component.name)
    return bool(in_place) and not _is_loaded_alone(component, model, bare)


def _is_loaded_alone(component: Component, model: Model, bare: bool) -> bool:
    return (
        _is_bare(component, bare) or is_pickled(component, model) or is_quantized(component, model)
    )


def _is_bare(component: Component, bare: bool) -> bool:
    return bare and component.weighted


def _second_pipelines(
    family: Family,
    components: list[Component],
    held: tuple[str, ...],
    spec: Spec,
    empty: Mapping[str, Any],
    stubs: Mapping[str, Any],
    bare: bool,
) -> Iterator[tuple[str, Any]]:
    """Yield name and pipeline of each second pipeline (a refiner) of which the stage has parts.

    They get the first pipeline's stubs, and its ``empty`` modules while they are loaded.
    """
    import torch

    for name, class_name in family.pipelines:
        inner = [one for one in components if one.name in held and one.name.startswith(f"{name}.")]
        if not inner:
            continue
        folder, loaded = inner[0].folder.parent, [one.name.rpartition(".")[2] for one in inner]
        known = [one for one, entry in pipeline_index(folder).items() if isinstance(entry, list)]
        given = {one: empty.get(one) for one in known if one not in loaded}
        later = {one: stubs[one] for one in empty if one in given}
        alone = [one for one in inner if _is_loaded_alone(one, spec.model, bare)]
        dtype = getattr(torch, spec.model.dtype)
        given |= {
            one.name.rpartition(".")[2]: _load_component(one, dtype, spec.model, bare)
            for one in alone
        }
        yield name, _whole(class_name, FoundModel(folder), spec, given, later)


def _whole(
    class_name: str, found: FoundModel, spec: Spec, given: dict[str, Any], later: dict[str, Any]
) -> Any:
    """Load a pipeline with a model's components, then set the components of ``later``.

    Components in ``given`` are used as they are, also None, and are not loaded.
    """
    import torch

    with warnings.catch_warnings():
        # diffusers warns about outdated scheduler files, and updates them by itself
        warnings.simplefilter("ignore", FutureWarning)
        dtype = getattr(torch, spec.model.dtype)
        if found.file is not None:
            pipeline = load_single_file(class_name, found.file, found.folder, dtype, given)
        else:
            pipeline = _from_folder(class_name, found.folder, dtype, spec.model.variant, given)
    for name, late in later.items():
        setattr(pipeline, name, late)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def _from_folder(
    class_name: str, folder: Path, dtype: Any, variant: str | None, given: Mapping[str, Any]
) -> Any:
    import diffusers

    return getattr(diffusers, class_name).from_pretrained(
        folder,
        dtype=dtype,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        **given,
    )


def _add(given: dict[str, Any], component: Component, loaded: Any) -> None:
    """Add a component; those whose label has a number (several ControlNets) become a list."""
    if component.label == component.name:
        given[component.name] = loaded
    else:
        given[component.name] = [*(given[component.name] or []), loaded]


def _together(several: list[Any]) -> Any:
    """Join several ControlNets or T2I-Adapters into the one component that a pipeline takes."""
    import diffusers

    joined = {"ControlNetModel": "MultiControlNetModel", "T2IAdapter": "MultiAdapter"}
    name = joined.get(type(several[0]).__name__)
    return several if name is None else getattr(diffusers, name)(several)


def _class_of(component: Component) -> Any:
    import diffusers
    import transformers

    from batchgen.models import own

    libraries = {"diffusers": diffusers, "transformers": transformers, "batchgen": own}
    modules = [getattr(diffusers.pipelines, name) for name in DIFFUSERS_MODULES]
    homes = (libraries[component.library], *modules)
    return next(
        getattr(one, component.class_name) for one in homes if hasattr(one, component.class_name)
    )


def _load_component(component: Component, dtype: Any, model: Model, bare: bool) -> Any:
    """Load one component from its folder; if ``bare``, without its weights."""
    if _is_bare(component, bare):
        return _without_weights(component, dtype)
    options = {"dtype": dtype, "local_files_only": True, "variant": model.variant}
    if component.library != "transformers":
        options["torch_dtype"] = options.pop("dtype")
    safe = not is_pickled(component, model)
    with loading(component, model) as quantised:
        loaded: Any = _class_of(component).from_pretrained(
            component.folder, use_safetensors=safe, **options, **quantised
        )
    return loaded


def _without_weights(component: Component, dtype: Any) -> Any:
    """Make a component from its configuration only; its weights have no memory (meta device).

    Those that ``from_pretrained`` would keep in float32 are float32 here as well.
    """
    import torch

    kind = _class_of(component)
    if component.library == "transformers":
        config = kind.config_class.from_pretrained(component.folder, local_files_only=True)
        with torch.device("meta"):
            made = kind._from_config(config, dtype=dtype)
        kept = made._keep_in_fp32_modules if dtype == torch.float16 else ()
        for name, module in made.named_modules():
            if name.rpartition(".")[2] in (kept or ()):
                module.to(torch.float32)
        return made
    with torch.device("meta"):
        made = kind.from_config(kind.load_config(component.folder / config_name(component.name)))
    return made.to(dtype)


@cache
def _planned_model(info: ModelInfo, model_json: str, task: str, bare: bool) -> FoundModel:
    """Find the planned model on this machine, which need not be the one that planned.

    Its files are hashed again, once for each process. Files of a hub commit cannot change. If
    ``bare``, nothing is hashed, and weights in a single file are left aside.
    """
    model = Model.model_validate_json(model_json)
    here = Path(info.path).exists()
    if not info.revision.startswith("sha256:"):
        if here and not model.components and not list(model.added()):
            return FoundModel(Path(info.path))
        model = model.model_copy(update={"revision": info.revision})
    elif here:
        model = model.model_copy(update={"path": info.path})
    if bare:
        return FoundModel(find_model(model, task).folder)
    found = inspect(model, task)
    if found.manifest_sha256 != info.manifest_sha256:
        raise ModelError(
            f"model {info.model_id} in {found.path} is not the planned one: the SHA-256 of its "
            f"files begins with {found.manifest_sha256[:12]}, that of the plan with "
            f"{info.manifest_sha256[:12]}; restore the planned files, or write to a new output"
        )
    return FoundModel(Path(found.path)) if model.config is None else find_model(model, task)
