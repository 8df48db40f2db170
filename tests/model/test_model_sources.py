"""Models at URLs, and with pickled weights."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from batchgen import models
from batchgen.errors import InputError, ModelError, StorageFailed
from batchgen.models.tiny import ldm, stable_diffusion
from batchgen.secrets import without_secrets
from batchgen.storage import Stat, Store
from batchgen.storage.cache import CACHE, fetch
from tests.family_stages import FamilyStages, batch, call
from tests.model_folders import TEXT, edit, inspect, refusal, spec_of
from tests.source_pixels import pixels


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion.build_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is fetched comes to lie."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url(saved: Path) -> Iterator[str]:
    """A model in a store."""
    place = f"memory://{uuid.uuid4().hex}/tiny"
    store = fsspec.filesystem("memory")
    store.put(str(saved), place, recursive=True)
    yield place
    store.rm(place, recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are fetched, as it happens."""
    names: list[str] = []

    def counted(store: Store, stat: Stat, path: str) -> None:
        names.append(stat.path)
        whole(store, stat, path)

    whole = Store.fetch
    monkeypatch.setattr(Store, "fetch", counted)
    return names


def folders_in(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


# --- URLs ----------------------------------------------------------------------------------------


def test_a_model_at_a_url_is_fetched_once(
    saved: Path, url: str, cache: Path, fetched: list[str]
) -> None:
    store = fsspec.filesystem("memory")
    for name in ("README.md", "unet/diffusion_pytorch_model.bin", "safety_checker/config.json"):
        store.pipe_file(f"{url}/{name}", b"large")
    info = inspect(url)
    local = inspect(saved)
    assert info == replace(local, model_id=url, path=info.path)
    assert [Path(info.path)] == folders_in(cache)
    here = {path.relative_to(info.path) for path in Path(info.path).rglob("*") if path.is_file()}
    there = {path.relative_to(saved) for path in saved.rglob("*") if path.is_file()}
    assert here == there
    assert len(fetched) == len(there)
    assert inspect(url) == info
    assert len(fetched) == len(there)


def test_a_model_that_changed_at_its_url_is_another_folder(url: str, cache: Path) -> None:
    before = inspect(url)
    store = fsspec.filesystem("memory")
    config = store.cat_file(f"{url}/scheduler/scheduler_config.json")
    store.pipe_file(f"{url}/scheduler/scheduler_config.json", config + b" ")
    after = inspect(url)
    assert after.path != before.path
    assert after.manifest_sha256 != before.manifest_sha256
    assert Path(before.path).is_dir()


def test_another_node_fetches_for_itself(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = folder.as_uri()
    info, ready = inspect(url), spec_of(Path("x"))
    ready = ready.model_copy(update={"model": ready.model.model_copy(update={"path": url})})
    assert models.load_decoder(info, ready).batch_size == 2
    shutil.rmtree(cache)
    assert models.load_decoder(replace(info, path="/of/another/node"), ready).batch_size == 2
    assert len(folders_in(cache)) == 1
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    with pytest.raises(
        ModelError, match="is not the planned one: the SHA-256 of its files begins with"
    ):
        models.load_decoder(replace(info, path="/of/a/third"), ready)


def test_images_are_those_of_the_folder(saved: Path, url: str, cache: Path) -> None:
    stages = FamilyStages(saved, TEXT)
    ready = stages.spec.model_copy(
        update={"model": stages.spec.model.model_copy(update={"path": url})}
    )
    info = models.inspect(ready.model, TEXT)
    given = batch([0, 1, 2], call())
    made = models.load_encoder(info, ready)(given)
    latents = models.load_denoiser(info, ready)(made)
    other = models.load_decoder(info, ready)(latents).pixels
    assert np.array_equal(other, stages.fused(given).pixels)


def test_many_processes_of_a_node_fetch_once(url: str, cache: Path, fetched: list[str]) -> None:
    """Threads stand in for processes, because the lock is between open files."""
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(url, lambda names: names)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(fetched) == len(set(fetched))


def test_an_interrupted_fetch_leaves_nothing_that_counts(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(store: Store, stat: Stat, path: str) -> None:
        if stat.path.endswith("merges.txt"):
            raise KeyboardInterrupt
        whole(store, stat, path)

    whole = Store.fetch
    with monkeypatch.context() as patched:
        patched.setattr(Store, "fetch", cut)
        with pytest.raises(KeyboardInterrupt):
            inspect(url)
    assert folders_in(cache) == []
    (lock,) = cache.glob("*.lock")
    left = cache / f"{lock.stem}.part-killed"
    left.mkdir()
    (left / "model_index.json").write_text("{")
    info = inspect(url)
    assert folders_in(cache) == [Path(info.path)]


def test_what_was_deleted_from_the_cache_is_fetched_again(url: str, cache: Path) -> None:
    info = inspect(url)
    (Path(info.path) / "vae" / "config.json").unlink()
    assert inspect(url) == info


def test_a_model_that_changes_while_it_is_fetched_is_refused(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(store: Store, stat: Stat, path: str) -> None:
        whole(store, stat, path)
        store.fs.pipe_file(f"{store.root}/model_index.json", b"other")

    whole = Store.fetch
    monkeypatch.setattr(Store, "fetch", changing)
    with pytest.raises(StorageFailed, match="changed during the download; start the job again"):
        inspect(url)
    assert folders_in(cache) == []


def test_urls_that_lead_nowhere_are_named(url: str, cache: Path) -> None:
    assert refusal("memory://none/here") == "model memory://none/here: there is no file or folder"
    assert "Protocol not known: warp" in refusal("warp://bucket/model")
    found = refusal(f"{url}/tokenizer")
    assert "no model file to load; found: merges.txt, " in found
    assert "which has no revisions; remove model.revision" in refusal(url, revision="v1")
    assert "model.components.vae memory://no: there is no file or folder" in refusal(
        url, components={"vae": "memory://no"}
    )
    assert not cache.exists() or len(folders_in(cache)) == 1


def test_a_store_that_refuses_is_told_without_secrets(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(store: Store) -> dict[str, Stat]:
        raise StorageFailed(f"cannot list {store.url} : denied (GET {store.url}&x=secret )")

    monkeypatch.setattr(Store, "stats", refused)
    with pytest.raises(StorageFailed) as caught:
        inspect(url + "?signature=secret")
    assert str(caught.value) == f"model: cannot list {url} : denied (GET {url} )"
    assert without_secrets("s3://me:word@bucket/x?a=b") == "s3://bucket/x"


def test_a_cache_that_cannot_be_written_is_named(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file")
    with pytest.raises(StorageFailed, match=r"cannot be written: .*; set BATCHGEN_CACH"):
        inspect(url)


def test_parts_and_added_files_may_stand_at_urls(
    saved: Path, folder: Path, cache: Path, tmp_path: Path
) -> None:
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    own = inspect(saved, components={"vae": str(folder / "vae")})
    assert (
        inspect(saved, components={"vae": (folder / "vae").as_uri()}).manifest_sha256
        == own.manifest_sha256
    )
    token = tmp_path / "cat" / "cat.safetensors"
    token.parent.mkdir()
    save_file({"<cat>": torch.zeros(32)}, token)
    (token.parent / "more.txt").write_text("large")
    local = inspect(saved, textual_inversions=[{"path": str(token)}])
    for place in (token, token.parent):
        there = inspect(saved, textual_inversions=[{"path": place.as_uri()}])
        assert there.manifest_sha256 == local.manifest_sha256
    assert {path.name for path in cache.rglob("*.*") if path.is_file()}.isdisjoint({"more.txt"})


# --- pickled weights -----------------------------------------------------------------------------


def pickle_weights(component: Path, name: str = "diffusion_pytorch_model") -> None:
    (safe,) = component.glob("*.safetensors")
    torch.save(load_file(safe), component / f"{name}.bin")
    safe.unlink()


def test_pickled_weights_are_loaded_where_the_spec_allows_it(saved: Path, folder: Path) -> None:
    pickle_weights(folder / "unet")
    message = refusal(folder)
    assert "cannot be used; allowed: safetensors, and .bin with model.allow_pickle" in message
    mixed = inspect(folder, allow_pickle=True)
    assert mixed.manifest_sha256 != inspect(saved).manifest_sha256
    assert np.array_equal(pixels(folder, allow_pickle=True), pixels(saved))
    pickle_weights(folder / "text_encoder", "pytorch_model")
    pickle_weights(folder / "vae")
    assert np.array_equal(pixels(folder, allow_pickle=True), pixels(saved))
    path = folder / "vae" / "diffusion_pytorch_model.bin"
    path.write_bytes(path.read_bytes() + b" ")
    assert inspect(folder, allow_pickle=True).manifest_sha256 != mixed.manifest_sha256
    path.unlink()
    assert "vae: the weights " in refusal(folder, allow_pickle=True)


def test_safetensors_are_loaded_where_both_are_there(saved: Path, folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"no pickle at all")
    allowed = inspect(folder, allow_pickle=True)
    assert allowed.manifest_sha256 == inspect(saved).manifest_sha256
    assert np.array_equal(pixels(folder, allow_pickle=True), pixels(saved))


def test_pickled_weights_of_a_class_of_diffusers_own(tmp_path: Path) -> None:
    folder = ldm.build_bert(tmp_path / "bert")
    safe = pixels(folder)
    pickle_weights(folder / "bert", "pytorch_model")
    pickle_weights(folder / "unet")
    pickle_weights(folder / "vqvae")
    assert np.array_equal(pixels(folder, allow_pickle=True), safe)


class Harm:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('harm was done')",)


def test_a_pickle_that_runs_code_is_not_run(folder: Path) -> None:
    pickle_weights(folder / "unet")
    torch.save({"harm": Harm()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises((OSError, ValueError, RuntimeError, ModelError)) as caught:
        pixels(folder, allow_pickle=True)
    assert "harm was done" not in str(caught.value)


def test_pickles_are_fetched_only_where_there_is_nothing_else(folder: Path, cache: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"large")
    pickle_weights(folder / "unet")
    info = inspect(folder.as_uri(), allow_pickle=True)
    assert info.manifest_sha256 == inspect(folder, allow_pickle=True).manifest_sha256
    assert (Path(info.path) / "unet" / "diffusion_pytorch_model.bin").is_file()
    assert not (Path(info.path) / "vae" / "diffusion_pytorch_model.bin").exists()


def test_nothing_chosen_is_no_fetch(url: str, cache: Path) -> None:
    with pytest.raises(InputError, match="no model file to load"):
        fetch(url, lambda _: [])
