"""`python -m nla.lm_eval ...`: the command `lm_eval ...`, whose `--model hf` also loads compressed folders."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
