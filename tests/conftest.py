"""What tests of all rooms share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """More threads cost more than they give on small tensors, where several workers share the processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
