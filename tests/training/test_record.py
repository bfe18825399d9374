"""config.json: the settings of a run, and the choices made from them."""

import json
from dataclasses import asdict, replace

import pytest

from gpt2fast import train
from gpt2fast.errors import UserError
from gpt2fast.ops import OpsConfig
from gpt2fast.training import config
from gpt2fast.training.config import PRESETS
from gpt2fast.training.record import FACTS, NEEDED, changed_choice, read_record
from tests.tools import tiny


def test_settings_and_choices_are_read_back(tmp_path):
    c = replace(PRESETS["nano"], backend="auto", ops=OpsConfig(mlp="compiled"))
    facts = {"parameters": 1, "unigram_entropy": 5.8, "data_fingerprint": "0" * 16}
    resolved = asdict(tiny.choices(ops=c.ops.with_backend("torch"), auto={})) | facts
    text = json.dumps({"config": config.to_dict(c), "resolved": resolved})
    (tmp_path / "config.json").write_text(text)
    assert read_record(tmp_path) == (c, resolved)


def test_a_damaged_config_json_is_refused(folder, capsys):
    c = tiny.config(folder, stop_at=2)
    train.train(c)
    for text in ("{}", "[]", '{"config": {"model": 3}}', "nonsense", '{"config": null}'):
        (c.folder / "config.json").write_text(text)
        with pytest.raises(UserError, match="damaged or of another version"):
            read_record(c.folder)


def test_a_record_older_than_a_choice_is_read(tmp_path):
    c = PRESETS["nano"]
    facts = {"parameters": 1, "unigram_entropy": 5.8, "data_fingerprint": "0" * 16}
    resolved = asdict(tiny.choices()) | facts
    for name in set(resolved) - {*NEEDED, *FACTS}:
        del resolved[name]
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_dict(c), "resolved": resolved}))
    assert read_record(tmp_path) == (c, resolved)
    assert changed_choice(tiny.choices(), resolved) is None
    del resolved["precision"]
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_dict(c), "resolved": resolved}))
    with pytest.raises(UserError, match="precision is 'None'"):
        read_record(tmp_path)
