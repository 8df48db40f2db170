"""Keeps schedulers from waiting for the device at each step of a sampling loop.

A pipeline passes each timestep to the model and to its scheduler, as an element of a tensor on the
device. Schedulers index tables on the host with it or compare it, so the host waits until the
device has done all earlier work. Here a scheduler also keeps its timesteps on the host, and
computes with those; the model still gets the timestep that is on the device, of the same value.

What a step copies to the device does not wait either (``models.waits``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import Any


def on_host(scheduler: Any) -> Any:
    """Make a scheduler compute with timesteps on the host; returns the same object.

    Its class becomes a subclass with the same name, so that copies of it behave alike.
    """
    kind: Any = type(scheduler)
    scheduler.__class__ = _on_host(kind)
    return scheduler


@cache
def _on_host(kind: Any) -> Any:
    """The subclass of a scheduler class, of which diffusers has about twenty."""
    from batchgen.models.waits import NotWaiting  # which needs torch

    if hasattr(kind, "_host_timesteps"):
        return kind

    class OnHost(kind):  # type: ignore[misc]
        timesteps: Any
        model_device: Any = None  # for pipelines that do not say where their timesteps belong
        _host_timesteps: Any = None  # None: the timesteps themselves are on the host
        _device_timestep: Any = None  # that of the present step

        @wraps(kind.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            given = signature(kind.set_timesteps).bind(self, *args, **kwargs)
            device = given.arguments.get("device") or self.model_device
            self._host_timesteps = None
            if device is None or str(device) == "cpu":
                kind.set_timesteps(self, *args, **kwargs)
                return
            # Computed twice, since copying them to the host would wait for the device.
            given.arguments["device"] = "cpu"
            kind.set_timesteps(*given.args, **given.kwargs)
            kept = self.timesteps
            given.arguments["device"] = device
            with NotWaiting():
                kind.set_timesteps(*given.args, **given.kwargs)
            self._host_timesteps = kept

        @contextmanager
        def _at(self, timestep: Any) -> Iterator[Any]:
            """Inside, the scheduler's timesteps are on the host; yields the given one there."""
            place = None if self._host_timesteps is None else place_in(self.timesteps, timestep)
            if place is None:
                yield timestep
                return
            on_device = self.timesteps
            self.timesteps, self._device_timestep = self._host_timesteps, timestep
            try:
                with NotWaiting():
                    yield self._host_timesteps[place]
            finally:
                self.timesteps, self._device_timestep = on_device, None

    for name in ("scale_model_input", "step"):
        if hasattr(kind, name):
            setattr(OnHost, name, _with_known_timestep(getattr(kind, name)))
    if hasattr(kind, "get_scalings_for_boundary_condition_discrete"):

        @wraps(kind.get_scalings_for_boundary_condition_discrete)
        def scalings(self: Any, timestep: Any) -> Any:
            """LCM multiplies by the timestep, on its device: the same arithmetic as before."""
            given = timestep if self._device_timestep is None else self._device_timestep
            return kind.get_scalings_for_boundary_condition_discrete(self, given)

        OnHost.get_scalings_for_boundary_condition_discrete = scalings
    OnHost.__name__, OnHost.__qualname__ = kind.__name__, kind.__qualname__
    OnHost.__module__ = kind.__module__
    return OnHost


def _with_known_timestep(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method, whose second argument is a timestep, compute on the host."""

    @wraps(method)
    def known(self: Any, first: Any, timestep: Any = None, *args: Any, **kwargs: Any) -> Any:
        with self._at(timestep) as host:
            return method(self, first, host, *args, **kwargs)

    return known


def place_in(timesteps: Any, timestep: Any) -> int | None:
    """The position of an element that was taken from ``timesteps``; None if it was not.

    It is found without reading the value: the element is a view into the same memory.
    """
    base = getattr(timestep, "_base", None)
    if base is None or timestep.dim() != 0:
        return None
    whole = timesteps if timesteps._base is None else timesteps._base
    if base is not whole:
        return None
    place: int = timestep.storage_offset() - timesteps.storage_offset()
    return place
