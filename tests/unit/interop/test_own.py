"""The processor of exported models of vlmtrain's own class."""

from __future__ import annotations

import pytest

from vlmtrain.interop.own import VLMTrainProcessor


def test_videos_are_refused(tokenizer):
    with pytest.raises(ValueError, match="accepts images, not videos"):
        VLMTrainProcessor(tokenizer)(text="What?", videos=["clip.mp4"])
