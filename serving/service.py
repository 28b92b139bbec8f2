"""From the body of a request to its answer, without a socket.

    service = Service(model, text, …)
    reply = service.chat({"messages": [{"role": "user", "content": "Hello"}]})
    reply.start()
    for index, pieces in reply.run(gone=lambda: False):
        print(index, pieces)                # the pieces of choice `index`
    print(reply.body())                     # OpenAI's answer

Requires: serving/engine.py, serving/answers.py, serving/schema.py.
Next: serving/handler.py.
Source: the shapes are those of OpenAI's API reference; score.evaluation is LLaMA-Factory's.
"""
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from errors import did_you_mean
from fast.batch_decode import one_at_a_time, start_sampling
from generate import Sampling, check_prompt, context_length
from methods.reward_model import last_token_scores
from serving.answers import Choice
from serving.constrain import JSON_OBJECT, Constraint, TokenMasks
from serving.engine import Engine, Job
from serving.http_base import Gone
from serving.schema import CHAT, COMPLETION, SCORE, BadRequest, check
from templates import Settings
from text.load_text import Text
from text.openai_messages import prompt_of_messages
from text.read_calls import text_arguments
from text.tokenizer import check_encodable
from text.tool_formats import call_frames

LOOK = 0.25         # seconds between two looks at whether the client is still there


@dataclass
class Service:
    """What the server answers with.

    models: {name: its adapter in `engine`, None for the base}; the first one is the default.
    defaults: sampling where a request says nothing. max_tokens: of prompt and answer together, for
    which the cache has room. head: the value head of a reward model, which only scores.
    """
    engine: Engine | None
    model: object
    text: Text
    settings: Settings
    stop_ids: set[int]
    models: dict[str, str | None]
    defaults: dict
    max_new_tokens: int                 # 0: max_length applies, as in LLaMA-Factory
    max_length: int
    max_tokens: int
    head: object = None
    created: int = field(default_factory=lambda: int(time.time()))
    masks: TokenMasks | None = None     # made by the first request that needs them
    scoring: threading.Lock = field(default_factory=threading.Lock)

    def list_models(self) -> dict:
        """The answer of /v1/models."""
        cards = [{"id": name, "object": "model", "created": self.created,
                  "owned_by": "pocket-factory"} for name in self.models]
        return {"object": "list", "data": cards}

    def find_model(self, body: dict) -> str:
        """The name of the model that a body asks for."""
        name = body.get("model")
        if name is None:
            return next(iter(self.models))
        if name not in self.models:
            raise BadRequest(f"model: {name[:100]!r} is not served here"
                             f"{did_you_mean(name[:100], self.models)}; there are "
                             f"{', '.join(self.models)}", "model", "model_not_found", status=404)
        return name

    # ---- requests to replies

    def chat(self, body: dict) -> "Reply":
        """The reply to a body of /v1/chat/completions. Raises BadRequest."""
        self.check_generates()
        check(CHAT, body)
        self.check_logprobs(body)
        model = self.find_model(body)
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        offered = text_arguments(tools)
        stop = stop_texts(body)
        choices = [Choice(self.text.tokenizer, stop, self.text.template, offered)
                   for _ in range(int(body.get("n") or 1))]
        top = int(body.get("top_logprobs") or 0) if body.get("logprobs") else None
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        reply = Reply(self.engine, "chat.completion", f"chatcmpl-{uuid.uuid4().hex}", model,
                      choices, top, one_call=body.get("parallel_tool_calls") is False)
        ends = self.constraint_of(body, list(offered))
        prompt = self.encode_chat(body, tools, thinks=not ends)
        self.add_jobs(reply, body, [prompt], limit)
        for job in reply.jobs if ends else []:
            job.constraint = Constraint(self.masks, ends)
        return reply

    def constraint_of(self, body: dict, names: list[str]) -> list[tuple[bytes, bytes]]:
        """(beginning, ending) pairs for Constraint; [] without one. names: of the tools."""
        choice = body.get("tool_choice")
        calls = choice not in (None, "auto", "none")
        is_json = (body.get("response_format") or {}).get("type") == "json_object"
        if not (calls or is_json):
            return []
        try:
            if is_json and names:
                raise ValueError("json_object and tools exclude each other. Leave one of them out, "
                                 "or set tool_choice: none")
            if body.get("enable_thinking"):
                raise ValueError("a constrained answer has no thought: leave enable_thinking out")
            if reason := one_at_a_time(self.model):
                raise ValueError(f"not available: this model answers one request at a time "
                                 f"({reason})")
            self.masks = self.masks or TokenMasks(
                self.text.tokenizer, self.model.config.vocab_size, self.stop_ids,
                self.model.lm_head.weight.device)
            if is_json:
                return JSON_OBJECT
            return call_frames(self.text.template, chosen_tools(choice, names))
        except ValueError as error:
            field = "response_format" if is_json else "tool_choice"
            raise BadRequest(f"{field}: {error}", field) from None

    def complete(self, body: dict) -> "Reply":
        """The reply to a body of /v1/completions. Raises BadRequest."""
        self.check_generates()
        check(COMPLETION, body)
        self.check_logprobs(body)
        model = self.find_model(body)
        prompts = body["prompt"]
        if isinstance(prompts, str) or not isinstance(prompts[0], (str, list)):
            prompts = [prompts]
        ids = [self.encode_text(prompt) if isinstance(prompt, str) else list(map(int, prompt))
               for prompt in prompts]
        count = len(ids) * int(body.get("n") or 1)
        choices = [Choice(self.text.tokenizer, stop_texts(body)) for _ in range(count)]
        reply = Reply(self.engine, "text_completion", f"cmpl-{uuid.uuid4().hex}", model, choices,
                      None if body.get("logprobs") is None else int(body["logprobs"]))
        self.add_jobs(reply, body, ids, body.get("max_tokens"))
        return reply

    def check_generates(self):
        if self.engine is None:
            raise BadRequest("this is a reward model, which scores texts: /v1/score/evaluation",
                             status=405)

    def check_logprobs(self, body: dict):
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise BadRequest("top_logprobs: set logprobs: true, too", "top_logprobs")
        asked = body.get("logprobs") not in (None, False)
        if asked and (reason := one_at_a_time(self.model)):
            raise BadRequest(f"logprobs: this model answers one request at a time ({reason}), "
                             "without log-probabilities", "logprobs")

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain text, with what the tokenizer itself puts around a text (bos)."""
        try:
            check_encodable([text])
        except ValueError as error:
            raise BadRequest(f"prompt: {error}", "prompt") from None
        return self.text.tokenizer.core.encode(text).ids

    def encode_chat(self, body: dict, tools: list | None, thinks: bool = True) -> list[int]:
        """Ids of a conversation up to the answer. thinks: False for an answer without a thought."""
        settings = self.settings if thinks else replace(self.settings, enable_thinking=False)
        if body.get("enable_thinking") is not None:
            settings = replace(settings, enable_thinking=body["enable_thinking"])
        try:
            return prompt_of_messages(body["messages"], tools, self.text, settings)
        except ValueError as error:
            raise BadRequest(f"messages: {error}", "messages") from None

    def add_jobs(self, reply: "Reply", body: dict, prompts: list[list[int]], limit: int | None):
        """Add a job to the reply for each prompt and choice."""
        sampling = sampling_of(body, self.defaults)
        seed = body.get("seed")
        seed = secrets.randbits(40) if seed is None else int(seed)
        choices = len(reply.choices) // len(prompts)
        for number in range(len(reply.choices)):
            prompt = prompts[number // choices]
            try:
                most = limit or self.max_new_tokens or max(1, self.max_length - len(prompt))
                room = check_prompt(self.model, prompt, int(most))
            except ValueError as error:
                too_long = len(prompt) >= context_length(self.model.config)
                raise BadRequest(str(error), code="context_length_exceeded" if too_long else
                                 "invalid_prompt") from None
            if len(prompt) >= self.max_tokens:
                raise BadRequest(
                    f"the prompt has {len(prompt):,} tokens, and the cache has room for "
                    f"{self.max_tokens:,} with the answer", code="context_length_exceeded")
            job = Job(number=number, prompt=prompt, room=min(room, self.max_tokens - len(prompt)),
                      stop_ids=self.stop_ids, sampling=sampling, adapter=self.models[reply.model],
                      events=reply.events)
            # the chosen token's own log-probability comes with at least one other
            job.top = 0 if reply.top is None else max(1, reply.top)
            start_sampling(job, self.model, (2**20 * seed + number) % 2**63)
            reply.jobs.append(job)
        reply.prompt_tokens = sum(map(len, prompts))

    def score(self, body: dict) -> dict:
        """The answer of /v1/score/evaluation."""
        if self.head is None:
            raise BadRequest("this model generates text; a model of stage: rm scores", status=405)
        check(SCORE, body)
        longest = min(int(body.get("max_length") or self.max_tokens), self.max_tokens)
        try:
            sequences = [self.text.tokenizer.encode(text)[:longest] for text in body["messages"]]
        except ValueError as error:
            raise BadRequest(f"messages: {error}", "messages") from None
        if not all(sequences):
            raise BadRequest("messages: a text without a token cannot be scored", "messages")
        with self.scoring:
            scores = last_token_scores(self.model, self.head, sequences)
        return {"id": f"scoreval-{uuid.uuid4().hex}", "object": "score.evaluation",
                "model": body.get("model") or next(iter(self.models)), "scores": scores}


def chosen_tools(choice: str | dict, names: list[str]) -> list[str]:
    """The tools of which one must be called. Raises ValueError for a name that was not offered."""
    if choice == "required":
        if not names:
            raise ValueError("required, but there are no tools to call")
        return names
    name = choice["function"]["name"]
    if name not in names:
        raise ValueError(f"{name[:100]!r} is not one of the tools{did_you_mean(name[:100], names)}")
    return [name]


def stop_texts(body: dict) -> list[str]:
    """The texts that end an answer."""
    stop = body.get("stop") or []
    return [stop] if isinstance(stop, str) else stop


def sampling_of(body: dict, defaults: dict) -> Sampling:
    """How a request is sampled. A temperature above 0 samples, also where the default is greedy."""
    given = {name: body[name] for name in Sampling.__dataclass_fields__
             if body.get(name) is not None}
    if given.get("temperature") and "do_sample" not in given:
        given["do_sample"] = True
    values = {**defaults, **given}
    values["top_k"] = max(0, int(values["top_k"]))
    return Sampling(**values)


# ---- replies ------------------------------------------------------------------------------------


@dataclass
class Reply:
    """The choices of a request while they are made, and OpenAI's shapes of them.

    top: likeliest tokens to report with each token; None: no log-probabilities.
    """
    engine: Engine
    kind: str                               # chat.completion or text_completion
    id: str
    model: str
    choices: list[Choice]
    top: int | None = None
    one_call: bool = False
    jobs: list[Job] = field(default_factory=list)
    events: SimpleQueue = field(default_factory=SimpleQueue)
    prompt_tokens: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def start(self):
        """Queue the jobs. Raises Busy or Closed."""
        self.engine.submit(self.jobs)

    def run(self, gone: Callable[[], bool]) -> Iterator[tuple[int, list]]:
        """Yield (index of a choice, its new pieces) until all have ended; a last time for each end.

        gone: whether the client has left. Raises Gone, or the error of a job.
        """
        running = set(range(len(self.choices)))
        looked = time.monotonic()
        try:
            while running:
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    if gone():
                        raise Gone
                try:
                    job, token = self.events.get(timeout=LOOK)
                except Empty:
                    continue
                if job.number in running:
                    yield job.number, self.advance(job, token)
                    if self.choices[job.number].finish_reason:
                        running.discard(job.number)
        finally:
            self.engine.cancel(self.jobs)

    def advance(self, job: Job, token: int | None) -> list:
        """The new pieces of a choice after a token, or at its end (None)."""
        choice = self.choices[job.number]
        if token is None:
            if job.error:
                raise job.error
            return choice.end("stop" if job.answer and job.answer[-1] in job.stop_ids else
                              "length")
        if token in job.stop_ids:           # its end comes next
            choice.tokens += 1
            return []
        if job.top:
            choice.token_logps.append(job.top_logps[choice.tokens])
        pieces = choice.push(token)
        if choice.finish_reason:            # a stop text
            self.engine.cancel([job])
            pieces = pieces + choice.end("stop")
        return pieces

    # ---- shapes

    def usage(self) -> dict:
        made = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": made,
                "total_tokens": self.prompt_tokens + made}

    def body(self) -> dict:
        """The whole answer."""
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model,
                "choices": [self.choice_body(index) for index in range(len(self.choices))],
                "usage": self.usage()}

    def choice_body(self, index: int) -> dict:
        choice = self.choices[index]
        found = {"index": index, "finish_reason": choice.finish_reason,
                 "logprobs": self.logprobs(choice, choice.token_logps)}
        if self.kind == "text_completion":
            return {**found, "text": choice.whole("text")}
        calls = self.call_bodies(choice)
        message = {"role": "assistant", "content": choice.whole("text") or (None if calls else "")}
        if thought := choice.whole("thought"):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        return {**found, "message": message}

    def call_bodies(self, choice: Choice) -> list[dict]:
        calls = choice.calls[:1] if self.one_call else choice.calls
        return [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                 "function": {"name": name, "arguments": arguments}} for name, arguments in calls]

    def chunks(self, index: int, pieces: list, sent: int) -> list[dict]:
        """Stream chunks for new pieces of a choice. sent: tokens whose log-probabilities were."""
        choice = self.choices[index]
        logprobs = self.logprobs(choice, choice.token_logps[sent:], sent)
        if self.kind == "text_completion":
            text = "".join(text for _, text in pieces)
            return [self.chunk({"index": index, "text": text, "logprobs": logprobs,
                                "finish_reason": choice.finish_reason})]
        names = {"thought": "reasoning_content", "text": "content"}
        deltas = [{names[kind]: text} for kind, text in pieces]
        if choice.finish_reason and choice.calls:
            deltas.append({"tool_calls": [{"index": number, **call} for number, call in
                                          enumerate(self.call_bodies(choice))]})
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        found = [self.chunk({"index": index, "delta": delta, "finish_reason": None,
                             "logprobs": logprobs if number == 0 else None})
                 for number, delta in enumerate(deltas)]
        if choice.finish_reason:
            found.append(self.chunk({"index": index, "delta": {}, "logprobs": None,
                                     "finish_reason": choice.finish_reason}))
        return found

    def chunk(self, *choices: dict, **more) -> dict:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": list(choices), **more}

    def logprobs(self, choice: Choice, tokens: list, start: int = 0) -> dict | None:
        """Log-probabilities of some tokens, in the shape of the endpoint."""
        if self.top is None or not tokens:
            return None
        decode = choice.stream.tokenizer.decode
        rows = [[(decode([token]), logp) for token, logp in found] for found in tokens]
        if self.kind == "chat.completion":
            return {"content": [{**entry(*own), "top_logprobs": [entry(*pair) for pair in
                                                                 best[:self.top]]}
                                for own, *best in rows], "refusal": None}
        return {"tokens": [own[0] for own, *_ in rows],
                "token_logprobs": [own[1] for own, *_ in rows],
                "top_logprobs": [dict(best[:self.top]) for _, *best in rows],
                "text_offset": [start + number for number in range(len(rows))]}


def entry(text: str, logp: float) -> dict:
    """A token with its log-probability; the bytes of half a character are unknown (null)."""
    known = "\ufffd" not in text
    return {"token": text, "logprob": max(logp, -9999.0),
            "bytes": list(text.encode()) if known else None}
