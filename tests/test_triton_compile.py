"""Every Triton kernel compiled for GPUs that are not there: errors, the width of accesses, registers that spill."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nfnets_kernels import triton_kernels

from . import triton_compile
from .triton_compile import ALIGNED, CASES, MISALIGNED, STREAMING, TARGETS, accesses

Launches = dict[str, list[dict[str, Any]]]

PROCESSES = 2
# Tensors of whole activations or weights, by the names of kernels' parameters; "entry" is one of a table.
READ = {"x", "grad", "f", "shortcut", "grad_h", "grad_a", "entry"}
STREAMED = READ | {"out", "h", "a", "saved", "grad_shortcut", "grad_f"}


@pytest.fixture(scope="session")
def launches() -> Launches:
    """Case -> what `triton_compile` found for each of its launches and targets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def share(i: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", triton_compile.__name__, str(i), str(PROCESSES)]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)

    found: Launches = {}
    with ThreadPoolExecutor(PROCESSES) as pool:
        for process in pool.map(share, range(PROCESSES)):
            assert process.returncode == 0, process.stderr
            for launch in map(json.loads, process.stdout.splitlines()):
                found.setdefault(launch["case"], []).append(launch)
    return found


def assert_none(faulty: list[dict[str, Any]]) -> None:
    assert not faulty, "\n" + "\n".join(map(json.dumps, faulty))


def launched(launches: Launches, case: str) -> list[dict[str, Any]]:
    """The launches of a case, all of which compiled."""
    assert_none([launch for launch in launches[case] if "error" in launch])
    return launches[case]


def streamed(launch: dict[str, Any]) -> dict[str, int]:
    """The widest accesses to the tensors of STREAMED: {"ld x": 16, "st out": 16}."""
    return {access: width for access, width in launch["accesses"].items() if access.split()[1] in STREAMED}


def narrow(launch: dict[str, Any], least: int) -> bool:
    """Whether some streamed tensor is accessed in less than that many bytes at once."""
    return any(width < least for width in streamed(launch).values())


def misaligned(launch: dict[str, Any], most: int) -> bool:
    """Whether some input is read in more than that many bytes at once."""
    return any(width > most for access, width in streamed(launch).items() if access.split()[1] in READ)


def spills(launch: dict[str, Any]) -> bool:
    return launch["stack"] > 0 or launch["local"] > 0


@pytest.mark.parametrize("case", CASES)
def test_compiles_for_every_target(launches, case):
    of_case = launched(launches, case)
    passes = 1 if case.startswith(("agc", "sgd_agc")) else 2  # forward and backward
    for target in TARGETS:
        assert len([launch for launch in of_case if launch["capability"] == target]) >= passes


def test_every_kernel_is_compiled(launches):
    kernels = set()
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        kernels |= {name for name in vars(module) if name.endswith("_kernel")}
    assert kernels <= {launch.get("kernel") for of_case in launches.values() for launch in of_case}


@pytest.mark.parametrize("name", STREAMING)
def test_aligned_tensors_are_accessed_by_16_bytes(launches, name):
    of_name = [launch for layout in ALIGNED for launch in launched(launches, f"{name}, {layout}") if streamed(launch)]
    assert of_name
    # of two dtypes at once a thread takes as many elements: 4 of 16 and of 8 bytes
    assert_none([launch for launch in of_name if narrow(launch, 8 if "mixed" in name else 16)])
    for launch in of_name:
        assert {access.split()[0] for access in streamed(launch)} == {"ld", "st"}, launch
        assert max(streamed(launch).values()) >= 16, launch


@pytest.mark.parametrize("name", STREAMING)
def test_misaligned_tensors_are_read_element_by_element(launches, name):
    of_name = [launch for launch in launched(launches, f"{name}, {MISALIGNED}") if misaligned(launch, 0)]
    assert of_name
    most = 2 if "bfloat16" in name and name != "sgd_agc bfloat16" else 4  # the averages of bfloat16 are float32
    assert_none([launch for launch in of_name if misaligned(launch, most)])


@pytest.mark.parametrize("case", CASES)
def test_no_register_spills(launches, case):
    of_target = [launch for launch in launched(launches, case) if launch["capability"] == 90]
    assert of_target
    assert_none([launch for launch in of_target if spills(launch)])


def test_faults_are_found(launches):
    for launch in launches["every third"]:
        assert narrow(launch, 16) and not misaligned(launch, 4) and not spills(launch)
    for launch in launches["spilling"]:
        assert spills(launch) and misaligned(launch, 4)


def test_addresses_are_followed_to_their_tensor():
    ptx = """
    .visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0,
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r9, [kernel_param_1];
    ld.param.b64 %rd2, [kernel_param_2];
    mad.wide.s32 %rd3, %r9, 8, %rd1;
    @%p1 ld.global.b64 { %rd4 }, [ %rd3 + 0 ];
    @%p1 ld.global.L1::evict_last.v8.b32 { %r1, %r2 }, [ %rd4 + 32 ];
    mov.b32 {%rs1, %rs2}, %r1;
    @!%p2 st.global.v4.b16 [ %rd2 + 0 ], { %rs1, %rs2, %rs1, %rs2 };
    st.global.b16 [ %rd2 + 8 ], { %rs1 };
    """
    signature = {"pointers": "*i64", "n": "i32", "BLOCK": "constexpr", "out": "*bf16"}
    assert accesses(ptx, signature) == {"ld pointers": 8, "ld entry %rd4": 32, "st out": 8}
