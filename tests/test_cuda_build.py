"""The build of the CUDA half: what it finds, what it refuses, what it leaves; and that no kernel spills a register."""

import os
import re
import stat
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

from nfnets_kernels import backend

from .test_structure import CSRC, SETUP

NVCC = SETUP["find_nvcc"]()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="this machine has no nvcc")
KNOWN = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Where the kernels are held to it that nothing spills; the Hopper GPUs are what they were written for.
TARGET = "sm_90"

_PTXAS = re.compile(
    r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_CODE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")

SPILLING = """
__global__ void __launch_bounds__(1024) spill(const float* x, float* out) {
  float values[256];
#pragma unroll
  for (int i = 0; i < 256; ++i) values[i] = x[i * 1024 + threadIdx.x];
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 256; ++i) values[i] += values[(i * 7 + 3) % 256] * out[step];
  }
#pragma unroll
  for (int i = 0; i < 256; ++i) out[i * 1024 + threadIdx.x] = values[i];
}
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "NFK_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def fake_nvcc(folder: Path, body: str = "exit 0") -> Path:
    """A program of this name in the folder's bin."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_nvcc_is_looked_for_in_cuda_home_then_on_path_then_in_wheels(tmp_path, monkeypatch):
    find = SETUP["find_nvcc"]
    wheel = fake_nvcc(tmp_path / "site" / "nvidia" / "cu13")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find() == str(wheel)
    on_path = fake_nvcc(tmp_path / "path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find() == str(on_path)
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        of_variable = fake_nvcc(tmp_path / variable)
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert find() == str(of_variable)


def test_a_cuda_home_without_nvcc_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    with pytest.raises(RuntimeError, match=r"CUDA_HOME is '.*toolkit', which holds no bin/nvcc"):
        SETUP["find_nvcc"]()


@pytest.mark.parametrize(
    "listed, codes",
    [
        ("", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]),
        ("9.0", ["sm_90"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        (" 7.5 8.6 ", ["sm_75", "sm_86"]),
        ("9.0a; 9.0a", ["sm_90a"]),
        ("10.0 12.0+PTX", ["sm_100", "sm_120", "compute_120"]),
    ],
)
def test_architectures(monkeypatch, listed, codes):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert SETUP["cuda_codes"](KNOWN) == codes


def test_default_architectures_are_those_that_the_toolkit_knows():
    assert SETUP["cuda_codes"](["sm_70", "sm_80", "sm_90"]) == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    "listed, message",
    [
        ("Hopper", "'Hopper'; accepted are numbers such as 8.0"),
        ("native", "'native'; accepted are numbers"),
        ("90", "'90'; accepted are numbers"),
        ("6.1", "'6.1'; nfnets_kernels needs 7.0 or newer"),
        ("8.0;13.7", "'13.7'; nvcc knows sm_75, sm_80"),
    ],
)
def test_architectures_that_are_refused(monkeypatch, listed, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(RuntimeError, match=re.escape(f"TORCH_CUDA_ARCH_LIST holds {message}")):
        SETUP["cuda_codes"](KNOWN)


def test_cuda_that_is_not_wanted_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("NFK_CUDA", "0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert SETUP["plan_cuda"]("c++") == "not built: the build ran with NFK_CUDA=0"


def test_another_wish_is_refused(monkeypatch):
    monkeypatch.setenv("NFK_CUDA", "yes")
    with pytest.raises(RuntimeError, match="NFK_CUDA must be 0, 1 or auto, got 'yes'"):
        SETUP["plan_cuda"]("c++")


@pytest.mark.parametrize(
    "nvcc, reason",
    [
        (None, "the build found no nvcc in CUDA_HOME, PATH or pip's packages"),
        ("echo release 11.8", "is of CUDA 11.8, and 12.0 is needed"),
        ("echo broken >&2; exit 1", "fails: broken"),
        ("echo hello", "names no release: hello"),
        (
            "case $1 in --version) echo release 12.4;; --list-gpu-code) echo sm_80;; "
            "*) echo 'error -- unsupported GNU version! gcc versions later than 9 are not supported!'; exit 1;; esac",
            r"refuses the host compiler c\+\+ .*gcc versions later than 9.*CXX, or set NFK_CUDA=0",
        ),
    ],
)
def test_a_toolkit_that_cannot_build_is_left_out_unless_it_is_demanded(tmp_path, monkeypatch, nvcc, reason):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin" if nvcc else str(tmp_path))
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    if nvcc:
        fake_nvcc(tmp_path, nvcc)
    plan = SETUP["plan_cuda"]("c++")
    assert isinstance(plan, str) and plan.startswith("not built: ") and re.search(reason, plan)
    monkeypatch.setenv("NFK_CUDA", "1")
    with pytest.raises(RuntimeError, match=f"NFK_CUDA=1, and the CUDA kernels cannot be built: .*{reason}"):
        SETUP["plan_cuda"]("c++")


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_nvcc
def test_what_this_machine_builds_is_there_and_described():
    told = backend.describe().build["CUDA kernels"]
    assert told == f"built by {backend.extension.cuda_build}"
    assert all(backend.serving(op, "cuda") == "cuda" for op in ("agc", "sgd_agc", "weight_standardize"))
    for code in SETUP["cuda_codes"](run(NVCC, "--list-gpu-code").split()):
        assert code.replace("compute_", "PTX of ") in told


@needs_nvcc
def test_the_built_library_needs_no_other_of_cuda_and_exports_nothing_but_its_module():
    library = Path(backend.cuda_extension.__file__)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", library))
    assert needed and not [name for name in needed if re.search("cuda|torch|c10", name)]
    symbols = run("nm", "--dynamic", "--defined-only", "--format=posix", library)
    assert [line.split()[0] for line in symbols.splitlines()] == ["PyInit__cuda"]


@needs_nvcc
def test_the_built_library_holds_every_architecture():
    library = backend.cuda_extension.__file__
    codes = SETUP["cuda_codes"](run(NVCC, "--list-gpu-code").split())
    kernels = SETUP["CUDA_SOURCES"]
    for listing, prefix in (("--list-elf", "sm_"), ("--list-ptx", "compute_")):
        held = run(TOOLS / "cuobjdump", listing, library)
        for code in (code for code in codes if code.startswith(prefix)):
            number = code.removeprefix(prefix)
            assert len(re.findall(rf"\bsm_{number}\b", held)) >= len(kernels), f"{listing}: {code}"


class Report(NamedTuple):
    """What a source's code uses, by name."""

    functions: dict[str, list[int]]  # by ptxas, with what kernels call: bytes of stack, spill stores and loads
    kernels: dict[str, list[int]]  # by the finished code: bytes of stack and of other local memory
    registers: dict[str, int]  # of a kernel's thread
    accesses: list[Counter[str]]  # how often a kernel's PTX has each to global memory, such as "ld.global.nc.v4.u32"

    def wasteful(self) -> set[str]:
        """What keeps in memory that which was meant for registers."""
        return {name for name, used in [*self.functions.items(), *self.kernels.items()] if any(used)}


def compile_for_target(source: Path, folder: Path) -> Report:
    cubin = folder / f"{source.stem}.cubin"
    flags = [flag for flag in SETUP["NVCC_FLAGS"] if not flag.startswith("-Xcompiler")]
    kept = ["-keep", f"-keep-dir={folder}"]  # PTX
    log = run(NVCC, *flags, *kept, "-cubin", f"-arch={TARGET}", "-Xptxas=-v", source, "-o", cubin)
    functions = {name: list(map(int, used)) for name, *used in _PTXAS.findall(log)}
    resources = _CODE.findall(run(TOOLS / "cuobjdump", "--dump-resource-usage", cubin))
    kernels = {name: [int(stack), int(local)] for name, _, stack, local in resources}
    compiled = re.findall(rf"Compiling entry function '(\w+)' for '{TARGET}'", log)
    assert compiled and set(compiled) <= functions.keys() and set(compiled) <= kernels.keys()
    entries = cubin.with_suffix(".ptx").read_text().split(".entry ")[1:]
    accesses = [Counter(re.findall(r"\b(?:ld|st)\.global[\w.:]*", entry)) for entry in entries]
    return Report(functions, kernels, {name: int(registers) for name, registers, _, _ in resources}, accesses)


@pytest.fixture(scope="session")
def reports(tmp_path_factory) -> dict[str, Report]:
    """Of all of csrc/cuda."""
    folder = tmp_path_factory.mktemp("cubins")
    sources = [CSRC / "cuda" / f"{name}.cu" for name in SETUP["CUDA_SOURCES"]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda source: compile_for_target(source, folder), sources)
        return dict(zip(SETUP["CUDA_SOURCES"], found, strict=True))


def test_every_cuda_source_is_built():
    assert {path.stem for path in (CSRC / "cuda").glob("*.cu")} == set(SETUP["CUDA_SOURCES"])


@needs_nvcc
@pytest.mark.parametrize("name, kernels", [("agc", 16), ("sgd_agc", 16), ("weight_standardize", 32), ("device", 1)])
def test_no_register_spills(reports, name, kernels):
    assert len(reports[name].kernels) == kernels  # a pair of dtypes each, and both passes
    assert not reports[name].wasteful()


@needs_nvcc
@pytest.mark.parametrize(
    "name, kernels, blocks",
    [("agc", "", 5), ("sgd_agc", "", 3), ("sgd_agc", r"step(?!Id|I\w*dEEv)", 4), ("weight_standardize", "", 4)],
    ids=["agc", "sgd_agc", "sgd_agc without float64", "weight_standardize"],
)
def test_blocks_that_share_a_multiprocessor(reports, name, kernels, blocks):
    """As many as the sources' comments count with: 65,536 registers, of which a warp gets multiples of 256."""
    registers = {kernel: used for kernel, used in reports[name].registers.items() if re.search(kernels, kernel)}
    warps = {kernel: 65_536 // (-(-used * 32 // 256) * 256) for kernel, used in registers.items()}
    assert min(warps.values()) // 4 >= blocks, warps


@needs_nvcc
def test_memory_is_accessed_in_16_byte_pieces(reports):
    for kernel in reports["agc"].accesses:  # nine pieces a thread of each tensor
        assert kernel["ld.global.nc.v4.u32"] == kernel["ld.global.cg.v4.u32"] == kernel["st.global.wb.v4.u32"] == 9
    for kernel in reports["sgd_agc"].accesses:  # of weight, momentum and average as many stores as loads
        assert kernel["ld.global.cg.v4.u32"] == kernel["st.global.wb.v4.u32"] >= kernel["ld.global.nc.v4.u32"] > 0
    for kernel in reports["weight_standardize"].accesses:
        assert kernel["ld.global.nc.v4.u32"] > 0 and kernel["st.global.wb.v4.u32"] > 0


@needs_nvcc
def test_every_store_is_one_that_the_emulator_watches(reports):
    kernels = [kernel for report in reports.values() for kernel in report.accesses]
    stores = {name for kernel in kernels for name in kernel if name.startswith("st")}
    assert stores and all(name.startswith("st.global.wb.") for name in stores)


@needs_nvcc
def test_a_spilling_kernel_is_found(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(SPILLING)
    report = compile_for_target(source, tmp_path)
    (kernel,) = report.wasteful()
    assert all(report.functions[kernel]) and report.kernels[kernel][0] > 0
