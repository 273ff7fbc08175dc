"""What attention predicts: what a policy drops of it, and tables of rank correlations."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from tools.predict.measure import Seen
from tools.predict.tables import correlation


def test_what_goes_is_counted_token_by_token():
    random = np.random.default_rng(0)
    answer, norm = random.random((3, 11)), random.random((3, 11))
    ranks = np.stack([random.permutation(11) for _ in range(3)])
    seen = Seen({"answer": answer, "answer_valued": answer * norm}, {"mine": ranks})
    keep = np.array([0.0, 0.5, 1.0])
    lost = seen.lost("mine", keep)
    for layer, kept in enumerate((0, 5, 11)):  # floor of the share times 11 tokens
        gone = [token for token in range(11) if ranks[layer, token] >= kept]
        assert np.isclose(lost["answer"][layer], sum(answer[layer, token] for token in gone))
        by_value = sum(answer[layer, token] * norm[layer, token] for token in gone)
        assert np.isclose(lost["answer_valued"][layer], by_value)
        assert np.isclose(lost["hindsight"][layer], sum(sorted(answer[layer])[: 11 - kept]))


def test_a_correlation_is_of_means_over_samples():
    random = np.random.default_rng(1)
    kl, told = random.random((20, 7)) + np.arange(7) / 5, random.random((20, 7)) + np.arange(7)[::-1] / 5
    rows = [(s, u, kl[s, u], told[s, u], 1.0) for s in range(20) for u in range(7)]
    frame = pd.DataFrame(rows, columns=["sample", "unit", "kl", "told", "flat"]).sample(
        frac=1.0, random_state=0
    )
    wanted = spearmanr(kl.mean(axis=0), told.mean(axis=0)).statistic
    text = correlation(frame, "told", ["unit"])
    assert text.startswith(f"**{wanted:+.2f} [-")  # an interval that leaves out 0
    assert correlation(frame, "flat", ["unit"]) == ""
    assert correlation(frame.assign(told=np.nan), "told", ["unit"]) == ""
