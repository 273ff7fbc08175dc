"""Measure the evidence and write its page.

    python -m tools.evidence --models tiny,small

Each step's result lies in a folder of its model below `--out` and is not made again, so the same command
goes on where it stopped. `--steps page` writes the page from what is there. What the page says of models that
are not asked for stays.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from avlprof import UserError
from avlprof.cli._progress import bars, duration
from tools.evidence.measure import Bench, compare, find, prove
from tools.evidence.page import write_page
from tools.evidence.plan import PLANS, SHARES, SIZES, plans

STEPS = ("trace", "search", "compare", "prove", "page")
ORDER = (("search", find), ("compare", compare), ("prove", prove), ("compare", compare))
"""A proof may choose another of the finalists, which is then compared anew."""


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tools.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(PLANS), help="MODEL or MODEL=TASK, separated by commas")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the vision KV")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="in place of that of the plan")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Trace, tune and compare model by model, then write the page."""
    given = parsed(words)
    shares = sorted(map(float, given.shares.split(",")))
    steps = given.steps.split(",")
    chosen = plans(
        given.models.split(";" if ";" in given.models else ","), {s: getattr(given, s) for s in SIZES}
    )
    benches = []
    for plan in chosen:
        began = time.monotonic()
        with bars(resumes=True) as watch:
            bench = Bench(plan, given.out / plan.model, shares, watch)
            benches.append(bench)
            if "trace" in steps:
                _ = bench.run, bench.by_head()
            for name, step in ORDER:
                if name in steps:
                    step(bench)
        print(f"{plan.model}: {duration(time.monotonic() - began)}", file=sys.stderr, flush=True)
    if "page" in steps:
        print(write_page([(bench.plan, bench.folder) for bench in benches], shares, given.page))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
