"""Freezing, and the shared block."""

import torch

from model.networks.vit import Attention, Block
from model.tokenizer import Tokenizer


def test_freezing_holds_through_train_called_above(tokenizer):
    tokenizer.encoder.freeze()
    tokenizer.train()
    assert tokenizer.training
    assert tokenizer.decoder.training
    frozen = [module for module in tokenizer.encoder.modules() if module.training]
    assert frozen == []
    assert not any(parameter.requires_grad for parameter in tokenizer.encoder.parameters())
    assert all(parameter.requires_grad for parameter in tokenizer.decoder.parameters())


def test_frozen_parts_get_no_gradients_and_do_not_change(tokenizer, images):
    tokenizer.encoder.freeze()
    tokenizer.fusion.freeze()
    tokenizer.train()
    before = {name: p.clone() for name, p in tokenizer.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in tokenizer.parameters() if p.requires_grad], lr=0.1)
    tokenizer.decoder(tokenizer.tokens(images)).square().mean().backward()
    optimizer.step()
    changed = {
        name.split(".")[0] for name, p in tokenizer.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {"decoder"}
    assert all(p.grad is None for part in (tokenizer.encoder, tokenizer.fusion) for p in part.parameters())


def test_unfreezing_restores_training(tokenizer):
    tokenizer.encoder.freeze().unfreeze()
    tokenizer.train()
    assert all(module.training for module in tokenizer.encoder.modules())
    assert all(parameter.requires_grad for parameter in tokenizer.encoder.parameters())


def test_fusion_trains_while_both_neighbours_are_frozen(tokenizer, images):
    tokenizer.encoder.freeze()
    tokenizer.decoder.freeze()
    tokenizer.decoder(tokenizer.tokens(images)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.fusion.parameters())


def test_loaded_tokenizers_are_frozen(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "c")
    loaded = Tokenizer.load(tmp_path / "c").train()
    parts = (loaded.encoder, loaded.fusion, loaded.decoder)
    assert not any(part.training for part in parts)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@torch.no_grad()
def test_attention_equals_its_definition():
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = (tokens @ w.T + b for w, b in split_qkv(attention))
    heads = []
    for channels in (slice(0, 4), slice(4, 8), slice(8, 12)):
        scores = query[..., channels] @ key[..., channels].transpose(1, 2) / 2.0
        heads.append(scores.softmax(-1) @ value[..., channels])
    expected = attention.out(torch.cat(heads, -1))
    torch.testing.assert_close(attention(tokens), expected, atol=1e-12, rtol=0)


def split_qkv(attention):
    return zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)


def test_layer_scale_is_optional_and_starts_as_configured():
    assert not any("scale" in name for name, _ in Block(8, 2, 16, 1e-6).named_parameters())
    scaled = Block(8, 2, 16, 1e-6, layer_scale=0.25)
    assert torch.equal(scaled.scale_mlp.gain, torch.full((8,), 0.25))
