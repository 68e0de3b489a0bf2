"""What holds for all tests: engines do not measure their costs, which is slow and varies."""

from collections.abc import Iterator

import pytest

from tests.support.costs import fixed_costs, measured_costs


@pytest.fixture(scope="session", autouse=True)
def _fixed_costs() -> Iterator[None]:
    with fixed_costs():
        yield


@pytest.fixture
def measuring() -> Iterator[None]:
    """For tests of the measuring itself."""
    with measured_costs():
        yield
