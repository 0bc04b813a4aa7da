"""Methods that learn from a conditional teacher: the condition reaches teacher, student and critic."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import build, commands, config, load, pipeline, sample, train
from cddistill.data.ode_pairs import OdePairs
from cddistill.methods import METHODS
from cddistill.models import adapter, save
from cddistill.net import Adapted
from cddistill.precompute import pairs as making

KEY = jax.random.key(0)
BRANCHES = {"controlnet", "fake_branch", "student_branch"}
DMD2, D2G = METHODS["dmd2"], METHODS["diffusion2gan"]


@pytest.fixture(scope="module")
def batch():
    return tiny.make_batch(size=4)


@pytest.fixture(scope="module")
def branch():
    return tiny.disturbed(adapter.make_branch(tiny.teacher(), KEY))


def frozen(kind, batch, branch):
    """The frozen nets of a conditional teacher of this kind."""
    if kind == "concat":
        return {"teacher": tiny.disturbed(adapter.widen(tiny.teacher(), batch))}
    return {"teacher": tiny.teacher(), "controlnet": branch}


def nets_of(method, held, batch):
    """n, with averages and all trained nets as at step 0."""
    nets = method.init(KEY, held, batch)
    averages = {f"{name}_ema": nets[name] for name in method.ema()}
    return SimpleNamespace(step=0, play=(), **held, **nets, **averages)


def other(batch):
    """The batch with the condition of another sample."""
    return batch | {"cond": batch["cond"][::-1]}


def test_a_joined_network_is_the_adapted_one(batch, branch):
    """Outputs and bottleneck features."""
    whole, given = adapter.joined(tiny.teacher(), branch), adapter.with_condition("controlnet", batch)
    expected = Adapted(tiny.teacher(), branch)(batch["x0"], 500, batch["text"], batch["cond"])
    jax.tree.map(np.testing.assert_array_equal, whole(batch["x0"], 500, given["text"]), expected)
    features = [
        whole.features(b["x0"], 500, adapter.with_condition("controlnet", b)["text"]) for b in (batch, other(batch))
    ]
    assert np.abs(features[0] - features[1]).max() > 1e-3
    assert adapter.with_condition("none", batch) is batch


KINDS = pytest.mark.parametrize("kind", ["controlnet", pytest.param("concat", marks=pytest.mark.slow)])


@KINDS
def test_dmd2_matches_the_scores_given_the_condition(kind, batch, branch):
    """With fake equal to the teacher the gradient is zero, and it is not once one of them sees another branch."""
    method = DMD2(adapter=kind, gan_weight=0.0)
    nets = vars(nets_of(method, frozen(kind, batch, branch), batch))
    parts = {name: nets.pop(name) for name in {*nets} & {"teacher", "fake", "student", *BRANCHES}}

    @jax.jit
    def matching(parts, batch):
        n, given = SimpleNamespace(**nets, **parts), adapter.with_condition(kind, batch)
        return method.matching(n, method.generate(n, given, KEY), given, KEY)[0], method.generate(n, given, KEY)

    g, x = matching(parts, batch)
    np.testing.assert_allclose(g, 0.0, atol=1e-5)
    for role in {*parts} & {"controlnet", "fake_branch"} or {"fake"}:
        assert np.abs(matching(parts | {role: tiny.disturbed(parts[role], 1)}, batch)[0]).mean() > 1e-3, role
    assert np.abs(x - matching(parts, other(batch))[1]).min() > 0


@KINDS
def test_dmd2_trains_what_takes_the_condition(kind, batch, branch):
    """All nets of a turn have gradients, and the discriminator reads features of the condition."""
    method = DMD2(adapter=kind, ema_decay=0.9, dm_weight=0.0)
    n = nets_of(method, frozen(kind, batch, branch), batch)
    moving = {name: tiny.disturbed(getattr(n, name), 2) for name in adapter.parts(kind, "fake")}

    @jax.jit
    def slopes(moving, batch):
        loss = lambda moving: method.critic_loss(SimpleNamespace(**(vars(n) | moving)), batch, KEY)[0]
        return jax.grad(loss)(moving)

    (seen, swapped) = (slopes(moving, b) for b in (batch, other(batch)))
    assert all(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(seen[name])) > 0 for name in moving)
    assert any(bool((x != y).any()) for x, y in zip(*map(jax.tree.leaves, (seen, swapped)), strict=True))
    assert {*method.ema()} == {*adapter.parts(method.adapter, "student")} == {*method.turns()["student"].moves}


def test_dmd2_samples_the_average_given_the_condition(batch, branch):
    method, noise = DMD2(adapter="controlnet", ema_decay=0.9), tiny.randn(0, 4, 8, 8, 3)
    n = nets_of(method, frozen("controlnet", batch, branch), batch)
    draw = jax.jit(lambda nets, b: method.sample(SimpleNamespace(**(vars(n) | nets)), noise, b, None, 1))
    online = {name: getattr(n, name) for name in adapter.parts(method.adapter, "student")}
    x = draw(online, batch)
    assert np.abs(x - draw(online, other(batch))).min() > 0
    np.testing.assert_array_equal(draw({name: tiny.disturbed(net) for name, net in online.items()}, batch), x)


def with_cond_pairs(batch):
    """Pairs whose conditions are the batch's, and the mismatched ones."""
    pairs = batch["pairs"] | {"cond": batch["cond"]}
    return batch | {"pairs": pairs, "others": jax.tree.map(lambda x: np.roll(x, -1, 0), pairs)}


@KINDS
def test_diffusion2gan_learns_from_pairs_with_a_condition(kind, batch, branch):
    """The student's turn has gradients for UNet and branch, which depend on the pairs' condition."""
    method = D2G(adapter=kind, regression="l2", augment="none", gan_weight=0.1, r1="none")
    batch = with_cond_pairs(batch)
    n = nets_of(method, frozen(kind, batch, branch), batch)
    n.play = ("critic", "student")
    moving = {name: getattr(n, name) for name in method.parts()}

    @jax.jit
    def slopes(moving, batch):
        loss = lambda moving: method.student_loss(SimpleNamespace(**(vars(n) | moving)), batch, KEY)[0]
        return jax.grad(loss)(moving), method.critic_loss(n, batch, KEY)[0]

    (seen, critic), (swapped, _) = (slopes(moving, b) for b in (batch, with_cond_pairs(other(batch))))
    assert np.isfinite(critic)
    assert all(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(seen[name])) > 0 for name in moving)
    assert any(bool((x != y).any()) for x, y in zip(*map(jax.tree.leaves, (seen, swapped)), strict=True))
    assert {*method.ema()} == {*method.parts()} == {*method.turns()["student"].moves}
    noise = tiny.randn(0, 4, 8, 8, 3)
    draw = jax.jit(lambda b: method.sample(n, noise, b, None, 1))
    assert np.abs(draw(batch) - draw(other(batch))).min() > 0


def test_pairs_without_a_condition_are_refused(batch, branch):
    with pytest.raises(ValueError, match="data.pairs have no condition: make them again"):
        D2G(adapter="controlnet", regression="l2").init(KEY, frozen("controlnet", batch, branch), batch)


def test_a_teacher_without_the_condition_is_refused(batch, branch):
    with pytest.raises(ValueError, match="takes the condition: fine-tune one first .* set config.controlnet"):
        DMD2(adapter="controlnet").init(KEY, tiny.frozen(), batch)
    with pytest.raises(ValueError, match="takes the condition: fine-tune one first .* set config.teacher"):
        DMD2(adapter="concat").init(KEY, frozen("controlnet", batch, branch), batch)
    with pytest.raises(ValueError, match="goes with neither regression_weight .* nor student_lora"):
        DMD2(adapter="controlnet", student_lora="blocks")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of a teacher with a ControlNet for super-resolution."""
    folder, net = tiny.save_teacher(tmp_path_factory.mktemp("files") / "teacher")
    given = tiny.disturbed(adapter.make_branch(net, KEY))
    save(folder, "controlnet", given.params, given.apply.module.to_config(), dtype=np.float32)
    return folder


def settings(method, folder, **changes):
    c = config.defaults(method)
    c.update(teacher=str(folder), controlnet=str(folder / "controlnet"), steps=2, batch_size=8, sample_steps=(1,))
    c.update(report=False, checkpoint_every=2)
    c.data.update(size=8, task="sr", scale=2)
    c.method.update(adapter="controlnet")
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def test_pairs_keep_the_condition_that_the_teacher_saw(files, tmp_path):
    """Made again from what is stored, x0 is the same, and another when the condition is."""
    c = settings("diffusion2gan", files, num_pairs=8, pairs_shard=8, pairs_batch=8, teacher_steps=(2,),
                 **{"data.pairs": str(tmp_path / "pairs")})  # fmt: skip
    commands.make_pairs(c, tmp_path / "pairs")
    pairs = OdePairs(tmp_path / "pairs")
    assert pairs.item(3)["cond"].shape == (8, 8, 3)
    experiment = config.resolve(c)
    teacher = pipeline.of_run(experiment.run)
    generate_x0 = making.sampler(experiment.run, teacher.denoiser, 8, teacher.controlnet(str(files / "controlnet")))
    rows = [pairs.item(i) for i in range(8)]
    np.testing.assert_allclose(generate_x0(rows), np.stack([r["x0"] for r in rows]), atol=2e-3)
    changed = generate_x0([r | {"cond": 1 - r["cond"]} for r in rows])
    assert np.abs(changed - np.stack([r["x0"] for r in rows])).max() > 1e-2
    with c.unlocked():
        c.controlnet = ""
    with pytest.raises(ValueError, match="was made with another ControlNet .* than config.controlnet=''"):
        build.build(config.resolve(c))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd2", "diffusion2gan"])
def test_super_resolution_from_a_config_to_a_folder(method, files, tmp_path):
    """The exported student has a unet/ and a controlnet/, and draws the run's images."""
    own = {"diffusion2gan": {"method.regression": "l2", "data.pairs": str(tmp_path / "pairs"), "teacher_steps": (2,),
                             "num_pairs": 8, "method.augment": "none"}}  # fmt: skip
    c = settings(method, files, **own.get(method, {"method.ratio": 1}))
    if c.data.pairs:
        commands.make_pairs(c, tmp_path / "pairs")
    train.train(c, tmp_path / "run")
    commands.export_run(c, tmp_path / "run", str(tmp_path / "out"))
    assert {"unet", "controlnet"} <= {p.name for p in (tmp_path / "out").iterdir()}
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    drawn = [sample(load(tmp_path / name), label=1, image=image, seed=3) for name in ("run", "out")]
    np.testing.assert_allclose(*drawn, atol=2e-2)
