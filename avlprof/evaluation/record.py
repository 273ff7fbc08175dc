"""What is known of one answer."""

from __future__ import annotations

from dataclasses import dataclass

STOCK = "stock"
"""Stands for a policy's hash where the model ran without one."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer and its cost.

    `score` is the metric's, 0 to 1. `generated_tokens` counts up to and including the end token;
    `system`, `vision` and `text` are the prompt's tokens. Bytes are of the prompt's KV: `live` kept
    after prefill, `dense` what the stock cache holds of it, `allocated` the storage behind it,
    and `read_bytes_per_step` the mean attended to per decoding step.
    """

    sample: str
    group: str
    prediction: str
    score: float
    generated_tokens: int
    system: int
    vision: int
    text: int
    live_bytes: int
    dense_bytes: int
    allocated_bytes: int
    read_bytes_per_step: float
    policy_hash: str
