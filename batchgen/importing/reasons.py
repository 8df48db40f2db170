"""Why a row of a source was not imported: every reason, once. docs/import.md has this list."""

from __future__ import annotations

# Reason -> its cause. <image> is the name of a column of images: image, mask, label_mask, ...
REASONS: dict[str, str] = {
    "null-<image>": "an image file with zero bytes",
    "undecodable-<image>": "not an image, or a damaged one",
    "unsupported-<image>": "an image without a format that batchgen reads",
    "<image>-too-large": "more than 128 Mi pixels (11585 x 11585), or more than 64 MiB",
    "missing-<image>": "the image that the row names is not in the source",
    "forbidden-<image>": "the image that the row names is outside of the source and of "
    "`--image-root`",
    "bad-objects": "an object with a wrong box, polygon, mask or keypoint, an id that occurs "
    "twice, or objects that do not fit their image",
    "unknown-category": "an object of a category, or a class number, that the source does not list",
    "unknown-image": "an annotation of an image that the source does not list",
    "bad-label_mask": "a mask of classes whose size differs from that of its image",
    "duplicate-key": "a key, id or class name that an earlier row has",
    "not-utf8": "text that is not UTF-8",
    "bad-fields": "a line of a CSV file with a wrong number of fields, or with a quote that is not "
    "closed",
    "bad-json": "a line, or the JSON of a sample, that is not a JSON object",
    "bad-xml": "an XML file that is damaged, that declares entities, or without what VOC needs",
    "bad-line": "a line of a YOLO label file with a wrong number of values, or values that are no "
    "numbers",
    "bad-value": "a value that does not fit the type of its column",
    "no-image": "a sample of a WebDataset without an image, or with several",
    "damaged-file": "a file of the source that ends too early or cannot be read; its rows up to "
    "there are imported",
}


def is_reason(name: str) -> bool:
    """Whether the list has it, as it is or by one of its patterns."""
    return any(_fits(name, listed) for listed in REASONS)


def _fits(name: str, listed: str) -> bool:
    before, mark, rest = listed.partition("<")
    after = rest.partition(">")[2]
    if not mark:
        return name == listed
    return name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)


def table() -> str:
    """The rows of the table in docs/import.md."""
    return "".join(f"| `{name}` | {cause} |\n" for name, cause in REASONS.items())
