"""The one matrix of policies, for models of three layers; tests choose from it by name.

`POLICIES` has one of each kind that the runtime knows. The others are what a kind of test asks for
beside it: forced scoring, several turns, every family, and A-VL step by step.
"""

from __future__ import annotations

from avlprof.policy import (
    DENSE,
    CoreScore,
    JointPool,
    Policy,
    PrefillFilter,
    ScorerSpec,
    TextPolicy,
    find_policy,
)

KEEP = (0.62, 0.3, 0.45)
CORE = (0.33, 0.1, 0.2)
ACCUMULATED, LAST, POSITION = (
    ScorerSpec(name="accumulated"),
    ScorerSpec(name="last_query"),
    ScorerSpec(name="position"),
)
POLICIES = {
    "evict": Policy(vision_keep=KEEP),
    "all gone in a layer": Policy(vision_keep=(1.0, 0.0, 0.5)),
    "core, k=3": Policy(vision_keep=KEEP, vision_compute=CORE, refresh_interval=3),
    "core, k=1": Policy(vision_keep=0.6, vision_compute=0.25, refresh_interval=1),
    "static core": Policy(vision_keep=KEEP, vision_compute=CORE),
    "window": Policy(text=TextPolicy(window=(4, 6, 11), sink=(1, 0, 3))),
    "core and window": Policy(
        vision_keep=KEEP, vision_compute=CORE, refresh_interval=4, text=TextPolicy(window=5, sink=2)
    ),
    "per head": Policy(vision_keep=KEEP, vision_compute=CORE, refresh_interval=2, heads="kv_head"),
    "accumulated": Policy(vision_keep=KEEP, vision_compute=CORE, refresh_interval=5, scorer=ACCUMULATED),
    "position": Policy(vision_keep=0.5, scorer=POSITION),
    "score only": Policy(
        vision_keep=KEEP, vision_compute=CORE, refresh_interval=3, refresh="score_only", heads="kv_head"
    ),
    "scored core": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=3,
        core_score=CoreScore(prompt=0.4, memory=0.7),
        text=TextPolicy(window=5, sink=2),
    ),
    "scored per head": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=4,
        refresh="score_only",
        core_score=CoreScore(memory=0.5),
        heads="kv_head",
        scorer=ACCUMULATED,
    ),
    "scored history": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=2,
        refresh="score_only",
        core_score=CoreScore(prompt=0.6),
        text=TextPolicy(keep=(0.5, 0.35, 0.7), minimum=4, scorer="history"),
    ),
    "triggered": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=2,
        refresh="triggered",
        refresh_margin=0.05,
        text=TextPolicy(window=5, sink=2),
    ),
    "triggered per head": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=1,
        refresh="triggered",
        refresh_margin=0.01,
        core_score=CoreScore(prompt=0.3, memory=0.6),
        heads="kv_head",
    ),
    "followed": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=2,
        refresh="score_only",
        refresh_layers=(0,),
        text=TextPolicy(window=5, sink=2),
    ),
    "followed per head": Policy(
        vision_keep=(0.62, 0.5, 0.45),
        vision_compute=(0.33, 0.5, 0.2),
        refresh_interval=1,
        refresh="score_only",
        refresh_layers=(1,),
        core_score=CoreScore(prompt=0.4, memory=0.5),
        heads="kv_head",
    ),
    "triggered and followed": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=1,
        refresh="triggered",
        refresh_margin=0.01,
        refresh_layers=(0, 2),
        core_score=CoreScore(memory=0.5),
    ),
    "history": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=4,
        text=TextPolicy(keep=(0.5, 0.35, 0.7), minimum=4, scorer="history"),
    ),
    "h2o text": Policy(
        vision_keep=0.5, text=TextPolicy(keep=0.4, minimum=5, recent=0.3, scorer="accumulated")
    ),
    "newest share": Policy(text=TextPolicy(keep=(0.5, 0.3, 0.9), minimum=3), vision_keep=0.4),
    "heavy": Policy(
        vision_keep=KEEP, text=TextPolicy(window=3, sink=(0, 1, 2), heavy=(4, 2, 0), scorer="accumulated")
    ),
    "streaming": Policy(pool="joint", joint=JointPool(keep=0.3, sink=2), scorer=POSITION),
    "h2o": Policy(
        pool="joint",
        joint=JointPool(keep=(0.3, 0.5, 0.2), sink=1, recent_share=0.5),
        scorer=ACCUMULATED,
        heads="kv_head",
    ),
    "tova": Policy(pool="joint", joint=JointPool(keep=0.4, sink=0), scorer=LAST),
    "snapkv": Policy(
        pool="joint",
        joint=JointPool(keep=0.4, sink=0, recent=5, decoding="grow"),
        scorer=LAST,
        heads="kv_head",
    ),
    "filter": Policy(
        vision_keep=(0.8, 0.5, 0.4),
        vision_compute=(0.5, 0.2, 0.2),
        refresh_interval=3,
        prefill_filter=(PrefillFilter(after_layer=1, keep=0.6),),
    ),
    "two filters": Policy(
        prefill_filter=(PrefillFilter(after_layer=1, keep=0.7), PrefillFilter(after_layer=2, keep=0.3)),
        text=TextPolicy(keep=0.6, minimum=4, scorer="history"),
    ),
}

PACKED = {
    "packed": Policy(vision_keep=KEEP, vision_bits=(4, 2, 8)),
    "packed all": Policy(vision_bits=3, text=TextPolicy(window=6, sink=1)),
    "packed core": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=3,
        vision_bits=(3, 8, 2),
        text=TextPolicy(window=5, sink=2),
    ),
    "packed per head": Policy(
        vision_keep=0.6, vision_compute=0.25, refresh_interval=1, heads="kv_head", vision_bits=4
    ),
    "packed score only": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=2,
        refresh="score_only",
        vision_bits=(4, 16, 3),
    ),
    "packed scored": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=3,
        core_score=CoreScore(prompt=0.5, memory=0.6),
        vision_bits=(3, 8, 2),
        text=TextPolicy(window=6),
    ),
    "packed scored per head": Policy(
        vision_keep=0.6,
        vision_compute=0.25,
        refresh_interval=2,
        refresh="score_only",
        core_score=CoreScore(memory=0.8),
        heads="kv_head",
        vision_bits=(4, 16, 3),
    ),
    "packed triggered": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=1,
        refresh="triggered",
        refresh_margin=0.01,
        vision_bits=(3, 16, 2),
        text=TextPolicy(bits=(16, 4, 3)),
    ),
    "packed followed": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=1,
        refresh="score_only",
        refresh_layers=(0,),
        core_score=CoreScore(prompt=0.5, memory=0.5),
        heads="kv_head",
        vision_bits=(4, 16, 3),
    ),
    "packed history": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=4,
        vision_bits=2,
        text=TextPolicy(keep=(0.5, 0.35, 0.7), minimum=4, scorer="history"),
    ),
    "packed h2o text": Policy(
        vision_keep=0.5, vision_bits=4, text=TextPolicy(keep=0.4, minimum=5, recent=0.3, scorer="accumulated")
    ),
    "packed filter": Policy(
        vision_keep=(0.8, 0.5, 0.4),
        vision_compute=(0.5, 0.5, 0.2),
        refresh_interval=3,
        vision_bits=3,
        prefill_filter=(PrefillFilter(after_layer=1, keep=0.6),),
    ),
    "packed text": Policy(vision_keep=KEEP, vision_bits=(4, 16, 2), text=TextPolicy(bits=(4, 3, 16))),
    "packed text alone": Policy(text=TextPolicy(bits=(2, 16, 4))),
    "packed text and core": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=3,
        vision_bits=(3, 16, 2),
        text=TextPolicy(bits=(16, 4, 3)),
    ),
    "packed text per head": Policy(
        vision_keep=0.6,
        vision_compute=0.25,
        refresh_interval=2,
        refresh="score_only",
        core_score=CoreScore(memory=0.8),
        heads="kv_head",
        vision_bits=(4, 16, 3),
        text=TextPolicy(bits=3),
    ),
    "packed text and filter": Policy(
        vision_keep=(0.8, 0.5, 0.4),
        text=TextPolicy(bits=4),
        prefill_filter=(PrefillFilter(after_layer=1, keep=0.6),),
    ),
}
"""Stored vision, or text, in few bits: with and without a core, beside all that a core goes with."""

POLICIES |= PACKED

TESTED = (
    *("core and window", "per head", "history", "h2o", "filter"),
    *("packed", "packed core", "packed per head", "packed score only", "packed history"),
    *("scored core", "scored per head", "scored history", "packed scored", "packed scored per head"),
    *("triggered and followed", "packed triggered", "packed followed"),
    "packed text and core",
)
"""One of each part: what `make test` runs of a large matrix."""

QUICK = ("core and window", "history", "h2o", "packed", "packed core", "scored core", "packed text and core")
"""What `make quick` runs of that: a core and a window, text by score, one pool, a core by score."""

SCORED = {
    *("history", "h2o text", "heavy", "h2o", "tova", "two filters"),
    *("packed history", "packed h2o text"),
    *("scored core", "scored per head", "scored history", "packed scored", "packed scored per head"),
    "packed text per head",
    *("triggered", "triggered per head", "followed per head", "triggered and followed"),
    *("packed triggered", "packed followed"),
}
"""Those whose scores run while decoding, or whose steps say when they refresh: none can be captured."""

_CORED = {"vision_keep": KEEP, "vision_compute": CORE, "refresh": "score_only"}
LED = {
    "at every step": Policy(**_CORED, refresh_interval=1, refresh_layers=(0,)),
    "by two": Policy(**_CORED, refresh_interval=3, refresh_layers=(0, 2), heads="kv_head"),
    "packed": Policy(
        **_CORED,
        refresh_interval=2,
        refresh_layers=(0,),
        heads="kv_head",
        vision_bits=(4, 16, 3),
        text=TextPolicy(bits=4),
    ),
    "by one without a core": Policy(
        **_CORED | {"vision_keep": (0.62, 0.5, 0.45), "vision_compute": (0.33, 0.5, 0.2)},
        refresh_interval=2,
        refresh_layers=(1,),
        text=TextPolicy(window=5, sink=2),
    ),
    "by one that keeps all": Policy(
        **_CORED | {"vision_keep": (1.0, 0.5, 0.45), "vision_compute": (1.0, 0.2, 0.2)},
        refresh_interval=1,
        refresh_layers=(0,),
    ),
    "by one that keeps none": Policy(
        **_CORED | {"vision_keep": (0.0, 0.5, 0.45), "vision_compute": (0.0, 0.2, 0.2)},
        refresh_interval=1,
        refresh_layers=(0, 2),
    ),
}
"""Layers that follow others, whose prompts and cores differ in what a capture could take for fixed."""

FORCED = POLICIES | {
    "dense": DENSE,
    "k larger than the answer": Policy(vision_keep=0.5, vision_compute=0.1, refresh_interval=32),
    "random": Policy(vision_keep=0.4, scorer=ScorerSpec(name="random", options={"seed": 3})),
    "score only, k=1": Policy(vision_keep=0.6, vision_compute=0.2, refresh_interval=1, refresh="score_only"),
    "score only and history": Policy(
        vision_keep=0.6,
        vision_compute=0.2,
        refresh_interval=2,
        refresh="score_only",
        text=TextPolicy(keep=0.5, minimum=3, scorer="history"),
    ),
    "newest grow": Policy(
        pool="joint",
        joint=JointPool(keep=(0.3, 0.6, 0.1), sink=2, recent_share=0.3, decoding="grow"),
        scorer=ScorerSpec(name="value_norm"),
    ),
    "one token": Policy(pool="joint", joint=JointPool(keep=0.0, sink=3), scorer=ACCUMULATED),
}
"""For forced scoring: the edges of its row-by-row scan as well."""

TURNS = {
    "core": POLICIES["core, k=3"],
    "per head": POLICIES["per head"],
    "window": Policy(vision_keep=0.5, text=TextPolicy(window=(4, 6, 11), sink=(1, 0, 3))),
    "newest share": Policy(vision_keep=0.5, text=TextPolicy(keep=0.4, minimum=3)),
    "history": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=4,
        text=TextPolicy(keep=0.4, minimum=4, scorer="history"),
    ),
    "packed": POLICIES["packed"],
    "packed core": POLICIES["packed core"],
    "packed per head": POLICIES["packed per head"],
    "packed history": POLICIES["packed history"],
    "scored core": POLICIES["scored core"],
    "scored per head": POLICIES["scored per head"],
    "packed scored": POLICIES["packed scored"],
    "triggered and followed": POLICIES["triggered and followed"],
    "packed followed": POLICIES["packed followed"],
    "streaming": POLICIES["streaming"],
    "h2o": Policy(pool="joint", joint=JointPool(keep=0.4, sink=1, recent_share=0.5), scorer=ACCUMULATED),
    "tova": POLICIES["tova"],
    "snapkv": Policy(pool="joint", joint=JointPool(keep=0.4, recent=5, decoding="grow"), heads="kv_head"),
    "filter": Policy(
        vision_keep=(0.8, 0.5, 0.4),
        prefill_filter=(PrefillFilter(after_layer=1, keep=0.6),),
        text=TextPolicy(window=5),
    ),
}
"""For several turns on one cache: two pictures, and text that a later turn finds evicted."""

PLAIN = {
    "core": POLICIES["core, k=3"],
    "accumulated and window": Policy(
        vision_keep=(0.4, 0.55, 0.3), scorer=ACCUMULATED, text=TextPolicy(window=5, sink=1)
    ),
}
"""For every family: eviction, a core, a window."""

SCORING = {
    "history": Policy(
        vision_keep=KEEP,
        vision_compute=CORE,
        refresh_interval=3,
        text=TextPolicy(keep=(0.5, 0.35, 0.7), minimum=3, scorer="history"),
    ),
    "h2o": POLICIES["h2o"],
    "snapkv": Policy(
        pool="joint",
        joint=JointPool(keep=0.4, sink=0, recent=4, decoding="grow"),
        scorer=LAST,
        heads="kv_head",
    ),
    "tova": POLICIES["tova"],
    "score only": POLICIES["score only"],
    "scored core": POLICIES["scored core"],
    "heavy": Policy(
        vision_keep=(0.5, 0.3, 0.45),
        text=TextPolicy(window=3, sink=(0, 1, 2), heavy=(4, 2, 1), scorer="accumulated"),
    ),
}
"""For every family: the kinds that score text or a joint pool."""

_A_VL = find_policy("paper/a-vl")
_HALF = TextPolicy(keep=0.5, minimum=6, scorer="history")
ADAPTIVE = {
    "adaptive": Policy(vision_keep=KEEP, heads="adaptive"),
    "adaptive, no floor": Policy(
        vision_keep=(0.3, 0.0, 0.7),
        heads="adaptive",
        head_floor=0.0,
        scorer=ACCUMULATED,
        text=TextPolicy(window=5, sink=2),
    ),
    "adaptive, 4 bits": Policy(vision_keep=KEEP, heads="adaptive", vision_bits=(4, 16, 2)),
    "adaptive, packed text": Policy(
        vision_keep=KEEP, heads="adaptive", vision_bits=(16, 4, 16), text=TextPolicy(bits=(4, 3, 16))
    ),
    "adaptive, history": Policy(
        vision_keep=KEEP,
        heads="adaptive",
        text=TextPolicy(keep=(0.5, 0.35, 0.7), minimum=4, scorer="history"),
    ),
    "adaptive, filtered": Policy(
        vision_keep=0.4, heads="adaptive", prefill_filter=(PrefillFilter(after_layer=1, keep=0.6),)
    ),
}
"""Heads that differ in how many vision tokens they keep."""

A_VL = {
    "paper/a-vl": _A_VL,
    "paper/a-vl-prefill": find_policy("paper/a-vl-prefill"),
    "small minimum": _A_VL.model_copy(update={"text": _HALF}),
    "K = -1": Policy(vision_keep=0.5, vision_compute=0.5, refresh_interval=5, text=_HALF),
    "H2O text": Policy(
        vision_keep=0.5,
        vision_compute=0.25,
        refresh_interval=3,
        text=TextPolicy(keep=0.5, recent=0.3, minimum=20, scorer="accumulated"),
    ),
}
"""For A-VL step by step, of one to three layers."""
