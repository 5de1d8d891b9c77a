"""Numbers of the official modelling code, reproduced through this project's own loader, masks and loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_lora import basemodel, flow
from acestep_lora.conditioning import hint_context, silence_context
from acestep_lora.dit import AceStepDiT, load_dit

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def dit(golden_variant):
    return load_dit(golden_variant)


@pytest.fixture(scope="module")
def parts(golden_variant):
    """The golden checkpoint has a transformer and a condition encoder; VAE and text encoder are never asked for."""
    return basemodel.BaseModel(*[golden_variant] * 7)


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("frames, output", [(21, "dec_out"), (20, "dec_out_even")])
def test_decoder(dit, goldens, frames, output):
    g = goldens
    v = dit(g["xt"][:, :frames], g["t"], g["enc_hidden"], g["context_text2music"][:, :frames])
    close(v, g[output])


def test_decoder_without_condition(dit, parts, goldens):
    null, _ = basemodel.constants(parts)
    condition = null.expand_as(goldens["enc_hidden"])
    close(dit(goldens["xt"], goldens["t"], condition, goldens["context_text2music"]), goldens["dec_out_null"])


def test_padding_is_not_seen(dit, goldens):
    g = goldens
    padded = dit(g["xt"], g["t"], g["enc_hidden"], g["context_text2music"], g["enc_mask"].bool())
    close(padded[1:], g["dec_item1_unpadded"])
    both = dit(g["xt"], g["t"], g["enc_hidden"], g["context_text2music"], g["enc_mask"].bool(), g["latent_mask"].bool())
    close(both[1:, :15], g["dec_item1_short"])


def test_condition_encoder(parts, goldens):
    g, encoder = goldens, basemodel.load_condition_encoder(parts, torch.float32, "cpu")
    text = g["text_hidden"], g["text_mask"].bool(), g["lyric_hidden"], g["lyric_mask"].bool()
    hidden, mask = encoder(*text, g["refer"], g["refer_order"])
    close(hidden, g["enc_hidden"])
    assert torch.equal(mask, g["enc_mask"].bool())
    hidden, mask = encoder(*text, g["refer3"], g["refer3_order"])
    close(hidden, g["enc3_hidden"])
    assert torch.equal(mask, g["enc3_mask"].bool())


def test_timbre_token_changes_the_timbre_row_alone(parts, goldens):
    g, encoder = goldens, basemodel.load_condition_encoder(parts, torch.float32, "cpu", timbre_token=True)
    text = g["text_hidden"], g["text_mask"].bool(), g["lyric_hidden"], g["lyric_mask"].bool()
    difference = (encoder(*text, g["refer"], g["refer_order"])[0] - g["enc_hidden"]).abs().amax(-1)
    timbre = int(g["lyric_mask"][0].sum())
    assert difference[0, timbre] > 0.1
    difference[0, timbre] = difference[1, int(g["lyric_mask"][1].sum())] = 0
    assert difference[g["enc_mask"].bool()].max() < TOLERANCE


def test_contexts(parts, goldens):
    _, silence = basemodel.constants(parts)
    close(silence_context(silence, 21).expand(2, -1, -1), goldens["context_text2music"])
    tokenizer, detokenizer = basemodel.load_audio_tokenizer(parts, torch.float32, "cpu")
    quantized, codes = tokenizer.tokenize(goldens["x0"], silence[None])
    assert torch.equal(codes, goldens["audio_codes"])
    close(hint_context(detokenizer(quantized)[:, :21]), goldens["context_cover"])


def test_loss_and_gradients(golden_variant, goldens):
    g, dit = goldens, load_dit(golden_variant)
    query, value = dit.layers[1].self_attn.to_q.weight, dit.layers[2].cross_attn.to_v.weight
    query.requires_grad_(), value.requires_grad_()
    close(flow.noisy(g["x0"], g["noise"], g["t"]), g["xt"])
    v = dit(g["xt"], g["t"], g["enc_hidden"], g["context_text2music"])
    loss = flow.item_losses(v, flow.velocity(g["x0"], g["noise"]), torch.tensor([21, 21])).mean()
    close(loss, g["loss_nodrop"].reshape(()))
    loss.backward()
    close(query.grad, g["grad_l1_self_q"])
    close(value.grad, g["grad_l2_cross_v"])


def tiny(window: int) -> AceStepDiT:
    torch.manual_seed(0)
    return AceStepDiT(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=window,
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=2, max_size=3), st.integers(0, 2**20))
def test_padded_batch_equals_items_alone(sizes, seed):
    """Output, loss and gradient of unequal songs in one batch, and rubbish in the padding changes nothing."""
    torch.manual_seed(seed)
    dit, frames, tokens = tiny(window=seed % 7 + 1), *(torch.tensor(n) for n in zip(*sizes, strict=True))
    b, t, length = len(sizes), int(frames.max()), int(tokens.max())
    x, noise, condition = torch.randn(b, t, 4), torch.randn(b, t, 4), torch.randn(b, length, 32)
    context, level = torch.randn(b, t, 8), torch.rand(b)
    frame_mask, token_mask = torch.arange(t) < frames[:, None], torch.arange(length) < tokens[:, None]
    rubbish = [value.masked_fill(~mask[..., None], 1e4) for value, mask in
               [(x, frame_mask), (noise, frame_mask), (context, frame_mask), (condition, token_mask)]]  # fmt: skip

    def gradient(losses):
        dit.zero_grad()
        losses.mean().backward()
        return dit.layers[0].self_attn.to_k.weight.grad.clone()

    def loss(x, noise, context, condition, level, frames, *masks):
        v = dit(flow.noisy(x, noise, level), level, condition, context, *masks)
        return v, flow.item_losses(v, flow.velocity(x, noise), frames)

    v, losses = loss(*rubbish, level, frames, token_mask, frame_mask)
    alone = [
        loss(x[i : i + 1, :f], noise[i : i + 1, :f], context[i : i + 1, :f], condition[i : i + 1, :n], level[i : i + 1],
             torch.tensor([f]))
        for i, (f, n) in enumerate(sizes)
    ]  # fmt: skip
    for i, (f, _) in enumerate(sizes):
        close(v[i, :f], alone[i][0][0])
    close(losses, torch.cat([each for _, each in alone]))
    close(gradient(losses), gradient(torch.cat([each for _, each in alone])))


def test_recompute_changes_nothing(golden_variant, goldens):
    g, gradients = goldens, []
    for recompute in ((), range(4)):
        dit = load_dit(golden_variant)
        dit.recompute = frozenset(recompute)
        dit.layers[0].mlp.up_proj.weight.requires_grad_()
        dit(g["xt"], g["t"], g["enc_hidden"], g["context_text2music"]).square().mean().backward()
        gradients.append(dit.layers[0].mlp.up_proj.weight.grad)
    close(*gradients, tolerance=0)


def test_bf16_model_keeps_float32_timesteps(golden_variant, goldens):
    """Timesteps 1e-3 apart are one number in bf16; the embedding must tell them apart all the same."""
    dit = load_dit(golden_variant, dtype=torch.bfloat16)
    near, far = (dit._time(torch.tensor([t]))[0] for t in (0.8980, 0.8990))
    assert torch.tensor(0.8980).bfloat16() == torch.tensor(0.8990).bfloat16()
    assert not torch.equal(near, far)


def test_the_kernel_without_padding_is_not_asked_about_padding():
    """Chosen by hand as well: torch's kernel with windows would attend to padding, so blocks take over."""
    dit, x, condition = tiny(window=2), torch.randn(2, 12, 4), torch.randn(2, 3, 32)
    context, level, frames = torch.randn(2, 12, 8), torch.rand(2), torch.arange(12) < torch.tensor([[12], [7]])
    expected = dit(x, level, condition, context, None, frames)
    dit.kernel = "flash"
    close(dit(x, level, condition, context, None, frames), expected, tolerance=0)
