"""A pytest plugin that counts what hypothesis tried: `pytest -p tests.campaign.counting`.

NFK_CAMPAIGN_COUNTS names a file, to which every test of hypothesis adds a line of JSON when it has ended.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = "NFK_CAMPAIGN_COUNTS"
# hypothesis.statistics.describe_statistics writes it, once per phase.
_PHASE = re.compile(r"(\d+) passing, (\d+) failing, and (\d+) invalid")


def inputs_of(statistics: str) -> tuple[int, int]:
    """(inputs tried, those that failed) of hypothesis's statistics of a test; invalid inputs never reached an op."""
    phases = [tuple(map(int, phase)) for phase in _PHASE.findall(statistics)]
    assert phases, f"hypothesis's statistics say no longer how many inputs passed: {statistics!r}"
    return sum(passing + failing for passing, failing, _ in phases), sum(failing for _, failing, _ in phases)


def op_of(path: Path) -> str:
    """test_residual_bias.py tests residual."""
    return path.stem.removeprefix("test_").removesuffix("_bias")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[Any]:
    report = yield
    statistics = getattr(item, "hypothesis_statistics", None)
    if call.when == "call" and statistics:
        inputs, failing = inputs_of(statistics)
        params = item.callspec.params
        line = {
            "op": op_of(item.path),
            "backend": params.get("target") or params["kernel"],
            "inputs": inputs,
            "failing": failing,
            "seconds": round(call.duration, 1),
        }
        with open(os.environ[FILE], "a") as file:
            file.write(json.dumps(line) + "\n")
    return report
