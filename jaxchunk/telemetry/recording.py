"""Every reading of a run in a file, and windows from that file, later, without the device."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxchunk.errors import InputError
from jaxchunk.telemetry.device import PowerSamples, Probe
from jaxchunk.telemetry.reading import Reading
from jaxchunk.telemetry.tracks import RailKind

_FORMAT = 1
_FLUSH_S = 1.0
_READING_KEYS = {field.name for field in dataclasses.fields(Reading)}


@dataclasses.dataclass(frozen=True)
class Header:
    """What has to be known to understand the readings: the first line of a recording.

    Attributes:
      device: what `Device.describe` said, or None where there was no device.
      reason_if_none: why there was none.
      probes: how each call was answered the first time.
      rails: the host's meters.
      poll_period_s: as given to the monitor.
      sample_period_s: likewise.
    """

    device: dict[str, Any] | None
    reason_if_none: str
    probes: Mapping[str, Probe]
    rails: Sequence[RailKind]
    poll_period_s: float
    sample_period_s: float


class RecordingFile:
    """A recording being written: JSON lines, the header first. A kill loses a second at most."""

    name = "recording"

    def __init__(self, path: Path | str, header: Header):
        """Creates the file.

        Raises:
          InputError: it cannot be written.
        """
        try:
            self._file: IO[str] = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise InputError(f"cannot write the recording {path}: {error.strerror}") from error
        self._write({"jaxchunk_recording": _FORMAT, **dataclasses.asdict(header)})
        self._flushed_s = -math.inf

    def add(self, reading: Reading) -> None:
        """Adds a line. Raises OSError where the disk refuses."""
        self._write({key: value for key, value in dataclasses.asdict(reading).items() if value is not None})
        if reading.end_s - self._flushed_s >= _FLUSH_S:
            self._file.flush()
            self._flushed_s = reading.end_s

    def close(self) -> None:
        """Writes what is buffered and closes the file. Raises OSError where the disk refuses."""
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")


def read_recording(path: Path | str) -> tuple[Header, Iterator[Reading]]:
    """The header and the readings of a recording, up to the first line that is not whole.

    Raises:
      InputError: the file cannot be read or is no recording.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the recording {path}: {error.strerror}") from error
    records = _whole(lines)
    first = next(records, {})
    if first.pop("jaxchunk_recording", None) != _FORMAT:
        raise InputError(f"{path} is no recording of jaxchunk's telemetry (format {_FORMAT})")
    try:
        first["probes"] = {call: Probe(**probe) for call, probe in first["probes"].items()}
        first["rails"] = [RailKind(**rail) for rail in first["rails"]]
        return Header(**first), _readings(records)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is a recording with a header that is not whole ({error})") from error


def _readings(records: Iterator[dict[str, Any]]) -> Iterator[Reading]:
    for record in records:
        if not {"call", "start_s", "end_s"} <= record.keys() <= _READING_KEYS:
            return
        if isinstance(value := record.get("value"), list):
            record["value"] = PowerSamples(value[0], [(time_s, power_w) for time_s, power_w in value[1]])
        yield Reading(**({"value": None} | record))


def _whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(record, dict):
            return
        yield record
