"""train · evaluate · predict: on a cluster, under torchrun or alone, from the same `model_def.py`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import determined as det
import torch
import yaml
from determined import pytorch
from determined.core import DistributedContext
from PIL import Image, ImageOps
from tabulate import tabulate

from shared.data.annotations import CocoAnnotations
from shared.data.images import read_image
from shared.data.loading import Batch
from shared.data.storage import DiskImages
from shared.errors import UserError
from shared.evaluation import visualization
from shared.evaluation.detections import Detections, to_coco_results
from shared.evaluation.evaluator import summary_metrics
from shared.experiment import DataConfig, Length, SplitData, fixed_hyperparameters, load_config, per_slot_batch_size
from shared.training.checkpoints import Checkpoint, find_checkpoint, load_weights, read_checkpoint
from shared.training.determined_fixes import on_cluster
from shared.training.local_run import LocalRun, RunFolder, full_disk_as_error
from shared.training.progress import Progress, log_above_the_bar, summary_of
from shared.training.stopping import StopRequest
from shared.training.training_metrics import DivergedError
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)

_PICTURES = 4  # samples in predictions.png
_SECONDS_FOR_CHIEF = 3


def main(trial_class: type[DetectionTrial]) -> None:
    """The entrypoint of every `model_def.py`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    if on_cluster():
        train_on_cluster(trial_class)
        return
    logging.getLogger("determined").setLevel(logging.ERROR)
    arguments = _parser().parse_args()
    try:
        arguments.run(trial_class, arguments)
    except (UserError, DivergedError) as error:
        rank = int(os.environ.get("RANK", 0))
        sys.exit(f"error: {_message(error)}" if rank == 0 else f"error on rank {rank}: {_message(error)}")
    except KeyboardInterrupt:
        print("stopped; a run goes on from its last checkpoint with --output-dir DIR --resume last", file=sys.stderr)
        sys.exit(130)


def _message(error: Exception) -> str:
    """The error's own words, also where it comes from a loader worker with that one's traceback."""
    return re.split(r"\n[\w.]+Error: ", str(error))[-1].strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train, evaluate or predict without a cluster.")
    commands = parser.add_subparsers(required=True, metavar="train | evaluate | predict")

    def add(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("config", help="the experiment config, const.yaml for example")
        command.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="any key of the config, hyperparameters.lr=0.01 for example; may be repeated",
        )
        command.set_defaults(run=run)
        return command

    train = add("train", train_here, "Train, as a cluster would.")
    train.add_argument("--output-dir", type=Path, help="where everything of the run goes; default runs/<time>")
    train.add_argument("--resume", metavar="CHECKPOINT", help="`last` of --output-dir, or the path of a checkpoint")

    evaluate = add("evaluate", evaluate_here, "COCO metrics on data.val.")
    evaluate.add_argument("--output", type=Path, metavar="DIR", help="write metrics.json and results.json there")

    predict = add("predict", predict_here, "Detect on a folder of images, and draw.")
    predict.add_argument("--images", type=Path, required=True, metavar="DIR", help="the images")
    predict.add_argument("--output", type=Path, required=True, metavar="DIR", help="pictures and results.json go here")
    predict.add_argument(
        "--format", choices=("png", "pdf"), help="of the pictures; the detector's own where it is not given"
    )
    predict.add_argument("--min-score", type=float, default=0.3, help="the lowest score that is drawn; default 0.3")
    for command in (evaluate, predict):
        command.add_argument(
            "--checkpoint",
            help="a checkpoint's path or, with DET_MASTER set, its UUID; default: the config's pretrained weights",
        )
    return parser


# --- train ------------------------------------------------------------------------------------------


def train_on_cluster(trial_class: type[DetectionTrial]) -> None:
    """Train as the trial that this task is; the config comes from the master."""
    info = det.get_cluster_info()
    config = info.trial._config  # the only way to optimizations.aggregation_frequency before `init`
    with pytorch.init(hparams=info.trial.hparams, aggregation_frequency=_aggregation_frequency(config)) as context:
        try:
            trial = trial_class(context)
            schedule, batch_size = trial.schedule, trial.global_batch_size
            if trial.rank == 0:
                trial.local_callbacks["progress"] = _ProgressOfTask(trial)

            def unit(length: Length | None) -> pytorch.TrainUnit | None:
                if length is None:
                    return None
                if length.unit == "epochs":
                    return pytorch.Epoch(length.count)
                return pytorch.Batch(length.batches(trial.batches_per_epoch, batch_size))

            pytorch.Trainer(trial, context).fit(
                max_length=unit(schedule.max_length),
                validation_period=unit(schedule.validation_period),
                checkpoint_period=unit(schedule.checkpoint_period),
                reporting_period=pytorch.Batch(schedule.reporting_batches),
                checkpoint_policy=schedule.checkpoint_policy,
                step_zero_validation=schedule.initial_validation,
                latest_checkpoint=info.latest_checkpoint,
                profiling_enabled=schedule.profiling,
            )
        except (UserError, DivergedError) as error:
            if config["searcher"]["name"] != "single":
                # ends this trial alone, and the search goes on; Determined does not log why
                logger.error("%s", _message(error))
                raise det.InvalidHP(_message(error)) from error
            # Determined would call an experiment of one invalid trial completed
            sys.exit(f"error: {_message(error)}")


class _ProgressOfTask(pytorch.PyTorchCallback):
    """Lines in the task's log."""

    def __init__(self, trial: DetectionTrial):
        self.progress = Progress(trial.first_batch, trial.total_batches)
        trial.on_batch_end = self.progress.update

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list) -> None:
        self.progress.describe(summary_of(avg_metrics))


def train_here(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """Train off the cluster, under torchrun or alone."""
    if arguments.resume == "last" and arguments.output_dir is None:
        raise UserError("--resume last: say of which run, by --output-dir")
    config = load_config(arguments.config, arguments.overrides)
    config["hyperparameters"] = fixed_hyperparameters(config)
    _make_paths_absolute(config, trial_class)
    with _local_distributed() as distributed:
        folder = RunFolder(_output_dir(arguments.output_dir, distributed))
        path = _on_chief(distributed, lambda: _checkpoint_to_resume(arguments.resume, folder))
        checkpoint = read_checkpoint(path) if path else None
        source = Path(sys.modules[trial_class.__module__].__file__).parent
        _on_chief(distributed, lambda: folder.prepare(source))
        os.chdir(folder.code)  # what Determined copies into each checkpoint
        os.environ["XDG_DATA_HOME"] = str(folder.saving)  # where it stores them
        with _local_context(config, distributed) as context:
            trial = trial_class(context, first_batch=checkpoint.batches if checkpoint else 0)
            if checkpoint:
                load_weights(trial.plain_model, checkpoint.training_weights, checkpoint.path)
            if distributed.rank == 0:
                if checkpoint:
                    logger.info("going on after batch %d, from %s", checkpoint.batches, checkpoint.path)
                folder.config.write_text(yaml.safe_dump(config, sort_keys=False))
                trial.save_own_config(folder.path)
            trial.local_callbacks["local_run"] = LocalRun(trial, folder)
            with (
                log_above_the_bar(),
                full_disk_as_error(folder),
                StopRequest(trial.aggregation_frequency) as stop_request,
            ):
                trial.stop_request = stop_request
                _fit_here(trial, context, checkpoint)
            if stop_request.after is not None and trial.batches_trained < trial.total_batches:
                _end_by_signal(stop_request, trial, folder)
            if distributed.rank == 0:
                print(metrics_table({**trial.last_validation, **trial.category_ap}, trial.iou_types))
                print("checkpoints:", " and ".join(str(path) for path in sorted(folder.checkpoints.glob("[bl]*st"))))
                if isinstance(trial.val_data, SplitData):
                    picture = folder.path / "predictions.png"
                    draw_samples(trial, picture)
                    print(f"predictions beside the ground truth: {picture}")


def _end_by_signal(stop_request: StopRequest, trial: DetectionTrial, folder: RunFolder) -> None:
    number = stop_request.signal or signal.SIGTERM  # another process was sent it
    if trial.rank == 0:
        print(
            f"stopped by {number.name} after batch {trial.batches_trained}, which is saved; go on with --output-dir "
            f"{folder.path} --resume last",
            file=sys.stderr,
        )
    sys.exit(128 + number)


@dataclass
class _Steps(Container):
    """The multiples of `period`, and the end, in Determined's count: off the cluster it starts from 0 after a
    resume too, `first_batch` behind ours.

    Args:
        when_stopped: whether the batch after which a signal stops the run is one.
    """

    period: int
    trial: DetectionTrial
    when_stopped: bool

    def __contains__(self, step: object) -> bool:
        batches = step + self.trial.first_batch
        if batches == self.trial.total_batches:
            return True
        if batches == self.trial.stop_request.after:
            return self.when_stopped
        return batches % self.period == 0


def _fit_here(trial: DetectionTrial, context: pytorch.PyTorchTrialContext, checkpoint: Checkpoint | None) -> None:
    schedule, end = trial.schedule, trial.total_batches
    if trial.first_batch >= end:
        raise UserError(
            f"--resume: {checkpoint.path} has been trained for {trial.first_batch} batches, and searcher.max_length is "
            f"{end}; give a greater one to go on"
        )

    def steps(length: Length | None, when_stopped: bool) -> pytorch.Batch:
        period = end if length is None else length.batches(trial.batches_per_epoch, trial.global_batch_size)
        return pytorch.Batch(_Steps(period, trial, when_stopped))

    pytorch.Trainer(trial, context).fit(
        max_length=pytorch.Batch(end),
        validation_period=steps(schedule.validation_period, when_stopped=False),
        checkpoint_period=steps(schedule.checkpoint_period, when_stopped=True),
        reporting_period=steps(Length("batches", schedule.reporting_batches), when_stopped=True),
        # `best` needs a master; here every validated state is saved, and the best and the last are kept
        checkpoint_policy="none" if schedule.checkpoint_policy == "none" else "all",
        step_zero_validation=schedule.initial_validation,
        latest_checkpoint=str(checkpoint.path) if checkpoint else None,
    )


def _checkpoint_to_resume(resume: str | None, folder: RunFolder) -> Path | None:
    if resume is None:
        folder.refuse_other_run()
        return None
    if resume != "last":
        return find_checkpoint(resume)
    folder.restore_interrupted_rename()
    last = folder.checkpoints / "last"
    if not last.exists():
        raise UserError(f"--resume last: {folder.path} has no checkpoint yet; leave --resume out and start anew")
    return last


def _output_dir(given: Path | None, distributed: DistributedContext) -> Path:
    return distributed.broadcast(given or Path("runs") / time.strftime("%Y%m%d-%H%M%S")).absolute()


def _make_paths_absolute(config: dict[str, Any], trial_class: type[DetectionTrial]) -> None:
    def absolute(section: Any, key: str) -> None:
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(value, str) and value and "://" not in value and Path(value).exists():
            section[key] = str(Path(value).absolute())

    data = config.get("data") or {}
    for split in ("train", "val") if data.get("backend", "disk") == "disk" else ():  # in a bucket, relative is to it
        absolute(data.get(split), "annotations")
        absolute(data.get(split), "images")
    if isinstance(data.get("cache_dir"), str):
        data["cache_dir"] = str(Path(data["cache_dir"]).absolute())
    for name in trial_class.path_hyperparameters:
        absolute(config["hyperparameters"], name)


# --- evaluate, predict ------------------------------------------------------------------------------


def evaluate_here(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """The metrics of a checkpoint, or of the pretrained weights, on data.val."""
    config, checkpoint = _config_to_detect_with(trial_class, arguments)
    with _detecting_trial(trial_class, config, checkpoint) as trial:
        data = trial.open_val()
        _make_folder(arguments.output, "--output")
        names, in_data = ([category["name"] for category in of.categories] for of in (trial, data))
        if names != in_data:
            raise UserError(
                f"data.val.annotations: its categories {in_data} are not those that the checkpoint was trained on, "
                f"{names}"
            )
        evaluator = trial.build_evaluator(data)
        category_ids = [category["id"] for category in data.categories]
        results = {}
        for batch, detected in _detect_all(trial, data):
            evaluator.update(detected)
            if batch.skipped:
                evaluator.skip(batch.skipped)
            for found in detected:
                if isinstance(found, Detections):
                    results[found.image_id] = to_coco_results(found, category_ids)
        gathered = trial.context.distributed.gather((evaluator.per_slot_reduce(), results))
        if trial.rank == 0:
            metrics = evaluator.cross_slot_reduce([slot for slot, _ in gathered])
            print(metrics_table(metrics, trial.iou_types))
            if arguments.output:
                plain = {name: None if value != value else value for name, value in metrics.items()}
                (arguments.output / "metrics.json").write_text(json.dumps(plain, indent=1))
                _write_results(arguments.output, gathered)


def predict_here(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """Detections on a folder of images: a picture for each and one results.json."""
    config, checkpoint = _config_to_detect_with(trial_class, arguments)
    files = _image_files(arguments.images)
    _make_folder(arguments.output, "--output")
    with _detecting_trial(trial_class, config, checkpoint) as trial:
        data = _folder_as_data(arguments.images, files, trial)
        annotations, suffix = data.annotations, arguments.format or trial.picture_format
        index_of = {int(image_id): i for i, image_id in enumerate(annotations.image_ids)}
        trial.bad_images.skip = True  # as those of which not even the header can be read
        results, seconds = {}, dict.fromkeys(("loading", "detecting", "drawing"), 0.0)
        for detections in (one for _, detected in _detect_all(trial, data, seconds) for one in detected):
            started = time.perf_counter()
            file_name = annotations.file_name(index_of[detections.image_id])
            image = read_image(data.images, file_name)
            figure = visualization.figure_of(image, detections, annotations.categories, arguments.min_score)
            picture = arguments.output / f"{file_name}.{suffix}"
            picture.parent.mkdir(parents=True, exist_ok=True)
            visualization.save(figure, picture)
            results[detections.image_id] = [
                {**result, "file_name": file_name} for result in to_coco_results(detections, annotations.category_ids)
            ]
            seconds["drawing"] += time.perf_counter() - started
        gathered = trial.context.distributed.gather((None, results))
        if trial.rank == 0:
            images, count, drawn = _write_results(arguments.output, gathered, arguments.min_score)
            print(
                f"{count} detections on {images} images in {arguments.output / 'results.json'}; the {drawn} of "
                f"at least {arguments.min_score:g} are drawn in the pictures beside it"
            )
            print("seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in seconds.items()))


def _make_folder(path: Path | None, option: str) -> None:
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be made a folder: {error.strerror}") from error


def _config_to_detect_with(
    trial_class: type[DetectionTrial], arguments: argparse.Namespace
) -> tuple[dict[str, Any], Checkpoint | None]:
    """The config; its hyperparameters are the checkpoint's, with --set over them."""
    config = load_config(arguments.config, arguments.overrides)
    checkpoint = None
    if arguments.checkpoint:
        checkpoint = read_checkpoint(find_checkpoint(arguments.checkpoint))
        known = {field.name for field in dataclasses.fields(trial_class.hyperparameters_class)}
        if other := checkpoint.hparams.keys() - known:
            raise UserError(
                f"{checkpoint.path} is another detector's: its hyperparameters have {', '.join(sorted(other))}"
            )
        overridden = [o.split("=")[0].split(".")[1] for o in arguments.overrides if o.startswith("hyperparameters.")]
        config["hyperparameters"] = {
            **checkpoint.hparams,
            **trial_class.hyperparameters_of_checkpoint(checkpoint.path),
            **{name: config["hyperparameters"][name] for name in overridden},
        }
    else:
        config["hyperparameters"] = fixed_hyperparameters(config)
    slots = int(os.environ.get("WORLD_SIZE", 1))
    batch_size = config["hyperparameters"].get("global_batch_size")
    if type(batch_size) is int:
        config["hyperparameters"]["global_batch_size"] = -(-batch_size // slots) * slots  # any number of processes
    _make_paths_absolute(config, trial_class)
    return config, checkpoint


@contextlib.contextmanager
def _detecting_trial(
    trial_class: type[DetectionTrial], config: dict, checkpoint: Checkpoint | None
) -> Iterator[DetectionTrial]:
    with _local_distributed() as distributed, _local_context(config, distributed) as context:
        trial = trial_class(context, for_training=False, categories=checkpoint.categories if checkpoint else None)
        if checkpoint:
            load_weights(trial.evaluation_model, checkpoint.weights, checkpoint.path)
        else:
            trial.check_pretrained()
        yield trial


def _detect_all(
    trial: DetectionTrial, data: SplitData, seconds: dict[str, float] | None = None
) -> Iterator[tuple[Batch, list[Any]]]:
    """The batches of this process's share and their detections; `seconds` adds up its waiting for "loading" and for
    "detecting"."""
    seconds = {"loading": 0.0, "detecting": 0.0} if seconds is None else seconds
    batches = iter(trial.evaluation_loader(data))
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        loaded = time.perf_counter()
        seconds["loading"] += loaded - started
        if batch is None:
            return
        detected = trial.detect_on_host_batch(batch)
        seconds["detecting"] += time.perf_counter() - loaded
        yield batch, detected


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--images: {folder} is not a folder")
    suffixes = Image.registered_extensions()
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix.lower() in suffixes]


def _folder_as_data(folder: Path, files: list[Path], trial: DetectionTrial) -> SplitData:
    """The image files below `folder` as a data set without annotations: ids from data.val where the file names
    are there, else the position in sorted order."""
    known = _known_image_ids(trial.data)
    images = []
    for file in files:
        name = str(file.relative_to(folder))
        try:
            with Image.open(file) as image:
                width, height = ImageOps.exif_transpose(image).size if image.getexif() else image.size
        except (OSError, Image.DecompressionBombError) as error:
            logger.warning("%s is left out: %s", file, error)
            continue
        images.append({"id": known.get(name, len(images)), "file_name": name, "height": height, "width": width})
    if not images:
        raise UserError(f"--images: {folder} holds no image that can be read")
    if not all(image["file_name"] in known for image in images):
        images = [{**image, "id": position} for position, image in enumerate(images)]
    coco = {"images": images, "annotations": [], "categories": trial.categories}
    return SplitData(CocoAnnotations.from_dict(coco), DiskImages(folder.absolute()))


def _known_image_ids(data: DataConfig) -> dict[str, int]:
    if data.backend == "fake" or not data.has_val_annotations:
        return {}
    try:
        annotations = CocoAnnotations.open(data.located(data.val.annotations), data.cache_dir, data.store_options)
    except UserError:  # a data set in another format: its files have no COCO ids
        return {}
    return {annotations.file_name(i): int(image_id) for i, image_id in enumerate(annotations.image_ids)}


def _write_results(
    folder: Path, gathered: list[tuple[Any, dict[int, list[dict]]]], min_score: float = 0.0
) -> tuple[int, int, int]:
    """Returns how many images and detections there are, and how many detections of at least `min_score`."""
    by_image = {image_id: found for _, results in gathered for image_id, found in results.items()}
    results = [result for _, found in sorted(by_image.items()) for result in found]
    (folder / "results.json").write_text(json.dumps(results))
    return len(by_image), len(results), sum(result["score"] >= min_score for result in results)


# --- what both print and draw -----------------------------------------------------------------------


def metrics_table(metrics: dict[str, float], iou_types: tuple[str, ...]) -> str:
    """COCO's numbers, and the AP of each category, as text; other metrics a line each."""
    if not all(f"{iou_types[0]}_{name}" in metrics for name in summary_metrics(iou_types[0])):
        return tabulate(list(metrics.items()), floatfmt=".4f")
    names = list(dict.fromkeys(name for iou_type in iou_types for name in summary_metrics(iou_type)))
    names += [name.removeprefix(f"{iou_types[0]}_") for name in metrics if name.startswith(f"{iou_types[0]}_AP/")]
    rows = [[name, *(metrics.get(f"{iou_type}_{name}") for iou_type in iou_types)] for name in names]
    return tabulate(rows, headers=["", *iou_types], floatfmt=".4f", missingval="-")


def draw_samples(trial: DetectionTrial, path: Path) -> None:
    """Detections beside the ground truth, on the first validation images."""
    annotations, images = trial.val_data.annotations, trial.val_data.images
    detections = {}
    for batch in trial.validation_loader:
        for detection in trial.detect_on_host_batch(batch):
            detections[detection.image_id] = detection
        if len(detections) >= _PICTURES:
            break
    samples = []
    for index in range(len(annotations)):
        record = annotations[index]
        if record.image_id in detections and len(samples) < _PICTURES:
            image = read_image(images, record.file_name)
            samples.append((image, record, detections[record.image_id]))
    visualization.save(visualization.side_by_side(samples, annotations.categories), path)


# --- processes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _local_distributed() -> Iterator[DistributedContext]:
    """The processes that torchrun started, or this one alone."""
    if "RANK" not in os.environ:
        yield DistributedContext(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
        return
    os.environ["USE_TORCH_DISTRIBUTED"] = "True"  # what determined.launch.torch_distributed sets
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    # `from_torch_distributed` has two fixed ports: a second run on the machine, or a trial, would not start
    ports = [_free_ports(2)]
    torch.distributed.broadcast_object_list(ports, src=0)
    (pub_port, pull_port) = ports[0]
    distributed = DistributedContext(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        cross_rank=int(os.environ["GROUP_RANK"]),
        cross_size=int(os.environ["GROUP_WORLD_SIZE"]),
        chief_ip=os.environ["MASTER_ADDR"],
        pub_port=pub_port,
        pull_port=pull_port,
    )
    try:
        yield distributed
    except (UserError, DivergedError):
        if distributed.rank > 0:
            # the chief mostly has the same error, and may still be in a collective with this process: leaving it
            # alone there would put a lost connection in the place of the message
            time.sleep(_SECONDS_FOR_CHIEF)
        raise
    finally:
        distributed.close()
        torch.distributed.destroy_process_group()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _on_chief(distributed: DistributedContext, function: Callable[[], Any]) -> Any:
    """What the chief's call returns, or the UserError that it raises, on every process: what one of them does
    to the run's folder, the others must not see half-done."""
    result, error = None, None
    if distributed.rank == 0:
        try:
            result = function()
        except UserError as raised:
            error = str(raised)
    result, error = distributed.broadcast((result, error))
    if error is not None:
        raise UserError(error)
    return result


@contextlib.contextmanager
def _local_context(config: dict[str, Any], distributed: DistributedContext) -> Iterator[pytorch.PyTorchTrialContext]:
    per_slot_batch_size(config["hyperparameters"].get("global_batch_size", 1), distributed.size)
    with pytorch.init(
        hparams=config["hyperparameters"],
        exp_conf=config,
        distributed=distributed,
        aggregation_frequency=_aggregation_frequency(config),
        enable_tensorboard_logging=False,  # written by LocalRun
    ) as context:
        yield context


def _aggregation_frequency(config: dict[str, Any]) -> int:
    return (config.get("optimizations") or {}).get("aggregation_frequency") or 1
