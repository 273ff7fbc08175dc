"""An interactive page about a run: take a word and see where it looks, or a patch and see who looks at it."""

from typing import TYPE_CHECKING

from avlprof._lazy import exports

if TYPE_CHECKING:
    from avlprof.explore.page import Explorer, Side

__all__ = ["Explorer", "Side"]

__getattr__, __dir__ = exports(__name__, {"Explorer": "avlprof.explore.page", "Side": "avlprof.explore.page"})
