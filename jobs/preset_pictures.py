"""Makes the pictures in `docs/images/presets` from runs of the commands of docs/presets.md.

    python jobs/preset_pictures.py [PRESET ...]

Every sample is shown, none chosen: what the model was given, and at its right what it made of that.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from batchgen.recipes import presets
from jobs.task_pictures import COLOURS, blocks, sheet

RUNS, PICTURES = Path("out/presets"), Path("docs/images/presets")


def main(names: list[str]) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in names or presets.names():
        if not (RUNS / name).is_dir():
            continue
        path = PICTURES / f"{name}.png"
        picture = sheet(blocks(RUNS / name))
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
