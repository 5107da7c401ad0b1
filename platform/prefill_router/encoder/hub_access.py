"""Access to the hub where there is none: its library would retry each file for 24 s, also those that are optional."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from prefill_router.common.console import say
from prefill_router.common.errors import UserError

_TRIES, _PAUSE_S = 3, 1.0  # a name server may fail once
_CONNECT_S = 5.0


@contextmanager
def cache_if_unreachable(model: str) -> Iterator[None]:
    """Reads only the cache, and says so, if the hub cannot be reached. Raises UserError for a model that is not there.

    The hub's library is set to this mode for the whole process, until the block ends.
    """
    problem = None if constants.HF_HUB_OFFLINE else _problem(constants.ENDPOINT)
    if problem is None:
        yield
        return
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model, repo_type="model"), "snapshots")
    if not folder.is_dir():
        raise UserError(
            f"encoder {model}: {constants.ENDPOINT} cannot be reached ({problem}), and the cache of this machine does "
            "not have it: check the network, or name a directory or package:NAME, which need no access to the hub"
        )
    _say_unreachable(constants.ENDPOINT, problem)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def commit_in_cache(model: str, revision: str | None) -> str | None:
    """Returns the commit at which a model was last read, which names its folder in the cache."""
    path = try_to_load_from_cache(model, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


@cache
def _say_unreachable(endpoint: str, problem: str) -> None:
    """Says so once per process."""
    say(f"{endpoint} cannot be reached ({problem}): encoders are read from the cache of this machine")


def _problem(endpoint: str) -> str | None:
    """Why no connection to `endpoint` is possible, or None if it is, or may be: by a proxy, or slowly."""
    url = urlsplit(endpoint)
    if {url.scheme, "all"} & getproxies().keys():
        return None
    port = url.port or (80 if url.scheme == "http" else 443)
    problem = None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S)
        try:
            socket.create_connection((url.hostname or "", port), _CONNECT_S).close()
            return None
        except TimeoutError:
            return None
        except OSError as error:
            problem = error.strerror or str(error)
    return problem
