"""What a vocabulary's decoder makes of its tokens' texts. Source: tokenizers' decoders (ByteLevel, Metaspace, …).

Thread: any.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import tokenizers


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the texts of a vocabulary stand for bytes, as its decoder says."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    strips_space: bool

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> "Decoding":
        """What a vocabulary's decoder does."""
        decoder = backend.decoder
        steps = [] if decoder is None else list(_decoder_steps(json.loads(decoder.__getstate__())))
        names = {str(step["type"]) for step in steps}
        return cls(
            byte_level="ByteLevel" in names,
            byte_fallback="ByteFallback" in names,
            replacements=tuple(pair for step in steps for pair in _replacements(step)),
            strips_space=any(_strips_space(step) for step in steps),
        )

    def plain(self, text: str) -> bytes:
        """The bytes of an ordinary token's text."""
        if self.byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in text)
            except KeyError:
                return text.encode()
        if self.byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes.fromhex(text[3:5])
            except ValueError:
                pass
        return self.replaced(text)

    def replaced(self, text: str) -> bytes:
        """The bytes of a text that stands for itself but for what the decoder replaces."""
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text.encode()


def _decoder_steps(decoder: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    children = decoder.get("decoders")
    if isinstance(children, list):
        for child in children:
            yield from _decoder_steps(child)
    else:
        yield decoder


def _replacements(step: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    match step:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            yield old, new
        case {"type": "Metaspace", "replacement": str(old)}:
            yield old, " "


def _strips_space(step: Mapping[str, object]) -> bool:
    match step:
        case {"type": "Strip", "content": " ", "start": int(start)}:
            return start > 0
        case {"type": "Metaspace"}:
            return step.get("prepend_scheme", "always") != "never"
    return False


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins for the 256 bytes: printable Latin-1 stands for itself, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
