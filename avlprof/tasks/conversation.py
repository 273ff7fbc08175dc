"""Whole conversations in one field: LLaVA's `conversations`, ShareGPT's, and OpenAI's `messages`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from avlprof.errors import UserError
from avlprof.tasks.picture import ImageSource
from avlprof.tasks.source import picture_source, video_source
from avlprof.tasks.text import listed, quoted
from avlprof.tasks.turn import Role, Turn, VideoSource, marked_turn

_USER: Final = frozenset({"human", "user"})
_ASSISTANT: Final = frozenset({"gpt", "assistant", "chatgpt", "model", "bot"})
_MARK = re.compile(r"<image(?:[ _]\d{1,4})?>|<video>", re.IGNORECASE)
_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_VIDEOS = ("video", "video_url", "input_video")


def messages_in(
    value: object,
    where: str,
    folder: Path,
    images: Sequence[ImageSource],
    videos: Sequence[VideoSource],
) -> list[Turn]:
    """The messages of a conversation; the last is by the user, or by the assistant behind one.

    A message is `{"from": "human", "value": "<image>..."}` as in LLaVA's files or `{"role": "user",
    "content": ...}`, whose content may be a list of parts. Pictures beside the conversation go
    where `<image>` stands, over all messages in turn; without any they go before the first
    message of the user.

    Args:
        value: the list of messages.
        where: begins the message of an error, as `x.json: entry 3: conversations`.
        folder: what paths are relative to.
        images, videos: those beside the conversation, in the order of their placeholders.

    Raises:
        UserError: what is not such a conversation; message, field and value are named.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} must be a list of messages, got {quoted(value)}")
    drafts = [_message(entry, f"{where}[{index}]", folder) for index, entry in enumerate(value)]
    _hand_out(drafts, list(images), list(videos), where)
    turns = [
        marked_turn(draft.role, draft.text, draft.images, draft.videos, f"{where}[{index}]")
        for index, draft in enumerate(drafts)
    ]
    asked = turns[-1] if turns[-1].role == "user" else turns[-2] if len(turns) > 1 else None
    if asked is None or asked.role != "user":
        raise UserError(f"{where} must end with a message by the user, or with the answer to one")
    if not asked.text.strip():
        raise UserError(f"{where} has no words in its last message by the user; a prompt must not be empty")
    return turns


@dataclass
class _Draft:
    """A message while it is read: its text with placeholders, and the pictures that it holds itself."""

    role: Role
    text: str = ""
    images: list[ImageSource] = field(default_factory=list)
    videos: list[VideoSource] = field(default_factory=list)

    def unfilled(self, kind: str) -> int:
        """Placeholders that pictures beside the conversation must fill."""
        count = sum(str(mark)[1:6].lower() == kind for mark in _MARK.findall(self.text))
        return max(0, count - len(self.images if kind == "image" else self.videos))


def _message(entry: object, where: str, folder: Path) -> _Draft:
    if not isinstance(entry, dict):
        raise UserError(
            f"{where} must be an object with from and value or role and content, got {quoted(entry)}"
        )
    draft = _Draft(_role(entry.get("from", entry.get("role")), where))
    content = next((entry[key] for key in ("value", "content", "text") if entry.get(key) is not None), None)
    if isinstance(content, str):
        draft.text = content
    elif isinstance(content, list):
        for index, part in enumerate(content):
            _add_part(draft, part, f"{where}.content[{index}]", folder)
    else:
        raise UserError(
            f"{where} must have a text in value or content, got {quoted(content)}; "
            f"the fields are {listed(entry)}"
        )
    return draft


def _role(author: object, where: str) -> Role:
    name = author.lower() if isinstance(author, str) else ""
    if name in _USER:
        return "user"
    if name in _ASSISTANT:
        return "assistant"
    more = "; avlprof asks without system prompts, so leave it out" if name == "system" else ""
    raise UserError(f"{where} must be from human or gpt, or user or assistant, got {quoted(author)}{more}")


def _add_part(draft: _Draft, part: object, where: str, folder: Path) -> None:
    """Add a part to a message; a picture without a path lies beside the conversation."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise UserError(f"{where} must be a text or an object with type, got {quoted(part)}")
    kind = part.get("type", "text")
    if kind in _TEXTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise UserError(f"{where}: text must be a text, got {quoted(text)}")
        draft.text += text
    elif kind in _IMAGES:
        draft.text += "<image>"
        value = _value(part, kind)
        if value is not None:
            draft.images.append(picture_source(value, folder, where))
    elif kind in _VIDEOS:
        draft.text += "<video>"
        value = _value(part, kind)
        if value is not None:
            draft.videos.append(video_source(value, folder, where))
    else:
        raise UserError(f"{where}: type must be text, image, image_url or video, got {quoted(kind)}")


def _value(part: dict[str, Any], kind: str) -> object:
    keys = (kind, "image_url", "video_url", "url", "path", "image", "video", "frames")
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    return value.get("url", value.get("path")) if isinstance(value, dict) and "bytes" not in value else value


def _hand_out(drafts: list[_Draft], images: list[ImageSource], videos: list[VideoSource], where: str) -> None:
    """Give the pictures beside a conversation to the messages whose placeholders ask for them."""
    for kind, beside in (("image", len(images)), ("video", len(videos))):
        wanted = sum(draft.unfilled(kind) for draft in drafts)
        if wanted not in (0, beside):
            raise UserError(
                f"{where} has {wanted} placeholders <{kind}> for {beside} {kind}s beside it; "
                "give as many of both"
            )
    for number, draft in enumerate(drafts):
        own_images, own_videos = draft.unfilled("image"), draft.unfilled("video")
        if (own_images and draft.images) or (own_videos and draft.videos):
            raise UserError(f"{where}[{number}] has pictures within it and beside it; give them in one way")
        draft.images += images[:own_images]
        draft.videos += videos[:own_videos]
        del images[:own_images], videos[:own_videos]
        if draft.role == "assistant" and (draft.images or draft.videos):
            raise UserError(
                f"{where}[{number}] is an answer with a picture, which no model gives; leave it out"
            )
    first = next((draft for draft in drafts if draft.role == "user"), drafts[0])
    first.images += images
    first.videos += videos
