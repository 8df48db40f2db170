"""Models of the Hugging Face hub, with a small hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchgen.records import ModelInfo, tupled
from tests.ldm_layout import single_file
from tests.model_folders import inspect, run_python
from tests.tiny_models import build_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a snapshot download of team/tiny needs."""

    folder: Path
    served: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/team/tiny/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", COMMIT):
                return self.send(404, error="RevisionNotFound")
            return self.send(200, json.dumps({"id": "team/tiny", "sha": COMMIT}).encode())
        if path == f"/api/models/team/tiny/tree/{COMMIT}":
            names = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
            files = [
                {
                    "type": "file",
                    "path": p.relative_to(self.folder).as_posix(),
                    "size": p.stat().st_size,
                    "oid": "0" * 40,
                }
                for p in names
            ]
            return self.send(200, json.dumps(files).encode())
        if path.startswith(f"/team/tiny/resolve/{COMMIT}/"):
            name = path.split(COMMIT + "/")[1]
            if with_body:
                self.served.append(name)
            return self.send(200, (self.folder / name).read_bytes(), with_body=with_body)
        if "/team/gated" in path:
            return self.send(403, error="GatedRepo")
        return self.send(404, error="RepoNotFound")

    def send(
        self, status: int, body: bytes = b"", *, with_body: bool = True, error: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A hub on this machine; gives the environment in which it is the hub."""
    Hub.folder, Hub.served = folder, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    server.shutdown()
    thread.join()
    server.server_close()


def inspect_in(environment: dict[str, str], path: str, **model: Any) -> ModelInfo | str:
    """What a fresh process finds: the model, or the text of its ModelError."""
    code = (
        "import dataclasses, json; from batchgen import models\n"
        "from batchgen.spec.model import Model\n"
        "try:\n"
        f"    found = models.inspect(Model(path={path!r}, **{model!r}), 'text-to-image')\n"
        "    print(json.dumps(dataclasses.asdict(found)))\n"
        "except models.inspection.ModelError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    done = run_python(code, environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return (
        answer
        if isinstance(answer, str)
        else ModelInfo(**{name: tupled(value) for name, value in answer.items()})
    )


def test_a_hub_model_is_fetched_pinned_and_then_read_offline(
    hub: dict[str, str], folder: Path
) -> None:
    unwanted = [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors",
        "v1-5-pruned.safetensors",
    ]
    (folder / "safety_checker").mkdir()
    for name in unwanted:
        (folder / name).write_bytes(b"large")
    info = inspect_in(hub, "team/tiny")
    assert isinstance(info, ModelInfo)
    assert (info.model_id, info.revision) == ("team/tiny", COMMIT)
    assert info.manifest_sha256 == inspect(folder).manifest_sha256
    assert "unet/diffusion_pytorch_model.safetensors" in Hub.served
    assert not set(unwanted) & set(Hub.served)
    Hub.served.clear()
    offline = hub | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}
    assert inspect_in(offline, "team/tiny", revision=COMMIT) == info
    assert Hub.served == []


def test_a_lora_of_the_hub_is_fetched_alone(hub: dict[str, str], folder: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, folder / "ink.safetensors")
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2)}, folder / "oil.safetensors")
    (folder / "ink.bin").write_bytes(b"pickled")
    lora = {"name": "ink", "path": "team/tiny"}
    assert "name one with weight_name: ink.safetensors, oil.safetensors" in str(
        inspect_in(hub, str(folder), loras=[lora])
    )
    Hub.served.clear()
    found = inspect_in(hub, str(folder), loras=[lora | {"weight_name": "ink.safetensors"}])
    assert isinstance(found, ModelInfo)
    here = [lora | {"path": str(folder / "ink.safetensors")}]
    assert found.manifest_sha256 == inspect(folder, loras=here).manifest_sha256
    assert set(Hub.served) <= {"ink.safetensors"}
    missing = inspect_in(hub, str(folder), loras=[lora | {"path": "team/none"}])
    assert "model.loras.0 'team/none'" in str(missing)
    assert "no such repository on the hub" in str(missing)


def test_pickled_weights_of_the_hub_are_fetched_where_there_is_nothing_else(
    hub: dict[str, str], folder: Path
) -> None:
    unwanted, wanted = (f"{name}/diffusion_pytorch_model.bin" for name in ("vae", "unet"))
    (folder / unwanted).write_bytes(b"large")
    safe = (folder / wanted).with_suffix(".safetensors")
    torch.save(load_file(safe), folder / wanted)
    safe.unlink()
    assert "the weights" in str(inspect_in(hub, "team/tiny"))
    assert wanted not in Hub.served
    info = inspect_in(hub, "team/tiny", allow_pickle=True)
    assert isinstance(info, ModelInfo)
    assert info.manifest_sha256 == inspect(folder, allow_pickle=True).manifest_sha256
    assert wanted in Hub.served
    assert unwanted not in Hub.served
    offline = hub | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}
    assert inspect_in(offline, "team/tiny", revision=COMMIT, allow_pickle=True) == info


def test_a_single_file_takes_its_configurations_from_the_hub(
    hub: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    file = single_file(folder, tmp_path / "tiny.safetensors")
    info = inspect_in(hub, str(file), config="team/tiny", revision=COMMIT)
    assert isinstance(info, ModelInfo)
    assert info.manifest_sha256 == inspect(file, config=str(folder)).manifest_sha256
    assert info.revision.startswith("sha256:")
    assert not [name for name in Hub.served if name.endswith(".safetensors")]


def test_what_the_hub_refuses_is_said(hub: dict[str, str]) -> None:
    cases = {
        ("team/none", None): "no such repository on the hub",
        ("team/gated", None): "is gated: accept its licence",
        ("team/tiny", "v9"): "(revision v9): the hub has no such revision",
    }
    for (path, revision), words in cases.items():
        model = {"revision": revision} if revision else {}
        assert words in str(inspect_in(hub, path, **model))


def test_a_model_that_is_not_cached_is_refused_offline(hub: dict[str, str]) -> None:
    message = str(inspect_in(hub | {"HF_HUB_OFFLINE": "1"}, "team/tiny"))
    assert "not in the hub's cache" in message
    assert "HF_HUB_OFFLINE is set" in message
