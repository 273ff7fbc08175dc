"""What the page of `avlprof explore` holds: maps, words, sets of a policy; nothing of it is markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import avlprof
from avlprof.analysis.lens import Lens
from avlprof.analysis.naming import SampleLens
from avlprof.errors import UserError
from avlprof.explore import Explorer, Side
from avlprof.explore.data import records, sample_words
from avlprof.explore.packing import pack_maps, picture_uri, unpack_maps
from avlprof.explore.states import PARTS, run_under, watched
from avlprof.policy import Policy, PromptShape, find_policy, sizes
from avlprof.run import Run
from avlprof.tracing import RecordOptions, TraceSettings, run_meta
from avlprof.tracing.trace import trace_batch
from tests.cli_runner import invoke, refused
from tests.explore.made import Made, make_run
from tests.synthetic_run import LAYERS, write_run

HOSTILE = (
    "</script><script>document.title='hacked'</script>",
    '"><img src=x onerror="document.title=1">',
    "<!--<script>",
    "{{data}}{{script}}",
    "a\u2028b\u2029c",
    "half \ud83d",
    "\x00\x1b[31mred",
)


class Page(HTMLParser):
    """Elements of a page, and the text of its data element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.data, self._in_data = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_data = tag == "script" and dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, data):
        if self._in_data:
            self.data += data


def data_of(text):
    return json.loads(Page(text).data)


def numbers(text, kind):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=kind)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")
    samples = [Made("one"), Made("two", tiles=[], sizes=()), Made("three", [], 0, sizes=())]
    return make_run(folder / "run", samples)


# --- maps


@pytest.mark.parametrize("shape", [(3, 4, 25), (2, 1, 1), (5, 0), (0, 4, 7)])
def test_maps_survive_packing_to_a_hundredth_of_a_root(shape):
    maps = np.random.default_rng(1).dirichlet(np.full(max(shape[-1], 1), 0.2), shape[:-1])[..., : shape[-1]]
    found = unpack_maps(pack_maps(maps))
    assert found.shape == shape
    peaks = maps.max(axis=-1, initial=0.0, keepdims=True)
    assert (np.abs(np.sqrt(found) - np.sqrt(maps)) <= np.sqrt(peaks) / 94 + 1e-6).all()
    np.testing.assert_allclose(found.max(axis=-1, initial=0.0), peaks[..., 0], rtol=1e-6)


def test_what_is_no_share_is_nothing():
    maps = np.array([[np.nan, np.inf, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(unpack_maps(pack_maps(maps)), [[0, 0, 0, 0.5], [0, 0, 0, 0]])


@pytest.mark.parametrize("draw", ["exponential", "lognormal"])
def test_sixteen_long_samples_stay_below_15_mb(draw):
    """30 layers, 60 words, 600 tokens: the text of one sample times 16, of noise, which packs worst."""
    weights = getattr(np.random.default_rng(2), draw)(size=(60, 30, 600))
    packed = pack_maps(weights / weights.sum(axis=-1, keepdims=True))
    assert 16 * sum(len(packed[name]) for name in ("peaks", "levels")) < 14.9e6


def test_pictures_are_as_small_as_a_screen_needs():
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    uri = picture_uri(Image.fromarray(noise))
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 1e6
    assert picture_uri(Image.new("L", (50, 20))).startswith("data:image/png;base64,")


# --- words


def test_a_words_map_is_the_mean_of_its_rows(run):
    """Question words by their own rows, answer words by those that write them, first the prompt's last."""
    data = data_of(run.explore().html())
    scores, side = run.scores("one"), data["samples"][0]["sides"][0]
    texts = [(word["text"], word["kind"]) for word in side["words"]]
    assert texts == [
        *((text, "question") for text in ("what", "is", "this?", ":")),
        ("last prompt token", "last"),
        *((text, "answer") for text in ("a", "red", "triangle", "on", "white")),
    ]
    asked, behind = scores["text"], [scores["last"], *scores["decode"]]
    rows = [[asked[0]], [asked[1]], [asked[2], asked[3]], [asked[4]], [behind[0]]]
    rows += [[behind[0]], [behind[1]], [behind[2], behind[3]], [behind[4]], [behind[5]]]
    found, sums = unpack_maps(side["maps"]), numbers(side["sums"], "<f4").reshape(-1, LAYERS)
    for word, own in enumerate(rows):
        want = sum(own) / len(own)
        peak = want.max(axis=-1, keepdims=True)
        assert (np.abs(np.sqrt(found[word]) - np.sqrt(want)) <= np.sqrt(peak) / 94 + 1e-6).all(), word
        np.testing.assert_allclose(sums[word], want.sum(axis=-1), rtol=1e-5)
    heads = unpack_maps(side["heads"])
    want = (scores["decode_heads"][1] + scores["decode_heads"][2]) / 2
    peak = want.max(axis=-1, keepdims=True)
    assert (np.abs(np.sqrt(heads[7]) - np.sqrt(want)) <= np.sqrt(peak) / 94 + 1e-6).all()


def test_without_text_rows_the_question_is_one_entry(tmp_path):
    run = make_run(tmp_path / "run", [Made("one")], text=False, per_head=False)
    side = run.explore().data["samples"][0]["sides"][0]
    assert [word["kind"] for word in side["words"]] == ["question", "last", *["answer"] * 5]
    want = run.scores("one")["instruction"].sum(axis=-1)
    np.testing.assert_allclose(numbers(side["sums"], "<f4")[:LAYERS], want, rtol=1e-5)
    assert side["heads"] is None


def test_runs_that_noted_no_tokens_number_their_words(tmp_path):
    write_run(tmp_path / "run", (9, 4), decode=True)
    run = Run.open(tmp_path / "run")
    (record,) = records(run.directory, ["s1"]).values()
    words = sample_words(record)
    assert [word.text for word in words][:4] == ["question", "last prompt token", "[1]", "[2]"]
    data = run.explore(1).data
    assert data["samples"][0]["sides"][0]["placed"] is False
    assert "pictures are missing" in data["samples"][0]["note"]


def test_where_attention_goes_adds_up(run):
    side = run.explore().data["samples"][0]["sides"][0]
    stats = run.stats()
    for kind in ("last", "generated"):
        table = np.array(side["masses"][kind])
        np.testing.assert_allclose(table.sum(axis=1), 1.0, atol=1e-3)
        own = stats[(stats["sample"] == "one") & (stats["query"] == kind)].sort_values("layer")
        np.testing.assert_allclose(table[:, 2], own["mass_vision"], atol=1e-4)
        np.testing.assert_allclose(table[:, 0] + table[:, 1], own["mass_system"], atol=1e-4)


def test_unplaced_tokens_stand_in_their_order(run):
    sides = [sample["sides"][0] for sample in run.explore().data["samples"]]
    assert sides[0]["tiles"][0][0] == [0, 3, 4, 5, 0.0, 0.0, 1.0, 1.0]
    assert sides[1]["placed"] is False and sides[1]["tiles"] == [[[0, 5, 5, 5, 0.0, 0.0, 1.0, 1.0]]]
    assert sides[2]["tiles"] == []


@pytest.mark.parametrize("vision", [1, 2, 7, 50])
def test_every_unplaced_token_has_a_place_of_its_own(tmp_path, vision):
    run = make_run(tmp_path / "run", [Made("one", [], vision, sizes=())])
    tiles = run.explore().data["samples"][0]["sides"][0]["tiles"][0]
    tokens = [first + r * stride + c for first, rows, columns, stride, *_ in tiles
              for r in range(rows) for c in range(columns)]  # fmt: skip
    assert tokens == list(range(vision))


def test_heads_are_bounded(run):
    whole = run.explore(2)
    assert all(sample["sides"][0]["heads"] for sample in whole.data["samples"])
    side = Side("dense", run.meta, records(run.directory, ["one", "two"]))
    short = Explorer.of([side], ["one", "two"], lambda sample: [], heads_bytes=1)
    assert [bool(sample["sides"][0]["heads"]) for sample in short.data["samples"]] == [True, False]
    first = len(whole.data["samples"][0]["sides"][0]["heads"]["levels"])
    short = Explorer.of([side], ["one", "two"], lambda sample: [], heads_bytes=first + 10)
    assert [bool(sample["sides"][0]["heads"]) for sample in short.data["samples"]] == [True, False]


# --- a policy


def policies():
    yield "a-vl", find_policy("a-vl")
    yield "heads", Policy(name="h", vision_keep=0.4, vision_compute=0.15, refresh_interval=3, heads="kv_head")
    score = {"refresh": "score_only", "refresh_interval": 2}
    yield "score only", Policy(name="s", vision_keep=[0.3] * 6, vision_compute=[0.1] * 6, **score)
    shares = {"vision_keep": [0.3] * 6, "vision_compute": [0.1] * 6}
    asked = {"refresh": "triggered", "refresh_interval": 1, "refresh_margin": 0.2}
    yield "triggered", Policy(name="t", **shares, **asked)
    yield "led", Policy(name="l", **shares, **score, refresh_layers=(0, 3))
    yield "h2o", find_policy("h2o")


@pytest.mark.parametrize(("name", "policy"), list(policies()), ids=[name for name, _ in policies()])
def test_sets_are_what_the_recorder_saw_read(tiny, name, policy):
    """A step gives attention to the tokens of its sets and to no other, in every layer."""
    task = avlprof.load_task("shapes:describe")
    (sample,) = task.samples("search", 1)
    meta = run_meta(tiny, task, TraceSettings(max_new_tokens=12))
    record, states = run_under(tiny, [sample], policy, meta)[sample.id]
    decode, packed = record.scores["decode"], states.packed()
    sets = numbers(packed["data"], np.uint8).reshape(packed["shape"])
    assert len(packed["rows"]) == len(decode) + 1
    missed = total = 0
    for row in range(1, len(decode) + 1):
        kept, core = sets[packed["rows"][row]] >> 4, sets[packed["rows"][row]] & 15
        read = (kept if row in packed["refreshes"] else core) > 0
        seen = decode[row - 1] > 0
        assert (seen <= read).all(), (name, row)
        missed += int((read & ~seen).sum())  # weights of this model can be 0 in fp32
        total += int(read.sum())
        assert (core <= kept).all() and (kept <= PARTS).all()
    assert missed < 0.02 * total
    if policy.joint is None and policy.heads == "shared":
        shape = PromptShape(*(int(record.row[kind]) for kind in ("system", "vision", "text")))
        for layer, size in enumerate(sizes(policy, shape, 6)):
            assert all((own[layer] >> 4 > 0).sum() == size.vision for own in sets)
            assert all((own[layer] & 15 > 0).sum() == size.core for own in sets)
        assert bool(packed["refreshes"]) == (policy.refresh == "full") and len(sets) > 1


def test_a_dense_policy_drops_nothing(tiny):
    task = avlprof.load_task("shapes")
    (sample,) = task.samples("search", 1)
    with watched(tiny, Policy(name="all")) as states:
        trace_batch(tiny, [sample], 4, RecordOptions())
    assert (np.stack(states.sets) == 255).all() and not states.refreshes


@pytest.mark.full  # traces, and generates under a policy
def test_the_whole_way_from_the_command_line(tmp_path, tiny, monkeypatch):
    run = avlprof.trace(tiny, "shapes:row", 2, TraceSettings(record=RecordOptions(text_rows=True)),
                        out=tmp_path / "run")  # fmt: skip
    done = invoke("explore", run.path, "--policy", "a-vl", "-o", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    data = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [side["label"] for side in data["sides"]] == ["dense", "a-vl"]
    assert all(sample["sides"][1]["states"] for sample in data["samples"])
    assert all(sample["pictures"] for sample in data["samples"])
    done = invoke("explore", run.path, "--against", run.path, "-n", "1")
    assert done.exit_code == 0, done.output
    data = data_of((run.path / "explore.html").read_text(encoding="utf-8"))
    assert [side["label"] for side in data["sides"]] == ["tiny, dense (this run)", "tiny, dense (the other)"]
    assert len(data["samples"]) == 1
    ids = run.directory.ids()
    assert run.explore(ids[1]).data["samples"][0]["id"] == ids[1]


@pytest.mark.full  # generates under a policy
def test_own_pictures_are_run_under_a_policy(tmp_path, tiny):
    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "mine.png")
    task = avlprof.picture_task(tmp_path / "mine.png", "describe the image.")
    run = avlprof.trace(tiny, task, 1, TraceSettings(max_new_tokens=4), out=tmp_path / "run")
    page = run.explore(policy=find_policy("prefixkv"), loaded=tiny)  # whose allocator asks for a profile
    assert page.data["samples"][0]["sides"][1]["states"]["rows"]


# --- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": ["none"]}, "sample 'none' is not in run"),
        ({"samples": []}, "needs a sample"),
        ({"policy": Policy(name="p")}, "give loaded"),
    ],
)
def test_refusals(run, options, said):
    with pytest.raises(UserError, match=said):
        run.explore(**options)


def test_one_thing_beside_a_run(run):
    with pytest.raises(UserError, match="leave one out"):
        run.explore(against=run, policy=Policy(name="p"))


def test_a_missing_run_is_named(tmp_path):
    assert "not a run directory" in refused(invoke("explore", tmp_path / "none"))
    assert "unknown policy" in refused(invoke("explore", tmp_path, "--policy", "nonsense"))


@pytest.mark.parametrize(
    "tile",
    ["[0,1000000000,1000000000,1000000000,0,0,1,1]", "[0,3,4,5,0,0,NaN,1]", "[20,2,5,5,0,0,1,1]",
     "[0,0,4,4,0,0,1,1]", "[0,2,2,2,1,0,0,1]", "[-1,2,2,2,0,0,1,1]", "[0,2.5,2,2,0,0,1,1]",
     "[0,3,4,1,0,0,1,1]"],
)  # fmt: skip
def test_tiles_that_are_none_are_refused_at_once(tmp_path, tile):
    run = make_run(tmp_path / "run", [Made("one")])
    (path,) = (tmp_path / "run").glob("samples-*.parquet")
    table = pq.read_table(path)
    index = table.schema.get_field_index("tiles")
    pq.write_table(table.set_column(index, "tiles", pa.array([f"[[{tile}]]"])), path)
    with pytest.raises(UserError, match="tiles"):
        Run.open(run.path).explore()


def test_scores_of_another_shape_are_refused(tmp_path):
    run = make_run(tmp_path / "run", [Made("one")])
    meta = tmp_path / "run" / "meta.json"
    meta.write_text(meta.read_text().replace('"layers": 4', '"layers": 1000000000'))
    with pytest.raises(UserError, match="must be \\[1000000000, 25\\] a row, got \\[4, 25\\]"):
        Run.open(run.path).explore()


def test_text_that_is_no_utf8_is_refused(tmp_path):
    run = make_run(tmp_path / "run", [Made("one")])
    (path,) = (tmp_path / "run").glob("samples-*.parquet")
    table = pq.read_table(path)
    broken = pa.array([b"\xff\xfe\x80"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("answer"), "answer", broken), path)
    with pytest.raises(UserError, match="cannot be read"):
        Run.open(run.path).explore()


# --- the page


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_a_foreign_run_become_no_markup(tmp_path, text):
    """Element for element the page of a harmless run, and the texts come out of its data as they went in."""
    stored = text.encode("utf-8", "backslashreplace").decode()
    made = [Made(text, question=(f"Ġ{stored}",), answer=(f"Ġ{stored}", "Ġb"), prompt=stored, said=stored,
                 references=(stored,))] if text == stored else [Made("s", prompt=stored)]  # fmt: skip
    run = make_run(tmp_path / "run", made, model=stored, task=stored)
    page = run.explore().html()
    harmless = make_run(tmp_path / "plain", [Made("plain")]).explore().html()
    assert [tag for tag, _ in Page(page).tags] == [tag for tag, _ in Page(harmless).tags]
    data = data_of(page)
    assert data["samples"][0]["prompt"] == stored and data["sides"][0]["model"] == stored
    body = page.split('id="data">')[1].split("</script>")[0]
    assert "<" not in body and ">" not in body and body.isascii()


def test_the_policy_of_the_page_lets_its_own_script_run_alone(run):
    page = run.explore().html()
    (rule,) = (attrs["content"] for tag, attrs in Page(page).tags if attrs.get("http-equiv"))
    assert "default-src 'none'" in rule and "unsafe" not in rule and "connect-src" not in rule
    script = re.search(r"</script>\n<script>(.*)</script>\n</body>", page, re.DOTALL)[1]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    for name, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in rule
    assert not re.search(r"https?://|src=\"(?!data:)|href=|import\(|innerHTML|eval\(", page)


def test_a_notebook_shows_it_in_a_frame_of_its_own(run):
    shown = run.explore(1)._repr_html_()
    ((tag, attrs),) = Page(shown).tags
    assert tag == "iframe" and attrs["sandbox"] == "allow-scripts"
    assert attrs["srcdoc"] == run.explore(1).html()
    assert html.escape("<script>") in shown and "<script>" not in shown


def test_the_same_run_gives_the_same_page(run, tmp_path):
    path = run.explore().save(tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == run.explore().html()


# --- what patches say


def spoken(run, name, words, seed=0, model="random", layers=(0, 2)):
    """A lens of random words over one sample of a run."""
    row = run.samples().set_index("sample").loc[name]
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(words), (len(layers), int(row["vision"]), 4)).astype(np.int32)
    shares = np.sort(rng.uniform(0.0, 1.0, ids.shape))[..., ::-1].astype(np.float32)
    one = SampleLens(name, "what?", (), str(row["tiles"]), ids, shares)
    return Lens({"model": model, "model_hash": "h1", "layers": list(layers)}, (one,), dict(enumerate(words)))


def test_words_of_patches_are_in_the_page(tmp_path):
    run = make_run(tmp_path / "run", [Made("a"), Made("b")])
    words = [*HOSTILE, " star", "moon"]
    lens = spoken(run, "a", words)
    page = run.explore(lens=lens)
    first, second = page.data["samples"]
    assert second["sides"][0]["says"] is None
    says = first["sides"][0]["says"]
    ids = np.frombuffer(zlib.decompress(base64.b64decode(says["ids"])), "<u2").reshape(says["shape"])
    shares = np.frombuffer(zlib.decompress(base64.b64decode(says["shares"])), np.uint8).reshape(says["shape"])
    one = lens.samples[0]
    assert says["shape"] == [2, 25, 3] and says["layers"] == [0, 2]
    for place in np.ndindex(*ids.shape):
        assert says["words"][ids[place]] == words[one.ids[place]].strip().replace("\ud83d", "\\ud83d")
        assert shares[place] / 255 == pytest.approx(one.shares[place], abs=0.003)
    shown = Page(page.html())
    assert json.loads(shown.data)["samples"][0]["sides"][0]["says"]["words"] == says["words"]
    assert [tag for tag, _ in shown.tags if tag in ("script", "img")] == ["script", "script"]


def test_a_lens_of_something_else_is_refused(tmp_path):
    run = make_run(tmp_path / "run", [Made("a")])
    with pytest.raises(UserError, match=r"the lens is of other h1, run .* was traced on random h1"):
        run.explore(lens=spoken(run, "a", ["x"], model="other"))
    lens = spoken(run, "a", ["x"])
    short = replace(lens.samples[0], ids=lens.samples[0].ids[:, :3], shares=lens.samples[0].shares[:, :3])
    with pytest.raises(UserError, match="read 3 vision tokens of sample 'a', the run has 25"):
        run.explore(lens=replace(lens, samples=(short,)))
    with pytest.raises(UserError, match="holds no lens"):
        run.explore(lens=tmp_path)
