"""Compares Stable Diffusion XL in diffusers' modular blocks with the classic pipeline.

    python benchmarks/modular_sdxl.py [REPETITIONS]

Builds the tiny text-to-image model and runs encode, denoise and decode both ways on the same
modules. Prints and writes ``results/modular_sdxl.json``: the largest differences, the components
and settings of each stage's blocks, U-Net calls, CPU seconds, lines of adapter code, and what the
blocks lack.
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ClassifierFreeGuidance, ModularPipeline, StableDiffusionXLPipeline
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

from batchgen.models.tiny import BUILDERS

PROMPTS = ("a red star", "a blue circle", "seven", "a red star")
NEGATIVE = "grey"
EMBEDS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
STEPS = 3
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
STAGES = ("encode", "denoise", "decode")
Stage = Callable[..., Any]


def classic_encode(
    pipeline: Any, prompt: str, negative: str | None, scale: float
) -> dict[str, Any]:
    guided = scale > 1
    made = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=guided, negative_prompt=negative
    )
    return {name: one for name, one in zip(EMBEDS, made, strict=True) if one is not None}


def classic_denoise(pipeline: Any, embeds: dict[str, Any], scale: float, **more: Any) -> Any:
    return pipeline(**embeds, guidance_scale=scale, output_type="latent", **more).images


def classic_decode(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    decoded: torch.Tensor = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor)[0]
    return decoded


def modular_encode(
    pipeline: Any, prompt: str, negative: str | None, scale: float
) -> dict[str, Any]:
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=max(scale, 1.0)))
    state = pipeline(prompt=prompt, negative_prompt=negative)
    return {name: state.get(name) for name in EMBEDS if state.get(name) is not None}


def modular_denoise(pipeline: Any, embeds: dict[str, Any], scale: float, **more: Any) -> Any:
    # Below 1 the guider would still guide, and the loop enables a disabled guider again.
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=max(scale, 1.0)))
    return pipeline(**embeds, **more, output="latents")


def modular_decode(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    decoded: torch.Tensor = pipeline(latents=latents, output_type="pt", output="images")
    return decoded * 2 - 1  # the block scales to [0, 1] and clamps


class Configuration:
    """Stands in for a component of another stage: only what a pipeline reads from it."""

    def __init__(self, module: Any) -> None:
        self.config, self.dtype = module.config, module.dtype


def classic_pipelines(whole: Any) -> dict[str, Any]:
    """Stage -> a classic pipeline with only that stage's modules, as in batchgen."""
    held = {"encode": TEXT, "denoise": ("unet", "scheduler", "vae"), "decode": ("vae",)}
    made = {}
    for stage, names in held.items():
        parts = {name: part for name, part in whole.components.items() if name in names}
        made[stage] = StableDiffusionXLPipeline(**{**dict.fromkeys(whole.components), **parts})
        made[stage].set_progress_bar_config(disable=True)
    made["denoise"].vae = Configuration(whole.vae)
    return made


def modular_blocks() -> dict[str, Any]:
    """Stage -> its blocks in the text-to-image workflow."""
    blocks = StableDiffusionXLAutoBlocks().get_workflow("text2image").sub_blocks
    inner = {name: block for name, block in blocks.items() if name.startswith("denoise")}
    return {
        "encode": blocks["text_encoder"],
        "denoise": SequentialPipelineBlocks.from_blocks_dict(inner),
        "decode": blocks["decode"],
    }


def modular_pipelines(classic: Any) -> dict[str, ModularPipeline]:
    """Stage -> a pipeline of its blocks, with the classic pipeline's modules."""
    made = {}
    for stage, blocks in modular_blocks().items():
        pipeline = blocks.init_pipeline()
        wanted = [spec.name for spec in blocks.expected_components]
        pipeline.update_components(
            **{name: getattr(classic, name) for name in wanted if hasattr(classic, name)}
        )
        pipeline.set_progress_bar_config(disable=True)
        made[stage] = pipeline
    return made


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in range(count)]


def joined(each: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([one[name] for one in each]) for name in each[0]}


def run(pipelines: dict[str, Any], how: dict[str, Stage], case: dict[str, Any]) -> dict[str, Any]:
    """Run all three stages; returns their results and CPU seconds."""
    prompts, scale, size = PROMPTS[: case["batch"]], case["guidance"], case["size"]
    times, result = {}, {}
    start = time.process_time()
    each = [how["encode"](pipelines["encode"], p, case["negative"], scale) for p in prompts]
    result["encode"] = joined(each)
    times["encode"] = time.process_time() - start
    start = time.process_time()
    result["denoise"] = how["denoise"](
        pipelines["denoise"],
        result["encode"],
        scale,
        width=size,
        height=size,
        num_inference_steps=STEPS,
        generator=generators(len(prompts)),
    )
    times["denoise"] = time.process_time() - start
    start = time.process_time()
    result["decode"] = how["decode"](pipelines["decode"], result["denoise"])
    times["decode"] = time.process_time() - start
    return {"result": result, "seconds": times}


def to_bytes(decoded: torch.Tensor) -> torch.Tensor:
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()


def compare(classic: dict[str, Any], modular: dict[str, Any]) -> dict[str, float]:
    one, other = classic["result"], modular["result"]
    embeds = [(one["encode"][n] - other["encode"][n]).abs().max().item() for n in one["encode"]]
    pixels = to_bytes(one["decode"]) - to_bytes(other["decode"])
    return {
        "embeddings": max(embeds),
        "latents": (one["denoise"] - other["denoise"]).abs().max().item(),
        "latents_largest": one["denoise"].abs().max().item(),
        "levels_of_255": pixels.abs().max().item(),
        "pixels_that_differ": (pixels != 0).float().mean().item(),
    }


def unet_batches(
    unet: Any, pipelines: dict[str, Any], how: dict[str, Stage], case: dict[str, Any]
) -> list[int]:
    """The batch size of every U-Net call."""
    seen: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    run(pipelines, how, case)
    hook.remove()
    return seen


def timed(
    classic: dict[str, Any], modular: dict[str, Any], case: dict[str, Any], repetitions: int
) -> dict[str, Any]:
    """Medians in milliseconds; median, minimum and maximum of the ratio modular / classic."""
    taken: dict[str, dict[str, list[float]]] = {
        way: {stage: [] for stage in STAGES} for way in ("classic", "modular")
    }
    for repetition in range(repetitions + 1):
        pairs = [("classic", classic, CLASSIC), ("modular", modular, MODULAR)]
        for way, pipelines, how in pairs if repetition % 2 else reversed(pairs):
            seconds = run(pipelines, how, case)["seconds"]
            if repetition:  # the first one is a warm-up
                for stage in STAGES:
                    taken[way][stage].append(seconds[stage] * 1000)
    report: dict[str, Any] = {}
    for stage in STAGES:
        both = zip(taken["modular"][stage], taken["classic"][stage], strict=True)
        ratios = [mine / theirs for mine, theirs in both]
        report[stage] = {
            "classic_ms": round(statistics.median(taken["classic"][stage]), 2),
            "modular_ms": round(statistics.median(taken["modular"][stage]), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return report


def asked_for() -> dict[str, Any]:
    """Components and settings that each stage's blocks list."""
    auto = StableDiffusionXLAutoBlocks().sub_blocks
    report: dict[str, Any] = {
        stage: [spec.name for spec in blocks.expected_components]
        for stage, blocks in modular_blocks().items()
    }
    report["denoise_of_all_workflows"] = [c.name for c in auto["denoise"].expected_components]
    return report


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def without_vae(classic: Any, embeds: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The denoise blocks without a VAE, and with only the VAE's configuration."""
    size = {"width": case["size"], "height": case["size"]}

    def shape(vae: Any) -> Any:
        pipeline = modular_pipelines(classic)["denoise"]
        pipeline.update_components(vae=vae)
        arguments = {**size, "num_inference_steps": STEPS, "generator": generators(case["batch"])}
        return list(modular_denoise(pipeline, embeds, case["guidance"], **arguments).shape)

    return {
        "latents_wanted": [case["batch"], 4, case["size"] // 4, case["size"] // 4],
        "vae_left_out": attempt(lambda: shape(None)),
        "vae_of_configuration_alone": attempt(lambda: shape(Configuration(classic.vae))),
    }


def features(classic: Any, modular: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Whether the blocks support what batchgen needs of a pipeline."""
    case = {"batch": 2, "guidance": 3.0, "size": 32, "negative": None}
    encoded = joined([modular_encode(modular["encode"], p, None, 3.0) for p in PROMPTS[:2]])
    unguided = joined([classic_encode(classic, p, None, 0.0) for p in PROMPTS[:2]])

    def turbo(embeds: dict[str, Any], **guider: Any) -> float:
        """One step at a guidance scale of 0, as Turbo models need."""
        pipeline = modular["denoise"]
        pipeline.update_components(guider=ClassifierFreeGuidance(**guider))
        shared = {"width": 32, "height": 32, "num_inference_steps": 1}
        mine = pipeline(**embeds, **shared, generator=generators(2), output="latents")
        theirs = classic_denoise(classic, unguided, 0.0, **shared, generator=generators(2))
        return float((mine - theirs).abs().max())

    def image_latents() -> float:
        blocks = StableDiffusionXLAutoBlocks().get_workflow("image2image").sub_blocks
        inner = {name: block for name, block in blocks.items() if name.startswith("denoise")}
        pipeline = SequentialPipelineBlocks.from_blocks_dict(inner).init_pipeline()
        pipeline.update_components(unet=classic.unet, scheduler=classic.scheduler, vae=classic.vae)
        pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
        pipeline.update_components(requires_aesthetics_score=False)
        pipeline.set_progress_bar_config(disable=True)
        source = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(9))
        shared = {"num_inference_steps": 4, "strength": 0.5}
        mine = pipeline(
            **encoded, **shared, image_latents=source, generator=generators(2), output="latents"
        )
        other = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(classic)
        theirs = other(
            **encoded,
            **shared,
            image=source,
            guidance_scale=3.0,
            generator=generators(2),
            output_type="latent",
        ).images
        return float((mine - theirs).abs().max())

    def loaded() -> list[str]:
        pipeline = modular_blocks()["encode"].init_pipeline(str(folder))
        pipeline.load_components()
        return sorted(name for name, part in pipeline.components.items() if part is not None)

    img2img = StableDiffusionXLAutoBlocks().get_workflow("image2image")
    scores = {one.name: one.default for one in img2img.inputs if "aesthetic" in (one.name or "")}
    return {
        "list_of_generators": "used for all cases",
        "negative_zeros": not encoded["negative_prompt_embeds"].any().item(),
        "guidance_scale_0_differs_by": {
            "guider_of_0": attempt(lambda: turbo(encoded, guidance_scale=0.0)),
            "guider_disabled": attempt(lambda: turbo(encoded, guidance_scale=0.0, enabled=False)),
            "guider_of_0_without_negatives": attempt(lambda: turbo(unguided, guidance_scale=0.0)),
            "guider_of_1": attempt(lambda: turbo(unguided, guidance_scale=1.0)),
        },
        "image_latents_differ_by": attempt(image_latents),
        "aesthetic_scores": {"modular": scores, "classic": [6.0, 2.5]},
        "encode_loads_from_a_classic_folder": attempt(loaded),
        "instruct_pix2pix_workflow": any(
            "pix2pix" in name for name in StableDiffusionXLAutoBlocks().available_workflows
        ),
        "denoise_without_vae": without_vae(classic, encoded, case),
        "stable_diffusion_1_and_2": hasattr(diffusers, "StableDiffusionModularPipeline"),
    }


def code_lines(functions: list[Any]) -> int:
    """Lines of code without blank lines and docstrings, as ``ast.unparse`` prints them."""
    trees = [ast.parse(textwrap.dedent(inspect.getsource(one))) for one in functions]
    return sum(len(ast.unparse(tree).splitlines()) for tree in trees)


CLASSIC: dict[str, Stage] = {
    "encode": classic_encode,
    "denoise": classic_denoise,
    "decode": classic_decode,
}
MODULAR: dict[str, Stage] = {
    "encode": modular_encode,
    "denoise": modular_denoise,
    "decode": modular_decode,
}
CASES = [
    {"batch": batch, "guidance": guidance, "size": size, "negative": negative}
    for batch, guidance, size, negative in [
        (1, 3.0, 32, NEGATIVE),
        (2, 3.0, 32, None),
        (4, 3.0, 32, NEGATIVE),
        (4, 3.0, 32, None),
        (4, 1.0, 32, None),
        (4, 3.0, 128, NEGATIVE),
        (4, 1.0, 128, None),
    ]
]


def main(repetitions: int) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # blocks log what they refuse
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cases = []
    with tempfile.TemporaryDirectory() as parent, torch.no_grad():
        folder = BUILDERS["text-to-image", "stable-diffusion-xl"](Path(parent) / "model")
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        classic, modular = classic_pipelines(pipeline), modular_pipelines(pipeline)
        for case in CASES:
            ways = {"classic": (classic, CLASSIC), "modular": (modular, MODULAR)}
            one, other = (run(*way, case) for way in ways.values())
            calls = {name: unet_batches(pipeline.unet, *way, case) for name, way in ways.items()}
            cases.append(
                {
                    **case,
                    "largest_difference": compare(one, other),
                    "unet_batches": calls,
                    "time": timed(classic, modular, case, repetitions),
                }
            )
        found = features(pipeline, modular, folder)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch_threads": 1},
        "versions": {m.__name__: m.__version__ for m in (diffusers, transformers, torch)},
        "steps": STEPS,
        "repetitions": repetitions,
        "components_asked_for": asked_for(),
        "adapter_lines": {
            "classic": code_lines([*CLASSIC.values(), classic_pipelines]),
            "modular": code_lines([*MODULAR.values(), modular_blocks, modular_pipelines]),
        },
        "cases": cases,
        "features": found,
    }
    text = json.dumps(report, indent=1)
    print(text)
    (Path(__file__).parent / "results" / "modular_sdxl.json").write_text(text + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
