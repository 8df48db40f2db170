"""From the spec's model to ready stages: the only home of finding, checking and loading models."""

from batchgen.replicas.find import shipped_names
from batchgen.replicas.inspection import ModelInfo, inspect, packages_used
from batchgen.replicas.load import (
    load_decoder,
    load_denoiser,
    load_encoder,
    parameter_counts,
)
from batchgen.replicas.schedulers import (
    FLOW_SCHEDULERS,
    REFUSED_SCHEDULERS,
    SCHEDULERS,
    check_scheduler,
    chosen_scheduler,
)
from batchgen.replicas.weighting import check_prompt

__all__ = [
    "FLOW_SCHEDULERS",
    "REFUSED_SCHEDULERS",
    "SCHEDULERS",
    "ModelInfo",
    "check_prompt",
    "check_scheduler",
    "chosen_scheduler",
    "inspect",
    "load_decoder",
    "load_denoiser",
    "load_encoder",
    "packages_used",
    "parameter_counts",
    "shipped_names",
]
