"""The model card: one machine-readable file, and the README.md that is rendered from it."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any, Final

from jobs.small_model.added_card import added_section
from jobs.small_model.captions import DIGIT_WORDS, digit_caption, shape_caption
from jobs.small_model.data import COLOUR_NAMES, SHAPES, SIZES
from jobs.small_model.recipe import IMAGE_SIZE, Recipe

CARD_FILE: Final = "card.json"
SPLIT_FILE: Final = "digits_split.json"
README_FILE: Final = "README.md"
SHEET_FILE: Final = "sheet.png"
STEPS: Final = 12  # recommended, and what the metrics are measured with
GUIDANCE_SCALE: Final = 2.0  # more follows the caption no better and varies less


def first_card(
    recipe: Recipe, training: dict[str, Any], psnr_db: dict[str, float]
) -> dict[str, Any]:
    """The card of a freshly exported model: everything but its measured metrics."""
    return {
        "name": "digits-shapes",
        "recommended": {
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "height": IMAGE_SIZE,
            "width": IMAGE_SIZE,
        },
        "captions": {
            "digit": digit_caption(7),
            "shape": shape_caption("circle", "red", "blue"),
            "digits": list(DIGIT_WORDS),
            "shapes": list(SHAPES),
            "colours": list(COLOUR_NAMES),
            "sizes": [size for size in SIZES if size],
        },
        "training": {**training, "recipe": recipe.to_dict()},
        "vae_psnr_db": psnr_db,
        "metrics": None,
    }


def read_card(directory: Path) -> dict[str, Any]:
    """The card of the model in ``directory``."""
    card: dict[str, Any] = json.loads((directory / CARD_FILE).read_text())
    return card


def write_readme(directory: Path) -> None:
    """Render README.md from the card in ``directory``."""
    card = read_card(directory)
    template = Template((Path(__file__).parent / "card.md").read_text())
    (directory / README_FILE).write_text(template.substitute(_words(card)))


def _words(card: dict[str, Any]) -> dict[str, str]:
    """The card's values as the template prints them."""
    training, captions, recommended = card["training"], card["captions"], card["recommended"]
    recipe = training["recipe"]
    return {
        "name": card["name"],
        "steps": str(recommended["num_inference_steps"]),
        "guidance": str(recommended["guidance_scale"]),
        "digit_caption": captions["digit"],
        "shape_caption": captions["shape"],
        "shapes": ", ".join(captions["shapes"]),
        "colours": ", ".join(captions["colours"]),
        "sizes": " or ".join(captions["sizes"]),
        "seed": str(recipe["seed"]),
        "vae_steps": f"{training['vae_steps']:,}",
        "vae_batch": str(recipe["vae"]["batch_size"]),
        "vae_cpu_s": f"{training['vae_cpu_s']:,}",
        "denoiser_steps": f"{training['denoiser_steps']:,}",
        "denoiser_batch": str(recipe["denoiser"]["batch_size"]),
        "denoiser_cpu_s": f"{training['denoiser_cpu_s']:,}",
        "torch": training["torch"],
        "shape_pool": f"{recipe['shape_pool']:,}",
        "digit_copies": str(recipe["digit_copies"]),
        "digit_share": f"{recipe['digit_share']:.0%}",
        "dropout": f"{recipe['caption_dropout']:.0%}",
        "psnr_digits": str(card["vae_psnr_db"]["digits"]),
        "psnr_shapes": str(card["vae_psnr_db"]["shapes"]),
        "metrics": _metrics_section(card["metrics"]),
        "added": added_section(card.get("added", {}), card["name"]),
    }


def _metrics_section(metrics: dict[str, Any] | None) -> str:
    if metrics is None:
        return "Not measured yet: `python -m jobs.small_model evaluate` fills this in."
    rows = ["| agreement with the caption | measured | bar |", "| --- | --- | --- |"]
    for name, bar in metrics["bars"].items():
        label = name.removesuffix("_agreement").replace("_", " ")
        rows.append(f"| {label} | {metrics[name]:.3f} | {bar:.2f} |")
    shape = _weakest(metrics["shape_agreement_by_class"], "shape")
    digit = _weakest(metrics["digit_agreement_by_class"], "digit")
    judges = metrics["shape_judge_accuracies"]
    return "\n".join(
        [
            *rows,
            "",
            f"{metrics['images_per_bar']:,} images a bar, one a caption, fixed seeds, the"
            " recommended settings, the exported",
            "float16 weights run in float32. All three of shape, object colour and background are"
            f" right in {metrics['all_three_agreement']:.3f}.",
            f"By class: {shape}; {digit}.",
            "Guided pictures are more typical than real ones, so a judge may agree with them more"
            " often than it is right",
            "about real ones.",
            "",
            "The judges learnt from real or drawn images only. Digits: an SVM on 8x8 pixels,"
            f" {metrics['digit_judge_accuracy']:.3f} on the held-out",
            "real digits. Shapes and colours: a small convolutional network,"
            f" {judges[0]:.3f} / {judges[1]:.3f} / {judges[2]:.3f} (shape, object,",
            "background) on freshly drawn pictures.",
            "",
            f"Variety: two generated digits of a class differ {metrics['digit_variety_ratio']:.2f}"
            " times as much as two real ones. Copying:",
            "a generated digit is"
            f" {metrics['digit_nearest_training_ratio']:.2f} times as far from its nearest"
            " training digit as a held-out real one is",
            "(medians; 8x8 pixels).",
        ]
    )


def _weakest(by_class: dict[str, float], kind: str) -> str:
    name, value = min(by_class.items(), key=lambda item: item[1])
    if value == 1:
        return f"every {kind} reaches 1.000"
    return f"the weakest {kind} is {name} ({value:.3f})"
