"""What a trace can be made of: batches, given answers, a policy; and that it leaves nothing behind."""

from __future__ import annotations

import gc
import re
import resource
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import avlprof
from avlprof.api.trace import plan_trace
from avlprof.errors import UserError
from avlprof.models import load_model, placement
from avlprof.models.adapter import Adapter
from avlprof.models.answers import reference_tokens
from avlprof.models.load import LoadedModel
from avlprof.policy import Policy
from avlprof.runs import RunDirectory
from avlprof.runtime.apply import apply
from avlprof.tasks import Message, Sample, Task
from avlprof.testing.models import BOS, FIRST_WORD, IMAGE, PAD, VOCABULARY, cases, random_llava
from avlprof.tracing import RecordOptions, record, trace_samples
from avlprof.tracing.options import TraceSettings
from avlprof.tracing.trace import FLUSH_SAMPLES
from avlprof.watch import SILENT
from tests.helpers import few
from tests.watching import Counts

KEYS = ["sample", "layer", "head", "phase", "query"]
MODELS = [
    case if case[0] == "qwen2_5_vl-6q2kv" else pytest.param(*case, marks=pytest.mark.full) for case in cases()
]
POLICY = Policy(name="half", vision_keep=0.5, vision_compute=0.25, refresh_interval=3)


# --- a model of random weights that takes samples


class Words:
    """A tokenizer of words `w4 w17 ...`, each its own id."""

    eos_token_id = FIRST_WORD

    def __call__(self, text, add_special_tokens=True):
        if not isinstance(text, str):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [int(number) for number in re.findall(r"w(\d+)", text)]}

    def decode(self, ids):
        return " ".join(f"w{int(i)}" for i in ids)

    def convert_ids_to_tokens(self, ids):
        return [f"w{i}" for i in ids]


class Wordy(Adapter):
    """Prompts of words, and pictures whose width is the seed of their random pixels."""

    def encode_chats(self, chats):
        case = self.processor.case
        rows, pixels = [], []
        for (message,) in chats:
            words = self.processor.tokenizer(message.text)["input_ids"]
            row = [BOS, *words[:2]]
            for picture in message.images:
                sizes, tensors = case.pixels(1, torch.Generator().manual_seed(picture.width), True)
                row += [IMAGE] * sizes[0] + words[2:4]
                pixels.append(tensors)
            rows.append(row + words[4:])
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        if pixels:
            batch |= {name: torch.cat([one[name] for one in pixels]) for name in pixels[0]}
            batch |= case.companions(ids)
        return batch

    def decode(self, ids):
        return [self.processor.tokenizer.decode(row) for row in ids]


def wordy(case, ends=None):
    """A random model as `trace_samples` takes it; `ends` are the ids that end an answer."""
    case.model.generation_config.eos_token_id = ends
    processor = SimpleNamespace(case=case, tokenizer=Words())
    return LoadedModel(case.model, processor, case.name, case.name, "0", Wordy(case.model, processor))


def questions(count, seed=0, images=(1,), answers=()):
    """Samples of random words of many lengths, with `images` pictures in turn."""
    rng = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(f"w{i}" for i in rng.integers(FIRST_WORD, VOCABULARY - 2, rng.integers(low, high)))

    return [
        Sample(
            f"s{number}",
            tuple(
                Image.new("RGB", (int(rng.integers(1, 999)), 30)) for _ in range(images[number % len(images)])
            ),
            words(6, 18),
            tuple(words(*span) for span in answers),
        )
        for number in range(count)
    ]


def task_of(samples, most=8):
    return Task("words", "exact_match", ("own",), lambda split: samples, most)


def traced(loaded, samples, out, watch=SILENT, under=nullcontext, **options):
    return trace_samples(
        loaded,
        task_of(samples),
        samples,
        out,
        TraceSettings(split="own", **options),
        watch=watch,
        under=under,
    )


def assert_same_numbers(left: RunDirectory, right: RunDirectory):
    """Equal to 1e-5 where continuous; the sets behind counts may turn over at a near-tie now and then."""
    tables = [run.samples().set_index("sample").sort_index() for run in (left, right)]
    for name in ("answer", "generated", "system", "vision", "text", "tiles"):
        assert list(tables[0][name]) == list(tables[1][name]), name
    stats = [run.stats().set_index(KEYS).sort_index() for run in (left, right)]
    assert stats[0].index.equals(stats[1].index)
    assert (stats[0]["rows"] == stats[1]["rows"]).all()
    np.testing.assert_allclose(*(np.stack(one.pop("distance")) for one in stats), atol=1e-5)
    for name in stats[0].columns:
        ours, theirs = (one[name].to_numpy(float) for one in stats)
        assert np.array_equal(np.isnan(ours), np.isnan(theirs)), name
        near = np.isclose(ours, theirs, atol=1e-5, rtol=1e-5, equal_nan=True)
        discrete = name.startswith(("coverage", "overlap"))
        assert near.mean() > 0.98 if discrete else near.all(), (name, ours[~near], theirs[~near])
    for sample in tables[0].index:
        for name, scores in left.scores(sample).items():
            np.testing.assert_allclose(right.scores(sample)[name], scores, atol=1e-5)


# --- batches


@pytest.mark.parametrize(("name", "build"), MODELS)
def test_a_batch_gives_the_numbers_of_its_samples_alone(name, build, tmp_path):
    """Rows of 0, 1 and 2 pictures that end at steps of their own, or not at all."""
    loaded = wordy(build(), ends=list(range(FIRST_WORD, FIRST_WORD + 24)))
    samples = questions(9, seed=3, images=(1, 0, 2))
    alone = traced(loaded, samples, tmp_path / "alone", max_new_tokens=9)
    for size in (3, 7):
        together = traced(loaded, samples, tmp_path / str(size), max_new_tokens=9, batch_size=size)
        assert_same_numbers(alone, together)
    lengths = alone.samples()["generated"]
    assert lengths.nunique() > 2, "the rows of a batch must end at different steps"
    decoded = alone.stats().query("phase == 'decode'").groupby("sample")["rows"].first()
    assert dict(decoded) == {
        sample: n - 1 for sample, n in zip(alone.samples()["sample"], lengths, strict=True) if n > 1
    }


@pytest.mark.parametrize("per_head", [False, True])
def test_a_batch_under_a_policy_gives_the_numbers_of_its_samples_alone(tmp_path, per_head):
    loaded = wordy(random_llava(2), ends=list(range(FIRST_WORD, FIRST_WORD + 8)))
    samples = questions(5, seed=1, images=(1, 2))
    runs = [
        traced(
            loaded,
            samples,
            tmp_path / str(size),
            max_new_tokens=8,
            batch_size=size,
            policy="half",
            under=lambda: apply(loaded.model, POLICY),
            record=RecordOptions(per_head=per_head, history=0.5),
        )
        for size in (1, 5)
    ]
    assert_same_numbers(*runs)
    assert ("decode_heads" in runs[0].scores("s0")) == per_head


@pytest.mark.full  # two more traces
def test_a_batch_of_the_embedded_model(tiny, tmp_path):
    task = avlprof.load_task("shapes")
    samples = task.samples("search", 5)
    runs = [
        trace_samples(
            tiny, task, samples, tmp_path / str(size), TraceSettings(split="search", batch_size=size)
        )
        for size in (1, 3)
    ]
    assert runs[0].samples()["generated"].nunique() > 1
    assert_same_numbers(*runs)


def test_a_batch_resumes_a_run_of_single_samples(tmp_path):
    loaded, samples = wordy(random_llava()), questions(6)
    traced(loaded, samples[:2], tmp_path, max_new_tokens=2)
    calls = []
    run = traced(
        loaded,
        samples,
        tmp_path,
        max_new_tokens=2,
        batch_size=3,
        watch=Counts(lambda *counts: calls.append(counts)),
    )
    assert calls == [(2, 6), (5, 6), (6, 6)]
    assert run.ids() == [sample.id for sample in samples]
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        traced(loaded, samples, tmp_path, batch_size=0)


# --- given answers


def teacher_forced_weights(loaded, sample, answer):
    """Eager weights `[H, N, N]` of each layer over prompt and answer, from one plain forward; the
    length of the prompt; and which tokens are vision, bool `[N]`."""
    model = loaded.model
    batch = loaded.adapter.encode([sample.prompt], [sample.open_images()])
    prompt = batch["input_ids"].shape[1]
    ids = torch.cat([batch["input_ids"], torch.tensor([answer])], dim=1)
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= loaded.processor.case.companions(ids) if "pixel_values" in batch else {}
    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": before})
    return [layer[0].numpy() for layer in weights], prompt, (ids[0] == IMAGE).numpy()


@pytest.mark.parametrize(("name", "build"), MODELS)
@pytest.mark.parametrize("size", few([1, 4], [4]))
def test_given_answers_are_traced_to_their_end(name, build, size, tmp_path):
    """The oracle is one forward over prompt and answer, in which nothing is generated."""
    loaded = wordy(build(), ends=[FIRST_WORD])
    samples = questions(4, seed=5, answers=((2, 15), (1, 2)))
    options = RecordOptions(per_head=True)
    run = traced(loaded, samples, tmp_path, batch_size=size, forced=True, record=options)
    assert run.meta.forced
    table = run.samples().set_index("sample")
    assert table["generated"].max() > 8, "longer than what the task lets a model answer"
    for sample in samples:
        answer = [*loaded.processor.tokenizer(sample.answers[0])["input_ids"], FIRST_WORD]
        first_end = answer.index(FIRST_WORD) + 1
        answer = answer[:first_end]
        assert list(table.loc[sample.id, "tokens"]) == [f"w{i}" for i in answer]
        stats = run.stats().query("sample == @sample.id and query == 'generated'")
        masses, scores = stats.set_index(["layer", "head"])["mass_vision"], run.scores(sample.id)
        weights, prompt, vision = teacher_forced_weights(loaded, sample, answer)
        for layer, of_layer in enumerate(weights):
            for head, full in enumerate(of_layer):
                rows = full[prompt : prompt + len(answer) - 1][:, vision]
                np.testing.assert_allclose(scores["decode_heads"][:, layer, head], rows, atol=1e-5)
                last = scores["last_heads"][layer, head]
                np.testing.assert_allclose(last, full[prompt - 1][vision], atol=1e-5)
                if len(rows):
                    want = sum(row.sum() for row in rows) / len(rows)
                    assert abs(masses[layer, head] - want) < 1e-5


def test_a_model_without_end_token_stops_with_the_answer(tmp_path):
    loaded = wordy(random_llava())
    loaded.processor.tokenizer.eos_token_id = None
    samples = questions(3, seed=2, answers=((1, 9),))
    run = traced(loaded, samples, tmp_path, batch_size=3, forced=True)
    assert list(run.samples()["answer"]) == [sample.answers[0] for sample in samples]
    assert run.samples()["generated"].nunique() > 1
    steps = {sample.id: len(run.scores(sample.id)["decode"]) + 1 for sample in samples}
    assert steps == {sample.id: len(sample.answers[0].split()) for sample in samples}


def test_given_answers_can_be_cut(tmp_path):
    samples = questions(2, answers=((10, 12),))
    run = traced(wordy(random_llava()), samples, tmp_path, forced=True, max_new_tokens=4)
    assert list(run.samples()["generated"]) == [4, 4]


@pytest.mark.full  # two traces
def test_the_own_answer_given_back_is_the_same_trace(tiny, tmp_path):
    task = avlprof.load_task("shapes")
    samples = task.samples("search", 4)
    free = trace_samples(tiny, task, samples, tmp_path / "free", TraceSettings(split="search"))
    said = [
        Sample(s.id, s.images, s.prompt, (a,)) for s, a in zip(samples, free.samples()["answer"], strict=True)
    ]
    forced = trace_samples(
        tiny, task, said, tmp_path / "forced", TraceSettings(split="search", forced=True, batch_size=2)
    )
    assert free.samples()["generated"].min() > 1
    assert_same_numbers(free, forced)


def test_a_missing_answer_is_named_before_any_work(tmp_path):
    loaded, samples = wordy(random_llava()), questions(3, answers=((2, 3),))
    for answers in ((), ("  ",)):
        samples[1] = Sample("odd one", samples[1].images, samples[1].prompt, answers)
        with pytest.raises(UserError, match="sample 'odd one' has no reference answer"):
            traced(loaded, samples, tmp_path / "run", forced=True)
    assert not (tmp_path / "run").exists()


def test_an_answer_follows_the_prompt_as_in_training(tiny):
    """The embedded model learned ` answer` behind `ASSISTANT:`, and then the end of the text."""
    tokenizer = tiny.processor.tokenizer
    sample = Sample("s", (), "what?", ("two red squares",))
    last = tokenizer(tiny.adapter.prompt([Message("user", "what?")]))["input_ids"][-1]
    want = [*tokenizer(" two red squares", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert reference_tokens(tiny, sample, last) == want


@pytest.mark.parametrize(("before", "want"), [(":", ["▁red", "▁sky"]), ("\n", ["red", "▁sky"])])
def test_an_answer_in_the_words_of_a_sentencepiece_model(before, want):
    """Such tokenizers put a blank before whatever text they are given; only one must remain."""
    words = ["<unk>", "</s>", "▁", ":", "▁:", "\n", "▁\n", "red", "▁red", "▁sky"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    loaded = SimpleNamespace(
        processor=SimpleNamespace(tokenizer=fast),
        model=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 1])),
    )
    last = fast.convert_tokens_to_ids(before)
    found = reference_tokens(loaded, Sample("s", (), "", ("red sky",)), last)
    assert fast.convert_ids_to_tokens(found) == [*want, "</s>"]


# --- under a policy


def test_a_run_under_a_policy_holds_what_the_policy_attends_to(tiny, tmp_path):
    plan = plan_trace(
        tiny, "shapes", 3, TraceSettings(policy=POLICY, max_new_tokens=12, batch_size=1), out=tmp_path
    )
    run = plan.run()
    assert (run.meta.policy, run.meta.policy_hash) == ("half", POLICY.hash)
    for sample in plan.samples:
        encoding = tiny.adapter.encode([sample.prompt], [sample.open_images()])
        with apply(tiny.model, POLICY), record(tiny.model) as recorder:
            tiny.model.generate(**encoding, max_new_tokens=12, do_sample=False)
        for name, want in recorder.records[0].scores().items():
            np.testing.assert_allclose(run.scores(sample.id)[name], want, atol=1e-6)
        decode = run.scores(sample.id)["decode"]
        assert (decode == 0).mean() > 0.4, "what was evicted weighs nothing"


def test_runs_of_other_inputs_do_not_mix(tmp_path):
    loaded, samples = wordy(random_llava()), questions(2, answers=((3, 4),))
    traced(loaded, samples, tmp_path, max_new_tokens=3)
    with pytest.raises(UserError, match="forced: False here, True asked"):
        traced(loaded, samples, tmp_path, max_new_tokens=3, forced=True)
    with pytest.raises(UserError, match=f"policy_hash: '' here, '{POLICY.hash}' asked"):
        traced(loaded, samples, tmp_path, max_new_tokens=3, policy=POLICY)
    traced(loaded, samples, tmp_path, max_new_tokens=3, batch_size=2)


def test_a_policy_that_does_not_fit_is_refused_before_any_work(tiny, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="written for 2 layers, the model has 6"):
        plan_trace(tiny, "shapes", 2, TraceSettings(policy=Policy(vision_keep=(0.5, 0.5))), out=out)
    with pytest.raises(UserError, match="did you mean uniform"):
        plan_trace(tiny, "shapes", 2, TraceSettings(policy="unifrom"), out=out)
    assert not out.exists()


def test_a_run_under_a_policy_is_not_taken_for_a_dense_one(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    under = avlprof.trace(tiny, "shapes", 1, TraceSettings(policy=POLICY, max_new_tokens=2))
    assert under.path.name == "tiny-shapes-half"
    assert avlprof.latest_run().path == under.path
    assert avlprof.latest_run(loaded=tiny) is None
    forced = avlprof.trace(tiny, "shapes", 1, TraceSettings(forced=True))
    assert forced.path.name == "tiny-shapes-forced"
    assert avlprof.latest_run(loaded=tiny).path == forced.path


# --- nothing left behind


def state(model):
    decoder = model.get_decoder()
    return (
        model.config.get_text_config()._attn_implementation,
        model.config.vision_config._attn_implementation,
        len(model._forward_hooks) + len(model._forward_pre_hooks),
        [name for module in decoder.modules() for name in vars(module) if "avlprof" in name],
    )


@pytest.mark.parametrize("error", few([None, KeyboardInterrupt, RuntimeError], 2))
@pytest.mark.parametrize("under", [None, POLICY])
def test_the_model_is_as_before(error, under, tmp_path):
    """Also when it fails, or is stopped, in the middle of an answer."""
    loaded, samples = wordy(random_llava()), questions(4)
    before, calls = state(loaded.model), []

    def fail(*args):
        calls.append(1)
        if error is not None and len(calls) == 9:  # two batches take five passes each
            raise error

    hook = loaded.model.get_decoder().layers[1].register_forward_hook(fail)
    context = (lambda: apply(loaded.model, under)) if under else nullcontext
    with pytest.raises(error) if error else nullcontext():
        traced(loaded, samples, tmp_path, max_new_tokens=5, batch_size=2, under=context)
    hook.remove()
    assert state(loaded.model) == before
    names = {path.name for path in tmp_path.iterdir()}
    assert not any("partial" in name for name in names)
    assert RunDirectory(tmp_path).ids() == [sample.id for sample in samples[: 2 if error else 4]]


@pytest.mark.slow  # 160 samples
def test_memory_stays_flat(tmp_path):
    """160 samples: the tensors alive after each part do not grow in number, nor the process in size."""
    loaded, samples = wordy(random_llava(layers=2, grid=3)), questions(160)
    counts, sizes = [], []  # the first part loads what writes parts

    def look(done, total):
        if done and done % FLUSH_SAMPLES == 0:
            gc.collect()
            counts.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    traced(loaded, samples, tmp_path, max_new_tokens=2, batch_size=8, watch=Counts(look))
    assert len(counts) == len(RunDirectory(tmp_path).parts()) == 160 // FLUSH_SAMPLES
    assert len(RunDirectory(tmp_path).ids()) == 160
    assert max(counts) <= counts[0] + 5, counts
    assert sizes[-1] - sizes[1] < 20, f"MiB at its largest so far: {sizes}"


# --- devices


@pytest.mark.full  # two more traces
def test_a_device_map_changes_no_number(tiny, tmp_path):
    """Half of the weights lie on disk, so that accelerate's hooks are at work as they are on GPUs."""
    pytest.importorskip("accelerate", reason="a device map needs accelerate")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"}
    places |= {"model.language_model": "disk", "lm_head": "disk"}
    spread = load_model("tiny", device_map=places)
    assert next(spread.model.get_decoder().parameters()).device.type == "meta"
    task = avlprof.load_task("shapes")
    for policy in (None, POLICY):
        runs = [
            trace_samples(
                one,
                task,
                task.samples("search", 2),
                tmp_path / f"{number}{policy is None}",
                TraceSettings(split="search", batch_size=2, max_new_tokens=5),
                under=(lambda model=one.model: apply(model, POLICY)) if policy else nullcontext,
            )
            for number, one in enumerate((tiny, spread))
        ]
        assert_same_numbers(*runs)


def test_a_device_map_that_cannot_be(monkeypatch):
    with pytest.raises(UserError, match="unknown device map 'aut'; did you mean auto"):
        load_model("tiny", device_map="aut")
    with pytest.raises(UserError, match="not both; got 'cpu' and 'auto'"):
        load_model("tiny", device="cpu", device_map="auto")
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="a device map needs accelerate; pip install accelerate"):
        load_model("tiny", device_map="auto")


@pytest.mark.parametrize(
    ("name", "process", "gpus", "want"),
    [
        ("auto", 1, 2, "cuda:1"),
        ("cuda", 3, 2, "cuda:1"),
        ("auto", 5, 1, "cuda:0"),
        ("cuda:0", 1, 2, "cuda:0"),
        ("cpu", 1, 2, "cpu"),
        ("auto", 1, 0, "auto"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(name, process, gpus, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert placement.own_device(name, process) == want
