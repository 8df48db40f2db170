"""How well scorers find faults that were planted in images of the shipped model.

    python benchmarks/planted_faults.py [--work FOLDER] [--clean 1000] [--planted 500]

Images of the demo's prompts are made by `batchgen run`. One half of them only sets limits; of the
other half, ``--clean`` stay as they are, and copies of ``--planted`` of them get one fault each:

- ``black``: every value 0; ``blank``: one random colour; ``nearly_blank``: the same with noise of
  one level, as JPEG leaves it;
- ``dark``: a tenth of the light; ``blurred_1``, ``blurred_2``: a Gaussian of that many pixels;
- ``wrong_class``: label and prompt of another image, so that only the text is wrong.

For each fault it tells the share that is found and the number of false alarms among the clean ones,
with a 95 % interval (Wilson). Faults of pixels are judged by the scorer `quality` with its default
limits, and with limits at the lowest value that the first half has, of all or of its class. The
wrong class is judged by the shipped CLIP: by zero-shot agreement, by a margin below the first
half's 1st percentile, and by similarity below its 1st percentile. Images in which the generator
itself drew another class count as false alarms. It writes ``results/planted_faults.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen.images.files import pixels_in
from batchgen.models.scorers import check_scorers, load_scorers
from batchgen.spec.score_section import read_scorer
from batchgen.stages.scorers.scorer import Scored
from jobs.demo_prompts import prompts

RESULTS = Path(__file__).parent / "results" / "planted_faults.json"
SIMILAR, SHARP = "clip_similarity", "relative_sharpness"
CLIP = "digits-shapes-clip"
TEMPLATE = "a picture of a {label}"
Array = np.ndarray[Any, Any]
Rows = dict[str, list[Any]]


def made(work: Path, images: int) -> tuple[list[Array], Rows]:
    """Images of the demo's prompts with their labels, in the order of their keys."""
    source, out = work / "prompts.parquet", work / "images"
    texts, labels = zip(*prompts(), strict=True)
    table = pa.table({"prompt": texts, "label": labels})
    if not source.exists():  # a folder that is given again is continued
        pq.write_table(table, source)
    variants = -(-images // table.num_rows)
    run = ["run", "--input", str(source), "--output", str(out), "--label-column", "label"]
    command = [sys.executable, "-m", "batchgen", *run, "--variants", str(variants)]
    subprocess.run(command, check=True)
    rows = pq.read_table(out / "data").sort_by("key").to_pylist()
    dice = np.random.default_rng(0)
    rows = [rows[place] for place in dice.permutation(len(rows))]
    pixels = [pixels_in(row["image"]["bytes"]) for row in rows]
    return pixels, {name: [row[name] for row in rows] for name in ("prompt", "label")}


def blurred(radius: float) -> Callable[[Array, np.random.Generator], Array]:
    def blur(pixels: Array, dice: np.random.Generator) -> Array:
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))

    return blur


def blank(pixels: Array, dice: np.random.Generator) -> Array:
    return np.broadcast_to(dice.integers(0, 256, 3, np.uint8), pixels.shape).copy()


def nearly_blank(pixels: Array, dice: np.random.Generator) -> Array:
    flat = dice.integers(1, 255, 3) + dice.integers(-1, 2, pixels.shape)
    return flat.astype(np.uint8)


FAULTS: Mapping[str, Callable[[Array, np.random.Generator], Array]] = {
    "black": lambda pixels, dice: np.zeros_like(pixels),
    "blank": blank,
    "nearly_blank": nearly_blank,
    "dark": lambda pixels, dice: pixels // 10,
    "blurred_1": blurred(1),
    "blurred_2": blurred(2),
}


def scored(pixels: list[Array], rows: Rows) -> dict[str, Array]:
    """The columns of all scorers."""
    asked = ["quality", f"clip={CLIP}"]
    zero_shot = {"scorer": "zero-shot", "model": CLIP, "options": {"template": TEMPLATE}}
    specs = [read_scorer(one) for one in (*asked, json.dumps(zero_shot))]
    schema = pa.schema([("prompt", pa.string()), ("label", pa.string())])
    labels = {label for _, label in prompts()}
    found: dict[str, Any] = {"label": rows["label"]}
    for scorer in load_scorers(check_scorers(specs, schema, lambda name: labels)):
        found |= scorer(Scored(pixels, rows))
    return {name: np.array(values) for name, values in found.items()}


def wrong(rows: Rows, dice: np.random.Generator) -> Rows:
    """Label and prompt of another image, with another label."""
    found: Rows = {"prompt": [], "label": []}
    for label in rows["label"]:
        others = [place for place, one in enumerate(rows["label"]) if one != label]
        place = int(dice.choice(others))
        for name, values in found.items():
            values.append(rows[name][place])
    return found


def interval(hits: int, of: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, hits / of
    middle = share + z * z / (2 * of)
    wide = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return [round((middle + sign * wide) / (1 + z * z / of), 4) for sign in (-1, 1)]


def rates(judge: Callable[[dict[str, Array]], Array], bad: Any, clean: Any) -> dict[str, Any]:
    hits, alarms = judge(bad), judge(clean)
    return {
        "found": round(float(hits.mean()), 4),
        "found_95": interval(int(hits.sum()), len(hits)),
        "of": len(hits),
        "false_alarms": int(alarms.sum()),
        "false_alarms_95": interval(int(alarms.sum()), len(alarms)),
        "clean": len(alarms),
    }


def judges(first: dict[str, Array]) -> dict[str, dict[str, Callable[[dict[str, Array]], Array]]]:
    """Fault -> how it is judged -> the judge, with limits from the first half where it says so."""
    sharp, bright = first[SHARP].min(), first["brightness"].min()
    of_class = {label: first[SHARP][first["label"] == label].min() for label in set(first["label"])}

    def below(one: dict[str, Array]) -> Array:
        return one[SHARP] < np.array([of_class[label] for label in one["label"]])

    margin, similar = (np.quantile(first[name], 0.01) for name in ("zero_shot_margin", SIMILAR))
    blanks = {"quality": lambda one: one["is_blank"]}
    blurs = {
        "quality": lambda one: one["is_blurred"],
        f"relative_sharpness < {sharp:.4f}": lambda one: one[SHARP] < sharp,
        "relative_sharpness below that of its class": below,
    }
    return {
        **dict.fromkeys(("black", "blank", "nearly_blank"), blanks),
        "dark": {
            "quality": lambda one: one["is_dark"],
            f"brightness < {bright:.1f}": lambda one: one["brightness"] < bright,
        },
        "blurred_1": blurs,
        "blurred_2": blurs,
        "wrong_class": {
            "not zero_shot_agrees": lambda one: ~one["zero_shot_agrees"].astype(bool),
            f"zero_shot_margin < {margin:.3f}": lambda one: one["zero_shot_margin"] < margin,
            f"clip_similarity < {similar:.3f}": lambda one: one[SIMILAR] < similar,
        },
    }


def parted(rows: Rows, part: slice) -> Rows:
    return {name: values[part] for name, values in rows.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--work", type=Path)
    arguments.add_argument("--clean", type=int, default=1000)
    arguments.add_argument("--planted", type=int, default=500)
    asked = arguments.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="planted"))
    work.mkdir(parents=True, exist_ok=True)
    pixels, rows = made(work, 2 * asked.clean)
    count, dice = asked.clean, np.random.default_rng(1)
    first = scored(pixels[count : 2 * count], parted(rows, slice(count, 2 * count)))
    clean = scored(pixels[:count], parted(rows, slice(count)))
    chosen = parted(rows, slice(asked.planted))
    faults: dict[str, Any] = {}
    for name, ways in judges(first).items():
        if name == "wrong_class":
            bad = scored(pixels[: asked.planted], wrong(chosen, dice))
        else:
            bad = scored([FAULTS[name](one, dice) for one in pixels[: asked.planted]], chosen)
        faults[name] = {way: rates(judge, bad, clean) for way, judge in ways.items()}
    quantiles = {
        name: [round(float(one), 4) for one in np.quantile(first[name], (0, 0.01, 0.5, 0.99, 1))]
        for name in ("brightness", "sharpness", SHARP, SIMILAR, "zero_shot_margin")
    }
    result = {
        "command": " ".join(["python benchmarks/planted_faults.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("batchgen", "torch", "transformers")},
        "images": "32 x 32, of the demo's prompts, by the shipped model",
        "faults": faults,
        "quantiles_0_1_50_99_100": quantiles,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(faults, indent=1))


if __name__ == "__main__":
    main()
