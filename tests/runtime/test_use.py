"""Ways in which people use the runtime: streamers, pipelines of threads, loops of their own."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline

import avlprof
from avlprof.attention.session import (
    NAMES,
    cache_argument,
    cache_of,
    with_cache,
)
from avlprof.errors import UserError
from avlprof.policy import Policy, TextPolicy
from avlprof.testing.models import VOCABULARY, cases, random_llava
from tests.helpers import few

MODELS = dict(cases())
POLICY = Policy(
    vision_keep=(0.62, 0.3, 0.45),
    vision_compute=(0.33, 0.1, 0.2),
    refresh_interval=3,
    text=TextPolicy(window=6, sink=1),
)
SCORED = Policy(
    vision_keep=0.5,
    vision_compute=0.25,
    refresh_interval=3,
    text=TextPolicy(keep=0.5, minimum=4, scorer="history"),
)
STEPS = 20


@pytest.fixture(scope="module", params=few(MODELS, ("qwen2_5_vl-6q2kv",)))
def case(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def tokenizer():
    """A real tokenizer that writes token i as `w<i>`."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def greedy(case, inputs, policy=POLICY):
    """Ids of the answer that `generate` gives under a policy, `[B, STEPS]`."""
    with avlprof.apply(case.model, policy):
        ids = case.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :]


class Told(TextStreamer):
    """A streamer that remembers what it would print."""

    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, **options)
        self.pieces, self.ended = [], False

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)
        self.ended = stream_end


def test_a_streamer_tells_the_answer_as_it_is_made(case, tokenizer):
    inputs = case.inputs(seed=1)
    wanted = " ".join(f"w{i}" for i in greedy(case, inputs)[0].tolist())
    streamer = Told(tokenizer, skip_prompt=True)
    with avlprof.apply(case.model, POLICY):
        case.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, streamer=streamer)
    assert "".join(streamer.pieces).strip() == wanted
    assert streamer.ended
    assert sum(bool(piece) for piece in streamer.pieces) > STEPS // 2, "it came in pieces"


def test_an_iterator_streams_from_a_thread(case, tokenizer):
    """`generate` runs in a thread of its own, inside a context that the main thread holds."""
    inputs = case.inputs(seed=2)
    wanted = " ".join(f"w{i}" for i in greedy(case, inputs)[0].tolist())
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**inputs, "max_new_tokens": STEPS, "do_sample": False, "streamer": streamer}
    with avlprof.apply(case.model, POLICY):
        thread = threading.Thread(target=case.model.generate, kwargs=options)
        thread.start()
        told = "".join(streamer)
        thread.join()
    assert told.strip() == wanted


@pytest.mark.parametrize("passed", [True, False])
@torch.inference_mode()
def test_a_loop_of_ones_own(case, passed):
    """Prompt, then token by token; the cache is made beforehand or comes with the first output.

    Without padding the steps need no mask; Qwen2.5-VL would make positions of all of it, with any cache.
    """
    inputs = case.inputs(batch=2, seed=3)
    wanted = greedy(case, inputs)
    with avlprof.apply(case.model, POLICY) as runtime:
        cache = runtime.new_cache() if passed else None
        out = case.model(**inputs, **with_cache(case.model, cache))
        cache = cache_of(out)
        assert isinstance(cache, avlprof.AVLCache)
        assert runtime.cache is cache
        answer = [out.logits[:, -1].argmax(dim=-1, keepdim=True)]
        while len(answer) < STEPS:
            out = case.model(input_ids=answer[-1], **with_cache(case.model, cache))
            answer.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
    assert torch.equal(torch.cat(answer, dim=1), wanted)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1


@torch.inference_mode()
def test_a_cache_is_taken_by_its_old_and_new_name_and_by_place(case):
    inputs = case.inputs()
    names = list(inspect.signature(case.model.forward).parameters)
    found = []
    for name in NAMES:
        with avlprof.apply(case.model, POLICY) as runtime, torch.no_grad():
            cache = runtime.new_cache()
            given = dict.fromkeys(names[: names.index(cache_argument(case.model))]) | inputs
            ids = given.pop("input_ids")
            found.append(case.model(ids, **given, **{name: cache}, use_cache=True).logits)
            assert cache.get_seq_length() == ids.shape[1]
            with pytest.raises(TypeError, match="multiple values"):
                case.model(ids, input_ids=ids)
            with pytest.raises(UserError, match="given twice"):
                case.model(ids, **dict.fromkeys(NAMES, cache))
    assert torch.equal(*found)


def test_a_padded_batch_in_a_loop_of_ones_own():
    """As with the stock cache, positions that skip the padding are the caller's to give."""
    case = random_llava()
    inputs = case.inputs(batch=3, seed=4, pad=True)
    wanted = greedy(case, inputs)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with avlprof.apply(case.model, POLICY) as runtime:
        cache = runtime.new_cache()
        out = case.model(**inputs, position_ids=positions, **with_cache(case.model, cache))
        answer = [out.logits[:, -1].argmax(dim=-1, keepdim=True)]
        while len(answer) < STEPS:
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            out = case.model(
                input_ids=answer[-1],
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                **with_cache(case.model, cache),
            )
            answer.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
    assert torch.equal(torch.cat(answer, dim=1), wanted)


@pytest.mark.full  # answers of the embedded model, with and without a pipeline
@pytest.mark.parametrize("policy", few(["paper/a-vl", "paper/a-vl-prefill", "uniform"], 1))
def test_a_pipeline_of_transformers(tiny, policy):
    """The embedded model: a pipeline says under a policy what `generate` says."""
    sample = avlprof.load_task("shapes:describe").samples("held-out", 1)[0]
    picture = sample.open_images()[0]
    ask = pipeline("image-text-to-text", model=tiny.model, processor=tiny.processor)
    words = [{"type": "image", "image": picture}, {"type": "text", "text": sample.prompt}]
    options = {"max_new_tokens": 40, "do_sample": False}
    told = []
    with avlprof.apply(tiny.model, policy) as runtime:
        for _ in range(2):
            out = ask(
                text=[{"role": "user", "content": words}], generate_kwargs=options, return_full_text=False
            )
            told.append(out[0]["generated_text"])
        use = runtime.cache.use()
    inputs = tiny.adapter.encode([sample.prompt], [[picture]])
    with avlprof.apply(tiny.model, policy):
        ids = tiny.model.generate(**inputs, **options)
    wanted = tiny.adapter.decode(ids[:, inputs["input_ids"].shape[1] :])[0]
    assert [text.strip() for text in told] == [wanted.strip()] * 2
    assert sum(u.prompt for u in use) < 0.75 * sum(u.dense_prompt for u in use)


def test_a_streamer_of_the_embedded_model(tiny):
    sample = avlprof.load_task("shapes:describe").samples("held-out", 1)[0]
    inputs = tiny.adapter.encode([sample.prompt], [sample.open_images()])
    options = {"max_new_tokens": 40, "do_sample": False}
    streamer = Told(tiny.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with avlprof.apply(tiny.model, "paper/a-vl"):
        ids = tiny.model.generate(**inputs, **options, streamer=streamer)
    wanted = tiny.adapter.decode(ids[:, inputs["input_ids"].shape[1] :])[0]
    assert "".join(streamer.pieces).strip() == wanted.strip()
    assert sum(bool(piece) for piece in streamer.pieces) > 3


@pytest.mark.parametrize("policy", [POLICY, SCORED])
def test_recording_under_a_policy_changes_no_token(case, policy):
    inputs = case.inputs(batch=2, seed=5)
    wanted = greedy(case, inputs, policy)
    with avlprof.apply(case.model, policy), avlprof.record(case.model) as recorder:
        ids = case.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], wanted)
    assert [record.steps for record in recorder.records] == [STEPS - 1] * 2
