"""curves.png of a run."""

from __future__ import annotations

import pytest

from engine import figure as curves


@pytest.mark.parametrize("factor", [1, 1.3, 30])
def test_losses_are_marked_by_plain_numbers(factor, tmp_path, monkeypatch):
    """Also where they stay within a power of ten: formulas would need a matplotlib that reads $ in any name as one."""
    drawn, save = [], curves.save
    monkeypatch.setattr(curves, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    records = [{"epoch": float(epoch), "main_loss": 2.3 / factor**epoch} for epoch in range(4)]
    curves.draw_curves(records, "run", tmp_path / "curves.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels(which="both") if label.get_text()]
    assert labels and all(float(label.replace("\N{MINUS SIGN}", "-")) > 0 for label in labels)
