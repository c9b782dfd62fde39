"""What is Detectron2's own: adapters over the detectron2 package."""

import sys

try:
    # not `import detectron2`: from the project's root that finds this folder where the library is missing
    import detectron2.config
    import detectron2.modeling  # noqa: F401
except Exception as error:  # a broken build shows as ImportError, OSError, AttributeError, …
    sys.exit(
        f"error: Detectron2 cannot be imported ({type(error).__name__}: "
        f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}). Install it, built for "
        "the torch that is installed: python3 -m pip install 'setuptools<81' wheel && python3 -m pip install "
        "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
    )
