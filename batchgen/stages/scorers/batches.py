"""Calls of a scorer's model: always the same number of inputs of one shape, so that neighbours
change nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from batchgen.stages.scorers.scorer import Array


class Batches:
    """A model that is called with exactly ``size`` inputs of one shape.

    Only inputs of the same shape share a call, and a call with fewer is filled up with copies of
    its last one. One thread at a time calls the model, so that it needs the memory of one call.
    """

    def __init__(
        self, prepare: Callable[[Any], Array], run: Callable[[Array], Array], size: int
    ) -> None:
        """Args:
        prepare: turns one input into an array.
        run: takes ``size`` such arrays as one, returns one result for each.
        size: number of inputs in a call.
        """
        self._prepare = prepare
        self._run = run
        self._size = size
        self._turn = threading.Lock()

    def __call__(self, inputs: Sequence[Any]) -> list[Array]:
        """One result for each input, in their order."""
        found: dict[int, Array] = {}
        shapes: dict[tuple[int, ...], list[tuple[int, Array]]] = {}
        for number, one in enumerate(inputs):
            array = self._prepare(one)
            shapes.setdefault(array.shape, []).append((number, array))
        for alike in shapes.values():
            for start in range(0, len(alike), self._size):
                part = alike[start : start + self._size]
                arrays = [array for _, array in part]
                arrays += [arrays[-1]] * (self._size - len(part))
                with self._turn:
                    results = self._run(np.stack(arrays))
                found |= {number: results[place] for place, (number, _) in enumerate(part)}
        return [found[number] for number in range(len(inputs))]
