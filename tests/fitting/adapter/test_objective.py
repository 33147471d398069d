"""Real-Fake's loss against its worked numbers, on one worker and on several, and Min-SNR's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayexpand.fitting.adapter.objective import l_simple, min_snr, mmd, noised
from rayexpand.models.tiny.architecture import build_scheduler
from tests.fitting.adapter.ranks import Reduce, run_ranks

PAIR = [[1.0, 2.0], [3.0, -2.0]]  # e_1, e_2 of two numbers each
OTHERS = [[-1.0, 0.0], [1.0, 4.0]]  # of a second worker
HALF = [0.5, 1.0]


def errors(rows: Any = PAIR) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


def weights(values: Any = (1.0, 1.0)) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(("value", "expected"), [
    (lambda: l_simple(errors(), weights()), 4.5),
    (lambda: l_simple(errors()[:1], weights([1.0])), 2.5),
    (lambda: l_simple(errors()[1:], weights([1.0])), 6.5),
    (lambda: mmd(errors()), 2.0),
    (lambda: mmd(errors(), reduction="sum"), 8.0),
    (lambda: l_simple(errors(), weights()) + 0.05 * mmd(errors()), 4.6),  # paper
    (lambda: l_simple(errors(), weights()) + 0.003 * mmd(errors(), reduction="sum"), 4.524),  # code
    (lambda: l_simple(errors(), weights(HALF)), 3.875),
    (lambda: mmd(errors(), weights(HALF)), 1.65625),
    (lambda: mmd(errors(), weights(HALF), reduction="sum"), 6.625),
    (lambda: l_simple(errors(), weights(HALF)) + 0.003 * mmd(errors(), weights(HALF), reduction="sum"), 3.894875),
    (lambda: l_simple(errors(), weights(HALF)) + 0.05 * mmd(errors()), 3.975),  # recommended
    (lambda: mmd(errors(PAIR + PAIR)), 2.0),  # a batch twice: the mean stays, the sum doubles
    (lambda: mmd(errors(PAIR + PAIR), reduction="sum"), 32.0),
    (lambda: mmd(errors([[2.0, 1.0]] * 3)), 2.5),  # equal errors: L_diff
    (lambda: mmd(errors([[1.0, 3.0], [-1.0, -3.0]])), 0.0),  # targets permuted within the batch
    (lambda: mmd(errors([[1.0], [-1.0]]), weights(HALF), reduction="sum"), 0.25),
    (lambda: mmd(errors(), scope="per_rank"), 2.0),
    (lambda: mmd(errors(PAIR + OTHERS), scope="per_rank", images=2), 2.0),  # (0, 2) and (2, 0), each squared
    (lambda: mmd(errors(PAIR + OTHERS), scope="per_rank", images=2, reduction="sum"), 8.0),
])
def test_worked_numbers(value: Callable[[], Tensor], expected: float) -> None:
    assert float(value()) == pytest.approx(expected, abs=1e-6)


def test_gradient_by_hand() -> None:
    e = errors().requires_grad_(True)

    mmd(e).backward()

    assert e.grad is not None
    assert e.grad[:, :, 0, 0].tolist() == [[1.0, 0.0], [1.0, 0.0]]  # 2 mean / (N D)


def test_balanced_errors_pull_nowhere() -> None:
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(rng.standard_normal((6, 4, 2, 2), np.float32))
    out = targets[torch.tensor([3, 0, 5, 1, 2, 4])].clone().requires_grad_(True)

    loss = mmd(targets - out)
    loss.backward()

    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert out.grad is not None
    torch.testing.assert_close(out.grad, torch.zeros_like(out), rtol=0, atol=1e-7)
    assert float(l_simple(targets - out, torch.ones(6)).detach()) > 1


def test_never_above_the_plain_loss() -> None:
    rng = np.random.default_rng(1)
    e = torch.from_numpy(rng.standard_normal((16, 5, 4, 2, 2), np.float32)) + 0.3
    w = torch.from_numpy(rng.random((16, 5), np.float32))
    for e_BCHW, w_B in zip(e, w, strict=True):
        assert 0 <= mmd(e_BCHW) < l_simple(e_BCHW, torch.ones(5))
        assert 0 <= mmd(e_BCHW, w_B) < l_simple(e_BCHW, w_B)


@pytest.mark.parametrize(("n", "expected"), [(8, 0.125), (64, 0.015625)])
def test_independent_errors_leave_variance_over_n(n: int, expected: float) -> None:
    e = torch.from_numpy(np.random.default_rng(2).standard_normal((n, 4, 64, 64), np.float32))

    assert float(mmd(e)) == pytest.approx(expected, rel=0.05)


def test_half_precision_errors_are_added_in_fp32() -> None:
    e = torch.full((4096, 1, 1, 1), 2049.0).half()  # a sum far beyond fp16's largest number

    assert float(mmd(e, reduction="sum")) == pytest.approx((4096 * 2048) ** 2)


def sd_abar() -> Tensor:
    return build_scheduler().alphas_cumprod


def test_min_snr_weights_of_stable_diffusion() -> None:
    w_T = min_snr(sd_abar(), 5.0, "epsilon")

    assert [round(float(w_T[t]), 5) for t in (0, 50, 100)] == pytest.approx([0.00425, 0.2544, 0.5914], abs=5e-5)
    assert float(w_T[146]) < 1
    assert bool((w_T[147:] == 1).all())
    assert float(w_T.mean()) == pytest.approx(0.917, abs=5e-4)
    assert float(w_T.square().mean()) == pytest.approx(0.893, abs=5e-4)


def test_min_snr_weights_of_velocities() -> None:
    abar_T = sd_abar()
    snr_T = abar_T.double() / (1 - abar_T.double())

    torch.testing.assert_close(min_snr(abar_T, 5.0, "v_prediction"), (snr_T.clamp(max=5) / (snr_T + 1)).float())
    assert float(min_snr(torch.tensor([0.0]), 5.0, "v_prediction")) == 0  # zero terminal SNR
    # the same weight on the same error: a velocity's is 1 / sqrt(abar) times the noise's
    torch.testing.assert_close(min_snr(abar_T, 5.0, "v_prediction") / abar_T, min_snr(abar_T, 5.0, "epsilon"))


@pytest.mark.parametrize("gamma", [None, float("inf")])
def test_no_limit_is_the_plain_error(gamma: float | None) -> None:
    w_B = min_snr(sd_abar()[[0, 400, 999]], gamma, "epsilon")
    e = torch.from_numpy(np.random.default_rng(3).standard_normal((3, 4, 2, 2), np.float32))

    assert w_B.tolist() == [1, 1, 1]
    assert torch.equal(l_simple(e, w_B), e.square().flatten(1).mean(1).mean())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_are_the_schedulers(prediction: str) -> None:
    scheduler = build_scheduler(prediction)
    z0, noise = (torch.from_numpy(x) for x in np.random.default_rng(4).standard_normal((2, 5, 4, 2, 2), np.float32))
    t_B = torch.tensor([0, 1, 500, 998, 999])

    z_t, target = noised(z0, noise, scheduler.alphas_cumprod[t_B], prediction)

    torch.testing.assert_close(z_t, scheduler.add_noise(z0, noise, t_B))
    torch.testing.assert_close(target, noise if prediction == "epsilon" else scheduler.get_velocity(z0, noise, t_B))


def test_two_workers_by_hand() -> None:
    def work(rank: int, reduce: Reduce) -> tuple[float, float, float]:
        e = errors([PAIR, OTHERS][rank])
        shared = mmd(e, world=2, reduce=reduce)
        return float(shared), float(mmd(e, scope="per_rank", world=2)), float(l_simple(e, weights()))

    first, second = run_ranks(2, work)

    assert first[0] == second[0] == 1.0  # mean error (1, 1)
    assert (first[1] + second[1]) / 2 == 2.0
    assert (first[2] + second[2]) / 2 == 4.5


def averaged(sizes: tuple[int, ...], term: Callable[..., Tensor]) -> tuple[Tensor, list[float], Tensor, float]:
    """What DDP gets of `term(e, share, world, reduce)`: the gradient averaged over workers and their values; then the
    gradient and value on one process."""
    rng = np.random.default_rng(sum(sizes))
    x = torch.from_numpy(rng.standard_normal((sum(sizes), 4, 3, 3), np.float32)) + 0.2
    y = torch.from_numpy(rng.standard_normal((sum(sizes), 4, 3, 3), np.float32))
    world, starts = len(sizes), np.cumsum([0, *sizes])

    def backward(rows: slice, share: float, world: int, reduce: Reduce | None) -> tuple[Tensor, float]:
        weight = torch.tensor([0.7, -0.4, 1.3, 0.1]).requires_grad_(True)
        loss = term(y[rows] - weight.view(1, 4, 1, 1) * x[rows], share=share, world=world, reduce=reduce)
        loss.backward()
        assert weight.grad is not None
        return weight.grad, float(loss.detach())

    found = run_ranks(world, lambda rank, reduce: backward(
        slice(starts[rank], starts[rank + 1]), world * sizes[rank] / sum(sizes), world, reduce))
    gradient, value = backward(slice(None), 1.0, 1, None)
    return torch.stack([grad for grad, _ in found]).mean(0), [value for _, value in found], gradient, value


SIZES = [(2, 2, 2), (1, 2, 3), (3, 3), (1, 4)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_workers_average_to_one_process(sizes: tuple[int, ...], reduction: Any, weighted: bool) -> None:
    def term(e: Tensor, **where: Any) -> Tensor:
        w_B = e.detach().square().flatten(1).mean(1).clamp(max=1) if weighted else None
        return mmd(e, w_B, reduction=reduction, **where)

    gradient, values, expected, value = averaged(sizes, term)

    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert values == pytest.approx([value] * len(sizes), rel=1e-6)
    assert len(set(values)) == 1, "the same value on every worker, to the bit"


@pytest.mark.parametrize("sizes", [(4, 4), (2, 4, 2), (2, 2, 2, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_of_some_images_do_not_depend_on_the_workers(sizes: tuple[int, ...], reduction: Any) -> None:
    gradient, values, expected, value = averaged(
        sizes, lambda e, **where: mmd(e, scope="per_rank", images=2, reduction=reduction, **where))

    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert np.mean(values) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_plain_loss_of_workers_averages_to_one_process(sizes: tuple[int, ...]) -> None:
    gradient, values, expected, value = averaged(
        sizes, lambda e, share, **_: share * l_simple(e, torch.ones(len(e))))

    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert np.mean(values) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_between_the_plain_loss_and_the_global_term(sizes: tuple[int, ...]) -> None:
    _, shared, _, _ = averaged(sizes, lambda e, **where: mmd(e, **where))
    _, apart, _, _ = averaged(sizes, lambda e, **where: mmd(e, scope="per_rank", **where))
    _, plain, _, _ = averaged(sizes, lambda e, share, **_: share * l_simple(e, torch.ones(len(e))))

    assert shared[0] < np.mean(apart) < np.mean(plain)


def test_a_worker_alone_counts_by_its_rows() -> None:
    e = [errors([[2.0, 0.0]]), errors([*OTHERS, [0.0, 2.0]])]  # mean errors (2, 0) and (0, 2), of 1 and 3 rows

    terms = [mmd(e[rank], scope="per_rank", world=2, share=2 * len(e[rank]) / 4) for rank in range(2)]

    assert [float(term) for term in terms] == [1.0, 3.0]  # their mean is 1/4 of 2 and 3/4 of 2
    assert float(l_simple(e[0], torch.ones(1))) == 2.0


def no_gradient(e: Tensor, share: float, world: int, reduce: Reduce | None) -> Tensor:
    mean = share * e.mean(0)
    return (mean if reduce is None else reduce(mean.detach()) / world + 0 * mean).square().mean()


def local_gradient(e: Tensor, share: float, world: int, reduce: Reduce | None) -> Tensor:
    """Collective without autograd on the graph's own tensor: each worker differentiates its rows' own term."""
    mean = e.mean(0)
    return mean.square().mean() + 0 * (0 if reduce is None else reduce(mean.detach()).sum())


def one_over_world(e: Tensor, share: float, world: int, reduce: Reduce | None) -> Tensor:
    mean = e.mean(0)
    if reduce is None:
        return mean.square().mean()
    return (reduce(share * mean.detach()) / world + (mean - mean.detach()) / world).square().mean()


@pytest.mark.parametrize("wrong", [no_gradient, local_gradient, one_over_world])
def test_tempting_versions_are_wrong(wrong: Callable[..., Tensor]) -> None:
    gradient, _, expected, _ = averaged((2, 2, 2), wrong)

    assert not torch.allclose(gradient, expected, rtol=0.1)
    if wrong is one_over_world:
        torch.testing.assert_close(3 * gradient, expected, rtol=1e-5, atol=1e-6)
