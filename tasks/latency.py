"""Seconds of a model's answers: reading a prompt, and writing token by token; beside the dense model of the same shape."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nla.compressed.contents import matrix_terms
from nla.compressed.inference import optimise_for_inference
from nla.compressed.surgery import copy_with_same_tensors, merge
from nla.machine.cache import Cache
from nla.machine.errors import UserError, require_integer
from nla.machine.peak_memory import PeakMemory
from nla.machine.timing import in_turns, quartiles_of_ratio, quartiles_of_timings
from nla.models.base import Inventory, LanguageModel, Model
from tasks.base import Figures, Task, require_same_kind, resident_bytes
from tasks.data import SETS
from tasks.data.base import Data
from tasks.works import Work, decoding, parameter_bytes, reading_images, reading_prompt


@dataclass(frozen=True)
class Scenario:
    """What is timed, under its name on the record.

    Attributes:
        inputs: token ids (batch, tokens) or images (batch, channels, height, width).
        begin: module, inputs -> the work.
        items: tokens or images that the work computes.
        unit: `tokens` or `images`.
    """

    name: str
    inputs: Tensor
    begin: Callable[[nn.Module, Tensor], Work]
    items: int
    unit: str


class Latency(Task):
    """Tokens (or images) per second, time to the first token, peak memory and bytes read per token, without gradients.

    A compressed model is measured in its form for inference (see `optimise_for_inference`). In turns with it, the same process
    measures the dense model with the same matrices, so that a drift of the machine's speed affects both. No figure is taken
    from the cache.

    Args:
        data: text or images, from which inputs are drawn; None if the chosen data is neither.
        prompts: lengths (tokens) of the prompts that are read; batch 1.
        context: tokens in the KV cache while tokens are written.
        batches: texts that are written, or images that are read, at once.
        rounds: turns of the compressed and the dense model.
        seconds: of measuring in each turn, at least.
        compile: run the models through torch.compile, with dynamic shapes.
        seed: of the inputs.
    """

    name = "latency"

    def __init__(
        self,
        data: Data | None,
        prompts: Sequence[int],
        context: int,
        batches: Sequence[int],
        rounds: int,
        seconds: float,
        compile: bool,
        seed: int,
    ) -> None:
        if data is None:
            raise UserError(f"task=latency needs text or images: data={SETS['text']}, or data={SETS['images']}")
        for setting, values in (("prompts", prompts), ("batches", batches)):
            if not isinstance(values, list | tuple) or not values:
                raise UserError(f"task.{setting}={values} must be a list of whole numbers, such as [1,16]")
            for value in values:
                require_integer(f"task.{setting}", value, 1)
        for setting, value in (("context", context), ("rounds", rounds)):
            require_integer(f"task.{setting}", value, 1)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 3600:
            raise UserError(f"task.seconds={seconds} must be a number from 0 to 3600")
        if not isinstance(compile, bool):
            raise UserError(f"task.compile={compile} must be true or false")
        self.data, self.seed = data, seed
        self.prompts, self.batches, self.context = sorted(prompts), sorted(batches, reverse=True), context
        self.rounds, self.seconds, self.compile = rounds, float(seconds), compile

    def check(self, inventory: Inventory) -> None:
        require_same_kind(self.data, inventory)
        if inventory.reads == "text":
            for setting, length in (("prompts", max(self.prompts)), ("context", self.context + 1)):
                if length > inventory.limit:
                    raise UserError(
                        f"task.{setting} needs {length} tokens, and the model can read {inventory.limit}; give less"
                    )

    @torch.inference_mode()
    def evaluate(self, model: Model, cache: Cache, state: str, label: str) -> dict[str, Figures]:
        """{scenario: figures}; scenarios are prefill_<tokens> and decode_<batch>, or images_<batch>.

        <unit>_per_second; seconds (median of all timings; of a prefill: to the first token) and seconds_q25, seconds_q75
        (quartiles); timings; to_dense (seconds relative to dense, median over the rounds) and its quartiles; peak_bytes
        beside the weights; parameter_bytes_per_<unit>; resident_bytes of the model; and the same of the dense model with
        `dense_` before the name. Of a dense model alone: without to_dense.
        """
        modules = {"": model.module}
        if matrix_terms(model.module):
            modules = {"": copy_with_same_tensors(model.module), "dense_": copy_with_same_tensors(model.module)}
            optimise_for_inference(modules[""])
            merge(modules["dense_"])
        scenarios = self.scenarios(model)
        with tqdm(desc=label, total=len(scenarios) * self.rounds, unit="round", dynamic_ncols=True) as bar:
            return {scenario.name: self.measured(scenario, modules, bar) for scenario in scenarios}

    def scenarios(self, model: Model) -> list[Scenario]:
        """What is timed, the decode of the smallest batch last."""
        device = next(model.module.parameters()).device
        most = max(self.batches)
        if not isinstance(model, LanguageModel):
            images = torch.cat([sample.inputs for sample in self.data.samples(model, most, 1, self.seed)]).to(device)
            return [Scenario(f"images_{b}", images[:b], reading_images, b, "images") for b in self.batches]
        longest = self.data.samples(model, 1, max(self.prompts), self.seed)[0].inputs.to(device)
        context = torch.cat([s.inputs for s in self.data.samples(model, most, self.context, self.seed)]).to(device)
        read = [Scenario(f"prefill_{n}", longest[:, :n], reading_prompt, n, "tokens") for n in self.prompts]
        return [*read, *(Scenario(f"decode_{b}", context[:b], decoding, b, "tokens") for b in self.batches)]

    def measured(self, scenario: Scenario, modules: dict[str, nn.Module], bar: tqdm) -> Figures:
        works = {who: scenario.begin(module, scenario.inputs) for who, module in modules.items()}
        peaks = {who: peak_bytes(work, scenario.inputs.device) for who, work in works.items()}
        if self.compile:
            compiled: dict[str, Any] = {who: torch.compile(module, dynamic=True) for who, module in modules.items()}
            works = {who: scenario.begin(module, scenario.inputs) for who, module in compiled.items()}
            for work in works.values():
                work()
        times = in_turns(works, counted(self.rounds, bar), self.seconds)
        found: Figures = {}
        for who, module in modules.items():
            low, middle, high = quartiles_of_timings(times[who])
            found |= {
                f"{who}{scenario.unit}_per_second": scenario.items / middle,
                f"{who}seconds": middle,
                f"{who}seconds_q25": low,
                f"{who}seconds_q75": high,
                f"{who}timings": sum(map(len, times[who])),
                f"{who}peak_bytes": peaks[who],
                f"{who}parameter_bytes_per_{scenario.unit.removesuffix('s')}": parameter_bytes(module) / scenario.items,
                f"{who}resident_bytes": resident_bytes(module),
            }
        if "dense_" in times:
            low, middle, high = quartiles_of_ratio(times[""], times["dense_"])
            found |= {"to_dense": middle, "to_dense_q25": low, "to_dense_q75": high}
        return found


def counted(rounds: int, bar: tqdm) -> Iterator[int]:
    """The rounds; the bar moves after each."""
    for i in range(rounds):
        yield i
        bar.update()


def peak_bytes(work: Work, device: torch.device) -> int:
    """Peak memory of one pass beside what is there before it. torch.compile is not used in it."""
    with PeakMemory(device) as memory:
        work()
    return memory.peak_bytes
