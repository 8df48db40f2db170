"""Measures batchgen on one GPU: which families run and are exact, what is idle, how fast it is.

    python benchmarks/gpu.py --out OUT            # one GPU, under 570 seconds
    python benchmarks/gpu.py --small --out OUT    # every section on the CPU with tiny models

It needs no Ray and no network: models of the true sizes of Stable Diffusion 1.5, SDXL and Flux.1
get random weights. It writes ``OUT/gpu.json`` after each section. Figures are comparable within
one run only.

Each section is a process of its own, so that no section can harm another one, and has a deadline.
The time that a section leaves goes to the next ones. A section that reaches its deadline is ended;
what it found until then is kept. In a run of fewer ``--seconds`` than all sections need, those of
the most value come first.

Which packages it needs, and how to bring them to a machine without a network, is in README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_bench import Bench, first_line, lines_of, write_json

STARTED_AT = time.monotonic()

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MKL_CBWR": "AUTO,STRICT",  # as batchgen.models.load sets it
    # Without this, torch.cuda.is_available() starts CUDA, which a process cannot use after a fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
SECONDS = 570.0
IMPORTS_S = 15.0  # of them, before the first section
GRACE_S = 3.0  # between the deadline that a section knows of and its end
ROOM_GIB = 24
SMALL_S = 300.0  # for a section of tiny models, however busy the machine is
ARTIFACTS_MIB = 16


@dataclass(frozen=True)
class Section:
    """``seconds`` is its share of the time; with less than ``least`` it is skipped."""

    name: str
    module: str
    function: str
    seconds: float
    least: float
    value: int  # the order in a short run


SECTIONS = (
    Section("machine", "gpu_machine", "machine", 10, 5, 0),
    Section("families", "gpu_families", "families", 60, 15, 1),
    Section("syncs", "gpu_syncs", "syncs", 25, 8, 2),
    Section("bytes", "gpu_bytes", "same_bytes", 45, 15, 3),
    Section("sd15", "gpu_limits", "sd15_limits", 90, 20, 6),
    Section("sdxl", "gpu_limits", "sdxl_limits", 120, 30, 7),
    Section("flux", "gpu_limits", "flux_limits", 45, 15, 8),
    Section("jobs", "gpu_job", "jobs", 110, 40, 4),
    Section("rivals", "gpu_rivals", "rivals", 35, 15, 5),
    Section("memory", "gpu_memory", "memory", 15, 12, 9),
)
USED = (
    ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline", "PNDMScheduler"),
    ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer", "T5EncoderModel"),
)
SPEED = ("ms_an_image", "tflops", "of_matmul")
JOB = ("images_a_second", "of_limit", "of_denoiser_limit", "problems")
HEADLINES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("machine", "matmul_tflops", ("bfloat16", "float16", "tf32", "float32", "float8_rows")),
    ("families", "summary", ("planned", "ended", "plain", "staged")),
    ("bytes", "again", ()),
    ("bytes", "new_process", ()),
    ("bytes", "other_neighbours", ()),
    ("bytes", "other_places", ()),
    ("sd15", "eager_b8", SPEED),
    ("sd15", "compiled_b8", SPEED),
    ("sdxl", "eager_b8", SPEED),
    ("sdxl", "compiled_b8", SPEED),
    ("flux", "eager_b1", SPEED),
    ("jobs", "sd15_20_steps", JOB),
    ("jobs", "sdxl_30_steps", JOB),
    ("jobs", "sdxl_4_steps", JOB),
    ("rivals", "batchgen_over", ("batch_1", "batched", "arrays")),
    ("memory", "decode", ("images", "class")),
)
# Called in a new process by Bench.elsewhere.
APART = {
    "fresh": ("gpu_bytes", "fresh"),
    "strict": ("gpu_bytes", "strict"),
    "warm": ("gpu_kernels", "warm"),
    "full_card": ("gpu_memory", "full_card"),
}


def function_of(module: str, name: str) -> Callable[..., Any]:
    import importlib

    found: Callable[..., Any] = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    return found


def load_libraries() -> None:
    """Import once what all sections need; processes that are forked from this one have it."""
    os.environ.update(ENVIRONMENT)
    from batchgen.models.libraries import quiet_libraries

    quiet_libraries()
    for section in SECTIONS:
        function_of(section.module, section.function)
    function_of("gpu_plain", "plain_pixels")
    import diffusers
    import transformers

    for library, names in ((diffusers, USED[0]), (transformers, USED[1])):
        for name in names:
            getattr(library, name)  # these libraries import a class when it is first asked for


def run_section(section: Section, bench: Bench) -> None:
    """What the process of a section does."""
    os.setsid()  # its own processes are ended together with it
    warnings.simplefilter("ignore")
    try:
        function_of(section.module, section.function)(bench)
    except Exception as error:
        import traceback

        bench.note("failed", first_line(error))
        bench.note("traceback", traceback.format_exc()[-2000:])
    bench.note("ended", True)
    sys.stdout.flush()
    os._exit(0)


def ended(section: Section, bench: Bench, start_method: str) -> dict[str, Any]:
    """Run a section in a process, until its end or its deadline; returns what it found."""
    context: Any = multiprocessing.get_context(start_method)
    begun = time.monotonic()
    process = context.Process(target=run_section, args=(section, bench))
    process.start()
    process.join(max(0.0, bench.left()) + GRACE_S)
    cut = process.is_alive()
    end_group(process.pid)
    process.join()
    found: dict[str, Any] = {}
    if bench.results.exists():
        found = json.loads(bench.results.read_text())
    took = time.monotonic() - begun
    whole = found.pop("ended", False)
    state = "ended" if whole else f"cut off at its deadline after {took:.0f} s"
    if not whole and not cut:
        state = f"its process died (exit code {process.exitcode})"
    if "failed" in found:
        state = f"failed: {found['failed']}"
    return {"state": state, "seconds": round(took, 1), **found}


def end_group(leader: int) -> None:
    """End the processes of a section that are left, among them those that it started."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGKILL)


def refuse_without_gpu(device: str) -> None:
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        sys.exit(
            f"gpu.py: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU here; "
            "--small runs on the CPU"
        )


def uses_device(device: str) -> None:
    import torch

    torch.ones(1, device=device).item()
    os._exit(0)


def start_method_of(device: str) -> str:
    """``fork`` if a forked process can use the device, else ``spawn``, which imports all again."""
    if device == "cpu":
        return "fork"
    process = multiprocessing.get_context("fork").Process(target=uses_device, args=(device,))
    process.start()
    process.join(30)
    if process.exitcode == 0:
        return "fork"
    process.kill()
    return "spawn"


def run(options: argparse.Namespace, sections: list[Section], work: Path) -> dict[str, Any]:
    """Run the sections in turn; the results file is complete after each."""
    load_libraries()
    refuse_without_gpu(options.device)
    method = start_method_of(options.device)
    ready = time.monotonic() - STARTED_AT
    command = f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}".strip()
    found: dict[str, Any] = {"command": command, "start_seconds": round(ready, 1)}
    found |= {"start_method": method, "small": options.small, "sections": {}}
    if sum(one.seconds for one in sections) + IMPORTS_S > options.seconds:
        sections = sorted(sections, key=lambda one: one.value)
    print(f"imports took {ready:.1f} s; sections start by {method}", flush=True)
    planned_until = time.monotonic()
    last = STARTED_AT + options.seconds - GRACE_S - 2  # two seconds to write the results
    for section in sections:
        planned_until += SMALL_S if options.small else section.seconds
        ends_at = min(max(planned_until, time.monotonic() + section.least), last)
        results = work / f"{section.name}.json"
        bench = Bench(options.device, options.small, work, ends_at, results)
        if bench.left() < (1 if options.small else section.least):
            one: dict[str, Any] = {"state": f"skipped: {max(0.0, bench.left()):.0f} s were left"}
        else:
            one = ended(section, bench, method)
        found["sections"][section.name] = one
        found["seconds"] = round(time.monotonic() - STARTED_AT, 1)
        write_json(options.out / "gpu.json", facts_of(found) | found)
        show(section.name, one)
    return found


def facts_of(found: dict[str, Any]) -> dict[str, Any]:
    """Date, device, driver and versions, which the first section has found."""
    machine = found["sections"].get("machine", {})
    device = machine.get("device", {})
    return {
        "device": device.get("name"),
        "driver": device.get("nvidia_smi", {}).get("driver_version"),
        "cuda": device.get("cuda"),
        "cudnn": device.get("cudnn"),
        **machine.get("host", {}),
    }


def table(found: dict[str, Any]) -> list[str]:
    """The figures to read first: each with its section and name in the results."""
    lines = []
    for section, name, fields in HEADLINES:
        value = found["sections"].get(section, {}).get(name)
        if isinstance(value, dict):
            value = ", ".join(f"{one} {value[one]}" for one in fields if one in value)
        lines.append(f"{section:9} {name:16} {value}"[:150])
    return lines


def show(name: str, found: dict[str, Any]) -> None:
    print(f"== {name}: {found['state']} ({found.get('seconds', 0)} s)")
    hidden = ("state", "seconds", "families", "traceback", "failed")
    for line in lines_of({key: one for key, one in found.items() if key not in hidden}):
        print(line)
    sys.stdout.flush()


def apart(options: argparse.Namespace, work: Path) -> None:
    """Call one of ``APART`` and print its result as the last line."""
    from batchgen.models.libraries import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore")
    module, name = APART[options.apart]
    ends_at = time.monotonic() + SECONDS
    bench = Bench(options.device, options.small, work, ends_at, work / f"apart-{name}.json")
    print(json.dumps(function_of(module, name)(bench)))


def work_folder(small: bool) -> Path:
    """Where models and outputs go: in memory, if it has room, since they have several GiB."""
    memory = Path("/dev/shm")
    if not small and memory.is_dir():
        facts = os.statvfs(memory)
        if facts.f_bavail * facts.f_frsize >= ROOM_GIB << 30:
            return memory
    return Path(tempfile.gettempdir())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of gpu.json")
    parser.add_argument("--sections", help="names with commas; default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--device", help="default: cuda:0, with --small cpu")
    parser.add_argument("--work", type=Path, help="folder for models and outputs")
    parser.add_argument("--apart", choices=APART, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.small else "cuda:0")
    if options.apart:
        apart(options, options.work)
        return
    names = options.sections.split(",") if options.sections else [one.name for one in SECTIONS]
    sections = [one for one in SECTIONS if one.name in names]
    if unknown := set(names) - {one.name for one in sections}:
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=options.work or work_folder(options.small), prefix="gpu-", ignore_cleanup_errors=True
    ) as work:
        found = run(options, sections, Path(work))
        compiled = Path(work) / "compiled.bin"
        if compiled.exists() and compiled.stat().st_size <= ARTIFACTS_MIB << 20:
            shutil.copy(compiled, options.out)
    print("== in short")
    print("\n".join(table(found)))
    print(f"{time.monotonic() - STARTED_AT:.0f} s; results in {options.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
