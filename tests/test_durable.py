"""A power cut, a full disk, a kill or a network disk in a save leaves a complete checkpoint and reports."""

import errno
import json
import os
import random
import shutil
import tempfile
import time

import pytest
import torch
import yaml
from conftest import kill_run, reports, run_model_def, start_run, wait_for_batch
from determined.core import DummyDistributedContext
from in_threads import on_all, processes
from power_cut import Recorder, ext4
from tiny_models import efficientdet_config

from shared import durable
from shared.errors import UserError
from shared.training.checkpoints import read_checkpoint
from shared.training.resume import read_checkpoint_to_resume
from shared.training.run_folder import RunFolder
from shared.training.saving import write_manifest


@pytest.fixture
def config(shapes):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    return config


def resumed(folder: RunFolder, which: str = "last"):
    folder.restore_interrupted_rename()
    return read_checkpoint_to_resume(DummyDistributedContext(), which, folder)


def save(folder: RunFolder, batches: int, is_best: bool = True) -> None:
    """A save of a model with one weight, as a run outside a cluster does it."""
    new = folder.saving / "last"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with (new / "state_dict.pth").open("wb") as file:
        state = {
            "models_state_dict": [{"weight": torch.full((1000,), float(batches))}],
            "optimizers_state_dict": [{"state": {}, "param_groups": []}],
            "callbacks": {"training": {"ema": None}},
        }
        torch.save(state, file)
    (new / "load_data.json").write_text(json.dumps({"experiment_config": {}, "hparams": {}}))
    (new / "categories.json").write_text("[]")
    (new / "metadata.json").write_text(json.dumps({"steps_completed": batches}))
    write_manifest(new, batches)
    folder.keep(new, is_best)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.saving.mkdir(parents=True)
    return folder


# --- power cuts ---------------------------------------------------------------------------------------


def test_a_power_cut_at_any_moment_of_a_save_leaves_a_checkpoint(folder, tmp_path, monkeypatch):
    save(folder, 4)
    recorder = Recorder(folder.path, tmp_path / "disks", monkeypatch)
    durable.sync_tree(folder.path)
    save(folder, 8)
    recorder.keep()
    found = [resumed(RunFolder(disk)).batches for disk in recorder.disks()]
    assert len(found) > 6
    assert found[0] == 4
    assert found[-1] == 8
    assert found == sorted(found)
    assert resumed(RunFolder(recorder.disks()[-1]), "best").batches == 8


def test_without_fsync_a_power_cut_would_leave_nothing(folder, tmp_path, monkeypatch):
    # the record of fsync is what the test above relies on
    recorder = Recorder(folder.path, tmp_path / "disks", monkeypatch)
    monkeypatch.setattr(durable, "_sync", lambda descriptor: None)
    save(folder, 4)
    recorder.keep()
    with pytest.raises(UserError, match=r"is incomplete|cannot be read"):
        resumed(RunFolder(recorder.disks()[-1]))


@pytest.mark.usefixtures("without_figures")
def test_a_power_cut_right_after_a_run_keeps_its_checkpoints_and_reports(config, train, trial_class, tmp_path):
    with ext4(tmp_path, megabytes=300) as disk:
        config["searcher"]["max_length"] = {"batches": 4}
        run = train(trial_class, config, "mounted/run")
        disk.cut_the_power()
        assert [read_checkpoint(run / "checkpoints" / name).batches for name in ("best", "last")] == [4, 4]
        assert [line["batches"] for line in reports(run, "val")] == [4]
        assert RunFolder(run).total_batches() == 4
        assert "searcher" in (run / "config.yaml").read_text()
        assert (run / "detections.npz").stat().st_size


def test_a_file_is_durable_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    recorder = Recorder(folder, tmp_path / "disks", monkeypatch)
    durable.write_file(folder / "length.json", "old")
    durable.write_file(folder / "length.json", "new")
    recorder.keep()
    found = [(disk / "length.json") for disk in recorder.disks()]
    assert [path.read_text() if path.exists() else None for path in found] == [None, "old", "new"]


# --- damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metadata.json", "manifest.json", "state_dict.pth", "load_data.json"])
@pytest.mark.parametrize("damage", ["empty", "missing"])
def test_resume_last_falls_back_to_best_when_a_file_is(folder, caplog, name, damage):
    save(folder, 4)
    save(folder, 8, is_best=False)
    (folder.checkpoints / "last" / name).unlink()
    if damage == "empty":
        (folder.checkpoints / "last" / name).touch()
    if (name, damage) == ("manifest.json", "missing"):  # as in checkpoints of version 0.1
        assert resumed(folder).batches == 8
        return
    assert resumed(folder).batches == 4
    assert f"resuming from {folder.checkpoints / 'best'}" in caplog.text


def test_damage_to_last_leaves_best_as_it_was(folder):
    save(folder, 4)
    for path in (folder.checkpoints / "last").iterdir():
        path.write_bytes(b"")
    assert resumed(folder, "best").batches == 4


def test_a_manifest_is_not_accepted_with_the_metadata_of_another_batch(folder):
    save(folder, 4)
    (folder.checkpoints / "best/metadata.json").write_text('{"steps_completed": 8}')
    with pytest.raises(UserError, match=r"metadata.json is not of batch 4"):
        resumed(folder, "best")


# --- full and unusual disks ---------------------------------------------------------------------------


def test_a_full_disk_at_any_write_of_a_save_leaves_a_checkpoint(folder, monkeypatch):
    save(folder, 4)
    real, left = os.fsync, [0]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for writes in range(1000):
        left[0] = writes
        try:
            save(folder, 8 + writes)
        except OSError:
            assert resumed(folder).batches >= 4
            shutil.rmtree(folder.saving)
        else:
            break
    assert writes > 10
    assert resumed(folder).batches == 8 + writes


def test_a_line_that_a_full_disk_cut_off_is_not_continued_by_the_next(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    durable.append_line(path, '{"batches": 4}')

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_sync", full)
        with pytest.raises(OSError, match="No space"):
            durable.append_line(path, '{"batches": 6}')
    assert path.read_text() == '{"batches": 4}\n'
    with path.open("a") as file:
        file.write('{"batches": 6, "spl')  # a kill leaves this
    durable.append_line(path, '{"batches": 8}')
    assert path.read_text() == '{"batches": 4}\n{"batches": 8}\n'


def test_a_checkpoint_that_a_reader_keeps_on_nfs_makes_no_save_fail(folder, monkeypatch):
    real = shutil.rmtree

    def rmtree(path, *arguments, **named):
        if str(path).endswith(".old"):
            return  # files that somebody reads stay as .nfs0000…, and their folder with them
        real(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        for batches in (4, 8, 12):
            save(folder, batches)
        assert resumed(folder).batches == 12
    folder.restore_interrupted_rename()
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [".saving", "best", "last"]


def test_a_save_killed_between_renames_is_repaired_by_the_next_start(folder):
    for batches in (4, 8):
        save(folder, batches)
    old = folder.checkpoints / ".last.1.old"  # left by an earlier save
    shutil.copytree(folder.checkpoints / "best", old)
    (folder.checkpoints / "last").rename(folder.checkpoints / ".last.2.old")
    (old / "state_dict.pth").unlink()
    assert resumed(folder).path == folder.checkpoints / "last"
    assert not old.exists()


@pytest.mark.usefixtures("without_figures")
def test_a_clock_that_is_set_back_changes_nothing(config, trial_class, crash_and_resume, monkeypatch):
    now = [2e9]

    def back():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    run = crash_and_resume(trial_class, config, 6)
    assert [line["batches"] for line in reports(run, "val")] == [4, 8, 12]
    assert read_checkpoint(run / "checkpoints/last").batches == 12


@pytest.mark.usefixtures("without_figures")
def test_a_disk_that_is_full_at_the_start_is_one_error(config, train, trial_class, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"--output-dir: .*/run cannot be written \(No space left on device"):
        train(trial_class, config)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_an_error_and_earlier_checkpoints_are_complete(run_config, tmp_path, processes, program):
    script = program(
        "import resource, signal\n"
        "class Probe(model_def.EfficientDetTrial):\n"
        "    def after_batch(self, number):\n"
        "        super().after_batch(number)\n"
        "        if number == 5:\n"
        "            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "main(Probe)\n"
    )
    config, run = run_config(), tmp_path / "run"
    done = run_model_def("train", config, "--output-dir", run, script=script, check=False, processes=processes)
    assert done.returncode == 1
    assert f"error: --output-dir: {run} cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [read_checkpoint(run / "checkpoints" / name).batches for name in ("best", "last")] == [4, 4]
    run_model_def("train", config, "--output-dir", run, "--resume", "auto", processes=processes)
    assert reports(run)[-1]["batches"] == 12


# --- random moments -----------------------------------------------------------------------------------


def saved_after_each_batch(run_config):
    """A config whose run saves after each batch, so that most moments fall into a save."""
    every = {"searcher__max_length": {"batches": 10_000}, "min_checkpoint_period": {"batches": 1}}
    return run_config(**every, min_validation_period={"batches": 10_000})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_moments_resumes_from_a_complete_checkpoint(run_config, tmp_path, processes):
    path, run = saved_after_each_batch(run_config), tmp_path / "run"
    generator, trained = random.Random(0), 0
    for _ in range(20 // processes):
        process = start_run(path, run, processes, ("--resume", "auto"))
        wait_for_batch(run, process, trained + 2)
        time.sleep(generator.random() * 2)
        reported = reports(run)[-1]["batches"]
        kill_run(process)
        last = resumed(RunFolder(run))
        assert last.path.name == "last"
        assert last.batches >= max(trained, reported - 2)  # scheduling_unit is 2
        trained = last.batches
    config = yaml.safe_load(path.read_text())
    config["searcher"]["max_length"] = {"batches": trained + 2}
    path.write_text(yaml.safe_dump(config))
    run_model_def("train", path, "--output-dir", run, "--resume", "last", processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_power_is_cut_at_random_moments_resumes(run_config, tmp_path, processes):
    generator, trained = random.Random(1), 0
    path = saved_after_each_batch(run_config)
    with ext4(tmp_path, megabytes=600) as disk:
        run = disk.path / "run"
        for _ in range(6):
            process = start_run(path, run, processes, ("--resume", "auto"))
            wait_for_batch(run, process, trained + 2)
            time.sleep(generator.random() * 2)
            reported = reports(run)[-1]["batches"]
            disk.cut_the_power(lambda process=process: kill_run(process))
            checkpoint = resumed(RunFolder(run))
            assert checkpoint.batches >= max(trained, reported - 2)
            trained = checkpoint.batches
            assert reports(run)[-1]["batches"] >= reported


@pytest.mark.slow
def test_two_ranks_train_on_with_an_unusual_disk_and_clock(run_config, tmp_path, program):
    script = program(
        "import itertools, shutil, time\n"
        "clock, rmtree = itertools.count(2e9, -3600), shutil.rmtree\n"
        "time.time = lambda: next(clock)\n"
        "shutil.rmtree = lambda path, *rest, **named: str(path).endswith('.old') or rmtree(path, *rest, **named)\n"
        "main(model_def.EfficientDetTrial)\n"
    )
    path, run = run_config(), tmp_path / "run"
    run_model_def("train", path, "--output-dir", run, script=script, processes=2)
    assert resumed(RunFolder(run)).batches == 12
    assert sorted(name for name in os.listdir(run / "checkpoints") if name.endswith(".old")) == []
    config = yaml.safe_load(path.read_text())
    config["searcher"]["max_length"] = {"batches": 16}
    path.write_text(yaml.safe_dump(config))
    run_model_def("train", path, "--output-dir", run, "--resume", "last", script=script, processes=2)
    assert [line["batches"] for line in reports(run, "val")] == [4, 8, 12, 16]


# --- two processes in one folder ----------------------------------------------------------------------


# --- several ranks ------------------------------------------------------------------------------------


@pytest.fixture
def machines(tmp_path):
    """The run's folder on each of two machines without a shared disk."""
    folders = [RunFolder(tmp_path / f"machine-{number}" / "run") for number in range(2)]
    for folder in folders:
        folder.saving.mkdir(parents=True)
    return folders


def resume_on_both(folders, which="last"):
    """The checkpoint that each of three ranks resumes from, or its error. The last two ranks share a machine."""

    def work(context):
        try:
            checkpoint = read_checkpoint_to_resume(context, which, folders[context.cross_rank])
            return checkpoint and (checkpoint.batches, float(checkpoint.weights["weight"][0]))
        except UserError as error:
            return str(error)

    with processes(4, 2) as contexts:
        return on_all(work, contexts)


def files_in(folder):
    return sorted(path.relative_to(folder.path) for path in folder.path.rglob("*") if path.is_file())


def test_a_machine_without_the_checkpoint_gets_it_from_the_chief(machines):
    save(machines[0], 8)
    assert resume_on_both(machines) == [(8, 8.0)] * 4
    assert not files_in(machines[1])


def test_an_older_checkpoint_of_another_machine_does_not_count(machines):
    save(machines[0], 8)
    save(machines[1], 4)
    assert resume_on_both(machines) == [(8, 8.0)] * 4


@pytest.mark.parametrize("which", ["last", "auto"])
def test_a_run_continues_where_its_newest_checkpoint_is(machines, which):
    save(machines[0], 4)
    save(machines[1], 6)
    save(machines[1], 8, is_best=False)
    machines[1].append_report(8, "val", {"bbox_mAP": 0.5})
    assert resume_on_both(machines, which) == [(8, 8.0)] * 4
    machines[1].path.rename(machines[1].path.with_name("lost"))  # the chief has all of it now
    assert read_checkpoint(machines[0].checkpoints / "best").batches == 6
    assert machines[0].validation_after(8)["metrics"] == {"bbox_mAP": 0.5}


def test_machines_without_a_checkpoint_start_a_run_or_all_say_so(machines):
    assert resume_on_both(machines, "auto") == [None] * 4
    (error,) = set(resume_on_both(machines, "last"))
    assert "has no checkpoint yet" in error


def test_a_machine_that_cannot_write_a_copy_stops_all_ranks(machines, monkeypatch, tmp_path):
    save(machines[0], 8)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    (error,) = set(resume_on_both(machines))
    assert f"{tmp_path / 'missing'}" in error
    assert error.endswith("cannot be written (No such file or directory). Fix: make room there, or set TMPDIR")


def test_all_ranks_fall_back_to_the_checkpoint_that_the_chief_chose(machines):
    save(machines[0], 4)
    save(machines[0], 8, is_best=False)
    (machines[0].checkpoints / "last/metadata.json").write_text("")
    assert resume_on_both(machines) == [(4, 4.0)] * 4
