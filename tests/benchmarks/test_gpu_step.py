"""The GPU table without a GPU: rows, children that fail, medians, ratios, markdown, the picture."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.launch import Outcome, complete, descendants, parse_row, run_child
from benchmarks.gpu.ours import resolved
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.summary import cells, load, markdown, ratio
from benchmarks.gpu_step import arguments
from benchmarks.plot_gpu_step import draw

Row = dict[str, Any]


def row(mode: str, seq: int, seconds: float, turn: int = 0, **more: Any) -> Row:
    measured = {"step_s": seconds, "min_s": seconds * 0.9, "max_s": seconds * 1.1, "peak_gib": 10.0, "warm_s": 3.0}
    return {"mode": mode, "seq": seq, "world": 2, "round": turn, "loss": 1.5, "grad_norm": 2.0} | measured | more


def python(code: str, limit: float = 30.0) -> tuple[Outcome, list[Row], str]:
    log, seen = io.StringIO(), list[Row]()
    outcome = run_child([sys.executable, "-c", code], limit, log, seen.append)
    return outcome, seen, log.getvalue()


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds; nobody may have collected its status."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('RESULT {"seq": 4}\n', {"seq": 4}),
        ('[rank0]: RESULT {"seq": 4}\n', {"seq": 4}),
        ("RESULT {broken\n", None),
        ("RESULT [1]\n", None),
        ("anything else\n", None),
    ],
)
def test_rows_are_found_in_output(line: str, wanted: Row | None) -> None:
    assert parse_row(line) == wanted


def test_a_child_that_crashes_leaves_its_rows_and_its_error() -> None:
    outcome, seen, log = python("print('RESULT {\"seq\": 8}', flush=True)\nraise ValueError('too bad')")
    assert (outcome.code, outcome.timed_out) == (1, False)
    assert seen == outcome.rows == [{"seq": 8}]
    assert outcome.error == "ValueError: too bad" and "Traceback" in log
    rows = complete(outcome, "ours", [8, 16, 32], 30)
    assert rows[0] == {"seq": 8, "mode": "ours"}
    assert rows[1]["error"] == "exit status 1: ValueError: too bad"
    assert rows[2]["error"] == "not run: failed at 16 tokens"


def test_a_child_is_ended_at_its_limit_with_all_it_started() -> None:
    code = (
        "import subprocess, sys, time\n"
        "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "print('RESULT {\"seq\": %d}' % c.pid, flush=True)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    outcome, seen, _ = python(code, limit=4.0)
    assert outcome.timed_out and time.monotonic() - began < 20
    grandchild = seen[0]["seq"]
    assert gone(grandchild)
    assert complete(outcome, "ring", [1], 4.0)[0]["error"] == "ended at its limit of 4 s"


def test_one_rank_stands_in_for_two() -> None:
    """Two ranks that are equal: ours and Ulysses by hand compute one loss and one gradient on what this one has."""
    small = Sizes(
        layers=1, hidden=32, inter=64, heads=4, kv=2, vocab=64, dtype="float32", steps=1, warmup=0, stand_in=2
    )
    rows = []
    for mode in ("ours-aot-eager", "ulysses-eager"):
        worker = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "benchmarks.gpu.worker"]
        command = [sys.executable, *worker, "--mode", mode, "--seq", "16", *small.arguments()]
        log = io.StringIO()
        outcome = run_child(command, 120, log, lambda _: None)
        assert outcome.code == 0, log.getvalue()
        rows += outcome.rows
    ours, by_hand = rows
    assert ours["world"] == by_hand["world"] == 2
    assert ours["grad_norm"] > 0.1
    for figure in ("loss", "grad_norm"):
        assert ours[figure] == pytest.approx(by_hand[figure], rel=1e-5)


def test_no_descendants_of_a_process_that_is_gone() -> None:
    assert descendants(2**30) == {}


def test_a_good_row_wins_over_another_ranks_error() -> None:
    outcome = Outcome(rows=[{"seq": 8, "error": "rank 1 failed"}, {"seq": 8, "step_s": 1.0, "error": ""}])
    assert complete(outcome, "ours", [8], 1)[0]["step_s"] == 1.0


def test_one_round_shows_the_spread_of_steps_and_several_that_of_rounds() -> None:
    (one,) = cells([row("ours", 8, 1.0)])
    assert (one.step_s, one.low_s, one.high_s) == (1.0, 0.9, 1.1)
    (three,) = cells([row("ours", 8, s, turn) for turn, s in enumerate((1.0, 3.0, 1.2))])
    assert (three.rounds, three.step_s, three.low_s, three.high_s) == (3, 1.2, 1.0, 3.0)


def test_a_failed_round_does_not_hide_a_good_one() -> None:
    (cell,) = cells([row("ours", 8, 1.0), {"mode": "ours", "seq": 8, "round": 1, "error": "out of memory"}])
    assert cell.error == "" and cell.rounds == 1


def test_ratio_pairs_rounds_and_takes_the_fastest_peer_on_as_many_gpus() -> None:
    rows = [
        *(row("ours", 8, s, turn, peak_gib=5.0) for turn, s in enumerate((1.0, 2.2))),
        *(row("fast", 8, s, turn) for turn, s in enumerate((1.0, 2.0))),
        *(row("slow", 8, s, turn) for turn, s in enumerate((3.0, 3.0))),
        row("single", 8, 0.1, 0, world=1),
        {"mode": "broken", "seq": 8, "round": 0, "error": "no"},
    ]
    found = ratio(rows, "ours", 8)
    assert found is not None and found.peer == "fast"
    assert [found.low, found.time, found.high] == pytest.approx([1.0, 1.05, 1.1])
    assert found.memory == 0.5


def test_no_ratio_between_different_runs(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, mode in zip(paths, ("ours", "peer"), strict=True):
        path.write_text(json.dumps({"machine": {}, "rows": [row(mode, 8, 1.0)]}))
    document = load(paths)
    assert [r["mode"] for r in document["rows"]] == ["ours", "peer"]
    assert ratio(document["rows"], "ours", 8) is None


def test_markdown_has_a_line_for_every_mode_and_every_failure() -> None:
    rows = [row("ours", 1024, 1.0), row("peer", 1024, 0.5), {"mode": "ring", "seq": 1024, "error": "a | b"}]
    errors = {"dtype": "float32", "seq": 64, "candidate": "ours", "overall": 1e-7, "worst": 2e-7, "worst_name": "w"}
    text = markdown({"rows": rows, "accuracy": [errors | {"loss": 5.0, "error": ""}]})
    assert "| 1,024 | **ours** | 1.000 (0.900–1.100) | 10.00 | 1.5000 | 2 | time 2.000, memory 1.000; peer |" in text
    assert "| 1,024 | ring | a \\| b |" in text
    assert "| float32 | 64 | ours | 1e-07 | 2e-07 (`w`) | 5.000000 |" in text


def test_sizes_travel_as_arguments() -> None:
    sizes = Sizes(layers=1, dtype="float32", cap_gib=0.0)
    words = sizes.arguments()
    assert words[words.index("--cap-gib") + 1] == "0.0" and words[words.index("--layers") + 1] == "1"


def test_a_variant_may_name_a_pipeline_of_the_plan() -> None:
    assert resolved(None, 8192, "inductor") is None
    assert resolved("canonicalize,remat", 8192, "inductor") == "canonicalize,remat"
    found = resolved("@loss and MLPs in chunks, saved values on the host", 32768, "inductor")
    assert found is not None and "tile{chunks=4}" in found and "offload{" in found
    with pytest.raises(ValueError, match="no pipeline called 'lss'; it has 'default', 'loss in chunks"):
        resolved("@lss", 8192, "inductor")


def test_variants_are_modes_and_unknown_modes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(["--modes", "ours,ring", "--variant", "ours-ac=canonicalize,remat{policy=min-cut}"])
    assert given.modes == ["ours", "ring", "ours-ac"]
    assert arguments(["--accuracy", "--variant", "ours-a=canonicalize"]).modes == []
    assert arguments(["--accuracy", "--modes", "ours", "--variant", "ours-a=b"]).modes == ["ours", "ours-a"]
    with pytest.raises(SystemExit):
        arguments(["--modes", "rings"])
    assert "no mode is called 'rings'" in capsys.readouterr().err


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("ours", 1024, 1.0), row("ours", 2048, 3.0), row("peer", 1024, 0.5), row("ring", 1024, 1, error="no")]
    draw({"machine": {"devices": ["GPU", "GPU"], "torch": "2"}, "rows": rows}, tmp_path / "step.svg")
    text = (tmp_path / "step.svg").read_text()
    assert text.startswith("<?xml") and len(text) > 5000


def test_gradient_errors_by_parameter() -> None:
    from benchmarks.gpu.accuracy import Error, compare

    wanted = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}
    found = Error("ours", "float32", 8)
    compare(found, {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([12.0])}, wanted)
    assert found.worst_name == "a" and found.worst == pytest.approx(0.1) and found.overall == pytest.approx(0.5 / 13)
    missing = Error("ours", "float32", 8)
    compare(missing, {"a": wanted["a"], "b": None}, wanted)
    assert missing.worst == pytest.approx(1.0) and missing.worst_name == "b"
    broken = Error("ours", "float32", 8)
    compare(broken, {"a": torch.tensor([float("nan"), 0.0]), "b": wanted["b"]}, wanted)
    assert broken.worst != broken.worst and broken.overall != broken.overall
