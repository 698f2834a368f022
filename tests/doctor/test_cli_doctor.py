"""`autosp-ir doctor` from the command line, and the configs that it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from autosp_ir.capture.from_config import IGNORE_INDEX, model_from_config
from autosp_ir.cli import app
from autosp_ir.cli_io import read_model
from autosp_ir.errors import AutoSPError, CaptureError
from tests.models.architectures import ARCHITECTURES, small

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 3,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_a_config_is_examined(config: str) -> None:
    result = doctor(config, "--ranks", "2,8", "--length", "16", "--set", "num_hidden_layers=1")
    assert result.exit_code == 0, result.output
    for shown in ("exact", "refused", "4 query heads cannot be spread over 8 ranks", "What you can do", "pointwise"):
        assert shown in result.stdout


def test_a_factory_is_examined_and_reported_as_json() -> None:
    result = doctor("tests.doctor.factories:mixes", "--ranks", "2", "--length", "10", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["inputs"]["input_ids"] == [2, 10] and found["verdict"] == "exact with gathers"


def test_sequence_dimensions_are_given_by_name() -> None:
    result = doctor("tests.doctor.factories:whole", "--ranks", "2", "--seq-dims", "pixels=2", "--json")
    assert json.loads(result.stdout)["findings"][0]["spread"] == 0.0


def test_a_bug_exits_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import autosp_ir as air

    monkeypatch.setattr(air.testing.DenseReference, "compare", lambda *_: 1 / 0)
    result = doctor("tests.doctor.factories:mixes", "--ranks", "2")
    assert result.exit_code == 1 and "CRASH" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tests.doctor.factories:mixes", "--ranks", "two"], "no numbers"),
        (["tests.doctor.factories:mixes", "--dtype", "int8"], "no floating-point dtype"),
        (["tests.doctor.factories:mixes", "--set", "x=1"], "factory"),
        (["tests.doctor.factories:whole", "--length", "8"], "takes no length"),
        (["tests.doctor.factories:not_a_model"], "returned str"),
        (["tests.doctor.factories:mixes", "--seq-dims", "ids"], "name=value"),
        (["nothing"], "neither a file nor a factory"),
        (["missing.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_examined_is_said(arguments: list[str], words: str) -> None:
    error = doctor(*arguments).exception
    assert isinstance(error, AutoSPError) and words in str(error) and error.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [("[1]", "no JSON object"), ("{", "cannot be read"), ('{"model_type": "nobody"}', "knows no model_type")],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(CaptureError, match=words):
        read_model(str(path))


def test_a_config_that_builds_no_model() -> None:
    with pytest.raises(CaptureError, match="cannot build a llama"):
        model_from_config({**CONFIG, "num_attention_heads": 3, "hidden_size": "wide"})
    with pytest.raises(CaptureError, match="no language or image model"):
        model_from_config({"model_type": "wav2vec2"})


def test_overrides_dtype_and_class() -> None:
    overrides = {"num_hidden_layers": 1, "architectures": ["LlamaForSequenceClassification"]}
    model, batch = model_from_config(CONFIG, length=12, batch_size=3, dtype=torch.float64, overrides=overrides)
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert batch["input_ids"].shape == (3, 12) and not (batch["input_ids"] == 3).any()


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("llama", "ForCausalLM"),
        ("bert", "ForMaskedLM"),
        ("t5", "ForConditionalGeneration"),
        ("vit", "ForImageClassification"),
    ],
)
def test_every_kind_gets_the_class_that_trains_it(name: str, suffix: str) -> None:
    model, batch = small(name, dtype=torch.float64)
    assert type(model).__name__.endswith(suffix)
    assert all(t.dtype in (torch.int64, torch.float64) for t in batch.values())
    if "input_ids" in batch:
        assert batch["input_ids"].shape == (2, ARCHITECTURES[name].length)
        assert (batch["labels"] == IGNORE_INDEX).any()
