"""Models: names, loading, errors, encoding, vision positions, and the random test matrix."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from avlprof.errors import UserError
from avlprof.models import ALIASES, LoadedModel, adapter_for, load_model
from avlprof.models.aliases import EMBEDDED, FETCHED
from avlprof.models.tiny import WEIGHTS
from avlprof.tasks import load_task
from avlprof.testing.adapters import FamilyConformance, ProcessorConformance
from avlprof.testing.models import TinyCase, cases, random_llava, random_qwen2_5_vl
from tests.helpers import ROOT

CASES = [pytest.param(build, id=name) for name, build in cases()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint that a test may break."""
    return Path(shutil.copytree(WEIGHTS, tmp_path / "checkpoint"))


def picture(seed: int, size: tuple[int, int] = (112, 112)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# names


def test_aliases_need_no_torch() -> None:
    code = "import sys, avlprof.models.aliases, avlprof.models; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_families_of_aliases_are_known_to_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    for name, alias in ALIASES.items():
        assert alias.family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, name
        assert alias.source.count("/") == (0 if alias.source in (EMBEDDED, FETCHED) else 1), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lava", r"unknown model 'lava'; did you mean llava"),
        ("qwen25-vl", r"did you mean qwen2\.5-vl"),
        ("./nowhere", r"folder \./nowhere does not exist"),
        ("a/b/c", r"folder a/b/c does not exist"),
    ],
)
def test_unknown_names(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_model(name)


@pytest.mark.slow  # a process of its own that loads a model
def test_offline_hub_ids(tmp_path: Path) -> None:
    """Without network an id in the cache loads, with its commit; any other is one sentence."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(WEIGHTS, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = (
        "from avlprof.models import load_model\n"
        "from avlprof.errors import UserError\n"
        "print(load_model('owner/name', device='cpu').revision)\n"
        "try:\n    load_model('nobody/nothing')\n"
        "except UserError as error:\n    print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(WEIGHTS.parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    revision, said = done.stdout.splitlines()
    assert revision == commit
    for part in ("nobody/nothing", "cannot be reached", "local folder", "--model tiny"):
        assert part in said


def test_docs_list_every_alias() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    start = page.index("| alias |")
    table = page[start : page.index("\n\n", start)].splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]
    listed = {row[0]: tuple(row[1:5]) for row in rows[2:]}
    assert listed == {
        name: (alias.source, alias.family, alias.tested, ", ".join(alias.special))
        for name, alias in ALIASES.items()
    }
    for word in {word for alias in ALIASES.values() for word in alias.special}:
        assert f"**{word}**" in page, word


# loading


def test_tiny_loads(tiny: LoadedModel) -> None:
    assert tiny.source == tiny.name == "tiny"
    assert not tiny.model.training
    assert tiny.model.dtype == torch.float32
    assert tiny.adapter.family == ALIASES["tiny"].family
    stored = json.loads((WEIGHTS / "config.json").read_text())["text_config"]
    assert tiny.adapter.layers == stored["num_hidden_layers"]
    assert tiny.adapter.kv_heads == stored["num_key_value_heads"] < tiny.adapter.heads
    assert (
        tiny.adapter.kv_bytes_per_token_per_layer(torch.bfloat16) * 2
        == tiny.adapter.kv_bytes_per_token_per_layer()
    )


def test_folder_is_the_same_model(tiny: LoadedModel, folder: Path) -> None:
    other = load_model(str(folder), dtype="bfloat16", device="cpu")
    assert other.model.dtype == torch.bfloat16
    assert other.revision == tiny.revision
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    assert load_model(str(folder), device="cpu").revision != tiny.revision


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dtype", "fp16", r"unknown dtype 'fp16'; did you mean float16"),
        ("device", "gpu", r"unknown device 'gpu'"),
        ("revision", "main", r"revision must be left out for 'tiny'"),
        ("device", "cuda:99", r"'cuda:99' is not on this machine"),
    ],
)
def test_bad_options(field: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_model("tiny", **{field: value})  # type: ignore[arg-type]


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_model(str(file))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds an adapter .* merge it into its base model"):
        load_model(str(tmp_path))


def _cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def _garble_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def _drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in sorted(tensors) if "q_proj" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


def _other_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


def _wider_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))


def _drop_processor(folder: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _cut_weights,
        _garble_weights,
        _drop_weights,
        _lose_a_tensor,
        _garble_config,
        _other_config,
        _wider_config,
        _drop_processor,
    ],
)
def test_damaged_folders_are_one_sentence(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_model(str(folder), device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_untested_family_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    with caplog.at_level(logging.WARNING, logger="avlprof"):
        load_model(str(folder), device="cpu")
        assert "not yet tested" not in caplog.text
        monkeypatch.setattr("avlprof.models.load.is_tested", lambda family: False)
        load_model(str(folder), device="cpu")
    assert [record.name.split(".")[0] for record in caplog.records if "not yet tested" in record.message] == [
        "avlprof"
    ]


# encoding


def test_the_embedded_model_warns_once_of_pictures_it_does_not_know(
    tiny_copy: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own pictures, a photograph, a page of black on white, and none."""
    own = load_task("shapes").samples("held-out", 60)
    for sample in own:
        tiny_copy.adapter.encode_samples([sample])
    shown = Image.open(ROOT / "docs" / "images" / "shapes.png")
    tiny_copy.adapter.encode(["describe the image.", "2 + 2?"], [[shown], []])
    assert not caplog.records
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    page = Image.new("RGB", (112, 112), "white")
    page.paste((0, 0, 0), (20, 20, 60, 30))
    for picture in (page, Image.fromarray(noise), page):
        tiny_copy.adapter.encode(["describe the image."], [[picture]])
    (warning,) = caplog.records
    assert "knows only pictures such as its own task 'shapes' draws" in warning.getMessage()


def test_prompt_is_the_training_form(tiny: LoadedModel) -> None:
    """The rendered template gives the tokens of the plain text that the embedded model learned from."""
    question = "what is at the top left?"
    batch = tiny.adapter.encode([question], [[picture(0)]])
    ids = batch["input_ids"][0]
    tokenizer = tiny.processor.tokenizer
    plain = tokenizer(f"USER: <image>\n{question} ASSISTANT:").input_ids
    image = tiny.adapter.vision_token_ids[0]
    first = int((ids == image).nonzero()[0])
    count = int((ids == image).sum())
    assert [*ids[: first + 1].tolist(), *ids[first + count :].tolist()] == plain
    layout = tiny.adapter.image_layout(batch)
    assert layout is not None
    assert count == layout.tokens
    assert ids.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("rows", [[0, 1], [2, 0, 1], [0, 0]])
def test_rows_may_differ_in_images(tiny: LoadedModel, rows: list[int]) -> None:
    questions = ["describe the image.", "how many objects are there?", "list the colors."][: len(rows)]
    batch = tiny.adapter.encode(questions, [[picture(i) for i in range(count)] for count in rows])
    layout = tiny.adapter.image_layout(batch)
    assert layout is not None
    assert tiny.adapter.vision_mask(batch["input_ids"]).sum(dim=1).tolist() == [
        n * layout.tokens for n in rows
    ]
    assert ("pixel_values" in batch) == any(rows)


def test_template_that_writes_the_beginning_itself(tiny: LoadedModel, folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    other = load_model(str(folder), device="cpu")
    same = [loaded.adapter.encode(["is it red?"], [[picture(3)]])["input_ids"] for loaded in (tiny, other)]
    assert torch.equal(*same)


def test_processor_without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    adapter = load_model(str(folder), device="cpu").adapter
    batch = adapter.encode(["caption en"], [[picture(4)]])
    pad = adapter.processor.tokenizer.pad_token_id
    assert int(adapter.vision_mask(batch["input_ids"]).sum()) > 0
    assert adapter.decode(batch["input_ids"].masked_fill(adapter.vision_mask(batch["input_ids"]), pad)) == [
        "caption en"
    ]


def test_encode_refuses_unequal_lengths(tiny: LoadedModel) -> None:
    with pytest.raises(UserError, match="2 prompts, 1 rows"):
        tiny.adapter.encode(["a", "b"], [[picture(0)]])
    with pytest.raises(UserError, match="no processor"):
        adapter_for(tiny.model).encode(["a"], [[picture(0)]])


def test_model_without_vision_tokens() -> None:
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="'llama' has no vision tokens"):
        adapter_for(LlamaForCausalLM(config))


# the test matrix


class TestLlava(FamilyConformance):
    build = staticmethod(random_llava)


class TestQwen(FamilyConformance):
    build = staticmethod(random_qwen2_5_vl)


class TestTinyProcessor(ProcessorConformance):
    build = staticmethod(lambda: load_model("tiny", device="cpu").adapter)


def test_matrix_is_named_after_its_cases() -> None:
    for name, build in cases():
        assert build().name == name


@pytest.mark.parametrize("build", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cases_generate(build: Callable[[], TinyCase], dtype: torch.dtype) -> None:
    case = build()
    case.model.to(dtype)
    inputs = case.inputs(3, seed=7, pad=True, text=11, images_per_row=[1, 2, 0])
    out = case.model.generate(**inputs, max_new_tokens=5)
    assert out.shape == (3, inputs["input_ids"].shape[1] + 5)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize("build", CASES)
def test_cases_are_not_degenerate(build: Callable[[], TinyCase]) -> None:
    """Attention is clearly below uniform, answers depend on the picture, logits have margins."""
    case = build()
    inputs = case.inputs(8, seed=8)
    other = dict(inputs, pixel_values=inputs["pixel_values"].roll(1, 0))
    case.model.set_attn_implementation("eager")
    with torch.no_grad():
        out = case.model(**inputs, output_attentions=True)
        changed = case.model(**other).logits[:, -1]
    uniform = np.log(inputs["input_ids"].shape[1])
    for weights in out.attentions:
        row = weights[:, :, -1].clamp_min(1e-12)
        assert float(-(row * row.log()).sum(-1).mean()) < uniform - 0.7
    logits = out.logits[:, -1]
    top = logits.topk(2).values
    assert float((top[:, 0] - top[:, 1]).median()) > 0.1
    assert float((changed - logits).abs().max()) > 0.1


@pytest.mark.parametrize("build", CASES)
def test_cases_repeat_and_differ_by_seed(build: Callable[[], TinyCase]) -> None:
    before = torch.random.get_rng_state()
    first, second = build(), build()
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    one, same, other = (first.inputs(2, seed=seed)["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
