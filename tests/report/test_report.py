"""The report: one file with all that was found, that loads nothing and lets no text become markup."""

from __future__ import annotations

import base64
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from avlprof.analysis import findings
from avlprof.cli._app import app
from avlprof.errors import UserError
from avlprof.models.tiles import dump_tiles, grid
from avlprof.policy import Policy, Provenance, Score, save_policy
from avlprof.report import report_html, write_report
from avlprof.report.examples import examples
from avlprof.report.tables import percent
from avlprof.report.write import trace_command
from avlprof.run import Run
from tests.synthetic_run import LAYERS, settings, write_run

SCRIPT = "<script>alert('a')</script>"
IMAGE = '"><img src=x onerror=alert(1)>'
VOID = {"meta", "img", "br", "link", "input", "hr"}
DATE = "2026-01-02T03:04:05+00:00"
KEYS = {"found", "looking", "tokens", "text", "pictures", "layers", "traced", "intervals", "repeat"}


class Page(HTMLParser):
    """Tags, ids, links, text and table cells of a page; tags must close in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag == "td":
            self.cells.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)
        if "td" in self._open and "small" not in self._open:
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def sources(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


def pictured(run: Path, texts: str = "fine", files: bool = True) -> Run:
    """The run with texts, and a picture of 2 x 3 tokens for its first sample."""
    for number, part in enumerate(sorted(run.glob("samples-*.parquet"))):
        table = pd.read_parquet(part)
        table["prompt"], table["answer"] = f"{SCRIPT} {texts}", IMAGE
        if number == 0:
            table.loc[0, "tiles"] = dump_tiles([grid(2, 3).tiles])
        table.to_parquet(part, index=False)
    if files:
        Image.new("RGB", (30, 20), (200, 10, 10)).save(run / "one.png")
        line = json.dumps({"id": "s0", "images": [str(run / "one.png")]})
        (run / "pictures.jsonl").write_text(line + "\n", encoding="utf-8")
    return Run.open(run)


def hostile_policy() -> Policy:
    found = Provenance(
        model="other", metric="token_f1", scores={IMAGE: Score(mean=0.5, low=0.4, high=0.6, samples=9)}
    )
    return Policy(
        name="half",
        description=SCRIPT,
        vision_keep=(0.5,) * LAYERS,
        vision_compute=0.25,
        refresh_interval=4,
        provenance=found,
    )


pytestmark = pytest.mark.full  # a page of every section, for all tests


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "run", vision=(6, 9, 0, 14), model=SCRIPT, task=IMAGE, per_head=True)
    return pictured(folder / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("other")
    write_run(folder, vision=(5, 4, 9), seed=3)
    return Run.open(folder)


@pytest.fixture(scope="module")
def html(run: Run, other: Run) -> str:
    return report_html(run, policy=hostile_policy(), against=other, pictures=2, created=DATE)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_section_is_there_and_every_link_leads_to_one(page: Page) -> None:
    assert set(page.ids) == KEYS | {"policy", "differences"}
    assert len(page.ids) == len(set(page.ids))
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert {link.removeprefix("#") for link in links} == set(page.ids)


def test_the_page_loads_nothing(html: str, page: Page) -> None:
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    bare = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|src=\"//|@import|url\(", bare)


def test_vector_figures_are_whole_and_load_nothing(page: Page) -> None:
    vectors = [source for source in page.sources if "svg" in source[:30]]
    assert len(vectors) == 11  # nine, two of heads among them, the policy, the differences
    for source in vectors:
        tree = ElementTree.fromstring(base64.b64decode(source.partition("base64,")[2]))
        targets = [
            value for node in tree.iter() for name, value in node.attrib.items() if name.endswith("href")
        ]
        assert all(target.startswith(("#", "data:")) for target in targets)
        assert not [node for node in tree.iter() if node.tag.endswith("script")]


def test_every_figure_says_what_it_is(page: Page) -> None:
    told = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(told) == len(page.sources)
    assert all(len(text) > 8 for text in told)
    assert page.tags.count("figcaption") == len(page.sources)


def test_hostile_text_stays_text(html: str, page: Page) -> None:
    assert SCRIPT not in html
    assert IMAGE not in html
    assert page.text.count(SCRIPT) >= 4  # title, lead, prompt, description of the policy
    assert page.text.count(IMAGE) >= 3  # task, answer, a row of the scores


def test_findings_are_the_analysis_own(run: Run, page: Page) -> None:
    for sentence in findings(run.profile()):
        assert sentence in page.text


def test_the_table_holds_the_means_of_the_profile(run: Run, page: Page) -> None:
    expected = run.profile().per_layer()
    columns = list(expected.columns.drop("layer"))
    shown = page.cells[: len(columns) * LAYERS]
    for place, text in enumerate(shown):
        value = expected[columns[place % len(columns)]].iloc[place // len(columns)]
        text = text.strip()
        assert float(text.rstrip("%")) == pytest.approx(100 * value if "%" in text else value, abs=0.51)


def test_the_cost_of_a_policy_is_counted_on_the_prompts_of_the_run(run: Run, page: Page) -> None:
    counts = run.samples()[["system", "vision", "text"]].to_numpy().tolist()
    live = sum(s + n // 2 + t for s, n, t in counts) / sum(sum(row) for row in counts)
    assert f"{round(100 * live)}% of dense after prefill, on this run's 4 prompts" in page.text
    assert "other, not the model of this run" in page.text
    assert "0.500" in page.text and "0.400 to 0.600" in page.text


def test_sure_differences_are_counted(run: Run, page: Page) -> None:
    said = re.search(r"Of the (\d+) differences shown, (\d+) have an interval", page.text)
    assert said is not None
    assert int(said[1]) == 6 * LAYERS
    assert 0 <= int(said[2]) <= int(said[1])
    assert "4 samples against 3 others" in page.text


@pytest.mark.slow  # two more reports with all figures
def test_the_same_input_is_the_same_file_but_for_its_date(
    run: Run, other: Run, html: str, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "a.html"
    assert write_report(run, path, policy=hostile_policy(), against=other, pictures=2) == path
    written = path.read_text(encoding="utf-8")
    date = re.search(r"<time>(.*?)</time>", written)
    assert date is not None and date[1].startswith("20")
    assert html.count(DATE) == 1
    assert written.replace(date[1], DATE) == html
    assert list(path.parent.iterdir()) == [path]


def test_what_a_run_lacks_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, vision=(0, 0), decode=False, averaged=True, parts=1)
    page = Page(report_html(Run.open(tmp_path), created=DATE))
    assert "holds averages over heads only; trace with per_head" in page.text
    assert "overlap of heads" not in page.text
    assert "No figure of drift over steps" in page.text
    assert "No sample has vision tokens" in page.text
    assert set(page.ids) == KEYS
    assert not [source for source in page.sources if "svg" not in source[:30]]


def test_lost_pictures_leave_a_note(tmp_path: Path) -> None:
    write_run(tmp_path, vision=(6, 6), averaged=True, parts=1)
    shown, note = examples(pictured(tmp_path, files=False), 2)
    assert shown == ()
    assert note.startswith(f"A picture is missing: the pictures of run {tmp_path}")


@pytest.mark.full  # two more reports
def test_samples_are_of_many_groups_and_at_most_as_asked(tmp_path: Path) -> None:
    write_run(tmp_path, vision=(6,) * 4, averaged=True, decode=False, parts=1)
    run = pictured(tmp_path)
    table = pd.read_parquet(tmp_path / "samples-00000.parquet")
    table["tiles"], table["group"] = table["tiles"].iloc[0], ["a", "a", "b", "a"]
    table.to_parquet(tmp_path / "samples-00000.parquet", index=False)
    lines = [json.dumps({"id": name, "images": [str(tmp_path / "one.png")]}) for name in table["sample"]]
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shown, note = examples(run, 2)
    assert [one.sample for one in shown] == ["s0", "s2"]
    assert note == ""
    assert shown[0].figure.uri.startswith("data:image/png;base64,iVBOR")
    assert examples(run, 0) == ((), "None was asked for.")


@pytest.mark.slow  # figures of many layers
def test_a_deep_model_stays_small(tmp_path: Path) -> None:
    write_run(tmp_path, vision=(300, 290), parts=1, averaged=True, layers=48)
    assert len(report_html(Run.open(tmp_path), pictures=0)) < 3_000_000


def test_a_failed_report_leaves_the_old_one(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(UserError, match="written for 3 layers, the model has 4"):
        write_report(run, path, policy=Policy(vision_keep=(0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match="pictures must be 0 or more, got -1"):
        write_report(run, path, pictures=-1)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"split": "held-out", "max_new_tokens": 0, "forced": True, "rows": "all", "model": "some folder/x"},
        {"split": "search", "per_head": True, "vision_rows": 8, "history": 0.25, "task": "a.jsonl"},
    ],
)
def test_the_printed_command_asks_for_the_same_run(changes: dict[str, object], tmp_path: Path) -> None:
    from avlprof.cli.trace import app as trace

    meta = settings(**changes)
    words = shlex.split(trace_command(meta, 12, tmp_path / "my run"))
    assert words[:2] == ["avlprof", "trace"]
    given = get_command(trace).make_context("trace", words[2:]).params
    assert (given["model_name"], given["model_dtype"], given["task_name"]) == (
        meta.model,
        meta.dtype,
        meta.task,
    )
    for name in ("forced", "rows", "per_head", "vision_rows", "history"):
        assert given[name] == getattr(meta, name), name
    assert given["split"] == (meta.split or "search")
    assert (given["task_max_new_tokens"] or 0) == meta.max_new_tokens
    assert (given["samples"], given["out"]) == (12, tmp_path / "my run")


@pytest.mark.parametrize(
    ("model", "revision", "named"),
    [
        ("llava-hf/llava-1.5-7b-hf", "a" * 40, True),
        ("llava-hf/llava-1.5-7b-hf", "main", True),
        ("llava-hf/llava-1.5-7b-hf", "", False),
        ("models/mine", "0123456789ab", False),  # a folder and the fingerprint of its files
        ("tiny", "0123456789ab", False),
    ],
)
def test_the_command_names_the_revision_of_a_model_of_the_hub(
    model: str, revision: str, named: bool, tmp_path: Path
) -> None:
    words = shlex.split(trace_command(settings(model=model, revision=revision), 3, tmp_path))
    assert ("--revision" in words) == named
    if named:
        assert words[words.index("--revision") + 1] == revision


def test_the_command_names_a_policy_whose_name_has_a_space(tmp_path: Path) -> None:
    meta = settings(policy="my own", policy_hash="0123456789abcdef")
    words = shlex.split(trace_command(meta, 3, tmp_path))
    assert words[words.index("--policy") + 1] == "my own"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0%"), (0.0004, "<0.1%"), (0.0123, "1.2%"), (0.0949, "9.5%"), (0.25, "25%"), (1.0, "100%")],
)
def test_shares_are_short(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.full  # one more report
def test_the_command_writes_beside_the_run_and_says_how_to_open_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run", vision=(0, 0), decode=False, averaged=True, parts=1)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--pictures", "0"])
    assert done.exit_code == 0, done.stderr
    path = tmp_path / "run" / "report.html"
    Page(path.read_text(encoding="utf-8"))
    last = done.stderr.splitlines()[-2:]
    assert last[0].startswith(f"wrote {path}")
    assert last[1] == f"next: open {path.as_uri()} in a browser"


@pytest.mark.parametrize("case", ["no run", "no other run", "other layers", "no policy"])
def test_the_users_mistakes_are_one_sentence(case: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, vision=(6, 6), averaged=True, parts=1)
    save_policy(Policy(vision_keep=(0.5, 0.5)), tmp_path / "two.yaml")
    words, says = {
        "no run": ([str(tmp_path / "none")], "is not a run directory"),
        "no other run": ([str(run), "--against", str(tmp_path)], "is not a run directory"),
        "other layers": ([str(run), "--policy", str(tmp_path / "two.yaml")], "for 2 layers, the model has 4"),
        "no policy": ([str(run), "--policy", "nothing"], "nothing"),
    }[case]
    done = CliRunner().invoke(app, ["report", *words, "-o", str(tmp_path / "out.html")])
    assert done.exit_code == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert "Traceback" not in done.output
    assert not (tmp_path / "out.html").exists()
