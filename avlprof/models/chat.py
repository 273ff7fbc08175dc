"""What some families cannot take together in one batch, said before their processor or model fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from avlprof.errors import UserError
from avlprof.tasks.turn import Message

Chats = Sequence[Sequence[Message]]


def check_apart(family: str, chats: Chats) -> None:
    """For families whose model tells pictures and frames apart by nothing.

    Raises:
        UserError: a prompt, or the batch, has pictures and videos.
    """
    rows = [(any(m.images for m in chat), any(m.videos for m in chat)) for chat in chats]
    if any(pictured and filmed for pictured, filmed in rows):
        raise UserError(
            f"a prompt of '{family}' may have pictures or videos, got both; give the frames as images"
        )
    if any(pictured for pictured, _ in rows) and any(filmed for _, filmed in rows):
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
            counts = " and ".join(map(str, sorted(lengths)))
            raise UserError(
                f"videos of a {part} of '{family}' must have the same number of frames, got {counts}; {way}"
            )


FRAMES_PER_SECOND: Final = 2.0
"""How far apart the frames of a video are taken to be.

Families that tell the model the time of a frame (Qwen2.5-VL, Qwen3-VL, GLM-4V, SmolVLM) need it,
and a folder of frames does not say. It is the rate of Qwen's and GLM-4V's own sampling; left out,
processors assume 24, which puts the frames of a short film at one and the same time.
"""


def chat_text(processor: Any, family: str, chat: Sequence[Message]) -> str:
    """The conversation in the model's own chat form, ready for the answer.

    A processor without a chat template (base models, PaliGemma) gets its image tokens and then
    the bare text of the one message.

    Raises:
        UserError: the processor has no place for videos, or its template is missing, raises
            something or leaves out a message of the conversation.
    """
    if any(message.videos for message in chat) and getattr(processor, "video_processor", None) is None:
        raise UserError(
            f"the processor of '{family}' takes no videos; give the frames as images, or use a model with "
            "videos such as qwen2.5-vl"
        )
    if getattr(processor, "chat_template", None) is None:
        if len(chat) != 1 or chat[0].videos:
            raise UserError(
                f"the processor of '{family}' has no chat template, so it takes one prompt with images; "
                "leave out turns and videos"
            )
        token = str(getattr(processor, "image_token", "<image>"))
        return "".join(token if kind == "image" else text for kind, text in chat[0].parts())
    messages = [{"role": message.role, "content": _content(message)} for message in chat]
    text = _templated(processor, family, messages)
    lost = next((message for message in chat if not _holds(text, message)), None)
    if lost is not None:
        raise UserError(
            f"the chat template of '{family}' leaves out the {lost.role}'s message '{_short(lost.text)}'; "
            "use a model whose template takes a whole conversation"
        )
    return text


def _templated(processor: Any, family: str, messages: list[dict[str, Any]]) -> str:
    """Messages in the model's own chat form; what a template raises is told in its own words."""
    try:
        text = str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if str(messages[0]["content"]) not in text:  # else the list was printed for a text
            return text
    except Exception as error:  # templates run code of their own
        plain = [message | {"content": _texts(message["content"])} for message in messages]
        try:
            processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        except Exception:
            raise UserError(
                f"the chat template of '{family}' refuses this conversation: {one_line(error)}"
            ) from error
    raise UserError(
        f"the chat template of '{family}' takes text alone, without a place for pictures; give the model's "
        "folder the template that it was trained with (chat_template.jinja)"
    )


def _texts(content: Sequence[dict[str, str]]) -> str:
    return "".join(part.get("text", "") for part in content)


_FROM_CONFIG: Final = ("patch_size", "vision_feature_select_strategy")


def complete(processor: Any, config: Any) -> None:
    """Fill in what an older export of a processor left out and the model's config says."""
    vision = getattr(config, "vision_config", None)
    for name in lacking(processor):
        value = getattr(config, name, None) or getattr(vision, name, None)
        if value is not None:
            setattr(processor, name, value)
    # CLIP's class token is there, whatever the strategy does with it
    clip = getattr(vision, "model_type", None) == "clip_vision_model"
    if clip and getattr(processor, "num_additional_image_tokens", None) == 0:
        processor.num_additional_image_tokens = 1


def lacking(processor: Any) -> list[str]:
    """Fields that a processor has without a value."""
    return [name for name in _FROM_CONFIG if getattr(processor, name, name) is None]


def one_line(error: Exception) -> str:
    """What an exception says, in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def processor_inputs(chats: Sequence[Sequence[Message]]) -> dict[str, Any]:
    """The pictures and videos of a batch, as arguments of a processor.

    Pictures are lists a row, None for none. Every frame of a video is used: nothing is sampled. Of
    time, the processor learns `FRAMES_PER_SECOND`.
    """
    images = [[image for message in chat for image in message.images] for chat in chats]
    videos = [list(video) for chat in chats for message in chat for video in message.videos]
    media: dict[str, Any] = {"images": images if any(images) else None}
    if videos:
        media |= {
            "videos": videos,
            "do_sample_frames": False,
            "video_metadata": [_timing(len(video)) for video in videos],
        }
    return media


def _timing(frames: int) -> dict[str, Any]:
    """What a processor asks of a video of so many frames."""
    return {
        "total_num_frames": frames,
        "fps": FRAMES_PER_SECOND,
        "duration": frames / FRAMES_PER_SECOND,
        "frames_indices": list(range(frames)),
    }


def _content(message: Message) -> list[dict[str, str]]:
    return [
        {"type": "text", "text": text} if kind == "text" else {"type": kind} for kind, text in message.parts()
    ]


def _holds(text: str, message: Message) -> bool:
    """Whether a chat holds the words of a message, in pieces where pictures stand between them."""
    return all(words.strip() in text for kind, words in message.parts() if kind == "text")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
