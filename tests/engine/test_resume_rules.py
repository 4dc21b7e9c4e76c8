"""What a resumed run takes from its checkpoint, what may change, and what is refused."""

from __future__ import annotations

import pytest

from engine.config_file import changes_on_resume, load_config, saved_content, to_yaml
from engine.defaults import complete
from engine.errors import InputError


def saved_and_current(*overrides: str):
    saved = load_config("deit3_b_400e", ["data.image_size=null", "transform.mean=null", "transform.eval_crop=null"])
    current = load_config(
        "deit3_b_400e", ["data.image_size=null", "transform.mean=null", "transform.eval_crop=null", *overrides]
    )
    return saved_content(to_yaml(complete(saved))), current


def test_what_was_left_to_the_model_is_what_it_was():
    saved, current = saved_and_current()
    current = complete(current, saved)
    assert changes_on_resume(current, saved) == []
    assert current.data.image_size == 224
    assert current.transform.mean == [0.485, 0.456, 0.406] and current.transform.eval_crop == 0.9  # timm's


@pytest.mark.parametrize(("key", "was"), [("auto_augment", "3a"), ("color_jitter", "0.3")])
def test_a_transform_that_is_switched_off_is_a_change(key, was):
    """null means none for these keys."""
    saved, current = saved_and_current(f"transform.{key}=null")
    with pytest.raises(InputError, match=rf"^--resume: transform.{key} = None, the run has {was}\. Only "):
        complete(current, saved)


def test_what_may_change_is_listed():
    saved, current = saved_and_current("data.workers=3", "output_dir=elsewhere")
    assert changes_on_resume(complete(current, saved), saved) == ["data.workers: 10 -> 3"]
