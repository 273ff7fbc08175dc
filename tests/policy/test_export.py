"""Policies for other engines: what each file says, what is lost, and what kvpress itself makes of it."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import yaml

import avlprof
from avlprof.budgets.resolve import resolve_by_depth
from avlprof.errors import UserError
from avlprof.policy import (
    CoreScore,
    JointPool,
    Policy,
    PrefillFilter,
    PromptShape,
    Provenance,
    ScorerSpec,
    TextPolicy,
    find_policy,
    save_policy,
    shipped,
    sizes,
)
from avlprof.policy.export import TARGETS, export_to
from avlprof.policy.export._base import said
from avlprof.scorers import SCORERS
from tests.cli_runner import invoke, refused
from tests.synthetic_run import write_run

PROMPT = PromptShape(14, 576, 30)
LAYERS = 6
ROOT = Path(__file__).parents[2]


def depth_alone(name: str) -> Policy | None:
    try:
        return resolve_by_depth(find_policy(name), LAYERS)
    except UserError:
        return None


POLICIES = {name: policy for name in shipped() if (policy := depth_alone(name)) is not None}


def constants(text: str) -> dict:
    """The plain constants that a Python file assigns."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def some_policy(chance: random.Random, layers: int) -> Policy:
    """Shares of all kinds, whole and empty layers among them."""
    keep = tuple(chance.choice([0.0, 1.0, chance.random(), chance.random()]) for _ in range(layers))
    if chance.random() < 0.4:
        joint = JointPool(keep=keep, sink=chance.randrange(6), recent=chance.randrange(40))
        return Policy(pool="joint", joint=joint, scorer=ScorerSpec(name="position"))
    return Policy(vision_keep=keep, scorer=ScorerSpec.of(chance.choice(["last_query", "valued:instruction"])))


# --- all targets


@pytest.mark.parametrize("target", TARGETS.names())
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_ships_becomes_a_file_or_is_refused(target, name):
    policy = POLICIES[name]
    ranks = target == "tensorrt-llm" and name != "streaming-llm"
    if ranks or name.startswith("quantised"):
        with pytest.raises(UserError, match="nothing of it would be left"):
            export_to(target, policy, LAYERS, PROMPT)
        return
    handed = export_to(target, policy, LAYERS, PROMPT)
    if handed.suffix == ".py":
        compile(handed.text, name, "exec")
    else:
        assert isinstance(yaml.safe_load(handed.text), dict)
    assert max(map(len, handed.text.splitlines())) <= 110
    flat = " ".join(handed.text.replace("#", " ").split())
    for line in handed.lost:
        assert " ".join(line.split()) in flat
    assert policy.hash in handed.text


def test_what_only_quantises_or_computes_is_refused():
    nothing = (
        Policy(vision_bits=4),
        Policy(vision_compute=0.2, refresh_interval=5),
        Policy(vision_keep=(1.0,) * LAYERS, vision_bits=2),
    )
    for policy in nothing:
        for target in TARGETS.names():
            with pytest.raises(UserError, match="nothing of it would be left"):
                export_to(target, policy, LAYERS, PROMPT)


@pytest.mark.parametrize("target", TARGETS.names())
def test_every_field_is_expressed_or_listed(target):
    """A field that a later version adds is listed too, since nothing says that the target has it."""
    policy = Policy(
        vision_keep=0.5,
        vision_compute=0.25,
        vision_bits=4,
        refresh_interval=3,
        refresh="score_only",
        core_score=CoreScore(prompt=0.5, memory=0.5),
        scorer=ScorerSpec(name="position"),
        heads="kv_head",
        text=TextPolicy(),
        prefill_filter=(PrefillFilter(after_layer=2, keep=0.3),),
    )
    lost = export_to(target, policy, LAYERS, PROMPT).lost
    expresses = TARGETS.get(target)().expresses
    for name, _ in said(policy):
        listed = any(line.startswith(f"{name}: ") for line in lost)
        assert listed != (name in expresses and (name != "heads" or target != "sparse-engine")), name
    assert any(line.startswith("vision_bits: 4: ") for line in lost)


@pytest.mark.parametrize("target", ["kvpress", "sparse-engine"])
def test_a_hostile_name_stays_a_comment(target):
    name = '"""\nimport os; os.system("x")\\ \'\'\' {0} \u202e'
    policy = Policy(name=name, vision_keep=0.5, scorer=ScorerSpec(name="window", options={"rows": 8}))
    text = export_to(target, policy, 2, PROMPT).text
    assert [type(node) for node in ast.parse(text).body][:1] == [ast.Expr]
    assert "os.system" in ast.get_docstring(ast.parse(text))
    assert "\u202e" not in text


def test_targets_that_count_tokens_need_a_prompt():
    for target in ("sparse-engine", "tensorrt-llm"):
        with pytest.raises(UserError, match="give --tokens SYSTEM,VISION,TEXT"):
            export_to(target, find_policy("streaming-llm"), LAYERS)
    with pytest.raises(UserError, match=r"written for 3 layers, the model has 6"):
        export_to("kvpress", Policy(vision_keep=(0.1, 0.2, 0.3)), LAYERS)


# --- kvpress: here by its formulas, below by the package


def test_a_pool_keeps_as_many_tokens_in_kvpress():
    """`max(1, int(length * (1 - ratio)))` of kvpress, for the ratios that the file works out."""
    chance = random.Random(1)
    keep = (*(chance.random() for _ in range(40)), 0.0, 1.0, 0.29, 0.07, 1 / 3)
    policy = Policy(pool="joint", joint=JointPool(keep=keep, decoding="grow"), scorer=ScorerSpec.of("window"))
    text = export_to("kvpress", policy, len(keep)).text
    made = text[text.rindex("[min(max(") : text.rindex(")")]
    ratios = eval(made, {"KEEP": constants(text)["KEEP"]})
    assert all(0.0 <= ratio < 1.0 for ratio in ratios)
    for length in (1, 7, 100, 576, 2880, 40_000):
        kept = [max(1, int(length * (1 - ratio))) if ratio else length for ratio in ratios]
        assert kept == [size.stored for size in sizes(policy, PromptShape(0, length, 0), len(keep))]


def test_kvpress_is_given_what_a_layer_keeps():
    governed = Provenance(governed=(1, 2))
    policy = Policy(
        vision_keep=0.5, provenance=governed, prefill_filter=(PrefillFilter(after_layer=2, keep=0.3),)
    )
    assert constants(export_to("kvpress", policy, 4).text)["KEEP"] == [1.0, 0.5, 0.3, 1.0]
    odd = Policy(vision_keep=0.5, scorer=ScorerSpec(name="my_own"))
    with pytest.raises(UserError, match="scorer 'my_own' of policy 'policy' is not known to the export"):
        export_to("kvpress", odd, 4)


def test_kvpress_knows_every_ranking_that_ships():
    for name in SCORERS.names():
        assert export_to("kvpress", Policy(vision_keep=0.5, scorer=ScorerSpec.of(name)), 2).lost == ()


# --- SparseEngine


def test_budgets_of_sparse_engine_are_the_policys():
    """Its formula, from its own source: sink + int(decode_keep * ratio / first ratio) + recent."""
    chance = random.Random(2)
    exact = 0
    for _ in range(120):
        layers = chance.randrange(1, 9)
        policy = some_policy(chance, layers)
        prompt = PromptShape(chance.randrange(20), chance.randrange(1, 900), chance.randrange(40))
        wanted = [size.stored for size in sizes(policy, prompt, layers)]
        if min(wanted) == prompt.total:
            with pytest.raises(UserError, match="nothing of it would be left"):
                export_to("sparse-engine", policy, layers, prompt)
            continue
        handed = export_to("sparse-engine", policy, layers, prompt)
        config = constants(handed.text)["CONFIG"]
        ratios = config["pyramid_layer_ratios"]
        assert all(0.0 < ratio <= 1.0 for ratio in ratios) and len(ratios) == layers
        kept = [
            config["sink_keep_tokens"]
            + int(config["decode_keep_tokens"] * ratio / ratios[0])
            + config["recent_keep_tokens"]
            for ratio in ratios
        ]
        assert kept == constants(handed.text)["KEPT"]
        said_so = any(line.startswith("kept tokens: ") for line in handed.lost)
        assert (kept == wanted) != said_so
        assert kept[1:] == wanted[1:] and kept[0] - wanted[0] in (0, 1)
        exact += kept == wanted
        if policy.joint is None:  # what competes is the picture alone
            assert (config["sink_keep_tokens"], config["recent_keep_tokens"]) == (prompt.system, prompt.text)
    assert exact > 60


def test_sparse_engine_is_told_of_governed_layers_alone():
    policy = Policy(vision_keep=(1.0, 0.5, 1.0, 0.25), provenance=Provenance(governed=(1, 3)))
    found = constants(export_to("sparse-engine", policy, 4, PromptShape(4, 100, 6)).text)
    assert found["KEPT"] == [60, 35]
    assert found["CONFIG"]["sparse_method"] == "pyramidkv"


# --- TensorRT-LLM


def held(sink: int, window: int, length: int) -> set[int]:
    """Positions that a window with first tokens holds: they are among its tokens."""
    return set(range(min(sink, length))) | set(range(max(length - (window - sink), 0), length))


def test_windows_hold_what_the_policy_keeps():
    policy = Policy(vision_keep=(0.0, 0.3, 1.0, 0.55), scorer=ScorerSpec(name="position"))
    prompt = PromptShape(5, 40, 7)
    config = yaml.safe_load(export_to("tensorrt-llm", policy, 4, prompt).text)["kv_cache_config"]
    for window, share in zip(config["max_attention_window"], policy.vision_keep, strict=True):
        vision = range(5, 45)[len(range(40)) - int(share * 40 + 1e-6) :]
        kept = set(range(5)) | set(vision) | set(range(45, 52))
        assert held(config["sink_token_length"], window, prompt.total) == kept


def test_a_pool_of_sinks_and_newest_tokens_slides_alike():
    policy = Policy(
        pool="joint", joint=JointPool(keep=(0.5, 0.2, 0.1), sink=4), scorer=ScorerSpec(name="position")
    )
    handed = export_to("tensorrt-llm", policy, 3, PROMPT)
    config = yaml.safe_load(handed.text)["kv_cache_config"]
    assert config["sink_token_length"] == 4
    assert config["max_attention_window"] == [310, 124, 62]
    assert not any(line.startswith("answers") for line in handed.lost)


def test_text_windows_stand_beside_a_whole_picture():
    policy = Policy(text=TextPolicy(window=(8, 16), sink=3))
    config = yaml.safe_load(export_to("tensorrt-llm", policy, 2, PROMPT).text)["kv_cache_config"]
    for step in (0, 5, 40):
        length = PROMPT.total + step
        for window, newest in zip(config["max_attention_window"], (8, 16), strict=True):
            kept = set(range(14 + 576 + 3)) | set(range(length - newest, length))
            assert held(config["sink_token_length"], window, length) == kept


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (Policy(vision_keep=0.5), "ranks none: nothing of it would be left"),
        (find_policy("snapkv"), "ranks none: nothing of it would be left"),
        (Policy(text=TextPolicy(keep=0.5)), "windows of a fixed size"),
        (Policy(vision_keep=0.0, text=TextPolicy(window=8)), "give it one of the two"),
    ],
)
def test_what_windows_cannot_say_is_refused(policy, sentence):
    with pytest.raises(UserError, match=sentence):
        export_to("tensorrt-llm", policy, 2, PROMPT)


# --- the command


def test_the_command_writes_a_file_and_says_what_is_lost(tmp_path):
    file = save_policy(Policy(name="mine", vision_keep=(0.5, 0.2), vision_bits=4), tmp_path / "mine.yaml")
    result = invoke("export", file, "--to", "kvpress", "-o", tmp_path / "press.py")
    assert result.exit_code == 0, result.output
    assert "lost: vision_bits: 4: what is kept stays in the precision of the cache" in result.stderr
    assert constants((tmp_path / "press.py").read_text())["KEEP"] == [0.5, 0.2]
    assert invoke("export", file, "--to", "kvpress").stdout == (tmp_path / "press.py").read_text()
    assert invoke("export", "uniform").stdout == invoke("policy", "show", "uniform").stdout
    pyramid = invoke("export", "pyramidkv", "--to", "kvpress", "--layers", 8)
    assert constants(pyramid.stdout)["KEEP"] == list(resolve_by_depth(find_policy("pyramidkv"), 8).joint.keep)


def test_a_traced_run_knows_layers_prompt_and_shares(tmp_path):
    write_run(tmp_path / "run", vision=(5, 4))
    samples = avlprof.Run.open(tmp_path / "run").samples()
    longest = samples.loc[samples[["system", "vision", "text"]].sum(axis=1).idxmax()]
    result = invoke("export", "vl-cache", "--to", "sparse-engine", "--run", tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = constants(result.stdout)
    layers = avlprof.Run.open(tmp_path / "run").meta.layers
    assert len(found["KEPT"]) == len(found["CONFIG"]["pyramid_layer_ratios"]) == layers
    assert found["CONFIG"]["sink_keep_tokens"] == longest["system"]
    assert f"{longest['system']} system, {longest['vision']} vision" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("uniform", "--to", "kv-press"), "unknown target 'kv-press'; did you mean kvpress?"),
        (("uniform", "--to", "kvpress"), "give --layers or --run of yours"),
        (("uniform", "--trial", 1), "is a policy; leave them out"),
        (("vl-cache", "--to", "kvpress", "--layers", 8), "needs the attention sparsity of a profile"),
        (("uniform", "--to", "sparse-engine", "--layers", 3, "--tokens", "3,0,4"), "must be three counts"),
        (("uniform", "--to", "sparse-engine", "--layers", 3, "--tokens", "3,²,4"), "must be three counts"),
        (("uniform", "--to", "sparse-engine", "--layers", 3), "give --tokens"),
        (("nobody",), "is not a study"),
        (("nobody.yaml",), "does not exist"),
    ],
)
def test_the_command_refuses_in_a_sentence(words, sentence):
    assert sentence in refused(invoke("export", *words))


# --- the package itself


def kvpress_python() -> str | None:
    """The interpreter of an environment with kvpress: `make kvpress`, or AVLPROF_KVPRESS."""
    own = ROOT / ".venv-kvpress" / "bin" / "python"
    return os.environ.get("AVLPROF_KVPRESS") or (str(own) if own.exists() else None)


def split(scorer: str, heads: str = "shared") -> Policy:
    return Policy(vision_keep=(1.0, 1.0, 0.5, 1.0, 1.0, 0.3), scorer=ScorerSpec.of(scorer), heads=heads)


def pool(scorer: str, heads: str = "shared") -> Policy:
    joint = JointPool(keep=(0.9, 0.8, 0.29, 1.0, 0.1, 0.5), sink=2, recent=4, decoding="grow")
    return Policy(pool="joint", joint=joint, scorer=ScorerSpec.of(scorer), heads=heads)


@pytest.mark.slow  # imports a second transformers, and builds models in both
@pytest.mark.skipif(kvpress_python() is None, reason="no environment with kvpress; make one: make kvpress")
def test_kvpress_answers_as_the_runtime_does(tmp_path):
    """Gemma 3 under all rankings: logits of both engines. A text model: as many tokens as `sizes` says."""
    import torch
    from safetensors.torch import load_file

    from tests.policy import kvpress_side as side

    names = [*SCORERS.names(), "valued:instruction", "pooled:valued:window", "distinct:last_query"]
    policies = {f"split-{at}": split(name, ("shared", "kv_head")[at % 2]) for at, name in enumerate(names)}
    policies |= {f"pool-{at}": pool(name, ("kv_head", "shared")[at % 2]) for at, name in enumerate(names)}
    jobs = [{"name": name, "model": "gemma3"} for name in policies]
    texts = {"text-pool": pool("pooled:window", "kv_head"), "text-newest": pool("position")}
    jobs += [{"name": name, "model": "llama"} for name in texts]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    for name, policy in (policies | texts).items():
        (tmp_path / f"{name}.py").write_text(export_to("kvpress", policy, side.LAYERS).text)
    subprocess.run([kvpress_python(), side.__file__, tmp_path], check=True, capture_output=True, timeout=600)

    model = side.small_model("gemma3")
    weights = load_file(tmp_path / "gemma3.safetensors")  # their version nests the vision tower once more
    model.load_state_dict({name.replace(".vision_model.", "."): part for name, part in weights.items()})
    prompt = side.small_prompt("gemma3")
    shape, own = PromptShape(3, 8, 13, governed=(2, 5)), (2, 5)
    for name, policy in policies.items():
        theirs = load_file(tmp_path / f"{name}.safetensors")
        with torch.no_grad(), avlprof.apply(model, policy):
            logits = side.logits_of(model, prompt)
        assert (theirs["logits"] - logits).abs().max() < 1e-4, (name, policy.scorer)
        kept = sizes(policy, shape, side.LAYERS)
        assert [theirs["held"][i] - side.STEPS + 1 for i in own] == [kept[i].stored for i in own], name
    for name, policy in texts.items():
        held = load_file(tmp_path / f"{name}.safetensors")["held"] - side.STEPS + 1
        assert held.tolist() == [size.stored for size in sizes(policy, PromptShape(37, 0, 0), side.LAYERS)]
