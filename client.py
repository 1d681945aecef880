#!/usr/bin/env python3
"""Ask any OpenAI-compatible server, with nothing but Python's standard library.

    python3 client.py chat "Hello!"              one question, the answer as it comes
    python3 client.py chat                       a conversation
    python3 client.py complete "Once upon a time" --max-tokens 20
    python3 client.py bench --requests 500       how much the server can take

or, in a program:

    from client import Client, pieces
    client = Client("http://127.0.0.1:8000/v1")
    for piece in pieces(client.chat_completions("Hello!", stream=True)):
        print(piece, end="", flush=True)

The file reads in the order in which an answer is read, the server's way backwards:

    response
        | reads              bytes, as they arrive
        | lines              bytes, cut at CR, LF or CRLF
    lines
        | events             Event: the text of one event's data lines
    events
        | chunks             dicts, up to [DONE]; an error event raises
    chunks ------ fold ------> completion, as if it had not been streamed
        | pieces             str: the text of the first choice
    pieces

Each stage is a generator over the one above it and can be used alone.

What it does not do: keep connections alive (urllib cannot), follow redirects,
reconnect to a stream that was cut, check a request before it is sent.
"""

import contextlib
import email.utils
import http.client
import itertools
import json
import os
import random
import socket
import ssl
import sys
import time
import urllib.parse
import urllib.request

__all__ = ["Client", "ClientError", "APIError", "ConnectionFailed", "StreamTruncated",
           "BadReply", "reads", "lines", "events", "chunks", "pieces", "fold"]


# ------------------------------------------------------------------------------------
# Errors. Whatever goes wrong between here and the server is one of these five; none of
# them ever holds the key. Only a caller's own mistake (a request that is not JSON, say)
# stays the TypeError or ValueError that it is.

class ClientError(Exception):
    """What all errors of this module are; by itself: the client is set up wrongly."""


class APIError(ClientError):
    """The server refused, with a status or with an error event in mid-stream.

    `status` (None for an error event), `message`, `type`, `code`, `param`: as in the
    API's envelope {"error": {...}}; `headers` of the reply, `request_id` among them;
    `kind`: status and code in a few words.
    """

    def __init__(self, status, message, type=None, code=None, param=None, headers=None):
        known = [str(part) for part in (status, code or type) if part]
        self.kind = " ".join(known) or "error event"
        super().__init__("%s: %s" % (self.kind, message))
        self.status, self.message = status, message
        self.type, self.code, self.param = type, code, param
        self.headers = headers if headers is not None else {}
        self.request_id = self.headers.get("x-request-id")


class ConnectionFailed(ClientError):
    """No answer: no connection, no trust in a certificate, or silence for too long.
    `passing` is False where it makes no sense to try again."""

    passing = True


class StreamTruncated(ClientError):
    """A stream ended before it was complete. `text` is the first choice's text so far
    (of a very long one the end, a million characters or more)."""

    def __init__(self, message, text=""):
        super().__init__(message)
        self.text = text


class BadReply(ClientError):
    """The server answered with something else than this protocol, a web page say."""


def error_in(body, status=None, headers=None):
    """The APIError that a JSON document describes, or None if it describes none.

    Known forms: {"error": {"message": ...}} (the API's own), {"error": "text"}, and
    flat: {"object": "error", "message": ...} or a message where the choices should be.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if not error and "choices" not in body:
        error = ("message" in body or body.get("object") == "error") and body
    if not error:
        return None
    if not isinstance(error, dict):
        error = {"message": error}
    message = error.get("message") or json.dumps(error)
    fields = (error.get(name) for name in ("type", "code", "param"))
    return APIError(status, str(message), *fields, headers=headers)


# ------------------------------------------------------------------------------------
# From bytes to events (WHATWG HTML, 9.2 "Server-sent events"). A line is cut out of the
# bytes before it is decoded: a read may end inside a character, a line never does, and
# str.splitlines would also cut at U+2028 and U+0085, which JSON texts may hold.

def reads(response, watch=None):
    """Yield the body of a response as it arrives; `watch` is called with each read.

    Never `for line in response`: that ends without a word when the connection is cut
    between two transfer chunks, and read1 does not. Raises ConnectionFailed for
    silence, StreamTruncated for a cut (ConnectionFailed if nothing had come yet).
    """
    broken = ConnectionFailed
    while True:
        try:
            block = response.read1(65536)
            if not block and getattr(response, "length", 0):  # less than was announced
                raise http.client.IncompleteRead(block, response.length)
        except socket.timeout as error:
            raise ConnectionFailed("the server fell silent in mid-reply") from error
        except (OSError, http.client.HTTPException) as error:
            raise broken("the connection was cut in mid-reply") from error
        if not block:
            return
        if watch:
            watch(block)
        yield block
        broken = StreamTruncated


def lines(reads):
    r"""Yield the lines of a byte stream without their ends.

    Example: [b"one\r", b"\ntw", b"o\rthree"] -> b"one", b"two", b"three"
    A CR ends its line at once, so that an event is never late by one byte; the LF that
    may follow is then dropped. A line is copied once, however many reads it spans.
    """
    begun, after_cr = bytearray(), False
    for block in reads:
        if after_cr and block.startswith(b"\n"):
            block = block[1:]
        elif not block:
            continue
        after_cr = block.endswith(b"\r")
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *whole, tail = block.split(b"\n")
        if whole and begun:
            whole[0] = bytes(begun + whole[0])
            begun = bytearray()
        yield from whole
        begun += tail
    if begun:
        yield bytes(begun)


def decoded(lines):
    """Yield lines as str, without their ends and without the byte order mark, of which
    one may open the stream. A byte that is no UTF-8 becomes U+FFFD, as in browsers."""
    mark = "\ufeff"
    for line in lines:
        if not isinstance(line, str):
            line = line.decode("utf-8", "replace")
        if mark:
            line, mark = line[line.startswith(mark):], ""
        yield line.rstrip("\r\n")


class Event(str):
    """The data lines of one event, joined with LF. `type` is what its `event:` line
    named; `whole` is False for a last event that has no blank line after it."""

    type = "message"
    whole = True


def events(lines):
    r"""Yield an Event (a str) for each event that has data lines.

    Example: [b"event: greeting", b"data: Hello,", b"data:world", b""]
             -> Event("Hello,\nworld") with type "greeting"
    `lines` may be bytes or str, with or without their ends: a list, a file, a response.
    `id` and `retry` are for clients that reconnect; comments and unknown fields are no
    one's. What the standard throws away, an event cut off by the end of the stream, is
    yielded with `whole` False: some servers forget the last blank line.
    """
    type, found = "", []
    for line in decoded(lines):
        name, _, value = line.partition(":")
        if name == "data":
            found.append(value[1:] if value.startswith(" ") else value)
        elif name == "event":
            type = value[1:] if value.startswith(" ") else value
        elif not line:
            if found:
                yield _event(found, type)
            type, found = "", []
    if found:
        yield _event(found, type, whole=False)


def _event(found, type, whole=True):
    event = Event("\n".join(found))
    if type:
        event.type = type
    if not whole:
        event.whole = False
    return event


# ------------------------------------------------------------------------------------
# From events to chunks, pieces and completions. Chunks stay the dicts of the wire.
# Servers differ in what they leave out, repeat or send as null, so everything read from
# a chunk is read through choices_of and delta_of, which know the ways to say nothing.

KEPT = 1 << 20  # characters of a reply that a StreamTruncated can give back


def choices_of(chunk):
    """The choices of a chunk: none when they are missing, null or nonsense."""
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        return ()
    for choice in choices:
        if not isinstance(choice, dict):
            return ()
    return choices


def delta_of(choice):
    """What a choice adds to its message: {} when that is missing or null."""
    delta = choice.get("delta")
    return delta if isinstance(delta, dict) else {}


def first_of(chunk):
    """The first choice, the one of index 0: {} when the chunk is about others."""
    for choice in choices_of(chunk):
        if not choice.get("index"):
            return choice
    return {}


def text_of(chunk):
    """The text that a chunk adds to the first choice, "" for none."""
    choice = first_of(chunk)
    text = delta_of(choice).get("content") or choice.get("text")
    return text if isinstance(text, str) else ""


def is_last(chunk):
    """Whether a choice ends here: finish_reason is neither missing nor null nor ""."""
    for choice in choices_of(chunk):
        if choice.get("finish_reason"):
            return True
    return False


def chunks(events):
    """Yield the chunk (a dict) that each event holds, up to [DONE].

    Events that say nothing (empty, null, {}) are passed over. Raises APIError for an
    error event, BadReply for one that is no JSON object, and StreamTruncated when the
    end comes with neither [DONE] nor a finish_reason: HTTP alone does not tell whether
    an answer that just stops is complete.
    """
    text, finished = "", False
    try:
        for event in events:
            chunk = _parsed(event)
            if chunk == "[DONE]":
                return
            if not chunk:
                continue
            _refuse_errors(chunk, getattr(event, "type", None))
            text += text_of(chunk)
            if len(text) > 2 * KEPT:
                text = text[-KEPT:]
            finished = finished or is_last(chunk)
            yield chunk
    except StreamTruncated as cut:
        cut.text = text
        raise
    if not finished:
        raise StreamTruncated("the stream ended before the answer was complete", text)


def _parsed(event):
    # What is no JSON comes back as text, [DONE] for one. Half an event is nothing: that
    # the stream was cut will be found out soon enough.
    try:
        return json.loads(event)
    except (ValueError, RecursionError):
        text = str(event).strip()
        return text if text == "[DONE]" or getattr(event, "whole", True) else None


def _refuse_errors(chunk, type):
    if type == "error":
        named = isinstance(chunk, dict) and "error" in chunk
        chunk = chunk if named else {"error": chunk}
    if not isinstance(chunk, dict):
        raise BadReply("an event holds no JSON object: %.60r" % (chunk,))
    error = error_in(chunk)
    if error:
        raise error


def pieces(chunks):
    """Yield the text of the first choice, piece by piece; close `chunks` at the end."""
    try:
        for chunk in chunks:
            piece = text_of(chunk)
            if piece:
                yield piece
    finally:  # a plain `for` passes no close() on, and a socket should not wait for GC
        if hasattr(chunks, "close"):
            chunks.close()


# What a delta says once; in a second delta it is a repetition. Other strings go on.
ONCE = {"role", "id", "type", "name", "object", "finish_reason"}


class _Text(list):
    """A text in pieces, joined once at the end: 20,000 joins would be quadratic."""


def fold(chunks):
    """Join the chunks of a stream into the completion (a dict) they would have been.

    Tool calls are merged by index (see _call_of for servers that send none), fields
    that the API does not know are kept, the usage is the last one sent.
    """
    completion, choices = {}, {}
    for chunk in chunks:
        for name, value in chunk.items():
            if completion.get(name) is None or name == "usage" and value:
                completion[name] = value
        for choice in choices_of(chunk):
            index = choice.get("index") or 0
            start = {"index": index, "logprobs": None, "finish_reason": None}
            _grow(choices.setdefault(index, start), choice)
    completion.pop("obfuscation", None)  # padding of a chunk's length, nothing else
    completion["choices"] = [_complete(choices[index]) for index in sorted(choices)]
    is_text = any("text" in choice for choice in completion["choices"])
    completion["object"] = "text_completion" if is_text else "chat.completion"
    return completion


def _grow(whole, part):
    for name, value in part.items():
        old = whole.get(name)
        if name == "tool_calls":
            _grow_calls(whole.setdefault(name, {}), value)
        elif isinstance(value, dict):
            whole[name] = old if isinstance(old, dict) else {}
            _grow(whole[name], value)
        elif isinstance(value, list):
            whole[name] = old if type(old) is list else []
            whole[name].extend(value)
        elif isinstance(value, str) and name not in ONCE:
            whole[name] = old if isinstance(old, _Text) else _Text()
            whole[name].append(value)
        elif not old:
            whole[name] = value or None if name in ONCE else value


def _grow_calls(calls, fragments):
    fragments = fragments if isinstance(fragments, list) else ()
    for position, fragment in enumerate(fragments):
        function = fragment.get("function") or {}
        if isinstance(function.get("arguments"), dict):
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            fragment = {**fragment, "function": {**function, "arguments": arguments}}
        _grow(calls.setdefault(_call_of(calls, fragment, position), {}), fragment)


def _call_of(calls, fragment, position):
    """Which call a fragment belongs to: the one of its index; without an index that of
    its id; without either the last one, unless its place in the list is further on."""
    if fragment.get("index") is not None:
        return fragment["index"]
    if not fragment.get("id"):
        return max(position, len(calls) - 1)
    same = [key for key, call in calls.items() if call.get("id") == fragment["id"]]
    return same[0] if same else len(calls)


def _complete(choice):
    choice = _joined(choice)
    if "text" in choice:
        return {"text": choice.pop("text"), **choice}
    message = {"role": "assistant", "content": None, "refusal": None}
    message.update(delta_of(choice))
    message["role"] = message["role"] or "assistant"
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [_complete_call(call) for call in calls.values()]
    choice.pop("delta", None)
    return {"index": choice.pop("index"), "message": message, **choice}


def _complete_call(call):
    call.pop("index", None)
    if "function" in call:  # a call without parameters has arguments too: {}
        call["function"]["arguments"] = call["function"].get("arguments") or "{}"
    call.setdefault("type", "function")
    return call


def _joined(whole):
    if isinstance(whole, _Text):
        return "".join(whole)
    if isinstance(whole, dict):
        return {name: _joined(value) for name, value in whole.items()}
    return whole


def unfold(completion):
    """The one chunk that says what a completion says, where a server cannot stream."""
    choices = [dict(choice) for choice in choices_of(completion)]
    for choice in choices:
        if "message" in choice:
            choice["delta"] = choice.pop("message")
    return {**completion, "choices": choices}


# ------------------------------------------------------------------------------------
# One request over the wire: urllib without its redirects and its errors. The opener has
# no HTTPErrorProcessor, so every status comes back as a plain response, and a redirect
# is never followed (urllib would turn the POST into a GET, and take the key along).

CONNECT = 10      # seconds to wait for a connection; an answer may take much longer
LOOPBACK = {"localhost", "::1", "0.0.0.0"}


class _Patience:
    def connect(self):
        patience, self.timeout = self.timeout, min(self.timeout, CONNECT)
        super().connect()
        self.sock.settimeout(patience)


class _HTTP(_Patience, http.client.HTTPConnection):
    pass


class _HTTPS(_Patience, http.client.HTTPSConnection):
    pass


class _Handler(urllib.request.HTTPHandler):
    def __init__(self, context):
        super().__init__()
        self.context = context

    def http_open(self, request):
        return self.do_open(_HTTP, request)

    def https_open(self, request):
        return self.do_open(_HTTPS, request, context=self.context)

    https_request = urllib.request.HTTPHandler.http_request


def opener(base, cafile=None):
    """An opener for the server at `base` (a split URL): TLS verified against `cafile`,
    else the system's authorities; proxies from the environment, not for loopback."""
    host = base.hostname
    local = host in LOOPBACK or host.startswith("127.") or host.endswith(".localhost")
    context = None
    if base.scheme == "https":
        context = ssl.create_default_context(cafile=cafile)
    director = urllib.request.OpenerDirector()
    director.add_handler(urllib.request.ProxyHandler({} if local else None))
    director.add_handler(_Handler(context))
    return director


def as_json(value, encoding="utf-8", **how):
    """JSON text that `encoding` can hold: characters as they are, escaped if they must
    be (a lone surrogate has no UTF-8, a Chinese sentence no Latin-1)."""
    text = json.dumps(value, ensure_ascii=False, **how)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, **how)
    return text


def refusal(status, reason, headers, body):
    """The APIError for a reply that is not 2xx. What is not JSON is told in few words:
    a proxy's web page says nothing to anyone on a terminal."""
    if 300 <= status < 400:
        reason = "the server redirects to %s, where nobody followed; ask there"
        return APIError(status, reason % headers.get("location"), headers=headers)
    text = body.decode("utf-8", "replace").strip()
    try:
        error = error_in(json.loads(text), status, headers)
    except (ValueError, RecursionError):
        error = None
    told = reason if text.startswith("<") else text[:200] or reason
    return error or APIError(status, told, headers=headers)


def retry_after(headers):
    """The seconds a server asks to wait, from retry-after-ms or Retry-After (RFC 9110,
    10.2.3: seconds or a date), or None."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1)):
        value = headers.get(name) or ""
        date = email.utils.parsedate_tz(value)
        try:
            return float(value) * unit
        except ValueError:
            if date:
                return email.utils.mktime_tz(date) - time.time()
    return None


def pause(error, retries):
    """How many seconds to wait before trying again after `error`, or None: do not.

    The official SDK's rules: a wait of more than two minutes is not worth it, then what
    the server itself says in x-should-retry, then the status; a quota that is used up
    does not come back, and a certificate does not get better.
    """
    asked = None
    if isinstance(error, APIError):
        asked = retry_after(error.headers)
        told = error.headers.get("x-should-retry")
        if asked is not None and asked > 120 or error.code == "insufficient_quota":
            return None
        passing = error.status in (408, 409, 429) or (error.status or 0) >= 500
        if told == "false" or not passing and told != "true":
            return None
    elif not error.passing:
        return None
    if asked is not None and asked > 0:
        return asked
    return min(0.5 * 2 ** retries, 8) * (1 - 0.25 * random.random())


# ------------------------------------------------------------------------------------
# The client: a method for each endpoint over one path to the wire. _open makes a call
# and lets only a 2xx pass, _retried tries again, _whole and _streamed read the answer.

def _setting(variable, given=None):
    return given or os.environ.get(variable, "").strip()  # an empty one is an unset one


def _checked_url(url):
    try:
        base = urllib.parse.urlsplit(url)
        good = base.scheme in ("http", "https") and base.hostname and base.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ClientError("%r is no base URL; one looks like http://host:8000/v1" % url)
    return base


def _checked_headers(headers):
    # Checked here since http.client's own complaint would show the value: the key.
    for name, value in headers.items():
        if not value.isascii() or not value.isprintable():
            raise ClientError("what is set for %s cannot be sent in a header" % name)
    return {name: value for name, value in headers.items() if value}


class Client:
    """A client of one OpenAI-compatible server.

    base_url     up to and with "/v1"; else OPENAI_BASE_URL, else 127.0.0.1:8000
    api_key      else OPENAI_API_KEY, else none is sent
    timeout      seconds for which the server may stay silent
    max_retries  after 408, 409, 429, 5xx and failed connections; never once a stream
                 has begun
    cafile       authorities (a PEM file) to trust instead of the system's
    watch        an attribute: None, or a function that gets the bytes of each answer
                 as they arrive

    One client may be used by many threads. OPENAI_ORG_ID and OPENAI_PROJECT_ID are sent
    along where they are set. Raises ClientError for settings that cannot be used.
    """

    def __init__(self, base_url=None, api_key=None, timeout=600, max_retries=2,
                 cafile=None):
        self.timeout, self.max_retries, self.watch = timeout, max_retries, None
        if not timeout > 0:
            raise ClientError("a timeout of %r seconds is none" % timeout)
        self.base = _checked_url(_setting("OPENAI_BASE_URL", base_url)
                                 or "http://127.0.0.1:8000/v1")
        self._key, self._first = _setting("OPENAI_API_KEY", api_key), None
        self.headers = _checked_headers({
            "Authorization": self._key and "Bearer " + self._key,
            "OpenAI-Organization": _setting("OPENAI_ORG_ID"),
            "OpenAI-Project": _setting("OPENAI_PROJECT_ID"),
            "User-Agent": "client.py"})
        try:
            self._opener = opener(self.base, cafile)
        except OSError as error:
            raise ClientError("cannot use %s: %s" % (cafile, error)) from error

    def chat_completions(self, messages, model=None, stream=False, **params):
        """Ask for a chat completion: a dict, or an iterator of chunks when streamed.

        `messages` is a list of dicts as in the API, or a str: one user message. `model`
        None takes the first that the server lists. `params` go out as they are. Closing
        the iterator closes the connection. Raises APIError, ConnectionFailed, BadReply;
        a stream, while it is read, StreamTruncated too.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        request = {"model": model or self.first_model(), "messages": messages, **params}
        return self._ask("/chat/completions", request, stream)

    def completions(self, prompt, model=None, stream=False, **params):
        """Ask for the completion of `prompt`, in any of the API's four forms; all else
        as in chat_completions."""
        request = {"model": model or self.first_model(), "prompt": prompt, **params}
        return self._ask("/completions", request, stream)

    def models(self):
        """The ids of the models that the server lists."""
        listed = self._retried(lambda: self._whole(self._open("/models")))
        listed = listed.get("data") or listed.get("models") or []
        return [model.get("id") or model.get("name") for model in listed]

    def first_model(self):
        """The id of the first model that the server lists; the server is asked once."""
        if not self._first:
            self._first = next(iter(self.models()), None)
        if not self._first:
            raise ClientError("the server lists no model: name one")
        return self._first

    def url(self, path):
        """The address of an endpoint; a query in the base URL stays at the end."""
        return self.base._replace(path=self.base.path.rstrip("/") + path).geturl()

    def _ask(self, path, request, stream):
        request["stream"] = bool(stream)
        if not stream:
            return self._retried(lambda: self._whole(self._open(path, request)))
        chunks = self._streamed(path, request)
        next(chunks)  # ask now, not at the first chunk; then close() has what to close
        return chunks

    def _streamed(self, path, request):
        response = self._retried(lambda: self._open(path, request))
        with contextlib.closing(response):
            yield
            yield from self._chunks(response)

    def _retried(self, attempt):
        for retries in itertools.count():
            try:
                return attempt()
            except (APIError, ConnectionFailed) as error:
                wait = pause(error, retries)
                if wait is None or retries >= self.max_retries:
                    raise
            time.sleep(wait)

    def _open(self, path, request=None):
        headers, body = self.headers, None
        if request is not None:
            headers = {**headers, "Content-Type": "application/json"}
            body = as_json(request, separators=(",", ":")).encode()
        call = urllib.request.Request(self.url(path), body, headers)
        try:
            response = self._opener.open(call, timeout=self.timeout)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise self._unreachable(error) from error
        if not 200 <= response.status < 300:
            raise self._refused(response)
        return response

    def _unreachable(self, error):
        reason = getattr(error, "reason", error)  # a URLError only wraps what happened
        if isinstance(reason, ssl.SSLCertVerificationError):
            failed = ConnectionFailed(
                "the certificate of %s cannot be trusted: %s; cafile (--cafile) names "
                "whom to trust" % (self.base.netloc, reason.verify_message))
            failed.passing = False
            return failed
        if isinstance(reason, socket.timeout):
            reason = "no answer in time"
        reason = getattr(reason, "strerror", None) or str(reason) or repr(reason)
        return ConnectionFailed("cannot reach %s: %s; is the server running?"
                                % (self.base.geturl(), reason))

    def _refused(self, response):
        with contextlib.closing(response):
            try:
                body = response.read(1 << 20)
            except (OSError, http.client.HTTPException):
                body = b""  # the status alone says enough
        if len(self._key) > 5:  # there are servers that repeat the key they refuse
            body = body.replace(self._key.encode(), b"(the key)")
        return refusal(response.status, response.reason, response.headers, body)

    def _whole(self, response):
        with contextlib.closing(response):
            try:
                body = b"".join(reads(response, self.watch))
            except StreamTruncated as cut:
                raise ConnectionFailed(str(cut)) from cut
        if body.startswith(b"data:"):  # a server that streams whether asked to or not
            return fold(chunks(events(lines([body]))))
        return self._document(response, body)

    def _chunks(self, response):
        body = reads(response, self.watch)
        start = next(body, b"")
        body = itertools.chain([start], body)
        if start.lstrip()[:1] in (b"{", b"<"):  # it cannot stream; it is a web page
            return [unfold(self._document(response, b"".join(body)))]
        return chunks(events(lines(body)))

    def _document(self, response, body):
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            kind = response.headers.get_content_type() if body else "an empty body"
            raise BadReply("the server answered with %s, not with JSON; is %s the "
                           "right address?" % (kind, self.base.geturl()))
        error = error_in(document, response.status, response.headers)
        if error:
            raise error
        return document


# ------------------------------------------------------------------------------------
# Showing an answer on standard output, and a request as a command for curl.

def answered(ask, request):
    """The chunks of an answer, be it streamed or not."""
    answer = ask(**request)
    if isinstance(answer, dict):
        yield unfold(answer)
    else:
        yield from answer


def show(chunks):
    """Print an answer as it comes: text and refusals, then the tool calls as JSON."""
    calls, end = [], ""
    try:
        for chunk in chunks:
            delta = delta_of(first_of(chunk))
            if delta.get("tool_calls") or delta.get("function_call"):
                calls.append(chunk)
            piece = text_of(chunk) or delta.get("refusal")
            if piece:
                sys.stdout.write(piece)
                sys.stdout.flush()
                end = "" if piece.endswith("\n") else "\n"
    finally:  # also after half an answer: what comes next begins a line
        sys.stdout.write(end)
    for choice in fold(calls)["choices"][:1]:
        message = choice["message"]
        for call in message.get("tool_calls") or [message.get("function_call")]:
            print_json(call)


def print_json(value, indent=None):
    print(as_json(value, sys.stdout.encoding, indent=indent), flush=True)


def curl(client, path, request=None):
    """The curl command that asks the same; the key only as $OPENAI_API_KEY."""
    import shlex
    words = ["curl", "-sS", "-N", shlex.quote(client.url(path))]
    for name, value in client.headers.items():
        if name == "Authorization":
            words.append('-H "Authorization: Bearer $OPENAI_API_KEY"')
        elif name != "User-Agent":
            words.append("-H " + shlex.quote("%s: %s" % (name, value)))
    if request is not None:
        body = as_json(request, sys.stdout.encoding)
        words += ["-H 'Content-Type: application/json'", "-d " + shlex.quote(body)]
    return " ".join(words[:3]) + " " + " \\\n  ".join(words[3:])


HINTS = {401: "--api-key or OPENAI_API_KEY gives the key",
         404: "`client.py models` lists what is there",
         429: "--retries lets it try longer"}


def complain(error):
    """One line on standard error: what went wrong and, where known, what to do."""
    hint = HINTS.get(getattr(error, "status", None))
    text = " ".join(str(error).split()) + (" (%s)" % hint if hint else "")
    print("client.py: " + text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------
# The conversation. The interface is stateless: all that was said goes out again with
# each question. A question that failed is taken back, so that it can be asked again.

class Conversation:
    """What is said on a terminal; a line that begins with / is a command:

      /system TEXT   what the model shall be (nothing: forget it)
      /model NAME    ask another model (nothing: list them)
      /reset         forget what was said
      /help          this
      /quit          leave, as Ctrl-D; Ctrl-C only stops an answer
    """

    def __init__(self, client, request):
        self.client, self.request, self.history = client, request, []
        self.system = [m for m in request.pop("messages") if m["role"] == "system"]

    def run(self):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing where it exists)
        print("/help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                return print()
            if line == "/quit":
                return None
            self.hear(line)

    def hear(self, line):
        try:
            if line.startswith("/"):
                self.obey(*line.partition(" ")[::2])
            elif line:
                self.ask(line)
        except KeyboardInterrupt:
            print()
        except ClientError as error:
            complain(error)

    def obey(self, command, text):
        if command == "/system":
            self.system = [{"role": "system", "content": text}] if text else []
        elif command == "/model" and text:
            self.request["model"] = text
        elif command == "/model":
            print(*self.client.models(), sep="\n")
        elif command == "/reset":
            self.history = []
        else:
            print(self.__doc__.rstrip())

    def ask(self, line):
        question, heard = {"role": "user", "content": line}, []
        self.request["messages"] = self.system + self.history + [question]
        chunks = answered(self.client.chat_completions, self.request)
        try:
            with contextlib.closing(chunks):
                show(_noted(chunks, heard))
        except KeyboardInterrupt:
            print()
        said = "".join(pieces(heard))
        if said:  # tool calls are only shown: nobody here could answer them
            self.history += [question, {"role": "assistant", "content": said}]


def _noted(chunks, heard):
    for chunk in chunks:
        heard.append(chunk)
        yield chunk


# ------------------------------------------------------------------------------------
# The load generator: threads that ask the same again and again, each time on a new
# connection. One process has one core's worth of Python, so it says when that was the
# limit; a real load generator (wrk, ab) takes far less of the machine for itself.

def bench(ask, request, requests, concurrency, progress=None):
    """Ask `requests` times, `concurrency` at a time; a dict of what was measured.

    Times are in seconds. Events are chunks; a reply that is not streamed is one.
    `progress` is called about five times a second with the exchanges so far.
    """
    import threading
    todo, done = iter(range(requests)), []
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                if next(todo, None) is None:
                    return
            done.append(_timed(ask, request))

    started, cpu = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # in short steps, so that Ctrl-C is heard
            thread.join(0.2)
            if progress:
                progress(done)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return _report(done, seconds, cpu / seconds, concurrency)


def _timed(ask, request):
    # -> (seconds from the start to each event, kind of the error or None)
    started, times = time.perf_counter(), []
    try:
        for _ in answered(ask, request):
            times.append(time.perf_counter() - started)
    except ClientError as error:
        return times, getattr(error, "kind", type(error).__name__)
    return times, None


def _report(done, seconds, cpu, concurrency):
    # The client falsifies what it measures when its core is full, and also when its own
    # work is a good part of each request, which with few at a time needs no full core.
    limit = cpu > 0.85 or cpu / concurrency > 0.2
    good = [times for times, error in done if not error]
    errors = [error for _, error in done if error]
    gaps = [after - before for times in good for before, after in zip(times, times[1:])]
    return {"requests": len(done), "completed": len(good), "seconds": seconds,
            "requests_per_second": len(good) / seconds,
            "events_per_second": sum(map(len, good)) / seconds,
            "first_event": _spread([times[0] for times in good if times]),
            "between_events": _spread(gaps),
            "errors": {error: errors.count(error) for error in sorted(set(errors))},
            "client_cpu": cpu, "client_is_the_limit": limit}


def _spread(values):
    # The nearest rank: a percentile is a value that was measured, not one in between.
    values, last = sorted(values), len(values) - 1
    at = {"median": 0.5, "p95": 0.95, "p99": 0.99} if values else {}
    return {name: values[round(part * last)] for name, part in at.items()}


def print_report(report):
    """Print what bench measured, for people; times in milliseconds."""
    print("requests      %(completed)d of %(requests)d completed in %(seconds).2f s"
          % report)
    print("requests/s    %(requests_per_second).1f" % report)
    print("events/s      %(events_per_second).0f" % report)
    for name, title in (("first_event", "first event"), ("between_events", "between")):
        times = ("%s %.2f ms" % (name, 1000 * t) for name, t in report[name].items())
        print("%-14s%s" % (title, "   ".join(times) or "-"))
    for error, count in report["errors"].items():
        print("%-14s%d x %s" % ("errors", count, error))
    print("%-14s%.0f%% of a core" % ("client's CPU", 100 * report["client_cpu"]))
    if report["client_is_the_limit"]:
        print("The client was the limit: the server may well be faster than this.")


# ------------------------------------------------------------------------------------
# The command line: a table of options, what becomes of them, and a function for each
# command, which returns the exit status (None is 0).

OPTIONS = (  # flag, default, what it takes (nothing: a switch), what it is
    ("--base-url", None, "URL", "the server, up to /v1; else OPENAI_BASE_URL"),
    ("--api-key", None, "KEY", "the key; else OPENAI_API_KEY, which ps does not show"),
    ("--config", None, "FILE", "INI file: [OpenAI] API_SECRET_KEY, MODEL, BASE_URL"),
    ("--cafile", None, "FILE", "authorities to trust, PEM; else SSL_CERT_FILE"),
    ("--timeout", 600, "SECONDS", "how long the server may stay silent"),
    ("--retries", None, "N", "how often to try again: 2, with bench 0"),
    ("--model", None, "NAME", "the model; else the first that the server lists"),
    ("--system", None, "TEXT", "a system message"),
    ("--max-tokens", None, "N", "the longest answer"),
    ("--temperature", None, "T", "0 is the same answer each time, 2 is wild"),
    ("--stop", [], "TEXT", "end the answer before this; may be repeated"),
    ("-p", [], "NAME=VALUE", "any parameter: JSON, else text; @FILE reads a file"),
    ("--no-stream", False, None, "let the answer come in one piece"),
    ("--json", False, None, "print the completion as one JSON document"),
    ("--raw", False, None, "print the bytes of the answer as they come"),
    ("--curl", False, None, "print the curl command that asks the same, do not ask"),
    ("--prompt", None, "TEXT", "the PROMPT"),
    ("--requests", 100, "N", "bench: how many in all"),
    ("--concurrency", 8, "N", "bench: how many at a time"),
)
KINDS = {"N": int, "SECONDS": float, "T": float}


class UsageError(Exception):
    """The command line asks for what makes no sense: exit status 2."""


def parsed(argv):
    """The parser and what it made of the arguments; options may stand anywhere."""
    import argparse
    parser = argparse.ArgumentParser(prog="client.py",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=COMMANDS, help="what to do")
    parser.add_argument("words", nargs="?", metavar="PROMPT",
                        help="- or a pipe: standard input; none: a conversation")
    for flag, default, takes, about in OPTIONS:
        if default is False:
            parser.add_argument(flag, action="store_true", help=about)
        else:
            parser.add_argument(flag, default=default, metavar=takes, help=about,
                                type=KINDS.get(takes),
                                action="append" if default == [] else "store")
    return parser, parser.parse_intermixed_args(argv)


def read_text(path):
    """The text of a file named on the command line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UsageError("%s: %s" % (path, error)) from error


def configured(path):
    """The base_url, api_key and model in an INI file, as far as it has them."""
    import configparser
    names = {"base_url": "BASE_URL", "api_key": "API_SECRET_KEY", "model": "MODEL"}
    parser = configparser.ConfigParser(interpolation=None)  # a key may hold a %
    try:
        parser.read_string(read_text(path))
        section = parser["OpenAI"]
    except (KeyError, configparser.Error):
        raise UsageError("%s: no INI file with a section [OpenAI]" % path) from None
    return {name: section.get(option) for name, option in names.items()}


def parameter(text):
    """One `-p name=value` as a pair: JSON where the value parses as JSON, else text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError("-p takes NAME=VALUE, not %s" % text)
    if value.startswith("@"):
        value = read_text(value[1:])
    try:
        return name, json.loads(value, parse_constant=str)
    except (ValueError, RecursionError):
        return name, value


def prompted(args):
    """The prompt: the argument, else standard input unless that is a terminal."""
    prompt = args.words if args.prompt is None else args.prompt
    if args.command != "bench" and (
            prompt == "-" or prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.buffer.read().decode("utf-8-sig", "replace").rstrip("\r\n")
        if not prompt:
            raise UsageError("nothing on standard input: give a PROMPT")
    return prompt


def requested(args, prompt):
    """The request that the arguments describe; `-p` has the last word."""
    request = {"model": args.model}
    if args.command == "complete":
        request["prompt"] = prompt
    else:
        said = (("system", args.system), ("user", prompt))
        request["messages"] = [{"role": role, "content": text} for role, text in said
                               if text is not None]
    request["stream"] = not args.no_stream
    for name in ("max_tokens", "temperature", "stop"):
        if getattr(args, name) not in (None, []):
            request[name] = getattr(args, name)
    if args.json and request["stream"] and args.command != "bench":
        request["stream_options"] = {"include_usage": True}
    return {**request, **args.p}


def ask(client, args):
    """`chat` and `complete`: one question, or a conversation on a terminal."""
    chatting = args.command == "chat"
    path, name = (("/chat/completions", "messages") if chatting
                  else ("/completions", "prompt"))
    prompt = None if name in args.p else prompted(args)
    request = requested(args, prompt)
    if prompt is None and name not in args.p:
        if not chatting or args.json or args.raw or args.curl:
            raise UsageError("nothing to ask: give a PROMPT")
        return Conversation(client, request).run()
    request["model"] = request["model"] or client.first_model()
    if args.curl:
        return print(curl(client, path, request))
    client.watch = emit if args.raw else None
    asking = client.chat_completions if chatting else client.completions
    with contextlib.closing(answered(asking, request)) as chunks:
        if args.json:
            print_json(fold(chunks), indent=2)
        elif args.raw:
            for _ in chunks:
                pass
        else:
            show(chunks)


def emit(block):
    sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()


def models(client, args):
    if args.curl:
        return print(curl(client, "/models"))
    client.watch = emit if args.raw else None
    names = client.models()
    if args.json:
        print_json(names, indent=2)
    elif not args.raw:
        print(*names, sep="\n")


def load(client, args):
    if args.requests < 1 or args.concurrency < 1:
        raise UsageError("bench needs at least one request at a time")
    client.max_retries = args.retries or 0  # an error is to be counted, not hidden
    request = requested(args, prompted(args) or "Hello!")
    request["model"] = request["model"] or client.first_model()
    report = bench(client.chat_completions, request, args.requests, args.concurrency,
                   print_progress if sys.stderr.isatty() else None)
    if args.json:
        print_json(report, indent=2)
    else:
        print_report(report)
    return 0 if report["completed"] else 1


def print_progress(done):
    failed = sum(1 for _, error in done if error)
    sys.stderr.write("%d done, %d failed\r" % (len(done), failed))
    sys.stderr.flush()


COMMANDS = {"chat": ask, "complete": ask, "models": models, "bench": load}


def run(args):
    """Do what the arguments say, and --config where they say nothing."""
    args.p = dict(map(parameter, args.p))
    for name, value in (configured(args.config) if args.config else {}).items():
        setattr(args, name, getattr(args, name) or value)
    retries = 2 if args.retries is None else args.retries
    try:
        client = Client(args.base_url, args.api_key, args.timeout, retries, args.cafile)
    except ClientError as error:
        raise UsageError(str(error)) from error
    return COMMANDS[args.command](client, args)


def main(argv=None):
    """Run the command line; the exit status: 1 refused or unreachable, 2 usage, 130."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # not every terminal knows UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser, args = parsed(argv)
    if not args.command:
        return parser.print_help()
    try:
        status = run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; the last flush is mute too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ClientError, OSError) as error:
        complain(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
