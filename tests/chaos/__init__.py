"""A small run is hurt at random moments, and must end with the bits of the run that was not."""

import os

# Before torch is imported: runs are forks, and a fork has none of its parent's threads.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
