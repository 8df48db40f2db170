"""Why a sample was not made of a row: every reason, once. docs/recipes.md has this list."""

from __future__ import annotations

# Reason -> its cause. <field> is the name of a field of the recipe.
REASONS: dict[str, str] = {
    "null-key": "the column of keys is null",
    "not-utf8": "a template reads binary data, or text that is not UTF-8",
    "undefined-variable": "a template reads a column that the row does not have, or that is null",
    "bad-template": "a template cannot be made of these values: a wrong type, a text that is too "
    "long, too many loops",
    "empty-prompt": "the template makes no text",
    "bad-<field>": "the column of a sampling setting has a value that is not allowed",
    "null-class": "the class is null, and the recipe needs it",
    "unknown-class": "a class that the table of classes, or the table of images, does not have",
    "no-pair": "no source image fits: no other image of the class, no other class, or no such key",
    "no-answer": "the language model gave an empty answer",
}


class Refused(Exception):
    """A sample cannot be made of this row; the other rows continue."""

    def __init__(self, reason: str, message: str) -> None:
        if not is_reason(reason):
            raise AssertionError(f"{reason} is not in the list of reasons")
        super().__init__(message)
        self.reason = reason


def is_reason(name: str) -> bool:
    """Whether the list has it, as it is or by its pattern."""
    return name in REASONS or (name.startswith("bad-") and len(name) > len("bad-"))


def table() -> str:
    """The rows of the table in docs/recipes.md."""
    return "".join(f"| `{name}` | {cause} |\n" for name, cause in REASONS.items())
