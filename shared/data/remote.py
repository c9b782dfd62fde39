"""Files in buckets and on web servers, through fsspec. A failed request is repeated for a bounded time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import fsspec
import numpy as np
import tenacity
from fsspec.asyn import AsyncFileSystem

from shared.config.schema import StoreOptions
from shared.data.cache import Look, Sizes, find, folders_of
from shared.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Page = tuple[list[tuple[str, int]], str | None]  # keys and sizes, and the token of the next page

# keys of a file's version in S3, GCS and web servers
_VERSION_KEYS = ("size", "ETag", "LastModified", "generation", "md5Hash", "updated", "mtime", "Last-Modified")
_SPOT_CHECKS = 16
_PAUSES_TO_CONNECT = (0.5, 1, 2, 0)  # seconds
# the same request fails again: the file, the rights or the request itself is wrong
_DEFINITE = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    TypeError,
    ValueError,
)


class StoreError(UserError):
    """A store that does not answer, or refuses."""


@dataclass(frozen=True)
class _Store:
    """A kind of store.

    Attributes:
        package: that pip installs.
        if_refused: the fix, if the store refuses.
        if_private: what else helps to read, if the store refuses.
        open: gives the file system. fsspec keeps one per process and thread.
        list_page: the files below a bucket's prefix, from a page's token on; None if the store has no list.
    """

    package: str
    if_refused: str
    open: Callable[[StoreOptions], AsyncFileSystem]
    list_page: Callable[[AsyncFileSystem, str, str, str | None, float], Page] | None = None
    if_private: str = ""


def _open_s3(options: StoreOptions) -> AsyncFileSystem:
    seconds = _attempt_seconds(options)
    return fsspec.filesystem(
        "s3",
        anon=options.anonymous,
        endpoint_url=options.endpoint_url,
        config_kwargs={"connect_timeout": seconds, "read_timeout": seconds},
        max_concurrency=1,  # with more, s3fs asks for the size first, to read large files in parts
        use_listings_cache=False,
    )


def _list_s3(files: AsyncFileSystem, bucket: str, prefix: str, token: str | None, seconds: float) -> Page:
    request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", **({"ContinuationToken": token} if token else {})}
    page = files.call_s3("list_objects_v2", timeout=seconds, **request)
    return [(item["Key"], item["Size"]) for item in page.get("Contents", [])], page.get("NextContinuationToken")


def _open_gcs(options: StoreOptions) -> AsyncFileSystem:
    # Google's JSON interface alone: gRPC does not survive the fork of a loader worker
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also logs what it raises
    from gcsfs.core import GCSFileSystem

    token = "anon" if options.anonymous else None
    return GCSFileSystem(token=token, endpoint_url=options.endpoint_url, use_listings_cache=False)


def _list_gcs(files: AsyncFileSystem, bucket: str, prefix: str, token: str | None, seconds: float) -> Page:
    request = {"prefix": prefix, "delimiter": "/", "maxResults": 1000, "fields": "items(name,size),nextPageToken"}
    request |= {"pageToken": token} if token else {}
    page = files.call("GET", "b/{}/o", bucket, json_out=True, timeout=seconds, **request)
    return [(item["name"], int(item["size"])) for item in page.get("items", [])], page.get("nextPageToken")


_PUBLIC = ", or data.anonymous: true for a public one"
_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
_S3 = _Store("s3fs", _KEYS, _open_s3, _list_s3, _PUBLIC)
_GCS = _Store("gcsfs", "set GOOGLE_APPLICATION_CREDENTIALS", _open_gcs, _list_gcs, _PUBLIC)
_HTTP = _Store(
    "aiohttp", "let the server serve it without a login", lambda _: fsspec.filesystem("http", use_listings_cache=False)
)
_STORES = {"s3": _S3, "gs": _GCS, "gcs": _GCS, "http": _HTTP, "https": _HTTP}


def _store_of(url: str) -> _Store:
    scheme = url.partition("://")[0]
    if scheme == "file":
        raise StoreError(f"{url}: file URLs are not read. Fix: write the path alone, {url.removeprefix('file://')}")
    if scheme not in _STORES:
        known = ", ".join(f"{known}://" for known in _STORES)
        raise StoreError(f"{url}: {scheme}:// is not supported. Fix: use a path on disk, or one of {known}")
    return _STORES[scheme]


def read_url(url: str, options: StoreOptions, size: int | None = None, seconds: float = 0) -> bytes:
    """The whole file.

    Args:
        size: in bytes, if it is known. A file of another size is read again.
        seconds: that one attempt may take, beside the time to connect and a second per MiB.

    Raises:
        FileNotFoundError: it does not exist.
        StoreError: the store does not answer, or refuses.
    """

    def read(files: AsyncFileSystem) -> bytes:
        data = files.cat_file(url, timeout=_attempt_seconds(options) + seconds + (size or 0) / 2**20)
        if size is not None and len(data) != size:
            raise OSError(f"{url} has {size} bytes, and {len(data)} came")
        return data

    return _request(read, url, options)


def version_of(url: str, options: StoreOptions) -> dict[str, str]:
    """The size, ETag and time that the store reports for a file. The errors are those of `read_url`."""
    info = _request(lambda files: files.info(url, timeout=_attempt_seconds(options)), url, options)
    return {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}


@dataclass(frozen=True)
class BucketPlace:
    """A folder of a bucket, as a `shared.data.storage.Place`. Failed requests are repeated for `options.timeout`
    seconds."""

    url: str
    options: StoreOptions

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        try:
            return read_url(f"{self.url}/{name}", self.options)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        seconds = _attempt_seconds(self.options) + len(data) / 2**20
        self._write(lambda files, url: files.pipe_file(url, data, timeout=seconds), name)

    def send(self, path: Path, name: str) -> None:
        seconds = _attempt_seconds(self.options) + path.stat().st_size / 2**20
        self._write(lambda files, url: files.put_file(str(path), url, timeout=seconds), name)

    def fetch(self, name: str, path: Path) -> None:
        url, seconds = f"{self.url}/{name}", _attempt_seconds(self.options)

        def fetch(files: AsyncFileSystem) -> None:
            size = files.info(url, timeout=seconds)["size"]
            files.get_file(url, str(path), timeout=seconds + size / 2**20)

        _request(fetch, url, self.options)

    def names(self, folder: str) -> list[str]:
        url = f"{self.url}/{folder}"

        def find(files: AsyncFileSystem) -> list[str]:
            prefix = "/".join(files.split_path(url)[:2]) + "/"
            found = files.find(url, timeout=_attempt_seconds(self.options))
            return [name.removeprefix(prefix) for name in found if name.startswith(prefix)]

        try:
            return _request(find, url, self.options)
        except FileNotFoundError:
            return []

    def delete(self, folder: str) -> None:
        url, seconds = f"{self.url}/{folder}", self.options.timeout
        with contextlib.suppress(FileNotFoundError):
            _request(lambda files: files.rm(url, recursive=True, timeout=seconds), url, self.options, "deleted")

    def _write(self, request: Callable[[AsyncFileSystem, str], None], name: str) -> None:
        url = f"{self.url}/{name}"
        try:
            _request(lambda files: request(files, url), url, self.options, "written")
        except FileNotFoundError as error:
            bucket = urlsplit(url).netloc
            raise StoreError(
                f"{url} cannot be written: there is no bucket {bucket!r}. Fix: create it, or name another one"
            ) from error


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
        """Whether there is no list of the files and their sizes."""
        return _store_of(self.url).list_page is None

    @property
    def place(self) -> str | None:
        """Identifies the store, so that a look can be remembered; None if it must not be."""
        return None if self.is_web_server else f"{self.url} at {self.options.endpoint_url}"

    def location(self, file_name: str) -> str:
        """The image's own URL."""
        return f"{self.url}/{quote(file_name) if self.is_web_server else file_name}"

    def read(self, file_name: str) -> bytes:
        """The bytes of the image file. The errors are those of `read_url`."""
        return read_url(self.location(file_name), self.options, self.size_of(file_name))

    def version(self, file_name: str) -> bytes:
        """16 bytes that change if the store reports another ETag, time or size. The errors are those of `read_url`."""
        said = version_of(self.location(file_name), self.options)
        return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()

    def size_of(self, file_name: str) -> int | None:
        """Bytes, if a list of the bucket gave them."""
        return self._sizes[file_name] if self._sizes is not None else None

    def take_sizes(self, sizes: Sizes) -> None:
        """Uses the sizes that a look found."""
        self._sizes = sizes

    def look(self, names: np.ndarray) -> Look:
        """Lists the folders of a bucket. A web server has no list, so some images are tried. The errors are those of
        `read_url`; each page of a list has its own `data.store_timeout`."""
        if self.is_web_server:
            return self._try_some(names)
        pages = (
            [(n.encode(), size) for n, size in page] for folder in folders_of(names) for page in self.pages(folder)
        )
        try:
            return find(names, pages)
        except StoreError as error:
            if not isinstance(error.__cause__, PermissionError):
                raise
            look = self._try_some(names)  # it raises if reading is refused too
            logger.warning("%s cannot be listed, so missing images are not found before the training", self.url)
            return look

    def pages(self, folder: str) -> Iterator[list[tuple[str, int]]]:
        """Names below the URL, and sizes, of the files in a folder of a bucket, a thousand at a time."""
        location, below = f"{self.url}/{folder}".rstrip("/"), f"{folder}/" if folder else ""
        token, count = None, 0  # of pages

        def list_page(files: AsyncFileSystem) -> Page:
            bucket, key, *_ = files.split_path(location)
            prefix = f"{key}/" if key else ""
            found, following = _store_of(self.url).list_page(
                files, bucket, prefix, token, _attempt_seconds(self.options)
            )
            return [(below + key.removeprefix(prefix), size) for key, size in found if key != prefix], following

        while True:
            try:
                found, token = _request(list_page, location, self.options)
            except FileNotFoundError:
                return
            yield found
            if token is None:
                return
            if (count := count + 1) % 100 == 0:
                logger.info("%s: about %s files listed", location, f"{1000 * count:,}")

    def _try_some(self, names: np.ndarray) -> Look:
        absent = []
        for name in names[:: max(len(names) // _SPOT_CHECKS, 1)].tolist():
            try:
                version_of(self.location(name.decode()), self.options)
            except FileNotFoundError:
                absent.append(name.decode())
        return Look(len(absent), absent[0] if absent else "", whole=False)


def _request(request: Callable[[AsyncFileSystem], T], url: str, options: StoreOptions, purpose: str = "read") -> T:
    """The answer to a request, which is repeated if it fails.

    Args:
        purpose: what happens to the file, for an error.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the store refuses, or failed for `options.timeout` seconds.
    """
    store = _store_of(url)
    if store is _HTTP:
        _check_address("/".join(url.split("/")[:3]), "the URL", url)
    elif options.endpoint_url is not None:
        _check_address(options.endpoint_url, "data.endpoint_url", url)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=options.timeout / 12),
        stop=tenacity.stop_before_delay(options.timeout - _attempt_seconds(options)),
        reraise=True,
    )

    def attempt() -> T:
        try:
            files = store.open(options)
        except ImportError as error:
            package = store.package
            raise UserError(f"{url}: this store needs the package {package}. Fix: pip install {package}") from error
        try:
            return request(files)
        except FileNotFoundError as error:
            # fsspec also raises it for a web server that does not answer
            cause = error.__cause__
            is_absent = _status(cause) in (404, 410) and not _is_about_bucket(cause)
            if cause is None or isinstance(cause, FileNotFoundError) or is_absent:
                raise
            raise cause from None

    try:
        return retrying(attempt)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # each store's library has errors of its own
        reason = f"{type(error).__name__}: {error}".strip(": ").split("\n")[0]
        if _may_pass(error):
            waited = f"for {options.timeout:g} seconds ({reason}). Fix: check the network, or raise data.store_timeout"
            message = f"{url} cannot be {purpose}, {waited}"
        elif _is_about_bucket(error):
            message = f"{url} cannot be {purpose}: there is no bucket {urlsplit(url).netloc!r}. Fix: correct the bucket"
        else:
            refused = f"{store.if_refused}{store.if_private if purpose == 'read' else ''}"
            fix = refused if _is_refusal(error) else "correct the URL"
            message = f"{url} cannot be {purpose} ({reason}). Fix: {fix}"
        raise StoreError(message) from error


_reachable: set[str] = set()  # addresses that accepted a connection of this process, or of the one that forked it


def _check_address(address: str, key: str, url: str) -> None:
    """Raises StoreError if nothing answers at an address in the config: the host is unknown, or no program listens at
    the port, several times. A store that was reachable before may be away for a while.

    Args:
        address: with its scheme.
        key: what to correct.
        url: for the error.
    """
    if address in _reachable or urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise StoreError(f"{address} is not an address: {error}. Fix: correct it") from error
    if host is None:
        raise StoreError(f"{key}: {address} is not an address. Fix: start it with http:// or https://")
    for pause in _PAUSES_TO_CONNECT:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except (ConnectionRefusedError, socket.gaierror) as error:
            reason = error.strerror
            time.sleep(pause)
        except OSError:  # it is slow, or a firewall drops packets: the read itself waits longer
            return
    else:
        raise StoreError(f"{url} cannot be read: nothing answers at {host}, port {port} ({reason}). Fix: correct {key}")
    _reachable.add(address)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, _DEFINITE) or _is_refusal(error):
        return False
    status = _status(error)
    return not (status is not None and 400 <= status < 500 and status not in (408, 429))


def _is_refusal(error: BaseException) -> bool:
    """Whether the store refuses this user."""
    named = "Credentials" in type(error).__name__ or str(error).startswith("Forbidden")
    return named or isinstance(error, PermissionError) or _status(error) in (401, 403)


def _is_about_bucket(error: BaseException | None) -> bool:
    return type(error).__name__ == "NoSuchBucket"


def _status(error: BaseException | None) -> int | None:
    """HTTP's status, if the store's library gives it."""
    response: Any = getattr(error, "response", None)  # botocore's
    if isinstance(response, dict):
        if response.get("Error", {}).get("Code") in ("RequestTimeout", "RequestTimeTooSkewed"):
            return None
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _attempt_seconds(options: StoreOptions) -> float:
    return min(20.0, options.timeout / 4)
