"""`avlprof lens` from the command line: what it prints and writes, resumes and refuses."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from PIL import Image

from avlprof.analysis.lens import Lens
from tests.cli_runner import invoke, refused


@pytest.mark.full  # figures and a trace
def test_words_are_printed_written_and_explored(tmp_path):
    out = tmp_path / "lens"
    words = ["lens", "-n", "2", "--layers", "0,5", "--top", "2", "-o", out, "--figure-format", "svg"]
    result = invoke(*words, "--format", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    pd.testing.assert_frame_equal(
        pd.DataFrame(rows), Lens.open(out).by_layer(), check_dtype=False, check_exact=False
    )
    for name in ("lens-layers.svg", "lens-words.svg", "lens-last.svg", "lens.parquet", "meta.json"):
        assert (out / name).is_file() and str(out) in result.stderr
    again = invoke(*words)
    assert "2 of 2 samples were done before" in again.stderr
    lines = again.stdout.splitlines()
    assert lines[0] == "tiny on shapes, 2 samples" and len(lines) == 6
    assert lines[1].split()[:3] == ["layer", "names_it", "by_chance"]
    run = tmp_path / "run"
    assert invoke("trace", "-n", "1", "--max-new-tokens", "2", "-o", run).exit_code == 0
    page = invoke("explore", run, "--lens", out, "-o", tmp_path / "page.html")
    assert page.exit_code == 0, page.output
    assert '"says":{"layers":[0,5]' in (tmp_path / "page.html").read_text()


@pytest.mark.full  # figures
def test_own_pictures_have_words_and_no_truth(tmp_path):
    picture = tmp_path / "p.png"
    Image.new("RGB", (112, 112), (240, 240, 240)).save(picture)
    result = invoke("lens", "-i", picture, "-p", "what?", "--layers", "5", "-o", tmp_path / "lens")
    assert result.exit_code == 0, result.output
    assert "nothing is known that the words could be held to" in result.stdout
    assert "names_it" not in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "0,x"], "--layers must be numbers and ranges with commas, as in 0-5,8, got '0,x'"),
        (["--layers", "6", "-n", "1"], "layers must be in 0 to 5, got 6"),
        (["--top", "0"], "top must be at least 1, got 0"),
        (["--sample", "x", "-n", "1"], "sample 'x' is not among those read"),
        (["--split", "x"], "unknown split"),
        (["-i", "p.png", "-p", "what?", "-n", "3"], "--samples does nothing beside --image"),
    ],
)
def test_what_is_wrong_is_said(words, said, tmp_path):
    assert said in refused(invoke("lens", *words, "-o", tmp_path / "lens"))
    assert not (tmp_path / "lens" / "lens.parquet").exists()
