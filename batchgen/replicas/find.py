"""From a model's name to its folder: shipped with batchgen, local, or on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from batchgen.errors import ModelError, nearest
from batchgen.families import FAMILIES

SHIPPED = Path(__file__).parent.parent / "models"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TEXT_FILES = (".json", ".txt", ".model", ".jinja")
RECOMMENDED_FILE = "batchgen.json"

# Library of a component -> the stem of its weight files.
WEIGHT_STEMS = {
    "diffusers": "diffusion_pytorch_model",
    "transformers": "model",
    "batchgen": "diffusion_pytorch_model",  # ``replicas.own``: what neither library has
}


def find_pipeline(
    path: str, revision: str | None, variant: str | None, task: str
) -> tuple[Path, str | None]:
    """The folder of a whole model and, if it came from the hub, its commit.

    Raises:
        ModelError: it is nowhere, or cannot be reached.
    """
    return _find(path, revision, "model", _pipeline_patterns(variant, task))


def find_component(path: str, name: str, variant: str | None) -> tuple[Path, str | None]:
    """The folder of one component that stands by itself, such as a ControlNet; see above."""
    stems = WEIGHT_STEMS.values()
    patterns = [f"*{end}" for end in TEXT_FILES]
    patterns += [glob for stem in stems for glob in weight_globs(stem, variant)]
    return _find(path, None, f"model.components.{name}", patterns)


def find_added(path: str, revision: str | None, field: str, patterns: Sequence[str]) -> Path:
    """What a ``path`` beside the model names: a file, or the folder in which one is looked for.

    Of a hub id the files of the given patterns are fetched.

    Raises:
        ModelError: it is nowhere, or cannot be reached; the message names the field.
    """
    here = Path(path).expanduser().absolute()
    if here.exists():
        return _without_revision(here, path, revision, field)
    if HUB_ID.fullmatch(path):
        return _from_hub(path, revision, field, patterns)[0]
    raise ModelError(f"{field} {path!r}: no such file or folder, and a hub id reads owner/name")


def shipped_names() -> list[str]:
    """The models that come with batchgen."""
    return sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))


def weight_globs(stem: str, variant: str | None) -> list[str]:
    """File patterns of one component's safetensors weights, whole or in parts."""
    if variant is None:
        return [f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors"]
    return [
        f"{stem}.{variant}.safetensors",
        f"{stem}.{variant}-?????-of-?????.safetensors",
        f"{stem}-?????-of-?????.{variant}.safetensors",
    ]


def _find(
    path: str, revision: str | None, what: str, patterns: Sequence[str]
) -> tuple[Path, str | None]:
    shipped = shipped_names()
    folder = Path(path).expanduser()
    if path in shipped:
        return _without_revision(SHIPPED / path, path, revision), None
    if folder.is_dir():
        return _without_revision(folder.resolve(), path, revision), None
    if folder.is_file():
        raise ModelError(f"{what} {path} is a file; allowed: a folder in diffusers layout")
    if HUB_ID.fullmatch(path):
        return _from_hub(path, revision, what, patterns)
    names = ", ".join(shipped) or "none"
    raise ModelError(
        f"{what} {path!r}: no such folder, no shipped model of that name ({names}"
        f"{nearest(path, shipped)}), and a hub id reads owner/name"
    )


def _without_revision(folder: Path, path: str, revision: str | None, field: str = "model") -> Path:
    if revision is not None:
        raise ModelError(
            f"{field} {path} is the local folder {folder}, which has no revisions; allowed for"
            f" {field}.revision: null (it is {revision!r})"
        )
    return folder


def _from_hub(
    path: str, revision: str | None, what: str, patterns: Sequence[str]
) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"{what} {path!r} (revision {revision or 'main'})"
    try:
        snapshot = snapshot_download(path, revision=revision, allow_patterns=list(patterns))
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
    return Path(snapshot), Path(snapshot).name


def _pipeline_patterns(variant: str | None, task: str) -> list[str]:
    """The files that would be loaded, without the weights of other precisions."""
    families = [family for family in FAMILIES if family.task == task]
    components = sorted({name for family in families for name in family.components})
    patterns = ["model_index.json", RECOMMENDED_FILE]
    patterns += [f"{name}/*{end}" for name in components for end in TEXT_FILES]
    patterns += [
        f"{name}/{glob}"
        for name in components
        for stem in WEIGHT_STEMS.values()
        for glob in weight_globs(stem, variant)
    ]
    return patterns
