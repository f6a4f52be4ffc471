"""What a figure depends on besides the code: machine, versions, commit."""

import ctypes
import os
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
    keeps_memory: bool = False

    @classmethod
    def record(cls, device: str, keeps_memory: bool) -> "Environment":
        """Describe the running process, whose benchmarks run on ``device``; see ``keep_freed_memory``."""
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
            keeps_memory=keeps_memory,
        )

    @property
    def machine(self) -> str:
        """The machine in words."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return self.gpu or f"{self.cpu}, {threads}"

    @property
    def slug(self) -> str:
        """The machine as a folder name."""
        return slug(self.machine)


def slug(machine: str) -> str:
    """A machine in words as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def keep_freed_memory() -> bool:
    """Have malloc reuse freed memory instead of returning it to the system; False where that cannot be set.

    glibc returns every block above 32 MB at once, so that each large temporary is paid for in page faults, or not, by
    chance: the same op on 64 MB takes 7 or 25 ms. jemalloc and tcmalloc, which PyTorch's guide to CPU performance
    advises, keep it as well.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return mallopt is not None and all(
        mallopt(option, value) for option, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 1 << 28))
    )


def other_cpu_seconds() -> float | None:
    """CPU time that everything but this process has used since boot, None where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - (own.user + own.system + own.children_user + own.children_system)


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
