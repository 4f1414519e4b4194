"""Compress a model and measure it: `python run.py --help`."""

import faulthandler
import os
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from nla import jobs
from nla.harness.help import listed_options
from nla.harness.unknown_settings import check_arguments
from nla.machine.ending import Stopped, leave, stoppable


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    jobs.attempt(cfg)


if __name__ == "__main__":
    faulthandler.enable()  # a crash of compiled code says in which line
    OmegaConf.register_new_resolver("listed_options", listed_options)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors arrive below, and are told in words
    try:
        with stoppable():
            check_arguments(sys.argv[1:])
            main()
    except Stopped as stopped:
        jobs.show_table()
        print(f"{stopped}; the same command continues from here", file=sys.stderr)
        leave(stopped)
    except Exception as error:
        jobs.refuse(error)
    except SystemExit:
        jobs.show_table()
        raise
    jobs.show_table()
    sys.exit(jobs.exit_code())
