"""Programs as Python, JSON, networkx and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

from autosp_ir.capture.fx_import import import_graph
from autosp_ir.emit.fx_export import executable
from autosp_ir.errors import AutoSPError, ParseError, UnsupportedError
from autosp_ir.ir.graph import Origin
from autosp_ir.ir.ops import OpDef
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse, structurally_equal
from autosp_ir.ir.types import Shard
from autosp_ir.sim.fuzz import random_graph
from autosp_ir.viz import dot
from autosp_ir.viz.dot import Drawing
from tests.ir.programs import everything, find, linear, tensor


def run_python(source: str, *inputs: Any, **names: Any) -> Any:
    namespace: dict[str, Any] = dict(names)
    exec(source, namespace)
    return namespace["program"](*inputs)


def test_python_reads_well() -> None:
    assert (
        linear().to_python()
        == '''"""Stage forward."""

import operator
import torch

aten = torch.ops.aten


def program(
    weight,  # f32[8, 4]
    x,  # f32[2, 6, 4]
):
    # model.py:12 layers.0.proj
    linear = aten.linear.default(x, weight)  # f32[2, 6, 8]
    split = aten.split.Tensor(linear, 4, -1)  # (f32[2, 6, 4], f32[2, 6, 4])
    half = operator.getitem(split, 1)  # f32[2, 6, 4]
    total = aten.sum.dim_IntList(half, [0, 1, 2])  # f32[]
    return (total,)
'''
    )


@pytest.mark.parametrize("seed", range(40))
def test_python_computes_what_the_program_computes(seed: int) -> None:
    program = random_graph(seed)
    torch.manual_seed(seed)
    inputs = [torch.randn(tuple(n.result.tensor_type.shape)) for n in program.graph.inputs]
    # The IR has no strides: its views are reshapes where it runs.
    source = program.to_python().replace("aten.view.", "aten.reshape.").replace("aten._unsafe_view.", "aten.reshape.")
    torch.testing.assert_close(run_python(source, *inputs), executable(program)(*inputs), equal_nan=True)


def test_python_of_every_notation_compiles() -> None:
    source = everything().to_python()
    compile(source, "program", "exec")
    assert "# ---- recompute" in source
    assert "def graph_body(" in source
    assert 'float("nan")' in source
    assert "op=aten.add.Tensor" in source


def test_names_that_python_owns_get_an_underscore() -> None:
    program = linear()
    program.graph.rename(program.graph.value("half"), "sum")
    program.graph.rename(program.graph.value("total"), "sum_")
    source = program.to_python()
    assert "    sum__ = operator.getitem(split, 1)" in source
    assert "    sum_ = aten.sum.dim_IntList(sum__, [0, 1, 2])" in source


class Branches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        chosen: torch.Tensor = torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (y,))
        return chosen


def test_nested_graphs_read_back_verify_and_run_as_python() -> None:
    model, x = Branches(), torch.ones(2, 4)
    program = import_graph(torch.export.export(model, (x,)).graph_module)
    parsed = parse(str(program))
    assert parsed == program
    assert len(parsed.attrs) == 2
    parsed.verify()
    (result,) = run_python(program.to_python(), model.inner.weight, model.inner.bias, x)
    torch.testing.assert_close(result, model(x))


class Parts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.scale = torch.nn.Parameter(torch.full([4], 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.inner(x) * self.scale
        return scaled.relu()


def test_submodules_methods_and_attributes_read_back_and_run_as_python() -> None:
    model, x = Parts(), torch.ones(2, 4)
    program = import_graph(torch.fx.symbolic_trace(model), [x])
    program.verify()
    parsed = parse(str(program))
    assert structurally_equal(parsed, program) is None
    result = run_python(program.to_python(), x, modules={"inner": model.inner}, attrs={"scale": model.scale})
    torch.testing.assert_close(result, model(x))


def test_what_python_cannot_name_is_refused() -> None:
    program = linear()
    program.graph.create(OpDef("elsewhere.<lambda>", len), (program.graph.value("x"),))
    with pytest.raises(UnsupportedError, match="cannot be named in Python"):
        program.to_python()
    program = linear()
    program.graph.create("aten.relu", (object(),))
    with pytest.raises(UnsupportedError, match="has no Python notation"):
        program.to_python()


@pytest.mark.parametrize("build", [linear, everything, lambda: random_graph(7)], ids=["linear", "everything", "random"])
def test_json_reads_back(build: Any) -> None:
    program = build()
    document = json.loads(program.to_json())
    assert [n["name"] for n in document["nodes"]] == [n.name for n in program.graph.nodes]
    assert structurally_equal(Program.from_json(program.to_json()), program) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"nodes": []}', '{"text": "autosp-ir 9"}'])
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(ParseError):
        Program.from_json(text)


def test_networkx_shows_every_use() -> None:
    program = linear()
    program.graph.output_node.set_args(((program.graph.value("total"), program.graph.value("total")),))
    view = program.to_networkx()
    assert list(view) == ["weight", "x", "linear", "split", "half", "total", "output"]
    assert view.number_of_edges("total", "output") == 2
    assert view.edges["x", "linear", 0]["index"] == 0
    assert view.nodes["linear"]["text"] == "f32[2, 6, 8]"
    assert view.nodes["linear"]["module"] == "layers.0.proj"
    assert view.nodes["half"]["op"] == "operator.getitem"
    assert nx.dag_longest_path_length(nx.DiGraph(view)) == 5


def drawn() -> Program:
    program = linear()
    program.mesh = {"sp": 2}
    program.graph.value("x").type = tensor(2, 6, 4, sp=Shard(1))
    find(program, "split").origin = Origin("model.py:14", "layers.0.proj")
    find(program, "half").origin = Origin("model.py:15", "layers.0")
    return program


def test_dot_draws_modules_as_clusters_and_layouts_as_colours() -> None:
    source = drawn().to_dot().source
    assert "subgraph cluster_layers {" in source
    assert 'subgraph "cluster_layers.0.proj" {' in source
    assert dot.COLORS[Shard] in source
    assert '"%half" -> "%total"' in source


def test_dot_of_one_module_shows_what_enters_and_leaves_it() -> None:
    source = drawn().to_dot(module="layers.0.proj").source
    assert '"%split" -> "%half"' in source
    assert "style=dashed" in source
    assert "%total" not in source


def test_dot_at_a_depth_draws_deeper_modules_as_one_box() -> None:
    source = drawn().to_dot(depth=2).source
    assert '"module/layers/0/proj"' in source
    assert "2 operations" in source
    assert '"module/layers/0/proj" -> "%half"' in source
    assert "%split" not in source


def test_dot_of_an_unknown_module_names_the_known_ones() -> None:
    with pytest.raises(AutoSPError, match=r"no node belongs to the module 'layers\.1'") as caught:
        drawn().to_dot(module="layers.1")
    assert "the modules are layers.0, layers.0.proj" in str(caught.value)


def without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)


def test_a_drawing_falls_back_to_dot_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_graphviz(monkeypatch)
    drawing = drawn().show()
    assert str(drawing).startswith("digraph program {")
    assert drawing.save(tmp_path / "program.dot").read_text() == drawing.source
    shown = drawing._repr_mimebundle_()
    assert list(shown) == ["text/plain"]
    assert "Graphviz is not installed" in shown["text/plain"]
    with pytest.raises(UnsupportedError, match="Graphviz is not installed") as caught:
        drawing.save(tmp_path / "program.svg")
    assert "pip install 'autosp-ir[viz]'" in str(caught.value)


def test_a_drawing_is_an_svg(tmp_path: Path) -> None:
    drawing = drawn().show()
    svg = drawing.svg()
    assert "<svg" in svg
    assert "image/svg+xml" in drawing._repr_mimebundle_()
    assert (drawing.save(tmp_path / "program.svg")).read_text() == svg
    assert isinstance(drawing, Drawing)
