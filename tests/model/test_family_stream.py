"""Every family through the real stream, rows to committed shards, in both layouts: same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchgen.families import FAMILIES, Family
from batchgen.models.tiny import BUILDERS
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen.storage import open_store
from jobs import task_inputs
from tests.family_specs import FAMILY_IDS, family_spec
from tests.in_process import LAYOUTS, stream
from tests.outputs import digests_of, table_of

DTYPES = ("bfloat16", "float16")
# A U-Net, a VAE that overflows in float16, a transformer, ControlNets; tests/system tries them all.
NAMES = ("stable-diffusion", "stable-diffusion-xl", "flux", "controlnet")
FEW = [one for one in FAMILIES if one.name in NAMES and one.task in ("text-to-image", "control")]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    task_inputs.main(str(path))
    return path


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_both_layouts_commit_the_same_images(family: Family, rows: Path, tmp_path: Path) -> None:
    model = BUILDERS[family.task, family.name](tmp_path / "model")
    digests, held = {}, {}
    for layout in LAYOUTS:
        output = tmp_path / layout
        markers = stream(family_spec(family, model, rows, output, layout=layout))
        findings = verify(Ledger(open_store(str(output))))
        assert findings.ok, findings.problems
        assert (findings.planned, findings.accepted) == (6, 6)
        digests[layout] = digests_of(output)
        held[layout] = [marker.parameter_counts for marker in markers]
    assert digests["fused"] == digests["staged"]
    assert len(set(digests["fused"].values())) == 6
    assert held["fused"] == held["staged"]
    for parts in held["fused"]:
        check_parts(family, parts)
    facts = table_of(tmp_path / "fused").to_pylist()[0]
    assert (facts["task"], facts["model_id"]) == (family.task, str(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FEW, ids=lambda family: family.name)
def test_a_family_runs_in_16_bits(family: Family, dtype: str, rows: Path, tmp_path: Path) -> None:
    runs_in_16_bits(family, dtype, rows, tmp_path)


def runs_in_16_bits(family: Family, dtype: str, rows: Path, folder: Path) -> None:
    """The default on GPUs; here on the CPU. No part returns a dtype that the next one refuses."""
    model = BUILDERS[family.task, family.name](folder / "model")
    changes: dict[str, Any] = {"model.dtype": dtype}
    if family.optional_control:  # the tiny estimator's depths, 1e-8, are all 0 in float16
        changes["input.columns.control"] = "map"
    tree = family_spec(family, model, rows, folder / "out").model_dump(mode="json")
    stream(build(merge(tree, changes)))
    findings = verify(Ledger(open_store(str(folder / "out"))))
    assert findings.ok, findings.problems
    assert (findings.planned, findings.accepted) == (6, 6)


def check_parts(family: Family, parts: dict[str, dict[str, int]]) -> None:
    """Each stage holds its own components and no other; a VAE's halves are smaller than the VAE."""
    for stage in ("encoder", "denoiser", "decoder"):
        held = {name.partition(".")[0] for name in parts[stage]}
        assert held <= {*getattr(family, stage), "refiner"}, f"{stage} holds {held}"
    assert sum(parts["denoiser"].values()) > 0
    assert set(parts["decoder"]) == {family.vae}
    encoding, decoding = parts["encoder"].get(family.vae), parts["decoder"][family.vae]
    assert encoding is None or encoding != decoding
