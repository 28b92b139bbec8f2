"""The web board: start, watch and try runs from a page in the browser.

    python board.py                         prints the address, http://127.0.0.1:7860/?token=…
    python board.py my.yaml lora_rank=16    opens with this config
    python board.py --folder ../models      allow the page to use files in this folder as well
    python board.py --port 0                any free port

config → form and yaml → one process per run → files of the run → charts. A run continues when
the browser or the board is closed; the board only reads files of runs and sends signals. The chat
is a process of serve.py. Only this machine can connect, and only with the token.

Requires: serve.py (a server like this one), serving/http_base.py, web/jobs.py, web/config_form.py,
web/run_files.py, web/data_rows.py, web/chat_server.py, web/board.html (the page).
Next: docs/board.md.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import os
import re
import secrets
import signal
import sys
import threading
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from errors import did_you_mean, error_message, run_script, say
from serving.http_base import BoundedServer, GuardedHandler
from serving.schema import BadRequest
from settings.config import KEYS
from settings.load_config import LONGEST_FILE, read_argv
from web.chat_server import ask, chat_state, end_chat, running_chat, start_chat
from web.config_form import check_text, entries_of, form_rows, loaded, set_value
from web.data_rows import read_page
from web.folders import CONFIGS, Folders
from web.given import given_number, given_text
from web.jobs import ROOT, BoardJob, Jobs
from web.run_files import (list_runs, progress_of, read_results, logged_steps, result_folders,
                           screen_of, stop_run)

PAGE = ROOT / "web/board.html"
HOME = "saves/.board"           # folder of the jobs, in the folder where the board is started
TABS = ("run", "watch", "chat", "data", "evaluate", "export")
FIRST_CONFIG = "configs/tiny_lora_sft.yaml"
CARDS = ("/dev/nvidia0", "/dev/kfd")        # if one exists, cli.py starts a process per GPU
# kind of job: (script whose rules check the config, command, settings, whether it queues)
KINDS = {
    "train": ("train", "train.py", {}, True),
    "plan": ("train", "train.py", {"dry_run": "true"}, False),
    "rows": ("data", "-m web.data_rows", {"jsonl": "{folder}/rows.jsonl"}, False),
    "eval": ("eval", "eval.py", {}, True),
    "merge": ("merge", "merge.py", {}, True),
}


def main(argv: list[str]):
    options = read_options(argv)
    folders = Folders([os.getcwd(), *options.folder])
    name, text = first_config(options.settings, folders)
    board = Board(folders, Jobs(Path.cwd() / HOME), name, text)
    server = BoardServer(("127.0.0.1", options.port), board)
    tab = "" if options.tab == TABS[0] else f"&tab={options.tab}"
    say(f"the board  http://127.0.0.1:{server.server_port}/?token={board.token}{tab}")
    say(f"folders    {', '.join(map(str, folders.roots))}")
    say("Ctrl-C ends the board and its chat; runs and the queue continue")
    serve_board(server)


def read_options(argv: list[str]) -> argparse.Namespace:
    """The command line options; `settings` has the config file and key=value arguments."""
    parser = argparse.ArgumentParser(
        prog="python board.py", description=__doc__.partition("\n\nRequires")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--port", type=int, default=7860, help="0: any free port (default: 7860)")
    parser.add_argument("--folder", action="append", default=[],
                        help="a further folder whose files the page may use; can be repeated")
    parser.add_argument("--tab", choices=TABS, default=TABS[0], help="the tab to open")
    options, options.settings = parser.parse_known_args(argv)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port {options.port}: it must be 0 to 65535")
    return options


def first_config(settings: list[str], folders: Folders) -> tuple[str, str]:
    """(name, text) of the config that the page opens with."""
    path, pairs = read_argv(settings, "train")
    file = folders.inside(str(path)) if path else folders.roots[0] / FIRST_CONFIG
    text = ""
    if path or not pairs and file.is_file():
        text = file.read_text(encoding="utf-8-sig")
    name = file.name if text else "my.yaml"
    for key, value, _ in pairs:
        text = set_value(text, name, key, value)
    return name, text


def serve_board(server: "BoardServer"):
    """Answer until SIGTERM or SIGINT."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    threading.Thread(target=server.serve_forever, name="board", daemon=True).start()
    ended.wait()
    server.shutdown()
    server.server_close()
    if server.board.started_chat:
        end_chat(server.board.jobs)


# ---- requests of the page -----------------------------------------------------------------------


class Board:
    """The answers to the page's requests. Each method takes the query or the body, a dict.

    All raise BadRequest for an invalid query or body.
    """

    def __init__(self, folders: Folders, jobs: Jobs, name: str = "my.yaml", text: str = ""):
        self.folders = folders
        self.jobs = jobs
        self.first = {"name": name, "text": text}
        self.token = secrets.token_urlsafe(24)
        self.started_chat = False

    # ---- the config

    def form(self, query: dict) -> dict:
        """The table of keys, the config shown first, and the folders."""
        return {"keys": form_rows(), "first": self.first, "configs": self.folders.configs(),
                "suggestions": self.folders.suggestions(),
                "folders": [str(root) for root in self.folders.roots]}

    def open_config(self, query: dict) -> dict:
        """A config file, or the config of a job."""
        if "job" in query:
            path = self.job_of(query).config()
        else:
            path = self.config_path(query)
        if path is None or not path.is_file():
            raise BadRequest("there is no such config", status=404)
        if path.stat().st_size > 4 * LONGEST_FILE:
            raise BadRequest(f"{path.name} is too large for a config; is it a data file?")
        return {"name": path.name, "text": path.read_text(encoding="utf-8-sig", errors="replace")}

    def edit(self, body: dict) -> dict:
        """The config after the changes in `set`, with the errors and notes of the script."""
        text = given_text(body, "text", empty=True)
        name = given_text(body, "name", "my.yaml")
        changes = body.get("set") or {}
        if not isinstance(changes, dict):
            raise BadRequest("set: expected an object {key: text}", "set")
        refused = ""
        for key, value in changes.items():
            try:
                text = set_value(text, name, key, given_text(changes, key, empty=True))
            except ValueError as error:     # not a valid config: keep the text and show the error
                refused = str(error)
        found = check_text(text, name, given_text(body, "script", empty=True), self.folders)
        return {"text": text, **found, "error": found["error"] or refused}

    def save(self, body: dict) -> dict:
        """Write the config to a file. An existing file is replaced only with `overwrite`."""
        path = self.config_path(body)
        text = given_text(body, "text")
        if path.exists() and not body.get("overwrite"):
            raise BadRequest(f"path: {self.folders.shown(path)} exists already", "path",
                             code="exists", status=409)
        entries_of(text, path.name)                     # raises ValueError for an invalid config
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return {"path": self.folders.shown(path)}

    def config_path(self, values: dict) -> Path:
        path = self.folders.inside(given_text(values, "path"))
        if path.suffix not in CONFIGS:
            raise BadRequest(f"path: {path.name} is not a config file ({', '.join(CONFIGS)})",
                             "path")
        return path

    # ---- jobs

    def status(self, query: dict) -> dict:
        """All runs and jobs."""
        return {"runs": list_runs(self.folders, self.jobs),
                "jobs": [job.describe() for job in self.jobs.list()]}

    def start(self, body: dict) -> dict:
        """Start a job of a kind, with a config and further settings, or queue it.

        again: number of an earlier job whose config is used. beside: do not wait for other jobs.
        """
        kind = given_text(body, "kind")
        if kind not in KINDS:
            raise BadRequest(f"kind: {kind[:40]!r} is none of {', '.join(KINDS)}"
                             f"{did_you_mean(kind, KINDS)}", "kind")
        script, command, own_settings, queues = KINDS[kind]
        if "again" in body:
            file = self.open_config({"job": body["again"]})
            text, name = file["text"], file["name"]
        else:
            text, name = given_text(body, "text"), given_text(body, "name", "my.yaml")
        settings = {**self.settings_of(body), **own_settings}
        config = self.checked(text, name, script, settings)
        if kind == "train" and any(os.path.exists(card) for card in CARDS):
            command = "cli.py train"
        output = config.export_dir if kind == "merge" else config.output_dir
        job = self.jobs.start(
            kind, command_line(command, settings), text, name, cwd=self.folders.roots[0],
            wait=queues and not body.get("beside"), changed_settings=settings,
            environment={"PYTHONPATH": str(ROOT)},
            output=str(self.folders.inside(output)) if output else None)
        return {"job": job.number}

    def settings_of(self, body: dict) -> dict:
        """The further settings of a job: {key: text}."""
        settings = body.get("settings") or {}
        if not isinstance(settings, dict):
            raise BadRequest("settings: expected an object {key: text}", "settings")
        for key in settings:
            if key.partition(".")[0] not in KEYS:
                raise BadRequest(f"settings: there is no key {key[:60]!r}"
                                 f"{did_you_mean(key, KEYS)}", "settings")
        return {key: given_text(settings, key, empty=True) for key in settings}

    def checked(self, text: str, name: str, script: str, settings: dict):
        """The Config of a job before it starts. Raises BadRequest with the script's error."""
        try:
            self.folders.check_settings([*entries_of(text, name), *settings.items()])
            return loaded(text, name, script, settings)
        except BadRequest:
            raise
        except (ValueError, OSError) as error:
            raise BadRequest(str(error), code="invalid_config") from None

    def stop(self, body: dict) -> dict:
        """Ask a job, or a run started outside the board, to save a checkpoint and end."""
        if "job" in body:
            self.job_of(body).stop(kill=body.get("kill") is True)
        else:
            stop_run(self.folders.inside(given_text(body, "folder")))
        return {}

    def log(self, query: dict) -> dict:
        """State, progress and log of a job; without the text if the log still has `size` bytes."""
        job = self.job_of(query)
        text, size = job.log()
        found = {"size": size, "state": job.state(), "progress": progress_of(text)}
        same = "size" in query and given_number(query, "size") == size
        return found if same else {**found, "text": screen_of(text)}

    def job_of(self, values: dict) -> BoardJob:
        if not (job := self.jobs.get(given_number(values, "job"))):
            raise BadRequest(f"there is no job {values['job']}", "job", status=404)
        return job

    # ---- files of runs, rows of data

    def run(self, query: dict) -> dict:
        """The logged steps of a run."""
        folder = self.folders.inside(given_text(query, "folder"))
        return logged_steps(folder, given_number(query, "after", 0))

    def rows(self, query: dict) -> dict:
        """A page of the rows written by a job of kind rows."""
        path = self.job_of(query).folder / "rows.jsonl"
        count = min(given_number(query, "count", 20), 200)
        return read_page(path, given_number(query, "start", 0), count, query.get("find", ""))

    def results(self, query: dict) -> dict:
        """The folders with results of eval.py, and the results in `folder`."""
        folders = result_folders(self.folders)
        folder = query.get("folder")
        return {"folders": folders, **(read_results(self.folders.inside(folder)) if folder else {})}

    # ---- chat

    def load_chat(self, body: dict) -> dict:
        """Start serve.py with a config."""
        text, name = given_text(body, "text"), given_text(body, "name", "my.yaml")
        adapters = given_text(body, "adapters", empty=True)
        settings = {"adapter_name_or_path": adapters} if adapters else {}
        self.checked(text, name, "serve", settings)
        self.started_chat = True
        start_chat(self.jobs, text, name, adapters, self.folders.roots[0])
        return {}

    def chat(self, query: dict) -> dict:
        """Whether a chat server runs, and its models."""
        return chat_state(self.jobs)

    def end(self, body: dict) -> dict:
        """End the chat server."""
        end_chat(self.jobs)
        return {}

    def answer(self, body: dict):
        """The pieces of an answer, as serve.py streams them."""
        request = body.get("body")
        if not isinstance(request, dict):
            raise BadRequest("body: expected a request of OpenAI's API", "body")
        return ask(running_chat(self.jobs), given_text(body, "path"), request)


GETS = {
    "/api/form": Board.form, "/api/config": Board.open_config, "/api/status": Board.status,
    "/api/log": Board.log, "/api/run": Board.run, "/api/rows": Board.rows,
    "/api/results": Board.results, "/api/chat": Board.chat,
}
POSTS = {
    "/api/edit": Board.edit, "/api/save": Board.save, "/api/start": Board.start,
    "/api/stop": Board.stop, "/api/load": Board.load_chat, "/api/unload": Board.end,
    "/api/answer": Board.answer,
}


def command_line(command: str, settings: dict) -> list[str]:
    """The argument list of a process; each setting is one argument, and no shell is involved."""
    words = command.split()
    if words[0].endswith(".py"):
        words[0] = str(ROOT / words[0])
    return [sys.executable, *words, "{config}",
            *(f"{key}={value}" for key, value in settings.items())]


# ---- HTTP ---------------------------------------------------------------------------------------


class BoardServer(BoundedServer):
    """The listening socket, with the page and its content policy."""

    def __init__(self, address: tuple[str, int], board: Board, page: Path = PAGE):
        self.board = board
        self.page = page.read_bytes()
        self.policy = content_policy(self.page.decode("utf-8"))
        super().__init__(address, BoardHandler, quiet=True)


def content_policy(page: str) -> str:
    """A Content-Security-Policy that allows the page's own script and style, by their hashes."""
    hashes = {}
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                   for text in found]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
            "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


class BoardHandler(GuardedHandler):
    """One connection of a browser."""

    gets = ("/", *GETS)
    posts = tuple(POSTS)

    def dispatch(self, paths: tuple[str, ...]):
        """Check host, origin and token; send the page or an answer."""
        self.check_host_and_origin()
        path = self.known_path(paths)
        query = dict(parse_qsl(urlsplit(self.path).query))
        if path == "/":
            return self.send_page(query)
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise BadRequest("requests from pages of other origins are refused", status=403)
        if not self.has_token():
            raise BadRequest("open the address that board.py prints; it contains the token",
                             status=401)
        values = query if path in GETS else self.read_body()
        try:
            answer = (GETS | POSTS)[path](self.server.board, values)
        except BadRequest:
            raise
        except (ValueError, OSError) as error:          # of files, such as a name that is too long
            raise BadRequest(error_message(error)) from None
        if path == "/api/answer":
            return self.send_pieces(answer)
        self.send_json(200, answer)

    def cookie_name(self) -> str:
        return f"board_{self.server.server_port}"       # cookies are shared by all ports of a host

    def has_token(self) -> bool:
        """Whether the cookie holds the token."""
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            return False
        sent = cookies[self.cookie_name()].value if self.cookie_name() in cookies else ""
        return same_token(sent, self.server.board.token)

    def send_page(self, query: dict):
        """Send the page. With the token in the address, set the cookie and reload without it."""
        token = self.server.board.token
        if same_token(query.get("token", ""), token):
            tab = query.get("tab") if query.get("tab") in TABS else TABS[0]
            # after a link on another site, a redirect would not send a SameSite=Strict cookie
            reload = ('<link rel="icon" href="data:,">'
                      f'<meta http-equiv="refresh" content="0; url=/#{tab}">')
            return self.send_bytes(200, reload.encode(), {
                "Content-Type": "text/html", "Set-Cookie": f"{self.cookie_name()}={token}; "
                                                           "HttpOnly; SameSite=Strict; Path=/"})
        if not self.has_token():
            return self.send_bytes(401, b"Open the address that board.py prints: it ends in "
                                        b"?token=...\n", {"Content-Type": "text/plain"})
        self.send_bytes(200, self.server.page, {"Content-Type": "text/html; charset=utf-8"})

    def send_bytes(self, status: int, content: bytes, headers: dict):
        self.send_head(status, {**headers, "Content-Length": str(len(content))})
        self.wfile.write(content)

    def send_head(self, status: int, headers: dict):
        self.started = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_pieces(self, pieces):
        """Forward a streamed answer; closing the connection ends the stream."""
        self.close_connection = True
        self.send_head(200, {"Content-Type": "text/event-stream; charset=utf-8",
                             "Connection": "close"})
        try:
            for piece in pieces:
                self.wfile.write(piece)
        finally:
            pieces.close()

    def end_headers(self):
        """The headers of every answer."""
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()


def same_token(sent: str, token: str) -> bool:
    return hmac.compare_digest(sent.encode("utf-8", "replace"), token.encode())


if __name__ == "__main__":
    run_script(main)
