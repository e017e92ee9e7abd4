"""The bytes of activations that autograd keeps for the backward pass, computed from the architecture.

The dtypes are those of autocast on CUDA: matrices in bf16, layer norms in float32, one byte per value for dropout
masks. Attention weights are not kept.
"""

from mixar.config import ModelConfig
from mixar.model import guidance_of, process_of
from mixar.model.head import TimestepEmbedder
from mixar.plan.work import Tokens

_F32 = 4
_STATISTICS = 2 * _F32  # mean and inverse standard deviation of a layer norm, per token


def activation_bytes(cfg: ModelConfig, tokens: Tokens, precision: str, recompute: str) -> dict[str, float]:
    """Bytes per image that the backbone and the head keep, without weights and without autocast's copies of them.

    A recomputed part keeps only the inputs of its blocks. `again` is then the size of the largest block, since the
    backward pass holds one complete block at a time.
    """
    e = 2 if precision == "bf16" else 4
    enc, dec, w = cfg.encoder_width, cfg.decoder_width, cfg.head_width

    encoder = _block(cfg, enc, cfg.encoder_heads, tokens.encoder, tokens.encoder, e)
    decoder = _block(cfg, dec, cfg.decoder_heads, tokens.decoder, tokens.decoder, e)
    last = _block(cfg, dec, cfg.decoder_heads, tokens.decoder, tokens.masked, e)
    last += tokens.masked * e * dec  # the selected queries
    # shift | scale | gate, input of the first linear, of silu, of the second linear, its output
    residual = tokens.rows * (7 * e * w + 2 * _F32 * w + _STATISTICS)  # and the norm's input and output
    again = []
    if recompute in ("backbone", "all"):
        again += [encoder, decoder]
        encoder, decoder = _F32 * enc * tokens.encoder, _F32 * dec * tokens.decoder
        last = decoder
    if recompute in ("head", "all"):
        again += [residual]
        residual = tokens.rows * e * w

    backbone = (
        cfg.encoder_depth * encoder
        + (cfg.decoder_depth - 1) * decoder
        + last
        + cfg.tokens * e * cfg.token_dim  # input of z_proj
        + tokens.encoder * (2 * (_F32 * enc + _STATISTICS) + e * enc)  # z_proj_ln, encoder_norm, input of decoder_embed
        + tokens.masked * (_F32 * dec + _STATISTICS)  # decoder_norm
        + _memory(cfg, e)
    )
    # inputs of the time MLP's maps and of its silu, and of the condition's map; input and output of the silu after them
    embedded = tokens.times * e * (TimestepEmbedder.features + 2 * w) + tokens.masked * e * dec
    embedded += (tokens.masked + tokens.times if cfg.separable_adaln else tokens.rows) * 2 * e * w
    final = 2 * e * w + 3 * _F32 * w + _STATISTICS  # shift | scale; the norm's input and output, input of the linear
    loss = process_of(cfg.process).loss_bytes(cfg.token_dim)
    head = cfg.head_depth * residual + embedded + tokens.rows * (e * cfg.token_dim + final + loss)
    return {"backbone": backbone, "head": head, "again": max(again, default=0.0)}


def _block(cfg: ModelConfig, width: int, heads: int, tokens: float, wanted: float, e: int) -> float:
    """Bytes per image of a backbone block on `tokens` tokens, `e` bytes per value of autocast's dtype.

    Args:
        wanted: the number of tokens that it returns.
    """
    mask = int(cfg.dropout > 0)
    hidden = int(width * cfg.mlp_ratio)
    norm = _F32 * width + _STATISTICS + e * width
    attended = 2 * e * width + _F32 * heads + mask * width  # output, the same packed, log-sum-exp, dropout mask
    kept = tokens * (norm + 3 * e * width)
    kept += wanted * (attended + norm + 2 * e * hidden + mask * (hidden + width))
    memory = guidance_of(cfg).memory_tokens
    if not memory:
        return kept
    crossed = wanted * (2 * e * width + attended) + memory * 2 * e * width  # input and queries; keys and values
    casts = memory * 2 * e * cfg.encoder_width if e == 2 else 0  # of the memory, for keys and for values
    return kept + crossed + casts


def _memory(cfg: ModelConfig, e: int) -> float:
    """Bytes per image of the guidance's memory, computed once for the encoder and once for the decoder."""
    kept = 1 if e == 2 else 2  # the input of its norm; in float32 also the output, since blocks do not cast it
    return 2 * guidance_of(cfg).memory_tokens * kept * _F32 * cfg.encoder_width
