"""Which backend serves, what is said about it, and what happens without the compiled extension."""

import json
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch

import nfnets_kernels as nfk
from nfnets_kernels import backend
from nfnets_kernels.ops.scaled_activation import CPU_CODES

from .helpers import instruction_sets


@pytest.fixture
def missing_extension(monkeypatch) -> Iterator[str]:
    """The package as it is where `nfnets_kernels._C` was not built; gives the reason that users should read."""
    reason = "nfnets_kernels._C is not built (no such file)"
    monkeypatch.setattr(backend, "extension", None)
    monkeypatch.setattr(backend, "_extension_missing", reason)
    backend.serving.cache_clear()
    yield reason
    backend.serving.cache_clear()


@pytest.fixture
def auto_isa() -> Iterator[None]:
    yield
    backend.extension.select_isa("auto")


def clip(**options: str) -> torch.Tensor:
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    nfk.agc_(p, **options)
    return p.grad


def test_every_op_has_a_reference_for_every_activation_and_device():
    for op in backend.OPS:
        for device in ("cpu", "cuda", "mps", "meta"):
            for variant in (None, "relu", "glu"):
                assert backend.unavailable(op, "reference", device, variant) is None


@pytest.mark.parametrize("op", ["weight_standardize", "scaled_activation", "agc"])
def test_cpu_kernels_serve_cpu_tensors(op):
    assert backend.serving(op) == backend.serving(op, "cpu", "auto") == backend.serving(op, "cpu", "cpu") == "cpu"
    assert backend.serving(op, "cpu", "reference") == "reference"


def test_other_devices_are_served_by_the_reference():
    assert backend.serving("agc", "mps") == "reference"
    assert backend.unavailable("agc", "cpu", "mps") == "it does not run on mps tensors"


@pytest.mark.parametrize("variant", sorted(CPU_CODES))
def test_an_activation_with_a_kernel_is_served_by_it(variant):
    assert backend.serving("scaled_activation", "cpu", "auto", variant) == "cpu"


def test_an_activation_without_a_kernel_is_served_by_the_reference_unless_the_kernel_is_asked_for():
    assert backend.serving("scaled_activation", "cpu", "auto", "celu") == "reference"
    known = ", ".join(sorted(CPU_CODES))
    with pytest.raises(ValueError, match=rf"'cpu' cannot serve scaled_activation on cpu: .* knows {known}, not celu"):
        backend.serving("scaled_activation", "cpu", "cpu", "celu")


@pytest.mark.parametrize("choose", [backend.serving, backend.select])
def test_unknown_names_are_named_with_what_is_accepted(choose):
    with pytest.raises(ValueError, match=r"op must be one of .*'agc'.* got 'agcc'"):
        choose("agcc", "cpu")
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'.* got 'tpu'"):
        choose("agc", "cpu", "tpu")


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve agc on cpu: it does not run on cpu tensors"):
        clip(backend="cuda")


def test_triton_serves_cpu_tensors_by_name_and_only_interpreted(monkeypatch):
    backend.serving.cache_clear()
    for op in backend.OPS:
        assert backend.serving(op, "cpu", "triton") == "triton"
        assert backend.serving(op, "cpu") != "triton"
        assert "cannot follow tables of pointers" in backend.unavailable(op, "triton", "cuda")
    monkeypatch.setattr(backend, "TRITON_INTERPRETED", False)
    assert "only under Triton's interpreter" in backend.unavailable("agc", "triton", "cpu")
    assert backend.unavailable("agc", "triton", "cuda") is None
    assert backend.unavailable("agc", "triton", "mps") == "it does not run on mps tensors"


@pytest.mark.parametrize("reason", ["triton is not installed", "triton 3.5.1 is installed and 3.6 or newer needed"])
def test_cuda_tensors_without_a_usable_triton_and_extension_are_served_by_the_reference(monkeypatch, reason):
    monkeypatch.setattr(backend, "_triton_missing", reason)
    monkeypatch.setattr(backend, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backend, "_cuda_obstacle", lambda: "nfnets_kernels._cuda is not built")
    backend.serving.cache_clear()
    description = backend.describe()
    backend.serving.cache_clear()
    assert description.build["Triton kernels"] == reason
    assert set(description.serving["cuda"].values()) == {"reference"}
    assert description.build["CUDA kernels"] == "nfnets_kernels._cuda is not built"
    assert all(f"not triton: {reason}" in reasons for reasons in description.reasons["cuda"].values())


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: "3.5.1")
    assert backend._triton_version() == ("3.5.1", "triton 3.5.1 is installed and 3.6 or newer needed")


def test_select_gives_what_was_registered(monkeypatch):
    monkeypatch.setattr(backend, "_kernels", dict(backend._kernels))

    @backend.register("agc", "cpu")
    def mine() -> None: ...

    assert backend.select("agc", "cpu", "cpu") is mine
    assert backend.select("agc", "cpu") is mine
    assert backend.select("agc", "cpu", "reference") is not mine


def test_a_backend_without_a_kernel_for_an_op_says_so(monkeypatch):
    kernels = {key: kernel for key, kernel in backend._kernels.items() if key != ("agc", "cpu")}
    monkeypatch.setattr(backend, "_kernels", kernels)
    assert backend.unavailable("agc", "cpu", "cpu") == "this version has no cpu kernel for agc"
    assert backend.unavailable("weight_standardize", "cpu", "cpu") is None


def test_recording_lists_what_ran_in_order():
    with backend.recording() as record:
        clip()
        nfk.functional.scaled_activation(torch.ones(2), "relu")
        nfk.functional.scaled_activation(torch.ones(2), "celu")
        clip(backend="reference")
    clip()
    activation = "scaled_activation"
    assert record == [("agc", "cpu"), (activation, "cpu"), (activation, "reference"), ("agc", "reference")]


def test_recordings_nest_and_end_when_an_exception_leaves_them():
    with backend.recording() as outer:
        with pytest.raises(KeyError), backend.recording() as inner:
            clip()
            raise KeyError
        clip(backend="reference")
    clip()
    assert inner == [("agc", "cpu")]
    assert outer == [("agc", "cpu"), ("agc", "reference")]
    assert not backend._recorders


def test_equal_recordings_are_told_apart():
    with backend.recording() as outer:
        with backend.recording() as inner:
            assert outer == inner == []
        clip()
    assert (outer, inner) == ([("agc", "cpu")], [])


def test_what_is_refused_is_not_recorded():
    with backend.recording() as record, pytest.raises(ValueError):
        clip(backend="cuda")
    assert record == []


def test_description_tells_what_is_built():
    build = backend.describe().build
    assert build["nfnets_kernels"] == nfk.__version__
    assert build["torch"] == torch.__version__
    assert build["machine"] == platform.machine()
    assert f"instruction set {instruction_sets()[-1]}" in build["CPU kernels"]
    assert f"{torch.get_num_threads()} threads" in build["CPU kernels"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible to torch"
    assert build["CUDA device"] == device


def test_description_follows_the_selected_instruction_set(auto_isa):
    for isa in instruction_sets():
        backend.extension.select_isa(isa)
        assert backend.extension.isa() == isa
        assert f"instruction set {isa};" in str(backend.describe())


def test_description_tells_what_serves_each_op_and_why():
    description = backend.describe()
    assert set(description.serving) == set(description.reasons) == {"cpu", "cuda"}
    for device, ops in description.serving.items():
        assert tuple(ops) == backend.OPS
        for op, served in ops.items():
            assert served == backend.serving(op, device)
            preferred = backend._PREFERENCE[device]
            for name in preferred[: preferred.index(served)]:
                reason = f"not {name}: {backend.unavailable(op, name, device)}"
                assert reason in description.reasons[device][op]
    assert description.reasons["cpu"]["agc"] == []
    activations = f"for {', '.join(sorted(CPU_CODES))}; the reference serves the others"
    assert description.reasons["cpu"]["scaled_activation"] == [activations]


def test_description_prints_every_fact_once():
    description = backend.describe()
    lines = str(description).splitlines()
    for key, value in description.build.items():
        assert lines.count(f"{key}: {value}") == 1
    for device, ops in description.serving.items():
        section = lines[lines.index(f"on {device} tensors:") + 1 :][: len(ops)]
        for (op, served), line in zip(ops.items(), section, strict=True):
            assert line.split()[:2] == [op, served]
            assert all(reason in line for reason in description.reasons[device][op])
    assert len(lines) == len(description.build) + sum(1 + len(ops) for ops in description.serving.values())


@pytest.mark.parametrize("isa", ["sse9", "", "AVX2", "reference"])
def test_an_unknown_instruction_set_is_named_and_changes_nothing(isa, auto_isa):
    before = backend.extension.isa()
    with pytest.raises(ValueError, match=f"'{isa}'"):
        backend.extension.select_isa(isa)
    assert backend.extension.isa() == before


def test_without_extension_the_reference_serves_and_the_reason_is_said(missing_extension):
    with backend.recording() as record:
        grad = clip()
    assert record == [("agc", "reference")]
    assert (grad < 0.011).all()
    with pytest.raises(ValueError, match=r"'cpu' cannot serve agc on cpu: nfnets_kernels\._C is not built"):
        clip(backend="cpu")
    description = backend.describe()
    assert description.build["CPU kernels"] == missing_extension
    assert set(description.serving["cpu"].values()) == {"reference"}
    assert description.reasons["cpu"]["agc"] == [f"not cpu: {missing_extension}"]
    assert str(description).count(missing_extension) == 1 + len(backend.OPS)


def test_the_package_imports_and_works_where_the_extension_cannot_be_imported():
    program = """
        import sys
        sys.modules["nfnets_kernels._C"] = None  # makes its import fail
        import json, torch, nfnets_kernels as nfk
        p = torch.nn.Parameter(torch.ones(3, 4))
        p.grad = torch.ones(3, 4)
        with nfk.backend.recording() as record:
            nfk.agc_(p)
        print(json.dumps([record, p.grad.max().item(), nfk.backend.describe().build["CPU kernels"]]))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record, largest, kernels = json.loads(run.stdout)
    assert record == [["agc", "reference"]]
    assert largest == pytest.approx(0.01)
    assert kernels.startswith("nfnets_kernels._C is not built (")
    assert "pip install" in kernels


def test_cuda_kernels_of_another_build_are_not_used():
    """A package that was built without them may find those of an earlier build."""
    program = """
        import importlib, sys, types
        from nfnets_kernels import backend
        backend.extension.cuda_build = "not built: the build ran with NFK_CUDA=0"
        sys.modules["nfnets_kernels._cuda"] = types.ModuleType("nfnets_kernels._cuda")
        importlib.reload(backend)
        assert backend.cuda_extension is None
        print(backend.unavailable("agc", "cuda", "cuda"))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.stdout == "nfnets_kernels._cuda is not built: the build ran with NFK_CUDA=0\n", run.stderr


def test_the_module_prints_its_description():
    run = subprocess.run([sys.executable, "-m", "nfnets_kernels"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"nfnets_kernels: {nfk.__version__}\n")
    assert "on cpu tensors:\n" in run.stdout
