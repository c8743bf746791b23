"""The formats that a search for a policy tries where it is given none, smallest first."""

# One a size: of the 4-bit formats, nf4 has the least error on weights that are normally distributed.
SEARCHED = ("nf4-dq", "nf4", "int8-weight-only")
