"""The embedded model: a LLaVA that knows one kind of picture, and says so of others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from avlprof.models.families.llava import LlavaAdapter
from avlprof.models.tiny import FOREIGN
from avlprof.tasks.shapes.scene import is_drawn
from avlprof.tasks.turn import Message

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TinyAdapter(LlavaAdapter):
    """LLaVA 1.5 whose first picture of another kind than task `shapes` draws gives one warning."""

    _warned: list[str] = field(default_factory=list, repr=False, compare=False)

    def foreign(self, picture: Image.Image) -> str | None:
        """What to say of a picture that the model does not know; None for those of its own kind."""
        return None if is_drawn(picture) else FOREIGN

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> dict[str, Tensor]:
        if not self._warned:
            pictures = (picture for chat in chats for message in chat for picture in message.pictures())
            said = next(filter(None, map(self.foreign, pictures)), None)
            if said is not None:
                self._warned.append(said)
                _log.warning(said)
        return super().encode_chats(chats)
