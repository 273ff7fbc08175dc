"""How much attention goes to first tokens, whatever they say."""

from __future__ import annotations

import pandas as pd

from avlprof.analysis.intervals import over_samples
from avlprof.analysis.mass import KEYS

SINKS = {"mass_sink": "first", "text_sink": "text"}


def sinks(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of attention on sinks: `layer, phase, query, sink, mean, low, high, n`.

    `sink` is `first` (the first token of the prompt) or `text` (the first text tokens, `text_sink`
    of them in the run's settings); `rows` is a table of `head_mean`.
    Source: attention sinks of StreamingLLM, arXiv 2309.17453.
    """
    long = rows[[*KEYS, *SINKS]].rename(columns=SINKS).melt(KEYS, var_name="sink", value_name="mass")
    return over_samples(long, [*KEYS, "sink"], "mass")
