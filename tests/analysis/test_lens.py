"""What a lens says of samples: scores against plain loops, the truth of embedded pictures, and files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import ImageColor

import avlprof
from avlprof.analysis.intervals import over_samples
from avlprof.analysis.lens import SCHEMA, Lens
from avlprof.analysis.naming import SampleLens, names, sentences
from avlprof.errors import UserError
from avlprof.models.tiles import Tile, dump_tiles, owners
from avlprof.tasks import load_task
from avlprof.tasks.pages.canvas import PAINTS
from avlprof.tasks.sample import Sample
from avlprof.tasks.shapes.scene import COLORS, PATCH_SIZE
from avlprof.tasks.truth import Thing, Truth, truth_of

WORDS = (" red", " star", "blue", "circle", "CAT", "C", "the", "word", " 7", "cat", "answer", "\n")
THINGS = (Thing("red", ("star",)), Thing("blue", ("circle",)), Thing("red", ("word", "CAT")))
LAYERS = (0, 3, 4)
DETAILS = (Tile(0, 4, 6, 7), Tile(28, 2, 3, 3, (-0.1, -0.25, 1.1, 1.25)))
"""Details with a newline behind each row, under a padded thumbnail."""
VISION = 34


def made(count=5, seed=0, things=THINGS, references=(("the answer", "7."), ("a CAT",), ("",))):
    """Random words over a picture whose 8 x 12 cells show random things."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        cells = np.kron(rng.integers(-1, len(things), (4, 6)), np.ones((2, 2), dtype=int)).astype(np.int16)
        ids = rng.integers(0, len(WORDS), (len(LAYERS), VISION, 2)).astype(np.int32)
        shares = np.sort(rng.uniform(0, 0.5, ids.shape))[..., ::-1].astype(np.float32)
        asked, truth = references[index % len(references)], (Truth(cells, things),)
        tiles = dump_tiles([DETAILS])
        samples.append(SampleLens(f"s{index}", "what?", asked, tiles, ids, shares, truth))
    meta = {"schema": SCHEMA, "model": "m", "model_hash": "h", "task": "t", "split": "search"}
    return Lens(meta | {"layers": list(LAYERS), "top": 2}, tuple(samples), dict(enumerate(WORDS)))


def word_of(one, layer, token):
    return WORDS[one.ids[layer, token, 0]].strip().lower()


def test_every_patch_is_held_to_what_fills_it():
    """A patch's place is sampled at 60 x 60 points; where a thing has about half of it, either is right."""
    for one in made().samples:
        place, things = one.things()
        assert things == THINGS
        for tile in DETAILS:
            left, top, right, bottom = tile.box
            for (row, column), token in np.ndenumerate(tile.tokens()):
                y = top + (bottom - top) * (row + (np.arange(60) + 0.5) / 60) / tile.rows
                x = left + (right - left) * (column + (np.arange(60) + 0.5) / 60) / tile.columns
                cells = one.truth[0].cells[(y.clip(0, 0.99) * 8).astype(int)][
                    :, (x.clip(0, 0.99) * 12).astype(int)
                ]
                cells[(y < 0) | (y > 1)], cells[:, (x < 0) | (x > 1)] = -1, -1
                shares = [(cells == thing).mean() for thing in range(3)]
                wanted = int(np.argmax(shares)) if max(shares) >= 0.5 else -1
                assert place[token] == wanted or abs(max(shares) - 0.5) < 0.03
        newlines = [6, 13, 20, 27]
        assert (place[newlines] == -1).all()


def test_scores_are_those_of_plain_loops():
    lens = made()
    table = lens.named().set_index(["sample", "layer", "measure"])
    for one in lens.samples:
        place, _ = one.things()
        present = sorted(set(place[place >= 0]))
        for index, layer in enumerate(LAYERS):
            hits = {measure: [[], []] for measure in ("thing", "color", "object")}
            for token in range(VISION):
                if place[token] < 0:
                    continue
                word = word_of(one, index, token)
                for measure, (own, other) in hits.items():
                    says = {t: right(word, THINGS[t], measure) for t in present}
                    own.append(says[place[token]])
                    other.append(np.mean([hit for t, hit in says.items() if t != place[token]]))
            for measure, (own, other) in hits.items():
                row = table.loc[one.id, layer, measure]
                assert row["own"] == pytest.approx(np.mean(own))
                assert row["other"] == pytest.approx(np.mean(other))


def right(word, thing, measure):
    """As the documentation has it, in plain words for the words of this file."""
    color = word == thing.color
    spelled = {"star": {"star"}, "circle": {"circle"}, "word": {"word"}, "CAT": {"cat", "c"}}
    object_ = any(word in spelled[name] for name in thing.names)
    return {"thing": color or object_, "color": color, "object": object_}[measure]


def test_answers_are_held_to_those_of_other_samples():
    lens = made()
    table = lens.named().query("measure == 'answer'").set_index(["sample", "layer"])
    words_of = ({"the", "answer", "7"}, {"a", "cat"}, set())
    said = {one.id: words_of[int(one.id[1]) % 3] for one in lens.samples}
    asked = [one for one in lens.samples if said[one.id]]
    assert set(table.index.get_level_values(0)) == {one.id for one in asked}
    for one in asked:
        for index, layer in enumerate(LAYERS):
            words = [word_of(one, index, token) for token in range(VISION)]
            rates = {other.id: np.mean([word in said[other.id] for word in words]) for other in asked}
            own = rates.pop(one.id)
            assert table.loc[(one.id, layer), "own"] == pytest.approx(own)
            assert table.loc[(one.id, layer), "other"] == pytest.approx(np.mean(list(rates.values())))


def test_means_over_samples_and_what_is_settled():
    lens = made()
    frame = lens.by_layer().set_index(["measure", "what", "layer"])
    table = lens.named()
    table["difference"] = table["own"] - table["other"]
    wanted = over_samples(table[table["measure"] == "thing"], ["layer"], "difference").set_index("layer")
    for layer in LAYERS:
        for name in ("mean", "low", "high", "n"):
            got = frame.loc[("thing", "difference", layer), name]
            assert got == pytest.approx(wanted.loc[layer, name])
    same = np.mean([(one.ids[0, :, 0] == one.ids[2, :, 0]).mean() for one in lens.samples])
    assert frame.loc[("settled", "own", 0), "mean"] == pytest.approx(same)
    assert frame.loc[("settled", "own", 4), "mean"] == 1.0
    shares = np.mean([one.shares[1, :, 0].mean() for one in lens.samples])
    assert frame.loc[("share", "own", 3), "mean"] == pytest.approx(shares, rel=1e-6)


def planted(layers, samples=6):
    """A lens whose patches name their thing behind some layers, and anything behind the others."""
    lens = made(samples, seed=3, references=((),))
    say = {0: 0, 1: 3, 2: 4}
    for one in lens.samples:
        place, _ = one.things()
        for index in layers:
            one.ids[index, :, 0] = [say.get(thing, 6) for thing in place]
    return lens


def test_patches_that_name_what_they_show_are_found():
    lens = planted([1, 2])
    frame = lens.by_layer().set_index(["measure", "what", "layer"])["mean"]
    assert frame.loc["thing", "own", 3] == frame.loc["thing", "own", 4] == 1.0
    assert frame.loc["thing", "other", 3] < 0.5  # two of the three are red
    (said,) = lens.findings()
    assert said.startswith("Patches name what they show behind layers 3 to 4, most behind layer")
    assert "100.0% of patches" in said
    (said,) = planted([0, 2]).findings()
    assert "behind layers 0 and 4" in said


def test_chance_is_not_taken_for_naming():
    """Of five lenses of noise hardly one is sure of a layer."""
    sure = [not made(8, seed, references=((),)).findings()[0].startswith("Behind no") for seed in range(5)]
    assert sum(sure) <= 1
    one = made(1, references=((),))
    assert one.findings()[0].startswith("One sample tells no interval")
    (nothing,) = sentences(made(3, things=(), references=((),)).by_layer())
    assert nothing.startswith("nothing is known")


def test_names():
    star, cat, code = Thing("red", ("star",)), Thing("blue", ("word", "cat")), Thing("black", ("word", "CKG"))
    assert names(" Red", star) and names("STAR", star) and names("sta", star) and not names("st", star)
    assert not names("  ", star) and not names("s", star) and not names("stars", star)
    assert names("cat", cat, "object") and not names("c", cat) and not names("blue", cat, "object")
    assert names("C", code) and names("kg", code) and not names("q", code)
    assert names("black", code, "color") and not names("C", code, "color")


# --- the truth


@pytest.mark.parametrize("task", ["shapes", "shapes-sizes", "pages:describe"])
def test_cells_have_the_ink_of_what_they_show(task):
    inks = {**PAINTS, "white": (255, 255, 255)} if task.startswith("pages") else COLORS
    for sample in load_task(task).samples("search", 2):
        (truth,) = truth_of(sample)
        (picture,) = sample.open_images()
        pixels, (rows, columns) = np.asarray(picture).astype(int), truth.cells.shape
        side = PATCH_SIZE if task.startswith("shapes") else picture.width // columns
        assert pixels.shape[:2] == (rows * side, columns * side)
        assert set(np.unique(truth.cells)) >= set(range(len(truth.things))) and truth.things
        for (row, column), number in np.ndenumerate(truth.cells):
            if number >= 0:
                patch = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
                ink = np.array(inks[truth.things[number].color])
                assert (np.abs(patch - ink).max(axis=-1) < 60).any(), (sample.id, row, column)


def test_things_are_those_of_the_reference():
    for sample in load_task("shapes:describe").samples("search", 4):
        (truth,) = truth_of(sample)
        told = [part.split(" at ")[0] for part in sample.answers[0].split(", ")]
        assert [" ".join((thing.color, *thing.names)) for thing in truth.things] == told


def test_other_pictures_have_no_truth(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (8, 8), ImageColor.getrgb("red"))
    assert truth_of(Sample("a", (picture,), "what?")) == ()
    known = load_task("shapes").samples("search", 1)[0].images
    assert truth_of(Sample("a", (*known, picture), "what?")) == ()
    assert len(truth_of(Sample("a", (*known, *known), "what?"))) == 2


def test_the_finest_token_owns_a_place():
    for rows, columns in ((4, 6), (9, 7), (1, 1)):
        got = owners(DETAILS, rows, columns)
        for row, column in np.ndindex(rows, columns):
            y, x = (row + 0.5) / rows, (column + 0.5) / columns
            assert got[row, column] == 7 * int(y * 4) + int(x * 6)
    half = (Tile(0, 2, 2, 2, (0.0, 0.0, 0.5, 1.0)),)
    assert (owners(half, 4, 4)[:, 2:] == -1).all() and (owners(half, 4, 4)[:, :2] >= 0).all()


# --- files


def test_a_lens_comes_back_as_it_was(tmp_path):
    lens = made()
    lens.save(tmp_path)
    again = Lens.open(tmp_path)
    assert again.meta == lens.meta
    pd.testing.assert_frame_equal(again.table(), lens.table())
    pd.testing.assert_frame_equal(again.by_layer(), lens.by_layer())
    for one, other in zip(again.samples, lens.samples, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.truth[0].cells, other.truth[0].cells)
        assert (one.references, one.truth[0].things) == (other.references, other.truth[0].things)
    table = lens.table()
    row = table[(table["sample"] == "s1") & (table["layer"] == 3) & (table["token"] == 5)]
    assert row["word"].tolist() == [WORDS[i] for i in lens.samples[1].ids[1, 5]]


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no lens"):
        Lens.open(tmp_path)
    for name, text in (("meta.json", "{"), ("meta.json", '{"schema": "other"}'), ("lens.parquet", "x")):
        made().save(tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"cannot be read|must have schema"):
            Lens.open(tmp_path)
    made().save(tmp_path)
    pd.read_parquet(tmp_path / "lens.parquet").iloc[:-1].to_parquet(tmp_path / "lens.parquet")
    with pytest.raises(UserError, match="must have 204 words, got 203"):
        Lens.open(tmp_path)


@pytest.mark.full  # the embedded model is read four times
def test_the_verb_adds_what_is_missing(tiny, tmp_path):
    first = avlprof.lens(tiny, "shapes", 2, avlprof.LensSettings(layers=(5, 0), top=3), out=tmp_path)
    assert first.layers == (0, 5) and len(first.samples) == 2
    seen = []

    class Look(avlprof.Watch):
        def phase(self, name, done, total):
            seen.append((name, done, total))

    settings = avlprof.LensSettings(layers=(0, 5), top=3, batch_size=2)
    more = avlprof.lens(tiny, "shapes", 3, settings, out=tmp_path, watch=Look())
    assert seen == [("lens", 2, 3), ("lens", 3, 3)]
    assert [one.id for one in more.samples] == [one.id for one in Lens.open(tmp_path).samples]
    np.testing.assert_array_equal(more.samples[1].ids, first.samples[1].ids)
    assert all(one.truth and one.ids.shape == (2, 196, 3) for one in more.samples)
    with pytest.raises(UserError, match=r"holds another lens \(top: 3 there, 2 asked\)"):
        avlprof.lens(tiny, "shapes", 1, avlprof.LensSettings(layers=(0, 5), top=2), out=tmp_path)
    with pytest.raises(UserError, match=r"layers must be in 0 to 5, got 6"):
        avlprof.lens(tiny, "shapes", 1, avlprof.LensSettings(layers=(6,)))
    with pytest.raises(UserError, match="top must be at least 1"):
        avlprof.LensSettings(top=0)
    with pytest.raises(UserError, match="layers must be different ones"):
        avlprof.LensSettings(layers=(1, 1))
    with pytest.raises(UserError, match="sample 'x' was not read; these were: search-00000-describe"):
        more.sample("x")
