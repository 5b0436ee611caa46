"""The keys of TRL's GRPOConfig and RLOOConfig with their defaults: for tests/config/groups.rs.

Prints trl_configs.json: of each class, the fields that it declares beside transformers' TrainingArguments, and the fields of
TrainingArguments that say how long is trained on how much. Defaults that JSON has no form for are null.
trl 1.16.0, transformers as it came with it.   Run: python tests/golden/trl_configs.py > tests/golden/trl_configs.json
"""

import dataclasses
import json

from transformers import TrainingArguments
from trl import GRPOConfig, RLOOConfig

SHARED = ["learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
          "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type"]


def default(field):
    value = field.default
    if value is dataclasses.MISSING:
        return None
    return value if isinstance(value, (int, float, str, bool, list, type(None))) else str(getattr(value, "value", value))


if __name__ == "__main__":
    parent = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = {}
    for config in [GRPOConfig, RLOOConfig]:
        fields = [field for field in dataclasses.fields(config) if field.name not in parent or field.name in SHARED]
        found[config.__name__] = {field.name: default(field) for field in fields}
    print(json.dumps(found, indent=1))
