"""Counts the bytes of tensors on the meta device, whose tensors have shapes but no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten


class Unread(Exception):
    """A stage reads a number that only a computation with weights would give."""


class Shapes:
    """Runs operations on the meta device, and repeats the known ones from a table.

    Many of torch's own meta functions are Python code and take a millisecond, while models repeat
    their blocks: SDXL is measured in a fifth of the time.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, ...] | None] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            key = (func, _described(args), _described(kwargs))
            known = self._known.get(key, ())
        except TypeError:  # an argument that is not hashable
            return func(*args, **kwargs)
        if known:
            made = tuple(
                torch.empty_strided(size, stride, dtype=dtype, device="meta")
                for size, stride, dtype in known[1:]
            )
            return made if known[0] else made[0]
        made = func(*args, **kwargs)
        if known == ():
            self._known[key] = _repeatable(func, made, (args, kwargs))
        return made


def _described(value: Any) -> Any:
    """A hashable description of arguments, with the layout of each tensor instead of itself."""
    if isinstance(value, torch.Tensor):
        return (torch.Tensor, value.size(), value.stride(), value.dtype, value.storage_offset())
    if isinstance(value, list | tuple):
        return (type(value), *map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in value.items())
    return type(value), value


def _repeatable(func: Any, made: Any, given: Any) -> tuple[Any, ...] | None:
    """The layouts of the results, after whether they are several; None if they are not new."""
    several = isinstance(made, tuple)
    results = made if several else (made,)
    if func._schema.is_mutable or not all(isinstance(one, torch.Tensor) for one in results):
        return None
    tensors = (*tree_leaves(given), *results)
    storages = [one.untyped_storage()._cdata for one in tensors if isinstance(one, torch.Tensor)]
    new = {one.untyped_storage()._cdata for one in results}
    if len(new) < len(results) or any(storages.count(one) > 1 for one in new):
        return None
    return (several, *((one.size(), one.stride(), one.dtype) for one in results))


class Trace(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive on a device, which is ``meta`` here.

    Vectors, integers and flags are computed on the CPU instead, since schedulers, tokenizers and
    masks read them; if they would be on the device, their bytes count. Floats that are copied from
    the device to the CPU arrive there as zeros. Attention is counted as the fused kernels of GPUs
    and CPUs do it, without the matrix of scores.

    torch's ``MemTracker`` (torch.distributed._tools) counts in the same way. It does not handle
    values that are read, and attributes memory to modules, which makes it slower.

    Args:
        held: tensors that are on the device before: weights, and results of earlier stages.
        shapes: known operations, to be shared by several traces.

    Attributes:
        live: bytes of the living tensors.
        peak: the largest value of ``live`` so far.
    """

    def __init__(self, held: Iterable[torch.Tensor], shapes: Shapes | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shapes = shapes or Shapes()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made, on_device = self._run(func, args, kwargs, given)
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and (on_device or one.is_meta):
                self._count(one)
        return made

    def _run(
        self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]
    ) -> tuple[Any, bool]:
        """Run one operation; also tell whether its results would be on the device."""
        wanted = kwargs.get("device")
        if any(one.is_meta for one in given):
            if func is aten._local_scalar_dense.default:
                raise Unread
            if wanted is not None and wanted.type == "cpu":
                return torch.zeros_like(given[0], dtype=kwargs.get("dtype"), device="cpu"), False
            if func._schema.is_mutable and not args[0].is_meta:
                return args[0], self._is_counted(args[0])  # a copy into a tensor on the CPU
            if func is aten.native_group_norm.default:
                return _group_norm(*args), True
            if func is aten.index.Tensor:
                args = (args[0], _positions(args[1]))
            args, kwargs = tree_map_only(torch.Tensor, _to_meta, (args, kwargs))
            return self._shapes(func, args, kwargs), True
        if wanted is None or wanted.type != "meta":
            return func(*args, **kwargs), any(map(self._is_counted, given))
        made = func(*args, **kwargs)
        if _is_read(made):
            made = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return made, True

    def _is_counted(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, partial(self._forget, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: Any) -> None:
        del self._storages[key]
        self.live -= size


class Attention(TorchFunctionMode):
    """Replaces attention on the meta device, which would compute all scores, by a fused kernel.

    Also gives ``torch.tensor`` its values back, which on this device has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if func is scaled_dot_product_attention:
            query, value = args[0] if args else kwargs["query"], kwargs.get("value")
            value = args[2] if len(args) > 2 else value
            if query.is_meta and query.ndim == 4:
                batch, heads, length, _ = query.shape
                made = query.new_empty(batch, length, heads, value.shape[-1])
                return made.transpose(1, 2)
        return func(*args, **kwargs)


@contextmanager
def counting(held: Iterable[torch.Tensor], shapes: Shapes | None = None) -> Iterator[Trace]:
    """Count tensors inside the context; the arguments are those of ``Trace``."""
    trace = Trace(held, shapes)
    with Attention(), trace:
        yield trace


def _is_read(tensor: torch.Tensor) -> bool:
    """Whether a library may read the tensor's values."""
    return tensor.ndim < 2 or not tensor.is_floating_point()


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.ndim == 0 else tensor.to("meta")


def _positions(indices: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices in which masks, whose values are known, are replaced by the numbers of their ones."""
    found: list[torch.Tensor | None] = []
    for one in indices:
        if one is None or one.dtype != torch.bool or one.is_meta:
            found.append(one)
        else:
            found += one.nonzero(as_tuple=True)
    return found


def _group_norm(
    images: torch.Tensor, weight: Any, bias: Any, count: int, *sizes: Any
) -> tuple[torch.Tensor, ...]:
    """What the kernels allocate; on the meta device torch composes it from several operations."""
    groups = sizes[2]  # channels, pixels, groups, epsilon
    return torch.empty_like(images), *(images.new_empty(count, groups) for _ in range(2))
