"""Which statistics of attention predict what eviction costs: the tables of docs/prediction.md.

    OMP_NUM_THREADS=1 python -m tools.predict --models tiny,tiny-mrope,small --out prediction

A model that has no plan here needs its task, `NAME=TASK`, and takes the sizes of `tiny`.
Tables that lie in the folder are not measured again; the page is written from those that are there.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from avlprof.files import write_text
from avlprof.plots.save import save_figure
from avlprof.policy import RANKING
from avlprof.watch import Watch
from tools.predict.measure import MAPS, MEASURES, Bench, Plan
from tools.predict.tables import OF_POLICIES, best_table, figure, heads_table, layers_table, shares_table

LONG = "shapes:describe,read,row"
PAGES = "pages:describe,paragraph,read_fields,read_chart,read_table"
PLANS = {
    "tiny": Plan("tiny", LONG, 96, 100),
    "tiny-mrope": Plan("tiny-mrope", LONG, 64, 100),
    "small": Plan("small", PAGES, 12, 30, batch=12),
}


class Told(Watch):
    """Prints each step as it ends."""

    def phase(self, name: str, done: int, total: int) -> None:
        if total and done == total:
            print(f"{name}: {total}", flush=True)


def main() -> None:
    """Measure what is missing, and write `tables.md` and `prediction.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tiny,tiny-mrope")
    parser.add_argument("--ranking", default=RANKING, help="of the policies that differ in their layers")
    parser.add_argument("--out", type=Path, default=Path("prediction"))
    given = parser.parse_args()
    tables = {}
    for text in given.models.split(","):
        model, _, task = text.partition("=")
        plan = replace(PLANS.get(model, PLANS["tiny"]), model=model)
        bench = Bench(replace(plan, task=task or plan.task, ranking=given.ranking), given.out / model, Told())
        bench.folder.mkdir(parents=True, exist_ok=True)
        tables[model] = {name: bench.table(name) for name in MEASURES}
    parts = {
        "Layers alone, nothing kept": layers_table(tables, 0.0),
        "Layers alone, 15% kept": layers_table(tables, 0.15),
        "Heads alone": heads_table(tables),
        "Rankings": shares_table(tables, "rankings", "ranking", MAPS),
        "Shares": shares_table(tables, "policies", "policy", OF_POLICIES),
        "KL of rankings": best_table(tables, "rankings", "ranking"),
        "KL of allocators": best_table(tables, "policies", "allocator"),
    }
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in parts.items())
    write_text(given.out / "tables.md", text + "\n")
    print(text)
    model, found = next(iter(tables.items()))
    save_figure(figure(found["policies"], found["rankings"], model, 0.2), given.out / "prediction.png")


if __name__ == "__main__":
    main()
