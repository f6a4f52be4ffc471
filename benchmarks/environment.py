"""What a figure depends on besides the code: machine, versions, commit."""

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """The machine and the software that produced a set of results."""

    date: str
    command: str
    device: str
    cpu: str
    gpu: str | None
    threads: int
    python: str
    torch: str
    torchvision: str
    timm: str
    nfnets_kernels: str
    commit: str
    dirty: bool

    @classmethod
    def record(cls, device: str) -> "Environment":
        """Describe the running process, whose benchmarks run on ``device``."""
        return cls(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=" ".join(["python -m benchmarks", *sys.argv[1:]]),
            device=device,
            cpu=cpu_name(),
            gpu=torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            torchvision=_version("torchvision"),
            timm=_version("timm"),
            nfnets_kernels=_version("nfnets_kernels"),
            commit=_git("rev-parse", "HEAD") or "unknown",
            # Results land inside the checkout, so they must not count as a change of the code that made them.
            dirty=bool(_git("--no-optional-locks", "status", "--porcelain", "--", ".", ":!benchmarks/results")),
        )

    @property
    def machine(self) -> str:
        """The machine in words."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return self.gpu or f"{self.cpu}, {threads}"

    @property
    def slug(self) -> str:
        """The machine as a folder name."""
        return re.sub(r"[^a-z0-9]+", "-", self.machine.lower()).strip("-")


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _git(*arguments: str) -> str:
    """The output of a git command in this repository, empty where there is no git or no repository."""
    try:
        finished = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return finished.stdout.strip()
