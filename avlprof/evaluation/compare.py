"""All methods at several budgets of equal bytes, on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from avlprof.allocators.allocator import Evidence
from avlprof.errors import UserError
from avlprof.evaluation.about import about
from avlprof.evaluation.answers import generate_answers, prompt_lengths
from avlprof.evaluation.answers_store import AnswerStore
from avlprof.evaluation.comparison import Comparison
from avlprof.evaluation.contenders import seeded
from avlprof.evaluation.evaluate import check_samples
from avlprof.evaluation.lineup import line_up
from avlprof.evaluation.strongest import strongest
from avlprof.models import LoadedModel
from avlprof.policy import Policy, PromptShape
from avlprof.tasks import Task

Progress = Callable[[int, int], None]


def compare(
    loaded: LoadedModel,
    task: Task,
    budgets: Sequence[float],
    *,
    baselines: Sequence[Policy],
    given: Sequence[Policy] = (),
    tuned: Sequence[Policy] = (),
    split: str = "held-out",
    select_split: str | None = "search",
    samples: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    evidence: Callable[[], Evidence] | None = None,
    store: AnswerStore | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Generate and judge dense and every method at every budget; `docs/evaluation.md` has the terms.

    Budgets are counted on the prompts of the compared samples, so all methods of a budget hold
    the same bytes to a token a layer. The strongest baseline of a budget is picked on
    `select_split` with as many samples, and tested once on `split`.

    Args:
        budgets: prompt KV live after prefill over dense, in [0, 1].
        baselines, given, tuned: see `line_up`.
        samples: how many of each split; None means what the task calls the split.
        select_split: None picks no strongest baseline.
        evidence: gives what a traced run knows, for policies with an allocator.
        store: answers found there are not generated again.
        progress: called with answers done and in all.

    Raises:
        UserError: no budget, a split that is unknown or stands for both, or a sample without answers.
    """
    if not budgets or batch_size < 1:
        raise UserError("compare needs at least one budget and a batch size of 1 or more")
    if select_split == split:
        raise UserError(f"select_split must differ from split '{split}', or be left out")
    chosen = task.samples(split, samples)
    check_samples(chosen)
    limit = max_new_tokens or task.max_new_tokens
    lengths = prompt_lengths(loaded, chosen) if batch_size > 1 else None
    done, total = 0, len(chosen)

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, max(total, done))

    def rows(run: Policy | None, seed: int, who: dict[str, Any]) -> pd.DataFrame:
        answers = generate_answers(
            loaded, chosen, run, max_new_tokens=limit, batch_size=batch_size, metric=task.metric,
            lengths=lengths, store=store,
        )  # fmt: skip
        advanced(len(answers))
        return pd.DataFrame([who | {"seed": seed} | asdict(answer) for answer in answers])

    parts = [rows(None, 0, {"method": "dense", "kind": "dense", "budget": 1.0})]
    shapes = [PromptShape(int(s), int(v), int(t)) for s, v, t in _shapes(parts[0])]
    asked = tuple(sorted(set(budgets)))
    found = line_up(
        asked, shapes, loaded.adapter.layers, baselines=baselines, given=given, tuned=tuned, evidence=evidence
    )
    candidates = {budget: found.at(budget, "baseline") for budget in asked} if select_split else {}
    picked = sum(len(seeded(e.policy)) for rivals in candidates.values() for e in rivals)
    total += len(chosen) * sum(len(seeded(e.policy)) for e in found.entries)
    total += picked * len(task.samples(select_split, samples)) if select_split else 0
    best: dict[float, str] = {}
    for budget, rivals in candidates.items():
        if rivals and select_split:
            winner = strongest(
                loaded, task, [e.policy for e in rivals], split=select_split, samples=samples,
                max_new_tokens=limit, batch_size=batch_size, store=store, advanced=advanced,
            )  # fmt: skip
            best[budget] = winner.policy.name
    for entry in found.entries:
        who = {"method": entry.method, "kind": entry.kind, "budget": entry.budget}
        parts += [rows(run, seed, who) for seed, run in enumerate(seeded(entry.policy))]
    meta = about(loaded, task, split, len(chosen), limit, batch_size)
    meta |= {"select_split": select_split or "", "budgets": list(asked)}
    return Comparison(meta, pd.concat(parts, ignore_index=True), found, best)


def _shapes(dense: pd.DataFrame) -> Any:
    return dense[["system", "vision", "text"]].itertuples(index=False)
