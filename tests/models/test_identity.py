"""What a checkpoint brings beside its weights is part of what a run, a study and an answer are of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import avlprof
from avlprof.errors import UserError
from avlprof.evaluation.answers import AnswerSettings, generate_answers
from avlprof.evaluation.store import AnswerStore, model_key
from avlprof.models import load_model
from avlprof.models.identity import checkpoint_settings, listed, settings_differences
from avlprof.models.tiny import WEIGHTS
from avlprof.runs import RunDirectory
from avlprof.runs.meta import RunMeta
from avlprof.tasks import load_task
from avlprof.tracing import trace_samples
from avlprof.tracing.options import TraceSettings, run_meta
from avlprof.tuning import Settings
from avlprof.tuning.prepared import check_same_model
from avlprof.tuning.study import StudyMeta, check_folder, study_meta

OLD = Path(__file__).parents[1] / "data" / "0.1.0"


def changed(folder, file, **values):
    """A copy of the embedded checkpoint with other values in one of its JSON files."""
    if not folder.exists():
        shutil.copytree(WEIGHTS, folder)
    path = folder / f"{file}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in values.items():
        part, (*outer, last) = content, name.split("__")
        for key in outer:
            part = part[key]
        part[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_model(str(folder))


@pytest.fixture(scope="module")
def task():
    return load_task("shapes:describe")


def test_settings_are_named(tiny):
    settings = tiny.settings
    assert settings["image_processor.size.shortest_edge"] == "112"
    assert settings["processor.patch_size"] == "8"
    assert settings["generation_config.eos_token_id"] == "2"
    assert len(settings["chat_template"]) == len(settings["tokenizer"]) == 12
    assert not any("version" in name for name in settings)


def test_settings_do_not_change_by_use(tiny, task):
    before, hashed = tiny.settings, tiny.settings_hash
    tiny.adapter.encode_samples(task.samples("search", 2))
    tiny.processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert tiny.settings == before and tiny.settings_hash == hashed
    assert load_model("tiny").settings == before


@pytest.mark.parametrize(
    ("file", "values", "difference"),
    [
        ("generation_config", {"repetition_penalty": 3.0}, "repetition_penalty: none here, 3.0 asked"),
        ("generation_config", {"eos_token_id": [2, 7]}, "eos_token_id: 2 here, [2, 7] asked"),
        ("generation_config", {"no_repeat_ngram_size": 2}, "generation_config.no_repeat_ngram_size"),
        ("processor_config", {"image_processor__size": {"shortest_edge": 56}}, "edge: 112 here, 56 asked"),
        ("processor_config", {"image_processor__do_rescale": False}, "image_processor.do_rescale"),
        ("processor_config", {"image_processor__image_mean": [0.5] * 3}, "image_processor.image_mean"),
    ],
)  # fmt: skip
def test_a_run_is_not_resumed_under_other_settings(tmp_path, task, file, values, difference):
    folder, settings = tmp_path / "m", TraceSettings(max_new_tokens=3)
    shutil.copytree(WEIGHTS, folder)
    samples = task.samples("search", 2)
    trace_samples(load_model(str(folder)), task, samples[:1], tmp_path / "r", settings)
    other = changed(folder, file, **values)
    with pytest.raises(UserError, match="holds another run") as error:
        trace_samples(other, task, samples, tmp_path / "r", settings)
    assert difference in str(error.value) and len(str(error.value)) < 500
    assert len(RunDirectory(tmp_path / "r").ids()) == 1
    with pytest.raises(UserError, match="other settings of the model"):
        avlprof.Run.open(tmp_path / "r").check_model(other)


def test_a_template_counts(tmp_path, tiny):
    shutil.copytree(WEIGHTS, tmp_path / "m")
    path = tmp_path / "m" / "chat_template.jinja"
    path.write_text(path.read_text().replace("USER", "HUMAN"))
    other = load_model(str(tmp_path / "m"))
    (difference,) = settings_differences(tiny.settings, other.settings)
    assert difference.startswith("chat_template: ")


def test_sampling_does_not_count(tiny_copy, tiny):
    tiny_copy.model.generation_config.temperature = 0.3
    tiny_copy.model.generation_config.do_sample = True
    assert tiny_copy.settings == tiny.settings


def test_answers_of_other_settings_are_made_anew(tmp_path, task, tiny_copy):
    samples, store = task.samples("search", 1), AnswerStore(tmp_path)
    settings = AnswerSettings(3, 1)
    generate_answers(tiny_copy, samples, None, settings, store=store)
    key = model_key(tiny_copy)
    assert store.answers(key, None, samples, 3)
    tiny_copy.processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    assert model_key(tiny_copy) != key
    assert not store.answers(model_key(tiny_copy), None, samples, 3)


def test_a_study_is_not_resumed_under_other_settings(tmp_path, task, tiny_copy):
    settings = Settings(samples=2)
    meta = study_meta(tiny_copy, task, "run", 0.3, settings)
    (tmp_path / "study.json").write_text(meta.model_dump_json())
    check_folder(tmp_path, meta)
    tiny_copy.model.generation_config.repetition_penalty = 2.0
    with pytest.raises(UserError, match=r"generation_config\.repetition_penalty: none here, 2\.0 asked"):
        check_folder(tmp_path, study_meta(tiny_copy, task, "run", 0.3, settings))


def test_a_profile_of_other_settings_is_refused(tiny, task):
    profile = SimpleNamespace(meta=SimpleNamespace(settings=run_meta(tiny, task, TraceSettings())))
    check_same_model(tiny, profile)
    other = profile.meta.settings.model_copy(update={"checkpoint": tiny.settings | {"chat_template": "x"}})
    with pytest.raises(UserError, match="chat_template: x here"):
        check_same_model(tiny, SimpleNamespace(meta=SimpleNamespace(settings=other)))


def test_where_samples_come_from_counts(tiny, task):
    meta = run_meta(tiny, task, TraceSettings())
    one, other = (meta.model_copy(update={"dataset": {"sha256": text}}) for text in "ab")
    assert one.differences(other) == ["sha256: a here, b asked"]
    assert one.settings_json() != other.settings_json()


@pytest.mark.parametrize(("kind", "path"), [(RunMeta, "run/meta.json"), (StudyMeta, "study/study.json")])
def test_what_0_1_0_wrote_is_read_and_not_gone_on_with(kind, path, tiny):
    old = kind.model_validate_json((OLD / path).read_text())
    assert old.checkpoint == {} and old.differences(old) == []
    different = old.differences(old.model_copy(update={"checkpoint": tiny.settings}))
    assert different == ["settings of the model: not noted by avlprof 0.1.0, which began this"]


def test_a_run_of_0_1_0_keeps_its_hash_and_serves(tiny):
    run = avlprof.Run.open(OLD / "run")
    assert "checkpoint" not in run.meta.settings_json() and "dataset" not in run.meta.settings_json()
    run.check_model(tiny)


def test_many_differences_are_cut():
    text = listed(settings_differences({str(i): "a" * 200 for i in range(50)}, {}))
    assert text.endswith("and 44 more") and len(text) < 700


def test_parts_without_settings_have_none():
    assert checkpoint_settings(SimpleNamespace(), SimpleNamespace()) == {}
    assert set(checkpoint_settings(object(), SimpleNamespace(tokenizer=object()))) == {"tokenizer"}
