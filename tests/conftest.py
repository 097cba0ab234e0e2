"""What every test gets: no network, one quiet thread pool, the same seed, few requests of general text."""

import os

# Before torch is imported: spinning OpenMP threads make a busy two-core machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch

from few_prompts import few_general_prompts

# Warnings are errors (pyproject.toml), but for these two, which only others can mend.
FOREIGN_WARNINGS = (
    # transformers 5.23, processing_paligemma.py: np.array of a tensor under numpy 2.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # peft 0.21 asks transformers for a property under its old name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True, scope="session")
def few_prompts() -> Iterator[None]:
    """Makes "none of the tasks" 25 prompts, every twelfth of the 300, for `routed` and for `alula adopt`.

    What it hides: how long the stage ``general`` is, and what routers know of so many prompts. `test_passes.py` goes through all of them;
    so do prefixes, documents, and the processes that tests start, but for workers whose numbers are compared with those made here.
    """
    with few_general_prompts():
        yield


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0
