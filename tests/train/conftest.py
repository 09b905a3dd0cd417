"""Settings for tests that train."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks this small only wait for one another's threads."""
    torch.set_num_threads(1)
