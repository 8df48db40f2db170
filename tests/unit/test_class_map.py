"""Labels and the classes of a scorer's model: exact names first, and nothing that could be two."""

from __future__ import annotations

from typing import Any

import pytest

from batchgen.errors import SpecError
from batchgen.models.scorers.class_map import named_labels, numbered_labels
from batchgen.spec.score_section import ScorerSpec

SPEC = ScorerSpec(scorer="classifier", model="m")
ZERO = ScorerSpec(scorer="zero-shot", model="m")
AS_TEXT = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...
CASES = ["A", "B", "a", "b"]


def numbered(values: list[Any], classes: list[str], **how: Any) -> dict[str, int]:
    return numbered_labels(SPEC, values, how.get("names", ()), classes, how.get("given"))


def test_names_are_compared_as_they_are_written_first() -> None:
    assert numbered(CASES, CASES) == {"A": 0, "B": 1, "a": 2, "b": 3}
    assert numbered(["x"], CASES, given={"x": "a"}) == {"x": 2}
    assert numbered(["a"], CASES, given={"a": "a"}) == {"a": 2}
    assert numbered(["Cat", "snow leopard"], ["cat", "Snow_Leopard"]) == {
        "Cat": 0,
        "snow leopard": 1,
    }
    with pytest.raises(SpecError, match=r"the label 'CAT' could be the class number 0 \('Cat'\) "):
        numbered(["CAT"], ["Cat", "cat"])


def test_a_whole_name_counts_before_one_of_several() -> None:
    classes = ["rocking chair, rocker", "rocker", "crane", "crane", "ounce, snow leopard"]
    assert numbered(["rocker", "Snow Leopard"], classes) == {"rocker": 1, "Snow Leopard": 4}
    with pytest.raises(SpecError, match=r"'crane' could be the class number 2 .* or number 3 "):
        numbered(["crane"], classes)
    assert numbered(["crane"], classes, given={"crane": 3}) == {"crane": 3}
    assert numbered([2, 3], classes, names=classes) == {"2": 2, "3": 3}  # the same list
    assert numbered([0], ["dog", "tench"], names=["tench, Tinca tinca"]) == {"0": 1}


def test_numbers_are_classes_that_are_called_by_numbers() -> None:
    assert numbered([2, 10], AS_TEXT) == {"2": AS_TEXT.index("2"), "10": AS_TEXT.index("10")}
    declared = numbered([2, 10], [*map(str, range(12))], names=AS_TEXT)
    assert declared == {"2": 10, "10": 8}
    with pytest.raises(SpecError, match=r"label 1 could be the class number 1 \('cat'\) or numb"):
        numbered([1], ["1", "cat"])
    assert numbered([0, 1], ["dog", "cat"]) == {"0": 0, "1": 1}
    with pytest.raises(SpecError, match="have no class in it: -1, 2;"):
        numbered([-1, 2, 0], ["dog", "cat", "cow"], names=["dog", "cat"])


def test_numbers_have_the_names_that_are_declared() -> None:
    found = named_labels(ZERO, [*range(12)], AS_TEXT, None)
    assert found == {str(number): name for number, name in enumerate(AS_TEXT)}
    assert named_labels(ZERO, ["a", "b"], [], ["a", "b"]) == {"a": "a", "b": "b"}
    assert named_labels(ZERO, ["0", "1"], [], ["a", "b"]) == {"0": "a", "1": "b"}
    assert named_labels(ZERO, [5, 7], [], ["7", "5"]) == {"5": "5", "7": "7"}
    with pytest.raises(SpecError, match=r"the label '0' could be the class number 0 .'1'. or numb"):
        named_labels(ZERO, [0, 1], [], ["1", "0"])
    with pytest.raises(SpecError, match=r"'crane' could be the class number 0 .* or number 2"):
        named_labels(ZERO, [0, 1], ["crane", "dog", "crane"], None)


def test_what_options_classes_names_wrongly_is_refused() -> None:
    with pytest.raises(SpecError, match=r"options.classes.typo: got 99; allowed: a name of a cl"):
        numbered(["cat"], ["cat"], given={"typo": 99})
    with pytest.raises(SpecError, match=r"options.classes.x: got 'wolff'"):
        numbered(["cat"], ["cat", "wolf"], given={"x": "wolff"})
    with pytest.raises(SpecError, match=r"options.classes: got 'Cat'; allowed: the label as the"):
        numbered(["cat"], ["cat", "wolf"], given={"Cat": "wolf"})
    with pytest.raises(SpecError, match=r"no class in it: 'wulf'.*no image has its 'wolff'"):
        numbered(["cat", "wulf"], ["cat", "wolf"], given={"wolff": "wolf"})
    given = {"rare": "wolf"}  # of rows that a limit leaves out
    assert numbered(["cat"], ["cat", "wolf"], given=given) == {"cat": 0}


def test_numbers_are_mapped_by_their_declared_names_as_well() -> None:
    names = ["car", "dog"]
    found = numbered([0, 1], ["dog", "automobile"], names=names, given={"car": "automobile"})
    assert found == {"0": 1, "1": 0}
    assert named_labels(ZERO, [0, 1], names, {"car": "auto", "1": "hound"})["0"] == "auto"
    with pytest.raises(
        SpecError, match=r"the label '1' could be the class number 1 .* or number 0"
    ):
        numbered([0, 1], ["dog", "cat"], names=["1", "0"], given={"1": "dog"})
