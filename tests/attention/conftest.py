"""Small tensors everywhere: threads would only wait for one another."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(torch_settings_survive: None) -> None:
    torch.set_num_threads(1)
