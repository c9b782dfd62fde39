"""Files in buckets and behind web servers, through fsspec. Reads that fail are made again, for a bounded time."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import fsspec
import numpy as np
import tenacity
from fsspec.asyn import AsyncFileSystem, sync

from shared.config.schema import StoreOptions
from shared.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PROTOCOLS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_PACKAGES = {"s3": "s3fs", "gcs": "gcsfs", "http": "aiohttp"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or data.anonymous: true for a public one",
    "gcs": "set GOOGLE_APPLICATION_CREDENTIALS, or data.anonymous: true for a public one",
    "http": "the server must let everybody read",  # there is no login
}
# what a file's listing says of its contents: S3, GCS, HTTP
_VERSION_KEYS = ("size", "ETag", "LastModified", "generation", "md5Hash", "updated", "mtime", "Last-Modified")
_SPOT_CHECKS = 16
_PAUSES_TO_CONNECT = (0.5, 1, 2, 0)  # seconds
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
    return _named(functools.partial(_version, url=url, options=options), url, options)


def _version(files: AsyncFileSystem, url: str, options: StoreOptions) -> dict[str, str]:
    info = sync(files.loop, files._info, url, timeout=_attempt_seconds(options))
    return {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}


@dataclass
class RemoteImages:
    """Images below a URL.

    Attributes:
        url: of the folder: s3://bucket/train2017, gs://…, https://….
    """

    url: str
    options: StoreOptions = StoreOptions()  # noqa: RUF009 it is frozen
    _sizes: Sizes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    @property
    def is_web_server(self) -> bool:
        """Whether there is no list of the files, and of their lengths."""
        return _protocol(self.url) == "http"

    @property
    def place(self) -> str | None:
        return None if self.is_web_server else f"{self.url} at {self.options.endpoint_url}"

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

    def version(self, file_name: str) -> bytes:
        """16 bytes that change if the store says that the file has: with its ETag, its time and its length.

        Raises:
            FileNotFoundError, StoreError: as `read`.
        """
        location = self.location(file_name)
        said = _with_retries(functools.partial(_version, url=location, options=self.options), location, self.options)
        return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()

    def look(self, names: np.ndarray) -> Look:
        """Lists a bucket's folders, and takes the files' sizes from there; of a web server, which has no list, some
        images are tried.

        Raises:
            StoreError: as `read`; `data.store_timeout` is for each page of the list.
        """
        if self.is_web_server:
            return self._try_some(names)
        try:
            listed, sizes = self._list(names)
        except StoreError as error:
            if not isinstance(error.__cause__, PermissionError):
                raise
            look = self._try_some(names)  # which says it where nothing may be read either
            logger.warning("%s cannot be listed: that all images are there is not checked", self.url)
            return look
        order = np.argsort(listed, kind="stable")
        listed = listed[order]
        rows = rows_of(names, listed)
        kept = np.unique(rows[rows >= 0])
        self._sizes = Sizes(listed[kept], sizes[order[kept]])
        look = missing(names, rows)
        look.sizes = self._sizes
        return look

    def take_sizes(self, sizes: Sizes) -> None:
        """Those that an earlier look found."""
        self._sizes = sizes

    def _list(self, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All names in the folders of `names` that are no longer than these, and their sizes."""
        pieces, sizes = [np.empty(0, names.dtype)], [np.empty(0, np.int64)]
        count = 0
        for folder in folders_of(names):
            for files in self.pages(folder):
                pieces.append(as_names((name.encode() for name, _ in files), names.itemsize))
                sizes.append(np.array([size for _, size in files], dtype=np.int64))
                count += len(files)
                if len(pieces) % 100 == 0:
                    logger.info("%s: %s files listed", self.url, f"{count:,}")
        return np.concatenate(pieces), np.concatenate(sizes)

    def pages(self, folder: str) -> Iterator[list[tuple[str, int]]]:
        """Names below the URL, and sizes, of the files in a folder, a thousand at a time."""
        location, below = f"{self.url}/{folder}".rstrip("/"), f"{folder}/" if folder else ""
        token = None
        while True:
            try:
                found, token = _with_retries(
                    functools.partial(self._page, location=location, token=token), location, self.options
                )
            except FileNotFoundError:
                return
            yield [(below + name, size) for name, size in found]
            if token is None:
                return

    def _page(
        self, files: AsyncFileSystem, location: str, token: str | None
    ) -> tuple[list[tuple[str, int]], str | None]:
        """A page of names and sizes, and the token of the next one."""
        bucket, key, *_ = files.split_path(location)
        prefix = f"{key}/" if key else ""
        list_page = _list_s3 if _protocol(self.url) == "s3" else _list_gcs
        found, following = list_page(files, bucket, prefix, token, _attempt_seconds(self.options))
        return [(key[len(prefix) :], size) for key, size in found if key != prefix], following

    def _try_some(self, names: np.ndarray) -> Look:
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

        tried = [name.decode() for name in names[:: max(len(names) // _SPOT_CHECKS, 1)].tolist()]
        absent = [name for name in tried if not there(name)]
        return Look(len(absent), absent[0] if absent else "", whole=False)

    def size_of(self, file_name: str) -> int | None:
        """The bytes that the listing gives, where there was one."""
        return self._sizes[file_name] if self._sizes is not None else None


def _list_s3(
    files: AsyncFileSystem, bucket: str, prefix: str, token: str | None, timeout: float
) -> tuple[list[tuple[str, int]], str | None]:
    """The keys and sizes of a page, and the token of the next one."""
    following = {"ContinuationToken": token} if token else {}
    request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", **following}
    page = sync(files.loop, files._call_s3, "list_objects_v2", timeout=timeout, **request)
    return [(item["Key"], item["Size"]) for item in page.get("Contents", [])], page.get("NextContinuationToken")


def _list_gcs(
    files: AsyncFileSystem, bucket: str, prefix: str, token: str | None, timeout: float
) -> tuple[list[tuple[str, int]], str | None]:
    """As `_list_s3`."""
    request = {"prefix": prefix, "delimiter": "/", "maxResults": 1000, "fields": "items(name,size),nextPageToken"}
    request |= {"pageToken": token} if token else {}
    page = sync(files.loop, files._call, "GET", "b/{}/o", bucket, json_out=True, timeout=timeout, **request)
    return [(item["name"], int(item["size"])) for item in page.get("items", [])], page.get("nextPageToken")


def _protocol(url: str) -> str:
    scheme = url.partition("://")[0]
    if scheme == "file":
        raise StoreError(f"{url}: write the path alone, {url.removeprefix('file://')}")
    if scheme not in _PROTOCOLS:
        known = ", ".join(f"{known}://" for known in _PROTOCOLS)
        raise StoreError(f"{url}: nothing is read from {scheme}://; these are: {known}, and paths on disk")
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
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises too
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
    _refuse_unreachable(location, options)
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
        result = retrying(attempt)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # each store's library has errors of its own
        reason = f"{type(error).__name__}: {error}".strip(": ").split("\n")[0]
        if _may_pass(error):
            raise StoreError(f"{location} cannot be read, for {options.timeout:g} seconds ({reason})") from error
        if type(error).__name__ == "NoSuchBucket":
            bucket = location.partition("://")[2].split("/")[0]
            raise StoreError(f"{location} cannot be read: there is no bucket {bucket!r}") from error
        hint = f"; {_CREDENTIALS[_protocol(location)]}" if _is_refusal(error) else ""
        raise StoreError(f"{location} cannot be read ({reason}){hint}") from error
    _answered.add(_address(location, options))
    return result


# the host and port of each store that this process, or the one that it was forked from, has read from
_answered: set[tuple[str, int] | None] = set()


def _address(location: str, options: StoreOptions) -> tuple[str, int] | None:
    """The host and port that the config names; None for the provider's own."""
    url = location if _protocol(location) == "http" else options.endpoint_url
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise StoreError(f"{url} is no address: {error}") from error
    if host is None:
        raise StoreError(f"data.endpoint_url: {url} is no address; write it with http:// or https:// before it")
    return host, port


def _refuse_unreachable(location: str, options: StoreOptions) -> None:
    """Raises StoreError where no store is at the address that the config names: nothing has been read from there yet,
    and no host has that name or no program listens at the port, several times. One that has answered before may be
    away for a while."""
    address = _address(location, options)
    if address is None or address in _answered or urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return
    for pause in _PAUSES_TO_CONNECT:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except (ConnectionRefusedError, socket.gaierror) as error:
            reason = error.strerror
            time.sleep(pause)
        except OSError:  # slow, or somebody between us drops it: for the patience of the read itself
            return
    host, port = address
    key = "data.endpoint_url" if _protocol(location) != "http" else "the URL"
    raise StoreError(f"{location} cannot be read: nothing answers at {host}, port {port} ({reason}); correct {key}")


def _named(call: Callable[[AsyncFileSystem], T], url: str, options: StoreOptions) -> T:
    try:
        return _with_retries(call, url, options)
    except FileNotFoundError as error:
        raise StoreError(f"{url} does not exist") from error


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may do better later."""
    if isinstance(error, _DEFINITE) or _is_refusal(error):
        return False
    status = _status(error)
    return not (status is not None and 400 <= status < 500 and status not in (408, 429))


def _is_refusal(error: BaseException) -> bool:
    """Whether it is about who asks."""
    named = "Credentials" in type(error).__name__ or str(error).startswith("Forbidden")
    return named or isinstance(error, PermissionError) or _status(error) in (401, 403)


def _status(error: BaseException) -> int | None:
    """HTTP's, where the store's library says it."""
    response = getattr(error, "response", None)  # botocore's
    if isinstance(response, dict):
        if response.get("Error", {}).get("Code") in ("RequestTimeout", "RequestTimeTooSkewed"):
            return None
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _attempt_seconds(options: StoreOptions) -> float:
    return min(20.0, options.timeout / 4)


def _whole(data: bytes, expected: int | None, location: str) -> bytes:
    if expected is not None and len(data) != expected:
        raise OSError(f"{location} has {expected} bytes, and {len(data)} came")
    return data


@dataclass
class Look:
    """What was seen where the images of an annotation file should be.

    Attributes:
        missing: how many of the images are not there.
        first_missing: the name of the first of them.
        whole: every image was looked for; else some were tried.
        folders: st_mtime_ns of each folder on disk that counts, from before it was listed; None where there is none.
        sizes: of the images in a bucket.
    """

    missing: int = 0
    first_missing: str = ""
    whole: bool = True
    folders: dict[str, int | None] = field(default_factory=dict)
    sizes: Sizes | None = None


class Sizes:
    """Bytes of files by name. Loader workers that are not forked map the arrays' files again.

    Args:
        names: (N,) bytes, sorted.
        sizes: (N,) int64.
        folder: that the arrays are mapped from.
    """

    def __init__(self, names: np.ndarray, sizes: np.ndarray, folder: Path | None = None):
        self.names, self.sizes, self.folder = names, sizes, folder

    @classmethod
    def load(cls, folder: Path) -> Sizes:
        """Maps what `save` wrote; raises OSError or ValueError where it did not."""
        names, sizes = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("names", "sizes"))
        if names.dtype.kind != "S" or sizes.dtype != np.int64 or not names.shape == sizes.shape == (len(sizes),):
            raise ValueError("not a list of sizes")
        return cls(names, sizes, folder)

    def save(self, folder: Path) -> None:
        np.save(folder / "names.npy", self.names)
        np.save(folder / "sizes.npy", self.sizes)

    def __reduce__(self):
        return (Sizes.load, (self.folder,)) if self.folder else (Sizes, (self.names, self.sizes))

    def __getitem__(self, name: str) -> int | None:
        """None where the file is not listed."""
        key = name.encode()
        if len(key) > self.names.itemsize or not len(self.names):
            return None
        at = min(int(np.searchsorted(self.names, key)), len(self.names) - 1)
        return int(self.sizes[at]) if self.names[at] == key else None


def folders_of(names: np.ndarray) -> list[str]:
    """The folders that files are in, "" where a name has none; `names` (N,) bytes."""
    letters = _letters(names)
    slashes = letters == ord("/")
    if not slashes.any():
        return [""]
    last = np.where(slashes.any(axis=1), names.itemsize - 1 - slashes[:, ::-1].argmax(axis=1), 0)
    letters = np.where(np.arange(names.itemsize) < last[:, None], letters, np.uint8(0))
    return [folder.decode() for folder in np.unique(letters.view(names.dtype).ravel()).tolist()]


def as_names(names: Iterable[bytes], width: int) -> np.ndarray:
    """(N,) bytes of `width`; a longer name, which would be cut, becomes an empty one."""
    return np.array([name if len(name) <= width else b"" for name in names], dtype=f"S{width}")


def rows_of(names: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """(N,) int64: the row of each name in `listed`, which is sorted; -1 where it is not there."""
    if not len(listed):
        return np.full(len(names), -1)
    rows = np.minimum(np.searchsorted(listed, names), len(listed) - 1)
    return np.where(listed[rows] == names, rows, -1)


def missing(names: np.ndarray, rows: np.ndarray) -> Look:
    """The look that found the names at those rows, -1 where it did not."""
    absent = rows < 0
    first = names[absent.argmax()].decode() if absent.any() else ""
    return Look(int(absent.sum()), first)


def _letters(names: np.ndarray) -> np.ndarray:
    """(N, width) uint8."""
    return np.ascontiguousarray(names).view(np.uint8).reshape(len(names), names.itemsize)
