"""Small models that the harness trains itself, once."""
