"""What a request may hold: one table for each endpoint, which checks it and is its description.

    check(CHAT, body)                   raises BadRequest that names the field
    openapi(score=False)                the OpenAPI document, served at /openapi.json

The tables are JSON schemas, of which `check` knows the words that are used here. A field that is in
no table is an error: what would be ignored is said.

Requires: errors.py.
Next: serving/handler.py.
Sources: OpenAI's API reference (chat/completions, completions, models); top_k, min_p and
repetition_penalty as in vLLM; do_sample and score/evaluation as in LLaMA-Factory 0.9.5.
"""
from errors import did_you_mean


class BadRequest(ValueError):
    """A request that cannot be answered: status, OpenAI's code, and the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None,
                 status: int = 400):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


# ---- the tables ---------------------------------------------------------------------------------


def number(low: float, high: float) -> dict:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def whole(low: int, high: int) -> dict:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def record(properties: dict, required: tuple[str, ...] = (), closed: bool = True) -> dict:
    return {"type": "object", "properties": properties, "required": list(required),
            "additionalProperties": not closed}


TEXT = {"type": "string"}
TEXT_OR_NULL = {"type": ["string", "null"]}
SWITCH = {"type": ["boolean", "null"]}
MOST_CHOICES = 16
SAMPLING = {        # of both kinds of completions
    "model": {**TEXT_OR_NULL, "description": "one of /v1/models; none: the first"},
    "do_sample": SWITCH,
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": {**whole(-1, 2**31), "description": "-1 or 0: all tokens"},
    "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 10),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "max_tokens": whole(1, 2**31),
    "seed": whole(-2**63, 2**63 - 1),
    "n": whole(1, MOST_CHOICES),
    "stop": {"anyOf": [TEXT_OR_NULL, {"type": "array", "items": {**TEXT, "minLength": 1},
                                      "maxItems": 16}]},
    "stream": SWITCH,
    "stream_options": {"anyOf": [{"type": "null"}, record({"include_usage": SWITCH,
                                                           "include_obfuscation": SWITCH})]},
    "user": TEXT_OR_NULL,
}
CALL = record({"id": TEXT_OR_NULL, "type": {"type": "string", "enum": ["function"]},
               "index": whole(0, 1000),
               "function": record({"name": TEXT, "arguments": TEXT}, ("name", "arguments"))},
              ("function",))
PART = record({"type": {"type": "string", "enum": ["text"]}, "text": TEXT}, ("type", "text"))
MESSAGE = record({
    "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
    "content": {"anyOf": [TEXT_OR_NULL, {"type": "array", "items": PART}]},
    "reasoning_content": TEXT_OR_NULL,
    "refusal": {"type": "null"},
    "audio": {"type": "null"},
    "function_call": {"type": "null"},
    "annotations": {"type": ["array", "null"]},
    "tool_calls": {"anyOf": [{"type": "null"}, {"type": "array", "items": CALL}]},
    "tool_call_id": TEXT_OR_NULL,
    "name": TEXT_OR_NULL,
}, ("role",))
TOOL = record({
    "type": {"type": "string", "enum": ["function"]},
    "function": record({"name": {**TEXT, "minLength": 1}, "description": TEXT_OR_NULL,
                        "parameters": {"type": ["object", "null"]}, "strict": SWITCH}, ("name",)),
}, ("type", "function"))
CHAT = record({
    **SAMPLING,
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
    "max_completion_tokens": whole(1, 2**31),
    "logprobs": SWITCH,
    "top_logprobs": whole(0, 20),
    "tools": {"anyOf": [{"type": "null"}, {"type": "array", "items": TOOL, "maxItems": 128}]},
    "tool_choice": {"anyOf": [
        {"type": ["string", "null"], "enum": ["auto", "none", "required", None]},
        record({"type": {"type": "string", "enum": ["function"]},
                "function": record({"name": TEXT}, ("name",))}, ("type", "function"))]},
    "parallel_tool_calls": SWITCH,
    "response_format": {"anyOf": [{"type": "null"}, record({"type": {
        "type": "string", "enum": ["text", "json_object"],
        "description": "JSON schemas are not enforced; describe the fields in the prompt, "
                       "take json_object, and check the answer"}}, ("type",), closed=False)]},
    "enable_thinking": SWITCH,
    "store": {"type": ["boolean", "null"], "enum": [False, None]},
    "metadata": {"type": ["object", "null"]},
}, ("messages",))
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31},
       "minItems": 1}
COMPLETION = record({
    **SAMPLING,
    "prompt": {"anyOf": [{**TEXT, "minLength": 1}, IDS,
                         {"type": "array", "items": {**TEXT, "minLength": 1}, "minItems": 1,
                          "maxItems": MOST_CHOICES},
                         {"type": "array", "items": IDS, "minItems": 1,
                          "maxItems": MOST_CHOICES}]},
    "logprobs": whole(0, 5),
    "echo": {"type": ["boolean", "null"], "enum": [False, None]},
    "suffix": {"type": "null"},
    "best_of": {"type": "null"},
}, ("prompt",))
SCORE = record({
    "model": TEXT_OR_NULL,
    "messages": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 256},
    "max_length": whole(1, 2**31),
}, ("messages",))


# ---- checking -----------------------------------------------------------------------------------

KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
INSTEAD = {         # fields that other servers have -> what to do here
    "logit_bias": "it is not supported; leave it out",
    "functions": "it is the old name of tools",
    "function_call": "it is the old name of tool_choice",
    "guided_json": "JSON schemas are not enforced; take response_format: json_object",
}


def is_kind(value, kind: str) -> bool:
    if kind in ("number", "integer"):
        whole_number = isinstance(value, int) or isinstance(value, float) and value.is_integer()
        fits = whole_number if kind == "integer" else isinstance(value, (int, float))
        return fits and not isinstance(value, bool)
    return isinstance(value, KINDS[kind])


def check(schema: dict, value, where: str = ""):
    """Raise BadRequest for a value that the schema does not allow. where: its place in the body."""
    def need(holds: bool, sentence: str):
        if not holds:
            raise BadRequest(f"{where or 'the body'}: {sentence}", where or None)

    if "anyOf" in schema:
        return check_any(schema["anyOf"], value, where)
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    need(any(is_kind(value, kind) for kind in kinds),
         f"{in_short(value)} is not {' or '.join(kinds)}")
    if "enum" in schema:
        choices = ", ".join(map(in_short, schema["enum"]))
        need(value in schema["enum"],
             f"{in_short(value)} is none of {choices}. {schema.get('description', '')}".strip())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        need(low <= value <= high, f"{value} is not between {low} and {high}")
    if isinstance(value, str):
        need(len(value) >= schema.get("minLength", 0), "it is empty")
    if isinstance(value, list):
        need(len(value) >= schema.get("minItems", 0), "it is empty")
        need(len(value) <= schema.get("maxItems", len(value)),
             f"{len(value)} entries, at most {schema.get('maxItems')}")
        for index, item in enumerate(value if "items" in schema else []):
            check(schema["items"], item, f"{where}[{index}]")
    if isinstance(value, dict) and "properties" in schema:
        check_record(schema, value, where)


def check_any(schemas: list[dict], value, where: str):
    """Raise the error of the last schema whose type fits, if the value fits none."""
    errors = []
    for schema in schemas:
        try:
            return check(schema, value, where)
        except BadRequest as error:
            errors.append(error)
    raise max(errors, key=lambda error: len(error.param or ""))     # the one that looked deepest


def check_record(schema: dict, value: dict, where: str):
    """Check the fields of an object."""
    known = schema["properties"]
    for name in schema["required"]:
        if name not in value:
            place = f"{where}.{name}".lstrip(".")
            raise BadRequest(f"{place}: it is missing", place, "missing_required_parameter")
    for name, item in value.items():
        place = f"{where}.{name}".lstrip(".")
        if name in known:
            check(known[name], item, place)
        elif not schema["additionalProperties"]:
            hint = f": {INSTEAD[name]}" if name in INSTEAD else did_you_mean(name, known)
            raise BadRequest(f"{place[:200]}: this field is unknown here{hint}", place[:200],
                             "unknown_parameter")


def in_short(value) -> str:
    """A value for a message, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else (
        repr(value))
    return text if len(text) <= 60 else text[:60] + "…"


# ---- the description ----------------------------------------------------------------------------

ERROR = record({"error": record({"message": TEXT, "type": TEXT, "param": TEXT_OR_NULL,
                                 "code": TEXT_OR_NULL}, ("message", "type"))}, ("error",))
STATUSES = {
    "400": "the request is wrong; `param` names the field",
    "401": "the key is missing or wrong",
    "403": "a web page of another origin, or another host name",
    "404": "no such model or path",
    "405": "no such method, or the model does not do that",
    "408": "the request was not sent in time",
    "411": "Content-Length is missing",
    "413": "the request is too large",
    "415": "the body is not application/json",
    "429": "too many requests wait; try again after Retry-After seconds",
    "500": "the model failed",
    "503": "the server is shutting down",
}


def operation(summary: str, body: dict | None = None) -> dict:
    """The description of a path."""
    def content(schema):
        return {"application/json": {"schema": schema}}

    replies = {"200": {"description": "the answer", "content": content({"type": "object"})}}
    if body and "stream" in body["properties"]:
        replies["200"]["content"]["text/event-stream"] = {"schema": TEXT}
    replies |= {status: {"description": text, "content": content(ERROR)}
                for status, text in STATUSES.items()}
    found = {"summary": summary, "responses": replies}
    if body:
        found["requestBody"] = {"required": True, "content": content(body)}
    return found


def openapi() -> dict:
    """The OpenAPI document of the server."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pocket Factory", "version": "1",
                 "description": "a model and its adapters, as OpenAI's API"},
        "paths": {
            "/health": {"get": operation("is the server alive?")},
            "/openapi.json": {"get": operation("this document")},
            "/v1/models": {"get": operation("the base and its adapters")},
            "/v1/chat/completions": {"post": operation("answer a conversation", CHAT)},
            "/v1/completions": {"post": operation("continue a text", COMPLETION)},
            "/v1/score/evaluation": {"post": operation("score texts with a reward model", SCORE)},
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
