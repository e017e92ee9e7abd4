"""Every key once, as nested dataclasses, with the range of each number and the choices of each word.

A value that another section defines is an interpolation (`II`), so that it is set in one place.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from mixar.config.respacing import RESPACINGS

TOKENIZERS = ("maskbit", "vq")
TASKS = ("vae", "tokenizer", "prior", "mixar")
GUIDANCES = ("none", "dc_mix", "dc_sa", "dc_ca")
PROCESSES = tuple(RESPACINGS)
PRECISIONS = ("fp32", "bf16")
SOLVERS = ("ddpm", "dpm")
ORDERS = ("random", "checkerboard")
ENGINES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
ATTENTIONS = ("auto", "math", "efficient", "flash", "cudnn", "fa2", "fa3", "fa4")
RECOMPUTE = ("none", "backbone", "head", "all")

# larger than any network that can be trained, and small enough to compute a plan
_SIDE, _WIDTH, _DEPTH, MOST_CLASSES = 2**14, 2**16, 2**10, 2**24
_IMAGES, _EPOCHS = 10**12, 10**6
LEVELS = 15  # at most, per codec: these halve the largest image to one position
JUDGED = 24  # pixels along the side of the smallest image for which the patch discriminator has a logit


def stride(multipliers: list[int]) -> int:
    """Pixels along the side of a position of a codec, whose levels except the last halve the image."""
    return 2 ** max(0, len(multipliers) - 1)


def _range(low: float, high: float) -> dict[str, Any]:
    """The range of a number or of each in a list: values outside would fail, or never end, much later."""
    return {"limits": (low, high)}


def _number(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata=_range(low, high))


def _word(default: str | None, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass
class DataConfig:
    """Images and shards."""

    images: str | None = None  # folder of images, or the name of a built-in set (digits, cifar10); `prepare` reads it
    labels: str | None = None  # csv of `file,label` rows; without it the sub-folders are the classes
    shards: str = "data/shards"  # local folder or any URL that streaming supports
    cache: str | None = None  # local folder for remote shards
    image_size: int = _number(256, 1, _SIDE)  # side in pixels after the ADM centre crop
    classes: int = _number(1000, 1, MOST_CLASSES)  # number of classes; labels are 0 to classes - 1
    count: int | None = _number(None, 1, _IMAGES)  # images, to plan without shards; the manifest's count has priority
    held_out: int = _number(0, 0, _IMAGES)  # images kept from training for scores, in proportion per class
    flip: bool = True  # flip each image with probability 1/2
    workers: int = _number(4, 0, 1024)  # loader processes per rank
    max_broken: float = _number(0.01, 0, 0.99)  # share of unreadable images above which `prepare` stops


@dataclass
class CodecLosses:
    """What both codecs may be trained with beside their own losses."""

    perceptual_weight: float = _number(0.0, 0, 1e6)  # weight of the perceptual loss, 0 is off; training only
    # of the perceptual loss: the folder of a classifier's export, or a file of torch-fidelity's InceptionV3
    perceptual_features: str | None = None
    discriminator_weight: float = _number(0.0, 0, 1e6)  # weight of the adversarial loss, 0 is off; training only
    # epoch from which the codec is trained against the discriminator, which itself learns from the first step
    discriminator_start: float = _number(0.0, 0, _EPOCHS)
    discriminator_width: int = _number(64, 1, _WIDTH)  # channels of the discriminator's first layer; then 2, 4, 8 times


@dataclass
class VAEConfig(CodecLosses):
    """KL autoencoder of the LDM family: VA-VAE f16d32 by default, MAR's KL-16 with two changed values."""

    weights: str | None = None  # an export folder, or a public checkpoint file
    width: int = _number(128, 1, _WIDTH)  # channels of the first level
    # multiples of the width, one per level; every level but the last halves the side
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4], metadata=_range(1, 64))
    blocks: int = _number(2, 1, 64)  # residual blocks per level of the encoder; the decoder has one more
    # levels with self-attention: 0 is the finest, -1 the deepest
    attention_levels: list[int] = field(default_factory=lambda: [-1], metadata=_range(-LEVELS, LEVELS - 1))
    decoder_attention: bool = True  # False: only in the decoder's middle, as in MAR's KL-16
    # most groups of a norm; groups of less than 4 channels lose colour, so write fewer where the width is small
    norm_groups: int = _number(32, 1, _WIDTH)
    latent_channels: int = _number(32, 1, _WIDTH)  # channels of the latents
    latent_scale: float | None = _number(None, 1e-6, 1e6)  # MAR's 0.2325; None: statistics of the shards per channel
    kl_weight: float = _number(1e-6, 0, 1e6)  # weight of the loss's KL term; training only

    @property
    def stride(self) -> int:
        """Pixels along the side of a latent position."""
        return stride(self.multipliers)


@dataclass
class TokenizerConfig(CodecLosses):
    """The discrete tokenizer: MaskBit's with binary codes, or a VQ with learned codes."""

    weights: str | None = None  # an export folder, or a public checkpoint file
    kind: str = _word("maskbit", *TOKENIZERS)  # maskbit: a code is the signs of its bits; vq: codes are learned
    width: int = _number(128, 1, _WIDTH)  # channels of the first level
    # multiples of the width, one per level; every level but the last halves the side
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4], metadata=_range(1, 64))
    blocks: int = _number(2, 1, 64)  # residual blocks per level
    decoder_blocks: int | None = _number(None, 1, 64)  # None: as many as `blocks`
    # most groups of a norm; groups of less than 4 channels lose colour, so write fewer where the width is small
    norm_groups: int = _number(32, 1, _WIDTH)
    bits: int = _number(14, 1, 24)  # bits per token: 2^bits codes
    code_dim: int | None = _number(None, 1, _WIDTH)  # channels per learned code; None: binary codes
    commitment_weight: float = _number(0.25, 0, 1e6)  # weight of the commitment loss; training only
    entropy_weight: float = _number(0.02, 0, 1e6)  # weight of the entropy loss; training only
    entropy_temperature: float = _number(0.01, 1e-6, 1e6)  # temperature of the distances to the codes; training only
    entropy_gamma: float = _number(1.0, 0, 1e6)  # entropy per batch relative to that per token; training only

    @property
    def stride(self) -> int:
        """Pixels along the side of a discrete token."""
        return stride(self.multipliers)


@dataclass
class PriorConfig:
    """MaskBit's generator (LFQBert), the discrete prior g_M."""

    weights: str | None = None  # an export folder, or a public checkpoint file
    width: int = _number(1024, 1, _WIDTH)  # width of the transformer
    depth: int = _number(24, 1, _DEPTH)  # transformer blocks
    heads: int = _number(16, 1, _WIDTH)  # attention heads; they divide the width
    mlp_width: int = _number(4096, 1, _WIDTH)  # hidden units of each MLP
    dropout: float = _number(0.1, 0, 0.99)  # training only
    prenorm: bool = False  # all public models are post-norm
    bits: int = II("tokenizer.bits")  # bits per token
    splits: int = _number(2, 1, 24)  # sub-tokens per position
    grid: int = II("model.grid")  # token positions along a side
    classes: int = II("data.classes")  # number of classes
    class_drop_prob: float = _number(0.1, 0, 1)  # share of images that are trained without their class
    label_smoothing: float = _number(0.1, 0, 1)  # of the cross-entropy


@dataclass
class ModelConfig:
    """MAR's backbone and head, and the guidance by discrete tokens."""

    guidance: str = _word("dc_mix", *GUIDANCES)  # how discrete tokens enter; none: not at all, which is MAR
    process: str = _word("ddpm", *PROCESSES)  # of the head: the paper's DDPM, or flow matching with velocity prediction
    grid: int = _number(MISSING, 1, _SIDE)  # token positions along a side; default: as many as cover the latents
    patch: int = _number(1, 1, _SIDE)  # latent cells along a side of a token
    latent_channels: int = II("vae.latent_channels")  # channels of the latents
    code_bits: int = II("tokenizer.bits")  # bits per discrete token
    code_dim: int | None = II("tokenizer.code_dim")  # channels per learned code of the tokenizer
    classes: int = II("data.classes")  # number of classes
    class_tokens: int = _number(64, 1, _WIDTH)  # S, class tokens before the sequence
    encoder_width: int = _number(768, 1, _WIDTH)  # D of the encoder
    encoder_depth: int = _number(12, 1, _DEPTH)  # transformer blocks of the encoder
    encoder_heads: int = _number(12, 1, _WIDTH)  # attention heads of the encoder; they divide the width
    decoder_width: int = _number(II("model.encoder_width"), 1, _WIDTH)  # D of the decoder
    decoder_depth: int = _number(II("model.encoder_depth"), 1, _DEPTH)  # transformer blocks of the decoder
    # attention heads of the decoder; they divide the width
    decoder_heads: int = _number(II("model.encoder_heads"), 1, _WIDTH)
    mlp_ratio: float = _number(4.0, 1, 64)  # hidden units of each MLP per unit of width
    norm_eps: float = _number(1e-6, 1e-12, 1)  # epsilon of the layer norms
    dropout: float = _number(0.1, 0, 0.99)  # training only
    # share of images that are trained without their class, for classifier-free guidance
    class_drop_prob: float = _number(0.1, 0, 1)
    guidance_drop_prob: float = _number(0.0, 0, 1)  # share without discrete tokens, to try guidance on them
    head_depth: int = _number(6, 1, _DEPTH)  # residual blocks of the diffusion head
    head_width: int = _number(1024, 1, _WIDTH)  # units of the diffusion head
    separable_adaln: bool = False  # not in MAR: modulate the head separately by time and condition, at half of its cost
    diffusion_batch_mul: int = _number(4, 1, 1024)  # noise levels per masked token and step
    attention: str = _word("auto", *ATTENTIONS)  # auto: torch chooses

    @property
    def tokens(self) -> int:
        """N, the token positions per image."""
        return self.grid**2

    @property
    def token_dim(self) -> int:
        """C, the channels of a continuous token."""
        return self.latent_channels * self.patch**2


@dataclass
class MaskConfig:
    """The training mask (Eq. 8): r ~ normal(1, std) truncated to [minimum, 1]."""

    minimum: float = _number(0.7, 0, 1)  # lowest share of masked positions
    std: float = _number(0.25, 1e-6, 1e3)  # standard deviation before truncation
    ratio_scope: str = _word("image", "image", "batch")  # image: stratified over groups; batch: one ratio per batch
    group: int = _number(16, 1, 2**24)  # images per group; divides the micro-batch


@dataclass
class TIMixConfig:
    """TI-Mix (Eqs. 10-12)."""

    enabled: bool = False  # mix tokens that the prior draws with the true ones
    # online: run the prior in the step; shards: tokens drawn beforehand by `prepare`
    source: str = _word("online", "online", "shards")
    draw: str = _word("sample", "sample", "argmax")  # how tokens are taken from the prior
    start_epoch: float = _number(200.0, 0, _EPOCHS)  # λ = 1 until this epoch
    duration_epochs: float = _number(200.0, 0, _EPOCHS)  # λ then falls from 1 to `end`
    end: float = _number(0.0, 0, 1)  # λ after the schedule
    # shape of the fall of λ; constant: λ is `end` from start_epoch on
    schedule: str = _word("linear", "linear", "cosine", "constant")
    variants: int = _number(4, 1, 1024)  # source=shards: pre-drawn (order, tokens) pairs per image


@dataclass
class OptimConfig:
    """AdamW, by default with MAR's recipe."""

    lr: float = _number(1e-4, 0, 1e30)  # for a global batch of 256 images; scales with train.batch
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata=_range(0, 0.999999))  # AdamW's β1 and β2
    weight_decay: float = _number(0.02, 0, 1e3)  # of AdamW; for MixAR not of vectors and the diffusion head
    warmup_epochs: float = _number(100.0, 0, _EPOCHS)  # epochs of linear warm-up from 0
    schedule: str = _word("constant", "constant", "cosine", "linear")  # after the warm-up; the latter two end at 0
    implementation: str = _word("torch", "torch", "apex")  # torch: its fused AdamW | apex: NVIDIA's FusedAdam
    clip: float = _number(3.0, 0, 1e30)  # global gradient norm to clip at; 0 is off
    ema: float = _number(0.9999, 0, 0.9999999)  # decay per step of the averaged weights
    ema_warmup: bool = False  # ramp the decay as (1 + n) / (10 + n) first


@dataclass
class TrainConfig:
    """The length of a run, its batch, and the intervals of its reports and checkpoints."""

    epochs: float = _number(400.0, 0, _EPOCHS)  # length of the run, in passes over the training images
    batch: int = _number(2048, 1, 2**24)  # global, over all ranks and accumulation steps
    micro_batch: int | None = _number(None, 1, 2**24)  # most images per rank and pass; None: batch / ranks
    precision: str = _word("bf16", *PRECISIONS)  # bf16: autocast, with float32 weights, loss, norms and EMA; fp32
    log_every: int = _number(50, 1, 10**9)  # steps between log lines
    checkpoint_every: float = _number(1.0, 0, _EPOCHS)  # epochs between checkpoints
    keep: int = _number(3, 1, 10**6)  # number of newest checkpoints to keep
    samples_every: float = _number(10.0, 0, _EPOCHS)  # epochs between sample grids; 0 is off
    max_skips: int = _number(10, 0, 10**9)  # consecutive non-finite steps skipped before the run stops
    profile: str | None = None  # FIRST:COUNT: trace these steps of rank 0 into the run's tb/; the first step is 0


@dataclass
class EngineConfig:
    """The layout of the training over processes and devices, which does not change the results."""

    name: str | None = _word(None, *ENGINES)  # None: by the launcher and the number of nodes
    recompute: str = _word("none", *RECOMPUTE)  # activations to recompute in the backward pass
    compile: bool | None = None  # compile each block by torch.compile; None: on a GPU
    deepspeed: str | None = None  # a JSON file, merged over DeepSpeed's configuration by mixar
    # seconds without a finished step, after which the stacks of all ranks are logged and the run ends
    timeout: float = _number(600.0, 1, 10**7)

    def compiles(self, gpu: bool, zero3: bool = False) -> bool:
        """Whether blocks are compiled: as `compile` says, else on a GPU.

        Not under ZeRO-3 by default, which gathers the weights of each layer by hooks inside the blocks: they would cut
        the graphs to pieces.
        """
        return (gpu and not zero3) if self.compile is None else self.compile


@dataclass
class SampleConfig:
    """Sampling settings; each config of the paper's rows has its own."""

    steps: int = _number(64, 1, 2**20)  # K, autoregressive steps
    order: str = _word("random", *ORDERS)  # of the positions; checkerboard: coarse to fine
    solver: str = _word("ddpm", *SOLVERS)  # ddpm: ancestral, also of flow; dpm: DPM-Solver++(2M), for few steps
    diffusion_steps: str = "100"  # S, respacing of the 1000 training steps: "100", "ddim50", or "10,5"
    diffusion_steps_end: int | None = _number(None, 1, 1000)  # DiSA: the count falls linearly to this over the K steps
    diffusion_start: int = _number(999, 0, 999)  # training step that denoising starts from
    cfg_scale: float = _number(3.0, 0, 1e3)  # scale of classifier-free guidance; 1 is none
    # over the K steps; linear: grows with the share of revealed tokens
    cfg_schedule: str = _word("linear", "linear", "constant")
    # interval of the K steps with guidance, as shares
    cfg_interval: list[float] = field(default_factory=lambda: [0.0, 1.0], metadata=_range(0, 1))
    temperature: float = _number(1.0, 0, 1e3)  # scale of the noise that ddpm adds
    prior_steps: int = _number(64, 1, 2**24)  # steps in which the prior draws the discrete tokens
    prior_cfg_scale: float = _number(7.1, 0, 1e3)  # 0 is none
    prior_cfg_schedule: str = _word("cosine", "none", "linear", "cosine")  # over the prior's steps
    prior_cfg_power: float = _number(3.0, 0, 1e3)  # exponent of the cosine schedule
    prior_temperature: float = _number(1.0, 1e-6, 1e6)  # of the prior's softmax
    prior_randomize: float = _number(7.8, 0, 1e6)  # scale of the annealed Gumbel noise on the confidences
    # number of tokens that stay masked after each of the prior's steps
    prior_mask_schedule: str = _word("arccos", "arccos", "cosine")
    prior_annealing: bool = False  # softmax temperature 0.5 + 0.8 (1 - progress)
    seed: int = _number(0, 0, 2**62)  # of the first image; image i has seed + i
    batch: int = _number(64, 1, 2**20)  # images drawn at once


@dataclass
class Config:
    """The config of a run."""

    task: str = _word("mixar", *TASKS)  # the network to train
    run_dir: str = "runs/default"  # folder of the run: config, logs, checkpoints, exports, samples
    seed: int = _number(0, 0, 2**32 - 1)  # of the initial weights and of every random number in training
    trust_pickle: bool = False  # read checkpoints with more than tensors, which runs code from the file
    init_from: str | None = None  # weights to start from, by name; missing or misshapen ones are initialised
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    ti_mix: TIMixConfig = field(default_factory=TIMixConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @property
    def latent_grid(self) -> int:
        """Latent positions along a side."""
        return self.data.image_size // self.vae.stride

    @property
    def code_grid(self) -> int:
        """Discrete tokens along a side."""
        return self.data.image_size // self.tokenizer.stride
