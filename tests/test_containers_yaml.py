"""Settings in YAML: python tags are inert, and hostile texts end in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdconvert.containers.yaml_config import load, lookup
from pvdconvert.errors import InputError


def test_python_tags_are_inert(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"""!!python/object:nerfstudio.engine.trainer.TrainerConfig
_target: &id001 !!python/name:nerfstudio.engine.trainer.Trainer ''
again: *id001
path: !!python/object/apply:pathlib.PosixPath
- /
- home
empty: !!python/object/apply:pathlib.PosixPath []
run: !!python/object/apply:os.system ["touch {mark}"]
new: !!python/object/new:subprocess.Popen [["touch", "{mark}"]]
pair: !!python/tuple [1, 2.5e-3]
model: !!python/object:a.B
  average_init_density: 0.01
  mode: 'off'
  flag: true
own: !mine {{x: 1}}
tail: !!python/module:os
"""
    tree = load(text, "config.yml")
    assert tree["_target"] == tree["again"] == "nerfstudio.engine.trainer.Trainer"
    assert tree["path"] == ["/", "home"]
    assert tree["empty"] == []
    assert tree["run"] == [f"touch {mark}"]
    assert tree["pair"] == [1, 0.0025]
    assert tree["own"] == {"x": 1}
    assert tree["tail"] == "os"
    assert lookup(tree, "model.average_init_density") == 0.01
    assert lookup(tree, "model.mode") == "off"
    assert lookup(tree, "model.flag") is True
    assert lookup(tree, "model.absent.deeper", 3) == 3
    assert lookup(tree, "pair.x", 4) == 4
    assert not mark.exists()


@pytest.mark.requires_data
def test_a_real_config(data_root: Path) -> None:
    path = data_root / "checkpoints/peers/nerfstudio/nerfacto/config.yml"
    tree = load(path.read_text(), str(path))
    assert lookup(tree, "pipeline.model.average_init_density") == 0.1
    assert lookup(tree, "pipeline.model._target") == "nerfstudio.models.nerfacto.NerfactoModel"
    assert lookup(tree, "pipeline.model.num_proposal_samples_per_ray") == [64]
    assert lookup(tree, "pipeline.datamanager.dataparser._target").endswith("blender_dataparser.Blender")


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]\n" for k in range(9))
HOSTILE = {
    "alias bomb": BOMB,
    "merge bomb": "a: &a {x: 1}\nb: &b\n  <<: [*a, *a]\n",
    "circle": "a: &a [*a]",
    "unknown alias": "a: *b",
    "deep": "[" * 5000,
    "deep blocks": "\n".join(" " * k + "a:" for k in range(100)),
    "large": "a: " + "x" * (1 << 19),
    "many": "- 1\n" * 60000,
    "unhashable": "? [a, b]\n: c\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "tabs": "a:\n\t- b",
    "bad date": "a: 2020-13-45",
    "control": "a: \x01",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_end_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"config\.yml") as caught:
        load(HOSTILE[name], "config.yml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_long_numbers_stay_text() -> None:
    text = ":".join(["59"] * 30000)
    assert load(f"a: 1{text}", "x")["a"] == f"1{text}"
    assert load("a: " + "9" * 5000, "x")["a"] == "9" * 5000


@given(st.text(max_size=200))
def test_any_text_is_a_value_or_an_input_error(text: str) -> None:
    message = ""
    try:
        load(text, "x")
    except InputError as error:
        message = str(error)
    assert "\n" not in message
