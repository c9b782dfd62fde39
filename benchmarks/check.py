"""`python3 -m shared check` on annotations of COCO's size, without images; the limit is 15 s."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from coco_files import make_file
from shared.commands import data_report
from shared.config.schema import DataConfig
from shared.data import synthetic
from shared.data.open import SplitData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="the COCO file to repeat; synthetic shapes without")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.json"
        images, annotations = make_file(arguments.source, path)
        print(f"{images:,} images, {annotations:,} annotations, {path.stat().st_size / 2**20:,.0f} MiB")
        open_without_images({"train": path, "val": write_val(arguments.source, Path(folder) / "val.json")})
        for what in ("with the annotations parsed anew", "with their cache"):
            started = time.perf_counter()
            report = data_report.Report()
            data_report.describe(data_report.open_both(DataConfig(backend="fake"), report), None, 0, False, report)
            print(f"{what}: {time.perf_counter() - started:.1f} s, {len(report.remarks)} remarks")


def write_val(source: Path | None, path: Path) -> Path:
    """The file that is repeated, which is much smaller."""
    path.write_text(source.read_text() if source else json.dumps(synthetic.coco_split(0, 400)))
    return path


def open_without_images(paths: dict[str, Path]) -> None:
    """Makes the check open these annotations, and no image."""

    def open_split(data: DataConfig, split: str) -> SplitData:
        return SplitData(data_report.CocoAnnotations.open(paths[split]), images=None)

    data_report.open_split = open_split


if __name__ == "__main__":
    main()
