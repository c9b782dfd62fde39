"""`python3 -m shared convert [FORMAT] INPUT OUTPUT`: annotations of other formats as COCO files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.data.convert.conversion import FORMATS, as_config, convert
from shared.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    formats = "\n".join(f"  {kind:14} {module.ABOUT}" for kind, module in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="python3 -m shared convert",
        description="Writes annotations of other formats as COCO files.",
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", nargs="?", metavar="FORMAT", help="see below; without it the layout is recognised")
    parser.add_argument("source", type=Path, metavar="INPUT", help="the folder or file of the annotations")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="the COCO file to write; splits add _train, _val and _test"
    )
    parser.add_argument("--images", type=Path, help="the folder of the images")
    parser.add_argument("--val", type=float, default=0.0, metavar="SHARE", help="split off 0.2, for example, as val")
    parser.add_argument(
        "--categories", type=Path, metavar="FILE", help="the categories in order: a name per line, or a COCO file"
    )
    parser.add_argument(
        "--labels",
        default="",
        metavar="KIND",
        help="yolo: what the numbers are, if data.yaml does not say it: boxes, polygons, oriented or keypoints:17x3",
    )
    parser.add_argument(
        "--boxes", default="", choices=["xywh", "xyxy"], help="csv, huggingface: what the four numbers of a box are"
    )
    parser.add_argument("--tiles", type=int, default=640, metavar="PIXELS", help="tiles: their side; default 640")
    parser.add_argument(
        "--overlap", type=float, default=0.2, help="tiles: the share that the next tile shows too; default 0.2"
    )
    given = parser.parse_intermixed_args(arguments)
    try:
        written = convert(
            given.kind,
            given.source,
            given.output,
            given.images,
            given.val,
            given.labels,
            given.boxes,
            given.categories,
            tiling=(given.tiles, given.overlap),
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, written)))
    for one in written:
        if one.split == "test":
            print(f"\nthe test split is {one.path.absolute()}, its images are in {one.part.folder}")
    print(f"\nfor the experiment config:\n\n{as_config(written)}")
