"""Grammars over a vocabulary of bytes, and texts put through them."""

from models.grammar import Compiled, Grammar, GrammarCompiler, JSONSchema
from tests.fakes import VOCABULARY, ByteTokenizer


def compiled(grammar: Grammar | str, **options: bool) -> Compiled:
    """The grammar for `ByteTokenizer`; a text is a schema."""
    grammar = JSONSchema(grammar) if isinstance(grammar, str) else grammar
    spaced = options.pop("spaced", False)
    return GrammarCompiler(ByteTokenizer(), VOCABULARY, **options).compile(grammar, spaced=spaced)


def allowed(mask: bytes) -> set[int]:
    """The ids that a mask lets through."""
    return {token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1}


def admits(grammar: Compiled, text: str) -> bool:
    """Whether an answer may be this text and nothing more."""
    matcher = grammar.matcher()
    said = list(text.encode())
    if matcher.admitted(said) < len(said):
        return False
    for token in said:
        matcher.accept(token)
    return bool(allowed(matcher.mask()) & ByteTokenizer.stop_ids)
