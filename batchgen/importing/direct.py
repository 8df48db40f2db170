"""Lets a run read a source that is not Parquet: imports it, and keeps the import in the output."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError, LimitExceeded, PlanChanged, SpecError
from batchgen.importing.kinds import csv_rows, json_lines, text, webdataset
from batchgen.importing.kinds.choose import about_kinds, kind_of
from batchgen.importing.listing import listed
from batchgen.importing.summary import Summary, Tell
from batchgen.importing.target import PARQUET, target_at
from batchgen.importing.work import Source, import_source
from batchgen.spec.build import build
from batchgen.spec.labels_section import FROM_LABELS
from batchgen.spec.tasks import TASK_NAMES, Task, task_named
from batchgen.spec.tree import canonical_json, spread
from batchgen.storage import (
    Store,
    absolute,
    configure,
    delete_all,
    find_files,
    is_within,
    open_input,
    open_store,
)

INPUT = "_batchgen/input"  # of an output: the imports of its sources, by fingerprint
_PLAN, _RECORDS = "plan.json", "_batchgen"
_SOURCE, _ROWS = "source.json", "rows"
_VERSION = 1
_NAMED = 5
_REJECTED_LIMIT = 0.1
_NOT_PARQUET = (
    *(*csv_rows.ENDINGS, *json_lines.ENDINGS, *text.ENDINGS, *webdataset.ENDINGS),
    ".json",
)

Tree = dict[str, Any]


@dataclass(frozen=True)
class How:
    """How a source of a run is imported.

    Attributes:
        keep: into the output, for a run; else into a temporary folder that ``held`` removes.
        overwrite: the output is going to be replaced, so another source is allowed.
        held: removes the temporary folder at the end of the command.
        say: shows a line to the user.
        tell: is told at intervals how far the import is.
        ready: called before anything is written to the output; raises if that is not allowed.
    """

    keep: bool
    overwrite: bool
    held: ExitStack
    say: Callable[[str], None]
    tell: Tell
    ready: Callable[[str], None]


def sourced(tree: Mapping[str, Any], how: How) -> Tree:
    """The tree of a spec, with an input that is Parquet, and with the columns that it declares.

    An input that is a known source is imported; an import that an earlier run has kept is used
    again. Faults of the spec are left to the caller, who builds it.

    Raises:
        InputError: the source cannot be imported.
        PlanChanged: the output was made from other files; names some of them.
        LimitExceeded: more rows were rejected than ``policy.rejected_limit`` allows.
    """
    tree = spread(tree)
    given = tree.get("input")
    path = given.get("path") if isinstance(given, dict) else None
    if not isinstance(path, str) or not path or not _is_sound(tree):
        return tree
    _reach(tree)
    if not _is_parquet(path):
        source = _source(path)
        if source is None:
            return tree
        tree = _imported(tree, source, how)
    return with_columns(tree, how.say)


def as_parquet(tree: Tree, how: How) -> Tree:
    """The tree of a spec with a recipe, whose source rows are Parquet.

    Such a spec is complete only after its recipe is expanded, so its faults are found later.
    """
    given = tree.get("input")
    path = given.get("path") if isinstance(given, dict) else None
    if not isinstance(path, str) or not path:
        return tree
    source = None if _is_parquet(path) else _source(path)
    return tree if source is None else _imported(tree, source, how)


def _reach(tree: Tree) -> None:
    """Configure the stores as the spec says."""
    options = tree.get("storage_options")
    configure(options if isinstance(options, dict) else {})


def _is_sound(tree: Tree) -> bool:
    """Whether the spec has no fault but columns that an import may fill."""
    task = _task(tree)
    if task is None:
        return False
    drawn = _drawn(tree)
    needed = {*task.needs, *(("objects", "label_mask") if drawn else ())} - drawn
    columns = {part: "column" for part in needed} | _columns(tree)
    trial = {**tree, "input": {**tree["input"], "columns": columns}}
    try:
        build(trial)
    except SpecError:
        return False
    return True


def _task(tree: Tree) -> Task | None:
    name = str(tree.get("task", "text-to-image")).replace("_", "-")
    return task_named(name) if name in TASK_NAMES else None


def _drawn(tree: Tree) -> set[str]:
    """The parts that are drawn from labels, so that no column fills them."""
    section = tree.get("conditioning")
    makers = section.get("make") if isinstance(section, dict) else None
    names = {
        part: made.get("name") if isinstance(made, dict) else made
        for part, made in (makers.items() if isinstance(makers, dict) else ())
    }
    return {part for part, name in names.items() if name in FROM_LABELS}


def _columns(tree: Tree) -> dict[str, Any]:
    found = tree["input"].get("columns")
    return dict(found) if isinstance(found, dict) else {}


def _is_parquet(path: str) -> bool:
    """Whether the input is Parquet, by its name, or because a folder has such files."""
    if path.lower().endswith((PARQUET, *_NOT_PARQUET)):
        return path.lower().endswith(PARQUET)
    try:
        return any(one.path.lower().endswith(PARQUET) for one in find_files(path)[1])
    except InputError:
        return False


def _source(path: str) -> Source | None:
    """The source at a path; None if there is nothing, which planning reports.

    Raises:
        InputError: files of no kind that is known.
    """
    try:
        listing = listed(path)
    except InputError:
        return None
    kind = kind_of(listing)
    if kind is None:
        raise InputError(
            f"input {path}: it has no {PARQUET} file, and is of no other kind that can be "
            f"imported: {about_kinds()}; `batchgen import --kind` imports files with other names"
        )
    return Source(listing, kind, "bytes" if listing.is_local else "reference")


def _imported(tree: Tree, source: Source, how: How) -> Tree:
    """The tree with the path of the import."""
    output = tree["output"]["url"]
    if is_within(output, source.listing.source):
        raise InputError(
            f"output {output} is inside the input {source.listing.source}, so its images would be "
            "read as input; choose an output outside the input folder"
        )
    store = open_store(output if "://" in output else absolute(output))
    place = f"{INPUT}/{_name(source)}"
    known = _record(store, place)
    if known is None:
        if how.keep or not how.overwrite:
            _refuse_changed(store, source, how.overwrite)
        if how.keep:
            how.ready(output)
            known = _kept(tree, store, place, source, how)
        else:
            return _with_path(tree, *_for_now(tree, source, how))
    else:
        how.say(f"input: the import of {source.listing.source} in {store.url}/{place}")
    return _with_path(tree, f"{store.url}/{place}/{_ROWS}", known["roots"])


def _with_path(tree: Tree, path: str, roots: list[str]) -> Tree:
    given = {**tree["input"], "path": path}
    if roots and given.get("uri_roots") is None:
        given["uri_roots"] = list(roots)
    return {**tree, "input": given}


def _name(source: Source) -> str:
    """The name of a source's import: of its files, its kind, and how they are read."""
    facts = [_VERSION, source.listing.fingerprint, source.kind.name, source.images]
    if source.images == "reference":
        facts.append(source.listing.root)
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]


def _kept(tree: Tree, store: Store, place: str, source: Source, how: How) -> dict[str, Any]:
    """Import into the output; what an import without a plan left there is removed."""
    target = replace(target_at(f"{store.url}/{place}/{_ROWS}"), done=_SOURCE)
    how.say(f"input: importing {source.listing.source} ({source.kind.name}) to {target.url}")
    summary = import_source(source, target, None, how.tell, _limit(tree))
    _check(summary, tree)
    record = {
        "version": _VERSION,
        "source": source.listing.root,
        "given": source.listing.source,
        "kind": source.kind.name,
        "images": source.images,
        "rows": summary.rows,
        "rejected": summary.rejected,
        "roots": summary.roots,
        "fingerprint": source.listing.fingerprint,
        "files": source.listing.facts(),
    }
    store.put(f"{place}/{_SOURCE}", json.dumps(record).encode())
    if _PLAN not in store.list(_RECORDS):
        own = place.rpartition("/")[2]  # files directly in the folder are those of recipes
        old = [one for one in store.find(INPUT) if "/" in one and one.partition("/")[0] != own]
        delete_all(store, [f"{INPUT}/{name}" for name in old])
    how.say(_said(summary))
    return record


def _for_now(tree: Tree, source: Source, how: How) -> tuple[str, list[str]]:
    """Import into a temporary folder, with images by reference where that is possible."""
    folder = how.held.enter_context(tempfile.TemporaryDirectory(prefix="batchgen-input-"))
    short = Source(source.listing, source.kind, "reference")
    target = target_at(f"{folder}/{_ROWS}")
    summary = import_source(short, target, None, how.tell, _limit(tree))
    _check(summary, tree)
    how.say(_said(summary))
    return target.url, summary.roots


def _limit(tree: Tree) -> float:
    policy = tree.get("policy")
    limit = policy.get("rejected_limit") if isinstance(policy, dict) else None
    return float(_REJECTED_LIMIT if limit is None else limit)


def _check(summary: Summary, tree: Tree) -> None:
    limit = _limit(tree)
    if summary.share_rejected > limit:
        reason, message = next(iter(summary.examples.items()))
        raise LimitExceeded(
            f"input {summary.source}: {summary.rejected:,} of {summary.rows + summary.rejected:,} "
            f"rows were rejected, and policy.rejected_limit allows {limit:.0%}; the first for "
            f"{reason}: {message}"
        )


def _said(summary: Summary) -> str:
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in summary.reasons.items())
    more = f"; {summary.rejected:,} rejected ({rejected})" if rejected else ""
    return f"input: {summary.rows:,} rows of {summary.source} ({summary.kind}){more}"


def _record(store: Store, place: str) -> dict[str, Any] | None:
    """What is known about a complete import; None if there is none."""
    try:
        record = json.loads(store.read_record(f"{place}/{_SOURCE}"))
        return record if isinstance(record, dict) and isinstance(record["roots"], list) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _refuse_changed(store: Store, source: Source, overwrite: bool) -> None:
    """Refuse a source of an output that was planned from other files.

    Raises:
        PlanChanged: names up to five files that were changed, added or removed.
    """
    if overwrite or _PLAN not in store.list(_RECORDS):
        return
    hint = "restore it, use --overwrite to start again, or choose another output"
    folders = {name.partition("/")[0] for name in store.find(INPUT) if name.endswith(_SOURCE)}
    records = [_record(store, f"{INPUT}/{name}") for name in sorted(folders)]
    record = next((one for one in records if one is not None), None)
    if record is None:
        raise PlanChanged(
            f"output {store.url} was planned from another input than {source.listing.source}; "
            f"{hint}"
        )
    changes = _changes(record.get("files") or [], source.listing.facts())
    if not changes:
        was = f"{record.get('source')} (kind {record.get('kind')})"
        now = f"{source.listing.root} (kind {source.kind.name})"
        raise PlanChanged(f"output {store.url} was made from {was}, and this is {now}; {hint}")
    more = f" and {len(changes) - _NAMED:,} more" if len(changes) > _NAMED else ""
    raise PlanChanged(
        f"the source {source.listing.source} differs from that of output {store.url}: "
        f"{', '.join(changes[:_NAMED])}{more}; {hint}"
    )


def _changes(before: list[list[Any]], now: list[list[str | int]]) -> list[str]:
    """Files that are changed, added or removed, in words."""
    old = {one[0]: one[1:] for one in before}
    new = {one[0]: one[1:] for one in now}
    found, touched = [], []
    for name in sorted(old.keys() | new.keys(), key=str):
        if name not in new:
            found.append(f"{name} is gone")
        elif name not in old:
            found.append(f"{name} is new")
        elif old[name][0] != new[name][0]:
            found.append(f"{name} has {new[name][0]:,} bytes, and had {old[name][0]:,}")
        elif list(old[name]) != list(new[name]):
            touched.append(f"{name} was written again")
    return found + touched


def with_columns(tree: Tree, say: Callable[[str], None]) -> Tree:
    """The tree with the columns that a Parquet input declares in its metadata.

    They fill the parts of ``input.columns`` that the task uses and the spec leaves unset.
    """
    task, declared = _task(tree), _declared(tree["input"]["path"])
    if task is None or declared is None:
        return tree
    columns, drawn = _columns(tree), _drawn(tree)
    taken = {
        part: column
        for part, column in declared.items()
        if part in task.parts and part not in columns and part not in drawn
    }
    if "prompt" in task.takes and "prompt" not in {**columns, **declared}:
        columns["prompt"] = None
    if not taken:
        return {**tree, "input": {**tree["input"], "columns": columns}}
    words = [part if part == one else f"{part} from {one}" for part, one in taken.items()]
    say(f"input: columns as the file declares them: {', '.join(words)}")
    return {**tree, "input": {**tree["input"], "columns": {**columns, **taken}}}


def _declared(path: str) -> dict[str, str] | None:
    """Part -> column, as the first file's metadata says; None if it says nothing."""
    try:
        _, stats = find_files(path)
        with open_input(stats[0].path, path) as file:
            schema = pq.read_schema(file)
        columns = json.loads((schema.metadata or {})[b"batchgen"])["columns"]
        return {part: one for part, one in columns.items() if one in schema.names}
    except (InputError, pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        return None
    except (AttributeError, RecursionError):  # metadata of another shape
        return None
