"""Exported files beside their checkpoint: milliseconds per image and peak memory, on one core and on two.

Every side detects on each image in turn, from the image's file to its detections. So noise on the machine changes all
sides. The first image warms up. On one core the times are CPU times, which other processes on the machine change less.
The memory of an exported file is that of a process that runs `detect.py`.
"""

import argparse
import contextlib
import os
import statistics
import time
from pathlib import Path

from command_line import ROOT, main, trial_class_of
from memory import in_process
from tabulate import tabulate
from turns import in_turns, seconds_of


def measure(detector: str, config: str, checkpoint: str, files: list[str], images: int) -> dict[str, dict]:
    """Milliseconds per image and MiB of each side, in this process."""
    from shared.commands.detection import FileDetector, detecting_trial, with_checkpoint
    from shared.commands.export import own_peak_memory, peak_memory_of
    from shared.launch import experiment_for
    from shared.training.meeting import local_processes

    given = argparse.Namespace(command="evaluate", config=config, overrides=[], checkpoint=checkpoint, model=None)
    trial_class = trial_class_of(detector)
    os.chdir(ROOT / detector)
    with local_processes() as processes, contextlib.ExitStack() as stack:
        experiment = experiment_for(given, trial_class.sections())
        experiment, saved = with_checkpoint(trial_class, experiment, given, processes[0])
        trial = stack.enter_context(detecting_trial(trial_class, experiment, saved, processes))
        data = trial.open_val()
        indices = [index % len(data.annotations) for index in range(images + 1)]  # the first image warms up
        dataset, collate = trial.evaluation_dataset(data), trial.collate(training=False)
        sides = {"PyTorch": lambda index: trial.detect_on_host_batch(collate([dataset[index]]))}
        sides["PyTorch"](0)
        memory = {"PyTorch": own_peak_memory()}
        for path in files:
            name = f"{Path(path).parent.name}/{Path(path).name}"
            file = FileDetector(trial_class, experiment, Path(path), processes)
            sides[name] = lambda index, file=file: file.detect_on_host_batch(file.batch_of(data, index))
            memory[name] = peak_memory_of(Path(path).with_name("detect.py"), Path(path), data, indices)
        clock = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
        timed = {
            name: lambda turn, detect_image=detect_image: seconds_of(detect_image, indices[turn], clock=clock)
            for name, detect_image in sides.items()
        }
        seconds = in_turns(timed, images)
    return {name: {"ms": 1000 * statistics.median(s), "mib": memory[name]} for name, s in seconds.items()}


def compare(detector: str, config: Path, checkpoint: Path, files: list[Path], images: int = 50, cores: int = 2) -> None:
    """The table of one core, and of two.

    detector: the folder of the detector.
    config: the experiment config.
    checkpoint: the folder of a checkpoint.
    files: exported files of the checkpoint.
    images: to detect on.
    cores: at most.
    """
    config, checkpoint, *files = (str(path.absolute()) for path in (config, checkpoint, *files))
    own = sorted(os.sched_getaffinity(0))[:cores]
    for count in range(1, len(own) + 1):
        os.environ["OMP_NUM_THREADS"] = str(count)
        os.sched_setaffinity(0, own[:count])
        found = in_process(measure, detector, config, checkpoint, files, images, start="spawn")
        rows = [(name, side["ms"], side["ms"] / found["PyTorch"]["ms"], side["mib"]) for name, side in found.items()]
        headers = ["", "ms per image", "of PyTorch's", "MiB"]
        print(f"\n{count} {'core' if count == 1 else 'cores'}, {images} images\n")
        print(tabulate(rows, headers, floatfmt=("", ".1f", ".2f", ".0f"), tablefmt="github"))


if __name__ == "__main__":
    main(__doc__, compare)
