"""The figures of the methods: python docs/figures/draw.py writes one SVG for each, beside this file.

A figure is boxes on a grid and arrows between them; nothing but Python is needed, and equal code gives equal bytes.
"""

import html
import pathlib
from collections.abc import Callable

CELL = 190, 92  # px from one column, row to the next
BOX = 150, 52  # px
MARGIN = 24  # px, around everything
KINDS = {  # (fill, border, dashes of the border, words of the legend)
    "data": ("#ffffff", "#555555", "", "data, samples, noise"),
    "trained": ("#cfe3ff", "#1f5fbf", "", "trained"),
    "average": ("#eaf3ff", "#1f5fbf", "5 3", "moving average of the trained weights"),
    "frozen": ("#e4e4e4", "#777777", "", "frozen"),
    "loss": ("#ffe3c7", "#c2650a", "", "loss, or gradient at the sample"),
}
ARROW = "#333333"


class Figure:
    """Boxes by name at (column, row), which may be fractions, and arrows between them. `svg` is the picture."""

    def __init__(self, title: str):
        self.title = title
        self.centres: dict[str, tuple[float, float]] = {}
        self.kinds: set[str] = set()
        self.lines, self.labels, self.boxes = [], [], []

    def box(self, name: str, column: float, row: float, *lines: str, kind: str = "data") -> None:
        """A box with one or two lines of text; `kind` is one of KINDS."""
        x, y = MARGIN + BOX[0] / 2 + column * CELL[0], MARGIN + BOX[1] / 2 + row * CELL[1]
        fill, border, dashes, _ = KINDS[kind]
        self.centres[name] = x, y
        self.kinds.add(kind)
        self.boxes.append(rectangle(x - BOX[0] / 2, y - BOX[1] / 2, *BOX, fill, border, dashes))
        first = y + 5 - 9 * (len(lines) - 1)
        self.boxes += [text(x, first + 18 * i, line, 14) for i, line in enumerate(lines)]

    def arrow(self, start: str, end: str, label: str = "", dashed: bool = False, at: float = 0.5) -> None:
        """An arrow between two boxes; the label stands at this share of its length. Dashed: no gradient flows."""
        a, b = self.centres[start], self.centres[end]
        (x1, y1), (x2, y2) = border(a, b), border(b, a)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.lines.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ARROW}" stroke-width="1.5"{dash} '
            'marker-end="url(#head)"/>'
        )
        if label:
            x, y = x1 + at * (x2 - x1), y1 + at * (y2 - y1)
            width = 6.5 * len(label) + 4
            back = f'<rect x="{x - width / 2:.1f}" y="{y - 9:.1f}" width="{width:.1f}" height="18" fill="#fff"/>'
            self.labels += [back, text(x, y + 4, label, 12)]

    def svg(self) -> str:
        """The picture, with a legend of the kinds that it has."""
        right, bottom = (max(centre[i] for centre in self.centres.values()) + BOX[i] / 2 + MARGIN for i in (0, 1))
        legend, x, y = [], MARGIN, bottom + 16
        for kind in (kind for kind in KINDS if kind in self.kinds):
            fill, border, dashes, words = KINDS[kind]
            legend += [rectangle(x, y - 11, 16, 12, fill, border, dashes), text(x + 22, y, words, 12, "start")]
            x += 40 + 6.4 * len(words)
        head = (
            '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
            f'<path d="M0,0 L9,4 L0,8 z" fill="{ARROW}"/></marker></defs>'
        )
        width, height = round(max(right, x)), round(bottom + 34)
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="Helvetica, Arial, sans-serif" role="img">',
            f"<title>{html.escape(self.title)}</title>", '<rect width="100%" height="100%" fill="#fff"/>', head,
            *self.lines, *self.labels, *self.boxes, *legend, "</svg>", "",
        ])  # fmt: skip


def rectangle(x, y, width, height, fill, border, dashes="") -> str:
    """A rectangle with round corners."""
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{border}" '
        f'stroke-width="1.5"{dash}/>'
    )


def text(x, y, words, size, anchor="middle") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{html.escape(words)}</text>'


def border(centre, towards) -> tuple[float, float]:
    """Where the line from a box's centre leaves the box."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    share = min(BOX[0] / 2 / abs(dx) if dx else 1e9, BOX[1] / 2 / abs(dy) if dy else 1e9)
    return centre[0] + share * dx, centre[1] + share * dy


# ---- the figures


def diffusion(f: Figure) -> None:
    """Diffusion training: a network learns to predict what noise was added."""
    f.box("x0", 0, 0, "x₀", "image or latent")
    f.box("eps", 0, 1, "ε", "unit noise")
    f.box("z", 1, 0.5, "z_t = α x₀ + σ ε")
    f.box("net", 2, 0.5, "backbone + branch", "(z_t, t, text, cond)", kind="trained")
    f.box("target", 2, 1.6, "target", "ε, v or x₀")
    f.box("loss", 3, 0.5, "squared error", kind="loss")
    for start, end in (("x0", "z"), ("eps", "z"), ("z", "net"), ("net", "loss"), ("target", "loss")):
        f.arrow(start, end)


def codi(f: Figure) -> None:
    """CoDi: noise consistency between two timesteps, and a conditional signal."""
    f.box("x0", 0, 0, "x₀", "image or latent")
    f.box("z_t", 0, 1.2, "z_t = α x₀ + σ ε")
    f.box("cond", 0, 2.4, "cond", "conditioning image")
    f.box("student", 1.4, 1.2, "student: backbone", "+ condition branch", kind="trained")
    f.box("z_s", 2.6, 2.4, "z_s = α_s x̂ + σ_s ε", "s = t − Δt")
    f.box("ema", 4, 2.4, "student's average", "at z_s", kind="average")
    f.box("signal", 4, 0, "‖ x̂ − x₀ ‖²", kind="loss")
    f.box("consistency", 4, 1.2, "‖ ε̂_ema − ε̂ ‖²", kind="loss")
    f.arrow("x0", "z_t")
    f.arrow("z_t", "student")
    f.arrow("cond", "student")
    f.arrow("student", "signal", "x̂")
    f.arrow("x0", "signal")
    f.arrow("student", "consistency", "ε̂")
    f.arrow("student", "z_s", "x̂", dashed=True)
    f.arrow("z_s", "ema", dashed=True)
    f.arrow("ema", "consistency", dashed=True)


def dmd2(f: Figure) -> None:
    """DMD2: the student follows the difference of two scores; a critic follows the student."""
    f.box("noise", 0, 1.2, "z", "noise, or z_k")
    f.box("student", 1, 1.2, "student", kind="trained")
    f.box("x", 2, 1.2, "x", "generated")
    f.box("teacher", 3.3, 0, "teacher", "score of data", kind="frozen")
    f.box("fake", 3.3, 1.2, "fake", "score of samples", kind="trained")
    f.box("disc", 3.3, 2.4, "disc", "on fake's features", kind="trained")
    f.box("g", 4.4, 0.6, "g = fake − teacher", "gradient at x", kind="loss")
    f.box("gan", 4.4, 2.4, "softplus GAN loss", kind="loss")
    f.box("real", 2, 2.4, "x₀", "real images")
    f.arrow("noise", "student")
    f.arrow("student", "x")
    f.arrow("x", "teacher", "+ noise", dashed=True)
    f.arrow("x", "fake", "+ noise")
    f.arrow("real", "fake", "+ noise")
    f.arrow("fake", "disc")
    f.arrow("teacher", "g", dashed=True)
    f.arrow("fake", "g", dashed=True)
    f.arrow("disc", "gan")


def diffusion2gan(f: Figure) -> None:
    """Diffusion2GAN: regression to the teacher's sample of the same noise, and a conditional GAN."""
    f.box("z", 0, 1.2, "z", "unit noise")
    f.box("teacher", 1, 0, "teacher's ODE", "once: --mode=pairs", kind="frozen")
    f.box("student", 1, 1.2, "student", "one step", kind="trained")
    f.box("real", 2.1, 2.4, "x", "real, for the critic")
    f.box("x", 2.1, 0, "x", "stored pair")
    f.box("y", 2.1, 1.2, "x̂", "generated")
    f.box("d", 3.2, 0.6, "d(T x̂, T x)", "perceptual distance", kind="loss")
    f.box("disc", 3.2, 2.4, "disc", "copy of the teacher", kind="trained")
    f.box("gan", 4.3, 2.4, "softplus GAN loss", "+ R1", kind="loss")
    f.arrow("z", "teacher", dashed=True)
    f.arrow("z", "student")
    f.arrow("teacher", "x", dashed=True)
    f.arrow("student", "y")
    f.arrow("x", "d", dashed=True)
    f.arrow("y", "d")
    f.arrow("y", "disc")
    f.arrow("real", "disc")
    f.arrow("disc", "gan")


def lcm(f: Figure) -> None:
    """LCM: the same answer from both ends of one guided step of the teacher."""
    f.box("z_t", 0, 1, "z_t = α x₀ + σ ε")
    f.box("w", 0, 2.2, "w ~ U", "guidance scale")
    f.box("student", 1.6, 0, "student f(z_t, w, t)", kind="trained")
    f.box("teacher", 1.2, 1.6, "teacher, guided", "one DDIM step", kind="frozen")
    f.box("z_s", 2.3, 1.6, "z_s")
    f.box("ema", 3.4, 1.6, "f_ema(z_s, w, s)", kind="average")
    f.box("loss", 3.4, 0, "distance", kind="loss")
    f.arrow("z_t", "student")
    f.arrow("z_t", "teacher", dashed=True)
    f.arrow("w", "teacher", dashed=True)
    f.arrow("teacher", "z_s", dashed=True)
    f.arrow("z_s", "ema", dashed=True)
    f.arrow("student", "loss")
    f.arrow("ema", "loss", dashed=True)


def gd(f: Figure) -> None:
    """Guided progressive distillation: each stage halves the number of steps."""
    f.box("teacher", 0, 0, "teacher", "two calls: guidance", kind="frozen")
    f.box("s0", 1.1, 0, "stage 0", "one call, N steps", kind="trained")
    f.box("s1", 2.2, 0, "stage 1", "N / 2 steps", kind="trained")
    f.box("s2", 3.3, 0, "stage 2 ...", "N / 4 steps", kind="trained")
    f.box("z_t", 0, 1.3, "z_t = α x₀ + σ ε")
    f.box("two", 1.6, 1.3, "two DDIM steps", "of the stage before", kind="average")
    f.box("student", 1.6, 2.3, "one step", "of this stage", kind="trained")
    f.box("loss", 3.3, 1.8, "weighted", "squared error of x₀", kind="loss")
    f.arrow("teacher", "s0")
    f.arrow("s0", "s1")
    f.arrow("s1", "s2")
    f.arrow("z_t", "two", dashed=True)
    f.arrow("z_t", "student")
    f.arrow("two", "loss", "x̃", dashed=True)
    f.arrow("student", "loss", "x̂")


def latent_lpips(f: Figure) -> None:
    """A latent LPIPS: a small network ranks distortions as LPIPS-VGG does, without decoding."""
    f.box("x", 0, 1.2, "x, a, b", "a, b: distortions")
    f.box("vgg", 1.5, 0, "LPIPS-VGG", "on pixels", kind="frozen")
    f.box("vae", 1.1, 2.4, "VAE encoder", kind="frozen")
    f.box("trunk", 2.2, 2.4, "trunk + heads", "on latents", kind="trained")
    f.box("loss", 3.3, 1.2, "which is nearer,", "a or b? rank loss", kind="loss")
    f.arrow("x", "vgg", dashed=True)
    f.arrow("x", "vae", dashed=True)
    f.arrow("vae", "trunk", dashed=True)
    f.arrow("trunk", "loss")
    f.arrow("vgg", "loss", dashed=True)


def autoencoder(f: Figure) -> None:
    """An autoencoder: reconstruction, LPIPS and a KL divergence."""
    f.box("x", 0, 0, "x", "image")
    f.box("enc", 1.1, 0, "encoder", "mean, log var", kind="trained")
    f.box("z", 2.2, 0, "z = mean + std ε")
    f.box("dec", 3.3, 0, "decoder", kind="trained")
    f.box("kl", 1.1, 1.3, "KL to N(0, 1)", kind="loss")
    f.box("rec", 3.3, 1.3, "|x − y|² + LPIPS", kind="loss")
    f.box("x again", 2.2, 1.3, "x")
    f.arrow("x", "enc")
    f.arrow("enc", "z")
    f.arrow("z", "dec")
    f.arrow("enc", "kl")
    f.arrow("dec", "rec", "y")
    f.arrow("x again", "rec")


def pretrained(f: Figure) -> None:
    """A few-step student made elsewhere: its own scheduler samples it, nothing is trained."""
    f.box("z", 0, 0, "z", "unit noise")
    f.box("net", 1.1, 0, "unet/", "of any folder", kind="frozen")
    f.box("sched", 2.2, 0, "scheduler/", "its own timesteps")
    f.box("x", 3.3, 0, "image", "scores beside ours")
    f.arrow("z", "net")
    f.arrow("net", "sched")
    f.arrow("sched", "x")


FIGURES = {
    draw.__name__: draw
    for draw in (diffusion, codi, dmd2, diffusion2gan, lcm, gd, latent_lpips, autoencoder, pretrained)
}


def picture(draw: Callable[[Figure], None]) -> str:
    """A figure as SVG; its title is the docstring of what draws it."""
    f = Figure(draw.__doc__.rstrip("."))
    draw(f)
    return f.svg()


def main() -> None:
    """Write every figure."""
    for name, draw in FIGURES.items():
        (pathlib.Path(__file__).parent / f"{name}.svg").write_text(picture(draw), "utf-8")


if __name__ == "__main__":
    main()
