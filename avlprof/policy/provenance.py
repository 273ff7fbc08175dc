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


class Difference(BaseModel):
    """The policy minus another on the same held-out samples: mean, 95% interval, two-sided p-value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    low: float
    high: float
    p_value: float


class Proof(BaseModel):
    """What held-out samples said of a tuned policy.

    `strongest` is the hand-set rival that was best on the search split; `non_inferior` says whether
    the interval against it lies above `-margin` and nothing is in `doubts`, which says what kept
    the samples from showing it. `detectable` is the smallest drop against it that
    the samples could show (80% power, 5% two-sided). `rank_correlation` is Spearman's between the
    cheap score and the metric, over `rank_policies` policies on the search split.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    samples: int
    strongest: str
    margin: float
    non_inferior: bool
    doubts: tuple[str, ...] = ()
    detectable: float | None = None
    differences: dict[str, Difference] = {}
    rank_correlation: float | None = None
    rank_policies: int | None = None

    @property
    def holds(self) -> bool:
        """Whether not being inferior is shown; files of 0.1.0 said so of intervals without width, too."""
        against = self.differences.get(self.strongest)
        degenerate = against is not None and against.low == against.high
        return self.non_inferior and not self.doubts and not degenerate


class Provenance(BaseModel):
    """Everything needed to reproduce a policy and to judge it.

    `budget` and `read_budget` are shares of the dense prompt KV (memory and mean read per
    step); scores are of `metric` on held-out samples; bytes are per prompt. `trial` counts within the
    study's second stage when the policy was `refined` layer by layer, within its third when it was head by
    head (`refined_heads`). `governed` are the layers that the policy acts on and shares are of, where the
    model has others too; None means all.
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
    refined: bool = False
    refined_heads: bool = False
    budget: float | None = None
    read_budget: float | None = None
    measured_budget: float | None = None
    measured_read_budget: float | None = None
    governed: tuple[int, ...] | None = None
    answer_tokens: int | None = None
    metric: str = ""
    scores: dict[str, Score] = {}
    dense_bytes: int | None = None
    policy_bytes: int | None = None
    objective: str = ""
    sampler: str = ""
    proof: Proof | None = None
    notes: str = ""
