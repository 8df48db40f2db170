"""The command line of the job: ``python -m jobs.small_model train``, ``export`` and so on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch

from jobs.small_model import recipe as recipes


@click.group()
@click.option("--threads", default=1, show_default=True, help="CPU threads to use.")
def main(threads: int) -> None:
    """Train, export and measure the small latent diffusion model."""
    torch.set_num_threads(threads)


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoints go here.")
@click.option("--steps", type=int, help="Denoiser steps; default: the recipe's.")
@click.option("--seed", default=0, show_default=True)
@click.option("--smoke", is_flag=True, help="A run of seconds that learns nothing, for tests.")
@click.option("--stop-at", type=int, help="End this call after so many steps of the whole run.")
def train(out: Path, steps: int | None, seed: int, smoke: bool, stop_at: int | None) -> None:
    """Train, or go on training where OUT holds checkpoints."""
    from jobs.small_model.train import train as run

    recipe = replace(recipes.smoke_recipe() if smoke else recipes.Recipe(), seed=seed)
    if steps is not None:
        recipe = replace(recipe, denoiser=replace(recipe.denoiser, steps=steps))
    done = run(out, recipe, stop_at)
    click.echo("done" if done else "stopped early; the same command goes on")


@main.command()
@click.option("--out", type=click.Path(path_type=Path, exists=True), required=True)
@click.argument("target", type=click.Path(path_type=Path))
def export(out: Path, target: Path) -> None:
    """Write the run in OUT to TARGET in diffusers layout."""
    from jobs.small_model.export import export as run

    run(out, target)


@main.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=1_000, show_default=True, help="Images a bar.")
def evaluate(model: Path, images: int) -> None:
    """Measure MODEL and write the figures into its card."""
    from jobs.small_model.evaluate import evaluate as run

    run(model, images)


ADDED = (
    click.argument("model", type=click.Path(path_type=Path, exists=True)),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoints."),
    click.option("--images", default=320, show_default=True, help="Pictures to measure by."),
    click.option("--smoke", is_flag=True, help="Seconds of training that learn nothing."),
    click.option("--stop-at", type=int, help="End this call after so many steps."),
)


def added(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a stage that adds to a finished model."""
    for option in reversed(ADDED):
        command = option(command)
    return command


@main.command()
@added
def classes(model: Path, out: Path, images: int, smoke: bool, stop_at: int | None) -> None:
    """Train the table of classes for MODEL and, if it is good enough, add it."""
    from jobs.small_model.classes import add_classes, train_classes

    recipe = recipes.class_recipe()
    recipe = recipe.smoke() if smoke else recipe
    result = train_classes(model, out, recipe, stop_at)
    if result.done:
        click.echo(add_classes(model, result.averaged, recipe, result, images))
    else:
        click.echo("stopped early; the same command goes on")


@main.command()
@added
def control(model: Path, out: Path, images: int, smoke: bool, stop_at: int | None) -> None:
    """Train the ControlNet of edges for MODEL and, if it is good enough, put it beside MODEL."""
    from jobs.small_model.control import add_control, train_control

    recipe = recipes.control_recipe()
    recipe = recipe.smoke() if smoke else recipe
    result = train_control(model, out, recipe, stop_at)
    if result.done:
        click.echo(add_control(model, result.averaged, recipe, result, images))
    else:
        click.echo("stopped early; the same command goes on")


@main.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoints.")
@click.option("--images", default=1_000, show_default=True, help="Drawings to measure by.")
@click.option("--smoke", is_flag=True, help="Seconds of training that learn nothing.")
@click.option("--stop-at", type=int, help="End this call after so many steps.")
def clip(target: Path, out: Path, images: int, smoke: bool, stop_at: int | None) -> None:
    """Train the small CLIP and, if it is good enough, write it to TARGET."""
    from jobs.small_model.clip import train_clip
    from jobs.small_model.clip_export import export_clip

    recipe = recipes.clip_recipe()
    recipe = recipe.smoke() if smoke else recipe
    result = train_clip(out, recipe, stop_at)
    if result.done:
        click.echo(export_clip(target, result.averaged, recipe, result, images))
    else:
        click.echo("stopped early; the same command goes on")


if __name__ == "__main__":
    main()
