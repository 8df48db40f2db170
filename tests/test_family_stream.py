"""Every family through the real stream, rows to committed shards, in both layouts: same bytes.

Reader, frames, actors, writer and ledger are the real ones. The actors run in this process: in
processes of their own each would import the model libraries again, for some hundred replicas. (That
Ray carries their frames is the matter of `test_run.py` and of `python -m tests.chaos.families`.)
"""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen import runner
from batchgen.engine.actors import Attempts, Decode, Denoise, Encode, Generate, Job, StageActor
from batchgen.families import FAMILIES, Family
from batchgen.frames import COMMITTED, from_block, from_rows
from batchgen.ledger import Ledger, Marker, parse_marker
from batchgen.reader import make_spans, read_columns, read_span
from batchgen.replicas.tiny import BUILDERS
from batchgen.spec import Spec
from batchgen.storage import open_store
from batchgen.verify import verify
from jobs import task_inputs
from tests.family_specs import FAMILY_IDS, family_spec
from tests.outputs import digests_of, table_of

LAYOUTS: dict[str, tuple[type[StageActor], ...]] = {
    "fused": (Generate,),
    "staged": (Encode, Denoise, Decode),
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    task_inputs.main(str(path))
    return path


def stream(spec: Spec) -> list[Marker]:
    """What `engine.generate` does, with every actor in this process."""
    plan = runner.plan_job(spec)
    ledger = Ledger(open_store(spec.output.url))
    ledger.freeze(plan, spec)
    job = Job(plan, ledger.store.url, 0.0)
    attempts = Attempts()
    actors = [actor(job, attempts) for actor in LAYOUTS[spec.resources.layout]]
    markers = []
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    for span in make_spans(plan, range(plan.shards)):
        for shard_rows in read_span(span, plan.spec, columns):
            block = from_rows(shard_rows).to_block()
            for actor in actors:
                block = actor(block)
            frame = from_block(block)
            assert frame.state == COMMITTED, frame.facts.decode()[:2000]
            markers.append(parse_marker(frame.facts))
    return markers


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


def check_parts(family: Family, parts: dict[str, dict[str, int]]) -> None:
    """Each stage holds its own components and no other; a VAE's halves are smaller than the VAE."""
    for stage in ("encoder", "denoiser", "decoder"):
        held = {name.partition(".")[0] for name in parts[stage]}
        assert held <= {*getattr(family, stage), "refiner"}, f"{stage} holds {held}"
    assert sum(parts["denoiser"].values()) > 0
    assert set(parts["decoder"]) == {family.vae}
    encoding, decoding = parts["encoder"].get(family.vae), parts["decoder"][family.vae]
    assert encoding is None or encoding != decoding
