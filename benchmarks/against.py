"""The benchmarks against a detector's library: `step`, `memory` and `evaluation`."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from command_line import main, scratch_folder, silent
from memory import compare_memory
from pycocotools import mask as coco_mask
from side_by_side import config_of, time_against

from coco_files import IMAGES, PER_IMAGE, data_folder, make_file, truth_and_detections
from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.training.trial import DetectionTrial


def run(library: ModuleType) -> None:
    """The command line of a comparison with a library.

    Args:
        library: the program, with these names:
            NAME, TRIAL_CLASS: the other side's name, and our trial.
            SMALL, FULL: hyperparameters for a CPU, and for a GPU.
            loop: takes the trial, the COCO folder, the number of workers and the hyperparameters without `--set`;
                returns what trains as many batches as its argument.
            RANKS: numbers of processes whose memory is measured. This and the next are for `memory` and `evaluation`,
                which a library may lack.
            data_sets: takes a COCO file; returns how to open and how to read it, of ours and of the library's.
            output: makes the model's output of an image from boxes, scores, labels, and masks or None.
            to_detections: ours; takes such an output and the image's id.
            evaluations: takes a COCO file and the IoU types; returns the library's evaluations by name, each a pair:
                what takes such an output and the image's id, and what returns the mAP of the last IoU type.
    """

    def step(
        source: Path | None = None,
        full: bool = False,
        blocks: int = 7,
        block: int = 10,
        batch_size: int = 2,
        workers: int = 1,
        images: int = 400,
        set_: dict = {},  # noqa: B006
    ) -> dict:
        """Seconds per training step in our engine, against the library's own loop, data set and loader.

        source: a COCO folder; default: synthetic images
        full: at the full size, for a GPU
        blocks: timed blocks of each side
        block: batches per block
        set_: hyperparameters of our side only, such as amp=bf16
        """
        given = {"global_batch_size": batch_size, **(library.FULL if full else library.SMALL)}
        with scratch_folder() as scratch:
            folder = scratch / "coco"
            data_folder(source, folder, train=images)
            config = config_of(folder, {**given, **dict(set_)}, workers=workers)

            def other(trial: DetectionTrial) -> Callable[[int], None]:
                return library.loop(trial, folder, workers, given)

            measured = time_against(library.TRIAL_CLASS, config, other, blocks, block, library.NAME)
        return {"config": given.get("config_file"), **dict(set_), **measured}

    def memory(source: Path | None = None, images: int = IMAGES) -> dict:
        """The memory (PSS) of a data set and the four loader workers of a process, after each has read every record.

        source: a COCO file to repeat; default: synthetic data
        images: the number of images in the repeated file
        """
        with scratch_folder() as folder:
            path = folder / "instances.json"
            measured = dict(zip(("images", "annotations"), make_file(source, path, images), strict=True))
            CocoAnnotations.open(path)
            for ranks in library.RANKS:
                sides = dict(zip(("ours", library.NAME), library.data_sets(path), strict=True))
                measured[f"{ranks} processes"] = compare_memory(sides, ranks)
        return measured

    def evaluation(images: int = 5000) -> dict:
        """Seconds from the model's outputs to the metrics, of boxes and masks.

        images: 15 objects each
        """
        measured: dict[str, Any] = {"images": images, "detections": images * PER_IMAGE}
        with scratch_folder() as folder:
            path = folder / "truth.json"
            coco, detections = truth_and_detections(images, masks=True)
            path.write_text(json.dumps(coco))
            for iou_types in (("bbox",), ("bbox", "segm")):
                measured[" and ".join(iou_types)] = _evaluate(library, path, detections, iou_types)
        return measured

    if sys.argv[1:2] in (["memory"], ["evaluation"]) and not hasattr(library, "data_sets"):
        sys.exit(f"{sys.argv[0]} has one command: step")
    main(library.__doc__, step, memory, evaluation)


def _evaluate(library: ModuleType, path: Path, detections: list[Detections], iou_types: tuple[str, ...]) -> dict:
    evaluator = CocoEvaluator(CocoAnnotations.open(path), iou_types)
    evaluator.open_truth()

    def add(output: Any, image_id: int) -> None:
        evaluator.update([library.to_detections(output, image_id)])

    sides = {"ours": (add, lambda: evaluator.compute()[f"{iou_types[-1]}_mAP"])}
    with silent():
        sides |= library.evaluations(path, iou_types)
        adding, computing, maps = dict.fromkeys(sides, 0.0), {}, {}
        for found in detections:
            masks = coco_mask.decode(found.masks).transpose(2, 0, 1).astype(bool) if "segm" in iou_types else None
            output = library.output(found.boxes, found.scores, found.labels, masks)
            for name, (add_output, _) in sides.items():
                started = time.perf_counter()
                add_output(output, found.image_id)
                adding[name] += time.perf_counter() - started
        for name, (_, compute) in sides.items():
            started = time.perf_counter()
            maps[name] = compute()
            computing[name] = time.perf_counter() - started
    total = {name: adding[name] + computing[name] for name in sides}
    return {
        name: {
            "encode_seconds": round(adding[name], 3),
            "compute_seconds": round(computing[name], 3),
            "times_ours": round(total[name] / total["ours"], 2),
            "mAP": round(maps[name], 4),
        }
        for name in sides
    }
