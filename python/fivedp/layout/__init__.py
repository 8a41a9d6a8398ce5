"""Specs, shares and plans: pure functions that say which bytes go where, without MPI and without arrays."""
