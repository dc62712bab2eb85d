"""The values that settings of kernels' processes may have."""

from __future__ import annotations

import pytest
from traitlets import TraitError

from gateway_slurm.config import ServiceSettings


@pytest.mark.parametrize(
    ("setting", "value", "taken"),
    [
        ("umask", "0027", "0027"),
        ("umask", "007", "007"),
        ("umask", "", ""),
        ("umask", "0o22", None),
        ("umask", "1022", None),
        ("umask", 22, None),
        ("propagate", "nofile,MEMLOCK", "NOFILE,MEMLOCK"),
        ("propagate", "all", "ALL"),
        ("propagate", "", None),
        ("propagate", "NONE,NOFILE", None),
        ("propagate", "NOFILE --wrap=x", None),
    ],
)
def test_a_wrong_value_is_refused_with_the_settings_name(setting, value, taken):
    """A umask is three octal digits; limits have the names of sbatch(1), in any case."""
    if taken is None:
        with pytest.raises(TraitError, match=f"SlurmService.{setting} must be"):
            ServiceSettings(**{setting: value})
    else:
        assert getattr(ServiceSettings(**{setting: value}), setting) == taken
