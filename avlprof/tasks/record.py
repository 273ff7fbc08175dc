"""One line of a file of samples, whatever its form, as a sample."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from avlprof.errors import UserError
from avlprof.tasks.conversation import messages_in
from avlprof.tasks.fields import CHATS, FIELDS, answers_in, usual, value_at, written_answers
from avlprof.tasks.picture import ImageSource
from avlprof.tasks.sample import Sample
from avlprof.tasks.source import numbered_picture, picture_source, video_source
from avlprof.tasks.splits import ALL
from avlprof.tasks.text import listed, quoted, storable
from avlprof.tasks.turn import ROLES, Turn, VideoSource, marked_turn
from avlprof.tasks.wording import Wording

_LETTERS = "ABCDEFGHIJ"
_OPTIONS = ("choices", "options")
_CHOICE = Wording(
    "{hint}\n{question}\n{choices}\nAnswer with the option's letter from the given choices directly.",
    "choices",
)
_READ = ("images", "videos", "video", "turns", "split", "image_id", "hint", *_OPTIONS, *CHATS)


@dataclass(frozen=True)
class Row:
    """One entry of a file: its fields, the folder of its paths, and `where` it stands, for messages.

    `number` is its id when it has none; `typed` says that numbers have a type (a column of
    parquet), so that answers may be numbers.
    """

    where: str
    number: str
    values: Mapping[str, Any]
    folder: Path
    typed: bool = False


@dataclass(frozen=True)
class Record:
    """A sample with where it stands in its file, its split, and the fields that nothing read."""

    where: str
    sample: Sample
    split: str | None
    picture: str | None = None
    unused: frozenset[str] = field(default_factory=frozenset)


def record_of(row: Row, columns: Mapping[str, str], keyed: bool = True) -> Record:
    """The sample of a row; `columns` names fields that have unusual names.

    A row is a prompt with pictures, or a whole conversation (`conversations`, `messages`). Its
    last message by the user becomes the prompt, a last one by the assistant the answer. Of
    multiple choice (`choices`, `options`, or columns A, B, ...) the options are written below the
    question, and the answer becomes a letter.

    Args:
        keyed: whether ids are taken from the row; else it is named by its number.

    Raises:
        UserError: a field is missing or no such thing; place, field and value are named.
    """
    _check_texts(row)
    fields = _Fields(row, columns)
    split = fields.text("split", "split")
    if split in (ALL, ""):
        raise UserError(f"{row.where}: split must be a name other than '{ALL}', got {quoted(split)}")
    images, videos = _pictures(fields)
    chat = next((name for name in CHATS if row.values.get(name) is not None), None)
    if chat is None:
        turns = _turns(row)
        prompt, answers = _question(fields)
        last = marked_turn("user", prompt, images, videos, f"{row.where}: {fields.name('prompt')}")
    else:
        *turns, last = messages_in(row.values[chat], f"{row.where}: {chat}", row.folder, images, videos)
        answers = fields.answers()
        if last.role == "assistant":
            answers = answers or (last.text,)
            last = turns.pop()
    if not any(turn.images or turn.videos for turn in (*turns, last)):
        raise UserError(
            f"{row.where}: must have either image (a path) or images (a list of paths), or videos; "
            f"the fields are {listed(row.values)}"
        )
    sample = Sample(
        id=fields.identity() if keyed else row.number,
        images=last.images,
        prompt=last.text,
        answers=answers,
        group=fields.text("group") or "",
        videos=last.videos,
        turns=tuple(turns),
        offsets=last.offsets,
    )
    return Record(row.where, sample, split, fields.key(), fields.unused())


def check_columns_of(row: Row, columns: Mapping[str, str]) -> None:
    """`UserError` for a column that the user names and the row has not."""
    for name, column in columns.items():
        if column not in row.values and value_at(row.values, column) is None:
            raise UserError(
                f"{row.where}: column '{column}' (for {name}) is not there; "
                f"the fields are {listed(row.values)}"
            )


class _Fields:
    """The fields of a row by what they mean, and which of them were looked at."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        self.row, self.columns = row, columns
        self.names = tuple(name for name, value in row.values.items() if value is not None)

    def name(self, field: str) -> str:
        """What a field is called in this row; its own name where it is not there."""
        return self.columns.get(field) or usual(field, self.names) or field

    def get(self, field: str) -> object:
        return value_at(self.row.values, self.name(field))

    def text(self, field: str, name: str | None = None) -> str | None:
        name = name or self.name(field)
        value = value_at(self.row.values, name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.row.where}: {name} must be a text, got {quoted(value)}")
        return value

    def identity(self) -> str:
        value = self.row.number if self.get("id") is None else self.get("id")
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise UserError(
                f"{self.row.where}: {self.name('id')} must be text or a whole number, got {quoted(value)}"
            )
        return str(value)

    def key(self) -> str | None:
        """What tells the pictures of this row apart from those of others, if the user names it."""
        return str(self.get("picture")) if "picture" in self.columns else None

    def answers(self) -> tuple[str, ...]:
        value = self.get("answers")
        if self.row.typed:
            return answers_in(value)
        return written_answers(value, f"{self.row.where}: {self.name('answers')}")

    def unused(self) -> frozenset[str]:
        return _unused(tuple(self.row.values), self.names, tuple(self.columns.items()))


@lru_cache(maxsize=1024)
def _unused(
    keys: tuple[str, ...], names: tuple[str, ...], columns: tuple[tuple[str, str], ...]
) -> frozenset[str]:
    """Fields among `keys` that nothing reads; those of `names` hold something."""
    named = dict(columns)
    read = {*_READ, *(named.get(field) or usual(field, names) or field for field in FIELDS)}
    letters = _LETTERS if "A" in names and "B" in names else ""
    numbered = {name for name in keys if re.fullmatch(r"image_\d+", name)}
    return frozenset(keys) - numbered - {column.partition(".")[0] for column in read} - set(letters)


def _check_texts(row: Row) -> None:
    if storable(row.values):
        return
    for name, value in row.values.items():
        if not storable(name) or not storable(value):
            raise UserError(
                f"{row.where}: {quoted(name)[1:-1]} holds half a character (a lone surrogate), which no "
                f"file can store: {quoted(value)}; write the text anew"
            )


def _question(fields: _Fields) -> tuple[str, tuple[str, ...]]:
    """The prompt and its answers; with options below it in multiple choice."""
    row, name = fields.row, fields.name("prompt")
    prompt = fields.text("prompt")
    if prompt is None or not prompt.strip():
        raise UserError(
            f"{row.where}: {name} must be a text that is not empty, got {quoted(prompt)}; the fields are "
            f"{listed(row.values)}; call one of them prompt, or name it with columns prompt=NAME"
        )
    options = _options(row)
    if not options:
        return prompt, fields.answers()
    hint = row.values.get("hint")
    question = {
        "hint": hint if isinstance(hint, str) else "",
        "question": prompt,
        "choices": [str(option) for option in options],
    }
    return _CHOICE.prompt(question), _letters(fields, options)


def _options(row: Row) -> list[object]:
    name = next((name for name in _OPTIONS if row.values.get(name) is not None), None)
    if name is not None:
        value = row.values[name]
        if isinstance(value, str):  # MMMU writes Python's form of a list
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = None
        if not isinstance(value, list):
            raise UserError(f"{row.where}: {name} must be a list of texts, got {quoted(row.values[name])}")
        return list(value)
    if row.values.get("A") is None or row.values.get("B") is None:
        return []
    return list(_lettered(row.values))


def _lettered(values: Mapping[str, Any]) -> Iterator[object]:
    for letter in _LETTERS:
        option = values.get(letter)
        if option is None or option == "":
            return
        yield option


def _letters(fields: _Fields, options: list[object]) -> tuple[str, ...]:
    """The answer of multiple choice as a letter, from a letter, an option's words, or its index."""
    value = fields.get("answers")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == "":
        return ()
    text = str(value).strip()
    texts = [str(option).strip() for option in options]
    if len(options) > len(_LETTERS) or isinstance(value, bool | list | dict):
        raise UserError(
            f"{fields.row.where}: {fields.name('answers')} must be one of at most {len(_LETTERS)} options, "
            f"got {quoted(value)} of {len(options)}"
        )
    letters = _LETTERS[: len(options)]
    if len(text) == 1 and text.upper() in letters:
        return (text.upper(),)
    if text in texts:
        return (letters[texts.index(text)],)
    if text.isdecimal() and int(text) < len(options):
        return (letters[int(text)],)
    raise UserError(
        f"{fields.row.where}: {fields.name('answers')} must be a letter, the words or the index of one of "
        f"{len(options)} options, got {quoted(value)}"
    )


def _turns(row: Row) -> list[Turn]:
    """The messages before the prompt: a list of objects with `role`, `text` and pictures."""
    turns = row.values.get("turns")
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise UserError(f"{row.where}: turns must be a list of messages, got {quoted(turns)}")
    return [_turn(turn, f"{row.where}: turns[{index}]", row.folder) for index, turn in enumerate(turns)]


def _turn(entry: object, where: str, folder: Path) -> Turn:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with role and text, got {quoted(entry)}")
    role = next((known for known in ROLES if known == entry.get("role")), None)
    if role is None:
        raise UserError(f"{where}: role must be user or assistant, got {quoted(entry.get('role'))}")
    text = entry.get("text")
    if text is None:
        raise UserError(f"{where}: text is missing; the fields are {listed(entry)}")
    if not isinstance(text, str):
        raise UserError(f"{where}: text must be a text, got {quoted(text)}")
    images, videos = _pictures(_Fields(Row(where, "", entry, folder), {}))
    return marked_turn(role, text, images, videos, f"{where}: text")


def _pictures(fields: _Fields) -> tuple[tuple[ImageSource, ...], tuple[VideoSource, ...]]:
    """Pictures (`image` or `images`) and `videos` of a line or of one of its turns, none opened."""
    row = fields.row
    if "image" not in fields.columns and "image" in row.values and "images" in row.values:
        raise UserError(f"{row.where}: must have either image (a path) or images (a list of paths)")
    name = fields.name("image")
    value = value_at(row.values, name)
    wanted = f"{row.where}: {name}"
    images: tuple[ImageSource, ...] = ()
    if isinstance(value, list) or (name == "images" and value is not None):
        if not isinstance(value, list) or not value:
            raise UserError(f"{wanted} must be a list of at least one path, got {quoted(value)}")
        images = tuple(picture_source(item, row.folder, f"{wanted}[{i}]") for i, item in enumerate(value))
    elif value is not None:
        images = (picture_source(value, row.folder, wanted),)
    elif row.values.get("image_1") is not None:
        images = tuple(_numbered(row))
    elif row.values.get("image_id") is not None:
        number, subset = row.values["image_id"], row.values.get("data_subtype")
        images = (numbered_picture(number, subset, row.folder, row.where),)
    return images, _videos(row)


def _numbered(row: Row) -> Iterator[ImageSource]:
    """The pictures of MMMU's columns `image_1`, `image_2`, ..., up to the first that is empty."""
    for number in range(1, 100):
        value = row.values.get(f"image_{number}")
        if value is None:
            return
        yield picture_source(value, row.folder, f"{row.where}: image_{number}")


def _videos(row: Row) -> tuple[VideoSource, ...]:
    value = row.values.get("videos")
    if value is None:
        value = [row.values["video"]] if row.values.get("video") is not None else []
    wanted = f"{row.where}: videos must be a list of folders of frames, of films, or of lists of paths"
    if not isinstance(value, list):
        raise UserError(f"{wanted}, got {quoted(value)}")
    return tuple(video_source(video, row.folder, wanted.partition(" must")[0]) for video in value)
