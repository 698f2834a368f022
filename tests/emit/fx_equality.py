"""Structural equality of FX graphs: operation, target, arguments, name, meta and annotation of every node."""

from typing import Any

import torch
from torch import fx


def plain(structure: Any) -> Any:
    """Arguments with nodes replaced by their names, comparable with ==, types included."""
    if isinstance(structure, fx.Node):
        return ("%", structure.name)
    if isinstance(structure, tuple | list):
        kind = "tuple" if isinstance(structure, tuple) else "list"
        return (kind, [plain(s) for s in structure])
    if isinstance(structure, dict):
        return {k: plain(v) for k, v in structure.items()}
    if isinstance(structure, slice):
        return ("slice", plain(structure.start), plain(structure.stop), plain(structure.step))
    return (type(structure).__name__, structure)


def attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def assert_same_graph(before: fx.GraphModule, after: fx.GraphModule) -> None:
    """Fail on the first difference between two graph modules."""
    olds, news = list(before.graph.nodes), list(after.graph.nodes)
    assert [n.name for n in olds] == [n.name for n in news]
    for old, new in zip(olds, news, strict=True):
        assert (old.op, old.target, old.type) == (new.op, new.target, new.type), old.format_node()
        assert plain(old.args) == plain(new.args), old.format_node()
        assert plain(old.kwargs) == plain(new.kwargs), old.format_node()
        assert list(old.meta) == list(new.meta), old.format_node()
        assert all(old.meta[k] is new.meta[k] for k in old.meta), old.format_node()
        if old.op not in ("get_attr", "call_module"):
            continue
        held, given = attribute(before, str(old.target)), attribute(after, str(old.target))
        if isinstance(held, fx.GraphModule) and old.op == "get_attr":
            assert_same_graph(held, given)
        elif isinstance(held, torch.Tensor):
            assert held is given
    after.graph.lint()
    assert before.graph.python_code("self").src == after.graph.python_code("self").src
