"""Chooses the output format of a plan by its name."""

from __future__ import annotations

from batchgen.output.formats.format import Format
from batchgen.output.formats.image_folder import ImageFolder
from batchgen.output.formats.parquet import Parquet
from batchgen.output.formats.webdataset import WebDataset
from batchgen.plan.plan import Plan

FORMATS: dict[str, Format] = {
    "parquet": Parquet(),
    "webdataset": WebDataset(),
    "image-folder": ImageFolder(),
}


def format_of(plan: Plan) -> Format:
    """The format of a plan's data files; a started output keeps the variant it started with."""
    form = FORMATS[plan.spec.output.format]
    if isinstance(form, ImageFolder) and plan.frozen is not None and plan.frozen.unmarked:
        return ImageFolder(portable=False)
    return form
