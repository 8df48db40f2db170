"""The card's words on the parts that were trained for the finished model."""

from __future__ import annotations

from typing import Any


def added_section(added: dict[str, Any], name: str) -> str:
    """What was added, how it was trained and how well it does; empty where nothing was."""
    parts = []
    if "classes" in added:
        parts += _classes(added["classes"])
    if "control" in added:
        parts += _control(added["control"], name)
    if not parts:
        return ""
    first = [
        "",
        "## Added parts",
        "",
        "Trained for the finished model, none of whose weights moved, on fewer of the same images:",
        "`python -m jobs.small_model classes --out RUN MODEL`, then `control`, likewise; seed 0.",
        "",
    ]
    return "\n".join([*first, *parts])


def _classes(figures: dict[str, Any]) -> list[str]:
    metrics, by_class = figures["metrics"], figures["metrics"]["agreement_by_class"]
    worst = min(by_class, key=lambda one: by_class[one])
    others = ", ".join(
        f"{share:.3f} with {scale}"
        for scale, share in metrics["class_agreement_by_guidance"].items()
        if scale != str(metrics["guidance_scale"])
    )
    return [
        f"**`class_embedder`**, {_training(figures)}: one token for each of",
        "16 classes (the ten digit words and the six shapes) and one for none, in the place of a",
        "caption. It is for `task: class-conditional`; plain diffusers passes it by. The class is",
        f"right in {metrics['class_agreement']:.3f} of {metrics['images']} pictures with guidance"
        f" {metrics['guidance_scale']}, in {others}:",
        f"digits {metrics['digit_agreement']:.3f}, shapes {metrics['shape_agreement']:.3f}, the"
        f" weakest is {worst} ({by_class[worst]:.3f}).",
        "A class says nothing of colours: each picture gets its own, at times mixed ones, and some",
        "outlines are bent. A caption gives the cleaner shapes.",
        "",
    ]


def _control(figures: dict[str, Any], name: str) -> list[str]:
    metrics = figures["metrics"]
    return [
        f"**`{name}-canny`**, in the folder beside this one, {_training(figures)}:",
        "a ControlNet of Canny edges (thresholds 100 and 200) for `task: control`. The edges of"
        f" {metrics['images']} unseen",
        "drawings, with captions of other colours, and of as many held-out digits:",
        "",
        "| | with edges | without |",
        "| --- | --- | --- |",
        "| F1 of the edges, a pixel off allowed: drawings |"
        f" {metrics['shape_edges_f1']:.3f} | {metrics['shape_edges_f1_without']:.3f} |",
        "| the same: digits |"
        f" {metrics['digit_edges_f1']:.3f} | {metrics['digit_edges_f1_without']:.3f} |",
        f"| shape as asked for | {metrics['shape_agreement']:.3f} | |",
        f"| object colour | {metrics['object_colour_agreement']:.3f} | |",
        f"| background colour | {metrics['background_colour_agreement']:.3f} | |",
        f"| digit | {metrics['digit_agreement']:.3f} | |",
        "",
    ]


def _training(figures: dict[str, Any]) -> str:
    training = figures["training"]
    batch = training["recipe"]["stage"]["batch_size"]
    return f"{training['steps']:,} steps of {batch} in {training['cpu_s']:,} CPU seconds"
