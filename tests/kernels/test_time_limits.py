"""When an allocation ends: Slurm's word on it, also when a user changes the time limit."""

from __future__ import annotations

import signal
import time
from functools import partial

import psutil
import pytest

from helpers.kernel_clients import (
    READY,
    async_execute,
    async_kernel,
    commands_run,
    install_kernelspec,
    jobid_of,
    poll_async,
)
from helpers.private_slurm import slurm

SIGUSR1_BIT = 1 << (signal.SIGUSR1 - 1)
MASKS = """
for line in open('/proc/self/status'):
    if line.startswith(('SigIgn', 'SigBlk')): print(int(line.split()[1], 16))
"""


def place_of(manager):
    """A kernel's allocation, and its launcher."""
    held = manager.provisioner._handle
    return held.allocation, held.process.launcher


def warning_due(launcher, end_time):
    """What the launcher says when its clock says that the end is near."""
    launcher.link_message(launcher.link, "NOTICE", {"kind": "walltime", "remaining": end_time - time.time()})


def asked(service, number):
    """Whether this many Slurm commands have been run."""
    return commands_run(service) == number


def answered(allocation, known):
    """Whether Slurm has said more than was ``known``."""
    return allocation.info is not known


async def test_a_job_that_was_given_more_time_is_not_warned_of_its_old_end(service, kernelspecs, cluster, caplog):
    """The end is Slurm's, also after ``scontrol update``: before a warning it is asked for once."""
    caplog.set_level("INFO")
    install_kernelspec(kernelspecs, "short", config_overrides={"runtime": 5})
    async with async_kernel("short") as (manager, _client):
        allocation, launcher = place_of(manager)
        old_end = allocation.end_time
        assert abs(old_end - time.time() - 300) < 60
        slurm("scontrol", "update", f"JobId={allocation.jobid}", "TimeLimit=60", cluster=cluster)
        before = commands_run(service)
        service._loop.call_soon_threadsafe(warning_due, launcher, old_end)
        assert await poll_async(lambda: "was given more time" in caplog.text, timeout=READY)
        assert "save your work" not in caplog.text
        assert commands_run(service) == before + 1
        assert allocation.end_time - old_end > 3000
        service._loop.call_soon_threadsafe(warning_due, launcher, allocation.end_time)
        assert await poll_async(lambda: "save your work" in caplog.text, timeout=READY)


async def test_slurms_signal_costs_one_question_and_no_kernel(service, kernelspecs, caplog):
    """Neither launcher nor kernels end by SIGUSR1; where the end is as it was nothing is said."""
    caplog.set_level("INFO")
    async with async_kernel("slurm") as (manager, client):
        masks = (await async_execute(client, MASKS)).split()
        assert len(masks) == 2
        assert not [mask for mask in masks if int(mask) & SIGUSR1_BIT]
        before = commands_run(service)
        launcher = psutil.Process(manager.provisioner._handle.process.pid).parent()
        allocation, _launcher = place_of(manager)
        for number in (1, 2):
            known = allocation.info
            launcher.send_signal(signal.SIGUSR1)
            assert await poll_async(partial(asked, service, before + number), timeout=READY)
            # Two that come together are one question: the next comes when this one is answered.
            assert await poll_async(partial(answered, allocation, known), timeout=READY)
        assert await async_execute(client, "print('still here')") == "still here"
        assert launcher.is_running()
        assert "time limit" not in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_shortened_time_limit_is_noticed_by_slurms_signal(service, kernelspecs, cluster, caplog):
    """Users are warned of the new end, and Slurm was asked once."""
    caplog.set_level("INFO")
    install_kernelspec(kernelspecs, "long", config_overrides={"runtime": 60})
    async with async_kernel("long") as (manager, _client):
        allocation, launcher = place_of(manager)
        before = commands_run(service)
        slurm("scontrol", "update", f"JobId={jobid_of(manager)}", "TimeLimit=5", cluster=cluster)
        assert await poll_async(lambda: "save your work" in caplog.text, timeout=150)
        assert "has less time" in caplog.text
        assert commands_run(service) == before + 1
        assert abs(allocation.end_time - time.time()) < 300
        assert launcher.end_time == allocation.end_time
        assert manager.provisioner._handle.process.walltime_end == allocation.end_time
