"""Files that people have: read, or refused in a sentence about the file that is there."""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from avlprof.errors import UserError
from avlprof.models.chat import chat_text
from avlprof.tasks import Message, Sample, Task, Turn, load_metric, load_task
from avlprof.tasks.turn import marked_turn

COLORS = ("red", "lime", "blue", "black")


def encoded(color: str, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(data, kind)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for color in COLORS:
        (tmp_path / f"{color}.png").write_bytes(encoded(color))
    return tmp_path


def write(path: Path, value: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def lines(path: Path, *entries: object) -> str:
    return write(path, "\n".join(json.dumps(entry) for entry in entries))


def seen(sample: Sample) -> list[list[str]]:
    """Every message of a sample: its words, and the colours of its pictures at their places."""
    names = {Image.new("RGB", (1, 1), color).getpixel((0, 0)): color for color in COLORS}
    messages = []
    for message in sample.messages():
        pictures = iter(message.images)
        messages.append(
            [
                text if kind == "text" else names[next(pictures).getpixel((0, 0))]
                for kind, text in message.parts()
            ]
        )
    return messages


def everything(spec: str, **options: Any) -> list[Sample]:
    return load_task(spec, **options).samples("all")


# -- forms of the field ---------------------------------------------------------------------


def llava(*values: str, **fields: object) -> dict[str, object]:
    sides = ("human", "gpt")
    return {"conversations": [{"from": sides[i % 2], "value": v} for i, v in enumerate(values)], **fields}


def test_llava_json(folder: Path) -> None:
    spec = write(
        folder / "llava.json",
        [
            llava("<image>\nWhat is this?", "A square.", id="a", image="red.png"),
            llava("What is this?\n<image>", "Red.", "And its size?", "Small.", id="b", image="red.png"),
            llava("no placeholder", "x", id="c", image="blue.png"),
            llava("<image> and <image>: which?", id="d", image=["red.png", "blue.png"]),
        ],
    )
    one, talk, bare, two = everything(spec)
    assert (one.id, one.prompt, one.answers, one.turns) == ("a", "What is this?", ("A square.",), ())
    assert seen(one) == [["red", "What is this?"]]
    assert seen(talk) == [["What is this?\n", "red"], ["Red."], ["And its size?"]]
    assert talk.answers == ("Small.",)
    assert seen(bare) == [["blue", "no placeholder"]]
    assert seen(two) == [["red", " and ", "blue", ": which?"]]
    assert two.answers == ()


def test_messages_of_the_openai_form(folder: Path) -> None:
    uri = f"data:image/png;base64,{base64.b64encode(encoded('blue')).decode()}"
    parts = [
        {"type": "text", "text": "first "},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": " then "},
        {"type": "image", "image": "red.png"},
        {"type": "text", "text": " which?"},
    ]
    spec = lines(
        folder / "chat.jsonl",
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "both"}]},
        {
            "messages": [{"role": "user", "content": "<image>what?"}],
            "images": ["lime.png"],
            "answers": ["x", "y"],
        },
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "so?"}]}],
            "image": "red.png",
        },
    )
    first, second, third = everything(spec)
    assert seen(first) == [["first ", "blue", " then ", "red", " which?"]]
    assert first.answers == ("both",)
    assert (seen(second), second.answers) == ([["lime", "what?"]], ("x", "y"))
    assert seen(third) == [["red", "so?"]]


def test_lines_of_llava_bench_and_sharegpt(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "001.png").write_bytes(encoded("black"))
    bench = lines(
        folder / "questions.jsonl",
        {"question_id": 0, "image": "001.png", "text": "What is it?", "category": "conv"},
    )
    (sample,) = everything(bench)
    assert (sample.id, sample.prompt, sample.group, seen(sample)[0][0]) == (
        "0",
        "What is it?",
        "conv",
        "black",
    )
    share = lines(
        folder / "share.json", llava("<image>\na?", "b", image="red.png"), llava("c?", "d", image="red.png")
    )
    assert [s.prompt for s in everything(share)] == ["a?", "c?"]


VQA = "v2_OpenEnded_mscoco_val2014_questions.json"


@pytest.mark.parametrize(
    "beside", ["v2_mscoco_val2014_annotations.json", "v2_OpenEnded_mscoco_val2014_annotations.json", None]
)
def test_vqa_v2(beside: str | None, tmp_path: Path) -> None:
    questions = [{"image_id": 42, "question": f"how many {i}?", "question_id": 42000 + i} for i in range(3)]
    annotations = [
        {
            "image_id": 42,
            "question_id": 42000 + i,
            "question_type": "how many",
            "answer_type": "number",
            "multiple_choice_answer": str(i),
            "answers": [{"answer": str(i), "answer_id": k} for k in range(10)],
        }
        for i in (2, 0, 1)
    ]
    whole: dict[str, object] = {"questions": questions, "data_subtype": "val2014", "data_type": "mscoco"}
    if beside is None:
        whole["annotations"] = annotations
    else:
        write(tmp_path / beside, {"annotations": annotations, "data_subtype": "val2014"})
    spec = write(tmp_path / VQA, whole)
    with pytest.raises(
        UserError, match=r"image_id 42 names no picture below .*COCO_val2014_000000000042\.jpg there"
    ):
        load_task(spec)
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").write_bytes(encoded("red", "JPEG"))
    samples = everything(spec)
    assert [(s.id, s.prompt, s.answers) for s in samples] == [
        (str(42000 + i), f"how many {i}?", (str(i),) * 10) for i in range(3)
    ]
    assert samples[0].open_images()[0].size == (8, 8)
    if beside is not None:
        with pytest.raises(UserError, match="holds annotations without their questions"):
            load_task(str(tmp_path / beside))
        write(tmp_path / beside, {"annotations": annotations[1:]})
        with pytest.raises(UserError, match=r"question 3 \(42002\) has no annotation"):
            load_task(spec)


def test_docvqa_and_other_json(folder: Path) -> None:
    spec = write(
        folder / "val_v1.0.json",
        {
            "dataset_name": "SP-DocVQA",
            "dataset_split": "val",
            "data": [
                {
                    "questionId": 7,
                    "question": "Which year?",
                    "image": "red.png",
                    "answers": ["1984"],
                    "data_split": "val",
                }
            ],
        },
    )
    (sample,) = everything(spec)
    assert (sample.id, sample.prompt, sample.answers) == ("7", "Which year?", ("1984",))
    keyed = write(
        folder / "problems.json",
        {
            "11": {
                "question": "Which?",
                "choices": ["cat", "dog"],
                "answer": 1,
                "image": "red.png",
                "hint": "Look.",
            },
            "12": {
                "question": "Who?",
                "choices": ["cat", "dog"],
                "answer": "cat",
                "image": "red.png",
                "hint": "",
            },
        },
    )
    first, second = everything(keyed)
    tail = "\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert (first.id, first.prompt, first.answers) == ("11", f"Look.\nWhich?{tail}", ("B",))
    assert (second.prompt, second.answers) == (f"Who?{tail}", ("A",))
    chart = write(folder / "chart.json", [{"imgname": "red.png", "query": "how many?", "label": "3"}])
    assert everything(chart)[0].answers == ("3",)


def test_mmmu_rows(folder: Path) -> None:
    record = {
        name: {"bytes": encoded(color), "path": None}
        for name, color in (("image_1", "red"), ("image_2", "lime"))
    }
    row = {
        "id": "v1",
        "question": "Is <image 1> like <image 2>?",
        "options": "['yes', 'no <image 3>']",
        "answer": "B",
    }
    rows = [row | record | {"image_3": {"bytes": encoded("blue"), "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "mmmu.parquet")
    (sample,) = everything(str(folder / "mmmu.parquet"))
    assert [piece for piece in seen(sample)[0] if piece in COLORS] == ["red", "lime", "blue"]
    assert seen(sample)[0][:4] == ["Is ", "red", " like ", "lime"]
    assert seen(sample)[0][4].startswith("?\nA. yes\nB. no ")
    assert sample.answers == ("B",)
    spec = lines(folder / "m.jsonl", {"image": "red.png", "prompt": "?", "options": "A or B"})
    with pytest.raises(UserError, match='options must be a list of texts, got "A or B"'):
        load_task(spec)


def test_mmbench_table(folder: Path) -> None:
    path = folder / "mmbench.tsv"
    big = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(big, "PNG")  # more than the 128 KiB that csv takes of a cell
    texts = [base64.b64encode(data).decode() for data in (encoded("red", "JPEG"), big.getvalue())]
    assert len(texts[1]) > 131072
    limit = csv.field_size_limit()
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(
            ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]
        )
        table.writerow([0, 'Which\n"one"?', "", "cat", "dog", "", "", "B", "animals", texts[0], "dev"])
        table.writerow([1, "Noise?", "Look.", "yes", "no", "maybe", "so", "A", "other", texts[1], "dev"])
        table.writerow([1000000, "Again?", "", "cat", "dog", "", "", "A", "animals", "0", "dev"])
    task = load_task(str(path))
    assert task.splits == ("dev", "all")
    first, second, third = task.samples("dev")
    end = "Answer with the option's letter from the given choices directly."
    assert (first.id, first.prompt) == ("0", f'Which\n"one"?\nA. cat\nB. dog\n{end}')
    assert second.prompt == f"Look.\nNoise?\nA. yes\nB. no\nC. maybe\nD. so\n{end}"
    assert (first.answers, first.group) == (("B",), "animals")
    assert np.array_equal(np.asarray(second.open_images()[0]), noise)
    assert third.open_images()[0].tobytes() == first.open_images()[0].tobytes()
    assert csv.field_size_limit() == limit


def test_tables_that_are_torn(folder: Path) -> None:
    for text, message in (
        ("image\tprompt\nred.png\tone\ttwo\n", r"t\.tsv:2: 3 cells under 2 columns"),
        ('image\tprompt\nred.png\t"open\nred.png\tb\n', r"not a table with quoted cells"),
        ("image\timage\nred.png\tb\n", "a column is there twice"),
        ("image\tprompt\n", "holds no samples"),
        ("", "holds no samples"),
        (
            "image;prompt\nred.png;b\n",
            r"t\.tsv: one column alone \(image;prompt\); put commas between columns, or tabs",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_task(write(folder / "t.tsv", text))


def test_webdataset_tars(folder: Path) -> None:
    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    (folder / "shards").mkdir()
    for shard, start in (("s-2.tar", 0), ("s-10.tar", 2)):
        with tarfile.open(folder / "shards" / shard, "w") as archive:
            for index in (start, start + 1):
                add(archive, f"./{index:04d}.jpg", encoded(COLORS[index], "PNG"))
                add(
                    archive,
                    f"./{index:04d}.json",
                    json.dumps({"question": f"q{index}?", "answer": "a"}).encode(),
                )
                add(archive, f"./._{index:04d}.jpg", b"notes of a Mac")
    for spec in (folder / "shards", folder / "shards" / "s-2.tar"):
        samples = everything(str(spec))
        count = 4 if spec.is_dir() else 2
        assert [seen(s) for s in samples] == [[[COLORS[i], f"q{i}?"]] for i in range(count)]
        assert [s.answers for s in samples] == [("a",)] * count
        assert len({s.id for s in samples}) == count
    with tarfile.open(folder / "captions.tar", "w") as archive:
        add(archive, "a.png", encoded("red"))
        add(archive, "a.txt", b"a caption")
    with pytest.raises(UserError, match=r"the fields are __key__, image, txt; call one of them prompt"):
        load_task(str(folder / "captions.tar"))
    assert everything(str(folder / "captions.tar"), columns="prompt=txt")[0].prompt == "a caption"
    (folder / "cut.tar").write_bytes((folder / "captions.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"cut\.tar"):
        everything(str(folder / "cut.tar"), columns="prompt=txt")[0].open_images()


def test_parquet_with_paths_bytes_and_records(folder: Path) -> None:
    table = pa.table(
        {
            "path": ["red.png", "lime.png", "blue.png"],
            "raw": [encoded("red"), encoded("lime"), encoded("blue")],
            "record": [
                {"bytes": encoded("red"), "path": "a"},
                {"bytes": None, "path": "lime.png"},
                {"bytes": encoded("blue"), "path": None},
            ],
            "several": [[encoded("red"), encoded("lime")], [encoded("lime")], [encoded("blue")]],
            "question": ["a?", "b?", "c?"],
            "answer": [1, 2, 3],
        }
    )
    path = folder / "sub" / "x.parquet"
    path.parent.mkdir()
    for color in COLORS:
        (folder / "sub" / f"{color}.png").write_bytes(encoded(color))
    pq.write_table(table, path, row_group_size=2)
    for column in ("path", "raw", "record", "several"):
        samples = everything(str(path), columns=f"image={column}")
        assert [seen(s)[0][0] for s in samples] == ["red", "lime", "blue"]
        assert [(s.prompt, s.answers) for s in samples] == [("a?", ("1",)), ("b?", ("2",)), ("c?", ("3",))]
    assert seen(everything(str(path), columns="image=several")[0]) == [["red", "lime", "a?"]]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"x\.parquet cannot be read as parquet"):
        load_task(str(path))


def test_dataset_folders_with_relative_paths_and_json_records(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    (folder / "set").mkdir()
    (folder / "set" / "red.png").write_bytes(encoded("red"))
    table = pa.table({"image": ["red.png"], "json": [{"question": "a?", "answer": "b"}]})
    pq.write_table(table, folder / "set" / "test.parquet")
    (sample,) = everything(str(folder / "set"))
    assert (sample.prompt, sample.answers, seen(sample)[0][0]) == ("a?", ("b",), "red")


def test_an_imagefolder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    (folder / "set").mkdir()
    for color in ("red", "blue"):
        (folder / "set" / f"{color}.png").write_bytes(encoded(color))
    entries = [
        {"file_name": f"{color}.png", "question": "colour?", "answer": color} for color in ("red", "blue")
    ]
    lines(folder / "set" / "metadata.jsonl", *entries)
    for spec in (folder / "set", folder / "set" / "metadata.jsonl"):
        assert [(seen(s)[0], s.answers) for s in everything(str(spec))] == [
            (["red", "colour?"], ("red",)),
            (["blue", "colour?"], ("blue",)),
        ]


# -- places of pictures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<image>\nq", ["red", "lime", "q"]),
        ("<image 1> is left of <image 2>?", ["red", " is left of ", "lime", "?"]),
        ("<image_2> before <image_1>", ["lime", " before ", "red"]),
        ("<image><image>q", ["red", "lime", "q"]),
        ("q <image>\n<image>", ["q ", "red", "lime"]),
        ("q", ["red", "lime", "q"]),
        ("<image 1> twice <image 1>", "must name each of its 2 images once"),
        ("<image 3> <image 1>", "must name each of its 2 images once"),
        ("<image 1> alone", "must name each of its 2 images once"),
        ("one <image> alone", "has 1 placeholders <image> and 2 images"),
        ("<image> <image 2>", "must name each"),
        ("<image><image><image>", "has 3 placeholders"),
        ("<video> q", "has 1 placeholders <video> and 0 videos"),
    ],
)
def test_pictures_stand_where_the_text_says(text: str, wanted: list[str] | str, folder: Path) -> None:
    spec = lines(folder / "m.jsonl", {"images": ["red.png", "lime.png"], "prompt": text})
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            load_task(spec)
    elif text.startswith("<image>\n"):
        with pytest.raises(UserError, match="has 1 placeholders <image> and 2 images"):
            load_task(spec)
    else:
        (sample,) = everything(spec)
        assert seen(sample) == [wanted]
        assert "<image" not in sample.prompt
        assert ("<image>" in sample.asked) == (text.startswith("<image>") is False and "<image" in text)


def test_places_reach_the_template() -> None:
    class Processor:
        chat_template = "x"

        def apply_chat_template(self, messages: list[dict[str, Any]], **options: object) -> str:
            return "".join(part.get("text", "[IMG]") for part in messages[0]["content"])

    pictures = (Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2)))
    turn = marked_turn("user", "a <image 1> b <image 2>", pictures, (), "x")
    assert chat_text(Processor(), "family", [turn.opened("s")]) == "a [IMG] b [IMG]"
    assert chat_text(Processor(), "family", [Message("user", "a", pictures)]) == "[IMG][IMG]a"
    with pytest.raises(UserError, match="offsets for pictures must have as many pictures"):
        Turn("user", "a", pictures, (), (1,))


# -- what is no file of samples -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "coco.json",
            {"info": {}, "images": [{"file_name": "a"}], "annotations": [{"caption": "x"}]},
            "holds annotations without their questions (fields info, images, annotations)",
        ),
        ("config.json", {"a": 1, "b": [1]}, "is a JSON object with the fields a, b; give a list of samples"),
        ("n.json", "3", 'not a file of samples, it begins with "3"'),
        ("n.json", "[1, 2]", "n.json: entry 1: must be a JSON object, got 1"),
        ("n.json", "[]", "holds no samples"),
        ("n.json", "", "holds no samples"),
        ("n.json", '[{"a": 1},', "n.json: not a JSON object"),
        ("x.zip", "PK", "x.zip is a packed file; unpack it"),
        ("x.tar.gz", "", "x.tar.gz is a packed file; unpack it"),
        ("x.png", "", "x.png is a picture; ask about it with --image and --prompt"),
        ("x.mp4", "", "x.mp4 is a film; name it in the field videos"),
        ("x.yaml", "", "x.yaml is a YAML file"),
        ("x.xlsx", "", "x.xlsx is a spreadsheet; save it as .csv"),
        ("x.arrow", "", "give the folder that save_to_disk wrote"),
        ("x.weird", "", "is a kind of file that is not read; give .jsonl"),
        ("notes.txt", "once upon a time", 'not a file of samples, it begins with "once upon a time"'),
    ],
)
def test_other_files_are_told_what_they_are(name: str, content: object, message: str, folder: Path) -> None:
    spec = write(folder / name, content)
    with pytest.raises(UserError) as caught:
        load_task(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["x.json", "./x.json", "a/b/x.json", "~/x.json", "file://{}/x.json", "{}/x.json"]
)
def test_files_are_known_for_files(spec: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    entry = [{"image": f"{folder}/red.png", "prompt": "?"}]
    write(folder / "x.json", entry)
    write(folder / "a" / "b" / "x.json", entry)
    assert len(everything(spec.format(folder))) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("https://a.org/x.jsonl", "task https://a.org/x.jsonl is a URL; download it first"),
        ("s3://bucket/x.parquet", "is a URL; download it first"),
        ("https://huggingface.co/datasets/org/name", "is a page of the Hub; give hf:org/name"),
        ("hf:https://huggingface.co/datasets/org/name/", "is a page of the Hub; give hf:org/name"),
        ("", "task '' is empty"),
        ("gone.json", "task file gone.json does not exist"),
        ("a/b/gone.parquet", "task file a/b/gone.parquet does not exist"),
        ("~/gone.tsv", "gone.tsv does not exist"),
        ("x" * 3000, "unknown task"),
        ("x" * 3000 + ".json", "does not exist"),
        ("./" + "y" * 3000, "does not exist"),
        ("a/" + "y" * 3000, "unknown task"),
        ("a\0b", "unknown task"),
        ("\ud83d", "unknown task"),
        ("~nobody-here/x.json", "does not exist"),
    ],
)
def test_specs_that_name_nothing_are_one_short_sentence(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task(spec)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 700
    str(caught.value).encode()


def test_options_of_datasets_are_refused_for_files(folder: Path) -> None:
    spec = lines(folder / "m.jsonl", {"photo": "red.png", "q": "?"})
    assert everything(spec, columns="image=photo,prompt=q")[0].prompt == "?"
    for option in ("split", "config", "revision"):
        with pytest.raises(UserError, match=f"{option} is an option of Hugging Face datasets"):
            load_task(spec, columns="image=photo,prompt=q", **{option: "x"})  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"m\.jsonl:1: column 'foto' \(for image\) is not there; the fields are photo, q"
    ):
        load_task(spec, columns="image=foto")


# -- fields ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["prompt", "question", "query", "text", "instruction"])
@pytest.mark.parametrize("answers", ["answers", "answer", "label", "ground_truth"])
def test_other_names_of_fields_are_the_same_everywhere(prompt: str, answers: str, folder: Path) -> None:
    row = {"image": str(folder / "red.png"), prompt: "colour?", answers: "red", "question_id": 5}
    spec = lines(folder / "m.jsonl", row)
    datasets.Dataset.from_list([row]).save_to_disk(folder / "set")
    for source in (spec, str(folder / "set")):
        (sample,) = everything(source)
        assert (sample.id, sample.prompt, sample.answers) == ("5", "colour?", ("red",))


def test_unknown_fields_are_named_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"image": "red.png", "prompt": "?", "answr": "red", "source": "me"}
    with caplog.at_level(logging.WARNING):
        load_task(lines(folder / "m.jsonl", *[row] * 5))
    (record,) = caplog.records
    assert "m.jsonl: not used: answr, source (fields of a sample are called id, image" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_task(
            lines(
                folder / "m.jsonl",
                {"id": 1, "image": "red.png", "question": "?", "answer": "x", "category": "c"},
            )
        )
    assert not caplog.records


def test_a_missing_prompt_names_the_fields_that_are_there(folder: Path) -> None:
    spec = lines(folder / "m.jsonl", {"image": "red.png", "frage": "?", "antwort": "x"})
    with pytest.raises(UserError) as caught:
        load_task(spec)
    assert str(caught.value) == (
        f"{spec}:1: prompt must be a text that is not empty, got null; the fields are image, frage, antwort; "
        "call one of them prompt, or name it with columns prompt=NAME"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"id": 1, "image": "red.png", "prompt": "?", "answers": ["\\ud83d"]}',
            "answers holds half a character",
        ),
        ('{"id": 1, "image": "red.png", "prompt": "\\ud83d?"}', "prompt holds half a character"),
        ('{"id": "\\udc00", "image": "red.png", "prompt": "?"}', "id holds half a character"),
        (
            '{"image": "red.png", "prompt": "?", "turns": [{"role": "user", "text": "\\udc00"}]}',
            "turns holds half",
        ),
        ('{"image": "red.png", "prompt": "?", "group": "\\udc00"}', "group holds half a character"),
        ("[" * 3000, "too deep to be read"),
        ('{"image": "red.png", "x": ' + "[" * 900 + "]" * 900 + "}", "prompt must be a text"),
        ('{"a": ' * 3000, "too deep to be read"),
        ('{"id": ' + "9" * 5000 + "}", "not a JSON object that can be read"),
        ('{"id": 1, "prompt": "a", "prompt": "b"}', 'the key "prompt" is there twice'),
        ('{"image": "red.png", "prompt": "?", "answers": {"x": NaN}, "id": NaN}', "id must be text"),
        (
            '{"image": "https://a.org/b.png", "prompt": "?"}',
            "image https://a.org/b.png is a URL; download it first",
        ),
        (
            '{"image": "red.png", "prompt": "?", "videos": ["https://a.org/b.mp4"]}',
            "is a URL; download it first",
        ),
        ('{"image": "' + "x" * 300 + '.png", "prompt": "?"}', "neither a path nor a picture in base64"),
        ('{"image": "red.png", "prompt": "?", "videos": ["' + "x" * 300 + '"]}', "neither a path nor"),
        ('{"image": ["red.png", 3], "prompt": "?"}', "image[1] must be a path, got 3"),
        ('{"image": {"a": 1}, "prompt": "?"}', 'image must be a path, got {"a": 1}'),
        (
            '{"conversations": "hello", "image": "red.png"}',
            'conversations must be a list of messages, got "hello"',
        ),
        ('{"conversations": [], "image": "red.png"}', "conversations must be a list of messages"),
        (
            '{"conversations": [{"from": "gpt", "value": "x"}], "image": "red.png"}',
            "must end with a message by the user",
        ),
        (
            '{"messages": [{"role": "system", "content": "be nice"}], "image": "red.png"}',
            "asks without system prompts",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}',
            'type must be text, image, image_url or video, got "audio"',
        ),
        (
            '{"conversations": [{"from": "human", "value": "<image><image>a"}], "image": "red.png"}',
            "has 2 placeholders <image> for 1 images",
        ),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "must have either image"),
        (
            '{"image": "red.png", "prompt": "?", "choices": ["a", "b"], "answer": "c"}',
            "must be a letter, the words or the index of one of 2 options",
        ),
        (
            '{"image": "red.png", "prompt": "?", "choices": ["a", "b"], "answer": 2}',
            "must be a letter, the words or the index",
        ),
    ],
)
def test_lines_that_cannot_be_right_are_refused_when_the_file_is_read(
    line: str, message: str, folder: Path
) -> None:
    good = '{"id": "good", "image": "red.png", "prompt": "?"}'
    spec = write(folder / "m.jsonl", f"{good}\n{line}\n")
    with pytest.raises(UserError) as caught:
        everything(spec)
    assert str(caught.value).startswith(f"{spec}:2: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 450 + 2 * len(spec)
    str(caught.value).encode()


def test_texts_that_no_file_can_store_are_refused_in_every_sample() -> None:
    for fields in ({"id": "\ud83d"}, {"prompt": "\ud83d"}, {"answers": ("\ud83d",)}, {"group": "\ud83d"}):
        with pytest.raises(UserError, match="holds half a character"):
            Sample(**{"id": "a", "images": (), "prompt": "?", **fields})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="turns of sample"):
        Sample("a", (), "?", turns=(Turn("user", "\udfff"),))


def test_ids_by_custom_that_repeat_are_not_taken(folder: Path) -> None:
    rows = [{"image": "red.png", "prompt": "?", "index": index} for index in (3, 3, 4)]
    assert [s.id for s in everything(lines(folder / "m.jsonl", *rows))] == ["1", "2", "3"]
    assert [s.id for s in everything(lines(folder / "m.jsonl", *rows[1:]))] == ["3", "4"]
    rows = [{"image": "red.png", "prompt": "?", "id": index} for index in (3, 3)]
    with pytest.raises(UserError, match="id '3' is taken already by"):
        load_task(lines(folder / "m.jsonl", *rows))


# -- datasets -------------------------------------------------------------------------------


def hub_rows(ids: list[int]) -> Any:
    return datasets.Dataset.from_dict(
        {
            "image": [Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in ids],
            "question": [f"q{i}?" for i in range(len(ids))],
            "answers": [[str(i)] for i in range(len(ids))],
            "question_id": ids,
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "question": datasets.Value("string"),
                "answers": datasets.Sequence(datasets.Value("string")),
                "question_id": datasets.Value("int64"),
            }
        ),
    )


class Hub:
    """A hub of one dataset that counts what is asked of it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, rows: Any, streams: bool = True, breaks: bool = False
    ) -> None:
        self.rows, self.streams, self.breaks = rows, streams, breaks
        self.whole: list[str] = []
        self.read = 0
        monkeypatch.setattr("datasets.load_dataset", self.load)
        monkeypatch.setattr("datasets.get_dataset_split_names", lambda *a, **k: ["validation", "test"])
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", self.info)

    def info(self, name: str, **options: object) -> Any:
        return type("Info", (), {"sha": "abc123"})()

    def load(
        self, name: str, config: str | None, split: str, revision: str | None, streaming: bool = False
    ) -> Any:
        if not streaming:
            self.whole.append(split)
            return self.rows
        if not self.streams:
            raise NotImplementedError("no stream")

        def rows() -> Iterator[dict[str, Any]]:
            for index in range(len(self.rows)):
                self.read += 1
                if self.breaks and index == 2:
                    raise OSError("connection reset")
                yield self.rows.cast_column("image", datasets.Image(decode=False))[index]

        return datasets.IterableDataset.from_generator(rows, features=self.rows.features)


def test_the_first_samples_of_a_hub_dataset_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, hub_rows(list(range(100, 140))))
    task = load_task("org/name", revision="main")
    assert task.provenance == {"dataset": "org/name", "split": "validation", "revision": "abc123"}
    few = task.samples("all", 5)
    assert hub.whole == []
    assert hub.read <= 12
    assert few[0].open_images()[0].getpixel((0, 0)) == (255, 255, 255)
    whole = task.samples("all")
    assert hub.whole == ["validation"]
    for a, b in zip(few, whole[:5], strict=True):
        assert (a.id, a.prompt, a.answers) == (b.id, b.prompt, b.answers)
        assert a.open_images()[0].tobytes() == b.open_images()[0].tobytes()
    half = load_task("org/name")
    assert [s.id for s in half.samples("search", 3)] == [s.id for s in half.samples("search")[:3]]


@pytest.mark.parametrize("breaks", [False, True])
def test_what_cannot_be_streamed_is_loaded_whole(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, hub_rows(list(range(9))), streams=breaks, breaks=breaks)
    assert [s.id for s in load_task("org/name").samples("all", 4)] == ["0", "1", "2", "3"]
    assert hub.whole == ["validation"]


def test_ids_that_repeat_are_the_same_in_a_stream_and_in_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, hub_rows([7, 8, 7, 9, 7]))
    task = load_task("org/name")
    assert [s.id for s in task.samples("all", 3)] == ["7", "8", "7-00002"]
    assert [s.id for s in task.samples("all")] == ["7", "8", "7-00002", "9", "7-00004"]


def test_a_saved_dataset_without_rows_is_one_sentence(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [], "prompt": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match=r"dataset .*none' has no rows"):
        load_task(str(tmp_path / "none")).samples("all")
    datasets.DatasetDict({"test": hub_rows([])}).save_to_disk(tmp_path / "empty")
    with pytest.raises(UserError, match="has no rows"):
        load_task(str(tmp_path / "empty")).samples("all")


def test_a_damaged_dataset_folder_is_one_sentence(tmp_path: Path) -> None:
    hub_rows([1, 2]).save_to_disk(tmp_path / "set")
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        path = tmp_path / "set" / name
        whole = path.read_bytes()
        for data in (b"", b"{}", b"[]", whole[: len(whole) // 2]):
            path.write_bytes(data)
            try:  # without its features it is read by the types of its columns
                read = [sample.prompt for sample in load_task(str(tmp_path / "set")).samples("all")]
            except UserError as error:
                message = str(error)
            else:
                assert (name, read) == ("dataset_info.json", ["q0?", "q1?"])
                message = "cannot be loaded"
            assert "cannot be loaded" in message
            assert "\n" not in message
            path.write_bytes(whole)


# -- what a task says of itself -------------------------------------------------------------


def test_a_split_says_what_it_leaves_out(folder: Path) -> None:
    task = load_task(
        lines(folder / "mine.jsonl", *[{"image": "red.png", "prompt": "?", "id": i} for i in range(30)])
    )
    sizes = task.sizes()
    assert sizes["search"] + sizes["held-out"] == sizes["all"] == 30
    assert sizes == {split: len(task.samples(split)) for split in task.splits}
    said = task.describe("search", 1000)
    assert said == (
        f"task 'mine': split 'search' has {sizes['search']} of 30 samples by a hash of their ids "
        f"(held-out {sizes['held-out']}); split all has every one; "
        f"1,000 samples asked for, {sizes['search']} there"
    )
    assert task.describe("all") == task.describe("all", 30) == ""
    assert load_task("shapes").describe("search", 5) == ""
    assert load_task("shapes:count").sizes()["search"] == 20


def test_fingerprints_tell_sources_apart(folder: Path) -> None:
    spec = lines(folder / "mine.jsonl", {"image": "red.png", "prompt": "?"})
    first = load_task(spec)
    assert first.provenance["file"] == "mine.jsonl"
    assert first.fingerprint() == load_task(spec).fingerprint()
    lines(folder / "mine.jsonl", {"image": "red.png", "prompt": "other?"})
    assert first.fingerprint() != load_task(spec).fingerprint()
    assert load_task("shapes").fingerprint() != load_task("shapes:count").fingerprint()
    hub_rows([1, 2]).save_to_disk(folder / "a")
    hub_rows([1, 3]).save_to_disk(folder / "b")
    one, two = (load_task(str(folder / name)).provenance for name in "ab")
    assert one["fingerprint"] != two["fingerprint"]


# -- answers in languages without spaces ----------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "score"),
    [
        ("token_f1", "左上角有一个红色圆形", "左上角有一个红色的圆形", 20 / 21),
        ("token_f1", "左上角有一个红色圆形。", "左上角有一个红色圆形", 1),
        ("token_f1", "猫", "犬", 0),
        ("token_f1", "the猫", "猫", 1),
        ("token_f1", "東京タワー", "東京タワ", 8 / 9),
        ("token_f1", "iPhone 手机", "iphone手机", 1),
        ("token_f1", "빨간 원", "빨간 사각형", 0.5),
        ("rouge_l", "一只红猫", "一只猫", 6 / 7),
        ("rouge_l", "two cats", "two dogs", 0.5),
        ("exact_match", "红色。", "红色", 1),
    ],
)
def test_words_of_languages_without_spaces(metric: str, prediction: str, answer: str, score: float) -> None:
    assert load_metric(metric)(prediction, [answer]) == pytest.approx(score)


# -- a campaign of damaged inputs -----------------------------------------------------------

LINE: dict[str, Any] = {
    "id": "q",
    "image": "red.png",
    "prompt": "what is <image>?",
    "answers": ["a", {"answer": "b"}],
    "turns": [{"role": "user", "text": "hello", "images": ["red.png"]}, {"role": "assistant", "text": "yes"}],
    "split": "dev",
    "group": "g",
}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "so?"}]},
        {"role": "assistant", "content": "yes"},
    ],
    "id": 3,
}
TALK: dict[str, Any] = llava("<image>\na?", "b", "c?", "d", id="t", image="red.png")
NAMES = st.sampled_from(
    [
        "id",
        "image",
        "images",
        "prompt",
        "question",
        "answers",
        "answer",
        "turns",
        "videos",
        "video",
        "split",
        "group",
        "conversations",
        "messages",
        "choices",
        "A",
        "B",
        "image_id",
        "role",
        "text",
        "from",
        "value",
        "content",
        "type",
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "red.png",
            "gone.png",
            "https://a/b",
            "data:,",
            "data:image/png;base64,AA",
            "user",
            "assistant",
            "human",
            "gpt",
            "<image>",
            "<image 1>",
            "<video>",
            "\ud83d",
            "\0",
            "..",
            "~",
            "x" * 5000,
            "image",
        ]
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_lines(draw: st.DrawFn) -> str:
    """One of three good lines, some values of which are replaced, added or gone, or its text damaged."""
    entry = json.loads(json.dumps(draw(st.sampled_from([LINE, CHAT, TALK]))))
    for _ in range(draw(st.integers(1, 3))):
        target: Any = entry
        for _ in range(draw(st.integers(0, 3))):
            inner = [
                v
                for v in (target.values() if isinstance(target, dict) else target)
                if isinstance(v, dict | list) and v
            ]
            if inner:
                target = draw(st.sampled_from(inner))
        if isinstance(target, dict):
            key = draw(st.sampled_from(sorted(target)) | NAMES if target else NAMES)
            if draw(st.integers(0, 4)) == 0:
                target.pop(key, None)
            else:
                target[key] = draw(VALUES)
        elif target:
            target[draw(st.integers(0, len(target) - 1))] = draw(VALUES)
    text = json.dumps(entry, ensure_ascii=draw(st.booleans()) or True)
    if draw(st.integers(0, 3)) == 0:
        start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        text = (
            text[:start]
            + draw(st.sampled_from(["", "[", "{", '"', "\\u", "\\ud83d", ",", "9" * 5000]))
            + text[end:]
        )
    return text


def right_or_refused(path: Path) -> None:
    """A file gives samples whose texts and pictures are whole, or a short sentence that names it."""
    try:
        samples = load_task(str(path)).samples("all")
        opened = [sample.messages() for sample in samples]
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 900 + 3 * len(str(path))
        message.encode()
        return
    for sample, messages in zip(samples, opened, strict=True):
        assert sample.id
        assert sample.prompt.strip()
        for turn in messages:
            assert all(picture.mode == "RGB" for picture in turn.pictures())
            assert [kind for kind, _ in turn.parts()].count("image") == len(turn.images)
        json.dumps([sample.id, sample.prompt, sample.answers, sample.asked]).encode()
        "".join([sample.id, sample.prompt, *sample.answers]).encode()


def campaign(test: Callable[..., None], examples: int) -> Callable[..., None]:
    wrapped = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )(test)
    return seed(20261127)(wrapped)


def check_line(folder: Path, line: str) -> None:
    path = folder / "m.jsonl"
    path.write_text(line, encoding="utf-8", errors="surrogatepass")
    right_or_refused(path)


def check_json(folder: Path, line: str, wrap: int) -> None:
    path = folder / "m.json"
    text = (
        f"[{line}]",
        f'{{"data": [{line}]}}',
        f'{{"questions": [{line}], "annotations": [{line}]}}',
        f'{{"k": {line}, "l": {line}}}',
        line,
    )
    path.write_text(text[wrap], encoding="utf-8", errors="surrogatepass")
    right_or_refused(path)


PICTURES = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "ppm": "PPM",
    "ico": "ICO",
    "tga": "TGA",
    "jp2": "JPEG2000",
    "pcx": "PCX",
    "sgi": "SGI",
    "dds": "DDS",
    "avif": "AVIF",
}
WHOLE = {ending: encoded("red", kind) for ending, kind in PICTURES.items()}


def damage(data: bytes, edits: list[tuple[int, int]], cut: int, head: bool) -> bytes:
    whole = bytearray(data)
    for position, value in edits:
        whole[position % (min(64, len(whole)) if head else len(whole))] = value
    return bytes(whole[: len(whole) - cut % len(whole)] if cut else whole)


def check_picture(folder: Path, ending: str, edits: list[tuple[int, int]], cut: int, head: bool) -> None:
    path = folder / f"a.{ending}"
    path.write_bytes(damage(WHOLE[ending], edits, cut, head))
    file = folder / "m.jsonl"
    file.write_text(json.dumps({"image": path.name, "prompt": "?"}))
    right_or_refused(file)


EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4)
DAMAGE = {
    "ending": st.sampled_from(sorted(PICTURES)),
    "edits": EDITS,
    "cut": st.integers(0, 400),
    "head": st.booleans(),
}


@pytest.mark.full  # a campaign
def test_damaged_lines(folder: Path) -> None:
    campaign(given(line=damaged_lines())(lambda line: check_line(folder, line)), 150)()


def test_damaged_json(folder: Path) -> None:
    test = given(line=damaged_lines(), wrap=st.integers(0, 4))(
        lambda line, wrap: check_json(folder, line, wrap)
    )
    campaign(test, 60)()


@pytest.mark.full  # a campaign
def test_damaged_pictures(folder: Path) -> None:
    campaign(given(**DAMAGE)(lambda **edits: check_picture(folder, **edits)), 150)()


@pytest.mark.slow  # minutes: the same three with many more examples
def test_damaged_inputs_at_length(folder: Path) -> None:
    campaign(given(line=damaged_lines())(lambda line: check_line(folder, line)), 1_500)()
    test = given(line=damaged_lines(), wrap=st.integers(0, 4))(
        lambda line, wrap: check_json(folder, line, wrap)
    )
    campaign(test, 600)()
    campaign(given(**DAMAGE)(lambda **edits: check_picture(folder, **edits)), 1_500)()


def test_a_task_of_a_plugin_needs_none_of_this() -> None:
    task = Task("mine", "anls", ("all",), lambda split: [Sample("a", (), "?")])
    assert (task.sizes(), task.describe("all", 9), dict(task.provenance)) == ({}, "", {})
