"""What decides a model's answers beside its weights, in words that two models can be compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

SAMPLING: Final = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "renormalize_logits"),
)
"""Fields of a generation config that greedy decoding does not ask for."""

MOST_NAMED: Final = 6  # differences in one sentence
_NOTED_ELSEWHERE: Final = frozenset(
    ("tokenizer", "image_processor", "video_processor", "feature_extractor", "chat_template")
)
_NAMES: Final = frozenset(("processor_class", "auto_map", "_from_model_config", "transformers_version"))
_tokenizers: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def checkpoint_settings(model: Any, processor: Any) -> dict[str, str]:
    """What a checkpoint brings beside its weights, by name: `generation_config.repetition_penalty`.

    Of the generation config what is not plain and no matter of sampling, the settings of the
    processor and of those of pictures and videos (their resolution above all), fingerprints of the
    chat template and the tokenizer, and how the weights are quantised.
    """
    noted: dict[str, Any] = {
        "generation_config": {
            name: value for name, value in _fields(model, "generation_config").items() if name not in SAMPLING
        },
        "image_processor": _fields(processor, "image_processor"),
        "video_processor": _fields(processor, "video_processor"),
        "processor": {
            name: value for name, value in _dict_of(processor).items() if name not in _NOTED_ELSEWHERE
        },
        "chat_template": _template(processor),
        "tokenizer": _tokenizer(getattr(processor, "tokenizer", None)),
        "quantization": _fields(getattr(model, "config", None), "quantization_config"),
    }
    return dict(_flat("", noted))


def settings_hash(settings: Mapping[str, str]) -> str:
    """12 hex digits that are equal where all settings are."""
    return hashlib.sha256(json.dumps(dict(sorted(settings.items()))).encode()).hexdigest()[:12]


def settings_differences(here: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    """Settings that differ, as `name: one here, other asked`."""
    return [
        f"{name}: {_cut(here.get(name, 'none'))} here, {_cut(asked.get(name, 'none'))} asked"
        for name in sorted({*here, *asked})
        if here.get(name) != asked.get(name)
    ]


def noted_differences(what: str, here: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    """As `settings_differences` of what a file notes; one that notes nothing is of version 0.1.0.

    Args:
        what: names the settings of such a file.
    """
    if asked and not here:
        return [f"{what}: not noted by avlprof 0.1.0, which began this"]
    return settings_differences(here, asked)


def listed(differences: Sequence[str]) -> str:
    """Differences in one line, the first few of many."""
    more = len(differences) - MOST_NAMED
    return "; ".join(differences[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _fields(owner: Any, name: str) -> dict[str, Any]:
    return _dict_of(getattr(owner, name, None))


def _dict_of(part: Any) -> dict[str, Any]:
    """The settings of a part of transformers; of a generation config those that are not plain."""
    if isinstance(part, Mapping):
        return dict(part)
    to_dict = getattr(part, "to_diff_dict", None) or getattr(part, "to_dict", None)
    values = to_dict() if callable(to_dict) else None
    return dict(values) if isinstance(values, Mapping) else {}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            if name not in _NAMES:
                yield from _flat(f"{prefix}.{name}" if prefix else str(name), value[name])
    elif value is not None:
        yield prefix, value if isinstance(value, str) else json.dumps(value, default=str)


def _template(processor: Any) -> str | None:
    template = getattr(processor, "chat_template", None)
    return None if template is None else _digest(json.dumps(template, sort_keys=True, default=str))


def _tokenizer(tokenizer: Any) -> str | None:
    """A fingerprint of the vocabulary and of how texts are cut, worked out once a tokenizer."""
    if tokenizer is None:
        return None
    try:
        if tokenizer not in _tokenizers:
            _tokenizers[tokenizer] = _digest(_tokenizer_text(tokenizer))
        return _tokenizers[tokenizer]
    except TypeError:  # one of a kind that cannot be held weakly
        return _digest(_tokenizer_text(tokenizer))


def _tokenizer_text(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        # calls with padding or a limit leave these behind
        text: Any = {name: part for name, part in whole.items() if name not in ("padding", "truncation")}
    else:
        vocabulary = getattr(tokenizer, "get_vocab", None)
        text = vocabulary() if callable(vocabulary) else type(tokenizer).__name__
    return json.dumps([text, getattr(tokenizer, "special_tokens_map", {})], sort_keys=True, default=str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
