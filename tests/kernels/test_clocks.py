"""Nodes whose clocks are wrong: warnings and time left are right by Slurm's end of the job."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from helpers.failing_starts import script
from helpers.kernel_clients import IPYKERNEL, READY, async_execute, async_kernel, install_kernelspec, poll_async

(LIBRARY,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
OFFSETS = {"c1": "+100s", "c2": "-100s", "c3": "+1d", "c4": "-1d"}
# The monotonic clock is the real one, as on a node.
PYTHON = """#!/bin/sh
case $SLURMD_NODENAME in
{cases}
esac
export FAKETIME FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_NO_CACHE=1 LD_PRELOAD={library}
exec {python} "$@"
"""
# Python's threads wait without an end under libfaketime: kernels have the real clock, and launchers have no threads.
ARGV = ["env", "--unset=LD_PRELOAD", *IPYKERNEL]


@pytest.mark.slow
async def test_warnings_come_in_time_whatever_a_nodes_clock_says(admin_settings, kernelspecs, tmp_path, caplog):
    """Nodes 100 s and a day ahead and behind: each job has one warning, in time, and its time left is right."""
    cases = "\n".join(f"{node}) FAKETIME='{offset}';;" for node, offset in OFFSETS.items())
    python = script(tmp_path / "python", PYTHON.format(cases=cases, library=LIBRARY, python=sys.executable))
    admin_settings(launcher_python=[python], walltime_warnings=[0.8])
    jobs = {}
    async with AsyncExitStack() as stack:
        for node in OFFSETS:
            install_kernelspec(
                kernelspecs, f"on-{node}", config_overrides={"runtime": 1, "node": node, "kernel_argv": ARGV}
            )
        began = time.time()
        started = await asyncio.gather(*(stack.enter_async_context(async_kernel(f"on-{node}")) for node in OFFSETS))
        for node, (manager, client) in zip(OFFSETS, started, strict=True):
            allocation = manager.provisioner._handle.allocation
            jobs[node] = allocation.jobid
            assert 0 < 60 - allocation.seconds_left < time.time() - began + 10
            assert await async_execute(client, "print(6 * 7)") == "42"
        pattern = r"job {} reaches its time limit in (\d+) seconds"
        assert await poll_async(
            lambda: all(re.search(pattern.format(jobid), caplog.text) for jobid in jobs.values()), timeout=READY
        )
    for node, jobid in jobs.items():
        (warning,) = set(re.findall(pattern.format(jobid), caplog.text))
        assert 40 <= int(warning) <= 48
        assert len(re.findall(rf"job {jobid}: the clock of node {node} is \d+ s (ahead of|behind)", caplog.text)) == 1
