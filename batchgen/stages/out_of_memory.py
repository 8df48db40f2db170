"""Recognizes errors that say that memory is lacking, by their class and by their wording."""

from __future__ import annotations

import errno
from collections.abc import Iterator

# Names of classes anywhere among an error's base classes. torch's is a RuntimeError; numpy's and
# Arrow's are MemoryErrors.
CLASSES = ("OutOfMemoryError", "MemoryError")

# Part of the message of a RuntimeError -> whose message it is. Lower case, since wordings differ
# in it. A sample can cause none of them: the size of a call is fixed by the plan.
WORDINGS = {
    # torch, allocators of devices (c10/cuda/CUDACachingAllocator.cpp), also inside other errors
    "cuda out of memory": "torch, allocator",
    "hip out of memory": "torch, allocator of ROCm",
    "xpu out of memory": "torch, allocator of Intel's GPUs",
    "mps backend out of memory": "torch, allocator of Apple's GPUs",
    # torch, calls of the runtime and the driver outside the allocator: cudaErrorMemoryAllocation
    "cuda error: out of memory": "torch, CUDA runtime",
    "hip error: out of memory": "torch, HIP runtime",
    "cuda driver error: out of memory": "torch, CUDA driver (expandable segments)",
    # torch, memory of the host (c10/core/impl/alloc_cpu.cpp); the second is Windows'
    "defaultcpuallocator: can't allocate memory": "torch, memory of the host",
    "defaultcpuallocator: not enough memory": "torch, memory of the host",
    "std::bad_alloc": "C++",
    # cuBLAS (aten/src/ATen/cuda/Exceptions.h). A handle is created by the first multiplication of
    # a process; on a full GPU that fails without a word about memory.
    "cublas_status_alloc_failed": "cuBLAS",
    "hipblas_status_alloc_failed": "hipBLAS",
    "cublas_status_not_initialized when calling `cublascreate": "cuBLAS, handle",
    # cuDNN: its own statuses of memory. Its general CUDNN_STATUS_INTERNAL_ERROR is not listed.
    "cudnn_status_alloc_failed": "cuDNN 8",
    "cudnn_status_internal_error_host_allocation_failed": "cuDNN 9",
    "cudnn_status_internal_error_device_allocation_failed": "cuDNN 9",
    # torch tries one cuDNN engine after the other and skips those whose workspace does not fit;
    # the last words are these (aten/src/ATen/native/cudnn/Conv_v8.cpp).
    "unable to find an engine to execute this computation": "torch, convolutions of cuDNN",
    # accelerate's ``should_reduce_batch_size`` has it too: an engine for less work often exists.
    "cudnn error: cudnn_status_not_supported.": "cuDNN",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory is lacking."""
    return any(map(_says_so, _chain(error)))


def _says_so(error: BaseException) -> bool:
    if any(kind.__name__ in CLASSES for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(wording in said for wording in WORDINGS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its explicit causes, each once."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__
