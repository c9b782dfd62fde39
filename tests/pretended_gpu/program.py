"""A program: runs a benchmark on the pretended GPU, in one process.

PYTHONPATH=tests python -m pretended_gpu.program benchmarks/training_step.py step ARGUMENT …
"""

import runpy
import sys
from pathlib import Path

from pretended_gpu.cuda import Unsupported, install
from pretended_gpu.streams import HERE

if __name__ == "__main__":
    try:
        install()
    except Unsupported as error:
        sys.exit(f"unsupported: {error}")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    import side_by_side

    side_by_side.PYTORCH.append(HERE)  # a benchmark reports the places outside of it where the host waits
    runpy.run_path(sys.argv[0], run_name="__main__")
