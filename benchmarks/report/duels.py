"""Ours against the strongest that is not ours: the one figure by which a case is told in short."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Timing


@dataclass(frozen=True)
class Duel:
    """Our first contestant of a case and the fastest peer, where there is one."""

    ours: Timing
    peer: Timing | None

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> "Duel | None":
        """The duel in the timings of a case; None where none of ours was timed."""
        ours = next((one for one in timings if one.role == "ours"), None)
        return None if ours is None else cls(ours, fastest([one for one in timings if one.role == "peer"]))

    @property
    def speed_up(self) -> float | None:
        """How many times as fast as the peer ours is."""
        return None if self.peer is None else self.peer.median_ms / self.ours.median_ms


def fastest(timings: Sequence[Timing]) -> Timing | None:
    """The timing with the lowest median; None of none."""
    return min(timings, key=lambda one: one.median_ms, default=None)
