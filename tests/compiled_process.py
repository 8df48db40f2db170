"""A process that compiles a model as a replica does, and generates a shard; prints what it did.

``python -m tests.compiled_process`` with the environment variable ``MODEL``: the model's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from batchgen.models.warm_up import warm_up
from tests.family_stages import FamilyStages, batch, call


def main() -> None:
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    stages = FamilyStages(Path(os.environ["MODEL"]), "text-to-image", compiled="regional")
    held = {"encode": stages.encode, "denoise": stages.denoise, "decode": stages.decode}
    found = warm_up(stages.info, stages.spec, [call()], held)
    pixels = stages.fused(batch([0, 1], call())).pixels
    made = {
        "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "after": counters["stats"]["unique_graphs"],
    }
    print(json.dumps(asdict(found) | made))


if __name__ == "__main__":
    main()
