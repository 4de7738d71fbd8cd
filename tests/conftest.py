"""Before torch loads: the tensors here are tiny, and OpenMP threads that share a core or spin while they wait
make the suite slower.
"""
import gc
import os

import pytest

from processes import Pool

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# So that their asserts tell what they found.
pytest.register_assert_rewrite("runs", "pieces", "volume_files")


# Those that take half a minute and more begin first, so that no worker is left alone with one at the end.
LONGEST = ("test_distributed", "test_readme", "test_edges", "test_signals", "test_memtest", "test_tiles",
           "test_tile_parallel", "test_sparse", "test_peaks", "test_sparse_task", "test_fit", "test_order")


def pytest_collection_modifyitems(items):
    def place(item):
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
    items.sort(key=place)


def pytest_collection_finish():
    freeze()


def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        freeze()


def freeze() -> None:
    """Takes what is there now out of the garbage collector's sight: every prediction collects garbage before
    its step, and would look each time at the millions of objects of the libraries that the tests import.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pool():
    """Processes that do what they are sent."""
    pool = Pool()
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


@pytest.fixture
def folder(tmp_path):
    """Five CT-like volumes of different sizes, the smallest of which is below the patch."""
    import numpy as np

    from volume_files import ct_like, save

    for number, shape in enumerate(((20, 24, 12), (22, 20, 16), (6, 30, 14), (24, 24, 24), (18, 19, 13))):
        save(tmp_path / "in" / f"case{number}.nii.gz", ct_like(shape, number), np.diag([1.0, 1.5, 2.0, 1]))
    return tmp_path / "in"


@pytest.fixture
def opened(folder, tmp_path):
    """What `open_data` makes of that folder."""
    from data import open_data
    from volume_files import config, quiet

    return open_data(config(folder, tmp_path), 3, quiet)
