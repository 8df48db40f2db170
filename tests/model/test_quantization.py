"""Quantization: equal to plain diffusers loaded the same way, or refused."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.quantizers import PipelineQuantizationConfig

from batchgen import models
from batchgen.errors import ModelError, SpecError
from batchgen.families import family_named
from batchgen.models import quantize
from batchgen.models.tiny import BUILDERS
from batchgen.models.tiny.stable_diffusion_xl import build_ensemble
from batchgen.plan.checks import check_fit
from batchgen.spec.build import build
from tests.added_files import build_lora, lora_call, named, pixels, plain_pixels
from tests.family_stages import FamilyStages, batch, call, check_family
from tests.model_folders import edit, refusal, run_python

TASK = "text-to-image"
BACKENDS = ("torchao", "quanto")
# As the layers' weights are then, of either backend.
KINDS = {"torchao": "Int8Tensor", "quanto": "WeightQBytesTensor"}
BUILT = {"stable-diffusion": ("unet", "text_encoder"), "flux": ("transformer", "text_encoder_2")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: BUILDERS[TASK, name](root / name) for name in BUILT}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["stable-diffusion"]


def need(backend: str) -> None:
    pytest.importorskip({"torchao": "torchao", "quanto": "optimum.quanto"}[backend])


def asked(backend: str, *components: str, **options: Any) -> dict[str, Any]:
    """The model's field ``quantization``."""
    field = {"backend": backend, "components": list(components), "options": options}
    return {"quantization": field}


def config(backend: str, component: str) -> Any:
    """As a user of diffusers makes it: of the library that the component is of."""
    text = component.startswith("text_encoder")
    if backend == "quanto":
        return transformers.QuantoConfig("int8") if text else diffusers.QuantoConfig("int8")
    from torchao.quantization import Int8WeightOnlyConfig

    library = transformers if text else diffusers
    return library.TorchAoConfig(Int8WeightOnlyConfig())


def plain(folder: Path, backend: str, *components: str) -> Any:
    """The whole pipeline, quantised by its own ``from_pretrained``."""
    mapping = {name: config(backend, name) for name in components}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=PipelineQuantizationConfig(quant_mapping=mapping),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def kinds(module: Any) -> set[str]:
    """Of the weights of its linear layers."""
    layers = (one for one in module.modules() if isinstance(one, torch.nn.Linear))
    return {type(one.weight).__name__ for one in layers}


@pytest.mark.parametrize(
    ("component", "stages", "refused"),
    [
        ("unet", ["encode", "denoise"], "denoise"),
        ("text_encoder", ["encode"], "encode"),
        ("text_encoder", ["denoise", "decode"], ""),
    ],
)
def test_quantized_stages_are_not_offloaded(
    folder: Path, component: str, stages: list[str], refused: str
) -> None:
    stages_of_model = FamilyStages(folder, TASK, **asked("torchao", component))
    resources = stages_of_model.spec.resources.model_copy(update={"offload": tuple(stages)})
    spec = stages_of_model.spec.model_copy(update={"resources": resources})
    if not refused:
        check_fit(spec, stages_of_model.info)
        return
    with pytest.raises(SpecError, match=f"quantizes {component}.* leave {refused} out of the list"):
        check_fit(spec, stages_of_model.info)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", BUILT)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_as_the_plain_pipeline(folders: dict[str, Path], family: str, backend: str) -> None:
    need(backend)
    folder, components = folders[family], BUILT[family]
    stages = FamilyStages(folder, TASK, **asked(backend, *components))
    wanted = plain_pixels(plain(folder, backend, *components), call())
    check_family(family_named(TASK, family), stages, batch([0, 1, 2], call()), wanted)
    denoiser = getattr(stages.denoise.pipeline, components[0])
    encoder = getattr(stages.encode.pipeline, components[1])
    assert kinds(denoiser) == {KINDS[backend]}
    assert KINDS[backend] in kinds(encoder)  # quanto leaves some layers of T5 as they are
    as_saved = FamilyStages(folder, TASK)
    for stage, other in ((stages.denoise, as_saved.denoise), (stages.encode, as_saved.encode)):
        assert models.parameter_counts(stage) == models.parameter_counts(other)
    assert not np.array_equal(pixels(as_saved, call()), wanted), "int8 is not float32"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_components_that_are_named_alone(folder: Path, backend: str) -> None:
    need(backend)
    stages = FamilyStages(folder, TASK, **asked(backend, "text_encoder"))
    assert kinds(stages.encode.pipeline.text_encoder) == {KINDS[backend]}
    assert kinds(stages.denoise.pipeline.unet) == {"Parameter"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_options_reach_the_library(folder: Path) -> None:
    need("torchao")
    options = {"quant_type": "Float8WeightOnlyConfig", "weight_dtype": "float8_e5m2"}
    skipped = {"modules_to_not_convert": ["time_embedding"]}
    unet = FamilyStages(folder, TASK, **asked("torchao", "unet", **options, **skipped))
    module = unet.denoise.pipeline.unet
    assert kinds(module) == {"Float8Tensor", "Parameter"}
    assert kinds(module.time_embedding) == {"Parameter"}
    assert module.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.qdata.dtype == (
        torch.float8_e5m2
    )
    need("quanto")
    both = asked("quanto", "unet", "text_encoder", weights_dtype="float8")
    stages = FamilyStages(folder, TASK, **both)
    for module in (stages.denoise.pipeline.unet, stages.encode.pipeline.text_encoder):
        layer: Any = next(one for one in module.modules() if isinstance(one, torch.nn.Linear))
        assert layer.weight.qtype.name == "qfloat8_e4m3fn"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_lora_on_quantised_layers(folder: Path, backend: str, tmp_path: Path) -> None:
    need(backend)
    file = build_lora(folder, tmp_path, 1, ("to_q", "to_v", "q_proj"))
    components = BUILT["stable-diffusion"]
    stages = FamilyStages(folder, TASK, **asked(backend, *components), **named({"a": file}))
    pipeline = plain(folder, backend, *components)
    without = plain_pixels(pipeline, call())
    pipeline.load_lora_weights(str(file), adapter_name="a")
    assert np.array_equal(pixels(stages, lora_call({"a": 1.0})), plain_pixels(pipeline, call()))
    assert np.array_equal(pixels(stages, lora_call({})), without)


def test_components_of_other_folders(tmp_path: Path) -> None:
    """A ControlNet that the spec brings, and the U-Net of a second pipeline."""
    need("torchao")
    control = BUILDERS["control", "controlnet"](tmp_path / "control")
    stages = FamilyStages(control, "control", **asked("torchao", "controlnet"))
    assert kinds(stages.denoise.pipeline.controlnet) == {"Int8Tensor"}
    assert kinds(stages.denoise.pipeline.unet) == {"Parameter"}
    given: dict[str, Any] = {
        "components": {"controlnet": str(shutil.move(control / "controlnet", tmp_path / "c"))}
    }
    edit(control / "model_index.json", controlnet=[None, None])
    moved = FamilyStages(control, "control", **given, **asked("torchao", "controlnet"))
    assert kinds(moved.denoise.pipeline.controlnet) == {"Int8Tensor"}
    ensemble = build_ensemble(tmp_path / "ensemble")
    refined = FamilyStages(
        ensemble,
        TASK,
        components={"refiner": str(ensemble / "refiner")},
        **asked("torchao", "refiner.unet"),
    )
    assert kinds(refined.denoise.pipeline.refiner.unet) == {"Int8Tensor"}
    assert kinds(refined.denoise.pipeline.unet) == {"Parameter"}


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was saved quantized."""
    need("torchao")
    where = tmp_path_factory.mktemp("saved") / "int8"
    plain(folder, "torchao", *BUILT["stable-diffusion"]).save_pretrained(where)
    return where


def test_a_checkpoint_that_was_saved_quantised(saved: Path, folder: Path) -> None:
    stages = FamilyStages(saved, TASK)
    assert kinds(stages.denoise.pipeline.unet) == {"Int8Tensor"}
    assert kinds(stages.encode.pipeline.text_encoder) == {"Int8Tensor"}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(saved, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(stages, call()), plain_pixels(pipeline, call()))
    now = FamilyStages(folder, TASK, **asked("torchao", *BUILT["stable-diffusion"]))
    assert np.array_equal(pixels(stages, call()), pixels(now, call()))
    told = refusal(saved, **asked("torchao", "unet"))
    assert "model.quantization.components: unet in" in told
    assert told.endswith("is quantized already; remove it from the list")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "gptq"}, "by gptq; allowed: bitsandbytes, quanto, torchao"),
        (
            {"quant_method": "quanto", "activations": "int8"},
            "quantized activations (int8); allowed: quantized weights",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
            "pixels depend on its neighbours; allowed: llm_int8_threshold: 0",
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int8StaticActivationInt8WeightConfig"}},
            },
            "as Int8StaticActivationInt8WeightConfig; allowed: Int8WeightOnlyConfig",
        ),
    ],
)
def test_a_checkpoint_that_was_saved_otherwise(
    folder: Path, tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit(copy / "unet" / "config.json", quantization_config=config)
    message = refusal(copy)
    assert message.startswith(f"unet: {copy.resolve() / 'unet'} was saved quantized")
    assert told in message


@pytest.mark.parametrize(
    ("field", "told"),
    [
        (asked("torchao", "unte"), "text_encoder, unet; did you mean 'unet'?"),
        (asked("torchao", "vae"), "got 'vae'; allowed for a stable-diffusion model"),
        (
            asked("torchao", "unet", quant_typ="x"),
            "model.quantization.options.quant_typ: not an option of torchao; allowed: quant_type,",
        ),
        (
            asked("torchao", "unet", quant_type="Int8StaticActivationInt8WeightConfig"),
            "allowed: Int8WeightOnlyConfig, Int4WeightOnlyConfig, Float8WeightOnlyConfig,",
        ),
        (
            asked("torchao", "unet", group_size=32),
            "model.quantization.options.group_size: Int8WeightOnlyConfig has no such option",
        ),
        (asked("quanto", "unet", weights_dtype="int3"), "got 'int3'; allowed: float8, int8, int4"),
        (asked("quanto", "unet", activations="int8"), "activations: not an option of quanto"),
        (
            asked("bitsandbytes_8bit", "unet"),
            "neighbours; allowed: llm_int8_threshold: 0, which turns this off",
        ),
    ],
)
def test_what_is_refused_while_planning(folder: Path, field: dict[str, Any], told: str) -> None:
    assert told in refusal(folder, **field)


@pytest.mark.parametrize(
    ("value", "field", "told"),
    [
        ({"backend": "gguf", "components": ["unet"]}, "backend", "quanto or torchao"),
        ({"backend": "quanto"}, "components", "got nothing; needed: a list of"),
        ({"backend": "quanto", "components": []}, "components", "a list of 1 or more"),
    ],
)
def test_specs_that_are_refused(value: dict[str, Any], field: str, told: str) -> None:
    base = {"input": {"path": "x"}, "output": {"url": "y"}, "model": {"quantization": value}}
    with pytest.raises(SpecError, match=re.escape(told)) as caught:
        build(base)
    assert caught.value.field == f"model.quantization.{field}"


@pytest.mark.parametrize("backend", quantize.BACKENDS)
def test_a_package_that_is_missing(
    folder: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    package = quantize.BACKENDS[backend].package
    options = {"llm_int8_threshold": 0.0} if backend == "bitsandbytes_8bit" else {}
    told = refusal(folder, **asked(backend, "unet", **options))
    wanted = f"the package {package} is not installed; run `pip install {package}`"
    assert told == f"model.quantization: {wanted}"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    bits = {f"load_in_{backend.removeprefix('bitsandbytes_')}": True}
    kind = {"default": {"_type": "Int8WeightOnlyConfig"}}
    method = {"quant_method": backend.partition("_")[0], "quant_type": kind, **bits}
    edit(copy / "text_encoder" / "config.json", quantization_config=method)
    assert refusal(copy).endswith(f"was saved quantized: {wanted}")


def test_planning_loads_no_backend(folder: Path) -> None:
    need("torchao")
    field = json.dumps(asked("torchao", "unet")["quantization"])
    code = (
        "import sys; from batchgen import models; from batchgen.spec.model import Model\n"
        f"model = Model.model_validate({{'path': {str(folder)!r}, 'quantization': {field}}})\n"
        "models.inspect(model, 'text-to-image')\n"
        "assert not {'torch', 'torchao', 'diffusers'} & set(sys.modules)\n"
    )
    done = run_python(code, {})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    torch.cuda.is_available() or find_spec("bitsandbytes") is not None, reason="it can work here"
)
@pytest.mark.parametrize(
    ("component", "bits", "told"),
    [
        ("unet", "4bit", "unet cannot be quantized on this machine"),
        ("unet", "8bit", "unet cannot be quantized on this machine: No GPU found. A GPU is needed"),
        ("text_encoder", "8bit", "text_encoder cannot be quantized on this machine"),
    ],
)
def test_bitsandbytes_without_a_gpu(
    folder: Path, component: str, bits: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU only the error can be tested: the libraries' message, with the field's name."""
    monkeypatch.setattr(quantize, "find_spec", lambda name: object())
    options = {"llm_int8_threshold": 0.0} if bits == "8bit" else {"bnb_4bit_quant_type": "nf4"}
    with pytest.raises(ModelError, match=rf"model\.quantization: {told}"):
        FamilyStages(folder, TASK, **asked(f"bitsandbytes_{bits}", component, **options))


def test_numbers_packed_in_bytes_are_counted() -> None:
    """bitsandbytes holds two numbers of 4 bits in a byte, and their shape beside them."""
    packed = torch.zeros(16, 1, dtype=torch.uint8)
    assert quantize.elements_of(packed) == 16
    packed.quant_state = SimpleNamespace(shape=torch.Size((4, 8)))  # type: ignore[attr-defined]
    assert quantize.elements_of(packed) == 32


def test_the_libraries_know_what_is_allowed() -> None:
    need("torchao")
    import torchao.quantization

    for kind in quantize.TORCHAO_TYPES:
        assert hasattr(torchao.quantization, kind)
    bits = diffusers.BitsAndBytesConfig(load_in_8bit=True).to_dict()
    for name in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        assert quantize.BACKENDS[name].options.keys() <= bits.keys()
    assert bits["llm_int8_threshold"] == 6.0, "without the option outliers are looked for"
