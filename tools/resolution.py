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
from pathlib import Path

import pandas as pd

import avlprof
from avlprof.bisection import largest_share
from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore, paired_difference
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.evaluation.smaller import Method, Pictures, SmallerPictures
from avlprof.models.smaller import FAMILIES
from avlprof.policy import BITS, RANKING, Policy, PromptShape, ScorerSpec, TextPolicy, live_share
from tools.ranking import shapes_of

AS_THEY_ARE = "as they are"


def flat(name: str, keep: float, bits: int = 4) -> Policy:
    """The same share in every layer, text in 4 bits."""
    scorer = ScorerSpec.of(RANKING)
    return Policy(name=name, vision_keep=keep, vision_bits=bits, text=TextPolicy(bits=4), scorer=scorer)


def methods(
    budget: float, shares: Sequence[float], shapes: Sequence[PromptShape], pictures: Pictures
) -> Iterator[tuple[Method, float]]:
    """Who is compared at a budget, and the share of the vision tokens of its prompts that it keeps."""
    layers = pictures.adapter.layers
    keep = _most(lambda k: live_share(flat(AS_THEY_ARE, k), shapes, layers) <= budget)
    yield flat(AS_THEY_ARE, keep), keep
    for kind in ("resized", "pooled"):
        for share in shares if pictures.adapter.family in FAMILIES[kind] else ():
            name = f"{kind} to {share:g}"

            def method(
                k: float, bits: int = 4, kind: str = kind, share: float = share, name: str = name
            ) -> SmallerPictures:
                return SmallerPictures(name, kind, share, flat(name, k, bits))  # type: ignore[arg-type]

            def fits(
                k: float, bits: int = 4, method: Callable[[float, int], SmallerPictures] = method
            ) -> bool:
                return method(k, bits).live_share(shapes, pictures.grids, layers) <= budget

            whole = [bits for bits in BITS if fits(1.0, bits)]
            keep = 1.0 if whole else _most(fits)
            yield method(keep, whole[0] if whole else 4), keep


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
    pictures = Pictures(loaded.adapter, task.samples(given.split, given.samples))
    shares, rows = [float(share) for share in given.shares.split(",")], []
    for budget in map(float, given.budgets.split(",")):
        try:
            compared = list(methods(budget, shares, shapes, pictures))
        except UserError as error:
            print(f"left out at {budget:g}: {error}", flush=True)
            continue
        found = evaluate(loaded, task, [method for method, _ in compared], settings, store=store)
        scores = found.answers.groupby(["policy", "sample"], sort=True)["score"].mean()
        kept = {method.name: keep for method, keep in compared}
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
