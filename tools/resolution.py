"""Resolution and kept share together, at most at the same bytes: the table of docs/tuning.md.

    OMP_NUM_THREADS=1 python -m tools.resolution shapes --model tiny-mrope --out resolution

At each budget pictures are handed on as they are or with fewer vision tokens (smaller ones where the family's
grids follow the picture, means of neighbours where that is known), and as many of these are kept, evenly
over layers, as the budget holds: all in the most bits in which they fit, else as many as in 4 bits do.
Text has 4 bits. Bytes are counted against the dense cache of the pictures as they are. Finished answers are
kept in the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pandas as pd

import avlprof
from avlprof.bisection import largest_share
from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore, paired_difference
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.models.adapter import Adapter
from avlprof.models.smaller import FAMILIES, SamplePictures
from avlprof.policy import (
    BITS,
    RANKING,
    PicturePolicy,
    Policy,
    PromptShape,
    ScorerSpec,
    TextPolicy,
    live_share,
)
from avlprof.policy.parts import PictureKind
from tools.ranking import shapes_of

AS_THEY_ARE = "as they are"
KINDS: Final[tuple[PictureKind, ...]] = ("resized", "pooled")


def flat(name: str, keep: float, bits: int = 4, pictures: PicturePolicy | None = None) -> Policy:
    """The same share in every layer, text in 4 bits."""
    return Policy(
        name=name,
        vision_keep=keep,
        vision_bits=bits,
        text=TextPolicy(bits=4),
        scorer=ScorerSpec.of(RANKING),
        pictures=pictures,
    )


def policies(
    budget: float, shares: Sequence[float], prompts: Sequence[PromptShape], adapter: Adapter
) -> Iterator[Policy]:
    """Who is compared at a budget; `prompts` have the grids of their pictures."""

    def fits(policy: Policy) -> bool:
        return live_share(policy, prompts, adapter.layers) <= budget

    yield flat(AS_THEY_ARE, _most(lambda keep: fits(flat(AS_THEY_ARE, keep))))
    for kind in KINDS:
        for share in shares if adapter.family in FAMILIES[kind] else ():
            made = partial(flat, f"{kind} to {share:g}", pictures=PicturePolicy(kind=kind, share=share))
            whole = next((bits for bits in BITS if fits(made(1.0, bits))), None)
            yield made(1.0, whole) if whole else made(_most(partial(_fits_kept, fits, made)))


def _fits_kept(fits: Callable[[Policy], bool], made: Callable[[float], Policy], keep: float) -> bool:
    return fits(made(keep))


def _most(fits: Callable[[float], bool]) -> float:
    """The largest kept share that fits."""
    if not fits(0.0):
        raise UserError("text alone takes more than the budget")
    return 1.0 if fits(1.0) else largest_share(fits, 0.0, 1.0, halvings=16)


def main() -> None:
    """Measure, and write `resolution.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="shapes")
    parser.add_argument("--model", default="tiny-mrope")
    parser.add_argument("--budgets", default="0.1,0.2")
    parser.add_argument("--shares", default="0.75,0.5,0.35")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--split", default="held-out")
    parser.add_argument("--out", type=Path, default=Path("resolution"))
    given = parser.parse_args()
    loaded, task = avlprof.load_model(given.model), avlprof.load_task(given.task)
    settings = EvaluationSettings(
        split=given.split, samples=given.samples, batch_size=32, fidelity=False, latency=False
    )
    store = AnswerStore(given.out / "answers")
    shapes = shapes_of(evaluate(loaded, task, [], settings, store=store).answers)
    prompts = SamplePictures(loaded.adapter, task.samples(given.split, given.samples)).on(shapes)
    shares, rows = [float(share) for share in given.shares.split(",")], []
    for budget in map(float, given.budgets.split(",")):
        try:
            compared = list(policies(budget, shares, prompts, loaded.adapter))
        except UserError as error:
            print(f"left out at {budget:g}: {error}", flush=True)
            continue
        found = evaluate(loaded, task, compared, settings, store=store)
        scores = found.answers.groupby(["policy", "sample"], sort=True)["score"].mean()
        kept = {policy.name: policy.vision_keep for policy in compared}
        for row in found.summary().to_dict("records"):
            gap = paired_difference(scores[row["policy"]].to_numpy(), scores[AS_THEY_ARE].to_numpy())
            rows.append(
                {
                    "budget": budget,
                    "pictures": row["policy"],
                    "vision_keep": kept.get(row["policy"], 1.0),
                    "live_share": row["live_share"],
                    "score": row["score"],
                    "to_as_they_are": gap.difference.mean,
                    "low": gap.difference.low,
                    "high": gap.difference.high,
                }
            )
        print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(given.out / "resolution.csv", index=False)


if __name__ == "__main__":
    main()
