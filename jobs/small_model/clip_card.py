"""The README of the small CLIP, rendered from its card."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any


def readme_of(card: dict[str, Any]) -> str:
    """What the model is for, how it was trained, and how well it does."""
    template = Template((Path(__file__).parent / "clip_card.md").read_text())
    return template.substitute(_words(card))


def _words(card: dict[str, Any]) -> dict[str, str]:
    """The card's values as the template prints them."""
    training, metrics = card["training"], card["metrics"]
    ((weakest, least),) = metrics["weakest_class"].items()
    figures = {name: value for name, value in metrics.items() if name != "weakest_class"}
    return {
        "name": card["name"],
        "parameters": f"{card['parameters']:,}",
        "steps": f"{training['steps']:,}",
        "cpu_s": f"{training['cpu_s']:,}",
        "batch": str(training["recipe"]["stage"]["batch_size"]),
        "seed": str(training["recipe"]["seed"]),
        "torch": training["torch"],
        "weakest": weakest,
        "least": f"{least:.3f}",
        **{name: _shown(value) for name, value in figures.items()},
        **{f"bar_{name}": f"{bar:.2f}" for name, bar in card["bars"].items()},
    }


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
