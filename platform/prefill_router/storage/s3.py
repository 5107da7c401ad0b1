"""An S3 filesystem with one layer of retries, a bound on every wait, and OSErrors that name the object.

Both botocore and s3fs retry, so their attempts multiply. Here only s3fs retries, because only s3fs also restarts a
download whose body breaks off.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aiohttp import ClientError as HttpError
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as NotConnected
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import S3File, set_custom_error_handler

STALL_S = 5.0  # an upload that makes no progress for this long is aborted
_MAX_DELETED = 1000  # S3's limit for one request
_PAUSE_S = 0.1  # before the first retry, as in s3fs
_MAX_PUT_BYTES = 5 * 2**30  # S3's limit for one plain PUT
_TRANSIENT_STATUSES = {500, 502, 503, 504}
# The first two: the request collided with another conditional write or a deletion.
_TRANSIENT_CODES = {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout"}
# Subclasses of OSError that s3fs and our callers distinguish.
_DISTINGUISHED = (FileNotFoundError, FileExistsError, PermissionError)


def connect() -> S3:
    """Connects to the S3 store that the usual AWS variables and configuration files name."""
    options = {
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 64,
        "connector_args": {"socket_factory": _open_socket},
        # Stores other than Amazon's reject the newer default checksums.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    # Other writers change listings, so none is cached. Without concurrency inside an object, reading it is one request,
    # which is retried as a whole.
    return S3(config_kwargs=options, use_listings_cache=False, skip_instance_cache=True, max_concurrency=1)


class S3(S3FileSystem):  # type: ignore[misc]
    """Tries a request 9 times if the error is transient (5xx, reset, truncated body, timeout), pausing 17 s in total.

    Then raises an OSError with a one-line message that names the object: after 17 s if the store fails immediately,
    within two minutes if it accepts connections but never responds.
    """

    retries = 9
    connect_timeout = 5
    read_timeout = 10

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        set_custom_error_handler(_is_transient)  # here, because Ray unpickles filesystems in its workers

    def write(self, path: str, data: bytes) -> None:
        """Writes an object with one PUT: a multipart upload whose last response is lost cannot be retried."""
        self.pipe_file(path, data, chunksize=_MAX_PUT_BYTES)

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object unless it exists, and returns whether it did."""
        assert len(data) < _MAX_PUT_BYTES, "some stores complete multipart uploads unconditionally"
        try:
            self.pipe_file(path, data, chunksize=_MAX_PUT_BYTES, mode="create")
        except OSError as error:
            if _http_status(error) == 412:
                return False
            raise
        return True

    async def _remove_many(self, paths: Sequence[str]) -> None:
        """Deletes objects of one bucket, a thousand per request; retries those that the store reports as failed."""
        for start in range(0, len(paths), _MAX_DELETED):
            split = [self.split_path(path) for path in paths[start : start + _MAX_DELETED]]
            bucket, keys = split[0][0], [key for _, key, _ in split]
            for attempt in range(self.retries):
                objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
                errors = (await self._call_s3("delete_objects", Bucket=bucket, Delete=objects)).get("Errors", [])
                keys = [error["Key"] for error in errors]
                if not keys:
                    break
                await asyncio.sleep(_PAUSE_S * 1.7**attempt)
            else:
                raise OSError(f"s3://{bucket}/{keys[0]}: could not be deleted: {errors[0].get('Code')}")

    async def _remove_below(self, path: str) -> None:
        """Deletes all objects below a folder, taking its name literally: fsspec's `rm` would expand `[1]` or `*`."""
        bucket, key, _ = self.split_path(path)
        page: dict[str, Any] = {"IsTruncated": True}
        while page["IsTruncated"]:
            page = await self._call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "")
            await self._remove_many([f"{bucket}/{found['Key']}" for found in page.get("Contents", [])])

    remove_many = sync_wrapper(_remove_many)
    remove_below = sync_wrapper(_remove_below)

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        with _os_errors(options.get("Bucket"), options.get("Key") or options.get("Prefix")):
            return await super()._call_s3(method, *arguments, **options)

    async def _cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        with _os_errors(path):
            return await super()._cat_file(path, *arguments, **options)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> S3File:
        return _Input(self, path, mode, **options) if mode == "rb" else super()._open(path, mode, **options)


class _Input(S3File):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> Any:
        with _os_errors(self.path):
            return super()._fetch_range(start, end)


@contextmanager
def _os_errors(*path: str | None) -> Iterator[None]:
    """Turns errors of s3fs and the libraries below it into OSErrors that name the object.

    Otherwise s3fs may take a request's final failure for a truncated body, and retry it.
    """
    try:
        yield
    except (OSError, BotoCoreError, HttpError) as error:
        uri = "s3://" + "/".join(part for part in path if part)
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        kind = next((kind for kind in _DISTINGUISHED if isinstance(error, kind)), OSError)
        raise kind(reason if reason.startswith("s3://") else f"{uri}: {reason}") from error


def _is_transient(error: Exception) -> bool:
    """Whether s3fs retries an error that it does not classify itself."""
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code")
        return code in _TRANSIENT_CODES or _http_status(error) in _TRANSIENT_STATUSES
    return isinstance(error, (NotConnected, IncompleteReadError))


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status of the response that caused an error, found through its chain of causes, or None."""
    while error is not None and not isinstance(error, ClientError):
        error = error.__cause__
    return None if error is None else error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _open_socket(address: Any) -> socket.socket:
    """Opens a socket that closes when an upload stalls: the timeouts above only bound the wait for a response."""
    family, kind, protocol, *_ = address
    opened = socket.socket(family, kind, protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_S * 1000))
    return opened
