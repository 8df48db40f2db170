"""What each approximate mode costs and saves: the same images, exact and approximate, in turns.

    python benchmarks/approximate.py [--images 128] [--rounds 5] [--model MODEL] [--modes JSON]

Every mode makes the images of the same prompts and seeds as exact sampling does, with the stages
of this process on the CPU, one thread. In each round, exact sampling and all modes take turns. For
each mode it tells

- ``psnr_db``: of all pixels against the exact ones, and that of the image that is furthest away;
- ``mean_level``: the mean distance of a value, in levels of 255;
- ``speed``: denoise and decode, exact seconds of CPU time over its own, the median over rounds.

``--model`` is any text-to-image model, ``--modes`` maps names to values of
``sampling.approximate``, as in ``{"half": {"guidance_interval": [0, 0.5]}}``. With the default
modes on the shipped model it writes ``results/approximate.json``, whose labels are those that
dataset cards show (`batchgen/spec/approximate.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen import models
from batchgen.plan.checks import check_approximations, settle
from batchgen.records import Call, ConditionBatch, EncodedBatch, Sample, derive_seed
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from jobs.demo_prompts import prompts

RESULTS = Path(__file__).parent / "results" / "approximate.json"
SHIPPED = "digits-shapes"
EXACT = "exact"
# The first mode of each name has the label that the card shows.
MODES: dict[str, Any] = {
    "guidance_interval": {"guidance_interval": [0.2, 0.8]},
    "deep_cache": {"deep_cache": {"cache_interval": 3}},
    "deep_cache_2": {"deep_cache": {"cache_interval": 2}},
    "guidance_interval_late": {"guidance_interval": [0.0, 0.5]},
    "both": {"guidance_interval": [0.2, 0.8], "deep_cache": {"cache_interval": 3}},
}
Array = np.ndarray[Any, Any]


class Side:
    """Denoise and decode stage of one way to sample."""

    def __init__(self, model: str, approximate: Any, batch_size: int) -> None:
        self.spec: Spec = build(
            {
                "input": {"path": "none.parquet"},
                "output": {"url": "none"},
                "model": {"path": model, "dtype": "float32"},
                "sampling": {"approximate": approximate},
                "resources": {"batch_size": batch_size},
            }
        )
        self.info = models.inspect(self.spec.model, self.spec.task)
        check_approximations(self.spec, self.info)
        self.spec = settle(self.spec, self.info)
        self.denoise = models.load_denoiser(self.info, self.spec)
        self.decode = models.load_decoder(self.info, self.spec)

    def encoded(self, images: int) -> list[EncodedBatch]:
        sampling, size = self.spec.sampling, self.spec.resources.micro_batch
        assert sampling.num_inference_steps and sampling.guidance_scale is not None
        assert sampling.width and sampling.height
        call = Call(
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            strength=None,
            width=sampling.width,
            height=sampling.height,
        )
        words = [text for text, _ in islice(cycle(prompts()), images)]
        samples = [
            Sample(str(row), str(row), row, 0, derive_seed(1, str(row)), text, "", call)
            for row, text in enumerate(words)
        ]
        encode = models.load_encoder(self.info, self.spec)
        return [
            encode(ConditionBatch(tuple(samples[start : start + size]), {}))
            for start in range(0, images, size)
        ]

    def made(self, batches: list[EncodedBatch]) -> tuple[Array, float]:
        """The pixels (n, H, W, 3), and the seconds of CPU time that they took."""
        began = time.process_time()
        pixels = [self.decode(self.denoise(batch)).pixels for batch in batches]
        return np.concatenate(pixels), time.process_time() - began


def psnr(exact: Array, other: Array) -> float:
    """Peak signal to noise ratio in dB; infinite for equal images."""
    error = float(np.mean((exact.astype(float) - other.astype(float)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def compared(exact: Array, other: Array) -> dict[str, float]:
    levels = np.abs(exact.astype(int) - other.astype(int))
    return {
        "psnr_db": round(psnr(exact, other), 1),
        "lowest_psnr_db": round(min(map(psnr, exact, other)), 1),
        "mean_level": round(float(levels.mean()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--modes", type=json.loads, default=MODES)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    asked = {EXACT: {}, **given.modes}
    sides = {name: Side(given.model, one, given.batch) for name, one in asked.items()}
    batches = sides[EXACT].encoded(given.images)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    pixels: dict[str, Array] = {}
    for side in sides.values():
        side.made(batches[:1])  # the first call of a process takes longer
    for number in range(given.rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            pixels[name], took = sides[name].made(batches)
            seconds[name].append(round(took, 3))
        print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]} s" for k, v in seconds.items()))
    steps = sides[EXACT].spec.sampling.num_inference_steps
    modes: dict[str, Any] = {}
    for name in given.modes:
        pairs = zip(seconds[EXACT], seconds[name], strict=True)
        speed = round(statistics.median(exact / own for exact, own in pairs), 2)
        cost = compared(pixels[EXACT], pixels[name])
        approximate = sides[name].spec.sampling.approximate
        modes[name] = {"approximate": approximate.label, "speed": speed, **cost}
        if approximate.names == (name,):
            modes[name]["label"] = (
                f"{approximate.label} on {given.model}, {steps} steps, CPU: "
                f"PSNR {cost['psnr_db']} dB, {speed}x as fast"
            )
    found = {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, no GPU, Python "
        f"{platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "model": given.model,
        "images": given.images,
        "batch_size": given.batch,
        "steps": steps,
        "seconds": seconds,
        "modes": modes,
    }
    print(json.dumps(modes, indent=1))
    is_usual = (given.model, given.modes) == (SHIPPED, MODES)
    place = given.results or (RESULTS if is_usual else None)
    if place is not None:
        place.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
