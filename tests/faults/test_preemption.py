"""Signals, dying ranks and hanging ones, under one process, two, and torch's launcher."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.checkpoint import load_metadata

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
PREEMPTED = 75


def wait_for(text: str, file: Path, timeout: float = 120) -> None:
    """Until a run has logged something."""
    deadline = time.monotonic() + timeout
    while text not in (file.read_text() if file.exists() else ""):
        assert time.monotonic() < deadline, f"no {text!r} in {file}"
        time.sleep(0.02)


@pytest.mark.faults(
    fault="SIGTERM or SIGUSR1",
    promise="the step is finished, the state saved, exit code 75; --resume ends bit-identical",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal(server, digits, tmp_path, assert_same_end, number):
    run = [*digits, "checkpoint.period=1000", "data.workers=2", "log.period=1"]
    assert server.run(*run, f"output_dir={tmp_path}/whole").code == 0
    process = server.start(*run, f"output_dir={tmp_path}/stopped")
    wait_for("iteration 5 ", tmp_path / "stopped" / "log.txt")
    os.killpg(process.pid, number)  # the loading workers get it too
    ended = server.wait(process)
    assert ended.code == PREEMPTED and ended.err.count("\n") == 1, ended.err
    after = re.match(
        rf"stopped by {number.name} after iteration (\d+); the state is saved; --resume goes on", ended.err
    )
    assert load_metadata(tmp_path / "stopped" / "checkpoints" / "last.pt")["iteration"] == int(after[1]) < 34
    assert server.run(*run, f"output_dir={tmp_path}/stopped", "--resume", "auto").code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.faults(
    fault="SIGTERM to one of two processes",
    promise="both finish the same step, save, and exit with 75; --resume ends bit-identical",
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_signal_to_one_process_of_two(server, digits, tmp_path, assert_same_end, strategy):
    run = [*digits, f"distributed.strategy={strategy}", "checkpoint.period=1000", "log.period=1"]
    assert [end.code for end in server.run_processes(2, *run, f"output_dir={tmp_path}/whole")] == [0, 0]
    processes = server.start_processes(2, *run, f"output_dir={tmp_path}/stopped")
    wait_for("iteration 3 ", tmp_path / "stopped" / "log.txt")
    os.kill(processes[1].pid, signal.SIGTERM)
    ended = [server.wait(process) for process in processes]
    assert [end.code for end in ended] == [PREEMPTED, PREEMPTED], [end.err for end in ended]
    assert "stopped by another process's signal" in ended[0].err
    resumed = server.run_processes(2, *run, f"output_dir={tmp_path}/stopped", "--resume", "auto")
    assert [end.code for end in resumed] == [0, 0]
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


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


def launch(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options]


def rank_processes(agent: subprocess.Popen) -> list[int]:
    """Process numbers of the ranks that a launcher has started."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in children.split()]


@pytest.mark.faults(
    fault="a rank dies under torchrun --max-restarts with --resume auto",
    promise="torchrun starts all ranks again, they go on from the last checkpoint and end bit-identical",
)
def test_torchrun_restarts_a_dead_rank(digits, tmp_path, assert_same_end):
    def start(name: str, *options: str) -> subprocess.Popen:
        command = launch("--standalone", "--nproc_per_node=2", "--max-restarts=2", *options)
        run = [TRAIN_NET, *digits, "log.period=1", f"output_dir={tmp_path}/{name}", "--resume", "auto"]
        return subprocess.Popen(
            [*command, *map(str, run)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    whole = start("whole")
    assert whole.wait(timeout=300) == 0, whole.stdout.read()
    agent = start("killed")
    wait_for("iteration 14 ", tmp_path / "killed" / "log.txt")
    os.kill(rank_processes(agent)[1], signal.SIGKILL)
    output, _ = agent.communicate(timeout=300)
    assert agent.returncode == 0, output
    assert re.search(r"resumed .*last.pt after 12 of 34", (tmp_path / "killed" / "log.txt").read_text())
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.faults(
    fault="SIGTERM or SIGUSR1 to torchrun itself",
    promise="it is passed on: the step is finished and the state saved; --resume ends bit-identical",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_torchrun(server, digits, tmp_path, assert_same_end, number):
    run = [*digits, "checkpoint.period=1000", "log.period=1"]
    assert [end.code for end in server.run_processes(2, *run, f"output_dir={tmp_path}/whole")] == [0, 0]
    options = ["--standalone", "--nproc_per_node=2", "--signals_to_handle=SIGTERM,SIGINT,SIGUSR1"]
    command = [*launch(*options), TRAIN_NET, *run, f"output_dir={tmp_path}/stopped"]
    agent = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for("iteration 5 ", tmp_path / "stopped" / "log.txt")
    agent.send_signal(number)
    output, _ = agent.communicate(timeout=120)
    assert f"stopped by {number.name} after iteration" in output, output
    resumed = server.run_processes(2, *run, f"output_dir={tmp_path}/stopped", "--resume", "auto")
    assert [end.code for end in resumed] == [0, 0]
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.faults(
    fault="two nodes: two torchrun agents that meet over the network",
    promise="they train one run, with the bits of two processes on one node",
)
def test_two_agents(server, digits, tmp_path, assert_same_end):
    assert [end.code for end in server.run_processes(2, *digits, f"output_dir={tmp_path}/one_node")] == [0, 0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    options = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={endpoint}",
        "--rdzv_id=run1",
    ]
    command = [*launch(*options), str(TRAIN_NET), *map(str, digits), f"output_dir={tmp_path}/two_nodes"]
    agents = [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert_same_end(tmp_path / "one_node", tmp_path / "two_nodes")
