"""Stores on loopback that hold what is in a folder: S3, GCS and a web server, with faults on request."""

import contextlib
import http.client
import http.server
import logging
import threading
import time
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path

BUCKET = "pictures"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def _serving(handler, host="127.0.0.1", port=0):
    server = http.server.ThreadingHTTPServer((host, port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def http_store(folder: Path, late: float = 0.0):
    """The URL of a web server of the folder, which answers after `late` seconds."""

    class Late(_Quiet):
        def do_GET(self):
            time.sleep(late)
            super().do_GET()

    with _serving(partial(Late, directory=str(folder))) as url:
        yield url


@contextlib.contextmanager
def changing_store(contents: list[bytes], length: int | None = None):
    """The URL of a web server that answers with each of the contents in turn, then with the last one.

    Args:
        length: the announced length; a shorter content ends the connection early.
    """
    left = list(contents)

    class Changing(_Quiet):
        def do_GET(self):
            content = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True

    with _serving(Changing) as url:
        yield url


@contextlib.contextmanager
def refusing():
    """The endpoint of a store that refuses every request."""

    class Refusing(_Quiet):
        def do_GET(self):
            self.send_error(403)

        do_HEAD = do_GET

    with _serving(Refusing) as url:
        yield url


@contextlib.contextmanager
def s3_store(folder: Path):
    """The endpoint of an S3 whose bucket holds the folder's files."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket=BUCKET)
        for file in _files(folder):
            client.upload_file(str(file), BUCKET, str(file.relative_to(folder)), {"ACL": "public-read"})
        yield endpoint
    finally:
        server.stop()


@contextlib.contextmanager
def gcs_store(folder: Path):
    """The endpoint of a GCS emulator whose bucket holds the folder's files."""
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server._api._httpd.server_port}"
        for file in _files(folder):
            name = urllib.parse.quote(str(file.relative_to(folder)), safe="")
            url = f"{endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
            headers = {"Content-Type": "application/octet-stream"}
            urllib.request.urlopen(urllib.request.Request(url, file.read_bytes(), headers)).close()
        yield endpoint
    finally:
        server.stop()


def _files(folder: Path):
    """Its files, without the annotation caches beside them."""
    hidden = set(folder.rglob(".*"))
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and hidden.isdisjoint((path, *path.parents))]


def one_in_ten(number: int) -> str | None:
    """The fault of a request: one in ten fails, with each kind of fault in turn."""
    return ("error", "reset", "lost")[number // 10 % 3] if number % 10 == 0 else None


class Faults:
    """A proxy's faults in the reads of images: `of(number)` is a kind of fault, or None, for each read.

    - "error" answers 500, and "reset" closes the connection.
    - "late" answers after `late` seconds.
    - "cut" sends half of what it announced, and "short" announces half.
    - "lost" does what was asked, and closes the connection without an answer.
    - "away" closes every connection.

    Args:
        counted: whether a request counts, by its path and method; by default the reads of images.
    """

    def __init__(self, of, late=30.0, counted=lambda path, command: path.endswith((".png", ".jpg"))):
        self.of = of
        self.late = late
        self.counted = counted
        self.reads = 0  # requests
        self.downloads = 0  # of these, those of the whole image
        self.made = []
        self.lock = threading.Lock()

    def next(self, path, command):
        if not self.counted(path, command):
            return self.of(0) if self.of(0) == "away" else None
        with self.lock:
            self.reads += 1
            self.downloads += command == "GET"
            kind = self.of(self.reads)
            if kind:
                self.made.append(kind)
            return kind


@contextlib.contextmanager
def with_faults(endpoint: str, faults: Faults, *listens):
    """The endpoint of a proxy before a store; `listens` is a host and a port."""
    host = endpoint.removeprefix("http://")

    class Proxy(_Quiet):
        def do_GET(self):
            kind = faults.next(self.path.split("?")[0], self.command)
            if kind in ("reset", "away"):
                self.close_connection = True
                self.connection.close()
                return
            if kind == "error":
                self.send_error(500)
                return
            if kind == "late":
                time.sleep(faults.late)
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            store = http.client.HTTPConnection(host, timeout=600)
            store.request(self.command, self.path, content or None, headers=dict(self.headers))
            answer = store.getresponse()
            body = answer.read()
            if kind == "lost":
                self.close_connection = True
                self.connection.close()
                return
            sent = body[: len(body) // 2] if kind in ("cut", "short") else body
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(body)
            self.send_header("Content-Length", str(len(sent)) if kind == "short" else str(length or 0))
            self.end_headers()
            self.wfile.write(sent)
            self.close_connection = kind == "cut"

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    with _serving(Proxy, *listens) as url:
        yield url
