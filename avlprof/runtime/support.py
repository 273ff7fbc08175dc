"""What the runtime cannot do, refused in one sentence."""

from __future__ import annotations

from avlprof.errors import UserError
from avlprof.policy import Policy


def unsupported(policy: Policy) -> str | None:
    """What of a policy the runtime cannot run, in the schema's words; None when it runs all."""
    if policy.prefill_filter and policy.joint is not None:
        return "prefill_filter beside pool: joint"
    if policy.heads == "adaptive" and policy.joint is not None:
        return "heads: adaptive, which is of vision tokens, beside pool: joint"
    if policy.heads == "adaptive" and policy.vision_compute is not None:
        return "heads: adaptive, all of whose tokens are read at each step, beside vision_compute"
    return None


def check_supported(policy: Policy) -> None:
    """`UserError` when the runtime cannot run a policy, or its scorer is not known."""
    from avlprof.scorers import make_scorer

    make_scorer(policy.scorer)
    what = unsupported(policy)
    if what:
        raise UserError(f"policy '{policy.name}' sets {what}, which the runtime cannot run")


def check_runs(policy: Policy) -> None:
    """`check_supported` on prompts that are there: `UserError` too when a policy asks for others."""
    check_supported(policy)
    if policy.shrinks and policy.pictures is not None:
        raise UserError(
            f"policy '{policy.name}' makes pictures smaller ({policy.pictures.kind} to "
            f"{policy.pictures.share:g}), and these prompts have them as they are; encode and run inside "
            "avlprof.models.smaller.smaller_pictures(loaded, policy.pictures), with policy.of_cache applied, "
            "as 'avlprof run', 'evaluate' and 'compare' do"
        )


def not_leading(policy: Policy, layer: int) -> UserError:
    """A layer that others should follow keeps a window or a state, so that it has no row of its own."""
    return UserError(
        f"refresh_layers of policy '{policy.name}' names layer {layer}, which keeps a window, a state or "
        "other layers' keys, so that none can follow it; name layers that policies act on"
    )
