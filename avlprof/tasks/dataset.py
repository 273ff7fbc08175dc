"""A Hugging Face dataset: its splits, its rows whole or as a stream, and where it comes from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from avlprof.errors import UserError
from avlprof.tasks.splits import ALL
from avlprof.tasks.text import printable, shorten


@dataclass(frozen=True)
class Dataset:
    """A dataset: names of its splits, how one is loaded whole, and as a stream where that works."""

    name: str
    splits: list[str]
    load: Callable[[str], Any]
    stream: Callable[[str], Any] | None = None
    folder: Path | None = None

    def rows_of_stream(self, split: str) -> Any:
        """The rows of a split as a stream; None where it can only be loaded whole."""
        if self.stream is None or "[" in split:
            return None
        try:
            rows = self.stream(split)
        except Exception:  # whatever it is, loading the split whole works or says in a sentence why not
            return None
        return rows if getattr(rows, "features", None) else None

    def provenance(self, split: str, config: str | None, revision: str | None) -> dict[str, str]:
        """Name, split and configuration, with the commit of the Hub or a digest of the folder."""
        texts = {"dataset": Path(self.name).name if self.folder else self.name, "split": split}
        if config is not None:
            texts["config"] = config
        if self.folder is None:
            return texts | {"revision": _commit(self.name, revision)}
        return texts | {"fingerprint": _fingerprint(self.folder)}


def open_dataset(name: str, config: str | None = None, revision: str | None = None) -> Dataset:
    """The dataset of a folder (of `save_to_disk`, or of data files) or of a name on the Hub.

    Raises:
        UserError: the `datasets` package is missing, the Hub out of reach, or nothing can be read.
    """
    return _saved(name) if _is_saved(name) else _loadable(name, config, revision)


def _commit(name: str, revision: str | None) -> str:
    """The commit of a dataset that a revision stands for; the revision itself without the Hub."""
    try:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(name, revision=revision, timeout=10).sha)
    except Exception:  # what the Hub's client raises has no common root; the name of the revision is enough
        return revision or "main"


def _fingerprint(folder: Path) -> str:
    """A digest of the names and sizes of the files of a folder, and of its small text files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(
            f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode(errors="replace")
        )
        if path.suffix in (".json", ".jsonl", ".csv") and path.stat().st_size < 1 << 24:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_saved(name: str) -> bool:
    return any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))


def _saved(folder: str) -> Dataset:
    """The dataset that `save_to_disk` wrote."""
    datasets = _datasets()
    with _explained(folder, datasets):
        try:
            data = datasets.load_from_disk(folder)
        except IndexError:  # it has no files of data
            raise UserError(f"dataset '{folder}' has no rows; save it with some") from None
    if isinstance(data, datasets.DatasetDict):
        if not data:
            raise UserError(f"dataset '{folder}' has no splits; save it anew")
        return Dataset(folder, list(data), lambda split: data[split], folder=Path(folder))
    name = str(data.split) if data.split is not None else ALL
    return Dataset(folder, [name], lambda split: data, folder=Path(folder))


def _loadable(name: str, config: str | None, revision: str | None) -> Dataset:
    """A dataset that `load_dataset` knows; one on the Hub can be streamed."""
    datasets = _datasets()

    def load(split: str) -> Any:
        with _explained(name, datasets):
            return datasets.load_dataset(name, config, split=split, revision=revision)

    def stream(split: str) -> Any:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)

    with _explained(name, datasets):
        splits = list(datasets.get_dataset_split_names(name, config, revision=revision))
    if not splits:
        raise UserError(f"dataset '{name}' has no splits; give another dataset")
    if os.path.isdir(name):
        return Dataset(name, splits, load, folder=Path(name))
    return Dataset(name, splits, load, stream)


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(
            'Hugging Face datasets need a package more: pip install "avlprof[datasets]"'
        ) from None
    module: ModuleType = datasets
    return module


@contextmanager
def _explained(name: str, datasets: ModuleType) -> Iterator[None]:
    """Turns what `datasets` raises into one sentence."""
    short = printable(shorten(name, 200))
    try:
        yield
    except UserError:
        raise
    except ConnectionError:
        raise UserError(
            f"dataset '{short}' is not in the local cache and the Hugging Face Hub cannot be reached; "
            "use a local folder or .jsonl file, or the task shapes"
        ) from None
    except Exception as error:  # its readers raise what their libraries do (IndexError, ArrowInvalid, ...)
        raise UserError(f"dataset '{short}' cannot be loaded: {shorten(error, 300)}") from None
