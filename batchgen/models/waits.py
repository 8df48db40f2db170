"""Copies to the device, and what is computed there, for which the host does not wait.

A copy from memory that is not pinned waits until the device has done all work before it. Schedulers
copy noise and values of tables in each step, and some models copy numbers in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NotWaiting(TorchFunctionMode):
    """While it is active, copies to the device and ``torch.linalg.solve`` do not wait for it.

    ``solve`` reads on the host whether it succeeded; ``solve_ex`` computes the same without.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **given).result
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            return func(_pinned(args[0]), *args[1:], **{"non_blocking": True, **given})
        if func is torch.as_tensor and "device" in given and not isinstance(args[0], Tensor):
            device = given.pop("device")
            return _pinned(func(*args, **given)).to(device, non_blocking=True)
        return func(*args, **given)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def models_without_waiting(pipeline: Any) -> None:
    """Let models that copy numbers to their device in each call not wait for it."""
    for name in ("unet", "transformer"):
        if isinstance(model := getattr(pipeline, name, None), torch.nn.Module):
            model.forward = _without_waiting(model.forward)


def _without_waiting(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def known(*args: Any, **kwargs: Any) -> Any:
        with NotWaiting():
            return forward(*args, **kwargs)

    return known
