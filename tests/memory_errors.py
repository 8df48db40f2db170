"""Errors as torch, cuBLAS, cuDNN and the system word them when memory is lacking."""

from __future__ import annotations

import errno

import numpy as np
import pyarrow as pa


class OutOfMemoryError(RuntimeError):
    """torch's class of this name, which tests without torch cannot import."""


class AcceleratorError(RuntimeError):
    """torch's class for errors of a device's runtime."""


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 44.42 GiB of "
    "which 1.31 GiB is free. Including non-PyTorch memory, this process has 43.10 GiB in use."
)
LACKING: dict[str, Exception] = {
    "torch, by class": OutOfMemoryError("Allocation on device 0 would exceed allowed memory."),
    "torch": OutOfMemoryError(CUDA),
    "torch, wrapped by a compiler": RuntimeError(f"backend failed: OutOfMemoryError: {CUDA}"),
    "ROCm": OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB."),
    "CUDA runtime": AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
    ),
    "CUDA driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cuBLAS, handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cuDNN 8": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9, device": RuntimeError(
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
    ),
    "cuDNN 9, host": RuntimeError(
        "cuDNN Frontend error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"
    ),
    "cuDNN, engine": RuntimeError("GET was unable to find an engine to execute this computation"),
    "cuDNN, old engine": RuntimeError("Unable to find an engine to execute this computation"),
    "cuDNN, not supported": RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a "
        "non-contiguous input."
    ),
    "torch, host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Python": MemoryError(),
    "numpy": np._core._exceptions._ArrayMemoryError((1 << 50,), np.dtype("u1")),
    "Arrow": pa.lib.ArrowMemoryError("malloc of size 1099511627776 failed"),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
OTHER: dict[str, Exception] = {
    "memory access": AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "kernel": AcceleratorError("CUDA error: device-side assert triggered"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "cuDNN, execution": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb)`"
    ),
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a prompt": ValueError("prompt 'CUDA out of memory' is too long"),
    "shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x4 and 5x6)"),
}
