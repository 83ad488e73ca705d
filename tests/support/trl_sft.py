"""The numbers of TRL's own SFTTrainer on a tiny model and a few rows.

    python tests/support/trl_sft.py > tests/golden/trl_1.16.0_sft.json

needs trl, datasets and torch beside what the tests need. The trainer prepares its data,
collates one batch, computes its loss and differentiates it; of each gradient, what is
kept is its norm and how far it points along a few random directions.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import tiny

ROWS = {
    "text": [{"text": "one and two"}, {"text": "three"}],
    "prompt and completion": [
        {"prompt": "1 + 1 = ", "completion": "2"},
        {"prompt": "The answer is", "completion": " not known."},
        {"prompt": "a", "completion": "b c"},
    ],
    "messages": [
        {
            "prompt": [{"role": "user", "content": "1+1?"}],
            "completion": [{"role": "assistant", "content": "2"}],
        },
        {
            "prompt": [
                {"role": "system", "content": "Add."},
                {"role": "user", "content": "2+3?"},
            ],
            "completion": [{"role": "assistant", "content": "It is 5."}],
        },
    ],
}
LOSSES = ("nll", "dft")


def checkpoint(directory):
    """A tiny model with weights by NumPy's generator, and its tokenizer."""
    from safetensors.numpy import load_file, save_file

    path = pathlib.Path(tiny.checkpoint(directory, num_layers=1))
    file = path / "model.safetensors"
    rng, tensors = np.random.default_rng(0), load_file(file)
    drawn = {
        name: (rng.normal(size=tensors[name].shape) * 0.3).astype(np.float32)
        for name in sorted(tensors)
    }
    save_file(drawn, file, metadata={"format": "pt"})
    return str(path)


def seen(name, gradient):
    """The norm of a gradient, and how far it points along five random directions."""
    rng = np.random.default_rng(len(name))
    flat = np.asarray(gradient, np.float64).ravel()
    along = rng.normal(size=(5, flat.size)) / np.sqrt(flat.size)
    return [float(np.linalg.norm(flat)), *(along @ flat).tolist()]


def told(model, rows, loss_type):
    """What TRL makes of rows and of a batch of all of them.

    Args:
      model: a directory.
    """
    import datasets
    import torch
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as out:
        how = SFTConfig(
            output_dir=out,
            loss_type=loss_type,
            per_device_train_batch_size=len(rows),
            max_length=64,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = SFTTrainer(model, how, train_dataset=datasets.Dataset.from_list(rows))
        prepared = [
            {name: row[name] for name in ("input_ids", "labels")}
            for row in trainer.train_dataset
        ]
        batch = trainer.data_collator(prepared)
        trainer.model.train()
        count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
        metrics = {
            name: values[0] for name, values in trainer._metrics["train"].items()
        }
        gradients = {
            name: seen(name, parameter.grad.detach().to(torch.float64).numpy())
            for name, parameter in trainer.model.named_parameters()
        }
    kept = ("entropy", "mean_token_accuracy")
    return {
        "rows": prepared,
        "loss": loss.item(),
        "metrics": {name: metrics[name][0] for name in kept},
        "gradients": gradients,
    }


def everything():
    """What stands in the file."""
    with tempfile.TemporaryDirectory() as directory:
        model = checkpoint(pathlib.Path(directory) / "model")
        return {
            f"{kind}, {loss}": told(model, rows, loss)
            for kind, rows in ROWS.items()
            for loss in LOSSES
        }


if __name__ == "__main__":
    json.dump(everything(), sys.stdout)
    print()
