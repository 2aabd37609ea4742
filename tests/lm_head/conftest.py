"""What the fused implementation says that it cannot do is skipped, with the reason; anything else fails."""

from collections.abc import Generator

import pytest

from jaxchunk.lm_head.dispatch import FUSED


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    implementation = pyfuncitem.callspec.params.get("implementation") if hasattr(pyfuncitem, "callspec") else None
    refusal = f"implementation={implementation!r} cannot run: "
    try:
        return (yield)
    except ValueError as error:
        if implementation in FUSED and str(error).startswith(refusal):
            pytest.skip(str(error).removeprefix(refusal).split(";")[0])
        raise
