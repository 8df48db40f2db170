"""Prompt weighting with compel: ``(red)1.5 star`` gives words a weight."""

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
    """Check that the family supports prompt weighting, and compel is installed. Imports nothing.

    Raises:
        ModelError: one of the two is not so.
    """
    if model.prompt_weighting is None:
        return
    if family.adapter.encode_prompt not in _ENCODERS:
        raise ModelError(
            f"{FIELD}: a {family.name} model for {family.task} does not support prompt weighting;"
            " allowed for models that encode prompts as stable-diffusion or stable-diffusion-xl do"
        )
    if find_spec("compel") is None:
        raise ModelError(f"{FIELD}: the package compel is not installed; run `pip install compel`")


def check_prompt(prompt: str) -> None:
    """Check that compel can turn a prompt into embeddings of one fixed shape.

    Raises:
        ValueError: says what is allowed.
    """
    try:
        parsed = _parsed(prompt)
    except Exception as error:
        raise ValueError(f"a prompt that compel can read; it says: {error}") from error
    if len(parsed.prompts) != 1:
        raise ValueError("a prompt without .and(), since all embeddings must have one length")
    if parsed.prompts[0].wants_cross_attention_control:
        raise ValueError("a prompt without .swap(), which needs more than text embeddings")
    if parsed.lora_weights:
        raise ValueError("a prompt without withLora(); use the column lora instead")
    for fragment in (each for one in _alternatives(parsed) for each in one.children):
        if fragment.weight < 1 and not fragment.text.strip():  # compel fails on these
            raise ValueError("a prompt in which every weight has words")


def weighted(adapter: Adapter, model: Model) -> Adapter:
    """Return the adapter, with prompts encoded by compel if ``model.prompt_weighting`` is set."""
    if model.prompt_weighting is None or adapter.encode_prompt is None:
        return adapter
    encode = partial(_ENCODERS[adapter.encode_prompt], learned=bool(model.textual_inversions))
    return replace(adapter, encode_prompt=encode, prompt_settings=(), words=_words)


def settings_of(family: Family, model: Model) -> tuple[str, ...]:
    """List the family's settings; compel encodes prompts without those of the text encoder."""
    if model.prompt_weighting is None:
        return family.settings
    return tuple(name for name in family.settings if name not in family.adapter.prompt_settings)


def _encode(
    pipeline: Any, prompt: str, negative: bool, *, learned: bool
) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` (1, T, D), like ``stable_diffusion.encode_prompt``."""
    import compel

    normalized = compel.ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
    return {"prompt_embeds": _reader(pipeline, "", normalized, learned)(prompt)}


def _encode_xl(
    pipeline: Any, prompt: str, negative: bool, *, learned: bool
) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` (1, T, D) and ``pooled_prompt_embeds`` (1, P), for XL.

    The pooled embedding is that of the prompt without weights: compel does not weight it.
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
    """Make compel's reader for one of the pipeline's text encoders.

    Each prompt gets a new one: a reader caches the embeddings of the empty prompt, which change
    with the LoRAs of a row.
    """
    import compel

    tokenizer = getattr(pipeline, f"tokenizer{end}")
    tokens = None
    if learned:  # a textual inversion of several vectors becomes several tokens
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
    """Return the words of a prompt that the tokenizers get; for a blend, the longest text."""
    texts = (
        " ".join(fragment.text for fragment in one.children)
        for one in _alternatives(_parsed(prompt))
    )
    return max(texts, key=len)


def _alternatives(parsed: Any) -> Sequence[Any]:
    """Return the prompts of a blend, or the one prompt."""
    (one,) = parsed.prompts
    found: Sequence[Any] = getattr(one, "prompts", [one])
    return found


@lru_cache(PROMPTS_PARSED)
def _parsed(prompt: str) -> Any:
    """Parse a prompt with compel. The result is cached: callers must not change it."""
    return _parser().parse_conjunction(prompt)


@cache
def _parser() -> Any:
    """Make compel's parser, with memoization (packrat) switched on.

    Without it each level of nested parentheses makes parsing ten times slower: six take minutes.
    """
    import pyparsing

    pyparsing.ParserElement.enable_packrat()
    import compel

    return compel.PromptParser()
