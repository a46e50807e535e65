import pytest


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread):
    """Every test here runs so."""
