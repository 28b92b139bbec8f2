"""The server behind the chat of the web board: a process of serve.py, and requests to it.

    job = start_chat(jobs, text, name, adapters, cwd)
    chat_state(jobs)                    {"state": "ready", "models": […], …}
    for piece in ask(job, "chat/completions", body):    # bytes of the answer, as they arrive

serve.py listens on a free port of this machine; its API key is stored only in the job's folder. All
boards of a folder share this server.

Requires: web/jobs.py, serving/http_base.py.
Next: board.py.
"""
from __future__ import annotations

import http.client
import json
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from serving.schema import BadRequest
from web.jobs import ROOT, BoardJob, Jobs

PATHS = ("chat/completions", "completions")
SECONDS_TO_ANSWER = 600         # between two pieces of an answer
SECONDS_TO_END = 10
PIECE = 2**16


def start_chat(jobs: Jobs, text: str, name: str, adapters: str, cwd: Path) -> BoardJob:
    """End the running server, and start serve.py with a config.

    adapters: folders as a,b; "" for the adapter in the config's output_dir.
    """
    end_chat(jobs)
    command = [sys.executable, str(ROOT / "serve.py"), "{config}", "host=127.0.0.1", "port=0"]
    if adapters:
        command.append(f"adapter_name_or_path={adapters}")
    key = secrets.token_urlsafe(24)
    return jobs.start("chat", command, text, name, cwd=cwd, environment={"API_KEY": key})


def running_chat(jobs: Jobs) -> BoardJob | None:
    """The newest running chat server, or None."""
    for job in reversed(jobs.list()):
        if job.read("job.json").get("kind") == "chat" and job.is_alive():
            return job
    return None


def end_chat(jobs: Jobs):
    """End the running chat server, and wait until its memory is free."""
    while job := running_chat(jobs):
        job.stop()
        deadline = time.monotonic() + SECONDS_TO_END
        while job.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        job.stop(kill=True)


def port_of(job: BoardJob) -> int | None:
    """The port that serve.py prints; None before it listens."""
    found = re.search(r"^serving +http://127\.0\.0\.1:(\d+)/v1 ", job.log()[0], re.MULTILINE)
    return int(found[1]) if found else None


def chat_state(jobs: Jobs) -> dict:
    """{"state": none, starting, ready or failed, …}; with `models` if ready."""
    chats = [job for job in jobs.list() if job.read("job.json").get("kind") == "chat"]
    if not chats:
        return {"state": "none"}
    job = chats[-1]
    text, _ = job.log()
    found = {"job": job.number, "name": job.read("job.json").get("name"), "log": text[-4000:]}
    state = job.state()
    if state not in ("waiting", "running"):
        return {**found, "state": "failed" if state == "failed" else "none"}
    if not port_of(job):
        return {**found, "state": "starting"}
    try:
        models = json.loads(b"".join(request(job, "GET", "models")))["data"]
    except (OSError, ValueError, KeyError, http.client.HTTPException):
        return {**found, "state": "starting"}
    return {**found, "state": "ready", "models": [model["id"] for model in models]}


def ask(job: BoardJob | None, path: str, body: dict) -> Iterator[bytes]:
    """The pieces of an answer. Raises BadRequest if no server runs or it refuses the request."""
    if path not in PATHS:
        raise BadRequest(f"path: {path!r} is none of {', '.join(PATHS)}", "path", status=404)
    if job is None or not port_of(job):
        raise BadRequest("no model is loaded yet: press Load", status=409)
    return request(job, "POST", path, json.dumps(body).encode())


def request(job: BoardJob, method: str, path: str, body: bytes | None = None) -> Iterator[bytes]:
    """The pieces of serve.py's answer to one request."""
    key = job.read("job.json")["environment"]["API_KEY"]
    connection = http.client.HTTPConnection("127.0.0.1", port_of(job), timeout=SECONDS_TO_ANSWER)
    connection.request(method, f"/v1/{path}", body, {
        "Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        error = json.loads(answer.read()).get("error", {})
        connection.close()
        raise BadRequest(error.get("message", "the server refused"), error.get("param"),
                         status=answer.status)
    return pieces_of(answer, connection)


def pieces_of(answer, connection) -> Iterator[bytes]:
    """The body as it arrives; closing the iterator ends the request."""
    try:
        while piece := answer.read1(PIECE):
            yield piece
    finally:
        connection.close()
