"""Says what was built and fails unless CUDA kernels serve CUDA tensors: ``python -m benchmarks.gpu_served``."""

import sys

import nfnets_kernels as nfk
from benchmarks.gpu_cases import KERNELS
from nfnets_kernels.backend import Description


def shortcomings(description: Description) -> list[str]:
    """What the CUDA kernels of this installation do not do, and why."""
    built, serving = description.build["CUDA kernels"], description.serving["cuda"]
    found = [] if built.startswith("built") else [f"CUDA kernels: {built}"]
    for op in KERNELS["cuda"]:
        if serving[op] != "cuda":
            found.append(f"{op} is served by {serving[op]}: {'; '.join(description.reasons['cuda'][op])}")
    return found


def main() -> int:
    """Command line; 1 where something is amiss."""
    description = nfk.backend.describe()
    found = shortcomings(description)
    print("\n".join([str(description), *found]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
