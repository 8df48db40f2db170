"""What a device works on while the host goes on: CUDA queues work, a CPU does it at once.

On CUDA a call of the model returns when its kernels are queued, not when they have run. So that the
device never waits for the host, conditions are encoded on a second stream while the denoiser's work
is queued on the first, and images are copied to pinned memory behind it. Marks (CUDA events) tell
when work is done, and how long it took on the device's clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import torch


T = TypeVar("T")


class Mark(Protocol):
    """A place in a device's queue."""

    def wait(self) -> None:
        """Wait until the device has done all work queued before the mark.

        Raises:
            torch.AcceleratorError: that work failed.
        """

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds of the device's clock between two marks that it has passed."""


@dataclass(frozen=True)
class Later(Generic[T]):
    """A value that is there once the device has passed a mark."""

    mark: Mark
    read: Callable[[], T]

    def result(self) -> T:
        self.mark.wait()
        return self.read()


class Queue:
    """The queue of a device that does its work at once: a CPU.

    Attributes:
        ahead: micro-batches that may wait in the queue behind the one that the device works on.
    """

    ahead = 0

    def beside(self) -> AbstractContextManager[object]:
        """Inside, work is queued beside the main queue, and need not wait for what is there."""
        return nullcontext()

    def join(self, tensors: Iterable[torch.Tensor]) -> None:
        """Work that is queued from now on runs after the work queued beside, which made these."""

    def mark(self) -> Mark:
        """Mark the end of what is queued."""
        return _Now()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy to the host. The values are there once a later mark has been waited for."""
        return tensor.cpu()


class _Now:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Now)
        return self._at - earlier._at


class CudaQueue(Queue):
    """The current stream of a CUDA device, and a second one beside it."""

    ahead = 1

    def __init__(self, device: str) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._device = torch.device(device)
        self._side = self._cuda.Stream(self._device)

    def beside(self) -> AbstractContextManager[object]:
        found: AbstractContextManager[object] = self._cuda.stream(self._side)
        return found

    def join(self, tensors: Iterable[torch.Tensor]) -> None:
        main = self._cuda.current_stream(self._device)
        main.wait_stream(self._side)
        for tensor in tensors:
            if tensor.is_cuda:  # or the allocator would reuse it while the main stream reads it
                tensor.record_stream(main)

    def mark(self) -> Mark:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return _CudaMark(event)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        # Into pinned memory: torch reuses it once the tensor is gone and the copy has ended.
        return tensor.to("cpu", non_blocking=True)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _CudaMark)
        return float(earlier._event.elapsed_time(self._event)) / 1000


def queue_of(device: str) -> Queue:
    """The queue of a device by torch's name: ``cpu``, ``cuda:0``."""
    return CudaQueue(device) if device.startswith("cuda") else Queue()
