"""A policy that leaves the share of each layer to an allocator, turned into one that says it."""

from __future__ import annotations

from avlprof.allocators import Evidence, make_allocator
from avlprof.budgets.fit import fit_keep
from avlprof.budgets.meet import in_place
from avlprof.errors import UserError
from avlprof.policy import Policy

FINE = 10_000  # tokens that shares are rounded to where the prompts are not known


def resolve(policy: Policy, evidence: Evidence) -> Policy:
    """The policy with `vision_keep` (or `joint.keep`) spread over the layers by its allocator.

    The mean over the layers that policies act on stays what it was, and the others keep 1; the computed
    share keeps its proportion to the kept one. A policy without an allocator comes back as it is.

    Args:
        evidence: what the allocator may look at; `Evidence(layers, tokens)` does for those that look at
            nothing but the number of layers.

    Raises:
        UserError: the allocator is not known, or needs more evidence.
    """
    spec = policy.allocator
    if spec is None:
        return policy
    mean = policy.joint.keep if policy.joint else policy.vision_keep
    assert not isinstance(mean, tuple)
    allocator = make_allocator(spec.name, spec.mix, spec.temperature, **_numbers(spec.options))
    try:
        shares = allocator.shares(evidence, mean)
    except UserError as error:
        raise UserError(
            f"policy '{policy.name}' cannot be resolved: {error}; "
            "or resolve it with the profile of a traced run"
        ) from None
    own = range(evidence.layers) if evidence.governed is None else evidence.governed
    few = fit_keep([float(shares[layer]) for layer in own], mean, evidence.tokens or FINE, spec.floor)
    keep = in_place(few, own, (1.0,) * evidence.layers)
    if policy.joint:
        joint = policy.joint.model_copy(update={"keep": keep})
        return policy.model_copy(update={"allocator": None, "joint": joint})
    compute = policy.vision_compute
    if compute is not None and not isinstance(compute, tuple):
        compute = in_place([share * compute / mean if mean else 0.0 for share in few], own, keep)
    changed = {"allocator": None, "vision_keep": keep, "vision_compute": compute}
    return policy.model_copy(update=changed)


def resolve_by_depth(policy: Policy, layers: int, governed: tuple[int, ...] | None = None) -> Policy:
    """`resolve` with nothing known of the model but its number of layers, and which policies act on.

    Raises:
        UserError: the allocator looks at more than that.
    """
    return resolve(policy, Evidence(layers=layers, tokens=FINE, governed=governed))


def _numbers(options: dict[str, float | int | str | bool]) -> dict[str, float]:
    for name, value in options.items():
        if isinstance(value, str | bool):
            raise UserError(f"option {name} of an allocator must be a number, got {value!r}")
    return {name: float(value) for name, value in options.items() if not isinstance(value, str)}
