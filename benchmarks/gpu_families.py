"""Section 1: every family of the catalogue, tiny, on the device.

For each: a job in the fused and one in the staged layout, whose images must be the same bytes; the
pixels of the plain diffusers pipeline on the same device, which must be equal; and how far the
pixels are from those of a CPU.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batchgen import models
from batchgen.families import FAMILIES, Family
from batchgen.models.tiny import BUILDERS
from batchgen.plan.plan import make_plan
from batchgen.records import ConditionBatch
from batchgen.shard.stages import condition_batches, start_work
from batchgen.shard.work import Trial
from batchgen.spec.places import anywhere, reach_stores
from benchmarks.gpu_bench import Bench, first_line, furthest, sha, write_json
from benchmarks.gpu_stages import job_rows, load_stages, run_job
from jobs import task_inputs
from tests.family_specs import family_spec
from tests.outputs import digests_of

WORKERS = 6
SMALL = ("stable-diffusion", "flux", "ldm-class")


def families(bench: Bench) -> None:
    rows = bench.work / "family-rows.parquet"
    with contextlib.redirect_stdout(io.StringIO()):
        task_inputs.main(str(rows))
    chosen = list(FAMILIES)
    if bench.small:
        chosen = [next(one for one in FAMILIES if one.name == name) for name in SMALL]
    results = Path(tempfile.mkdtemp(dir=bench.work))
    shares = [chosen[number::WORKERS] for number in range(WORKERS)] if bench.cuda else [chosen]
    # The start of a process by fork is safe here: this one has not used the device yet.
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_some, args=(bench, share, rows, results)) for share in shares
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers) and bench.left() > 1:
        time.sleep(0.5)
        _gather(bench, results, len(chosen))
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()
    _gather(bench, results, len(chosen))


def _gather(bench: Bench, results: Path, planned: int) -> None:
    found = {one.stem: json.loads(one.read_text()) for one in sorted(results.glob("[!.]*.json"))}
    plain, staged = Counter[str](), Counter[str]()
    wrong = {}
    for name, facts in found.items():
        plain[_kind(facts.get("plain"))] += 1
        staged[_kind(facts.get("staged"))] += 1
        if facts.get("plain") != "equal" or facts.get("staged") != "equal":
            wrong[name] = {key: facts.get(key) for key in ("error", "plain", "staged")}
    levels = [facts["cpu_levels"] for facts in found.values() if "cpu_levels" in facts]
    summary = {"planned": planned, "ended": len(found), "plain": plain, "staged": staged}
    bench.note("summary", {**summary, "furthest_from_cpu": max(levels, default=None)})
    bench.note("wrong", {name: _short(facts) for name, facts in wrong.items()})
    bench.note("families", found)


def _kind(value: Any) -> str:
    text = str(value)
    return text if text == "equal" else text.partition(":")[0][:20].lstrip("0123456789 ") or "other"


def _short(facts: dict[str, Any]) -> str:
    return "; ".join(f"{key}: {value}" for key, value in facts.items() if value)[:120]


def _some(bench: Bench, share: Iterable[Family], rows: Path, results: Path) -> None:
    for family in share:
        name = f"{family.task} {family.name}"
        start = time.perf_counter()
        facts: dict[str, Any] = {}
        try:
            _one(bench, family, rows, facts)
        except Exception as error:
            facts["error"] = first_line(error)
        facts["seconds"] = round(time.perf_counter() - start, 2)
        write_json(results / f"{name}.json", facts)
    os._exit(0)  # as the end of a fork: no handlers of the first process


def _one(bench: Bench, family: Family, rows: Path, facts: dict[str, Any]) -> None:
    """Add what is found to ``facts``, so that an error keeps what was found before it."""
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    model = BUILDERS[family.task, family.name](folder / "model")
    spec = family_spec(family, model, rows, folder / "fused")
    info = models.inspect(spec.model, spec.task)
    stages = load_stages(spec, info, [bench.device])
    fused = run_job(spec, info, stages, bench.device)
    facts["fused"] = f"{fused.accepted} images"
    if fused.problems or fused.accepted != 6:
        facts["fused"] += f", wrong: {fused.problems}"
    again = family_spec(family, model, rows, folder / "staged", layout="staged")
    run_job(again, info, stages, bench.device)
    same = digests_of(folder / "fused") == digests_of(folder / "staged")
    facts["staged"] = "equal" if same else "other bytes"
    given = _first_batch(spec, info)
    encode, denoise, decode = stages
    pixels = decode(denoise(encode(given))).pixels
    facts["pixels"] = {"sha": sha(pixels), "std": round(float(pixels.std()), 2)}
    if bench.cuda:
        encode, denoise, decode = load_stages(spec, info, ["cpu"])
        facts["cpu_levels"] = furthest(pixels, decode(denoise(encode(given))).pixels)
    facts["plain"] = _against_plain(family, model, given, bench.device, pixels)


def _first_batch(spec: Any, info: Any) -> ConditionBatch:
    """The first micro-batch of the job: the two variants of its first row."""
    reach_stores(spec)
    plan = make_plan(anywhere(spec), info)
    work, prepared = start_work(job_rows(plan.spec, plan)[0], plan, Trial())
    return condition_batches(work, prepared)[0]


def _against_plain(
    family: Family, model: Path, given: ConditionBatch, device: str, pixels: Any
) -> str:
    from benchmarks.gpu_plain import plain_pixels

    try:
        plain = plain_pixels(family, model, given, device)
    except Exception as error:
        return f"no plain call: {first_line(error)}"
    levels = furthest(pixels, plain)
    return "equal" if levels == 0 else f"{levels} levels away"
