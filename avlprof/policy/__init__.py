"""Policies: schema, YAML, and the arithmetic of tokens and bytes."""

from avlprof.policy.provenance import Provenance, Score
from avlprof.policy.schema import (
    DENSE,
    EVICTING,
    RANKING,
    AllocatorSpec,
    JointPool,
    Policy,
    PrefillFilter,
    Refresh,
    ScorerSpec,
    TextPolicy,
    broadcast,
)
from avlprof.policy.sizes import LayerSizes, PromptShape, live_share, read_share, sizes, text_room, tokens
from avlprof.policy.yaml_io import dump_policy, find_policy, load_policy, parse_policy, save_policy, shipped

__all__ = [
    "DENSE",
    "EVICTING",
    "RANKING",
    "AllocatorSpec",
    "JointPool",
    "LayerSizes",
    "Policy",
    "PrefillFilter",
    "PromptShape",
    "Provenance",
    "Refresh",
    "Score",
    "ScorerSpec",
    "TextPolicy",
    "broadcast",
    "dump_policy",
    "find_policy",
    "live_share",
    "load_policy",
    "parse_policy",
    "read_share",
    "save_policy",
    "shipped",
    "sizes",
    "text_room",
    "tokens",
]
