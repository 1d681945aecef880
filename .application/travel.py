"""A travel desk: answers with tools, finds notes, plans, tells and compares."""
import asyncio
import json
import math
import sys

import openai
from pydantic import BaseModel


class Plan(BaseModel):
    city: str
    days: int
    sights: list[str]


class Weather(BaseModel):
    """The weather in a city today."""
    city: str


class Fare(BaseModel):
    """The price of the train between two cities, in euros."""
    start: str
    end: str


class NoAnswer(Exception):
    """The model did not come to an end, or refused."""


INSTRUCTIONS = {"role": "system", "content": "You work at a travel desk. Be brief."}


class Desk:
    """tools: {name: an async function of its fields}; notes: texts to search."""

    def __init__(self, client, tools=None, notes=(), model="gpt-5-mini"):
        self.client, self.tools, self.model = client, tools or {}, model
        self.notes, self.index = list(notes), None

    async def ask(self, question, rounds=4):
        """The answer to a question, after as many tool calls as the model wants."""
        messages = [INSTRUCTIONS, {"role": "user", "content": question}]
        for _ in range(rounds):
            reply = await self.client.chat.completions.create(
                model=self.model, messages=messages, tools=self.offered())
            message = reply.choices[0].message
            if message.refusal:
                raise NoAnswer(message.refusal)
            if not message.tool_calls:
                return message.content
            messages.append(message.model_dump(exclude_none=True))
            messages += await asyncio.gather(*map(self.call, message.tool_calls))
        raise NoAnswer(f"no answer after {rounds} rounds")

    def offered(self):
        known = {"weather": Weather, "fare": Fare}
        return [openai.pydantic_function_tool(known[name], name=name)
                for name in self.tools]

    async def call(self, call):
        """The message that answers a tool call; it tells the model of its mistakes."""
        try:
            fields = json.loads(call.function.arguments)
            content = await self.tools[call.function.name](**fields)
        except (KeyError, TypeError, ValueError) as error:
            content = f"error: {error}"
        return {"role": "tool", "tool_call_id": call.id, "content": str(content)}

    async def plan(self, wish):
        """A wish in words as a Plan."""
        reply = await self.client.chat.completions.parse(
            model=self.model, response_format=Plan,
            messages=[INSTRUCTIONS, {"role": "user", "content": wish}])
        message = reply.choices[0].message
        if message.parsed is None:
            raise NoAnswer(message.refusal)
        return message.parsed

    async def tell(self, question, enough=lambda text: False):
        """The text of an answer as it comes, piece by piece, until it is enough."""
        text, reason = "", None
        async with await self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": question}],
                stream=True, stream_options={"include_usage": True}) as stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    if choice.delta.content:
                        yield choice.delta.content
                    reason = choice.finish_reason or reason
                if enough(text):
                    return
        if reason != "stop":        # the SDK takes a stream that is cut for a whole one
            raise NoAnswer(f"the answer was cut: {reason}")

    async def find(self, question):
        """The note that is nearest to a question."""
        if self.index is None:
            self.index = await self.embed(self.notes)
        place, = await self.embed([question])
        scores = [cosine(place, each) for each in self.index]
        return self.notes[scores.index(max(scores))]

    async def embed(self, texts):
        reply = await self.client.embeddings.create(
            model="text-embedding-3-small", input=texts)
        return [each.embedding for each in reply.data]

    async def answer_from_notes(self, question):
        """Retrieval: the nearest note goes into the question."""
        note = await self.find(question)
        return await self.ask(f"{question}\n\nFrom our notes: {note}")

    async def compare(self, cities):
        """One line for each city, all asked at once; a city that fails says so."""
        async def line(city):
            try:
                return f"{city}: {await self.ask(f'Why {city}?')}"
            except (openai.APIError, NoAnswer) as error:
                return f"{city}: ({type(error).__name__})"
        return await asyncio.gather(*map(line, cities))

    async def ask_within(self, question, seconds):
        """The answer, or None if it takes too long; then the request is cancelled."""
        try:
            return await asyncio.wait_for(self.ask(question), seconds)
        except asyncio.TimeoutError:
            return None

    async def review(self, text):
        """What the newer endpoint says, streamed; the whole of it."""
        async with self.client.responses.stream(model=self.model, input=text) as stream:
            return (await stream.get_final_response()).output_text


def cosine(a, b):
    product = sum(x * y for x, y in zip(a, b))
    return product / (math.hypot(*a) * math.hypot(*b) or 1)


async def main():
    """The desk as a process: a question on each line of standard input."""
    async with openai.AsyncOpenAI(max_retries=2) as client:
        desk = Desk(client)
        for line in sys.stdin:
            async for piece in desk.tell(line.strip()):
                print(piece, end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    asyncio.run(main())
