"""Attention kernels, their plain definitions and the tile lists they read.

`reference` says what is computed; `tiles` holds the lists that say which tiles are visited;
`block_sparse` is the Triton kernel. Import the modules: nothing is loaded here, because Triton must
not be imported before it is needed.
"""
