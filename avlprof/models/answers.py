"""Where an answer ends, and reference answers as a model would write them behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avlprof.errors import UserError
from avlprof.models.load import LoadedModel
from avlprof.tasks import Sample


def end_tokens(model: Any) -> tuple[int, ...]:
    """Ids that end an answer, from the model's generation config."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return ()
    return tuple(int(end) for end in ends) if isinstance(ends, list | tuple) else (int(ends),)


def answer_length(ids: list[int], ends: tuple[int, ...]) -> int:
    """Tokens up to and including the first end token; all of them when there is none."""
    return next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))


CONTROL = (">", "]")  # what the tokens of chat templates end with


def reference(sample: Sample) -> str:
    """The first reference answer of a sample; `UserError` when it has none."""
    if not sample.answers or not sample.answers[0].strip():
        raise UserError(
            f"sample '{sample.id}' has no reference answer; give it one, or use what the model answers itself"
        )
    return sample.answers[0]


def reference_tokens(loaded: LoadedModel, sample: Sample, last: int) -> list[int]:
    """Tokens of a sample's reference answer as they follow the prompt, with the end token.

    A word behind `ASSISTANT:` begins with a space, one behind a line break or a control token
    does not. Tokenizers write the beginning of a text in ways of their own, so the answer is
    read off behind the prompt's `last` token.
    """
    tokenizer = loaded.processor.tokenizer
    before = str(tokenizer.decode([last]))
    gap = "" if not before or before[-1].isspace() or before.endswith(CONTROL) else " "
    context = tokenizer(before, add_special_tokens=False)["input_ids"]
    whole = tokenizer(before + gap + reference(sample).strip(), add_special_tokens=False)["input_ids"]
    shared = next(
        (index for index, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context)
    )
    return [*whole[shared:], *_end(loaded)]


def longest_reference(loaded: LoadedModel, samples: Sequence[Sample]) -> int:
    """Tokens of the longest reference answer of some samples, near enough to price a run.

    Raises:
        UserError: a sample has none.
    """
    texts = [f" {reference(sample)}" for sample in samples]
    rows = loaded.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return 1 + max(len(row) for row in rows)


def _end(loaded: LoadedModel) -> list[int]:
    """The token that ends an answer, in a list that is empty when the model has none."""
    known = end_tokens(loaded.model)
    own = loaded.processor.tokenizer.eos_token_id
    return [own] if own is not None and (own in known or not known) else list(known[:1])
