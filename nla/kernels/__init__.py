"""Kernels: the formulas by which triplets (A, B, mu) define a matrix. One file per kernel; `conf/kernel/` names them."""
