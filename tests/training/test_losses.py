"""Perceptual and adversarial losses against their definitions."""

from pathlib import Path

import pytest
import torch
from torch import nn

from model.networks.encoder import Encoder
from tests.training.conftest import TINY
from training.errors import WeightsError
from training.losses.adversarial import (
    DINO_CONFIG,
    NUM_DRAWS,
    Discriminator,
    adaptive_weight,
    diff_augment,
    dino_encoder_state,
    discriminator_loss,
    generator_loss,
    make_backbone,
)
from training.losses.perceptual import VGG_STAGES, EfficientNetDistance, Lpips, make_perceptual
from training.losses.pixels import pixel_losses
from training.recipes.recipe import DiscriminatorConfig, LossConfig


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 2, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=generator(seed))


def draws(count: int) -> torch.Tensor:
    return torch.rand(count, NUM_DRAWS, generator=generator(5))


def vgg_state() -> dict[str, torch.Tensor]:
    state, index, width = {}, 0, 3
    for number, widths in enumerate(VGG_STAGES):
        index += number > 0
        for next_width in widths:
            weight = torch.randn(next_width, width, 3, 3, generator=generator(index)) * (2 / width / 9) ** 0.5
            state[f"features.{index}.weight"] = weight
            state[f"features.{index}.bias"] = torch.zeros(next_width)
            index, width = index + 2, next_width
    return state


def head_state() -> dict[str, torch.Tensor]:
    return {f"lin{n}.model.1.weight": torch.full((1, s[-1], 1, 1), 0.1) for n, s in enumerate(VGG_STAGES)}


@pytest.fixture
def weight_files(tmp_path: Path) -> tuple[Path, Path]:
    torch.save(vgg_state(), tmp_path / "vgg.pth")
    torch.save(head_state(), tmp_path / "lpips.pth")
    return tmp_path / "vgg.pth", tmp_path / "lpips.pth"


def test_efficientnet_distance_is_zero_on_equals_grows_with_noise_and_has_gradients() -> None:
    distance = EfficientNetDistance()
    clean = images()
    assert distance(clean, clean).abs().max() == 0
    noisy = [
        distance(clean + s * torch.randn(clean.shape, generator=generator(1)), clean).mean()
        for s in (0.02, 0.2)
    ]
    assert 0 < noisy[0] < noisy[1]
    student = (clean * 0.9).requires_grad_()
    distance(student, clean).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_lpips_follows_its_definition(weight_files: tuple[Path, Path]) -> None:
    lpips = Lpips(*weight_files)
    a, b = images(seed=1), images(seed=2)
    features = []
    for batch in (a, b):
        hidden = (batch * 2 - 1 - lpips.shift) / lpips.scale
        taps = []
        for number, stage in enumerate(lpips.stages):
            for layer in stage:
                hidden = layer(hidden)
            taps.append(nn.functional.normalize(hidden, dim=1))
            assert hidden.shape[1] == VGG_STAGES[number][-1]
        features.append(taps)
    expected = sum(0.1 * (x - y).square().sum(dim=1).mean(dim=(1, 2)) for x, y in zip(*features, strict=True))
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=1e-6)
    assert lpips(a, a).abs().max() == 0


def test_auto_prefers_lpips_where_its_weights_are(weight_files: tuple[Path, Path]) -> None:
    vgg, lpips = weight_files
    assert make_perceptual(LossConfig(vgg_weights=vgg, lpips_weights=lpips)).name == "lpips-vgg"
    assert make_perceptual(LossConfig(perceptual_network="efficientnet-lite0")).name == "efficientnet-lite0"


def test_incomplete_weights_name_the_tensor(tmp_path: Path, weight_files: tuple[Path, Path]) -> None:
    state = vgg_state()
    del state["features.10.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"cut\.pth: tensor 'features\.10\.weight' is missing"):
        Lpips(tmp_path / "cut.pth", weight_files[1])
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(WeightsError, match=r"text\.pth"):
        Lpips(tmp_path / "text.pth", weight_files[1])


def test_perceptual_crop_sees_one_window_of_both() -> None:
    perceptual = make_perceptual(LossConfig(perceptual_network="efficientnet-lite0", perceptual_crop=32))
    a = images()
    assert perceptual(a, a, generator()).item() == 0
    assert perceptual(a, 1 - a, generator(1)) == perceptual(a, 1 - a, generator(1))


def test_hinge_losses() -> None:
    assert discriminator_loss(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])).item() == 0.5
    assert generator_loss(torch.tensor([1.0, 3.0])).item() == -2.0


def test_adaptive_weight_balances_gradient_norms() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    alpha = adaptive_weight((2 * weight).sum(), (0.5 * weight).sum(), weight)
    assert alpha.item() == pytest.approx(4.0, rel=1e-4)
    assert adaptive_weight((weight * 1e9).sum(), (0 * weight).sum(), weight).item() == 1e4


def test_encoder_as_backbone_gets_pixels_as_the_tokenizer_normalises_them() -> None:
    """SigLIP2's, for one, are not ImageNet's."""
    tokenizer = TINY.model_copy(update={"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.25, 0.5, 1.0)})
    encoder = Encoder(TINY.encoder)
    backbone = make_backbone(DiscriminatorConfig(), encoder, tokenizer)
    pixels = images(side=TINY.encoder.image_size)
    normalized = (pixels - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(1, 3, 1, 1)
    expected = encoder(normalized)[-1].transpose(1, 2)
    torch.testing.assert_close(backbone(pixels)[-1], expected)


def test_discriminator_reaches_its_input_but_not_its_backbone() -> None:
    encoder = Encoder(TINY.encoder)
    discriminator = Discriminator(make_backbone(DiscriminatorConfig(), encoder, TINY), 1.0)
    assert discriminator.backbone.name == "encoder"
    fake = images(side=32).requires_grad_()
    discriminator.train()
    generator_loss(discriminator(fake, draws(2))).backward()
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0
    assert not encoder.training
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is not None for p in discriminator.heads.parameters())


def test_diff_augment_is_seeded_differentiable_and_can_be_off() -> None:
    batch = images(8, 32).requires_grad_()
    first, second = (diff_augment(batch, 1.0, draws(8)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, batch)
    first.sum().backward()
    assert batch.grad is not None
    assert torch.equal(diff_augment(batch, 0.0, draws(8)), batch)


def test_dino_weights_give_dino_features(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    vit = ViTModel(
        ViTConfig(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            intermediate_size=1536,
            patch_size=8,
            image_size=224,
            layer_norm_eps=1e-6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    ).eval()
    pixels = torch.randn(1, 3, 224, 224)
    torch.save(timm_names(vit.state_dict()), tmp_path / "dino.pth")
    config = DiscriminatorConfig(dino_weights=tmp_path / "dino.pth")
    backbone = make_backbone(config, Encoder(TINY.encoder), TINY)
    assert backbone.name == "dino-vits8"
    with torch.no_grad():
        expected = vit(pixels, output_hidden_states=True).hidden_states
        states = backbone.encoder.hidden_states(pixels)
    for ours, theirs in zip(states, expected[1:], strict=True):
        if theirs is expected[-1]:
            continue  # the last entry may carry the final norm
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    del expected


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers ViT's weights under the names of DINO's own file."""
    renamed = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    return renamed | {
        name: tensor
        for number in range(DINO_CONFIG.depth)
        for name, tensor in timm_block(state, number).items()
    }


def timm_block(state: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    prefix = next(name for name in state if f".{number}." in name).split(f".{number}.")[0] + f".{number}."
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    block = {}
    for kind in ("weight", "bias"):
        qkv = [
            find(own, kind, *options)
            for options in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        ]
        block[f"attn.qkv.{kind}"] = torch.cat(qkv)
        block[f"attn.proj.{kind}"] = find(own, kind, "attention.output.dense", "o_proj")
        block[f"mlp.fc1.{kind}"] = find(own, kind, "intermediate.dense", "mlp.fc1")
        block[f"norm1.{kind}"] = find(own, kind, "layernorm_before", "norm1")
        block[f"norm2.{kind}"] = find(own, kind, "layernorm_after", "norm2")
        names = [n for n in own if n.endswith(f".{kind}") and n.startswith(("output.dense", "mlp.fc2"))]
        block[f"mlp.fc2.{kind}"] = own[names[0]]
    return {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}


def find(tensors: dict[str, torch.Tensor], kind: str, *names: str) -> torch.Tensor:
    return next(t for key, t in tensors.items() if any(f"{name}.{kind}" in key for name in names))


def test_dino_state_skips_norm_and_head() -> None:
    state = dino_encoder_state({"norm.weight": torch.ones(1), "head.weight": torch.ones(1)})
    assert set(state) == {"register_tokens"}


def test_missing_dino_weights_are_named() -> None:
    with pytest.raises(WeightsError, match=r"discriminator\.dino_weights"):
        make_backbone(DiscriminatorConfig(backbone="dino-vits8"), Encoder(TINY.encoder), TINY)


def test_seams_count_the_error_of_steps_across_borders_alone() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = LossConfig(seams=1.0)
    smooth = images + torch.linspace(0, 0.1, 16)
    mosaic = images.clone()
    mosaic[..., 8:] += 0.1  # one border of patches of 8 pixels
    steps = {
        name: pixel_losses(x, images, weights, 8)["seams"].item()
        for name, x in (("smooth", smooth), ("mosaic", mosaic))
    }
    assert steps["mosaic"] == pytest.approx(0.1 / 2)  # of columns and rows
    assert steps["smooth"] == pytest.approx(0.1 / 15 / 2, rel=1e-3)
    assert set(pixel_losses(mosaic, images, LossConfig(), 8)) == {"l1"}
