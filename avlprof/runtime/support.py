"""What the runtime cannot do yet, refused in one sentence."""

from __future__ import annotations

from typing import Any

from avlprof.errors import UserError
from avlprof.policy import Policy


def unsupported(policy: Policy) -> str | None:
    """What of a policy the runtime cannot run, in the schema's words; None when it runs all."""
    heavy: Any = policy.text.heavy
    refused = {
        "prefill_filter": bool(policy.prefill_filter),
        "text.keep": policy.text.keep is not None,
        "text.heavy": any(heavy if isinstance(heavy, tuple) else (heavy,)),
        "joint with a scorer other than position": policy.joint is not None
        and policy.scorer.name != "position",
        "joint.decoding: grow": policy.joint is not None and policy.joint.decoding == "grow",
        "joint.recent": policy.joint is not None and policy.joint.recent > 0,
    }
    return next((what for what, asked in refused.items() if asked), None)


def check_supported(policy: Policy) -> None:
    """`UserError` when the runtime cannot run a policy, or its scorer is not known."""
    from avlprof.scorers import make_scorer

    make_scorer(policy.scorer)
    what = unsupported(policy)
    if what:
        raise UserError(f"policy '{policy.name}' sets {what}, which the runtime of this version cannot run")
