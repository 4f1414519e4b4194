"""Datasets of the hub, or this machine's copies of them."""

from pathlib import Path
from typing import Any

from nla.machine.errors import UserError


def refusal(dataset: str) -> str:
    """The reason why neither this machine nor the hub has the dataset, or "". Waits for the hub for 2 seconds at most."""
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if (Path(config.HF_DATASETS_CACHE) / dataset.replace("/", "___")).is_dir():
        return ""
    try:
        HfApi().dataset_info(dataset, timeout=2)
    except RepositoryNotFoundError:
        return "the hub has no dataset of this name"
    except Exception:  # the client's transport errors are not part of its interface
        return "the hub does not answer"
    return ""


def fetched(dataset: str, subset: str | None = None, *, setting: str, remedy: str, **options: Any) -> Any:
    """The rows of a split, as `datasets.load_dataset` gives them.

    Args:
        setting: what the user asked for, for the error: `data=wikitext2`.
        remedy: what the user can do instead.

    Raises:
        UserError: the dataset cannot be had.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    reason = refusal(dataset)
    if not reason:
        try:
            return load_dataset(dataset, subset, **options)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            reason = str(error).splitlines()[0]
    raise UserError(f"{setting} could not be fetched from the hub ({reason}); {remedy}")
