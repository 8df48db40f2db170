"""Plans further parts of an output: more variants, more rows, another input, listed samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from batchgen.errors import InputError, NewerFormat, SpecError
from batchgen.plain_text import short
from batchgen.plan.columns import class_names
from batchgen.plan.keys import row_key
from batchgen.plan.parts import Parts
from batchgen.plan.place import Place, listing_of
from batchgen.plan.plan import Plan, make_plan
from batchgen.plan.unique_keys import refuse_duplicate_keys
from batchgen.spec.labels_section import Labels
from batchgen.spec.sections import MAX_COUNT
from batchgen.spec.spec import Spec
from batchgen.storage import open_input

MOST_VARIANTS = 1_000_000  # of a row, as in the spec
Samples = list[tuple[int, int, int]]  # row of the input, variant, the variant that it replaces


def more_variants(parts: Parts, count: int) -> list[Plan]:
    """Parts with ``count`` further variants of every row; one part for each input.

    Raises:
        SpecError: the number is not allowed.
        InputError: an input has changed.
    """
    _check_count("--variants", count)
    return _further_variants(parts, inputs_of(parts), count)


def unfinished(parts: Parts) -> list[Plan]:
    """The parts that an extension still lacks, since it was interrupted between two of them."""
    last = parts[-1]
    if not last.place.left:
        return []
    bases = [base for base in inputs_of(parts) if base > last.place.base]
    return _further_variants(parts, bases, last.spec.variants)


def _further_variants(parts: Parts, bases: Sequence[int], count: int) -> list[Plan]:
    """One part for each of these inputs."""
    added: list[Plan] = []
    for number, base in enumerate(bases, start=1):
        so_far = Parts([*parts, *added])
        rows, first = rows_of(so_far, base), next_variant(so_far, base)
        if first + count > MOST_VARIANTS:
            allowed = (
                f"at most {MOST_VARIANTS - first:,}: a row has up to {MOST_VARIANTS:,} variants"
            )
            raise SpecError("--variants", count, allowed)
        spec = _with(_first(so_far, base).spec, rows, count)
        left = len(bases) - number
        place = place_of(so_far, base, "variants", first_variant=first, left=left)
        added.append(_dense(so_far, spec, place))
    return added


def more_rows(parts: Parts, count: int) -> list[Plan]:
    """A part with at most ``count`` further rows of the input, with the variants of the others.

    Without an input, the rows are numbered on. Rows of the first input that has any left are added.

    Raises:
        SpecError: the number is not allowed.
        InputError: no row is left, or an input has changed, or keys are not unique.
    """
    _check_count("--limit", count)
    for base in inputs_of(parts):
        spec, rows = _first(parts, base).spec, rows_of(parts, base)
        there = sum(file.rows for file in _first(parts, base).files)
        left = min(count, (MAX_COUNT if spec.input.count else there) - rows)
        if left < 1:
            continue
        place = place_of(parts, base, "limit", first_row=rows)
        plan = _dense(parts, _with(spec, rows + left, _variants(parts, base)), place)
        _refuse_equal_keys(parts, plan)
        return [plan]
    raise InputError(
        f"output {parts.spec.output.url} has all rows of its input already; add another input with "
        "`--input`, or variants with `--variants`"
    )


def more_input(parts: Parts, path: str, labels: Labels) -> list[Plan]:
    """A part with the rows of another input, which has the same columns.

    Args:
        parts: of the output.
        path: of the input.
        labels: the section ``labels`` as the user gave it; the rest comes from the input.

    Raises:
        InputError: the input cannot be used, its columns or classes differ, or keys are not unique.
    """
    first = parts[0]
    if first.spec.input.count:
        raise InputError(
            "the output was made without an input (input.count); add rows with `--limit`, or "
            "write to a new output"
        )
    source = first.spec.input.model_copy(update={"path": path, "limit": None})
    own = {"input": source, "variants": _variants(parts, 0), "labels": labels}
    spec = first.spec.model_copy(update=own)
    place = place_of(parts, len(parts), "input")
    plan = make_plan(spec, first.model, first.device, check_keys=False, place=place)
    there, here = dict(first.columns), dict(plan.columns)
    for name in dict.fromkeys([*there, *here]):
        one, other = there.get(name, "missing"), here.get(name, "missing")
        if one != other:
            raise InputError(
                f"--input {path}: column {name!r} is {other}, but {one} in the output's first "
                f"input {first.spec.input.path}; all inputs of an output need the same columns"
            )
    _refuse_other_classes(first, plan)
    _refuse_equal_keys(parts, plan)
    return [plan]


def _refuse_other_classes(first: Plan, added: Plan) -> None:
    """Refuse an input whose numbers mean other classes than those of the first input."""
    one, other = first.spec.labels.names, added.spec.labels.names
    if one != other:
        raise _other_classes(added, "the objects", other, one)
    there, here = _declared(first), _declared(added)
    for name in dict.fromkeys([*there, *here]):
        if there.get(name) != here.get(name):
            raise _other_classes(added, f"column {name!r}", here.get(name), there.get(name))


def _declared(plan: Plan) -> dict[str, list[str]]:
    """Column -> the class names that the first file of its input declares (ClassLabel)."""
    if not plan.files:
        return {}
    file = plan.files[0]
    with open_input(file.path, plan.spec.input.path, file.etag) as handle:
        schema = pq.read_schema(handle)
    return class_names(schema)


def _other_classes(
    added: Plan, what: str, here: Sequence[str] | None, there: Sequence[str] | None
) -> InputError:
    path = added.spec.input.path
    return InputError(
        f"--input {path}: the classes of {what} are {_listed(here)}, but {_listed(there)} in the "
        "output's first input; the same number must mean the same class in all inputs"
    )


def _listed(names: Sequence[str] | None) -> str:
    """Class names for a message."""
    return "not declared" if not names else short(", ".join(names))


def listed_part(parts: Parts, base: int, samples: Samples, why: str, round: int = 0) -> Plan:
    """A part with exactly these samples of rows of an input."""
    listing = listing_of(samples)
    digest = hashlib.sha256(listing.to_parquet()).hexdigest()
    facts = {"round": round, "listed": len(samples), "samples_sha256": digest}
    first = max(_dense_parts(parts, base), key=lambda one: one.place.first_row + one.rows)
    spec = first.spec.model_copy(update={"variants": 1})
    place = place_of(parts, base, why, **facts)
    return replace(
        first, spec=spec, rows=len(samples), frozen=None, place=place, listing=listing, notes=()
    )


def place_of(parts: Parts, base: int, why: str, **facts: Any) -> Place:
    """The place after these parts.

    Raises:
        NewerFormat: the output was planned with fields that this version does not know.
    """
    unknown = [one for plan in parts if plan.frozen for one in plan.frozen.unknown]
    if unknown:
        raise NewerFormat(
            "the output was planned by a newer batchgen, with fields that this version does not "
            f"know ({', '.join(unknown)}): use the newer version"
        )
    return Place(
        part=len(parts),
        first_shard=parts.shards,
        first_sample=parts.samples,
        before=parts.fingerprint,
        base=base,
        why=why,
        **facts,
    )


def inputs_of(parts: Parts) -> list[int]:
    """The numbers of the parts that brought an input."""
    return sorted({plan.place.base for plan in parts})


def rows_of(parts: Parts, base: int) -> int:
    """The number of rows of an input that the output has."""
    return max(plan.place.first_row + plan.rows for plan in _dense_parts(parts, base))


def next_variant(parts: Parts, base: int) -> int:
    """A variant number that no row of an input has yet; nor has any higher one."""
    ends = [one.place.first_variant + one.spec.variants for one in _dense_parts(parts, base)]
    ends += [int(one.listed.variants.max()) + 1 for one in listed_parts(parts, base)]
    return max(ends)


def listed_parts(parts: Parts, base: int) -> list[Plan]:
    """The parts of an input that list their samples."""
    return [plan for plan in parts if plan.place.base == base and plan.place.listed]


def _dense_parts(parts: Parts, base: int) -> list[Plan]:
    return [plan for plan in parts if plan.place.base == base and not plan.place.listed]


def _first(parts: Parts, base: int) -> Plan:
    """The first plan of an input."""
    return _dense_parts(parts, base)[0]


def _variants(parts: Parts, base: int) -> int:
    """The number of variants that the first row of an input was planned with."""
    return sum(one.spec.variants for one in _dense_parts(parts, base) if not one.place.first_row)


def _with(spec: Spec, rows: int, variants: int) -> Spec:
    """The spec for the first ``rows`` rows of its input."""
    name = "count" if spec.input.count else "limit"
    source = spec.input.model_copy(update={name: rows})
    return spec.model_copy(update={"input": source, "variants": variants})


def _dense(parts: Parts, spec: Spec, place: Place) -> Plan:
    """A part with all variants of its rows, from the input as it is now."""
    first = _first(parts, place.base)
    made = make_plan(spec, first.model, first.device, check_keys=False, place=place)
    if spec.input.count:
        return made
    if (made.files, made.columns) != (first.files, first.columns):
        raise InputError(
            f"input {spec.input.path} has changed since the output was planned; restore it, or add "
            "the new rows as a file of their own with `--input`"
        )
    return made


def _refuse_equal_keys(parts: Parts, added: Plan) -> None:
    """Refuse rows whose keys the output has already."""
    known: dict[str, str] = {}
    for plan in (*parts, added):
        for file in plan.files:
            other = known.setdefault(row_key(file.name, 0), file.path)
            if other != file.path:
                raise InputError(f"the rows of {other} and {file.path} would get the same keys")
    if added.spec.input.columns.key is not None and added.spec.input.check_keys:
        refuse_duplicate_keys(*_rows_once([*parts, added]))


def _rows_once(plans: Sequence[Plan]) -> list[Plan]:
    """The plans of different rows: without further variants and listed samples of the same rows."""
    return [plan for plan in plans if plan.place.why in ("", "limit", "input")]


def _check_count(option: str, count: int) -> None:
    if not 1 <= count <= 2**53:
        raise SpecError(option, count, "a number of 1 or more")
