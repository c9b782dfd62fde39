"""`--tiles` beside SAHI (`sahi`): one detector, the same images, in turns. And the memory of a large TIFF (`memory`).

The run is that of `make demo`. It needs `pip install sahi rasterio`.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from command_line import main, scratch_folder
from memory import added_mib
from PIL import Image
from turns import in_turns, seconds_of

from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.data.open import SplitData
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import evaluate
from shared.predictor import Predictor

SIDE, LEAST_SCORE = synthetic.SIZE, 0.05
FIRST_SCENE = 1000  # the scenes 99 to 101 chose the constants of `shared/evaluation/merging.py`
# of a scene: pictures like those that the detector was trained on, some three times as large as a tile
PLACES = [(0, 0, 3), (3, 0, 3), *((x, y, 1) for y in range(8) for x in range(10) if x >= 6 or y >= 3)]


def scenes(folder: Path, count: int) -> CocoAnnotations:
    """Images of 1280 × 1024 pixels, and their objects."""
    images, annotations = [], []
    for number in range(count):
        scene = Image.new("RGB", (10 * SIDE, 8 * SIDE))
        for position, (x, y, scale) in enumerate(PLACES):
            picture, rows = synthetic.draw_sample(FIRST_SCENE + number, 16 * position, scale * SIDE)
            scene.paste(picture, (x * SIDE, y * SIDE))
            for row in rows:
                box = [row["bbox"][0] + x * SIDE, row["bbox"][1] + y * SIDE, *row["bbox"][2:]]
                moved = {"image_id": number, "bbox": box, "segmentation": []}
                annotations.append({**row, **moved, "id": len(annotations) + 1})
        scene.save(folder / f"{number}.png", compress_level=1)
        size = {"width": scene.width, "height": scene.height}
        images.append({"id": number, "file_name": f"{number}.png", **size})
    coco = {"images": images, "annotations": annotations, "categories": synthetic.CATEGORIES}
    return CocoAnnotations.from_dict(coco)


def with_sahi(predictor: Predictor, tile: int, postprocess: tuple[str, str]) -> Callable[[Path], Detections]:
    """Detects with SAHI. It hands pixels to the detector, without the way through a data set."""
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction
    from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list

    trial, names = predictor._trial, {str(i): row["name"] for i, row in enumerate(predictor.categories)}
    image = {"id": 0, "file_name": "0", "width": 1, "height": 1}
    one = CocoAnnotations.from_dict({"images": [image], "annotations": [], "categories": predictor.categories})
    transform = trial.evaluation_dataset(SplitData(one, None)).transform
    collate, record = trial.collate(training=False), one[0]

    class OurDetector(DetectionModel):
        def load_model(self) -> None:
            self.category_mapping = names

        def perform_inference(self, image: np.ndarray) -> None:
            record.height, record.width = image.shape[:2]
            batch = collate([transform(Image.fromarray(image), record)])
            (self._original_predictions,) = trial.detect_on_host_batch(batch)

        def _create_object_prediction_list_from_original_predictions(self, shift_amount_list, full_shape_list=None):
            found = self._original_predictions.only(self._original_predictions.scores >= LEAST_SCORE)
            rows = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
            shift, shape = fix_shift_amount_list(shift_amount_list)[0], fix_full_shape_list(full_shape_list)
            whole = {"shift_amount": shift, "full_shape": shape and shape[0]}
            found = [ObjectPrediction(box, i, names[str(i)], score=score, **whole) for box, i, score in rows]
            self._object_prediction_list_per_image = [found]

    model, (kind, metric) = OurDetector(confidence_threshold=LEAST_SCORE, device="cpu"), postprocess
    options = {"postprocess_type": kind, "postprocess_match_metric": metric, "force_postprocess_type": True}

    def detect(path: Path) -> Detections:
        found = get_sliced_prediction(str(path), model, tile, tile, verbose=0, **options).object_prediction_list
        boxes, scores = [each.bbox.to_xyxy() for each in found], [each.score.value for each in found]
        return Detections(int(path.stem), boxes, scores, [each.category.id for each in found])

    return detect


def sahi(run: Path, count: int = 6, tile: int = SIDE) -> dict[str, dict[str, float]]:
    """CPU seconds per image and AP: ours, SAHI's defaults, and SAHI with NMS.

    count: images
    """
    predictor = Predictor(run)
    ways = {kind: with_sahi(predictor, tile, (kind, by)) for kind, by in (("GREEDYNMM", "IOS"), ("NMS", "IOU"))}
    ways["ours"] = lambda path: predictor(path, LEAST_SCORE, tile)
    found = {name: [] for name in ways}

    def detect(image_id: int, name: str) -> None:
        each = ways[name](folder / f"{image_id}.png")
        found[name].append(Detections(image_id, each.boxes, each.scores, each.labels))

    with scratch_folder() as folder:
        truth = scenes(folder, count)
        sides = {name: lambda image_id, name=name: seconds_of(detect, image_id, name) for name in ways}
        seconds = in_turns(sides, count, warm_up=0)
    metrics = {name: evaluate(truth, each, "bbox") for name, each in found.items()}
    kept = ("bbox_mAP", "bbox_mAP_50", "bbox_mAP_s", "bbox_mAP_m", "bbox_mAP_l")
    return {name: {"s": float(np.median(seconds[name])), **{k: metrics[name][k] for k in kept}} for name in ways}


def memory(run: Path, side: int = 20000, tile: int = 640) -> dict[str, float]:
    """MiB that one tile adds at its peak, and a black TIFF of side × side pixels, with its seconds."""
    import rasterio

    predictor, one_tile = Predictor(run), np.zeros((tile, tile, 3), np.uint8)
    predictor(one_tile)  # warms up
    profile = {"width": side, "height": side, "count": 3, "dtype": "uint8", "compress": "deflate", "tiled": True}
    with scratch_folder() as folder:
        path = folder / "large.tif"
        rasterio.open(path, "w", driver="GTiff", **profile, blockxsize=512, blockysize=512).close()
        with added_mib() as by_tile:
            predictor(one_tile)
        with added_mib() as by_tiff:
            seconds = seconds_of(lambda: predictor(path, tiles=tile), clock=time.perf_counter)
    return {"tile_mib": by_tile[0], "tiff_mib": by_tiff[0], "tiff_s": seconds}


if __name__ == "__main__":
    main(__doc__, sahi, memory)
