"""The rank of a process, from the variables of each launcher."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from shared.environment import adopt_launcher, first_host, parse_signals, without_launcher
from shared.errors import UserError

TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"},
}
RAY = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1"},
    **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "34567"},
}
SLURM = {
    **{"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[07-08,12]"},
    **{"SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0"},
}
OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node-a"},
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "node-a"}
KUBEFLOW = {
    **{"PET_NNODES": "4", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "3"},
    **{"PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"},
}


def adopted(environment):
    """The rank, the number of ranks, the rank on the machine, and rank 0's address."""
    environment = dict(environment)
    adopt_launcher(environment)
    return tuple(environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


@pytest.mark.parametrize(
    ("environment", "chief"),
    [
        (TORCHRUN, ("node-a", "29500")),
        (RAY, ("10.0.0.1", "34567")),
        (SLURM, ("gpu07", "28638")),
        ({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, ("10.0.0.1", "1")),
        (OPEN_MPI, ("node-a", "29500")),
        (MPICH, ("node-a", "29500")),
        ({**SLURM, **OPEN_MPI}, ("node-a", "29500")),  # mpirun in a job
        ({**SLURM, **TORCHRUN}, ("node-a", "29500")),  # torchrun in a step
    ],
)
def test_each_launcher_gives_the_rank_and_where_rank_0_is(environment, chief):
    assert adopted(environment) == ("3", "4", "1", *chief)


def test_a_pod_of_kubeflow_is_a_rank_without_torchrun():
    assert adopted(KUBEFLOW) == ("3", "4", "0", "job-node-0-0.job", "29400")


def test_a_step_with_a_part_of_the_job_s_tasks_counts_its_own():
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu12", "SLURM_PROCID": "1"}
    assert adopted({**SLURM, **step})[:4] == ("1", "2", "1", "gpu12")


def test_processes_on_one_machine_find_rank_0_there():
    one = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    del one["MASTER_ADDR"]
    assert adopted(one)[3:] == ("127.0.0.1", "29500")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "a"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a"},  # a batch script
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"},
    ],
)
def test_a_single_process_is_no_rank(environment):
    assert adopted(environment)[0] is None


@pytest.mark.parametrize(
    ("launcher", "missing"),
    [
        (TORCHRUN, "WORLD_SIZE"),
        (TORCHRUN, "MASTER_ADDR"),
        (RAY, "MASTER_PORT"),
        (SLURM, "SLURM_LOCALID"),
        (SLURM, "SLURM_JOB_NODELIST"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE"),
        (OPEN_MPI, "MASTER_ADDR"),
        (KUBEFLOW, "PET_NODE_RANK"),
        (KUBEFLOW, "PET_MASTER_ADDR"),
    ],
)
def test_a_variable_that_a_launcher_does_not_set_is_one_error(launcher, missing):
    environment = {name: value for name, value in launcher.items() if name != missing}
    with pytest.raises(UserError, match=rf"^{missing}: .* does not set it\. Fix: set it for every process"):
        adopted(environment)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"RANK": "x"}, "RANK: it is 'x'. Fix: give a whole number"),
        ({"RANK": "4"}, "RANK: it is 4, and WORLD_SIZE is 4. Fix: number the processes from 0"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(change, problem):
    with pytest.raises(UserError, match=problem):
        adopted({**TORCHRUN, **change})


@pytest.mark.parametrize("change", [{"PET_NPROC_PER_NODE": "8"}, {"PET_NNODES": "1:4"}])
def test_pods_of_several_processes_need_torchrun(change):
    with pytest.raises(UserError, match=r"Fix: start the program with torchrun"):
        adopted({**KUBEFLOW, **change})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[07-08,12],b", "gpu07"), ("r[1-2]n[03,5].x", "r1n03.x")],
)
def test_the_first_host_of_slurm_s_list(nodes, first):
    assert first_host(nodes) == first


def test_a_trial_of_a_search_does_not_take_the_search_for_its_launcher():
    for launcher in (TORCHRUN, RAY, SLURM, OPEN_MPI, MPICH, KUBEFLOW):
        assert without_launcher({**launcher, "PATH": "/bin", "SLURM": "x"}) == {"PATH": "/bin", "SLURM": "x"}


def test_signals_are_named_as_kill_names_them():
    assert parse_signals("TERM, sigusr1") == (signal.SIGTERM, signal.SIGUSR1)
    assert parse_signals("") == ()


def test_a_task_without_its_variables_fails_before_torch_is_loaded(run_config):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "model_def.py", "train", run_config()],
        cwd=ROOT / "efficientdet",
        env={"PATH": "", "HOME": "", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "a"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert lines[-1].startswith("error: SLURM_LOCALID: srun started this process as one of several")
    assert not [line for line in done.stderr.splitlines() if line.rstrip().endswith(" torch")]
