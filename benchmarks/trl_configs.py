"""
The fields of the configs of seven TRL trainers, for the table of names in methods/README.md. With TRL's own Python:

    TRL/bin/python benchmarks/trl_configs.py      writes tests/fixtures/trl_configs.json

A config's own fields are those that TrainingArguments lacks, or has with another default.
"""

import dataclasses
import json
from pathlib import Path

import transformers
import trl

VERSION, TARGET = "1.16.0", Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "trl_configs.json"
CONFIGS = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig", "kto": "KTOConfig", "grpo": "GRPOConfig",
           "rloo": "RLOOConfig", "distillation": "DistillationConfig"}  # by our script


def defaults(config):
    """{field: default}; None where there is none."""
    found = {}
    for field in dataclasses.fields(config):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        found[field.name] = None if made is dataclasses.MISSING else made
    return found


def main():
    if trl.__version__ != VERSION:
        raise SystemExit(f"error: TRL {trl.__version__} is installed, the fixture is of {VERSION}")
    base = defaults(transformers.TrainingArguments)
    own = {script: {name: value for name, value in defaults(getattr(trl, config)).items()
                    if name not in base or base[name] != value} for script, config in CONFIGS.items()}
    made = {"trl": trl.__version__, "transformers": transformers.__version__, "made_by": "benchmarks/trl_configs.py"}
    made |= {"TrainingArguments": base} | own
    TARGET.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
