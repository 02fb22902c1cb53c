"""Rules for every test: markers, reproducible properties, no state left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from mnemosyne.model_zoo.fetch import Unavailable
from mnemosyne.model_zoo.smollm2 import write_smollm2

SLOW_TIMEOUT_S = 3600
# read now: tests set the variable to folders of their own
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnemosyne"

# Without a GPU the Triton kernels run in the interpreter; it must be asked for before the import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Fixed seeds, here too; and no deadline, because a busy machine is no error of the code.
settings.register_profile("mnemosyne", derandomize=True, deadline=None)
settings.load_profile("mnemosyne")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests where there is no GPU; give ``slow`` ones an hour instead of minutes."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.fixture(autouse=True)
def fits_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A test never starts from step times that another one measured, nor leaves any behind."""
    folder = tmp_path_factory.mktemp("fits")
    monkeypatch.setattr("mnemosyne.joining.step_times.fits_folder", lambda: folder)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A small trained model with a real tokenizer, made once per machine."""
    try:
        return write_smollm2(CACHE / "smollm2")
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def torch_settings_survive() -> Iterator[None]:
    """A test may set the number of threads or the default dtype; the next one does not notice."""
    num_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(num_threads)
    torch.set_default_dtype(dtype)
