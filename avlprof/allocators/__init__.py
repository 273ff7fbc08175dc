"""How a budget is spread over layers; one idea a file."""

from __future__ import annotations

from avlprof.allocators._base import Allocator, Evidence
from avlprof.allocators.blend import Blend
from avlprof.allocators.governed import Governed
from avlprof.allocators.sharp import Sharp
from avlprof.registry import Registry

ALLOCATORS: Registry[type[Allocator]] = Registry(
    "allocator",
    {
        "uniform": "avlprof.allocators.uniform:Uniform",
        "pyramid": "avlprof.allocators.pyramid:Pyramid",
        "sigmoid": "avlprof.allocators.sigmoid:Sigmoid",
        "coverage": "avlprof.allocators.coverage:Coverage",
        "sparsity": "avlprof.allocators.sparsity:Sparsity",
        "entropy": "avlprof.allocators.entropy:Entropy",
        "strength": "avlprof.allocators.strength:Strength",
        "sensitivity": "avlprof.allocators.sensitivity:Sensitivity",
    },
)


def make_allocator(name: str, mix: float = 1.0, temperature: float = 1.0, **options: float) -> Allocator:
    """The allocator of a name, sharpened by `temperature`, then mixed with `1 - mix` parts of uniform.

    It is asked about the layers that policies act on alone. `UserError` for an unknown name or option,
    with its nearest neighbours.
    """
    return Governed(Blend(Sharp(ALLOCATORS.make(name, options), temperature), mix))


__all__ = [
    "ALLOCATORS",
    "Allocator",
    "Blend",
    "Evidence",
    "Governed",
    "Sharp",
    "make_allocator",
]
