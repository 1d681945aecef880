#!/usr/bin/env python3
r"""Ask any OpenAI-compatible server, with Python 3.8 or later and nothing else.

    python3 client.py chat "Hello!"              one question, the reply as it comes
    python3 client.py chat                       a conversation
    git diff | python3 client.py chat "Write a commit message" -
    python3 client.py complete "Once upon a time" --max-tokens 20
    python3 client.py bench --requests 500       how much load the server can take

or, in a program:

    from client import Client, pieces
    client = Client("http://127.0.0.1:8000/v1")
    for piece in pieces(client.chat_completions("Hello!", stream=True)):
        print(piece, end="", flush=True)

The file reads in the order in which a reply is read:

    response
        | reads              bytes, as they arrive
        | lines              bytes, cut at CR, LF or CRLF
        | events             Event: the text of one event's data lines
        | chunks             dicts, up to [DONE]; an error event raises
    chunks ------ fold ------> completion, as if it had not been streamed
        | pieces             str: the text of the first choice

Each stage is a generator over the one above it and can be used alone. This is a whole
reply, as two reads from the connection, and what the stages make of it:

    >>> body = [b'data: {"id":"c1","choices":[{"delta":{"content":"Hi!"}}]}\n\nda',
    ...         b'ta: {"choices":[{"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n']
    >>> print(*events(lines(body)), sep="\n")
    {"id":"c1","choices":[{"delta":{"content":"Hi!"}}]}
    {"choices":[{"finish_reason":"stop"}]}
    [DONE]
    >>> list(pieces(chunks(events(lines(body)))))
    ['Hi!']
    >>> completion = fold(chunks(events(lines(body))))
    >>> completion["choices"][0]["message"]
    {'role': 'assistant', 'content': 'Hi!', 'refusal': None}
    >>> completion["choices"][0]["finish_reason"]
    'stop'

What it does not do: keep connections alive (urllib cannot), follow redirects,
reconnect to a stream that was cut, check a request before it is sent.
"""

import collections
import contextlib
import http.client
import itertools
import json
import math
import os
import random
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from email.utils import mktime_tz, parsedate_tz

__all__ = ["Client", "ClientError", "APIError", "ConnectionFailed", "StreamTruncated",
           "BadReply", "reads", "lines", "events", "chunks", "pieces", "fold"]


# ------------------------------------------------------------------------------------
# Errors. Whatever goes wrong between here and the server is one of these five. A
# caller's own mistake (a request that is not JSON) stays the TypeError or ValueError
# that it is. What a server says may end up on a terminal or in a log: an error's texts
# hold no control characters, and Client takes its secrets out of each error it raises.

# Control characters, bidirectional formatting characters and lone surrogates. Tab and
# line feed are allowed.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e"
                      "\u2066-\u2069\ud800-\udfff]")


class ClientError(Exception):
    """The base of all errors here; raised itself when the client is set up wrongly.
    `message` says what went wrong; `headers` are those of the response, if there was
    one; `retryable` is True where Client itself tries again, if nothing of the reply
    was handed on; `code` is the API's, of an APIError; `text` is what came of a stream
    that was cut or fell silent."""

    headers, retryable, code, text = {}, False, None, ""

    def __init__(self, message):
        self.message = str(_printable(message))
        super().__init__(self.message)


class APIError(ClientError):
    """The server refused: with a status, or with an error event in a stream.

    `message`, `type`, `code` and `param` are those of the API's envelope
    {"error": {...}}. `status` is the response's, or the `code` of an error that came
    with status 200, if that is one (400 to 599), else None. `request_id` is one of the
    headers. `kind` is status and code in a few words: "404 model_not_found".
    """

    def __init__(self, status, message, type=None, code=None, param=None, headers=None):
        super().__init__(message)
        self.args = status, self.message  # pickle makes the error again from these
        self.status, self.headers = status, {} if headers is None else headers
        self.type, self.code, self.param = map(_printable, (type, code, param))
        self.request_id = self.headers.get("x-request-id")
        self.retryable = status in (408, 409, 429) or (status or 0) >= 500
        words = [str(word) for word in (status, self.code or self.type) if word]
        self.kind = " ".join(dict.fromkeys(words)) or "error"

    def __str__(self):
        return f"{self.kind}: {self.message}"


class ConnectionFailed(ClientError):
    """No response: no connection, no trust in a certificate, or a timeout, which may
    come in the middle of a stream."""

    retryable = True


class StreamTruncated(ClientError):
    """A stream ended before it was complete. `text` is the first choice's text so far
    (of a very long one the end, a million characters or more)."""


class BadReply(ClientError):
    """The server sent something that is not this protocol, a web page for example."""


def _printable(value):
    r"""What a server sent, as text without control characters: ESC, which begins the
    escape sequences of terminals, becomes the four characters \x1b. All but the
    first 100,000 characters are left out. Numbers and None stay.

    Example:
        >>> print(_printable("\x1b[2J"), _printable({"a": 1}), _printable(None))
        \x1b[2J {"a": 1} None
    """
    if value is None or isinstance(value, (int, float)):
        return value
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(),
                        _text_or_json(value)[:100_000])


def _text_or_json(value):
    return value if isinstance(value, str) else _as_json(value)


def _as_json(value, encoding="utf-8", too_deep=BadReply, **how):
    """JSON text that `encoding` can hold: characters as they are, escaped where they
    must be (a lone surrogate has no UTF-8, a Chinese sentence no Latin-1). Raises
    `too_deep` for a value that is nested too deeply."""
    try:
        text = json.dumps(value, ensure_ascii=False, **how)
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, **how)
    except RecursionError:
        raise too_deep("the JSON is nested too deeply") from None
    return text


# ------------------------------------------------------------------------------------
# From bytes to events (WHATWG HTML, 9.2 "Server-sent events"). A line is cut out of the
# bytes before it is decoded: a read may end inside a character, a line never does, and
# str.splitlines would also cut at U+2028 and U+0085, which JSON texts may hold.

def reads(response, watch=lambda block: None):
    r"""Yield the body of a response as it arrives; `watch` is called with each read.

    Never `for line in response`: that ends without an error when the connection is cut
    between two transfer chunks, and read1 does not. Raises ConnectionFailed for a
    timeout and for a body that is cut before its first byte, StreamTruncated for one
    that is cut later.

    Example:
        >>> import io
        >>> list(reads(io.BytesIO(b"data: [DONE]\n\n")))
        [b'data: [DONE]\n\n']
    """
    cut_error = ConnectionFailed
    while True:
        try:
            block = response.read1(65536)
            if not block and getattr(response, "length", 0):  # less than was announced
                raise http.client.IncompleteRead(block, response.length)
        except socket.timeout as error:
            raise ConnectionFailed("the server fell silent in mid-reply") from error
        except (OSError, http.client.HTTPException) as error:
            raise cut_error("the connection was cut in mid-reply") from error
        if not block:
            return
        watch(block)
        yield block
        cut_error = StreamTruncated


def lines(reads):
    r"""Yield the lines of a byte stream without their ends.

    A CR ends its line at once, so that an event is never late by one byte; the LF that
    may follow is then dropped. A line that spans many reads takes linear time.

    Example:
        >>> list(lines([b"one\r", b"\ntw", b"o\rthree"]))
        [b'one', b'two', b'three']
    """
    begun, after_cr = bytearray(), False
    for block in filter(None, reads):
        if after_cr and block.startswith(b"\n"):
            block = block[1:]
        after_cr = block.endswith(b"\r")
        block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *ended, tail = block.split(b"\n")
        if ended and begun:
            ended[0] = bytes(begun + ended[0])
            begun = bytearray()
        yield from ended
        begun += tail
    if begun:
        yield bytes(begun)


class Event(str):
    """The data lines of one event, joined with LF. `type` is what its `event:` line
    named; `whole` is False for a last event that has no blank line after it."""

    type, whole = "message", True


def events(lines):
    r"""Yield an Event (a str) for each event that has data lines.

    `lines` may be bytes or str, with or without their ends: a list, or an open file.
    `id` and `retry` are for clients that reconnect: these fields, unknown ones and
    comments are passed over. The standard drops a last event without its blank line;
    here it is yielded with `whole` False, because some servers forget that line. An
    invalid byte becomes U+FFFD, as in browsers; a byte order mark may open the stream.

    Example:
        >>> list(events([b": a comment", b"data: Hello,", b"data:world", b""]))
        ['Hello,\nworld']
        >>> [event.type for event in events(["event: error", "data: busy", ""])]
        ['error']
    """
    type, found = "", []
    for number, line in enumerate(lines):
        line = line if isinstance(line, str) else line.decode("utf-8", "replace")
        line = line if number else line.lstrip("\ufeff")  # a byte order mark
        name, colon, value = line.rstrip("\r\n").partition(":")
        if name == "data":
            found.append(value[1:] if value.startswith(" ") else value)
        elif name == "event":
            type = value[1:] if value.startswith(" ") else value
        elif not name and not colon:  # a blank line
            if found:
                yield _event(found, type)
            type, found = "", []
    if found:
        yield _event(found, type, whole=False)


def _event(found, type, whole=True):
    event = Event("\n".join(found))
    if type or not whole:
        event.type, event.whole = type or "message", whole
    return event


# ------------------------------------------------------------------------------------
# From events to chunks and pieces. Chunks stay the dicts of the wire. Servers differ in
# what they leave out, repeat or send as null, so a chunk is read through the functions
# below, which accept a missing field, null and values of the wrong type.

_decode = json.JSONDecoder().decode  # json.loads, without its checks of the arguments


def _choices(chunk):
    """The choices of a chunk: none when they are missing, null or no objects."""
    choices = chunk.get("choices")
    choices = choices if isinstance(choices, list) else ()
    if len(choices) == 1 and isinstance(choices[0], dict):
        return choices  # as they mostly are: without a copy, an event takes 7 % less
    return [choice for choice in choices if isinstance(choice, dict)]


def _index(choice, default=0):
    return choice["index"] if type(choice.get("index")) is int else default


def _object(value):
    return value if isinstance(value, dict) else {}


def _first(chunk):
    """The first choice, the one of index 0: {} when the chunk is about others."""
    return next((choice for choice in _choices(chunk) if not _index(choice)), {})


def _text(choice):
    """The text that a choice adds: in its delta or, in a text completion, under `text`.
    Together sends both, with the same text."""
    delta = choice.get("delta")
    content = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return content if isinstance(content, str) else _text_in(content)


def _reasoning(choice):
    """The reasoning that a choice adds: under one of two names, or in the parts of its
    content, as Mistral sends it.

    Example:
        >>> hm = {"type": "text", "text": "Hm."}
        >>> _reasoning({"delta": {"content": [{"type": "thinking", "thinking": [hm]}]}})
        'Hm.'
    """
    delta = _object(choice.get("delta"))
    text = delta.get("reasoning_content") or delta.get("reasoning")
    thoughts = (_text_in(part.get("thinking")) for part in _parts(delta.get("content"))
                if part.get("type") == "thinking")
    return text if text and isinstance(text, str) else "".join(thoughts)


def _text_in(content):
    """The text in a content that is a list of parts.

    Example:
        >>> _text_in([{"type": "text", "text": "Hi"}, {"type": "image"}])
        'Hi'
    """
    texts = [part.get("text") for part in _parts(content) if part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _parts(content):
    """The parts of a content as dicts; a str among them is text."""
    return [{"type": "text", "text": part} if isinstance(part, str) else _object(part)
            for part in (content if isinstance(content, list) else ())]


def _whole_characters(texts):
    """Yield texts in which no surrogate pair is split: a server that cuts its text into
    UTF-16 units may send the halves of an emoji in two chunks. A lone half stays."""
    held = ""
    for text in texts:
        text = _paired(held + text) if held else text
        held = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        yield text[:-1] if held else text
    yield held


def _paired(text):
    """A text in which two halves of a surrogate pair have become one character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def chunks(events):
    """Yield the chunk (a dict) that each event holds, up to [DONE].

    Events that say nothing (empty, null, {}) are passed over. Raises APIError for an
    error event and for a choice that ends in an error, BadReply for an event that is no
    JSON object. Raises StreamTruncated when the stream ends without [DONE] and a choice
    has no finish_reason: HTTP alone does not tell whether such a reply is complete. The
    error of a stream that was cut or fell silent gets the `text` so far.

    Example:
        >>> list(chunks(['{"choices": [{"delta": {"content": "Hi"}}]}', "[DONE]"]))
        [{'choices': [{'delta': {'content': 'Hi'}}]}]
    """
    text, ends = "", {}  # ends: the finish_reason of each choice
    try:
        for event in events:
            if event.strip() == "[DONE]":
                return
            chunk = _json_or_text(event)
            _raise_error_of(event, chunk)
            if not chunk:
                continue
            for choice in _choices(chunk):
                index = _index(choice)
                ends[index] = choice.get("finish_reason") or ends.get(index)
                text += "" if index else _text(choice)
            if len(text) > 2 << 20:
                text = text[-1 << 20:]
            yield chunk
        if not ends or not all(ends.values()):
            raise StreamTruncated("the stream ended before the reply was complete")
    except (StreamTruncated, ConnectionFailed) as error:
        error.text = _paired(text)
        raise


def _json_or_text(event):
    # Half an event at the end of a stream is None: the stream was cut there, and chunks
    # will say so.
    try:
        return _decode(event)
    except (ValueError, RecursionError):
        return event.strip() if getattr(event, "whole", True) else None


def _raise_error_of(event, chunk):
    """Raise the error that an event is by its JSON (the chunk) or by its type, if it is
    one, and BadReply if it is no JSON object."""
    _raise_error_in(chunk)
    if getattr(event, "type", "") == "error":
        _raise_error_in({"error": chunk or "an error event without a message"})
    if chunk and not isinstance(chunk, dict):
        raise BadReply(f"an event is not a JSON object: {_text_or_json(chunk)}")


def _raise_error_in(body, status=None, headers=None):
    """Raise the APIError that a JSON document describes, if it describes one.

    Known forms: {"error": {"message": ...}} (the API's own), the same in an array
    (Gemini), {"error": "text"} (Ollama), {"object": "error", "message": ...} or the
    error's fields at the top, where choices or models should be (vLLM), a choice with
    an error (OpenRouter).

    Example:
        >>> _raise_error_in({"error": {"message": "busy", "code": 503}}, status=200)
        Traceback (most recent call last):
        client.APIError: 503: busy
    """
    body = _object(body[0] if isinstance(body, list) and len(body) == 1 else body)
    error = body.get("error")
    for choice in _choices(body):
        if choice.get("error") or choice.get("finish_reason") == "error":
            error = error or choice.get("error") or "the reply ended with an error"
    at_the_top = (isinstance(body.get("message"), str)
                  and not body.keys() & {"choices", "data", "models"})
    if not error and (at_the_top or body.get("object") == "error"):
        error = body
    if not error:
        return
    error = error if isinstance(error, dict) else {"message": error}
    if (status or 200) < 300:  # which does not say that this is an error
        status = int(error["code"]) if error.get("code") in range(400, 600) else None
    fields = (error.get(name) for name in ("type", "code", "param"))
    raise APIError(status, error.get("message") or error, *fields, headers=headers)


def pieces(chunks):
    """Yield the text of the first choice, piece by piece; close `chunks` at the end.

    Example:
        >>> list(pieces([{"choices": [{"delta": {"role": "assistant"}}]},
        ...              {"choices": [{"delta": {"content": "Hi"}}]}, {"choices": []}]))
        ['Hi']
    """
    try:
        yield from filter(None, _whole_characters(map(_text, map(_first, chunks))))
    finally:  # a plain `for` passes no close() on, and a socket should not wait for GC
        if hasattr(chunks, "close"):
            chunks.close()


# ------------------------------------------------------------------------------------
# Fold: from chunks to the completion. Two rules decide for all fields, known or not.
#
# A choice's delta, text and logprobs hold increments. `_merged` joins those of all
# chunks: it concatenates the strings named in _CONCATENATED and extends lists. Of
# anything else it takes the first value that is not empty.
#
# Every other field is a statement about the whole reply. `_update_fields` keeps the
# first scalar that is not empty and the last object or list that is not empty, because
# a later usage replaces an earlier one. `obfuscation` is padding and is left out.

_INCREMENTS = {"delta", "text", "logprobs"}
_CONCATENATED = {"content", "text", "refusal", "reasoning_content", "reasoning",
                 "thinking", "arguments", "input", "transcript", "data"}


def fold(chunks):
    """Join the chunks of a stream into the completion (a dict) they would have been.

    Tool calls are merged, a content whose parts are all text becomes a str, and fields
    that the API does not know are kept. The chunks are not changed. Raises BadReply for
    JSON that is nested too deeply.

    Example:
        >>> completion = fold([
        ...     {"id": "c1", "choices": [{"index": 0, "delta": {"content": "Hi "}}]},
        ...     {"id": "c1", "choices": [{"index": 0, "delta": {"content": "you"}}]},
        ...     {"id": "c1", "choices": [], "usage": {"total_tokens": 9}}])
        >>> completion["choices"][0]["message"]
        {'role': 'assistant', 'content': 'Hi you', 'refusal': None}
        >>> completion["usage"]
        {'total_tokens': 9}
    """
    completion, choices, apart = {}, {}, _INCREMENTS | {"index"}
    for chunk in chunks:
        _update_fields(completion, chunk, but={"choices", "obfuscation"})
        for choice in _choices(chunk):
            known = {"index": _index(choice), "logprobs": None, "finish_reason": None}
            fields, found = choices.setdefault(known["index"], (known, []))
            _update_fields(fields, choice, but=apart)
            found.append({name: choice[name] for name in _INCREMENTS & choice.keys()})
    try:
        completion["choices"] = [_complete({**fields, **_merged(found)})
                                 for _, (fields, found) in sorted(choices.items())]
    except RecursionError:
        raise BadReply("a chunk is nested too deeply") from None
    is_text = any("text" in choice for choice in completion["choices"])
    completion["object"] = "text_completion" if is_text else "chat.completion"
    return completion


def _update_fields(fields, more, but=()):
    """Update `fields` with those of `more`, except those named in `but`. A scalar
    replaces only an empty value, an object or a list any; an empty value replaces none.

    Example:
        >>> fields = {"id": "", "model": "m", "usage": {"total_tokens": 1}}
        >>> _update_fields(fields, {"id": "c", "model": "n", "usage": {}})
        >>> fields
        {'id': 'c', 'model': 'm', 'usage': {'total_tokens': 1}}
    """
    for name, value in more.items():
        replaces = value and (isinstance(value, (dict, list)) or not fields.get(name))
        if name not in but and (replaces or name not in fields):
            fields[name] = value


def _merged(objects):
    """One object from several, each field from all of its values.

    Example:
        >>> _merged([{"role": "assistant", "content": "Hi "}, {"content": "you"}])
        {'role': 'assistant', 'content': 'Hi you'}
    """
    values = {}
    for name, value in (item for each in objects for item in each.items()):
        values.setdefault(name, []).extend([] if value is None else [value])
    return {name: _merged_values(name, found) for name, found in values.items()}


def _merged_values(name, values):
    """One value of a field from all of its values that are not null; the first that is
    not empty tells the type.

    Example:
        >>> _merged_values("content", ["", "Hi ", "you"])
        'Hi you'
        >>> _merged_values("role", ["assistant", "user"])
        'assistant'
    """
    full = [value for value in values if value] or values[:1]
    if not full:
        return None
    if name == "tool_calls":
        return _merged_calls(full)
    if name == "arguments":  # which some servers send as an object
        full = [_text_or_json(value) for value in full]
    if isinstance(full[0], dict):
        return _merged(value for value in full if isinstance(value, dict))
    if name in _CONCATENATED and all(isinstance(value, str) for value in full):
        return _paired("".join(full))
    if name in ("content", "thinking") and isinstance(full[0], (str, list)):
        return _content(_items(full))  # which may come as a list of parts
    return _items(full) if isinstance(full[0], list) else full[0]


def _items(values):
    """The items of lists; what is not a list is an item itself."""
    return [item for value in values
            for item in (value if isinstance(value, list) else [value])]


def _content(items):
    """The content that texts and parts make: text parts that follow each other are
    merged, and a content of nothing but text is a str.

    Example:
        >>> _content(["Hi", {"type": "text", "text": " you"}])
        'Hi you'
        >>> _content([{"type": "reference", "reference_ids": [1]}, "Hi", "!"])
        [{'type': 'reference', 'reference_ids': [1]}, {'type': 'text', 'text': 'Hi!'}]
    """
    parts = []
    for kind, group in itertools.groupby(_parts(items), lambda part: part.get("type")):
        parts.extend([_merged(group)] if kind == "text" else group)
    return _text_in(parts) if len(parts) == 1 and kind == "text" else parts


def _merged_calls(lists):
    """The tool calls that lists of fragments make; one may come without its list."""
    calls = []  # for each call: its fragments, and index, id and name as far as known
    for value in lists:
        fragments = [item for item in _items([value]) if isinstance(item, dict)]
        for place, fragment in enumerate(fragments):
            # Of several in one list, the place stands in for an index.
            if len(fragments) > 1 and fragment.get("index") is None:
                fragment = {**fragment, "index": place}
            _call_of(calls, fragment)["fragments"].append(fragment)
    return [_complete_call(_merged(call["fragments"])) for call in calls]


def _call_of(calls, fragment):
    """The call that a fragment continues: the last one that agrees with it in index and
    id, as far as both give them. If none does, a new call is appended to `calls`. A
    name starts a new call, too, if it comes with a new id (Gemini gives all its calls
    the index 0) or, without index and id, differs from the last call's name.

    Example:
        >>> calls = [{"index": 0, "id": "a"}, {"index": 1, "id": "b"}]
        >>> _call_of(calls, {"index": 0, "function": {"arguments": "{}"}})
        {'index': 0, 'id': 'a', 'name': None}
        >>> _call_of(calls, {"index": 0, "id": "c", "function": {"name": "f"}})
        {'fragments': [], 'index': 0, 'id': 'c', 'name': 'f'}
    """
    name = _object(fragment.get("function") or fragment.get("custom")).get("name")
    marks = {key: fragment[key] for key in ("index", "id")
             if fragment.get(key) not in (None, "")}
    new_id = "id" in marks and all(call.get("id") != marks["id"] for call in calls)
    new_name = not marks and calls and calls[-1]["name"] not in (None, "", name)
    agreeing = [call for call in calls
                if all(call.get(key, value) == value for key, value in marks.items())]
    if not agreeing or name and (new_id or new_name):
        agreeing = [{"fragments": []}]
        calls += agreeing
    _update_fields(agreeing[-1], {**marks, "name": name})
    return agreeing[-1]


def _complete_call(call):
    call.pop("index", None)
    if isinstance(call.get("function"), dict):  # a call without arguments says {}
        call["function"]["arguments"] = call["function"].get("arguments") or "{}"
    default = "custom" if "custom" in call else "function"
    return {**call, "type": call.get("type") or default}


def _complete(choice):
    """A choice as it stands in a completion, from its fields and merged increments."""
    text, delta = choice.pop("text", None), choice.pop("delta", None)
    if isinstance(text, str) and delta is None:
        return {"text": text, **choice}
    said = {name: value for name, value in _object(delta).items()
            if value or name not in ("role", "tool_calls")}  # left out where empty
    message = {"role": "assistant", "content": None, "refusal": None, **said}
    return {"index": choice.pop("index"), "message": message, **choice}


def _as_chunk(completion):
    """A completion as one chunk, for a server that cannot stream. A choice without an
    index has its place."""
    choices = [{"delta" if name == "message" else name: value for name, value in
                {**choice, "index": _index(choice, place)}.items()}
               for place, choice in enumerate(_choices(completion))]
    return {**completion, "choices": choices}


# ------------------------------------------------------------------------------------
# One request over the wire: urllib without its redirects and its errors. The opener has
# no HTTPErrorProcessor, so every status comes back as a plain response, and a redirect
# is never followed (urllib would turn the POST into a GET, and take the key along).

_ERROR_BODY = 5  # seconds for a read of an error's body, and until the last read
_LOOPBACK = re.compile(r"127(\.\d+){1,3}|(.*\.)?localhost|::1|0\.0\.0\.0")


class _HTTPConnection(http.client.HTTPConnection):
    """Waits less long for a connection and for the body of an error than for a reply,
    and reads the response to a request that could not be sent whole."""

    def connect(self):
        # A reply may take much longer than the 10 seconds that a connection may take.
        patience, self.timeout = self.timeout, min(self.timeout, 10)
        super().connect()
        self.sock.settimeout(patience)

    def send(self, data):
        if self.sock is None:
            self.connect()
        # A server may refuse a large body and hang up before it has read all of it. Its
        # response is there to be read all the same.
        with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
            super().send(data)

    def getresponse(self):
        # super() forgets the socket when the server will close the connection.
        sock, response = self.sock, super().getresponse()
        if response.status >= 300:
            with contextlib.suppress(OSError):  # closed already: there is no body
                sock.settimeout(min(sock.gettimeout(), _ERROR_BODY))
        return response


class _HTTPSConnection(_HTTPConnection, http.client.HTTPSConnection):
    """The same over TLS."""


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """urllib's handlers of http and https, with the connections above."""

    def do_open(self, cls, request, **settings):
        ours = {http.client.HTTPSConnection: _HTTPSConnection}.get(cls, _HTTPConnection)
        return super().do_open(ours, request, **settings)


def _build_opener(base, cafile=None):
    """An opener for the server at `base` (a split URL). Its certificate is checked with
    the CA certificates in `cafile`, or else with the system's. Proxies are those of the
    environment, but a server on this machine is asked directly."""
    # Without a context, urllib would load the system's CA certificates, even for http.
    # That takes longer than a request, so that http gets a context without any.
    context = (ssl.create_default_context(cafile=cafile) if base.scheme == "https"
               else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    no_proxies = {} if _LOOPBACK.fullmatch(base.hostname) else None  # None: those set
    director = urllib.request.OpenerDirector()
    director.add_handler(urllib.request.ProxyHandler(no_proxies))
    director.add_handler(_Handler(context=context))
    return director


def _retry_after(headers):
    """The seconds a server asks to wait, from retry-after-ms or Retry-After (RFC 9110,
    10.2.3: seconds or a date), or 0."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1)):
        with contextlib.suppress(TypeError, ValueError):
            return float(headers.get(name)) * unit
    with contextlib.suppress(ArithmeticError, LookupError, TypeError, ValueError):
        return mktime_tz(parsedate_tz(headers.get("retry-after"))) - time.time()
    return 0  # the server does not say


def _seconds_to_retry(error, retries):
    """How many seconds to wait before the next retry after `error`, or None: no retry.

    The official SDK's rules: no wait of more than two minutes; then what the server
    says in x-should-retry; then the status. A used-up quota is not retried either.
    """
    seconds = _retry_after(error.headers)
    asked = {"true": True, "false": False}.get(error.headers.get("x-should-retry"))
    again = error.retryable if asked is None else asked
    if not again or seconds > 120 or error.code == "insufficient_quota":
        return None
    backoff = 0.5 * 2 ** min(retries, 4) * (1 - 0.25 * random.random())
    return seconds if seconds > 0 else backoff


# ------------------------------------------------------------------------------------
# The client: a method for each endpoint, over one path to the wire. _open sends a
# request and lets only a 2xx pass, _retried tries again, _read_json and _read_chunks
# read the reply.

_BLANK = b" \t\r\n\xef\xbb\xbf"  # and the bytes of a byte order mark
_STREAM = re.compile(rb"(?:data|event|id|retry)?:")  # how an event stream begins


def _setting(variable, given=None):
    return (given or os.environ.get(variable, "")).strip()  # an empty one is unset


def _split_url(url):
    """The parts of a base URL. Messages show it without its query. One with an "@" is
    refused and not shown: what stands before the "@" may be a user and a password, and
    a password may hold a "?". In a query, %40 stands for it."""
    if "@" in url:
        raise ClientError("a base URL must not hold a user or password: use an API key")
    with contextlib.suppress(ValueError):
        base = urllib.parse.urlsplit(url)
        good = base.scheme in ("http", "https") and base.hostname and base.port != 0
        if good and url.isascii() and url.isprintable() and " " not in url:
            return base
    raise ClientError(f"{url.partition('?')[0]!r} is not a base URL like "
                      "http://host:8000/v1")


# Headers and fields of the query that are no secrets, though they are sent along.
_PUBLIC = re.compile("accept|api-version|content-type|openai-.*|user-agent")


def _secrets_in(headers, query):
    """The values to keep out of messages: those of headers and of the query of the base
    URL, as it spells them and decoded. Longest first, because a short one that is part
    of a long one would match first and leave the rest of the long one in the message.
    A field of the query without "=" is a value. What has fewer than 8 characters is a
    word, which messages may well hold; only the key may be shorter, such as the EMPTY
    that local servers are given.

    Example:
        >>> _secrets_in({"Authorization": "Bearer sk-12345"}, "sig=my%20secret")
        ['Bearer sk-12345', 'my%20secret', 'my secret', 'sk-12345']
    """
    fields = re.findall("(?:([^&=]*)=)?([^&]*)", query)  # (name or "", value)
    secrets = set()
    for name, value in [*headers.items(), *fields]:
        least = 4 if name == "Authorization" else 8
        if not _PUBLIC.fullmatch(name.lower()):
            spelt = value, urllib.parse.unquote_plus(value), *value.split()[-1:]
            secrets.update(text for text in spelt if len(text) >= least)
    return sorted(secrets, key=len, reverse=True)


def _spellings(secret):
    r"""A pattern for a secret as JSON, a URL or a repr may spell it: each character
    as it is, behind backslashes, as \u0041 or as %41, with hex digits in either case.
    The characters themselves are found in the other case only if the secret is long:
    EMPTY may be a key, but "empty" is a word."""
    text = "".join(rf"(?:\\{{0,4}}{re.escape(c)}"
                   rf"|(?i:\\{{1,4}}u{ord(c):04x}|%{ord(c):02x}))" for c in secret)
    return f"(?i:{text})" if len(secret) >= 8 else text


class Client:
    """A client of one OpenAI-compatible server.

    base_url     up to and with "/v1"; else OPENAI_BASE_URL, else 127.0.0.1:8000
    api_key      else OPENAI_API_KEY, else none is sent
    timeout      seconds for which the server may stay silent
    max_retries  after 408, 409, 429, 5xx and failed connections; never once a stream
                 has begun
    cafile       CA certificates (a PEM file) to trust instead of the system's

    Attributes that may be set: `model`, for requests that name none (OPENAI_MODEL);
    `watch`, a function that gets the bytes of a reply, those of a stream as they arrive
    and others when all are there; `retrying`, a function that gets the error and the
    seconds before each wait for a retry.

    No error holds the key, nor the value of a header or of the base URL's query, if it
    is not public and has 8 characters or more (of the key 4 suffice).

    One client may be used by many threads. OPENAI_ORG_ID and OPENAI_PROJECT_ID are sent
    along where they are set. Raises ClientError for settings that cannot be used.
    """

    def __init__(self, base_url=None, api_key=None, timeout=600, max_retries=2,
                 cafile=None):
        if not timeout > 0:
            raise ClientError("timeout must be positive")
        self.timeout = min(timeout, 2_000_000)  # a socket takes 24 days at most
        self.max_retries, self.cafile = max_retries, cafile
        self.watch, self.retrying = lambda block: None, lambda error, seconds: None
        self.base = _split_url(_setting("OPENAI_BASE_URL", base_url)
                               or "http://127.0.0.1:8000/v1")
        self._address = self.base._replace(query="", fragment="").geturl()
        self.api_key = _setting("OPENAI_API_KEY", api_key)
        self.model, self.headers = _setting("OPENAI_MODEL"), {}
        self.add_header("Authorization", self.api_key and f"Bearer {self.api_key}")
        self.add_header("OpenAI-Organization", _setting("OPENAI_ORG_ID"))
        self.add_header("OpenAI-Project", _setting("OPENAI_PROJECT_ID"))
        self.add_header("User-Agent", "client.py")
        try:
            self._opener = _build_opener(self.base, cafile)
        except OSError as error:
            raise ClientError(f"cannot use {cafile}: {error.strerror}") from error

    def add_header(self, name, value):
        """Send a header with every request, instead of one of the same name if there is
        one; an empty value sends none. Raises ClientError if no header can carry it."""
        if not (re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII)
                and re.fullmatch("[ -~]*", value)):  # not shown: it may be a key
            raise ClientError(f"header {name}: name or value is not printable ASCII")
        self.headers.pop(name.title(), None)
        self.headers.update({name.title(): value} if value else {})

    def chat_completions(self, /, messages, model=None, stream=False, **params):
        """Ask for a chat completion: a dict, or an iterator of chunks when streamed.

        `messages` is a list of dicts as in the API, or a str: one user message. `model`
        None takes OPENAI_MODEL, else the first that the server lists. `params` are sent
        as they are. Closing the iterator closes the connection. Raises APIError,
        ConnectionFailed, BadReply; a stream, while it is read, StreamTruncated too.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        params = {"messages": messages, **params}
        return self._ask("/chat/completions", model, stream, params)

    def completions(self, /, prompt, model=None, stream=False, **params):
        """Ask for the completion of `prompt`, in any of the API's four forms; all else
        as in chat_completions."""
        return self._ask("/completions", model, stream, {"prompt": prompt, **params})

    def models(self):
        """The ids of the models that the server lists: under "data" as the API does,
        under "models" (Ollama), or in a bare array (Together)."""
        listed = self._retried(lambda: self._read_json(self._open("/models")))
        if isinstance(listed, dict):
            listed = listed.get("data") or listed.get("models") or []
        if not isinstance(listed, list):
            raise BadReply("the server's list of models is not a list")
        names = [model.get("id") or model.get("name") if isinstance(model, dict) else
                 model for model in listed]
        return [name for name in names if name and isinstance(name, str)]

    def first_model(self):
        """`model`; where none is set, the first that the server lists, from now on."""
        self.model = self.model or next(iter(self.models()), None)
        if not self.model:
            raise BadReply("the server lists no model: name one")
        return self.model

    def url(self, path):
        """The address of an endpoint; a query in the base URL stays at the end."""
        return self.base._replace(path=self.base.path.rstrip("/") + path).geturl()

    def _ask(self, path, model, stream, rest):
        request = {"model": model or self.first_model(), **rest, "stream": bool(stream)}
        if not stream:
            return self._retried(
                lambda: _with_choices(self._read_json(self._open(path, request))))
        stream = self._streamed(path, request)
        next(stream)  # asks now, so that a refusal is raised by the call
        return stream

    def _streamed(self, path, request):
        """A generator. The first next() sends the request and yields None, so that _ask
        can raise a refusal at once; the following ones yield chunks. The body of the
        generator is running by then, so that close() also closes the connection of a
        stream that nobody has read."""
        response = self._retried(lambda: self._open(path, request))
        with contextlib.closing(response):
            try:
                yield
                yield from self._read_chunks(response)
            except ClientError as error:
                self._conceal(error)
                raise

    def _retried(self, attempt):
        for retries in itertools.count():
            try:
                return attempt()
            except ClientError as error:
                seconds = _seconds_to_retry(error, retries)
                self._conceal(error)  # only now: it may hide what a header says
                if seconds is None or retries >= self.max_retries:
                    raise
                self.retrying(error, seconds)
            time.sleep(seconds)

    def _conceal(self, error):
        """Replace the secrets in all that an error holds by ***: each error of a
        request passes here. Its cause goes too: it may quote what the server sent."""
        secrets = _secrets_in(self.headers, self.base.query)
        # (?!) matches nowhere.
        replace = re.compile("|".join(map(_spellings, secrets)) or "(?!)").sub

        def hide(value):
            return replace("***", value) if isinstance(value, str) else value

        error.args = tuple(map(hide, error.args))
        vars(error).update({name: hide(value) for name, value in vars(error).items()})
        error.headers, headers = http.client.HTTPMessage(), error.headers
        for name, value in headers.items():
            error.headers[hide(name)] = hide(value)
        error.__cause__ = error.__context__ = None

    def headers_for(self, request):
        """The headers that go with a request (the JSON body), or, for None, a GET."""
        json_body = {} if request is None else {"Content-Type": "application/json"}
        return {**json_body, **self.headers}

    def _open(self, path, request=None):
        body = request and _as_json(request, too_deep=ValueError, allow_nan=False,
                                    separators=(",", ":")).encode()
        http_request = urllib.request.Request(self.url(path), body,
                                              self.headers_for(request))
        try:
            response = self._opener.open(http_request, timeout=self.timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error, http_request.host) from error
        coding = (response.headers.get("content-encoding") or "identity").lower()
        if not 200 <= response.status < 300:
            self._refuse(response, coding)
        if coding != "identity":
            response.close()
            raise BadReply(f"the reply is compressed, although not asked for: {coding}")
        return response

    def _refuse(self, response, coding):
        """Raise the APIError for a response that is not 2xx. A body that cannot be read
        on a terminal, such as a proxy's web page, is replaced by the status in words.
        """
        body, status, headers = b"", response.status, response.headers
        deadline = time.monotonic() + _ERROR_BODY
        with contextlib.closing(response), contextlib.suppress(ClientError):
            for block in reads(response):
                body += block
                if len(body) > 1_000_000 or time.monotonic() > deadline:
                    break  # a longer or slower one is not a message
        text = body.decode("utf-8-sig", "replace").strip()
        if 300 <= status < 400:
            location = (headers.get("location") or "another address").partition("?")[0]
            text = f"the server redirects to {location}, which was not followed"
        elif not text or text.startswith("<") or coding != "identity":
            text = response.reason or http.client.responses.get(status, "no reason")
        _raise_error_in(_json_or_text(text), status, headers)
        raise APIError(status, text, headers=headers)

    def _unreachable(self, error, host):
        # A URLError only wraps what happened.
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        what = getattr(cause, "strerror", None) or str(cause) or repr(cause)
        through = "" if host == self.base.netloc else f" through the proxy {host}"
        if isinstance(cause, socket.timeout):
            what = "no response in time"
        if isinstance(cause, ssl.SSLCertVerificationError):
            what = (f"its certificate cannot be trusted: {cause.verify_message}; "
                    "cafile (--cafile) names whom to trust")
        if not through and isinstance(cause, (ConnectionRefusedError, socket.gaierror)):
            what += "; is the server running?"
        failure = ConnectionFailed(f"cannot reach {self._address}{through}: {what}")
        # A URL that makes no sense is a ValueError, and so is SSLCertVerificationError.
        failure.retryable = not isinstance(cause, ValueError)
        return failure

    def _read_json(self, response):
        """The body of a response: one JSON document, or a stream although unasked."""
        try:
            with contextlib.closing(response):
                body = b"".join(reads(response))
            start = body.lstrip(_BLANK)
            folded = _STREAM.match(start) and fold(chunks(events(lines([start]))))
        except StreamTruncated as error:  # nothing of it was handed on: ask again
            raise ConnectionFailed(error.message) from error
        except (APIError, BadReply):  # in a body that was not cut
            self.watch(body)
            raise
        self.watch(body)  # only now: a reply that was cut is asked for again
        return folded or self._document(response, start)

    def _read_chunks(self, response):
        """The chunks of a stream, or of a whole reply from a server that cannot stream.
        A body without a byte is a stream that was cut."""
        body, start = reads(response, self.watch), b""
        for block in body:
            start = (start + block).lstrip(_BLANK)
            if len(start) >= len(b"event:"):  # the longest that _STREAM looks for
                break
        if not start or _STREAM.match(start):
            return chunks(events(lines(itertools.chain([start], body))))
        completion = self._document(response, start + b"".join(body))
        return [_as_chunk(_with_choices(completion))]

    def _document(self, response, body):
        try:
            document = json.loads(body.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError):
            what = response.headers.get_content_type() if body.strip() else "empty"
            raise BadReply(f"the server's reply is {what}, not JSON; is "
                           f"{self._address} the right address?") from None
        _raise_error_in(document, response.status, response.headers)
        return document


def _with_choices(document):
    """A completion, which is refused without a list of choices."""
    if not isinstance(document, dict) or not isinstance(document.get("choices"), list):
        raise BadReply("the server's reply has no choices")
    return document


# ------------------------------------------------------------------------------------
# Showing a reply on standard output, what its text does not show on standard error, and
# a request as a command for curl. The text is printed as it is: on a terminal, escape
# sequences in it act.

def _reply(method, request):
    """The chunks of the reply to a request, be it streamed or not. `method` is one of a
    Client's: chat_completions or completions."""
    reply = method(**request)
    yield from [_as_chunk(reply)] if isinstance(reply, dict) else reply


def show(chunks, said):
    """Print the first choice as it comes: text and refusals, then tool calls as JSON.
    Its pieces are appended to `said`. If standard error is a terminal, the reasoning of
    the model goes there, dim; a line about a reply that was cut short always does."""
    rest, indexes = [], set()
    try:
        with contextlib.closing(chunks):
            for piece in filter(None, _whole_characters(_shown(chunks, rest, indexes))):
                said.append(piece)
                print(piece, end="", flush=True)
    finally:  # also after half a reply: what comes next begins a line
        if said and not said[-1].endswith("\n"):
            print(flush=True)
    _show_rest(fold([{"choices": rest}]), len(indexes))


def _shown(chunks, rest, indexes):
    """Yield the text and the refusal of the first choice. What else it holds is added
    to `rest`, and the indexes of all choices to `indexes`: keeping all chunks would
    need memory without bound."""
    dim, normal = ("", "") if os.name == "nt" else ("\x1b[2m", "\x1b[0m")
    on_terminal, line_end = sys.stderr.isatty(), ""  # "\n" while a line is begun there
    try:
        for chunk in chunks:
            indexes.update(map(_index, _choices(chunk)))
            choice = _first(chunk)
            rest += filter(_is_shown_at_the_end, [choice])
            delta, reasoning = _object(choice.get("delta")), _reasoning(choice)
            piece = _text(choice) or delta.get("refusal")
            if on_terminal and reasoning:
                print(f"{dim}{reasoning}{normal}", end="", file=sys.stderr, flush=True)
                line_end = "\n"
            if piece and isinstance(piece, str):
                print(line_end, end="", file=sys.stderr, flush=True)
                line_end = ""
                yield piece
    finally:  # also after half a reply
        print(line_end, end="", file=sys.stderr, flush=True)


def _is_shown_at_the_end(choice):
    fields = {**_object(choice.get("delta")), **choice}
    return any(map(fields.get, ("finish_reason", "tool_calls", "function_call")))


def _show_rest(completion, choices):
    """Print the tool calls of the first choice, which is all that the completion holds;
    tell what else was not shown. `choices` is the number of choices in the reply."""
    first = _first(completion)
    message = first.get("message", {})
    for call in (*message.get("tool_calls", ()), message.get("function_call")):
        if call:
            print_json(call)
    if first.get("finish_reason") in ("length", "content_filter"):
        tell(f"the reply was cut short (finish_reason {first['finish_reason']})")
    if choices > 1:
        tell(f"the first of {choices} choices is shown; --json prints them all")


def print_names(names):
    print("".join(f"{_printable(name)}\n" for name in names), end="", flush=True)


def print_json(value, indent=None):
    print(_as_json(value, sys.stdout.encoding, indent=indent), flush=True)


def tell(text):
    """Print one line on standard error."""
    print(f"client.py: {' '.join(text.split()):.1000}", file=sys.stderr, flush=True)


def complain(error):
    """Tell what went wrong and, where known, what to do."""
    hint = {401: "--api-key or OPENAI_API_KEY gives the key",
            404: "are --base-url and --model given and right?",
            429: "--retries lets it try longer"}.get(getattr(error, "status", None))
    tell(f"{error} ({hint})" if hint else str(error))


def curl(client, path, request=None):
    """The curl command that asks the same. The key appears as $OPENAI_API_KEY."""
    import shlex
    words = [f"curl -sS -N {shlex.quote(client.url(path))}"]
    words += [f"--cacert {shlex.quote(client.cafile)}"] if client.cafile else []
    if request is not None:
        words.append(f"-d {shlex.quote(_as_json(request, sys.stdout.encoding))}")
    for name, value in client.headers_for(request).items():
        if value == f"Bearer {client.api_key}":
            words.append(f'-H "{name}: Bearer $OPENAI_API_KEY"')
        elif name != "User-Agent":
            words.append(f"-H {shlex.quote(f'{name}: {value}')}")
    return " \\\n  ".join(words)


# ------------------------------------------------------------------------------------
# The conversation. The interface is stateless: all that was said goes out again with
# each question. A question that failed is taken back, so that it can be asked again.

class Conversation:
    """A line that begins with one of these words is a command. Any other line goes to
    the model, also one with a space before the slash.

      /system TEXT   what the model shall be (nothing: forget it)
      /model NAME    ask another model (nothing: list them)
      /reset         forget what was said
      /help          this
      /quit          leave, as Ctrl-D; Ctrl-C only stops a reply
    """

    def __init__(self, client, request):
        self.client, self.request, self.history = client, request, []
        self.system = [m for m in request.pop("messages") if m["role"] == "system"]

    def run(self):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing where it exists)
        print("/help lists the commands, Ctrl-D leaves.", file=sys.stderr, flush=True)
        terminal = sys.stdout if sys.stdout.isatty() else sys.stderr
        while True:
            try:
                with contextlib.redirect_stdout(terminal):  # prompts are not for a file
                    line = input("> ")
                self.obey(line)
            except KeyboardInterrupt:
                print(file=sys.stderr)
            except ClientError as error:
                complain(error)
            except EOFError:
                return print(file=sys.stderr)

    def obey(self, line):
        word, text = map(str.strip, re.match(r"(\S*)(.*)", line).groups())
        if word == "/system":
            self.system = [{"role": "system", "content": text}] if text else []
        elif word == "/model" and text:
            self.request["model"] = text
        elif word == "/model":
            print_names(self.client.models())
        elif word == "/reset":
            self.history = []
        elif word == "/quit":
            raise EOFError
        elif word == "/help":
            print((self.__doc__ or "").rstrip())
        elif line.strip():
            self.ask(line.strip())

    def ask(self, line):
        question, said = {"role": "user", "content": line}, []
        self.request["messages"] = self.system + self.history + [question]
        try:
            show(_reply(self.client.chat_completions, self.request), said)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        if said:  # tool calls are shown, not kept: they would need an answer
            self.history += [question, {"role": "assistant", "content": "".join(said)}]


# ------------------------------------------------------------------------------------
# The load generator: threads that ask the same again and again, each time on a new
# connection. One process has one core's worth of Python, so it says when that was the
# limit; a real load generator (wrk, ab) takes far less of the machine for itself.

def bench(method, request, requests, concurrency, progress=lambda done: None):
    """Ask `requests` times, `concurrency` at a time; a dict of what was measured.
    `method` is one of a Client's: chat_completions or completions.

    Times are in seconds. Events are chunks; a reply that is not streamed is one.
    `progress` is called about five times a second with what was measured so far. Ctrl-C
    ends the measurement, and counts as requests what was done until then.
    """
    import threading
    numbers, done = iter(range(requests)), []  # each thread takes the next number

    def work():
        for _ in numbers:
            done.append(_timed(method, request))

    threads = [threading.Thread(target=work, daemon=True)
               for _ in range(min(requests, concurrency))]
    started, cpu = time.perf_counter(), time.process_time()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # in short steps, so that Ctrl-C is heard
                thread.join(0.2)
                progress(done)
    except KeyboardInterrupt:
        collections.deque(numbers, maxlen=0)  # takes the rest: the threads end
    progress(done)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return _report(list(done), seconds, cpu / seconds, len(threads))


def _timed(method, request):
    """(seconds to each event, seconds to the first text or None, the error or None).

    The first event holds only a role on most servers. The first text, which people wait
    for, is in the first chunk with text, reasoning or a part of a tool call."""
    started, times, first_text, error = time.perf_counter(), [], None, None
    try:
        for chunk in _reply(method, request):
            times.append(time.perf_counter() - started)
            choice = _first(chunk)
            delta = {**_object(choice.get("delta")), "role": None}
            if first_text is None and (_text(choice) or any(delta.values())):
                first_text = times[-1]
    except Exception as failure:  # whatever it is, the thread goes on and counts it
        error = getattr(failure, "kind", type(failure).__name__)
    return times, first_text, error


def _report(done, seconds, cpu, concurrency):
    """The dict that bench returns. `cpu` is the share of one core that this process
    used. The client was the limit if it filled the core, all but a rest (0.85). With a
    few requests at a time it waits for the server in between; there it slows them down
    if a fifth (0.2) of the time of each went into its own work."""
    good = [times for times, _, error in done if not error]
    first_texts = [time for _, time, error in done if not error and time is not None]
    errors = collections.Counter(error for _, _, error in done if error)
    gaps = [after - before for times in good for before, after in zip(times, times[1:])]
    return {"requests": len(done), "completed": len(good), "seconds": seconds,
            "requests_per_second": len(good) / seconds,
            "events_per_second": sum(map(len, good)) / seconds,
            "first_event": _spread([times[0] for times in good if times]),
            "first_text": _spread(first_texts), "between_events": _spread(gaps),
            "errors": dict(errors.most_common()), "client_cpu": cpu,
            "client_is_the_limit": cpu > 0.85 or cpu / concurrency > 0.2}


def _spread(values):
    """The nearest rank: a percentile is a value that was measured, not one in between.

    Example:
        >>> _spread([0.5, 0.1, 0.2, 0.4, 0.3])
        {'median': 0.3, 'p95': 0.5, 'p99': 0.5}
    """
    values, percents = sorted(values), {"median": 50, "p95": 95, "p99": 99}
    return {name: values[-(-percent * len(values) // 100) - 1]
            for name, percent in percents.items() if values}


def print_report(report):
    """Print what bench measured, for people; times in milliseconds."""
    print(f"requests      {report['completed']} of {report['requests']} completed "
          f"in {report['seconds']:.2f} s")
    print(f"requests/s    {report['requests_per_second']:.1f}")
    print(f"events/s      {report['events_per_second']:.0f}")
    for name in ("first_event", "first_text", "between_events"):
        times = [f"{rank} {1000 * time:.2f} ms" for rank, time in report[name].items()]
        print(f"{name.replace('_events', '').replace('_', ' '):<14}{'   '.join(times)}")
    for error, count in report["errors"].items():
        print(f"errors        {count} x {error}")
    print(f"client's CPU  {100 * report['client_cpu']:.0f}% of a core")
    if report["client_is_the_limit"]:
        print("The client was the limit: the server may well be faster than this.")


# ------------------------------------------------------------------------------------
# The command line: the options, what becomes of them, and a function for each
# command, which returns the exit status (None is 0). What makes no sense on the command
# line is a plain ClientError, as it is in Client(): status 2.


def finite(text):
    """A number as JSON has them: neither nan nor an infinity."""
    if math.isfinite(float(text)):
        return float(text)
    raise ValueError(f"{text} is not finite")


def parsed(argv):
    """The parser and what it made of the arguments; options may stand anywhere."""
    import argparse
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    option, switch = parser.add_argument, {"action": "store_true"}
    texts = {"action": "append", "default": []}  # an option that may be repeated
    option("command", nargs="?", choices=_COMMANDS, help="what to do")
    option("words", nargs="*", metavar="PROMPT", help="the question; - or none: stdin")
    option("--base-url", help="the server, up to /v1; else OPENAI_BASE_URL")
    option("--api-key", help="the key; else OPENAI_API_KEY, which ps does not show")
    option("-H", **texts, help='"Name: value", such as an api-key; may be repeated')
    option("--config", help="INI file: [OpenAI] API_SECRET_KEY, MODEL, BASE_URL")
    option("--cafile", help="CA certificates to trust, PEM; else SSL_CERT_FILE")
    option("--timeout", type=float, default=600, help="seconds without a byte; 600")
    option("--retries", type=int, help="how often to try again: 2, with bench 0")
    option("--model", help="the model; else OPENAI_MODEL, or the server's first")
    option("--system", help="a system message")
    option("--max-tokens", type=int, help="the longest reply")
    option("--temperature", type=finite, help="0 to 2: how far the reply may vary")
    option("--stop", **texts, help="end the reply before this text; may be repeated")
    option("-p", **texts, metavar="NAME=VALUE", help="a parameter: JSON, text or @FILE")
    option("--no-stream", **switch, help="let the reply come in one piece")
    option("--json", **switch, help="print the completion as one JSON document")
    option("--raw", **switch, help="print the bytes of the reply as they come")
    option("--curl", **switch, help="print it as a curl command; ask only for a model")
    option("--prompt", help="the PROMPT, or its last words")
    option("--requests", type=int, default=100, help="bench: how many in all; 100")
    option("--concurrency", type=int, default=8, help="bench: at once, to 1000; 8")
    return parser, parser.parse_intermixed_args(argv)


def read_text(path):
    """The text of a file named on the command line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise ClientError(f"{path}: {getattr(error, 'strerror', error)}") from error


def configured(path):
    """What an INI file says in its section [OpenAI], with the names in lower case."""
    import configparser
    parser = configparser.ConfigParser(interpolation=None)  # a key may hold a %
    try:
        parser.read_string(read_text(path))
        return dict(parser["OpenAI"])
    except (KeyError, configparser.Error):
        raise ClientError(f"{path}: no INI file with a section [OpenAI]") from None


def parameter(text):
    """One `-p name=value` as a pair: JSON where the value is JSON, else text.

    Example:
        >>> parameter("seed=7"), parameter("user=me"), parameter("top_p=NaN")
        (('seed', 7), ('user', 'me'), ('top_p', 'NaN'))
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ClientError(f"-p takes NAME=VALUE, not {text}")
    if value.startswith("@"):
        value = read_text(value[1:])
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value, parse_float=finite, parse_constant=finite)
    return name, value


def prompted(args):
    """The prompt: the words, in which - stands for standard input, else a pipe; None if
    there is nothing of all this."""
    words = args.words + ([] if args.prompt is None else [args.prompt])
    if not words and args.command != "bench" and not sys.stdin.isatty():
        words = ["-"]
    texts = [standard_input() if is_input else " ".join(group) for is_input, group in
             itertools.groupby(words, lambda word: word == "-")]
    return "\n\n".join(texts) if texts else None


def standard_input():
    text = sys.stdin.buffer.read().decode("utf-8-sig", "replace").rstrip("\r\n")
    if not text:
        raise ClientError("nothing on standard input: give a PROMPT")
    return text


def requested(args, prompt):
    """The request that the arguments describe; `-p` has the last word."""
    request = {"model": args.model, "stream": not args.no_stream}
    if args.command == "complete":
        request["prompt"] = prompt
    else:
        texts = {"system": args.system, "user": prompt}
        request["messages"] = [{"role": role, "content": text}
                               for role, text in texts.items() if text is not None]
    for name in ("max_tokens", "temperature", "stop"):
        if getattr(args, name) not in (None, []):
            request[name] = getattr(args, name)
    request.update(args.p)
    if args.json and request["stream"] and args.command != "bench":
        request.setdefault("stream_options", {"include_usage": True})
    return request


def ask_command(client, args):
    """`chat` and `complete`: one question, or a conversation on a terminal."""
    asking, path, name = client.completions, "/completions", "prompt"
    if args.command == "chat":
        asking, path, name = client.chat_completions, "/chat/completions", "messages"
    prompt = None if name in args.p else prompted(args)
    request = requested(args, prompt)
    if prompt is None and name not in args.p:
        if args.command == "chat" and not (args.json or args.raw or args.curl):
            return Conversation(client, request).run()
        raise ClientError("nothing to ask: give a PROMPT")
    request["model"] = request["model"] or client.first_model()
    if args.curl:
        return print(curl(client, path, request))
    # Only now: else --raw would print the list of models, too.
    client.watch = emit if args.raw else client.watch
    stream = _reply(asking, request)
    if args.json:
        print_json(fold(stream), indent=2)
    elif args.raw:
        collections.deque(stream, maxlen=0)  # reads them all; `watch` prints
    else:
        show(stream, collections.deque(maxlen=1))  # which keeps the memory flat


def emit(block):
    """Write bytes to standard output at once."""
    sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()


def models_command(client, args):
    """`models`: the ids, one a line."""
    if args.curl:
        return print(curl(client, "/models"))
    client.watch = emit if args.raw else client.watch
    names = client.models()
    if args.json:
        print_json(names, indent=2)
    elif not args.raw:
        print_names(names)


def bench_command(client, args):
    """`bench`: the report, also of what was measured before Ctrl-C."""
    if args.requests < 1 or not 1 <= args.concurrency <= 1000:  # each takes a thread
        raise ClientError("bench takes 1 request or more, 1 to 1000 at a time")
    client.max_retries = args.retries or 0  # errors are counted
    request = requested(args, prompted(args) or "Hello!")
    request["model"] = request["model"] or client.first_model()
    shows = sys.stderr.isatty() and not args.json
    report = bench(client.chat_completions, request, args.requests, args.concurrency,
                   print_progress if shows else lambda done: None)
    if shows:
        print(file=sys.stderr, flush=True)  # ends the line of the progress
    print_json(report, indent=2) if args.json else print_report(report)
    return 130 if report["requests"] < args.requests else int(not report["completed"])


def print_progress(done):
    failed = sum(1 for *_, error in done if error)
    print(f"{len(done)} done, {failed} failed", end="\r", file=sys.stderr, flush=True)


_COMMANDS = {"chat": ask_command, "complete": ask_command, "models": models_command,
             "bench": bench_command}


def run_command(args):
    """Do what the arguments say, and --config where they say nothing."""
    if args.json + args.raw + args.curl > 1:
        raise ClientError("give one of --json, --raw and --curl")
    unused = {"models": ("words", "prompt", "system"), "complete": ("system",),
              "bench": ("raw", "curl")}.get(args.command, ())
    for name in filter(vars(args).get, unused):
        raise ClientError(f"{args.command} takes no {name}")
    config = configured(args.config) if args.config else {}
    args.p, args.model = dict(map(parameter, args.p)), args.model or config.get("model")
    client = Client(args.base_url or config.get("base_url"),
                    args.api_key or config.get("api_secret_key"), args.timeout,
                    2 if args.retries is None else args.retries, args.cafile)
    for header in args.H:
        if ":" not in header:  # not shown: it may be a key
            raise ClientError("-H takes 'Name: value'")
        client.add_header(*map(str.strip, header.split(":", 1)))
    client.retrying = lambda error, s: tell(f"{error} (trying again in {s:.1f} s)")
    return _COMMANDS[args.command](client, args)


def main(argv=None):
    """Run the command line. The exit status: 0; 1 refused or unreachable; 2 usage; 130
    Ctrl-C. None is 0."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "r+")  # None: it was closed
        with contextlib.suppress(AttributeError):  # not every terminal knows UTF-8
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)
    parser, args = parsed(argv)
    if not args.command:
        return parser.print_help()
    try:
        status = run_command(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except (ClientError, ValueError) as error:  # ValueError: a request JSON cannot hold
        complain(error)
        return 2 if type(error) in (ClientError, ValueError) else 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader, such as head, has left
            complain(error)
        # What is still in the buffer must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(not isinstance(error, BrokenPipeError))


if __name__ == "__main__":
    sys.exit(main())
