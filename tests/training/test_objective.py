import numpy as np
import pytest
import torch

from karmma_pipeline.training.objective import cross_entropy, distillation, worth_teaching


def log_softened(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(logits / temperature, dim=1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_t_squared_times_the_mean_kl_by_hand(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student = {"verb": rng.normal(size=(5, 4)), "noun": rng.normal(size=(5, 3))}
    teacher = {"verb": rng.normal(size=(5, 4)), "noun": rng.normal(size=(5, 3))}
    valid = np.array([1, 1, 0, 1, 1], bool)
    per_head = []
    for head in student:
        p, q = softmax(teacher[head] / temperature), softmax(student[head] / temperature)
        per_head.append((p * np.log(p / q)).sum(axis=1)[valid].mean())
    found = distillation(
        {h: torch.from_numpy(v) for h, v in student.items()},
        {h: log_softened(torch.from_numpy(v), temperature) for h, v in teacher.items()},
        torch.from_numpy(valid),
        temperature,
    )
    assert float(found) == pytest.approx(temperature**2 * np.mean(per_head), rel=1e-5)


def test_clips_the_teacher_cannot_see_teach_nothing() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    teacher = log_softened(torch.randn(3, 4), 2.0)
    valid = torch.tensor([True, False, True])
    loss = distillation({"verb": student}, {"verb": teacher}, valid, 2.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert not student.grad[1].any()
    assert student.grad[0].any()
    none = distillation({"verb": student}, {"verb": teacher}, torch.zeros(3, dtype=torch.bool), 2.0)
    assert none.item() == 0


def test_only_clips_that_the_teacher_knows_better_teach() -> None:
    rng = np.random.default_rng(0)
    student = {"verb": rng.normal(size=(60, 4)), "noun": rng.normal(size=(60, 3))}
    teacher = {"verb": rng.normal(size=(60, 4)), "noun": rng.normal(size=(60, 3))}
    labels = {head: rng.integers(-1, of.shape[1], 60) for head, of in student.items()}
    valid = rng.random(60) < 0.8
    T = 2.0
    p = {head: softmax(of / T) for head, of in teacher.items()}
    q = {head: softmax(of / T) for head, of in student.items()}
    knows: dict[str, dict[str, np.ndarray]] = {"right": {}, "better": {}}
    for head, label in labels.items():
        rows = np.arange(60), label
        knows["right"][head] = (p[head].argmax(axis=1) == label) | (label < 0)
        knows["better"][head] = (p[head][rows] > q[head][rows]) | (label < 0)
    logits = {h: torch.from_numpy(v) for h, v in student.items()}
    answers = {h: log_softened(torch.from_numpy(v), T) for h, v in teacher.items()}
    known = {h: torch.from_numpy(v) for h, v in labels.items()}
    assert worth_teaching("all", logits, answers, known, T) is None
    for clips, of in knows.items():
        worth = worth_teaching(clips, logits, answers, known, T)
        assert worth is not None
        per_head = []
        for head in student:
            assert np.array_equal(worth[head].numpy(), of[head])
            assert 0 < of[head].sum() < 60
            kl = (p[head] * np.log(p[head] / q[head])).sum(axis=1)
            per_head.append((kl * (valid & of[head])).sum() / valid.sum())
        found = distillation(logits, answers, torch.from_numpy(valid), T, worth=worth)
        assert float(found) == pytest.approx(T**2 * np.mean(per_head), rel=1e-5)


def test_cross_entropy_is_the_mean_over_heads_and_leaves_unknown_labels_out() -> None:
    rng = np.random.default_rng(0)
    logits = {"verb": rng.normal(size=(4, 3)), "noun": rng.normal(size=(4, 2))}
    labels = {"verb": np.array([0, 2, -1, 1]), "noun": np.array([1, -1, -1, 0])}
    per_head = []
    for head, scores in logits.items():
        known = labels[head] >= 0
        p = softmax(scores[known])[np.arange(known.sum()), labels[head][known]]
        per_head.append(-np.log(p).mean())
    found = cross_entropy(
        {h: torch.from_numpy(v) for h, v in logits.items()},
        {h: torch.from_numpy(v) for h, v in labels.items()},
    )
    assert float(found) == pytest.approx(np.mean(per_head), rel=1e-5)
    nothing = {"verb": torch.tensor([-1, -1])}
    assert float(cross_entropy({"verb": torch.randn(2, 3)}, nothing)) == 0
