"""Models on disk for tests to inspect and damage, and fresh processes that inspect them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchgen import models
from batchgen.errors import ModelError
from batchgen.records import ModelInfo
from batchgen.spec.build import build
from batchgen.spec.model import Model
from batchgen.spec.spec import Spec

TEXT, IMAGE = "text-to-image", "image-to-image"
ROOT = Path(__file__).parent.parent


def spec_of(folder: Path, task: str = TEXT, **model: Any) -> Spec:
    return build(
        {
            "input": {"path": "x", "columns": {"image": "image"} if task == IMAGE else {}},
            "output": {"url": "y"},
            "task": task,
            "model": {"path": str(folder), "dtype": "float32", **model},
            "resources": {"batch_size": 2},
        }
    )


def inspect(folder: Path | str, task: str = TEXT, **model: Any) -> ModelInfo:
    return models.inspect(Model(path=str(folder), **model), task)


def refusal(folder: Path | str, task: str = TEXT, **model: Any) -> str:
    with pytest.raises(ModelError) as caught:
        inspect(folder, task, **model)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def run_python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
