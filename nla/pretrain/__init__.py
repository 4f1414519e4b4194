"""Small models that the harness trains on first use and keeps in the cache."""
