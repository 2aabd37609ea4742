"""How everything is measured here: interleaved windows from a common temperature, intervals, records that survive."""
