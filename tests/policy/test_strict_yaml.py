"""Policy files that PyYAML would trip over, misread or never finish: one sentence each."""

from __future__ import annotations

from itertools import pairwise

import pytest

from avlprof.errors import UserError, cut, shortened
from avlprof.files import check_output, checked_path
from avlprof.policy import find_policy, load_policy, parse_policy
from tests.cli_runner import invoke, refused

HEAD = "schema: avlprof.policy/1\n"


def bomb(levels: int) -> str:
    names = "abcdefghijklmnopqrstuvwxyz"[:levels]
    nines = (f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise(names))
    return f"{HEAD}a: &a [x,x,x,x,x,x,x,x,x]\n{''.join(nines)}"


CASES = {
    "aliases": (bomb(12), "its aliases stand for more than 20000 values"),
    "few aliases": (bomb(4), "unknown policy key"),
    "itself": (f"{HEAD}name: &a [*a]", "line 2: this sequence holds itself"),
    "timestamp": (f"{HEAD}name: 2001-99-99", "line 2: '2001-99-99' is no timestamp"),
    "date": (f"{HEAD}name: 2001-01-01", "name: input should be a valid string"),
    "float": (f"{HEAD}vision_keep: !!float abc", "'abc' is no float"),
    "int": (f"{HEAD}vision_keep: !!int ''", "'' is no int"),
    "tagged timestamp": (f"{HEAD}name: !!timestamp x", "'x' is no timestamp"),
    "bool": (f"{HEAD}name: !!bool maybe", "'maybe' is no bool"),
    "digits": (f"{HEAD}refresh_interval: {'1' * 5000}", "too large a number"),
    "nines": (f"{HEAD}text: {{window: 2, sink: {'9' * 400}}}", "too large a number"),
    "million million": (f"{HEAD}refresh_interval: 1000000000000", "at most 10^9, got 1000000000000"),
    "brackets": ("[" * 2000, "line 1 is nested deeper than 20 levels"),
    "octal": (f"{HEAD}refresh_interval: 010", "would be octal"),
    "base 60": (f"{HEAD}refresh_interval: 1:30", "base of 60"),
    "base 60 float": (f"{HEAD}vision_keep: 1:30.5", "base of 60"),
    "switch": (f"{HEAD}vision_keep: yes", "vision_keep: input should not be yes or no, got True"),
    "switches": (f"{HEAD}vision_keep: [0.5, yes]", "vision_keep: input should not be yes or no"),
    "key twice": (f"{HEAD}name: a\nname: b", "line 3: 'name' stands twice in one section"),
    "inner key twice": (f"{HEAD}text: {{window: 3, window: 4}}", "'window' stands twice"),
    "list as key": (f"{HEAD}? [a]\n: 1", "cannot be a key"),
    "long name": (f"{HEAD}name: {'x' * 300}", "at most 200 characters"),
    "long key": (f"{HEAD}{'x' * 900}: 1", "unknown policy key"),
    "long value": (f"{HEAD}vision_keep: {'x' * 9000}", "vision_keep"),
    "zero byte": (f"{HEAD}\0", "unacceptable character"),
    "not a mapping": ("- 1", "must hold a mapping"),
    "huge": (HEAD + "#" * 1_000_001, "too much for a file of settings"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_yaml_trips_over(case, tmp_path):
    text, said = CASES[case]
    with pytest.raises(UserError) as caught:
        parse_policy(text, "p.yaml")
    assert said in str(caught.value)
    assert "p.yaml" in str(caught.value)
    assert len(str(caught.value)) < 400
    path = tmp_path / "p.yaml"
    path.write_text(text)
    assert refused(invoke("policy", "show", path))


def test_anchors_and_merges_are_read():
    policy = parse_policy(f"{HEAD}vision_keep: &k 0.5\nvision_compute: *k\ntext: {{window: 3}}")
    assert policy.vision_compute == 0.5
    merged = parse_policy(f"{HEAD}text:\n  <<: {{window: 4, sink: 2}}\n  window: 3")
    assert (merged.text.window, merged.text.sink) == (3, 2)


def test_names_that_no_file_system_takes(tmp_path):
    for name in ("x" * 300, f"{'x' * 300}.yaml", f"a/{'y' * 256}/b.yaml", "a\0b", "/".join(["d"] * 3000)):
        for find in (find_policy, load_policy, checked_path, check_output):
            with pytest.raises(UserError) as caught:
                find(name)
            assert len(str(caught.value)) < 300
    assert find_policy("uniform").name == "uniform"


def test_outputs_are_checked_before_any_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    check_output(None)
    check_output(file)
    check_output(tmp_path / "a" / "b" / "c.yaml")
    check_output(tmp_path / "a" / "b", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for path, folder, said in (
        (tmp_path, False, "is a folder; give the file"),
        (file, True, "is a file; give a folder"),
        (file / "x.yaml", False, "is a file, not a folder"),
        (file / "x", True, "is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=said):
            check_output(path, folder)


def test_values_are_cut():
    assert cut("a  b\nc") == "a b c"
    assert len(cut("x" * 10**6)) == 300
    assert shortened([1, 2]) == "[1, 2]"
    nested: list = [1] * 9
    for _ in range(40):
        nested = [nested] * 9
    assert len(shortened(nested)) <= 60
    assert len(shortened("x" * 10**6)) <= 60
