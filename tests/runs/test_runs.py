"""Run directories: written whole, resumed by id, read back; and a trace that is killed and resumed."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.models.tiles import parse_tiles
from avlprof.runs import RunDirectory, RunWriter
from avlprof.tasks import Sample, load_task
from avlprof.tracing import RecordOptions, estimate_bytes, record, trace, trace_samples
from avlprof.tracing.options import TraceSettings
from tests.small_run import META, files, sample
from tests.synthetic_run import settings, write_run
from tests.watching import Counts


def part_files(number):
    return {f"{kind}-{number:05d}.{end}" for kind, end in KINDS}


KINDS = (("samples", "parquet"), ("scores", "safetensors"), ("stats", "parquet"))


@pytest.fixture
def small_disk():
    """A function that makes files above some bytes fail, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- parts


def test_what_was_written_is_read(tmp_path):
    shapes = [("a", 5, 3), ("b", 0, 2), ("c", 7, 0), ("d/ü", 1, 1), ("e", 5, 4)]
    taken = [sample(name, i, vision, steps) for i, (name, vision, steps) in enumerate(shapes)]
    writer = RunWriter(tmp_path / "new" / "run", META)
    for i, one in enumerate(taken):
        writer.add(*one)
        assert writer.pending == i % 2 + 1
        if i % 2:
            writer.flush()
            assert writer.pending == 0
    writer.flush()
    writer.flush()
    run = RunDirectory(tmp_path / "new" / "run")
    assert run.parts() == ["00000", "00001", "00002"]
    assert list(run.samples()["sample"]) == [name for name, _, _ in shapes]
    assert [list(r) for r in run.samples()["references"]] == [["a", "b"]] * 5
    stats = run.stats()
    want = [row for _, rows, _ in taken for row in rows]
    assert list(stats["sample"]) == [row["sample"] for row in want]
    assert list(stats["entropy"]) == [row["entropy"] for row in want]
    assert all(np.array_equal(a, row["distance"]) for a, row in zip(stats["distance"], want, strict=True))
    for row, _, scores in taken:
        found = run.scores(row["sample"])
        assert found.keys() == scores.keys()
        for name, array in scores.items():
            assert found[name].dtype == np.float32
            assert np.array_equal(found[name], array)
    with pytest.raises(UserError, match="sample 'z' is not in run"):
        run.scores("z")


def test_a_run_larger_than_memory_is_read_by_part(tmp_path):
    writer = RunWriter(tmp_path, META)
    for i, name in enumerate("abcde"):
        row, stats, scores = sample(name, i)
        writer.add(row, stats, scores | {"extra": np.full((2, 3), i, np.float32)} if name == "c" else scores)
        if i % 2:
            writer.flush()
    writer.flush()
    run = RunDirectory(tmp_path)
    parts = list(run.stats_by_part(["entropy", "layer"]))
    assert [len(part) for part in parts] == [4, 4, 2]
    whole = pd.concat(parts, ignore_index=True)
    pd.testing.assert_frame_equal(whole, run.stats()[["entropy", "layer"]])
    assert run.ids() == list("abcde") == list(run.samples()["sample"])
    assert set(run.scores("c")) == {"last", "instruction", "decode", "extra"}
    assert set(run.scores("b")) == {"last", "instruction", "decode"}
    assert (run.scores("c")["extra"] == 2).all()
    assert set(run.scores("c", ["extra", "last"])) == {"extra", "last"}
    assert np.array_equal(run.scores("b", ["last"])["last"], sample("b", 1)[2]["last"])
    with pytest.raises(UserError, match=r"has no scores 'extra' of sample 'b', it has .*last$"):
        run.scores("b", ["last", "extra"])
    with pytest.raises(UserError, match=r"no scores 'last_heads' of sample 'b'.*trace with per_head$"):
        run.scores("b", ["last_heads"])


def test_no_pickle_and_a_meta_that_people_can_read(tmp_path):
    writer = RunWriter(tmp_path, META)
    writer.add(*sample("a"))
    writer.flush()
    assert set(files(tmp_path)) == part_files(0) | {"meta.json"}
    assert json.loads((tmp_path / "meta.json").read_text())["model"] == "tiny"
    assert RunDirectory(tmp_path).meta == META


def test_resumes_by_id(tmp_path):
    for names in (["a", "b"], ["c"], []):
        writer = RunWriter(tmp_path, META)
        for name in names:
            writer.add(*sample(name))
            writer.flush()
        writer.close()
    writer = RunWriter(tmp_path, META)
    assert writer.done() == {"a", "b", "c"}
    assert list(RunDirectory(tmp_path).samples()["sample"]) == ["a", "b", "c"]


def test_prefixes_keep_writers_apart(tmp_path):
    first, second = RunWriter(tmp_path, META, "w0-"), RunWriter(tmp_path, META, "w1-")
    for i in range(2):
        first.add(*sample(f"a{i}", i))
        second.add(*sample(f"b{i}", 10 + i))
        first.flush()
        second.flush()
    run = RunDirectory(tmp_path)
    assert sorted(run.samples()["sample"]) == ["a0", "a1", "b0", "b1"]
    assert np.array_equal(run.scores("b1")["last"], sample("b1", 11)[2]["last"])


def test_one_writer_at_a_time(tmp_path):
    writer = RunWriter(tmp_path, META)
    with pytest.raises(UserError, match="another process is writing to"):
        RunWriter(tmp_path, META)
    writer.close()
    RunWriter(tmp_path, META).close()


def test_what_a_killed_part_left_is_written_over(tmp_path):
    writer = RunWriter(tmp_path, META)
    writer.add(*sample("a"))
    writer.flush()
    writer.close()
    for name in ("scores-00001.safetensors", "stats-00001.parquet", ".samples-00001.parquet.99.partial"):
        (tmp_path / name).write_bytes(b"half")
    assert list(RunDirectory(tmp_path).samples()["sample"]) == ["a"], "an unfinished part does not count"
    assert len(RunDirectory(tmp_path).stats()) == META.layers
    writer = RunWriter(tmp_path, META)
    writer.add(*sample("b", 1))
    writer.flush()
    assert set(files(tmp_path)) == part_files(0) | part_files(1) | {"meta.json"}
    assert np.array_equal(RunDirectory(tmp_path).scores("b")["last"], sample("b", 1)[2]["last"])


def test_a_part_that_someone_removed_costs_no_other(tmp_path):
    writer = RunWriter(tmp_path, META)
    for name in "abc":
        writer.add(*sample(name))
        writer.flush()
    for name in part_files(1):
        (tmp_path / name).unlink()
    writer.close()
    writer = RunWriter(tmp_path, META)
    assert writer.done() == {"a", "c"}
    writer.add(*sample("b"))
    writer.flush()
    assert sorted(RunDirectory(tmp_path).samples()["sample"]) == ["a", "b", "c"]


def test_the_hash_follows_settings_and_samples(tmp_path):
    hashes = set()
    for folder, meta, names in (
        ("a", META, "xy"),
        ("b", META.model_copy(update={"dtype": "float16"}), "xy"),
        ("c", META, "x"),
    ):
        writer = RunWriter(tmp_path / folder, meta)
        for name in names:
            writer.add(*sample(name))
            writer.flush()
        hashes.add(RunDirectory(tmp_path / folder).hash)
    later = RunWriter(tmp_path / "d", META.model_copy(update={"created": "later"}))
    for name in "yx":
        later.add(*sample(name))
    later.flush()
    assert len(hashes) == 3
    assert RunDirectory(tmp_path / "d").hash in hashes, "order, parts and date do not matter"


# --- refusals


def test_another_run_is_refused_by_the_settings_that_differ(tmp_path):
    RunWriter(tmp_path, META).close()
    changed = {"model_hash": "xyz", "max_new_tokens": 9, "coverages": (50, 60), "coverage_rows": 3}
    with pytest.raises(UserError, match="another run") as error:
        RunWriter(tmp_path, META.model_copy(update=changed))
    for name in changed:
        assert f"{name}: " in str(error.value)
    assert "'abc' here, 'xyz' asked" in str(error.value)
    assert "layers" not in str(error.value)
    loose = {"created": "2020", "versions": {"torch": "9"}, "device": "cuda:1"}
    RunWriter(tmp_path, META.model_copy(update=loose)).close()


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a run directory"):
        RunWriter(tmp_path, META)
    with pytest.raises(UserError, match="is a file"):
        RunWriter(tmp_path / "notes.txt", META)
    with pytest.raises(UserError, match="cannot be"):
        RunWriter(tmp_path / "notes.txt" / "run", META)
    assert files(tmp_path) == ["notes.txt"]
    with pytest.raises(UserError, match="avlprof trace"):
        RunDirectory(tmp_path)


def test_a_process_killed_at_the_very_start_does_not_block_the_next(tmp_path):
    (tmp_path / ".meta.json.99.partial").write_text("{")
    RunWriter(tmp_path, META).close()
    assert RunDirectory(tmp_path).meta == META


@pytest.mark.parametrize("text", ["{", '{"model": "x"}', '{"schema_": "avlprof.run/9"}', "\xff\xfe"])
def test_a_broken_meta_is_one_sentence(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    for use in (lambda: RunDirectory(tmp_path).meta, lambda: RunWriter(tmp_path, META)):
        with pytest.raises(UserError, match=r"meta\.json cannot be read") as error:
            use()
        assert "\n" not in str(error.value)


def test_an_unknown_schema_is_refused(tmp_path):
    known = META.model_dump(mode="json") | {"schema_": "avlprof.run/2"}
    (tmp_path / "meta.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match="schema_"):
        _ = RunDirectory(tmp_path).meta


def test_broken_parts_and_empty_runs_are_one_sentence(tmp_path):
    writer = RunWriter(tmp_path, META)
    with pytest.raises(UserError, match="holds no finished sample yet"):
        RunDirectory(tmp_path).stats()
    writer.add(*sample("a"))
    writer.flush()
    for kind, end in KINDS:
        (tmp_path / f"{kind}-00000.{end}").write_bytes(b"half")
    run = RunDirectory(tmp_path)
    for use in (run.samples, run.stats, lambda: run.scores("a")):
        with pytest.raises(UserError, match=r"00000.* cannot be read"):
            use()
    (tmp_path / "stats-00000.parquet").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        RunDirectory(tmp_path).stats()


@pytest.mark.parametrize("size", [0, 5_000, 40_000], ids=["at once", "in the scores", "in the tables"])
def test_a_full_disk_leaves_no_half_written_file(tmp_path, small_disk, size):
    writer = RunWriter(tmp_path, META)
    writer.add(*sample("a"))
    writer.flush()
    row, stats, scores = sample("b", vision=500)
    writer.add(row | {"prompt": "".join(map(str, range(20_000)))}, stats, scores)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    small_disk(size)
    with pytest.raises(UserError, match=r"00001.* cannot be written: .*(large|disk|space)"):
        writer.flush()
    small_disk(resource.RLIM_INFINITY)
    after = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert {name: after[name] for name in before} == before
    assert not any(name.endswith("partial") for name in after)
    assert "samples-00001.parquet" not in after
    assert list(RunDirectory(tmp_path).samples()["sample"]) == ["a"]
    writer.flush()
    assert list(RunDirectory(tmp_path).samples()["sample"]) == ["a", "b"], "nothing in hand is lost"


# --- tracing into a run directory


@pytest.fixture(scope="module")
def task():
    return load_task("shapes")


def test_a_run_holds_what_the_recorder_saw(tmp_path, tiny, task):
    samples = task.samples("search", 3)
    calls = []
    run = trace_samples(
        tiny,
        task,
        samples,
        tmp_path,
        TraceSettings(split="search", max_new_tokens=6),
        watch=Counts(lambda *counts: calls.append(counts)),
    )
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert run.meta.layers == tiny.adapter.layers
    assert (run.meta.model, run.meta.task, run.meta.split) == ("tiny", "shapes", "search")
    table = run.samples().set_index("sample")
    stored = 0
    for one in samples:
        encoding = tiny.adapter.encode([one.prompt], [one.open_images()])
        length = encoding["input_ids"].shape[1]
        with record(tiny.model) as recorder:
            ids = tiny.model.generate(**encoding, max_new_tokens=6, do_sample=False)
        row = table.loc[one.id]
        assert row["answer"] == tiny.adapter.decode(ids[:, length:])[0]
        assert row["generated"] == ids.shape[1] - length
        assert row["system"] + row["vision"] + row["text"] == length
        assert row["vision"] == int(tiny.adapter.vision_mask(encoding["input_ids"]).sum())
        ((tile,),) = parse_tiles(row["tiles"])
        assert sorted(tile.tokens().ravel()) == list(range(row["vision"]))
        assert list(row["references"]) == list(one.answers)
        ours = run.stats().query("sample == @one.id").drop(columns="sample").reset_index(drop=True)
        theirs = pd.DataFrame(recorder.records[0].frame())
        assert np.array_equal(np.stack(ours.pop("distance")), np.stack(theirs.pop("distance")))
        pd.testing.assert_frame_equal(ours, theirs[list(ours.columns)], check_dtype=False)
        for name, array in recorder.records[0].scores().items():
            assert np.array_equal(run.scores(one.id)[name], array)
            stored += array.nbytes
    assert stored <= estimate_bytes(run.meta, int(table["vision"].max()), 3)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("rows", ["default", "all"])
def test_the_estimate_is_of_scores_and_table(tmp_path, tiny, task, per_head, rows):
    """Answers of full length: the scores are what was foretold, but for a step that nothing is fed in."""
    options = RecordOptions(rows=rows, per_head=per_head, history=0.5)
    samples = [Sample("a", task.samples("search", 1)[0].images, "describe the image.", ("a " * 9,))]
    run = trace_samples(
        tiny,
        task,
        samples,
        tmp_path,
        TraceSettings(split="search", max_new_tokens=6, forced=True, record=options),
    )
    one = run.samples().iloc[0]
    assert one["generated"] == 6
    text = int(one["system"] + one["text"])
    estimate = estimate_bytes(run.meta, int(one["vision"]), 1, text=text)
    stored = sum(array.nbytes for array in run.scores("a").values())
    layers, heads = run.meta.layers, tiny.adapter.heads if per_head else 0
    unfed = 4 * layers * (1 + heads) * (int(one["vision"]) + 1 + int(one["system"]))
    table = estimate - stored - unfed
    assert table % (layers * max(heads, 1) * 5) == 0
    assert 200 <= table / (layers * max(heads, 1) * 5) <= 400, "bytes of a row of the table"
    written = sum(f.stat().st_size for f in tmp_path.glob("s[ct]*"))
    assert stored < written < 1.15 * estimate, "names and footers of files, which a larger run does not feel"


def test_large_scores_do_not_pile_up(tmp_path, tiny, task, monkeypatch):
    """A part is written as soon as its scores fill the memory that they may take."""
    parts = []
    monkeypatch.setattr(trace, "FLUSH_BYTES", 1)
    monkeypatch.setattr(trace, "FLUSH_SECONDS", 1e9)
    run = trace_samples(
        tiny,
        task,
        task.samples("search", 3),
        tmp_path,
        TraceSettings(split="search", max_new_tokens=2),
        watch=Counts(lambda done, total: parts.append(len(RunDirectory(tmp_path).parts()))),
    )
    assert parts == [0, 0, 1, 2]
    assert len(run.parts()) == 3


def test_a_longer_run_extends_a_shorter_one(tmp_path, tiny, task):
    samples = task.samples("search", 3)
    trace_samples(tiny, task, samples[:1], tmp_path, TraceSettings(split="search", max_new_tokens=2))
    calls = []
    options = RecordOptions()
    run = trace_samples(
        tiny,
        task,
        samples,
        tmp_path,
        TraceSettings(split="search", max_new_tokens=2, record=options),
        watch=Counts(lambda *counts: calls.append(counts)),
    )
    assert calls[0] == (1, 3)
    assert sorted(run.samples()["sample"]) == sorted(s.id for s in samples)
    with pytest.raises(UserError, match="max_new_tokens: 2 here, 3 asked"):
        trace_samples(tiny, task, samples, tmp_path, TraceSettings(split="search", max_new_tokens=3))
    with pytest.raises(UserError, match="coverage_rows: 16 here, 2 asked"):
        trace_samples(
            tiny,
            task,
            samples,
            tmp_path,
            TraceSettings(split="search", max_new_tokens=2, record=RecordOptions(coverage_rows=2)),
        )


def test_text_only_and_two_pictures(tmp_path, tiny, task):
    pictures = tuple(Image.new("RGB", (40, 30), color) for color in ("red", "blue"))
    samples = [Sample("none", (), "what is it?"), Sample("two", pictures, "which is red?", ("first",))]
    run = trace_samples(tiny, task, samples, tmp_path, TraceSettings(split="own", max_new_tokens=3))
    table = run.samples().set_index("sample")
    assert table.loc["none", "vision"] == 0
    assert table.loc["none", "tiles"] == "[]"
    (first,), (second,) = parse_tiles(table.loc["two", "tiles"])
    both = [*first.tokens().ravel(), *second.tokens().ravel()]
    assert both == list(range(table.loc["two", "vision"])), "one square of tokens after the other"
    assert run.scores("none")["last"].shape == (run.meta.layers, 0)
    assert run.scores("two")["last"].shape == (run.meta.layers, table.loc["two", "vision"])
    stats = run.stats().query("sample == 'none'")
    assert set(stats["query"]) - {"generated"} == {"system", "last"}, "an answer may end at once"
    assert (stats["mass_vision"] == 0).all()
    assert stats["coverage_90"].isna().all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_an_interrupted_trace_keeps_what_it_has(tmp_path, tiny, task, error):
    samples = task.samples("search", 3)

    def draw():
        raise error("stop")

    broken = Sample("broken", (draw,), "what?")
    with pytest.raises(error):
        trace_samples(
            tiny,
            task,
            [*samples[:2], broken, samples[2]],
            tmp_path,
            TraceSettings(split="search", max_new_tokens=2),
        )
    assert list(RunDirectory(tmp_path).samples()["sample"]) == [s.id for s in samples[:2]]
    assert tiny.model.config.text_config._attn_implementation == "sdpa"
    run = trace_samples(tiny, task, samples, tmp_path, TraceSettings(split="search", max_new_tokens=2))
    assert list(run.samples()["sample"]) == [s.id for s in samples]


def test_bad_requests_are_refused_before_any_work(tmp_path, tiny, task):
    samples = task.samples("search", 2)
    with pytest.raises(UserError, match=f"'{samples[0].id}' occurs twice"):
        trace_samples(tiny, task, [*samples, samples[0]], tmp_path, TraceSettings(split="search"))
    with pytest.raises(UserError, match="max_new_tokens must be at least 1, got 0"):
        trace_samples(tiny, task, samples, tmp_path, TraceSettings(split="search", max_new_tokens=0))
    assert files(tmp_path) == []


CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from avlprof.models import load_model
from avlprof.tasks import load_task
from avlprof.tracing import trace
from avlprof.watch import Watch
trace.FLUSH_SAMPLES = 2
task = load_task("shapes")
class Show(Watch):
    def phase(self, name, done, total):
        print(done, flush=True)
trace.trace_samples(load_model("tiny", device="cpu"), task, task.samples("search", 10), Path(sys.argv[1]),
                    trace.TraceSettings(split="search", max_new_tokens=4), watch=Show())
"""


@pytest.mark.slow  # two processes that load a model
def test_kill_9_in_the_middle_then_the_same_again(tmp_path, tiny, task, monkeypatch):
    out = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 5:
                break
        with pytest.raises(UserError, match="another process is writing"):
            trace_samples(
                tiny, task, task.samples("search", 10), out, TraceSettings(split="search", max_new_tokens=4)
            )
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    survived = list(RunDirectory(out).samples()["sample"])
    assert 4 <= len(survived) < 10
    # what a kill inside the next flush would have left as well
    (out / f"scores-{len(survived):05d}.safetensors").write_bytes(b"half")
    monkeypatch.setattr(trace, "FLUSH_SAMPLES", 2)
    started = time.monotonic()
    run = trace_samples(
        tiny, task, task.samples("search", 10), out, TraceSettings(split="search", max_new_tokens=4)
    )
    assert time.monotonic() - started < 60
    wanted = [s.id for s in task.samples("search", 10)]
    assert sorted(run.samples()["sample"]) == sorted(wanted)
    assert list(run.samples()["sample"])[: len(survived)] == survived
    per_sample = run.stats().groupby("sample").size()
    assert set(per_sample.index) == set(wanted)
    keys = ["sample", "layer", "head", "phase", "query"]
    assert not run.stats().duplicated(keys).any()
    once = trace_samples(
        tiny,
        task,
        task.samples("search", 10),
        tmp_path / "once",
        TraceSettings(split="search", max_new_tokens=4),
    )
    assert run.hash == once.hash
    for name in wanted:
        for kind, scores in once.scores(name).items():
            np.testing.assert_allclose(run.scores(name)[kind], scores, atol=1e-6)


def test_a_run_of_version_0_1_0_says_its_policy_in_one_text(tmp_path):
    """Name and hash stood in one field; its hash, which profiles and policies note, stays what it was."""
    old = write_run(tmp_path / "run", vision=(5, 4), created="2026-01-01", policy="a policy of mine")
    meta = json.loads((old.path / "meta.json").read_text())
    del meta["policy_hash"]
    meta["policy"] = "a policy of mine 0123456789abcdef"
    (old.path / "meta.json").write_text(json.dumps(meta))
    run = RunDirectory(old.path)
    assert (run.meta.policy, run.meta.policy_hash) == ("a policy of mine", "0123456789abcdef")
    assert run.meta.policy_label == meta["policy"]
    assert run.hash == "fa6fb21efdd06fa4"
    assert RunDirectory(write_run(tmp_path / "dense", vision=(5, 4)).path).hash == "cccd0590f70a1441"
    assert not run.meta.differences(
        settings(policy="a policy of mine", policy_hash="0123456789abcdef", created="now")
    )
    assert run.meta.differences(settings(policy="a policy of mine", policy_hash="f" * 16)) == [
        "policy_hash: '0123456789abcdef' here, 'ffffffffffffffff' asked"
    ]


def test_a_run_of_version_0_1_0_has_no_learned_sinks(tmp_path):
    """It did not know of them; parts of both versions may lie side by side."""
    folder = write_run(tmp_path / "run", vision=(5, 4)).path
    part, *_ = sorted(folder.glob("stats-*.parquet"))
    table = pd.read_parquet(part)
    name = "mass_learned_sink"
    assert name in table
    table.drop(columns=name).to_parquet(part, index=False)
    run = RunDirectory(folder)
    assert (run.stats()[name] == 0.0).all()
    for columns in ([name], ["layer", name], ["layer"], []):
        found, *_ = run.stats_by_part(columns)
        assert list(found) == columns or (not columns and set(found) == set(table))
        assert name not in found or (found[name] == 0.0).all()
    profile = Profile.from_run(run)
    assert "learned_sink" not in set(profile["mass"]["modality"])
    assert (profile["by_sample"][name] == 0.0).all()
