"""Adapters over MMDetection: adapters over the mmdet and mmcv packages."""

import sys
import warnings

warnings.filterwarnings("ignore", message="On January 1, 2023, MMCV will release")
try:
    from mmdetection_files import operations

    if reason := operations.install():
        print(
            f"warning: mmcv-full's compiled operations are not used ({reason}); PyTorch and torchvision do their work",
            file=sys.stderr,
            flush=True,
        )
    import mmcv.ops  # noqa: F401
    import mmdet.models  # noqa: F401

    from mmdetection_files import masks, weights  # noqa: F401 weights: before a model reads any

    masks.install()
except Exception as error:  # what does not fit shows as ImportError, OSError, AssertionError, …
    sys.exit(
        f"error: mmdet 2.28 or the mmcv 1.7 it needs cannot be imported ({type(error).__name__}: "
        f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}). Install both, in the "
        "folder mmdetection: python3 -m shared.container"
    )
