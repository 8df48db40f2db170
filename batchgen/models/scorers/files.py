"""Finds and checks the models of scorers: transformers folders, without loading their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from batchgen.errors import ModelError, shown
from batchgen.models.files import read_json
from batchgen.models.find import TEXT_FILES, Wanted, find_folder, shipped_networks, weight_globs
from batchgen.spec.score_section import ScorerSpec

PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ScorerModel:
    """The files of a scorer's model.

    Attributes:
        field: the scorer's name, for messages.
        folder: that of its files, on this machine.
        revision: the commit, if it came from the hub.
        config: its configuration.
        files: those that are loaded.
    """

    field: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    files: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """The class that saved it, such as ``ViTForImageClassification``."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else "no architecture"

    @property
    def sha256(self) -> str:
        """SHA-256 over name and SHA-256 of every file that is loaded."""
        manifest = hashlib.sha256()
        for path in self.files:
            facts = path.stat()
            manifest.update(
                f"{path.name}\x1f{_digest(path, facts.st_size, facts.st_mtime_ns)}\n".encode()
            )
        return manifest.hexdigest()

    def names(self) -> tuple[str, ...]:
        """The names of its classes, by number.

        Raises:
            ModelError: its configuration does not list them.
        """
        named = self.config.get("id2label")
        count = len(named) if isinstance(named, dict) else 0
        if (
            not isinstance(named, dict)
            or sorted(named) != sorted(map(str, range(count)))
            or not count
        ):
            raise ModelError(
                f"{self.field}: {self.folder}/config.json has no list of classes (id2label)"
            )
        return tuple(str(named[str(number)]) for number in range(count))


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, computed again if its size or its time changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scorer_model(
    spec: ScorerSpec, needed: str, ends: Sequence[str], texts: bool = False
) -> ScorerModel:
    """Find a scorer's model and check what it is.

    Args:
        spec: names the model.
        needed: what the scorer needs, for messages.
        ends: the class that saved the model ends with one of these; "" allows any.
        texts: whether its tokenizer is needed as well.

    Raises:
        ModelError: it is not found, is another kind of model, or a file is missing.
    """
    field = f"score: {spec.scorer}"
    wanted = Wanted([*(f"*{end}" for end in TEXT_FILES), *weight_globs("model", None)])
    revision = spec.settled.revision if spec.settled else None
    found = find_folder(
        str(spec.model), spec.revision or revision, field, wanted, shipped_networks()
    )
    config_file = found.folder / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{field}: {found.folder} has no config.json; needed: {needed}")
    config = read_json(config_file)
    files = sorted(path for path in found.folder.iterdir() if wanted.among([path.name]))
    model = ScorerModel(field, found.folder, found.commit, config, tuple(files))
    if not model.kind.endswith(tuple(ends)):
        raise ModelError(f"{field}: {found.folder} holds a {model.kind}; needed: {needed}")
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"{field}: {found.folder} has no weights (model.safetensors)")
    if not any(path.name in PROCESSORS for path in files):
        raise ModelError(f"{field}: {found.folder} has no preprocessor_config.json")
    if texts and not any(path.name.startswith("tokenizer") for path in files):
        raise ModelError(f"{field}: {found.folder} has no tokenizer")
    return model


def fingerprint(spec: ScorerSpec, model: ScorerModel | None, **facts: object) -> str:
    """Text that differs where a scorer's model or settings do."""
    told = {**spec.read_options().model_dump(mode="json"), **facts}
    settings = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:12]
    weights = "" if model is None else f" sha256:{model.sha256[:16]}"
    return f"{spec.scorer}/1{weights} batch:{spec.batch_size} settings:{settings}"


def configured_size(model: ScorerModel) -> int:
    """The number of features that a model gives for an image, by its configuration.

    Raises:
        ModelError: its configuration does not tell.
    """
    sizes = model.config.get("hidden_sizes")
    candidates = [
        model.config.get("projection_dim"),
        model.config.get("hidden_size"),
        sizes[-1] if isinstance(sizes, list) and sizes else None,
        model.config.get("hidden_dim"),
    ]
    found = next((one for one in candidates if one is not None), None)
    if type(found) is not int or not 0 < found <= 100_000:
        raise ModelError(
            f"{model.field}: {model.folder}/config.json has no size of features (projection_dim, "
            f"hidden_size, hidden_sizes or hidden_dim); found {shown(found)}"
        )
    return found
