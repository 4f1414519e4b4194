"""Compression methods: what turns one weight matrix and a budget into terms. `conf/method/` names them."""
