"""Adapters over Detectron2: adapters over the detectron2 package."""

import sys

try:
    from detectron2_files.operations import install

    COMPILED = install()
    # not `import detectron2`: from the project's root that finds this folder where the library is missing
    import detectron2.config
    import detectron2.modeling  # noqa: F401
except Exception as error:  # a broken install shows as ImportError, OSError, AttributeError, …
    sys.exit(
        f"error: Detectron2 cannot be imported ({type(error).__name__}: "
        f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}). Install it, in the "
        "folder detectron2: python3 -m shared.container"
    )
