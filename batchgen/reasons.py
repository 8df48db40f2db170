"""Why a sample is not in ``data/``: every reason, once. docs/input.md is compared with this list.

A reason is counted in markers, cards and reports, and selected by ``batchgen rejects --reason``:
one that was ever given keeps its name.
"""

from __future__ import annotations

# Reason -> its cause. <image> is image or mask, <setting> and <text> are names of columns' parts.
REASONS: dict[str, str] = {
    "other-split": "a split that is not in `input.splits`; such rows do not count towards "
    "`policy.rejected_limit`",
    "null-prompt": "the prompt is null",
    "empty-prompt": "the prompt has no text",
    "null-key": "the key column is null",
    "null-class": "the class is null",
    "unknown-class": "a class that the model does not know",
    "not-utf8": "text that is not UTF-8",
    "bad-<setting>": "a setting that is out of range, is not a number, or is not supported by this "
    "model: `bad-guidance_scale`, `bad-scheduler`, `bad-lora`, `bad-regions`, `bad-seed` and so on",
    "bad-prompt": "with `model.prompt_weighting`: a prompt whose weighting cannot be parsed",
    "bad-negative_prompt": "with `model.prompt_weighting`: the same for the negative prompt",
    "long-<text>": "more than 10,000 characters in a column of text, such as `prompt`. This is "
    "more than twice what the longest text encoder reads, so it is a mistake and not a prompt; "
    "3 MB of text took a minute to tokenize",
    "strength-too-low": "strength x steps leaves no step to run",
    "null-<image>": "no image, or zero bytes",
    "forbidden-uri": "a URI outside `input.uri_roots`",
    "missing-uri": "nothing at the URI",
    "large-uri": "more than `input.uri_limit_bytes` at the URI",
    "uri-timeout": "a URI that takes longer than `input.uri_timeout_s`",
    "denied-uri": 'no permission to read: file permissions on a disk, "access denied" for this '
    "key, 401 or 403 from a web server",
    "bad-uri": "not a readable URI: malformed, unknown protocol, a folder, a pipe, a loop of "
    "links, or a name that is too long",
    "unreachable-uri": "an `https://` host that does not answer",
    "undecodable-<image>": "not an image, or a damaged one",
    "unsupported-<image>": "an unsupported kind of image, such as floating point",
    "<image>-too-large": "more pixels than `input.image_limit_pixels`, by default 8192 x 8192",
    "<image>-too-small": "with `multiple-of`: smaller than any size that the model supports",
    "mask-size": "a mask whose shape differs from its image",
    "empty-mask": "a mask without white pixels, before or after fitting",
    "bad-objects": "an object with a wrong box, polygon, mask, keypoint or category, or objects "
    "that do not belong to their image",
    "bad-label_mask": "a label mask whose shape differs from that of its image, or with "
    "impossible classes",
    "not-selected": "only in a copy that `export --selection` has made: the sample is not in the "
    "selection",
    "flat-image": "the generated image has one single colour (`policy.reject_flat`)",
    "blank-image": "the scorer `quality` finds the image blank (`policy.reject_blank`)",
    "dark-image": "the same for dark (`policy.reject_dark`)",
    "blurred-image": "the same for blurred (`policy.reject_blurred`)",
    "not-safe": "the scorer `nsfw` finds the image not safe for work (`policy.nsfw: reject`)",
}
# The same for samples that failed: the row is not at fault.
FAILURES: dict[str, str] = {
    "non-finite": "the model gave NaN or infinite pixels",
    "fails-its-shard": "every attempt at the shard ended while it worked on this sample, the last "
    "time on this sample alone",
}


def is_reason(name: str) -> bool:
    """The list has it, as it is or by one of its patterns."""
    return any(_fits(name, listed) for listed in (*REASONS, *FAILURES))


def _fits(name: str, listed: str) -> bool:
    before, mark, rest = listed.partition("<")
    after = rest.partition(">")[2]
    if not mark:
        return name == listed
    filled = name.startswith(before) and name.endswith(after)
    return filled and len(name) > len(before) + len(after)


def table() -> str:
    """The rows of the table in docs/input.md."""
    return "".join(f"| `{name}` | {cause} |\n" for name, cause in {**REASONS, **FAILURES}.items())
