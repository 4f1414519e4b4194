"""A saved folder, measured by lm_eval's own command line."""

import json

import pytest
import torch

from nla.models.base import LanguageModel
from tests import forked
from tests.test_saved import saved


def test_lm_eval_finds_the_likelihoods_of_the_model_in_memory(tmp_path):
    model, folder = saved("tiny_llama", tmp_path)
    (tmp_path / "questions.jsonl").write_text(json.dumps({"q": "Bees make", "c": ["honey", "wool"], "a": 0}) + "\n")
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(tmp_path / "questions.jsonl") + "\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: c\ndoc_to_target: a\n"
    )
    asked = ["--model", "hf", "--model_args", f"pretrained={folder}", "--device", "cpu", "--batch_size", "1", "--log_samples"]
    asked += ["--tasks", "own", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
    result = forked.finish(["-m", "nla.lm_eval", "run", *asked], {"HF_HOME": str(tmp_path / "hf")})
    assert result.returncode == 0, result.stderr[-2000:]
    (samples,) = tmp_path.glob("results/**/samples_own_*.jsonl")
    found = [float(likelihood) for likelihood, _ in json.loads(samples.read_text())["filtered_resps"]]
    right = [log_likelihood(model, "Bees make", choice) for choice in (" honey", " wool")]
    assert found == pytest.approx(right, rel=1e-5)
    (file,) = tmp_path.glob("results/**/results_*.json")
    assert json.loads(file.read_text())["results"]["own"]["acc,none"] == float(right[0] > right[1])


@torch.no_grad()
def log_likelihood(model: LanguageModel, context: str, text: str) -> float:
    """The logarithm of the probability that the model goes on with this text."""
    tokens, begun = (torch.tensor([model.tokenizer(words)["input_ids"]]) for words in (context + text, context))
    chances = model.module(tokens[:, :-1]).logits.log_softmax(-1)
    return float(chances.gather(-1, tokens[:, 1:, None])[:, begun.shape[1] - 1 :].sum())
