"""Before torch loads: the tensors here are tiny, and OpenMP threads that share a core or spin while they wait
make the suite slower.
"""
import os

import pytest

from processes import Pool

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("runs", "pieces")                 # so that their asserts tell what they found


@pytest.fixture(scope="module")
def pool():
    """Three processes that do what they are sent."""
    pool = Pool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A function: name in predictions.RUNS -> its trained run folder, made when it is first asked for."""
    import train
    from predictions import RUNS, TINY

    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(name):
        if name not in made:
            assert train.main([*TINY, *RUNS[name], "--out", str(folder / name)]) == 0
            made[name] = folder / name
        return made[name]
    return get
