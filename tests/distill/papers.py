"""The losses as the papers write them, in loops over plain numbers; slow, and for moderate logits only."""

import math


def softmax(logits, temperature=1.0):
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [power / math.fsum(powers) for power in powers]


def z_scores(logits):
    mean = math.fsum(logits) / len(logits)
    deviation = math.sqrt(math.fsum((z - mean) ** 2 for z in logits) / len(logits))
    return [(z - mean) / deviation for z in logits]


def kd(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for p, q in zip(softmax(s, temperature), softmax(t, temperature), strict=True):
            total += q * math.log(q / p)
    return temperature**2 * total / len(student)


def nkd_of_one(s, t, k, temperature, alpha):
    """One image with target ``k``."""
    loss = -softmax(t)[k] * math.log(softmax(s)[k])
    p = softmax([z for c, z in enumerate(s) if c != k], temperature)
    q = softmax([z for c, z in enumerate(t) if c != k], temperature)
    return loss - alpha * temperature**2 * math.fsum(b * math.log(a) for a, b in zip(p, q, strict=True) if b)


def nkd(student, teacher, labels, temperature, alpha):
    losses = [nkd_of_one(*image, temperature, alpha) for image in zip(student, teacher, labels, strict=True)]
    return math.fsum(losses) / len(losses)


def soft_nkd(student, teacher, soft, temperature, alpha):
    """The expectation of the loss over the labels, one class after the other."""
    total = [
        y * nkd_of_one(s, t, k, temperature, alpha)
        for s, t, row in zip(student, teacher, soft, strict=True)
        for k, y in enumerate(row)
        if y
    ]
    return math.fsum(total) / len(student)


def pearson(xs, ys):
    x_mean, y_mean = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    covariance = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    x_norm = math.sqrt(math.fsum((x - x_mean) ** 2 for x in xs))
    y_norm = math.sqrt(math.fsum((y - y_mean) ** 2 for y in ys))
    return covariance / (x_norm * y_norm + 1e-8)


def dist(student, teacher, temperature, beta, gamma):
    p = [softmax(s, temperature) for s in student]
    q = [softmax(t, temperature) for t in teacher]
    between = [1 - pearson(*rows) for rows in zip(p, q, strict=True)]
    within = [1 - pearson(*columns) for columns in zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)]
    mean_between, mean_within = math.fsum(between) / len(between), math.fsum(within) / len(within)
    return temperature**2 * (beta * mean_between + gamma * mean_within)
