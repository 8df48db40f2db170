"""Loads a replica's model; retries with back-off if the failure looks local to this node."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable
from functools import cache

from batchgen import models
from batchgen.attempts import Attempts
from batchgen.engine.memory import clear_cache
from batchgen.engine.shared import SharedAttempts
from batchgen.errors import ModelError, StopJob
from batchgen.stages.out_of_memory import is_out_of_memory

LOOK_EVERY_S = 1.0
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 120.0


@cache
def import_libraries() -> None:
    """Import the model libraries once in this process, which is the replica's own.

    Their 500,000 objects live as long as it. Frozen, they are left out of the collections that
    follow, of which the first takes a second.
    """
    models.import_libraries()
    gc.freeze()


def load_model(
    load: Callable[[], None],
    attempts: Attempts | SharedAttempts,
    stage: str,
    replica: str,
    hint: Callable[[], str] = str,
) -> StopJob | None:
    """Returns None once the model is loaded, or the error if it cannot be loaded.

    If another replica of the stage has loaded the same model, the fault is local to this node: a
    missing folder, a full disk, a GPU in use by others. Then loading is retried with back-off
    while other replicas of the stage work. Ray Data sends a replica no shard before it is loaded.

    ``hint`` tells what to do if memory is lacking.
    """
    for tries in itertools.count():
        attempts.load_begins(stage, replica)
        error, is_device_lost = _once(load, hint)
        attempts.load_ends(stage, replica, loaded=error is None)
        if error is None:
            return None
        while (hope := attempts.may_load(stage)) is None:
            time.sleep(LOOK_EVERY_S)
        if not hope:
            return error
        if tries == 0:
            where = f"a replica of the {stage.lower()} pool on {os.uname().nodename}"
            attempts.say(f"{where} could not start; it retries while other replicas work: {error}")
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**tries))
        if is_device_lost:
            os._exit(1)  # only a new process can use the device again; Ray starts one
    raise AssertionError


def _once(load: Callable[[], None], hint: Callable[[], str] = str) -> tuple[StopJob | None, bool]:
    """One attempt: the error or None, and whether this process can no longer use its device.

    The error's traceback is removed, because it would keep what was loaded in memory.
    """
    is_memory = False
    try:
        load()
        return None, False
    except StopJob as error:
        found, kind = error, ""
    except Exception as error:  # Ray restarts an actor without end if its constructor raises
        kind, is_memory = type(error).__name__, is_out_of_memory(error)
        advice = hint() if is_memory else ""
        said = f"the model cannot be loaded: {kind}: {error}"
        found = ModelError(f"{said}; {advice}" if advice else said)
    found.__traceback__ = found.__cause__ = found.__context__ = None
    gc.collect()
    is_lost = kind == "AcceleratorError"
    if is_memory and not is_lost:
        clear_cache()
    return found, is_lost
