"""Families that differ from the generic adapter, and the choice of the right one."""

from __future__ import annotations

from typing import Any, Final

from avlprof.models.adapter import Adapter
from avlprof.registry import Registry

FAMILIES: Final[Registry[type[Adapter]]] = Registry(
    "adapter",
    {
        "llava": "avlprof.models.families.llava:LlavaAdapter",
        "vipllava": "avlprof.models.families.square:SquareAdapter",
        "paligemma": "avlprof.models.families.square:SquareAdapter",
        "gemma3": "avlprof.models.families.square:SquareAdapter",
        "llava_next": "avlprof.models.families.anyres:LlavaNextAdapter",
        "llava_onevision": "avlprof.models.families.anyres:LlavaOnevisionAdapter",
        "internvl": "avlprof.models.families.tiled:InternVLAdapter",
        "aya_vision": "avlprof.models.families.tiled:AyaVisionAdapter",
        "idefics3": "avlprof.models.families.idefics:IdeficsAdapter",
        "smolvlm": "avlprof.models.families.idefics:SmolVLMAdapter",
        "mistral3": "avlprof.models.families.mistral3:Mistral3Adapter",
        "qwen2_vl": "avlprof.models.families.qwen_vl:QwenVLAdapter",
        "qwen2_5_vl": "avlprof.models.families.qwen_vl:QwenVLAdapter",
        "qwen3_vl": "avlprof.models.families.qwen_vl:QwenVLAdapter",
        "glm4v": "avlprof.models.families.qwen_vl:Glm4vAdapter",
    },
)


def adapter_for(model: Any, processor: Any = None) -> Adapter:
    """The adapter of a model, by its `model_type`; the generic one where the family has none.

    Raises:
        UserError: the model has no vision tokens or no decoder layers.
    """
    family = str(model.config.model_type)
    kind = FAMILIES.get(family) if family in FAMILIES.names() else Adapter
    return kind(model, processor)
