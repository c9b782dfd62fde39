"""From records to Detectron2's inputs, and data sets that are registered by name."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
    load_proposals_into_dataset,
)
from detectron2.data.common import DatasetFromList
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.data.transforms import RandomFlip
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, RotatedBoxes
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image
from torch.utils.data import Dataset

from detectron2_files.config_protocol import TrainingSet
from detectron2_files.plain_pickle import unpickle_arrays
from detectron2_files.rotated import RotatedMapper
from shared.config.schema import is_url
from shared.data.annotations import CocoAnnotations, ImageRecord
from shared.data.dataset import BadImages, CocoDetection, SampleKey, seed_all
from shared.data.images import BadImageError
from shared.data.loading import Batch, labels_of, map_tensors
from shared.data.open import SplitData, check_masks
from shared.data.storage import DiskImages
from shared.errors import UserError, nearest

TRAIN_NAME, VAL_NAME, COCO_NAME = "data.train", "data.val", "data"
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
            return {**_mapped(self.mapper, dataset_dict, record.file_name), "file_name": record.file_name}

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


def _mapped(mapper: Callable[[dict], dict | None], dataset_dict: dict[str, Any], file_name: str) -> dict[str, Any]:
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
        _refuse_code(files)
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


def _refuse_code(proposal_files: Sequence[str]) -> None:
    """The library unpickles proposals; a checkpoint's config may name the file."""
    for file in proposal_files:
        unpickle_arrays(Path(PathManager.get_local_path(file)))


class RegisteredSamples(Dataset):
    """Samples of a data set's dicts: by `SampleKey` to train on, by index to evaluate on."""

    def __init__(self, dicts: Sequence[dict], mapper: Any, seed: int, indices: np.ndarray | None = None):
        self.dicts = DatasetFromList(list(dicts), copy=False)
        self.mapper = mapper
        self.seed = seed
        self.indices = np.arange(len(dicts)) if indices is None else indices
        self._sizes = np.array([(d.get("width", 1), d.get("height", 1)) for d in dicts]).reshape(-1, 2)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        dataset_dict = self.dicts[int(self.indices[key.index])]
        seed_all(self.seed, *key.seeds)
        return _mapped(self.mapper, dataset_dict, dataset_dict["file_name"])

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """As `labels_of` gives them.

        Raises:
            UserError: the dicts have no objects.
        """
        of_samples = [self.dicts[int(index)].get("annotations") for index in self.indices]
        if None in of_samples:
            raise UserError(
                "data.repeat_threshold: the data set to train on has images without objects' categories. Fix: remove "
                "the key"
            )
        labels = [annotation["category_id"] for annotations in of_samples for annotation in annotations]
        return np.repeat(np.arange(len(self)), list(map(len, of_samples))), np.asarray(labels, dtype=np.int64)

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples,) widths, (samples,) heights."""
        return self._sizes[:, 0], self._sizes[:, 1]


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

    return indices[_repeats(len(indices), dicts, train_set, seed)]


def _repeats(count: int, dicts: Callable[[], list[dict]], train_set: TrainingSet, seed: int) -> np.ndarray:
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


# --- data sets by name ------------------------------------------------------------------------------


@dataclass
class RegisteredData:
    """Data sets of Detectron2's catalog, with their dicts; evaluated by Detectron2's own evaluators."""

    names: tuple[str, ...]
    dicts: list[dict]
    semantic: bool

    @property
    def categories(self) -> list[dict]:
        return categories_of(self.names[0], self.semantic)

    @property
    def class_counts(self) -> dict[str, int]:
        """How many "things" and "stuff" there are."""
        metadata = MetadataCatalog.get(self.names[0])
        return {kind: len(metadata.get(f"{kind.removesuffix('s')}_classes") or ()) for kind in ("things", "stuff")}


def categories_of(name: str, semantic: bool) -> list[dict]:
    """The things of a registered data set, or its stuff, as COCO categories: the position is the label. None where
    its metadata names none."""
    if name not in MetadataCatalog.list():
        return []
    metadata = MetadataCatalog.get(name)
    kind = "stuff" if semantic else "thing"
    ids = {label: i for i, label in (metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {}).items()}
    names = metadata.get(f"{kind}_classes") or ()
    points = list(metadata.get("keypoint_names") or ())
    rules = [(a, b) for a, b, *_ in metadata.get("keypoint_connection_rules") or ()]
    skeleton = [[points.index(a) + 1, points.index(b) + 1] for a, b in rules if a in points and b in points]
    keypoints = {"keypoints": points, "skeleton": skeleton} if points else {}
    return [{"id": ids.get(label, label + 1), "name": name, **keypoints} for label, name in enumerate(names)]


def open_registered(
    names: tuple[str, ...],
    semantic: bool,
    train_set: TrainingSet | None = None,
    proposal_files: Sequence[str] = (),
) -> RegisteredData:
    """Data sets by name; `train_set` for training, which leaves images out and has proposals of its own.

    Raises:
        UserError: a name is not registered, or the data is not where it is registered.
    """
    for name in names:
        if name not in DatasetCatalog:
            known = DatasetCatalog.list()
            raise UserError(
                f"the data set {name!r} is not registered{nearest(name, known)} Or register it in a Python file, named "
                "in hyperparameters.custom_imports, or give data.train and data.val"
            )
    files = list(train_set.proposal_files if train_set else proposal_files)
    try:
        _refuse_code(files)
        dicts = get_detection_dataset_dicts(
            list(names),
            filter_empty=train_set is not None and train_set.filter_empty,
            min_keypoints=train_set.min_keypoints if train_set else 0,
            proposal_files=files or None,
            check_consistency=True,
        )
    except UserError:
        raise
    except Exception as error:  # each data set's loader reads files of its own format
        raise UserError(
            f"the data set {', '.join(names)} cannot be read: {type(error).__name__}: {error}. Fix: set "
            "DETECTRON2_DATASETS to the folder of Detectron2's data sets, or give data.train and data.val"
        ) from error
    return RegisteredData(names, dicts, semantic)


def check_for_rotated_evaluation(data: RegisteredData) -> None:
    """Raises UserError for crowds, which Detectron2's evaluator of rotated boxes cannot match."""
    for dataset_dict in data.dicts:
        if any(annotation.get("iscrowd") for annotation in dataset_dict["annotations"]):
            raise UserError(
                f"{', '.join(data.names)}: image id {dataset_dict['image_id']} has a crowd (iscrowd: 1), with which "
                "Detectron2 cannot evaluate rotated boxes. Fix: remove such annotations"
            )


def registered_samples(data: RegisteredData, mapper: Any, train_set: TrainingSet, seed: int) -> RegisteredSamples:
    """The training samples of registered data, as the config's sampler repeats them."""
    indices = _repeats(len(data.dicts), lambda: data.dicts, train_set, seed)
    return RegisteredSamples(data.dicts, mapper, seed, indices)


def as_coco_paths(name: str) -> tuple[str, str] | None:
    """The annotation file and the images' folder of a registered data set that is plain COCO; else None."""
    if name not in DatasetCatalog or MetadataCatalog.get(name).get("evaluator_type") != "coco":
        return None
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    return (json_file, image_root) if json_file and image_root else None


def describe(categories: Sequence[dict]) -> tuple[str, ...]:
    """The name of metadata that says of COCO categories what mappers ask for: their keypoints."""
    if COCO_NAME in MetadataCatalog.list():
        MetadataCatalog.remove(COCO_NAME)
    metadata = MetadataCatalog.get(COCO_NAME)
    metadata.thing_classes = [category["name"] for category in categories]
    metadata.keypoint_names = next((c["keypoints"] for c in categories if c.get("keypoints")), [])
    metadata.keypoint_flip_map = _flipped(metadata.keypoint_names)
    return (COCO_NAME,)


def register_json(name: str, annotations: str, images: str) -> None:
    """Registers COCO files for Detectron2's own loader and evaluators."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)
    if not Path(annotations).is_file():
        on_disk = (
            "is not on disk, where Detectron2's own loader of this kind of data reads" if is_url(annotations) else ""
        )
        raise UserError(f"{name}.annotations: {annotations} {on_disk or 'does not exist'}. Fix: correct the path")
    register_coco_instances(name, {}, annotations, images)


def _flipped(names: Sequence[str]) -> list[tuple[str, str]]:
    """Left and right of the same point, by their names: `left_eye`, `LEFT_EYE`, `L_eye`, `eye_l`, `lefteye`."""
    rights = {rest: name for name in names for side, rest in _sides(name, "startswith", "endswith") if side == "right"}
    pairs: dict[str, str] = {}
    for name in names:
        for side, rest in _sides(name, "startswith", "endswith"):
            if side == "left" and rest in rights:
                pairs.setdefault(name, rights[rest])
    return list(pairs.items())


def _sides(name: str, *tests: str) -> list[tuple[str, tuple[str, ...]]]:
    """The sides that a name may say, and the rest of it: its words say one, or how it begins or ends.

    Args:
        tests: "startswith" and "endswith", if they count: `bright` ends with a side, and has none.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|\d+", name)]
    sides = {"left": "left", "l": "left", "right": "right", "r": "right"}
    found = [(sides[w], (*words[:i], "", *words[i + 1 :])) for i, w in enumerate(words) if w in sides]
    whole = name.lower()
    for side in ("left", "right"):
        found += [(side, (test, whole.replace(side, "", 1))) for test in tests if getattr(whole, test)(side)]
    return found


def check_keypoint_flips(mapper: Any, categories: Sequence[dict]) -> str:
    """The keypoints that a horizontal flip of the mapper swaps, in words; "" if it does not flip keypoints.

    Raises:
        UserError: a name looks like a side, and the other side is missing.
    """
    names = next((category["keypoints"] for category in categories if category.get("keypoints")), [])
    augmentations = getattr(getattr(mapper, "augmentations", None), "augs", ())
    if not names or not any(isinstance(each, RandomFlip) and each.horizontal for each in augmentations):
        return ""
    pairs = _flipped(names)
    swapped = {name for pair in pairs for name in pair}
    for name in names:
        if name not in swapped and _sides(name, "startswith"):
            raise UserError(
                f"data.train.annotations: the keypoint {name!r} looks like a side, and no keypoint is its other side. "
                "A horizontal flip would train a wrong point. Fix: name both sides alike, such as left_eye and "
                "right_eye, or remove the flip from the config"
            )
    others = ", ".join(name for name in names if name not in swapped)
    return f"{', '.join(' ↔ '.join(pair) for pair in pairs) or 'none'}; unchanged: {others or 'none'}"


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
