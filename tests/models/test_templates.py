"""What templates and processors raise is told in their words; what a model does not take is left out."""

from __future__ import annotations

import json
import shutil

import pytest

from avlprof.errors import UserError
from avlprof.evaluation.answers import AnswerSettings, generate_answers
from avlprof.models import load_model
from avlprof.models.tiny import WEIGHTS
from avlprof.tasks import load_task

EACH = "{% for m in messages %}"


@pytest.fixture(scope="module")
def samples():
    return load_task("shapes:describe").samples("search", 1)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(WEIGHTS, tmp_path / "m")
    return tmp_path / "m"


def edit(path, **values):
    content = json.loads(path.read_text())
    for name, value in values.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    path.write_text(json.dumps(content))


def answers(folder, samples):
    loaded = load_model(str(folder))
    return [a.prediction for a in generate_answers(loaded, samples, None, AnswerSettings(4, 1))]


@pytest.fixture(scope="module")
def expected(samples):
    return answers(WEIGHTS, samples)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (f"{EACH}{{{{ '<|' + m['role'] + '|>' + m['content'] }}}}{{% endfor %}}", "takes text alone"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ messages[9]['content'] }}", "refuses this conversation"),
        ("{{ 1 / 0 }}", "refuses this conversation: division by zero"),
        ("{{ messages | nosuchfilter }}", "refuses this conversation: No filter named"),
        ("{% if %}", "refuses this conversation"),
        (f"{EACH}{{{{ m['content'] }}}}{{% endfor %}}", "takes text alone"),
        (f"{EACH}{{{{ m['content'][-1]['text'] }}}}{{% endfor %}}", "0 <image> tokens and 1 images"),
        (f"{EACH}<image><image>{{{{ m['content'][-1]['text'] }}}}{{% endfor %}}", "cannot encode this"),
        ("nothing", "leaves out the user's message"),
    ],
)  # fmt: skip
def test_what_a_template_does_is_one_sentence(folder, samples, template, said):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=said) as error:
        answers(folder, samples)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_keys_that_the_model_does_not_take_are_left_out(folder, samples, expected):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    edit(folder / "tokenizer_config.json", model_input_names=names)
    loaded = load_model(str(folder))
    assert "token_type_ids" in loaded.processor.tokenizer("a")
    assert "token_type_ids" not in loaded.adapter.encode_samples(samples)
    assert answers(folder, samples) == expected


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("y" * 900), RuntimeError(), StopIteration()])
def test_whatever_a_processor_raises_is_one_sentence(tiny_copy, samples, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(tiny_copy.processor), "__call__", fail)
    with pytest.raises(UserError, match="cannot encode this prompt: ") as raised:
        tiny_copy.adapter.encode_samples(samples)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "missing",
    [("patch_size",), ("vision_feature_select_strategy",), ("num_additional_image_tokens",),
     ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")],
)  # fmt: skip
def test_what_an_older_export_left_out_is_in_the_config(folder, samples, expected, missing):
    edit(folder / "processor_config.json", **dict.fromkeys(missing))
    assert answers(folder, samples) == expected


@pytest.mark.parametrize(
    "wrong", [{"patch_size": 16}, {"vision_feature_select_strategy": "full"}, {"patch_size": 0}]
)
def test_a_processor_that_does_not_fit_the_model_is_named(folder, samples, wrong):
    edit(folder / "processor_config.json", **wrong)
    with pytest.raises(UserError, match=r"fails on this prompt|cannot encode this prompt"):
        answers(folder, samples)


def test_a_prompt_without_a_place_for_its_pictures_is_named(tiny, samples, monkeypatch):
    """Processors that do not count, such as those of older families."""
    whole = tiny.adapter.encode_samples(samples)
    blind = {name: value for name, value in whole.items() if name != "input_ids"}
    monkeypatch.setattr(
        type(tiny.processor), "__call__", lambda *a, **k: blind | {"input_ids": whole["input_ids"] * 0 + 9}
    )
    with pytest.raises(UserError, match="no place for its pictures"):
        tiny.adapter.encode_samples(samples)


def test_what_nobody_says_is_named(tiny_copy, samples):
    tiny_copy.processor.patch_size = None
    with pytest.raises(
        UserError, match=r"cannot encode this prompt: .*; give it patch_size in processor_config"
    ):
        tiny_copy.adapter.encode_samples(samples)
