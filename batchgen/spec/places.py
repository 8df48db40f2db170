"""Makes the places of a spec absolute, and configures how this process reaches its stores."""

from __future__ import annotations

import os
from typing import Any

from batchgen.spec.score_section import ScorerSpec
from batchgen.spec.spec import Spec
from batchgen.storage import absolute, configure


def reach_stores(spec: Spec) -> None:
    """Configure the stores of this process by the spec's limits and options."""
    configure(spec.storage_options, spec.storage.limits())


def anywhere(spec: Spec) -> Spec:
    """Make local paths absolute, for workers and for a resume from another folder."""
    path = absolute(spec.input.path) if spec.input.path else ""
    roots = spec.input.uri_roots
    if roots is not None:
        roots = tuple(root if root.endswith("://") else absolute(root) for root in roots)
    source = spec.input.model_copy(update={"path": path, "uri_roots": roots})
    output = spec.output.model_copy(update={"url": absolute(spec.output.url)})
    score = tuple(map(_scorer_anywhere, spec.score))
    return spec.model_copy(update={"input": source, "output": output, "score": score})


def _scorer_anywhere(scorer: ScorerSpec) -> ScorerSpec:
    """Make the local paths of a scorer absolute; a hub id or a name is none."""
    changes: dict[str, Any] = {}
    if scorer.model is not None and os.path.exists(os.path.expanduser(scorer.model)):
        changes["model"] = os.path.abspath(os.path.expanduser(scorer.model))
    reference = scorer.options.get("reference")
    if isinstance(reference, str):
        changes["options"] = {**scorer.options, "reference": absolute(reference)}
    return scorer.model_copy(update=changes)
