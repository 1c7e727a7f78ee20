import numpy as np
import pytest

from tests.demo_model import vocabulary, world


@pytest.mark.parametrize("text", ["", "?!", "A ReD, circle", "ein rotes Quadrat 中文", "a\n\tsquare", "🙂 <|im_end|>"])
def test_any_sentence_becomes_tokens(text):
    encoded = vocabulary.make().encode(vocabulary.frame(text))
    assert encoded.tokens[:2] == [vocabulary.START, "user"]
    assert encoded.tokens[-2:] == [vocabulary.START, "assistant"]


def test_no_phrasing_has_an_unknown_word_or_needs_more_than_32_tokens():
    tokenizer, rng = vocabulary.make(), np.random.default_rng(0)
    texts = [world.caption(rng, ("star", "orange", "grey")) for _ in range(500)]
    for text in (*texts, *(p.text for p in world.held_out_prompts())):
        encoded = tokenizer.encode(vocabulary.frame(text))
        assert vocabulary.UNKNOWN not in encoded.tokens
        assert len(encoded.ids) <= 32


def test_capitals_and_full_stops_change_nothing():
    tokenizer = vocabulary.make()
    assert tokenizer.encode("A Red STAR on grey.").ids == tokenizer.encode("a red star on grey").ids
