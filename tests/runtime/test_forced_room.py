"""Where prefilled prompts stay: scores are the same on the device, back from the host, and run again."""

from __future__ import annotations

import pytest
import torch

from avlprof.attention.codec import degraded
from avlprof.models import memory
from avlprof.models.memory import free_bytes, host_bytes
from avlprof.policy import Policy, ScorerSpec, TextPolicy
from avlprof.runtime.forced import ForcedSet, prompt
from avlprof.runtime.forced.room import Room, prompt_bytes
from avlprof.tasks import load_task
from avlprof.watch import Watch
from tests.helpers import few

POLICIES = [Policy(vision_keep=0.2), Policy(vision_keep=0.3, scorer=ScorerSpec(name="instruction"))]


class Said(Watch):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def samples():
    return load_task("shapes").samples("search", 5)


@pytest.fixture(scope="module")
def whole(tiny, samples):
    """Without a limit, and with all that the policies need, whichever test comes first."""
    forced = ForcedSet.prepare(tiny, samples, max_new_tokens=6, batch_size=2)
    for policy in POLICIES:
        forced.score(policy)
    return forced


@pytest.mark.parametrize("allowed", few([0, 0.4, 0.7], [0.4]))
@pytest.mark.parametrize("host", few([0, None, "some"], ["some"]))
@pytest.mark.full
def test_scores_do_not_depend_on_the_room(tiny, samples, whole, allowed, host):
    """Bit for bit: a batch is the same one wherever its prompts have been."""
    limit = int(allowed * whole.nbytes)
    tight = ForcedSet.prepare(tiny, samples, max_new_tokens=6, batch_size=2, memory=limit)
    room = whole.nbytes // 3 if host == "some" else host
    tight.room = Room(limit, room)
    wanted = [score for policy in POLICIES for score in whole.score(policy)]
    for _ in range(2):  # the second time from where the first has left them
        assert [score for policy in POLICIES for score in tight.score(policy)] == wanted
        assert tight.nbytes <= limit
    together = whole.score_many(POLICIES)
    assert tight.score_many(POLICIES) == together
    if host == "some":
        assert 0 < tight.parked <= room or allowed == 0.7
    elif host is None:
        assert tight.parked > 0
    else:
        assert tight.parked == 0


def test_what_is_parked_takes_new_scores_along(tiny, samples, whole):
    forced = ForcedSet.prepare(tiny, samples[:2], max_new_tokens=6, batch_size=2, memory=0)
    forced.room = Room(0, None)
    scored = Policy(vision_keep=0.2, scorer=ScorerSpec(name="accumulated"))
    forced.score(POLICIES[0])
    before = forced.parked
    first = forced.score(scored)
    assert forced.parked > before
    assert forced.score(scored) == first
    assert forced.nbytes == 0


def test_copies_in_few_bits_are_kept_and_let_go_first(tiny, samples, monkeypatch):
    forced = ForcedSet.prepare(tiny, samples, max_new_tokens=6, batch_size=2)
    several = [
        Policy(vision_keep=0.4, vision_bits=bits, text=TextPolicy(bits=text))
        for bits, text in ((4, 16), ((2, 3, 4, 8, 16, 4), 4), (3, 3), (2, 8), (8, 4), (16, 16))
    ]
    forced.score(several[-1])
    prompts = forced.nbytes
    scores = [forced.score(policy) for policy in several]
    assert forced.nbytes > prompts
    kv = sum(prompt_bytes(tiny, [sample]) for sample in samples)
    assert forced.nbytes <= prompts + 3 * 1.2 * kv  # a batch is padded
    made = []
    monkeypatch.setattr(prompt, "degraded", lambda part, bits: made.append(bits) or degraded(part, bits))
    assert forced.score(several[4]) == scores[4] and not made
    assert [forced.score(policy) for policy in several] == scores and made
    forced.room = Room(prompts, None)
    assert [forced.score(policy) for policy in several] == scores
    assert forced.nbytes <= prompts and forced.parked == 0


def test_the_room_is_told_and_batches_shrink(tiny, samples, monkeypatch):
    each = prompt_bytes(tiny, samples)
    shape = ForcedSet.prepare(tiny, samples[:1], max_new_tokens=2).shapes[0]
    per_token = tiny.adapter.layers * tiny.adapter.kv_bytes_per_token_per_layer()
    assert each == pytest.approx(shape.total * per_token, rel=0.2)
    said = Said()
    monkeypatch.setattr(memory, "_available", lambda: 5 * each)
    small = ForcedSet.prepare(tiny, samples, max_new_tokens=2, batch_size=4, watch=said)
    assert small.room.device == int(2.5 * each)
    assert small.room.host == 0
    (line,) = said.lines
    assert line.startswith("prompt KV of 5 samples: about ")
    assert "the rest is prefilled again" in line
    assert line.endswith("; 2 at a time, not 4")
    assert [len(score(POLICIES[:1])[0]) for score in small.batches()] == [2, 2, 1]


def test_free_memory_is_known():
    assert 1 << 20 < host_bytes() < 1 << 50
    assert free_bytes([torch.device("cpu")]) == pytest.approx(host_bytes(), rel=0.5)
    assert free_bytes([]) is None


def test_a_container_may_have_less_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_available", lambda: 10**12)
    assert host_bytes() == 10**12
    for name, text in (
        ("memory.max", "5000\n"),
        ("memory.current", "3000\n"),
        ("memory.stat", "anon 1\ninactive_file 500\n"),
    ):
        (tmp_path / name).write_text(text)
    assert host_bytes() == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert host_bytes() == 10**12
