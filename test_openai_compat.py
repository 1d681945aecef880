"""The tests of openai_compat.py and client.py, in the order of the two files.

Each stage without a socket, then real sockets, real processes and, under the markers of
.pytest.ini, real SDKs, browsers and proxies.
"""
import base64
import concurrent.futures
import configparser
import contextlib
import copy
import doctest
import functools
import gc
import http.client
import http.server
import inspect
import io
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
from pathlib import Path
from types import SimpleNamespace
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
USAGE = {**COUNTERS, "prompt_tokens_details": {"cached_tokens": int, "audio_tokens": int},
         "completion_tokens_details": {
             "reasoning_tokens": int, "audio_tokens": int,
             "accepted_prediction_tokens": int, "rejected_prediction_tokens": int}}
CALL = ({"id": re.compile("call_.+"), "type": "function",
         "function": {"name": str, "arguments": str}},
        {"id": re.compile("call_.+"), "type": "custom", "custom": {"name": str, "input": str}})
CALL_DELTA = (
    {"index": int, "id": str, "type": "function", "function": {"name": str, "arguments": ""}},
    {"index": int, "id": str, "type": "custom", "custom": {"name": str, "input": ""}},
    {"index": int, "function": {"arguments": str}}, {"index": int, "custom": {"input": str}})
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
    "index": int, "logprobs": (CHAT_LOGPROBS, None), "finish_reason": (*REASON, None), "delta": {
        "role?": "assistant", "content?": (str, None), "refusal?": (str, None),
        "tool_calls?": [CALL_DELTA],
        "function_call?": ({"name": str, "arguments": ""}, {"arguments": str})}}]}
TEXT_CHOICE = {"index": int, "text": str, "logprobs": (TEXT_LOGPROBS, None),
               "finish_reason": ("stop", "length", "content_filter")}
TEXT = {**TEXT_COMMON, "usage": COUNTERS, "choices": [TEXT_CHOICE]}
TEXT_CHUNK = {**TEXT_COMMON, "usage?": (COUNTERS, None), "choices": [
    {**TEXT_CHOICE, "finish_reason": (*TEXT_CHOICE["finish_reason"], None)}]}
ERROR = {"error": {"message": re.compile("(?s).+"), "type": str, "param": (str, None),
                   "code": (str, None)}}
MODEL = {"id": str, "object": "model", "created": int, "owned_by": str}
MODELS = {"object": "list", "data": [MODEL]}


def check_shape(value, shape, at="it"):
    """Fail, with the place, unless the value is of the shape: no key less, none more."""
    if isinstance(shape, tuple):
        for each in shape:
            with contextlib.suppress(AssertionError):
                return check_shape(value, each, at)
        raise AssertionError(f"{at}: {value!r} is none of {shape}")
    kind = str if isinstance(shape, re.Pattern) else type(shape)
    kind = shape if isinstance(shape, type) else kind
    assert type(value) is kind, f"{at}: {value!r} is no {kind.__name__}"    # True is no int
    if isinstance(shape, re.Pattern):
        assert shape.fullmatch(value), f"{at}: {value!r}"
    elif isinstance(shape, list):
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{at}[{i}]")
    elif isinstance(shape, dict):
        shape = dict.fromkeys(value, shape[str]) if str in shape else shape
        known = {name.rstrip("?"): each for name, each in shape.items()}
        needed = {name for name in shape if not name.endswith("?")}
        assert needed <= value.keys() <= known.keys(), f"{at} has {sorted(value)}"
        for name, each in value.items():
            check_shape(each, known[name], f"{at}.{name}")
    elif not isinstance(shape, type):
        assert value == shape, f"{at}: {value!r}"


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
if hasattr(signal, "SIGHUP"):                   # so does nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def rows(table):
    """A table {name: (value, ...)} as the parameters of a test."""
    return [pytest.param(*row, id=name) for name, row in table.items()]


def until(condition, seconds=PATIENCE):
    """Wait for a condition to hold; its value, or a failure at the deadline."""
    end = time.monotonic() + seconds
    while not (value := condition()):       # once a turn: asking may itself be a request
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return value


def together(count, work):
    """The results of `count` threads that do the same at once."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [each.result() for each in [pool.submit(work) for _ in range(count)]]


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
    got = bytearray()
    while block := connection.recv(65536):
        got += block
        assert len(got) < 2**24, "no end"       # shall fail, not hang
    return bytes(got)


def read_past(connection, mark, count=1):
    """The bytes up to and with so many of `mark`, and what came along with them."""
    got = b""
    while got.count(mark) < count:
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
    """(the transfer chunks, what follows the last one: None where that one has not come)."""
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
        *blocks, done, rest = self.body.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        assert all(block.startswith(b"data: {") and b"\n" not in block for block in blocks)
        chunks = [loads(block[6:]) for block in blocks]
        for chunk in chunks:
            check_shape(chunk, CHUNK_SHAPES[chunk["object"]])
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        return chunks

    @property
    def text(self):
        """What the first choice says, streamed or not."""
        assert self.status == 200, self.body
        whole = self.headers["content-type"] == "application/json"
        first = (self.json if whole else fold(self.chunks))["choices"][0]
        return first["message"]["content"] if "message" in first else first["text"]

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
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=PATIENCE)
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
        read_past(connection, b"data: ", after)


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
    with contextlib.suppress(OSError):
        dial(server).close()
        return False
    return True


def deltas(chunks):
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


def said_in(stream):
    """The texts of the deltas in the bytes of a stream, or in a part of one."""
    said = re.findall(rb'"delta":\{"content":("(?:[^"\\]|\\.)*")', stream)
    return [json.loads(text.decode()) for text in said]


# ----------------------------------------------------------------------------------
# Backends that wait, and say what became of them.

class Endless:
    """Yields its pieces, waits for `go_on` (where told to), then goes on until it is closed."""

    def __init__(self, *pieces, more="x ", waits=False, pause=0.001):
        self.pieces, self.more, self.pause, self.kept = pieces, more, pause, []
        self.begun, self.go_on, self.closed = (threading.Event() for _ in range(3))
        if not waits:
            self.go_on.set()

    def __call__(self, request):
        self.kept.append(self.speak())      # out of the garbage collector's reach
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
    """Where programs wait until the test lets them pass, and where it sees that one died."""

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
            line = file.readline().decode("latin-1").strip()
            headers = http.client.parse_headers(file).items()
            headers = {name.lower(): value for name, value in headers}
            return connection, (line, headers, file.read(int(headers.get("content-length", 0))))


@pytest.fixture
def upstream():
    upstream = Upstream()
    with upstream.listener:
        yield upstream


@contextlib.contextmanager
def playing(*replies, tls=None):
    """A server whose n-th connection gets the n-th reply, later ones the last: (url, requests).

    A reply is bytes, or a function of the connection; the requests are as `accept` gives them.
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
    """The environment of a process that somebody starts who has set nothing else.

    It finds our modules: `-m openai_compat` reads bytecode, a file is compiled each time.
    """
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("OPENAI_", "PYTHON", "PYTEST_"))
            and not name.lower().endswith("_proxy")}
    return {**kept, "PYTHONPATH": str(HERE),
            **({"OPENAI_BASE_URL": base_url} if base_url else {}), **more}


def finished(*words, **options):
    """A process that has ended: its returncode, stdout and stderr, which are text."""
    return subprocess.run(words, **{
        "stdin": None if "input" in options else subprocess.DEVNULL, "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE, "encoding": "utf-8", "env": environment(), "timeout": 120,
        **options})


MODULE = sys.executable, "-S", "-m", "openai_compat"


class Running:
    """A server that the command line has started; `said` is what it said at its start."""

    def __init__(self, *flags, start=MODULE, port=0, **options):
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
        """(its status, its last words)."""
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

CERTIFICATE = (
    "MIIBgDCCASWgAwIBAgIUYUvUzm5yCYqKMcreM6Z8APebrM0wCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJMTI3LjAuMC4xM"
    "CAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBg"
    "gqhkjOPQMBBwNCAASllf9Ha0gW8sf72oN2LIMp4RHMynZgwk6Ha/W73dGv0M3aBUXgi4F9kVlDgagQqSiCcU2n6T48hO2"
    "ZbQFhftCMo1MwUTAdBgNVHQ4EFgQU2YUXQCIP0tHsT1vfY8BWCMm/4fIwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8E"
    "BAMCAoQwDwYDVR0RBAgwBocEfwAAATAKBggqhkjOPQQDAgNJADBGAiEAyZYGuix4vgk4eaJwpA5IApxn1Ha1v6rQocxdG"
    "a7tSv4CIQCQd0d42UbwMV8FDu8GYXbvisegMUmSEcjanLMQ2svDiw==")
CERTIFICATE_KEY = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgJT+mm/brlDA2fuRwnrtk3xNgOJV8ki9eNXqR1dkfhRahR"
    "ANCAASllf9Ha0gW8sf72oN2LIMp4RHMynZgwk6Ha/W73dGv0M3aBUXgi4F9kVlDgagQqSiCcU2n6T48hO2ZbQFhftCM")


def pem(kind, coded):
    lines = "\n".join(re.findall(".{1,64}", coded))
    return f"-----BEGIN {kind}-----\n{lines}\n-----END {kind}-----\n"


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory):
    """The files (certificate, key)."""
    folder = tmp_path_factory.mktemp("tls")
    (folder / "certificate.pem").write_text(pem("CERTIFICATE", CERTIFICATE))
    (folder / "key.pem").write_text(pem("PRIVATE KEY", CERTIFICATE_KEY))
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
TOOLS = {"tools": [TOOL, {"type": "function", "function": {"name": "g"}},
                   {"type": "custom", "custom": {"name": "c"}}]}
FUNCTIONS = {"functions": [{"name": "f"}, {"name": "g"}]}


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
    head = chunks[0][:chunks[0].index('"choices"')]
    return [*(chunk[:-1] + ',"usage":null}' for chunk in chunks),
            f'{head}"choices":[],{usage}}}']


ROLE = delta('"role":"assistant","content":"","refusal":null')
NO_TEXT = delta('"role":"assistant","content":null,"refusal":null')
HI_CHUNKS = [ROLE, *(delta(f'"content":"{token}"') for token in ("Hello", ",", " world", "!")),
             delta("", '"stop"')]
STREAMS = {  # name: (path, fields, the events before [DONE])
    "chat": (CHAT_PATH, {}, HI_CHUNKS),
    "chat with usage": (CHAT_PATH, {"stream_options": {"include_usage": True}},
                        with_usage(HI_CHUNKS, counted(4, 4) + DETAILS)),
    "nothing": (CHAT_PATH, {"max_tokens": 0}, [ROLE, delta("", '"length"')]),
    "two choices": (CHAT_PATH, {"n": 2, "max_tokens": 1}, [
        ROLE, ROLE.replace('"index":0', '"index":1'),
        delta('"content":"Hello"'), delta('"content":"Hello"', index=1),
        delta("", '"length"'), delta("", '"length"', index=1)]),
    "a tool call": (CHAT_PATH, FORCED, [
        NO_TEXT, delta('"tool_calls":[{"index":0,"id":"call","type":"function",'
                       '"function":{"name":"f","arguments":""}}]'),
        *(delta(f'"tool_calls":[{{"index":0,"function":{{"arguments":"{token}"}}}}]')
          for token in ("{", r'\"', "n", r'\"', ":", "0", "}")), delta("", '"tool_calls"')]),
    "a function call": (CHAT_PATH, {**FUNCTIONS, "function_call": {"name": "f"}}, [
        NO_TEXT, delta('"function_call":{"name":"f","arguments":""}'),
        delta('"function_call":{"arguments":"{"}'), delta('"function_call":{"arguments":"}"}'),
        delta("", '"function_call"')]),
    "completion": (TEXT_PATH, {}, [
        text("Hello"), text(","), text(" world"), text("!"), text("", '"stop"')]),
    "completion with usage": (
        TEXT_PATH, {"max_tokens": 1, "stream_options": {"include_usage": True}},
        with_usage([text("Hello"), text("", '"length"')], counted(4, 1) + "}")),
    "completion with echo": (TEXT_PATH, {"echo": True, "max_tokens": 0},
                             [text("Hello, world!"), text("", '"length"')]),
    "characters as they are, or escaped": (TEXT_PATH, {"prompt": "世é😀\u2028"}, [
        text("世"), text("é"), text("😀"), text(r"\u2028"), text("", '"stop"')]),
}


@pytest.mark.parametrize("path, fields, chunks", rows(STREAMS))
def test_a_stream_byte_for_byte(path, fields, chunks):
    with Server() as server:
        body = {**(HI if path == CHAT_PATH else PROMPT), "stream": True, **fields}
        found, how = exchange(server, body, path)
    assert how == "whole" and [pinned(each) for each in found] == [
        f"data: {event}\n\n" for event in (*chunks, "[DONE]")]       # a transfer chunk each


def test_a_whole_reply_an_error_and_the_models_byte_for_byte():
    with Server(models=["m"]) as server:
        whole, error = (post(server, CHAT_PATH, {**HI, "n": n}).body for n in (1, "x"))
        models = call(server, "GET", "/v1/models").body
    assert pinned(whole) == CHAT_HEAD.replace(".chunk", "") + (
        '"choices":[{"index":0,"message":{"role":"assistant","content":"Hello, world!",'
        '"refusal":null},"logprobs":null,"finish_reason":"stop"}],'
        + counted(4, 4) + DETAILS + "}")
    assert error == (
        b'{"error":{"message":"Invalid type for \'n\': expected an integer, but got a string '
        b'instead.","type":"invalid_request_error","param":"n","code":"invalid_type"}}')
    assert pinned(models) == (
        '{"object":"list","data":[{"id":"m","object":"model","created":1,'
        '"owned_by":"openai_compat"}]}')


# ----------------------------------------------------------------------------------
# What the module says of itself: the examples in its docstrings, and its opening page.

def test_every_example_of_the_server_is_true():
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                                   | doctest.IGNORE_EXCEPTION_DETAIL)
    tests = [each for each in doctest.DocTestFinder().find(openai_compat) if each.examples]
    told = []
    for each in tests:
        runner.run(each, out=told.append)
    marks = inspect.getsource(openai_compat).count("Example:\n")
    assert len(tests) >= marks > 30 and runner.summarize(verbose=False).failed == 0, "".join(told)


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
    """A body with these fields as it is parsed; one that is ... is left out."""
    parse, body = ((openai_compat.parse_chat, HI) if path == CHAT_PATH
                   else (openai_compat.parse_completion, PROMPT))
    return parse({name: each for name, each in {**body, **fields}.items() if each is not ...})


def refused(path=CHAT_PATH, **fields):
    """(message, param, code) of the refusal of a request with these fields."""
    with pytest.raises(APIError) as error:
        parsed(path, **fields)
    assert (error.value.status, error.value.type) == (400, "invalid_request_error")
    check_shape(error.value.body(), ERROR)
    return error.value.message, error.value.param, error.value.code


TYPES = [  # what it has to be; fields of both endpoints, of chats alone, of completions alone
    ("an integer", "n max_tokens seed", "top_logprobs max_completion_tokens", "logprobs best_of"),
    ("a decimal", "temperature top_p presence_penalty frequency_penalty", "", ""),
    ("a boolean", "stream", "logprobs parallel_tool_calls store", "echo"),
    ("a string", "model user", "service_tier reasoning_effort verbosity safety_identifier "
     "prompt_cache_key", "suffix"),
    ("one of a string or an array", "stop", "", ""),
    ("an array", "", "messages tools functions modalities", ""),
    ("an object", "stream_options logit_bias",
     "response_format metadata prediction web_search_options", "")]
TYPED = [(field, path, wanted) for wanted, *columns in TYPES
          for fields, paths in zip(columns, (BOTH, [CHAT_PATH], [TEXT_PATH]))
          for path in paths for field in fields.split()]
VALUES = [("a string", "1"), ("an integer", 0), ("an integer", 1), ("a decimal", 1.0),
          ("a decimal", 1.5), ("a boolean", False), ("a boolean", True), ("an array", []),
          ("an array", ["x"]), ("an object", {}), ("an object", {"x": 1})]


@pytest.mark.parametrize("field, path, wanted", TYPED)
def test_a_value_of_the_wrong_type_is_refused(field, path, wanted):
    for kind, value in VALUES:
        if kind not in wanted and (kind, wanted) != ("an integer", "a decimal"):
            assert refused(path, **{field: value}) == (
                f"Invalid type for '{field}': expected {wanted}, but got {kind} instead.",
                field, "invalid_type")


@pytest.mark.parametrize("field, path", [
    each[:2] for each in TYPED if each[0] not in ("model", "messages")])
def test_null_is_absence_and_an_absent_field_has_its_default(field, path):
    assert parsed(path, **{field: None})[field] == parsed(path)[field]


LIMITS = {  # field: (least, most)
    "n": (1, 128), "max_tokens": (0, None), "seed": (-2**63, 2**63 - 1), "temperature": (0, 2),
    "top_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
    "logprobs": (0, 5), "best_of": (0, 20), "max_completion_tokens": (1, None),
    "top_logprobs": (0, 20)}


@pytest.mark.parametrize("field, path, kind, bound, step", [
    (field, path, wanted.split()[1], bound, step) for field, path, wanted in TYPED
    if wanted in ("an integer", "a decimal")
    for bound, step in zip(LIMITS[field], (-1, 1)) if bound is not None])
def test_a_number_at_its_bound_is_taken_and_one_beyond_it_is_refused(
        field, path, kind, bound, step):
    side, sign = ("below min", ">=") if step < 0 else ("above max", "<=")
    needed = {"logprobs": True} if field == "top_logprobs" else {}
    if (field, bound) != ("best_of", 0):            # which is less than n
        assert parsed(path, **needed, **{field: bound})[field] == bound
    assert refused(path, **needed, **{field: bound + step}) == (
        f"Invalid '{field}': {kind} {side}imum value. Expected a value {sign} {bound}, but "
        f"got {bound + step} instead.", field, f"{kind}_{side.replace(' ', '_')}_value")


FN, USER = {"name": "f"}, HI["messages"][0]
CALLED = {"role": "assistant", "content": None, "tool_calls": [
    {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in "ab"]}


def tool_message(id):
    return {"role": "tool", "tool_call_id": id, "content": "x"}


ANSWERED = [CALLED, tool_message("a"), tool_message("b")]


def made_call(**fields):
    return [{"role": "assistant", "tool_calls": [{**CALLED["tool_calls"][0], **fields}]},
            tool_message("a")]


def function(**fields):
    return {"tools": [{"type": "function", "function": fields}]}


def form(kind, **fields):
    return {"response_format": {"type": kind, **fields}}


def from_role(role, **fields):
    return {"messages": [{"role": role, **fields}]}


def part(**fields):
    return {"messages": user([fields])}


def too_long(kind, most):
    one = f"{'a' if kind == 'string' else 'an'} {kind}"
    return (f"{kind}_above_max_length", f"Invalid '{{}}': {kind} too long. Expected {one} with "
            f"maximum length {most}, but got {one} with length {most + 1} instead.")


def one_of(words):
    return "invalid_value", f"Invalid value: '...'. Supported values are: {words}"


# (code, message) of a refusal: {} is the param, ... anything.
ABSENT = "missing_required_parameter", "Missing required parameter: '{}'."
TYPE = "invalid_type", "Invalid type for '{}': expected ..., but got ... instead."
NO_NAME = ("invalid_value", "Invalid '{}': string does not match pattern. Expected a string that "
           "matches the pattern '^[a-zA-Z0-9_-]+$'.")
EMPTY = ("empty_array", "Invalid '{}': empty array. Expected an array with minimum length 1, but "
         "got an empty array instead.")
NO_MODEL = None, "you must provide a model parameter"
ONLY_BESIDE = "The '{}' parameter is only allowed when '%s' is enabled."
WITHOUT = "Invalid value for '{0}': '{0}' is only allowed when '%s' are specified."
BEST_OF = ("You requested that the server return more choices than it will generate (HINT: you "
           "must set 'n' (currently %s) to be at most 'best_of' (currently %s), or omit either "
           "parameter if you do not specifically want to use them.)")
REFUSED_CHATS = [  # param, (code, message), fields
    (None, NO_MODEL, {"model": None}),
    (None, NO_MODEL, {"model": ""}),
    ("messages", ABSENT, {"messages": None}),
    ("messages", EMPTY, {"messages": []}),
    ("messages[0]", TYPE, {"messages": ["x"]}),
    ("messages[0].role", ABSENT, {"messages": [{}]}),
    ("messages[0].role", TYPE, from_role(1)),
    ("messages[0].role", one_of("'system', 'developer', 'user', 'assistant', 'tool', and "
                                "'function'."), from_role("bogus", content="x")),
    ("messages[0].name", TYPE, from_role("user", content="x", name=1)),
    ("messages[0].name", ABSENT, from_role("function", content="x")),
    ("messages[1].tool_call_id", ABSENT, {"messages": [USER, {"role": "tool", "content": "x"}]}),
    ("messages[0].content", ABSENT, from_role("user")),
    *(("messages[0].content", TYPE, {"messages": user(content)}) for content in (1, {})),
    ("messages[0].content[0]", TYPE, {"messages": user(["x"])}),
    ("messages[0].content[0].type", ABSENT, part()),
    ("messages[0].content[0].type", one_of("..."), part(type="x")),
    ("messages[0].content[0].text", ABSENT, part(type="text")),
    ("messages[0].content[0].text", TYPE, part(type="text", text=1)),
    ("messages[0].content[0].image_url", TYPE, part(type="image_url", image_url="x")),
    ("messages[0].tool_calls", TYPE, from_role("assistant", tool_calls={})),
    ("messages[0].tool_calls[0].id", ABSENT, {"messages": made_call(id=None)}),
    ("messages[0].tool_calls[0].function", TYPE, {"messages": made_call(function="x")}),
    ("tools", too_long("array", 128), {"tools": [TOOL] * 129}),
    ("tools[0]", TYPE, {"tools": ["x"]}),
    ("tools[0].type", ABSENT, {"tools": [{}]}),
    ("tools[0].type", one_of("..."), {"tools": [{"type": "x"}]}),
    ("tools[0].function", ABSENT, {"tools": [{"type": "function"}]}),
    ("tools[0].function.name", ABSENT, function()),
    ("tools[0].function.name", NO_NAME, function(name="a b")),
    ("tools[0].function.name", NO_NAME, function(name="a\n")),
    ("tools[0].function.name", too_long("string", 64), function(name="a" * 65)),
    ("tools[0].function.parameters", TYPE, function(name="f", parameters="x")),
    ("tool_choice", (None, WITHOUT % "tools"), {"tool_choice": "auto"}),
    ("tool_choice", TYPE, {"tools": [TOOL], "tool_choice": 1}),
    ("tool_choice", one_of("'none', 'auto', and 'required'."), {**FORCED, "tool_choice": "any"}),
    ("tool_choice", (None, "Tool choice 'g' not found in 'tools' parameter."), {
        "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
    ("functions", too_long("array", 128), {"functions": [FN] * 129}),
    ("functions", EMPTY, {"functions": []}),
    ("functions[0].name", ABSENT, {"functions": [{}]}),
    ("function_call", (None, WITHOUT % "functions"), {"function_call": "auto"}),
    ("function_call", one_of("..."), {"functions": [FN], "function_call": "any"}),
    ("function_call", (None, "Invalid value for '{}': no function named 'g' was specified ..."),
     {"functions": [FN], "function_call": {"name": "g"}}),
    ("response_format.type", ABSENT, {"response_format": {}}),
    ("response_format.type", one_of("'text', 'json_object', and 'json_schema'."), form("xml")),
    ("response_format.json_schema", ABSENT, form("json_schema")),
    ("response_format.json_schema.name", ABSENT, form("json_schema", json_schema={})),
    ("response_format.json_schema.name", NO_NAME, form("json_schema", json_schema={"name": ""})),
    ("service_tier", one_of("'auto', 'default', 'flex', 'scale', 'priority', and 'fast'."),
     {"service_tier": "bogus"}),
    *((field, one_of("..."), {field: "bogus"})
      for field in ("reasoning_effort", "verbosity", "prompt_cache_retention")),
    ("modalities[0]", one_of("..."), {"modalities": ["video"]}),
    ("modalities", ("unsupported_value", "Unsupported value: '{}' does not support 'audio' ..."),
     {"modalities": ["text", "audio"]}),
    ("metadata", too_long("object", 16), {"metadata": dict.fromkeys(map(str, range(17)), "x")}),
    ("metadata", too_long("string", 64), {"metadata": {"k" * 65: "x"}}),
    ("metadata.k", too_long("string", 512), {"metadata": {"k": "x" * 513}}),
    ("metadata.k", TYPE, {"metadata": {"k": 1}}),
    ("safety_identifier", too_long("string", 64), {"safety_identifier": "x" * 65}),
    ("stop[1]", TYPE, {"stop": ["x", 1]}),
    ("logit_bias.5", TYPE, {"logit_bias": {"5": "x"}}),
    ("logit_bias.5", ("decimal_above_max_value", "Invalid '{}': decimal above maximum value. ..."),
     {"logit_bias": {"5": 101}}),
    ("top_logprobs", (None, ONLY_BESIDE % "logprobs"), {"top_logprobs": 1}),
    ("stream_options", (None, ONLY_BESIDE % "stream"), {"stream_options": {}}),
    ("stream_options.include_usage", TYPE,
     {"stream": True, "stream_options": {"include_usage": 1}}),
]
REFUSED_COMPLETIONS = [
    (None, NO_MODEL, {"model": None}), ("prompt", ABSENT, {"prompt": ...}),
    ("stream_options", (None, ONLY_BESIDE % "stream"), {"stream_options": {}}),
    *(("prompt", TYPE, {"prompt": prompt}) for prompt in (
        1, True, {}, ["a", 1], [1, "a"], [1, True], [1.5], [-1], [None], ["a", [1]], [[1], 2],
        [[1], []], [["a"]])),
    ("prompt", too_long("array", 128), {"prompt": ["a"] * 129}),    # 128 choices in all
    ("prompt", too_long("array", 1), {"prompt": ["a"] * 2, "n": 65}),
    ("prompt", EMPTY, {"prompt": []}),
    ("best_of", (None, BEST_OF % (3, 2)), {"n": 3, "best_of": 2}),
    ("best_of", (None, BEST_OF % (1, 0)), {"best_of": 0}),
    ("best_of", (None, "Cannot stream results with best_of > n."), {"stream": True, "best_of": 2}),
]
UNANSWERED = ("An assistant message with 'tool_calls' must be followed by tool messages "
              "responding to each 'tool_call_id'. The following tool_call_ids did not have "
              "response messages: ")
UNASKED = (None, "Invalid parameter: messages with role 'tool' must be a response to a preceeding "
           "message with 'tool_calls'.")
UNKNOWN = (None, "Invalid parameter: 'tool_call_id' of 'x' not found in 'tool_calls' of previous "
           "message.")
BROKEN = [  # param, (code, message), conversation
    ("messages.[0].role", UNASKED, [tool_message("a")]),
    ("messages.[1].role", UNASKED, [USER, tool_message("a")]),
    ("messages.[5].role", UNASKED, [USER, *ANSWERED, USER, tool_message("a")]),
    ("messages.[1].role", (None, UNANSWERED + "a, b"), [USER, CALLED]),
    ("messages.[2].role", (None, UNANSWERED + "b"), [USER, CALLED, tool_message("a")]),
    ("messages.[3].role", (None, UNANSWERED + "a"), [USER, CALLED, tool_message("b"), USER]),
    ("messages.[2].tool_call_id", UNKNOWN, [USER, CALLED, tool_message("x")]),
    ("messages[0].tool_calls[0].function.arguments", ABSENT, made_call(function=FN)),
    ("messages[0].tool_calls[0].function.arguments",
     ("invalid_type", "Invalid type for '{}': expected a string, but got an object instead."),
     made_call(function={"name": "f", "arguments": {}})),
    ("messages[0].function_call.arguments",
     ("invalid_type", "Invalid type for '{}': expected a string, but got an integer instead."),
     [{"role": "assistant", "function_call": {"name": "f", "arguments": 5}}]),
]


@pytest.mark.parametrize("path, param, refusal, fields", [
    *((CHAT_PATH, *row) for row in REFUSED_CHATS),
    *((TEXT_PATH, *row) for row in REFUSED_COMPLETIONS),
    *((CHAT_PATH, *row, {"messages": messages}) for *row, messages in BROKEN)])
def test_a_request_is_refused(path, param, refusal, fields):
    said, *place = refused(path, **fields)
    assert place == [param, refusal[0]]
    assert re.fullmatch(re.escape(refusal[1].format(param)).replace(r"\.\.\.", ".+"), said)


def test_a_lenient_server_takes_any_conversation_but_nothing_else():
    with Server(strict=False) as server:
        for *_, messages in BROKEN:
            assert post(server, CHAT_PATH, {**HI, "messages": messages}).status == 200, messages
        assert post(server, CHAT_PATH, {**HI, "messages": user(1)}).status == 400


def test_the_first_fault_is_reported():
    assert refused(model=None, messages=None, n=0)[0] == "you must provide a model parameter"
    assert refused(messages=None, n=0)[1] == "messages"


HUGE = "v" * 20000


@pytest.mark.parametrize("param, fields", [
    (None, {"model": HUGE}), ("tool_choice", {"tool_choice": HUGE, "tools": []}),
    ("reasoning_effort", {"reasoning_effort": HUGE}), ("service_tier", {"service_tier": HUGE}),
    ("messages[0].role", from_role(HUGE)), ("n", {"n": 10**4000}),
    ("messages.[1].role", {"messages": [USER, tool_message(HUGE)]}),
    ("logit_bias", {"logit_bias": {HUGE: 200}})])
def test_no_refusal_repeats_a_long_value_whole(param, fields):
    with Server(models=["m"]) as server:
        got = post(server, CHAT_PATH, {**HI, **fields})
    assert got.status in (400, 404) and len(got.body) < 5000 and got.error["param"] == param


def test_metadata_is_sixteen_pairs():
    assert parsed(metadata=dict.fromkeys(map("{:064}".format, range(16)), "x" * 512))


@pytest.mark.parametrize("messages", [
    *([message] for message in (
        {"role": "system", "content": "x"}, {"role": "developer", "content": "x", "name": "n"},
        {"role": "user", "content": ""}, {"role": "assistant"},
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": None,
         "function_call": None, "annotations": [], "reasoning_content": "x"},
        {"role": "assistant", "content": "x", "tool_calls": []},
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "x"},
        {"role": "function", "name": "f", "content": None})),
    *(user([{"type": kind, kind: value}]) for kind, value in {
        "image_url": {"url": "data:,"}, "input_audio": {"data": "", "format": "wav"},
        "file": {"file_id": "x"}, "text": ""}.items()),
    [USER, CALLED, tool_message("b"), tool_message("a"), USER, *ANSWERED,
     {"role": "assistant", "content": "x"}],
    made_call(type="custom", custom={"name": "c", "input": "x"}),
])
def test_messages_as_clients_send_them_are_taken(messages):
    assert parsed(messages=messages)["messages"] == messages


@pytest.mark.parametrize("messages, text", [
    (user("a"), "a"), (user(None), ""), (user([]), ""), (user("a") + user("b"), "b"),
    (user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "ab"),
    (user([{"type": "file", "file": {}}, {"type": "text", "text": "b"}]), "b"),
    (user("a") + [{"role": "assistant", "content": "b"}], "a"),
    (user("a") + ANSWERED, "a"),
    # Without a user, it is the last message of all:
    ([{"role": "system", "content": "s"}], "s"),
    ([{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}], "b"),
    ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "c"}], "c"),
    ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], "no"),
])
def test_what_is_asked_is_the_last_user_message(messages, text):
    assert parsed(messages=messages)["text"] == text


# ----------------------------------------------------------------------------------
# Tokens.

@pytest.mark.parametrize("tokens", [      # with a | between them
    "", "Hello|,| world|!", " a| | b| ", "x_1|=|2|.|5", "世|界| again", "ひ|ら|カ|ナ", "한|국",
    "e\u0301", "naïve", "🇫🇷|🇩🇪", "👩‍👩‍👧|x", "👍🏽|!", "か\u3099", "1\ufe0f\u20e3", "❤️",
    "🏴\U000e0067\U000e0062\U000e007f",
])
def test_a_token_is_what_a_reader_calls_a_word_a_sign_or_a_mark(tokens):
    assert tokenize(tokens.replace("|", "")) == [*filter(None, tokens.split("|"))]


ALPHABET = ("aZ9_ \n\t.,!\"\\é世界ひ한\u0301\u0308\u3099\u200d\ufe0f\u20e3😀👩🏽🇫🇷\u2028\x85\0"
            "\ud83d\udc00ßשاऀि\u0e33\U0002000b\U000e0101")


def test_tokens_join_to_the_text_and_none_starts_with_what_combines():
    every = "".join(map(chr, range(0, 0x110000, 97)))
    assert "".join(tokenize(every)) == every
    pick = random.Random(1)
    for _ in range(3000):
        text = "".join(pick.choices(ALPHABET, k=pick.randrange(30)))
        tokens = tokenize(text)
        assert "".join(tokens) == text and all(tokens)
        for before, token in zip(tokens, tokens[1:]):
            assert not unicodedata.category(token[0]).startswith("M"), text
            assert not before.endswith("\u200d") and token[0] != "\u200d", text


def test_a_tokenizer_may_be_put_in_its_place_and_decode():
    def letters(text):
        return list(text)
    letters.decode = chr
    with Server(tokenize=letters) as server:
        got = chat(server, "abc", max_tokens=2)
        assert got.text == "ab" and got.json["usage"]["prompt_tokens"] == 3
        assert chat(server, path=TEXT_PATH, prompt=[72, 105]).text == "Hi"


@pytest.mark.parametrize("path", BOTH)
def test_one_of_its_tokens_may_be_empty(path):
    fields = {"logprobs": True} if path == CHAT_PATH else {"logprobs": 1, "echo": True}
    with Server(say("世", "x"), tokenize=lambda text: ["", text] if text else []) as server:
        for limit, count in ((None, 4), (3, 3), (2, 2), (1, 1)):
            body = {**HI, **PROMPT, **fields, "max_tokens": limit}
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
      for length in range(65530, 65537)),
    # A word longer than a slice:
    "a " + "b" * 200000, " " + "b" * 200000 + " c", "b" * 65537, " " * 200000],
    ids=lambda text: f"{text[:3]}... {len(text)}")
def test_a_long_text_is_cut_into_slices_between_its_tokens_where_there_are_any(text):
    got, parts = ask(always(text), TEXT_PATH), list(openai_compat.slices(text))
    tokens = [token for part in parts for token in tokenize(part)]
    assert got.text == "".join(parts) == text and "" not in parts
    assert got.json["usage"]["completion_tokens"] == len(tokens)
    assert max(map(len, parts)) <= 65541
    assert tokens == tokenize(text) or max(map(len, tokenize(text))) > 65536


# ----------------------------------------------------------------------------------
# Schema samples.  The server checks each against its schema before it goes out; under the
# marker interop the package jsonschema and pydantic do so too, for random schemas as well.

def an_object(**properties):
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}


def a_set(item, least=2):
    return {"type": "array", "uniqueItems": True, "items": item, "minItems": least}


def ref(name, **beside):
    return {"$ref": f"#/$defs/{name}", **beside}


string, integer, number, array, object_of = (
    functools.partial(dict, type=each) for each in "string integer number array object".split())
STRING, INTEGER, ANY_NUMBER, BOOLEAN, NULL = (
    {"type": each} for each in "string integer number boolean null".split())
NODE = an_object(value=INTEGER, next={"anyOf": [ref("node"), NULL]})
TREE = object_of(required=["children"], properties={"children": array(items={"$ref": "#"})})
KINDS = [object_of(properties={"kind": {"const": kind}}) for kind in ("cat", "dog")]
SATISFIED = [
    ({}, {}), (True, {}), (object_of(), {}), (array(), []), (STRING, "text"),
    ({"$id": "https://example.com/a", **STRING}, "text"), (INTEGER, 0), (BOOLEAN, False),
    (NULL, None), ({"type": ["string", "null"]}, "text"),
    (an_object(city=STRING), {"city": "city"}), (object_of(properties={"a": STRING}), {}),
    (an_object(**{"": STRING}), {"": "text"}),
    (an_object(tags=array(items=STRING, minItems=1)), {"tags": ["tags"]}),
    ({"enum": ["x", "y"]}, "x"), ({"const": 5}, 5), ({"const": None}, None),
    (string(enum=[1, "x"]), "x"), ({"const": {"a": [1]}}, {"a": [1]}),
    ({"enum": [1, True], "type": "boolean"}, True), ({"enum": [True, 1.0], "const": 1}, 1),
    ({"enum": [{"a": 1}, {"a": "x"}], "properties": {"a": STRING}}, {"a": "x"}),
    (string(minLength=6), "textxx"), (string(maxLength=2), "te"), (string(default="d"), "d"),
    (string(examples=["e", 1]), "e"), (string(default=1), "text"),
    (string(pattern="^a", default="ab"), "ab"),
    ({**an_object(a=string(pattern="^b")), "examples": [{"a": "b"}]}, {"a": "b"}),
    (array(items=NULL, minItems=2), [None, None]),
    (array(prefixItems=[INTEGER, STRING], items=False, minItems=2), [0, "text"]),
    (array(prefixItems=[INTEGER], items=STRING, minItems=2), [0, "text"]),
    (a_set(STRING, 3), ["text", "text2", "text3"]), (a_set(INTEGER, 3), [0, 1, -1]),
    (a_set(BOOLEAN), [False, True]), (a_set({"enum": [1, 1.0, True]}), [1, True]),
    (integer(minimum=3), 3), (integer(maximum=-3), -3), (integer(exclusiveMinimum=3), 4),
    (integer(exclusiveMaximum=-3), -4), (integer(minimum=2.5), 3), (integer(maximum=-2.5), -3),
    (integer(minimum=5, multipleOf=4), 8), (integer(minimum=-9, maximum=-5, multipleOf=4), -8),
    (integer(minimum=2 ** 70, multipleOf=3), 2 ** 70 + 2),
    (number(exclusiveMinimum=0, exclusiveMaximum=1), 0.5), (number(minimum=0.25), 0.25),
    (number(minimum=-2), 0), (number(minimum=0.7, multipleOf=0.5), 1),
    ({"oneOf": [INTEGER, ANY_NUMBER]}, 0.5), ({"anyOf": [{"enum": []}, {"const": 2}]}, 2),
    ({"oneOf": [False, {"const": 2}]}, 2), ({"oneOf": KINDS}, {"kind": "cat"}),
    (integer(anyOf=[STRING, {"minimum": 7}]), 7),
    ({"oneOf": [an_object(a=INTEGER), an_object(a=ANY_NUMBER, b=STRING)]}, {"a": 0}),
    ({"allOf": [INTEGER, {"minimum": 3}, {"minimum": 5}]}, 5),
    ({"allOf": [{"required": ["a"]}, {"required": ["b"]}],
      "properties": {"a": {"const": 1}, "b": {"const": 2}}}, {"a": 1, "b": 2}),
    ({"allOf": [ANY_NUMBER, INTEGER]}, 0), ({"allOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, 2),
    ({**ref("a", minimum=3), "$defs": {"a": INTEGER}}, 3), (TREE, {"children": []}),
    ({"$ref": "#/definitions/a", "definitions": {"a": {"const": 1}}}, 1),
    ({"$ref": "#/$defs/a/anyOf/1", "$defs": {"a": {"anyOf": [STRING, {"const": 1}]}}}, 1),
    *(({"$ref": f"#/{place}", "$defs": {name: {"const": 1}}}, 1) for place, name in (
        ("$defs/a~1b", "a/b"), ("$defs/a~01b", "a~1b"), ("%24defs/a%20b", "a b"))),
    ({**ref("node"), "$defs": {"node": NODE}}, {"value": 0, "next": None}),
    ({"allOf": [ref("b"), ref("c")],
      "$defs": {"a": INTEGER, "b": ref("a", minimum=1), "c": ref("a", minimum=2)}}, 2),
    ({"propertyNames": {"const": "a"}, "additionalProperties": INTEGER}, {}),
    (object_of(patternProperties={"^a": INTEGER}), {}),
    (object_of(minProperties=2, additionalProperties=INTEGER), {"key": 0, "key2": 0}),
    ({"minProperties": 2, "propertyNames": {"enum": ["r", "g"]}, "additionalProperties": INTEGER},
     {"r": 0, "g": 0}), (object_of(minProperties=1, properties={"a": INTEGER}), {"a": 0}),
]


OLDER_DRAFT = array(items=[INTEGER, STRING], minItems=2, maxItems=2), [0, "text"]


@pytest.mark.parametrize("schema, instance", [*SATISFIED, OLDER_DRAFT])
def test_a_sample_is_a_small_instance_of_its_schema(schema, instance):
    assert json.dumps(sample(schema)) == json.dumps(instance)      # 1, 1.0 and true differ


@pytest.mark.parametrize("form, pattern", [
    ("date", r"\d{4}-\d\d-\d\d"), ("time", r"\d\d:\d\d:\d\dZ"), ("duration", "P1D"),
    ("date-time", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)"),
    ("email", r"\w+@\w+\.\w+"), ("uuid", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    ("uuid1", r".{14}1.*"), ("uuid5", r".{14}5.*"), ("uri", r"https?://\S+"),
    ("hostname", r"[\w.]+"), ("ipv4", r"(\d+\.){3}\d+"), ("ipv6", "[0-9a-f:]+"),
    ("ipv4network", r"(\d+\.){3}\d+/\d+"), ("password", "text"), ("binary", "text"),
])
def test_a_sample_obeys_the_format(form, pattern):
    assert re.fullmatch(pattern, sample(string(format=form)))
    assert sample(string(format=form, default="its author's")) == "its author's"


def doubling(combine, depth=40):
    """Definitions that each use the next one twice."""
    below = {f"d{i}": combine(ref(f"d{i + 1}")) for i in range(depth)}
    return {**ref("d0"), "$defs": {**below, f"d{depth}": INTEGER}}


def nested(wrap, depth=900):
    return functools.reduce(lambda schema, _: wrap(schema), range(depth), INTEGER)


@pytest.fixture
def no_collection():
    """At the limit of recursion, a collection of garbage may abort Python 3.8."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("schema, keyword", [
    (False, "allOf"), ({"enum": []}, "enum|type"), (integer(enum=["x"]), "type"),
    (integer(const="x"), "type"), ({"enum": [True], "const": 1}, "enum|const"),
    (integer(minimum=2, maximum=1), "m..imum"),
    (integer(exclusiveMinimum=0, exclusiveMaximum=1), "exclusiveM..imum"),
    (integer(minimum=1, maximum=3, multipleOf=5), "multipleOf|m..imum"),
    (string(minLength=3, maxLength=2), "m..Length"),
    (string(format="date", maxLength=2), "format|maxLength"),
    (string(format="nobody-knows"), "format"), (string(pattern="^a+$"), "pattern"),
    (an_object(a={"default": "b"}, b={"enum": ["b"], "pattern": "^x"}), "pattern"),
    ({"required": ["a"], "propertyNames": {"pattern": "^b"}}, "pattern"),
    (array(minItems=2, maxItems=1), "m..Items"), (array(minItems=2, items=False), "items"),
    (a_set(BOOLEAN, 3), "uniqueItems"), (a_set({"enum": [1, 1.0]}), "uniqueItems"),
    (object_of(minProperties=1, maxProperties=0), "m..Properties"),
    (object_of(minProperties=1, patternProperties={"a": {}}), "patternProperties"),
    ({"required": ["a"], "additionalProperties": False}, "required|additionalProperties"),
    ({"allOf": [an_object(a=STRING), {"required": ["b"]}]}, "additionalProperties"),
    ({"allOf": [STRING, NULL]}, "type"), ({"allOf": [{"const": 1}, {"const": 2}]}, "const"),
    ({"oneOf": [{"required": ["a"]}, {"required": ["a"]}]}, "oneOf"),
    (an_object(a={"$id": "a", "$ref": "#/$defs/b"}), r"\$ref|\$id"), ({"not": {}}, "not"),
    ({"if": {}}, "if"), (array(contains={}), "contains"), (ref("none"), r"\$ref"),
    ({"$ref": "http://example.com/"}, r"\$ref"),
    ({"$ref": "other#/$defs/a", "$defs": {"a": {}}}, r"\$ref"),
    ({"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}}, r"\$ref"), ({"$ref": "#"}, r"\$ref"),
    ({**ref("a"), "$defs": {"a": ref("a")}}, r"\$ref"),
    (object_of(required=["a"], properties={"a": {"$ref": "#"}}), r"\$ref"),
    ({"oneOf": [{"not": {}}]}, "not|oneOf"), ({"type": "bogus"}, "type"),
    ({"enum": [1, 5], "minimum": 9}, "minimum"),
    # Not a schema:
    *((schema, ".+") for schema in (
        None, 1, 1.5, "x", [], {"type": 1}, {"properties": 1}, object_of(required=1), {"anyOf": []},
        object_of(required=[1]), array(minItems="x"), {"enum": 1}, {"anyOf": 1}, {"$ref": 1},
        number(multipleOf=0), {"type": ["x"]}, integer(minimum="x"), {"type": []}, {"type": {}},
        {"$ref": "#/$defs/0/x"}, an_object(a=1), object_of(required=["a"], properties=[]),
        number(minimum=5, multipleOf=1e-320), {"enum": [10 ** 400], "multipleOf": .1},
        string(format=[]), array(minItems=1.5), {"default": math.nan}, number(minimum=math.inf),
        {"const": object()},
        # Too large, too much work, too deep:
        *map(doubling, (lambda one: an_object(a=one, b=one), lambda one: {"allOf": [one, one]},
                        lambda one: array(items=one, minItems=2), lambda one: {"oneOf": [one] * 2},
                        lambda one: {"anyOf": [{"allOf": [one, NULL]}, one]},
                        lambda one: {"anyOf": [an_object(a=one, b=False), an_object(a=one)]})),
        nested(lambda schema: an_object(a=schema)), nested(lambda schema: {"anyOf": [schema]}),
        array(minItems=10 ** 9), array(minItems=200_000), string(minLength=10 ** 9),
        object_of(minProperties=10 ** 9), {"allOf": [{}] * 10 ** 5},
        string(enum=[*range(10 ** 5)]), array(items=string(minLength=10 ** 5), minItems=1000),
        array(items={"const": "x" * 10 ** 5}, minItems=1000),
        an_object(**{f"a{i}": object_of(required=["x" * 10 ** 5]) for i in range(100)}),
        {"uniqueItems": True, "default": list(range(10 ** 5)), "minItems": 10 ** 5},
        string(anyOf=[{"const": i} for i in range(10 ** 5)]))),
])
def test_what_is_no_schema_or_cannot_be_satisfied_is_a_400_that_names_the_keyword(schema, keyword):
    with pytest.raises(APIError) as error:
        sample(schema)
    assert (error.value.status, error.value.code) == (400, "invalid_json_schema")
    assert re.search(f"'({keyword})'", error.value.message) and len(error.value.message) < 10 ** 3


def random_schema(pick, depth):
    """A schema, satisfiable or not."""
    inner = [random_schema(pick, depth - 1) for _ in range(pick.randrange(1, 4) if depth else 0)]
    combined = [
        {"anyOf": inner}, {"oneOf": inner}, {**inner[0], "allOf": inner[1:]},
        {"$ref": pick.choice(["#", *["#/$defs/a", "#/$defs/b"] * 3])},
        {"enum": pick.choices([0, 1, 1.0, True, "a", None, 2.5, [], {"a": 1}], k=2)},
        object_of(properties=dict(zip("abc", inner)), required=some(pick, 0.4, "abcd"),
                  **some(pick, 0.2, {"additionalProperties": pick.choice([False, inner[0]]),
                                     "propertyNames": {"enum": ["a", "b", "c"]},
                                     "minProperties": 2, "maxProperties": 2})),
        {**array(items=inner[0], minItems=pick.randrange(3)), **some(pick, 0.2, {
            "items": False, "prefixItems": inner, "maxItems": 2, "uniqueItems": True})},
    ] if depth else []
    a_number = {"type": pick.choice(["integer", "number"]), **some(pick, 0.25, {
        "multipleOf": pick.choice([1, 2, 3, 0.5, 0.01]), **{
            bound: pick.randrange(-8, 9) / pick.choice([1, 1, 2, 8]) for bound in (
                "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")}})}
    text = string(**some(pick, 0.3, {
        "minLength": pick.randrange(4), "maxLength": pick.randrange(2, 6)}))
    rare = {"default": pick.choice([0, "a", [], {}, 1.5]), "examples": [1, "b"],
            "pattern": "a", "not": STRING, "contains": NULL}
    plain = [a_number, text, pick.choice([NULL, BOOLEAN])]
    return {**pick.choice([*combined, *combined, *plain]), **some(pick, 0.02, rare)}


def some(pick, share, items):
    """A random share of a list, or of a dict."""
    kept = [item for item in items if pick.random() < share]
    return {name: items[name] for name in kept} if type(items) is dict else kept


def random_samples(count, seed):
    """(schema, instance) for those of `count` random schemas that `sample` satisfies.

    A pattern is trusted to match an example that stands with it: such a schema is left out.
    """
    pick = random.Random(seed)
    for _ in range(count):
        schema = {"$defs": {"a": random_schema(pick, 1), "b": random_schema(pick, 2)},
                  **random_schema(pick, 3)}
        with contextlib.suppress(APIError):
            instance = sample(schema)
            if '"pattern"' not in json.dumps(schema):
                yield schema, instance


@pytest.mark.interop
def test_jsonschema_accepts_every_sample(tmp_path):
    exact = [pair for pair in SATISFIED if '"pattern"' not in json.dumps(pair[0])]
    made = [*random_samples(10_000, seed=4), *exact]
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
    assert printed("jsonschema", """
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
""", "", str(HERE)) == ["49 models"]


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


def test_a_limit_cuts_wherever_the_pieces_end():
    with Server(tokenize=list) as server:
        for limit, reason in zip((0, 1, 2, 3, 4, None), ["length"] * 3 + ["stop"] * 3):
            said = said_of(server, [*cuts("abc")], max_tokens=limit)
            assert said == {("abc"[:limit], reason)}, limit


def before_stop(text, stops):
    """What is said before the first stop, from reading the text a character at a time."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[:end - max(map(len, complete))]
    return text


def random_stops(pick):
    """A text of two letters, and stops that may be in it."""
    text, *stops = ("".join(pick.choices("ab", k=pick.randrange(least, most))) for least, most in (
        (0, 9), *[(1, 5)] * pick.randrange(1, 4)))
    return text, stops


@pytest.mark.parametrize("text, stops", [
    ("Hello END x", ["END"]), ("Hello EN", ["END"]), ("aaab", ["aab"]), ("aaaaaa", ["aaa"]),
    ("ababac", ["abac"]), ("abcabd", ["abd", "bca"]), ("xabcdey", ["abcd", "bc"]),
    ("xabcdey", ["bc", "abc"]), ("xabey", ["abcd", "be"]), ("END", ["END"]), ("", ["END"]),
    ("a\n\nb", ["\n\n", "\n"]), ("世界和平", ["界和"]), ("e\u0301x", ["\u0301"]),
    ("😀😁😂", ["😁"]), ("aXbYc", ["Y", "X"]), ("ababab", ["bb", "abc"]),
    *map(random_stops, [random.Random(4)] * 100)])
def test_a_stop_may_span_pieces_whether_a_token_is_a_character_or_a_piece(text, stops):
    for tokenize_as in (list, lambda text: [text]):
        with Server(tokenize=tokenize_as) as server:
            said = said_of(server, [*cuts(text)], stop=stops)
        assert said == {(before_stop(text, stops), "stop")}


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


FILTERED = Reply("a b", finish_reason="content_filter")


@pytest.mark.parametrize("backend, fields, content, reason", [
    (say(*"abc"), {"max_tokens": 3}, "abc", "stop"),
    (say(*"abc"), {"max_tokens": 2}, "ab", "length"),
    (say(*"abc"), {"max_tokens": 2, "max_completion_tokens": 9}, "ab", "length"),
    (say(*"abc"), {"max_tokens": 9, "max_completion_tokens": 2}, "ab", "length"),
    (say("a", "EN", "D"), {"max_tokens": 3, "stop": "END"}, "a", "stop"),
    (say("a", "EN", "D"), {"max_tokens": 2, "stop": "END"}, "aEN", "length"),
    (say("a", "b", "END"), {"max_tokens": 2, "stop": "END"}, "ab", "length"),
    (say(*"ab"), {"stop": "a"}, "", "stop"), (say(*"ab"), {"stop": []}, "ab", "stop"),
    (say(*"ab"), {"stop": ""}, "ab", "stop"), (say(*"ab"), {"stop": ["", "b"]}, "a", "stop"),
    (say(*"abcde"), {"stop": ["v", "w", "x", "y", "e"]}, "abcd", "stop"),
    (say(), {}, "", "stop"), (say(), {"max_tokens": 0}, "", "stop"),
    (say("a"), {"max_tokens": 0}, "", "length"), (say("a b", "c"), {"max_tokens": 1}, "a", "length"),
    # The input of a call is not cut, but it uses up the limit of what comes after it.
    (say(ToolCall("f", {"n": 1}), "a"), {**TOOLS, "max_tokens": 3}, None, "length"),
    (say(ToolCall("f"), ToolCall("f")), {**TOOLS, "max_tokens": 1}, None, "length"),
    # The reply's own finish_reason stands where nothing was cut.
    (Reply(["a", "b"], ToolCall("f"), finish_reason="length"), TOOLS, "ab", "length"),
    (FILTERED, {}, "a b", "content_filter"), (FILTERED, {"max_tokens": 1}, "a", "length"),
    (FILTERED, {"stop": "b"}, "a ", "stop"),
])
def test_a_reply_obeys_limit_and_stop(backend, fields, content, reason):
    first, said = message(backend, **fields)
    assert (first["content"], said) == (content, reason)


@pytest.mark.parametrize("fields, expected, left", [
    ({"max_tokens": 1}, ("x", "length"), ["one too many"]),      # the second tells of a cut
    ({"stop": "END"}, ("x", "stop"), ["one too many"])])
def test_no_more_pieces_are_asked_for_than_needed(fields, expected, left):
    rest = iter(["x", "END", "one too many"])
    first, reason = message(always(rest), **fields)
    assert (first["content"], reason) == expected and list(rest) == left


def test_choices_interleave_one_per_chunk_until_each_has_ended():
    chunks = ask(lambda request: iter(["x"] * request["index"] * 2), stream=True, n=3).chunks
    assert [[choice["index"] for choice in chunk["choices"]] for chunk in chunks] == [
        [0], [1], [2], [0], [1], [2], [1], [2], [1], [2], [2], [2]]


XY, MANY = say("x", "y"), "a b " * 500
COUNTED = {  # rule: (path, backend, fields, text of each choice, prompt and completion tokens)
    "each choice": (CHAT_PATH, XY, {"n": 3}, ["xy"] * 3, 4, 6),
    "no more than the limit": (CHAT_PATH, XY, {"max_tokens": 1}, ["x"], 4, 1),
    "all where there is no limit": (CHAT_PATH, say(MANY), {}, [MANY], 4, 1001),
    "each message": (CHAT_PATH, XY, {"messages": user("a b") + user("c")}, ["xy"], 3, 2),
    "each token of a piece": (CHAT_PATH, say("a b", "c d"), {}, ["a bc d"], 4, 4),
    "a call's arguments": (CHAT_PATH, say(ToolCall("f", {"n": 1})), TOOLS, [None], 4, 7),
    "each choice of a completion": (TEXT_PATH, XY, {"n": 3}, ["xy"] * 3, 4, 6),
    "all of a completion": (TEXT_PATH, say(MANY), {}, [MANY], 4, 1001),
    "an empty prompt": (TEXT_PATH, echo, {"prompt": ""}, [""], 0, 0),
    "several prompts": (TEXT_PATH, echo, {"prompt": ["a", "b c"]}, ["a", "b c"], 3, 3),
    "each prompt once": (TEXT_PATH, lambda request: "%(index)s%(prompt)s" % request,
                         {"prompt": ["a", "b c"], "n": 2}, ["0a", "1a", "2b c", "3b c"], 3, 6),
    "token ids": (TEXT_PATH, echo, {"prompt": [17, 0]}, ["<|17|><|0|>"], 2, 10),
    "several lists of them": (TEXT_PATH, XY, {"prompt": [[1, 2], [3]]}, ["xy"] * 2, 3, 4),
    "which are read like this": (TEXT_PATH, echo, {"prompt": [[1], [2, 3]]},
                                 ["<|1|>", "<|2|><|3|>"], 3, 15),
    "null, the end of a text": (TEXT_PATH, echo, {"prompt": None}, ["<|endoftext|>"], 5, 5),
    "all of best_of, of which the first n are told": (
        TEXT_PATH, lambda request: str(request["index"]),
        {"prompt": ["a", "b"], "n": 2, "best_of": 3}, ["0", "1", "3", "4"], 2, 6),
    "an echo, which goes before, not at all": (TEXT_PATH, XY, {"echo": True},
                                               ["Hello, world!xy"], 4, 2),
    "an echo of token ids": (TEXT_PATH, say("x"), {"echo": True, "prompt": [[1], [2, 3]]},
                             ["<|1|>x", "<|2|><|3|>x"], 3, 2),
    "an echo, not searched for stops": (TEXT_PATH, say(" c b d"), {
        "echo": True, "prompt": "a b", "stop": "b"}, ["a b c "], 2, 2),
    "a suffix, which is not told, not at all": (TEXT_PATH, XY, {"suffix": "SUF"}, ["xy"], 4, 2),
}


@pytest.mark.parametrize("path, backend, fields, texts, prompt, completion", rows(COUNTED))
def test_a_whole_reply_tells_and_counts(path, backend, fields, texts, prompt, completion):
    got = ask(backend, path, **fields).json
    told = [choice["message"]["content"] if path == CHAT_PATH else choice["text"]
            for choice in got["choices"]]
    assert told == texts and [choice["index"] for choice in got["choices"]] == [*range(len(texts))]
    assert [got["usage"][name] for name in COUNTERS] == [prompt, completion, prompt + completion]


# ----------------------------------------------------------------------------------
# Chunks, and the completion they spell.  The client folds a stream; what it makes of it is
# what a whole reply to the same request says.

def test_no_chunks_are_no_completion():
    with pytest.raises(ValueError, match="at least 1"):
        openai_compat.fold([])


MADE_F, MADE_G = ToolCall("f", {"n": 1}, "call_f"), ToolCall("g", '{"x": "世"}', "call_g")


def model(request):
    """A backend that says what the request's text names: all that can be said."""
    return {
        "text": "Hello, world! 世界 😀 e\u0301", "nothing": "", "space": " \n",
        "list": ["He", "llo", "", " wor", "ld"], "awkward": "a\u2028b\x85c\ud83dd\0e\x7f\"\\",
        "filtered": Reply("a b", finish_reason="content_filter"),
        "usage": Reply("a b", usage={"prompt_tokens": 7, "completion_tokens": 9}),
        "refusal": Reply(refusal="I'm sorry, no."), "custom": ToolCall("c", "any text", "call_1"),
        "call": MADE_F, "no arguments": [ToolCall("f", "", "call_2")],
        "calls": Reply(tool_calls=[MADE_F, MADE_G]),
        "text and calls": Reply("Let me see.", [MADE_F, ToolCall("f", {}, "call_3")]),
        "calls and text": ["I ", MADE_F, "wait", MADE_G, "."],
    }[request["text"]]


TEXTS = ["text", "nothing", "space", "list", "awkward", "filtered", "usage"]
CALLING = ["call", "no arguments", "calls", "text and calls", "calls and text"]
SAME = [  # path, what the model says, fields
    *itertools.product([CHAT_PATH], [*TEXTS, "refusal"], [
        {}, {"n": 3}, {"max_tokens": 1}, {"max_tokens": 3, "n": 2}, {"stop": "o"},
        {"logprobs": True}, {"logprobs": True, "top_logprobs": 3, "n": 2},
        {"max_completion_tokens": 2, "stop": ["l", "wor"], "logprobs": True}]),
    *itertools.product([CHAT_PATH], CALLING, [
        {}, TOOLS, {**TOOLS, "n": 2}, {**TOOLS, "parallel_tool_calls": False},
        {**TOOLS, "max_tokens": 1}, {**TOOLS, "max_tokens": 0},
        {**TOOLS, "logprobs": True, "stop": "w"}]),
    *itertools.product([CHAT_PATH], CALLING[:3], [FUNCTIONS]), (CHAT_PATH, "custom", TOOLS),
    *itertools.product([TEXT_PATH], TEXTS, [
        {}, {"n": 3}, {"max_tokens": 0}, {"max_tokens": 2}, {"stop": "o"}, {"echo": True},
        {"echo": True, "max_tokens": 0, "logprobs": 1}, {"echo": True, "logprobs": 5, "n": 2},
        {"logprobs": 0}, {"logprobs": 2}, {"suffix": "x", "stop": ["l", "wor"], "logprobs": 2}]),
]


def test_a_stream_and_a_whole_reply_say_the_same():
    with Server(model) as server:
        for path, what, fields in SAME:
            fields = {"prompt": what, **fields}
            at_once = chat(server, what, path, **fields).json
            in_turn = fold(chat(server, what, path, stream=True,
                                stream_options={"include_usage": True}, **fields).chunks)
            assert {**in_turn, "id": 0, "created": 0} == {**at_once, "id": 0, "created": 0}, what


@pytest.mark.parametrize("path", BOTH)
def test_usage_is_streamed_only_where_it_was_asked_for(path):
    for options in ({}, None, {"include_usage": False}, {"include_usage": None},
                    {"include_obfuscation": True}):
        chunks = ask(say("a"), path, stream=True, stream_options=options).chunks
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@both
@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("corrections, counted", [
    ({"prompt_tokens": 70}, [70, 2, 72]), ({"completion_tokens": 9}, [4, 9, 13]),
    ({"total_tokens": 99}, [4, 2, 99]), ({"prompt_tokens": 1, "completion_tokens": 1}, [1, 1, 2]),
    ({"prompt_tokens": 0}, [0, 2, 2]), ({"prompt_tokens": None}, [4, 2, 6]),
    ({"total_tokens": None}, [4, 2, 6])])
def test_a_reply_may_correct_its_usage(corrections, counted, path, stream):
    fields = {"stream_options": {"include_usage": True}} if stream else {}
    got = ask(Reply("a b", usage=corrections), path, stream=stream, **fields)
    usage = (got.chunks[-1] if stream else got.json)["usage"]
    assert [usage[name] for name in COUNTERS] == counted


@pytest.mark.parametrize("asked, told", [
    (None, "default"), ("auto", "default"), ("default", "default"), ("flex", "flex"),
    ("fast", "priority"), ("priority", "priority")])
def test_the_service_tier_is_the_resolved_one(asked, told):
    assert ask(echo, service_tier=asked).json["service_tier"] == told


def test_created_is_now():
    before = int(time.time())
    assert before <= ask(echo).json["created"] <= time.time()


# ------ log probabilities

@pytest.mark.parametrize("top", [None, 0, 1, 5, 20])
def test_chat_logprobs_are_those_of_the_text_beside_as_many_as_asked_for(top):
    got = ask(say("Hello, the", "é."), logprobs=True, top_logprobs=top).json["choices"][0]
    tokens = got["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["Hello", ",", " the", "é", "."]
    for token in tokens:
        assert bytes(token["bytes"]).decode() == token["token"]
        assert token["logprob"] <= 0 and math.isfinite(token["logprob"])
        likely = [other["logprob"] for other in token["top_logprobs"]]
        assert likely == sorted(likely, reverse=True) and sum(map(math.exp, likely)) <= 1
        others = {other["token"] for other in token["top_logprobs"]}
        assert len(others) == len(likely) == (top or 0)


def test_each_chunk_has_the_logprobs_of_its_own_text():
    chunks = ask(say("a b", "c"), stream=True, logprobs=True).chunks
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["logprobs"] == {"content": [], "refusal": None} and last["logprobs"] is None
    for choice in middle:
        said = "".join(token["token"] for token in choice["logprobs"]["content"])
        assert said == choice["delta"]["content"]


@pytest.mark.parametrize("top", [0, 1, 2, 5])
@pytest.mark.parametrize("said, fields, tokens", rows({
    "the reply": (["a b", " the", "世"], {"prompt": "pr om"}, ["a", " b", " the", "世"]),
    "an echo": (["c"], {"prompt": "a b", "echo": True}, ["a", " b", "c"]),
    "an empty echo": (["x"], {"prompt": "", "echo": True}, ["x"]),
    "a scorer": (["x"], {"prompt": [5, 6, 7], "echo": True, "max_tokens": 0},
                 ["<|5|>", "<|6|>", "<|7|>"]),
    "a scorer, and one more": (["x", "y"], {"prompt": [5, 6], "echo": True, "max_tokens": 1},
                               ["<|5|>", "<|6|>", "x"]),
    "a cut token": (["Hello"], {"prompt": "pr om", "stop": "ll"}, ["He"])}))
def test_text_logprobs_are_parallel_and_cover(said, fields, tokens, top):
    choice = ask(say(*said), TEXT_PATH, logprobs=top, **fields).json["choices"][0]
    logprobs, start = choice["logprobs"], 0 if "echo" in fields else len("pr om")
    assert logprobs["tokens"] == tokens and "".join(tokens) == choice["text"]
    assert {len(column) for column in logprobs.values()} == {len(tokens)}
    offsets = [start + len("".join(tokens[:i])) for i in range(len(tokens))]
    assert logprobs["text_offset"] == offsets
    scored = [*zip(tokens, logprobs["token_logprobs"], logprobs["top_logprobs"])]
    if fields["prompt"] and "echo" in fields:       # nothing stands before the first token
        assert scored.pop(0)[1:] == (None, None)
    for token, logprob, likely in scored:
        assert likely[token] == logprob == max(likely.values()) and math.isfinite(logprob)
        assert top <= len(likely) <= top + 1


# ------ tool calls and refusals

def in_schema(schema):
    return form("json_schema", json_schema={"name": "s", "schema": schema})


def choose(kind, **named):
    return {**TOOLS, "tool_choice": {"type": kind, kind: named}}


ALLOWED = [{"type": "function", "function": {"name": "g"}}]
GREETING, BOTH_CALLS = "Hello, world!", always(Reply(tool_calls=[ToolCall("f"), ToolCall("g")]))
ANSWERS = {  # rule: (backend, fields, content, {name: input} of the calls)
    "a call has no content": (always(ToolCall("f", {"n": 1})), TOOLS, None, {"f": '{"n":1}'}),
    "arguments may be text, and go out as they are": (
        always(ToolCall("f", '{"n" : 1, broken')), TOOLS, None, {"f": '{"n" : 1, broken'}),
    "no arguments are an empty object": (
        always([ToolCall("f"), ToolCall("g", "")]), TOOLS, None, {"f": "{}", "g": "{}"}),
    "for a function too": (always(ToolCall("f", "")), FUNCTIONS, None, {"f": "{}"}),
    "a custom tool gets text": (always(ToolCall("c", "any text")), TOOLS, None, {"c": "any text"}),
    "a call may be yielded": (lambda _: iter(["a", ToolCall("f")]), TOOLS, "a", {"f": "{}"}),
    "text and calls may be in one": (always(Reply(["a", "b"], ToolCall("f"))), TOOLS, "ab",
                                     {"f": "{}"}),
    "arguments are never cut": (always(ToolCall("f", {"n": 1})),
                                {**TOOLS, "max_tokens": 1, "stop": "n"}, None, {"f": '{"n":1}'}),
    "calls are parallel": (BOTH_CALLS, TOOLS, None, {"f": "{}", "g": "{}"}),
    "or said to be": (BOTH_CALLS, {**TOOLS, "parallel_tool_calls": True}, None,
                      {"f": "{}", "g": "{}"}),
    "or one at most": (BOTH_CALLS, {**TOOLS, "parallel_tool_calls": False}, None, {"f": "{}"}),
    "of legacy functions one is called": (BOTH_CALLS, FUNCTIONS, None, {"f": "{}"}),
    "only echo obeys": (say("x"), {**FORCED, **in_schema({"type": "null"})}, "x", {}),
}
ECHOED = {  # what echo says: (fields, content, {name: input} of the calls)
    "a text": (TOOLS, GREETING, {}),
    "a call of the tool that it has to call": (FORCED, None, {"f": '{"n":0}'}),
    "by its name": (choose("function", name="f"), None, {"f": '{"n":0}'}),
    "or another": (choose("function", name="g"), None, {"g": "{}"}),
    "or a custom one": (choose("custom", name="c"), None, {"c": GREETING}),
    "or one allowed": (choose("allowed_tools", mode="required", tools=ALLOWED), None, {"g": "{}"}),
    "none that may be": (choose("allowed_tools", mode="auto", tools=ALLOWED), GREETING, {}),
    "none where it may not": ({**TOOLS, "tool_choice": "none"}, GREETING, {}),
    "none where it need not": ({**TOOLS, "tool_choice": "auto"}, GREETING, {}),
    "null is auto": ({**TOOLS, "tool_choice": None}, GREETING, {}),
    "a function by its name": ({**FUNCTIONS, "function_call": {"name": "g"}}, None, {"g": "{}"}),
    "no function where it may not": ({**FUNCTIONS, "function_call": "none"}, GREETING, {}),
    "no function where it need not": ({**FUNCTIONS, "function_call": "auto"}, GREETING, {}),
    "null is auto there too": ({**FUNCTIONS, "function_call": None}, GREETING, {}),
    "an instance of the schema": (in_schema(an_object(a={"const": "世"})), '{"a":"世"}', {}),
    "of any schema": (in_schema({"type": "integer", "minimum": 3}), "3", {}),
    "or of none": (form("json_schema", json_schema={"name": "s"}), "{}", {}),
    "or an object": (form("json_object"), '{"text":"Hello, world!"}', {}),
    "or text": (form("text"), GREETING, {}),
}


@pytest.mark.parametrize("backend, fields, content, calls", rows(
    {**ANSWERS, **{f"echo: {rule}": (echo, *row) for rule, row in ECHOED.items()}}))
def test_a_message_holds(backend, fields, content, calls):
    got, reason = message(backend, **fields)
    made = [each[each["type"]] for each in got.get("tool_calls", ())]
    made += [got["function_call"]] if "function_call" in got else []
    assert got["content"] == content and dict(each.values() for each in made) == calls
    kind = "function_call" if "functions" in fields else "tool_calls"
    assert reason == (kind if calls else "stop")
    assert got.keys() & {"function_call", "tool_calls"} == ({kind} if calls else set())


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
    got = ask_in_vain(APIError, model, TEXT_PATH, prompt=what, stream=stream, echo=True)
    assert got.status == 500 and re.search("tool call|refusal", got.error["message"])


@pytest.mark.parametrize("fields", [
    in_schema({"not": {}}), {**FORCED, **function(name="f", parameters={"not": {}})},
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


def test_the_wire_is_the_same_where_the_c_part_of_json_is_missing(monkeypatch):
    value, encode = {"é": ['world"', "\u2028", 1.5, None, True]}, openai_compat.encode_json
    monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    assert openai_compat.fast_encode_json()(value) == encode(value)


# ----------------------------------------------------------------------------------
# Backends.  What may be returned and yielded, what may be raised, and when it is closed.

TEAPOT = APIError(418, "I'm a teapot.", "pot", "teapot", "tea", {"retry-after-ms": "20"})
WRONG = [None, 5, 1.5, True, b"x", {"a": 1}, object()]
QUOTA, RETRY = "insufficient_quota", "x-should-retry"


@pytest.mark.parametrize("backend, pieces", [
    ("a b", ["a", " b"]), (Reply(["a ", "b"]), ["a ", "b"]), (Reply(("a ", "b")), ["a ", "b"]),
    (say("a b"), ["a b"]), (say("a ", "b"), ["a ", "b"]), (always(Reply("a b")), ["a", " b"]),
    (always("a b"), ["a", " b"]), (always(["a b", "c"]), ["a b", "c"]),
    (always(("a", "b")), ["a", "b"]), (lambda request: iter(["a", "", "b"]), ["a", "b"]),
    (lambda request: (word[::-1] for word in request["text"].split()), ["!a"]),
    (always(""), []), (always([]), []), (always(Reply()), [])])
def test_what_a_backend_may_say_each_time(backend, pieces):
    with Server(backend) as server:
        for _ in range(2):
            _, *middle, end = deltas(chat(server, "a!", stream=True).chunks)
            assert [delta["content"] for delta in middle] == pieces and end == {}


def test_the_backend_may_be_replaced_while_it_serves_also_by_a_constant():
    with Server("a") as server:
        assert chat(server).text == "a"
        server.backend = say("b")
        assert chat(server).text == "b"
        server.backend = ToolCall("f", {"n": 1})
        assert chat(server, **TOOLS).json["choices"][0]["finish_reason"] == "tool_calls"
        server.backend = TEAPOT
        assert chat(server).error["code"] == "teapot"


UNKNOWN_FIELDS = {"top_k": None, "thinking": {"a": [None]}}     # which pass, null or not


@pytest.mark.parametrize("path, fields, wanted", [
    (CHAT_PATH, {}, {"endpoint": "chat", "index": 0, "text": "Hello, world!",
                     "prompt": "Hello, world!", "n": 1, "stop": [], "stream": False}),
    (TEXT_PATH, {}, {"endpoint": "completion", "index": 0, "text": "Hello, world!",
                     "prompt": "Hello, world!", "best_of": 1, "echo": False}),
    (TEXT_PATH, {"prompt": [17]}, {"text": "<|17|>"}),
    *((path, UNKNOWN_FIELDS, UNKNOWN_FIELDS) for path in BOTH)])
def test_a_backend_gets_the_request(path, fields, wanted):
    seen = []
    got = ask(lambda request: seen.append(request) or "x", path, **fields).json
    assert wanted.items() <= seen[0].items() and seen[0]["id"] == got["id"]


@pytest.mark.parametrize("stream, backend, value", [
    *((stream, always(value), value) for stream in (False, True) for value in WRONG),
    *((True, always([value]), value) for value in (*WRONG, ["x"], Reply("x")))])
def test_what_no_backend_may_return_or_yield_is_a_500_that_says_so(stream, backend, value):
    got = ask_in_vain(APIError, backend, stream=stream)
    assert got.status == 500 and type(value).__name__ in got.error["message"]


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


@pytest.mark.parametrize("name, value", [
    ("text", 0), ("text", b"x"), ("text", {"a": 1}), ("text", [1]), ("expect", 5),
    ("tool_calls", "x"), ("tool_calls", ["f"]), ("refusal", 5), ("finish_reason", 5),
    ("usage", [1]), ("delay", "1"), ("delay", -1), ("delay", math.nan), ("delay", (1,)),
    ("quirk", 5), ("headers", "x"), ("error", ValueError())])
def test_a_value_of_the_wrong_type_is_refused_where_the_reply_is_made(name, value):
    with pytest.raises(TypeError, match=name):
        Reply(**{name: value})


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
    body = {**HI, **PROMPT, "prompt": ["p"], "x": [1], "stop": ["z"], "n": 3}
    seen, names = [], ("stop", "x", "messages")

    def backend(request):
        seen.append(json.dumps([request.get(name) for name in (*names, "body")]))
        for name in names:
            request.get(name, []).append({"changed": 1})
            request["body"].get(name, []).append("changed")
        return "a"
    with Server(backend) as server:
        post(server, path, body)
        assert server.journal[0].body == body and seen == [seen[0]] * 3
        server.journal[0].body["x"].append("changed")
        assert server.journal[0].body == body


def test_ids_are_unique_and_frozen_by_a_seed_and_the_programs_own_random_is_left_alone():
    def ids(*seed):
        with Server(always([ToolCall("f"), ToolCall("f", id="call_x")])) as server:
            for each in seed:
                server.random.seed(each)
            random.seed(7)
            made = [chat(server, n=2, **TOOLS).json for _ in range(2)]
        assert random.random() == random.Random(7).random()
        calls = [call["id"] for each in made for choice in each["choices"]
                 for call in choice["message"]["tool_calls"]]
        assert calls[1::2] == ["call_x"] * 4        # the id that it was given
        return [each["id"] for each in made] + calls[::2]
    assert ids(7) == ids(7) and len({*ids(7)}) == 6 and not {*ids()} & {*ids()}


def failing(error, *pieces):
    def backend(request):
        yield from pieces
        raise error
    return backend


def raising(error):
    def backend(request):
        raise error
    return backend


@both
@pytest.mark.parametrize("backend, begun", rows({
    "called": (raising(TEAPOT), False), "at once": (failing(TEAPOT), False),
    "after nothing": (failing(TEAPOT, ""), False), "after a piece": (failing(TEAPOT, "a"), True)}))
def test_an_error_is_a_status_or_in_a_stream_that_has_begun_an_event(backend, begun, stream):
    got = ask(backend, stream=stream)
    assert got.error == {"message": "I'm a teapot.", "type": "tea", "param": "pot",
                         "code": "teapot"}
    if begun and stream:
        assert got.status == 200 and got.body.count(b"data: ") == 3 and b"[DONE]" not in got.body
    else:
        assert got.status == 418 and got.headers["retry-after-ms"] == "20"


@both
@pytest.mark.parametrize("pieces", [(), ("a",)], ids=["at once", "later"])
@pytest.mark.parametrize("error", [
    RuntimeError("secret"), SystemExit("secret"), StopIteration("secret"),
    pytest.fail.Exception("secret")], ids=repr)
def test_any_other_error_is_a_500_stays_at_home_and_fails_the_block(error, pieces, stream, caplog):
    backend = failing(error, *pieces) if pieces else raising(error)
    kind = RuntimeError if type(error) is StopIteration else type(error)    # PEP 479
    with failing_at_its_end(backend, kind, "secret|StopIteration") as server:
        got = chat(server, stream=stream)
        assert outcome(server) == "error" and b"secret" not in got.body
    assert got.status == (200 if stream and pieces else 500)
    assert got.error["message"].startswith("The server had an error while processing")
    assert got.error["type"] == "server_error"
    assert "secret" in caplog.text and "Traceback" in caplog.text


def test_the_first_failure_of_several_fails_the_block_but_no_connection():
    errors = [KeyError("first"), ValueError("second")]
    server = Server(lambda request: raising(errors.pop(0))(request)).start()
    assert statuses(server, posted(TEXT_JSON) * 2 + LAST) == [500, 500, 200]
    with pytest.raises(KeyError, match="first") as fault:
        server.shutdown()                       # the name in socketserver for close
    server.close()                              # closing twice is closing once
    assert "Raise APIError" in "".join(getattr(fault.value, "__notes__", ["Raise APIError"]))
    assert fault.traceback[-1].name == "backend"    # where it came from, not where it was kept


@pytest.mark.parametrize("backend, error", [
    (raising(ValueError("of the backend")), IndexError), (Script("a", "left over"), KeyError),
    (Script(), KeyboardInterrupt)])
def test_what_ends_the_block_is_not_hidden(backend, error):
    with pytest.raises(error, match="of the block"):
        with Server(backend) as server:
            chat(server)
            raise error("of the block")


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
def test_an_exception_that_is_raised_again_keeps_nothing_alive(error, kept, late, stream, caplog):
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
    with contextlib.suppress(RuntimeError), Server(backend) as server, no_collector():
        for _ in range(8):
            chat(server, stream=stream)
        until(lambda: len(server.journal) == 8 and server.journal[-1].outcome)
        # What nobody meant keeps two: the first is raised again, the last is its context.
        until(lambda: len([1 for ref in held if ref()]) <= kept)


def test_an_error_can_be_pickled_and_copied():
    for again in (pickle.loads(pickle.dumps(TEAPOT)), copy.copy(TEAPOT), copy.deepcopy(TEAPOT)):
        assert (again.status, again.body(), again.headers, str(again)) == (
            418, TEAPOT.body(), TEAPOT.headers, "I'm a teapot.")
    fault = openai_compat.BackendFault("it yields 5")
    for again in (pickle.loads(pickle.dumps(fault)), copy.copy(fault), copy.deepcopy(fault)):
        assert (type(again), again.body()) == (type(fault), fault.body())


@pytest.mark.parametrize("status, given, kind, code, retry", [
    (400, {}, "invalid_request_error", None, None), (401, {}, "invalid_request_error", None, None),
    (404, {}, "invalid_request_error", None, None), (500, {}, "server_error", None, None),
    (429, {}, "requests", "rate_limit_exceeded", None), (502, {}, "server_error", None, None),
    (503, {}, "service_unavailable_error", None, None),
    (429, {"code": QUOTA}, QUOTA, QUOTA, "false"),
    (429, {"code": QUOTA, "headers": {RETRY: "true"}}, QUOTA, QUOTA, "true")])
def test_an_errors_type_and_code_follow_from_its_status(status, given, kind, code, retry):
    error = APIError(status, "x", **given)
    assert str(error) == error.message == "x" and error.headers.get(RETRY) == retry
    assert error.body() == {"error": {"message": "x", "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize("status, is_one", [(399, False), (400, True), (599, True), (600, False)])
def test_the_status_of_an_error_is_from_400_to_599(status, is_one):
    with contextlib.nullcontext() if is_one else pytest.raises(ValueError, match=str(status)):
        assert APIError(status, "x").status == status


class Said(list):
    """Pieces that count how often they are closed; `fault` is raised then."""

    def __init__(self, *pieces, fault=None):
        super().__init__(pieces)
        self.fault, self.closed = fault, 0

    def close(self):
        self.closed += 1
        if self.fault:
            raise self.fault


@pytest.mark.parametrize("second, fields, closed", rows({
    "the limit is reached": (always("a b"), {"max_tokens": 1}, [1, 1]),
    "a neighbour fails": (failing(TEAPOT, "a"), {"stream": True}, [1, 1]),
    "a neighbour fails at once": (raising(TEAPOT), {}, [1, 0])}))
@pytest.mark.parametrize("kind", [Script, lambda backend: backend], ids=["script", "function"])
def test_what_the_choices_say_is_closed_when(second, fields, closed, kind):
    said = [Said("a", "b"), Said("a", "b")]
    choices = [always(said[0]), second, always(said[1])]
    got = ask(kind(lambda request: choices[request["index"]](request)), n=3, **fields)
    assert [each.closed for each in said] == closed
    assert "max_tokens" in fields or got.error["code"] == "teapot"


def test_a_fault_in_closing_harms_neither_the_neighbour_nor_the_connection():
    choices = [Said("a"), Said("b", fault=ValueError("no"))]
    body = json.dumps({**PROMPT, "n": 2}).encode()
    with failing_at_its_end(lambda request: choices[request["index"]], ValueError) as server:
        *got, _ = talk(server, posted(body) * 2 + LAST)
    texts = [[choice["text"] for choice in each.json["choices"]] for each in got]
    assert texts == [["a", "b"]] * 2 and [choice.closed for choice in choices] == [2, 2]


def test_arguments_that_hold_themselves_are_refused():
    circle = {}
    circle["again"] = circle
    with pytest.raises(RecursionError):
        ToolCall("f", circle)


@both
def test_a_reply_has_the_servers_headers_and_its_own_which_become_text(stream):
    reply = Reply("a", headers={"x-mine": "7", "X-Count": 3}, delay=(0.05, 0))
    reply.headers["x-late"], begun = 5, time.monotonic()
    headers = ask(reply, stream=stream).headers
    assert (headers["x-mine"], headers["x-count"], headers["x-late"]) == ("7", "3", "5")
    taken = 1000 * (time.monotonic() - begun)
    assert 50 <= int(headers["openai-processing-ms"]) <= taken      # until the first piece
    if stream:
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["x-accel-buffering"] == "no" and "no-cache" in headers["cache-control"]


@pytest.mark.parametrize("make", [Reply, lambda headers: APIError(400, "no", headers=headers)])
def test_a_header_cannot_smuggle_another(make):
    for value in ("a\r\nset-cookie: b", "a\nb", "a\0b", "a\x01b", "a\x0bb", "a\x7fb", "\u0100"):
        with pytest.raises(ValueError):
            make(headers={"x-mine": value})
    for name in ("a b", "a:", "", "\xe4", "a\r\nb",
                 "Content-Length", "transfer-encoding", "connection"):
        with pytest.raises(ValueError, match="cannot be a header of a response"):
            make(headers={name: "1"})


def test_every_reply_has_a_request_id_of_its_own():
    with Server() as server:
        ids = [call(server, *request).headers["x-request-id"] for request in (
            ("GET", "/health"), ("GET", "/nowhere"), ("POST", CHAT_PATH, HI),
            ("POST", CHAT_PATH, "{"), ("OPTIONS", CHAT_PATH))]
    assert len(set(ids)) == 5 and all(re.fullmatch("req_[0-9a-f]{32}", id) for id in ids)


def test_with_a_delay_of_the_server_each_piece_is_sent_at_once(monkeypatch):
    pauses, go_on = [], threading.Event()
    monkeypatch.setattr(openai_compat, "pause", lambda seconds: (
        pauses.append(seconds), len(pauses) > 1 and go_on.wait(60)))
    with Server("a b") as server:
        server.delay = 5
        with asking(server, stream=True) as client:
            read_past(client, b'"a"')           # while the server pauses before the next
            go_on.set()
            assert DONE in read_to_end(client) and pauses == [5, 5]


@both
@pytest.mark.parametrize("text, delay, least", [
    ("a b", 0.02, 0.04), ("a b", (0.03, 0), 0.03), ("a b", [0, 0.03], 0.03),
    ("a", (0, 3600), 0), ("a", (0.03, 3600), 0.03)])
def test_a_reply_takes_its_time_and_no_pause_follows_its_end(text, delay, least, stream):
    begun = time.monotonic()
    assert ask(Reply(text, delay=delay), stream=stream).text == text
    assert time.monotonic() - begun >= least


def test_a_pause_ends_when_the_server_does():
    with Server(Reply("a", delay=3600)) as server, asking(server) as client:
        until(lambda: server.journal)
        server.close()
        [got] = replies(read_to_end(client))
    assert got.status == 503 and "shutting down" in got.error["message"]


# ----------------------------------------------------------------------------------
# Script.

NOT_FOLLOWED = 400      # the status of a request that a script did not expect
INCLUDING = {**HI, "stream": True,
             "stream_options": {"include_usage": True, "include_obfuscation": False}}
LONG_TEXT = "a" * 300 + "%s" + "z" * 300
STEPS = [
    "世界", {"text": ["b", "c"]}, {"text": "b", "finish_reason": "length", "expect": {"model": "m"}},
    {"tool_calls": [{"name": "f", "arguments": {"n": 1}}, {"name": "g", "arguments": "{}"}]},
    {"error": {"status": 429, "message": "slow down", "code": "rate_limit_exceeded",
               "headers": {"retry-after-ms": "20"}}, "delay": 0, "expect": {"n": 2}}]


def test_a_script_is_taken_step_by_step_and_all_choices_say_the_same():
    def spoken(request):
        yield from "cd"
    script = Script("a", Reply("b"), spoken, lambda request: request["text"], TEAPOT, Reply(
        "", quirk="html_502"), "t", ToolCall("f"), [ToolCall("f"), ToolCall("g")])
    with Server(script, quirk_header=True) as server:
        assert chat(server, n=0).status == 400      # what is refused takes no step
        assert chat(server, headers={"X-Quirk": "bogus"}).status == 400
        for text in ("a", "b", "cd", "Hi"):
            said = fold(chat(server, n=3, stream=True).chunks)["choices"]
            assert [each["message"]["content"] for each in said] == [text] * 3
        assert chat(server).error["code"] == "teapot" and chat(server, stream=True).status == 502
        assert post(server, TEXT_PATH, PROMPT).text == "t"
        made = [fold(chat(server, stream=True, **TOOLS).chunks)["choices"][0] for _ in "12"]
    assert [[call["function"] for call in each["message"]["tool_calls"]] for each in made] == [
        [{"name": "f", "arguments": "{}"}], [{"name": name, "arguments": "{}"} for name in "fg"]]


def from_file(tmp_path, steps):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(steps), encoding="utf-8")
    return Script.from_file(str(path))


@pytest.mark.parametrize("make", [
    from_file, lambda _, steps: Script(*steps)], ids=["a file", "dicts"])
def test_a_script_may_come_from_a_file_or_from_dicts_as_in_one(tmp_path, make):
    with Server(make(tmp_path, STEPS)) as server:
        *got, refused = [chat(server, n=n, **TOOLS) for n in (1, 1, 1, 1, 2)]
    said = [each.json["choices"][0] for each in got]
    assert [(each["message"]["content"], each["finish_reason"]) for each in said] == [
        ("世界", "stop"), ("bc", "stop"), ("b", "length"), (None, "tool_calls")]
    assert [made["function"] for made in said[3]["message"]["tool_calls"]] == [
        {"name": "f", "arguments": '{"n":1}'}, {"name": "g", "arguments": "{}"}]
    assert refused.status == 429 and refused.headers["retry-after-ms"] == "20"


@pytest.mark.parametrize("steps, words", [
    ({}, "list"), ([5], "step 1"), (["a", {"bogus": 1}], "step 2.*bogus"), ([None], "step 1"),
    ([{"error": {}}], "step 1.*status"), ([{"tool_calls": [{"arguments": {}}]}], "step 1.*name"),
    ([{"quirk": "bogus"}], "step 1.*bogus"), ([{"error": "x"}], "step 1"),
    ([{"tool_calls": 5}], "step 1")])
def test_a_file_that_is_no_script_says_where(tmp_path, steps, words):
    with pytest.raises((TypeError, ValueError), match=words):
        from_file(tmp_path, steps)


def test_in_any_order_a_request_takes_the_first_step_that_expects_it():
    def saying(text, word):
        return Reply(text, expect={"messages": lambda messages: word in messages[-1]["content"]})
    script = Script("free", saying("1", "x"), saying("2", "x"), saying("3", "y"), any_order=True)
    with Server(script) as server:
        assert [chat(server, text).text for text in "yxzx"] == ["3", "1", "free", "2"]


def asserts(value):
    assert value == "x", "the model must be x"
    return True


DIFFERENCES = {  # what is expected, the fields of the body, and what the refusal says
    "another value": ({"model": "m", "n": 2}, {"n": 1}, "n is 1, expected 2"),
    "the type": ({"temperature": "1"}, {"temperature": 1}, "temperature is 1, expected '1'"),
    "an absent field": ({"temperature": 0}, {}, "temperature is absent, expected 0"),
    "a field of a field": ({"stream_options": {"include_usage": True}},
                           {"stream": True, "stream_options": {"include_usage": False}},
                           "stream_options.include_usage is False, expected True"),
    "a dict in a list": ({"messages": [{"content": "Hi"}]}, {},
                         "messages[0].content is 'Hello, world!', expected 'Hi'"),
    "no list": ({"messages": []}, {}, "messages has 1 item", "expected 0"),
    "a shorter list": ({"stop": ["a", "b"]}, {"stop": ["a"]}, "stop has 1 item", "expected 2"),
    "a longer list": ({"stop": ["a"]}, {"stop": ["a", "b"]}, "stop has 2 items, expected 1"),
    "no object": ({"stop": {"a": 1}}, {"stop": "x"}, "stop is 'x', expected {'a': 1}"),
    "a function": (lambda body: False, {}, "<lambda> says: no"),
    "a function in a list": ({"stop": ["a", str.isupper]}, {"stop": ["a", "b"]},
                             "stop[1] is 'b', to which isupper says: no"),
    "an AssertionError": ({"model": asserts}, {},
                          "model is 'm', to which asserts says: the model must be x"),
    "a function that returns None": ({"model": lambda value: None}, {},
                                     "None (to say yes, it must return True)"),
    "a function of what is absent": ({"seed": bool}, {}, "seed is absent, to which bool says: no"),
    "the middle of a long text": ({"user": LONG_TEXT % "expected"}, {"user": LONG_TEXT % "sent"},
                                  "aaasentzzz"),
    "the middle that was expected": ({"user": LONG_TEXT % "expected"},
                                     {"user": LONG_TEXT % "sent"}, "aaaexpectedzzz")}
NOT_AS_WRITTEN = {  # the script, the fields of each request, their statuses, and what is said
    **{name: (Script(Reply("a", expect=expect)), [body], [NOT_FOLLOWED], ["step 1", *words])
       for name, (expect, body, *words) in DIFFERENCES.items()},
    "past the end": (Script("a"), [{}, {}], [200, NOT_FOLLOWED], ["step 2"]),
    "no step, in any order": (
        Script(Reply("1", expect={"n": 1}), Reply("2", expect={"seed": 5}), any_order=True),
        [{"n": 2}], [NOT_FOLLOWED],
        ["n is 2, expected 1; step 2 is not for this request: seed is absent, expected 5"]),
    "a step is not used up": (Script(Reply("a", expect={"n": 1}), "b"), [{}, {"n": 1}, {}],
                              [NOT_FOLLOWED, 200, 200], ["step 1"]),
    "unused": (Script("a"), [], [], ["1 of 1 steps remain"]),
    "left over": (Script("a", Reply("Bye"), "c"), [{}], [200],
                  ["step 2", "2 of 3", "Reply(text='Bye')"]),
    "beside otherwise": (Script(Reply("main", expect={"n": 1}), otherwise=echo), [{"n": 3}], [200],
                         ["1 of 1 steps remain", "n is 3, expected 1"])}


@pytest.mark.parametrize("script, bodies, replied, words", rows(NOT_AS_WRITTEN))
def test_a_script_that_is_not_followed_says_where(script, bodies, replied, words):
    server = Server(script).start()
    got = [post(server, CHAT_PATH, {**HI, **body}) for body in bodies]
    with pytest.raises(AssertionError) as fault:
        server.close()
    said = [str(fault.value)]
    for refusal in (each for each in got if each.status == NOT_FOLLOWED):
        assert refusal.headers["x-should-retry"] == "false"
        said.append(refusal.error["message"])
    assert [each.status for each in got] == replied and len(said[0]) < 500
    assert not [(word, each) for word in words for each in said if word not in each]
def test_a_script_that_is_given_later_is_the_one_that_is_checked():
    with failing_at_its_end(Script("first"), AssertionError, "'second'") as server:
        server.backend = Script("second")


def test_what_no_step_is_for_is_answered_otherwise():
    script = Script(Reply("main", expect={"n": 1}), otherwise=lambda request: "a title")
    with Server(script) as server:
        assert [chat(server, **fields).text for fields in ({}, {"n": 1}, {})] == [
            "a title", "main", "a title"]


@pytest.mark.parametrize("wrong", [5, ["x"], coroutine, Relay("http://h/v1")], ids=repr)
def test_otherwise_is_a_backend_but_no_relay(wrong):
    with pytest.raises(TypeError):
        Script("a", otherwise=wrong)


def test_an_expectation_that_itself_fails_is_not_a_request_that_differs():
    script = Script(Reply("a", expect={"model": lambda value: value.nonsense}), "b")
    with failing_at_its_end(script, AttributeError, "nonsense") as server:
        assert chat(server).status == 500       # and "b" remains, which is no news


@pytest.mark.parametrize("expect", [
    {}, {"model": "m"}, {"messages": HI["messages"]}, {"stream_options": {"include_usage": True}},
    lambda body: body == INCLUDING, None])
def test_a_request_as_expected_which_is_the_body_as_sent_gets_its_step(expect):
    with Server(Script(Reply("a", expect=expect))) as server:
        assert post(server, CHAT_PATH, INCLUDING).status == 200


def test_an_error_in_the_block_is_the_context_of_the_scripts():
    with pytest.raises(AssertionError, match="step 1") as fault:
        with Server(Script()) as server:
            chat(server)
            raise KeyError("of the block")
    assert isinstance(fault.value.__context__, KeyError)


def test_a_script_can_be_checked_in_the_middle():
    script = Script("a", "b")
    with Server(script) as server:
        for _ in range(2):
            with pytest.raises(AssertionError, match="steps? remain"):
                script.check()
            chat(server)
        script.check()


@pytest.mark.parametrize("any_order", [False, True], ids=["in order", "in any order"])
def test_twenty_clients_take_each_step_once(any_order):
    def slow(body):                             # gives the others time to come between
        return not threading.Event().wait(0.001)
    steps = [str(i) for i in range(60)]
    script = Script(*(Reply(step, expect=slow) for step in steps), any_order=any_order)
    with Server(script) as server:
        said = together(20, lambda: [chat(server, n=2).text for _ in range(3)])
    assert sorted(itertools.chain(*said)) == sorted(steps)


# ----------------------------------------------------------------------------------
# Quirks.  What each does to the wire, told from what a reply without it looks like.

STREAMED = {**HI, **TOOLS, "stream": True}
PLAIN = "".join(f"data: {event}\n\n" for event in (
    ROLE, delta('"content":"a"'), delta('"content":"b"'), delta("", '"stop"'), "[DONE]"))
PLAIN_EVENTS = PLAIN.split("\n\n")[:-1]
FIRST_EVENTS = ["\n\n".join([*PLAIN_EVENTS[:k], ""]) for k in range(len(PLAIN_EVENTS))]
BENT = {  # quirk: the whole body with it
    None: PLAIN,
    "comment": PLAIN.replace("data: ", ": comment\n\ndata: "),
    "crlf": PLAIN.replace("\n", "\r\n"),
    "no_space": PLAIN.replace("data: ", "data:"),
    "bom": "\ufeff" + PLAIN,
    "id_field": "".join(f"id: {i}\n{event}\n\n: comment\n\n"
                        for i, event in enumerate(PLAIN_EVENTS)),
    "retry_block": PLAIN.replace("data: ", "retry: 1000\n\ndata: "),
    "empty_data": PLAIN.replace("data: ", "data:\n\ndata: "),
    **dict.fromkeys(("split_bytes", "one_write", "no_terminator"), PLAIN),
    "no_role": PLAIN.replace('"role":"assistant",', ""),
    "role_every": PLAIN.replace('"delta":{"c', '"delta":{"role":"assistant","c').replace(
        '"delta":{}', '"delta":{"role":"assistant"}'),
    "no_done": FIRST_EVENTS[4],
    "no_finish": FIRST_EVENTS[4].replace('"stop"', "null"),
    "truncate": FIRST_EVENTS[2],
    **{f"truncate@{k}": FIRST_EVENTS[k] for k in (0, 1, 3)},
    "truncate@99": PLAIN, "bad_json@99": PLAIN}


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


@pytest.mark.parametrize("quirk", BENT)
def test_a_quirk_does_what_it_says_and_no_more(quirk):
    with Server(lambda request: iter("ab"), quirk=quirk) as server:
        chunks, how = exchange(server, STREAMED)
        assert outcome(server) == ("quirk" if quirk and "99" not in quirk else "complete")
    assert pinned(b"".join(chunks)) == BENT[quirk] and (quirk or len(chunks) == len(PLAIN_EVENTS))
    assert how == ("cut" if quirk == "no_terminator" else "whole")
    assert quirk != "split_bytes" or {len(chunk) for chunk in chunks} == {1}
    assert quirk != "one_write" or len(chunks) == 1


def test_usage_always_adds_a_usage_uninvited():
    chunks = chunks_in(written("usage_always"))
    assert [len(chunk["choices"]) for chunk in chunks] == [1, 1, 1, 1, 0]
    assert all(chunk["usage"] for chunk in chunks)


def test_the_quirks_of_tool_calls_are_in_each_fragment():
    calls = always([ToolCall("f", {"n": 1}, "call_a"), ToolCall("g", {}, "call_b")])
    missing, repeated = ([made for chunk in chunks_in(written(quirk, calls))
                          for made in chunk["choices"][0]["delta"].get("tool_calls", [])]
                         for quirk in ("missing_tool_index", "duplicate_tool_id"))
    assert len(missing) > 2 and not any("index" in made for made in missing)
    assert {(made["index"], made["id"], made["function"]["name"]) for made in repeated} == {
        (0, "call", "f"), (1, "call", "g")}


@pytest.mark.parametrize("quirk, k", [("bad_json", 2), *((f"bad_json@{k}", k) for k in range(4))])
def test_bad_json_cuts_one_event_short(quirk, k):
    *blocks, rest = written(quirk).split("\n\n")
    assert len(blocks) == len(PLAIN_EVENTS) and rest == ""
    assert [i for i, (a, b) in enumerate(zip(blocks, PLAIN_EVENTS)) if a != b] == [k]
    with pytest.raises(ValueError):
        json.loads(blocks[k][6:])


@pytest.mark.parametrize("quirk, k", [
    ("error_event", 2), *((f"error_event@{k}", k) for k in (0, 1, 3))])
def test_error_event_stands_in_the_place_of_the_rest(quirk, k):
    body = written(quirk)
    assert body.startswith(FIRST_EVENTS[k])
    error = loads(body[len(FIRST_EVENTS[k]) + len("data: "):])
    check_shape(error, ERROR)
    assert error["error"]["type"] == "server_error"


@pytest.mark.parametrize("quirk, body, k", [("reset", HI, 0), ("reset", STREAMED, 2), *(
    (f"reset@{k}", STREAMED, k) for k in (0, 1, 4))])
def test_reset_resets(quirk, body, k):
    chunks, how = quirked(quirk, body=body)
    assert how == "reset" and len(chunks) <= k      # what is on its way may be lost


@pytest.mark.parametrize("quirk, body, k", [("stall", HI, 0), ("stall", STREAMED, 2), *(
    (f"stall@{k}", STREAMED, k) for k in (0, 1, 4))])
def test_stall_is_silent_until_the_client_leaves(quirk, body, k):
    with Server(say("a", "b"), quirk=quirk) as server:
        with dial(server) as client:
            client.sendall(request_bytes(body))
            got = read_past(client, b"data: ", k)
            entry = until(lambda: server.journal and server.journal[0].body and server.journal[0])
            assert (entry.outcome, entry.seconds, k or entry.status) == (None, None, k or None)
            half_close(client)
            got += read_to_end(client)
        chunks, rest = transfer_chunks(got.partition(b"\r\n\r\n")[2])
        assert rest is None and pinned(b"".join(chunks)) == FIRST_EVENTS[k]
        assert outcome(server) in ("quirk", "client left") and (got == b"") == (k == 0)


@both
def test_html_502_is_a_page_of_a_proxy(stream):
    got = ask(Reply("a", quirk="html_502"), stream=stream)
    assert (got.status, got.headers["content-type"]) == (502, "text/html")
    assert b"<html" in got.body and b"data:" not in got.body


@pytest.mark.parametrize("quirk", sorted({*QUIRKS} - {"stall", "html_502"}))
def test_every_quirk_works_on_a_text_completion(quirk):
    with Server(say("a", "b"), quirk=quirk) as server:
        chunks, how = exchange(server, {**PROMPT, "stream": True}, TEXT_PATH)
        bent = quirk not in ("no_role", "role_every", "missing_tool_index", "duplicate_tool_id")
        assert outcome(server) == ("quirk" if bent else "complete")
    assert chunks or how == "reset"


@pytest.mark.parametrize("quirk", sorted({*QUIRKS} - {"html_502"}))
def test_what_fails_before_its_first_piece_has_its_status_whatever_the_quirk(quirk):
    assert ask(Reply(error=TEAPOT, quirk=quirk), stream=True).status == 418


@pytest.mark.parametrize("reply, server, header, allowed, events", [
    (1, 2, 3, True, 1), (None, 2, 3, True, 2), (None, None, 3, True, 3), (1, None, 3, True, 1),
    (1, 2, None, True, 1), (None, None, None, True, 5), (None, None, 3, False, 5)])
def test_the_replys_quirk_comes_before_the_servers_before_the_headers_where_that_is_allowed(
        reply, server, header, allowed, events):
    reply, server, header = (k and f"truncate@{k}" for k in (reply, server, header))
    with Server(Reply(" a b", quirk=reply), quirk=server, quirk_header=allowed) as running:
        got = post(running, CHAT_PATH, STREAMED, {"X-Quirk": header} if header else {})
    assert got.body.count(b"data: ") == events


@pytest.mark.parametrize("name", [
    "bogus", "stall@", "stall@x", "stall@-1", "@2", "stall@1@2", "STALL"])
def test_a_quirk_that_is_none_is_refused(name):
    for make in (lambda: Reply(quirk=name), lambda: Server(quirk=name)):
        with pytest.raises(ValueError, match="quirk"):
            make()
    with Server(quirk_header=True) as server:
        assert chat(server, headers={"X-Quirk": name}).status == 400


def test_quirks_touch_the_two_endpoints_only():
    with Server(quirk="html_502", quirk_header=True) as server:
        assert [call(server, *request, headers={"X-Quirk": "reset"}).status for request in (
            ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/nowhere"),
            ("OPTIONS", CHAT_PATH))] == [200, 200, 404, 204]


def test_split_bytes_on_a_whole_reply_is_one_byte_a_transfer_chunk():
    with Server("a", quirk="split_bytes") as server:
        found, how = exchange(server, HI)
        assert how == "whole" and {len(each) for each in found} == {1}
        assert outcome(server) == "quirk"
    check_shape(loads(b"".join(found)), CHAT)


# ----------------------------------------------------------------------------------
# The journal.

ENTRY = {"method": str, "path": str, "headers": {str: str}, "body": (dict, None),
         "status": (int, None), "events": int, "outcome": (str, None), "started": float,
         "seconds": (float, None)}
STREAM = {**HI, "stream": True}
SECRETS = {"Authorization": "Bearer SECRET", "Proxy-Authorization": "Basic SECRET",
           "Api-Key": "SECRET", "X-Api-Key": "SECRET", "X-Goog-Api-Key": "SECRET",
           "Cookie": "session=SECRET"}


def test_the_journal_has_every_exchange_and_can_be_read_over_http():
    with Server(say("a")) as server:
        post(server, CHAT_PATH, STREAMED, {"X-Mine": "1"})
        call(server, "GET", "/v1/models?x=1")
        assert post(server, "/v1/responses", {"input": "Hi"}).error["code"] == "unknown_url"
        first, second, third = server.journal
        *told, last = loads(call(server, "GET", "/journal").body)
    assert (first.method, first.path, first.body) == ("POST", CHAT_PATH, STREAMED)
    assert first.headers["x-mine"] == "1" and first.headers["content-length"]
    assert (first.status, first.events, first.outcome) == (200, 4, "complete")
    assert (second.method, second.path, second.body) == ("GET", "/v1/models?x=1", None)
    assert 0 <= first.seconds and first.started <= second.started <= time.time()
    assert (third.status, third.body) == (404, {"input": "Hi"})
    check_shape(last, ENTRY)
    for entry, shown in zip((first, second, third), told):
        check_shape(shown, ENTRY)
        assert shown == {name: getattr(entry, name) for name in ENTRY}


@pytest.mark.parametrize("body, backend, status, ended, events", [
    (HI, echo, 200, "complete", 0), (STREAM, say("a", "b"), 200, "complete", 5),
    ({**STREAM, "n": 2}, say("a", "b"), 200, "complete", 9),
    ({**STREAM, "stream_options": {"include_usage": True}}, say("a", "b"), 200, "complete", 6),
    ({**HI, "n": 0}, echo, 400, "error", 0), (b"{", echo, 400, "error", 0),
    (b"[]", echo, 400, "error", 0), (b"\xff", echo, 400, "error", 0),
    (HI, failing(TEAPOT), 418, "error", 0), (STREAM, failing(TEAPOT, "a"), 200, "error", 2),
    (HI, Reply("a", quirk="html_502"), 502, "quirk", 0),
    (STREAM, Reply("a", quirk="truncate"), 200, "quirk", 2),
    (STREAM, Reply("a", quirk="reset"), 200, "quirk", 2)])
def test_the_journal_says_how_it_ended_and_counts_events(body, backend, status, ended, events):
    with Server(backend) as server, dial(server) as client:
        client.sendall(request_bytes(body))
        with contextlib.suppress(ConnectionResetError):
            read_to_end(client)
        assert outcome(server) == ended
        assert (server.journal[0].status, server.journal[0].events) == (status, events)
        assert server.journal[0].body == (body if isinstance(body, dict) else None)


@pytest.mark.parametrize("query", [
    "api-key", "api_key", "x-api-key", "key", "token", "access_token", "API-KEY"])
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
        said = [len(each.body["messages"][0]["content"]) for each in server.journal[1:]]
    assert said == [size] * count and count * size <= held < 1.5 * count * size


def test_the_journal_is_a_list_that_keeps_the_last_and_can_be_emptied():
    with Server(journal=2) as server:
        for i in range(4):
            call(server, "GET", f"/health?{i}")
        assert [entry.path for entry in server.journal] == ["/health?2", "/health?3"]
        server.journal.clear()
        assert server.journal == [] and chat(server).status == 200 and len(server.journal) == 1
    with Server(journal=0) as server:
        assert call(server, "GET", "/journal").error and list(server.journal) == []


def test_a_body_that_is_nested_too_deeply_harms_nothing():
    with Server() as server:
        for levels, status in ((150, 200), (199, 200), (200, 400), (980, 400), (100000, 400)):
            deep = b'{"model":"m","prompt":"\\\\\\"]","y":%b}' % (b"[" * levels + b"]" * levels)
            assert post(server, TEXT_PATH, deep).status == status
        entries = loads(call(server, "GET", "/journal").body)
    assert [each["body"] is None for each in entries] == [False, False, *[True] * 4]


# ----------------------------------------------------------------------------------
# Models.

def listed(server):
    return [each["id"] for each in call(server, "GET", "/v1/models").json["data"]]


def answer(method, path, body=None, headers=(), **settings):
    """What a server with these settings answers to this request."""
    with Server(**settings) as server:
        return call(server, method, path, body, headers)


named_model = always("x")
named_model.model = "mine"


@pytest.mark.parametrize("backend, name", [
    (echo, "echo"), (say("x"), "say"), (Script(), "script"), (model, "model"),
    (named_model, "mine"), (functools.partial(echo), None)])
def test_the_backend_names_its_model(backend, name):
    with Server(backend) as server:
        assert listed(server) == [name] or (name is None and len(listed(server)) == 1)


def test_models_are_listed_in_order_and_can_be_looked_up():
    with Server(models=["b/c", "a", "d e"]) as server:
        assert listed(server) == ["b/c", "a", "d e"]
        for path, id in {"v1/models/a": "a", "v1/models/b/c": "b/c", "v1/models/b%2Fc": "b/c",
                         "v1/models/d%20e": "d e", "models/a/": "a", "models/a?x=1": "a"}.items():
            assert call(server, "GET", f"/{path}").json["id"] == id


@pytest.mark.parametrize("method, path", [
    ("POST", CHAT_PATH), ("POST", TEXT_PATH), ("GET", "/v1/models/x")])
def test_a_model_that_is_not_there_is_refused(method, path):
    got = answer(method, path, {**HI, **PROMPT, "model": "x"}, models=["a", "b/c"])
    assert got.status == 404 and got.error == {
        "message": "The model `x` does not exist or you do not have access to it.",
        "type": "invalid_request_error", "param": None, "code": "model_not_found"}


# ----------------------------------------------------------------------------------
# Keys.

KEY = "sk-0123456789abcdef"
UMLAUTS = "schl\xfcssel-sch\xf6n"
WRONG_KEYS = {  # the key: what is told of it
    "xyz": "***", "\xe9": "***", "abcdefghijklmno": "***", "abcdefghijklmnop": "abc***op",
    "sk-wrong-but-long-enough": "sk-***gh", KEY + "x": "sk-***fx", KEY[:-1]: "sk-***de",
    KEY.upper(): "SK-***EF"}


@pytest.mark.parametrize("headers", [
    {"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"},
    {"AUTHORIZATION": f"BEARER {KEY}"}, {"Authorization": f"Bearer  {KEY} "}, {"api-key": KEY},
    {"Api-Key": KEY}, {"Authorization": "Basic eDp5", "api-key": KEY},
    {"Authorization": "Bearer two"}, *({"Authorization": f"Bearer {UMLAUTS}".encode(coding)}
                                       for coding in ("utf-8", "latin-1"))])
def test_a_key_opens(headers):
    got = answer("POST", CHAT_PATH, HI, headers, api_keys=(KEY, "two", UMLAUTS))
    assert got.status == 200


@pytest.mark.parametrize("headers, said, code", [
    *((headers, "You didn't provide an API key.", None) for headers in (
        {}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"}, {"api-key": ""})),
    *((headers, f"Incorrect API key provided: {told}.", "invalid_api_key")
      for key, told in WRONG_KEYS.items()
      for headers in ({"Authorization": f"Bearer {key}".encode("latin-1")}, {"api-key": key}))])
def test_without_a_right_key_there_is_a_401_that_does_not_repeat_it(headers, said, code):
    got = answer("POST", CHAT_PATH, HI, headers, api_keys=KEY)
    assert (got.status, got.error["code"]) == (401, code)
    assert got.error["type"] == "invalid_request_error" and got.error["message"].startswith(said)
    assert not [key for key in (*WRONG_KEYS, KEY) if key in got.error["message"]]


def test_two_keys_in_one_request_are_refused():
    raw = posted(TEXT_JSON, f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer x\r\n".encode())
    with Server(api_keys=KEY) as server:
        assert statuses(server, raw + LAST) == [400]


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

HOSTS = {
    200: ["localhost", "LOCALHOST", "localhost:1", "127.0.0.1", "127.0.0.1:8000", "10.1.2.3",
          "[::1]:80", "[fe80::1]", "name", "name:80", "a.localhost", "A.LocalHost", "b.local",
          "B.LOCAL:1", "c.d.internal:9", socket.gethostname(), "page.example", "PAGE.example"],
    403: ["evil.example", "evil.example:8000", "localhost.evil.example", "a.localhost.example",
          "127.0.0.1.evil.example", "local.", "xlocalhost.example", "other.page.example", "a.b"]}
ORIGINS = {
    200: ["http://localhost", "http://localhost:3000", "https://127.0.0.1:5", "http://[::1]:5",
          "http://app.localhost:3000", "http://this.local:80", "https://page.example"],
    403: ["http://evil.example", "null", "file://", "http://localhost.evil.example", "", "\xff",
          "https://page.example:1", "http://page.example", "http://this.local:81", "http://[",
          "http://127.0.0.1.evil.example", "http://evil.example/http://localhost", "http://[::1",
          "http://localhost@evil.example", "chrome-extension://x", "x" * 9999]}
FRIEND = "http://localhost:3"
PAGE_ORIGIN, ANY = "https://page.example", "http://any.example"
OPENED = {"api_keys": KEY}, {"Authorization": f"Bearer {KEY}"}
ADMISSIONS = [  # the settings, the headers, and the status
    *(({"cors": PAGE_ORIGIN}, {"Host": host}, status)
      for status in HOSTS for host in HOSTS[status]),
    *(({"cors": [PAGE_ORIGIN]}, {"Host": "this.local:80", "Origin": origin}, status)
      for status in ORIGINS for origin in ORIGINS[status]),
    *(({"cors": named}, {"Origin": origin}, status)
      for named in ("https://page.example/", "HTTPS://Page.Example", "https://PAGE.example/")
      for origin, status in ((PAGE_ORIGIN, 200), ("http://page.example", 403))),
    ({"cors": "*"}, {"Origin": ANY}, 200), ({}, {"Origin": ANY}, 403),
    (OPENED[0], {**OPENED[1], "Origin": ANY}, 200), (OPENED[0], {**OPENED[1], "Host": "a.b"}, 200),
    ({"host": "0.0.0.0"}, {"Host": "any.example"}, 200), ({"host": "::1"}, {"Host": "[::1]"}, 200),
    ({"host": "::1"}, {"Host": "evil.example"}, 403)]


def server_on(host="127.0.0.1", **settings):
    """A server on that address, if this machine has it."""
    try:
        return Server(host=host, **settings)
    except OSError:
        pytest.skip(f"this machine has no {host}")


@pytest.mark.parametrize("settings, headers, status", ADMISSIONS)
@pytest.mark.parametrize("fields, answered", [({}, 200), ({"stream": True}, 200), ({"n": 0}, 400)])
def test_host_and_origin_have_to_be_known_unless_keys_or_settings_open_them(
        calm, settings, headers, status, fields, answered):
    with server_on(**settings) as server:
        got = chat(server, headers=headers, **fields)
    assert got.status == (answered if status == 200 else status)
    assert ("Origin" in headers) == (got.headers.get("vary") == "origin")
    assert got.headers.get("access-control-allow-origin") == (
        headers.get("Origin") if status == 200 else None)


@pytest.mark.parametrize("path", [
    CHAT_PATH, TEXT_PATH, "/v1/models", "/health", "/nowhere", "/", "*"])
@pytest.mark.parametrize("keys, origin", [((), FRIEND), (KEY, FRIEND), ((), ANY)])
def test_a_preflight_is_answered_without_a_key_and_allows_no_stranger(path, keys, origin):
    got = answer("OPTIONS", path, None, {
        "Origin": origin, "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os"}, api_keys=keys)
    allowed = got.headers.get("access-control-allow-origin")
    assert (got.status, got.body) == (204, b"") and "OPTIONS" in got.headers["allow"]
    assert not {"content-length", "transfer-encoding"} & got.headers.keys()
    assert allowed == (FRIEND if origin == FRIEND else None)
    if allowed:
        assert got.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        assert "POST" in got.headers["access-control-allow-methods"] or "/chat" not in path
        assert int(got.headers["access-control-max-age"]) > 0


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
             "/v1/models?x=1"]}
ALLOWED_METHODS = {  # the methods that a 405 names, none for a 404: the requests
    None: ["GET /v1x", "POST /v1/embeddings", "POST /v1/chat", "GET /v1/chat/completions/x",
           "POST /v1/v1/v1/completions", "POST /v1/responses", "GET /favicon.ico",
           "POST /v1/chat/completions/x", "POST /v1/Chat/Completions", "GET /%00"],
    "POST, OPTIONS": [*(f"{method} {CHAT_PATH}" for method in ("GET", "HEAD", "TRACE", "BREW")),
                      f"PUT {TEXT_PATH}"],
    "GET, HEAD, OPTIONS": ["DELETE /v1/models", "POST /v1/models", "POST /health",
                           "PATCH /v1/models/x"]}


@pytest.mark.parametrize("object, path", [
    (object, path) for object in MEANT for path in MEANT[object]])
def test_a_path_may_be_written(object, path):
    got = answer("GET" if object == "list" else "POST", path, {**HI, **PROMPT})
    assert got.json["object"] == object


@pytest.mark.parametrize("path, model", [
    ("/v1/engines/gpt/completions", "gpt"), ("/v1/engines/a%2Fb/completions", "a/b")])
def test_an_engine_in_the_path_is_the_model(path, model):
    assert answer("POST", path, {"prompt": "x"}).json["model"] == model


@pytest.mark.parametrize("allowed, request_line", [
    (allowed, line) for allowed in ALLOWED_METHODS for line in ALLOWED_METHODS[allowed]])
def test_a_path_that_means_nothing_is_a_404_and_another_method_a_405(allowed, request_line):
    method, path = request_line.split()
    got = answer(method, path)
    assert (got.status, got.headers.get("allow")) == (405 if allowed else 404, allowed)
    if method != "HEAD":
        assert got.error["type"] == "invalid_request_error" and method in got.error["message"]
        assert not allowed or got.error["message"].startswith(f"Not allowed to {method} on ")


# ------ routes: endpoints of the user's

def embeddings(body):
    if "input" not in body:
        raise APIError(400, "Missing 'input'.", "input")
    return {"object": "list", "data": [{"index": 0, "embedding": [0.5]}]}


def responses(body):
    yield from ({"type": "response.created", "n": 1}, {"no type": body["input"]},
                {"type": "two\nlines"})


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
               b'data: {"no type":"Hi"}\n\ndata: {"type":"two\\nlines"}\n\n')}


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
    (OPENED[0], {}, 401), (*OPENED, 200), ({}, {"Host": "evil.example"}, 403),
    ({}, {"Origin": "https://evil.example"}, 403)])
def test_who_may_use_a_route_is_checked_as_elsewhere(settings, headers, status):
    with Server(routes=ROUTES, **settings) as server:
        assert call(server, "POST", "/v1/embeddings", {"input": "x"}, headers).status == status
        assert call(server, "OPTIONS", "/files").headers["allow"] == "GET, PUT, HEAD, OPTIONS"


@pytest.mark.parametrize("function, status, kind, words", [
    (raising(KeyError("of a route")), 500, KeyError, "of a route"),
    (failing(KeyError("of a route"), {"type": "a"}), 200, KeyError, "of a route"),
    (always({"a": math.nan}), 500, ValueError, None),
    (lambda body: iter([{"a": 1}, {"a": math.nan}]), 200, ValueError, None)])
def test_the_failure_of_a_route_fails_the_block(function, status, kind, words):
    with failing_at_its_end("x", kind, words, routes={"/x": function}) as server:
        got = call(server, "POST", "/x", {})
        assert got.status == status and got.error["type"] == "server_error"
        assert outcome(server) == "error"


def test_the_generator_of_a_route_is_closed_when_the_client_leaves():
    endless = Endless({"type": "a"}, more={"type": "b"})
    with Server(routes={"/x": endless}) as server:
        leave(server, "/x", {}, after=1)
        assert endless.closed.wait(30) and outcome(server) == "client left"


@pytest.mark.parametrize("route, function, error, words", [
    ("/x", "embeddings", TypeError, "function"), ("HEAD /x", embeddings, ValueError, "HEAD"),
    ("OPTIONS /x", embeddings, ValueError, "OPTIONS"), *(
        (route, embeddings, ValueError, "is not a path, or that of a built-in endpoint")
        for route in ("/chat/completions", "/v1/models", "GET /models/x", "/", "GET /health",
                      "/engines/x/completions", "embeddings", "POST /sse"))])
def test_a_route_that_cannot_be_added_is_refused(route, function, error, words):
    with pytest.raises(error, match=words):
        Server(routes={route: function})


# ==================================================================================
# HTTP: hostile input, limits, and (marker stress) load

# What is sent to a bare socket ends with LAST: a reply to LAST shows that the connection
# was kept, its absence that it was closed, and nobody has to wait to find out.
CHAT_JSON = b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}'
TEXT_JSON = b'{"model":"m","prompt":"Hi"}'
LONG = b"a" * 70000
KEEP, CLOSE = b"Connection: keep-alive\r\n", b"Connection: close\r\n"
CODED = b"1b\r\n%b\r\n0\r\n\r\n" % TEXT_JSON
STREAM_JSON = TEXT_JSON[:-1] + b',"stream":true}'
STREAM_REQUEST = posted(STREAM_JSON)


def has_read_all(server, client):
    """Has the server read all that the client has sent so far?"""
    for reader in list(server.connections.values()):
        with contextlib.suppress(OSError):              # that one is closed
            if reader.sock.getpeername() == client.getsockname():
                return not select.select([reader.sock], [], [], 0)[0]
    return False


@pytest.fixture(scope="module")
def server():
    with Server(max_body=4096) as server:
        yield server


# ----------------------------------------------------------------------------------
# One request, one reply (RFC 9112).  Bytes -> the statuses of the replies to them and
# to LAST: [200, 200] was answered and kept, [400] was refused and closed.

def with_length(length):
    return posted(TEXT_JSON).replace(b": 27", b":" + length)


TAKEN = {
    "plain": (200, get(), get(version=b"1.7"), posted(TEXT_JSON), STREAM_REQUEST,
              posted(CHAT_JSON, b"Origin: http://localhost\r\n", CHAT_PATH.encode())),
    "models": (200, get(b"/v1/models"), get(b"/v1/models/m"), get(b"http://localhost/v1/models")),
    "empty lines": (200, b"\r\n" + get(), b"\r\n\r\n" + get(), posted(TEXT_JSON) + b"\r\n"),
    "absolute form": (200, get(b"http://127.0.0.1/health"), get(b"HTTP://127.0.0.1/health")),
    "absolute form of another host": (403, get(b"http://evil.example/health")),
    "OPTIONS": (204, get(b"*", method=b"OPTIONS"), get(b"http://127.0.0.1?x", method=b"OPTIONS")),
    "a method that is not there": (
        405, get(method=b"TRACE"), get(method=b"BREW"), get(method=b"get"),
        get(b"/health", b"Host: x\r\nContent-Length: 2\r\n", b"PUT") + b"{}"),
    "white space around a value": (
        200, get(headers=b"Host:x\r\n"), get(headers=b"Host: \t x\t \r\n")),
    "a value": (200, get(headers=b"Host: x\r\nX-Empty:\r\n"),
                get(headers=b"Host: x\r\nX-Latin-1: J\xfcrgen\r\n")),
    "headers": (200, get(headers=b"Host: x\r\nAccept: a\r\nAccept: b\r\n"),
                get(headers=b"Host: x\r\n" + b"X: y\r\n" * 99)),
    "a length with zeros before it": (200, with_length(b" 00027")),
    "GET with a body": (200, get(headers=b"Host: x\r\nContent-Length: 3\r\n") + b"GET"),
    "a body to nowhere": (404, posted(TEXT_JSON, target=b"/v1/nowhere"),
                          post_chunked(b"1\r\nx\r\n0\r\n\r\n", target=b"/v1/x")),
    "a body that spells a request": (404, posted(get(), target=b"/v1/nowhere")),
    "a body that is no JSON": (400, posted(get())),
    "a coding in capitals": (200, post_chunked(CODED).replace(b"chunked", b"Chunked")),
    "an expectation with its body": (200, posted(TEXT_JSON, b"Expect: 100-continue\r\n")),
    "any type": (200, *(posted(TEXT_JSON, b"Content-Type: %b\r\nAccept: %b\r\n" % (kind, kind))
                        for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"x"))),
    "transfer chunks": (200, *map(post_chunked, (
        CODED, CODED.replace(b"1b", b"1B"), b"0001b\r\n%b\r\n000\r\n\r\n" % TEXT_JSON,
        b"".join(b"1\r\n%c\r\n" % byte for byte in TEXT_JSON) + b"0\r\n\r\n"))),
    "the extension of a transfer chunk": (
        200, post_chunked(b"1b;a=b\r\n%b\r\n0;c\r\n\r\n" % TEXT_JSON),
        post_chunked(CODED.replace(b"1b", b'1b ; a="b c;"'))),
    "trailers": (200, post_chunked(CODED.replace(b"0\r\n", b"0\r\nX-Sum: 1\r\nX: y\r\n")))}
MALFORMED = {
    "a version": (400, b"GET /health\r\n\r\n", get(version=b"1.10"),
                  get().replace(b"HTTP", b"http")),
    "another version": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", get(version=b"3.0")),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256))),
    "noise": (400, bytes(range(256)) * 4),
    "white space in the request line": (
        400, get().replace(b" ", b"  ", 1), get().replace(b" ", b"\t", 1), b" " + get(),
        get().replace(b"\r", b" \r", 1), get(b"/he alth")),
    "a method": (400, get(method=b""), get(method=b"GE(T"), get(b"x:80", method=b"CONNECT")),
    "a target": (400, get(b"/h\xc3\xa9"), get(b"http://[/health"), get(b"*"), get(b"health"),
                 get(b"ftp://x/health"), get(b"/\0")),
    "a target too long": (414, get(b"/" + LONG)),
    "a line end": (
        400, get().replace(b"\r", b"", 1), get().replace(b"\r", b""),
        get(headers=b"Host: x\nX: y\r\n"), get(headers=b"Host: x\rX: y\r\n"),
        get(headers=b"Host: x\r\r\n")),
    "Host": (400, get(headers=b""), get(b"http://x/health", headers=b""),
             get(headers=b"Host: x\r\nHost: x\r\n"), get(headers=b"Host: a b\r\n"),
             get(headers=b"Host: x/y\r\n")),
    "white space in a header": (400, get(headers=b"Host : x\r\n"), get(headers=b" Host: x\r\n"),
                                get(headers=b"Host: x\r\nX: y\r\n z\r\n")),
    "the name of a header": (400, get(headers=b"Host: x\r\nX\r\n"),
                             get(headers=b"Host: x\r\n: y\r\n"),
                             get(headers=b"Host: x\r\n\xfc: y\r\n")),
    "a control character": (400, get(headers=b"Host: x\r\nX: a\0b\r\n"),
                            get(headers=b"Host: x\r\nX: a\x1bb\r\n")),
    "headers too many or too long": (
        431, get(headers=b"Host: x\r\n" + b"X: y\r\n" * 100),
        get(headers=b"Host: x\r\nX: %b\r\n" % LONG),
        get(headers=b"Host: x\r\n" + b"X: %b\r\n" % LONG[:900] * 99)),
    "several lengths": (400, posted(TEXT_JSON, b"Content-Length: 27\r\n"), with_length(b" 27, 27"),
                        posted(TEXT_JSON, b"Content-Length: 5\r\n")),
    "a length": (400, *map(with_length, (b" +27", b" -27", b" 2_7", b" 0x1b", b" 2 7", b" 27.0",
                                         b" \xb2\xb7", b""))),
    "a length too large": (413, with_length(b" 4097"), with_length(b" " + b"9" * 40)),
    "a length beside transfer chunks": (400, post_chunked(CODED, b"Content-Length: 27\r\n")),
    "transfer chunks in HTTP/1.0": (400, post_chunked(CODED, version=b"1.0")),
    "a coding twice": (400, post_chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked\r\n")),
    "a coding": (501, *(post_chunked(b"0\r\n\r\n").replace(b"chunked", coding)
                        for coding in (b"gzip, chunked", b"xchunked", b""))),
    "another expectation": (417, posted(TEXT_JSON, b"Expect: 200-ok\r\n")),
    "a gzip body": (400, posted(b"\x1f\x8b\x08\0\0\0\0\0", b"Content-Encoding: gzip\r\n")),
    "the size of a transfer chunk": (
        400, post_chunked(b"f" * 16 + b"\r\n"), *(
            post_chunked(CODED.replace(b"1b", size, 1)) for size in (
                b"+1b", b"-1b", b"0x1b", b"1_b", b" 1b", b"1b ", b"1g", b"", b"1a", b"1c"))),
    "the extension of a transfer chunk": (
        400, *(post_chunked(CODED.replace(b"1b\r\n", line, 1)) for line in (
            b";a\r\n", b"1b\n", b"1b;a\nb\r\n", b"1b;a\rb\r\n", b"1b;\0\r\n",
            b"1b;%b\r\n" % LONG))),
    "what follows a transfer chunk": (400, post_chunked(b"1b\r\n%bXX0\r\n\r\n" % TEXT_JSON),
                                      post_chunked(b"1b\r\n%b0\r\n\r\n" % TEXT_JSON)),
    "transfer chunks beyond max_body": (
        413, post_chunked(b"1001\r\n%b\r\n0\r\n\r\n" % LONG[:4097]),
        post_chunked(b"800\r\n%b\r\n" % LONG[:2048] * 3 + b"0\r\n\r\n")),
    "a trailer": (400, post_chunked(b"0\r\nX: y\r\n z\r\n\r\n"),
                  post_chunked(b"0\r\nX y\r\n\r\n"))}
CUT = [posted(TEXT_JSON, target=b"/v1/nowhere"), post_chunked(b"+5\r\nabcde\r\n0\r\n\r\n"),
       post_chunked(b"5;a\r\n{\"a\":\r\n2\r\n1}\r\n0\r\nX: y\r\n\r\n"), b"\r\n\r\n" + get(),
       b"GET /health HTTP/1.1\nHost: x\n\n", get(headers=b"Host: x\r\nX: y\r\n z\r\n"),
       get(headers=b"Host: x\rX: y\r\n"), b"\x16\x03\x01\x02\x00\x01" + b"\r\n\r\n"]
KEPT = {  # what is sent: the statuses, and what the first reply says of its connection
    "HTTP/1.1": (posted(TEXT_JSON), [200, 200], None),
    "Connection: close": (posted(TEXT_JSON, CLOSE), [200], "close"),
    "Connection: Close": (posted(TEXT_JSON, CLOSE.replace(b"c", b"C")), [200], "close"),
    "close among others": (posted(TEXT_JSON, CLOSE.replace(b":", b": x,")), [200], "close"),
    "HTTP/1.0": (posted(TEXT_JSON, version=b"1.0"), [200], "close"),
    "HTTP/1.0 with close": (posted(TEXT_JSON, CLOSE, version=b"1.0"), [200], "close"),
    "HTTP/1.0, keep-alive": (posted(TEXT_JSON, KEEP, version=b"1.0"), [200, 200], "keep-alive"),
    "a stream in HTTP/1.0": (posted(STREAM_JSON, version=b"1.0"), [200], "close"),
    "it, with keep-alive": (posted(STREAM_JSON, KEEP, version=b"1.0"), [200], "close"),
    "a refusal in a pipeline": (posted(TEXT_JSON) + get(headers=b"Host : x\r\n") + get(),
                                [200, 400], None)}


def examples(table):
    """A table {rule: (status, bytes, ...)} as the parameters (bytes, status) of a test."""
    return [pytest.param(raw, status, id=f"{rule}: {raw[:99]}")
            for rule, (status, *raws) in table.items() for raw in raws]


@pytest.mark.parametrize("raw, status", examples(TAKEN))
def test_a_request_that_was_read_whole_leaves_the_connection_open(server, calm, raw, status):
    got, last = talk(server, raw + LAST)
    assert (got.status, last.status) == (status, 200)
    assert b"POST" not in raw or status != 200 or got.text == "Hi"


@pytest.mark.parametrize("raw, status", examples(MALFORMED))
def test_a_malformed_request_gets_one_refusal_and_a_close(server, calm, raw, status):
    [got] = talk(server, raw + LAST)
    assert got.status == status and got.error and got.headers["connection"] == "close"


@pytest.mark.parametrize("raw", CUT, ids=repr)
def test_where_a_request_is_cut_changes_nothing(server, raw):
    whole = statuses(server, raw + LAST)
    for place in range(1, len(raw)):
        with dial(server) as client:
            client.sendall(raw[:place])
            until(lambda: has_read_all(server, client))
            client.sendall(raw[place:] + LAST)
            assert [got.status for got in replies(read_to_end(client))] == whole, raw[:place]


def test_pipelined_requests_are_answered_in_order(server):
    body = b'{"model":"m","prompt":"%d","stream":%b}'
    raw = [posted(body % (i, b"true" if i % 2 else b"false")) for i in range(20)]
    *got, _ = talk(server, b"".join(raw) + LAST)
    assert [each.text for each in got] == [str(i) for i in range(20)]


@pytest.mark.parametrize("raw, replied, said", rows(KEPT))
def test_whether_a_connection_is_kept(server, raw, replied, said):
    first, *others = talk(server, raw + LAST)
    assert [first.status, *(each.status for each in others)] == replied and first.text == "Hi"
    assert first.headers.get("connection") == said and "transfer-encoding" not in first.headers
    assert ("content-length" in first.headers) == (STREAM_JSON not in raw)


@pytest.mark.parametrize("target", [b"/health", b"/v1/models", b"/v1/models/m", b"/v1/x"])
def test_head_has_the_headers_of_get_and_no_body(server, target):
    [there, _] = talk(server, get(target) + LAST)
    [bare, last] = talk(server, get(target, method=b"HEAD") + LAST, to_head=True)
    assert last.status == 200 and bare.status == there.status and bare.body == b""
    assert bare.headers.keys() == there.headers.keys()
    assert there.status == 404 or int(bare.headers["content-length"]) == len(there.body)


@pytest.mark.parametrize("version, told, replied", [
    (b"1.1", b"HTTP/1.1 100 Continue\r\n\r\n", [100, 200, 200]), (b"1.0", b"", [200])])
def test_who_expects_100_continue_is_told_so_but_in_http_1_0(server, version, told, replied):
    raw = posted(TEXT_JSON, b"Expect: 100-Continue\r\n", version=version)
    with dial(server) as client:
        client.sendall(raw[:-len(TEXT_JSON)])
        until(lambda: has_read_all(server, client))
        assert not told or read_past(client, b"\r\n\r\n") == told
        client.sendall(TEXT_JSON + LAST)
        assert [got.status for got in replies(told + read_to_end(client))] == replied


@pytest.mark.parametrize("old, new, status", [
    (b": 0", b": 4097", 413), (b": 0", b": x", 400), (b"Host: x", b"Host: evil.example", 403),
    (b": 0", b": 9\r\nContent-Encoding: gzip", 400)],
    ids=["too large", "no length", "not admitted", "gzip"])
def test_who_expects_100_continue_is_refused_before_the_body(server, old, new, status):
    raw = posted(b"", b"Expect: 100-continue\r\n").replace(old, new).replace(b": 0", b": 9")
    [got] = talk(server, raw)
    assert got.status == status and got.error


@pytest.mark.parametrize("method", [b"GET", b"POST", b"BREW"])
def test_an_unread_body_never_becomes_a_request(method):
    body = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 3
    headers = b"Host: x\r\nContent-Length: %d\r\n" % len(body)
    with Server(api_keys=["key"]) as server:
        got = statuses(server, get(b"/v1/models", headers, method) + body + LAST)
    assert got in ([401], [401, 200])


def test_a_refused_client_can_read_the_refusal_before_it_has_sent_all_and_is_then_cut_off(server):
    with dial(server) as client:
        client.sendall(get(b"/v1/completions", b"Host: x\r\nContent-Length: 9999999\r\n", b"POST"))
        with contextlib.suppress(OSError):
            client.sendall(b" " * 9999999)
        [got] = replies(read_to_end(client))
        with pytest.raises(OSError):
            until(lambda: client.sendall(LONG))
    assert got.status == 413 and got.error["code"] == "request_too_large"


# ----------------------------------------------------------------------------------
# Bodies.  What cannot be a request is a 400 that says why; the connection is kept,
# for the body was read.

def with_field(field):
    """The body of a chat, with one field more."""
    return CHAT_JSON[:-1] + b"," + field + b"}"


DEPTH = 100000
BODIES = {  # what the refusal says: the bodies
    "Expecting value": [b""],
    "Expecting": [b"model=m&prompt=Hi", CHAT_JSON[:-1], CHAT_JSON.replace(b'"', b"'")],
    "Extra": [CHAT_JSON + CHAT_JSON],
    "UTF-8": [CHAT_JSON.replace(b"Hi", b"\xff"), CHAT_JSON.replace(b"Hi", b"J\xfcrgen"),
              CHAT_JSON.replace(b"Hi", b"\xed\xa0\x80"), CHAT_JSON.decode().encode("utf-16")],
    "control": [CHAT_JSON.replace(b"Hi", b"\0"), CHAT_JSON.replace(b"Hi", b"\n")],
    "": [CHAT_JSON[:-1] + b",}", b"\0" * 50, with_field(b'"seed":' + b"1" * 5000)],
    "an array": [b"[%b]" % CHAT_JSON],
    "a string": [b'"x"'],
    "null": [b"null"],
    "an integer": [b"1"],
    "a boolean": [b"true"],
    "NaN": [with_field(b'"temperature":NaN'), with_field(b'"x":[{"y":NaN}]')],
    "Infinity": [with_field(b'"temperature":-Infinity')],
    "1e999": [with_field(b'"temperature":1e999')],
    "deep": [CHAT_JSON[:-1] + b',"x":' + b"[" * DEPTH, b'{"x":' * DEPTH + b"1" + b"}" * DEPTH,
             with_field(b'"x":' + b"[" * DEPTH + b"]" * DEPTH)]}
ODD_BODIES = [  # what is in the place of what in a body, and the text that is read
    (b"{", b"\xef\xbb\xbf{", "Hi"), (CHAT_JSON, b" \r\n\t" + CHAT_JSON + b"\n\n", "Hi"),
    (b"{", b'{"messages":1,', "Hi"), (b"}]", b'}],"unknown":[{}]', "Hi"),
    (b"Hi", b"\\ud800", "\ud800"), (b"Hi", b"a\\u0000b", "a\0b"),
    (b"Hi", "\x85\u2028".encode(), "\x85\u2028"), (b"Hi", "é世😀".encode(), "é世😀")]


@both
@pytest.mark.parametrize("old, new, text", ODD_BODIES)
def test_an_odd_body_is_answered(roomy, calm, old, new, text, stream):
    body = CHAT_JSON.replace(old, new, 1).replace(
        b'"model":"m"', b'"model":"m","stream":true' if stream else b'"model":"m"')
    got, _ = talk(roomy, posted(body, target=b"/v1/chat/completions") + LAST)
    assert got.text == text
@pytest.fixture(scope="module")
def roomy():
    with Server(request_timeout=5) as server:
        yield server


@pytest.mark.parametrize("word, body", [
    pytest.param(word, body, id=f"{word}: {body[:60]}")
    for word in BODIES for body in BODIES[word]])
def test_a_body_that_is_no_request_is_a_400_that_says_why(roomy, calm, word, body):
    got, last = talk(roomy, posted(body, target=b"/v1/chat/completions") + LAST)
    assert got.status == 400 and last.status == 200
    assert re.match("We could not parse the JSON body.*" + word, got.error["message"])
    assert (got.error["param"], got.error["code"]) == (None, None)


@pytest.mark.parametrize("coded", [posted, lambda body: post_chunked(in_chunks(body, 4097))])
def test_max_body_is_taken_and_one_byte_more_is_not(server, coded):
    assert statuses(server, coded(TEXT_JSON.ljust(4096)) + LAST) == [200, 200]
    assert statuses(server, coded(TEXT_JSON.ljust(4097)) + LAST) == [413]


# ----------------------------------------------------------------------------------
# Limits.  None of them slows a client that behaves.

TRICKLES = {
    "a request line": b"GET /" + LONG,
    "headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 9999,
    "a body": get(b"/v1/completions", b"Host: x\r\nContent-Length: 4000\r\n", b"POST") + LONG,
    "transfer chunks": post_chunked(b"1\r\n \r\n" * 4000),
    "trailers": post_chunked(b"0\r\n" + b"X: y\r\n" * 9999),
    "empty lines": b"\r\n" * 9999}


def test_a_client_that_does_not_read_in_time_has_left():
    with Server("x" * 2**24, request_timeout=0.1) as server, dial(server) as client:
        client.sendall(posted(TEXT_JSON))
        until(lambda: server.journal and server.journal[0].outcome == "client left")


def test_a_connection_on_which_nothing_is_asked_is_closed_without_a_word(calm):
    with Server(request_timeout=0.1) as server, dial(server) as client:
        assert read_to_end(client) == b""


def test_a_body_that_the_server_asks_for_has_its_time_limit():
    with Server(request_timeout=0.1) as server, dial(server) as client:
        client.sendall(get(TEXT_PATH.encode(), b"Host: x\r\nExpect: 100-continue\r\n"
                                               b"Content-Length: 9\r\n", b"POST"))
        assert re.findall(b"HTTP/1.1 ([0-9]+)", read_to_end(client)) == [b"100", b"408"]


def test_beyond_max_connections_is_503_at_once_and_others_go_on():
    with Server(max_connections=2) as server, served(server) as one, served(server) as two:
        with dial(server) as third:                 # refused with its request unread
            third.sendall(posted(b" " * 100000))
            [got] = replies(read_to_end(third))
        assert got.status == 503 and int(got.headers["retry-after"]) >= 1 and got.error
        for client in (one, two):
            client.sendall(LAST)
            assert replies(read_to_end(client))[0].status == 200
        until(lambda: statuses(server, LAST) == [200])      # a place that is free again


def trickle(server, name):
    """The statuses that come while the bytes of that name are sent one by one."""
    raw, start = TRICKLES[name], time.monotonic()
    with dial(server) as client:
        client.sendall(raw[:60])
        for i in range(60, len(raw)):
            if select.select([client], [], [], 0.02)[0]:
                break
            client.sendall(raw[i:i + 1])
        got = [got.status for got in replies(read_to_end(client))]
    assert time.monotonic() - start > 0.25 and i < len(raw) - 1
    return name, got


def test_the_time_limit_covers_the_whole_request():
    names = iter(TRICKLES)
    with Server(request_timeout=0.3) as server:
        got = dict(together(len(TRICKLES), lambda: trickle(server, next(names))))
    assert got == {**dict.fromkeys(TRICKLES, [408]), "empty lines": []}


def test_the_time_limit_covers_a_fast_sender_too():
    with Server(request_timeout=0.2) as server, dial(server) as client:
        client.sendall(post_chunked(b""))
        with contextlib.suppress(OSError):
            until(lambda: client.sendall(b"1;%b\r\n \r\n" % LONG[:50000])
                  or select.select([client], [], [], 0)[0])
        assert read_past(client, b"\r\n").startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.stress)])
def test_slow_requests_do_not_slow_others(count):
    with Server(request_timeout=60) as server, contextlib.ExitStack() as held:
        for _ in range(count):
            held.enter_context(dial(server)).sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        assert statuses(server, get() * 20 + LAST) == [200] * 21


def test_an_idle_connection_ends_without_a_word():
    with Server(request_timeout=0.2) as server, served(server) as one, served(server) as other:
        other.sendall(b"\r\n")
        assert one.recv(1) == other.recv(1) == b""
    with Server(request_timeout=None) as server, served(server) as client:
        half_close(client)                      # the client is done: at once
        assert client.recv(1) == b""


def test_a_reader_that_stops_is_dropped_and_its_backend_closed():
    endless = Endless(more="x" * 60000, pause=0)
    with Server(endless, request_timeout=0.2) as server, dial(server) as client:
        client.sendall(STREAM_REQUEST)
        assert endless.closed.wait(PATIENCE) and outcome(server) == "client left"


@both
@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("leave", [socket.socket.close, half_close, reset])
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
    "TLS, a request unread": (True, get(), unwrap_and_close)}
WAITING = {  # what is waited for after the first word (where there is one): the backend
    "a pause": lambda url: Reply("a b", delay=(0, 3600)), "an upstream": Relay,
    "a first pause": lambda url: Reply("a", delay=3600),
    "a quirk": lambda url: Reply("a b c", quirk="stall"),
    "a program": lambda url: command(program(
        "sys.stdout.write('a '); sys.stdout.flush(); sys.stdin.read(); "
        "signal.pause() if hasattr(signal, 'pause') else input()"))}


@posix
@pytest.mark.parametrize("over_tls, more, close", rows(WAYS))
@pytest.mark.parametrize("what", WAITING)
def test_a_client_that_leaves_is_noticed_whatever_is_waited_for(
        tls_files, monkeypatch, over_tls, more, close, what):
    waits, ready = [], openai_compat.ready_files
    monkeypatch.setattr(openai_compat, "ready_files",
                        lambda files, seconds: waits.append(seconds) or ready(files, seconds))
    threads, tls = set(threading.enumerate()), tls_files if over_tls else None
    silent = then_held(STREAM_HEAD + transfer_chunk(b"data: a\n\n"))
    with playing(silent) as (url, _), Server(WAITING[what](url), tls=tls) as server:
        with secured(server, tls_files) if over_tls else dial(server) as client:
            client.sendall(STREAM_REQUEST)
            if what != "a first pause":
                read_past(client, b"data: ")
            client.sendall(more)
            until(lambda: server.journal)
            close(client)
            assert outcome(server) == "client left"
    until(lambda: set(threading.enumerate()) <= threads)
    assert all(seconds <= 0 or seconds > 20 for seconds in waits), "somebody polls"


def test_a_client_that_left_before_the_close_is_not_an_error():
    for _ in range(20):
        with Server(Reply("a b", delay=(0, 3600))) as server:
            leave(server, CHAT_PATH, {**HI, "stream": True}, after=2)
        assert server.journal[0].outcome == "client left"


def test_more_than_is_read_ahead_is_read_when_its_turn_comes():
    with Server(Reply("x", delay=0.05), max_body=2**23) as server:
        large = posted(b'{"model":"m","prompt":"%b"}' % (b"y" * 2**22))
        assert statuses(server, posted(TEXT_JSON) + large + get() + LAST) == [200, 200, 200, 200]


@pytest.mark.parametrize("place", range(0, len(STREAM_REQUEST), 7))
def test_a_client_may_leave_in_the_middle_of_a_request(server, calm, place):
    with dial(server) as client:
        client.sendall(STREAM_REQUEST[:place])
        reset(client)
    assert statuses(server, LAST) == [200]


def test_a_backend_that_blocks_holds_up_neither_others_nor_the_end(caplog):
    blocked = Endless(waits=True)
    backends = {"block": blocked, "Hi": echo}
    with Server(lambda request: backends[request["text"]](request)) as server:
        with dial(server) as client:
            client.sendall(posted(TEXT_JSON.replace(b"Hi", b"block")))
            assert blocked.begun.wait(PATIENCE)
            assert statuses(server, posted(TEXT_JSON) + LAST) == [200, 200]
            server.close()
            assert not blocked.go_on.is_set() and client.recv(1) == b""
            blocked.go_on.set()
    assert "left behind" in caplog.text


def test_a_server_may_be_closed_by_its_own_backend():
    went_on = threading.Event()
    server = Server(lambda request: server.close() or went_on.set() or "bye").start()
    with asking(server) as client:
        assert ended(client) and went_on.wait(30) and is_closed(server)
    until(lambda: not server.connections)


@pytest.mark.parametrize("name, value", [
    *(("request_timeout", value) for value in (0, -1, math.nan, 1e19, math.inf, "5", True)),
    ("max_body", -1), ("max_body", "1"), ("max_body", math.nan), ("max_connections", 0),
    ("max_connections", 1.5), ("journal", 1e3), ("journal", -1), ("journal", None),
    ("quirk", "bogus"), ("api_keys", [None]), ("api_keys", ""), ("models", [1])], ids=repr)
def test_a_setting_that_cannot_be_obeyed_is_refused_at_the_start(name, value):
    with pytest.raises((ValueError, TypeError), match=name if name != "quirk" else "bogus"):
        Server(**{name: value})


@pytest.mark.parametrize("seconds", [None, 1e9, 0.5])
def test_any_positive_time_limit_or_none_will_do(seconds):
    assert answer("POST", CHAT_PATH, HI, request_timeout=seconds).text == "Hello, world!"


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


# ----------------------------------------------------------------------------------
# Start and stop, with a client that holds a connection open each time.

def descriptors(process="self"):
    for folder in (f"/proc/{process}/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder))
    return 0                                    # a platform that does not tell


def test_a_port_is_free_again_after_close_but_for_another_server():
    with Server() as first, served(first):
        port = first.server_port
    with Server(port=port) as second:
        assert statuses(second, LAST) == [200]
    second.close()                              # once more does no harm
    with pytest.raises(RuntimeError, match="closed"):
        second.start()


@posix
def test_a_child_of_the_program_does_not_keep_the_port():
    code = """
import os, socket
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
    with subprocess.Popen([sys.executable, "-c", code], cwd=str(HERE), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.read() == b"refused\n"


@pytest.mark.parametrize("host, url", [
    ("127.0.0.1", "http://127.0.0.1:{}/v1"), ("0.0.0.0", "http://127.0.0.1:{}/v1"),
    ("localhost", "http://127.0.0.1:{}/v1"), ("::1", "http://[::1]:{}/v1"),
    ("::", "http://[::1]:{}/v1")])
def test_the_base_url_works_for_a_client(host, url):
    with server_on(host) as server, urllib.request.urlopen(server.base_url + "/models") as got:
        assert server.base_url == url.format(server.server_port) and got.status == 200


# ----------------------------------------------------------------------------------
# Fuzz.  FUZZ_SEED repeats a run that failed, FUZZ_CASES makes it longer.

CASES = int(os.environ.get("FUZZ_CASES", 300))
SEED = int(os.environ.get("FUZZ_SEED", random.randrange(10**6)))
NOISE = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\0", b":", b",", b";", b"\x7f",
         b"\xff", b"0", b"-1", b"+", b"0x", b"9" * 30, b"/", b"*", b"?", b"%", b"[", b"chunked",
         b"HTTP/1.0", b"Host: x\r\n", b"Content-Length: 3\r\n", b"\r\n ", CLOSE,
         b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"X" * 5000,
         b"Origin: http://[\r\n"]
SOUND = [raw for _, *raws in TAKEN.values() for raw in raws]
STRANGE = [None, True, False, 0, 1, -1, 2.5, 10**30, -1e300, "", "x", "auto", "\ud800", "\0",
           "y" * 3000, [], [None], [1], ["x"], [[]], [{}], {}, {"": None}, {"type": "function"},
           {"type": "x", "function": {}}, [{"role": "user"}], [{"type": "text", "text": 1}]]
FULL = {"chat": (CHAT_PATH, {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "n": 2, "seed": 1,
    "messages": [{"role": "system", "content": "s", "name": "n"},
                 {"role": "user", "content": [{"type": "text", "text": "t"},
                                              {"type": "image_url", "image_url": {"url": "u"}}]},
                 *made_call()],
    "max_tokens": 5, "max_completion_tokens": 5, "stop": ["a", "b"], "temperature": 1, "top_p": 1,
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {"1": 2}, "logprobs": True,
    "top_logprobs": 2, "user": "u", "tools": [TOOL], "tool_choice": "auto", "store": False,
    "parallel_tool_calls": False, "service_tier": "auto", "metadata": {"a": "b"},
    "response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": TOOL["function"]["parameters"]}},
    "reasoning_effort": "low", "modalities": ["text"], "verbosity": "low",
    "prediction": {"type": "content", "content": "x"}}),
    "tools": (CHAT_PATH, {
        "model": "m", "messages": user("x"), "tools": [TOOL],
        "tool_choice": {"type": "function", "function": FN},
        "response_format": {"type": "json_object"}}),
    "functions": (CHAT_PATH, {
        "model": "m", "functions": [TOOL["function"]], "function_call": FN, "messages": [
            *user("x"), {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "c"}]}),
    "text": (TEXT_PATH, {
        "model": "m", "prompt": ["a", "b"], "suffix": "s", "max_tokens": 5, "temperature": 1,
        "n": 1, "best_of": 2, "stream": False, "logprobs": 2, "echo": True, "stop": "x",
        "user": "u", "logit_bias": {"1": 1}, "seed": 1, "top_p": 1, "presence_penalty": 0}),
    "ids": (TEXT_PATH, {
        "model": "m", "prompt": [[1, 2], [3]], "stream": True, "n": 3, "logprobs": 0})}
KNOWN_FIELDS = {*openai_compat.CHAT_FIELDS.fields, *openai_compat.COMPLETION_FIELDS.fields}
FOREIGN = sorted({*KNOWN_FIELDS, "prompts", "text", "index", "id", "endpoint", "body", "prompt",
                  "messages", "best_of", "input", "stop_sequences"})


def mutated(raw, dice):
    """The same bytes with a few of them changed, lost, doubled, swapped or put in."""
    for _ in range(dice.choice([1, 1, 1, 2, 3, 8])):
        i, j = sorted(dice.randrange(len(raw) + 1) for _ in "ij")
        j = min(j, i + dice.choice([1, 1, 4, 40]))
        middle = dice.choice([b"", raw[i:j] * 2, dice.choice(NOISE), dice.choice(NOISE) + raw[i:j],
                              bytes(dice.randrange(256) for _ in raw[i:j]), raw[i:j].swapcase()])
        raw = raw[:i] + middle + raw[j:]
    return raw


def test_mutated_bytes_get_sound_replies_and_a_close(calm):
    dice = random.Random(SEED)
    raws = [mutated(dice.choice(SOUND), dice) + LAST for _ in range(CASES)]
    with Server(max_body=4096, request_timeout=0.3) as server:
        for start in range(0, CASES, 50):
            with contextlib.ExitStack() as held:
                clients = [(held.enter_context(dial(server)), raw)
                           for raw in raws[start:start + 50]]
                for client, raw in clients:
                    client.sendall(raw)
                streams = [(raw, read_to_end(client)) for client, raw in clients]
            for raw, stream in streams:
                found = [got for got in replies(stream) if got.status != 100]
                assert found and not [1 for got in found if got.status in (500, 503)], (SEED, raw)
                assert all(got.error for got in found if got.status >= 400), (SEED, raw)


def places(value, path=()):
    """The path of every field and item in a JSON value."""
    if isinstance(value, (dict, list)):
        for step in value if isinstance(value, dict) else range(len(value)):
            yield path + (step,)
            yield from places(value[step], path + (step,))


def changed(body, path, value):
    """A copy of the body with the field at the path set to a value."""
    body = copy.deepcopy(body)
    functools.reduce(lambda inner, step: inner[step], path[:-1], body)[path[-1]] = value
    return body


def noise(dice, depth=4):
    """Any JSON value, nested a little."""
    if depth == 0 or dice.random() < 0.4:
        return dice.choice(STRANGE)
    names = ["type", "function", "name", "role", "content", "x", "properties", "enum", "$ref"]
    if dice.random() < 0.5:
        return [noise(dice, depth - 1) for _ in range(dice.randrange(4))]
    return {dice.choice(names): noise(dice, depth - 1) for _ in range(dice.randrange(4))}


def check_all(server, requests):
    """Send all on one connection, in order; look at each reply."""
    for start in range(0, len(requests), 20):
        part = requests[start:start + 20]
        *got, _ = talk(server, b"".join(posted(json.dumps(body).encode(), target=path.encode())
                                        for path, body in part) + LAST)
        assert len(got) == len(part)
        for request, reply in zip(part, got):
            print(SEED, request, reply.body)        # pytest shows it where it fails
            is_json = reply.headers["content-type"] == "application/json"
            assert reply.status in (200, 400)
            assert reply.error if reply.status == 400 else reply.json if is_json else reply.chunks


@pytest.mark.parametrize("path, body", rows(FULL))
@pytest.mark.parametrize("share", [0.2, pytest.param(1, marks=pytest.mark.stress)])
def test_any_value_in_any_field_gets_a_sound_reply(roomy, calm, path, body, share):
    dice = random.Random(SEED)
    assert post(roomy, path, body).status == 200
    check_all(roomy, [
        (path, changed(body, place, value)) for place in [*places(body), *zip(FOREIGN)]
        for value in STRANGE if dice.random() < share])


@both
@pytest.mark.parametrize("path, fields", [      # each was a 500
    (CHAT_PATH, {"prompts": 5}), (TEXT_PATH, {"max_completion_tokens": "5"}),
    (TEXT_PATH, {"max_completion_tokens": -1}), (TEXT_PATH, {"functions": [TOOL["function"]]}),
    (TEXT_PATH, {"response_format": "json"}), (TEXT_PATH, {"messages": 5}),
    (TEXT_PATH, {"response_format": {"type": "json_schema"}}),
    (TEXT_PATH, FORCED),
    (CHAT_PATH, {"messages": user([{"type": "text", "text": "Hi"}, {
        "type": "image_url", "image_url": {"url": "u"}, "text": 5}])})])
def test_a_field_that_means_nothing_here_is_passed_over(roomy, calm, path, fields, stream):
    body = {"model": "m", "prompt": "Hi", "messages": user("Hi"), "stream": stream, **fields}
    assert post(roomy, path, body).text == "Hi"


@pytest.mark.parametrize("count", [CASES, pytest.param(50000, marks=pytest.mark.stress)])
def test_nested_noise_gets_a_sound_reply(roomy, calm, count):
    dice = random.Random(SEED)
    check_all(roomy, [(path, changed(body, dice.choice(list(places(body))), noise(dice)))
                      for path, body in dice.choices(list(FULL.values()), k=count)])
# ----------------------------------------------------------------------------------
# Stress (`make stress`; STRESS=short for a minute of it).  The server is a process of
# its own, so that what is measured is the server.

SHORT = os.environ.get("STRESS") == "short"
stress = pytest.mark.stress
CHILD = """
import resource, sys
from openai_compat import main
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(int(sys.argv[1]), most), most))
sys.exit(main(sys.argv[2:]))
"""


class Process(Running):
    """The command in a process of its own; knows its memory (MiB) and its descriptors."""

    def __init__(self, *flags, files=20000):
        super().__init__("--quiet", *flags, start=(sys.executable, "-c", CHILD, str(files)),
                         cwd=str(HERE))
        self.proc = Path("/proc", str(self.process.pid))

    def memory(self, name="VmRSS"):
        return int(re.search(name + r":\s*(\d+)", (self.proc / "status").read_text())[1]) / 1024


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


class Stream:
    """One client of many: what came on its connection, and when the first of it did."""

    def __init__(self, server, prompt):
        self.begun, self.first, self.said = time.monotonic(), None, bytearray()
        self.client = dial(server)
        self.client.sendall(request_bytes({**PROMPT, "prompt": prompt, "stream": True}, TEXT_PATH))

    def read(self):
        """Take what is there; False at the end."""
        block = self.client.recv(65536)
        self.first = self.first or time.monotonic()
        self.said += block
        return bool(block)


def watch_streams(streams, events=0, halfway=None):
    """Read all the streams to their ends; call `halfway` once, after half the events."""
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.client, selectors.EVENT_READ, stream)
    while selector.get_map():
        for key, _ in selector.select(30) or pytest.fail("silence for 30 s"):
            if not key.data.read():
                selector.unregister(key.fileobj)
                key.fileobj.close()
        if halfway and streams[0].said.count(b"data: ") > events / 2:
            halfway()
            halfway = None


@stress
@pytest.mark.parametrize("count, events", [(300, 60)] if SHORT else [(500, 400), (1000, 400)])
def test_many_streams_at_once_are_complete_and_in_order(many_files, count, events):
    prompt = " ".join(map(str, range(events)))
    with Process("--delay", "0.05", "--max-connections", "1100") as server:
        streams = [Stream(server, prompt) for _ in range(count)]
        watch_streams(streams)
    for stream in streams:
        assert b"".join(re.findall(b'"text":"([^"]*)"', stream.said)) == prompt.encode()
        assert stream.said.endswith(b"0\r\n\r\n")
    assert sorted(stream.first - stream.begun for stream in streams)[count * 99 // 100] < 1


@stress
def test_memory_and_descriptors_stay_flat(many_files):
    rounds, raw = 200 if SHORT else 2000, b"".join(SOUND)
    with Process() as server:
        expected, marks = statuses(server, raw + LAST), []
        for i in range(rounds):
            assert statuses(server, raw + LAST) == expected
            if i in (rounds // 10, rounds - 1):
                marks.append((server.memory(), descriptors(server.process.pid)))
    (memory, files), (more_memory, more_files) = marks
    assert len(expected) > len(SOUND) and more_memory - memory < 5 and more_files <= files + 1


def in_chunks(body, size):
    """The body as transfer chunks of that size."""
    return b"".join(b"%x\r\n%b\r\n" % (len(body[i:i + size]), body[i:i + size])
                    for i in range(0, len(body), size)) + b"0\r\n\r\n"


@stress
def test_bodies_of_32_mib_are_taken_in_bounded_memory(many_files):
    body = (TEXT_JSON[:-1] + b',"x":"').ljust(2**25 - 2, b"a") + b'"}'
    tiny = in_chunks(body[:2**21 if SHORT else 2**23], 2)       # each costs the server a turn
    with Process("--request-timeout", "120") as server:
        before = server.memory("VmHWM")
        assert statuses(server, posted(body) + LAST) == [200, 200]
        assert statuses(server, post_chunked(in_chunks(body, 65536)) + LAST) == [200, 200]
        assert statuses(server, post_chunked(in_chunks(body + b" ", 65536))) == [413]
        assert statuses(server, posted(body + b" ")[:9999]) == [413]
        assert statuses(server, post_chunked(tiny) + LAST) == [400, 200]
        assert server.memory("VmHWM") < before + 8 * 32


@stress
@posix
def test_sigterm_lets_replies_finish_or_ends_them_with_an_error():
    with Process("--delay", "0.05") as server:
        prompts = ["w " * 40] * 50 + ["w " * 1000] * (0 if SHORT else 50)
        streams = [Stream(server, prompt) for prompt in prompts]
        watch_streams(streams, 20, server.process.terminate)
        assert server.process.wait(5) == 0
    done = [stream.said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for stream in streams]
    error = [b'data: {"error":' in stream.said for stream in streams]
    assert all(done[:50]) and all(error[50:])


@stress
def test_a_server_without_descriptors_recovers():
    with Process(files=64) as server, served(server) as old:
        held = [dial(server) for _ in range(150)]
        old.sendall(get())
        assert read_past(old, b"}").startswith(b"HTTP/1.1 200")
        for client in held:
            client.close()
        assert statuses(server, LAST) == [200]


@pytest.mark.parametrize("count", [50, pytest.param(200 if SHORT else 1000, marks=stress)])
def test_starts_and_stops_with_a_connection_held_leave_nothing_behind(count):
    for i in range(count):
        with Server(say("x")) as server, served(server) as client:
            server.close()
            assert client.recv(1) == b""
        if i == 10:
            gc.collect()
            threads, files = threading.active_count(), descriptors()
    until(lambda: threading.active_count() <= threads and descriptors() <= files)


# ==================================================================================
# THE CLIENT: the reading pipe, retries, the command line, the conversation

# ----------------------------------------------------------------------------------
# What a server says: bytes out, over a real socket.

def refusal_reply(status, headers=None, **fields):
    return reply({"error": {"message": "no", **fields}}, status, **(headers or {}))


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
    return lambda connection: (connection.sendall(reply), reset(connection))


def chunk(delta, finish_reason=None, more=None, **fields):
    """A chunk of one choice; a str is its content, `more` is what else the choice holds."""
    delta = {"content": delta} if isinstance(delta, str) else delta
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **(more or {})}
    return {"id": "c", "model": "m", "choices": [choice], **fields}


def event(*words, **fields):
    return b"data: " + json.dumps(chunk(*words, **fields)).encode() + b"\n\n"


ASSISTANT = {"role": "assistant", "content": ""}
ROLE_EVENT, HI_EVENT, THERE, STOP, DONE = (
    event(ASSISTANT), event("Hi"), event(" there"), event({}, "stop"), b"data: [DONE]\n\n")
SAID = HI_EVENT + THERE + STOP + DONE
GOOD = streamed(ROLE_EVENT, HI_EVENT, THERE, STOP, DONE)
OTHER_CHOICE = event("no", None, {"index": 1})
WHOLE = {"id": "c", "object": "chat.completion", "choices": [{
    "index": 0, "message": {"role": "assistant", "content": "Hi there"}, "finish_reason": "stop"}]}
MODELS_REPLY = reply({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})


def asked(*answers, stream=True, **settings):
    """(the text of the reply to a chat for which these are played, all the requests)."""
    with playing(*answers) as (base_url, requests):
        said = Client(base_url, **settings).chat_completions("Hi", "m", stream=stream)
        return "".join(pieces(said)) if stream else said_by(said), requests


def error_of(answer, stream=False, kind=ClientError, words=None, **settings):
    """The error that ends a chat for which this is played, and how many requests were made."""
    with playing(answer) as (base_url, requests), pytest.raises(kind, match=words) as caught:
        list(Client(base_url, **settings).chat_completions("Hi", "m", stream=stream))
    return caught.value, len(requests)


def said_by(completion):
    return completion["choices"][0]["message"]["content"]


def chunks_read(*reads):
    return chunks(events(lines(reads)))


def text_in(*reads):
    """The text in the bytes of an event stream, without a socket."""
    return "".join(pieces(chunks_read(*reads)))


def cut_into(size, body):
    return [body[i:i + size] for i in range(0, len(body), size)]


def test_the_examples_of_the_client_are_true():
    found = {test.name: test for test in doctest.DocTestFinder().find(client) if test.examples}
    stages = "reads lines events chunks pieces fold".split()
    assert {f"client.{name}" for name in stages} <= set(found)
    for test in found.values():
        output = []
        doctest.DocTestRunner().run(test, out=output.append)
        assert output == [], "".join(output)


# ----------------------------------------------------------------------------------
# Lines and events: the examples of the standard (WHATWG HTML 9.2), the cases of the SDKs.

EVENT_STREAMS = {  # name: (lines without their ends, what the events say)
    "stock": ("data: YHOO|data: +2|data: 10||", ["YHOO\n+2\n10"]),
    "ids": (": test stream||data: first event|id: 1||data:second event|id||data:  third event||",
            ["first event", "second event", " third event"]),
    "no value": ("data||data|data||", ["", "\n"]),
    "space": ("data:test||data: test||", ["test", "test"]),
    "types": ("event: add|data: 73857293||event: remove|data: 2153||", ["73857293", "2153"]),
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
@pytest.mark.parametrize("text, said", rows(EVENT_STREAMS))
def test_a_stream_reads_the_same_wherever_it_is_cut(text, said, end):
    body = text.replace("|", end).encode()
    for cut in range(len(body) + 1):
        assert list(events(lines([body[:cut], b"", body[cut:]]))) == said
    assert list(events(lines(cut_into(1, body)))) == said


@pytest.mark.parametrize("mix", [*itertools.product(ENDS.values(), repeat=3)])
def test_line_ends_may_be_mixed(mix):
    body = "data: a%sdata: b%s%s" % mix + "\n"
    assert list(events(lines(cut_into(1, body.encode()))))[0][0] == "a"


def test_a_cr_ends_its_line_at_once():
    reading = lines(iter([b"data: x\r", b"\r"]))
    assert (next(reading), next(reading)) == (b"data: x", b"")


@pytest.mark.parametrize("given, said", rows({
    "bytes": ([b"data: a", b"data: b", b""], [("a\nb", "message", True)]),
    "bytes with line ends": ([b"data: a\n", b"data: b\r\n", b"\r\n"], [("a\nb", "message", True)]),
    "str": (["data: a", "data: b", ""], [("a\nb", "message", True)]),
    "str with line ends": (["data: a\r", "data: b\n", "\n"], [("a\nb", "message", True)]),
    "one byte order mark": ([b"\xef\xbb\xbfdata: a", b"", b"\xef\xbb\xbfdata: b", b""],
                            [("a", "message", True)]),
    "an invalid byte": ([b"data: a\xffb", b""], [("a\ufffdb", "message", True)]),
    "a type": (["event: add", "data: 1", "", "data: 2", ""],
               [("1", "add", True), ("2", "message", True)]),
    "a type without data": (["event: error", "", "data: x", ""], [("x", "message", True)]),
    "no last blank line": ([b"data: x"], [("x", "message", False)])}))
def test_an_event_is_a_text_with_a_type_and_whether_it_is_whole(given, said):
    assert [(event, event.type, event.whole) for event in events(given)] == said


@pytest.mark.parametrize("size", [1, 97, 1 << 20])
@pytest.mark.parametrize("body, said", rows({
    "data without a blank line": (b"data: x\n" * 2000, []),
    "2,000 events": (b"data: x\n\n" * 2000, ["x"] * 2000),
    "10,000 data lines": (b"data: x\n" * 10000 + b"\n", ["\n".join("x" * 10000)])}))
def test_lines_of_any_number_become_an_event_at_a_blank_line(body, said, size):
    assert [event for event in events(lines(cut_into(size, body))) if event.whole] == said


def test_an_event_of_2_mib_with_separators_is_read():
    separated = "\u2028x" * 500_000
    assert list(events(lines(cut_into(4093, f"data: {separated}\n\n".encode())))) == [separated]


@pytest.mark.parametrize("work", rows({
    "an event of 64 MiB": (lambda: next(events(lines(itertools.chain(
        [b"data: "], itertools.repeat(b"x" * 4096, 16384), [b"\n\n"])))),),
    "a stream of 100,000 chunks": (lambda: said_by(fold(itertools.repeat(
        {"choices": [{"delta": {"content": "x" * 100}}]}, 100000))),)}))
def test_what_is_long_is_read_in_linear_time(work):
    started = time.process_time()
    assert len(work()) in (64 << 20, 10 ** 7)
    assert time.process_time() - started < 4


# ----------------------------------------------------------------------------------
# Chunks and pieces: what counts as an end, as an error, as nothing at all.

TOLERATED = {  # name: the bytes of a stream that says "Hi there"
    "ping": b"event: ping\ndata: {}\n\n" + SAID,
    "named events": b"event: message\n" + HI_EVENT + b"event: foo\n" + THERE + STOP + DONE,
    "null": b"data: null\n\n" + SAID,
    "[DONE] and a space": HI_EVENT + THERE + STOP + b"data: [DONE] \n\n",
    "a named [DONE]": HI_EVENT + THERE + STOP + b"event: done\n" + DONE,
    "more after [DONE]": SAID + HI_EVENT + b"data: {nonsense\n\n",
    "no finish_reason": HI_EVENT + THERE + DONE,
    "no last blank line": HI_EVENT + THERE + STOP[:-1],
    "[DONE] without its line end": HI_EVENT + THERE + b"data: [DONE]",
    "half an event after the end": HI_EVENT + THERE + STOP + b'data: {"choi',
    "no choices": b'data: {"choices": []}\n\n' + SAID,
    "choices null": b'data: {"choices": null}\n\n' + SAID,
    "choices missing": b'data: {"usage": null}\n\n' + SAID,
    "delta null": event(None) + HI_EVENT + THERE + event(None, "stop"),
    "content null": event({"content": None}) + HI_EVENT + THERE + STOP,
    "finish_reason empty": event("Hi", "") + THERE + event({}, "") + DONE,
    "error null": event("Hi", error=None) + THERE + STOP + DONE,
    "other choices": HI_EVENT + OTHER_CHOICE + THERE + STOP + DONE,
    "each choice ends": HI_EVENT + OTHER_CHOICE + THERE + STOP + event({}, "stop", {"index": 1}),
    "text": b'data: {"choices":[{"text":"Hi there","finish_reason":"length"}]}\n\n',
}


@pytest.mark.parametrize("body", TOLERATED.values(), ids=TOLERATED)
def test_odd_but_legible_streams_are_read_also_in_single_bytes_with_crlf(body):
    assert text_in(body) == "Hi there"
    assert text_in(*cut_into(1, body.replace(b"\n", b"\r\n"))) == "Hi there"


@pytest.mark.parametrize("body, text", rows({
    "nothing": (b"", ""), "a comment": (b": only a comment\n\n", ""), "a page": (b"<html>", ""),
    "no end": (ROLE_EVENT + HI_EVENT, "Hi"), "half an event": (HI_EVENT + THERE[:-9], "Hi"),
    "no choices at last": (HI_EVENT + b'data: {"choices": []}\n\n', "Hi"),
    "the first of two choices has ended": (HI_EVENT + OTHER_CHOICE + STOP, "Hi"),
    "the second": (HI_EVENT + OTHER_CHOICE + event({}, "stop", {"index": 1}), "Hi")}))
def test_a_stream_that_just_ends_is_truncated_and_gives_its_text(body, text):
    with pytest.raises(StreamTruncated) as caught:
        text_in(body)
    assert caught.value.text == text


def test_a_stream_cut_at_any_byte_is_truncated_until_its_finish_reason_has_come():
    body = ROLE_EVENT + HI_EVENT + THERE + STOP
    for cut in range(len(body) - len("\n\n")):
        with pytest.raises(StreamTruncated):
            text_in(body[:cut])


def test_a_truncated_stream_keeps_the_end_of_a_very_long_text():
    parts = [f"{number:07d}" * 1000 for number in range(400)]
    with pytest.raises(StreamTruncated) as caught:
        text_in(*map(event, parts))
    kept = caught.value.text
    assert 1 << 20 <= len(kept) < 1 << 22 and "".join(parts).endswith(kept)


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
    (b'data: {"choices":[{"error":"busy","finish_reason":"error","index":1}]}', "busy", None),
    *((b"data: " + said, None, None)
      for said in (b'{"choices"', b"hello", b"[1]", b"17", b'"[DONE]"', b"[" * 100000))])
def test_an_error_event_raises_what_it_says_and_one_that_is_no_json_object_is_a_bad_reply(
        said, message, code):
    with pytest.raises(client.APIError if message else BadReply) as caught:
        text_in(HI_EVENT + said + b"\n\n" + DONE)
    assert not message or (caught.value.message, caught.value.code) == (message, code)


def test_chunks_stay_as_the_wire_has_them_and_closing_pieces_closes_them():
    assert list(chunks(['{"choices": [], "new": [1]}', "[DONE]"])) == [{"choices": [], "new": [1]}]
    given = (chunk("x") for _ in range(2))
    reading = pieces(given)
    assert next(reading) == "x" and given.gi_frame
    reading.close()
    assert given.gi_frame is None


def test_a_surrogate_pair_in_two_chunks_is_one_character_and_a_lone_half_stays():
    halves = [event(part) for part in ("a\ud83d", "\ude00b", "\ud83d")]
    assert list(pieces(chunks_read(*halves, DONE))) == ["a", "\U0001f600b", "\ud83d"]
    assert said_by(fold(chunks_read(*halves[:2], DONE))) == "a\U0001f600b"


# ----------------------------------------------------------------------------------
# The dialects of servers: the chunks of a stream as recorded or documented, all of which
# say "Hi you", and what fold makes of them.

def call_delta(arguments=None, name=None, **fields):
    function = {"name": name, "arguments": arguments}
    function = {name: value for name, value in function.items() if value is not None}
    return {"tool_calls": [{**fields, "function": function}]}


def text_parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


SAFE = {"content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}
THINKING = [{"type": "thinking", "thinking": text_parts("Hm.")}]
REFERENCE = [{"type": "reference", "reference_ids": [1]}]
CALL_A = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HI_YOU = chunk("Hi you")
DIALECTS = {  # name: (chunks, or lines of their own; what the completion holds at these places)
    "Azure: a first chunk of nothing, results beside each delta": (
        [{"choices": [], "created": 0, "id": "", "model": "", "object": "",
          "prompt_filter_results": [{"prompt_index": 0, **SAFE}]},
         chunk("Hi", None, SAFE, created=5), chunk(" you", None, SAFE, created=5),
         chunk({}, "stop", {"content_filter_results": {}}, created=5)],
        {"id": "c", "model": "m", "created": 5, "object": "chat.completion",
         "choices.0.content_filter_results.hate.severity": "safe"}),
    "Mistral: thinking and text as parts": (
        [chunk(ASSISTANT), chunk({"content": THINKING}),
         chunk({"content": text_parts("Hi")}), chunk(" you"), chunk("", "stop")],
        {"choices.0.message.content": THINKING + text_parts("Hi you")}),
    "Mistral: a reference in the text": (
        [chunk("Hi"), chunk({"content": REFERENCE}), chunk(" you", "stop")],
        {"choices.0.message.content": text_parts("Hi") + REFERENCE + text_parts(" you")}),
    "a text part with a field of its own beside other parts": (
        [chunk({"content": [{**text_parts("Hi ")[0], "annotations": [1]}, *text_parts("you"),
                            *REFERENCE]}, "stop")],
        {"choices.0.message.content.0": {"type": "text", "text": "Hi you", "annotations": [1]}}),
    "Mistral: nothing but text parts": (
        [chunk({"content": text_parts("Hi")}), chunk({"content": text_parts(" you")}, "stop")],
        {"choices.0.message.content": "Hi you"}),
    "Gemini: parallel calls that all have index 0": (
        [HI_YOU, chunk({"role": "assistant", **call_delta("{}", "f", index=0, id="a")}),
         chunk(call_delta("{}", "g", index=0, id="b"), "tool_calls")],
        {"choices.0.message.tool_calls.0.function.name": "f",
         "choices.0.message.tool_calls.1.function": {"name": "g", "arguments": "{}"}}),
    "Groq: a channel, and usage in x_groq": (
        [chunk(ASSISTANT, x_groq={"id": "r"}),
         chunk({"reasoning": "H", "channel": "analysis"}),
         chunk({"reasoning": "m.", "channel": "analysis"}), HI_YOU,
         chunk({}, "stop", x_groq={"id": "r", "usage": {"total_tokens": 9}})],
        {"choices.0.message.channel": "analysis", "choices.0.message.reasoning": "Hm.",
         "x_groq.usage.total_tokens": 9}),
    "Together: text beside the delta": (
        [chunk("Hi", None, {"text": "Hi"}), chunk(" you", None, {"text": " you"}),
         chunk("", "stop", {"text": None})],
        {"choices.0.message.content": "Hi you", "object": "chat.completion"}),
    "OpenRouter: comments, a role in each chunk": (
        [": OPENROUTER PROCESSING", chunk({"role": "assistant", "content": "Hi"}, provider="P"),
         ": OPENROUTER PROCESSING", chunk({"role": "assistant", "content": " you"}, provider="P"),
         chunk(ASSISTANT, "stop", {"native_finish_reason": "STOP"}),
         {"id": "c", "choices": [], "usage": {"cost": 0.1, "total_tokens": 9}}],
        {"choices.0.message.role": "assistant", "provider": "P", "usage.total_tokens": 9,
         "choices.0.native_finish_reason": "STOP"}),
    "DeepSeek: reasoning_content and a content of null": (
        [": keep-alive", chunk({"role": "assistant", "content": None, "reasoning_content": ""}),
         chunk({"content": None, "reasoning_content": "Hm."}),
         chunk({"content": "Hi you", "reasoning_content": None}, usage=None),
         chunk({"content": "", "reasoning_content": None}, "stop", usage={"total_tokens": 9})],
        {"choices.0.message.reasoning_content": "Hm.", "usage.total_tokens": 9}),
    "vLLM: usage that grows, stop_reason, calls with an index": (
        [chunk(ASSISTANT, usage={"total_tokens": 1}),
         chunk("Hi you", None, {"stop_reason": None}, usage={"total_tokens": 2}),
         chunk(call_delta(None, "f", id="a", type="function", index=0)),
         chunk(call_delta('{"a":', index=0)),
         chunk(call_delta(" 1}", index=0), "tool_calls", {"stop_reason": 7},
               usage={"total_tokens": 9})],
        {"usage.total_tokens": 9, "choices.0.stop_reason": 7,
         "choices.0.message.tool_calls.0.function.arguments": '{"a": 1}'}),
    "llama.cpp: id and name in each fragment, timings": (
        [chunk({"role": "assistant", "content": None}), HI_YOU,
         chunk(call_delta("{", "f", index=0, id="a", type="function")),
         chunk(call_delta("}", "f", index=0, id="a", type="function")),
         chunk({}, "tool_calls", timings={"predicted_n": 2})],
        {"choices.0.message.tool_calls": [CALL_A], "timings.predicted_n": 2}),
    "Ollama: a whole call in one chunk, finish_reason twice": (
        [HI_YOU, chunk({"content": "", "tool_calls": [{**CALL_A, "index": 0}]}),
         chunk(ASSISTANT, "tool_calls"), chunk(ASSISTANT, "stop")],
        {"choices.0.finish_reason": "tool_calls", "choices.0.message.tool_calls.0.id": "a"}),
}


@pytest.mark.parametrize("given, places", rows(DIALECTS))
def test_each_servers_dialect_is_understood(given, places):
    body = b"".join((each if isinstance(each, str) else "data: " + json.dumps(each)).encode()
                    + b"\n\n" for each in given) + DONE
    assert text_in(body) == "Hi you"
    shown, printed = (ran(streamed(body), "chat", "Hi", *flags)[0] for flags in ([], ["--json"]))
    assert shown.stdout.startswith(b"Hi you") and (shown.returncode, shown.stderr) == (0, b"")
    for held in (fold(chunks_read(body)), json.loads(printed.stdout)):
        for place, value in places.items():
            assert functools.reduce(lambda held, step: held[int(step) if step.isdigit() else step],
                                    place.split("."), held) == value


@pytest.mark.parametrize("listed, names", [
    ({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}, ["a", "b"]), (["a", "b"], ["a", "b"]),
    ([{"id": "a"}, {"id": "b"}], ["a", "b"]),
    ({"models": [{"name": "a"}, {"name": "b"}]}, ["a", "b"]),
    ({"data": [{"id": "a"}, None, {"id": 5}, {"id": "b"}], "message": "success"}, ["a", "b"]),
    *((listed, BadReply) for listed in (5, "a", {"data": 5}, {"data": {"a": {}}}, None))])
def test_a_list_of_models_is_read_in_each_form_and_else_a_named_error(listed, names):
    with playing(reply(listed)) as (base_url, _):
        with pytest.raises(names) if names is BadReply else contextlib.nullcontext():
            assert Client(base_url).models() == names


# ----------------------------------------------------------------------------------
# Fold.

@pytest.mark.parametrize("given, completion", rows({
    "a chat": (list(chunks_read(ROLE_EVENT, SAID)), {
        "id": "c", "model": "m", "object": "chat.completion", "choices": [
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
        {"object": "text_completion", "choices": [{"text": "ab", "index": 0, "finish_reason": None,
                                                   "logprobs": {"tokens": ["a", "b"]}}]})}))
def test_fold_joins_the_chunks_into_the_completion_and_does_not_change_them(given, completion):
    before = json.dumps(given)
    assert fold(given) == completion and json.dumps(given) == before


@pytest.mark.parametrize("choice", [
    {"index": "0", "delta": None}, {"index": []}, {"delta": [], "logprobs": 5}, {"text": None},
    {"finish_reason": ["stop"], "delta": {"content": {"a": 1}, "role": 5}},
    {"delta": {"content": 5}}, {"delta": {"tool_calls": 5}},
    {"delta": {"content": [*text_parts(["x"]), {"type": "thinking", "thinking": "x"}]}}])
def test_fold_and_pieces_bear_what_makes_no_sense_but_not_what_is_too_deep(choice):
    given = [{"choices": [choice]}, {"choices": [None, 5]}, {"choices": 5}]
    assert "".join(pieces(given)) == "" and len(fold(given)["choices"]) == 1
    too_deep = functools.reduce(lambda inner, _: {"audio": inner}, range(2000), 5)
    with pytest.raises(BadReply):
        fold([*given, chunk(too_deep)])


def folded(*deltas):
    """The message that deltas make, which stay as they are."""
    before = json.dumps(deltas)
    message = fold({"choices": [{"index": 0, "delta": delta}]}
                   for delta in deltas)["choices"][0]["message"]
    assert json.dumps(deltas) == before
    return message


@pytest.mark.parametrize("deltas, message", [
    ([{"role": "", "content": "a"}], {"role": "assistant"}),
    ([None, {"content": "a"}], {"content": "a"}),
    ([{"content": None, "refusal": ""}, {"refusal": "No."}], {"content": None, "refusal": "No."}),
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


@pytest.mark.parametrize("deltas, calls", rows({
    "two indexes": ([call_delta('{"a":1}', "f", index=0, id="1"),
                     call_delta("{}", "g", index=1, id="2")], [F, G]),
    **{f"index {i}": ([call_delta("", "f", index=i, id="1"), call_delta('{"a":1}', index=i)], [F])
       for i in (1, -1)},
    "no index": ([call_delta("", "f", id="1"), call_delta('{"a":1}'),
                  call_delta("{}", "g", id="2")], [F, G]),
    "no index but an id": ([call_delta("", "f", id="1"), call_delta('{"a":1}', id="1")], [F]),
    "the last call goes on": ([call_delta('{"a":1}', "f", id="1"), call_delta("", "g", id="2"),
                               call_delta("{}")], [F, G]),
    "arguments as an object": ([call_delta({"a": 1}, "f", index=0, id="1")],
                               [{**F, "function": {"name": "f", "arguments": '{"a": 1}'}}]),
    "no arguments": ([call_delta("", "g", index=0, id="2")], [G]),
    "whole calls": ([{"tool_calls": [F, G]}], [F, G]),
    **{f"whole calls without ids {where}": (
        deltas, [{"type": "function", "function": each["function"]} for each in (F, G)])
       for where, deltas in {
           "in one list": [{"tool_calls": [{"function": F["function"]},
                                           {"function": G["function"]}]}],
           "of an index that is null": [{"tool_calls": [
               {"index": None, "function": each["function"]} for each in (F, G)]}],
           "each in its chunk": [{"tool_calls": [{"function": each["function"]}]}
                                 for each in (F, G)]}.items()},
    "an empty function": ([{"tool_calls": [{"id": "1", "function": {}}]}],
                          [{"id": "1", "type": "function", "function": {"arguments": "{}"}}]),
    "neither index nor id": ([call_delta("", "f"), call_delta('{"a"'), call_delta(":1}")],
                             [{"type": "function", "function": F["function"]}]),
    "an id later": ([call_delta("", "f", index=0), call_delta("", "g", index=0, id="2")],
                    [{"type": "function", "function": {"name": "f", "arguments": "{}"}}, G]),
    "nonsense": ([{"tool_calls": [None, 5, {"id": "1", "function": None}]}],
                 [{"id": "1", "type": "function", "function": None}]),
    "custom": ([{"tool_calls": [{"index": 0, "id": "1", "custom": {"name": "c", "input": "a"}}]},
                {"tool_calls": [{"index": 0, "custom": {"input": "b"}}]}],
               [{"id": "1", "type": "custom", "custom": {"name": "c", "input": "ab"}}]),
    "none": ([{"content": "x", "tool_calls": []}, {"tool_calls": None}], None)}))
def test_fold_merges_tool_calls(deltas, calls):
    assert folded(*deltas).get("tool_calls") == calls


# ----------------------------------------------------------------------------------
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


def test_settings_and_else_the_first_model_come_from_the_environment(monkeypatch):
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv("OPENAI_" + name, name)
    with playing(MODELS_REPLY, reply(WHOLE)) as (base_url, requests):
        monkeypatch.setenv("OPENAI_BASE_URL", base_url + "/")
        asking = Client()
        asking.chat_completions("a"), asking.chat_completions("b")      # the models are asked once
        monkeypatch.setenv("OPENAI_MODEL", "mine")
        Client().chat_completions("c")
    assert [line.split()[1] for line, _, _ in requests] == ["/v1/models"] + 3 * [CHAT_PATH]
    assert [json.loads(body)["model"] for _, _, body in requests[1:]] == ["first", "first", "mine"]
    assert {"authorization": "Bearer API_KEY", "openai-organization": "ORG_ID",
            "openai-project": "PROJECT_ID"}.items() <= requests[0][1].items()
    monkeypatch.setenv("OPENAI_BASE_URL", ""), monkeypatch.setenv("OPENAI_API_KEY", " ")    # unset
    assert Client().url("/models") == "http://127.0.0.1:8000/v1/models"
    assert "Authorization" not in Client().headers


@pytest.mark.parametrize("settings", [
    *({"base_url": url} for url in (
        "localhost:8000", "file:///etc", "http://", "http://a:b/", "http://a b/",
        "http://me:pa55word@h/v1", "http://pa55word@h/v1", "me:pa55word@h/v1",
        "http://me:pa55word@h:x y/v1", "http://me:pa55word?x@h/v1")),
    {"timeout": 0}, {"api_key": "sk-\npa55word"}, {"base_url": "https://a", "cafile": "/no/such"}])
def test_settings_that_cannot_work_are_an_error_that_shows_no_password_or_key(settings):
    with pytest.raises(ClientError) as caught:
        Client(**settings)
    assert "pa55word" not in repr(caught.value)
    assert caught.value.__context__ is None or "cafile" in settings


def test_a_proxy_from_the_environment_is_asked_but_not_for_loopback_addresses(monkeypatch):
    with playing(MODELS_REPLY) as (base_url, requests):
        monkeypatch.setenv("http_proxy", base_url[:-3])
        for host in ("model.invalid", "127.example.com"):
            Client(f"http://{host}/v1").models()
            assert requests[-1][0].startswith(f"GET http://{host}/v1/models")
    monkeypatch.setenv("http_proxy", "http://me:pa55word@127.0.0.1:1")
    assert asked(GOOD)[0] == "Hi there"
    with pytest.raises(ConnectionFailed, match="through the proxy 127.0.0.1:1") as caught:
        Client("http://model.invalid/v1", max_retries=0).models()
    assert "pa55word" not in str(caught.value)


def test_a_header_is_added_replaced_and_taken_away_but_not_one_that_cannot_be_sent():
    with playing(MODELS_REPLY) as (base_url, requests):
        asking = Client(base_url, "sk-1")
        for header in (("api-key", "azure"), ("user-agent", "mine"), ("authorization", "")):
            asking.add_header(*header)
        asking.models()
    headers = requests[0][1]
    assert (headers["api-key"], headers["user-agent"]) == ("azure", "mine")
    assert "authorization" not in headers
    for header in (("a b", "x"), ("", "x"), ("a", "x\ny"), ("a", "\u00fc")):
        with pytest.raises(ClientError):
            asking.add_header(*header)


def test_a_refusal_that_comes_before_the_body_is_sent_is_read(upstream):
    def refuse():
        with upstream.listener.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(refusal_reply("413 Too Large", code="too_large"))
    thread = threading.Thread(target=refuse)
    thread.start()
    with pytest.raises(client.APIError) as caught:
        Client(upstream.url, max_retries=0, timeout=20).chat_completions("x" * 20_000_000, "m")
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


# ----------------------------------------------------------------------------------
# What it makes of the answers.

JAPANESE = ROLE_EVENT + event("\u65e5") + STOP + DONE
BLANKS = b"", b" \r\n", b"\xef\xbb\xbf", b"\n\n\xef\xbb\xbf"  # and byte order marks
PAGE = reply(b"<!DOCTYPE html><p>Welcome", content_type="text/html")


@both
@pytest.mark.parametrize("answer, text", rows({
    "a stream": (GOOD, "Hi there"), "a whole completion": (reply(WHOLE), "Hi there"),
    **{f"in sizes of {size}": (streamed(*cut_into(size, JAPANESE)), "\u65e5")
       for size in (1, 7, 100)},
    "up to the connection's end": (b"HTTP/1.0 200 OK\r\n\r\n" + SAID, "Hi there"),
    **{f"{before} before it": (reply(before + body), "Hi there") for blank in BLANKS
       for before, body in ((blank, json.dumps(WHOLE).encode()), (blank, SAID),
                            (blank + b": c\n\n", SAID), (blank + b"event: x\n", SAID))},
    "an empty Content-Encoding": (reply(WHOLE, content_encoding=""), "Hi there"),
    "an invalid byte": (GOOD.replace(b'"Hi"', b'"\xff\xff"'), "\ufffd\ufffd there")}))
def test_a_reply_is_streamed_or_whole_as_it_was_asked_for_however_it_comes(answer, text, stream):
    assert asked(answer, stream=stream)[0] == text


@both
@pytest.mark.parametrize("answer, kind, words", [
    (PAGE, BadReply, "text/html"), (reply({"error": {"message": "no"}}), client.APIError, "no"),
    (reply(b"\x1f\x8b\x08", content_encoding="gzip"), BadReply, "gzip"),
    *((answer, BadReply, None) for answer in (
        reply(b'{"choices"'), *map(reply, (
            {}, {"id": "c"}, {"choices": None}, [WHOLE], {"message": {"content": "Hi"}})))),
    (b"HTTP/1.1 200 OK\r\n\r\n", ClientError, None), (reply([]), ClientError, None),
    (b"nonsense\r\n\r\n", ConnectionFailed, None), (b"", ConnectionFailed, None)])
def test_an_answer_that_is_none_is_a_named_error(answer, kind, words, stream):
    error_of(answer, stream, kind, words, max_retries=0)


@pytest.mark.parametrize("answer", rows({
    "in the middle of a transfer chunk": (STREAM_HEAD + GOOD[len(STREAM_HEAD):-60],),
    "between two of them": (streamed(ROLE_EVENT, HI_EVENT, THERE)[:-len(b"0\r\n\r\n")],),
    "by a reset": (then_reset(streamed(ROLE_EVENT, HI_EVENT, THERE)[:-5]),),
    "before its length": (reply(SAID.replace(DONE, b"")).replace(b"Length: ", b"Length: 9"),)}))
def test_a_connection_that_is_cut_in_mid_stream_is_a_truncation(answer):
    assert error_of(answer, stream=True, kind=StreamTruncated)[0].text == "Hi there"


@pytest.mark.parametrize("answer, stream, words", rows({
    "cut before its first byte": (STREAM_HEAD, True, None),
    "silent in mid stream": (then_held(STREAM_HEAD + transfer_chunk(HI_EVENT)), True, None),
    "silent from the start": (then_held(b""), False, "no response in time")}))
def test_a_connection_that_says_nothing_has_failed(answer, stream, words):
    error_of(answer, stream, ConnectionFailed, words, timeout=0.1, max_retries=0)


def test_every_response_is_closed_without_help_of_the_garbage_collector(monkeypatch):
    kept, made = [], http.client.HTTPResponse.__init__

    def init(response, *words, **fields):
        kept.append(response)       # so that no reference count closes it
        made(response, *words, **fields)
    monkeypatch.setattr(http.client.HTTPResponse, "__init__", init)
    for answer in (reply(b"x" * (5 << 20), "400 No"), then_held(GOOD[:-5]), reply(WHOLE)[:-5],
                   streamed(b"data: [1]\n\n", HI_EVENT), streamed(HI_EVENT, THERE)[:-5],
                   reply(b"x" * 99999, content_encoding="gzip")):
        for stream in (True, False):
            with playing(answer) as (base_url, _), contextlib.suppress(ClientError):
                asking = Client(base_url, max_retries=0, timeout=0.1)
                next(pieces(asking.chat_completions("Hi", "m", stream=stream)))
    assert len(kept) == 12 and all(response.isclosed() for response in kept)


@pytest.mark.parametrize("leave", rows({
    "closed": (lambda stream: (next(stream), stream.close()),), "the loop was left": (next,),
    "closed unread": (lambda stream: stream.close(),), "read up to its [DONE]": (list,)}))
def test_the_connection_is_closed_when_its_reader_has_done(leave):
    answer = then_held(GOOD[:-len(b"0\r\n\r\n")])
    with playing(answer) as (base_url, _):
        leave(Client(base_url).chat_completions("Hi", "m", stream=True))
        assert answer.left.wait(PATIENCE)


def test_whom_to_trust_is_said_by_cafile_or_ssl_cert_file(certificate, waits, monkeypatch):
    with playing(b"", b"", GOOD, MODELS_REPLY, tls=certificate[1]) as (base_url, requests):
        with pytest.raises(ConnectionFailed, match="certificate cannot be trusted"):
            Client(base_url).chat_completions("Hi", "m")
        done = run("models", base_url=base_url)
        assert requests == waits == []
        trusting = Client(base_url, cafile=certificate[0])
        assert "".join(pieces(trusting.chat_completions("Hi", "m", stream=True))) == "Hi there"
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        assert Client(base_url).models() == ["first", "second"]
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"--cafile" in done.stderr


# ----------------------------------------------------------------------------------
# Refusals and retries.

@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client waits before it tries again; here it goes on at once."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("answer, message", [
    *((reply(body, "400 Bad"), message) for body, message in (
        ({"error": {"message": "no"}}, "no"), ({"error": "no"}, "no"), ({"message": "no"}, "no"),
        ({"object": "error", "message": "no"}, "no"), (b"no", "no"), (["no"], '["no"]'),
        ({"detail": "no"}, '{"detail": "no"}'), (b"", "Bad"), (b"<html>x", "Bad"), ({}, "{}"),
        ({"error": None}, '{"error": null}'))),
    (reply(b"\x1f\x8b\x08", "400 Bad", content_encoding="gzip"), "Bad"),
    (then_held(reply(b"half of it", "400 Bad").replace(b"Length: ", b"Length: 9")), "half of it")])
def test_an_error_has_a_message_whatever_the_body_which_is_not_waited_for_long(
        answer, message, monkeypatch):
    monkeypatch.setattr(client, "_ERROR_BODY", 0.1)
    error, _ = error_of(answer, timeout=600)
    assert (error.status, error.message) == (400, message)


def test_an_error_has_all_that_the_server_told_also_after_pickling_but_no_control_characters():
    error, _ = error_of(
        refusal_reply("400 Bad", {"x_request_id": "req_1"}, type="t", code="c", param="p"))
    assert (error.type, error.code, error.param) == ("t", "c", "p")
    assert (error.request_id, error.headers["X-Request-Id"]) == ("req_1", "req_1")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "400 c: no" and (again.status, again.code) == (400, "c")
    error, _ = error_of(refusal_reply("400 No", message="a\x1b[2J\x9b\u202eb", code="\x1bc"))
    assert (error.message, error.code) == ("a\\x1b[2J\\x9b\\u202eb", "\\x1bc")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_but_named_and_an_error_is_raised_by_the_call(status):
    error, requests = error_of(reply(b"", "%d Moved" % status, location="http://evil/"))
    assert requests == 1 and "http://evil/" in error.message
    with playing(refusal_reply(f"{status + 100} No")) as (base_url, _):
        with pytest.raises(client.APIError):
            Client(base_url, max_retries=0).chat_completions("Hi", "m", stream=True)


SECRET = "sk-ab/cd+SECRET"
SPELT = {"as it is": SECRET, "JSON": SECRET.replace("/", "\\/"), "URL": "sk-ab%2Fcd%2bSECRET",
         "escapes": "".join("\\u%04x" % ord(c) for c in SECRET), "lower case": SECRET.lower()}


@pytest.mark.parametrize("key", SPELT.values(), ids=SPELT)
@pytest.mark.parametrize("place", [
    lambda key: reply(b'{"error": {"message": "%b", "code": "%b", "type": "%b", "param": "%b"}}'
                      % ((key,) * 4), "401 No", x_request_id=key.decode()),
    lambda key: reply(b'{"error": "bad %b"}' % key), lambda key: reply(b"x" * 190 + key, "400 No"),
    lambda key: reply(b'{"detail": "%b"}' % key, "400 No"),
    lambda key: reply(b"", "400 " + key.decode()),
    lambda key: reply(b"", "302 No", location="http://h/" + key.decode()),
    lambda key: reply(b"<html>", content_type="text/" + key.decode()),
    lambda key: key + b"\r\n\r\n", lambda key: b"HTTP/1.1 2x0 " + key + b"\r\n\r\n",
    lambda key: streamed(HI_EVENT, b'data: {"error": {"message": "bad %b"}}\n\n' % key),
    lambda key: streamed(HI_EVENT, b"event: error\ndata: bad " + key + b"\n\n"),
    lambda key: streamed(HI_EVENT, b"data: " + key + b"\n\n"),
    lambda key: reply(b"", content_encoding=key.decode())])
def test_the_key_is_nowhere_in_an_error_whatever_the_server_repeats(place, key):
    error, _ = error_of(place(key.encode()), stream=True, api_key=SECRET, max_retries=0)
    shown = ""
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
        asking.add_header("api-key", "azure-key"), asking.add_header("Auth", "Basic dXNlcjpwYXNz")
        asking.models()
    assert caught.value.message == "*** *** *** 2024-02-01 bad"
    with pytest.raises(ConnectionFailed) as caught:
        Client("http://127.0.0.1:1/v1?a=b&c=+", max_retries=0).models()
    assert "http://127.0.0.1:1/v1:" in str(caught.value) and "a=b" not in str(caught.value)


@pytest.mark.parametrize("status, headers, requests", [
    *((status, {}, 1) for status in (400, 401, 404)),
    *((status, {}, 3) for status in (408, 409, 429, 500, 503)),
    (400, {"x_should_retry": "true"}, 3), (500, {"x_should_retry": "false"}, 1),
    (429, {"retry_after": "121"}, 1), (429, {"retry_after": "1e999"}, 1),
    (500, {"x_should_retry": "true", "retry_after_ms": "200000"}, 1)])
def test_what_may_pass_is_tried_thrice_but_a_used_up_quota_once(status, headers, requests, waits):
    assert error_of(refusal_reply(f"{status} No", headers))[1] == requests
    assert error_of(refusal_reply(f"{status} No", headers, code="insufficient_quota"))[1] == 1


def test_a_retry_that_succeeds_is_all_that_is_seen_but_a_stream_that_began_is_not_retried(waits):
    text, requests = asked(refusal_reply("429 No"), then_reset(b""), GOOD)
    assert (text, len(requests), len(waits)) == ("Hi there", 3, 2)
    assert len(asked(reply(WHOLE)[:-5], reply(WHOLE), stream=False)[1]) == 2
    assert error_of(then_reset(streamed(HI_EVENT)[:-5]), stream=True, kind=StreamTruncated)[1] == 1


NO_DATE = "Fri, 31 Dec 10000 23:59:59 GMT"


@pytest.mark.parametrize("headers, least, most", [
    *(({"retry_after": text}, float(text), float(text)) for text in ("7", "0.5", "120")),
    *(({"retry_after_ms": "20", **more}, 0.02, 0.02) for more in ({}, {"retry_after": "7"})),
    ({"retry_after_ms": "soon", "retry_after": "7"}, 7, 7), ({"retry_after": None}, 10, 100),
    *(({"retry_after": text}, 0.375, 0.5) for text in (
        "0", "-5", "nan", "soon", "", " ", "Thu, 01 Jan 1970 00:00:00 GMT", NO_DATE))])
def test_the_server_says_how_long_or_until_when_to_wait(headers, least, most, waits):
    if headers == {"retry_after": None}:        # until a date
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
        headers = {"retry_after": date}
    error_of(refusal_reply("429 No", headers), max_retries=1)
    assert least <= waits[0] <= most and len(waits) == 1


def test_else_the_wait_doubles_up_to_eight_seconds(waits):
    error_of(refusal_reply("429 No"), max_retries=10)
    assert len(waits) == 10 and all(
        0.75 * most <= wait <= most for most, wait in zip((0.5, 1, 2, 4, *6 * [8]), waits))


# ----------------------------------------------------------------------------------
# The command line: what `main` makes of words in this process, and, where signals, a
# terminal or the standard streams matter, the file as users start it.

def run(*words, base_url=None, stdin=b"", encoding="utf-8", **more):
    """The status of a command, and what it wrote as bytes."""
    streams = [io.TextIOWrapper(io.BytesIO(given), encoding) for given in (stdin, b"", b"")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment(base_url, **more))
        for name, stream in zip(("stdin", "stdout", "stderr"), streams):
            patch.setattr(sys, name, stream)
        try:
            status = client.main(list(words)) or 0
        except SystemExit as usage:
            status = usage.code
    said = [stream.flush() or stream.buffer.getvalue() for stream in streams[1:]]
    return subprocess.CompletedProcess(words, status, *said)


def ran(answers, *words, **how):
    """(what became of a command, the requests that it made) while a server played these."""
    answers = answers if isinstance(answers, list) else [answers]
    model = {} if answers[0] == MODELS_REPLY else {"OPENAI_MODEL": "m"}     # else it asks first
    with playing(*answers) as (base_url, requests):
        return run(*words, base_url=base_url, **model, **how), requests


@contextlib.contextmanager
def started(answers, *words, **options):
    """(a process of the client, the requests that it makes) while a server plays these."""
    with playing(*answers) as (base_url, requests):
        options = {"stdout": subprocess.PIPE, "env": environment(base_url, OPENAI_MODEL="m"),
                   **options}
        with subprocess.Popen([sys.executable, CLIENT, *words], **options) as process:
            try:
                yield process, requests
            finally:
                process.kill()


def test_the_file_is_a_command_that_needs_no_package():
    done = finished(sys.executable, "-S", CLIENT)
    assert done.returncode == 0 and "usage" in done.stdout


@pytest.mark.parametrize("words, seen", [
    (["chat", "Hi"], b"Hi"), (["chat", "Hi", "--raw"], HI_EVENT)], ids=["text", "raw"])
def test_chat_prints_the_answer_as_it_comes(words, seen):
    with started([then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))], *words) as (process, _):
        assert process.stdout.read(len(seen)) == seen


@pytest.mark.parametrize("words, stdin, fields", [
    *((f"chat {words}", stdin, {"messages": user(prompt)}) for words, stdin, prompt in (
        ("Hi", b"no", "Hi"), ("", b"Hi\n", "Hi"), ("-", b"Hi", "Hi"), ("a --prompt b", b"", "a b"),
        ("--prompt Hi", b"", "Hi"), ("--prompt -", b"Hi\r\n", "Hi"), ("", b"\xef\xbb\xbfHi", "Hi"),
        ("Write a message", b"", "Write a message"), ("Sum up: -", b"fed\n", "Sum up:\n\nfed"),
        ("- In short?", b"fed\n", "fed\n\nIn short?"), ("a - b", b"fed\n", "a\n\nfed\n\nb"))),
    *((f"chat Hi --json {flags}", b"", {"messages": user("Hi"), **fields}) for flags, fields in (
        ("", {"stream_options": {"include_usage": True}}), ("--no-stream", {"stream": False}),
        ("-p stream=false", {"stream": False}))),
    ("--temperature 0 chat --system Be. Hi --stop a --stop b --max-tokens 5 -p user=me -p seed=1 "
     "-p top_p=NaN -p tools=@tools.json -p 'stream_options={\"include_usage\": true}'", b"", {
         "messages": [{"role": "system", "content": "Be."}, *user("Hi")], "temperature": 0.0,
         "stop": ["a", "b"], "max_tokens": 5, "user": "me", "seed": 1, "top_p": "NaN",
         "tools": [{"type": "function"}], "stream_options": {"include_usage": True}})])
def test_the_words_and_options_become_the_request(words, stdin, fields, tmp_path, monkeypatch):
    (tmp_path / "tools.json").write_text('[{"type": "function"}]')
    monkeypatch.chdir(tmp_path)
    sent = {"model": "m", "stream": True, **fields}
    answer = GOOD if sent["stream"] else reply(WHOLE)
    done, requests = ran(answer, *shlex.split(words), stdin=stdin)
    assert done.returncode == 0 and json.loads(requests[0][2]) == sent
    assert "--json" not in words or said_by(json.loads(done.stdout)) == "Hi there"


def test_settings_come_from_the_option_the_file_the_environment_in_this_order(tmp_path):
    path = tmp_path / "config.ini"
    words = ["chat", "Hi", "--config", str(path), "--model", "option"]
    with playing(GOOD) as (base_url, requests):
        path.write_bytes(b"\xef\xbb\xbf[OpenAI]\r\nMODEL = file\r\n")       # as Notepad saves it
        for count in (6, 4, 2):
            run(*words[:count], base_url=base_url, OPENAI_MODEL="environment")
        path.write_text(f"[OpenAI]\nAPI_SECRET_KEY = sk-%%1\nMODEL = mine\nBASE_URL={base_url}\n")
        run(*words[:4])
    assert [json.loads(body)["model"] for _, _, body in requests] == [
        "option", "file", "environment", "mine"]
    assert requests[-1][1]["authorization"] == "Bearer sk-%%1"


RAW = b": c\r\n\r\n" + HI_EVENT + b"retry: 1\n\n" + STOP + DONE
SLOW = refusal_reply("429 No", {"retry_after_ms": "1"}, message="slow down", code="slow")
CALL_CHUNKS = [{"refusal": "I won't."}, call_delta("", "f", index=0, id="1", type="function"),
           call_delta('{"a":1}', index=0)]


@pytest.mark.parametrize("answers, words, status, printed, told", rows({
    "text": (GOOD, "chat Hi", 0, "Hi there\n", ""),
    "complete": (reply({"choices": [{"text": " upon a time", "finish_reason": "stop"}]}),
                 "complete Once --no-stream", 0, " upon a time\n", ""),
    "models": (MODELS_REPLY, "models", 0, "first\nsecond\n", ""),
    "raw": ([MODELS_REPLY, streamed(RAW[:9], RAW[9:])], "chat Hi --raw", 0, RAW.decode(), ""),
    "raw, cut at first": ([reply(WHOLE)[:-5], reply(WHOLE)], "chat Hi --raw --no-stream", 0,
                          json.dumps(WHOLE), "(trying again"),
    "raw, an error in a stream": (
        streamed(b'data: {"error": "busy"}\n\n'), "chat Hi --raw --no-stream", 1,
        'data: {"error": "busy"}\n\n', "client.py: error: busy\n"),
    "a retry": ([SLOW, GOOD], "chat Hi", 0, "Hi there\n",
                "429 slow: slow down (trying again in 0.0 s)\n"),
    **{reason: (streamed(HI_EVENT, event({}, reason), DONE), "chat Hi", 0, "Hi\n",
                f"the reply was cut short (finish_reason {reason})\n")
       for reason in ("length", "content_filter")},
    "two choices": (streamed(HI_EVENT, OTHER_CHOICE, STOP, DONE), "chat Hi", 0, "Hi\n",
                    "the first of 2 choices is shown; --json prints them all\n"),
    "a call of the second, cut short": (
        streamed(HI_EVENT, event(call_delta("{}", "g"), "length", {"index": 1}), DONE), "chat Hi",
        0, "Hi\n", "the first of 2 choices is shown; --json prints them all\n"),
    "a refusal, a call": (
        streamed(*map(event, CALL_CHUNKS), event({}, "tool_calls"), DONE), "chat Hi",
                          0, f"I won't.\n{json.dumps(F)}\n", ""),
    "401": (refusal_reply("401 No", code="invalid_api_key"), "chat Hi", 1, "",
            "401 invalid_api_key: no (--api-key or"),
    "404": (refusal_reply("404 No", message="a\nb"), "chat Hi", 1, "",
            "404: a b (are --base-url and --model given and right?)\n"),
    "a page": (PAGE, "chat Hi -H accept:text/html", 1, "", "text/html"),
    "half a reply": (streamed(HI_EVENT), "chat Hi", 1, "Hi\n", "before the reply was complete"),
    "a reply that is cut": (streamed(HI_EVENT)[:-5], "chat Hi", 1, "Hi\n", "cut"),
    "no reply": (b"", "chat Hi --retries 0", 1, "", "cannot reach")}))
def test_a_reply_is_printed_and_what_its_text_does_not_show_is_told_in_one_line(
        answers, words, status, printed, told, waits):
    done, _ = ran(answers, *words.split())
    assert (done.returncode, done.stdout.decode()) == (status, printed)
    assert told in done.stderr.decode() and done.stderr.count(b"\n") == bool(told)
    assert done.stderr.startswith(b"client.py: "[:99 * bool(told)])


@pytest.mark.skipif(not shutil.which("curl") or os.name == "nt", reason="needs curl and sh")
def test_curl_prints_a_command_that_asks_the_same(certificate):
    words = ["chat", "it's \"\u00fc\" $HOME `x` \\", "--model", "m'", "-p", 'user="\\ud83d"',
             "-H", "api-key: a'b", "--cafile", certificate[0]]
    key = {"OPENAI_API_KEY": "sk-1"}
    with playing(GOOD, tls=certificate[1]) as (base_url, requests):
        base_url += "?api-version=1"
        run(*words, base_url=base_url, **key)
        command = run(*words, "--curl", base_url=base_url, **key).stdout.decode()
        finished("sh", "-c", command, env=environment(**key))
    (line, sent, body), (curl_line, curl_sent, curl_body) = requests
    assert "sk-1" not in command and (line, json.loads(body)) == (curl_line, json.loads(curl_body))
    for name in ("authorization", "content-type", "api-key"):
        assert sent[name] == curl_sent[name]


def test_curl_of_the_models_sends_no_key_where_none_is_given():
    done = run("models", "--curl", base_url="http://127.0.0.1:1/v1?api-version=1")
    assert shlex.split(done.stdout.decode().replace("\\\n", "")) == [
        "curl", "-sS", "-N", "http://127.0.0.1:1/v1/models?api-version=1"]


@pytest.mark.parametrize("words", [
    "chat", "chat -", "complete", "nonsense", "models --json --raw", "models Hi",
    "complete Hi --system Be.",
    *(f"chat Hi {more}" for more in (
        "-", "--json --raw", "--raw --curl", "-p x", "-p x=@/no/such", "--config /no/such",
        "--base-url nowhere", "--base-url http://me:pw@h/v1", "--timeout 0", "--timeout nan",
        "--temperature nan", "--temperature 1e999", "-H 'no colon'", "-H colonless")),
    *(f"bench {more}" for more in ("--requests 0", "--concurrency 1001", "--curl", "--raw"))])
def test_what_makes_no_sense_is_status_2(words):
    done = run(*shlex.split(words))
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr
    assert b"header :" not in done.stderr       # where the header has no name


def deep(count, before, after, around=b"%b"):
    return around % (before * count + b"1" + after * count)


DEEP_DELTA = deep(900, b'{"a":', b"}", b'data: {"choices": [{"delta": {"audio": %b}}]}\n\n')
DEEP_TEXT = deep(450, b'[{"type": "text", "text": ', b"}]",
                 b'data: {"choices": [{"delta": {"content": %b}}]}\n\n')
DEEP_COMPLETION = deep(600, b'{"a":', b"}", b'{"choices": [], "x": %b}')


@pytest.mark.parametrize("answer, words", rows({
    "an endless timeout": (GOOD, "chat Hi --timeout inf"),
    "a parameter named self": (GOOD, "chat Hi -p self=1"),
    "no date": (refusal_reply("429 No", {"retry_after": NO_DATE}), "chat Hi --retries 0"),
    "no calls": (streamed(event({"tool_calls": [None, {"function": None}]}), STOP), "chat Hi"),
    "a deep delta": (streamed(DEEP_DELTA, STOP, DONE), "chat Hi --json"),
    "a deep text": (streamed(DEEP_TEXT, STOP, DONE), "chat Hi"),
    "a deep error": (reply(deep(600, b"[", b"]"), "400 No"), "chat Hi"),
    "a deep completion": (reply(DEEP_COMPLETION), "chat Hi --json"),
    "no list of models": (reply({"data": 5}), "models")}))
def test_nothing_that_a_server_says_or_a_user_types_is_a_traceback(answer, words):
    done, _ = ran(answer, *words.split())
    assert done.returncode in (0, 1) and done.stderr.count(b"\n") == done.returncode


@posix
@pytest.mark.parametrize("script, status, printed", [
    ("chat <&-", 2, ""), ("chat Hi <&-", 0, "HiHi\n"), ("chat Hi >&-", 0, ""),
    ("chat Hi 2>&-", 0, "HiHi\n"), ("chat Hi --json --raw 2>&-", 2, ""),
    ("chat >&- 2>&- <&-", 2, ""), ("chat Hi | head -c 2", 0, "Hi"),
    *((f"chat Hi {more} >/dev/full", 1, "") for more in ("", "--json")
      if os.path.exists("/dev/full"))])
def test_standard_streams_may_be_closed_or_full(script, status, printed):
    times = 20000 if "head" in script else 2
    with playing(streamed(*[HI_EVENT] * times, DONE)) as (base_url, _):
        done = finished("sh", "-c", f"{shlex.join((sys.executable, CLIENT))} {script}",
                        env=environment(base_url, OPENAI_MODEL="m"))
    assert (done.returncode, done.stdout) == (status, printed)
    assert done.stderr.count("\n") == (status > 0 and "2>" not in script)


@pytest.mark.parametrize("base_url, proxy, told", [
    *(("http://model.invalid/v1", proxy, b"") for proxy in ("http:/x", "http://[", "nonsense")),
    ("http://127.0.0.1:1/v1", "", b"is the server running")])
def test_a_proxy_that_makes_no_sense_or_nobody_there_is_one_line(base_url, proxy, told):
    done = run("models", "--retries", "0", base_url=base_url, http_proxy=proxy)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and told in done.stderr


def test_a_terminal_that_knows_no_utf8_gets_question_marks():
    answer = streamed(event("\u65e5\ud83d!"), STOP, DONE)
    assert ran(answer, "chat", "Hi", encoding="ascii")[0].stdout.split() == [b"??!"]


@posix
def test_ctrl_c_is_status_130_and_closes_the_connection():
    answer = then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))
    with started([answer], "chat", "Hi", stderr=subprocess.PIPE) as (process, _):
        process.stdout.read(2)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == b""
        assert process.returncode == 130 and answer.left.wait(PATIENCE)


# ----------------------------------------------------------------------------------
# The conversation, on a pseudo-terminal, and the load generator.

@contextlib.contextmanager
def terminal(answers, *words, stdout=None):
    """As `started`, on a terminal, and `expect`, which reads up to a text, and `type`."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    seen = [""]  # and not yet expected

    def expect(text):
        while text not in seen[0]:
            assert select.select([master], [], [], PATIENCE)[0], f"{seen[0]!r} instead of {text!r}"
            seen[0] += os.read(master, 4096).decode()
        before, _, seen[0] = seen[0].partition(text)
        return before

    with started(answers, *words, stdin=slave, stdout=stdout or slave, stderr=slave,
                 start_new_session=True) as (process, requests):
        os.close(slave)
        try:
            yield process, requests, expect, lambda text: os.write(master, text.encode())
        finally:
            os.close(master)


CALL_REPLY = streamed(event(call_delta("{}", "g", index=0, id="2")), event({}, "tool_calls"), DONE)


@pytest.mark.parametrize("answers, talk, end, model, messages", rows({
    "the history is kept": ([GOOD], [("one", "Hi there"), ("two", "Hi there")], "\x04", "m",
                            ["one", "Hi there", "two"]),
    "the commands are obeyed": (
        [GOOD], [("one", "Hi there"), ("/system Be brief.", "."), ("/model other", "er"),
                 ("/reset", "set"), ("/help", "Ctrl-D"), ("two", "there")], "/quit\n", "other",
        ["Be brief.", "two"]),
    "a question may begin with a slash": (
        [GOOD], [("/etc/hosts, what is it?", "there"), (" /help is what?", "there")], "\x04", "m",
        ["/etc/hosts, what is it?", "Hi there", "/help is what?"]),
    "a server that goes away is one line": (
        [streamed(HI_EVENT)[:-5], GOOD], [("one", "client.py: the connection was cut"),
                                          ("two", "Hi there")], "/quit\n", "m", ["two"]),
    "tool calls are shown but not kept": (
        [CALL_REPLY, GOOD], [("one", '"name": "g"'), ("two", "Hi there")], "\x04", "m", ["two"])}))
def test_a_conversation(answers, talk, end, model, messages):
    with terminal(answers, "chat") as (process, requests, expect, type):
        for line, told in talk:
            expect("> "), type(line + "\n"), expect(told)
        expect("> "), type(end)
        assert process.wait(PATIENCE) == 0
    last = json.loads(requests[-1][2])
    assert (last["model"], [each["content"] for each in last["messages"]]) == (model, messages)
    assert [each["role"] for each in last["messages"]] == [
        "system" if text == "Be brief." else "assistant" if text == "Hi there" else "user"
        for text in messages]


def test_ctrl_c_stops_a_reply_but_not_the_conversation():
    answer = then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))
    with terminal([answer, GOOD], "chat") as (process, requests, expect, type):
        expect("> "), type("one\n"), expect("Hi")
        process.send_signal(signal.SIGINT)
        assert answer.left.wait(PATIENCE)
        expect("> "), type("two\n"), expect("Hi there")
    assert [m["content"] for m in json.loads(requests[1][2])["messages"]] == ["one", "Hi", "two"]


def test_reasoning_is_dim_on_a_terminal_and_nowhere_else():
    deltas = {"reasoning_content": "Hm"}, {"reasoning": "."}, {"content": THINKING}, "Hi"
    answer = streamed(*map(event, deltas), STOP, DONE)
    done, _ = ran(answer, "chat", "Hi")
    assert (done.stdout.strip(), done.stderr) == (b"Hi", b"")
    with terminal([answer], "chat", "Hi") as (_, _, expect, _):
        assert expect("\r\nHi") == "\x1b[2mHm\x1b[0m\x1b[2m.\x1b[0m\x1b[2mHm.\x1b[0m"


def test_the_prompts_of_a_conversation_are_not_in_the_file_of_its_replies(tmp_path):
    with open(tmp_path / "said", "wb") as file:
        with terminal([GOOD], "chat", stdout=file) as (process, _, expect, type):
            type("one\n\x04"), expect("> ")
            assert process.wait(PATIENCE) == 0
    assert (tmp_path / "said").read_bytes() == b"Hi there\n"


@pytest.mark.parametrize("cpu, concurrency, limit", [
    (0.5, 8, False), (0.9, 8, True), (0.1, 1, False), (0.4, 1, True)])
def test_bench_says_when_the_client_was_the_limit(cpu, concurrency, limit):
    report = client._report([([0.1, 0.2], 0.2, None)], 1.0, cpu, concurrency)
    assert report["client_is_the_limit"] == limit


def test_bench_counts_requests_events_and_errors_and_fails_when_nothing_succeeds():
    done, _ = ran([MODELS_REPLY, GOOD, GOOD, refusal_reply("429 No", code="slow"), GOOD],
                  "bench", "--requests", "5", "--concurrency", "2", "--json")
    report = json.loads(done.stdout)
    assert (report["requests"], report["completed"]) == (5, 4)
    assert report["errors"] == {"429 slow": 1}
    assert round(report["events_per_second"] * report["seconds"]) == 4 * 4
    assert 0 < report["first_event"]["median"] <= report["first_event"]["p99"]
    done = run("bench", "--model", "m", base_url="http://127.0.0.1:1/v1")
    assert b"errors        100 x ConnectionFailed" in done.stdout
    assert (done.returncode, done.stderr) == (1, b"") and b"0 of 100 completed" in done.stdout


def test_bench_times_the_text_not_the_role_and_starts_no_more_threads_than_requests(monkeypatch):
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda it: started.append(it) or start(it))

    def answering():
        yield chunk(ASSISTANT)
        threading.Event().wait(0.05)
        yield chunk("Hi")
    report = client.bench(answering, {}, 3, 1000)
    assert report["first_text"]["median"] >= report["first_event"]["median"] + 0.04
    assert len(started) == 3


def test_percentiles_are_values_of_the_nearest_rank():
    for count, *ranks in (1, 1, 1, 1), (2, 1, 2, 2), (100, 50, 95, 99), (1000, 500, 950, 990):
        assert list(client._spread(range(count, 0, -1)).values()) == ranks


@posix
def test_ctrl_c_ends_a_measurement_with_its_report():
    answers, words = [GOOD, GOOD, then_held(GOOD[:-60])], ["bench", "--concurrency", "1", "--json"]
    with started(answers, *words) as (process, requests):
        until(lambda: len(requests) == 3)
        process.send_signal(signal.SIGINT)
        report = json.loads(process.communicate()[0])
    assert (report["requests"], report["completed"], process.returncode) == (2, 2, 130)


def test_the_progress_and_the_report_of_bench_are_for_people_on_a_terminal_but_not_its_json():
    bench = "bench", "--requests", "2"
    with terminal([GOOD], *bench, "--json") as (_, _, expect, _):
        assert expect('"client_is_the_limit"').startswith("{\r\n")
    with terminal([GOOD], *bench) as (_, _, expect, _):
        assert expect("requests  ").endswith("2 done, 0 failed\r\r\n")
        expect("    2 of 2 completed")


# ---------------------------------------------------------------------------
# The client beside odd servers: errors that are slow, silent or hidden, and secrets.

@pytest.mark.parametrize("deltas, field, value", [
    ([{"audio": {"data": [1, 2]}}, {"audio": {"data": [3]}}], "audio", {"data": [1, 2, 3]}),
    ([{"content": [{"type": "text", "text": "a"}]}, {"content": "b"}], "content", "ab")])
def test_only_content_and_thinking_are_lists_of_parts(deltas, field, value):
    assert folded(*deltas)[field] == value


def test_choices_of_a_whole_reply_without_an_index_keep_their_places():
    body = {"choices": [{"message": {"content": text}} for text in "ab"]}
    with playing(reply(body)) as (base_url, _):
        choices = fold(Client(base_url).chat_completions("Hi", "m", stream=True))["choices"]
    said = [(each["index"], each["message"]["content"]) for each in choices]
    assert said == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("block, pause, seconds", [(b"x", 0.01, 0.1), (b"x" * 65536, 0, PATIENCE)])
def test_the_body_of_an_error_has_a_limit_of_time_and_of_bytes(block, pause, seconds, monkeypatch):
    def pour(connection):
        connection.sendall(b"HTTP/1.1 500 No\r\n\r\n")
        for pour.sent in range(1000):
            connection.sendall(block)
            threading.Event().wait(pause)
    monkeypatch.setattr(client, "_ERROR_BODY", seconds)
    assert error_of(pour, max_retries=0)[0].status == 500 and pour.sent < 999


@both
@pytest.mark.parametrize("answer, error, told", [
    (reply(b"Warming up", content_type="text/plain"), BadReply, "is text/plain, not JSON"),
    (b"HTTP/1.1 502 \r\n\r\n<html>", client.APIError, "502: Bad Gateway"),
    (b"HTTP/1.1 400 No" + streamed(*[b"word"] * 300)[15:], client.APIError, "word" * 300),
    (b"nonsense\r\n\r\n", ConnectionFailed, "/v1: nonsense"),
    (reply({"error": "busy"}), client.APIError, "error: busy"),
    (reply({"error": {"message": "busy", "code": 429}}), client.APIError, "429: busy"),
    (reply({"error": {"message": "no", "code": 429}}, "400 No"), client.APIError, "400 429: no")])
def test_streamed_or_not_an_error_says_what_the_server_did(answer, error, told, stream):
    failed, _ = error_of(answer, stream, error, max_retries=0)
    assert told in str(failed) and "running" not in str(failed)


@pytest.mark.parametrize("said, status", [
    ('data: {"error": {"code": %s}}' % code, status) for code, status in
    (("429", 429), ('"429"', None), ("399", None), ("600", None))] + [
    (f"event: error\ndata: {said}", None) for said in ("{}", "null", "")])
def test_an_error_event_needs_no_message_and_its_code_may_be_a_status(said, status):
    with pytest.raises(client.APIError) as caught:
        next(chunks_read(said.encode() + b"\n\n"))
    assert (caught.value.status, caught.value.retryable) == (status, status == 429)


@pytest.mark.parametrize("query, key, echoed, shown", [
    ("", "EMPTY", "EMPTY must not be empty", "*** must not be empty"),
    ("", "a+b/c", "a%2Bb%2Fc a%2bb%2fc \\u0061+b/c A+b/c", "*** *** *** A+b/c"),
    ("?key=abcd+efgh", "", "abcd+efgh abcd efgh", "*** ***"),
    ("?SECRETKEY", "", "SECRETKEY", "***"), ("?k=%ff%feabcdef", "", "%ff%feabcdef", "***"),
    ("?k=c2VjcmV0cw==", "", "c2VjcmV0cw==", "***")])
def test_a_secret_is_the_key_and_each_value_of_the_query(query, key, echoed, shown):
    with playing(refusal_reply("400 No", message=echoed)) as (base_url, _):
        with pytest.raises(client.APIError) as caught:
            Client(base_url + query, key).models()
    assert caught.value.message == shown


def test_the_wait_is_read_before_secrets_are_hidden_and_a_key_loses_its_line_end(waits):
    busy = reply({"error": "no"}, "429 No", retry_after="90.00000")
    with playing(busy, MODELS_REPLY) as (base_url, _):
        asking = Client(base_url, "90.00000\n")
        assert asking.models() and waits == [90]
    with pytest.raises(ClientError, match="X:Y"):
        asking.add_header("X:Y", "v")
    too_deep = functools.reduce(lambda inner, _: [inner], range(100_000), 5)
    for value in too_deep, math.nan:
        with pytest.raises(ValueError):
            asking.chat_completions("Hi", "m", x=value)


def test_a_cut_stream_that_was_not_asked_for_is_asked_again_and_silence_keeps_the_text(waits):
    assert len(asked(streamed(HI_EVENT), reply(WHOLE), stream=False)[1]) == 2
    assert type(error_of(streamed(HI_EVENT), max_retries=0)[0]) is ConnectionFailed
    silent = then_held(STREAM_HEAD + transfer_chunk(HI_EVENT))
    assert error_of(silent, True, ConnectionFailed, timeout=0.2)[0].text == "Hi"


def test_messages_escape_what_moves_the_cursor_and_show_keeps_no_chunk_that_is_shown():
    plain = "a\xa0b\u3000c\U0001f469\u200d\U0001f680"
    assert str(ClientError(plain + "\x9b\u2066\ud83d")) == plain + "\\x9b\\u2066\\ud83d"
    kept, delta = [], {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []}
    said = [chunk(delta), chunk({"reasoning": "x"}), chunk("x", None, {"index": 1})] * 5
    said.append(chunk({}, "stop"))
    list(client._shown(said, kept, set()))
    assert len(kept) == 1


def test_a_stream_that_is_cut_in_its_reasoning_leaves_no_line_open():
    with terminal([streamed(event({"reasoning": "Hm"}))], "chat", "Hi") as (_, _, expect, _):
        assert expect("client.py: ").endswith("Hm\x1b[0m\r\n")


def test_the_users_content_type_is_sent_no_model_is_no_line_and_a_tab_ends_a_command():
    words = ["chat", "Hi", "--model", "m", "-H", "content-type: application/x"]
    assert ran(GOOD, *words)[1][0][1]["content-type"] == "application/x"
    command = run(*words, "--curl", base_url="http://h/v1").stdout
    assert b"'Content-Type: application/x'" in command and b"application/json" not in command
    assert ran(reply({"data": []}), "models")[0].stdout == b""
    talk = client.Conversation(None, {"messages": []})
    talk.obey("/system\tBe brief ")
    assert talk.system == [{"role": "system", "content": "Be brief"}]


# ==================================================================================
# PROGRAMS, RELAY AND REPLAY, THE COMMAND LINE, TLS, NGINX

# ----------------------------------------------------------------------------------
# Programs.

PRINT = "sys.stdout.buffer.write(os.fsencode(sys.argv[1]))"
SPOKEN = {  # a program, what is asked, and what the reply says
    **{repr(text): (program(PRINT, "<{prompt}>"), text, f"<{text}>") for text in (
        "Hi", "", "two words", "it's \"quoted\" $HOME `ls` \\ %PATH%", "{prompt}", "line\nline",
        "naïve 世界 🎈", "-n")},
    "words as a shell would split them": (
        '"%s" -c "import sys; print(sys.argv[1:])" {prompt} "a b"' % sys.executable, "c d",
        "['c d', 'a b']\n"),
    "half a character at the end": (
        program("sys.stdout.buffer.write('a世'.encode()[:-1])"), "Hi", "a\ufffd"),
    "input that is not read": (program("print(end='ok')"), "word " * 2**18, "ok"),
    "a long complaint": (program("sys.stderr.write('x' * 2**20); print(end='ok')"), "Hi", "ok"),
}


@both
@pytest.mark.parametrize("words, text, said", rows(SPOKEN))
def test_the_prompt_reaches_a_program_and_what_it_prints_is_the_reply(words, text, said, stream):
    with Server(command(words)) as server:
        assert chat(server, text, stream=stream).text == said


@pytest.mark.parametrize("text", ["Hé", "\ud800"])
def test_standard_input_has_the_request_as_one_json_document(text):
    with Server(command(program("print(json.dumps(json.load(sys.stdin)))"))) as server:
        seen = json.loads(chat(server, text, temperature=0.5, top_k=3).text)
    assert seen["messages"] == user(text) and seen["text"] == text
    assert (seen["endpoint"], seen["index"], seen["temperature"]) == ("chat", 0, 0.5)


@both
@pytest.mark.parametrize("path, fields, texts", [
    (CHAT_PATH, {"n": 3, "messages": user("a")}, b"aaa"),
    (TEXT_PATH, {"prompt": "a", "n": 3}, b"aaa"),
    (TEXT_PATH, {"prompt": ["a", "b"], "n": 2}, b"aabb")])
def test_each_choice_has_a_program_of_its_own_and_waits_for_no_other(path, fields, texts, stream):
    got = ask(command(program(PRINT, "{prompt}!"), at_once=1), path, stream=stream, **fields)
    said = re.findall(rb'"index":(\d)|"(?:content|text)":"(\w)!"', got.body)
    assert got.status == 200 and b"".join(sorted(text for _, text in said)) == texts


def test_what_a_program_says_is_sent_at_once_and_no_character_is_split(gate):
    text = "né世🎈!"
    speaker = gate.program("for byte in %r: out(bytes([byte])); gate()" % text.encode())
    with Server(command(speaker)) as server, asking(server, stream=True) as client:
        said = read_past(client, b'"n"')        # while the program waits at the gate
        for _ in text.encode():
            gate.arrival().close()
        assert "".join(said_in(said + read_to_end(client))) == text


FAILING = {  # what a program does, what the message says, and what not
    "in silence":         ("sys.exit('loading\\nout of memory')", "out of memory", "loading"),
    "within a character": (r"os.write(1, b'ok\xf0\x9f'); sys.exit('died')", "died", "ok"),
    "by a signal":        ("os.kill(os.getpid(), 9)", "", "Traceback"),
    "after a complaint":  (r"sys.exit('x' * 2**20 + '\nthe last line')", "the last line", "xx"),
}


@posix
@both
@pytest.mark.parametrize("code, told, untold", rows(FAILING))
def test_a_failing_program_is_an_error_or_an_event_after_its_text(code, told, untold, stream):
    with Server(command(program(code))) as server:
        got = chat(server, stream=stream)
    begun = stream and "write" in code
    assert (got.status, said_in(got.body)) == ((200, ["ok", "\ufffd"]) if begun else (500, []))
    assert told in got.error["message"] and untold not in got.error["message"]


@pytest.mark.parametrize("name", ["no-such-program", "./no/such/one", SERVER + "x", "Makefile"])
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
        for got in (chat(server, stream=stream) for _ in range(2)):     # its place is free again
            assert got.status == 500 and str(path) in got.error["message"]


def test_the_pipe_of_a_program_is_closed_by_the_server_itself(monkeypatch):
    kept, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **options: kept.append(
        popen(*words, **options)) or kept[-1])
    with Server(command(program("print('a' * 10**6)"))) as server:
        chat(server), chat(server, max_tokens=1, stream=True)
        leave(server, CHAT_PATH, {**HI, "stream": True}, after=1)
        until(lambda: len(kept) == 3 and all(
            each.stdout.closed and each.returncode is not None for each in kept))


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "long " * 2 ** 20],
                         ids=["NUL", "surrogate", "too long"])
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
@pytest.mark.parametrize("code, processes", rows(LEFT))
def test_the_client_leaving_ends_a_program_and_its_children(gate, code, processes):
    with Server(command(gate.program(code), at_once=2)) as server:
        with asking(server), asking(server, stream=True):
            doors = [gate.arrival() for _ in range(2 * processes)]
        assert all(map(ended, doors))
        assert [outcome(server, place) for place in (0, 1)] == ["client left"] * 2


@posix
@pytest.mark.parametrize("stop, more", [(".", 0), (None, 0), (None, 2**22)], ids=[
    "a stop", "the end of the server", "its end when more has come than is read ahead"])
def test_a_program_ends_at(gate, stop, more):
    speaker = gate.program("door = knock(); out('one. two'); door.recv(1)")
    with Server(command(speaker)) as server, asking(server, stop=stop) as client:
        door = gate.arrival()
        client.settimeout(0.5)
        with contextlib.suppress(socket.timeout):
            client.sendall(b"x" * more)
        if stop is None:
            server.close()
        assert ended(door)


def test_programs_never_overlap_where_one_runs_at_once(tmp_path):
    code = ("os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL))\n"
            "os.spawnl(os.P_WAIT, sys.executable, sys.executable, '-S', '-c', '')\n"
            "os.unlink(sys.argv[1])\nprint(end='alone')")
    with Server(command(program(code, str(tmp_path / "lock")), at_once=1)) as server:
        assert together(6, lambda: chat(server, stream=True).text) == ["alone"] * 6


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


def test_a_program_is_held_up_by_a_client_that_does_not_read(gate):
    speaker = gate.program("door = knock()\nwhile True: out(b'x' * 2**20); door.sendall(b'.')")
    with Server(command(speaker)) as server, asking(server, stream=True):
        door, taken = gate.arrival(), 0
        door.settimeout(0.1)                    # it has fallen silent
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
ODD = b'{\n  "id": "chatcmpl-1",\n  "choices": [] }\n'
REFUSAL = b'{"error": {"code": "model_not_found"}}\n'
NO_STREAM = b"A stream ends so:\ndata: [DONE]\n\nThis is none." + b"x" * 2**17
EXCHANGES = {   # the bytes of an upstream, and the status and the body that are in them
    "whole":    (reply(ODD, **JSON_TYPE), 200, ODD),
    "streamed": (streamed(*ABOVE), 200, b"".join(ABOVE)),
    "split":    (streamed(*(bytes([byte]) for byte in b"".join(ABOVE))), 200, b"".join(ABOVE)),
    "refused":  (reply(REFUSAL, "404 Not Found", **JSON_TYPE), 404, REFUSAL),
    "no UTF-8": (reply(b"\xff\xfe\x00", content_type="text/html"), 200, b"\xff\xfe\x00"),
    "empty":    (reply(b"", **JSON_TYPE), 200, b""),
    "no stream": (reply(NO_STREAM, content_type="text/plain"), 200, NO_STREAM),
    "to the close": (b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(ABOVE), 200, b"".join(ABOVE)),
}


@pytest.fixture
def tape(tmp_path):
    return tmp_path / "tape"


def relayed(server, upstream, sent, **fields):
    """The reply of a relay whose upstream sends these bytes and closes."""
    with asking(server, **fields) as client:
        connection, _ = upstream.accept()
        with connection:
            connection.sendall(sent)
        return got_on(client)


@pytest.mark.parametrize("sent, status, body", rows(EXCHANGES))
def test_an_upstreams_reply_and_its_recording_are_as_it_was(upstream, tape, sent, status, body):
    with Server(Relay(upstream.url, record=str(tape))) as server:
        first = relayed(server, upstream, sent)
        assert sent != streamed(*ABOVE) or server.journal[0].events == 3
        assert server.journal[0].outcome == ("error" if status == 404 else "complete")
    assert ('{"base64":"//4A"}' in tape.read_text()) == (body == b"\xff\xfe\x00")
    with Server(Replay(str(tape))) as server:
        again = chat(server)
    assert [(got.status, got.body) for got in (first, again)] == [(status, body)] * 2
    assert first.headers.get("content-type") == again.headers.get("content-type")


RETURNED = {"content-type": "text/x-odd; a=b", "content-encoding": "gzip", "retry-after": "7",
            "retry-after-ms": "70", "x-should-retry": "false", "x-request-id": "req_upstream",
            "x-ratelimit-limit-requests": "60", "x-ratelimit-reset-tokens": "6m0s",
            "openai-model": "m-1", "openai-processing-ms": "17",
            "openai-version": "2020-10-01", "openai-organization": "org-1"}
KEPT_BACK = dict.fromkeys(["set-cookie", "server", "access-control-allow-origin", "x-other"], "no")


@pytest.mark.parametrize("status", ["200 OK", "429 Slow down"])
def test_the_headers_that_clients_read_come_back_and_no_others(upstream, status):
    head = "".join(f"{name}: {value}\r\n" for name, value in {**RETURNED, **KEPT_BACK}.items())
    sent = f"HTTP/1.1 {status}\r\n{head}Content-Length: 4\r\n\r\nCode".encode()
    with Server(Relay(upstream.url)) as server:
        got = relayed(server, upstream, sent)
    assert {name: got.headers.get(name) for name in RETURNED} == RETURNED
    assert "no" not in [got.headers.get(name) for name in KEPT_BACK] and got.body == b"Code"


@pytest.mark.parametrize("path", [CHAT_PATH, "/chat/completions", "//v1//chat/completions/"])
@pytest.mark.parametrize("base", ["", "/v1", "/v1/", "/deep/er/v1"])
def test_a_path_is_put_after_the_upstreams_own(upstream, base, path):
    with Server(Relay(upstream.url[:-len("/v1")] + base)) as server, asking(server, path=path):
        _, (line, _, _) = upstream.accept()
    assert line.split(" ")[1] == base.rstrip("/") + "/chat/completions"


# A relay reaches only its routes, however they are spelled.
CLIMBING = ["/v1" + start + dots + slash + "files" for start in (
    "/models/", "/models/a%2f", "/models//", "/chat/", "/completions/", "/engines/", "/", "%2f")
    for dots in ("..", "%2e%2e", ".%2e", "%252e%252e", "%c0%ae%c0%ae", "..%00", ".", "..;", ";/..")
    for slash in ("/", "%2f", "%2F", "%5c", "\\", "%252f", "%3f", "%23", "#", "%0d%0aX:%20")] + """
    /v1/models/a/../../files /v1/models/%2f%2fevil.example /v1/models/http://evil.example/
    /v1/models?x=/../../admin /v1/files /v1/embeddings /v1/chat/completions/..%2f..%2ffiles
    /v1/engines/..%2f..%2fadmin%3f/completions /v1/engines/a/../../completions /v1/models/..
    /v1/engines/x%2f..%2ffiles%23/chat/completions /../admin //admin /sse/../files
    http://evil.example/v1/files http://127.0.0.1/../admin http://127.0.0.1/v1/models/..%2ffiles
""".split()
REACHED = {"POST": r"/v1/(chat/)?completions", "GET": r"/v1/models(/[^/\\;#]+)?",
           "HEAD": r"/v1/models(/[^/\\;#]+)?", "DELETE": "none"}


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "DELETE"])
def test_a_relay_reaches_only_its_routes(method):
    with playing(reply({"a": 1}, **JSON_TYPE)) as (url, requests):
        with Server(Relay(url)) as server:
            body = b"{}" if method == "POST" else b""
            headers = b"Host: x\r\nConnection: close\r\nContent-Length: %d\r\n" % len(body)
            for target in CLIMBING:
                raw = get(target.encode(), headers, method.encode()) + body
                talk(server, raw, method == "HEAD")
            assert call(server, "GET", "/v1/models/org%2Fm?x=1").status == 200
    assert requests.pop()[0].split()[1] == "/v1/models/org%2Fm?x=1"
    for line, sent, _ in requests:
        asked, target, _ = line.split(" ")
        assert asked == method and sent["host"] in url
        path = target.partition("?")[0]
        assert re.fullmatch(REACHED[method], path), target
        for decoded in (unquote(path), unquote(unquote(path))):
            assert not re.search(r"[/\\;]\.\.?([/\\;]|$)", decoded), target


THROUGH = {  # the request; what the upstream is asked for; what it says; status and body
    "HEAD": ("HEAD /v1/models", None, reply(b"{}")[:-2], 200, b""),
    "HEAD of a stream": ("HEAD /v1/models", None, STREAM_HEAD, 200, b""),
    "204": ("GET /v1/models", None, b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    **{f"the target {target}": ("GET /v1/models" + target, went and "GET /v1/models" + went,
                                reply({}), 200, b"{}") for target, went in {
        "?limit=1&after=a%20b": None, "?": None, "/a%2Fb": None, "/a/b": "/a%2Fb",
        "/%C3%A9": None, "/a%20b": None, "/a%3Fb": None, "/a:b@c": "/a%3Ab%40c", "/a..b": None,
    }.items()},
}


@pytest.mark.parametrize("line, went, sent, status, body", rows(THROUGH))
def test_what_http_has_passes_through_a_relay(upstream, tape, line, went, sent, status, body):
    raw, to_head = f"{line} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), line.startswith("HEAD")
    with Server(Relay(upstream.url, record=str(tape))) as server, dial(server) as client:
        client.sendall(raw + LAST)          # a body where none may be would spoil the next reply
        connection, (found, _, _) = upstream.accept()
        with connection:
            connection.sendall(sent)
        got, last = replies(read_to_end(client), to_head)
    assert found == f"{went or line} HTTP/1.1"
    assert (got.status, got.body, last.status) == (status, body, 200)
    with Server(Replay(str(tape))) as server:
        assert talk(server, raw + LAST, to_head)[0].body == body


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"], ids=repr)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_events_of_an_upstream_are_counted_however_they_come(upstream, end, size):
    body = "".join(f"data: {each}{end}" for each in ('{"a":1}', '{"b":"世"}', "[DONE]")).encode()
    with Server(Relay(upstream.url)) as server, asking(server, stream=True) as client:
        connection, _ = upstream.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        connection.sendall(STREAM_HEAD.replace(b"text/event", b"Text/Event"))
        for start in range(0, len(body), size):
            connection.sendall(transfer_chunk(body[start:start + size]))
        got = got_on(client)                # it ends at [DONE], while the upstream lingers
        assert got.body == body and server.journal[0].events == 3
        assert server.journal[0].outcome == "complete" and connection.fileno() > 0


def test_an_event_of_an_upstream_that_is_very_long_is_passed_on_before_its_end(upstream):
    with Server(Relay(upstream.url)) as server, asking(server, stream=True) as client:
        connection, _ = upstream.accept()
        with connection:
            connection.sendall(STREAM_HEAD + transfer_chunk(b"data: " + b"x" * 2**17))
            read_past(client, b"x" * 2**15)


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


@pytest.mark.parametrize("url", ["ftp://h/v1", "http:///v1", "http://h/v1?x=1", "h:8000/v1",
                                 "http://user:hush@h/v1", "http://:hush@h/v1"])
def test_what_is_no_upstream_is_refused_and_its_password_not_shown(url):
    with pytest.raises(ValueError, match="cannot be an upstream") as refusal:
        Relay(url)
    assert "hush" not in str(refusal.value)


@pytest.mark.parametrize("passing", [Relay("http://h:9/v1"), None], ids=["relay", "replay"])
def test_beside_a_relay_models_are_obeyed_and_a_quirk_is_refused(passing, tape):
    tape.write_bytes(b"")
    for settings in ({"quirk": "comment"}, {"quirk_header": True}):
        with pytest.raises(ValueError, match="quirk"):
            Server(passing or Replay(str(tape)), **settings)
    with Server(passing or Replay(str(tape)), models=["a"]) as server:
        assert listed(server) == ["a"]
        for got in (chat(server), call(server, "GET", "/v1/models/m")):
            assert got.status == 404 and got.error["code"] == "model_not_found"


def test_a_body_goes_up_as_it_came_with_the_headers_that_an_upstream_needs(upstream):
    body = b'{ "n":"many",\n"messages": 5, "odd": 1e2, "text": "\\u00e9"}'
    sent = {"Idempotency-Key": "k-1", "OpenAI-Organization": "org-1", "X-Stainless-Lang": "go",
            "User-Agent": "mine/1", "Cookie": "secret", "X-Other": "x", "Accept-Encoding": "gzip"}
    with Server(Relay(upstream.url)) as server, dial(server) as client:
        client.sendall(request_bytes(body, headers=sent))
        _, (_, there, came) = upstream.accept()
    went = {name: there.get(name.lower()) for name in sent}
    assert went == {**sent, "Cookie": None, "X-Other": None, "Accept-Encoding": "identity"}
    assert came == body


@pytest.mark.parametrize("sent", [reply({}), STREAM_HEAD + transfer_chunk(b"data: 1\n\n")],
                         ids=["whole", "cut"])
def test_a_relay_connects_in_limited_time_and_closes_the_connection(upstream, monkeypatch, sent):
    kept, limits, create = [], [], socket.create_connection

    def connect(address, timeout, *more):
        limits.append(timeout)
        kept.append(create(address, timeout, *more))
        return kept[-1]                     # a reference is held here
    with Server(Relay(upstream.url)) as server, dial(server) as client:
        monkeypatch.setattr(socket, "create_connection", connect)
        client.sendall(request_bytes())
        with upstream.accept()[0] as connection:
            connection.sendall(sent)
        read_to_end(client)
        until(lambda: kept and kept[0].fileno() == -1)
        monkeypatch.undo()
    assert 0 < limits[0] <= 60


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
def test_the_client_leaving_closes_the_upstream_unrecorded(upstream, tape, sent, stream, caplog):
    with Server(Relay(upstream.url, record=str(tape))) as server:
        with asking(server, stream=stream) as client:
            connection, _ = upstream.accept()
            connection.sendall(sent)
            if ABOVE[0] in sent:
                read_past(client, ABOVE[0])
        assert ended(connection) and outcome(server) == "client left"
    assert tape.read_bytes() == b"" and re.search("not recorded on.*client left", caplog.text)


def complete(raw):
    """Would a client take these bytes for a whole reply that is no error?"""
    with contextlib.suppress(http.client.HTTPException, ValueError):
        near, far = socket.socketpair()
        with near, far:
            near.sendall(raw)
            half_close(near)
            return got_on(far).status < 500
    return False


@both
@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["closed", "reset"])
@parts
def test_an_upstream_that_is_cut_never_looks_complete_and_the_log_says_why(upstream, tape, caplog,
                                                                           sent, end, stream):
    with Server(Relay(upstream.url, record=str(tape))) as server, \
            asking(server, stream=stream) as client:
        connection, _ = upstream.accept()
        connection.sendall(sent)
        if ABOVE[0] in sent:
            read_past(client, ABOVE[0])         # the events before the cut
        end(connection)
        assert not complete(STREAM_HEAD * (ABOVE[0] in sent) + read_to_end(client))
        assert outcome(server) == "error"
    reason = "was cut" if b"\r\n\r\n" in sent else "at .* cannot be reached"
    if end is reset:                            # which may overtake what was sent
        reason = "was cut|at .* cannot be reached"
    assert re.search(f"not recorded on .*tape: the upstream ({reason})", caplog.text, re.I)
    assert tape.read_bytes() == b""


@pytest.mark.parametrize("sent", [
    None, b"", b"SSH-2.0-OpenSSH\r\n", b"\0" * 70000, b"HTTP/1.1 2"], ids=[
    "is not there", "says nothing", "speaks another protocol", "makes noise", "says half a line"])
def test_a_502_names_the_upstream_that(upstream, sent):
    with Server(Relay(upstream.url, api_key="sk-secret")) as server:
        if sent is None:
            upstream.listener.close()
        got = chat(server) if sent is None else relayed(server, upstream, sent)
    assert (got.status, got.error["code"]) == (502, "upstream_unreachable")
    assert upstream.url in got.error["message"] and b"secret" not in got.body


def test_an_upstream_with_an_ipv6_address_needs_no_port(monkeypatch):
    def refuse(address, *_):
        raise OSError(f"{address} was asked for")
    with Server(Relay("http://[::1]/v1")) as server, dial(server) as client:
        monkeypatch.setattr(socket, "create_connection", refuse)
        client.sendall(request_bytes())
        assert "('::1', 80) was asked for" in got_on(client).error["message"]
        monkeypatch.undo()                          # before the server is closed


KEYS = {    # our keys, the relay's, what the client sends, what goes upstream
    "none at all":            ((), None, {}, None),
    "the client's":           ((), None, {"Authorization": "Bearer theirs"}, "Bearer theirs"),
    "the relay's":            ((), "up", {}, "Bearer up"),
    "the relay's before it":  ((), "up", {"Authorization": "Bearer theirs"}, "Bearer up"),
    "ours stays here":        (["ours"], None, {"Authorization": "Bearer ours"}, None),
    "ours is replaced":       (["ours"], "up", {"Authorization": "Bearer ours"}, "Bearer up"),
    "ours in another header": (["ours"], None, {"api-key": "ours"}, None),
    "the client's in another header": ((), None, {"api-key": "theirs"}, "theirs"),
    "the relay's before that": ((), "up", {"api-key": "theirs"}, "Bearer up"),
}


@pytest.mark.parametrize("ours, key, headers, expected", rows(KEYS))
def test_the_key_that_goes_upstream(upstream, ours, key, headers, expected):
    relay = Relay(upstream.url, api_key=key)
    with Server(relay, api_keys=ours) as server, asking(server, headers=headers):
        _, (_, sent, _) = upstream.accept()
    went = [sent[name] for name in ("authorization", "api-key") if name in sent]
    assert went == [expected] * bool(expected) and (not ours or "ours" not in repr(sent))


# ----------------------------------------------------------------------------------
# Tapes.

def recorded(tape, *texts, backend=echo, **fields):
    """Record a streamed exchange for each text; the bodies of the replies."""
    headers = {"Authorization": "Bearer sk-ours", "Cookie": "sk-cookie"}
    with Server(backend, api_keys="sk-upstream") as first, Server(
            Relay(first.base_url, "sk-upstream", str(tape)), api_keys="sk-ours") as server:
        return [chat(server, text, headers=headers, stream=True, **fields).body for text in texts]


def test_a_tape_has_a_json_line_for_each_exchange_and_no_key_and_is_gone_on_with(tape):
    bodies = [*recorded(tape, "one", "two"), *recorded(tape, "three")]
    lines = tape.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") and b"sk-" not in line for line in lines)
    assert [json.loads(line)["request"]["body"]["messages"] for line in lines] == [
        user("one"), user("two"), user("three")]
    with Server(Replay(str(tape))) as server:
        assert [chat(server, text, stream=True).body for text in ("one", "two", "three")] == bodies


def test_an_unwritable_tape_is_refused_at_the_start_and_costs_no_reply_later(tmp_path, caplog):
    with pytest.raises(OSError):
        Relay("http://127.0.0.1:9/v1", record=str(tmp_path))
    tape = tmp_path / "folder" / "tape"
    tape.parent.mkdir()
    with Server(say("ok")) as first, Server(Relay(first.base_url, record=str(tape))) as server:
        shutil.rmtree(str(tape.parent))
        assert chat(server, stream=True).text == "ok" and str(tape) in caplog.text


SPELLED = [('"temperature": 0', '"temperature": 0.0'), ('"temperature": 1.0', '"temperature": 1'),
           ('"logit_bias": {"5": 2.0}', '"logit_bias": {"5": 2}'),
           ('"metadata": {"a": "b", "c": "d"}, "n": 1', '"n":1,\n"metadata":\t{"c":"d","a":"b"}')]


@pytest.mark.parametrize("first, again", SPELLED)
def test_the_same_request_however_it_is_spelled_gets_the_recording(tape, first, again):
    first, again = ('{%s, "model": "m", "prompt": "Hi"}' % each for each in (first, again))
    with Server() as above, Server(Relay(above.base_url, record=str(tape))) as server:
        body = post(server, TEXT_PATH, first).body
    with Server(Replay(str(tape))) as server:
        assert post(server, TEXT_PATH, again).body == body


def test_repeated_requests_take_their_recordings_in_order_and_the_last_stays(tape):
    recorded(tape, "x", "x", "x", backend=Script("one", "two", "three"))
    with Server(Replay(str(tape))) as server:
        said = [chat(server, "x", stream=True).text for _ in range(5)]
    assert said == ["one", "two", "three", "three", "three"]


def test_a_recording_of_another_engine_or_path_is_none(tape):
    with Server(say("a")) as first, Server(Relay(first.base_url, record=str(tape))) as server:
        post(server, "/v1/engines/gpt-a/completions", {"prompt": "x"})
        call(server, "GET", "/v1/models/say")
    with failing_at_its_end(Replay(str(tape)), AssertionError, "body.model is 'gpt-b'") as server:
        assert [post(server, f"/engines/{name}/completions", {"prompt": "x"}).status
                for name in ("gpt-a", "gpt-b")] == [200, 404]
        assert post(server, "/completions", {"model": "gpt-a", "prompt": "x"}).text == "a"
        assert [call(server, "GET", f"/models/{id}").status for id in ("say", "x")] == [200, 404]


def test_every_endpoint_on_a_tape_is_replayed_and_with_a_relay_the_relays_too(tape):
    with Server(routes={path: lambda body: [path] for path in ("/a", "/b")}) as first:
        with Server(Relay(first.base_url, record=str(tape), paths=["/a"])) as server:
            body = post(server, "/a", "{}").body
        with Server(Replay(str(tape), relay=Relay(first.base_url, paths="/b"))) as server:
            assert post(server, "/b", "{}").status == 200
    with Server(Replay(str(tape))) as server:
        assert post(server, "/a", "{}").body == body and post(server, "/c", "{}").status == 404


def test_what_is_missing_on_a_tape_is_asked_for_and_recorded(tape):
    def said(texts, relay=None):
        with Server(Replay(str(tape), relay=relay)) as server:
            return [chat(server, text, stream=True).text for text in texts]
    with Server(Script("one", "two")) as first:
        for _ in range(2):                          # first the tape is not there, then it is
            assert said("xyx", Relay(first.base_url)) == ["one", "two", "one"]
    assert said("yx") == ["two", "one"] and tape.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("wrong", [{"speed": -1}, {"speed": math.nan}, {"speed": "1"},
                                   {"relay": "http://h/v1"}, {"relay": echo}], ids=repr)
def test_what_no_replay_can_do_is_a_type_error(tape, wrong):
    with pytest.raises(TypeError):
        Replay(str(tape), **wrong)


def test_a_client_that_does_not_read_holds_up_the_upstream_which_is_no_pause(upstream, tape):
    slowness, sent = 0.5, 0
    with Server(Relay(upstream.url, record=str(tape))) as server, asking(server) as client:
        connection, _ = upstream.accept()
        with connection:
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            while select.select([], [connection], [], slowness)[1]:
                sent += connection.send(b"x" * 2**16)
                assert sent < 2**26, "that much is kept somewhere"
        while client.recv(2**16):
            pass
    assert max(pause for pause, _ in json.loads(tape.read_text())["writes"]) < slowness


# Clients that close at [DONE], or at the last byte of a whole reply, at once.

def seen_after_the_end(server, number, stream):
    """The outcome that a client finds in the journal as soon as it has the whole reply."""
    with dial(server) as client:
        client.sendall(request_bytes({**HI, "stream": stream, "seed": number},
                                     f"{CHAT_PATH}?{number}"))
        read_past(client, b"[DONE]") if stream else got_on(client)
    return [each.outcome for each in server.journal if each.path.endswith(f"?{number}")]


@both
@pytest.mark.parametrize("count, clients", [
    (100, 4), pytest.param(1000, 20, marks=pytest.mark.stress)])
def test_nothing_is_late_in_the_journal_nor_missing_on_the_tape(tape, count, clients, stream):
    with Server(lambda request: iter(["one ", "two ", "three"])) as first, \
            Server(Relay(first.base_url, record=str(tape))) as server:
        for each in (first, server):
            numbers = itertools.count()
            found = together(clients, lambda: [seen_after_the_end(each, next(numbers), stream)
                                               for _ in range(count // clients)])
            assert list(itertools.chain(*found)) == [["complete"]] * count
    recordings = [json.loads(line) for line in tape.read_bytes().splitlines()]
    assert sorted(each["request"]["body"]["seed"] for each in recordings) == list(range(count))
    assert all(("[DONE]" in each["writes"][-1][1]) == stream for each in recordings)


NEAREST = {  # what is asked, and what it is told
    "another value": ("two", {"temperature": 0.5, "seed": 5}, ("line 2", "seed", "4", "5")),
    "a field more": ("one", {"seed": 6}, ("line 1", "seed", "6")),
    "no null": ("three", {}, ("line 3", "a null or a boolean")),
}


@pytest.mark.parametrize("text, fields, words", rows(NEAREST))
def test_an_unknown_request_is_told_the_nearest_recording(tape, text, fields, words):
    recorded(tape, "one")
    recorded(tape, "two", temperature=0.5, seed=4)
    recorded(tape, "three", seed=None)
    with failing_at_its_end(Replay(str(tape)), AssertionError, words[1]) as server:
        got = chat(server, text, stream=True, **fields)
    assert got.status == 404 and all(word in got.error["message"] for word in words)


BROKEN_TAPES = {"cut": lambda line: line[:-20], "no JSON": lambda line: b"garbage\n",
                "another file": lambda line: b'{"hello": "you"}\n', "a list": lambda line: b"[]\n",
                "no status": lambda line: line.replace(b'"status"', b'"stat"'),
                "an odd status": lambda line: line.replace(b'"status":200', b'"status":1e999'),
                "an odd pause": lambda line: line.replace(b'"writes":[[', b'"writes":[["1 s",""],['),
                "an odd header": lambda line: line.replace(b'"headers":{', b'"headers":{"a b":"",')}


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
    recorded(tape, "x", backend=Script(Reply("a b c", delay=(0.1, 0.1))))
    first, *more = [pause for pause, _ in json.loads(tape.read_text())["writes"]]
    assert first >= 0.1 and sum(more) >= 0.1            # of 0.2: a busy machine reads late


FULL_DISK = program("""
import resource, openai_compat
sys.dont_write_bytecode = True          # it would be cut short as well
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
openai_compat.main(sys.argv[1:])""")


@posix
def test_a_full_disk_loses_no_reply_and_is_reported(tape):
    texts = ["short", "long " * 1000, "short again"]
    with Server() as first, Running("--upstream", first.base_url, "--record", str(tape),
                                    start=FULL_DISK) as server:
        assert [chat(server, text).text for text in texts] == texts
        status, said = server.end()
    assert status == 0 and len([line for line in said if str(tape) in line]) == 2
    with pytest.raises(ValueError, match="line 2"):
        Replay(str(tape))


# ----------------------------------------------------------------------------------
# The command line, as a process of its own, and what it prints.

MINE = """
import socket
from openai_compat import APIError

def backwards(request):
    if request["text"] == "coffee":
        raise APIError(418, "No coffee.", code="teapot")
    return request["text"][::-1]

def letters(text):
    return list(text)

def vectors(body):
    return {"data": [0.5], **(body or {})}

def held(request):
    yield "one"
    with socket.create_connection(("127.0.0.1", int(request["text"]))) as door:
        door.recv(1)
    yield "two"
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with somebody's backend and scripts, and a file that only looks like a program."""
    folder = tmp_path_factory.mktemp("work")
    for name, text in {"mine.py": MINE, "steps.json": '["from the script"]', "tape": "",
                       "broken.json": '["from the', "garbage": "neither script nor binary\n",
                       "faulty.py": "def fails(request): raise ValueError('by us')"}.items():
        (folder / name).write_text(text)
    (folder / "garbage").chmod(0o755)
    return str(folder)


@pytest.fixture(scope="module")
def flagged(workplace):
    """A server with many flags, which is started as its users do it."""
    flags = ("--backend mine:backwards --tokenizer mine:letters --model m --model b --lenient "
             "--quirk-header --cors https://page.example --max-body 900 --journal "
             "--route /embeddings=mine:vectors --route").split()
    with Running(*flags, "GET /x=mine:vectors", start=(sys.executable, SERVER),
                 cwd=workplace) as server:
        yield server


FLAGS = {   # a request, and what its reply has only with the flags above
    "--model":        ({"model": "x"}, "^404 .*model_not_found"),
    "--backend":      ({}, '"content":"iH"'),
    "its APIError":   ({"text": "coffee"}, "^418 .*No coffee.*teapot"),
    "--tokenizer":    ({}, '"completion_tokens":2'),
    "--lenient":      ({"messages": [tool_message("call_1")]}, "^200 "),
    "--quirk-header": ({"headers": {"X-Quirk": "html_502"}}, "^502 "),
    "--cors":         ({"headers": {"Origin": "https://page.example"}}, "^200 "),
    "--max-body":     ({"text": "x" * 900}, "^413 "),
    "--route":        ({"path": "/v1/embeddings"}, r'"data":\[0\.5\],"model":"m"'),
}


@pytest.mark.parametrize("fields, expected", rows(FLAGS))
def test_a_flag_has_its_effect(flagged, fields, expected):
    with Server() as without:
        shown = [f"{got.status} {got.body.decode()}" for got in (
            chat(each, **fields) for each in (without, flagged))]
    assert [bool(re.search(expected, each)) for each in shown] == [False, True]


def test_models_are_listed_in_order_and_get_routes_and_the_journal_are_there(flagged):
    assert listed(flagged) == ["m", "b"]
    assert [call(flagged, "GET", path).status for path in ("/x", "/journal")] == [200, 200]


def test_the_port_is_the_one_that_was_named_or_one_clear_line_and_no_journal_is_there_unasked():
    port = free_port()
    with Running(port=port) as server:
        assert server.server_address[1] == port and call(server, "GET", "/journal").status == 404
        done = finished(*MODULE, "--port", str(port))
    assert done.returncode == 1 and re.fullmatch(f".*{port}.*\n", done.stderr)


def test_a_missing_recording_is_asked_for_with_the_upstreams_key(tape):
    with Server(Script("once"), api_keys="up") as first:
        flags = ["--replay", str(tape), "--upstream", first.base_url, "--upstream-key", "up"]
        for _ in range(2):
            with Running(*flags) as server:
                assert chat(server).text == "once"


@posix
def test_at_once_lets_so_many_programs_run_and_a_second_signal_ends_them(gate):
    line = " ".join(map(shlex.quote, gate.program("gate()")))
    with Running("--command", line, "--at-once", "2") as server:
        with asking(server), asking(server), gate.arrival() as one, gate.arrival() as two:
            server.process.terminate()
            until(lambda: is_closed(server))
            server.process.terminate()
            assert ended(one) and ended(two) and server.process.wait(PATIENCE) == 0


def test_one_connection_too_many_is_a_503_and_a_quirk_is_in_every_reply():
    with Running("--max-connections", "1", "--quirk", "html_502") as server:
        with served(server) as kept:
            assert chat(server).status == 503
            kept.sendall(request_bytes())
            assert got_on(kept).status == 502


def test_a_request_has_to_arrive_in_time():
    with Running("--request-timeout", "0.1") as server, dial(server) as client:
        client.sendall(request_bytes()[:-5])
        assert got_on(client).status == 408


ADMITTED = {  # OPENAI_COMPAT_API_KEYS, flags, {a key that is tried: its status}, is it warned of
    "no key":          ("", [], {"any": 200}, False),
    "two":             ("sk-1, sk-2", [], {"sk-1": 200, "sk-2": 200, "sk-3": 401}, False),
    "beside a flag":   ("sk-1", ["--api-key", "k"], {"sk-1": 200, "k": 200, "x": 401}, False),
    "a comma too many": ("sk-1,", [], {"": 401}, False),
    "open to all":     ("", ["--host", "0.0.0.0"], {"any": 200}, True),
    "open with a key": ("", ["--host", "0.0.0.0", "--api-key", "k"], {"any": 401}, False),
}


@pytest.mark.parametrize("keys, flags, tried, warns", rows(ADMITTED))
def test_keys_come_from_flags_and_the_environment(keys, flags, tried, warns):
    with Running(*flags, env=environment(OPENAI_COMPAT_API_KEYS=keys)) as server:
        for key, status in tried.items():
            assert chat(server, headers={"Authorization": "Bearer " + key}).status == status
        place, warned = "0.0.0.0, port %d" % server.server_address[1], "".join(server.said[:-1])
    assert ("WARNING" in warned) == (place in warned) == warns


NO_EFFECT = "has no effect beside the other flags"
NOT_STARTED = {  # flags, and what the message says
    "--script no.json": "no.json", "--script broken.json": "broken.json",
    "--replay no.tape": "no.tape", "--replay broken.json": "line 1 of broken.json",
    "--backend nowhere:function": "nowhere", "--backend mine:nothing": "nothing",
    "--backend mine": "mine", "--tokenizer nowhere:function": "nowhere",
    "--command no-such-program": "no-such-program", "--command 'x": "command|quotation",
    "--command PYTHON --at-once 0": "at once",
    "--upstream gpu:8000": "gpu:8000", "--upstream http://h:port/v1": "port",
    "--upstream http://h/v1 --record no/tape": "no/tape",
    "--route /x=mine:nothing": "nothing", "--route /models=mine:backwards": "built-in",
    "--route /x": "cannot load", "--quirk quark": "quark", "--port 70000": "70000|port",
    "--host no.such.host.invalid": "no.such.host.invalid", "--delay -1": "--delay",
    "--request-timeout 0": "request_timeout", "--tls-cert no.pem --tls-key no.key": "no.pem",
    **dict.fromkeys(map(" ".join, itertools.combinations(
        ["--say x", "--script steps.json", "--command PYTHON", "--backend mine:backwards",
         "--replay tape"], 2)), NO_EFFECT), "--sya x": "--sya", "--": "no command",
    **{flag: f"{flag.split()[0]} {NO_EFFECT}" for flag in (
        "--at-once 2", "--pass /x", "--record tape", "--upstream-key k", "--tls-key no.key")},
    **{f"{first} {flag}": "bend" if "quirk" in flag else f"{flag.split()[0]} {NO_EFFECT}"
       for first in ("--upstream http://h/v1", "--replay tape")
       for flag in ("--delay 1", "--quirk bom", "--quirk-header", "--lenient", "--tokenizer a:b")},
    "--upstream http://h/v1 --replay tape --record tape": f"--record {NO_EFFECT}",
}


@pytest.mark.parametrize("flags", NOT_STARTED)
def test_what_cannot_start_or_has_no_effect_is_one_line(workplace, monkeypatch, capsys, flags):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(Server, "start", lambda *_: pytest.fail("it starts"))
    try:
        status = openai_compat.main(
            ["--port", "0", *flags.replace("PYTHON", sys.executable).split()])
    except SystemExit as error:
        status = error.code
    *usage, line = capsys.readouterr().err.splitlines()
    assert re.search(NOT_STARTED[flags], line)
    assert status == (2 if usage or NO_EFFECT in line else 1)
    assert usage == [] or usage[0].startswith("usage: ")


@pytest.mark.parametrize("flags", [["-OO"], ["-X", "dev", "-W", "error"]], ids=" ".join)
def test_it_runs_under_any_flags_of_python(flags):
    done = finished(sys.executable, *flags, SERVER, "--", *ASKING)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello!\n", "")
    for flag, printed in ("--help", "--upstream"), ("--version", openai_compat.__version__):
        assert printed in finished(sys.executable, *flags, SERVER, flag).stdout.split()


@posix
def test_the_log_has_a_line_for_each_exchange_and_delay_is_between_the_pieces():
    with Running("--say", "a b c d", "--delay", "0.05") as server:
        chat(server, stream=True)
        chat(server, path="/v1/nothing")
        first, second = sorted(server.end()[1], key=lambda line: "/v1/nothing" in line)
    told = re.search(r'127\.0\.0\.1 "POST %s" 200 complete, 7 events, (.*) s$' % CHAT_PATH, first)
    assert float(told[1]) >= 0.15 and "/v1/nothing" in second and "404" in second


@posix
@pytest.mark.parametrize("flags, closes", [([], True), (["--trace"], True), (["--trace"], False)],
                         ids=["log, reader gone", "trace, reader gone", "trace, pipe full"])
def test_serving_goes_on_when_nobody_reads_what_it_prints(flags, closes):
    with Running(*flags) as server, dial(server) as client:
        if closes:
            server.process.stderr.close()
        for _ in range(50):
            client.sendall(posted(json.dumps({"model": "m", "prompt": "word " * 300}).encode()))
            assert read_past(client, b"}}").startswith(b"HTTP/1.1 200")
        server.process.terminate()      # 120 is Python's own for what it could not flush
        assert server.process.wait(30) in ((0, 120) if closes else (0,))


log_and_trace = pytest.mark.parametrize("flags", [[], ["--trace"]], ids=["log", "trace"])


@posix
@log_and_trace
def test_nothing_that_a_client_sends_moves_the_cursor(flags):
    targets = ["/\x1b[2J", "/%1b[2J", "/a\tb", "/\u2028", "/ HTTP/1.1\r\nX\x1b[2J: y\r\nA: /"]
    with Running(*flags) as server:
        for line in ["G\x1bT / HTTP/1.1", *(f"GET {target} HTTP/1.1" for target in targets)]:
            with dial(server) as client:
                client.sendall(f"{line}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                read_to_end(client)
        _, said = server.end()
    assert len(said) > len(targets) and all(line.isprintable() for line in said)


@posix
@log_and_trace
def test_no_key_is_printed_also_if_it_arrives_in_pieces(flags):
    # No letter of these keys can be in the random ids that are printed, which are hexadecimal.
    with Running(*flags, "--api-key", "sk-right-ghijklmnop") as server:
        for key in "sk-right-ghijklmnop", "sk-wrong-ghijklmnop":
            for name, value in {"Authorization": f"Bearer {key}", "AUTHORIZATION": key,
                                "authorization": f"bearer  {key}", "API-Key": key}.items():
                chat(server, headers={name: value})
        talk(server, get(headers=b"Host: x\r\nAuthorization : Bearer sk-right-ghijklmnop\r\n"))
        with dial(server) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            for byte in request_bytes(headers={"Authorization": "Bearer sk-wrong-ghijklmnop"}):
                client.sendall(bytes([byte]))
            got_on(client)
        _, said = server.end()
    assert len(said) >= 9 and not re.search("ghij|mnop", "".join(said))
    assert len([line for line in said if "Authorization: ***" in line]) == 3 * len(flags)


def test_what_fails_outside_of_a_reply_is_logged(caplog):
    with Server() as server:
        server.trace = lambda *_: 1 / 0
        with dial(server) as client:
            client.sendall(LAST)
            assert ended(client)
    until(lambda: "A connection from" in caplog.text and "ZeroDivisionError" in caplog.text)


@posix
def test_the_trace_marks_events_transfer_chunks_and_connections_and_quiet_leaves_it_alone():
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
# A command beside the server, and the end of both.

VARIABLES = "OPENAI_BASE_URL OPENAI_API_BASE OPENAI_API_KEY NO_PROXY no_proxy".split()
SHOW = program("print(json.dumps({name: os.environ[name] for name in %r}))" % VARIABLES)


def environment_beside(*flags, **variables):
    words = [*MODULE, *flags, "--", *SHOW]
    return json.loads(finished(*words, env=environment(**variables)).stdout)


def test_a_command_finds_the_server_in_its_environment_and_nothing_is_left_at_its_end():
    port, host = free_port(), "127.0.0.5" if sys.platform == "linux" else "127.0.0.1"
    found = environment_beside("--port", str(port), "--host", host, NO_PROXY="intra.example",
                               no_proxy="other.example")
    assert found["OPENAI_API_BASE"] == found["OPENAI_BASE_URL"] == f"http://{host}:{port}/v1"
    hosts = {host, "127.0.0.1", "intra.example", "other.example"}
    assert hosts <= {*found["NO_PROXY"].split(",")}
    assert found["no_proxy"] == found["NO_PROXY"] and found["OPENAI_API_KEY"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port))


@pytest.mark.parametrize("flags, variables, key", [
    (["--api-key", "ours"], {"OPENAI_API_KEY": "theirs"}, "ours"),
    ([], {"OPENAI_API_KEY": "theirs"}, "theirs"), ([], {"OPENAI_COMPAT_API_KEYS": "a,b"}, "a")])
def test_a_command_gets_the_key_that_the_server_takes_on_any_port(flags, variables, key):
    found = environment_beside(*flags, **variables)
    assert found["OPENAI_API_KEY"] == key
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", found["OPENAI_BASE_URL"])


fast = pytest.mark.skipif(not openai_compat.FAST, reason="a device for speed is switched off")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/timerslack_ns"), reason="Linux alone")
SCHEDULE = ("print(sorted(os.sched_getaffinity(0)), "
            "open('/proc/self/timerslack_ns').read().strip())")
SCHEDULED = finished(*program(SCHEDULE)).stdout     # where nobody asked for anything else


def threads_of(process):
    """The ids of the threads of a process, without its first."""
    return [int(id) for id in os.listdir("/proc/%d/task" % process.pid) if int(id) != process.pid]


@linux
@fast
@pytest.mark.parametrize("flags, cores", [
    ([], 1), (["--say", "x"], 1), (["--backend", "mine:backwards"], os.cpu_count()),
    (["--command", "true"], os.cpu_count())])
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
def test_a_connection_that_waits_does_not_work():
    def states():
        stats = Path("/proc/%d/task" % server.process.pid).glob("*/stat")
        return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}
    with Running("--quiet") as server, served(server):
        until(lambda: states() == {"S"})


ASKING = [sys.executable, "-S", "-m", "client", "chat", "Hello!"]
FAILING_QUIETLY = program("""
import urllib.request, urllib.error
try:
    url, body = os.environ["OPENAI_BASE_URL"] + "/completions", b'{"prompt": "x", "model": "m"}'
    urllib.request.urlopen(url, body)
except urllib.error.HTTPError:
    pass
""")
SCRIPTED = ["--script", "steps.json"]
BESIDE = {  # rule: (flags, command, its status, what it prints, what is said of errors)
    "the status of a command is the status": ([], program("sys.exit(3)"), 3, "", ""),
    "a command has its own dashes": ([], program("print(sys.argv[1:])", "--", "--version"), 0,
                                     "['--', '--version']\n", ""),
    "a command that is not there is a 127": ([], ["no-such-command"], 127, "",
                                             ".*no-such-command.*"),
    "nor at that place": ([], ["./no-such-command"], 127, "", r".*\./no-such-command.*"),
    "a script that was followed is a 0": (SCRIPTED, ASKING, 0, "from the script\n", ""),
    "one that was not is a 1": (SCRIPTED, program(""), 1, "", ".*1 of 1 steps remain.*"),
    "unless the command has failed": (SCRIPTED, program("sys.exit(3)"), 3, "",
                                      ".*1 of 1 steps remain.*"),
    **({"as if there were no server": ([], program(SCHEDULE), 0, SCHEDULED, "")}
       if SCHEDULED else {}),
    "a failure of the backend is a 1": (["--backend", "faulty:fails"], FAILING_QUIETLY, 1, "",
                                        "(?s).*ValueError: by us.*"),
    "a request that the tape has not too": (["--replay", "tape"], FAILING_QUIETLY, 1, "",
                                            ".*The tape is empty.*"),
    **({} if os.name == "nt" else {
        "a trace is printed to its end": (["--trace"], ASKING, 0, "Hello!\n",
                                          r"(?s).*data: \[DONE\]\n.* 0\\r\\n"),
        "one that cannot be run is a 126": ([], ["./garbage"], 126, "", ".*garbage.*"),
        "a signal is 128 and its number": (
            [], program("os.kill(os.getpid(), signal.SIGTERM)"), 143, "", ""),
        "SIGKILL too": ([], program("os.kill(os.getpid(), signal.SIGKILL)"), 137, "", "")}),
}


@pytest.mark.parametrize("flags, words, status, printed, complained", rows(BESIDE))
def test_beside_a_command(workplace, flags, words, status, printed, complained):
    done = finished(*MODULE, *flags, "--", *words, cwd=workplace)
    assert (done.returncode, done.stdout) == (status, printed)
    assert re.fullmatch(complained + "\n" * bool(complained), done.stderr)


@posix
def test_a_status_is_known_where_sigchld_was_ignored():
    code = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nos.execv(sys.argv[1], sys.argv[1:])"
    assert finished(*program(code, *MODULE, "--", "false")).returncode == 1


COUNTING = """
got = []
def note(number, _):
    got.append(number)
    door.sendall(b"%d " % number)
for number in signal.SIGHUP, signal.SIGINT, signal.SIGTERM:
    signal.signal(number, note)
door = knock()
door.sendall(b"r")
while signal.SIGTERM not in got:
    signal.sigtimedwait([], 0.05) if hasattr(signal, "sigtimedwait") else signal.pause()
door.sendall(b"%d" % got.count(signal.SIGINT))
sys.exit(7)
"""


def count_beside(gate, redirect):
    """A line for the shell: the command line, with a command that counts its SIGINTs."""
    words = [*MODULE, "--", *gate.program(COUNTING)]
    return ["sh", "-c", f"exec {' '.join(map(shlex.quote, words))} {redirect}"]


@posix
@pytest.mark.parametrize("redirect", ["", "</dev/null", "<&-"], ids=["open", "a file", "closed"])
def test_a_command_hears_ctrl_c_on_a_terminal_once(gate, redirect):
    child, terminal = pytest.importorskip("pty").fork()
    if not child:
        os.execve("/bin/sh", count_beside(gate, redirect), environment())
    try:
        with gate.arrival() as door:
            assert door.recv(1) == b"r"
            os.write(terminal, b"\x03")
            assert door.recv(2) == b"2 "
            os.kill(child, signal.SIGTERM)      # is handled after the server's own SIGINT
            assert read_to_end(door) == b"15 1" and os.waitpid(child, 0)[1] == 7 << 8
    finally:
        os.close(terminal)


@posix
@pytest.mark.parametrize("redirect", ["</dev/null", "<&-"])
def test_a_signal_for_the_server_alone_reaches_the_command_but_not_ctrl_c(gate, redirect):
    process = subprocess.Popen(count_beside(gate, redirect), stderr=subprocess.PIPE,
                               start_new_session=True, env=environment())
    with process.stderr, gate.arrival() as door:
        assert door.recv(1) == b"r"
        for number in signal.SIGINT, signal.SIGHUP:
            process.send_signal(number)
        assert door.recv(2) == b"1 "
        process.terminate()
        assert read_to_end(door) == b"15 0"
        assert process.wait(PATIENCE) == 7 and process.stderr.read() == b""


@posix
@pytest.mark.parametrize("traps, serves", rows({
    "plain": ("", False), "nohup": ("trap '' HUP; ", True)}))
def test_a_hangup_ends_the_server_unless_it_was_ignored_at_the_start(traps, serves):
    with Running(start=["sh", "-c", f'{traps}exec "$0" "$@"', *MODULE]) as server:
        with served(server) as idle:
            server.process.send_signal(signal.SIGHUP)
            assert not serves or chat(server).status == 200
            assert server.end()[0] == 0 and ended(idle)


HELD = ["--backend", "mine:held"]


@contextlib.contextmanager
def held_reply(gate, workplace, tls=None, start=MODULE):
    """A server with a stream that is half told: (server, client, the door that holds it)."""
    flags = ["--tls-cert", tls[0], "--tls-key", tls[1]] if tls else []
    body = {"model": "m", "messages": user(str(gate.port)), "stream": True}
    with Running(*HELD, *flags, start=start, cwd=workplace) as server:
        with secured(server, tls) if tls else dial(server) as client:
            client.sendall(request_bytes(body))
            with gate.arrival() as door:
                read_past(client, b'"one"')
                yield server, client, door


@posix
@pytest.mark.parametrize("name, secure", [
    ("SIGTERM", False), ("SIGINT", False), ("SIGTERM", True)])
def test_a_signal_lets_running_replies_finish(gate, workplace, tls_files, name, secure):
    with held_reply(gate, workplace, secure and tls_files) as (server, client, door):
        assert server.base_url.startswith("https:" if secure else "http:")
        server.process.send_signal(getattr(signal, name))
        until(lambda: is_closed(server))
        door.close()
        assert b"[DONE]" in read_past(client, b"0\r\n\r\n")
        assert server.process.wait(PATIENCE) == 0


PATIENT = program("""
import openai_compat
openai_compat.close_server = lambda server, grace: server.close(10 ** 6)
openai_compat.main(sys.argv[1:])""")


@posix
def test_a_second_signal_cuts_them_and_a_third_does_no_harm(gate, workplace):
    with held_reply(gate, workplace, start=PATIENT) as (server, client, _):
        server.process.terminate()              # two at once could be one
        until(lambda: is_closed(server))
        server.process.send_signal(signal.SIGINT)
        assert b"[DONE]" not in read_to_end(client)
        server.process.send_signal(signal.SIGINT)
        status, said = server.end()
    assert status == 0 and "Traceback" not in "".join(said)


# ----------------------------------------------------------------------------------
# TLS.

def test_a_context_does_as_well_as_files_and_silent_clients_block_nobody(tls_files, certificate):
    with Server(tls=certificate[1]) as server, contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(dial(server))
        with secured(server, tls_files) as client:
            client.sendall(request_bytes())
            assert got_on(client).text == "Hello, world!"


def test_a_reply_that_ends_with_its_connection_is_known_to_be_whole(tls_files):
    context = ssl.create_default_context(cafile=tls_files[0])
    with Server(tls=tls_files) as server, dial(server) as plain, context.wrap_socket(
            plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False) as client:
        client.sendall(posted(b'{"model": "m", "prompt": "x", "stream": true}', version=b"1.0"))
        assert read_to_end(client).endswith(b"data: [DONE]\n\n")   # else an SSLEOFError


def test_only_tls_1_2_and_newer_are_spoken(tls_files):
    """What OpenSSL is configured to refuse is allowed here; Python 3.10 refuses it too."""
    def refusal(version):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(tls_files[0])
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        with dial(server) as plain:
            try:
                context.wrap_socket(plain, server_hostname="127.0.0.1").close()
            except ssl.SSLError as error:
                return error.reason
    with Running("--tls-cert", tls_files[0], "--tls-key", tls_files[1],
                 env=environment(OPENSSL_CONF=os.devnull)) as server:
        assert [refusal("TLSv1_2"), refusal("TLSv1_3")] == [None, None]
        assert [refusal("TLSv1"), refusal("TLSv1_1")] == ["TLSV1_ALERT_PROTOCOL_VERSION"] * 2


def test_late_clients_over_tls_are_closed_a_half_sent_request_with_a_408(tls_files):
    with Server(tls=tls_files, request_timeout=0.5) as server, dial(server) as silent:
        assert len(read_to_end(silent)) < 10            # at most an alert of TLS
        with secured(server, tls_files) as client:
            client.sendall(request_bytes()[:-5])
            assert got_on(client).status == 408


def test_a_handshake_that_fails_leaves_nothing_behind(tls_files):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Server(tls=tls_files) as server:
            for raw in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b""):
                with dial(server) as client, contextlib.suppress(OSError):     # a reset
                    client.sendall(raw)
                    half_close(client)
                    assert not read_to_end(client).startswith(b"HTTP")
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


def test_an_upstream_may_speak_tls_where_somebody_vouches_for_it(tls_files, monkeypatch):
    with Server(say("a", "b"), tls=tls_files) as first, Server(Relay(first.base_url)) as server:
        got = chat(server)
        assert got.status == 502 and "certificate" in got.error["message"].lower()
        monkeypatch.setenv("SSL_CERT_FILE", tls_files[0])
        assert chat(server, stream=True).text == chat(server).text == "ab"


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


@contextlib.contextmanager
def nginx_before(folder, *servers):
    """nginx before two servers; its ports take the place of the README's."""
    if not shutil.which("nginx"):
        pytest.skip("needs nginx")
    nginx = SimpleNamespace(server_address=("127.0.0.1", free_port()))
    site = re.sub(r"\b800([012])\b", lambda match: str(
        [nginx, *servers][int(match[1])].server_address[1]), FILES["openai_compat.conf"])
    (folder / "conf").write_text(NGINX % {"folder": folder, "site": site.replace(
        "listen ", "listen 127.0.0.1:")})
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "conf")],
                               stderr=subprocess.DEVNULL)
    try:
        until(lambda: not is_closed(nginx))
        yield nginx
    finally:
        process.terminate()
        process.wait()


@pytest.mark.system
def test_behind_nginx_events_come_at_once_and_a_process_may_end(tmp_path, workplace, gate):
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(Running(*HELD, cwd=workplace)) for _ in range(2))
        nginx = stack.enter_context(nginx_before(tmp_path, one, two))

        def refusals():
            return {chat(nginx, path="/v1/nothing").error["code"] for _ in range(4)}
        clients = [stack.enter_context(asking(nginx, str(gate.port), stream=True))
                   for _ in range(20)]
        doors = [gate.arrival() for _ in clients]
        for client in clients:
            read_past(client, b'"one"')         # while the backend waits at the gate
        one.process.kill()
        one.process.wait()
        for door in doors:
            door.close()
        whole = [b"[DONE]" in read_to_end(client) for client in clients]
        assert whole.count(True) == 10 and refusals() == {"unknown_url"}
        stack.enter_context(Running(*HELD, cwd=workplace, port=one.server_address[1]))
        two.end()
        assert refusals() == {"unknown_url"}    # from the one that was started again


# ==================================================================================
# THE PAGE, in a real browser (marker system)

# ----------------------------------------------------------------------------------
# Chromium, driven by chromedriver, whose protocol (W3C WebDriver) is JSON over HTTP.
# One browser serves all tests; each test has a new window and an empty log.

system = pytest.mark.system
MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
CHROMIUM_FLAGS = """headless no-sandbox disable-gpu disable-quic no-first-run disable-sync
                 disable-background-networking disable-component-update
                 disable-dev-shm-usage no-proxy-server""".split()
RELEASED, ENTER, TAB, SHIFT = "\ue000", "\ue007", "\ue004", "\ue008"


class Browser:
    """A headless Chromium with an empty profile; evil.example is an address of ours."""

    def __init__(self, profile):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], text=True,
                                       stdout=subprocess.PIPE, start_new_session=True)
        started = (re.search(r"started successfully on port (\d+)", line)
                   for line in self.driver.stdout)
        self.server_address = "127.0.0.1", int(next(filter(None, started))[1])
        options = {"binary": shutil.which("chromium"), "args": [
            *("--" + flag for flag in CHROMIUM_FLAGS), f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP evil.example 127.0.0.1"]}
        self.session = "/session"
        self.session += "/" + self("POST", "", capabilities={"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}})["sessionId"]

    def __call__(self, method, path, **body):
        got = call(self, method, self.session + path, body if method == "POST" else None)
        assert got.status == 200, got.body.decode().partition('"stacktrace"')[0]
        return json.loads(got.body)["value"]

    def cdp(self, command, **params):
        return self("POST", "/goog/cdp/execute", cmd=command, params=params)

    def close(self):
        with contextlib.suppress(OSError):
            self("DELETE", "")
        with contextlib.suppress(OSError):
            os.killpg(self.driver.pid, 9)       # whatever of its group is left
        self.driver.wait()
        self.driver.stdout.close()

    @contextlib.contextmanager
    def page_of(self, *backend, listed=True, **settings):
        """A server with its page open, and its model shown (or the lack of one)."""
        with Server(*backend, **settings) as server:
            self("POST", "/url", url=server.base_url[:-len("v1")])
            until(lambda: bool(self.value("model")) == listed)
            yield server

    def js(self, script, *args):
        return self("POST", "/execute/sync", script=script, args=list(args))

    def type(self, *words):
        """Type on the keyboard, at whatever has the focus; SHIFT holds for its word."""
        [element] = self("GET", "/element/active").values()
        self("POST", f"/element/{element}/value", text=RELEASED.join(words))

    def click(self, selector):
        [element] = self("POST", "/element", using="css selector", value=selector).values()
        self("POST", f"/element/{element}/click")

    def say(self, *messages):
        """Send messages, one after the other's reply."""
        for message in messages:
            self.js("document.getElementById('text').focus()")
            self.type(message, ENTER)
            until(self.is_idle)

    def is_idle(self):
        return self.js("return main.getAttribute('aria-busy')") == "false"

    def value(self, id):
        return self.js("return document.getElementById(arguments[0]).value", id)

    def fill(self, id, value):
        self.js("document.getElementById(arguments[0]).value = arguments[1]", id, value)

    def talk(self):
        """[(who, text)] of the lines of the conversation, and of the note below it."""
        return [tuple(pair) for pair in self.js(
            "return [...document.querySelectorAll('#talk p, #note:not(:empty)')].map("
            "line => [line.className || line.id, line.textContent])")]

    def wire(self):
        """[(seconds, what is new, the dim text, the whole)] of the lines of the wire."""
        return [tuple(line) for line in self.js("""
            return [...wire.querySelectorAll('details')].map(line => {
                const [time, ...news] = line.firstChild.childNodes, envelope = news.pop();
                return [time.textContent, news.map(node => node.textContent).join("").trim(),
                        envelope.textContent.trim(), line.lastChild.textContent];
            })""")]

    def violations(self):
        """What the policy of a page has stopped since this was last asked."""
        return [entry["message"] for entry in self("POST", "/se/log", type="browser")
                if "Security Policy" in entry["message"]
                or entry["source"] in ("security", "violation")]


@system
def test_chromium_and_chromedriver_are_installed():
    assert MISSING == [], f"the page is not tested: install {' and '.join(MISSING)}"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    if MISSING:         # the test above tells it once
        pytest.skip(f"needs {' and '.join(MISSING)}")
    with contextlib.closing(Browser(tmp_path_factory.mktemp("chromium"))) as browser:
        yield browser


@pytest.fixture(params=[pytest.param("chromium", marks=system)])
def browser(request):
    """The browser in a new window, with an empty log; its tests are of `make system`."""
    chromium = request.getfixturevalue("chromium")
    chromium("POST", "/window", handle=chromium("POST", "/window/new", type="window")["handle"])
    chromium.violations()
    yield chromium
    chromium("DELETE", "/window")
    chromium("POST", "/window", handle=chromium("GET", "/window/handles")[0])


def asked_of(server):
    """The exchanges about completions."""
    return [entry for entry in server.journal if entry.path == CHAT_PATH]


def test_the_page_is_short_and_safe_names_no_other_host_and_keeps_nothing_in_the_browser():
    lines = openai_compat.PAGE.splitlines()
    assert len(lines) <= 119 and max(map(len, lines)) <= 110
    assert not re.search("//[a-z]|@import|url\\(", openai_compat.PAGE)
    for word in """innerHTML outerHTML insertAdjacent document.write eval Function( srcdoc
                   Storage cookie indexedDB caches""".split():
        assert word not in openai_compat.PAGE


@pytest.mark.parametrize("quirk_header", [False, True])
def test_the_page_may_run_its_own_script_and_talk_to_its_server_and_no_more(quirk_header):
    with Server(quirk_header=quirk_header) as server:
        got, again = call(server, "GET", "/"), call(server, "GET", "/").body.decode()
        assert call(server, "GET", "/", headers={"Host": "evil.example"}).status == 403
    page, policy = got.body.decode(), got.headers["content-security-policy"]
    policy = dict(part.split(" ", 1) for part in policy.split("; "))
    [nonce] = {*re.findall('<(?:style|script) nonce="([0-9a-f]{32})">', page)}
    assert nonce not in again
    assert policy.pop("style-src") == policy.pop("script-src") == f"'nonce-{nonce}'"
    assert policy == {
        **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
        "connect-src": "'self'", "img-src": "data:"}
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r" (on\w+|style)=", page.partition("<script")[0])
    assert re.findall("<option>([^<]+)", page) == list(QUIRKS if quirk_header else ())


HTML = ('<b id="bold">bold</b><script>window.ran = 1</script>'
        '<img src="/health" onerror="window.ran = 2"></p></main>')
OSLO, ROME = (ToolCall("get_weather", {"city": city}, id=city) for city in ("Oslo", "Rome"))
IN_OSLO, IN_ROME = (
    (f"tool-call get_weather {city}", '{"city":"%s"}' % city) for city in ("Oslo", "Rome"))


@both
@pytest.mark.parametrize("said, shown", rows({
    "text": ("Grüße, 世界! 👋", [("assistant", "Grüße, 世界! 👋")]),
    "refusal": (Reply(refusal="I will not."), [("assistant refusal", "I will not.")]),
    "tool call": (OSLO, [IN_OSLO]), "tool calls": ([OSLO, ROME], [IN_OSLO, IN_ROME]),
    "both": (Reply("Wait.", tool_calls=[OSLO]), [("assistant", "Wait."), IN_OSLO]),
    **{quirk: (Reply(tool_calls=[OSLO, ROME], quirk=quirk), [IN_OSLO, IN_ROME])
       for quirk in ("missing_tool_index", "duplicate_tool_id")}}))
def test_a_reply_is_shown_and_its_text_goes_out_with_the_next_message(
        browser, said, shown, stream):
    with browser.page_of(Script(said, "Fine.")) as server:
        browser.click("#tool")
        if not stream:
            browser.click("#stream")
        browser.say("Hi", "And?")
        assert browser.talk() == [("user", "Hi"), *shown, ("user", "And?"), ("assistant", "Fine.")]
        first, second = asked_of(server)
        fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        assert first.body == {"model": "script", "messages": user("Hi"), "tool_choice": "required",
                              "tools": first.body["tools"], **fields}
        texts = [{"role": "assistant", "content": text} for who, text in shown
                 if who.startswith("assistant")]
        assert second.body["messages"] == [*user("Hi"), *texts, *user("And?")]
        assert {entry.path for entry in server.journal} == {"/", "/v1/models", CHAT_PATH}
        assert browser.violations() == []       # nothing is requested from elsewhere


def test_html_in_a_reply_does_not_run(browser):
    with browser.page_of():
        browser.say(HTML)
        assert browser.js("return [window.ran, document.images.length, document.scripts.length,"
                          "document.getElementById('bold')]") == [None, 0, 1, None]
        assert browser.talk() == [("user", HTML), ("assistant", HTML)]


LOST, BROKE_OFF = ("Failed to fetch", "network error"), "The reply broke off"
TOLD = {"no_finish": BROKE_OFF, "truncate": BROKE_OFF, "no_terminator": LOST, "reset": LOST,
        "html_502": "502: <", "error_event": "200: The server had an error",
        "bad_json": "200: An event is not JSON", "stall": "Stopped."}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_the_page_reads_a_reply_with_any_quirk_or_says_what_is_wrong(browser, quirk):
    with browser.page_of(say("Hé", "llo", " 👋"), quirk_header=True) as server:
        browser.fill("quirk", quirk)
        browser.type("Hi", ENTER)
        if quirk == "stall":
            until(lambda: ("assistant", "Hé") in browser.talk())
            browser.click("#stop")
        until(browser.is_idle)
        assert asked_of(server)[0].headers["x-quirk"] == quirk
        *rest, (who, text) = browser.talk()
        if quirk in TOLD:
            assert who == "note" and text.startswith(TOLD[quirk])
        else:
            assert (rest, who, text) == ([("user", "Hi")], "assistant", "Héllo 👋")


def test_a_server_that_is_gone_is_told_in_words(browser):
    with browser.page_of():
        pass
    browser.say("Anybody?")
    assert browser.talk()[-1][1].startswith(LOST)


@pytest.mark.parametrize("failure, note", [
    (APIError(429, "Too fast."), "429: Too fast."),
    (Reply(tool_calls=[OSLO], quirk="truncate@4"), BROKE_OFF)], ids=["refused", "cut"])
def test_a_failure_is_told_until_the_next_message(browser, failure, note):
    with browser.page_of(Script("One.", failure, "Better.")) as server:
        browser.say("a", "b")
        assert browser.talk()[-1][0] == "note" and browser.talk()[-1][1].startswith(note)
        browser.say("c")
        assert browser.talk()[-2:] == [("user", "c"), ("assistant", "Better.")]
        assert "note" not in [who for who, text in browser.talk()]
        sent = [message["content"] for message in asked_of(server)[2].body["messages"]]
        assert sent == ["a", "One.", "b", "c"]


def test_stop_lets_go_of_the_server_and_keeps_what_was_said(browser):
    with browser.page_of(Script(Reply("on and " * 10000, delay=0.01), "Fine.")) as server:
        browser.type("Go!", ENTER)
        until(lambda: len(browser.talk()) == 2)
        browser.click("#stop")
        until(browser.is_idle)
        [_, (_, said), note] = browser.talk()
        assert note == ("note", "Stopped.")
        until(lambda: asked_of(server)[0].outcome == "client left")
        browser.say("Again")
        assert browser.talk()[-2:] == [("user", "Again"), ("assistant", "Fine.")]
        assert asked_of(server)[1].body["messages"][1] == {"role": "assistant", "content": said}


def test_an_empty_page_says_what_to_try_and_new_empties_it(browser):
    hints = "return document.getElementById('hints').offsetHeight > 0"
    with browser.page_of(Script("One.", "Two.")) as server:
        assert browser.js(hints)
        assert browser.js("return getComputedStyle(quirk.parentNode).display") == "none"
        browser.say("a")
        assert not browser.js(hints)
        browser.click("#new")
        assert (browser.talk(), browser.wire(), browser.js(hints)) == ([], [], True)
        browser.say("b")
        assert asked_of(server)[1].body["messages"] == user("b")


def test_a_wrong_key_is_told_and_nothing_is_left_of_it_when_it_is_corrected(browser):
    def give(key):
        browser.fill("key", "")
        browser.click("#key")
        browser.type(key, TAB)

    with browser.page_of(api_keys="secret", listed=False):
        until(lambda: [text[:4] for who, text in browser.talk()] == ["401:"])
        give("wrong")
        until(lambda: ["Incorrect API key" in text for who, text in browser.talk()] == [True])
        browser.say("Hi")
        assert [who for who, text in browser.talk()] == ["user", "note"]
        give("secret")
        until(lambda: browser.value("model") == "echo")
        assert browser.talk() == [("user", "Hi")]
        browser.say("Ho")
        assert browser.talk() == [("user", "Hi"), ("user", "Ho"), ("assistant", "Ho")]
        assert "secret" not in browser.js("return document.body.textContent + location + "
                                          "Object.values({...localStorage, ...sessionStorage})")


def test_the_wire_shows_the_request_the_response_and_each_event(browser):
    with browser.page_of(api_keys="secret", quirk="comment", listed=False) as server:
        browser.click("#new")
        browser.fill("key", "secret")
        browser.fill("model", "m")
        browser.say("Hello, world!")
        lines, entry = browser.wire(), asked_of(server)[0]
    times, news, _, wholes = zip(*lines)
    assert news[:2] == ("request POST /v1/chat/completions", "response 200 OK")
    assert list(filter(None, news[2:])) == [
        'delta {"role":"assistant","content":"","refusal":null}', 'delta {"content":"Hello"}',
        'delta {"content":","}', 'delta {"content":" world"}', 'delta {"content":"!"}',
        "delta {} finish_reason stop", news[-3], "done [DONE]"]
    assert news[-3].startswith('usage {"prompt_tokens":')
    assert [dim for _, new, dim, _ in lines if not new] == [": comment"] * entry.events
    assert list(map(float, times)) == sorted(map(float, times))
    head, body = wholes[0].split("\n\n")
    assert head == "authorization: Bearer ***\ncontent-type: application/json"
    assert json.loads(body) == entry.body
    assert "content-type: text/event-stream" in wholes[1] and "x-request-id: req_" in wholes[1]
    assert all(dim.strip() == whole.strip() for _, _, dim, whole in lines)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_envelope_is_dim_in_the_light_and_in_the_dark_and_an_event_opens(browser, scheme):
    browser.cdp("Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}])
    with browser.page_of():
        browser.say("Hi")
        styles = browser.js("""return ['summary', 'span:last-child', 'b'].map(
            selector => getComputedStyle(wire.querySelector(selector))).map(
            ({color, opacity}) => [color, opacity])""")
        browser.js("wire.querySelector('summary').focus()")
        browser.click("summary") if scheme == "light" else browser.type(" ")
        assert browser.js("return wire.querySelector('[open] pre').offsetHeight > 0")
    ink, _, bold = [sum(map(int, re.findall(r"\d+", color)[:3])) for color, _ in styles]
    assert [float(opacity) < 1 for _, opacity in styles] == [False, True, False]
    assert ink < 200 and bold < 400 if scheme == "light" else ink > 500 and bold > 400


def test_a_long_stream_is_all_said_while_the_wire_keeps_its_end(browser):
    with browser.page_of(lambda request: ("word " for _ in range(20000))):
        browser.type("Go!", ENTER)
        until(browser.is_idle, seconds=120)
        assert browser.talk()[1][1] == "word " * 20000
        assert browser.js("return wire.lastChild.children.length") == 500
        news = [new for _, new, _, _ in browser.wire()]
        assert (news[3], news[-1]) == ("request POST /v1/chat/completions", "done [DONE]")
        assert browser.js("return [main, wire.parentNode].map(pane => pane.scrollTop)") == [0, 0]
        assert browser.js("return [talk, wire].every(pane => pane.getBoundingClientRect().bottom"
                          " <= pane.parentNode.getBoundingClientRect().bottom)")


def test_the_keyboard_alone_is_enough(browser):
    def focus():
        return browser.js("const at = document.activeElement; return at.id || at.tagName")

    with browser.page_of(quirk_header=True):
        assert focus() == "text"
        browser.type("one", SHIFT + ENTER, "two", ENTER)
        until(lambda: browser.talk() == [("user", "one\ntwo"), ("assistant", "one\ntwo")])
        until(browser.is_idle)
        order = []
        while "text" not in order:
            browser.type(TAB)
            order.append(focus())
            assert order[-1] == "BODY" or browser.js(
                "return getComputedStyle(document.activeElement).outlineStyle") != "none"
        summaries = browser.js("return wire.querySelectorAll('summary').length")
        assert [each for each in order if each != "BODY"] == [
            "send", "stop", "new", "ASIDE", *["SUMMARY"] * summaries,
            "model", "key", "stream", "tool", "quirk", "main", "text"]


def test_each_control_has_a_name_and_the_reply_is_announced(browser):
    with browser.page_of(quirk_header=True):
        nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    names = {node["name"]["value"] for node in nodes if node["role"]["value"] in (
        "textbox", "checkbox", "combobox", "button", "main", "complementary")}
    assert names == {"Model", "Key", "Stream", "Tool", "Quirk", "Message", "Send", "Stop",
                     "New", "Conversation", "Wire"}
    assert browser.js("return [talk.role, talk.ariaLive]") == ["log", "polite"]


@pytest.mark.parametrize("width", [320, 699, 1280])
def test_no_window_is_too_narrow(browser, width):
    browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=640,
                deviceScaleFactor=1, mobile=False)
    with browser.page_of(quirk_header=True):
        browser.say("x" * 400)
        browser.js("wire.querySelectorAll('details').forEach(line => { line.open = true; })")
        wide = browser.js("return [document.documentElement, main, wire.parentNode].map("
                          "element => element.scrollWidth - element.clientWidth)")
        left = browser.js("return wire.parentNode.getBoundingClientRect().left")
        assert wide == [0, 0, 0] and (left == 0) == (width <= 700)


STRANGER = b"""<!doctype html><title>A stranger</title><iframe name=frame></iframe><script>
const [url, found] = [location.hash.slice(1), []];
const body = '{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}';
const framed = load => new Promise(resolve => {
  document.querySelector("iframe").onload = resolve; load(); });
const post = more => fetch(url + "chat/completions", {method: "POST", body, ...more});
const attempts = [
  () => post({}), () => post({mode: "no-cors"}),
  () => post({headers: {"content-type": "application/json", authorization: "Bearer x"}}),
  () => fetch(url + "models"), () => fetch(url + "../journal"),
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
  for (const attempt of [...attempts, () => ({text: () => frame.document.body.innerText})])
    try { found.push(await (await attempt()).text()); } catch (error) { found.push(""); }
  window.found = found;
})();
</script>"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.example"])
def test_a_page_from_elsewhere_can_neither_read_nor_cause_a_reply(browser, host):
    asked = []
    with playing(reply(STRANGER, content_type="text/html", connection="close")) as (stranger, _):
        stranger = stranger.replace("127.0.0.1", "evil.example")
        with Server(lambda request: asked.append(request) or "secret") as server:
            browser("POST", "/url", url=f"{stranger}#http://{host}:{server.server_port}/v1/")
            until(lambda: browser.js("return !!window.found"))
            assert set(browser.js("return found")) == {""}
            posts = [entry for entry in server.journal if entry.method == "POST"]
            assert asked == [] and {entry.status for entry in posts} == {403}
            assert all(entry.events == 0 for entry in server.journal)
        if host != "evil.example":      # where the page itself would open, it opens in no frame
            assert any("frame-ancestors" in message for message in browser.violations())


# ==================================================================================
# THE SDKS OF OTHERS (marker interop), and every quirk against every client

# ----------------------------------------------------------------------------------
# The SDKs of others.  `make interop` makes an environment for each; a script runs in
# one as a program of its own, and what it prints is what the SDK understood.

interop = pytest.mark.interop
OLD, FIRST, ONE, NEW = SDKS = ["openai-0.28.1", "openai-1.0.0", "openai-1", "openai"]
each_sdk = pytest.mark.parametrize("sdk", [pytest.param(sdk, marks=interop) for sdk in SDKS])

PRELUDE_OF_OLD = """
import openai
openai.api_base, openai.api_key = os.environ["OPENAI_BASE_URL"], "any"
chat = openai.ChatCompletion.create
def complete(model, **fields): return openai.Completion.create(engine=model, **fields)
list_models, retrieve_model = openai.Model.list, openai.Model.retrieve
extra, Refused = dict, openai.error.OpenAIError
def plain(answer): return answer.to_dict_recursive()
def body_of(error): return json.loads(error.http_body)["error"]
def leave(stream): stream.close()
"""
PRELUDE_OF_NEW = """
import openai
client = openai.OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="any")
chat, complete = client.chat.completions.create, client.completions.create
list_models, retrieve_model = client.models.list, client.models.retrieve
def extra(**fields): return {"extra_body": fields}      # what 1.0.0 has no name for
Refused = openai.OpenAIError
def plain(answer): return answer.model_dump()
def body_of(error): return error.response.json()["error"]
def leave(stream): stream.response.close()
"""
ASK = """
import json, re, os, sys
ask = {"model": "m", "messages": [{"role": "user", "content": "Hello!"}]}
def content_of(chunk): return getattr(chunk.choices[0].delta, "content", None)
"""


def printed_by(command, base_url="", **options):
    """The lines that a program prints which finds the server in its environment."""
    found = environment(base_url, OPENAI_API_KEY="any", NO_PROXY="127.0.0.1")
    done = finished(*command, env=found, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def printed(sdk, script, base_url, *arguments):
    """The lines that a Python script prints in an environment that `make interop` has made."""
    python = HERE / ".venvs" / sdk / "bin" / "python"
    assert python.exists(), f"no .venvs/{sdk}: run `make interop`"
    return printed_by([str(python), "-X", "utf8", "-c", script, base_url, *arguments], base_url)


def said(sdk, script, server):
    """What a script prints that is written for all the generations of the SDK."""
    prelude = ASK + (PRELUDE_OF_OLD if sdk == OLD else PRELUDE_OF_NEW)
    return printed(sdk, prelude + script, server.base_url)


ADD = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}
CALLS = [ToolCall("add", {"a": 1}, id="call_1"), ToolCall("add", {"a": 2}, id="call_2")]
HELLO = say("Hello", " world", "!")
SLOW_DOWN = APIError(429, "Slow down.", headers={"retry-after-ms": "10", "retry-after": "0.01"})
NO_MONEY = APIError(429, "You are out of money.", code="insufficient_quota")

READS = {  # rule: since which SDK, backend (a list is a script), script, what it prints
    "a chat has its text, its reason and its usage": (OLD, HELLO, """
answer = chat(**ask)
print(answer.object, answer.choices[0].message.role, answer.choices[0].message.content)
print(answer.choices[0].finish_reason, answer.usage.completion_tokens, type(answer.created))
print(answer.usage.prompt_tokens + 3 == answer.usage.total_tokens)
""", ["chat.completion assistant Hello world!", "stop 3 <class 'int'>", "True"]),
    "a streamed chat comes piece by piece, its usage last, without choices": (OLD, HELLO, """
*chunks, last = chat(stream=True, **ask, **extra(stream_options={"include_usage": True}))
for chunk in chunks:
    print(chunk.object, repr(content_of(chunk)), chunk.choices[0].finish_reason)
print(last.choices, dict(last.usage)["completion_tokens"])
""", [f"chat.completion.chunk {piece!r} None" for piece in ("", "Hello", " world", "!")]
       + ["chat.completion.chunk None stop", "[] 3"]),
    "n choices are told apart by their index": (OLD, HELLO, """
texts = ["", ""]
for chunk in chat(stream=True, n=2, **ask):
    for choice in chunk.choices:
        texts[choice.index] += getattr(choice.delta, "content", None) or ""
print(texts, [choice.index for choice in chat(n=2, **ask).choices])
""", ["['Hello world!', 'Hello world!'] [0, 1]"]),
    "a completion obeys max_tokens and echo, a streamed one stop": (OLD, HELLO, """
answer = complete(model="m", prompt="Well:", max_tokens=2, temperature=0, echo=True)
print(answer.object, answer.choices[0].text, answer.choices[0].finish_reason)
for chunk in complete(model="m", prompt=["x"], stop="wor", stream=True):
    print(chunk.object, repr(chunk.choices[0].text), chunk.choices[0].finish_reason)
""", ["text_completion Well:Hello world length", "text_completion 'Hello' None",
      "text_completion ' ' None", "text_completion '' stop"]),
    "logprobs have their shape on both endpoints": (OLD, HELLO, """
chosen = complete(model="m", prompt="x", logprobs=2).choices[0].logprobs
print(chosen.tokens, len(chosen.token_logprobs), chosen.text_offset)
chosen = plain(chat(**ask, **extra(logprobs=True, top_logprobs=2)))["choices"][0]["logprobs"]
print([(token["token"], len(token["top_logprobs"])) for token in chosen["content"]])
""", ["['Hello', ' world', '!'] 3 [1, 6, 12]", "[('Hello', 2), (' world', 2), ('!', 2)]"]),
    "tool calls arrive whole, streamed ones are told apart by index": (OLD, always(CALLS), """
tools = extra(tools=[%r])
choice = plain(chat(**ask, **tools))["choices"][0]
print(choice["finish_reason"], choice["message"]["content"])
for call in choice["message"]["tool_calls"]:
    print(call["id"], call["type"], call["function"]["name"], call["function"]["arguments"])
ids, arguments = ["", ""], ["", ""]
for chunk in chat(stream=True, **ask, **tools):
    for call in plain(chunk)["choices"][0]["delta"].get("tool_calls") or []:
        ids[call["index"]] += call.get("id") or ""
        arguments[call["index"]] += call["function"]["arguments"]
print(*ids, *arguments, chunk.choices[0].finish_reason)
""" % ADD, ["tool_calls None", 'call_1 function add {"a":1}', 'call_2 function add {"a":2}',
            'call_1 call_2 {"a":1} {"a":2} tool_calls']),
    "a forced tool and a legacy function are called with arguments that fit": (OLD, echo, """
tool = %r
fields = extra(tools=[tool], tool_choice="required", parallel_tool_calls=False)
call, = plain(chat(**ask, **fields))["choices"][0]["message"]["tool_calls"]
print(call["function"]["name"], type(json.loads(call["function"]["arguments"])["a"]))
choice = chat(functions=[tool["function"]], function_call={"name": "add"}, **ask).choices[0]
call = choice.message.function_call
print(choice.finish_reason, call.name, type(json.loads(call.arguments)["a"]))
""" % ADD, ["add <class 'int'>", "function_call add <class 'int'>"]),
    "the models are listed and shown": (OLD, HELLO, """
print([model.id for model in list_models().data], retrieve_model("say").object)
""", ["['say'] model"]),
    "an error in mid stream raises": (OLD, always(Reply("Hello world!", quirk="error_event")), """
try: print(*[chunk.choices[0].delta.content for chunk in chat(stream=True, **ask)])
except Refused as error: print(type(error).__name__)
""", ["APIError"]),
    "a 429 is retried when the server says": (FIRST, [SLOW_DOWN, SLOW_DOWN, "Hello!"], """
print(chat(**ask).choices[0].message.content)
""", ["Hello!"]),
    "an empty account is not retried": (FIRST, [NO_MONEY], """
try: chat(**ask)
except Refused as error: print(type(error).__name__, body_of(error)["code"])
""", ["RateLimitError insufficient_quota"]),
    "the accumulating helper rebuilds text and calls": (
        ONE, always(Reply("Hello world!", tool_calls=CALLS)), """
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
""" % ADD, ["chunk content.delta content.done tool_calls.function.arguments.delta "
            "tool_calls.function.arguments.done",
            "Hello world! tool_calls", "[('call_1', {'a': 1}), ('call_2', {'a': 2})]"]),
    "a typed parse gets an instance of its model": (ONE, echo, """
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
""", ["Plan float list", "True", "Plan"]),
    "a parse cut short is a length error": (ONE, say('{"a": 1', "}"), """
from pydantic import BaseModel
class A(BaseModel): a: int
try: client.chat.completions.parse(response_format=A, max_tokens=1, **ask)
except openai.LengthFinishReasonError as error: print("length")
""", ["length"]),
}


@pytest.mark.parametrize("sdk, backend, script, lines", [
    pytest.param(sdk, *row, marks=interop, id=f"{rule}-{sdk}")
    for rule, (since, *row) in READS.items() for sdk in SDKS[SDKS.index(since):]])
def test_every_generation_reads_that(sdk, backend, script, lines):
    with Server(Script(*backend) if isinstance(backend, list) else backend) as server:
        assert said(sdk, script, server) == lines


EXCEPTIONS = {  # status: its exception in 0.28.1, since 1.0
    400: ("InvalidRequestError", "BadRequestError"), 404: ("InvalidRequestError", "NotFoundError"),
    401: ("AuthenticationError",) * 2, 403: ("PermissionError", "PermissionDeniedError"),
    422: ("APIError", "UnprocessableEntityError"), 429: ("RateLimitError",) * 2,
    500: ("APIError", "InternalServerError"),
    503: ("ServiceUnavailableError", "InternalServerError")}


@both
@each_sdk
def test_each_error_is_the_right_exception_and_names_its_cause(sdk, stream):
    errors = [APIError(status, "No.", code="c", param="p") for status in EXCEPTIONS]
    with Server(Script(*errors)) as server:
        assert said(sdk, """
if "client" in globals(): client.max_retries = 0
for _ in range(%d):
    try: print(next(iter(chat(stream=%s, **ask))))
    except Refused as error:
        print(type(error).__name__, body_of(error)["code"], body_of(error)["param"])
""" % (len(errors), stream), server) == [
            f"{names[sdk != OLD]} c p" for names in EXCEPTIONS.values()]
        assert [exchange.status for exchange in server.journal] == list(EXCEPTIONS)


@each_sdk
def test_pieces_arrive_while_the_backend_works_and_leaving_the_stream_early_ends_it(sdk):
    endless = Endless("x", pause=0)
    with Server(lambda request: endless(request) if request["text"] == "Hello!" else "") as server:
        assert said(sdk, """
stream = chat(stream=True, **ask)
chunks = iter(stream)
print([content_of(next(chunks)) for _ in range(3)])
leave(stream); del stream, chunks
print(chat(model="m", messages=[{"role": "user", "content": "Bye."}]).choices[0].finish_reason)
""", server) == ["['', 'x', 'x ']", "stop"]
        assert endless.closed.wait(PATIENCE)
    assert [exchange.outcome for exchange in server.journal] == ["client left", "complete"]


BY_HAND = '''
import json, requests, sys
chat = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "你好"}]}
for path, body in ("/v1/chat/completions", chat), ("/sse", chat), (
        "/v1/completions", {"model": "m", "stream": True, "prompt": "你好"}):
    url, headers = sys.argv[1][:-len("/v1")] + path, {"Authorization": "Bearer EMPTY"}
    response = requests.post(url, headers=headers, json=body, stream=True)
    found = (line.decode("utf-8").replace("data: ", "") for line in response.iter_lines() if line)
    choices = [json.loads(line)["choices"][0] for line in found if line != "[DONE]"]
    print(*[each.get("delta", {}).get("content") or each.get("text") for each in choices], sep="|")
'''


@interop
def test_requests_reads_as_the_reference_documents_do():
    with Server() as server:
        assert printed("requests", BY_HAND, server.base_url) == [
            "None|你|好|None", "None|你|好|None", "你|好|"]


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
TORTURE = {quirk: row for quirks, *row in (  # the official SDK, requests by hand, client.Client
    ("crlf split_bytes one_write no_done no_terminator", RIGHT, RIGHT, RIGHT),
    ("comment no_space", RIGHT, "JSONDecodeError", RIGHT),
    ("id_field retry_block empty_data", "JSONDecodeError", "JSONDecodeError", RIGHT),
    ("bom", NO_ROLE, "JSONDecodeError", RIGHT),
    ("no_role", NO_ROLE, NO_ROLE, RIGHT),
    ("role_every", ROLES, RIGHT, RIGHT),
    ("usage_always", RIGHT, "IndexError", RIGHT),
    ("missing_tool_index", "TypeError", "KeyError", RIGHT),
    ("duplicate_tool_id", REPEATED, REPEATED, RIGHT),
    ("no_finish", NO_REASON, NO_REASON, "StreamTruncated"),
    ("bad_json", "JSONDecodeError", "JSONDecodeError", "BadReply"),
    ("error_event", "APIError", "KeyError", "APIError"),
    ("truncate", CUT_SHORT, CUT_SHORT, "StreamTruncated"),
    ("stall", "APITimeoutError", "ConnectionError", "ConnectionFailed"),
    ("reset", "APIConnectionError", "ChunkedEncodingError", "StreamTruncated"),
    ("html_502", "InternalServerError", "JSONDecodeError", "APIError"),
) for quirk in quirks.split()}

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
    ours = client.Client(base_url, timeout=0.3 if quirk == "stall" else 30, max_retries=0)
    ours.headers["X-Quirk"] = quirk
    return client.fold(ours.chat_completions(**ask, stream=True))["choices"][0]
"""}
TORTURE_SCRIPT = r"""
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


@functools.lru_cache(None)
def tortured(reader):
    """{quirk: what a reader made of it}, each reader being run once."""
    script = ASK + "base_url, *quirks = sys.argv[1:]" + READERS[reader] + TORTURE_SCRIPT
    with Server(always(Reply("Hello big world", tool_calls=CALLS)), quirk_header=True) as server:
        if reader == "client":
            command = [sys.executable, "-c", script, server.base_url, *QUIRKS]
            return dict(zip(QUIRKS, printed_by(command, cwd=str(HERE))))
        return dict(zip(QUIRKS, printed(reader, script, server.base_url, *QUIRKS)))


@pytest.mark.parametrize("column, reader", [
    pytest.param(0, "openai", marks=interop), pytest.param(1, "requests", marks=interop),
    (2, "client")], ids=["openai", "requests", "client"])
@pytest.mark.parametrize("quirk", QUIRKS)
def test_of_each_quirk_a_client_makes_what_the_table_says(quirk, column, reader):
    assert tortured(reader)[quirk] == TORTURE[quirk][column]
    # The client of this house is right, or names the error.
    ours = TORTURE[quirk][2]
    assert ours == RIGHT or issubclass(getattr(client, ours), ClientError)


def test_the_readme_says_what_the_official_sdk_makes_of_broken_events():
    said = re.search(r"The newest official SDK raises(.*?)\n\n", README, re.DOTALL)[1]
    errors, silent = said.split("It is silent about")
    named = set(re.findall(r"`(\w+)`", errors))
    assert named == {quirk for quirk in QUIRKS if TORTURE[quirk][0] == "JSONDecodeError"}
    assert re.findall(r"`(\w+)`", silent) == [
        quirk for quirk in QUIRKS if TORTURE[quirk][0] == CUT_SHORT]


# ==================================================================================
# THE README: what it says is run

# ----------------------------------------------------------------------------------
# The blocks of the README.  A block after a paragraph that ends with a `file` and a colon
# is that file.  In a transcript … is what is left out: within a line any text, on a line
# of its own any lines.

README = (HERE / "README.md").read_text(encoding="utf-8")
HEAD, *REST = re.split(r"(?m)^## (.+)\n", README)
SECTIONS = dict(zip(REST[::2], REST[1::2]))
BLOCKS = [  # (section, language, text, the paragraph before it)
    (section, match[1], match[2], words[:match.start()].rstrip("\n").rpartition("\n\n")[2])
    for section, words in [("", HEAD), *SECTIONS.items()]
    for match in re.finditer(r"(?ms)^```(\w+)\n(.*?)^```$", words)]
FILES = {match[1]: text for _, _, text, before in BLOCKS for match in re.finditer(
    r"`(\w+\.\w+)`(?:, for\s`[^`]*`| of [\w ]+)?:$", before)}
TESTS = [text for _, language, text, _ in BLOCKS if language == "python" and "def test_" in text]
CONFTESTS = [text for _, _, text, _ in BLOCKS if "def server" in text and text not in TESTS]


def the_one(texts, containing):
    found, = [text for text in texts if containing in text]
    return found


def block(language, containing):
    """The text of the one block of a language in which something stands."""
    return the_one([text for _, kind, text, _ in BLOCKS if kind == language], containing)


AN_APPLICATION = block("python", "subprocess.Popen")
WITH_THE_CLIENT = block("python", "from client import Client, fold, pieces")
LESSON = block("console", "Serving")
CONSOLES = [(section, text) for section, language, text, _ in BLOCKS
            if language == "console" and text != LESSON]


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
        text = bytes(tokens).decode()
        return text, [i for i, character in enumerate(text) for _ in character.encode()]
''',
    "ranks.tiktoken": "".join("%s %d\n" % (base64.b64encode(bytes([i])).decode(), i)
                              for i in range(256)),
    # An agent, which the README leaves to its reader.
    "agent.py": '''
import json

def agent(client, question, tools):
    messages = [{"role": "user", "content": question}]
    while True:
        messages.append(client.chat_completions(messages)["choices"][0]["message"])
        if not messages[-1].get("tool_calls"):
            return messages[-1]["content"]
        for call in messages[-1]["tool_calls"]:
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
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply["choices"][0]["message"]["content"].encode())

HTTPServer(("127.0.0.1", int(os.environ["APP_PORT"])), Application).serve_forever()
''',
}
PROGRAMS = {
    "python3": 'exec "%s" -S "$@"' % sys.executable,
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
    """The environment of a newcomer at that desk, who has set nothing."""
    return environment(**{"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                          "PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8", **more})


def serving_at(desk, command="python3 openai_compat.py"):
    """The server that a command of the README starts, on a free port."""
    return Running(start=["bash", "-c", 'exec %s "$@"' % command, "bash"], cwd=str(desk),
                   env=surroundings(desk))


@pytest.fixture(scope="module")
def serving(desk):
    with serving_at(desk) as server:
        yield server


@pytest.fixture(scope="module")
def lesson(desk):
    (command, greeting), = transcript(LESSON)
    with serving_at(desk, command) as server:
        assert [greeting] == [line.replace(f":{server.server_address[1]}/", ":8000/")
                              for line in server.said]
        yield server


def run_commands(folder, commands, server):
    """(what it prints, its status) of each command, in one bash; 8000 becomes the
    server's port."""
    port, base_url = str(server.server_address[1]), server.base_url
    script = "\n".join("%s\nstatus=$?; echo; echo '<ended>' $status; (exit $status)" % command
                       for command in commands)
    done = finished("bash", input=script.replace("8000", port), stderr=subprocess.STDOUT,
                    cwd=str(folder), env=surroundings(folder, OPENAI_BASE_URL=base_url))
    printed = done.stdout.replace(":%s/" % port, ":8000/")
    parts = re.split(r"(?:(?<=\n)|(?<!\n)\n|\A)\n?<ended> (\d+)\n", printed)
    assert len(parts) == 2 * len(commands) + 1, printed
    printed = [text + "\n" * (text[-1:] not in ("", "\n")) for text in parts[::2]]
    return list(zip(printed, map(int, parts[1::2])))


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

SDK = HERE / ".venvs" / "openai" / "bin" / "python"
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
import contextlib, os, time, urllib.error, urllib.request, pytest

def ask(end=time.monotonic() + 60):
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError):    # it is still starting
            with urllib.request.urlopen(f"http://127.0.0.1:{os.environ['APP_PORT']}/") as reply:
                return reply.read().decode()

@pytest.mark.parametrize("text", ["Hello!", "Bye!", "And again."])
def test_the_application_is_told_once(server, app, text):
    server.backend = text
    assert ask() == text
    assert len(server.journal) == 1
'''
CASSETTE = '''
import os
from client import Client

def test_it_answers(server):
    assert os.environ["OPENAI_API_KEY"]         # the official SDK does not start without one
    reply = Client().chat_completions("Hi", model="m")
    assert reply["choices"][0]["message"]["content"] == "Hello!"
'''


def run_pytest(python, folder, *arguments, options=(), **more):
    """What pytest says about the tests of a folder; all of them must pass."""
    if python == sys.executable:        # whose plugins take half of the time
        more["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = finished(str(python), *options, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                    *arguments, cwd=str(folder), env=surroundings(folder, **more),
                    stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def put(folder, desk, **texts):
    """A folder with the desk's modules and these texts as further ones."""
    shutil.copytree(str(desk), str(folder))
    for name, text in texts.items():
        (folder / (name + ".py")).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("python", [
    sys.executable, pytest.param(SDK, marks=pytest.mark.interop)], ids=["alone", "official SDK"])
def test_the_recipes_of_the_readme_pass_and_each_test_has_a_server(python, desk, tmp_path):
    recipes = {f"test_{i}": text for i, text in enumerate(TESTS) if (python == SDK) == bool(
        re.search(r"(?m)^import .*\bopenai\b", text))}
    folder = put(tmp_path / "recipes", desk, test_it=ONE_SERVER_PER_TEST,
                 conftest=the_one(CONFTESTS, "Server() as server"), **recipes)
    of_each_quirk = sum(text.count("QUIRKS)") for text in recipes.values()) * (len(QUIRKS) - 1)
    assert run_pytest(python, folder, "-W", "error") == len(recipes) + of_each_quirk + 2
    assert len(recipes) >= 3


def test_the_conftest_for_an_application_that_is_a_process(desk, tmp_path):
    port = str(free_port())
    changed, = re.findall(r"`(.*?)` in the fixture above", README)
    text = the_one(CONFTESTS, "Server() as server").replace("Server()", changed) + AN_APPLICATION
    folder = put(tmp_path / "process", desk, conftest=text.replace("8765", port),
                 test_it=AN_APPLICATION_THAT_STAYS)
    assert run_pytest(sys.executable, folder, APP_PORT=str(free_port())) == 3


def test_the_cassette_of_the_readme_is_recorded_once_and_replayed(desk, tmp_path):
    with Server("Hello!", api_keys="sesame") as live:
        text = the_one(CONFTESTS, "Relay(").replace("https://api.openai.com/v1", live.base_url)
        folder = put(tmp_path / "cassette", desk, conftest=text, test_it=CASSETTE)
        (folder / "tape.jsonl").unlink(missing_ok=True)    # that of a transcript
        for _ in range(2):
            assert run_pytest(sys.executable, folder, RECORD="1", OPENAI_API_KEY="sesame") == 1
        assert len(live.journal) == 1
    (folder / "test_other.py").write_text(CASSETTE.replace('"Hi"', '"Ho"'))
    with pytest.raises(AssertionError, match="(?s)Replay: POST /chat/completions.*1 passed"):
        run_pytest(sys.executable, folder)


def test_the_mismatch_of_the_readme_is_what_is_said():
    script = Script(Reply("Hi!", expect={"messages": [{"content": "Hello"}], "temperature": 0}))
    with pytest.raises(AssertionError) as error, Server(script) as server:
        chat(server, "Help!", temperature=0)
    assert "`%s`" % error.value in SECTIONS["Expectations"]


def test_the_program_with_the_client_does_what_it_says(serving, capsys):
    text = WITH_THE_CLIENT.replace("8000", str(serving.server_address[1]))
    names = {"__name__": "readme"}
    exec(compile(text, "README.md", "exec"), names)
    assert capsys.readouterr().out == re.search(r"print\(.*# (.*)", text)[1]
    said = re.findall(r'^(\S.*?) +# (".*")$', text, re.MULTILINE)
    assert len(said) == 2
    for expression, value in said:
        assert eval(expression, names) == json.loads(value)


def test_the_tokenizer_of_the_readme_counts(desk):
    """With a stand-in for tiktoken; tiktoken itself was tried by hand."""
    with serving_at(desk, "python3 openai_compat.py --tokenizer counting:tokens") as server:
        got = chat(server, "Hallo 世界")
        assert got.text == "Hallo 世界"
        assert got.json["usage"]["prompt_tokens"] == len("Hallo 世界".encode())
        assert post(server, TEXT_PATH, {**PROMPT, "prompt": "世界", "max_tokens": 3}).text == "世"


def test_the_wrapper_of_the_readme_builds_a_template(desk):
    """With a stand-in for llama-cli that says its prompt."""
    command, = re.findall(r'--command "([^"]*wrapper.py)"', SECTIONS["In front of a model"])
    with serving_at(desk, "python3 openai_compat.py --command '%s'" % command) as server:
        parts = [{"type": "text", "text": "-x"}, {"type": "text", "text": "y"}]
        assert chat(server, messages=[
            {"role": "system", "content": "Be brief."}, *user(parts)]).text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n-xy<|im_end|>\n"
            "<|im_start|>assistant\n")
        assert "user\nHello, world!<" in post(server, TEXT_PATH, PROMPT).text


def test_a_script_is_followed_by_a_command_of_any_language(desk, serving):
    (printed, status), = run_commands(desk, [block("sh", "npm test").strip()], serving)
    *said, last = printed.strip().splitlines()
    assert (said[0], json.loads(said[1])["function"]["name"], last, status) == (
        "Hello!", "weather", "Take an umbrella.", 0), printed


# ----------------------------------------------------------------------------------
# The lesson, and deployment.

def test_the_solution_of_the_lesson_is_right_or_says_why_in_as_many_lines_as_it_says(desk):
    printed = finished(sys.executable, "torture.py", "careful", cwd=str(desk),
                       env=surroundings(desk)).stdout
    said = dict(line.split(None, 1) for line in printed.splitlines())
    errors = {quirk for quirk, verdict in said.items() if verdict != "right"}
    assert set(said) == set(QUIRKS) and "WRONG" not in printed
    assert errors == {quirk for quirk in QUIRKS if TORTURE[quirk][2] != RIGHT}
    assert "%d are right, %d say" % (len(said) - len(errors), len(errors)) in README
    lines = FILES["careful.py"].partition("def read")[2].count("\n")
    assert lines == 15 and "Fifteen lines are enough" in README


def test_the_service_file_starts_a_server_that_exists(desk):
    service = configparser.ConfigParser(interpolation=None, strict=True)
    service.optionxform = str
    service.read_string(FILES["openai_compat.service"])
    python, module, *flags = shlex.split(service["Service"]["ExecStart"])
    assert (python, module) == ("/usr/bin/python3", "openai_compat.py")
    flags = " ".join(map(shlex.quote, [*flags, "--host", "127.0.0.1"]))
    with serving_at(desk, f"python3 openai_compat.py {flags}") as server:
        assert "with python3;" in server.said[-1]


@pytest.mark.system
def test_the_certificate_of_the_readme_is_trusted_where_it_is_named(desk, serving):
    (printed, status), = run_commands(desk, [block("sh", "openssl").strip()], serving)
    assert printed.strip().splitlines()[-1] == "Hello!" and status == 0


# ----------------------------------------------------------------------------------
# Nothing is left out, and nothing is there that the program has not.

def table(heading):
    """{name: the other cells} of the table with this first heading; a row may name
    several things."""
    (rows,) = re.findall(r"(?m)^\| %s \|.*\n\|[-|]+\n((?:\|.*\n)+)" % re.escape(heading), README)
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]
    return {name: others for first, *others in cells for name in re.findall(r"`([^`]+)`", first)}


def arguments(function):
    return inspect.signature(function).parameters


MAKEFILE, SOURCE = ((HERE / name).read_text(encoding="utf-8")
                    for name in ("Makefile", "openai_compat.py"))
ENDPOINTS = [path if path in ("/", "/health", "/journal") else "/v1" + path
             for path in Server.ROUTES]
MENTIONED = {  # names, where each is mentioned, and how
    "each parameter": ([*KNOWN_FIELDS, "prompt"],
                       SECTIONS["Reference"], "`%s`"),
    "each endpoint": ([("POST " if path.endswith("completions") else "GET ")
                       + path.replace("/models/", "/models/{id}") for path in ENDPOINTS],
                      "\n".join(table("Endpoint")), "^%s$"),
    "each name of the module": (openai_compat.__all__, README, r"\b%s\b"),
    "each argument of a Relay or Replay": ({*arguments(Relay), *arguments(Replay)},
                                           " ".join(table("Argument")), r"\b%s\b"),
    "each argument of a Script": (arguments(Script), " ".join(table("Argument of `Script`")),
                                  r"\b%s\b"),
    "each argument of an error": (arguments(APIError), README, r"APIError\([^)]*\b%s\b"),
    "each argument of a call": (arguments(ToolCall), README, r"ToolCall\([^)]*\b%s\b"),
    "each argument of the client": ([f"Client{inspect.signature(client.Client)}"],
                                    SECTIONS["Client"], "`%s`"),
    "each error of the client": ([
        name for name in client.__all__ if isinstance(getattr(client, name), type)
        and issubclass(getattr(client, name), Exception)], SECTIONS["Client"], "`%s`"),
    "the make targets": (["test", "test-all", "interop", "system"], README, "`make %s`"),
    "in the Makefile each of them": (re.findall(r"`make ([a-z-]+)`", README), MAKEFILE, "^%s:"),
    "in the source each section that the lesson sends to": ([
        name for paragraph in re.findall(r"\*(Read .*?)\*", SECTIONS["A lesson"], re.DOTALL)
        for name in re.findall(r'"(.+?)"', paragraph)], SOURCE, r"^# %s\."),
}


@pytest.mark.parametrize("names, text, how", rows(MENTIONED))
def test_what_is_there_is_mentioned(names, text, how):
    assert names and [name for name in names if not re.search(
        how % re.escape(name), text, re.MULTILINE)] == []


def flags_of(module):
    said = finished(sys.executable, "-m", module, "--help").stdout
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*(?=[ \],\n])", said)) - {"--help", "-h"}


TABLES = {"`Server`": lambda: {*arguments(Server)}, "`Reply`": lambda: {*arguments(Reply)},
          "Quirk": lambda: {*QUIRKS}, "Field": lambda: {*ENTRY},
          "Flag": lambda: flags_of("openai_compat"), "Option": lambda: flags_of("client")}


@pytest.mark.parametrize("heading", TABLES)
def test_a_table_has_each_name_and_no_other(heading):
    names = TABLES[heading]()
    assert len(names) > 8 and {row.split()[0] for row in table(heading)} - {"bench"} == names


@pytest.mark.parametrize("function", [Server, Reply])
def test_a_table_has_the_defaults(function):
    rows = table(f"`{function.__name__}`")
    for name, parameter in arguments(function).items():
        shown = re.findall(r"`([^`]*)`", rows[name][0])
        if len(shown) == 1:
            value = getattr(parameter.default, "__name__", repr(parameter.default))
            assert shown[0] == value.replace("'", '"')


def test_the_table_of_quirks_says_which_of_them_bend_a_whole_reply():
    assert {quirk for quirk, cells in table("Quirk").items() if cells[1] != "no"} == {
        "stall", "reset", "html_502", "split_bytes"}


@pytest.mark.parametrize("kind, row", re.findall(
    r"^\| (obeyed|checked|accepted).*? \| (.*) \|$", SECTIONS["Reference"], re.MULTILINE))
def test_a_parameter_is_checked_where_the_readme_says_so(kind, row):
    with Server("x") as server:
        for name in re.findall(r"`(\w+)`", row):
            statuses = [post(server, path, {**body, name: {"": []}}).status
                        for path, body in ((CHAT_PATH, HI), (TEXT_PATH, PROMPT))]
            assert (400 in statuses) == (kind != "accepted"), (name, statuses)


def test_the_contents_are_the_headings_and_each_link_and_picture_leads_somewhere():
    contents = HEAD.partition("**Contents:**")[2]
    assert re.findall(r"\[([^]]+)\]\(#", contents) == list(SECTIONS)
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in SECTIONS}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= anchors
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures and all((HERE / picture).exists() for picture in pictures)


def test_each_block_of_the_readme_is_of_a_kind_that_is_run_and_a_recipe_is_short():
    recipes = [*TESTS, *CONFTESTS, AN_APPLICATION]
    for _, language, text, _ in BLOCKS:
        assert language in ("console", "sh") or text in [
            *FILES.values(), *recipes, WITH_THE_CLIENT], text
    assert len([text for _, language, text, _ in BLOCKS if language == "sh"]) == 2
    assert README.count("```") == 2 * len(BLOCKS)
    for text in [*recipes, *map(FILES.get, ("wrapper.py", "responding.py", "embedding.py"))]:
        assert len(re.findall(r"(?m)^(?!import |from ).*\S", text)) <= 12, text


def test_the_readme_has_short_lines_and_keeps_to_its_words():
    words = re.sub(r"(?ms)^```console\n.*?^```$", "", README)
    assert [line for line in words.splitlines() if len(line) > 110 and line[0] != "|"] == []
    barred = r"(?i)\b(?:payloads?|packets?|frames?|docker)\b|\t|/(?:work|tmp|root|home)/"
    assert re.findall(barred, README) == []


# ----------------------------------------------------------------------------------
# Somebody's application, written as its users write it, on the newest official SDK; its
# tests have nothing but this fixture.

APPLICATION = HERE / ".application"


@pytest.mark.interop
@pytest.mark.parametrize("python, arguments", [
    ([], ["-n", "4"]), (["-X", "dev", "-W", "error"], ["-W", "error"])], ids=["xdist", "dev"])
def test_an_application_is_tested_with_nothing_but_this_fixture(tmp_path, python, arguments):
    for name in ("travel.py", "test_travel.py", "conftest.py"):
        shutil.copy(str(APPLICATION / name), str(tmp_path))
    shutil.copy(openai_compat.__file__, str(tmp_path))
    assert run_pytest(SDK, tmp_path, *arguments, options=python) >= 40
