"""The section ``labels`` of the spec: what the labels of images mean, and when they stay true."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from batchgen.spec.model import COUNTED_IF_SET, Section

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Level = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Level, Level, Level]
BoxFormat = Literal["coco", "voc", "yolo"]


# Makers of conditioning.make that draw a part of a row from its labels, instead of converting it.
FROM_LABELS = {
    "objects-mask": "mask",
    "class-mask": "mask",
    "objects-canvas": "control",
    "palette": "control",
    "objects-regions": "regions",
}


class Category(Section):
    """One category of objects. Its number in ``category`` is its place in the list, from 0 on."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    id: int | None = Field(default=None, description="its number in a COCO file; null: its place")
    supercategory: str | None = None
    colour: Colour | None = Field(default=None, description="RGB, for conditions drawn from labels")
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class Labels(Section):
    """How labels are read, moved with the pixels, and withdrawn where they are no longer true."""

    objects_format: Annotated[BoxFormat, COUNTED_IF_SET] = Field(
        default="coco",
        description="coco: x, y, width, height; voc: x0, y0, x1, y1; yolo: middle and size, as "
        "fractions of the image's",
    )
    orientation: Annotated[Literal["upright", "stored"], COUNTED_IF_SET] = Field(
        default="upright",
        description="upright: labels lie on the image as its EXIF orientation shows it; stored: on "
        "the pixels as the file stores them",
    )
    categories: Annotated[tuple[Category, ...] | None, COUNTED_IF_SET] = Field(
        default=None,
        description="names of the categories, by number; null: those that the input declares",
    )
    mask_classes: Annotated[tuple[Category, ...] | None, COUNTED_IF_SET] = Field(
        default=None,
        description="names of the classes in label masks, by number; null: those that the input "
        "declares",
    )
    source: Annotated[dict[str, Any], COUNTED_IF_SET] = Field(
        default={}, description="what the source says of itself: info and licenses of a COCO file"
    )
    min_visibility: Annotated[Share, COUNTED_IF_SET] = Field(
        default=0.1, description="objects of which less is left after cropping are dropped"
    )
    max_strength: Annotated[Share, COUNTED_IF_SET] = Field(
        default=0.5, description="image-to-image keeps labels up to this strength"
    )
    max_repainted: Annotated[Share, COUNTED_IF_SET] = Field(
        default=0.1, description="inpainting keeps objects of which at most this share is repainted"
    )
    are: Annotated[Literal["auto", "kept", "requested", "void"], COUNTED_IF_SET] = Field(
        default="auto", description="states what the labels are, instead of deriving it by task"
    )
    ignored_class: Annotated[int, Field(ge=0, le=255), COUNTED_IF_SET] = Field(
        default=255, description="class number of pixels without a label: padding, repainted areas"
    )

    @model_validator(mode="before")
    @classmethod
    def _numbered(cls, tree: Any) -> Any:
        """Accept ``{0: person, 1: car}`` for the names, as YOLO's data.yaml has them."""
        lists = {}
        for name in ("categories", "mask_classes"):
            given = tree.get(name) if isinstance(tree, dict) else None
            if isinstance(given, dict):
                if sorted(given, key=str) != sorted(range(len(given)), key=str):
                    raise ValueError(f"{name} with the numbers 0, 1, 2 and so on, or a list")
                lists[name] = [given[number] for number in range(len(given))]
        return {**tree, **lists} if lists else tree

    @model_validator(mode="after")
    def _once(self) -> Labels:
        names = [one.name for one in self.categories or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"categories with different names ({twice} is there twice)")
        return self

    @property
    def names(self) -> tuple[str, ...] | None:
        """The categories' names by number; None if they are not known."""
        return None if self.categories is None else tuple(one.name for one in self.categories)

    @property
    def colours(self) -> tuple[Colour | None, ...]:
        """The categories' colours by number."""
        return tuple(one.colour for one in self.categories or ())

    @property
    def mask_colours(self) -> tuple[Colour | None, ...]:
        """The colours of the classes in label masks, by number."""
        return tuple(one.colour for one in self.mask_classes or ())
