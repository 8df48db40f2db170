"""The sides of `rivals.py`; each prints images and seconds as JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

STEPS, GUIDANCE, SIZE = 12, 2.0, 32
MODEL = Path(__file__).parent.parent / "batchgen" / "shipped" / "digits-shapes"
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = ("red", "green", "blue", "white", "yellow", "orange", "purple")


@dataclass(frozen=True)
class Task:
    """What a side makes: ``images`` images from FOLDER/prompts.parquet."""

    folder: str
    images: int
    batch: int
    processes: int

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def prompts(self) -> str:
        return f"{self.folder}/prompts.parquet"


def write_prompts(task: Task) -> None:
    """Every prompt is different, so that no side gains from a cache of prompts."""
    texts = [
        f"a {COLOURS[n % 7]} {SHAPES[n % 6]} on a black background {n}" for n in range(task.images)
    ]
    pq.write_table(pa.table({"prompt": texts}), task.prompts, row_group_size=64)


def texts_of(task: Task) -> list[str]:
    found: list[str] = pq.read_table(task.prompts).column("prompt").to_pylist()
    return found


def batches(texts: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def words_of(task: Task, layout: str) -> list[str]:
    settings = {
        "sampling.num_inference_steps": STEPS,
        "sampling.guidance_scale": GUIDANCE,
        "resources.batch_size": task.batch,
        "resources.layout": layout,
        "output.samples_per_shard": 4 * task.batch,
    }
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["run", "--input", task.prompts, "--output", f"{task.folder}/out", *sets, "--json"]


def ours(layout: str, task: Task) -> dict[str, float]:
    words = [sys.executable, "-m", "batchgen", *words_of(task, layout)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    outcome = json.loads(done.stdout)
    seconds = outcome["seconds"] - outcome["start_up_s"]
    return {"images": outcome["accepted"], "seconds": seconds}


def fused(task: Task) -> dict[str, float]:
    return ours("fused", task)


def staged(task: Task) -> dict[str, float]:
    return ours("staged", task)


def bare(task: Task) -> dict[str, float]:
    """Each process takes every n-th shard; the clock starts when the first has loaded."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    workers = [
        context.Process(target=bare_stages, args=(task, number, answers))
        for number in range(task.processes)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    began, ended = min(one[1] for one in found), max(one[2] for one in found)
    return {"images": sum(one[0] for one in found), "seconds": ended - began}


def bare_stages(task: Task, number: int, answers: Any) -> None:
    from batchgen import models, runner
    from batchgen.images.files import encode_image
    from batchgen.input.reader import make_spans, read_columns, read_span
    from batchgen.shard.stages import condition_batches, start_work
    from batchgen.shard.work import Trial
    from batchgen.spec.build import build

    tree = {
        "input": {"path": task.prompts},
        "output": {"url": f"{task.folder}/bare", "samples_per_shard": 4 * task.batch},
        "sampling": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE},
        "resources": {"batch_size": task.batch},
    }
    plan = runner.plan_job(build(tree))
    stages = [
        load(plan.model, plan.spec)
        for load in (models.load_encoder, models.load_denoiser, models.load_decoder)
    ]
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    mine = range(number, plan.shards, task.processes)
    made, began = 0, time.time()
    for span in make_spans(plan, mine):
        for rows in read_span(span, plan.spec, columns):
            work, prepared = start_work(rows, plan, Trial())
            for batch in condition_batches(work, prepared):
                given: Any = batch
                for stage in stages:
                    given = stage(given)
                for image in given.pixels:
                    encode_image(image, "png", 95, "4:4:4")
                    made += 1
    answers.put((made, began, time.time()))


def pipeline_of(threads: int | None) -> Any:
    """Plain diffusers, as a user loads it."""
    import torch
    from diffusers import StableDiffusionPipeline

    if threads:
        torch.set_num_threads(threads)
    pipeline = StableDiffusionPipeline.from_pretrained(
        MODEL, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: Any, prompts: list[str], output: str = "pil") -> Any:
    return pipeline(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        width=SIZE,
        height=SIZE,
        output_type=output,
    ).images


@contextmanager
def clock(found: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    found["seconds"] = time.perf_counter() - began


def plain(task: Task, size: int, threads: int | None) -> dict[str, float]:
    pipeline = pipeline_of(threads)
    found: dict[str, float] = {"images": 0}
    with clock(found):
        for prompts in batches(texts_of(task), size):
            for image in call(pipeline, prompts):
                image.save(f"{task.folder}/{int(found['images'])}.png")
                found["images"] += 1
    return found


def loop(task: Task) -> dict[str, float]:
    return plain(task, task.batch, 1)


def loop_default_threads(task: Task) -> dict[str, float]:
    return plain(task, task.batch, None)


def one_by_one(task: Task) -> dict[str, float]:
    return plain(task, 1, None)


class Predictor:
    """An actor of the Ray patterns; writes when it was ready and when it last ended a batch."""

    def __init__(self, task: Task, output: str) -> None:
        self.pipeline = pipeline_of(1)
        self.output = output
        self.times = Path(task.folder) / f"times-{os.getpid()}"
        self.times.write_text(f"{time.time()}\n")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        images = call(self.pipeline, list(batch["prompt"]), "pil" if self.output == "png" else "np")
        if self.output == "png":
            return {"image": np.array([png_bytes(image) for image in images], dtype=object)}
        return {"image": np.asarray(images), "number": batch["number"]}


def png_bytes(image: Any) -> bytes:
    import io

    held = io.BytesIO()
    image.save(held, format="png")
    return held.getvalue()


def ray_arrays(task: Task) -> dict[str, float]:
    import numpy as np
    import ray
    from PIL import Image

    def save(batch: dict[str, Any]) -> dict[str, Any]:
        for pixels, number in zip(batch["image"], batch["number"], strict=True):
            Image.fromarray((pixels * 255).round().astype(np.uint8)).save(
                f"{task.folder}/{number}.png"
            )
        return {"number": batch["number"]}

    with started_ray(task):
        rows = [{"prompt": text, "number": n} for n, text in enumerate(texts_of(task))]
        data = ray.data.from_items(rows, override_num_blocks=len(rows) // (4 * task.batch) or 1)
        return of_ray(task, data, "arrays", lambda made: made.map_batches(save).count())


def ray_parquet(task: Task) -> dict[str, float]:
    import ray

    def write(made: Any) -> int:
        made.write_parquet(f"{task.folder}/out")
        return int(ray.data.read_parquet(f"{task.folder}/out").count())

    with started_ray(task):
        blocks = task.images // (4 * task.batch) or 1
        data = ray.data.read_parquet(task.prompts, override_num_blocks=blocks)
        return of_ray(task, data, "png", write)


@contextmanager
def started_ray(task: Task) -> Iterator[None]:
    import logging

    import ray

    # The actors reserve one CPU each; one more is for the tasks beside them.
    ray.init(
        address="local",
        num_cpus=task.processes + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=2 << 30,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def of_ray(task: Task, data: Any, output: str, end: Callable[[Any], int]) -> dict[str, float]:
    import ray

    made = data.map_batches(
        Predictor,
        batch_size=task.batch,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=task.processes),
        fn_constructor_args=(task, output),
    )
    images = end(made)
    began = min(float(one.read_text()) for one in Path(task.folder).glob("times-*"))
    return {"images": images, "seconds": time.time() - began}


SIDES: dict[str, Callable[[Task], dict[str, float]]] = {
    "fused": fused,
    "bare": bare,
    "staged": staged,
    "ray_arrays": ray_arrays,
    "ray_parquet": ray_parquet,
    "loop": loop,
    "loop_default_threads": loop_default_threads,
    "one_by_one": one_by_one,
}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](Task(**json.loads(sys.argv[2])))))
