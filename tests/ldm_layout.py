"""Writes a Stable Diffusion folder's weights to one file, with the original code's names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
Renaming = Iterable[tuple[str, str]]

UNET = (
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
)
UNET_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
VAE = (
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
)
VAE_ATTENTION = (
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
OPEN_CLIP = (
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    (".self_attn.", ".attn."),
)


def single_file(folder: Path, file: Path, text: str = "clip") -> Path:
    """Write the file; ``text`` is what the first text encoder was: ``clip`` or ``open_clip``."""
    both = (folder / "text_encoder_2").is_dir()
    first = "conditioner.embedders.0." if both else "cond_stage_model."
    weights = _unet(folder) | _vae(folder)
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    if text == "clip":
        whole = f"{first}transformer.text_model."
        weights |= {
            f"{whole}{key.removeprefix('text_model.')}": one for key, one in encoder.items()
        }
    else:
        weights |= {f"{first}model.{key}": one for key, one in _open_clip(encoder).items()}
    if both:
        second = _open_clip(load_file(folder / "text_encoder_2" / "model.safetensors"))
        weights |= {f"conditioner.embedders.1.model.{key}": one for key, one in second.items()}
    save_file({key: one.contiguous() for key, one in weights.items()}, file)
    return file


def _renamed(key: str, names: Renaming) -> str:
    for new, old in names:
        key = key.replace(new, old)
    return key


def _unet(folder: Path) -> State:
    config = json.loads((folder / "unet" / "config.json").read_text())
    a_block = config["layers_per_block"] + 1
    down = re.compile(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.")
    up = re.compile(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.")
    attends = ["CrossAttn" in kind for kind in config["up_block_types"]]

    def place(found: re.Match[str]) -> str:
        block, kind, layer = int(found[1]), found[2], int(found[3])
        if kind == "downsamplers":
            return f"input_blocks.{block * a_block + a_block}.0."
        if kind == "upsamplers":
            return f"output_blocks.{block * a_block + a_block - 1}.{1 + attends[block]}."
        inner = int(kind == "attentions")
        if found.re is up:
            return f"output_blocks.{block * a_block + layer}.{inner}."
        return f"input_blocks.{block * a_block + layer + 1}.{inner}."

    named = {}
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for key, one in weights.items():
        old = _renamed(key, UNET_RESNET) if "resnets" in key else key
        old = up.sub(place, down.sub(place, old))
        if "downsamplers" in key:
            old = old.replace("conv.", "op.")
        elif old == key or "mid_block" in key:
            old = _renamed(old, UNET)
        named[f"model.diffusion_model.{old}"] = one
    return named


def _vae(folder: Path) -> State:
    config = json.loads((folder / "vae" / "config.json").read_text())
    last = len(config["up_block_types"]) - 1
    named = {}
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    for key, one in weights.items():
        old = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        old = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", old)
        for block in range(last + 1):
            old = old.replace(f"up_blocks.{block}.resnets", f"up.{last - block}.block")
            old = old.replace(f"up_blocks.{block}.upsamplers.0", f"up.{last - block}.upsample")
        old = _renamed(old, VAE)
        if "attentions" in key:
            old = _renamed(old, VAE_ATTENTION)
            one = one[:, :, None, None] if one.ndim == 2 else one
        named[f"first_stage_model.{old}"] = one
    return named


def _open_clip(encoder: State) -> State:
    named: State = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for key, one in encoder.items():
        if key == "text_projection.weight":
            named["text_projection"] = one.T
            continue
        old = _renamed(key.removeprefix("text_model."), OPEN_CLIP)
        if found := re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", old):
            joined.setdefault(f"{found[1]}in_proj_{found[3]}", {})[found[2]] = one
        else:
            named[old] = one
    return named | {
        key: torch.cat([each[which] for which in "qkv"]) for key, each in joined.items()
    }
