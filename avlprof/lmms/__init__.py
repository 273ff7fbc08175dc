"""The model arguments of lmms-eval, which are the key of its cache of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avlprof.errors import UserError
from avlprof.policy import DENSE, Policy, find_policy

_MARK = "sha256-"  # lmms-eval turns bare digits, and digits around an e, into numbers


def policy_hash(policy: Policy) -> str:
    """The content hash of a policy in the form that model arguments carry."""
    return f"{_MARK}{policy.hash}"


def model_args(model: str, policy: str | Path = DENSE.name, **options: str | int | float | bool) -> str:
    """What to hand to lmms-eval as `--model_args`: model, policy, and the hash of its content.

    lmms-eval finds answers again by this text. A policy file's name says nothing about its content,
    so the hash must be in it; the model refuses to start with another one.

    Args:
        model: alias, hub id or local folder.
        policy: a file, the name of a shipped policy, or `dense`.
        options: more arguments of the model, such as `dtype`.

    Raises:
        UserError: the policy is unknown, or a value holds a comma, which would cut it in two.
    """
    content = policy_hash(find_policy(str(policy)))
    arguments = {"pretrained": model, "policy": str(policy), "policy_hash": content, **options}
    for name, value in arguments.items():
        if "," in str(value):
            raise UserError(f"{name} must not hold a comma in model arguments, got '{value}'")
    return ",".join(f"{name}={value}" for name, value in arguments.items())


def checked_policy(name: str, claimed: str | None) -> Policy:
    """The policy of a name, if the hash in the model arguments is that of its content.

    Raises:
        UserError: the hash is missing or another one; the message has the right one.
    """
    policy = find_policy(name)
    right = policy_hash(policy)
    if claimed == right:
        return policy
    lacks = "lacks its policy_hash" if claimed is None else f"has changed: policy_hash is {claimed}"
    raise UserError(
        f"policy '{name}' {lacks}; lmms-eval finds cached answers by its model arguments alone, "
        f"so add policy_hash={right} to --model_args"
    )


__all__ = ["manifest", "model_args"]


def manifest() -> Any:
    """What the entry point `lmms_eval.models` gives: the model `avlprof`, a `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("avlprof", simple_class_path="avlprof.lmms.model.AVLProf")
