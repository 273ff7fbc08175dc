"""A model plug-in of lmms-eval: any of its tasks under a policy.

`lmms_eval` is imported only when it asks for the model.
"""

from __future__ import annotations

from typing import Any

from avlprof.lmms.arguments import model_args

__all__ = ["manifest", "model_args"]


def manifest() -> Any:
    """What the entry point `lmms_eval.models` gives: the model `avlprof`, a `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("avlprof", simple_class_path="avlprof.lmms.model.AVLProf")
