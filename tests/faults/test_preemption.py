"""Signals, dying ranks and hanging ones, under one process, two, and torch's launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoint import load_metadata
from tests.faults.conftest import assert_same_end, free_port, wait_for

ROOT = Path(__file__).parents[2]
PREEMPTED = 75
SAVED_ON_DEMAND = ("checkpoint.period=1000", "log.period=1")


def torchrun(*arguments: object) -> subprocess.Popen:
    """Options of the launcher, then the run's."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*map(str, command)], cwd=ROOT, text=True, env=environment, **output)


@pytest.mark.faults(
    fault="SIGTERM or SIGUSR1 to a single process, SIGTERM to one of two",
    promise="the step is finished, by both, the state saved, exit code 75; --resume ends bit-identical",
)
@pytest.mark.parametrize(
    ("number", "processes", "strategy"),
    [(signal.SIGTERM, 1, "ddp"), (signal.SIGUSR1, 1, "ddp"), (signal.SIGTERM, 2, "ddp"), (signal.SIGTERM, 2, "fsdp2")],
)
def test_a_signal(server, digits, finished, tmp_path, number, processes, strategy):
    run = [*digits, *SAVED_ON_DEMAND, "data.workers=2", f"distributed.strategy={strategy}"]
    stopped = tmp_path / "stopped"
    started = server.start_processes(processes, *run, f"output_dir={stopped}")
    wait_for("iteration 5 ", stopped / "log.txt")
    os.killpg(started[-1].pid, number)  # its loading workers get it too
    ended = [server.wait(process) for process in started]
    assert [end.code for end in ended] == [PREEMPTED] * processes, ended
    by = number.name if processes == 1 else "another process's signal"
    after = re.fullmatch(
        rf"stopped by {by} after iteration (\d+); the state is saved; --resume goes .*\n", ended[0].err
    )
    assert load_metadata(stopped / "checkpoints" / "last.pt")["iteration"] == int(after[1]) < 34
    server.succeed(*run, f"output_dir={stopped}", "--resume", "auto", processes=processes)
    assert_same_end(finished(*run, processes=processes), stopped)


@pytest.mark.faults(
    fault="one of two processes hangs",
    promise="the other one ends after distributed.timeout_minutes with one line that says so, exit code 2",
)
def test_a_process_that_hangs(server, digits, tmp_path):
    run = [*digits, "distributed.timeout_minutes=0.1", "log.period=1", f"output_dir={tmp_path}/run"]
    processes = server.start_processes(2, *run)
    wait_for("iteration 3 ", tmp_path / "run" / "log.txt")
    os.kill(processes[1].pid, signal.SIGSTOP)
    ended = server.wait(processes[0], timeout=60)
    os.kill(processes[1].pid, signal.SIGKILL)
    server.wait(processes[1])
    assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
    assert "did not take part for 0.1 minutes (distributed.timeout_minutes)" in ended.err


@pytest.mark.faults(
    fault="a rank dies under torchrun --max-restarts with --resume auto",
    promise="torchrun starts all ranks again, they go on from the last checkpoint and end bit-identical",
)
def test_torchrun_restarts_a_dead_rank(digits, finished, tmp_path):
    run, killed = [*digits, "log.period=1"], tmp_path / "killed"
    options = ("--standalone", "--nproc_per_node=2", "--max-restarts=2", "tools/train_net.py")
    agent = torchrun(*options, *run, f"output_dir={killed}", "--resume", "auto")
    wait_for("iteration 14 ", killed / "log.txt")
    ranks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[1]), signal.SIGKILL)
    output, _ = agent.communicate(timeout=300)
    assert agent.returncode == 0, output
    assert re.search(r"resumed .*last.pt after 12 of 34", (killed / "log.txt").read_text())
    assert_same_end(finished(*run, processes=2), killed)


@pytest.mark.faults(
    fault="SIGTERM or SIGUSR1 to torchrun itself",
    promise="it is passed on: the step is finished and the state saved; --resume ends bit-identical",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_torchrun(server, digits, finished, tmp_path, number):
    run, stopped = [*digits, *SAVED_ON_DEMAND], tmp_path / "stopped"
    options = ("--standalone", "--nproc_per_node=2", "--signals_to_handle=SIGTERM,SIGINT,SIGUSR1")
    agent = torchrun(*options, "tools/train_net.py", *run, f"output_dir={stopped}")
    wait_for("iteration 5 ", stopped / "log.txt")
    agent.send_signal(number)
    output, _ = agent.communicate(timeout=120)
    assert f"stopped by {number.name} after iteration" in output, output
    server.succeed(*run, f"output_dir={stopped}", "--resume", "auto", processes=2)
    assert_same_end(finished(*run, processes=2), stopped)


@pytest.mark.faults(
    fault="two nodes: two torchrun agents that meet over the network",
    promise="they train one run, with the bits of two processes on one node",
)
def test_two_agents(digits, finished, tmp_path):
    meeting = ("--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_id=run1")
    options = ("--nnodes=2", "--nproc_per_node=1", *meeting, "tools/train_net.py")
    agents = [torchrun(*options, *digits, f"output_dir={tmp_path}/two_nodes") for _ in range(2)]
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert_same_end(finished(*digits, processes=2), tmp_path / "two_nodes")
