"""Counts as tables, figures and messages have them."""


def chunks_in_words(count: int) -> str:
    """`1 chunk`, `4 chunks`."""
    return f"{count} chunk{'' if count == 1 else 's'}"
