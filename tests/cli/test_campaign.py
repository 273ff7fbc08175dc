"""Mutated policies and command lines: no traceback, no hang, and nothing accepted that says otherwise.

Files of samples and pictures have theirs in `tasks/test_task_files.py`, checkpoints in
`models/test_damaged_checkpoints.py`: ten thousand broken inputs in all. A tenth runs by default; the
rest is slow.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from avlprof.errors import UserError
from avlprof.policy import Policy, dump_policy, find_policy, parse_policy, shipped
from tests.cli_runner import invoke

NAMES = sorted(shipped())
SNIPPETS = (
    "!!int ''", "!!float x", "!!bool maybe", "!!timestamp y", "!!binary z", "!!python/name:os.system ''",
    "2001-99-99", "010", "1:30", "0x", "&a [*a]", "*b", "<<: *c", "yes", "no", "~", ".nan", ".inf", "-.inf",
    "1e400", "-1", "9" * 400, "[" * 60, "{a: {a: {a: 1}}}", "? x", "- - -", "'", '"', "\t", "\x00", "\ud7ff",
    "name: a", "text: {window: 0}", "@", "%YAML 9.9",
    "[0.5, yes]", "[]", "{}", "1_0", "0.5e", "x" * 300,
)  # fmt: skip
LINES = st.sampled_from([text for name in NAMES for text in dump_policy(find_policy(name)).splitlines()])
FIELDS = [*Policy.model_json_schema(by_alias=True)["properties"], "text.window", "joint.keep", "nonsense"]
SCALARS = st.one_of(
    st.booleans(), st.none(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(SNIPPETS)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@st.composite
def texts(draw):
    """A shipped policy with some of its text replaced, doubled, cut or moved."""
    lines = dump_policy(find_policy(draw(st.sampled_from(NAMES)))).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(("value", "insert", "double", "cut", "other", "noise")))
        key = lines[at].partition(":")[0]
        snippet = draw(st.sampled_from(SNIPPETS))
        if how == "value":
            lines[at] = f"{key}: {snippet}"
        elif how == "insert":
            lines.insert(at, snippet)
        elif how == "double":
            lines.insert(at, lines[at])
        elif how == "cut":
            lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
        elif how == "other":
            lines[at] = draw(LINES)
        else:
            lines[at] += draw(st.text(max_size=6))
    return "\n".join(lines)


def check_policy(text):
    """One short sentence, or a policy that says what the text says and comes back from its own text."""
    try:
        policy = parse_policy(text, "p.yaml")
    except UserError as error:
        said = str(error)
        assert said
        assert len(said) < 700
        assert "\n" not in said
        assert "Traceback" not in said
        return
    assert parse_policy(dump_policy(policy)).hash == policy.hash
    data = yaml.safe_load(text)
    for name in ("vision_keep", "vision_compute", "refresh_interval"):
        asked, kept = data.get(name), getattr(policy, name)
        if isinstance(asked, int | float):
            assert not isinstance(asked, bool)
            assert math.isclose(asked, kept)
    for layers in (1, 6):
        with contextlib.suppress(UserError):
            policy.check_layers(layers)


def check_values(fields):
    """As of a text: what is no policy is refused in a sentence."""
    check_policy(yaml.safe_dump({"schema": "avlprof.policy/1"} | fields, allow_unicode=True))


WORDS = st.one_of(
    st.sampled_from(
        [
            *("", "-1", "0", "nan", "inf", "20%", "1e400", "x" * 300, "a/b", "..", "/dev/null", "uniform"),
            *("dense", "none.yaml", "-", "é", "3,4"),
        ]
    ),
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip
COMMANDS = {
    ("policy", "show"): ("--layers", "--format", "POLICY"),
    ("policy", "validate"): ("--layers", "--format", "POLICY"),
    ("policy", "diff", "uniform"): ("--format", "POLICY"),
    ("policy", "resolve"): ("--layers", "--run", "POLICY"),
    ("export",): ("--trial", "--max-read", "--to", "--layers", "--tokens", "POLICY"),
    ("export", "--to", "kvpress"): ("--layers", "--tokens", "POLICY"),
    ("leaderboard",): ("--format", "--figure-format", "POLICY"),
    ("studies", "ls"): ("--format", "POLICY"),
    ("studies", "show"): ("--trials", "POLICY"),
    ("derive",): ("--budget", "--read-budget", "--coverage", "--allocator", "--option", "--mix", "POLICY"),
    ("analyze",): ("--what", "--against", "--layer", "POLICY"),
    ("lens",): ("--layers", "--top", "--samples", "--split", "--sample", "--model"),
    ("report",): ("--policy", "--pictures", "--against"),
    ("explore",): ("--samples", "--sample", "--against", "POLICY"),
    ("run", "--policy"): ("POLICY", "--max-new-tokens", "--image", "--model-args", "--dtype", "--attention"),
    ("tune",): ("--budgets", "--budget", "--trials", "--samples", "--sampler", "--prompt-bytes"),
    ("bench", "decode"): ("--shape", "--sizes", "--batch", "--vision", "--budget"),
    ("models",): ("--format",),
    ("nonsense",): ("--x",),
}  # fmt: skip


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(list(COMMANDS)))
    words = list(command)
    for option in draw(st.lists(st.sampled_from(COMMANDS[command]), min_size=1, max_size=3)):
        words += [draw(WORDS)] if option == "POLICY" else [option, draw(WORDS)]
    return words


def check_command(words):
    """It works or is refused; the model is never needed, since it is not there."""
    result = invoke(*words)
    assert result.exit_code in (0, 2), (words, result.output[-600:])
    assert "Traceback" not in result.output
    if result.exit_code == 2:
        said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert said, (words, result.output)
        assert all(len(line) < 1100 for line in said)


@pytest.fixture
def aside(tmp_path_factory, monkeypatch):
    """An empty folder to stand in, and no model to load: command lines are what is tested."""

    def fails(*args, **options):
        raise UserError("there is no model here")

    monkeypatch.chdir(tmp_path_factory.mktemp("aside"))
    for name in (
        "avlprof.models.load._load",
        "avlprof.bench.decode.run_decode_bench",
        "avlprof.api.trace.trace",
    ):
        monkeypatch.setattr(name, fails)


def campaign(count, strategy, check):
    settings(max_examples=count, **LIMITS)(seed(7)(given(strategy)(check)))()


CASES = {
    "texts": (texts(), check_policy, 2_500),
    "values": (st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), check_values, 2_500),
    "commands": (command_lines(), check_command, 1_000),
}


@pytest.mark.full  # hundreds of broken inputs
@pytest.mark.parametrize("case", CASES)
def test_campaign(case, aside):
    strategy, check, count = CASES[case]
    campaign(count // 10, strategy, check)


@pytest.mark.slow  # ten times as many, several minutes
@pytest.mark.parametrize("case", CASES)
def test_whole_campaign(case, aside):
    strategy, check, count = CASES[case]
    campaign(count, strategy, check)
