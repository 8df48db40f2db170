"""Writes small sources of every kind that `batchgen import` reads: digits, and drawn shapes.

    python jobs/import_sources.py out/sources

Digits are those of scikit-learn, in folders by split and class. Shapes are drawn, so their boxes
and masks are known: the same drawings as COCO, YOLO, VOC, WebDataset, CSV and JSON Lines.
"""

from __future__ import annotations

import csv
import io
import json
import random
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw

SIZE = 32
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "blue", "white", "green", "yellow", "purple")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Shape:
    """A drawn shape: its kind, and its pixels' box x0, y0, x1, y1 (without x1 and y1)."""

    kind: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def polygon(self) -> list[int]:
        """Corners of the shape; of a circle those of its box."""
        x0, y0, x1, y1 = self.box
        if self.kind == "triangle":
            return [x0, y1, x1, y1, (x0 + x1) // 2, y0]
        return [x0, y0, x1, y0, x1, y1, x0, y1]


@dataclass(frozen=True)
class Drawing:
    """An image with up to two shapes on a black background."""

    name: str
    split: str
    shapes: tuple[Shape, ...]

    @property
    def caption(self) -> str:
        said = [f"a {one.colour} {one.kind}" for one in self.shapes]
        return f"{' and '.join(said) or 'nothing'} on a black background"

    def png(self) -> bytes:
        return _png(self._drawn("RGB", [one.colour for one in self.shapes]))

    def mask(self) -> bytes:
        """Class numbers: 0 for the background, then the shapes."""
        numbers = [SHAPES.index(one.kind) + 1 for one in self.shapes]
        return _png(self._drawn("L", numbers))

    def _drawn(self, mode: str, fills: list[str] | list[int]) -> Image.Image:
        image = Image.new(mode, (SIZE, SIZE))
        draw = ImageDraw.Draw(image)
        for one, fill in zip(self.shapes, fills, strict=True):
            x0, y0, x1, y1 = one.box
            if one.kind == "circle":
                draw.ellipse((x0, y0, x1 - 1, y1 - 1), fill=fill)
            elif one.kind == "square":
                draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=fill)
            else:
                draw.polygon([(x0, y1 - 1), (x1 - 1, y1 - 1), ((x0 + x1) // 2, y0)], fill=fill)
        return image


def drawings(count: int = 12, seed: int = 0) -> list[Drawing]:
    """Drawings of one shape in each half, or of one shape; the last one is empty."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        shapes = []
        for half in range(draw.choice((1, 2)) if number < count - 1 else 0):
            x0, y0 = 16 * half + draw.randrange(1, 5), draw.randrange(1, 14)
            side = draw.randrange(8, 12)
            kind, colour = draw.choice(SHAPES), draw.choice(COLOURS)
            shapes.append(Shape(kind, colour, (x0, y0, x0 + side, y0 + side)))
        split = "val" if number % 4 == 3 else "train"
        found.append(Drawing(f"shapes-{number:03d}", split, tuple(shapes)))
    return found


def write_digits(folder: Path, each: int = 4) -> None:
    """``train/three/0001.png`` and so on: scikit-learn's digits, larger, white on black."""
    from sklearn.datasets import load_digits

    data = load_digits()
    counts: dict[int, int] = {}
    for pixels, digit in zip(data.images, data.target, strict=True):
        number = counts.get(int(digit), 0)
        counts[int(digit)] = number + 1
        if number < each:
            split = "validation" if number == each - 1 else "train"
            image = Image.fromarray((pixels * 15.9375).astype("uint8"))
            path = folder / split / DIGITS[int(digit)] / f"{number:04d}.png"
            _write(path, _png(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))


def write_coco(folder: Path, found: list[Drawing]) -> None:
    """annotations/instances_SPLIT.json and SPLIT/*.png; with polygons, and masks of circles."""
    annotations = 0
    for split in ("train", "val"):
        tree: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        tree["categories"] = [
            {"id": 10 * number, "name": name, "supercategory": "shape"}
            for number, name in enumerate(SHAPES, start=1)
        ]
        for number, one in enumerate(found, start=1):
            if one.split != split:
                continue
            name = f"{one.name}.png"
            size = {"width": SIZE, "height": SIZE}
            tree["images"].append({"id": number, "file_name": name, **size})
            _write(folder / split / name, one.png())
            for shape in one.shapes:
                annotations += 1
                x0, y0, x1, y1 = shape.box
                tree["annotations"].append(
                    {
                        "id": annotations,
                        "image_id": number,
                        "category_id": 10 * (SHAPES.index(shape.kind) + 1),
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": 0,
                        "segmentation": [shape.polygon],
                    }
                )
        text = json.dumps(tree)
        _write(folder / "annotations" / f"instances_{split}.json", text.encode())


def write_yolo(folder: Path, found: list[Drawing]) -> None:
    """data.yaml, images/SPLIT and labels/SPLIT; an empty image has no label file."""
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(SHAPES))
    text = f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}"
    _write(folder / "data.yaml", text.encode())
    for one in found:
        _write(folder / "images" / one.split / f"{one.name}.png", one.png())
        lines = []
        for shape in one.shapes:
            x0, y0, x1, y1 = (side / SIZE for side in shape.box)
            numbers = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
            lines.append(f"{SHAPES.index(shape.kind)} {' '.join(map(str, numbers))}\n")
        if lines:
            _write(folder / "labels" / one.split / f"{one.name}.txt", "".join(lines).encode())


def write_voc(folder: Path, found: list[Drawing]) -> None:
    """Annotations, JPEGImages, ImageSets/Main and SegmentationClass, as in VOC2012."""
    names = ("__ignore__", "_background_", *SHAPES)  # as labelme lists the classes of the masks
    _write(folder / "class_names.txt", "".join(f"{name}\n" for name in names).encode())
    for one in found:
        _write(folder / "JPEGImages" / f"{one.name}.png", one.png())
        _write(folder / "SegmentationClass" / f"{one.name}.png", one.mask())
        objects = "".join(map(_voc_object, one.shapes))
        text = (
            f"<annotation><filename>{one.name}.png</filename>"
            f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
            f"{objects}</annotation>"
        )
        _write(folder / "Annotations" / f"{one.name}.xml", text.encode())
    for split in ("train", "val"):
        lines = [f"{one.name}\n" for one in found if one.split == split]
        _write(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(lines).encode())


def _voc_object(shape: Shape) -> str:
    x0, y0, x1, y1 = shape.box
    sides = (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1))
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    name = escape(shape.kind)
    return f"<object><name>{name}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"


def write_webdataset(folder: Path, found: list[Drawing]) -> None:
    """One tar for each split: KEY.png, KEY.txt and KEY.json."""
    for split in ("train", "val"):
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{split}-000000.tar", "w") as archive:
            for one in found:
                if one.split == split:
                    told = json.dumps({"shapes": len(one.shapes)}).encode()
                    members = {"png": one.png(), "txt": one.caption.encode(), "json": told}
                    for extension, data in members.items():
                        info = tarfile.TarInfo(f"{one.name}.{extension}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))


def write_tables(folder: Path, found: list[Drawing]) -> None:
    """prompts.csv, prompts.jsonl, prompts.txt and classes.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "label", "guidance_scale"])
        for one in found[:-1]:
            writer.writerow([one.caption, one.shapes[0].kind, 3 + len(one.shapes)])
    rows = [{"prompt": one.caption, "seed": number} for number, one in enumerate(found)]
    _write(folder / "prompts.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    _write(folder / "prompts.txt", "".join(f"{one.caption}\n" for one in found).encode())
    _write(folder / "classes.txt", "".join(f"{name}\n" for name in DIGITS).encode())


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main(folder: Path) -> None:
    """Write all of them into sub-folders."""
    found = drawings()
    write_digits(folder / "digits")
    write_coco(folder / "coco", found)
    write_yolo(folder / "yolo", found)
    write_voc(folder / "voc", found)
    write_webdataset(folder / "webdataset", found)
    write_tables(folder, found)
    print(f"wrote {folder}: {', '.join(sorted(one.name for one in folder.iterdir()))}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/sources"))
