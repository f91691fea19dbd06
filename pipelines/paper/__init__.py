"""`s2t paper`: every table and figure of the paper for one recipe, from the runs that a matrix names."""
