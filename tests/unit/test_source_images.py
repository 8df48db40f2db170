"""Source images stay within bounds: a limit of pixels, and large images one row at a time."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchgen.errors import RejectRow
from batchgen.images import source
from batchgen.images.source import Turn, open_image, open_mask
from tests.datasets_on_disk import png


def file_of(image: Image.Image, image_format: str = "PNG") -> bytes:
    sink = io.BytesIO()
    image.save(sink, image_format)
    return sink.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16"])
def test_in_strips_or_whole_the_pixels_are_the_same(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = np.random.default_rng(1).integers(0, 256, (23, 17, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(drawn[:, :, 0].astype(np.uint16) * 255)
    else:
        image = Image.fromarray(drawn, "RGBA").convert(mode)
    data = file_of(image, "TIFF" if mode == "CMYK" else "PNG")
    whole, mask = open_image(data), open_mask(data)
    monkeypatch.setattr(source, "STRIP_PIXELS", 50)
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(whole))
    assert np.array_equal(np.asarray(open_mask(data)), np.asarray(mask))


def test_the_limit_of_pixels_is_the_specs() -> None:
    assert open_image(png(8, 8), 64).size == (8, 8)
    for opens, what in ((open_image, "image"), (open_mask, "mask")):
        with pytest.raises(
            RejectRow, match=r"8 x 9 pixels; allowed: up to 64 pixels \(input\.image_l"
        ):
            opens(png(8, 9), 64)
        with pytest.raises(RejectRow) as caught:
            opens(png(8, 9), 64)
        assert caught.value.reason == f"{what}-too-large"


def test_large_images_are_in_hand_of_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LARGE_PIXELS", 100)
    entered, done = threading.Event(), threading.Event()

    def another_row() -> None:
        with Turn() as turn:
            open_image(png(8, 8), before=turn.before)  # a small one waits for nobody
            entered.set()
            open_image(png(16, 16), before=turn.before)
            done.set()

    thread = threading.Thread(target=another_row)
    with Turn() as turn:
        for _ in range(2):  # image and mask of one row
            open_image(png(16, 16), before=turn.before)
        thread.start()
        assert entered.wait(20)
        assert not done.wait(0.2)
    assert done.wait(20)
    thread.join()


PEAK = """
import sys
from batchgen.images import source
from batchgen.images.conditions import fit_image
from batchgen.images.source import open_image
fit_image(open_image(open(sys.argv[1], "rb").read()), 64, 64, "fill")
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
"""


@pytest.mark.parametrize(("mode", "most_mb"), [("RGB", 300), ("RGBA", 400), ("I;16", 400)])
def test_an_image_takes_little_more_memory_than_its_pixels(
    mode: str, most_mb: int, tmp_path: Path
) -> None:
    """4096 x 8192: 101 MB as RGB, 134 MB as RGBA; the process itself takes 60 MB."""
    colour = {"RGB": (1, 2, 3), "RGBA": (1, 2, 3, 9), "I;16": 300}[mode]
    path = tmp_path / "image.png"
    path.write_bytes(file_of(Image.new(mode, (8192, 4096), colour)))
    run = [sys.executable, "-c", PEAK, str(path)]
    peak = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert peak < most_mb, peak
