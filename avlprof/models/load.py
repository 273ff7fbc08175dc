"""From a name to a model that can be run: alias, hub id or local folder."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.utils import logging as hf_logging

from avlprof.attention.gate import check_config
from avlprof.errors import UserError
from avlprof.files import checked_path
from avlprof.models.adapter import Adapter
from avlprof.models.aliases import ALIASES, EMBEDDED, FETCHED, is_tested
from avlprof.models.chat import complete, one_line
from avlprof.models.families import adapter_for
from avlprof.models.families.small import SmallAdapter
from avlprof.models.families.tiny import EMBEDDED_ADAPTERS, PictureProcessor
from avlprof.models.identity import checkpoint_settings, settings_hash
from avlprof.models.placement import (
    attention_argument,
    check_arguments,
    check_attention,
    check_device_map,
    keep_soft_cap,
    quantization,
    resolve_device,
    resolve_dtype,
)
from avlprof.models.small import fetched_folder, mark_of
from avlprof.models.spec import ModelOptions, ModelSpec
from avlprof.models.tiny import FOLDERS, MROPE_WEIGHTS
from avlprof.registry import unknown

_CONNECT_SECONDS = 3.0
_FINGERPRINTED = 1 << 20  # bytes at each end of a file
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its processor and adapter.

    `name` is what was asked for, `source` the hub id or the folder that it stood for (the name
    itself for `tiny` and `small`), which loads the same model again. `revision` is the commit of the hub, or
    for a folder a fingerprint of its config and weights, so that two checkpoints in one place can
    be told apart. `arguments` are the further arguments that it was loaded with.
    """

    model: Any
    processor: Any
    name: str
    source: str
    revision: str | None
    adapter: Adapter
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        """What decides answers beside the weights, as it is now: see `avlprof.models.identity`."""
        return checkpoint_settings(self.model, self.processor, self.arguments)

    @property
    def settings_hash(self) -> str:
        """A fingerprint of `settings`."""
        return settings_hash(self.settings)


def load_model(model: str | ModelSpec = "tiny", **options: Unpack[ModelOptions]) -> LoadedModel:
    """Loads a model by name, or by a `ModelSpec` that says how as well.

    Args:
        model: alias (`avlprof.models.ALIASES`), hub id (`owner/name`), local folder, or a spec.
        options: fields of `ModelSpec` beside a name: device, dtype, revision, trust_remote_code,
            device_map, quantize, attention, model_args. Code of a repository is never run unless
            `trust_remote_code` is set.

    Raises:
        UserError: unknown name, not a model, unreadable files, no network, absent device, a
            `revision` of a folder, a `device_map` beside a device or without accelerate, a package
            that `quantize` or `attention` needs is missing, or a model argument is not known.
    """
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model)
    return _load(replace(spec, **options))


def _load(spec: ModelSpec) -> LoadedModel:
    name, revision = spec.name, spec.revision
    source, folder = _locate(name)
    if folder and revision:
        raise UserError(f"revision must be left out for '{name}', which is a folder, got '{revision}'")
    check_device_map(spec.device_map, spec.device)
    check_attention(spec.attention)
    check_arguments(spec.model_args)
    device = resolve_device(spec.device)
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if folder is None:
        options |= {"revision": revision, "local_files_only": not _hub_reachable()}
    with _explained(name, source, options):
        config, more = AutoConfig.from_pretrained(
            source, return_unused_kwargs=True, **options, **(spec.model_args or {})
        )
        _check_kind(name, config)
        check_config(config)
        dtype = resolve_dtype(spec.dtype, device, config, hub=folder is None)
        arguments = {key: value for key, value in more.items() if key in (spec.model_args or {})}
        arguments |= attention_argument(spec.attention, config) | quantization(spec.quantize, dtype)
        # what is quantised goes to its device while it is loaded, and cannot be moved afterwards
        whole = {"": str(device)} if spec.quantize is not None else None
        with quiet_transformers(progress=folder is None), _arguments_explained(arguments):
            model, report = AutoModelForImageTextToText.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                device_map=spec.device_map or whole,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **arguments,
                **options,
            )
        if spec.device_map is None and whole is None:
            model = model.to(device)
    _check_complete(name, report)
    keep_soft_cap(model)
    processor = _processor(name, source, config, options)
    if not is_tested(config.model_type):
        _log.warning("model family '%s' is not yet tested with avlprof; check its results", config.model_type)
    commit = _folder_fingerprint(folder) if folder else _hub_commit(source, revision) or revision
    adapter = adapter_for(model, processor)
    if folder in FOLDERS.values():
        adapter = EMBEDDED_ADAPTERS[config.model_type](model, processor)
    elif folder is not None and mark_of(folder) is not None:
        adapter = SmallAdapter(model, processor)
    if folder is not None and name in ALIASES:
        source = name
    return LoadedModel(model.eval(), processor, name, source, commit, adapter, dict(spec.model_args or {}))


def _locate(name: str) -> tuple[str, Path | None]:
    """The source to load from, and the folder if it is one."""
    if name in ALIASES:
        source = ALIASES[name].source
        if source not in (EMBEDDED, FETCHED):
            return source, None
        path = FOLDERS[name] if source == EMBEDDED else fetched_folder()
        return str(path), path
    path = checked_path(name, "model").expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UserError(
                f"folder {name} holds an adapter (LoRA and its kin), not a model; merge it into its base "
                "model (PEFT: merge_and_unload, then save_pretrained) and give that folder"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"folder {name} is not a model: it has no config.json")
        return str(path), path
    if path.exists():
        raise UserError(f"model '{name}' is a file; give the folder that holds config.json and the weights")
    if _HUB_ID.fullmatch(name):
        return name, None
    if os.sep in name or name.startswith((".", "~")):
        raise UserError(f"model folder {name} does not exist")
    raise unknown("model", name, ALIASES)


def _check_kind(name: str, config: Any) -> None:
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or hasattr(config, "auto_map")
    if not known:
        raise UserError(
            f"model '{name}' is of type '{config.model_type}', which takes no images; give a vision model"
        )


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """Refuses what transformers would fill with random numbers."""
    unfit = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if unfit:
        raise UserError(
            f"weights of '{name}' do not fit its config: {len(unfit)} tensors are missing or of another "
            f"shape, first '{unfit[0]}'; get the whole checkpoint again"
        )


def _processor(name: str, source: str, config: Any, options: dict[str, Any]) -> Any:
    kind = PictureProcessor if source == str(MROPE_WEIGHTS) else AutoProcessor
    try:
        processor = kind.from_pretrained(source, **options)
    except (ImportError, AttributeError) as error:
        hint = "" if find_spec("torchvision") else "; install the torchvision that fits your torch"
        raise UserError(f"the processor of '{name}' cannot be built: {one_line(error)}{hint}") from error
    except Exception as error:  # see `_explained`
        raise _trouble(name, source, options, error) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"model '{name}' has no processor for images and text; its folder lacks the processor's files"
        )
    complete(processor, config)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


@contextmanager
def _explained(name: str, source: str, options: dict[str, Any]) -> Iterator[None]:
    """Turns what transformers raises on bad files or no network into one sentence.

    That may be anything: a file says which code runs, and what it is called with.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _trouble(name, source, options, error) from error


@contextmanager
def _arguments_explained(arguments: dict[str, Any]) -> Iterator[None]:
    """Names the model argument that the model does not take."""
    try:
        yield
    except TypeError as error:
        wrong = next(
            (name for name in arguments if f"unexpected keyword argument '{name}'" in str(error)), None
        )
        if wrong is None:
            raise
        raise UserError(
            f"model argument '{wrong}' is neither a field of the model's config nor an argument of the model"
        ) from error


def _trouble(name: str, source: str, options: dict[str, Any], error: Exception) -> UserError:
    called = f"'{name}'" if source == name else f"'{name}' ({source})"
    if options.get("local_files_only") and isinstance(error, OSError):
        return UserError(
            f"model {called} is not in the local cache and the hub cannot be reached; "
            "connect, give a local folder, or use --model tiny"
        )
    return UserError(f"model {called} cannot be loaded: {one_line(error)}")


@contextmanager
def quiet_transformers(*, progress: bool) -> Iterator[None]:
    """Without the library's own report of the weights, and without its progress bar unless wanted."""
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not progress:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


def _hub_reachable() -> bool:
    """Whether files can be fetched from the hub; behind a proxy the answer is left to the proxy.

    Asked before a load, because the hub's client retries for half a minute before it turns to
    the cache.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _hub_commit(source: str, revision: str | None) -> str | None:
    """The commit of a hub model that lies in the local cache; None if it does not."""
    path = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _folder_fingerprint(folder: Path) -> str:
    """12 hex digits over the config and over the size, first and last MiB of every weights file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINTED))
            file.seek(max(0, size - _FINGERPRINTED))
            digest.update(file.read(_FINGERPRINTED))
    return digest.hexdigest()[:12]
