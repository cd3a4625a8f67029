"""The published numbers and claims of CODA (arXiv:2503.17760), as data: each report sets its own beside these."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

PAPER = "arXiv:2503.17760"


# What each measured column is called, and which direction is better (+1 larger, -1 smaller). The last are not the
# paper's: they are measured here with other networks, and so under other names.
COLUMNS = {
    "quantization_error": ("Quantization error", -1),
    "rfid": ("rFID", -1),
    "psnr": ("PSNR (dB)", +1),
    "psnr_continuous": ("PSNR of the VAE (dB)", +1),
    "psnr_loss": ("PSNR lost (dB)", -1),
    "ssim": ("SSIM", +1),
    "utilization": ("Utilization", +1),
    "fid": ("FID", -1),
    "kid": ("KID", -1),
    "lpips": ("LPIPS", -1),
    "perplexity": ("Perplexity", +1),
    "bits_per_pixel": ("Bits per pixel", 0),
    "coded_bits_per_pixel": ("Bits per pixel, coded", 0),
    "fd_effnet": ("FD-EfficientNet", -1),
    "kd_effnet": ("KD-EfficientNet", -1),
    "rkid": ("rKID", -1),
    "relative_error": ("Relative error", -1),
    "perceptual_vgg": ("LPIPS (VGG)", -1),
    "perceptual_effnet": ("EfficientNet distance", -1),
    "inception_score": ("Inception Score", +1),
    "precision": ("Precision", +1),
    "recall": ("Recall", +1),
    "class_accuracy": ("Asked class seen", +1),
}


# The smallest gain that a reader should care about, fixed before the runs: the unit of a gain is `gain`'s.
SMALLEST_GAINS = {
    "quantization_error": 0.02,  # relative
    "relative_error": 0.02,  # relative
    "rfid": 0.02,  # relative, as all Fréchet distances
    "fid": 0.02,
    "fd_effnet": 0.02,
    "kid": 0.02,
    "kd_effnet": 0.02,
    "psnr": 0.1,  # dB
    "ssim": 0.005,
    "utilization": 0.05,  # of all codes
    "utilization floor": 0.0,  # above 95 % of all codes
    "gap closed": 0.0,  # of the gap to the continuous VAE, above one half
    "iterations": 0.0,  # relative to SIX_TIMES fewer
    "token_change": 0.05,  # of all tokens
    "coverage": 0.02,  # of the latents
}
USED = 0.95  # "every code": this fraction of them
SIX_TIMES = 5.5  # "six times fewer": more than this, which rounds to six


def title_and_direction(column: str) -> tuple[str, int]:
    """What readers call a measured column, and whether larger (+1) or smaller (-1) is better, 0 where neither is.

    What follows an @ is the side in pixels of the images that a network sees.
    """
    name, at, side = column.partition("@")
    title, direction = COLUMNS.get(name, (name.replace("_", " ").capitalize(), 0))
    return title + (at and f" at {side} px"), direction


def gain(metric: str, before: float, after: float) -> float:
    """How much better AFTER is than BEFORE: the relative fall of errors and distances, else the difference."""
    if title_and_direction(metric)[1] < 0:
        return 1 - after / before
    return after - before


@dataclass(frozen=True)
class Row:
    """One published row; None where the paper gives no number.

    Units: ratio is image side / latent side; codebook_size in codes; quantization_error is a mean square; psnr in dB;
    utilization the fraction of codes used, 0 to 1; iterations are training steps converted to a global batch of 256;
    parameters in millions of weights; steps are network evaluations for one sample.
    """

    method: str
    ratio: int | None = None
    codebook_size: int | None = None
    quantization_error: float | None = None
    rfid: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    utilization: float | None = None
    iterations: int | None = None
    kind: str | None = None
    parameters: float | None = None
    steps: int | None = None
    fid: float | None = None
    extra_data: bool = False  # marked with a dagger: trained on more than ImageNet
    continuous: bool = False  # a continuous VAE, printed in grey for reference

    def published(self) -> dict[str, float]:
        """The row's numbers by column name, those that the paper leaves open left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "method"}
        return {
            name: value for name, value in values.items() if value is not None and not isinstance(value, bool | str)
        }


@dataclass(frozen=True)
class Table:
    """One published table: its number, what it shows, how it was measured, and its rows by method name."""

    number: str
    title: str
    protocol: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def __getitem__(self, method: str) -> Row:
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(f"expected a row of Table {self.number}, {[row.method for row in self.rows]}, got {method!r}")

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


IMAGENET_RECONSTRUCTION = (
    "ImageNet 256 x 256: rFID (TF-ported InceptionV3, 2048 features), PSNR and SSIM over the 50,000 validation images"
)
MAR_SETTING = f"{IMAGENET_RECONSTRUCTION}; the MAR VAE (16x), 10 residual levels, 10 epochs at batch 512"


TABLE_1 = Table(
    number="1",
    title="From a continuous VAE to the CODA tokenizer, one design component at a time",
    protocol=f"{MAR_SETTING}; 65,536 codes",
    columns=("quantization_error", "rfid", "psnr", "ssim", "utilization"),
    rows=(
        Row("Continuous VAE", rfid=0.69, psnr=24.9, ssim=0.716, continuous=True),
        Row("Vector quantization", quantization_error=0.181, rfid=41.52, psnr=18.9, ssim=0.461, utilization=0.49),
        Row("+ residual quantization", quantization_error=0.094, rfid=14.23, psnr=20.6, ssim=0.533, utilization=0.51),
        Row("+ attention quantization", quantization_error=0.065, rfid=7.06, psnr=21.4, ssim=0.571, utilization=1.0),
        Row("+ adapted VAE", quantization_error=0.001, rfid=1.34, psnr=22.2, ssim=0.602, utilization=1.0),
    ),
)


TABLE_2 = Table(
    number="2",
    title="Reconstruction on ImageNet",
    protocol=f"{IMAGENET_RECONSTRUCTION}; training iterations converted to a global batch of 256",
    columns=("ratio", "codebook_size", "rfid", "psnr", "ssim", "utilization", "iterations"),
    rows=(
        Row("VQGAN 1024", 16, 1024, rfid=7.94, psnr=19.4, ssim=0.500, utilization=0.44, iterations=300_000),
        Row("VQGAN 16384", 16, 16384, rfid=4.98, psnr=19.9, ssim=0.510, utilization=0.059, iterations=300_000),
        Row("DF-VQGAN", 16, 12288, rfid=5.16),
        Row("DQVAE", 16, 1024, rfid=4.08, iterations=250_000),
        Row("DiVAE", 16, 16384, rfid=4.07),
        Row("VQGAN-LC 16384", 16, 16384, rfid=3.01, psnr=23.2, ssim=0.564, utilization=0.99, iterations=100_000),
        Row("VQGAN-LC 100000", 16, 100_000, rfid=2.62, psnr=23.8, ssim=0.589, utilization=0.99, iterations=100_000),
        Row("LlamaGen", 16, 16384, rfid=2.19, psnr=20.8, ssim=0.675, utilization=0.97, iterations=200_000),
        Row("RQVAE", None, 16384, rfid=2.69, iterations=250_000),
        Row("BAE", 16, 65536, rfid=3.32, iterations=2_000_000),
        Row("MaskBit", 16, 16384, rfid=1.61, iterations=1_350_000),
        Row("CODA MAR 16384", 16, 16384, rfid=1.43, psnr=22.0, ssim=0.594, utilization=1.0, iterations=50_000),
        Row("CODA MAR 65536", 16, 65536, rfid=1.34, psnr=22.2, ssim=0.602, utilization=1.0, iterations=50_000),
        Row("MAR VAE", 16, rfid=0.69, psnr=24.9, ssim=0.716, continuous=True),
        Row("VQGAN 8x", 8, 16384, rfid=1.14, psnr=23.4, ssim=0.670, utilization=0.054, extra_data=True),
        Row("ViT-VQGAN 8x", 8, 8192, rfid=1.28),
        Row("DF-VQGAN 8x", 8, 8192, rfid=1.38),
        Row("DiVAE 8x", 8, 16384, rfid=1.28),
        Row("OmniTokenizer", 8, 8192, rfid=1.11, psnr=24.0, ssim=0.752, utilization=1.0, extra_data=True),
        Row("CODA FLUX 65536", 8, 65536, rfid=0.43, psnr=25.9, ssim=0.771, utilization=1.0, iterations=50_000),
        Row("FLUX VAE", 8, rfid=0.17, psnr=31.1, ssim=0.903, continuous=True),
    ),
)


TABLE_3 = Table(
    number="3",
    title="Class-conditional generation on ImageNet",
    protocol="ImageNet 256 x 256: FID, of 50,000 samples as is usual; MaskGIT 500,000 steps at batch 2048",
    columns=("kind", "parameters", "steps", "fid"),
    rows=(
        Row("ADM", kind="diffusion", parameters=554, steps=250, fid=10.94),
        Row("LDM-4-G", kind="diffusion", parameters=400, steps=250, fid=3.60),
        Row("DiT-L/2", kind="diffusion", parameters=458, steps=250, fid=5.02),
        Row("UViT-L/2", kind="diffusion", parameters=287, steps=50, fid=3.40),
        Row("LDM-4-G, DPM-Solver", kind="diffusion", parameters=400, steps=8, fid=4.56),
        Row("DiT-XL/2, DPM-Solver", kind="diffusion", parameters=675, steps=8, fid=5.18),
        Row("RQVAE-GPT", kind="autoregressive", parameters=480, steps=256, fid=15.7),
        Row("VQGAN-LC-GPT", kind="autoregressive", parameters=404, steps=256, fid=15.4),
        Row("ViT-VQGAN-GPT", kind="autoregressive", parameters=650, steps=1024, fid=8.81),
        Row("RQ-Transformer", kind="autoregressive", parameters=3800, steps=64, fid=7.55),
        Row("LlamaGen-L-384", kind="autoregressive", parameters=343, steps=576, fid=3.07),
        Row("VAR", kind="visual autoregressive", parameters=310, steps=10, fid=3.30),
        Row("MaskGIT", kind="masked", parameters=227, steps=12, fid=4.92),
        Row("MaskGIT-FSQ", kind="masked", parameters=225, steps=12, fid=4.53),
        Row("MAGE", kind="masked", parameters=230, steps=20, fid=6.93),
        Row("ENAT", kind="masked", parameters=219, steps=8, fid=3.53),
        Row("CODA MaskGIT-L, 8 steps", kind="masked", parameters=195, steps=8, fid=3.17),
        Row("CODA MaskGIT-L, 32 steps", kind="masked", parameters=195, steps=32, fid=2.66),
    ),
)


TABLE_4A = Table(
    number="4a",
    title="Which half of the VAE is adapted",
    protocol=f"{MAR_SETTING}; 65,536 codes",
    columns=("rfid", "psnr", "ssim"),
    rows=(
        Row("none", rfid=7.06, psnr=21.4, ssim=0.571),
        Row("encoder", rfid=5.75, psnr=21.3, ssim=0.551),
        Row("decoder", rfid=1.59, psnr=22.1, ssim=0.604),
        Row("both", rfid=1.34, psnr=22.2, ssim=0.602),
    ),
)


TABLE_4B = Table(
    number="4b",
    title="How many codes",
    protocol=MAR_SETTING,
    columns=("codebook_size", "rfid", "psnr", "ssim"),
    rows=(
        Row("1024", codebook_size=1024, rfid=2.07, psnr=21.2, ssim=0.561),
        Row("4096", codebook_size=4096, rfid=1.76, psnr=21.7, ssim=0.582),
        Row("16384", codebook_size=16384, rfid=1.43, psnr=22.0, ssim=0.594),
        Row("65536", codebook_size=65536, rfid=1.34, psnr=22.2, ssim=0.602),
    ),
)


TABLE_4C = Table(
    number="4c",
    title="The norm of queries and keys",
    protocol=f"{MAR_SETTING}; 65,536 codes",
    columns=("rfid", "psnr", "ssim"),
    rows=(
        Row("none", rfid=1.87, psnr=21.51, ssim=0.570),
        Row("layer", rfid=1.37, psnr=22.1, ssim=0.600),
        Row("rms", rfid=1.34, psnr=22.2, ssim=0.602),
    ),
)


TABLE_5 = Table(
    number="5",
    title="Text-to-image generation on MS-COCO",
    protocol="MS-COCO 256 x 256: FID, over 30,000 validation captions as is usual",
    columns=("fid",),
    rows=(
        Row("VQ-Diffusion", fid=13.86),
        Row("U-Net", fid=7.32),
        Row("U-ViT-S", fid=5.95),
        Row("CODA MaskGIT-S", fid=5.44),
    ),
)


TABLES = {table.number: table for table in (TABLE_1, TABLE_2, TABLE_3, TABLE_4A, TABLE_4B, TABLE_4C, TABLE_5)}


@dataclass(frozen=True)
class Comparison:
    """Two published rows of one table, of which AFTER is claimed to be better than BEFORE in COLUMN."""

    table: str
    column: str
    before: str
    after: str

    @property
    def published(self) -> tuple[float, float]:
        """(before, after) as published."""
        rows = TABLES[self.table]
        return getattr(rows[self.before], self.column), getattr(rows[self.after], self.column)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper: what it says and where, the published comparisons behind it.

    `title` is the claim in a few words, `caution` what a check of it, here or in the paper, cannot show.
    """

    id: str
    title: str
    statement: str
    source: str
    caution: str
    comparisons: tuple[Comparison, ...] = ()


def _ablation(column: str, *methods: str) -> tuple[Comparison, ...]:
    return tuple(Comparison("1", column, a, b) for a, b in pairwise(methods))


_VQ, _RESIDUAL, _ATTENTION, _ADAPTED = (row.method for row in TABLE_1.rows[1:])


CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(
            id="ladder",
            title="Each step of the ablation helps",
            statement="Each component - residual levels, attention, adapted VAE - lowers the quantization error and "
            "the Fréchet distance, and raises PSNR and SSIM.",
            source="Table 1",
            caution="The components are added in one order; what one is worth without those before it stays open.",
            comparisons=tuple(
                comparison
                for column in ("quantization_error", "rfid", "psnr", "ssim")
                for comparison in _ablation(column, _VQ, _RESIDUAL, _ATTENTION, _ADAPTED)
            ),
        ),
        Claim(
            id="residual_error",
            title="Residual levels lower the error",
            statement="Residual quantization lowers the quantization error of plain vector quantization.",
            source="Table 1, Section 4",
            caution="The residual quantizer writes an image in several times as many tokens: bits are not held equal.",
            comparisons=_ablation("quantization_error", _VQ, _RESIDUAL) + _ablation("rfid", _VQ, _RESIDUAL),
        ),
        Claim(
            id="levels_monotone",
            title="Every level lowers the error",
            statement="Each further residual level lowers the quantization error and the Fréchet distance.",
            source="Figure 4, Section 4",
            caution="The figure's values are not printed in the paper; only its ends stand in Table 1. Judged on "
            "quantizers trained with each number of levels, by the error alone where no Fréchet distance stands beside "
            "it; the figure draws one that is cut short.",
        ),
        Claim(
            id="attention_utilization",
            title="Attention uses codes that nearest neighbours leave unused",
            statement="Attention-based assignment uses every code, where nearest-neighbour assignment leaves half "
            "unused.",
            source="Table 1, Section 4",
            caution="Utilization depends on how many images it is counted over. Where nearest codes leave none unused, "
            "as from a start in the data, there is nothing to gain.",
            comparisons=_ablation("utilization", _RESIDUAL, _ATTENTION),
        ),
        Claim(
            id="attention_error",
            title="Attention lowers the error",
            statement="Attention-based assignment lowers the quantization error of residual quantization.",
            source="Table 1, Section 4",
            caution="Depends on how well the nearest-neighbour baseline is tuned, and for how long both are trained. "
            "On a frozen VAE the error in the latents decides; the decoded images need not follow (Table 1).",
            comparisons=_ablation("quantization_error", _RESIDUAL, _ATTENTION)
            + _ablation("rfid", _RESIDUAL, _ATTENTION),
        ),
        Claim(
            id="adaptation_closes_gap",
            title="Adaptation closes the gap to the continuous VAE",
            statement="Adapting the VAE to its tokens closes most of the gap in rFID to the continuous VAE.",
            source="Table 1, Table 4a, Section 4",
            caution="The quantization error is taken in the adapted encoder's own latents, whose spread may shrink; a "
            "short adaptation closes less than a long one.",
            comparisons=_ablation("rfid", _ATTENTION, _ADAPTED),
        ),
        Claim(
            id="decoder_over_encoder",
            title="The decoder's adapters matter more",
            statement="Adapting the decoder improves reconstruction much more than adapting the encoder.",
            source="Table 4a, Section 5.3",
            caution="Both halves' adapters have one rank, though not the same number of weights.",
            comparisons=(
                Comparison("4a", "rfid", "encoder", "decoder"),
                Comparison("4a", "psnr", "encoder", "decoder"),
            ),
        ),
        Claim(
            id="codebook_scaling",
            title="Larger codebooks help and do not collapse",
            statement="Larger codebooks, up to 65,536 codes, steadily improve reconstruction and do not collapse.",
            source="Table 4b, Section 5.3",
            caution="Each size has the same training; a larger codebook may need more, and the sizes here say nothing "
            "of larger ones.",
            comparisons=tuple(Comparison("4b", "rfid", a.method, b.method) for a, b in pairwise(TABLE_4B.rows)),
        ),
        Claim(
            id="normalisation",
            title="Normalised queries and keys help",
            statement="Normalising queries and keys improves reconstruction; RMS and layer norm do so alike.",
            source="Table 4c, Section 5.3",
            caution="One learning rate and one entropy weight serve all norms; without a norm others may be better.",
            comparisons=(Comparison("4c", "rfid", "none", "layer"), Comparison("4c", "rfid", "none", "rms")),
        ),
        Claim(
            id="sparse_assignment",
            title="Attention assigns with confidence",
            statement="Attention assigns a feature to one code with confidence; distances leave several codes equally "
            "near.",
            source="Figure 5, Section 4",
            caution="The paper draws distances beside softmax scores, two scales that do not compare. Judged by what "
            "needs no scale: the fraction of tokens that change when the posterior is drawn again.",
        ),
        Claim(
            id="codes_cover_latents",
            title="Attention spreads the codes over the latents",
            statement="In training, attention spreads the codes over the whole latent space; with nearest neighbours "
            "few spread.",
            source="Figure 6, Section 4",
            caution="A two-dimensional embedding is a picture, not a measurement.",
        ),
        Claim(
            id="training_budget",
            title="Six times fewer iterations than VQGAN",
            statement="Adaptation needs six times fewer training iterations than VQGAN.",
            source="Table 2, Section 5.2",
            caution="50K against 300K iterations; the pretrained VAE's own training is not counted.",
        ),
        Claim(
            id="more_steps",
            title="32 steps beat 8",
            statement="Sampling with 32 steps gives better images than with 8.",
            source="Table 3, Section 5.2",
            caution="Seeds are those of samples, or of generators where several were trained; the tokenizer is one.",
            comparisons=(Comparison("3", "fid", "CODA MaskGIT-L, 8 steps", "CODA MaskGIT-L, 32 steps"),),
        ),
        Claim(
            id="generation_gains",
            title="MaskGIT gains from CODA's tokens",
            statement="MaskGIT generates better images from CODA's tokens than from those of earlier tokenizers.",
            source="Table 3, Section 5.2",
            caution="The paper's rows differ in the model's size, steps and training as well as in the tokenizer.",
            comparisons=tuple(Comparison("3", "fid", m, "CODA MaskGIT-L, 8 steps") for m in ("MaskGIT", "MaskGIT-FSQ")),
        ),
    )
}
