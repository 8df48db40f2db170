"""From a model's name to its folder: shipped with batchgen, local, or on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from batchgen.errors import ModelError, nearest
from batchgen.replicas.families import FAMILIES, WEIGHT_STEMS, weight_globs
from batchgen.spec import Model

SHIPPED = Path(__file__).parent.parent / "models"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TEXT_FILES = (".json", ".txt")
RECOMMENDED_FILE = "batchgen.json"


def find(model: Model, task: str) -> tuple[Path, str | None]:
    """The model's folder and, if it came from the hub, its commit.

    Raises:
        ModelError: it is nowhere, or cannot be reached.
    """
    shipped = shipped_names()
    folder = Path(model.path).expanduser()
    if model.path in shipped:
        return _without_revision(SHIPPED / model.path, model), None
    if folder.is_dir():
        return _without_revision(folder.resolve(), model), None
    if folder.is_file():
        raise ModelError(f"model {model.path} is a file; allowed: a folder in diffusers layout")
    if HUB_ID.fullmatch(model.path):
        return _from_hub(model, task)
    names = ", ".join(shipped) or "none"
    raise ModelError(
        f"model {model.path!r}: no such folder, no shipped model of that name ({names}"
        f"{nearest(model.path, shipped)}), and a hub id reads owner/name"
    )


def shipped_names() -> list[str]:
    """The models that come with batchgen."""
    return sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))


def _without_revision(folder: Path, model: Model) -> Path:
    if model.revision is not None:
        raise ModelError(
            f"model {model.path} is the local folder {folder}, which has no revisions; allowed for"
            f" model.revision: null (it is {model.revision!r})"
        )
    return folder


def _from_hub(model: Model, task: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"model {model.path!r} (revision {model.revision or 'main'})"
    try:
        snapshot = snapshot_download(
            model.path, revision=model.revision, allow_patterns=_hub_patterns(model, task)
        )
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


def _hub_patterns(model: Model, task: str) -> list[str]:
    """The files that would be loaded, without the weights of other precisions."""
    patterns = ["model_index.json", RECOMMENDED_FILE]
    for family in (family for family in FAMILIES if task in family.pipelines):
        patterns += [f"{name}/*{end}" for name in family.components for end in TEXT_FILES]
        patterns += [
            f"{name}/{glob}"
            for name in family.weighted
            for stem in WEIGHT_STEMS.values()
            for glob in weight_globs(stem, model.variant)
        ]
    return patterns
