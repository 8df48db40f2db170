"""Puts a stage's models on its device, or divides the largest model over several devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from batchgen.errors import ModelError

GIB = 1 << 30


def place(pipelines: Sequence[Any], devices: Sequence[str]) -> None:
    """Move the components of the pipelines to the first device.

    With several devices the blocks of the largest model are divided over them, in order and by the
    free memory of each. A block on another device copies its input from the first device and its
    output back (accelerate's ``AlignDevicesHook``), so everything that the model or the pipeline
    does between blocks happens on the first device.

    Args:
        pipelines: those of one stage.
        devices: torch devices, such as ``cpu``, or ``cuda:0`` and ``cuda:1``.

    Raises:
        ModelError: the largest model does not fit on all of them together.
    """
    if len(devices) == 1:
        for pipeline in pipelines:
            pipeline.to(devices[0])
        return
    import torch

    parts = [part for pipeline in pipelines for part in vars(pipeline).values()]
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    largest = max(modules, key=size_of, default=None)  # None: an encoder without any model
    for module in modules:
        if module is not largest:
            module.to(devices[0])
    if largest is not None:
        _spread(largest, devices, [_free(device) for device in devices])


def blocks_of(module: Any) -> Iterator[Any]:
    """Yield the parts of a model that are never divided, in the model's order.

    These are the members of its outermost module lists (a U-Net's blocks, a transformer's layers),
    and the modules next to those lists.
    """
    import torch

    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif any(isinstance(one, torch.nn.ModuleList) for one in child.modules()):
            yield from blocks_of(child)
        else:
            yield child


def shares(sizes: Sequence[int], free: Sequence[int]) -> list[int]:
    """Choose the device number of each block, so that all devices are filled to a similar degree.

    Args:
        sizes: bytes of each block, in order.
        free: free bytes of each device.
    """
    ends = [end / sum(free) for end in accumulate(free)]
    middles = (end - size / 2 for size, end in zip(sizes, accumulate(sizes), strict=True))
    total = sum(sizes)
    return [
        next(number for number, end in enumerate(ends) if middle <= end * total)
        for middle in middles
    ]


def size_of(module: Any) -> int:
    """Return the bytes of the parameters and buffers."""
    held = (*module.parameters(), *module.buffers())
    return sum(one.numel() * one.element_size() for one in held)


def _spread(module: Any, devices: Sequence[str], free: Sequence[int]) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    if size_of(module) > sum(free):
        each = ", ".join(f"{amount / GIB:.1f}" for amount in free)
        raise ModelError(
            f"{type(module).__name__} needs {size_of(module) / GIB:.1f} GiB, but its devices have "
            f"{each} GiB free: give the replica more GPUs (num_gpus), choose a smaller "
            "model.dtype, or quantize the model (model.quantization)"
        )
    blocks = list(blocks_of(module))
    elsewhere = set()
    for block, number in zip(blocks, shares([size_of(one) for one in blocks], free), strict=True):
        if number:
            block.to(devices[number])
            add_hook_to_module(block, AlignDevicesHook(devices[number], io_same_device=True))
            elsewhere |= set(block.modules())
    for one in set(module.modules()) - elsewhere:
        one._apply(lambda tensor: tensor.to(devices[0]), recurse=False)


def _free(device: str) -> int:
    """Return the free bytes of a GPU."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0])
