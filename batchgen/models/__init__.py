"""Finds, checks and loads models: from the spec's section ``model`` to ready stages."""

from batchgen.families.schedulers import (
    FLOW_SCHEDULERS,
    REFUSED_SCHEDULERS,
    SCHEDULERS,
    check_scheduler,
    chosen_scheduler,
)
from batchgen.models.compiling import check_compile
from batchgen.models.find import shipped_names
from batchgen.models.inspection import inspect, packages_used
from batchgen.models.libraries import SUMS, fix_sums, import_libraries
from batchgen.models.load import (
    load_decoder,
    load_denoiser,
    load_encoder,
    parameter_counts,
)
from batchgen.models.weighting import check_prompt

__all__ = [
    "FLOW_SCHEDULERS",
    "REFUSED_SCHEDULERS",
    "SCHEDULERS",
    "SUMS",
    "check_compile",
    "check_prompt",
    "check_scheduler",
    "chosen_scheduler",
    "fix_sums",
    "import_libraries",
    "inspect",
    "load_decoder",
    "load_denoiser",
    "load_encoder",
    "packages_used",
    "parameter_counts",
    "shipped_names",
]
