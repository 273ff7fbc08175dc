"""Trace one batch of samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from avlprof.attention.modality import prompt_shapes
from avlprof.attention.session import switched
from avlprof.models import LoadedModel
from avlprof.models.references import reference_tokens
from avlprof.models.tiles import dump_tiles
from avlprof.runs.directory import Scores
from avlprof.tasks import Sample
from avlprof.tracing.answers import AnswerEnds, GivenAnswers
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.rows import BatchRecorder


class Traced(NamedTuple):
    """What a run directory stores of one sample; see `avlprof.runs.RunDirectory`."""

    sample: dict[str, Any]
    stats: list[dict[str, Any]]
    scores: Scores


def encode(loaded: LoadedModel, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The left-padded batch of some samples, as `loaded.model.generate(**batch)` takes it.

    Raises:
        UserError: a picture cannot be read, or the processor refuses the prompts.
    """
    return loaded.adapter.encode_samples(samples)


def trace_batch(
    loaded: LoadedModel, samples: Sequence[Sample], limit: int, options: RecordOptions, forced: bool = False
) -> list[Traced]:
    """Let the model answer some samples together and record each as if it ran alone.

    Args:
        limit: most tokens of an answer; 0 leaves reference answers whole.
        forced: feed each sample's reference answer in place of what the model would say.
    """
    started = time.monotonic()
    chats = [sample.messages() for sample in samples]
    encoding = loaded.adapter.encode_chats(chats)
    prompt = encoding["input_ids"].shape[1]
    recorder = BatchRecorder(len(samples), loaded.adapter.layers, options)
    given = _references(loaded, samples, encoding["input_ids"], limit) if forced else None
    lengths = None if given is None else [len(answer) for answer in given]
    ends = AnswerEnds(loaded.model, recorder, len(samples), lengths)
    chosen = LogitsProcessorList([] if given is None else [GivenAnswers(given, prompt)])
    with switched(loaded.model, observers=(recorder,)), torch.inference_mode():
        ids = loaded.model.generate(
            **encoding,
            max_new_tokens=max(lengths) if lengths else limit,
            do_sample=False,
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([ends]),
            logits_processor=chosen,
        )
        records = recorder.records()
    answers = [ids[row, prompt : prompt + length] for row, length in enumerate(ends.lengths)]
    texts = loaded.adapter.decode(answers)
    tables = [(record, record.frame(), record.scores()) for record in records]
    seconds = (time.monotonic() - started) / len(samples)
    layouts = loaded.adapter.vision_layout(encoding, chats)
    found = []
    for sample, answer, text, tiles, (record, stats, scores) in zip(
        samples, answers, texts, layouts, tables, strict=True
    ):
        shape = prompt_shapes(record.modality[None])[0]
        row = {
            "sample": sample.id,
            "group": sample.group,
            "prompt": sample.prompt,
            "references": list(sample.answers),
            "answer": text,
            "tokens": loaded.processor.tokenizer.convert_ids_to_tokens(answer.tolist()),
            "system": shape.system,
            "vision": shape.vision,
            "text": shape.text,
            "generated": len(answer),
            "tiles": dump_tiles(tiles),
            "seconds": seconds,
        }
        found.append(Traced(row, [{"sample": sample.id, **line} for line in stats], scores))
    return found


def _references(loaded: LoadedModel, samples: Sequence[Sample], ids: Tensor, limit: int) -> list[list[int]]:
    """Tokens of the reference answers, cut at the limit; `ids [rows, tokens]` of the prompts."""
    lasts = ids[:, -1].tolist()
    tokens = [reference_tokens(loaded, sample, last) for sample, last in zip(samples, lasts, strict=True)]
    return [answer[:limit] if limit else answer for answer in tokens]
