"""The loads that `make bench-serve` puts on a server, and what is measured under each: one asyncio process."""

import asyncio
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import aiohttp
import psutil

from tests.bench.servers import Server, Stream, ask

PROBE_S = 0.01
MIN_WINDOW_TOKENS = 4
"""Of a stream: over fewer, a rate says nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    counts: Sequence[int] = (1, 2, 4, 8, 16)
    """Streams at once."""
    prompt_tokens: int = 512
    tokens: int = 64
    chat_tokens: int | None = 2000
    """Of a conversation's first turn; None leaves the conversation out."""
    chats: int = 3
    long_tokens: int | None = 1024
    """Of the prompts that arrive among decoding rows; None leaves the mixed load out."""
    long_prompts: int = 4
    decoding: int = 4
    """Streams that decode meanwhile."""
    short_requests: int = 500
    """For the slope of memory."""
    warmup_requests: int = 100
    probes_health: bool = True


QUICK = Plan((1, 8), 128, 32, 512, 1, 256, 2, 4, 60, 20)
SLOW = Plan((1, 8), 64, 12, None, 0, None, 0, 0, 0, 0, probes_health=False)
SHORT_TOKENS = 64
"""Prompt tokens of the streams that decode under the mixed load, and of short requests."""


def lengths(plan: Plan) -> set[int]:
    """The lengths of prompts that a plan needs."""
    return {SHORT_TOKENS, plan.prompt_tokens, *(length for length in (plan.chat_tokens, plan.long_tokens) if length)}


@dataclass(frozen=True, slots=True)
class Streams:
    """What some streams at once did: first with prompts nobody had sent before, then the same again."""

    first_token_s: list[float]
    """Cold, of each stream."""
    total_tok_s: float
    """Cold: all decoded tokens over the time from the first request to the last token, so prefill counts."""
    decode_tok_s: float | None
    """Warm: over all streams, from when the last one got its first token until the first one ended."""
    warm_first_token_s: list[float]
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    """Of the first stream."""


@dataclass(slots=True)
class ServerRun:
    """One server's figures of one round. None: not asked of it."""

    streams: dict[int, Streams] = field(default_factory=dict)
    first_turn_s: float | None = None
    second_turn_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    """Between the tokens of decoding streams, under the mixed load."""
    health_s: list[float] = field(default_factory=list)
    rss_bytes: int = 0
    """At the end."""
    notes: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Prompts:
    """Hands out prompts; none twice, so that no cache knows one."""

    def __init__(self, texts: Mapping[int, list[str]]) -> None:
        self._left: dict[int, Iterator[str]] = {length: iter(made) for length, made in texts.items()}

    def take(self, length: int, count: int) -> list[str]:
        return [next(self._left[length]) for _ in range(count)]


def decode_rate(streams: Sequence[Stream]) -> float | None:
    """Tokens a second while all of them decode; None if that is too short to tell.

    A line may carry more than one token, or a token no text: each stream's lines count for as many tokens as it says.
    """
    begin, end = max(stream.times[0] for stream in streams), min(stream.times[-1] for stream in streams)
    tokens, least = 0.0, math.inf
    for stream in streams:
        seen = sum(begin < moment <= end for moment in stream.times) * stream.tokens / len(stream.times)
        tokens, least = tokens + seen, min(least, seen)
    return tokens / (end - begin) if least >= MIN_WINDOW_TOKENS else None


async def ask_all(server: Server, prompts: Sequence[str], tokens: int) -> list[Stream]:
    """All at once."""
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(server, prompt, tokens)) for prompt in prompts]
    return [task.result() for task in asked]


async def run_streams(server: Server, prompts: Sequence[str], tokens: int) -> Streams:
    """The same prompts cold and warm."""
    cold = await ask_all(server, prompts, tokens)
    warm = await ask_all(server, prompts, tokens)
    seconds = max(stream.times[-1] for stream in cold) - min(stream.begin for stream in cold)
    return Streams(
        first_token_s=[stream.first_s for stream in cold],
        total_tok_s=sum(stream.tokens for stream in cold) / seconds,
        decode_tok_s=decode_rate(warm),
        warm_first_token_s=[stream.first_s for stream in warm],
        prompt_tokens=[stream.prompt_tokens for stream in cold],
        tokens=[stream.tokens for stream in warm],
        text=cold[0].text,
    )


async def run_chats(server: Server, openings: Sequence[str]) -> tuple[float, float]:
    """The median times to the first token of a conversation's first turn and of its second."""
    firsts, seconds = [], []
    for opening in openings:
        first = await ask(server, opening, 32)
        second = await ask(server, f"{opening}{first.text}\n\nAnd what became of the tower in the end?\n\n", 8)
        firsts.append(first.first_s)
        seconds.append(second.first_s)
    return median(firsts), median(seconds)


async def run_mixed(server: Server, short: Sequence[str], long: Sequence[str]) -> list[float]:
    """The gaps between tokens of streams that decode while long prompts arrive, one on the heels of the other."""
    over, (settling, *short) = asyncio.Event(), short
    async with asyncio.TaskGroup() as group:
        decoding = [group.create_task(ask(server, prompt, 1500, over)) for prompt in short]
        try:
            # They all decode once each has had time to say a few words.
            await ask(server, settling, 4)
            async with asyncio.timeout(300):
                for prompt in long:
                    await ask(server, prompt, 4)
        finally:
            over.set()
    streams = [task.result() for task in decoding]
    begin = max(stream.times[0] for stream in streams)
    return [
        later - earlier
        for stream in streams
        for earlier, later in zip(stream.times, stream.times[1:], strict=False)
        if earlier >= begin
    ]


async def run_health(server: Server, prompts: Sequence[str], tokens: int) -> list[float]:
    """How long each probe took while all streams were read and answered."""
    taken: list[float] = []

    async def probe() -> None:
        while True:
            begin = time.perf_counter()
            async with server.session.get(server.health_url) as response:
                await response.read()
            taken.append(time.perf_counter() - begin)
            await asyncio.sleep(PROBE_S)

    probing = asyncio.create_task(probe())
    try:
        await ask_all(server, prompts, tokens)
    finally:
        probing.cancel()
        await asyncio.wait({probing})
    if not probing.cancelled() and isinstance(probing.exception(), aiohttp.ClientError):
        raise LookupError(f"a health probe failed: {probing.exception()!r}")
    return taken


async def run_all(server: Server, texts: Mapping[int, list[str]], plan: Plan) -> ServerRun:
    """Every load of the plan, one after the other. The first that fails is noted and the last."""
    run, prompts = ServerRun(), Prompts(texts)
    await ask(server, *prompts.take(SHORT_TOKENS, 1), 8)
    try:
        for count in plan.counts:
            run.streams[count] = await run_streams(server, prompts.take(plan.prompt_tokens, count), plan.tokens)
        if plan.probes_health:
            run.health_s = await run_health(server, prompts.take(plan.prompt_tokens, max(plan.counts)), plan.tokens)
        if plan.chat_tokens is not None:
            chats = prompts.take(plan.chat_tokens, plan.chats)
            run.first_turn_s, run.second_turn_s = await run_chats(server, chats)
        if plan.long_tokens is not None:
            short = prompts.take(SHORT_TOKENS, plan.decoding + 1)
            long = prompts.take(plan.long_tokens, plan.long_prompts)
            run.gaps_s = await run_mixed(server, short, long)
    except* (LookupError, TimeoutError) as group:
        run.notes += [str(error) or "not done in time" for error in _leaves(group)]
    run.rss_bytes = psutil.Process(server.pid).memory_info().rss
    return run


async def run_short_requests(server: Server, texts: Sequence[str], plan: Plan) -> list[tuple[int, int]]:
    """Many short requests, four at a time; the resident bytes after every tenth behind the warm-up."""
    process, samples = psutil.Process(server.pid), []
    for number in range(0, plan.warmup_requests + plan.short_requests, 4):
        # Each begins another way: nothing of it is in the prefix cache.
        prompts = [f"{number + index}! {texts[(number + index) % len(texts)]}" for index in range(4)]
        await ask_all(server, prompts, 8)
        done = number + 4 - plan.warmup_requests
        if done >= 0 and done % 8 == 0:
            samples.append((done, process.memory_info().rss))
    return samples


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
