"""Compress a model and measure it: `python run.py --help`."""

import sys

import hydra
from omegaconf import DictConfig

from nla import jobs as sweep


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    sweep.attempt(cfg)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    except SystemExit as stopped:
        if stopped.code:
            sweep.explain_unknown_keys(sys.argv[1:])
        raise
    sys.exit(sweep.exit_code())
