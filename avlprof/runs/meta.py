"""What a run recorded and with what: the `meta.json` of a run directory."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
COVERAGES = (50, 80, 90, 95, 99)
LAGS = (1, 2, 4, 8, 16, 32)
TEXT_SINK = 4
HEADS = "_heads"  # behind the name of scores: of every query head, not their mean


class RunMeta(BaseModel):
    """Settings of a traced run. Two traces may share a directory only if these are equal.

    `distances` are the upper edges (exclusive, in text tokens) of the distance histogram, whose
    last bin is open; `top_share` is the share of vision tokens in the sets that overlaps compare.
    With `forced` the answers are the references, and `max_new_tokens` 0 leaves them whole.
    `policy` is empty when the model ran densely, else name and hash.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["avlprof.run/1"] = "avlprof.run/1"
    model: str
    revision: str = ""
    model_hash: str
    family: str = ""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    task: str
    metric: str = ""
    split: str = ""
    seed: int = 0
    max_new_tokens: int
    forced: bool = False
    rows: str = "default"
    vision_rows: int = 64
    coverage_rows: int = 16
    per_head: bool = False
    history: float | None = None
    policy: str = ""
    top_share: float = 0.1
    text_sink: int = TEXT_SINK
    coverages: tuple[int, ...] = COVERAGES
    distances: tuple[int, ...] = DISTANCES
    lags: tuple[int, ...] = LAGS
    versions: dict[str, str] = {}
    created: str = ""

    def differences(self, other: RunMeta) -> list[str]:
        """Fields in which another run's settings differ, as `field: ours, theirs`."""
        loose = {"created", "versions", "device"}
        return [
            f"{name}: {getattr(self, name)!r} here, {getattr(other, name)!r} asked"
            for name in type(self).model_fields
            if name not in loose and getattr(self, name) != getattr(other, name)
        ]
