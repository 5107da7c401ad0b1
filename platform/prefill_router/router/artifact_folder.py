"""Artifacts on disk: a folder with a JSON manifest and one safetensors file. Routers and baselines use this format.

The manifest names the weights by their hash and is written last, so that a reader finds either the old artifact or the
new one. The version is a hash of the whole content. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError

from prefill_router import storage
from prefill_router.common import validation
from prefill_router.common.errors import UserError, one_line

FORMAT = 2  # the newest that this release reads


class ArtifactManifest(validation.StrictModel):
    """The fields that every manifest has."""

    format: Literal[1, 2]
    version: str
    weights: str = Field(pattern=r"^[\w-]+\.safetensors$")
    weights_sha256: str


class _Versioned(Protocol):
    @property
    def version(self) -> str: ...


M = TypeVar("M", bound=ArtifactManifest)
A = TypeVar("A", bound=_Versioned)


@dataclass(frozen=True)
class ArtifactKind(Generic[M]):
    """Packs, writes and reads artifacts of one kind."""

    name: str
    manifest_file: str
    manifest_type: type[M]
    if_missing: str  # remedies in error messages
    if_damaged: str

    def pack(self, content: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> tuple[M, bytes]:
        """Returns the manifest, with `content` and the version, and the serialised weights."""
        weights = safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in tensors.items()})
        digest = hashlib.sha256(weights).hexdigest()
        fields = {
            "format": 1,
            **content,
            "weights": f"weights-{digest[:16]}.safetensors",
            "weights_sha256": digest,
        }
        version = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
        return self.manifest_type(version=version, **fields), weights

    def write(self, uri: str, manifest: M, weights: bytes) -> None:
        """Writes an artifact. An older one at `uri` stays complete until the new one is."""
        storage.write_bytes(storage.join(uri, manifest.weights), weights)
        storage.write_json(storage.join(uri, self.manifest_file), manifest.model_dump())
        for path in storage.list_files(uri, [".safetensors"]):
            if storage.name(path) != manifest.weights:
                storage.remove(path)

    def read(self, uri: str, build: Callable[[M, dict[str, NDArray[Any]]], A]) -> A:
        """Builds the object of an artifact. Raises UserError if it is missing, damaged or of a newer format.

        `build` may raise IndexError, KeyError, RuntimeError, TypeError or ValueError if tensors do not match the
        manifest.
        """
        path = storage.join(uri, self.manifest_file)
        if not storage.exists(path):
            raise UserError(f"{uri}: no {self.name} found ({self.manifest_file} is missing): {self.if_missing}")
        data = storage.read_json(path)
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
            raise UserError(f"{path}: format {data['format']} is newer than this release reads ({FORMAT}): upgrade")
        manifest = validation.validate(self.manifest_type, data, path)
        weights_uri = storage.join(uri, manifest.weights)
        storage.require(weights_uri, f"weights file, though {self.manifest_file} names it")
        weights = storage.read_bytes(weights_uri)
        if hashlib.sha256(weights).hexdigest() != manifest.weights_sha256:
            raise UserError(
                f"{weights_uri}: damaged: its checksum is not the one in {self.manifest_file}: {self.if_damaged}"
            )
        try:
            artifact = build(manifest, safetensors.numpy.load(weights))
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{weights_uri}: does not match {self.manifest_file}: {one_line(error)}: {self.if_damaged}"
            ) from None
        if artifact.version != manifest.version:
            raise UserError(
                f"{path}: version {manifest.version} does not match the content, so the file was changed: "
                f"{self.if_damaged}"
            )
        return artifact
