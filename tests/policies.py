"""The matrix of policies that tests of the runtime run: each rule and each joint pool once."""

from __future__ import annotations

from avlprof.policy import JointPool, Policy, PrefillFilter, ScorerSpec, TextPolicy

KEEP = (0.62, 0.3, 0.45)
CORE = (0.33, 0.1, 0.2)
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
    "accumulated": Policy(
        vision_keep=KEEP, vision_compute=CORE, refresh_interval=5, scorer=ScorerSpec(name="accumulated")
    ),
    "position": Policy(vision_keep=0.5, scorer=ScorerSpec(name="position")),
    "score only": Policy(
        vision_keep=KEEP, vision_compute=CORE, refresh_interval=3, refresh="score_only", heads="kv_head"
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
    "streaming": Policy(pool="joint", joint=JointPool(keep=0.3, sink=2), scorer=ScorerSpec(name="position")),
    "h2o": Policy(
        pool="joint",
        joint=JointPool(keep=(0.3, 0.5, 0.2), sink=1, recent_share=0.5),
        scorer=ScorerSpec(name="accumulated"),
        heads="kv_head",
    ),
    "tova": Policy(pool="joint", joint=JointPool(keep=0.4, sink=0), scorer=ScorerSpec(name="last_query")),
    "snapkv": Policy(
        pool="joint",
        joint=JointPool(keep=0.4, sink=0, recent=5, decoding="grow"),
        scorer=ScorerSpec(name="last_query"),
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

SCORED = {"history", "h2o text", "heavy", "h2o", "tova", "two filters"}
"""Those that evict by score while decoding."""
