"""Reports on this device: what can be measured, what chunking does, how fast the LM head is, a short training pair.

One command, for owners of a device that we do not have (a DGX Spark first of all). Everything goes into one directory
and one archive with a summary page, to be sent. An interrupted report goes on with the same `--out_dir`.
"""

import logging

import tyro

from jaxchunk.bench import device_report
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    config = tyro.cli(device_report.DeviceReportConfig, description=__doc__, use_underscores=True)
    with reported_errors():
        device_report.run(config)


if __name__ == "__main__":
    main()
