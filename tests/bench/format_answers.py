"""Answers by schemas over HTTP, of our runner and of llama-server, many at once; which of them are valid."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import jsonschema

from tests.bench.format_schemas import Case
from tests.bench.servers import Server

STREAMS = 8
SEED = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `refusal` says why there is none."""

    case: Case
    text: str = ""
    tokens: int = 0
    finished: bool = False
    refusal: str = ""

    @property
    def problem(self) -> str:
        """Why it is not valid; empty if it is, or if nobody can tell."""
        try:
            value = json.loads(self.text)
        except ValueError as error:
            return f"not JSON: {error}"
        try:
            validator = jsonschema.validators.validator_for(self.case.schema, default=jsonschema.Draft202012Validator)
            error = next(validator(self.case.schema).iter_errors(value), None)
        except Exception as trouble:  # noqa: BLE001 - of a schema that the judge itself cannot read
            return "" if isinstance(trouble, RecursionError) else f"not judged: {trouble}"[:120]
        return "" if error is None else f"{error.validator}: {error.message}"[:160]


@dataclass(frozen=True, slots=True)
class Told:
    """The answers of one server, and how long all took."""

    answers: Sequence[Answer]
    seconds: float

    @property
    def finished(self) -> list[Answer]:
        return [each for each in self.answers if each.finished]

    @property
    def tokens_s(self) -> float:
        return sum(each.tokens for each in self.answers) / self.seconds


def prompt_of(case: Case) -> str:
    """The model's own chat format."""
    title = case.schema.get("title") or case.schema.get("description") or case.name.partition("/")[2]
    question = f"Give a short example of this in JSON: {str(title)[:200]}"
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


async def answers(server: Server, cases: Sequence[Case], tokens: int, temperature: float) -> Told:
    """Ask for all, so many at once."""
    turn = asyncio.Semaphore(STREAMS)
    ask = _ask_llama if server.kind == "llama.cpp" else _ask_runner

    async def one(case: Case) -> Answer:
        async with turn:
            try:
                return await ask(server, case, tokens, temperature)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                return Answer(case, refusal=f"{type(error).__name__}: {error}"[:160])

    begin = time.perf_counter()
    found = await asyncio.gather(*map(one, cases))
    return Told(found, time.perf_counter() - begin)


async def _ask_runner(server: Server, case: Case, tokens: int, temperature: float) -> Answer:
    options = {"num_predict": tokens, "temperature": temperature, "seed": SEED}
    body = {"Prompt": prompt_of(case), "Format": case.schema, "Options": options}
    async with server.session.post(server.url + "/v1/completions", json=body) as response:
        if response.status != 200:
            return Answer(case, refusal=(await response.text()).strip()[:160])
        lines: list[Mapping[str, Any]] = [json.loads(line) async for line in response.content]
    last = lines[-1]
    if "Error" in last:
        return Answer(case, refusal=str(last["Error"]["error"])[:160])
    text = "".join(line["Content"] for line in lines)
    return Answer(case, text, last["EvalCount"], last["DoneReason"] == 0)


async def _ask_llama(server: Server, case: Case, tokens: int, temperature: float) -> Answer:
    body = {"prompt": prompt_of(case), "json_schema": case.schema, "n_predict": tokens, "temperature": temperature}
    async with server.session.post(server.url + "/completion", json=body | {"seed": SEED}) as response:
        said = await response.text()
        if response.status != 200:
            return Answer(case, refusal=said.strip()[:160])
    answer = json.loads(said)
    return Answer(case, answer["content"], answer["tokens_predicted"], answer["stop_type"] != "limit")


def counted(told: Told, chosen: Callable[[Answer], bool] = lambda _: True) -> tuple[int, int]:
    """Finished answers, and those of them that are valid."""
    finished = [each for each in told.finished if chosen(each)]
    return len(finished), sum(not each.problem for each in finished)
