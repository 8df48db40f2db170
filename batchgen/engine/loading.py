"""A replica's model is loaded: again and again, where its node alone is at fault."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import time
from collections.abc import Callable

from batchgen.attempts import Attempts
from batchgen.engine.shared import SharedAttempts
from batchgen.errors import ModelError, StopJob

LOOK_EVERY_S = 1.0
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 120.0


def load_model(
    load: Callable[[], None], attempts: Attempts | SharedAttempts, stage: str, replica: str
) -> StopJob | None:
    """None once it is loaded; else why it never will be.

    What another replica of the stage has loaded is refused by this node alone: a folder that is
    not there, a full disk, a GPU that others use. It is tried again, with growing pauses, while
    others of the stage work; as long as it waits, Ray Data hands a new replica no shard.
    """
    for tries in itertools.count():
        attempts.load_begins(stage, replica)
        error, is_device_lost = _once(load)
        attempts.load_ends(stage, replica, loaded=error is None)
        if error is None:
            return None
        while (hope := attempts.may_load(stage)) is None:
            time.sleep(LOOK_EVERY_S)
        if not hope:
            return error
        if tries == 0:
            where = f"a replica of the {stage.lower()} pool on {os.uname().nodename}"
            attempts.say(f"{where} cannot start, and tries again while others work: {error}")
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**tries))
        if is_device_lost:
            os._exit(1)  # only a new process can use it again; Ray starts one
    raise AssertionError


def _once(load: Callable[[], None]) -> tuple[StopJob | None, bool]:
    """Why it failed, and whether the device is of no more use to this process.

    Nothing of what was loaded is kept: tracebacks would hold it, and the memory it takes.
    """
    try:
        load()
        return None, False
    except StopJob as error:
        found, kind = error, ""
    except Exception as error:  # an actor that cannot start would be started for ever
        kind = type(error).__name__
        found = ModelError(f"the model cannot be loaded: {kind}: {error}")
    found.__traceback__ = found.__cause__ = found.__context__ = None
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and kind == "OutOfMemoryError":
        torch.cuda.empty_cache()
    return found, kind == "AcceleratorError"
