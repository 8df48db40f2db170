"""The rooms of the package, floor by floor; `python -m tests.house` prints docs/code.md from it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "batchgen"
PAGE = Path(__file__).parents[1] / "docs" / "code.md"

# Room -> what it is for. A room imports from lower floors only, never from its own.
FLOORS: dict[int, dict[str, str]] = {
    10: {"cli": "commands, options to spec, exit codes, task pages, `doctor`"},
    9: {"runner": "the job on a page: plan, pending shards, stream, finalize"},
    8: {
        "engine": "the Ray Data graph: actors, pools, readers, demand, attempts shared, metrics",
    },
    7: {
        "shard": "one shard: rows to samples (`prepare`), the stages composed, images scored, "
        "encoded and committed; a shard as bytes on its way between actors",
        "report": "dataset card, HTML page, contact sheet",
        "progress": "how counts and rates are shown while a run is at work",
    },
    6: {
        "input": "rows and spans of the input dataset, conditioning images at URIs",
        "output": "what lies in an output: ledger, lease, markers, counts, rejects, the three "
        "formats, and what is done with a finished one: verify, repair, export, clean",
    },
    5: {
        "plan": "rows to shards, checks before work, settings of each call, the saved plan",
        "models": "from the spec's model to ready stages: find, check, load, quantize; tiny models",
        "cluster": "Ray started or joined, its daemons and devices, jobs submitted, spot machines",
    },
    4: {
        "spec": "what the user asked for, validated once; the tasks and their columns",
        "stages": "encode, denoise, decode, score: functions of a batch that hold model parts",
    },
    3: {
        "families": "one file a model family: what its pipelines take; the schedulers",
        "images": "conditioning images opened, fitted and made; images written and shown",
        "storage": "stores behind a handful of verbs, their faults; records read tolerantly; "
        "the cache of model files",
    },
    2: {"errors": "reject the row, retry the shard, stop the job"},
    1: {
        "records": "the value on each arrow of the stream; what is known of a model",
        "attempts": "what became of each try at a shard, and what follows",
        "secrets": "where a secret may stand, and texts without any",
        "plain_text": "what a terminal is shown",
        "batchgen": "the package's own name: its version",
    },
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# Foreign library -> the rooms that may load it. What is not here is loaded nowhere.
HOMES = {
    "accelerate": ("models",),
    "aiobotocore": ("storage",),
    "click": ("cli",),
    "compel": ("models",),
    "cv2": ("images",),
    "diffusers": ("models", "families"),
    "fsspec": ("storage",),
    "huggingface_hub": ("models",),
    "isal": ("images",),
    "jinja2": ("report",),
    "PIL": ("images", "families"),
    "packaging": ("cluster",),
    "pydantic": ("storage", "spec", "plan", "shard"),
    "pyparsing": ("models",),
    "ray": ("engine", "cluster"),
    "rich": ("progress",),
    "safetensors": ("models", "shard"),
    "tokenizers": ("models",),
    "torch": ("families", "stages", "models", "shard", "engine", "cluster"),
    "torchao": ("models",),
    "transformers": ("models",),
    "yaml": ("spec", "cli", "output", "report"),
}

HEAD = """\
# Code layout

This page is generated: `python -m tests.house > docs/code.md`. A test compares it with the code.

Data flows one way, through rooms (modules and packages of `batchgen/`) named for the stream:

```
 spec ──> plan ──> input ──> shard ─────────────────────────────> output ──> report
 what     rows     rows,     one shard, in an actor:              markers,   card,
 was      to       images    prepare > encode > denoise > decode  formats,   page,
 asked    shards   at URIs   > score > commit                     verify     gallery
                             └─ stages, families and models ─┘
          └───────────── engine: one Ray Data stream, one row = one shard ─────────┘
 runner: the page that joins them          cli: commands over the runner and over finished outputs
```

Read `batchgen/runner.py` first: it is the job on a page. A room imports lower floors only, never
its own or a higher one. To find the files that a change touches, see
[How do I add ...](../CONTRIBUTING.md#how-do-i-add-).

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
The words have one meaning each; [CONTRIBUTING.md](../CONTRIBUTING.md) lists them. The reasons for
the large decisions are in [docs/decisions](decisions/README.md). `tests/unit/test_rules.py` asserts
the rules:

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
        if path.name != "__init__.py"
    ]
    return f"\n### {room}\n\n{''.join(lines)}"


def _sentence(path: Path) -> str:
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(told.partition("\n\n")[0].split())


if __name__ == "__main__":
    print(page(), end="")
