"""Tensor parallel: a recorded pass becomes one rank's instructions, each matrix cut as its values are.

A product with a matrix cut by outputs makes a value that is cut; what attention and elementwise operations do with it
stays with the rank; a product of a cut value with a matrix cut by inputs makes a part of a sum. Sums are made when
somebody needs them, so that two branches that are added cost one. Source: Megatron-LM (arXiv 1909.08053).
"""

from collections.abc import Sequence

from models.arch.base import Model
from models.sharding.builder import Builder, GroupOf
from models.sharding.cuts import Place, key_of
from models.sharding.demand import Wish
from models.sharding.program import Program, RankPlan, program
from models.sharding.record import Call, Recorder, Value
from models.sharding.translate import Rule, translate


def plan(model: Model, place: Place, group_of: GroupOf) -> RankPlan:
    """One rank's part of a model. Thread: any.

    Args:
        model: with all of its weights declared.
        place: which rank of how many.
        group_of: of a matrix's name, how many neighbours along its inputs are quantised together.

    Raises:
        Indivisible: heads, widths or groups do not divide among so many ranks.
    """
    assert model.logits is not None
    builder = Builder(place, model.config.hidden_size, group_of, list(model.state))
    ahead = Recorder()
    hidden = model.forward(ahead)
    behind = Recorder(count=ahead.count)
    given = behind.value(hidden.width)
    scores = model.logits(behind, given)
    builder.demands.ask(scores, (Wish(scores.width, what="words"),))
    builder.demands.ask(hidden, (Wish(hidden.width, hidden.width),))
    builder.demands.read([*ahead.calls, *behind.calls])
    table = _output_table(behind.calls)
    forward = _translated(builder, ahead.calls, (), hidden, translate(table))
    first = builder.fresh()
    builder.bind(given, first)
    logits = _translated(builder, behind.calls, (first,), scores, translate(table))
    return RankPlan(forward, logits, tuple(builder.state), builder.shares, tuple(builder.messages))


def _output_table(calls: Sequence[Call]) -> str:
    """The name of what makes words of hidden states."""
    return next((key_of(weight) for call in calls if call.op == "linear" for weight in call.weights), "")


def _translated(
    builder: Builder,
    calls: Sequence[Call],
    given: Sequence[int],
    made: Value,
    rule: Rule,
) -> Program:
    builder.instructions = []
    for call in calls:
        rule(builder, call)
    number = builder.whole(made)
    return program(builder.instructions, given, number)
