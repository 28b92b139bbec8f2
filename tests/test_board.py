"""board.py and web/: the form, jobs and files of runs, and what a hostile client gets.

One board in this process serves all tests; jobs are small processes of their own.
"""
import base64
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time

import pytest

import board
from serving.http_base import LARGEST_BODY
from serving.schema import BadRequest
from settings.load_config import read_file
from tests.common import ROOT, SHARED, needs_shared
from web.chat_server import ask
from web.config_form import check_text, form_rows, script_for, set_value, written_values
from web.data_rows import read_page
from web.folders import Folders
from web.jobs import Jobs, safe_name
from web.run_files import (describe_run, lock_holder, logged_steps, progress_of, read_results,
                           screen_of)

CONFIG = (ROOT / "configs/tiny_lora_sft.yaml").read_text(encoding="utf-8")
SOON = 20           # seconds in which a small process must have ended
# configs of which every value is edited, of the others each sixth
EDITED = ("llama3_lora_sft.yaml", "train_llama3_qlora.json", "chat_llama3.json")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder for the board, with a run, a config, and a link out of it."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "outside.yaml").write_text("secret: true\n")
    home = folder / "home"
    run = home / "saves/run"
    run.mkdir(parents=True)
    rows = [{"current_steps": step, "total_steps": 4, "loss": 1 / step, "lr": 0.1}
            for step in (1, 2, 3)]
    rows[2]["loss"] = float("nan")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "trainer_log.jsonl").write_text(text + '{"current_steps": 4, "lo')
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [
        {"step": 2, "loss": 0.5, "grad_norm": 7.0}]}))
    (home / "configs").mkdir()
    (home / "configs/my.yaml").write_text(CONFIG, encoding="utf-8")
    (home / "configs/link.yaml").symlink_to(folder / "outside.yaml")
    return home


@pytest.fixture(scope="module")
def server(here):
    served = board.Board(Folders([here]), Jobs(here / "saves/.board"), "my.yaml", CONFIG)
    server = board.BoardServer(("127.0.0.1", 0), served)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def request(server, method, path, body=None, **headers):
    """(status, headers, text) of a request with the cookie, unless `headers` say otherwise."""
    port = server.server_port
    sent = {"Host": f"127.0.0.1:{port}", "Cookie": f"board_{port}={server.board.token}",
            "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SOON)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, content, {k: v for k, v in sent.items() if v is not None})
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read().decode("utf-8", "replace")
    connection.close()
    return found


def call(server, path, body=None):
    """The JSON answer of the board."""
    status, _, text = request(server, "POST" if body is not None else "GET", path, body)
    assert status == 200, text
    return json.loads(text)


def wait_for(found, seconds=SOON):
    """The first true value of found()."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


# ---- the form and the yaml ----------------------------------------------------------------------


def configs():
    """Names of the recorded configs."""
    folder = SHARED / "configs"
    return sorted(str(path.relative_to(folder)) for path in folder.glob("**/*")
                  if path.suffix in (".yaml", ".json") and "deepspeed" not in path.parts
                  and path.name != "index.json")


@needs_shared
@pytest.mark.parametrize("name", configs())
def test_a_config_is_shown_unchanged_and_edited_one_value_at_a_time(name):
    """What the form shows is what the reader of configs reads; other values and comments stay."""
    path = SHARED / "configs" / name
    text = path.read_text(encoding="utf-8")
    values = written_values(text, path.name)
    assert list(values) == [key for key, _, _ in read_file(path)]
    for key, value in list(values.items())[::1 if name in EDITED else 6]:
        if value:
            assert written_values(set_value(text, path.name, key, value), path.name) == values
        less = set_value(text, path.name, key, "")
        rest = {name: other for name, other in values.items() if name != key}
        assert not rest or written_values(less, path.name) == rest
    more = set_value(text, path.name, "run_name", "it's # a: {new} name")
    assert written_values(more, path.name)["run_name"] == "it's # a: {new} name"
    comments = re.findall(r"^ *#.*$", text, re.MULTILINE)
    assert re.findall(r"^ *#.*$", more, re.MULTILINE) == comments


def test_a_block_of_a_value_ends_before_the_comments_that_follow():
    text = "ask:\n- a\n- b\n\n# about seeds\nseed: 1 # one\n"
    assert set_value(text, "a.yaml", "ask", "[c]") == "ask: [c]\n\n# about seeds\nseed: 1 # one\n"
    assert set_value(text, "a.yaml", "ask", "") == "\n# about seeds\nseed: 1 # one\n"
    assert set_value(text, "a.yaml", "seed", "2").endswith("seed: 2 # one\n")


def test_every_key_of_the_table_has_a_row_and_a_group():
    rows = {row["name"]: row for row in form_rows()}
    from settings.config import KEYS
    assert list(rows) == list(KEYS) and all(row["group"] and row["help"] for row in rows.values())
    assert rows["lora_rank"]["default"] == "8" and "cosine" in rows["lr_scheduler_type"]["choices"]


@pytest.mark.parametrize("change, sentence", [
    (("lora_rank: 8", "lora_rank: 0"), "my.yaml line 17: lora_rank: '0' is out of range"),
    (("lora_rank", "lora_rnk"), "my.yaml line 17: unknown key 'lora_rnk' (did you mean"),
    (("stage: sft", "stage: ["), "not valid YAML"),
    (("saves/tiny-lora", "../tiny-lora"), "output_dir: ../tiny-lora lies outside of the board's"),
    (("models/tiny", "/etc"), "model_name_or_path: /etc lies outside of the board's folders"),
])
def test_the_sentences_are_those_of_the_scripts(change, sentence):
    found = check_text(CONFIG.replace(*change), "my.yaml", "", Folders([ROOT]))
    line = next(number for number, row in enumerate(CONFIG.splitlines(), 1) if "lora_rank" in row)
    assert sentence.replace("line 17", f"line {line}") in found["error"]


@pytest.mark.parametrize("values, script", [
    ({"dataset": "a"}, "train"), ({"export_dir": "a", "adapter_name_or_path": "b"}, "merge"),
    ({"eval_dataset": "a"}, "eval"), ({"model_name_or_path": "a"}, "chat")])
def test_the_script_of_a_config_is_recognized(values, script):
    assert script_for(values) == script


def test_an_edit_of_the_form_changes_the_yaml(server):
    found = call(server, "/api/edit", {"text": CONFIG, "name": "my.yaml",
                                       "set": {"lora_rank": "16", "seed": "7", "stage": ""}})
    assert "\nlora_rank: 16\n" in found["text"] and found["text"].endswith("\nseed: 7\n")
    assert "\nstage:" not in found["text"] and not found["error"]
    broken = call(server, "/api/edit", {"text": "a: [", "name": "my.yaml", "set": {"seed": "7"}})
    assert broken["text"] == "a: [" and "not valid YAML" in broken["error"]


def test_a_config_is_saved_and_replaced_only_on_request(server, here):
    body = {"path": "configs/new.yaml", "text": "seed: 1\n"}
    assert call(server, "/api/save", body) == {"path": "configs/new.yaml"}
    assert request(server, "POST", "/api/save", body | {"text": "seed: 2\n"})[0] == 409
    call(server, "/api/save", body | {"text": "seed: 2\n", "overwrite": True})
    assert (here / "configs/new.yaml").read_text() == "seed: 2\n"
    assert "configs/new.yaml" in call(server, "/api/form")["configs"]


# ---- jobs ---------------------------------------------------------------------------------------


def shell(jobs, command, wait=True):
    return jobs.start("train", ["sh", "-c", command], "seed: 1\n", "my.yaml", cwd=jobs.home,
                      wait=wait)


def test_jobs_queue_outlive_the_board_and_are_seen_by_two(tmp_path):
    """Queued jobs run one after the other; a cancelled one never runs; one job's end is its own."""
    jobs, other = Jobs(tmp_path / "jobs"), Jobs(tmp_path / "jobs")
    first = shell(jobs, "while [ ! -e go ]; do sleep 0.05; done; echo first >> ../order")
    second = shell(other, "echo second >> ../order; exit 75")
    third = shell(jobs, "echo third >> ../order")
    beside = shell(other, "echo beside >> ../order; exit 3", wait=False)
    assert [job.number for job in other.list()] == [1, 2, 3, 4]
    wait_for(lambda: first.state() == "running" and beside.state() == "failed")
    wait_for(lambda: third.read("state.json"))
    other.get(3).stop()
    wait_for(lambda: third.state() == "cancelled")
    assert second.state() == "waiting" and (tmp_path / "order").read_text() == "beside\n"
    (tmp_path / "jobs/go").touch()
    wait_for(lambda: second.state() == "stopped")
    assert first.state() == "finished"
    assert (tmp_path / "order").read_text() == "beside\nfirst\nsecond\n"


def test_a_job_is_asked_to_end_and_then_killed(tmp_path):
    jobs = Jobs(tmp_path / "jobs")
    code = ("import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked')); "
            "print('ready'); time.sleep(60); time.sleep(60)")
    job = jobs.start("train", [sys.executable, "-c", code], "", "a.yaml", cwd=tmp_path)
    wait_for(lambda: "ready" in job.log()[0])
    job.stop()
    wait_for(lambda: "asked" in job.log()[0] and job.state() == "stopping")
    process = job.read("state.json")["process"]
    assert os.getsid(process) == process != os.getsid(0)       # a session of its own
    job.stop(kill=True)
    wait_for(lambda: not job.is_alive())
    assert job.state() == "killed"
    os.waitpid(process, os.WNOHANG)


@pytest.mark.parametrize("name, safe", [
    ("../../etc/passwd", "passwd.yaml"), ("a b;rm -rf $HOME.yaml", "a-b-rm--rf-HOME.yaml"),
    ("x.json", "x.json"), ("..", "config.yaml"), ("{config}", "config.yaml")])
def test_names_of_configs_are_files_of_the_job(name, safe):
    assert safe_name(name) == safe


def test_a_start_is_refused_with_the_scripts_sentence(server):
    refused = [({"kind": "train", "text": "lora_rank: x\n"}, "lora_rank: 'x' is not a whole"),
               ({"kind": "train", "text": "model_name_or_path: a\n"}, "needs 'dataset'"),
               ({"kind": "shell", "text": "a: 1"}, "kind: 'shell' is none of train"),
               ({"kind": "train", "text": CONFIG, "settings": {"lora_rnk": "1"}}, "no key")]
    for body, sentence in refused:
        status, _, text = request(server, "POST", "/api/start", body)
        assert status == 400 and sentence in json.loads(text)["error"]["message"]
    assert not server.board.jobs.list()


def test_settings_are_arguments_that_no_shell_reads():
    words = board.command_line("train.py", {"output_dir": "a; touch b $(c)"})
    assert words[-1] == "output_dir=a; touch b $(c)" and words[-2] == "{config}"


# ---- files of runs ------------------------------------------------------------------------------


def test_steps_are_read_from_any_line_on(here):
    """Half a line is left for later, NaN is null, and an older release's norms are filled in."""
    found = logged_steps(here / "saves/run")
    assert [row["current_steps"] for row in found["rows"]] == [1, 2, 3] and found["next"] == 3
    assert found["rows"][1]["grad_norm"] == 7.0 and found["rows"][2]["loss"] is None
    assert [row["current_steps"] for row in logged_steps(here / "saves/run", 2)["rows"]] == [3]


def test_a_folder_has_the_state_of_the_run_that_works_or_has_finished_there(tmp_path):
    """Not of a later one that was refused, as the folder was in use."""
    from web.run_files import list_runs

    jobs, output = Jobs(tmp_path / "jobs"), tmp_path / "saves/one"
    output.mkdir(parents=True)
    end = "while [ ! -e go ]; do sleep 0.05; done; touch ../saves/one/all_results.json"
    first = jobs.start("train", ["sh", "-c", end], "", "a.yaml", cwd=jobs.home, output=str(output))
    refused = jobs.start("train", ["false"], "", "a.yaml", cwd=jobs.home, output=str(output))
    wait_for(lambda: refused.state() == "failed" and first.state() == "running")

    def state():
        return [run["state"] for run in list_runs(Folders([tmp_path]), jobs)]

    assert state() == ["running"]
    (jobs.home / "go").touch()
    wait_for(lambda: not first.is_alive())
    assert state() == ["finished"]


def test_the_form_offers_what_lies_in_the_folders(here):
    found = Folders([ROOT]).suggestions()
    assert "models/tiny" in found["model_name_or_path"] and "identity" in found["dataset"]
    assert "llama3" in found["template"] and Folders([here]).suggestions()["dataset"] == []


def test_the_list_shows_runs_of_a_terminal(server):
    run = call(server, "/api/status")["runs"][0]
    assert (run["folder"], run["state"], run["job"]) == ("saves/run", "ended", None)
    assert run["figures"]["lr"] == 0.1 and run["figures"]["loss"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="who holds a lock is asked on Linux only")
def test_who_works_in_a_folder_is_asked_of_the_system(tmp_path):
    """A number left in the file by a run that has ended is nobody's."""
    (tmp_path / ".lock").write_text(json.dumps({"process": os.getpid()}))
    assert lock_holder(tmp_path) is None
    child = os.fork()
    if not child:
        from runtime.resume import lock
        lock(tmp_path)
        time.sleep(SOON)
        os._exit(0)
    try:
        assert wait_for(lambda: lock_holder(tmp_path)) == child
        assert describe_run(tmp_path, None, Folders([tmp_path]))["state"] == "running"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_rows_that_changed_most_come_first(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps({"adapter": {"eval_token_loss": 1.0},
                                                          "base": {"eval_token_loss": 2.0}}))
    for name, answers in (("", ["same", "right", "wrng"]), (".base", ["same", "zzzzz", "wrong"])):
        text = "".join(json.dumps({"prompt": "p", "label": label, "predict": answer}) + "\n"
                       for label, answer in zip(("same", "right", "wrong"), answers))
        (tmp_path / f"generated_predictions{name}.jsonl").write_text(text)
    found = read_results(tmp_path)
    assert [row["number"] for row in found["changed"]] == [2, 3] and found["rows"] == 3
    assert found["changed"][0]["gain"] == 1.0 and found["changed"][1]["gain"] < 0


def test_a_log_is_shown_as_a_terminal_shows_it():
    log = "start\r\n 10%|#   | 1/10\r 50%|##  | 5/10\nend\x1b[0m\n"
    assert screen_of(log) == "start\n 50%|##  | 5/10\nend\n" and progress_of(log) == 0.5
    assert progress_of("no bar") is None


def test_a_page_of_rows_is_found_by_its_text(tmp_path):
    rows = [{"row": i, "parts": [{"text": f"Row {i}"}]} for i in range(30)]
    text = "".join(json.dumps(row) + "\n" for row in [{"rows": 30}, *rows])
    (tmp_path / "rows.jsonl").write_text(text + '{"row"')
    page = read_page(tmp_path / "rows.jsonl", start=1, count=2, find="row 2")
    assert page["matches"] == 11 and [row["row"] for row in page["rows"]] == [20, 21]
    assert read_page(tmp_path / "none.jsonl")["head"] is None


def test_loss_is_marked_as_in_training(tmp_path):
    """The parts of a row, joined, are the ids and labels that runtime.preview writes."""
    from runtime.preview import training_rows
    from settings.load_config import load_config
    from web.data_rows import main, sequences_of

    argv = [str(ROOT / "configs/tiny_lora_sft.yaml"), f"model_name_or_path={ROOT / 'models/tiny'}",
            f"dataset_dir={ROOT / 'data'}", "dataset=identity", "max_samples=5",
            f"output_dir={tmp_path / 'out'}", f"jsonl={tmp_path / 'rows.jsonl'}"]
    main(argv)
    _, _, examples, _ = training_rows(load_config(argv, "data"))
    rows = read_page(tmp_path / "rows.jsonl")["rows"]
    assert len(rows) == len(examples) == 5
    for row, example in zip(rows, examples):
        ids = [token for part in row["parts"] for token in part["ids"]]
        losses = [token for part in row["parts"] if part["loss"] for token in part["ids"]]
        assert ids == example.input_ids.tolist() and row["trained"] == len(losses)
        assert losses == [label for label in example.labels.tolist() if label != -100]
    assert sequences_of(examples[0], "sft")[0][0] == ""


# ---- who may ask --------------------------------------------------------------------------------


def test_the_token_of_the_address_becomes_a_cookie(server):
    status, headers, page = request(server, "GET", f"/?token={server.board.token}&tab=x",
                                    Cookie=None)
    cookie = headers["Set-Cookie"]
    assert status == 200 and 'content="0; url=/#run"' in page
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    status, headers, page = request(server, "GET", "/", Cookie=cookie.split(";")[0])
    assert status == 200 and "<title>Pocket Factory</title>" in page


def test_the_page_runs_its_own_script_and_nothing_else(server):
    _, headers, page = request(server, "GET", "/")
    policy = headers["Content-Security-Policy"]
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "unsafe" not in policy and page.count("<script") == 1
    assert not re.search(r"https?://(?!www\.w3\.org)|\bon\w+=\"|style=\"|innerHTML|eval\(", page)
    assert len(page.splitlines()) <= 600


def test_the_words_of_the_page_have_a_translation(server):
    page = request(server, "GET", "/")[2]
    table = page[page.index("const CHINESE"):page.index("let language")]
    words = re.findall(r"data-t>([^<]+)<", page) + re.findall(r'data-label="([^"]+)"', page)
    words += re.findall(r'\bt\("([^"]+)"\)', page)
    missing = {word for word in words if f'"{word}": "' not in table}
    assert not missing


HOSTILE = [     # method, path, body, headers, the status that it must get
    ("GET", "/", None, {"Cookie": None}, 401),
    ("GET", "/?token=", None, {"Cookie": None}, 401),
    ("GET", "/?token=%00", None, {"Cookie": None}, 401),
    ("GET", "/?token=" + "a" * 3000, None, {"Cookie": None}, 401),
    ("GET", "/api/status", None, {"Cookie": None}, 401),
    ("GET", "/api/status", None, {"Cookie": "board_1=x; board=y"}, 401),
    ("GET", "/api/status", None, {"Cookie": "\xff=\x7f;;=;"}, 401),
    ("GET", "/api/status", None, {"Host": "evil.example"}, 403),
    ("GET", "/api/status", None, {"Host": "127.0.0.1.evil.example:80"}, 403),
    ("GET", "/api/status", None, {"Origin": "http://evil.example"}, 403),
    ("GET", "/api/status", None, {"Origin": "null"}, 403),
    ("GET", "/api/status", None, {"Sec_Fetch_Site": "cross-site"}, 403),
    ("POST", "/api/start", {}, {"Origin": "http://127.0.0.1:1"}, 403),
    ("POST", "/api/start", {}, {"Cookie": None}, 401),
    ("POST", "/api/start", b"kind=train", {"Content_Type": "text/plain"}, 415),
    ("POST", "/api/start", b"{", {}, 400),
    ("POST", "/api/start", b"[]", {}, 400),
    ("POST", "/api/start", b"[" * 10**5, {}, 400),
    ("POST", "/api/start", b'{"kind": ["train"]}', {}, 400),
    ("POST", "/api/start", {"kind": "train", "text": CONFIG, "settings": ["a"]}, {}, 400),
    ("POST", "/api/start", {"kind": "train", "text": CONFIG, "name": "a\0b"}, {}, 400),
    ("POST", "/api/start", {"kind": "train", "text": CONFIG, "settings": {
        "output_dir": "../out"}}, {}, 403),
    ("POST", "/api/start", {"kind": "rows", "text": CONFIG, "settings": {
        "dataset_dir": "/etc"}}, {}, 403),
    ("POST", "/api/start", {"kind": "train", "again": "../1"}, {}, 400),
    ("POST", "/api/edit", {"text": "a: &a [*a]", "set": {"seed": "1"}}, {}, 200),
    ("POST", "/api/edit", {"text": "\ud800"}, {}, 200),
    ("POST", "/api/edit", {"text": CONFIG, "set": {"seed": {"a": 1}}}, {}, 200),
    ("POST", "/api/save", {"path": "../outside.yaml", "text": "a: 1"}, {}, 403),
    ("POST", "/api/save", {"path": "saves/.board/x.sh", "text": "a: 1"}, {}, 400),
    ("POST", "/api/save", {"path": "configs/link.yaml", "text": "a: 1", "overwrite": True}, {},
     403),
    ("POST", "/api/stop", {"job": -1}, {}, 400),
    ("POST", "/api/stop", {"job": 4711}, {}, 404),
    ("POST", "/api/stop", {"folder": "/"}, {}, 403),
    ("POST", "/api/answer", {"path": "../x", "body": {}}, {}, 404),
    ("POST", "/api/answer", {"path": "completions", "body": {}}, {}, 409),
    ("GET", "/api/config?path=../outside.yaml", None, {}, 403),
    ("GET", "/api/config?path=%2e%2e%2foutside.yaml", None, {}, 403),
    ("GET", "/api/config?path=configs/link.yaml", None, {}, 403),
    ("GET", "/api/config?path=/etc/passwd", None, {}, 403),
    ("GET", "/api/config?path=a%00b.yaml", None, {}, 400),
    ("GET", "/api/config?path=" + "a/" * 3000 + "x.yaml", None, {}, 400),
    ("GET", "/api/config?path=saves/run/trainer_state.txt", None, {}, 400),
    ("GET", "/api/config?path=~root/x.yaml", None, {}, 403),
    ("GET", "/api/run?folder=../../etc", None, {}, 403),
    ("GET", "/api/results?folder=/", None, {}, 403),
    ("GET", "/api/rows?job=1&count=99999999999999999999", None, {}, 404),
    ("GET", "/api/log?job=1%27", None, {}, 400),
    ("GET", "/../web/jobs.py", None, {}, 404),
    ("GET", "/api/edit", None, {}, 405),
    ("PUT", "/api/edit", b"{}", {}, 405),
    ("TRACE", "/", None, {}, 405),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_requests_are_refused(server, number):
    """With a sentence, without a change, and the board goes on."""
    method, path, body, headers, expected = HOSTILE[number]
    status, answer_headers, text = request(server, method, path, body, **headers)
    assert status == expected, text
    assert "secret" not in text and "root:" not in text and "Traceback" not in text
    assert "default-src 'none'" in answer_headers["Content-Security-Policy"]
    assert request(server, "GET", "/api/form")[0] == 200
    assert (server.board.folders.roots[0].parent / "outside.yaml").read_text() == "secret: true\n"


@pytest.mark.parametrize("sent", [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x00\xff\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    b"POST /api/start HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /api/start HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
])
def test_broken_requests_end_their_connection_only(server, sent):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=SOON) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(2**16):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 4") and b"Traceback" not in answer
    assert request(server, "GET", "/api/form")[0] == 200


def test_a_body_that_is_too_large_is_refused(server):
    assert request(server, "POST", "/api/edit", b" " * (LARGEST_BODY + 1))[0] == 413


def test_a_port_that_is_taken_is_a_sentence(server):
    with pytest.raises(ValueError, match=f"127.0.0.1:{server.server_port} cannot be listened at"):
        board.BoardServer(("127.0.0.1", server.server_port), server.board)


def test_a_chat_needs_a_server():
    with pytest.raises(BadRequest, match="no model is loaded"):
        ask(None, "completions", {})


def test_the_options_of_the_command_line(here):
    options = board.read_options(["my.yaml", "--port", "0", "lora_rank=4", "--folder", "a"])
    assert (options.port, options.folder, options.tab) == (0, ["a"], "run")
    name, text = board.first_config(["configs/my.yaml", "lora_rank=4"], Folders([here]))
    assert name == "my.yaml" and "\nlora_rank: 4\n" in text
    with pytest.raises(ValueError, match="--port 99999: it must be"):
        board.read_options(["--port", "99999"])
    with pytest.raises(ValueError, match="no such folder"):
        Folders([here / "none"])
