"""One question about pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass

from PIL import Image

from avlprof.errors import UserError
from avlprof.tasks.text import quoted, storable
from avlprof.tasks.turn import ImageSource, Message, Turn, VideoSource, open_image


@dataclass(frozen=True)
class Sample:
    """A prompt with its pictures and reference answers.

    `images`, `videos` and `offsets` are as in `Turn`; they are opened only when `messages` or
    `open_images` is called, so a list of samples is cheap. `turns` are the messages of a
    conversation before the prompt, with pictures of their own. `group` names a kind of question
    within a task (results can be reported by it).

    Raises:
        UserError: a text that cannot be stored as UTF-8, since it holds half a surrogate pair.
    """

    id: str
    images: tuple[ImageSource, ...]
    prompt: str
    answers: tuple[str, ...] = ()
    group: str = ""
    videos: tuple[VideoSource, ...] = ()
    turns: tuple[Turn, ...] = ()
    offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        turns = tuple(turn.text for turn in self.turns)
        if storable((self.id, self.prompt, self.answers, self.group, turns)):
            return
        texts = {"id": self.id, "prompt": self.prompt, "answers": self.answers, "group": self.group}
        texts["turns"] = turns
        for field, text in texts.items():
            if not storable(text):
                raise UserError(
                    f"{field} of sample {quoted(self.id)} holds half a character (a lone surrogate), which "
                    f"no file can store: {quoted(text)}; write the text anew"
                )

    def conversation(self) -> tuple[Turn, ...]:
        """The earlier turns, and last the prompt."""
        return (*self.turns, Turn("user", self.prompt, self.images, self.videos, self.offsets))

    @property
    def asked(self) -> str:
        """All that is asked, in words: the prompt, behind the texts of earlier turns.

        A picture within a text is `<image>` there.
        """
        if not self.turns:
            return self.conversation()[-1].marked
        return json.dumps([[turn.role, turn.marked] for turn in self.conversation()])

    def messages(self) -> tuple[Message, ...]:
        """The conversation with its pictures open; what `Adapter.encode_chats` takes of a row.

        Raises:
            UserError: a picture cannot be read; sample and file are named.
        """
        return tuple(turn.opened(self.id) for turn in self.conversation())

    def open_images(self) -> list[Image.Image]:
        """The pictures of the prompt itself, as RGB; raises as `messages` does."""
        return [open_image(source, self.id) for source in self.images]
