"""What this machine is, as one line of JSON: `python -m benchmarks.gpu.machine`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess

import torch


def main() -> None:
    """Print devices and versions."""
    cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if cuda else 0
    described = {
        "devices": [torch.cuda.get_device_name(i) for i in range(count)] or [platform.processor() or "CPU"],
        "memory_gib": [round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1) for i in range(count)],
        "driver": _driver() if cuda else "",
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "deepspeed": _version("deepspeed"),
        "python": platform.python_version(),
    }
    print(json.dumps(described))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    main()
