from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from avlprof.errors import UserError
from avlprof.tasks import Sample, Task, load_metric, load_preset, load_task, presets
from avlprof.tasks.huggingface import parse_columns
from avlprof.tasks.shapes.questions import QUESTIONS
from avlprof.tasks.shapes.scene import render, sample_scene
from avlprof.tasks.wording import Wording


def solid(color: str, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), color)


# -- shapes ---------------------------------------------------------------------------------


def test_shapes_repeat_and_do_not_depend_on_how_many_are_asked_for() -> None:
    for split in ("train", "search", "held-out"):
        few = load_task("shapes").samples(split, 7)
        many = load_task("shapes").samples(split, 40)
        for a, b in zip(few, many, strict=False):
            assert (a.id, a.prompt, a.answers, a.group) == (b.id, b.prompt, b.answers, b.group)
            assert np.array_equal(np.asarray(a.open_images()[0]), np.asarray(b.open_images()[0]))


def test_shapes_are_balanced_over_types() -> None:
    for n in (5, 12, 30):
        groups = Counter(s.group for s in load_task("shapes").samples("search", n))
        assert max(groups.values()) - min(groups.get(t, 0) for t in QUESTIONS) <= 1
    assert Counter(s.group for s in load_task("shapes").samples("search")) == dict.fromkeys(QUESTIONS, 20)


def test_shapes_splits_share_no_picture_and_no_id() -> None:
    splits = [load_task("shapes").samples(s, 100) for s in ("train", "search", "held-out")]
    pictures = [{s.open_images()[0].tobytes() for s in samples} for samples in splits]
    assert [len(p) for p in pictures] == [100, 100, 100]
    assert len(set.union(*pictures)) == 300
    assert len({s.id for samples in splits for s in samples}) == 300


@pytest.mark.parametrize("count", [100_001, 619_416_196, 10**40])
def test_more_samples_than_can_be_drawn_are_refused_at_once(count: int) -> None:
    """They were drawn until the memory was full. What has an end is all there for any number."""
    for task in ("shapes", "pages"):
        with pytest.raises(UserError, match="must be at most 100,000 in task"):
            load_task(task).samples("search", count)
    finite = Task("own", "exact_match", ("all",), lambda split: [Sample("a", (), "what?")])
    assert len(finite.samples("all", count)) == 1


def test_train_split_holds_the_pictures_of_training_and_the_others_do_not() -> None:
    trained = {render(sample_scene((0, 1, stage, i))).tobytes() for stage in (0, 1) for i in range(60)}
    for split, shared in (("train", 50), ("search", 0), ("held-out", 0)):
        drawn = {s.open_images()[0].tobytes() for s in load_task("shapes:describe").samples(split, 50)}
        assert len(drawn & trained) == shared


def test_a_sample_is_the_same_in_every_selection_of_types() -> None:
    alone = {s.id: s for s in load_task("shapes:shape").samples("held-out", 60)}
    mixed = {s.id: s for s in load_task("shapes").samples("held-out", 400)}
    common = alone.keys() & mixed.keys()
    assert common
    assert all(alone[i].prompt == mixed[i].prompt and alone[i].answers == mixed[i].answers for i in common)


@pytest.mark.parametrize("question_type", ["shape", "text_color", "read", "where"])
def test_scenes_without_an_unambiguous_question_are_passed_over(question_type: str) -> None:
    samples = load_task(f"shapes:{question_type}").samples("search", 60)
    numbers = [int(s.id.split("-")[1]) for s in samples]
    assert {s.group for s in samples} == {question_type}
    assert numbers == sorted(set(numbers))
    for number in set(range(numbers[-1])) - set(numbers):
        scene = sample_scene((0, 2, number))
        assert all(QUESTIONS[question_type](scene, np.random.default_rng(k)) is None for k in range(5))


def test_answers_describe_the_picture() -> None:
    for sample in load_task("shapes:describe").samples("held-out", 10):
        scene = sample_scene((0, 3, int(sample.id.split("-")[2])))
        assert sample.open_images()[0].tobytes() == render(scene).tobytes()
        assert len(sample.answers[0].split(", ")) == len(scene.items)
        assert all(item.name in sample.answers[0] for item in scene.items)


@pytest.mark.parametrize(
    ("spec", "metric"),
    [
        ("shapes", "exact_match"),
        ("shapes:describe", "token_f1"),
        ("shapes:read, row,colors", "token_f1"),
        ("shapes:describe,count", "exact_match"),
    ],
)
def test_metric_of_shapes_follows_the_types(spec: str, metric: str) -> None:
    task = load_task(spec)
    assert (task.metric, task.max_new_tokens) == (metric, 72)
    assert load_task(spec, metric="anls", max_new_tokens=9).metric == "anls"
    assert load_task(spec, max_new_tokens=9).max_new_tokens == 9


# -- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_task("shape"), "unknown task 'shape'; did you mean shapes"),
        (lambda: load_task("zzzz"), "unknown task 'zzzz'; known: ai2d, chartqa"),
        (lambda: load_task("textvqq"), "unknown task 'textvqq'; did you mean textvqa"),
        (lambda: load_task("shapes:descrbe"), "'descrbe'; did you mean describe"),
        (lambda: load_task("shapes:read,,row"), "unknown question type"),
        (lambda: load_task("shapes", metric="anl"), "unknown metric 'anl'; did you mean anls"),
        (lambda: load_task("shapes", max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (lambda: load_task("shapes", columns="image=x"), "columns is an option of Hugging Face datasets"),
        (lambda: load_task("./nowhere"), "task folder ./nowhere does not exist"),
        (lambda: load_task("nowhere.jsonl"), "task file nowhere.jsonl does not exist"),
        (lambda: load_task("hf:"), "lacks the name"),
        (lambda: load_task("shapes").samples("heldout"), "'heldout'; did you mean held-out"),
        (lambda: load_task("shapes").samples("search", 0), "at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_entry_points_add_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        name = "mine"

        @staticmethod
        def load() -> Callable[[str], Task]:
            return lambda rest: Task(f"mine:{rest}", "anls", ("all",), lambda split: iter(()))

    def entry_points(group: str) -> list[Any]:
        return [Plugin] if group == "avlprof.tasks" else []

    monkeypatch.setattr("avlprof.registry.entry_points", entry_points)
    assert load_task("mine:a:b").name == "mine:a:b"
    with pytest.raises(UserError, match="split 'all' of task 'mine:' is empty"):
        load_task("mine").samples("all")


@pytest.mark.full  # a process of its own
def test_tasks_import_without_torch_transformers_or_datasets() -> None:
    code = (
        "import sys; from avlprof.tasks import load_task\n"
        "load_task('shapes').samples('search', 3)[0].open_images()\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- JSONL ----------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: object) -> Path:
        path = tmp_path / "mine.jsonl"
        text = "\n".join(
            line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines
        )
        path.write_text(text + "\n", encoding="utf-8")
        return path

    (tmp_path / "pictures").mkdir()
    for color in ("red", "blue"):
        solid(color).save(tmp_path / "pictures" / f"{color}.png")
    return write


def test_jsonl_reads_every_form(write: Callable[..., Path], tmp_path: Path) -> None:
    red, blue = "pictures/red.png", str(tmp_path / "pictures" / "blue.png")
    path = write(
        {"id": "ö", "image": red, "prompt": "colour?", "answers": ["red", "rouge"], "group": "colours"},
        "",
        {"id": 7, "images": [red, blue], "prompt": "both?\u2028really?", "answers": "red and blue"},
        {"image": blue, "prompt": "untold", "extra": [1]},
    )
    first, second, third = load_task(str(path)).samples("all")
    assert (first.id, second.id, third.id) == ("ö", "7", "4")
    assert (first.answers, second.answers, third.answers) == (("red", "rouge"), ("red and blue",), ())
    assert (first.group, second.prompt) == ("colours", "both?\u2028really?")
    assert [i.getpixel((0, 0)) for i in second.open_images()] == [(255, 0, 0), (0, 0, 255)]


def test_jsonl_halves_are_disjoint_complete_and_stable(write: Callable[..., Path]) -> None:
    lines = [{"id": f"s{i}", "image": "pictures/red.png", "prompt": "?"} for i in range(400)]

    def halves(entries: list[dict[str, str]]) -> tuple[set[str], set[str]]:
        task = load_task(str(write(*entries)))
        assert task.splits == ("search", "held-out", "all")
        search, held_out = ({s.id for s in task.samples(split)} for split in ("search", "held-out"))
        assert search | held_out == {s.id for s in task.samples("all")}
        assert not search & held_out
        return search, held_out

    search, held_out = halves(lines)
    assert 150 < len(search) < 250
    fewer, _ = halves(lines[::-3])
    assert fewer == search & {str(line["id"]) for line in lines[::-3]}
    assert [s.id for s in load_task(str(write(*lines))).samples("search", 3)] == sorted(
        search, key=lambda i: int(i[1:])
    )[:3]
    assert "s0" in search  # `printf s0 | sha256sum` begins with ec, which is even
    assert "s2" in held_out  # and that of s2 with ad, which is odd


def test_jsonl_splits_of_its_own_win(write: Callable[..., Path]) -> None:
    entry = {"image": "pictures/red.png", "prompt": "?"}
    task = load_task(str(write(*({**entry, "split": s} for s in ("dev", "search", "dev")))))
    assert task.splits == ("dev", "search", "all")
    assert [s.id for s in task.samples("dev")] == ["1", "3"]
    assert len(task.samples("all")) == 3
    with pytest.raises(UserError, match=r"unknown split of task 'mine' 'held-out'"):
        task.samples("held-out")


GOOD = {"image": "pictures/red.png", "prompt": "?"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops}", "not a JSON object"),
        ("[1]", "must be a JSON object, got [1]"),
        ({"image": "pictures/red.png"}, "prompt must be a text that is not empty, got null"),
        ({**GOOD, "prompt": 5}, "prompt must be a text, got 5"),
        ({**GOOD, "prompt": " "}, 'prompt must be a text that is not empty, got " "'),
        ({"prompt": "?"}, "must have either image (a path) or images (a list of paths)"),
        ({**GOOD, "images": ["x"]}, "must have either image"),
        ({"images": [], "prompt": "?"}, "images must be a list of at least one path, got []"),
        ({"image": 3, "prompt": "?"}, "image must be a path, got 3"),
        ({**GOOD, "answers": [1]}, "answers must be a text or a list of texts, got [1]"),
        ({**GOOD, "id": 1.5}, "id must be text or a whole number, got 1.5"),
        ({**GOOD, "id": 1}, "id '1' is taken already by"),
        ({**GOOD, "split": "all"}, "split must be a name other than 'all'"),
        ({**GOOD, "image": "pictures/green.png"}, "pictures/green.png does not exist"),
    ],
)
def test_jsonl_errors_name_file_line_field_and_value(
    write: Callable[..., Path], bad: object, message: str
) -> None:
    path = write(GOOD, bad)
    with pytest.raises(UserError) as caught:
        load_task(str(path)).samples("all")
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_jsonl_needs_all_splits_or_none(write: Callable[..., Path]) -> None:
    path = write({**GOOD, "split": "dev"}, GOOD)
    with pytest.raises(UserError, match=r"mine\.jsonl:2: split is missing"):
        load_task(str(path))


def test_jsonl_without_samples_or_text_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="holds no samples"):
        load_task(str(write("")))
    path = write(GOOD)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        load_task(str(path))


def test_a_corrupt_picture_is_named_when_it_is_opened(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "pictures" / "red.png").write_bytes(b"no picture")
    sample = load_task(str(write({**GOOD, "id": "x"}))).samples("all")[0]
    with pytest.raises(UserError, match=r"red\.png of sample 'x' cannot be read"):
        sample.open_images()


# -- Hugging Face ---------------------------------------------------------------------------


def rows(n: int, start: int = 0) -> Any:
    return datasets.Dataset.from_dict(
        {
            "picture": [solid("red" if i % 2 else "blue", 8 + i) for i in range(start, start + n)],
            "question": [f"what is {i}?" for i in range(start, start + n)],
            "answers": [[str(i), "no"] for i in range(start, start + n)],
            "question_id": list(range(100 + start, 100 + start + n)),
        },
        features=datasets.Features(
            {
                "picture": datasets.Image(),
                "question": datasets.Value("string"),
                "answers": datasets.Sequence(datasets.Value("string")),
                "question_id": datasets.Value("int64"),
            }
        ),
    )


def test_saved_dataset_with_a_column_map(tmp_path: Path) -> None:
    rows(20).save_to_disk(tmp_path / "set")
    task = load_task(str(tmp_path / "set"), columns="image=picture, id=question_id", metric="vqa_accuracy")
    assert (task.name, task.metric, task.splits) == ("set", "vqa_accuracy", ("search", "held-out", "all"))
    everything = task.samples("all")
    assert [s.id for s in everything] == [str(100 + i) for i in range(20)]
    assert everything[3].prompt == "what is 3?"
    assert everything[3].answers == ("3", "no")
    picture = everything[3].open_images()[0]
    assert (picture.size, picture.getpixel((0, 0))) == ((11, 11), (255, 0, 0))
    search, held_out = ([s.id for s in task.samples(s)] for s in ("search", "held-out"))
    assert sorted(search + held_out) == [s.id for s in everything]
    assert search
    assert held_out
    late = {s.id: s for s in task.samples("held-out")}[held_out[-1]]
    assert late.open_images()[0].size == (8 + int(late.id) - 100,) * 2


def test_splits_of_a_dataset_go_by_their_names(tmp_path: Path) -> None:
    parts = {"train": rows(6), "validation": rows(8, 50)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    task = load_task(f"hf:{tmp_path / 'set'}", columns={"image": "picture"})
    assert task.splits == ("search", "held-out", "all", "train", "validation")
    assert [s.id for s in task.samples("train", 2)] == ["100", "101"]
    assert [s.id for s in task.samples("all")] == [s.id for s in task.samples("validation")]
    other = load_task(str(tmp_path / "set"), columns="image=picture", split="train")
    assert [s.id for s in other.samples("all")] == [s.id for s in task.samples("train")]
    with pytest.raises(UserError, match="'valid'; did you mean validation"):
        load_task(str(tmp_path / "set"), columns="image=picture", split="valid")


def test_a_folder_that_load_dataset_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    rows(5).to_parquet(tmp_path / "set" / "test.parquet")
    task = load_task(str(tmp_path / "set"), columns="image=picture,id=question_id", split="test[1:4]")
    assert [s.id for s in task.samples("all")] == ["101", "102", "103"]
    assert task.samples("all")[0].open_images()[0].size == (9, 9)
    assert len(task.samples("test")) == 5


def test_lists_of_pictures_paths_bytes_and_records(tmp_path: Path) -> None:
    solid("red").save(tmp_path / "red.png")
    encoded = (tmp_path / "red.png").read_bytes()
    images = datasets.Dataset.from_dict(
        {"images": [[solid("red"), solid("blue")], [solid("blue")], []], "prompt": ["a", "b", "c"]},
        features=datasets.Features(
            {"images": datasets.Sequence(datasets.Image()), "prompt": datasets.Value("string")}
        ),
    )
    images.save_to_disk(tmp_path / "lists")
    task = load_task(str(tmp_path / "lists"))
    first, second = task.samples("all", 2)
    assert [i.getpixel((0, 0)) for i in first.open_images()] == [(255, 0, 0), (0, 0, 255)]
    assert len(second.images) == 1
    assert (first.id, first.answers) == ("all-00000", ())
    with pytest.raises(
        UserError, match="row 2 of split 'all', column 'images': the list of pictures is empty"
    ):
        task.samples("all")

    records = [{"answer": "red", "answer_id": 1}, {"answer": "crimson", "answer_id": 2}]
    datasets.Dataset.from_dict(
        {
            "path": [str(tmp_path / "red.png"), str(tmp_path / "gone.png")],
            "bytes": [encoded, b"no picture"],
            "query": ["?", "?"],
            "records": [records, records],
            "label": [3, None],
        }
    ).save_to_disk(tmp_path / "odd")
    for column in ("path", "bytes"):
        task = load_task(str(tmp_path / "odd"), columns=f"image={column},answers=records")
        good, bad = task.samples("all")
        assert good.answers == ("red", "crimson")
        assert good.open_images()[0].getpixel((0, 0)) == (255, 0, 0)
        with pytest.raises(
            UserError, match=f"row 1 of split 'all', column '{column}': the picture cannot be read"
        ):
            bad.open_images()
    numbers = load_task(str(tmp_path / "odd"), columns="image=path").samples("all")
    assert [s.answers for s in numbers] == [("3",), ()]


def test_pictures_are_decoded_only_when_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(4).save_to_disk(tmp_path / "set")

    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    samples = load_task(str(tmp_path / "set"), columns="image=picture").samples("all")
    assert len(samples) == 4
    with pytest.raises(UserError, match="decoded"):
        samples[0].open_images()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "has no column for image among picture, question, answers, question_id"),
        ("image=pictur", "did you mean picture"),
        ("image=picture,id=answers", "column 'answers' (for id) of dataset"),
        ("image=picture,prompt=question_id", "column 'question_id' must hold a prompt, got 100"),
        ("image=picture,photo=image", "unknown field of columns 'photo'"),
        ("picture", "columns must be FIELD=COLUMN,..., got 'picture'"),
        ("image=a,image=b", "columns names field 'image' twice"),
    ],
)
def test_column_errors(tmp_path: Path, columns: str | None, message: str) -> None:
    table = rows(3)
    table = (
        table.remove_columns("answers").add_column("answers", ["same"] * 3).select_columns(table.column_names)
    )
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(UserError) as caught:
        load_task(str(tmp_path / "set"), columns=columns).samples("all")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_class_labels_answer_by_name_and_repeated_ids_are_not_taken(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(
        {"image": [solid("red")] * 3, "prompt": ["?"] * 3, "label": [1, 0, None], "id": ["a", "b", "a"]},
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "prompt": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["cat", "dog"]),
                "id": datasets.Value("string"),
            }
        ),
    ).save_to_disk(tmp_path / "set")
    samples = load_task(str(tmp_path / "set")).samples("all")
    assert [s.answers for s in samples] == [("dog",), ("cat",), ()]
    assert [s.id for s in samples] == ["all-00000", "all-00001", "all-00002"]
    with pytest.raises(UserError, match=r"column 'id' \(for id\) .* must not repeat a value"):
        load_task(str(tmp_path / "set"), columns="id=id")
    with pytest.raises(UserError, match="unknown field of columns 'photo'"):
        load_task(str(tmp_path / "set"), columns={"photo": "image"})


def test_parse_columns() -> None:
    assert parse_columns("image=a, prompt = b,answers=c=d") == {"image": "a", "prompt": "b", "answers": "c=d"}


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "avlprof\[datasets\]"'):
        load_task("org/name")


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_task("org/name")
    assert str(caught.value).startswith(
        "dataset 'org/name' is not in the local cache and the Hugging Face Hub"
    )


def test_a_folder_without_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_task(str(tmp_path))
    assert str(caught.value).startswith(f"dataset '{tmp_path}' cannot be loaded: ")
    assert "\n" not in str(caught.value)


# -- presets --------------------------------------------------------------------------------

TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")
PICTURE, TEXTS = datasets.Image(), datasets.Sequence(TEXT)

# Columns as the public dataset cards give them, with two rows each, and what the rows must become:
# (prompt, answers, group) of the first row.
PUBLISHED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], tuple[str, tuple[str, ...], str]]] = {
    "textvqa": (
        {"image_id": TEXT, "question_id": datasets.Value("int32"), "question": TEXT, "question_tokens": TEXTS,
         "image": PICTURE, "answers": TEXTS, "ocr_tokens": TEXTS},
        [{"image_id": "ab", "question_id": 34602 + i, "question": "what brand is it?", "question_tokens": [],
          "answers": ["nokia"] * 10, "ocr_tokens": []} for i in range(2)],
        ("what brand is it?\nAnswer the question using a single word or phrase.", ("nokia",) * 10, ""),
    ),
    "docvqa": (
        {"questionId": TEXT, "question": TEXT, "question_types": TEXTS, "image": PICTURE, "docId": NUMBER,
         "ucsf_document_id": TEXT, "answers": TEXTS, "data_split": TEXT},
        [{"questionId": str(i), "question": "Which year?", "question_types": ["form"], "docId": 1,
          "ucsf_document_id": "x", "answers": ["1984", "in 1984"], "data_split": "val"} for i in range(2)],
        ("Which year?\nAnswer the question using a single word or phrase.", ("1984", "in 1984"), ""),
    ),
    "chartqa": (
        {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE},
        [{"type": "human_test", "question": "How many {bars}?", "answer": "14"}] * 2,
        ("How many {bars}?\nAnswer the question with a single word.", ("14",), "human_test"),
    ),
    "vqav2": (
        {"question_type": TEXT, "multiple_choice_answer": TEXT,
         "answers": [{"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}],
         "image_id": NUMBER, "answer_type": TEXT, "question_id": NUMBER, "question": TEXT, "image": PICTURE},
        [{"question_type": "what", "multiple_choice_answer": "net", "image_id": 262148,
          "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": 1} for a in ("net", "nets")],
          "answer_type": "other", "question_id": 262148000 + i, "question": "Where is he looking?"}
         for i in range(2)],
        ("Where is he looking?\nAnswer the question using a single word or phrase.", ("net", "nets"),
         "other"),
    ),
    "flickr30k": (
        {"image": PICTURE, "caption": TEXTS, "sentids": TEXTS, "img_id": TEXT, "filename": TEXT},
        [{"caption": ["A dog.", "One dog runs."], "sentids": ["0", "1"], "img_id": "0", "filename": "a"}] * 2,
        ("Provide a one-sentence caption for the provided image.", ("A dog.", "One dog runs."), ""),
    ),
    "nocaps": (
        {"image": PICTURE, "image_id": datasets.Value("int32"), "image_file_name": TEXT,
         "annotations_ids": datasets.Sequence(datasets.Value("int32")), "annotations_captions": TEXTS},
        [{"image_id": i, "image_file_name": "a", "annotations_ids": [0], "annotations_captions": ["A baby."]}
         for i in range(2)],
        ("Provide a one-sentence caption for the provided image.", ("A baby.",), ""),
    ),
    "ocrbench": (
        {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": PICTURE},
        [{"dataset": "IIIT5K", "question": "what is written in the image?",
          "question_type": "Regular Text Recognition", "answer": ["CENTRE"]}] * 2,
        ("what is written in the image?", ("CENTRE",), "Regular Text Recognition"),
    ),
    "scienceqa": (
        {"image": PICTURE, "question": TEXT, "choices": TEXTS, "answer": datasets.Value("int8"), "hint": TEXT,
         "task": TEXT, "grade": TEXT, "subject": TEXT, "lecture": TEXT},
        [{"question": "Which is west?", "choices": ["Ohio", "Utah"], "answer": 1, "hint": hint, "task": "",
          "grade": "", "subject": "social science", "lecture": ""} for hint in ("", "A map.")],
        ("Which is west?\nA. Ohio\nB. Utah\nAnswer with the option's letter from the given choices directly.",
         ("B",), "social science"),
    ),
    "ai2d": (
        {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": PICTURE},
        [{"question": "What eats A?", "options": ["owl", "fox", "hen"], "answer": "2"}] * 2,
        ("What eats A?\nA. owl\nB. fox\nC. hen\n"
         "Answer with the option's letter from the given choices directly.", ("C",), ""),
    ),
}  # fmt: skip


def saved(folder: Path, name: str, rows: list[dict[str, Any]] | None = None) -> Path:
    features, published, _ = PUBLISHED[name]
    table = [{**row, "image": solid("red")} for row in rows or published]
    split = load_preset(name).split
    whole = datasets.Dataset.from_list(table, features=datasets.Features(features))
    datasets.DatasetDict({split: whole}).save_to_disk(folder / name)
    return folder / name


@pytest.mark.parametrize("name", presets())
def test_preset_reads_the_columns_of_the_dataset_card(name: str, tmp_path: Path) -> None:
    task = load_task(f"{name}:{saved(tmp_path, name)}")
    first, second = task.samples("all")
    assert (first.prompt, first.answers, first.group) == PUBLISHED[name][2]
    assert first.id != second.id
    assert first.open_images()[0].getpixel((0, 0)) == (255, 0, 0)
    assert task.name == name
    preset = load_preset(name)
    assert (task.metric, task.max_new_tokens) == (preset.metric, preset.max_new_tokens)
    assert load_metric(task.metric)(f" {first.answers[0]}", first.answers) > 0.2
    assert load_task(f"{name}:{tmp_path / name}", metric="contains", max_new_tokens=3).max_new_tokens == 3
    assert "not run on the hub" in " ".join(preset.checked.split())
    assert preset.source.startswith("https://")


def test_halves_of_a_preset_share_no_picture(tmp_path: Path) -> None:
    rows = [
        {**PUBLISHED["textvqa"][1][0], "question_id": i, "image_id": f"picture{i % 7}"} for i in range(60)
    ]
    task = load_task(f"textvqa:{saved(tmp_path, 'textvqa', rows)}")
    pictures = [{int(s.id) % 7 for s in task.samples(half)} for half in ("search", "held-out")]
    assert pictures[0] | pictures[1] == set(range(7))
    assert not pictures[0] & pictures[1]


def test_empty_line_of_a_template_is_left_out_and_a_full_one_is_not(tmp_path: Path) -> None:
    _, hinted = load_task(f"scienceqa:{saved(tmp_path, 'scienceqa')}").samples("all")
    assert hinted.prompt.startswith("Context: A map.\nWhich is west?\nA. Ohio")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "9"}, "the answer must be an index into 3 choices, got '9'"),
        ({"answer": "owl"}, "the answer must be an index into 3 choices, got 'owl'"),
        ({"options": None}, "column 'options' must hold a list of choices"),
    ],
)
def test_preset_names_the_row_that_does_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, "ai2d", [PUBLISHED["ai2d"][1][0] | change])
    with pytest.raises(UserError, match="row 0 of split 'test'") as caught:
        load_task(f"ai2d:{folder}").samples("all")
    assert message in str(caught.value)


def test_preset_on_other_columns_is_refused_with_their_names(tmp_path: Path) -> None:
    folder = saved(tmp_path, "ai2d")
    with pytest.raises(UserError, match=r"column .* of dataset"):
        load_task(f"scienceqa:{folder}")
    with pytest.raises(UserError, match=r"split of dataset .* 'validation'"):
        load_task(f"textvqa:{folder}")
    assert load_task(f"ai2d:{folder}", columns="group=question").samples("all")[0].group == "What eats A?"


@pytest.mark.parametrize(
    ("template", "choices"), [("{question}", "options"), ("{choices}", None), ("{question", None)]
)
def test_wording_refuses_what_it_could_not_fill(template: str, choices: str | None) -> None:
    with pytest.raises(UserError, match="template"):
        Wording(template, choices)
