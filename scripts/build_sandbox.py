"""Make the sandbox's files: scored data, tokenizer, and the tiny pretrained model.

    python scripts/build_sandbox.py                    all of it, into the package (about half an hour on 2 cores)
    python scripts/build_sandbox.py --out F --steps 0  data and tokenizer alone, into F, in seconds

Data and tokenizer are the same, byte for byte, wherever they are made. Weights differ in their last bits
between machines.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlxpref import sandbox
from mlxpref.data.recipe import Recipe
from mlxpref.sandbox import examples

SEED = 0
SIZES = {"train": 4000, "valid": 400, "test": 400}
N_LISTS, K = 1000, 4

VOCABULARY = 768
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZER_TEXTS = 8000

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "dtype": "float32",
}
BATCH, POOL = 128, 16
"""Conversations of a step; steps whose conversations are sorted by length together."""
RATE, WARM_UP, LAST_RATE = 3e-3, 50, 1e-4
STEPS = 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=sandbox.FILES, help="folder to write (default: the package's)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"pretraining steps of {BATCH} conversations; 0: none")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_data(options.out)
    tokenizer = make_tokenizer()
    save_tokenizer(tokenizer, options.out / "model")
    if options.steps:
        pretrain(tokenizer, options.out / "model", options.steps)


def write_data(folder: Path) -> None:
    for split, n in SIZES.items():
        write_rows(folder / f"{split}.jsonl", examples.pairs(n, split, seed=SEED))
    write_rows(folder / "lists.jsonl", examples.lists(N_LISTS, K, "train", seed=SEED))


def write_rows(file: Path, rows: Iterable[examples.Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- tokenizer -------------------------------------------------------------------------------------


def conversations(seed: int) -> Iterator[tuple[str, str]]:
    """Rendered prompts and replies without end, as the chat template writes them."""
    rng = random.Random(f"conversations {seed}")
    while True:
        prompt, reply = examples.conversation(rng)
        turns = "".join(f"<|{message.role}|>{message.content}{END}" for message in prompt)
        yield f"{turns}<|assistant|>", f"{reply}{END}"


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE. The sentence that opens a goal is one token: the same text, read in one step."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sentences = [first_sentence(examples.OVERALL), first_sentence(examples.ATTRIBUTES)]
    stream = conversations(SEED)
    texts = ["".join(next(stream)) for _ in range(TOKENIZER_TEXTS)]
    for sentence in sentences:
        texts = [text.replace(sentence, "") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(sentence, normalized=False) for sentence in sentences])
    return tokenizer


def first_sentence(recipe: Recipe) -> str:
    return recipe.goal_text(recipe.top_goal).partition("\n")[0]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    ids = {"eos_token_id": tokenizer.token_to_id(END), "pad_token_id": tokenizer.token_to_id(PAD)}
    write_json(folder / "config.json", {**CONFIG, **ids, "vocab_size": tokenizer.get_vocab_size()})
    write_json(folder / "generation_config.json", ids)


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- pretraining -----------------------------------------------------------------------------------


def pretrain(tokenizer: Tokenizer, folder: Path, steps: int) -> None:
    """Learn to reply: cross-entropy of the replies' tokens, AdamW, warm-up and cosine."""
    from mlxpref import backends

    backends.get("mlx")  # a fast BLAS before mlx.core is imported
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.models.llama import Model, ModelArgs

    mx.set_cache_limit(2 << 30)  # the default on a CPU gives nearly all memory back between steps
    mx.random.seed(SEED)
    model = Model(ModelArgs.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    optimizer = optim.AdamW(RATE, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    step = make_step(model, optimizer)
    began, values = time.perf_counter(), []
    for at, batch in enumerate(batches(tokenizer, steps)):
        value = step(mx.array(rate(at, steps)), *map(mx.array, batch))
        mx.eval(value, model.state, optimizer.state)
        values.append(value.item())
        if (at + 1) % 50 == 0:
            mean, seconds = np.mean(values[-50:]), time.perf_counter() - began
            print(f"step {at + 1}/{steps}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
    weights = dict(sorted(flat(model.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def make_step(model, optimizer):
    """One compiled update: (rate, *batch) -> loss, nats a token."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    def loss(inputs, places, targets, weights):
        hidden = model.model(inputs).reshape(-1, CONFIG["hidden_size"])[places]
        losses = nn.losses.cross_entropy(model.model.embed_tokens.as_linear(hidden), targets)
        return (losses * weights).sum() / weights.sum()

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(rate, *batch):
        optimizer.learning_rate = rate
        value, gradients = nn.value_and_grad(model, loss)(*batch)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return value

    return step


def rate(at: int, steps: int) -> float:
    """Learning rate of an update: a warm-up, and a cosine down to the last rate."""
    high = RATE * min(1, (at + 1) / WARM_UP)
    return LAST_RATE + (high - LAST_RATE) * (1 + math.cos(math.pi * at / steps)) / 2


def flat(parameters) -> list:
    from mlx.utils import tree_flatten

    return tree_flatten(parameters)


def batches(tokenizer: Tokenizer, steps: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Batches of similar length, in random order: inputs (BATCH, T), and for each token of a reply where it is
    predicted, what it is, and weight 1 (padded to a few sizes with weight 0)."""
    stream, rng = conversations(SEED + 1), random.Random(SEED)
    for start in range(0, steps, POOL):
        n = min(POOL, steps - start)
        drawn = [next(stream) for _ in range(n * BATCH)]
        prompts, replies = (tokenizer.encode_batch([pair[i] for pair in drawn]) for i in (0, 1))
        ids = [(prompt.ids, reply.ids) for prompt, reply in zip(prompts, replies, strict=True)]
        rows = sorted(ids, key=lambda row: len(row[0] + row[1]))
        groups = [rows[i * BATCH : (i + 1) * BATCH] for i in range(n)]
        rng.shuffle(groups)
        yield from map(collate, groups)


def collate(rows: list[tuple[list[int], list[int]]], multiple: int = 16, block: int = 1024) -> tuple[np.ndarray, ...]:
    length = -(-max(len(p) + len(r) for p, r in rows) // multiple) * multiple
    inputs = np.zeros((len(rows), length), np.int32)
    places: list[int] = []
    targets: list[int] = []
    for row, (prompt, reply) in enumerate(rows):
        inputs[row, : len(prompt) + len(reply)] = prompt + reply
        places += range(row * length + len(prompt) - 1, row * length + len(prompt) + len(reply) - 1)
        targets += reply
    rest = -len(places) % block
    weights = np.pad(np.ones(len(places), np.float32), (0, rest))
    return inputs, np.pad(places, (0, rest)).astype(np.int32), np.pad(targets, (0, rest)).astype(np.int32), weights


if __name__ == "__main__":
    main()
