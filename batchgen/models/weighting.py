"""Words of prompts with weights, as compel reads them: ``(red)1.5 star``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from batchgen.errors import ModelError
from batchgen.families import Family, stable_diffusion, stable_diffusion_xl
from batchgen.families.adapter import Adapter
from batchgen.spec.model import Model

if TYPE_CHECKING:
    import torch

FIELD = "model.prompt_weighting"
PROMPTS_PARSED = 4096


def check_weighting(model: Model, family: Family) -> None:
    """That the family's prompts can be weighted, and compel is there. Imports nothing.

    Raises:
        ModelError: they cannot, or it is not.
    """
    if model.prompt_weighting is None:
        return
    if family.adapter.encode_prompt not in _ENCODERS:
        raise ModelError(
            f"{FIELD}: a {family.name} model for {family.task} takes none; allowed for models whose"
            " prompts are encoded as those of stable-diffusion and stable-diffusion-xl"
        )
    if find_spec("compel") is None:
        raise ModelError(f"{FIELD}: the package compel is missing; pip install compel")


def check_prompt(prompt: str) -> None:
    """That compel can make embeddings of one fixed shape of a prompt, and of all that is in it.

    Raises:
        ValueError: says what is not allowed.
    """
    try:
        parsed = _parsed(prompt)
    except Exception as error:
        raise ValueError(f"a prompt that compel can read; it says: {error}") from error
    if len(parsed.prompts) != 1:
        raise ValueError("a prompt of one part, without .and(): all embeddings are of one length")
    if parsed.prompts[0].wants_cross_attention_control:
        raise ValueError("a prompt without .swap(), which embeddings alone cannot express")
    if parsed.lora_weights:
        raise ValueError("a prompt without withLora(), since the column lora names a row's LoRAs")
    for fragment in (each for one in _alternatives(parsed) for each in one.children):
        if fragment.weight < 1 and not fragment.text.strip():  # on which compel fails
            raise ValueError("a prompt in which every weight has words")


def weighted(adapter: Adapter, model: Model) -> Adapter:
    """The adapter with prompts encoded by compel, where the model's section says so."""
    if model.prompt_weighting is None or adapter.encode_prompt is None:
        return adapter
    encode = partial(_ENCODERS[adapter.encode_prompt], learned=bool(model.textual_inversions))
    return replace(adapter, encode_prompt=encode, words=_words)


def _encode(
    pipeline: Any, prompt: str, negative: bool, *, learned: bool
) -> dict[str, torch.Tensor]:
    """``prompt_embeds`` (1, T, D), as of ``stable_diffusion.encode_prompt``."""
    import compel

    normalized = compel.ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
    return {"prompt_embeds": _reader(pipeline, "", normalized, learned)(prompt)}


def _encode_xl(
    pipeline: Any, prompt: str, negative: bool, *, learned: bool
) -> dict[str, torch.Tensor]:
    """``prompt_embeds`` (1, T, D) and ``pooled_prompt_embeds`` (1, P), likewise of XL.

    The pooled embedding is of the prompt as it is written: compel does not weight it.
    """
    import compel
    import torch

    raw = compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    each = []
    if pipeline.text_encoder is not None:
        each.append(_reader(pipeline, "", raw, learned)(prompt))
    last, pooled = _reader(pipeline, "_2", raw, learned, requires_pooled=True)(prompt)
    embeds = torch.cat([*each, last], dim=-1)
    if negative and not prompt and pipeline.config.force_zeros_for_empty_prompt:
        embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


_ENCODERS: dict[Callable[..., Any] | None, Callable[..., dict[str, torch.Tensor]]] = {
    stable_diffusion.encode_prompt: _encode,
    stable_diffusion_xl.encode_prompt: _encode_xl,
}


def _reader(pipeline: Any, end: str, kind: Any, learned: bool, **options: Any) -> Any:
    """Compel of one of the pipeline's text encoders.

    Made anew for every prompt: it remembers the embeddings of the empty prompt, which change with
    the LoRAs of a row.
    """
    import compel

    tokenizer = getattr(pipeline, f"tokenizer{end}")
    tokens = None
    if learned:  # those of several vectors stand for several tokens
        known = SimpleNamespace(
            tokenizer=tokenizer, maybe_convert_prompt=pipeline.maybe_convert_prompt
        )
        tokens = compel.DiffusersTextualInversionManager(known)
    reader = compel.Compel(
        tokenizer,
        getattr(pipeline, f"text_encoder{end}"),
        textual_inversion_manager=tokens,
        returned_embeddings_type=kind,
        truncate_long_prompts=True,
        **options,
    )
    reader.parse_prompt_string = _parsed  # its own builds a new parser for each prompt
    return reader


def _words(prompt: str) -> str:
    """What the tokenizers are given of a prompt; of a blend, the longest."""
    texts = (
        " ".join(fragment.text for fragment in one.children)
        for one in _alternatives(_parsed(prompt))
    )
    return max(texts, key=len)


def _alternatives(parsed: Any) -> Sequence[Any]:
    """The prompts of a blend; of any other the prompt itself."""
    (one,) = parsed.prompts
    found: Sequence[Any] = getattr(one, "prompts", [one])
    return found


@lru_cache(PROMPTS_PARSED)
def _parsed(prompt: str) -> Any:
    """A prompt as compel reads it; not to be changed."""
    return _parser().parse_conjunction(prompt)


@cache
def _parser() -> Any:
    """Compel's parser, with its library's memory switched on.

    Without it nested parentheses take a time that grows tenfold with each: six of them minutes.
    """
    import pyparsing

    pyparsing.ParserElement.enable_packrat()
    import compel

    return compel.PromptParser()
