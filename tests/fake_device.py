"""A device without hardware: tensors whose values are on the host but that say they are elsewhere.

It records when the host would wait for the device: for a value (``item``, ``bool``), for a number
of elements (``nonzero``), for the check of a result, or for a copy to the host, and for one to the
device that is not said to be ``non_blocking`` (as CUDA does, unless the memory is pinned). As on a
real device, an operation takes no array from the host, only numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # torch computes nothing on it, so nothing can pass unseen
# Operations whose result the host must know before it goes on.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "unique_",
    "is_nonzero",
    "equal",
    "_linalg_check_errors",
    "repeat_interleave.Tensor",
    "bincount",
)
COPIES = ("copy_", "_to_copy")
TAKES_BOTH = ("copy_", "_to_copy", "index.Tensor", "index_put")  # from the host and the device


class OnDevice(torch.Tensor):
    """A tensor on the device; ``held`` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __init__(self, held: torch.Tensor) -> None:
        """Nothing to do; torch's class has no arguments."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the fake device")


class FakeDevice(TorchDispatchMode):
    """While it is active, tensors move to the device and back; ``waits`` lists each wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._numbers = _Numbers(self.waits)

    def __enter__(self) -> FakeDevice:
        self._numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._numbers.__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors((args, kwargs.values())))
        given = [one for one in tensors if isinstance(one, OnDevice)]
        wanted = kwargs.get("device")
        if not given and wanted is None:
            return func(*args, **kwargs)
        name = str(func).removeprefix("aten.")
        goes = wanted is not None and torch.device(wanted) == DEVICE
        if given and not name.startswith(TAKES_BOTH):
            arrays = [one for one in tensors if not isinstance(one, OnDevice) and one.dim()]
            assert not arrays, f"{name} takes {[one.shape for one in arrays]} from the host"
        if given and self._waits(name, args, wanted):
            self.waits.append(name)
        if name.startswith(COPIES) and self._blocks(name, args, kwargs):
            self.waits.append(f"{name} to the device")
        if goes:
            kwargs["device"] = "cpu"
        made = func(*_held(args), **_held(kwargs))
        known = {id(one.held): one for one in given}
        known |= {id(one): one for one in tensors if not isinstance(one, OnDevice)}
        arrives = goes or (bool(given) and (wanted is None or torch.device(wanted) == DEVICE))

        def placed(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            return known.get(id(one), OnDevice(one) if arrives else one)

        return tree_map(placed, made)

    def _waits(self, name: str, args: Any, wanted: Any) -> bool:
        if name.startswith("copy_"):
            return not isinstance(args[0], OnDevice)
        if name.startswith("index.Tensor"):  # a mask: its number of elements is not known
            masks = [one for one in args[1] if one is not None and one.dtype == torch.bool]
            return any(isinstance(one, OnDevice) for one in masks)
        if name.startswith("_to_copy"):
            return wanted is not None and torch.device(wanted) != DEVICE
        return name.startswith(WAITING)

    def _blocks(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether it copies to the device and waits for that."""
        if name.startswith("copy_"):
            target, source = args[0], args[1]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            return blocking and isinstance(target, OnDevice) and not isinstance(source, OnDevice)
        goes = kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE
        return goes and not isinstance(args[0], OnDevice) and not kwargs.get("non_blocking")


READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy")


class _Numbers(TorchFunctionMode):
    """Numbers that go to the device or come from it outside of operations, as torch's C++ does.

    It leaves out the values of meta tensors in ``torch.tensor(numbers, device=...)`` and in
    ``tensor[numbers]``, and it reads elements of lists and values by itself.
    """

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, held = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if held is torch.Tensor.data and name == "__set__" and isinstance(args[0], OnDevice):
            args[0].held = args[1].held  # other values, perhaps of another dtype
        if name in READS and isinstance(args[0], OnDevice):
            self._waits.append(name)
            return func(args[0].held, *args[1:], **kwargs)
        if func is torch.Tensor.__getitem__:
            args = (args[0], _indices(args[1]))
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            device = kwargs.pop("device", None)
            if any(isinstance(one, OnDevice) for one in tree_leaves(args)):
                self._waits.append(name)
            made = func(*tree_map(_number, args), **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


def _indices(given: Any) -> Any:
    """Positions in lists as tensors; torch would make tensors without values of them."""
    if isinstance(given, tuple):
        return tuple(map(_indices, given))
    return torch.tensor(given) if isinstance(given, list) else given


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for one in values:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, list | tuple | type({}.values())):
            yield from _tensors(one)


def _number(one: Any) -> Any:
    return one.held.item() if isinstance(one, OnDevice) else one


def _held(tree: Any) -> Any:
    return tree_map(lambda one: one.held if isinstance(one, OnDevice) else one, tree)
