"""Pictures as a viewer shows them, the same by every way in, or a sentence that names the file."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from avlprof.errors import UserError
from avlprof.run import picture_task
from avlprof.tasks import Sample, load_task
from avlprof.tasks.picture import PictureLimits, open_picture
from avlprof.tasks.source import picture_source
from avlprof.tasks.video import frames_of


def corner(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """White, with a red quarter at the top left and a blue one at the bottom right."""
    picture = Image.new("RGB", size, "white")
    picture.paste("red", (0, 0, size[0] // 2, size[1] // 2))
    picture.paste("blue", (size[0] // 2, size[1] // 2, *size))
    return picture


def turned(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner().save(path, exif=exif, quality=100, subsampling=0)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header tells a size, with next to nothing in it."""

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


def by_jsonl(path: Path) -> Image.Image:
    file = path.parent / f"{path.stem}.jsonl"
    file.write_text(json.dumps({"image": path.name, "prompt": "?"}))
    return load_task(str(file)).samples("all")[0].messages()[-1].images[0]


def by_option(path: Path) -> Image.Image:
    return picture_task([path], "?").samples("all")[0].open_images()[0]


def by_pillow(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return picture_task([image], "?").samples("all")[0].open_images()[0]


def by_uri(path: Path) -> Image.Image:
    uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    file = path.parent / f"{path.stem}-uri.jsonl"
    file.write_text(json.dumps({"image": uri, "prompt": "?"}))
    return load_task(str(file)).samples("all")[0].open_images()[0]


def by_table(path: Path) -> Image.Image:
    file = path.parent / f"{path.stem}.tsv"
    text = base64.b64encode(path.read_bytes()).decode()
    file.write_text(f"index\tquestion\timage\n1\twhat?\t{text}\n")
    return load_task(str(file)).samples("all")[0].open_images()[0]


def by_frame(path: Path) -> Image.Image:
    return Sample("s", (), "?", videos=((path,),)).messages()[0].videos[0][0]


def by_dataset(path: Path, kind: str) -> Image.Image:
    cell: object = str(path) if kind in ("path", "feature") else path.read_bytes()
    feature = (
        datasets.Image() if kind == "feature" else datasets.Value("string" if kind == "path" else "binary")
    )
    rows = datasets.Dataset.from_dict(
        {"image": [cell], "prompt": ["?"]},
        features=datasets.Features({"image": feature, "prompt": datasets.Value("string")}),
    )
    rows.save_to_disk(path.parent / f"{path.stem}-{kind}")
    return load_task(str(path.parent / f"{path.stem}-{kind}")).samples("all")[0].open_images()[0]


WAYS: dict[str, Callable[[Path], Image.Image]] = {
    "jsonl": by_jsonl,
    "option": by_option,
    "pillow": by_pillow,
    "uri": by_uri,
    "table": by_table,
    "frame": by_frame,
    "hf path": lambda path: by_dataset(path, "path"),
    "hf bytes": lambda path: by_dataset(path, "bytes"),
    "hf feature": lambda path: by_dataset(path, "feature"),
}


def clear(mode: str) -> Image.Image:
    """Black and wholly transparent, with a black square that is not."""
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (2, 2, 6, 6))
    return picture.convert(mode)


SQUARE = np.full((8, 8, 3), 255, np.uint8)
SQUARE[2:6, 2:6] = 0
RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def save(folder: Path, name: str) -> tuple[Path, np.ndarray]:
    """A picture file of a kind, and the pixels that a viewer shows of it."""
    path = folder / f"{name}.png"
    if name in ("RGBA", "LA"):
        clear(name).save(path)
        return path, SQUARE
    if name == "palette":
        flat = Image.new("P", (8, 8), 0)
        flat.putpalette([0, 0, 0, 0, 0, 0])
        flat.paste(1, (2, 2, 6, 6))
        flat.save(path, transparency=0)
        return path, SQUARE
    if name == "colour key":
        flat = Image.new("RGB", (8, 8), (9, 9, 9))
        flat.paste((0, 0, 0), (2, 2, 6, 6))
        flat.save(path, transparency=(9, 9, 9))
        return path, SQUARE
    if name == "16 bits":
        Image.fromarray(RAMP).save(path)
        return path, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if name == "1 bit":
        Image.fromarray(SQUARE[..., 0]).convert("1").save(path)
        return path, SQUARE
    if name == "cmyk":
        path = path.with_suffix(".tif")
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
        return path, np.broadcast_to(np.array([255, 0, 0], np.uint8), (8, 8, 3))
    if name == "grey tiff":
        path = path.with_suffix(".tif")
        Image.fromarray(RAMP).save(path)
        return path, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=2)
    raise KeyError(name)


KINDS = ("RGBA", "LA", "palette", "colour key", "16 bits", "1 bit", "cmyk", "grey tiff")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_in_gives_what_a_viewer_shows(kind: str, way: str, tmp_path: Path) -> None:
    path, wanted = save(tmp_path, kind)
    picture = WAYS[way](path)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_pictures_stand_upright(way: str, ending: str, tmp_path: Path) -> None:
    """Orientation 6: the camera was held on its side, so viewers turn the picture by 90 degrees."""
    picture = WAYS[way](turned(tmp_path / f"photo.{ending}", 6))
    assert picture.size == (40, 60)
    assert np.abs(np.asarray(picture, int)[5, 35] - (255, 0, 0)).max() < 30
    assert np.abs(np.asarray(picture, int)[55, 5] - (0, 0, 255)).max() < 30


@pytest.mark.parametrize(
    ("orientation", "red"),
    [
        (1, (5, 5)),
        (2, (55, 5)),
        (3, (55, 35)),
        (4, (5, 35)),
        (5, (5, 5)),
        (6, (35, 5)),
        (7, (35, 55)),
        (8, (5, 55)),
    ],
)
def test_all_eight_orientations(orientation: int, red: tuple[int, int], tmp_path: Path) -> None:
    """Where the corner that is stored at the top left is seen, after the table of the EXIF standard."""
    picture = open_picture(turned(tmp_path / "a.png", orientation), "a")
    assert picture.size == ((60, 40) if orientation < 5 else (40, 60))
    assert picture.getpixel(red) == (255, 0, 0)
    assert open_picture(picture, "again").tobytes() == picture.tobytes()


def test_broken_exif_leaves_a_picture_as_it_lies(tmp_path: Path) -> None:
    corner().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12broken")
    assert open_picture(tmp_path / "a.jpg", "a").size == (60, 40)


@pytest.mark.parametrize(
    ("mode", "values", "wanted"),
    [
        ("I", [0, 256, 65535], [0, 1, 255]),
        ("I", [0, 128, 255], [0, 128, 255]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [0.0, 128.0, 255.0], [0, 128, 255]),
        ("F", [0.0, 256.0, 65535.0], [0, 1, 255]),
        ("F", [0.0, 0.5, 1.5], None),
        ("F", [0.0, 0.5, float("nan")], None),
        ("F", [0.0, 0.5, float("inf")], None),
        ("F", [-1.0, 0.0, 1.0], None),
        ("I", [0, 5, 70000], None),
        ("I", [-1, 5, 7], None),
    ],
)
def test_deep_grey_is_scaled_or_refused(mode: str, values: list[float], wanted: list[int] | None) -> None:
    array = np.array([values], np.int32 if mode == "I" else np.float32)
    picture = Image.fromarray(array)
    assert picture.mode == mode
    if wanted is None:
        with pytest.raises(UserError, match=r"^a picture holds numbers from .* whose white is not known"):
            open_picture(picture, "a picture")
    else:
        assert np.asarray(open_picture(picture, "a"))[0, :, 0].tolist() == wanted


def test_other_modes() -> None:
    red = Image.new("RGB", (4, 4), "red")
    for mode in ("HSV", "YCbCr", "RGBX", "P", "CMYK"):
        pixel = open_picture(red.convert(mode), mode).getpixel((0, 0))
        assert np.abs(np.array(pixel) - (255, 0, 0)).max() <= 2, mode
    lab = Image.merge("LAB", [Image.new("L", (4, 4), level) for level in (255, 128, 128)])
    assert min(open_picture(lab, "lab").getpixel((1, 1))) >= 253  # type: ignore[type-var]
    for mode in ("La", "RGBa"):
        flat = open_picture(clear("LA" if mode == "La" else "RGBA").convert(mode), mode)
        assert np.array_equal(np.asarray(flat), SQUARE)
    inverted = Image.fromarray(RAMP)
    assert np.asarray(open_picture(inverted, "a"))[7, 7, 0] == 255


def test_sixteen_bits_of_colour_and_white_that_is_zero() -> None:
    """Colour of 16 bits is read by Pillow itself, and by the same rule: the upper byte."""
    values = np.array([0, 255, 256, 32767, 65535], ">u2")
    body = b"\0" + np.repeat(values[:, None], 3, axis=1).tobytes()
    head = struct.pack(">IIBBBBB", 5, 1, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )
    wanted = [int(value) >> 8 for value in values]
    assert np.asarray(open_picture(data, "a"))[0, :, 0].tolist() == wanted
    grey = Image.fromarray(values[None].astype(np.uint16))
    assert np.asarray(open_picture(grey, "a"))[0, :, 0].tolist() == wanted
    file = io.BytesIO()
    grey.save(file, "TIFF", tiffinfo={262: 0})
    assert np.asarray(open_picture(file.getvalue(), "a"))[0, :, 0].tolist() == [
        255 - level for level in wanted
    ]


def test_animations_and_pages_are_refused_but_not_what_a_camera_adds(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match=rf"{name[:1]}\.{name[2:]} of sample 's' has 3 frames or pages"):
            Sample("s", (tmp_path / name,), "?").messages()
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])
    assert np.asarray(open_picture(tmp_path / "a.mpo", "a"))[0, 0, 0] > 250
    frames[0].save(tmp_path / "one.gif")
    assert open_picture(tmp_path / "one.gif", "a").getpixel((0, 0)) == (255, 0, 0)
    with Image.open(tmp_path / "a.gif") as opened:  # the caller chose a frame of it
        opened.seek(1)
        assert open_picture(opened, "a").getpixel((0, 0)) == (0, 0, 255)


HUGE = {
    "30000x30000 header": (png_header(30000, 30000), "30,000 x 30,000 pixels, more than 64,000,000"),
    "13000x13000 header": (png_header(13000, 13000), "13,000 x 13,000 pixels, more than 64,000,000"),
    "1x30000 header": (png_header(1, 30000), "1 x 30,000 pixels, one side more than 200 times"),
    "30000x1 header": (png_header(30000, 1), "one side more than 200 times"),
}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "pillow"])
@pytest.mark.parametrize("kind", HUGE)
def test_huge_and_thin_pictures_are_refused_by_their_header(kind: str, way: str, tmp_path: Path) -> None:
    data, message = HUGE[kind]
    path = tmp_path / "big.png"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        WAYS[way](path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400 + 2 * len(str(tmp_path))


def test_limits_are_adjustable(monkeypatch: pytest.MonkeyPatch) -> None:
    thin = Image.new("RGB", (1, 300))
    with pytest.raises(UserError, match="set AVLPROF_MAX_ASPECT"):
        open_picture(thin, "a")
    assert open_picture(thin, "a", PictureLimits(aspect=300)).size == (1, 300)
    monkeypatch.setenv("AVLPROF_MAX_ASPECT", "300")
    assert open_picture(thin, "a").size == (1, 300)
    monkeypatch.setenv("AVLPROF_MAX_PIXELS", "299")
    with pytest.raises(UserError, match=r"more than 299 in all; make it smaller, or set AVLPROF_MAX_PIXELS"):
        open_picture(thin, "a")
    monkeypatch.setenv("AVLPROF_MAX_PIXELS", "200_000_000")
    data = io.BytesIO()
    Image.new("1", (12000, 12000)).save(data, "PNG")  # between the limit of Pillow and ours
    assert open_picture(data.getvalue(), "a").size == (12000, 12000)
    for wrong in ("many", "0", "nan", "-3", "inf"):
        monkeypatch.setenv("AVLPROF_MAX_PIXELS", wrong)
        with pytest.raises(UserError, match="AVLPROF_MAX_PIXELS must be a number of at least 1"):
            open_picture(thin, "a")


def test_empty_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="a is 0 x 5 pixels, so it shows nothing"):
        open_picture(Image.new("RGB", (0, 5)), "a")


def broken(tmp_path: Path) -> dict[str, bytes]:
    corner().save(tmp_path / "whole.png")
    corner((200, 200)).effect_spread(30).save(tmp_path / "whole.jpg")
    png, jpg = ((tmp_path / f"whole.{e}").read_bytes() for e in ("png", "jpg"))
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 70_000_000, zip=True)
    corner().save(tmp_path / "text.png", pnginfo=text)
    return {
        "cut png": png[: len(png) // 2],
        "cut jpg": jpg[: len(jpg) // 2],
        "flipped": png[:60] + b"\xff\xff\xff\xff" + png[64:],
        "broken chunk": png[:33] + b"\0\0\0\5????" + png[33:],
        "text bomb": (tmp_path / "text.png").read_bytes(),
        "empty": b"",
        "text": b"no picture",
        "html": b"<!DOCTYPE html><html>404</html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0" + b"\0" * 64,
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "zero size": png_header(0, 0),
    }


@pytest.mark.parametrize("lenient", [False, True])
def test_broken_files_are_one_sentence(
    lenient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another library has made Pillow pad cut files with grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    for kind, data in broken(tmp_path).items():
        path = tmp_path / "bad.png"
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.png of sample 's' ") as caught:
            Sample("s", (path,), "?").messages()
        assert "\n" not in str(caught.value), kind
        assert len(str(caught.value)) < 500 + len(str(tmp_path)), kind
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient
    assert Image.MAX_IMAGE_PIXELS is not None


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "gone.png", "gone.png of sample 's' does not exist"),
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "is no regular file"),
        (tmp_path / ("x" * 3000), "does not exist"),
        (tmp_path / "a\0b", "does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Sample("s", (path,), "?").messages()
        assert len(str(caught.value)) < 400


# -- what is written for a picture ----------------------------------------------------------


def test_urls_and_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        "https://a.org/x.png",
        "http://a.org/x.png",
        "s3://bucket/x.png",
        "gs://b/x.png",
        "HTTPS://a/x.png",
    ):
        for written in (url, Path(url)):
            with pytest.raises(UserError, match=rf"image {url} is a URL; download it first"):
                picture_task([written], "?")
    corner().save(tmp_path / "a b.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "a b.png"
    for written in (
        file.as_uri(),
        f"file://localhost{file}",
        f"file:{file}",
        Path(f"file://{file}"),
        "~/a b.png",
    ):
        task = picture_task([written], "?")
        assert task.samples("all")[0].images == (file,), written
    assert picture_source("a.png", tmp_path, "image") == tmp_path / "a.png"
    with pytest.raises(UserError, match="image is a data URI, which a path cannot hold"):
        picture_task([Path("data:image/png;base64,AA//BB")], "?")  # a path makes one slash of two


def test_encoded_pictures_are_decoded_and_never_quoted(tmp_path: Path) -> None:
    corner().save(tmp_path / "a.png")
    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    for written in (
        text,
        text.rstrip("="),
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        text.replace("+", "-").replace("/", "_"),
        f"data:image/png;base64,{text}",
        f"DATA:;BASE64,{text}",
    ):
        source = picture_source(written, tmp_path, "image")
        assert open_picture(source, "a").tobytes() == corner().tobytes()
    for bad in (
        f"data:image/png;base64,{text[:-40]}",
        text[: len(text) // 2],
        "A" * 9000,
        f"data:{text}",
        "x" * 300,
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps({"image": bad, "prompt": "?"}))
        with pytest.raises(UserError, match=r"bad\.jsonl:1: image") as caught:
            load_task(str(tmp_path / "bad.jsonl")).samples("all")[0].messages()
        assert len(str(caught.value)) < 400 + len(str(tmp_path))


# -- videos ---------------------------------------------------------------------------------


def test_frames_are_in_natural_order_without_hidden_files(tmp_path: Path) -> None:
    for number in range(1, 12):
        corner().save(tmp_path / f"frame{number}.png")
        (tmp_path / f"._frame{number}.png").write_bytes(b"a Mac's notes")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    names = [path.name for path in frames_of(tmp_path, "s")]  # type: ignore[union-attr]
    assert names == [f"frame{number}.png" for number in range(1, 12)]


def test_names_that_count_in_two_ways_are_refused(tmp_path: Path) -> None:
    for name in ("t0.5", "t0.25"):
        corner().save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match="order is not clear"):
        frames_of(tmp_path, "s")
    (tmp_path / "t0.25.png").rename(tmp_path / "t0.75.png")
    assert [path.name for path in frames_of(tmp_path, "s")] == ["t0.5.png", "t0.75.png"]  # type: ignore[union-attr]


def test_a_film_without_pyav_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'pip install "avlprof\[video\]", or write its frames to a folder'):
        frames_of(tmp_path / "clip.mp4", "s")


def test_a_film_gives_two_frames_a_second(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="decoding films needs PyAV")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(30):  # three seconds, from black to white
            grey = Image.new("RGB", (64, 48), (number * 8,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(grey)))
        container.mux(stream.encode())
    (message,) = Sample("s", (), "?", videos=(path,)).messages()
    levels = [int(np.asarray(frame).mean()) for frame in message.videos[0]]
    assert [frame.size for frame in message.videos[0]] == [(64, 48)] * 6
    assert np.abs(np.array(levels) - np.array([0, 40, 80, 120, 160, 200])).max() < 8
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"clip\.mp4 of sample 's' is a file, which avlprof does not decode"):
        frames_of(path, "s")
