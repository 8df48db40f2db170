"""A copy of the package with two more settings, made as CONTRIBUTING.md says: in four files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# File of the package -> (text, text that replaces its first occurrence). ``style`` is a text and
# ``repeats`` a whole number; the text encoder reads both.
EDITS: dict[str, tuple[tuple[str, str], ...]] = {
    "spec/sections.py": (
        (
            "    scheduler: str | None = None\n",
            "    scheduler: str | None = None\n"
            "    style: str | None = None\n"
            "    repeats: str | None = None\n",
        ),
        (
            "    eta: Eta = ",
            "    style: Annotated[str, Field(max_length=20)] = "
            'Field(default="", description="words after each prompt")\n'
            "    repeats: Annotated[int, Field(ge=1, le=2)] = "
            'Field(default=1, description="of each prompt")\n'
            "    eta: Eta = ",
        ),
    ),
    "records.py": (
        (
            "    scheduler: str | None = None\n",
            "    scheduler: str | None = None\n"
            "    style: str | None = None\n"
            "    repeats: int | None = None\n",
        ),
    ),
    "spec/tasks.py": (
        ('"negative_prompt", "lora")', '"negative_prompt", "lora", "style", "repeats")'),
    ),
    "families/stable_diffusion.py": (
        ("negative: bool) ->", "negative: bool, style: str = '', repeats: int = 1) ->"),
        (
            "        prompt, device_of(pipeline), 1, do_classifier_free_guidance=False\n",
            "        ' '.join([prompt] * repeats + [style]), device_of(pipeline), 1, False\n",
        ),
        (
            "            encode_prompt=encode_prompt,\n",
            "            encode_prompt=encode_prompt,\n"
            "            prompt_settings=('style', 'repeats'),\n",
        ),
        ('settings=("eta",)', 'settings=("eta", "style", "repeats")'),
    ),
}


def edited_package(folder: Path) -> Path:
    """Copy the package into a folder, with the two settings, and return the folder."""
    shutil.copytree(
        ROOT / "batchgen", folder / "batchgen", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, edits in EDITS.items():
        path = folder / "batchgen" / name
        text = path.read_text()
        for before, after in edits:
            assert before in text, f"{name} has no {before!r}: update this table"
            text = text.replace(before, after, 1)
        path.write_text(text)
    return folder


def run_edited(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with the copy in place of the package, and with this folder of tests."""
    places = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": places},
        cwd=folder,
        capture_output=True,
        text=True,
    )
