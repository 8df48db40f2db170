"""The spec: what is accepted, how a mistake is named, and what the fingerprint covers."""

from __future__ import annotations

import datetime
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ValidationError

from batchgen.errors import InputError, SpecError
from batchgen.records import Call
from batchgen.spec.build import build
from batchgen.spec.call_settings import CALL_SETTINGS
from batchgen.spec.model import COUNTED_IF_SET, FREE, Model, Section, counted
from batchgen.spec.sections import Sampling
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import LABEL_PARTS, task_named
from batchgen.spec.tree import flatten, merge, read_yaml

MINIMAL: dict[str, Any] = {"input": {"path": "in.parquet"}, "output": {"url": "out"}}
IMAGES: dict[str, Any] = merge(
    MINIMAL, {"task": "image-to-image", "input.columns.image": "picture"}
)

# One other valid value for every leaf of the spec that changes what is made.
CHANGES_THE_RESULT: dict[str, Any] = {
    "input.path": "other.parquet",
    "input.uri_roots": ["s3://photos"],
    "input.uri_limit_bytes": 1000,
    "input.columns.prompt": "caption",
    "input.columns.negative_prompt": "avoid",
    "input.columns.image": "photo",
    "input.columns.class_label": "class",
    "input.columns.mask": "hole",
    "input.columns.control": ["edges", "depth"],
    "input.columns.regions": "boxes",
    "input.columns.key": "id",
    "input.columns.label": "class",
    "input.columns.split": "part",
    "input.columns.seed": "seed",
    "input.columns.num_inference_steps": "steps",
    "input.columns.guidance_scale": "guidance",
    "input.columns.strength": "strength",
    "input.columns.width": "width",
    "input.columns.height": "height",
    "input.columns.eta": "eta",
    "input.columns.image_guidance_scale": "image_guidance",
    "input.columns.noise_level": "noise",
    "input.columns.control_scale": "control_weight",
    "input.columns.image_prompt_scale": "image_weight",
    "input.columns.scheduler": "scheduler",
    "input.columns.lora": "style",
    "input.columns.objects": "annotations",
    "input.columns.label_mask": "segmentation",
    "input.columns.new_category": "becomes",
    "input.columns.image_width": "photo_width",
    "input.columns.image_height": "photo_height",
    "input.count": 9,
    "input.keep_columns": ["a", "b"],
    "input.limit": 5,
    "input.splits": ["train"],
    "task": "text-to-image",
    "model.path": "owner/model",
    "model.revision": "main",
    "model.variant": "fp16",
    "model.config": "owner/model",
    "model.allow_pickle": True,
    "model.dtype": "bfloat16",
    "model.scheduler": "DDIMScheduler",
    "model.loras": [{"name": "ink", "path": "ink.safetensors"}],
    "model.textual_inversions": [{"path": "cat.safetensors", "token": "<cat>"}],
    "model.ip_adapter": {"path": "owner/adapter"},
    "model.quantization": {"backend": "torchao", "components": ["unet"]},
    "model.prompt_weighting": "compel",
    "sampling.num_inference_steps": 7,
    "sampling.guidance_scale": 2.5,
    "sampling.strength": 0.3,
    "sampling.width": 64,
    "sampling.height": 72,
    "sampling.negative_prompt": "blurry",
    "sampling.eta": 0.5,
    "sampling.image_guidance_scale": 2.0,
    "sampling.noise_level": 30,
    "sampling.control_scale": 0.5,
    "sampling.image_prompt_scale": 0.5,
    "sampling.denoising_end": 0.7,
    "sampling.lora": "",
    "sampling.approximate.guidance_interval": [0.2, 0.8],
    "sampling.approximate.deep_cache": {"cache_interval": 3},
    "sampling.approximate.mag_cache": {"threshold": 0.1},
    "sampling.approximate.taylor_seer": {"max_order": 2},
    "sampling.approximate.tiny_vae": True,
    "conditioning.resize": "stretch",
    "labels.objects_format": "yolo",
    "labels.orientation": "stored",
    "labels.categories": [{"name": "cat"}],
    "labels.mask_classes": [{"name": "background"}, {"name": "cat"}],
    "labels.min_visibility": 0.3,
    "labels.max_strength": 0.4,
    "labels.max_repainted": 0.2,
    "labels.are": "kept",
    "labels.ignored_class": 0,
    "score": [{"scorer": "phash"}],
    "variants": 3,
    "seed": 11,
    "output.format": "webdataset",
    "output.samples_per_shard": 10,
    "output.image_format": "webp",
    "output.image_quality": 80,
    "output.jpeg_subsampling": "4:2:0",
    "output.provenance": "xmp",
    "output.signed": True,
    "resources.batch_size": 4,
    "resources.decode_batch_size": 2,
    "resources.vae_tiling": True,
    "resources.compile": "full",
    "resources.torch_threads": 2,
    "policy.reject_flat": False,
    "policy.reject_blank": True,
    "policy.reject_dark": True,
    "policy.reject_blurred": True,
    "policy.nsfw": "reject",
}
# Mappings, which are empty by default: one entry each changes what is made.
ENTRIES: dict[str, Any] = {
    "model.components": {"vae": "owner/vae"},
    "model.scheduler_options": {"use_karras_sigmas": True},
    "conditioning.make": {"image": "canny"},
    "labels.source": {"licenses": []},
}
ONLY_IN = {  # parts of a row that some tasks alone take
    "unconditional": ("input.count",),
    "class-conditional": ("class_label",),
    "inpainting": ("mask",),
    "control": ("control", "regions", "control_scale"),
    "image-edit": ("image_guidance_scale",),
    "super-resolution": ("noise_level",),
    "variation": ("image_prompt_scale",),
}
# Where and how the work is done, and when it stops: free to differ on resume.
# Fields that earlier versions lacked: at their default they are not in the fingerprint.
NOT_COUNTED_UNSET = {
    "score",
    *("policy.reject_blank", "policy.reject_dark", "policy.reject_blurred", "policy.nsfw"),
    "input.columns.split",
    "input.splits",
    "output.provenance",
    "output.signed",
    "resources.decode_batch_size",
    "resources.vae_tiling",
    "resources.compile",
    *(
        one
        for one in CHANGES_THE_RESULT
        if one.startswith(("sampling.approximate.", "labels."))
        or one.removeprefix("input.columns.") in LABEL_PARTS
    ),
}
KEEPS_THE_RESULT: dict[str, Any] = {
    "input.check_keys": False,
    "input.uri_timeout_s": 5.0,
    "input.image_limit_pixels": 1_000_000,
    "output.url": "elsewhere",
    "output.license": "cc-by-4.0",
    "resources.layout": "staged",
    "resources.shards_in_flight": 3,
    "resources.offload": ["encode", "denoise"],
    **{
        f"resources.{pool}.{field}": value
        for pool in ("generate", "encode", "denoise", "decode")
        for field, value in (
            ("min_replicas", 2),
            ("max_replicas", 5),
            ("num_cpus", 0.5),
            ("num_gpus", 0.25),
            ("accelerator_type", "L40S"),
            ("stuck_after_s", 60.0),
        )
    },
    "policy.failed_limit": 0.2,
    "policy.rejected_limit": 0.9,
    "policy.shard_retries": 7,
    "policy.remake": {"reasons": ["flat-image"]},
    "quota": {"accepted": 5},
    "storage.connect_timeout_s": 2.5,
    "storage.read_timeout_s": 60.0,
    "storage.patience_s": 10.0,
    "storage.connections": 64,
    "storage.part_bytes": 8 << 20,
}


def base_for(field: str) -> dict[str, Any]:
    """A valid spec in which the field may be changed alone."""
    if field in ("task", "input.columns.image", "conditioning.resize") or "strength" in field:
        return IMAGES
    if field == "input.columns.lora":
        return merge(MINIMAL, {"model.loras": CHANGES_THE_RESULT["model.loras"]})
    if field in ("output.image_quality", "output.jpeg_subsampling"):
        return merge(MINIMAL, {"output.image_format": "jpeg"})
    if field in ("policy.reject_blank", "policy.reject_dark", "policy.reject_blurred"):
        return merge(MINIMAL, {"score": ["quality"]})
    if field == "policy.nsfw":
        return merge(MINIMAL, {"score": ["nsfw"]})
    for task, parts in ONLY_IN.items():
        if field.removeprefix("input.columns.").removeprefix("sampling.") in parts:
            needs = {f"input.columns.{part}": part for part in task_named(task).needs}
            return merge(MINIMAL, {"task": task, **needs})
    return MINIMAL


def changed(field: str, value: Any) -> tuple[Spec, Spec]:
    base = base_for(field)
    other = {field: value}
    if field == "input.count":
        other["input.path"] = ""
    if field == "sampling.approximate.tiny_vae":
        other["model.components"] = {"tiny_vae": "owner/taesd"}
    if field == "task":  # text-to-image takes no image column
        base = merge(IMAGES, {})
        other["input.columns.image"] = None
    return build(base), build(merge(base, other))


def test_every_field_is_known_to_change_the_result_or_not() -> None:
    leaves = set(flatten(build(MINIMAL).model_dump(mode="json")))
    assert leaves == CHANGES_THE_RESULT.keys() | KEEPS_THE_RESULT.keys()
    assert set(build(MINIMAL).result_fields()) == CHANGES_THE_RESULT.keys() - NOT_COUNTED_UNSET


def test_a_new_field_is_counted_unless_it_is_marked() -> None:
    class Inner(Section):
        counts: int = 1
        free: Annotated[int, FREE] = 2
        later: Annotated[int | None, COUNTED_IF_SET] = None

    class Outer(Section):
        inner: Inner = Inner()
        whole: Annotated[Inner, FREE] = Inner()

    assert counted(Outer, Outer().model_dump()) == {"inner": {"counts": 1}}
    assert counted(Outer, Outer(inner=Inner(later=5)).model_dump()) == {
        "inner": {"counts": 1, "later": 5}
    }
    assert counted(Outer, {"unknown": 3, "inner": {"unknown": 4}}) == {
        "unknown": 3,
        "inner": {"unknown": 4},
    }


def documented() -> dict[str, bool]:
    """Every field in the table of docs/spec.md -> whether it is marked as changing the images."""
    page = (Path(__file__).parents[2] / "docs" / "spec.md").read_text()
    found: dict[str, bool] = {}
    for line in page.splitlines():
        if not line.startswith(("| `", "| ● `")):
            continue
        cell = line.split("|")[1]
        section = ""
        for name in re.findall(r"`([^`]+)`", cell):
            if not name.startswith("."):
                section = name.rpartition(".")[0]
            whole = name if not name.startswith(".") else section + name
            found[whole] = "●" in cell
    return found


def test_the_page_marks_the_fields_that_change_the_images() -> None:
    told = documented()
    pools = {f"resources.{pool}" for pool in ("generate", "encode", "denoise", "decode")}
    for field in CHANGES_THE_RESULT.keys() | KEEPS_THE_RESULT.keys():
        section, _, last = field.rpartition(".")
        names = (field, f"{section}.*", f".{last}" if section in pools else field)
        marks = {told[name] for name in names if name in told}
        assert marks == {field in CHANGES_THE_RESULT}, field


@pytest.mark.parametrize("field", CHANGES_THE_RESULT)
def test_fingerprint_changes_with_result_fields(field: str) -> None:
    before, after = changed(field, CHANGES_THE_RESULT[field])
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize("field", KEEPS_THE_RESULT)
def test_fingerprint_stays_with_other_fields(field: str) -> None:
    before, after = changed(field, KEEPS_THE_RESULT[field])
    assert before != after
    assert before.fingerprint == after.fingerprint


@pytest.mark.parametrize("field", ENTRIES)
def test_fingerprint_changes_with_entries(field: str) -> None:
    other = build(merge(IMAGES, {field: ENTRIES[field]}))
    assert other.fingerprint != build(IMAGES).fingerprint
    assert other.model_dump(mode="json") == build(other.model_dump(mode="json")).model_dump(
        mode="json"
    )


def test_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    tree = merge(MINIMAL, {"sampling.width": 64, "sampling.height": 72, "seed": 3})
    backwards = {key: tree[key] for key in reversed(tree)}
    backwards["sampling"] = dict(reversed(tree["sampling"].items()))
    assert build(backwards).fingerprint == build(tree).fingerprint


WRONG = [
    ("variants", 0, "a whole number from 1 to 1,000,000"),
    ("variants", "many", "a whole number from 1 to 1,000,000"),
    ("variants", 1.5, "a whole number from 1 to 1,000,000"),
    ("seed", -1, "a whole number of 0 or more and below 9,223,372,036,854,775,808"),
    ("seed", 2**63, "below 9,223,372,036,854,775,808"),
    ("task", "text-to-video", "text-to-image, image-to-image, inpainting"),
    ("model.dtype", "fp16", "auto, float32, float16 or bfloat16"),
    ("sampling.num_inference_steps", 0, "a whole number from 1 to 1,000"),
    ("sampling.guidance_scale", -0.5, "a number from 0 to 100"),
    ("sampling.guidance_scale", float("nan"), "a number from 0 to 100"),
    ("sampling.strength", 0.0, "a number above 0 and up to 1"),
    ("sampling.strength", 1.01, "a number above 0 and up to 1"),
    ("sampling.width", 60, "a whole number from 8 to 4,096, a multiple of 8"),
    ("sampling.height", 8192, "a whole number from 8 to 4,096, a multiple of 8"),
    ("input.limit", 0, "a whole number of 1 or more"),
    ("input.keep_columns", "prompt", "a list of text"),
    ("output.samples_per_shard", 0, "a whole number from 1 to 100,000"),
    ("output.image_format", "gif", "png, jpeg or webp"),
    ("output.image_quality", 101, "a whole number from 1 to 100"),
    ("resources.layout", "pipelined", "fused or staged"),
    ("resources.batch_size", 0, "a whole number from 1 to 1,024"),
    ("resources.generate.num_cpus", 0, "a number above 0"),
    ("policy.failed_limit", 1.5, "a number from 0 to 1"),
    ("policy.shard_retries", -1, "a whole number from 0 to 100"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, {field: value}))
    assert caught.value.field == field
    assert caught.value.given == value or value != value  # NaN is not equal to itself
    assert allowed in caught.value.allowed
    assert str(caught.value) == f"{field}: got {value!r}; allowed: {caught.value.allowed}"


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("sampeling", "sampling"),
        ("input.colums", "columns"),
        ("input.columns.promt", "prompt"),
        ("model.schedular", "scheduler"),
        ("sampling.num_inference_step", "num_inference_steps"),
        ("output.samples_per_shards", "samples_per_shard"),
        ("resources.generate.max_replica", "max_replicas"),
        ("policy.shard_retry", "shard_retries"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(misspelt: str, meant: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, {misspelt: "x"}))
    assert caught.value.field == misspelt
    assert caught.value.allowed.endswith(f"did you mean {meant!r}?")


def test_an_unknown_key_far_from_all_lists_what_is_allowed() -> None:
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, {"model.zzzzqqq": 1}))
    assert caught.value.allowed == ", ".join(Model.model_fields)


@pytest.mark.parametrize(
    ("tree", "field", "flag"),
    [
        ({"output": {"url": "out"}}, "input", "--input"),
        ({"input": {}, "output": {"url": "out"}}, "input.path", "--input"),
        ({"input": {"path": "in"}}, "output", "--output"),
    ],
)
def test_a_missing_field_names_its_flag(tree: dict[str, Any], field: str, flag: str) -> None:
    with pytest.raises(SpecError, match="got nothing; needed: ") as caught:
        build(tree)
    assert caught.value.field == field
    assert flag in caught.value.allowed


@pytest.mark.parametrize(
    ("dotted", "field", "given"),
    [
        ({"task": "image-to-image"}, "input.columns.image", None),
        ({"input.columns.image": "photo"}, "input.columns.image", "photo"),
        ({"input.columns.strength": "s"}, "input.columns.strength", "s"),
        ({"input.columns.prompt": None}, "input.columns.prompt", None),
    ],
)
def test_columns_have_to_fit_the_task(dotted: dict[str, Any], field: str, given: Any) -> None:
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, dotted))
    assert (caught.value.field, caught.value.given) == (field, given)
    assert "-to-image" in caught.value.allowed


def test_a_setting_of_a_call_is_forgotten_nowhere() -> None:
    """Every setting is in ``Sampling``, in ``Columns`` and in ``Call``."""
    carried = {one.name for one in fields(Call)}
    by_row = {one.name for one in CALL_SETTINGS.values() if one.by_row}
    assert carried == CALL_SETTINGS.keys() | {"scheduler", "lora", "regions"}
    assert CALL_SETTINGS.keys() - by_row == {"denoising_end"}
    assert all(one.about for one in CALL_SETTINGS.values())


def test_fewer_replicas_at_most_than_at_least() -> None:
    with pytest.raises(SpecError) as caught:
        build(
            merge(MINIMAL, {"resources.decode.min_replicas": 3, "resources.decode.max_replicas": 2})
        )
    assert caught.value.field == "resources.decode"
    assert caught.value.given == {"min_replicas": 3, "max_replicas": 2}
    assert caught.value.allowed == "max_replicas (2) of at least min_replicas (3)"


def test_the_decoder_takes_no_more_than_a_micro_batch() -> None:
    sizes = {"resources.batch_size": 4, "resources.decode_batch_size": 8}
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, sizes))
    assert caught.value.allowed == "decode_batch_size (8) of at most batch_size (4)"
    fits = build(merge(MINIMAL, {**sizes, "resources.decode_batch_size": 4}))
    assert (build(MINIMAL).resources.decode_size, fits.resources.decode_size) == (8, 4)


def test_a_replica_takes_a_share_of_a_gpu_or_whole_ones() -> None:
    for given in (0, 0.25, 1, 2, 8):
        spec = build(merge(MINIMAL, {"resources.denoise.num_gpus": given}))
        assert spec.resources.denoise.num_gpus == given
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, {"resources.denoise.num_gpus": 1.5}))
    assert (caught.value.field, caught.value.given) == ("resources.denoise.num_gpus", 1.5)
    assert caught.value.allowed == "a fraction of one GPU (up to 1), or a whole number of GPUs"


def test_image_to_image_may_go_without_prompts() -> None:
    spec = build(merge(IMAGES, {"input.columns.prompt": None, "task": "image_to_image"}))
    assert spec.task == "image-to-image"
    assert spec.input.columns.mapped() == {"image": "picture"}


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ("output.url", ""),
        ("output.url", " "),
        ("output.url", "s3://bucket/a::b"),
        ("output.url", "out/a::b"),
        ("input.path", "zip://p.parquet::archive.zip"),
        ("input.path", "s3://bucket/a::b"),
    ],
)
def test_a_place_that_is_none_is_refused(field: str, place: str) -> None:
    with pytest.raises(SpecError, match=r"a folder or a URL|'::'") as caught:
        build(merge(MINIMAL, {field: place}))
    assert caught.value.field == field


@pytest.mark.parametrize("name", [1, 2024, datetime.date(2024, 1, 1), True, None])
@pytest.mark.parametrize("within", [(), ("s3",), ("s3", "client_kwargs")])
def test_names_of_options_are_text(within: tuple[str, ...], name: Any) -> None:
    options: dict[Any, Any] = {name: {"a": 1} if not within else 1}
    for outer in reversed(within):
        options = {outer: options}
    with pytest.raises(SpecError, match="text as option names") as caught:
        build({**MINIMAL, "storage_options": options})
    assert caught.value.field == ".".join(("storage_options", *within))


def test_flags_win_over_the_file_and_leave_it_unchanged() -> None:
    tree = {**MINIMAL, "sampling": {"guidance_scale": 2.0, "width": 64}, "seed": 1}
    merged = merge(tree, {"sampling.guidance_scale": 9.0, "policy.shard_retries": 4})
    spec = build(merged)
    assert (spec.sampling.guidance_scale, spec.sampling.width, spec.seed) == (9.0, 64, 1)
    assert spec.policy.shard_retries == 4
    assert tree["sampling"]["guidance_scale"] == 2.0
    assert "policy" not in tree


def test_a_value_cannot_be_used_as_a_section() -> None:
    with pytest.raises(SpecError) as caught:
        merge(MINIMAL, {"input.path.name": "x"})
    assert (caught.value.field, caught.value.given) == ("input.path", "in.parquet")


def sections(spec: Spec) -> list[BaseModel]:
    found: list[BaseModel] = [spec]
    for section in found:
        found += [value for _, value in section if isinstance(value, BaseModel)]
    return found


def test_every_section_is_frozen() -> None:
    for section in sections(build(MINIMAL)):
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))


@pytest.mark.parametrize("field", [*CHANGES_THE_RESULT, *KEEPS_THE_RESULT])
def test_yaml_round_trip(field: str, tmp_path: Path) -> None:
    _, spec = changed(field, {**CHANGES_THE_RESULT, **KEEPS_THE_RESULT}[field])
    path = tmp_path / "job.yaml"
    path.write_text(spec.to_yaml())
    again = build(read_yaml(str(path)))
    assert again == spec
    assert again.fingerprint == spec.fingerprint


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "No such file"),
        (b"input: [", "line 1"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- a\n- b\n", "sections"),
        (b"", "sections"),
    ],
)
def test_an_unreadable_file_is_named(content: bytes | None, word: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=word) as caught:
        read_yaml(str(path))
    assert str(path) in str(caught.value)


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("input: {path: a}\noutput: {url: b}\nsampling:\n")
    assert build(read_yaml(str(path))).sampling == Sampling()


@pytest.mark.parametrize(
    "field", ["input.path", "output.url", "model.path", "model.config", "model.components.vae"]
)
@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hunter2@bucket/x",
        "https://host/x?X-Amz-Signature=hunter2&X-Amz-Expires=3",
        "https://host/x?version=3&token=hunter2",
        "https://account.blob.core.windows.net/x?sv=2024&sig=hunter2",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(field: str, url: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, {field: url}))
    assert caught.value.field == field and "hunter2" not in str(caught.value)
