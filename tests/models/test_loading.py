"""How a model is loaded: quantised weights, attention, further arguments, and their words."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch
import typer
from typer.testing import CliRunner

from avlprof.cli._options import model_options, task_options
from avlprof.errors import UserError
from avlprof.models import ModelSpec, load, load_model, placement
from avlprof.tasks.spec import TaskSpec


def test_attention_is_of_the_language_model_alone():
    config = load_model("tiny", device="cpu", attention="eager").model.config
    assert config.get_text_config()._attn_implementation == "eager"
    assert config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "spda"}, "unknown attention 'spda'; did you mean sdpa?"),
        ({"attention": "flash_attention_2"}, "needs the package flash-attn"),
        ({"attention": "kernels-community/flash-attn2"}, "needs the package kernels"),
        ({"quantize": "4bits"}, "unknown quantization '4bits'; did you mean 4bit"),
        ({"quantize": "4bit"}, "--quantize needs bitsandbytes and accelerate"),
        ({"dtype": "bflot16"}, "unknown dtype 'bflot16'; did you mean bfloat16"),
        (
            {"model_args": {"dtype": "float16"}},
            "model argument 'dtype' is set by avlprof itself; use --dtype",
        ),
        ({"model_args": {"load_in_4bit": True}}, "use --quantize"),
        ({"model_args": {"output_loading_info": False}}, "leave it out"),
        (
            {"model_args": {"nonsense": 1}},
            "model argument 'nonsense' is neither a field of the model's config",
        ),
    ],
)
def test_what_cannot_be_loaded_so(options, said, monkeypatch):
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        load_model("tiny", device="cpu", **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("half", torch.float16), ("fp32", torch.float32)]
)
def test_precisions_have_short_names(name, dtype):
    assert load_model("tiny", device="cpu", dtype=name).model.dtype == dtype


def test_model_arguments_reach_the_config():
    loaded = load_model("tiny", device="cpu", model_args={"vision_feature_layer": -3})
    assert loaded.model.config.vision_feature_layer == -3
    assert loaded.arguments == {"vision_feature_layer": -3}


@pytest.mark.parametrize("ways", ["4bit", "8bit"])
def test_weights_are_quantised_by_bitsandbytes(ways, monkeypatch):
    """A stand-in with the signature of `from_pretrained`: bitsandbytes need not be installed."""
    real = load.AutoModelForImageTextToText.from_pretrained
    seen = {}

    def stand_in(source, *args, quantization_config, device_map, **options):
        seen.update(config=quantization_config, device_map=device_map)
        return real(source, *args, **options)

    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.50" if name == "bitsandbytes" else version(name)
    )
    monkeypatch.setattr(placement, "find_spec", lambda name: object())
    monkeypatch.setattr(load.AutoModelForImageTextToText, "from_pretrained", stand_in)
    load_model("tiny", device="cpu", dtype="bfloat16", quantize=ways)
    assert seen["device_map"] == {"": "cpu"}
    config = seen["config"].to_dict()
    assert (config["load_in_4bit"], config["load_in_8bit"]) == (ways == "4bit", ways == "8bit")
    if ways == "4bit":
        assert (config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")


SPECS = [
    ModelSpec(),
    ModelSpec("owner/name", "cuda:1", "bfloat16", "v1", True, quantize="4bit", attention="eager"),
    ModelSpec(
        device_map="auto",
        model_args={
            "a": 1,
            "b": 0.5,
            "c": 1e-7,
            "d": True,
            "e": None,
            "f": "x y: '#",
            "g": "yes",
            "h": "1",
            "i": "",
        },
    ),
]
TASKS = [TaskSpec(), TaskSpec("a b.jsonl", "anls", 7, "prompt=q,answers=a", "val", "en", "main")]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("source", TASKS)
def test_words_come_back_through_the_command_line(spec, source):
    app, seen = typer.Typer(), []

    @app.command()
    @model_options
    @task_options
    def command(spec: ModelSpec, source: TaskSpec) -> None:
        seen.append((spec, source))

    result = CliRunner().invoke(app, [*spec.words(), *source.words()])
    assert result.exit_code == 0, result.output
    assert seen == [(spec, source)]


def test_every_field_has_an_option():
    """What is added to a spec reaches workers, which are started by words."""
    for parcel, decorate in ((ModelSpec, model_options), (TaskSpec, task_options)):
        name = "spec" if parcel is ModelSpec else "source"
        namespace = {"parcel": parcel}
        exec(f"def command({name}: parcel) -> None: ...", namespace)
        parameters = decorate(namespace["command"]).__signature__.parameters
        assert len(parameters) == len(dataclasses.fields(parcel))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model-args", "x"], "must be NAME=VALUE"),
        (["--model-args", "=1"], "must be NAME=VALUE"),
        (["--model-args", "x=[1]"], "one number, word or switch"),
        (["--model-args", "x=1", "--model-args", "x=2"], "gives 'x' twice"),
        (["--model-args", "x=!!int a"], "'a' is no int"),
    ],
)
def test_model_arguments_are_checked(words, said):
    from tests.cli_runner import invoke, refused

    assert said in refused(invoke("run", "--policy", "uniform", *words))
