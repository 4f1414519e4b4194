"""A small language model and its tokeniser, which the harness trains on first use. They need no download of weights."""

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError, require_integer
from nla.machine.provenance import code_digest, computing_packages
from nla.machine.sealed_folder import sealed_folder
from nla.machine.seeds import seed_of
from nla.models.base import LanguageModel, Sample
from nla.models.causal_lm import CausalLM, from_architecture, load_pretrained
from nla.training.loop import Recipe, train
from nla.training.parameters import whole_model
from tasks.data.base import training_set
from tasks.data.text import Text

log = logging.getLogger(__name__)

MICRO_BATCH = 2  # windows of one worker: fixed, because the sum of gradients must not depend on the number of workers
END = "</s>"


class MicroLanguageModel(CausalLM):
    """A model of any transformers architecture, trained on first use and kept in the cache.

    Args:
        name: shown in messages, and part of the folder's name.
        training: a node of conf/data. The model and its tokeniser (a byte-level BPE) are trained on the training split of
            its text.
        weights_seed: seed of the initial weights and of the batches.
        batch: windows per step, each as long as the model can read. Micro-batches of 2 have equal weights, so it is a multiple.
        recipe: steps, lr, warmup, weight_decay, clip as in `nla.training.loop.Recipe`.
        dtype: the run's default type, which the configuration reads; not used here.
        architecture: a transformers configuration. The tokeniser has `vocab_size` tokens.
    """

    def __init__(
        self,
        name: str,
        training: dict[str, Any],
        weights_seed: int,
        batch: int,
        recipe: dict[str, Any],
        dtype: str,
        architecture: dict[str, Any],
    ) -> None:
        require_integer("model.batch", batch, 1)
        if batch > MICRO_BATCH and batch % MICRO_BATCH:
            raise UserError(f"model.batch={batch} must be a multiple of {MICRO_BATCH}, so that all windows count alike")
        require_integer("model.weights_seed", weights_seed, 0)
        self.training: Text = training_set("model.training", training, "text")
        self.name, self.weights_seed, self.batch = name, weights_seed, batch
        self.recipe, self.architecture = Recipe(**recipe), dict(architecture)

    def configuration(self, cache: Cache) -> dict[str, Any]:
        return self.architecture

    def identity(self, cache: Cache) -> str:
        return self.training.identity(cache)

    def check(self, dtype: str, cache: Cache) -> None:
        self.training.check()

    def load(self, device: str, dtype: str, cache: Cache) -> LanguageModel:
        return load_pretrained(str(self.folder(cache)), device, dtype)

    def folder(self, cache: Cache) -> Path:
        """Folder with the trained model and its tokeniser. The first call trains them, on the CPU."""
        text = self.training.joined()
        made_from = {
            "architecture": self.architecture,
            "recipe": [vars(self.recipe), self.batch, MICRO_BATCH],
            "text": digest(text),
            "seed": self.weights_seed,
            "code": code_digest(__name__, type(self.training).__module__),
            "packages": computing_packages() | {"tokenizers": version("tokenizers")},
        }
        key = digest(made_from)

        def make(folder: Path, scratch: Path) -> None:
            log.info("training %s on %s, once (%d steps)", self.name, self.training.name, self.recipe.steps)
            tokenizer = learn_tokenizer(text, self.architecture["vocab_size"])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.weights_seed)
                model = LanguageModel(from_architecture(self.architecture).eval(), tokenizer)
            batches = self.batches(model.encode(text))
            train(whole_model(model.module), model.loss, batches, self.recipe, cache, key, f"training {self.name}")
            model.module.save_pretrained(folder)  # type: ignore[operator]
            tokenizer.save_pretrained(folder)

        made = sealed_folder(cache, "models", f"{self.name}-{key[:16]}", make)
        cache.remove("trainings", key)  # the checkpoint of the training, which is finished
        return made

    def batches(self, tokens: Tensor) -> Callable[[int], list[Sample]]:
        """A function: step -> its micro-batches, random windows of the text that depend on the seed and the step alone."""
        window = self.architecture["max_position_embeddings"]

        def batch(step: int) -> list[Sample]:
            generator = torch.Generator().manual_seed(seed_of(self.weights_seed, step))
            begins = torch.randint(len(tokens) - window + 1, (self.batch,), generator=generator)
            windows = tokens[begins[:, None] + torch.arange(window)]
            return [Sample(part, part) for part in windows.split(MICRO_BATCH)]

        return batch


def learn_tokenizer(text: str, vocabulary: int) -> Any:
    """A byte-level BPE tokeniser with `vocabulary` tokens. END ends a text, and also begins generation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
