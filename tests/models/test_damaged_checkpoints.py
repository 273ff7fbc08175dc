"""Checkpoints whose small files are damaged: one sentence, or the answers of what the files now say.

The weights are those of `tiny`; processor, generation, tokenizer and model config and the chat template
are mutated. What is accepted has to be told apart: where answers differ from the whole checkpoint's, the
settings that identify a model do too (see `avlprof.models.identity`). A tenth runs by default; the
rest is slow.
"""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from avlprof.models import load_model
from avlprof.models.tiny import WEIGHTS
from tests.cli_runner import invoke

COUNT = 800
ROOM = 8 << 30  # bytes of address space beyond today's: a config must not be able to ask for more

FILES = {
    name: json.loads((WEIGHTS / name).read_text())
    for name in ("processor_config.json", "generation_config.json", "tokenizer_config.json", "config.json")
}
TEMPLATE = (WEIGHTS / "chat_template.jinja").read_text()
WHOLE_FILES = ("model.safetensors", "tokenizer.json")
MORE = (
    *("num_beams", "max_length", "max_new_tokens", "min_new_tokens", "repetition_penalty", "stop_strings"),
    *("no_repeat_ngram_size", "prompt_lookup_num_tokens", "cache_implementation", "use_cache", "top_k"),
    *("num_return_sequences", "guidance_scale", "suppress_tokens", "forced_eos_token_id", "bad_words_ids"),
    *("max_time", "penalty_alpha", "return_dict_in_generate", "output_attentions", "prefill_chunk_size"),
    *("eos_token_id", "watermarking_config", "assistant_early_exit", "token_healing", "sequence_bias"),
    *("do_pad", "pad_size", "resample", "do_normalize", "rescale_factor", "size", "crop_size", "image_mean"),
    *("image_processor_type", "processor_class", "tokenizer_class", "auto_map", "image_token", "patch_size"),
    *("num_additional_image_tokens", "vision_feature_select_strategy", "chat_template", "padding_side"),
    *("model_max_length", "truncation_side", "image_token_index", "vision_feature_layer", "model_type"),
    *("attn_implementation", "quantization_config", "text_config", "vision_config", "nonsense", ""),
)  # fmt: skip
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 500),
    st.sampled_from([10**6, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 1e-30, 1e308, 0.5]),
    st.floats(),
    st.sampled_from(
        ["", "x", "full", "default", "<image>", "USER:", "left", "right", "static", "quantized", "max_length",
         "LlavaProcessor", "CLIPImageProcessor", "AutoProcessor", "PreTrainedTokenizerFast", "llama", "llava",
         "qwen2_5_vl", "clip_vision_model", "eager", "flash_attention_2", "../a", "evil--code.Evil",
         "\ud83d", "é" * 300],
    ),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*MORE, "height"]), inner, max_size=3)
    ),
    max_leaves=5,
)
SCRAPS = ("", "[", "{", '"', "\\u", ",", "}", "null", "NaN", "9" * 5000, "[" * 3000, "\x00", "\udcff")
JINJA = (
    "", "{{", "{% for x in y %}", "{{ raise_exception('no') }}", "{% endif %}", "{{ messages[9].content }}",
    "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}", "{% for i in range(99999999) %}x{% endfor %}",
    "{% set x = 1 %}", "<image>", "{{ messages }}", "{{ bos_token }}", "\x00",
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str]:
    """One file of the checkpoint and its new text."""
    name = draw(st.sampled_from([*FILES, *FILES, "chat_template.jinja"]))
    if name == "chat_template.jinja":
        start = draw(st.integers(0, len(TEMPLATE)))
        end = draw(st.integers(start, min(len(TEMPLATE), start + 40)))
        return name, TEMPLATE[:start] + draw(st.sampled_from(JINJA)) + TEMPLATE[end:]
    config = copy.deepcopy(FILES[name])
    for _ in range(draw(st.integers(1, 2))):
        target: Any = config
        while draw(st.booleans()):
            inner = [value for value in target.values() if isinstance(value, dict) and value]
            if not inner:
                break
            target = draw(st.sampled_from(inner))
        key = draw(st.sampled_from(sorted(target)) | st.sampled_from(MORE)) if target else "x"
        if draw(st.integers(0, 4)) == 0:
            target.pop(key, None)
        else:
            target[key] = draw(VALUES)
    text = json.dumps(config)
    if draw(st.integers(0, 4)) == 0:
        start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        text = text[:start] + draw(st.sampled_from(SCRAPS)) + text[end:]
    return name, text


@dataclass
class Checkpoint:
    """A folder with the files of `tiny`, and what the whole checkpoint answers."""

    folder: Path
    answers: list[str] = field(default_factory=list)
    whole: tuple[Any, ...] = ()

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")

    def identity(self) -> tuple[Any, ...]:
        """What tells this checkpoint apart from others, as runs and studies note it."""
        model = load_model(str(self.folder))
        return model.revision, model.settings_hash

    def restore(self, name: str) -> None:
        (self.folder / name).write_bytes((WEIGHTS / name).read_bytes())

    def check(self, damage: tuple[str, str]) -> None:
        """Refused in one sentence, or answered as the settings say."""
        self.write(*damage)
        try:
            self.check_answer(ask(self.folder), *damage)
        finally:
            self.restore(damage[0])

    def check_answer(self, result: Any, name: str, text: str) -> None:
        assert result.exit_code in (0, 2), (name, result.output[-800:], result.exception)
        assert "Traceback" not in result.output
        if result.exit_code == 2:
            said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert len(said) == 1, result.output
            assert len(said[0]) < 1100
            return
        if answers(result) != self.answers:
            assert self.identity() != self.whole, (name, text)


def answers(result: Any) -> list[str]:
    """What was answered, densely and under the policy."""
    return [line["answer"] for line in json.loads(result.stdout)]


def ask(folder: Path) -> Any:
    """`avlprof run` on a sample of the embedded task."""
    return invoke(
        *("run", "--policy", "uniform", "--model", folder, "--max-new-tokens", 3),
        *("--format", "json", "--no-speed"),
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    """Under a limit of memory, so that a config that asks for a huge picture fails here and now."""
    for name in WHOLE_FILES:
        (tmp_path / name).symlink_to(WEIGHTS / name)
    made = Checkpoint(tmp_path)
    for name in (*FILES, "chat_template.jinja"):
        made.restore(name)
    result = ask(tmp_path)
    assert result.exit_code == 0, result.output
    made.answers, made.whole = answers(result), made.identity()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    yield made
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def campaign(checkpoint: Checkpoint, count: int) -> None:
    limits = settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    limits(seed(20261127)(given(damaged())(checkpoint.check)))()


@pytest.mark.full  # a campaign
def test_damaged_checkpoints(checkpoint: Checkpoint) -> None:
    campaign(checkpoint, COUNT // 10)


@pytest.mark.slow  # minutes: the same with many more examples
def test_damaged_checkpoints_at_length(checkpoint: Checkpoint) -> None:
    campaign(checkpoint, COUNT)
