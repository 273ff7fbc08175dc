"""The explorer in a real browser: what is clicked, what is pressed, and what is then shown."""

from __future__ import annotations

import base64
import io
import re
import time
import zlib

import numpy as np
import pytest
from PIL import Image

import avlprof
from avlprof.analysis.lens import Lens
from avlprof.analysis.naming import SampleLens
from avlprof.models.tiles import Tile, paint
from avlprof.policy import Policy
from avlprof.tracing import RecordOptions, TraceSettings
from tests.explore.made import LARGE, Made, chromium, make_run, missing_browser

pytestmark = [
    pytest.mark.full,  # a browser
    pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "there is a browser"),
]
GRID = [[Tile(0, 5, 5, 5)]]
ADVICE = "willReadFrequently"  # what a browser says of tests that read pixels
EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens explorers; the page may say nothing wrong and ask for nothing from anywhere."""
    contexts, wrong = [], []

    def open_page(explorer, width=1400, height=900, theme="light"):
        path = explorer.save(tmp_path / f"page-{len(contexts)}.html")
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if ADVICE not in message.text else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if asked(request.url) else None)
        page.goto(path.as_uri())
        page.wait_for_selector("#main[aria-busy=false]")
        return page

    def asked(url):
        return not url.startswith(("data:", "blob:", tmp_path.as_uri()))

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    samples = [Made("large"), Made("plain", GRID, sizes=((50, 50),)), Made("nothing", [], 0, sizes=())]
    return make_run(folder / "run", samples)


def said(share):
    """A share as the page writes it."""
    if share >= 0.0995:
        return f"{100 * share:.0f}%"
    return f"{100 * share:.1f}%" if share >= 0.001 else f"{100 * share:.0e}%"


def word_row(run, sample, word):
    """What an answer word of one row got its attention from, `[layers, vision]`."""
    scores = run.scores(sample)
    return [scores["last"], *scores["decode"]][word]


def pixel(page, x, y, canvas="#stages canvas"):
    """The colour of a canvas at a share of its width and height."""
    return page.evaluate(
        """([name, x, y]) => { const canvas = document.querySelector(name);
        const at = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
        return [...canvas.getContext("2d").getImageData(...at, 1, 1).data]; }""",
        [canvas, x, y],
    )


def click_patch(page, x, y, canvas=0):
    target = page.locator("#stages canvas").nth(canvas)
    box = target.bounding_box()
    target.click(position={"x": x * box["width"], "y": y * box["height"]})


def show(page, sample):
    page.select_option("#sample", sample)
    page.wait_for_selector("#main[aria-busy=false]")
    until(lambda: page.input_value("#sample") == sample)


def until(holds, seconds=10.0):
    """Waits; what Playwright offers for it evaluates text, which the page forbids."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- words and patches


def test_a_word_shows_where_it_looks(opened, run):
    page = opened(run.explore())
    show(page, "1")
    page.select_option("#layer", "2")
    page.get_by_role("radio", name="red").click()
    row = word_row(run, "plain", 1)[2]
    text = page.inner_text("#stages .fact")
    assert text.startswith(f"“red”, layer 2: {said(row.sum())} of its attention goes to vision")
    assert f"strongest token has {said(row.max() / row.sum())}" in text
    brightest = int(row.argmax())
    x, y = (brightest % 5 + 0.5) / 5, (brightest // 5 + 0.5) / 5
    red, green, blue, opacity = pixel(page, x, y)
    assert (red, green, blue) == pytest.approx((127, 0, 0), abs=20) and opacity > 200
    dimmest = int(row.argmin())
    faint = pixel(page, (dimmest % 5 + 0.5) / 5, (dimmest // 5 + 0.5) / 5)
    assert min(faint[:3]) > 180
    assert page.get_by_role("radio", name="red").get_attribute("aria-checked") == "true"
    assert page.inner_text("#said").startswith("“red”, layer 2")


def test_overlapping_tiles_and_further_pictures_are_painted_together(opened, run):
    """The brightest cell of all pictures, as the report paints them, is the brightest on the page."""
    page = opened(run.explore())
    page.get_by_role("radio", name="white").click()
    row = word_row(run, "large", 5).mean(axis=0)
    cells = [paint(tiles, row, *shape) for tiles, shape in zip(LARGE, ((3, 4), (2, 3)), strict=True)]
    most = max(painted.max() for painted in cells)
    for number, painted in enumerate(cells):
        rows, columns = painted.shape
        for (r, c), share in np.ndenumerate(painted / most):
            name = f"#stages figure:nth-of-type({number + 1}) canvas"
            *_, opacity = pixel(page, (c + 0.5) / columns, (r + 0.5) / rows, name)
            over = 0.15 + 0.75 * np.sqrt(share)
            assert opacity / 255 == pytest.approx(1 - (1 - over) * 0.75, abs=0.02), (number, r, c)


def test_a_patch_shows_who_looks_at_it(opened, run):
    page = opened(run.explore())
    show(page, "1")
    page.get_by_role("radio", name="red").click()
    page.select_option("#layer", "1")
    click_patch(page, 0.7, 0.3)  # row 1, column 3
    assert "row 2, column 4" in page.inner_text("#about")
    token = 1 * 5 + 3
    share = word_row(run, "plain", 1)[1][token]
    text = page.inner_text("#stages .fact")
    found = float(re.search(r"chosen patch gets ([\d.e-]+)%", text)[1]) / 100
    peak = word_row(run, "plain", 1)[1].max()
    assert np.sqrt(found) == pytest.approx(np.sqrt(share), abs=float(np.sqrt(peak)) / 94 + 0.03)
    shades = {
        chip.inner_text(): float(chip.evaluate("e => e.style.getPropertyValue('--share')"))
        for chip in page.locator(".chip.answer").all()
    }
    scores = run.scores("plain")
    behind = [scores["last"], *scores["decode"]]
    wanted = {"a": behind[0], "red": behind[1], "triangle": (behind[2] + behind[3]) / 2}
    wanted |= {"on": behind[4], "white": behind[5]}
    got = [wanted[name][1, token] for name in shades]
    assert max(shades, key=shades.get) in {name for name, own in wanted.items()
                                           if own[1, token] > 0.9 * max(got)}  # fmt: skip
    click_patch(page, 0.7, 0.3)
    assert "Choose a patch" in page.inner_text("#about")


def test_the_grid_takes_layer_and_word(opened, run):
    page = opened(run.explore())
    grid = page.locator("#grids canvas.cells")
    box = grid.bounding_box()
    words = 10  # four of the question, the last prompt token, five of the answer
    width = (box["width"] - 26) / words
    grid.click(position={"x": width * 7.5, "y": box["height"] - 6 - 13})  # the deepest layer, `triangle`
    assert page.input_value("#layer") == "3"
    assert page.get_by_role("radio", name="triangle").get_attribute("aria-checked") == "true"
    scores = run.scores("large")
    share = (scores["decode"][1] + scores["decode"][2])[3].sum() / 2
    assert grid.get_attribute("aria-label").endswith(f"layer 3, “triangle”: {said(share)}")


def test_heads(opened, run):
    page = opened(run.explore())
    page.check("input[value=heads]")
    page.select_option("#layer", "0")
    page.get_by_role("radio", name="on").click()
    page.select_option("#head", "1")
    row = run.scores("large")["decode_heads"][3][0, 1]
    until(lambda: "head 1" in page.inner_text("#stages .fact"))
    assert f"“on”, layer 0, head 1: {said(row.sum())}" in page.inner_text("#stages .fact")
    assert page.inner_text("#grid-title") == "Layers by heads"
    page.select_option("#layer", "-1")
    assert page.input_value("#head") == "-1"


def test_a_run_of_head_means_says_what_is_missing(opened, tmp_path):
    page = opened(make_run(tmp_path / "run", [Made("one")], text=False, per_head=False).explore())
    assert page.locator("#head").is_disabled() and page.locator("#across").is_hidden()
    note = page.inner_text("#note")
    assert "--text-rows" in note and "--per-head" in note
    page.get_by_role("radio", name="all question words").click()
    assert "The question (mean of its words)" in page.inner_text("#stages .fact")


def test_numbers_are_there_as_a_table(opened, run):
    page = opened(run.explore())
    page.get_by_role("radio", name="red").click()
    page.click("#numbers summary")
    body = page.locator("#table tbody tr")
    until(lambda: body.count() == 4)  # a browser tells of what unfolds some time after the click
    found = [row.locator("td").first.inner_text() for row in body.all()]
    assert found == [said(own.sum()) for own in word_row(run, "large", 1)]


def test_samples_without_pictures_or_vision(opened, run):
    page = opened(run.explore())
    show(page, "2")
    assert "no vision tokens" in page.inner_text("#stages")
    assert page.locator("#after").is_disabled()
    page.click("#before")
    until(lambda: page.input_value("#sample") == "1")


def test_a_patch_says_its_words_layer_by_layer(opened, run):
    """Of the tiles that hold a place, the finest speaks; the words are those of the layer that is shown."""
    words = ["star", "moon", EVIL, "blue", ""]
    tokens = 25
    ids = np.random.default_rng(4).integers(0, len(words), (3, tokens, 3)).astype(np.int32)
    shares = np.sort(np.random.default_rng(5).uniform(0.0, 1.0, ids.shape))[..., ::-1].astype(np.float32)
    one = SampleLens("large", "", (), "[]", ids, shares)
    meta = {"model": "random", "model_hash": "h1", "layers": [0, 2, 3]}
    page = opened(run.explore(lens=Lens(meta, (one,), dict(enumerate(words)))))
    assert page.locator("#says").is_visible()
    assert "Choose a patch" in page.inner_text("#says-about")
    page.select_option("#show", "says")
    page.select_option("#layer", "1")
    click_patch(page, 0.9, 0.5)  # row 1, column 3 of the details: token 5 + 3
    rows = page.locator("#says tbody tr").all()
    assert [row.locator("th").inner_text() for row in rows] == ["0", "2", "3"]
    for at, row in enumerate(rows):
        cells = row.locator("td").all_inner_texts()
        for cell, word, share in zip(cells, ids[at, 8], shares[at, 8], strict=True):
            assert cell.split("\xa0")[0].startswith(words[word] or "␣")
            assert float(cell.split()[-1].rstrip("%")) == pytest.approx(100 * share, abs=0.7)
    assert page.locator("#says tr.on th").inner_text() == "0"  # layer 1 was not read
    assert "It says behind layer 0: " in page.inner_text("#stages .fact")
    placed = [5 * row + column for row in range(3) for column in range(4)] + list(range(15, 25))
    said_first = [words[word] or "␣" for word in ids[0, placed, 0]]
    common = {word: said_first.count(word) for word in said_first}
    best = max(common.values())
    key = page.locator("#key .group").all_inner_texts()
    assert common[key[0]] == best and key[-1] == "other words"
    red, green, blue, opacity = pixel(page, 0.9, 0.36)
    assert opacity > 60 and len({red, green, blue}) > 1
    show(page, "1")
    assert page.locator("#says").is_hidden()
    assert page.input_value("#show") == "attention"


# --- the keyboard, and a screen reader


def test_everything_works_from_the_keyboard(opened, run):
    page = opened(run.explore())
    page.locator(".chip[aria-checked=true]").focus()
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("document.activeElement.textContent")
    assert focused == "red" and page.inner_text("#said").startswith("“red”")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.textContent") == "what"
    page.locator("#stages canvas").first.focus()
    page.keyboard.press("Enter")
    assert "row 2, column 3" in page.inner_text("#about")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert "row 1, column 2" in page.inner_text("#about")
    assert "chosen: row 1, column 2" in page.locator("#stages canvas").first.get_attribute("aria-label")
    assert "The chosen patch gets" in page.inner_text("#said")
    page.keyboard.press("Escape")
    assert "Choose a patch" in page.inner_text("#about")
    page.locator("#grids canvas.cells").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#layer") == "1"


def test_every_control_has_a_name(opened, run):
    page = opened(run.explore())
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, canvas[tabindex]")].filter((e) =>
        !(e.getAttribute("aria-label") || e.textContent.trim() && e.tagName === "BUTTON" ||
          e.labels && [...e.labels].some((label) => label.textContent.trim()))).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert page.locator(".chip[tabindex='0']").count() == 1


def test_the_answer_is_played_to_its_end(opened, run):
    page = opened(run.explore())
    page.select_option("#speed", "250")
    page.click("#play")
    assert page.get_attribute("#play", "aria-pressed") == "true"
    chosen = page.locator(".chip[aria-checked=true]")
    until(lambda: chosen.inner_text() == "on")
    until(lambda: page.get_attribute("#play", "aria-pressed") == "false")
    assert page.locator(".chip[aria-checked=true]").inner_text() == "white"
    page.click("#play")
    assert page.locator(".chip[aria-checked=true]").inner_text() == "a"
    page.get_by_role("radio", name="triangle").click()
    assert page.get_attribute("#play", "aria-pressed") == "false"


# --- a policy, and two runs


@pytest.fixture(scope="module")
def tried(tiny, tmp_path_factory):
    """A run of the embedded model beside a policy that keeps a half and reads a quarter."""
    options = TraceSettings(max_new_tokens=12, record=RecordOptions(text_rows=True))
    out = tmp_path_factory.mktemp("tried") / "run"
    run = avlprof.trace(tiny, "shapes:describe", 1, options, out=out)
    policy = Policy(name="half", vision_keep=0.5, vision_compute=0.25, refresh_interval=4)
    return run, run.explore(policy=policy, loaded=tiny)


def test_what_a_policy_keeps_computes_and_drops(opened, tried):
    _, explorer = tried
    page = opened(explorer)
    assert page.locator("#stages .stage").count() == 2
    page.select_option("#layer", "3")
    page.locator(".chip.answer[data-side='1']").nth(2).click()
    assert "It keeps 98 of 196 vision tokens, 49 of them in the core" in page.inner_text("#stages")
    dense = page.locator("#stages .fact").first.inner_text()
    shares = [float(share) for share in re.findall(r"([\d.]+)% (?:lies|on what)", dense)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=1.5)
    before = page.locator("#stages canvas").nth(1).screenshot()
    page.select_option("#show", "policy")
    after = page.locator("#stages canvas").nth(1).screenshot()
    assert before != after
    assert "core, read at each step" in page.inner_text("#key") and "dropped" in page.inner_text("#key")
    page.locator(".chip.answer[data-side='0']").first.click()
    assert "After the prompt, which reads all, it keeps 98" in page.inner_text("#stages")


def test_dropped_patches_are_hatched_and_core_is_framed(opened, tried):
    _, explorer = tried
    page = opened(explorer)
    page.select_option("#layer", "2")
    page.select_option("#show", "policy")
    page.locator(".chip.last").first.click()
    states = explorer.data["samples"][0]["sides"][1]["states"]
    sets = np.frombuffer(zlib.decompress(base64.b64decode(states["data"])), np.uint8)
    first = sets.reshape(states["shape"])[states["rows"][0], 2]
    side = 14
    size = page.evaluate("[...document.querySelectorAll('#stages canvas')].map(c => c.width)")[1]
    for token in range(0, side * side, 5):
        r, c = divmod(token, side)
        edge = (c + 3.0 * side / size) / side  # within the frame, which is at least 1.5 pixels wide
        red, green, blue, opacity = pixel(page, edge - 1e-9, (r + 0.5) / side, ".stage:nth-child(2) canvas")
        if first[token] == 0:
            assert opacity > 150 and red < 120, token
        elif first[token] == 0xFF:
            assert blue > red + 80 and green < 150, token
        else:
            assert blue > red + 80 and green > 150, token


def test_two_runs_side_by_side(opened, run, tmp_path):
    other = make_run(tmp_path / "other", [Made("large", answer=("Ġno", "Ġwords"))], seed=5)
    page = opened(run.explore(against=other))
    assert page.inner_text("#lead").startswith("random, dense (this run) beside random, dense (the other)")
    page.locator(".chip.answer[data-side='0']").nth(4).click()
    assert page.locator(".chip[data-side='1'][aria-checked=true]").inner_text() == "words"
    facts = page.locator("#stages .fact").all_inner_texts()
    share = other.scores("large")["decode"][0].sum(axis=-1).mean()
    assert f"“words”, mean of 4 layers: {said(share)}" in facts[1]
    show(page, "1")
    assert "This run does not have the sample." in page.inner_text("#stages")


# --- looks, and what is foreign


@pytest.mark.parametrize("width", [1400, 900, 420])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_sticks_out(opened, run, width, theme):
    page = opened(run.explore(), width, theme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == ("rgb(20, 24, 30)" if theme == "dark" else "rgb(246, 247, 249)")
    page.select_option("#theme", "dark" if theme == "light" else "light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_a_hostile_run_executes_nothing(opened, tmp_path):
    evil = Made(
        EVIL, question=(f"Ġ{EVIL}",), answer=(f"Ġ{EVIL}", "Ġb"), prompt=EVIL, said=EVIL, references=(EVIL,)
    )
    run = make_run(tmp_path / "run", [evil], model=EVIL, task=EVIL)
    page = opened(run.explore())
    page.locator(".chip.answer").first.click()
    assert page.evaluate("window.hacked") is None
    assert page.locator(".chip.answer").first.inner_text() == EVIL
    assert page.inner_text("h1") == f"{EVIL} on {EVIL}"
    assert EVIL in page.inner_text("#reference") and page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize(
    "markup",
    ["<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>",
     "<svg onload='window.hacked = 1'>", "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>"],
)  # fmt: skip
def test_script_that_slips_in_is_not_run(browser, run, tmp_path, markup):
    """Were a text ever to become markup, the page's own policy stops its scripts; here it is put in."""
    text = run.explore(1).html()
    for name, rule in (("kept", True), ("gone", False)):
        whole = text if rule else text.replace('http-equiv="Content-Security-Policy"', "")
        path = tmp_path / f"{name}.html"
        path.write_text(whole.replace("</main>", f"{markup}</main>"), encoding="utf-8")
        page = browser.new_page()
        page.goto(path.as_uri())
        page.locator("#main[aria-busy=false]").wait_for()
        if rule:
            page.wait_for_timeout(200)
            assert page.evaluate("window.hacked") is None
        else:  # the attempt is one: without the rule it succeeds
            until(lambda page=page: page.evaluate("window.hacked") == 1)
        page.close()


def test_a_notebook_shows_it(browser, run, tmp_path):
    """In a frame without rights, which reaches nothing of the notebook's page."""
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><p id=mine>cell</p>{run.explore(1)._repr_html_()}", encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#main[aria-busy=false]").wait_for()
    frame.get_by_role("radio", name="red").click()
    assert "“red”" in frame.locator("#stages .fact").inner_text()
    page.close()


def test_a_sample_shows_its_own_picture(opened, run):
    page = opened(run.explore())
    page.select_option("#show", "picture")
    shot = page.locator("#stages figure").first.screenshot()
    with Image.open(io.BytesIO(shot)) as image:
        assert image.convert("RGB").getpixel((image.width // 2, image.height // 2)) == (40, 120, 200)
