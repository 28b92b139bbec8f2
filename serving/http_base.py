"""HTTP for a server on this machine: limits, who may ask, and JSON in and out.

    class Handler(GuardedHandler):
        def dispatch(self, paths): ...          # answer self.path, or raise BadRequest

A thread for each connection reads one request after the other. Every error is a JSON object in
OpenAI's shape. The servers of serve.py (models) and board.py (the web board) are made of this.

Requires: serving/schema.py (BadRequest).
Next: serving/handler.py, board.py.
Source: HTTP semantics RFC 9110.
"""
import json
import re
import select
import socket
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from errors import first_line, printable
from serving.schema import BadRequest
from text.json_text import parse

LARGEST_BODY = 4 * 2**20        # bytes
MOST_CONNECTIONS = 256
SECONDS_TO_SEND = 60            # in which a body must arrive
IDLE_SECONDS = 30               # until a silent connection is closed
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d{1,5})?", re.ASCII)      # name, port
LOCAL = ("localhost", "127.0.0.1", "::1")


class Gone(Exception):
    """The client has closed the connection."""


class BoundedServer(ThreadingHTTPServer):
    """A listening socket with a limited number of connections. quiet: no line for each request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type, quiet: bool = False):
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.quiet = quiet
        self.host = address[0]
        self.free = threading.Semaphore(MOST_CONNECTIONS)
        self.answering = 0                          # requests that are being answered
        self.counting = threading.Lock()
        try:
            super().__init__(address, handler)
        except OSError as error:
            raise ValueError(f"port: {address[0]}:{address[1]} cannot be listened at "
                             f"({error.strerror}); name another one, or 0 for any that is free"
                             ) from None

    def process_request(self, request, client_address):
        if self.free.acquire(blocking=False):
            return super().process_request(request, client_address)
        body = json.dumps(error_body("too many connections", "server_error")).encode()
        try:
            request.settimeout(1)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
                            b"Content-Type: application/json\r\nContent-Length: "
                            + str(len(body)).encode() + b"\r\n\r\n" + body)
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):          # of a client that left: nothing to say
            traceback.print_exc()

    def wait_for_answers(self, seconds: float):
        """Wait until no request is being answered."""
        end = time.monotonic() + seconds
        while self.answering and time.monotonic() < end:
            time.sleep(0.02)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class GuardedHandler(BaseHTTPRequestHandler):
    """One connection. A subclass answers in `dispatch`."""

    protocol_version = "HTTP/1.1"
    server_version = "pocket-factory"
    sys_version = ""
    timeout = IDLE_SECONDS
    started = False                 # whether a status has been sent for this request
    gets: tuple[str, ...] = ()      # paths that answer GET, and POST
    posts: tuple[str, ...] = ()

    def do_GET(self):
        self.answer(self.gets)

    def do_POST(self):
        self.answer(self.posts)

    def answer(self, paths: tuple[str, ...]):
        """Answer one request, whatever happens."""
        with self.server.counting:
            self.server.answering += 1
        self.started = False
        start = time.monotonic()
        self.unread = True          # the body, which would be taken for the next request
        try:
            self.dispatch(paths)
        except BadRequest as error:
            kind = "authentication_error" if error.status == 401 else "invalid_request_error"
            self.send_error_body(error.status, str(error), kind, error.param, error.code)
        except (Gone, OSError):
            self.close_connection = True
        except Exception as error:
            self.send_failure(error)
        finally:
            with self.server.counting:
                self.server.answering -= 1
            milliseconds = 1000 * (time.monotonic() - start)
            self.say(f"{self.command} {self.path[:200]}  {milliseconds:.0f} ms")

    def dispatch(self, paths: tuple[str, ...]):
        """Answer the request. Raises BadRequest."""
        raise NotImplementedError

    def send_failure(self, error: Exception):
        """Answer a request that failed for a reason of the server's own."""
        traceback.print_exc()
        self.send_error_body(500, f"it failed: {first_line(error)}", "server_error")

    def known_path(self, paths: tuple[str, ...]) -> str:
        """The path of the request. Raises BadRequest where it is none of `paths`."""
        path = self.path.partition("?")[0]
        known = self.gets + self.posts
        if path in paths:
            return path
        if path in known:
            raise BadRequest(f"{self.command} is not allowed for {path}", status=405)
        raise BadRequest(f"no such path: {path[:200]}. There are {', '.join(known)}",
                         code="not_found", status=404)

    # ---- who asks

    def check_host_and_origin(self):
        """Refuse web pages: another host name (DNS rebinding), or another origin."""
        host = self.headers.get("Host", "")
        name = HOST.fullmatch(host)
        local = self.server.host in LOCAL
        if not name or local and name[1].strip("[]").lower() not in LOCAL:
            raise BadRequest(f"Host: {host[:100]!r} is not this server", code="wrong_host",
                             status=403)
        origin = self.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise BadRequest(f"Origin: {origin[:100]!r}: pages of other origins may not ask here",
                             code="wrong_origin", status=403)

    def client_is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    # ---- reading

    def read_body(self) -> dict:
        """The JSON object of the request."""
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or not lengths:
            raise BadRequest("send the body with Content-Length", status=411)
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
            raise BadRequest(f"Content-Length: {', '.join(lengths)[:60]!r} is no length")
        length = int(lengths[0][:19])
        if length > LARGEST_BODY:
            self.discard(length)
            raise BadRequest(f"the body has {length:,} bytes, at most {LARGEST_BODY:,} are read",
                             code="request_too_large", status=413)
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        content = self.read_bytes(length)
        self.unread = False
        if kind != "application/json":
            raise BadRequest(f"Content-Type: {kind[:60]!r} is not application/json", status=415)
        try:
            body = parse(content.decode("utf-8"))
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {first_line(error)}") from None
        if not isinstance(body, dict):
            raise BadRequest("the body is not a JSON object")
        return body

    def read_bytes(self, length: int) -> bytes:
        """Exactly so many bytes. Raises BadRequest if they do not come in time."""
        end = time.monotonic() + SECONDS_TO_SEND
        parts = []
        while length:
            try:
                part = self.rfile.read1(min(length, 2**16))
            except TimeoutError:
                part = None
            if part == b"":
                raise Gone
            if part is None or time.monotonic() > end:
                raise BadRequest("the body did not arrive in time", status=408)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def discard(self, length: int):
        """Read a body that is too large, within limits: a client that sends reads no answer."""
        try:
            for _ in range(min(length, 8 * LARGEST_BODY) // 2**16):
                self.read_bytes(min(2**16, length))
        except (BadRequest, Gone, OSError):
            pass

    # ---- sending

    def send_json(self, status: int, body: dict, headers: dict | None = None):
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        if self.unread and (self.headers.get("Content-Length") or
                            self.headers.get("Transfer-Encoding")):
            self.close_connection = True
        self.started = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error_body(self, status: int, message: str, kind: str, param: str | None = None,
                        code: str | None = None):
        """Send an error; within a stream, as its last event."""
        body = error_body(message, kind, param, code)
        headers = {"Retry-After": "1"} if status == 429 else {}
        if status == 405:
            headers["Allow"] = "GET" if self.path.partition("?")[0] in self.gets else "POST"
        try:
            if self.started:
                self.send_event(body)
            else:
                self.send_json(status, body, headers)
        except OSError:
            self.close_connection = True

    def send_error(self, code, message=None, explain=None):
        """What http.server itself finds wrong: a bad request line, an unknown method."""
        self.headers = getattr(self, "headers", {})     # it may not even have been read
        self.request_version = self.protocol_version    # and without one no status is sent
        self.unread = True
        self.started = False
        self.close_connection = True
        code = 405 if code == 501 else code
        self.path = getattr(self, "path", "/")
        self.send_error_body(int(code), message or "bad request", "invalid_request_error")

    def send_event(self, body: dict):
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        self.wfile.write(b"data: " + content + b"\n\n")

    # ---- what is printed

    def say(self, line: str):
        if not self.server.quiet:
            print(f"  {time.strftime('%H:%M:%S')}  {printable(line)}", file=sys.stderr, flush=True)

    def log_message(self, format, *args):
        """http.server's own line; `answer` says more."""
