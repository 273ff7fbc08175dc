"""Results to share: what a file holds, what is set aside, and the table and front of what is left."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from avlprof.errors import UserError
from avlprof.evaluation import Comparison, LineUp
from avlprof.evaluation import submission as shared
from avlprof.evaluation.leaderboard import COLUMNS, Leaderboard, clean
from avlprof.evaluation.lineup import Entry, seeded
from avlprof.evaluation.submission import read_submission, samples_hash, save_submissions, submissions
from avlprof.plots.scores import scores_by_bytes, scores_info
from avlprof.policy import Policy, Provenance, ScorerSpec
from avlprof.tasks import Sample, Task
from tests.cli_runner import invoke, refused

SAMPLES = 10
BUDGETS = (0.2, 0.4)
HOSTILE = "=cmd|' /C calc'!A0 <script>alert(1)</script> | [x](javascript:1) \u202e"


class Loaded:
    """What `submissions` asks of a model."""

    settings_hash = "0123456789ab"


def task(prompt: str = "what?") -> Task:
    samples = [Sample(f"s{i:02d}", (), prompt, ("yes",)) for i in range(SAMPLES)]
    return Task(
        "quiz", "exact_match", ("held-out",), lambda split: iter(samples), provenance={"revision": "r1"}
    )


def comparison(seed: int = 0, **changes) -> Comparison:
    """Dense, uniform, random with three seeds, and one policy of ours, at two budgets."""
    chance = np.random.default_rng(seed)
    policies = {
        "uniform": Policy(name="uniform", vision_keep=0.2),
        "random": Policy(name="random", vision_keep=0.2, scorer=ScorerSpec(name="random")),
        "mine": Policy(name="mine", vision_keep=(0.3, 0.1), provenance=Provenance(run="/home/me/run")),
    }
    kinds = {"uniform": "baseline", "random": "baseline", "mine": "given"}
    entries = tuple(
        Entry(name, kinds[name], budget, policy.model_copy(update={"refresh_interval": int(10 * budget)}))
        for budget in BUDGETS
        for name, policy in policies.items()
    )
    runs = [("dense", "dense", 1.0, None)] + [(e.method, e.kind, e.budget, e.policy) for e in entries]
    rows = []
    for method, kind, budget, policy in runs:
        for number, run in enumerate(seeded(policy) if policy else [None]):
            scores = (chance.random(SAMPLES) < (0.9 if policy is None else 0.4 + budget)).astype(float)
            rows += [
                {
                    "method": method, "kind": kind, "budget": budget, "seed": number, "sample": f"s{i:02d}",
                    "score": score, "generated_tokens": 3 + i % 2, "live_bytes": int(budget * 1000),
                    "dense_bytes": 1000, "read_bytes_per_step": budget * 900.0,
                    "policy_hash": run.hash if run else "stock",
                }
                for i, score in enumerate(scores)
            ]  # fmt: skip
    meta = {
        "model": "owner/model", "revision": "abc", "dtype": "bfloat16", "device": "cuda:0", "task": "quiz",
        "metric": "exact_match", "split": "held-out", "samples": SAMPLES, "max_new_tokens": 8,
        "select_split": "search", "versions": {"avlprof": "0.1.0"}, "created": "2026-11-28T00:00:00+00:00",
        "budgets": list(BUDGETS),
    }  # fmt: skip
    found = Comparison(meta | changes, pd.DataFrame(rows), LineUp(entries, ()), {0.2: "uniform"})
    return found


def made(folder: Path, seed: int = 0, by: str = "", **changes) -> list[Path]:
    return save_submissions(submissions(comparison(seed, **changes), Loaded(), task(), by), folder)


# --- what is written


def test_a_file_a_budget_holds_what_the_comparison_says(tmp_path):
    found = comparison()
    paths = made(tmp_path, by="Ada")
    assert len(paths) == 2 and {path.parent for path in paths} == {tmp_path}
    summary = found.summary()
    for path, budget in zip(paths, BUDGETS, strict=True):
        read = read_submission(path)
        assert (read.budget, read.by, read.model.name, read.task.name) == (
            budget,
            "Ada",
            "owner/model",
            "quiz",
        )
        assert read.results[0].kind == "dense"
        expected = summary[(summary["budget"] == budget) | (summary["kind"] == "dense")]
        assert [each.method for each in read.results] == list(expected["method"])
        for each, row in zip(read.results, expected.to_dict("records"), strict=True):
            told = (each.score, each.low, each.high, each.live_share, each.read_share, each.output_tokens)
            names = ("score", "low", "high", "live_share", "read_share", "output_tokens")
            assert told == tuple(row[name] for name in names)
            assert each.policy_hash == row["policy_hash"]
            if "dense" in each.against:
                assert each.against["dense"].mean == pytest.approx(row["vs_dense"])
        random = next(each for each in read.results if each.method == "random")
        assert random.seeds == 3 and len(random.policy_hash.split()) == 3
    assert "/home/me" not in paths[0].read_text()
    assert made(tmp_path, by="Ada") == paths, "the same results are the same files"


def test_a_folder_as_a_model_is_known_by_its_name_alone(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (path, _) = made(tmp_path / "out", model=str(tmp_path / "checkpoint"))
    assert read_submission(path).model.name == "checkpoint"
    assert str(tmp_path) not in path.read_text()


def test_what_is_asked_counts():
    hashes = {
        samples_hash(task(), task().samples("held-out", 5)),
        samples_hash(task(), task().samples("held-out", 6)),
        samples_hash(task("why?"), task("why?").samples("held-out", 5)),
        samples_hash(replace(task(), provenance={"revision": "r2"}), task().samples("held-out", 5)),
    }
    assert len(hashes) == 4


# --- what is set aside


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A file that holds together."""
    return made(tmp_path_factory.mktemp("good"))[0]


def tampered(path: Path, copy: Path, change, seal: bool = True) -> Path:
    """A copy of a file with a change, and with a digest that fits it unless not `seal`."""
    data = json.loads(path.read_text())
    change(data)
    if seal:
        data["sha256"] = shared._digest({key: value for key, value in data.items() if key != "sha256"})
    copy.write_text(json.dumps(data))
    return copy


def put(where: str, value):
    """A change of one value: `results.1.score`."""

    def change(data):
        *path, last = [int(part) if part.isdigit() else part for part in where.split(".")]
        for part in path:
            data = data[part]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("results.1.score", 1.0), "another score or interval than its scores give"),
        (put("results.1.high", 0.999), "another score or interval"),
        (put("results.1.scores", [1.0] * SAMPLES), "another score or interval"),
        (put("results.1.scores", [1.0]), "has 1 scores for 10 samples"),
        (put("results.1.scores.0", 2.0), "less than or equal to 1"),
        (put("results.1.scores.0", "1"), "valid number"),
        (put("results.1.against.dense.mean", 0.5), "another difference to 'dense'"),
        (
            put("results.1.against.nobody", {"mean": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}),
            "not there",
        ),
        (put("results.1.live_share", 0.5), "holds 0.500 of the dense bytes at budget 0.2"),
        (put("results.1.policy_hash", "0" * 16), "policy_hash that is not its policy's"),
        (put("results.1.policy.vision_keep", 0.9), "policy_hash that is not its policy's"),
        (put("results.1.policy.vision_kept", 0.9), "cannot be read by this version"),
        (put("results.1.method", "dense"), "a method twice"),
        (put("results.0.kind", "given"), "dense first, and once"),
        (put("by", "x" * 400), "at most 300 characters"),
        (put("more", 1), "more: Extra inputs are not permitted"),
        (put("schema", "avlprof.submission/2"), "this version reads avlprof.submission/1"),
        (put("schema", 7), "is no submission"),
        (put("task.samples", 10**12), "less than or equal to 100000"),
        (put("budget", float("inf")), "is no number"),
    ],
)
def test_what_does_not_hold_together_is_refused(change, sentence, good, tmp_path):
    path = tampered(good, tmp_path / "changed.json", change)
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_submission(path)


def test_a_damaged_file_is_told_by_its_digest(good, tmp_path):
    path = tampered(good, tmp_path / "changed.json", put("by", "another"), seal=False)
    with pytest.raises(UserError, match="sha256 is not that of what the file holds"):
        read_submission(path)


def test_files_of_all_kinds_are_set_aside_by_name(tmp_path):
    folder = tmp_path / "in"
    good = made(folder / "ada", by="Ada")
    (folder / "ada" / "copy.json").write_text(good[0].read_text())
    half = good[0].read_text()
    bad = {
        "half.json": half[: len(half) // 2].encode(),
        "latin.json": '{"é": 1}'.encode("latin-1"),
        "deep.json": b"[" * 100_000,
        "list.json": b"[]",
        "nan.json": b'{"schema": "avlprof.submission/1", "budget": NaN}',
        "huge.json": b'{"schema": "avlprof.submission/1", "budget": ' + b"9" * 5000 + b"}",
        "other.json": b'{"schema": "avlprof.policy/1"}',
        "empty.json": b"",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "folder.json").mkdir()
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    with (folder / "large.json").open("wb") as file:
        file.truncate(shared.LARGEST + 1)
    board = Leaderboard.of(folder)
    aside = dict(board.set_aside)
    twice = {"ada/copy.json", good[0].relative_to(folder).as_posix()} & set(aside)
    assert set(aside) == {*bad, "folder.json", "gone.json", "large.json", *twice} and len(twice) == 1
    assert sum("is the same as" in why for why in aside.values()) == 1
    assert all(len(why) < 250 and why == clean(why) for why in aside.values())
    assert len(board.groups) == 1 and len(board.groups[0].table) == 1 + 2 * 3


# --- the table


def test_one_model_asked_the_same_is_one_group(tmp_path):
    made(tmp_path / "a", seed=1, by="Ada")
    made(tmp_path / "b", seed=2, by="Bo", device="cpu")
    made(tmp_path / "c", seed=3, dtype="float32")
    made(tmp_path / "d", seed=4, split="held-out", max_new_tokens=9)
    made(tmp_path / "e", seed=5, revision="other")
    board = Leaderboard.of(tmp_path)
    assert sorted(len(group.table) for group in board.groups) == [7, 7, 7, 14]
    both = next(group for group in board.groups if len(group.table) == 14).table
    assert list(both.columns) == list(COLUMNS)
    assert list(both["kind"][:2]) == ["dense", "dense"] and set(both["by"]) == {"Ada", "Bo"}
    assert set(both["device"]) == {"cpu", "cuda:0"}
    for budget, rows in both[2:].groupby("budget"):
        scores = rows["score"].to_numpy()
        assert list(scores) == sorted(scores, reverse=True)
        assert [int(rank) for rank in rows["rank"]] == [1 + (scores > own).sum() for own in scores]
        assert pd.isna(rows["behind"].iloc[0])
        assert np.allclose(rows["behind"][1:].astype(float), scores[1:] - scores[0]), budget


def test_what_several_people_found_alike_is_one_row(tmp_path):
    made(tmp_path / "a", by="Ada")
    made(tmp_path / "b", by="Bo")
    (group,) = Leaderboard.of(tmp_path).groups
    assert len(group.table) == 7
    assert set(group.table["by"]) == {"Ada, Bo"}
    assert all(len(files.split(", ")) == 2 for files in group.table["files"][1:])


@pytest.mark.full  # draws figures
def test_texts_of_others_are_only_texts(tmp_path):
    for path in made(tmp_path / "in"):
        tampered(path, path, lambda data: [put("by", HOSTILE)(data), put("results.3.method", HOSTILE)(data)])
    result = invoke("leaderboard", tmp_path / "in", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "<script" not in page and "](javascript" not in page and "\u202e" not in page
    assert all(
        line.count("|") - line.count("\\|") == 10 for line in page.splitlines() if line.startswith("| ")
    )
    rows = list(csv.DictReader((tmp_path / "out" / "leaderboard.csv").open()))
    assert {row["by"][:2] for row in rows} == {"'="}
    assert "\u202e" not in result.output


# --- the command, and the figure


@pytest.mark.full  # draws figures
def test_the_command_writes_table_and_figure(tmp_path):
    made(tmp_path / "in", by="Ada")
    (tmp_path / "in" / "bad.json").write_text("{")
    result = invoke("leaderboard", tmp_path / "in", "--figure-format", "svg")
    assert result.exit_code == 0, result.output
    assert "set aside: bad.json: is no JSON" in result.stderr
    assert "owner/model (bfloat16) on quiz, held-out, 10 samples, exact_match" in result.stdout
    names = sorted(path.name for path in (tmp_path / "in" / "leaderboard").iterdir())
    assert [Path(name).suffix for name in names] == [".csv", ".md", ".svg"]
    assert names[2] in (tmp_path / "in" / "leaderboard" / "leaderboard.md").read_text()
    rows = json.loads(invoke("leaderboard", tmp_path / "in", "--format", "json").stdout)
    assert len(rows) == 7 and rows[0]["method"] == "dense" and rows[0]["rank"] is None


def test_the_command_refuses_in_a_sentence(tmp_path):
    assert "is not a folder" in refused(invoke("leaderboard", tmp_path / "none"))
    assert "holds no submission" in refused(invoke("leaderboard", tmp_path))
    (tmp_path / "x.json").write_text("{}")
    assert "x.json is no submission" in refused(invoke("leaderboard", tmp_path))
    assert "give --submit FOLDER too" in refused(invoke("compare", "--by", "Ada"))
    assert "--by must be a name" in refused(invoke("compare", "--by", "A\x1b[2J", "--submit", tmp_path))


def test_the_front_is_what_nothing_cheaper_beats():
    chance = np.random.default_rng(0)
    rows = [{"method": "dense", "kind": "dense", "live_bytes": 1000.0, "score": 0.9}]
    for _ in range(60):
        size = float(chance.choice([100, 200, 400])) - float(chance.integers(0, 5))
        method = str(chance.choice(["uniform", "random", *"abcdefghij"]))
        rows.append({"method": method, "kind": "given", "live_bytes": size, "score": float(chance.random())})
    frame = pd.DataFrame(rows)
    frame["low"], frame["high"], frame["samples"] = frame["score"] - 0.1, frame["score"] + 0.1, 24
    info = scores_info(frame)
    best, expected = -1.0, []
    for level in (100, 200, 400):
        at = frame[(frame["live_bytes"] <= level) & (frame["live_bytes"] > level - 10)]
        if at["score"].max() > best:
            best = at["score"].max()
            expected.append((float(at["live_bytes"][at["score"].idxmax()]), float(best)))
    assert list(info.front) == expected
    assert len(set(info.where)) == 3 and len(info.named) == 6
    assert not {"uniform", "random"} & set(info.named)
    figure = scores_by_bytes(info, "a model on a task")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "dense" and {"uniform", "random", "others"} < set(labels)
    alone = scores_info(frame[:1])
    assert alone.front == () and scores_by_bytes(alone, "dense alone")
