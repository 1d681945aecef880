import json
import os
import subprocess
import sys
import threading

import openai
import pytest

from openai_compat import APIError, QUIRKS, Reply, Script, Server, ToolCall, say
from travel import NoAnswer, Plan


def last(wanted):
    """An expectation of the last message's content."""
    return {"messages": lambda messages: wanted in messages[-1]["content"]}


# ------ tools

def test_two_calls_at_once_are_both_answered(server, use):
    def answered(messages):
        assert [each["content"] for each in messages[-2:]] == ["4", "21"]
        return True
    server.backend = Script(
        [ToolCall("weather", {"city": "Oslo"}), ToolCall("weather", {"city": "Rome"})],
        Reply("Rome is warmer.", expect={"messages": answered}))
    assert use(server, "ask", "Oslo or Rome?") == "Rome is warmer."


def test_every_tool_is_offered_with_its_schema(server, use):
    def fields(tools):
        functions = [each["function"] for each in tools]
        found = {each["name"]: sorted(each["parameters"]["properties"])
                 for each in functions}
        return found == {"weather": ["city"], "fare": ["end", "start"]}
    server.backend = Script(Reply("Hello.", expect={"tools": fields}))
    assert use(server, "ask", "Hi") == "Hello."


@pytest.mark.parametrize("call", [
    ToolCall("boat", {}), ToolCall("weather", {"town": "Oslo"}),
    ToolCall("weather", "no JSON"), ToolCall("weather", {"city": "Bonn"})])
def test_a_mistake_of_the_model_is_told_to_it(server, use, call):
    server.backend = Script(call, Reply("Sorry.", expect=last("error: ")))
    assert use(server, "ask", "Oslo?") == "Sorry."


def test_it_gives_up_on_a_model_that_only_calls_tools(server, use):
    server.backend = ToolCall("weather", {"city": "Oslo"})
    with pytest.raises(NoAnswer):
        use(server, "ask", "Oslo?", rounds=3)
    assert len(server.journal) == 3


def test_a_refusal_is_no_answer(server, use):
    server.backend = Reply(refusal="I cannot help with that.")
    with pytest.raises(NoAnswer, match="cannot help"):
        use(server, "ask", "Oslo?")


# ------ structured output

def test_a_plan_is_understood(server, use):
    server.backend = json.dumps({"city": "Oslo", "days": 2, "sights": ["Opera"]})
    plan = use(server, "plan", "Two days")
    assert plan == Plan(city="Oslo", days=2, sights=["Opera"])


def test_any_plan_that_fits_the_schema_will_do(server, use):
    assert isinstance(use(server, "plan", "Two days"), Plan)


def test_a_plan_may_be_refused(server, use):
    server.backend = Reply(refusal="No.")
    with pytest.raises(NoAnswer):
        use(server, "plan", "Two days")


# ------ streams

def test_it_tells_the_answer_piece_by_piece(server, use):
    server.backend = say("4", " degrees")
    assert use(server, "tell", "Oslo?") == ["4", " degrees"]


def test_it_leaves_when_it_has_heard_enough(server, use):
    server.backend = Reply(["blah "] * 1000, delay=(0, 0.005))
    pieces = use(server, "tell", "Oslo?", enough=lambda text: len(text) == 15)
    assert pieces == ["blah "] * 3
    server.close()
    exchange, = server.journal
    assert exchange.outcome == "client left" and exchange.events < 1000


def test_an_answer_that_is_cut_is_no_answer(server, use):
    server.backend = Reply("4 deg", finish_reason="length")
    with pytest.raises(NoAnswer):
        use(server, "tell", "Oslo?")


ERRORS = {"bad_json", "error_event", "html_502", "no_finish", "reset", "stall",
          "truncate"} | {"empty_data", "id_field", "retry_block"}   # faults of the SDK


@pytest.mark.parametrize("quirk", QUIRKS)
def test_a_fault_on_the_wire_is_the_answer_or_an_error(server, use, quirk):
    server.backend = Reply(["4", " degrees"], quirk=quirk)
    timeout = 0.5 if quirk == "stall" else 20
    try:
        pieces = use(server, "tell", "Oslo?", retries=0, timeout=timeout)
        assert pieces == ["4", " degrees"] and quirk not in ERRORS
    except (openai.APIError, json.JSONDecodeError, NoAnswer):
        assert quirk in ERRORS


# ------ retries, errors, time

def test_it_waits_when_the_limit_is_reached(server, use):
    slow = APIError(429, "Slow down.", headers={"retry-after-ms": "10"})
    busy = APIError(503, "Busy.", headers={"retry-after-ms": "10"})
    server.backend = Script(slow, busy, "4")
    assert use(server, "ask", "Oslo?") == "4"
    assert [each.status for each in server.journal] == [429, 503, 200]


def test_it_does_not_wait_for_an_empty_account(server, use):
    server.backend = Script(APIError(429, "Pay.", code="insufficient_quota"))
    with pytest.raises(openai.RateLimitError):
        use(server, "ask", "Oslo?")


def test_what_takes_too_long_is_cancelled(server, use):
    server.backend = Reply("late", delay=60)
    assert use(server, "ask_within", "Oslo?", 0.2) is None
    server.close()
    assert server.journal[0].outcome == "client left"


# ------ embeddings, and beside them chat

NOTES = ["Rome: the Colosseum closes at six", "Oslo: one may walk on the Opera's roof"]


def test_the_nearest_note_goes_into_the_question(server, use):
    server.backend = Script(Reply("On its roof.", expect=last("From our notes: Oslo")))
    answer = use(server, "answer_from_notes", "Oslo opera?", notes=NOTES)
    assert answer == "On its roof."
    assert [each.path for each in server.journal] == [
        "/v1/embeddings", "/v1/embeddings", "/v1/chat/completions"]


def test_embeddings_that_fail_are_an_error():
    def no_embeddings(body):
        raise APIError(404, "No such model.", code="model_not_found")
    with Server("x", routes={"/embeddings": no_embeddings}) as server:
        with pytest.raises(openai.NotFoundError):
            openai.OpenAI(base_url=server.base_url, api_key="any").embeddings.create(
                model="m", input="x")


# ------ five at once

def test_five_questions_at_once_get_their_own_answers(server, use):
    cities = ["Oslo", "Rome", "Bern", "Bonn", "Lyon"]
    server.backend = Script(*[Reply(city[::-1], expect=last(city)) for city in cities],
                            any_order=True)
    lines = use(server, "compare", cities)
    assert lines == [f"{city}: {city[::-1]}" for city in cities]


def test_five_requests_are_served_side_by_side(server, use):
    together = threading.Barrier(5)
    def backend(request):
        together.wait(timeout=20)
        return "ok"
    server.backend = backend
    assert len(use(server, "compare", "abcde")) == 5


def test_one_city_that_fails_does_not_spoil_the_others(server, use):
    server.backend = Script(Reply("yes", expect=last("Oslo")),
                            Reply(error=APIError(400, "No."), expect=last("Rome")),
                            any_order=True)
    lines = use(server, "compare", ["Oslo", "Rome"])
    assert lines == ["Oslo: yes", "Rome: (BadRequestError)"]


# ------ another endpoint, and the desk as a process

def test_another_endpoint_can_be_streamed(use):
    def responses(body):
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": []}
        message = {"type": "message", "id": "msg_1", "role": "assistant", "content": []}
        reply = {"id": "resp_1", "object": "response", "model": "m", "output": []}
        yield {"type": "response.created", "response": reply}
        yield {"type": "response.output_item.added", "output_index": 0, "item": message}
        yield {"type": "response.content_part.added", **place, "part": part}
        text = body["input"].upper()
        yield {"type": "response.output_text.delta", **place, "delta": text}
        whole = {**message, "content": [{**part, "text": text}]}
        yield {"type": "response.completed", "response": {**reply, "output": [whole]}}

    with Server(routes={"/responses": responses}) as server:
        assert use(server, "review", "fine") == "FINE"


def test_the_desk_runs_as_a_process(server):
    server.backend = Script(Reply("4", expect=last("Oslo?")),
                            Reply("21", expect=last("Rome?")))
    found = {"OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "any"}
    done = subprocess.run(
        [sys.executable, "travel.py"], input="Oslo?\nRome?\n", timeout=60,
        env={**os.environ, **found}, stdout=subprocess.PIPE, universal_newlines=True)
    assert done.stdout == "4\n21\n"


def test_a_backend_that_fails_fails_the_test(use):
    def backend(request):
        assert request["temperature"] == 0, "the desk must be sober"
        return "x"
    with pytest.raises(AssertionError, match="sober"):
        with Server(backend) as server:
            lines = use(server, "compare", ["Oslo"], retries=0)
            assert lines == ["Oslo: (InternalServerError)"]
