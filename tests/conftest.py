"""The device that tests of tensors run on: the CPU always, a GPU where there is one."""

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
    ]
)
def device(request):
    return request.param
