"""A Python command in several processes, as hosts that share some devices."""

import contextlib
import os
import pathlib
import random
import socket
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def free_port() -> int:
    """One below those that Linux gives to outgoing connections, which could take it before the hosts do."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return free.getsockname()[1]


def start(*args, hosts, devices, **env):
    """`hosts` processes of `python ARGS...`, each with its share of the devices."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])} | env
    env |= {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices // hosts}")}
    if hosts > 1:
        env |= {"CDDISTILL_COORDINATOR": f"127.0.0.1:{free_port()}", "CDDISTILL_PROCESSES": str(hosts)}
    command = [sys.executable, *map(str, args)]
    return [
        subprocess.Popen(command, env=env | {"CDDISTILL_PROCESS_ID": str(i)}, stdout=-1, stderr=-1, text=True)
        for i in range(hosts)
    ]


def together(*args, hosts, devices, timeout=None, **env):
    """What each of `hosts` processes of `python ARGS...` printed, and after that its stderr, whose lines could come in
    the middle of others; each process has its share of the devices, all end with 0."""
    started = start(*args, hosts=hosts, devices=devices, **env)
    try:
        out = ["".join(host.communicate(timeout=timeout)) for host in started]
    finally:
        [host.kill() for host in started]
    assert [host.returncode for host in started] == [0] * hosts, "\n".join(x[-3000:] for x in out)
    return out
