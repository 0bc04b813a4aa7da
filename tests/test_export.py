"""The folder of an exported student: what its card says, what is copied from the teacher, and the report beside it."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import test_latent
import tiny
from PIL import Image

from cddistill import build, commands, config, export, io, models, train
from cddistill.diffusion import DDPM
from cddistill.method import Turn
from cddistill.models import lora, parts
from cddistill.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from cddistill.models.init import init_params_numpy, weight_shapes
from cddistill.models.schedulers import write_scheduler
from cddistill.models.vae import AutoencoderKL
from cddistill.step import active

pytestmark = pytest.mark.usefixtures("one_device")


def settings(teacher, method="diffusion", **changes):
    c = config.defaults(method)
    c.update(teacher=str(teacher), steps=3, batch_size=8, log_every=1, checkpoint_every=2, eval_every=9, eval_images=8)
    c.update(sample_steps=(1, 2))
    c.data.update(size=8)
    c.method.guidance = 2.0
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def littered(teacher, tmp_path_factory):
    """A copy of the teacher's folder among what git, the Hub and a training leave there."""
    folder = tmp_path_factory.mktemp("littered") / "teacher"
    shutil.copytree(teacher, folder)
    weights = "unet/diffusion_pytorch_model"
    for name in (".git/HEAD", ".cache/huggingface/x.json", "checkpoint-500/optimizer.bin", "logs/events", "NOTICE",
                 "unet_ema/a.bin", "LICENSE.md", "notes.md", "unet/optimizer.bin", "unet/.cache/x.json",
                 "samples/1.png", f"{weights}.fp16.safetensors", "unet/diffusion_flax_model.msgpack"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"left over")
    return folder


@pytest.fixture(scope="module")
def run(littered, tmp_path_factory):
    """(settings, workdir) of three updates; the report is of 8 images."""
    c, workdir = settings(littered), tmp_path_factory.mktemp("run")
    train.train(c, workdir)
    return c, workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder of the newest checkpoint's student."""
    out = tmp_path_factory.mktemp("exported") / "out"
    commands.export_run(*run, str(out))
    return out


def snippet(folder):
    """The card's example in Python."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


# --- the card


def test_the_card_counts_the_updates_of_its_checkpoint(run, exported, tmp_path):
    """Of a run of three updates, the checkpoint after two; the scores are those after three."""
    commands.export_run(*run, str(tmp_path / "2"), "2")
    for folder, said, scored in (
        (tmp_path / "2", "2 updates of\n8 images", False),
        (exported, "3 updates of\n8 images", True),
    ):
        card = (folder / "README.md").read_text()
        assert said in card
        assert ("| student, 2 steps, 8 images |" in card) == scored
        assert ("This checkpoint was not evaluated." in card) != scored
        assert "(999, 499)" in card
    assert card.count("\n|") == 4  # two rows, below a head and a rule


def test_a_stopped_run_does_not_claim_its_planned_updates(littered, run, tmp_path):
    longer, workdir = settings(littered, steps=2000), tmp_path / "run"
    tiny.until(2, run[1], workdir)
    commands.export_run(longer, workdir, str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 updates of" in card
    assert not re.search(r"2,?000 updates", card)
    assert "student, 2 steps, 8 images" not in card  # formerly: the scores of step 3


@pytest.mark.parametrize("steps", [0, 1, 7, 20])
@pytest.mark.parametrize("turn", [(1, 0), (5, 0), (5, 3), (1, 6), (4, 8)])
def test_updates_are_those_that_are_played(turn, steps):
    turns = {"student": Turn(("student",), None, *turn)}
    assert build.updates(turns["student"], steps) == sum(bool(active(turns, i)) for i in range(steps))


def test_the_example_of_a_pixel_teacher_needs_no_pipeline(exported):
    code = snippet(exported)
    compile(code, "card", "exec")
    assert "DiffusionPipeline" not in code
    assert "torch.full_like(labels, 9)" in code


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "controlnet", "concat"])
def test_the_example_runs_in_pytorch(teacher, tmp_path, kind):
    """It generates what the exporter's own check does, from the same noise; cond and labels are zero in it."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    c = settings(teacher, "diffusion" if kind == "plain" else "codi", report=False)
    if kind != "plain":
        c.data.update(task="sr", scale=2)
        c.method.adapter = kind
    train.train(c, tmp_path / "run")
    commands.export_run(c, tmp_path / "run", str(tmp_path / "out"))
    scope = {}
    torch.manual_seed(0)
    exec(snippet(tmp_path / "out").replace('FOLDER = "."', f"FOLDER = {str(tmp_path / 'out')!r}"), scope)
    torch.manual_seed(0)
    inputs = {"noise": np.moveaxis(torch.randn(4, 3, 8, 8).numpy(), 1, -1)}
    inputs |= {"text": {"class_labels": np.zeros(4, int)}, "null": {"class_labels": np.full(4, 9)}}
    inputs |= {} if kind == "plain" else {"cond": np.zeros((4, 8, 8, 3), np.float32)}
    expected = export.torch_sample(tmp_path / "out", inputs, 2.0, None)
    found = np.moveaxis(scope["images"].numpy(), 1, -1)
    assert np.std(found) > 0.01
    np.testing.assert_allclose(found, np.clip(expected / 2 + 0.5, 0, 1), atol=1e-5)


def write_tokenizer(folder):
    """CLIP's, whose words are single bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's characters for bytes
    chars = [chr(c) for c in [*plain, *range(256, 512 - len(plain))]]
    words = [*chars, *(f"{c}</w>" for c in chars), "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    vocabulary = {word: i for i, word in enumerate(words)}
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}
    io.write_json(folder / "vocab.json", vocabulary)
    io.write_atomic(folder / "merges.txt", "#version: 0.2\n")
    io.write_json(folder / "tokenizer_config.json", settings)
    io.write_json(folder / "special_tokens_map.json", special)


def text_teacher(folder, architecture="sd"):
    """A latent text-to-image pipeline that PyTorch loads, too: Stable Diffusion 1 (sd) or XL (sdxl), in small."""
    clip = test_latent.CLIP | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = test_latent.UNET
    parts = {"vae": AutoencoderKL.from_config(test_latent.VAE), "text_encoder": CLIPTextModel.from_config(clip)}
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
             "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    write_tokenizer(folder / "tokenizer")
    if architecture == "sdxl":
        second = clip | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 4, "hidden_act": "gelu"}
        config = config | {"cross_attention_dim": 16, "addition_embed_type": "text_time", "addition_time_embed_dim": 2}
        config["projection_class_embeddings_input_dim"] = 4 + 6 * 2
        parts["text_encoder_2"] = CLIPTextModelWithProjection.from_config(second)
        index = {name: index[name] for name in ("unet", "vae", "scheduler", "text_encoder", "tokenizer")}
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True,
                  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                  "tokenizer_2": ["transformers", "CLIPTokenizer"]}  # fmt: skip
        write_tokenizer(folder / "tokenizer_2")
    unet = models.init(config, 0, zero_out=False)
    models.save(folder, "unet", unet.params, unet.module.to_config())
    for name, module in parts.items():
        models.save(folder, name, init_params_numpy(weight_shapes(module), 1), module.to_config())
    write_scheduler(folder, DDPM(), "eps")
    io.write_json(folder / "model_index.json", index)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "architecture"), [("codi", "sd"), ("diffusion", "sd"), ("diffusion", "sdxl")])
def test_the_example_of_a_text_pipeline_runs_in_pytorch(tmp_path, method, architecture, monkeypatch):
    """Also without the parts that the teacher's folder names but lacks, and with all weights in float16."""
    for name in ("torch", "diffusers", "transformers"):
        pytest.importorskip(name)
    c, of = settings(text_teacher(tmp_path / "teacher", architecture), method, report=False), tmp_path / "pictures"
    c.data = test_latent.pictures(tmp_path / "teacher", of).data
    c.data.task = "sr" if method == "codi" else "none"
    commands.encode_data(c, tmp_path / "latents")
    c.data.update(source="arrays", path=str(tmp_path / "latents"))
    train.train(c, tmp_path / "run")
    commands.export_run(c, tmp_path / "run", str(tmp_path / "out"))
    Image.new("RGB", (16, 16), (9, 99, 9)).save(tmp_path / "out" / "condition.png")
    monkeypatch.chdir(tmp_path / "out")
    scope = {}
    exec(snippet(tmp_path / "out"), scope)
    (image,) = scope["images"]
    assert image.size == (16, 16)
    assert np.std(image) > 1


@pytest.mark.slow
def test_a_branch_that_diffusers_lacks_has_no_example(teacher, tmp_path, capsys):
    """Formerly the exporter tried to load it as a ControlNet, where PyTorch is installed."""
    c = settings(teacher, "codi", report=False)
    c.data.update(task="sr", scale=2)
    c.method.adapter = "mu_blend"
    train.train(c, tmp_path / "run")
    commands.export_run(c, tmp_path / "run", str(tmp_path / "out"))
    assert "PyTorch" not in capsys.readouterr().out.split("exported to")[1]
    assert "No pipeline and scheduler of diffusers samples this student" in (tmp_path / "out" / "README.md").read_text()


# --- as a LoRA


def test_a_student_is_reduced_to_a_lora_of_its_teacher(run, littered, tmp_path, capsys):
    """The folder has the LoRA, and its network is the teacher's with that merged in."""
    commands.export_run(*run, str(tmp_path / "out"), rank=2)
    assert "as a LoRA of rank 2, images differ by" in capsys.readouterr().out
    teacher, found = (models.load(folder, "unet") for folder in (littered, tmp_path / "out"))
    merged = lora.merge(tmp_path / "out" / lora.LORA_FILE, {"unet": teacher})["unet"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), merged.params, found.params)
    update = lora.read_lora(tmp_path / "out", {"unet": teacher.params})["unet"]
    assert {down.shape[-1] for down, _ in lora.factors(update.params).values()} == {2}
    assert "reduced to a LoRA of rank 2" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="--lora_rank is for an export as a folder"):
        commands.export_run(*run, str(tmp_path / "a.onnx"), rank=2)


def test_a_student_with_a_branch_is_no_lora(teacher):
    c = settings(teacher, "codi")
    c.data.update(task="sr", scale=2)
    parts = build.build(config.resolve(c))
    with pytest.raises(ValueError, match="--lora_rank is for students whose whole denoiser was trained, and nothing"):
        export.low_rank(parts, parts.init(), 2)


# --- what is copied


def test_only_the_teachers_parts_and_licences_are_copied(exported):
    names = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    own = {
        "README.md",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert names == own | {"LICENSE.md", "NOTICE"}


def files(root, *names, **contents):
    for name in (*names, *contents):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(contents.get(name, "x"))
    return root


@pytest.mark.parametrize(
    ("names", "index", "copied"),
    [
        (  # one precision and one format of the weights
            ["vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors",
             "vae/diffusion_pytorch_model.fp16.safetensors", "vae/optimizer.pt", "vae/trainer/x.json"],
            {},
            ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"],
        ),
        (  # a variant alone gets the name that is loaded by default
            ["text_encoder/config.json", "text_encoder/model.fp16.safetensors"],
            {},
            ["text_encoder/config.json", "text_encoder/model.safetensors"],
        ),
        (  # PyTorch cannot read Flax's file
            ["unet/config.json", "unet/diffusion_flax_model.msgpack", "unet/diffusion_pytorch_model.bin"],
            {},
            ["unet/config.json", "unet/diffusion_pytorch_model.bin"],
        ),
        (["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/.gitattributes"], {},
         ["tokenizer/merges.txt", "tokenizer/vocab.json"]),
        (["safety_checker/config.json", "safety_checker/model.safetensors"], {}, []),
        (["safety_checker/config.json", "safety_checker/model.safetensors"], {"safety_checker": ["x", "Y"]},
         ["safety_checker/config.json", "safety_checker/model.safetensors"]),
        (["safety_checker/config.json"], {"safety_checker": [None, None]}, []),
        (["LICENCE", "Notice.txt", "train.py", "model_index.json", "README.md", "a.ckpt"], {},
         ["LICENCE", "Notice.txt"]),
    ],
)  # fmt: skip
def test_files_of_a_pipeline(tmp_path, names, index, copied):
    assert sorted(parts.pipeline_files(files(tmp_path, *names), index)) == sorted(copied)


def test_shards_are_copied_with_their_index(tmp_path):
    names = [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    shards = {"weight_map": {str(i): name.split("/")[1] for i, name in enumerate(names)}}
    root = files(tmp_path, *names, "unet/diffusion_pytorch_model-other.bin", **{index: json.dumps(shards)})
    assert sorted(parts.pipeline_files(root, {})) == sorted([*names, index])
    (root / names[1]).unlink()
    with pytest.raises(ValueError, match="00002-of-00002.safetensors cannot be read: download it again"):
        parts.pipeline_files(root, {})


def test_a_part_that_was_not_downloaded_is_marked_as_absent(tmp_path):
    """Without this, PyTorch could not load the student's folder."""
    index = {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": ["a", "B"], "b": True}
    from cddistill.pipeline import write_index

    files(tmp_path, **{"scheduler/scheduler_config.json": '{"_class_name": "LCMScheduler"}'})
    write_index(tmp_path, index, {"unet"})
    written = io.read_json(tmp_path / "model_index.json")
    assert written["safety_checker"] == [None, None]
    assert written == index | {"safety_checker": [None, None], "scheduler": ["diffusers", "LCMScheduler"]}
    write_index(tmp_path / "without", index | {"scheduler": ["diffusers", "X"]}, {"unet"})  # EDM's networks have none
    assert io.read_json(tmp_path / "without" / "model_index.json")["scheduler"] == [None, None]


def test_what_is_only_merged_keeps_its_scheduler(teacher, tmp_path):
    """Formerly a pretrained network with any scheduler was exported with DDIM's."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    scheduler = io.read_json(folder / "scheduler" / "scheduler_config.json")
    scheduler |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    io.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    c = config.defaults("pretrained")
    c.update(teacher=str(folder), sample_steps=(2,), batch_size=8)
    c.data.size = 8
    commands.export_run(c, tmp_path / "run", str(tmp_path / "out"))
    assert io.read_json(tmp_path / "out" / "scheduler" / "scheduler_config.json") == scheduler
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not trained" in card
    assert "updates" not in card


def test_a_student_that_generates_nan_is_not_exported(run, tmp_path):
    built, state = commands.finished(*run)
    broken = jax.tree.map(lambda x: x * np.nan, state.ema)
    with pytest.raises(ValueError, match="images of this student are not finite .*export another --checkpoint"):
        export.export(built, state.replace(ema=broken), str(tmp_path / "out"), {})
    assert not (tmp_path / "out").exists()


# --- the report


def test_fewer_images_do_not_replace_the_full_report(run, capsys):
    c, workdir = run
    full = [(workdir / name).read_bytes() for name in ("scores.json", "report.html")]
    assert b"The weights are those after 3 of 3 planned steps." in full[1]
    assert b"The first 8 of 8 images of the held-out test split that were evaluated." in full[1]
    few = settings(c.teacher, eval_images=4)
    commands.evaluate_run(few, workdir, "2")
    assert [(workdir / name).read_bytes() for name in ("scores.json", "report.html")] == full
    assert "report-4-images.html (report.html, of more images, is kept)" in capsys.readouterr().out
    scores = io.read_json(workdir / "scores-4-images.json")["student, 2 steps"]
    assert (scores["n"], scores["step"]) == (4, 2)
    assert "after 2 of 3 planned steps" in (workdir / "report-4-images.html").read_text()


@pytest.mark.slow
def test_as_many_images_replace_it(run, tmp_path):
    c, workdir = run
    copy = shutil.copytree(workdir, tmp_path / "run")
    commands.evaluate_run(settings(c.teacher, eval_images=9), copy, "2")
    scores = io.read_json(copy / "scores.json")["student, 1 step"]
    assert (scores["n"], scores["step"]) == (9, 2)
