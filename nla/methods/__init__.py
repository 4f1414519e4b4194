"""Compression methods: they fit terms to weight matrices within a budget. `conf/method/` names them."""
