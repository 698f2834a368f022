"""The command line: `autosp-ir demo | capture | opt | passes | new-pass`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from autosp_ir import cli_authoring
from autosp_ir.errors import AutoSPError, CaptureError
from autosp_ir.ir.program import Program

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Sequence-parallel training as IR passes.")
_console = Console()
cli_authoring.register(app)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
Mesh = Annotated[str, typer.Option("--mesh", help="Mesh axes, such as sp=4 or dp=2,sp=4.")]


def main() -> None:
    """Entry point of the console script: errors are one readable message and a non-zero exit."""
    try:
        app()
    except AutoSPError as error:
        sys.stderr.write(f"autosp-ir: {error}\n")
        raise SystemExit(2) from error


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for IR, pictures and figures.")] = Path(
        "demo-output"
    ),
    ranks: Annotated[int, typer.Option(help="Processes that share each sequence.", min=1, max=8)] = 2,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 30,
    length: Annotated[int, typer.Option(help="Bytes per sequence.", min=8, max=4096)] = 1024,
    as_json: Json = False,
) -> None:
    """Train a small Llama dense and sequence-parallel on gloo ranks, and compare the two runs."""
    from autosp_ir.demo.run import findings_table, run_demo
    from autosp_ir.demo.workload import Workload

    console = Console(stderr=True) if as_json else _console
    findings = run_demo(output, ranks, Workload(steps=steps, length=length), console)
    if as_json:
        sys.stdout.write((output / "findings.json").read_text() + "\n")
    else:
        _console.print(findings_table(findings))
        _console.print(f"Written to {output}/: before.ir, after.ir, lowered.ir, rewrite.svg, loss.png, findings.json")
    if not findings.agrees:
        raise AutoSPError(
            f"the two runs disagree: loss by {findings.loss_error:.1e}, gradients by {findings.gradient_error:.1e}",
            hint="report this with the findings.json that was written",
        )


@app.command()
def capture(
    model: Annotated[str, typer.Argument(help="package.module:factory returning (model, batch).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the IR here, not to the screen.")] = None,
    dynamic: Annotated[bool, typer.Option(help="Keep the sequence length symbolic.")] = False,
    as_json: Json = False,
) -> None:
    """Capture a model and print its forward program."""
    program = _captured(model, dynamic)
    _write(program, output, as_json)


@app.command()
def opt(
    program: Annotated[str, typer.Argument(help="IR text file, or package.module:factory.")],
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="Passes by name, or a .toml or .json file.")],
    mesh: Mesh = "sp=1",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the IR here, not to the screen.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse instead of running an operation replicated.")] = False,
    as_json: Json = False,
) -> None:
    """Run a pipeline over a program and print what became of it."""
    from autosp_ir.ir.text import parse

    path = Path(program)
    source = parse(path.read_text()) if path.is_file() else _captured(program, dynamic=False)
    result = cli_authoring.pass_manager(pipeline).run(source, mesh=_mesh(mesh), strict=strict)
    for remark in result.remarks:
        if remark.kind == "missed":
            sys.stderr.write(f"{remark}\n")
    _write(result.program, output, as_json)


def _mesh(text: str) -> dict[str, int]:
    try:
        return {axis.strip(): int(size) for axis, _, size in (part.partition("=") for part in text.split(","))}
    except ValueError as error:
        raise AutoSPError(f"{text!r} is no mesh", hint="write axis=size pairs, such as --mesh dp=2,sp=4") from error


def _captured(spec: str, dynamic: bool) -> Program:
    from autosp_ir.capture.program import capture as capture_model

    model, batch = _factory(spec)()
    return capture_model(model, batch, dynamic=dynamic)


def _factory(spec: str) -> Any:
    module_name, colon, attribute = spec.partition(":")
    hint = "write package.module:factory, where factory() returns (model, batch)"
    if not colon:
        raise CaptureError(f"{spec!r} is neither an IR file nor a factory", hint=hint)
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"{spec!r} cannot be loaded: {error}", hint=hint) from error


def _write(program: Program, output: Path | None, as_json: bool) -> None:
    text = program.to_json() if as_json else str(program)
    if output is None:
        sys.stdout.write(text + "\n")
        return
    output.write_text(text + "\n")
    _console.print(f"{len(program.graph)} nodes written to {output}")


if __name__ == "__main__":
    main()
