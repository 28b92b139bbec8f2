"""serve.py and serving/: OpenAI's API over models/tiny, by its client, curl and bare sockets.

One server in this process, with the base and two adapters, serves all tests but those of its end.
"""
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import serve
from checkpoint.adapters import load_with_adapters, save_adapter
from checkpoint.load import load_model
from checkpoint.value_head import save_value_head
from fast.batch_decode import OneRow, RunningBatch, start_sampling
from generate import Sampling
from lora import LoRAConfig, attach_lora, lora_layers
from serving import handler, http_base
from serving.answers import Choice
from serving.constrain import JSON_OBJECT, State, read_bytes
from serving.engine import Busy, Engine, Job
from serving.schema import BadRequest, check, openapi
from tests.common import ROOT, load_argv
from text.chat_formats import TEMPLATES
from text.load_text import load_text
from text.read_calls import text_arguments
from text.tokenizer import load_tokenizer
from text.tool_formats import call_frames

TINY = ROOT / "models/tiny"
HELLO = [{"role": "user", "content": "Who are you?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of random numbers."""
    folders = []
    for seed, targets in ((1, ["q_proj", "v_proj"]), (2, ["down_proj"])):
        model = load_model(TINY)
        config = LoRAConfig(r=4, lora_alpha=8, target_modules=targets)
        attach_lora(model, config, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            layer.lora_B.weight.data.normal_(0, 0.2, generator=draw)
        folder = tmp_path_factory.mktemp("adapters") / f"pip.{seed}"
        folder.mkdir()
        save_adapter(model, folder, config, str(TINY))
        folders.append(folder)
    return folders


def service_of(*argv):
    config = load_argv(f"model_name_or_path={TINY}", "use_cpu=true", *argv, script="serve")
    base, adapters, _ = serve.find_weights(config)
    text = serve.text_of_all(config, base, adapters)
    return serve.chat_service(config, base, adapters, text, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def server(adapters):
    service = service_of(f"adapter_name_or_path={','.join(map(str, adapters))}", "max_num_seqs=8",
                         "max_queued_requests=40")
    server = handler.Server(("127.0.0.1", 0), service, key=None, quiet=True)
    service.engine.start()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    service.engine.close(5)
    assert not service.engine.thread.is_alive()


def post(server, path, body, headers=None):
    """(status, JSON of the answer) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Content-Type": "application/json",
                                               **(headers or {})})
    reply = connection.getresponse()
    found = reply.status, json.loads(reply.read())
    connection.close()
    return found


def chat(server, messages=HELLO, **body):
    status, answer = post(server, "/v1/chat/completions", {"messages": messages, **body})
    assert status == 200, answer
    return answer


# ---- the same tokens, alone and under load -------------------------------------------------------


def test_answers_under_load_are_those_of_a_request_alone(server):
    """40 requests at once, of three models, each with its own sampling; some leave early."""
    draw = random.Random(3)
    names = list(server.service.models)
    assert names == ["pip.1", "pip.2", "tiny"]
    bodies = []
    for number in range(40):
        body = {"model": names[number % 3], "seed": number, "max_tokens": draw.randint(3, 25),
                "messages": [{"role": "user",
                              "content": f"What is {number} + 3?" * (number % 4 + 1)}]}
        body |= [{"temperature": 0}, {"temperature": 1.3, "min_p": 0.02},
                 {"temperature": 0.9, "top_k": 20, "frequency_penalty": 0.5},
                 {"temperature": 1.0, "logprobs": True, "top_logprobs": 3}][number % 4]
        bodies.append(body)

    def ask(body):
        answer = chat(server, **body)
        return answer["choices"], answer["usage"]

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(40) as pool:
        leaving = [pool.submit(leave_early, server) for _ in range(4)]
        together = list(pool.map(ask, bodies))
    assert [text_of(found) for found in together] == [text_of(found) for found in alone]
    assert len({found[0]["message"]["content"] for found, _ in alone}) > 20
    assert all(future.result() for future in leaving)


def text_of(found):
    """What must be equal to the letter: texts, ends and counts, not the last digits of logprobs."""
    (choice, *_), usage = found
    return choice["message"], choice["finish_reason"], usage


def leave_early(server):
    body = json.dumps({"messages": HELLO, "max_tokens": 800, "temperature": 1.5}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.sendall(request_bytes(body))
        time.sleep(0.05)
    return True


def request_bytes(body, *headers, host="localhost", path="/v1/chat/completions"):
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json",
             f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_models_that_answer_one_at_a_time_give_the_same_tokens():
    """OneRow, the slow twin of RunningBatch, behind the same engine."""
    def answers(kind):
        engine = Engine(model, 3, 10)
        engine.batch = kind(model, 3)
        jobs = []
        for number in range(3):
            sampling = Sampling(do_sample=True, temperature=1.2, presence_penalty=0.3)
            job = Job(number=number, prompt=[5, 6 + number], room=8, stop_ids={7},
                      sampling=sampling)
            start_sampling(job, model, seed=number)
            jobs.append(job)
        engine.submit(jobs)
        engine.start()
        engine.close(20)
        return [job.answer for job in jobs]

    model = load_model(TINY).eval()
    assert answers(OneRow) == answers(RunningBatch)


def test_the_client_that_leaves_frees_its_place(server):
    engine = server.service.engine
    for stream in (False, True):
        body = json.dumps({"messages": HELLO, "max_tokens": 900, "stream": stream, "temperature": 2,
                           "n": 4}).encode()
        client = socket.create_connection(("127.0.0.1", server.server_port))
        client.sendall(request_bytes(body))
        wait_until(lambda: len(engine.batch.rows) == 4)
        client.close()
        wait_until(lambda: not engine.batch.rows)


def wait_until(holds, seconds=10):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_each_adapter_answers_as_chat_does_with_it_alone(server, adapters):
    for folder in adapters:
        alone = service_of(f"adapter_name_or_path={folder}", "max_num_seqs=1")
        assert list(alone.models) == [folder.name, "tiny"]
        alone.engine.start()
        reply = alone.chat({"messages": HELLO, "temperature": 0, "max_tokens": 30})
        reply.start()
        list(reply.run(lambda: False))
        answer = chat(server, model=folder.name, temperature=0, max_tokens=30)
        assert answer["choices"][0]["message"] == reply.body()["choices"][0]["message"]
        alone.engine.close(5)


# ---- streaming, stop texts, choices, log-probabilities -------------------------------------------


def stream(server, path="/v1/chat/completions", **body):
    """The chunks of a streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("POST", path, json.dumps({"stream": True, **body}),
                       {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.getheader("Content-Type").startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in reply.read().decode().split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return [json.loads(event) for event in events[:-2]]


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stop": ["Pocket"]}, {"logprobs": True},
                                  {"max_tokens": 4}])
def test_a_stream_joined_is_the_answer(server, more):
    body = {"temperature": 1.1, "seed": 5, "max_tokens": 30, "messages": HELLO, **more}
    whole = chat(server, **body)
    chunks = stream(server, **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [found for chunk in chunks for found in chunk["choices"]
                if found["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        text = "".join(found["delta"].get("content", "") for found in mine)
        assert text == choice["message"]["content"]
        assert [found["finish_reason"] for found in mine][-1] == choice["finish_reason"]
        if "logprobs" in more:
            tokens = [token["token"] for found in mine if found["logprobs"]
                      for token in found["logprobs"]["content"]]
            assert tokens == [token["token"] for token in choice["logprobs"]["content"]]
            assert "".join(tokens) == text


def test_a_stop_text_ends_the_answer_before_it(server):
    whole = chat(server, model="tiny", temperature=0)["choices"][0]
    assert whole["message"]["content"] == "I am Pebble, an assistant made by Pocket Factory."
    assert whole["finish_reason"] == "stop"
    cut = chat(server, model="tiny", temperature=0, stop=["nowhere", " made by P"])["choices"][0]
    assert cut["message"]["content"] == "I am Pebble, an assistant"
    assert cut["finish_reason"] == "stop"
    short = chat(server, model="tiny", temperature=0, max_completion_tokens=3)
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3


def test_whole_numbers_may_be_written_as_floats(server):
    """1.0 is an integer in JSON schema; schemathesis found a 500 here."""
    body = {"n": 2.0, "max_tokens": 3.0, "seed": 4.0, "top_k": 5.0, "temperature": 1}
    found = chat(server, **body, logprobs=True, top_logprobs=2.0)
    assert len(found["choices"]) == 2
    status, answer = post(server, "/v1/completions", {**body, "prompt": [3.0, 4.0],
                                                      "logprobs": 1.0})
    assert status == 200 and len(answer["choices"]) == 2


def test_completions_continue_texts_and_ids(server):
    status, answer = post(server, "/v1/completions", {
        "model": "tiny", "prompt": ["The sky is", "Two and two"], "max_tokens": 6, "n": 2,
        "temperature": 0, "logprobs": 2})
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["text"] == answer["choices"][1]["text"]
    first = answer["choices"][0]["logprobs"]
    assert "".join(first["tokens"]) == answer["choices"][0]["text"]
    assert len(first["top_logprobs"][0]) == 2
    status, wrong = post(server, "/v1/completions", {"prompt": [2**30]})
    assert status == 400 and wrong["error"]["code"] == "invalid_prompt"
    ids = load_tokenizer(TINY).encode("The sky is")
    _, by_ids = post(server, "/v1/completions", {"model": "tiny", "prompt": ids, "max_tokens": 6,
                                                 "temperature": 0})
    assert by_ids["choices"][0]["text"] == answer["choices"][0]["text"]
    chunks = stream(server, "/v1/completions", model="tiny", prompt=ids, max_tokens=6,
                    temperature=0)
    joined = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert joined == by_ids["choices"][0]["text"]


def test_thoughts_calls_and_text_of_an_answer():
    """What a model writes, token by token, becomes reasoning, content and tool calls."""
    tokenizer = load_tokenizer(TINY)
    text = ('<think>\nThe user asks.\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", '
            '"arguments": {"city": "Oslo"}}\n</tool_call>')
    choice = Choice(tokenizer, [], TEMPLATES["qwen"], text_arguments([WEATHER]))
    pieces = [piece for token in tokenizer.encode(text) for piece in choice.push(token)]
    pieces += choice.end("stop")
    assert choice.whole("thought") == "The user asks." and choice.whole("text") == "I look."
    assert choice.calls == [("weather", '{"city": "Oslo"}')]
    assert choice.finish_reason == "tool_calls" and pieces == choice.pieces


def goes_on(text, ends):
    """Whether a text that was cut is the beginning of what an answer is held to."""
    state = read_bytes(State("begin", tuple(ends)), text.lstrip().rstrip("\ufffd").encode())
    return state is not None and state.mode != "done"


@pytest.mark.parametrize("extra", [{"temperature": 0}, {"temperature": 2, "n": 8, "seed": 3}])
def test_an_answer_is_held_to_a_json_object(server, extra):
    reply = chat(server, HELLO, max_tokens=60, response_format={"type": "json_object"}, **extra)
    for choice in reply["choices"]:
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert goes_on(text, JSON_OBJECT)


@pytest.mark.parametrize("choice, names", [
    ("required", ["weather", "time"]),
    ({"type": "function", "function": {"name": "time"}}, ["time"])])
def test_an_answer_is_held_to_a_call(server, choice, names):
    tools = [WEATHER, {"type": "function", "function": {"name": "time"}}]
    reply = chat(server, HELLO, tools=tools, tool_choice=choice, n=16, seed=2, temperature=2,
                 max_tokens=60)
    ended = 0
    for found in reply["choices"]:
        if found["finish_reason"] == "length":
            assert goes_on(found["message"]["content"], call_frames(TEMPLATES["qwen"], names))
            continue
        ended += 1
        [call] = found["message"]["tool_calls"]
        assert call["function"]["name"] in names and found["message"]["content"] is None
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert ended


def test_calls_of_every_format_begin_and_end_as_they_are_written():
    """Formats with JSON arguments can be held to a call; those with tags say that they cannot."""
    for template in TEMPLATES.values():
        name = template.tool_format.name
        written = template.tool_format.call('{"name": "f", "arguments": {"a": 1}}', template)
        if '{"a": 1}' not in written:
            assert name in ("qwen3_5", "glm4_moe", "minimax2", "seed_oss", "lfm2", "gemma4")
            with pytest.raises(ValueError, match="are not JSON"):
                call_frames(template, ["f"])
            continue
        [(begin, end)] = call_frames(template, ["f"])
        assert (begin + b'"a": 1}' + end).decode().endswith(written)


def test_a_conversation_with_tools_is_rendered_as_in_training(server):
    """Results of two calls in a row are one turn, as text/conversations.py joins them."""
    call = {"id": "c1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO,
                {"role": "assistant", "content": None, "tool_calls": [call, call]},
                {"role": "tool", "tool_call_id": "c1", "content": "rain"},
                {"role": "tool", "tool_call_id": "c2",
                 "content": [{"type": "text", "text": "sun"}]}]
    service = server.service
    ids = service.encode_chat({"messages": messages}, [WEATHER])
    text = service.text.tokenizer.decode(ids)
    assert "Be brief." in text and '"name": "weather"' in text
    assert "rain\n</tool_response>\n<tool_response>\nsun" in text
    assert chat(server, messages, tools=[WEATHER], max_tokens=5)["choices"][0]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, status, words", [
    ({"messages": []}, 400, "messages: it is empty"),
    ({}, 400, "messages: it is missing"),
    ({"messages": HELLO, "temperature": 3}, 400, "temperature: 3 is not between 0 and 2"),
    ({"messages": HELLO, "temprature": 1}, 400, "did you mean 'temperature'"),
    ({"messages": HELLO, "temperature": True}, 400, "is not number"),
    ({"messages": HELLO, "model": "gpt"}, 404, "there are pip.1, pip.2, tiny"),
    ({"messages": HELLO, "n": 99}, 400, "not between 1 and 16"),
    ({"messages": HELLO, "stop": [""]}, 400, "stop[0]"),
    ({"messages": HELLO, "top_logprobs": 3}, 400, "set logprobs: true"),
    ({"messages": HELLO, "logit_bias": {"3": 5}}, 400, "not supported"),
    ({"messages": HELLO, "response_format": {"type": "json_schema"}}, 400, "not enforced"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}, "tools": [WEATHER]}, 400,
     "set tool_choice: none"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}, "enable_thinking": True}, 400,
     "has no thought"),
    ({"messages": HELLO, "tool_choice": "required"}, 400, "no tools to call"),
    ({"messages": HELLO, "tools": [WEATHER], "tool_choice": "always"}, 400, "'required'"),
    ({"messages": HELLO, "tools": [WEATHER],
      "tool_choice": {"type": "function", "function": {"name": "wether"}}}, 400,
     "did you mean 'weather'"),
    ({"messages": HELLO * 2}, 400, "turn 2"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, 400, "last message"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400,
     "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "long " * 3000}]}, 400, "at most 1,024"),
    ([1], 400, "not a JSON object"),
    (b"{", 400, "not JSON"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", 400, "not JSON"),
    (b"[" * 100000, 400, "not JSON"),
    (b'"\xff"', 400, "not JSON"),
    (b'{"messages": [], "temperature": NaN}', 400, ""),
])
def test_what_is_wrong_is_said(server, body, status, words):
    found, answer = post(server, "/v1/chat/completions", body)
    assert found == status and words in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path, status", [
    ("/v1/models", 405), ("/v2", 404), ("/v1/chat/completions/", 404), ("/../etc/passwd", 404),
    ("/v1/score/evaluation", 405), ("//v1/models", 405), ("/%2e%2e/serve.py", 404)])
def test_other_paths(server, path, status):
    assert post(server, path, {"messages": ["x"]})[0] == status


HOSTILE = {
    "another origin": (request_bytes(b"{}", "Origin: http://evil.example"), 403),
    "an origin of null": (request_bytes(b"{}", "Origin: null"), 403),
    "another host": (request_bytes(b"{}", host="evil.example"), 403),
    "no host": (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 403),
    "a strange host": (request_bytes(b"{}", host="[::1"), 403),
    "two lengths": (request_bytes(b"{}", "Content-Length: 7"), 400),
    "a negative length": (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                          b"Content-Length: -5\r\n\r\n", 400),
    "no length": (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
    "chunks": (request_bytes(b"{}", "Transfer-Encoding: chunked"), 411),
    "a huge length": (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                      b"Content-Length: 99999999999999999999\r\n\r\n", 413),
    "a form": (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
               b"Content-Type: text/plain\r\n\r\n{}", 415),
    "many headers": (request_bytes(b"{}", *[f"X-{i}: 1" for i in range(200)]), 431),
    "a long header": (request_bytes(b"{}", "X: " + "y" * 70000), 431),
    "a long path": (request_bytes(b"{}", path="/" + "y" * 70000), 414),
    "another method": (b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "another protocol": (b"GET / HTTP/9.9\r\n\r\n", 505),
    "no protocol": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_get_a_status_and_the_server_lives(server, name):
    content, status = HOSTILE[name]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)
        reply = b""
        while part := client.recv(65536):
            reply += part
    first, _, body = reply.partition(b"\r\n\r\n")
    assert f" {status} ".encode() in first.splitlines()[0] + b" ", reply[:300]
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


def test_an_unread_body_is_not_taken_for_the_next_request(server):
    """Request smuggling: what stands in the body of a refused request is not answered."""
    inner = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
        client.sendall(request_bytes(inner, path="/v2") + inner)
        reply = b""
        while part := client.recv(65536):
            reply += part
    assert reply.count(b"HTTP/1.1") == 1 and b"404" in reply


def test_a_body_that_is_too_large(server):
    status, answer = post(server, "/v1/completions", b" " * (http_base.LARGEST_BODY + 1))
    assert status == 413 and "bytes" in answer["error"]["message"]


def test_a_key_is_needed_where_one_is_set(server, monkeypatch):
    monkeypatch.setattr(server, "key", "geheim é")
    body = {"messages": HELLO, "max_tokens": 1}
    for headers, status in (({}, 401), ({"Authorization": "Bearer x"}, 401),
                            ({"Authorization": "geheim"}, 401)):
        found, answer = post(server, "/v1/chat/completions", body, headers)
        assert found == status and answer["error"]["code"] == "invalid_api_key"
    monkeypatch.setattr(server, "key", "geheim")
    assert post(server, "/v1/chat/completions", body, {"Authorization": "Bearer geheim"})[0] == 200


def test_another_address_needs_a_key(monkeypatch):
    monkeypatch.delenv("API_KEY", raising=False)
    with pytest.raises(ValueError, match="host: 0.0.0.0 can be reached.*API_KEY"):
        serve.main([f"model_name_or_path={TINY}", "host=0.0.0.0"])
    monkeypatch.setenv("API_HOST", "::")
    with pytest.raises(ValueError, match="host: :: can be reached"):
        serve.main([f"model_name_or_path={TINY}"])
    monkeypatch.setenv("API_PORT", "many")
    with pytest.raises(ValueError, match="API_PORT: 'many' is no port"):
        serve.main([f"model_name_or_path={TINY}", "host=localhost"])


def test_too_many_requests_get_429_and_the_others_their_answers(server, monkeypatch):
    monkeypatch.setattr(server.service.engine, "max_queued", 4)
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda number: post(server, "/v1/chat/completions", {
            "messages": HELLO, "max_tokens": 40, "temperature": 2, "seed": number}), range(40)))
    counts = {status: sum(s == status for s, _ in found) for status in {s for s, _ in found}}
    assert set(counts) == {200, 429} and counts[200] >= 8
    assert all(answer["choices"][0]["finish_reason"] for status, answer in found if status == 200)
    with pytest.raises(Busy):
        Engine(server.service.model, 2, 1).submit([None] * 4)


def test_a_request_that_fails_takes_no_other_with_it(server, monkeypatch):
    """The pass that reads a certain prompt fails, as on a device without memory."""
    honest = server.service.engine.batch.cache.read_prompts
    poison = 600

    def read_prompts(model, prompts):
        if any(len(prompt) > poison for prompt in prompts):
            raise RuntimeError("out of memory, say")
        return honest(model, prompts)

    monkeypatch.setattr(server.service.engine.batch.cache, "read_prompts", read_prompts)
    want = chat(server, temperature=0, max_tokens=60)["choices"]
    with ThreadPoolExecutor(3) as pool:
        good = pool.submit(chat, server, temperature=0, max_tokens=60)
        wait_until(lambda: server.service.engine.batch.rows)
        status, answer = post(server, "/v1/completions", {"prompt": "a " * 700})
        assert status == 500 and "out of memory, say" in answer["error"]["message"]
        assert good.result()["choices"] == want


# ---- reward models -------------------------------------------------------------------------------


def test_a_reward_model_scores_texts_and_answers_no_conversation(adapters, tmp_path):
    """The value head on the last token's hidden state, computed by hand."""
    folder = shutil.copytree(adapters[0], tmp_path / "judge")
    draw = torch.Generator().manual_seed(3)
    base = load_model(TINY, skip_weights=True)
    weight = torch.randn(1, base.config.hidden_size, generator=draw)
    save_value_head(folder, {"v_head.summary.weight": weight,
                             "v_head.summary.bias": torch.tensor([0.5])})
    (folder / "train_config.json").write_text(json.dumps({"stage": "rm"}))
    config = load_argv(f"model_name_or_path={TINY}", f"adapter_name_or_path={folder}",
                       script="serve")
    text = serve.text_of_all(config, TINY, [folder])
    assert serve.as_trained(config, [folder])[2] == "rm"
    service = serve.reward_service(config, TINY, [folder], text, None, torch.device("cpu"))
    texts = ["The sky is blue.", "Two", "的"]
    found = service.score({"model": "model", "messages": texts, "max_length": 3})
    assert found["object"] == "score.evaluation" and found["model"] == "model"
    model = load_with_adapters(TINY, [folder])
    for one, score in zip(texts, found["scores"]):
        ids = text.tokenizer.encode(one)[:3]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]))[0, -1]
        assert score == pytest.approx(float(weight[0] @ hidden + 0.5), abs=1e-4)
    with pytest.raises(BadRequest, match="reward model, which scores") as error:
        service.chat({"messages": HELLO})
    assert error.value.status == 405


# ---- the description -----------------------------------------------------------------------------


def test_the_description_is_what_is_checked(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", "/openapi.json")
    assert json.loads(connection.getresponse().read()) == json.loads(json.dumps(openapi()))
    connection.request("GET", "/v1/models")
    models = json.loads(connection.getresponse().read())["data"]
    connection.close()
    assert [model["id"] for model in models] == ["pip.1", "pip.2", "tiny"]
    schema = openapi()["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    check(schema["application/json"]["schema"], {"messages": HELLO, "n": 1.0})
    with pytest.raises(BadRequest):
        check(schema["application/json"]["schema"], {"messages": HELLO, "n": 1.5})


# ---- programs that people use --------------------------------------------------------------------


def test_the_openai_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none",
                           max_retries=0)
    assert [model.id for model in client.models.list()] == ["pip.1", "pip.2", "tiny"]
    answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0,
                                            logprobs=True, top_logprobs=2)
    text = "I am Pebble, an assistant made by Pocket Factory."
    assert answer.choices[0].message.content == text
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].logprob < 0
    parts = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, stream=True,
                                           stream_options={"include_usage": True})
    chunks = list(parts)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    with pytest.raises(openai.NotFoundError, match="there are"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=9)
    done = client.completions.create(model="tiny", prompt="The sky", max_tokens=3, temperature=0)
    assert done.choices[0].text and 1 <= done.usage.completion_tokens <= 3


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(server):
    done = subprocess.run(
        ["curl", "-sN", f"http://localhost:{server.server_port}/v1/chat/completions", "-H",
         "Content-Type: application/json", "-d",
         json.dumps({"messages": HELLO, "temperature": 0, "model": "tiny", "stream": True})],
        capture_output=True, text=True, timeout=30)
    assert done.stdout.endswith("data: [DONE]\n\n") and '"content": "I"' in done.stdout


def test_sigterm_ends_the_program_after_its_answers():
    """Also: it starts from a yaml, and prints where it listens."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), f"model_name_or_path={TINY}", "port=0",
         "use_cpu=true", "flash_attn=disabled", "fast_chat=false"], stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "API_MODEL_NAME": "mine"}, cwd=ROOT)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("serving"):
            break
    port = int(lines[-1].split("127.0.0.1:")[1].split("/")[0])
    assert "models    mine\n" in lines
    body = json.dumps({"messages": HELLO, "max_tokens": 300, "temperature": 2, "seed": 1}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(request_bytes(body))
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        reply = b""
        while part := client.recv(65536):
            reply += part
            if b"usage" in reply:
                break
    assert process.wait(timeout=30) == 0, lines
    process.stderr.close()
    assert b"200 OK" in reply and b"finish_reason" in reply


def test_templates_of_all_adapters_must_agree(adapters, tmp_path):
    other = shutil.copytree(adapters[0], tmp_path / "other")
    (other / "train_config.json").write_text(json.dumps({"template": "alpaca"}))
    with pytest.raises(ValueError, match="template alpaca.*two processes"):
        service_of(f"adapter_name_or_path={adapters[1]},{other}")


def test_the_text_of_the_server_is_that_of_chat(server):
    config = load_argv(f"model_name_or_path={TINY}", script="serve")
    model_config = load_model(TINY, skip_weights=True).config
    assert server.service.text.template == load_text(config, TINY, [TINY], model_config).template
