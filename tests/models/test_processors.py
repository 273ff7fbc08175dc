"""The real processors of every family: from a conversation with pictures and film to a traced run.

They need torchvision, which a plain installation lacks; without it this file is skipped. Weights
are random, pixels and prompts are not: what a processor writes must be what the family's model
makes of its pixels, and where `vision_layout` says that a token lies, the picture must be.
"""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers.utils import is_num2words_available, is_torchvision_available

import avlprof
from avlprof.attention.modality import Modality, modality_map
from avlprof.errors import UserError
from avlprof.models import adapter_for, load_model
from avlprof.models.load import LoadedModel
from avlprof.models.tiles import parse_tiles
from avlprof.policy import Policy
from avlprof.run import find_pictures, save_pictures
from avlprof.tasks import Message, load_task
from avlprof.testing.adapters import ProcessorConformance, decoder_inputs, image_features
from avlprof.testing.families import families
from avlprof.testing.models import cases
from avlprof.tracing.options import TraceSettings
from avlprof.tracing.trace import trace_samples
from tests.real_processors import FINE, REAL
from tests.spots import areas, flat, silence_tower, spotted

if not is_torchvision_available():
    pytest.skip("processors with a place for videos need torchvision", allow_module_level=True)

BUILDERS = {**dict(cases()), **dict(families())}
OLD = Version(transformers.__version__) < Version("5.24")  # 5.17 was run, and those between not
SMOLVLM = is_num2words_available() and not OLD
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "smolvlm" and not is_num2words_available(), reason="SmolVLM's processor needs num2words"
        ),
    )
    for name in REAL
]
FILMS = [
    pytest.param(
        *param.values,
        marks=(*param.marks, pytest.mark.skipif(OLD, reason="SmolVLM's processor counts frames as videos"))
        if param.values[0] == "smolvlm"
        else (),
    )
    for param in NAMES
    if REAL[param.values[0]].films
]
TURNS = [param for param in NAMES if not param.values[0].startswith("paligemma")]


@cache
def built(name, silent=False):
    """The family's random model with its processor; `silent` stills the attention of the vision tower."""
    case = BUILDERS[REAL[name].model]()
    if name.startswith("llava_"):
        case.model.config.image_grid_pinpoints = FINE
    if silent:
        silence_tower(case.model)
    return adapter_for(case.model, REAL[name].processor())


def picture(seed, size=(64, 40)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def film(frames, seed=20, size=(40, 32)):
    return tuple(picture(seed + frame, size) for frame in range(frames))


def user(text, images=(), videos=()):
    return Message("user", text, tuple(images), tuple(videos))


SEEN = {
    "one": [[user("what is it?", [picture(1)])]],
    "several": [[user("what are these?", [picture(1), picture(2, (50, 90)), picture(3)])]],
    "a batch": [
        [user("what is it?", [picture(1)])],
        [user("and what are these in turn?", [picture(2, (50, 90)), picture(3, (33, 61))])],
    ],
}
SPOKEN = {
    "in the middle": [
        [
            user("what is the first one?", [picture(1)]),
            Message("assistant", "some dots."),
            user("and now?", [picture(2, (50, 90)), picture(3)]),
        ]
    ],
    "late": [[user("hello"), Message("assistant", "good day."), user("and this?", [picture(2, (50, 90))])]],
}
FILMED = {
    "a film": [[user("what?", videos=[film(4)])]],
    "an odd number of frames": [[user("what?", videos=[film(5)])]],
    "one frame": [[user("what?", videos=[film(1)])]],
    "two films": [[user("which?", videos=[film(4), film(4, 30, (32, 56))])]],
    "with a row without": [[user("what?", videos=[film(4)])], [user("just words, and many of them")]],
    "in an earlier turn": [
        [user("what?", videos=[film(4)]), Message("assistant", "noise."), user("and?", videos=[film(4, 40)])]
    ],
}
BOTH = {
    "beside a picture": [[user("what?", [picture(1)], [film(4)]), Message("assistant", "a."), user("and?")]],
    "in several rows": [
        [user("what?", videos=[film(4)])],
        [user("what now?", [picture(1)])],
        [user("and?", [picture(2, (50, 90))], [film(4, 30)])],
    ],
}


def letters(adapter, ids):
    """What a row of ids says, one character for each vision token."""
    vision = set(adapter.vision_token_ids)
    tokens = adapter.processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    return "".join("\0" if int(i) in vision else token for i, token in zip(ids, tokens, strict=True))


def check_encoding(adapter, chats):
    """One batch of conversations: counts, order, modalities, layouts, and the model at work."""
    batch = adapter.encode_chats(chats)
    assert "labels" not in batch
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    vision = adapter.vision_mask(ids)
    assert mask[:, -1].all()
    assert not (vision & ~mask).any()
    codes = modality_map(ids, batch["attention_mask"], adapter.vision_token_ids)
    for row, (chat, shown) in enumerate(zip(chats, mask, strict=True)):
        said = letters(adapter, ids[row][shown])
        parts = []
        for message in chat:
            parts += [r"\0[^\0]*"] * bool(message.pictures()) + [re.escape(message.text)]
        assert re.search(".*".join(parts), said, re.DOTALL), said
        first = said.replace("\0", "*", 1).find("*") if "\0" in said else None
        seen = False
        for token, code in zip(ids[row][shown].tolist(), codes[row][shown].tolist(), strict=True):
            is_vision = token in adapter.vision_token_ids
            seen |= is_vision
            wanted = Modality.VISION if is_vision else Modality.TEXT if seen else Modality.SYSTEM
            assert code == wanted
        assert (first is not None) == seen == any(message.pictures() for message in chat)
    layouts = adapter.vision_layout(batch, chats)
    for chat, row, total in zip(chats, layouts, vision.sum(dim=1).tolist(), strict=True):
        assert len(row) == sum(len(message.pictures()) for message in chat)
        tokens = [int(token) for own in row for tile in own for token in tile.tokens().ravel()]
        newlines = total - len(tokens)
        assert len(set(tokens)) == len(tokens)
        assert set(tokens) <= set(range(total))
        assert 0 <= newlines <= (total // 4 if "newline" in str(dir(adapter.model.model)) else 0)
    with torch.no_grad():
        logits = adapter.model(**batch).logits  # refused by the model if counts and pixels differ
    out = adapter.model.generate(**batch, max_new_tokens=3, suppress_tokens=list(adapter.vision_token_ids))
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert torch.isfinite(logits[mask]).all()
    return batch, logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", list(SEEN))
def test_pictures_fit_the_model(name, what):
    check_encoding(built(name), SEEN[what])


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("what", list(SPOKEN))
def test_pictures_of_earlier_turns_fit_the_model(name, what):
    check_encoding(built(name), SPOKEN[what])


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("what", list(FILMED))
def test_films_fit_the_model(name, what):
    if what == "one frame" and name in ("qwen3_vl", "glm4v"):
        with pytest.raises(UserError, match="cannot encode this prompt: t:1 must be larger"):
            built(name).encode_chats(FILMED[what])
        return
    batch, _ = check_encoding(built(name), FILMED[what])
    assert int(built(name).vision_mask(batch["input_ids"])[0].sum()) > 0


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("what", list(BOTH))
def test_films_beside_pictures_fit_the_model_or_are_refused(name, what):
    if REAL[name].together:
        check_encoding(built(name), BOTH[what])
        return
    with pytest.raises(UserError, match="may have pictures or videos, got both"):
        built(name).encode_chats(BOTH[what])


@pytest.mark.parametrize("name", FILMS)
def test_films_of_unequal_length_fit_the_model_or_are_refused(name):
    chats = [[user("what?", videos=[film(4)])], [user("and what?", videos=[film(2, 30)])]]
    if name in ("llava_onevision", "internvl"):
        with pytest.raises(UserError, match="must have the same number of frames, got 2 and 4"):
            built(name).encode_chats(chats)
        return
    check_encoding(built(name), chats)


@pytest.mark.parametrize("name", FILMS)
def test_a_row_of_a_batch_is_the_row_alone(name):
    adapter = built(name)
    chats = [[user("what?", videos=[film(4)])], [user("and what is here?", videos=[film(4, 30)])]]
    batch, together = check_encoding(adapter, chats)
    for row, chat in enumerate(chats):
        alone, logits = check_encoding(adapter, [chat])
        shown = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][shown], alone["input_ids"][0])
        torch.testing.assert_close(together[row][shown], logits[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FILMS)
def test_frames_of_a_film_that_differ_in_size_are_one_sentence(name):
    chats = [[user("what?", videos=[(picture(1, (40, 32)), picture(2, (48, 32)))])]]
    with pytest.raises(UserError, match="cannot encode this prompt") as caught:
        built(name).encode_chats(chats)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_loads_with_its_processor(name, tmp_path):
    """What `save_pretrained` of model and processor write is a model that may be asked for."""
    adapter = built(name)
    adapter.model.save_pretrained(tmp_path)
    adapter.processor.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu", dtype="float32")
    chats = SEEN["a batch"]
    if REAL[name].films and (name != "smolvlm" or SMOLVLM):
        chats = FILMED["with a row without"]
    batch, logits = check_encoding(loaded.adapter, chats)
    before, wanted = check_encoding(adapter, chats)
    assert torch.equal(batch["input_ids"], before["input_ids"])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert type(loaded.adapter) is type(adapter)


# when a frame was seen


def test_frames_are_half_a_second_apart():
    """Left to themselves, processors put 24 frames into a second."""
    chats = [[user("what?", videos=[film(6)])]]
    said = {
        name: letters(built(name), built(name).encode_chats(chats)["input_ids"][0])
        for name in ("qwen3_vl", "glm4v", *(["smolvlm"] if SMOLVLM else []))
    }
    assert re.findall(r"(\d\.\d) seconds", said["qwen3_vl"]) == ["0.2", "1.2", "2.2"]
    assert re.findall(r"<\|end_of_image\|>(\d)", said["glm4v"]) == ["0", "1", "2"]
    if "smolvlm" in said:
        assert re.findall(r"Frame from 00:(\d\d)", said["smolvlm"]) == ["00", "00", "01", "01", "02", "02"]
        assert "six frames from a 0:00:03" in said["smolvlm"]


def test_times_of_a_film_are_places_on_the_axis_of_time():
    """Qwen2.5-VL: a second is `tokens_per_second` places; at 24 frames a second all were at one."""
    adapter = built("qwen2_5_vl")
    chats = [[user("what?", videos=[film(6)])]]
    batch = adapter.encode_chats(chats)
    assert batch["second_per_grid_ts"].tolist() == [1.0]
    caught = []
    handle = adapter.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        adapter.model(**batch)
    handle.remove()
    times = caught[0][-3][adapter.vision_mask(batch["input_ids"])]
    each = len(times) // 3
    second = int(adapter.model.config.vision_config.tokens_per_second)
    assert (times.view(3, each) - times[0]).tolist() == [[at * second] * each for at in range(3)]


# where vision tokens lie


def embedded(adapter, chats):
    """Embeddings of the vision tokens of the first row, and their layout."""
    batch = adapter.encode_chats(chats)
    found = decoder_inputs(adapter.model, adapter, batch)[0][adapter.vision_mask(batch["input_ids"])[0]]
    return found, adapter.vision_layout(batch, chats)[0]


def check_spot(moved, own, box, reach=0.5):
    """Tokens of these tiles light up inside the box (shares of the picture), and not far from it."""
    lit = dark = 0
    for tile in own:
        wide = reach * (tile.box[2] - tile.box[0]) / tile.columns
        tall = reach * (tile.box[3] - tile.box[1]) / tile.rows
        for index, (left, top, right, bottom) in areas(tile):
            along = min(right, box[2]) - max(left, box[0])
            down = min(bottom, box[3]) - max(top, box[1])
            if along > 0.5 * (right - left) and down > 0.5 * (bottom - top):
                lit += 1
                assert moved[index], (tile, index, box)
            beside = left > box[2] + wide or right < box[0] - wide
            if beside or top > box[3] + tall or bottom < box[1] - tall:
                dark += 1
                assert not moved[index], (tile, index, box)
    return lit, dark


def drawn_box(draws, size, least=0.15):
    """A box of at least 8 pixels a side, in pixels and in shares of the picture."""
    while True:
        half = draws.uniform(least, 0.4, 2) * size
        middle = draws.uniform(0, 1, 2) * size
        low, high = (np.clip(edge, 0, size).round().astype(int) for edge in (middle - half, middle + half))
        if (high - low).min() >= 8:
            return (*low, *high), (low[0] / size[0], low[1] / size[1], high[0] / size[0], high[1] / size[1])


@pytest.mark.parametrize("name", NAMES)
def test_bright_spots_in_pictures_light_up_the_tokens_that_lie_there(name):
    """In the second of two pictures, and in a picture alone."""
    adapter, draws = built(name, silent=True), np.random.default_rng(5)
    lit = dark = 0
    for others in ([], [picture(1, (61, 47))]):
        for size in ((64, 40), (50, 90)):
            base, layout = embedded(adapter, [[user("what?", [*others, flat(size)])]])
            for _ in range(6):
                pixels, box = drawn_box(draws, size)
                now, _ = embedded(adapter, [[user("what?", [*others, spotted(size, pixels)])]])
                moved = (now - base).abs().amax(dim=-1) > 1e-4
                for own in layout[:-1]:
                    assert not any(moved[token] for tile in own for token in tile.tokens().ravel())
                found = check_spot(moved, layout[-1], box)
                lit, dark = lit + found[0], dark + found[1]
    assert lit > 10
    assert dark > 20


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("frames", [4, 5])
def test_bright_spots_in_frames_light_up_the_tokens_of_that_time(name, frames):
    """Two frames may share their tokens, which the first of them holds."""
    adapter, draws, size = built(name, silent=True), np.random.default_rng(6), (56, 40)
    still = [flat(size)] * frames
    base, layout = embedded(adapter, [[user("what?", videos=[tuple(still)])]])
    assert len(layout) == frames
    lit = dark = 0
    for frame in range(frames):
        holder = next(at for at in range(frame, -1, -1) if layout[at])
        for _ in range(24 if layout[holder][0].columns == 2 else 6):
            pixels, box = drawn_box(draws, size, least=0.05)
            seen = [*still[:frame], spotted(size, pixels), *still[frame + 1 :]]
            now, _ = embedded(adapter, [[user("what?", videos=[tuple(seen)])]])
            moved = (now - base).abs().amax(dim=-1) > 1e-4
            inside = {int(token) for tile in layout[holder] for token in tile.tokens().ravel()}
            assert set(moved.nonzero()[:, 0].tolist()) <= inside
            found = check_spot(moved, layout[holder], box)
            lit, dark = lit + found[0], dark + found[1]
    assert lit > 10
    assert dark > 20


# a run


@pytest.mark.parametrize("name", FILMS)
def test_a_sample_with_a_film_is_traced_from_file_to_tiles(name, tmp_path):
    adapter = built(name)
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(film(4)):
        frame.save(tmp_path / "clip" / f"{number:05d}.png")
    lines = [
        {"id": "film", "videos": ["clip"], "prompt": "what happens?"},
        {
            "id": "talk",
            "turns": [
                {"role": "user", "text": "see?", "videos": ["clip"]},
                {"role": "assistant", "text": "no"},
            ],
            "prompt": "and now?",
        },
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    task = load_task(str(path))
    samples = task.samples("all")
    loaded = LoadedModel(adapter.model, adapter.processor, name, name, "0", adapter)
    runs = [
        trace_samples(
            loaded,
            task,
            samples,
            tmp_path / f"run{size}",
            TraceSettings(split="all", max_new_tokens=4, batch_size=size),
        )
        for size in (1, 2)
    ]
    save_pictures(runs[0].path, samples)
    tables = [run.samples().set_index("sample").sort_index() for run in runs]
    assert list(tables[0]["tiles"]) == list(tables[1]["tiles"])
    for sample in samples:
        row = tables[0].loc[sample.id]
        tiles = parse_tiles(row["tiles"])
        tokens = [int(token) for own in tiles for tile in own for token in tile.tokens().ravel()]
        assert len(tiles) == len(find_pictures(runs[0], sample.id)) == 4
        assert tokens == list(range(len(tokens)))
        assert row["vision"] - len(tokens) in (0, 1)  # OneVision ends a film in a newline token
        scores = runs[0].scores(sample.id)
        assert scores["last"].shape == (adapter.layers, row["vision"])
        assert scores["decode"].shape == (3, adapter.layers, row["vision"])
        stats = runs[0].stats().query(f"sample == '{sample.id}' and query == 'last'").sort_values("layer")
        np.testing.assert_allclose(scores["last"].sum(axis=-1), stats["mass_vision"], atol=1e-5)
        for kind, found in runs[1].scores(sample.id).items():
            np.testing.assert_allclose(found, scores[kind], atol=1e-4)


@pytest.mark.parametrize("name", FILMS)
def test_films_run_under_a_policy(name):
    adapter = built(name)
    batch = adapter.encode_chats(
        [[user("what?", videos=[film(4)])], [user("and what?", videos=[film(4, 30)])]]
    )
    vision = adapter.vision_mask(batch["input_ids"]).sum(dim=1)
    with avlprof.apply(adapter.model, Policy(vision_keep=0.5)) as runtime:
        adapter.model.generate(**batch, max_new_tokens=4, do_sample=False)
    for row, total in enumerate(vision.tolist()):
        kept, _ = runtime.cache.layers[0].vision_positions(row)
        assert {len(positions) for positions in kept} == {total // 2}


class TestConformance(ProcessorConformance):
    @pytest.fixture(autouse=True, params=NAMES)
    def family(self, request):
        vars(self)["adapter"] = built(request.param)

    def test_vision_tokens_match_the_features(self):
        """OneVision shows several pictures in fewer tokens than one."""
        if self.adapter.family != "llava_onevision":
            super().test_vision_tokens_match_the_features()
            return
        batch = self.adapter.encode(self.prompts, [[self.pictures[0]], list(self.pictures)])
        marked = self.adapter.vision_mask(batch["input_ids"]).sum(dim=1)
        assert int(marked.sum()) == len(image_features(self.adapter.model, batch))
        assert int(marked[0]) > int(marked[1]) > 0
