"""The command line: what it prints, what it refuses, and that it resumes."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image, ImageFile
from typer.testing import CliRunner

import avlprof
from avlprof.cli import _output as output
from avlprof.cli import main
from avlprof.cli._app import COMMANDS, app
from avlprof.cli._describe import differences, sets
from avlprof.cli._progress import duration, progress
from avlprof.cli._tuned import _beyond
from avlprof.errors import UserError
from avlprof.policy import DENSE, Policy, Provenance, TextPolicy, load_policy, save_policy
from avlprof.tasks import Sample, Task, load_task
from avlprof.tracing.options import TraceSettings
from tests.cli_runner import invoke, refused
from tests.helpers import settle_threads
from tests.watching import Counts

SAMPLES = 3
HEAVY = ("torch", "transformers", "pandas", "numpy", "pydantic", "yaml", "matplotlib", "optuna", "PIL")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of the embedded model, traced by the command line."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    result = invoke("trace", "--samples", SAMPLES, "--out", path, "--max-new-tokens", 6, "--format", "json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary[0]["samples"] == SAMPLES
    assert 0 < summary[0]["vision_mass_last"] < 1
    assert "at most about" in result.stderr
    assert result.stderr.rstrip().endswith(f"next: avlprof analyze {path}")
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (96, 64), "red").save(path)
    return path


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['avlprof', '--help']\nfrom avlprof.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in COMMANDS)


def test_every_command_has_help():
    for name in COMMANDS:
        result = invoke(name, "--help")
        assert result.exit_code == 0
        assert "Usage: avlprof " + name in result.output


def test_version():
    assert invoke("--version").stdout == f"avlprof {avlprof.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trce"], "unknown command 'trce'; did you mean trace"),
        (["--bogus"], "--bogus"),
        (["trace", "--bogus"], "--bogus"),
        (["derive", "--budget", "much"], "'--budget'"),
        (["run"], "--policy"),
        (["models", "--format", "xml"], "'xml' is not one of"),
    ],
)
def test_wrong_usage(arguments, said):
    assert said in refused(invoke(*arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "tinny"], "unknown model 'tinny'; did you mean tiny or tiny-mrope?"),
        (["--model", "./no/such/folder"], "does not exist"),
        (["--task", "shpes"], "unknown task 'shpes'; did you mean shapes or pages or shapes-sizes?"),
        (["--task", "none.jsonl"], "task file none.jsonl does not exist"),
        (["--split", "serch"], "did you mean search?"),
        (["--samples", "0"], "at least 1, got 0"),
        (["--rows", "al"], "unknown kind of rows 'al'; did you mean all?"),
        (["--vision-rows", "-1"], "--vision-rows must be at least 0, got -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--revision", "main"], "revision must be left out"),
        (["--image", "none.png", "--prompt", "what?"], "image none.png"),
        (["--prompt", "what?"], "prompt needs a picture"),
        (["--columns", "prompt=q"], "Hugging Face datasets"),
    ],
)
def test_trace_refuses(arguments, said, tmp_path):
    out = tmp_path / "run"
    assert said in refused(invoke("trace", *arguments, "--out", out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--policy", "unifrom"], "unknown policy 'unifrom'; did you mean uniform"),
        (["--history", "2"], "must be in (0, 1], got 2.0"),
        (["--device-map", "atuo"], "unknown device map 'atuo'; did you mean auto?"),
        (["--device-map", "auto", "--device", "cpu"], "give a device or a device map, not both"),
    ],
)
def test_trace_refuses_inputs(arguments, said, tmp_path):
    out = tmp_path / "run"
    assert said in refused(invoke("trace", *arguments, "--out", out))
    assert not out.exists()


def test_trace_over_references_under_a_policy(tmp_path):
    out = tmp_path / "run"
    path = save_policy(Policy(name="third", vision_keep=0.3), tmp_path / "p.yaml")
    command = ["trace", "-n", 3, "--batch-size", 2, "--forced", "--policy", path, "--out", out]
    result = invoke(*command, "--format", "json")
    assert result.exit_code == 0, result.output
    assert f"3 samples to {out}, at most about " in result.stderr
    found = avlprof.Run.open(out)
    assert found.meta.forced
    assert found.meta.policy == "third"
    table = found.samples()
    assert [row["answer"] == row["references"][0] for _, row in table.iterrows()] == [True] * 3
    said = refused(invoke("trace", "-n", 3, "--out", out))
    assert "forced: True here, False asked" in said
    assert "policy: 'third' here, '' asked" in said


def test_trace_of_your_own_picture_has_no_reference(picture, tmp_path):
    command = ["trace", "--image", picture, "--prompt", "what?", "--forced", "--out", tmp_path / "run"]
    assert "--forced does nothing beside --image" in refused(invoke(*command))
    assert not (tmp_path / "run").exists()


@pytest.mark.full  # processes of their own
def test_trace_by_two_processes(tmp_path):
    """One table in all, from the first process, which says what is still missing."""
    out = tmp_path / "run"
    results = []
    for rank in "01":
        environment = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        command = ["trace", "-n", "5", "--max-new-tokens", "1", "--out", str(out), "--format", "csv"]
        results.append(CliRunner().invoke(app, command, prog_name="avlprof", env=environment))
    first, second = results
    assert first.exit_code == second.exit_code == 0
    assert "5 samples by 2 processes to" in first.stderr
    assert "2 of 5 samples are not there yet; the other processes write them" in first.stderr
    assert next(csv.DictReader(io.StringIO(first.stdout)))["samples"] == "3"
    assert second.stdout == ""
    assert second.stderr == f"process 2 of 2 has finished; 5 of 5 samples are in {out}\n"
    again = invoke("trace", "-n", 5, "--max-new-tokens", 1, "--out", out, "--format", "csv")
    assert next(csv.DictReader(io.StringIO(again.stdout)))["samples"] == "5"
    assert "not there yet" not in again.stderr


@pytest.mark.parametrize("command", [["trace"], ["run", "--policy", "uniform"]])
def test_corrupt_image(command, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG no picture")
    said = refused(invoke(*command, "--image", path, "--prompt", "what?"))
    assert str(path) in said
    assert "cannot be read" in said
    assert "prompt" in refused(invoke(*command, "--image", path))


def test_corrupt_image_in_the_middle_of_a_task(tmp_path, picture, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:60])
    lines = [
        {"id": str(i), "image": name, "prompt": "what?", "answers": ["x"], "split": "s"}
        for i, name in enumerate(["red.png", "broken.png"])
    ]
    task = tmp_path / "own.jsonl"
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["trace", "--task", task, "--split", "s", "--out", tmp_path / "run", "--max-new-tokens", 1]
    # lmms-eval lets Pillow read half pictures in the whole process once it is imported
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    assert "broken.png of sample '1' cannot be read" in refused(invoke(*command))
    Image.new("RGB", (64, 64), "blue").save(broken)
    result = invoke(*command)
    assert result.exit_code == 0
    assert "1 of 2 samples were done before" in result.stderr
    assert list(avlprof.Run.open(tmp_path / "run").samples()["sample"]) == ["0", "1"]


POLICIES = {
    "unknown key": ("text: {windw: 3}", "did you mean text.window?"),
    "ratio": ("vision_keep: [1, 1, 1, 1.4, 1, 1]", "vision_keep[3] must be in [0, 1], got 1.4"),
    "compute over keep": (
        "vision_keep: 0.2\nvision_compute: 0.3",
        "vision_compute[0] must not exceed vision_keep[0]",
    ),
    "layers": ("vision_keep: [0.5, 0.25]", "written for 2 layers, the model has 6"),
    "scorer": ("scorer: last_qery", "unknown scorer 'last_qery'; did you mean last_query?"),
    "not supported": (
        "pool: joint\njoint: {keep: 0.5}\nprefill_filter: [{after_layer: 2, keep: 0.5}]",
        "prefill_filter",
    ),
}


@pytest.mark.parametrize("case", POLICIES)
def test_bad_policy(case, tmp_path):
    body, said = POLICIES[case]
    path = tmp_path / "p.yaml"
    path.write_text(f"schema: avlprof.policy/1\n{body}\n")
    assert said in refused(invoke("run", "--policy", path))
    if case != "not supported":
        assert said in refused(invoke("policy", "validate", path, "--layers", 6))


def test_unknown_policy():
    assert "did you mean uniform" in refused(invoke("run", "--policy", "unifrom"))
    assert "does not exist" in refused(invoke("policy", "show", "none.yaml"))


def test_run_directory_of_another_model(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    meta = json.loads((run / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"model": "owner/other", "model_hash": "abc"}))
    said = refused(invoke("trace", "--samples", SAMPLES, "--max-new-tokens", 6, "--out", other))
    assert "holds another run (model: 'owner/other' here, 'tiny' asked" in said


def test_not_a_run_directory(tmp_path):
    for command in (["analyze", tmp_path], ["derive", tmp_path, "--budget", "0.4"]):
        assert "is not a run directory" in refused(invoke(*command))
    (tmp_path / "meta.json").write_text("{")
    assert "meta.json cannot be read" in refused(invoke("analyze", tmp_path))


def test_debug_shows_the_traceback():
    result = invoke("--debug", "trace", "--model", "tinny")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("error: unknown model")


def test_unexpected_error_is_one_line(monkeypatch):
    monkeypatch.setattr("avlprof.registry.Registry.names", lambda self: 1 / 0)
    result = invoke("tasks")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected ZeroDivisionError: division by zero; run 'avlprof --debug ...' to see where\n"
    )


def test_interrupted(monkeypatch, tmp_path):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("avlprof.cli.trace.bars", lambda **options: nullcontext(Counts(interrupt)))
    command = ["trace", "--samples", 4, "--max-new-tokens", 1, "--out", tmp_path / "run"]
    result = invoke(*command)
    assert result.exit_code == 130
    assert result.stderr.rstrip().endswith("interrupted; the same command resumes")
    assert len(avlprof.Run.open(tmp_path / "run").samples()) == 2
    monkeypatch.undo()
    assert invoke(*command).exit_code == 0
    assert avlprof.Run.open(tmp_path / "run").samples()["sample"].is_unique
    assert len(avlprof.Run.open(tmp_path / "run").samples()) == 4


@pytest.mark.full  # a process of its own, waited for and killed
def test_killed_and_resumed(tmp_path):
    out, wanted = tmp_path / "run", 48
    command = ["trace", "--samples", str(wanted), "--max-new-tokens", "1", "--out", str(out)]
    process = os.fork()
    if not process:
        try:
            settle_threads()
            sys.stdout = sys.stderr = (tmp_path / "said.txt").open("w", buffering=1)
            sys.argv = ["avlprof", *command]
            main()
        finally:
            os._exit(1)
    limit = time.monotonic() + 120
    while not list(out.glob("samples-*.parquet")) and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    held = len(avlprof.Run.open(out).samples())
    assert 0 < held < wanted, "the process ended before it was killed"
    assert invoke(*command).exit_code == 0
    traced = list(avlprof.Run.open(out).samples()["sample"])
    assert sorted(traced) == sorted(s.id for s in load_task("shapes").samples("search", wanted))


@pytest.mark.full  # every figure of a run
def test_analyze_and_derive(run, tmp_path):
    result = invoke("analyze", run, "--format", "csv")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(io.StringIO(result.stdout))
    assert list(table["layer"]) == list(range(6))
    assert table["vision_last"].between(0, 1).all()
    figures = {path.stem for path in (run / "figures").glob("*.png")}
    assert {"modality-mass", "coverage-curves", "layer-overlap", "text-window", "vision-heatmap"} <= figures
    assert (run / "profile" / "meta.json").is_file()
    out = tmp_path / "p.yaml"
    result = invoke("derive", run, "--budget", 0.4, "--read-budget", 0.3, "-o", out, "--format", "json")
    assert result.exit_code == 0, result.output
    policy = load_policy(out)
    rows = json.loads(result.stdout)
    assert [row["vision_keep"] for row in rows] == list(policy.vision_keep)
    assert policy.provenance.measured_budget <= 0.4
    assert invoke("derive", run, "--budget", 0.4, "-o", "-").stdout.startswith("schema: avlprof.policy/1\n")
    assert "give either budget or coverage" in refused(invoke("derive", run))
    assert "got 1.5" in refused(invoke("derive", run, "--budget", 1.5))
    assert "did you mean coverage?" in refused(
        invoke("derive", run, "--budget", 0.4, "--allocator", "coverge")
    )
    assert "is not in run" in refused(invoke("analyze", run, "--sample", "nobody"))


@pytest.mark.slow  # every figure of every head
def test_a_run_of_all_heads_has_figures_of_heads(tmp_path, run):
    out = tmp_path / "run"
    result = invoke("trace", "-n", 1, "--max-new-tokens", 3, "--per-head", "--out", out)
    assert result.exit_code == 0, result.output
    result = invoke("analyze", out, "--layer", 2)
    assert result.exit_code == 0, result.output
    figures = {path.stem for path in (out / "figures").glob("*.png")}
    assert {"heads", "head-overlap", "head-heatmaps"} <= figures
    assert "layer must be in 0 to 5, got 6" in refused(invoke("analyze", out, "--layer", 6))
    averages = invoke("analyze", run, "--what", "head_overlap")
    assert "holds averages over heads only; trace with per_head" in refused(averages)


def test_newest_run_is_the_default(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(run)
    result = invoke("analyze", "--no-figures", "--format", "json")
    assert result.exit_code == 0, result.output
    assert "run runs/one (the newest below runs/)" in result.stderr
    assert len(json.loads(result.stdout)) == 6


def test_run_prints_dense_and_policy():
    result = invoke("run", "--policy", "uniform", "--max-new-tokens", 5, "--format", "json")
    assert result.exit_code == 0, result.output
    dense, ours = json.loads(result.stdout)
    assert (dense["policy"], ours["policy"]) == ("dense", "uniform")
    assert 0 < ours["live_kv"] < dense["live_kv"] <= dense["allocated_kv"]
    assert ours["read_kv_per_step"] == ours["live_kv"]
    layers = json.loads(
        invoke("run", "--policy", "uniform", "--max-new-tokens", 5, "--explain", "--format", "json").stdout
    )
    assert [row["layer"] for row in layers] == list(range(6))
    assert sum(row["live_kv"] for row in layers) == ours["live_kv"]


@pytest.mark.full  # a trace with its figures, and another trace
def test_own_picture_is_traced_and_found_again(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["trace", "--image", picture.name, "--prompt", "what color?", "--max-new-tokens", "2"]
    assert invoke(*command).exit_code == 0
    again = invoke(*command, "--format", "json")
    assert json.loads(again.stdout)[0]["samples"] == 1
    found = avlprof.latest_run()
    assert found.path.as_posix() == "runs/tiny-pictures"
    sample = found.samples()["sample"][0]
    assert found.pictures(sample)[0].size == (96, 64)
    assert invoke("analyze").exit_code == 0
    assert (found.path / "figures" / "vision-heatmap.png").is_file()
    picture.unlink()
    with pytest.raises(UserError, match="does not exist"):
        found.pictures(sample)


def test_python_verbs(tiny, run, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = Task("own", "exact_match", ("search",), lambda split: [Sample("a", (picture,), "what?", ("red",))])
    first = avlprof.trace(tiny, held, settings=TraceSettings(max_new_tokens=1), samples=1)
    second = avlprof.trace(tiny, held, settings=TraceSettings(max_new_tokens=2), samples=1)
    same = avlprof.trace(tiny, held, settings=TraceSettings(max_new_tokens=1), samples=1)
    assert [r.path.as_posix() for r in (first, second, same)] == [
        "runs/tiny-own",
        "runs/tiny-own-2",
        "runs/tiny-own",
    ]
    assert list(first.samples()["sample"]) == ["a"]
    assert first.scores("a")["last"].shape == (6, first.samples()["vision"][0])
    assert set(first.stats()["phase"]) == {"prefill"}
    assert first.pictures("a")[0].size == (96, 64)
    known = avlprof.Run.open(run)
    drawn = known.pictures(str(known.samples()["sample"][0]))
    assert drawn[0].size == load_task("shapes").samples("search", 1)[0].open_images()[0].size
    known.check_model(tiny)
    with pytest.raises(UserError, match="was traced on"):
        known.check_model(replace(tiny, revision="other"))
    assert avlprof.latest_run(tmp_path / "none") is None
    assert avlprof.latest_run(loaded=tiny, task="own").path in (first.path, second.path)
    assert avlprof.latest_run(task="shapes") is None


def test_policy_commands(tmp_path):
    rows = {row["name"]: row for row in json.loads(invoke("policy", "ls", "--format", "json").stdout)}
    assert rows["uniform"]["runs"] == "yes"
    assert rows["dense"]["sets"] == "vision_keep 1"
    assert "2409.14846" in rows["paper/a-vl"]["source"]
    shown = invoke("policy", "show", "uniform").stdout
    path = tmp_path / "u.yaml"
    path.write_text(shown)
    assert load_policy(path).name == "uniform"
    assert json.loads(invoke("policy", "show", "uniform", "--format", "json").stdout)["vision_keep"] == 0.2
    assert invoke("policy", "show", "uniform", "--layers", 3, "--format", "csv").stdout.splitlines() == [
        "layer,vision_keep",
        *(f"{i},0.2" for i in range(3)),
    ]
    schema = json.loads(invoke("policy", "schema").stdout)
    assert {"schema", "vision_keep", "text"} <= set(schema["properties"])
    result = invoke("policy", "validate", path, "nobody", "paper/a-vl", "--format", "json")
    assert result.exit_code == 2
    assert [row["policy"] for row in json.loads(result.stdout)] == [str(path), "paper/a-vl"]
    assert "unknown policy 'nobody'" in result.stderr
    result = invoke("policy", "diff", path, "uniform")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "act alike" in result.stderr
    save_policy(Policy(vision_keep=(0.2, 0.3), scorer=load_policy(path).scorer), path)
    assert json.loads(invoke("policy", "diff", "uniform", path, "--format", "json").stdout) == [
        {"field": "vision_keep", "layer": 1, "uniform": 0.2, str(path): 0.3},
    ]


def test_differences_between_any_two_policies():
    three = Policy(vision_keep=(0.1, 0.2, 0.3), text=TextPolicy(window=7))
    two = Policy(vision_keep=(0.1, 0.2), refresh_interval=4)
    found = {row["field"]: row for row in differences(three, two)}
    assert found["vision_keep"]["layer"] is None
    assert found["text.window"]["first"] == 7
    assert found["refresh_interval"]["second"] == 4
    assert differences(three, three) == []
    core = Policy(vision_keep=0.2, vision_compute=(0.2, 0.1))
    assert differences(Policy(vision_keep=0.2), core) == [
        {"field": "vision_compute", "layer": 1, "first": 0.2, "second": 0.1}
    ]
    none_read = Policy(vision_keep=0.2, vision_compute=0.0)
    assert [row["first"] for row in differences(none_read, Policy(vision_keep=0.2))] == [0.0]
    assert differences(DENSE, Policy(name="other", description="same")) == []
    told = (
        Policy(vision_bits=(4, 4), text=TextPolicy(bits=8)),
        Policy(vision_bits=4, text=TextPolicy(bits=(8, 3))),
    )
    assert differences(*told) == [{"field": "text.bits", "layer": 1, "first": 8, "second": 3}]
    assert sets(told[1]) == "vision_keep 1, vision_bits 4, text.bits 3 to 8, by last_query"


def test_models_and_tasks():
    names = [row["name"] for row in json.loads(invoke("models", "--format", "json").stdout)]
    assert {"tiny", "llava", "qwen2.5-vl"} <= set(names)
    kinds = pd.read_csv(io.StringIO(invoke("tasks", "--format", "csv").stdout))
    assert "shapes" in set(kinds[kinds["kind"] == "task"]["name"])
    assert {"exact_match", "anls"} <= set(kinds[kinds["kind"] == "metric"]["name"])


ROWS = [
    {"name": "a,b", "value": 0.12345, "count": 3},
    {"name": 'c "d"', "value": float("nan"), "count": None},
]


def test_tables_hold_the_values(capsys):
    output.show(ROWS, output.Format.json)
    assert json.loads(capsys.readouterr().out) == [
        {"name": "a,b", "value": 0.12345, "count": 3},
        {"name": 'c "d"', "value": None, "count": None},
    ]
    output.show(ROWS, output.Format.csv)
    assert list(csv.DictReader(io.StringIO(capsys.readouterr().out))) == [
        {"name": "a,b", "value": "0.12345", "count": "3"},
        {"name": 'c "d"', "value": "", "count": ""},
    ]
    output.show(ROWS, output.Format.table, cells={"value": output.percent})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name   value  count", "a,b    12.3%      3", 'c "d"      -      -']
    output.show([], output.Format.json)
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_are_readable(count, text):
    assert output.size(count) == text


def test_durations_are_readable():
    assert [duration(s) for s in (4.4, 59.6, 200, 7500)] == ["4 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]


def test_progress_in_a_pipe(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("avlprof.cli._progress.time.monotonic", lambda: now[0])
    with progress("trace", resumes=True) as report:
        report(10, 50)
        for done in range(11, 51):
            now[0] += 1.0
            report(done, 50)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "trace: 10 of 50 samples were done before"
    assert lines[1] == "trace: 20 of 50 samples, 1 samples/s, 30 s left"
    assert lines[-1] == "trace: 50 of 50 samples, 1 samples/s"
    assert len(lines) == 5
    assert all("\x1b" not in line for line in lines)


@pytest.mark.parametrize(("measured", "said"), [(0.1996, False), (0.2004, False), (0.2011, True)])
def test_more_than_at_most_is_explained(measured, said):
    """What keeps at most 20% of the prompts of the search may keep 20.1% of others: then it is told."""
    source = Provenance(model="tiny", task="shapes", budget=0.2)
    tuned = SimpleNamespace(policy=Policy(provenance=source))
    rows = [{"policy": "dense", "live_share": 1.0}, {"policy": "tuned", "live_share": measured}]
    line = _beyond(tuned, rows)
    assert bool(line) == said
    assert not said or ("budget of 20.0% is met on the prompts of the search" in line and "20.1%" in line)
