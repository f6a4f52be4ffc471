"""Results made up for the tests of the report."""

from dataclasses import replace

from benchmarks.environment import Environment
from benchmarks.report.machines import Machine, Run, group
from benchmarks.results import Kernel, ModelFigures, Profile, Results, Timing, Training

# In place of what takes seconds to measure.
MATMUL = dict.fromkeys(("float32", "bfloat16", "float16"), 1e12)


def environment(gpu: str | None = None, **changes) -> Environment:
    texts = dict.fromkeys(("command", "cpu", "python", "torch", "torchvision", "timm", "nfnets_kernels", "commit"), "x")
    plain = Environment(date="2021-02-11", device="x", gpu=gpu, threads=1, dirty=False, **texts)
    return replace(plain, **changes)


def timing(bench: str, case: str, contestant: str, median_ms: float, role="peer", **more) -> Timing:
    """Of a contestant whose 20th and 80th percentile are a tenth off."""
    spread = {"p20_ms": 0.9 * median_ms, "p80_ms": 1.1 * median_ms}
    served = "cpu" if role == "ours" else ""
    return Timing(bench, case, contestant, role, served, 5, median_ms, **spread, relative_time=1.0, **more)


def of(machine_environment: Environment, *timings: Timing) -> Machine:
    return Machine([Run(Results(machine_environment, timings=list(timings)))])


def machines(*results: Results) -> list[Machine]:
    return group(map(Run, results))


STEP = "training step, batch 8 at 224"
SWEEPS = {"agc: parameters": ("memory", [1e6, 1e7, 5e8]), "training step: threads": ("matmul", [1, 2])}


def points() -> list[Timing]:
    """Of two sweeps; ours takes twice the floor, the peer four times."""
    return [
        timing("scaling", f"{sweep} {at:g}", name, factor * at, role, floor_ms=at, bound=bound, sweep=sweep, at=at)
        for sweep, (bound, values) in SWEEPS.items()
        for at in values
        for name, role, factor in (("mine", "ours", 2.0), ("theirs", "peer", 4.0))
    ]


def everything(gpu: str | None = None) -> Results:
    """A figure of every kind; with losses, in names that are no HTML, and an incident."""
    results = Results(environment(gpu, clocks={"MHz": "2100 to 2100"}), {"read": 2e10}, {"float32": 1.5e11})
    clipping = "NF-ResNet-50, all clipped"
    results.timings += [
        timing("agc", clipping, "agc_", 12.0, "ours", floor_ms=9.0, bound="memory", cache="cold"),
        timing("agc", clipping, "lean <b>eager</b> | & co", 18.0, floor_ms=9.0, bound="memory", cache="cold"),
        timing("agc", clipping, "read once", 8.0, "ceiling", floor_ms=9.0, bound="memory", cache="cold"),
        timing("scaled_activation", "gelu bfloat16, forward + backward", "scaled_activation", 20.0, "ours"),
        timing("scaled_activation", "gelu bfloat16, forward + backward", "eager", 18.0),
        timing("scaled_activation", "gelu bfloat16, forward + backward", "compiled", 19.0, compile_s=7.25),
        timing("step", f"{STEP}, float32", "nfnets_kernels nf_resnet50", 954.0, "ours", peak_bytes=503_000_000),
        timing("step", f"{STEP}, float32", "BatchNorm twin", 1041.0, peak_bytes=682_000_000),
        timing("models", "NFNet-F0, batch 8 at 192, float32, training step", "nfnets_kernels nfnet_f0", 8.0, "ours"),
        *points(),
    ]
    figures = ("nfnets_kernels nfnet_f0", "ours", "NFNet-F0, batch 8 at 192, float32", 8, 192, 71_489_000)
    results.models.append(ModelFigures(*figures, 6_980_000_000, 83.6, "somebody"))
    for name, role, batch_norm in (("nfnets_kernels nf_resnet50", "ours", False), ("BatchNorm twin", "peer", True)):
        kernels = [Kernel("aten::mkldnn_convolution", False, 300.0, 53.0), Kernel("aten::<b>|", False, 100.0, 1.0)]
        results.profiles.append(Profile(f"{STEP}, float32", name, role, "cpu", batch_norm, 1, 954.0, kernels))
    for name, last in (("NF-ResNet with AGC", 97.0), ("BatchNorm twin", 98.0)):
        role = "peer" if name == "BatchNorm twin" else "ours"
        results.trainings.append(Training(name, role, "cpu", 0, 2.0, [50.0, last], [1.0, 0.5], 64, 0.02))
    return results
