"""Writes a training set of real and synthetic images: its manifest, its images, its card."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from batchgen import __version__
from batchgen.curate.mix_set import Mixed, MixRow, Source
from batchgen.errors import InputError, RejectRow, SpecError
from batchgen.images.files import encode_image
from batchgen.images.source import open_image
from batchgen.labels.columns import IMAGE
from batchgen.output.finished import refuse_unless_empty
from batchgen.output.formats import FORMATS, parquet_bytes
from batchgen.output.formats.format import SCHEMAS
from batchgen.plan.keys import safe_key
from batchgen.storage import Store, is_within, open_input

MANIFEST, RECORD, LEFT_OUT, CARD = "manifest.parquet", "mix.json", "left-out.parquet", "README.md"
_SHARD = 1000  # images of a materialised file
_ENDINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}  # by their first bytes


UNFINISHED = "UNFINISHED.txt"  # there from the first file on until the set is complete
_TOLD = (
    "batchgen mix has not written all of this training set: it is at work, or it was interrupted.\n"
    "If it is no longer at work, remove this folder and mix again.\n"
)


def write_mix(mixed: Mixed, target: Store, form: str | None = None) -> None:
    """Write the training set to an empty folder; the manifest last.

    Args:
        form: also write the images, in this output format.

    Raises:
        SpecError: there is no such format.
        InputError: the folder is not empty, or inside one of the sets.
    """
    if form is None:
        check_places(mixed)
    target.put(UNFINISHED, _TOLD.encode())
    if form is not None:
        _write_images(mixed, target, form)
    if mixed.left_out:
        rows = [asdict(one) for one in mixed.left_out]
        target.put(LEFT_OUT, parquet_bytes(pa.Table.from_pylist(rows)))
    target.put(CARD, card_of(mixed, form).encode())
    target.put(RECORD, (json.dumps(record_of(mixed, form), indent=1) + "\n").encode())
    target.put(MANIFEST, parquet_bytes(manifest_of(mixed)))
    target.delete(UNFINISHED)


def check_target(sources: Sequence[Source], target: Store, form: str | None) -> None:
    """Refuse a wrong format, a folder with files, and one that is inside of a set."""
    if form is not None and form not in FORMATS:
        raise SpecError("--materialise", form, ", ".join(FORMATS))
    for one in sources:
        if is_within(target.url, one.images.place):
            raise InputError(f"target {target.url} is inside the set {one.images.place}")
    if UNFINISHED in target.list(""):
        raise InputError(
            f"target {target.url} holds a training set that is not complete ({UNFINISHED}): "
            "another `batchgen mix` is at work, or it was interrupted; then remove the folder"
        )
    refuse_unless_empty(target)


def check_places(mixed: Mixed) -> None:
    """Refuse rows whose images the manifest cannot name: those inside of archives.

    Raises:
        InputError: names the set, and what to do.
    """
    for one in mixed.sources:
        if one.images.kind not in ("output", "parquet", "image-folder"):
            raise InputError(
                f"{one.images.place} is of the kind {one.images.kind}, whose images a manifest "
                "cannot name; `batchgen import` turns it into Parquet, or use --materialise"
            )
    for row in mixed.rows:
        if row.file.endswith(".tar"):
            raise InputError(
                f"{row.file} is an archive, whose images a manifest cannot name; use "
                "--materialise, or `batchgen export --format parquet`"
            )
    _refuse_paths(mixed)


def _refuse_paths(mixed: Mixed) -> None:
    """Refuse rows of Parquet files that have the path of an image, and not its bytes."""
    columns = {one.name: one.images.image for one in mixed.sources if one.images.kind == "parquet"}
    used: dict[tuple[str, str], dict[int, str]] = {}
    for row in mixed.rows:
        if row.row is not None and row.set in columns:
            used.setdefault((row.file, columns[row.set]), {})[row.row] = row.key
    for (file, column), keys in used.items():
        for number in _without_bytes(file, column):
            if number in keys:
                raise InputError(
                    f"{file}: row {number} ({keys[number]}) has the path of an image in the column "
                    f"{column!r}, and not its bytes; `batchgen import` copies them, or use "
                    "--materialise"
                )


def _without_bytes(place: str, column: str) -> Iterator[int]:
    """The rows of a Parquet file without the bytes of an image; others are read only if needed."""
    with open_input(place, place) as file:
        parquet, first = pq.ParquetFile(file, pre_buffer=False), 0
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            leaves = [group.column(one) for one in range(group.num_columns)]
            told = [one for one in leaves if one.path_in_schema in (column, f"{column}.bytes")]
            if not all(_is_full(one) for one in told):
                table = parquet.read_row_group(number, columns=[column], use_threads=False)
                for at, image in enumerate(table.column(column).to_pylist()):
                    data = image.get("bytes") if isinstance(image, Mapping) else image
                    if not isinstance(data, bytes):
                        yield first + at
            first += group.num_rows


def _is_full(leaf: Any) -> bool:
    """Whether a column of a row group has bytes in each row, as its statistics say."""
    is_text = leaf.statistics is not None and str(leaf.statistics.logical_type) == "String"
    return bool(
        leaf.statistics is not None
        and leaf.statistics.has_null_count
        and not leaf.statistics.null_count
        and not is_text
    )


def manifest_of(mixed: Mixed) -> pa.Table:
    """One row for each image: where it is, and how it is used."""
    numbers = {name: number for number, name in enumerate(mixed.classes)}
    rows = mixed.rows
    columns: dict[str, pa.Array] = {
        "key": pa.array([row.key for row in rows], pa.string()),
        **_columns(rows, numbers),
        "file": pa.array([row.file for row in rows], pa.string()),
        "row": pa.array([row.row for row in rows], pa.int64()),
        "source_key": pa.array([row.source_key for row in rows], pa.string()),
    }
    table = pa.table(columns)
    told = {
        "replace_probability": mixed.mix.replace_probability,
        "replace_by": "source-or-label" if mixed.by_source else "label",
        "columns": {"image": "file", "images": _image_columns(mixed.sources)},
    }
    return table.replace_schema_metadata(_metadata(table.schema, mixed.classes, told))


def _image_columns(sources: Sequence[Source]) -> dict[str, str]:
    """Set -> its column of images."""
    return {one.name: one.images.image for one in sources}


def _columns(rows: Sequence[MixRow], numbers: Mapping[str, int]) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {
        "label": pa.array([numbers[row.label] for row in rows], pa.int64()),
        "is_synthetic": pa.array([row.is_synthetic for row in rows], pa.bool_()),
        "set": pa.array([row.set for row in rows], pa.string()),
        "weight": pa.array([row.weight for row in rows], pa.float32()),
    }
    if rows and rows[0].soft is not None:
        soft = [list(row.soft or ()) for row in rows]
        columns["soft_label"] = pa.array(soft, pa.list_(pa.float32()))
    return columns


def _metadata(schema: pa.Schema, classes: Sequence[str], told: Mapping[str, Any]) -> dict[str, str]:
    features: dict[str, Any] = {}
    for one in schema:
        if one.name == "label" and pa.types.is_integer(one.type):
            features[one.name] = {"names": list(classes), "_type": "ClassLabel"}
        elif one.type == IMAGE:
            features[one.name] = {"_type": "Image"}
        elif pa.types.is_list(one.type):
            inner = {"dtype": "float32", "_type": "Value"}
            features[one.name] = {"feature": inner, "_type": "List"}
        else:
            kind = {"double": "float64", "float": "float32"}.get(str(one.type), str(one.type))
            features[one.name] = {"dtype": kind, "_type": "Value"}
    return {
        "huggingface": json.dumps({"info": {"features": features}}),
        "batchgen": json.dumps(told),
    }


def _write_images(mixed: Mixed, target: Store, form: str) -> None:
    """Write the images of all rows in an output format, a bounded number at a time."""
    shards = -(-len(mixed.rows) // _SHARD)
    written = FORMATS[form]
    for shard, batch in enumerate(_batches(mixed)):
        table = _table(batch, mixed.classes, form)
        for file in written.files(table, shard, shards):
            if not file.name.startswith(f"{SCHEMAS}/"):
                target.put(file.name, file.data)


def _batches(mixed: Mixed) -> Iterator[list[tuple[MixRow, bytes]]]:
    batch: list[tuple[MixRow, bytes]] = []
    for source in mixed.sources:
        wanted = {row.key: row for row in mixed.rows if row.set == source.name}
        for row in source.rows(True):
            if row.key in wanted:
                batch.append((wanted.pop(row.key), _bytes_of(row.image, row.key, source)))
            if len(batch) == _SHARD:
                yield batch
                batch = []
        if wanted:
            raise InputError(f"{source.images.place} changed: it has no row {next(iter(wanted))}")
    if batch:
        yield batch


def _bytes_of(image: object, key: str, source: Source) -> bytes:
    """The file of an image; one of a format that outputs do not have is turned into a PNG."""
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(data, bytes):
        raise InputError(f"{source.images.place}: row {key} has no image bytes")
    if _ending(data) is not None:
        return data
    try:
        return encode_image(np.asarray(open_image(data)), "png", 0)
    except RejectRow as error:
        raise InputError(f"{source.images.place}: row {key}: {error.message}") from error


def _ending(data: bytes) -> str | None:
    return next((name for start, name in _ENDINGS.items() if data.startswith(start)), None)


def _table(batch: Sequence[tuple[MixRow, bytes]], classes: Sequence[str], form: str) -> pa.Table:
    rows = [row for row, _ in batch]
    columns = _columns(rows, {name: number for number, name in enumerate(classes)})
    if form == "image-folder":
        columns["label"] = pa.array([row.label for row in rows], pa.string())
    keys = [safe_key(f"{row.set}-{row.key}") for row in rows]
    images = [
        {"bytes": data, "path": f"{key}.{_ending(data)}"}
        for key, (_, data) in zip(keys, batch, strict=True)
    ]
    table = pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "image": pa.array(images, IMAGE),
            "prompt": pa.array([row.prompt for row in rows], pa.string()),
            **columns,
            "source_key": pa.array([row.source_key for row in rows], pa.string()),
        }
    )
    return table.replace_schema_metadata(_metadata(table.schema, classes, {}))


def record_of(mixed: Mixed, form: str | None) -> dict[str, Any]:
    """The record of a mix: settings, fingerprints of the sets, counts."""
    reasons = Counter(one.reason for one in mixed.left_out)
    return {
        "version": 1,
        "batchgen_version": __version__,
        "mix": asdict(mixed.mix),
        "sets": {
            one.name: {
                "place": one.images.place,
                "fingerprint": one.images.fingerprint,
                "selected": None if one.keys is None else len(one.keys),
            }
            for one in mixed.sources
        },
        "classes": list(mixed.classes),
        "rows": len(mixed.rows),
        "counts": mixed.counts(),
        "left_out": dict(sorted(reasons.items())),
        "not_drawn": mixed.not_drawn,
        "short": {name: list(pair) for name, pair in mixed.short.items()},
        "only_real": mixed.only_real,
        "unread_held_out": mixed.unread,
        "materialised": form,
    }


def card_of(mixed: Mixed, form: str | None) -> str:
    """The card of the training set: counts per class and set, what was left out, licences."""
    files = FORMATS[form].data_files() if form else MANIFEST
    front = {
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "batchgen"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    counts, names = mixed.counts(), [one.name for one in mixed.sources]
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        "# A training set of real and synthetic images\n",
        f"Mixed with batchgen {__version__}. The images of `synthetic` sets (`is_synthetic`) were "
        "made by a generative model.\n",
        "## Images of each class and set\n",
        f"| class | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}",
        *(
            f"| {_cell(label)} | {' | '.join(f'{counts[one].get(label, 0):,}' for one in names)} |"
            for label in mixed.classes
        ),
        "\n## Sets\n\n| set | place | licence as given |\n| --- | --- | --- |",
        *(
            f"| {one.name} | {_cell(posixpath.basename(one.images.place.rstrip('/')))} | "
            f"{_cell(licence_of(one))} |"
            for one in mixed.sources
        ),
        "\n## How it was mixed\n",
        *(f"- {name}: {value}" for name, value in _facts(mixed)),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def licence_of(source: Source) -> str:
    """The licence that an output's spec gives; real sets do not say theirs in a common way."""
    if source.images.ledger is None:
        return "not given"
    return str(source.images.ledger.require_plan().spec.output.license or "not given")


def _facts(mixed: Mixed) -> Iterator[tuple[str, object]]:
    mix = mixed.mix
    if mix.ratio is not None:
        yield "synthetic images for each real one", f"{mix.ratio:g}"
    if mix.count is not None:
        yield f"synthetic images of each {mix.per}", mix.count
    yield "seed", mix.seed
    if mix.replace_probability:
        own = "one made from it, if there is one, else by "
        by = f"{own if mixed.by_source else ''}one of its class"
        yield f"probability of replacing a real image by {by}", mix.replace_probability
    yield "held-out sets that were compared", len(mix.held_out)
    if mixed.unread:
        yield "held-out images that cannot be read", f"{sum(mixed.unread.values()):,}"
    for reason, count in sorted(Counter(one.reason for one in mixed.left_out).items()):
        yield f"left out, {reason}", f"{count:,}"
    yield "synthetic images that were not drawn", f"{mixed.not_drawn:,}"
    if mixed.only_real:
        yield "classes without synthetic images", ", ".join(mixed.only_real)
    for name, (has, asked) in mixed.short.items():
        yield f"fewer than asked of {name}", f"{has:,} of {asked:,}"
