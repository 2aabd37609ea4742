"""What is measured: the workloads, the same ones of others, and their tables and figures."""
