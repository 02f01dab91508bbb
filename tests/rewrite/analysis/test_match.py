"""Patterns: what matches, what does not and why, and that finding costs linear work."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite import Program
from rewrite.analysis import match, writes
from rewrite.analysis.match import Call, Layer, Match, Var, find
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import aten
from rewrite.pipeline.context import Context
from rewrite.pipeline.rules import Rule, apply_rules
from tests.captures import capture

DIM = 8


def captured_of(function: Any, **layers: nn.Module) -> Program:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            result = function(self, x)
            return result

    model = Model()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return capture(model, (torch.randn(2, DIM),)).clone()


def names(match: Match) -> list[str]:
    return [n.name for n in match.nodes]


TANH_OF_NEG = Call(aten.tanh.default, Call(aten.neg.default, Var("x"), name="inner"))
ADD = Call(aten.add.Tensor, Var("a"), Var("b"))


def sums(function: Any) -> int:
    return len(list(find(captured_of(function), Call(aten.sin.default, Call(aten.neg.default, Var("x"))))))


def test_match_names_its_root_its_nodes_and_its_values() -> None:
    program = captured_of(lambda m, x: (-x).sin())
    (found,) = find(program, Call(aten.sin.default, Call(aten.neg.default, Var("x"), name="inner"), name="outer"))
    assert found["outer"] is found.root
    assert found["inner"] is found.nodes[0]
    assert found["x"].op == "placeholder"
    assert found.nodes[-1] is found.root


def test_layers_match_by_class_and_subclass() -> None:
    program = captured_of(lambda m, x: m.b(m.a(x)), a=nn.Linear(DIM, DIM), b=nn.Linear(DIM, 3))
    pattern = Layer(nn.Linear, Layer((nn.Linear, nn.Conv2d), Var("x"), name="first"), name="second")
    (found,) = find(program, pattern)
    assert (found["first"].target, found["second"].target) == ("a", "b")
    assert list(find(program, Layer(nn.LayerNorm, Var("x")))) == []
    assert len(list(find(program, Layer(nn.Module, Var("x"))))) == 2


def test_one_name_stands_for_one_value() -> None:
    squared = Call(aten.mul.Tensor, Var("x"), Var("x"))
    assert len(list(find(captured_of(lambda m, x: x * x), squared))) == 1
    assert list(find(captured_of(lambda m, x: x * (x + 1)), squared)) == []


def test_literals_must_be_equal() -> None:
    program = captured_of(lambda m, x: x + 1)
    assert len(list(find(program, Call(aten.add.Tensor, Var("x"), 1)))) == 1
    assert list(find(program, Call(aten.add.Tensor, Var("x"), 2))) == []


def test_one_of_several_targets() -> None:
    program = captured_of(lambda m, x: x.sin() + x.cos())
    assert len(list(find(program, Call((aten.sin.default, aten.cos.default), Var("x"))))) == 2


def test_inner_node_with_another_user_does_not_match() -> None:
    def shared(m: Any, x: Tensor) -> Any:
        y = -x
        return y.sin(), y

    assert sums(shared) == 0
    assert sums(lambda m, x: ((-x).sin(), -x)) == 1


def test_write_into_the_source_in_between_is_never_crossed() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        x = x + 0
        y = -x
        x.mul_(2)
        return y.sin() + x

    assert sums(written) == 0


def test_write_through_a_view_in_between_is_never_crossed() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        x = x + 0
        y = -x
        x.view(-1)[1:].mul_(2)
        return y.sin() + x

    assert sums(written) == 0


def test_write_by_an_inplace_layer_in_between_is_never_crossed() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        x = x + 0
        y = -x
        m.relu(x)
        return y.sin() + x

    program = captured_of(written, relu=nn.ReLU(inplace=True))
    assert list(find(program, Call(aten.sin.default, Call(aten.neg.default, Var("x"))))) == []


def test_write_into_a_functional_activation_in_between_is_never_crossed() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        x = x + 0
        y = -x
        nn.functional.leaky_relu_(x)
        return y.sin() + x

    assert sums(written) == 0


def test_write_into_a_captured_submodule_in_between_is_never_crossed() -> None:
    """A region that holds an in-place operator writes as the operator does."""

    def written(m: Any, x: Tensor) -> Tensor:
        x = x + 0
        y = -x
        if m.training:
            x.mul_(2)
        return y.sin() + x

    assert sums(written) == 0


def test_write_elsewhere_before_or_after_does_no_harm() -> None:
    def elsewhere(m: Any, x: Tensor) -> Tensor:
        other = x + 1
        y = -x
        other.mul_(2)
        return y.sin() + other

    def before(m: Any, x: Tensor) -> Tensor:
        x = x + 0
        x.mul_(2)
        return (-x).sin()

    def after(m: Any, x: Tensor) -> Tensor:
        y = (-x).sin()
        y.mul_(2)
        return y

    assert [sums(elsewhere), sums(before), sums(after)] == [1, 1, 1]


class DropDoubleNegation(Rule):
    """-(-x) -> x, unless x is the graph's input."""

    pattern = Call(aten.neg.default, Call(aten.neg.default, Var("x")))

    def check(self, match: Match, program: Program) -> str | None:
        return "it is the input itself" if match["x"].op == "placeholder" else None

    def rewrite(self, match: Match, program: Program, context: Context) -> None:
        context.edit.rewire(match.root, match["x"])
        for node in reversed(match.nodes):
            context.edit.remove(node)


def applied(program: Program) -> tuple[int, Context]:
    context = Context(Editor(program, "test"))
    done = apply_rules(program, context, DropDoubleNegation())
    program.graph.lint()
    program.module.recompile()
    return done, context


def test_rule_rewrites_what_its_check_lets_pass_and_says_why_not() -> None:
    program = captured_of(lambda m, x: x.neg().neg().sin() + (x + 1).neg().neg().cos())
    done, context = applied(program)
    x = torch.randn(3, DIM)
    assert done == 1
    assert torch.equal(program.module(x), x.sin() + (x + 1).cos())
    assert [s.reason for s in context.skipped] == ["it is the input itself"]


@pytest.mark.parametrize(("count", "done"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_overlapping_matches_are_applied_once(count: int, done: int) -> None:
    def negated(m: Any, x: Tensor) -> Tensor:
        x = x + 1
        for _ in range(count):
            x = -x
        return x.sin()

    program = captured_of(negated)
    assert applied(program)[0] == done
    x = torch.randn(3, DIM)
    assert torch.equal(program.module(x), ((-1) ** count * (x + 1)).sin())


def test_adjacent_matches_are_all_applied() -> None:
    program = captured_of(lambda m, x: (x + 1).neg().neg().sin().neg().neg())
    done, _ = applied(program)
    x = torch.randn(3, DIM)
    assert done == 2
    assert torch.equal(program.module(x), (x + 1).sin())


def chain(count: int) -> Program:
    """A graph of ``count`` disjoint matches of a double negation, made by hand."""
    program = captured_of(lambda m, x: x + 1)
    output = program.graph.output_node()
    last: Node = output.all_input_nodes[0]
    first = last
    with program.graph.inserting_before(output):
        for _ in range(count):
            for target in (aten.neg.default, aten.neg.default, aten.sin.default):
                made = program.graph.call_function(target, (last,))
                made.meta["val"] = first.meta["val"]
                last = made
    output.replace_input_with(first, last)
    return program


def visits(count: int) -> tuple[int, int]:
    """The matches in such a graph, and how many times a pattern was held against a value to find them."""
    program = chain(count)
    with (
        mock.patch.object(match, "matches", wraps=match.matches) as matcher,
        mock.patch.object(writes, "_written", wraps=writes._written) as written,
    ):
        found = len(list(find(program, DropDoubleNegation.pattern)))
    return found, matcher.call_count + written.call_count


def test_cost_is_linear_in_the_matches() -> None:
    few, many = visits(400), visits(1600)
    assert (few[0], many[0]) == (400, 1600)
    assert many[1] < 4.5 * few[1]
    assert many[1] < 20 * 1600


def test_many_rewrites_are_all_made() -> None:
    program = chain(1600)
    done, context = applied_without_compiling(program)
    assert done == 1600
    assert sum(c.kind == "rewire" for c in context.edit.changes) == 1600
    assert len(program.graph.find_nodes(op="call_function", target=aten.neg.default)) == 0


def applied_without_compiling(program: Program) -> tuple[int, Context]:
    context = Context(Editor(program, "test"))
    return apply_rules(program, context, DropDoubleNegation()), context
