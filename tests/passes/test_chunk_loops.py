"""`tile` with many chunks: one operation for all of them, as exact as the chunks written out."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import autosp_ir as air
from autosp_ir._torch_compat import compile_with_inductor
from autosp_ir.analysis.cost import cost_of
from autosp_ir.analysis.liveness import liveness
from autosp_ir.analysis.loops import loop_workspace
from autosp_ir.emit import loops
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.text import structurally_equal
from autosp_ir.testing import DenseReference, count_operations
from tests.models import ZOO, build
from tests.passes.test_tile import CUT, REST, run, wide
from tests.sampling import sampled

torch.set_num_threads(1)


def looped(program: air.Program, chunks: int, rest: str = "", ranks: int = 1) -> air.PassResult:
    front = "canonicalize" if ranks == 1 else CUT
    return run(program, f"{front},tile{{chunks={chunks} loop_from=2}}{rest}", ranks)


@pytest.mark.parametrize(("name", "ranks"), sampled([(name, (4, 1, 2)[i % 3]) for i, name in enumerate(ZOO)], 2, 1))
def test_every_model_is_exact(name: str, ranks: int) -> None:
    model, batch = build(name, batch_size=2 if ranks == 2 else 1, length=64, ignored=5)
    reference = DenseReference.of(model, batch)
    front = "canonicalize" if ranks == 1 else CUT
    result = run(reference.program, f"{front},tile{{wide=1.5 loop_from=2}}", ranks)
    assert count_operations(result.program, "chunk_loop") >= 1
    reference.check(result.program)


@pytest.mark.parametrize(
    ("decompose", "policy", "ranks"),
    [("false", "save-all", 1), ("true", "min-cut", 2), ("true", "budget fraction=1.0", 4), ("false", "autosp-sac", 2)],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_composition_is_exact(decompose: str, policy: str, ranks: int, batch: int) -> None:
    reference = DenseReference.of(*wide(length=128, batch=batch))
    rest = REST.format(decompose=decompose, policy=policy)
    rest = rest if ranks > 1 else rest.replace(",grad-sync", "")
    result = looped(reference.program, 16, f",{rest}", ranks)
    assert count_operations(result.program, "chunk_loop_backward") == 2
    reference.check(result.program)


@pytest.mark.parametrize(("ranks", "batch"), [(1, 2), (2, 1), (4, 1)])
def test_a_loss_gives_its_gradient_in_the_same_loop(ranks: int, batch: int) -> None:
    """Whatever number arrives: the backward multiplies, and computes no logits."""
    reference = DenseReference.of(*wide(length=128, batch=batch))
    rest = ",differentiate{decompose=true},remat,early-loss-gradient"
    result = looped(reference.program, 8, rest + (",grad-sync,lower-comm" if ranks > 1 else ""), ranks)
    assert result.statistics["early-loss-gradient"]["chunks"] == 8
    assert not [r for r in result.remarks if r.pass_name == "early-loss-gradient" and r.kind == "missed"]
    reference.check(result.program)
    loops_of = {n.name: n for n in result.program.graph.nodes if n.op.name.startswith("autosp.chunk_loop")}
    whole = [n for n in loops_of.values() if n.is_op("autosp.chunk_loop_backward") and n.arg("results")]
    assert [n.phase for n in whole] == [Phase.FORWARD]
    assert len(loops_of) == 3, "the MLP forward and backward, and the loss once"


def test_a_loss_that_is_scaled_afterwards_keeps_its_gradient() -> None:
    model, batch = wide(length=64)
    program = looped(air.capture(model, batch), 8, ",differentiate,remat,early-loss-gradient").program
    step = program.emit(backend="aot_eager")
    (1000 * step(**batch)).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    (1000 * model(**batch)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_half_precision_that_underflows_stays_in_the_backward() -> None:
    model, batch = wide(length=64)
    result = looped(air.capture(model.half(), batch), 8, ",differentiate,remat,early-loss-gradient")
    assert any("float16" in r.message for r in result.remarks if r.pass_name == "early-loss-gradient")
    assert not result.statistics["early-loss-gradient"].get("chunks")


def test_a_program_is_as_long_for_any_number_of_chunks() -> None:
    program = air.capture(*wide(length=512))
    sizes = {n: len(list(looped(program, n, ",differentiate,remat").program.graph.nodes)) for n in (2, 16, 128)}
    assert len(set(sizes.values())) == 1


def test_only_many_chunks_make_a_loop_unless_asked() -> None:
    program = air.capture(*wide(length=128))
    few, many = (run(program, f"canonicalize,tile{{chunks={n}}}") for n in (32, 64))
    assert (count_operations(few.program, "chunk_loop"), count_operations(many.program, "chunk_loop")) == (0, 2)
    assert any("in a loop over 64 chunks" in r.message for r in many.remarks)
    with pytest.raises(air.AutoSPError):
        run(program, "canonicalize,tile{loop_from=many}")


def test_layers_alike_share_one_body() -> None:
    model, batch = build("llama-gqa", length=64, num_hidden_layers=3)
    program = run(air.capture(model, batch), "canonicalize,tile{chunks=8 loop_from=2 wide=1.4 regions=mlp}").program
    bodies = [n.arg("body") for n in program.find("autosp.chunk_loop")]
    assert len(bodies) == 3 and len(set(bodies)) == 1


def test_its_text_reads_back_with_the_body_in_it() -> None:
    program = looped(air.capture(*wide()), 8, ",differentiate,remat").program
    text = str(program)
    assert '        "    %v6: f32[1, 8, 64] = aten.gelu(%v5)\\n"\n' in text
    again = air.parse(text)
    again.verify()
    assert structurally_equal(program, again) is None and str(again) == text


def test_one_chunk_is_alive_at_a_time() -> None:
    """The loop's own memory falls with the chunks, and nothing wide is anywhere else."""
    program = air.capture(*wide(length=2048))
    peaks = {}
    for chunks in (2, 16, 128):
        joint = looped(program, chunks, ",differentiate,remat").program
        peaks[chunks] = liveness(joint).by_phase[Phase.BACKWARD]
        widest = max(v.tensor_type.numel for n in joint.graph.nodes for v in n.results if n.name.startswith("getitem"))
        assert widest <= 2048 * 16
    weights, stream, logits = 4 * 2 * 256 * 16, 4 * 2048 * 16, 4 * 2048 * 256
    assert peaks[2] - peaks[16] > 0.4 * logits
    assert peaks[128] <= 4 * logits // 128 + 2 * weights + 6 * stream


def test_its_memory_is_that_of_fused_chunks_where_a_compiler_fuses() -> None:
    """The logits of a chunk are there once, in their own dtype: their gradient overwrites them."""
    model, batch = build("llama-gqa", length=1024, dtype=torch.bfloat16, num_hidden_layers=1, vocab_size=2048)
    cut = "canonicalize,tile{chunks=8 loop_from=2 regions=loss}"
    rest = "differentiate{decompose=true},remat,early-loss-gradient"
    joint = run(air.capture(model, batch), f"{cut},{rest}").program
    (loop,) = joint.find("autosp.chunk_loop_backward")
    logits = 2 * 128 * 2048
    assert logits < loop_workspace(loop, fused=True) < 1.6 * logits
    assert loop_workspace(loop, fused=False) > 6 * logits


def test_it_costs_what_its_chunks_cost() -> None:
    program = air.capture(*wide(length=128))

    def flops(loop_from: int) -> float:
        tiled = run(program, f"canonicalize,tile{{chunks=16 loop_from={loop_from}}},differentiate,remat").program
        return sum(cost_of(n).flops for n in tiled.graph.nodes if n.phase is not Phase.FORWARD)

    assert flops(2) == flops(99) > 0


@pytest.mark.parametrize("policy", ["min-cut", "min-cut aggressive=true", "save-all"])
def test_no_loop_runs_a_third_time(policy: str) -> None:
    """Its gradient computes every chunk again already; to torch's partitioner it looks free to run once more."""
    program = air.capture(*build("llama-gqa", length=64, num_hidden_layers=2))
    cut = "canonicalize,tile{chunks=16 loop_from=2 wide=1.4}"
    joint = run(program, f"{cut},differentiate{{decompose=true}},remat{{policy={policy}}}").program
    assert [n.phase for n in joint.find("autosp.chunk_loop")] == [Phase.FORWARD] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_an_emitted_step_equals_the_chunks_written_out(backend: Any, dtype: torch.dtype) -> None:
    model, batch = wide(length=128)
    model.to(dtype)
    program = air.capture(model, batch)
    gradients = []
    with mock.patch.object(loops, "compile_with_inductor", wraps=compile_with_inductor) as compiled:
        for loop_from in (2, 99):
            pipeline = f"canonicalize,tile{{chunks=32 loop_from={loop_from}}},differentiate{{decompose=true}},remat"
            step = run(program, pipeline).program.emit(backend=backend)
            loss = step(**batch)
            loss.backward()
            gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
    rtol, atol = (1e-4, 1e-6) if dtype is torch.float32 else (2e-2, 1e-4)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    assert compiled.call_count == (4 if backend == "inductor" else 0), "each body once, whatever it is run for"


def test_a_body_without_a_number_for_a_length_is_left_alone() -> None:
    model, batch = wide()
    result = run(air.capture(model, batch, dynamic=True), "canonicalize,tile{loop_from=2}")
    assert count_operations(result.program, "chunk_loop") == 0
    assert any("not a number" in r.message for r in result.remarks)
