"""A folder's config as the installed transformers reads it: rope settings of version 5, and unknown model types."""

import json

import pytest

from surefoot.core.errors import ModelError
from surefoot.weights import hf_config
from surefoot.weights.hf_config import read_config, rope_of_version_4

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class Plain:
    """A config object of transformers 4 that has read a file of transformers 5."""

    rope_theta = 10000.0
    rope_scaling = None

    def __init__(self, rope):
        self.rope_parameters = rope


def test_version_4_gets_the_settings_it_reads(monkeypatch):
    monkeypatch.setattr(hf_config, "major_version", lambda: 4)
    config = Plain(LLAMA3 | {"partial_rotary_factor": 0.5})
    rope_of_version_4(config)
    assert config.rope_theta == 5e5 and config.partial_rotary_factor == 0.5
    assert config.rope_scaling == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    default = Plain({"rope_type": "default", "rope_theta": 7.0})
    rope_of_version_4(default)
    assert (default.rope_theta, default.rope_scaling) == (7.0, None)


def test_version_5_is_left_alone(monkeypatch):
    monkeypatch.setattr(hf_config, "major_version", lambda: 5)
    config = Plain(LLAMA3)
    rope_of_version_4(config)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


def test_an_unknown_model_type_says_what_to_install(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    with pytest.raises(ModelError, match="does not know the model type of .*pip install -U transformers"):
        read_config(tmp_path)


def test_a_broken_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError) as error:
        read_config(tmp_path)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)
