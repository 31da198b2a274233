"""What the server's answers should be: transformers' own generation, in this process, from the same directory."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import q_nn
from demo.serving import Answers


class Oracle:
    """A saved model in float32, behind transformers' ``generate``.

    Args:
        directory: what the server serves.
        device: where the server computes.
        max_tokens: tokens of an answer.
    """

    def __init__(self, directory: Path, device: torch.device, *, max_tokens: int) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        self.model = LlamaForCausalLM(LlamaConfig.from_pretrained(directory)).float().eval()
        q_nn.load_into(self.model, directory)
        self.model.to(device)
        self.max_tokens = max_tokens

    def completion(self, prompt: str) -> str:
        """The greedy completion of a prompt."""
        return self._generate(self.tokenizer(prompt, return_tensors="pt"))

    def chat(self, prompt: str) -> str:
        """The greedy answer to a user's message."""
        messages = [{"role": "user", "content": prompt}]
        return self._generate(
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        )

    @torch.inference_mode()
    def _generate(self, inputs: BatchEncoding) -> str:
        inputs = inputs.to(self.model.device)
        tokens = self.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=self.max_tokens, do_sample=False
        )
        return str(self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def differing_answers(answers: Answers, oracle: Oracle, prompts: list[str]) -> list[str]:
    """Which of the server's greedy answers are not transformers' own, in words."""
    expected = [oracle.completion(prompt) for prompt in tqdm(prompts, desc="asked transformers", unit="request")]
    compared = [
        ("the completion", answers.completion, expected[0]),
        ("the streamed completion", answers.streamed, expected[0]),
        ("the chat completion", answers.chat, oracle.chat(prompts[0])),
    ]
    for number, (alone, together, right) in enumerate(zip(answers.alone, answers.together, expected, strict=True), 1):
        compared += [
            (f"completion {number}, asked alone,", alone, right),
            (f"completion {number}, asked together,", together, right),
        ]
    return [f"serve: {what} is {got!r}, expected {right!r}" for what, got, right in compared if got != right]
