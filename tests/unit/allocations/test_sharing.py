"""Which allocation a kernel may join: the rules and their explanation. The choice is always the same."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm.allocations.sharing import Offer, choose, misfit
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.formats import memory_in_mebibytes

ASKED = KernelRequest(
    project="p", partition="batch", nodes=1, runtime=30, kernel_argv=("k",), gpus=1, cpus=2, memory="2G", share=True
)


def offer(jobid: str = "12", *, minutes_left: float | None = 30, account: str = "acc", kernels: int = 1, **fields):
    """An allocation for ASKED, with these fields changed."""
    left = None if minutes_left is None else 60 * minutes_left
    request = replace(ASKED, **fields)
    return Offer(jobid=jobid, request=request, account=account, seconds_left=left, kernels=kernels)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"nodes": 4, "gpus": 2, "cpus": 8, "memory": "64G"}, ""),
        ({"minutes_left": 16}, ""),
        ({"minutes_left": None}, ""),
        ({"partition": "gpu"}, "partition is gpu, not batch"),
        ({"reservation": "course"}, "reservation is course, not None"),
        ({"qos": "long"}, "qos is long, not None"),
        ({"constraint": "a100"}, "constraint is a100, not None"),
        ({"account": "other"}, "account is other, not acc"),
        ({"gpus": 0}, "gpus: 0 of 1"),
        ({"cpus": 1}, "cpus: 1 of 2"),
        ({"memory": "1500"}, "memory (MiB): 1500 of 2048"),
        ({"minutes_left": 10}, "10 min left, 30 min asked for"),
    ],
)
def test_an_allocation_fits_or_there_is_a_reason(fields, reason):
    """Same partition, account, reservation, QOS and constraint, resources at least those asked for, time enough."""
    assert misfit(ASKED, "acc", offer(**fields)) == reason


def test_other_generic_resources_must_be_there_too():
    """A kernel that requests a licence or shard does not join a job without it."""
    assert misfit(replace(ASKED, gres="shard:1"), "acc", offer()) == "no shard:1"
    assert misfit(replace(ASKED, gres="shard:1"), "acc", offer(gres="shard:1")) == ""


def test_the_allocation_with_the_least_to_spare_is_taken():
    """GPUs are kept for requests that need them, then nodes, CPUs and memory."""
    offers = [offer("1", gpus=2), offer("2", nodes=2), offer("3", cpus=8), offer("4", memory="8G")]
    best, lines = choose(ASKED, "acc", offers)
    assert best is not None
    assert best.jobid == "4"
    assert lines == ["job 4 fits best of 4"]


def test_an_offer_that_does_not_fit_is_explained():
    """The log explains each allocation that was passed over."""
    best, lines = choose(ASKED, "acc", [offer("7", gpus=0), offer("8", account="x")])
    assert best is None
    assert lines == ["job 7 does not fit: gpus: 0 of 1", "job 8 does not fit: account is x, not acc"]


offers = st.lists(
    st.builds(
        lambda jobid, gpus, kernels, left: offer(str(jobid), gpus=gpus, kernels=kernels, minutes_left=left),
        st.integers(1, 10**6),
        st.integers(0, 3),
        st.integers(0, 3),
        st.sampled_from([None, 5, 30, 60]),
    ),
    max_size=6,
    unique_by=lambda one: one.jobid,
)


@given(offers, st.randoms(use_true_random=False))
def test_the_choice_depends_on_nothing_but_the_offers(many, rng: random.Random):
    """Their order does not matter."""
    shuffled = list(many)
    rng.shuffle(shuffled)
    assert choose(ASKED, "acc", many)[0] == choose(ASKED, "acc", shuffled)[0]


@pytest.mark.parametrize(
    ("text", "mebibytes"),
    [(None, 0), ("500", 500), ("500M", 500), ("2G", 2048), ("1T", 1048576), ("1K", 1), ("2gb", 2048)],
)
def test_memory_is_compared_in_mebibytes(text, mebibytes):
    """Slurm's units, as sbatch reads them."""
    assert memory_in_mebibytes(text) == mebibytes
