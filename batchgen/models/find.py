"""From a model's name to its files: shipped with batchgen, local, on the hub, or at a URL."""

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
    "batchgen": "diffusion_pytorch_model",  # ``replicas.own``: what neither library has
}
PICKLED_STEMS = {**WEIGHT_STEMS, "transformers": "pytorch_model"}


class Found(NamedTuple):
    """A model on this machine.

    Attributes:
        folder: in diffusers layout.
        commit: of the hub, if all of it came from there.
        file: the weights of the folder's components, if they stand in one file.
    """

    folder: Path
    commit: str | None = None
    file: Path | None = None

    @property
    def path(self) -> Path:
        return self.file or self.folder


@dataclass(frozen=True)
class Wanted:
    """Patterns of the files that are fetched of what is elsewhere; ``*`` stays within a folder.

    Attributes:
        always: of configurations and safetensors.
        pickled: of other weights, for folders without any of ``always``.
    """

    always: Sequence[str]
    pickled: Sequence[str] = ()

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are wanted."""
        names = list(names)
        wanted = [name for name in names if _is_like(name, self.always)]
        pickled = self.pickled_beside(names)
        return wanted + [name for name in names if _is_like(name, pickled)]

    def pickled_beside(self, names: Iterable[str]) -> list[str]:
        """Those of ``pickled`` that are for folders without safetensors."""
        safe = {
            posixpath.dirname(name)
            for name in names
            if name.endswith(SAFE_WEIGHTS) and _is_like(name, self.always)
        }
        return [pattern for pattern in self.pickled if posixpath.dirname(pattern) not in safe]


def find_model(model: Model, task: str) -> Found:
    """The files of the spec's model.

    Raises:
        ModelError: it is nowhere, or cannot be reached.
        StorageFailed: the store of a URL refuses or fails.
    """
    if not _is_named_as_file(model.path):
        if model.config is not None:
            raise ModelError(
                f"model.config {model.config!r}: allowed where model.path is a single safetensors"
                f" file; it is {without_secrets(model.path)!r}"
            )
        return _find(model.path, model.revision, "model", _pipeline_files(model, task))
    _refuse_unsafe_file(model.path)
    if model.config is None:
        raise ModelError(
            f"model {without_secrets(model.path)} is a file; allowed: a folder in diffusers layout,"
            " or a safetensors file with such a folder as model.config"
        )
    file = _single_file(model.path)
    texts = Wanted(_pipeline_texts(task))
    return Found(_find(model.config, model.revision, "model.config", texts).folder, None, file)


def find_pipeline(path: str, name: str, model: Model, task: str) -> Path:
    """The folder of a second pipeline, which the spec names as a component; see above."""
    return _find(path, None, f"model.components.{name}", _pipeline_files(model, task)).folder


def find_component(path: str, name: str, model: Model) -> Path:
    """The folder of one component that stands by itself, such as a ControlNet; see above."""
    always = [f"*{end}" for end in TEXT_FILES]
    always += _weights(WEIGHT_STEMS, model.variant)
    pickled = _weights(PICKLED_STEMS, model.variant, "bin") if model.allow_pickle else ()
    found = _find(path, None, f"model.components.{name}", Wanted(always, pickled), shipped_parts())
    return found.folder


def find_added(path: str, revision: str | None, field: str, patterns: Sequence[str]) -> Path:
    """What a ``path`` beside the model names: a file, or the folder in which one is looked for.

    Of a hub id or URL the files of the given patterns are fetched.

    Raises:
        ModelError: it is nowhere, or cannot be reached; the message names the field.
        StorageFailed: the store of a URL refuses or fails.
    """
    if is_url(path):
        return _from_url(path, revision, field, Wanted(patterns))
    here = _here(path).absolute()
    if os.path.exists(here):
        return _without_revision(here, path, revision, field)
    if HUB_ID.fullmatch(path):
        return _from_hub(path, revision, field, Wanted(patterns)).folder
    raise ModelError(f"{field} {path!r}: no such file or folder, and a hub id reads owner/name")


def shipped_names() -> list[str]:
    """The models that come with batchgen."""
    return sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))


def shipped_parts() -> list[str]:
    """The components that come with batchgen in folders of their own."""
    return sorted(config.parent.name for config in SHIPPED.glob("*/config.json"))


def weight_globs(stem: str, variant: str | None, end: str = "safetensors") -> list[str]:
    """File patterns of one component's weights, whole or in parts."""
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
) -> Found:
    """``shipped``: names that stand for folders of batchgen's own; default: its whole models."""
    if shipped is None:
        shipped = shipped_names()
    if is_url(path):
        return Found(_from_url(path, revision, field, wanted))
    folder = _here(path)
    if path in shipped:
        return Found(_without_revision(SHIPPED / path, path, revision, field))
    if os.path.isdir(folder):
        return Found(_without_revision(folder.resolve(), path, revision, field))
    if os.path.isfile(folder):
        raise ModelError(f"{field} {path} is a file; allowed: a folder in diffusers layout")
    if HUB_ID.fullmatch(path):
        return _from_hub(path, revision, field, wanted)
    names = ", ".join(shipped) or "none"
    raise ModelError(
        f"{field} {path!r}: no such folder, no shipped model of that name ({names}"
        f"{nearest(path, shipped)}), and a hub id reads owner/name"
    )


def _is_named_as_file(path: str) -> bool:
    """Whether a model's path is that of a file; one that is not there is known by its ending."""
    if is_url(path):
        return _ending(without_secrets(path)) in (SAFE_WEIGHTS, *UNSAFE_WEIGHTS)
    here = _here(path)
    is_named_so = _ending(path) in (SAFE_WEIGHTS, ".ckpt")
    return os.path.isfile(here) or (is_named_so and not os.path.isdir(here))


def _here(path: str) -> Path:
    """A path of this machine. What Path itself would ask of it fails where a name is too long."""
    return Path(os.path.expanduser(path))


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1]


def _refuse_unsafe_file(path: str) -> None:
    shown = without_secrets(path)
    if _ending(shown) != SAFE_WEIGHTS:
        raise ModelError(
            f"model {shown} cannot be used: of single files, allowed is safetensors alone; in "
            "Python, diffusers' StableDiffusionPipeline.from_single_file(FILE)"
            ".save_pretrained(FOLDER) makes a folder of it, which can be used "
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
    """A file, if the URL ends as safetensors do, or a folder."""
    shown = without_secrets(url)
    if revision is not None:
        raise ModelError(
            f"{field} {shown} is a URL, which has no revisions; allowed for"
            f" {_revision_of(field)}: null (it is {revision!r})"
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
            f"{field} {path} is the local folder {folder}, which has no revisions; allowed for"
            f" {_revision_of(field)}: null (it is {revision!r})"
        )
    return folder


def _revision_of(field: str) -> str:
    """The field that tells the revision of what another names."""
    return f"{field.removesuffix('.config')}.revision"


def _from_hub(path: str, revision: str | None, field: str, wanted: Wanted) -> Found:
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
        raise ModelError(f"{named} is gated: accept its licence on the hub, then log in") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{named}: the hub has no such revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{named}: no such local folder, and no such repository on the hub (or a private one)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{named}: no such local folder, not in the hub's cache, and the hub cannot be reached"
            " (HF_HUB_OFFLINE is set, or no network); give a folder, or download it beforehand"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{named}: {error}") from error
    return Found(Path(snapshot), Path(snapshot).name)


def _names_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _pipeline_files(model: Model, task: str) -> Wanted:
    """The files that would be loaded, without the weights of other precisions."""

    def weights(stems: Mapping[str, str], end: str) -> list[str]:
        globs = _weights(stems, model.variant, end)
        return [f"{name}/{glob}" for name in _components(task) for glob in globs]

    return Wanted(
        [*_pipeline_texts(task), *weights(WEIGHT_STEMS, "safetensors")],
        weights(PICKLED_STEMS, "bin") if model.allow_pickle else (),
    )


def _pipeline_texts(task: str) -> list[str]:
    """A pipeline's files beside its weights."""
    texts = [f"{name}/*{end}" for name in _components(task) for end in TEXT_FILES]
    return ["model_index.json", RECOMMENDED_FILE, *texts]


def _components(task: str) -> list[str]:
    families = [family for family in FAMILIES if family.task == task]
    return sorted({name for family in families for name in family.components})


def _weights(stems: Mapping[str, str], variant: str | None, end: str = "safetensors") -> list[str]:
    return [glob for stem in set(stems.values()) for glob in weight_globs(stem, variant, end)]


def _is_like(name: str, patterns: Iterable[str]) -> bool:
    """Some pattern is the name's, folder by folder."""
    parts = name.split("/")
    for pattern in patterns:
        like = pattern.split("/")
        if len(like) == len(parts) and all(map(fnmatchcase, parts, like)):
            return True
    return False
