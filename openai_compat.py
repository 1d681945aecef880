#!/usr/bin/env python3
"""An OpenAI-compatible server in one file, on nothing but Python's standard library.

    $ python3 openai_compat.py                    # the echo backend, on port 8000
    $ curl http://127.0.0.1:8000/v1/chat/completions -d '{
        "model": "echo", "messages": [{"role": "user", "content": "Hello world"}]}'

As a fixture, for any client in any language:

    with Server("Hello!") as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="any")

One exchange.  The body of a request to POST /v1/chat/completions:

    {"model": "echo", "stream": true,
     "messages": [{"role": "user", "content": "Hello world"}]}

The body of the response: five server-sent events.  (An event is one line and a blank
line; here the lines are broken to fit the page.)

    data: {"id":"chatcmpl-d95baf2a4d27bdcf4bb99f4bea973",
    "object":"chat.completion.chunk","created":1767225600,"model":"echo",
    "system_fingerprint":"fp_openai_compat","service_tier":"default",
    "choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},
    "logprobs":null,"finish_reason":null}]}

    data: {"id":"chatcmpl-d95baf2a4d27bdcf4bb99f4bea973",
    "object":"chat.completion.chunk","created":1767225600,"model":"echo",
    "system_fingerprint":"fp_openai_compat","service_tier":"default",
    "choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,
    "finish_reason":null}]}

    data: {"id":"chatcmpl-d95baf2a4d27bdcf4bb99f4bea973",
    "object":"chat.completion.chunk","created":1767225600,"model":"echo",
    "system_fingerprint":"fp_openai_compat","service_tier":"default",
    "choices":[{"index":0,"delta":{"content":" world"},"logprobs":null,
    "finish_reason":null}]}

    data: {"id":"chatcmpl-d95baf2a4d27bdcf4bb99f4bea973",
    "object":"chat.completion.chunk","created":1767225600,"model":"echo",
    "system_fingerprint":"fp_openai_compat","service_tier":"default",
    "choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}

    data: [DONE]

Without "stream" the same chunks are folded into one chat.completion:

    {"id":"chatcmpl-d95baf2a4d27bdcf4bb99f4bea973","object":"chat.completion",
    "created":1767225600,"model":"echo","system_fingerprint":"fp_openai_compat",
    "service_tier":"default","choices":[{"index":0,"message":{"role":"assistant",
    "content":"Hello world","refusal":null},"logprobs":null,
    "finish_reason":"stop"}],"usage":{"prompt_tokens":2,"completion_tokens":2,
    "total_tokens":4,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},
    "completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,
    "accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}

The stages, in the order of this file.  Each one takes what the one above gives:

    request bytes
        | parse_json                          a dict
        | parse_chat, parse_completion        every known field checked
    request
        | backend                             pieces: str, ToolCall, Refusal
    pieces
        | segments_of                         each with its kind and its tokens
    segments
        | sequence: one_call, up_to,          cut to the first tool call, max_tokens
        |           until_stop                and stop
    sequences
        | chat_chunks, completion_chunks      the chunks of each piece
    chunks ------ fold ------> completion     when "stream" is false
        | events                              server-sent events, then [DONE]
    writes
        | quirk                               a deliberate fault, if a test wants one
    transfer chunks                           HTTP's unit

All stages but the first two meet in `Server.complete`.  The file has three parts:

    PART 1  THE PROTOCOL: from the bytes of a body to the bytes of its events
    PART 2  BACKENDS: what answers, and deliberate faults
    PART 3  OVER HTTP: sockets, routes, keys, the page, the command line

A backend is any function of the request that returns text or yields it in pieces:

    def backend(request):
        for word in request["text"].split():
            yield word[::-1] + " "

Not done here: running a model, images, audio, files, HTTP/2; embeddings and
/v1/responses only where `Server(routes=...)` has a function for them.
"""
import base64
import codecs
import collections.abc
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
import select
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import sys
import tempfile
import threading
import time
import unicodedata
from contextlib import suppress
from datetime import datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

__version__ = "2.0.0"
__all__ = ["Server", "APIError", "Reply", "ToolCall", "echo", "say", "command",
           "Script", "Relay", "Replay", "sample", "tokenize", "QUIRKS"]

log = logging.getLogger("openai_compat")


# ==================================================================================
# PART 1  THE PROTOCOL
#
# From the bytes of a body to the bytes of its events.  Everything here takes and
# returns dicts, generators and bytes: there is no socket, no thread and no file.
# ==================================================================================

# ----------------------------------------------------------------------------------
# Errors and JSON.  There is one exception for everything that is refused.  Raise it
# anywhere; the HTTP handler makes a response of it, always in one shape.

ERROR_KINDS = {  # status: (type, code); any other 4xx is as 400, any other 5xx as 500
    400: ("invalid_request_error", None),
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("service_unavailable_error", None),
}
FRAMING = {"connection", "content-length", "transfer-encoding"}
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
HEADER_VALUE = re.compile(r"[\t -~\x80-\xff]*")


def header_fields(headers):
    """Check the headers that somebody gives for a response (RFC 9110, 5.5).

    Example:
        >>> header_fields({"Retry-After": 3})
        {'retry-after': '3'}

    Raises ValueError for a malformed name, for a value with a control character (a line
    end would start another header) or with one outside Latin-1, and for the headers
    that the server itself sets to frame the body.
    """
    fields = {str(name).lower(): str(value)
              for name, value in dict(headers or {}).items()}
    for name, value in fields.items():
        if name in FRAMING or not (HEADER_NAME.fullmatch(name)
                                   and HEADER_VALUE.fullmatch(value)):
            raise ValueError(f"{name!r}: {value!r} cannot be a header of a response")
    return fields


class APIError(Exception):
    """A refusal in the API's words: an HTTP status and an error object.

    `param` names the field at fault and `code` is the reason for programs; both may be
    None.  `type` follows from the status unless it is given.  `headers` go out with the
    response.

    Example:
        >>> error = APIError(404, "No such model.", code="model_not_found")
        >>> print(to_json(error.body()).decode())
        {"error":{"message":"No such model.","type":"invalid_request_error",...}}
    """

    def __init__(self, status, message, param=None, code=None, type=None, headers=None):
        # pickle and copy call the class again with `args`, which Exception keeps.
        super().__init__(status, message, param, code, type, headers)
        if not 400 <= int(status) <= 599:
            raise ValueError(f"the status of an error must be 400 to 599, not {status}")
        self.status, self.message, self.param = int(status), str(message), param
        usual = ERROR_KINDS.get(self.status, ERROR_KINDS[self.status // 100 * 100])
        self.code, self.type = code or usual[1], type or usual[0]
        self.headers = header_fields(headers)
        if code == "insufficient_quota":        # SDKs must not retry: it stays used up
            self.type = type or code
            self.headers.setdefault("x-should-retry", "false")

    def __str__(self):
        return self.message

    def body(self):
        """The error object as it is sent.  Clients rely on all four keys."""
        return {"error": {"message": self.message, "type": self.type,
                          "param": self.param, "code": self.code}}


def server_error():
    """What a client is told about a fault that is not the client's."""
    return APIError(500, "The server had an error while processing your request. "
                         "Sorry about that!")


def model_not_found(model):
    return APIError(404, f"The model `{str(model)[:200]}` does not exist or you do not "
                         "have access to it.", code="model_not_found")


class BackendFault(APIError):
    """A 500 that tells the author of a backend what is wrong with it."""

    def __init__(self, message):
        super().__init__(500, f"The backend is at fault: {message}.")
        self.args = (message,)


JSON_NAMES = {str: "a string", bool: "a boolean", int: "an integer", float: "a decimal",
              list: "an array", dict: "an object", type(None): "null"}
MOST_NESTED = 200       # levels: parsing, checking and encoding JSON are recursive


def finite(text):
    number = float(text)
    if math.isfinite(number):
        return number
    raise ValueError(f"{text[:20]} cannot be a number in JSON")


# The standard parser takes NaN and Infinity, which JSON does not have, and turns 1e999
# into infinity, which could not be sent back.
decode_json = json.JSONDecoder(parse_constant=finite, parse_float=finite).decode


def nesting(text):
    """How many levels of arrays and objects a JSON text has, before it is parsed.

    The parser is recursive, and at the limit of recursion Python 3.8 may abort.

    Example:
        >>> nesting('{"a[": [[1], 2]}')
        3
    """
    unescaped = text.replace("\\\\", "").replace('\\"', "")
    brackets = re.findall("[][{}]", "".join(unescaped.split('"')[::2]))  # not in strings
    steps = (1 if bracket in "[{" else -1 for bracket in brackets)
    return max(itertools.accumulate(steps), default=0)


def parse_json(body):
    """Parse the body of a request, or raise a 400 that says what is wrong (RFC 8259).

    Example:
        >>> parse_json(b'{"model": "echo"}')
        {'model': 'echo'}
    """
    try:
        text = body.decode()
        # There are at least as many brackets as levels, and counting them is quicker.
        brackets = text.count("[") + text.count("{")
        if brackets > MOST_NESTED and nesting(text) > MOST_NESTED:
            raise ValueError(f"it is nested more than {MOST_NESTED} levels deep")
        value = decode_json(text[1:] if text.startswith("\ufeff") else text)
        if type(value) is not dict:
            raise ValueError(f"it is {JSON_NAMES[type(value)]}, not an object")
        return value
    except ValueError as error:
        raise APIError(400, "We could not parse the JSON body of your request. (HINT: "
                            "the body must be one JSON object in UTF-8; "
                            f"{str(error)[:200]}.)") from None


# Compact JSON text; NaN and infinity are a ValueError.
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False,
                                check_circular=False, separators=(",", ":"))
encode_json = JSON_ENCODER.encode       # Speed, the last section, repeats its options
# A lone surrogate has no UTF-8, and some old clients end a line at the other three.
MUST_BE_ESCAPED = re.compile("[\ud800-\udfff\x85\u2028\u2029]")


def to_json(value):
    """A value as compact JSON in UTF-8, as the API sends it.

    Example:
        >>> to_json({"text": "你好", "n": [1, None]}).decode()
        '{"text":"你好","n":[1,null]}'

    Raises ValueError or TypeError for what JSON cannot hold, and RecursionError for
    what is nested too deeply, or holds itself.
    """
    text = encode_json(value)
    if not text.isascii() and MUST_BE_ESCAPED.search(text):
        text = json.dumps(value, separators=(",", ":"))         # ASCII, with escapes
    return text.encode()


# ----------------------------------------------------------------------------------
# Requests.  A body is checked against a table with one row per field.  What comes out
# is a dict in which every known field is present: checked, or its default.  null means
# the same as absence, and unknown fields pass unchecked.
#
# What a value must be is a spec:
#     str, bool, int, float, list, dict     that type; float takes integers too
#     ("low", "high")             one of these words
#     [spec]                      an array of values that fit the spec
#     {str: spec, list: spec}     a value of one of these types, which fits its spec
#     Object({"a": spec, ...})    an object: "a" is optional, "a!" is required, "a?" is
#                                 required but may be null
#     tagged("role", user=Object(...), ...) an object whose "role" chooses its shape
#     Bounded(spec, least, most)  a number, or a length, within bounds
#     Map(spec, most_pairs)       an object with any keys, of at most 64 characters
#     any callable(where, value)  raises the 400, or returns; Object, tagged, Bounded
#                                 and Map make such callables
#     None, in an object          anything
# The messages are the API's own, word for word.

def mistyped(where, value, expected):
    return APIError(400, f"Invalid type for '{where}': expected {expected}, but got "
                         f"{JSON_NAMES[type(value)]} instead.", where, "invalid_type")


def check(where, value, spec):
    """Raise a 400 unless the value fits the spec; `where` is its path in the body.

    Example:
        >>> check("verbosity", "low", ("low", "high"))
        >>> check("messages[0].name", 5, str)
        Traceback (most recent call last):
        ...
        openai_compat.APIError: Invalid type for 'messages[0].name': expected ...
    """
    kind = type(spec)
    # Types are compared exactly: in Python, though not in JSON, True is an int.
    if kind is type:
        if type(value) is not spec and (type(value), spec) != (int, float):
            raise mistyped(where, value, JSON_NAMES[spec])
    elif kind is dict:
        if type(value) not in spec:
            names = " or ".join(map(JSON_NAMES.get, spec))
            raise mistyped(where, value, f"one of {names}")
        check(where, value, spec[type(value)])
    elif kind is list:
        check(where, value, list)
        for i, item in enumerate(value):
            check(f"{where}[{i}]", item, spec[0])
    elif kind is tuple:
        if value not in spec:
            check(where, value, str)
            *others, last = map(repr, spec)
            raise APIError(400, f"Invalid value: {value[:80]!r}. Supported values are: "
                           f"{', '.join(others)}, and {last}.", where, "invalid_value")
    else:                               # Bounded and Map, too, which are namedtuples
        spec(where, value)


class Object:
    """An object with these fields; it may have others."""

    def __init__(self, fields):
        self.fields = {name.rstrip("!?"): spec for name, spec in fields.items()}
        self.required = {name[:-1]: name[-1] for name in fields if name[-1] in "!?"}

    def __call__(self, where, value):
        check(where, value, dict)
        prefix = f"{where}." if where else ""
        for name, mark in self.required.items():
            if value.get(name) is None and (mark == "!" or name not in value):
                raise APIError(400, f"Missing required parameter: '{prefix}{name}'.",
                               f"{prefix}{name}", "missing_required_parameter")
        for name, item in value.items():
            spec = self.fields.get(name)
            if not (item is None or spec is None or type(item) is spec):
                check(f"{prefix}{name}", item, spec)


def tagged(tag, **shapes):
    """An object of several shapes: the value of the field `tag` says which it has."""
    has_tag = Object({f"{tag}!": tuple(shapes)})

    def check_shape(where, value):
        has_tag(where, value)
        shapes[value[tag]](where, value)
    return check_shape


def typed(**specs):
    """An object with a type, which has its content under the name of the type.

    Example:
        >>> typed(text=str)("part", {"type": "text", "text": "Hello"})
    """
    return tagged("type", **{kind: Object({f"{kind}!": spec})
                             for kind, spec in specs.items()})


OUT_OF_BOUNDS = {  # (is it a number, is it too small): what the API says, and its code
    (True, True): ("{kind} below minimum value. Expected a value >= {least}, "
                   "but got {size}", "{kind}_below_min_value"),
    (True, False): ("{kind} above maximum value. Expected a value <= {most}, "
                    "but got {size}", "{kind}_above_max_value"),
    (False, True): ("empty {kind}. Expected {a_kind} with minimum length {least}, "
                    "but got an empty {kind}", "empty_{kind}"),
    (False, False): ("{kind} too long. Expected {a_kind} with maximum length {most}, "
                     "but got {a_kind} with length {size}", "{kind}_above_max_length"),
}


class Bounded(collections.namedtuple("Bounded", "spec least most")):
    """A number within bounds, or something whose length is."""

    def __call__(self, where, value):
        check(where, value, self.spec)
        is_number = type(value) in (int, float)
        size = value if is_number else len(value)
        if not self.least <= size <= self.most:
            a_kind = JSON_NAMES[self.spec if is_number else type(value)]
            fault, code = (text.format(kind=a_kind.split()[1], a_kind=a_kind, size=size,
                                       least=self.least, most=self.most)
                           for text in OUT_OF_BOUNDS[is_number, size < self.least])
            raise APIError(400, f"Invalid '{where}': {fault} instead.", where, code)


class Map(collections.namedtuple("Map", "spec most_pairs", defaults=[math.inf])):
    """An object with any keys, whose values fit the spec."""

    def __call__(self, where, value):
        check(where, value, Bounded(dict, 0, self.most_pairs))
        for name, item in value.items():
            check(where, name, Bounded(str, 0, 64))
            check(f"{where}.{name}", item, self.spec)


def check_name(where, value):
    """The spec of the name of a function, a tool or a schema."""
    check(where, value, Bounded(str, 0, 64))
    if not re.fullmatch("[a-zA-Z0-9_-]+", value):
        raise APIError(400, f"Invalid '{where}': string does not match pattern. "
                       "Expected a string that matches the pattern "
                       "'^[a-zA-Z0-9_-]+$'.", where, "invalid_value")


# {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
FUNCTION = Object({"name!": check_name, "description": str, "parameters": dict,
                   "strict": bool})
CUSTOM = Object({"name!": check_name, "description": str, "format": dict})
TOOL = typed(function=FUNCTION, custom=CUSTOM)
# "required", or {"type": "function", "function": {"name": "now"}}, or
# {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [...]}}
NAME = Object({"name!": check_name})
ALLOWED = Object({"mode!": ("auto", "required"),
                  "tools!": [typed(function=NAME, custom=NAME)]})
TOOL_CHOICE = {str: ("none", "auto", "required"),
               dict: typed(function=NAME, custom=NAME, allowed_tools=ALLOWED)}
# {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
# (`check_conversation` checks the arguments.)
CALLED_NAME = Object({"name!": str})
TOOL_CALL = tagged("type", function=Object({"id!": str, "function!": CALLED_NAME}),
                           custom=Object({"id!": str, "custom!": CALLED_NAME}))
# "Hello", or [{"type": "text", "text": "Hello"}, {"type": "image_url", ...}]
AUDIO = Object({"data!": str, "format!": ("wav", "mp3")})
CONTENT = {str: str, list: [typed(text=str, refusal=str, file=dict, input_audio=AUDIO,
                                  image_url=Object({"url!": str}))]}
# {"role": "user", "content": "Hello"}
PLAIN_MESSAGE = Object({"content?": CONTENT, "name": str})
MESSAGE = tagged(
    "role", system=PLAIN_MESSAGE, developer=PLAIN_MESSAGE, user=PLAIN_MESSAGE,
    assistant=Object({"content": CONTENT, "name": str, "refusal": str,
                      "tool_calls": [TOOL_CALL], "function_call": CALLED_NAME}),
    tool=Object({"content?": CONTENT, "tool_call_id!": str}),
    function=Object({"content?": str, "name!": str}))
# {"type": "json_schema", "json_schema": {"name": "city", "schema": {...}}}
JSON_SCHEMA = Object({"name!": check_name, "description": str, "schema": dict,
                      "strict": bool})
RESPONSE_FORMAT = tagged("type", text=Object({}), json_object=Object({}),
                         json_schema=Object({"json_schema!": JSON_SCHEMA}))
STREAM_OPTIONS = Object({"include_usage": bool, "include_obfuscation": bool})
STOP = Bounded(str, 0, 1000)
# {the tier that a request asks for: the tier that its response names}
SERVED_TIERS = {"auto": "default", "default": "default", "flex": "flex",
                "scale": "scale", "priority": "priority", "fast": "priority"}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Fields(Object):
    """The table of one endpoint: the spec of a body, and the default of each field."""

    def __init__(self, *rows):
        super().__init__({name: spec for name, spec, _ in rows})
        self.defaults = {name.rstrip("!?"): default for name, _, default in rows}


#    name                      spec                             default
SHARED_FIELDS = (
    ("model",                  str,                             None),
    ("max_tokens",             Bounded(int, 0, math.inf),       None),
    ("n",                      Bounded(int, 1, 128),            1),
    ("temperature",            Bounded(float, 0, 2),            1),
    ("top_p",                  Bounded(float, 0, 1),            1),
    ("presence_penalty",       Bounded(float, -2, 2),           0),
    ("frequency_penalty",      Bounded(float, -2, 2),           0),
    ("logit_bias",             Map(Bounded(float, -100, 100)),  None),
    ("stop",                   {str: STOP, list: [STOP]},       None),
    ("user",                   str,                             None),
    ("seed",                   Bounded(int, -2**63, 2**63 - 1), None),
    ("stream",                 bool,                            False),
    ("stream_options",         STREAM_OPTIONS,                  None),
)
CHAT_FIELDS = Fields(
    ("messages!",              Bounded([MESSAGE], 1, math.inf), None),
    ("functions",              Bounded([FUNCTION], 1, 128),     ()),
    ("tools",                  Bounded([TOOL], 0, 128),         ()),
    ("tool_choice",            TOOL_CHOICE,                     None),
    ("function_call",          {str: ("none", "auto"), dict: NAME}, None),
    ("parallel_tool_calls",    bool,                            True),
    ("response_format",        RESPONSE_FORMAT,                 None),
    ("max_completion_tokens",  Bounded(int, 1, math.inf),       None),
    *SHARED_FIELDS,
    ("logprobs",               bool,                            False),
    ("top_logprobs",           Bounded(int, 0, 20),             None),
    ("safety_identifier",      Bounded(str, 0, 64),             None),
    ("prompt_cache_key",       str,                             None),
    ("prompt_cache_retention", ("in_memory", "24h"),            None),
    ("prompt_cache_options",   dict,                            None),
    ("service_tier",           tuple(SERVED_TIERS),             "auto"),
    ("modalities",             Bounded([("text", "audio")], 1, 2), ("text",)),
    ("audio",                  dict,                            None),
    ("prediction",             dict,                            None),
    ("reasoning_effort",       EFFORTS,                         None),
    ("verbosity",              ("low", "medium", "high"),       None),
    ("store",                  bool,                            False),
    ("metadata",               Map(Bounded(str, 0, 512), 16),   None),
    ("web_search_options",     dict,                            None),
    ("moderation",             dict,                            None),
)
COMPLETION_FIELDS = Fields(
    # `parse_prompts` checks the four forms of a prompt.
    ("prompt?",                None,                            "<|endoftext|>"),
    *SHARED_FIELDS,
    ("best_of",                Bounded(int, 0, 20),             None),
    ("echo",                   bool,                            False),
    ("logprobs",               Bounded(int, 0, 5),              None),
    ("suffix",                 str,                             None),
)
ENABLED = "The '{0}' parameter is only allowed when '{1}' is enabled."
SPECIFIED = "Invalid value for '{0}': '{0}' is only allowed when '{1}' are specified."
NEEDS = (  # a field, another that must be there and true, and what the API says if not
    ("stream_options", "stream", ENABLED), ("top_logprobs", "logprobs", ENABLED),
    ("tool_choice", "tools", SPECIFIED), ("function_call", "functions", SPECIFIED),
)


def checked(body, fields):
    """The body with every field of the table in it: checked, or its default."""
    if body.get("model") in (None, ""):     # the API has other words for this one
        raise APIError(400, "you must provide a model parameter")
    fields("", body)
    # null is absence, except in an unknown field, which stays as it is.
    given = {name: value for name, value in body.items()
             if value is not None or name not in fields.fields}
    # In a completion, the fields of a chat are unknown, and pass unchecked.
    for name, other, message in NEEDS:
        if name in given and name in fields.fields and not given.get(other):
            raise APIError(400, message.format(name, other), name)
    stop = given.get("stop", [])        # a str or a list: always a list from here on
    given["stop"] = list(filter(None, [stop] if type(stop) is str else stop))
    return {**fields.defaults, **given, "body": body}


# An application may keep conversations in a looser form than the API takes.  What must
# hold between calls and answers is checked apart, so that strict=False can skip it.
ARGUMENTS = Object({"arguments!": str})
CALL_INPUTS = Object({"tool_calls": [typed(function=ARGUMENTS,
                                           custom=Object({"input!": str}))],
                      "function_call": ARGUMENTS})


def check_conversation(messages):
    """Refuse a tool call without its input or its answer, and an answer without its
    call.  The messages are the API's own, with "preceeding" and "messages.[0]".
    """
    # {id of a call of the last assistant message: has it an answer?}
    called = {}
    for i, message in enumerate([*messages, {"role": "end"}]):  # checks the last turn
        role, call_id = message["role"], message.get("tool_call_id")
        if role == "tool" and not called:
            raise APIError(400, "Invalid parameter: messages with role 'tool' must be "
                           "a response to a preceeding message with 'tool_calls'.",
                           f"messages.[{i}].role")
        elif role == "tool" and call_id not in called:
            raise APIError(400, "Invalid parameter: 'tool_call_id' of "
                           f"'{call_id[:200]}' not found in 'tool_calls' of previous "
                           "message.", f"messages.[{i}].tool_call_id")
        elif role == "tool":
            called[call_id] = True
        elif not all(called.values()):
            unanswered = ", ".join(id for id in called if not called[id])
            raise APIError(400, "An assistant message with 'tool_calls' must be "
                           "followed by tool messages responding to each "
                           "'tool_call_id'. The following tool_call_ids did not have "
                           f"response messages: {unanswered[:1000]}",
                           f"messages.[{min(i, len(messages) - 1)}].role")
        elif role == "assistant":
            check(f"messages[{i}]", message, CALL_INPUTS)
            called = {call["id"]: False for call in message.get("tool_calls") or ()}
        else:
            called = {}


def tool_key(tool):
    """The type and the name of a tool, as "tools" or a "tool_choice" has it.

    Example:
        >>> tool_key({"type": "function", "function": {"name": "search"}})
        ('function', 'search')
    """
    return tool["type"], tool[tool["type"]]["name"]


def chosen_tools(tool_choice, modes=("auto", "required")):
    """The tools that a "tool_choice" names.  An "allowed_tools" counts only if its mode
    is one of `modes`: "required" forces a call, and "auto" only permits it."""
    if type(tool_choice) is not dict:
        return []
    if tool_choice["type"] == "allowed_tools":
        allowed = tool_choice["allowed_tools"]
        return allowed["tools"] if allowed["mode"] in modes else []
    return [tool_choice]


def check_chosen(request):
    """A tool or function that is chosen by name must be in the request."""
    for key in map(tool_key, chosen_tools(request["tool_choice"])):
        if key not in map(tool_key, request["tools"]):
            raise APIError(400, f"Tool choice '{key[1]}' not found in 'tools' "
                           "parameter.", "tool_choice")
    call = request["function_call"]
    if type(call) is dict and call["name"] not in [
            function["name"] for function in request["functions"]]:
        raise APIError(400, "Invalid value for 'function_call': no function named "
                       f"'{call['name']}' was specified in the 'functions' parameter.",
                       "function_call")


def text_of(content):
    """The text of a message's content: a string, a list of parts, or null.

    Example:
        >>> text_of([{"type": "text", "text": "Look: "}, {"type": "file", "file": {}}])
        'Look: '
    """
    if type(content) is list:
        return "".join(part[part["type"]] for part in content
                       if part["type"] in ("text", "refusal"))
    return content or ""


def parse_chat(body, strict=True):
    """Check the body of POST /v1/chat/completions -> the request.

    Besides the fields of the body, each with its default, the request has `body` (as it
    was sent), `text` (the last user message), `prompt` (the same, so that one backend
    serves both endpoints) and `endpoint`.  For each call of the backend the server adds
    `id` and `index`.
    `strict` also checks that tool calls and their answers belong together.

    Example:
        >>> body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        >>> request = parse_chat({**body, "stop": "\\n", "n": None})
        >>> request["text"], request["stop"], request["n"], request["stream"]
        ('Hi', ['\\n'], 1, False)

    Raises APIError(400) with the API's own message, param and code.
    """
    request = checked(body, CHAT_FIELDS)
    if strict:
        check_conversation(request["messages"])
    check_chosen(request)
    if "audio" in request["modalities"]:
        raise APIError(400, "Unsupported value: 'modalities' does not support 'audio' "
                       "with this model.", "modalities", "unsupported_value")
    # The last user message; without one, the last message of all.
    users = [each for each in request["messages"] if each["role"] == "user"]
    text = text_of((users or request["messages"])[-1].get("content"))
    request.update(endpoint="chat", prompt=text, text=text)
    return request


def is_token_ids(prompt):
    return (type(prompt) is list and len(prompt) > 0
            and all(type(id) is int and id >= 0 for id in prompt))


def parse_prompts(prompt):
    """The four forms of "prompt" as one: a list with a str or a list of token ids each.

    Example:
        >>> parse_prompts("a"), parse_prompts(["a", "b"])
        (['a'], ['a', 'b'])
        >>> parse_prompts([17, 18]), parse_prompts([[17], [18]])
        ([[17, 18]], [[17], [18]])
    """
    for prompts in ([prompt], prompt):      # one prompt, or a list of them
        if type(prompts) is list and (all(type(each) is str for each in prompts)
                                      or all(map(is_token_ids, prompts))):
            return prompts
    raise mistyped("prompt", prompt, "one of a string, array of strings, array of "
                                     "integers, or array of integer arrays")


def parse_completion(body, strict=True):
    """Check the body of POST /v1/completions -> the request.

    `prompt` is as it was sent (see `parse_prompts`), and `best_of` is a number.  For
    each call of the backend the server adds `id`, `index`, and as `prompt` and `text`
    the text of one prompt.  There is no conversation for `strict` to check.

    Example:
        >>> request = parse_completion({"model": "m", "prompt": "Once", "n": 2})
        >>> request["prompt"], request["best_of"], request["endpoint"]
        ('Once', 2, 'completion')
    """
    request = checked(body, COMPLETION_FIELDS)
    n = request["n"]
    best_of = n if request["best_of"] is None else request["best_of"]
    if best_of < n:
        raise APIError(400, "You requested that the server return more choices than it "
                       f"will generate (HINT: you must set 'n' (currently {n}) to be at "
                       f"most 'best_of' (currently {best_of}), or omit either parameter "
                       "if you do not specifically want to use them.)", "best_of")
    if request["stream"] and best_of > n:
        raise APIError(400, "Cannot stream results with best_of > n.", "best_of")
    prompts = parse_prompts(request["prompt"])
    check("prompt", prompts, Bounded(list, 1, 128 // best_of))  # 128 choices in all
    request.update(endpoint="completion", best_of=best_of)
    return request


# ----------------------------------------------------------------------------------
# Pieces.  A model reads and writes tokens: words, or parts of words.  Limits and bills
# count tokens.  There is no model here, so tokens are an estimate: a word or a sign is
# one token.  `Server(tokenize=...)` takes a real tokenizer: a function from a text to
# the list of its tokens, whose join is the text.
#
# What a backend says is a series of pieces: str, ToolCall and Refusal.  `segments_of`
# makes segments of them: pairs of a kind and what is said in tokens, which can be
# counted and cut.
#
#     ("text", ["Hel", "lo"])         tokens of the text
#     ("refusal", ["No", "."])        tokens of a refusal
#     ("call", Call(name, id, ["{", "}"]))    a tool call; the tokens are its input
#     ("end", "stop")                 always the last one: the finish_reason

class ToolCall:
    """A piece that calls a tool: ToolCall("get_weather", {"city": "Bern"}).

    arguments: a dict, or JSON text that goes out as it is; for a custom tool its input,
    a str.  id: made up unless it is given.
    """

    def __init__(self, name, arguments=None, id=None):
        if not isinstance(name, str) or not isinstance(id, (str, type(None))):
            raise TypeError("the name and the id of a tool call must be strings")
        if not isinstance(arguments, str):
            arguments = to_json({} if arguments is None else arguments).decode()
        self.name, self.arguments, self.id = name, arguments, id

    def __repr__(self):
        return f"ToolCall({self.name!r}, {self.arguments!r})"


class Refusal(str):
    """A piece that refuses, in the words of the model."""


Call = collections.namedtuple("Call", "name id tokens")     # a tool call in a segment

CJK = "\u2e80-\u9fff\ua000-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(
    rf" ?[^\W{CJK}]+"                          # a word, with the space before it
    r"| ?[\U0001f1e6-\U0001f1ff]{2}"            # a flag is two letters that combine
    r"| ?\S"                                    # a CJK character, a sign, an emoji
    r"|\s+(?!\S)|\s+")                  # white space, except for a word's own space
ZERO_WIDTH_JOINER = "\u200d"


def combines(character):
    """Does this character change the one before it, such as an accent does?"""
    return (character == ZERO_WIDTH_JOINER or unicodedata.category(character)[0] == "M"
            or "\U0001f3fb" <= character <= "\U0001f3ff"        # an emoji's skin tone
            or "\U000e0020" <= character <= "\U000e007f")       # the tail of a flag


def recombined(tokens):
    """Join each token that starts with a combining character to the one before."""
    starts = [i for i, (before, token) in enumerate(zip(tokens, tokens[1:]), 1)
              if not (combines(token[0]) or before[-1] == ZERO_WIDTH_JOINER)]
    return ["".join(tokens[start:end])
            for start, end in zip([0, *starts], [*starts, None])]


def tokenize(text):
    """Split a text into tokens whose join is the text.

    A token is never cut inside a code point, nor between a character and what combines
    with it.

    Example:
        >>> tokenize("Hello, 世界 again")
        ['Hello', ',', ' 世', '界', ' again']
    """
    tokens = TOKEN.findall(text)
    return tokens if text.isascii() else recombined(tokens)


# Cut before a space where there is one, else before a letter.
SLICE = re.compile(r".{1,65536}(?= |\Z)|.{1,65536}(?=\w)|.{1,65536}", re.S)


def slices(text):
    """Cut a long text into slices of at most 65,536 characters, if possible at words.

    A list of tokens takes about forty times the memory of its text, so the tokens of a
    long prompt or reply are counted slice by slice.  (At the edge of a slice, a word,
    white space or characters that combine may be cut.)
    """
    return [text] if len(text) <= 65536 else SLICE.findall(text)


def segments_of(pieces, tokenize, make_id, finish_reason=None, one_by_one=False):
    """Pieces -> segments; the last one has the finish_reason.

    make_id: makes the id of a call that has none.  finish_reason: instead of "stop" or
    "tool_calls".  one_by_one: each token of a text is a segment, as a model streams it.

    Example:
        >>> pieces = ["Hi you", ToolCall("now")]
        >>> for segment in segments_of(pieces, tokenize, lambda: "call_1"):
        ...     print(segment)
        ('text', ['Hi', ' you'])
        ('call', Call(name='now', id='call_1', tokens=['{', '}']))
        ('end', 'tool_calls')
    """
    reason = "stop"
    for piece in pieces:
        if isinstance(piece, ToolCall):
            reason = "tool_calls"
            yield "call", Call(piece.name, piece.id or make_id(),
                               tokenize(piece.arguments))
        elif not isinstance(piece, str):
            raise BackendFault("a piece must be a str or a ToolCall, "
                               f"not {type(piece).__name__}")
        elif piece:
            kind = "refusal" if isinstance(piece, Refusal) else "text"
            if one_by_one:
                yield from ((kind, [token]) for token in tokenize(piece))
            else:
                yield kind, tokenize(piece)
    yield "end", finish_reason or reason


def prompts_of(request, tokenize):
    """All that the model would read: the text of each message, or each prompt.

    A prompt that came as token ids is a list of their texts; "".join gives the text of
    either form.  A tokenizer may have a method `decode(id) -> str`.  Without it, 17
    reads <|17|>.

    Example:
        >>> request = parse_completion({"model": "m", "prompt": [17, 18]})
        >>> prompts_of(request, tokenize)
        [['<|17|>', '<|18|>']]
    """
    if request["endpoint"] == "chat":
        return [text_of(message.get("content")) for message in request["messages"]]
    decode = getattr(tokenize, "decode", "<|{}|>".format)
    return [prompt if type(prompt) is str else [decode(id) for id in prompt]
            for prompt in parse_prompts(request["prompt"])]


def prompt_tokens(prompt, tokenize):
    """The tokens of one prompt, in lists: one for each slice of a text, or one in all
    for token ids."""
    return [prompt] if type(prompt) is list else map(tokenize, slices(prompt))


# ----------------------------------------------------------------------------------
# Sequences.  A sequence is the segments of one choice, cut at the limits and the stops
# of the request; its last one has the finish_reason.

def one_call(segments):
    """Drop all tool calls but the first, for clients that want no parallel calls."""
    calls = itertools.count()
    return ((kind, value) for kind, value in segments
            if kind != "call" or next(calls) == 0)


def up_to(segments, limit):
    """Cut after `limit` tokens.  A call that begins within the limit goes out whole.

    Example:
        >>> list(up_to([("text", ["Hel", "lo"]), ("end", "stop")], 1))
        [('text', ['Hel']), ('end', 'length')]
    """
    for kind, value in segments:
        if kind == "call" and limit > 0:
            limit -= len(value.tokens)
        elif kind == "call" or kind != "end" and len(value) > limit:
            if limit > 0:
                yield kind, value[:limit]
            yield "end", "length"
            return
        elif kind != "end":
            limit -= len(value)
        yield kind, value


def before_stop(text, stops):
    """How many characters come before any stop, and whether a stop is complete.

    The stop that is complete first counts.  Without one, the longest end of the text
    that a stop begins with (a partial match) may become one.

    Example:
        >>> before_stop("one two three", ["three", "two"])
        (4, True)
        >>> before_stop("The EN", ["END", "STOP"])
        (4, False)
    """
    found = [(text.find(stop) + len(stop), text.find(stop))
             for stop in stops if stop in text]
    if found:
        return min(found)[1], True
    start = max(len(text) - max(map(len, stops)) + 1, 0)
    partial = (i for i in range(start, len(text))
               if any(stop.startswith(text[i:]) for stop in stops))
    return next(partial, len(text)), False


def split_at_stop(tokens, stops):
    """Tokens -> (those before any stop, those held back, whether a stop is complete).

    Example:
        >>> split_at_stop(["Hel", "lo", " E"], ["END"])
        (['Hel', 'lo'], [' E'], False)
        >>> split_at_stop(["Hel", "lo", "!"], ["o!"])
        (['Hel', 'l'], ['lo', '!'], True)
    """
    text = "".join(tokens)
    end, is_stopped = before_stop(text, stops)
    count = sum(each <= end for each in itertools.accumulate(map(len, tokens)))
    before, held = tokens[:count], tokens[count:]
    if is_stopped and len("".join(before)) < end:       # the stop begins inside a token
        before.append(text[len("".join(before)):end])
    return before, held, is_stopped


def until_stop(segments, stops):
    """Text up to the first stop.

    A stop may span segments, so the end of a text that may become a stop (a partial
    match) is held back until more is known.  Nothing of a stop ever goes out.

    Example:
        >>> segments = [("text", ["one"]), ("text", [" E"]), ("text", ["ND"])]
        >>> list(until_stop(segments, ["END"]))
        [('text', ['one']), ('text', [' ']), ('end', 'stop')]
    """
    held = []                                   # tokens that may belong to a stop
    for kind, value in segments:
        if kind == "text":                      # stops are looked for in text alone
            before, held, is_stopped = split_at_stop(held + value, stops)
        else:
            before, held, is_stopped = held, [], False
        if before:
            yield "text", before
        if is_stopped:
            yield "end", "stop"
            return
        if kind != "text":
            yield kind, value


def is_legacy(request):
    """Does the request use `functions`, the older form of `tools`?"""
    return bool(request["functions"]) and not request["tools"]


def sequence(segments, request):
    """The segments of one choice -> the same, cut to the limits of the request.

    These generators do not close their source when they stop early: the server closes
    the generator of a backend when the exchange ends.
    """
    limits = {request["max_tokens"]}
    if request["endpoint"] == "chat":
        limits.add(request["max_completion_tokens"])
        if not request["parallel_tool_calls"] or is_legacy(request):
            segments = one_call(segments)
    limits.discard(None)                # None is no limit
    if limits:
        segments = up_to(segments, min(limits))
    if request["stop"]:
        segments = until_stop(segments, request["stop"])
    return segments


# ----------------------------------------------------------------------------------
# Chunks.  A chunk is one dict of the stream: what all chunks of it have in common,
# and one choice object with what is new.  A completion that is not streamed is `fold`
# of the very same chunks, so the two forms cannot disagree.

USAGE_DETAILS = {
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0,
                                  "accepted_prediction_tokens": 0,
                                  "rejected_prediction_tokens": 0},
}


class Usage:
    """The tokens of a request and of what is said to it: each prompt once, and all
    choices.  The generators of the choices add to `completion_tokens` while they run.

    It keeps the prompts (see `prompts_of`), so that `echo` can repeat them.
    `corrections` replace counted fields: a backend may know better.  None corrects
    nothing.

    Example:
        >>> usage = Usage(["Once upon"], tokenize)
        >>> usage.completion_tokens += 3
        >>> usage.counters()
        {'prompt_tokens': 2, 'completion_tokens': 3, 'total_tokens': 5}
    """

    def __init__(self, prompts=(), tokenize=tokenize, corrections=None):
        self.prompts, self.tokenize, self.completion_tokens = prompts, tokenize, 0
        self.corrections = {name: count for name, count in (corrections or {}).items()
                            if count is not None}

    def counters(self, details={}):
        counted = sum(len(tokens) for prompt in self.prompts
                      for tokens in prompt_tokens(prompt, self.tokenize))
        usage = {"prompt_tokens": counted, "completion_tokens": self.completion_tokens,
                 "total_tokens": 0,         # its place; the sum follows
                 **details, **self.corrections}
        total = usage["prompt_tokens"] + usage["completion_tokens"]
        usage["total_tokens"] = self.corrections.get("total_tokens", total)
        return usage


def chunks_of(request, choices, usage):
    """A chunk for each choice object.  Where the usage is wanted, one more has it, and
    no choices."""
    is_chat = request["endpoint"] == "chat"
    common = {"id": request["id"],
              "object": "chat.completion.chunk" if is_chat else "text_completion",
              "created": int(time.time()), "model": request["model"],
              "system_fingerprint": "fp_openai_compat"}
    if is_chat:
        common["service_tier"] = SERVED_TIERS[request["service_tier"]]
    common["choices"] = []          # stands before usage, as the API has it
    if not request["stream"] or (request["stream_options"] or {}).get("include_usage"):
        common["usage"] = None      # as the API says in every chunk but the last
    for choice in choices:
        yield {**common, "choices": [choice]}
    if "usage" in common:
        yield {**common, "usage": usage.counters(USAGE_DETAILS if is_chat else {})}


def in_turn(generators):
    """One item of each generator in turn, until all have ended.

    A choice that is slow holds up the others; the API runs them side by side.

    Example:
        >>> list(in_turn([iter("ace"), iter("bd")]))
        ['a', 'b', 'c', 'd', 'e']
    """
    running = collections.deque(generators)
    while len(running) > 1:
        items = running.popleft()
        for item in itertools.islice(items, 1):
            yield item
            running.append(items)
    for items in running:               # the one that is left, or the only one
        yield from items


# Log probabilities are made up, since there is no model: the token that was said comes
# first, and each other candidate is half as likely as the one before it.
OTHER_TOKENS = tokenize(" the, a. of and to in is it for as on was be at by we if or I")


def likely_tokens(token, count):
    """The token and the next likely ones, with their log probabilities.

    Example:
        >>> likely_tokens("Hi", 2)
        [('Hi', -0.693147), (' the', -1.386294)]
    """
    others = [other for other in OTHER_TOKENS if other != token]
    return [(each, round(-math.log(2) * rank, 6))
            for rank, each in enumerate([token, *others][:max(count, 1)], 1)]


def chat_logprobs(tokens, top, field="content"):
    """An object for each token, under its field; None if nobody asked for them."""
    if top is None:
        return None
    likely = [[{"token": each, "logprob": logprob,
                "bytes": list(each.encode("utf-8", "surrogatepass"))}
               for each, logprob in likely_tokens(token, top)] for token in tokens]
    return {"content": [], "refusal": None,
            field: [{**entries[0], "top_logprobs": entries if top else []}
                    for entries in likely]}


def text_logprobs(tokens, top, offset, is_prompt=False):
    """Four parallel arrays; None if nobody asked for them.

    The token itself is always among the candidates, even for `top` 0.  The first token
    of a prompt has no probability.

    Example:
        >>> text_logprobs(["Hi", " you"], 0, 10)["text_offset"]
        [10, 12]
    """
    if top is None:
        return None
    tokens = list(tokens)
    likely = [dict(likely_tokens(token, top)) for token in tokens]
    taken = [entry[token] for token, entry in zip(tokens, likely)]
    if is_prompt and tokens:
        taken[0] = likely[0] = None
    starts = list(itertools.accumulate(map(len, tokens), initial=offset))[:-1]
    return {"tokens": tokens, "token_logprobs": taken, "top_logprobs": likely,
            "text_offset": starts}


def opening_delta(kind):
    """The delta that says who speaks.  It stands alone: clients rely on it."""
    return {"role": "assistant", "content": "" if kind in ("text", "end") else None,
            "refusal": "" if kind == "refusal" else None}


def call_deltas(request, call, index):
    """A tool call opens with its id, its name and an empty input; its input follows in
    fragments that repeat only the index.

    Example:
        >>> request = {"tools": [], "functions": []}
        >>> for delta in call_deltas(request, Call("now", "call_1", ["{", "}"]), 0):
        ...     [fragment] = delta["tool_calls"]
        ...     print(fragment.get("id"), fragment["index"], fragment["function"])
        call_1 0 {'name': 'now', 'arguments': ''}
        None 0 {'arguments': '{'}
        None 0 {'arguments': '}'}
    """
    is_custom = ("custom", call.name) in map(tool_key, request["tools"])
    kind, field = ("custom", "input") if is_custom else ("function", "arguments")
    # Clients parse arguments as JSON, which "" is not.
    tokens = call.tokens or ([] if is_custom else ["{}"])
    opening = {"id": call.id, "type": kind}
    for part in [{"name": call.name, field: ""}, *({field: token} for token in tokens)]:
        yield ({"function_call": part} if is_legacy(request) else
               {"tool_calls": [{"index": index, **opening, kind: part}]})
        opening = {}


def chat_choice(index, delta, logprobs=None, finish_reason=None):
    return {"index": index, "delta": delta, "logprobs": logprobs,
            "finish_reason": finish_reason}


def chat_choices(request, index, segments, usage):
    """The choice object of each chunk of one sequence; the first one says who speaks.

    That first one waits for the first piece.  The status 200 goes out with the first
    chunk, so a backend that fails before its first piece can still get a status of its
    own.  The price: the client of a slow model sees nothing before the first piece.
    """
    top = (request["top_logprobs"] or 0) if request["logprobs"] else None
    numbers = itertools.count()         # of the tool calls
    for position, (kind, value) in enumerate(segments):
        if position == 0:
            yield chat_choice(index, opening_delta(kind), chat_logprobs([], top))
        if kind == "end":
            legacy = value == "tool_calls" and is_legacy(request)
            yield chat_choice(index, {}, None, "function_call" if legacy else value)
        elif kind == "call":
            usage.completion_tokens += len(value.tokens)
            for delta in call_deltas(request, value, next(numbers)):
                yield chat_choice(index, delta)
        else:
            usage.completion_tokens += len(value)
            field = "content" if kind == "text" else kind
            yield chat_choice(index, {field: "".join(value)},
                              chat_logprobs(value, top, field))


def chat_chunks(request, sequences, usage):
    """The sequences of a chat's choices -> its chat.completion.chunk objects.

    Example:
        >>> body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        >>> request = {**parse_chat({**body, "stream": True}), "id": "chatcmpl-1"}
        >>> segments = [("text", ["Hello"]), ("text", ["!"]), ("end", "stop")]
        >>> for chunk in chat_chunks(request, [segments], Usage()):
        ...     [choice] = chunk["choices"]
        ...     print(choice["index"], choice["delta"], choice["finish_reason"])
        0 {'role': 'assistant', 'content': '', 'refusal': None} None
        0 {'content': 'Hello'} None
        0 {'content': '!'} None
        0 {} stop
    """
    return chunks_of(request, in_turn([
        chat_choices(request, index, segments, usage)
        for index, segments in enumerate(sequences)]), usage)


def text_choice(index, text, logprobs, finish_reason=None):
    return {"text": text, "index": index, "logprobs": logprobs,
            "finish_reason": finish_reason}


def text_choices(request, index, prompt, segments, usage):
    """The choice object of each chunk of one sequence of a text completion."""
    asked, top = "".join(prompt), request["logprobs"]
    offset = len(asked)
    for position, (kind, value) in enumerate(segments):
        if kind not in ("text", "end"):
            raise BackendFault("a text completion cannot hold a tool call or a refusal")
        if position == 0 and request["echo"]:
            tokens = itertools.chain.from_iterable(
                prompt_tokens(prompt, usage.tokenize))
            yield text_choice(index, asked,
                              text_logprobs(tokens, top, 0, is_prompt=True))
        tokens, reason = (value, None) if kind == "text" else ([], value)
        usage.completion_tokens += len(tokens)
        text = "".join(tokens)
        yield text_choice(index, text, text_logprobs(tokens, top, offset), reason)
        offset += len(text)


def completion_chunks(request, sequences, usage):
    """The sequences of a completion's choices -> its text_completion objects.

    Each prompt has `best_of` sequences.  The API shows the `n` likeliest; here all are
    equally likely, so the first `n` are shown.

    Example:
        >>> body = {"model": "m", "prompt": "One,", "stream": True}
        >>> request = {**parse_completion(body), "id": "cmpl-1"}
        >>> segments = [("text", [" two"]), ("end", "stop")]
        >>> usage = Usage(prompts_of(request, tokenize), tokenize)
        >>> for chunk in completion_chunks(request, [segments], usage):
        ...     print(chunk["choices"])
        [{'text': ' two', 'index': 0, 'logprobs': None, 'finish_reason': None}]
        [{'text': '', 'index': 0, 'logprobs': None, 'finish_reason': 'stop'}]
    """
    best_of, n, running = request["best_of"], request["n"], []
    for i, segments in enumerate(sequences):
        place, rank = divmod(i, best_of)    # of the prompt, and of the sequence in it
        index = place * n + rank if rank < n else None      # None: counted, not shown
        running.append(text_choices(request, index, usage.prompts[place], segments,
                                    usage))
    shown = (each for each in in_turn(running) if each["index"] is not None)
    return chunks_of(request, shown, usage)


def merged(values):
    """One value for several: strings are joined, lists are extended, objects are merged
    field by field, and of anything else the first counts.  A field that is null adds
    nothing.

    Example:
        >>> merged([{"content": "", "refusal": None}, {"content": "Hi"}, {}])
        {'content': 'Hi', 'refusal': None}
    """
    kind = type(values[0])
    if kind is str:
        return "".join(values)
    if kind is list:
        return [*itertools.chain.from_iterable(values)]
    if kind is not dict:
        return values[0]
    fields = {}
    for each in values:
        for name, value in each.items():
            if fields.get(name) is None:
                fields[name] = None if value is None else [value]
            elif value is not None:
                fields[name].append(value)
    return {name: merged(same) if same else None for name, same in fields.items()}


def merged_by_index(objects):
    """Merge the choice objects, or the fragments of tool calls, of the same index.

    Example:
        >>> request = {"tools": [], "functions": []}
        >>> deltas = call_deltas(request, Call("now", "call_1", ["{", "}"]), 0)
        >>> [call] = merged_by_index(delta["tool_calls"][0] for delta in deltas)
        >>> call["id"], call["function"]
        ('call_1', {'name': 'now', 'arguments': '{}'})
    """
    by_index = operator.itemgetter("index")
    return [merged([*same]) for _, same in
            itertools.groupby(sorted(objects, key=by_index), key=by_index)]


def with_message(choice):
    """A choice as a completion has it, with a message where chunks have a delta."""
    message = choice.pop("delta")
    if "tool_calls" in message:
        message["tool_calls"] = merged_by_index(message["tool_calls"])
        for call in message["tool_calls"]:
            del call["index"]           # it told fragments apart
    return {"index": choice["index"], "message": message, **choice}


def fold(chunks):
    """The chunks of one stream -> the completion that they spell.

    Example:
        >>> completion = fold([
        ...     {"id": "1", "object": "chat.completion.chunk", "choices": [
        ...         chat_choice(0, {"role": "assistant", "content": "Hel"})]},
        ...     {"id": "1", "object": "chat.completion.chunk", "choices": [
        ...         chat_choice(0, {"content": "lo"}, finish_reason="stop")]}])
        >>> completion["object"], completion["choices"][0]["message"]
        ('chat.completion', {'role': 'assistant', 'content': 'Hello'})

    All but the choices is as in the last chunk, which has the usage.  Raises ValueError
    without any chunk.
    """
    *others, last = chunks
    choices = [choice for chunk in [*others, last] for choice in chunk["choices"]]
    return {**last, "object": last["object"].replace(".chunk", ""),
            "choices": [with_message(choice) if "delta" in choice else choice
                        for choice in merged_by_index(choices)]}


# ----------------------------------------------------------------------------------
# Events.  A streamed response is a series of server-sent events (WHATWG HTML, 9.2).

DONE = b"data: [DONE]\n\n"
JSON_HEADERS = {"content-type": "application/json"}
EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache, no-transform",
                "x-accel-buffering": "no"}      # otherwise nginx collects a full buffer


def event(value):
    """One event: a line of JSON, which contains no line end, and a blank line.

    Example:
        >>> event({"n": 1})
        b'data: {"n":1}\\n\\n'
    """
    return b"data: %b\n\n" % to_json(value)


def events(chunks):
    """Chunks -> their events, then [DONE].  A stream without [DONE] was cut off.

    Example:
        >>> list(events([{"n": 1}, {"n": 2}]))
        [b'data: {"n":1}\\n\\n', b'data: {"n":2}\\n\\n', b'data: [DONE]\\n\\n']
    """
    for chunk in chunks:
        yield event(chunk)
    yield DONE


# What goes out in reply to one request.  status: an int.  headers: {lower-case name:
# str}.  body: bytes, or an iterable of writes, which are bytes that go out in one send
# each, as soon as they come.  ready: all writes are there already; the handler may then
# put several into one send.
Response = collections.namedtuple("Response", "status headers body ready",
                                  defaults=(b"", False))


def json_response(value, headers={}, status=200):
    return Response(status, {**JSON_HEADERS, **headers}, to_json(value))


def error_response(error):
    return json_response(error.body(), error.headers, error.status)


# ==================================================================================
# PART 2  BACKENDS
#
# What answers a request, and deliberate faults.  A backend is a function of the request
# alone.  Whatever waits here (for time, for a program, for an upstream's response) is
# interrupted as soon as the client leaves.
# ==================================================================================

# ----------------------------------------------------------------------------------
# Waiting.  Each connection has a thread of its own.  Whatever waits in that thread also
# watches the client's socket, so that a client that leaves is noticed at once.

class EndReply(BaseException):
    """Ends a reply on purpose.  It is no Exception, so that no backend catches it."""


class ClientLeft(EndReply):
    """The client has closed its side of the connection."""


LONGEST_WAIT = 10.0**6          # seconds; poll() counts milliseconds in 31 bits
MOST_READ_AHEAD = 2**20         # bytes that are kept while nobody reads them
NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def ready_files(files, seconds):
    """Those of the files that can be read within so many seconds."""
    if not files:                       # select() on Windows fails without any file
        time.sleep(seconds)
        return []
    if not hasattr(select, "poll"):     # Windows, where select() takes any descriptor
        return select.select(files, [], [], seconds)[0]
    poll = select.poll()                # a selector takes ten times as long to set up
    for file in files:
        poll.register(file, select.POLLIN)
    found = dict(poll.poll(seconds * 1000))
    return [file for file in files if file.fileno() in found]


class Connection:
    """The socket of one client, the bytes that came from it, and whether it has left.
    A client that half-closes has left, too.

    Reads and writes block: a timeout of Python's would cost a system call for each.  A
    thread calls `end_if_late` twice a second; it ends those that take too long.

    seconds: how long a request may take to arrive, and a client to read 64 KiB.
    deadline: of the read or write that goes on, on the clock time.monotonic.  trace:
    None, or a function of "<" or ">" and the bytes that went or came.
    """

    trace = None

    def __init__(self, sock, seconds):
        self.sock, self.seconds, self.deadline = sock, seconds, math.inf
        self.buffer = bytearray()       # what has arrived and was not taken yet
        self.ended = False              # no more will come: the client has closed
        self.stopping = False           # the server is about to close the connection
        self.idle = True                # no request has begun

    def receive(self):
        """Wait for bytes, or for their end, and keep them."""
        try:
            block = self.sock.recv(65536)
            self.buffer += block
            self.ended = not block
        except OSError as error:        # maybe only a part of a TLS record: see `wait`
            self.ended = not isinstance(error, NOT_NOW)

    def read_more(self):
        """Wait for more bytes of a request, until its deadline."""
        self.receive()
        if self.ended and not self.idle and time.monotonic() > self.deadline:
            raise APIError(408, "The request took too long to arrive.")
        if self.ended:
            raise ClientLeft

    def end_if_late(self):
        """End the read or write of this connection's thread if it takes too long."""
        late = time.monotonic() - self.deadline
        if late > 0:    # in the first second only reading: a 408 can still be sent
            self.shut(socket.SHUT_RD if late < 1 else socket.SHUT_RDWR)

    def is_full(self):
        return len(self.buffer) > MOST_READ_AHEAD

    def wait(self, seconds, *sources):
        """Wait so long, or until one of the files `sources` can be read.

        Raises ClientLeft if the client closes, and a 503 if the server is stopping.
        What the client sends meanwhile is kept.  When the buffer is full nothing more
        is read, and a client that leaves is only noticed by the next send.
        """
        end = time.monotonic() + seconds
        while not (self.ended or self.stopping):
            full = self.is_full()       # then it asks each second if the server stops
            left = max(min(end - time.monotonic(), 1 if full else LONGEST_WAIT), 0)
            found = ready_files(sources if full else [self.sock, *sources], left)
            if self.sock in found:
                self.sock.setblocking(False)    # or a partial TLS record would block
                self.receive()
                self.sock.setblocking(True)
            elif found or not left:
                return
        if self.stopping:
            raise APIError(503, "The server is shutting down.",
                           headers={"retry-after": "1"})
        raise ClientLeft

    def send(self, block):
        """Send all of it; ClientLeft if the client closes or does not read in time."""
        if self.trace:
            self.trace("<", block)
        try:
            for start in range(0, len(block), 65536):
                self.deadline = time.monotonic() + self.seconds
                self.sock.sendall(block[start:start + 65536])
        except OSError:
            raise ClientLeft from None
        self.deadline = math.inf

    def shut(self, how):
        """Shut a direction of TCP, from any thread.  An SSLSocket's own method would
        also forget the TLS state, which its thread may still need."""
        with suppress(OSError):
            socket.socket.shutdown(self.sock, how)


# `this_thread.connection` is the one that a thread serves.  A backend gets only the
# request, so a connection cannot be passed to it; without a server there is none.
this_thread = threading.local()


def pause(seconds, *sources):
    """Sleep, or wait until one of the files `sources` can be read.  Raises ClientLeft
    as soon as the client leaves.  pause(0) only looks.

    Without a server there is no client to watch.  With `sources` it returns at once
    then, and the read that follows blocks.
    """
    if hasattr(this_thread, "connection"):
        this_thread.connection.wait(seconds, *sources)
    elif not sources:
        time.sleep(seconds)


# ----------------------------------------------------------------------------------
# Quirks.  Deliberate faults, for tests of a client.  A quirk is a function of the
# writes of a response and of k -> the writes to send instead, one send each.  k: how
# many events pass first.  `stall@3` lets three pass and is then silent; a quirk that is
# everywhere ignores k.

class Cut(EndReply):
    """Ends the connection: Cut("fin"), Cut("reset"), or Cut("stall") for silence."""


class Instead(EndReply):
    """Ends a reply in favour of another response: Instead(response)."""


def no_done(writes, k):
    """All but [DONE]."""
    return filter(DONE.__ne__, writes)


def over_chunks(change):
    """A quirk that changes dicts: change(chunks) wraps the chunks."""
    def quirk(writes, k):
        written = (write[len("data: "):] for write in no_done(writes, k))
        return events(change(map(json.loads, written)))
    return quirk


def each_choice(change):
    """A quirk that changes each choice object of each chunk in place."""
    def changed(chunks):
        for chunk in chunks:
            for choice in chunk["choices"]:
                change(choice)
            yield chunk
    return over_chunks(changed)


def calls_in(choice):
    return choice.get("delta", {}).get("tool_calls", ())


@over_chunks
def usage_always(chunks):
    """A usage in every chunk and in a chunk of its own, though nobody asked for it."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        yield {**chunk, "usage": usage}
    yield {**chunk, "choices": [], "usage": usage}


@over_chunks
def duplicate_tool_id(chunks):
    """Each fragment of a tool call repeats the call's id and name."""
    opened = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            for call in calls_in(choice):
                first = opened.setdefault((choice["index"], call["index"]), call)
                kind = first["type"]
                call.update({**first, kind: {**first[kind], **call[kind]}})
        yield chunk


def cut_after(how, writes, k):
    """Let k events pass (None: all), then end the connection."""
    yield from itertools.islice(writes, k)
    raise Cut(how)


def html_502(writes, k):
    """An HTML page with status 502, as a proxy would send it."""
    raise Instead(Response(502, {"content-type": "text/html"},
                           b"<html><body><h1>502 Bad Gateway</h1></body></html>\n"))


QUIRKS = {
    # A comment block before each event.
    "comment": lambda writes, k: (b": comment\n\n" + write for write in writes),
    # Lines that end with CR LF.
    "crlf": lambda writes, k: (write.replace(b"\n", b"\r\n") for write in writes),
    # No space after the colon.
    "no_space": lambda writes, k: (
        write.replace(b"data: ", b"data:", 1) for write in writes),
    # A byte order mark at the start.
    "bom": lambda writes, k: (
        write if i else codecs.BOM_UTF8 + write for i, write in enumerate(writes)),
    # An id in each event, then comment blocks: old SDKs parse those as events.
    "id_field": lambda writes, k: (
        b"id: %d\n%b: comment\n\n" % (i, write) for i, write in enumerate(writes)),
    # Blocks with a retry field and no data.
    "retry_block": lambda writes, k: (b"retry: 1000\n\n" + write for write in writes),
    # Events whose data is empty.
    "empty_data": lambda writes, k: (b"data:\n\n" + write for write in writes),
    # One byte a send.
    "split_bytes": lambda writes, k: (
        bytes([byte]) for write in writes for byte in write),
    # All in one send.
    "one_write": lambda writes, k: iter([b"".join(writes)]),
    "no_done": no_done,
    # Neither a finish_reason nor [DONE]: the stream just ends.
    "no_finish": lambda writes, k: no_done(each_choice(
        lambda choice: choice.update(finish_reason=None))(writes, k), k),
    # Closed without the last transfer chunk.
    "no_terminator": lambda writes, k: cut_after("fin", writes, None),
    # One event that is cut short inside its JSON.
    "bad_json": lambda writes, k: (
        write[:len(write) // 2] + b"\n\n" if i == k else write
        for i, write in enumerate(writes)),
    # An error event in place of the rest.
    "error_event": lambda writes, k: itertools.chain(
        itertools.islice(writes, k), [event(server_error().body())]),
    # Closed cleanly after k events, as if complete.
    "truncate": itertools.islice,
    # Silence until the client leaves.
    "stall": functools.partial(cut_after, "stall"),
    # A TCP reset.
    "reset": functools.partial(cut_after, "reset"),
    "html_502": html_502,
    # The first delta does not say who speaks.
    "no_role": each_choice(lambda choice: choice.get("delta", {}).pop("role", None)),
    # Every delta says who speaks.
    "role_every": each_choice(lambda choice: "delta" in choice and choice.update(
        delta={"role": "assistant", **choice["delta"]})),
    "usage_always": usage_always,
    # Fragments of tool calls do not say which call they belong to.
    "missing_tool_index": each_choice(
        lambda choice: [call.pop("index") for call in calls_in(choice)]),
    "duplicate_tool_id": duplicate_tool_id,
}
# These also bend a reply that is not streamed, with k = 0.
UNSTREAMED_QUIRKS = ("split_bytes", "stall", "reset", "html_502")


def parse_quirk(text):
    """The name of a quirk and its k, which is 2 unless it is given.

    Example:
        >>> parse_quirk("stall@3"), parse_quirk("reset"), parse_quirk(None)
        (('stall', 3), ('reset', 2), (None, 0))

    Raises ValueError for an unknown quirk.
    """
    if text is None:
        return None, 0
    name, at, k = str(text).partition("@")
    if name not in QUIRKS or at and not re.fullmatch("[0-9]{1,9}", k):
        raise ValueError(f"there is no quirk {text!r}, only {', '.join(QUIRKS)}")
    return name, int(k) if at else 2


# ----------------------------------------------------------------------------------
# Schema samples.  A forced tool call and a structured output need an instance of a
# JSON Schema (draft 2020-12).  `sample` makes a candidate, then checks the whole of it
# against the schema as it was given: what the making overlooks, the check refuses.
#
# Several schemas can apply to one value: its own, the target of its $ref, each of its
# allOf, one branch of each anyOf.  They are kept as a list, `here`, and are not merged.
# `make` tries candidates until one passes the check, `obeys`.  `candidates` picks a
# branch of each anyOf and collects the schemas that apply; `values` has what they list,
# or what a `make_...` builds for their type.
# A full validator knows every keyword and runs patterns; this one refuses what it
# cannot judge.

SAMPLE_WORK = 250_000       # characters and steps that one sample may cost
NEAR = sorted(range(100, -100, -1), key=abs)    # 0, 1, -1, 2, -2, ...
JSON_TYPES = {dict: {"object"}, list: {"array"}, str: {"string"}, bool: {"boolean"},
              type(None): {"null"}, int: {"integer", "number"}, float: {"number"}}
CONSTANTS = {"boolean": [False, True], "null": [None]}
FORMATS = {  # None: any string
    "date": "2024-01-01", "time": "00:00:00Z", "date-time": "2024-01-01T00:00:00Z",
    "duration": "P1D", "email": "user@example.com", "hostname": "example.com",
    "uri": "https://example.com/", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1",
    "ipv4network": "192.0.2.0/24", "password": None, "binary": None,
    **{f"uuid{version}": f"00000000-0000-{version or 4}000-8000-000000000000"
       for version in ("", 1, 2, 3, 4, 5)},
}


def plain_json(value):
    """A copy with none but JSON's own types, where 2.0 is the integer that it means.

    Example:
        >>> plain_json({"a": (2.0, 2.5)})
        {'a': [2, 2.5]}
    """
    return json.loads(to_json(value), parse_float=lambda text: (
        int(float(text)) if float(text) % 1 == 0 else float(text)))


def canonical(value):
    """Text that equal JSON values share: 0 and 0.0 do, 1 and true do not.

    Example:
        >>> canonical({"b": 0.0, "a": True})
        '{"a": true, "b": 0}'
    """
    return json.dumps(plain_json(value), sort_keys=True)


def is_one(value, values):
    return any(value == each and canonical(value) == canonical(each) for each in values)


RULES = {keyword: (kind, rule) for places, rule in (
    # A type of values and a keyword that is about it, and whether a value obeys: a
    # function of the value and the keyword's argument.  None: that is not known here.
    # `it` is the value, or the argument: for "type" a word, or a list of words.
    ("any type", lambda value, it: any(kind in it for kind in JSON_TYPES[type(value)])),
    ("any enum", is_one), ("any const", lambda value, it: is_one(value, [it])),
    ("number minimum", operator.ge), ("number exclusiveMinimum", operator.gt),
    ("number maximum", operator.le), ("number exclusiveMaximum", operator.lt),
    ("number multipleOf", lambda value, step: (     # of floats as other validators do
        value % step if isinstance(step, int) else value / step % 1) == 0),
    ("string minLength, array minItems, object minProperties",
     lambda value, least: len(value) >= least),
    ("string maxLength, array maxItems, object maxProperties",
     lambda value, most: len(value) <= most),
    # Another text than ours, or another format (0), is not known to be right.
    ("string format", lambda it, form: FORMATS.get(form, 0) in (None, it) or None),
    ("array uniqueItems", lambda value, on: (
        not on or len(set(map(canonical, value))) == len(value))),
    ("object required", lambda value, names: value.keys() >= set(names)),
    ("any not, any if, any $id, any $dynamicRef, string pattern, array contains, "
     "array additionalItems, array unevaluatedItems", lambda value, _: None),
    ("object patternProperties, object dependencies, object dependentRequired, "
     "object dependentSchemas, object unevaluatedProperties",
     lambda value, _: not value or None),
) for kind, keyword in map(str.split, places.split(", "))}


def stated(here, *keywords):
    """What the schemas of a list state with these keywords."""
    return [schema[each] for each in keywords for schema in here if each in schema]


def property_schema(schema, name):
    rest = schema.get("additionalProperties", True)
    return schema.get("properties", {}).get(name, rest)


def item_schemas(schema):
    """The schemas of the items in turn.  A list of items is an older prefixItems."""
    first, rest = schema.get("prefixItems", ()), schema.get("items", True)
    older = isinstance(rest, list)
    return itertools.chain(rest if older else first, itertools.repeat(older or rest))


class Sampler:
    """One sample in the making.

    root: its schema.  left: the work that is left.  fault: the keyword that was looked
    at last.  When nothing can be made, that is the one to blame.
    """

    left, fault = SAMPLE_WORK, "type"

    def spend(self, *sized):
        self.left -= 1 + sum(map(len, sized))
        if self.left < 0:
            raise OverflowError("the instance or the work would be too large")

    def also(self, schema):
        """What holds wherever a schema does: its allOf, and what its $ref points to.

        A $ref is "#", or a pointer (RFC 6901) such as "#/$defs/a".
        """
        yield from schema.get("allOf", ())
        for ref in stated([schema], "$ref"):
            self.spend(ref)
            self.fault, place = "$ref", {"#": self.root}
            for step in unquote(ref).split("/"):
                name = step.replace("~1", "/").replace("~0", "~")
                place = place[int(name) if isinstance(place, list) else name]
            yield place

    # ------ the check

    def obeys(self, value, schema, trusting=False, keyword="allOf"):
        """Whether a value obeys a schema.  A ValueError says that this is not known.

        schema: a JSON Schema, or a verdict: True, False, or None for unknown.
        trusting: the value is a default or an example, or is in one, so its strings are
        trusted to match their patterns and formats.  keyword: the one to blame.
        """
        self.fault = keyword
        if schema is None:
            raise ValueError("it is not known here")
        if isinstance(schema, bool):
            return schema
        self.spend(schema, *(each for each in schema.values() if type(each) is list))
        trusting |= value in stated([schema], "default") + schema.get("examples", [])
        return all(itertools.starmap(self.obeys, self.parts(value, schema, trusting)))

    def parts(self, value, schema, trusting):
        """What `obeys` looks at, each as the arguments for it."""
        for keyword, (kind, rule) in RULES.items():
            if keyword in schema and kind in {"any", *JSON_TYPES[type(value)]}:
                is_trusted = trusting and keyword in ("pattern", "format")
                yield value, is_trusted or rule(value, schema[keyword]), True, keyword
        yield from ((value, each, trusting) for each in self.also(schema))
        for keyword in {"anyOf", "oneOf"} & schema.keys():
            fits = (self.obeys(value, each, trusting) for each in schema[keyword])
            is_met = any(fits) and (keyword == "anyOf" or not any(fits))
            yield value, is_met, True, keyword
        for name, each in value.items() if type(value) is dict else ():
            yield each, property_schema(schema, name), trusting, "additionalProperties"
            yield name, schema.get("propertyNames", True), trusting, "propertyNames"
        items = zip(value, item_schemas(schema)) if type(value) is list else ()
        yield from ((each, inner, trusting, "items") for each, inner in items)

    # ------ the making

    def make(self, schemas, name, above=frozenset(), others=()):
        """A value that obeys all the schemas and is none of the others."""
        # A False is left to the check of what this value will be in: it has a keyword.
        joined = {"allOf": [each for each in schemas if each is not False]}
        for values in self.candidates([joined], name, above):
            with suppress(ValueError):
                for value in map(plain_json, values):
                    self.spend(to_json(value))
                    if is_one(value, others):
                        self.fault = "uniqueItems"
                    elif self.obeys(value, joined):
                        return value
        raise ValueError("it cannot be satisfied, or is not known here")

    def candidates(self, todo, name, above, here=()):
        """Iterables of values to try, reading the schemas `todo` in turn.

        `above` has the ids of the schemas that this place is inside of: a schema inside
        itself has no candidate, so a linked list ends with its other branch, null.
        """
        todo = [each for each in todo if not isinstance(each, bool)]
        self.spend(todo)
        if not todo:
            yield from self.values(here, name, above.union(map(id, here)))
        elif id(todo[0]) not in above:
            schema, *rest = todo
            for branches in itertools.product(*stated([schema], "anyOf", "oneOf")):
                more = [*rest, *self.also(schema), *branches]
                yield from self.candidates(more, name, above, (*here, schema))

    def values(self, here, *place):
        """The candidates of one reading: what its schemas list, or a type makes."""
        examples = [each[0] for each in stated(here, "examples") if each]
        listed = stated(here, "const") + sum(stated(here, "enum"), [])
        yield from ([each] for each in stated(here, "default") + examples + listed)
        kinds = sum(([each] if isinstance(each, str) else each
                     for each in stated(here, "type")), [])
        for kind in [] if listed else kinds or ["object"]:
            yield CONSTANTS.get(kind) or getattr(self, f"make_{kind}")(here, *place)

    def make_object(self, here, name, inside):
        """The required properties and enough others; then all of the properties."""
        least = max(stated(here, "minProperties"), default=0)
        required = [*dict.fromkeys(sum(stated(here, "required"), []))]
        names = [*dict.fromkeys(itertools.chain(required, *stated(here, "properties")))]
        key = [{"type": "string"}, *stated(here, "propertyNames")]
        while len(names) < least:
            names.append(self.make(key, "key", inside, names))
        for count in (max(least, len(required)), len(names)):
            yield {each: self.make([property_schema(schema, each) for schema in here],
                                   each or "text", inside) for each in names[:count]}

    def make_array(self, here, name, inside):
        least, made = max(stated(here, "minItems"), default=0), []
        others = made if any(stated(here, "uniqueItems")) else ()
        for _, *schemas in zip(range(least), *map(item_schemas, here)):
            made.append(self.make(schemas, name, inside, others))
        yield made

    def make_string(self, here, name, inside):
        """The format's, else the name at its least length; then name2, name3, ..."""
        low = min(max(stated(here, "minLength"), default=0), SAMPLE_WORK)
        high = min(stated(here, "maxLength"), default=SAMPLE_WORK)
        yield from filter(None, map(FORMATS.get, stated(here, "format")))
        for mark in ("", *map(str, range(2, 100))):
            yield name.ljust(low - len(mark), "x")[:max(0, high - len(mark))] + mark

    def make_number(self, here, name, inside):
        """The number nearest to 0, one between the bounds, and multiples near them.
        They only have to be likely: `obeys` decides."""
        low = max(stated(here, "minimum", "exclusiveMinimum"), default=-1)
        high = min(stated(here, "maximum", "exclusiveMaximum"), default=abs(low) + 1)
        start, step = min(max(0, low), high), max(stated(here, "multipleOf"), default=1)
        return (start, (low + high) / 2, *((start // step + n) * step for n in NEAR))

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
    sampler = Sampler()
    try:
        root = sampler.root = plain_json(schema)
        if isinstance(root, dict):
            root.pop("$id", None)                   # it says nothing at the root
        # In an allOf, because `make` leaves out a bare False.
        return sampler.make([{"allOf": [root]}], "text")
    except Exception as why:        # what is no JSON Schema may fail anywhere
        why = f"No instance can be made, for the keyword '{sampler.fault}': {why}."
        raise APIError(400, why, code="invalid_json_schema") from None


# ----------------------------------------------------------------------------------
# Backends.  A backend is called once per choice.  It returns a str, a Reply, a
# ToolCall, or an iterable of pieces (str or ToolCall); it may raise APIError.

def is_number(value):
    return type(value) in (int, float) and 0 <= value < math.inf


def delay_pair(delay):
    """Seconds before the first piece, and between pieces.

    Example:
        >>> delay_pair(0.1), delay_pair((1, 0))
        ((0.1, 0.1), (1, 0))
    """
    pair = delay if isinstance(delay, (list, tuple)) else (delay, delay)
    if len(pair) != 2 or not all(map(is_number, pair)):
        raise TypeError(f"a delay must be seconds, or (first, between), not {delay!r}")
    return pair


REPLY_TYPES = {
    "text": (str, list, tuple), "tool_calls": (list, tuple), "refusal": str,
    "finish_reason": str, "usage": dict, "quirk": str, "headers": dict,
    "error": APIError, "expect": (dict, collections.abc.Callable),
}
ITEM_TYPES = {"text": (str, ToolCall), "tool_calls": ToolCall}  # what such lists hold


class Reply:
    """What a backend says, with everything that can be said about it.

    text: a str, or a list of the pieces to send.  usage: fields that replace those
    that were counted.  delay: seconds before each piece, or (before the first, before
    each other one).  quirk: a name of QUIRKS.  headers: go out with the response.
    error: an APIError to answer with, after the delay and the text.  expect: see
    Script.

    Raises TypeError or ValueError for a value that cannot be used.
    """

    text = tool_calls = refusal = finish_reason = usage = quirk = error = None
    delay, headers = 0, {}              # what `as_reply` does not set

    def __init__(self, text=None, tool_calls=(), refusal=None, finish_reason=None,
                 usage=None, delay=0, quirk=None, headers=None, error=None,
                 expect=None):
        if isinstance(tool_calls, ToolCall):
            tool_calls = [tool_calls]
        text = () if text is None else text
        given = locals()
        for name, types in REPLY_TYPES.items():
            value = given[name]
            items = value if isinstance(value, (list, tuple)) else ()
            if not (isinstance(value, types) or value is None) or not all(
                    isinstance(item, ITEM_TYPES[name]) for item in items):
                raise TypeError(f"the {name} of a Reply cannot be {value!r}")
            setattr(self, name, value)
        delay_pair(delay)
        parse_quirk(quirk)
        self.delay, self.headers = delay, header_fields(headers)

    def __repr__(self):
        given = (f"{name}={value!r}" for name, value in vars(self).items() if value)
        return f"Reply({', '.join(given)})"

    def is_ready(self):
        """Is everything at hand, so that several pieces may share a send?"""
        return not self.delay and isinstance(self.text, (str, list, tuple))


def as_reply(result):
    """What a backend returned, as a Reply; its `text` may be any iterable of pieces."""
    if isinstance(result, Reply):
        return result
    if isinstance(result, ToolCall):
        result = [result]
    if isinstance(result, (bytes, dict)) or not hasattr(result, "__iter__"):
        raise BackendFault("a backend must return a str, a Reply or an iterable of "
                           f"pieces, not {type(result).__name__}")
    reply = Reply.__new__(Reply)        # unchecked: `result` may be any iterable
    reply.text = result
    return reply


def while_connected(pieces):
    """The pieces of an iterable; ClientLeft instead of one that nobody reads."""
    for piece in pieces:
        pause(0)
        yield piece


def pieces_of(reply):
    """All that a reply says: its refusal, its text, its tool calls."""
    refusal = [Refusal(reply.refusal)] if reply.refusal else ()
    text = slices(reply.text) if isinstance(reply.text, str) else reply.text
    if not reply.is_ready():
        text = while_connected(text)
    return itertools.chain(refusal, text, reply.tool_calls or ())


def paced(segments, delay, error):
    """Each segment so many seconds after the one before; the error is the end."""
    first, between = delay_pair(delay)
    for i, (kind, value) in enumerate(segments):
        if error or kind != "end":
            pause(between if i else first)
        if error and kind == "end":
            raise error
        yield kind, value


def forced_tool(request):
    """The name of the tool that the request insists on, or None."""
    choice, call = request["tool_choice"], request["function_call"]
    if type(call) is dict:
        return call["name"]
    chosen = (request["tools"] if choice == "required"
              else chosen_tools(choice, modes=("required",)))
    return tool_key(chosen[0])[1] if chosen else None


def sample_input(request, name):
    """Arguments that fit the schema of the tool of that name; text for a custom one."""
    functions = [*request["functions"], *(tool["function"] for tool in request["tools"]
                                          if tool["type"] == "function")]
    schemas = {each["name"]: each.get("parameters") or {} for each in functions}
    return sample(schemas[name]) if name in schemas else request["text"]


def echo(request):
    """The default backend: says what is being asked.

    When a chat forces a tool, it calls the tool; for a "response_format" it makes JSON.
    """
    if request["endpoint"] == "completion":
        return request["text"]
    name = forced_tool(request)
    if name is not None:
        return ToolCall(name, sample_input(request, name))
    form = request["response_format"] or {"type": "text"}
    if form["type"] == "json_object":
        return to_json({"text": request["text"]}).decode()
    if form["type"] == "json_schema":
        return to_json(sample(form["json_schema"].get("schema") or {})).decode()
    return request["text"]


COROUTINE = 0x80 | 0x200        # inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def as_backend(value):
    """A backend from one, or from a constant; TypeError for anything else."""
    if isinstance(value, APIError):
        value = Reply(error=value)
    if isinstance(value, (str, Reply, ToolCall)):
        def say(request):
            return value
        return say
    is_async = getattr(getattr(value, "__code__", None), "co_flags", 0) & COROUTINE
    if callable(value) and not is_async:
        return value
    raise TypeError("a backend must be a function of the request (not async), a str, a "
                    f"Reply, a ToolCall or an APIError, not {value!r:.200}; say(...) "
                    "says pieces, Script(...) takes a step per request")


def say(*pieces):
    """A backend that always says these pieces."""
    return as_backend(Reply(list(pieces)))


def model_name(backend):
    """The name that /v1/models lists for a backend."""
    names = (getattr(backend, "model", None), getattr(backend, "__name__", None),
             type(backend).__name__)
    return next(name for name in names if isinstance(name, str) and name)


# ------ Script: a step per request, and what each request must be

ABSENT = object()


def brief(value, around=0):
    """A value as Python writes it; of a long one, what stands around a position.

    Example:
        >>> brief("x" * 80 + "here" + "y" * 400, around=80)[:20], brief(ABSENT)
        ('...xxxxxxxxxxxxxxxxx', 'absent')
    """
    text = "absent" if value is ABSENT else repr(value)
    start = max(around - 40, 0)
    end = start + 180
    return "..." * (start > 0) + text[start:end] + "..." * (end < len(text))


def objection(function, value, at):
    """What a function in an `expect` says no to, and why; None if it says yes."""
    try:
        result = function(None if value is ABSENT else value)
        says = "no" if result is not None else "None (to say yes, it must return True)"
    except AssertionError as error:
        result, says = False, str(error) or "assertion failed"
    name = getattr(function, "__name__", repr(function))
    return None if result else f"{at} is {brief(value)}, to which {name} says: {says}"


def difference(expected, value, path=""):
    """The path of the first difference and what it is, or None.

    Example:
        >>> difference({"messages": [{"content": "Hi"}]},
        ...            {"messages": [{"role": "user", "content": "Ho"}], "n": 1})
        "messages[0].content is 'Ho', expected 'Hi'"
    """
    at = path or "the body"
    if callable(expected):
        return objection(expected, value, at)
    if isinstance(expected, dict) and isinstance(value, dict):
        pairs = [(each, value.get(name, ABSENT), f"{path}.{name}" if path else name)
                 for name, each in expected.items()]
    elif isinstance(expected, list) and isinstance(value, list):
        if len(expected) != len(value):
            return f"{at} has {len(value)} items, expected {len(expected)}"
        pairs = [(*pair, f"{path}[{i}]") for i, pair in enumerate(zip(expected, value))]
    elif expected == value or expected is None and value is ABSENT:
        return None
    else:
        place = len(os.path.commonprefix([repr(value), repr(expected)]))
        return f"{at} is {brief(value, place)}, expected {brief(expected, place)}"
    return next(filter(None, (difference(*pair) for pair in pairs)), None)


def reply_from_json(step):
    """A step of a script as a JSON document has it -> a Reply.

    Example:
        >>> reply_from_json({"tool_calls": [{"name": "now", "arguments": {}}]})
        Reply(tool_calls=[ToolCall('now', '{}')])
    """
    error, calls = step.get("error"), step.get("tool_calls") or ()
    return Reply(**{**step, "error": None if error is None else APIError(**error),
                    "tool_calls": [ToolCall(**call) for call in calls]})


Step = collections.namedtuple("Step", "number expect backend given")


def as_step(number, step):
    """A step of a script, from any of its forms; what cannot be a step is refused."""
    try:
        given = reply_from_json(step) if isinstance(step, dict) else step
        if isinstance(given, (list, tuple)):
            given = Reply(tool_calls=given)
        expect = given.expect if isinstance(given, Reply) else None
        return Step(number, expect or {}, as_backend(given), step)
    except (TypeError, ValueError) as error:
        raise type(error)(f"step {number} of the script: {error}") from None


class Script:
    """A backend that takes one step per request, in order, and is strict about it.

    A step is a str, a ToolCall, a list of ToolCalls, a Reply, an APIError, a dict as in
    a JSON script, or a function of the request.  All choices of a request say the same.
    any_order: a request takes the first step whose `expect` it meets, and a step
    without `expect` only if there is none.  otherwise: a backend for requests that no
    step is for.

    `Reply(expect=...)` is compared with the body as it was sent.  A dict names the
    fields that matter; a list must have as many items as the body's; a function tests
    the value in its place; anything else must be equal.

    A request that no step is for gets a 400, uses up no step, and makes `check` fail.
    So do steps that remain.
    """

    model = "script"

    def __init__(self, *steps, any_order=False, otherwise=None):
        self.steps = list(map(as_step, itertools.count(1), steps))     # not yet taken
        if any_order:                   # a step without `expect` only after the others
            self.steps.sort(key=lambda step: not step.expect)
        # How many there were, and how many of those that remain a request looks at.
        self.count, self.eligible = len(steps), len(steps) if any_order else 1
        self.otherwise = None if otherwise is None else as_backend(otherwise)
        self.lock, self.current = threading.Lock(), threading.local()
        self.faults = []                # why there was no step for a request

    @classmethod
    def from_file(cls, path):
        """A script from a JSON list of steps: strings, objects with Reply's fields."""
        try:
            with open(path, "rb") as file:
                steps = json.load(file)
            if type(steps) is not list:
                raise ValueError(f"it is {JSON_NAMES[type(steps)]}")
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON list of steps: {error}") from None
        return cls(*steps)

    def __call__(self, request):
        # The choices of a request are asked for one after the other in one thread.
        if request["index"] == 0:
            self.current.step = self.take(request["body"])
        return self.current.step(request)

    def take(self, body):
        """The backend of the step that a request uses up."""
        faults = []
        with self.lock:
            for step in self.steps[:self.eligible]:
                fault = difference(step.expect, body)
                if fault is None:
                    self.steps.remove(step)
                    return step.backend
                faults.append(f"step {step.number} is not for this request: {fault}")
            fault = "; ".join(faults) or (
                f"step {self.count + 1} was asked for, but the script has {self.count};"
                f" the request: {brief(body)}")
            self.faults.append(fault)
        if self.otherwise is not None:
            return self.otherwise
        raise APIError(400, f"Script: {fault}", code="script_not_followed",
                       headers={"x-should-retry": "false"})

    def check(self, error=None):
        """Raise AssertionError unless every request followed the script.

        Remaining steps count only if there was no other error.
        """
        faults = list(self.faults) if self.otherwise is None else []
        if self.steps and not faults and error is None:
            number, *_, given = self.steps[0]
            faults = [f"{len(self.steps)} of {self.count} steps remain, from step "
                      f"{number} on: {brief(given)}", *self.faults[-1:]]
        if faults:
            raise AssertionError("Script: " + "; ".join(faults))


# ------ command: a program per choice

NEW_GROUP = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}


def start_program(program, request, files):
    """The process; it leads a group of its own, so that its children end with it."""
    import subprocess           # only for those who run programs, here and below
    texts = {"{prompt}": request["text"], "{transcript}": transcript(request)}
    arguments = [re.sub("{prompt}|{transcript}", lambda match: texts[match[0]], each)
                 for each in program]
    try:
        return subprocess.Popen(arguments, stdin=files[0], stdout=subprocess.PIPE,
                                stderr=files[1], **NEW_GROUP)
    except (OSError, ValueError) as error:
        if (isinstance(error, ValueError) or error.errno == errno.E2BIG
                or getattr(error, "winerror", None) == 206):
            raise APIError(400, "The prompt cannot be an argument of a program: it is "
                           "too long, or has a NUL or a lone surrogate.") from None
        raise BackendFault(f"{program[0]} cannot be run ({error.strerror})") from None


def transcript(request):
    """The whole conversation as text, a line `role: text` for each message.

    Example:
        >>> transcript({"endpoint": "chat", "messages": [
        ...     {"role": "system", "content": "Be brief."},
        ...     {"role": "user", "content": "Hi"}]})
        'system: Be brief.\\nuser: Hi'
    """
    if request["endpoint"] == "completion":
        return request["text"]
    return "\n".join(f"{message['role']}: {text_of(message.get('content'))}"
                     for message in request["messages"])


def end_program(process):
    """Stop a program and its children, unless it has ended by itself."""
    import subprocess
    if process.returncode is None and os.name == "nt":
        subprocess.run(f"taskkill /F /T /PID {process.pid}", capture_output=True)
    elif process.returncode is None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The group may be gone; macOS says EPERM where only a zombie is left.
            with suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=1)


def read_block(pipe):
    """What has come through a pipe; b"" at its end.

    On Windows no selector takes a pipe, so that a client that leaves is noticed at the
    next text.
    """
    if os.name != "nt":
        pause(math.inf, pipe)
    return os.read(pipe.fileno(), 65536)


def last_line(file):
    file.seek(max(file.seek(0, os.SEEK_END) - 2000, 0))
    lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "it does not say why"


def run_program(program, request, places):
    """What a program writes, as it writes it, until the program has ended."""
    while not places.acquire(timeout=0.05):
        pause(0)
    with contextlib.ExitStack() as stack:
        stack.callback(places.release)
        # Files, not pipes: a program that reads nothing, or complains a lot, goes on.
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        files[0].write(to_json({name: request[name] for name in request
                                if name != "body"}))
        files[0].seek(0)
        process = stack.enter_context(start_program(program, request, files))
        stack.callback(end_program, process)
        blocks = iter(functools.partial(read_block, process.stdout), b"")
        yield from codecs.iterdecode(blocks, "utf-8", "replace")
        while process.poll() is None:   # it has closed its output, and goes on
            pause(0.02)
        if process.returncode:
            raise APIError(500, f"{program[0]} ended with status {process.returncode}: "
                                f"{last_line(files[1])}")


def command(program, at_once=1):
    """Runs a program per choice: command(["llama-cli", "-p", "{prompt}"]).

    There is no shell.  In an argument {prompt} becomes request["text"], {transcript}
    the whole conversation.  Standard input gets the request as one JSON document; what
    the program writes to standard output is the reply.  At most `at_once` programs run
    at a time; the others wait.  The program ends when the client leaves.

    Raises ValueError for a program that is not there.
    """
    if isinstance(program, str):
        import shlex
        program = [each.strip('"') if os.name == "nt" else each
                   for each in shlex.split(program, posix=os.name != "nt")]
    program = [os.fspath(each) for each in program]
    if not program or at_once < 1:
        raise ValueError("a command needs a program, and at least 1 at once")
    found = shutil.which(program[0])
    if found is None or found.lower().endswith((".bat", ".cmd")):   # cmd.exe
        raise ValueError(f"there is no program {program[0]!r}, or it needs a shell")
    places = threading.BoundedSemaphore(at_once)

    def backend(request):
        pieces = run_program(program, request, places)
        # All choices are asked for before the first one is read.  The later ones run to
        # their end here: they would wait for the place that the first one holds.
        return list(pieces) if request["index"] else pieces
    backend.model = os.path.basename(program[0])
    return backend


# ----------------------------------------------------------------------------------
# Relay and replay.  Backends that give whole responses in place of pieces.  A relay
# passes on what another server says, as it says it, and can record it on a tape, one
# exchange a line.  A replay answers from such a tape.

def is_event_stream(headers):
    return (headers.get("content-type", "").lower().startswith("text/event-stream")
            and headers.get("content-encoding", "identity") == "identity")


# How the names of the headers begin that are passed on: to the upstream the first two
# (without a key where the relay has its own), to the client the last.
KEY_HEADERS = ("authorization", "api-key")
REQUEST_HEADERS = ("accept", "content-type", "user-agent", "idempotency-key", "openai-",
                   "x-stainless-")
RESPONSE_HEADERS = ("content-type", "content-encoding", "x-request-id", "retry-after",
                    "x-should-retry", "x-ratelimit-", "openai-")
AFTER_EVENT = re.compile(rb"(?<=\n\n)|(?<=\n\r\n)|(?<=\r\r)")   # after a blank line
DONE_EVENT = re.compile(rb"(?:\A|[\r\n])data: ?\[DONE\]\s*\Z")
MOST_HELD = 2**16               # bytes of an event that has not ended
# An id that could lead a server to another path than /models/ID, however it decodes it.
CLIMBING_ID = re.compile(r"(?:^|[/\\;])\.{1,2}(?:[/\\;]|$)|[%\\\x00-\x1f\x7f]|^/|//|/$")


class Upstream(socket.SocketIO):
    """A nonblocking socket for http.client to read from.

    A read ends when our client leaves.  The end of the connection is an exception:
    http.client would take half a head for a whole one.
    """

    def makefile(self, mode):
        return io.BufferedReader(self)

    def readinto(self, buffer):
        while True:
            pause(0)
            with suppress(*NOT_NOW):
                count = self._sock.recv_into(buffer)
                if count:
                    return count
                raise http.client.HTTPException("the connection was cut")
            pause(math.inf, self)


def blocks_of(response):
    """The body of an upstream's response as it arrives; Cut if the upstream is cut."""
    try:
        yield from iter(functools.partial(response.read1, 65536), b"")
    except (OSError, http.client.HTTPException) as error:
        # A body of unknown length ends where the connection ends.
        if response.chunked or response.length or isinstance(error, OSError):
            raise Cut("fin") from None


def whole_events(blocks):
    """Blocks as they come -> their events, one at a time.

    Example:
        >>> list(whole_events([b"data: 1\\n\\nda", b"ta: 2\\n", b"\\n: end"]))
        [b'data: 1\\n\\n', b'data: 2\\n\\n', b': end']
    """
    held = b""
    for block in blocks:
        *events, held = AFTER_EVENT.split(held + block)
        yield from events
        if len(held) > MOST_HELD:
            yield held
            held = b""
    if held:
        yield held


def as_text(write):
    """Bytes for a tape: a str where they are UTF-8, else {"base64": ...}."""
    with suppress(UnicodeDecodeError):
        return write.decode()
    return {"base64": base64.b64encode(write).decode()}


def as_bytes(text):
    return text.encode() if isinstance(text, str) else base64.b64decode(text["base64"])


class PassingOn:
    """The base of Relay and Replay: `respond(incoming)` returns a Response.

    `incoming` is the request as HTTP delivered it (the class stands in part 3): its
    method, target, headers and content, and the route and the model that the target
    means.  `incoming.asked()` is what a tape knows it by, `incoming.noted` counts its
    events and ends it at [DONE], `incoming.closers` are called when it ends.
    """

    def response(self, incoming, status, headers, writes):
        """The Response with these writes; those of a stream are its whole events."""
        if is_event_stream(headers):
            headers = {**EVENT_STREAM, **headers}
            writes = incoming.noted(whole_events(writes), DONE_EVENT.search)
        return Response(status, headers, writes)


class Relay(PassingOn):
    """Passes requests on to another server: Relay("http://gpu:8000/v1").

    api_key: for that server; without one the client's own key is passed on, unless it
    is one of ours.  record: the path of a tape, to which complete exchanges are
    appended.  paths: further endpoints that are passed on, such as "/embeddings".

    The upstream's path is built from the route, never taken from the client.
    """

    model = "relay"
    CONNECTIONS = {"http": http.client.HTTPConnection,
                   "https": http.client.HTTPSConnection}

    def __init__(self, base_url, api_key=None, record=None, paths=()):
        self.base_url, self.api_key, self.tape = base_url.rstrip("/"), api_key, record
        self.upstream = urlsplit(self.base_url)
        if (self.upstream.scheme not in self.CONNECTIONS or not self.upstream.hostname
                or self.upstream.query or "@" in self.upstream.netloc):
            raise ValueError(f"{base_url.rpartition('@')[2]!r} cannot be an upstream: "
                             "its URL must be like http://host:8000/v1")
        self.upstream.port              # a ValueError if that is not a number
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        # `on_record` tells a Replay of each exchange that is new on its tape.
        self.lock, self.on_record = threading.Lock(), lambda recording: None
        if record:
            open(record, "ab").close()          # if it cannot be written, say so now

    def headers(self, incoming):
        """The client's headers for the upstream, with one key: the relay's own, else
        the client's.  (A key for this server was taken out when it was checked.)"""
        own = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        passed = () if own else KEY_HEADERS
        theirs = {name: value for name, value in incoming.headers.items()
                  if name.startswith(REQUEST_HEADERS + passed)}
        return {**JSON_HEADERS, **theirs, "accept-encoding": "identity", **own}

    def target(self, incoming):
        """The path for the upstream, with the client's query.

        Example: /v1/models/org%2Fm?limit=1 -> /v1/models/org%2Fm?limit=1
        """
        model = incoming.model if incoming.route == "/models/" else ""
        if CLIMBING_ID.search(model):
            raise model_not_found(model)
        path = quote(incoming.route) + quote(model, safe="")
        _, mark, query = incoming.target.partition("?")
        return f"{self.upstream.path}{path}{mark}{query}"

    def ask(self, incoming):
        """Send the request -> the head of the upstream's response."""
        target, headers = self.target(incoming), self.headers(incoming)
        connection = self.CONNECTIONS[self.upstream.scheme](
            self.upstream.netloc, timeout=10)
        try:
            connection.connect()        # not interrupted when the client leaves
            incoming.closers.append(connection.sock.close)
            connection.sock.settimeout(600)
            connection.request(incoming.method, target, incoming.content or None,
                               headers)
            connection.sock.setblocking(False)
            response = http.client.HTTPResponse(Upstream(connection.sock, "r"),
                                                method=incoming.method)
            incoming.closers.append(response.close)
            response.begin()
            return response
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise APIError(502, f"The upstream at {self.base_url} cannot be reached: "
                                f"{error}.", code="upstream_unreachable") from None

    def passed_on(self, incoming):
        response = self.ask(incoming)
        headers = {name.lower(): " ".join(value.split())    # joins folded lines
                   for name, value in response.getheaders()
                   if name.lower().startswith(RESPONSE_HEADERS)}
        return self.response(incoming, response.status, headers, blocks_of(response))

    def recorded(self, incoming):
        """The status and the headers of the response, then its writes.

        The exchange is on the tape before the last one goes out ([DONE], or the empty
        one that ends a body), so that whoever has read all of it can replay it.  If the
        tape cannot be written, the client still gets its reply.
        """
        exchange, last = incoming.exchange, 0       # last: seconds, when a write went
        try:
            response = self.passed_on(incoming)
            recording = {"request": incoming.asked(), "status": response.status,
                         "headers": response.headers, "writes": []}
            yield response.status, response.headers     # `respond` takes them
            for write in filter(None, response.body):
                seconds = round(exchange.elapsed() - last, 4)
                recording["writes"].append([seconds, as_text(write)])
                if exchange.outcome is None:        # [DONE] waits for the tape
                    yield write
                    last = exchange.elapsed()
            with self.lock, open(self.tape, "ab") as file:
                file.write(to_json(recording) + b"\n")
                self.on_record(recording)
        except BaseException as error:
            why = {Cut: "the upstream was cut", ClientLeft: "the client left",
                   GeneratorExit: "the client left"}.get(type(error), error)
            log.warning("An exchange was not recorded on %s: %s", self.tape, why)
            if not isinstance(error, OSError):
                raise
        if exchange.outcome:            # [DONE], which has waited for the tape
            yield write

    def respond(self, incoming):
        if not self.tape:
            return self.passed_on(incoming)
        recorded = self.recorded(incoming)
        incoming.closers.append(recorded.close)
        return Response(*next(recorded), recorded)


class Replay(PassingOn):
    """Answers from a tape that a Relay recorded: same path and body, same bytes.

    A request that was recorded several times gets its recordings in order; the last one
    stays.  speed: 0 for no pauses, 1 for those of the recording, 2 for half of them.
    relay: a Relay for requests that are not on the tape, which records them there,
    unless it has a tape of its own.

    An unknown request without a relay gets a 404, and makes `check` fail.
    """

    model = "replay"

    def __init__(self, tape, speed=0, relay=None):
        if not is_number(speed) or not isinstance(relay, (Relay, type(None))):
            raise TypeError("the speed of a Replay must be a number, its relay a Relay")
        self.tape, self.speed, self.relay, self.faults = tape, speed, relay, []
        self.lock, self.recordings = threading.Lock(), collections.defaultdict(list)
        self.paths = set(relay.paths if relay else ())  # and what is on the tape
        if relay is not None:
            relay.tape, relay.on_record = relay.tape or tape, self.add
            open(tape, "ab").close()            # if it cannot be written, say so now
        with open(tape, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    self.add(decode_json(line.decode()), number)
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"line {number} of {tape} is not a whole "
                                     "recording") from None

    def add(self, recording, line=None):
        """Get a recording ready to be sent; an error if it is not a whole one."""
        request, writes = recording["request"], recording["writes"]
        self.recordings[canonical(request)].append((
            line, int(recording["status"]), header_fields(recording["headers"]),
            [(float(wait), as_bytes(text)) for wait, text in writes]))
        self.paths.add(request["path"])

    def unknown(self, asked):
        """A 404 that tells how the nearest recording differs."""
        message = "The tape is empty."
        if self.recordings:
            # The one with which it has the most pieces of the JSON text in common.
            pieces = set(canonical(asked).split(", "))
            key = max(self.recordings,
                      key=lambda each: len(pieces.intersection(each.split(", "))))
            nearest, (line, *_) = json.loads(key), self.recordings[key][0]
            # `canonical` tells null from absent and true from 1; `difference` does not.
            fault = difference(nearest, asked) or "on the tape " + (
                difference(asked, nearest) or "a null or a boolean differs")
            message = ("There is no recording of this request.  The nearest is line "
                       f"{line} of {self.tape}: {fault}.")
        self.faults.append(f"{asked['method']} {asked['path']}: {message}")
        return APIError(404, message, code="not_recorded")

    def writes(self, recorded):
        for seconds, write in recorded:
            pause(seconds / self.speed if self.speed else 0)
            yield write

    def respond(self, incoming):
        asked = incoming.asked()
        queue = self.recordings.get(canonical(asked))
        if not queue and self.relay is None:
            raise self.unknown(asked)
        if not queue:
            return self.relay.respond(incoming)
        with self.lock:
            _, status, headers, recorded = queue.pop(0) if len(queue) > 1 else queue[0]
        return self.response(incoming, status, headers, self.writes(recorded))

    def check(self, error=None):
        """Raise AssertionError if a request was not on the tape."""
        if self.faults:
            raise AssertionError("Replay: " + "; ".join(self.faults))


# ==================================================================================
# PART 3  OVER HTTP
#
# The server, its threads and the class of its handler are the standard library's.  A
# thread for each connection reads requests, finds the response to each, and sends it.
# ==================================================================================

# ----------------------------------------------------------------------------------
# Reading a request (RFC 9112).  We read the head ourselves: http.server's parser
# accepts what must be refused against request smuggling (folded lines, bare line ends,
# two lengths), and it has no time limit for a request as a whole.

FIELD_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(
    rf"({FIELD_NAME}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])(?=\r\n|\Z)")
FIELD_LINE = re.compile(rf"\r\n({FIELD_NAME}):([\t\x20-\x7e\x80-\xff]*)(?=\r\n|\Z)")
SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
HOST = re.compile(r"(?:[\w.~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::\d*)?", re.ASCII)
ABSOLUTE = re.compile(r"https?://([^/?#]+)/?(.*)", re.IGNORECASE)
MALFORMED = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")
MOST_HEAD, MOST_TARGET, MOST_HEADERS = 65536, 8192, 100     # bytes, bytes, how many
ONCE = {"host", "content-length", "transfer-encoding", "content-type", "authorization"}

Head = collections.namedtuple("Head", "method target version headers")
NO_HEAD = Head("", "/", (1, 1), {})     # stands for one that is malformed


def parse_headers(lines):
    """Header or trailer lines, each behind a line end -> {lower-case name: value}.

    Example:
        >>> parse_headers("\\r\\nAccept: text/html\\r\\naccept: */*")
        {'accept': 'text/html, */*'}
    """
    fields, headers = FIELD_LINE.findall(lines), {}
    if len(fields) != lines.count("\r\n"):
        raise APIError(400, "A header line is malformed.")
    if len(fields) > MOST_HEADERS:
        raise APIError(431, f"There are more than {MOST_HEADERS} headers.")
    for name, value in fields:
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in ONCE:
                raise APIError(400, f"There is more than one {name} header.")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def parse_head(head):
    """The lines of a request before its blank line (RFC 9112, 2 to 5).

    Example:
        >>> parse_head(b"GET /v1 HTTP/1.1\\r\\nHost: x")
        Head(method='GET', target='/v1', version=(1, 1), headers={'host': 'x'})
    """
    text = head.decode("latin-1")
    match = REQUEST_LINE.match(text)
    if not match:
        raise APIError(400, "The request line is malformed.")
    method, target, *version = match.groups()
    if len(target) > MOST_TARGET:
        raise APIError(414, "The target of the request is too long.")
    if version[0] != "1":
        raise APIError(505, "This server speaks only HTTP/1.0 and HTTP/1.1.")
    version, headers = (1, int(version[1])), parse_headers(text[match.end():])
    has_host = "host" in headers or version < (1, 1)
    if not (has_host and HOST.fullmatch(headers.get("host", ""))):
        raise APIError(400, "An HTTP/1.1 request must have one valid Host header.")
    # The target as a path, whatever form it had (RFC 9112, 3.2).
    absolute = not target.startswith("/") and ABSOLUTE.fullmatch(target)
    if absolute and HOST.fullmatch(absolute[1]):        # a form meant for proxies
        headers["host"], target = absolute[1], "/" + absolute[2]
    if not (target.startswith("/") or target == "*" and method == "OPTIONS"):
        raise APIError(400, "The target of the request is malformed.")
    return Head(method, target, version, headers)


def too_large(most):
    return APIError(413, f"The body is larger than {most} bytes.",
                    code="request_too_large")


class RequestReader(Connection):
    """Reads the requests that come through a connection.

    unread: a request has begun and its body was not read to the end.
    """

    unread = False

    def wait_for_request(self):
        """Wait until a request begins; a connection is not idle for ever.

        The first read also performs the TLS handshake.
        """
        self.deadline = time.monotonic() + self.seconds
        while self.buffer[:2] in (b"", b"\r", b"\r\n"):
            if len(self.buffer) < 2:
                self.read_more()
            else:
                del self.buffer[:2]                 # RFC 9112, 2.2: skip an empty line
        self.idle = False
        self.deadline = time.monotonic() + self.seconds

    def take(self, length):
        while len(self.buffer) < length:
            self.read_more()
        taken = bytes(self.buffer[:length])
        del self.buffer[:length]
        if self.trace:
            self.trace(">", taken)
        return taken

    def take_until(self, mark):
        """What stands before the mark, without the mark."""
        seen, end = 0, self.buffer.find(mark)
        while end < 0 and len(self.buffer) <= MOST_HEAD:
            # A TLS handshake or a bare line feed never brings the mark: refuse it now,
            # not when the time is over.
            if MALFORMED.search(self.buffer, seen):
                raise APIError(400, "A line of the request is malformed.")
            seen = max(len(self.buffer) - len(mark), 0)
            self.read_more()
            end = self.buffer.find(mark, seen)
        if not 0 <= end <= MOST_HEAD:
            status = 431 if b"\r\n" in self.buffer[:MOST_HEAD] else 414
            raise APIError(400 if mark == b"\r\n" else status,
                           "The request has a line or a head that is too long.")
        return self.take(end + len(mark))[:end]

    def take_transfer_chunks(self, most):
        """The body from its transfer chunks (RFC 9112, 7.1); trailers are dropped."""
        content, size = bytearray(), None
        while size != 0:
            match = SIZE_LINE.fullmatch(self.take_until(b"\r\n"))
            if not match:
                raise APIError(400, "The size of a transfer chunk is malformed.")
            size = int(match[1], 16)
            if len(content) + size > most:
                raise too_large(most)
            content += self.take(size)
            if size and self.take(2) != b"\r\n":
                raise APIError(400, "A transfer chunk is longer than its size says.")
        for trailer in iter(functools.partial(self.take_until, b"\r\n"), b""):
            parse_headers("\r\n" + trailer.decode("latin-1"))
        return bytes(content)

    def read_head(self):
        self.unread = True              # a head that is refused leaves its body unread
        head = parse_head(self.take_until(b"\r\n\r\n"))
        self.unread = (head.headers.get("content-length", "0") != "0"
                       or "transfer-encoding" in head.headers)
        return head

    def read_content(self, incoming, most):
        """The body of a request, `most` bytes long at most (RFC 9112, 6)."""
        get = incoming.headers.get
        coding, length = get("transfer-encoding"), get("content-length", "0")
        expect = get("expect", "").lower()
        if coding and (get("content-length") or incoming.version < (1, 1)):
            raise APIError(400, "Transfer-Encoding with Content-Length or HTTP/1.0.")
        if coding is not None and coding.lower() != "chunked":
            raise APIError(501, "The only Transfer-Encoding that is read is chunked.")
        if not (length.isascii() and length.isdigit()):
            raise APIError(400, "Content-Length is not a number.")
        if len(length) > 18 or int(length) > most:
            raise too_large(most)
        if expect not in ("", "100-continue"):
            raise APIError(417, "The only expectation that is met is 100-continue.")
        if get("content-encoding", "identity").lower() != "identity":
            raise APIError(400, "The body has a Content-Encoding; send it without.")
        if expect and incoming.version >= (1, 1) and not self.buffer:
            deadline = self.deadline
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.deadline = deadline            # sending has one of its own
        content = self.take_transfer_chunks(most) if coding else self.take(int(length))
        self.unread = False
        return content


def normal_path(path):
    """A path -> (its route, the model in it or None): single slashes, no /v1.

    Tutorials of streaming ask for a chat at /sse.

    Example:
        >>> normal_path("//v1/models/org%2Fm/"), normal_path("/engines/m/completions")
        (('/models/', 'org/m'), ('/completions', 'm'))
    """
    path = re.sub("/+", "/", f"/{path}").rstrip("/")
    path = unquote(re.sub("^(/v1(?![^/])){1,2}", "", path)) or "/"  # /v1 may come twice
    engine = re.fullmatch("/engines/(.+?)((?:/chat)?/completions)", path)
    if engine:
        return engine[2], engine[1]
    if path.startswith("/models/"):
        return "/models/", path[len("/models/"):]
    return "/chat/completions" if path == "/sse" else path, None


# ----------------------------------------------------------------------------------
# Exchange and handler.  An Exchange is an entry of the journal.  What an exchange needs
# only while it runs (its secrets, what must be closed) is in an Incoming.

SECRET_FIELDS = {"authorization", "proxy-authorization", "api-key", "x-api-key",
                 "x-goog-api-key", "cookie"}
SECRET = re.compile(rf"(?is)(\A\s*(?:{'|'.join(SECRET_FIELDS)})\s*: ?).*"
                    r"|([?&](?:[\w-]*key|token|access_token)=)[^&\s]*")


def masked(line):
    """A header line, or a request line, without its secrets.

    Example:
        >>> masked("Authorization: Bearer sk-1"), masked("GET /?api-key=sk-1 HTTP/1.1")
        ('Authorization: ***', 'GET /?api-key=*** HTTP/1.1')
    """
    return SECRET.sub(r"\1\2***", line)


def printable(text):
    """Without control characters: a log line is one line, whatever a client sends.

    Example:
        >>> printable("a\\nb")
        'a\\\\nb'
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


class Exchange:
    """One request and what became of it: an entry of the journal.

    method, path: as sent; secrets in a query are masked.  headers: lower-case names,
    secrets masked.  body: a dict or None; each access gives a new one.  status.
    events: how many there were, before a quirk saw them.  outcome: "complete",
    "client left", "error", "quirk", or None while it runs.  started: seconds since
    1970.  seconds: how long it took.  quirk: the one that bends its response, or None.
    """

    FIELDS = "method path headers body status events outcome started seconds".split()
    status = outcome = seconds = quirk = None
    content, events = b"", 0            # content: the body as it came; see `body`

    def __init__(self, head):
        self.method, target, _, headers = head
        self.path = masked(target) if "?" in target else target
        self.headers = {**headers, **dict.fromkeys(SECRET_FIELDS & {*headers}, "***")}
        self.started, self.clock = time.time(), time.perf_counter()

    @property
    def body(self):
        with suppress(APIError):
            return parse_json(self.content)

    def elapsed(self):
        return time.perf_counter() - self.clock

    def end(self, outcome="complete"):
        """Set the outcome.  It must be there before the last byte goes out."""
        self.outcome = "quirk" if self.quirk and outcome != "client left" else outcome
        self.seconds = self.elapsed()

    def as_dict(self):
        return {name: getattr(self, name) for name in self.FIELDS}

    def __repr__(self):
        return (f'"{self.method} {self.path}" {self.status or "-"} {self.outcome}, '
                f"{self.events} events, {self.seconds or 0:.3f} s")


class Incoming:
    """A request as HTTP delivered it, while it is being answered.

    route, model: what its path means, see `normal_path`.  headers: secrets and all.
    content: its body.  delivered: what was sent last held the end, so that a client
    that leaves now has all of it.  closers: functions that are called at its end.
    """

    content, delivered = b"", False

    def __init__(self, head):
        self.exchange, self.closers = Exchange(head), []
        self.method, self.target, self.version, self.headers = head
        self.route, self.model = normal_path(head.target.partition("?")[0])

    def keeps_alive(self):
        options = self.headers.get("connection", "").lower()
        return "close" not in options and (
            self.version >= (1, 1) or "keep-alive" in options)

    def asked(self):
        """What tells one request from another on a tape."""
        body = as_text(self.content) or None
        with suppress(APIError):
            body = parse_json(self.content)
        model = self.model if self.route == "/models/" else ""
        return {"method": self.method, "path": self.route + model, "body": body}

    def noted(self, events, is_done=DONE.__eq__):
        """Events, counted.  [DONE] is the last one and the end of the exchange: a quirk
        that follows may split it, or send more after it.  is_done: is an event [DONE]?
        """
        for each in events:
            self.exchange.events += 1
            if is_done(each):
                self.exchange.end()
                events.close()          # what an upstream says after it is not read
            yield each

    def bent(self, writes, quirk, k):
        """The writes with a quirk.  It is forgotten at the end if the writes with it
        are those without, as with a k beyond the last event."""
        self.exchange.quirk = quirk
        writes, plain = itertools.tee(writes)
        bent, sent = itertools.tee(QUIRKS[quirk](writes, k))
        yield from bent
        if self.exchange.outcome and [*sent] == [*plain]:   # all of them were there
            self.exchange.quirk = None


def trace_lines(block):
    """The lines of what crosses the wire; what looks like a transfer chunk's size, or
    like an event, is marked.

    Example:
        >>> list(trace_lines(b"9\\r\\ndata: {}\\n\\n\\r\\n"))
        ['[transfer chunk] 9\\\\r\\\\n', '[event] data: {}']
    """
    for line in block.split(b"\r\n"):
        *events, rest = line.decode("utf-8", "replace").split("\n\n")
        yield from (f"[event] {printable(each)}" for each in events)
        if SIZE_LINE.fullmatch(line):
            yield f"[transfer chunk] {printable(rest)}\\r\\n"
        elif rest:
            yield printable(masked(rest))


def transfer_chunk(write):
    """A part of the body in HTTP's own unit (RFC 9112, 7.1).

    Example:
        >>> transfer_chunk(b"data: 1\\n\\n")
        b'9\\r\\ndata: 1\\n\\n\\r\\n'
    """
    return b"%x\r\n%b\r\n" % (len(write), write)


WRITES_PER_SEND = 1             # how many share a send, if none must be waited for
http_date = functools.partial(formatdate, usegmt=True)
request_ids = random.Random()   # Server.random makes the other ids; a test may seed it


class Handler(BaseHTTPRequestHandler):
    """One connection, in a thread of its own: reads requests and answers each.

    A thread each is simple, and enough for some hundreds of clients; a server for many
    thousands would have one event loop for all of them.
    """

    # ------ what socketserver calls: setup, handle, finish

    def setup(self):
        server, sock = self.server, self.request
        # Without this the body of a small response waits 44 ms for the client's ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if server.tls:
            sock = server.tls.wrap_socket(sock, server_side=True,
                                          do_handshake_on_connect=False)
        self.reader = RequestReader(sock, server.request_timeout)
        this_thread.connection = self.reader
        if server.trace:
            self.reader.trace = functools.partial(server.trace, next(server.numbers))
        self.open, self.pending = True, []  # may a request follow; what to send next
        server.connections[threading.current_thread()] = self.reader
        self.has_place = len(server.connections) <= server.max_connections

    def handle(self):
        with suppress(EndReply, OSError):
            while self.open and not self.server.closed.is_set():
                self.reader.wait_for_request()
                self.serve()
                # Set before `closed` is read, because close() sets `closed` and then
                # shuts the idle connections: otherwise it could miss this one.
                self.reader.idle = True

    def finish(self):
        """Close so that the client can read what was sent (RFC 9112, 9.6)."""
        reader = self.reader
        if self.server.tls:             # without close_notify, a response may be cut
            with suppress(OSError, ValueError):
                reader.sock.setblocking(False)  # do not wait for the client's
                reader.sock.unwrap()
        with suppress(OSError, ClientLeft, APIError):
            reader.sock.setblocking(True)
            reader.shut(socket.SHUT_WR)
            reader.deadline = time.monotonic() + 1
            while reader.unread:        # if bytes remain unread, the close is a reset
                reader.buffer.clear()
                reader.read_more()
        reader.sock.close()
        del self.server.connections[threading.current_thread()]

    # ------ sending

    def flush(self, incoming):
        """Send what is pending, in one piece."""
        block, self.pending = b"".join(self.pending), []
        self.reader.send(block)
        incoming.delivered = incoming.exchange.outcome is not None

    def response_head(self, incoming, response, framing):
        """Status line, headers and blank line; framing: how the length is told."""
        fields = {"date": http_date(int(time.time())),
                  "x-request-id": f"req_{request_ids.getrandbits(128):032x}",
                  "openai-version": "2020-10-01",
                  "openai-processing-ms": int(incoming.exchange.elapsed() * 1000),
                  **self.server.cors_headers(incoming), **response.headers, **framing}
        if not self.open or incoming.version < (1, 1):
            fields["connection"] = "keep-alive" if self.open else "close"
        status = f"{response.status} {http.client.responses.get(response.status, '')}"
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
        return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1", "replace")

    def send(self, incoming, response):
        """Send a response.  The journal knows its end before the last byte goes out.

        A body has one of three forms: a length and all of it, transfer chunks and a
        last one that is empty, or in HTTP/1.0 what comes until the connection closes.
        """
        self.open = self.has_place and not self.reader.unread and incoming.keeps_alive()
        body, status, writes, encode = response.body, response.status, (), bytes
        if isinstance(body, bytes):
            framing, last = {"content-length": len(body)}, body
        elif incoming.version >= (1, 1):
            framing, last = {"transfer-encoding": "chunked"}, b"0\r\n\r\n"
            writes, encode = body, transfer_chunk
        else:
            framing, last, writes, self.open = {}, b"", body, False
        if incoming.method == "HEAD" or status in (204, 304):
            writes, last = (), b""
        incoming.exchange.status = status
        framing = {} if status in (204, 304) else framing
        self.pending = [self.response_head(incoming, response, framing)]
        outcome = self.send_writes(incoming, response, writes, encode)
        self.pending.append(last)
        incoming.exchange.end(outcome)
        self.flush(incoming)

    def send_writes(self, incoming, response, writes, encode):
        """A body that comes piece by piece -> the outcome.  What fails in an event
        stream becomes an error event; another body is cut.

        [DONE] waits for the last transfer chunk, which goes out in the same send.
        """
        batch = WRITES_PER_SEND if response.ready else 1
        try:
            for write in filter(None, writes):      # an empty one would spell the end
                self.pending.append(encode(write))
                is_done = incoming.exchange.outcome and b"[DONE]" in write
                if len(self.pending) >= batch and not is_done:
                    self.flush(incoming)
            return "complete" if response.status < 400 else "error"
        except BaseException as error:
            api_error = self.server.api_error(error, incoming)
            if not is_event_stream(response.headers):
                raise Cut("fin") from None
            self.pending.append(encode(event(api_error.body())))
            return "error"

    def cut(self, incoming, how):
        """End a reply as a quirk wants it, or as an upstream that was cut."""
        if how == "stall":
            self.flush(incoming)
            with suppress(APIError):                # the server is shutting down
                pause(math.inf)
        incoming.exchange.end("error")
        self.flush(incoming)
        if how == "reset" or incoming.version < (1, 1):     # whose end is no fault
            linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            self.reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.reader.sock.close()

    # ------ one request, one response

    def receive(self, incoming):
        """Check who sends a request, read its body, and enter it into the journal."""
        try:
            if not self.has_place:
                raise APIError(503, "The engine is currently overloaded, please try "
                               "again later", headers={"retry-after": "1"})
            self.server.admit(incoming)
            if self.reader.unread:
                content = self.reader.read_content(incoming, self.server.max_body)
                incoming.content = incoming.exchange.content = content
            self.reader.deadline = math.inf
        finally:
            self.server.journal.append(incoming.exchange)
            # One statement, because threads share the list.  None stands for a size of
            # 0, since [:-0] is no item at all.
            del self.server.journal[:-self.server.journal_size or None]

    def find_response(self, incoming):
        """The response, its first write taken: what fails before it gets a status."""
        try:
            self.receive(incoming)
            response = self.server.respond(incoming)
            if not isinstance(response.body, bytes):
                writes = iter(response.body)
                first = next(writes, b"")
                return response._replace(body=itertools.chain([first], writes))
            return response
        except Instead as instead:
            return instead.args[0]
        except BaseException as error:
            return error_response(self.server.api_error(error, incoming))

    def serve(self):
        """One request and its response; the client may leave at any time."""
        try:
            incoming, response = Incoming(self.reader.read_head()), None
        except APIError as error:
            incoming, response = Incoming(NO_HEAD), error_response(error)
        try:
            self.send(incoming, response or self.find_response(incoming))
        except Cut as cut:
            self.cut(incoming, *cut.args)
            raise                       # no request can follow
        finally:
            if not incoming.delivered:
                incoming.exchange.end("client left")
            self.clean_up(incoming)

    def clean_up(self, incoming):
        """Close what a response was made from, and log the exchange."""
        for close in reversed(incoming.closers):
            with suppress(EndReply):
                try:
                    close()
                except BaseException as error:
                    self.server.api_error(error, incoming)
        log.info("%s %r", self.client_address[0], incoming.exchange)


# ----------------------------------------------------------------------------------
# Page.  A window on the wire: a conversation, and beside it each request, response and
# event.  The page asks nobody but this server, and inserts text as text, never as HTML.

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>openai_compat</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { margin: 0; height: max(100vh, 28rem); display: grid; grid: auto 1fr auto / 2fr 3fr }
header, footer { padding: .6rem 1rem; display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center }
header { grid-column: 1 / -1; border-bottom: 1px solid #8886 } h1 { flex: 1; margin: 0; font-size: 1.1rem }
textarea, output { flex: 100% } label:has(option:only-child), #talk:has(p) + #hints { display: none }
main, aside { overflow: auto; padding: 1rem; display: flex; flex-direction: column-reverse } /* at its end */
#talk p, pre, section { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
#talk p::before { content: attr(class); display: block; font: .8rem system-ui, sans-serif; opacity: .75 }
aside { grid-area: 2 / 2 / 4; background: #8881 } aside, .tool-call, pre { font: .8rem/1.5 monospace }
summary { overflow: hidden; white-space: nowrap; text-overflow: ellipsis } span { opacity: .7 }
aside b { color: light-dark(#0550ae, #9ecbff) } output { color: light-dark(#b3261e, #ffa198) }
@media (max-width: 700px) { body { display: block } main, aside { max-height: 75vh } }
</style>
<header><h1>openai_compat</h1> <label>Model <input id="model"></label>
<label>Key <input id="key" type="password" autocomplete="off"></label>
<label><input id="stream" type="checkbox" checked> Stream</label>
<label><input id="tool" type="checkbox"> Tool</label>
<label>Quirk <select id="quirk"><option value="">none</option><!-- quirks --></select></label></header>
<main id="main" tabindex="0" aria-label="Conversation" aria-busy="false">
<div id="talk" role="log" aria-live="polite"></div>
<p id="hints">Enter sends a message, Shift+Enter starts a line. Open a line of the wire to see all of it.
Try it without <b>Stream</b>, with a <b>Tool</b> to call, or a <b>Quirk</b> (--quirk-header).</p></main>
<footer><output id="note"></output><textarea id="text" rows="3" autofocus aria-label="Message"></textarea>
<button id="send">Send</button><button id="stop">Stop</button><button id="new">New</button></footer>
<aside tabindex="0" aria-label="Wire"><div id="wire"></div></aside>
<script nonce="NONCE">
const $ = id => document.getElementById(id);
const CITY = {type: "object", properties: {city: {type: "string"}}, required: ["city"]};
const WEATHER = {type: "function", function: {name: "get_weather", parameters: CITY}};
const add = (parent, name, textContent = "", fields = {}) =>        // as text: HTML is seen, not obeyed
  parent.appendChild(Object.assign(document.createElement(name), {textContent, ...fields}));
const lines = pairs => [...pairs].map(pair => pair.join(": ")).join("\n").replace(/(?<=Bearer ).*/, "***");
const tell = error => { $("note").textContent = error.message; };
function show(exchange, open, news, whole) {        // a line of the wire: news, and beside it, dim, the whole
  const line = add(exchange, "details", "", {open}), summary = add(line, "summary");
  add(summary, "span", ((performance.now() - exchange.started) / 1000).toFixed(3));
  for (const [name, value] of Object.entries(news).filter(([, value]) => value))
    add(summary, "b", ` ${name} `).after(typeof value === "string" ? value : JSON.stringify(value));
  add(summary, "span", ` ${whole}`);
  add(line, "pre", whole);
  if (exchange.children.length > 500) exchange.children[2].remove();    // its first event
}
async function* events(response) {        // bytes -> events; a body that is no stream is like one event
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", read = {}; !read.done;) {
    read = await reader.read();
    const blocks = (rest + (read.value ?? "\n\n")).split(/\r?\n\r?\n/);         // at each blank line
    rest = blocks.pop();
    yield* blocks.filter(Boolean);
  }
}
function parse(event) {                   // an event -> its object; one without data has nothing in it
  const data = (event.match(/^data:.*|^{[^]*/gm) || []).join("\n").replace(/^data: ?/gm, "");
  try { return data === "[DONE]" ? {done: data} : Object(JSON.parse(data || "{}")); }
  catch { return {error: {message: `An event is not JSON: ${data}`}}; }
}
async function call(path, body, signal) {               // one exchange
  const exchange = add($("wire"), "section", "", {started: performance.now()});
  const method = body ? "POST" : "GET";
  const headers = new Headers(body && {"content-type": "application/json"});
  if (body && $("quirk").value) headers.set("x-quirk", $("quirk").value);
  if ($("key").value) headers.set("authorization", `Bearer ${$("key").value}`);
  show(exchange, body, {request: `${method} ${path}`}, `${lines(headers)}\n\n${body || ""}`);
  $("note").textContent = "";
  const response = await fetch(path, {method, headers, body, signal});
  show(exchange, body, {response: `${response.status} ${response.statusText}`}, lines(response.headers));
  let ended = false;
  for await (const event of events(response)) {
    const {choices, error, usage, data, done} = parse(event);
    const {delta, message, finish_reason} = choices?.[0] || {};
    show(exchange, false, {error, delta, message, finish_reason, usage, data, done}, event);
    if (error || !response.ok) throw Error(`${response.status}: ${error?.message || event}`);
    ended ||= done || finish_reason || data;
    fold(delta || message || {});
    $("model").value ||= data?.[0]?.id || "";
  }
  if (!ended) throw Error("The reply broke off: neither finish_reason nor [DONE] came.");
}
function fold({content, refusal, tool_calls}) {         // what a delta or a message adds to the conversation
  const calls = (tool_calls || []).map(({id, function: {name, arguments: part} = {}}) =>
    [id && `tool-call ${name} ${id}`, part]);           // without an id, it goes on with the last line
  for (const [who, text] of [["assistant", content], ["assistant refusal", refusal], ...calls]) {
    const last = $("talk").lastChild, goesOn = !who || who === last?.className;
    if (text != null) (goesOn ? last : add($("talk"), "p", "", {className: who})).append(text);
  }
}
async function ask(event) {               // at a click, or at a key: the lines of the conversation go out
  if (event.key && (event.key !== "Enter" || event.shiftKey || event.isComposing)) return;
  event.preventDefault();                 // no line break
  const content = $("text").value, control = new AbortController();
  if ($("main").ariaBusy === "true" || !content.trim()) return;
  add($("talk"), "p", content, {className: "user"});
  const said = $("talk").querySelectorAll("p:not(.tool-call)");
  const messages = [...said].map(line => ({role: line.classList[0], content: line.textContent}));
  const body = {model: $("model").value, messages};
  if ($("stream").checked) Object.assign(body, {stream: true, stream_options: {include_usage: true}});
  if ($("tool").checked) Object.assign(body, {tools: [WEATHER], tool_choice: "required"});
  $("text").value = "";
  $("main").ariaBusy = true;
  $("stop").onclick = () => control.abort(Error("Stopped."));
  await call("/v1/chat/completions", JSON.stringify(body), control.signal).catch(tell);
  control.abort();                        // a broken stream is not read to its end
  $("main").ariaBusy = false;
}
$("new").onclick = () => { $("talk").textContent = $("wire").textContent = ""; };
$("text").onkeydown = $("send").onclick = ask;
($("key").onchange = () => call("/v1/models").catch(tell))();
</script>
"""


def page_response(server, incoming):
    """The page, which may run its own script and style and talk to this server alone.

    Its menu has the quirks, if a request may choose one.
    """
    nonce = os.urandom(16).hex()
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src "
              f"'nonce-{nonce}'; connect-src 'self'; img-src data:; base-uri 'none'; "
              "form-action 'none'; frame-ancestors 'none'")
    options = "<option>".join(["", *QUIRKS] if server.quirk_header else [])
    page = PAGE.replace("NONCE", nonce).replace("<!-- quirks -->", options)
    return Response(200, {
        "content-type": "text/html; charset=utf-8", "content-security-policy": policy,
        "referrer-policy": "no-referrer", "x-content-type-options": "nosniff",
    }, page.encode())


# ----------------------------------------------------------------------------------
# Server.  The routes, who may use them, and the one place where all stages meet.

BEARER = {"www-authenticate": "Bearer"}
# The hosts of origins whose pages may read what we answer: this machine itself.
LOOPBACK = re.compile(r"localhost|.*\.localhost|127(\.\d+){3}|\[::1\]")
# What a Host header may say that no stranger's DNS can: an address, or a local name.
LOCAL_HOST = re.compile(r"\[[0-9a-f:.]+\]|[\d.]+|[^.]*|.*\.(localhost|local|internal)")


def host_of(authority):
    """The host of an origin or of a Host header.

    Example:
        >>> host_of("http://Box.local:8000"), host_of("[::1]:8000")
        ('box.local', '[::1]')
    """
    return re.sub(r"^.*?://|:\d*$", "", authority).lower()


def as_names(value):
    """A list of names from one of them, or from several."""
    names = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError("models, api_keys and cors must be texts that are not empty")
    return names


def tls_context(tls):
    """An ssl.SSLContext, from one or from the files of a certificate and its key."""
    if tls is None or isinstance(tls, ssl.SSLContext):
        return tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # When `end_if_late` ends a read, this lets a 408 be sent (OpenSSL 3).
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    try:
        context.load_cert_chain(*tls)
    except (OSError, TypeError) as error:       # it does not name the files
        raise ValueError(f"{tls} is no certificate and its key: {error}") from None
    return context


def as_number(name, value, least, kind=(int, float)):
    """The value, if it is a number from `least` up."""
    if not (isinstance(value, kind) and is_number(value) and least <= value <= 1e12):
        raise ValueError(f"{name} must be a number from {least} up, not {value!r}")
    return value


def named_events(objects):
    """The events of another API, whose objects name their types.

    Example:
        >>> list(named_events([{"type": "ping"}]))
        [b'event: ping\\ndata: {"type":"ping"}\\n\\n']
    """
    for value in objects:
        pause(0)
        name = value.get("type") if isinstance(value, dict) else None
        is_name = isinstance(name, str) and name.isprintable()
        yield (f"event: {name}\n".encode() if is_name else b"") + event(value)


def stay_on_core(number):
    """Keep this thread, and those that it starts, on the core that a number picks.  It
    does nothing: Speed, the last section, replaces it where the system can."""


def copied(value):
    """A deep copy of a JSON value: a backend may change its request.

    Example:
        >>> given = {"a": [1]}
        >>> copied(given) == given, copied(given)["a"] is given["a"]
        (True, False)
    """
    if isinstance(value, dict):
        return {name: copied(each) if isinstance(each, (dict, list)) else each
                for name, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server on a port of its own; see the top of this file.

    backend          a function of the request, a constant (str, Reply, ToolCall,
                     APIError), echo, say(), Script(), command(), Relay(), Replay()
    host, port       where it listens; port 0 is a free one
    models           the names to accept; None accepts all
    api_keys         those that may use it; none needed if empty
    tokenize         text -> list of its tokens
    strict           check that tool calls and their answers belong together
    quirk            a name of QUIRKS, for every reply
    quirk_header     let the header X-Quirk choose one, if there is no quirk
    tls              an ssl.SSLContext, or (certificate file, key file)
    cors             origins of web pages that may use it; "*" is all
    max_body         bytes
    max_connections  more get a 503
    request_timeout  seconds for a whole request to arrive, and for a client to read;
                     None is no limit
    journal          how many exchanges it keeps
    routes           further endpoints: {"/embeddings": function, "GET /files": ...}
    """

    allow_reuse_address = os.name != "nt"       # on Windows two servers would share it
    allow_reuse_port = False
    request_queue_size = 1024   # with 5, most of 32 clients at once wait for a second
    # The command line sets these before it starts the server.
    delay = 0                   # seconds between pieces, unless a reply says otherwise
    trace = None                # or a function of a number, "<" or ">", and the bytes
    core = None                 # a number that picks one core to run on; None is all

    def __init__(self, backend=echo, *, host="127.0.0.1", port=0, models=None,
                 api_keys=(), tokenize=tokenize, strict=True, quirk=None,
                 quirk_header=False, tls=None, cors=(), max_body=32 * 2**20,
                 max_connections=512, request_timeout=30, journal=1000, routes=None):
        parse_quirk(quirk)
        self.max_body = as_number("max_body", max_body, 0, int)
        self.max_connections = as_number("max_connections", max_connections, 1, int)
        self.journal, self.journal_size = [], as_number("journal", journal, 0, int)
        self.request_timeout = (LONGEST_WAIT if request_timeout is None else
                                as_number("request_timeout", request_timeout, 1e-3))
        self.quirk, self.quirk_header = quirk, quirk_header     # `backend` reads them
        self.backend, self.tokenize, self.strict = backend, tokenize, strict
        self.models = None if models is None else as_names(models)
        self.api_keys = as_names(api_keys)
        self.tls = tls_context(tls)
        self.cors = {origin.lower().rstrip("/") for origin in as_names(cors)}
        self.routes = {path: dict(methods) for path, methods in self.ROUTES.items()}
        for route, function in dict(routes or {}).items():
            self.add_route(route, function)
        self.random, self.failure = random.Random(), None
        self.connections = {}           # {thread: its reader}
        self.closed, self.thread = threading.Event(), threading.Thread(
            target=self.serve_forever, daemon=True)
        self.numbers = itertools.count(1)           # of the connections, for the trace
        self.started = int(time.time())
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    @property
    def backend(self):
        return self._backend

    @backend.setter
    def backend(self, backend):
        passes_on = isinstance(backend, PassingOn)
        if passes_on and (self.quirk or self.quirk_header):
            raise ValueError("a quirk cannot bend what a relay or a replay passes on")
        self._backend = backend if passes_on else as_backend(backend)

    def add_route(self, route, function):
        """Add a row of `routes`, such as "GET /files" or "/embeddings"."""
        method, _, path = route.rpartition(" ")
        method, path = method.upper() or "POST", normal_path(path)[0]
        if (path in self.ROUTES or "/" not in route or not method.isalpha()
                or method in ("HEAD", "OPTIONS")):
            raise ValueError(f"{route!r} is not a path, or that of a built-in endpoint "
                             "or method")
        if not callable(function):
            raise TypeError(f"the route {route!r} needs a function, not {function!r}")
        self.routes.setdefault(path, {})[method] = functools.partial(
            Server.custom, function=function)

    # ------ start and stop

    def server_bind(self):
        """As HTTPServer's, but it asks no resolver for our name."""
        try:
            socketserver.TCPServer.server_bind(self)
        except OSError as error:
            error.filename = "%s, port %s" % self.server_address[:2]
            raise
        self.server_name, self.server_port = host, _ = self.server_address[:2]
        self.on_loopback = host.startswith("127.") or host == "::1"

    @property
    def base_url(self):
        """Where a client finds the server; ends in /v1."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.server_name,
                                                         self.server_name)
        host = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.tls else ''}://{host}:{self.server_port}/v1"

    def start(self):
        """Serve in a thread of its own; returns the server."""
        if self.closed.is_set():
            raise RuntimeError("this server is closed; make another one")
        self.thread.start()
        return self

    def serve_forever(self, poll_interval=0.5):
        """Serve until another thread closes the server.

        Reads and writes of the connections block; every `poll_interval` seconds this
        ends those that take too long.
        """
        stay_on_core(self.core)
        self.timeout, next_look = poll_interval, 0
        while not self.closed.is_set():
            with suppress(ValueError):      # the socket may be closed by now
                self.handle_request()       # waits no longer than `timeout`
            if time.monotonic() > next_look:
                next_look = time.monotonic() + poll_interval
                for reader in list(self.connections.values()):
                    reader.end_if_late()

    def get_request(self):
        try:
            return super().get_request()
        except OSError:                 # most likely out of descriptors: do not spin
            self.closed.wait(0.05)
            raise

    def verify_request(self, sock, address):
        """Beyond max_connections a request gets a 503; far beyond, the connection is
        closed without a word."""
        return len(self.connections) <= 2 * self.max_connections + 16

    def handle_error(self, sock, address):
        is_usual = isinstance(sys.exc_info()[1], OSError)   # it left before its setup
        log.log(logging.DEBUG if is_usual else logging.ERROR,
                "A connection from %s failed", address[0], exc_info=True)

    def end_connections(self, how, seconds, only_idle=False):
        """Shut this direction of all connections, or of the idle ones, and wait for
        their threads."""
        end = time.monotonic() + seconds
        for reader in list(self.connections.values()):
            if reader.idle or not only_idle:
                with suppress(OSError, ValueError):     # it may be closed by now
                    # What a client sends is read as it comes.  If there is something
                    # to read before we shut the socket, it is the end: it has left.
                    has_left = not reader.is_full() and ready_files([reader.sock], 0)
                    reader.stopping |= not has_left
                reader.shut(how)
        for thread in set(self.connections) - {threading.current_thread()}:
            thread.join(max(end - time.monotonic(), 0))

    def cut_connections(self):
        """End what waits: first nothing more can come, then nothing more can go."""
        self.end_connections(socket.SHUT_RD, 0.25)
        self.end_connections(socket.SHUT_RDWR, 0.25)

    def close(self, grace=0, error=None):
        """Stop, close every connection, and raise what failed: see `check`.

        Running replies get `grace` seconds; then what waits ends with an error.  A
        thread that is blocked in a user's backend is left behind.  error: what ended
        the `with` block.
        """
        if self.closed.is_set():
            return
        self.closed.set()
        with suppress(OSError):         # a forked child may still hold the socket
            self.socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):         # a connection wakes accept() where that did not
            host = urlsplit(self.base_url).hostname
            socket.create_connection((host, self.server_port), timeout=1).close()
        if self.thread.is_alive():
            self.thread.join(1)
        self.server_close()
        self.end_connections(socket.SHUT_RD, grace, only_idle=True)
        self.cut_connections()
        left = set(self.connections) - {threading.current_thread()}
        if left:
            log.warning("%d threads in the backend are left behind", len(left))
        self.check(error)

    shutdown = close            # socketserver's name for it

    def check(self, error=None):
        """Raise what failed: a script or replay that was not followed, or the backend's
        own first exception.  error: what the `with` block ended with."""
        if error is not None and not isinstance(error, Exception):
            return
        failure, traceback = self.failure or (None, None)
        if isinstance(self.backend, (Script, Replay)):
            self.backend.check(error or failure)
        if failure is not None and error is None:
            if hasattr(failure, "add_note"):
                failure.add_note("It came from the server's backend.  Raise APIError "
                                 "there where the failure is meant for the client.")
            raise failure.with_traceback(traceback)

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, error, traceback):
        self.close(error=error)

    # ------ failures

    def api_error(self, error, incoming):
        """The APIError that a client gets for an exception; EndReply is raised again.

        An exception that nobody meant for a client is logged, and the first one is
        kept for `check`.  The traceback is dropped, since it would keep the request
        alive for as long as somebody keeps the exception.
        """
        if isinstance(error, EndReply):
            raise error
        traceback, is_meant = error.__traceback__, isinstance(error, APIError)
        if not is_meant:
            log.error("The backend failed in %r", incoming.exchange, exc_info=error)
        if self.failure is None and (not is_meant or type(error) is BackendFault):
            self.failure = error, traceback
        elif self.failure is None or self.failure[0] is not error:
            error.__context__ = None
        error.__traceback__ = None
        return error if is_meant else server_error()

    # ------ who may use it

    def check_key(self, incoming):
        # Taken out of the headers, so that no relay passes it on.
        bearer = re.match("(?i)bearer (.*)", incoming.headers.pop("authorization", ""))
        other = incoming.headers.pop("api-key", "")
        key = bearer[1].strip() if bearer else other
        if not key:
            raise APIError(401, "You didn't provide an API key. You need to provide "
                           "your API key in an Authorization header using Bearer auth "
                           "(i.e. Authorization: Bearer YOUR_KEY).", headers=BEARER)
        from hmac import compare_digest         # not needed by those without keys
        # Clients disagree on the encoding.  All are compared, in constant time, so that
        # the time tells nothing.
        if not any([compare_digest(key.encode(encoding), known.encode())
                    for known in self.api_keys for encoding in ("latin-1", "utf-8")]):
            shown = f"{key[:3]}***{key[-2:]}" if len(key) >= 16 else "***"
            raise APIError(401, f"Incorrect API key provided: {shown}.",
                           code="invalid_api_key", headers=BEARER)

    def allows(self, origin, fields):
        """May a web page of that origin read what we answer?"""
        return bool(self.api_keys           # no page has a key, unless it was given one
                    or self.cors & {"*", origin.lower()}
                    or origin.partition("://")[2] == fields.get("host")
                    or LOOPBACK.fullmatch(host_of(origin)))

    def check_browser(self, fields):
        """Refuse web pages of strangers that somebody's browser shows: their requests
        (CSRF), and pages whose host's name was pointed at this machine (DNS rebinding).
        """
        host, origin = host_of(fields.get("host", "")), fields.get("origin")
        if not (LOCAL_HOST.fullmatch(host)
                or host in (socket.gethostname().lower(), *map(host_of, self.cors))):
            raise APIError(403, f"The Host {host[:99]!r} is not this machine; name its "
                           "origin with --cors.", code="foreign_host")
        if origin is not None and not self.allows(origin, fields):
            raise APIError(403, f"The Origin {origin[:99]!r} is not allowed; name it "
                           "with --cors.", code="foreign_origin")

    def admit(self, incoming):
        """Refuse those who may not use the server, before their body is read."""
        if incoming.method == "OPTIONS":
            return
        if self.api_keys:
            if incoming.route not in ("/", "/health"):
                self.check_key(incoming)
        elif self.on_loopback:
            self.check_browser(incoming.headers)

    def cors_headers(self, incoming):
        origin = incoming.headers.get("origin")
        if origin is None:
            return {}
        if not self.allows(origin, incoming.headers):
            return {"vary": "origin"}
        return {"vary": "origin", "access-control-allow-origin": origin,
                "access-control-expose-headers": "x-request-id"}

    # ------ completions

    def random_name(self, length):
        return f"{self.random.getrandbits(4 * length):0{length}x}"

    def check_model(self, model):
        if self.models is not None and model not in self.models:
            raise model_not_found(model)

    def replies(self, request, prompts, incoming):
        """Call the backend once per choice, each time with a copy of the request."""
        backend, is_chat = self.backend, request["endpoint"] == "chat"
        body = request["body"]
        # The other fields have their defaults, none of which can be changed in place.
        as_sent = [name for name, value in body.items() if request[name] is value]
        texts = ([request["text"]] * request["n"] if is_chat else
                 ["".join(prompt) for prompt in prompts
                  for _ in range(request["best_of"])])
        for index, text in enumerate(texts):
            copy = copied(body)
            reply = as_reply(backend({
                **request, **{name: copy[name] for name in as_sent}, "body": copy,
                "stop": [*request["stop"]], "index": index, "prompt": text,
                "text": text}))
            if callable(getattr(reply.text, "close", None)):
                incoming.closers.append(reply.text.close)
            yield reply

    def sequence_of(self, reply, request):
        """What a reply says, at its pace and cut to the limits of the request."""
        delay = reply.delay or self.delay
        is_whole = isinstance(reply.text or "", str)    # else its pieces stay whole
        segments = segments_of(
            pieces_of(reply), self.tokenize, lambda: f"call_{self.random_name(24)}",
            reply.finish_reason, one_by_one=is_whole and (request["stream"] or delay))
        if delay or reply.error:
            segments = paced(segments, delay, reply.error)
        return sequence(segments, request)

    def complete(self, request, incoming):
        """The diagram at the top of this file, as code."""
        is_chat = request["endpoint"] == "chat"
        prefix, make_chunks = (("chatcmpl-", chat_chunks) if is_chat
                               else ("cmpl-", completion_chunks))
        request["id"] = prefix + self.random_name(29)
        asked_for = incoming.headers.get("x-quirk") if self.quirk_header else None
        try:
            parse_quirk(asked_for)
        except ValueError as error:             # the client's fault, not the backend's
            raise APIError(400, str(error), "X-Quirk") from None
        prompts = prompts_of(request, self.tokenize)
        replies = list(self.replies(request, prompts, incoming))
        # k: after how many events.  A reply's own quirk wins, the client's comes last.
        quirk, k = parse_quirk(replies[0].quirk or self.quirk or asked_for)
        headers = replies[0].headers
        sequences = [self.sequence_of(reply, request) for reply in replies]
        usage = Usage(prompts, self.tokenize, replies[0].usage)
        chunks = make_chunks(request, sequences, usage)
        if not request["stream"]:
            body = to_json(fold(chunks))
            if quirk in UNSTREAMED_QUIRKS:  # the others are about events
                incoming.exchange.quirk = quirk
                body = QUIRKS[quirk]([body], 0)
            return Response(200, {**JSON_HEADERS, **headers}, body)
        ready = all(map(Reply.is_ready, replies)) and not (quirk or self.delay)
        writes = incoming.noted(events(chunks))
        if quirk:
            writes = incoming.bent(writes, quirk, k)
        return Response(200, {**EVENT_STREAM, **headers}, writes, ready)

    # ------ the endpoints: what has come -> a response

    def completion(self, incoming):
        """A chat or a text completion, or what a relay passes on."""
        body = parse_json(incoming.content)
        if incoming.model is not None and body.get("model") is None:
            body = {**body, "model": incoming.model}
            incoming.content = to_json(body)
        if isinstance(self.backend, PassingOn):
            self.check_model(body.get("model"))
            return self.backend.respond(incoming)
        is_chat = incoming.route == "/chat/completions"
        request = (parse_chat if is_chat else parse_completion)(body, self.strict)
        self.check_model(request["model"])
        return self.complete(request, incoming)

    def show_models(self, incoming):
        """All models, or the one that the path names."""
        names = [model_name(self.backend)] if self.models is None else self.models
        if incoming.model is not None:
            self.check_model(incoming.model)
            names = [incoming.model]
        if isinstance(self.backend, PassingOn) and self.models is None:
            return self.backend.respond(incoming)
        models = [{"id": name, "object": "model", "created": self.started,
                   "owned_by": "openai_compat"} for name in names]
        return json_response({"object": "list", "data": models}
                             if incoming.model is None else models[0])

    def custom(self, incoming, function):
        """An endpoint of the user's: a function of the body, or a generator of it."""
        has_body = incoming.method == "POST" or (
            incoming.content and incoming.method not in ("GET", "HEAD"))
        result = function(parse_json(incoming.content) if has_body else None)
        if not hasattr(result, "__next__"):
            return json_response(result)
        if callable(getattr(result, "close", None)):
            incoming.closers.append(result.close)
        return Response(200, EVENT_STREAM, incoming.noted(named_events(result)))

    def show_journal(self, incoming):
        if not self.journal_size:
            raise APIError(404, "No journal is kept; start with --journal.",
                           code="unknown_url")
        return json_response([exchange.as_dict() for exchange in list(self.journal)])

    ROUTES = {  # {path: {method: function of the server and the incoming request}}
        "/chat/completions": {"POST": completion},
        "/completions":      {"POST": completion},
        "/models":           {"GET": show_models},
        "/models/":          {"GET": show_models},      # and an id after it
        "/health":           {"GET": lambda *_: json_response({"status": "ok"})},
        "/journal":          {"GET": show_journal},
        "/":                 {"GET": page_response},
    }

    def respond(self, incoming):
        """The response to one request; HEAD is answered as GET is."""
        methods = self.routes.get(incoming.route, {})
        if not methods and isinstance(self.backend, PassingOn):
            if incoming.route in [normal_path(path)[0] for path in self.backend.paths]:
                methods = dict.fromkeys(("GET", "POST", "DELETE"),
                                        lambda _, passed: self.backend.respond(passed))
        method = "GET" if incoming.method == "HEAD" else incoming.method
        if method in methods:
            return methods[method](self, incoming)
        allowed = ", ".join([*methods, *["HEAD"] * ("GET" in methods), "OPTIONS"])
        if method == "OPTIONS":         # a browser's preflight (Fetch, 4.8) among them
            wanted = incoming.headers.get("access-control-request-headers", "*")
            return Response(204, {"allow": allowed, "access-control-max-age": "86400",
                                  "access-control-allow-methods": allowed,
                                  "access-control-allow-headers": wanted})
        if not methods:
            raise APIError(404, f"Unknown request URL: {incoming.method} "
                           f"{printable(incoming.exchange.path[:200])}.",
                           code="unknown_url")
        raise APIError(405, f"Not allowed to {incoming.method} on {incoming.route}. "
                       f"(HINT: use {' or '.join(methods)} instead.)",
                       headers={"allow": allowed})


# ----------------------------------------------------------------------------------
# Command line.  A table of flags, the server that they ask for, and two ways to run it:
# until a signal comes, or as long as a command runs.

PLACE = "MODULE:FUNCTION"
FLAGS = (   # bool makes a switch, list a flag that may be repeated
    # flag               type   metavar   help
    ("--say",             str,   "TEXT",   "always say this"),
    ("--script",          str,   "FILE",   "reply with the steps of a JSON file"),
    ("--command",         str,   "CMD",    "reply with what this program prints"),
    ("--backend",         str,   PLACE,    "reply with what this yields"),
    ("--upstream",        str,   "URL",    "pass requests on to another server"),
    ("--replay",          str,   "TAPE",   "reply from a tape, or --upstream"),
    ("--host",            str,   "HOST",   "address to listen on; else 127.0.0.1"),
    ("--port",            int,   "PORT",   "port; 0 is a free one; else 8000"),
    ("--model",           list,  "NAME",   "accept this name only"),
    ("--api-key",         list,  "KEY",    "accept this key"),
    ("--upstream-key",    str,   "KEY",    "the key for --upstream"),
    ("--record",          str,   "TAPE",   "append what the upstream says"),
    ("--pass",            list,  "PATH",   "another path to pass to --upstream"),
    ("--route",           list,  f"PATH={PLACE}", "another endpoint"),
    ("--at-once",         int,   "N",      "programs that run at a time; else 1"),
    ("--delay",           float, "S",      "seconds between pieces"),
    ("--tokenizer",       str,   PLACE,    "text -> list of its tokens"),
    ("--lenient",         bool,  None,     "do not check the conversation"),
    ("--quirk",           str,   "NAME",   "a deliberate fault in every reply"),
    ("--quirk-header",    bool,  None,     "a fault where X-Quirk asks for it"),
    ("--journal",         bool,  None,     "keep exchanges, for GET /journal"),
    ("--cors",            list,  "ORIGIN", "let pages of this origin in; * is all"),
    ("--tls-cert",        str,   "FILE",   "serve https with this certificate"),
    ("--tls-key",         str,   "FILE",   "the key of the certificate"),
    ("--max-body",        int,   "N",      "bytes; else 33554432"),
    ("--max-connections", int,   "N",      "more get a 503; else 512"),
    ("--request-timeout", float, "S",      "seconds for a request to arrive; else 30"),
    ("--trace",           bool,  None,     "print what crosses the wire"),
    ("--quiet",           bool,  None,     "print no line per exchange"),
)


def parse_arguments(argv):
    """({name: value} of the flags that are given, the command after the first "--")."""
    import argparse             # a fixture does not need it
    parser = argparse.ArgumentParser(
        argument_default=argparse.SUPPRESS,
        description="An OpenAI-compatible server on nothing but the standard library.",
        epilog="Keys also come from OPENAI_COMPAT_API_KEYS, separated by commas.  "
               "After -- may stand a command.  It runs with OPENAI_BASE_URL set to a "
               "server on a free port, and its exit status is the exit status.")
    for flag, kind, metavar, about in FLAGS:
        how = {bool: {"action": "store_const", "const": True}, list: {"action": "append"}}
        parser.add_argument(flag, metavar=metavar, help=about,
                            **how.get(kind, {"type": kind}))
    parser.add_argument("--version", action="version", version=__version__)
    end = argv.index("--") if "--" in argv else len(argv)
    given = vars(parser.parse_args(argv[:end]))
    if argv[end:] == ["--"]:
        parser.error("there is no command after --")
    return given, argv[end + 1:]


def complain(message, status=1):
    """Say on standard error why the program ends; returns its exit status."""
    print(f"openai_compat: {message}", file=sys.stderr)
    return status


def named(text):
    """What "module:function" names."""
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(f"cannot load {text}: {error!r}") from error


def backend_of(given):
    """What replies; the flags that say so are taken out of those that are given."""
    take = given.pop
    makers = {"say": str, "script": Script.from_file, "backend": named,
              "command": lambda line: command(line, take("at_once", 1))}
    for flag, make in makers.items():
        if flag in given:
            return make(take(flag))
    relay, tape = None, take("replay", None)
    if "upstream" in given:
        # Beside --replay it records on that tape, and --record has no effect.
        relay = Relay(take("upstream"), take("upstream_key", None),
                      tape or take("record", None), take("pass", ()))
    if tape is not None:
        return Replay(tape, relay=relay)
    return relay or echo


def server_of(given):
    """The server that the flags ask for.

    Flags that have the name of an argument of the server stay in `given`.  Each other
    one is taken out when it has its effect, or becomes an argument.  One that is left
    at the end has no effect beside the others, and is refused.
    """
    runs_code_of_others = given.keys() & {"command", "backend", "route"}
    backend = backend_of(given)
    # What a relay passes on is never changed: these flags stay in `given` beside one,
    # and so are refused below.
    changes = {} if isinstance(backend, PassingOn) else given
    delay = as_number("--delay", changes.pop("delay", 0), 0)
    take = given.pop
    # Not `get`: programs that the server runs must not inherit its keys.
    keys = re.findall(r"[^,\s]+", os.environ.pop("OPENAI_COMPAT_API_KEYS", ""))
    routes = [route.rpartition("=") for route in take("route", ())]
    given.update(
        models=take("model", None), api_keys=[*take("api_key", ()), *keys],
        tokenize=named(changes.pop("tokenizer", f"{__name__}:tokenize")),
        strict=not changes.pop("lenient", False),
        journal=1000 if take("journal", False) else 0,
        tls=(take("tls_cert"), take("tls_key", None)) if "tls_cert" in given else None,
        routes={path: named(place) for path, _, place in routes})
    unused = given.keys() - Server.__init__.__kwdefaults__.keys()
    if unused:
        flag = min(unused).replace("_", "-")
        sys.exit(complain(f"--{flag} has no effect beside the other flags", 2))
    server = Server(backend, **given)
    server.delay = delay
    # Neighbouring ports get different cores; code of others may compute and needs all.
    server.core = None if runs_code_of_others else server.server_port
    return server


class Printer:
    """Standard error as a file that never waits for long.

    Nobody may read it (`| head -1`, a pager that waits): when a second of waiting was
    in vain, lines are lost until somebody reads again, and requests go on.
    """

    lock = threading.Lock()
    patience = 1                # for so many seconds, which are 0 where nobody reads

    def write(self, lines):
        lines = lines.encode("utf-8", "backslashreplace")
        size = getattr(select, "PIPE_BUF", 4096)    # what a ready pipe takes at once
        with self.lock, suppress(OSError):
            for start in range(0, len(lines), size):
                if os.name != "nt":                 # Windows selects only sockets
                    self.patience = len(select.select([], [2], [], self.patience)[1])
                if self.patience:
                    os.write(2, lines[start:start + size])

    def trace(self, number, direction, block):
        """Print what crosses the wire, a line at a time, with the time of day."""
        clock = datetime.now().time().isoformat("milliseconds")
        self.write("".join(f"{clock} #{number} {direction} {line}\n"
                           for line in trace_lines(block)))


def hear_signals():
    """A list that gets the numbers of the signals that ask us to end.  One that was
    ignored at the start, as by nohup, still is."""
    heard = []
    for number in {1, 2, 15} & signal.valid_signals():      # SIGHUP, SIGINT and SIGTERM
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: heard.append(number))
    return heard


def close_server(server, grace=0):
    """Close it -> the exit status, 1 if something failed."""
    try:
        server.close(grace)
    except BaseException as error:
        return complain(f"{type(error).__name__}: {error}")
    return 0


def serve(server, heard):
    """Serve until a signal; running replies get 10 s then, or until a second one."""
    # Wait in short steps, so that a signal is heard: on Windows nothing interrupts a
    # wait, and a join that a signal interrupts takes its thread for ended.
    while not heard:
        time.sleep(0.1)
    closing = threading.Thread(target=close_server, args=(server, 10), daemon=True)
    closing.start()
    while closing.is_alive() and len(heard) < 2:
        time.sleep(0.05)
    server.cut_connections()
    closing.join(1)
    return 0                    # it ended as it was told to; what failed was printed


def start_beside(server, program):
    """Start a command that finds the server in its environment, by all names that
    clients know."""
    import subprocess
    keys = [*server.api_keys, os.environ.get("OPENAI_API_KEY") or "none"]
    hosts = [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"),
             "127.0.0.1,localhost,::1", urlsplit(server.base_url).hostname]
    bypass = ",".join(filter(None, hosts))
    path = shutil.which(program[0]) or program[0]
    env = {**os.environ, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": keys[0],
           "OPENAI_API_BASE": server.base_url, "NO_PROXY": bypass, "no_proxy": bypass}
    try:
        return subprocess.Popen([path, *program[1:]], env=env)
    except OSError as error:        # the exit statuses of a shell
        sys.exit(complain(error, 127 if isinstance(error, FileNotFoundError) else 126))


def serve_beside(server, running, heard):
    """Serve as long as a command runs -> its exit status."""
    while running.poll() is None:
        time.sleep(0.02)
        while heard:
            number = heard.pop(0)
            if number != signal.SIGINT:     # a terminal sends it Ctrl-C as well
                running.send_signal(number)
    failed, status = close_server(server), running.returncode
    return (status if status >= 0 else 128 - status) or failed


def main(argv=None):
    """The command line; returns the exit status."""
    # A user's module imports openai_compat: that must be this very module, not a second
    # copy, whose APIError would be another class.
    sys.modules.setdefault("openai_compat", sys.modules[__name__])
    sys.path.insert(0, os.getcwd())
    if hasattr(signal, "SIGCHLD"):      # where it is ignored, programs have no status
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    given, program = parse_arguments(sys.argv[1:] if argv is None else argv)
    printer = Printer()
    trace = printer.trace if given.pop("trace", False) else None
    logging.basicConfig(
        format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", stream=printer,
        level=logging.WARNING if given.pop("quiet", program) else logging.INFO)
    try:
        server = server_of({"port": 0 if program else 8000, **given})
        heard = hear_signals()
        running = start_beside(server, program) if program else None
    except (OSError, OverflowError, ValueError, TypeError) as error:
        return complain(error)
    server.trace = trace
    if not (server.api_keys or server.on_loopback):
        log.warning("WARNING: without --api-key, whoever reaches %s, port %d, can use "
                    "this server", *server.server_address[:2])
    server.start()
    if running:
        return serve_beside(server, running, heard)
    printer.write(f"Serving {server.base_url} with {model_name(server.backend)}; "
                  "Ctrl-C ends it.\n")
    return serve(server, heard)


# ----------------------------------------------------------------------------------
# Speed.  Everything here exists only for speed, and only replaces what is above.  With
# FAST = False the program does the same, slower.

FAST = True


def fast_encode_json():
    """15 % of the time of an event: the standard encoder makes its C part anew for
    each call, and this one is made once."""
    try:
        encode = json.encoder.c_make_encoder(
            None, JSON_ENCODER.default, json.encoder.encode_basestring, None,
            ":", ",", False, False, False)
    except (AttributeError, TypeError):         # another Python has no such function
        return JSON_ENCODER.encode
    return lambda value: "".join(encode(value, 0))


def fast_stay_on_core(number):
    """One thread at a time holds the interpreter, and to hand it to another core takes
    longer than most turns: 35 % more requests/s of 16 connections.  Linux only."""
    if number is not None:
        cores = sorted(os.sched_getaffinity(0))
        with suppress(OSError):
            os.sched_setaffinity(0, {cores[number % len(cores)]})
            # A sleep may last 1 ms longer, so that sleepers wake together.
            with open(f"/proc/{threading.get_native_id()}/timerslack_ns", "w") as file:
                file.write("1000000")
        # With hundreds of threads, each asks for the interpreter every 5 ms otherwise.
        sys.setswitchinterval(0.02)


if FAST:
    encode_json = fast_encode_json()
    WRITES_PER_SEND = 256       # twice the events/s of a reply that is at hand
    http_date = functools.lru_cache(maxsize=4)(http_date)
    normal_path = functools.lru_cache(maxsize=256)(normal_path)
    host_of = functools.lru_cache(maxsize=64)(host_of)
    if hasattr(os, "sched_setaffinity"):
        stay_on_core = fast_stay_on_core


if __name__ == "__main__":
    sys.exit(main())
