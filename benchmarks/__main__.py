"""Command line of the benchmarks: ``python -m benchmarks --help``."""

import argparse
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path

from benchmarks.results import BENCHES

DESCRIPTION = """\
Measures every op of nfnets_kernels, the training step and inference of NF-ResNet-50, whole networks at the size that
they are trained at, and a training run on handwritten digits, each beside its peers in one process. Writes
results.json, results.csv, summary.md and plots."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    listed = "\n".join(f"  {name:<20}{title}" for name, title in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=f"benchmarks:\n{listed}\n\npython -m benchmarks report --help: all results on one page",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="less than 5 minutes on 2 cores (default)")
    length.add_argument("--full", action="store_true", help="more rounds, more peers, more seeds")
    parser.add_argument("--only", nargs="+", choices=BENCHES, metavar="NAME", help="run these benchmarks, listed below")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where results replace earlier ones (default: benchmarks/results/MACHINE, with --only MACHINE/partial)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where a run of the same code on this machine was cut off: what DIR has is not measured again",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data and networks (default: 0)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per timing (default: what the time allows)")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="of the training step (default: 8; on a GPU 256, with --full also 32)",
    )
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="of the training step (default: 224)")
    parser.add_argument(
        "--max-autotune",
        action="store_true",
        help="on a GPU: networks under torch.compile in its slowest mode, minutes for each (default: ops alone)",
    )
    parser.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let malloc reuse freed memory, as jemalloc and tcmalloc do, so that page faults do not blur the timings",
    )
    return parser.parse_args()


def main() -> int:
    """Run the chosen benchmarks; 1 if a figure failed verification, 130 after Ctrl-C. Or write the report."""
    if sys.argv[1:2] == ["report"]:
        from benchmarks.report.command import main as report

        return report(sys.argv[2:])
    arguments = parse_arguments()
    # A shell ignores it for what it starts in the background, `timeout -s INT` included.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    # Only now, so that --help answers at once.
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    import nfnets_kernels as nfk
    from benchmarks.clocks import side_stream
    from benchmarks.environment import REPOSITORY, Environment, keep_freed_memory
    from benchmarks.harness import Session, Settings
    from benchmarks.report.command import make_console, print_report, write_report
    from benchmarks.results import Incident, Results

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    large, small = (8, None) if device == "cpu" else (256, 32 if arguments.full else None)
    settings = Settings(
        device=device,
        quick=not arguments.full,
        seed=arguments.seed,
        rounds=arguments.rounds,
        batch_size=arguments.batch_size or large,
        image_size=arguments.image_size,
        small_batch_size=None if arguments.batch_size else small,
        max_autotune=arguments.max_autotune,
    )
    results = Results(Environment.record(device, arguments.keep_memory and keep_freed_memory()))
    folder = arguments.output or REPOSITORY / "benchmarks" / "results" / results.environment.slug
    if arguments.only and not arguments.output:
        folder /= "partial"
    if arguments.resume:
        try:
            results.resume(folder)
        except ValueError as error:
            raise SystemExit(str(error)) from error

    console = make_console()
    console.print(str(nfk.backend.describe()), markup=False, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    interrupted = False
    with Progress(*columns, console=console) as progress, side_stream(device):
        try:
            session = Session(settings, results, folder, progress)
            for name in session.track(arguments.only or list(BENCHES), "benchmarks"):
                try:
                    import_module(f"benchmarks.bench_{name}").run(session)
                except Exception as error:  # the others may still have something to say
                    traceback.print_exc()
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    session.report_incident(Incident(name, "and what was to follow", "failed", reason))
        except KeyboardInterrupt:
            interrupted = True
            console.print("[yellow]interrupted; keeping what is finished[/]")
    results.save(folder)
    print_report(results, console)
    write_report(results, folder, console)
    console.print(f"Results are in {folder}")
    if interrupted:
        return 130
    return int(any(incident.kind == "failed" for incident in results.incidents))


if __name__ == "__main__":
    sys.exit(main())
