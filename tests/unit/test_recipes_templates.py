"""Templates: Jinja, dynamicprompts' syntax and wildcards; hostile ones get a clear error."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import InputError, SpecError
from batchgen.recipes.counting import plural
from batchgen.recipes.grammar import GrammarError, parse
from batchgen.recipes.reasons import REASONS, Refused, is_reason, table
from batchgen.recipes.templates import Template
from batchgen.recipes.wildcards import Wildcards, clean_lines
from batchgen.spec.sections import MAX_TEXT
from tests.fuzzing import fuzz
from tests.recipes import reasons_of, rows_of

ROOT = Path(__file__).parents[2]
KEYS = [b"row-%d" % number for number in range(300)]
NONE = Wildcards("", {})
ROW: dict[str, Any] = {
    "name": "cat",
    "size": 3,
    "tags": ["soft", "grey"],
    "class": {"name": "cat", "synonyms": ["kitty", "puss"], "definition": None},
}


def made(text: str, wildcards: Wildcards = NONE, row: dict[str, Any] = ROW) -> set[str]:
    """All texts that the template makes."""
    template = Template("templates.t", text, 7, wildcards)
    return {template.render(key, row) for key in KEYS}


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("a photo of a {{ name }}", {"a photo of a cat"}),
        ("{{ name | upper }} {{ size + 1 }}", {"CAT 4"}),
        ("{a|b|c}", {"a", "b", "c"}),
        ("{a|b|}x", {"ax", "bx", "x"}),
        ("{0::a|b}", {"b"}),
        ("{2$$a|b}", {"a, b", "b, a"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{1-2$$+$$a|b}", {"a", "b", "a+b", "b+a"}),
        ("{-2$$+$$a|b}", {"a", "b", "a+b", "b+a"}),
        ("{2-$$+$$a|b}", {"a+b", "b+a"}),
        ("{a|{b|c} {{ name }}}", {"a", "b cat", "c cat"}),
        ("{a {{ name | default('x|y}') }}|b}", {"a cat", "b"}),
        ("{% if size > 2 %}{big|large}{% else %}small{% endif %} one", {"big one", "large one"}),
        ("{% for tag in tags %}{{ tag }} {% endfor %}{{ name }}", {"soft grey cat"}),
        ("{{ class.synonyms | pick }}", {"kitty", "puss"}),
        ("{{ tags | join(' and ') }}", {"soft and grey"}),
        ("{{ class.definition | default('thing', true) }}", {"thing"}),
        ("{{ missing | default('none') }}", {"none"}),
        ("{{ name | article }}, {{ 'orange' | article }}", {"a cat, an orange"}),
        (r"\{a\|b\} {# a comment {x|y} #}c", {"{a|b} c"}),
        ("  many \n spaces\t here ", {"many spaces here"}),
        ("a | b } c", {"a | b } c"}),
        ("snake_case __ x__y", {"snake_case __ x__y"}),
        ("{a|a}", {"a"}),
    ],
)
def test_what_templates_make(text: str, texts: set[str]) -> None:
    assert made(text) == texts


def test_weights_count() -> None:
    template = Template("templates.t", "{3::a|b}", 7, NONE)
    found = Counter(template.render(b"%d" % number, {}) for number in range(4000))
    assert 2850 < found["a"] < 3150


def test_the_groups_of_a_template_are_independent() -> None:
    assert len(made("{a|b|c} {a|b|c} {a|b|c}")) == 27


WORDS = {
    "places": ("a park", "a {wide|narrow} road", "__far/seas__"),
    "far/seas": ("the sea", "a lake"),
    "colours": ("red", "blue", "green"),
}
WILD = Wildcards("words", WORDS)


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("in __places__", {"in a park", "in a wide road", "in a narrow road", "in the sea"}),
        ("{2$$ and $$__colours__}", {"red and blue"}),
        ("__colours__ __colours__", {"red red", "red blue"}),
        ("{the __colours__|x}", {"the red", "the blue", "the green", "x"}),
        ("{{ '__colours__' }}", {"__colours__"}),
    ],
)
def test_wildcards(text: str, texts: set[str]) -> None:
    assert made(text, WILD) >= texts


def test_two_lines_of_a_wildcard_are_different() -> None:
    for one in made("{2$$+$$__colours__}", WILD):
        assert len(set(one.split("+"))) == 2
    assert {len(one.split("+")) for one in made("{9$$+$$__colours__}", WILD)} == {3}


HOSTILE = {
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ name.__init__.__globals__ }}": "unsafe",
    "{{ class.synonyms.append(1) }}": "append",
    "{% include '/etc/passwd' %}": "include is not allowed",
    "{% import 'os' as os %}": "import is not allowed",
    "{% from 'os' import path %}": "is not allowed",
    "{% extends 'x' %}": "extends is not allowed",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "macro is not allowed",
    "{% for x in tags recursive %}{{ loop(tags) }}{% endfor %}": "recursive",
    "{% raw %}{a|b}{% endraw %}": "raw",
    "{{ self }}": "self is not allowed",
    "{{ 'x'.format(1) }}": "format",
    "{{ '{:>1000000000}'.format(1) }}": "format",
    "{{ '%1000000000d' % 1 }}": "not allowed",
    "{{ name | random }}": "random",
    "{{ 'x' | center(1000000000) }}": "center",
    "{{ name.center(1000000000) }}": "center",
    "{name}": "{{ name }}",
    "{a|b": "has no }",
    "{{ name": "has no }}",
    "{% if name %}": "",
    "{3$$a|b}": "2 options to draw 3",
    "{0::a|0::b}": "weight",
    "{a{b": "has no }",
    "{" * 50 + "a|b" + "|c}" * 50: "",
    "{ a|" * 50 + "b" + "}" * 50: "groups in each other",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "",
    "{% for a in tags %}" * 30 + "x" + "{% endfor %}" * 30: "",
    "__nowhere__": "nowhere.txt",
    "__../../etc/passwd__ __etc/passwd__": "passwd.txt",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_template_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(SpecError, match=r"templates\.t: ") as told:
        made(text)
    assert HOSTILE[text] in str(told.value)
    assert "allowed: " in str(told.value)


GREEDY = [
    "{{ 'x' * 1000000000 }}",
    "{{ 1000000000 * 'x' }}",
    "{{ tags * 100000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 2 ** 10000000 }}",
    "{% for a in range(1000) %}{% for b in range(1000) %}x{% endfor %}{% endfor %}",
    "{{ range(1000000000) | list | length }}",
    "{% set a = 'x' * 9000 %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    "{% set a = 'x' * 9000 %}" + "{% set a = a + a %}" * 60 + "{{ a }}",
    "{% set a = ['x'] * 900 %}" + "{% set a = a + a %}" * 60 + "{{ a | length }}",
    "{% set a = 'x' * 9000 %}" + "{% set a = a | replace('x', a) %}" * 60 + "{{ a }}",
    "{% set a = 'x' * 9000 %}" + "{% set a = a.replace('x', a) %}" * 60 + "{{ a }}",
    "{{ range(1000) | map('string') | join('x' * 9000) }}",
    "{{ 'x' * 9000 }}{{ 'x' * 9000 }}",
    "{{ range(999) | sum(start=10 ** 30) }}",
]


@pytest.mark.parametrize("text", GREEDY)
def test_a_greedy_template_costs_its_row_and_little_time(text: str) -> None:
    begun = time.process_time()
    with pytest.raises((Refused, SpecError), match=r"templates\.t"):
        Template("templates.t", text, 7, NONE).render(b"key", ROW)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ nmae }}", "undefined-variable"),
        ("{{ class.nmae }}", "undefined-variable"),
        ("{{ class.definition }}", "undefined-variable"),
        ("{{ name + 1 }}", "bad-template"),
        ("{{ 1 / 0 }}", "bad-template"),
        ("{{ tags }}", "bad-template"),
        ("{{ [] | pick }}", "bad-template"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_a_reason(text: str, reason: str) -> None:
    template = Template("templates.t", text, 7, NONE)
    with pytest.raises(Refused, match=r"templates\.t") as told:
        template.render(b"key", ROW)
    assert told.value.reason == reason


CIRCLES: dict[str, dict[str, tuple[str, ...]]] = {
    "a > a": {"a": ("__a__",)},
    "a > b > a": {"a": ("x", "{y|__b__}"), "b": ("__a__",)},
    "b > b": {"a": ("__b__",), "b": ("1", "__b__")},
}


@pytest.mark.parametrize("circle", CIRCLES)
def test_a_wildcard_that_contains_itself_is_named(circle: str) -> None:
    with pytest.raises(SpecError, match="contains itself") as told:
        made("__a__", Wildcards("words", CIRCLES[circle]))
    assert circle in str(told.value)


def test_wildcards_cannot_multiply_without_end() -> None:
    lines = {f"w{n}": (f"__w{n + 1}__ " * 50,) for n in range(20)} | {"w20": ("x",)}
    template = Template("templates.t", "__w0__", 7, Wildcards("words", lines))
    begun = time.process_time()
    with pytest.raises(Refused, match="texts from wildcards"):
        template.render(b"key", {})
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("line", ["{{ name }}", "{a", "{one}", "{% for x in y %}"])
def test_a_wrong_line_of_a_wildcard_is_named(line: str) -> None:
    with pytest.raises(SpecError, match=r"words\.txt, text 2"):
        made("__words__", Wildcards("folder", {"words": ("fine", line)}))


@pytest.mark.parametrize(
    ("data", "said"), [(b"\xff\xfe", "UTF-8"), (b"\n # x\n", "no lines"), (b"x" * 20_000, "large")]
)
def test_a_wildcard_file_that_is_no_list_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        clean_lines(data, "words.txt")


def test_wildcards_are_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "styles.txt").write_text("# styles\nink\n\n  oil  \n")
    tree = {"wildcards": str(tmp_path), "variants": 20, "templates": "in __art/styles__"}
    assert {row["prompt"] for row in rows_of(tree).values()} == {"in ink", "in oil"}


VALUES = st.text(max_size=40)


@given(VALUES)
def test_a_value_of_a_row_is_text_and_never_a_template(value: str) -> None:
    """Class names from anywhere cannot draw, read files or run code."""
    text = " ".join(f"{value}.".split())
    assert made("{{ name }}.", row={"name": value}) == {text}


@pytest.mark.parametrize("name", ["{a|b}", "__places__", "{{ 7 * 7 }}", "{% raw %}", "{2$$a|b}"])
def test_a_hostile_class_name_is_inserted_as_it_is(name: str) -> None:
    tree = {"from": [name], "templates": "a {{ class.name }}, {{ label }}"}
    (row,) = rows_of(tree).values()
    assert row["prompt"] == f"a {name}, {name}"
    assert row["label"] == name


@fuzz(quick=200)
@given(st.text(alphabet="{}|$_:%#-'\"\\ab12. ", max_size=60))
def test_any_text_is_a_template_or_is_refused(text: str) -> None:
    """Nothing but the two documented errors comes out, whatever the text."""
    try:
        template = Template("templates.t", text, 7, WILD)
        assert len(template.render(b"key", ROW)) <= MAX_TEXT
    except (SpecError, Refused):
        pass


@given(st.text(alphabet="{}|$_:-ab12 ", max_size=60))
def test_any_line_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(GrammarError):
        parse(text, jinja=False)


def test_long_prompts_and_empty_ones_are_rejected() -> None:
    rows = [
        {"key": "a", "text": "x" * 10_001},
        {"key": "b", "text": " "},
        {"key": "c", "text": "y"},
    ]
    assert reasons_of({"from": rows, "templates": "{{ text }}"}) == {
        "bad-template": 1,
        "empty-prompt": 1,
    }


def test_the_list_of_reasons_is_that_of_the_page() -> None:
    assert table() in (ROOT / "docs" / "recipes.md").read_text()
    assert all(is_reason(name) for name in REASONS) and is_reason("bad-eta")
    with pytest.raises(AssertionError):
        Refused("made-up", "said")


@pytest.mark.parametrize(
    ("objects", "text"),
    [
        ({"category": ["dog", "person", "dog"]}, "two dogs and a person"),
        (
            [{"category": "cat"}, {"category": "dog"}, {"category": "owl"}],
            "a cat, a dog and an owl",
        ),
        ({"category": ["person"] * 3 + ["bus"] * 13}, "13 buses and three people"),
        ({"category": ["traffic_light", "traffic_light"]}, "two traffic lights"),
        ({"category": ["dog", "dog"], "iscrowd": [0, 1]}, "a dog"),
        ({"category": []}, ""),
    ],
)
def test_objects_are_counted_in_words(objects: Any, text: str) -> None:
    assert made("{{ objects | counted }}", row={"objects": objects}) == {text}


@pytest.mark.parametrize("objects", [{"category": [1]}, [1], "dog", {"bbox": [[0, 0, 1, 1]]}])
def test_objects_without_names_cannot_be_counted(objects: Any) -> None:
    template = Template("templates.t", "x{{ objects | counted }}", 7, NONE)
    if "bbox" in objects:
        assert template.render(b"key", {"objects": objects}) == "x"
        return
    with pytest.raises(Refused, match="counted: ") as told:
        template.render(b"key", {"objects": objects})
    assert told.value.reason == "bad-template"


@pytest.mark.parametrize(
    ("one", "several"),
    [("dog", "dogs"), ("bus", "buses"), ("cherry", "cherries"), ("toy", "toys"), ("box", "boxes")],
)
def test_plurals(one: str, several: str) -> None:
    assert plural(one) == several and plural(f"red {one}") == f"red {several}"
