"""The stages of a run. `nla/pipeline.py` calls them in order."""
