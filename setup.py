"""Builds `nfnets_kernels._C`, and `_cuda` where there is nvcc, with ninja: C++17, pybind11, no torch header.

The environment has a say: CXX names the compiler, NFK_CUDA=0|1|auto forbids or demands the CUDA half, CUDA_HOME holds
its toolkit, TORCH_CUDA_ARCH_LIST names the GPUs that it is for. Metadata lives in pyproject.toml.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import ninja
import pybind11
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC_FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file())

# One build of the kernels per instruction set; csrc/cpu/isa.cpp picks one at run time.
AVX2 = ["-mavx2", "-mfma"]
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = AVX2
    ISA_FLAGS["avx512"] = [
        *AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
    ]  # fmt: skip
KERNEL_SOURCES = ["agc", "residual", "scaled_activation", "sgd_agc", "weight_standardize"]

# -fno-trapping-math lets float comparisons become vector selects; NaN and infinity keep their meaning (no -ffast-math).
COMMON_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi",
]  # fmt: skip

PYTHON_INCLUDES = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

CUDA_SOURCES = ["agc", "device", "sgd_agc", "weight_standardize"]
CUDA_ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
NVCC_AT_LEAST = (12, 0)
NVCC_FLAGS = [
    "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Wno-deprecated-gpu-targets", "--threads=0",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas,-Wno-psabi",
]  # fmt: skip


class CudaMissing(Exception):
    """Why the CUDA half cannot be built here."""


class Cuda(NamedTuple):
    """What builds the CUDA half."""

    nvcc: str
    version: str
    codes: list[str]  # as nvcc names them: "sm_90" is machine code, "compute_90" is PTX
    cudart: Path  # the static library: no CUDA library is needed where the package is imported

    def __str__(self) -> str:
        codes = [code.replace("compute_", "PTX of ") for code in self.codes]
        return f"nvcc {self.version} for {', '.join(codes)}"


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, or the first of c++, g++, clang++ on PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        path = shutil.which(candidate)
        if path:
            return path
    raise RuntimeError(
        f"nfnets_kernels needs a C++17 compiler and found none of {candidates}. Install one "
        "(Debian/Ubuntu: `apt-get install g++`) or name it in the environment variable CXX."
    )


def compiles(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler builds and links an empty program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [compiler, *flags, str(source), "-o", str(Path(folder, "empty"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_nvcc() -> str | None:
    """Path of nvcc: in $CUDA_HOME or $CUDA_PATH if set, else on PATH, else in a wheel such as nvidia-cuda-nvcc."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = shutil.which("nvcc", path=str(Path(home, "bin")))
            if nvcc is None:
                raise RuntimeError(f"{variable} is {home!r}, which holds no bin/nvcc: correct it, or set NFK_CUDA=0")
            return nvcc
    # An isolated build has a sys.path of its own; purelib is where the package will be installed.
    sites = dict.fromkeys([*sys.path, sysconfig.get_path("purelib")])
    wheels = [str(path) for site in sites for path in sorted(Path(site, "nvidia").glob("cu*/bin"), reverse=True)]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(wheels))


def output_of(*command: str) -> str:
    """What a command prints, which must succeed."""
    run = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode != 0:
        raise CudaMissing(f"`{shlex.join(command)}` fails: {run.stdout.strip()}")
    return run.stdout


def nvcc_version(nvcc: str) -> str:
    """Its version, such as "13.0", which must be new enough."""
    report = output_of(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)", report)
    if found is None:
        raise CudaMissing(f"`{nvcc} --version` names no release: {report.strip()}")
    if (int(found[1]), int(found[2])) < NVCC_AT_LEAST:
        raise CudaMissing(f"{nvcc} is of CUDA {found[1]}.{found[2]}, and {'.'.join(map(str, NVCC_AT_LEAST))} is needed")
    return f"{found[1]}.{found[2]}"


def cuda_codes(known: list[str]) -> list[str]:
    """What to generate: for $TORCH_CUDA_ARCH_LIST, or for the default architectures and with PTX for GPUs to come."""
    listed = re.findall(r"[^;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not listed:
        numbers = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
        return [*(f"sm_{number}" for number in numbers), f"compute_{numbers[-1]}"]
    codes = []
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            accepted = "accepted are numbers such as 8.0, 9.0a or 12.0+PTX, separated by semicolons or spaces"
        elif int(match[1]) < 7:
            accepted = "nfnets_kernels needs 7.0 or newer"
        elif f"sm_{match[1]}{match[2]}" not in known:
            accepted = f"nvcc knows {', '.join(known)}"
        else:
            name = "".join(match.group(1, 2, 3))
            codes += [f"sm_{name}", f"compute_{name}"] if match[4] else [f"sm_{name}"]
            continue
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST holds {entry!r}; {accepted}")
    return list(dict.fromkeys(codes))


def compile_empty(nvcc: str, compiler: str) -> str:
    """What nvcc tells of its doings while it compiles nothing: a trial of the toolkit and of the host compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        command = [nvcc, "-v", *NVCC_FLAGS, "-ccbin", compiler, "-c", str(source), "-o", f"{source}.o"]
        run = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode == 0:
        return run.stdout
    refusal = re.search(r"unsupported \w+ version!.*?(?=!| The nvcc|$)", run.stdout, re.MULTILINE)
    if refusal:
        raise CudaMissing(
            f"{nvcc} refuses the host compiler {compiler} ({refusal[0]}); name another in the environment variable "
            "CXX, or set NFK_CUDA=0"
        )
    lines = [line for line in run.stdout.splitlines() if not line.startswith("#$")]
    errors = [line for line in lines if re.search("error|fatal|not found", line)]
    raise CudaMissing(f"{nvcc} does not compile an empty file: {[*errors, *lines, 'no reason given'][0]}")


def static_cudart(log: str) -> Path:
    """The static CUDA runtime in the folders that nvcc searches by its own account."""
    folders = [folder for line in re.findall("#\\$ LIBRARIES=(.*)", log) for folder in re.findall('"-L(.*?)"', line)]
    found = [path.resolve() for path in (Path(folder, "libcudart_static.a") for folder in folders) if path.exists()]
    if not found:
        raise CudaMissing(f"nvcc finds no libcudart_static.a in {', '.join(folders)}")
    return found[0]


def find_cuda(compiler: str) -> Cuda:
    """What builds the CUDA half here; raises CudaMissing where something is missing."""
    if platform.system() != "Linux":
        raise CudaMissing(f"CUDA kernels are built on Linux, not on {platform.system()}")
    nvcc = find_nvcc()
    if nvcc is None:
        raise CudaMissing("the build found no nvcc in CUDA_HOME, PATH or pip's packages (such as nvidia-cuda-nvcc)")
    version = nvcc_version(nvcc)
    codes = cuda_codes(output_of(nvcc, "--list-gpu-code").split())
    return Cuda(nvcc, version, codes, static_cudart(compile_empty(nvcc, compiler)))


def plan_cuda(compiler: str) -> Cuda | str:
    """What builds the CUDA half, or why there will be none, as $NFK_CUDA has it."""
    wish = os.environ.get("NFK_CUDA") or "auto"
    if wish not in ("0", "1", "auto"):
        raise RuntimeError(f"NFK_CUDA must be 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return "not built: the build ran with NFK_CUDA=0"
    try:
        return find_cuda(compiler)
    except CudaMissing as missing:
        if wish == "1":
            raise RuntimeError(f"NFK_CUDA=1, and the CUDA kernels cannot be built: {missing}") from None
        return f"not built: {missing}"


def cpp_objects(compiler: str, cuda: Cuda | str) -> dict[str, tuple[str, list[str]]]:
    """Object file of _C -> (source, its own flags)."""
    openmp = ["-fopenmp"] if compiles(compiler, ["-fopenmp"]) else []
    told = ninja_syntax.escape(shlex.quote(f"-DNFK_CUDA_BUILD={json.dumps(str(cuda))}"))
    objects = {
        "bindings.o": ("csrc/bindings.cpp", [*PYTHON_INCLUDES, *openmp, told]),
        "isa.o": ("csrc/cpu/isa.cpp", []),
    }
    for isa, flags in ISA_FLAGS.items():
        for name in KERNEL_SOURCES:
            objects[f"{name}.{isa}.o"] = (f"csrc/cpu/{name}.cpp", [f"-DNFK_ISA={isa}", *flags])
    return objects


def write_cpp(writer: ninja_syntax.Writer, compiler: str, cuda: Cuda | str, library: Path) -> None:
    """How the C++ compiler makes _C."""
    objects = cpp_objects(compiler, cuda)
    openmp = ["-fopenmp"] if "-fopenmp" in objects["bindings.o"][1] else []
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    writer.rule("compile", [compiler, *COMMON_FLAGS, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"],
                depfile="$out.d", deps="gcc", description="compile $out")  # fmt: skip
    writer.rule("link", [compiler, "-shared", "$in", "-o", "$out", "$flags"], description="link $out")
    for name, (source, flags) in objects.items():
        writer.build(name, "compile", str((ROOT / source).resolve()), variables={"flags": flags})
    writer.build(str(library), "link", list(objects), variables={"flags": [*openmp, *undefined]})


def write_cuda(writer: ninja_syntax.Writer, compiler: str, cuda: Cuda, library: Path) -> None:
    """How nvcc and the C++ compiler make _cuda."""
    # A tenth of the size; drivers that know CUDA 13 unpack it.
    compressed = ["--compress-mode=size"] if int(cuda.version.split(".")[0]) >= 13 else []
    targets = [f"-gencode=arch=compute_{code.partition('_')[2]},code={code}" for code in cuda.codes]
    writer.rule("nvcc", [cuda.nvcc, *NVCC_FLAGS, "-ccbin", compiler, *compressed, *targets, "-MD", "-MF", "$out.d",
                         "-c", "$in", "-o", "$out"],
                depfile="$out.d", deps="gcc", description="nvcc $out")  # fmt: skip
    folder = (ROOT / "csrc" / "cuda").resolve()
    writer.build("cuda/bindings.o", "compile", str(folder / "bindings.cpp"), variables={"flags": PYTHON_INCLUDES})
    for name in CUDA_SOURCES:
        writer.build(f"cuda/{name}.o", "nvcc", str(folder / f"{name}.cu"))
    # Were the runtime's symbols visible, torch's copy of the runtime could take their place.
    flags = [str(cuda.cudart), "-Wl,--version-script=cuda/exports", "-lrt", "-lpthread", "-ldl"]
    objects = ["cuda/bindings.o", *(f"cuda/{name}.o" for name in CUDA_SOURCES)]
    writer.build(str(library), "link", objects, variables={"flags": flags})


class NinjaBuild(build_ext):
    """Hands the extensions to ninja, which rebuilds what changed."""

    def build_extensions(self) -> None:
        """Builds the libraries where setuptools wants them, _cuda only if it can be."""
        # Not build_temp, which pip puts into a fresh temporary folder: here ninja finds its last objects again.
        folder = (ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}").resolve()
        (folder / "cuda").mkdir(parents=True, exist_ok=True)
        (folder / "cuda" / "exports").write_text("{ global: PyInit__cuda; local: *; };\n")
        cpp_library, cuda_library = (Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions)
        cpp_library.parent.mkdir(parents=True, exist_ok=True)
        compiler = find_compiler()
        cuda = plan_cuda(compiler)
        print(f"CUDA kernels: {cuda}")
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file)
            write_cpp(writer, compiler, cuda, cpp_library)
            if isinstance(cuda, Cuda):
                write_cuda(writer, compiler, cuda, cuda_library)
            else:
                cuda_library.unlink(missing_ok=True)
        subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)], check=True)

    def get_source_files(self) -> list[str]:
        """What a source distribution holds of them: the headers too."""
        return CSRC_FILES

    def copy_extensions_to_source(self) -> None:
        """As setuptools does; and a library that this build left out must not be found from an earlier one."""
        super().copy_extensions_to_source()
        for name in map(self.get_ext_filename, (ext.name for ext in self.extensions)):
            if not Path(self.build_lib, name).exists():
                (ROOT / name).unlink(missing_ok=True)


setup(
    ext_modules=[
        Extension("nfnets_kernels._C", sources=["csrc/bindings.cpp"], depends=CSRC_FILES),
        Extension("nfnets_kernels._cuda", sources=["csrc/cuda/bindings.cpp"], optional=True),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
