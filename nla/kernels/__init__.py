"""Kernels: how triplets make a matrix. One file per kernel; `conf/kernel/` names them."""
