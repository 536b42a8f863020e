"""The card states what was measured, and keeps what people wrote."""

import json
import sys

from recipes.shared import card


def test_card_states_the_measurements_and_keeps_the_limits(tmp_path, monkeypatch):
    import shutil

    from dit_accel.models import model_folder

    folder = tmp_path / "tiny-copy"
    shutil.copytree(model_folder("tiny-wan"), folder)
    (folder / "README.md").write_text(f"# old\n\n{card.LIMITS}\n\n- It can't sing.\n")
    facts = {
        "device": "some GPU", "autoencoder_s": 11, "autoencoder_steps": 2222, "latents_s": 3,
        "scenes": {"a": 1000, "b": 234}, "text_s": 4, "transformer_s": 55,
        "transformer_steps": 6666, "autoencoder_psnr_db": {"33x128x128": 35.25},
        "transformer_loss": {"33x128": 0.1234},
    }  # fmt: skip
    result = {
        "following": {"colour": 0.97, "shape": 0.89, "all": 0.93, "attributes": 374},
        "rows": [{}] * 64,
        "settings": {
            "steps": 16, "guidance": 3.0, "frames": 33, "height": 256, "width": 256
        },
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(facts))
    following = tmp_path / "following.json"
    following.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["card", str(folder), "--following", str(following)])
    card.main()
    text = (folder / "README.md").read_text()
    for fact in ("some GPU", "2,222", "1,234 scenes", "35.25 dB", "0.1234", "**93 %**", "89 %"):
        assert fact in text
    assert text.endswith("- It can't sing.\n")
    assert "motion: moving left" in text
