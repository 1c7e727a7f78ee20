"""The tree against the slowest way of doing the same: a list of everything that was stored."""

import random
from dataclasses import dataclass
from typing import Self

from runner.engine.radix_tree import RadixTree


@dataclass(frozen=True)
class Letters:
    """A value that knows which tokens it is for; a byte a token."""

    text: str

    @property
    def nbytes(self) -> int:
        return len(self.text)

    def part(self, begin: int, end: int) -> Self:
        return type(self)(self.text[begin:end])


def tokens(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def store(tree: RadixTree[Letters, Letters], text: str) -> None:
    begin = tree.depth(tokens(text))
    tree.insert(tokens(text), begin, Letters(text[begin:]))


def found(tree: RadixTree[Letters, Letters], text: str) -> str:
    length, values, _ = tree.match(tokens(text))
    joined = "".join(value.text for value in values)
    assert len(joined) == length
    return joined


def test_an_empty_tree_knows_nothing():
    tree = RadixTree[Letters, Letters](100)
    assert found(tree, "abc") == ""
    assert (len(tree), tree.nbytes) == (0, 0)


def test_the_longest_common_beginning_is_found_whoever_stored_it():
    tree = RadixTree[Letters, Letters](100)
    for text in ("the cat sat", "the cow", "a dog"):
        store(tree, text)
    assert found(tree, "the cat ran") == "the cat "
    assert found(tree, "the cows") == "the cow"
    assert found(tree, "the c") == "the c"
    assert found(tree, "a") == "a"
    assert found(tree, "x") == ""


def test_what_begins_alike_is_stored_once():
    tree = RadixTree[Letters, Letters](100)
    store(tree, "shared beginning, one")
    store(tree, "shared beginning, two")
    assert tree.nbytes == len("shared beginning, ") + 3 + 3
    store(tree, "shared beginning, two")
    store(tree, "shared")
    assert tree.nbytes == len("shared beginning, ") + 3 + 3


def test_the_longest_unused_branch_goes_first_and_the_shared_beginning_last():
    tree = RadixTree[Letters, Letters](12)
    store(tree, "abc-1111")
    store(tree, "abc-2222")
    assert found(tree, "abc-1111") == "abc-1111"
    store(tree, "abc-3333")
    assert found(tree, "abc-2222") == "abc-"
    assert found(tree, "abc-1111") == "abc-1111"
    assert found(tree, "abc-3333") == "abc-3333"
    assert tree.nbytes == 12


def test_a_value_larger_than_the_limit_is_not_stored_and_costs_nobody_his_place():
    tree = RadixTree[Letters, Letters](8)
    store(tree, "small")
    store(tree, "much too large")
    assert found(tree, "small") == "small"
    assert found(tree, "much") == ""


def test_what_was_just_stored_is_not_evicted_for_itself():
    tree = RadixTree[Letters, Letters](8)
    store(tree, "abcdef")
    store(tree, "abcdefgh")
    assert found(tree, "abcdefgh") == "abcdefgh"
    store(tree, "abcdefgh12")
    assert tree.nbytes <= 8
    assert found(tree, "abcdefgh12") == "abcdefgh"


def test_a_row_that_grows_beyond_the_limit_keeps_its_beginning():
    tree = RadixTree[Letters, Letters](8)
    for length in range(3, 30, 3):
        store(tree, "abcdefghijklmnopqrstuvwxyz0123"[:length])
        assert tree.nbytes <= 8
    assert found(tree, "abcdefghijkl") == "abcdef"


def test_random_texts_are_found_as_far_as_any_stored_one_agrees():
    generator = random.Random(7)
    for _ in range(200):
        tree, stored = RadixTree[Letters, Letters](10**6), []
        for _ in range(generator.randint(1, 12)):
            text = "".join(generator.choice("ab") for _ in range(generator.randint(1, 12)))
            store(tree, text)
            stored.append(text)
            probe = "".join(generator.choice("ab") for _ in range(generator.randint(1, 14)))
            agreeing = [len([1 for n in range(1, len(s) + 1) if probe[:n] == s[:n]]) for s in stored]
            assert found(tree, probe) == probe[: max(agreeing)]
        prefixes = {s[:n] for s in stored for n in range(1, len(s) + 1)}
        assert tree.nbytes == len(prefixes)


def test_under_a_limit_it_holds_no_more_and_what_it_finds_is_true():
    generator = random.Random(8)
    tree = RadixTree[Letters, Letters](40)
    for _ in range(500):
        text = "".join(generator.choice("abc") for _ in range(generator.randint(1, 20)))
        store(tree, text)
        assert tree.nbytes <= 40
        probe = "".join(generator.choice("abc") for _ in range(20))
        assert probe.startswith(found(tree, probe))


def test_what_is_touched_is_evicted_last():
    tree = RadixTree[Letters, Letters](20)
    for text in ("first 123", "other 456"):
        store(tree, text)
    tree.touch(tokens("first 1"))
    tree.shrink(9)
    assert found(tree, "first 123") == "first 123"
    assert found(tree, "other 456") == ""


def marked(limit: int, *texts: str) -> RadixTree[Letters, Letters]:
    """A tree that needs checkpoints, each of one byte, with these texts stored and marked."""
    tree = RadixTree[Letters, Letters](limit, needs_checkpoints=True)
    for text in texts:
        begin = tree.depth(tokens(text))
        if begin < len(text):
            tree.insert(tokens(text), begin, Letters(text[begin:]), Letters("!"))
        else:
            tree.mark(tokens(text), Letters("!"))
    return tree


def test_what_needs_checkpoints_is_of_use_up_to_the_last_one():
    tree = marked(100, "abcd", "abcdefgh")
    assert [tree.resumable(tokens(text)) for text in ("abc", "abcd", "abcdefg", "abcdefgh", "abcdefghi", "x")] == [
        0,
        4,
        4,
        8,
        8,
        0,
    ]
    assert found(tree, "abcdefgX") == "abcd"
    assert tree.match(tokens("abcdX"))[2] == Letters("!")
    assert tree.match(tokens("abX"))[2] is None
    assert tree.depth(tokens("abX")) == 2


def test_a_place_that_divides_leaves_its_checkpoint_behind_the_lower_half_and_may_get_one():
    tree = marked(100, "shared-one", "shared-two")
    assert found(tree, "shared-three") == ""
    assert found(tree, "shared-one!") == "shared-one"
    held = tree.nbytes
    tree.mark(tokens("shared-"), Letters("!"))
    tree.mark(tokens("shared-"), Letters("twice"))
    assert tree.nbytes == held + 1
    assert found(tree, "shared-three") == "shared-"


def test_a_checkpoint_in_the_middle_of_an_edge_divides_it():
    tree = marked(100, "abcdefgh", "abcd")
    assert found(tree, "abcdX") == "abcd"
    assert found(tree, "abcdefghX") == "abcdefgh"
    assert tree.nbytes == 10


def test_between_two_checkpoints_the_one_that_spares_the_fewest_tokens_goes_first():
    texts = ["a" * length for length in (10, 20, 22, 30)]
    tree = marked(100, *texts)
    held = tree.nbytes
    tree.shrink(held - 1)
    assert [tree.resumable(tokens(text)) for text in texts] == [10, 20, 20, 30]
    tree.shrink(held - 2)
    assert [tree.resumable(tokens(text)) for text in texts] == [10, 10, 10, 30]
    # The first and the last stay; then the end goes, with what led to it alone.
    tree.shrink(held - 3)
    assert [tree.resumable(tokens(text)) for text in texts] == [10] * 4
    assert tree.nbytes == 11


def test_a_checkpoint_where_branches_part_is_not_given_up_for_room():
    tree = marked(100, "sys", "system", "systema", "systemb")
    tree.shrink(tree.nbytes - 1)
    assert found(tree, "systemX") == "system"


def test_of_what_needs_checkpoints_nothing_is_held_that_is_of_no_use():
    generator = random.Random(9)
    tree = RadixTree[Letters, Letters](60, needs_checkpoints=True)
    for _ in range(500):
        text = "".join(generator.choice("ab") for _ in range(generator.randint(1, 25)))
        begin = tree.depth(tokens(text))
        if begin < len(text):
            tree.insert(tokens(text), begin, Letters(text[begin:]), Letters("!"))
        else:
            tree.mark(tokens(text), Letters("!"))
        assert tree.nbytes <= 60
        probe = "".join(generator.choice("ab") for _ in range(25))
        assert probe.startswith(found(tree, probe))
        for node in tree._nodes():
            assert node.children or node.checkpoint is not None
