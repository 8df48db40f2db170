"""Quantized activations: with a scale for each token a sample does not depend on its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.quantizers import PipelineQuantizationConfig

from batchgen.errors import ModelError
from batchgen.families import family_named
from batchgen.models import quantize
from batchgen.models.tiny import BUILDERS
from batchgen.spec.model import FLOAT8_MATMUL, INT8_MATMUL
from tests.added_files import build_lora, lora_call, named, pixels, plain_pixels
from tests.family_stages import FamilyStages, batch, call, check_family
from tests.model_folders import edit, refusal

pytest.importorskip("torchao")

from torchao.core.config import config_to_dict
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    PerTensor,
    quant_api,
)

TASK = "text-to-image"
PARTS = {"stable-diffusion": "unet", "flux": "transformer"}
KINDS = {INT8_MATMUL: "Int8Tensor", FLOAT8_MATMUL: "Float8Tensor"}
DTYPES = {INT8_MATMUL: "float32", FLOAT8_MATMUL: "bfloat16"}
PER_TENSOR = "a sample's pixels depend on its neighbours"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: BUILDERS[TASK, name](root / name) for name in PARTS}


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao refuses to quantize for float8 without such a GPU, but torch multiplies on a CPU."""
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)


def torchao_config(kind: str, granularity: Any) -> Any:
    makers: dict[str, Any] = {
        INT8_MATMUL: Int8DynamicActivationInt8WeightConfig,
        FLOAT8_MATMUL: Float8DynamicActivationFloat8WeightConfig,
    }
    return makers[kind](granularity=granularity)


def quantized(folder: Path, component: str, kind: str, **model: Any) -> FamilyStages:
    field = {"backend": "torchao", "components": [component], "options": {"quant_type": kind}}
    return FamilyStages(folder, TASK, quantization=field, **{"dtype": DTYPES[kind], **model})


def plain(folder: Path, component: str, kind: str) -> Any:
    mapping = {component: diffusers.TorchAoConfig(torchao_config(kind, PerRow()))}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder,
        dtype=getattr(torch, DTYPES[kind]),
        quantization_config=PipelineQuantizationConfig(quant_mapping=mapping),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PARTS)
def test_as_the_plain_pipeline_whatever_the_neighbours(
    folders: dict[str, Path], family: str, kind: str, any_device: None
) -> None:
    folder, component = folders[family], PARTS[family]
    stages = quantized(folder, component, kind)
    weights = {
        type(one.weight).__name__
        for one in getattr(stages.denoise.pipeline, component).modules()
        if isinstance(one, torch.nn.Linear)
    }
    assert KINDS[kind] in weights
    wanted = plain_pixels(plain(folder, component, kind), call())
    check_family(family_named(TASK, family), stages, batch([0, 1, 2], call()), wanted)
    others = stages.fused(batch([5, 9, 0], call())).pixels
    assert np.array_equal(others[2], wanted[0]), "other neighbours, another place"
    as_saved = FamilyStages(folder, TASK, dtype=DTYPES[kind])
    assert not np.array_equal(pixels(as_saved, call()), wanted), "8 bits are not 16 or 32"


@pytest.mark.parametrize("kind", KINDS)
def test_one_scale_for_the_micro_batch_would_depend_on_the_neighbours(
    folders: dict[str, Path], kind: str, any_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above can fail, and PerTensor is refused for what it does."""
    one_scale = torchao_config(kind, PerTensor())
    monkeypatch.setattr(quantize, "_torchao_type", lambda options: one_scale)
    stages = quantized(folders["flux"], "transformer", kind)
    first = stages.denoise(stages.encode(batch([0, 1, 2], call()))).latents[0]
    others = stages.denoise(stages.encode(batch([0, 5, 9], call()))).latents[0]
    assert not torch.equal(first, others)


def test_a_lora_on_layers_that_multiply_int8(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["stable-diffusion"]
    file = build_lora(folder, tmp_path, 1, ("to_q", "to_v"))
    stages = quantized(folder, "unet", INT8_MATMUL, **named({"a": file}))
    pipeline = plain(folder, "unet", INT8_MATMUL)
    pipeline.load_lora_weights(str(file), adapter_name="a")
    assert np.array_equal(pixels(stages, lora_call({"a": 1.0})), plain_pixels(pipeline, call()))


def test_the_kernels_are_torchs_own_and_torch_compile_is_left_alone() -> None:
    made = quantize._torchao_type({"quant_type": FLOAT8_MATMUL, "granularity": "PerRow"})
    assert made.kernel_preference.name == "TORCH"
    assert made.granularity == [PerRow(), PerRow()]
    for kind in quantize.TORCHAO_TYPES:
        assert getattr(quantize._torchao_type({"quant_type": kind}), "set_inductor_config", 0) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may work here")
def test_float8_without_such_a_gpu(folders: dict[str, Path]) -> None:
    told = "model.quantization: unet cannot be quantized on this machine: Float8 dynamic"
    with pytest.raises(ModelError, match=told):
        quantized(folders["stable-diffusion"], "unet", FLOAT8_MATMUL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_was_saved_so(
    folders: dict[str, Path], tmp_path: Path, kind: str, any_device: None
) -> None:
    saved = tmp_path / "saved"
    plain(folders["flux"], "transformer", kind).save_pretrained(saved)
    stages = FamilyStages(saved, TASK, dtype=DTYPES[kind])
    now = quantized(folders["flux"], "transformer", kind)
    assert np.array_equal(pixels(stages, call()), pixels(now, call()))


TENSOR = {"_type": "PerTensor", "_version": 1, "_data": {}}
ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
COLUMN = {"_type": "PerRow", "_version": 1, "_data": {"dim": 0}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", [TENSOR, [TENSOR, ROW], [ROW, COLUMN], None])
def test_a_checkpoint_with_another_scale(
    folders: dict[str, Path], tmp_path: Path, kind: str, granularity: Any
) -> None:
    assert config_to_dict(torchao_config(kind, PerRow()))["_data"]["granularity"] in (
        ROW,
        [ROW] * 2,
    )
    folder = BUILDERS[TASK, "stable-diffusion"](tmp_path / "copy")
    config = {"_type": kind, "_data": {"granularity": granularity}}
    saved = {"quant_method": "torchao", "quant_type": {"default": config}}
    edit(folder / "unet" / "config.json", quantization_config=saved)
    told = refusal(folder)
    assert f"was saved quantized as {kind}; allowed: with granularity PerRow" in told
    assert PER_TENSOR in told


@pytest.mark.parametrize("kind", KINDS)
def test_one_scale_is_refused_with_the_reason(folders: dict[str, Path], kind: str) -> None:
    options = {"quant_type": kind, "granularity": "PerTensor"}
    field = {"backend": "torchao", "components": ["unet"], "options": options}
    told = refusal(folders["stable-diffusion"], quantization=field)
    assert told.startswith("model.quantization.options.granularity: got 'PerTensor'; allowed:")
    assert PER_TENSOR in told
    only = {**field, "options": {"granularity": "PerRow"}}
    told = refusal(folders["stable-diffusion"], quantization=only)
    assert told.endswith("Int8WeightOnlyConfig has no such option; remove it")
