"""Settings for tests that train."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Networks this small only wait for one another's threads, whose sums differ in their last bits."""
    torch.set_num_threads(1)
