"""What a policy sets, in words, in rows, and beside another one."""

from __future__ import annotations

from typing import Any

from avlprof.policy import DENSE, JointPool, Policy, TextPolicy, acts_on, broadcast

NAMING = ("name", "description", "source", "provenance")


def sets(policy: Policy) -> str:
    """What a policy does, in the schema's words: `vision_keep 0.5, vision_compute 0.25 every 5`."""
    parts = []
    if policy.joint is not None:
        parts.append(_pool(policy.joint))
    else:
        parts.append(f"vision_keep {_range(policy.vision_keep)}")
    if policy.vision_compute is not None:
        parts.append(f"vision_compute {_range(policy.vision_compute)} {_refreshes(policy)}")
    parts += _stored(policy)
    if policy.allocator is not None:
        parts.append(f"spread by {policy.allocator.name}")
    parts += _text(policy.text)
    parts += [f"prefill_filter {f.keep:g} after {f.after_layer}" for f in policy.prefill_filter]
    if policy.pictures is not None:
        parts.append(f"pictures {policy.pictures.kind} to {policy.pictures.share:g}")
    if policy.hash != DENSE.hash:
        parts.append(f"by {policy.scorer.name}")
    return ", ".join(parts)


def _refreshes(policy: Policy) -> str:
    """When a core is picked anew, by which layers, and by what."""
    if not policy.refresh_interval:
        return "fixed"
    said = f"every {policy.refresh_interval}"
    if policy.refresh == "score_only":
        said += ", scoring only"
    if policy.refresh == "triggered":
        fell = f"once its share fell by {policy.refresh_margin:g}"
        said = f"{fell}, at least {policy.refresh_interval} steps apart"
    if policy.refresh_layers is not None:
        said += f", by layers {', '.join(map(str, policy.refresh_layers))}"
    if policy.scores_core:
        score = policy.core_score
        said += f", core_score prompt {score.prompt:g}, memory {score.memory:g}"
    return said


def _text(text: TextPolicy) -> list[str]:
    """What stays of text, and in how many bits."""
    parts = []
    if text.window is not None:
        parts.append(f"text.window {_range(text.window)}, text.sink {_range(text.sink)}")
    if text.scored and text.keep is None:
        parts.append(f"text.heavy {_range(text.heavy)}")
    if text.keep is not None:
        parts.append(f"text.keep {_range(text.keep)} by {text.scorer}")
    if text.packs:
        parts.append(f"text.bits {_range(text.bits)}")
    return parts


def _stored(policy: Policy) -> list[str]:
    """How kept vision is stored, where that is not one set of full numbers a layer or KV head."""
    parts = [f"vision_bits {_range(policy.vision_bits)}"] if policy.packs else []
    if policy.heads == "adaptive":
        shares = ", head_shares" if policy.head_shares is not None else ""
        parts.append(f"heads adaptive, head_floor {policy.head_floor:g}{shares}")
    return parts


def _pool(joint: JointPool) -> str:
    newest = f", newest {joint.recent}" if joint.recent else ""
    newest = f", newest {joint.recent_share:g} of it" if joint.recent_share else newest
    grows = ", growing" if joint.decoding == "grow" else ""
    return f"joint pool keep {_range(joint.keep)}, sink {joint.sink}{newest}{grows}"


def layer_rows(policy: Policy, layers: int) -> list[dict[str, Any]]:
    """One row a layer that the policy acts on: the per-layer fields that it sets.

    Shares of an allocator are worked out.

    `UserError` when the policy is of another number of layers, or its allocator needs a profile.
    """
    from avlprof.budgets.resolve import resolve_by_depth

    policy = resolve_by_depth(policy, layers)
    policy.check_layers(layers)
    fields = {name: value for name, value in flat(policy).items() if name in _per_layer(policy)}
    if policy.joint is None:
        fields = {"vision_keep": policy.vision_keep} | fields
    columns = {name: broadcast(_tuple(value), layers) for name, value in fields.items()}
    own = acts_on(policy)
    return [
        {"layer": i} | {name: values[i] for name, values in columns.items()} for i in own or range(layers)
    ]


def differences(first: Policy, second: Policy) -> list[dict[str, Any]]:
    """One row a field, and a layer where the field differs between layers, in which two policies differ.

    Name, description, source and provenance do not count. Policies written for different numbers
    of layers are compared field by field. Without a core, `vision_compute` is `vision_keep`, unless
    `vision_bits` tell the two apart.
    """
    ours, theirs = flat(first), flat(second)
    if ours["vision_compute"] != theirs["vision_compute"] and not (first.packs or second.packs):
        for side in (ours, theirs):
            if side["vision_compute"] is None:
                side["vision_compute"] = side["vision_keep"]
    counts = {count for count in (first.layers, second.layers) if count is not None}
    rows = []
    for name in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(name), theirs.get(name)
        if a == b:
            continue
        if len(counts) == 1 and (isinstance(a, list) or isinstance(b, list)) and name in _LISTED:
            wide = [broadcast(_tuple(value), *counts) for value in (a, b)]
            pairs = [(i, *pair) for i, pair in enumerate(zip(*wide, strict=True)) if pair[0] != pair[1]]
            rows += [{"field": name, "layer": i, "first": x, "second": y} for i, x, y in pairs]
        else:
            rows.append({"field": name, "layer": None, "first": a, "second": b})
    return rows


def flat(policy: Policy) -> dict[str, Any]:
    """What a policy says as `text.window: value`, with every default filled in."""
    data = policy.model_dump(mode="json", by_alias=True, exclude=set(NAMING))
    fields: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            fields[name] = value
    return fields


_LISTED = (
    "vision_keep",
    "vision_compute",
    "vision_bits",
    "head_shares",
    "text.window",
    "text.sink",
    "text.heavy",
    "text.keep",
    "text.bits",
    "joint.keep",
)


def _per_layer(policy: Policy) -> list[str]:
    """Per-layer fields that this policy sets."""
    ours, plain = flat(policy), flat(Policy(name=policy.name))
    return [name for name in _LISTED if name in ours and ours[name] != plain.get(name)]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _range(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"{value:g}"
    low, high = min(value), max(value)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
