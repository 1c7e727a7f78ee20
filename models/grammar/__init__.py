"""Structured output: from a JSON schema or a GBNF grammar to the tokens that it allows next.

The only package that knows the engine (`llguidance`); what it hands out are masks, plain bytes.
"""

from models.grammar.compiler import Compiled, GrammarCompiler
from models.grammar.formats import GBNF, Grammar, JSONSchema, OutputFormat
from models.grammar.matcher import Matcher
from models.grammar.vocabulary import Pieces

__all__ = [
    "GBNF",
    "Compiled",
    "Grammar",
    "GrammarCompiler",
    "JSONSchema",
    "Matcher",
    "OutputFormat",
    "Pieces",
]
