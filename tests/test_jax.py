"""fastseg.jax: the plain verbs' numbers, under jit, grad and vmap."""

import os
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import fastseg as fs
import fastseg.jax

SHAPE = (2, 3, 7, 11)


class Device(NamedTuple):
    platform: str
    id: int


LOSSES = [
    fs.BCE() + 2.0 * fs.SoftJaccard(),
    (fs.BCE() + fs.SoftDice()).replace(reduction="none"),
    fs.CrossEntropy() + fs.Tversky(alpha=0.3, beta=0.7),
    fs.LovaszHinge(),
    fs.FocalBCE(gamma=1.5),
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def data(loss, dtype=np.float32):
    logits, targets = cases.make(SHAPE, dtype)
    if "CrossEntropy" in repr(loss):
        targets = np.random.default_rng(1).integers(0, 3, (2, 7, 11)).astype(np.uint8)
    return logits, targets


def same(got, expected):
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(expected, np.float64))


@each_loss
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("jit", [False, True])
def test_value_and_gradient_are_those_of_the_plain_verbs(loss, dtype, jit):
    logits, targets = data(loss)
    x, t = jnp.asarray(logits, dtype), jnp.asarray(targets)
    criterion = fastseg.jax.Loss(loss)
    scale = jnp.arange(1.0, 7.0).reshape(2, 3) if loss.options.reduction == "none" else 3.0
    total = lambda x, t: jnp.sum(scale * criterion(x, t))  # noqa: E731
    run = jax.value_and_grad(total)
    value, grad = (jax.jit(run) if jit else run)(x, t)
    host = np.asarray(x)
    expected = loss(host, targets)
    same(criterion(x, t), np.asarray(expected, np.float32))
    np.testing.assert_allclose(value, np.sum(np.asarray(scale) * expected), rtol=1e-6)
    slope = loss.value_and_grad(host, targets, grad_scale=np.asarray(scale, np.float64))[1]
    assert grad.dtype == x.dtype
    if loss._sorting:  # there it is rounded before it is scaled, and after
        tolerance = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
        np.testing.assert_allclose(
            np.asarray(grad, np.float64), np.asarray(slope, np.float64), tolerance, 1e-8
        )
    else:
        same(grad, slope)


def test_float64_where_jax_has_it():
    loss = LOSSES[0]
    logits, targets = data(loss, np.float64)
    with jax.enable_x64(True):
        run = jax.value_and_grad(fastseg.jax.Loss(loss))
        value, grad = run(jnp.asarray(logits), jnp.asarray(targets))
        assert value.dtype == grad.dtype == np.float64
    expected = loss.value_and_grad(logits, targets)
    same(value, expected[0])
    same(grad, expected[1])


def test_mask_and_weights():
    loss, (logits, targets) = LOSSES[0], data(LOSSES[0])
    rng = np.random.default_rng(2)
    others = {"mask": rng.random(SHAPE) < 0.7, "weight_map": rng.random(SHAPE, np.float32)}
    there = {name: jnp.asarray(array) for name, array in others.items()}
    run = jax.jit(jax.value_and_grad(fastseg.jax.Loss(loss)))
    value, grad = run(jnp.asarray(logits), jnp.asarray(targets), **there)
    expected = loss.value_and_grad(logits, targets, **others)
    same(value, np.float32(expected[0]))
    same(grad, expected[1])


def test_what_comes_from_above_is_multiplied_in_before_rounding():
    """A float16 gradient of a mean is 0 beyond some voxels, unless it was scaled before."""
    logits, targets = cases.make((1, 1, 64, 64, 64), np.float16)
    x, t = jnp.asarray(logits), jnp.asarray(targets)
    criterion = fastseg.jax.Loss(fs.BCE())
    assert np.mean(np.asarray(jax.grad(criterion)(x, t)) == 0) > 0.02
    grad = jax.grad(lambda x: 65536.0 * criterion(x, t))(x)
    assert np.mean(np.asarray(grad) == 0) < 0.001
    same(grad, fs.BCE().value_and_grad(logits, targets, grad_scale=65536.0)[1])


@each_loss
def test_vmap(loss):
    logits, targets = data(loss)
    criterion = fastseg.jax.Loss(loss)
    x, t = jnp.asarray(logits)[:, None], jnp.asarray(targets)[:, None]
    total = lambda x, t: jnp.sum(criterion(x, t))  # noqa: E731
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(total)))(x, t)
    for k in range(2):
        value, grad = jax.value_and_grad(total)(x[k], t[k])
        same(values[k], value)
        same(grads[k], grad)


def test_a_step_of_training_under_jit():
    """Logits that are computed: what flows back goes on through JAX's own operations."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((2, 4, 9, 9)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 2, (2, 1, 9, 9)), jnp.uint8)
    criterion = fastseg.jax.Loss(LOSSES[0])

    def by_fastseg(weight):
        return criterion(jnp.einsum("nfxy,f->nxy", features, weight)[:, None], targets)

    def by_jax(weight):
        x = jnp.einsum("nfxy,f->nxy", features, weight)[:, None]
        q, p = jax.nn.sigmoid(x), targets.astype(jnp.float32)
        bce = jnp.mean(jax.nn.softplus(x) - p * x)
        inner, total = (p * q).sum((2, 3)), p.sum((2, 3)) + q.sum((2, 3))
        return bce + 2.0 * jnp.mean(1 - inner / (total - inner))

    weights = [jnp.ones(4), jnp.ones(4)]
    for _ in range(5):
        for k, loss in enumerate((by_fastseg, by_jax)):
            weights[k] -= 0.5 * jax.jit(jax.grad(loss))(weights[k])
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-4)


@each_loss
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outside_jit_arrays_are_read_in_place(loss, dtype):
    logits, targets = data(loss)
    x, t = jnp.asarray(logits, dtype), jnp.asarray(targets)
    value, grad = fastseg.jax.value_and_grad(loss, x, t, grad_scale=2.0)
    expected = loss.value_and_grad(np.asarray(x), targets, grad_scale=2.0)
    assert isinstance(value, jax.Array) and isinstance(grad, jax.Array)
    assert grad.dtype == x.dtype and grad.shape == x.shape
    same(value, np.asarray(expected[0], np.float32))
    same(grad, expected[1])


def test_the_gradient_outside_jit_flows_on():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((2, 4, 9, 9)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 2, (2, 1, 9, 9)), jnp.uint8)
    model = lambda w: jnp.einsum("nfxy,f->nxy", features, w)[:, None]  # noqa: E731
    logits, pull = jax.vjp(model, jnp.ones(4))
    _, grad = fastseg.jax.value_and_grad(LOSSES[0], logits, targets)
    whole = jax.grad(lambda w: fastseg.jax.Loss(LOSSES[0])(model(w), targets))(jnp.ones(4))
    np.testing.assert_allclose(pull(grad)[0], whole, rtol=1e-5)


def test_arrays_of_a_gpu_go_through_dlpack(cupy_stand_in, monkeypatch):
    """The CPU's array stands for a GPU's, as CuPy's stand-in does."""
    logits, targets = data(LOSSES[0])
    x, t = jnp.asarray(logits), jnp.asarray(targets)
    device = Device("gpu", 0)
    monkeypatch.setattr(fastseg.jax, "_devices", lambda array: {device})
    value, grad = fastseg.jax.value_and_grad(LOSSES[0], x, t)
    expected = LOSSES[0].value_and_grad(logits, targets)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-9)
    monkeypatch.setattr(fastseg.jax, "_devices", lambda array: {Device("gpu", array.ndim)})
    with pytest.raises(TypeError, match=r"arrays must be on one device, got .*id=3.*id=4"):
        fastseg.jax.value_and_grad(LOSSES[0], x, t[:, 0])


def test_value_and_grad_outside_jit_says_what_it_cannot_take():
    x, t = map(jnp.asarray, data(LOSSES[0]))
    run = lambda x: fastseg.jax.value_and_grad(LOSSES[0], x, t)[0]  # noqa: E731
    for traced in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(TypeError, match=r"logits is traced .* use fastseg\.jax\.Loss there"):
            traced(run)(x)
    with pytest.raises(TypeError, match="targets must be a JAX array, got ndarray"):
        fastseg.jax.value_and_grad(LOSSES[0], x, np.asarray(t))
    with pytest.raises(TypeError, match="loss must be a fastseg loss, got str"):
        fastseg.jax.value_and_grad("bce", x, t)


def test_a_loss_may_be_a_static_argument():
    traced = []

    @jax.jit
    def run(x, t):
        traced.append(1)
        return fastseg.jax.Loss(fs.BCE() + fs.SoftJaccard())(x, t)

    x, t = map(jnp.asarray, data(LOSSES[0]))
    assert run(x, t) == run(x, t) and len(traced) == 1
    assert hash(fastseg.jax.Loss(fs.BCE())) == hash(fastseg.jax.Loss(fs.BCE()))
    value = jax.jit(lambda c, x, t: c(x, t), static_argnums=0)(fastseg.jax.Loss(fs.BCE()), x, t)
    assert value == fastseg.jax.Loss(fs.BCE())(x, t)


@each_loss
def test_outside_jit_a_second_call_compiles_nothing(loss):
    """Each compilation is kept for good: calls that compile would fill the memory."""
    x, t = map(jnp.asarray, data(loss))
    total = lambda x, t: jnp.sum(fastseg.jax.Loss(loss)(x, t))  # noqa: E731
    seen = []
    for _ in range(3):
        fastseg.jax.Loss(loss)(x, t).block_until_ready()
        jax.value_and_grad(total)(x, t)[1].block_until_ready()
        if not seen:
            listen = lambda name, *a, **k: seen.append(name) if "compile" in name else None  # noqa: E731
            jax.monitoring.register_event_duration_secs_listener(listen)
            seen.append("the first time")
    jax.monitoring.clear_event_listeners()
    assert seen == ["the first time"]


def test_what_cannot_be_differentiated_raises():
    x, t = map(jnp.asarray, data(LOSSES[0]))
    criterion = fastseg.jax.Loss(LOSSES[0])
    with pytest.raises(TypeError, match="targets must not be differentiated; pass jax"):
        jax.grad(criterion, argnums=1)(x, t.astype(jnp.float32))
    with pytest.raises(TypeError, match="weight_map must not be differentiated"):
        jax.grad(lambda w: criterion(x, t, weight_map=w))(jnp.ones(SHAPE))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda x: jax.grad(criterion)(x, t).sum())(x)
    jax.grad(lambda x: criterion(x, jax.lax.stop_gradient(jnp.abs(jnp.sign(x)))))(x)


def test_wrong_input_says_why():
    x, t = map(jnp.asarray, data(LOSSES[0]))
    with pytest.raises(TypeError, match="loss must be a fastseg loss, got str"):
        fastseg.jax.Loss("bce")
    with pytest.raises(TypeError, match="loss must be a fastseg loss, got str"):
        fastseg.jax.compute_loss("bce", x, t)
    for transform in (lambda f: f, jax.jit, jax.grad):
        with pytest.raises(ValueError, match="targets must have"):
            transform(fastseg.jax.Loss(LOSSES[0]))(x, t[:1])
    with pytest.raises(TypeError, match="logits must be floating point, got uint8"):
        fastseg.jax.Loss(LOSSES[0])(t, t)
    with pytest.raises(Exception, match="targets must be 0 or 1, got 8"):
        jax.jit(fastseg.jax.Loss(LOSSES[0]))(x, t + 7).block_until_ready()


def test_plain_verbs_and_optimisers_refuse_arrays_of_jax():
    x = jnp.ones((1, 1, 4))
    with pytest.raises(
        TypeError, match=r"pass numpy.asarray\(...\), or call fastseg.jax.value_and"
    ):
        fs.BCE()(x, x)
    with pytest.raises(TypeError, match=r"params\[0\] is a JAX array, which is immutable"):
        fs.Adam([x])
    opt = fs.GradientDescent(np.ones((1, 1, 4), np.float32), lr=1.0)
    with pytest.raises(TypeError, match=r"grads\[0\] is a JAX array; pass numpy.asarray"):
        opt.step([x])
    opt.step([np.asarray(x)])


def test_jax_is_imported_by_those_alone_who_use_it():
    code = "import sys, fastseg, fastseg.torch; assert 'jax' not in sys.modules"
    path = [entry for entry in sys.path if entry]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(path)})


ONE_CPU = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, fastseg as fs, fastseg.jax
criterion = fastseg.jax.Loss(fs.BCE() + fs.SoftJaccard())
step = jax.jit(jax.grad(lambda w, x, t: criterion(w * x, t)))
w, x = jnp.float32(1), jnp.ones((2, 1, 64, 64, 64))
for k in range(30):
    w = w - step(w, x + k, jnp.ones(x.shape, jnp.uint8))
print(float(w))
"""


INTERRUPTED = """
import signal, time
import jax, jax.numpy as jnp, fastseg as fs, fastseg.jax
from random import Random
step = jax.jit(fastseg.jax.Loss(fs.BCE()))
x, t = jnp.zeros((1, 1, 8)), jnp.ones((1, 1, 8))
float(step(x, t))
def interrupt(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
seen, end, random = set(), time.monotonic() + 5, Random(0)
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 3e-4))
        for _ in range(100):
            step(x, t)
    except BaseException as error:
        seen.add(type(error).__name__)
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass
for _ in range(20):  # what is still to come
    try:
        time.sleep(0.02)
    except KeyboardInterrupt:
        pass
print("alive", float(step(x, t)), seen)
"""


def test_an_interrupt_does_not_end_the_process():
    """Ctrl-C may come between any two steps of Python that XLA called: XLA has its answer."""
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
        capture_output=True,
        text=True,
    )
    # Where Ctrl-C came between the loop's own steps it ended the program; nothing else may.
    assert done.returncode in (0, 1, 130, -signal.SIGINT), done.stderr[-2000:]
    assert "alive" in done.stdout or "KeyboardInterrupt" in done.stderr


def test_errors_of_any_text_arrive(monkeypatch):
    def raising(*args, **kwargs):
        raise ValueError("file \udcff is not there")

    loss = fs.BCE(pos_weight=3.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(loss), "statistics", raising)
        patch.setattr(type(loss), "__call__", raising)
        with pytest.raises(Exception, match=r"ValueError: file . is not there"):
            float(jax.jit(fastseg.jax.Loss(loss))(jnp.zeros((1, 1, 4)), jnp.ones((1, 1, 4))))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_one_cpu_is_enough():
    """JAX's own callbacks wait for ever there: for copies by the thread that waits for them."""
    path = ":".join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", ONE_CPU]
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run(command, check=True, env=environment, timeout=300, capture_output=True)


def test_buffers_of_every_dtype_come_as_they_are():
    from fastseg.xla import DTYPES

    x = np.linspace(-3, 3, 24).astype(np.float32).reshape(1, 1, 24)
    with jax.enable_x64(True):
        for name in DTYPES.values():
            t = jnp.asarray(x > 0).astype(name)
            got = jax.jit(fastseg.jax.Loss(fs.BCE()))(jnp.asarray(x), t)
            assert float(got) == pytest.approx(float(fs.BCE()(x, x > 0)), rel=1e-6), name
    with pytest.raises(Exception, match="targets must be 0 or 1"):
        jax.jit(fastseg.jax.Loss(fs.BCE()))(
            jnp.asarray(x), jnp.full(x.shape, 7)
        ).block_until_ready()


def test_programs_kept_on_disk_find_their_loss():
    """The name of a loss in a program is made of the loss, not of when it came."""
    from fastseg import xla

    x, t = map(jnp.asarray, data(LOSSES[0]))
    before = dict(xla._verbs)
    xla._verbs.clear()
    xla._key_of.cache_clear()
    jax.clear_caches()
    for loss in reversed(LOSSES[:2]):
        jax.jit(fastseg.jax.Loss(loss))(x, t).block_until_ready()
    first = set(xla._verbs)
    xla._verbs.clear()
    xla._key_of.cache_clear()
    jax.clear_caches()
    for loss in LOSSES[:2]:
        jax.jit(fastseg.jax.Loss(loss))(x, t).block_until_ready()
    assert set(xla._verbs) == first and len(first) == 2
    xla._verbs.update(before)
