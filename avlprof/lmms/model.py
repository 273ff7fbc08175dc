"""The model class that lmms-eval runs; needs `pip install "avlprof[lmms]"`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor

from avlprof.errors import UserError
from avlprof.evaluation.generating import generate_tokens, running
from avlprof.lmms import checked_policy
from avlprof.models import LoadedModel, ModelSpec, load_model
from avlprof.models.answers import answer_length, end_tokens
from avlprof.models.spec import ModelOptions
from avlprof.policy import DENSE
from avlprof.runtime.support import check_runs
from avlprof.tracing.trace import FixedAnswers

DEFAULT_NEW_TOKENS = 1024
PLACEHOLDER = "<image>"


class AVLProf(lmms):
    """A model under a policy, as lmms-eval's `simple` kind: pictures first, then the text.

    Args:
        pretrained: alias, hub id or local folder, as in `avlprof.load_model`.
        policy: a file, the name of a shipped policy, or `dense`.
        policy_hash: of the policy's content (`avlprof.lmms.model_args` writes it); required, since
            lmms-eval's cache knows answers by the model arguments alone.
        batch_size: prompts generated at a time.
        max_batch_size: accepted because lmms-eval passes it; not used.
        options: how to load the model, as in `avlprof.load_model`: device, dtype, revision, ...

    Raises:
        UserError: the hash is not the policy's, the policy does not fit, or several processes run.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "tiny",
        policy: str = "dense",
        policy_hash: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("the avlprof model of lmms-eval runs in one process; start it without a launcher")
        self.policy = checked_policy(str(policy), policy_hash)
        check_runs(self.policy)
        options["device"] = options.get("device") or "auto"  # lmms-eval passes None
        loaded = load_model(ModelSpec(str(pretrained), **options))
        self.policy.check_layers(loaded.adapter.layers)
        self._run = None if self.policy.hash == DENSE.hash else self.policy
        self._loaded: LoadedModel | None = loaded
        self.batch_size = int(batch_size)
        self.device = loaded.model.device

    @property
    def loaded(self) -> LoadedModel:
        """The model; gone after `clean`."""
        if self._loaded is None:
            raise UserError("lmms-eval has released this model; make a new one")
        return self._loaded

    def clean(self) -> None:
        """Release the model's memory; lmms-eval calls it when generation is over."""
        self._loaded = None
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Greedy answers, in the order of the requests, cut at the first stop text, with their lengths.

        Raises:
            UserError: a request asks for sampling or beams, or holds something other than pictures.
        """
        results: dict[int, GenerationResult] = {}
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_greedy(request.args[1]), []).append(index)
        for (limit, until), indices in groups.items():
            indices.sort(key=lambda index: len(requests[index].args[0]))
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                answers = self._answers([requests[index] for index in batch], limit, until)
                results.update(zip(batch, answers, strict=True))
        return [results[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Mean negative log-likelihood of each continuation under the policy, and whether it is greedy.

        lmms-eval names this a log-probability but takes the choice with the least value, as its own
        models return a loss; so does this. The continuation's tokens are forced one step at a time,
        so a policy reads and evicts as when it generates.

        Each pair is the `text` of a `GenerationResult`: lmms-eval 0.7.3 writes a bare pair out as a
        text, which none of its likelihood metrics can read, but unwraps this. Its cache of answers
        (`--use_cache`) takes neither, so likelihood tasks run without it.
        """
        return [GenerationResult(self._likelihood(request)) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: answers of several rounds on one cache are not offered here."""
        raise UserError("multi-round tasks are not offered by the avlprof model; choose a task of one round")

    @torch.inference_mode()
    def _answers(
        self, requests: Sequence[Instance], limit: int, until: Sequence[str]
    ) -> list[GenerationResult]:
        loaded = self.loaded
        encoding = loaded.adapter.encode(
            [_text(request.args[0]) for request in requests],
            [self._pictures(*request.args[2:6]) for request in requests],
        )
        with running(loaded, self._run) as runtime:
            ids = generate_tokens(loaded, encoding, runtime, max_new_tokens=limit).tolist()
        lengths = [answer_length(row, end_tokens(loaded.model)) for row in ids]
        texts = loaded.adapter.decode([row[:length] for row, length in zip(ids, lengths, strict=True)])
        prompts = encoding["attention_mask"].sum(dim=1).tolist()
        return [
            GenerationResult(_cut(text, until), TokenCounts(input_tokens=prompt, output_tokens=length))
            for text, length, prompt in zip(texts, lengths, prompts, strict=True)
        ]

    @torch.inference_mode()
    def _likelihood(self, request: Instance) -> tuple[float, bool]:
        if len(request.args) != 6:
            raise UserError(
                "choices weighed against a prompt without a picture (acc_mutual_info) are not offered"
            )
        context, target, to_visual, doc_id, task, split = request.args
        loaded = self.loaded
        continuation = target if isinstance(target, str) else str(target(self.task_dict[task][split][doc_id]))
        tokens = loaded.processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not tokens:
            return 0.0, True
        encoding = loaded.adapter.encode([_text(context)], [self._pictures(to_visual, doc_id, task, split)])
        forced = _Noted(tokens, encoding["input_ids"].shape[1])
        with running(loaded, self._run) as runtime:
            generate_tokens(loaded, encoding, runtime, max_new_tokens=len(tokens), logits_processor=forced)
        return -sum(forced.log_probabilities) / len(tokens), forced.greedy

    def _pictures(self, to_visual: Any, doc_id: int, task: str, split: str) -> list[Image.Image]:
        visuals = to_visual(self.task_dict[task][split][doc_id]) if to_visual else []
        pictures = [] if visuals is None else list(visuals)
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                kind = type(picture).__name__
                raise UserError(f"task '{task}' gives a {kind} for a picture; only pictures can be looked at")
        return [picture.convert("RGB") for picture in pictures]


class _Noted(FixedAnswers):
    """Makes one row's generation take given tokens, and notes how likely each was."""

    def __init__(self, tokens: Sequence[int], prompt: int) -> None:
        super().__init__([tokens], prompt)
        self.log_probabilities: list[float] = []
        self.greedy = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = super().__call__(input_ids, scores)
        token = int(forced[0].argmax())
        self.log_probabilities.append(float(scores[0].float().log_softmax(dim=-1)[token]))
        self.greedy &= int(scores[0].argmax()) == token
        return forced


def _greedy(options: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Longest answer and stop texts of a request, which must be greedy."""
    sampled = options.get("do_sample") or (options.get("temperature") or 0) > 0
    if sampled or (options.get("num_beams") or 1) > 1:
        raise UserError(f"the avlprof model answers greedily, without sampling or beams; got {dict(options)}")
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return int(options.get("max_new_tokens") or DEFAULT_NEW_TOKENS), stops


def _text(context: str) -> str:
    """The prompt without placeholders of pictures, which come first."""
    return context.replace(PLACEHOLDER, "").strip()


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text.strip()
