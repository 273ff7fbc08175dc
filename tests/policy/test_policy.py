"""The policy: YAML round trips, refusals in one sentence, and the arithmetic of tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from avlprof.budgets import ReadBudget, meet_both, meet_budget, meet_read_budget, scale_to
from avlprof.errors import UserError
from avlprof.policy import (
    DENSE,
    RANKING,
    CoreScore,
    JointPool,
    Policy,
    PrefillFilter,
    PromptShape,
    Provenance,
    Score,
    ScorerSpec,
    TextPolicy,
    dump_policy,
    find_policy,
    live_share,
    load_policy,
    parse_policy,
    read_share,
    save_policy,
    shipped,
    sizes,
)
from avlprof.runtime.support import unsupported
from tests.helpers import ROOT

HEAD = "schema: avlprof.policy/1\n"
FOLDER = ROOT / "policies"
WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=120)
RATIO = st.integers(0, 1000).map(lambda n: n / 1000)


@st.composite
def policies(draw, runnable=False):
    """A valid policy, with scalars or lists; `runnable` leaves out what the runtime refuses."""
    layers = draw(st.integers(1, 5))

    def per_layer(values):
        return draw(st.one_of(values, st.tuples(*[values] * layers)))

    fields = {"name": draw(WORDS.filter(bool)), "description": draw(WORDS), "source": draw(WORDS)}
    if draw(st.booleans()):
        decoding = "evict" if runnable else draw(st.sampled_from(["evict", "grow"]))
        fields |= {
            "pool": "joint",
            "joint": JointPool(keep=per_layer(RATIO), sink=draw(st.integers(0, 9)), decoding=decoding),
            "scorer": ScorerSpec(name="position"),
        }
    else:
        keep = per_layer(RATIO)
        fields["vision_keep"] = keep
        if draw(st.booleans()):
            share = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
            scaled = [share * k for k in keep] if isinstance(keep, tuple) else share * keep
            fields |= {"vision_compute": scaled, "refresh_interval": draw(st.integers(0, 7))}
            kind = draw(st.sampled_from(["full", "score_only", "triggered"]))
            leads = draw(st.sets(st.integers(0, layers - 1), max_size=3))
            fields["refresh"] = kind
            if kind == "triggered":
                fields["refresh_margin"] = draw(RATIO.filter(bool))
            if kind != "full" and leads:
                fields["refresh_layers"] = sorted(leads)
        fields["core_score"] = CoreScore(prompt=draw(RATIO), memory=draw(RATIO.filter(lambda r: r < 1)))
        fields["vision_bits"] = per_layer(st.sampled_from([16, 8, 4, 3, 2]))
        fields["heads"] = draw(st.sampled_from(["shared", "kv_head", "adaptive"]))
        if runnable and "vision_compute" in fields:
            fields["heads"] = "kv_head"
        if fields["heads"] == "adaptive":
            apart = [
                tuple(2 * one for one in (part, 1 - part))
                for part in draw(st.lists(RATIO, min_size=layers, max_size=layers))
            ]
            fields |= {"head_floor": draw(RATIO), "head_shares": draw(st.sampled_from([None, apart]))}
        waits = fields.get("refresh") == "triggered" or "refresh_layers" in fields
        kinds = ["all", "bits", "window"] if runnable else ["all", "bits", "window", "keep"]
        kind = draw(st.sampled_from(kinds))
        if kind == "bits":
            fields["text"] = TextPolicy(bits=per_layer(st.sampled_from([16, 8, 4, 3, 2])))
        if kind == "window":
            window, sink = per_layer(st.integers(1, 40)), per_layer(st.integers(0, 5))
            fields["text"] = TextPolicy(window=window, sink=sink)
        elif kind == "keep":
            fields["text"] = TextPolicy(
                keep=per_layer(RATIO),
                minimum=draw(st.integers(1, 30)),
                recent=draw(RATIO),
                scorer=draw(st.sampled_from(["position", "history", "accumulated"][: 1 if waits else 3])),
            )
        options = draw(st.dictionaries(st.sampled_from(["seed", "power"]), st.integers(-5, 5), max_size=2))
        fields["scorer"] = ScorerSpec(name=draw(st.sampled_from(["last_query", "random"])), options=options)
        if not runnable:
            after = draw(st.lists(st.integers(1, 9), unique=True, max_size=2))
            fields["prefill_filter"] = tuple(
                PrefillFilter(after_layer=n, keep=draw(RATIO)) for n in sorted(after)
            )
    if draw(st.booleans()):
        mean = draw(RATIO)
        score = Score(mean=mean, low=mean / 3, high=mean, samples=draw(st.integers(1, 99)))
        fields["provenance"] = Provenance(task=draw(WORDS), seed=3, budget=mean, scores={"dense": score})
    return Policy(**fields)


@settings(deadline=None)
@given(policies())
def test_yaml_round_trip_is_byte_stable(policy):
    text = dump_policy(policy)
    again = parse_policy(text)
    assert again == policy
    assert dump_policy(again) == text
    assert again.hash == policy.hash


def test_hash_is_of_what_a_policy_does():
    base = Policy(vision_keep=0.5)
    assert (
        Policy(vision_keep=0.5, name="x", description="y", source="z", provenance=Provenance()).hash
        == base.hash
    )
    others = [Policy(vision_keep=0.25), Policy(vision_keep=0.5, text=TextPolicy(window=9)), DENSE]
    assert len({p.hash for p in (base, *others)}) == 4


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_policy(path):
    text = path.read_text(encoding="utf-8")
    policy = load_policy(path)
    assert dump_policy(policy) == text
    assert policy.name == path.relative_to(FOLDER).with_suffix("").as_posix().removeprefix("baselines/")
    assert policy.description
    assert policy.source
    assert find_policy(policy.name) == policy


def test_a_file_without_a_scorer_means_what_it_did():
    """That of A-VL, as in 0.1.0; what is made today names its ranking."""
    text = "schema: avlprof.policy/1\nname: mine\nvision_keep: 0.2\n"
    policy = parse_policy(text)
    assert policy.scorer == ScorerSpec(name="last_query") == Policy().scorer
    assert policy.hash == "4bab60249f00227a"
    assert dump_policy(policy) == text

    for name in ("paper/a-vl", "paper/a-vl-vision", "a-vl"):
        assert find_policy(name).scorer.name == "last_query"
    uniform = find_policy("uniform")
    assert uniform.scorer == ScorerSpec.of(RANKING) != policy.scorer
    assert parse_policy(dump_policy(uniform)) == uniform


def test_what_ships_and_what_of_it_runs():
    runs = {name: unsupported(find_policy(name)) is None for name in shipped()}
    assert {"uniform", "random", "streaming-llm", "paper/a-vl", "paper/a-vl-prefill"} <= set(runs)
    assert runs["uniform"]
    assert runs["random"]
    assert runs["streaming-llm"]
    assert runs["paper/a-vl-vision"]


def test_save_and_find(tmp_path):
    policy = Policy(name="mine", vision_keep=(0.5, 0.25))
    path = save_policy(policy, tmp_path / "sub" / "mine.yaml")
    assert find_policy(str(path)) == policy
    assert find_policy("dense") is DENSE
    with pytest.raises(ValidationError):
        policy.name = "other"


REFUSED = {
    "vision_keep: 1.4": "vision_keep must be in [0, 1], got 1.4",
    "vision_keep: [0.2, 0.3, -0.1]": "vision_keep[2] must be in [0, 1], got -0.1",
    "vision_keep: .nan": "vision_keep",
    "vision_keep: [0.5, x]": "vision_keep[1]",
    "vision_keep: [0.2, 0.3]\nvision_compute: 0.25": (
        "vision_compute[0] must not exceed vision_keep[0], got 0.25 > 0.2"
    ),
    "vision_keep: [0.2, 0.3]\nvision_compute: [0.1]": "vision_keep has 2, vision_compute has 1",
    "vision_bits: []": "vision_bits is an empty list; give one number, or one a layer",
    "text: {window: []}": "text.window is an empty list",
    "vision_keep: [0.2, 0.3]\ntext: {window: [3, 4, 5]}": "text.window has 3",
    "vison_keep: 0.2": "unknown policy key 'vison_keep'; did you mean vision_keep?",
    "text: {windw: 3}": "unknown policy key 'text.windw'; did you mean text.window?",
    "window: 3": "did you mean text.window?",
    "joint: {kep: 0.2}\npool: joint": "unknown policy key 'joint.kep'; did you mean joint.keep?",
    "prefill_filter: [{after_layer: 2, kep: 0.1}]": "unknown policy key 'prefill_filter[0].kep'",
    "prefill_filter: [{after_layer: 2}]": "prefill_filter[0].keep is missing",
    "prefill_filter: [{after_layer: 2, keep: 0.5}, {after_layer: 1, keep: 0.2}]": "ordered by after_layer",
    "provenance: {scores: {dense: {mena: 1}}}": "did you mean provenance.scores.mean or",
    "text: {window: 0}": "text.window must be 1 or more tokens, got 0",
    "text: {window: 3, keep: 0.5}": "text.window and text.keep exclude each other",
    "pool: joint": "pool: joint needs the field joint",
    "pool: joint\njoint: {keep: 0.5}\nvision_keep: 0.5": "leave vision_keep",
    "refresh_interval: -1": "refresh_interval",
    "vision_bits: 5": "vision_bits must be 16, 8, 4, 3 or 2, got 5",
    "vision_bits: [16, 4, 1]": "vision_bits[2] must be 16, 8, 4, 3 or 2, got 1",
    "vision_bits: four": "vision_bits",
    "vision_bits: [4, 8]\nvision_keep: [0.5, 0.2, 0.1]": "vision_bits has 2",
    "pool: joint\njoint: {keep: 0.5}\nvision_bits: 4": "leave vision_bits out",
    "text: {bits: 7}": "text.bits must be 16, 8, 4, 3 or 2, got 7",
    "text: {bits: [4, 9]}": "text.bits[1] must be 16, 8, 4, 3 or 2, got 9",
    "text: {bits: [4, 8]}\nvision_bits: [4, 4, 4]": "text.bits has 2",
    "text: {bits: 8, window: 5}": "text.bits stores all text; leave text.window and text.keep out",
    "text: {bits: [16, 8], keep: 0.5}": "text.bits stores all text; leave text.window and text.keep out",
    "pool: joint\njoint: {keep: 0.5}\ntext: {bits: 4}": "leave text.bits out",
    "core_score: {prompt: 1.5}": "core_score.prompt: input should be less than or equal to 1, got 1.5",
    "core_score: {memory: 1}": "core_score.memory: input should be less than 1, got 1",
    "core_score: {memroy: 0.5}": "did you mean core_score.memory?",
    "pool: joint\njoint: {keep: 0.5}\ncore_score: {prompt: 0.5}": "leave core_score out",
    "refresh: sometimes": "refresh",
    "refresh_margin: 0.2": "refresh_margin goes with refresh: triggered",
    "refresh: triggered\nrefresh_margin: 0": "refresh_margin: input should be greater than 0, got 0",
    "refresh: triggered\ntext: {keep: 0.5, scorer: history}": "refresh: triggered does not go with text",
    "refresh_layers: [0]": "refresh_layers goes with refresh: score_only or refresh: triggered",
    "refresh: score_only\nrefresh_layers: []": "refresh_layers must name at least one layer",
    "refresh: score_only\nrefresh_layers: [2, 2]": "in ascending order, each once",
    "refresh: score_only\nrefresh_layers: [2, -2]": "refresh_layers[1]",
    "refresh: score_only\nrefresh_layers: [1]\ntext: {keep: 0.5, scorer: history}": "refresh_layers does not",
    "pool: joint\njoint: {keep: 0.5}\nrefresh: score_only\nrefresh_layers: [0]": "leave refresh_layers out",
    "heads: each": "heads",
    "heads: adaptive\nhead_floor: 1.5": "head_floor: input should be less than or equal to 1, got 1.5",
    "head_floor: 0.5": "head_floor and head_shares go with heads: adaptive",
    "heads: kv_head\nhead_shares: [[1, 1]]": "head_floor and head_shares go with heads: adaptive",
    "heads: adaptive\nhead_shares: [[1.5, 0.6]]": "head_shares[0] must have the mean 1, got 1.05",
    "heads: adaptive\nhead_shares: [[1, 1], [1]]": "one share for each KV head in every layer, got 1",
    "heads: adaptive\nhead_shares: [[2, -1, 2]]": "head_shares[0][1]",
    "heads: adaptive\nhead_shares: []": "head_shares is an empty list",
    "heads: adaptive\nhead_shares: [[1, 1]]\nvision_keep: [0.5, 0.2]": "head_shares has 1",
    "schema: avlprof.policy/2": "schema",
    "a: [": "not valid YAML",
}


@pytest.mark.parametrize("body", REFUSED)
def test_refused_in_one_sentence(body):
    text = body if body.startswith("schema") else HEAD + body
    with pytest.raises(UserError) as caught:
        parse_policy(text, "some.yaml")
    said = str(caught.value)
    assert REFUSED[body] in said
    assert "some.yaml" in said
    assert "\n" not in said


@pytest.mark.parametrize("text", ["", "- a", "3", "name: x"])
def test_not_a_policy(text):
    with pytest.raises(UserError, match=r"some\.yaml"):
        parse_policy(text, "some.yaml")


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(UserError, match="did you mean uniform"):
        find_policy("unifrom")
    with pytest.raises(UserError, match="does not exist"):
        find_policy(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(tmp_path)


def test_layer_count_of_another_model():
    policy = Policy(name="two", vision_keep=(0.5, 0.25))
    policy.check_layers(2)
    with pytest.raises(UserError, match="'two' is written for 2 layers, the model has 6"):
        sizes(policy, PromptShape(1, 2, 3), 6)
    with pytest.raises(UserError, match="after_layer must be below"):
        Policy(prefill_filter=(PrefillFilter(after_layer=6, keep=0.5),)).check_layers(6)


PROMPTS = st.builds(PromptShape, st.integers(0, 6), st.integers(0, 40), st.integers(1, 30))


def exact(ratio, count):
    """Floor in rational numbers of a ratio that was written with few decimals."""
    return math.floor(Fraction(ratio).limit_denominator(10**6) * count)


def simulate(policy, prompt, layers, steps):
    """Live prompt tokens and those read, by moving named tokens through lists, a step at a time."""

    def at(value, layer):
        return value[layer] if isinstance(value, tuple) else value

    live, read = 0, 0
    for layer in range(layers):
        system = [("system", i) for i in range(prompt.system)]
        vision, packed = [("vision", i) for i in range(prompt.vision)], {}
        text = [("text", i) for i in range(prompt.text)]
        if policy.joint is not None:
            everything = system + vision + text
            count = min(len(everything), max(exact(at(policy.joint.keep, layer), len(everything)), 1))
            sink = min(policy.joint.sink, count)
            system, kept, core = [], [], []
            text = everything[:sink] + everything[len(everything) - (count - sink) :]
            limit = max(count, sink + 1) if policy.joint.decoding == "evict" else None
        else:
            for step in policy.prefill_filter:
                if step.after_layer <= layer:
                    vision = vision[: exact(step.keep, prompt.vision)]
            kept = vision[: exact(at(policy.vision_keep, layer), prompt.vision)]
            compute = policy.vision_keep if policy.vision_compute is None else policy.vision_compute
            core = kept[: exact(at(compute, layer), prompt.vision)]
            if at(policy.vision_bits, layer) < 16:  # a code each, and 2 scales of 16 bits for 32 of them
                price = Fraction(at(policy.vision_bits, layer) + 1, 16)
                full = core if policy.vision_compute is not None else []
                packed = {token: price for token in kept if token not in full}
            if at(policy.text.bits, layer) < 16:
                packed |= dict.fromkeys([*system, *text], Fraction(at(policy.text.bits, layer) + 1, 16))
            sink, limit = 0, None
            if policy.text.window is not None:
                sink = at(policy.text.sink, layer)
                limit = sink + at(policy.text.window, layer)
                text = text[:sink] + text[max(sink, len(text) - (limit - sink)) :]
        live += sum(packed.get(token, 1) for token in [*system, *kept, *text])
        for step in range(1, steps + 1):
            text = [*text, ("generated", step)]
            if limit is not None and len(text) > limit:
                text.pop(sink)
            # triggered refreshes come first of all, and then as soon as they can
            since = step - 1 if policy.refresh == "triggered" else step
            refresh = policy.refresh_interval and since % policy.refresh_interval == 0
            refresh = refresh and (policy.refresh_layers is None or layer in policy.refresh_layers)
            attended = system + (kept if refresh and policy.refresh == "full" else core) + text
            read += sum(packed.get(token, 1) for token in attended if token[0] != "generated")
            if refresh and policy.refresh != "full":  # keys are half of what a token takes
                read += Fraction(1, 2) * sum(packed.get(token, 1) for token in kept if token not in core)
    return live, read


@settings(deadline=None, max_examples=200)
@given(policies(runnable=True), st.lists(PROMPTS, min_size=1, max_size=3), st.integers(1, 25))
@pytest.mark.full
def test_shares_are_those_of_a_simulation(policy, prompts, steps):
    layers = policy.layers or 5
    whole = layers * sum(prompt.total for prompt in prompts)
    counted = [simulate(policy, prompt, layers, steps) for prompt in prompts]
    expected = float(sum(live for live, _ in counted) / whole)
    assert live_share(policy, prompts, layers) == pytest.approx(expected)
    expected = float(sum(read for _, read in counted) / (steps * whole))
    assert read_share(policy, prompts, layers, steps) == pytest.approx(expected)


@settings(deadline=None)
@given(PROMPTS, st.lists(RATIO, min_size=2, max_size=2, unique=True), RATIO)
def test_prefill_filter_caps_the_layers_behind_it(prompt, filters, keep):
    low, high = sorted(filters)
    steps = (PrefillFilter(after_layer=1, keep=high), PrefillFilter(after_layer=3, keep=low))
    policy = Policy(vision_keep=keep, prefill_filter=steps)
    expected = sum(
        min(exact(keep, prompt.vision), exact(share, prompt.vision)) for share in (1, high, high, low)
    )
    assert sum(size.vision for size in sizes(policy, prompt, 4)) == expected


@settings(deadline=None)
@given(policies(), PROMPTS)
def test_sizes_are_within_the_prompt_and_monotone(policy, prompt):
    layers = policy.layers or 10
    if any(step.after_layer >= layers for step in policy.prefill_filter):
        return
    for size in sizes(policy, prompt, layers):
        assert 0 <= size.core <= size.vision <= prompt.vision
        assert 0 <= size.read <= size.stored <= prompt.total
        assert 0 <= size.reads <= size.live <= size.stored
    assert sum(s.stored for s in sizes(DENSE, prompt, layers)) == layers * prompt.total


@pytest.mark.parametrize("bits", [8, 4, 3, 2, (16, 4, 2)])
@pytest.mark.parametrize("group", [32, 20])
def test_budgets_are_met_in_bytes_of_few_bits(bits, group):
    """Never above, and one token more in the cheapest place would be; a core beside it is paid in full."""
    prompts = [PromptShape(3, 91, 12, group=group), PromptShape(2, 60, 30, group=group)]
    for budget in (0.25, 0.35, 0.6, 1.0):
        keep = meet_budget((3.0, 1.0, 2.0), prompts, budget, bits=bits)
        used = live_share(Policy(vision_keep=keep, vision_bits=bits), prompts, 3)
        grain = 3 * len(prompts) / (3 * sum(prompt.total for prompt in prompts))
        assert used <= budget
        assert used > budget - grain or keep == (1.0,) * 3
        cored = Policy(vision_keep=0.5, vision_compute=0.125, refresh_interval=3, vision_bits=bits)
        scaled = scale_to(cored, budget, prompts, 3)
        used = live_share(scaled, prompts, 3)
        assert used <= budget
        assert used > budget - grain or scaled.vision_keep == (1.0,) * 3
        assert scaled.vision_bits == bits
        text = TextPolicy(bits=bits)
        low = meet_budget((3.0, 1.0, 2.0), prompts, budget, text, bits=bits)
        used = live_share(Policy(vision_keep=low, vision_bits=bits, text=text), prompts, 3)
        assert budget - grain < used <= budget or low == (1.0,) * 3
        assert sum(low) > sum(keep) or low == (1.0,) * 3, "what text spares, vision takes"
        reads = ReadBudget(0.45, 12, 3)
        compute = meet_read_budget(keep, prompts, reads, bits=bits)
        read = Policy(vision_keep=keep, vision_compute=compute, refresh_interval=3, vision_bits=bits)
        assert 0.45 - grain < read_share(read, prompts, 3, 12) <= 0.45 or compute == keep


@pytest.mark.parametrize("bits", [8, 3, (16, 4, 2)])
@pytest.mark.parametrize("every", [0, 3])
def test_both_budgets_are_met_with_a_core_beside_few_bits(bits, every):
    prompts = [PromptShape(3, 91, 12), PromptShape(2, 60, 30)]
    grain = len(prompts) / sum(prompt.total for prompt in prompts)
    for memory, read in ((0.5, 0.35), (0.7, 0.4), (0.4, 0.39)):
        reads = ReadBudget(read, 12, every)
        keep, compute = meet_both((3.0, 1.0, 2.0), prompts, memory, reads, bits=bits)
        policy = Policy(vision_keep=keep, vision_compute=compute, refresh_interval=every, vision_bits=bits)
        live = live_share(policy, prompts, 3)
        assert live <= memory
        assert live > memory - grain - memory / 500 or keep == (1.0,) * 3
        used = read_share(policy, prompts, 3, 12)
        assert used <= read
        assert compute is None or used > read - grain or compute == keep
    keep, compute = meet_both((1.0,) * 3, prompts, 0.4, ReadBudget(0.4, 12), bits=bits)
    assert compute is None, "where all that is kept may be read there is no core"


def test_hashes_of_before_and_meaning_of_a_core_beside_few_bits():
    """16 bits are no news; with fewer, no core means that all is packed, and a whole core that nothing is."""
    assert Policy(vision_keep=0.2).hash == Policy(vision_keep=0.2, vision_bits=16).hash
    assert Policy(vision_keep=0.2).hash != Policy(vision_keep=0.2, vision_bits=8).hash
    texts = [Policy(vision_keep=0.2, text=TextPolicy(bits=bits)) for bits in (16, 8, (8, 16))]
    assert len({policy.hash for policy in texts}) == 3
    assert texts[0].hash == Policy(vision_keep=0.2).hash
    assert dump_policy(texts[2]).endswith("text:\n  bits: [8, 16]\n")
    cored = Policy(vision_keep=0.2, vision_compute=0.1, refresh_interval=4)
    assert cored.hash == "c1c11974db74ae3b"  # as it was before cores had scores
    assert cored.hash == cored.model_copy(update={"core_score": CoreScore()}).hash
    assert cored.hash == cored.model_copy(update={"head_floor": 0.5}).hash  # of adaptive heads alone
    heads = [Policy(vision_keep=0.2, heads="adaptive", head_floor=floor) for floor in (0.2, 0.5)]
    heads += [Policy(vision_keep=0.2, heads="adaptive", head_shares=((1.5, 0.5),)), Policy(vision_keep=0.2)]
    assert len({policy.hash for policy in heads}) == 4
    scored = [cored.model_copy(update={"core_score": CoreScore(**{n: 0.5})}) for n in ("prompt", "memory")]
    assert len({cored.hash, *(policy.hash for policy in scored)}) == 3
    assert [policy.scores_core for policy in (cored, *scored)] == [False, True, True]
    waits = [
        cored.model_copy(update={"refresh": kind} | more)
        for kind, more in (
            ("score_only", {}),
            ("triggered", {}),
            ("triggered", {"refresh_margin": 0.5}),
            ("score_only", {"refresh_layers": (0,)}),
            ("score_only", {"refresh_layers": (0, 2)}),
        )
    ]
    assert len({cored.hash, *(policy.hash for policy in waits)}) == 6
    assert waits[0].hash == "d3cd2b0819da44dc"  # as it was before layers could follow others
    prompt = PromptShape(0, 100, 0)
    bare, whole = (
        sizes(Policy(vision_keep=0.4, vision_compute=core, vision_bits=3), prompt, 1)[0]
        for core in (None, 0.4)
    )
    assert (bare.packed, bare.live, bare.reads) == (40, 10, 10)
    assert (whole.packed, whole.live, whole.reads) == (0, 40, 40)


def test_a_share_that_floats_miss_is_whole():
    counts = [sizes(Policy(vision_keep=k), PromptShape(0, 2880, 1), 1)[0].vision for k in (0.1, 0.7, 1 - 0.9)]
    assert counts == [288, 2016, 288]


def _pool(scorer, decoding):
    return Policy(pool="joint", joint=JointPool(keep=0.3, decoding=decoding), scorer=ScorerSpec(name=scorer))


@pytest.mark.parametrize(
    ("policy", "evicts_by", "running"),
    [
        (Policy(vision_keep=0.2), None, None),
        (Policy(text=TextPolicy(window=4)), "position", None),
        (Policy(text=TextPolicy(keep=0.4)), "position", None),
        (Policy(text=TextPolicy(keep=0.4, scorer="history")), "history", "history"),
        (Policy(text=TextPolicy(window=4, heavy=2, scorer="accumulated")), "accumulated", "accumulated"),
        (_pool("position", "evict"), "position", None),
        (_pool("last_query", "evict"), "last_query", "last_query"),
        (_pool("position", "grow"), None, None),
        (_pool("key_norm", "grow"), None, None),
    ],
)
def test_what_decides_which_token_goes(policy, evicts_by, running):
    assert (policy.evicts_by, policy.running) == (evicts_by, running)


def test_the_deleted_share_of_text():
    policy = Policy(text=TextPolicy(keep=(0.5, 0.75), scorer="history"))
    assert [policy.deleted(layer) for layer in range(2)] == [0.5, 0.25]
    assert Policy(text=TextPolicy(window=4)).deleted(0) == 0.0


def test_equal_scorers_have_equal_keys():
    one, same = (ScorerSpec(name="random", options={"seed": 1}) for _ in range(2))
    assert one.key == same.key
    assert len({one.key, ScorerSpec(name="random").key, ScorerSpec().key}) == 3
