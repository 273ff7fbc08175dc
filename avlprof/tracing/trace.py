"""Trace samples into a run directory, batch by batch; a killed run resumes by sample id."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from avlprof.attention.modality import Modality, prompt_shapes
from avlprof.attention.session import switched
from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.models.answers import reference, reference_tokens
from avlprof.models.generation import greedy
from avlprof.models.tiles import dump_tiles
from avlprof.runs import RunDirectory, RunWriter, Shard
from avlprof.runs.directory import Scores
from avlprof.tasks import Sample, Task
from avlprof.tracing.options import RecordOptions, TraceSettings, run_meta
from avlprof.tracing.recorder import Recorder
from avlprof.watch import SILENT, Watch


class AnswerEnds(StoppingCriteria):
    """Closes the record of a row with its end token, before that token is fed.

    Stops nothing by itself. `lengths` counts the tokens of each row's answer, the end token
    included; `most` bounds them row by row.
    """

    def __init__(self, model: Any, recorder: Recorder, rows: int, most: Sequence[int] | None) -> None:
        ends = model.generation_config.eos_token_id
        self._is_end = EosTokenCriteria(ends) if ends is not None else None
        self._recorder, self._most = recorder, most
        self._live = [True] * rows
        self.lengths = [0] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`input_ids [rows, tokens]` with the token just chosen; returns False for every row."""
        goes_on = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ended = goes_on if self._is_end is None else self._is_end(input_ids, scores)
        for row, end in enumerate(ended.tolist()):
            if self._live[row]:
                self.lengths[row] += 1
                self._live[row] = not end and (self._most is None or self.lengths[row] < self._most[row])
        self._recorder.stop(row for row, live in enumerate(self._live) if not live)
        return goes_on


class FixedAnswers(LogitsProcessor):
    """Makes greedy decoding choose the tokens of known answers, row by row.

    `prompt` is the length of the (padded) prompts; a row whose answer is over gets its last
    token again.
    """

    def __init__(self, answers: Sequence[Sequence[int]], prompt: int) -> None:
        self._answers, self._prompt = answers, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [rows, vocabulary]` with all but one token of each row ruled out."""
        step = input_ids.shape[1] - self._prompt
        tokens = [answer[min(step, len(answer) - 1)] for answer in self._answers]
        index = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter_(1, index, 0.0)


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
    recorder = Recorder(loaded.adapter.layers, options)
    references = _references(loaded, samples, encoding["input_ids"], limit) if forced else None
    lengths = None if references is None else [len(answer) for answer in references]
    ends = AnswerEnds(loaded.model, recorder, len(samples), lengths)
    chosen = [] if references is None else [FixedAnswers(references, prompt)]
    with switched(loaded.model, observers=(recorder,)), torch.inference_mode():
        ids = greedy(
            loaded.model,
            encoding,
            [sample.id for sample in samples],
            max_new_tokens=max(lengths) if lengths else limit,
            stopping_criteria=StoppingCriteriaList([ends]),
            processors=chosen,
        )
        recorder.settle()
    whole = ids.tolist()
    answers = [whole[row][prompt : prompt + length] for row, length in enumerate(ends.lengths)]
    texts = loaded.adapter.decode(answers)
    for sample, record in zip(samples, recorder.records, strict=True):
        record.check_finite(f"sample '{sample.id}'")
    tables = [(record, record.frame(), record.scores()) for record in recorder.records]
    seconds = (time.monotonic() - started) / len(samples)
    layouts = loaded.adapter.vision_layout(encoding, chats)
    traced: list[Traced] = []
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
            "tokens": loaded.processor.tokenizer.convert_ids_to_tokens(answer),
            "text_tokens": _text_tokens(loaded, encoding, len(traced), record.modality),
            "system": shape.system,
            "vision": shape.vision,
            "text": shape.text,
            "generated": len(answer),
            "tiles": dump_tiles(tiles),
            "seconds": seconds,
        }
        traced.append(Traced(row, [{"sample": sample.id, **line} for line in stats], scores))
    return traced


def _text_tokens(loaded: LoadedModel, encoding: dict[str, Tensor], row: int, modality: Tensor) -> list[str]:
    """The text tokens of one row's prompt, which is left-padded; `modality [N]` of it."""
    ids = encoding["input_ids"][row].cpu()[-len(modality) :]
    tokens: list[str] = loaded.processor.tokenizer.convert_ids_to_tokens(
        ids[modality == Modality.TEXT].tolist()
    )
    return tokens


def _references(loaded: LoadedModel, samples: Sequence[Sample], ids: Tensor, limit: int) -> list[list[int]]:
    """Tokens of the reference answers, cut at the limit; `ids [rows, tokens]` of the prompts."""
    lasts = ids[:, -1].tolist()
    tokens = [reference_tokens(loaded, sample, last) for sample, last in zip(samples, lasts, strict=True)]
    return [answer[:limit] if limit else answer for answer in tokens]


FLUSH_SECONDS = 10.0
FLUSH_SAMPLES = 32
FLUSH_BYTES = 1 << 30
Under = Callable[[], AbstractContextManager[object]]


def trace_samples(
    loaded: LoadedModel,
    task: Task,
    samples: Sequence[Sample],
    out: Path,
    settings: TraceSettings | None = None,
    *,
    under: Under = nullcontext,
    shard: Shard | None = None,
    watch: Watch = SILENT,
) -> RunDirectory:
    """Generate an answer to every sample and record the attention on the way.

    Samples whose ids are in `out` already are skipped, so the same call resumes. What is traced
    is on disk every few seconds, and on Ctrl-C.

    Args:
        settings: how; a policy in it is what `under` runs the model under.
        under: makes a context in which a batch runs, such as that of a policy.
        shard: this process's share, where several trace the same samples into `out`.
        watch: its phase `trace` counts samples of the share, once at the start and after each batch.

    Raises:
        UserError: `out` holds another run, a picture cannot be read, or with `forced` a sample
            has no reference answer.
    """
    settings, shard = settings or TraceSettings(), shard or Shard()
    _check_ids(samples, task)
    if settings.forced:
        for sample in samples:
            reference(sample)

    def trace(batch: Sequence[Sample]) -> list[Traced]:
        with under():
            return trace_batch(loaded, batch, settings.answer_limit(task), settings.record, settings.forced)

    writer = RunWriter(out, run_meta(loaded, task, settings), shard.prefix, shard.count)
    try:
        with _current(loaded.model.device):
            _trace_missing(trace, shard.of(samples), settings.batch_size, writer, watch)
    finally:
        try:
            writer.flush()
        finally:
            writer.close()
    return RunDirectory(out)


def _check_ids(samples: Sequence[Sample], task: Task) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise UserError(f"sample ids must be unique, '{sample.id}' occurs twice in task '{task.name}'")
        seen.add(sample.id)


def _trace_missing(
    trace: Callable[[Sequence[Sample]], list[Traced]],
    samples: Sequence[Sample],
    batch_size: int,
    writer: RunWriter,
    watch: Watch,
) -> None:
    done = writer.done()
    todo = [sample for sample in samples if sample.id not in done]
    finished = len(samples) - len(todo)
    flushed = time.monotonic()
    watch.phase("trace", finished, len(samples))
    for start in range(0, len(todo), batch_size):
        for record in trace(todo[start : start + batch_size]):
            writer.add(record.sample, record.stats, record.scores)
            finished += 1
        watch.phase("trace", finished, len(samples))
        full = writer.pending >= FLUSH_SAMPLES or writer.pending_bytes >= FLUSH_BYTES
        if full or time.monotonic() - flushed > FLUSH_SECONDS:
            writer.flush()
            flushed = time.monotonic()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: kernels of Triton start there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
