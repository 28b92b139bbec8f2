"""A hub of data sets on this machine, as huggingface_hub asks it: names of files, and files.

Requires: nothing.
"""
import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote, urlsplit


@contextlib.contextmanager
def serve(repositories, branches=()):
    """Serve {repository: {name: bytes}} until the block ends -> (address, names that were fetched).

    branches: {(repository, revision): {name: bytes}} beside main.
    """
    contents = {(name, "main"): files for name, files in repositories.items()} | dict(branches)
    fetched = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status, body, headers):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/api/datasets/"):
                name, _, revision = path.removeprefix("/api/datasets/").partition("/revision/")
                files = contents.get((name, revision or "main"))
                if files is not None:
                    about = {"id": name, "sha": "a" * 40, "private": False, "tags": [],
                             "siblings": [{"rfilename": file} for file in files]}
                    return self.reply(200, json.dumps(about).encode(),
                                      {"Content-Type": "application/json"})
            elif "/resolve/" in path:
                name, _, rest = path.removeprefix("/datasets/").partition("/resolve/")
                for (known, revision), files in contents.items():
                    file = rest.removeprefix(revision + "/")
                    if known == name and rest.startswith(revision + "/") and file in files:
                        if self.command == "GET":
                            fetched.append(file)
                        return self.reply(200, files[file], {
                            "X-Repo-Commit": "a" * 40,
                            "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'})
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
