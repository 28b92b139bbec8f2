"""A model's answers over HTTP: the paths of OpenAI's API, its key, its streams.

    server = Server(("127.0.0.1", 8000), service, key=None)
    server.serve_forever()

Nothing is read from disk. What every request must satisfy is checked in serving/http_base.py.

Requires: serving/http_base.py, serving/service.py.
Next: serve.py.
Source: server-sent events (WHATWG HTML, sec. 9.2).
"""
import hmac
import traceback

from errors import first_line
from serving.engine import Busy, Closed
from serving.http_base import BoundedServer, GuardedHandler
from serving.schema import BadRequest, openapi
from serving.service import Reply, Service

OPEN = ("/health", "/openapi.json")         # without a key


class Server(BoundedServer):
    """The listening socket. key: what clients must send, or None."""

    def __init__(self, address: tuple[str, int], service: Service, key: str | None,
                 quiet: bool = False):
        self.service = service
        self.key = key
        super().__init__(address, Handler, quiet)


class Handler(GuardedHandler):
    """One connection."""

    gets = ("/health", "/openapi.json", "/v1/models")
    posts = ("/v1/chat/completions", "/v1/completions", "/v1/score/evaluation")

    def send_failure(self, error: Exception):
        """Say that the server is busy, closed, or that the model failed."""
        if isinstance(error, Busy):
            return self.send_error_body(429, "too many requests wait; try again in a moment",
                                        "rate_limit_error", code="rate_limit_exceeded")
        if isinstance(error, Closed):
            return self.send_error_body(503, "the server is shutting down", "server_error")
        if not isinstance(error, (ValueError, RuntimeError)):
            traceback.print_exc()
        self.send_error_body(500, f"the model failed: {first_line(error)}", "server_error")

    def dispatch(self, paths: tuple[str, ...]):
        """Check who asks, read the body, answer."""
        self.check_host_and_origin()
        path = self.known_path(paths)
        if path not in OPEN:
            self.check_key()
        service = self.server.service
        if path == "/health":
            return self.send_json(200, {"status": "ok"})
        if path == "/openapi.json":
            return self.send_json(200, openapi())
        if path == "/v1/models":
            return self.send_json(200, service.list_models())
        body = self.read_body()
        if path == "/v1/score/evaluation":
            return self.send_json(200, service.score(body))
        reply = service.chat(body) if "chat" in path else service.complete(body)
        reply.start()
        if body.get("stream"):
            self.send_stream(reply, body.get("stream_options") or {})
        else:
            for _ in reply.run(self.client_is_gone):
                pass
            self.send_json(200, reply.body())

    def check_key(self):
        """Raise BadRequest without the key, where one is set."""
        if self.server.key is None:
            return
        sent = self.headers.get("Authorization", "")
        wanted = f"Bearer {self.server.key}"
        if not hmac.compare_digest(sent.encode("utf-8", "replace"), wanted.encode()):
            raise BadRequest("the key is missing or wrong: send Authorization: Bearer KEY",
                             code="invalid_api_key", status=401)

    def send_stream(self, reply: Reply, options: dict):
        """Send an answer piece by piece, as server-sent events."""
        sent = [0] * len(reply.choices)
        for index, pieces in reply.run(self.client_is_gone):
            if not self.started:                    # after the first token: errors have a status
                self.start_stream(reply)
            for chunk in reply.chunks(index, pieces, sent[index]):
                self.send_event(chunk)
            sent[index] = len(reply.choices[index].token_logps)
        if options.get("include_usage"):
            self.send_event(reply.chunk(usage=reply.usage()))
        self.wfile.write(b"data: [DONE]\n\n")

    def start_stream(self, reply: Reply):
        self.started = True
        self.close_connection = True                # the end of the stream is the connection's
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        if reply.kind == "chat.completion":
            for index in range(len(reply.choices)):
                delta = {"role": "assistant", "content": ""}
                self.send_event(reply.chunk({"index": index, "delta": delta, "logprobs": None,
                                             "finish_reason": None}))
