"""Results to share: one JSON a model, task and budget, that whoever reads it can check."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from avlprof.errors import UserError, cut
from avlprof.evaluation.intervals import mean_interval
from avlprof.evaluation.lineup import seeded
from avlprof.files import write_text
from avlprof.policy import Policy
from avlprof.policy.provenance import Difference
from avlprof.tasks import Sample, Task

if TYPE_CHECKING:
    from avlprof.evaluation.compare import Comparison
    from avlprof.models import LoadedModel

SCHEMA = "avlprof.submission/1"
LARGEST, MOST = 16 << 20, 500_000
"""Bytes of a file, and scores in it: a larger one is not read."""
ROUNDING = 1e-6
"""How far a number that follows from others may be from what it should be."""
SLACK = 0.01
"""How far above its budget a method's measured share may lie: a token a layer of short prompts."""

Text = Annotated[str, Field(max_length=300)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[float, Field(ge=0.0, le=1e15)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Result(_Part):
    """One method at the budget: `scores` of the samples in the order of their ids, seeds averaged.

    Score and interval follow from `scores`, `against` from those of two methods, `policy_hash` from
    `policy`; who reads a file works them out anew. Bytes and tokens are means over samples. A method that
    is more than a policy has none.
    """

    method: Text
    kind: Text
    seeds: Annotated[int, Field(ge=1, le=1000)]
    strongest: bool
    scores: Annotated[list[Share], Field(min_length=1, max_length=100_000)]
    score: Share
    low: Share
    high: Share
    live_bytes: Count
    live_share: Annotated[float, Field(ge=0.0, le=1.5)]
    read_share: Annotated[float, Field(ge=0.0, le=1.5)]
    output_tokens: Count
    policy_hash: Text
    policy: dict[str, Any] | None = None
    against: Annotated[dict[Text, Difference], Field(max_length=3)] = {}


class Model(_Part):
    """Which model: name, revision or fingerprint of the weights, `settings` (a hash of what else decides
    answers: see `avlprof.models.identity`), precision, and the device that it ran on."""

    name: Text
    revision: Text
    settings: Text
    dtype: Text
    device: Text

    @property
    def key(self) -> str:
        """Equal where models answer alike: not the device."""
        return _digest([self.name, self.revision, self.settings, self.dtype])[:12]


class Asked(_Part):
    """What was asked: a task's split, and in `samples_hash` all prompts and reference answers."""

    name: Text
    split: Text
    metric: Text
    samples: Annotated[int, Field(ge=1, le=100_000)]
    max_new_tokens: Annotated[int, Field(ge=1, le=10**9)]
    select_split: Text
    samples_hash: Text

    @property
    def key(self) -> str:
        """Equal where the same was asked, and judged alike."""
        return _digest([self.name, self.split, self.metric, self.max_new_tokens, self.samples_hash])[:12]


class Submission(_Part):
    """All methods of a comparison at one budget, dense first; `sha256` is of all the rest."""

    schema_: Literal["avlprof.submission/1"] = Field(default="avlprof.submission/1", alias="schema")
    by: Text = ""
    created: Text
    versions: Annotated[dict[Text, Text], Field(max_length=20)]
    model: Model
    task: Asked
    budget: Share
    results: Annotated[list[Result], Field(min_length=2, max_length=500)]
    sha256: Text = ""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True
    )

    @model_validator(mode="after")
    def _follows(self) -> Submission:
        """Everything that follows from the scores and the policies does."""
        if self.sha256 != self.digest:
            raise ValueError("sha256 is not that of what the file holds")
        if [result.kind == "dense" for result in self.results] != [True, *[False] * (len(self.results) - 1)]:
            raise ValueError("results must hold dense first, and once")
        names = [result.method for result in self.results]
        if len(set(names)) < len(names):
            raise ValueError("results hold a method twice")
        if len(names) * self.task.samples > MOST:
            raise ValueError(f"results hold more than {MOST:,} scores")
        for result in self.results:
            self._check(result)
        return self

    def _check(self, result: Result) -> None:
        who = f"method '{cut(result.method, 60)}'"
        if len(result.scores) != self.task.samples:
            raise ValueError(f"{who} has {len(result.scores)} scores for {self.task.samples} samples")
        found = mean_interval(result.scores)
        if not _near((result.score, result.low, result.high), (found.mean, found.low, found.high)):
            raise ValueError(f"{who} has another score or interval than its scores give")
        for name, difference in result.against.items():
            other = next((each for each in self.results if each.method == name), None)
            if other is None:
                raise ValueError(f"{who} is compared with '{cut(name, 60)}', which is not there")
            paired = mean_interval(np.subtract(result.scores, other.scores))
            if not _near(
                (difference.mean, difference.low, difference.high), (paired.mean, paired.low, paired.high)
            ):
                raise ValueError(f"{who} has another difference to '{cut(name, 60)}' than the scores give")
        if result.kind == "dense":
            return
        if result.live_share > self.budget + SLACK:
            raise ValueError(
                f"{who} holds {result.live_share:.3f} of the dense bytes at budget {self.budget:g}"
            )
        if result.policy is not None and result.policy_hash != _hashes(result.policy):
            raise ValueError(f"{who} has a policy_hash that is not its policy's")

    @property
    def digest(self) -> str:
        """SHA-256 of all fields but itself."""
        return _digest(self.model_dump(mode="json", by_alias=True, exclude={"sha256"}))

    @property
    def group(self) -> tuple[str, str]:
        """Results of one group may be compared: the same model, asked the same."""
        return self.model.key, self.task.key

    def text(self) -> str:
        """The file: lists of numbers on one line, all else spread out."""
        spread = json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False)
        return re.sub(r"\[\n[-\d.e+,\s]+\]", lambda numbers: "".join(numbers[0].split()), spread) + "\n"

    @property
    def file_name(self) -> str:
        """A name that tells model, task and budget, and is this submission's own."""
        label = f"{self.model.name}-{self.task.name}-{self.task.split}-{self.budget:g}-{self.sha256[:8]}"
        return re.sub(r"[^\w.-]+", "-", label, flags=re.ASCII) + ".json"


def submissions(comparison: Comparison, loaded: LoadedModel, task: Task, by: str = "") -> list[Submission]:
    """A submission a budget of a comparison of this model on this task.

    Args:
        by: who measured it; nobody unless said.

    Raises:
        UserError: a text is too long, or half a character.
    """
    meta, summary = comparison.meta, comparison.summary()
    samples = task.samples(meta["split"], meta["samples"])
    entries = [((entry.method, entry.budget), entry.policy) for entry in comparison.lineup.entries]
    policies = {key: method for key, method in entries if isinstance(method, Policy)}
    name = str(meta["model"])
    common = {
        "by": by,
        "created": meta["created"],
        "versions": dict(meta["versions"]),
        "model": {
            # a folder of this machine says nothing elsewhere; its revision is a fingerprint of what it holds
            "name": Path(name).name if Path(name).exists() else name,
            "revision": meta["revision"],
            "settings": loaded.settings_hash,
            "dtype": meta["dtype"],
            "device": meta["device"],
        },
        "task": {
            field: meta[field] for field in ("split", "metric", "samples", "max_new_tokens", "select_split")
        }
        | {"name": meta["task"], "samples_hash": samples_hash(task, samples)},
    }
    made = []
    for budget in meta["budgets"]:
        rows = summary[(summary["kind"] == "dense") | (summary["budget"] == budget)].to_dict("records")
        if len(rows) > 1:
            results = [_result(row, comparison, policies.get((row["method"], budget))) for row in rows]
            made.append(_sealed({**common, "budget": float(budget), "results": results}))
    return made


def save_submissions(made: Sequence[Submission], folder: Path) -> list[Path]:
    """Write each as a file of its own, atomically; returns the paths."""
    paths = [folder / submission.file_name for submission in made]
    for submission, path in zip(made, paths, strict=True):
        write_text(path, submission.text())
    return paths


def read_submission(path: Path) -> Submission:
    """A submission from a file that anybody may have written.

    Raises:
        UserError: it cannot be read, is none, or does not hold together; the message says where.
    """
    try:
        if not path.is_file():
            raise UserError("is not a file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"is larger than {LARGEST >> 20} MiB")
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("avlprof.submission/"):
            raise UserError("is no submission (field schema)")
        if data["schema"] != SCHEMA:
            raise UserError(f"has schema {cut(str(data['schema']), 40)}, and this version reads {SCHEMA}")
        return Submission.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(_first(error)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
    except (UnicodeError, ValueError, RecursionError) as error:
        raise UserError(f"is no JSON in UTF-8 ({cut(str(error), 80)})") from None


def samples_hash(task: Task, samples: Sequence[Sample]) -> str:
    """16 hex digits that are equal where the same is asked: ids, prompts, answers, and where they come from.

    Pictures count as far as the task's provenance does: by the digest of a file, or a data set's revision.
    """
    asked = [[sample.id, sample.asked, list(sample.answers)] for sample in samples]
    return _digest([sorted(task.provenance.items()), asked])[:16]


def _result(row: Mapping[str, Any], comparison: Comparison, policy: Policy | None) -> dict[str, Any]:
    budget, method = float(row["budget"]), str(row["method"])
    others = {"dense": "dense", "uniform": "uniform", "strongest": comparison.strongest.get(budget, "")}
    against = {
        other: {key: float(row[f"vs_{name}{end}"]) for key, end in _DIFFERENCE.items()}
        for name, other in others.items()
        if not math.isnan(row[f"vs_{name}"])
    }
    plain = ("score", "low", "high", "live_bytes", "live_share", "read_share", "output_tokens")
    return {
        **{name: float(row[name]) for name in plain},
        "method": method,
        "kind": row["kind"],
        "seeds": int(row["seeds"]),
        "strongest": bool(row["strongest"]),
        "scores": [float(score) for score in comparison.scores(budget, method)],
        "policy_hash": row["policy_hash"],
        "policy": None
        if policy is None
        else policy.model_dump(mode="json", by_alias=True, exclude={"provenance"}),
        "against": against,
    }


_DIFFERENCE = {"mean": "", "low": "_low", "high": "_high", "p_value": "_p"}


def _sealed(data: dict[str, Any]) -> Submission:
    """With its own hash, and checked as one that is read."""
    parts = {
        "model": Model.model_validate(data["model"]),
        "task": Asked.model_validate(data["task"]),
        "results": [Result.model_validate(result) for result in data["results"]],
    }
    open_ = Submission.model_construct(**{**data, **parts})
    return Submission.model_validate({**open_.model_dump(mode="json", by_alias=True), "sha256": open_.digest})


def _hashes(policy: dict[str, Any]) -> str:
    """The hash of a policy as comparisons note it: those of its seeds, for a random one."""
    try:
        own = Policy.model_validate(policy)
    except (ValidationError, UserError, RecursionError, OverflowError) as error:
        raise ValueError(f"a policy cannot be read by this version ({cut(str(error), 120)})") from None
    return " ".join(dict.fromkeys(each.hash for each in seeded(own)))


def _near(told: Sequence[float], found: Sequence[float]) -> bool:
    return all(abs(a - b) <= ROUNDING for a, b in zip(told, found, strict=True))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _first(error: ValidationError) -> str:
    """The first problem in a line: where, and what."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    said = str(first["msg"]).removeprefix("Value error, ")
    return cut(f"{where}: {said}" if where else said, 200)
