"""The numbers of TRL's own DPOTrainer and RewardTrainer on a few random pairs.

    python tests/support/trl_preference.py > tests/golden/trl_1.16.0_preference.json

needs trl, torch and peft. The trainers' loss methods run as they are; in the place of a
model stands one that answers with given numbers, in which the loss is differentiated.
"""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np

PAIRS, LENGTH, PROMPT = 5, 9, 2
# Tokens of the chosen and of the rejected response of each pair.
LENGTHS = [(3, 5), (7, 1), (2, 2), (6, 4), (1, 7)]
BETA, SMOOTHING = 0.3, 0.1
DPO = {
    "sigmoid": (["sigmoid"], [1.0]),
    "hinge": (["hinge"], [1.0]),
    "ipo": (["ipo"], [1.0]),
    "robust": (["robust"], [1.0]),
    "sigmoid and sft": (["sigmoid", "sft"], [1.0, 0.5]),
    "hinge, ipo, robust and sft": (
        ["hinge", "ipo", "robust", "sft"],
        [0.7, 0.1, 0.4, 0.2],
    ),
}
REWARDS = {
    "plain": (None, False),
    "centred": (0.05, False),
    "margins": (None, True),
    "both": (0.05, True),
}


def inputs():
    """Random numbers by TRL's shapes: all chosen ones first, then all rejected ones."""
    rng = np.random.default_rng(0)
    mask = np.zeros((2 * PAIRS, LENGTH), int)
    for pair, sides in enumerate(LENGTHS):
        for side, length in enumerate(sides):
            mask[side * PAIRS + pair, PROMPT : PROMPT + length] = 1
    logprobs = rng.uniform(-4, 0, mask.shape) * mask
    ref = rng.uniform(-4, 0, mask.shape) * mask
    return {
        "mask": mask.tolist(),
        "logprobs": logprobs.tolist(),
        "ref_logprobs": ref.tolist(),
        "scores": rng.normal(size=2 * PAIRS).tolist(),
        "margins": rng.uniform(0, 2, PAIRS).tolist(),
    }


class _Alone:
    """An accelerator of one process."""

    device = "cpu"

    def gather(self, x):
        return x

    gather_for_metrics = gather


def dpo(given, losses, weights):
    """Loss, its gradient in each token's log-probability, and metrics."""
    import torch
    from trl import DPOTrainer

    mask = torch.tensor(given["mask"])
    logprobs = torch.tensor(given["logprobs"])[:, 1:].requires_grad_()
    ref = torch.tensor(given["ref_logprobs"]).sum(dim=1)

    def model(**_):
        nothing = torch.zeros_like(logprobs)
        return SimpleNamespace(
            log_probs=logprobs * mask[:, 1:],
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )

    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = _Alone()
    trainer.loss_types, trainer.loss_weights = losses, weights
    trainer.beta, trainer.label_smoothing = BETA, SMOOTHING
    trainer.f_divergence_type, trainer.ld_alpha = "reverse_kl", None
    trainer.use_weighting = trainer.aux_loss_enabled = False
    trainer.precompute_ref_logps, trainer._tp_size = True, 1
    trainer._metrics, trainer._total_train_tokens = {"train": defaultdict(list)}, 0
    model.training = True
    loss = trainer._compute_loss(
        model,
        {
            "input_ids": torch.zeros_like(mask),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "ref_chosen_logps": ref[:PAIRS],
            "ref_rejected_logps": ref[PAIRS:],
        },
        False,
    )
    loss.backward()
    kept = ("rewards/", "logps/")
    metrics = trainer._metrics["train"]
    return {
        "loss": loss.item(),
        "gradient": np.pad(logprobs.grad.numpy(), ((0, 0), (1, 0))).tolist(),
        "metrics": {k: v[0] for k, v in metrics.items() if k.startswith(kept)},
    }


def reward(given, coefficient, has_margins):
    """Loss, its gradient in each score, and metrics."""
    import torch
    from trl import RewardTrainer

    scores = torch.tensor(given["scores"]).requires_grad_()
    trainer = RewardTrainer.__new__(RewardTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = _Alone()
    trainer.args = SimpleNamespace(center_rewards_coefficient=coefficient)
    trainer._metrics, trainer._total_train_tokens = {"train": defaultdict(list)}, 0
    trainer._tp_size = 1
    batch = {"attention_mask": torch.ones(2 * PAIRS, LENGTH)}
    if has_margins:
        batch["margin"] = torch.tensor(given["margins"])
    loss = trainer.compute_loss(
        lambda **_: SimpleNamespace(logits=scores[:, None]), batch
    )
    loss.backward()
    metrics = trainer._metrics["train"]
    return {
        "loss": loss.item(),
        "gradient": scores.grad.tolist(),
        "metrics": {k: v[0] for k, v in metrics.items() if k != "num_tokens"},
    }


def numbers():
    """Everything that is stored."""
    given = inputs()
    return {
        "inputs": given,
        "dpo": {name: dpo(given, *case) for name, case in DPO.items()},
        "reward": {name: reward(given, *case) for name, case in REWARDS.items()},
    }


if __name__ == "__main__":
    json.dump(numbers(), sys.stdout, indent=1)
