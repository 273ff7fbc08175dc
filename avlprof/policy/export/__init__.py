"""Policies for other engines: `avlprof export --to NAME`."""

from __future__ import annotations

from avlprof.errors import UserError
from avlprof.policy.export._base import Case, Handover, Target
from avlprof.policy.schema import Policy
from avlprof.policy.sizes import PromptShape
from avlprof.registry import Registry

TARGETS: Registry[type[Target]] = Registry(
    "target",
    {
        "kvpress": "avlprof.policy.export.kvpress:KVPress",
        "sparse-engine": "avlprof.policy.export.sparse_engine:SparseEngine",
        "tensorrt-llm": "avlprof.policy.export.tensorrt_llm:TensorRTLLM",
    },
)


def export_to(target: str, policy: Policy, layers: int, prompt: PromptShape | None = None) -> Handover:
    """A policy as another engine reads it, with what is lost.

    Args:
        target: a name of `TARGETS`.
        policy: says the share of every layer; see `avlprof.budgets.resolve` for one with an allocator.
        layers: of the model.
        prompt: token counts of a typical prompt, for targets that count tokens.

    Raises:
        UserError: the target is not known, the policy is for another number of layers, nothing useful of
            it would be left, it makes pictures smaller, or the target needs a prompt.
    """
    if policy.shrinks and policy.pictures is not None:
        raise UserError(
            f"policy '{policy.name}' makes pictures smaller ({policy.pictures.kind} to "
            f"{policy.pictures.share:g}), which {target} does not, and its shares are of what they leave; "
            "tune one without --pictures"
        )
    policy.check_layers(layers)
    engine, case = TARGETS.get(target)(), Case(policy, layers, prompt)
    engine.check(case)
    lost = tuple(engine.lost(case))
    return Handover(target, engine.write(case, lost), engine.suffix, lost)


__all__ = ["TARGETS", "Case", "Handover", "Target", "export_to"]
