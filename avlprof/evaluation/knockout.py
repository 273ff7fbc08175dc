"""Close routes of attention layer by layer or head by head, and measure what the dense answers lose."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch

from avlprof.errors import UserError
from avlprof.evaluation.answers import FLUSH_SECONDS, SampleSettings
from avlprof.evaluation.batches import prompt_lengths
from avlprof.evaluation.damage import ALL, Knockout
from avlprof.evaluation.doubts import check_finite
from avlprof.evaluation.evaluate import check_ids, check_samples
from avlprof.evaluation.generating import generate_tokens, said
from avlprof.evaluation.store import Loss, LossStore, model_key
from avlprof.models import LoadedModel
from avlprof.runtime.cuts import Cut, Route, cutting
from avlprof.runtime.forced.attention import not_forced
from avlprof.runtime.forced.samples import ForcedSet
from avlprof.tasks import Sample, Task, load_metric
from avlprof.watch import SILENT, Watch

ROUTES = ("question-to-vision", "answer-to-vision", "answer-to-question")
REST: Literal["rest"] = "rest"
_DENSE = "dense"  # stands for a cut's name where nothing is cut
_TOGETHER = 8  # cuts that are scored between two words of progress


@dataclass(frozen=True, kw_only=True)
class KnockoutSettings(SampleSettings):
    """Which routes are closed, and where.

    Attributes:
        routes: names of `Route`, such as `question-to-vision`.
        window: closed are so many neighbouring layers at a time, around each layer; `rest`: each layer
            and all behind it.
        layers: around which layers; None is every layer that attends.
        heads: close each query head of these layers by itself, too.
        answers: have the model say the answers that change, for the task's metric.

    Raises:
        UserError: a route is not known or stands twice, there is none, or a number is out of range.
    """

    split: str = "search"
    samples: int | None = 64
    routes: tuple[str, ...] = ROUTES
    window: int | Literal["rest"] = 1
    layers: tuple[int, ...] | None = None
    heads: bool = False
    answers: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.routes:
            Route.of(name)
        if not self.routes or len(set(self.routes)) < len(self.routes):
            raise UserError(
                f"routes must be one or several, each once, got {', '.join(self.routes) or 'none'}"
            )
        if self.window != REST and (not isinstance(self.window, int) or self.window < 1):
            raise UserError(f"window must be 1 or more layers, or '{REST}', got {self.window!r}")

    def spans(self, attending: Sequence[int], layers: int) -> dict[int, tuple[int, ...]]:
        """The layers that are closed together, by the layer that they stand around, and `ALL` of them.

        Raises:
            UserError: a layer does not exist, or has no attention.
        """
        around = attending if self.layers is None else self.layers
        for layer in around:
            if layer not in attending:
                why = "has no attention" if 0 <= layer < layers else f"is not in 0 to {layers - 1}"
                raise UserError(f"layer {layer} {why}; choose layers of {_listed(attending)}")
        spans: dict[int, tuple[int, ...]] = {}
        for layer in around:
            if self.window == REST:
                near = range(layer, layers)
            else:
                near = range(layer - (self.window - 1) // 2, layer + self.window // 2 + 1)
            spans[layer] = tuple(one for one in near if one in attending)
        return spans | {ALL: tuple(attending)}


@dataclass(frozen=True)
class Place:
    """A cut and where its number stands: by route, layer (`ALL`: every one) and head (`ALL`: every one)."""

    cut: Cut
    layer: int
    head: int = ALL


def places(settings: KnockoutSettings, attending: Sequence[int], layers: int, heads: int) -> list[Place]:
    """Every cut of a knockout, route by route, whole layers first."""
    found = []
    spans = settings.spans(attending, layers)
    for name in settings.routes:
        route = Route.of(name)
        found += [Place(Cut(route, span), layer) for layer, span in spans.items()]
        if settings.heads:
            own = [layer for layer in spans if layer != ALL]
            found += [Place(Cut(route, (at,), (head,)), at, head) for at in own for head in range(heads)]
    return found


def knockout(
    loaded: LoadedModel,
    task: Task,
    settings: KnockoutSettings | None = None,
    *,
    store: LossStore | None = None,
    watch: Watch = SILENT,
) -> Knockout:
    """Close routes of a model's attention one after the other, and measure what its own answers lose.

    The dense model answers every sample; each cut then costs one forward over the answer's tokens and,
    where it begins in the question, the question's. An answer of which no token changes is known
    to be the same; the others are said anew under the cut, and the task's metric judges them.

    Args:
        settings: which routes, layers and samples; by default three routes of each layer.
        store: losses found there are not measured again.
        watch: its phase `knockout` counts cuts of samples.

    Raises:
        UserError: a layer or split is not known, or samples have no reference answers where answers are
            to be judged.
    """
    settings = settings or KnockoutSettings()
    adapter = loaded.adapter
    attending = [layer for layer, role in enumerate(adapter.roles) if role.attends]
    wanted = places(settings, attending, adapter.layers, adapter.heads)
    samples = task.samples(settings.split, settings.samples)
    (check_samples if settings.answers else check_ids)(samples)
    if len(attending) < adapter.layers:
        watch.say(
            f"{len(attending)} of {adapter.layers} layers attend; routes through the state of the others "
            "stay open"
        )
    why = not_forced(adapter.text_config)
    if why is not None:
        watch.say(f"each cut takes a generation of the answers: {why}")
    work = _Work(loaded, task, settings, store or LossStore(), watch)
    rows = work.measure(samples, wanted)
    meta = settings.about(loaded, task, len(samples)) | {
        "routes": list(settings.routes),
        "window": settings.window,
        "layers": adapter.layers,
        "attending": attending,
        "heads": adapter.heads,
        "judged": settings.answers,
    }
    return Knockout(meta, rows)


class _Work:
    """One knockout at work."""

    def __init__(
        self, loaded: LoadedModel, task: Task, settings: KnockoutSettings, store: LossStore, watch: Watch
    ) -> None:
        self.loaded, self.task, self.settings, self.store, self.watch = loaded, task, settings, store, watch
        self._model = model_key(loaded)
        self._limit = settings.max_new_tokens or task.max_new_tokens
        self._flushed = time.monotonic()

    def measure(self, samples: Sequence[Sample], wanted: Sequence[Place]) -> pd.DataFrame:
        """One row a cut and sample, as `Knockout.losses` holds them."""
        cuts = list({place.cut.name: place.cut for place in wanted}.values())
        total = len(cuts) * len(samples)
        done = sum(self._known(sample, cut.name) is not None for sample in samples for cut in cuts)
        self.watch.phase("knockout", done, total)
        try:
            for batch in self._batches(samples, cuts):
                for finished in self._batch(batch, cuts):
                    done += finished
                    self.watch.phase("knockout", done, total)
        finally:
            self.store.flush()
        return self._table(samples, wanted)

    def _known(self, sample: Sample, cut: str) -> Loss | None:
        loss = self.store.find(self._model, sample, self._limit, cut)
        return None if loss is None or (self.settings.answers and loss.prediction is None) else loss

    def _batches(self, samples: Sequence[Sample], cuts: Sequence[Cut]) -> Iterator[list[Sample]]:
        """Samples that lack a loss, those of like length together."""
        names = [_DENSE, *(cut.name for cut in cuts)]
        todo = [sample for sample in samples if any(self._known(sample, name) is None for name in names)]
        size = self.settings.batch_size
        if size > 1 and len(todo) > size:
            lengths = prompt_lengths(self.loaded, todo)
            todo.sort(key=lambda sample: lengths[sample.id])
        for start in range(0, len(todo), size):
            yield todo[start : start + size]

    def _batch(self, samples: list[Sample], cuts: Sequence[Cut]) -> Iterator[int]:
        """Measure what a batch lacks; says how many losses were new."""
        forced = ForcedSet.prepare(self.loaded, samples, max_new_tokens=self._limit, batch_size=len(samples))
        dense = self.loaded.adapter.decode(forced.answers)
        for sample, text, ids in zip(samples, dense, forced.answers, strict=True):
            self._add(sample, _DENSE, Loss(0.0, 1.0, float("nan"), len(ids), text))
        todo = [cut for cut in cuts if any(self._known(sample, cut.name) is None for sample in samples)]
        for start in range(0, len(todo), _TOGETHER):
            part = todo[start : start + _TOGETHER]
            for cut, scores in zip(part, forced.score_cuts(part), strict=True):
                new = [self._known(sample, cut.name) is None for sample in samples]
                changed = [i for i, score in enumerate(scores) if new[i] and score.agreement < 1.0]
                texts: list[str | None] = list(dense)
                said_anew = self._say([samples[i] for i in changed], cut)
                for i, anew in zip(changed, said_anew, strict=True):
                    texts[i] = anew
                for i, score in enumerate(scores):
                    if not new[i]:
                        continue
                    loss = Loss(score.kl, score.agreement, score.log_likelihood, score.tokens, texts[i])
                    self._add(samples[i], cut.name, loss)
                yield sum(new)

    @torch.inference_mode()
    def _say(self, samples: list[Sample], cut: Cut) -> list[str | None]:
        """Greedy answers without the route; None where nobody judges them."""
        if not samples or not self.settings.answers:
            return [None] * len(samples)
        encoding = self.loaded.adapter.encode_samples(samples)
        with cutting(self.loaded.model, cut):
            ids = generate_tokens(
                self.loaded,
                encoding,
                None,
                samples=[sample.id for sample in samples],
                max_new_tokens=self._limit,
            )
        return list(said(self.loaded, ids.tolist())[1])

    def _add(self, sample: Sample, cut: str, loss: Loss) -> None:
        self.store.add(self._model, sample, self._limit, cut, loss)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.store.flush()
            self._flushed = time.monotonic()

    def _table(self, samples: Sequence[Sample], wanted: Sequence[Place]) -> pd.DataFrame:
        judge = load_metric(self.task.metric)
        rows: list[dict[str, Any]] = []
        for sample in samples:
            dense = self.store.find(self._model, sample, self._limit, _DENSE)
            assert dense is not None
            scored: dict[str | None, float] = {None: float("nan")}
            for place in wanted:
                loss = self.store.find(self._model, sample, self._limit, place.cut.name)
                assert loss is not None
                for text in (dense.prediction, loss.prediction):
                    if self.settings.answers and text not in scored:
                        scored[text] = float(judge(str(text), sample.answers))
                rows.append(
                    {
                        "sample": sample.id,
                        "route": place.cut.route.name,
                        "layer": place.layer,
                        "head": place.head,
                        "first": place.cut.layers[0],
                        "last": place.cut.layers[-1],
                        "kl": loss.kl,
                        "agreement": loss.agreement,
                        "same": float(loss.agreement == 1.0),
                        "score": scored[loss.prediction] if self.settings.answers else float("nan"),
                        "dense": scored[dense.prediction] if self.settings.answers else float("nan"),
                    }
                )
        table = pd.DataFrame(rows)
        if self.settings.answers:
            check_finite(table["score"].to_numpy(float), self.task.metric, table["sample"].tolist())
        return table


def _listed(layers: Sequence[int]) -> str:
    whole = layers[-1] - layers[0] + 1 == len(layers)
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
