"""The entries of dvc.yaml: each reads folders, calls the library, and writes folders."""

import sys

from dreambooth.cores import bind_threads

if sys.argv[:1] == ["-m"]:  # python -m stages.train: the process is the stage's own, and torch is not loaded yet
    bind_threads()
