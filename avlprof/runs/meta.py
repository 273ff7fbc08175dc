"""What a run was traced with, and starting or resuming its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from avlprof.errors import UserError
from avlprof.models.identity import listed, noted_differences

DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
COVERAGES = (50, 80, 90, 95, 99)
LAGS = (1, 2, 4, 8, 16, 32)
TEXT_SINK = 4
NAME_AND_HASH = re.compile(r"(.+) ([0-9a-f]{16})", re.DOTALL)
LEARNED_SINK = "mass_learned_sink"  # a column of stats that runs of 0.1.0 do not have: 0 there
NOTED = {"checkpoint": "settings of the model", "dataset": "origin of the samples"}
HEADS = "_heads"  # behind the name of scores: of every query head, not their mean


class RunMeta(BaseModel):
    """Settings of a traced run. Two traces may share a directory only if these are equal.

    `distances` are the upper edges (exclusive, in text tokens) of the distance histogram, whose
    last bin is open; `top_share` is the share of vision tokens in the sets that overlaps compare.
    With `forced` the answers are the references, and `max_new_tokens` 0 leaves them whole.
    `policy` and `policy_hash` are empty when the model ran densely, else the policy's. `checkpoint`
    is what decides answers beside the weights (`avlprof.models.identity`), `dataset` where the
    samples come from; version 0.1.0 noted neither. `governed` are the layers that policies act on, where
    the model has others too; None means all, as 0.1.0 took it for every model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["avlprof.run/1"] = "avlprof.run/1"
    model: str
    revision: str = ""
    model_hash: str
    checkpoint: dict[str, str] = {}
    family: str = ""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    governed: tuple[int, ...] | None = None
    dtype: str
    device: str
    task: str
    dataset: dict[str, str] = {}
    metric: str = ""
    split: str = ""
    seed: int = 0
    max_new_tokens: int
    forced: bool = False
    rows: str = "default"
    vision_rows: int = 64
    coverage_rows: int = 16
    per_head: bool = False
    history: float | None = None
    text_rows: bool = False
    policy: str = ""
    policy_hash: str = ""
    top_share: float = 0.1
    text_sink: int = TEXT_SINK
    coverages: tuple[int, ...] = COVERAGES
    distances: tuple[int, ...] = DISTANCES
    lags: tuple[int, ...] = LAGS
    versions: dict[str, str] = {}
    created: str = ""

    @model_validator(mode="before")
    @classmethod
    def _two_fields(cls, data: Any) -> Any:
        """Version 0.1.0 wrote name and hash of the policy into one text."""
        if isinstance(data, dict) and "policy_hash" not in data:
            match = NAME_AND_HASH.fullmatch(str(data.get("policy", "")))
            if match:
                return data | {"policy": match[1], "policy_hash": match[2]}
        return data

    @property
    def policy_label(self) -> str:
        """Name and hash of the policy for a reader; empty when the model ran densely."""
        return f"{self.policy} {self.policy_hash}".strip()

    def settings_json(self) -> str:
        """What makes a run what it is, as the hash of its directory takes it; as version 0.1.0 wrote it."""
        joined = self.model_copy(update={"policy": self.policy_label})
        unknown = {name for name in NOTED if not getattr(self, name)}
        later = set() if self.text_rows else {"text_rows"}
        return joined.model_dump_json(exclude={"created", "policy_hash", "governed", *unknown, *later})

    def differences(self, other: RunMeta) -> list[str]:
        """Fields in which another run's settings differ, as `field: ours, theirs`."""
        loose = {"created", "versions", "device", "governed", *NOTED}
        different = [
            f"{name}: {getattr(self, name)!r} here, {getattr(other, name)!r} asked"
            for name in type(self).model_fields
            if name not in loose and getattr(self, name) != getattr(other, name)
        ]
        for name, what in NOTED.items():
            different += noted_differences(what, getattr(self, name), getattr(other, name))
        return different


META = "meta.json"


def read_meta(path: Path) -> RunMeta:
    """Settings of the run in a folder; `UserError` when they cannot be read."""
    try:
        return RunMeta.model_validate_json((path / META).read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise unreadable(path / META, error) from None


def check_free(path: Path, meta: RunMeta) -> None:
    """`UserError` where no run of these settings can be begun or resumed.

    Hidden files do not count: a process killed early leaves some.
    """
    if (path / META).exists():
        different = read_meta(path).differences(meta)
        if different:
            raise UserError(f"{path} holds another run ({listed(different)}); choose another folder")
    elif path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a run directory; choose another folder")
    elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        # another process may have begun the same run between the two looks
        if (path / META).exists():
            return check_free(path, meta)
        raise UserError(f"{path} is not empty and not a run directory; choose another folder")


def settle_meta(path: Path, meta: RunMeta, writer: str = "") -> None:
    """Write the settings if no process has yet; the first one's stand, and the others must equal them.

    Args:
        writer: tells processes on several machines apart, which may have the same number.

    Raises:
        UserError: the folder holds other settings, or cannot be written.
    """
    file = path / META
    if not file.exists():
        partial = path / f".{META}.{writer}{os.getpid()}.partial"
        try:
            partial.write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
            try:
                os.link(partial, file)
            except FileExistsError:
                pass
            except OSError:  # no hard links on this file system
                os.replace(partial, file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror or error}") from None
        except ValueError as error:  # half of a character
            raise UserError(f"{file} cannot be written: {error}") from None
        finally:
            partial.unlink(missing_ok=True)
    check_free(path, meta)


def unreadable(path: Path, error: Exception) -> UserError:
    """The sentence about a file of a run that is broken."""
    return UserError(f"{path} cannot be read: {' '.join(str(error).split())}; trace into another folder")
