"""What can be trained: one module a task. A new task is one file here and one line in the table
(training/task.py says what is asked of it).
"""
from tasks import diffusion, features, seg, sparse, vae

TASKS = {"vae": vae, "seg": seg, "features": features, "sparse": sparse, "diffusion": diffusion}
