"""Keeps the weights of a stage in host memory, and copies them to its device as they are needed.

diffusers' group offloading does it: before a part of a model runs, a hook copies the part's weights
to the device; afterwards the copy is dropped. On CUDA the part that runs next is copied from pinned
memory on a stream of its own, while the device works on the present one. The device computes the
same operations on the same weights, so the results are the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from batchgen.errors import ModelError

FIELD = "resources.offload"
BLOCKWISE = ("transformer",)  # components of equal blocks, which fill most of the model


@dataclass(frozen=True)
class Part:
    """A model, or one half of a VAE, that is copied to the device in groups.

    Attributes:
        name: of the component.
        module: the torch module.
        by_block: a group is a block (an element of a module list of ``module``), and all that is in
            no block is one more group. Otherwise a group is a layer.
        ahead: the next group is copied while the device works on one. This needs the order in which
            groups run, which diffusers learns from calls of ``module``, and weights that are never
            converted. A VAE has neither: its methods call the layers of its halves, and a float16
            one may be converted to float32 for a call.
    """

    name: str
    module: Any
    by_block: bool = False
    ahead: bool = False

    def groups(self) -> tuple[list[Any], list[list[Any]]]:
        """The tensors that are on the device during a complete call; those of each group."""
        import torch

        if not self.by_block:
            layers, during = [], []
            for one in self.module.modules():
                own = [*one.parameters(recurse=False), *one.buffers(recurse=False)]
                if next(one.children(), None) is not None:
                    during += own  # while its layers run
                elif own:
                    layers.append(own)
            return during, layers
        lists = (torch.nn.ModuleList, torch.nn.Sequential)
        several = [one for one in self.module.children() if isinstance(one, lists)]
        blocks = [tensors_of(block) for one in several for block in one]
        known = {id(one) for block in blocks for one in block}
        rest = [one for one in tensors_of(self.module) if id(one) not in known]
        # diffusers has these buffers twice: as those of a module, and as those of no block.
        twice = [one.data for one in rest if not isinstance(one, torch.nn.Parameter)]
        return [*rest, *twice], blocks

    def window_bytes(self) -> int:
        """The most bytes of the weights that are on the device at a time."""
        during, groups = self.groups()
        together = [[*one, *following] for one, following in pairwise(groups)] if self.ahead else []
        return bytes_of(during) + max(map(bytes_of, [*groups, *together]), default=0)

    def host_bytes(self) -> int:
        """Bytes of host memory. torch rounds blocks of pinned memory up to powers of two."""
        sizes = [one.nbytes for one in each_once(tensors_of(self.module))]
        return sum(map(_rounded, sizes) if self.ahead else sizes)


def parts_of(pipelines: Iterable[Any], vae: str) -> Iterator[Part]:
    """Yield what is offloaded of a stage's pipelines.

    The rest stays on the device: the few weights of a VAE outside its halves, and modules that have
    no ``forward`` for a hook to be around.

    Args:
        pipelines: those of one stage.
        vae: name of the component that is the autoencoder.
    """
    import torch

    for pipeline in pipelines:
        for name, module in vars(pipeline).items():
            if not isinstance(module, torch.nn.Module):
                continue
            if name == vae:
                halves = (getattr(module, half, None) for half in ("encoder", "decoder"))
                yield from (Part(name, half) for half in halves if half is not None)
            elif type(module).forward is not torch.nn.Module.forward:
                able = getattr(module, "_supports_group_offloading", False)
                yield Part(name, module, by_block=name in BLOCKWISE and able, ahead=True)


def offload(pipelines: Sequence[Any], vae: str, device: str, streams: bool = True) -> None:
    """Keep the models of a stage in host memory, except while they run.

    Afterwards ``families.calls.device_of`` tells the device that a pipeline's models run on.

    Args:
        pipelines: those of one stage, on the CPU.
        vae: name of the component that is the autoencoder.
        device: the torch device on which they run.
        streams: copy groups ahead. A CPU, on which tests run models, has no streams.

    Raises:
        ModelError: a model reads its weights in a way that hooks cannot see.
    """
    import torch
    from diffusers.hooks import apply_group_offloading

    parts = list(parts_of(pipelines, vae))
    for part in parts:
        _check(part)
        apply_group_offloading(
            part.module,
            onload_device=torch.device(device),
            offload_type="block_level" if part.by_block else "leaf_level",
            num_blocks_per_group=1,
            use_stream=part.ahead and streams,
        )
    moved = {id(one) for part in parts for one in part.module.modules()}
    held = [one for pipeline in pipelines for one in vars(pipeline).values()]
    modules = [one for one in held if isinstance(one, torch.nn.Module)]
    rest: list[Any] = [
        one for module in modules for one in module.modules() if id(one) not in moved
    ]
    for one in rest:
        one._apply(lambda tensor: tensor.to(device), recurse=False)


def tensors_of(module: Any) -> list[Any]:
    """The parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def each_once(tensors: Iterable[Any]) -> list[Any]:
    """Leave out repetitions: layers may share a weight."""
    return list({id(one): one for one in tensors}.values())


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(one.nbytes for one in each_once(tensors))


def _check(part: Part) -> None:
    if getattr(part.module, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{FIELD}: {part.name} is quantized, and quantized weights cannot be offloaded; leave "
            "its stage out of the list, or load it without quantization"
        )
    for one in part.module.modules():
        if len(getattr(one, "lora_magnitude_vector", ())):
            raise ModelError(
                f"{FIELD}: a LoRA of {part.name} is of the kind DoRA, which reads weights outside "
                "of their layers; leave its stage out of the list, or use a plain LoRA"
            )


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0
