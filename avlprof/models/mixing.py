"""What some families cannot take together in one batch, said before their processor or model fails."""

from __future__ import annotations

from collections.abc import Sequence

from avlprof.errors import UserError
from avlprof.tasks.turn import Message

Chats = Sequence[Sequence[Message]]


def check_apart(family: str, chats: Chats) -> None:
    """For families whose model tells pictures and frames apart by nothing.

    Raises:
        UserError: a prompt, or the batch, has pictures and videos.
    """
    rows = [(any(m.images for m in chat), any(m.videos for m in chat)) for chat in chats]
    if any(shown and filmed for shown, filmed in rows):
        raise UserError(
            f"a prompt of '{family}' may have pictures or videos, got both; give the frames as images"
        )
    if any(shown for shown, _ in rows) and any(filmed for _, filmed in rows):
        raise UserError(
            f"a batch of '{family}' may have pictures or videos, got both; run such samples with batch size 1"
        )


def check_equal_length(family: str, chats: Chats) -> None:
    """For families whose processor stacks the videos of a batch.

    Raises:
        UserError: the videos have different numbers of frames.
    """
    rows = [[len(video) for message in chat for video in message.videos] for chat in chats]
    for part, lengths in (
        *(("prompt", set(row)) for row in rows),
        ("batch", {length for row in rows for length in row}),
    ):
        if len(lengths) > 1:
            way = "give frames as images" if part == "prompt" else "run such samples with batch size 1"
            found = " and ".join(map(str, sorted(lengths)))
            raise UserError(
                f"videos of a {part} of '{family}' must have the same number of frames, got {found}; {way}"
            )
