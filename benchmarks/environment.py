"""What a figure depends on besides the code: machine, versions, commit."""

import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.clocks import cache_bytes

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
    triton: str = "unknown"
    cuda: str | None = None
    cache_bytes: int = 0
    clocks: dict[str, str] = field(default_factory=dict)

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
            triton=_version("triton"),
            cuda=torch.version.cuda,
            cache_bytes=cache_bytes(device),
            clocks=gpu_clocks(device) if device.startswith("cuda") else cpu_clocks(),
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


GPU_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "driver_version")


def gpu_clocks(device: str) -> dict[str, str]:
    """Clocks, power limit and driver as they are found; nothing is changed. Empty without nvidia-smi."""
    index = torch.device(device).index or 0
    query = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(index).uuid}", "--format=csv,noheader"]
    found = _output(*query, f"--query-gpu={','.join(GPU_CLOCKS)}")
    return dict(zip(GPU_CLOCKS, found.split(", "), strict=True)) if found else {}


def cpu_clocks() -> dict[str, str]:
    """Frequency and governor as they are found, on a virtual machine maybe the nominal ones; nothing is changed."""
    return dict(_cpu_clocks())


def _cpu_clocks() -> Iterator[tuple[str, str]]:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.findall(r"^cpu MHz\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        megahertz = [float(one) for one in found]
        yield "MHz", f"{min(megahertz):.0f} to {max(megahertz):.0f}"
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        yield "governor", governor.read_text().strip()


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
    return _output("git", *arguments)


def _output(*command: str) -> str:
    """What a command prints, empty where it is missing or fails."""
    try:
        finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return finished.stdout.strip()
