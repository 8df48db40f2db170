"""Reads arguments and base classes of diffusers from its source: importing it takes seconds."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REQUIRED = object()  # the default of an argument without a default


def defaults_of(scheduler: str) -> dict[str, Any]:
    """Map the options of a scheduler's constructor to their defaults."""
    for node in _class(scheduler, "schedulers").body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names = [one.arg for one in node.args.args[1:]]
            given = [_literal(one) for one in node.args.defaults]
            return dict(zip(names, [REQUIRED] * (len(names) - len(given)) + given, strict=True))
    return {}


def mixins_of(pipeline: str) -> frozenset[str]:
    """Return the names of all base classes of a pipeline, direct and indirect."""
    found: set[str] = set()
    waiting = [pipeline]
    while waiting:
        for base in _class(waiting.pop(), "pipelines").bases:
            name = ast.unparse(base)
            found.add(name)
            if name.endswith("Pipeline") and name != "DiffusionPipeline":
                waiting.append(name)
    return frozenset(found)


@cache
def _class(name: str, folder: str) -> ast.ClassDef:
    library = find_spec("diffusers")
    assert library is not None
    assert library.origin is not None
    for path in sorted((Path(library.origin).parent / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if f"\nclass {name}(" in text:
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return node
    raise LookupError(f"diffusers has no {name} in its {folder}")


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
