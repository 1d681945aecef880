#!/usr/bin/env python3
"""An OpenAI-compatible server in one file, on nothing but Python's standard library.

    $ python3 openai_compat.py                        # the echo backend, on port 8000
    $ curl http://127.0.0.1:8000/v1/chat/completions -d '{
        "model": "echo", "messages": [{"role": "user", "content": "Hello!"}]}'

As a fixture, for any client in any language:

    with Server(say("Hello", " world")) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="any")
        ...

It reads from top to bottom in the order in which the bytes of a request become the
bytes of a reply.  Each stage is a plain function over what the one before returns:

    request bytes
        | parse_chat, parse_completion        a dict, every known field present, checked
    request
        | backend                             pieces: str, ToolCall
    pieces
        | paced, up_to, until_stop            cut short; last comes Finish(reason)
    choices
        | chat_chunks, completion_chunks      one dict per piece
    chunks ------ fold ------> completion     without "stream": the same chunks, joined
        | events                              server-sent events, then [DONE]
    writes
        | quirk                               only where a test asks for a fault
    transfer chunks

They all meet in `Server.complete`.  The sections: Errors, JSON, Requests, Tokens,
Schema samples, Waiting, Backends, Choices, Chunks, Events, Quirks, Relay and replay;
then HTTP, Page, Server, Command line.  What stands above HTTP takes and gives dicts,
bytes and generators, and asks of the client's socket only whether anybody is there.

A backend is any function of the request that returns text or yields it in pieces:

    def backend(request):
        for word in request["text"].split():
            yield word[::-1] + " "

What it does not do: run a model, embeddings, images, audio, files, /v1/responses,
HTTP/2.  It keeps nothing between two requests but the journal and a script's place.
"""
import base64
import codecs
import collections
import contextlib
import errno
import functools
import http.client
import importlib
import io
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import unicodedata
from contextlib import closing, suppress
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

__version__ = "1.0.0"
__all__ = """Server APIError Reply ToolCall echo say command Script Relay Replay
             sample tokenize QUIRKS""".split()     # the rest is for reading

log = logging.getLogger("openai_compat")


# ----------------------------------------------------------------------------------
# Errors.  One type for everything that is refused, wherever it is noticed.  Raise it
# anywhere; the handler alone catches it, and every refusal has the API's one shape.

ERROR_KINDS = {  # status: (type, code); the hundreds stand for all of theirs
    400: ("invalid_request_error", None),
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("service_unavailable_error", None),
}


def header_fields(headers):
    """Headers as somebody gave them -> {lower-case name: str} (RFC 9110, 5.5)."""
    if not headers:
        return {}
    fields = {str(name).lower(): str(value) for name, value in dict(headers).items()}
    for name, value in fields.items():
        if re.search("[\r\n\0]", name + value):     # it would start a header of its own
            raise ValueError(f"the header {name!r} has a line end or a NUL in it")
    return fields


class APIError(Exception):
    """A refusal as the API words it: an HTTP status and an error object.

    APIError(429, "Slow down.", headers={"retry-after-ms": "20"})

    `param` names the field at fault, `code` the fault for programs; `type` follows
    from the status unless it is given.  `headers` go out with the reply.
    """

    def __init__(self, status, message, param=None, code=None, type=None, headers=None):
        super().__init__(message)
        if not 400 <= int(status) <= 599:
            raise ValueError(f"an error's status is 400 to 599, not {status}")
        kind, usual_code = ERROR_KINDS.get(status, ERROR_KINDS[status // 100 * 100])
        self.headers = header_fields(headers)
        if code == "insufficient_quota":        # waiting does not fill an account
            kind = code
            self.headers.setdefault("x-should-retry", "false")
        self.status, self.message, self.param = int(status), message, param
        self.code, self.type = code or usual_code, type or kind

    def body(self):
        """The error envelope; all four keys always, as clients read them unasked."""
        return {"error": {"message": self.message, "type": self.type,
                          "param": self.param, "code": self.code}}


def server_error():
    """What a client is told of a fault that is none of its own."""
    return APIError(500, "The server had an error while processing your request. "
                         "Sorry about that!")


# ----------------------------------------------------------------------------------
# JSON, strictly.  The standard parser takes NaN, 1e999 and bytes in UTF-16; the
# wire does not.  What goes out is compact UTF-8, as the API itself sends it.

JSON_NAMES = {str: "a string", bool: "a boolean", int: "an integer", float: "a decimal",
              list: "an array", dict: "an object", type(None): "null"}


def not_json(text):
    raise ValueError(f"{text[:20]} is no number of JSON")


def finite(text):
    number = float(text)
    return number if math.isfinite(number) else not_json(text)


decode_json = json.JSONDecoder(parse_constant=not_json, parse_float=finite).decode


def body_is_no_json(why):
    return APIError(400, "We could not parse the JSON body of your request. "
                         f"(HINT: the body is to be one JSON object in UTF-8; {why}.)")


def parse_json(body):
    """Bytes -> dict, or a 400 that says what is wrong (RFC 8259)."""
    try:
        text = body.decode()
        value = decode_json(text[text.startswith("\ufeff"):])    # no order mark
    except RecursionError:
        raise body_is_no_json("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise body_is_no_json(f"it is not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise body_is_no_json(str(error)[:200]) from None
    if type(value) is not dict:
        raise body_is_no_json(f"it is {JSON_NAMES[type(value)]}, not an object")
    return value


def encoder(as_string, **options):
    """A JSONEncoder's `encode`, its C part made here once, not for every value."""
    standard = json.JSONEncoder(allow_nan=False, separators=(",", ":"), **options)
    try:
        parts = json.encoder.c_make_encoder(None, standard.default, as_string, None,
                                            ":", ",", False, False, False)
    except (AttributeError, TypeError):         # it is another Python's, or has none
        return standard.encode
    return lambda value: "".join(parts(value, 0))


compact = encoder(json.encoder.encode_basestring, ensure_ascii=False)
escaped = encoder(json.encoder.encode_basestring_ascii)
# Lone surrogates have no UTF-8; at the other three, old clients end a line.
AWKWARD = re.compile("[\ud800-\udfff\x85\u2028\u2029]")


def to_json(value):
    """A value as compact JSON bytes; a ValueError for what JSON has no words for."""
    try:
        text = compact(value)
        if not text.isascii() and AWKWARD.search(text):
            text = escaped(value)
    except RecursionError:
        raise ValueError("JSON cannot nest so deeply, nor in a circle") from None
    return text.encode()


# ----------------------------------------------------------------------------------
# Requests.  A body is checked against a table, one row a field, and comes out as a
# dict in which every known field is present.  null is absence; unknown fields pass.
#
# What a value has to be is said by a spec, and `checker` makes a function of it, once:
#     "string"                  that type of JSON
#     ("low", "high")           one of these words
#     [spec]                    an array of such
#     {"a": spec, "b!": spec}   an object; "!" has to be there, "?" too, but may be null
#     a function                of where and value; those below `checker` make some

TYPES = {"string": (str,), "boolean": (bool,), "integer": (int,),  # exact: True is none
         "decimal": (int, float), "array": (list,), "object": (dict,)}


def invalid(message, param, code=None):
    return APIError(400, message, param, code)


def missing(param):
    return invalid(f"Missing required parameter: '{param}'.", param,
                   "missing_required_parameter")


def mistyped(where, value, expected):
    return invalid(f"Invalid type for '{where}': expected {expected}, but got "
                   f"{JSON_NAMES[type(value)]} instead.", where, "invalid_type")


def out_of_bounds(where, fault, wanted, got, code):
    return invalid(f"Invalid '{where}': {fault}. Expected {wanted}, but got {got} "
                   "instead.", where, code)


def check_bounds(where, value, kind, least, most):
    """Refuse a number out of bounds, and what is longer or shorter than it may be."""
    size = value if kind in ("integer", "decimal") else len(value)
    if least is not None and size < least:
        side, limit, bound = "below", "minimum", f">= {least}"
    elif most is not None and size > most:
        side, limit, bound = "above", "maximum", f"<= {most}"
    else:
        return
    code = f"{kind}_{side}_{limit[:3]}"
    if size is value:
        raise out_of_bounds(where, f"{kind} {side} {limit} value", f"a value {bound}",
                            value, f"{code}_value")
    name = JSON_NAMES[type(value)]
    wanted = f"{name} with {limit} length {bound[3:]}"
    if size == 0:
        raise out_of_bounds(where, f"empty {kind}", wanted, f"an empty {kind}",
                            f"empty_{kind}")
    raise out_of_bounds(where, f"{kind} too long", wanted, f"{name} with length {size}",
                        f"{code}_length")


@functools.lru_cache(maxsize=None)
def of_kind(kind, least=None, most=None):
    """The check of a value's type, and of its size where that is bounded."""
    types, bounded = TYPES[kind], least is not None or most is not None

    def check(where, value):
        if type(value) not in types:
            raise mistyped(where, value, JSON_NAMES[types[-1]])
        if bounded:
            check_bounds(where, value, kind, least, most)
    return check


def one_of(words):
    def check_word(where, value):
        if value not in words:
            *others, last = map(repr, words)
            raise invalid(f"Invalid value: {value[:80]!r}. Supported values are: "
                          f"{', '.join(others)}{', and ' if others else ''}{last}.",
                          where, "invalid_value")
    return check_word


def each_is(spec):
    check_item = checker(*spec)

    def check_items(where, value):
        for i, item in enumerate(value):
            check_item(f"{where}[{i}]", item)
    return check_items


def has(spec):
    rows = [(key.rstrip("!?"), key[-1], checker(inner)) for key, inner in spec.items()]

    def check_members(where, value):
        for field, mark, check_member in rows:
            member = value.get(field)
            if member is not None:
                check_member(f"{where}.{field}", member)
            elif mark == "!" or mark == "?" and field not in value:
                raise missing(f"{where}.{field}")
    return check_members


SPECS = {tuple: ("string", one_of), list: ("array", each_is), dict: ("object", has)}


def checker(spec, least=None, most=None):
    """The function of where and value that refuses a value unlike the spec.

    `least` and `most` bound a number, or the length of what has one.
    """
    if callable(spec):
        return spec
    kind, inside = SPECS.get(type(spec), (spec, None))
    check_kind = of_kind(kind, least, most)
    if inside is None:
        return check_kind
    check_inside = inside(spec)

    def check(where, value):
        check_kind(where, value)
        check_inside(where, value)
    return check


def tagged(tag, **specs):
    """A spec for objects of several shapes; the field `tag` says which one it is."""
    checks = {name: checker(spec) for name, spec in specs.items()}
    check_tag = checker({tag + "!": tuple(specs)})

    def check_tagged(where, value):
        try:
            check_shape = checks[value[tag]]
        except (KeyError, TypeError):
            check_shape = check_tag             # it says what is wrong
        check_shape(where, value)
    return check_tagged


def either(text, other):
    """A spec for what may be a string or an array or object."""
    kind, _ = SPECS.get(type(other), ("object", None))
    check_text, check_other = checker(text), checker(other)

    def check_either(where, value):
        if type(value) is str:
            check_text(where, value)
        elif type(value) in TYPES[kind]:
            check_other(where, value)
        else:
            raise mistyped(where, value, f"one of a string or an {kind}")
    return check_either


def mapping(spec, least=None, most=None, key=None, pairs=None):
    """A spec for an object of so many pairs, with keys so long, and such values."""
    check_object = checker("object", None, pairs)
    check_key, check_item = checker("string", None, key), checker(spec, least, most)

    def check_mapping(where, value):
        check_object(where, value)
        for name, item in value.items():
            check_key(where, name)
            check_item(f"{where}.{name[:64]}", item)
    return check_mapping


check_name = checker("string", None, 64)


def identifier(where, value):
    """The spec for names of functions, tools and schemas."""
    check_name(where, value)
    if not re.fullmatch("[a-zA-Z0-9_-]+", value):
        raise invalid(f"Invalid '{where}': string does not match pattern. Expected a "
                      "string that matches the pattern '^[a-zA-Z0-9_-]+$'.", where,
                      "invalid_value")


NAMED, ANY_NAMED = {"name!": identifier}, {"name!": "string"}
FUNCTION = {**NAMED, "description": "string", "parameters": "object",
            "strict": "boolean"}
CUSTOM = {**NAMED, "description": "string", "format": "object"}
TOOL = tagged("type", function={"function!": FUNCTION}, custom={"custom!": CUSTOM})
CHOSEN = {"function": {"function!": NAMED}, "custom": {"custom!": NAMED}}
ALLOWED = {"mode!": ("auto", "required"), "tools!": [tagged("type", **CHOSEN)]}
TOOL_CHOICE = either(("none", "auto", "required"), tagged(
    "type", **CHOSEN, allowed_tools={"allowed_tools!": ALLOWED}))
CALL = tagged("type", function={"id!": "string", "function!": ANY_NAMED},
              custom={"id!": "string", "custom!": ANY_NAMED})
PART = tagged("type", text={"text!": "string"}, refusal={"refusal!": "string"},
              image_url={"image_url!": {"url!": "string"}}, file={"file!": "object"},
              input_audio={"input_audio!": {"data!": "string",
                                            "format!": ("wav", "mp3")}})
CONTENT = either("string", [PART])
SPOKEN = {"content?": CONTENT, "name": "string"}
MESSAGE = tagged(
    "role", system=SPOKEN, developer=SPOKEN, user=SPOKEN,
    assistant={"content": CONTENT, "name": "string", "refusal": "string",
               "tool_calls": [CALL], "function_call": ANY_NAMED},
    tool={"content?": CONTENT, "tool_call_id!": "string"},
    function={"content?": "string", "name!": "string"})
JSON_SCHEMA = {**NAMED, "description": "string", "schema": "object",
               "strict": "boolean"}
RESPONSE_FORMAT = tagged("type", text={}, json_object={},
                         json_schema={"json_schema!": JSON_SCHEMA})
STREAM_OPTIONS = {"include_usage": "boolean", "include_obfuscation": "boolean"}
STOP = checker("string", None, 1000)
METADATA = mapping("string", None, 512, key=64, pairs=16)
TIERS = ("auto", "default", "flex", "scale", "priority", "fast")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
REQUIRED = object()             # as a default: the field has none


class Fields(dict):
    """A table of fields, name: its check, with their defaults."""

    def __init__(self, *rows):
        super().__init__({name: checker(spec, *bounds)
                          for name, spec, _, *bounds in rows})
        self.defaults = {name: default for name, _, default, *_ in rows}
        self.required = [name for name in self if self.defaults[name] is REQUIRED]


#    name                      spec                           default   least   most
MODEL = (
    "model",                   "string",                      REQUIRED, None,   None)
SHARED_FIELDS = (      # by both endpoints
    ("max_tokens",             "integer",                     None,     0,      None),
    ("n",                      "integer",                     1,        1,      128),
    ("temperature",            "decimal",                     1,        0,      2),
    ("top_p",                  "decimal",                     1,        0,      1),
    ("presence_penalty",       "decimal",                     0,        -2,     2),
    ("frequency_penalty",      "decimal",                     0,        -2,     2),
    ("logit_bias",             mapping("decimal", -100, 100), None,     None,   None),
    ("stop",                   either(STOP, [STOP]),          (),       None,   None),
    ("user",                   "string",                      None,     None,   None),
    ("seed",                   "integer",                     None,  -2**63, 2**63 - 1),
    ("stream",                 "boolean",                     False,    None,   None),
    ("stream_options",         STREAM_OPTIONS,                None,     None,   None),
)
CHAT_FIELDS = Fields(
    MODEL,
    ("messages",               [MESSAGE],                     REQUIRED, 1,      None),
    ("functions",              [FUNCTION],                    (),       1,      128),
    ("tools",                  [TOOL],                        (),       None,   128),
    ("tool_choice",            TOOL_CHOICE,                   None,     None,   None),
    ("function_call",          either(("none", "auto"), NAMED), None,   None,   None),
    ("parallel_tool_calls",    "boolean",                     True,     None,   None),
    ("response_format",        RESPONSE_FORMAT,               None,     None,   None),
    ("max_completion_tokens",  "integer",                     None,     1,      None),
    *SHARED_FIELDS,
    ("logprobs",               "boolean",                     False,    None,   None),
    ("top_logprobs",           "integer",                     None,     0,      20),
    ("safety_identifier",      "string",                      None,     None,   64),
    ("prompt_cache_key",       "string",                      None,     None,   None),
    ("prompt_cache_retention", ("in_memory", "24h"),          None,     None,   None),
    ("prompt_cache_options",   "object",                      None,     None,   None),
    ("service_tier",           TIERS,                         "auto",   None,   None),
    ("modalities",             [("text", "audio")],           ("text",), 1,     2),
    ("audio",                  "object",                      None,     None,   None),
    ("prediction",             "object",                      None,     None,   None),
    ("reasoning_effort",       EFFORTS,                       None,     None,   None),
    ("verbosity",              ("low", "medium", "high"),     None,     None,   None),
    ("store",                  "boolean",                     False,    None,   None),
    ("metadata",               METADATA,                      None,     None,   None),
    ("web_search_options",     "object",                      None,     None,   None),
    ("moderation",             "object",                      None,     None,   None),
)
COMPLETION_FIELDS = Fields(
    MODEL,
    *SHARED_FIELDS,
    ("best_of",                "integer",                     None,     0,      20),
    ("echo",                   "boolean",                     False,    None,   None),
    ("logprobs",               "integer",                     None,     0,      5),
    ("suffix",                 "string",                      None,     None,   None),
)
NEEDS = (  # a field, another that has to be there and true, the API's words for it
    ("stream_options", "stream",
     "The 'stream_options' parameter is only allowed when 'stream' is enabled."),
    ("top_logprobs", "logprobs",
     "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."),
    ("tool_choice", "tools", "Invalid value for 'tool_choice': 'tool_choice' is only "
     "allowed when 'tools' are specified."),
    ("function_call", "functions", "Invalid value for 'function_call': 'function_call' "
     "is only allowed when 'functions' are specified."),
)
CALL_INPUT = {"function": "arguments", "custom": "input"}   # where a call has its input
CALL_CHECKS = {kind: checker({f"{field}!": "string"})
               for kind, field in CALL_INPUT.items()}


def checked(body, fields):
    """The body with every field of the table in it: checked, or its default."""
    given = {field: value for field, value in body.items() if value is not None}
    if not given.get("model"):
        raise invalid("you must provide a model parameter", None)
    for field in fields.required:
        if field not in given:
            raise missing(field)
    for field, value in given.items():
        if field in fields:
            fields[field](field, value)
    for field, other, words in NEEDS:
        if field in given and not given.get(other):
            raise invalid(words, field)
    stop = given.get("stop") or ()
    given["stop"] = [stop] if type(stop) is str else list(filter(None, stop))
    return {**body, **fields.defaults, **given}


def check_answer(i, id, called):
    """Refuse a tool message that answers none of the calls of the turn before it."""
    if not called:
        raise invalid("Invalid parameter: messages with role 'tool' must be a response "
                      "to a preceeding message with 'tool_calls'.",
                      f"messages.[{i}].role")
    if id not in called:
        raise invalid(f"Invalid parameter: 'tool_call_id' of '{id}' not found in "
                      "'tool_calls' of previous message.",
                      f"messages.[{i}].tool_call_id")


def ids_called(i, calls):
    """The ids of the calls of message i, each of which has an input."""
    for j, call in enumerate(calls):
        kind = call["type"]
        CALL_CHECKS[kind](f"messages[{i}].tool_calls[{j}].{kind}", call[kind])
    return [call["id"] for call in calls]


def check_conversation(messages):
    """Every tool call is answered at once, and every answer has its call."""
    called, unanswered = [], []         # ids of the turn's calls
    for i, message in enumerate([*messages, {"role": None}]):
        role = message["role"]
        if role == "tool":
            check_answer(i, message["tool_call_id"], called)
            unanswered = [id for id in unanswered if id != message["tool_call_id"]]
            continue
        if unanswered:
            raise invalid("An assistant message with 'tool_calls' must be followed by "
                          "tool messages responding to each 'tool_call_id'. The "
                          "following tool_call_ids did not have response messages: "
                          f"{', '.join(unanswered)}",
                          f"messages.[{min(i, len(messages) - 1)}].role")
        calls = message.get("tool_calls") if role == "assistant" else None
        called = unanswered = ids_called(i, calls) if calls else []


def chosen_tools(tool_choice):
    """The names of the tools that a "tool_choice" speaks of."""
    if type(tool_choice) is not dict:
        return []
    allowed = tool_choice["type"] == "allowed_tools"
    chosen = tool_choice["allowed_tools"]["tools"] if allowed else [tool_choice]
    return [each[each["type"]]["name"] for each in chosen]


def check_chosen(request):
    """A tool or function that is chosen by name has to be there."""
    wish, call = request["tool_choice"], request["function_call"]
    for chosen in chosen_tools(wish):
        if chosen not in [tool[tool["type"]]["name"] for tool in request["tools"]]:
            raise invalid(f"Tool choice '{chosen}' not found in 'tools' parameter.",
                          "tool_choice")
    if type(call) is dict and call["name"] not in [
            function["name"] for function in request["functions"]]:
        raise invalid("Invalid value for 'function_call': no function named "
                      f"'{call['name']}' was specified in the 'functions' parameter.",
                      "function_call")


def text_of(content):
    """The text of a content: as it is, joined from its parts, or "" for null."""
    if type(content) is list:
        texts = (part.get("text") or part.get("refusal") or "" for part in content)
        return "".join(texts)
    return content or ""


def asked(messages):
    """What is being asked: the text of the last user message, else of the last."""
    users = (message for message in reversed(messages) if message["role"] == "user")
    return text_of(next(users, messages[-1]).get("content"))


def parse_chat(body, strict=True):
    """The body of POST /v1/chat/completions -> the request that a backend gets.

    `strict` also checks the conversation: each tool call answered, each answer called.
    """
    request = checked(body, CHAT_FIELDS)
    if strict:
        check_conversation(request["messages"])
    check_chosen(request)
    if "audio" in request["modalities"]:
        raise invalid("Unsupported value: 'modalities' does not support 'audio' with "
                      "this model.", "modalities", "unsupported_value")
    text = asked(request["messages"])
    request.update(endpoint="chat", body=body, prompt=text, text=text)
    return request


check_prompts = checker("array", 1)


def is_token_ids(prompt):
    return (type(prompt) is list and len(prompt) > 0
            and all(type(id) is int and id >= 0 for id in prompt))


def parse_prompts(prompt, best_of):
    """The four forms of "prompt" -> a list of texts or of lists of token ids.

    Example: "a" -> ["a"]    ["a", "b"] -> the same    [17, 18] -> [[17, 18]]
    """
    prompt = "<|endoftext|>" if prompt is None else prompt
    if type(prompt) is list:
        check_prompts("prompt", prompt)
    one = type(prompt) is str or type(prompt) is list and type(prompt[0]) is int
    prompts = [prompt] if one else prompt
    if type(prompts) is not list or not (all(type(each) is str for each in prompts)
                                         or all(map(is_token_ids, prompts))):
        raise mistyped("prompt", prompt, "one of a string, array of strings, array of "
                                         "integers, or array of integer arrays")
    if len(prompts) * best_of > 128:
        raise invalid(f"Invalid 'prompt': {len(prompts)} prompts of {best_of} choices "
                      "each are more than 128 choices.", "prompt",
                      "array_above_max_length")
    return prompts


def parse_completion(body, strict=True):
    """The body of POST /v1/completions -> the request that a backend gets.

    Its "prompts" is a list of texts or of lists of token ids, from any of the four
    forms of "prompt".
    """
    request = checked(body, COMPLETION_FIELDS)
    if "prompt" not in body:            # null is a prompt of its own: see parse_prompts
        raise missing("prompt")
    n = request["n"]
    best_of = n if request["best_of"] is None else request["best_of"]
    if best_of < n:
        raise invalid("You requested that the server return more choices than it will "
                      f"generate (HINT: you must set 'n' (currently {n}) to be at most "
                      f"'best_of' (currently {best_of}), or omit either parameter if "
                      "you do not specifically want to use them.)", "best_of")
    if request["stream"] and best_of > n:
        raise invalid("Cannot stream results with best_of > n.", "best_of")
    return {**request, "endpoint": "completion", "body": body, "best_of": best_of,
            "prompts": parse_prompts(body["prompt"], best_of)}


# ----------------------------------------------------------------------------------
# Tokens.  No vocabulary is at hand, so a token is what a reader would call a word, a
# sign or a mark: a stable estimate, and `Server(tokenize=...)` takes a real one.

CJK = "\u2e80-\u9fff\ua000-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(
    rf" ?[^\W{CJK}]+"                          # a word, with the space before it
    r"| ?[\U0001f1e6-\U0001f1ff]{2}"            # a flag is two letters that combine
    r"| ?\S"                                    # a CJK character, a sign, an emoji
    r"|\s+(?!\S)|\s+")                  # white space, but for a word's own space
ZERO_WIDTH_JOINER = "\u200d"


def combines(character):
    return (character == ZERO_WIDTH_JOINER or unicodedata.category(character)[0] == "M"
            or "\U0001f3fb" <= character <= "\U0001f3ff"        # the skin of an emoji
            or "\U000e0020" <= character <= "\U000e007f")       # the tail of a flag


def recombined(tokens):
    """Join each token that starts with a combining character to the one before."""
    whole = []
    for token in tokens:
        if whole and (combines(token[0]) or whole[-1][-1] == ZERO_WIDTH_JOINER):
            whole[-1] += token
        else:
            whole.append(token)
    return whole


def tokenize(text):
    """Split a text into tokens whose join is the text.

    Example: "Hello, 世界 again" -> ["Hello", ",", " 世", "界", " again"]

    Never inside a code point, nor between a character and what combines with it.
    """
    tokens = TOKEN.findall(text)
    return tokens if text.isascii() else recombined(tokens)


def tokens_of(prompt, tokenize):
    """The tokens of one prompt, a text or a list of token ids.

    A tokenizer may bring `decode(id) -> str`; what nobody can decode reads <|17|>.
    """
    if type(prompt) is str:
        return tokenize(prompt)
    decode = getattr(tokenize, "decode", "<|{}|>".format)
    return [decode(id) for id in prompt]


def slices(text, size=65536):
    """A text in parts, cut before a space where there is one.

    The tokens of a text take forty times its memory: those of a long one are never
    made all at once.
    """
    start = 0
    while len(text) - start > size:
        space = text.rfind(" ", start + 1, start + size)
        end = space if space > 0 else start + size
        while end < len(text) and (combines(text[end])
                                   or text[end - 1] == ZERO_WIDTH_JOINER):
            end += 1
        yield text[start:end]
        start = end
    yield text[start:]


def count_tokens(prompt, tokenize):
    """How many tokens a text has, or a list of token ids."""
    if type(prompt) is list:
        return len(prompt)
    return sum(map(len, map(tokenize, slices(prompt))))


def readings(request, tokenize):
    """What each prompt of a completion reads as: its tokens, or the text as one."""
    return [tokens_of(prompt, tokenize) if request["echo"] or type(prompt) is list
            else [prompt] for prompt in request.get("prompts", ())]


def prompts_of(request):
    """All that the model would read: the texts of the messages, or the prompts."""
    if request["endpoint"] == "chat":
        return [text_of(message.get("content")) for message in request["messages"]]
    return request["prompts"]


# ----------------------------------------------------------------------------------
# Schema samples.  A forced tool call and a structured output need an instance of a
# JSON Schema (draft 2020-12).  `sample` makes a candidate, then checks the whole of it
# against the schema as it was given: what the making overlooks, the check refuses.
#
# Several schemas can hold at one place of the instance: the one that stands there, the
# one that its $ref names, those of its allOf, a branch of its anyOf.  They stay a list,
# called `here`, and are never merged.  A full validator knows every keyword and runs
# patterns; this one refuses what it cannot judge.

SAMPLE_WORK = 300_000       # characters and steps that one sample may cost
NEAR = sorted(range(100, -100, -1), key=abs)    # 0, 1, -1, 2, -2, ...

JSON_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool,
              "null": type(None), "integer": (int, float), "number": (int, float)}
CONSTANTS = {"boolean": [False, True], "null": [None]}
FORMATS = {  # None: any string
    "date": "2024-01-01", "time": "00:00:00Z", "date-time": "2024-01-01T00:00:00Z",
    "duration": "P1D", "email": "user@example.com", "hostname": "example.com",
    "uri": "https://example.com/", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1",
    "ipv4network": "192.0.2.0/24", "password": None, "binary": None,
    **{f"uuid{version}": f"00000000-0000-{version or 4}000-8000-000000000000"
       for version in ("", 1, 2, 3, 4, 5)},
}


def _unsatisfiable(keyword, why="it cannot be satisfied"):
    return APIError(400, f"No instance of this schema can be made, for its keyword "
                         f"'{keyword}': {why}.", code="invalid_json_schema")


def _is_a(value, kind):
    """Is a value of this JSON type, or of one of these?  true is not an integer."""
    if isinstance(kind, list):
        return any(_is_a(value, each) for each in kind)
    if type(value) is bool or kind == "any":
        return kind in ("any", "boolean")
    return isinstance(value, JSON_TYPES[kind]) and (kind != "integer" or value % 1 == 0)


def _key(value):
    """Text that equal JSON values share: 1 and 1.0 do, 1 and true do not."""
    return json.dumps(json.loads(to_json(value), parse_int=float), sort_keys=True)


def _is_one(value, values):
    return any(value == each and _key(value) == _key(each) for each in values)


def _at_least(value, length):
    return len(value) >= length


def _at_most(value, length):
    return len(value) <= length


def _rows(kind, keywords, rule):
    return dict.fromkeys(keywords.split(), (kind, rule))


RULES = {  # keyword: (its type, does a value of that type obey it?  None: nobody knows)
    **_rows("any", "not if $id $dynamicRef $recursiveRef", lambda *_: None),
    "type": ("any", _is_a), "enum": ("any", _is_one),
    "const": ("any", lambda value, constant: _is_one(value, [constant])),

    "minimum": ("number", operator.ge), "exclusiveMinimum": ("number", operator.gt),
    "maximum": ("number", operator.le), "exclusiveMaximum": ("number", operator.lt),
    "multipleOf": ("number", lambda value, step: (  # in floats, 1.12 / 0.01 is not 112
        value % step if isinstance(step, int) else value / step % 1) == 0),

    "minLength": ("string", _at_least), "maxLength": ("string", _at_most),
    "format": ("string", lambda it, form: FORMATS.get(form, 0) in (None, it) or None),
    **_rows("string", "pattern contentEncoding contentMediaType", lambda *_: None),

    "minItems": ("array", _at_least), "maxItems": ("array", _at_most),
    "uniqueItems": ("array", lambda value, on: (
        not on or len(set(map(_key, value))) == len(value))),
    **_rows("array", "items prefixItems", lambda *_: True),     # see `_Sampler.parts`
    **_rows("array", "contains additionalItems unevaluatedItems", lambda *_: None),

    "minProperties": ("object", _at_least), "maxProperties": ("object", _at_most),
    "required": ("object", lambda value, names: value.keys() >= set(names)),
    **_rows("object", "properties additionalProperties propertyNames", lambda *_: True),
    **_rows("object", "patternProperties dependencies dependentRequired "
            "dependentSchemas unevaluatedProperties", lambda each, _: not each or None),
}


def _said(here, *keywords):
    """What the schemas of a list say with these keywords."""
    return [schema[each] for each in keywords for schema in here if each in schema]


def _property(schema, name):
    rest = schema.get("additionalProperties", True)
    return schema.get("properties", {}).get(name, rest)


def _item(schema, index):
    """The schema of an item.  `items` as a list is how prefixItems was once written."""
    rest = schema.get("items", True)
    first = rest if isinstance(rest, list) else schema.get("prefixItems", ())
    return first[index] if index < len(first) else rest is first or rest


class _Sampler:
    """One sample in the making: the root of its schema, and the work that is left."""

    def __init__(self, root):
        self.root, self.left, self.fault = root, SAMPLE_WORK, None
        self.trusting, self.trusted = False, set()

    def spend(self, work, keyword="$ref"):
        self.left -= work
        if self.left < 0:
            raise _unsatisfiable(keyword, "the instance or the work would be too large")

    def also(self, schema):
        """What holds wherever a schema does: its allOf, and the target of its $ref.

        A $ref is "#", or a pointer (RFC 6901) such as "#/$defs/a".
        """
        yield from schema.get("allOf", ())
        for ref in _said([schema], "$ref"):
            place = {"#": self.root}
            for step in unquote(ref).split("/"):
                step = step.replace("~1", "/").replace("~0", "~")
                place = place.get(step) if isinstance(place, dict) else None
            if place is None:
                raise _unsatisfiable("$ref", f"there is no {ref}")
            yield place

    # ------ the check

    def broken(self, value, schema, keyword="allOf"):
        """The first keyword that a value does not obey, or None.

        Patterns are not run: a string of an author's example is trusted to match one.
        """
        if isinstance(schema, bool):
            return None if schema else keyword
        lists = _said([schema], "enum", "anyOf", "oneOf", "$ref")
        self.spend(len(schema) + sum(map(len, lists)))
        for keyword in filter(RULES.__contains__, schema):
            (kind, rule), argument = RULES[keyword], schema[keyword]
            verdict = not _is_a(value, kind) or rule(value, argument)
            claim = verdict is None and kind == "string" and (value, keyword, argument)
            if claim and self.trusting:
                self.trusted.add(claim)
            if verdict is None and claim not in self.trusted:
                raise _unsatisfiable(keyword, "it is not known here")
            if verdict is False:
                return keyword
        parts = itertools.starmap(self.broken, self.parts(value, schema))
        return next(filter(None, parts), None)

    def parts(self, value, schema):
        """(a value, its schema, keyword) for the value itself and for what is in it."""
        yield from ((value, each, "allOf") for each in self.also(schema))
        for keyword in {"anyOf", "oneOf"} & schema.keys():
            fits = (not self.broken(value, each) for each in schema[keyword])
            yield value, any(fits) and not (keyword == "oneOf" and any(fits)), keyword
        for name in value if isinstance(value, dict) else ():
            yield value[name], _property(schema, name), "additionalProperties"
            yield name, schema.get("propertyNames", True), "propertyNames"
        for index, each in enumerate(value if isinstance(value, list) else ()):
            yield each, _item(schema, index), "items"

    # ------ the making

    def make(self, schemas, name, above=frozenset(), others=()):
        """A value that obeys all the schemas and is none of the others."""
        schemas = [each for each in schemas if each is not False]  # seen further out
        self.fault = _unsatisfiable("$ref", "it contains itself without an end")
        for self.trusting, value in self.candidates(schemas, name, above):
            try:
                self.spend(len(to_json(value)))
                keyword = self.broken(value, {"allOf": schemas})
                if not keyword and not _is_one(value, others):
                    return value
                raise _unsatisfiable(keyword or "uniqueItems")
            except APIError as fault:
                self.fault = fault
        raise self.fault

    def candidates(self, todo, name, above, here=()):
        """Each (is it an author's example?, value), reading the schemas `todo` in turn.

        `above` has the ids of the schemas that this place is inside of: a schema inside
        itself has no candidate, so a linked list ends with its other branch, null.
        """
        todo = [each for each in todo if not isinstance(each, bool)]
        self.spend(1 + len(todo))
        if not todo:
            yield from self.values(here, name, above.union(map(id, here)))
        elif id(todo[0]) not in above:
            schema, *rest = todo
            rest += self.also(schema)
            choices = filter(None, _said([schema], "anyOf", "oneOf"))
            for branches in itertools.product(*choices):
                both = [*rest, *branches]
                yield from self.candidates(both, name, above, (*here, schema))

    def values(self, here, name, inside):
        """The candidates of one reading: what its schemas list or a type makes."""
        examples = [each[0] for each in _said(here, "examples") if each]
        yield from ((True, value) for value in _said(here, "default") + examples)
        listed = _said(here, "const") + sum(_said(here, "enum"), [])
        types = (kind if type(kind) is list else [kind] for kind in _said(here, "type"))
        implied = [RULES[key][0] for schema in here for key in schema if key in RULES]
        kinds = sum(types, []) or filter("any".__ne__, implied)
        for kind in dict.fromkeys(kinds) or ["object"]:
            try:
                make = getattr(self, f"make_{kind}", None)
                made = listed or CONSTANTS.get(kind) or make(here, name, inside)
                yield from ((False, value) for value in made)
            except APIError as fault:
                self.fault = fault

    def make_object(self, here, name, inside):
        """The required properties and enough others; then all of the properties."""
        low = max(_said(here, "minProperties"), default=0)
        required = [*dict.fromkeys(map(str, sum(_said(here, "required"), [])))]
        names = [*dict.fromkeys(itertools.chain(required, *_said(here, "properties")))]
        key = [{"type": "string"}, *_said(here, "propertyNames")]
        while len(names) < low:
            names.append(self.make(key, "key", inside, names))
        for count in (max(low, len(required)), len(names)):
            yield {each: self.make([_property(schema, each) for schema in here],
                                   each, inside) for each in names[:count]}

    def make_array(self, here, name, inside):
        low, made = max(_said(here, "minItems"), default=0), []
        self.spend(low, "minItems")
        others = made if any(_said(here, "uniqueItems")) else ()
        for index in range(low):
            schemas = [_item(schema, index) for schema in here]
            made.append(self.make(schemas, name, inside, others))
        yield made

    def make_string(self, here, name, inside):
        """The format's, else the name at its least length; then name2, name3, ..."""
        name, low = name or "text", max(_said(here, "minLength"), default=0)
        high = min(_said(here, "maxLength"), default=SAMPLE_WORK)
        self.spend(low, "minLength")
        yield from filter(None, map(FORMATS.get, _said(here, "format")))
        for mark in ("", *map(str, range(2, 100))):
            yield name.ljust(low - len(mark), "x")[:max(0, high - len(mark))] + mark

    def make_number(self, here, name, inside):
        """The number nearest to 0, one between the bounds, and multiples near them."""
        low = max(_said(here, "minimum", "exclusiveMinimum"), default=-math.inf)
        high = min(_said(here, "maximum", "exclusiveMaximum"), default=math.inf)
        step, start = max(_said(here, "multipleOf"), default=1), min(max(0, low), high)
        multiples = ((start // step + n) * step for n in NEAR)
        for value in (start, (low + high) / 2, start + 0.5, *multiples):
            if math.isfinite(value):
                yield int(value) if value % 1 == 0 else value

    make_integer = make_number


def sample(schema):
    """An instance of a JSON Schema, as tool calls and structured outputs need one.

    Only the required properties are made, unless more are needed.  A string is the name
    of its property.  What cannot be obeyed is an APIError(400) that names the keyword.

    Example:
        >>> sample({"type": "object", "required": ["city", "days"], "properties": {
        ...     "city": {"type": "string"}, "days": {"type": "integer", "minimum": 3}}})
        {'city': 'city', 'days': 3}
    """
    if isinstance(schema, dict):        # an $id says nothing at the root
        schema = {key: each for key, each in schema.items() if key != "$id"}
    try:
        return json.loads(to_json(_Sampler(schema).make([{"allOf": [schema]}], "text")))
    except RecursionError:
        raise _unsatisfiable("$ref", "it is nested too deeply") from None
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as why:
        raise _unsatisfiable("type", f"this is not a JSON Schema ({why})") from None


# ----------------------------------------------------------------------------------
# Waiting.  A connection has a thread of its own, and the thread knows its client: so
# whatever waits in it, for time or for a source, ends at once when the client leaves.

class ClientLeft(BaseException):
    """The client has closed its side.  No error: no `except Exception` sees it."""


here = threading.local()        # this thread's client, as `watch` has set it
# A selector with no limit at descriptor 1,024, where the platform has one.
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


def watch(client, ending=ClientLeft):
    """Make `client` the one for whom this thread works; `ending()` ends a wait."""
    here.client, here.ending, here.selector = client, ending, Selector()
    here.selector.register(client, selectors.EVENT_READ)


def has_left(client):
    """Has the client closed, or half-closed?  Under TLS only a bare close is seen."""
    try:
        return socket.socket.recv(client, 1, socket.MSG_PEEK) == b""
    except (BlockingIOError, InterruptedError, socket.timeout):
        return False
    except OSError:
        return True


def woken(seconds):
    """The client has woken us: it has left, or asks for more, which has to wait."""
    if has_left(here.client):
        raise here.ending()
    time.sleep(min(seconds, 0.02))      # a next request is not to be read yet


def pause(seconds):
    """Sleep; ClientLeft as soon as the client goes.  pause(0) only looks."""
    selector = getattr(here, "selector", None)
    if selector is None:        # a backend that somebody calls without a server
        return time.sleep(seconds)
    end = time.monotonic() + seconds
    while seconds >= 0 and selector.select(None if seconds == math.inf else seconds):
        woken(seconds)
        seconds = end - time.monotonic()


def wait_for(source):
    """Until `source` can be read; ClientLeft if the client goes before."""
    selector = getattr(here, "selector", None)
    if selector is None:
        return
    selector.register(source, selectors.EVENT_READ)
    try:
        while all(key.fileobj is not source for key, _ in selector.select()):
            woken(0.02)
    finally:
        selector.unregister(source)


# ----------------------------------------------------------------------------------
# Backends.  Any function of the request; it returns a str, a Reply, or an iterable of
# pieces (str or ToolCall).  It is called once per choice, and may raise APIError.

class ToolCall:
    """A piece that calls a tool: ToolCall("get_weather", {"city": "Bern"}).

    `arguments`: a dict, or the JSON text of one as it is to go out.  An id is made up
    where none is given.  For a custom tool the arguments are its input, a str.
    """

    def __init__(self, name, arguments=None, id=None):
        self.name, self.id = name, id
        if not isinstance(arguments, str):
            arguments = to_json({} if arguments is None else arguments).decode()
        self.arguments = arguments

    def __repr__(self):
        return f"ToolCall({self.name!r}, {self.arguments!r})"


class Reply:
    """What a backend says, with all that can be said about it.

    delay: seconds between pieces, or (first, between).  quirk: a name of QUIRKS.
    usage: fields that replace the counted ones.  headers: go out with the reply.
    expect: for a Script, a subset of the body to be asked, or a function of it.
    """

    def __init__(self, text=None, tool_calls=(), refusal=None, finish_reason=None,
                 usage=None, delay=0, quirk=None, headers=None, expect=None):
        calls = [tool_calls] if isinstance(tool_calls, ToolCall) else list(tool_calls)
        for call in calls:
            if not isinstance(call, ToolCall):
                raise TypeError(f"a tool call is a ToolCall, not {call!r}")
        parse_quirk(quirk)      # of a later section, but a wrong name shall fail here
        self.text, self.tool_calls, self.refusal = text, calls, refusal
        self.finish_reason, self.usage, self.delay = finish_reason, usage or {}, delay
        self.quirk, self.headers, self.expect = quirk, header_fields(headers), expect
        self.pieces = None      # in the place of text, as they come

    def __repr__(self):
        said = (f"{name}={value!r}" for name, value in vars(self).items() if value)
        return f"Reply({', '.join(said)})"

    def is_at_hand(self):
        """Is all of it there already, so that several pieces may share a send?"""
        at_hand = self.pieces is None or type(self.pieces) in (list, tuple)
        return at_hand and not self.delay


def backend_fault(message):
    """A 500 that tells the author of a backend what is wrong with it."""
    return APIError(500, f"The backend is at fault: {message}.")


def as_reply(result):
    """Whatever a backend returned, as a Reply."""
    if isinstance(result, Reply):
        return result
    if isinstance(result, str):
        return Reply(result)
    if isinstance(result, ToolCall):
        return Reply(tool_calls=[result])
    if isinstance(result, (bytes, dict)) or not hasattr(result, "__iter__"):
        raise backend_fault("a backend returns a str, a Reply or an iterable of "
                            f"pieces, not {type(result).__name__}")
    reply = Reply()
    reply.pieces = result
    return reply


def forced_tool(request):
    """The name of the tool that the request insists on, or None."""
    wish, call = request.get("tool_choice"), request.get("function_call")
    if wish == "required":
        first = request["tools"][0]
        return first[first["type"]]["name"]
    if type(wish) is dict and wish.get("allowed_tools", {}).get("mode") != "auto":
        return next(iter(chosen_tools(wish)), None)
    return call["name"] if type(call) is dict else None


def custom_tools(request):
    tools = request["tools"]
    return [tool["custom"]["name"] for tool in tools if tool["type"] == "custom"]


def sample_input(request, name):
    """Arguments that fit the schema of the tool of that name; text for a custom one."""
    if name in custom_tools(request):
        return request["text"]
    functions = [tool["function"] for tool in request["tools"]
                 if tool["type"] == "function"] + list(request["functions"])
    parameters = next(function.get("parameters") for function in functions
                      if function["name"] == name)
    return sample(parameters or {})


def echo(request):
    """The default backend: what was asked.  It obeys a forced tool, and a schema."""
    name = forced_tool(request)
    if name is not None:
        return ToolCall(name, sample_input(request, name))
    form = request.get("response_format") or {"type": "text"}
    if form["type"] == "json_object":
        return to_json({"text": request["text"]}).decode()
    if form["type"] == "json_schema":
        return to_json(sample(form["json_schema"].get("schema") or {})).decode()
    return request["text"]


def say(*pieces):
    """A backend that always says these pieces."""
    def backend(request):
        return list(pieces)
    backend.model = "say"
    return backend


ABSENT = type("Absent", (), {"__repr__": lambda self: "absent"})()


def brief(value):
    text = repr(value)
    return text if len(text) <= 300 else text[:290] + "..."


def first_difference(subset, whole, path=""):
    """(path, wanted, got) of the first field of `subset` that `whole` has not, or None.

    Objects are compared field by field, lists whole.
    """
    if type(subset) is dict and type(whole) is dict:
        found = (first_difference(subset[name], whole.get(name, ABSENT),
                                  f"{path}.{name}".strip(".")) for name in subset)
        return next(filter(None, found), None)
    return None if subset == whole else (path, subset, whole)


def unexpected(expect, body):
    """How a body differs from what a step expects, in words; None if it does not."""
    if callable(expect):
        return None if expect(body) else f"{expect!r} says no to {brief(body)}"
    difference = first_difference(expect or {}, body)
    if difference is None:
        return None
    path, wanted, got = difference
    return f"{path} is {brief(got)}, expected {brief(wanted)}"


def step_from_json(i, step):
    if type(step) is str:
        return step
    if type(step) is not dict:
        raise ValueError(f"step {i} of the script is neither a string nor an object")
    try:
        if "error" in step:
            return APIError(**step["error"])
        calls = [ToolCall(**call) for call in step.get("tool_calls", ())]
        return Reply(**{**step, "tool_calls": calls})
    except (TypeError, ValueError) as error:
        raise ValueError(f"step {i} of the script: {error}") from None


class Script:
    """A backend that takes one step per request, in order, and is strict about it.

    A step: a str, a ToolCall or a list of them, a Reply, an APIError to be raised, or a
    function of the request.  A request past the end, or unlike its step's `expect`,
    gets a 500 that says so, and fails `check`; so does a step left over.
    """

    model = "script"

    def __init__(self, *steps):
        self.steps = [
            Reply(tool_calls=step) if isinstance(step, (list, tuple)) else step
            for step in steps]
        self.taken, self.faults = 0, []
        self._lock, self._thread = threading.Lock(), threading.local()

    @classmethod
    def from_file(cls, path):
        """A JSON list of steps: a str, or an object with Reply's fields, or `error`."""
        with open(path, encoding="utf-8") as file:
            steps = json.load(file)
        if type(steps) is not list:
            raise ValueError(f"{path}: a script is a JSON list of steps")
        return cls(*(step_from_json(i, step) for i, step in enumerate(steps, 1)))

    def __call__(self, request):
        if request["index"] == 0:                   # all the choices say the same
            self._thread.step = self._take(request["body"])
        step = self._thread.step
        if isinstance(step, APIError):
            raise step
        return step(request) if callable(step) else step

    def _take(self, body):
        with self._lock:
            if self.taken == len(self.steps):
                self._fail(f"step {self.taken + 1} was asked for, but the script has "
                           f"{len(self.steps)}: {brief(body)}")
            step = self.steps[self.taken]
            fault = unexpected(getattr(step, "expect", None), body)
            if fault:
                self._fail(f"step {self.taken + 1} was not as expected: {fault}")
            self.taken += 1
            return step

    def _fail(self, fault):
        self.faults.append(fault)
        raise APIError(500, f"Script: {fault}", code="script_not_followed",
                       headers={"x-should-retry": "false"})

    def check(self):
        """Raise AssertionError unless every step was taken, and each as expected."""
        if self.faults:
            raise AssertionError("Script: " + "; ".join(self.faults))
        left = self.steps[self.taken:]
        if left:
            raise AssertionError(
                f"Script: {len(left)} of {len(self.steps)} steps left over, "
                f"from step {self.taken + 1} on: {brief(left[0])}")

    def close(self, error=None):
        """The end of the server: `check`; after an error, steps may be left over."""
        if self.faults or error is None:
            self.check()


def started_program(program, prompt, stdin, stderr):
    """The process; it leads a group of its own, so that its children end with it."""
    import subprocess           # only by those who run programs, here and below
    own_group = ({"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
                 if os.name == "nt" else {"start_new_session": True})
    try:
        arguments = [part.replace("{prompt}", prompt) for part in program]
        "".join(arguments).encode()     # a lone surrogate is no argument
        return subprocess.Popen(arguments, stdin=stdin, stdout=subprocess.PIPE,
                                stderr=stderr, **own_group)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.E2BIG:
            raise invalid("The prompt cannot be an argument of a program: it is too "
                          "long, or has a NUL or a lone surrogate.", None) from None
        raise backend_fault(f"{program[0]} cannot be run ({error.strerror})") from None


def end_program(process):
    """Stop a program that has not ended by itself, and its children."""
    import subprocess
    if process.stdout.closed and process.poll() is not None:
        return
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def selectable(pipe):
    """What can be waited for: the pipe; on Windows a socket, which a thread feeds."""
    if os.name != "nt":
        return pipe
    near, far = socket.socketpair()

    def copy():
        with far, suppress(OSError):
            for block in iter(lambda: os.read(pipe.fileno(), 65536), b""):
                far.sendall(block)
    threading.Thread(target=copy, daemon=True).start()
    return near


def decoded(pipe):
    """The text that comes through a pipe, no character split; closes it at its end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    source, block = selectable(pipe), None
    while block != b"":
        wait_for(source)
        block = os.read(pipe.fileno(), 65536) if source is pipe else source.recv(65536)
        text = decoder.decode(block, final=not block)
        if text:
            yield text
    source.close()
    pipe.close()


def run(program, request, places):
    """What a program writes, as it writes it."""
    import tempfile
    while not places.acquire(timeout=0.05):
        pause(0)
    with contextlib.ExitStack() as stack:
        stack.callback(places.release)
        # Files, not pipes: a program that reads nothing, or complains a lot, goes on.
        said, complaints = (stack.enter_context(tempfile.TemporaryFile())
                            for _ in range(2))
        said.write(to_json({key: request[key] for key in request if key != "body"}))
        said.seek(0)
        process = started_program(program, request["text"], said, complaints)
        stack.callback(end_program, process)
        yield from decoded(process.stdout)
        while process.poll() is None:   # it has closed its output, and goes on
            pause(0.01)
        if process.returncode:
            complaints.seek(0)
            text = complaints.read()[-2000:].decode("utf-8", "replace").strip()
            why = text.splitlines()[-1] if text else "it does not say why"
            raise backend_fault(
                f"{program[0]} ended with status {process.returncode}: {why}")


def command(program, at_once=1):
    """A backend, a program per choice: command(["llama-cli", "-p", "{prompt}"]).

    No shell.  {prompt} in an argument becomes request["text"]; standard input gets the
    request as one JSON document; what it writes to standard output is the reply.
    Of more than `at_once` programs the rest wait.  It ends when the client leaves.
    """
    if isinstance(program, str):
        import shlex
        program = shlex.split(program, posix=os.name != "nt")
    if at_once < 1 or not program:
        raise ValueError("--command wants a program, and --at-once at least 1")
    places = threading.BoundedSemaphore(at_once)

    def backend(request):
        pieces = run(program, request, places)
        prompts, n = request.get("prompts", [0]), request.get("best_of") or request["n"]
        choices = n * len(prompts)
        # Choices take turns, and a turn would wait for the place that another holds.
        return list(pieces) if choices > 1 else pieces
    backend.model = os.path.basename(program[0])
    return backend


# ----------------------------------------------------------------------------------
# Choices.  One stream of pieces per choice, cut to what the request allows.  From here
# on a piece is the list of its tokens: count it with len, read it with "".join.

def random_name(length):
    return "%0*x" % (length, random.getrandbits(4 * length))


class Refusal(list):
    """A piece in which the model refuses."""


class Call(list):
    """A piece that calls a tool: the tokens of its arguments, its name and id."""

    def __init__(self, call, tokenize):
        super().__init__(tokenize(call.arguments))
        self.name, self.id = call.name, call.id or "call_" + random_name(24)


class Finish(str):
    """The last thing of a choice: why it ended, a finish_reason."""


def pieces_in(text, tokenize, one_by_one):
    """A text in pieces of one token each, or in as few as can be."""
    pieces = filter(None, map(tokenize, slices(text))) if text else ()
    if one_by_one:
        return map(list, zip(itertools.chain.from_iterable(pieces)))
    return pieces


def yielded(reply, tokenize):
    """A backend's own pieces, as long as the client is there, and Finish."""
    at_hand, reason = isinstance(reply.pieces, (list, tuple)), "stop"
    for piece in itertools.chain(reply.pieces, reply.tool_calls):
        if not at_hand:
            pause(0)
        if isinstance(piece, ToolCall):
            reason = "tool_calls"
            yield Call(piece, tokenize)
        elif not isinstance(piece, str):
            raise backend_fault("a piece is a str or a ToolCall, "
                                f"not {type(piece).__name__}")
        elif piece:
            yield tokenize(piece)
    yield Finish(reply.finish_reason or reason)


def spoken(reply, tokenize, one_by_one=True):
    """The pieces of a reply, each as the list of its tokens, and Finish."""
    if reply.pieces is not None:
        return yielded(reply, tokenize)
    refusal = map(Refusal, pieces_in(reply.refusal, tokenize, one_by_one))
    text = pieces_in(reply.text, tokenize, one_by_one)
    calls = [Call(call, tokenize) for call in reply.tool_calls]
    reason = reply.finish_reason or ("tool_calls" if calls else "stop")
    return itertools.chain(refusal, text, calls, [Finish(reason)])


def paced(pieces, delay):
    """Each piece so many seconds after the last: a number, or (first, between)."""
    first, between = delay if type(delay) in (tuple, list) else (delay, delay)
    seconds = first
    for piece in pieces:
        if type(piece) is not Finish:
            pause(seconds)
        yield piece
        seconds = between


def is_legacy(request):
    """Only functions, as before there were tools?  Then a call is alone."""
    return bool(request.get("functions")) and not request["tools"]


def one_call(pieces):
    """Only the first call, for those who want no more."""
    called = False
    for piece in pieces:
        if not (called and isinstance(piece, Call)):
            yield piece
        called |= isinstance(piece, Call)


def up_to(pieces, limit):
    """At most `limit` tokens.  Arguments of a call count, but are never cut.

    Example: [["Hel", "lo"], Finish("stop")], 1 -> [["Hel"], Finish("length")]
    """
    left = limit
    for piece in pieces:
        if isinstance(piece, (Call, Finish)):
            left -= len(piece) if isinstance(piece, Call) else 0
        elif len(piece) > max(left, 0):
            if left > 0:
                yield type(piece)(piece[:left])
            yield Finish("length")
            return
        else:
            left -= len(piece)
        yield piece


def first_stop(text, stops):
    """Where the stop that is complete first begins; None without one."""
    found = [(text.find(stop) + len(stop), text.find(stop))
             for stop in stops if stop in text]
    return min(found)[1] if found else None


def longest_start(text, stops):
    """The length of the longest tail of `text` with which a stop could begin."""
    return max((length for stop in stops
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])), default=0)


def split_tokens(tokens, length, whole=False):
    """The tokens of the first `length` characters, and the rest.

    A token that lies across is cut in two, or with `whole` goes to the rest.
    """
    for i, token in enumerate(tokens):
        if len(token) > length:
            if whole or not length:
                return tokens[:i], tokens[i:]
            return tokens[:i] + [token[:length]], [token[length:]] + tokens[i + 1:]
        length -= len(token)
    return tokens, []


def until_stop(pieces, stops):
    """Text up to the first stop, which may span pieces; what may become one waits."""
    held = []                                   # tokens that are not yet passed on
    for piece in pieces:
        if type(piece) is not list:             # a stop is a matter of text alone
            if held:
                yield held
            held = []
            yield piece
            continue
        held += piece
        text = "".join(held)
        cut = first_stop(text, stops)
        if cut is not None:
            yield from filter(None, [split_tokens(held, cut)[0]])
            yield Finish("stop")
            return
        sure = len(text) - longest_start(text, stops)
        passed, held = split_tokens(held, sure, whole=True)
        if passed:
            yield passed


def choice(reply, request, tokenize, delay):
    """One choice: the pieces of a reply that the request has room for, and Finish."""
    one_by_one = request["stream"] or delay     # else nobody sees them come
    pieces = spoken(reply, tokenize, one_by_one)
    if delay:
        pieces = paced(pieces, delay)
    if request.get("parallel_tool_calls") is False or is_legacy(request):
        pieces = one_call(pieces)
    limits = request.get("max_tokens"), request.get("max_completion_tokens")
    if limits != (None, None):
        pieces = up_to(pieces, min(limit for limit in limits if limit is not None))
    if request["stop"]:
        pieces = until_stop(pieces, request["stop"])
    return pieces


USAGE_DETAILS = {
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0,
                                  "accepted_prediction_tokens": 0,
                                  "rejected_prediction_tokens": 0},
}


class Usage:
    """The bill of a reply: its prompts, each once, and the tokens of its choices.

    The prompts are counted when it is asked for: few streams want it.
    """

    def __init__(self, request, tokenize, corrections=()):
        self.prompts, self.tokenize = prompts_of(request), tokenize
        self.completion_tokens, self.corrections = 0, dict(corrections)

    def prompt_tokens(self):
        return sum(count_tokens(prompt, self.tokenize) for prompt in self.prompts)

    def counters(self):
        prompt = self.corrections.get("prompt_tokens")
        prompt = self.prompt_tokens() if prompt is None else prompt
        completion = self.corrections.get("completion_tokens", self.completion_tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion,
                "total_tokens": prompt + completion, **self.corrections}

    def details(self):
        """The counters of a chat reply, with the details that clients look into."""
        return {**self.counters(), **USAGE_DETAILS, **self.corrections}


# ----------------------------------------------------------------------------------
# Chunks.  One dict per piece, as it stands on the wire.  What a request without
# "stream" gets is `fold` of the very same chunks, so the two forms cannot disagree.

def wants_usage(request):
    options = request["stream_options"] or {}
    return not request["stream"] or bool(options.get("include_usage"))


SERVED_TIERS = {"auto": "default", "fast": "priority"}   # where not as asked


def envelope(request, object):
    """What all the chunks of a reply have in common; here alone the clock is asked."""
    whole = {"id": request["id"], "object": object, "created": int(time.time()),
             "model": request["model"], "system_fingerprint": "fp_openai_compat"}
    if request["endpoint"] == "chat":
        tier = request["service_tier"]
        whole["service_tier"] = SERVED_TIERS.get(tier, tier)
    if wants_usage(request):
        whole["usage"] = None           # the API says so in every chunk but the last
    return whole


def by_turns(choices):
    running = list(choices)
    while running:
        for items in list(running):
            item = next(items, None)
            if item is None:
                running.remove(items)
            else:
                yield item


def in_turn(choices):
    """The items of each choice in turn, one of each, until all have ended.

    A choice that is slow holds up its neighbours; the API runs them side by side.
    """
    return by_turns(choices) if len(choices) > 1 else choices[0]


# Log probabilities are made up: no model, so each candidate is half as likely as the
# one before, and the token that was taken is the first.
OTHER_TOKENS = [" the", ",", ".", " and", " of", " to", " a", " in", " is", " it",
                " that", " for", " was", " on", " with", " as", " be", " at", " by",
                " this", " we"]


def candidates(token, count):
    """(token, logprob) of the token itself and the next likely, `count` in all."""
    others = [other for other in OTHER_TOKENS if other != token]
    return [(each, round(-math.log(2) * place, 6))
            for place, each in enumerate([token, *others][:max(count, 1)], 1)]


def chat_logprob(token, top):
    entries = [{"token": each, "logprob": logprob,
                "bytes": list(each.encode("utf-8", "surrogatepass"))}
               for each, logprob in candidates(token, top)]
    return {**entries[0], "top_logprobs": entries if top else []}


def chat_logprobs(tokens, top, field="content"):
    """An object for each token, if wanted, under the field that they belong to."""
    if top is None:
        return None
    return {"content": [], "refusal": None,
            field: [chat_logprob(token, top) for token in tokens]}


def text_logprobs(tokens, top, offset, first=False):
    """Four parallel arrays, if wanted; a prompt's first token has no probability."""
    if top is None:
        return None
    likely = [dict(candidates(token, top)) for token in tokens]
    taken = [entry[token] for token, entry in zip(tokens, likely)]
    if first and tokens:
        taken[0] = likely[0] = None
    offsets = itertools.accumulate(map(len, tokens[:-1]), initial=offset)
    return {"tokens": tokens, "token_logprobs": taken, "top_logprobs": likely,
            "text_offset": list(offsets)[:len(tokens)]}


def opening(piece):
    if isinstance(piece, Refusal):
        return {"role": "assistant", "content": None, "refusal": ""}
    return {"role": "assistant", "content": None if isinstance(piece, Call) else "",
            "refusal": None}


def call_deltas(request, call, index):
    """A call opens with its id and name and no input; fragments of its input follow."""
    if is_legacy(request):
        yield {"function_call": {"name": call.name, "arguments": ""}}
        for token in call:
            yield {"function_call": {"arguments": token}}
        return
    kind = "custom" if call.name in custom_tools(request) else "function"
    field = CALL_INPUT[kind]
    yield {"tool_calls": [{"index": index, "id": call.id, "type": kind,
                           kind: {"name": call.name, field: ""}}]}
    for token in call or ["{}"] * (kind == "function"):     # "" is no JSON to clients
        yield {"tool_calls": [{"index": index, kind: {field: token}}]}


def chat_part(index, delta, logprobs=None, finish_reason=None):
    return {"index": index, "delta": delta, "logprobs": logprobs,
            "finish_reason": finish_reason}


def chat_parts(request, index, pieces, usage):
    """What each chunk says of one choice; first comes the role.

    The first piece is taken before the role goes out: what fails there gets a status.
    The price: while a slow model thinks, the client sees nothing, not even a head.
    """
    top = (request["top_logprobs"] or 0) if request["logprobs"] else None
    calls = 0
    for i, piece in enumerate(pieces):
        if i == 0:
            yield chat_part(index, opening(piece), chat_logprobs([], top))
        if type(piece) is Finish:
            legacy = piece == "tool_calls" and is_legacy(request)
            yield chat_part(index, {}, None, "function_call" if legacy else str(piece))
            return
        usage.completion_tokens += len(piece)
        if type(piece) is Call:
            for delta in call_deltas(request, piece, calls):
                yield chat_part(index, delta)
            calls += 1
            continue
        field = "refusal" if type(piece) is Refusal else "content"
        logprobs = chat_logprobs(piece, top, field)
        yield chat_part(index, {field: "".join(piece)}, logprobs)


def chat_chunks(request, choices, usage):
    """Choices -> chat.completion.chunk dicts, then one with the usage if wanted."""
    common = envelope(request, "chat.completion.chunk")
    for part in in_turn([chat_parts(request, index, pieces, usage)
                         for index, pieces in enumerate(choices)]):
        yield {**common, "choices": [part]}
    if wants_usage(request):
        yield {**common, "choices": [], "usage": usage.details()}


def text_part(index, text, logprobs, finish_reason=None):
    return {"text": text, "index": index, "logprobs": logprobs,
            "finish_reason": finish_reason}


def text_parts(request, index, prompt, pieces, usage):
    """What each chunk says of one choice; `prompt`: its tokens."""
    offset, top = len("".join(prompt)), request["logprobs"]
    for i, piece in enumerate(pieces):
        if i == 0 and request["echo"]:
            yield text_part(index, "".join(prompt),
                            text_logprobs(prompt, top, 0, first=True))
        if isinstance(piece, Finish):
            yield text_part(index, "", text_logprobs([], top, offset), str(piece))
            return
        if type(piece) is not list:
            raise backend_fault("a tool call or a refusal has no place in a text "
                                "completion: this backend is for chat")
        usage.completion_tokens += len(piece)
        text = "".join(piece)
        yield text_part(index, text, text_logprobs(piece, top, offset))
        offset += len(text)


def completion_chunks(request, choices, usage):
    """Choices -> text_completion dicts.  Of best_of choices per prompt, n are shown."""
    common = envelope(request, "text_completion")
    best_of, n = request["best_of"], request["n"]
    parts = []
    for i, pieces in enumerate(choices):
        prompt, rank = divmod(i, best_of)
        index = prompt * n + rank if rank < n else None
        parts.append(text_parts(request, index, request["prompts"][prompt], pieces,
                                usage))
    for part in in_turn(parts):
        if part["index"] is not None:
            yield {**common, "choices": [part]}
    if wants_usage(request):
        yield {**common, "choices": [], "usage": usage.counters()}


def joined(texts):
    """The texts as one; None if none of them is a text."""
    texts = [text for text in texts if text is not None]
    return "".join(texts) if texts else None


def joined_logprobs(parts):
    """The arrays of each field, one after another; None without any."""
    if not parts:
        return None
    whole = {field: [entry for part in parts for entry in part[field] or ()]
             for field in parts[0]}
    if whole.get("refusal") == []:      # of a text completion there is none
        whole["refusal"] = None
    return whole


def joined_call(first, *fragments):
    kind, field = first["type"], CALL_INPUT[first["type"]]
    text = joined(fragment[kind][field] for fragment in fragments)
    return {"id": first["id"], "type": kind, kind: {**first[kind], field: text or ""}}


def joined_calls(deltas):
    """An opening per call and fragments after it -> the calls, without their index."""
    calls = collections.defaultdict(list)
    for delta in deltas:
        calls[delta["index"]].append(delta)
    return [joined_call(*calls[index]) for index in sorted(calls)]


def fold_choice(index, said):
    ends = {"logprobs": joined_logprobs(said["logprobs"]), "finish_reason": said["end"]}
    if "text" in said:
        return {"index": index, "text": joined(said["text"]), **ends}
    message = {"role": "assistant", "content": joined(said.get("content", ())),
               "refusal": joined(said.get("refusal", ()))}
    if "tool_calls" in said:
        message["tool_calls"] = joined_calls(delta for deltas in said["tool_calls"]
                                             for delta in deltas)
    if "function_call" in said:
        first, *rest = said["function_call"]
        message["function_call"] = {
            **first, "arguments": joined(delta["arguments"] for delta in rest)}
    return {"index": index, "message": message, **ends}


def fold(chunks):
    """The chunks of one stream -> the completion that they spell."""
    choices = {}                        # index: {field: all that was said of it}
    for chunk in chunks:
        for part in chunk["choices"]:
            said = choices.setdefault(part["index"], {"logprobs": []})
            delta = part["delta"] if "delta" in part else {"text": part["text"]}
            for field, value in delta.items():
                if field not in said:
                    said[field] = []
                said[field].append(value)
            if part["logprobs"] is not None:
                said["logprobs"].append(part["logprobs"])
            said["end"] = part["finish_reason"]
    usage = chunk.pop("usage")
    return {**chunk, "object": chunk["object"].replace(".chunk", ""),
            "choices": [fold_choice(*each) for each in sorted(choices.items())],
            "usage": usage}


# ----------------------------------------------------------------------------------
# Events.  An answer is what goes onto the wire: status, headers, and the writes of its
# body.  A streamed reply's writes are server-sent events (WHATWG HTML, section 9.2).

class Answer:
    """What goes onto the wire in reply to one request.

    status: an int.  headers: {lower-case name: str}.  body: bytes, or an iterable of
    writes, bytes each, that go out at once, one send each.  at_hand: no write has to be
    waited for, so several may share a send.
    """

    def __init__(self, status, headers, body=b"", at_hand=False):
        self.status, self.headers, self.body = status, headers, body
        self.at_hand = at_hand or isinstance(body, bytes)


JSON = {"content-type": "application/json"}
EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache, no-transform",
                "x-accel-buffering": "no"}      # else nginx waits for a full buffer
DONE = b"data: [DONE]\n\n"


def json_answer(value, headers=(), status=200):
    return Answer(status, {**JSON, **dict(headers)}, to_json(value))


def error_answer(error):
    return json_answer(error.body(), error.headers, error.status)


def event(value):
    """One event: a line of JSON, which has no line end inside, and a blank line."""
    return b"data: %s\n\n" % to_json(value)


def events(chunks):
    """Chunks -> the bytes of their events, then [DONE], the one proof of an end.

    The chunks of a reply differ in their last field: the others are encoded once.
    """
    common, start = None, b""
    for chunk in chunks:
        field, value = chunk.popitem()
        if chunk != common:
            common, start = chunk, to_json(chunk)[:-1] + b"," * bool(chunk)
        yield b"data: %b%b\n\n" % (start, to_json({field: value})[1:])
    yield DONE


# ----------------------------------------------------------------------------------
# Quirks.  Faults on purpose, for the tests of somebody's client.  One that is about
# what is said wraps the chunks; one that is about the wire wraps the writes, where one
# yield is one send.  `k` is how many events come first where a place matters.

class Cut(BaseException):
    """Ends a reply on the wire: Cut("fin" | "reset" | "stall").  No error either."""


class Instead(BaseException):
    """Another answer in the place of this one: Instead(answer)."""


def each_part(doc, change):
    """A quirk that changes the parts of all chunks, one for each choice, in place."""
    def quirk(chunks, k):
        for chunk in chunks:
            for part in chunk["choices"]:
                change(part)
            yield chunk
    quirk.__doc__ = doc
    return quirk


def each_write(doc, change):
    """A quirk that changes every write: change(its number from 0, the write, k)."""
    def quirk(writes, k):
        for i, write in enumerate(writes):
            yield change(i, write, k)
    quirk.__doc__ = doc
    return quirk


def after(doc, end=None):
    """A quirk that lets k writes pass and then raises `end()`, or just ends."""
    def quirk(writes, k):
        yield from itertools.islice(writes, k)
        if end:
            raise end()
    quirk.__doc__ = doc
    return quirk


def calls_in(part):
    return part.get("delta", {}).get("tool_calls", ())


def usage_always(chunks, k):
    """A usage on every chunk and in a chunk of its own, though nobody asked."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        yield {**chunk, "usage": usage}
    if chunk["choices"]:
        yield {**chunk, "choices": [], "usage": usage}


def duplicate_tool_id(chunks, k):
    """Each fragment of a tool call repeats the call's id and name."""
    opened = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            for call in calls_in(part):
                kind = "custom" if "custom" in call else "function"
                first = opened.setdefault((part["index"], call["index"]), call)
                call.update(id=first["id"], type=kind)
                call[kind]["name"] = first[kind]["name"]
        yield chunk


CHUNK_QUIRKS = {
    "no_role": each_part(
        "The first delta of a choice does not say who speaks.",
        lambda part: part.get("delta", {}).pop("role", None)),
    "role_every": each_part(
        "Every delta says who speaks.",
        lambda part: "delta" in part and part.update(
            delta={"role": "assistant", **part["delta"]})),
    "usage_always": usage_always,
    "no_finish": each_part(
        "Neither a finish_reason nor, see below, [DONE]: the stream just ends.",
        lambda part: part.update(finish_reason=None)),
    "missing_tool_index": each_part(
        "Fragments of tool calls do not say to which call they belong.",
        lambda part: [call.pop("index") for call in calls_in(part)]),
    "duplicate_tool_id": duplicate_tool_id,
}


def split_bytes(writes, k):
    """One byte a send."""
    for write in writes:
        for i in range(len(write)):
            yield write[i:i + 1]


def one_write(writes, k):
    """All in one send."""
    yield b"".join(writes)


def no_done(writes, k):
    """All but [DONE]."""
    yield from (write for write in writes if write != DONE)


def no_terminator(writes, k):
    """Closed without the last transfer chunk."""
    yield from writes
    raise Cut("fin")


def html_502(writes, k):
    """Not the reply, but an HTML page with status 502, as a proxy would send."""
    raise Instead(Answer(502, {"content-type": "text/html"},
                         b"<html><body><h1>502 Bad Gateway</h1></body></html>\n"))
    yield


WRITE_QUIRKS = {
    "comment": each_write("A comment block before each event.",
                          lambda i, write, k: b": comment\n\n" + write),
    "crlf": each_write("Lines that end with CR LF.",
                       lambda i, write, k: write.replace(b"\n", b"\r\n")),
    "no_space": each_write("No space after the colon.",
                           lambda i, write, k: write.replace(b"data: ", b"data:", 1)),
    "bom": each_write("A byte order mark at the start.",
                      lambda i, write, k: write if i else codecs.BOM_UTF8 + write),
    "id_field": each_write(
        "An id in each event, and comment blocks, on which old SDKs dispatch nothing.",
        lambda i, write, k: b"id: %d\n%s: comment\n\n" % (i, write)),
    "retry_block": each_write("Blocks with a retry field and no data.",
                              lambda i, write, k: b"retry: 1000\n\n" + write),
    "empty_data": each_write("Events whose data is empty.",
                             lambda i, write, k: b"data:\n\n" + write),
    "split_bytes": split_bytes,
    "one_write": one_write,
    "no_done": no_done,
    "no_terminator": no_terminator,
    "bad_json": each_write(
        "One event cut short in its JSON.",
        lambda i, write, k: write[:len(write) // 2] + b"\n\n" if i == k else write),
    "error_event": after("An error in the place of the rest.", server_error),
    "truncate": after("Closed cleanly, as if complete."),
    "stall": after("Silence until the client leaves.", lambda: Cut("stall")),
    "reset": after("A TCP reset.", lambda: Cut("reset")),
    "html_502": html_502,
    "no_finish": no_done,               # its other half
}
QUIRKS = {**WRITE_QUIRKS, **CHUNK_QUIRKS}
# What is not about events happens to a whole reply too, before its first byte.
WHOLE_QUIRKS = ("split_bytes", "stall", "reset", "html_502")


def parse_quirk(text):
    """"stall@3" -> ("stall", 3), two events where no number is given; None -> none."""
    if text is None:
        return None, 0
    name, at, place = str(text).partition("@")
    if name not in QUIRKS or at and not (place.isascii() and place.isdigit()):
        raise ValueError(f"no quirk {text!r}; there are: {', '.join(QUIRKS)}")
    return name, int(place) if at else 2


# ----------------------------------------------------------------------------------
# Relay and replay.  Backends that give whole answers: they have `answer` in the place
# of pieces.  A relay passes on what another server says, as it says it, and can keep a
# tape of it, one exchange a line; a replay answers from such a tape.

PASSED_ON = re.compile("authorization|accept|user-agent|idempotency-key"
                       "|openai-.*|x-stainless-.*")
RETURNED = re.compile("content-type|x-request-id|retry-after(-ms)?|x-should-retry"
                      "|x-ratelimit-.*|openai-.*")


def write_some(file, block):
    """How much of it could be written."""
    try:
        return file.write(block)
    except OSError:
        return 0


class Watched(io.RawIOBase):
    """A socket for http.client to read from; a read ends when our client leaves."""

    def __init__(self, sock):
        self.sock, self.ended = sock, False
        sock.setblocking(False)

    def makefile(self, mode):
        return io.BufferedReader(self)

    def readable(self):
        return True

    def close(self):
        """http.client closes before it has read; the exchange does it when it ends."""

    def readinto(self, buffer):
        while True:
            try:
                count = self.sock.recv_into(buffer)
                self.ended = count == 0
                return count
            except (BlockingIOError, ssl.SSLWantReadError):
                wait_for(self.sock)


def blocks(response):
    """The body of a response as it arrives; an upstream that was cut cuts us too."""
    while True:
        pause(0)
        try:
            block = response.read1(65536)
        except (OSError, http.client.HTTPException):
            raise Cut("fin") from None
        if not block:
            break
        yield block
    if response.length:                 # that many bytes were promised, and not sent
        raise Cut("fin")


def asked_for(exchange):
    """What tells one request from another on a tape."""
    return {"method": exchange.method, "path": exchange.route, "body": exchange.body}


def as_text(write):
    """Bytes for a tape: a str where they are UTF-8, else {"base64": ...}."""
    try:
        return write.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(write).decode()}


def as_bytes(text):
    return text.encode() if isinstance(text, str) else base64.b64decode(text["base64"])


class Relay:
    """Passes requests on to another such server: Relay("http://gpu:8000/v1").

    api_key: for that server; without one the client's own is passed on, unless it was
    meant for us.  record: the path of a tape, to which complete exchanges are appended.
    """

    model = "relay"

    def __init__(self, base_url, api_key=None, record=None):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is not the URL of a server")
        self.base_url, self.api_key, self.tape = base_url.rstrip("/"), api_key, record
        self._upstream, self._lock = urlsplit(self.base_url), threading.Lock()
        if record:
            open(record, "ab").close()          # if it cannot be written, say so now

    def unreachable(self, error):
        return APIError(502, f"The upstream at {self.base_url} cannot be reached: "
                             f"{error}.", code="upstream_unreachable")

    def connect(self):
        kind = (http.client.HTTPSConnection if self._upstream.scheme == "https"
                else http.client.HTTPConnection)
        connection = kind(self._upstream.hostname, self._upstream.port, timeout=10)
        try:
            connection.connect()
        except OSError as error:
            raise self.unreachable(error) from None
        return connection

    def headers(self, exchange):
        given = {**exchange.headers, **exchange.secrets}
        passed = {name: given[name] for name in given if PASSED_ON.fullmatch(name)}
        if exchange.keyed:      # with a key of ours, which is nobody else's business
            passed.pop("authorization", None)
        if self.api_key:
            passed["authorization"] = f"Bearer {self.api_key}"
        return {**passed, **JSON, "accept-encoding": "identity"}

    def append(self, recording):
        """A whole line or nothing: a disk that is full leaves no half of one."""
        line = to_json(recording) + b"\n"
        try:
            with self._lock, open(self.tape, "ab", buffering=0) as tape:
                size = tape.seek(0, os.SEEK_END)
                if write_some(tape, line) < len(line):
                    tape.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            log.error("An exchange was not recorded on %s: %s", self.tape, error)

    def recorded(self, writes, exchange, status, headers):
        """The same writes; when all have passed, the exchange goes onto the tape."""
        kept, last = [], time.monotonic()
        for write in writes:
            now = time.monotonic()
            kept.append([round(now - last, 4), as_text(write)])
            yield write
            last = time.monotonic()
        self.append({"request": asked_for(exchange), "status": status,
                     "headers": headers, "writes": kept})

    def answer(self, exchange):
        connection = self.connect()
        exchange.sources.append(connection.sock)    # closed when the exchange ends
        try:
            connection.request(exchange.method, self._upstream.path + exchange.route,
                               exchange.content or None, self.headers(exchange))
            connection.sock = watched = Watched(connection.sock)
            response = connection.getresponse()
            if watched.ended:           # http.client takes half a head for a whole one
                raise OSError("it was cut off")
        except (OSError, http.client.HTTPException) as error:
            raise self.unreachable(error) from None
        headers = {name.lower(): value for name, value in response.getheaders()
                   if RETURNED.fullmatch(name.lower())}
        if headers.get("content-type", "").startswith("text/event-stream"):
            headers = {**EVENT_STREAM, **headers}
        writes = map(exchange.counted, blocks(response))
        if self.tape:
            writes = self.recorded(writes, exchange, response.status, headers)
        return Answer(response.status, headers, writes)


def likeness(a, b):
    """How many fields two requests have in common."""
    fields, others = a["body"], b["body"]
    if a["path"] != b["path"] or not type(fields) is type(others) is dict:
        return 0
    return 1 + sum(others.get(name, ABSENT) == fields[name] for name in fields)


class Replay:
    """Answers from a tape that a Relay recorded: same path and body, same bytes.

    A request that was recorded several times gets its recordings in order; the last one
    stays.  speed: 0 for no pauses, 1 for those of the recording, 2 for half of them.
    """

    model = "replay"

    def __init__(self, tape, speed=0):
        self.speed, self._lock = speed, threading.Lock()
        self.recordings = collections.defaultdict(collections.deque)
        with open(tape, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    recording = json.loads(line)
                    key = self.key(**recording["request"])
                    recording["headers"] = header_fields({**recording["headers"]})
                    recording["status"] + sum(wait for wait, _ in recording["writes"])
                    self.recordings[key].append((number, recording))
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"line {number} of {tape} is no whole recording") from None

    @staticmethod
    def key(method, path, body):
        return method, path, json.dumps(body, sort_keys=True)

    def unknown(self, wanted):
        """A 404 that tells how the nearest recording differs."""
        rows = [(number, recording["request"]) for queue in self.recordings.values()
                for number, recording in queue]
        if not rows:
            return APIError(404, "The tape is empty.", code="not_recorded")
        number, nearest = max(rows, key=lambda row: likeness(row[1], wanted))
        path, recorded, got = first_difference(nearest, wanted) or first_difference(
            wanted, nearest) or ("", nearest, wanted)
        return APIError(404, "No recording of this request; the nearest is line "
                        f"{number} of the tape, where {path} is {brief(recorded)}, not "
                        f"{brief(got)}.", code="not_recorded")

    def played(self, writes):
        for seconds, text in writes:
            pause(seconds / self.speed if self.speed else 0)
            yield as_bytes(text)

    def answer(self, exchange):
        with self._lock:
            wanted = asked_for(exchange)
            queue = self.recordings.get(self.key(**wanted))
            if not queue:
                raise self.unknown(wanted)
            _, recording = queue.popleft() if len(queue) > 1 else queue[0]
        writes = map(exchange.counted, self.played(recording["writes"]))
        return Answer(recording["status"], recording["headers"], writes)


# ----------------------------------------------------------------------------------
# HTTP.  The server, the threads and the handler class are the standard library's; the
# reading of a request is ours, for its parser hides what RFC 9112 has us refuse (folded
# lines, bare line ends, two lengths) and knows no time limit for a request as a whole.

FIELD_NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/(\d)\.(\d)" % FIELD_NAME)
FIELD_LINE = re.compile(rb"(%s):([\t\x20-\x7e\x80-\xff]*)" % FIELD_NAME)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
HOST = re.compile(r"(?:[\w.~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::\d*)?", re.ASCII)
ABSOLUTE = re.compile(r"https?://([^/?#]+)/?(.*)", re.IGNORECASE)
MALFORMED = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")
MOST_HEAD, MOST_TARGET = 65536, 8192    # bytes: of a request line with its headers
MOST_HEADERS = 100
ONCE = {"host", "content-length", "transfer-encoding", "content-type", "authorization"}


def bad_request(message, status=400):
    return APIError(status, message)


def parse_fields(lines):
    """Header or trailer lines -> {lower-case name: value}."""
    if len(lines) > MOST_HEADERS:
        raise bad_request(f"More than {MOST_HEADERS} headers.", 431)
    fields = {}
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise bad_request("A header line is malformed.")
        name = match[1].decode().lower()
        value = match[2].strip(b" \t").decode("latin-1")
        if name in fields:
            if name in ONCE:
                raise bad_request(f"More than one {name} header.")
            value = f"{fields[name]}, {value}"
        fields[name] = value
    return fields


def addressed(method, target, version, fields):
    """The same, with a target in one of its other forms put right (RFC 9112, 3.2)."""
    if not HOST.fullmatch(fields.get("host", "" if version < (1, 1) else " ")):
        raise bad_request("An HTTP/1.1 request has to have one valid Host header.")
    absolute = ABSOLUTE.fullmatch(target)       # the form that is meant for proxies
    if absolute and HOST.fullmatch(absolute[1]):
        fields["host"], target = absolute[1], "/" + absolute[2]
    if not (target.startswith("/") or target == "*" and method == "OPTIONS"):
        raise bad_request("The target of the request is malformed.")
    return method, target, version, fields


@functools.lru_cache(maxsize=32)        # a client's heads are the same to the letter
def parse_head(head):
    """The lines of a request before its blank line, understood (RFC 9112, 2 to 5).

    Example: b"GET /v1 HTTP/1.1\r\nHost: x" -> ("GET", "/v1", (1, 1), {"host": "x"})
    """
    first, *lines = head.split(b"\r\n")
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise bad_request("The request line is malformed.")
    method, target, *version = match.groups()
    if len(target) > MOST_TARGET:
        raise bad_request("The target of the request is too long.", 414)
    if version[0] != b"1":
        raise bad_request("Only HTTP/1.0 and HTTP/1.1 are spoken here.", 505)
    version = 1, int(version[1])
    return addressed(method.decode(), target.decode(), version, parse_fields(lines))


def too_large(most):
    return APIError(413, f"The body is larger than {most} bytes.",
                    code="request_too_large")


def content_length(exchange, most):
    """Of the body: bytes, or None for transfer chunks (RFC 9112, section 6)."""
    coding = exchange.headers.get("transfer-encoding")
    length = exchange.headers.get("content-length", "0")
    if coding is not None:
        if "content-length" in exchange.headers or exchange.version < (1, 1):
            raise bad_request(
                "Transfer-Encoding beside Content-Length, or in HTTP/1.0.")
        if coding.lower() != "chunked":
            raise bad_request("The only Transfer-Encoding understood is chunked.", 501)
        return None
    if not (length.isascii() and length.isdigit()):
        raise bad_request("Content-Length is not a number.")
    if len(length) > 18 or int(length) > most:
        raise too_large(most)
    return int(length)


@functools.lru_cache(maxsize=256)
def normal_path(target):
    """(path, model) that a target means: single slashes, no /v1, no query, no engine.

    Example: "//v1/engines/gpt/completions/?x=1" -> ("/completions", "gpt")
    """
    parts = [part for part in target.partition("?")[0].split("/") if part]
    for _ in range(2):
        parts = parts[1:] if parts[:1] == ["v1"] else parts
    path = unquote("/" + "/".join(parts))
    engine = re.fullmatch("/engines/(.+?)((?:/chat)?/completions)", path)
    if engine:
        return engine[2], engine[1]
    if path == "/sse":
        return "/chat/completions", None
    return path, path[len("/models/"):] if path.startswith("/models/") else None


def printable(text):
    """Without control characters: a log line is one line, whatever a client sends."""
    return "".join(each if each.isprintable() else repr(each)[1:-1]
                   for each in str(text))


SECRET = {"authorization", "api-key", "proxy-authorization", "cookie"}


class Exchange:
    """One request and what became of it: an entry of the journal.

    method, path: as sent.  headers: lower-case names, keys masked.  body: dict or None.
    status, events: what went out, how many.  outcome: "complete", "client left",
    "error", "quirk", or None while it runs.  started: seconds since 1970.  seconds: how
    long it took.
    """

    JOURNAL = "method path headers body status events outcome started seconds".split()
    body = status = outcome = seconds = None
    events = 0
    # For the server's own use, beside `version`, `route` and `model`:
    content = b""               # the body as it came
    quirk = None                # the name of the one that was chosen
    failed = False              # after the status was sent
    keyed = False               # came with one of the server's keys

    def __init__(self, method="", path="/", version=(1, 1), headers=()):
        self.method, self.path, self.version = method, path, version
        self.headers, self.secrets = dict(headers), {}  # secrets are kept until it ends
        for name in SECRET.intersection(self.headers):
            self.secrets[name], self.headers[name] = self.headers[name], "***"
        self.route, self.model = normal_path(path)
        self.sources = []       # what its reply is made from: generators, sockets
        self.started, self._clock = time.time(), time.perf_counter()

    def has_content(self):
        return ("transfer-encoding" in self.headers
                or self.headers.get("content-length", "0") != "0")

    def keeps_alive(self):
        wish = self.headers.get("connection", "").lower()
        return "close" not in wish and (self.version >= (1, 1) or "keep-alive" in wish)

    def counted(self, write):
        """The write; its events are counted."""
        self.events += write.count(b"\n\n")
        return write

    def elapsed(self):
        return time.perf_counter() - self._clock

    def end(self, outcome=None):
        failed = self.failed or (self.status or 0) >= 400
        usual = "quirk" if self.quirk else "error" if failed else "complete"
        self.outcome = outcome or usual
        self.seconds = self.elapsed()

    def close_sources(self):
        """Nobody reads on: what a reply was made from is closed, where it can be."""
        self.secrets = {}
        while self.sources:
            try:
                getattr(self.sources.pop(), "close", int)()
            except Exception:
                log.exception("The backend failed in its end, in %r", self)

    def as_dict(self):
        return {name: getattr(self, name) for name in self.JOURNAL}

    def __repr__(self):
        return f"<{self.method} {printable(self.path)} {self.status} {self.outcome}>"


@functools.lru_cache(maxsize=4)
def http_date(second):
    return formatdate(second, usegmt=True)


SECRET_LINE = re.compile(rf"(?i)^((?:{'|'.join(SECRET)}):\s*(?:bearer )?).*")


def trace_lines(block):
    """The lines of what crosses the wire; the two units of a stream are marked."""
    for line in block.split(b"\r\n"):
        if CHUNK_LINE.fullmatch(line):
            yield f"[transfer chunk: {int(line.partition(b';')[0], 16)} bytes]"
            continue
        *parts, rest = line.split(b"\n\n")
        for part in parts:
            yield f"[event] {printable(part.decode('utf-8', 'replace'))}"
        if rest:
            yield SECRET_LINE.sub(r"\1***", printable(rest.decode("utf-8", "replace")))


def first_taken(answer):
    """The same answer, its first write taken: a failure up to there gets a status."""
    if not isinstance(answer.body, bytes):
        writes = iter(answer.body)
        answer.body = itertools.chain([next(writes, b"")], writes)
    return answer


def as_transfer_chunk(write):
    return b"%x\r\n%b\r\n" % (len(write), write)


REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
AT_ONCE = 256                   # writes at hand that may share a send


class Handler(BaseHTTPRequestHandler):
    """One connection in its thread: reads requests and sends an answer to each.

    A thread each is plain, and enough for some hundreds of clients; a server for
    thousands has one loop for them all.
    """

    # ------ the connection

    def setup(self):
        self.connection, self.buffer = self.request, bytearray()    # what came early
        self.open, self.unread = True, False    # may a request follow; does a body?
        self.exchange, self.pending = Exchange(), []    # pending: what is to be sent
        self.limited = 0                                # see `limit`
        self.limit(self.server.request_timeout)
        if self.server.tls:     # here: a silent client holds up its own thread only
            self.connection = self.server.tls.wrap_socket(
                self.request, server_side=True, do_handshake_on_connect=False)
            self.server.connections[threading.current_thread()] = self.connection
            self.connection.do_handshake()
        # Without this the body of a small reply waits 44 ms for the client's ACK.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.number = next(self.server.numbers)
        watch(self.connection, self.ending)

    def ending(self):
        """What ends a wait: the client is gone, or the server is about to be."""
        if self.server.hanging_up:
            return APIError(503, "The server is shutting down.",
                            headers={"retry-after": "1"})
        return ClientLeft()

    def handle(self):
        with suppress(ClientLeft):
            if len(self.server.connections) > self.server.max_connections:
                self.open, self.unread = False, True
                self.send(error_answer(APIError(
                    503, "The engine is currently overloaded, please try again later",
                    headers={"retry-after": "1"})))
            while self.open and not self.server.closing:
                self.await_request()
                self.serve_one()

    def finish(self):
        """Close so that the client can read what was sent (RFC 9112, section 9.6)."""
        with closing(self.connection), suppress(OSError, ClientLeft, APIError):
            socket.socket.shutdown(self.connection, socket.SHUT_WR)
            self.deadline = time.monotonic() + 1
            while self.unread:      # closed with bytes unread, it would be reset
                self.buffer.clear()
                self.receive()

    def limit(self, seconds):
        """Let recv and send give up after about so many seconds."""
        if abs(self.limited - seconds) <= 0.05 * seconds:
            return
        self.limited = seconds
        if os.name == "nt" or self.server.tls:
            return self.connection.settimeout(seconds)
        # The kernel's own limit spares two polls an exchange, and with them handing the
        # interpreter to another thread: a sixth of the time with many connections.
        self.connection.settimeout(None)
        span = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.connection.setsockopt(socket.SOL_SOCKET, option, span)

    # ------ reading

    def next_to_come(self):
        """What a client that is alone here sends within an instant, else b"".

        To be woken takes longer than to reply: who asks again at once is met awake.
        """
        if len(self.server.connections) > 1 or self.server.tls:
            return b""
        end = time.perf_counter() + self.server.awake
        while time.perf_counter() < end:
            try:
                return self.connection.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()
        return b""

    def receive(self):
        """More bytes into the buffer, before the deadline of the request."""
        left = self.deadline - time.monotonic()
        try:
            if left <= 0:       # asked first: a fast sender never has to be waited for
                raise socket.timeout
            self.limit(left)
            block = self.next_to_come() or self.connection.recv(65536)
        except (socket.timeout, BlockingIOError):
            raise bad_request("The request took too long to arrive.", 408) from None
        except OSError:
            raise ClientLeft from None
        if not block:
            raise ClientLeft
        self.buffer += block

    def await_request(self):
        """A connection may be idle between requests, but not for ever."""
        self.deadline = time.monotonic() + self.server.request_timeout
        self.server.idle.add(self.connection)
        try:
            while self.buffer in (b"", b"\r") or self.buffer[:2] == b"\r\n":
                if self.buffer[:2] == b"\r\n":      # an empty line too many is skipped
                    del self.buffer[:2]
                else:
                    self.receive()
        except APIError:                            # too late, but nothing was asked
            raise ClientLeft from None
        finally:
            self.server.idle.discard(self.connection)

    def take(self, length):
        while len(self.buffer) < length:
            self.receive()
        taken = bytes(self.buffer[:length])
        del self.buffer[:length]
        if self.server.trace:
            self.trace(">", taken)
        return taken

    def take_until(self, mark, too_long, no_line=None):
        """What stands before the mark, without it.

        too_long: the status if it is too far away; no_line: if even a line end is.
        """
        seen, end = 0, self.buffer.find(mark)
        while end < 0 and len(self.buffer) <= MOST_HEAD:
            if MALFORMED.search(self.buffer, seen):
                raise bad_request("A line of the request is malformed.")
            seen = max(len(self.buffer) - len(mark), 0)
            self.receive()
            end = self.buffer.find(mark, seen)
        if not 0 <= end <= MOST_HEAD:
            one_line = b"\r\n" not in self.buffer[:MOST_HEAD]
            raise bad_request("A part of the request is too long.",
                              no_line if no_line and one_line else too_long)
        return self.take(end + len(mark))[:end]

    def take_transfer_chunks(self):
        """The body from its transfer chunks (RFC 9112, 7.1); trailers are dropped."""
        content, size = bytearray(), None
        while size != 0:
            match = CHUNK_LINE.fullmatch(self.take_until(b"\r\n", 400))
            if not match:
                raise bad_request("The size of a transfer chunk is malformed.")
            size = int(match[1], 16)
            if len(content) + size > self.server.max_body:
                raise too_large(self.server.max_body)
            content += self.take(size)
            if size and self.take(2) != b"\r\n":
                raise bad_request("A transfer chunk is longer than its size says.")
        lines = iter(functools.partial(self.take_until, b"\r\n", 431), b"")
        parse_fields(list(itertools.islice(lines, MOST_HEADERS + 1)))
        return bytes(content)

    def read_content(self, exchange):
        length = content_length(exchange, self.server.max_body)
        expect = exchange.headers.get("expect", "").lower()
        if expect not in ("", "100-continue"):
            raise bad_request("The only expectation understood is 100-continue.", 417)
        if exchange.headers.get("content-encoding", "identity").lower() != "identity":
            raise bad_request("The body has a Content-Encoding; send it as it is.")
        if expect and exchange.version >= (1, 1) and not self.buffer:
            self.pending.append(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.flush()
        content = self.take_transfer_chunks() if length is None else self.take(length)
        self.unread = False
        return content

    def read_request(self):
        """The next request, admitted and with its body, as self.exchange."""
        self.deadline = time.monotonic() + self.server.request_timeout
        self.open, self.unread = False, True            # until we know better
        try:
            head = parse_head(self.take_until(b"\r\n\r\n", 431, 414))
        except BaseException:
            self.exchange = Exchange()                  # one that asked nothing clear
            raise
        self.exchange = exchange = Exchange(*head)
        self.open, self.unread = exchange.keeps_alive(), exchange.has_content()
        try:
            self.server.admit(exchange)
            if self.unread:
                exchange.content = self.read_content(exchange)
        finally:
            self.server.entries.append(exchange)
        return exchange

    # ------ sending

    def flush(self):
        """Send what is pending in one piece, as long as the client keeps reading."""
        block, self.pending = b"".join(self.pending), []
        if self.server.trace:
            self.trace("<", block)
        try:
            sent = self.connection.send(block) if block else 0
            while sent < len(block):
                sent += self.connection.send(memoryview(block)[sent:])
        except OSError:
            raise ClientLeft from None

    def head(self, answer, whole, chunked):
        """Status line and headers, and the blank line."""
        fields = {"date": http_date(int(time.time())),
                  "x-request-id": "req_" + random_name(32),
                  "openai-version": "2020-10-01",
                  "openai-processing-ms": int(self.exchange.elapsed() * 1000),
                  **self.server.cors_headers(self.exchange), **answer.headers}
        if chunked:
            fields["transfer-encoding"] = "chunked"
        elif whole and answer.status != 204:
            fields["content-length"] = len(answer.body)
        if not self.open or self.exchange.version < (1, 1):
            fields["connection"] = "keep-alive" if self.open else "close"
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
        return b"HTTP/1.1 %d %b\r\n%b\r\n" % (
            answer.status, REASONS.get(answer.status, b""),
            lines.encode("latin-1", "replace"))

    def refusal(self, error):
        """What the client is told of an error; what nobody meant to raise is logged."""
        if isinstance(error, APIError):
            return error
        log.exception("The backend failed in %r", self.exchange)
        return server_error()

    def send(self, answer):
        """Put an answer on the wire; the journal knows its end before the last byte."""
        exchange, body = self.exchange, answer.body
        exchange.status = answer.status
        whole = isinstance(body, bytes)
        chunked = not whole and exchange.version >= (1, 1)
        self.open &= not self.unread and (whole or chunked)
        self.limit(self.server.request_timeout)         # of a reader that stops reading
        self.pending = [self.head(answer, whole, chunked)]
        if whole:
            self.pending.append(b"" if exchange.method == "HEAD" else body)
        else:
            self.send_writes(body, chunked, AT_ONCE if answer.at_hand else 1)
        exchange.end()
        self.flush()

    def send_writes(self, writes, chunked, at_once):
        """The body that comes piece by piece; what fails in it becomes an error event."""
        frame = as_transfer_chunk if chunked else bytes
        try:
            for write in filter(None, writes):      # an empty one would spell the end
                self.pending.append(frame(write))
                if len(self.pending) >= at_once:
                    self.flush()
        except (Exception, SystemExit) as error:
            self.exchange.failed = True
            self.pending.append(frame(event(self.refusal(error).body())))
        if chunked:
            self.pending.append(b"0\r\n\r\n")

    def cut(self, how):
        """End a reply as a quirk, or an upstream that was cut, wants it."""
        self.open = False
        if how == "stall":
            self.flush()
            pause(math.inf)
        self.exchange.end("quirk" if self.exchange.quirk else "error")
        self.flush()
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(
                "hh" if os.name == "nt" else "ii", 1, 0))
            self.connection.close()

    # ------ one request, one answer

    def find_answer(self):
        """The answer, its first write taken.  Whatever fails up to there ends here."""
        try:
            return first_taken(self.server.answer(self.read_request()))
        except Instead as instead:
            return instead.args[0]
        except (Exception, SystemExit) as error:
            return error_answer(self.refusal(error))

    def send_or_cut(self):
        self.pending = []                       # what an earlier one left behind
        try:
            self.send(self.find_answer())
        except Cut as cut:
            self.cut(*cut.args)

    def serve_one(self):
        """One request and its answer; the client may leave at any time."""
        try:
            self.send_or_cut()
        except ClientLeft:
            self.exchange.end("client left")
            raise
        finally:
            self.exchange.close_sources()
            self.log_exchange()

    # ------ what can be watched

    def log_exchange(self):
        exchange = self.exchange
        if exchange.status and log.isEnabledFor(logging.INFO):
            log.info('%s "%s %s" %s %s, %d events, %.3f s', self.client_address[0],
                     exchange.method, printable(exchange.path), exchange.status,
                     exchange.outcome, exchange.events, exchange.seconds or 0)

    def trace(self, direction, block):
        start = f"#{self.number} {direction} "
        lines = (f"{start}{line}\n" for line in trace_lines(block))
        print("".join(lines), end="", file=sys.stderr, flush=True)      # together


# ----------------------------------------------------------------------------------
# Page.  For a look with a browser: talk, and see the events beside it as they arrive.
# It asks nobody but this server, and inserts text as text.

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>openai_compat</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif } textarea { flex: 1 9rem }
body { margin: 0; height: max(100vh, 28rem); display: grid; grid: auto 1fr auto / 1fr 1fr } b { flex: 1 }
header, footer { padding: .75rem 1rem; display: flex; flex-wrap: wrap; gap: .5rem; align-items: center }
input, textarea, button { font: inherit; padding: .25rem .6rem } input { width: min(24vw, 10rem) }
main, aside { overflow: auto; padding: 0 1rem; display: flex; flex-direction: column-reverse }
div { margin-bottom: auto } /* reversed, it stays at its end */ .sent, .page, .no { font-weight: 600 }
aside { grid-area: 2/2/4; background: #8882; font: .8rem/1.5 monospace } p:empty::after { content: "…" }
p { margin: .75rem 0; white-space: pre-wrap; overflow-wrap: anywhere } header { grid-column: 1 / -1 }
main p::before { content: attr(class); display: block; font-size: .8rem; opacity: .75 }
[aria-busy=true] + footer :not(textarea, #stop), [aria-busy=false] + footer #stop { display: none }
@media (max-width: 700px) { body { grid: auto 2fr auto 1fr / 100% } aside { grid-area: 4 / 1 } } </style>
<header><b>openai_compat</b> <label>Model <input id="model"></label>
<label>Key <input id="key" type="password" autocomplete="off"></label></header>
<main id="main" tabindex="0" aria-label="Conversation" aria-busy="false">
<div id="talk" role="log" aria-live="polite"></div></main>
<footer><textarea id="text" rows="3" autofocus aria-label="Message"
placeholder="Enter sends, Shift+Enter starts a line, Escape stops."></textarea>
<button id="send">Send</button><button id="new">New</button><button id="stop">Stop</button></footer>
<aside tabindex="0" aria-label="Events on the wire"><div id="wire"></div></aside>
<script>
const $ = id => document.getElementById(id);
let messages = [], running = null;        // the conversation; what stops the reply that runs
function show(pane, className, textContent) {   // as text: HTML in a reply is seen, not obeyed
  if ($(pane).childElementCount === 500) $(pane).firstChild.remove();
  return $(pane).appendChild(Object.assign(document.createElement("p"), {className, textContent}));
}
async function call(path, body) {         // -> the response; a refusal is an Error
  const headers = {"content-type": "application/json"}, method = body ? "POST" : "GET";
  if ($("key").value) headers.authorization = "Bearer " + $("key").value;
  show("wire", "sent", `${method} /v1/${path} ${body || ""}`);
  const response = await fetch("v1/" + path, {method, headers, body, signal: running?.signal});
  if (response.ok) return response;
  const text = show("wire", "", await response.text()).textContent;
  throw Error(`${response.status}: ${text[0] === "{" ? JSON.parse(text).error.message : text}`);
}
async function* events(response) {        // bytes -> events; a blank line ends each
  const reader = response.body.getReader(), decoder = new TextDecoder();
  for (let rest = "", read; !(read = await reader.read()).done; ) {
    const blocks = (rest + decoder.decode(read.value, {stream: true})).split(/\r?\n\r?\n/);
    rest = blocks.pop();                  // an event's start; half a character is in the decoder
    yield* blocks.map(block => show("wire", "", block).textContent);
  }
}
async function answer(messages, seen) {   // the reply to a conversation, seen as it comes
  let end, body = JSON.stringify({model: $("model").value, messages, stream: true});
  for await (const event of events(await call("chat/completions", body))) {
    const said = event.match(/^data:([^\r\n]*)/m)?.[1].trim();    // the rest is comment
    const {error, choices} = said && said !== "[DONE]" ? JSON.parse(said) : {};
    if (error) throw Error(error.message);
    seen.append(choices?.[0]?.delta?.content || "");
    end ||= choices?.[0]?.finish_reason || said === "[DONE]";
  }
  if (!end) throw Error("The reply broke off: neither finish_reason nor [DONE] came.");
}
async function ask() {
  const text = $("text").value, asked = [...messages, {role: "user", content: text}];
  if (running || !text.trim()) return;
  busy(new AbortController());
  show("talk", "user", text);
  const seen = show("talk", "assistant", $("text").value = "");
  await answer(asked, seen).catch(tell);
  if (seen.textContent) messages = [...asked, {role: "assistant", content: seen.textContent}];
  else $("text").value ||= text;
  busy(null);
}
const busy = control => $("main").setAttribute("aria-busy", Boolean(running = control));
const stop = () => running?.abort(Error("Stopped."));
const tell = error => show("talk", error.name === "TypeError" ? "no connection" : "page", error.message);
const list = async () => $("model").value ||= (await (await call("models")).json()).data[0].id;
const isSend = event => event.key === "Enter" && !event.shiftKey && !event.isComposing;
$("text").onkeydown = event => { if (isSend(event)) { event.preventDefault(); ask(); } };
$("text").parentNode.onclick = () => $("text").focus();    // whatever button was used
onkeydown = event => { if (event.key === "Escape") stop(); };
$("new").onclick = () => { messages = []; $("talk").textContent = $("wire").textContent = ""; };
[$("send").onclick, $("stop").onclick, $("key").onchange] = [ask, stop, () => list().catch(tell)];
list().catch(tell);
</script>
"""


def source_hash(text):
    """How a Content-Security-Policy names a block that stands in the page itself."""
    import hashlib              # not needed by those who never open the page
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
    return f"'sha256-{digest.decode()}'"


@functools.lru_cache(maxsize=1)
def page_headers():
    """The page may run its own script and style, and talk to this server: no more."""
    (_, style), (_, script) = re.findall(r"<(style|script)>(.*?)</\1>", PAGE, re.DOTALL)
    policy = {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:",
              "style-src": source_hash(style), "script-src": source_hash(script),
              "base-uri": "'none'", "form-action": "'none'",
              "frame-ancestors": "'none'",
              "require-trusted-types-for": "'script'"}  # not even by mistake: innerHTML
    return {"content-type": "text/html; charset=utf-8",
            "content-security-policy": "; ".join(map(" ".join, policy.items())),
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}


# ----------------------------------------------------------------------------------
# Server.  The routes, who may use them, and the one place where all the stages meet.

BEARER = {"www-authenticate": "Bearer"}
LOOPBACK = re.compile(r"localhost|.*\.localhost|127(\.\d+){3}|\[::1\]")
LOCAL_HOST = re.compile(r"\[[0-9a-f:.]+\]|[\d.]+|[^.]*|.*\.(localhost|local|internal)")


def model_name(backend):
    return getattr(backend, "model", None) or getattr(backend, "__name__", "model")


def host_name(authority):
    """Example: "http://Box.local:8000" and "box.local" -> "box.local"."""
    return re.sub(r"^\w+://|:\d*$", "", authority).lower()


@functools.lru_cache(maxsize=64)
def is_local(host):
    host = host_name(host)
    return bool(LOCAL_HOST.fullmatch(host)) or host == socket.gethostname().lower()


def one_or_many(value):
    return [value] if isinstance(value, str) else list(value or ())


def tls_context(tls):
    """An ssl.SSLContext, from one or from the files of a certificate and its key."""
    if tls is None or isinstance(tls, ssl.SSLContext):
        return tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(*tls)
    return context


def hang_up(connection, how):
    """Wake who waits on a connection; under TLS too, whose own shutdown would talk."""
    with suppress(OSError):
        socket.socket.shutdown(connection, how)


def masked(key):
    return f"{key[:3]}***{key[-2:]}" if len(key) >= 16 else "***"


def allowed_methods(methods):
    return ", ".join([*methods, *["HEAD"] * ("GET" in methods), "OPTIONS"])


def views(request, prompts):
    """The request as the backend sees it, once per choice; the reply gets its id."""
    if request["endpoint"] == "chat":
        prefix, texts = "chatcmpl-", [request["text"]] * request["n"]
    else:
        prefix, best_of = "cmpl-", request["best_of"]
        texts = ["".join(tokens) for tokens in prompts for _ in range(best_of)]
    request["id"] = prefix + random_name(29)
    return [{**request, "index": index, "prompt": text, "text": text}
            for index, text in enumerate(texts)]


def unstreamed(answer, quirk):
    """A reply that is not streamed; most quirks are about events and leave it alone."""
    if quirk in WHOLE_QUIRKS:
        answer.body = WRITE_QUIRKS[quirk](iter([answer.body]), 0)
    return answer


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server on a port of its own; see the top of this file.

    backend: any function of the request, or echo, say(...), Script(...), command(...),
    Relay(...), Replay(...).  port 0: a free one.  models: None for any name, or the
    names to accept.  api_keys: those that may use it.  tokenize: text -> list of its
    tokens.  strict: check the conversation.  quirk: a name of QUIRKS for every reply;
    quirk_header: also take one from X-Quirk.  tls: an ssl.SSLContext, or (certificate
    file, key file).  cors: origins of web pages that may use it.  max_body: bytes.
    request_timeout: seconds for a whole request to arrive.  journal: entries kept.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"       # there it would share the port
    allow_reuse_port = False
    request_queue_size = 1024   # of 32 clients at once, 5 make most wait for a second
    delay = 0                   # seconds between pieces, unless a reply says otherwise
    trace = False               # print what crosses the wire
    awake = 0                   # seconds to look for a next request, before we sleep
    closing = False             # no more connections, no more requests
    hanging_up = False          # ... and what still waits is to end
    acceptors = ()              # the threads that accept, where `start` made them

    def __init__(self, backend=echo, *, host="127.0.0.1", port=0, models=None,
                 api_keys=(), tokenize=tokenize, strict=True, quirk=None,
                 quirk_header=False, tls=None, cors=(), max_body=32 * 2**20,
                 max_connections=512, request_timeout=30, journal=1000):
        parse_quirk(quirk)                          # a wrong name shall fail here
        self.backend, self.tokenize, self.strict = backend, tokenize, strict
        self.models = None if models is None else one_or_many(models)
        self.api_keys = [key.encode() for key in one_or_many(api_keys)]
        self.quirk, self.quirk_header = quirk, quirk_header
        self.tls, self.cors = tls_context(tls), set(one_or_many(cors))
        self.max_body, self.max_connections = max_body, max_connections
        self.request_timeout, self.started = request_timeout, int(time.time())
        self.entries = collections.deque(maxlen=journal)
        self.connections, self.idle = {}, set()     # thread: its socket; who waits
        self.numbers = itertools.count(1)           # of connections, for the trace
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    # ------ life

    def server_bind(self):
        """As HTTPServer's, but no resolver is asked for our name: it may not answer."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def base_url(self):
        """Where a client finds it; ends in /v1."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = anywhere.get(self.server_name, self.server_name)
        host = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.tls else ''}://{host}:{self.server_port}/v1"

    @property
    def journal(self):
        """The last exchanges, oldest first."""
        return list(self.entries)

    def start(self, acceptors=1):
        """Serve in threads of its own; returns the server.

        Where hundreds of connections keep the interpreter busy, one that accepts gets
        its turn too seldom: eight halve the wait of the next thousand.
        """
        self.acceptors = [threading.Thread(target=self.serve_forever, daemon=True)
                          for _ in range(acceptors)]
        for thread in self.acceptors:
            thread.start()
        return self

    def serve_forever(self, poll_interval=0.5):
        """Accept until `shutdown`, which knocks: the poll is for when it cannot."""
        self.socket.settimeout(poll_interval)
        while not self.closing:
            with suppress(OSError):
                connection, address = self.get_request()
                try:
                    self.process_request(connection, address)
                except Exception:               # no more threads to be had
                    self.handle_error(connection, address)
                    connection.close()

    def shutdown(self):
        """Take no more connections."""
        self.closing = True
        host = urlsplit(self.base_url).hostname
        for _ in self.acceptors or [None]:          # None: serve_forever by hand
            with suppress(OSError):
                socket.create_connection((host, self.server_port), timeout=1).close()
        for thread in self.acceptors:
            thread.join()
        self.server_close()

    def join_connections(self, seconds):
        end = time.monotonic() + seconds
        for thread in list(self.connections):
            thread.join(max(end - time.monotonic(), 0))

    def close(self, grace=0):
        """Stop, and close every connection; running replies get `grace` seconds first.

        What still waits then ends with an error; a thread that is blocked in a backend
        of the user's is left behind.
        """
        self.shutdown()
        for connection in list(self.idle):
            hang_up(connection, socket.SHUT_RD)
        self.join_connections(grace)
        self.hanging_up = True
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):  # no more to come; nor to go
            for connection in list(self.connections.values()):
                hang_up(connection, how)
            self.join_connections(0.25)
        if self.connections:
            log.warning("%d threads are still busy in the backend and are left behind",
                        len(self.connections))

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, error, traceback):
        self.close()
        close = getattr(self.backend, "close", None)
        if close and (error is None or isinstance(error, Exception)):
            close(error)

    # ------ connections, each in a thread

    def process_request(self, connection, address):
        """Beyond max_connections a thread still says 503; far beyond, not even that."""
        if self.closing or len(self.connections) > 2 * self.max_connections + 16:
            return connection.close()
        thread = threading.Thread(target=self.process_request_thread,
                                  args=(connection, address), daemon=True)
        self.connections[thread] = connection
        try:
            thread.start()
        except RuntimeError:
            del self.connections[thread]
            raise

    def process_request_thread(self, connection, address):
        try:
            super().process_request_thread(connection, address)
        finally:
            self.connections.pop(threading.current_thread(), None)

    def get_request(self):
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)        # out of descriptors: it is no use to spin
            raise

    def handle_error(self, connection, address):
        log.debug("A connection from %s failed", address[0], exc_info=True)

    # ------ who may use it

    def on_loopback(self):
        return self.server_name.startswith("127.") or self.server_name == "::1"

    def check_key(self, secrets):
        scheme, _, key = secrets.get("authorization", "").partition(" ")
        key = key if scheme.lower() == "bearer" else secrets.get("api-key", "")
        key = key.strip()
        if not key:
            raise APIError(401, "You didn't provide an API key. You need to provide "
                           "your API key in an Authorization header using Bearer auth "
                           "(i.e. Authorization: Bearer YOUR_KEY).", headers=BEARER)
        from hmac import compare_digest         # not needed by those without keys
        known = [compare_digest(key.encode(), each) for each in self.api_keys]
        if not any(known):              # all were compared: time tells nothing
            raise APIError(401, f"Incorrect API key provided: {masked(key)}.",
                           code="invalid_api_key", headers=BEARER)

    def allows(self, origin, fields):
        """May a web page of that origin read what we answer?"""
        if self.cors & {"*", origin} or self.api_keys:
            return True
        _, _, authority = origin.partition("://")
        return (authority == fields.get("host")
                or bool(LOOPBACK.fullmatch(host_name(authority))))

    def check_browser(self, fields):
        """A page from elsewhere, in somebody's browser, is a stranger here."""
        host = fields.get("host", "")
        if not (is_local(host) or host_name(host) in map(host_name, self.cors)):
            raise APIError(403, f"The Host {printable(host[:100])!r} is not this "
                           "machine; to allow a page of that host, name its origin "
                           "with --cors.", code="foreign_host")
        origin = fields.get("origin")
        if origin is not None and not self.allows(origin, fields):
            raise APIError(403, f"The Origin {printable(origin[:100])!r} is not "
                           "allowed; name it with --cors.", code="foreign_origin")

    def admit(self, exchange):
        """Refuse who may not use the server, before the body is read."""
        if exchange.method == "OPTIONS":
            return
        if self.api_keys:
            if exchange.route not in ("/", "/health"):
                self.check_key(exchange.secrets)
                exchange.keyed = True
        elif self.on_loopback():
            self.check_browser(exchange.headers)

    def cors_headers(self, exchange):
        origin = exchange.headers.get("origin")
        if origin is None:
            return {}
        if not self.allows(origin, exchange.headers):
            return {"vary": "origin"}
        return {"vary": "origin", "access-control-allow-origin": origin,
                "access-control-expose-headers": "x-request-id"}

    # ------ the endpoints: an exchange -> its answer

    def check_model(self, model):
        if self.models is not None and model not in self.models:
            raise APIError(404, f"The model `{model[:200]}` does not exist or you do "
                           "not have access to it.", code="model_not_found")

    def quirk_wanted(self, headers):
        """What X-Quirk asks for, where it may; a wrong name is the client's fault."""
        quirk = headers.get("x-quirk") if self.quirk_header else None
        try:
            parse_quirk(quirk)
        except ValueError as error:
            raise APIError(400, str(error), "X-Quirk") from None
        return quirk

    def complete(self, request, exchange):
        """The diagram at the top of this file, as code."""
        backend, tokenize = self.backend, self.tokenize
        prompts = readings(request, tokenize)
        wanted = self.quirk_wanted(exchange.headers)
        replies = []
        for view in views(request, prompts):
            replies.append(as_reply(backend(view)))
            exchange.sources.append(replies[-1].pieces)
        first = replies[0]
        quirk, k = parse_quirk(first.quirk or self.quirk or wanted)
        exchange.quirk = quirk
        usage = Usage(request, tokenize, first.usage)
        choices = [choice(reply, request, tokenize, reply.delay or self.delay)
                   for reply in replies]
        if request["endpoint"] == "chat":
            chunks = chat_chunks(request, choices, usage)
        else:
            chunks = completion_chunks({**request, "prompts": prompts}, choices, usage)
        if not request["stream"]:
            return unstreamed(json_answer(fold(chunks), first.headers), quirk)
        if quirk in CHUNK_QUIRKS:
            chunks = CHUNK_QUIRKS[quirk](chunks, k)
        writes = map(exchange.counted, events(chunks))
        if quirk in WRITE_QUIRKS:
            writes = WRITE_QUIRKS[quirk](writes, k)
        at_hand = not quirk and not self.delay and all(map(Reply.is_at_hand, replies))
        return Answer(200, {**EVENT_STREAM, **first.headers}, writes, at_hand)

    def completion(self, exchange):
        """A chat or a text completion, of our backend's pieces or its whole answer."""
        body = exchange.body = parse_json(exchange.content)
        if exchange.model is not None and body.get("model") is None:
            body = {**body, "model": exchange.model}
            exchange.content = to_json(body)
        if hasattr(self.backend, "answer"):
            return self.backend.answer(exchange)
        is_chat = exchange.route == "/chat/completions"
        request = (parse_chat if is_chat else parse_completion)(body, self.strict)
        self.check_model(request["model"])
        return self.complete(request, exchange)

    def show_models(self, exchange):
        """One where the path names it, else all."""
        if hasattr(self.backend, "answer"):
            return self.backend.answer(exchange)
        names = [model_name(self.backend)] if self.models is None else self.models
        if exchange.model is not None:
            self.check_model(exchange.model)
            names = [exchange.model]
        models = [{"id": name, "object": "model", "created": self.started,
                   "owned_by": "openai_compat"} for name in names]
        return json_answer({"object": "list", "data": models} if exchange.model is None
                           else models[0])

    def health(self, exchange):
        return json_answer({"status": "ok"})

    def show_journal(self, exchange):
        if not self.entries.maxlen:
            raise APIError(404, "No journal is kept; start with --journal.",
                           code="unknown_url")
        return json_answer([entry.as_dict() for entry in self.journal])

    def page(self, exchange):
        return Answer(200, page_headers(), PAGE.encode())

    # ------ routes

    ROUTES = {  # path: {method: its endpoint}; HEAD is where GET is
        "/chat/completions": {"POST": completion},
        "/completions":      {"POST": completion},
        "/models":           {"GET": show_models},
        "/models/":          {"GET": show_models},      # and a name after it
        "/health":           {"GET": health},
        "/journal":          {"GET": show_journal},
        "/":                 {"GET": page},
    }

    def options(self, exchange, methods):
        allowed = allowed_methods(methods or {"GET": None, "POST": None})
        headers = {"allow": allowed}
        if "access-control-allow-origin" in self.cors_headers(exchange):
            wanted = exchange.headers.get("access-control-request-headers", "*")
            headers.update({"access-control-allow-methods": allowed,
                            "access-control-allow-headers": wanted,
                            "access-control-max-age": "86400"})
        return Answer(204, headers)

    def answer(self, exchange):
        """The answer to one request."""
        path = "/models/" if exchange.route.startswith("/models/") else exchange.route
        methods = self.ROUTES.get(path)
        if exchange.method == "OPTIONS":
            return self.options(exchange, methods or {})
        if methods is None:
            paths = ", ".join(f"/v1{path}" for path in list(self.ROUTES)[:3])
            raise APIError(404, f"Unknown request URL: {exchange.method} "
                           f"{printable(exchange.path[:200])}. This server has: "
                           f"{paths}.", code="unknown_url")
        method = "GET" if exchange.method == "HEAD" else exchange.method
        if method not in methods:
            raise APIError(405, f"Not allowed to {exchange.method} on "
                           f"{exchange.route}. (HINT: use {' or '.join(methods)} "
                           "instead.)", headers={"allow": allowed_methods(methods)})
        return methods[method](self, exchange)


# ----------------------------------------------------------------------------------
# Command line.  A table of flags, the server that they ask for, and two ways to run it:
# until a signal comes, or beside a command and as long as that runs.

PLACE = "MODULE:FUNCTION"
OPTIONS = (  # False, a list or a number as the default says what kind of flag it is
    # flag               default      metavar    help
    ("--host",            "127.0.0.1", None,     "address to listen on"),
    ("--port",            8000,        None,     "port; 0 for a free one"),
    ("--model",           [],          "NAME",   "accept this name only"),
    ("--api-key",         [],          "KEY",    "accept this key; also, separated by "
                                                 "commas, from OPENAI_COMPAT_API_KEYS"),
    ("--at-once",         1,           "N",      "programs at a time"),
    ("--upstream-key",    None,        "KEY",    "the key for --upstream"),
    ("--record",          None,        "TAPE",   "append what the upstream says "
                                                 "to a tape"),
    ("--delay",           0.0,         "S",      "seconds between pieces"),
    ("--tokenizer",       None,        PLACE, "text -> list of its tokens"),
    ("--lenient",         False,       None,     "do not check the conversation"),
    ("--quirk",           None,        "NAME",   "a fault in every reply"),
    ("--quirk-header",    False,       None,     "a fault where X-Quirk asks for it"),
    ("--journal",         False,       None,     "keep one, for GET /journal"),
    ("--cors",            [],          "ORIGIN", "let web pages of this origin in; "
                                                 "* for all"),
    ("--tls-cert",        None,        "FILE",   "serve https with this certificate"),
    ("--tls-key",         None,        "FILE",   "and its key"),
    ("--max-body",        32 * 2**20,  "N",      "bytes"),
    ("--max-connections", 512,         "N",      "beyond: 503"),
    ("--request-timeout", 30.0,        "S",      "seconds for a request to arrive"),
    ("--trace",           False,       None,     "print what crosses the wire"),
    ("--quiet",           False,       None,     "no line per exchange"),
)
BACKENDS = (  # flags that choose the backend; without one of them it is echo
    ("--say",             None,        "TEXT",   "always say this"),
    ("--script",          None,        "FILE",   "reply with the steps of this JSON "
                                                 "file"),
    ("--command",         None,        "CMD",    "reply with what this program prints"),
    ("--backend",         None,        PLACE, "reply with what this yields"),
    ("--upstream",        None,        "URL",    "pass on to another such server"),
    ("--replay",          None,        "TAPE",   "reply with what was recorded"),
)


def add_flag(parser, flag, default, metavar, about):
    kind = {"action": "store_true"}
    if type(default) is list:
        kind = {"action": "append", "default": default, "metavar": metavar}
    elif default is not False:
        kind = {"type": str if default is None else type(default), "default": default,
                "metavar": metavar}
    parser.add_argument(flag, help=about, **kind)


def parse_arguments(argv):
    """The options, and the command after the first "--", or None."""
    import argparse             # a fixture needs none of it
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="After -- may stand a command: it is run with OPENAI_BASE_URL set to a "
               "server on a free port, and its exit status is the exit status.")
    for row in OPTIONS:
        add_flag(parser, *row)
    parser.add_argument("--version", action="version", version=__version__)
    one_of = parser.add_mutually_exclusive_group()
    for row in BACKENDS:
        add_flag(one_of, *row)
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    for flag, other in (("record", "upstream"), ("upstream_key", "upstream"),
                        ("tls_key", "tls_cert"), ("tls_cert", "tls_key")):
        if getattr(args, flag) and not getattr(args, other):
            parser.error(f"--{flag} says nothing without --{other}".replace("_", "-"))
    return args, argv[end + 1:] if "--" in argv else None


def named(text):
    """What "module:function" names.

    Its module imports `openai_compat`: that has to be this very module, not a second
    copy, whose APIError would be a stranger here.
    """
    sys.modules.setdefault("openai_compat", sys.modules[__name__])
    sys.path.insert(0, os.getcwd())
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def backend_of(args):
    if args.say is not None:
        return say(*tokenize(args.say))
    if args.script:
        return Script.from_file(args.script)
    if args.command:
        return command(args.command, args.at_once)
    if args.upstream:
        return Relay(args.upstream, args.upstream_key, args.record)
    if args.replay:
        return Replay(args.replay)
    return named(args.backend) if args.backend else echo


def server_of(args, port):
    """The server that the options ask for."""
    keys = os.environ.get("OPENAI_COMPAT_API_KEYS", "").split(",")
    server = Server(
        backend_of(args), host=args.host, port=port, models=args.model or None,
        api_keys=[*args.api_key, *filter(None, map(str.strip, keys))],
        tokenize=named(args.tokenizer) if args.tokenizer else tokenize,
        strict=not args.lenient, quirk=args.quirk, quirk_header=args.quirk_header,
        tls=(args.tls_cert, args.tls_key) if args.tls_cert else None, cors=args.cors,
        max_body=args.max_body, max_connections=args.max_connections,
        request_timeout=args.request_timeout, journal=1000 if args.journal else 0)
    server.delay, server.trace = args.delay, args.trace
    if hasattr(socket, "MSG_DONTWAIT") and hasattr(os, "sched_yield"):
        server.awake = 1e-4
    return server


def complain(message, status):
    print(f"openai_compat: {message}", file=sys.stderr)
    return status


def schedule(cores, slack):
    """Where this thread and those that it starts are to run, if the system lets us.

    slack: how many ns a sleep may last longer, so that sleepers wake together.
    """
    with suppress(OSError):
        os.sched_setaffinity(0, cores)
        with open("/proc/self/timerslack_ns", "w") as file:
            file.write(str(slack))


@contextlib.contextmanager
def on_one_core(number):
    """Threads that are started inside stay on one core, which the number picks.

    One thread at a time has the interpreter, and to hand it to another core takes
    longer than most turns; so does to wake a thousand sleepers one by one.  It is half
    the time with 16 connections, and with 1,000.
    """
    if not hasattr(os, "sched_getaffinity"):        # only Linux has it
        yield
        return
    cores = os.sched_getaffinity(0)
    schedule({sorted(cores)[number % len(cores)]}, slack=10**6)
    yield
    schedule(cores, slack=0)                        # 0 is the usual one


def serve(server):
    """Serve until SIGTERM or Ctrl-C; running replies get 10 s then."""
    # With hundreds of threads in the queue for the interpreter, each asking for it
    # every 5 ms, whoever runs is interrupted all the time: it was four times the work.
    sys.setswitchinterval(0.02)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(f"Serving {server.base_url} with {model_name(server.backend)}; "
              "Ctrl-C ends it.", file=sys.stderr, flush=True)
        while True:
            time.sleep(0.2)     # in short steps: on Windows nothing interrupts it
    except KeyboardInterrupt:
        pass
    # In a thread: a join that a signal interrupts takes its thread for ended (CPython
    # issue 45274).
    closing = threading.Thread(target=server.close, args=(10,), daemon=True)
    closing.start()
    try:
        while closing.is_alive():
            time.sleep(0.05)
    except KeyboardInterrupt:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        server.close()
    return 0


def pass_signal(running, number, frame):
    """A terminal's Ctrl-C reaches the command anyway; twice would be once too often."""
    if not running:
        sys.exit(128 + number)
    terminal = number == signal.SIGINT and sys.stdin.isatty()
    if not terminal and running[0].poll() is None:
        running[0].send_signal(number)


def environment_for(server):
    """Ours, and in it where to find the server, by all the names that clients know."""
    keys = [key.decode() for key in server.api_keys]
    key = keys[0] if keys else os.environ.get("OPENAI_API_KEY") or "none"
    bypass = filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost,::1"])
    bypass = ",".join(bypass)
    return {**os.environ, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": key,
            "OPENAI_API_BASE": server.base_url, "NO_PROXY": bypass, "no_proxy": bypass}


def run_beside(server, program):
    """Run a command with the server in its environment; returns its exit status."""
    import subprocess
    found = shutil.which(program[0]) if program else None
    if found is None:
        server.close()
        return complain(f"cannot run {program[0] if program else 'nothing'!r}: "
                        "no such command", 127)
    running = []                # empty until there is somebody to pass a signal to
    for name in {"SIGTERM", "SIGHUP", "SIGINT"}.intersection(dir(signal)):
        signal.signal(getattr(signal, name), functools.partial(pass_signal, running))
    try:
        process = subprocess.Popen([found, *program[1:]], env=environment_for(server))
    except OSError as error:
        server.close()
        return complain(f"cannot run {found}: {error.strerror}", 126)
    running.append(process)
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
    server.close()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def main(argv=None):
    """The command line; returns the exit status."""
    args, program = parse_arguments(sys.argv[1:] if argv is None else argv)
    beside = program is not None
    port = 0 if beside else args.port
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S",
                        level=logging.WARNING if args.quiet or beside else logging.INFO)
    try:
        server = server_of(args, port)
    except (OSError, OverflowError, ValueError, ImportError, AttributeError) as error:
        at_fault = (args.tls_cert or args.script or args.replay or args.record
                    or f"--host {args.host} --port {args.port}")
        return complain(f"{error} ({at_fault})", 1)
    if not (server.api_keys or server.on_loopback()):
        log.warning("WARNING: without --api-key, whoever reaches %s can use this "
                    "server", server.base_url)
    ours = not (args.command or args.backend)       # others' code may compute: anywhere
    # Neighbouring ports get two cores.
    with on_one_core(port or os.getpid()) if ours else contextlib.nullcontext():
        server.start(acceptors=8)
    status = run_beside(server, program) if beside else serve(server)
    try:
        getattr(server.backend, "close", lambda error: None)(None)
    except AssertionError as error:
        return complain(error, status or int(beside))
    return status


if __name__ == "__main__":
    sys.exit(main())
