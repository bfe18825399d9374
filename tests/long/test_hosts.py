"""torchrun on two machines, which two network namespaces with a cable between them stand for."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2fast import train as program
from tests.tools import ranks, tiny
from tests.tools.checkout import CHECKOUT
from tests.tools.gpu import CUDA
from tests.tools.programs import HANG

pytest.importorskip("tyro", reason="needs tyro for the command line")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CUDA, reason="gloo on CPUs")]

HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}
FLAGS = [*tiny.FLAGS, "--total-batch", "64", "--steps", "6"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """{host: network namespace}, connected by a cable."""
    names = {host: f"gpt2fast-{os.getpid()}-{host}" for host in HOSTS}
    try:
        for name in names.values():
            ip("netns", "add", name)
        a, b = names.values()
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for host, name in names.items():
            ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", "cable")
            for link in ("cable", "lo"):
                ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names.values():
            shutil.which("ip") and subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"network namespaces need Linux, root and iproute2: {error}")
    yield names
    for name in names.values():
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
        for pid in pids.split():
            os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", name)


@pytest.fixture
def folder(tmp_path):
    tiny.write_data(tmp_path / "data", n=700)
    return tmp_path


def torchrun(namespace: str, host: str, folder: Path, *flags: str) -> subprocess.Popen:
    """Start the command of docs/many_gpus.md on one of two nodes, with its output in HOST.txt."""
    command = f"ip netns exec {namespace} {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 "
    command += f"--rdzv-backend c10d --rdzv-endpoint {HOSTS['a']}:29500 --rdzv-id run1 "
    # torchrun derives these from the host name, and both namespaces have that of the real machine
    command += f"--local-addr {HOSTS[host]} --rdzv-conf is_host={int(host == 'a')} "
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    environment.pop("TRITON_INTERPRET", None)
    with (folder / f"{host}.txt").open("w") as file:
        return subprocess.Popen(
            [*command.split(), "-m", "gpt2fast.train", "--", *FLAGS, *flags],
            cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def test_two_machines_get_the_losses_of_one_process(hosts, folder):
    nodes = {host: torchrun(hosts[host], host, folder, "--run", "two") for host in HOSTS}
    assert [node.wait(HANG) for node in nodes.values()] == [0, 0], (folder / "a.txt").read_text()
    ranks.run(program.main, 1, folder, [*FLAGS, "--run", "one"])
    one, two = ([row[name] for row in ranks.metrics(folder, run) for name in ("loss", "val_loss") if name in row]
                for run in ("one", "two"))  # fmt: skip
    assert len(one) >= 6
    np.testing.assert_allclose(two, one, rtol=2**-21)


@pytest.mark.parametrize("lost", HOSTS)
def test_a_machine_that_loses_its_network_ends_the_run(hosts, folder, lost):
    """No process ends and no connection closes, as when a machine loses power."""
    flags = ["--run", "lost", "--steps", "100000", "--checkpoint-every", "5", "--val-every", "0"]
    nodes = [torchrun(hosts[host], host, folder, *flags) for host in HOSTS]
    start = time.monotonic()
    while not any(row.get("step", 0) > 20 for row in ranks.metrics(folder, "lost")):
        assert [node.poll() for node in nodes] == [None, None], (folder / "a.txt").read_text()
        assert time.monotonic() < start + HANG, (folder / "a.txt").read_text()
        time.sleep(0.2)
    ip("-n", hosts[lost], "link", "set", "cable", "down")
    cut = time.monotonic()
    left = ({*HOSTS} - {lost}).pop()
    while "error: rank" not in (folder / f"{left}.txt").read_text():
        assert time.monotonic() < cut + HANG
        time.sleep(0.2)
    said = (folder / f"{left}.txt").read_text()
    assert "disappeared without an error" in said if lost == "b" else "the other ranks cannot be reached" in said
    assert ranks.newest(folder, "lost").is_dir()
