"""A fake device for offloaded weights: their copies come and go, late and in the wrong order too.

What diffusers' hooks would do on CUDA happens here without one. A copy that was queued on a stream
is not there before the host has waited for that stream, and weights that the device still reads are
not dropped before the host has waited for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from tests.fake_device import DEVICE, FakeDevice, OnDevice, _Numbers

HELD, PLACE = torch.Tensor.data, torch.Tensor.device  # descriptors of what hooks get and set


class WeightsDevice(FakeDevice):
    """``copies`` has the weights that are on the device: host tensor -> its copy there.

    Attributes:
        most: the most bytes of the copies at a time.
        arrived: number of copies so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = WeakTensorKeyDictionary()
        self.most = self.arrived = 0
        self._late: dict[int, OnDevice] = {}  # queued on a stream, which was not waited for
        self._read: dict[int, OnDevice] = {}  # by work of the device, which was not waited for
        self._in_stream = False
        self._numbers = _Weights(self.waits, self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self.there, (args, dict(kwargs or {})))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, OnDevice)]
        for one in given:
            assert id(one) not in self._late, f"{func} reads weights before they have arrived"
            self._read[id(one)] = one
        before = len(self.waits)
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.waits) > before:
            self._read.clear()
        if self._in_stream and kwargs.get("non_blocking") and isinstance(made, OnDevice):
            self._late[id(made)] = made
        return made

    def there(self, one: Any) -> Any:
        """The copy of a weight, if it has one; else the value itself."""
        if isinstance(one, torch.Tensor) and not isinstance(one, OnDevice):
            return self.copies.get(one, one)
        return one

    def put(self, weight: torch.Tensor, held: torch.Tensor) -> bool:
        """Give a weight of the host other values; whether these are on the device."""
        if isinstance(weight, OnDevice):
            return False
        old = self.copies.pop(weight, None)
        if old is not None and not isinstance(held, OnDevice):
            assert id(old) not in self._read, "weights are dropped while the device reads them"
        if isinstance(held, OnDevice):
            self.copies[weight] = held
            self.arrived += 1
            self.most = max(self.most, self.held_bytes())
            return True
        return False

    def held_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(one.nbytes for one in self.copies.values())

    # --- what diffusers asks of a device's module, such as torch.cuda ----------------------------

    def Stream(self) -> _Stream:
        return _Stream(self._late)

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        self._in_stream = True
        try:
            yield
        finally:
            self._in_stream = False

    def current_stream(self) -> _Stream:
        return _Stream(self._read)


class _Stream:
    """To wait for it ends what is under way on it."""

    def __init__(self, under_way: dict[int, OnDevice]) -> None:
        self._under_way = under_way

    def synchronize(self) -> None:
        self._under_way.clear()


class _Weights(_Numbers):
    def __init__(self, waits: list[str], device: WeightsDevice) -> None:
        super().__init__(waits)
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, held = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if held is HELD and name == "__set__" and self._device.put(*args):
            return None
        if held is HELD and name == "__get__" and args[0] in self._device.copies:
            return self._device.copies[args[0]]
        if held is PLACE and name == "__get__" and args[0] in self._device.copies:
            return DEVICE
        if name == "is_pinned":
            return True
        if name == "pin_memory":
            return args[0].clone()
        # For torch itself the weight is on the host, where it may choose other operations.
        if name != "_has_compatible_shallow_copy_type":
            args, kwargs = tree_map(self._device.there, (args, dict(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs)
