"""``python -m bench [--runs N] [--only PART]``: measure each figure beside its reference, in one session."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench import harness
from bench.gateway import bench_gateway
from bench.harness import Kernel, Table, Ticker, running, start, stop, write_kernelspec
from bench.restart import bench_restart
from bench.ssh import bench_ssh
from bench.ways import bench_ways
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster

MODES = ("direct", "tunnel")
RUNNING_SECONDS = 60
STREAM = "for _ in range(100): print('x' * 999_999)"
DISPLAY = "from IPython.display import display\nfor _ in range(100): display({'text/plain': 'x' * 1_000_000}, raw=True)"
# The kernel records when the interrupt arrived, since the client is then still reading the flood.
FLOOD = """
import time
try:
    while True: print('y' * 5000)
except KeyboardInterrupt:
    interrupted = time.time()
"""


async def bench_starts(table: Table, specs: dict[str, str], runs: int) -> None:
    """Starts in a running allocation, and restarts, beside LocalProvisioner; the kinds alternate."""
    for _run in range(runs):
        for kind, name in specs.items():
            kernel, seconds = await start(name)
            table.add(f"start, {kind}", seconds)
            began = time.perf_counter()
            await kernel.manager.restart_kernel()
            client = kernel.manager.client()
            kernel.client.stop_channels()
            kernel.client = client
            client.start_channels(hb=False)
            await kernel.info()
            table.add(f"restart, {kind}", time.perf_counter() - began)
            await stop(kernel)
    for what in ("start", "restart"):
        for kind in specs:
            table.row(f"{what}, {kind}", "ms", reference=f"{what}, local" if kind != "local" else None, scale=1e3)


async def bench_new_allocations(table: Table, directory: Path, runs: int) -> None:
    """Starts with a new allocation, before and after the job's first instruction."""
    runner = SlurmService.instance().runner
    local = write_kernelspec(directory, "local")
    for _run in range(runs):
        bare = await asyncio.to_thread(bare_floor, directory)
        table.add("sbatch to first instruction, bare", bare)
        kernel, seconds = await start(local)
        await stop(kernel)
        table.add("bare floor: that and a local start", bare + seconds)
        for mode in MODES:
            name = write_kernelspec(directory, f"new-{mode}", connect=mode)
            before = runner.counts.total()
            began = time.time()
            kernel, seconds = await start(name)
            table.add("Slurm commands, start", runner.counts.total() - before)
            launcher = kernel.provisioner._handle.process.launcher
            first = start_time(launcher_pid(launcher.jobid))
            table.add(f"new allocation, {mode}, in all", seconds)
            table.add(f"submit to first instruction, {mode}", first - began)
            table.add(f"first instruction to kernel_info, {mode}", began + seconds - first)
            before = runner.counts.total()
            jobid = kernel.provisioner.jobid
            await kernel.manager.restart_kernel()
            table.add("Slurm commands, restart", runner.counts.total() - before)
            before = runner.counts.total()
            began = time.perf_counter()
            await stop(kernel)
            table.add("Slurm commands, stop", runner.counts.total() - before)
            table.add("stop returned", time.perf_counter() - began)
            await asyncio.to_thread(wait_until_free, jobid)
            table.add("allocation free after stop", time.perf_counter() - began)
    await count_while_running(table, directory)
    table.row("sbatch to first instruction, bare", "ms", scale=1e3)
    table.row("bare floor: that and a local start", "ms", scale=1e3)
    for mode in MODES:
        table.row(f"submit to first instruction, {mode}", "ms", scale=1e3)
        table.row(f"first instruction to kernel_info, {mode}", "ms", reference="start, local", scale=1e3)
        table.row(f"new allocation, {mode}, in all", "ms", reference="bare floor: that and a local start", scale=1e3)
    table.row("stop returned", "ms", scale=1e3)
    table.row("allocation free after stop", "ms", scale=1e3)
    for what in ("start", "restart", "an hour of running", "stop"):
        table.row(f"Slurm commands, {what}", "")


async def count_while_running(table: Table, directory: Path) -> None:
    """Slurm commands while kernels run and idle, counted for a minute and scaled to an hour."""
    runner = SlurmService.instance().runner
    async with (
        running(write_kernelspec(directory, "works", connect="tunnel")) as works,
        running(write_kernelspec(directory, "idle", connect="direct")),
    ):
        before, began = runner.counts.total(), time.monotonic()
        await works.run(f"import time; until = time.time() + {RUNNING_SECONDS}\nwhile time.time() < until: pass")
        counted = runner.counts.total() - before
        table.add("Slurm commands, an hour of running", counted * 3600 / (time.monotonic() - began))


def bare_floor(directory: Path) -> float:
    """Seconds from sbatch to the first instruction of a job that does nothing else."""
    stamp = directory / "stamp"
    stamp.unlink(missing_ok=True)
    began = time.time()
    command = ["sbatch", "--parsable", "--wait", "--output=/dev/null", f"--wrap=date +%s.%N > {stamp}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return float(stamp.read_text()) - began


def launcher_pid(jobid: str) -> int:
    """The process id of a job's launcher, which runs on this machine."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        in_job = (process.info["environ"] or {}).get("SLURM_JOB_ID") == jobid
        # The launcher's guard has the same command line, but is its child.
        if in_job and "-I" in (process.info["cmdline"] or []) and "-I" not in process.parent().cmdline():
            return int(process.pid)
    raise RuntimeError(f"no launcher of job {jobid}")


def start_time(pid: int) -> float:
    """The start time of a process in seconds since the epoch, with a resolution of 10 ms (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)


def wait_until_free(jobid: str) -> None:
    """Wait until squeue no longer lists the job."""
    while subprocess.run(["squeue", "-h", "-j", jobid], capture_output=True, text=True).stdout.strip():
        time.sleep(0.01)


async def bench_traffic(table: Table, specs: dict[str, str], runs: int) -> None:
    """100 MB of output, and an interrupt during a flood of output."""
    for _run in range(runs):
        for kind, name in specs.items():
            async with running(name) as kernel:
                await measure_traffic(table, kind, kernel)
    for what, unit, scale in (
        ("100 MB stream", "s", 1),
        ("100 MB display", "s", 1),
        ("interrupt under flood", "ms", 1e3),
    ):
        for kind in specs:
            reference = {"direct": "local", "tunnel": "direct"}.get(kind)
            table.row(f"{what}, {kind}", unit, reference=f"{what}, {reference}" if reference else None, scale=scale)


async def measure_traffic(table: Table, kind: str, kernel: Kernel) -> None:
    """Measure the traffic of one kernel."""
    await kernel.run("1")
    for what, code in (("stream", STREAM), ("display", DISPLAY)):
        size, seconds = await kernel.run(code)
        assert size >= 99_000_000, size
        table.add(f"100 MB {what}, {kind}", seconds)
    # Another process reads the flood, as a browser does, so that its work is not measured.
    reader = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.reader", kernel.manager.connection_file, FLOOD, stdout=asyncio.subprocess.PIPE
    )
    assert reader.stdout is not None
    await reader.stdout.readline()  # the reader has received part of the flood
    began = time.time()
    await kernel.manager.interrupt_kernel()
    await reader.wait()
    # Rarely the interrupt hits ipykernel's own code, and the cell does not record it.
    interrupted = float(await kernel.evaluate("globals().get('interrupted', 0)"))
    if interrupted > began:
        table.add(f"interrupt under flood, {kind}", interrupted - began)


async def bench_stalls(table: Table, specs: dict[str, str], runs: int) -> None:
    """The longest stall of the caller's event loop while a kernel starts and stops."""
    for _run in range(runs):
        for kind, name in specs.items():
            ticker = Ticker()
            manager = harness.AsyncKernelManager(kernel_name=name)
            await manager.start_kernel()
            await manager.shutdown_kernel()
            table.add(f"longest stall, {kind}", await ticker.stop())
    for kind in specs:
        table.row(f"longest stall, {kind}", "ms", scale=1e3)


async def bench(directory: Path, cluster: PrivateCluster, runs: int, only: str) -> None:
    """Run all parts, or the part ``only``, in one session."""
    table = Table()
    await warm_up(directory)
    async with running(write_kernelspec(directory, "holder", connect="tunnel")) as holder:
        jobid = holder.provisioner.jobid
        specs = {"local": write_kernelspec(directory, "local")}
        specs |= {mode: write_kernelspec(directory, mode, jobid=jobid, connect=mode) for mode in MODES}
        for name, measure in (("stalls", bench_stalls), ("starts", bench_starts), ("traffic", bench_traffic)):
            if only in ("", name):
                await measure(table, specs, runs)
        if only in ("", "traffic"):
            await bench_round_trips(table, specs, runs)
    if only in ("", "allocations"):
        await bench_new_allocations(table, directory, runs)
    if only in ("", "ways"):
        await bench_ways(table, directory, cluster, runs)
    if only in ("", "ssh"):
        await bench_ssh(table, directory, runs)
    if only in ("", "gateway"):
        await bench_gateway(table, directory, runs)
    if only in ("", "restart"):
        await bench_restart(table, directory, runs)


async def bench_round_trips(table: Table, specs: dict[str, str], runs: int) -> None:
    """Round trips of kernels that run at the same time and alternate, so that noise affects all of them."""
    kernels = {kind: (await start(name))[0] for kind, name in specs.items()}
    for kernel in kernels.values():
        await kernel.subscribe()
    for _run in range(max(runs, 7) * 3):
        for kind, kernel in kernels.items():
            began = time.perf_counter()
            for _ in range(50):
                await kernel.run("1")
            table.add(f"round trip, {kind}", (time.perf_counter() - began) / 50)
    for kernel in kernels.values():
        await stop(kernel)
    table.row("round trip, local", "ms", scale=1e3)
    table.row("round trip, direct", "ms", reference="round trip, local", scale=1e3)
    table.row("round trip, tunnel", "ms", reference="round trip, direct", scale=1e3)


async def warm_up(directory: Path) -> None:
    """Start kernels once, so that the first measured start loads nothing new."""
    async with running(write_kernelspec(directory, "warm-up", connect="tunnel")):
        pass
    async with running(write_kernelspec(directory, "local")):
        pass


def main() -> None:
    """Start a private cluster, measure, and remove the cluster."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="runs of each measurement (default: 7)")
    parts = ["stalls", "starts", "traffic", "allocations", "ways", "ssh", "gateway", "restart"]
    parser.add_argument("--only", choices=parts, default="", help="run one part only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gsb-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)  # slurmrestd runs as another user
        harness.environment(directory)
        with PrivateCluster(directory / "slurm", rest=True) as cluster:
            os.environ.update(cluster.environment())
            try:
                asyncio.run(bench(directory, cluster, arguments.runs, arguments.only))
            finally:
                SlurmService.instance().close()


if __name__ == "__main__":
    main()
