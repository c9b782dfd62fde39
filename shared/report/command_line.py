"""`python3 -m shared report` and `compare`: pages on anybody's detections, in COCO's result format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import UserError

if TYPE_CHECKING:
    from shared.data.annotations import CocoAnnotations
    from shared.evaluation.detections import Detections

# what takes seconds to import comes after the command line is read

_RESAMPLES = 200
_OF_A_FOLDER = ("detections.npz", "results.json")  # what is read from one


def report_main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m shared report", description="A page of what detections are worth: anybody's, in COCO's format."
    )
    parser.add_argument("annotations", type=Path, help="COCO annotations")
    parser.add_argument("results", type=Path, help="detections in COCO's result format")
    _main(parser, "report.html", _report, arguments)


def compare_main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m shared compare",
        description="Whether one detector is better than another: B, C … against A.",
    )
    parser.add_argument("detections", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a results.json")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO annotations")
    _main(parser, "compare.html", _compare, arguments)


def _main(
    parser: argparse.ArgumentParser,
    output: str,
    write: Callable[[argparse.Namespace], None],
    arguments: Sequence[str],
) -> None:
    """What both have in common: the rest of the command line, and one line where something is wrong."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="the images, for pictures")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="FILE", help=f"default {output}")
    parser.add_argument(
        "--resamples",
        type=int,
        default=_RESAMPLES,
        metavar="N",
        help=f"of the images, for the intervals; 0 for none; default {_RESAMPLES}",
    )
    given = parser.parse_args(arguments)
    try:
        if given.images is not None and not given.images.is_dir():
            raise UserError(f"--images: {given.images} is no folder")
        if given.resamples < 0 or given.resamples == 1:
            raise UserError(f"--resamples: {given.resamples} gives no interval. Fix: 0 for none, or 2 and more")
        write(given)
    except UserError as error:
        sys.exit(f"error: {error}")


def _report(given: argparse.Namespace) -> None:
    from shared.data.annotations import CocoAnnotations
    from shared.evaluation.detections import from_coco_results
    from shared.report.about import About
    from shared.report.page import check_page
    from shared.report.report import report, summary_of

    check_page(given.output, [given.annotations, given.results])
    annotations = CocoAnnotations.open(given.annotations)
    detections = from_coco_results(given.results, annotations)
    facts = {"annotations": given.annotations, "detections": given.results}
    about = About(title=f"{given.results.name} on {given.annotations.name}", facts=facts)
    analyses = report(annotations, detections, given.output, given.images, resamples=given.resamples, about=about)
    print(summary_of(analyses))
    print(f"the page: {given.output}; its numbers: {given.output.with_suffix('.json')}")


def _compare(given: argparse.Namespace) -> None:
    if len(given.detections) < 2:
        raise UserError("compare: give two sets of detections, or more")
    from shared.data.annotations import CocoAnnotations
    from shared.report.compare import compare, summary_of
    from shared.report.page import check_page

    read = [path / name if path.is_dir() else path for path in given.detections for name in _OF_A_FOLDER]
    check_page(given.output, [given.annotations, *read])
    annotations = CocoAnnotations.open(given.annotations)
    opened = [_open(path, annotations) for path in given.detections]
    names = _names(given.detections)
    evaluated = [set(image_ids) for _, image_ids in opened if image_ids is not None]
    image_ids = sorted(set.intersection(*evaluated)) if evaluated else None
    detections = {name: found for name, (found, _) in zip(names, opened, strict=True)}
    comparisons = compare(
        annotations, detections, given.output, given.images, image_ids=image_ids, resamples=given.resamples
    )
    print("\n".join(summary_of(comparison) for comparison in comparisons))
    print(f"the page: {given.output}; its numbers: {given.output.with_suffix('.json')}")


def _open(path: Path, annotations: CocoAnnotations) -> tuple[list[Detections], list[int] | None]:
    """The detections, and the images that were evaluated; None for all."""
    from shared.evaluation.detections import from_coco_results
    from shared.evaluation.gathered import load_detections

    if not path.is_dir():
        return from_coco_results(path, annotations), None
    if (path / "detections.npz").exists():
        found, category_names = load_detections(path / "detections.npz")
        if category_names != annotations.category_names:
            raise UserError(
                f"{path} has detections of the categories {category_names}, and {annotations.path} has "
                f"{annotations.category_names}"
            )
        return found.detections(), found.images.tolist()
    if (path / "results.json").exists():
        return from_coco_results(path / "results.json", annotations), None
    raise UserError(
        f"{path} has neither detections.npz, as a run with a validation leaves it, nor results.json, as `evaluate "
        "--output` writes it"
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Short, and no two alike."""
    parts = [path.absolute().resolve().with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-2:])} ({number})" for number, part in enumerate(parts, 1)]
