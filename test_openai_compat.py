"""The tests of openai_compat.py and client.py, in the order of the two files.

Each stage without a socket, then real sockets, real processes and, under the markers of
.pytest.ini, real SDKs, browsers and proxies.
"""
import base64
import configparser
import contextlib
import copy
import doctest
import functools
import gc
import gzip
import hashlib
import http.client
import http.server
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
import urllib.error
import urllib.request
import warnings
import weakref
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import unquote

import pytest

import client
import openai_compat
from client import (BadReply, Client, ClientError, ConnectionFailed, StreamTruncated,
                    chunks, events, fold, lines, pieces)
from openai_compat import (APIError, QUIRKS, Relay, Replay, Reply, Script, Server,
                           ToolCall, command, echo, sample, say, tokenize)

# ==================================================================================
# THE HELPERS: everything that more than one section uses, and what proves it sound

# ----------------------------------------------------------------------------------
# Shapes.  What each object on the wire may hold, in the words of Python literals: a
# type, a constant, a pattern; (a, b) either; [a] a list; {"name?": a} an optional member.

NUMBER = (int, float)
REASON = ("stop", "length", "tool_calls", "content_filter", "function_call")
TOKEN = {"token": str, "logprob": NUMBER, "bytes": ([int], None)}
CHAT_LOGPROBS = {name: ([{**TOKEN, "top_logprobs": [TOKEN]}], None)
                 for name in ("content", "refusal")}
TEXT_LOGPROBS = {"tokens": [str], "token_logprobs": [(*NUMBER, None)],
                 "top_logprobs": [({str: NUMBER}, None)], "text_offset": [int]}
COUNTERS = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}
USAGE = {**COUNTERS,
         "prompt_tokens_details": {"cached_tokens": int, "audio_tokens": int},
         "completion_tokens_details": {
             "reasoning_tokens": int, "audio_tokens": int,
             "accepted_prediction_tokens": int, "rejected_prediction_tokens": int}}
CALL = ({"id": re.compile("call_.+"), "type": "function",
         "function": {"name": str, "arguments": str}},
        {"id": re.compile("call_.+"), "type": "custom", "custom": {"name": str, "input": str}})
CALL_DELTA = ({"index": int, "id": str, "type": "function",
               "function": {"name": str, "arguments": ""}},
              {"index": int, "function": {"arguments": str}},
              {"index": int, "id": str, "type": "custom",
               "custom": {"name": str, "input": ""}},
              {"index": int, "custom": {"input": str}})
COMMON = {"created": int, "model": str, "system_fingerprint": re.compile("fp_.+")}
CHAT_COMMON = {**COMMON, "id": re.compile("chatcmpl-[0-9a-zA-Z]{29}"),
               "service_tier": ("default", "flex", "scale", "priority")}
TEXT_COMMON = {**COMMON, "id": re.compile("cmpl-[0-9a-zA-Z]{29}"), "object": "text_completion"}

CHAT = {**CHAT_COMMON, "object": "chat.completion", "usage": USAGE, "choices": [{
    "index": int, "logprobs": (CHAT_LOGPROBS, None), "finish_reason": REASON, "message": {
        "role": "assistant", "content": (str, None), "refusal": (str, None),
        "tool_calls?": [CALL], "function_call?": {"name": str, "arguments": str}}}]}
CHAT_CHUNK = {**CHAT_COMMON, "object": "chat.completion.chunk", "usage?": (USAGE, None),
              "choices": [{
                  "index": int, "logprobs": (CHAT_LOGPROBS, None),
                  "finish_reason": (*REASON, None), "delta": {
                      "role?": "assistant", "content?": (str, None), "refusal?": (str, None),
                      "tool_calls?": [CALL_DELTA],
                      "function_call?": ({"name": str, "arguments": ""},
                                         {"arguments": str})}}]}
TEXT = {**TEXT_COMMON, "usage": COUNTERS, "choices": [{
    "index": int, "text": str, "logprobs": (TEXT_LOGPROBS, None),
    "finish_reason": ("stop", "length", "content_filter")}]}
TEXT_CHUNK = {**TEXT_COMMON, "usage?": (COUNTERS, None), "choices": [{
    "index": int, "text": str, "logprobs": (TEXT_LOGPROBS, None),
    "finish_reason": ("stop", "length", "content_filter", None)}]}
ERROR = {"error": {"message": re.compile("(?s).+"), "type": str, "param": (str, None),
                   "code": (str, None)}}
MODEL = {"id": str, "object": "model", "created": int, "owned_by": str}
MODELS = {"object": "list", "data": [MODEL]}


def check_shape(value, shape, at="it"):
    """Fail, with the place, unless the value is of the shape: no key less, none more."""
    if isinstance(shape, tuple):
        return check_one_of(value, shape, at)
    if isinstance(shape, list):
        assert type(value) is list, f"{at}: {value!r} is no array"
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{at}[{i}]")
    elif isinstance(shape, dict):
        check_members(value, shape, at)
    elif isinstance(shape, re.Pattern):
        assert type(value) is str and shape.fullmatch(value), f"{at}: {value!r}"
    elif isinstance(shape, type):                   # exact: True is no int
        assert type(value) is shape, f"{at}: {value!r} is no {shape.__name__}"
    else:
        assert type(value) is type(shape) and value == shape, f"{at}: {value!r}"


def check_one_of(value, shapes, at):
    faults = []
    for shape in shapes:
        try:
            return check_shape(value, shape, at)
        except AssertionError as fault:
            faults.append(str(fault).splitlines()[0])
    raise AssertionError(" | ".join(faults))


def check_members(value, shape, at):
    assert type(value) is dict, f"{at}: {value!r} is no object"
    if str in shape:
        shape = dict.fromkeys(value, shape[str])
    known = {name.rstrip("?"): each for name, each in shape.items()}
    needed = {name for name in shape if not name.endswith("?")}
    assert needed <= value.keys() <= known.keys(), f"{at} has {sorted(value)}"
    for name, each in value.items():
        check_shape(each, known[name], f"{at}.{name}")


@pytest.mark.parametrize("value, shape", [
    (True, int), (1, bool), (1.0, int), (None, str), ("x", "y"), ([1, "x"], [int]),
    ({}, {"a": int}), ({"a": 1, "b": 1}, {"a": int}), ({"a": "x"}, {"a?": int}),
    ({"a": None}, {"a": (int, str)}), ({"k": "x"}, {str: int}), ("ab", re.compile("a")),
])
def test_a_shape_refuses_what_is_not_of_it(value, shape):
    with pytest.raises(AssertionError):
        check_shape(value, shape)


# ----------------------------------------------------------------------------------
# Waiting, and surroundings.  Nothing here sleeps for a fixed time.

HERE = Path(openai_compat.__file__).resolve().parent
SERVER, CLIENT = str(HERE / "openai_compat.py"), str(HERE / "client.py")
PATIENCE = float(os.environ.get("PATIENCE", 30))     # seconds to wait for what has to come
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])

# A shell starts a background job with SIGINT ignored, and its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def rows(table):
    """A table {name: (value, ...)} as the parameters of a test."""
    return [pytest.param(*row, id=name) for name, row in table.items()]


def until(condition, seconds=PATIENCE):
    """Wait for a condition to hold; its value, or a failure at the deadline."""
    end = time.monotonic() + seconds
    while True:
        value = condition()         # once a turn: asking may itself be a request
        if value:
            return value
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def together(count, work):
    """The results of `count` threads that do the same at once."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """The environment of a newcomer, who has set nothing."""
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def calm(caplog):
    """The server has logged no failure when the test is over."""
    yield
    assert [each for each in caplog.get_records("call") if each.levelname == "ERROR"] == []


def outcome(server, place=-1):
    """How an exchange ended, once it has."""
    return until(lambda: server.journal and server.journal[place].outcome)


# ----------------------------------------------------------------------------------
# Bytes out.  A request as the bytes that a client sends.

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
BOTH = (CHAT_PATH, TEXT_PATH)
HI = {"model": "m", "messages": [{"role": "user", "content": "Hello, world!"}]}
PROMPT = {"model": "m", "prompt": "Hello, world!"}
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def user(content):
    return [{"role": "user", "content": content}]


def get(target=b"/health", headers=b"Host: x\r\n", method=b"GET", version=b"1.1"):
    return b"%b %b HTTP/%b\r\n%b\r\n" % (method, target, version, headers)


def posted(body, headers=b"", target=b"/v1/completions", version=b"1.1"):
    headers = b"Host: x\r\n%bContent-Length: %d\r\n" % (headers, len(body))
    return get(target, headers, b"POST", version) + body


def post_chunked(coded, headers=b"", target=b"/v1/completions", version=b"1.1"):
    headers = b"Host: x\r\n%bTransfer-Encoding: chunked\r\n" % headers
    return get(target, headers, b"POST", version) + coded


def request_bytes(body=HI, path=CHAT_PATH, headers=()):
    """A request (body is bytes, or what becomes JSON) after which the server closes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Connection": "close", **dict(headers)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return posted(body, lines.encode("latin-1"), path.encode())


def dial(server, timeout=PATIENCE):
    return socket.create_connection(server.server_address[:2], timeout)


def half_close(connection):
    connection.shutdown(socket.SHUT_WR)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                          struct.pack("hh" if os.name == "nt" else "ii", 1, 0))
    connection.close()


# ----------------------------------------------------------------------------------
# Bytes in.  What came back, as it is read from a bare socket.

def read_to_end(connection):
    got, block = bytearray(), b"-"
    while block and len(got) < 2**24:           # a reply that has no end shall fail, not hang
        block = connection.recv(65536)
        got += block
    assert not block, "no end"
    return bytes(got)


def read_past(connection, mark):
    """The bytes up to and with `mark`, and what came along with it."""
    got = b""
    while mark not in got:
        block = connection.recv(65536)
        assert block, f"closed after {got!r}"
        got += block
    return got


def ended(connection):
    """Has the other side closed, or died?"""
    with contextlib.suppress(ConnectionError):
        return connection.recv(65536) == b""
    return True


def transfer_chunks(stream):
    """(the transfer chunks that the bytes begin with, what follows the last of them).

    What follows is None where the last one, which is empty, has not come.
    """
    found = []
    while stream:
        size, _, stream = stream.partition(b"\r\n")
        size = int(size, 16)
        chunk, end, stream = stream[:size], stream[size:size + 2], stream[size + 2:]
        if not chunk and end == b"\r\n":
            return found, stream
        found.append(chunk)
    return found, None


class Got:
    """A reply: its status, headers (lower-case names) and body; JSON where it is JSON."""

    def __init__(self, status, headers, body):
        self.status, self.body = status, body
        self.headers = {name.lower(): value for name, value in headers}

    @property
    def json(self):
        value = loads(self.body)
        check_shape(value, ERROR if "error" in value else WHOLE_SHAPES[value["object"]])
        return value

    @property
    def chunks(self):
        """The chunks of a stream that ended well."""
        return chunks_of(self.body)

    @property
    def text(self):
        """What the first choice says, streamed or not."""
        assert self.status == 200, self.body
        if self.headers["content-type"] == "application/json":
            first = self.json["choices"][0]
            return first["message"]["content"] if "message" in first else first["text"]
        return said_in_turn(self.chunks)[0]["text"] or ""

    @property
    def error(self):
        """The error object of a refusal, or of a stream that ended with one."""
        if self.status == 200:
            blocks = self.body.decode().split("\n\n")
            assert "data: [DONE]" not in blocks and blocks.pop() == ""
            value = loads(blocks[-1][len("data: "):])
        else:
            assert self.status >= 400, self.body
            assert self.headers["content-type"] == "application/json"
            value = loads(self.body)
        check_shape(value, ERROR)
        return value["error"]


WHOLE_SHAPES = {"chat.completion": CHAT, "text_completion": TEXT, "model": MODEL,
                "list": MODELS}
CHUNK_SHAPES = {"chat.completion.chunk": CHAT_CHUNK, "text_completion": TEXT_CHUNK}


def loads(text):
    """JSON as a strict client reads it: no NaN, no infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} on the wire"))


def chunks_of(body):
    """The bytes of a whole stream -> its chunks, checked."""
    *blocks, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(block.startswith(b"data: {") and b"\n" not in block for block in blocks)
    chunks = [loads(block[6:]) for block in blocks]
    for chunk in chunks:
        check_shape(chunk, CHUNK_SHAPES[chunk["object"]])
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    return chunks


def got_on(connection):
    """The reply on a socket; http.client raises unless it is complete."""
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        return Got(response.status, response.getheaders(), response.read())


def replies(stream, to_head=False):
    """All the replies in a stream of bytes; every byte has to belong to one."""
    found = []
    while stream:
        head, blank, stream = stream.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) [\w '-]*", line)[1])
        headers = [field.split(": ", 1) for field in fields]
        assert blank and len(dict(headers)) == len(fields), head
        bodiless = to_head or status < 200 or status == 204
        body, stream = (b"", stream) if bodiless else split_body(dict(headers), stream)
        found.append(Got(status, headers, body))
        to_head = False
    return found


def split_body(headers, stream):
    """(body, what follows it), as RFC 9112 section 6.3 has a client find the end."""
    if "transfer-encoding" in headers:
        assert "content-length" not in headers
        found, rest = transfer_chunks(stream)
        assert rest is not None, "cut short"
        return b"".join(found), rest
    if "content-length" in headers:
        length = int(headers["content-length"])
        assert len(stream) >= length
        return stream[:length], stream[length:]
    assert headers["connection"] == "close"
    return stream, b""


# ----------------------------------------------------------------------------------
# Asking.  `call`, `post`, `chat` and `ask` wait for the whole reply; `asking` gives the
# socket, and the client leaves when its block ends; `talk` sends any bytes.

def call(server, method, path, body=None, headers=()):
    connection = HTTPConnection(*server.server_address[:2], timeout=PATIENCE)
    body = json.dumps(body) if isinstance(body, dict) else body
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return Got(response.status, response.getheaders(), response.read())


def post(server, path, body, headers=()):
    return call(server, "POST", path, body, headers)


def chat(server, text="Hi", path=CHAT_PATH, headers=(), **fields):
    """The reply of a server to a chat with that text, which a completion has no field for."""
    return post(server, path, {"model": "m", "messages": user(text), **fields}, headers)


def ask(backend, path=CHAT_PATH, **fields):
    """What a server with this backend answers to a request with these fields."""
    with Server(backend) as server:
        return post(server, path, {**(HI if path == CHAT_PATH else PROMPT), **fields})


def message(backend, **fields):
    """The first choice's message, and its finish_reason."""
    first = ask(backend, **fields).json["choices"][0]
    return first["message"], first["finish_reason"]


@contextlib.contextmanager
def failing_at_its_end(backend, kind, words=None, **options):
    """A server; the block must go well, and its end must raise this, in which words stand."""
    server = Server(backend, **options).start()
    try:
        yield server
    finally:
        if sys.exc_info()[0]:
            with contextlib.suppress(BaseException):
                server.close()
        else:
            with pytest.raises(kind, match=words):
                server.close()


def ask_in_vain(kind, backend, path=CHAT_PATH, **fields):
    """As `ask`, of a backend whose failure must end the block."""
    with failing_at_its_end(backend, kind) as server:
        return post(server, path, {**(HI if path == CHAT_PATH else PROMPT), **fields})


def always(reply):
    """A backend that gives the same reply each time."""
    return lambda request: reply


@contextlib.contextmanager
def asking(server, text="Hi", path=CHAT_PATH, headers=(), **fields):
    """A socket through which a chat was asked for; leaving the block, the client leaves."""
    with dial(server) as connection:
        body = {"model": "m", "messages": user(text), **fields}
        connection.sendall(request_bytes(body, path, headers))
        yield connection


def leave(server, path, body, after=0):
    """Ask, read `after` events, and hang up."""
    with dial(server) as connection:
        connection.sendall(request_bytes(body, path))
        got = b""
        while got.count(b"data: ") < after:
            got += connection.recv(65536)


def exchange(server, body, path=CHAT_PATH):
    """(transfer chunks, how it ended) of one reply: "whole", "cut" or "reset"."""
    blocks, how = [], "cut"
    with dial(server) as connection:
        connection.sendall(request_bytes(body, path))
        try:
            blocks += iter(lambda: connection.recv(65536), b"")
        except ConnectionResetError:
            how = "reset"
    found, rest = transfer_chunks(b"".join(blocks).partition(b"\r\n\r\n")[2])
    return found, "whole" if rest == b"" else how


def talk(server, raw, to_head=False):
    """Send, and read until the server closes: the replies."""
    with dial(server) as connection:
        connection.sendall(raw)
        return replies(read_to_end(connection), to_head)


def statuses(server, raw, to_head=False):
    return [got.status for got in talk(server, raw, to_head)]


def served(server):
    """A connection that has had a reply and is kept."""
    connection = dial(server)
    connection.sendall(get())
    assert read_past(connection, b"}").startswith(b"HTTP/1.1 200")
    return connection


def is_closed(server):
    """Does the server take no more connections?"""
    try:
        dial(server).close()
    except OSError:
        return True
    return False


def deltas(chunks, index=0):
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]
            if choice["index"] == index]


def said_in_turn(chunks):
    """{index: what that choice says} of a stream, from its deltas."""
    said = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        one = said.setdefault(choice["index"], {
            "text": None, "refusal": None, "calls": [], "function": (), "reason": None,
            "logprobs": None})
        delta = choice.get("delta", {"content": choice.get("text")})
        for name, field in (("text", "content"), ("refusal", "refusal")):
            if delta.get(field) is not None:
                one[name] = (one[name] or "") + delta[field]
        for fragment in delta.get("tool_calls", []):
            add_fragment(one["calls"], fragment)
        if "function_call" in delta:
            name, text = one["function"] or ("", "")
            one["function"] = (name + delta["function_call"].get("name", ""),
                               text + delta["function_call"]["arguments"])
        one["reason"] = one["reason"] or choice["finish_reason"]
        one["logprobs"] = added_logprobs(one["logprobs"], choice["logprobs"])
    return said


def add_fragment(calls, fragment):
    (kind,) = fragment.keys() & {"function", "custom"}
    name = fragment[kind].get("name")
    text = fragment[kind]["arguments" if kind == "function" else "input"]
    if name is not None:
        assert fragment["index"] == len(calls)      # call 0 is complete before 1 opens
        calls.append((name, text))
    else:
        assert fragment["index"] == len(calls) - 1
        calls[-1] = (calls[-1][0], calls[-1][1] + text)


def added_logprobs(so_far, more):
    if so_far is None or more is None:
        return so_far or more
    return {field: so_far[field] if more[field] is None else (so_far[field] or []) + more[field]
            for field in so_far}


def said_in(stream):
    """The texts of the deltas in the bytes of a stream, or in a part of one."""
    said = re.findall(rb'"delta":\{"content":("(?:[^"\\]|\\.)*")', stream)
    return [json.loads(text.decode()) for text in said]


# ----------------------------------------------------------------------------------
# Backends that wait, and say what became of them.

class Endless:
    """Yields its pieces, waits for `go_on` (where told to), then goes on for ever.

    Tells when it began and when it was closed; its generators are kept, so that no
    garbage collector closes them.
    """

    def __init__(self, *pieces, more="x ", waits=False, pause=0.001):
        self.pieces, self.more, self.pause, self.kept = pieces, more, pause, []
        self.begun, self.go_on, self.closed = (threading.Event() for _ in range(3))
        if not waits:
            self.go_on.set()

    def __call__(self, request):
        self.kept.append(self.speak())
        return self.kept[-1]

    def speak(self):
        self.begun.set()
        try:
            yield from self.pieces
            self.go_on.wait(60)
            while True:
                time.sleep(self.pause)
                yield self.more
        finally:
            self.closed.set()


class Gate:
    """A program says its number at the gate and waits there until the test lets it pass.

    The test does so by closing its side; when the program dies, the test finds that
    side closed.
    """

    PRELUDE = """
import json, os, signal, socket, subprocess, sys
def out(text):
    sys.stdout.buffer.write(text if isinstance(text, bytes) else text.encode())
    sys.stdout.flush()
def knock():
    return socket.create_connection(("127.0.0.1", %d))
def gate():
    knock().recv(1)
def child(code):
    return subprocess.Popen([sys.executable, "-S", "-c", prelude + code])
"""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE)
        self.port = self.listener.getsockname()[1]

    def program(self, code, *arguments):
        prelude = self.PRELUDE % self.port
        prelude += "prelude = %r\n" % prelude
        return [sys.executable, "-S", "-c", prelude + code, *arguments]

    def arrival(self):
        """The next program at the gate, as a socket: close it, and the program goes on."""
        door, _ = self.listener.accept()
        door.settimeout(PATIENCE)
        return door


@pytest.fixture
def gate():
    gate = Gate()
    with gate.listener:
        yield gate


def program(code, *arguments):
    """A program of a few lines that needs no gate."""
    return [sys.executable, "-S", "-c", "import json, os, signal, sys\n" + code, *arguments]


# ----------------------------------------------------------------------------------
# A fake server.  `Upstream` does what the test says, in the test's own thread; `playing`
# does so in a thread of its own, for a client that blocks.

STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n")


def reply(body, status="200 OK", **headers):
    """The bytes of a whole reply; body is bytes, or what becomes JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = ["HTTP/1.1 " + status, f"Content-Length: {len(body)}"]
    head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(head + ["", ""]).encode() + body


def transfer_chunk(block):
    return b"%x\r\n%b\r\n" % (len(block), block)


def streamed(*events):
    """The bytes of a streamed reply, a transfer chunk for each event."""
    return STREAM_HEAD + b"".join(map(transfer_chunk, events)) + b"0\r\n\r\n"


class Upstream:
    """One connection at a time: the test reads what came and says what goes back."""

    def __init__(self, tls=None):
        self.listener, self.tls = socket.create_server(("127.0.0.1", 0)), tls
        self.listener.settimeout(60)
        self.url = f"http{'s' * bool(tls)}://127.0.0.1:{self.listener.getsockname()[1]}/v1"

    def accept(self):
        """(connection, (request line, headers in lower case, body)) of the next request."""
        connection, _ = self.listener.accept()
        connection.settimeout(PATIENCE)
        if self.tls:
            connection = self.tls.wrap_socket(connection, server_side=True)
        with connection.makefile("rb") as file:
            line, headers = file.readline().decode("latin-1").strip(), {}
            while line:
                name, colon, value = file.readline().decode("latin-1").partition(":")
                if not colon:
                    break
                headers[name.lower()] = value.strip()
            return connection, (line, headers, file.read(int(headers.get("content-length", 0))))


@pytest.fixture
def upstream():
    upstream = Upstream()
    with upstream.listener:
        yield upstream


@contextlib.contextmanager
def playing(*replies, tls=None):
    """A loopback server: its n-th connection gets the n-th reply, later ones the last.

    A reply is bytes, or a function of the connection. Gives the base_url and the list
    of the requests as they come: (request line, headers in lower case, body).
    """
    upstream, requests, over = Upstream(tls), [], []

    def serve():
        for reply in itertools.chain(replies, itertools.repeat(replies[-1])):
            with contextlib.suppress(OSError):
                connection, request = upstream.accept()
                with connection:
                    if over:
                        return
                    requests.append(request)
                    connection.sendall(reply) if isinstance(reply, bytes) else reply(connection)
            if over:
                return
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield upstream.url, requests
    finally:
        over.append(True)
        socket.create_connection(upstream.listener.getsockname()).close()   # wakes accept
        thread.join(30)
        upstream.listener.close()


# ----------------------------------------------------------------------------------
# Processes: one that has ended, and the command line's, as it serves.

def environment(base_url=None, **more):
    """The environment of a process that somebody starts who has set nothing else."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("OPENAI_", "PYTHON", "PYTEST_"))
            and not name.lower().endswith("_proxy")}
    return {**kept, **({"OPENAI_BASE_URL": base_url} if base_url else {}), **more}


def finished(*words, **options):
    """A process that has ended: its returncode, stdout and stderr, which are text."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "timeout": 120,
               "stderr": subprocess.PIPE, "encoding": "utf-8", "env": environment(),
               **options}
    if "input" in options:
        del options["stdin"]
    return subprocess.run(words, **options)


class Running:
    """A server that the command line has started; `end` gives its status and last words.

    `said` holds the lines up to the one that says where it serves.
    """

    def __init__(self, *flags, start=(sys.executable, SERVER), port=0, **options):
        options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE,
                   "encoding": "utf-8", "env": environment(), **options}
        self.process = subprocess.Popen([*start, "--port", str(port), *flags], **options)
        self.said = []
        while not (self.said and "Serving" in self.said[-1]):
            self.said.append(self.process.stderr.readline())
            assert self.said[-1], self.said
        self.base_url = re.search(r"https?://\S+/v1", self.said[-1])[0]
        host, port = re.search(r"//\[?(.+?)\]?:(\d+)/", self.base_url).groups()
        self.server_address = host, int(port)

    def end(self):
        self.process.terminate()
        said = self.process.stderr.read().splitlines()
        return self.process.wait(PATIENCE), said

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def free_port(remainder=0, step=1):
    """A port that is free, below those that systems give away; port % step == remainder."""
    while True:
        port = random.randrange(20000, 32000) // step * step + remainder
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


# ----------------------------------------------------------------------------------
# TLS: a certificate of 127.0.0.1 that it has signed itself, good until 2120.

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBgDCCASWgAwIBAgIUYUvUzm5yCYqKMcreM6Z8APebrM0wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAx
MDAwMDAwWjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASllf9Ha0gW8sf72oN2LIMp4RHMynZgwk6Ha/W73dGv0M3aBUXgi4F9
kVlDgagQqSiCcU2n6T48hO2ZbQFhftCMo1MwUTAdBgNVHQ4EFgQU2YUXQCIP0tHs
T1vfY8BWCMm/4fIwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQwDwYD
VR0RBAgwBocEfwAAATAKBggqhkjOPQQDAgNJADBGAiEAyZYGuix4vgk4eaJwpA5I
Apxn1Ha1v6rQocxdGa7tSv4CIQCQd0d42UbwMV8FDu8GYXbvisegMUmSEcjanLMQ
2svDiw==
-----END CERTIFICATE-----
"""
CERTIFICATE_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgJT+mm/brlDA2fuRw
nrtk3xNgOJV8ki9eNXqR1dkfhRahRANCAASllf9Ha0gW8sf72oN2LIMp4RHMynZg
wk6Ha/W73dGv0M3aBUXgi4F9kVlDgagQqSiCcU2n6T48hO2ZbQFhftCM
-----END PRIVATE KEY-----
"""


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory):
    """The files (certificate, key)."""
    folder = tmp_path_factory.mktemp("tls")
    (folder / "certificate.pem").write_text(CERTIFICATE)
    (folder / "key.pem").write_text(CERTIFICATE_KEY)
    return str(folder / "certificate.pem"), str(folder / "key.pem")


@pytest.fixture(scope="session")
def certificate(tls_files):
    """The file of the certificate, and a server's context with it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*tls_files)
    return tls_files[0], context


@contextlib.contextmanager
def secured(server, tls_files):
    """A TLS connection to the server, checked against its certificate."""
    context = ssl.create_default_context(cafile=tls_files[0])
    with dial(server) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
        yield secure


# ==================================================================================
# THE SERVER: what a request may be, and what becomes of it

# ----------------------------------------------------------------------------------
# Transcripts.  Requests and the bytes of their replies; only ids and times are replaced.

CHAT_HEAD = ('{"id":"chatcmpl","object":"chat.completion.chunk","created":1,"model":"m",'
             '"system_fingerprint":"fp_openai_compat","service_tier":"default",')
TEXT_HEAD = ('{"id":"cmpl","object":"text_completion","created":1,"model":"m",'
             '"system_fingerprint":"fp_openai_compat",')
DETAILS = (',"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},'
           '"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,'
           '"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}')
TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}}}
FORCED = {"tools": [TOOL], "tool_choice": "required"}


def pinned(body):
    """The bytes of a reply with every id and time replaced."""
    body = re.sub(rb'"(chatcmpl|cmpl|call)[-_]\w+"', rb'"\1"', body)
    return re.sub(rb'"created":\d+', b'"created":1', body).decode()


def delta(delta, reason="null", index=0):
    return (f'{CHAT_HEAD}"choices":[{{"index":{index},"delta":{{{delta}}},"logprobs":null,'
            f'"finish_reason":{reason}}}]}}')


def text(text, reason="null", index=0):
    return (f'{TEXT_HEAD}"choices":[{{"text":"{text}","index":{index},"logprobs":null,'
            f'"finish_reason":{reason}}}]}}')


def counted(prompt, completion):
    return (f'"usage":{{"prompt_tokens":{prompt},"completion_tokens":{completion},'
            f'"total_tokens":{prompt + completion}')


def with_usage(chunks, usage):
    """The chunks as include_usage makes them: null in each, the usage in one more."""
    chunks = [chunk.replace('"choices"', '"usage":null,"choices"') for chunk in chunks]
    return [*chunks, chunks[0][:chunks[0].index('"usage"')] + usage + ',"choices":[]}']


ROLE = delta('"role":"assistant","content":"","refusal":null')
NO_TEXT = delta('"role":"assistant","content":null,"refusal":null')
HI_CHUNKS = [ROLE, *(delta(f'"content":"{token}"') for token in ("Hello", ",", " world", "!")),
             delta("", '"stop"')]
CALL_CHUNKS = [
    NO_TEXT,
    delta('"tool_calls":[{"index":0,"id":"call","type":"function",'
          '"function":{"name":"f","arguments":""}}]'),
    *(delta(f'"tool_calls":[{{"index":0,"function":{{"arguments":"{token}"}}}}]')
      for token in ("{", r'\"', "n", r'\"', ":", "0", "}")),
    delta("", '"tool_calls"')]
STREAMS = {  # name: (path, fields, the events before [DONE])
    "chat": (CHAT_PATH, {}, HI_CHUNKS),
    "chat with usage": (CHAT_PATH, {"stream_options": {"include_usage": True}},
                        with_usage(HI_CHUNKS, counted(4, 4) + DETAILS)),
    "cut": (CHAT_PATH, {"max_tokens": 1},
            [ROLE, delta('"content":"Hello"'), delta("", '"length"')]),
    "stopped": (CHAT_PATH, {"stop": ", w"},
                [ROLE, delta('"content":"Hello"'), delta("", '"stop"')]),
    "nothing": (CHAT_PATH, {"max_tokens": 0}, [ROLE, delta("", '"length"')]),
    "two choices": (CHAT_PATH, {"n": 2, "max_tokens": 1}, [
        ROLE, ROLE.replace('"index":0', '"index":1'),
        delta('"content":"Hello"'), delta('"content":"Hello"', index=1),
        delta("", '"length"'), delta("", '"length"', index=1)]),
    "a tool call": (CHAT_PATH, FORCED, CALL_CHUNKS),
    "completion": (TEXT_PATH, {}, [
        text("Hello"), text(","), text(" world"), text("!"), text("", '"stop"')]),
    "completion with usage": (
        TEXT_PATH, {"max_tokens": 1, "stream_options": {"include_usage": True}},
        with_usage([text("Hello"), text("", '"length"')], counted(4, 1) + "}")),
    "completion with echo": (TEXT_PATH, {"echo": True, "max_tokens": 0},
                             [text("Hello, world!"), text("", '"length"')]),
    "two prompts": (TEXT_PATH, {"prompt": ["a", "b"]}, [
        text("a"), text("b", index=1), text("", '"stop"'), text("", '"stop"', index=1)]),
    "characters as they are": (TEXT_PATH, {"prompt": "世é😀"}, [
        text("世"), text("é"), text("😀"), text("", '"stop"')]),
    "escaped where it has to be": (TEXT_PATH, {"prompt": "\u2028"}, [
        text(r"\u2028"), text("", '"stop"')]),
}
WHOLES = {  # name: (path, fields, what follows the head)
    "chat": (CHAT_PATH, {}, '"choices":[{"index":0,"message":{"role":"assistant",'
             '"content":"Hello, world!","refusal":null},"logprobs":null,'
             '"finish_reason":"stop"}],' + counted(4, 4) + DETAILS + "}"),
    "a tool call": (CHAT_PATH, FORCED, '"choices":[{"index":0,"message":{"role":"assistant",'
                    '"content":null,"refusal":null,"tool_calls":[{"id":"call",'
                    '"type":"function","function":{"name":"f","arguments":"{\\"n\\":0}"}}]},'
                    '"logprobs":null,"finish_reason":"tool_calls"}],'
                    + counted(4, 7) + DETAILS + "}"),
    "completion": (TEXT_PATH, {"max_tokens": 3}, '"choices":[{"index":0,'
                   '"text":"Hello, world","logprobs":null,"finish_reason":"length"}],'
                   + counted(4, 3) + "}}"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_byte_for_byte(name):
    path, fields, chunks = STREAMS[name]
    got = ask(echo, path, stream=True, **fields)
    assert got.chunks and pinned(got.body) == "".join(
        f"data: {event}\n\n" for event in (*chunks, "[DONE]"))


@pytest.mark.parametrize("name", WHOLES)
def test_a_whole_reply_byte_for_byte(name):
    path, fields, rest = WHOLES[name]
    got = ask(echo, path, **fields)
    head = (CHAT_HEAD if path == CHAT_PATH else TEXT_HEAD).replace(".chunk", "")
    assert got.json and pinned(got.body) == head + rest


def test_an_error_byte_for_byte():
    assert ask(echo, n="x").body == (
        b'{"error":{"message":"Invalid type for \'n\': expected an integer, but got a string '
        b'instead.","type":"invalid_request_error","param":"n","code":"invalid_type"}}')


def test_the_models_byte_for_byte():
    with Server(models=["a"]) as server:
        assert pinned(call(server, "GET", "/v1/models").body) == (
            '{"object":"list","data":[{"id":"a","object":"model","created":1,'
            '"owned_by":"openai_compat"}]}')


# ----------------------------------------------------------------------------------
# What the module says of itself: the examples in its docstrings, and its opening page.

def test_every_example_of_the_server_is_true():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL)
    tests = [each for each in finder.find(openai_compat) if each.examples]
    told = []
    for each in tests:
        runner.run(each, out=told.append)
    marks = sum((value.__doc__ or "").count("Example:\n") for value in documented(openai_compat))
    assert len(tests) >= marks > 30 and runner.summarize(verbose=False).failed == 0, "".join(told)


def documented(module):
    """All that is defined in a module, and the methods of its classes."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) == module.__name__ and callable(value):
            value = inspect.unwrap(value)
            yield value
            yield from filter(inspect.isfunction, vars(value).values() if inspect.isclass(value) else ())


def test_the_exchange_on_the_opening_page_is_what_is_sent():
    """Its lines are broken to fit the page, its id and time are those of one day."""
    def told(text):
        text = re.sub(r'"id":"[^"]*"', '"id":""', re.sub(r'"created":\d+', '"created":0', text))
        return re.sub(r"\s+", "", text)
    page = told(openai_compat.__doc__)
    body = re.search(r'\{"model": "echo", "stream": true,.*?\]\}', openai_compat.__doc__, re.S)[0]
    with Server() as server:
        streamed = post(server, CHAT_PATH, body).body.decode()
        whole = post(server, CHAT_PATH, body.replace("true", "false")).body.decode()
    assert told(streamed) in page and told(whole) in page
    assert page.count('data:{"id"') == streamed.count("data: {")


# ----------------------------------------------------------------------------------
# Requests.  What a body may hold, and the refusal of everything else.

def parsed(path=CHAT_PATH, **fields):
    parse = openai_compat.parse_chat if path == CHAT_PATH else openai_compat.parse_completion
    return parse({**(HI if path == CHAT_PATH else PROMPT), **fields})


def refused(path=CHAT_PATH, **fields):
    """(message, param, code) of the refusal of a request with these fields."""
    with pytest.raises(APIError) as error:
        parsed(path, **fields)
    assert (error.value.status, error.value.type) == (400, "invalid_request_error")
    check_shape(error.value.body(), ERROR)
    return error.value.message, error.value.param, error.value.code


TYPES = [  # field, paths, what it has to be, values of other types
    ("n",                 BOTH, "an integer", ("1", 1.0, True, [], {})),
    ("max_tokens",        BOTH, "an integer", ("1", 1.5, False, [], {})),
    ("seed",              BOTH, "an integer", ("1", 1.5, True)),
    ("temperature",       BOTH, "a decimal", ("1", True, [], {})),
    ("top_p",             BOTH, "a decimal", ("1", True, [])),
    ("presence_penalty",  BOTH, "a decimal", ("1", True, [])),
    ("frequency_penalty", BOTH, "a decimal", ("1", True, [])),
    ("stream",            BOTH, "a boolean", ("true", 1, 0, [], {})),
    ("stream_options",    BOTH, "an object", ("x", 1, [], True)),
    ("logit_bias",        BOTH, "an object", ("x", 1, [])),
    ("user",              BOTH, "a string", (1, [], {}, True)),
    ("logprobs",          (CHAT_PATH,), "a boolean", (1, "true", 5)),
    ("logprobs",          (TEXT_PATH,), "an integer", (True, "1", 1.5)),
    ("echo",              (TEXT_PATH,), "a boolean", (1, "true")),
    ("suffix",            (TEXT_PATH,), "a string", (1, ["x"])),
    ("best_of",           (TEXT_PATH,), "an integer", ("1", 1.5, True)),
    ("top_logprobs",      (CHAT_PATH,), "an integer", ("1", 1.5, True)),
    ("max_completion_tokens", (CHAT_PATH,), "an integer", ("1", 1.5, True)),
    ("messages",          (CHAT_PATH,), "an array", ("x", 1, {}, True)),
    ("tools",             (CHAT_PATH,), "an array", ("x", 1, {})),
    ("functions",         (CHAT_PATH,), "an array", ("x", 1, {})),
    ("parallel_tool_calls", (CHAT_PATH,), "a boolean", (1, "false")),
    ("response_format",   (CHAT_PATH,), "an object", ("json_object", 1, [])),
    ("store",             (CHAT_PATH,), "a boolean", (1, "true")),
    ("metadata",          (CHAT_PATH,), "an object", ("x", [], 1)),
    ("modalities",        (CHAT_PATH,), "an array", ("text", {})),
    ("service_tier",      (CHAT_PATH,), "a string", (1, [], {})),
    ("reasoning_effort",  (CHAT_PATH,), "a string", (1, [])),
    ("verbosity",         (CHAT_PATH,), "a string", (1, {})),
    ("safety_identifier", (CHAT_PATH,), "a string", (1, [])),
    ("prompt_cache_key",  (CHAT_PATH,), "a string", (1, [])),
    ("prediction",        (CHAT_PATH,), "an object", ("x", [])),
    ("web_search_options", (CHAT_PATH,), "an object", ("x", [])),
    ("model",             BOTH, "a string", (1, ["x"], {"x": 1}, True)),
]
NAMES = {str: "a string", int: "an integer", float: "a decimal", bool: "a boolean",
         list: "an array", dict: "an object", type(None): "null"}


@pytest.mark.parametrize("field, path, wanted, value", [
    (field, path, wanted, value) for field, paths, wanted, values in TYPES
    for path in paths for value in values])
def test_a_value_of_the_wrong_type_is_refused(field, path, wanted, value):
    assert refused(path, **{field: value}) == (
        f"Invalid type for '{field}': expected {wanted}, but got {NAMES[type(value)]} "
        "instead.", field, "invalid_type")


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("stop", [1, {}, True])
def test_a_stop_of_the_wrong_type_is_refused(path, stop):
    message, param, code = refused(path, stop=stop)
    assert (param, code) == ("stop", "invalid_type")
    assert re.search("expected .*string.*array.*, but got", message)


@pytest.mark.parametrize("field, path", [
    *((field, path) for field, paths, *_ in TYPES for path in paths
      if field not in ("model", "messages")), ("stop", CHAT_PATH), ("stop", TEXT_PATH)])
def test_null_is_absence(field, path):
    absent = parsed(path)
    assert parsed(path, **{field: None})[field] == absent[field]


LIMITS = [  # field, paths, least, most, kind
    ("n",                 BOTH, 1, 128, "integer"),
    ("max_tokens",        BOTH, 0, None, "integer"),
    ("seed",              BOTH, -2**63, 2**63 - 1, "integer"),
    ("temperature",       BOTH, 0, 2, "decimal"),
    ("top_p",             BOTH, 0, 1, "decimal"),
    ("presence_penalty",  BOTH, -2, 2, "decimal"),
    ("frequency_penalty", BOTH, -2, 2, "decimal"),
    ("logprobs",          (TEXT_PATH,), 0, 5, "integer"),
    ("best_of",           (TEXT_PATH,), 0, 20, "integer"),
    ("max_completion_tokens", (CHAT_PATH,), 1, None, "integer"),
    ("top_logprobs",      (CHAT_PATH,), 0, 20, "integer"),
]
LOGPROBS = {"top_logprobs": {"logprobs": True}}      # what a field needs beside itself


@pytest.mark.parametrize("field, path, value, kind, side, sign, bound", [
    (field, path, bound + step, kind, *side) for field, paths, least, most, kind in LIMITS
    for path in paths for bound, step, *side in (
        (least, -1, "below min", ">=", least), (most, 1, "above max", "<=", most))
    if bound is not None])
def test_a_number_beyond_its_bound_is_refused(field, path, value, kind, side, sign, bound):
    assert refused(path, **{**LOGPROBS.get(field, {}), field: value}) == (
        f"Invalid '{field}': {kind} {side}imum value. Expected a value {sign} {bound}, but "
        f"got {value} instead.", field, f"{kind}_{side.replace(' ', '_')}_value")


@pytest.mark.parametrize("field, path, bound", [
    (field, path, bound) for field, paths, least, most, _ in LIMITS for path in paths
    for bound in (least, most) if bound is not None and (field, bound) != ("best_of", 0)])
def test_a_number_at_its_bound_is_taken(field, path, bound):
    assert parsed(path, **{**LOGPROBS.get(field, {}), field: bound})[field] == bound


def long_list(item, count=129):
    return [item] * count


FN = {"name": "f"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    {"id": "b", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
USER = HI["messages"][0]


def tool_message(id):
    return {"role": "tool", "tool_call_id": id, "content": "x"}


def made_call(**fields):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return [{"role": "assistant", "tool_calls": [{**call, **fields}]}, tool_message("a")]


REFUSED = [  # fields, and the param, code and message of the refusal
    ({"model": None}, None, None, "you must provide a model parameter"),
    ({"model": ""}, None, None, "you must provide a model parameter"),
    ({"messages": None}, "messages", "missing_required_parameter",
     "Missing required parameter: 'messages'."),
    ({"messages": []}, "messages", "empty_array",
     "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an "
     "empty array instead."),
    ({"tools": long_list(TOOL)}, "tools", "array_above_max_length",
     "Invalid 'tools': array too long. Expected an array with maximum length 128, but got an "
     "array with length 129 instead."),
    ({"functions": long_list(FN)}, "functions", "array_above_max_length", None),
    ({"functions": []}, "functions", "empty_array", None),
    ({"safety_identifier": "x" * 65}, "safety_identifier", "string_above_max_length",
     "Invalid 'safety_identifier': string too long. Expected a string with maximum length 64, "
     "but got a string with length 65 instead."),
    ({"service_tier": "bogus"}, "service_tier", "invalid_value",
     "Invalid value: 'bogus'. Supported values are: 'auto', 'default', 'flex', 'scale', "
     "'priority', and 'fast'."),
    ({"reasoning_effort": "bogus"}, "reasoning_effort", "invalid_value", None),
    ({"verbosity": "bogus"}, "verbosity", "invalid_value", None),
    ({"prompt_cache_retention": "bogus"}, "prompt_cache_retention", "invalid_value", None),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value", None),
    ({"modalities": ["video"]}, "modalities[0]", "invalid_value", None),
    ({"metadata": {"k": 1}}, "metadata.k", "invalid_type", None),
    ({"metadata": {"k": "x" * 513}}, "metadata.k", "string_above_max_length", None),
    ({"stream_options": {}}, "stream_options", None,
     "The 'stream_options' parameter is only allowed when 'stream' is enabled."),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage",
     "invalid_type", None),
    ({"top_logprobs": 1}, "top_logprobs", None,
     "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."),
    ({"stop": ["x", 1]}, "stop[1]", "invalid_type", None),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value", None),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5", "invalid_type", None),
    ({"tool_choice": "auto"}, "tool_choice", None,
     "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are "
     "specified."),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "invalid_value",
     "Invalid value: 'any'. Supported values are: 'none', 'auto', and 'required'."),
    ({"tools": [TOOL], "tool_choice": 1}, "tool_choice", "invalid_type", None),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "tool_choice", None, "Tool choice 'g' not found in 'tools' parameter."),
    ({"tools": ["x"]}, "tools[0]", "invalid_type", None),
    ({"tools": [{"type": "x"}]}, "tools[0].type", "invalid_value", None),
    ({"tools": [{}]}, "tools[0].type", "missing_required_parameter", None),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter",
     None),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name",
     "missing_required_parameter", "Missing required parameter: 'tools[0].function.name'."),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name",
     "invalid_value", "Invalid 'tools[0].function.name': string does not match pattern. "
     "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."),
    ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name",
     "invalid_value", None),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]},
     "tools[0].function.name", "string_above_max_length", None),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
     "tools[0].function.parameters", "invalid_type", None),
    ({"functions": [{}]}, "functions[0].name", "missing_required_parameter", None),
    ({"functions": [FN], "function_call": "any"}, "function_call", "invalid_value", None),
    ({"function_call": "auto"}, "function_call", None, None),
    ({"functions": [FN], "function_call": {"name": "g"}}, "function_call", None, None),
    ({"response_format": {}}, "response_format.type", "missing_required_parameter", None),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value",
     "Invalid value: 'xml'. Supported values are: 'text', 'json_object', and 'json_schema'."),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema",
     "missing_required_parameter",
     "Missing required parameter: 'response_format.json_schema'."),
    ({"response_format": {"type": "json_schema", "json_schema": {}}},
     "response_format.json_schema.name", "missing_required_parameter", None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
     "response_format.json_schema.name", "invalid_value", None),
    ({"messages": ["x"]}, "messages[0]", "invalid_type", None),
    ({"messages": [{}]}, "messages[0].role", "missing_required_parameter", None),
    ({"messages": [{"role": "bogus", "content": "x"}]}, "messages[0].role", "invalid_value",
     "Invalid value: 'bogus'. Supported values are: 'system', 'developer', 'user', "
     "'assistant', 'tool', and 'function'."),
    ({"messages": [{"role": 1}]}, "messages[0].role", "invalid_type", None),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter",
     "Missing required parameter: 'messages[0].content'."),
    ({"messages": user(1)}, "messages[0].content", "invalid_type", None),
    ({"messages": user({})}, "messages[0].content", "invalid_type", None),
    ({"messages": user(["x"])}, "messages[0].content[0]", "invalid_type", None),
    ({"messages": user([{}])}, "messages[0].content[0].type", "missing_required_parameter",
     None),
    ({"messages": user([{"type": "x"}])}, "messages[0].content[0].type", "invalid_value", None),
    ({"messages": user([{"type": "text"}])}, "messages[0].content[0].text",
     "missing_required_parameter", None),
    ({"messages": user([{"type": "text", "text": 1}])}, "messages[0].content[0].text",
     "invalid_type", None),
    ({"messages": user([{"type": "image_url", "image_url": "x"}])},
     "messages[0].content[0].image_url", "invalid_type", None),
    ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name",
     "invalid_type", None),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id",
     "missing_required_parameter", None),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name",
     "missing_required_parameter", None),
    ({"messages": made_call(id=None)}, "messages[0].tool_calls[0].id",
     "missing_required_parameter", None),
    ({"messages": made_call(function="x")}, "messages[0].tool_calls[0].function",
     "invalid_type", None),
    ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls",
     "invalid_type", None),
]


@pytest.mark.parametrize("fields, param, code, message", REFUSED)
def test_a_chat_request_is_refused(fields, param, code, message):
    got = refused(**fields)
    assert got[1:] == (param, code) and message in (None, got[0])


@pytest.mark.parametrize("metadata", [
    {"k" * 65: "x"}, dict.fromkeys(map(str, range(17)), "x")])
def test_metadata_is_sixteen_short_pairs_at_most(metadata):
    assert parsed(metadata=dict.fromkeys(map("{:064}".format, range(16)), "x" * 512))
    assert refused(metadata=metadata)[1].startswith("metadata")


@pytest.mark.parametrize("fields, param, code, message", [
    ({"model": None}, None, None, "you must provide a model parameter"),
    ({"prompt": 1}, "prompt", "invalid_type", None),
    ({"prompt": True}, "prompt", "invalid_type", None),
    ({"prompt": {}}, "prompt", "invalid_type", None),
    ({"prompt": ["a", 1]}, "prompt", "invalid_type", None),
    ({"prompt": [1, "a"]}, "prompt", "invalid_type", None),
    ({"prompt": [1, True]}, "prompt", "invalid_type", None),
    ({"prompt": [1.5]}, "prompt", "invalid_type", None),
    ({"prompt": [-1]}, "prompt", "invalid_type", None),
    ({"prompt": [None]}, "prompt", "invalid_type", None),
    ({"prompt": ["a", [1]]}, "prompt", "invalid_type", None),
    ({"prompt": [[1], 2]}, "prompt", "invalid_type", None),
    ({"prompt": [[1], []]}, "prompt", "invalid_type", None),
    ({"prompt": [["a"]]}, "prompt", "invalid_type", None),
    ({"n": 3, "best_of": 2}, "best_of", None,
     "You requested that the server return more choices than it will generate (HINT: you must "
     "set 'n' (currently 3) to be at most 'best_of' (currently 2), or omit either parameter "
     "if you do not specifically want to use them.)"),
    ({"best_of": 0}, "best_of", None, None),
    ({"stream": True, "best_of": 2}, "best_of", None, None),
    ({"stream_options": {}}, "stream_options", None, None),
    ({"prompt": ["a"] * 129}, "prompt", "array_above_max_length", None),
    ({"prompt": ["a"] * 2, "n": 65}, "prompt", "array_above_max_length", None),
])
def test_a_completion_request_is_refused(fields, param, code, message):
    got = refused(TEXT_PATH, **fields)
    assert got[1:] == (param, code) and message in (None, got[0])


def test_a_completion_needs_a_prompt():
    with pytest.raises(APIError, match="Missing required parameter: 'prompt'."):
        openai_compat.parse_completion({"model": "m"})


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("field", ["top_k", "min_p", "chat_template_kwargs", "thinking"])
def test_unknown_fields_pass(path, field):
    assert parsed(path, **{field: {"x": 1}})[field] == {"x": 1}


@pytest.mark.parametrize("stop, stops", [
    (None, []), ("x", ["x"]), (["x", "y"], ["x", "y"]), ([], []), ("", []), (["", "x"], ["x"]),
    (["a", "b", "c", "d", "e"], ["a", "b", "c", "d", "e"]),
])
def test_a_stop_is_one_or_several(stop, stops):
    assert [*filter(None, parsed(stop=stop)["stop"])] == stops


@pytest.mark.parametrize("message", [
    {"role": "system", "content": "x"}, {"role": "developer", "content": "x", "name": "n"},
    {"role": "user", "content": None}, {"role": "user", "content": ""},
    {"role": "user", "content": []}, {"role": "assistant"},
    {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": None,
     "function_call": None, "annotations": [], "reasoning_content": "x"},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    {"role": "assistant", "content": "x", "tool_calls": []},
    {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "function", "name": "f", "content": "x"},
    {"role": "function", "name": "f", "content": None},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
    {"role": "user", "content": [{"type": "input_audio",
                                  "input_audio": {"data": "", "format": "wav"}}]},
    {"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]},
    {"role": "user", "content": [{"type": "text", "text": ""}]},
])
def test_a_message_as_clients_send_it_is_taken(message):
    assert parsed(messages=[message])["messages"] == [message]


@pytest.mark.parametrize("messages, text", [
    (user("a"), "a"), (user(None), ""), (user([]), ""),
    (user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "ab"),
    (user([{"type": "file", "file": {}}, {"type": "text", "text": "b"}]), "b"),
    (user("a") + user("b"), "b"), (user("a") + [{"role": "assistant", "content": "b"}], "a"),
    (user("a") + [CALLED, tool_message("a"), tool_message("b")], "a"),
    ([{"role": "system", "content": "s"}], "s"),
    ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], "no"),
])
def test_what_is_asked_is_the_last_user_message(messages, text):
    assert parsed(messages=messages)["text"] == text


@pytest.mark.parametrize("messages", [
    [USER, CALLED, tool_message("a"), tool_message("b")],
    [USER, CALLED, tool_message("b"), tool_message("a"), USER, CALLED, tool_message("a"),
     tool_message("b"), {"role": "assistant", "content": "x"}],
    [{"role": "assistant", "tool_calls": [
        {"id": "a", "type": "custom", "custom": {"name": "c", "input": "x"}}]},
     tool_message("a")],
])
def test_a_conversation_with_every_call_answered_is_taken(messages):
    assert parsed(messages=messages)


TOOL_ALONE = ("Invalid parameter: messages with role 'tool' must be a response to a preceeding "
              "message with 'tool_calls'.")
UNANSWERED = ("An assistant message with 'tool_calls' must be followed by tool messages "
              "responding to each 'tool_call_id'. The following tool_call_ids did not have "
              "response messages: ")
BROKEN = [  # conversation, param, code, message
    ([tool_message("a")], "messages.[0].role", None, TOOL_ALONE),
    ([USER, tool_message("a")], "messages.[1].role", None, TOOL_ALONE),
    ([USER, CALLED, tool_message("a"), tool_message("b"), USER, tool_message("a")],
     "messages.[5].role", None, TOOL_ALONE),
    ([USER, CALLED], "messages.[1].role", None, UNANSWERED + "a, b"),
    ([USER, CALLED, tool_message("a")], "messages.[2].role", None, UNANSWERED + "b"),
    ([USER, CALLED, tool_message("b"), USER], "messages.[3].role", None, UNANSWERED + "a"),
    ([USER, CALLED, tool_message("x")], "messages.[2].tool_call_id", None,
     "Invalid parameter: 'tool_call_id' of 'x' not found in 'tool_calls' of previous message."),
    (made_call(function={"name": "f", "arguments": {}}),
     "messages[0].tool_calls[0].function.arguments", "invalid_type",
     "Invalid type for 'messages[0].tool_calls[0].function.arguments': expected a string, but "
     "got an object instead."),
    (made_call(function={"name": "f"}), "messages[0].tool_calls[0].function.arguments",
     "missing_required_parameter", None),
]


@pytest.mark.parametrize("messages, param, code, message", BROKEN)
def test_the_conversation_is_checked(messages, param, code, message):
    got = refused(messages=messages)
    assert got[1:] == (param, code) and message in (None, got[0])


@pytest.mark.parametrize("messages", [row[0] for row in BROKEN])
def test_a_lenient_server_takes_any_conversation(messages):
    with Server(strict=False) as server:
        assert post(server, CHAT_PATH, {**HI, "messages": messages}).status == 200


def test_leniency_turns_off_nothing_else():
    with Server(strict=False) as server:
        assert post(server, CHAT_PATH, {**HI, "messages": user(1)}).status == 400


@pytest.mark.parametrize("messages, asked", [
    ([{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}], "b"),
    ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "c"}], "c")])
def test_without_a_user_the_last_message_is_what_is_asked(messages, asked):
    assert ask(echo, messages=messages).text == asked


@pytest.mark.parametrize("fields, param", [
    ({"model": ("v" * 20000)}, None), ({"tool_choice": ("v" * 20000), "tools": []}, "tool_choice"),
    ({"reasoning_effort": ("v" * 20000)}, "reasoning_effort"), ({"service_tier": ("v" * 20000)}, "service_tier"),
    ({"messages": [{"role": ("v" * 20000)}]}, "messages[0].role"), ({"n": 10**4000}, "n"),
    ({"messages": [*user("x"), {"role": "tool", "content": "x", "tool_call_id": ("v" * 20000)}]}, "messages.[1].role"),
    ({"logit_bias": {("v" * 20000): 200}}, "logit_bias.")])
def test_no_refusal_repeats_a_long_value_whole(fields, param):
    with Server(models=["m"]) as server:
        got = post(server, CHAT_PATH, {**HI, **fields})
    assert got.status in (400, 404) and len(got.body) < 5000
    assert param is None or got.error["param"].startswith(param)


@both
def test_stream_options_are_for_streams_alone(stream):
    got = ask(echo, stream=stream, stream_options={"include_usage": True})
    assert got.status == (200 if stream else 400)
    assert stream or got.error["param"] == "stream_options"


@pytest.mark.parametrize("path", BOTH)
def test_a_field_that_nobody_knows_passes_as_it_is_null_or_not(path):
    seen = []
    ask(lambda request: seen.append((request["odd"], request["x"])) or "", path, odd=None, x={"a": [None]})
    assert seen == [(None, {"a": [None]})]


@pytest.mark.parametrize("path", BOTH)
def test_every_known_field_is_present_in_a_request(path):
    assert {field for field, paths, *_ in TYPES if path in paths} <= parsed(path).keys()


def test_the_first_fault_is_reported():
    assert refused(model=None, messages=None, n=0)[0] == "you must provide a model parameter"
    assert refused(messages=None, n=0)[1] == "messages"
    assert refused(messages=[{}], n=0)[1] in ("messages[0].role", "n")


# ----------------------------------------------------------------------------------
# Tokens.

@pytest.mark.parametrize("text, tokens", [
    ("", []), ("Hello, world!", ["Hello", ",", " world", "!"]),
    (" a  b ", [" a", " ", " b", " "]),
    ("x_1=2.5", ["x_1", "=", "2", ".", "5"]),
    ("世界 again", ["世", "界", " again"]), ("ひらカナ", ["ひ", "ら", "カ", "ナ"]),
    ("한국", ["한", "국"]),
    ("e\u0301", ["e\u0301"]), ("naïve", ["naïve"]), ("🇫🇷🇩🇪", ["🇫🇷", "🇩🇪"]),
    ("👩‍👩‍👧x", ["👩‍👩‍👧", "x"]), ("👍🏽!", ["👍🏽", "!"]),
    ("か\u3099", ["か\u3099"]), ("1\ufe0f\u20e3", ["1\ufe0f\u20e3"]), ("❤️", ["❤️"]),
    ("🏴\U000e0067\U000e0062\U000e007f", ["🏴\U000e0067\U000e0062\U000e007f"]),
])
def test_a_token_is_what_a_reader_calls_a_word_a_sign_or_a_mark(text, tokens):
    assert tokenize(text) == tokens


ALPHABET = ("aZ9_ \n\t.,!\"\\é世界ひ한\u0301\u0308\u3099\u200d\ufe0f\u20e3😀👩🏽🇫🇷\u2028\x85\0"
            "\ud83d\udc00ßשاऀि\u0e33\U0002000b\U000e0101")


def some_texts(count, seed=1):
    """Texts of all kinds of characters, always the same ones."""
    pick = random.Random(seed)
    return ["".join(pick.choice(ALPHABET) for _ in range(pick.randrange(30)))
            for _ in range(count)]


def test_the_join_of_the_tokens_is_the_text():
    for text in some_texts(3000):
        tokens = tokenize(text)
        assert "".join(tokens) == text and all(tokens)


def test_no_token_starts_with_what_combines():
    for text in some_texts(3000, seed=2):
        tokens = tokenize(text)
        for before, token in zip(tokens, tokens[1:]):
            assert not unicodedata.category(token[0]).startswith("M"), text
            assert not before.endswith("\u200d") and token[0] != "\u200d", text


def test_any_code_point_is_a_token():
    every = "".join(map(chr, range(0, 0x110000, 97)))
    assert "".join(tokenize(every)) == every


def test_a_tokenizer_may_be_put_in_its_place():
    with Server(say("abc"), tokenize=list) as server:
        got = post(server, CHAT_PATH, {**HI, "max_tokens": 2})
    assert got.text == "ab" and got.json["usage"]["prompt_tokens"] == len("Hello, world!")


def test_a_tokenizer_may_decode():
    def letters(text):
        return list(text)
    letters.decode = chr
    with Server(tokenize=letters) as server:
        assert post(server, TEXT_PATH, {**PROMPT, "prompt": [72, 105]}).text == "Hi"


@pytest.mark.parametrize("path", BOTH)
def test_one_of_its_tokens_may_be_empty(path):
    fields = {"logprobs": True} if path == CHAT_PATH else {"logprobs": 1, "echo": True}
    with Server(say("世", "x"), tokenize=lambda text: ["", text] if text else []) as server:
        for limit, count in ((None, 4), (3, 3), (2, 2), (1, 1)):
            body = {**(HI if path == CHAT_PATH else PROMPT), **fields, "max_tokens": limit}
            assert post(server, path, body).json["usage"]["completion_tokens"] == count
            assert post(server, path, {**body, "stream": True}).chunks


@both
@pytest.mark.parametrize("path", BOTH)
def test_a_tokenizer_that_makes_tokens_of_nothing_changes_no_reply(path, stream):
    with Server("", tokenize=lambda text: [text]) as server:
        got = post(server, path, {**HI, **PROMPT, "stream": stream, "stop": "x"})
        assert got.text == "" and b'"refusal":""' not in got.body


@pytest.mark.parametrize("text", [
    "one two  three\n" * 20000, "世" * 70000,
    *("世" * length + "e\u0301\u0301\U0001f469\u200d\U0001f469 x"
      for length in range(65530, 65537))], ids=lambda text: f"{text[:3]}... {len(text)}")
def test_a_long_text_has_the_tokens_that_it_has(text):
    got = ask(always(text), TEXT_PATH)
    assert got.text == text
    assert got.json["usage"]["completion_tokens"] == len(tokenize(text))


@pytest.mark.parametrize("text", ["a " + "b" * 200000, " " + "b" * 200000 + " c", "b" * 65537, " " * 200000])
def test_a_word_longer_than_a_slice_ends_wherever_a_space_stands(text):
    parts = list(openai_compat.slices(text))
    assert "".join(parts) == text and "" not in parts and max(map(len, parts)) <= 65537


def test_a_word_of_any_length_is_said():
    assert ask(always("a " + "x" * 200000)).text == "a " + "x" * 200000


# ----------------------------------------------------------------------------------
# Schema samples.  Each instance is checked by a small validator of the test's own, and
# under the marker interop by the package jsonschema and by pydantic.

def fits(value, schema, root):
    """Is the value an instance of the schema?  For the keywords of KEYWORDS, and $ref."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        target = root
        for name in schema["$ref"].split("/")[1:]:
            target = target[name]
        if not fits(value, target, root):
            return False
    return all(holds(value, schema[keyword], schema, root)
               for keyword, holds in KEYWORDS.items() if keyword in schema)


def has_type(value, types, *_):
    types = [types] if isinstance(types, str) else types
    return any(type(value) in JSON_TYPES[each] for each in types) or (
        "integer" in types and type(value) is float and value.is_integer())


def on(kind, test):
    """A test that only values of that kind have to pass."""
    return lambda value, limit, *_: type(value) not in kind or test(value, limit)


def members_fit(value, _, schema, root):
    return type(value) is not dict or all(
        fits(item, schema.get("properties", {}).get(
            name, schema.get("additionalProperties", True)), root)
        for name, item in value.items())


def items_fit(value, _, schema, root):
    rest = itertools.repeat(schema.get("items", True))
    return type(value) is not list or all(
        fits(item, each, root)
        for item, each in zip(value, itertools.chain(schema.get("prefixItems", ()), rest)))


def same(a, b):
    """Equality in JSON: 1 and 1.0 are equal, 1 and true are not."""
    if type(a) in (list, dict) or type(b) in (list, dict):
        a, b = ([*x.items()] if type(x) is dict else x for x in (a, b))
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and (type(a) is bool) == (type(b) is bool)


JSON_TYPES = {"object": (dict,), "array": (list,), "string": (str,), "null": (type(None),),
              "number": (int, float), "integer": (int,), "boolean": (bool,)}
LENGTHS = [("Length", str), ("Items", list), ("Properties", dict)]
KEYWORDS = {
    "type": has_type,
    "enum": lambda value, values, *_: any(same(value, each) for each in values),
    "const": lambda value, wanted, *_: same(value, wanted),
    "minimum": on((int, float), lambda value, limit: value >= limit),
    "maximum": on((int, float), lambda value, limit: value <= limit),
    "exclusiveMinimum": on((int, float), lambda value, limit: value > limit),
    "exclusiveMaximum": on((int, float), lambda value, limit: value < limit),
    "multipleOf": on((int, float), lambda value, step: (value / step).is_integer()),
    **{"min" + noun: on((kind,), lambda value, limit: len(value) >= limit)
       for noun, kind in LENGTHS},
    **{"max" + noun: on((kind,), lambda value, limit: len(value) <= limit)
       for noun, kind in LENGTHS},
    "uniqueItems": on((list,), lambda value, wanted: not wanted or not any(
        same(*pair) for pair in itertools.combinations(value, 2))),
    "required": on((dict,), lambda value, names: value.keys() >= set(names)),
    "properties": members_fit, "additionalProperties": members_fit,
    "prefixItems": items_fit, "items": items_fit,
    "propertyNames": lambda value, schema, _, root: type(value) is not dict or all(
        fits(name, schema, root) for name in value),
    "anyOf": lambda value, schemas, _, root: any(fits(value, each, root) for each in schemas),
    "oneOf": lambda value, schemas, _, root: 1 == sum(fits(value, each, root)
                                                      for each in schemas),
    "allOf": lambda value, schemas, _, root: all(fits(value, each, root) for each in schemas),
    # Not known to `sample`: an instance to which one of them applies is refused.
    "pattern": on((str,), lambda value, pattern: re.search(pattern, value)),
    "not": lambda value, schema, _, root: not fits(value, schema, root),
    "contains": lambda value, schema, _, root: type(value) is not list or any(
        fits(item, schema, root) for item in value),
}


def an_object(**properties):
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}


def a_set(item, least=2):
    return {"type": "array", "uniqueItems": True, "items": item, "minItems": least}


STRING, INTEGER, NUMBER_TYPE = {"type": "string"}, {"type": "integer"}, {"type": "number"}
NODE = an_object(value=INTEGER, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
TREE = {"type": "object", "required": ["children"], "properties": {
    "children": {"type": "array", "items": {"$ref": "#"}}}}
KINDS = [{"type": "object", "properties": {"kind": {"const": kind}}} for kind in ("cat", "dog")]
SATISFIED = [
    ({}, {}), (True, {}), ({"type": "object"}, {}), ({"type": "array"}, []), (STRING, "text"),
    ({"$id": "https://example.com/a", **STRING}, "text"),
    (INTEGER, 0), ({"type": "boolean"}, False), ({"type": "null"}, None),
    ({"type": ["string", "null"]}, "text"), (an_object(city=STRING), {"city": "city"}),
    ({"type": "object", "properties": {"a": STRING}}, {}), (an_object(**{"": STRING}), {"": "text"}),
    (an_object(tags={"type": "array", "items": STRING, "minItems": 1}), {"tags": ["tags"]}),
    ({"enum": ["x", "y"]}, "x"), ({"const": 5}, 5), ({"const": None}, None),
    ({"enum": [1, "x"], "type": "string"}, "x"), ({"const": {"a": [1]}}, {"a": [1]}),
    ({"enum": [1, True], "type": "boolean"}, True), ({"enum": [True, 1.0], "const": 1}, 1),
    ({"enum": [{"a": 1}, {"a": "x"}], "properties": {"a": STRING}}, {"a": "x"}),
    ({**STRING, "minLength": 6}, "textxx"), ({**STRING, "maxLength": 2}, "te"),
    ({**STRING, "default": "d"}, "d"), ({**STRING, "examples": ["e", 1]}, "e"),
    ({**STRING, "default": 1}, "text"), ({**STRING, "pattern": "^a", "default": "ab"}, "ab"),
    ({**an_object(a={**STRING, "pattern": "^b"}), "examples": [{"a": "b"}]}, {"a": "b"}),
    ({"type": "array", "items": {"type": "null"}, "minItems": 2}, [None, None]),
    ({"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2},
     [0, "text"]),
    ({"prefixItems": [INTEGER], "items": STRING, "minItems": 2}, [0, "text"]),
    (a_set(STRING, 3), ["text", "text2", "text3"]), (a_set(INTEGER, 3), [0, 1, -1]),
    (a_set({"type": "boolean"}), [False, True]), (a_set({"enum": [1, 1.0, True]}), [1, True]),
    ({**INTEGER, "minimum": 3}, 3), ({**INTEGER, "maximum": -3}, -3),
    ({**INTEGER, "exclusiveMinimum": 3}, 4), ({**INTEGER, "exclusiveMaximum": -3}, -4),
    ({**INTEGER, "minimum": 2.5}, 3), ({**INTEGER, "maximum": -2.5}, -3),
    ({**INTEGER, "minimum": 5, "multipleOf": 4}, 8),
    ({**INTEGER, "minimum": -9, "maximum": -5, "multipleOf": 4}, -8),
    ({**INTEGER, "minimum": 2 ** 70, "multipleOf": 3}, 2 ** 70 + 2),
    ({**NUMBER_TYPE, "exclusiveMinimum": 0, "exclusiveMaximum": 1}, 0.5),
    ({**NUMBER_TYPE, "minimum": 0.25}, 0.25), ({**NUMBER_TYPE, "minimum": -2}, 0),
    ({**NUMBER_TYPE, "minimum": 0.7, "multipleOf": 0.5}, 1),
    ({"oneOf": [INTEGER, NUMBER_TYPE]}, 0.5), ({"anyOf": [{"enum": []}, {"const": 2}]}, 2),
    ({"oneOf": [False, {"const": 2}]}, 2), ({"oneOf": KINDS}, {"kind": "cat"}),
    ({**INTEGER, "anyOf": [STRING, {"minimum": 7}]}, 7),
    ({"oneOf": [an_object(a=INTEGER), an_object(a=NUMBER_TYPE, b=STRING)]}, {"a": 0}),
    ({"allOf": [INTEGER, {"minimum": 3}, {"minimum": 5}]}, 5),
    ({"allOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {
        "a": {"const": 1}, "b": {"const": 2}}}, {"a": 1, "b": 2}),
    ({"allOf": [NUMBER_TYPE, INTEGER]}, 0), ({"allOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, 2),
    ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": INTEGER}}, 3),
    ({"$ref": "#/definitions/a", "definitions": {"a": {"const": 1}}}, 1),
    ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, {"value": 0, "next": None}),
    (TREE, {"children": []}),
    ({"allOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/c"}], "$defs": {
        "a": INTEGER, "b": {"$ref": "#/$defs/a", "minimum": 1},
        "c": {"$ref": "#/$defs/a", "minimum": 2}}}, 2),
    ({"propertyNames": {"const": "a"}, "additionalProperties": INTEGER}, {}),
    ({"type": "object", "patternProperties": {"^a": INTEGER}}, {}),
    ({"type": "object", "minProperties": 2, "additionalProperties": INTEGER},
     {"key": 0, "key2": 0}),
    ({"minProperties": 2, "propertyNames": {"enum": ["r", "g"]}, "additionalProperties": INTEGER},
     {"r": 0, "g": 0}),
    ({"type": "object", "minProperties": 1, "properties": {"a": INTEGER}}, {"a": 0}),
]


@pytest.mark.parametrize("schema, instance", SATISFIED)
def test_a_sample_is_a_small_instance_of_its_schema(schema, instance):
    got = sample(schema)
    assert same(got, instance) and type(got) is type(instance) and fits(got, schema, schema)


@pytest.mark.parametrize("ref, names", [
    ("#/$defs/a~1b", "a/b"), ("#/$defs/a~01b", "a~1b"), ("#/%24defs/a%20b", "a b")])
def test_a_reference_is_a_json_pointer(ref, names):
    assert sample({"$ref": ref, "$defs": {names: {"const": 1}}}) == 1


def test_items_can_be_a_list_as_in_older_drafts():
    assert sample({"items": [INTEGER, STRING], "minItems": 2, "maxItems": 2}) == [0, "text"]


@pytest.mark.parametrize("form, pattern", [
    ("date", r"\d{4}-\d\d-\d\d"), ("time", r"\d\d:\d\d:\d\dZ"), ("duration", "P1D"),
    ("date-time", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)"),
    ("email", r"\w+@\w+\.\w+"), ("uuid", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    ("uuid1", r".{14}1.*"), ("uuid5", r".{14}5.*"), ("uri", r"https?://\S+"),
    ("hostname", r"[\w.]+"), ("ipv4", r"(\d+\.){3}\d+"), ("ipv6", "[0-9a-f:]+"),
    ("ipv4network", r"(\d+\.){3}\d+/\d+"), ("password", "text"), ("binary", "text"),
])
def test_a_sample_obeys_the_format(form, pattern):
    assert re.fullmatch(pattern, sample({"type": "string", "format": form}))


@pytest.mark.parametrize("schema, keyword", [
    (False, "allOf"), ({"enum": []}, "enum|type"), ({"enum": ["x"], **INTEGER}, "type"),
    ({"const": "x", **INTEGER}, "type"), ({"enum": [True], "const": 1}, "enum|const"),
    ({**INTEGER, "minimum": 2, "maximum": 1}, "m..imum"),
    ({**INTEGER, "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "exclusiveM..imum"),
    ({**INTEGER, "minimum": 1, "maximum": 3, "multipleOf": 5}, "multipleOf|m..imum"),
    ({**STRING, "minLength": 3, "maxLength": 2}, "m..Length"),
    ({**STRING, "format": "date", "maxLength": 2}, "format|maxLength"),
    ({**STRING, "format": "nobody-knows"}, "format"), ({**STRING, "pattern": "^a+$"}, "pattern"),
    (an_object(a={"default": "b"}, b={"enum": ["b"], "pattern": "^x"}), "pattern"),
    ({"required": ["a"], "propertyNames": {"pattern": "^b"}}, "pattern"),
    ({"type": "array", "minItems": 2, "maxItems": 1}, "m..Items"),
    ({"type": "array", "minItems": 2, "items": False}, "items"),
    (a_set({"type": "boolean"}, 3), "uniqueItems"), (a_set({"enum": [1, 1.0]}), "uniqueItems"),
    ({"type": "object", "minProperties": 1, "maxProperties": 0}, "m..Properties"),
    ({"type": "object", "minProperties": 1, "patternProperties": {"a": {}}}, "patternProperties"),
    ({"required": ["a"], "additionalProperties": False}, "required|additionalProperties"),
    ({"allOf": [an_object(a=STRING), {"required": ["b"]}]}, "additionalProperties"),
    ({"allOf": [STRING, {"type": "null"}]}, "type"), ({"allOf": [{"const": 1}, {"const": 2}]}, "const"),
    ({"oneOf": [{"required": ["a"]}, {"required": ["a"]}]}, "oneOf"),
    (an_object(a={"$id": "a", "$ref": "#/$defs/b"}), r"\$ref|\$id"), ({"not": {}}, "not"), ({"if": {}}, "if"), ({"contains": {}}, "contains"),
    ({"$ref": "#/$defs/none"}, r"\$ref"), ({"$ref": "http://example.com/"}, r"\$ref"),
    ({"$ref": "other#/$defs/a", "$defs": {"a": {}}}, r"\$ref"),
    ({"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}}, r"\$ref"), ({"$ref": "#"}, r"\$ref"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, r"\$ref"),
    ({"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}, r"\$ref"),
    ({"anyOf": []}, "anyOf"), ({"oneOf": [{"not": {}}]}, "not|oneOf"),
    ({"enum": [1, 5], "minimum": 9}, "minimum"), ({"type": "bogus"}, "type"),
])
def test_what_cannot_be_satisfied_is_a_400_that_names_the_keyword(schema, keyword):
    with pytest.raises(APIError) as error:
        sample(schema)
    assert (error.value.status, error.value.code) == (400, "invalid_json_schema")
    assert re.search(f"'({keyword})'", error.value.message)


def doubling(combine, depth=40):
    """Definitions that each use the next one twice."""
    below = {f"d{i}": combine({"$ref": f"#/$defs/d{i + 1}"}) for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**below, f"d{depth}": INTEGER}}


def nested(wrap, depth=900):
    return functools.reduce(lambda schema, _: wrap(schema), range(depth), INTEGER)


@pytest.mark.parametrize("schema", [
    None, 1, 1.5, "x", [], {"type": 1}, {"properties": 1}, {"type": "object", "required": 1},
    {"type": "object", "required": [1]}, {"type": "array", "minItems": "x"}, {"enum": 1},
    {"anyOf": 1}, {"$ref": 1}, {"type": "number", "multipleOf": 0}, {"type": ["x"]},
    {"type": "integer", "minimum": "x"}, {"type": []}, {"type": {}}, {"$ref": "#/$defs/0/x"},
    an_object(a=1), {"type": "object", "required": ["a"], "properties": []},
    {"type": "number", "minimum": 5, "multipleOf": 1e-320}, {"enum": [10 ** 400], "multipleOf": .1},
    {"type": "string", "format": []}, {"type": "array", "minItems": 1.5}, {"default": math.nan},
    {"type": "number", "minimum": math.inf}, {"const": object()},
    # Too large, too much work, too deep:
    *map(doubling, (lambda ref: an_object(a=ref, b=ref), lambda ref: {"allOf": [ref, ref]},
                    lambda ref: {"items": ref, "minItems": 2}, lambda ref: {"oneOf": [ref, ref]},
                    lambda ref: {"anyOf": [{"allOf": [ref, {"type": "null"}]}, ref]},
                    lambda ref: {"anyOf": [an_object(a=ref, b=False), an_object(a=ref)]})),
    nested(lambda schema: an_object(a=schema)), nested(lambda schema: {"anyOf": [schema]}),
    {"type": "array", "minItems": 10 ** 9}, {"type": "array", "minItems": 200_000},
    {"type": "string", "minLength": 10 ** 9}, {"type": "object", "minProperties": 10 ** 9},
    {"type": "array", "items": {"type": "string", "minLength": 10 ** 5}, "minItems": 1000},
    {"type": "array", "items": {"const": "x" * 10 ** 5}, "minItems": 1000},
    an_object(**{f"a{i}": {"type": "object", "required": ["x" * 10 ** 5]} for i in range(100)}),
    {"type": "string", "enum": list(range(10 ** 5))}, {"allOf": [{}] * 10 ** 5},
    {"uniqueItems": True, "default": list(range(10 ** 5)), "minItems": 10 ** 5},
    {"type": "string", "anyOf": [{"const": i} for i in range(10 ** 5)]},
], ids=lambda schema: str(type(schema)))
def test_a_hostile_schema_is_refused(schema):
    with pytest.raises(APIError) as error:
        sample(schema)
    assert error.value.status == 400 and len(error.value.message) < 10 ** 3


def random_schema(pick, depth):
    """A schema of the keywords that `fits` knows, satisfiable or not."""
    inner = [random_schema(pick, depth - 1) for _ in range(pick.randrange(1, 4) if depth else 0)]
    combined = [
        {"anyOf": inner}, {"oneOf": inner}, {**inner[0], "allOf": inner[1:]},
        {"$ref": pick.choice(["#", *["#/$defs/a", "#/$defs/b"] * 3])},
        {"enum": pick.choices([0, 1, 1.0, True, "a", None, 2.5, [], {"a": 1}], k=2)},
        {"type": "object", "properties": dict(zip("abc", inner)),
         "required": some(pick, 0.4, "abcd"), **some(pick, 0.2, {
             "additionalProperties": pick.choice([False, inner[0]]), "minProperties": 2,
             "maxProperties": 2, "propertyNames": {"enum": ["a", "b", "c"]}})},
        {"type": "array", "items": inner[0], "minItems": pick.randrange(3), **some(pick, 0.2, {
            "items": False, "prefixItems": inner, "maxItems": 2, "uniqueItems": True})},
    ] if depth else []
    number = {"type": pick.choice(["integer", "number"]), **some(pick, 0.25, {
        "multipleOf": pick.choice([1, 2, 3, 0.5, 0.01]), **{
            bound: pick.randrange(-8, 9) / pick.choice([1, 1, 2, 8]) for bound in BOUNDS}})}
    text = {"type": "string", **some(pick, 0.3, {
        "minLength": pick.randrange(4), "maxLength": pick.randrange(2, 6)})}
    rare = {"default": pick.choice([0, "a", [], {}, 1.5]), "examples": [1, "b"],
            "pattern": "a", "not": {"type": "string"}, "contains": {"type": "null"}}
    plain = [number, text, {"type": pick.choice(["null", "boolean"])}]
    return {**pick.choice([*combined, *combined, *plain]), **some(pick, 0.02, rare)}


def some(pick, share, items):
    """A random share of a list, or of a dict."""
    kept = [item for item in items if pick.random() < share]
    return {name: items[name] for name in kept} if type(items) is dict else kept


BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def random_samples(count, seed):
    """(schema, instance) for those of `count` random schemas that `sample` satisfies."""
    pick = random.Random(seed)
    for _ in range(count):
        schema = {"$defs": {"a": random_schema(pick, 1), "b": random_schema(pick, 2)},
                  **random_schema(pick, 3)}
        with contextlib.suppress(APIError):
            yield schema, sample(schema)


def trusts(schema):
    """Has the schema a pattern?  It is trusted to match an example that stands with it."""
    return '"pattern"' in json.dumps(schema)


def test_every_sample_is_an_instance_of_its_schema():
    made = list(random_samples(600, seed=3))
    for schema, instance in made:
        assert trusts(schema) or fits(instance, schema, schema), (schema, instance)
    assert len(made) > 300


@pytest.mark.interop
def test_jsonschema_accepts_every_sample(tmp_path):
    made = [pair for pair in [*random_samples(10_000, seed=4), *SATISFIED, *(
        (schema, sample(schema)) for schema, _ in SATISFIED)] if not trusts(pair[0])]
    (tmp_path / "made.json").write_text(json.dumps(made))
    assert len(made) > 5_000
    assert printed("jsonschema", """
import json, jsonschema, sys
for schema, instance in json.load(open(sys.argv[2])):
    try:
        if not jsonschema.Draft202012Validator(schema).is_valid(instance):
            print(schema, instance)
    except RecursionError:
        pass        # jsonschema follows a schema that leads to itself at the same place
""", "", str(tmp_path / "made.json")) == []


@pytest.mark.interop
def test_pydantic_accepts_the_sample_of_a_model():
    assert printed("jsonschema", PYDANTIC, "", str(HERE)) == ["49 models"]


PYDANTIC = '''
import sys; sys.path.insert(0, sys.argv[2])
import datetime, decimal, enum, ipaddress, uuid
from typing import Annotated, Any, Literal, Optional, Union
from annotated_types import Len
from pydantic import *
from pydantic.dataclasses import dataclass
from openai_compat import sample

class Color(enum.Enum): red, green = "r", "g"
class Point(BaseModel): x: float; y: float = Field(gt=0.5, lt=0.75)
class Node(BaseModel): value: int; next: Optional["Node"]
class Tree(BaseModel): name: str; children: list["Tree"]
class Cat(BaseModel): kind: Literal["cat"]; lives: int = Field(ge=1, le=9)
class Dog(BaseModel): kind: Literal["dog"] = "dog"; name: str = Field(min_length=8)
class Strict(BaseModel): model_config = ConfigDict(extra="forbid", strict=True); n: int
class Example(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"code": "AB"}]})
    code: str = Field(pattern="^[A-Z]+$")
@dataclass
class Data: a: int; b: list[str]

text = Annotated[str, Field(min_length=2, max_length=3)]
kinds = [
    Color, Union[int, str], Optional[Point], Union[Point, Color], tuple[int, text, Point],
    Annotated[Union[Cat, Dog], Field(discriminator="kind")], list[Point], Any, Data, bytes,
    dict[Literal["a"], int], dict[Color, int], dict[datetime.date, int], bool, None, SecretStr,
    dict[Annotated[str, Field(pattern="^a")], int], Annotated[dict[str, int], Len(1)],
    Annotated[dict[Color, int], Len(2)], Annotated[set[int], Len(2)], frozenset[Color],
    Annotated[set[str], Len(3, 4)], Annotated[list[text], Len(2)], decimal.Decimal, AnyUrl,
    Annotated[int, Field(gt=3, multiple_of=5)], Annotated[float, Field(ge=1.115)], HttpUrl,
    datetime.datetime, datetime.date, datetime.time, datetime.timedelta, uuid.UUID, UUID1,
    UUID3, UUID4, UUID5, ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network,
    PositiveInt, Literal["x", 1], Annotated[str, Field(pattern="^a", examples=["ab"])],
]
models = [Point, Node, Tree, Dog, Strict, Example,
          *(create_model("M", field=(kind, ...)) for kind in kinds)]
for each in models:
    each.model_validate(sample(each.model_json_schema()))
print(len(models), "models")
'''


# ----------------------------------------------------------------------------------
# Sequences.  Limits and stops, on a text that comes in every possible cut: each choice
# of a request says the text in pieces of its own.

def cuts(text):
    """Every way to cut a text into pieces."""
    for mask in range(2 ** max(len(text) - 1, 0)):
        places = [i for i in range(1, len(text)) if mask >> i - 1 & 1]
        yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)])] if text else []


def said_of(server, ways, **fields):
    """{(text, finish_reason)} of a text that is cut into pieces in each of these ways."""
    said = set()
    for start in range(0, len(ways), 128):
        part = ways[start:start + 128]
        server.backend = lambda request: iter(part[request["index"]])
        choices = chat(server, n=len(part), **fields).json["choices"]
        assert len(choices) == len(part)
        said |= {(choice["message"]["content"], choice["finish_reason"]) for choice in choices}
    return said


# Each character a token, or each piece one.
tokenizers = pytest.mark.parametrize("tokenize", [list, lambda text: [text]],
                                     ids=["characters", "pieces"])


@pytest.mark.parametrize("limit, expected", [
    (0, ("", "length")), (1, ("a", "length")), (2, ("ab", "length")), (3, ("abc", "stop")),
    (4, ("abc", "stop")), (None, ("abc", "stop"))])
def test_a_limit_cuts_wherever_the_pieces_end(limit, expected):
    with Server(tokenize=list) as server:
        assert said_of(server, [*cuts("abc")], max_tokens=limit) == {expected}


def before_stop(text, stops):
    """What is said before the first stop, from reading the text a character at a time."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[:end - max(map(len, complete))]
    return text


@tokenizers
@pytest.mark.parametrize("text, stops", [
    ("Hello END x", ["END"]), ("Hello EN", ["END"]), ("aaab", ["aab"]), ("aaaaaa", ["aaa"]),
    ("ababac", ["abac"]), ("abcabd", ["abd", "bca"]), ("xabcdey", ["abcd", "bc"]),
    ("xabcdey", ["bc", "abc"]), ("xabey", ["abcd", "be"]), ("END", ["END"]), ("", ["END"]),
    ("a\n\nb", ["\n\n", "\n"]), ("世界和平", ["界和"]), ("e\u0301x", ["\u0301"]),
    ("😀😁😂", ["😁"]), ("aXbYc", ["Y", "X"]), ("ababab", ["bb", "abc"])])
def test_a_stop_may_span_pieces(text, stops, tokenize):
    with Server(tokenize=tokenize) as server:
        assert said_of(server, [*cuts(text)], stop=stops) == {(before_stop(text, stops), "stop")}


def test_any_stops_in_any_text():
    pick = random.Random(4)

    def letters(least, most):
        return "".join(pick.choice("ab") for _ in range(pick.randrange(least, most)))
    with Server(tokenize=list) as server:
        for _ in range(200):
            text, stops = letters(0, 10), [letters(1, 5) for _ in range(pick.randrange(1, 4))]
            ways = pick.choices([*cuts(text)], k=8)
            assert said_of(server, ways, stop=stops) == {(before_stop(text, stops), "stop")}, (
                ways, stops)


def test_only_what_may_become_a_stop_is_held_back():
    expected = [("Hello", ""), ("E", "Hello"), ("N", "Hello"), ("x", "Hello"),
                ("y", "HelloENx")]
    arrived, seen = [], []

    def backend(request):
        for piece, so_far in expected:      # a send to the loopback has arrived at once
            while (select.select([client], [], [], 0)[0]
                   or len("".join(said_in(b"".join(arrived)))) < len(so_far)):
                arrived.append(client.recv(65536))
            seen.append((piece, "".join(said_in(b"".join(arrived)))))
            yield piece
    with Server(backend) as server, dial(server) as client:
        client.sendall(request_bytes({**HI, "stream": True, "stop": "END"}))
        until(lambda: len(seen) == len(expected))
    assert seen == expected


@pytest.mark.parametrize("pieces, fields, expected", [
    (("a", "b", "c"), {"max_tokens": 3}, ("abc", "stop")),
    (("a", "b", "c"), {"max_tokens": 2}, ("ab", "length")),
    (("a", "b", "c"), {"max_tokens": 2, "max_completion_tokens": 9}, ("ab", "length")),
    (("a", "b", "c"), {"max_tokens": 9, "max_completion_tokens": 2}, ("ab", "length")),
    (("a", "EN", "D"), {"max_tokens": 3, "stop": "END"}, ("a", "stop")),
    (("a", "EN", "D"), {"max_tokens": 2, "stop": "END"}, ("aEN", "length")),
    (("a", "b", "END"), {"max_tokens": 2, "stop": "END"}, ("ab", "length")),
    (("a", "b"), {"stop": ["b"]}, ("a", "stop")), (("a", "b"), {"stop": "a"}, ("", "stop")),
    (("a", "b"), {"stop": []}, ("ab", "stop")), (("a", "b"), {"stop": ""}, ("ab", "stop")),
    (("a", "b"), {"stop": ["", "b"]}, ("a", "stop")),
    (("a", "b", "c", "d", "e"), {"stop": ["v", "w", "x", "y", "e"]}, ("abcd", "stop")),
    (("a b", " c"), {"max_tokens": 1}, ("a", "length")), ((), {}, ("", "stop")),
    ((), {"max_tokens": 0}, ("", "stop")), (("a",), {"max_tokens": 0}, ("", "length")),
])
def test_a_reply_obeys_limit_and_stop(pieces, fields, expected):
    first, reason = message(say(*pieces), **fields)
    assert (first["content"], reason) == expected


@pytest.mark.parametrize("fields, expected, left", [
    ({"max_tokens": 1}, ("x", "length"), ["one too many"]),      # the second tells of a cut
    ({"stop": "END"}, ("x", "stop"), ["one too many"])])
def test_no_more_pieces_are_asked_for_than_needed(fields, expected, left):
    rest = iter(["x", "END", "one too many"])
    first, reason = message(always(rest), **fields)
    assert (first["content"], reason) == expected and list(rest) == left


@pytest.mark.parametrize("path", BOTH)
def test_an_absent_limit_is_none(path):
    got = ask(say("a b " * 500), path).json
    assert got["choices"][0]["finish_reason"] == "stop"
    assert got["usage"]["completion_tokens"] > 1000


@pytest.mark.parametrize("fields, reason", [
    ({}, "content_filter"), ({"max_tokens": 1}, "length"), ({"stop": "b"}, "stop")])
def test_a_replys_finish_reason_stands_where_nothing_cut(fields, reason):
    assert message(always(Reply("a b", finish_reason="content_filter")), **fields)[1] == reason


def test_choices_interleave_one_per_chunk_until_each_has_ended():
    chunks = ask(lambda request: iter(["x"] * request["index"] * 2), stream=True, n=3).chunks
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [
        0, 1, 2, 0, 1, 2, 1, 2, 1, 2, 2, 2]


def test_each_choice_has_its_role_once_and_its_end_once():
    chunks = ask(say("a", "b"), stream=True, n=2).chunks
    for index in (0, 1):
        assert ["role" in delta for delta in deltas(chunks, index)] == [True] + [False] * 3
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks
                if chunk["choices"][0]["index"] == index] == [None] * 3 + ["stop"]


def test_a_backend_is_called_once_per_choice_in_order():
    seen = []
    ask(lambda request: seen.append((request["index"], request["prompt"])) or "x", TEXT_PATH,
        prompt=["a", "b"], n=2)
    assert seen == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


COMPLETIONS = {  # rule: (backend, fields, the text of each choice)
    "a prompt is a text": (echo, {"prompt": "a"}, ["a"]),
    "which may be empty": (echo, {"prompt": ""}, [""]),
    "or several texts": (echo, {"prompt": ["a", "b"]}, ["a", "b"]),
    "or token ids": (echo, {"prompt": [17, 18]}, ["<|17|><|18|>"]),
    "0 among them": (echo, {"prompt": [0]}, ["<|0|>"]),
    "or several lists of them": (echo, {"prompt": [[17], [18, 19]]}, ["<|17|>", "<|18|><|19|>"]),
    "null is the end of a text": (echo, {"prompt": None}, ["<|endoftext|>"]),
    "choices are numbered prompt by prompt": (
        lambda request: f"{request['prompt']}{request['index']}",
        {"prompt": ["a", "b"], "n": 2}, ["a0", "a1", "b2", "b3"]),
    "of best_of the first n are returned": (
        lambda request: str(request["index"]), {"prompt": ["a", "b"], "n": 2, "best_of": 3},
        ["0", "1", "3", "4"]),
    "echo puts the prompt before the reply": (say(" you"), {"echo": True, "prompt": "Hi"},
                                              ["Hi you"]),
    "echo reads token ids as they count": (
        say("x"), {"echo": True, "prompt": [[17], [18, 19]]}, ["<|17|>x", "<|18|><|19|>x"]),
    "what is echoed is not searched for stops": (
        say(" c b d"), {"echo": True, "prompt": "a b", "stop": "b"}, ["a b c "]),
    "a suffix is no part of the reply": (say("x"), {"suffix": "SUF"}, ["x"]),
}


@pytest.mark.parametrize("backend, fields, texts", rows(COMPLETIONS))
def test_a_completion_says(backend, fields, texts):
    choices = ask(backend, TEXT_PATH, **fields).json["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [*enumerate(texts)]


@pytest.mark.parametrize("path, fields", [(CHAT_PATH, {"n": 129}),
                                          (TEXT_PATH, {"prompt": ["x"] * 43, "n": 3})])
def test_more_than_128_choices_are_refused(path, fields):
    assert ask(echo, path, **fields).status == 400


# ----------------------------------------------------------------------------------
# Chunks, and the completion they spell.  What a stream says and what a whole reply says
# of the same request are read separately, and compared.

def said_at_once(completion):
    """{index: what that choice says} of a reply that was not streamed."""
    return {choice["index"]: {
        "text": choice["message"]["content"] if "message" in choice else choice["text"],
        "refusal": choice.get("message", {}).get("refusal"),
        "calls": [(made[made["type"]]["name"], made[made["type"]].get("arguments", made[
            made["type"]].get("input"))) for made in choice.get("message", {}).get(
                "tool_calls", [])],
        "function": tuple(choice.get("message", {}).get("function_call", {}).values()),
        "reason": choice["finish_reason"], "logprobs": choice["logprobs"],
    } for choice in completion["choices"]}


def model(request):
    """A backend that says what the request's text names: all that can be said."""
    return {
        "text": "Hello, world! 世界 😀 e\u0301", "nothing": "", "space": " \n",
        "list": ["He", "llo", "", " wor", "ld"], "awkward": "a\u2028b\x85c\ud83dd\0e\x7f\"\\",
        "custom": ToolCall("c", "any text"), "call": ToolCall("f", {"n": 1}),
        "no arguments": [ToolCall("f", {})],
        "calls": Reply(tool_calls=[ToolCall("f", {"n": 1}), ToolCall("g", '{"x": "世"}')]),
        "text and calls": Reply("Let me see.", [ToolCall("f", {"n": 1}), ToolCall("f", {})]),
        "calls and text": ["I ", ToolCall("f", {"n": 1}), "wait", ToolCall("g", {}), "."],
        "refusal": Reply(refusal="I'm sorry, no."),
        "filtered": Reply("a b", finish_reason="content_filter"),
        "usage": Reply("a b", usage={"prompt_tokens": 7, "completion_tokens": 9}),
    }[request["text"]]


TOOLS = {"tools": [TOOL, {"type": "function", "function": {"name": "g"}},
                   {"type": "custom", "custom": {"name": "c"}}]}
FUNCTIONS = {"functions": [{"name": "f"}, {"name": "g"}]}
SAME = [
    *((CHAT_PATH, what, fields) for what in (
        "text", "nothing", "space", "list", "awkward", "filtered", "usage", "refusal")
      for fields in ({}, {"n": 3}, {"max_tokens": 1}, {"max_tokens": 3, "n": 2}, {"stop": "o"},
                     {"logprobs": True}, {"logprobs": True, "top_logprobs": 3, "n": 2},
                     {"max_completion_tokens": 2, "stop": ["l", "wor"], "logprobs": True})),
    (CHAT_PATH, "custom", TOOLS),
    *((CHAT_PATH, what, fields) for what in (
        "call", "no arguments", "calls", "text and calls", "calls and text")
      for fields in (TOOLS, {**TOOLS, "n": 2}, {**TOOLS, "parallel_tool_calls": False},
                     {**TOOLS, "max_tokens": 1}, {**TOOLS, "max_tokens": 0}, FUNCTIONS,
                     {**TOOLS, "logprobs": True, "stop": "w"}, {})
      if fields is not FUNCTIONS or what in ("call", "no arguments")),
    *((TEXT_PATH, what, fields) for what in (
        "text", "nothing", "space", "list", "awkward", "filtered", "usage")
      for fields in ({}, {"n": 3}, {"max_tokens": 0}, {"max_tokens": 2}, {"stop": "o"},
                     {"echo": True}, {"echo": True, "max_tokens": 0, "logprobs": 1},
                     {"echo": True, "logprobs": 5, "n": 2}, {"logprobs": 0}, {"logprobs": 2},
                     {"suffix": "x", "stop": ["l", "wor"], "logprobs": 2})),
]


def test_a_stream_and_a_whole_reply_say_the_same():
    with Server(model) as server:
        for path, what, fields in SAME:
            where = {"messages": user(what)} if path == CHAT_PATH else {"prompt": what}
            body = {"model": "m", **where, **fields}
            at_once = post(server, path, body).json
            chunks = post(server, path, {**body, "stream": True, "stream_options": {
                "include_usage": True}}).chunks
            assert said_in_turn(chunks) == said_at_once(at_once), (what, fields)
            assert chunks[-1]["usage"] == at_once["usage"], (what, fields)


def test_the_text_of_a_reply_is_what_was_said():
    said = "Hello, world! 世界 😀 e\u0301"
    assert message(say(said))[0] == {"role": "assistant", "content": said, "refusal": None}


@pytest.mark.parametrize("path", BOTH)
def test_usage_is_streamed_only_where_it_was_asked_for(path):
    for options in ({}, None, {"include_usage": False}, {"include_usage": None},
                    {"include_obfuscation": True}):
        chunks = ask(say("a"), path, stream=True, stream_options=options).chunks
        assert not any("usage" in chunk for chunk in chunks)
        assert all(chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("path", BOTH)
def test_usage_has_a_chunk_of_its_own_at_the_end(path):
    options = {"include_usage": True}
    *chunks, last = ask(say("a"), path, stream=True, stream_options=options).chunks
    assert last["choices"] == [] and last["usage"]["total_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks)


COUNTED = {  # rule: (path, backend, fields, prompt tokens, completion tokens)
    "a chat": (CHAT_PATH, say("x", "y"), {}, 4, 2),
    "each choice": (CHAT_PATH, say("x", "y"), {"n": 3}, 4, 6),
    "no more than the limit": (CHAT_PATH, say("x", "y"), {"max_tokens": 1}, 4, 1),
    "each message": (CHAT_PATH, say("x", "y"), {"messages": user("a b") + user("c")}, 3, 2),
    "each token of a piece": (CHAT_PATH, say("a b", "c d"), {}, 4, 4),
    "a call's arguments": (CHAT_PATH, always(ToolCall("f", {"n": 1})), {}, 4,
                           len(tokenize('{"n":1}'))),
    "a completion": (TEXT_PATH, say("x", "y"), {}, 4, 2),
    "each choice of a completion": (TEXT_PATH, say("x", "y"), {"n": 3}, 4, 6),
    "all of best_of": (TEXT_PATH, say("x", "y"), {"best_of": 3}, 4, 6),
    "all of best_of, of each prompt": (TEXT_PATH, say("x"), {"prompt": ["a", "b"], "n": 2,
                                                             "best_of": 3}, 2, 6),
    "each prompt once": (TEXT_PATH, say("x", "y"), {"prompt": ["a", "b c"], "n": 2}, 3, 8),
    "an echo not at all": (TEXT_PATH, say("x", "y"), {"echo": True}, 4, 2),
    "a token id as one": (TEXT_PATH, say("x", "y"), {"prompt": [[1, 2], [3]]}, 3, 4),
    "a suffix not at all": (TEXT_PATH, say("x", "y"), {"suffix": "x y z"}, 4, 2),
}


@pytest.mark.parametrize("path, backend, fields, prompt, completion", rows(COUNTED))
def test_usage_counts(path, backend, fields, prompt, completion):
    usage = ask(backend, path, **fields).json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        prompt, completion, prompt + completion)


@pytest.mark.parametrize("corrections, total", [
    ({"prompt_tokens": 70}, 72), ({"completion_tokens": 9}, 13), ({"total_tokens": 99}, 99),
    ({"prompt_tokens": 1, "completion_tokens": 1}, 2)])
def test_a_reply_may_correct_its_usage(corrections, total):
    usage = ask(always(Reply("a b", usage=corrections))).json["usage"]
    assert usage["total_tokens"] == total and corrections.items() <= usage.items()


@both
@pytest.mark.parametrize("path", BOTH)
def test_a_count_may_be_corrected_to_nothing(path, stream):
    fields = {"stream_options": {"include_usage": True}} if stream else {}
    got = ask(Reply("a b", usage={"prompt_tokens": 0}), path, stream=stream, **fields)
    usage = got.chunks[-1]["usage"] if stream else got.json["usage"]
    assert [usage[name] for name in COUNTERS] == [0, 2, 2]


@pytest.mark.parametrize("asked, told", [(None, "default"), ("auto", "default"),
                                         ("default", "default"), ("flex", "flex"),
                                         ("fast", "priority"), ("priority", "priority")])
def test_the_service_tier_is_the_resolved_one(asked, told):
    assert ask(echo, service_tier=asked).json["service_tier"] == told


def test_created_is_now():
    before = int(time.time())
    assert before <= ask(echo).json["created"] <= time.time()


def test_no_two_replies_and_no_two_calls_share_an_id():
    with Server(always(Reply(tool_calls=[ToolCall("f"), ToolCall("f")]))) as server:
        made = [chat(server, n=2).json for _ in range(20)]
    calls = [call["id"] for each in made for choice in each["choices"]
             for call in choice["message"]["tool_calls"]]
    assert len({each["id"] for each in made}) == 20 and len(set(calls)) == len(calls) == 80


# ------ log probabilities

def test_chat_logprobs_are_those_of_the_text():
    got = ask(say("Hello, world!", "é"), logprobs=True, top_logprobs=2).json["choices"][0]
    tokens = got["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["Hello", ",", " world", "!", "é"]
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in tokens)


@pytest.mark.parametrize("top", [None, 0, 1, 5, 20])
def test_top_logprobs_are_as_many_as_asked_for_and_likeliest_first(top):
    got = ask(say("the", "."), logprobs=True, top_logprobs=top).json["choices"][0]
    for token in got["logprobs"]["content"]:
        likely = [other["logprob"] for other in token["top_logprobs"]]
        assert len(likely) == (top or 0) and likely == sorted(likely, reverse=True)
        assert len({other["token"] for other in token["top_logprobs"]}) == len(likely)
        assert token["logprob"] <= 0 and math.isfinite(token["logprob"])
        assert sum(map(math.exp, likely)) <= 1


def test_each_chunk_has_the_logprobs_of_its_own_text():
    chunks = ask(say("a b", "c"), stream=True, logprobs=True).chunks
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["logprobs"] == {"content": [], "refusal": None} and last["logprobs"] is None
    for choice in middle:
        said = "".join(token["token"] for token in choice["logprobs"]["content"])
        assert said == choice["delta"]["content"]


def text_logprobs(said, **fields):
    choice = ask(say(*said), TEXT_PATH, **fields).json["choices"][0]
    logprobs = choice["logprobs"]
    assert len({len(column) for column in logprobs.values()}) == 1
    assert "".join(logprobs["tokens"]) == choice["text"]
    return logprobs


@pytest.mark.parametrize("top", [0, 1, 2, 5])
def test_text_logprobs_are_parallel_and_of_the_text(top):
    logprobs = text_logprobs(["a b", " the", "世"], logprobs=top, prompt="pr om")
    assert logprobs["tokens"] == ["a", " b", " the", "世"]
    assert logprobs["text_offset"] == [5, 6, 8, 12]
    for token, logprob, likely in zip(logprobs["tokens"], logprobs["token_logprobs"],
                                      logprobs["top_logprobs"]):
        assert likely[token] == logprob and max(likely.values()) == logprob
        assert top <= len(likely) <= top + 1 and math.isfinite(logprob)


@pytest.mark.parametrize("said, fields, tokens", [
    (["c"], {"prompt": "a b", "echo": True}, ["a", " b", "c"]),
    (["x"], {"prompt": "", "echo": True}, ["x"]),
    (["x"], {"prompt": [5, 6, 7], "echo": True, "max_tokens": 0}, ["<|5|>", "<|6|>", "<|7|>"]),
    (["x", "y"], {"prompt": [5, 6], "echo": True, "max_tokens": 1}, ["<|5|>", "<|6|>", "x"]),
    (["Hello"], {"stop": "ll"}, ["He"])],
    ids=["an echo", "an empty echo", "a scorer", "a scorer, and one more", "a cut token"])
def test_text_logprobs_cover(said, fields, tokens):
    logprobs = text_logprobs(said, logprobs=1, **fields)
    assert logprobs["tokens"] == tokens
    offset = 0 if "echo" in fields else len("Hello, world!")
    assert logprobs["text_offset"] == [offset + len("".join(tokens[:i])) for i in range(len(tokens))]
    null = [bool(i == 0 and fields.get("echo") and fields["prompt"]) for i in range(len(tokens))]
    assert [each is None for each in logprobs["token_logprobs"]] == null
    assert [each is None for each in logprobs["top_logprobs"]] == null


def test_logprobs_of_half_a_character_are_json():
    got = ask(always("\ud83d"), logprobs=True, top_logprobs=1).json
    assert got["choices"][0]["logprobs"]["content"][0]["token"] == "\ud83d"


# ------ tool calls and refusals

def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


def choose(kind, **named):
    return {**TOOLS, "tool_choice": {"type": kind, kind: named}}


ALLOWED = [{"type": "function", "function": {"name": "g"}}]
ANSWERS = {  # rule: (backend, fields, content, {name: arguments} of the calls, reason)
    "a call has no content": (always(ToolCall("f", {"n": 1})), TOOLS, None, {"f": '{"n":1}'},
                              "tool_calls"),
    "arguments may be text, and go out as they are": (
        always(ToolCall("f", '{"n" : 1, broken')), TOOLS, None, {"f": '{"n" : 1, broken'},
        "tool_calls"),
    "no arguments are an empty object": (
        always([ToolCall("f"), ToolCall("g", "")]), TOOLS, None, {"f": "{}", "g": "{}"},
        "tool_calls"),
    "a custom tool is called with text": (always(ToolCall("c", "any text")), TOOLS, None,
                                          {"c": "any text"}, "tool_calls"),
    "a call may be yielded": (lambda request: iter(["a", ToolCall("f")]), TOOLS, "a",
                              {"f": "{}"}, "tool_calls"),
    "text and calls may be in one message": (always(Reply("a", ToolCall("f"))), TOOLS, "a",
                                             {"f": "{}"}, "tool_calls"),
    "a reply without calls has none": (echo, TOOLS, "Hello, world!", None, "stop"),
    "arguments are never cut": (always(ToolCall("f", {"n": 1})),
                                {**TOOLS, "max_tokens": 1, "stop": "n"}, None,
                                {"f": '{"n":1}'}, "tool_calls"),
    "but they use up the limit of the text after them": (
        say(ToolCall("f", {"n": 1}), "a"), {**TOOLS, "max_tokens": 3}, None, {"f": '{"n":1}'},
        "length"),
    "calls are parallel": (always(Reply(tool_calls=[ToolCall("f"), ToolCall("g")])), TOOLS, None,
                           {"f": "{}", "g": "{}"}, "tool_calls"),
    "or said to be": (always(Reply(tool_calls=[ToolCall("f"), ToolCall("g")])),
                      {**TOOLS, "parallel_tool_calls": True}, None, {"f": "{}", "g": "{}"},
                      "tool_calls"),
    "or one at most": (always(Reply(tool_calls=[ToolCall("f"), ToolCall("g")])),
                       {**TOOLS, "parallel_tool_calls": False}, None, {"f": "{}"},
                       "tool_calls"),
    "of legacy functions one is called": (
        always(Reply(tool_calls=[ToolCall("f", {"n": 1}), ToolCall("g")])), FUNCTIONS, None,
        {"f": '{"n":1}'}, "function_call"),
    "echo calls the tool that it has to": (echo, {**TOOLS, "tool_choice": "required"}, None,
                                           {"f": '{"n":0}'}, "tool_calls"),
    "by its name": (echo, choose("function", name="f"), None, {"f": '{"n":0}'}, "tool_calls"),
    "or another": (echo, choose("function", name="g"), None, {"g": "{}"}, "tool_calls"),
    "or a custom one": (echo, choose("custom", name="c"), None, {"c": "Hello, world!"},
                        "tool_calls"),
    "or one of those allowed": (echo, choose("allowed_tools", mode="required", tools=ALLOWED),
                                None, {"g": "{}"}, "tool_calls"),
    "but none that is only allowed": (echo, choose("allowed_tools", mode="auto", tools=ALLOWED),
                                      "Hello, world!", None, "stop"),
    "none where it may not": (echo, {**TOOLS, "tool_choice": "none"}, "Hello, world!", None,
                              "stop"),
    "none where it need not": (echo, {**TOOLS, "tool_choice": "auto"}, "Hello, world!", None,
                               "stop"),
    "null is auto": (echo, {**TOOLS, "tool_choice": None}, "Hello, world!", None, "stop"),
    "echo calls the function that it has to": (
        echo, {**FUNCTIONS, "function_call": {"name": "g"}}, None, {"g": "{}"}, "function_call"),
    "no function where it may not": (echo, {**FUNCTIONS, "function_call": "none"},
                                     "Hello, world!", None, "stop"),
    "no function where it need not": (echo, {**FUNCTIONS, "function_call": "auto"},
                                      "Hello, world!", None, "stop"),
    "null is auto there too": (echo, {**FUNCTIONS, "function_call": None}, "Hello, world!", None,
                               "stop"),
    "echo answers an instance of the schema": (
        echo, {"response_format": schema_format(an_object(a={"const": "世"}))}, '{"a":"世"}', None,
        "stop"),
    "of any schema": (echo, {"response_format": schema_format({"type": "integer", "minimum": 3})},
                      "3", None, "stop"),
    "or of none": (echo, {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
                   "{}", None, "stop"),
    "or one JSON object": (echo, {"response_format": {"type": "json_object"}},
                           '{"text":"Hello, world!"}', None, "stop"),
    "or text": (echo, {"response_format": {"type": "text"}}, "Hello, world!", None, "stop"),
    "other backends say what they say": (
        say("x"), {**FORCED, "response_format": schema_format({"type": "null"})}, "x", None,
        "stop"),
}


@pytest.mark.parametrize("backend, fields, content, calls, reason", rows(ANSWERS))
def test_a_message_holds(backend, fields, content, calls, reason):
    got, finish_reason = message(backend, **fields)
    made = [each[each["type"]] for each in got.get("tool_calls", ())]
    made += [got["function_call"]] if "function_call" in got else []
    assert got["content"] == content and finish_reason == reason
    assert (dict(each.values() for each in made) or None) == calls
    assert ("function_call" in got) == (reason == "function_call")
    assert ("tool_calls" in got) == (reason == "tool_calls" or reason == "length")


def test_a_call_is_streamed_as_an_opening_and_fragments():
    chunks = ask(always(ToolCall("f", {"n": 1}, id="call_x")), stream=True, **TOOLS).chunks
    role, opening, *fragments, end = deltas(chunks)
    assert role == {"role": "assistant", "content": None, "refusal": None} and end == {}
    assert opening == {"tool_calls": [{"index": 0, "id": "call_x", "type": "function",
                                       "function": {"name": "f", "arguments": ""}}]}
    assert all(fragment["tool_calls"][0].keys() == {"index", "function"}
               and fragment["tool_calls"][0]["function"].keys() == {"arguments"}
               for fragment in fragments)


@both
@pytest.mark.parametrize("fields", [TOOLS, FUNCTIONS], ids=["tools", "functions"])
def test_a_call_without_arguments_has_json_all_the_same(fields, stream):
    got = ask(always(ToolCall("f", "")), stream=stream, **fields)
    if stream:
        [said] = said_in_turn(got.chunks).values()
        assert (said["calls"] or [said["function"]]) == [("f", "{}")]
    else:
        told = got.json["choices"][0]["message"]
        call = told["tool_calls"][0]["function"] if "tool_calls" in told else told["function_call"]
        assert call == {"name": "f", "arguments": "{}"}


def test_a_legacy_call_is_streamed_as_an_opening_and_fragments():
    calls = always([ToolCall("f", {}), ToolCall("g")])
    _, opening, *fragments, end = deltas(ask(calls, stream=True, **FUNCTIONS).chunks)
    assert opening == {"function_call": {"name": "f", "arguments": ""}} and end == {}
    assert "".join(fragment["function_call"]["arguments"] for fragment in fragments) == "{}"


def test_a_refusal_is_no_content_and_streamed_in_its_own_field():
    backend = always(Reply(refusal="I can't"))
    assert message(backend) == (
        {"role": "assistant", "content": None, "refusal": "I can't"}, "stop")
    role, *middle, end = deltas(ask(backend, stream=True).chunks)
    assert role == {"role": "assistant", "content": None, "refusal": ""} and end == {}
    assert "".join(delta["refusal"] for delta in middle) == "I can't"


@both
@pytest.mark.parametrize("what", ["call", "calls", "refusal"])
def test_a_text_completion_has_no_place_for_a_call(what, stream):
    got = ask_in_vain(APIError, model, TEXT_PATH, prompt=what, stream=stream)
    assert got.status == 500 and re.search("tool call|refusal", got.error["message"])


@pytest.mark.parametrize("fields", [
    {"response_format": schema_format({"not": {}})},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
     "tool_choice": "required"},
    {"functions": [{"name": "f", "parameters": {"not": {}}}], "function_call": {"name": "f"}}])
def test_a_schema_that_echo_cannot_satisfy_is_a_400(fields):
    got = ask(echo, **fields)
    assert got.status == 400 and "'not'" in got.error["message"]


# ------ events

@pytest.mark.parametrize("text, line", [
    ("世é😀", '"世é😀"'), ("\u2028", r'"\u2028"'), ("\x85", r'"\u0085"'), ("\u2029", r'"\u2029"'),
    ("\ud83d", r'"\ud83d"'), ("\udc00é", r'"\udc00\u00e9"'), ("\n\r\t\0", r'"\n\r\t\u0000"'),
    ("\x7f\"\\/", '"\x7f\\"\\\\/"'),
])
def test_an_event_is_one_line_of_utf8(text, line):
    assert b"".join(openai_compat.events([{"a": text}])) == (
        f'data: {{"a":{line}}}\n\ndata: [DONE]\n\n'.encode())


def test_chunks_may_differ_in_any_field():
    chunks = [{"id": 1, "choices": [1]}, {"id": 1, "choices": [2]}, {"id": 2, "choices": [2]},
              {"id": 2, "usage": None, "choices": []}, {"choices": [], "usage": {"id": 2}}]
    alone = ["data: %s\n\n" % json.dumps(chunk, separators=(",", ":")) for chunk in chunks]
    assert b"".join(openai_compat.events(chunks)).decode() == "".join(alone) + "data: [DONE]\n\n"


def test_the_wire_is_the_same_where_the_c_part_of_json_is_missing():
    code = """
import json, json.encoder, sys, urllib.request
json.encoder.c_make_encoder = None
from openai_compat import Server, say
with Server(say("é", 'world"', chr(0x2028))) as server:
    body = b'{"model": "m", "stream": true, "prompt": "x"}'
    with urllib.request.urlopen(server.base_url + "/completions", body) as reply:
        sys.stdout.buffer.write(reply.read())
"""
    there = finished(sys.executable, "-c", code, cwd=str(HERE)).stdout
    here = ask(say("é", 'world"', chr(0x2028)), TEXT_PATH, model="m", stream=True).body
    assert pinned(there.encode()) == pinned(here) and "world" in there


@both
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_reaches_the_wire(number, stream):
    got = ask_in_vain(ValueError, always(Reply("x", usage={"prompt_tokens": number})),
                      stream=stream, **({"stream_options": {"include_usage": True}}
                                        if stream else {}))
    assert not re.search(rb"NaN|Infinity", got.body) and got.error


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "\ud83d", "😀", "a\r\nb", "\0"])
def test_any_text_survives_the_wire(path, text):
    where = {"messages": user(text)} if path == CHAT_PATH else {"prompt": text}
    assert ask(echo, path, stream=True, **where).text == text


# ----------------------------------------------------------------------------------
# Backends.  What may be returned and yielded, what may be raised, and when it is closed.

@pytest.mark.parametrize("backend, pieces", [
    (always("a b"), ["a", " b"]), (always(["a b", "c"]), ["a b", "c"]),
    (always(("a", "b")), ["a", "b"]), (lambda request: iter(["a", "", "b"]), ["a", "b"]),
    (lambda request: (word[::-1] for word in request["text"].split()), [",olleH", "!dlrow"]),
    (always(Reply("a b")), ["a", " b"]), (say("a ", "b"), ["a ", "b"]), (always(""), []),
    (always([]), []), (always(Reply()), []),
])
def test_what_a_backend_may_say(backend, pieces):
    _, *middle, end = deltas(ask(backend, stream=True).chunks)
    assert [delta["content"] for delta in middle] == pieces and end == {}


@pytest.mark.parametrize("path, fields, wanted", [
    (CHAT_PATH, {}, {"endpoint": "chat", "index": 0, "text": "Hello, world!",
                     "prompt": "Hello, world!", "n": 1, "stop": [], "stream": False}),
    (TEXT_PATH, {}, {"endpoint": "completion", "index": 0, "text": "Hello, world!",
                     "prompt": "Hello, world!", "best_of": 1, "echo": False}),
    (TEXT_PATH, {"prompt": [17]}, {"text": "<|17|>"}),
    (CHAT_PATH, {"top_k": 5}, {"top_k": 5}),
])
def test_a_backend_gets_the_request(path, fields, wanted):
    seen = []
    got = ask(lambda request: seen.append(request) or "x", path, **fields).json
    assert wanted.items() <= seen[0].items() and seen[0]["id"] == got["id"]


WRONG = [None, 5, 1.5, True, b"x", {"a": 1}, object()]


@pytest.mark.parametrize("stream, backend, value", [
    *((stream, always(value), value) for stream in (False, True) for value in WRONG),
    *((True, always([value]), value) for value in (*WRONG, ["x"], Reply("x")))])
def test_what_no_backend_may_return_or_yield_is_a_500_that_says_so(stream, backend, value):
    got = ask_in_vain(APIError, backend, stream=stream)
    assert got.status == 500 and type(value).__name__ in got.error["message"]


CONSTANTS = {"str": "a b", "Reply": Reply(["a ", "b"]), "tuple of pieces": Reply(("a ", "b")),
             "say": say("a b")}


@pytest.mark.parametrize("constant", CONSTANTS.values(), ids=CONSTANTS)
def test_a_constant_is_a_backend(constant):
    with Server(constant) as server:
        assert [chat(server, text).text for text in "xy"] == ["a b"] * 2
        server.backend = ToolCall("f", {"n": 1})
        assert chat(server, **TOOLS).json["choices"][0]["finish_reason"] == "tool_calls"
        server.backend = TEAPOT
        assert chat(server).error["code"] == "teapot"


async def coroutine(request):
    return "x"


async def async_generator(request):
    yield "x"


@pytest.mark.parametrize("value", [None, b"x", 5, ["a", "b"], ("a",), {"text": "a"}, coroutine,
                                   async_generator], ids=repr)
def test_what_is_no_backend_is_a_type_error_where_it_is_given(value):
    with pytest.raises(TypeError, match="say.*Script"):
        Server(value)
    with Server("still here") as server:
        with pytest.raises(TypeError, match="must be a function of the request"):
            server.backend = value
        assert chat(server).text == "still here"


@pytest.mark.parametrize("fields", [
    {"text": 123}, {"text": b"x"}, {"text": {"a": 1}}, {"text": [1]}, {"expect": 5}, {"tool_calls": "x"}, {"tool_calls": ["f"]},
    {"refusal": 5}, {"finish_reason": 5}, {"usage": [1]}, {"delay": "1"}, {"delay": -1},
    {"delay": math.nan}, {"delay": (1,)}, {"quirk": 5}, {"headers": "x"}, {"error": ValueError()}],
    ids=repr)
def test_a_value_of_the_wrong_type_is_refused_where_the_reply_is_made(fields):
    with pytest.raises(TypeError, match=next(iter(fields))):
        Reply(**fields)


class Theirs:
    """A user's object, with attributes and methods that mean something to the user."""

    model, paths, delay, quirk, expect, steps = 5, ["/x"], "slow", "bogus", 1, None

    def __call__(self, request):
        return "theirs"

    def nothing(self):
        raise AssertionError("nobody may call this")
    answer = respond = check = close = start = on_record = nothing


def test_the_attributes_of_a_users_backend_have_any_name():
    with Server(Theirs()) as server:
        assert chat(server).text == "theirs" and listed(server) == ["Theirs"]


@pytest.mark.parametrize("path", BOTH)
def test_each_call_of_a_backend_gets_a_copy_of_its_own(path):
    seen = []

    def backend(request):
        seen.append(json.dumps([request["stop"], request["x"], request["body"],
                                request.get("messages"), request.get("prompts")]))
        for name in ("stop", "x", "messages", "prompts"):
            request.get(name, []).append({"changed": 1})
            request["body"].get(name, []).append("changed")
        return "a"
    with Server(backend) as server:
        body = {**HI, **PROMPT, "prompt": ["p"], "x": [1], "stop": ["z"], "n": 3}
        post(server, path, body)
        assert server.journal[0].body == body and seen == [seen[0]] * 3
        server.journal[0].body["x"].append("changed")
        assert server.journal[0].body == body


def test_a_seed_freezes_the_ids_and_the_programs_own_random_is_left_alone():
    def ids():
        with Server(ToolCall("f")) as server:
            server.random.seed(7)
            random.seed(7)
            made = [chat(server, **TOOLS).json for _ in range(2)]
        assert random.random() == random.Random(7).random()
        return [(each["id"], each["choices"][0]["message"]["tool_calls"][0]["id"]) for each in made]
    assert ids() == ids() and len(set(ids())) == 2
    with Server() as one, Server() as other:
        random.seed(7)
        first = chat(one).json["id"]
        random.seed(7)
        assert chat(other).json["id"] != first


def failing(error, *pieces):
    def backend(request):
        yield from pieces
        raise error
    return backend


def raising(error):
    def backend(request):
        raise error
    return backend


TEAPOT = APIError(418, "I'm a teapot.", "pot", "teapot", "tea", {"retry-after-ms": "20"})


@both
@pytest.mark.parametrize("backend", [raising(TEAPOT), failing(TEAPOT), failing(TEAPOT, "")],
                         ids=["called", "at once", "after nothing"])
def test_an_error_before_the_first_piece_is_a_status(backend, stream):
    got = ask(backend, stream=stream)
    assert got.status == 418 and got.headers["retry-after-ms"] == "20"
    assert got.error == {"message": "I'm a teapot.", "type": "tea", "param": "pot",
                         "code": "teapot"}


def test_an_error_in_a_whole_reply_is_a_status_whenever_it_comes():
    assert ask(failing(TEAPOT, "a", "b")).status == 418


def test_a_later_error_is_an_event_without_done():
    got = ask(failing(TEAPOT, "a"), stream=True)
    assert got.status == 200 and got.error["message"] == "I'm a teapot."
    assert got.body.count(b"data: ") == 3 and b"[DONE]" not in got.body


@both
@pytest.mark.parametrize("pieces", [(), ("a",)], ids=["at once", "later"])
@pytest.mark.parametrize("error", [
    RuntimeError("secret"), SystemExit("secret"), StopIteration("secret")], ids=repr)
def test_any_other_error_is_a_500_and_stays_at_home(error, pieces, stream, caplog):
    backend = failing(error, *pieces) if pieces else raising(error)
    kind = RuntimeError if type(error) is StopIteration else type(error)    # PEP 479
    got = ask_in_vain(kind, backend, stream=stream)
    assert got.status == (200 if stream and pieces else 500) and b"secret" not in got.body
    assert got.error["message"].startswith("The server had an error while processing")
    assert got.error["type"] == "server_error"
    assert "secret" in caplog.text and "Traceback" in caplog.text


def test_a_connection_outlives_an_error():
    with failing_at_its_end(failing(RuntimeError("x")), RuntimeError) as server:
        assert statuses(server, posted(TEXT_JSON) * 2 + LAST) == [500, 500, 200]


def fail_in_pytest(request):
    pytest.fail("told by a test")


@both
def test_pytests_own_failure_is_a_500_and_fails_the_block(stream):
    failed = pytest.fail.Exception
    with failing_at_its_end(fail_in_pytest, failed, "told by a test") as server:
        got = chat(server, stream=stream)
        assert (got.status, outcome(server)) == (500, "error") and b"told" not in got.body


def test_the_first_failure_of_several_fails_the_block_with_an_advice():
    errors = [KeyError("first"), ValueError("second")]
    server = Server(lambda request: raising(errors.pop(0))(request)).start()
    assert [chat(server).status for _ in range(2)] == [500, 500]
    with pytest.raises(KeyError, match="first") as fault:
        server.close()
    server.close()                              # closing twice is closing once
    advice = "".join(getattr(fault.value, "__notes__", ["Raise APIError"]))
    assert "Raise APIError" in advice
    assert fault.traceback[-1].name == "backend"    # where it came from, not where it was kept


def test_an_error_in_the_block_comes_before_the_backends():
    with pytest.raises(IndexError):
        with Server(raising(ValueError("of the backend"))) as server:
            chat(server)
            raise IndexError("of the block")


@contextlib.contextmanager
def no_collector():
    """What is freed in the block is freed without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@both
@pytest.mark.parametrize("error, kept", [(APIError(418, "x"), 0), (RuntimeError("x"), 2)],
                         ids=["meant", "not meant"])
@pytest.mark.parametrize("late", [(), ("a",)], ids=["at once", "later"])
def test_an_exception_that_is_raised_again_and_again_keeps_nothing_alive(error, kept, late, stream,
                                                                          caplog):
    caplog.set_level("CRITICAL", "openai_compat")       # pytest keeps what is logged
    held = []

    def backend(request):
        big = Theirs()
        held.append(weakref.ref(big))
        try:
            yield from late
            raise KeyError(big)
        except KeyError:
            raise error
    server = Server(backend).start()
    with no_collector():
        for _ in range(20):
            chat(server, stream=stream)
        assert until(lambda: len(server.journal) == 20 and server.journal[-1].outcome)
        # What nobody meant keeps two: the first is raised again, the last is its context.
        until(lambda: len([1 for ref in held if ref()]) <= kept)
    with contextlib.suppress(RuntimeError):
        server.close()


def test_an_error_can_be_pickled_and_copied():
    for again in (pickle.loads(pickle.dumps(TEAPOT)), copy.copy(TEAPOT), copy.deepcopy(TEAPOT)):
        assert (again.status, again.body(), again.headers, str(again)) == (
            418, TEAPOT.body(), TEAPOT.headers, "I'm a teapot.")


@pytest.mark.parametrize("status, kind, code", [
    (400, "invalid_request_error", None), (401, "invalid_request_error", None),
    (404, "invalid_request_error", None), (429, "requests", "rate_limit_exceeded"),
    (500, "server_error", None), (502, "server_error", None),
    (503, "service_unavailable_error", None)])
def test_an_errors_type_and_code_follow_from_its_status(status, kind, code):
    error = APIError(status, "x")
    assert str(error) == error.message == "x" and error.body() == {
        "error": {"message": "x", "type": kind, "param": None, "code": code}}


def test_no_quota_is_not_to_be_tried_again():
    error = APIError(429, "x", code="insufficient_quota")
    assert error.type == "insufficient_quota" and error.headers["x-should-retry"] == "false"


def test_an_author_may_have_no_quota_tried_again():
    error = APIError(429, "x", code="insufficient_quota", headers={"x-should-retry": "true"})
    assert error.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("status, is_one", [(399, False), (400, True), (599, True), (600, False)])
def test_the_status_of_an_error_is_from_400_to_599(status, is_one):
    with contextlib.nullcontext() if is_one else pytest.raises(ValueError, match=str(status)):
        assert APIError(status, "x").status == status


def test_a_generator_is_closed_when_the_limit_is_reached():
    endless = Endless("a", "b")
    assert ask(endless, max_tokens=2, stream=True).chunks and endless.closed.wait(PATIENCE)


class Said(list):
    """Pieces of which is known whether they were closed; `fault` is raised then."""

    def __init__(self, *pieces, fault=None):
        super().__init__(pieces)
        self.fault, self.closed = fault, 0

    def close(self):
        self.closed += 1
        if self.fault:
            raise self.fault


def test_all_generators_are_closed_when_one_fails():
    choices = [Endless("a"), failing(TEAPOT, "a"), Endless("a")]
    got = ask(lambda request: choices[request["index"]](request), n=3, stream=True)
    assert got.error["code"] == "teapot"
    assert choices[0].closed.is_set() and choices[2].closed.is_set()


def test_what_the_first_choice_says_is_closed_when_the_second_fails_at_once():
    first = Said("a")
    backend = Script(lambda request: first if request["index"] == 0 else raising(TEAPOT)(request))
    assert ask(backend, n=2).status == 418 and first.closed == 1


def test_a_fault_in_closing_harms_neither_the_neighbour_nor_the_connection():
    choices = [Said("a"), Said("b", fault=ValueError("no"))]
    body = json.dumps({**PROMPT, "n": 2}).encode()
    with failing_at_its_end(lambda request: choices[request["index"]], ValueError) as server:
        *got, _ = talk(server, posted(body) * 2 + LAST)
    assert [[choice["text"] for choice in each.json["choices"]] for each in got] == [["a", "b"]] * 2
    assert [choice.closed for choice in choices] == [2, 2]


def test_a_reply_of_pieces_may_say_more():
    reply = Reply(["a", "b"], finish_reason="length", tool_calls=[ToolCall("f", {})])
    said, reason = message(always(reply))
    assert (said["content"], len(said["tool_calls"]), reason) == ("ab", 1, "length")


def test_arguments_that_hold_themselves_are_refused():
    circle = {}
    circle["again"] = circle
    with pytest.raises(ValueError, match="holds itself"):
        ToolCall("f", circle)


def test_an_event_goes_out_before_the_next_piece_is_made():
    endless = Endless("first", more="second", waits=True)
    with Server(endless) as server, asking(server, stream=True) as client:
        assert b"second" not in read_past(client, b"first")
        endless.go_on.set()
        read_past(client, b"second")


@pytest.mark.parametrize("backend", [say("a", "b"), lambda request: iter("ab"), always("a b")],
                         ids=["say", "an iterator", "a text"])
def test_each_event_is_one_transfer_chunk(backend):
    with Server(backend) as server:
        chunks, how = exchange(server, {**HI, "stream": True})
    assert how == "whole" and len(chunks) == 5
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)


# ------ headers

@both
def test_a_reply_may_bring_headers_which_are_text_whatever_they_are_made_of(stream):
    reply = Reply("x", headers={"x-mine": "7", "X-Count": 3})
    reply.headers["x-late"] = 5
    headers = ask(always(reply), stream=stream).headers
    assert (headers["x-mine"], headers["x-count"], headers["x-late"]) == ("7", "3", "5")


@pytest.mark.parametrize("value", ["a\r\nset-cookie: b", "a\nb", "a\0b"])
@pytest.mark.parametrize("make", [lambda headers: Reply("a", headers=headers),
                                  lambda headers: APIError(400, "no", headers=headers)])
def test_a_header_cannot_smuggle_another(make, value):
    with pytest.raises(ValueError):
        make({"x-mine": value})
    for name in ("a b", "a:", "", "\xe4", "a\r\nb", "Content-Length", "transfer-encoding", "connection"):
        with pytest.raises(ValueError, match="cannot be the name of a response header"):
            make({name: "1"})


def test_every_reply_has_a_request_id_of_its_own():
    with Server() as server:
        ids = [call(server, *request).headers["x-request-id"] for request in (
            ("GET", "/health"), ("GET", "/nowhere"), ("POST", CHAT_PATH, HI),
            ("POST", CHAT_PATH, "{"), ("OPTIONS", CHAT_PATH))]
    assert len(set(ids)) == 5 and all(re.fullmatch("req_[0-9a-f]{32}", id) for id in ids)


@both
def test_the_processing_time_is_that_of_the_first_piece(stream):
    begun = time.monotonic()
    told = ask(always(Reply("a", delay=(0.05, 0))), stream=stream).headers["openai-processing-ms"]
    assert told.isdigit() and 50 <= int(told) <= 1000 * (time.monotonic() - begun)


def test_a_stream_says_what_it_is():
    headers = ask(echo, stream=True).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["x-accel-buffering"] == "no" and "no-cache" in headers["cache-control"]


# ------ delays

@both
@pytest.mark.parametrize("text, delay, least", [
    ("a b", 0.03, 0.06), ("a b", (0.08, 0), 0.08), ("a b", [0, 0.05], 0.05),
    ("a", (0, 3600), 0), ("a", (0.05, 3600), 0.05)])
def test_a_reply_takes_its_time_and_no_pause_follows_its_end(text, delay, least, stream):
    begun = time.monotonic()
    assert ask(always(Reply(text, delay=delay)), stream=stream).text == text
    assert time.monotonic() - begun >= least


@both
@pytest.mark.parametrize("delay, events", [(3600, 0), ((3600, 0), 0), ((0, 3600), 2)])
def test_a_pause_ends_when_the_client_leaves(stream, delay, events):
    with Server(always(Reply("a b c", delay=delay))) as server:
        leave(server, CHAT_PATH, {**HI, "stream": stream}, after=events if stream else 0)
        assert outcome(server) == "client left"
        assert server.journal[0].events == (events if stream else 0)


def test_a_pause_ends_when_the_server_does():
    with Server(always(Reply("a", delay=3600))) as server, asking(server) as client:
        until(lambda: server.journal)
        server.close()
        [got] = replies(read_to_end(client))
    assert got.status == 503 and "shutting down" in got.error["message"]


# ----------------------------------------------------------------------------------
# Script.

NOT_FOLLOWED = 400      # the status of a request that a script did not expect


def contents(server, count, **fields):
    return [chat(server, **fields).text for _ in range(count)]


def test_a_script_is_taken_step_by_step():
    def spoken(request):
        yield from "cd"
    with Server(Script("a", Reply("b"), spoken, lambda request: request["text"])) as server:
        assert contents(server, 4) == ["a", "b", "cd", "Hi"]


def test_a_step_may_be_a_call_or_a_list_of_them():
    with Server(Script(ToolCall("f"), [ToolCall("f"), ToolCall("g")])) as server:
        got = [chat(server, **TOOLS).json for _ in range(2)]
    assert [[made["function"]["name"] for made in each["choices"][0]["message"]["tool_calls"]]
            for each in got] == [["f"], ["f", "g"]]


def test_a_step_may_be_an_error():
    with Server(Script(TEAPOT, "b")) as server:
        assert chat(server).error["code"] == "teapot" and contents(server, 1) == ["b"]


def test_all_choices_of_a_request_say_the_same_step():
    with Server(Script("a", "b")) as server:
        for text in "ab":
            got = chat(server, n=3).json
            assert [choice["message"]["content"] for choice in got["choices"]] == [text] * 3


def test_a_step_may_be_a_dict_as_in_a_file():
    script = Script({"text": "a", "expect": {"n": 1}}, {"error": {"status": 429, "message": "no"},
                                                        "delay": 0, "expect": {"n": 2}},
                    {"tool_calls": [{"name": "f", "arguments": {}}]}, {"text": ["b", "c"]})
    with Server(script) as server:
        assert [chat(server, n=n, **TOOLS).status for n in (1, 2, 1)] == [200, 429, 200]
        assert contents(server, 1) == ["bc"]


def test_in_any_order_a_request_takes_the_first_step_that_expects_it():
    def expecting(word):
        return {"messages": lambda messages: word in messages[-1]["content"]}
    script = Script("free", Reply("1", expect=expecting("x")), Reply("2", expect=expecting("x")),
                    Reply("3", expect=expecting("y")), any_order=True)
    with Server(script) as server:
        assert [chat(server, text).text for text in ("y", "x", "z", "x")] == ["3", "1", "free", "2"]


def test_in_any_order_a_request_that_no_step_expects_is_told_why_by_each():
    script = Script(Reply("1", expect={"n": 1}), Reply("2", expect={"seed": 5}), any_order=True)
    got, fault = not_followed(script, {"n": 2})
    assert got.status == NOT_FOLLOWED
    assert "n is 2, expected 1; step 2 is not for this request: seed is absent, expected 5" in got.error["message"]
    assert got.error["message"] in fault


def test_parallel_requests_in_any_order_each_take_a_step_of_their_own():
    steps = [Reply(str(i), expect={"seed": i % 3}) for i in range(30)]
    with Server(Script(*steps, any_order=True)) as server:
        seeds = iter([i % 3 for i in range(30)])
        said = together(10, lambda: [(seed, chat(server, seed=seed).text)
                                     for seed in itertools.islice(seeds, 3)])
    said = [int(text) for each in said for seed, text in each if int(text) % 3 == seed]
    assert sorted(said) == list(range(30))


def test_what_no_step_is_for_is_answered_otherwise():
    script = Script(Reply("main", expect={"n": 1}), otherwise=lambda request: "a title")
    with Server(script) as server:
        assert [chat(server, **fields).text for fields in ({}, {"n": 1}, {})] == [
            "a title", "main", "a title"]


def test_a_step_that_remains_beside_otherwise_says_why_the_last_one_did_not_match():
    got, fault = not_followed(Script(Reply("main", expect={"n": 1}), otherwise=echo), {"n": 3})
    assert got.status == 200 and "1 of 1 steps remain" in fault and "n is 3, expected 1" in fault


@pytest.mark.parametrize("wrong", [5, ["x"], coroutine, Relay("http://h/v1")], ids=repr)
def test_otherwise_is_a_backend_but_no_relay(wrong):
    with pytest.raises(TypeError):
        Script("a", otherwise=wrong)


def test_a_script_that_is_given_later_is_the_one_that_is_checked():
    with pytest.raises(AssertionError, match="'second'"):
        server = Server(Script("first")).start()
        server.backend = Script("second")
        server.close()


def not_followed(script, *bodies):
    """(the last reply, the AssertionError's text) of a script that fails."""
    server, got = Server(script).start(), None
    for body in bodies:
        got = post(server, CHAT_PATH, {**HI, **body})
    with pytest.raises(AssertionError) as fault:
        server.close()
    return got, str(fault.value)


def test_a_request_past_the_end_is_refused_and_fails_the_block():
    got, fault = not_followed(Script("a"), {}, {})
    assert got.status == NOT_FOLLOWED and got.headers["x-should-retry"] == "false"
    assert "step 2" in got.error["message"] and "step 2" in fault


def test_a_step_left_over_fails_the_block():
    _, fault = not_followed(Script("a", Reply("Bye"), "c"), {})
    assert "step 2" in fault and "2 of 3" in fault and "Reply(text='Bye')" in fault


def test_an_unused_script_fails_the_block():
    with pytest.raises(AssertionError):
        with Server(Script("a")):
            pass


@pytest.mark.parametrize("expect, body, words", [
    ({"temperature": 0}, {"temperature": 1}, ("temperature", "0", "1")),
    ({"temperature": 0}, {}, ("temperature", "0", "absent")),
    ({"messages": []}, {}, ("messages has 1 item", "expected 0")),
    ({"stop": ["a", "b"]}, {"stop": ["a"]}, ("stop has 1 item", "expected 2")),
    ({"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": {
        "include_usage": False}}, ("stream_options.include_usage", "True", "False")),
    ({"model": "m", "n": 2}, {"n": 1}, ("n is 1", "2")),
    ({"n": 1}, {}, ("n", "absent")),
    (lambda body: False, {}, ()),
])
def test_an_unexpected_request_is_told_its_first_difference(expect, body, words):
    got, fault = not_followed(Script(Reply("a", expect=expect)), body)
    assert got.status == NOT_FOLLOWED and got.headers["x-should-retry"] == "false"
    assert all(word in got.error["message"] and word in fault for word in ("step 1", *words))


def asserts(value):
    assert value == "x", "the model must be x"
    return True


def never_true(value):
    assert value


LONG_TEXT = "a" * 300 + "%s" + "z" * 300
DIFFERENCES = {  # what is expected, the fields of the body, and what the refusal says
    "a dict in a list": ({"messages": [{"content": "Hi"}]}, {},
                         "messages[0].content is 'Hello, world!', expected 'Hi'"),
    "a list that is longer": ({"stop": ["a"]}, {"stop": ["a", "b"]}, "stop has 2 items, expected 1"),
    "the type": ({"temperature": "1"}, {"temperature": 1}, "temperature is 1, expected '1'"),
    "a field in what is no object": ({"stop": {"a": 1}}, {"stop": "x"}, "stop is 'x', expected {'a': 1}"),
    "a function in a list": ({"stop": ["a", str.isupper]}, {"stop": ["a", "b"]},
                             "stop[1] is 'b', to which isupper says: no"),
    "an AssertionError": ({"model": asserts}, {}, "model is 'm', to which asserts says: the model must be x"),
    "a function that returns None": ({"model": never_true}, {}, "None (to say yes, it must return True)"),
    "a function of what is absent": ({"seed": bool}, {}, "seed is absent, to which bool says: no"),
    "the middle of a long text": ({"user": LONG_TEXT % "expected"}, {"user": LONG_TEXT % "sent"},
                                  "aaasentzzz"),
    "the middle that was expected": ({"user": LONG_TEXT % "expected"}, {"user": LONG_TEXT % "sent"},
                                     "aaaexpectedzzz"),
}


@pytest.mark.parametrize("expect, body, words", rows(DIFFERENCES))
def test_the_refusal_shows_the_difference(expect, body, words):
    got, fault = not_followed(Script(Reply("a", expect=expect)), body)
    assert words in got.error["message"] and words in fault and len(fault) < 500


def test_an_expectation_that_itself_fails_is_not_a_request_that_differs():
    script = Script(Reply("a", expect={"model": lambda value: value.nonsense}), "b")
    with failing_at_its_end(script, AttributeError, "nonsense") as server:
        assert chat(server).status == 500       # and "b" remains, which is no news


@pytest.mark.parametrize("expect", [
    {}, {"model": "m"}, {"messages": HI["messages"]},
    {"stream_options": {"include_usage": True}},
    lambda body: body["model"] == "m", None])
def test_a_request_as_expected_gets_its_step(expect):
    with Server(Script(Reply("a", expect=expect))) as server:
        assert post(server, CHAT_PATH, {**HI, "stream": True, "stream_options": {
            "include_usage": True, "include_obfuscation": False}}).status == 200


def test_an_unexpected_request_does_not_use_up_its_step():
    script = Script(Reply("a", expect={"n": 1}), "b")
    with failing_at_its_end(script, AssertionError, "step 1") as server:
        got = [chat(server, **fields) for fields in ({}, {"n": 1}, {})]
    assert [each.status for each in got] == [NOT_FOLLOWED, 200, 200]
    assert [each.text for each in got[1:]] == ["a", "b"]


def test_expect_sees_the_body_as_sent():
    with Server(Script(Reply("a", expect=lambda body: body == HI))) as server:
        assert post(server, CHAT_PATH, HI).text == "a"


def test_an_error_in_the_block_is_the_context_of_the_scripts():
    with pytest.raises(AssertionError, match="step 1") as fault:
        with Server(Script()) as server:
            chat(server)
            raise KeyError("of the block")
    assert isinstance(fault.value.__context__, KeyError)


@pytest.mark.parametrize("script, error", [(Script("left over"), KeyError),
                                           (Script(), KeyboardInterrupt)])
def test_what_ends_the_block_is_not_hidden(script, error):
    with pytest.raises(error):
        with Server(script) as server:
            if error is KeyboardInterrupt:
                chat(server)
            raise error("of the block")


def test_a_script_can_be_checked_in_the_middle():
    script = Script("a", "b")
    with Server(script) as server:
        for _ in range(2):
            with pytest.raises(AssertionError, match="steps? remain"):
                script.check()
            contents(server, 1)
        script.check()


def test_a_refused_request_takes_no_step():
    with Server(Script("a"), quirk_header=True) as server:
        assert chat(server, n=0).status == 400
        assert chat(server, headers={"X-Quirk": "bogus"}).status == 400
        assert contents(server, 1) == ["a"]


def test_a_script_serves_both_endpoints():
    with Server(Script("a", "b")) as server:
        assert post(server, TEXT_PATH, PROMPT).text == "a" and contents(server, 1) == ["b"]


def test_twenty_clients_take_each_step_once():
    def slow(body):                             # gives the others time to come between
        return not threading.Event().wait(0.001)
    steps = [str(i) for i in range(60)]
    with Server(Script(*(Reply(step, expect=slow) for step in steps))) as server:
        said = together(20, lambda: contents(server, 3, n=2))
    assert sorted(itertools.chain(*said)) == sorted(steps)


def from_file(tmp_path, steps):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(steps), encoding="utf-8")
    return Script.from_file(str(path))


def test_a_script_may_come_from_a_file(tmp_path):
    script = from_file(tmp_path, [
        "世界", {"text": "b", "finish_reason": "length", "expect": {"model": "m"}},
        {"tool_calls": [{"name": "f", "arguments": {"n": 1}},
                        {"name": "g", "arguments": "{}"}]},
        {"error": {"status": 429, "message": "slow down", "code": "rate_limit_exceeded",
                   "headers": {"retry-after-ms": "20"}}}])
    with Server(script) as server:
        got = [chat(server, **TOOLS) for _ in range(4)]
    first, second, third = (each.json["choices"][0] for each in got[:3])
    assert first["message"]["content"] == "世界" and second["finish_reason"] == "length"
    assert [made["function"]["arguments"] for made in third["message"]["tool_calls"]] == [
        '{"n":1}', "{}"]
    assert got[3].status == 429 and got[3].headers["retry-after-ms"] == "20"


@pytest.mark.parametrize("steps, words", [
    ({}, "list"), ([5], "step 1"), (["a", {"bogus": 1}], "step 2.*bogus"), ([{"error": {}}], "step 1.*status"),
    ([{"tool_calls": [{"arguments": {}}]}], "step 1.*name"), ([{"quirk": "bogus"}], "step 1.*bogus"),
    ([{"error": "x"}], "step 1"), ([{"tool_calls": 5}], "step 1"), ([None], "step 1")])
def test_a_file_that_is_no_script_says_where(tmp_path, steps, words):
    with pytest.raises((TypeError, ValueError), match=words):
        from_file(tmp_path, steps)


# ----------------------------------------------------------------------------------
# Quirks.  What each does to the wire, told from what a reply without it looks like.

NAMED = """comment crlf no_space bom id_field retry_block empty_data split_bytes one_write
    no_role role_every usage_always no_done no_finish no_terminator missing_tool_index
    duplicate_tool_id bad_json error_event truncate stall reset html_502""".split()
STREAMED = {**HI, **TOOLS, "stream": True}
PLAIN = "".join(f"data: {event}\n\n" for event in (
    ROLE, delta('"content":"a"'), delta('"content":"b"'), delta("", '"stop"'), "[DONE]"))
EVENTS = PLAIN.count("data: ")
FIRST_EVENTS = [
    "".join(event + "\n\n" for event in PLAIN.split("\n\n")[:k]) for k in range(EVENTS)]


def quirked(quirk, backend=say("a", "b"), body=STREAMED):
    """(transfer chunks, how it ended) of a reply with that quirk."""
    with Server(backend, quirk=quirk) as server:
        return exchange(server, body)


def written(quirk, backend=say("a", "b")):
    """The whole body with that quirk, pinned, of a reply that ended well."""
    chunks, how = quirked(quirk, backend)
    assert how == "whole"
    return pinned(b"".join(chunks))


def chunks_in(body):
    return [loads(line[6:]) for line in body.split("\n") if line.startswith("data: {")]


def test_the_quirks_are_those_that_are_named_and_say_what_they_do():
    assert sorted(QUIRKS) == sorted(NAMED)
    assert all(QUIRKS[name].__doc__ for name in NAMED)


@pytest.mark.parametrize("quirk, undone", [
    (None, lambda body: body),
    ("comment", lambda body: re.sub(r":[^\n]*\n\n(?=data: )", "", body)),
    ("crlf", lambda body: body.replace("\r\n", "\n")),
    ("no_space", lambda body: re.sub("(?m)^data:", "data: ", body)),
    ("bom", lambda body: re.sub("^\ufeff", "", body)),
    ("id_field", lambda body: re.sub(r"(?m)^(id: ?\d+\n|:.*\n\n)", "", body)),
    ("retry_block", lambda body: re.sub(r"(?m)^retry: ?\d+\n\n", "", body)),
    ("empty_data", lambda body: re.sub(r"(?m)^data: ?\n\n", "", body)),
    ("no_done", lambda body: body + "data: [DONE]\n\n"),
])
def test_a_quirk_about_lines_does_that_and_no_more(quirk, undone):
    body = written(quirk)
    assert (body == PLAIN) == (quirk is None) and undone(body) == PLAIN


@pytest.mark.parametrize("quirk, pattern, count", [
    ("crlf", r"\r\n", 2 * EVENTS), ("crlf", r"\n", 2 * EVENTS),
    ("comment", r"(?m)^:.*\n\ndata: ", EVENTS),
    ("id_field", r"(?m)^id: ?\d+\n(data: .*\n\n):.*\n\n", EVENTS),
    ("retry_block", r"(?m)^retry: ", EVENTS), ("empty_data", r"(?m)^data: ?\n\n", EVENTS)])
def test_a_quirk_about_lines_is_in_every_event(quirk, pattern, count):
    assert len(re.findall(pattern, written(quirk))) == count


@pytest.mark.parametrize("body, whole", [(STREAMED, False), (HI, True)], ids=["streamed", "whole"])
def test_split_bytes_sends_each_byte_alone(body, whole):
    chunks, how = quirked("split_bytes", body=body)
    assert how == "whole" and {len(chunk) for chunk in chunks} == {1}
    if whole:
        check_shape(loads(b"".join(chunks)), CHAT)
    else:
        assert pinned(b"".join(chunks)) == PLAIN


def test_one_write_sends_all_at_once():
    chunks, how = quirked("one_write", lambda request: iter("ab"))
    assert how == "whole" and [pinned(chunk) for chunk in chunks] == [PLAIN]


def test_no_role_takes_the_role_away():
    body = written("no_role")
    assert "role" not in body and body == PLAIN.replace('"role":"assistant",', "")


def test_role_every_repeats_the_role():
    body = written("role_every")
    assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in chunks_in(body))
    assert re.sub('"role":"assistant",?', "", body) == re.sub('"role":"assistant",?', "", PLAIN)


def test_usage_always_adds_a_usage_uninvited():
    *chunks, last = chunks_in(written("usage_always"))
    assert all(chunk["usage"] for chunk in [*chunks, last]) and len(chunks) == EVENTS - 1
    assert last["choices"] == [] and all(chunk["choices"] for chunk in chunks)


def test_no_finish_ends_with_neither_reason_nor_done():
    body = written("no_finish")
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks_in(body))
    assert "[DONE]" not in body and '"b"' in body


def test_no_terminator_closes_without_the_last_transfer_chunk():
    chunks, how = quirked("no_terminator")
    assert how == "cut" and pinned(b"".join(chunks)) == PLAIN


def fragments(quirk):
    """The fragments of two calls with that quirk."""
    calls = always([ToolCall("f", {"n": 1}, "call_a"), ToolCall("g", {}, "call_b")])
    return [made for chunk in chunks_in(written(quirk, calls))
            for made in chunk["choices"][0]["delta"].get("tool_calls", [])]


def test_missing_tool_index_takes_the_index_away():
    calls = fragments("missing_tool_index")
    assert len(calls) > 2 and not any("index" in made for made in calls)


def test_duplicate_tool_id_repeats_id_and_name():
    calls = fragments("duplicate_tool_id")
    assert {(made["index"], made["id"], made["function"]["name"]) for made in calls} == {
        (0, "call", "f"), (1, "call", "g")}


@pytest.mark.parametrize("quirk, k", [
    *((f"bad_json@{k}", k) for k in range(4)), ("bad_json", 2)])
def test_bad_json_cuts_one_event_short(quirk, k):
    *blocks, rest = written(quirk).split("\n\n")
    plain = PLAIN.split("\n\n")[:-1]
    assert len(blocks) == EVENTS and rest == ""
    assert [i for i, (a, b) in enumerate(zip(blocks, plain)) if a != b] == [k]
    with pytest.raises(ValueError):
        json.loads(blocks[k][6:])


@pytest.mark.parametrize("quirk, k", [("truncate", 2), ("truncate@0", 0), ("truncate@1", 1),
                                      ("truncate@3", 3)])
def test_truncate_closes_cleanly(quirk, k):
    assert written(quirk) == FIRST_EVENTS[k]


@pytest.mark.parametrize("quirk, k", [("error_event", 2), ("error_event@1", 1),
                                      ("error_event@3", 3)])
def test_error_event_stands_in_the_place_of_the_rest(quirk, k):
    body = written(quirk)
    assert body.startswith(FIRST_EVENTS[k])
    check_shape(loads(body[len(FIRST_EVENTS[k]) + 6:]), ERROR)


@pytest.mark.parametrize("quirk, k", [
    ("reset", 2), ("reset@0", 0), ("reset@1", 1), ("reset@4", 4)])
def test_reset_resets(quirk, k):
    chunks, how = quirked(quirk)
    assert how == "reset" and len(chunks) <= k      # what is on its way may be lost


@pytest.mark.parametrize("quirk, k", [
    ("stall", 2), ("stall@0", 0), ("stall@1", 1), ("stall@4", 4)])
def test_stall_is_silent_until_the_client_leaves(quirk, k):
    with Server(say("a", "b"), quirk=quirk) as server:
        with dial(server) as client:
            client.sendall(request_bytes(STREAMED))
            got = b""
            while got.count(b"data: ") < k:
                got += client.recv(65536)
            assert until(lambda: server.journal) and server.journal[0].outcome is None
            half_close(client)
            got += read_to_end(client)
        chunks, rest = transfer_chunks(got.partition(b"\r\n\r\n")[2])
        assert rest is None and pinned(b"".join(chunks)) == FIRST_EVENTS[k]
        assert outcome(server) in ("quirk", "client left")


@both
def test_html_502_is_a_page_of_a_proxy(stream):
    with Server(quirk="html_502") as server:
        got = chat(server, stream=stream)
    assert got.status == 502 and got.headers["content-type"].startswith("text/html")
    assert b"<html" in got.body and b"data:" not in got.body


@pytest.mark.parametrize("quirk", [name for name in NAMED if name not in (
    "stall", "reset", "html_502", "split_bytes")])
@pytest.mark.parametrize("path", BOTH)
def test_a_quirk_about_events_leaves_a_whole_reply_as_it_is(path, quirk):
    replies = []
    for each in (None, quirk):
        with Server(say("a"), quirk=each) as server:
            got = post(server, path, {**HI, **PROMPT})
            replies.append((got.status, got.json and pinned(got.body)))
    assert replies[0] == replies[1]


def test_a_whole_reply_may_be_reset():
    assert quirked("reset", body=HI)[1] == "reset"


def test_a_whole_reply_may_stall():
    with Server(quirk="stall") as server:
        with dial(server) as client:
            client.sendall(request_bytes(HI))
            until(lambda: server.journal and server.journal[0].body)
            assert not select.select([client], [], [], 0.1)[0]
            assert server.journal[0].outcome is None
        assert outcome(server) in ("quirk", "client left")


@pytest.mark.parametrize("quirk", NAMED)
def test_every_quirk_works_on_a_text_completion(quirk):
    with Server(say("a", "b"), quirk=quirk) as server:
        with dial(server) as client:
            client.sendall(request_bytes({**PROMPT, "stream": True}, TEXT_PATH))
            if quirk == "stall":
                half_close(client)
            try:
                assert read_to_end(client) or quirk == "reset"
            except ConnectionResetError:
                assert quirk == "reset"
        bent = quirk not in ("no_role", "role_every", "missing_tool_index", "duplicate_tool_id")
        assert outcome(server) in (("quirk", "client left") if bent else ("complete",))


@pytest.mark.parametrize("reply, server, header, events", [
    (1, 2, 3, 1), (None, 2, 3, 2), (None, None, 3, 3), (1, None, 3, 1), (1, 2, None, 1),
    (None, None, None, EVENTS)])
def test_the_replys_quirk_comes_before_the_servers_before_the_headers(reply, server, header,
                                                                      events):
    reply, server, header = (k and f"truncate@{k}" for k in (reply, server, header))
    with Server(always(Reply(" a b", quirk=reply)), quirk=server, quirk_header=True) as running:
        got = post(running, CHAT_PATH, STREAMED, {"X-Quirk": header} if header else {})
    assert got.body.count(b"data: ") == events


def test_the_header_counts_only_where_it_is_allowed():
    with Server() as server:
        assert post(server, CHAT_PATH, STREAMED, {"X-Quirk": "html_502"}).chunks


@pytest.mark.parametrize("name", [
    "bogus", "stall@", "stall@x", "stall@-1", "@2", "stall@1@2", "STALL"])
def test_a_quirk_that_is_none_is_refused(name):
    for make in (lambda: Reply(quirk=name), lambda: Server(quirk=name)):
        with pytest.raises(ValueError, match="quirk"):
            make()
    with Server(quirk_header=True) as server:
        assert chat(server, headers={"X-Quirk": name}).status == 400


@pytest.mark.parametrize("method, path", [("GET", "/v1/models"), ("GET", "/health"),
                                          ("OPTIONS", CHAT_PATH), ("GET", "/nowhere")])
def test_quirks_touch_the_two_endpoints_only(method, path):
    with Server(quirk="html_502", quirk_header=True) as server:
        got = call(server, method, path, headers={"X-Quirk": "reset"})
    assert got.status in (200, 204, 404)


@pytest.mark.parametrize("place", ["server", "reply", "header"])
def test_split_bytes_on_a_whole_reply_is_one_byte_a_transfer_chunk(place):
    with Server(Reply("a", quirk="split_bytes" if place == "reply" else None), quirk_header=True,
                quirk="split_bytes" if place == "server" else None) as server, dial(server) as client:
        client.sendall(request_bytes(headers={"X-Quirk": "split_bytes"} if place == "header" else {}))
        found, rest = transfer_chunks(read_to_end(client).partition(b"\r\n\r\n")[2])
        assert rest == b"" and {len(each) for each in found} == {1} and loads(b"".join(found))
        assert outcome(server) == "quirk"


@pytest.mark.parametrize("quirk, stream, ended", [
    ("truncate@99", True, "complete"), ("bad_json@99", True, "complete"), ("role_every", True, "quirk"),
    ("one_write", True, "quirk"), ("comment", False, "complete"), ("no_done", False, "complete"),
    ("missing_tool_index", True, "complete"), ("usage_always", True, "quirk"), ("error_event@0", True, "quirk")])
def test_the_outcome_is_quirk_only_where_something_was_bent(quirk, stream, ended):
    with Server(say("a", "b"), quirk=quirk) as server:
        got = chat(server, stream=stream)
        assert got.status == 200 and outcome(server) == ended
        if quirk == "error_event@0":
            assert got.error["type"] == "server_error" and got.body.count(b"data:") == 1


def test_a_scripts_reply_may_have_a_quirk():
    with Server(Script(Reply("a", quirk="no_done"), "b")) as server:
        assert b"[DONE]" not in post(server, CHAT_PATH, STREAMED).body
        assert post(server, CHAT_PATH, STREAMED).chunks


# ----------------------------------------------------------------------------------
# The journal.

def test_the_journal_has_every_exchange():
    with Server() as server:
        post(server, CHAT_PATH, HI, {"X-Mine": "1"})
        call(server, "GET", "/v1/models?x=1")
        first, second = server.journal
    assert (first.method, first.path, first.body) == ("POST", CHAT_PATH, HI)
    assert first.headers["x-mine"] == "1" and first.headers["content-length"]
    assert (first.status, first.events, first.outcome) == (200, 0, "complete")
    assert (second.method, second.path, second.body) == ("GET", "/v1/models?x=1", None)
    assert 0 <= first.seconds and first.started <= second.started <= time.time()


@pytest.mark.parametrize("body, events", [
    ({}, 0), ({"stream": True}, 5), ({"stream": True, "n": 2}, 9),
    ({"stream": True, "stream_options": {"include_usage": True}}, 6)])
def test_the_journal_counts_events(body, events):
    with Server(say("a", "b")) as server:
        chat(server, **body)
        assert server.journal[0].events == events


def test_an_entry_has_no_outcome_while_it_runs():
    go_on = threading.Event()
    with Server(lambda request: go_on.wait(60) and "a") as server, asking(server) as client:
        entry = until(lambda: server.journal and server.journal[0].body and server.journal[0])
        assert (entry.outcome, entry.status, entry.seconds) == (None, None, None)
        go_on.set()
        assert got_on(client).text == "a"
        assert (entry.outcome, entry.status) == ("complete", 200)


@pytest.mark.parametrize("body, backend, status, ended", [
    ({**HI, "n": 0}, echo, 400, "error"), (HI, failing(TEAPOT), 418, "error"),
    ({**HI, "stream": True}, failing(TEAPOT, "a"), 200, "error"),
    ({**HI, "stream": True}, always(Reply("a", quirk="truncate")), 200, "quirk"),
    ({**HI, "stream": True}, always(Reply("a", quirk="reset")), 200, "quirk"),
    (HI, always(Reply("a", quirk="html_502")), 502, "quirk"),
    (HI, echo, 200, "complete"), (b"{", echo, 400, "error"), (b"[]", echo, 400, "error"),
    (b"\xff", echo, 400, "error")])
def test_the_journal_says_how_it_ended(body, backend, status, ended):
    with Server(backend) as server, dial(server) as client:
        client.sendall(request_bytes(body))
        with contextlib.suppress(ConnectionResetError):
            read_to_end(client)
        assert outcome(server) == ended and server.journal[0].status == status
        assert server.journal[0].body == (body if isinstance(body, dict) else None)


SECRETS = {"Authorization": "Bearer SECRET", "Proxy-Authorization": "Basic SECRET", "Api-Key": "SECRET",
           "X-Api-Key": "SECRET", "X-Goog-Api-Key": "SECRET", "Cookie": "session=SECRET"}


@pytest.mark.parametrize("query", ["api-key", "api_key", "key", "token", "access_token", "API-KEY"])
def test_no_secret_stands_in_the_journal_the_log_or_a_cache(query, caplog):
    caplog.set_level("INFO", "openai_compat")
    with Server() as server:
        chat(server, path=f"{CHAT_PATH}?a=1&{query}=SECRET&b=2", headers=SECRETS)
        call(server, "GET", f"/nowhere?{query}=SECRET", headers=SECRETS)
        until(lambda: len(caplog.records) == 2)
        told = call(server, "GET", "/journal").body.decode() + caplog.text
        assert "SECRET" not in told + repr([vars(each) for each in server.journal])
        assert "a=1" in told and "b=2" in told and all(name.lower() in told for name in SECRETS)
    cached = [gc.get_referents(each) for each in vars(openai_compat).values()
              if hasattr(each, "cache_info")]
    assert cached and "SECRET" not in repr(cached)


def test_the_journal_holds_each_body_once():
    size, count = 2**20, 8
    with Server("x") as server:
        chat(server)
        tracemalloc.start()
        with no_collector():
            for _ in range(count):
                assert chat(server, "y" * size).status == 200
            held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert [len(each.body["messages"][0]["content"]) for each in server.journal[1:]] == [size] * count
    assert count * size <= held < 1.5 * count * size


def test_the_journal_keeps_the_body_that_came_to_an_unknown_endpoint():
    with Server() as server:
        got = post(server, "/v1/responses", {"model": "m", "input": "Hi"})
        assert got.error["code"] == "unknown_url" and server.journal[0].status == 404
        assert server.journal[0].body == {"model": "m", "input": "Hi"}


def test_the_journal_is_a_list_that_can_be_emptied():
    with Server() as server:
        chat(server)
        server.journal.clear()
        assert server.journal == [] and chat(server).status == 200 and len(server.journal) == 1


def test_a_body_that_is_nested_too_deeply_harms_nothing():
    with Server() as server:
        for levels, status in ((150, 200), (201, 400), (980, 400), (100000, 400)):
            deep = b'{"model":"m","prompt":"x","y":%b}' % (b"[" * levels + b"]" * levels)
            assert post(server, TEXT_PATH, deep).status == status
        entries = loads(call(server, "GET", "/journal").body)
    assert [each["body"] is None for each in entries] == [False, True, True, True, True]


def test_the_journal_keeps_the_last():
    with Server(journal=2) as server:
        for i in range(4):
            call(server, "GET", f"/health?{i}")
        assert [entry.path for entry in server.journal] == ["/health?2", "/health?3"]


def test_a_journal_that_is_not_kept_cannot_be_read():
    with Server(journal=0) as server:
        assert chat(server).status == 200 and list(server.journal) == []
        assert call(server, "GET", "/journal").error


ENTRY = {"method": str, "path": str, "headers": {str: str}, "body": (dict, None),
         "status": (int, None), "events": int, "outcome": (str, None), "started": float,
         "seconds": (float, None)}


def test_the_journal_can_be_read_over_http():
    with Server(say("a")) as server:
        post(server, CHAT_PATH, STREAMED)
        first, *rest = loads(call(server, "GET", "/journal").body)
    for entry in (first, *rest):
        check_shape(entry, ENTRY)
    assert (first["body"], first["status"], first["events"], first["outcome"]) == (
        STREAMED, 200, 4, "complete")


# ----------------------------------------------------------------------------------
# Models.

def listed(server):
    return [each["id"] for each in call(server, "GET", "/v1/models").json["data"]]


def named_model(request):
    return "x"


named_model.model = "mine"


@pytest.mark.parametrize("backend, name", [
    (echo, "echo"), (say("x"), "say"), (Script(), "script"), (model, "model"),
    (named_model, "mine"), (functools.partial(echo), None)])
def test_the_backend_names_its_model(backend, name):
    with Server(backend) as server:
        assert listed(server) == [name] or (name is None and len(listed(server)) == 1)


def test_models_are_listed_in_order():
    with Server(models=["b", "a", "c/d"]) as server:
        assert listed(server) == ["b", "a", "c/d"]


@pytest.mark.parametrize("path, id", [("/v1/models/a", "a"), ("/v1/models/b/c", "b/c"),
                                      ("/v1/models/b%2Fc", "b/c"), ("/models/a/", "a"),
                                      ("/v1/models/d%20e", "d e"), ("/v1/models/a?x=1", "a")])
def test_a_model_can_be_looked_up(path, id):
    with Server(models=["a", "b/c", "d e"]) as server:
        assert call(server, "GET", path).json["id"] == id


@pytest.mark.parametrize("method, path", [("POST", CHAT_PATH), ("POST", TEXT_PATH),
                                          ("GET", "/v1/models/x")])
def test_a_model_that_is_not_there_is_refused(method, path):
    with Server(models=["a", "b/c"]) as server:
        got = call(server, method, path, {**HI, **PROMPT, "model": "x"})
    assert got.status == 404 and got.error == {
        "message": "The model `x` does not exist or you do not have access to it.",
        "type": "invalid_request_error", "param": None, "code": "model_not_found"}


def test_any_model_is_taken_where_none_is_named():
    assert ask(echo, model="any/thing-1").json["model"] == "any/thing-1"


def test_the_backend_may_be_replaced_while_it_serves():
    with Server(say("a")) as server:
        assert contents(server, 1) == ["a"]
        server.backend = say("b")
        assert contents(server, 1) == ["b"]


# ----------------------------------------------------------------------------------
# Keys.

KEY = "sk-0123456789abcdef"


@pytest.mark.parametrize("headers", [
    {"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"},
    {"AUTHORIZATION": f"BEARER {KEY}"}, {"Authorization": f"Bearer  {KEY} "}, {"api-key": KEY},
    {"Api-Key": KEY}, {"Authorization": "Basic eDp5", "api-key": KEY},
    {"Authorization": "Bearer two"}])
def test_a_key_opens(headers):
    with Server(api_keys=(KEY, "two")) as server:
        assert chat(server, headers=headers).status == 200


@pytest.mark.parametrize("headers", [
    {}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"}, {"api-key": ""}])
def test_no_key_is_a_401(headers):
    with Server(api_keys=KEY) as server:
        got = chat(server, headers=headers)
    assert got.status == 401 and got.error["type"] == "invalid_request_error"
    assert got.error["message"].startswith("You didn't provide an API key.")
    assert got.error["code"] is None


@pytest.mark.parametrize("key", [
    "sk-wrong-but-long-enough", "xyz", KEY + "x", KEY[:-1], KEY.upper(), "é"])
@pytest.mark.parametrize("header", ["Authorization", "api-key"])
def test_a_wrong_key_is_a_401_that_does_not_repeat_it(key, header):
    with Server(api_keys=KEY) as server:
        value = (f"Bearer {key}" if header == "Authorization" else key).encode("latin-1")
        got = chat(server, headers={header: value})
    assert got.status == 401 and got.error["code"] == "invalid_api_key"
    assert got.error["message"].startswith("Incorrect API key provided: ")
    assert key not in got.error["message"]


@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
def test_a_key_may_have_any_letters_in_either_coding(coding):
    with Server(api_keys="schl\xfcssel-sch\xf6n") as server:
        headers = {"Authorization": "Bearer schl\xfcssel-sch\xf6n".encode(coding)}
        assert chat(server, headers=headers).status == 200


def test_two_keys_in_one_request_are_refused():
    raw = posted(TEXT_JSON, f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer x\r\n".encode())
    with Server(api_keys=KEY) as server:
        assert statuses(server, raw + LAST) == [400]


@pytest.mark.parametrize("length", range(1, 20))
def test_no_part_of_a_short_key_is_told(length):
    with Server(api_keys=KEY) as server:
        told = chat(server, headers={"api-key": "abcdefghijklmnopqrstuvw"[:length]}).error["message"]
    shown = told.partition("provided: ")[2].rstrip(".")
    assert shown == ("***" if length < 16 else f"abc***{'abcdefghijklmnopqrstuvw'[length - 2:length]}")


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/health", 200), ("OPTIONS", CHAT_PATH, 204), ("GET", "/v1/models", 401),
    ("GET", "/v1/models/x", 401), ("POST", TEXT_PATH, 401), ("GET", "/nowhere", 401),
    ("POST", "/sse", 401), ("POST", "/v1/engines/x/completions", 401), ("GET", "/journal", 401)])
def test_what_needs_a_key_asks_for_it_before_the_body_is_looked_at(method, path, status):
    with Server(api_keys=KEY) as server:
        assert call(server, method, path, "{").status == status
        ended = "error" if status == 401 else "complete"
        assert (server.journal[0].status, server.journal[0].outcome) == (status, ended)


# ----------------------------------------------------------------------------------
# A browser is a stranger.

OWN = socket.gethostname()
HOSTS = {
    200: ["localhost", "LOCALHOST", "localhost:1", "127.0.0.1", "127.0.0.1:8000", "10.1.2.3",
          "[::1]:80", "[fe80::1]", "name", "name:80", "a.localhost", "A.LocalHost", "b.local",
          "B.LOCAL:1", "c.d.internal:9", OWN, "page.example", "PAGE.example"],
    403: ["evil.example", "evil.example:8000", "localhost.evil.example", "a.localhost.example",
          "127.0.0.1.evil.example", "local.", "xlocalhost.example", "other.page.example", "a.b"]}
ORIGINS = {
    200: ["http://localhost", "http://localhost:3000", "https://127.0.0.1:5", "http://[::1]:5",
          "http://app.localhost:3000", "http://this.local:80", "https://page.example"],
    403: ["http://evil.example", "null", "file://", "http://localhost.evil.example", "",
          "https://page.example:1", "http://page.example", "http://this.local:81",
          "http://127.0.0.1.evil.example", "http://evil.example/http://localhost",
          "http://localhost@evil.example", "chrome-extension://x"]}


@pytest.mark.parametrize("status, host", [
    (status, host) for status in HOSTS for host in HOSTS[status]])
def test_the_host_has_to_be_this_machines(status, host):
    with Server(cors="https://page.example") as server:
        assert chat(server, headers={"Host": host}).status == status


@pytest.mark.parametrize("status, origin", [
    (status, origin) for status in ORIGINS for origin in ORIGINS[status]])
def test_the_origin_has_to_be_known(status, origin):
    with Server(cors=["https://page.example"]) as server:
        got = chat(server, headers={"Host": "this.local:80", "Origin": origin})
    assert got.status == status
    assert got.headers.get("access-control-allow-origin") == (origin if status == 200 else None)


def test_every_origin_may_be_allowed():
    with Server(cors="*") as server:
        got = chat(server, headers={"Origin": "http://any.example"})
    assert got.status == 200
    assert got.headers["access-control-allow-origin"] == "http://any.example"


@pytest.mark.parametrize("named", ["https://page.example/", "HTTPS://Page.Example", "https://PAGE.example/"])
def test_an_origin_is_named_in_any_case_and_with_a_slash(named):
    with Server(cors=named) as server:
        assert chat(server, headers={"Origin": "https://page.example"}).status == 200
        assert chat(server, headers={"Origin": "http://page.example"}).status == 403


def test_with_keys_any_origin_may_ask_and_a_stranger_is_told_to_vary():
    headers = {"Origin": "https://any.example", "Authorization": f"Bearer {KEY}"}
    with Server(api_keys=KEY) as server:
        got = chat(server, headers=headers)
        assert got.status == 200 and got.headers["access-control-allow-origin"] == "https://any.example"
    with Server() as server:
        got = chat(server, headers=headers)
        assert got.status == 403 and got.headers["vary"] == "origin"


def test_on_the_other_loopback_a_browser_is_a_stranger_too():
    try:
        server = Server(host="::1")
    except OSError:
        pytest.skip("this machine has no ::1")
    with server:
        assert [chat(server, headers={"Host": host}).status
                for host in ("[::1]", "evil.example")] == [200, 403]


def test_without_an_origin_nothing_is_allowed_to_any():
    assert "access-control-allow-origin" not in ask(echo).headers


@both
@pytest.mark.parametrize("body", [HI, {}])
def test_an_allowed_origin_may_read_errors_and_streams_too(body, stream):
    with Server() as server:
        headers = {"Origin": "http://localhost:3"}
        got = post(server, CHAT_PATH, {**body, "stream": stream}, headers)
    assert got.headers["access-control-allow-origin"] == "http://localhost:3"
    assert "origin" in got.headers["vary"].lower()


@pytest.mark.parametrize("path", [
    CHAT_PATH, TEXT_PATH, "/v1/models", "/health", "/nowhere", "/"])
@pytest.mark.parametrize("keys", [(), KEY])
def test_a_preflight_is_answered_everywhere_and_without_a_key(path, keys):
    with Server(api_keys=keys) as server:
        got = call(server, "OPTIONS", path, headers={
            "Origin": "http://localhost:3", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os"})
    assert (got.status, got.body) == (204, b"")
    assert got.headers["access-control-allow-origin"] == "http://localhost:3"
    assert got.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert "POST" in got.headers["access-control-allow-methods"] or "/chat" not in path
    assert int(got.headers["access-control-max-age"]) > 0


def test_a_strangers_preflight_is_not_allowed():
    with Server() as server:
        got = call(server, "OPTIONS", CHAT_PATH, headers={
            "Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
    assert got.status == 204
    assert not any(name.startswith("access-control-allow") for name in got.headers)


@pytest.mark.parametrize("settings", [{"api_keys": KEY}, {"host": "0.0.0.0"}],
                         ids=["with keys", "bound elsewhere"])
def test_elsewhere_a_host_may_have_any_name(settings):
    with Server(**settings) as server:
        assert server.base_url == f"http://127.0.0.1:{server.server_port}/v1"
        headers = {"Host": "any.example", "Authorization": f"Bearer {KEY}"}
        assert chat(server, headers=headers).status == 200


# ----------------------------------------------------------------------------------
# Paths.

MEANT = {  # what a path means, and the ways to write it
    "chat.completion": [
        "/v1/chat/completions", "/chat/completions", "/v1/v1/chat/completions", "/sse",
        "//chat/completions", "/v1//chat/completions", "/v1/chat/completions/",
        "/v1/chat//completions//", "/v1/chat/completions?api-version=1",
        "/v1/engines/m/chat/completions", "/engines/a%2Fb/chat/completions",
        "//v1/chat/completions?"],
    "text_completion": [
        "/v1/completions", "/completions", "/v1/completions/", "//v1///completions",
        "/v1/v1/completions", "/v1/engines/m/completions", "/engines/m/completions",
        "/v1/engines/a/b/completions"],
    "list": ["/v1/models", "/models", "/v1/models/", "//v1//models", "/v1/v1/models",
             "/v1/models?x=1"],
}


@pytest.mark.parametrize("object, path", [(object, path) for object in MEANT
                                          for path in MEANT[object]])
def test_a_path_may_be_written(object, path):
    with Server() as server:
        got = call(server, "GET" if object == "list" else "POST", path, {**HI, **PROMPT})
        assert got.json["object"] == object


@pytest.mark.parametrize("path, model", [("/v1/engines/gpt/completions", "gpt"),
                                         ("/v1/engines/a%2Fb/completions", "a/b")])
def test_an_engine_in_the_path_is_the_model(path, model):
    with Server() as server:
        assert post(server, path, {"prompt": "x"}).json["model"] == model


@pytest.mark.parametrize("method, path", [
    ("GET", "/v1x"), ("POST", "/v1/embeddings"), ("POST", "/v1/chat"),
    ("GET", "/v1/chat/completions/x"), ("POST", "/v1/v1/v1/completions"),
    ("POST", "/v1/responses"), ("GET", "/favicon.ico"),
    ("POST", "/v1/chat/completions/x"), ("POST", "/v1/Chat/Completions"), ("GET", "/%00")])
def test_a_path_that_means_nothing_is_a_404(method, path):
    with Server() as server:
        got = call(server, method, path)
    assert got.status == 404 and got.error["type"] == "invalid_request_error"
    assert method in got.error["message"]


@pytest.mark.parametrize("method, path, allowed", [
    ("GET", CHAT_PATH, "POST, OPTIONS"), ("PUT", TEXT_PATH, "POST, OPTIONS"),
    ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"), ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
    ("POST", "/health", "GET, HEAD, OPTIONS"), ("PATCH", "/v1/models/x", "GET, HEAD, OPTIONS"),
    ("HEAD", CHAT_PATH, "POST, OPTIONS"), ("TRACE", CHAT_PATH, "POST, OPTIONS"),
    ("BREW", CHAT_PATH, "POST, OPTIONS")])
def test_a_method_that_is_not_there_is_a_405_that_says_which_are(method, path, allowed):
    with Server() as server:
        got = call(server, method, path)
    assert got.status == 405 and got.headers["allow"] == allowed
    if method != "HEAD":
        assert got.error["message"].startswith(f"Not allowed to {method} on ")


# ------ routes: endpoints of the user's

def embeddings(body):
    if "input" not in body:
        raise APIError(400, "Missing 'input'.", "input")
    return {"object": "list", "data": [{"index": 0, "embedding": [0.5]}]}


def responses(body):
    yield {"type": "response.created", "n": 1}
    yield {"no type": body["input"]}
    yield {"type": "two\nlines"}


def files(body):
    return {"body": body}


ROUTES = {"/embeddings": embeddings, "POST /v1/responses": responses, "GET /files": files,
          "put /files/": files, "/files/a%20b": files}
ROUTED = {  # method, path, body: status, what the body says
    "POST": ("POST", "/v1/embeddings", {"input": "x"}, 200, b'"embedding":[0.5]'),
    "without /v1": ("POST", "//embeddings/?x=1", {"input": "x"}, 200, b'"embedding":[0.5]'),
    "APIError": ("POST", "/embeddings", {}, 400, b"Missing 'input'."),
    "no JSON": ("POST", "/embeddings", b"{", 400, b"could not parse"),
    "GET": ("GET", "/v1/files", None, 200, b'{"body":null}'),
    "HEAD": ("HEAD", "/files", None, 200, b""),
    "PUT": ("PUT", "/v1/files", {"a": 1}, 200, b'{"body":{"a":1}}'),
    "an encoded path": ("POST", "/files/a%20b", {}, 200, b'{"body":{}}'),
    "another method": ("DELETE", "/files", None, 405, b"use GET or PUT"),
    "a longer path": ("POST", "/embeddings/x", {}, 404, b"unknown_url"),
    "events": ("POST", "/responses", {"input": "Hi"}, 200,
               b'event: response.created\ndata: {"type":"response.created","n":1}\n\n'
               b'data: {"no type":"Hi"}\n\ndata: {"type":"two\\nlines"}\n\n'),
}


@pytest.mark.parametrize("method, path, body, status, said", rows(ROUTED))
def test_a_route_is_an_endpoint_like_the_others(method, path, body, status, said):
    with Server(routes=ROUTES) as server:
        got = call(server, method, path, body)
        assert got.status == status and said in got.body and (said or not got.body)
        entry = server.journal[0]
        assert (entry.status, entry.outcome) == (status, "complete" if status == 200 else "error")
        assert entry.body == (body if isinstance(body, dict) else None)
        assert entry.events == got.body.count(b"data: ") and b"[DONE]" not in got.body
        assert chat(server).status == 200           # the built-in ones are still there


@pytest.mark.parametrize("settings, headers, status", [
    ({"api_keys": KEY}, {}, 401), ({"api_keys": KEY}, {"api-key": KEY}, 200),
    ({}, {"Host": "evil.example"}, 403), ({}, {"Origin": "https://evil.example"}, 403)])
def test_who_may_use_a_route_is_checked_as_elsewhere(settings, headers, status):
    with Server(routes=ROUTES, **settings) as server:
        got = call(server, "POST", "/v1/embeddings", {"input": "x"}, headers)
        assert got.status == status
        assert call(server, "OPTIONS", "/files").headers["allow"] == "GET, PUT, HEAD, OPTIONS"


def fails_later(body):
    yield {"type": "a"}
    raise KeyError("of a route")


@pytest.mark.parametrize("function, status", [(raising(KeyError("of a route")), 500), (fails_later, 200)])
def test_the_failure_of_a_route_fails_the_block(function, status):
    with failing_at_its_end("x", KeyError, "of a route", routes={"/x": function}) as server:
        got = call(server, "POST", "/x", {})
        assert got.status == status and got.error["type"] == "server_error"
        assert outcome(server) == "error"


def test_what_no_json_can_hold_is_a_failure_of_its_route():
    with failing_at_its_end("x", (TypeError, ValueError), routes={"/x": always({"a": math.nan})}) as server:
        assert call(server, "POST", "/x", {}).status == 500


def test_the_generator_of_a_route_is_closed_when_the_client_leaves():
    endless = Endless({"type": "a"}, more={"type": "b"})
    with Server(routes={"/x": endless}) as server:
        leave(server, "/x", {}, after=1)
        assert endless.closed.wait(30) and outcome(server) == "client left"


@pytest.mark.parametrize("route", ["/chat/completions", "/v1/models", "GET /models/x", "/", "GET /health",
                                   "/engines/x/completions", "embeddings", "POST /sse"])
def test_the_path_of_a_built_in_endpoint_is_refused(route):
    with pytest.raises(ValueError, match="is not a path, or that of a built-in endpoint"):
        Server(routes={route: embeddings})
    with pytest.raises(TypeError, match="function"):
        Server(routes={"/x": "embeddings"})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "x"])
def test_any_content_type_and_accept_will_do(kind):
    with Server() as server:
        assert chat(server, headers={"Content-Type": kind, "Accept": kind}).status == 200


# ==================================================================================
# HTTP: hostile input, limits, and (marker stress) load

# What is sent to a bare socket ends with LAST: a reply to LAST shows that the connection
# was kept, its absence that it was closed, and nobody has to wait to find out.
CHAT_JSON = b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}'
TEXT_JSON = b'{"model":"m","prompt":"Hi"}'


@pytest.fixture(scope="module")
def server():
    with Server(max_body=4096, request_timeout=30) as server:
        yield server


# ----------------------------------------------------------------------------------
# One request, one reply (RFC 9112).  Bytes -> the statuses of the replies to them and
# to LAST: [200, 200] was answered and kept, [400] was refused and closed.

LONG = b"a" * 70000
TAKEN = {
    "plain": (get(), 200),
    "an empty line before it": (b"\r\n" + get(), 200),
    "two empty lines before it": (b"\r\n\r\n" + get(), 200),
    "an empty line after a body": (posted(TEXT_JSON) + b"\r\n", 200),
    "absolute form": (get(b"http://127.0.0.1/health"), 200),
    "absolute form in capitals": (get(b"HTTP://127.0.0.1/health"), 200),
    "absolute form without a path": (get(b"http://127.0.0.1?x", method=b"OPTIONS"), 204),
    "absolute form of another host": (get(b"http://evil.example/health"), 403),
    "OPTIONS *": (get(b"*", method=b"OPTIONS"), 204),
    "TRACE": (get(method=b"TRACE"), 405),
    "an unknown method": (get(method=b"BREW"), 405),
    "a method of another case": (get(method=b"get"), 405),
    "PUT with a body": (get(b"/health", b"Host: x\r\nContent-Length: 2\r\n", b"PUT") + b"{}", 405),
    "no white space after the colon": (get(headers=b"Host:x\r\n"), 200),
    "white space around a value": (get(headers=b"Host: \t x\t \r\n"), 200),
    "an empty value": (get(headers=b"Host: x\r\nX-Empty:\r\n"), 200),
    "a header in Latin-1": (get(headers=b"Host: x\r\nX-Name: J\xfcrgen\r\n"), 200),
    "a header twice": (get(headers=b"Host: x\r\nAccept: a\r\nAccept: b\r\n"), 200),
    "a hundred headers": (get(headers=b"Host: x\r\n" + b"X: y\r\n" * 99), 200),
    "HTTP/1.7": (get(version=b"1.7"), 200),
    "a length with zeros before it": (posted(TEXT_JSON).replace(b"h: 27", b"h: 00027"), 200),
    "GET with a body": (get(headers=b"Host: x\r\nContent-Length: 3\r\n") + b"GET", 200),
    "a body to nowhere": (posted(TEXT_JSON, target=b"/v1/nowhere"), 404),
    "a body that spells a request": (posted(get(), target=b"/v1/nowhere"), 404),
    "a body that is no JSON": (posted(get()), 400),
    "transfer chunks to nowhere": (post_chunked(b"1\r\nx\r\n0\r\n\r\n", target=b"/v1/x"), 404),
    "a coding in capitals": (post_chunked(b"1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON)
                             .replace(b"chunked", b"Chunked"), 200),
    "an expectation with its body": (posted(TEXT_JSON, b"Expect: 100-continue\r\n"), 200),
}
MALFORMED = {
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/3.0": (get(version=b"3.0"), 505),
    "HTTP/1.10": (get(version=b"1.10"), 400),
    "http/1.1": (b"GET /health http/1.1\r\nHost: x\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400),
    "noise": (bytes(range(256)) * 4, 400),
    "two spaces": (b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a tab for a space": (b"GET\t/health HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a space at the end of the line": (b"GET /health HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
    "a space before the line": (b" GET /health HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a space in the target": (get(b"/he alth"), 400),
    "a target that is not ASCII": (get(b"/h\xc3\xa9"), 400),
    "a target with a broken host": (get(b"http://[/health"), 400),
    "an empty method": (get(method=b""), 400),
    "a method with a separator": (get(method=b"GE(T"), 400),
    "GET *": (get(b"*"), 400),
    "CONNECT": (get(b"x:80", method=b"CONNECT"), 400),
    "a target without a slash": (get(b"health"), 400),
    "a target of another scheme": (get(b"ftp://x/health"), 400),
    "a NUL in the target": (get(b"/\0"), 400),
    "a NUL in a header": (get(headers=b"Host: x\r\nX: a\0b\r\n"), 400),
    "a control character in a header": (get(headers=b"Host: x\r\nX: a\x1bb\r\n"), 400),
    "a bare LF after the request line": (b"GET /health HTTP/1.1\nHost: x\r\n\r\n", 400),
    "bare LFs only": (b"GET /health HTTP/1.1\nHost: x\n\n", 400),
    "a bare LF after a header": (get(headers=b"Host: x\nX: y\r\n"), 400),
    "a bare CR after a header": (get(headers=b"Host: x\rX: y\r\n"), 400),
    "two CRs": (get(headers=b"Host: x\r\r\n"), 400),
    "no Host": (get(headers=b""), 400),
    "no Host beside an absolute target": (get(b"http://x/health", headers=b""), 400),
    "two Hosts": (get(headers=b"Host: x\r\nHost: x\r\n"), 400),
    "a Host that is none": (get(headers=b"Host: a b\r\n"), 400),
    "a Host with a path": (get(headers=b"Host: x/y\r\n"), 400),
    "a space before the colon": (get(headers=b"Host : x\r\n"), 400),
    "a space before a header": (get(headers=b" Host: x\r\n"), 400),
    "a folded header": (get(headers=b"Host: x\r\nX: y\r\n z\r\n"), 400),
    "a header without a colon": (get(headers=b"Host: x\r\nX\r\n"), 400),
    "a header without a name": (get(headers=b"Host: x\r\n: y\r\n"), 400),
    "a name in Latin-1": (get(headers=b"Host: x\r\n\xfc: y\r\n"), 400),
    "a hundred headers and one": (get(headers=b"Host: x\r\n" + b"X: y\r\n" * 100), 431),
    "a header too long": (get(headers=b"Host: x\r\nX: %b\r\n" % LONG), 431),
    "headers too long together":
        (get(headers=b"Host: x\r\n" + b"X: %b\r\n" % LONG[:900] * 99), 431),
    "a target too long": (get(b"/" + LONG), 414),
    "a length twice": (posted(TEXT_JSON, b"Content-Length: 27\r\n"), 400),
    "two different lengths": (posted(TEXT_JSON, b"Content-Length: 5\r\n"), 400),
    "two lengths in one line": (posted(TEXT_JSON).replace(b": 27", b": 27, 27"), 400),
    "a length with +": (posted(TEXT_JSON).replace(b": 27", b": +27"), 400),
    "a length with -": (posted(TEXT_JSON).replace(b": 27", b": -27"), 400),
    "a length with _": (posted(TEXT_JSON).replace(b": 27", b": 2_7"), 400),
    "a length in hex": (posted(TEXT_JSON).replace(b": 27", b": 0x1b"), 400),
    "a length with a space": (posted(TEXT_JSON).replace(b": 27", b": 2 7"), 400),
    "a length with a point": (posted(TEXT_JSON).replace(b": 27", b": 27.0"), 400),
    "a length in other digits": (posted(TEXT_JSON).replace(b": 27", b": \xb2\xb7"), 400),
    "an empty length": (posted(TEXT_JSON).replace(b": 27", b":"), 400),
    "a length too large": (posted(TEXT_JSON).replace(b": 27", b": 4097"), 413),
    "a length far too large": (posted(TEXT_JSON).replace(b": 27", b": " + b"9" * 40), 413),
    "a length beside transfer chunks":
        (post_chunked(b"1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, b"Content-Length: 27\r\n"), 400),
    "transfer chunks in HTTP/1.0":
        (post_chunked(b"1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, version=b"1.0"), 400),
    "a coding twice": (post_chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked\r\n"), 400),
    "two codings": (post_chunked(b"0\r\n\r\n").replace(b"chunked", b"gzip, chunked"), 501),
    "an unknown coding": (post_chunked(b"0\r\n\r\n").replace(b"chunked", b"xchunked"), 501),
    "an empty coding": (post_chunked(b"0\r\n\r\n").replace(b"chunked", b""), 501),
    "another expectation": (posted(TEXT_JSON, b"Expect: 200-ok\r\n"), 417),
    "a gzip body": (posted(b"\x1f\x8b\x08\0\0\0\0\0", b"Content-Encoding: gzip\r\n"), 400),
}
CHUNKS_TAKEN = {
    "one": b"1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON,
    "a size in capitals": b"1B\r\n%b\r\n0\r\n\r\n" % TEXT_JSON,
    "a size with zeros before it": b"0001b\r\n%b\r\n000\r\n\r\n" % TEXT_JSON,
    "one for each byte": b"".join(b"1\r\n%c\r\n" % byte for byte in TEXT_JSON) + b"0\r\n\r\n",
    "an extension": b"1b;a=b\r\n%b\r\n0;c\r\n\r\n" % TEXT_JSON,
    "an extension with a string": b'1b ; a="b c;"\r\n%b\r\n0\r\n\r\n' % TEXT_JSON,
    "trailers": b"1b\r\n%b\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n" % TEXT_JSON,
}
CHUNKS_REFUSED = {
    "a size with +": (b"+1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a size with -": (b"-1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a size with 0x": (b"0x1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a size with _": (b"1_b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a size with a space before it": (b" 1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a size with a space after it": (b"1b \r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a size in other letters": (b"1g\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "an empty size": (b"\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "an extension without a size": (b";a\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a bare LF after the size": (b"1b\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a bare LF in an extension": (b"1b;a\nb\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a bare CR in an extension": (b"1b;a\rb\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a NUL in an extension": (b"1b;\0\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "an extension too long": (b"1b;%b\r\n%b\r\n0\r\n\r\n" % (LONG, TEXT_JSON), 400),
    "a size that is too small": (b"1a\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "a size that is too great": (b"1c\r\n%b\r\n0\r\n\r\n" % TEXT_JSON, 400),
    "two other bytes after it": (b"1b\r\n%bXX0\r\n\r\n" % TEXT_JSON, 400),
    "no line end after it": (b"1b\r\n%b0\r\n\r\n" % TEXT_JSON, 400),
    "more than max_body": (b"1001\r\n%b\r\n0\r\n\r\n" % LONG[:4097], 413),
    "more than max_body in sum": (b"800\r\n%b\r\n" % LONG[:2048] * 3 + b"0\r\n\r\n", 413),
    "a size of 16 digits": (b"f" * 16 + b"\r\n", 400),
    "a folded trailer": (b"0\r\nX: y\r\n z\r\n\r\n", 400),
    "a trailer that is none": (b"0\r\nX y\r\n\r\n", 400),
    "a hundred trailers and one": (b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
}


@pytest.mark.parametrize("raw, status", rows(TAKEN))
def test_a_request_that_was_read_whole_leaves_the_connection_open(server, calm, raw, status):
    assert statuses(server, raw + LAST) == [status, 200]


@pytest.mark.parametrize("raw, status", rows(MALFORMED))
def test_a_malformed_request_gets_one_refusal_and_a_close(server, calm, raw, status):
    [got] = talk(server, raw + LAST)
    assert got.status == status and got.error and got.headers["connection"] == "close"


@pytest.mark.parametrize("coded", CHUNKS_TAKEN.values(), ids=CHUNKS_TAKEN)
def test_transfer_chunks_are_decoded(server, calm, coded):
    got, last = talk(server, post_chunked(coded) + LAST)
    assert got.text == "Hi" and last.status == 200


@pytest.mark.parametrize("coded, status", rows(CHUNKS_REFUSED))
def test_malformed_transfer_chunks_get_one_refusal_and_a_close(server, calm, coded, status):
    [got] = talk(server, post_chunked(coded) + LAST)
    assert got.status == status and got.error


class Watchful(Server):
    """A server that tells whether it has read all that a client has sent so far."""

    accepted = {}

    def process_request(self, sock, address):
        self.accepted[address] = sock
        super().process_request(sock, address)

    def has_taken(self, client):
        connection = self.accepted.get(client.getsockname())
        if connection is None or connection.fileno() < 0:       # of an earlier client
            return False
        return not select.select([connection], [], [], 0)[0]


@pytest.fixture(scope="module")
def watchful():
    with Watchful(max_body=4096) as server:
        yield server


CUT = {
    "a length": posted(TEXT_JSON, target=b"/v1/nowhere"),
    "transfer chunks": post_chunked(b"5;a\r\n{\"a\":\r\n2\r\n1}\r\n0\r\nX: y\r\n\r\n"),
    "empty lines": b"\r\n\r\n" + get(),
    "bare LFs": b"GET /health HTTP/1.1\nHost: x\n\n",
    "a folded header": get(headers=b"Host: x\r\nX: y\r\n z\r\n"),
    "a bare CR": get(headers=b"Host: x\rX: y\r\n"),
    "a malformed size": post_chunked(b"+5\r\nabcde\r\n0\r\n\r\n"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01" + b"\r\n\r\n",
}


@pytest.mark.parametrize("raw", CUT.values(), ids=CUT)
def test_where_a_request_is_cut_changes_nothing(watchful, raw):
    whole = statuses(watchful, raw + LAST)
    for place in range(1, len(raw)):
        with dial(watchful) as client:
            client.sendall(raw[:place])
            until(lambda: watchful.has_taken(client))
            client.sendall(raw[place:] + LAST)
            got = [got.status for got in replies(read_to_end(client))]
        assert got == whole, raw[:place]


def test_a_request_that_comes_byte_by_byte_is_the_same_request(server):
    with dial(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in posted(TEXT_JSON) + LAST:
            client.send(bytes([byte]))
        assert [got.status for got in replies(read_to_end(client))] == [200, 200]


def test_long_heads_are_refused_however_they_come(server):
    raw = get(headers=b"Host: x\r\n" + b"X: %b\r\n" % LONG[:900] * 80)
    with dial(server) as client:
        for start in range(0, len(raw), 1000):
            with contextlib.suppress(OSError):
                client.sendall(raw[start:start + 1000])
        assert [got.status for got in replies(read_to_end(client))] == [431]


def test_pipelined_requests_are_answered_in_order(server):
    body = b'{"model":"m","prompt":"%d","stream":%b}'
    raw = [posted(body % (i, b"true" if i % 2 else b"false")) for i in range(20)]
    *got, _ = talk(server, b"".join(raw) + LAST)
    assert [each.text for each in got] == [str(i) for i in range(20)]


KEPT = {  # what is sent: the statuses, and what the first reply says of its connection
    "HTTP/1.1": (get(), [200, 200], None),
    "Connection: close": (get(headers=b"Host: x\r\nConnection: close\r\n"), [200], "close"),
    "Connection: Close": (get(headers=b"Host: x\r\nConnection: Close\r\n"), [200], "close"),
    "close among others": (get(headers=b"Host: x\r\nConnection: keep-alive, close\r\n"), [200],
                           "close"),
    "HTTP/1.0": (posted(TEXT_JSON, version=b"1.0"), [200], "close"),
    "HTTP/1.0 with close": (posted(TEXT_JSON, b"Connection: close\r\n", version=b"1.0"), [200],
                            "close"),
    "HTTP/1.0 with keep-alive": (posted(TEXT_JSON, b"Connection: keep-alive\r\n", version=b"1.0"),
                                 [200, 200], "keep-alive"),
    "a refusal in a pipeline": (get() + get(headers=b"Host : x\r\n") + get(), [200, 400], None),
}


@pytest.mark.parametrize("raw, replied, said", rows(KEPT))
def test_whether_a_connection_is_kept(server, raw, replied, said):
    got = talk(server, raw + LAST)
    assert [each.status for each in got] == replied
    assert got[0].headers.get("connection") == said and "content-length" in got[0].headers


@pytest.mark.parametrize("target", [b"/health", b"/v1/models", b"/v1/models/m", b"/v1/x"])
def test_head_has_the_headers_of_get_and_no_body(server, target):
    [there, _] = talk(server, get(target) + LAST)
    [bare, last] = talk(server, get(target, method=b"HEAD") + LAST, to_head=True)
    assert last.status == 200 and bare.status == there.status and bare.body == b""
    assert bare.headers.keys() == there.headers.keys()
    assert there.status == 404 or int(bare.headers["content-length"]) == len(there.body)


@pytest.mark.parametrize("target", [b"/v1/chat/completions", b"/health", b"/nowhere", b"*"])
def test_options_is_204_everywhere(server, target):
    got, _ = talk(server, get(target, method=b"OPTIONS") + LAST)
    assert got.status == 204 and "OPTIONS" in got.headers["allow"]
    assert "content-length" not in got.headers and "transfer-encoding" not in got.headers


@pytest.mark.parametrize("headers", [b"", b"Connection: keep-alive\r\n"])
def test_http_1_0_never_gets_transfer_chunks(server, headers):
    body = TEXT_JSON[:-1] + b',"stream":true}'
    [got] = talk(server, posted(body, headers, version=b"1.0") + LAST)
    assert got.text == "Hi" and "transfer-encoding" not in got.headers
    assert got.headers["connection"] == "close"


@pytest.mark.parametrize("version, replied", [(b"1.1", [100, 200, 200]), (b"1.0", [200])])
def test_who_expects_100_continue_is_told_to_go_on_unless_it_is_http_1_0(watchful, version, replied):
    raw = posted(TEXT_JSON, b"Expect: 100-Continue\r\n", version=version)
    with dial(watchful) as client:
        client.sendall(raw[:-len(TEXT_JSON)])
        until(lambda: watchful.has_taken(client))
        first = read_past(client, b"\r\n\r\n") if version == b"1.1" else b""
        assert first == (b"HTTP/1.1 100 Continue\r\n\r\n" if version == b"1.1" else b"")
        client.sendall(TEXT_JSON + LAST)
        assert [got.status for got in replies(first + read_to_end(client))] == replied


EXPECTING = posted(b"", b"Expect: 100-continue\r\n")


@pytest.mark.parametrize("head, status", [
    (EXPECTING.replace(b": 0", b": 4097"), 413), (EXPECTING.replace(b": 0", b": x"), 400),
    (EXPECTING.replace(b"Host: x", b"Host: evil.example").replace(b": 0", b": 9"), 403),
    (EXPECTING.replace(b": 0", b": 9\r\nContent-Encoding: gzip"), 400),
], ids=["too large", "no length", "not admitted", "gzip"])
def test_who_expects_100_continue_is_refused_before_the_body(server, head, status):
    [got] = talk(server, head)
    assert got.status == status and got.error


@pytest.mark.parametrize("origin", [b"http://[", b"http://[::1", b"x" * 9999, b"\xff", b"null"])
def test_no_origin_can_do_without_a_reply(server, calm, origin):
    [got, _] = talk(server, get(headers=b"Host: x\r\nOrigin: %b\r\n" % origin) + LAST)
    assert got.status == 403 and got.error


@pytest.mark.parametrize("method", [b"GET", b"POST", b"BREW"])
def test_an_unread_body_never_becomes_a_request(method):
    body = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 3
    headers = b"Host: x\r\nContent-Length: %d\r\n" % len(body)
    with Server(api_keys=["key"]) as server:
        got = statuses(server, get(b"/v1/models", headers, method) + body + LAST)
    assert got in ([401], [401, 200])


def test_a_refused_client_can_read_the_refusal_before_it_has_sent_all(server):
    with dial(server) as client:
        client.sendall(get(b"/v1/completions", b"Host: x\r\nContent-Length: 9999999\r\n", b"POST"))
        with contextlib.suppress(OSError):
            client.sendall(b" " * 9999999)
        [got] = replies(read_to_end(client))
    assert got.status == 413 and got.error["code"] == "request_too_large"


# ----------------------------------------------------------------------------------
# Bodies.  What cannot be a request is a 400 that says why; the connection is kept,
# for the body was read.

BODIES = {
    "nothing": (b"", "Expecting value"),
    "not UTF-8": (CHAT_JSON.replace(b"Hi", b"\xff"), "UTF-8"),
    "Latin-1": (CHAT_JSON.replace(b"Hi", b"J\xfcrgen"), "UTF-8"),
    "UTF-16": (CHAT_JSON.decode().encode("utf-16"), "UTF-8"),
    "a surrogate as bytes": (CHAT_JSON.replace(b"Hi", b"\xed\xa0\x80"), "UTF-8"),
    "not JSON": (b"model=m&prompt=Hi", "Expecting"),
    "cut short": (CHAT_JSON[:-1], "Expecting"),
    "two objects": (CHAT_JSON + CHAT_JSON, "Extra"),
    "a comma too many": (CHAT_JSON[:-1] + b",}", ""),
    "single quotes": (CHAT_JSON.replace(b'"', b"'"), "Expecting"),
    "a NUL": (CHAT_JSON.replace(b"Hi", b"\0"), "control"),
    "a line end in a string": (CHAT_JSON.replace(b"Hi", b"\n"), "control"),
    "NULs": (b"\0" * 50, ""),
    "an array": (b"[%b]" % CHAT_JSON, "an array"),
    "a string": (b'"x"', "a string"),
    "null": (b"null", "null"),
    "a number": (b"1", "an integer"),
    "a boolean": (b"true", "a boolean"),
    "NaN": (CHAT_JSON[:-1] + b',"temperature":NaN}', "NaN"),
    "Infinity": (CHAT_JSON[:-1] + b',"temperature":-Infinity}', "Infinity"),
    "1e999": (CHAT_JSON[:-1] + b',"temperature":1e999}', "1e999"),
    "NaN where nobody looks": (CHAT_JSON[:-1] + b',"x":[{"y":NaN}]}', "NaN"),
    "5,000 digits": (CHAT_JSON[:-1] + b',"seed":%b}' % (b"1" * 5000), ""),
    "arrays 100,000 deep": (CHAT_JSON[:-1] + b',"x":' + b"[" * 100000, "deep"),
    "closed arrays 100,000 deep":
        (CHAT_JSON[:-1] + b',"x":' + b"[" * 100000 + b"]" * 100000 + b"}", "deep"),
    "objects 100,000 deep": (b'{"x":' * 100000 + b"1" + b"}" * 100000, "deep"),
}
ODD_BODIES = {
    "a BOM": (b"\xef\xbb\xbf" + CHAT_JSON, "Hi"),
    "white space around it": (b" \r\n\t" + CHAT_JSON + b"\n\n", "Hi"),
    "the last of two equal names": (CHAT_JSON.replace(b"{", b'{"messages":1,', 1), "Hi"),
    "a lone surrogate": (CHAT_JSON.replace(b"Hi", b"\\ud800"), "\ud800"),
    "an escaped NUL": (CHAT_JSON.replace(b"Hi", b"a\\u0000b"), "a\0b"),
    "line separators": (CHAT_JSON.replace(b"Hi", "\x85\u2028".encode()), "\x85\u2028"),
    "any character": (CHAT_JSON.replace(b"Hi", "é世😀".encode()), "é世😀"),
    "an unknown field": (CHAT_JSON[:-1] + b',"unknown":[{}]}', "Hi"),
}


@pytest.fixture(scope="module")
def roomy():
    with Server(request_timeout=5) as server:
        yield server


@pytest.mark.parametrize("body, word", rows(BODIES))
def test_a_body_that_is_no_request_is_a_400_that_says_why(roomy, calm, body, word):
    got, last = talk(roomy, posted(body, target=b"/v1/chat/completions") + LAST)
    assert got.status == 400 and last.status == 200
    assert re.match("We could not parse the JSON body.*" + word, got.error["message"])
    assert (got.error["param"], got.error["code"]) == (None, None)


@both
@pytest.mark.parametrize("body, text", rows(ODD_BODIES))
def test_an_odd_body_is_answered(roomy, calm, body, text, stream):
    body = body.rstrip()[:-1] + (b',"stream":true}' if stream else b"}")
    got, _ = talk(roomy, posted(body, target=b"/v1/chat/completions") + LAST)
    assert got.text == text


@pytest.mark.parametrize("coded", [posted, lambda body: post_chunked(
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))], ids=["length", "transfer chunks"])
def test_max_body_is_taken_and_one_byte_more_is_not(server, coded):
    assert statuses(server, coded(TEXT_JSON.ljust(4096)) + LAST) == [200, 200]
    assert statuses(server, coded(TEXT_JSON.ljust(4097)) + LAST) == [413]


# ----------------------------------------------------------------------------------
# Limits.  None of them slows a client that behaves.

def test_beyond_max_connections_is_503_at_once_and_others_go_on():
    with Server(max_connections=2) as server, served(server) as one, served(server) as two:
        with dial(server) as third:                 # refused with its request unread
            third.sendall(posted(b" " * 100000))
            [got] = replies(read_to_end(third))
        assert got.status == 503 and int(got.headers["retry-after"]) >= 1 and got.error
        for client in (one, two):
            client.sendall(LAST)
            assert replies(read_to_end(client))[0].status == 200


def test_a_place_that_is_free_again_is_given_away():
    with Server(max_connections=1) as server:
        with served(server):
            assert statuses(server, LAST) == [503]
        until(lambda: statuses(server, LAST) == [200])


TRICKLES = {
    "a request line": b"GET /" + LONG,
    "headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 9999,
    "a body": get(b"/v1/completions", b"Host: x\r\nContent-Length: 4000\r\n", b"POST") + LONG,
    "transfer chunks": post_chunked(b"1\r\n \r\n" * 4000),
    "trailers": post_chunked(b"0\r\n" + b"X: y\r\n" * 9999),
    "empty lines": b"\r\n" * 9999,
}


@pytest.mark.parametrize("raw", TRICKLES.values(), ids=TRICKLES)
def test_the_time_limit_covers_the_whole_request(raw):
    with Server(request_timeout=0.3) as server, dial(server) as client:
        start = time.monotonic()
        client.sendall(raw[:60])
        for i in range(60, len(raw)):
            if select.select([client], [], [], 0.02)[0]:
                break
            client.sendall(raw[i:i + 1])
        got = [got.status for got in replies(read_to_end(client))]
        assert time.monotonic() - start > 0.25 and i < len(raw) - 1
    assert got == ([408] if raw.strip() else [])


def flood(client, block):
    """Send until the server says something, or has gone."""
    with contextlib.suppress(OSError):
        until(lambda: client.sendall(block) or select.select([client], [], [], 0)[0])


def test_the_time_limit_covers_a_fast_sender_too():
    with Server(request_timeout=0.3) as server, dial(server) as client:
        client.sendall(post_chunked(b""))
        flood(client, b"1;%b\r\n \r\n" % LONG[:50000])
        assert read_past(client, b"\r\n").startswith(b"HTTP/1.1 408 ")


def test_a_refused_client_that_goes_on_sending_is_cut_off(server):
    with dial(server) as client:
        client.sendall(b"\0" * 10)
        assert [got.status for got in replies(read_to_end(client))] == [400]
        with pytest.raises(OSError):
            until(lambda: client.sendall(LONG))


def test_slow_requests_do_not_slow_others():
    with Server(request_timeout=60) as server, contextlib.ExitStack() as held:
        for _ in range(30):
            held.enter_context(dial(server)).sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        assert statuses(server, get() * 20 + LAST) == [200] * 21


def test_an_idle_connection_ends_without_a_word():
    with Server(request_timeout=0.2) as server, served(server) as client:
        assert client.recv(1) == b""


def test_an_empty_line_after_a_reply_leaves_a_connection_idle():
    with Server(request_timeout=0.2) as server, served(server) as client:
        client.sendall(b"\r\n")
        assert client.recv(1) == b""


STREAM_REQUEST = posted(TEXT_JSON[:-1] + b',"stream":true}')


def test_a_reader_that_stops_is_dropped_and_its_backend_closed():
    endless = Endless(more="x" * 60000, pause=0)
    with Server(endless, request_timeout=0.3) as server, dial(server) as client:
        client.sendall(STREAM_REQUEST)
        assert endless.closed.wait(PATIENCE) and outcome(server) == "client left"


LEAVE = {"closes": socket.socket.close, "half-closes": half_close, "resets": reset}


@both
@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE)
def test_a_client_that_leaves_ends_its_backend(calm, leave, path, stream):
    endless = Endless("a", "b")
    with Server(endless) as server, dial(server) as client:
        client.sendall(request_bytes({**HI, **PROMPT, "stream": stream}, path))
        assert endless.begun.wait(PATIENCE)
        leave(client)
        assert endless.closed.wait(PATIENCE) and outcome(server) == "client left"


def unwrap_and_close(client):
    """Under TLS: close_notify, then the close, without waiting for the server's."""
    client.setblocking(False)
    with contextlib.suppress(OSError):
        client.unwrap()
    client.close()


WAYS = {  # how a client leaves: is it over TLS, what it sends after its request, how it closes
    "plain": (False, b"", socket.socket.close), "half-closed": (False, b"", half_close),
    "a request unread": (False, get() * 3, socket.socket.close),
    "stray bytes": (False, b"\r\n", socket.socket.close),
    "TLS": (True, b"", socket.socket.close), "TLS, close_notify": (True, b"", unwrap_and_close),
    "TLS, a request unread": (True, get(), unwrap_and_close),
}
PAUSED = Reply("a b", delay=(0, 3600))


def waiting_backend(name, stack):
    """A backend after whose first word (where it has one) nothing more comes."""
    if name == "a program":
        return command(program("sys.stdout.write('a '); sys.stdout.flush(); sys.stdin.read(); "
                               "signal.pause() if hasattr(signal, 'pause') else input()"))
    if name == "an upstream":
        url, _ = stack.enter_context(playing(lambda connection: (connection.sendall(
            STREAM_HEAD + transfer_chunk(b"data: a\n\n")), ended(connection))))
        return Relay(url)
    return {"a pause": PAUSED, "a first pause": Reply("a", delay=3600),
            "a quirk": Reply("a b c", quirk="stall")}[name]


@posix
@pytest.mark.parametrize("over_tls, more, close", rows(WAYS))
@pytest.mark.parametrize("what", ["a pause", "a first pause", "a program", "an upstream", "a quirk"])
def test_a_client_that_leaves_is_noticed_whatever_is_waited_for(tls_files, monkeypatch, over_tls, more,
                                                                close, what):
    waits, receive = [], openai_compat.Connection.receive
    monkeypatch.setattr(openai_compat.Connection, "receive",
                        lambda self, seconds: waits.append(seconds) or receive(self, seconds))
    threads = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(waiting_backend(what, stack),
                                            tls=tls_files if over_tls else None))
        client = stack.enter_context(secured(server, tls_files) if over_tls else dial(server))
        client.sendall(posted(json.dumps({**HI, "stream": True}).encode(), target=CHAT_PATH.encode()))
        if what != "a first pause":
            read_past(client, b"data: ")
        client.sendall(more)
        until(lambda: server.journal)
        close(client)
        assert outcome(server) == "client left"
    until(lambda: set(threading.enumerate()) <= threads)
    assert all(seconds <= 0 or seconds > 20 for seconds in waits), "somebody polls"


def test_a_client_that_left_before_the_close_is_not_an_error():
    for _ in range(50):
        with Server(PAUSED) as server:
            leave(server, CHAT_PATH, {**HI, "stream": True}, after=2)
        assert server.journal[0].outcome == "client left"


def test_more_than_is_read_ahead_is_read_when_its_turn_comes():
    with Server(always(Reply("x", delay=0.1)), max_body=2**23) as server:
        large = posted(b'{"model":"m","prompt":"%b"}' % (b"y" * 2**22))
        assert statuses(server, posted(TEXT_JSON) + large + get() + LAST) == [200, 200, 200, 200]


def test_a_client_that_half_closes_when_idle_is_hung_up_on(server):
    with served(server) as client:
        half_close(client)
        assert client.recv(1) == b""


@pytest.mark.parametrize("place", range(0, len(STREAM_REQUEST), 7))
def test_a_client_may_leave_in_the_middle_of_a_request(server, calm, place):
    with dial(server) as client:
        client.sendall(STREAM_REQUEST[:place])
        reset(client)
    assert statuses(server, LAST) == [200]


class Blocked:
    """A backend that blocks until the test is over, for the text "block"."""

    def __init__(self):
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self, request):
        if request["text"] == "block":
            self.begun.set()
            self.release.wait(300)
        return "done"


def test_a_server_may_be_closed_by_its_own_backend():
    went_on = threading.Event()

    def backend(request):
        server.close()
        went_on.set()
        return "bye"
    server = Server(backend).start()
    with asking(server) as client:
        assert ended(client) and went_on.wait(30) and is_closed(server)
    until(lambda: not server.connections)


@pytest.mark.parametrize("name, value", [
    *(("request_timeout", value) for value in (0, -1, math.nan, 1e19, math.inf, "5", True)),
    ("max_body", -1), ("max_body", "1"), ("max_connections", 0), ("journal", -1), ("journal", None),
    ("quirk", "bogus"), ("max_body", math.nan)], ids=repr)
def test_a_setting_that_cannot_be_obeyed_is_refused_at_the_start(name, value):
    with pytest.raises(ValueError, match=name if name != "quirk" else "bogus"):
        Server(**{name: value})


@pytest.mark.parametrize("seconds", [None, 1e9, 0.5])
def test_any_positive_time_limit_or_none_will_do(seconds):
    with Server(request_timeout=seconds) as server:
        assert chat(server).text == "Hi"


def test_no_thread_for_a_connection_costs_only_that_connection(monkeypatch):
    with Server() as server, served(server) as kept:
        start, left = threading.Thread.start, [1]

        def refusing(thread):
            if left:                            # the next one is that of the connection
                raise RuntimeError(f"can't start new thread {left.pop()}")
            start(thread)
        monkeypatch.setattr(threading.Thread, "start", refusing)
        with dial(server) as lost:
            assert ended(lost)
        kept.sendall(get())
        assert read_past(kept, b"ok") and statuses(server, LAST) == [200] and not left


def test_a_backend_that_blocks_holds_up_neither_others_nor_the_end(caplog):
    blocked = Blocked()
    with Server(blocked) as server, dial(server) as client:
        client.sendall(posted(TEXT_JSON.replace(b"Hi", b"block")))
        assert blocked.begun.wait(PATIENCE)
        assert statuses(server, posted(TEXT_JSON) + LAST) == [200, 200]
        server.close()
        assert not blocked.release.is_set() and client.recv(1) == b""
        blocked.release.set()
    assert "left behind" in caplog.text


# ----------------------------------------------------------------------------------
# Start and stop, with a client that holds a connection open each time.

def descriptors():
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder))
    return 0                                    # a platform that does not tell


def start_and_stop(times):
    """Seconds for each, client included; every client has to see its connection end."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        server = Server(say("x")).start()
        with served(server) as client:
            server.close()
            assert client.recv(1) == b""
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)


def test_a_server_that_was_stopped_leaves_nothing_behind():
    start_and_stop(1)
    gc.collect()
    threads, files = threading.active_count(), descriptors()
    start_and_stop(50)
    until(lambda: threading.active_count() <= threads and descriptors() <= files)


def test_a_port_is_free_again_after_close():
    with Server() as first, served(first):
        port = first.server_port
    with Server(port=port) as second:
        assert statuses(second, LAST) == [200]
    second.close()                              # once more does no harm


def test_a_closed_server_cannot_be_started_again():
    server = Server()
    server.close()
    with pytest.raises(RuntimeError, match="closed"):
        server.start()


@posix
def test_a_child_of_the_program_does_not_keep_the_port():
    code = """
import os, socket, sys
sys.path.insert(0, %r)
from openai_compat import Server
server = Server().start()
child = os.fork() or os.read(0, 1) or os._exit(0)
server.close()
try:
    socket.create_connection(server.server_address[:2], 5)
    print("still accepting")
except OSError:
    print("refused")
os.kill(child, 9)
"""
    ours, theirs = os.pipe()
    with open(theirs, "wb"):
        assert finished(sys.executable, "-c", code % str(HERE), stdin=ours).stdout == "refused\n"
    os.close(ours)


@pytest.mark.parametrize("host, url", [
    ("127.0.0.1", "http://127.0.0.1:{}/v1"), ("0.0.0.0", "http://127.0.0.1:{}/v1"),
    ("localhost", "http://127.0.0.1:{}/v1"), ("::1", "http://[::1]:{}/v1"), ("::", "http://[::1]:{}/v1")])
def test_the_base_url_works_for_a_client(host, url):
    try:
        server = Server(host=host)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with server, urllib.request.urlopen(server.base_url + "/models") as got:
        assert server.base_url == url.format(server.server_port) and got.status == 200


# ----------------------------------------------------------------------------------
# Fuzz.  FUZZ_SEED repeats a run that failed, FUZZ_CASES makes it longer.

CASES = int(os.environ.get("FUZZ_CASES", 300))
SEED = int(os.environ.get("FUZZ_SEED", random.randrange(10**6)))
NOISE = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\0", b":", b",", b";", b"\x7f", b"\xff",
         b"0", b"-1", b"+", b"0x", b"9" * 30, b"/", b"*", b"?", b"%", b"[", b"chunked", b"HTTP/1.0",
         b"Host: x\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n ",
         b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"X" * 5000, b"Origin: http://[\r\n"]
SOUND = [get(), get(b"/v1/models/m"), get(b"http://localhost/v1/models"), posted(TEXT_JSON), STREAM_REQUEST,
         posted(CHAT_JSON, target=b"/v1/chat/completions"), get(b"*", method=b"OPTIONS"),
         posted(CHAT_JSON, b"Expect: 100-continue\r\n"), posted(TEXT_JSON, b"Origin: http://localhost\r\n"),
         posted(TEXT_JSON, b"Connection: keep-alive\r\n", version=b"1.0")] + [
         post_chunked(coded) for coded in CHUNKS_TAKEN.values()]


def mutated(raw, dice):
    """The same bytes with a few of them changed, lost, doubled, swapped or put in."""
    for _ in range(dice.choice([1, 1, 1, 2, 3, 8])):
        i, j = sorted(dice.randrange(len(raw) + 1) for _ in "ij")
        j = min(j, i + dice.choice([1, 1, 4, 40]))
        middle = dice.choice([b"", raw[i:j] * 2, dice.choice(NOISE), dice.choice(NOISE) + raw[i:j],
                              bytes(dice.randrange(256) for _ in raw[i:j]), raw[i:j].swapcase()])
        raw = raw[:i] + middle + raw[j:]
    return raw


def exchanged(server, raws):
    """What came back for each, all of them at once."""
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(dial(server)) for _ in raws]
        for client, raw in zip(clients, raws):
            client.sendall(raw)
        return [read_to_end(client) for client in clients]


def test_mutated_bytes_get_sound_replies_and_a_close(calm):
    dice = random.Random(SEED)
    with Server(max_body=4096, request_timeout=0.3) as server:
        for start in range(0, CASES, 50):
            raws = [mutated(dice.choice(SOUND), dice) + LAST for _ in range(50)]
            for raw, stream in zip(raws, exchanged(server, raws)):
                found = [got for got in replies(stream) if got.status != 100]
                assert found and not [1 for got in found if got.status in (500, 503)], (SEED, raw)
                assert all(got.error for got in found if got.status >= 400), (SEED, raw)


SURROGATE = "\ud800"
STRANGE = [None, True, False, 0, 1, -1, 2.5, 10**30, -1e300, "", "x", "auto", SURROGATE, "\0",
           "y" * 3000, [], [None], [1], ["x"], [[]], [{}], {}, {"": None}, {"type": "function"},
           {"type": "x", "function": {}}, [{"role": "user"}], [{"type": "text", "text": 1}]]
TOOL_F = {"type": "function", "function": {"name": "f", "description": "d", "strict": False,
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
SCHEMA = {"type": "json_schema",
          "json_schema": {"name": "n", "schema": TOOL_F["function"]["parameters"]}}
CALL_F = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FULL = [("/v1/chat/completions", {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "n": 2, "seed": 1,
    "messages": [{"role": "system", "content": "s", "name": "n"},
                 {"role": "user", "content": [{"type": "text", "text": "t"},
                                              {"type": "image_url", "image_url": {"url": "u"}}]},
                 {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL_F]},
                 {"role": "tool", "tool_call_id": "1", "content": "c"}],
    "max_tokens": 5, "max_completion_tokens": 5, "stop": ["a", "b"], "temperature": 1,
    "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {"1": 2},
    "logprobs": True, "top_logprobs": 2, "user": "u", "tools": [TOOL_F], "tool_choice": "auto",
    "parallel_tool_calls": False, "response_format": SCHEMA, "service_tier": "auto",
    "metadata": {"a": "b"}, "store": False, "reasoning_effort": "low", "modalities": ["text"],
    "prediction": {"type": "content", "content": "x"}, "verbosity": "low"}),
    ("/v1/chat/completions", {
    "model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [TOOL_F],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_object"}}),
    ("/v1/chat/completions", {
    "model": "m", "messages": [{"role": "user", "content": "x"},
                               {"role": "assistant", "function_call": CALL_F["function"]},
                               {"role": "function", "name": "f", "content": "c"}],
    "functions": [TOOL_F["function"]], "function_call": {"name": "f"}}),
    ("/v1/completions", {
    "model": "m", "prompt": ["a", "b"], "suffix": "s", "max_tokens": 5, "temperature": 1, "n": 1,
    "best_of": 2, "stream": False, "logprobs": 2, "echo": True, "stop": "x", "user": "u",
    "logit_bias": {"1": 1}, "seed": 1, "top_p": 1, "presence_penalty": 0}),
    ("/v1/completions", {
    "model": "m", "prompt": [[1, 2], [3]], "stream": True, "n": 3, "logprobs": 0})]


def places(value, path=()):
    """The path of every field and item in a JSON value."""
    steps = value if isinstance(value, dict) else range(len(value)) \
        if isinstance(value, list) else ()
    for step in steps:
        yield path + (step,)
        yield from places(value[step], path + (step,))


def changed(body, path, value):
    """A copy of the body with the field at the path set to a value."""
    body = json.loads(json.dumps(body))
    *parents, last = path
    inner = body
    for step in parents:
        inner = inner[step]
    inner[last] = value
    return body


def noise(dice, depth=4):
    """Any JSON value, nested a little."""
    if depth == 0 or dice.random() < 0.4:
        return dice.choice(STRANGE)
    names = ["type", "function", "name", "role", "content", "x", "properties", "enum", "$ref"]
    if dice.random() < 0.5:
        return [noise(dice, depth - 1) for _ in range(dice.randrange(4))]
    return {dice.choice(names): noise(dice, depth - 1) for _ in range(dice.randrange(4))}


def sound(got):
    """Is it a whole reply of the shape that its status and its content type promise?"""
    if got.status != 200:
        return got.status == 400 and got.error
    if got.headers["content-type"] == "application/json":
        return json.loads(got.body)["choices"]
    *events, done, end = got.body.decode().split("\n\n")
    return (done, end) == ("data: [DONE]", "") and all(
        "choices" in json.loads(event[len("data: "):]) for event in events)


def check_all(server, requests):
    """Send all on one connection, in order; look at each reply."""
    for start in range(0, len(requests), 20):
        part = requests[start:start + 20]
        raw = b"".join(posted(json.dumps(body).encode(), target=path.encode())
                       for path, body in part)
        *got, last = talk(server, raw + LAST)
        assert len(got) == len(part)
        for request, reply in zip(part, got):
            assert sound(reply), (SEED, request, vars(reply))


@pytest.mark.parametrize("path, body", FULL, ids=["chat", "tools", "functions", "text", "ids"])
def test_any_value_in_any_field_gets_a_sound_reply(roomy, calm, path, body):
    dice = random.Random(SEED)
    valid = posted(json.dumps(body).encode(), target=path.encode())
    assert statuses(roomy, valid + LAST) == [200, 200]
    check_all(roomy, [
        (path, changed(body, place, value)) for place in places(body)
        for value in dice.sample(STRANGE, min(CASES // 50, len(STRANGE)))])


FOREIGN = sorted({*openai_compat.CHAT_FIELDS, *openai_compat.COMPLETION_FIELDS, "prompts", "text", "index",
                  "id", "endpoint", "body", "prompt", "messages", "best_of", "input", "stop_sequences"})


@pytest.mark.parametrize("path, body", [(CHAT_PATH, HI), (TEXT_PATH, PROMPT)], ids=["chat", "text"])
@pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.stress)])
def test_any_value_in_a_field_of_the_other_endpoint_gets_a_sound_reply(roomy, calm, path, body, share):
    dice = random.Random(SEED)
    check_all(roomy, [
        (path, {**body, "stream": stream, name: value}) for name in FOREIGN for stream in (False, True)
        for value in STRANGE if dice.random() < share])


FOREIGN_FIELDS = [  # each was a 500
    (CHAT_PATH, {"prompts": 5}), (TEXT_PATH, {"max_completion_tokens": "5"}),
    (TEXT_PATH, {"max_completion_tokens": -1}), (TEXT_PATH, {"functions": [TOOL_F["function"]]}),
    (TEXT_PATH, {"response_format": "json"}), (TEXT_PATH, {"response_format": {"type": "json_schema"}}),
    (TEXT_PATH, {"tools": [TOOL_F], "tool_choice": "required"}), (TEXT_PATH, {"messages": 5}),
    (CHAT_PATH, {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "u"}, "text": 5}]}]})]


@both
@pytest.mark.parametrize("path, fields", FOREIGN_FIELDS, ids=[str(list(each[1])) for each in FOREIGN_FIELDS])
def test_a_field_that_means_nothing_here_is_passed_over(roomy, calm, path, fields, stream):
    body = {"model": "m", "prompt": "Hi", "messages": user("Hi"), "stream": stream, **fields}
    assert post(roomy, path, body).text == "Hi"


@pytest.mark.parametrize("count", [CASES, pytest.param(50000, marks=pytest.mark.stress)])
def test_nested_noise_gets_a_sound_reply(roomy, calm, count):
    dice = random.Random(SEED)
    cases = [dice.choice(FULL) for _ in range(count)]
    check_all(roomy, [(path, changed(body, dice.choice(list(places(body))), noise(dice)))
                      for path, body in cases])


# ----------------------------------------------------------------------------------
# Stress (`make stress`; STRESS=short for a minute of it).  The server is a process of
# its own, so that what is measured is the server.  Each test prints a row of the table.

SHORT = os.environ.get("STRESS") == "short"
stress = pytest.mark.stress
CHILD = """
import resource, sys, threading
from openai_compat import Reply, echo, main

def backend(request):
    word, _, count = request["text"].partition(" ")
    if word == "tick":
        return Reply(" ".join(map(str, range(int(count)))), delay=0.05)
    if word == "block":
        threading.Event().wait()
    return echo(request)

most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(int(sys.argv[1]), most), most))
sys.exit(main(sys.argv[2:]))
"""


class Process(Running):
    """The command in a process of its own; knows its memory (MiB) and its descriptors."""

    def __init__(self, *flags, files=20000):
        super().__init__("--quiet", *(flags or ("--backend", "__main__:backend")),
                         start=(sys.executable, "-c", CHILD, str(files)), cwd=str(HERE))
        self.child = self.process

    def memory(self, name="VmRSS"):
        with open("/proc/%d/status" % self.child.pid) as status:
            return int(re.search(name + r":\s*(\d+)", status.read())[1]) / 1024

    def descriptors(self):
        return len(os.listdir("/proc/%d/fd" % self.child.pid))

    def cpu(self):
        with open("/proc/%d/stat" % self.child.pid) as stat:
            times = stat.read().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def row(request, capsys):
    """Prints a row of the table: what was sent, how often, what came of it."""
    def print_row(text, *values):
        with capsys.disabled():
            print("\n| %s | %s |" % (request.node.name[len("test_"):], text % values))
    return print_row


@pytest.fixture
def many_files():
    """Descriptors for a few thousand connections, on our side."""
    resource = pytest.importorskip("resource")
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not os.path.isdir("/proc/self/fd") or most < 8000:
        pytest.skip("needs Linux and 8,000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (8000, most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def of(values, share):
    """The value below which that share of the values lies."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


class Stream:
    """One client of many: what came on its connection, and when."""

    def __init__(self, server, prompt):
        body = json.dumps({"model": "m", "prompt": prompt, "stream": True})
        self.rest, self.texts, self.times, self.begun = b"", [], [], time.monotonic()
        self.tail = b""
        self.client = dial(server)
        self.client.sendall(posted(body.encode(), b"Connection: close\r\n"))

    def read(self):
        """Take what is there; False at the end."""
        block = self.client.recv(65536)
        self.times.append(time.monotonic())
        self.tail = (self.tail + block)[-300:]
        whole, blank, self.rest = (self.rest + block).rpartition(b"\n\n")
        self.texts += re.findall(rb'"text":"([^"]*)"', whole + blank)
        return bool(block)


def watch_streams(streams, events, halfway):
    """Read all the streams to their ends; call `halfway` once, after half the events."""
    selector, half = selectors.DefaultSelector(), None
    for stream in streams:
        selector.register(stream.client, selectors.EVENT_READ, stream)
    while selector.get_map():
        for key, _ in selector.select(30) or pytest.fail("silence for 30 s"):
            if not key.data.read():
                selector.unregister(key.fileobj)
                key.fileobj.close()
        if half is None and len(streams[0].texts) > events / 2:
            half = [halfway()]
    return half[0]


@stress
@pytest.mark.parametrize("count, events", [(300, 60)] if SHORT else [(500, 400), (1000, 400)])
def test_many_streams_at_once_are_complete_and_in_order(many_files, row, count, events):
    prompt = " ".join(map(str, range(events)))
    with Process("--delay", "0.05", "--max-connections", "1100") as server:
        talk(server, posted(TEXT_JSON) + LAST)
        before = server.memory()
        streams = [Stream(server, prompt) for _ in range(count)]
        during = watch_streams(streams, events, server.memory)
    expected = prompt.encode()
    assert all(b"".join(stream.texts) == expected for stream in streams)
    assert all(stream.tail.endswith(b"0\r\n\r\n") for stream in streams)
    first = [stream.times[0] - stream.begun for stream in streams]
    whole = [stream.times[-1] - stream.times[0] for stream in streams]
    row("%d streams x %d events, all complete; first event p50 %.0f, p99 %.0f ms; rate p50 %.1f,"
        " least %.1f events/s; %.0f KiB a stream", count, events, 1000 * of(first, 0.5),
        1000 * of(first, 0.99), events / of(whole, 0.5), events / max(whole),
        1024 * (during - before) / count)
    assert of(first, 0.99) < 1


class Slowloris:
    """A client that sends a request byte by byte, and comes again when it is dropped."""

    raw = b"POST /v1/completions HTTP/1.1\r\n" + b"X-Slow: y\r\n" * 90

    def __init__(self, server):
        self.server, self.drops, self.client, self.sent = server, 0, dial(server), 0

    def step(self):
        try:
            if select.select([self.client], [], [], 0)[0]:
                raise ConnectionError
            self.client.send(self.raw[self.sent:self.sent + 1])
            self.sent += 1
        except OSError:
            self.client.close()
            self.drops, self.client, self.sent = self.drops + 1, dial(self.server), 0


def ask_on(connection, i):
    """One completion, on a connection that is kept."""
    connection.request("POST", "/v1/completions", b'{"model":"m","prompt":"number %d"}' % i)
    reply = connection.getresponse()
    assert reply.status == 200
    return json.loads(reply.read())["choices"][0]["text"] == "number %d" % i


@stress
def test_slow_clients_do_not_disturb_the_others(row):
    seconds, slow, rate = (10, 100, 200) if SHORT else (60, 300, 200)
    late, good = [], 0
    with Process("--backend", "__main__:backend", "--request-timeout", "5") as server:
        snails = [Slowloris(server) for _ in range(slow)]
        connections = [http.client.HTTPConnection(*server.server_address) for _ in range(8)]
        begin = time.monotonic()
        for i in range(seconds * rate):
            due = begin + i / rate
            snails[i % slow].step()
            snails[(i + slow // 2) % slow].step()
            time.sleep(max(due - time.monotonic(), 0))
            if i % 50 == 0:
                connections[i // 50 % 8].close()        # the next one dials again
            good += ask_on(connections[i % 8], i)
            late.append(time.monotonic() - due)
        took = time.monotonic() - begin
        for client in connections + [snail.client for snail in snails]:
            client.close()
    row("%d requests at %.0f/s beside %d slow clients, dropped %d times: %d good; p50 %.1f, p99 "
        "%.1f, worst %.0f ms", len(late), len(late) / took, slow, sum(s.drops for s in snails),
        good, 1000 * of(late, 0.5), 1000 * of(late, 0.99), 1000 * max(late))
    assert good == seconds * rate and sum(snail.drops for snail in snails) >= slow


SOAK = [get(), posted(TEXT_JSON), STREAM_REQUEST, posted(CHAT_JSON, target=b"/v1/chat/completions"), posted(b"{"),
        post_chunked(CHUNKS_TAKEN["one for each byte"]), get(b"/v1/nowhere"), get(b"/v1/models"),
        posted(TEXT_JSON, b"Expect: 100-continue\r\n"), get(b"/v1/models/m", method=b"OPTIONS")]


@stress
def test_memory_and_descriptors_stay_flat(many_files, row):
    rounds, raw = 200 if SHORT else 2000, b"".join(SOAK) * 5
    expected = [200, 200, 200, 200, 400, 200, 404, 200, 200, 204] * 5 + [200]
    with Process() as server:
        begin, marks = time.monotonic(), []
        for i in range(rounds):
            assert statuses(server, raw + LAST) == expected
            if i in (rounds // 10, rounds - 1):
                marks.append((server.memory(), server.descriptors()))
        took = time.monotonic() - begin
    (memory, files), (more_memory, more_files) = marks
    row("%d exchanges in %.0f s; %.1f MiB after a tenth, %.1f at the end; %d and %d descriptors",
        rounds * 51, took, memory, more_memory, files, more_files)
    assert more_memory - memory < 5 and more_files <= files + 1


def in_chunks(body, size):
    """The body as transfer chunks of that size."""
    return b"".join(b"%x\r\n%b\r\n" % (len(body[i:i + size]), body[i:i + size])
                    for i in range(0, len(body), size)) + b"0\r\n\r\n"


@stress
def test_bodies_of_32_mib_are_taken_in_bounded_memory(many_files, row):
    least, most = TEXT_JSON[:-1] + b',"x":"', 2**25
    body = least + b"a" * (most - len(least) - 2) + b'"}'
    tiny = in_chunks(body[:2**21 if SHORT else 2**23], 2)       # each costs the server a turn
    with Process("--request-timeout", "120") as server:
        before = server.memory("VmHWM")
        assert statuses(server, posted(body) + LAST) == [200, 200]
        assert statuses(server, post_chunked(in_chunks(body, 65536)) + LAST) == [200, 200]
        assert statuses(server, post_chunked(in_chunks(body + b" ", 65536))) == [413]
        assert statuses(server, posted(body + b" ")[:9999]) == [413]
        whole = server.memory("VmHWM")
        assert statuses(server, post_chunked(tiny) + LAST) == [400, 200]
        row("32 MiB twice: 200, one byte more twice: 413; %.0f MiB at most, %.0f before; %d transfer"
            " chunks of 2 bytes: %.0f MiB at most", whole, before, len(tiny) // 7,
            server.memory("VmHWM"))
        assert server.memory("VmHWM") < before + 8 * 32


@stress
def test_a_killed_client_ends_its_backends(row):
    code = "import socket, sys\nheld = []\nfor _ in range(50):\n    held.append(socket." \
           "create_connection(('127.0.0.1', int(sys.argv[1]))))\n    held[-1].sendall(%r)\n" \
           "print(held[-1].recv(1), flush=True)\nsys.stdin.read()" % STREAM_REQUEST
    begun, closed = [], []

    def backend(request):
        begun.append(1)
        try:
            while True:
                time.sleep(0.01)
                yield "x"
        finally:
            closed.append(1)
    with Server(backend) as server:
        client = subprocess.Popen([sys.executable, "-c", code, str(server.server_port)],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        client.stdout.readline()
        until(lambda: len(begun) == 50)
        client.kill()
        begin = time.monotonic()
        until(lambda: len(closed) == 50)
        client.communicate()
    row("a client with 50 streams, kill -9: 50 backends closed after %.0f ms",
        1000 * (time.monotonic() - begin))


@stress
def test_a_reset_at_any_event_ends_the_backend(row):
    count = 50 if SHORT else 400
    with Server(lambda request: Endless(pause=0)(request)) as server:
        for events in range(count):
            with dial(server) as client:
                client.sendall(STREAM_REQUEST)
                got = b""
                while got.count(b"data: ") < events:
                    got += client.recv(300)
                reset(client)
        outcomes = {outcome(server, i) for i in range(len(server.journal))}
    row("%d streams, each reset after one event more: outcomes %s", count, outcomes)
    assert outcomes == {"client left"}


@stress
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that one could catch")
def test_sigterm_lets_replies_finish_or_ends_them_with_an_error(row):
    with Process("--delay", "0.05") as server:
        prompts = ["w " * 40] * 50 + ["w " * 1000] * (0 if SHORT else 50)
        streams = [Stream(server, prompt) for prompt in prompts]
        watch_streams(streams, 20, server.child.terminate)
        begin = time.monotonic()
        assert server.child.wait(5) == 0
    done = [stream.tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for stream in streams]
    error = [b'data: {"error":' in stream.tail for stream in streams]
    row("SIGTERM beside %d streams: %d finished, %d ended with an error event after 10 s, %d "
        "cut; status 0 %.0f ms after the last", len(streams), sum(done), sum(error),
        len(streams) - sum(done + error), 1000 * (time.monotonic() - begin))
    assert all(done[:50]) and all(error[50:])


@stress
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that one could catch")
def test_a_second_sigterm_ends_at_once(row):
    with Process("--delay", "0.2") as server:
        streams = [Stream(server, "w " * 1000) for _ in range(50)]
        assert all([stream.read() for stream in streams])       # each reply has begun
        server.child.terminate()
        until(lambda: is_closed(server))
        server.child.terminate()
        begin = time.monotonic()
        assert server.child.wait(5) == 0
        took = time.monotonic() - begin
        for stream in streams:
            read_to_end(stream.client)
            stream.client.close()
    row("a second SIGTERM beside 50 streams: status 0 after %.0f ms", 1000 * took)


@stress
def test_a_server_without_descriptors_recovers(row):
    with Process(files=64) as server, served(server) as old:
        held = [dial(server) for _ in range(150)]
        begin, cpu = time.monotonic(), server.cpu()
        for _ in range(100):
            old.sendall(get())
            assert read_past(old, b"}").startswith(b"HTTP/1.1 200")
            select.select([], [], [], 0.01)
        spent = server.cpu() - cpu
        for client in held:
            client.close()
        again = time.monotonic()
        assert statuses(server, LAST) == [200]
    row("150 connections at 64 descriptors: an old connection is served, %.2f s CPU in %.1f s; a "
        "new one %.0f ms after", spent, again - begin, 1000 * (time.monotonic() - again))


@stress
def test_blocked_backends_hold_up_nobody(row):
    count, times = 200, 200 if SHORT else 2000
    with Process() as server, contextlib.ExitStack() as held:
        for _ in range(count):
            held.enter_context(dial(server)).sendall(posted(TEXT_JSON.replace(b"Hi", b"block")))
        begin = time.monotonic()
        for _ in range(times // 20):
            assert statuses(server, posted(TEXT_JSON) * 19 + LAST) == [200] * 20
    row("%d requests beside %d backends that block for ever: all good, %.2f ms each", times,
        count, 1000 * (time.monotonic() - begin) / times)


@stress
def test_a_thousand_starts_and_stops_leave_nothing_behind(row):
    start_and_stop(10)
    threads, files = threading.active_count(), descriptors()
    seconds = start_and_stop(200 if SHORT else 1000)
    row("%d starts and stops with a connection held: median %.2f, p99 %.2f ms",
        len(seconds), 1000 * of(seconds, 0.5), 1000 * of(seconds, 0.99))
    until(lambda: threading.active_count() <= threads and descriptors() <= files)


# ==================================================================================
# THE CLIENT: the reading pipe, retries, the command line, the conversation


# ---------------------------------------------------------------------------
# What a server says: bytes out, over a real socket.

def refusal_reply(status, **fields):
    return reply({"error": {"message": "no", **fields}}, status)


def then_held(reply):
    """Send the reply, and keep the connection until the client has left."""
    def serve(connection):
        connection.sendall(reply)
        with contextlib.suppress(ConnectionError):
            connection.recv(1)
        serve.left.set()
    serve.left = threading.Event()
    return serve


def then_reset(reply):
    def serve(connection):
        connection.sendall(reply)
        reset(connection)
    return serve


def event(delta, finish_reason=None, index=0):
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"


ROLE_EVENT, HI_EVENT, THERE, STOP, DONE = (
    event({"role": "assistant", "content": ""}), event({"content": "Hi"}),
    event({"content": " there"}), event({}, "stop"), b"data: [DONE]\n\n")
GOOD = streamed(ROLE_EVENT, HI_EVENT, THERE, STOP, DONE)
WHOLE = {"id": "c", "object": "chat.completion", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": "Hi there"},
     "finish_reason": "stop"}]}
MODELS_REPLY = reply({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})


def asked(answer, **settings):
    """The text of a streamed answer that is played."""
    with playing(answer) as (base_url, _):
        return "".join(pieces(streaming(base_url, **settings)))


def streaming(base_url, *key, **settings):
    return Client(base_url, *key, **settings).chat_completions("Hi", "m", stream=True)


def completed(*answers, text="Hi", **settings):
    """(the completion of a chat, the requests that it took)."""
    with playing(*answers) as (base_url, requests):
        return Client(base_url, **settings).chat_completions(text, "m"), requests


def refused_by(answer, **settings):
    """The error of a chat that is refused, and how many requests were made."""
    with playing(answer) as (base_url, requests), pytest.raises(ClientError) as caught:
        Client(base_url, **settings).chat_completions("Hi", "m")
    return caught.value, len(requests)


def said_by(completion):
    return completion["choices"][0]["message"]["content"]


def events_in(*reads):
    return list(events(lines(reads)))


def chunks_read(*reads):
    return chunks(events(lines(reads)))


def text_in(*reads):
    """The text in the bytes of an event stream, without a socket."""
    return "".join(pieces(chunks_read(*reads)))


def single_bytes(body):
    return [bytes([byte]) for byte in body]


def test_the_examples_of_the_client_are_true():
    found = {test.name: test for test in doctest.DocTestFinder().find(client) if test.examples}
    for name in ("reads", "lines", "events", "chunks", "pieces", "fold"):
        assert "Example:" in found["client." + name].docstring
    for test in found.values():
        output = []
        doctest.DocTestRunner().run(test, out=output.append)
        assert output == [], "".join(output)


# ---------------------------------------------------------------------------
# Lines and events: the examples of the standard (WHATWG HTML 9.2), the cases of the SDKs.

EVENT_STREAMS = {  # name: (lines without their ends, what the events say)
    "stock": ("data: YHOO|data: +2|data: 10||", ["YHOO\n+2\n10"]),
    "ids": (": test stream||data: first event|id: 1||data:second event|id||"
            "data:  third event||", ["first event", "second event", " third event"]),
    "no value": ("data||data|data||", ["", "\n"]),
    "space": ("data:test||data: test||", ["test", "test"]),
    "types": ("event: add|data: 73857293||event: remove|data: 2153||",
              ["73857293", "2153"]),
    "no data": ("event: ping||retry: 1000||id: 7||: c||data: x||", ["x"]),
    "blank lines": ("|||data: x|||||data: y||", ["x", "y"]),
    "empty between": ('data: {|data:|data: "a":|data: 1}||', ['{\n\n"a":\n1}']),
    "unknown fields": ("date: x|data : y|dat|data: z||", ["z"]),
    "separators": ("data: a\u2028b\x85c\x0cd||", ["a\u2028b\x85c\x0cd"]),
    "many bytes each": ("data: \u00fc\u65e5\U0001f600||", ["\u00fc\u65e5\U0001f600"]),
    "id, then comment": ("id: 1|data: x||: c||data: y||", ["x", "y"]),
}
ENDS = {"LF": "\n", "CR": "\r", "CRLF": "\r\n"}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("text, said", EVENT_STREAMS.values(), ids=EVENT_STREAMS)
def test_a_stream_reads_the_same_wherever_it_is_cut(text, said, end):
    body = text.replace("|", end).encode()
    for cut in range(len(body) + 1):
        assert events_in(body[:cut], b"", body[cut:]) == said
    assert events_in(*single_bytes(body)) == said


@pytest.mark.parametrize("mix", list(itertools.product(ENDS.values(), repeat=3)))
def test_line_ends_may_be_mixed(mix):
    body = "data: a%sdata: b%s%s" % mix + "\n"
    assert events_in(*single_bytes(body.encode()))[0][0] == "a"


def test_an_event_names_its_type_which_does_not_reach_the_next_one():
    for given, types in ((["event: add", "data: 1", "", "data: 2", ""], ["add", "message"]),
                         (["event: error", "", "data: x", ""], ["message"])):
        assert [event.type for event in events(given)] == types


@pytest.mark.parametrize("given, said", [
    ([b"data: a", b"data: b", b""], ["a\nb"]), ([b"data: a\n", b"data: b\r\n", b"\r\n"], ["a\nb"]),
    (["data: a", "data: b", ""], ["a\nb"]), (["data: a\r", "data: b\n", "\n"], ["a\nb"]),
    ([b"\xef\xbb\xbfdata: a", b"", b"\xef\xbb\xbfdata: b", b""], ["a"]),  # one mark, not two
    ([b"data: a\xffb", b""], ["a\ufffdb"])])
def test_events_reads_bytes_and_str_with_and_without_line_ends(given, said):
    assert list(events(given)) == said


def test_a_cr_ends_its_line_at_once_and_a_last_event_without_its_blank_line_is_marked():
    reading = lines(iter([b"data: x\r", b"\r"]))
    assert (next(reading), next(reading)) == (b"data: x", b"")
    assert [(event, event.whole) for event in events([b"data: x"])] == [("x", False)]


@pytest.mark.parametrize("line", [b": comment\n", b"data: x\n", b"unknown\n"])
@pytest.mark.parametrize("size", [1, 97, 100000])
def test_lines_without_a_blank_one_are_no_event_yet(line, size):
    body = line * 2000
    reading = lines(body[i:i + size] for i in range(0, len(body), size))
    assert not [event for event in events(reading) if event.whole]


SEPARATED = "\u2028x" * 500_000


@pytest.mark.parametrize("body, size, said", rows({
    "2,000 events in one read": (b"data: x\n\n" * 2000, 1 << 20, ["x"] * 2000),
    "10,000 data lines": (b"data: x\n" * 10000 + b"\n", 1 << 20, ["\n".join("x" * 10000)]),
    "2 MiB with separators": (f"data: {SEPARATED}\n\n".encode(), 4093, [SEPARATED])}))
def test_many_and_long_events_are_read(body, size, said):
    assert events_in(*(body[i:i + size] for i in range(0, len(body), size))) == said


def test_an_event_of_64_mib_is_read_in_linear_time():
    block, started = b"x" * 4096, time.process_time()
    reading = itertools.chain([b"data: "], itertools.repeat(block, 16384), [b"\n\n"])
    assert len(next(events(lines(reading)))) == 64 << 20
    assert time.process_time() - started < 4


# ---------------------------------------------------------------------------
# Chunks and pieces: what counts as an end, as an error, as nothing at all.

TOLERATED = {  # protocol.md 3.5 and 5.6: the bytes of a stream that says "Hi there"
    "as the API": HI_EVENT + THERE + STOP + DONE,
    "no space": (HI_EVENT + THERE + STOP + DONE).replace(b"data: ", b"data:"),
    "comments": b":\n\n" + HI_EVENT + b": c\n\n" + THERE + STOP + DONE,
    "ids and comments": b"id: 1\n" + HI_EVENT + b": c\n\n" + THERE + STOP + DONE,
    "retry": b"retry: 1000\n\n" + HI_EVENT + THERE + STOP + DONE,
    "ping without data": b"event: ping\n\n" + HI_EVENT + THERE + STOP + DONE,
    "ping": b"event: ping\ndata: {}\n\n" + HI_EVENT + THERE + STOP + DONE,
    "named events": b"event: message\n" + HI_EVENT + b"event: foo\n" + THERE + STOP + DONE,
    "empty data": b"data: \n\n" + HI_EVENT + b"data:\n\n" + THERE + STOP + DONE,
    "null": b"data: null\n\n" + HI_EVENT + THERE + STOP + DONE,
    "byte order mark": b"\xef\xbb\xbf" + HI_EVENT + THERE + STOP + DONE,
    "several data lines": HI_EVENT.replace(b", ", b",\ndata: ") + THERE + STOP + DONE,
    "[DONE] and a space": HI_EVENT + THERE + STOP + b"data: [DONE] \n\n",
    "a named [DONE]": HI_EVENT + THERE + STOP + b"event: done\n" + DONE,
    "more after [DONE]": HI_EVENT + THERE + STOP + DONE + HI_EVENT + b"data: {nonsense\n\n",
    "no [DONE]": HI_EVENT + THERE + STOP,
    "no finish_reason": HI_EVENT + THERE + DONE,
    "no last blank line": HI_EVENT + THERE + STOP[:-1],
    "[DONE] without its line end": HI_EVENT + THERE + b"data: [DONE]",
    "half an event after the end": HI_EVENT + THERE + STOP + b'data: {"choi',
    "no choices": b"data: {\"choices\": []}\n\n" + HI_EVENT + THERE + STOP + DONE,
    "choices null": b"data: {\"choices\": null}\n\n" + HI_EVENT + THERE + STOP + DONE,
    "choices missing": b"data: {\"usage\": null}\n\n" + HI_EVENT + THERE + STOP + DONE,
    "delta null": event(None) + HI_EVENT + THERE + event(None, "stop"),
    "content null": event({"content": None}) + HI_EVENT + THERE + STOP,
    "finish_reason empty": event({"content": "Hi"}, "") + THERE + event({}, "") + DONE,
    "error null": HI_EVENT.replace(b'"id"', b'"error": null, "id"') + THERE + STOP + DONE,
    "other choices": HI_EVENT + event({"content": "no"}, None, 1) + THERE + STOP + DONE,
    "text": b'data: {"choices":[{"text":"Hi there","finish_reason":"length"}]}\n\n',
}


@pytest.mark.parametrize("body", TOLERATED.values(), ids=TOLERATED)
def test_odd_but_legible_streams_are_read_also_in_single_bytes_with_crlf(body):
    assert text_in(body) == "Hi there"
    assert text_in(*single_bytes(body.replace(b"\n", b"\r\n"))) == "Hi there"


@pytest.mark.parametrize("body, text", [
    (b"", ""), (b": only a comment\n\n", ""), (ROLE_EVENT + HI_EVENT, "Hi"), (HI_EVENT + THERE[:-9], "Hi"),
    (HI_EVENT + b"data: {\"choices\": []}\n\n", "Hi"), (b"<html>", "")])
def test_a_stream_that_just_ends_is_truncated_and_gives_its_text(body, text):
    with pytest.raises(StreamTruncated) as caught:
        text_in(body)
    assert caught.value.text == text


def test_a_stream_cut_at_any_byte_is_truncated_until_its_finish_reason_has_come():
    body = ROLE_EVENT + HI_EVENT + THERE + STOP
    for cut in range(len(body) - len("\n\n")):
        with pytest.raises(StreamTruncated):
            text_in(body[:cut])


@pytest.mark.parametrize("said, message, code", [
    (b'data: {"error":{"message":"busy","type":"t","code":"c"}}', "busy", "c"),
    (b'data: {"error":"busy"}', "busy", None),
    (b'event: error\ndata: {"message":"busy","code":"c"}', "busy", "c"),
    (b'event: error\ndata: {"error":{"message":"busy"}}', "busy", None),
    (b"event: error\ndata: busy", "busy", None),
    (b'data: {"object":"error","message":"busy","code":3}', "busy", 3),
    (b'data: {"message":"busy"}', "busy", None),
    (event({}, "error")[:-2], "the reply ended with an error", None),
    (b'data: {"choices":[{"delta":{},"error":{"message":"busy","code":502}}]}', "busy", 502),
    (b'data: {"choices":[{"error":"busy","finish_reason":"error","index":1}]}', "busy", None)])
def test_an_error_event_and_a_choice_with_an_error_raise_with_what_they_say(said, message, code):
    with pytest.raises(client.APIError) as caught:
        text_in(HI_EVENT + said + b"\n\n" + DONE)
    assert (caught.value.message, caught.value.code) == (message, code)


@pytest.mark.parametrize("said", [b'{"choices"', b"hello", b"[1]", b"17", b"[" * 100000])
def test_an_event_that_is_no_json_object_is_a_bad_reply(said):
    with pytest.raises(BadReply):
        text_in(b"data: " + said + b"\n\n" + STOP)


def test_chunks_stay_as_the_wire_has_them_and_closing_pieces_closes_them():
    assert list(chunks(['{"choices": [], "new": [1]}', "[DONE]"])) == [{"choices": [], "new": [1]}]
    given = (chunk for chunk in [{"choices": [{"delta": {"content": "x"}}]}] * 2)
    reading = pieces(given)
    assert next(reading) == "x" and given.gi_frame
    reading.close()
    assert given.gi_frame is None


def test_with_several_choices_each_one_must_end():
    both = HI_EVENT + event({"content": "no"}, None, 1)
    for ends in (STOP, event({}, "stop", 1)):
        with pytest.raises(StreamTruncated) as caught:
            text_in(both + ends)
        assert caught.value.text == "Hi"
    assert text_in(both + STOP + event({}, "stop", 1)) == text_in(both + STOP + DONE) == "Hi"


def test_a_truncated_stream_keeps_the_end_of_a_very_long_text():
    parts = [f"{number:07d}" * 1000 for number in range(400)]
    with pytest.raises(StreamTruncated) as caught:
        text_in(*(event({"content": part}) for part in parts))
    assert 1 << 20 <= len(caught.value.text) < 1 << 22 and "".join(parts).endswith(caught.value.text)


def test_a_surrogate_pair_in_two_chunks_is_one_character_and_a_lone_half_stays():
    halves = [event({"content": part}) for part in ("a\ud83d", "\ude00b", "\ud83d")]
    assert list(pieces(chunks_read(*halves, DONE))) == ["a", "\U0001f600b", "\ud83d"]
    assert said_by(fold(chunks_read(*halves[:2], DONE))) == "a\U0001f600b"


# ---------------------------------------------------------------------------
# The dialects of servers: the chunks of a stream as recorded or documented, the text that
# `chat` shows, and what fold makes of them.

def as_stream(*chunks):
    """Chunks -> the bytes of their events and [DONE]; a str is a line of its own."""
    return b"".join(chunk.encode() + b"\n\n" if isinstance(chunk, str) else
                    b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + DONE


def one(delta, finish_reason=None, **fields):
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "model": "m", "choices": [{**choice, **fields.pop("choice", {})}], **fields}


def gemini_call(id, name):
    return {"index": 0, "id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}


SAFE = {"hate": {"filtered": False, "severity": "safe"}}
THINKING = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]
DIALECTS = {  # name: (the stream, the text, what the completion holds at these places)
    "Azure: a first chunk of nothing, results beside each delta": (as_stream(
        {"choices": [], "created": 0, "id": "", "model": "", "object": "",
         "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": SAFE}]},
        one({"content": "Hi"}, created=5, choice={"content_filter_results": SAFE}),
        one({"content": " you"}, created=5, choice={"content_filter_results": SAFE}),
        one({}, "stop", created=5, choice={"content_filter_results": {}})),
        "Hi you", {"id": "c", "model": "m", "created": 5, "object": "chat.completion",
                   "choices.0.content_filter_results.hate.severity": "safe"}),
    "Mistral: thinking and text as parts": (as_stream(
        one({"role": "assistant", "content": ""}), one({"content": THINKING}),
        one({"content": [{"type": "text", "text": "Hi"}]}), one({"content": " you"}),
        one({"content": ""}, "stop")), "Hi you",
        {"choices.0.message.content": THINKING + [{"type": "text", "text": "Hi you"}]}),
    "Mistral: a reference in the text": (as_stream(
        one({"content": "Hi"}), one({"content": [{"type": "reference", "reference_ids": [1]}]}),
        one({"content": " you"}, "stop")), "Hi you",
        {"choices.0.message.content": [
            {"type": "text", "text": "Hi"}, {"type": "reference", "reference_ids": [1]},
            {"type": "text", "text": " you"}]}),
    "Mistral: nothing but text parts": (as_stream(
        one({"content": [{"type": "text", "text": "Hi"}]}),
        one({"content": [{"type": "text", "text": " you"}]}, "stop")), "Hi you",
        {"choices.0.message.content": "Hi you"}),
    "Gemini: parallel calls that all have index 0": (as_stream(
        one({"role": "assistant", "tool_calls": [gemini_call("a", "f")]}),
        one({"tool_calls": [gemini_call("b", "g")]}, "tool_calls")), "",
        {"choices.0.message.tool_calls.0.function.name": "f",
         "choices.0.message.tool_calls.1.function": {"name": "g", "arguments": "{}"}}),
    "Groq: a channel, and usage in x_groq": (as_stream(
        one({"role": "assistant", "content": ""}, x_groq={"id": "r"}),
        one({"reasoning": "H", "channel": "analysis"}), one({"reasoning": "m.", "channel": "analysis"}),
        one({"content": "Hi you"}), one({}, "stop", x_groq={"id": "r", "usage": {"total_tokens": 9}})), "Hi you",
        {"choices.0.message.channel": "analysis", "choices.0.message.reasoning": "Hm.",
         "x_groq.usage.total_tokens": 9}),
    "Together: text beside the delta": (as_stream(
        one({"content": "Hi"}, choice={"text": "Hi"}), one({"content": " you"}, choice={"text": " you"}),
        one({"content": ""}, "stop", choice={"text": None})), "Hi you",
        {"choices.0.message.content": "Hi you", "object": "chat.completion"}),
    "OpenRouter: comments, a role in each chunk": (as_stream(
        ": OPENROUTER PROCESSING", one({"role": "assistant", "content": "Hi"}, provider="P"),
        ": OPENROUTER PROCESSING", one({"role": "assistant", "content": " you"}, provider="P"),
        one({"role": "assistant", "content": ""}, "stop", choice={"native_finish_reason": "STOP"}),
        {"id": "c", "choices": [], "usage": {"cost": 0.1, "total_tokens": 9}}),
        "Hi you", {"choices.0.message.role": "assistant", "provider": "P", "usage.total_tokens": 9,
                   "choices.0.native_finish_reason": "STOP"}),
    "DeepSeek: reasoning_content and a content of null": (as_stream(
        ": keep-alive", one({"role": "assistant", "content": None, "reasoning_content": ""}),
        one({"content": None, "reasoning_content": "Hm."}),
        one({"content": "Hi you", "reasoning_content": None}, usage=None),
        one({"content": "", "reasoning_content": None}, "stop", usage={"total_tokens": 9})), "Hi you",
        {"choices.0.message.reasoning_content": "Hm.", "usage.total_tokens": 9}),
    "vLLM: usage that grows, stop_reason, calls with an index": (as_stream(
        one({"role": "assistant", "content": ""}, usage={"total_tokens": 1}),
        one({"content": "Hi you"}, usage={"total_tokens": 2}, choice={"stop_reason": None}),
        one({"tool_calls": [{"id": "a", "type": "function", "index": 0, "function": {"name": "f"}}]}),
        one({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
        one({"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}, "tool_calls",
            usage={"total_tokens": 9}, choice={"stop_reason": 7})), "Hi you",
        {"usage.total_tokens": 9, "choices.0.stop_reason": 7,
         "choices.0.message.tool_calls.0.function.arguments": '{"a": 1}'}),
    "llama.cpp: id and name in each fragment, timings": (as_stream(
        one({"role": "assistant", "content": None}), one({"content": "Hi you"}),
        one({"tool_calls": [{"index": 0, "id": "a", "type": "function",
                             "function": {"name": "f", "arguments": "{"}}]}),
        one({"tool_calls": [{"index": 0, "id": "a", "type": "function",
                             "function": {"name": "f", "arguments": "}"}}]}),
        one({}, "tool_calls", timings={"predicted_n": 2})), "Hi you",
        {"choices.0.message.tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
         "timings.predicted_n": 2}),
    "Ollama: a whole call in one chunk, finish_reason twice": (as_stream(
        one({"role": "assistant", "content": "Hi you"}),
        one({"role": "assistant", "content": "", "tool_calls": [
            {"id": "a", "index": 0, "type": "function", "function": {"name": "f", "arguments": "{}"}}]}),
        one({"role": "assistant", "content": ""}, "tool_calls"),
        one({"role": "assistant", "content": ""}, "stop")), "Hi you",
        {"choices.0.finish_reason": "tool_calls", "choices.0.message.tool_calls.0.id": "a"}),
}


def held_at(value, place):
    for step in place.split("."):
        value = value[int(step) if step.isdigit() else step]
    return value


@pytest.mark.parametrize("body, text, places", DIALECTS.values(), ids=DIALECTS)
def test_each_servers_dialect_is_understood(body, text, places):
    assert text_in(body) == text
    shown, _ = ran(streamed(body), "chat", "Hi")
    printed, _ = ran(streamed(body), "chat", "Hi", "--json")
    assert shown.stdout.decode().startswith(text) and (shown.returncode, shown.stderr) == (0, b"")
    for completion in (fold(chunks_read(body)), json.loads(printed.stdout)):
        assert {place: held_at(completion, place) for place in places} == places


@pytest.mark.parametrize("listed, names", [
    ({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}, ["a", "b"]),
    ([{"id": "a"}, {"id": "b"}], ["a", "b"]), ({"models": [{"name": "a"}, {"name": "b"}]}, ["a", "b"]),
    (["a", "b"], ["a", "b"]),
    ({"data": [{"id": "a"}, None, {"id": 5}, {"id": "b"}], "message": "success"}, ["a", "b"]),
    (5, BadReply), ("a", BadReply), ({"data": 5}, BadReply), ({"data": {"a": {}}}, BadReply),
    (None, BadReply)])
def test_a_list_of_models_is_read_in_each_form_and_else_a_named_error(listed, names):
    with playing(reply(listed)) as (base_url, _):
        with pytest.raises(names) if names is BadReply else contextlib.nullcontext():
            assert Client(base_url).models() == names


# ---------------------------------------------------------------------------
# Fold.

def folded(*deltas, **choice):
    """The message that deltas make."""
    return fold({"choices": [{"index": 0, "delta": delta, **choice}]}
                for delta in deltas)["choices"][0]["message"]


def call_delta(arguments=None, **fields):
    function = {"name": fields.pop("name", None), "arguments": arguments}
    return {"tool_calls": [{**fields, "function": {name: value for name, value
                                                   in function.items() if value is not None}}]}


@pytest.mark.parametrize("given, completion", rows({
    "a chat": (list(chunks_read(ROLE_EVENT + HI_EVENT + THERE + STOP + DONE)), {
        "id": "c", "object": "chat.completion", "choices": [
            {"index": 0, "logprobs": None, "finish_reason": "stop", "message": {
                "role": "assistant", "content": "Hi there", "refusal": None}}]}),
    "the last usage, and unknown fields": (
        [{"usage": None, "x": 1, "choices": []}, {"usage": {"total_tokens": 3}}],
        {"usage": {"total_tokens": 3}, "x": 1, "choices": [], "object": "chat.completion"}),
    "the first scalar, the last object": (
        [{"id": "", "n": 0, "x": {"a": 1}, "y": [1]}, {"id": "a", "n": 5, "x": {"b": 2}, "y": [2]},
         {"id": "b", "x": {}, "y": None}],
        {"id": "a", "n": 5, "x": {"b": 2}, "y": [2], "choices": [], "object": "chat.completion"}),
    "mixed choices": (
        [{"choices": [{"index": index, "text": text}]} for index, text in
         ((1, "b"), (0, "a"), (1, "B"), (0, "A"))],
        {"object": "text_completion", "choices": [
            {"text": text, "index": index, "logprobs": None, "finish_reason": None}
            for index, text in enumerate(("aA", "bB"))]}),
    "log probabilities": (
        [{"choices": [{"text": text, "logprobs": {"tokens": [text]}}]} for text in "ab"],
        {"object": "text_completion", "choices": [
            {"text": "ab", "index": 0, "logprobs": {"tokens": ["a", "b"]}, "finish_reason": None}]})}))
def test_fold_joins_the_chunks_into_the_completion_and_does_not_change_them(given, completion):
    before = json.dumps(given)
    assert fold(given) == completion and json.dumps(given) == before


@pytest.mark.parametrize("choice", [
    {"index": "0", "delta": None}, {"index": []}, {"delta": [], "logprobs": 5}, {"text": None},
    {"finish_reason": ["stop"], "delta": {"content": {"a": 1}, "role": 5}}, {"delta": {"content": 5}}, {"delta": {"tool_calls": 5}},
    {"delta": {"content": [{"type": "text", "text": ["x"]}, {"type": "thinking", "thinking": "x"}]}}])
def test_fold_and_pieces_bear_what_makes_no_sense_but_not_what_is_too_deep(choice):
    given = [{"choices": [choice]}, {"choices": [None, 5]}, {"choices": 5}]
    assert "".join(pieces(given)) == "" and len(fold(given)["choices"]) == 1
    too_deep = functools.reduce(lambda inner, _: {"audio": inner}, range(2000), 5)
    with pytest.raises(BadReply):
        fold([*given, {"choices": [{"delta": too_deep}]}])


@pytest.mark.parametrize("deltas, message", [
    ([{"content": "a"}, {"content": "b"}], {"content": "ab"}),
    ([{"role": "assistant"}, {"role": "assistant", "content": "a"}], {"role": "assistant"}),
    ([{"role": "", "content": "a"}], {"role": "assistant"}),
    ([None, {"content": "a"}], {"content": "a"}),
    ([{"content": None, "refusal": ""}, {"refusal": "No."}], {"content": None, "refusal": "No."}),
    ([{"reasoning_content": "a"}, {"reasoning_content": "b"}], {"reasoning_content": "ab"}),
    ([{"unknown": "a"}, {"unknown": "b"}], {"unknown": "a"}),
    ([{"unknown": 0}, {"unknown": 7}, {"unknown": 8}], {"unknown": 7}),
    ([{"images": [1]}, {"images": [2, 3]}], {"images": [1, 2, 3]}),
    ([{"audio": {"id": "x", "data": "QQ"}}, {"audio": {"data": "=="}}],
     {"audio": {"id": "x", "data": "QQ=="}}),
    ([{"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{}"}}],
     {"function_call": {"name": "f", "arguments": "{}"}})])
def test_fold_joins_deltas(deltas, message):
    assert message.items() <= folded(*deltas).items()


F = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
G = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}}


@pytest.mark.parametrize("deltas, calls", [
    ([call_delta("", index=0, id="1", name="f"), call_delta('{"a"', index=0), call_delta(":1}", index=0)], [F]),
    ([call_delta('{"a":1}', index=0, id="1", name="f"), call_delta("{}", index=1, id="2", name="g")], [F, G]),
    ([call_delta("", index=1, id="1", name="f"), call_delta('{"a":1}', index=1)], [F]),
    ([call_delta("", index=-1, id="1", name="f"), call_delta('{"a":1}', index=-1)], [F]),
    ([call_delta("", id="1", name="f"), call_delta('{"a":1}'), call_delta("{}", id="2", name="g")], [F, G]),
    ([call_delta("", id="1", name="f"), call_delta('{"a":1}', id="1")], [F]),
    ([call_delta('{"a":1}', id="1", name="f"), call_delta("", id="2", name="g"), call_delta("{}")], [F, G]),
    ([{"tool_calls": [{"function": F["function"]}, {"function": G["function"]}]}],
     [{"type": "function", "function": F["function"]},
      {"type": "function", "function": G["function"]}]),
    ([call_delta('{"a"', index=0, id="1", name="f"), call_delta(":1}", index=0, id="1", name="f")], [F]),
    ([call_delta({"a": 1}, index=0, id="1", name="f")], [{**F, "function": {
        "name": "f", "arguments": '{"a": 1}'}}]),
    ([call_delta("", index=0, id="2", name="g")], [G]),
    ([{"tool_calls": [F, G]}], [F, G]),
    ([call_delta("", name="f"), call_delta('{"a"'), call_delta(":1}")],
     [{"type": "function", "function": F["function"]}]),
    ([call_delta("", index=0, name="f"), call_delta("", index=0, id="2", name="g")],
     [{"type": "function", "function": {"name": "f", "arguments": "{}"}}, G]),
    ([{"tool_calls": [None, 5, {"id": "1", "function": None}]}],
     [{"id": "1", "type": "function", "function": None}]),
    ([{"tool_calls": [{"index": 0, "id": "1", "custom": {"name": "c", "input": "a"}}]},
      {"tool_calls": [{"index": 0, "custom": {"input": "b"}}]}],
     [{"id": "1", "type": "custom", "custom": {"name": "c", "input": "ab"}}]),
    ([{"content": "x", "tool_calls": []}, {"tool_calls": None}], None)])
def test_fold_merges_tool_calls(deltas, calls):
    assert folded(*deltas).get("tool_calls") == calls


def test_fold_of_a_long_stream_is_linear():
    part, started = {"choices": [{"delta": {"content": "x" * 100}}]}, time.process_time()
    assert len(fold(itertools.repeat(part, 100000))["choices"][0]["message"]["content"]) == 10 ** 7
    assert time.process_time() - started < 3


# ---------------------------------------------------------------------------
# The client on a socket: what it sends.

def test_a_request_is_one_post_with_the_key_and_compact_utf8():
    with playing(reply(WHOLE)) as (base_url, requests):
        Client(base_url, "sk-1").chat_completions("\u00fc", "m", n=2)
        Client(base_url).chat_completions("\ud83d", "m")
        Client(base_url).completions([[1, 2], [3]], "m")
    (line, headers, body), (_, _, lone_surrogate), (path, _, prompt) = requests
    assert path.split()[1] == TEXT_PATH and json.loads(prompt)["prompt"] == [[1, 2], [3]]
    assert line == "POST /v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer sk-1"
    assert body.decode() == ('{"model":"m","messages":[{"role":"user","content":"\u00fc"}],'
                             '"n":2,"stream":false}')
    assert b'"\\ud83d"' in lone_surrogate


def test_without_a_model_the_environments_or_once_the_servers_first_is_asked(monkeypatch):
    with playing(MODELS_REPLY, reply(WHOLE)) as (base_url, requests):
        asking = Client(base_url)
        asking.chat_completions("a"), asking.chat_completions("b")
        monkeypatch.setenv("OPENAI_MODEL", "mine")
        Client(base_url).chat_completions("c")
    assert [line.split()[1] for line, _, _ in requests] == ["/v1/models"] + 3 * [CHAT_PATH]
    assert [json.loads(body)["model"] for _, _, body in requests[1:]] == ["first", "first", "mine"]


def test_settings_come_from_the_environment(monkeypatch):
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv("OPENAI_" + name, name)
    with playing(MODELS_REPLY) as (base_url, requests):
        monkeypatch.setenv("OPENAI_BASE_URL", base_url + "/")
        assert Client().models() == ["first", "second"]
    line, headers, _ = requests[0]
    assert line.split()[1] == "/v1/models" and headers["authorization"] == "Bearer API_KEY"
    assert (headers["openai-organization"], headers["openai-project"]) == ("ORG_ID", "PROJECT_ID")


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", ""), monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert Client().url("/models") == "http://127.0.0.1:8000/v1/models"
    assert "Authorization" not in Client().headers


@pytest.mark.parametrize("settings", [
    {"base_url": "localhost:8000"}, {"base_url": "file:///etc"}, {"base_url": "http://"},
    {"base_url": "http://a:b/"}, {"base_url": "http://a b/"}, {"timeout": 0},
    {"base_url": "https://a", "cafile": "/no/such/file"}, {"base_url": "http://me:pa55word@h/v1"},
    {"base_url": "http://pa55word@h/v1"}, {"base_url": "me:pa55word@h/v1"},
    {"base_url": "http://me:pa55word@h:x y/v1"}, {"api_key": "sk-\npa55word"}])
def test_settings_that_cannot_work_are_an_error_that_shows_no_password_or_key(settings):
    with pytest.raises(ClientError) as caught:
        Client(**settings)
    assert "pa55word" not in repr(caught.value)
    assert caught.value.__context__ is None or "cafile" in settings


def test_a_proxy_from_the_environment_is_asked_but_not_for_loopback_addresses(monkeypatch):
    with playing(MODELS_REPLY) as (base_url, requests):
        monkeypatch.setenv("http_proxy", base_url[:-3])
        Client("http://model.invalid/v1").models()
    assert requests[0][0].startswith("GET http://model.invalid/v1/models")
    monkeypatch.setenv("http_proxy", "http://me:pa55word@127.0.0.1:1")
    assert asked(GOOD) == "Hi there"
    with pytest.raises(ConnectionFailed, match="through the proxy 127.0.0.1:1") as caught:
        Client("http://model.invalid/v1", max_retries=0).models()
    assert "pa55word" not in str(caught.value)


def test_a_header_is_added_replaced_and_taken_away_but_not_one_that_cannot_be_sent():
    with playing(MODELS_REPLY) as (base_url, requests):
        asking = Client(base_url, "sk-1")
        asking.add_header("api-key", "azure"), asking.add_header("user-agent", "mine")
        asking.add_header("authorization", "")
        asking.models()
    headers = requests[0][1]
    assert (headers["api-key"], headers["user-agent"]) == ("azure", "mine")
    assert "authorization" not in headers
    for name, value in (("a b", "x"), ("", "x"), ("a", "x\ny"), ("a", "\u00fc")):
        with pytest.raises(ClientError):
            asking.add_header(name, value)


def test_a_refusal_that_comes_before_the_body_is_sent_is_read():
    answer = refusal_reply("413 Too Large", code="too_large")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def refuse():
            connection = listener.accept()[0]
            with connection:
                connection.recv(1000)
                connection.sendall(answer)
        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(client.APIError) as caught:
            base_url = "http://127.0.0.1:%d" % listener.getsockname()[1]
            Client(base_url, max_retries=0, timeout=20).chat_completions("x" * 20_000_000, "m")
        thread.join()
    assert (caught.value.status, caught.value.code) == (413, "too_large")


def test_the_limits_of_connecting_and_of_silence_are_two(monkeypatch):
    made, create = [], socket.create_connection

    def connect(address, timeout=None, *more, **fields):
        made.append((timeout, create(address, timeout, *more, **fields)))
        return made[-1][1]
    with playing(then_held(STREAM_HEAD)) as (base_url, _):
        monkeypatch.setattr(socket, "create_connection", connect)
        stream = Client(base_url, timeout=77).chat_completions("Hi", "m", stream=True)
        assert (made[0][0], made[0][1].gettimeout()) == (10, 77)
        stream.close()


def test_a_server_that_accepts_and_says_nothing_is_a_failed_connection():
    error, _ = refused_by(then_held(b""), timeout=0.1, max_retries=0)
    assert type(error) is ConnectionFailed and "no response in time" in str(error)


def test_the_body_of_an_error_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(client, "_ERROR_BODY", 0.1)
    stalled = reply(b"half of it", "400 No").replace(b"Length: ", b"Length: 9")
    error, _ = refused_by(then_held(stalled), timeout=600)
    assert (error.status, error.message) == (400, "half of it")


# ---------------------------------------------------------------------------
# What it makes of the answers.

BODY_IN_SIZES = ROLE_EVENT + event({"content": "\u65e5"}) + STOP + DONE
BLANKS = b" \r\n", b"\xef\xbb\xbf", b"\n\n\xef\xbb\xbf"  # and byte order marks


@pytest.mark.parametrize("answer, text", rows({
    "a stream": (GOOD, "Hi there"),
    **{f"in sizes of {size}": (streamed(*(BODY_IN_SIZES[i:i + size] for i in range(
        0, len(BODY_IN_SIZES), size))), "\u65e5") for size in (1, 7, 100)},
    "up to the connection's end": (b"HTTP/1.0 200 OK\r\n\r\n" + HI_EVENT + THERE + STOP, "Hi there"),
    "nothing is waited for after [DONE]": (then_held(GOOD[:-len(b"0\r\n\r\n")]), "Hi there"),
    "a whole completion": (reply(WHOLE), "Hi there"),
    **{f"{blank} before it": (reply(blank + json.dumps(WHOLE).encode()), "Hi there") for blank in BLANKS},
    "an invalid byte": (reply(json.dumps(WHOLE).encode().replace(b"Hi", b"H\xff")), "H\ufffd there")}))
def test_a_stream_is_an_iterator_of_chunks_however_it_comes(answer, text):
    assert asked(answer) == text


@pytest.mark.parametrize("answer", [GOOD, *(
    reply(blank + more + HI_EVENT + THERE + STOP) for blank in BLANKS
    for more in (b"", b": c\n\n", b"event: x\n"))])
def test_a_stream_instead_of_a_whole_completion_is_folded(answer):
    assert said_by(completed(answer)[0]) == "Hi there"


PAGE = reply(b"<!DOCTYPE html><p>Welcome", content_type="text/html")


@both
@pytest.mark.parametrize("answer, error", [
    (PAGE, BadReply), (reply({"error": {"message": "no"}}), client.APIError),
    (b"HTTP/1.1 200 OK\r\n\r\n", ClientError), (reply(b"[]"), ClientError),
    (reply(b'{"choices"'), BadReply), (b"nonsense\r\n\r\n", ConnectionFailed),
    (b"", ConnectionFailed), (reply({}), BadReply), (reply({"id": "c"}), BadReply),
    (reply({"choices": None}), BadReply), (reply([WHOLE]), BadReply)])
def test_an_answer_that_is_none_is_a_named_error(answer, error, stream):
    with playing(answer) as (base_url, _), pytest.raises(error):
        list(Client(base_url, max_retries=0).chat_completions("Hi", "m", stream=stream))


@pytest.mark.parametrize("answer", [
    STREAM_HEAD + GOOD[len(STREAM_HEAD):-60],         # in the middle of a transfer chunk
    streamed(ROLE_EVENT, HI_EVENT, THERE)[:-len(b"0\r\n\r\n")],   # between two of them
    then_reset(streamed(ROLE_EVENT, HI_EVENT, THERE)[:-5]),
    reply(ROLE_EVENT + HI_EVENT + THERE + STOP).replace(b"\r\nContent-Length: ", b"\r\nContent-Length: 9")])
def test_a_connection_that_is_cut_in_mid_stream_is_a_truncation(answer):
    with pytest.raises(StreamTruncated) as caught:
        asked(answer)
    assert caught.value.text == "Hi there"


@pytest.mark.parametrize("answer", [
    STREAM_HEAD, then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))], ids=["cut", "silent"])
def test_a_stream_that_is_cut_before_its_first_byte_or_falls_silent_is_a_failed_connection(answer):
    with pytest.raises(ConnectionFailed):
        asked(answer, timeout=0.5)


def test_a_compressed_reply_is_named_and_a_compressed_error_keeps_its_status():
    for stream in (True, False):
        with playing(reply(b"\x1f\x8b\x08", content_encoding="gzip")) as (base_url, _):
            with pytest.raises(BadReply, match="gzip"):
                Client(base_url).chat_completions("Hi", "m", stream=stream)
    error, _ = refused_by(reply(b"\x1f\x8b\x08", "400 Bad", content_encoding="gzip"))
    assert (error.status, error.message) == (400, "Bad")


def test_every_response_is_closed_without_help_of_the_garbage_collector(monkeypatch):
    kept, made = [], http.client.HTTPResponse.__init__

    def init(response, *words, **fields):
        kept.append(response)       # so that no reference count closes it
        made(response, *words, **fields)
    monkeypatch.setattr(http.client.HTTPResponse, "__init__", init)
    bad = streamed(b"data: [1]\n\n", HI_EVENT)
    for answer in (reply(b"x" * (5 << 20), "400 No"), then_held(GOOD[:-5]), reply(WHOLE)[:-5], bad,
                   reply(b"x" * 99999, content_encoding="gzip"), streamed(HI_EVENT, THERE)[:-5]):
        for stream in (True, False):
            with playing(answer) as (base_url, _), contextlib.suppress(ClientError):
                asking = Client(base_url, max_retries=0, timeout=0.2)
                for _ in pieces(asking.chat_completions("Hi", "m", stream=stream)):
                    break
    assert len(kept) == 12 and all(response.isclosed() for response in kept)


@pytest.mark.parametrize("leave", [
    lambda stream: (next(stream), stream.close()), lambda stream: stream.close(),
    lambda stream: next(stream)], ids=["closed", "closed unread", "the loop was left"])
def test_closing_the_iterator_or_leaving_the_loop_closes_the_connection(leave):
    answer = then_held(GOOD[:-60])
    with playing(answer) as (base_url, _):
        leave(streaming(base_url))
        assert answer.left.wait(PATIENCE)


def test_a_certificate_that_nobody_signed_is_refused_without_a_retry(certificate, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tried again"))
    with playing(GOOD, tls=certificate[1]) as (base_url, requests):
        with pytest.raises(ConnectionFailed, match="certificate cannot be trusted"):
            Client(base_url).chat_completions("Hi", "m")
        monkeypatch.undo()
        done = run("models", base_url=base_url)
    assert requests == []
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"--cafile" in done.stderr


def test_a_cafile_or_the_variable_ssl_cert_file_says_whom_to_trust(certificate, monkeypatch):
    with playing(GOOD, MODELS_REPLY, tls=certificate[1]) as (base_url, _):
        assert "".join(pieces(streaming(base_url, cafile=certificate[0]))) == "Hi there"
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        assert Client(base_url).models() == ["first", "second"]


# ---------------------------------------------------------------------------
# Refusals and retries.

@pytest.mark.parametrize("body, message", [
    ({"error": {"message": "no"}}, "no"), ({"error": "no"}, "no"), ({"message": "no"}, "no"),
    ({"object": "error", "message": "no"}, "no"), (b"no", "no"),
    ({"detail": "no"}, '{"detail": "no"}'), (b"", "Bad"), (b"<html>x", "Bad"),
    (["no"], '["no"]'), ({}, "{}"), ({"error": None}, '{"error": null}')])
def test_an_error_has_a_message_whatever_the_body(body, message):
    error, _ = refused_by(reply(body, "400 Bad"))
    assert (error.status, error.message) == (400, message)


def test_an_error_has_all_that_the_server_told_also_after_pickling_but_no_control_characters():
    import pickle
    error, _ = refused_by(reply({"error": {"message": "no", "type": "t", "code": "c",
                                        "param": "p"}}, "400 Bad", x_request_id="req_1"))
    assert (error.type, error.code, error.param) == ("t", "c", "p")
    assert (error.request_id, error.headers["X-Request-Id"]) == ("req_1", "req_1")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.status, again.code) == (str(error), 400, "c") == ("400 c: no", 400, "c")
    error, _ = refused_by(refusal_reply("400 No", message="a\x1b[2J\x9b\u202eb", code="\x1bc"))
    assert (error.message, error.code) == ("a\\x1b[2J\\x9b\\u202eb", "\\x1bc")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_but_named_and_an_error_is_raised_by_the_call(status):
    error, requests = refused_by(reply(b"", "%d Moved" % status, location="http://evil/"))
    assert requests == 1 and "http://evil/" in error.message
    with playing(refusal_reply(f"{status + 100} No")) as (base_url, _), pytest.raises(client.APIError):
        Client(base_url, max_retries=0).chat_completions("Hi", "m", stream=True)


SECRET = "sk-ab/cd+SECRET"
SPELT = {"as it is": SECRET, "JSON": SECRET.replace("/", "\\/"), "URL": "sk-ab%2Fcd%2bSECRET",
         "escapes": "".join("\\u%04x" % ord(c) for c in SECRET), "lower case": SECRET.lower()}


@pytest.mark.parametrize("key", SPELT.values(), ids=SPELT)
@pytest.mark.parametrize("place", [
    lambda key: reply(b'{"error": {"message": "bad %b", "code": "%b", "type": "%b", "param": "%b"}}'
                      % ((key,) * 4), "401 No", x_request_id=key.decode()),
    lambda key: reply(b'{"error": "bad %b"}' % key), lambda key: reply(b'{"detail": "%b"}' % key, "400 No"),
    lambda key: reply(b"x" * 190 + key, "400 No"), lambda key: reply(b"", "400 " + key.decode()),
    lambda key: reply(b"", "302 No", location="http://h/" + key.decode()),
    lambda key: reply(b"<html>", content_type="text/" + key.decode()),
    lambda key: key + b"\r\n\r\n", lambda key: b"HTTP/1.1 2x0 " + key + b"\r\n\r\n",
    lambda key: streamed(HI_EVENT, b'data: {"error": {"message": "bad %b"}}\n\n' % key),
    lambda key: streamed(HI_EVENT, b"event: error\ndata: bad " + key + b"\n\n"),
    lambda key: streamed(HI_EVENT, b"data: " + key + b"\n\n"),
    lambda key: reply(b"", content_encoding=key.decode())])
def test_the_key_is_nowhere_in_an_error_whatever_the_server_repeats(place, key):
    with playing(place(key.encode())) as (base_url, _), pytest.raises(ClientError) as caught:
        list(Client(base_url, SECRET, max_retries=0).chat_completions("Hi", "m", stream=True))
    error, shown = caught.value, ""
    while error:
        headers = getattr(error, "headers", {}).items()
        shown += repr((str(error), error.args, vars(error), list(headers)))
        error = error.__cause__ or error.__context__
    for spelling in SPELT.values():
        assert spelling not in shown and spelling[3:] not in shown


def test_other_headers_and_the_query_are_secrets_and_messages_leave_it_out():
    answer = refusal_reply("401 No", message="azure-key dXNlcjpwYXNz q-secret 2024-02-01 bad")
    with playing(answer) as (base_url, _), pytest.raises(client.APIError) as caught:
        asking = Client(base_url + "?sig=q-secret&api-version=2024-02-01")
        asking.add_header("api-key", "azure-key"), asking.add_header("X-Auth", "Basic dXNlcjpwYXNz")
        asking.models()
    assert caught.value.message == "*** *** *** 2024-02-01 bad"
    with pytest.raises(ConnectionFailed) as caught:
        Client("http://127.0.0.1:1/v1?a=b&c=+", max_retries=0).models()
    assert "http://127.0.0.1:1/v1:" in str(caught.value) and "a=b" not in str(caught.value)


@pytest.mark.parametrize("status, headers, requests", [
    (400, {}, 1), (401, {}, 1), (404, {}, 1), (408, {}, 3), (409, {}, 3), (429, {}, 3),
    (500, {}, 3), (503, {}, 3), (400, {"x_should_retry": "true"}, 3),
    (500, {"x_should_retry": "false"}, 1), (429, {"retry_after": "121"}, 1),
    (429, {"retry_after": "1e999"}, 1), (500, {"x_should_retry": "true",
                                              "retry_after_ms": "200000"}, 1)])
def test_what_may_pass_is_tried_three_times_but_a_used_up_quota_once(status, headers, requests):
    headers = {"retry_after_ms": "1", **headers}
    if "retry_after" in headers:
        del headers["retry_after_ms"]
    answer = reply({"error": {"message": "no"}}, "%d No" % status, **headers)
    assert refused_by(answer)[1] == requests
    quota = reply({"error": {"message": "no", "code": "insufficient_quota"}}, "%d No" % status, **headers)
    assert refused_by(quota)[1] == 1


def test_a_retry_that_succeeds_is_all_that_is_seen():
    again = reply({"error": {"message": "no"}}, "429 No", retry_after_ms="1")
    with playing(again, then_reset(b""), GOOD) as (base_url, requests):
        assert "".join(pieces(streaming(base_url))) == "Hi there" and len(requests) == 3


def test_a_stream_that_has_begun_is_not_tried_again_but_a_whole_reply_that_was_cut_is():
    with playing(then_reset(streamed(HI_EVENT)[:-5])) as (base_url, requests):
        with pytest.raises(StreamTruncated):
            list(streaming(base_url))
    assert len(requests) == 1
    assert len(completed(reply(WHOLE)[:-5], reply(WHOLE))[1]) == 2


def wait_after(monkeypatch, retries=1, **headers):
    """The seconds that a client waits before its last retry, instead of which it goes on."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    refused_by(reply({"error": "no"}, "429 No", **headers), max_retries=retries)
    return waits[-1]


@pytest.mark.parametrize("headers, seconds", [
    ({"retry_after": "7"}, 7), ({"retry_after": "0.5"}, 0.5), ({"retry_after": "120"}, 120),
    ({"retry_after_ms": "20"}, 0.02), ({"retry_after_ms": "20", "retry_after": "7"}, 0.02),
    ({"retry_after_ms": "soon", "retry_after": "7"}, 7)])
def test_the_server_says_how_long_or_until_when_to_wait(headers, seconds, monkeypatch):
    assert wait_after(monkeypatch, **headers) == seconds
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    assert 0 < wait_after(monkeypatch, retry_after=date) <= 90


@pytest.mark.parametrize("value", ["0", "-5", "nan", "soon", "", "Thu, 01 Jan 1970 00:00:00 GMT",
                                   "Fri, 31 Dec 10000 23:59:59 GMT", " "])
@pytest.mark.parametrize("retries, most", [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (10, 8)])
def test_else_the_wait_doubles_up_to_eight_seconds(retries, most, value, monkeypatch):
    assert 0.75 * most <= wait_after(monkeypatch, retries, retry_after=value) <= most


# ---------------------------------------------------------------------------
# The command line, in processes of its own.

def run(*words, base_url=None, stdin=b"", **more):
    """A finished process: its returncode, and what it wrote as bytes."""
    return finished(sys.executable, CLIENT, *words, input=stdin, encoding=None,
                    env=environment(base_url, **more))


def ran(answer, *words, **how):
    """A finished process whose server played `answer`, and the body of its request."""
    done, requests = ran_on(answer, words=(*words, "--model", "m"), **how)
    return done, json.loads(requests[-1][2] or b"null") if requests else None


def ran_on(*answers, words, **how):
    """A finished process whose server played these answers, and all the requests."""
    with playing(*answers) as (base_url, requests):
        return run(*words, base_url=base_url, **how), requests


@contextlib.contextmanager
def started(*words, base_url, **options):
    """A process that runs: the client with these words."""
    options = {"stdout": subprocess.PIPE, "env": environment(base_url), **options}
    with subprocess.Popen([sys.executable, CLIENT, *words, "--model", "m"], **options) as process:
        try:
            yield process
        finally:
            process.kill()


def shell(script, base_url):
    """As `finished`, of a script for sh in which $client stands for the command."""
    return finished("sh", "-c", script, encoding=None, env=environment(
        base_url, client=shlex.join((sys.executable, CLIENT))))


def test_without_a_command_it_prints_its_help():
    done = run()
    assert done.returncode == 0 and b"usage" in done.stdout


@pytest.mark.parametrize("words, seen", [
    (["chat", "Hi"], b"Hi"), (["chat", "Hi", "--raw"], HI_EVENT)], ids=["text", "raw"])
def test_chat_prints_the_answer_as_it_comes(words, seen):
    with playing(then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))) as (base_url, _):
        with started(*words, base_url=base_url) as process:
            assert process.stdout.read(len(seen)) == seen


@pytest.mark.parametrize("words, stdin, prompt", [
    (["Hi"], b"no", "Hi"), ([], b"Hi\n", "Hi"), (["-"], b"Hi", "Hi"), (["--prompt", "Hi"], b"", "Hi"),
    (["--prompt", "-"], b"Hi\r\n", "Hi"), ([], b"\xef\xbb\xbfHi", "Hi"),
    (["Write", "a", "message"], b"", "Write a message"), (["Sum up:", "-"], b"fed\n", "Sum up:\n\nfed"),
    (["-", "In", "short?"], b"fed\n", "fed\n\nIn short?"), (["a", "-", "b"], b"fed\n", "a\n\nfed\n\nb"),
    (["a", "--prompt", "b"], b"", "a b")])
def test_the_prompt_is_the_words_among_which_a_dash_is_standard_input(words, stdin, prompt):
    done, request = ran(GOOD, "chat", *words, stdin=stdin)
    assert (done.returncode, done.stdout.split()) == (0, [b"Hi", b"there"])
    assert request["messages"] == user(prompt)


def test_settings_come_from_the_option_the_file_the_environment_in_this_order(tmp_path):
    path = tmp_path / "config.ini"
    words = ["chat", "Hi", "--config", str(path), "--model", "option"]
    with playing(GOOD) as (base_url, requests):
        path.write_bytes(b"\xef\xbb\xbf[OpenAI]\r\nMODEL = file\r\n")       # as Notepad saves it
        for count in (6, 4, 2):
            run(*words[:count], base_url=base_url, OPENAI_MODEL="environment")
        path.write_text(f"[OpenAI]\nAPI_SECRET_KEY = sk-%%1\nMODEL = mine\nBASE_URL = {base_url}\n")
        run(*words[:4])
    assert [json.loads(body)["model"] for _, _, body in requests] == [
        "option", "file", "environment", "mine"]
    assert requests[-1][1]["authorization"] == "Bearer sk-%%1"


def test_the_options_reach_the_request(tmp_path):
    (tmp_path / "tools.json").write_text('[{"type": "function"}]')
    _, requests = ran_on(GOOD, words=[
        "--temperature", "0", "chat", "--model", "m", "-H", "api-key: azure", "-H", "X-A:b", "--system", "Be.", "Hi",
        "--stop", "a", "--stop", "b", "--max-tokens", "5", "-p", "user=me", "-p", "seed=1", "-p",
        f"tools=@{tmp_path / 'tools.json'}", "-p", 'stream_options={"include_usage": true}', "-p",
        "top_p=NaN"])
    assert (requests[0][1]["api-key"], requests[0][1]["x-a"]) == ("azure", "b")
    assert json.loads(requests[0][2]) == {
        "model": "m", "stream": True, "temperature": 0.0, "max_tokens": 5, "stop": ["a", "b"],
        "user": "me", "seed": 1, "tools": [{"type": "function"}], "top_p": "NaN",
        "stream_options": {"include_usage": True}, "messages": [
            {"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]}


def test_complete_prints_the_text():
    answer = reply({"choices": [{"text": " upon a time", "finish_reason": "stop"}]})
    done, request = ran(answer, "complete", "Once", "--no-stream")
    assert (done.stdout.split(), request["prompt"], request["stream"]) == (
        [b"upon", b"a", b"time"], "Once", False)


@both
def test_json_prints_one_document(stream):
    done, _ = ran(GOOD if stream else reply(WHOLE), "chat", "Hi", "--json", *["--no-stream"][stream:])
    assert said_by(json.loads(done.stdout)) == "Hi there"


def test_raw_prints_the_event_lines_as_they_came_and_nothing_of_the_list_of_models():
    body = b": c\r\n\r\n" + HI_EVENT + b"retry: 1\n\n" + STOP + DONE
    raw = ["chat", "Hi", "--raw"]
    assert ran_on(MODELS_REPLY, streamed(body[:9], body[9:]), words=raw)[0].stdout == body
    done, _ = ran_on(reply(WHOLE)[:-5], reply(WHOLE), words=[*raw, "--model", "m", "--no-stream"])
    assert json.loads(done.stdout) == WHOLE and b"trying again" in done.stderr     # once, not twice
    assert ran(MODELS_REPLY, "models")[0].stdout.split() == [b"first", b"second"]


def test_a_reply_that_is_not_streamed_is_not_asked_to_count_its_stream():
    done, request = ran(reply(WHOLE), "chat", "Hi", "--json", "-p", "stream=false")
    assert done.returncode == 0 and "stream_options" not in request and request["stream"] is False


SLOW = reply({"error": {"message": "slow down", "code": "slow"}}, "429 No", retry_after_ms="1")


@pytest.mark.parametrize("answers, told", [
    ([streamed(HI_EVENT, event({}, "length"), DONE)], b"the reply was cut short (finish_reason length)"),
    ([streamed(HI_EVENT, event({}, "content_filter"), DONE)],
     b"the reply was cut short (finish_reason content_filter)"),
    ([streamed(HI_EVENT, STOP, DONE)], b""), ([streamed(HI_EVENT, event({}, "tool_calls"), DONE)], b""),
    ([streamed(HI_EVENT, event({"content": "no"}, None, 1), STOP, DONE)],
     b"the first of 2 choices is shown; --json prints them all"),
    ([SLOW, streamed(HI_EVENT, STOP, DONE)], b"429 slow: slow down (trying again in 0.0 s)")])
def test_what_the_text_does_not_show_is_one_line_on_standard_error(answers, told):
    done, _ = ran_on(*answers, words=["chat", "Hi", "--model", "m"])
    assert (done.returncode, done.stdout.strip()) == (0, b"Hi")
    assert done.stderr == (b"client.py: %b\n" % told if told else b"")


def test_refusals_and_tool_calls_are_shown():
    deltas = [{"refusal": "I won't."}, call_delta("", index=0, id="1", name="f"),
              call_delta('{"a":1}', index=0)]
    done, _ = ran(streamed(*map(event, deltas), event({}, "tool_calls"), DONE), "chat", "Hi")
    refusal_reply, shown = done.stdout.decode().splitlines()
    assert refusal_reply == "I won't." and json.loads(shown) == F


@pytest.mark.skipif(not shutil.which("curl") or os.name == "nt", reason="needs curl and sh")
def test_curl_prints_a_command_that_asks_the_same():
    words = ["chat", "it's \"\u00fc\" $HOME `x` \\", "--model", "m'", "-p", 'user="\\ud83d"']
    with playing(GOOD) as (base_url, requests):
        key = {"OPENAI_API_KEY": "sk-1", "PYTHONUTF8": "1"}
        run(*words, base_url=base_url, **key)
        command = run(*words, "--curl", base_url=base_url, **key).stdout
        subprocess.run(["sh", "-c", command], env=environment(**key), stdout=subprocess.DEVNULL)
    (line, sent, body), (curl_line, curl_sent, curl_body) = requests
    assert b"sk-1" not in command and (line, json.loads(body)) == (curl_line, json.loads(curl_body))
    assert [sent[name] == curl_sent[name] for name in ("authorization", "content-type")]


def test_curl_has_the_headers_the_authorities_and_the_query(certificate):
    command = run("chat", "Hi", "--model", "m", "--curl", "--cafile", certificate[0], "-H",
                  "api-key: a'b", base_url="https://h/v1?api-version=1").stdout.decode()
    words = shlex.split(command.replace("\\\n", ""))
    assert words[words.index("--cacert") + 1] == certificate[0] and "Api-Key: a'b" in words
    assert "https://h/v1/chat/completions?api-version=1" in words
    done = run("models", "--curl", base_url="http://127.0.0.1:1/v1")      # without a key
    assert done.stdout.decode().split() == ["curl", "-sS", "-N", "http://127.0.0.1:1/v1/models"]


@pytest.mark.parametrize("words", [
    ["chat"], ["complete"], ["nonsense"], ["models", "--json", "--raw"], ["chat", "Hi", "-p", "x"],
    ["chat", "Hi", "-p", "x=@/no/such"], ["chat", "Hi", "--config", "/no/such"],
    ["chat", "Hi", "--base-url", "nowhere"], ["chat", "Hi", "--timeout", "0"],
    ["chat", "Hi", "--timeout", "nan"], ["chat", "Hi", "--temperature", "nan"],
    ["chat", "Hi", "--temperature", "1e999"], ["chat", "Hi", "--json", "--raw"],
    ["chat", "Hi", "-H", "no colon"], ["chat", "Hi", "-H", "colonless"], ["chat", "Hi", "--base-url", "http://me:pw@h/v1"],
    ["bench", "--requests", "0"], ["bench", "--concurrency", "1001"], ["bench", "--curl"],
    ["bench", "--raw"], ["chat", "-"], ["chat", "Hi", "-"]])
def test_what_makes_no_sense_is_status_2(words):
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, b"") and b"Traceback" not in done.stderr


DEEP = b'{"choices": [{"index": 0, "delta": {"audio": %b1%b}}]}' % (b'{"a":' * 900, b"}" * 900)


@pytest.mark.parametrize("answer, words", [
    (GOOD, ["chat", "Hi", "--timeout", "inf"]), (GOOD, ["chat", "Hi", "-p", "self=1"]),
    (reply({"error": "no"}, "429 No", retry_after="Fri, 31 Dec 10000 23:59:59 GMT"),
     ["chat", "Hi", "--retries", "0"]),
    (streamed(event({"tool_calls": [None, {"function": None}]}), STOP, DONE), ["chat", "Hi"]),
    (streamed(b"data: " + DEEP + b"\n\n", STOP, DONE), ["chat", "Hi", "--json"]),
    (streamed(b'data: {"choices": [{"delta": {"content": %b1%b}}]}\n\n' % (
        b'[{"type": "text", "text": ' * 450, b"}]" * 450), STOP, DONE), ["chat", "Hi"]),
    (reply(b"[" * 600 + b"]" * 600, "400 No"), ["chat", "Hi"]),
    (reply(b'{"choices": [], "x": %b1%b}' % (b'{"a":' * 600, b"}" * 600)), ["chat", "Hi", "--json"]),
    (reply({"data": 5}), ["models"])])
def test_nothing_that_a_server_says_or_a_user_types_is_a_traceback(answer, words):
    done, _ = ran(answer, *words)
    assert done.returncode in (0, 1) and done.stderr.count(b"\n") == done.returncode
    assert b"Traceback" not in done.stderr


@posix
@pytest.mark.parametrize("closed, words, status", [
    ("<&-", "chat", 2), ("<&-", "chat Hi", 0), (">&-", "chat Hi", 0), ("2>&-", "chat Hi", 0),
    ("2>&-", "chat Hi --json --raw", 2), (">&- 2>&- <&-", "chat", 2),
    *([(">/dev/full", "chat Hi", 1), (">/dev/full", "chat Hi --json", 1)]
      if os.path.exists("/dev/full") else ())])
def test_standard_streams_may_be_closed_or_full(closed, words, status):
    with playing(GOOD) as (base_url, _):
        done = shell(f"$client {words} --model m {closed}", base_url)
    assert done.returncode == status and done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize("base_url, proxy, told", [
    *(("http://model.invalid/v1", proxy, b"") for proxy in ("http:/x", "http://[", "nonsense")),
    ("http://127.0.0.1:1/v1", "", b"is the server running")])
def test_a_proxy_that_makes_no_sense_or_nobody_there_is_one_line(base_url, proxy, told):
    done = run("models", "--retries", "0", base_url=base_url, http_proxy=proxy)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and told in done.stderr


@pytest.mark.parametrize("answer, told", [
    (refusal_reply("401 No", code="invalid_api_key"), "401 invalid_api_key: no (--api-key or"),
    (refusal_reply("404 No", message="a\nb"), "404: a b (are --base-url and --model given and right?)"),
    (PAGE, "text/html"), (streamed(HI_EVENT), "before the reply was complete"),
    (streamed(HI_EVENT)[:-5], "cut"), (b"", "cannot reach")])
def test_a_refusal_is_status_1_and_one_line(answer, told):
    done, _ = ran(answer, "chat", "Hi", "--retries", "0")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"client.py: ") and told in done.stderr.decode()


def test_a_terminal_that_knows_no_utf8_gets_question_marks():
    answer = streamed(event({"content": "\u65e5\ud83d!"}), STOP, DONE)
    assert ran(answer, "chat", "Hi", PYTHONIOENCODING="ascii")[0].stdout.split() == [b"??!"]


@posix
def test_a_pipe_that_closes_is_no_error():
    with playing(streamed(*[HI_EVENT] * 20000, DONE)) as (base_url, _):
        done = shell("$client chat Hi --model m | head -c 5", base_url)
    assert (done.stdout, done.stderr) == (b"HiHiH", b"")


@posix
def test_ctrl_c_is_status_130_and_closes_the_connection():
    answer = then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))
    with playing(answer) as (base_url, _):
        with started("chat", "Hi", base_url=base_url, stderr=subprocess.PIPE) as process:
            process.stdout.read(2)
            process.send_signal(signal.SIGINT)
            assert process.communicate()[1] == b""
        assert process.returncode == 130 and answer.left.wait(PATIENCE)


# ---------------------------------------------------------------------------
# The conversation, on a pseudo-terminal, and the load generator.

@contextlib.contextmanager
def terminal(*words, base_url, stdout=None):
    """A client on a terminal of its own: (process, expect, type).

    `expect` reads up to a text, `type` writes.
    """
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    seen = [""]  # and not yet expected

    def expect(text):
        while text not in seen[0]:
            assert select.select([master], [], [], PATIENCE)[0], f"{seen[0]!r} instead of {text!r}"
            seen[0] += os.read(master, 4096).decode()
        before, _, seen[0] = seen[0].partition(text)
        return before

    with started(*words, base_url=base_url, stdin=slave, stdout=stdout or slave, stderr=slave,
                 start_new_session=True) as process:
        os.close(slave)
        try:
            yield process, expect, lambda text: os.write(master, text.encode())
        finally:
            process.kill()
            os.close(master)


CALL_REPLY = streamed(event(call_delta("{}", index=0, id="2", name="g")), event({}, "tool_calls"), DONE)


@pytest.mark.parametrize("answers, talk, model, messages", rows({
    "the history is kept": (
        [GOOD], [("one", "Hi there"), ("two", "Hi there")], "m", ["one", "Hi there", "two"]),
    "the commands are obeyed": (
        [GOOD], [("one", "Hi there"), ("/system Be brief.", "."), ("/model other", "er"), ("/reset", "set"),
                 ("/help", "Ctrl-D"), ("two", "there")], "other", ["Be brief.", "two"]),
    "a question may begin with a slash": (
        [GOOD], [("/etc/hosts, what is it?", "there"), (" /help is what?", "there")], "m",
        ["/etc/hosts, what is it?", "Hi there", "/help is what?"]),
    "a server that goes away is one line": (
        [streamed(HI_EVENT)[:-5], GOOD], [("one", "client.py: the connection was cut"),
                                          ("two", "Hi there")], "m", ["two"]),
    "tool calls are shown but not kept": (
        [CALL_REPLY, GOOD], [("one", '"name": "g"'), ("two", "Hi there")], "m", ["two"])}))
@pytest.mark.parametrize("end", ["\x04", "/quit\n"], ids=["ctrl-d", "quit"])
def test_a_conversation(answers, talk, model, messages, end):
    with playing(*answers) as (base_url, requests):
        with terminal("chat", base_url=base_url) as (process, expect, type):
            for line, told in talk:
                expect("> "), type(line + "\n"), expect(told)
            expect("> "), type(end)
            assert process.wait(PATIENCE) == 0
    last = json.loads(requests[-1][2])
    assert (last["model"], [each["content"] for each in last["messages"]]) == (model, messages)


def test_ctrl_c_stops_a_reply_but_not_the_conversation():
    answer = then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))
    with playing(answer, GOOD) as (base_url, requests):
        with terminal("chat", base_url=base_url) as (process, expect, type):
            expect("> "), type("one\n"), expect("Hi")
            process.send_signal(signal.SIGINT)
            assert answer.left.wait(PATIENCE)
            expect("> "), type("two\n"), expect("Hi there")
    assert [m["content"] for m in json.loads(requests[1][2])["messages"]] == ["one", "Hi", "two"]


def test_reasoning_is_dim_on_a_terminal_and_nowhere_else():
    deltas = [{"reasoning_content": "Hm"}, {"reasoning": "."}, {"content": THINKING}, {"content": "Hi"}]
    answer = streamed(*map(event, deltas), STOP, DONE)
    done, _ = ran(answer, "chat", "Hi")
    assert (done.stdout.strip(), done.stderr) == (b"Hi", b"")
    with playing(answer) as (base_url, _):
        with terminal("chat", "Hi", base_url=base_url) as (_, expect, type):
            assert expect("\r\nHi") == "\x1b[2mHm\x1b[0m\x1b[2m.\x1b[0m\x1b[2mHm.\x1b[0m"


def test_the_prompts_of_a_conversation_are_not_in_the_file_of_its_replies(tmp_path):
    with playing(GOOD) as (base_url, _), open(tmp_path / "said", "wb") as file:
        with terminal("chat", base_url=base_url, stdout=file) as (process, expect, type):
            type("one\n\x04"), expect("> ")
            assert process.wait(PATIENCE) == 0
    assert (tmp_path / "said").read_bytes() == b"Hi there\n"


@pytest.mark.parametrize("cpu, concurrency, limit", [
    (0.5, 8, False), (0.9, 8, True), (0.1, 1, False), (0.4, 1, True)])
def test_bench_says_when_the_client_was_the_limit(cpu, concurrency, limit):
    report = client._report([([0.1, 0.2], 0.2, None)], 1.0, cpu, concurrency)
    assert report["client_is_the_limit"] == limit


def test_bench_counts_requests_events_and_errors():
    done, _ = ran_on(MODELS_REPLY, GOOD, GOOD, refusal_reply("429 No", code="slow"), GOOD,
                     words=["bench", "--requests", "5", "--concurrency", "2", "--json"])
    report = json.loads(done.stdout)
    assert (report["requests"], report["completed"]) == (5, 4)
    assert report["errors"] == {"429 slow": 1}
    assert round(report["events_per_second"] * report["seconds"]) == 4 * 4
    assert 0 < report["first_event"]["median"] <= report["first_event"]["p99"]


def test_bench_measures_the_first_text_and_not_the_role():
    def answer(connection):
        connection.sendall(STREAM_HEAD + transfer_chunk(ROLE_EVENT))
        threading.Event().wait(0.2)
        connection.sendall(streamed(HI_EVENT, STOP, DONE)[len(STREAM_HEAD):])
    with playing(answer) as (base_url, _):
        report = client.bench(Client(base_url).chat_completions,
                              {"messages": "Hi", "model": "m", "stream": True}, 2, 1)
    assert report["first_text"]["median"] >= report["first_event"]["median"] + 0.1


def test_percentiles_are_values_of_the_nearest_rank():
    for count, ranks in ((1, (1, 1, 1)), (2, (1, 2, 2)), (100, (50, 95, 99)), (1000, (500, 950, 990))):
        assert tuple(client._spread(range(count, 0, -1)).values()) == ranks


@posix
def test_ctrl_c_ends_a_measurement_with_its_report():
    with playing(GOOD, GOOD, then_held(GOOD[:-60])) as (base_url, requests):
        with started("bench", "--concurrency", "1", "--json", base_url=base_url) as process:
            until(lambda: len(requests) == 3)
            process.send_signal(signal.SIGINT)
            report = json.loads(process.communicate()[0])
    assert (report["requests"], report["completed"], process.returncode) == (2, 2, 130)


def test_bench_starts_no_more_threads_than_requests(monkeypatch):
    started, start = [], threading.Thread.start
    with playing(GOOD) as (base_url, _):
        monkeypatch.setattr(threading.Thread, "start", lambda each: started.append(each) or start(each))
        client.bench(Client(base_url).chat_completions, {"messages": "Hi", "model": "m"}, 3, 1000)
    assert len(started) == 3


def test_the_progress_of_bench_stays_out_of_its_report_on_a_terminal():
    bench = "bench", "--requests", "2"
    with playing(GOOD) as (base_url, _):
        with terminal(*bench, "--json", base_url=base_url) as (_, expect, type):
            assert expect('"client_is_the_limit"').startswith("{\r\n")
        with terminal(*bench, base_url=base_url) as (_, expect, type):
            assert expect("requests  ").endswith("2 done, 0 failed\r\r\n")


def test_bench_prints_what_people_read_and_fails_when_nothing_succeeds():
    done, _ = ran_on(MODELS_REPLY, GOOD, words=["bench", "--requests", "3"])
    assert done.stdout.startswith(b"requests      3 of 3 completed") and done.stderr == b""
    assert run("bench", "--model", "m", base_url="http://127.0.0.1:1/v1").returncode == 1


def test_the_client_needs_no_package():
    code = "import sys; sys.path[:] = [p for p in sys.path if 'packages' not in p]; import client"
    assert finished(sys.executable, "-B", "-S", "-c", code, cwd=HERE).returncode == 0


# ---------------------------------------------------------------------------
# The client beside odd servers: errors that are slow, silent or hidden, and secrets.

@pytest.mark.parametrize("deltas, field, value", [
    ([{"audio": {"data": [1, 2]}}, {"audio": {"data": [3]}}], "audio", {"data": [1, 2, 3]}),
    ([{"content": [{"type": "text", "text": "a"}]}, {"content": "b"}], "content", "ab")])
def test_only_content_and_thinking_are_lists_of_parts(deltas, field, value):
    assert folded(*deltas)[field] == value


def test_choices_of_a_whole_reply_without_an_index_keep_their_places():
    with playing(reply({"choices": [{"message": {"content": text}} for text in "ab"]})) as (base_url, _):
        choices = fold(streaming(base_url))["choices"]
    assert [(each["index"], each["message"]["content"]) for each in choices] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("block, pause, seconds", [(b"x", 0.01, 0.1), (b"x" * 65536, 0, PATIENCE)])
def test_the_body_of_an_error_has_a_limit_of_time_and_of_bytes(block, pause, seconds, monkeypatch):
    def pour(connection):
        connection.sendall(b"HTTP/1.1 500 No\r\n\r\n")
        for pour.sent in range(1000):
            connection.sendall(block)
            threading.Event().wait(pause)
    monkeypatch.setattr(client, "_ERROR_BODY", seconds)
    assert refused_by(pour, max_retries=0)[0].status == 500 and pour.sent < 999


@both
@pytest.mark.parametrize("answer, error, told", [
    (reply(b"Service is warming up", content_type="text/plain"), BadReply, "is text/plain, not JSON"),
    (b"HTTP/1.1 502 \r\n\r\n<html>", client.APIError, "502: Bad Gateway"),
    (b"HTTP/1.1 400 No" + streamed(*[b"word"] * 300)[15:], client.APIError, "word" * 300),
    (b"nonsense\r\n\r\n", ConnectionFailed, "/v1: nonsense"),
    (reply({"error": {"message": "busy", "code": 429}}), client.APIError, "429: busy"),
    (reply({"error": {"message": "no", "code": 429}}, "400 No"), client.APIError, "400 429: no")])
def test_streamed_or_not_an_error_says_what_the_server_did(answer, error, told, stream):
    with playing(answer) as (base_url, _), pytest.raises(error) as caught:
        list(Client(base_url, max_retries=0).chat_completions("Hi", "m", stream=stream))
    assert told in str(caught.value) and "running" not in str(caught.value)


@pytest.mark.parametrize("said, status", [
    ('data: {"error": {"code": %s}}' % code, status) for code, status in
    (("429", 429), ('"429"', None), ("399", None), ("600", None))] + [
    (f"event: error\ndata: {said}", None) for said in ("{}", "null", "")])
def test_an_error_event_is_an_error_without_a_message_too_and_its_code_may_be_a_status(said, status):
    with pytest.raises(client.APIError) as caught:
        next(chunks_read(said.encode() + b"\n\n"))
    assert (caught.value.status, caught.value.retryable) == (status, status == 429)


@pytest.mark.parametrize("query, key, echoed, shown", [
    ("", "EMPTY", "EMPTY must not be empty", "*** must not be empty"),
    ("?key=abcd+efgh", "", "abcd+efgh abcd efgh", "*** ***"), ("?SECRETKEY", "", "SECRETKEY", "***"),
    ("?k=%ff%feabcdef", "", "%ff%feabcdef", "***"), ("?k=c2VjcmV0cw==", "", "c2VjcmV0cw==", "***")])
def test_a_secret_is_the_key_and_each_value_of_the_query_but_no_word_that_is_like_it(query, key, echoed, shown):
    with playing(refusal_reply("400 No", message=echoed)) as (base_url, _):
        with pytest.raises(client.APIError) as caught:
            Client(base_url + query, key).models()
    assert caught.value.message == shown


def test_the_wait_is_read_before_secrets_are_hidden_and_a_key_loses_its_line_end(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with playing(reply({"error": "no"}, "429 No", retry_after="90.00000"), MODELS_REPLY) as (base_url, _):
        asking = Client(base_url, "90.00000\n")
        assert asking.models() and waits == [90]
    with pytest.raises(ClientError, match="X:Y"):
        asking.add_header("X:Y", "v")
    too_deep = functools.reduce(lambda inner, _: [inner], range(100_000), 5)
    with pytest.raises(ValueError):
        asking.chat_completions("Hi", "m", x=too_deep)


def test_a_cut_stream_that_was_not_asked_for_is_asked_again_and_silence_keeps_the_text():
    assert len(completed(streamed(HI_EVENT), reply(WHOLE))[1]) == 2
    assert type(refused_by(streamed(HI_EVENT), max_retries=0)[0]) is ConnectionFailed
    with playing(then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))) as (base_url, _):
        with pytest.raises(ConnectionFailed) as caught:
            list(streaming(base_url, timeout=0.2))
    assert caught.value.text == "Hi"


def test_messages_escape_what_moves_the_cursor_and_show_keeps_no_chunk_that_is_shown():
    plain = "a\xa0b\u3000c\U0001f469\u200d\U0001f680"
    assert str(ClientError(plain + "\x9b\u2066\ud83d")) == plain + "\\x9b\\u2066\\ud83d"
    kept, delta = [], {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []}
    list(client._shown([one(delta)] * 5 + [one({"reasoning": "x"})] * 5 + [one({}, "stop")], kept))
    assert len(kept) == 1


def test_a_stream_that_is_cut_in_its_reasoning_leaves_no_line_open():
    with playing(streamed(event({"reasoning": "Hm"}))) as (base_url, _):
        with terminal("chat", "Hi", base_url=base_url) as (_, expect, type):
            assert expect("client.py: ").endswith("Hm\x1b[0m\r\n")


def test_the_users_content_type_is_sent_no_model_is_no_line_and_a_tab_ends_a_command():
    words = ["chat", "Hi", "--model", "m", "-H", "content-type: application/x"]
    assert ran_on(GOOD, words=words)[1][0][1]["content-type"] == "application/x"
    command = run(*words, "--curl", base_url="http://h/v1").stdout
    assert b"'Content-Type: application/x'" in command and b"application/json" not in command
    assert ran_on(reply({"data": []}), words=["models"])[0].stdout == b""
    talk = client.Conversation(None, {"messages": []})
    talk.obey("/system\tBe brief ")
    assert talk.system == [{"role": "system", "content": "Be brief"}]


# ==================================================================================
# PROGRAMS, RELAY AND REPLAY, THE COMMAND LINE, TLS, NGINX

# ----------------------------------------------------------------------------------
# Programs.

PRINT = "sys.stdout.buffer.write(os.fsencode(sys.argv[1]))"
READ = "request = json.load(sys.stdin); print(json.dumps(request))"


def test_what_a_program_says_is_sent_before_it_has_finished(gate):
    speaker = gate.program("out('one'); gate(); out('two')")
    with Server(command(speaker)) as server, asking(server, stream=True) as client:
        first = read_past(client, b'"one"')
        gate.arrival().close()
        assert b"two" not in first and b'"two"' in read_past(client, b"[DONE]")


@pytest.mark.parametrize("text", ["Hi", "", "two words", "it's \"quoted\" $HOME `ls` \\ %PATH%",
                                  "{prompt}", "line\nline", "naïve 世界 🎈", "-n"])
def test_the_prompt_reaches_a_program_as_it_is(text):
    with Server(command(program(PRINT, "<{prompt}>"))) as server:
        assert chat(server, text).text == "<%s>" % text


@posix
def test_a_line_of_words_is_split_as_a_shell_would_split_it():
    line = '"%s" -c "import sys; print(sys.argv[1:])" {prompt} "a b"' % sys.executable
    with Server(command(line)) as server:
        assert chat(server, "c d").text == "['c d', 'a b']\n"


@pytest.mark.parametrize("text", ["Hé", "\ud800"])
def test_standard_input_has_the_request_as_one_json_document(text):
    with Server(command(program(READ))) as server:
        seen = json.loads(chat(server, text, temperature=0.5, top_k=3).text)
    assert seen["messages"] == user(text) and seen["text"] == text
    assert (seen["endpoint"], seen["index"], seen["temperature"]) == ("chat", 0, 0.5)


def test_each_prompt_of_a_completion_has_a_program_of_its_own():
    got = ask(command(program(PRINT, "{prompt}!")), TEXT_PATH, prompt=["a", "b"], n=2).json
    assert [choice["text"] for choice in got["choices"]] == ["a!", "a!", "b!", "b!"]


@pytest.mark.parametrize("text", ["é", "世", "🎈", "né世🎈!"])
def test_no_character_is_split(gate, text):
    speaker = gate.program("for byte in %r: out(bytes([byte])); gate()" % text.encode())
    with Server(command(speaker)) as server, asking(server, stream=True) as client:
        for _ in text.encode():
            gate.arrival().close()
        assert "".join(said_in(read_to_end(client))) == text


FAILING = {  # what a program does, what the message says, and what not
    "in silence":         ("sys.exit('loading\\nout of memory')", "out of memory", "loading"),
    "within a character": (r"os.write(1, b'ok\xf0\x9f'); sys.exit('died')", "died", "ok"),
    "by a signal":        ("os.kill(os.getpid(), 9)", "", "Traceback"),
}


@posix
@both
@pytest.mark.parametrize("code, told, untold", rows(FAILING))
def test_a_program_that_fails_is_an_error(code, told, untold, stream):
    with Server(command(program(code))) as server:
        got = chat(server, stream=stream)
    assert got.status == (200 if stream and "write" in code else 500)
    assert told in got.error["message"] and untold not in got.error["message"]


def test_a_program_that_fails_later_ends_its_stream_with_an_error_event(gate):
    fails = gate.program("out('so far'); gate(); sys.exit('out of memory')")
    with Server(command(fails)) as server, asking(server, stream=True) as client:
        gate.arrival().close()
        got = got_on(client)
    assert said_in(got.body) == ["so far"] and "out of memory" in got.error["message"]


@pytest.mark.parametrize("name", ["no-such-program", "./no/such/program", SERVER + "x", "Makefile"])
def test_a_program_that_is_missing_is_refused_at_the_start(name):
    with pytest.raises(ValueError, match=re.escape(name)):
        command([name, "{prompt}"])


@both
@pytest.mark.parametrize("remains", [True, False], ids=["garbage", "vanished"])
def test_a_program_that_cannot_be_run_is_named_in_a_500(tmp_path, remains, stream):
    path = tmp_path / "garbage"
    path.write_bytes(b"neither a script nor a binary\n")
    path.chmod(0o755)
    backend = command([str(path), "{prompt}"])
    if not remains:
        path.unlink()
    with failing_at_its_end(backend, APIError, "garbage") as server:
        for _ in range(2):      # the first has given its place back
            got = chat(server, stream=stream)
            assert got.status == 500 and str(path) in got.error["message"]


def test_the_end_of_a_long_complaint_is_told(gate):
    fails = program("sys.stderr.write('x' * 2**20 + '\\nthe last line\\n'); sys.exit(1)")
    with Server(command(fails)) as server:
        got = chat(server)
    assert got.status == 500 and got.error["message"].endswith("the last line")


def test_half_a_character_at_the_end_of_a_program_is_replaced():
    with Server(command(program("sys.stdout.buffer.write('a\u4e16'.encode()[:-1])"))) as server:
        assert chat(server).text == "a\ufffd" and chat(server, stream=True).text == "a\ufffd"


def test_the_pipe_of_a_program_is_closed_by_the_server_itself(monkeypatch):
    kept, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen",
                        lambda *words, **options: kept.append(popen(*words, **options)) or kept[-1])
    with Server(command(program("print('a' * 10**6)"))) as server:
        chat(server), chat(server, max_tokens=1, stream=True)
        leave(server, CHAT_PATH, {**HI, "stream": True}, after=1)
        until(lambda: len(kept) == 3 and all(
            each.stdout.closed and each.returncode is not None for each in kept))


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "a\udc80b", "long " * 2 ** 20],
                         ids=["NUL", "surrogate", "low surrogate", "too long"])
def test_a_prompt_that_cannot_be_an_argument_is_a_400(text):
    with Server(command(program(PRINT, "{prompt}"))) as server:
        assert chat(server, text).status == 400 and chat(server, "short").text == "short"


LEFT = {    # what a program does, and how many processes of it come to the gate
    "silent":           ("gate()", 1),
    "speaking":         ("out('word'); gate()", 1),
    "with a child":     ("child('gate()'); gate()", 2),
    "stubborn":         ("signal.signal(signal.SIGTERM, signal.SIG_IGN); gate()", 1),
    "survived by a child": ("child('gate()')", 1),
    "without output":   ("out('word'); os.close(1); gate()", 1),
}


@posix
@both
@pytest.mark.parametrize("code, processes", rows(LEFT))
def test_the_client_leaving_ends_a_program_and_its_children(gate, code, processes, stream):
    with Server(command(gate.program(code))) as server:
        with asking(server, stream=stream):
            doors = [gate.arrival() for _ in range(processes)]
        assert all(map(ended, doors)) and outcome(server) == "client left"


@posix
def test_the_server_closing_ends_the_programs(gate):
    with Server(command(gate.program("gate()"))) as server, asking(server):
        door = gate.arrival()
        server.close()
        assert ended(door)


def test_a_stop_ends_the_program(gate):
    speaker = gate.program("door = knock(); out('one. two'); door.recv(1)")
    with Server(command(speaker)) as server, asking(server, stop="."):
        assert ended(gate.arrival())


ALONE = """
os.close(os.open(%r, os.O_CREAT | os.O_EXCL))
os.unlink(%r)
print(end="alone")
"""


def test_programs_never_overlap_where_one_runs_at_once(tmp_path):
    lock = str(tmp_path / "lock")
    with Server(command(program(ALONE % (lock, lock)), at_once=1)) as server:
        said = together(6, lambda: chat(server, stream=True).text)
    assert said == ["alone"] * 6


def test_as_many_programs_as_may_run_at_once_do(gate):
    with Server(command(gate.program("gate()"), at_once=2)) as server:
        with asking(server), asking(server), gate.arrival(), gate.arrival():
            pass


@both
@pytest.mark.parametrize("path, fields", [(CHAT_PATH, {"n": 3}), (TEXT_PATH, {"prompt": ["a"] * 3}),
                                          (TEXT_PATH, {"prompt": "a", "n": 3})])
def test_several_choices_do_not_wait_for_each_other(path, fields, stream):
    got = ask(command(program("print(end='so')"), at_once=1), path, stream=stream, **fields)
    assert got.status == 200 and got.body.count(b'"so"') == 3


def test_a_waiting_client_that_leaves_frees_its_turn(gate):
    with Server(command(gate.program("gate(); out('done')"), at_once=1)) as server:
        with asking(server) as first:
            door = gate.arrival()
            with asking(server):
                until(lambda: len(server.journal) == 2)
            assert outcome(server, 1) == "client left"
            door.close()
            assert got_on(first).text == "done"
        with asking(server) as last:
            gate.arrival().close()
            assert got_on(last).text == "done"


@pytest.mark.parametrize("code, text", [
    ("print(end='ok')", "word " * 2 ** 18), ("sys.stderr.write('x' * 2**20); print(end='ok')", "Hi")],
    ids=["need not read its input", "may complain at length"])
def test_a_program(code, text):
    with Server(command(program(code))) as server:
        assert chat(server, text).text == "ok"


FOR_EVER = """
door = knock()
while True:
    out(b"x" * 2**20)
    door.sendall(b".")
"""


def test_a_program_is_held_up_by_a_client_that_does_not_read(gate):
    with Server(command(gate.program(FOR_EVER))) as server, asking(server, stream=True):
        door, taken = gate.arrival(), 0
        door.settimeout(0.3)                    # it has fallen silent
        with contextlib.suppress(socket.timeout):
            while taken < 64:
                taken += len(door.recv(1))
        assert taken < 64, "that many MiB are kept somewhere"


# ----------------------------------------------------------------------------------
# Relay.

ABOVE = (b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"H\xc3\xa9"}}]}\n\n',
         b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" \xe4\xb8\x96"}}]'
         b',"obfuscation":"x9"}\n\n',
         b"data: [DONE]\n\n")
JSON_TYPE = {"content_type": "application/json"}
EXCHANGES = {   # the bytes of an upstream, and the status and the body that are in them
    "whole":    (reply(b'{\n  "id": "chatcmpl-1",\n  "choices": [] }\n', **JSON_TYPE), 200,
                 b'{\n  "id": "chatcmpl-1",\n  "choices": [] }\n'),
    "streamed": (streamed(*ABOVE), 200, b"".join(ABOVE)),
    "split":    (streamed(*(bytes([byte]) for byte in b"".join(ABOVE))), 200, b"".join(ABOVE)),
    "refused":  (reply(b'{"error": {"code": "model_not_found"}}\n', "404 Not Found", **JSON_TYPE),
                 404, b'{"error": {"code": "model_not_found"}}\n'),
    "no UTF-8": (reply(b"\xff\xfe\x00", content_type="text/html"), 200, b"\xff\xfe\x00"),
    "empty":    (reply(b"", **JSON_TYPE), 200, b""),
    "to the close": (b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(ABOVE), 200, b"".join(ABOVE)),
}


def relayed(server, upstream, sent, **fields):
    """The reply of a relay whose upstream sends these bytes and closes."""
    with asking(server, **fields) as client:
        connection, _ = upstream.accept()
        with connection:
            connection.sendall(sent)
        return got_on(client)


@pytest.mark.parametrize("sent, status, body", rows(EXCHANGES))
def test_a_reply_of_an_upstream_and_its_recording_are_as_it_was(upstream, tmp_path, sent, status,
                                                                body):
    tape = str(tmp_path / "tape")
    with Server(Relay(upstream.url, record=tape)) as server:
        first = relayed(server, upstream, sent)
        assert sent != streamed(*ABOVE) or server.journal[0].events == 3
        assert server.journal[0].outcome == ("error" if status == 404 else "complete")
    with Server(Replay(tape)) as server:
        again = chat(server)
    assert [(got.status, got.body) for got in (first, again)] == [(status, body)] * 2
    assert first.headers.get("content-type") == again.headers.get("content-type")


RETURNED = {"content-type": "text/x-odd; a=b", "x-request-id": "req_upstream",
            "retry-after": "7", "retry-after-ms": "70", "x-should-retry": "false",
            "x-ratelimit-limit-requests": "60", "x-ratelimit-reset-tokens": "6m0s",
            "openai-model": "m-1", "openai-processing-ms": "17",
            "openai-version": "2020-10-01", "openai-organization": "org-1"}
KEPT_BACK = dict.fromkeys(["set-cookie", "server", "access-control-allow-origin", "x-other"], "no")


def test_the_headers_that_clients_read_come_back_and_no_others(upstream):
    head = "".join(f"{name}: {value}\r\n" for name, value in {**RETURNED, **KEPT_BACK}.items())
    with Server(Relay(upstream.url)) as server:
        got = relayed(server, upstream, f"HTTP/1.1 200 OK\r\n{head}Content-Length: 2\r\n\r\n{{}}".encode())
    assert {name: got.headers.get(name) for name in RETURNED} == RETURNED
    assert "no" not in [got.headers.get(name) for name in KEPT_BACK]


def test_an_event_passes_before_the_next_is_there(upstream):
    with Server(Relay(upstream.url)) as server, asking(server, stream=True) as client:
        connection, _ = upstream.accept()
        connection.sendall(STREAM_HEAD)
        for block in ABOVE:
            connection.sendall(transfer_chunk(block))
            got = read_past(client, block)
        connection.sendall(b"0\r\n\r\n")
        assert (got + read_to_end(client)).endswith(b"0\r\n\r\n")


def test_an_upstreams_refusal_passes_unchanged():
    refusal = APIError(429, "Slow down.", headers={"retry-after-ms": "20"})
    with Server(Script(refusal)) as first, Server(Relay(first.base_url)) as server:
        got = chat(server)
    assert (got.status, got.headers["retry-after-ms"]) == (429, "20")
    assert json.loads(got.body) == refusal.body()


BASES = {"": "/chat/completions", "/v1": "/v1/chat/completions", "/v1/": "/v1/chat/completions",
         "/deep/er/v1": "/deep/er/v1/chat/completions"}


@pytest.mark.parametrize("path", [CHAT_PATH, "/chat/completions", "//v1//chat/completions/"])
@pytest.mark.parametrize("base", BASES)
def test_a_path_is_put_after_the_upstreams_own(upstream, base, path):
    with Server(Relay(upstream.url[:-len("/v1")] + base)) as server, asking(server, path=path):
        _, (line, _, _) = upstream.accept()
    assert line.split(" ")[1] == BASES[base]


# A relay reaches only its routes, however they are spelled.
CLIMBING = [b"/v1" + path for path in (
    b"/models/..%2f..%2fadmin/keys", b"/models/../files", b"/models/%2e%2e/files", b"/models/%2e%2e%2ffiles",
    b"/models/..%2Ffiles", b"/models/.%2e/files", b"/models/..%5cfiles", b"/models/..\\files",
    b"/models/%252e%252e%252ffiles", b"/models/..%252ffiles", b"/models/..;/files", b"/models/;/../files",
    b"/models/a/../../files", b"/models/a%2f..%2f..%2ffiles", b"/models//../files", b"/models/./../files",
    b"/models/..%00/files", b"/models/..%0d%0aX:%20y", b"/models/%c0%ae%c0%ae/files", b"/models/..%3ffiles",
    b"/models/a%3f/../files", b"/models/..%23", b"/models/..#", b"/models/..", b"/models/.", b"/models/%2e%2e",
    b"/models/%2f%2fevil.example", b"/models/http://evil.example/", b"/models/@evil.example/..",
    b"/models?x=/../../admin", b"/files", b"/admin/keys", b"/embeddings", b"/embeddings/../files",
    b"/chat/completions/../../files", b"/chat/completions/..%2f..%2ffiles", b"/chat/../files",
    b"/completions/..%2ffiles", b"/completions;/files", b"/./files", b"/../admin", b"%2fmodels%2f..%2ffiles",
    b"/engines/../completions", b"/engines/..%2f..%2fadmin%3f/completions", b"/engines/a/../../completions",
    b"/engines/x%2f..%2ffiles%23/chat/completions")] + [
    b"/../admin", b"//admin", b"/%2e%2e/admin", b"/health/../admin", b"/sse/../files", b"/sse%2f..%2ffiles",
    b"http://evil.example/v1/files", b"http://127.0.0.1/../admin", b"http://127.0.0.1/v1/models/..%2ffiles"]
REACHED = {"POST": r"/v1/(chat/)?completions", "GET": r"/v1/models(/[^/\\;#]+)?",
           "HEAD": r"/v1/models(/[^/\\;#]+)?", "DELETE": "none"}


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "DELETE"])
def test_a_relay_reaches_only_its_routes(method):
    with playing(reply({"a": 1}, **JSON_TYPE)) as (url, requests):
        with Server(Relay(url, "sk-up")) as server:
            body = b"{}" if method == "POST" else b""
            headers = b"Host: x\r\nConnection: close\r\nContent-Length: %d\r\n" % len(body)
            for target in CLIMBING:
                talk(server, get(target, headers, method.encode()) + body, method == "HEAD")
            [got] = talk(server, get(b"/v1/models/org%2Fm?x=1", LAST[LAST.index(b"Host"):-2]))
            assert got.status == 200
    assert requests.pop()[0].split()[1] == "/v1/models/org%2Fm?x=1"
    for line, sent, _ in requests:
        asked, target, _ = line.split(" ")
        assert asked == method and sent["host"] in url
        path = target.partition("?")[0]
        assert re.fullmatch(REACHED[method], path), target
        for decoded in (unquote(path), unquote(unquote(path))):
            assert not re.search(r"[/\\;]\.\.?([/\\;]|$)", decoded), target


THROUGH = {  # the request line; what the upstream is asked for; what it says; status, body
    "HEAD": (b"HEAD /v1/models", "HEAD /v1/models", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", 200, b""),
    "HEAD of a stream": (b"HEAD /v1/models", "HEAD /v1/models", STREAM_HEAD, 200, b""),
    "204": (b"GET /v1/models", "GET /v1/models", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "a query": (b"GET /v1/models?limit=1&after=a%20b", "GET /v1/models?limit=1&after=a%20b",
                reply({}), 200, b"{}"),
    "an empty query": (b"GET /v1/models?", "GET /v1/models?", reply({}), 200, b"{}"),
    **{f"the id {id}": (b"GET /v1/models/" + id.encode(), f"GET /v1/models/{sent}", reply({}), 200, b"{}")
       for id, sent in (("a%2Fb", "a%2Fb"), ("a/b", "a%2Fb"), ("%C3%A9", "%C3%A9"), ("a%20b", "a%20b"),
                        ("a%3Fb", "a%3Fb"), ("a:b@c", "a%3Ab%40c"), ("a..b", "a..b"))},
}


@pytest.mark.parametrize("line, asked, sent, status, body", rows(THROUGH))
def test_what_http_has_passes_through_a_relay(upstream, tmp_path, line, asked, sent, status, body):
    tape = str(tmp_path / "tape")
    raw = line + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    with Server(Relay(upstream.url, record=tape)) as server, dial(server) as client:
        client.sendall(raw + LAST)          # a body where none may be would spoil the next reply
        connection, (found, _, _) = upstream.accept()
        with connection:
            connection.sendall(sent)
        got, last = replies(read_to_end(client), line.startswith(b"HEAD"))
    assert found == asked + " HTTP/1.1" and (got.status, got.body, last.status) == (status, body, 200)
    with Server(Replay(tape)) as server:
        assert talk(server, raw + LAST, line.startswith(b"HEAD"))[0].body == body


def test_a_coding_is_told_and_what_is_asked_for_has_none(upstream):
    packed = gzip.compress(b"{}")
    with Server(Relay(upstream.url)) as server:
        with asking(server, headers={"Accept-Encoding": "gzip"}) as client:
            connection, (_, headers, _) = upstream.accept()
            connection.sendall(reply(packed, Content_Encoding="gzip"))
            got = got_on(client)
    assert headers["accept-encoding"] == "identity"
    assert (got.headers["content-encoding"], got.body) == ("gzip", packed)


@pytest.mark.system
@pytest.mark.parametrize("program", ["curl", "node"])
def test_other_http_clients_agree_with_a_relay(program):
    if not shutil.which(program):
        pytest.fail(f"{program} is missing")
    code = """const http = require("http"), agent = new http.Agent({keepAlive: true, maxSockets: 1});
const ask = (method, path) => new Promise((done, fail) => http.request(process.argv[1] + path,
  {method, agent}, reply => { let size = 0; reply.on("data", block => size += block.length);
  reply.on("end", () => done(`${reply.statusCode} ${size}`)); }).on("error", fail).end());
(async () => { for (const [method, path] of [["HEAD", "/models"], ["GET", "/models/none"], ["GET", "/models"]])
  console.log(await ask(method, path)); })();"""
    upstreams = [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n", reply({})]
    with playing(*upstreams) as (url, _), Server(Relay(url)) as server:
        words = ["node", "-e", code, server.base_url] if program == "node" else [
            "curl", "-s", "-w", "%{http_code} %{size_download}\\n", "-o", os.devnull, "-I",
            server.base_url + "/models", "--next", "-s", "-w", "%{http_code} %{size_download}\\n",
            "-o", os.devnull, "-o", os.devnull, server.base_url + "/models/none", server.base_url + "/models"]
        assert finished(*words, timeout=60).stdout.split() == "200 0 204 0 200 2".split()


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"], ids=repr)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_events_of_an_upstream_are_counted_however_they_come(upstream, end, size):
    body = "".join(f"data: {word}{end}" for word in ('{"a":1}', '{"b":"\u4e16"}', "[DONE]")).encode()
    with Server(Relay(upstream.url)) as server, asking(server, stream=True) as client:
        connection, _ = upstream.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        connection.sendall(STREAM_HEAD)
        for start in range(0, len(body), size):
            connection.sendall(transfer_chunk(body[start:start + size]))
        got = got_on(client)                # it ends at [DONE], while the upstream lingers
        assert got.body == body and server.journal[0].events == 3
        assert server.journal[0].outcome == "complete" and connection.fileno() > 0


def test_what_a_relay_passes_in_addition_has_any_body():
    with playing(reply(b"\xff", **JSON_TYPE)) as (url, requests):
        with Server(Relay(url, paths="/embeddings")) as server:
            sent = [("POST", "/v1/embeddings", b"\xfe"), ("GET", "/embeddings?x=1", None),
                    ("DELETE", "//v1/embeddings/", None)]
            assert [call(server, *each).body for each in sent] == [b"\xff"] * 3
            assert call(server, "PUT", "/embeddings").status == 405
            assert call(server, "POST", "/embeddings/x").status == 404
    assert [line.rpartition(" ")[0] for line, _, _ in requests] == [
        "POST /v1/embeddings", "GET /v1/embeddings?x=1", "DELETE /v1/embeddings"]
    assert requests[0][2] == b"\xfe"


@pytest.mark.parametrize("passing", [Relay("http://127.0.0.1:9/v1"), None], ids=["relay", "replay"])
def test_beside_a_relay_models_are_obeyed_and_a_quirk_is_refused(passing, tape):
    tape.write_bytes(b"")
    for settings in ({"quirk": "comment"}, {"quirk_header": True}):
        with pytest.raises(ValueError, match="quirk"):
            Server(passing or Replay(str(tape)), **settings)
    with Server(passing or Replay(str(tape)), models=["a"]) as server:
        assert listed(server) == ["a"]
        for got in (chat(server), call(server, "GET", "/v1/models/m")):
            assert got.status == 404 and got.error["code"] == "model_not_found"


def test_the_headers_that_an_upstream_needs_go_up(upstream):
    sent = {"Idempotency-Key": "k-1", "OpenAI-Organization": "org-1", "X-Stainless-Lang": "go",
            "User-Agent": "mine/1", "Cookie": "secret", "X-Other": "x"}
    with Server(Relay(upstream.url)) as server, asking(server, headers=sent):
        _, (_, there, _) = upstream.accept()
    went = {name: there.get(name.lower()) for name in sent}
    assert went == {**sent, "Cookie": None, "X-Other": None}


def test_a_relay_does_not_wait_for_ever_for_a_connection(monkeypatch):
    limits = []

    def connect(connection):
        limits.append(connection.timeout)
        raise OSError("no answer")
    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    with Server(Relay("http://127.0.0.1:9/v1")) as server, asking(server) as client:
        got = got_on(client)
    assert got.status == 502 and got.error["code"] == "upstream_unreachable" and 0 < limits[0] <= 60


@pytest.mark.parametrize("sent", [reply({}), STREAM_HEAD + transfer_chunk(b"data: 1\n\n")],
                         ids=["whole", "cut"])
def test_the_upstream_is_closed_by_the_server_itself(upstream, monkeypatch, sent):
    kept, create = [], socket.create_connection
    with Server(Relay(upstream.url)) as server, dial(server) as client:
        monkeypatch.setattr(socket, "create_connection",
                            lambda *them, **more: kept.append(create(*them, **more)) or kept[-1])
        client.sendall(request_bytes())
        with upstream.accept()[0] as connection:
            connection.sendall(sent)
        read_to_end(client)
        until(lambda: kept and kept[0].fileno() == -1)      # with a reference to it held here
        monkeypatch.undo()


def test_the_models_are_the_upstreams():
    with Server(models=["their-model"]) as first, Server(Relay(first.base_url)) as server:
        assert listed(server) == ["their-model"]


def test_a_body_goes_upstream_as_it_came(upstream):
    body = b'{ "n":"many",\n"messages": 5, "odd": 1e2, "text": "\\u00e9"}'
    with Server(Relay(upstream.url)) as server, dial(server) as client:
        client.sendall(request_bytes(body))
        assert upstream.accept()[1][2] == body


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"text"'])
def test_what_is_no_json_object_does_not_go_upstream(body):
    with Server(Relay("http://127.0.0.1:9/v1")) as server:
        assert post(server, CHAT_PATH, body).status == 400


PARTS = {   # how far an upstream has come
    "nothing":           b"",
    "half a head":       b"HTTP/1.1 200 OK\r\nContent-Type: te",
    "a head":            STREAM_HEAD,
    "an event":          STREAM_HEAD + transfer_chunk(ABOVE[0]),
    "half a chunk":      STREAM_HEAD + b"100\r\ndata: ",
    "half a chunk size": STREAM_HEAD + transfer_chunk(ABOVE[0]) + b"1",
    "half a body":       reply(b"{}" * 100, **JSON_TYPE)[:-9],
}
parts = pytest.mark.parametrize("sent", PARTS.values(), ids=list(PARTS))


@both
@parts
def test_the_client_leaving_closes_the_upstream_and_is_not_recorded(upstream, tmp_path, sent, stream,
                                                                    caplog):
    tape = tmp_path / "tape"
    with Server(Relay(upstream.url, record=str(tape))) as server:
        with asking(server, stream=stream) as client:
            connection, _ = upstream.accept()
            connection.sendall(sent)
            if ABOVE[0] in sent:
                read_past(client, ABOVE[0])
        assert ended(connection) and outcome(server) == "client left"
    assert tape.read_bytes() == b"" and "not recorded on" in caplog.text and "client left" in caplog.text


def complete(raw):
    """Would a client take these bytes for a whole reply that is no error?"""
    with contextlib.suppress(http.client.HTTPException, ValueError):
        near, far = socket.socketpair()
        with near, far:
            near.sendall(raw)
            half_close(near)
            return got_on(far).status < 500
    return False


@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["closed", "reset"])
@parts
def test_an_upstream_that_is_cut_never_looks_complete(upstream, tmp_path, sent, end):
    tape = tmp_path / "tape"
    with Server(Relay(upstream.url, record=str(tape))) as server, asking(server) as client:
        connection, _ = upstream.accept()
        connection.sendall(sent)
        if ABOVE[0] in sent:
            read_past(client, ABOVE[0])         # the events before the cut
        end(connection)
        assert not complete(STREAM_HEAD * (ABOVE[0] in sent) + read_to_end(client))
        assert outcome(server) == "error"
    assert tape.read_bytes() == b""


@pytest.mark.parametrize("sent", [b"", b"SSH-2.0-OpenSSH\r\n", b"\0" * 70000, b"HTTP/1.1 2"],
                         ids=["nothing", "another protocol", "noise", "half a line"])
def test_an_upstream_that_speaks_no_http_is_a_502(upstream, sent):
    with Server(Relay(upstream.url)) as server:
        got = relayed(server, upstream, sent)
    assert got.status == 502 and got.error


def test_an_upstream_that_is_not_there_is_a_502_that_names_it(upstream):
    upstream.listener.close()
    with Server(Relay(upstream.url, api_key="sk-secret")) as server:
        got = chat(server)
    assert got.status == 502 and upstream.url in got.error["message"] and b"secret" not in got.body


KEYS = {    # our keys, the relay's, what the client sends, what goes upstream
    "none at all":            ((), None, {}, None),
    "the client's":           ((), None, {"Authorization": "Bearer theirs"}, "Bearer theirs"),
    "the relay's":            ((), "up", {}, "Bearer up"),
    "the relay's before it":  ((), "up", {"Authorization": "Bearer theirs"}, "Bearer up"),
    "ours stays here":        (["ours"], None, {"Authorization": "Bearer ours"}, None),
    "ours is replaced":       (["ours"], "up", {"Authorization": "Bearer ours"}, "Bearer up"),
    "ours in another header": (["ours"], None, {"api-key": "ours"}, None),
}


@pytest.mark.parametrize("ours, key, headers, expected", rows(KEYS))
def test_the_key_that_goes_upstream(upstream, ours, key, headers, expected):
    with Server(Relay(upstream.url, api_key=key), api_keys=ours) as server:
        with asking(server, headers=headers):
            _, (_, sent, _) = upstream.accept()
    assert sent.get("authorization") == expected and (not ours or "ours" not in repr(sent))


def test_an_upstream_is_held_up_by_a_client_that_does_not_read(upstream):
    with Server(Relay(upstream.url)) as server, asking(server, stream=True):
        connection, _ = upstream.accept()
        connection.settimeout(0.3)
        connection.sendall(STREAM_HEAD)
        block, count = transfer_chunk(b"x" * 2 ** 16), 0
        with contextlib.suppress(socket.timeout):
            while count < 1024:
                connection.sendall(block)
                count += 1
    assert count < 1024, "that many transfer chunks are kept somewhere"


# ----------------------------------------------------------------------------------
# Tapes.

@pytest.fixture
def tape(tmp_path):
    return tmp_path / "tape"


def recorded(tape, *texts, backend=echo, **fields):
    """Record a streamed exchange for each text; the bodies of the replies."""
    with Server(backend) as first, Server(Relay(first.base_url, record=str(tape))) as server:
        return [chat(server, text, stream=True, **fields).body for text in texts]


def test_a_tape_has_a_whole_json_line_for_each_exchange_and_is_gone_on_with(tape):
    bodies = [*recorded(tape, "one", "two"), *recorded(tape, "three")]
    lines = tape.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    assert [json.loads(line)["request"]["body"]["messages"] for line in lines] == [
        user("one"), user("two"), user("three")]
    with Server(Replay(str(tape))) as server:
        assert [chat(server, text, stream=True).body for text in ("one", "two", "three")] == bodies


def test_a_tape_holds_no_key(tape):
    with Server(api_keys="sk-upstream") as first:
        with Server(Relay(first.base_url, "sk-upstream", str(tape)), api_keys="sk-ours") as server:
            chat(server, headers={"Authorization": "Bearer sk-ours", "Cookie": "sk-cookie"})
    assert tape.stat().st_size and b"sk-" not in tape.read_bytes()


def test_many_clients_at_once_are_recorded_whole(tape):
    texts = ["word " * 500 + str(i) for i in range(12)]
    with Server() as first, Server(Relay(first.base_url, record=str(tape))) as server:
        waiting = list(texts)
        together(12, lambda: chat(server, waiting.pop(), stream=True))
    with Server(Replay(str(tape))) as server:
        assert [chat(server, text, stream=True).text for text in texts] == texts


def test_a_tape_that_cannot_be_written_costs_no_reply(tmp_path, caplog):
    tape = tmp_path / "folder" / "tape"
    tape.parent.mkdir()
    with Server(say("ok")) as first, Server(Relay(first.base_url, record=str(tape))) as server:
        shutil.rmtree(str(tape.parent))
        assert chat(server, stream=True).text == "ok"
    assert str(tape) in caplog.text


def test_a_tape_that_can_never_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(OSError):
        Relay("http://127.0.0.1:9/v1", record=str(tmp_path))


def test_the_same_request_however_it_is_spelled_gets_the_recording(tape):
    [body] = recorded(tape, "one")
    spelled = json.dumps({"stream": True, "messages": [{"content": "one", "role": "user"}],
                          "model": "m"}, indent=1)
    with Server(Replay(str(tape))) as server:
        assert post(server, CHAT_PATH, spelled).body == body


def test_repeated_requests_take_their_recordings_in_order_and_the_last_stays(tape):
    recorded(tape, "x", "x", "x", backend=Script("one", "two", "three"))
    with Server(Replay(str(tape))) as server:
        said = [chat(server, "x", stream=True).text for _ in range(5)]
    assert said == ["one", "two", "three", "three", "three"]


@pytest.mark.parametrize("body, again", [
    ({"temperature": 0}, {"temperature": 0.0}), ({"temperature": 1.0}, {"temperature": 1}),
    ({"logit_bias": {"5": 2.0}}, {"logit_bias": {"5": 2}})])
def test_equal_numbers_are_the_same_request(tape, body, again):
    recorded(tape, "x", backend=say("a"), **body)
    with Server(Replay(str(tape))) as server:
        assert chat(server, "x", stream=True, **again).text == "a"


def test_a_recording_of_another_engine_or_path_is_none(tape):
    with Server(say("a")) as first, Server(Relay(first.base_url, record=str(tape))) as server:
        post(server, "/v1/engines/gpt-a/completions", {"prompt": "x"})
        call(server, "GET", "/v1/models/say")
    with failing_at_its_end(Replay(str(tape)), AssertionError, "body.model is 'gpt-b'") as server:
        assert [post(server, f"/engines/{name}/completions", {"prompt": "x"}).status
                for name in ("gpt-a", "gpt-b")] == [200, 404]
        assert post(server, "/completions", {"model": "gpt-a", "prompt": "x"}).text == "a"
        assert [call(server, "GET", f"/models/{id}").status for id in ("say", "x")] == [200, 404]


def test_a_null_that_is_absent_on_the_tape_is_a_difference_that_is_told(tape):
    recorded(tape, "x", seed=None)
    with failing_at_its_end(Replay(str(tape)), AssertionError, "a null or a boolean") as server:
        assert "line 1" in chat(server, "x", stream=True).error["message"]


def test_what_is_missing_on_a_tape_is_asked_for_and_recorded(tape):
    with Server(Script("one", "two")) as first:
        for _ in range(2):                          # first the tape is not there, then it is
            with Server(Replay(str(tape), relay=Relay(first.base_url))) as server:
                said = [chat(server, text, stream=True).text for text in ("x", "y", "x")]
    with Server(Replay(str(tape))) as server:
        said += [chat(server, text, stream=True).text for text in ("y", "x")]
    assert said == ["one", "two", "one", "two", "one"] and tape.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("wrong", [{"speed": -1}, {"speed": math.nan}, {"speed": "1"},
                                   {"relay": "http://h/v1"}, {"relay": echo}], ids=repr)
def test_what_no_replay_can_do_is_a_type_error(tape, wrong):
    with pytest.raises(TypeError):
        Replay(str(tape), **wrong)


def test_the_slowness_of_a_client_is_no_pause_on_the_tape(tape):
    sent = []
    with playing(streamed(b"data: %b\n\n" % (b"x" * 2**23), b"data: [DONE]\n\n")) as (url, _):
        with Server(Relay(url, record=str(tape))) as server, asking(server, stream=True) as client:
            while not (sent and time.monotonic() - sent[-1] > 1.5):     # nothing moves any more
                select.select([client], [], [], 0.05)
                sent = sent or [time.monotonic()]
            read_to_end(client)
    writes = json.loads(tape.read_text())["writes"]
    assert sum(pause for pause, _ in writes) < 1.5


@both
@parts
def test_what_is_not_recorded_is_logged_with_its_reason(upstream, tape, caplog, sent, stream):
    with Server(Relay(upstream.url, record=str(tape))) as server, asking(server, stream=stream) as client:
        connection, _ = upstream.accept()
        with connection:
            connection.sendall(sent)
        read_to_end(client)
    reason = "upstream was cut" if b"\r\n\r\n" in sent else "upstream at .* cannot be reached"
    assert re.search(f"not recorded on .*tape: the {reason}", caplog.text, re.I)
    assert tape.read_bytes() == b""


# Clients that close at [DONE], or at the last byte of a whole reply, at once.

def pieces_in_turn(request):
    yield from ("one ", "two ", "three")


def seen_after_the_end(server, number, stream):
    """The outcome that a client finds in the journal as soon as it has the whole reply."""
    with dial(server) as client:
        client.sendall(request_bytes({**HI, "stream": stream, "seed": number},
                                     f"{CHAT_PATH}?{number}"))
        read_past(client, b"[DONE]") if stream else got_on(client)
    return [each.outcome for each in server.journal if each.path.endswith(f"?{number}")]


def busy(seconds=600):
    """A process that works all the time, beside the server."""
    return subprocess.Popen(program(f"import time\nend = time.time() + {seconds}\n"
                                    "while time.time() < end: pass"))


@both
@pytest.mark.parametrize("count, others", [(100, 0), pytest.param(1000, 3, marks=pytest.mark.stress)])
def test_nothing_is_late_in_the_journal_nor_missing_on_the_tape(tape, count, others, stream):
    working = [busy() for _ in range(others)]
    try:
        with Server(pieces_in_turn) as first, Server(Relay(first.base_url, record=str(tape))) as server:
            for each in (first, server):
                numbers = itertools.count()
                found = together(4, lambda: [seen_after_the_end(each, next(numbers), stream)
                                             for _ in range(count // 4)])
                assert list(itertools.chain(*found)) == [["complete"]] * count
    finally:
        for process in working:
            process.kill()
            process.wait()
    recordings = [json.loads(line) for line in tape.read_bytes().splitlines()]
    assert sorted(each["request"]["body"]["seed"] for each in recordings) == list(range(count))
    ends = [each["writes"][-1][1] for each in recordings]
    assert all(("[DONE]" in end) == stream for end in ends)


@pytest.mark.parametrize("text, seed, words", [("two", 5, ("line 2", "seed", "4", "5")),
                                               ("one", 6, ("line 1", "seed", "6"))])
def test_an_unknown_request_is_told_the_nearest_recording(tape, text, seed, words):
    recorded(tape, "one", backend=say("a"))
    recorded(tape, "two", backend=say("b"), temperature=0.5, seed=4)
    fields = {"temperature": 0.5} if text == "two" else {}
    with failing_at_its_end(Replay(str(tape)), AssertionError, words[1]) as server:
        got = chat(server, text, stream=True, seed=seed, **fields)
    assert got.status == 404 and all(word in got.error["message"] for word in words)


BROKEN_TAPES = {"cut": lambda line: line[:-20], "no JSON": lambda line: b"garbage\n",
                "another file": lambda line: b'{"hello": "world"}\n', "a list": lambda line: b"[]\n",
                "no status": lambda line: line.replace(b'"status"', b'"stat"')}


@pytest.mark.parametrize("broken", BROKEN_TAPES.values(), ids=list(BROKEN_TAPES))
def test_a_broken_tape_is_refused_with_its_name_and_line(tape, broken):
    recorded(tape, "one", "two")
    one, two = tape.read_bytes().splitlines(keepends=True)
    tape.write_bytes(one + broken(two))
    with pytest.raises(ValueError, match="line 2 of .*tape"):
        Replay(str(tape))


def paused(tape, *pauses):
    """A tape whose one recording has a write after each of these pauses."""
    recorded(tape, "x")
    recording = json.loads(tape.read_text())
    recording["writes"] = [[pause, "data: word\n\n"] for pause in pauses]
    tape.write_text(json.dumps(recording) + "\n")
    return str(tape)


@pytest.mark.parametrize("pause, speed, least", [(0.1, 1, 0.1), (0.1, 2, 0.05), (0.1, 0.5, 0.2),
                                                 (3600, 0, 0), (3600, 1e6, 0.0036)])
def test_a_replay_is_as_fast_as_it_is_told(tape, pause, speed, least):
    with Server(Replay(paused(tape, 0, pause), speed)) as server:
        started = time.monotonic()
        assert chat(server, "x", stream=True).body == b"data: word\n\n" * 2
    assert least <= time.monotonic() - started


def test_a_client_that_leaves_does_not_wait_for_a_pause(tape):
    with Server(Replay(paused(tape, 0, 3600), 1)) as server:
        with asking(server, "x", stream=True) as client:
            read_past(client, b"word")
        assert outcome(server) == "client left"


def test_the_pauses_of_the_upstream_are_on_the_tape(tape):
    recorded(tape, "x", backend=Script(Reply("a b c", delay=(0, 0.1))))
    writes = json.loads(tape.read_text())["writes"]
    assert sum(pause for pause, _ in writes[1:]) >= 0.1     # of 0.2: a busy machine reads late


def test_what_is_no_utf8_is_on_the_tape_in_base64(upstream, tape):
    with Server(Relay(upstream.url, record=str(tape))) as server:
        relayed(server, upstream, reply(b"\xff\xfe"))
    writes = json.loads(tape.read_text())["writes"]
    assert [base64.b64decode(write["base64"]) for _, write in writes] == [b"\xff\xfe"]


FULL_DISK = """
import resource
sys.dont_write_bytecode = True          # it would be cut short as well
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
import openai_compat
openai_compat.main(sys.argv[1:])
"""


@posix
def test_a_full_disk_loses_no_reply_and_is_reported(tape):
    texts = ["short", "long " * 1000, "short again"]
    with Server() as first, Running("--upstream", first.base_url, "--record", str(tape),
                                    start=program(FULL_DISK), cwd=str(HERE)) as server:
        assert [chat(server, text).text for text in texts] == texts
        status, said = server.end()
    assert status == 0 and len([line for line in said if str(tape) in line]) == 2
    with pytest.raises(ValueError, match="line 2"):
        Replay(str(tape))


# ----------------------------------------------------------------------------------
# The command line, as a process of its own.

def commanded(*words, **options):
    """The command line's process, when it has ended."""
    return finished(sys.executable, SERVER, *words, **options)


MINE = """
import socket
from openai_compat import APIError

def backwards(request):
    return request["text"][::-1]

def refuses(request):
    raise APIError(418, "No coffee.", code="teapot")

def letters(text):
    return list(text)

def held(request):
    yield "one"
    with socket.create_connection(("127.0.0.1", int(request["text"]))) as door:
        door.recv(1)
    yield "two"
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with somebody's backend, script, and an answer of a model program."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "mine.py").write_text(MINE)
    (folder / "steps.json").write_text('["from the script"]')
    (folder / "broken.json").write_text('["from the')
    (folder / "speak.py").write_text("import sys; sys.stdout.write('spoken ' + sys.argv[1])")
    return str(folder)


ORPHAN = [{"role": "tool", "content": "x", "tool_call_id": "call_1"}]
FLAGS = {   # the flags, the request, and what its reply has only with the flags
    "--model":        (["--model", "a", "--model", "b"], {}, "^404 .*model_not_found"),
    "--api-key":      (["--api-key", "sk-1"], {}, "^401 "),
    "--say":          (["--say", "Hello there"], {}, '"content":"Hello there"'),
    "--script":       (["--script", "steps.json"], {}, "from the script"),
    "--command":      (["--command", '"%s" speak.py {prompt}' % sys.executable.replace("\\", "/")],
                       {}, "spoken Hi"),
    "--backend":      (["--backend", "mine:backwards"], {}, '"content":"iH"'),
    "its APIError":   (["--backend", "mine:refuses"], {}, "^418 .*No coffee.*teapot"),
    "--tokenizer":    (["--tokenizer", "mine:letters"], {}, '"completion_tokens":2'),
    "--lenient":      (["--lenient"], {"messages": ORPHAN}, "^200 "),
    "--quirk":        (["--quirk", "html_502"], {}, "^502 "),
    "--quirk-header": (["--quirk-header"], {"headers": {"X-Quirk": "html_502"}}, "^502 "),
    "--cors":         (["--cors", "https://page.example"],
                       {"headers": {"Origin": "https://page.example"}}, "^200 "),
    "--max-body":     (["--max-body", "10"], {}, "^413 "),
}


@pytest.mark.parametrize("flags, fields, expected", rows(FLAGS))
def test_a_flag_has_its_effect(workplace, flags, fields, expected):
    with Server() as without, Running(*flags, cwd=workplace) as server:
        shown = [f"{got.status} {got.body.decode()}" for got in (
            chat(each, **fields) for each in (without, server))]
    assert [bool(re.search(expected, each)) for each in shown] == [False, True]


def test_upstream_with_its_key_and_record_and_replay(tape):
    with Server(say("from above"), api_keys="up") as first:
        flags = ["--upstream", first.base_url, "--upstream-key", "up", "--record", str(tape)]
        with Running(*flags) as server:
            got = chat(server)
    with Running("--replay", str(tape)) as server:
        assert chat(server).body == got.body and got.text == "from above"


def test_at_once_lets_so_many_programs_run(gate):
    line = " ".join(map(shlex.quote, gate.program("gate()")))
    with Running("--command", line, "--at-once", "2") as server:
        with asking(server), asking(server), gate.arrival(), gate.arrival():
            pass


def test_delay_is_between_the_pieces():
    with Running("--delay", "0.05", "--say", "a b c d") as server:
        started = time.monotonic()
        assert chat(server, stream=True).text == "a b c d"
    assert time.monotonic() - started >= 0.15


@pytest.mark.parametrize("flags, status", [([], 404), (["--journal"], 200)])
def test_the_journal_is_there_where_it_is_asked_for(flags, status):
    with Running(*flags, "--model", "b", "--model", "a") as server:
        assert call(server, "GET", "/journal").status == status and listed(server) == ["b", "a"]


def test_one_connection_too_many_is_a_503():
    with Running("--max-connections", "1") as server, served(server):
        assert chat(server).status == 503


def test_a_request_has_to_arrive_in_time():
    with Running("--request-timeout", "0.1") as server, dial(server) as client:
        client.sendall(request_bytes()[:-5])
        assert got_on(client).status == 408


def test_the_port_is_the_one_that_was_named():
    port = free_port()
    with Running(port=port) as server:
        assert server.server_address[1] == port and chat(server).status == 200


ADMITTED = {  # OPENAI_COMPAT_API_KEYS, flags, the key that is tried, status, is it warned of
    "no key":                 ("", [], "any", 200, False),
    "the second of two":      ("sk-1, sk-2", [], "sk-2", 200, False),
    "neither of two":         ("sk-1, sk-2", [], "sk-3", 401, False),
    "beside a flag":          ("sk-1", ["--api-key", "sk-3"], "sk-1", 200, False),
    "the flag's":             ("sk-1", ["--api-key", "sk-3"], "sk-3", 200, False),
    "a comma too many":       ("sk-1,", [], "", 401, False),
    "open to all":            ("", ["--host", "0.0.0.0"], "any", 200, True),
    "open to those with one": ("", ["--host", "0.0.0.0", "--api-key", "k"], "any", 401, False),
}


@pytest.mark.parametrize("keys, flags, tried, status, warns", rows(ADMITTED))
def test_keys_come_from_flags_and_the_environment(keys, flags, tried, status, warns):
    with Running(*flags, env=environment(OPENAI_COMPAT_API_KEYS=keys)) as server:
        assert chat(server, headers={"Authorization": "Bearer " + tried}).status == status
        assert ("WARNING" in "".join(server.said)) == warns


def test_version_is_printed():
    done = commanded("--version")
    assert (done.returncode, done.stdout.split()) == (0, [openai_compat.__version__])


CANNOT_START = {  # flags, and what the message says
    "no script":      (["--script", "no.json"], "no.json"),
    "broken script":  (["--script", "broken.json"], "broken.json"),
    "no tape":        (["--replay", "no.tape"], "no.tape"),
    "broken tape":    (["--replay", "broken.json"], "line 1 of broken.json"),
    "no such quirk":  (["--quirk", "quark"], "quark"),
    "no module":      (["--backend", "nowhere:function"], "nowhere"),
    "no function":    (["--backend", "mine:nothing"], "nothing"),
    "half a name":    (["--backend", "mine"], "mine"),
    "no tokenizer":   (["--tokenizer", "nowhere:function"], "nowhere"),
    "no URL":         (["--upstream", "gpu:8000"], "gpu:8000"),
    "no tape folder": (["--upstream", "http://h/v1", "--record", "no/tape"], "no/tape"),
    "tape of nothing": (["--record", "tape"], "--upstream"),
    "key of nothing": (["--upstream-key", "k"], "--upstream"),
    "no certificate": (["--tls-cert", "no.pem", "--tls-key", "no.key"], "no.pem"),
    "no key":         (["--tls-key", "no.key"], "--tls-cert"),
    "port too high":  (["--port", "70000"], "70000|port"),
    "no host":        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
    "none at once":   (["--command", sys.executable, "--at-once", "0"], "at once"),
    "half a quote":   (["--command", "'x"], "command|quotation"),
    "two backends":   (["--say", "x", "--script", "steps.json"], "not allowed beside"),
    "unknown flag":   (["--sya", "x"], "--sya"),
}


@pytest.mark.parametrize("flags, expected", rows(CANNOT_START))
def test_what_cannot_be_started_is_one_clear_line(workplace, flags, expected):
    done = commanded("--port", "0", *flags, cwd=workplace)
    *usage, line = done.stderr.splitlines()
    assert done.returncode in (1, 2) and re.search(expected, line), done.stderr
    assert "Traceback" not in done.stderr and (usage == [] or usage[0].startswith("usage: "))


@pytest.mark.parametrize("flags, words", [
    (["--at-once", "2"], "--at-once has no effect without --command"),
    (["--pass", "/x"], "--pass has no effect without --upstream"),
    *((["--upstream", "http://h/v1", *flag], f"{flag[0]} has no effect beside --upstream") for flag in (
        ["--delay", "1"], ["--quirk", "bom"], ["--quirk-header"], ["--lenient"], ["--tokenizer", "a:b"])),
    *((["--replay", "no.tape", *flag], f"{flag[0]} has no effect beside --replay") for flag in (
        ["--delay", "1"], ["--quirk", "bom"], ["--quirk-header"], ["--lenient"], ["--tokenizer", "a:b"])),
    (["--route", "/x=mine:nothing"], "nothing"), (["--route", "/models=mine:backwards"], "built-in"),
    (["--route", "/x"], "cannot load"), (["--delay", "-1"], "--delay"), (["--request-timeout", "0"],
                                                                       "request_timeout"),
    (["--command", "no-such-program"], "no-such-program"), (["--upstream", "http://h:port/v1"], "port")])
def test_what_has_no_effect_or_cannot_be_obeyed_is_refused(workplace, flags, words):
    done = commanded("--port", "0", *flags, cwd=workplace)
    assert done.returncode in (1, 2) and words in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("flags", [["-OO"], ["-X", "dev", "-W", "error"]], ids=" ".join)
def test_it_runs_under_any_flags_of_python(flags):
    done = finished(sys.executable, *flags, SERVER, "--", *ASKING)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello!\n", "")
    assert "--upstream" in finished(sys.executable, *flags, SERVER, "--help").stdout


def test_a_warning_names_the_host_that_is_open_to_all():
    with Running("--host", "0.0.0.0") as server:
        assert "0.0.0.0, port %d" % server.server_address[1] in "".join(server.said)


def test_a_route_and_a_missing_recording_from_the_command_line(tmp_path, tape):
    (tmp_path / "mine.py").write_text("def vectors(body):\n    return {'data': [0.5], **body}\n")
    with Running("--route", "/embeddings=mine:vectors", "--route", "GET /x=mine:vectors",
                 cwd=str(tmp_path)) as server:
        assert post(server, "/v1/embeddings", {"a": 1}).body == b'{"data":[0.5],"a":1}'
    with Server(Script("once")) as first:
        for _ in range(2):
            with Running("--replay", str(tape), "--upstream", first.base_url) as server:
                assert chat(server).text == "once"


def test_a_port_in_use_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = commanded("--port", port)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and port in done.stderr


# ----------------------------------------------------------------------------------
# What it prints.

@posix
def test_the_log_has_a_line_for_each_exchange():
    with Running("--say", "a b") as server:
        chat(server, stream=True)
        chat(server, path="/v1/nothing")
        _, said = server.end()
    first, second = sorted(said, key=lambda line: "/v1/nothing" in line)
    for part in ("127.0.0.1", "POST /v1/chat/completions", " 200 ", "complete", "5 events", " s"):
        assert part in first
    assert "/v1/nothing" in second and "404" in second


@posix
@pytest.mark.parametrize("flags, closes", [([], True), (["--trace"], True), (["--trace"], False)],
                         ids=["log, read end closed", "trace, read end closed", "trace, pipe full"])
def test_serving_goes_on_when_nobody_reads_what_it_prints(flags, closes):
    with Running(*flags) as server, dial(server) as client:
        if closes:
            server.process.stderr.close()
        for _ in range(200):
            client.sendall(posted(json.dumps({"model": "m", "prompt": "word " * 300}).encode()))
            assert read_past(client, b"}}").startswith(b"HTTP/1.1 200")
        server.process.terminate()      # 120 is Python's own for what it could not flush
        assert server.process.wait(30) in ((0, 120) if closes else (0,))


@posix
def test_the_last_lines_of_a_trace_are_printed():
    done = commanded("--trace", "--", *ASKING)
    assert "data: [DONE]" in done.stderr and done.stderr.splitlines()[-1].endswith(r"0\r\n")


@posix
def test_quiet_leaves_nothing_to_read():
    with Running("--quiet") as server:
        chat(server)
        assert server.end() == (0, [])


log_and_trace = pytest.mark.parametrize("flags", [[], ["--trace"]], ids=["log", "trace"])


@posix
@log_and_trace
@pytest.mark.parametrize("sent", [b"GET /\x1b[2J HTTP/1.1", b"GET /%1b[2J HTTP/1.1", b"GET /a\tb HTTP/1.1",
                                  b"G\x1bT / HTTP/1.1", "GET /\u2028 HTTP/1.1".encode()])
def test_nothing_that_a_client_sends_moves_the_cursor(sent, flags):
    with Running(*flags) as server:
        with dial(server) as client:
            client.sendall(sent + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            read_to_end(client)
        _, said = server.end()
    assert said and all(line.isprintable() for line in said)


@posix
@log_and_trace
@pytest.mark.parametrize("key", ["sk-right-0123456789", "sk-wrong-0123456789"])
def test_no_key_is_printed(flags, key):
    headers = {"Authorization": f"Bearer {key}", "authorization": f"bearer  {key}",
               "AUTHORIZATION": key, "API-Key": key}
    with Running(*flags, "--api-key", "sk-right-0123456789") as server:
        for name, value in headers.items():
            chat(server, headers={name: value})
        _, said = server.end()
    assert said and not [line for line in said if key in line]


@posix
def test_the_trace_masks_a_key_that_arrives_in_pieces():
    with Running("--trace") as server:
        with dial(server) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            for byte in request_bytes(headers={"Authorization": "Bearer sk-abcdefgh"}):
                client.sendall(bytes([byte]))
            got_on(client)
        said = "\n".join(server.end()[1])
    assert "uthorization" in said and "abcd" not in said and "efgh" not in said


@posix
def test_the_trace_marks_events_and_transfer_chunks_and_connections():
    with Running("--trace", "--quiet", "--say", "word") as server:
        together(4, lambda: chat(server, stream=True))
        _, said = server.end()
    told = [re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} #([1-4]) [<>] (.*)", line) for line in said]
    assert all(told)
    for number in "1234":
        mine = [line[2] for line in told if line[1] == number]
        assert mine[0].startswith("POST ") and mine.count("[event] data: [DONE]") == 1
        assert r"[transfer chunk] e\r\n" in mine and r"[transfer chunk] 0\r\n" in mine


# ----------------------------------------------------------------------------------
# A command beside the server.

VARIABLES = "OPENAI_BASE_URL OPENAI_API_BASE OPENAI_API_KEY NO_PROXY no_proxy".split()
SHOW = program("print(json.dumps({name: os.environ[name] for name in %r}))" % VARIABLES)


def beside(*words, flags=(), **options):
    return commanded(*flags, "--", *words, **options)


def environment_beside(*flags, **variables):
    return json.loads(beside(*SHOW, flags=flags, env=environment(**variables)).stdout)


def test_a_command_finds_the_server_in_its_environment():
    found = environment_beside()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", found["OPENAI_BASE_URL"])
    assert found["OPENAI_API_BASE"] == found["OPENAI_BASE_URL"] and found["OPENAI_API_KEY"]
    assert "127.0.0.1" in found["NO_PROXY"].split(",") and found["no_proxy"] == found["NO_PROXY"]


@pytest.mark.parametrize("flags, variables, key", [
    (["--api-key", "ours"], {"OPENAI_API_KEY": "theirs"}, "ours"),
    ([], {"OPENAI_API_KEY": "theirs"}, "theirs"),
    ([], {"OPENAI_COMPAT_API_KEYS": "a,b"}, "a")])
def test_a_command_gets_the_key_that_the_server_takes(flags, variables, key):
    assert environment_beside(*flags, **variables)["OPENAI_API_KEY"] == key


def test_what_needs_no_proxy_already_stays():
    assert "intra.example" in environment_beside(NO_PROXY="intra.example")["NO_PROXY"].split(",")


fast = pytest.mark.skipif(not openai_compat.FAST, reason="a device for speed is switched off")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/timerslack_ns"), reason="Linux alone")
SCHEDULE = ("print(sorted(os.sched_getaffinity(0)), "
            "open('/proc/self/timerslack_ns').read().strip())")


def ours():
    """What SCHEDULE prints where nobody asked for anything else."""
    with open("/proc/self/timerslack_ns") as slack:
        return "%s %s\n" % (sorted(os.sched_getaffinity(0)), slack.read().strip())


def threads_of(process):
    """The ids of the threads of a process, without its first."""
    return [int(id) for id in os.listdir("/proc/%d/task" % process.pid) if int(id) != process.pid]


@linux
@fast
@pytest.mark.parametrize("flags, cores", [
    ([], 1), (["--say", "x"], 1), (["--backend", "mine:backwards"], os.cpu_count()),
    (["--command", "true"], os.cpu_count())], ids=lambda value: str(value[:1])
    if isinstance(value, list) else "")
def test_only_code_of_ours_has_to_share_a_core(flags, cores, workplace):
    everywhere = os.sched_getaffinity(0)
    with Running(*flags, cwd=workplace) as server:
        used = [os.sched_getaffinity(id) for id in threads_of(server.process)]
        assert used and all(len(each) == min(cores, len(everywhere)) for each in used)
        assert os.sched_getaffinity(server.process.pid) == everywhere


@linux
@fast
@pytest.mark.parametrize("place", [0, -1])
def test_neighbouring_ports_have_cores_of_their_own(place):
    cores = sorted(os.sched_getaffinity(0))
    with Running(port=free_port(range(len(cores))[place], len(cores))) as server:
        assert os.sched_getaffinity(threads_of(server.process)[0]) == {cores[place]}


@linux
def test_a_command_runs_as_if_there_were_no_server():
    assert beside(*program(SCHEDULE)).stdout == ours()


@linux
def test_a_program_may_use_all_the_cores():
    words = " ".join(map(shlex.quote, program(SCHEDULE)))
    with Running("--command", words) as server:
        assert chat(server).text.split("]")[0] == ours().split("]")[0]


@linux
def test_a_connection_that_waits_does_not_work():
    def states():
        for id in threads_of(server.process):
            with open("/proc/%d/task/%d/stat" % (server.process.pid, id)) as stat:
                yield stat.read().rpartition(")")[2].split()[0]
    with Running("--quiet") as server, served(server):
        until(lambda: set(states()) == {"S"})


ASKING = [sys.executable, CLIENT, "chat", "Hello!"]
SCRIPTED = ["--script", "steps.json"]
BESIDE = {  # rule: (flags, command, its status, what it prints, what is said of errors)
    "the whole thing in one line": ([], ASKING, 0, "Hello!\n", ""),
    "the status of a command is the status": ([], program("sys.exit(3)"), 3, "", ""),
    "a command has its own dashes": ([], program("print(sys.argv[1:])", "--", "--version"), 0,
                                     "['--', '--version']\n", ""),
    "a command that is not there is a 127": ([], ["no-such-command"], 127, "",
                                             r".*no-such-command.*\n"),
    "nor at that place": ([], ["./no-such-command"], 127, "", r".*\./no-such-command.*\n"),
    "no command is a 127": ([], [], 127, "", r".+\n"),
    "a script that was followed is a 0": (SCRIPTED, ASKING, 0, "from the script\n", ""),
    "one that was not is a 1": (SCRIPTED, program(""), 1, "", r"(?s).*1 of 1 steps remain.*"),
    "unless the command has failed": (SCRIPTED, program("sys.exit(3)"), 3, "",
                                      r"(?s).*1 of 1 steps remain.*"),
    **({} if os.name == "nt" else {
        "a signal is 128 and its number": (
            [], program("os.kill(os.getpid(), signal.SIGTERM)"), 143, "", ""),
        "SIGKILL too": ([], program("os.kill(os.getpid(), signal.SIGKILL)"), 137, "", "")}),
}


@pytest.mark.parametrize("flags, words, status, printed, complained", rows(BESIDE))
def test_beside_a_command(workplace, flags, words, status, printed, complained):
    done = beside(*words, flags=flags, cwd=workplace)
    assert (done.returncode, done.stdout) == (status, printed)
    assert re.fullmatch(complained, done.stderr)


def test_the_port_is_obeyed_beside_a_command_and_no_proxy_names_its_host():
    port = free_port()
    found = environment_beside("--port", str(port), *(["--host", "127.0.0.5"] if sys.platform == "linux"
                                                      else []))
    host = re.fullmatch(rf"http://(.*):{port}/v1", found["OPENAI_BASE_URL"])[1]
    assert host in found["NO_PROXY"].split(",") and found["no_proxy"] == found["NO_PROXY"]


def test_a_failure_of_the_backend_is_a_1_although_the_command_said_0(workplace, tmp_path):
    (tmp_path / "faulty.py").write_text("def fails(request): raise ValueError('by the backend')")
    words = program("import urllib.request, urllib.error\n"
                    "try: urllib.request.urlopen(os.environ['OPENAI_BASE_URL'] + '/completions',"
                    " b'{\"model\": \"m\", \"prompt\": \"x\"}')\nexcept urllib.error.HTTPError: pass")
    done = beside(*words, flags=["--backend", "faulty:fails"], cwd=str(tmp_path))
    assert done.returncode == 1 and "ValueError: by the backend" in done.stderr
    (tmp_path / "tape").write_bytes(b"")
    done = beside(*words, flags=["--replay", "tape"], cwd=str(tmp_path))
    assert done.returncode == 1 and "The tape is empty" in done.stderr


@posix
def test_a_status_is_known_where_sigchld_was_ignored():
    code = ("signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
    assert finished(*program(code, SERVER, "--", "false")).returncode == 1


COUNTING = """
got = []
def note(number, _):
    got.append(number)
    if number == signal.SIGINT: door.sendall(b"i")
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
door = knock()
door.sendall(b"r")
while signal.SIGTERM not in got:
    signal.sigtimedwait([], 0.05) if hasattr(signal, "sigtimedwait") else signal.pause()
door.sendall(b"%d" % got.count(signal.SIGINT))
"""


@posix
@pytest.mark.parametrize("stdin", ["a terminal", "a file", "closed"])
def test_a_command_hears_ctrl_c_on_a_terminal_once(gate, stdin):
    pty = pytest.importorskip("pty")
    redirect = {"a terminal": "", "a file": " </dev/null", "closed": " <&-"}[stdin]
    line = " ".join(map(shlex.quote, [sys.executable, SERVER, "--", *gate.program(COUNTING)]))
    child, terminal = pty.fork()
    if not child:
        os.execve("/bin/sh", ["sh", "-c", f"exec {line}{redirect}"], environment())
    try:
        with gate.arrival() as door:
            assert door.recv(1) == b"r"
            os.write(terminal, b"\x03")
            assert door.recv(1) == b"i"
            os.kill(child, signal.SIGTERM)      # is handled after the server's own SIGINT
            assert door.recv(9) == b"1"
            assert os.waitpid(child, 0)[1] == 0
    finally:
        os.close(terminal)


@posix
@pytest.mark.parametrize("stdin", ["</dev/null", "<&-"])
def test_a_signal_for_the_server_alone_reaches_the_command(gate, stdin):
    line = " ".join(map(shlex.quote, [sys.executable, SERVER, "--", *gate.program(COUNTING)]))
    process = subprocess.Popen(["sh", "-c", f"exec {line} {stdin}"], stderr=subprocess.PIPE,
                               start_new_session=True, env=environment())
    with process.stderr, gate.arrival() as door:
        assert door.recv(1) == b"r"
        process.send_signal(signal.SIGINT)
        assert door.recv(1) == b"i"
        process.terminate()
        assert door.recv(9) == b"1" and process.wait(30) == 0 and process.stderr.read() == b""


@posix
@pytest.mark.parametrize("traps, serves", [("", False), ("trap '' HUP; ", True)], ids=["plain", "nohup"])
def test_a_hangup_ends_the_server_unless_it_was_ignored_at_the_start(traps, serves):
    start = ["sh", "-c", f'{traps}exec "$0" "$@"', sys.executable, SERVER]
    with Running(start=start) as server:
        server.process.send_signal(signal.SIGHUP)
        if serves:
            assert chat(server).status == 200
        assert server.end()[0] == 0


@posix
def test_a_command_that_cannot_be_run_is_one_clear_line(tmp_path):
    (tmp_path / "garbage").write_bytes(b"neither a script nor a binary\n")
    (tmp_path / "garbage").chmod(0o755)
    done = beside(str(tmp_path / "garbage"))
    assert done.returncode in (126, 127) and done.stderr.count("\n") == 1
    assert "garbage" in done.stderr


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_passed_on_to_the_command(gate, name):
    code = "signal.signal(signal.%s, lambda *_: sys.exit(7)); gate()" % name
    words = [sys.executable, SERVER, "--", *gate.program(code)]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
        with gate.arrival() as door:
            process.send_signal(getattr(signal, name))
            assert process.wait(PATIENCE) == 7 and ended(door)


def test_nothing_is_left_of_the_server_when_the_command_ends():
    url = beside(*SHOW).stdout
    port = int(re.search(r":(\d+)/v1", url)[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


# ----------------------------------------------------------------------------------
# The end.

HELD = ["--backend", "mine:held"]
endings = pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])


@contextlib.contextmanager
def held_reply(gate, workplace, *flags):
    """A server with a stream that is half told: (server, client, the door that holds it)."""
    with Running(*HELD, *flags, cwd=workplace) as server:
        with asking(server, str(gate.port), stream=True) as client, gate.arrival() as door:
            read_past(client, b'"one"')
            yield server, client, door


@posix
@endings
def test_a_signal_lets_running_replies_finish(gate, workplace, name):
    with held_reply(gate, workplace) as (server, client, door):
        server.process.send_signal(getattr(signal, name))
        until(lambda: is_closed(server))
        door.close()
        assert b"[DONE]" in read_past(client, b"0\r\n\r\n")
        assert server.process.wait(PATIENCE) == 0


@posix
@endings
def test_a_second_signal_cuts_them(gate, workplace, name):
    with held_reply(gate, workplace) as (server, client, _):
        server.process.send_signal(getattr(signal, name))
        until(lambda: is_closed(server))
        server.process.send_signal(getattr(signal, name))
        assert b"[DONE]" not in read_to_end(client)
        assert server.process.wait(PATIENCE) == 0


@posix
def test_a_third_signal_does_no_harm(gate, workplace):
    with held_reply(gate, workplace) as (server, client, _):
        for _ in range(5):
            server.process.terminate()
        read_to_end(client)
        status, said = server.end()
        assert status == 0 and "Traceback" not in "".join(said)


@posix
def test_an_idle_client_does_not_hold_up_the_end():
    with Running() as server, served(server) as client:
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0 and ended(client)


@posix
def test_a_signal_ends_the_programs_too(gate):
    line = " ".join(map(shlex.quote, gate.program("gate()")))
    with Running("--command", line) as server, asking(server):
        with gate.arrival() as door:
            server.process.terminate()
            until(lambda: is_closed(server))
            server.process.terminate()
            assert ended(door) and server.process.wait(PATIENCE) == 0


# ----------------------------------------------------------------------------------
# TLS.

def test_a_chat_over_tls_with_our_client(tls_files):
    with Running("--tls-cert", tls_files[0], "--tls-key", tls_files[1]) as server:
        words = [sys.executable, CLIENT, "chat", "Hello!", "--base-url", server.base_url]
        trusting = finished(*words, "--cafile", tls_files[0])
        assert server.base_url.startswith("https:") and trusting.stdout == "Hello!\n"
        assert finished(*words).returncode == 1


def test_an_event_over_tls_is_sent_before_the_next_is_there(tls_files):
    endless = Endless("one", more="two", waits=True)
    with Server(endless, tls=tls_files) as server, secured(server, tls_files) as client:
        client.sendall(request_bytes({**HI, "stream": True}))
        assert b"two" not in read_past(client, b'"one"')
        endless.go_on.set()
        read_past(client, b'"two"')


def test_a_context_does_as_well_as_files_and_silent_clients_block_nobody(tls_files):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*tls_files)
    with Server(tls=context) as server, contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(dial(server))
        with secured(server, tls_files) as client:
            client.sendall(request_bytes())
            assert got_on(client).text == "Hello, world!"


@pytest.mark.parametrize("version, answered", [
    ("TLSv1", "TLSV1_ALERT_PROTOCOL_VERSION"), ("TLSv1_1", "TLSV1_ALERT_PROTOCOL_VERSION"),
    ("TLSv1_2", None), ("TLSv1_3", None)])
def test_only_tls_1_2_and_newer_are_spoken(tls_files, version, answered):
    """What OpenSSL is configured to refuse is allowed here; Python 3.10 refuses it too."""
    context, said = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), None
    context.load_verify_locations(tls_files[0])
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with Running("--tls-cert", tls_files[0], "--tls-key", tls_files[1],
                 env=environment(OPENSSL_CONF=os.devnull)) as server, dial(server) as plain:
        try:
            context.wrap_socket(plain, server_hostname="127.0.0.1").close()
        except ssl.SSLError as error:
            said = error.reason
    assert said == answered


def test_a_client_without_tls_is_closed(tls_files):
    with Server(tls=tls_files) as server, asking(server) as client:
        with contextlib.suppress(ConnectionResetError):
            assert not read_to_end(client).startswith(b"HTTP")


def test_a_silent_client_over_tls_is_closed_in_time(tls_files):
    with Server(tls=tls_files, request_timeout=0.1) as server, dial(server) as client:
        assert ended(client)


def test_a_handshake_that_fails_leaves_nothing_behind(tls_files):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Server(tls=tls_files) as server:
            for raw in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b""):
                with dial(server) as client:
                    client.sendall(raw)
                    half_close(client)
                    read_to_end(client)
            until(lambda: not server.connections)
        gc.collect()
    assert [each for each in told if each.category is ResourceWarning] == []


def test_closing_does_not_wait_for_tls_connections(tls_files, caplog):
    with Server(tls=tls_files) as server, secured(server, tls_files) as kept:
        kept.sendall(get())
        read_past(kept, b"ok")
        with dial(server) as silent, contextlib.suppress(ConnectionError):
            server.close()
            assert len(read_to_end(silent)) < 10        # at most an alert of TLS
    assert "left behind" not in caplog.text


@posix
def test_sigterm_lets_a_reply_over_tls_finish(tls_files, gate, workplace):
    flags = ["--tls-cert", tls_files[0], "--tls-key", tls_files[1]]
    with Running(*HELD, *flags, cwd=workplace) as server, secured(server, tls_files) as client:
        client.sendall(request_bytes({"model": "m", "messages": user(str(gate.port)), "stream": True}))
        with gate.arrival():
            server.process.terminate()
            until(lambda: is_closed(server))
        assert b"[DONE]" in read_past(client, b"0\r\n\r\n") and server.process.wait(PATIENCE) == 0


def test_an_upstream_may_speak_tls(tls_files, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", tls_files[0])
    with Server(say("a", "b"), tls=tls_files) as first, Server(Relay(first.base_url)) as server:
        assert first.base_url.startswith("https:")
        assert chat(server, stream=True).text == chat(server).text == "ab"


def test_an_upstream_that_nobody_vouches_for_is_a_502(tls_files):
    with Server(tls=tls_files) as first, Server(Relay(first.base_url)) as server:
        got = chat(server)
    assert got.status == 502 and "certificate" in got.error["message"].lower()


@pytest.mark.parametrize("said", ["", "out('one'); "], ids=["silent", "speaking"])
def test_the_client_leaving_closes_an_upstream_that_speaks_tls(tls_files, gate, monkeypatch, said):
    monkeypatch.setenv("SSL_CERT_FILE", tls_files[0])
    with Server(command(gate.program(said + "gate()")), tls=tls_files) as first:
        with Server(Relay(first.base_url)) as server, asking(server, stream=True):
            door = gate.arrival()
        assert ended(door)


# ----------------------------------------------------------------------------------
# nginx before two processes, with the configuration of the README.

NGINX = """
daemon off; pid %(folder)s/pid; error_log %(folder)s/log; events { worker_connections 1024; }
http {
    access_log off; client_body_temp_path %(folder)s/body; proxy_temp_path %(folder)s/proxy;
    fastcgi_temp_path %(folder)s/f; uwsgi_temp_path %(folder)s/u; scgi_temp_path %(folder)s/s;
    %(site)s
}
"""


class Nginx:
    """nginx before two servers; its ports take the place of the README's."""

    def __init__(self, folder, *servers):
        if not shutil.which("nginx"):
            pytest.skip("needs nginx")
        self.server_address = "127.0.0.1", free_port()
        ports = [self.server_address[1], *(server.server_address[1] for server in servers)]
        site = re.sub(r"\b800([012])\b", lambda match: str(ports[int(match[1])]),
                      FILES["openai_compat.conf"])
        (folder / "conf").write_text(NGINX % {"folder": folder, "site": site.replace(
            "listen ", "listen 127.0.0.1:")})
        self.process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "conf")],
                                        stderr=subprocess.DEVNULL)
        until(lambda: not is_closed(self))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def processes(tmp_path, workplace):
    """nginx, and the two processes behind it."""
    with Running(*HELD, cwd=workplace) as one, Running(*HELD, cwd=workplace) as two:
        with Nginx(tmp_path, one, two) as nginx:
            yield nginx, one, two


@pytest.mark.system
def test_nginx_passes_an_event_before_the_next_is_there(processes, gate):
    with asking(processes[0], str(gate.port), stream=True) as client:
        first = read_past(client, b'"one"')
        gate.arrival().close()
        assert b'"two"' not in first and b'"two"' in read_past(client, b"[DONE]")


@pytest.mark.system
def test_a_killed_process_behind_nginx_costs_only_its_own_connections(processes, gate):
    nginx, one, _ = processes
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(asking(nginx, str(gate.port), stream=True))
                   for _ in range(20)]
        doors = [gate.arrival() for _ in clients]
        one.process.kill()
        one.process.wait()
        for door in doors:
            door.close()
        whole = [b"[DONE]" in read_to_end(client) for client in clients]
    assert whole.count(True) == 10


@pytest.mark.system
def test_after_a_process_was_killed_nginx_asks_the_other(processes):
    nginx, one, _ = processes
    one.process.kill()
    one.process.wait()
    for _ in range(4):
        assert chat(nginx, path="/v1/nothing").status == 404


@pytest.mark.system
def test_behind_nginx_one_process_after_the_other_can_be_restarted(processes, workplace):
    nginx, one, two = processes
    one.end()
    assert {chat(nginx, path="/v1/nothing").status for _ in range(4)} == {404}
    with Running(*HELD, cwd=workplace, port=one.server_address[1]):
        two.end()
        assert {chat(nginx, path="/v1/nothing").status for _ in range(4)} == {404}


@pytest.mark.system
def test_a_refusal_passes_nginx_unchanged(tmp_path):
    refusal = APIError(429, "Slow down.", headers={"retry-after-ms": "20"})
    with Server(Script(refusal)) as server, Nginx(tmp_path, server, server) as nginx:
        got = chat(nginx)
    assert (got.status, got.headers["retry-after-ms"]) == (429, "20")
    assert json.loads(got.body) == refusal.body()


# ==================================================================================
# THE PAGE, in a real browser (marker system)

# ----------------------------------------------------------------------------------
# Chromium, driven by chromedriver, whose protocol (W3C WebDriver) is JSON over HTTP.
# One browser serves all tests; each test has a new window and empty logs.

system = pytest.mark.system
MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
CHROMIUM_FLAGS = """headless no-sandbox disable-gpu disable-quic no-first-run disable-sync
                 disable-background-networking disable-component-update
                 disable-dev-shm-usage no-proxy-server""".split()
direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
ENTER, TAB, ESCAPE, SHIFT = "\ue007", "\ue004", "\ue00c", "\ue008"


class Browser:
    """A headless Chromium with an empty profile; evil.example is an address of ours."""

    def __init__(self, profile):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], text=True,
                                       stdout=subprocess.PIPE, start_new_session=True)
        started = (re.search(r"started successfully on port (\d+)", line)
                   for line in self.driver.stdout)
        self.url = f"http://127.0.0.1:{next(filter(None, started))[1]}/session"
        options = {"binary": shutil.which("chromium"), "args": [
            *("--" + flag for flag in CHROMIUM_FLAGS), f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP evil.example 127.0.0.1"]}
        answer = self("POST", "", capabilities={"alwaysMatch": {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}})
        self.url += "/" + answer["sessionId"]

    def __call__(self, method, path, **body):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode() if method == "POST" else None,
            {"content-type": "application/json"}, method=method)
        try:
            with direct(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            pytest.fail(error.read().decode().partition('"stacktrace"')[0])

    def cdp(self, command, **params):
        return self("POST", "/goog/cdp/execute", cmd=command, params=params)

    def close(self):
        with contextlib.suppress(OSError):
            self("DELETE", "")
        with contextlib.suppress(OSError):
            os.killpg(self.driver.pid, 9)       # whatever of its group is left
        self.driver.wait()
        self.driver.stdout.close()

    def open(self, server, listed=True):
        """Open the server's page, and wait for its model (or for the lack of one)."""
        self("POST", "/url", url=server.base_url[:-len("v1")])
        wait_for(lambda: bool(self.value("model")), listed)

    def js(self, script, *args):
        return self("POST", "/execute/sync", script=script, args=list(args))

    def type(self, *words):
        """Type on the keyboard, at whatever has the focus; SHIFT holds for its word."""
        strokes = []
        for word in words:
            shift = word[:1] == SHIFT
            strokes += [("keyDown", SHIFT)] * shift
            strokes += [(kind, key) for key in word[shift:] for kind in ("keyDown", "keyUp")]
            strokes += [("keyUp", SHIFT)] * shift
        self("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": [
            {"type": kind, "value": key} for kind, key in strokes]}])

    def click(self, selector):
        [element] = self("POST", "/element", using="css selector", value=selector).values()
        self("POST", f"/element/{element}/click")

    def say(self, *messages):
        """Send messages, one after the other's reply."""
        for message in messages:
            self.js("document.getElementById('text').focus()")
            self.type(message, ENTER)
            wait_for(self.is_idle)

    def is_idle(self):
        return self.js("return main.getAttribute('aria-busy')") == "false"

    def value(self, id):
        return self.js("return document.getElementById(arguments[0]).value", id)

    def fill(self, id, value):
        self.js("document.getElementById(arguments[0]).value = arguments[1]", id, value)

    def talk(self):
        """[(who, text)] of the lines of the conversation."""
        return [tuple(pair) for pair in self.js(
            "return [...talk.querySelectorAll('p')].map(p => [p.className, p.textContent])")]

    def wire(self):
        """[(seconds, what is new, envelope, the whole)] of the lines of the wire."""
        return [tuple(line) for line in self.js("""
            return [...wire.querySelectorAll('details')].map(line => {
                const [time, ...news] = line.firstChild.childNodes, envelope = news.pop();
                return [time.textContent, news.map(node => node.textContent).join("").trim(),
                        envelope.textContent.trim(), line.lastChild.textContent];
            })""")]

    def log(self, kind="browser"):
        return self("POST", "/se/log", type=kind)

    def violations(self):
        return [entry["message"] for entry in self.log() if "Security Policy" in
                entry["message"] or entry["source"] in ("security", "violation")]

    def requested(self):
        """The URLs that the page asked for, since the last look."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [event["params"]["request"]["url"] for event in events
                if event["method"] == "Network.requestWillBeSent"]


@system
def test_chromium_and_chromedriver_are_installed():
    assert MISSING == [], f"the page is not tested: install {' and '.join(MISSING)}"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    if MISSING:         # the test above tells it once
        pytest.skip(f"needs {' and '.join(MISSING)}")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """The browser in a new window, with logs that are empty."""
    chromium("POST", "/window", handle=chromium("POST", "/window/new", type="window")["handle"])
    for kind in ("browser", "performance"):
        chromium.log(kind)
    yield chromium
    chromium("DELETE", "/window")
    chromium("POST", "/window", handle=chromium("GET", "/window/handles")[0])


def wait_for(condition, expected=True, seconds=30):
    """Wait until a condition holds, or has a value."""
    end = time.monotonic() + seconds
    while condition() != expected and time.monotonic() < end:
        time.sleep(0.02)
    assert condition() == expected


def asked_of(server):
    """The exchanges about completions."""
    return [entry for entry in server.journal if entry.path == "/v1/chat/completions"]


# ------ what can be seen without a browser

def test_the_page_is_short_and_names_no_other_host():
    lines = openai_compat.PAGE.splitlines()
    assert len(lines) <= 170 and max(map(len, lines)) <= 110
    assert not re.search("//[a-z]|@import|url\\(", openai_compat.PAGE)


@pytest.mark.parametrize("word", """
    innerHTML outerHTML insertAdjacent document.write eval Function( srcdoc
    Storage cookie indexedDB caches""".split())
def test_the_page_inserts_text_as_text_and_keeps_nothing_in_the_browser(word):
    assert word not in openai_compat.PAGE


@pytest.mark.parametrize("quirk_header", [False, True])
def test_the_page_may_run_its_own_script_and_talk_to_its_server_and_no_more(quirk_header):
    with Server(quirk_header=quirk_header) as server, direct(server.base_url[:-2]) as response:
        headers, page = response.headers, response.read().decode()
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    for name, text in re.findall("(?s)<(style|script)>(.*?)</", page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{name}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:",
        "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'"}
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert not re.search(r" (on\w+|style)=", page.partition("<script>")[0])
    assert re.findall("<option>([^<]+)", page) == list(QUIRKS if quirk_header else ())


# ------ the conversation

HTML = ('<b id="bold">bold</b><script>window.ran = 1</script>'
        '<img src="/health" onerror="window.ran = 2"></p></main>')
OSLO, ROME = (ToolCall("get_weather", {"city": city}) for city in ("Oslo", "Rome"))
ANSWER = ("tool", "21 degrees, sunny")
TWO_CALLS = [("tool-call", 'get_weather {"city":"%s"}' % city) for city in ("Oslo", "Rome")]
REPLIES = {     # what a backend says, and what the conversation shows
    "text": ("Grüße, 世界! 👋", [("assistant", "Grüße, 世界! 👋")]),
    "refusal": (Reply(refusal="I will not."), [("refusal", "I will not.")]),
    "tool call": (OSLO, [TWO_CALLS[0], ANSWER]),
    "tool calls": ([OSLO, ROME], [*TWO_CALLS, ANSWER, ANSWER]),
    "both": (Reply("Wait.", tool_calls=[OSLO]), [("assistant", "Wait."), TWO_CALLS[0], ANSWER]),
    "no index": (Reply(tool_calls=[OSLO, ROME], quirk="missing_tool_index"),
                 [*TWO_CALLS, ANSWER, ANSWER]),
    "many ids": (Reply(tool_calls=[OSLO, ROME], quirk="duplicate_tool_id"),
                 [*TWO_CALLS, ANSWER, ANSWER])}


@system
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("said, shown", REPLIES.values(), ids=REPLIES)
def test_a_reply_is_shown_and_goes_out_with_the_next_message(browser, said, shown, stream):
    with Server(Script(said, "Fine.")) as server:
        browser.open(server)
        browser.click("#tool")
        if not stream:
            browser.click("#stream")
        browser.say("Hi", "And?")
        assert browser.talk() == [("user", "Hi"), *shown,
                                  ("user", "And?"), ("assistant", "Fine.")]
        first, second = asked_of(server)
        assert first.body.get("stream", False) is stream
        _, reply, *answers, _ = second.body["messages"]
        calls = [call["function"] for call in reply.get("tool_calls", ())]
        carried = [("assistant", reply["content"]), ("refusal", reply.get("refusal")),
                   *(("tool-call", f"{call['name']} {call['arguments']}") for call in calls),
                   *((answer["role"], answer["content"]) for answer in answers)]
        assert [line for line in carried if line[1]] == shown


@system
def test_html_in_a_reply_does_not_run(browser):
    with Server() as server:
        browser.open(server)
        browser.say(HTML)
        assert browser.js("return [window.ran, document.images.length, document.scripts.length,"
                          "document.getElementById('bold')]") == [None, 0, 1, None]
        browser.js("try { talk.innerHTML = '<b>bold</b>' } catch (error) {}")
        assert browser.talk() == [("user", HTML), ("assistant", HTML)]


@system
def test_the_reply_is_seen_as_it_comes(browser):
    go_on = threading.Event()

    def halting(request):
        yield "first"
        go_on.wait(30)
        yield ", second"

    with Server(halting) as server:
        browser.open(server)
        browser.type("Go!", ENTER)
        wait_for(browser.talk, [("user", "Go!"), ("assistant", "first")])
        go_on.set()
        wait_for(browser.talk, [("user", "Go!"), ("assistant", "first, second")])


LOST, BROKE_OFF = "The connection failed", "The reply broke off"
TOLD = {"no_finish": BROKE_OFF, "truncate": BROKE_OFF, "no_terminator": LOST, "reset": LOST,
         "html_502": "502: <", "error_event": "The server had an error",
         "bad_json": "An event is not JSON", "stall": "Stopped."}


@system
def test_a_server_that_is_gone_is_told_in_words(browser):
    with Server() as server:
        browser.open(server)
    browser.say("Anybody?")
    assert browser.talk()[-1][1].startswith(LOST)


@system
@pytest.mark.parametrize("quirk", QUIRKS)
def test_the_page_reads_a_reply_with_any_quirk_or_says_what_is_wrong(browser, quirk):
    with Server(say("Hé", "llo", " 👋"), quirk_header=True) as server:
        browser.open(server)
        browser.fill("quirk", quirk)
        browser.type("Hi", ENTER)
        if quirk == "stall":
            wait_for(lambda: ("assistant", "Hé") in browser.talk())
            browser.type(ESCAPE)
        wait_for(browser.is_idle)
        assert asked_of(server)[0].headers["x-quirk"] == quirk
        *rest, (who, text) = browser.talk()
        if quirk in TOLD:
            assert who == "note" and text.startswith(TOLD[quirk])
        else:
            assert (rest, who, text) == ([("user", "Hi")], "assistant", "Héllo 👋")


@system
@pytest.mark.parametrize("failure, note", [
    (APIError(429, "Too fast."), "429: Too fast."),
    (Reply(tool_calls=[OSLO], quirk="truncate@4"), BROKE_OFF)], ids=["refused", "cut"])
def test_a_message_that_fails_goes_back_into_the_box_and_not_into_the_conversation(
        browser, failure, note):
    with Server(Script("One.", failure, "Better.")) as server:
        browser.open(server)
        browser.say("a", "b")
        assert browser.talk()[-1][1].startswith(note) and browser.value("text") == "b"
        browser.say("")
        assert browser.talk()[2:] == [("user", "b"), ("assistant", "Better.")]
        assert [message["content"] for message in asked_of(server)[2].body["messages"]] == [
            "a", "One.", "b"]


@system
@pytest.mark.parametrize("how", ["Escape", "the button"])
def test_stop_lets_go_of_the_server_and_keeps_what_was_said(browser, how):
    with Server(Script(Reply("on and " * 10000, delay=0.01), "Fine.")) as server:
        browser.open(server)
        browser.type("Go!", ENTER)
        wait_for(lambda: len(browser.talk()), 2)
        browser.type(ESCAPE) if how == "Escape" else browser.click("#stop")
        wait_for(browser.is_idle)
        [_, (_, said), note] = browser.talk()
        assert note == ("note", "Stopped.")
        wait_for(lambda: asked_of(server)[0].outcome, "client left")
        browser.say("Again")
        assert browser.talk()[-2:] == [("user", "Again"), ("assistant", "Fine.")]
        assert asked_of(server)[1].body["messages"][1] == {"role": "assistant", "content": said}


@system
def test_an_empty_page_says_what_to_try_and_new_empties_it(browser):
    hints = "return document.getElementById('hints').offsetHeight > 0"
    with Server(Script("One.", "Two.")) as server:
        browser.open(server)
        assert browser.js(hints)
        browser.say("a")
        assert not browser.js(hints)
        browser.click("#new")
        assert (browser.talk(), browser.wire(), browser.js(hints)) == ([], [], True)
        browser.say("b")
        assert [message["content"] for message in asked_of(server)[1].body["messages"]] == ["b"]


@system
def test_a_wrong_key_is_told_and_nothing_is_left_of_it_when_it_is_corrected(browser):
    def give(key):
        browser.fill("key", "")
        browser.click("#key")
        browser.type(key, TAB)

    with Server(api_keys="secret") as server:
        browser.open(server, listed=False)
        wait_for(lambda: [text[:5] for who, text in browser.talk()], ["401: "])
        give("wrong")
        wait_for(lambda: ["Incorrect API key" in text for who, text in browser.talk()], [True])
        browser.say("Hi")
        assert [who for who, text in browser.talk()] == ["user", "note"]
        give("secret")
        wait_for(lambda: browser.value("model"), "echo")
        assert browser.talk() == [] and browser.value("text") == "Hi"
        browser.say("")
        assert browser.talk() == [("user", "Hi"), ("assistant", "Hi")]
        assert "secret" not in browser.js("return document.body.textContent + location + "
                                          "Object.values({...localStorage, ...sessionStorage})")


# ------ the wire

@system
def test_the_wire_shows_the_request_the_response_and_each_event(browser):
    with Server(api_keys="secret", quirk="comment") as server:
        browser.open(server, listed=False)
        browser.click("#new")
        browser.fill("key", "secret")
        browser.fill("model", "m")
        browser.say("Hello, world!")
        lines, entry = browser.wire(), asked_of(server)[0]
    times, news, _, wholes = zip(*lines)
    assert news[:2] == ("POST /v1/chat/completions", "200 OK")
    assert [new for new in news[2:] if new != ": comment"] == [
        'delta {"role":"assistant","content":"","refusal":null}', 'delta {"content":"Hello"}',
        'delta {"content":","}', 'delta {"content":" world"}', 'delta {"content":"!"}',
        'delta {} finish_reason "stop"', news[-3], "data: [DONE]"]
    assert news[-3].startswith('usage {"prompt_tokens":')
    assert news.count(": comment") == entry.events
    assert list(map(float, times)) == sorted(map(float, times))
    head, body = wholes[0].split("\n\n")
    assert head == "authorization: Bearer ***\ncontent-type: application/json"
    assert json.loads(body) == entry.body
    assert "content-type: text/event-stream" in wholes[1] and "x-request-id: req_" in wholes[1]
    for _, _, envelope, whole in lines:
        if envelope:
            assert json.loads(envelope).items() <= json.loads(whole[len("data: "):]).items()


@system
@pytest.mark.parametrize("clicks, fields", [
    ([], {"stream": True, "stream_options": {"include_usage": True}}), (["#stream"], {}),
    (["#stream", "#tool"], {"tools": ..., "tool_choice": "required"})])
def test_the_switches_choose_what_goes_out(browser, clicks, fields):
    with Server() as server:
        browser.open(server)
        for click in clicks:
            browser.click(click)
        browser.say("Hi")
        body = asked_of(server)[0].body
        assert set(body) == {"model", "messages", *fields}
        assert all(body[name] == value for name, value in fields.items() if value != ...)
        assert browser.js("return getComputedStyle(quirk.parentNode).display") == "none"
        assert (browser.talk()[1][0] == "tool-call") == ("tools" in fields)


@system
@pytest.mark.parametrize("how", ["the mouse", "the keyboard"])
def test_an_event_opens_to_show_all_of_it(browser, how):
    with Server() as server:
        browser.open(server)
        browser.say("Hi")
        browser.js("wire.querySelector('.event:not([open]) summary').focus()")
        browser.click(".event summary") if how == "the mouse" else browser.type(" ")
        assert browser.js("return wire.querySelector('.event[open] pre').offsetHeight > 0")


@system
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_envelope_is_dim_in_the_light_and_in_the_dark(browser, scheme):
    with Server() as server:
        browser.cdp("Emulation.setEmulatedMedia",
                    features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(server)
        browser.say("Hi")
        styles = browser.js("""return ['.event summary', '.event .envelope', '.event b'].map(
            selector => getComputedStyle(wire.querySelector(selector))).map(
            ({color, opacity}) => [color, opacity])""")
    ink, _, bold = [sum(map(int, re.findall(r"\d+", color)[:3])) for color, _ in styles]
    assert [float(opacity) < 1 for _, opacity in styles] == [False, True, False]
    assert ink < 200 and bold < 400 if scheme == "light" else ink > 500 and bold > 400


@system
def test_a_long_stream_is_all_said_while_the_wire_keeps_its_end(browser):
    with Server(lambda request: ("word " for _ in range(20000))) as server:
        browser.open(server)
        browser.type("Go!", ENTER)
        wait_for(browser.is_idle, seconds=120)
        assert browser.talk()[1][1] == "word " * 20000
        assert browser.js("return wire.getElementsByClassName('event').length") == 500
        news = [new for _, new, _, _ in browser.wire()]
        assert (news[2], news[-1]) == ("POST /v1/chat/completions", "data: [DONE]")
        assert browser.js("return [main, wire.parentNode].map(pane => pane.scrollTop)") == [0, 0]
        assert browser.js("return [talk, wire].every(pane => pane.getBoundingClientRect().bottom"
                          " <= pane.parentNode.getBoundingClientRect().bottom)")


# ------ for everybody, everywhere

@system
def test_the_keyboard_alone_is_enough(browser):
    def focus():
        return browser.js("const at = document.activeElement; return at.id || at.tagName")

    with Server(quirk_header=True) as server:
        browser.open(server)
        assert focus() == "text"
        browser.type("one", SHIFT + ENTER, "two", ENTER)
        wait_for(browser.talk, [("user", "one\ntwo"), ("assistant", "one\ntwo")])
        wait_for(browser.is_idle)
        order = []
        while "text" not in order:
            browser.type(TAB)
            order.append(focus())
            assert order[-1] == "BODY" or browser.js(
                "return getComputedStyle(document.activeElement).outlineStyle") != "none"
        summaries = browser.js("return wire.querySelectorAll('summary').length")
        assert [each for each in order if each != "BODY"] == [
            "send", "new", "ASIDE", *["SUMMARY"] * summaries,
            "model", "key", "stream", "tool", "quirk", "main", "text"]


@system
def test_each_control_has_a_name_and_the_reply_is_announced(browser):
    with Server(quirk_header=True) as server:
        browser.open(server)
        nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    names = {node["name"]["value"] for node in nodes if node["role"]["value"] in (
        "textbox", "checkbox", "combobox", "button", "main", "complementary")}
    assert names == {"Model", "Key", "Stream", "Tool", "Quirk", "Message", "Send", "New",
                     "Conversation", "Wire"}
    assert browser.js("return [talk.role, talk.ariaLive]") == ["log", "polite"]


@system
@pytest.mark.parametrize("width", [320, 699, 1280])
def test_no_window_is_too_narrow(browser, width):
    with Server(quirk_header=True) as server:
        browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=640,
                    deviceScaleFactor=1, mobile=False)
        browser.open(server)
        browser.say("x" * 400)
        browser.js("wire.querySelectorAll('details').forEach(line => { line.open = true; })")
        wide = browser.js("return [document.documentElement, main, wire.parentNode].map("
                          "element => element.scrollWidth - element.clientWidth)")
        left = browser.js("return wire.parentNode.getBoundingClientRect().left")
        assert wide == [0, 0, 0]
        assert (left == 0) == (width <= 700)


# ------ strangers

@system
def test_nothing_is_requested_from_elsewhere(browser):
    with Server() as server:
        browser.open(server)
        browser.say("Hi")
        asked = [url for url in browser.requested() if url.startswith("http")]
        assert {url[:len(server.base_url) - 2] for url in asked} == {server.base_url[:-2]}
        assert browser.violations() == []
        assert {entry.path for entry in server.journal} == {
            "/", "/v1/models", "/v1/chat/completions"}


@system
def test_the_policy_keeps_the_page_from_reaching_elsewhere(browser):
    with Server() as server, Server() as other:
        browser.open(server)
        browser.js("""window.blocked = [];
                      addEventListener("securitypolicyviolation",
                                       event => blocked.push(event.effectiveDirective));
                      fetch(arguments[0]).catch(() => 0);
                      new Image().src = arguments[0];
                      const script = document.createElement("script");
                      script.append("window.ran = 1");
                      try { document.body.append(script); } catch (error) {}""",
                   other.base_url + "/models")
        wait_for(lambda: {"connect-src", "img-src"} <= set(browser.js("return blocked")))
        assert other.journal == [] and browser.js("return window.ran") is None
        assert len(browser.js("return blocked")) >= 3


STRANGER = b"""<!doctype html><title>A stranger</title><iframe name=frame></iframe><script>
const [url, found] = [location.hash.slice(1), []];
const body = '{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}';
const framed = load => new Promise(resolve => {
  document.querySelector("iframe").onload = resolve; load(); });
const attempts = [
  () => fetch(url + "chat/completions", {method: "POST", body}),
  () => fetch(url + "chat/completions", {method: "POST", body, mode: "no-cors"}),
  () => fetch(url + "chat/completions", {method: "POST", body, headers: {
                "content-type": "application/json", authorization: "Bearer x"}}),
  () => fetch(url + "models"),
  () => fetch(url + "../journal"),
  () => navigator.sendBeacon(url + "chat/completions", body),
  () => framed(() => {
    const form = document.createElement("form"), input = document.createElement("input");
    Object.assign(form, {method: "POST", enctype: "text/plain", target: "frame",
                         action: url + "chat/completions"});
    [input.name, input.value] = [body.slice(0, -1) + ', "x": "', '"}'];
    form.append(input); document.body.append(form); form.submit();
  }),
  () => framed(() => { frame.location = url + "../"; }),
];
(async () => {
  for (const attempt of attempts) {
    try { found.push((await (await attempt()).text())); } catch (error) { found.push(""); }
  }
  try { found.push(frame.document.body.innerText); } catch (error) { found.push(""); }
  window.found = found;
})();
</script>"""


class Strange(http.server.BaseHTTPRequestHandler):
    """A page from elsewhere."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(STRANGER)

    def log_message(self, *args):
        pass


@pytest.fixture
def stranger():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://evil.example:{server.server_port}/"
        server.shutdown()


@system
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.example"])
def test_a_page_from_elsewhere_can_neither_read_nor_cause_a_reply(browser, stranger, host):
    asked = []
    with Server(lambda request: asked.append(request) or "secret") as server:
        browser("POST", "/url", url=f"{stranger}#http://{host}:{server.server_port}/v1/")
        wait_for(lambda: browser.js("return !!window.found"))
        assert set(browser.js("return found")) == {""}
        posts = [entry for entry in server.journal if entry.method == "POST"]
        assert asked == [] and {entry.status for entry in posts} == {403}
        assert all(entry.events == 0 for entry in server.journal)
    if host != "evil.example":      # where the page itself would open, it opens in no frame
        assert any("frame-ancestors" in message for message in browser.violations())


@system
def test_a_name_that_leads_here_does_not_open_the_page(browser):
    with Server() as server:
        browser("POST", "/url", url=f"http://evil.example:{server.server_port}/")
        assert "foreign_host" in browser.js("return document.body.innerText")


# ==================================================================================
# THE SDKS OF OTHERS (marker interop), and every quirk against every client

# ----------------------------------------------------------------------------------
# The SDKs of others.  `make interop` makes an environment for each; a script runs in
# one as a program of its own, and what it prints is what the SDK understood.

interop = pytest.mark.interop
OLD, FIRST, ONE, NEW = SDKS = ["openai-0.28.1", "openai-1.0.0", "openai-1", "openai"]

PRELUDE_OF_OLD = """
import asyncio, json, os, openai
openai.api_base, openai.api_key = os.environ["OPENAI_BASE_URL"], "any"
chat, complete = openai.ChatCompletion.create, openai.Completion.create
achat = openai.ChatCompletion.acreate
list_models, retrieve_model = openai.Model.list, openai.Model.retrieve
extra, Refused = dict, openai.error.OpenAIError
def plain(answer): return answer.to_dict_recursive()
def body_of(error): return (error.json_body or {}).get("error", {})    # none of a 503
def leave(stream): stream.close()
"""
PRELUDE_OF_NEW = """
import asyncio, json, os, openai
client = openai.OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="any")
chat, complete = client.chat.completions.create, client.completions.create
def achat(**fields):
    async_client = openai.AsyncOpenAI(base_url=client.base_url, api_key="any")
    return async_client.chat.completions.create(**fields)
list_models, retrieve_model = client.models.list, client.models.retrieve
def extra(**fields): return {"extra_body": fields}      # what 1.0.0 has no name for
Refused = openai.OpenAIError
def plain(answer): return answer.model_dump()
def body_of(error): return error.response.json()["error"]
def leave(stream): stream.response.close()
"""
ASK = """
ask = {"model": "m", "messages": [{"role": "user", "content": "Hello!"}]}
"""


def printed_by(command, base_url="", **options):
    """The lines that a program prints which finds the server in its environment."""
    found = environment(base_url, OPENAI_API_KEY="any", NO_PROXY="127.0.0.1",
                        **options.pop("variables", {}))
    done = finished(*command, env=found, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def python_of(sdk):
    """The Python of an environment that `make interop` has made."""
    python = HERE / ".venvs" / sdk / "bin" / "python"
    assert python.exists(), f"no .venvs/{sdk}: run `make interop`"
    return str(python)


def printed(sdk, script, base_url, *arguments):
    """The lines that a Python script prints in one of the environments."""
    return printed_by([python_of(sdk), "-X", "utf8", "-c", script, base_url, *arguments], base_url)


def said(sdk, script, server):
    """What a script prints that is written for all the generations of the SDK."""
    prelude = PRELUDE_OF_OLD if sdk == OLD else PRELUDE_OF_NEW
    return printed(sdk, prelude + ASK + script, server.base_url)


ADD = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}
CALLS = [ToolCall("add", {"a": 1}, id="call_1"), ToolCall("add", {"a": 2}, id="call_2")]
AWKWARD = ["你好 \U0001f600", "\u2028", "\u2029", "\x85", "\ud800 \x00 \x7f",
           "\\ \" \r\n\t </b>"]
HELLO = say("Hello", " world", "!")

READS = [  # rule, backend, script, what it prints
    ("a chat has its text, its reason and its usage", HELLO, """
answer = chat(**ask)
print(answer.object, answer.choices[0].message.role, answer.choices[0].message.content)
print(answer.choices[0].finish_reason, answer.usage.completion_tokens, type(answer.created))
print(answer.usage.prompt_tokens + 3 == answer.usage.total_tokens)
""", ["chat.completion assistant Hello world!", "stop 3 <class 'int'>", "True"]),

    ("a streamed chat comes piece by piece", HELLO, """
for chunk in chat(stream=True, **ask):
    delta = chunk.choices[0].delta
    print(chunk.object, repr(getattr(delta, "content", None)), chunk.choices[0].finish_reason)
""", ["chat.completion.chunk '' None", "chat.completion.chunk 'Hello' None",
      "chat.completion.chunk ' world' None", "chat.completion.chunk '!' None",
      "chat.completion.chunk None stop"]),

    ("the usage of a streamed chat comes last, without choices", HELLO, """
*_, last = chat(stream=True, **ask, **extra(stream_options={"include_usage": True}))
print(last.choices, dict(last.usage)["completion_tokens"])
""", ["[] 3"]),

    ("n choices are told apart by their index", HELLO, """
texts = ["", ""]
for chunk in chat(stream=True, n=2, **ask):
    for choice in chunk.choices:
        texts[choice.index] += getattr(choice.delta, "content", None) or ""
print(texts, [choice.index for choice in chat(n=2, **ask).choices])
""", ["['Hello world!', 'Hello world!'] [0, 1]"]),

    ("a completion obeys max_tokens and echo", HELLO, """
answer = complete(model="m", prompt="Well:", max_tokens=2, temperature=0, echo=True)
print(answer.object, answer.choices[0].text, answer.choices[0].finish_reason)
""", ["text_completion Well:Hello world length"]),

    ("a streamed completion obeys stop", HELLO, """
for chunk in complete(model="m", prompt=["x"], stop="wor", stream=True):
    print(chunk.object, repr(chunk.choices[0].text), chunk.choices[0].finish_reason)
""", ["text_completion 'Hello' None", "text_completion ' ' None", "text_completion '' stop"]),

    ("logprobs have their shape on both endpoints", HELLO, """
chosen = complete(model="m", prompt="x", logprobs=2).choices[0].logprobs
print(chosen.tokens, len(chosen.token_logprobs), chosen.text_offset)
chosen = plain(chat(**ask, **extra(logprobs=True, top_logprobs=2)))["choices"][0]["logprobs"]
print([(token["token"], len(token["top_logprobs"])) for token in chosen["content"]])
""", ["['Hello', ' world', '!'] 3 [1, 6, 12]", "[('Hello', 2), (' world', 2), ('!', 2)]"]),

    ("tool calls arrive whole", lambda request: CALLS, """
choice = plain(chat(**ask, **extra(tools=[%r])))["choices"][0]
print(choice["finish_reason"], choice["message"]["content"])
for call in choice["message"]["tool_calls"]:
    print(call["id"], call["type"], call["function"]["name"], call["function"]["arguments"])
""" % ADD, ["tool_calls None", 'call_1 function add {"a":1}', 'call_2 function add {"a":2}']),

    ("streamed tool calls are told apart by their index", lambda request: CALLS, """
ids, arguments = {}, {}
for chunk in chat(stream=True, **ask, **extra(tools=[%r])):
    for call in plain(chunk)["choices"][0]["delta"].get("tool_calls") or []:
        ids.setdefault(call["index"], []).append(call.get("id"))
        old = arguments.get(call["index"], "")
        arguments[call["index"]] = old + call["function"]["arguments"]
print(arguments, [list(filter(None, ids[i])) for i in ids], chunk.choices[0].finish_reason)
""" % ADD, ["""{0: '{"a":1}', 1: '{"a":2}'} [['call_1'], ['call_2']] tool_calls"""]),

    ("a forced tool is called with arguments that fit", echo, """
fields = extra(tools=[%r], tool_choice="required", parallel_tool_calls=False)
choice = plain(chat(**ask, **fields))["choices"][0]
call, = choice["message"]["tool_calls"]
print(call["function"]["name"], type(json.loads(call["function"]["arguments"])["a"]))
""" % ADD, ["add <class 'int'>"]),

    ("the legacy functions are called", echo, """
choice = chat(functions=[%r], function_call={"name": "add"}, **ask).choices[0]
call = choice.message.function_call
print(choice.finish_reason, call.name, type(json.loads(call.arguments)["a"]))
""" % ADD["function"], ["function_call add <class 'int'>"]),

    ("json_object and json_schema are obeyed", echo, """
schema = {"name": "s", "schema": {"type": "object", "properties": {"b": {"type": "boolean"}},
                                  "required": ["b"]}}
for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": schema}):
    text = chat(**ask, **extra(response_format=form)).choices[0].message.content
    print(form["type"], list(json.loads(text)))
""", ["json_object ['text']", "json_schema ['b']"]),

    ("the models are listed and shown", HELLO, """
print([model.id for model in list_models().data], retrieve_model("say").object)
""", ["['say'] model"]),

    ("an async stream is the same", HELLO, """
async def main():
    async for chunk in await achat(stream=True, **ask):
        print(repr(getattr(chunk.choices[0].delta, "content", None)), end=" ")
asyncio.run(main())
""", ["'' 'Hello' ' world' '!' None "]),

    ("no character is lost, streamed or not", lambda request: AWKWARD[int(request["text"])], """
for number in range(%d):
    ask["messages"][0]["content"] = str(number)
    print(ascii(chat(**ask).choices[0].message.content))
    pieces = [chunk.choices[0].delta for chunk in chat(stream=True, **ask)]
    print(ascii("".join(getattr(piece, "content", None) or "" for piece in pieces)))
""" % len(AWKWARD), [ascii(text) for text in AWKWARD for _ in range(2)]),
]


@interop
@pytest.mark.parametrize("sdk", SDKS)
@pytest.mark.parametrize("rule, backend, script, lines", READS, ids=[row[0] for row in READS])
def test_every_generation_reads_that(rule, backend, script, lines, sdk):
    with Server(backend) as server:
        assert said(sdk, script, server) == lines


EXCEPTIONS = [  # status, its exception in 0.28.1, since 1.0
    (400, "InvalidRequestError", "BadRequestError"),
    (401, "AuthenticationError", "AuthenticationError"),
    (403, "PermissionError", "PermissionDeniedError"),
    (404, "InvalidRequestError", "NotFoundError"),
    (422, "APIError", "UnprocessableEntityError"),
    (429, "RateLimitError", "RateLimitError"),
    (500, "APIError", "InternalServerError"),
    (503, "ServiceUnavailableError", "InternalServerError"),
]


def exception_of(status, sdk):
    return next(row[1 if sdk == OLD else 2] for row in EXCEPTIONS if row[0] == status)


DESCRIBE = """
if "client" in globals(): client.max_retries = 0
def describe(error): return body_of(error).get("code"), body_of(error).get("param")
def refused(**fields):
    try: print(next(iter(chat(**fields))))
    except Refused as error: print(type(error).__name__, describe(error))
"""


@interop
@pytest.mark.parametrize("sdk", SDKS)
@pytest.mark.parametrize("stream", [False, True])
def test_each_error_is_the_right_exception(sdk, stream):
    statuses = [row[0] for row in EXCEPTIONS]
    script = "for _ in range(%d): refused(stream=%s, **ask)" % (len(statuses), stream)
    with Server(Script(*[APIError(status, "No.") for status in statuses])) as server:
        lines = said(sdk, DESCRIBE + script, server)
        assert [line.split()[0] for line in lines] == [exception_of(status, sdk)
                                                       for status in statuses]
        assert [exchange.status for exchange in server.journal] == statuses


REFUSALS = [  # settings of the server, fields, status, code and param of the refusal
    (dict(api_keys=["right"]), {}, 401, "invalid_api_key", None),
    (dict(models=["other"]), {}, 404, "model_not_found", None),
    ({}, {"temperature": 5}, 400, "decimal_above_max_value", "temperature"),
    ({}, {"n": "2"}, 400, "invalid_type", "n"),
]


@interop
@pytest.mark.parametrize("sdk", SDKS)
@pytest.mark.parametrize("settings, fields, status, code, param", REFUSALS)
def test_each_refusal_of_the_server_names_its_cause(settings, fields, status, code, param, sdk):
    with Server(**settings) as server:
        lines = said(sdk, DESCRIBE + "refused(**ask, **%r)" % fields, server)
    assert lines == ["%s %s" % (exception_of(status, sdk), (code, param))]


@interop
@pytest.mark.parametrize("sdk", SDKS)
def test_an_error_in_mid_stream_raises(sdk):
    with Server(HELLO, quirk="error_event") as server:
        lines = said(sdk, DESCRIBE + """
try: print(*[chunk.choices[0].delta.content for chunk in chat(stream=True, **ask)])
except Refused as error: print(type(error).__name__)""", server)
    assert lines == ["APIError"]


@interop
@pytest.mark.parametrize("sdk", SDKS[1:])
def test_a_429_is_retried_when_the_server_says(sdk):
    slow = APIError(429, "Slow down.", headers={"retry-after-ms": "10", "retry-after": "0.01"})
    with Server(Script(slow, slow, "Hello!")) as server:
        assert said(sdk, "print(chat(**ask).choices[0].message.content)", server) == ["Hello!"]
        assert [exchange.status for exchange in server.journal] == [429, 429, 200]


@interop
@pytest.mark.parametrize("sdk", SDKS[1:])
def test_an_empty_account_is_not_retried(sdk):
    empty = APIError(429, "You are out of money.", code="insufficient_quota")
    with Server(Script(empty)) as server:
        assert said(sdk, DESCRIBE.replace("= 0", "= 2") + "refused(**ask)", server) == [
            "RateLimitError ('insufficient_quota', None)"]


@interop
@pytest.mark.parametrize("sdk", SDKS)
def test_leaving_a_stream_early_ends_the_backend(sdk):
    ended = threading.Event()

    def endless(request):
        try:
            while request["text"] == "Hello!":
                yield "x"
        finally:
            ended.set()

    with Server(endless) as server:
        assert said(sdk, """
stream = chat(stream=True, **ask)
next(iter(stream)); leave(stream); del stream
print(chat(model="m", messages=[{"role": "user", "content": "Bye."}]).choices[0].finish_reason)
""", server) == ["stop"]
        assert ended.wait(5)
    assert [exchange.outcome for exchange in server.journal] == ["client left", "complete"]


@interop
@pytest.mark.parametrize("sdk", SDKS)
def test_pieces_arrive_while_the_backend_still_works(sdk):
    arrived = threading.Event()

    def backend(request):
        if request["text"] == "The first has arrived.":
            arrived.set()
        yield "first"
        yield "second" if arrived.wait(5) else "too late"

    with Server(backend) as server:
        assert said(sdk, """
for chunk in chat(stream=True, **ask):
    print(getattr(chunk.choices[0].delta, "content", None), end=" ")
    if getattr(chunk.choices[0].delta, "content", None) == "first":
        chat(model="m", messages=[{"role": "user", "content": "The first has arrived."}])
""", server) == [" first second None "]


@interop
def test_0_28_as_the_reference_documents_call_it():
    with Server() as server:
        assert printed(OLD, """
import sys, openai
openai.api_base = sys.argv[1]
openai.api_key = "EMPTY"
messages = [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "你好"}]
reply = openai.ChatCompletion.create(model="gpt-3.5-turbo", messages=messages)
print(reply["choices"][0]["message"]["content"], reply.usage.total_tokens > 0)
for chunk in openai.ChatCompletion.create(model="gpt-3.5-turbo", messages=messages, stream=True):
    print(chunk["choices"][0]["delta"].get("content", ""), end="|")
print(chunk.choices[0].finish_reason, dict(chunk.choices[0].delta), len(chunk.id))
reply = openai.Completion.create(engine="gpt-3.5-turbo-instruct", prompt="Say this is a test",
                                 max_tokens=2, temperature=0)
print(reply["choices"][0]["text"], reply["choices"][0]["finish_reason"])
for chunk in openai.Completion.create(model="m", prompt="你好", stream=True):
    print(chunk["choices"][0]["text"], end="|")
""", server.base_url) == ["你好 True", "|你|好||stop {} 38", "Say this length", "你|好||"]


# ------ what only the newer generations have

@interop
@pytest.mark.parametrize("sdk", [ONE, NEW])
def test_the_accumulating_helper_rebuilds_text_and_calls(sdk):
    with Server(lambda request: Reply("Hello world!", tool_calls=CALLS)) as server:
        assert said(sdk, """
tool = %r
tool["function"]["strict"] = True
kinds = []
with client.chat.completions.stream(tools=[tool], **ask) as stream:
    for event in stream:
        if event.type not in kinds: kinds.append(event.type)
    choice = stream.get_final_completion().choices[0]
print(*sorted(kinds))
print(choice.message.content, choice.finish_reason)
print([(call.id, call.function.parsed_arguments) for call in choice.message.tool_calls])
""" % ADD, server) == [
            "chunk content.delta content.done tool_calls.function.arguments.delta "
            "tool_calls.function.arguments.done",
            "Hello world! tool_calls", "[('call_1', {'a': 1}), ('call_2', {'a': 2})]"]


@interop
@pytest.mark.parametrize("sdk", [ONE, NEW])
def test_a_typed_parse_gets_an_instance_of_its_model(sdk):
    with Server() as server:
        assert said(sdk, """
from typing import List, Literal, Optional
from pydantic import BaseModel, Field
class Step(BaseModel):
    text: str
    kind: Literal["think", "act"]
    next: Optional["Step"]
class Plan(BaseModel):
    steps: List[Step]
    cost: float
    name: str
parsed = client.chat.completions.parse(response_format=Plan, **ask).choices[0].message.parsed
print(type(parsed).__name__, type(parsed.cost).__name__, type(parsed.steps).__name__)
with client.chat.completions.stream(response_format=Plan, **ask) as stream:
    print(stream.get_final_completion().choices[0].message.parsed == parsed)
tools = [openai.pydantic_function_tool(Plan)]
answer = client.chat.completions.parse(tools=tools, tool_choice="required", **ask)
print(type(answer.choices[0].message.tool_calls[0].function.parsed_arguments).__name__)
""", server) == ["Plan float list", "True", "Plan"]


@interop
@pytest.mark.parametrize("sdk", [ONE, NEW])
def test_a_parse_cut_short_is_a_length_error(sdk):
    with Server(say('{"a": 1', "}")) as server:
        assert said(sdk, """
from pydantic import BaseModel
class A(BaseModel): a: int
try: client.chat.completions.parse(response_format=A, max_tokens=1, **ask)
except openai.LengthFinishReasonError as error: print("length")
""", server) == ["length"]


# ------ clients written by hand

BY_HAND = '''
import json, sys, requests
base = sys.argv[1]
headers = {"Content-Type": "application/json", "Authorization": "Bearer EMPTY"}

def chat_completions(messages, stream=False, path="/chat/completions", **fields):
    return post(path, stream, {"messages": messages, **fields})

def completions(prompt, stream=False, **fields):
    return post("/completions", stream, {"prompt": prompt, **fields})

def post(path, stream, fields):
    fields = {"model": "m", "stream": stream, "max_tokens": 100, "temperature": 0.8, "top_p": 1,
              "presence_penalty": 0, "frequency_penalty": 0, **fields}
    response = requests.post(base + path, headers=headers, json=fields, stream=stream)
    return read(response) if stream else response.json()["choices"][0]

def read(response):
    for line in response.iter_lines():
        if line:
            line = line.decode("utf-8").replace("data: ", "")
            if line != "[DONE]":
                yield json.loads(line)["choices"][0]

hello = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好"}]
'''


@interop
@pytest.mark.parametrize("script, lines", [
    ("print(chat_completions(hello)['message']['content'])", ["你好"]),
    ("print(completions('你好')['text'])", ["你好"]),
    ("print(*[c['text'] for c in completions('你好', True)], sep='|')", ["你|好|"]),
    ("print(*[c['delta'].get('content') for c in chat_completions(hello, True)], sep='|')",
     ["|你|好|None"]),
    ("base = base[:-len('/v1')]\n"
     "print(*[c['delta'].get('content') for c in chat_completions(hello, True, '/sse')], sep='|')",
     ["|你|好|None"]),
], ids=["chat", "completion", "streamed completion", "streamed chat", "POST /sse"])
def test_requests_reads_as_the_reference_documents_do(script, lines):
    with Server() as server:
        assert printed("requests", BY_HAND + script, server.base_url) == lines


# A command that gets the fixture: the newest SDK for Node that this Node can run.
NODE_SCRIPT = """
const OpenAI = require("openai");
(async () => {
  const ask = {model: "m", messages: [{role: "user", content: "Hello!"}]};
  const client = new OpenAI();
  const stream = await client.chat.completions.create({...ask, stream: true});
  for await (const chunk of stream)
    console.log(JSON.stringify(chunk.choices[0].delta.content ?? null));
  const helper = client.chat.completions.stream(ask);
  console.log(await helper.finalContent());
})();
"""


@interop
@pytest.mark.skipif(not shutil.which("node"), reason="no node here")
def test_a_command_in_node_gets_the_server_and_streams():
    installed = HERE / ".venvs" / "node"
    assert (installed / "ready").exists(), "no .venvs/node: run `make interop`"
    lines = printed_by([sys.executable, SERVER, "--quiet", "--say", "Hello world", "--",
                        "node", "-e", NODE_SCRIPT], cwd=str(installed))
    assert lines == ['""', '"Hello"', '" world"', "null", "Hello world"]


# ----------------------------------------------------------------------------------
# The torture list: what three clients make of every quirk.  The newest official SDK
# with its accumulating helper, requests with the line reader that people write by
# hand, and the client of this house, which is right or says what is wrong, always.

RIGHT = 'assistant Hello big world tool_calls add{"a":1} add{"a":2}'
NO_ROLE, NO_REASON = RIGHT.replace("assistant", "None"), RIGHT.replace("tool_calls", "None")
ROLES, REPEATED = RIGHT.replace("assistant", "assistant+"), RIGHT.replace("add", "add+")
CUT_SHORT = "assistant Hello None"          # taken for whole
TORTURE = {  # quirk: (the official SDK, requests by hand, client.Client)
    "comment":            (RIGHT, "JSONDecodeError", RIGHT),
    "crlf":               (RIGHT, RIGHT, RIGHT),
    "no_space":           (RIGHT, "JSONDecodeError", RIGHT),
    "bom":                (NO_ROLE, "JSONDecodeError", RIGHT),
    "id_field":           ("JSONDecodeError", "JSONDecodeError", RIGHT),
    "retry_block":        ("JSONDecodeError", "JSONDecodeError", RIGHT),
    "empty_data":         ("JSONDecodeError", "JSONDecodeError", RIGHT),
    "split_bytes":        (RIGHT, RIGHT, RIGHT),
    "one_write":          (RIGHT, RIGHT, RIGHT),
    "no_role":            (NO_ROLE, NO_ROLE, RIGHT),
    "role_every":         (ROLES, RIGHT, RIGHT),
    "usage_always":       (RIGHT, "IndexError", RIGHT),
    "no_done":            (RIGHT, RIGHT, RIGHT),
    "no_finish":          (NO_REASON, NO_REASON, "StreamTruncated"),
    "no_terminator":      (RIGHT, RIGHT, RIGHT),
    "missing_tool_index": ("TypeError", "KeyError", RIGHT),
    "duplicate_tool_id":  (REPEATED, REPEATED, RIGHT),
    "bad_json":           ("JSONDecodeError", "JSONDecodeError", "BadReply"),
    "error_event":        ("APIError", "KeyError", "APIError"),
    "truncate":           (CUT_SHORT, CUT_SHORT, "StreamTruncated"),
    "stall":              ("APITimeoutError", "ConnectionError", "ConnectionFailed"),
    "reset":              ("APIConnectionError", "ChunkedEncodingError", "StreamTruncated"),
    "html_502":           ("InternalServerError", "JSONDecodeError", "APIError"),
}

READERS = {"openai": """
import openai
client = openai.OpenAI(base_url=base_url, api_key="any", timeout=1, max_retries=0)
def read(quirk):
    with client.chat.completions.stream(**ask, extra_headers={"X-Quirk": quirk}) as stream:
        return stream.get_final_completion().choices[0].model_dump()
""", "requests": """
import requests
def read(quirk):
    response = requests.post(base_url + "/chat/completions", json={**ask, "stream": True},
                             headers={"X-Quirk": quirk}, stream=True, timeout=1)
    message, calls = {"role": None, "content": ""}, {}
    for line in response.iter_lines():
        if line:
            line = line.decode("utf-8").replace("data: ", "")
            if line == "[DONE]":
                break
            choice = json.loads(line)["choices"][0]
            delta = choice["delta"]
            message["role"] = delta.get("role", message["role"])
            message["content"] += delta.get("content") or ""
            for part in delta.get("tool_calls", ()):
                call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
                for name in part["function"]:
                    call[name] += part["function"][name]
    message["tool_calls"] = [{"function": call} for call in calls.values()]
    return {"message": message, "finish_reason": choice["finish_reason"]}
""", "client": """
import client
def read(quirk):
    ours = client.Client(base_url, timeout=1, max_retries=0)
    ours.headers["X-Quirk"] = quirk
    return client.fold(ours.chat_completions(**ask, stream=True))["choices"][0]
"""}
TORTURE_SCRIPT = r"""
import json, re, sys
base_url, *quirks = sys.argv[1:]
ask = {"model": "m", "messages": [{"role": "user", "content": "Hello!"}]}
%s
def brief(quirk):
    try:
        choice = read(quirk)
    except Exception as error:
        return type(error).__name__
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    words = [str(message["role"]), message["content"], str(choice["finish_reason"])]
    words += [call["name"] + call["arguments"] for call in calls]
    return re.sub(r"\b(\w\w+?)\1+\b", r"\1+", " ".join(words))     # addadd -> add+
for quirk in quirks:
    print(brief(quirk))
"""


@pytest.fixture(scope="module")
def tortured():
    """A function of a reader: {quirk: what it made of it}, each reader being run once."""
    results = {}

    def read(reader):
        if reader not in results:
            script = TORTURE_SCRIPT % READERS[reader]
            answer = Reply("Hello big world", tool_calls=CALLS)
            with Server(lambda request: answer, quirk_header=True) as server:
                if reader == "client":
                    command = [sys.executable, "-c", script, server.base_url, *QUIRKS]
                    lines = printed_by(command, cwd=str(HERE))
                else:
                    lines = printed(reader, script, server.base_url, *QUIRKS)
            results[reader] = dict(zip(QUIRKS, lines))
        return results[reader]
    return read


@pytest.mark.parametrize("column, reader", [
    pytest.param(0, "openai", marks=interop), pytest.param(1, "requests", marks=interop),
    (2, "client")], ids=["openai", "requests", "client"])
@pytest.mark.parametrize("quirk", QUIRKS)
def test_of_each_quirk_a_client_makes_what_the_table_says(quirk, column, reader, tortured):
    assert tortured(reader)[quirk] == TORTURE[quirk][column]


def test_the_readme_says_what_the_official_sdk_makes_of_broken_events():
    said = re.search(r"The newest official SDK raises(.*?)\n\n", README, re.DOTALL)[1]
    errors, silent = said.split("It is silent about")
    named = set(re.findall(r"`(\w+)`", errors))
    assert named == {quirk for quirk in QUIRKS if TORTURE[quirk][0] == "JSONDecodeError"}
    assert re.findall(r"`(\w+)`", silent) == [
        quirk for quirk in QUIRKS if TORTURE[quirk][0] == CUT_SHORT]


def test_this_client_is_right_about_every_quirk_or_names_the_error():
    for quirk, (_, _, ours) in TORTURE.items():
        assert ours == RIGHT or issubclass(getattr(client, ours), client.ClientError), quirk


# ----------------------------------------------------------------------------------
# Many fixtures at once, as parallel test runners make them.

FIFTY_FIXTURES = """
import contextlib, os, sys, threading, urllib.request
from openai_compat import Server, say

def held():
    descriptors = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0
    return threading.active_count(), descriptors

with Server() as server:            # what is made once and kept is made now
    urllib.request.urlopen(server.base_url + "/models").read()
before = held()
for _ in range(5):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(say("x"))) for _ in range(10)]
        for server in servers:
            urllib.request.urlopen(server.base_url + "/models").read()
        print(*[server.server_port for server in servers])
print(held() == before or (before, held()))
"""


def test_500_fixtures_in_10_processes_do_not_clash_and_leave_nothing():
    command = [sys.executable, "-c", FIFTY_FIXTURES]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  cwd=str(HERE), universal_newlines=True) for _ in range(10)]
    for process in processes:
        lines = process.communicate(timeout=300)[0].splitlines()
        assert process.returncode == 0, lines
        assert lines[-1] == "True" and len(lines) == 6
        assert all(len(set(line.split())) == 10 for line in lines[:-1])


# ==================================================================================
# THE README: what it says is run

# ----------------------------------------------------------------------------------
# The blocks of the README.  A block after a paragraph that ends with a `file` and a colon
# is that file.  In a transcript … is what is left out: within a line any text, on a line
# of its own any lines.

README = (HERE / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", README, re.MULTILINE))


def blocks_of_the_readme():
    """(section, language, text, the paragraph before it) of each block."""
    found = []
    for section, words in SECTIONS.items():
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", words, re.MULTILINE | re.DOTALL):
            before = words[:match.start()].rstrip("\n").rpartition("\n\n")[2]
            found.append((section, match[1], match[2], before))
    first = README[:README.index("\n## ")]
    return [("", language, text, "") for language, text in
            re.findall(r"^```(\w+)\n(.*?)^```$", first, re.MULTILINE | re.DOTALL)] + found


def file_of(paragraph):
    """The name of the file that a paragraph announces, or None."""
    named = re.findall(r"`(\w+\.\w+)`(?:, for\s`[^`]*`| of [\w ]+)?:$", paragraph)
    return named[0] if named else None


BLOCKS = blocks_of_the_readme()
FILES = {file_of(before): text for _, _, text, before in BLOCKS if file_of(before)}
CONFTESTS = [text for _, _, text, before in BLOCKS
             if "def server" in text and "def test_" not in text]


def block(language, containing):
    """The text of the one block of a language in which something stands."""
    found = [text for _, kind, text, _ in BLOCKS if kind == language and containing in text]
    assert len(found) == 1, (language, containing, len(found))
    return found[0]


AN_APPLICATION = block("python", "subprocess.Popen")


def transcript(text):
    """[command, what it prints] of a console block; four spaces continue a command."""
    commands = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append([line[2:], ""])
        elif line.startswith("    ") and not commands[-1][1]:
            commands[-1][0] += "\n" + line
        else:
            commands[-1][1] += line + "\n"
    return commands


def pattern(expected):
    """A regular expression for what a transcript shows."""
    return "".join(r"(?:.*\n)*?" if line == "…" else
                   ".*".join(map(re.escape, without_times(line).split("…"))) + r"\n"
                   for line in expected.splitlines())


def without_times(text):
    return re.sub(r"\d\d:\d\d:\d\d\.\d\d\d", "00:00:00.000", text)


# ----------------------------------------------------------------------------------
# The desk is where they are run: the two files, those that the README shows, and
# `python3` for the Python of this test.

# As much of some packages and programs as the README's recipes touch.
STUBS = {
    "tiktoken.py": '''
class Encoding:
    def __init__(self, name, mergeable_ranks, special_tokens, pat_str):
        self.ranks = mergeable_ranks
    def encode(self, text, disallowed_special):
        return [self.ranks[bytes([byte])] for byte in text.encode()]
    def decode_with_offsets(self, tokens):
        text, starts = bytes(tokens).decode(), []
        for i, character in enumerate(text):
            starts += [i] * len(character.encode())
        return text, starts
''',
    "ranks.tiktoken": "".join("%s %d\n" % (base64.b64encode(bytes([i])).decode(), i)
                              for i in range(256)),
    # An agent, which the README leaves to its reader.
    "agent.py": '''
import json

def agent(client, question, tools):
    messages = [{"role": "user", "content": question}]
    while True:
        reply = client.chat_completions(messages)["choices"][0]["message"]
        messages.append(reply)
        if not reply.get("tool_calls"):
            return reply["content"]
        for call in reply["tool_calls"]:
            result = tools[call["function"]["name"]](**json.loads(call["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
''',
    # An application that runs as a process of its own, and answers over HTTP.
    "app.py": '''
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from client import Client

class Application(BaseHTTPRequestHandler):
    def do_GET(self):
        reply = Client().chat_completions(self.path, model="any")
        self.wfile.write(reply["choices"][0]["message"]["content"].encode())

HTTPServer(("127.0.0.1", int(os.environ["APP_PORT"])), Application).serve_forever()
''',
}
PROGRAMS = {
    "python3": 'exec "%s" "$@"' % sys.executable,
    "npm": 'for ask in 1 2 "3 --temperature 0"; do python3 client.py chat $ask || exit; done',
    "llama-cli": 'shift 4; printf %s "$1"',     # says the prompt, which is the 5th argument
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for name in ("openai_compat.py", "client.py"):
        shutil.copy(str(HERE / name), str(folder))
    for name, text in {**FILES, **STUBS}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "conftest.py").unlink()
    (folder / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (folder / "bin" / name).write_text("#!/bin/sh\n%s\n" % text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def surroundings(folder, **more):
    """The environment of a newcomer, who has set nothing."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("OPENAI_", "PYTEST_", "PYTHON"))
            and "proxy" not in name.lower()}
    path = "%s%s%s" % (folder / "bin", os.pathsep, os.environ["PATH"])
    return {**kept, "PATH": path, "PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8", **more}


class Serving:
    """`python3 openai_compat.py ...` on a free port, until the end of the with block."""

    def __init__(self, folder, command):
        self.process = subprocess.Popen(
            ["bash", "-c", "exec %s --port 0" % command], cwd=str(folder),
            env=surroundings(folder), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
            universal_newlines=True)
        self.greeting = self.process.stderr.readline()
        self.port = re.search(r":(\d+)/v1", self.greeting)[1]
        self.base_url = "http://127.0.0.1:%s/v1" % self.port

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def serving(desk):
    with Serving(desk, "python3 openai_compat.py") as server:
        yield server


LESSON = block("console", "Serving")


@pytest.fixture(scope="module")
def lesson(desk):
    (command, greeting), = transcript(LESSON)
    with Serving(desk, command) as server:
        assert greeting == server.greeting.replace(":%s/" % server.port, ":8000/")
        yield server


def run_commands(folder, commands, server, **more):
    """(what it prints, its status) of each command, in one bash; 8000 becomes the
    server's port."""
    script = "\n".join("%s\nstatus=$?; echo; echo '<ended>' $status; (exit $status)" % command
                       for command in commands)
    done = subprocess.run(
        ["bash"], input=script.replace("8000", server.port), cwd=str(folder),
        env={**surroundings(folder, OPENAI_BASE_URL=server.base_url), **more},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, universal_newlines=True)
    printed = done.stdout.replace(":%s/" % server.port, ":8000/")
    parts = re.split(r"(?:(?<=\n)|(?<!\n)\n|\A)\n?<ended> (\d+)\n", printed)
    assert len(parts) == 2 * len(commands) + 1, printed
    printed = [text + "\n" * (text[-1:] not in ("", "\n")) for text in parts[::2]]
    return list(zip(printed, map(int, parts[1::2])))


CONSOLES = [(section, text) for section, language, text, _ in BLOCKS
            if language == "console" and text != LESSON]


@pytest.mark.parametrize("section, text", CONSOLES,
                         ids=lambda each: transcript(each)[0][0][:60] if "$" in each else "")
def test_a_transcript_of_the_readme_is_what_is_printed(request, desk, section, text):
    server = request.getfixturevalue("lesson" if section == "A lesson" else "serving")
    expected = transcript(text)
    printed = run_commands(desk, [command for command, _ in expected], server)
    for (command, shown), (got, _) in zip(expected, printed):
        assert re.fullmatch(pattern(shown), without_times(got)), (command, shown, got)


# ----------------------------------------------------------------------------------
# The recipes are run by pytest as they stand; those that import openai in `make interop`.

TESTS = [text for _, language, text, _ in BLOCKS if language == "python" and "def test_" in text]


def needs_openai(text):
    return re.search(r"^import .*\bopenai\b", text, re.MULTILINE)


def run_pytest(python, folder, *arguments, options=(), **more):
    """What pytest says about the tests of a folder; all of them must pass."""
    done = subprocess.run(
        [str(python), *options, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=str(folder), env=surroundings(folder, **more), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def put(folder, desk, **texts):
    """A folder with the desk's modules and these texts as further ones."""
    shutil.copytree(str(desk), str(folder))
    for name, text in texts.items():
        (folder / (name + ".py")).write_text(text, encoding="utf-8")
    return folder


def test_the_recipes_of_the_readme_pass(desk, tmp_path):
    texts = [text for text in TESTS if not needs_openai(text)]
    folder = put(tmp_path / "recipes", desk,
                 **{"test_%d" % i: text for i, text in enumerate(texts)})
    assert run_pytest(sys.executable, folder) == len(texts) - 1 + len(QUIRKS)


@pytest.mark.interop
def test_the_recipes_of_the_readme_with_the_official_sdk_pass(desk, tmp_path):
    texts = [text for text in TESTS if needs_openai(text)]
    folder = put(tmp_path / "recipes", desk,
                 **{"test_%d" % i: text for i, text in enumerate(texts)})
    assert run_pytest(SDK, folder, "-W", "error") == len(texts) >= 3


def test_a_recipe_of_the_readme_has_at_most_12_lines():
    recipes = [*TESTS, *CONFTESTS, AN_APPLICATION, *map(FILES.get, (
        "wrapper.py", "responding.py", "embedding.py"))]
    for text in recipes:
        lines = [line for line in text.splitlines()
                 if line.strip() and not line.startswith(("import ", "from "))]
        assert len(lines) <= 12, text


ONE_SERVER_PER_TEST = '''
import pytest
from client import Client

@pytest.mark.parametrize("text", ["Hello!", "Bye!"])
def test_each_test_has_a_server_of_its_own(server, text):
    server.backend = text
    assert Client().chat_completions("Hi")["choices"][0]["message"]["content"] == text
    assert len(server.journal) == 2         # GET /v1/models, and the question
'''
AN_APPLICATION_THAT_STAYS = '''
import os, socket, time, pytest

def ask(end=time.monotonic() + 60):
    while time.monotonic() < end:
        try:
            connection = socket.create_connection(("127.0.0.1", int(os.environ["APP_PORT"])))
        except ConnectionRefusedError:
            continue                        # it is still starting
        with connection, connection.makefile("rwb") as file:
            file.write(b"GET /hi HTTP/1.0\\r\\n\\r\\n")
            file.flush()
            return file.read().decode()

@pytest.mark.parametrize("text", ["Hello!", "Bye!", "And again."])
def test_the_application_is_told_once(server, app, text):
    server.backend = text
    assert ask() == text
    assert len(server.journal) == 1
'''


def conftest(containing):
    found, = [text for text in CONFTESTS if containing in text]
    return found


def test_the_conftest_of_the_readme_gives_each_test_a_server(desk, tmp_path):
    folder = put(tmp_path / "conftest", desk, conftest=conftest("Server() as server"),
                 test_it=ONE_SERVER_PER_TEST)
    assert run_pytest(sys.executable, folder) == 2


def test_the_conftest_for_an_application_that_is_a_process(desk, tmp_path):
    port = str(free_port())
    changed, = re.findall(r"`(.*?)` in the fixture above", README)
    text = conftest("Server() as server").replace("Server()", changed) + AN_APPLICATION
    folder = put(tmp_path / "process", desk, conftest=text.replace("8765", port),
                 test_it=AN_APPLICATION_THAT_STAYS)
    assert run_pytest(sys.executable, folder, APP_PORT=str(free_port())) == 3


CASSETTE = '''
import os
from client import Client

def test_it_answers(server):
    assert os.environ["OPENAI_API_KEY"]         # the official SDK does not start without one
    reply = Client().chat_completions("Hi", model="m")
    assert reply["choices"][0]["message"]["content"] == "Hello!"
'''


def test_the_cassette_of_the_readme_is_recorded_once_and_replayed(desk, tmp_path):
    with Server("Hello!", api_keys="sesame") as live:
        text = conftest("Relay(").replace("https://api.openai.com/v1", live.base_url)
        folder = put(tmp_path / "cassette", desk, conftest=text, test_it=CASSETTE)
        (folder / "tape.jsonl").unlink()
        for _ in range(2):
            assert run_pytest(sys.executable, folder, RECORD="1", OPENAI_API_KEY="sesame") == 1
        assert len(live.journal) == 1
    assert run_pytest(sys.executable, folder) == 1
    (folder / "test_it.py").write_text(CASSETTE.replace('"Hi"', '"Ho"'))
    with pytest.raises(AssertionError, match="Replay: POST /chat/completions"):
        run_pytest(sys.executable, folder)


def test_the_mismatch_of_the_readme_is_what_is_said():
    script = Script(Reply("Hi!", expect={"messages": [{"content": "Hello"}], "temperature": 0}))
    with pytest.raises(AssertionError) as error, Server(script) as server:
        with contextlib.suppress(client.APIError):
            client.Client(server.base_url).chat_completions("Help!", model="m", temperature=0)
    assert "`%s`" % error.value in SECTIONS["Expectations"]


def test_the_program_with_the_client_does_what_it_says(monkeypatch, desk, serving, capsys):
    text = block("python", "from client import Client, fold, pieces").replace("8000", serving.port)
    names = {"__name__": "readme"}
    exec(compile(text, "README.md", "exec"), names)
    assert capsys.readouterr().out == re.search(r"print\(.*# (.*)", text)[1]
    said = re.findall(r'^(\S.*?) +# (".*")$', text, re.MULTILINE)
    assert len(said) == 2
    for expression, value in said:
        assert eval(expression, names) == json.loads(value)


def readme_asked(server, **fields):
    body = json.dumps({"model": "any", **fields}).encode()
    path = "/chat/completions" if "messages" in fields else "/completions"
    with urllib.request.urlopen(server.base_url + path, body, timeout=60) as reply:
        return json.load(reply)


def test_the_tokenizer_of_the_readme_counts(desk):
    """With a stand-in for tiktoken; tiktoken itself was tried by hand."""
    with Serving(desk, "python3 openai_compat.py --tokenizer counting:tokens") as server:
        reply = readme_asked(server, messages=[{"role": "user", "content": "Hallo 世界"}])
        assert reply["choices"][0]["message"]["content"] == "Hallo 世界"
        assert reply["usage"]["prompt_tokens"] == len("Hallo 世界".encode())
        assert readme_asked(server, prompt="世界", max_tokens=3)["choices"][0]["text"] == "世"


def test_the_wrapper_of_the_readme_builds_a_template(desk):
    """With a stand-in for llama-cli that says its prompt."""
    command, = re.findall(r'--command "([^"]*wrapper.py)"', SECTIONS["In front of a model"])
    with Serving(desk, "python3 openai_compat.py --command '%s'" % command) as server:
        parts = [{"type": "text", "text": "-x"}, {"type": "text", "text": "y"}]
        reply = readme_asked(server, messages=[
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}])
        assert reply["choices"][0]["message"]["content"] == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n-xy<|im_end|>\n"
            "<|im_start|>assistant\n")
        assert "user\nOnce<" in readme_asked(server, prompt="Once")["choices"][0]["text"]


def test_a_script_is_followed_by_a_command_of_any_language(desk, serving):
    (printed, status), = run_commands(desk, [block("sh", "npm test").strip()], serving)
    *said, last = printed.strip().splitlines()
    assert (said[0], json.loads(said[1])["function"]["name"], last, status) == (
        "Hello!", "weather", "Take an umbrella.", 0), printed


# ----------------------------------------------------------------------------------
# The lesson.

def verdicts(desk, module):
    """{quirk: what torture.py says of a parser}."""
    done = subprocess.run([sys.executable, "torture.py", module], cwd=str(desk), timeout=120,
                          env=surroundings(desk), stdout=subprocess.PIPE, universal_newlines=True)
    return dict(line.split(None, 1) for line in done.stdout.splitlines())


def test_the_naive_parser_of_the_lesson_is_wrong_in_silence(desk):
    wrong = {quirk for quirk, verdict in verdicts(desk, "naive").items() if "WRONG" in verdict}
    assert wrong == {"no_space", "truncate"}


def test_the_solution_of_the_lesson_is_right_or_says_why(desk):
    said = verdicts(desk, "careful")
    assert set(said) == set(QUIRKS)
    errors = {quirk for quirk, verdict in said.items() if verdict != "right"}
    assert errors == {"no_finish", "bad_json", "error_event", "truncate", "stall", "reset",
                      "html_502"}
    assert not any("WRONG" in verdict for verdict in said.values())
    assert "%d are right, %d say" % (len(said) - len(errors), len(errors)) in README


def test_the_solution_of_the_lesson_has_as_many_lines_as_it_says():
    lines = FILES["careful.py"].partition("def read")[2].count("\n")
    assert lines == 15 and "Fifteen lines are enough" in README


def test_the_sections_that_the_lesson_sends_to_are_there():
    source = (HERE / "openai_compat.py").read_text(encoding="utf-8")
    for paragraph in re.findall(r"\*(Read .*?)\*", SECTIONS["A lesson"], re.DOTALL):
        for name in re.findall(r'"(.+?)"', paragraph):
            assert re.search(r"^# %s\." % name, source, re.MULTILINE), name


# ----------------------------------------------------------------------------------
# Deployment.

def test_the_service_file_starts_a_server_that_exists(desk):
    service = configparser.ConfigParser(interpolation=None, strict=True)
    service.optionxform = str
    service.read_string(FILES["openai_compat.service"])
    python, module, *flags = shlex.split(service["Service"]["ExecStart"])
    assert (python, module) == ("/usr/bin/python3", "openai_compat.py")
    with Serving(desk, "python3 openai_compat.py %s --host 127.0.0.1" % " ".join(
            map(shlex.quote, flags))) as server:
        assert "wrapper" not in server.greeting and "python3" in server.greeting


@pytest.mark.system
def test_the_certificate_of_the_readme_is_trusted_where_it_is_named(desk, serving):
    (printed, status), = run_commands(desk, [block("sh", "openssl").strip()], serving)
    assert printed.strip().splitlines()[-1] == "Hello!" and status == 0


@pytest.mark.system
def test_nginx_takes_the_configuration_of_the_readme(desk):
    server = "python3 openai_compat.py"
    with Serving(desk, server) as one, Serving(desk, server) as two:
        port = str(free_port())
        site = FILES["openai_compat.conf"]
        for was, now in (("8000", port), ("8001", one.port), ("8002", two.port)):
            site = site.replace(was, now)
        (desk / "nginx.conf").write_text(
            "daemon off; pid pid; error_log log; events {} http { access_log off;"
            "client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f;"
            "uwsgi_temp_path u; scgi_temp_path s; %s }" % site)
        nginx = subprocess.Popen(["nginx", "-p", str(desk), "-c", "nginx.conf"],
                                 stderr=subprocess.DEVNULL)
        try:
            behind = client.Client("http://127.0.0.1:%s/v1" % port, max_retries=5)
            texts = client.pieces(behind.chat_completions("Hello!", stream=True))
            assert "".join(texts) == "Hello!"
        finally:
            nginx.terminate()
            nginx.wait()


# ----------------------------------------------------------------------------------
# Nothing is left out, and nothing is there that the program has not.

def table(heading):
    """{name: the other cells} of the table with this first heading; a row may name
    several things."""
    (rows,) = re.findall(r"^\| %s \|.*\n\|[-|]+\n((?:\|.*\n)+)" % re.escape(heading), README,
                         re.MULTILINE)
    found = {}
    for row in rows.splitlines():
        first, *others = [cell.strip() for cell in row.strip("|").split(" | ")]
        for name in re.findall(r"`([^`]+)`", first):
            found[name] = others
    return found


@pytest.mark.parametrize("function, heading", [
    (Server, "`Server`"), (Reply, "`Reply`")])
def test_a_table_has_each_argument_and_its_default(function, heading):
    rows = table(heading)
    for name, parameter in inspect.signature(function).parameters.items():
        assert name in rows, name
        default = rows[name][0]
        shown = re.findall(r"`([^`]*)`", default)
        if shown and len(shown) == 1:
            value = getattr(parameter.default, "__name__", repr(parameter.default))
            assert shown[0] == value.replace("'", '"')
    assert set(rows) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("function, heading", [
    (Relay, "Argument"), (Replay, "Argument"), (Script, "Argument of `Script`")])
def test_a_table_has_each_argument(function, heading):
    rows = " ".join(table(heading))
    for name in inspect.signature(function).parameters:
        assert re.search(r"\b%s\b" % name, rows), name


def test_the_arguments_of_the_client_are_those_that_are_shown():
    assert "`Client%s`" % inspect.signature(client.Client) in SECTIONS["Client"]


def test_the_table_of_the_journal_has_its_fields():
    with Server("x") as server:
        readme_asked(server, prompt="x")
        assert set(table("Field")) == {
            name for name in dir(server.journal[0]) if not name.startswith("_")
            and not callable(getattr(server.journal[0], name))} - {"content", "clock", "FIELDS"}


@pytest.mark.parametrize("name, heading", [("openai_compat.py", "Flag"), ("client.py", "Option")])
def test_each_flag_is_in_its_table_and_no_other(name, heading):
    said = subprocess.run([sys.executable, str(HERE / name), "--help"], stdout=subprocess.PIPE,
                          universal_newlines=True).stdout
    flags = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*(?=[ \],\n])", said)) - {"--help", "-h"}
    assert len(flags) > 15
    assert {row.split()[0] for row in table(heading)} - {
        "bench"} == flags


def test_the_table_of_quirks_says_which_bend_a_whole_reply():
    rows = table("Quirk")
    assert set(rows) == set(QUIRKS)
    for quirk, (_, whole) in rows.items():
        with Server("Hello!", quirk=quirk) as server:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(server.base_url + "/completions",
                                       b'{"model": "m", "prompt": "Hi"}', timeout=0.5).read()
        outcome = server.journal[0].outcome
        assert (outcome == "complete") == (whole == "no"), (quirk, outcome)


@pytest.mark.parametrize("path", Server.ROUTES)
def test_each_endpoint_is_in_the_readme(path):
    path = path if path in ("/", "/health", "/journal") else "/v1" + path
    path += "{id}" if path == "/v1/models/" else ""
    method = "POST" if path.endswith("completions") else "GET"
    assert "%s %s" % (method, path) in table("Endpoint")


ASKED, PROMPTED = {"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "Hi"}


@pytest.mark.parametrize("kind, row", re.findall(
    r"^\| (obeyed|checked|accepted).*? \| (.*) \|$", SECTIONS["Reference"], re.MULTILINE))
def test_a_parameter_is_checked_where_the_readme_says_so(kind, row):
    names = re.findall(r"`(\w+)`", row)
    with Server("x") as server:
        for name in names:
            statuses = []
            for path, body in (("/chat/completions", ASKED), ("/completions", PROMPTED)):
                wrong = json.dumps({"model": "m", **body, name: {"": []}})
                try:
                    urllib.request.urlopen(server.base_url + path, wrong.encode(), timeout=60)
                    statuses.append(200)
                except urllib.error.HTTPError as error:
                    statuses.append(error.code)
            assert (400 in statuses) == (kind != "accepted"), (name, statuses)


def test_each_parameter_is_in_the_readme():
    for name in {*openai_compat.CHAT_FIELDS, *openai_compat.COMPLETION_FIELDS, "prompt"}:
        assert "`%s`" % name in SECTIONS["Reference"], name


@pytest.mark.parametrize("name", openai_compat.__all__)
def test_each_name_of_the_module_is_in_the_readme(name):
    assert re.search(r"\b%s\b" % name, README)


def test_each_error_of_the_client_is_in_the_readme():
    for name in client.__all__:
        value = getattr(client, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert "`%s`" % name in SECTIONS["Client"], name


def test_each_argument_of_an_error_and_a_call_is_in_the_readme():
    for function in (openai_compat.APIError, ToolCall):
        for name in inspect.signature(function).parameters:
            assert re.search(r"%s\([^)]*\b%s\b" % (function.__name__, name), README), name


def test_the_contents_are_the_headings():
    contents = README.partition("**Contents:**")[2].partition("\n## ")[0]
    assert re.findall(r"\[([^]]+)\]\(#", contents) == list(SECTIONS)
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in SECTIONS}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= anchors


def test_the_make_targets_of_the_readme_are_there():
    makefile = (HERE / "Makefile").read_text()
    targets = re.findall(r"`make ([a-z-]+)`", README)
    assert {"test", "test-all", "interop", "system"} <= set(targets)
    for target in targets:
        assert re.search(r"^%s:" % target, makefile, re.MULTILINE), target


def test_each_block_of_the_readme_is_of_a_kind_that_is_run():
    known = [*FILES.values(), *TESTS, *CONFTESTS, AN_APPLICATION,
             block("python", "from client import Client, fold, pieces")]
    for _, language, text, _ in BLOCKS:
        assert language in ("console", "sh") or text in known, text
    assert len([text for _, language, text, _ in BLOCKS if language == "sh"]) == 2
    assert README.count("```") == 2 * len(BLOCKS)


def test_each_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures and all((HERE / picture).exists() for picture in pictures)


def test_the_lines_of_the_readme_are_short():
    words = re.sub(r"^```console\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert [line for line in words.splitlines() if len(line) > 110 and line[0] != "|"] == []


def test_the_readme_keeps_to_its_words():
    barred = r"\b(?:payloads?|packets?|frames?|docker)\b|\t|/(?:work|tmp|root|home)/"
    assert re.findall(barred, README, re.IGNORECASE) == []


# ----------------------------------------------------------------------------------
# Somebody's application, written as its users write it, on the newest official SDK; its
# tests have nothing but this fixture.

SDK = HERE / ".venvs" / "openai" / "bin" / "python"
APPLICATION = HERE / ".application"


@pytest.mark.interop
@pytest.mark.parametrize("python, arguments", [
    ([], ["-n", "4"]), (["-X", "dev", "-W", "error"], ["-W", "error"])], ids=["xdist", "dev"])
def test_an_application_is_tested_with_nothing_but_this_fixture(tmp_path, python, arguments):
    for name in ("travel.py", "test_travel.py", "conftest.py"):
        shutil.copy(str(APPLICATION / name), str(tmp_path))
    shutil.copy(openai_compat.__file__, str(tmp_path))
    assert run_pytest(SDK, tmp_path, *arguments, options=python) >= 40
