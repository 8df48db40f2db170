"""Converts stage results to safetensors bytes and back, for the pools of the staged layout."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load, save

from batchgen.records import EncodedBatch, LatentBatch, call_from_json


def encoded_to_bytes(batches: list[EncodedBatch]) -> bytes:
    """A shard's encoded batches as one safetensors file.

    Values are exact to the bit for every dtype. The memory order of the dimensions is kept too,
    because convolutions round differently for another order.
    """
    tensors: dict[str, torch.Tensor] = {}
    facts = []
    for number, batch in enumerate(batches):
        tensors[f"{number}.generator_states"] = batch.generator_states
        for group in ("prompts", "conditions"):
            for name, tensor in getattr(batch, group).items():
                tensors[f"{number}.{group}.{name}"] = tensor
        facts.append(
            {
                "call": asdict(batch.call),
                "prompt_index": batch.prompt_index,
                "negative_index": batch.negative_index,
                "labels": batch.labels,
                "truncated": batch.truncated,
            }
        )
    return _to_bytes("encoded", facts, tensors)


def encoded_from_bytes(data: bytes) -> list[EncodedBatch]:
    """The batches that ``encoded_to_bytes`` was given, on the CPU.

    Raises:
        ValueError: the bytes hold something else.
    """
    facts, tensors = _from_bytes("encoded", data)
    return [
        EncodedBatch(
            call=call_from_json(fact["call"]),
            prompts=_group(tensors, f"{number}.prompts."),
            prompt_index=tuple(fact["prompt_index"]),
            negative_index=_optional_tuple(fact["negative_index"]),
            conditions=_group(tensors, f"{number}.conditions."),
            labels=tuple(fact["labels"]),
            generator_states=tensors[f"{number}.generator_states"],
            truncated=tuple(fact["truncated"]),
        )
        for number, fact in enumerate(facts)
    ]


def _group(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def latents_to_bytes(batches: list[LatentBatch]) -> bytes:
    """A shard's latents as one safetensors file, as exact as ``encoded_to_bytes``."""
    tensors = {f"{number}.latents": batch.latents for number, batch in enumerate(batches)}
    facts = [{"call": asdict(batch.call), "truncated": batch.truncated} for batch in batches]
    return _to_bytes("latents", facts, tensors)


def latents_from_bytes(data: bytes) -> list[LatentBatch]:
    """The batches that ``latents_to_bytes`` was given, on the CPU.

    Raises:
        ValueError: the bytes hold something else.
    """
    facts, tensors = _from_bytes("latents", data)
    return [
        LatentBatch(
            call_from_json(fact["call"]), tensors[f"{number}.latents"], tuple(fact["truncated"])
        )
        for number, fact in enumerate(facts)
    ]


def _to_bytes(kind: str, facts: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> bytes:
    orders = {name: _memory_order(tensor) for name, tensor in tensors.items()}
    header = json.dumps({"kind": kind, "facts": facts, "orders": orders})
    plain = {
        # cloned because safetensors refuses tensors that share memory
        name: tensor.detach()
        .cpu()
        .permute(orders[name])
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(plain, {"batchgen": header})


def _from_bytes(kind: str, data: bytes) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The facts and tensors of a payload. The header is read here, since ``load`` hides it."""
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8:end])["__metadata__"]["batchgen"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("the bytes are not a batchgen payload: no such header") from error
    if header["kind"] != kind:
        raise ValueError(f"expected a payload of kind {kind}, got kind {header['kind']}")
    tensors = {
        name: tensor.permute(_inverse(header["orders"][name]))
        for name, tensor in load(data).items()
    }
    return header["facts"], tensors


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions ordered from largest to smallest stride; (0, 2, 3, 1) is channels-last."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda dimension: -strides[dimension])


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _optional_tuple(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
