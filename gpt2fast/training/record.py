"""The config.json of a run: its settings, its choices, facts about its data, the machine, and every resume."""

from dataclasses import asdict, fields
from pathlib import Path

from gpt2fast.errors import UserError
from gpt2fast.files import checked
from gpt2fast.ops import OpsConfig
from gpt2fast.training.choices import Choices
from gpt2fast.training.config import TrainConfig, from_dict, to_dict

FACTS = {"parameters": int, "unigram_entropy": float, "data_fingerprint": str}  # beside the choices
NEEDED = ("device_name", "ranks", "precision", "residual", "compile", "ops", "auto")  # the rest is newer than some runs


def choices_and_facts(choices: Choices, **facts: float | str) -> dict:
    """Return what config.json keeps beside the settings, as plain JSON."""
    assert set(facts) == set(FACTS)
    return asdict(choices) | facts


def read_record(folder: Path) -> tuple[TrainConfig, dict]:
    """Read the settings of a run, and its choices and facts. UserError if config.json is missing or damaged."""
    path = folder / "config.json"
    try:
        record = checked.read_json(path)
        found = record["resolved"]
        checked.check("resolved", found, dict)
        types = {f.name: dict[str, str] if f.type is OpsConfig else f.type for f in fields(Choices)} | FACTS
        for name, annotation in types.items():
            if name in found or name in NEEDED or name in FACTS:
                checked.check(name, found.get(name), annotation)
        return from_dict(record["config"]), found
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no run ({path.name} is missing): name another, or start one with python -m gpt2fast.train"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged or of another version ({type(error).__name__}: {error})") from None


def changed_settings(new: dict, old: dict) -> dict[str, list]:
    """Return {setting: [old, new]} of two `to_dict`s, without the settings of a start: --resume, --out and such."""
    old = to_dict(from_dict(old))  # adds settings that an older version did not have
    of_a_start = ("resume", "stop_at", "out", "run")
    return {name: [old[name], new[name]] for name in new if new[name] != old[name] and name not in of_a_start}


def changed_choice(choices: Choices, was: dict) -> tuple[str, object, object] | None:
    """Return the first choice (name, earlier, now) that would change the bits of a run; None if there is none."""
    now = asdict(choices)
    for f in fields(choices):
        if f.metadata.get("bits", True) and f.name in was and was[f.name] != now[f.name]:
            return f.name, was[f.name], now[f.name]
    return None
