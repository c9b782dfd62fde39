"""From records to Detectron2's inputs."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import (
    DatasetMapper,
    load_proposals_into_dataset,
)
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, RotatedBoxes
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image
from torch.utils.data import Dataset

from detectron2_files.config_protocol import TrainingSet
from detectron2_files.plain_pickle import unpickle_arrays
from detectron2_files.rotated import RotatedMapper
from shared.data.annotations import CocoAnnotations, ImageRecord
from shared.data.dataset import BadImages, CocoDetection, SampleKey
from shared.data.images import BadImageError
from shared.data.loading import Batch, labels_of, map_tensors
from shared.data.open import SplitData, check_masks
from shared.data.storage import DiskImages
from shared.errors import UserError

_PREFIX = "image-bytes://"


# --- images -----------------------------------------------------------------------------------------


class _ImageBytes(PathHandler):
    """Hands the bytes that the shared storage has read to whatever mapper reads `image-bytes://…`."""

    data = b""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> io.BytesIO:
        return io.BytesIO(self.data)


_image_bytes = _ImageBytes()
PathManager.register_handler(_image_bytes, allow_override=True)


class MapperTransform:
    """A record and its encoded image through a Detectron2 mapper: the model's input, "file_name" as in the file.

    Args:
        proposals: what `read_proposals` gives.
        folder: the folder of the images if they are on disk: a user's own mapper may open them itself.
    """

    def __init__(
        self,
        mapper: Callable[[dict], dict | None],
        annotated: bool,
        proposals: Mapping[int, dict[str, Any]] | None = None,
        folder: Path | None = None,
    ):
        self.mapper = mapper
        self.folder = folder
        of_library = getattr(mapper, "__module__", "").startswith("detectron2.")
        self.opens_files = not of_library and not isinstance(mapper, RotatedMapper)
        self.annotated = annotated
        self.proposals = proposals or {}

    def __call__(self, image: bytes, record: ImageRecord) -> dict[str, Any]:
        dataset_dict = to_dataset_dict(record, self.annotated)
        if self.proposals:
            dataset_dict |= self.proposals.get(record.image_id, {})
        elif type(self.mapper) is DatasetMapper:
            dataset_dict = _OfOneUse(dataset_dict)
        with self._place_of(image, record.file_name) as dataset_dict["file_name"]:
            return {**mapped_by(self.mapper, dataset_dict, record.file_name), "file_name": record.file_name}

    @contextlib.contextmanager
    def _place_of(self, image: bytes, file_name: str) -> Iterator[str]:
        """Where the mapper finds the image: the library's read any path of its PathManager, one of the user's may
        know of files only."""
        if not self.opens_files:
            _image_bytes.data = image
            yield f"{_PREFIX}{file_name}"
        elif self.folder is not None:
            yield str(self.folder / file_name)
        else:
            with tempfile.NamedTemporaryFile(suffix=Path(file_name).suffix) as file:
                file.write(image)
                file.flush()
                yield file.name


class _OfOneUse(dict):
    """A dict that nobody else has: Detectron2's mapper, which copies all of what it is given, may keep it."""

    def __deepcopy__(self, memo: dict) -> dict:
        return dict(self)


def mapped_by(mapper: Callable[[dict], dict | None], dataset_dict: dict[str, Any], file_name: str) -> dict[str, Any]:
    where = f"{file_name} (image id {dataset_dict.get('image_id')})"
    try:
        mapped = mapper(dataset_dict)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(
            f"{where} cannot be read as an image: {error}. Fix: replace the file, or set data.on_bad_image: skip"
        ) from error
    except ImportError as error:  # crops of polygons take shapely, which Detectron2 itself does without
        raise UserError(
            f"the config's mapper needs a package that is not installed: {error}. Fix: python3 -m pip install "
            f"{error.name}"
        ) from error
    except SizeMismatchError as error:
        raise BadImageError(f"{where}: {error}. Fix: correct the image or its annotation") from error
    if mapped is None:
        raise UserError(f"{where}: the mapper gives None for it. Fix: remove such images from the data set")
    return mapped


def to_dataset_dict(record: ImageRecord, annotated: bool = True) -> dict[str, Any]:
    """A record in Detectron2's data set format, as `load_coco_json` makes it: keypoints on the pixels' centers, masks
    without polygons that have no area, and no annotation that has no other."""
    dataset_dict: dict[str, Any] = {
        "file_name": record.file_name,
        "image_id": record.image_id,
        "height": record.height,
        "width": record.width,
    }
    if not annotated:
        return dataset_dict
    annotations = []
    for i, segmentation in enumerate(record.segmentations):
        annotation: dict[str, Any] = {
            "bbox": record.file_boxes[i].tolist(),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": int(record.labels[i]),
            "iscrowd": int(record.iscrowd[i]),
        }
        if isinstance(segmentation, list) and segmentation:
            polygons = [polygon for polygon in segmentation if isinstance(polygon, list)]
            segmentation = [polygon for polygon in polygons if len(polygon) % 2 == 0 and len(polygon) >= 6]
            if not segmentation:
                continue
        if segmentation:
            annotation["segmentation"] = _compressed(segmentation, record)
        if record.keypoints is not None:
            points = record.keypoints[i].copy()
            points[:, :2] += 0.5
            annotation["keypoints"] = points.ravel().tolist()
        annotations.append(annotation)
    return {**dataset_dict, "annotations": annotations}


def _compressed(segmentation: list | dict, record: ImageRecord) -> list | dict:
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        from pycocotools import mask as coco_mask

        return coco_mask.frPyObjects(segmentation, record.height, record.width)
    return segmentation


# --- samples ----------------------------------------------------------------------------------------


class CocoSamples(Dataset):
    """The training samples of COCO data, by `SampleKey`: those of the images that the config trains on.

    Attributes:
        indices: (samples,) the image of each.
    """

    def __init__(
        self, data: SplitData, mapper: Any, train_set: TrainingSet, seed: int, bad_images: BadImages | None = None
    ):
        self.indices = training_images(data.annotations, train_set, seed)
        image_ids = data.annotations.image_ids[np.unique(self.indices)]
        proposals = read_proposals(train_set.proposal_files, image_ids)
        transform = MapperTransform(mapper, True, proposals, folder_of(data))
        self.images = CocoDetection(
            data.annotations, data.images, transform, seed, False, bad_images, decode=bytes, in_use=self.indices
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.images[key._replace(index=int(self.indices[key.index]))]

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """As `labels_of` gives them."""
        return labels_of(self.images.annotations, self.indices)

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples,) widths, (samples,) heights."""
        columns = self.images.annotations.columns
        return columns["widths"][self.indices], columns["heights"][self.indices]


def unaugmented(training: Any, test: Any) -> Any:
    """The training's mapper, which gives targets, with the images of the test's.

    Raises:
        UserError: one of them is not a DatasetMapper, and does not say which of what it does is augmentation.
    """
    for mapper in (training, test):
        if not isinstance(mapper, DatasetMapper):
            raise UserError(
                f"hyperparameters.validation_loss: the config's mapper, {type(mapper).__name__}, is not a "
                "DatasetMapper, so its augmentation cannot be switched off. Fix: remove validation_loss"
            )
    mapper = copy.copy(training)
    mapper.augmentations = test.augmentations
    return mapper


def folder_of(data: SplitData) -> Path | None:
    """The folder of images that are on disk."""
    return data.images.folder if isinstance(data.images, DiskImages) else None


def read_proposals(files: Sequence[str], image_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """By image id, what a config that detects in proposals made before adds to a dataset dict; {} without files.

    Raises:
        UserError: there are several files, one cannot be read, or has nothing for an image.
    """
    if not files:
        return {}
    where = f"the config's proposals, {', '.join(files)}"
    if len(files) > 1:
        raise UserError(
            f"{where}: data.train and data.val are one data set each, and need one file. Fix: give one file, not a list"
        )
    dicts = [{"image_id": int(image_id)} for image_id in image_ids]
    try:
        refuse_code(files)
        load_proposals_into_dataset(dicts, files[0])
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{where}: there are none for image id {error}. Fix: compute them on the same data") from error
    except Exception as error:  # a pickle, which may be of anything, from a disk or a server
        raise UserError(
            f"{where}: they cannot be loaded: {type(error).__name__}: {error}. Fix: correct the path or the file"
        ) from error
    return {proposals.pop("image_id"): proposals for proposals in dicts}


def refuse_code(proposal_files: Sequence[str]) -> None:
    """The library unpickles proposals; a checkpoint's config may name the file."""
    for file in proposal_files:
        unpickle_arrays(Path(PathManager.get_local_path(file)))


def trained_images(annotations: CocoAnnotations, train_set: TrainingSet) -> np.ndarray:
    """(images,) whether the config trains on the image: by default not where every annotation is a crowd."""
    columns = annotations.columns
    image_of = np.repeat(np.arange(len(annotations)), np.diff(columns["offsets"]))
    kept = np.ones(len(annotations), dtype=bool)
    if train_set.filter_empty:
        kept &= np.bincount(image_of[~columns["iscrowd"]], minlength=len(annotations)) > 0
    if train_set.min_keypoints:
        visible = (columns["keypoints"][..., 2] > 0).sum(axis=1)
        kept &= np.bincount(image_of, weights=visible, minlength=len(annotations)) >= train_set.min_keypoints
    return kept


def training_images(annotations: CocoAnnotations, train_set: TrainingSet, seed: int) -> np.ndarray:
    """(samples,) the indices of the images to train on, as the config filters and repeats them.

    Raises:
        UserError: none is left.
    """
    columns = annotations.columns
    indices = np.flatnonzero(trained_images(annotations, train_set))
    if not len(indices):
        raise UserError(
            f"data.train.annotations: no image of {annotations.path} has what the config trains on (an annotation that "
            "is not a crowd, and visible keypoints for a model of keypoints). Fix: correct the file, or choose a "
            "config for its annotations"
        )

    def dicts() -> list[dict]:
        labels, offsets = columns["labels"], columns["offsets"]
        return [
            {"annotations": [{"category_id": int(label)} for label in labels[offsets[i] : offsets[i + 1]]]}
            for i in indices
        ]

    return indices[sampled_positions(len(indices), dicts, train_set, seed)]


def sampled_positions(count: int, dicts: Callable[[], list[dict]], train_set: TrainingSet, seed: int) -> np.ndarray:
    """The positions to train on, by the config's sampler. A RepeatFactorTrainingSampler draws in each epoch whether a
    factor's fraction counts; here it is drawn once."""
    generator = np.random.default_rng([seed, 0])
    if train_set.repeat_threshold is not None:
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts(), train_set.repeat_threshold, sqrt=train_set.repeat_sqrt
        ).numpy()
        whole = factors.astype(int)
        return np.repeat(np.arange(count), whole + (generator.random(count) < factors - whole))
    if train_set.subset_ratio is not None:
        return np.sort(generator.choice(count, max(int(count * train_set.subset_ratio), 1), replace=False))
    return np.arange(count)


def check_for_training(
    annotations: CocoAnnotations, iou_types: Sequence[str], polygon_masks: bool, split: str = "train"
) -> None:
    """Raises UserError where the annotations lack what the config trains on."""
    if "segm" in iou_types:
        check_masks(annotations, split)
    if "keypoints" in iou_types and "keypoints" not in annotations.columns:
        raise UserError(
            f"data.{split}.annotations: {annotations.path} has no keypoints, which the config trains. Fix: give "
            "annotations with keypoints, or a config without"
        )
    if polygon_masks:
        columns = annotations.columns
        starts = columns["segmentation_offsets"][:-1]
        masks = (np.diff(columns["segmentation_offsets"]) > 0) & ~columns["iscrowd"]
        is_rle = np.zeros(len(starts), dtype=bool)
        is_rle[masks] = columns["segmentations"][starts[masks]] == ord("{")
        if is_rle.any():
            raise UserError(
                f"data.{split}.annotations: {int(is_rle.sum())} masks of {annotations.path} are RLE, the first of "
                f"annotation {columns['annotation_ids'][is_rle.argmax()]}. Fix: set config_overrides: "
                "{INPUT.MASK_FORMAT: bitmask}"
            )


# --- batches ----------------------------------------------------------------------------------------


def collate(samples: list[dict[str, Any]]) -> Batch:
    """`images` are B of (3, h, w), `targets` the rest of each input; semantic data has file names for ids."""
    images = [sample.pop("image") for sample in samples]
    return Batch(images, samples, [sample.get("image_id", sample["file_name"]) for sample in samples])


def inputs_of(batch: Batch) -> list[dict[str, Any]]:
    """What Detectron2's models take."""
    return [{**target, "image": image} for image, target in zip(batch.images, batch.targets, strict=True)]


@map_tensors.register
def _(value: Instances, function: Callable) -> Instances:
    return Instances(
        value.image_size, **{name: map_tensors(field, function) for name, field in value.get_fields().items()}
    )


@map_tensors.register(Boxes)
@map_tensors.register(RotatedBoxes)
@map_tensors.register(BitMasks)
@map_tensors.register(Keypoints)
def _(value: Any, function: Callable) -> Any:
    return type(value)(function(value.tensor))
