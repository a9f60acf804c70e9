"""The losses of TRL's trainers on log-probs that are given, without a model, a tokenizer or a training run.

A trainer is made without its ``__init__`` and told what its loss function reads. Its model looks up what to say: the
first token of each sequence is a number, and says which text it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from oracle import Example

Rows = Sequence[Sequence[float]]


def texts_of(examples: Sequence[Example], reference: bool = False) -> list[Sequence[float]]:
    """Token log-probs of all chosen responses, then of all rejected ones: TRL's order."""
    return [(x.reference if reference else x.policy)[k] for k in (0, 1) for x in examples]


class Sayings(torch.nn.Module):
    """A model that has said what it thinks of each text: ``tokens`` (N, L) and their mask, for ``backward``."""

    is_gradient_checkpointing = False

    def __init__(self, texts: Rows, overlap: Rows | None = None, dtype: Any = torch.float64) -> None:
        super().__init__()
        self.eval()
        longest = max(map(len, texts))
        self.mask = torch.tensor([[float(t < len(text)) for t in range(longest)] for text in texts], dtype=dtype)
        self.tokens = self._table(texts, longest, dtype).requires_grad_(True)
        self.overlap = self._table(overlap or texts, longest, dtype)

    @staticmethod
    def _table(texts: Rows, longest: int, dtype: Any) -> Any:
        return torch.tensor([[*text, *[0.0] * (longest - len(text))] for text in texts], dtype=dtype)

    def forward(self, *ids: Any, input_ids: Any = None, labels: Any = None, **_: Any) -> SimpleNamespace:
        which = (ids[0] if ids else input_ids)[:, 0]
        tokens, nothing = (self.tokens * self.mask)[which], torch.zeros_like(self.tokens[which])
        return SimpleNamespace(
            logits=self._logits(tokens, self.mask[which]),
            log_probs=tokens,
            log_sum_sq_probs=self.overlap[which],
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )

    @staticmethod
    def _logits(tokens: Any, mask: Any) -> Any:
        """Of a vocabulary of two, the first of which has just this log-prob, one position before its own."""
        said = torch.where(mask > 0, tokens, -1.0)
        logits = torch.stack([said, torch.log(-torch.expm1(said))], -1)
        return torch.cat([logits, logits[:, :1]], 1)

    def sequences(self, rows: Sequence[int], prompt: int = 1) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and ``completion_mask`` of these texts behind a prompt."""
        mask = self.mask[list(rows)].long()
        ids = torch.zeros((len(mask), prompt), dtype=torch.long)
        ids[:, 0] = torch.tensor(rows)
        ones = torch.ones_like(ids)
        return {
            "input_ids": torch.cat([ids, torch.zeros_like(mask)], 1),
            "attention_mask": torch.cat([ones, mask], 1),
            "completion_mask": torch.cat([0 * ones, mask], 1),
        }


def made(trainer: type, model: Sayings, **attributes: Any) -> Any:
    """A trainer that has nothing but its methods and these attributes."""
    one: Any = object.__new__(trainer)
    metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    shared = {
        "model": model,
        "accelerator": accelerator,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "padding_value": 0,
        "_metrics": metrics,
        "_total_train_tokens": 0,
    }
    one.__dict__.update(shared | attributes)
    return one


def slopes(model: Sayings, loss: Any) -> Any:
    """∂ loss / ∂ each token, (N, L)."""
    (found,) = torch.autograd.grad(loss, model.tokens)
    return found.numpy()


def dpo_trainer(
    examples: Sequence[Example], loss_type: str | Sequence[str], *, dtype: Any = torch.float64, **options: Any
) -> tuple[float, Any, Mapping[str, float]]:
    """Loss, ∂ loss / ∂ policy tokens (2B, L) and metrics of ``DPOTrainer``, the reference run beside the policy."""
    from trl import DPOTrainer

    overlap = [x.extras["overlap"][k] for k in (0, 1) for x in examples] if options.get("use_weighting") else None
    policy = Sayings(texts_of(examples), overlap, dtype)
    loss_types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    tau = options.pop("discopop_tau", 0.05)
    told = {
        "ref_model": Sayings(texts_of(examples, reference=True), dtype=dtype),
        "precompute_ref_logps": False,
        "loss_types": loss_types,
        "loss_weights": [1.0] * len(loss_types),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=tau),
    }
    assert set(options) <= set(told), "an option that TRL would not read"
    trainer = made(DPOTrainer, policy, **{**told, **options})
    loss = trainer._compute_loss(policy, policy.sequences(range(2 * len(examples))), return_outputs=False)
    return loss.item(), slopes(policy, loss), {k: v[-1] for k, v in trainer._metrics["eval"].items()}


def pairs_trainer(trainer: type, examples: Sequence[Example], *, prompt: int = 1, **options: Any) -> tuple[float, Any]:
    """Loss and ∂ loss / ∂ policy tokens (2B, L) of ``CPOTrainer`` or ``ORPOTrainer``."""
    model, n = Sayings(texts_of(examples)), len(examples)
    batch = {}
    for name, rows in (("chosen", range(n)), ("rejected", range(n, 2 * n))):
        given = model.sequences(rows, prompt)
        batch[f"{name}_input_ids"] = given["input_ids"]
        batch[f"{name}_attention_mask"] = given["attention_mask"]
        batch[f"{name}_labels"] = given["input_ids"].masked_fill(given["completion_mask"] == 0, -100)
    said = model if prompt == 1 else _with_prompt(model, prompt)
    loss, _ = made(trainer, model, **options).get_batch_loss_metrics(said, batch, "eval")
    return loss.item(), slopes(model, loss)


def _with_prompt(model: Sayings, prompt: int) -> Any:
    """The same model, which gives each further token of the prompt the log-prob log ½."""

    def said(ids: Any, **_: Any) -> SimpleNamespace:
        logits = model(ids).logits
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(logits[:, : prompt - 1]), logits], 1))

    return said


def tpo_trainer(examples: Sequence[Example], **options: Any) -> tuple[float, Any]:
    """Loss and ∂ loss / ∂ policy tokens (3B, L) of ``TPOTrainer``: chosen, rejected, gold."""
    from trl.experimental.tpo import TPOTrainer

    rows = texts_of(examples) + [x.texts["gold"][0] for x in examples]
    model = Sayings(rows)
    n = len(rows) if options.get("tpo_alpha") else 2 * len(examples)
    trainer = made(TPOTrainer, model, label_smoothing=0.0, **options)
    loss = trainer._compute_loss(model, model.sequences(range(n)), return_outputs=False)
    return loss.item(), slopes(model, loss)


def kto_trainer(examples: Sequence[Example], **options: Any) -> tuple[float, Any]:
    """Loss and ∂ loss / ∂ policy tokens (2B, L) of ``KTOTrainer`` on pairs that are split; KL rows as in ``kto``."""
    from trl import KTOTrainer

    n = 2 * len(examples)
    mismatched = [x.texts["mismatched"][0] for x in examples] * 2
    policy = Sayings([*texts_of(examples), *mismatched])
    reference = Sayings([*texts_of(examples, reference=True), *(x.texts_reference["mismatched"][0] for x in examples)])
    kl = policy.sequences(range(n, 2 * n))
    batch = {
        **policy.sequences(range(n)),
        **{f"KL_{key}": value for key, value in kl.items()},
        "label": torch.tensor([True] * len(examples) + [False] * len(examples)),
        "ref_logps": reference.tokens.detach().sum(-1)[:n],
        "ref_KL_logps": reference.tokens.detach().sum(-1)[n:].repeat(2),
    }
    told = {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | options
    told |= {"calculate_KL": told["loss_type"] == "kto", "precompute_ref_logps": True}
    loss = made(KTOTrainer, policy, **told)._compute_loss(policy, batch, return_outputs=False)
    return loss.item(), slopes(policy, loss)[:n]
