"""Everything here needs a CUDA GPU with Triton, and skips itself elsewhere:  python -m pytest tests/gpu"""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def device():
    return torch.device("cuda")
