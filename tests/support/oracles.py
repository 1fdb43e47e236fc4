"""The paper's equations in float64 with one loop per sum: the expected values of tests."""

import itertools
import math

import torch


def cross_entropy(logits, probabilities):
    """l(y, p) = - sum_c p_c log softmax(y)_c for one prediction of one image."""
    peak = max(float(v) for v in logits.detach())  # exp of a logit itself would overflow
    log_sum = peak + torch.log(sum(torch.exp(v - peak) for v in logits))
    return -sum(p * (v - log_sum) for p, v in zip(probabilities, logits, strict=True))


def one_hot(label, classes):
    return [1.0 if c == int(label) else 0.0 for c in range(classes)]


def nested(leaf_logits, size):
    """Eq. (5): the mean of the first `size` networks of one image."""
    return sum(leaf_logits[n] for n in range(size)) / size


def sizes(leaves):
    """1, 2, 4, ... and all: the networks of each y^b, b = 0 to B."""
    return sorted({min(2**b, leaves) for b in range(math.ceil(math.log2(leaves)) + 1)})


def soft_labels(leaf_logits, temperature):
    """softmax(y^E / T) of one image (eq. 1, section 4.1): plain numbers, so no gradient can pass."""
    mean = nested(leaf_logits, len(leaf_logits)).detach() / temperature
    peak = max(float(v) for v in mean)
    weights = [math.exp(float(v) - peak) for v in mean]
    return [w / sum(weights) for w in weights]


def per_image(term, logits, probabilities, temperature):
    """One term for one image: logits (leaves, classes)."""
    leaves = len(logits)
    if term == "independent":  # eq. (9)
        return sum(cross_entropy(logits[n], probabilities) for n in range(leaves))
    if term == "hierarchical":  # eq. (10)
        return sum(cross_entropy(nested(logits, size), probabilities) for size in sizes(leaves))
    if term == "ensemble":
        return cross_entropy(nested(logits, leaves), probabilities)
    teacher = soft_labels(logits, temperature)
    if term == "codistillation":  # eq. (11)
        return sum(cross_entropy(logits[n], teacher) for n in range(leaves))
    if term == "stepwise_codistillation":
        steps = [nested(logits, size) for size in sizes(leaves)]
        teachers = [(y, soft_labels([larger], temperature)) for y, larger in itertools.pairwise(steps)]
        return 0 * logits[0, 0] + sum(cross_entropy(y, teacher) for y, teacher in teachers)
    # eq. (12): b < B, all nested ensembles but the full one; the zero keeps one leaf's empty sum in the graph
    smaller = [nested(logits, size) for size in sizes(leaves)[:-1]]
    return 0 * logits[0, 0] + sum(cross_entropy(y, teacher) for y in smaller)


def loss(term, leaf_logits, target, temperature=2.0):
    """One term, summed over predictions, averaged over images."""
    total = 0.0
    for image in range(len(leaf_logits)):
        given = target[image]
        probabilities = given.tolist() if target.ndim == 2 else one_hot(given, leaf_logits.shape[-1])
        total = total + per_image(term, leaf_logits[image], probabilities, temperature)
    return total / len(leaf_logits)
