"""What stands at the edge of the command line: starts, memory, outputs, names, read-only folders."""

from __future__ import annotations

import os

import pytest
import torch

import avlprof
from avlprof.cli import _failures as failures
from avlprof.cli import _start as start
from avlprof.cli import demo
from avlprof.cli._app import COMMANDS
from avlprof.cli.derive import file_name
from avlprof.errors import UserError, counted
from avlprof.launchers import crew
from avlprof.policy import Policy, load_policy, save_policy
from avlprof.tracing.options import TraceSettings
from tests.cli_runner import invoke, invoke_as_bystander, refused, unwritable
from tests.synthetic_run import write_run

LONG = "x" * 300


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", vision=(5, 4))
    return tmp_path / "run"


@pytest.fixture
def readonly(run):
    """The run, and nothing of it may be written."""
    with unwritable(run) as folder:
        yield folder


@pytest.mark.parametrize("words", [[], ["studies"], ["policy"], ["bench"]])
def test_bare_commands_print_their_help(words):
    result = invoke(*words)
    assert result.exit_code == 0
    assert "Usage: avlprof" in result.output
    assert "error" not in result.output.lower().split("usage")[0]


def test_a_percentage_is_no_share():
    for words in (["--budget", "20%"], ["-b", "20%"], ["--budget=20%"]):
        assert "got '20%'; did you mean 0.2?" in refused(invoke("derive", *words))
    assert "did you mean 0.2" in refused(invoke("compare", "--budget", "20%"))
    assert "did you mean 0.1,0.2" in refused(invoke("tune", "--budgets", "10%,0.2"))


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."),
        OutOfMemoryError("MPS backend out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
        MemoryError(),
    ],
)
def test_no_memory_names_the_options(error, monkeypatch):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr("avlprof.api.tune.tune", fails)
    said = refused(invoke("tune"))
    assert said.startswith("not enough memory")
    assert said.index("--batch-size") < said.index("--samples") < said.index("--max-new-tokens")
    assert "--quantize" in said
    if "2.00 GiB" in str(error):
        assert "for 2.00 GiB more" in said
    monkeypatch.setattr("avlprof.models.load_model", fails, raising=False)
    monkeypatch.setattr("avlprof.models.load.load_model", fails)
    alone = refused(invoke("run", "--policy", "uniform"))
    assert "--samples" not in alone
    assert "--max-new-tokens" in alone


def test_other_runtime_errors_stay_unexpected():
    assert failures.sentence(RuntimeError("shape mismatch"), []) is None
    assert failures.sentence(ValueError("x"), []) is None
    error = PermissionError(13, "Permission denied", "/some/file")
    assert failures.sentence(error, []) == "'/some/file': Permission denied"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("max_new_tokens must be at least 1, got 0", "--max-new-tokens must be at least 1, got 0"),
        ("samples must be 2 or more, got 1", "--samples must be 2 or more, got 1"),
        ("the samples must differ", "the samples must differ"),
        ("run holds another run (max_new_tokens: 0 here)", "run holds another run (max_new_tokens: 0 here)"),
        ("see a/max_new_tokens.yaml", "see a/max_new_tokens.yaml"),
    ],
)
def test_arguments_are_called_by_their_flags(message, said):
    assert failures.by_flags(message, ["--max-new-tokens", "--samples"]) == said


@pytest.mark.parametrize(
    ("words", "threads"),
    [
        (["trace"], "1"),
        (["demo"], "1"),
        (["tune", "-m", "tiny"], "1"),
        (["tune", "-mtiny"], "1"),
        (["tune", "--model=llava"], "5"),
        (["--debug", "run", "--model", "llava"], "5"),
        (["analyze"], None),
        (["bench", "decode"], None),
    ],
)
def test_threads_do_not_spin(words, threads, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(start, "free_cores", lambda: 5)
    start.prepare(words)
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert os.environ["KMP_BLOCKTIME"] == "0"


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active"})
    start.prepare(["trace"])
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert start.OWN_THREADS not in os.environ


def test_free_cores(monkeypatch):
    assert start.OWN_THREADS == crew.OWN_THREADS
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for load, cores in ((0.0, 8), (3.2, 5), (40.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        assert start.free_cores() == cores


def test_a_first_sign_of_life(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {})
    for words, said in (["trace"], "avlprof trace: starting"), (["trace", "--help"], ""), (["models"], ""):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        start.prepare(words)
        assert capsys.readouterr().err.startswith(said)


def unloaded(*args, **options):
    raise AssertionError("the model was loaded first")


OUTPUTS = {
    "trace": ["trace", "-o"],
    "tune": ["tune", "-o"],
    "evaluate": ["evaluate", "--policy", "uniform", "-o"],
    "compare": ["compare", "-o"],
    "knockout": ["knockout", "-o"],
    "lens": ["lens", "-o"],
    "bench tune": ["bench", "tune", "-o"],
    "bench decode": ["bench", "decode", "-o"],
    "derive": ["derive", "RUN", "--budget", "0.4", "-o"],
    "report": ["report", "RUN", "-o"],
    "explore": ["explore", "RUN", "-o"],
    "policy resolve": ["policy", "resolve", "pyramidkv", "--layers", "6", "-o"],
    "policy schema": ["policy", "schema", "-o"],
    "export": ["export", "none", "-o"],
    "leaderboard": ["leaderboard", "none", "-o"],
    "demo": ["demo", "-o"],
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_are_checked_before_any_work(command, run, tmp_path, monkeypatch):
    monkeypatch.setattr("avlprof.models.load._load", unloaded)
    monkeypatch.setattr("avlprof.analysis.Profile.of", unloaded)
    (tmp_path / "file").write_text("x")
    words = [str(run) if word == "RUN" else word for word in OUTPUTS[command]]
    for out in (LONG, f"a/{LONG}/b", tmp_path / "file" / "x"):
        assert "file" in refused(invoke(*words, out)) or "bytes" in refused(invoke(*words, out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.parametrize(
    "words",
    [
        ["trace", "--model", LONG],
        ["trace", "--model", f"./{LONG}"],
        ["trace", "--task", LONG],
        ["trace", "--task", f"{LONG}.jsonl"],
        ["trace", "--task", f"./{LONG}"],
        ["trace", "--image", LONG, "--prompt", "x"],
        ["run", "--policy", LONG],
        ["run", "--policy", f"{LONG}.yaml"],
        ["evaluate", "--policy", LONG],
        ["compare", "--baseline", LONG],
        ["compare", "--study", LONG],
        ["knockout", "--route", LONG],
        ["knockout", "--layers", LONG],
        ["knockout", "--window", LONG],
        ["policy", "show", LONG],
        ["policy", "diff", "uniform", LONG],
        ["analyze", LONG],
        ["analyze", "--against", LONG],
        ["report", LONG],
        ["explore", LONG],
        ["explore", "--against", LONG],
        ["explore", "RUN", "--lens", LONG],
        ["lens", "--model", LONG],
        ["lens", "--layers", LONG],
        ["derive", LONG, "--budget", "0.4"],
        ["derive", "RUN", "--budget", "0.8", "--name", LONG],
        ["export", LONG],
        ["export", LONG, "--to", "kvpress"],
        ["export", "uniform", "--to", LONG],
        ["leaderboard", LONG],
        ["studies", "show", LONG],
        ["studies", "join", LONG],
        ["studies", "open", LONG],
        ["tune", "--run", LONG],
        [LONG],
    ],
)
def test_names_are_cut_and_refused(words, run):
    words = [str(run) if word == "RUN" else word for word in words]
    said = refused(invoke(*words))
    assert len(said) < 500


def test_a_picture_and_a_task_are_not_mixed(tmp_path):
    from PIL import Image

    picture = tmp_path / "p.png"
    Image.new("RGB", (32, 32)).save(picture)
    base = ["trace", "--image", picture, "--prompt", "what?", "--out", tmp_path / "run"]
    for words in (["--task", "shapes"], ["-n", "3"], ["--split", "search"], ["--metric", "anls"]):
        assert f"{words[0].replace('-n', '--samples')} does nothing beside --image" in refused(
            invoke(*base, *words)
        )
    assert not (tmp_path / "run").exists()


def test_derived_policies_are_named_by_what_differs(run):
    names = set()
    for words in (
        [],
        ["--scorer", "random"],
        ["--read-budget", "0.7"],
        ["--mix", "0.5"],
        ["--floor", "0.05"],
    ):
        result = invoke("derive", run, "--budget", "0.8", *words)
        assert result.exit_code == 0, result.output
        names.add(result.stderr.split("wrote ")[1].splitlines()[0])
    assert len(names) == 5
    holding = invoke("derive", run, "--coverage", "0.4")
    assert holding.exit_code == 0, holding.output
    assert "holding-" in holding.stderr
    assert file_name("a/b ../c") == "a-b-..-c"
    assert file_name("../x") == "-x"


def test_two_files_of_one_name_stand_in_the_tables(tmp_path):
    from avlprof.cli._resolved import named_policies

    files = [
        str(save_policy(Policy(name="p", vision_keep=keep), tmp_path / f"{keep}.yaml")) for keep in (0.2, 0.3)
    ]
    assert [policy.name for policy in named_policies(files)] == [f"p ({file})" for file in files]
    assert [policy.name for policy in named_policies([files[0], "uniform"])] == ["p", "uniform"]


@pytest.mark.full  # profiles that nobody may keep
def test_a_readonly_run_can_be_read(readonly):
    call = invoke_as_bystander
    result = call("analyze", readonly, "--what", "mass", "--format", "csv")
    assert result.exit_code == 0, result.output
    assert call("derive", readonly, "--budget", "0.8", "-o", "-").exit_code == 0
    assert "--no-figures" in refused(call("analyze", readonly))
    assert "not yours to write" in refused(call("derive", readonly, "--budget", "0.8"))
    for command in ("report", "explore"):
        assert "not yours to write" in refused(call(command, readonly, "-o", readonly / "x.html"))


@pytest.mark.full  # whole pages of a run
@pytest.mark.parametrize("command", ["explore", pytest.param("report", marks=pytest.mark.slow)])
def test_a_readonly_run_has_its_page_elsewhere(command, readonly, tmp_path):
    result = invoke_as_bystander(command, readonly, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["trace", "tune", "evaluate", "compare", "bench tune", "demo", "export"])
def test_folders_that_may_not_be_written_are_refused_before_any_work(command, readonly, monkeypatch):
    monkeypatch.setattr("avlprof.models.load._load", unloaded)
    words = [*OUTPUTS[command], readonly / "new"]
    assert "is not yours to write to" in refused(invoke_as_bystander(*words))


@pytest.fixture(scope="module")
def traced(tmp_path_factory, tiny):
    """A run of the embedded model, as an allocator that needs a profile needs one."""
    out = tmp_path_factory.mktemp("traced") / "run"
    avlprof.trace(tiny, "shapes", 2, TraceSettings(max_new_tokens=2), out=out)
    return out


@pytest.mark.full  # traces
def test_a_bare_evaluate_works_out_all_that_ships(traced, tmp_path, monkeypatch):
    asked = []

    def evaluate(loaded, task, policies, *more, **options):
        asked.extend(policies)
        raise UserError("that is all")

    monkeypatch.setattr("avlprof.evaluation.evaluate.evaluate", evaluate)
    result = invoke("evaluate", "-n", "2", "--run", traced, "-o", tmp_path / "e")
    assert refused(result) == "that is all"
    assert {"uniform", "prefixkv", "vl-cache", "pyramidkv", "a-vl"} <= {policy.name for policy in asked}
    assert all(policy.allocator is None for policy in asked)


@pytest.mark.full  # two answers
def test_a_policy_with_an_allocator_runs_as_it_is_typed(traced):
    result = invoke(
        "run", "--policy", "vl-cache", "--run", traced, "--max-new-tokens", "2", "--format", "csv"
    )
    assert result.exit_code == 0, result.output
    assert f"shares of layers from run {traced}" in result.stderr
    assert "tokens_per_s" in result.stdout


def test_the_demo_shows_no_speed_of_a_single_answer(tmp_path, monkeypatch):
    typed = []
    monkeypatch.setattr("avlprof.cli._app.app", lambda words, **options: typed.append(words))
    demo.demo(tmp_path / "demo", 0.2, 40, 48, 120)
    (run,) = (words for words in typed if words[0] == "run")
    assert "--no-speed" in run
    words = ["--no-speed", "--policy", "uniform", "--max-new-tokens", "2", "--format", "csv"]
    monkeypatch.undo()
    shown = invoke("run", *words)
    assert shown.exit_code == 0, shown.output
    assert "answer" in shown.stdout and "tokens_per_s" not in shown.stdout


@pytest.mark.full  # every figure of a run, in each format
@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_figures_in_other_formats(run, kind):
    result = invoke("analyze", run, "--figure-format", kind)
    assert result.exit_code == 0, result.output
    assert {path.suffix for path in (run / "figures").iterdir()} == {f".{kind}"}
    for command in ("tune", "compare", "evaluate"):
        assert "--figure-format" in invoke(command, "--help", env={"COLUMNS": "200"}).output


def test_counts_are_counted():
    assert [counted(n, "sample") for n in (0, 1, 2)] == ["0 samples", "1 sample", "2 samples"]
    assert set(COMMANDS) >= {"trace"}
    with pytest.raises(UserError):
        load_policy("none.yaml")
