"""A web server on loopback, in a process of its own."""

import functools
import http.server
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served(handler: type[http.server.BaseHTTPRequestHandler], **options: object) -> Iterator[str]:
    """The URL of a server whose requests a handler with these options answers."""
    port = multiprocessing.Queue()

    class Quiet(handler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    def serve() -> None:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, **options))
        port.put(server.server_port)
        server.serve_forever()

    process = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get()}"
    finally:
        process.terminate()
        process.join()
