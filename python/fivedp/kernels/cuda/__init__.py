"""One rank's arithmetic on a GPU: CuPy arrays in, CuPy arrays out, on the current stream.

The functions start kernels and return; nothing waits. Their names and meanings are those of the CPU's kernels where
there are such; one file for each family. `fivedp._cuda` is optional: without it CuPy's own functions do what they can.
"""
