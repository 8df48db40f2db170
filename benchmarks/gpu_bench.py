"""What each section of gpu.py gets: the device, the time left, clocks, and where results go."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("gpu.py")
GIB = 1 << 30


def write_json(path: Path, value: object) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


class NoTime(Exception):
    """The section has too little time left for this measurement."""


@dataclass
class Bench:
    """One section's run, in a process of its own.

    Attributes:
        device: ``cuda:0``, or ``cpu``.
        small: tiny configurations and few repetitions, to try the script.
        work: a folder for models and outputs that the sections share.
        ends_at: when the section must have ended, by ``time.monotonic``.
        results: file that holds what the section has found so far.
    """

    device: str
    small: bool
    work: Path
    ends_at: float
    results: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    def left(self) -> float:
        """Seconds until the section's deadline."""
        return self.ends_at - time.monotonic()

    def note(self, name: str, value: Any) -> None:
        """Record one result; what is recorded survives the end of the process."""
        self.found[name] = value
        write_json(self.results, self.found)

    def measure(self, name: str, what: Callable[[], Any], needs_s: float = 0.0) -> Any:
        """Record the result of ``what``, or in one line why there is none; returns the result.

        Args:
            needs_s: seconds that it takes; it is skipped if fewer are left.
        """
        needs_s = 0.0 if self.small else needs_s
        if self.left() < needs_s:
            why = f"skipped: it takes {needs_s:.0f} s, and {max(0.0, self.left()):.0f} s are left"
            self.note(name, why)
            return None
        try:
            value = what()
        except Exception as error:
            self.note(name, f"failed: {first_line(error)}")
            value = None
        else:
            self.note(name, value)
        finally:
            self.free()
        return value

    def free(self) -> None:
        """Return unused memory of the device."""
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def milliseconds(self, what: Callable[[], Any], spend_s: float = 0.6, most: int = 30) -> float:
        """Median time of one call, from device events after a warm-up.

        The second warm-up call tells how often the function is called in ``spend_s`` seconds.
        """
        what()
        self.wait()
        start = time.perf_counter()
        what()
        self.wait()
        once = max(1e-6, time.perf_counter() - start)
        times = 2 if self.small else max(3, min(most, int(spend_s / once)))
        return round(statistics.median(self._timed(what) for _ in range(times)), 4)

    def _timed(self, what: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            what()
            return (time.perf_counter() - start) * 1000
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        what()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def peak_gib(self, what: Callable[[], Any]) -> float | None:
        """Most memory that torch held during the call, in GiB; None on a CPU."""
        if not self.cuda:
            what()
            return None
        import torch

        self.wait()
        self.free()
        torch.cuda.reset_peak_memory_stats()
        what()
        self.wait()
        return round(torch.cuda.max_memory_allocated() / GIB, 3)

    def elsewhere(self, name: str, most_s: float, changes: Mapping[str, str] | None = None) -> Any:
        """The result of one of gpu.py's ``APART`` functions, called in a new process.

        Args:
            changes: environment variables that differ.

        Raises:
            NoTime: too little time is left.
            RuntimeError: the process failed.
        """
        most_s = min(most_s, self.left())
        if most_s < 5:
            raise NoTime(f"{max(0.0, most_s):.0f} s are left")
        command = [sys.executable, str(SCRIPT), "--apart", name]
        command += ["--work", str(self.work), "--device", self.device]
        command += ["--small"] if self.small else []
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=most_s,
                env={**os.environ, **(changes or {})},
            )
        except subprocess.TimeoutExpired as error:
            raise NoTime(f"a new process took more than {most_s:.0f} s") from error
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"the new process ended with {done.returncode}: {last[0][:300]}")
        return json.loads(done.stdout.strip().splitlines()[-1])


def sha(array: Any) -> str:
    """The first digits of the SHA-256 of a numpy array or a tensor."""
    if hasattr(array, "cpu"):
        import torch

        array = array.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def furthest(left: Any, right: Any) -> int:
    """Largest difference of two uint8 arrays, in levels."""
    import numpy as np

    return int(np.abs(left.astype(np.int16) - right.astype(np.int16)).max())


def lines_of(found: Mapping[str, Any], width: int = 170) -> list[str]:
    """One line for each result; long ones are cut, since the JSON file has all."""
    lines = []
    for name, value in found.items():
        text = value if isinstance(value, str) else json.dumps(value)
        text = text.replace('"', "")
        lines.append(f"  {name}: {text}"[:width])
    return lines
