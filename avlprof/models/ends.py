"""Where an answer ends."""

from __future__ import annotations

from typing import Any


def end_tokens(model: Any) -> tuple[int, ...]:
    """Ids that end an answer, from the model's generation config."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return ()
    return tuple(int(end) for end in ends) if isinstance(ends, list | tuple) else (int(ends),)


def answer_length(ids: list[int], ends: tuple[int, ...]) -> int:
    """Tokens up to and including the first end token; all of them when there is none."""
    return next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
