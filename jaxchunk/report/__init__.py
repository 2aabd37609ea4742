"""Training runs compared, from what they wrote: a table, and a page that opens offline."""

from jaxchunk.report.comparison import comparison_table
from jaxchunk.report.page import write_report
from jaxchunk.report.run_records import RunRecords, read_runs

__all__ = ["RunRecords", "comparison_table", "read_runs", "write_report"]
