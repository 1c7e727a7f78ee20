"""The schemas and instances of `format`: JSONSchemaBench's sets and JSON-Schema-Test-Suite, as they lie in folders."""

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import GrammarError
from models.grammar import Compiled, GrammarCompiler, JSONSchema
from models.tokenizer import Tokenizer

SEED = 1
DRAFT = "draft2020-12"


@dataclass(frozen=True, slots=True)
class Case:
    """A schema, and what became of it."""

    name: str
    """Its set and its file."""
    schema: Mapping[str, Any]
    seconds: float
    """Of compiling it."""
    compiled: Compiled | None
    refusal: str = ""

    @property
    def is_strict(self) -> bool:
        """Enforced whole."""
        return self.compiled is not None and not self.compiled.ignored


@dataclass(frozen=True, slots=True)
class Group:
    """A schema of the test suite with its instances, and what became of these."""

    keyword: str
    state: str
    """Enforced "whole" or "in part", or "refused"."""
    valid: tuple[bool, ...]
    """For each valid instance: whether it is admitted."""
    invalid: tuple[bool, ...]


def sampled(folder: Path, count: int) -> list[tuple[str, str]]:
    """Names and texts of so many schemas, as many of each set as there is room for, in an order of chance.

    Raises:
        FileNotFoundError: the folder is not JSONSchemaBench's `data`.
    """
    sets = sorted(each for each in folder.iterdir() if each.is_dir())
    if not sets:
        raise FileNotFoundError(f"{folder} has no folders of schemas")
    chance = random.Random(SEED)
    files = []
    for each in sets:
        found = sorted(each.glob("*.json"))
        files += [
            (f"{each.name}/{file.name}", file) for file in chance.sample(found, min(len(found), -(-count // len(sets))))
        ]
    chance.shuffle(files)
    return [(name, file.read_text()) for name, file in files]


def compile_all(compiler: GrammarCompiler, schemas: list[tuple[str, str]]) -> list[Case]:
    """Compile each for the first time."""
    compiler.warm()
    cases = []
    for name, text in schemas:
        begin = time.perf_counter()
        compiled, refusal = None, ""
        try:
            compiled = compiler.compile(JSONSchema(text))
        except GrammarError as error:
            refusal = str(error)
        cases.append(Case(name, json.loads(text), time.perf_counter() - begin, compiled, refusal))
    return cases


def groups(folder: Path, tokenizer: Tokenizer, width: int) -> Iterator[Group]:
    """The required groups of the test suite, strictly where that is possible."""
    compilers = [GrammarCompiler(tokenizer, width, strict=strict) for strict in (True, False)]
    for file in sorted((folder / "tests" / DRAFT).glob("*.json")):
        for group in json.loads(file.read_text()):
            yield _judged(file.stem, group, compilers, tokenizer)


def _judged(
    keyword: str, group: Mapping[str, Any], compilers: Sequence[GrammarCompiler], tokenizer: Tokenizer
) -> Group:
    schema = JSONSchema(json.dumps(group["schema"]))
    for compiler in compilers:
        try:
            compiled = compiler.compile(schema)
        except GrammarError:
            continue
        outcomes: dict[bool, list[bool]] = {True: [], False: []}
        for each in group["tests"]:
            text = json.dumps(each["data"], ensure_ascii=False)
            outcomes[each["valid"]].append(admits(compiled, tokenizer, text))
        strict = compiler is compilers[0]
        return Group(keyword, "whole" if strict else "in part", tuple(outcomes[True]), tuple(outcomes[False]))
    return Group(keyword, "refused", (), ())


def admits(compiled: Compiled, tokenizer: Tokenizer, text: str) -> bool:
    """Whether an answer may be this text and nothing more."""
    tokens = compiled.tokens(text.encode())
    matcher = compiled.matcher()
    if tokens is None or matcher.admitted(tokens) < len(tokens):
        return False
    for token in tokens:
        matcher.accept(token)
    mask = matcher.mask()
    return any(mask[token // 8] >> token % 8 & 1 for token in tokenizer.stop_ids)
