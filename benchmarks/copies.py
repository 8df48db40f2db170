"""Copies: how many planted ones `batchgen copies` finds, and what a search takes.

    python benchmarks/copies.py [--sizes 10000,30000,100000,300000,1000000] [--clean 1000]

Planted copies: exact, JPEG, crops, brightness, of images of the shipped model; leaks of held-out
digits. Speed: hashes with 1 % planted copies, images read and searched, embeddings; each in its own
process. Writes ``results/copies.json``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen.curate.copies import DISTANCE, LIKENESS
from batchgen.curate.near import NearImages, NearVectors, staying
from batchgen.curate.near_vectors import IndexedVectors
from batchgen.curate.prints import DIGEST, Picture, Prints, prints_of
from batchgen.images.files import encode_image
from batchgen.images.likeness import PLANES
from batchgen.images.perceptual_hash import CROPS

ROOT = Path(__file__).parents[1]
Array = np.ndarray[Any, Any]
MODEL = ROOT / "batchgen" / "shipped" / "digits-shapes"
SIZES = "10000,30000,100000,300000,1000000"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
SHAPES = ["circle", "square", "triangle", "cross", "ring", "star"]
LIBRARIES = ("numpy", "pillow", "opencv-python-headless", "faiss-cpu")
SIDE, PLANTED, VECTOR = 32, 0.01, 512


def clean(kind: str, count: int) -> Array:
    """Images of the shipped model, each with its own seed."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(MODEL), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    dice = np.random.default_rng(5)
    made = []
    for start in range(0, count, 50):
        captions, generators = [], []
        for number in range(start, min(start + 50, count)):
            one, other = dice.choice(COLOURS, 2, replace=False)
            shape = f"a {one} {dice.choice(SHAPES)} on a {other} background"
            captions.append(
                f"a handwritten digit {DIGITS[number % 10]}" if kind == "digits" else shape
            )
            generators.append(torch.Generator().manual_seed(1000 + number))
        found = pipeline(
            captions,
            num_inference_steps=12,
            guidance_scale=2.0,
            generator=generators,
            output_type="np",
        ).images
        made.append((found * 255).round().astype(np.uint8))
    return np.concatenate(made)


def held_out_digits() -> Array:
    """The 500 real digits that the shipped model never saw, 32 x 32."""
    from sklearn.datasets import load_digits

    digits = load_digits().images
    train = set(json.loads((MODEL / "digits_split.json").read_text())["train"])
    rest = [one for number, one in enumerate(digits) if number not in train]
    return np.stack([enlarged(np.uint8(one * 255 / 16)) for one in rest])


def enlarged(grey: Array) -> Array:
    small = Image.fromarray(grey).convert("RGB")
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def jpeg(pixels: Array, quality: int, subsampling: str) -> Array:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file).convert("RGB"))


def resized(pixels: Array, side: int, box: tuple[float, ...] | None = None) -> Array:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, box))


def cropped(pixels: Array, dice: np.random.Generator) -> Array:
    """Without up to 1/32 on each side."""
    left, top, right, bottom = dice.uniform(0, 1, 4)
    return resized(pixels, SIDE, (left, top, SIDE - right, SIDE - bottom))


def brighter(pixels: Array, factor: float) -> Array:
    return np.clip(pixels * factor, 0, 255).astype(np.uint8)


Change = Callable[[Array, np.random.Generator], Array]
CHANGES: dict[str, Change] = {
    "exact": lambda pixels, dice: pixels,
    "JPEG 90, 4:4:4": lambda pixels, dice: jpeg(pixels, 90, "4:4:4"),
    "JPEG 75, 4:4:4": lambda pixels, dice: jpeg(pixels, 75, "4:4:4"),
    "JPEG 75, 4:2:0": lambda pixels, dice: jpeg(pixels, 75, "4:2:0"),
    "128 x 128, JPEG 75, 4:2:0": lambda pixels, dice: jpeg(resized(pixels, 128), 75, "4:2:0"),
    "border of 1/32 cropped": lambda pixels, dice: resized(pixels, SIDE, (1, 1, 31, 31)),
    "up to 1/32 of each side cropped": cropped,
    "brightness 0.8": lambda pixels, dice: brighter(pixels, 0.8),
    "brightness 1.1": lambda pixels, dice: brighter(pixels, 1.1),
    "brightness 1.2": lambda pixels, dice: brighter(pixels, 1.2),
}


def printed(images: Array | list[Array]) -> Prints:
    return prints_of(
        (
            Picture(f"{number:06d}", encode_image(np.ascontiguousarray(one), "png", 90))
            for number, one in enumerate(images)
        ),
        "benchmark",
    )


def rates(images: Array, others: Array | None = None) -> dict[str, Any]:
    """The share of planted copies that are found, and the false alarms among the clean images.

    With ``others``, the clean images are compared with these, and the copies are of these.
    """
    dice = np.random.default_rng(0)
    prints = printed(images)
    first = prints if others is None else printed(others)
    near = NearImages(first, prints, DISTANCE, LIKENESS)
    alarms = {
        (min(one, other), max(one, other)) if others is None else (one, other)
        for found in near(np.arange(len(first)), np.arange(len(prints)))
        for one, other in zip(found.first.tolist(), found.second.tolist(), strict=True)
        if others is not None or one != other
    }
    told: dict[str, Any] = {
        "clean_images": len(images),
        "false_alarms": len({other for _, other in alarms}),
    }
    sources = images if others is None else others
    for name, change in CHANGES.items():
        copies = printed([change(one, dice) for one in sources])
        near = NearImages(first, copies, DISTANCE, LIKENESS)
        every = np.arange(len(first))
        hit = {
            one
            for found in near(every, every)
            for one, other in zip(found.first.tolist(), found.second.tolist(), strict=True)
            if one == other
        }
        told[name] = round(len(hit) / len(sources), 4)
    return told


def random_prints(count: int) -> Prints:
    """Prints without images: random hashes, of which 1 % are near copies of others."""
    dice = np.random.default_rng(count)
    hashes = dice.integers(0, 2**64, count, dtype=np.uint64)
    digests = dice.integers(0, 256, (count, DIGEST), dtype=np.uint8)
    copies = int(count * PLANTED)
    flips = np.uint64(1) << dice.integers(0, 64, (copies, 4)).astype(np.uint64)
    hashes[-copies:] = hashes[:copies] ^ np.bitwise_xor.reduce(flips, axis=1)
    digests[-copies:] = digests[:copies]
    crops = hashes[:, None] ^ (
        np.uint64(1) << dice.integers(0, 64, (count, len(CROPS))).astype(np.uint64)
    )
    crops[:, 0] = hashes
    none = np.broadcast_to(np.uint8(0), (count, PLANES))
    return Prints(tuple(map(str, range(count))), digests, crops, none, np.zeros((count, 96), "f4"))


def by_hashes(count: int) -> dict[str, Any]:
    prints = random_prints(count)
    start = time.perf_counter()
    stays = staying(NearImages(prints, prints, DISTANCE, LIKENESS), np.arange(count))
    return told(count, time.perf_counter() - start, count - len(stays), int(count * PLANTED))


def pictures(count: int) -> Iterator[Picture]:
    """Random images of 32 x 32 as PNG, of which 1 % are darker JPEGs of others."""
    dice, kept = np.random.default_rng(count), list[Array]()
    copies = int(count * PLANTED)
    for number in range(count):
        if number >= count - copies:
            pixels = jpeg(brighter(kept[number - count + copies], 0.9), 90, "4:4:4")
        else:
            pixels = np.asarray(
                Image.fromarray(dice.integers(40, 215, (12, 12, 3), dtype=np.uint8)).resize(
                    (SIDE, SIDE), Image.Resampling.BICUBIC
                )
            )
            if len(kept) < copies:
                kept.append(pixels)
        yield Picture(f"{number:08d}", encode_image(pixels, "png", 90))


def by_images(count: int) -> dict[str, Any]:
    start = time.perf_counter()
    prints = prints_of(pictures(count), "benchmark")
    read = time.perf_counter()
    stays = staying(NearImages(prints, prints, DISTANCE, LIKENESS), np.arange(count))
    seconds = time.perf_counter() - read
    return {
        **told(count, seconds, count - len(stays), int(count * PLANTED)),
        "seconds_to_make_and_read_images": round(read - start, 1),
    }


def vectors(count: int) -> Array:
    """Random directions, of which 1 % are near others; float16 as the scorer stores them."""
    dice = np.random.default_rng(count)
    found = dice.standard_normal((count, VECTOR), np.float32)
    copies = int(count * PLANTED)
    found[-copies:] = found[:copies] + 0.1 * dice.standard_normal((copies, VECTOR), np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float16)


def by_vectors(count: int, exact: bool = True) -> dict[str, Any]:
    found = vectors(count)
    near = NearVectors(found, found, 0.9) if exact else IndexedVectors(found, found, 0.9)
    start = time.perf_counter()
    stays = staying(near, np.arange(count))
    return told(count, time.perf_counter() - start, count - len(stays), int(count * PLANTED))


def told(count: int, seconds: float, found: int, planted: int) -> dict[str, Any]:
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be that of the parent
    peak = int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) / 1024
    return {
        "samples": count,
        "seconds": round(seconds, 1),
        "peak_mib": round(peak),
        "planted": planted,
        "found": found,
    }


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "hashes": by_hashes,
    "images": by_images,
    "embeddings": by_vectors,
    "embeddings by faiss": lambda count: by_vectors(count, exact=False),
}


def measured(part: str, count: int) -> dict[str, Any]:
    """One measurement, in a process of its own, for its memory."""
    words = [sys.executable, __file__, "--part", part, "--sizes", str(count)]
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env={**os.environ, **threads}
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(part, result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--clean", type=int, default=1000)
    parser.add_argument("--part", choices=[*PARTS])
    asked = parser.parse_args()
    sizes = [int(one) for one in asked.sizes.split(",")]
    if asked.part:
        print(json.dumps(PARTS[asked.part](sizes[0])))
        return
    digits, shapes = clean("digits", asked.clean), clean("shapes", asked.clean)
    detection = {
        "digits": rates(digits),
        "held-out digits (leaks)": rates(digits, held_out_digits()),
        "shapes": rates(shapes),
    }
    print(json.dumps(detection, indent=1), flush=True)
    most = min(100_000, max(sizes))
    result = {
        "command": "python benchmarks/copies.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
        "versions": {
            name: version(name)
            for name in ("numpy", "pillow", "opencv-python-headless", "faiss-cpu")
        },
        "python": platform.python_version(),
        "distance": DISTANCE,
        "likeness": LIKENESS,
        "detection": detection,
        "hashes": [measured("hashes", size) for size in sizes],
        "images": [measured("images", most)],
        "embeddings": [measured("embeddings", most)],
        "embeddings_by_faiss": [measured("embeddings by faiss", most)],
    }
    place = ROOT / "benchmarks" / "results" / "copies.json"
    place.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
