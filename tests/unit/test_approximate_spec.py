"""``sampling.approximate``: how modes are written, labelled, and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from batchgen.errors import SpecError
from batchgen.families import FAMILIES
from batchgen.plan.plan import make_plan
from batchgen.spec.approximate import METHODS, Approximate
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.spec.tree import merge
from tests.datasets_on_disk import MODEL, write_prompts
from tests.docs_pages import ROOT

MINIMAL: dict[str, Any] = {"input": {"path": "in"}, "output": {"url": "out"}}
RESULTS = ROOT / "benchmarks" / "results" / "approximate.json"


def spec_with(approximate: Any, **dotted: Any) -> Spec:
    fields = {name.replace("__", "."): value for name, value in dotted.items()}
    return build(merge(MINIMAL, {"sampling.approximate": approximate, **fields}))


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (None, ""),
        ({}, ""),
        ({"deep_cache": None, "tiny_vae": False}, ""),
        ({"deep_cache": False}, ""),
        ("deep_cache", "deep_cache cache_interval=3"),
        ({"deep_cache": {}}, "deep_cache cache_interval=3"),
        ({"deep_cache": True}, "deep_cache cache_interval=3"),
        ({"guidance_interval": [0.2, 0.8]}, "guidance_interval 0.2-0.8"),
        (
            {"mag_cache": {"mag_ratios": [1, 0.9]}, "guidance_interval": [0, 0.5]},
            "guidance_interval 0-0.5; mag_cache threshold=0.06 max_skip_steps=3 "
            "retention_ratio=0.2 mag_ratios=2 numbers",
        ),
    ],
)
def test_how_modes_are_written(given: Any, label: str) -> None:
    spec = spec_with(given)
    assert spec.sampling.approximate.label == label
    assert build(spec.model_dump()) == spec
    unset = build(MINIMAL)
    assert (spec.fingerprint == unset.fingerprint) == (not label)
    assert not any("approximate" in name for name in unset.result_fields())


@pytest.mark.parametrize(
    ("given", "field", "told"),
    [
        ("first_block_cache", "first_block_cache", "decides by a mean over the complete micro-"),
        ({"FirstBlockCache": {}}, "FirstBlockCache", "a sample would depend on its neighbours"),
        ({"sea_cache": {"threshold": 1}}, "sea_cache", "use mag_cache or taylor_seer"),
        ("TeaCache", "TeaCache", "a sample would depend on its neighbours"),
        ({"DBCache": True}, "DBCache", "a sample would depend on its neighbours"),
        ("cache-dit", "cache-dit", "a sample would depend on its neighbours"),
        ("deepcache", "deepcache", "there is no such field; allowed: guidance_interval, deep_c"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval", "the first below the second"),
        ({"guidance_interval": [0, 1]}, "guidance_interval", "but not 0 and 1"),
        ({"guidance_interval": [0.5]}, "guidance_interval.1", "a number from 0 to 1"),
        ({"guidance_interval": 0.5}, "guidance_interval", "a list of 2 numbers from 0 to 1"),
        ({"deep_cache": {"cache_interval": 1}}, "deep_cache.cache_interval", "from 2 to 100"),
        ({"mag_cache": {}, "taylor_seer": {}}, "taylor_seer", "mag_cache is set as well"),
    ],
)
def test_what_is_refused(given: Any, field: str, told: str) -> None:
    with pytest.raises(SpecError, match=re.escape(told)) as caught:
        spec_with(given)
    assert caught.value.field == f"sampling.approximate.{field}"


def test_a_tiny_autoencoder_needs_its_files_and_its_switch() -> None:
    with pytest.raises(SpecError, match=r"model\.components\.tiny_vae: got nothing; needed: the"):
        spec_with({"tiny_vae": True})
    with pytest.raises(SpecError, match="tiny_vae is false; set it to true, or remove the"):
        spec_with(None, model__components={"tiny_vae": "owner/taesd"})
    spec_with("tiny_vae", model__components={"tiny_vae": "owner/taesd"})


@pytest.mark.parametrize(
    ("approximate", "family", "scale", "told"),
    [
        ("mag_cache", "stable-diffusion", 3.0, "(supported: guidance_interval, deep_cache, tiny"),
        ("deep_cache", "flux", 3.0, "a flux model for text-to-image does not support it"),
        ("deep_cache", "sana", 3.0, "(supported: guidance_interval); remove it"),
        ("mag_cache", "qwen-image", 3.0, "mag_ratios: got nothing; needed: the ratios of this"),
        ({"guidance_interval": [0, 0.5]}, "sana", 1.0, "there is no guidance, since guidance_"),
    ],
)
def test_what_a_model_does_not_support_is_refused_while_planning(
    tmp_path: Path, approximate: Any, family: str, scale: float, told: str
) -> None:
    source = str(write_prompts(tmp_path / "in.parquet", 3))
    model = MODEL.__class__(**{**vars(MODEL), "family": family})
    spec = spec_with(approximate, input__path=source, sampling__guidance_scale=scale)
    with pytest.raises(SpecError, match=re.escape(told)):
        make_plan(spec, model)


def test_guidance_by_row_may_have_an_interval(tmp_path: Path) -> None:
    source = str(write_prompts(tmp_path / "in.parquet", 3))
    spec = spec_with(
        {"guidance_interval": [0, 0.5]},
        input__path=source,
        input__columns__guidance_scale="number",
        sampling__guidance_scale=1.0,
    )
    assert make_plan(spec, MODEL).spec.sampling.approximate.label == "guidance_interval 0-0.5"


def test_families_name_modes_that_there_are() -> None:
    assert set(METHODS) == set(Approximate.model_fields)
    for family in FAMILIES:
        assert set(family.approximations) <= set(METHODS), family
        if "guidance_interval" in family.approximations:
            assert family.guidance in ("negative", "null"), family
        assert ("deep_cache" in family.approximations) == ("unet" in family.denoiser), family


def test_the_costs_are_those_of_the_benchmark() -> None:
    """A label tells what `benchmarks/approximate.py` measured last."""
    results = json.loads(RESULTS.read_text())
    told = {name: one.measured for name, one in METHODS.items() if one.measured}
    assert told == {name: one["label"] for name, one in results["modes"].items() if "label" in one}
