"""The one way in which avlprof itself lets a model generate: greedily, whatever its checkpoint asks for."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from avlprof.errors import UserError, is_out_of_memory
from avlprof.models.chat import one_line
from avlprof.models.context import check_context
from avlprof.models.finite import FiniteLogits
from avlprof.models.identity import SAMPLING

KEPT: Final = ("eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens", "begin_suppress_tokens")
"""Fields of a checkpoint's generation config that stay in force: which tokens end an answer, fill a
row up, begin a text, and are never said."""

_SILENT: Final = (
    *(*KEPT, *SAMPLING, "transformers_version", "_from_model_config", "max_length", "max_new_tokens"),
    *("use_cache", "decoder_start_token_id", "early_stopping", "length_penalty", "disable_compile"),
    *("is_assistant", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("return_dict_in_generate", "max_cache_len", "cache_implementation", "cache_config", "compile_config"),
)
"""Fields of which nobody is told that they are set aside: they change no greedy answer."""

_log = logging.getLogger(__name__)
_warned: WeakSet[Any] = WeakSet()


class Greedy(GenerationConfig):
    """A generation config that takes nothing over from the checkpoint's.

    `generate` fills what a config leaves open with the values of `model.generation_config`, and for
    many fields nothing but leaving them open turns them off (`stop_strings`, prompt lookup, chunks).
    """

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As of a `GenerationConfig`, but for the call that brings the checkpoint's values."""
        if defaults_only and allow_custom_entries:
            return {}
        unused: dict[str, Any] = super().update(defaults_only, allow_custom_entries, **kwargs)
        return unused


def greedy_config(model: Any, max_new_tokens: int, min_new_tokens: int | None = None) -> GenerationConfig:
    """The generation config of a greedy answer: the checkpoint's special tokens and nothing else of it."""
    return Greedy(
        **{name: _special(model, name) for name in KEPT},
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        use_cache=True,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        return_dict_in_generate=False,
        output_attentions=False,
        output_hidden_states=False,
        output_scores=False,
        output_logits=False,
    )


def _special(model: Any, name: str) -> int | list[int] | None:
    """A token id or several of the checkpoint's generation config; refused where they are none."""
    value = getattr(model.generation_config, name, None)
    ids = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        return value
    if value == -1:
        return None  # as older checkpoints write none
    raise UserError(
        f"{name} in the checkpoint's generation_config.json must be a token id or a list of them, "
        f"got {_short(value)}"
    )


@contextlib.contextmanager
def running(model: Any) -> Iterator[None]:
    """One sentence where a model's own code fails on a prompt: its files do not fit each other.

    Errors of this package, and of what it calls directly, pass through as they are.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or not _raised_by_the_model(error):
            raise
        raise UserError(
            f"{type(model).__name__} fails on this prompt ({type(error).__name__}: {one_line(error)}); check "
            "that its config, its weights and its processor's files (processor_config.json) fit each other"
        ) from error


def _raised_by_the_model(error: BaseException) -> bool:
    """Whether the last function on the way to an error, those of torch aside, is transformers'."""
    if isinstance(error, UserError):
        return False
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    owners = [package for package in packages if package != "torch"]
    return owners[-1] in ("transformers", "transformers_modules")


def greedy(
    model: Any,
    encoding: Mapping[str, Tensor],
    samples: Sequence[str] = (),
    *,
    max_new_tokens: int,
    min_new_tokens: int | None = None,
    processors: Sequence[LogitsProcessor] = (),
    **more: Any,
) -> Tensor:
    """Ids `[B, N + T]` of prompts and greedy answers, with one sequence a row and a cache.

    Every `generate` of this package goes through here. Beams, sampling, penalties, stop strings,
    assistants, chunked prompts and whatever else the checkpoint's generation config asks for is set
    aside; what would have changed a greedy answer is said once a model.

    Args:
        encoding: a left-padded batch, as `Adapter.encode_chats` makes it.
        samples: ids of its rows, for the sentence about numbers that are not finite.
        processors: see the logits of each step in turn, and may change them.
        more: a cache, a streamer, stopping criteria.

    Raises:
        UserError: logits are not finite, a prompt is longer than the model's context, or it has other
            places for pictures than the model has features.
    """
    check_context(model, encoding, samples, max_new_tokens)
    _say_set_aside(model)
    finite = FiniteLogits()
    with running(model):
        ids: Tensor = model.generate(
            **encoding,
            generation_config=greedy_config(model, max_new_tokens, min_new_tokens),
            logits_processor=LogitsProcessorList([finite, *processors]),
            **more,
        )
    finite.check(model, encoding, samples)
    return ids


def first_position(model: Any) -> int:
    """The position that `generate` gives the first token of a prompt: 1 for PaliGemma, 0 for the others.

    For models whose positions are one number a token.
    """
    one = torch.zeros(1, 1, dtype=torch.long)
    prepared = model.prepare_inputs_for_generation(
        one, position_ids=one, attention_mask=torch.ones_like(one), use_cache=False
    )
    positions = prepared.get("position_ids")
    return 0 if positions is None else int(positions.flatten()[0])


def set_aside(model: Any) -> dict[str, Any]:
    """What the checkpoint's generation config asks for beyond plain greedy answers, by field."""
    theirs = getattr(model, "generation_config", None)
    values = theirs.to_dict() if isinstance(theirs, GenerationConfig) else {}
    plain = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    return {
        name: value
        for name, value in values.items()
        if name not in _SILENT and value is not None and value != plain.get(name)
    }


def _say_set_aside(model: Any) -> None:
    if model in _warned:
        return
    _warned.add(model)
    values = set_aside(model)
    if values:
        asked = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
        _log.warning(
            "the checkpoint's generation config asks for %s, which is set aside: answers are greedy",
            asked,
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
