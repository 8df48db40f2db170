"""Writes a shard's files: accepted samples in the format of the plan, and rejects as Parquet."""

from __future__ import annotations

from batchgen.labels.columns import IMAGE
from batchgen.output.formats.choose import FORMATS, format_of
from batchgen.output.formats.format import SCHEMAS, UNREADABLE, DataFile, Format, label_names
from batchgen.output.formats.parquet import parquet_bytes, read_parquet
from batchgen.output.formats.tables import (
    COLUMNS,
    EXTRA_COLUMNS,
    REJECT_COLUMNS,
    Finished,
    conditioning_text,
    data_table,
    image_extension,
    kept_columns,
    label_counts,
    lora_text,
    output_schema,
    own_columns,
    rejects_table,
)

__all__ = [
    "COLUMNS",
    "EXTRA_COLUMNS",
    "FORMATS",
    "IMAGE",
    "REJECT_COLUMNS",
    "SCHEMAS",
    "UNREADABLE",
    "DataFile",
    "Finished",
    "Format",
    "conditioning_text",
    "data_table",
    "format_of",
    "image_extension",
    "kept_columns",
    "label_counts",
    "label_names",
    "lora_text",
    "output_schema",
    "own_columns",
    "parquet_bytes",
    "read_parquet",
    "rejects_table",
]
