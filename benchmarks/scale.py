"""What grows with the number of processes: seconds and bytes between two machines, which share no disk.

The machines are network namespaces. All processes share this machine's cores, so that their own work adds up: the
seconds are upper bounds, and the bytes are exact. A slope is the exponent of a power law: 0 for what does not grow, 1
for what grows as the ranks do.
"""

import contextlib
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

from command_line import ROOT, main, scratch_folder

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "efficientdet")]

RANKS = [2, 4, 8, 16, 32]
IMAGES = 1000  # that a validation gathers, with 100 detections each
WHAT = {
    "meet": "all processes meet",
    "start": "data, model and DDP",
    "all-reduce": "gradients of a step",
    "agree": "agreement to stop, without the steps beside it",
    "sockets": "agreement over sockets, as at a report",
    "gather": f"validation of {IMAGES} images, without its metrics",
    "resume": "checkpoint to the other machine",
}


def measure(rank: int, size: int) -> None:
    """Rank 0 writes the seconds, and the first rank of the other machine its bytes."""
    import numpy as np
    import torch

    from model_def import EfficientDetTrial
    from shared.config.experiment import read_experiment
    from shared.evaluation.detections import Detections
    from shared.evaluation.gathered import GatheredDetections
    from shared.training.meeting import local_processes
    from shared.training.processes import trial_context
    from shared.training.resume import on_each_machine

    seconds, sent = {}, {}

    def timed(name, function, times=5):
        before, took = link_bytes(), []
        for _ in range(times):
            distributed.allgather(None)
            started = time.perf_counter()
            result = function()
            took.append(time.perf_counter() - started)
        distributed.allgather(None)
        seconds[name] = statistics.median(took)
        sent[name] = (link_bytes() - before) / times
        return result

    changed = (f"hyperparameters.global_batch_size={size}",)
    experiment = read_experiment("config.yaml", changed, EfficientDetTrial.sections())
    before, started = link_bytes(), time.perf_counter()
    with contextlib.ExitStack() as stack:
        distributed, device = stack.enter_context(local_processes(10))
        seconds["meet"], sent["meet"] = time.perf_counter() - started, link_bytes() - before
        context = stack.enter_context(trial_context(experiment.config, distributed, device))
        trial = timed("start", lambda: EfficientDetTrial(context, experiment), times=1)
        gradients = torch.zeros(sum(each.numel() for each in trial.plain_model.parameters()))
        timed("all-reduce", lambda: torch.distributed.all_reduce(gradients))
        timed("agree", lambda: distributed.begin_max([0, 0, 0])(), times=20)
        timed("sockets", lambda: distributed.allgather((None, (None, False))), times=20)
        share = range(rank, IMAGES, size)
        found = [Detections(i, np.ones((100, 4), np.float32), np.ones(100), np.ones(100, np.int64)) for i in share]
        carried = GatheredDetections.of(found, masks=False, keypoints=False)
        timed("gather", lambda: distributed.allgather(distributed.gather(carried) and None))

        def resume():
            with on_each_machine(distributed, Path("checkpoint").absolute()) as folder:
                assert (folder / "state_dict.pth").exists()

        timed("resume", resume, times=3)
        if rank in (0, size // 2):
            Path(f"result-{size}.json").write_text(json.dumps(sent if rank else seconds))


def link_bytes() -> int:
    """Bytes that this machine has sent and received over its network."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0" in line)
    numbers = line.split(":")[1].split()
    return int(numbers[0]) + int(numbers[8])


def fork_ranks(first: int, count: int, size: int) -> int:
    """Forks ranks of one of two machines. Returns how many failed."""
    import torch

    import model_def  # noqa: F401 all ranks share what it loads

    torch.set_num_threads(1)
    place = {"GROUP_RANK": int(first > 0), "GROUP_WORLD_SIZE": 2, "MASTER_ADDR": "node-0", "MASTER_PORT": 29622}
    children = []
    for local in range(count):
        if (child := os.fork()) == 0:
            ranks = {"RANK": first + local, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
            os.environ.update({name: str(value) for name, value in {**ranks, **place}.items()})
            measure(first + local, size)
            os._exit(0)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def scale(ranks: list[int] = RANKS) -> None:
    """The meeting, the start, a step's gradients, a report, the gathering of a validation and a checkpoint.

    ranks: how many processes
    """
    import torch
    import yaml
    from machines import copy_code, machines
    from tiny_models import efficientdet_config

    from shared.data import synthetic

    results = []
    with scratch_folder() as folder, machines(folder) as nodes:
        synthetic.write(folder / "shapes", train=64, val=8)
        (folder / "config.yaml").write_text(yaml.safe_dump(efficientdet_config(Path("shapes"))))
        for node in nodes:
            copy_code(node, "efficientdet", folder / "shapes", folder / "config.yaml")
        saved = nodes[0].own / "code/checkpoint"
        saved.mkdir()
        torch.save(torch.rand(4_000_000), saved / "state_dict.pth")  # 16 MB
        for size in ranks:
            for number, node in enumerate(nodes):
                place = ("--ranks", number * size // 2, size // 2, size)
                node.start(sys.executable, __file__, *place, OMP_NUM_THREADS="1")
            assert [node.wait(900) for node in nodes] == [0, 0], nodes[0].log + nodes[1].log
            results.append([json.loads((node.own / f"code/result-{size}.json").read_text()) for node in nodes])
            print(size, "ranks:", results[-1], flush=True)
    print(f"| what | {' | '.join(f'{size} ranks' for size in ranks)} | slope, seconds | slope, bytes |")
    for name, text in WHAT.items():
        cells = [f"{1000 * seconds[name]:.2f} ms, {sent[name] / 2**20:.2f} MiB" for seconds, sent in results]
        slopes = [slope(ranks, [result[side][name] for result in results]) for side in (0, 1)]
        print(f"| {text} | {' | '.join(cells)} | {slopes[0]:.2f} | {slopes[1]:.2f} |")


def slope(ranks: list[int], values: list[float]) -> float:
    return statistics.linear_regression([math.log(r) for r in ranks], [math.log(v) for v in values]).slope


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ranks"]:
        sys.exit(fork_ranks(*map(int, sys.argv[2:])))
    main(__doc__, scale)
