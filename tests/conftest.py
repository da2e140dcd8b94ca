"""What holds for every test: a skip must name the hardware that is missing."""

from __future__ import annotations

from collections.abc import Generator

import pytest

NEEDS = "needs hardware:"
"""How the reason of an honest skip begins; all others fail, for what can run here must."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, "")
        if NEEDS not in reason:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped: {reason}"
    return report
