"""Pascal VOC: Annotations/*.xml, JPEGImages, ImageSets of splits, SegmentationClass.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. Its coordinates
count pixels from 1 and include the last one, so the box 1, 1, 10, 10 is x 0, y 0, 10 x 10 pixels.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError, shown
from batchgen.importing.inference import Kinds
from batchgen.importing.kinds.elements import Element, read_xml
from batchgen.importing.listing import Listing, file_keys, is_image_name, stem_of
from batchgen.importing.objects import LONGEST_NAME, ObjectFields, fields_of
from batchgen.importing.pictures import Picture, Pictures, Size, check_mask
from batchgen.importing.records import OBJECTS, SPLIT
from batchgen.importing.rows import (
    KEY,
    Columns,
    Dataset,
    Item,
    Kind,
    Later,
    Options,
    Place,
    Refused,
    refuse,
)
from batchgen.labels.columns import IMAGE
from batchgen.labels.objects import clip
from batchgen.spec.splits import TRAIN, split_named

ANNOTATIONS, IMAGES = "Annotations", "JPEGImages"
MASKS, SETS = "SegmentationClass", "ImageSets"
LABEL_MASK = "label_mask"
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_MASK_NAMES, _BACKGROUND, _IGNORED = "class_names.txt", "background", "__ignore__"
_BOTH = "/trainval.txt"
_FLAGS = ("difficult", "truncated", "occluded")
_SLACK_PX = 2.0


@dataclass(frozen=True)
class _Entry:
    """One image: the folder of its dataset, its id, and the files about it."""

    root: str
    id: str
    xml: str | None
    image: str | None
    mask: str | None
    split: str | None

    @property
    def file(self) -> str:
        """The file that messages name."""
        return self.xml or self.mask or f"{self.root}/{self.id}"


def fits(listing: Listing) -> bool:
    return any(f"/{ANNOTATIONS}/" in f"/{name}" for name in listing.named(".xml"))


def read(listing: Listing, options: Options) -> Dataset:
    """Read all annotated images of one VOC folder, or of several under it."""
    entries = list(_entries(listing))
    if not entries:
        raise InputError(
            f"source {listing.source}: no {ANNOTATIONS}/*.xml and no {MASKS}/*.png, as VOC has them"
        )
    names, known = _survey(listing, entries)
    others = {"pose": Kinds("str"), **{flag: Kinds("int") for flag in _FLAGS}}
    fields = fields_of((), names, {name: others[name] for name in known})
    kinds: dict[str, pa.DataType] = {"image": IMAGE, OBJECTS: fields.type}
    parts = {KEY: KEY, "image": "image", OBJECTS: OBJECTS}
    if any(one.mask for one in entries):
        kinds[LABEL_MASK], parts[LABEL_MASK] = IMAGE, LABEL_MASK
    kinds |= {SPLIT: pa.string(), "image_width": pa.int32(), "image_height": pa.int32()}
    kinds["file_name"] = pa.string()
    parts |= {"image_width": "image_width", "image_height": "image_height"}
    categories = tuple({"name": name} for name in names)
    classes = _mask_classes(listing, names) if LABEL_MASK in kinds else ()
    more = {"mask_classes": [{"name": name} for name in classes]} if classes else {}
    columns = Columns(pa.schema(list(kinds.items())), {OBJECTS: names}, parts, categories, more)
    reader = _Reader(listing, fields, Pictures(listing, options.images, options.image_root))
    notes = []
    if any("/SegmentationObject/" in f"/{name}" for name in listing.files):
        notes.append("SegmentationObject was left out: masks of single objects are not imported")
    return Dataset(columns, reader.items(entries), unique=True, total=len(entries), notes=notes)


def _entries(listing: Listing) -> Iterator[_Entry]:
    """The images that have annotations or a mask, by folder and id."""
    files: dict[tuple[str, str], dict[str, str]] = {}
    for name in listing.files:
        root, folder, last = _places(name)
        if folder in (ANNOTATIONS, IMAGES, MASKS):
            fits = last.lower().endswith(".xml") if folder == ANNOTATIONS else is_image_name(last)
            if fits:
                files.setdefault((root, stem_of(last)), {})[folder] = name
    splits = {root: _splits(listing, root) for root in {root for root, _ in files}}
    for (root, one), found in sorted(files.items()):
        if ANNOTATIONS in found or MASKS in found:
            yield _Entry(
                root,
                one,
                found.get(ANNOTATIONS),
                found.get(IMAGES),
                found.get(MASKS),
                splits[root].get(one),
            )


def _places(name: str) -> tuple[str, str, str]:
    """The dataset's folder, the folder in it, and the rest of a file's name."""
    parts = name.split("/")
    for at in range(len(parts) - 1):
        if parts[at] in (ANNOTATIONS, IMAGES, MASKS):
            return "/".join(parts[:at]), parts[at], "/".join(parts[at + 1 :])
    return "", "", name


def _splits(listing: Listing, root: str) -> dict[str, str]:
    """Id -> split, as ImageSets/Main lists them, else ImageSets/Segmentation."""
    found: dict[str, str] = {}
    for folder in ("Segmentation", "Main"):
        start = posixpath.join(root, SETS, folder, "")
        for name in sorted(listing.named(".txt"), key=lambda name: not name.endswith(_BOTH)):
            split = split_named(name.removeprefix(start).removesuffix(".txt"))
            split = TRAIN if name.endswith(_BOTH) else split  # later lists say more
            if split is not None and name.startswith(start):
                lines = listing.read(name).decode("utf-8", "replace").splitlines()
                found |= {line.split()[0]: split for line in lines if line.strip()}
    return found


def _survey(listing: Listing, entries: list[_Entry]) -> tuple[tuple[str, ...], set[str]]:
    """The names of all classes, and the further fields of objects; damaged files wait."""
    names, known = set[str](), set[str]()
    for entry in entries:
        if entry.xml is None:
            continue
        try:
            tree = read_xml(listing.read(entry.xml), entry.xml)
        except Refused:
            continue
        for one in tree.all("object"):
            name = one.text("name") or ""
            if 0 < len(name) <= LONGEST_NAME:
                names.add(name)
            known |= {field for field in ("pose", *_FLAGS) if one.text(field)}
    if names <= set(CLASSES):
        return CLASSES, known
    return tuple(sorted(names)), known


def _mask_classes(listing: Listing, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the classes in masks, by number: those of VOC, or as class_names.txt lists them.

    labelme writes that file; its class ``__ignore__`` has no number.
    """
    file = next((name for name in listing.named(".txt") if name.endswith(_MASK_NAMES)), None)
    if file is None:
        return (_BACKGROUND, *CLASSES) if names == CLASSES else ()
    lines = listing.read(file).decode("utf-8", "replace").splitlines()
    found = tuple(line.strip() for line in lines if line.strip() and line.strip() != _IGNORED)
    if not all(len(name) <= LONGEST_NAME for name in found) or len(set(found)) < len(found):
        raise InputError(
            f"{file}: it needs names of 1 to {LONGEST_NAME} characters, each of them once"
        )
    return found


@dataclass(frozen=True)
class _Reader:
    """Makes rows of annotated images."""

    listing: Listing
    fields: ObjectFields
    pictures: Pictures

    def items(self, entries: list[_Entry]) -> Iterator[Item]:
        names = [posixpath.join(one.root, one.id) for one in entries]
        ids = [one.id for one in entries]
        keys = file_keys(f"{one}." for one in (ids if len(set(ids)) == len(ids) else names))
        for entry, key in zip(entries, keys.values(), strict=True):
            yield Later(key, Place(entry.file), partial(self.values, entry))

    def values(self, entry: _Entry) -> dict[str, Any]:
        """The values of one image's row."""
        tree = None
        if entry.xml is not None:
            tree = read_xml(self.listing.read(entry.xml), entry.xml)
        picture, name = self._picture(entry, tree)
        size = picture.size or _told_size(tree, entry.file)
        values: dict[str, Any] = {"image": picture.value, SPLIT: entry.split, "file_name": name}
        values |= {"image_width": size[0], "image_height": size[1]}
        if tree is not None:
            told = _told_size(tree, entry.file) if tree.text("size") is not None else size
            if told != size and min(told) > 0:
                refuse(
                    "bad-objects",
                    f"{entry.file}: size {told[0]} x {told[1]}, and the image has "
                    f"{size[0]} x {size[1]} pixels as one sees it",
                    "the size of the image",
                )
            objects = [
                self._object(one, size, f"{entry.file}, object {number}")
                for number, one in enumerate(tree.all("object"))
            ]
            values[OBJECTS] = self.fields.value(objects, size, entry.file)
        if entry.mask is not None:
            mask = self.pictures.load(entry.mask, LABEL_MASK, measure=True)
            check_mask(mask, size, entry.mask)
            values[LABEL_MASK] = mask.value
        return values

    def _picture(self, entry: _Entry, tree: Element | None) -> tuple[Picture, str]:
        """The image: the one that the XML names, if it is there, else the one with the id."""
        told = tree.text("filename") if tree is not None else None
        folder = posixpath.join(entry.root, IMAGES)
        if told and (found := self.pictures.find(told, (folder,))):
            return self.pictures.load(found[1], measure=True, listing=found[0]), found[1]
        if entry.image is None:
            name = told or f"{entry.id}.jpg"
            refuse("missing-image", f"{entry.file}: image {name!r}", f"an image in {folder}")
        return self.pictures.load(entry.image, measure=True), entry.image

    def _object(self, one: Element, size: Size, where: str) -> Mapping[str, Any]:
        name = one.text("name")
        if not name or self.fields.names is None or name not in self.fields.names:
            allowed = f"the name of a class, of 1 to {LONGEST_NAME} characters"
            refuse("unknown-category", f"{where}: name {shown(name)}", allowed)
        box = one.first("bndbox")
        if box is None:
            refuse("bad-objects", f"{where}: no bndbox", "xmin, ymin, xmax, ymax")
        x0, y0, x1, y1 = (_number(box, side, where) for side in ("xmin", "ymin", "xmax", "ymax"))
        made: dict[str, Any] = {
            "bbox": _within((x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1), size),
            "category": self.fields.names.index(name),
            "pose": one.text("pose"),
        }
        for flag in _FLAGS:
            text = one.text(flag)
            made[flag] = int(text) if text in ("0", "1") else None
        return {name: value for name, value in made.items() if name in self.fields.kinds}


def _within(box: tuple[float, float, float, float], size: Size) -> list[float]:
    """The box, cut at the border if it is over it by rounding: tools that count from 0 do so."""
    ends = box[0] + box[2], box[1] + box[3]
    near = min(box[:2]) >= -_SLACK_PX and all(
        end <= side + _SLACK_PX for end, side in zip(ends, size, strict=True)
    )
    return list(clip(box, size)) if near and min(box[2:]) > 0 else list(box)


def _number(element: Element, name: str, where: str) -> float:
    text = element.text(name)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        refuse("bad-objects", f"{where}: {name} is {text!r}", "numbers")
    return number


def _told_size(tree: Element | None, where: str) -> Size:
    """The size that the XML says.

    Raises:
        Refused: it says none.
    """
    size = tree.first("size") if tree is not None else None
    if size is None:
        refuse("bad-xml", f"{where}: no size of the image", "size with width and height")
    width, height = (_number(size, side, where) for side in ("width", "height"))
    return int(width), int(height)


KIND = Kind("voc", "Pascal VOC: Annotations/*.xml and JPEGImages", fits, read)
