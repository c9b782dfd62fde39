"""What is MMDetection's own: adapters over the mmdet and mmcv packages."""

import sys
import warnings

warnings.filterwarnings("ignore", message="On January 1, 2023, MMCV will release")
try:
    import mmcv.ops  # noqa: F401 the compiled part
    import mmdet.models  # noqa: F401
except Exception as error:  # a broken build shows as ImportError, OSError, AssertionError, …
    sys.exit(
        f"error: mmdet 2.28 or the compiled mmcv-full 1.7 it needs cannot be imported ({type(error).__name__}: "
        f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}). Install mmdet, and build "
        "mmcv-full for the torch that is installed: python3 -m pip install 'setuptools<81' wheel mmdet==2.28.2 && "
        "python3 -m pip install --no-build-isolation --force-reinstall --no-deps mmcv-full==1.7.2"
    )
