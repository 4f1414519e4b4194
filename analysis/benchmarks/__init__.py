"""`python -m analysis.benchmarks.<name>`: measurements that no run makes."""
