"""Before torch loads: the tensors here are tiny, and OpenMP threads that share a core or spin while they wait make the suite slower."""
import os

import pytest
from processes import Pool

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def pool():
    """Three processes that do what they are sent."""
    pool = Pool(3)
    yield pool
    pool.close()
