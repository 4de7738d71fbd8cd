"""Before torch loads: on a shared core, OpenMP threads that spin while they wait make the suite several times slower."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
