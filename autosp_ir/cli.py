"""The command line: `autosp-ir demo | capture | opt | doctor | plan | passes | new-pass | report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autosp_ir import cli_authoring, cli_report
from autosp_ir.cli_doctor import doctor
from autosp_ir.cli_io import captured, write
from autosp_ir.cli_opt import opt
from autosp_ir.cli_plan import plan
from autosp_ir.errors import AutoSPError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Sequence-parallel training as IR passes.")
_console = Console()
app.command()(opt)
app.command()(doctor)
app.command()(plan)
cli_authoring.register(app)
cli_report.register(app)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]


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
    model: Annotated[str, typer.Argument(help="config.json, or package.module:factory returning (model, batch).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the IR here, not to the screen.")] = None,
    dynamic: Annotated[bool, typer.Option(help="Keep the sequence length symbolic.")] = False,
    as_json: Json = False,
) -> None:
    """Capture a model and print its forward program."""
    write(captured(model, dynamic), output, as_json)


if __name__ == "__main__":
    main()
