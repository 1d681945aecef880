import array
import asyncio
import base64

import openai
import pytest

from openai_compat import Server
from travel import Desk

async def weather(city):
    await asyncio.sleep(0)
    return {"Oslo": 4, "Rome": 21}[city]

async def fare(start, end):
    return 80 + len(start) + len(end)

TOOLS = {"weather": weather, "fare": fare}


def embeddings(body):
    """A vector for each text: how often each letter of "oslrme" stands in it."""
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    vectors = [[float(text.lower().count(letter)) for letter in "oslrme"]
               for text in texts]
    if body.get("encoding_format") == "base64":
        vectors = [base64.b64encode(array.array("f", each)).decode()
                   for each in vectors]
    return {"object": "list", "model": body["model"],
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
            "data": [{"object": "embedding", "index": i, "embedding": each}
                     for i, each in enumerate(vectors)]}


@pytest.fixture
def server():
    with Server(routes={"/embeddings": embeddings}) as server:
        yield server


@pytest.fixture
def use():
    """use(server, "method", ...): what a Desk's method returns."""
    def use(server, method, *args, notes=(), retries=2, timeout=20, **kwargs):
        async def work():
            async with openai.AsyncOpenAI(
                    base_url=server.base_url, api_key="any", max_retries=retries,
                    timeout=timeout) as client:
                desk = Desk(client, TOOLS, notes)
                result = getattr(desk, method)(*args, **kwargs)
                if hasattr(result, "__aiter__"):
                    return [piece async for piece in result]
                return await result
        return asyncio.run(work())
    return use
