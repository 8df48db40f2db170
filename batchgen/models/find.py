"""Finds a model's files by its name: shipped with batchgen, local, on the hub, or at a URL."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from batchgen.errors import InputError, ModelError, StorageFailed, nearest
from batchgen.families import FAMILIES
from batchgen.secrets import without_secrets
from batchgen.spec.model import Model
from batchgen.storage.cache import fetch, is_url

SHIPPED = Path(__file__).parent.parent / "shipped"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TEXT_FILES = (".json", ".txt", ".model", ".jinja")
RECOMMENDED_FILE = "batchgen.json"
SAFE_WEIGHTS = ".safetensors"
UNSAFE_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")

# Library of a component -> the stem of its weight files.
WEIGHT_STEMS = {
    "diffusers": "diffusion_pytorch_model",
    "transformers": "model",
    "batchgen": "diffusion_pytorch_model",  # the classes of ``models.own``
}
PICKLED_STEMS = {**WEIGHT_STEMS, "transformers": "pytorch_model"}


class FoundModel(NamedTuple):
    """A model on this machine.

    Attributes:
        folder: a folder in diffusers layout.
        commit: the hub commit, if all of the model came from there.
        file: the weights of the folder's components, if they are in a single file.
    """

    folder: Path
    commit: str | None = None
    file: Path | None = None

    @property
    def path(self) -> Path:
        return self.file or self.folder


@dataclass(frozen=True)
class Wanted:
    """Patterns of the files to download; ``*`` does not match a slash.

    Attributes:
        always: patterns of configurations and safetensors.
        pickled: patterns of other weights, for folders that have no safetensors.
    """

    always: Sequence[str]
    pickled: Sequence[str] = ()

    def among(self, names: Iterable[str]) -> list[str]:
        """Select the names that are wanted."""
        names = list(names)
        wanted = [name for name in names if _is_like(name, self.always)]
        pickled = self.pickled_beside(names)
        return wanted + [name for name in names if _is_like(name, pickled)]

    def pickled_beside(self, names: Iterable[str]) -> list[str]:
        """Select those of ``pickled`` that are for folders without safetensors."""
        safe = {
            posixpath.dirname(name)
            for name in names
            if name.endswith(SAFE_WEIGHTS) and _is_like(name, self.always)
        }
        return [pattern for pattern in self.pickled if posixpath.dirname(pattern) not in safe]


def find_model(model: Model, task: str) -> FoundModel:
    """Find the files of the spec's model.

    Raises:
        ModelError: it does not exist, or cannot be reached.
        StorageFailed: the store of a URL refuses or fails.
    """
    if not _is_named_as_file(model.path):
        if model.config is not None:
            raise ModelError(
                f"model.config {model.config!r}: only allowed if model.path is a single safetensors"
                f" file, but it is {without_secrets(model.path)!r}; remove model.config"
            )
        return _find(model.path, model.revision, "model", _pipeline_files(model, task))
    _refuse_unsafe_file(model.path)
    if model.config is None:
        raise ModelError(
            f"model {without_secrets(model.path)} is a file; needed: a folder in diffusers layout,"
            " or a safetensors file with such a folder as model.config"
        )
    file = _single_file(model.path)
    texts = Wanted(_pipeline_texts(task))
    return FoundModel(_find(model.config, model.revision, "model.config", texts).folder, None, file)


def find_pipeline(path: str, name: str, model: Model, task: str) -> Path:
    """Find the folder of a second pipeline that the spec names as a component (a refiner)."""
    return _find(path, None, f"model.components.{name}", _pipeline_files(model, task)).folder


def find_component(path: str, name: str, model: Model) -> Path:
    """Find the folder of a single component, such as a ControlNet."""
    always = [f"*{end}" for end in TEXT_FILES]
    always += _weights(WEIGHT_STEMS, model.variant)
    pickled = _weights(PICKLED_STEMS, model.variant, "bin") if model.allow_pickle else ()
    found = _find(path, None, f"model.components.{name}", Wanted(always, pickled), shipped_parts())
    return found.folder


def find_folder(
    path: str, revision: str | None, field: str, wanted: Wanted, shipped: Sequence[str]
) -> FoundModel:
    """Find the folder of a model that is no pipeline, such as that of a scorer.

    Args:
        path: a name in ``shipped``, a folder, a URL or a hub id.
        revision: of the hub id.
        field: what names it, for messages.
        wanted: the files to download.
        shipped: names of batchgen's own folders.

    Raises:
        ModelError: it does not exist, or cannot be reached; the message names the field.
        StorageFailed: the store of a URL refuses or fails.
    """
    return _find(path, revision, field, wanted, shipped)


def find_added(path: str, revision: str | None, field: str, patterns: Sequence[str]) -> Path:
    """Find the file or folder that the ``path`` of an adapter (LoRA and so on) names.

    For a hub id or URL, the files of the given patterns are downloaded.

    Raises:
        ModelError: it does not exist, or cannot be reached; the message names the field.
        StorageFailed: the store of a URL refuses or fails.
    """
    if is_url(path):
        return _from_url(path, revision, field, Wanted(patterns))
    here = _here(path).absolute()
    if os.path.exists(here):
        return _without_revision(here, path, revision, field)
    if HUB_ID.fullmatch(path):
        return _from_hub(path, revision, field, Wanted(patterns)).folder
    raise ModelError(
        f"{field} {path!r}: no such file or folder, and not a hub id of the form owner/name"
    )


def shipped_names() -> list[str]:
    """List the models that come with batchgen."""
    return sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))


def shipped_parts() -> list[str]:
    """List the single components of pipelines that come with batchgen."""
    return sorted(one.parent.name for one in SHIPPED.glob("*/diffusion_pytorch_model.safetensors"))


def shipped_networks() -> list[str]:
    """List the models for scorers and features that come with batchgen."""
    return sorted(one.parent.name for one in SHIPPED.glob("*/model.safetensors"))


def weight_globs(stem: str, variant: str | None, end: str = "safetensors") -> list[str]:
    """Make the file patterns of one component's weights, in one file or in several."""
    if variant is None:
        return [f"{stem}.{end}", f"{stem}-?????-of-?????.{end}"]
    return [
        f"{stem}.{variant}.{end}",
        f"{stem}.{variant}-?????-of-?????.{end}",
        f"{stem}-?????-of-?????.{variant}.{end}",
    ]


def _find(
    path: str,
    revision: str | None,
    field: str,
    wanted: Wanted,
    shipped: Sequence[str] | None = None,
) -> FoundModel:
    """Find a folder. ``shipped``: names of batchgen's own folders; default: those of its models."""
    if shipped is None:
        shipped = shipped_names()
    if is_url(path):
        return FoundModel(_from_url(path, revision, field, wanted))
    folder = _here(path)
    if path in shipped:
        return FoundModel(_without_revision(SHIPPED / path, path, revision, field))
    if os.path.isdir(folder):
        return FoundModel(_without_revision(folder.resolve(), path, revision, field))
    if os.path.isfile(folder):
        raise ModelError(f"{field} {path} is a file; needed: a folder in diffusers layout")
    if HUB_ID.fullmatch(path):
        return _from_hub(path, revision, field, wanted)
    names = ", ".join(shipped) or "none"
    raise ModelError(
        f"{field} {path!r}: no such folder, no shipped model of that name ({names}"
        f"{nearest(path, shipped)}), and not a hub id of the form owner/name"
    )


def _is_named_as_file(path: str) -> bool:
    """Whether a model's path names a file; if nothing is there, its suffix decides."""
    if is_url(path):
        return _ending(without_secrets(path)) in (SAFE_WEIGHTS, *UNSAFE_WEIGHTS)
    here = _here(path)
    is_named_so = _ending(path) in (SAFE_WEIGHTS, ".ckpt")
    return os.path.isfile(here) or (is_named_so and not os.path.isdir(here))


def _here(path: str) -> Path:
    """Return a local path. Callers use os.path.exists: Path.exists fails if a name is too long."""
    return Path(os.path.expanduser(path))


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1]


def _refuse_unsafe_file(path: str) -> None:
    shown = without_secrets(path)
    if _ending(shown) != SAFE_WEIGHTS:
        raise ModelError(
            f"model {shown} cannot be used: a single file must be safetensors; to convert it to a "
            "folder, which can be used, run diffusers' "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) in Python "
            "(StableDiffusionXLPipeline for SDXL)"
        )


def _single_file(path: str) -> Path:
    if is_url(path):
        return _from_url(path, None, "model", Wanted(()))
    file = _here(path).absolute()
    if not os.path.isfile(file):
        raise ModelError(f"model {path}: no such file")
    return file


def _from_url(url: str, revision: str | None, field: str, wanted: Wanted) -> Path:
    """Download a folder, or one file if the URL ends in ``.safetensors``."""
    shown = without_secrets(url)
    if revision is not None:
        raise ModelError(
            f"{field} {shown} is a URL, which has no revisions; remove {_revision_of(field)}"
            f" ({revision!r})"
        )
    if _ending(shown) == SAFE_WEIGHTS:
        wanted = Wanted([posixpath.basename(shown)])
    try:
        return fetch(url, wanted.among)
    except InputError as error:
        raise ModelError(f"{field} {error}") from error
    except StorageFailed as error:
        raise StorageFailed(f"{field}: {error}") from error


def _without_revision(folder: Path, path: str, revision: str | None, field: str) -> Path:
    if revision is not None:
        raise ModelError(
            f"{field} {path} is the local folder {folder}, which has no revisions; remove"
            f" {_revision_of(field)} ({revision!r})"
        )
    return folder


def _revision_of(field: str) -> str:
    """Return the name of the revision field that belongs to a field."""
    return f"{field.removesuffix('.config')}.revision"


def _from_hub(path: str, revision: str | None, field: str, wanted: Wanted) -> FoundModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"{field} {path!r} (revision {revision or 'main'})"
    always = list(wanted.always)
    try:
        snapshot = snapshot_download(path, revision=revision, allow_patterns=always)
        if wanted.pickled:
            pickled = wanted.pickled_beside(_names_below(Path(snapshot)))
            commit = Path(snapshot).name
            snapshot = snapshot_download(path, revision=commit, allow_patterns=always + pickled)
    except GatedRepoError as error:
        raise ModelError(
            f"{named} is gated: accept its licence on the hub, then log in (HF_TOKEN, or "
            "`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{named}: the hub has no such revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{named}: no such local folder, and no such repository on the hub (or a private one)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{named}: no such local folder, not in the hub's cache, and the hub cannot be reached"
            " (HF_HUB_OFFLINE is set, or no network); use a local folder, or download it beforehand"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{named}: {error}") from error
    return FoundModel(Path(snapshot), Path(snapshot).name)


def _names_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _pipeline_files(model: Model, task: str) -> Wanted:
    """Make the patterns of the files to load, without the weights of other variants."""

    def weights(stems: Mapping[str, str], end: str) -> list[str]:
        globs = _weights(stems, model.variant, end)
        return [f"{name}/{glob}" for name in _components(task) for glob in globs]

    return Wanted(
        [*_pipeline_texts(task), *weights(WEIGHT_STEMS, "safetensors")],
        weights(PICKLED_STEMS, "bin") if model.allow_pickle else (),
    )


def _pipeline_texts(task: str) -> list[str]:
    """Make the patterns of a pipeline's files other than weights."""
    texts = [f"{name}/*{end}" for name in _components(task) for end in TEXT_FILES]
    return ["model_index.json", RECOMMENDED_FILE, *texts]


def _components(task: str) -> list[str]:
    families = [family for family in FAMILIES if family.task == task]
    return sorted({name for family in families for name in family.components})


def _weights(stems: Mapping[str, str], variant: str | None, end: str = "safetensors") -> list[str]:
    return [glob for stem in set(stems.values()) for glob in weight_globs(stem, variant, end)]


def _is_like(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches the name, folder by folder."""
    parts = name.split("/")
    for pattern in patterns:
        like = pattern.split("/")
        if len(like) == len(parts) and all(map(fnmatchcase, parts, like)):
            return True
    return False
