"""All mistakes in a spec are reported at once, in plain English, before any work."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from batchgen.cli import FIELDS, main
from batchgen.cli.options import DEMO, DTYPES, IMAGE_FORMATS, LAYOUTS
from batchgen.errors import BatchgenError, InputError, SpecError
from batchgen.output.ledger import JOB, Ledger
from batchgen.spec.build import build, stored
from batchgen.spec.checks import _ineffective
from batchgen.spec.faults import FLAGS
from batchgen.spec.model import Model, OnlyWith, Section
from batchgen.spec.sections import Output, Resources
from batchgen.spec.spec import Spec
from batchgen.spec.tree import flatten, merge
from batchgen.spec.yaml_text import parse_yaml
from batchgen.storage import open_store
from tests.fuzzing import fuzz

MINIMAL: dict[str, Any] = {"input": {"path": "in.parquet"}, "output": {"url": "out"}}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
PYDANTICS = re.compile(
    "instance of|valid (tuple|dictionary|string|integer)|Input should|greater than or equal"
)


def said(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        build(tree)
    assert not PYDANTICS.search(str(caught.value))
    return str(caught.value).splitlines()


def plan(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of `batchgen plan`."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    return int(ended.value.code or 0), capsys.readouterr().err


def test_all_faults_are_told_at_once() -> None:
    wrong = {
        **{"sampling.width": 60, "seed": "x", "variants": 0, "polcy": 1, "task": "inpainting"},
        **{"model.loras": "ink.safetensors", "sampling.noise_level": 3},
    }
    fields = [re.split(": | is set", line.strip())[0] for line in said(merge(MINIMAL, wrong))]
    columns = ["input.columns.image", "input.columns.mask"]
    assert sorted(fields) == sorted([*(wrong.keys() - {"task"}), *columns])


def test_a_wrong_task_is_told_without_what_would_follow_from_another() -> None:
    wrong = merge(MINIMAL, {"task": "impainting", "input.columns.mask": "m", "seed": -1})
    fields = [line.strip().partition(":")[0] for line in said(wrong)]
    assert fields == ["task", "seed"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.loras", "/x/lora", "allowed: a list of sections of path, weight"),
        ("input", 5, "got a number; allowed: a section of path, count,"),
        (
            "input",
            None,
            "got nothing; needed: a Parquet file, a folder of them, a glob or a URL",
        ),
        ("output", None, "got nothing; needed: a folder or a URL (flag --output)"),
        (
            "sampling.control_scale",
            [1, "x"],
            "a number from 0 to 10 or a list of numbers from",
        ),
        ("model.quantization.components", [], "a list of 1 or more, text"),
        ("resources.generate.resources", {"big": 0}, "a number above 0"),
        ("policy.reject_flat", "perhaps", "true or false"),
        (
            "conditioning.make",
            {"image": {"name": "canny", "foo": 1}},
            "no such field; allowed: n",
        ),
        ("input.path", "x\0", "contains bytes that are not UTF-8, or NUL"),
        ("input.path", "\udcff.parquet", "not UTF-8"),
    ],
)
def test_what_is_allowed_is_said_in_plain_english(field: str, value: Any, words: str) -> None:
    assert words in "\n".join(said(merge(MINIMAL, {field: value})))


def test_plain_texts_stand_for_sections_and_flags_still_win(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("input: in.parquet\nmodel: owner/name\noutput: s3://bucket/x\n")
    tree = merge(parse_yaml(path.read_bytes(), "x"), {"input.limit": 3, "model.dtype": "float16"})
    spec = build(tree)
    assert (spec.input.path, spec.input.limit) == ("in.parquet", 3)
    assert (spec.model.path, spec.model.dtype, spec.output.url) == (
        *("owner/name", "float16", "s3://bucket/x"),
    )
    assert build(merge(tree, {"model": "other/name"})).model.dtype == "float16"


def test_a_forgotten_task_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(merge(MINIMAL, {"input.columns.image": "image"}))
    assert "text-to-image uses no image; remove it, or use --task image-to-image" in line
    both = merge(MINIMAL, {"input.columns.image": "image", "input.columns.mask": "mask"})
    assert all("or use --task inpainting" in line for line in said(both))


IDLE = {
    "sampling.strength": 0.5,
    "sampling.control_scale": 0.5,
    "sampling.noise_level": 5,
    "sampling.image_guidance_scale": 2.0,
    "sampling.image_prompt_scale": 0.5,
    "conditioning.resize": "fit",
}


@pytest.mark.parametrize("field", IDLE)
def test_settings_without_effect_are_refused(field: str) -> None:
    (line,) = said(merge(MINIMAL, {field: IDLE[field]}))
    assert line.startswith(f"{field} is set to ") and "text-to-image uses no" in line
    assert "remove it, or use a task that does (" in line
    default = flatten(build(MINIMAL).model_dump())[field]
    build(merge(MINIMAL, {field: default}))  # as in every job.yaml


@pytest.mark.parametrize(
    ("dotted", "fitting"),
    [
        ({"output.image_quality": 80}, "jpeg or webp"),
        ({"output.jpeg_subsampling": "4:2:0"}, "jpeg"),
        ({"output.jpeg_subsampling": "4:2:0", "output.image_format": "webp"}, "jpeg"),
    ],
)
def test_fields_of_other_image_formats_are_refused(dotted: dict[str, Any], fitting: str) -> None:
    (line,) = said(merge(MINIMAL, dotted))
    kind = dotted.get("output.image_format", "png")
    assert line.endswith(
        f"output.image_format is {kind}; remove it, or set image_format to {fitting}"
    )
    build(merge(MINIMAL, dotted | {"output.image_format": "jpeg"}))


@pytest.mark.parametrize(
    ("dotted", "words"),
    [
        ({"resources.offload": "encode"}, "a list"),
        ({"resources.offload": ["unet"]}, "allowed: encode, denoise or decode"),
        ({"resources.offload": ["encode", "encode"]}, "each stage at most once"),
        (
            {"resources.offload": ["denoise"], "resources.generate.num_gpus": 2},
            "resources.generate.num_gpus is 2, which divides the largest model of denoise",
        ),
        (
            {
                "resources.layout": "staged",
                "resources.offload": ["encode", "denoise"],
                "resources.denoise.num_gpus": 2,
            },
            "resources.denoise.num_gpus is 2, which divides the largest model of denoise",
        ),
        (
            {"resources.offload": ["encode"], "model.prompt_weighting": "compel"},
            "model.prompt_weighting is compel, which would compute on the CPU then; remove it",
        ),
        (
            {"resources.offload": ["denoise"], "sampling.approximate": {"deep_cache": {}}},
            "but sampling.approximate.deep_cache was not tested with it; remove one of the two",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_said(dotted: dict[str, Any], words: str) -> None:
    (line,) = said(merge(MINIMAL, dotted))
    assert line.startswith("resources.offload") and words in line


def test_a_stage_is_offloaded_next_to_one_on_several_gpus() -> None:
    build(
        merge(
            MINIMAL,
            {
                "resources.layout": "staged",
                "resources.offload": ["encode"],
                "resources.denoise.num_gpus": 2,
                "resources.generate.num_gpus": 2,  # that of the other layout
            },
        )
    )


def test_a_mark_at_a_field_is_all_that_its_check_needs() -> None:
    class Shape(Section):
        kind: Literal["round", "square"] = "round"
        side: Annotated[int, Field(ge=1), OnlyWith("kind", ("square",))] = 1

    assert list(_ineffective(Shape(kind="square", side=2), "shape")) == []
    assert list(_ineffective(Shape(side=1), "shape")) == []
    (fault,) = _ineffective(Shape(side=2), "shape")
    assert (fault.field, fault.given, fault.allowed) == ("shape.side", 2, "with shape.kind square")
    with pytest.raises(ValidationError):
        Shape(side=0)


@pytest.mark.parametrize("field", [*IDLE, "input.path", "storage_options"])
def test_what_an_older_output_holds_is_read_as_it_is(field: str, tmp_path: Path) -> None:
    held = {"input.path": "https://h/x?code=abc", "storage_options": {"s3": {"secret": "abc"}}}
    tree = merge(MINIMAL, {field: {**IDLE, **held}[field]})
    with pytest.raises(SpecError):
        build(tree)
    store = open_store(str(tmp_path))
    store.put(JOB, yaml.safe_dump(tree).encode())
    assert Ledger(store).job() == stored(tree)


def test_a_missing_column_names_the_flag_and_those_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"prompt": ["x"], "photo": [b"y"]}), tmp_path / "in.parquet")
    source = str(tmp_path / "in.parquet")
    code, err = plan(["--input", source, "--output", "o", "--task", "image-to-image"], capsys)
    assert code == 1 and "a column, for image-to-image (flag --image-column)" in err
    assert f"the columns of {source}: prompt, photo" in err


def test_the_demo_model_is_named_where_none_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "in.parquet")
    words = ["--input", str(tmp_path / "in.parquet"), "--output", "o"]
    assert plan(words, capsys) == (0, DEMO + "\n")
    assert plan([*words, "--model", "digits-shapes"], capsys) == (0, "")


def test_flags_are_those_of_the_command_line_and_offer_what_the_spec_takes() -> None:
    by_field = {field: flag for flag, (field, _, _) in FIELDS.items()}
    sections = {"input": "input.path", "output": "output.url"}
    assert {by_field[sections.get(field, field)] for field in FLAGS} == set(FLAGS.values())
    assert get_args(Model.model_fields["dtype"].annotation) == DTYPES
    assert get_args(Output.model_fields["image_format"].annotation) == IMAGE_FORMATS
    assert get_args(Resources.model_fields["layout"].annotation) == LAYOUTS


@pytest.mark.parametrize(
    "text",
    [
        *("2024-13-45", "2024-01-01", "0x_", "0b", "1" * 5000, "1e", "=", "<<", "!!bool maybe"),
        *("[" * 500, "[" * 33 + "]" * 33, "a: &a [*a]", "&x {a: *x}", BOMB, "{[a]: 1}", "? {a: 1}"),
        *(
            "a: 1\na: 2",
            "x: *y",
            "!!python/object:os.system x",
            "!!timestamp 2024",
            "\x00",
            '"\\ud800"',
        ),
        *("{1: 2}", "2024-01-01: x", "<<: 5", "a: {<<: [1]}", "---\na\n---\nb", "x" * (300 << 10)),
        *("\x00", "0x" + "F" * 5000),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_no_yaml_is_a_traceback_or_takes_long(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.process_time()
    for field in ("sampling.negative_prompt", "seed", "storage_options.s3", "input.limit"):
        code, err = plan(["--set", f"{field}={text}", "--input", "none", "--output", "o"], capsys)
        assert code == 1 and "Traceback" not in err
    (tmp_path / "job.yaml").write_text(text, errors="surrogatepass")
    code, err = plan([str(tmp_path / "job.yaml")], capsys)
    assert code == 1 and len(err) < 2000
    assert time.process_time() - begun < 5


def test_texts_that_look_like_dates_stay_texts() -> None:
    assert parse_yaml("2024-01-01", "x") == "2024-01-01"
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}", "x")["c"] == {"b": 1, "d": 2}


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(InputError, match="line 2, column 1: the same name twice"):
        parse_yaml("input: a\ninput: b\n", "x")


LEAVES = [*flatten(build(MINIMAL).model_dump()), "input", "model", "output", "model.components"]
scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    st.sampled_from([2**70, -1, 0, 1 << 4000, "\0", "\udcff", "", "x" * 5000, "${X}", "s3://a::b"]),
    st.sampled_from(["~nobody/x", "/dev/null", "..", "ftp://127.0.0.1:9/x", "a/b", "inf"]),
)
hostile = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@fuzz()
@given(st.dictionaries(st.sampled_from([*LEAVES, "storage_options.s3.x"]), hostile, max_size=4))
def test_no_value_of_a_field_is_a_traceback(values: dict[str, Any]) -> None:
    try:
        spec = build(merge(MINIMAL, values))
    except BatchgenError as error:
        assert not PYDANTICS.search(str(error)) and len(str(error)) < 20_000
    else:
        again = Spec.model_validate(parse_yaml(spec.to_yaml(), "job.yaml"))
        assert again.fingerprint == spec.fingerprint


yamls = st.one_of(
    st.text(max_size=30),
    st.text("[]{}:,&*!<>|-?'\"#%@`=~ \n01.exob_ab", max_size=30),
    st.integers().map(str),
    st.dates().map(str),
)


@fuzz()
@given(st.one_of(st.sampled_from(LEAVES), st.text("abc._", max_size=9)), yamls)
def test_no_text_behind_set_is_a_traceback(field: str, text: str) -> None:
    try:
        build(merge(MINIMAL, {field: parse_yaml(text, f"--set {field}")}))
    except BatchgenError as error:
        assert not PYDANTICS.search(str(error))


COMPILED: dict[str, Any] = {"resources.compile": "full"}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("input.columns.width", "w", "is set to 'w', but resources.compile compiles for one width"),
        ("input.columns.height", "h", "resources.compile compiles for one height; remove one of"),
        ("conditioning.resize", "multiple-of", "resources.compile compiles for one size of images"),
        ("resources.generate.num_gpus", 2, "divided over several GPUs cannot be compiled"),
        ("resources.offload", ["decode"], "does not compile weights that move; remove decode"),
        ("sampling.approximate.deep_cache", {}, "changes code that resources.compile compiles"),
    ],
)
def test_what_cannot_be_compiled_is_refused(field: str, value: object, words: str) -> None:
    image = {"task": "image-to-image", "input.columns.image": "photo"}
    wrong = merge(MINIMAL, {**COMPILED, **image, field: value})
    (line,) = said(wrong)
    assert line.startswith(field) and words in line
    build(merge(MINIMAL, {**image, field: value}))


def test_columns_that_would_compile_again_are_refused() -> None:
    control = {"task": "control", "input.columns.control": "edges"}
    for column in ("control_scale", "image_prompt_scale"):
        task = control if column == "control_scale" else {"task": "variation"}
        needs = {"input.columns.image": "photo"} if column != "control_scale" else {}
        wrong = {**COMPILED, **task, **needs, f"input.columns.{column}": "weight"}
        (line,) = said(merge(MINIMAL, wrong))
        assert line.startswith(f"input.columns.{column} is set to 'weight', but resources.compile")


def test_what_one_stage_needs_does_not_bind_another() -> None:
    staged = {**COMPILED, "resources.layout": "staged", "resources.encode.num_gpus": 2}
    assert build(merge(MINIMAL, staged)).resources.compile == "full"
    unused = {**COMPILED, "resources.decode.num_gpus": 2}  # the pool of another layout
    assert build(merge(MINIMAL, unused)).resources.compile == "full"
