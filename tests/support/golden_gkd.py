"""TRL's numbers of distillation, with its own code.

    python tests/support/golden_gkd.py > tests/golden/golden_trl_1.16.0_gkd.json

needs `trl==1.16.0` and torch. Inputs are rounded, so that the file has them exactly.
"""

import json
import sys

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def found(student, teacher, labels, temperature):
    """Loss and gradient of `GKDTrainer.generalized_jsd_loss`, by beta.

    Args:
      student, teacher: logits [B, T, V] as nested lists.
      labels: [B, T]; -100 is left out.
    """
    import torch
    from trl.experimental.gkd import GKDTrainer

    made = {}
    for beta in BETAS:
        logits = torch.tensor(student, requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(
            logits,
            torch.tensor(teacher),
            labels=torch.tensor(labels),
            beta=beta,
            temperature=temperature,
        )
        loss.backward()
        made[str(beta)] = {"loss": loss.item(), "gradient": logits.grad.tolist()}
    return made


def main():
    """Writes inputs and numbers to standard output."""
    import numpy as np
    import trl

    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(2, 2, 4, 9)) * 2).round(2).tolist()
    labels = [[-100, 1, 2, 3], [-100, -100, 4, 5]]
    given = {"student": student, "teacher": teacher, "labels": labels}
    given["temperature"] = 0.7
    numbers = {"trl": trl.__version__, "inputs": given, "jsd": found(**given)}
    json.dump(numbers, sys.stdout)


if __name__ == "__main__":
    main()
