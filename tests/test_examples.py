"""The examples as people run them: in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name):
    """What the example printed; fails if it does, or if it prints a warning (or anything else) on stderr."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("name", "package"), [("plain_pytrees.py", "jax"), ("flax_nnx.py", "flax"), ("equinox_module.py", "equinox")]
)
def test_trains(name, package):
    pytest.importorskip(package, reason=f"{name} needs {package}, which is not installed")
    printed = run_example(name)
    (first_loss, first_accuracy), (last_loss, last_accuracy) = (
        map(float, match) for match in re.findall(r"loss ([\d.]+), accuracy ([\d.]+)%", printed)
    )
    assert 5 < first_loss < 6.5  # log(256) is 5.5
    assert last_loss < first_loss / 2
    assert last_accuracy > max(20, 2 * first_accuracy)


def test_sharded_agrees_with_one_device():
    printed = run_example("sharded.py")
    assert "mesh {'data': 4, 'model': 2}" in printed
    assert "loss and gradients agree with one device" in printed
    assert re.search(r"weight P\('model'.*hidden P\('data'", printed)


def test_a_routed_mlp_in_chunks_agrees_with_one_without():
    printed = run_example("moe_mlp.py")
    losses, temporaries = zip(*re.findall(r"loss ([\d.]+), (\d+) MiB", printed), strict=True)
    assert losses[0] == losses[1] and int(temporaries[1]) < int(temporaries[0]) / 3
    assert float(re.search(r"largest element: (\S+)", printed)[1]) < 1e-5


def test_every_example_is_run_and_listed():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"plain_pytrees.py", "flax_nnx.py", "equinox_module.py", "moe_mlp.py", "sharded.py"}
    assert all(f"({name})" in (EXAMPLES / "README.md").read_text() for name in names)


def test_the_readmes_loss_is_what_it_says():
    readme = (EXAMPLES.parent / "README.md").read_text()
    (program,) = re.findall(r"## The loss alone\n\n```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    exec(program, names)
    gradient = names["gradients"]["embedding"]
    assert f"# {names['value']:.2f}, and a {gradient.dtype} [V, D]" in program
    assert gradient.shape == (names["V"], names["D"])
