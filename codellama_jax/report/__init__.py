"""What a whole run earned. In reading order:

results   the values, and the sentences that follow from them
tables    losses and infilling as tables
plots     the same as pictures
page      report.md with its pictures, and the short form for a terminal
"""

from codellama_jax.report.page import show, write

__all__ = ["show", "write"]
