"""Builds `nfnets_kernels._C` with ninja: C++17, pybind11, no torch header (metadata lives in pyproject.toml)."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import ninja
import pybind11
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
HEADERS = sorted(str(path) for path in (ROOT / "csrc").rglob("*.h"))

# One build of the kernels per instruction set; csrc/cpu/isa.cpp picks one at run time.
AVX2 = ["-mavx2", "-mfma"]
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = AVX2
    ISA_FLAGS["avx512"] = [
        *AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
    ]  # fmt: skip
KERNEL_SOURCES = ["agc", "residual", "scaled_activation", "weight_standardize"]

# -fno-trapping-math lets float comparisons become vector selects; NaN and infinity keep their meaning (no -ffast-math).
COMMON_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi",
]  # fmt: skip


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


def object_rules(compiler: str) -> dict[str, tuple[str, list[str]]]:
    """Object file -> (source, its own flags)."""
    openmp = ["-fopenmp"] if compiles(compiler, ["-fopenmp"]) else []
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = {
        "bindings.o": ("csrc/bindings.cpp", [*includes, *openmp]),
        "isa.o": ("csrc/cpu/isa.cpp", []),
    }
    for isa, flags in ISA_FLAGS.items():
        for name in KERNEL_SOURCES:
            objects[f"{name}.{isa}.o"] = (f"csrc/cpu/{name}.cpp", [f"-DNFK_ISA={isa}", *flags])
    return objects


def write_ninja_file(folder: Path, library: Path) -> None:
    """Writes build.ninja, which compiles csrc and links `library`."""
    compiler = find_compiler()
    objects = object_rules(compiler)
    uses_openmp = "-fopenmp" in objects["bindings.o"][1]
    link = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    with open(folder / "build.ninja", "w") as file:
        writer = ninja_syntax.Writer(file)
        writer.rule("compile", [compiler, *COMMON_FLAGS, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"],
                    depfile="$out.d", deps="gcc", description="compile $out")  # fmt: skip
        writer.rule("link", [compiler, "-shared", "$in", "-o", "$out", *(["-fopenmp"] if uses_openmp else []), *link],
                    description="link $out")  # fmt: skip
        for name, (source, flags) in objects.items():
            writer.build(name, "compile", str((ROOT / source).resolve()), variables={"flags": flags})
        writer.build(str(library), "link", list(objects))


class NinjaBuild(build_ext):
    """Hands the one extension to ninja, which rebuilds what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the library where setuptools wants it."""
        # Not build_temp, which pip puts into a fresh temporary folder: here ninja finds its last objects again.
        folder = (ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        write_ninja_file(folder, library)
        subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)], check=True)


setup(
    ext_modules=[Extension("nfnets_kernels._C", sources=["csrc/bindings.cpp"], depends=HEADERS)],
    cmdclass={"build_ext": NinjaBuild},
)
