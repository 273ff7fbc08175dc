"""The same model and task options on every command that loads a model or reads a task."""

from __future__ import annotations

import re

import pytest

from avlprof.cli._app import COMMANDS
from avlprof.models import ModelSpec
from avlprof.tasks.spec import TaskSpec
from avlprof.tuning import Settings, Workers
from tests.cli_runner import invoke, refused
from tests.helpers import few

MODEL = ("--model", "--device", "--dtype", "--revision", "--trust-remote-code", "--device-map", "--quantize")
MODEL = (*MODEL, "--attention", "--model-args")
TASK = ("--task", "--metric", "--max-new-tokens", "--columns", "--dataset-split", "--dataset-config")
TASK = (*TASK, "--dataset-revision")
LOADING = ("trace", "run", "tune", "evaluate", "compare", "knockout", "studies join", "bench tune", "lens")


def flags(command):
    result = invoke(*command.split(), "--help", env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return set(re.findall(r"--[a-z][a-z-]+", result.output))


@pytest.mark.parametrize("command", few(LOADING, 3))
def test_the_same_options(command):
    there = flags(command)
    assert set(MODEL) <= there
    if command != "run":
        assert set(TASK) <= there
    if command in ("tune", "evaluate", "compare", "knockout", "trace", "studies join", "bench tune", "lens"):
        assert "--batch-size" in there


@pytest.mark.parametrize(
    "command", few([*COMMANDS, "studies join", "bench tune", "policy show"], ["trace", "bench tune"])
)
def test_no_completion_options(command):
    assert not {flag for flag in flags(command) if "completion" in flag}
    assert not {flag for flag in flags("") if "completion" in flag}


def test_workers_get_every_option(tmp_path):
    spec = ModelSpec("owner/name", quantize="8bit", model_args={"x": 1})
    source = TaskSpec("a.jsonl", columns="prompt=q", dataset_split="val")
    settings = Settings(batch_size=4, prompt_bytes=10**9)
    words = Workers(2, model=spec, task=source).command(tmp_path, settings)
    for option, value in (
        ("--model", "owner/name"),
        ("--quantize", "8bit"),
        ("--model-args", "x=1"),
        ("--task", "a.jsonl"),
        ("--columns", "prompt=q"),
        ("--dataset-split", "val"),
        ("--batch-size", "4"),
        ("--prompt-bytes", "1000000000"),
    ):
        assert words[words.index(option) + 1] == value
    assert refused(invoke(*words[2:]))
