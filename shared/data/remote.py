"""Files in buckets and behind web servers, through fsspec. Reads that fail are made again, for a bounded time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import fsspec
import numpy as np
import tenacity
from fsspec.asyn import AsyncFileSystem, sync

from shared.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PROTOCOLS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_PACKAGES = {"s3": "s3fs", "gcs": "gcsfs", "http": "aiohttp"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "gcs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "http": "the server must let everybody read",
}
# what a file's listing says of its contents: S3, GCS, HTTP
_VERSION_KEYS = ("size", "ETag", "LastModified", "generation", "md5Hash", "updated", "mtime", "Last-Modified")
_SPOT_CHECKS = 16
# what the same request meets again: of the file, of the rights, of the request itself (UserError is a ValueError)
_DEFINITE = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)


class StoreError(UserError):
    """A store that does not answer, or refuses."""


@dataclass(frozen=True)
class StoreOptions:
    """How to reach a store.

    Attributes:
        endpoint_url: of an S3-compatible store, or of a GCS emulator; the provider's own where None.
        anonymous: without credentials; else the provider's usual chain is gone through.
        timeout: seconds that a store may stay away before the error.
    """

    endpoint_url: str | None = None
    anonymous: bool = False
    timeout: float = 120.0


def is_url(path: str) -> bool:
    return "://" in path


def read_url(url: str, options: StoreOptions, size: int | None) -> bytes:
    """The whole file, of `size` bytes where the store says so.

    Raises:
        StoreError: the store does not answer, refuses, or has no such file.
    """
    seconds = _attempt_seconds(options) + (size / 2**20 if size else options.timeout)  # at a megabyte a second

    def read(files: AsyncFileSystem) -> bytes:
        return _whole(sync(files.loop, files._cat_file, url, timeout=seconds), size, url)

    return _named(read, url, options)


def version_of(url: str, options: StoreOptions) -> dict[str, str]:
    """What the store says of the file, which changes when the file does.

    Raises:
        StoreError: as `read_url`.
    """

    def ask(files: AsyncFileSystem) -> dict[str, Any]:
        return sync(files.loop, files._info, url, timeout=_attempt_seconds(options))

    info = _named(ask, url, options)
    return {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}


@dataclass
class RemoteImages:
    """Images below a URL.

    Attributes:
        url: of the folder: s3://bucket/train2017, gs://…, https://….
    """

    url: str
    options: StoreOptions = StoreOptions()
    # the files' sizes, by name: sorted arrays, which loader workers share
    _names: np.ndarray = field(default_factory=lambda: np.empty(0, "S1"), repr=False)
    _sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def location(self, file_name: str) -> str:
        """The image's own URL."""
        return f"{self.url}/{quote(file_name) if self.url.startswith('http') else file_name}"

    def read(self, file_name: str) -> bytes:
        """The bytes of the image file, as many as the store's listing says.

        Raises:
            FileNotFoundError: it is not there.
            StoreError: the store does not answer, or refuses.
        """
        location, expected = self.location(file_name), self.size_of(file_name)

        def read(files: AsyncFileSystem) -> bytes:
            seconds = _attempt_seconds(self.options)
            return _whole(sync(files.loop, files._cat_file, location, timeout=seconds), expected, location)

        return _with_retries(read, location, self.options)

    def missing(self, file_names: Iterable[str]) -> list[str]:
        """Those of the names that the store does not list; of a web server, which has no list, some are tried.

        Raises:
            StoreError: as `read`.
        """
        names = list(file_names)
        if _protocol(self.url) == "http":
            return self._missing_of_some(names)
        sizes: dict[str, int] = {}
        try:
            for folder in sorted({name.rpartition("/")[0] for name in names}):
                sizes.update(self._list(folder))
        except StoreError as error:
            if not isinstance(error.__cause__, PermissionError):
                raise
            logger.warning("%s cannot be listed: that all images are there is not checked", self.url)
            return self._missing_of_some(names)
        known = sorted((name.encode(), sizes[name]) for name in set(names) & sizes.keys())
        self._names = np.array([name for name, _ in known], dtype=bytes)
        self._sizes = np.array([size for _, size in known], dtype=np.int64)
        return [name for name in names if name not in sizes]

    def _list(self, folder: str) -> dict[str, int]:
        location = f"{self.url}/{folder}".rstrip("/")

        def names(files: AsyncFileSystem) -> Sequence[dict]:
            return sync(files.loop, files._ls, location, detail=True, timeout=self.options.timeout)

        try:
            entries = _with_retries(names, location, self.options)
        except FileNotFoundError:
            return {}
        prefix = f"{folder}/" if folder else ""
        return {
            prefix + entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"
        }

    def _missing_of_some(self, names: Sequence[str]) -> list[str]:
        def there(name: str) -> bool:
            location = self.location(name)
            try:
                _with_retries(
                    lambda files: sync(files.loop, files._info, location, timeout=_attempt_seconds(self.options)),
                    location,
                    self.options,
                )
            except FileNotFoundError:
                return False
            return True

        return [name for name in names[:: max(len(names) // _SPOT_CHECKS, 1)] if not there(name)]

    def size_of(self, file_name: str) -> int | None:
        """The bytes that the listing gives, where there was one."""
        name = file_name.encode()
        at = int(np.searchsorted(self._names, name))
        return int(self._sizes[at]) if at < len(self._names) and self._names[at] == name else None


def _protocol(url: str) -> str:
    scheme = url.partition("://")[0]
    if scheme not in _PROTOCOLS:
        raise UserError(f"{url}: {scheme}:// is not one of {', '.join(f'{known}://' for known in _PROTOCOLS)}")
    return _PROTOCOLS[scheme]


def _open(url: str, options: StoreOptions) -> AsyncFileSystem:
    """fsspec's file system, one a process and thread: it keeps them itself."""
    protocol, seconds = _protocol(url), _attempt_seconds(options)
    arguments: dict[str, Any] = {"use_listings_cache": False}
    if protocol == "s3":
        config = {"connect_timeout": seconds, "read_timeout": seconds}
        # without it, s3fs asks for the size first, to read large files in parts at once
        arguments["max_concurrency"] = 1
        arguments |= {"anon": options.anonymous, "endpoint_url": options.endpoint_url, "config_kwargs": config}
    elif protocol == "gcs":
        arguments |= {"token": "anon" if options.anonymous else None, "endpoint_url": options.endpoint_url}
    try:
        if protocol == "gcs":
            # Google's JSON interface alone: gRPC does not outlive the fork of a loader worker
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            from gcsfs.core import GCSFileSystem

            return GCSFileSystem(**arguments)
        return fsspec.filesystem(protocol, **arguments)
    except ImportError as error:
        package = _PACKAGES[protocol]
        raise UserError(f"{url}: reading from there needs the package {package}: pip install {package}") from error


def _with_retries(call: Callable[[AsyncFileSystem], T], location: str, options: StoreOptions) -> T:
    """What `call` makes of the file system.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the store refuses, or failed all the time.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=options.timeout / 12),
        stop=tenacity.stop_before_delay(options.timeout - _attempt_seconds(options)),
        reraise=True,
    )

    def attempt() -> T:
        try:
            return call(_open(location, options))
        except FileNotFoundError as error:
            # fsspec says so too of a web server that does not answer
            cause = error.__cause__
            if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
                raise
            raise cause from None

    try:
        return retrying(attempt)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # each store's library has errors of its own
        reason = f"{type(error).__name__}: {error}".strip(": ").split("\n")[0]
        if _may_pass(error):
            raise StoreError(f"{location} cannot be read, for {options.timeout:g} seconds ({reason})") from error
        hint = _CREDENTIALS[_protocol(location)]
        raise StoreError(
            f"{location} cannot be read ({reason}); {hint}, or data.anonymous: true for a public one"
        ) from error


def _named(call: Callable[[AsyncFileSystem], T], url: str, options: StoreOptions) -> T:
    try:
        return _with_retries(call, url, options)
    except FileNotFoundError as error:
        raise StoreError(f"{url} does not exist") from error


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may do better later."""
    if isinstance(error, _DEFINITE):
        return False
    if "Credentials" in type(error).__name__ or str(error).startswith("Forbidden"):
        return False
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _attempt_seconds(options: StoreOptions) -> float:
    return min(20.0, options.timeout / 4)


def _whole(data: bytes, expected: int | None, location: str) -> bytes:
    if expected is not None and len(data) != expected:
        raise OSError(f"{location} has {expected} bytes, and {len(data)} came")
    return data
