"""Samples with earlier turns, several pictures and videos: from the file to the prompt and the run."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from avlprof.attention.gate import check_config
from avlprof.errors import UserError
from avlprof.models import adapter_for, load_model
from avlprof.models.placement import keep_soft_cap
from avlprof.models.tiles import parse_tiles
from avlprof.run import find_pictures, save_pictures
from avlprof.tasks import Message, Sample, Task, Turn, load_task
from avlprof.testing.families import families
from avlprof.tracing.options import TraceSettings
from avlprof.tracing.trace import trace_samples

BUILDERS = dict(families())
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% elif c['type'] == 'video' %}<video>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def picture(seed, size=(112, 112)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    )


def conversation(seed=0):
    """A question with a picture, its answer, and a second question with two pictures."""
    turns = (
        Turn("user", "what is at the top left?", (picture(seed),)),
        Turn("assistant", "a red circle"),
    )
    return Sample(
        f"talk{seed}", (picture(seed + 1), picture(seed + 2)), "how many objects are there?", turns=turns
    )


# the prompt


def test_a_conversation_is_the_text_of_its_turns_with_pictures_in_their_places(tiny):
    """The template of the embedded model, written out by hand."""
    ids = tiny.adapter.encode_samples([conversation()])["input_ids"][0]
    tokenizer, image = tiny.processor.tokenizer, tiny.adapter.vision_token_ids[0]
    shown = tiny.adapter.image_layout({}).tokens
    text = (
        "USER: <image>\nwhat is at the top left? ASSISTANT: a red circle</s>"
        "USER: <image>\n<image>\nhow many objects are there? ASSISTANT:"
    )
    wanted = []
    for token in tokenizer(text).input_ids:
        wanted += [image] * shown if token == image else [token]
    assert ids.tolist() == wanted


def test_pictures_are_encoded_in_the_order_of_the_prompt(tiny):
    sample = conversation(3)
    pixels = tiny.adapter.encode_samples([sample])["pixel_values"]
    for index, source in enumerate((sample.turns[0].images[0], *sample.images)):
        alone = tiny.adapter.encode(["?"], [[source]])["pixel_values"]
        assert torch.equal(pixels[index], alone[0])


def test_a_padded_batch_of_unequal_conversations_is_its_rows_alone(tmp_path, tiny):
    samples = [
        conversation(),
        Sample("bare", (), "is it red?"),
        Sample("two", (picture(7), picture(8)), "describe the image."),
        Sample("talk without pictures", (picture(9),), "and now?", turns=(Turn("user", "hello"),)),
    ]
    task = Task("own", "exact_match", ("all",), lambda split: samples)
    runs = [
        trace_samples(
            tiny,
            task,
            samples,
            tmp_path / str(size),
            TraceSettings(split="all", max_new_tokens=4, batch_size=size),
        )
        for size in (4, 1)
    ]
    tables = [run.samples().set_index("sample").sort_index() for run in runs]
    for name in ("answer", "system", "vision", "text", "tiles"):
        assert list(tables[0][name]) == list(tables[1][name]), name
    for sample in samples:
        ours, theirs = (run.scores(sample.id) for run in runs)
        for name, scores in ours.items():
            np.testing.assert_allclose(scores, theirs[name], atol=1e-5)
    tiles = parse_tiles(tables[0].loc["talk0", "tiles"])
    assert len(tiles) == 3
    tokens = [int(token) for own in tiles for tile in own for token in tile.tokens().ravel()]
    assert tokens == list(range(tables[0].loc["talk0", "vision"]))
    assert tables[0].loc["bare", "tiles"] == "[]"


# real processors with the embedded model's tokenizer


def processor_of(tiny, name):
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny.model.name_or_path)
    if name == "llava_next":
        cutter = hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 12},
            crop_size={"height": 12, "width": 12},
            image_grid_pinpoints=[[12, 24], [24, 12]],
        )
        return hf.LlavaNextProcessor(
            cutter, tokenizer, patch_size=4, vision_feature_select_strategy="default",
            chat_template=TEMPLATE, num_additional_image_tokens=1,
        )  # fmt: skip
    if name == "idefics3":
        try:
            cutter = hf.Idefics3ImageProcessorPil(
                size={"longest_edge": 96}, max_image_size={"longest_edge": 24}
            )
        except ImportError:
            pytest.skip(f"transformers {hf.__version__} has no processor of Idefics3 without torchvision")
        return hf.Idefics3Processor(cutter, tokenizer, image_seq_len=9, chat_template=TEMPLATE)
    cutter = hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=6)
    return hf.AyaVisionProcessor(
        cutter, tokenizer, patch_size=4, img_size=32, image_token="<image>", downsample_factor=2,
        img_patch_token="<patch>", chat_template=TEMPLATE,
    )  # fmt: skip


@cache
def real_adapter(tiny_path, name):
    tiny = load_model(tiny_path, device="cpu")
    processor = processor_of(tiny, name)
    if name == "aya_vision":
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<patch>"]})
        processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<patch>")
    case = BUILDERS[name]()
    case.model.config.image_token_id = processor.image_token_id
    return adapter_for(case.model, processor)


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "aya_vision"])
def test_layouts_hold_the_tokens_that_the_processor_writes(tiny, name):
    """Conversations with pictures of several shapes: sums that are checked, none given up."""
    adapter = real_adapter("tiny", name)
    sizes = [(90, 40), (40, 90), (60, 60), (33, 71), (200, 50), (61, 17)]
    draws = np.random.default_rng(5)
    samples = [
        Sample(
            str(row),
            tuple(picture(row + n, sizes[draws.integers(len(sizes))]) for n in range(1 + row % 2)),
            "what?",
            turns=(Turn("user", "look", (picture(9, sizes[row]),)), Turn("assistant", "well")),
        )
        for row in range(len(sizes))
    ]
    chats = [sample.messages() for sample in samples]
    encoding = adapter.encode_chats(chats)
    rows = adapter.vision_layout(encoding, chats)
    totals = adapter.vision_mask(encoding["input_ids"]).sum(dim=1).tolist()
    for sample, row, total in zip(samples, rows, totals, strict=True):
        assert len(row) == 1 + len(sample.images)
        patches = [int(token) for own in row for tile in own for token in tile.tokens().ravel()]
        assert len(set(patches)) == len(patches)
        lines = sum(tile.rows for own in row for tile in own if tile.stride > tile.columns)
        assert len(patches) + lines == total


# what is refused


def test_a_processor_without_videos_says_so(tiny):
    film = Sample("film", (), "what happens?", videos=((picture(1), picture(2)),))
    with pytest.raises(UserError, match="processor of 'llava' takes no videos; give the frames as images"):
        tiny.adapter.encode_samples([film])


def test_a_template_that_drops_a_turn_is_refused(tiny):
    """Some templates keep only the last question; the model would never see the others."""
    processor = SimpleNamespace(
        chat_template="x", apply_chat_template=lambda messages, **_: messages[-1]["content"][-1]["text"]
    )
    adapter = adapter_for(tiny.model, processor)
    with pytest.raises(UserError, match="template of 'llava' leaves out the user's message 'what is at"):
        adapter.encode_samples([conversation()])
    bare = adapter_for(tiny.model, SimpleNamespace(chat_template=None))
    with pytest.raises(UserError, match="no chat template, so it takes one prompt"):
        bare.encode_samples([conversation()])


def test_videos_go_to_a_processor_that_has_a_place_for_them(tiny):
    """All frames of all videos, in the order of the prompts, and none sampled away."""
    given = {}

    class Processor:
        chat_template = "x"
        video_processor = object()
        tokenizer = tiny.processor.tokenizer

        def apply_chat_template(self, messages, **options):
            return " ".join(f"<{c['type']}>{c.get('text', '')}" for m in messages for c in m["content"])

        def __call__(self, **inputs):
            given.update(inputs)
            ids = torch.full((2, 3), tiny.model.config.image_token_id)
            return {"input_ids": ids, "video_metadata": ["not a tensor"]}

    frames = [picture(i, (8, 8)) for i in range(5)]
    samples = [
        Sample("a", (frames[0],), "one", videos=(tuple(frames[:2]),)),
        Sample("b", (), "two", videos=(tuple(frames[2:5]),), turns=(Turn("user", "t", (), ((frames[0],),)),)),
    ]
    batch = adapter_for(tiny.model, Processor()).encode_samples(samples)
    assert set(batch) == {"input_ids"}
    assert given["text"] == ["<image> <video> <text>one", "<video> <text>t <video> <text>two"]
    assert [len(video) for video in given["videos"]] == [2, 1, 3]
    assert given["videos"][2][1].tobytes() == frames[3].tobytes()
    assert given["do_sample_frames"] is False
    assert [clip["frames_indices"] for clip in given["video_metadata"]] == [[0, 1], [0], [0, 1, 2]]
    assert {clip["fps"] for clip in given["video_metadata"]} == {2.0}
    assert [len(row) for row in given["images"]] == [1, 0]


FRAME = Image.new("RGB", (8, 8))
SHOWN, FILMED = Message("user", "a", (FRAME,)), Message("user", "b", (), ((FRAME,) * 4,))
SHORT, SPOKEN = Message("user", "c", (), ((FRAME,) * 2,)), Message("assistant", "d")


@pytest.mark.parametrize(
    ("family", "chats", "said"),
    [
        ("glm4v", [[SHOWN], [FILMED]], "a batch of 'glm4v' may have pictures or videos, got both; run such"),
        ("smolvlm", [[SHOWN, SPOKEN, FILMED]], "a prompt of 'smolvlm' may have pictures or videos, got both"),
        (
            "internvl",
            [[FILMED], [SHORT]],
            "of a batch of 'internvl' must have the same number of frames, got 2 and 4",
        ),
        (
            "llava_onevision",
            [[FILMED, SPOKEN, SHORT]],
            "videos of a prompt of 'llava_onevision' must have the same",
        ),
        ("glm4v", [[FILMED], [SHORT, SPOKEN, FILMED]], None),
        ("smolvlm", [[SHOWN], [SHOWN, SPOKEN, SHOWN]], None),
        ("internvl", [[FILMED], [SHOWN, SPOKEN, FILMED]], None),
        ("llava_onevision", [[SHOWN, SPOKEN, FILMED], [SPOKEN]], None),
        ("qwen2_vl", [[SHOWN, SPOKEN, FILMED], [SHORT]], None),
    ],
)
def test_what_a_family_cannot_take_together_is_said(family, chats, said):
    adapter = adapter_for(BUILDERS[family]().model)
    if said is None:
        adapter.check_together(chats)
        return
    with pytest.raises(UserError, match=said):
        adapter.check_together(chats)


def test_labels_of_a_processor_do_not_reach_the_model(tiny):
    """PaliGemma's processor returns them always; the model would compute a loss from them."""

    class Processor:
        chat_template = None
        tokenizer = tiny.processor.tokenizer

        def __call__(self, **inputs):
            ids = torch.ones(1, 3, dtype=torch.long)
            return {"input_ids": ids, "labels": ids, "attention_mask": ids}

    batch = adapter_for(tiny.model, Processor()).encode_samples([Sample("a", (), "one")])
    assert set(batch) == {"input_ids", "attention_mask"}


def test_errors_of_a_processor_are_one_line(tiny):
    class Processor:
        chat_template = None
        tokenizer = tiny.processor.tokenizer

        def __call__(self, **inputs):
            raise ValueError("cannot stack.\nYou can try:\n  1. padding")

    with pytest.raises(UserError, match=r"prompt: cannot stack\. You can try: 1\. padding$"):
        adapter_for(tiny.model, Processor()).encode_samples([Sample("a", (), "one")])


@pytest.mark.parametrize(
    ("cap", "found", "wanted"), [(4.0, "sdpa", "eager"), (4.0, "eager", None), (None, "sdpa", None)]
)
def test_soft_capped_logits_never_run_in_sdpa(cap, found, wanted):
    text = SimpleNamespace(attn_logit_softcapping=cap, _attn_implementation=found)
    asked = []
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda decoder: text), set_attn_implementation=asked.append
    )
    keep_soft_cap(model)
    assert asked == ([{"text_config": wanted}] if wanted else [])


REFUSED = {
    "MllamaConfig": ({}, "cross-attention"),
    "Florence2Config": ({}, "encoder-decoder"),
    "Blip2Config": ({}, "no vision tokens in its prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_do_not_fit_are_refused_in_a_sentence(name):
    options, said = REFUSED[name]
    config = getattr(hf, name)(**options)
    with pytest.raises(UserError, match=said) as caught:
        check_config(config)
    assert f"model type '{config.model_type}'" in str(caught.value)
    assert "; use a " in str(caught.value)


# from a file


@pytest.fixture
def folder(tmp_path):
    for name, seed in (
        ("a.png", 1),
        ("b.png", 2),
        ("film/2.png", 4),
        ("film/1.png", 3),
        ("film/notes.txt", 0),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".png":
            picture(seed, (9, 7)).save(path)
        else:
            path.write_text("not a frame")
    return tmp_path


LINE = {
    "id": "q",
    "turns": [
        {"role": "user", "text": "what is this?", "image": "a.png"},
        {"role": "assistant", "text": "a film"},
    ],
    "videos": ["film", ["b.png", "a.png"]],
    "prompt": "and then?",
}


def test_jsonl_lines_may_have_turns_and_videos(folder):
    path = folder / "mine.jsonl"
    path.write_text(json.dumps(LINE))
    (sample,) = load_task(str(path)).samples("all")
    first, second, last = sample.messages()
    assert (first.role, first.text, second.role, second.text) == (
        "user",
        "what is this?",
        "assistant",
        "a film",
    )
    assert (last.role, last.text) == ("user", "and then?")
    seeds = [[1], [], [3, 4, 2, 1]]
    for message, wanted in zip((first, second, last), seeds, strict=True):
        assert [p.tobytes() for p in message.pictures()] == [picture(s, (9, 7)).tobytes() for s in wanted]
    assert [len(video) for video in last.videos] == [2, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"turns": "x"}, "turns must be a list of messages"),
        ({"turns": [{"role": "system", "text": "x"}]}, r"turns\[0\]: role must be user or assistant"),
        ({"turns": [{"role": "user"}]}, r"turns\[0\]: text is missing"),
        ({"turns": ["x"]}, r"turns\[0\] must be an object"),
        ({"turns": [{"role": "user", "text": "x", "images": "a.png"}]}, r"turns\[0\]: images must be a list"),
        ({"videos": "film"}, "videos must be a list of folders"),
        ({"videos": [3]}, "videos must be a list of folders"),
        ({"videos": ["gone"]}, "video .*gone does not exist"),
        ({"turns": [{"role": "user", "text": "x", "image": "gone.png"}]}, "image .*gone.png does not exist"),
        ({"turns": [], "videos": []}, "must have either image"),
    ],
)
def test_jsonl_turns_that_are_wrong_name_line_and_field(folder, change, said):
    path = folder / "mine.jsonl"
    path.write_text(json.dumps(LINE | change))
    with pytest.raises(UserError, match=said) as caught:
        load_task(str(path)).samples("all")
    assert str(caught.value).startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("video", "said"),
    [
        ("clip.mp4", "is a file, which avlprof does not decode.*ffmpeg -i clip.mp4"),
        ("empty", "has no frames"),
    ],
)
def test_videos_that_are_no_folder_of_frames(tmp_path, video, said):
    (tmp_path / "clip.mp4").write_bytes(b"film")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        Sample("s", (), "?", videos=(tmp_path / video,)).messages()


def test_pictures_of_a_conversation_are_found_again_in_the_order_of_its_tiles(folder):
    path = folder / "mine.jsonl"
    path.write_text(json.dumps(LINE))
    task = load_task(str(path))
    samples = task.samples("all")
    run = SimpleNamespace(
        path=folder, samples=lambda: samples, meta=SimpleNamespace(task=str(path), split="all")
    )
    wanted = [p.tobytes() for message in samples[0].messages() for p in message.pictures()]
    by_task = find_pictures(run, "q", task)
    save_pictures(folder, samples)
    assert (folder / "pictures.jsonl").is_file()
    by_note = find_pictures(run, "q")
    assert [p.tobytes() for p in by_task] == [p.tobytes() for p in by_note] == wanted


def test_messages_do_not_open_what_is_not_asked_for(tmp_path):
    sample = Sample("s", (tmp_path / "gone.png",), "?")
    assert sample.conversation()[-1].images == (tmp_path / "gone.png",)
    with pytest.raises(UserError, match=r"image .*gone\.png of sample 's' does not exist"):
        sample.messages()
    assert Message("user", "?").pictures() == []


def test_what_was_asked_tells_conversations_apart():
    bare = Sample("a", (), "and now?")
    earlier = Sample("a", (), "and now?", turns=(Turn("user", "first"), Turn("assistant", "yes")))
    other = Sample("a", (), "and now?", turns=(Turn("user", "first"), Turn("assistant", "no")))
    assert bare.asked == "and now?"
    assert len({bare.asked, earlier.asked, other.asked}) == 3
