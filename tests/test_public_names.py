"""What `import fivedp` offers: every name is there, loaded when it is first asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fivedp


@pytest.mark.parametrize("name", fivedp.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(fivedp, name)
    assert name == "__version__" or value.__doc__


def test_the_layer_of_experts_is_an_operation_whatever_has_been_imported() -> None:
    program = """
import fivedp
assert callable(fivedp.ops.expert_layer)
from fivedp.bench.trials import moe
assert fivedp.ops.expert_layer is fivedp.expert_layer
assert fivedp.ops.expert_layer_backward is fivedp.expert_layer_backward
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sharded_matmull'"):
        _ = fivedp.sharded_matmull
    with pytest.raises(AttributeError, match=r"fivedp\.ops.*no attribute 'expert_layr'"):
        _ = fivedp.ops.expert_layr
