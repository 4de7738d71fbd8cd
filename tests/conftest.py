"""Before torch loads: the tensors here are tiny, and OpenMP threads that share a core or spin while they wait make the suite slower."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
