"""One optimisation loop for both networks: step budget, cosine rate, EMA, resumable checkpoints."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.small_model.recipe import StageRecipe

LOG_EVERY = 50


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind: ``averaged`` holds the EMA weights once ``done``."""

    averaged: nn.Module
    steps_done: int
    cpu_s: float
    done: bool


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of one step, a function of its number: resuming needs no random state."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate(recipe: StageRecipe, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak at the budget's end."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def run_stage(
    name: str,
    model: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    recipe: StageRecipe,
    checkpoint: Path,
    stop_at: int | None = None,
) -> StageResult:
    """Optimise ``model`` up to the step budget, from its checkpoint where there is one.

    ``loss_at`` gives the scalar loss of a step by its number alone. ``stop_at`` ends this call
    early, as an interruption would, with the checkpoint written.
    """
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    first, cpu_before = _restore(checkpoint, recipe, model, averaged, optimizer)
    end = recipe.steps if stop_at is None else min(recipe.steps, max(first, stop_at))
    started = time.process_time()
    running = torch.zeros(())
    for step in range(first, end):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _average(averaged, model, min(recipe.ema_decay, (1 + step) / (10 + step)))
        running += loss.detach() / LOG_EVERY
        done, cpu_s = step + 1, cpu_before + time.process_time() - started
        if done % LOG_EVERY == 0:
            print(f"{name} {done}/{recipe.steps} loss {running:.4f} cpu_s {cpu_s:.0f}", flush=True)
            running.zero_()
        if done % recipe.checkpoint_every == 0 or done == end:
            _save(checkpoint, recipe, done, cpu_s, model, averaged, optimizer)
    total_cpu_s = cpu_before + time.process_time() - started
    return StageResult(averaged.eval(), end, total_cpu_s, end == recipe.steps)


def load_averaged(checkpoint: Path, model: nn.Module) -> tuple[int, float]:
    """Put a checkpoint's EMA weights into ``model``; returns its steps and CPU seconds."""
    saved = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(saved["averaged"])
    return int(saved["step"]), float(saved["cpu_s"])


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    targets, sources = list(averaged.parameters()), [p.detach() for p in model.parameters()]
    torch._foreach_lerp_(targets, sources, 1.0 - decay)


def _restore(
    checkpoint: Path,
    recipe: StageRecipe,
    model: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    if not checkpoint.exists():
        return 0, 0.0
    saved: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    if saved["recipe"] != asdict(recipe):
        raise ValueError(
            f"{checkpoint} was written by another recipe ({saved['recipe']}, now {asdict(recipe)});"
            " give a new --out or the same settings"
        )
    model.load_state_dict(saved["model"])
    averaged.load_state_dict(saved["averaged"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"]), float(saved["cpu_s"])


def _save(
    checkpoint: Path,
    recipe: StageRecipe,
    step: int,
    cpu_s: float,
    model: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    state = {
        "recipe": asdict(recipe),
        "step": step,
        "cpu_s": cpu_s,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    # Written aside and renamed, so that an interruption never leaves half a checkpoint.
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, checkpoint)
