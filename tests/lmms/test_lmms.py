"""The lmms-eval plug-in, run by lmms-eval itself on local tasks, against this project's own evaluation."""

from __future__ import annotations

import sqlite3
import tomllib
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest
import torch
import yaml

import avlprof
from avlprof.attention.session import with_cache
from avlprof.errors import UserError
from avlprof.evaluation import AnswerSettings, generate_answers
from avlprof.lmms import checked_policy, manifest, model_args, policy_hash
from avlprof.models import LoadedModel
from avlprof.policy import Policy, ScorerSpec, save_policy
from avlprof.tasks import Sample, load_metric, load_task

CUT = Policy(name="cut", vision_keep=(0.5, 0.1, 0.2, 0.4, 0.1, 0.3), vision_compute=0.1, refresh_interval=3)
LIMIT = 10
COUNT = 6


# -- without lmms-eval ----------------------------------------------------------------------


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    return save_policy(CUT, tmp_path / "cut.yaml")


def test_arguments_carry_the_content_of_the_policy(policy_file: Path) -> None:
    args = model_args("tiny", policy_file, dtype="float32")
    assert args == f"pretrained=tiny,policy={policy_file},policy_hash=sha256-{CUT.hash},dtype=float32"
    save_policy(CUT.model_copy(update={"description": "the same, described"}), policy_file)
    assert model_args("tiny", policy_file, dtype="float32") == args
    save_policy(CUT.model_copy(update={"refresh_interval": 4}), policy_file)
    assert model_args("tiny", policy_file, dtype="float32") != args
    with pytest.raises(UserError, match="must not hold a comma"):
        model_args("models/a,b", policy_file)


def test_changed_or_missing_hash_is_refused_with_the_right_one(policy_file: Path) -> None:
    right = policy_hash(CUT)
    assert checked_policy(str(policy_file), right) == CUT
    with pytest.raises(UserError, match=f"lacks its policy_hash.*add policy_hash={right}"):
        checked_policy(str(policy_file), None)
    changed = save_policy(CUT.model_copy(update={"vision_compute": 0.05}), policy_file)
    with pytest.raises(UserError, match=f"has changed: policy_hash is {right}"):
        checked_policy(str(changed), right)


def test_entry_point_is_declared() -> None:
    project = Path(avlprof.__file__).parent.parent / "pyproject.toml"
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    assert declared["entry-points"]["lmms_eval.models"] == {"avlprof": "avlprof.lmms:manifest"}
    assert "lmms" in declared["optional-dependencies"]


# -- with it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return load_task("shapes:describe,count,where").samples("held-out", COUNT)


@pytest.fixture(scope="module")
def harness(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a local task by lmms-eval: `harness(task, args, **options) -> results`."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (pip install 'avlprof[lmms]')")
    from lmms_eval import models
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lmms")
    rows = [
        {
            "image": sample.open_images()[0],
            "question": sample.prompt,
            "answer": sample.answers[0],
            "choices": [sample.answers[0], "nothing at all", "a"],
        }
        for sample in samples
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
        }
    )
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows, features=features)})
    data.save_to_disk(folder / "data")
    common = {
        "dataset_path": str(folder / "data"),
        "dataset_kwargs": {"load_from_disk": True},
        "test_split": "test",
        "doc_to_visual": "image",
        "doc_to_text": "<image>\n{{question}}",
    }
    generate = {
        "task": "local_answers",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": LIMIT, "temperature": 0, "do_sample": False, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    choose = {
        "task": "local_choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    sampled = generate | {
        "task": "local_sampled",
        "generation_kwargs": {"max_new_tokens": LIMIT, "temperature": 0.7, "do_sample": True},
    }
    for task in (generate, choose, sampled):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(task: str, args: str, **options: Any) -> Any:
        return simple_evaluate(
            "avlprof", model_args=args, tasks=[task], task_manager=manager, device="cpu", **options
        )

    return run


def responses(results: Any, task: str) -> list[str]:
    logged = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in logged]


@pytest.mark.full  # lmms-eval loads and runs a model
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", ["dense", "cut"])
def test_answers_are_those_of_the_project_s_own_evaluation(
    tiny: LoadedModel, harness: Any, samples: list[Sample], tmp_path: Path, name: str, batch_size: int
) -> None:
    policy = CUT if name == "cut" else None
    path = str(save_policy(CUT, tmp_path / "cut.yaml")) if policy else "dense"
    results = harness("local_answers", model_args("tiny", path), batch_size=batch_size)
    wanted = generate_answers(tiny, samples, policy, AnswerSettings(LIMIT, batch_size))
    assert responses(results, "local_answers") == [answer.prediction for answer in wanted]
    matches = [a.prediction == s.answers[0] for a, s in zip(wanted, samples, strict=True)]
    measured = results["results"]["local_answers"]
    assert measured["exact_match,none"] == pytest.approx(sum(matches) / COUNT)
    counts = [sample["token_counts"][0] for sample in results["samples"]["local_answers"]]
    assert sorted(c["output_tokens"] for c in counts) == sorted(a.generated_tokens for a in wanted)


@pytest.mark.full  # lmms-eval loads and runs a model
def test_choices_are_weighed_under_the_policy(
    tiny: LoadedModel, harness: Any, samples: list[Sample], tmp_path: Path
) -> None:
    """Likelihoods against a plain loop: prompt, then one forced token after the other."""
    path = save_policy(CUT, tmp_path / "cut.yaml")
    results = harness("local_choices", model_args("tiny", path))
    logged = sorted(results["samples"]["local_choices"], key=lambda sample: sample["doc_id"])
    for sample, found in zip(samples[:3], logged, strict=False):
        choices = (sample.answers[0], "nothing at all", "a")
        losses = [plain_loss(tiny, sample, f" {choice}") for choice in choices]
        assert [float(r[0]) for r in (resp[0] for resp in found["resps"])] == pytest.approx(losses, abs=2e-4)
        assert found["acc"] == float(min(range(3), key=losses.__getitem__) == 0)


@torch.inference_mode()
def plain_loss(loaded: Any, sample: Sample, continuation: str) -> float:
    tokens = loaded.processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    encoding = loaded.adapter.encode([sample.prompt], [sample.open_images()])
    with avlprof.apply(loaded.model, CUT) as runtime:
        cache = runtime.new_cache()
        logits = loaded.model(**encoding, **with_cache(loaded.model, cache)).logits[0, -1]
        total = 0.0
        for token in tokens:
            total -= float(logits.log_softmax(dim=-1)[token])
            logits = loaded.model(
                input_ids=torch.tensor([[token]]), **with_cache(loaded.model, cache)
            ).logits[0, -1]
    return total / len(tokens)


@pytest.mark.full  # lmms-eval loads and runs a model
def test_cache_is_used_for_the_same_policy_and_not_for_a_changed_one(harness: Any, tmp_path: Path) -> None:
    """The file keeps its name while its content changes: the answers must not be the old ones."""
    path = save_policy(CUT, tmp_path / "mine.yaml")
    stored = tmp_path / "cache"

    def entries() -> int:
        with sqlite3.connect(next(stored.rglob("cache.db"))) as database:
            return int(database.execute("select count(*) from responses").fetchone()[0])

    first = harness("local_answers", model_args("tiny", path), use_cache=str(stored))
    assert entries() == COUNT
    again = harness("local_answers", model_args("tiny", path), use_cache=str(stored))
    assert entries() == COUNT
    assert responses(again, "local_answers") == responses(first, "local_answers")
    nothing = Policy(name="nothing", vision_keep=0.0, scorer=ScorerSpec(name="random"))
    save_policy(nothing, path)
    changed = harness("local_answers", model_args("tiny", path), use_cache=str(stored))
    assert entries() == 2 * COUNT
    assert responses(changed, "local_answers") != responses(first, "local_answers")


def test_sampling_is_refused_and_so_is_a_launcher(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="greedily"):
        harness("local_sampled", model_args("tiny"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        harness("local_answers", model_args("tiny"))


# -- its metrics ----------------------------------------------------------------------------

WORDS = (
    "yes",
    "no",
    "Two",
    "2",
    "the red car",
    "a car",
    "red car.",
    "3.5%",
    "0.035",
    "105",
    "100",
    "don't",
    "dont",
)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_those_of_lmms_eval(seed: int) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (pip install 'avlprof[lmms]')")
    from lmms_eval.api.metrics import anls
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    random = Random(seed)
    for _ in range(150):
        prediction = random.choice(WORDS)
        answers = random.choices(WORDS, k=10)
        voted = textvqa_process_results({"answers": list(answers), "question_id": 1}, [prediction])
        assert load_metric("vqa_accuracy")(prediction, answers) == pytest.approx(voted["exact_match"])
        assert load_metric("anls")(prediction, answers[:3]) == pytest.approx(
            anls(answers[:3], [prediction])["anls"]
        )
        correct = relaxed_correctness(prediction, answers[0])
        assert load_metric("relaxed_accuracy")(prediction, answers[:1]) == float(correct)
