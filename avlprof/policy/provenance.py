"""Where a policy comes from and how good it was measured to be."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Score(BaseModel):
    """A mean over samples with a two-sided 95% confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    low: float
    high: float
    samples: int


class Provenance(BaseModel):
    """Everything needed to reproduce a policy and to judge it.

    `budget` and `read_budget` are shares of the dense prompt KV (memory and mean read per
    step); scores are of `metric` on held-out samples; bytes are per prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    made_by: str = ""
    created: str = ""
    model: str = ""
    model_revision: str = ""
    model_hash: str = ""
    versions: dict[str, str] = {}
    task: str = ""
    samples: int | None = None
    seed: int | None = None
    run: str = ""
    run_hash: str = ""
    study: str = ""
    trial: int | None = None
    budget: float | None = None
    read_budget: float | None = None
    measured_budget: float | None = None
    measured_read_budget: float | None = None
    answer_tokens: int | None = None
    metric: str = ""
    scores: dict[str, Score] = {}
    dense_bytes: int | None = None
    policy_bytes: int | None = None
    notes: str = ""
