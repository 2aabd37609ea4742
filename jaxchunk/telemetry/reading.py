"""One answer of a device: what the sampler makes, the tracks take in, and files keep."""

import dataclasses

from jaxchunk.telemetry.device import Value


@dataclasses.dataclass(frozen=True)
class Reading:
    """One answer of a device, or the failure to give one.

    Attributes:
      call: a name of `device.CALLS`; "sample" for power, clock and temperature together; "rail:" and a rail's name;
        "counter_pause" where the sampler decides to read the energy counter less often, `value` seconds apart.
      start_s: when it was asked.
      end_s: when the answer was there.
      value: the answer, None where there was none. Of "power_samples_w" those that are new, by the sampler's clock.
      error: why there was none.
    """

    call: str
    start_s: float
    end_s: float
    value: Value | None
    error: str | None = None
