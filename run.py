"""Compress a model and measure it: `python run.py --help`."""

import os
import sys

import hydra
from omegaconf import DictConfig

from nla import jobs


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    jobs.attempt(cfg)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors arrive below, and are told in words
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues from here")
    except Exception as error:
        jobs.refuse(error)
    except SystemExit as stopped:
        if stopped.code:
            jobs.explain_unknown_keys(sys.argv[1:])
        raise
    sys.exit(jobs.exit_code())
