"""Whether this process is a cluster's, asked before torch is loaded."""

from __future__ import annotations

import determined as det


def on_cluster() -> bool:
    """Whether this process is a task of a Determined trial."""
    info = det.get_cluster_info()
    return info is not None and info.task_type == "TRIAL"
