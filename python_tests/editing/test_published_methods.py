"""Every method against the formula of its own paper or code, written in dense fp64 by another route.

Columns are keys here, as in the papers: `K [in, n]`, `R [out, n]`. Run as a script, with python_tests/helpers
on the path, this prints the table of docs/methods.md.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import error
from matrices import covariance_of

import engram_kernels as ek
from engram_kernels.editing.methods import METHODS, Method
from engram_kernels.editing.writing.preconditioner import LayerOperator

WIDTH, OUT, BATCH, BATCHES = 36, 14, 5, 4
DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"

# The published size of what the package scales to a small model, or what a small stream asks for.
PUBLISHED = {
    "memit": {"ridge": 15000.0},
    "encore": {"moment": 15000.0, "identity": 20.0},
    "rlsedit": {"moment": 15000.0, "identity": 0.49},
    "betaedit": {"moment": 3000.0, "renew": 10},
    "nse": {"moment": 15000.0},
    "simie": {"ridge": 15000.0},
}


class Stream:
    """Batches of keys and wanted answers, and the statistics of a layer."""

    def __init__(self, batch: int):
        self.covariance = covariance_of(WIDTH, 1e3)
        self.weight = torch.randn(OUT, WIDTH, dtype=torch.float64)
        root = torch.linalg.cholesky(self.covariance)
        self.batches = []
        for _ in range(BATCH * BATCHES // batch):
            keys = root @ torch.randn(WIDTH, batch, dtype=torch.float64) * 6
            self.batches.append((keys, torch.randn(OUT, batch, dtype=torch.float64)))


def eye(size: int = WIDTH):
    return torch.eye(size, dtype=torch.float64)


def null_space(matrix, threshold):
    """U Uᵀ of the singular vectors under a share of the mean singular value."""
    vectors, values, _ = torch.linalg.svd(matrix)
    small = vectors[:, values <= threshold * values.mean()]
    assert 0 < small.shape[1] < WIDTH
    return small @ small.T


# Each: (W, C, batches, settings) to the edited W.


def rome(weight, covariance, batches, _):
    """Meng et al. 2022, eq. 2, one key after the other."""
    for keys, values in batches:
        direction = torch.linalg.solve(covariance, keys)
        weight = weight + (values - weight @ keys) @ direction.T / (direction.T @ keys)
    return weight


def emmet(weight, covariance, batches, _):
    """Gupta et al. 2024: (V − WK)(Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹."""
    inverse = torch.linalg.inv(covariance)
    for keys, values in batches:
        weight = (
            weight + (values - weight @ keys) @ torch.linalg.inv(keys.T @ inverse @ keys) @ keys.T @ inverse
        )
    return weight


def memit(weight, covariance, batches, method):
    """Meng et al. 2023, eq. 14: R Kᵀ (λC + KKᵀ)⁻¹."""
    for keys, values in batches:
        residual = values - weight @ keys
        weight = weight + residual @ keys.T @ torch.linalg.inv(method.ridge * covariance + keys @ keys.T)
    return weight


def alphaedit(weight, covariance, batches, method, behind=lambda weight: eye()):
    """Fang et al. 2024: R Kᵀ P (KₚKₚᵀP + KKᵀP + L₂I)⁻¹."""
    projection, earlier = null_space(covariance, method.null_space), torch.zeros_like(covariance)
    for keys, values in batches:
        system = projection @ (keys @ keys.T + earlier) + method.ridge * eye()
        update = torch.linalg.solve(system, projection @ keys @ (values - weight @ keys).T).T
        weight = weight + update @ behind(weight).T
        earlier = earlier + keys @ keys.T
    return weight


def encore(weight, covariance, batches, method):
    """Gupta et al. 2025, as in its code: the statistics, the identity and earlier keys beside KKᵀ."""
    preserved = method.moment * covariance + method.identity * eye()
    for keys, values in batches:
        adjusted = torch.linalg.solve(preserved + keys @ keys.T, keys)
        weight = weight + (values - weight @ keys) @ adjusted.T
        preserved = preserved + keys @ keys.T
    return weight


def rlsedit(weight, covariance, batches, method):
    """Wang et al. 2026: C₀ = (λ²I + μ²K₀ᵀK₀)⁻¹, Cₜ = Cₜ₋₁ − F(I + KᵀF)⁻¹Fᵀ, W + (Cₜ K (V − KᵀW))ᵀ."""
    state = torch.linalg.inv(method.identity * eye() + method.moment * covariance)
    for keys, values in batches:
        gain = state @ keys
        state = state - gain @ torch.linalg.solve(eye(keys.shape[1]) + keys.T @ gain, gain.T)
        weight = weight + (state @ keys @ (values.T - keys.T @ weight.T)).T
    return weight


def evoedit(weight, covariance, batches, method):
    """Lyu et al. 2025: P loses the left singular vectors of PK after each batch."""
    projection = null_space(covariance, method.null_space)
    for keys, values in batches:
        system = projection @ keys @ keys.T + method.ridge * eye()
        weight = weight + torch.linalg.solve(system, projection @ keys @ (values - weight @ keys).T).T
        vectors, strengths, _ = torch.linalg.svd(projection @ keys, full_matrices=False)
        vectors = vectors[:, strengths > 1e-10]
        projection = projection - vectors @ vectors.T
    return weight


def betaedit(weight, covariance, batches, method):
    """Liu et al. 2026, as in its code: AlphaEdit with λ₁C in the system, its P renewed every τ edits."""
    projection, earlier = null_space(covariance, method.null_space), torch.zeros_like(covariance)
    count = renewed = 0
    for keys, values in batches:
        if count - renewed >= method.renew:
            protected = (earlier / count + method.moment * covariance) / (method.moment + 1)
            projection, renewed = null_space(protected, method.null_space), count
        inner = keys @ keys.T + earlier + method.moment * covariance
        system = projection @ inner + method.identity * eye()
        weight = weight + torch.linalg.solve(system, projection @ keys @ (values - weight @ keys).T).T
        earlier, count = earlier + keys @ keys.T, count + keys.shape[1]
    assert renewed
    return weight


def nse(weight, covariance, batches, method):
    """Jiang et al. 2024, as in its code: MEMIT's system on the neurons that a batch activates most."""
    earlier = torch.zeros_like(covariance)
    for keys, values in batches:
        scores, order = torch.sort(keys.abs().sum(1), descending=True)
        last = torch.where(torch.cumsum(scores, 0) <= method.neurons * scores.sum())[0][-1]
        chosen = order[: last + 1].tolist()
        assert 0 < len(chosen) < WIDTH
        inner = (method.moment * covariance + earlier)[chosen][:, chosen] + keys[chosen] @ keys[chosen].T
        update = torch.zeros_like(weight)
        update[:, chosen] = (values - weight @ keys) @ torch.linalg.solve(inner, keys[chosen]).T
        weight, earlier = weight + update, earlier + keys @ keys.T
    return weight


def sphere(weight, covariance, batches, method):
    """Liu et al. 2025, as in its code: AlphaEdit's update times I − αUUᵀ, U of the normalised rows."""
    energy, alpha = method.suppress

    def behind(weight):
        rows = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        count = int((torch.cumsum(values.flip(0), 0) / values.sum() <= energy).sum()) + 1
        return eye() - alpha * vectors[:, -count:] @ vectors[:, -count:].T

    return alphaedit(weight, covariance, batches, method, behind)


def simie(weight, covariance, batches, method):
    """Guo et al. 2025, as in its code, around MEMIT: W + (W̃ − W) KKᵀ (λI + Σ KKᵀ)⁻¹."""
    system = method.ideal * eye()
    for keys, values in batches:
        edited = memit(weight, covariance, [(keys, values)], method)
        system = system + keys @ keys.T
        weight = weight + torch.linalg.solve(system.T, ((edited - weight) @ keys @ keys.T).T).T
    return weight


def ultraedit(weight, covariance, batches, method):
    """Gu et al. 2025: (KKᵀ + I)⁻¹ K of given answers, which `test_gradients.py` holds to the paper too."""
    for keys, values in batches:
        answers = values - weight @ keys
        weight = weight + torch.linalg.solve(keys @ keys.T + eye(), keys @ answers.T).T
    return weight


FORMULAS = {
    "engram": emmet, "engram-forms": rome, "rome": rome, "r-rome": rome, "emmet": emmet, "memit": memit,
    "alphaedit": alphaedit, "encore": encore, "rlsedit": rlsedit, "evoedit": evoedit, "betaedit": betaedit,
    "nse": nse, "sphere": sphere, "simie": simie, "ultraedit": ultraedit,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_a_method_is_its_papers_formula(name):
    method = replace(METHODS[name], **PUBLISHED.get(name, {}))
    if method.null_space is not None:
        method = replace(method, null_space=0.3)  # of which a covariance of this spectrum has half
    stream = Stream(method.batch if method.batch == 1 else BATCH)
    expected = FORMULAS[name](stream.weight, stream.covariance, stream.batches, method)
    weight = stream.weight.clone()
    operator = LayerOperator(method, ek.Covariance.from_second_moment(stream.covariance, 1))
    for keys, values in stream.batches:
        residuals = values.T - keys.T @ weight.T
        left, right, *_ = operator.factors(weight, keys.T.contiguous(), residuals)
        ek.apply_low_rank_(weight, left, right)
        operator.remember(keys.T)
    assert error(weight - stream.weight, expected - stream.weight) <= 2e-11


def test_every_method_has_a_formula():
    """But `natural`, which is no joint write and which `test_gradient_values.py` has."""
    assert METHODS.keys() - FORMULAS.keys() == {"natural"}


def test_preserve_makes_rlsedit_of_memit():
    """The recursion of RLSEdit without its identity is MEMIT that preserves at 1/λ."""
    stream = Stream(BATCH)
    covariance = ek.Covariance.from_second_moment(stream.covariance, 1)
    found = []
    for method in (
        replace(METHODS["memit"], ridge=7.0, preserve=True),
        replace(METHODS["rlsedit"], moment=7.0, identity=0.0),
    ):
        weight, operator = stream.weight.clone(), LayerOperator(method, covariance)
        for keys, values in stream.batches:
            left, right, *_ = operator.factors(weight, keys.T, values.T - keys.T @ weight.T)
            ek.apply_low_rank_(weight, left, right)
            operator.remember(keys.T)
        found.append(weight - stream.weight)
    assert error(found[0], found[1]) <= 2e-11


def test_lyaplock():
    """Wang et al. 2025 (arXiv 2505.15702), as in its code: from W₀ each time, C weighed by a virtual queue.

    There Δ = (V R Kᵀ + aZw (W₀C − WC) + V (Σ WₜKₜKₜᵀ − W Σ KₜKₜᵀ)) (V KKᵀ + aZwC + V Σ KₜKₜᵀ)⁻¹; here it is
    one write of all keys so far into W₀, with the ridge aZw/V.
    """
    stream, scale, bound, weighed = Stream(BATCH), 1.0, 4.0, 1000.0
    base, covariance = stream.weight, stream.covariance
    # The published code.
    weight, answered, outer = base, torch.zeros(OUT, WIDTH).double(), torch.zeros(WIDTH, WIDTH).double()

    def loss(weight):
        return float(torch.trace((weight - base) @ covariance @ (weight - base).T))

    queue = step = least = first = None
    expected = []
    for keys, values in stream.batches:
        factor = weighed if queue is None else step * queue * weighed
        left = scale * (values - weight @ keys) @ keys.T + factor * (base - weight) @ covariance
        left = left + scale * (answered - weight @ outer)
        system = scale * (keys @ keys.T + outer) + factor * covariance
        weight = weight + left @ torch.linalg.inv(system).T
        if queue is None:
            first = loss(weight)
            step, queue = 1 / math.sqrt(bound * first), math.sqrt(bound * first)
            least = queue
        queue = max(queue + step * (loss(weight) - bound * first), least)
        answered, outer = answered + weight @ keys @ keys.T, outer + keys @ keys.T
        expected.append((weight, queue))
    # The operator.
    operator = ek.Preconditioner.from_covariance(ek.Covariance.from_second_moment(covariance, 1))
    weight, queue, keys, residuals = base, None, base.new_empty(0, WIDTH), base.new_empty(0, OUT)
    for (new, values), (wanted, waiting) in zip(stream.batches, expected, strict=True):
        given = torch.cat([residuals, values.T - new.T @ base.T])
        keys = torch.cat([keys, new.T])
        ridge = weighed if queue is None else step * queue * weighed / scale
        left, right = operator.factors(base, keys, residual=given, ridge=ridge)
        weight = base + left @ right
        assert error(weight - base, wanted - base) <= 2e-11
        queue = least if queue is None else queue
        queue = max(queue + step * (loss(weight) - bound * first), least)
        assert abs(queue - waiting) <= 1e-9 * waiting
        # What earlier keys are answered with from now on is what was written.
        residuals = torch.cat([residuals, new.T @ (weight - base).T])


# -- the table -----------------------------------------------------------------------------------------------


def formula(method: Method) -> str:
    """Q before any edit."""
    sizes = {"C": method.moment, "I": method.identity}
    terms = [name if size == 1 else f"{size:g} {name}" for name, size in sizes.items() if size]
    joined = " + ".join(terms)
    whole = {"C": "C⁻¹", "I": "I"}.get(joined, f"({joined})⁻¹")
    if method.null_space is not None:
        whole = "Π" if whole == "I" else f"{whole} in the span of Π"
    return whole + (" of chosen neurons" if method.neurons is not None else "")


def rest(method: Method) -> str:
    """What a method has beside Q and λ."""
    found = []
    if method.renew is not None:
        found.append(f"Π anew every {method.renew:,} edits")
    if method.suppress is not None:
        found.append("R = I − αUUᵀ")
    if method.ideal is not None:
        found.append("around it (λI + S)⁻¹")
    if method.values == "gradient":
        found.append("E = −η ‖k̂‖² ĝ" if method.gradient.rate else "no search: natural gradients")
    return ", ".join(found) or "–"


def table() -> str:
    """The rows of docs/methods.md."""
    lines = [
        "| method | Q | λ | ω | beside | layers | edits at once | source |",
        "|---|---|---:|---:|---|---:|---:|---|",
    ]
    for name, method in METHODS.items():
        held = "∞" if math.isinf(method.held) else f"{method.held:g}"
        cells = [
            f"`{name}`", formula(method), f"{method.ridge:g}", held, rest(method), str(method.layers),
            str(method.batch or "all"), method.source,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_documents_table_is_the_settings():
    assert table() in DOCUMENT.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
