"""Every knob once, as nested dataclasses.

A value that another section already holds is an interpolation (`II`), so it is typed once and followed everywhere.
"""

from dataclasses import dataclass, field

from omegaconf import II

TASKS = ("vae", "tokenizer", "prior", "mixar")
GUIDANCES = ("none", "dc_mix", "dc_sa", "dc_ca")
PRECISIONS = ("fp32", "bf16")
SOLVERS = ("ddpm", "dpm")
ORDERS = ("random", "checkerboard")
ENGINES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
ATTENTIONS = ("auto", "math", "efficient", "flash", "cudnn", "fa2", "fa3", "fa4")
RECOMPUTE = ("none", "backbone", "head", "all")


@dataclass
class DataConfig:
    """Images and shards."""

    images: str | None = None  # folder of images, or the name of a built-in set (digits, cifar10); `prepare` reads it
    labels: str | None = None  # csv of `file,label` rows; without it the sub-folders are the classes
    shards: str = "data/shards"  # local folder or any URL that streaming takes
    cache: str | None = None  # local folder for remote shards
    image_size: int = 256  # side in pixels after the ADM centre crop
    classes: int = 1000
    count: int | None = None  # images of the set, to plan without shards; the manifest's count wins
    held_out: int = 0  # images kept from training to score on, each class by its share
    flip: bool = True  # each image is seen flipped half of the time
    workers: int = 4  # loader processes a rank
    max_broken: float = 0.01  # share of unreadable images above which `prepare` stops


@dataclass
class VAEConfig:
    """KL autoencoder of the LDM family: VA-VAE f16d32 as it stands, MAR's KL-16 with two values changed."""

    weights: str | None = None  # an export folder, or a public checkpoint file
    width: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    attention: list[int] = field(default_factory=lambda: [16])  # feature-map sides with self-attention
    decoder_attention: bool = True  # False: MAR's KL-16 has it in the decoder's middle only
    latent_channels: int = 32
    latent_scale: float | None = None  # MAR's 0.2325; None: per-channel statistics from the shards' manifest
    image_size: int = II("data.image_size")
    kl_weight: float = 1e-6  # training only

    @property
    def grid(self) -> int:
        """Latent positions along a side."""
        return self.image_size >> (len(self.multipliers) - 1)


@dataclass
class TokenizerConfig:
    """MaskBit's lookup-free tokenizer."""

    weights: str | None = None
    width: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    blocks: int = 2
    decoder_blocks: int | None = None  # None: as many as `blocks`
    bits: int = 14
    image_size: int = II("data.image_size")
    commitment_weight: float = 0.25  # training only, as the three below
    entropy_weight: float = 0.02
    entropy_temperature: float = 0.01
    entropy_gamma: float = 1.0

    @property
    def grid(self) -> int:
        """Discrete tokens along a side."""
        return self.image_size >> (len(self.multipliers) - 1)


@dataclass
class PriorConfig:
    """MaskBit's generator (LFQBert), the discrete prior g_M."""

    weights: str | None = None
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 4096
    dropout: float = 0.1
    prenorm: bool = False  # all public models are post-norm
    bits: int = II("tokenizer.bits")
    splits: int = 2  # sub-tokens a position
    grid: int = II("model.grid")
    classes: int = II("data.classes")
    class_drop_prob: float = 0.1
    label_smoothing: float = 0.1


@dataclass
class ModelConfig:
    """MAR's backbone and diffusion head, and how the discrete tokens enter."""

    guidance: str = "dc_mix"  # none | dc_mix | dc_sa | dc_ca
    grid: int = 16  # token positions along a side
    patch: int = 1  # latent cells along a side of a token
    latent_channels: int = II("vae.latent_channels")
    code_bits: int = II("tokenizer.bits")
    classes: int = II("data.classes")
    class_tokens: int = 64
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = II("model.encoder_width")
    decoder_depth: int = II("model.encoder_depth")
    decoder_heads: int = II("model.encoder_heads")
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    dropout: float = 0.1
    class_drop_prob: float = 0.1
    guidance_drop_prob: float = 0.0  # also drop the discrete tokens, so that guidance on them can be tried
    head_depth: int = 6
    head_width: int = 1024
    separable_adaln: bool = False  # not MAR's: modulate the head by time and by condition apart, for half of its work
    diffusion_batch_mul: int = 4  # noise levels a masked token a step
    attention: str = "auto"  # auto: torch chooses | math | efficient | flash | cudnn | fa2 | fa3 | fa4

    @property
    def tokens(self) -> int:
        """N, the positions of an image."""
        return self.grid**2

    @property
    def token_dim(self) -> int:
        """d_c, the channels of a token."""
        return self.latent_channels * self.patch**2


@dataclass
class MaskConfig:
    """The training mask (Eq. 8): r ~ normal(1, std) truncated to [minimum, 1]."""

    minimum: float = 0.7
    std: float = 0.25
    ratio_scope: str = "image"  # image: stratified over groups; batch: the reference's one ratio a batch
    group: int = 16  # images a group; divides the micro-batch


@dataclass
class TIMixConfig:
    """TI-Mix (Eqs. 10-12)."""

    enabled: bool = False
    source: str = "online"  # online: run the prior in the step; shards: tokens drawn beforehand by `prepare`
    draw: str = "sample"  # sample | argmax
    start_epoch: float = 200.0  # until here λ = 1
    duration_epochs: float = 200.0  # λ then falls from 1 to `end`
    end: float = 0.0
    schedule: str = "linear"  # linear | cosine | constant
    variants: int = 4  # source=shards: pre-drawn (order, tokens) pairs an image


@dataclass
class OptimConfig:
    """AdamW. MAR's recipe by default."""

    lr: float = 1e-4  # a 256 images of global batch
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.02
    warmup_epochs: float = 100.0
    schedule: str = "constant"  # after the warm-up: constant | cosine | linear, the latter two to zero
    implementation: str = "torch"  # torch: its fused AdamW | apex: NVIDIA's FusedAdam
    clip: float = 3.0  # global gradient norm; 0 is off
    ema: float = 0.9999
    ema_warmup: bool = False  # ramp the decay as (1 + n) / (10 + n) first


@dataclass
class TrainConfig:
    """The length and the rhythm of a run."""

    epochs: float = 400.0
    batch: int = 2048  # global, over all ranks and accumulation steps
    micro_batch: int | None = None  # a rank and pass; None: batch / ranks
    precision: str = "bf16"  # bf16: autocast, with float32 weights, loss, norms and EMA; fp32
    log_every: int = 50  # steps
    checkpoint_every: float = 1.0  # epochs
    keep: int = 3  # checkpoints kept
    samples_every: float = 10.0  # epochs between sample grids; 0 is off
    max_skips: int = 10  # consecutive non-finite steps skipped before the run stops


@dataclass
class EngineConfig:
    """How the training is laid over processes and devices. Nothing here changes what is computed."""

    name: str | None = None  # ddp | fsdp | hsdp | zero1 | zero2 | zero3; None: by the launcher and the number of nodes
    recompute: str = "none"  # activations to compute again in the backward pass: none | backbone | head | all
    compile: bool = False  # each block through torch.compile, as one graph
    deepspeed: str | None = None  # a JSON file, merged over the configuration that DeepSpeed gets from this one
    timeout: float = 600.0  # seconds without a finished step until the stacks of all ranks are logged and the run ends


@dataclass
class SampleConfig:
    """Sampling settings; a paper row's config holds its own."""

    steps: int = 64  # K, autoregressive steps
    order: str = "random"  # of the positions: random | checkerboard, coarse to fine, whose second half takes two steps
    solver: str = "ddpm"  # ddpm: ancestral, as the reference | dpm: DPM-Solver++(2M), for few diffusion steps
    diffusion_steps: str = "100"  # S, respacing of the 1000 training steps: "100", "ddim50", or "10,5"
    diffusion_steps_end: int | None = None  # DiSA: the diffusion steps fall linearly to these over the K steps
    diffusion_start: int = 999  # training step that denoising starts from; a short training is unstable near 999
    guidance: float = 3.0  # 1 is none
    guidance_schedule: str = "linear"  # linear | constant
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # share of the K steps that are guided
    temperature: float = 1.0  # of the noise that ddpm adds
    prior_steps: int = 64
    prior_guidance: float = 7.1  # 0 is none
    prior_guidance_schedule: str = "cosine"  # none | linear | cosine
    prior_guidance_power: float = 3.0
    prior_temperature: float = 1.0
    prior_randomize: float = 7.8  # scale of the annealed Gumbel noise on the confidences
    prior_mask_schedule: str = "arccos"  # arccos | cosine
    prior_annealing: bool = False  # softmax temperature 0.5 + 0.8 (1 - progress)
    seed: int = 0
    batch: int = 64


@dataclass
class Config:
    """One run."""

    task: str = "mixar"  # what is trained: vae | tokenizer | prior | mixar
    run_dir: str = "runs/default"
    seed: int = 0
    trust_pickle: bool = False  # read checkpoints that hold more than tensors, which runs code from the file
    init_from: str | None = None  # weights to start from, by name; what is missing or misshapen starts new
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
