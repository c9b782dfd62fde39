"""Detection from a Python program: `Predictor("runs/cells")("image.jpg").boxes`.

It detects by the code of `predict`, so its numbers are the same.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from determined.core import DistributedContext
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from shared.commands.detection import FileDetector, detect_all, detecting_trial, experiment_of_checkpoint, score_limits
from shared.commands.predict_inputs import GivenImages, UnreadableError, size_of
from shared.config.experiment import Experiment, Sections, experiment_of
from shared.config.schema import StoreOptions, is_url
from shared.data.annotations import CocoAnnotations
from shared.data.images import allow_pixels, read_image
from shared.data.open import SplitData
from shared.data.tiles import Tiling
from shared.errors import UserError
from shared.evaluation import drawing
from shared.evaluation.detections import Detections, to_coco_results
from shared.export.runtime import ENDINGS
from shared.training.checkpoints import Checkpoint, read_checkpoint
from shared.training.downloads import find_checkpoint
from shared.training.meeting import choose_device
from shared.training.trial import DetectionTrial

Given = str | Path | Image.Image | np.ndarray


@dataclass
class ImageDetections(Detections):
    """The detections of one image, with what they are drawn and named by.

    Attributes:
        image_id: the image's position in the list that was given.
        categories: COCO categories by label.
        image: what was given: a path, a URL, a Pillow image or an array.
    """

    categories: list[dict] = field(default_factory=list)
    image: Any = field(default=None, repr=False)
    options: StoreOptions = field(default_factory=StoreOptions, repr=False)

    @property
    def names(self) -> list[str]:
        """The category's name of each detection."""
        return [str(self.categories[label]["name"]) for label in self.labels.tolist()]

    def to_coco(self) -> list[dict]:
        """A dict per detection in COCO's result format, as `results.json` has them."""
        return to_coco_results(self, [category["id"] for category in self.categories])

    def to_supervision(self) -> Any:
        """As `supervision.Detections`, with the categories' names in `data["class_name"]`.

        Raises:
            UserError: the package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError("to_supervision: it needs the package supervision. Fix: pip install supervision") from error
        masks = None
        if self.masks is not None and len(self):
            masks = np.stack([coco_mask.decode(mask).astype(bool) for mask in self.masks])
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=masks,
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.names)},
        )

    def draw(self, min_score: float = 0.3) -> Image.Image:
        """A copy of the image with the detections that have at least this score."""
        with tempfile.TemporaryDirectory(prefix="predict-") as copies:
            images = _OpenedImages([self.image], self.options, copies)
            return drawing.picture_of(read_image(images, "0"), self, self.categories, min_score)


class Predictor:
    """Detects in images with a trained detector.

    Args:
        source: a run's folder (its best checkpoint), a checkpoint's folder or, with DET_MASTER set, its UUID; or a
            file of `export`, which needs no detector's folder.
        detector: the detector's folder, with its model_def.py. Default: found by the checkpoint's class in the working
            directory or the repository.
        hyperparameters: values that replace the checkpoint's, such as `{"max_detections": 300}`.

    Raises:
        UserError: the checkpoint or its detector is not found, or cannot be loaded.
    """

    def __init__(
        self, source: str | Path, detector: str | Path | None = None, hyperparameters: Mapping[str, Any] | None = None
    ):
        self._opened, self._checkpoint = contextlib.ExitStack(), None
        alone = DistributedContext(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
        processes, changes = (alone, choose_device(0, 1)), dict(hyperparameters or {})
        if Path(source).suffix in ENDINGS:
            if changes:
                raise UserError(f"{source}: an exported file has no hyperparameters. Fix: give the checkpoint")
            experiment = _in_this_process(experiment_of({}, {}, Sections(), with_hyperparameters=False))
            self._trial = FileDetector(DetectionTrial, experiment, Path(source).expanduser(), processes)
        else:
            checkpoint = read_checkpoint(find_checkpoint(_checkpoint_of(source)))
            trial_class = trial_class_of(checkpoint, detector)
            experiment = experiment_of(checkpoint.config, changes, trial_class.sections(), with_hyperparameters=False)
            experiment = experiment_of_checkpoint(trial_class, experiment, checkpoint, list(changes))
            experiment = _in_this_process(experiment)
            self._checkpoint = checkpoint.path
            self._trial = self._opened.enter_context(detecting_trial(trial_class, experiment, checkpoint, processes))
        self._options = experiment.data.store_options
        allow_pixels(experiment.data.max_image_pixels)

    @property
    def categories(self) -> list[dict]:
        """COCO categories; a category's position is its label."""
        return self._trial.categories

    def __call__(
        self,
        images: Given | Sequence[Given],
        min_score: float | str = 0.0,
        tiles: int | None = None,
        overlap: float = 0.2,
    ) -> ImageDetections | list[ImageDetections]:
        """The detections of one image, or a list with those of each image.

        Args:
            images: a path, a URL, a Pillow image, or a (height, width, 3) uint8 array in RGB; or a list of these.
            min_score: the lowest score that is returned; or "best" or "best-per-category", from the run's report.
            tiles: pixels of a tile's side, for large images; None detects in the whole image.
            overlap: the share of a tile that the next one shows too.

        Raises:
            UserError: an image cannot be read.
        """
        if not isinstance(images, (list, tuple)):
            return self([images], min_score, tiles, overlap)[0]
        if not images:
            return []
        min_scores, _ = score_limits(min_score, self.categories, self._checkpoint, self._trial)
        tiling = None if tiles is None else Tiling(tiles, overlap)
        with tempfile.TemporaryDirectory(prefix="predict-") as copies:
            opened = _OpenedImages(images, self._options, copies)
            sizes = [opened.size(i, in_tiles=tiles is not None) for i in range(len(images))]
            annotations = CocoAnnotations.of_sizes(sizes, self.categories)
            detected = detect_all(self._trial, SplitData(annotations, opened), all_images=True, tiling=tiling)
            by_id = {found.image_id: found for _, of_batch in detected for found in of_batch}
        kept = [by_id[i].only(by_id[i].reach(min_scores)) for i in range(len(images))]
        more = {"categories": self.categories, "options": self._options}
        return [ImageDetections(**vars(each), image=image, **more) for each, image in zip(kept, images, strict=True)]

    def close(self) -> None:
        """Frees what the detector holds. A `with` block does it too."""
        self._opened.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _in_this_process(experiment: Experiment) -> Experiment:
    """Without loader workers. An image that cannot be read is an error."""
    return replace(experiment, data=replace(experiment.data, on_bad_image="error", workers=0))


def _checkpoint_of(source: str | Path) -> str:
    """The checkpoint's folder of a run; anything else is a checkpoint's name."""
    checkpoints = Path(source).expanduser() / "checkpoints"
    found = [checkpoints / name for name in ("best", "last") if (checkpoints / name / "state_dict.pth").is_file()]
    if checkpoints.is_dir() and not found:
        raise UserError(f"{source}: the run has no checkpoint yet. Fix: wait for its first validation")
    return str(found[0] if found else source)


class _OpenedImages(GivenImages):
    """The bytes of given images by their position.

    Args:
        copies: the folder for copies of remote images.
    """

    def __init__(self, given: Sequence[Given], options: StoreOptions, copies: str):
        paths = {str(i): os.fspath(one) for i, one in enumerate(given) if isinstance(one, (str, os.PathLike))}
        locations = {name: path if is_url(path) else str(Path(path).expanduser()) for name, path in paths.items()}
        super().__init__(locations, options, Path(copies))
        self._given = given

    def size(self, position: int, in_tiles: bool) -> tuple[int, int]:
        """(width, height), rotated as EXIF says."""
        name = str(position)
        if name not in self.locations:
            return _upright(self._given[position], position).size
        try:
            size = size_of(name, self, in_tiles)
        except UnreadableError as error:
            reason = str(error) if "Fix: " in str(error) else f"{error}. Fix: give an image"
            raise UserError(f"{self.locations[name]}: {reason}") from error
        if size is None:
            raise UserError(
                f"{self.locations[name]}: it is a picture with drawn detections. Fix: give the image itself"
            )
        return size

    def read(self, file_name: str) -> bytes:
        if file_name in self.locations:
            return super().read(file_name)
        image, buffer = _upright(self._given[int(file_name)], int(file_name)), io.BytesIO()
        image.save(buffer, format="BMP" if image.mode in ("L", "RGB") else "PNG")
        return buffer.getvalue()


def _upright(given: Any, position: int) -> Image.Image:
    """A given Pillow image or array as a Pillow image, rotated as its EXIF says."""
    if isinstance(given, Image.Image):
        return ImageOps.exif_transpose(given)
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.shape[2:] in ((), (3,)):
        return Image.fromarray(np.ascontiguousarray(given))
    shape = f"an array {given.shape} of {given.dtype}" if isinstance(given, np.ndarray) else repr(type(given).__name__)
    raise UserError(
        f"image {position}: it is {shape}. Fix: give a path, a Pillow image or a (height, width, 3) uint8 array in RGB"
    )


# --- a checkpoint's detector: the class in a model_def.py here. The checkpoint's own code never runs.

_FILE = "model_def.py"


def trial_class_of(checkpoint: Checkpoint, folder: str | Path | None = None) -> type[DetectionTrial]:
    """The trial's class, from the detector's folder.

    Args:
        folder: the detector's folder. None looks in the working directory, in the repository of this file, and in the
            folders of both.

    Raises:
        UserError: no `model_def.py` there has the class, or a package of the detector is not installed.
    """
    name = checkpoint.trial_class
    if folder is not None:
        places = roots = [Path(folder).expanduser()]
    else:
        roots = [Path.cwd(), Path(__file__).resolve().parents[1]]
        places = [place for root in roots for place in (root, *sorted(path.parent for path in root.glob(f"*/{_FILE}")))]
        # not the `code` that a run and a checkpoint keep, which may come from strangers
        places = [place for place in places if place.name != "code"]
    file = next((place / _FILE for place in places if name in _classes_in(place / _FILE)), None)
    if file is None:
        where = " or ".join(dict.fromkeys(map(str, roots)))
        raise UserError(
            f"{checkpoint.path}: no {_FILE} in {where} has its detector, the class {name}. Fix: give the detector's "
            "folder, Predictor(…, detector=FOLDER)"
        )
    return getattr(_module(file.resolve()), name)


def _classes_in(file: Path) -> set[str]:
    """The classes that a file defines, without running it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):  # not the detector that is looked for
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _module(file: Path) -> ModuleType:
    """The module of a file, imported once."""
    for module in list(sys.modules.values()):
        if (known := getattr(module, "__file__", None)) and known.endswith(_FILE) and Path(known).resolve() == file:
            return module
    name = f"{file.parent.name}_model_def"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # loader workers pickle by it
    sys.path.insert(0, str(file.parent))  # what stands beside it
    excepthook = sys.excepthook
    try:
        spec.loader.exec_module(module)
    except (ImportError, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"{file}: the detector cannot be imported: {error}. Fix: pip install -r {file.parent / 'requirements.txt'}"
        ) from error
    finally:
        sys.excepthook = excepthook  # a detector replaces that of its program, and this program is the user's
    return module
