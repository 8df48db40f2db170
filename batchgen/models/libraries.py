"""Imports the model libraries, silences them and sets what a sample's bytes depend on."""

from __future__ import annotations

import gc
import logging
import os
import sys
from functools import cache
from typing import Any

SUMS = "MKL_CBWR"


def quiet_libraries() -> None:
    """Silence the logs and progress bars of the model libraries: they tell users nothing."""
    for name in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao if it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    speaking: Any = transformers.utils.logging
    speaking.set_verbosity_error()  # before diffusers' import, which makes transformers log
    speaking.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@cache
def fix_sums() -> bool:
    """Have the libraries add in a fixed order; False if torch was loaded before, which may be late.

    MKL and cuBLAS read these variables when they compute for the first time in a process.
    """
    late = "torch" in sys.modules and SUMS not in os.environ
    # By default Intel's MKL adds in another order if the memory of the weights is aligned
    # differently: two copies of a model gave latents that differ by 5e-6 (Sapphire Rapids). The
    # setting costs no time.
    os.environ.setdefault(SUMS, "AUTO,STRICT")
    # With several streams, cuBLAS gives the same sums only with workspaces of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return not late


def prepare(threads: int) -> None:
    """Import the libraries, and set what a sample's bytes depend on in this process."""
    fix_sums()
    import_libraries()
    import torch

    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # float32 is float32: otherwise convolutions round to 10 bits on GPUs that have TF32, and a
    # float32 job gives other images on other GPUs. Products of matrices do not, by torch's default.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if torch.cuda.is_available():
        # Warns where an operation has only kernels whose sums depend on the order of threads.
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False  # it would only take time


@cache
def import_libraries() -> None:
    """Import what every pipeline needs, once a process, with the garbage collector off.

    The imports make some 500,000 objects that live as long as the process. The collector goes
    through them again and again: without it a replica is ready after 5.3 s instead of 7.1 s of one
    CPU.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        quiet_libraries()
        import diffusers.pipelines.pipeline_utils  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
    finally:
        if was_on:
            gc.enable()
