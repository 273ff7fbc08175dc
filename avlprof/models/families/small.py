"""The fetched model `small`: a LLaVA that knows its own pages, and says so of other pictures."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from avlprof.models.families.tiny import TinyAdapter
from avlprof.models.small import FOREIGN
from avlprof.tasks.pages.page import is_page


@dataclass(frozen=True)
class SmallAdapter(TinyAdapter):
    """LLaVA 1.5 whose first picture of another kind than task `pages` draws gives one warning."""

    def foreign(self, picture: Image.Image) -> str | None:
        return None if is_page(picture) else FOREIGN
