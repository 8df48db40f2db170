"""Reads the plan of an output and compares it with the plan that would be made now."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

from batchgen.errors import DamagedRecord, NewerFormat, PlanChanged, SpecError
from batchgen.plan.place import FIRST, Place
from batchgen.plan.plan import (
    VERSION,
    Fingerprints,
    Frozen,
    Plan,
    SourceFile,
    input_fingerprint,
    plan_fingerprint,
)
from batchgen.plan.scores import compare_scorers
from batchgen.records import ModelInfo
from batchgen.spec.build import stored
from batchgen.spec.spec import spec_fingerprint
from batchgen.spec.tree import flatten, without
from batchgen.storage.documents import Count, Version, parse_json, read_document

_OTHER_SPEC = "its spec does not match its spec_fingerprint"
# Fields that `batchgen resume` may lower for the shards that are left, and how.
_RESUME = {
    f"resources.{name}": f" (`batchgen resume {flag} N` lowers it for the shards that are left)"
    for name, flag in (
        ("batch_size", "--batch-size"),
        ("decode_batch_size", "--decode-batch-size"),
    )
}
_REMEDY = "restore an undamaged copy, or write to a new output"


@dataclass(frozen=True)
class _Saved:
    """The fields of ``plan.json`` that are read; the others are for people."""

    version: Version
    spec: dict[str, Any]
    model: ModelInfo
    files: tuple[SourceFile, ...]
    columns: tuple[tuple[str, str], ...]
    rows: Count
    spec_fingerprint: str
    input_fingerprint: str
    plan_fingerprint: str | None = None  # older plans have none
    place: Place = FIRST


def read_plan(text: str | bytes, place: str = "the plan") -> Plan:
    """Read a plan from its JSON text; messages name ``place``.

    Raises:
        NewerFormat: a later version wrote it.
        DamagedRecord: it was truncated or changed, or its format is older than the oldest that is
            read.
    """
    saved = read_document(_Saved, text, place, VERSION, _REMEDY)
    if saved.version < VERSION:
        raise DamagedRecord(
            f"{place} was written by an older batchgen (format {saved.version}; this version reads "
            f"{VERSION}): use the older version, or write to a new output"
        )
    try:
        spec = stored(saved.spec, extra="ignore")
    except SpecError as error:
        raise DamagedRecord(f"{place} is damaged (its spec: {error}); {_REMEDY}") from error
    fingerprints = Fingerprints(
        saved.spec_fingerprint,
        saved.input_fingerprint,
        plan_fingerprint(saved.spec_fingerprint, saved.input_fingerprint, saved.model, saved.place),
    )
    known = flatten(spec.model_dump(mode="json"))
    unknown = tuple(sorted(filter(partial(_is_new, known), flatten(saved.spec))))
    frozen = Frozen(fingerprints, unknown, unmarked=saved.plan_fingerprint is None)
    plan = Plan(spec, saved.model, saved.files, saved.columns, saved.rows, frozen, saved.place)
    changed = _changed_part(plan, saved, text)
    if changed == _OTHER_SPEC and unknown:
        raise NewerFormat(
            f"{place} was written by a newer batchgen, with fields that this version does not know "
            f"({', '.join(unknown)}): use the newer version"
        )
    if changed:
        raise DamagedRecord(f"{place} is damaged ({changed}); {_REMEDY}")
    return plan


def _changed_part(plan: Plan, saved: _Saved, text: str | bytes) -> str | None:
    """Name the part of the plan that does not match the plan's own fingerprints; None if all do."""
    rows = sum(file.rows for file in plan.files)
    tree = parse_json(text)
    if plan.spec.open_fields:
        return f"its {plan.spec.open_fields[0]} is auto"
    if not any(spec_fingerprint(one) == saved.spec_fingerprint for one in _readings(plan, tree)):
        return _OTHER_SPEC
    if input_fingerprint(tree["files"], tree["columns"]) != saved.input_fingerprint:
        return "its files and columns do not match its input_fingerprint"
    if saved.plan_fingerprint not in (None, plan.fingerprint):
        return "its model or place does not match its plan_fingerprint"
    wanted = min(rows, plan.spec.input.limit or rows) - plan.place.first_row
    wanted = plan.place.listed or wanted
    if not rows or saved.rows != wanted:
        return f"its files and limit give {wanted} rows, but it says {saved.rows}"
    return None


def _is_new(known: Collection[str], field: str) -> bool:
    """Whether this version has neither this field nor a section of that name."""
    return field not in known and not any(one.startswith(f"{field}.") for one in known)


def _readings(plan: Plan, tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the spec with and without the unknown fields of a newer version.

    It is not known whether the newer version counts them in its fingerprint.
    """
    yield tree["spec"]
    if plan.frozen is not None and plan.frozen.unknown:
        yield reduce(without, plan.frozen.unknown, tree["spec"])


def compare(saved: Plan, now: Plan) -> Plan:
    """Refuse to continue an output that was planned from other inputs, settings or weights.

    Returns:
        The new plan, with the fingerprints that the output's markers hold.

    Raises:
        PlanChanged: the first field that differs, with both values.
        NewerFormat: its spec has fields that this version does not know.
    """
    if saved.frozen is not None and saved.frozen.unknown:
        raise NewerFormat(
            "the output was planned by a newer batchgen, with fields that this version does not "
            f"know ({', '.join(saved.frozen.unknown)}): use the newer version"
        )
    before, after = saved.spec.result_fields(), now.spec.result_fields()
    if before.get("score") != after.get("score"):
        compare_scorers(saved.spec.score, now.spec.score)
    for field in sorted(before.keys() | after.keys()):
        pair = before.get(field), after.get(field)
        _refuse_if_changed(field, *pair, _RESUME.get(field) or _extension(saved, field, *pair))
    _refuse_if_changed("model weights", saved.model.manifest_sha256, now.model.manifest_sha256)
    old, new = ({file.path: file for file in plan.files} for plan in (saved, now))
    url = saved.spec.output.url
    for path in sorted(old.keys() | new.keys()):
        there, here = (files.get(path) for files in (old, new))
        if there is None or here is None:
            more = f"; `batchgen extend {url} --input FILE` adds a file" if here else ""
            _refuse_if_changed(f"input file {path}", there and "present", here and "present", more)
            continue
        for fact in ("size", "row_groups", "etag"):
            _refuse_if_changed(
                f"input file {path}: {fact}", getattr(there, fact), getattr(here, fact)
            )
    _refuse_if_changed("input columns", saved.columns, now.columns)
    _refuse_if_changed("place among the parts", _continued(saved), _continued(now))
    return replace(now, frozen=saved.frozen)


def _extension(saved: Plan, field: str, before: Any, after: Any) -> str:
    """How to add what a changed field asks for, if ``batchgen extend`` can."""
    command = f"`batchgen extend {saved.spec.output.url}"
    if field in ("variants", "input.count") and isinstance(before, int) and isinstance(after, int):
        option = "--variants" if field == "variants" else "--limit"
        return f"; {command} {option} {after - before}` adds them" if after > before else ""
    if field == "input.limit" and before and (after is None or after > before):
        return f"; {command} --limit {after - before if after else 'N'}` adds rows"
    if field == "input.path":
        return f"; {command} --input PATH` adds the rows of another input"
    return ""


def _continued(plan: Plan) -> Place:
    """The place without the fingerprint before it, which later versions may compute otherwise."""
    return replace(plan.place, before="")


def _refuse_if_changed(field: str, before: object, after: object, also: str = "") -> None:
    if before != after:
        raise PlanChanged(
            f"{field} has changed: the output was planned with {before!r}, now it is {after!r}; "
            f"change it back, or write to a new output{also}"
        )
