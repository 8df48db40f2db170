"""Prepares the job `training_set.yaml`: few real digits, held-out digits, and a probe.

    python jobs/training_set.py out/training

It writes four sets of scikit-learn's handwritten digits, which share no image:

- `real.parquet`: 10 of each class, all that the user of the job has;
- `pool.parquet`: the other images that the shipped model's generator was trained on, and `real`;
  eval trains its ceiling on them;
- `validation.parquet`: 200 images of the generator's training set, for hyper-parameters;
- `test.parquet`: the 500 images that the generator was never shown.

`probe` is a small ResNet that was trained on `real.parquet` and nothing else. It is stored as
transformers stores image classifiers, so the scorer `classifier` reads it.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import batchgen

SPLIT = Path(batchgen.__file__).parent / "shipped" / "digits-shapes" / "digits_split.json"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PER_CLASS, VALIDATION, SEED = 10, 200, 0
PROBE_STEPS, PROBE_BATCH, PROBE_RATE = 400, 50, 2e-3
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Array = np.ndarray[Any, Any]


def parted() -> dict[str, Array]:
    """Indices into `load_digits()` of the four sets."""
    from sklearn.datasets import load_digits

    split = json.loads(SPLIT.read_text())
    classes = load_digits().target
    rng = np.random.RandomState(SEED)
    train = rng.permutation(split["train"])
    validation, pool = train[:VALIDATION], train[VALIDATION:]
    real = np.concatenate([pool[classes[pool] == digit][:PER_CLASS] for digit in range(10)])
    return {"real": real, "pool": pool, "validation": validation, "test": np.array(split["test"])}


def pixels_of(indices: Array) -> Array:
    """The digits as the generator saw them: 8x8 enlarged to 32x32, uint8 (n, 32, 32, 3)."""
    import torch
    from sklearn.datasets import load_digits

    grey = torch.from_numpy(load_digits().images[indices] / 16.0).float()[:, None]
    large = torch.nn.functional.interpolate(grey, (32, 32), mode="bicubic").clamp(0, 1)
    shown = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return np.ascontiguousarray(shown.permute(0, 2, 3, 1).numpy())


def write(path: Path, indices: Array) -> None:
    """Write a set with the columns `key`, `image` and `label`."""
    from sklearn.datasets import load_digits

    classes = load_digits().target[indices]
    images = [{"bytes": _png(one), "path": None} for one in pixels_of(indices)]
    table = pa.table(
        {
            "key": [f"digit-{index:04d}" for index in indices],
            "image": pa.array(images, IMAGE),
            "label": [WORDS[one] for one in classes],
        }
    )
    pq.write_table(table, path)


def _png(pixels: Array) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def train_probe(indices: Array, folder: Path) -> float:
    """Train the probe and save it; returns its accuracy on what it learnt from."""
    import torch
    from sklearn.datasets import load_digits
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(WORDS)),
        label2id={name: number for number, name in enumerate(WORDS)},
    )
    model = ResNetForImageClassification(config)
    pixels = torch.from_numpy(pixels_of(indices)).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(load_digits().target[indices]).long()
    optimiser = torch.optim.AdamW(model.parameters(), lr=PROBE_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PROBE_RATE, total_steps=PROBE_STEPS)
    for _ in range(PROBE_STEPS):
        places = torch.randint(len(labels), (PROBE_BATCH,), generator=generator)
        given = _moved(pixels[places], generator)
        loss = model(pixel_values=given, labels=labels[places]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        right = (model(pixel_values=pixels).logits.argmax(1) == labels).float().mean()
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    half = [0.5, 0.5, 0.5]
    ViTImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(folder)
    return float(right)


def _moved(pixels: Any, generator: Any) -> Any:
    """Slightly turned, shifted and scaled versions, (B, 3, 32, 32)."""
    from batchgen.curate.evaluate.classifiers import move

    return move(pixels, generator)


def main(folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    sets = parted()
    for name, indices in sets.items():
        write(out / f"{name}.parquet", indices)
        print(f"{out / name}.parquet: {len(indices):,} images")
    right = train_probe(sets["real"], out / "probe")
    print(f"{out / 'probe'}: right for {right:.0%} of the images that it was trained on")


if __name__ == "__main__":
    main(*sys.argv[1:])
