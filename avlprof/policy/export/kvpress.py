"""A module for kvpress: one press that keeps, layer by layer, what the policy keeps after the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from types import MappingProxyType

from avlprof.errors import UserError
from avlprof.policy.export._base import Case, Target, head, listed

SCORERS = (
    *("last_query", "window", "instruction", "text_weighted", "accumulated", "position", "random"),
    *("key_norm", "value_norm", "key_diversity", "valued", "pooled", "distinct"),
)
ABOVE = 1e-10
"""Keeps `int(length * (1 - ratio))` of kvpress from falling below a pool's `floor(share * length)`."""

IMPORTS = """
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from kvpress import BasePress, PerLayerCompressionPress, ScorerPress
from kvpress.utils import compute_n_kept, get_prerope_query_states
from transformers.models.llama.modeling_llama import rotate_half
"""
USE = (
    "",
    "    from policy import policy_press  # this file, saved as policy.py",
    "    with policy_press()(model):",
    "        model.generate(**inputs, max_new_tokens=64)",
)


class KVPress(Target):
    """NVIDIA's presses: tokens go right after a layer's prompt, in a cache of transformers.

    Only vision tokens are counted and cut, as the policy says (`VisionPress`, written into the file), or all
    tokens for a joint pool (kvpress's `PerLayerCompressionPress`). The rankings are avlprof's own, written
    against kvpress's hooks, so that sets as well as counts are the policy's where nothing is lost.
    """

    name = "kvpress"
    source = "kvpress 0.5.5 (PyPI; kvpress/presses/per_layer_compression_press.py, base_press.py)"
    suffix = ".py"
    expresses = MappingProxyType(
        {
            "pool": None,
            "vision_keep": None,
            "scorer.name": SCORERS,
            "scorer.options": None,
            "heads": ("shared", "kv_head"),
            "joint.keep": None,
            "joint.sink": None,
            "joint.recent": None,
            "joint.recent_share": None,
            "joint.decoding": ("grow",),
        }
    )

    says = MappingProxyType({"heads": "each KV head has a set of its own, of as many tokens as the others"})

    def check(self, case: Case) -> None:
        policy = case.policy
        if all(share >= 1.0 for share in case.shares()):
            raise UserError(
                f"policy '{policy.name}' drops no token of a prompt, and that is all that kvpress can do: "
                "nothing of it would be left"
            )
        inner = str(policy.scorer.options.get("of", SCORERS[0])).split(":")
        for name in (policy.scorer.name, *inner):
            if name not in SCORERS:
                raise UserError(
                    f"scorer '{name}' of policy '{policy.name}' is not known to the export; "
                    f"kvpress can be given {', '.join(SCORERS)}"
                )

    def lost(self, case: Case) -> Iterator[str]:
        yield from super().lost(case)
        joint = case.policy.joint
        if joint is not None and joint.decoding == "evict":  # the default, which a policy need not say
            yield "joint.decoding: evict: the pool grows by every generated token"

    def write(self, case: Case, lost: tuple[str, ...]) -> str:
        policy, shares = case.policy, case.shares()
        joint = policy.joint
        values = {
            "SCORER": policy.scorer.name,
            "OPTIONS": dict(policy.scorer.options),
            "PER_HEAD": policy.heads != "shared",
            "POOL": joint is not None,
            "SINK": joint.sink if joint else 0,
            "RECENT": joint.recent if joint else 0,
            "RECENT_SHARE": joint.recent_share if joint else 0.0,
        }
        lines = ['"""' + "\n".join([*head(case, self, lost), *USE]) + '\n"""']
        lines += [IMPORTS]
        lines += [f"{name} = {value!r}" for name, value in values.items()]
        lines += [
            f"KEEP = {listed(shares)}",
            '"""What stays of each layer, as a share; 1 where all does."""',
            "",
        ]
        body = files("avlprof.policy.export").joinpath("kvpress_body.txt").read_text(encoding="utf-8")
        return "\n".join(lines) + "\n\n" + body + _press(joint is not None)


def _press(joint: bool) -> str:
    made = (
        f"TokenPress(PolicyScores(), [min(max(1 - share - {ABOVE!r}, 0), 1 - {ABOVE!r}) for share in KEEP])"
        if joint
        else "VisionPress(PolicyScores(), KEEP)"
    )
    return f'\n\ndef policy_press():\n    """The press of the policy."""\n    return {made}\n'
