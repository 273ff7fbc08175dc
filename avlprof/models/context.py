"""How many positions a model was made for, and prompts that have more."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor

from avlprof.attention.modality import vision_token_ids
from avlprof.errors import UserError

_log = logging.getLogger(__name__)
_warned: WeakSet[Any] = WeakSet()


def context_length(config: Any) -> int | None:
    """Positions that the language model of a config was made for; None where it does not say.

    Where rotary positions are stretched, what they are stretched to.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    scaling = _scaling(text)
    factor = scaling.get("factor")
    if scaling.get("rope_type", scaling.get("type")) == "llama3" or not isinstance(factor, int | float):
        return stated
    original = scaling.get("original_max_position_embeddings") or stated
    return max(stated, int(original * factor))


def _scaling(text: Any) -> Mapping[str, Any]:
    """How rotary positions are stretched; the first that says so where kinds of layers differ."""
    values = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(values, Mapping):
        return {}
    nested = [part for part in values.values() if isinstance(part, Mapping)]
    return next((part for part in nested if part.get("factor")), {}) if nested else values


def _shares_positions(text: Any) -> bool:
    """Whether the vision tokens of a picture share positions (mrope), so that tokens overstate them."""
    return "mrope_section" in _scaling(text)


def check_context(model: Any, encoding: Mapping[str, Tensor], samples: Sequence[str], new: int) -> None:
    """Refuse prompts beyond the model's positions; say once if answers could run beyond them.

    Args:
        encoding: a batch, as `Adapter.encode_chats` makes it.
        samples: ids of its rows, as far as they are known.
        new: most tokens of an answer.

    Raises:
        UserError: a prompt has more tokens than the model has positions.
    """
    most = context_length(model.config)
    if most is None:
        return
    ids = encoding["input_ids"]
    mask = encoding.get("attention_mask")
    real = mask.bool() if mask is not None else ids == ids
    if _shares_positions(model.config.get_text_config(decoder=True)):
        for token in vision_token_ids(model.config):
            real = real & (ids != token)
    lengths = real.sum(dim=1).tolist()
    longest = max(lengths)
    row = lengths.index(longest)
    sample = f"sample '{samples[row]}'" if row < len(samples) else "a prompt"
    if longest > most:
        raise UserError(
            f"{sample} has {longest:,} tokens, the model has {most:,} positions (max_position_embeddings); "
            "shorten the prompt, or give fewer or smaller pictures"
        )
    if longest + new - 1 > most and model not in _warned:
        _warned.add(model)
        _log.warning(
            "%s has %s tokens, and with %s new ones more than the model's %s positions "
            "(max_position_embeddings); what is answered behind them is noise",
            sample,
            f"{longest:,}",
            f"{new:,}",
            f"{most:,}",
        )
