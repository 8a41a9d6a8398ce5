"""Ranks, meshes and messages: everything that touches MPI, and nothing that knows mathematics."""
