"""Order without counting: users come in program order after any sequence of insertions, moves and erasures."""

import random

import pytest

from autosp_ir.ir.graph import Graph, Node


def numbers(graph: Graph) -> list[int]:
    return [n._order for n in graph.nodes]


@pytest.mark.parametrize("seed", range(5))
def test_numbers_follow_program_order(seed: int) -> None:
    choose = random.Random(seed)
    graph = Graph()
    source = graph.create("placeholder", name="x").result
    graph.create("output", ((source,),))
    nodes: list[Node] = []
    for _ in range(400):
        anchor = choose.choice(nodes) if nodes else graph.output_node
        action = choose.random()
        if action < 0.5 or not nodes:
            nodes.append(graph.create("aten.relu", (source,), before=anchor))
        elif action < 0.7:
            nodes.append(graph.create("aten.relu", (source,), after=anchor))
        elif action < 0.9:
            graph.move(choose.choice(nodes), before=anchor)
        else:
            graph.erase(nodes.pop(nodes.index(anchor)))
    assert numbers(graph) == sorted(set(numbers(graph)))
    assert source.users == [*(n for n in graph.nodes if n in set(nodes)), graph.output_node]


def test_crowded_places_are_renumbered() -> None:
    graph = Graph()
    first = graph.create("placeholder", name="x")
    graph.create("output", ((first.result,),))
    for _ in range(200):
        graph.create("aten.relu", (first.result,), after=first)
    assert numbers(graph) == sorted(set(numbers(graph)))
