"""``drorae info``."""

import json

import pytest

from model.tokenizer import Tokenizer


def test_table(run, checkpoint):
    outcome = run("info", checkpoint)
    assert outcome.status == 0
    table = dict(line.split("  ", 1) for line in outcome.out.splitlines() if not line.startswith(" "))
    assert table["checkpoint"].strip() == "tiny"
    assert Tokenizer.load(checkpoint).checkpoint.sha256 in outcome.out
    assert "experts over layers 1 to 3, hidden width 16, energy routing" in outcome.out
    assert "32 x 4 x 4, normalisable: yes" in outcome.out
    order = [outcome.out.index(f"\n  {part} ") for part in ("encoder", "fusion", "decoder", "statistics")]
    assert order == sorted(order)
    assert max(map(len, outcome.out.splitlines())) < 130  # long provenance is cut


def test_json(run, checkpoint):
    facts = json.loads(run("info", "--json", "--checkpoint", checkpoint).out)
    tokenizer = Tokenizer.load(checkpoint)
    assert facts["sha256"] == tokenizer.checkpoint.sha256
    assert facts["latent_shape"] == [32, 4, 4]
    assert facts["fused_layers"] == [1, 2, 3]
    assert facts["config"] == tokenizer.config.model_dump(mode="json")
    assert facts["provenance"] == tokenizer.checkpoint.provenance
    for part in ("encoder", "fusion", "decoder"):
        counted = sum(p.numel() for p in getattr(tokenizer, part).parameters())
        assert facts["parts"][part]["num_parameters"] == counted
    assert facts["has_statistics"]


def test_without_fusion(run, tmp_path, checkpoint):
    config = Tokenizer.load(checkpoint).config.model_copy(update={"fusion": None})
    Tokenizer(config).save(tmp_path / "plain")
    assert "none: the last layer alone" in run("info", tmp_path / "plain").out


def test_checkpoint_named_twice(refused, checkpoint):
    assert "named twice" in refused("info", checkpoint, "--checkpoint", checkpoint)


@pytest.mark.parametrize("part", ["encoder", "fusion", "decoder"])
def test_broken_part_is_named(refused, tmp_path, checkpoint, part):
    Tokenizer.load(checkpoint).save(tmp_path / "broken")
    file = tmp_path / "broken" / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert f"{file}: " in refused("info", tmp_path / "broken")
